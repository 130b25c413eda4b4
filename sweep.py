"""Train several times: with several seeds, on each fold of a cross-validation, with a grid of settings.

    python sweep.py --task mrpc --seeds 5                   # mean ± std, and how many runs collapsed
    python sweep.py --train_file my.csv --folds 5           # cross-validation, and labels that may be wrong
    python sweep.py --task rte --grid learning_rate=2e-5,5e-5 batch_size=16,32 --seeds 3
    python sweep.py --task cola --grid bert --workers 2     # the 18 settings of the BERT paper, two runs at a time
    python sweep.py --task cola --search 30                 # 30 settings that Optuna chooses, hopeless ones ended early

Each run is one of train.py, in a folder of its own; all other flags are train.py's. After an interruption the same
command goes on: finished runs are not repeated. With --shard I/N the tasks of a Slurm array share the runs; the same
command without it then sums up. A search is shared by all that run its command at the same time. With --final_test the
runs of the best setting are scored on the test split.

Writes into --output_dir: results.json, report.html and runs.png with a dot for each run, a log of each run, and with
--folds out_of_fold.csv and label_issues.csv, the examples whose labels the model doubts most.
"""

import csv
import itertools
import json
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

import common
from classifier import processes
from classifier.data import tasks
from classifier.data.cache import column_array
from classifier.data.splits import load_splits
from classifier.data.writer import write_csv
from classifier.evaluation import intervals, metrics, selection
from classifier.evaluation.spread import (
    choose_setting,
    compare_with_published,
    describe_setting,
    describe_statistics,
    in_words,
    published,
    statistics_of,
    summarise,
)
from classifier.files import safe_name, write_json
from classifier.messages import BadInput, RunFailed, format_score, log
from classifier.training import search
from classifier.training.run_folder import PREDICTIONS
from classifier.training.trainings import Run, Trainings, describe_run

ROOT = Path(__file__).resolve().parent
GRIDS = {  # Devlin et al. 2019, appendix A.3
    "bert": ["batch_size=16,32", "learning_rate=5e-5,3e-5,2e-5", "epochs=2,3,4"],
}
MOST_RUNS = 1000
SEEDS_OF_A_CHECK = 5


# ------------------------------------------------------------------------------------------------------ what is trained


def build_parser():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("sweep (all other flags are train.py's)").add_argument
    add("--seeds", type=common.positive_int, metavar="N", help="train with the seeds 0 to N - 1")
    add("--folds", type=common.positive_int, metavar="N", help="validate on each of N parts of train once")
    words = "each combination of these values; bert: the grid of the BERT paper"
    add("--grid", nargs="+", metavar="FLAG=A,B|bert", help=words)
    words = f"N settings by Optuna, from --grid with ranges FLAG=LOW..HIGH (default: {' '.join(search.SPACE)})"
    add("--search", type=common.positive_int, metavar="N", help=words)
    add("--check", metavar="TASK", help="compare the mean with a published result of benchmarks/expected.yaml")
    add("--workers", type=common.positive_int, default=1, metavar="N", help="runs at a time (default: 1)")
    add("--shard", metavar="I/N", help="train every N-th run, from the I-th, and sum nothing up")
    add("--refit", action="store_true", help="then train with the best setting on train and validation together")
    add("--final_test", action="store_true", help="score the runs of the best setting on the test split")
    add("--output_dir", metavar="DIR", help="(default: runs/TASK, with what is swept)")
    return parser


def parse_arguments():
    """Return (args, task, flags for train.py)."""
    args, flags = build_parser().parse_known_args()
    if args.check:
        args.seeds = args.seeds or SEEDS_OF_A_CHECK
        flags = ["--task", args.check, "--model", published(args.check)["model"], *flags]
    data_parser = common.argument_parser(__doc__, data=True)
    task = tasks.task_from_args(data_parser.parse_known_args(flags)[0], "demo")
    if not (args.seeds or args.folds or args.grid or args.search):
        raise BadInput("nothing is swept", "Give --seeds 5, --folds 5, --search 20 or --grid learning_rate=2e-5,5e-5.")
    if args.seeds and args.folds:
        raise BadInput("--seeds and --folds: an interval would mix up both", "Give one of the two.")
    if args.search and (args.seeds or args.folds or args.shard):
        raise BadInput("--search draws each setting once", "Drop --seeds, --folds and --shard.")
    if args.search:
        search.import_optuna()
    for name in ("--seed", "--fold", "--resume", "--dry_run", "--overwrite"):
        if any(flag == name or flag.startswith(f"{name}=") for flag in flags):
            raise BadInput(f"{name}: is not for a sweep", "Drop it; train.py takes it for a single run.")
    return args, task, flags


def read_grid(words):
    """Return [(flag, [values] or a range LOW..HIGH)] from the values of --grid. Raises BadInput."""
    grid = []
    for word in itertools.chain.from_iterable(GRIDS.get(word, [word]) for word in words or []):
        flag, _, values = word.partition("=")
        if not flag or not all(values.split(",")):
            raise BadInput(f"--grid {word}: neither FLAG=A,B nor {', '.join(GRIDS)}", "Write learning_rate=2e-5,5e-5.")
        grid.append((flag.removeprefix("--"), values if search.is_range(values) else values.split(",")))
    return grid


def plan_runs(args, task, folder):
    """Return the Runs of a sweep, in the order in which they are trained."""
    grid = read_grid(args.grid)
    for flag, values in grid:
        if isinstance(values, str):
            raise BadInput(f"--grid {flag}={values}: a range is for --search", "Write values: learning_rate=2e-5,5e-5.")
    settings = [dict(zip(dict(grid), values, strict=True)) for values in itertools.product(*dict(grid).values())]
    seeds = [{"seed": seed} for seed in range(args.seeds or 0)]
    folds = [{"fold": f"{fold}/{args.folds}"} for fold in range(1, (args.folds or 0) + 1)]
    runs = []
    for setting, again in itertools.product(settings, seeds or folds or [{}]):
        runs.append(make_run(folder, setting, {**setting, **again}))
    if len(runs) > MOST_RUNS or len({run.folder for run in runs}) < len(runs):
        raise BadInput(f"{len(runs)} runs, or two of the same setting", f"Sweep over up to {MOST_RUNS} different ones.")
    return runs


def make_run(folder, setting, changes):
    """Return the Run of a setting, in a folder that is named after its changes."""
    name = safe_name(",".join(f"{key}={value}".replace("/", " of ") for key, value in changes.items()))
    return Run(setting, changes, folder / name)


def shard_of_runs(runs, shard):
    """Return the runs of --shard I/N, all without it. Raises BadInput."""
    if not shard:
        return runs
    number, _, shards = shard.partition("/")
    if not (number.isdecimal() and shards.isdecimal() and 1 <= int(number) <= int(shards)):
        raise BadInput(f"--shard {shard}: not I/N", "Write 1/4 to 4/4 for four shards.")
    return runs[int(number) - 1 :: int(shards)]


def train_runs(runs, trainings):
    """Train what is not complete yet.

    The first run alone: it reads and tokenises the data, which the others find in the cache. If it is complete already,
    train.py checks that flags and data are those of before.
    """
    trainings.train_all(runs[:1])
    unfinished = [run for run in runs[1:] if run.results is None]
    if len(unfinished) < len(runs) - 1:
        log.info(f"{len(runs) - 1 - len(unfinished)} others are complete already")
    trainings.train_all(unfinished)


def search_runs(args, task, trainings, folder):
    """Train settings that Optuna draws until there are enough; return (finished Runs, how many were ended early)."""
    is_minimal = bool(task.metrics) and metrics.DIRECTION[task.metrics[0]] == "min"
    study = search.Search(folder, read_grid(args.grid or search.SPACE), args.search, is_minimal)

    def train_trials(_):
        with ExitStack() as claims:
            while found := study.take(claims):
                trial, setting = found
                run = make_run(folder, setting, setting)
                is_finished = trainings.train(run, partial(study.is_hopeless, trial, run.folder))
                study.tell(trial, run.score if is_finished else None)
                log.info(describe_run(run) if is_finished else f"{run.folder.name}: ended early")
                claims.close()

    trainings.call_for_each(train_trials, range(args.workers))
    settings, number = study.settings()
    return [make_run(folder, setting, setting) for setting in settings], number


# -------------------------------------------------------------------------------------------------------------- summary


def summarise_settings(task, runs, with_interval):
    """Return ([setting], [its statistics]); log a line for each."""
    settings = list({json.dumps(run.setting): run.setting for run in runs}.values())
    summaries = []
    for setting in settings:
        summary = summarise(task, [run for run in runs if run.setting == setting], with_interval)
        number = len(summary["collapsed"])
        collapsed = f"; {number} of {len(summary['runs'])} runs collapsed" if number else ""
        scores = describe_statistics(task.metrics[0], summary["scores"][task.metrics[0]])
        log.info(f"{describe_setting(setting)}: {scores}{collapsed}")
        summaries.append(summary)
    return settings, summaries


def correct_for_choice(runs, best):
    """Return the scores of the best run, corrected for its choice among all evaluations of all runs, and intervals."""
    task = common.with_metrics(tasks.read_saved_task(best.folder / "model")[0])  # with the thresholds of this run
    split = next(iter(best.results["scores"]))
    labels = column_array(load_splits(task)[1][split], "label")
    candidates, chosen = [], 0
    for run in runs:
        predictions = load_file(run.folder / PREDICTIONS)
        steps = sorted(predictions, key=int)
        if run is best:
            chosen = len(candidates) + steps.index(str(run.results["best_step"]))
        candidates += [predictions[step] for step in steps]
    scores, bounds = selection.corrected_scores(task, candidates, labels, chosen)
    return {"candidates": len(candidates), "corrected_scores": scores, "corrected_intervals": bounds}


def describe_correction(metric, content):
    """Return in a line what the choice of the best setting costs."""
    if "corrected_scores" not in content:
        return "its mean is too good by what the choice is worth: use --final_test"
    score, interval = content["corrected_scores"][metric], content["corrected_intervals"][metric]
    number = content["candidates"]
    return f"corrected for the choice among {number} evaluations: {metric} {format_score(score)}{in_words(interval)}"


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
    """Write the examples whose label the model thinks least likely, those first: a tenth, and all doubted."""
    doubted = sorted(rows, key=lambda row: float(row[f"probability_{row['label']}"]))
    tenth = len(rows) // 10
    doubted = doubted[:tenth] + [row for row in doubted[tenth:] if row["label"] != row["predicted_label"]]
    names = ["probability_of_label", *columns]
    write_csv(path, names, ([row[f"probability_{row['label']}"], *(row[name] for name in columns)] for row in doubted))


# ----------------------------------------------------------------------------------------------------------------- main


def main():
    args, task, flags = parse_arguments()
    swept = {name: getattr(args, name) for name in ("check", "seeds", "folds", "search")}
    swept["grid"] = args.grid and "+".join(args.grid)
    words = [f"{name}={value}".replace(",", "+") for name, value in swept.items() if value]
    folder = Path(args.output_dir or Path("runs", safe_name(",".join([task.name, *words]))))
    processes.log_to(sys.stdout)
    runs = [] if args.search else plan_runs(args, task, folder)
    some = shard_of_runs(runs, args.shard)
    folder.mkdir(parents=True, exist_ok=True)
    log.info(f"runs of train.py in {folder}: {args.search or len(runs)}, {args.workers} at a time")
    trainings = Trainings(flags, args.workers)
    ended_early = 0
    if args.search:
        runs, ended_early = search_runs(args, task, trainings, folder)
    else:
        train_runs(some, trainings)
    if args.shard:
        return
    if not runs:
        log.info("no run is complete yet: other processes train them; the last one to end sums up")
        return
    task = common.with_metrics(tasks.read_saved_task(runs[0].folder / "model")[0])

    settings, summaries = summarise_settings(task, runs, with_interval=not args.folds)
    best = choose_setting(summaries, task)
    content = {
        "task": task.name,
        "flags": flags,
        "settings": [{"setting": each, **summary} for each, summary in zip(settings, summaries, strict=True)],
        "best": settings[best],
        "ended_early": ended_early,
    }
    best_runs = [run for run in runs if run.setting == settings[best]]
    if len(settings) > 1:
        log.info(f"best of {len(settings)} settings on validation: {describe_setting(settings[best])}")
        content |= correct_for_choice(runs, best_runs[0]) if len(runs) == len(settings) else {}
        log.info("    " + describe_correction(task.metrics[0], content))
    if args.folds:
        content["out_of_fold"] = collect_folds(folder, best_runs, task)
        for name, score in content["out_of_fold"].get("scores", {}).items():
            log.info(f"out of fold: {name} {format_score(score)}{in_words(content['out_of_fold']['intervals'][name])}")
    if args.final_test:
        evaluations = [json.loads((evaluate(run, "test") / "evaluation.json").read_text("utf-8")) for run in best_runs]
        content["test"] = {
            name: statistics_of(name, [each["scores"][name] for each in evaluations]) for name in task.metrics
        }
        log.info(f"test: {describe_statistics(task.metrics[0], content['test'][task.metrics[0]])}")
    if args.check:
        content["check"] = compare_with_published(args.check, summaries[best])
        log.info(content["check"]["words"])
    if args.refit:
        content["refit"] = refit(trainings, folder, best_runs).name
    write_report(folder, task, content)


def refit(trainings, folder, runs):
    """Train once more, with the best setting on all rows that are not for testing; return the run's folder.

    It has the first seed of the runs, and the thresholds and the temperature of the first of them.
    """
    changes = {name: value for name, value in runs[0].changes.items() if name != "fold"}
    run = Run(runs[0].setting, {**changes, "refit": runs[0].folder}, folder / "refit")
    trainings.train(run)
    log.info(f"trained on train and validation: {run.folder}/model; what it is worth, the scores above say")
    return run.folder


def write_report(folder, task, content):
    """Write results.json and report.html."""
    from classifier.evaluation import page

    metric = task.metrics[0]
    rows = [
        {"name": describe_setting(each["setting"]), **each, **each["scores"][metric]} for each in content["settings"]
    ]
    tables = {"Command": {"flags of train.py": " ".join(content["flags"])}}
    if "corrected_scores" in content:
        tables["Corrected"] = {"the best setting": describe_correction(metric, content)}
    if out_of_fold := content.get("out_of_fold", {}).get("scores"):
        tables["Out of fold"] = out_of_fold
    if "test" in content:
        tables["Test"] = {name: describe_statistics(name, content["test"][name]) for name in task.metrics}
    write_json(folder / "results.json", content)
    page.write_sweep_page(folder, {"title": f"{task.name}: several runs"}, metric, rows, tables)
    log.info(f"written: {folder}/report.html, results.json")


if __name__ == "__main__":
    processes.run(main)
