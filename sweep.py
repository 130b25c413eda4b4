"""Train several times: with several seeds, on each fold of a cross-validation, with a grid of settings.

    python sweep.py --task mrpc --seeds 5                   # mean ± std, and how many runs collapsed
    python sweep.py --train_file my.csv --folds 5           # cross-validation, and labels that may be wrong
    python sweep.py --task rte --grid learning_rate=2e-5,5e-5 batch_size=16,32 --seeds 3
    python sweep.py --task cola --grid bert --workers 2     # the 18 settings of the BERT paper, two runs at a time

Each run is one of train.py, in a folder of its own; all other flags are train.py's. After an interruption the same
command goes on: finished runs are not repeated. With --shard I/N the tasks of a Slurm array share the runs; the same
command without it then sums up. With --final_test the runs of the best setting are scored on the test split.

Writes into --output_dir: results.json, report.html and runs.png with a dot for each run, a log of each run, and with
--folds out_of_fold.csv and label_issues.csv, the examples whose labels the model doubts most.
"""

import csv
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import common
from classifier import processes
from classifier.data import tasks
from classifier.data.writer import write_csv
from classifier.evaluation import intervals, metrics
from classifier.files import safe_name, write_json
from classifier.messages import BadInput, Preempted, RunFailed, format_duration, format_score, log
from classifier.training.lock import holder

ROOT = Path(__file__).resolve().parent
GRIDS = {  # Devlin et al. 2019, appendix A.3
    "bert": ["batch_size=16,32", "learning_rate=5e-5,3e-5,2e-5", "epochs=2,3,4"],
}
MOST_RUNS = 1000


@dataclass
class Run:
    """One training of a sweep."""

    setting: dict  # {flag: value}, of --grid
    changes: dict  # {flag: value}: the setting, and the seed or fold
    folder: Path

    @property
    def results(self):
        """What train.py wrote at its end; None before."""
        path = self.folder / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


# ------------------------------------------------------------------------------------------------------ what is trained


def build_parser():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("sweep (all other flags are train.py's)").add_argument
    add("--seeds", type=common.positive_int, metavar="N", help="train with the seeds 0 to N - 1")
    add("--folds", type=common.positive_int, metavar="N", help="validate on each of N parts of train once")
    words = "each combination of these values; bert: the grid of the BERT paper"
    add("--grid", nargs="+", metavar="FLAG=A,B|bert", help=words)
    add("--workers", type=common.positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--shard", metavar="I/N", help="train every N-th run, from the I-th, and sum nothing up")
    add("--final_test", action="store_true", help="score the runs of the best setting on the test split")
    add("--output_dir", metavar="DIR", help="(default: runs/TASK, with what is swept)")
    return parser


def parse_arguments():
    """Return (args, task, flags for train.py)."""
    args, flags = build_parser().parse_known_args()
    data_parser = common.argument_parser(__doc__, data=True)
    task = tasks.task_from_args(data_parser.parse_known_args(flags)[0], "demo")
    if not (args.seeds or args.folds or args.grid):
        raise BadInput("nothing is swept", "Give --seeds 5, --folds 5, or --grid learning_rate=2e-5,5e-5.")
    if args.seeds and args.folds:
        raise BadInput("--seeds and --folds: an interval would mix up both", "Give one of the two.")
    for name in ("--seed", "--fold", "--resume", "--dry_run", "--overwrite"):
        if any(flag == name or flag.startswith(f"{name}=") for flag in flags):
            raise BadInput(f"{name}: is not for a sweep", "Drop it; train.py takes it for a single run.")
    return args, task, flags


def read_grid(words):
    """Return [(flag, [values])] from the values of --grid. Raises BadInput."""
    grid = []
    for word in itertools.chain.from_iterable(GRIDS.get(word, [word]) for word in words or []):
        flag, _, values = word.partition("=")
        if not flag or not all(values.split(",")):
            raise BadInput(f"--grid {word}: neither FLAG=A,B nor {', '.join(GRIDS)}", "Write learning_rate=2e-5,5e-5.")
        grid.append((flag.removeprefix("--"), values.split(",")))
    return grid


def plan_runs(args, task, folder):
    """Return the Runs of a sweep, in the order in which they are trained."""
    grid = read_grid(args.grid)
    settings = [dict(zip(dict(grid), values, strict=True)) for values in itertools.product(*dict(grid).values())]
    seeds = [{"seed": seed} for seed in range(args.seeds or 0)]
    folds = [{"fold": f"{fold}/{args.folds}"} for fold in range(1, (args.folds or 0) + 1)]
    runs = []
    for setting, again in itertools.product(settings, seeds or folds or [{}]):
        changes = {**setting, **again}
        name = safe_name(",".join(f"{key}={value}".replace("/", " of ") for key, value in changes.items()))
        runs.append(Run(setting, changes, folder / name))
    if len(runs) > MOST_RUNS or len({run.folder for run in runs}) < len(runs):
        raise BadInput(f"{len(runs)} runs, or two of the same setting", f"Sweep over up to {MOST_RUNS} different ones.")
    return runs


def shard_of_runs(runs, shard):
    """Return the runs of --shard I/N, all without it. Raises BadInput."""
    if not shard:
        return runs
    number, _, shards = shard.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise BadInput(f"--shard {shard}: not I/N", "Write 1/4 to 4/4 for four shards.")
    return runs[int(number) - 1 :: int(shards)]


# ------------------------------------------------------------------------------------------------------------- training


class Trainings:
    """Runs train.py for each of several runs, some at a time, and ends them all when a signal asks for it."""

    def __init__(self, flags, workers):
        self.flags, self.workers = flags, workers
        self.processes, self.is_ending = set(), False
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.end)

    def end(self, *_):
        """Let each training save and end."""
        self.is_ending = True
        for process in list(self.processes):
            process.terminate()

    def train(self, run):
        """Train to the end; return the exit code."""
        if other := holder(run.folder):  # of a sweep that was killed
            log.info(f"{run.folder.name}: process {other['pid']} on {other['host']} still trains it")
        while holder(run.folder) and not self.is_ending:
            time.sleep(2)
        if self.is_ending:
            return 75
        environment = dict(os.environ)
        if self.workers > 1:
            cores = processes.available_cores()
            environment |= {"OMP_NUM_THREADS": str(max(1, cores // self.workers)), "OMP_WAIT_POLICY": "PASSIVE"}
        changes = [word for name, value in run.changes.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(ROOT / "train.py"), *self.flags, *changes, "--output_dir", str(run.folder)]
        log_file = run.folder.with_name(f"{run.folder.name}.log")
        with open(log_file, "ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            self.processes.add(process)
            if self.is_ending:  # since it was asked
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        return code

    def train_all(self, runs):
        """Train all runs; log a line for each. Raises what ended one of them too early."""
        started, failure = time.monotonic(), None
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self.train, run): run for run in runs}
            for number, future in enumerate(as_completed(futures), start=1):
                run, code = futures[future], future.result()
                if code not in (0, 75) and not failure:
                    failure = describe_failure(run, code)
                    self.end()
                elif code == 0:
                    left = (time.monotonic() - started) / number * (len(runs) - number)
                    time_left = f", about {format_duration(left)} left" if number < len(runs) else ""
                    log.info(f"{describe_run(run)} ({number} of {len(runs)}{time_left})")
        if failure:
            raise failure
        if self.is_ending:
            raise Preempted("stopped; the same command goes on")


def describe_failure(run, code):
    """Return the exception that a failed training ends the sweep with: its own last two lines, and where its log is."""
    log_file = run.folder.with_name(f"{run.folder.name}.log")
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("train.py: ") for line in lines if line.startswith("train.py: ")][-2:]
    reason, advice = [*errors, "", ""][:2] if errors else (f"train.py ended with exit code {code}", "")
    reason = f"{run.folder.name}: {reason.removeprefix('error: ')}"
    if code == 2 and not run.folder.exists():  # refused before it began: nothing is left behind
        log_file.unlink()
        with suppress(OSError):
            log_file.parent.rmdir()
    return BadInput(reason, advice) if code == 2 else RunFailed(f"{reason}\n{advice} See {log_file}.")


def describe_run(run):
    """Return a finished run in a line: its name, its first score and its time."""
    results = run.results
    name, score = next(iter(next(iter(results["scores"].values())).items()))
    return f"{run.folder.name}: {name} {format_score(score)}, {results['train_seconds']:.0f} s"


def chosen_score(results, name):
    """Return a metric of the split that chose a run's model."""
    return next(iter(results["scores"].values()))[name]


# -------------------------------------------------------------------------------------------------------------- summary


def summarise(task, runs, with_interval=True):
    """Return the statistics of runs that differ only by seed or fold.

    `scores`: of each metric, on the split that chooses the epoch. `collapsed`: the runs whose model is no better there
    than always predicting the majority class.
    """
    results, first = [run.results for run in runs], task.metrics[0]
    majorities = [next(iter(each["majority_baseline"].values()))[first] for each in results]
    return {
        "runs": [run.folder.name for run in runs],
        "scores": {
            name: statistics_of(name, [chosen_score(each, name) for each in results], with_interval)
            for name in task.metrics
        },
        "collapsed": [
            run.folder.name
            for run, each, majority in zip(runs, results, majorities, strict=True)
            if majority is not None and not metrics.is_better(first, chosen_score(each, first), majority)
        ],
        "train_seconds": statistics.mean(each["train_seconds"] for each in results),
    }


def statistics_of(name, values, with_interval=True):
    """Return mean, standard deviation, minimum and maximum of scores, and the 95 % interval of the mean.

    The interval is Student's, within the limits of the metric. It is None for one run, and where all are equal. Folds
    have none: their models share most of their training examples (Bengio and Grandvalet 2004).
    """
    from scipy import stats

    known = [value for value in values if value is not None]
    content = dict.fromkeys(("mean", "std", "min", "max", "interval")) | {"values": values}
    if known:
        content |= {"mean": statistics.mean(known), "min": min(known), "max": max(known)}
    if len(known) > 1:
        content["std"] = statistics.stdev(known)
        half = stats.t.ppf(0.975, len(known) - 1) * content["std"] / len(known) ** 0.5
        low, high = metrics.limits(name)
        if half and with_interval:
            content["interval"] = [max(low, content["mean"] - half), min(high, content["mean"] + half)]
    return content


def describe_setting(setting):
    return " ".join(f"{key}={value}" for key, value in setting.items()) or "all runs"


def describe_statistics(name, content):
    """Return a metric's mean, and of several runs its spread, as words."""
    words = f"{name} {format_score(content['mean'])}"
    if content["std"] is not None:
        low, high = format_score(content["min"]), format_score(content["max"])
        words += f" ± {format_score(content['std'])} ({low} to {high})"
    if content["interval"]:
        low, high = map(format_score, content["interval"])
        words += f", 95 % interval of the mean {low} to {high}"
    return words


def choose_setting(summaries, task):
    """Return the number of the setting with the best mean of the first metric on validation."""
    best = 0
    for number, summary in enumerate(summaries):
        means = [each["scores"][task.metrics[0]]["mean"] for each in (summary, summaries[best])]
        if metrics.is_better(task.metrics[0], *means):
            best = number
    return best


# ------------------------------------------------------------------------------------------- folds, and the test split


def evaluate(run, split):
    """Score a run on a split with evaluate.py; return the folder with what it wrote."""
    command = [sys.executable, str(ROOT / "evaluate.py"), "--model", str(run.folder), "--split", split]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RunFailed(f"{run.folder.name}: evaluate.py ended with exit code {done.returncode}\n{done.stderr}")
    return run.folder / f"evaluation-{split}"


def collect_folds(folder, runs, task):
    """Write out_of_fold.csv and label_issues.csv; return the scores of all out-of-fold predictions together.

    Each example is predicted by the model that was not trained on it.
    """
    rows = []
    for run in runs:
        evaluation = evaluate(run, "validation")
        with open(evaluation / "predictions.csv", encoding="utf-8", newline="") as file:
            rows += [{"fold": run.changes["fold"], **row} for row in csv.DictReader(file)]
    columns = list(rows[0])
    write_csv(folder / "out_of_fold.csv", columns, ([row[name] for name in columns] for row in rows))
    if task.is_multi_label:
        return {}
    if task.is_regression:
        labels, predictions = (np.array([float(row[name]) for row in rows]) for name in ("label", "predicted_value"))
    else:
        ids = {name: number for number, name in enumerate(task.labels)}
        labels, predictions = (np.array([ids[row[name]] for row in rows]) for name in ("label", "predicted_label"))
        write_label_issues(folder / "label_issues.csv", rows, columns)
    return {
        "scores": metrics.compute_metrics(task.metrics, predictions, labels),
        "intervals": intervals.score_intervals(task.metrics, predictions, labels),
        "examples": len(rows),
    }


def write_label_issues(path, rows, columns):
    """Write the examples that the model labels otherwise, the label that it thinks least likely first."""
    doubted = [row for row in rows if row["label"] != row["predicted_label"]]
    doubted.sort(key=lambda row: float(row[f"probability_{row['label']}"]))
    names = ["probability_of_label", *columns]
    write_csv(path, names, ([row[f"probability_{row['label']}"], *(row[name] for name in columns)] for row in doubted))


# ----------------------------------------------------------------------------------------------------------------- main


def main():
    args, task, flags = parse_arguments()
    swept = {"seeds": args.seeds, "folds": args.folds, "grid": args.grid and "+".join(args.grid)}
    words = [f"{name}={value}".replace(",", "+") for name, value in swept.items() if value]
    folder = Path(args.output_dir or Path("runs", safe_name(",".join([task.name, *words]))))
    processes.log_to(sys.stdout)
    runs = plan_runs(args, task, folder)
    some = shard_of_runs(runs, args.shard)
    folder.mkdir(parents=True, exist_ok=True)
    log.info(f"runs of train.py in {folder}: {len(runs)}, {args.workers} at a time")
    trainings = Trainings(flags, args.workers)
    # The first alone: it reads and tokenises the data, which the others find in the cache. If it is complete already,
    # train.py checks that flags and data are those of before.
    trainings.train_all(some[:1])
    task = common.with_metrics(tasks.read_saved_task(some[0].folder / "model")[0])
    unfinished = [run for run in some[1:] if run.results is None]
    if len(unfinished) < len(some) - 1:
        log.info(f"{len(some) - 1 - len(unfinished)} others are complete already")
    trainings.train_all(unfinished)
    if args.shard:
        return

    settings = list({json.dumps(run.setting): run.setting for run in runs}.values())
    summaries = [
        summarise(task, [run for run in runs if run.setting == setting], with_interval=not args.folds)
        for setting in settings
    ]
    for setting, summary in zip(settings, summaries, strict=True):
        number = len(summary["collapsed"])
        collapsed = f"; {number} of {len(summary['runs'])} runs collapsed" if number else ""
        scores = describe_statistics(task.metrics[0], summary["scores"][task.metrics[0]])
        log.info(f"{describe_setting(setting)}: {scores}{collapsed}")
    best = choose_setting(summaries, task)
    content = {
        "task": task.name,
        "flags": flags,
        "settings": [{"setting": each, **summary} for each, summary in zip(settings, summaries, strict=True)],
        "best": settings[best],
    }
    if len(settings) > 1:
        log.info(f"best of {len(settings)} settings on validation, where the choice makes it look better than it is: ")
        log.info(f"    {describe_setting(settings[best])}")
    runs = [run for run in runs if run.setting == settings[best]]
    if args.folds:
        content["out_of_fold"] = collect_folds(folder, runs, task)
        for name, score in content["out_of_fold"].get("scores", {}).items():
            bounds = content["out_of_fold"]["intervals"][name]
            words = f", 95 % interval {format_score(bounds[0])} to {format_score(bounds[1])}" if bounds else ""
            log.info(f"out of fold: {name} {format_score(score)}{words}")
    if args.final_test:
        evaluations = [json.loads((evaluate(run, "test") / "evaluation.json").read_text("utf-8")) for run in runs]
        content["test"] = {
            name: statistics_of(name, [each["scores"][name] for each in evaluations]) for name in task.metrics
        }
        log.info(f"test: {describe_statistics(task.metrics[0], content['test'][task.metrics[0]])}")
    write_report(folder, task, content)


def write_report(folder, task, content):
    """Write results.json and report.html."""
    from classifier.evaluation import page

    metric = task.metrics[0]
    rows = [
        {"name": describe_setting(each["setting"]), **each, **each["scores"][metric]} for each in content["settings"]
    ]
    tables = {"Command": {"flags of train.py": " ".join(content["flags"])}}
    if out_of_fold := content.get("out_of_fold", {}).get("scores"):
        tables["Out of fold"] = out_of_fold
    if "test" in content:
        tables["Test"] = {name: describe_statistics(name, content["test"][name]) for name in task.metrics}
    write_json(folder / "results.json", content)
    page.write_sweep_page(folder, {"title": f"{task.name}: several runs"}, metric, rows, tables)
    log.info(f"written: {folder}/report.html, results.json")


if __name__ == "__main__":
    processes.run(main)
