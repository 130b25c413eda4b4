"""Make a submission to the GLUE leaderboard: a table for each of its eleven test sets, and all of them in one zip.

    python examples/glue_submission.py --runs runs/*                   # the best run of each task
    python examples/glue_submission.py --runs runs/* --fill_missing    # where some tasks have no run

Writes DIR/CoLA.tsv ... DIR/AX.tsv and DIR/submission.zip for https://gluebenchmark.com (--output DIR, default: glue).
Each table has the columns index and prediction, and a line for every row of the test set. NLI tasks give the names of
labels, STS-B a number from 0 to 5, the others 0 or 1 (https://gluebenchmark.com/faq).
"""

import glob
import io
import sys
import zipfile
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
from classifier import processes
from classifier.data import tasks
from classifier.data.cache import column_array
from classifier.data.labels import UNLABELLED, majority_prediction, predictions_from_logits
from classifier.data.splits import load_splits, read_column
from classifier.evaluation import intervals, metrics
from classifier.files import CannotWrite, read_json, write_bytes, write_text
from classifier.messages import BadInput, format_score, format_scores, log
from classifier.predictor import load

FILES = {  # (task, split): (file, rows of the test set)
    ("cola", "test"): ("CoLA.tsv", 1063),
    ("sst2", "test"): ("SST-2.tsv", 1821),
    ("mrpc", "test"): ("MRPC.tsv", 1725),
    ("stsb", "test"): ("STS-B.tsv", 1379),
    ("mnli", "test_matched"): ("MNLI-m.tsv", 9796),
    ("mnli", "test_mismatched"): ("MNLI-mm.tsv", 9847),
    ("ax", "test"): ("AX.tsv", 1104),  # predicted by MNLI's model
    ("qnli", "test"): ("QNLI.tsv", 5463),
    ("rte", "test"): ("RTE.tsv", 3000),
    ("wnli", "test"): ("WNLI.tsv", 146),
    ("qqp", "test"): ("QQP.tsv", 390_965),
}
TASKS = list(dict.fromkeys(name for name, _ in FILES))
BY_NAME = ("mnli", "ax", "qnli", "rte")  # the others by label id
SIMILARITY = (0, 5)  # of STS-B: values outside are refused
HEADER = "index\tprediction"


def write_submission(folder, runs, fill_missing, load_run):
    """Write the tables and submission.zip of saved runs to a folder: all of them, or none.

    fill_missing: predict the majority class of the training split for a task without a run, instead of raising
    BadInput; load_run: from a run to its Predictor, called once for each run.
    """
    chosen = choose_runs(runs)
    missing = [name for name in TASKS if name not in chosen]
    if not chosen:
        raise BadInput("none of --runs is a finished run of a GLUE task", "Train one: python train.py --task mrpc")
    if missing and not fill_missing:
        reason = f"no run of {', '.join(missing)}: the leaderboard requires all tasks"
        raise BadInput(reason, "Train them, or predict the majority class there: --fill_missing.")
    data = {name: read_data(name, name in missing) for name in TASKS}  # first: mistakes show before hours of work
    load_run = lru_cache(maxsize=1)(load_run)  # MNLI's run is used twice in a row
    tables = {}
    for name in TASKS:
        task, splits = data[name]
        if name in missing:
            log.warning(f"WARNING: {name}: no run: FILLED with the majority class of the training labels")
            train_labels = column_array(data["mnli" if name == "ax" else name][1]["train"], "label")
            majority = majority_prediction(task, train_labels)
        for split in [split for task_name, split in FILES if task_name == name]:
            rows = splits[split]
            log.info(f"{name}: {split}, {len(rows):,} rows{f', {chosen[name]}' if name in chosen else ''}")
            values = predict(chosen[name], task, rows, load_run) if name in chosen else [majority] * len(rows)
            tables[FILES[name, split][0]] = format_table(name, task, read_column(task, split, rows, "idx"), values)
            if name in chosen:
                log_score(name, task, values, column_array(rows, "label"))
    write_tables(Path(folder), tables)


def choose_runs(runs):
    """Return {task: run}, for each task the run with the best score on its validation split.

    Skips, with a log line, what else a pattern such as runs/* may match: unfinished runs and those of other tasks.
    """
    candidates = {}
    # Not every shell expands a pattern.
    for run in [path for pattern in runs for path in sorted(glob.glob(str(pattern))) or [pattern]]:
        if not Path(run).exists():
            raise BadInput(f"--runs {run}: does not exist", "Give the folders of runs, for example runs/*.")
        folder = next((path for path in (Path(run) / "model", Path(run)) if (path / "task.json").is_file()), None)
        if folder is None:
            log.info(f"{run}: skipped, holds no finished model")
            continue
        saved_task, _ = tasks.read_saved_task(folder)
        if saved_task.name not in TASKS or saved_task.name == "ax":
            log.info(f"{run}: skipped, {saved_task.name} is not a GLUE task")
            continue
        task = tasks.read_task(saved_task.name)
        if (saved_task.text, saved_task.labels) != (task.text, task.labels):
            log.info(f"{run}: skipped, its text columns or labels are not those of data/{task.name}.yaml")
            continue
        candidates.setdefault(task.name, {})[run] = validation_score(folder, task.metrics[0])
    chosen = {}
    for name, scores in candidates.items():
        metric, (best, *rest) = tasks.read_task(name).metrics[0], scores
        for run in rest:
            best = run if metrics.is_better(metric, scores[run], scores[best]) else best
        for run, score in scores.items():
            if run != best:
                comparison = f"{metric} {format_score(score)} on validation, {best} {format_score(scores[best])}"
                log.info(f"{run}: skipped, {comparison}")
        chosen[name] = best
    return chosen | ({"ax": chosen["mnli"]} if "mnli" in chosen else {})


def validation_score(folder, metric):
    """Return the score of a model folder on its first validation split, or None where it is unknown."""
    file = folder / "metrics.json"
    if not file.is_file():
        return None
    with read_json(file) as content:
        names = [name for name in content["scores"] if name.startswith("validation")]
        return content["scores"][names[0]].get(metric) if names else None


def read_data(name, with_train):
    """Return (task, splits) of a task of data/: all splits, or only the test sets. Their sizes are checked."""
    task = tasks.read_task(name)
    if not with_train:  # train may have hundreds of thousands of rows, and without validation would lose some to it
        task = replace(task, splits={split: split for task_name, split in FILES if task_name == name})
    task, splits, _, _ = load_splits(task)
    for (task_name, split), (_, number) in FILES.items():
        if task_name == name and len(splits[split]) != number:
            reason = f"{name}: {split}: {len(splits[split]):,} rows; the leaderboard's has {number:,}"
            raise BadInput(reason, f"Is data/{name}.yaml, or the mirror in HF_ENDPOINT, another data set?")
    return task, splits


def predict(run, task, rows, load_run):
    """Return a run's predictions for rows: label ids in the order of the task's labels, or values from 0 to 5."""
    predictor = load_run(run)
    logits = predictor.dataset_logits(rows)
    if not np.isfinite(logits).all():  # argmax would turn them into labels
        raise BadInput(f"{run}: its logits are not finite", "Give another run of this task, or train again.")
    values = predictions_from_logits(predictor.task, logits)
    if task.is_regression:
        return np.clip(values, *SIMILARITY)
    return np.array([task.labels.index(label) for label in predictor.task.labels])[values]


def format_table(name, task, indices, values):
    """Return a table of the submission as text, in the order of the data set's own index."""
    lines = [HEADER]
    for index, value in sorted(zip(map(int, indices), values, strict=True)):
        if task.is_regression:
            lines.append(f"{index}\t{value:.6f}")
        else:
            lines.append(f"{index}\t{task.labels[value] if name in BY_NAME else value}")
    return "\n".join(lines) + "\n"


def log_score(name, task, values, labels):
    """Log the score on a test set whose labels are public, as MRPC's are."""
    if not (np.isnan(labels) if task.is_regression else labels == UNLABELLED).any():
        scores = format_scores(metrics.compute_metrics(task.metrics, values, labels))
        bounds = intervals.format_intervals(intervals.score_intervals(task.metrics, values, labels))
        log.info(f"{name}: its test labels are public: {scores} (95 %: {bounds})")


def write_tables(folder, tables):
    """Write the tables and, at last, their zip. Raises BadInput, and writes nothing, where find_problems finds one."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for file, text in tables.items():
            files.writestr(file, text)
    if problem := next(find_problems(archive), None):
        raise BadInput(f"the leaderboard would refuse this: {problem}", "Nothing was written; please report it.")
    path = folder / "submission.zip"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an older zip must not lie next to new tables
        for file, text in tables.items():
            write_text(folder / file, text)
        write_bytes(path, archive.getvalue())
    except OSError as error:
        raise CannotWrite(folder, error) from None
    log.info(f"{path}: {len(tables)} tables")


def find_problems(archive):
    """Yield, as text, what the leaderboard would refuse in a zip, which is a path or an open file."""
    with zipfile.ZipFile(archive) as files:
        names = files.namelist()
        for (task, _), (file, rows) in FILES.items():
            if file not in names:
                yield f"{file} is missing"
                continue
            header, *lines = files.read(file).decode("utf-8").split("\n")
            if header != HEADER:
                yield f"{file}: the first line is {header!r}"
            if lines[-1:] != [""] or len(lines) != rows + 1:
                yield f"{file}: {len(lines)} lines below the first, not {rows} and an end of line"
            allowed = tasks.read_task(task).labels if task in BY_NAME else ("0", "1")
            for number, line in enumerate(lines[:-1]):
                index, _, value = line.partition("\t")
                if index != str(number) or not (is_similarity(value) if task == "stsb" else value in allowed):
                    yield f"{file}, line {number + 2}: {line!r}"
                    break
        if extra := set(names) - {file for file, _ in FILES.values()}:
            yield f"unexpected: {', '.join(sorted(extra))}"


def is_similarity(text):
    try:
        return SIMILARITY[0] <= float(text) <= SIMILARITY[1]  # False for NaN
    except ValueError:
        return False


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("submission").add_argument
    add("--runs", nargs="+", required=True, metavar="DIR", help="runs of GLUE tasks; the best on validation is used")
    add("--output", default="glue", metavar="DIR", help="folder for the tables and the zip (default: %(default)s)")
    add("--fill_missing", action="store_true", help="predict the majority class where a task has no run")
    common.add_machine_arguments(parser)
    args = parser.parse_args()
    accelerator = processes.start(args, stream=sys.stderr)
    if accelerator.num_processes > 1:
        raise BadInput("one process writes a submission, not several", "Launch with python alone.")

    def load_run(run):
        return load(run, accelerator, args.eval_batch_size)

    write_submission(args.output, args.runs, args.fill_missing, load_run)
    return accelerator


if __name__ == "__main__":
    processes.run(main)
