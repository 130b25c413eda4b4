"""A submission to the GLUE leaderboard: a table for each of its eleven test sets, and all of them in one zip.

    python examples/glue_submission.py --runs runs/*                   # the best run of each task
    python examples/glue_submission.py --runs runs/* --fill_missing    # where some tasks have none

Writes DIR/CoLA.tsv ... DIR/AX.tsv and DIR/submission.zip (--output glue), which https://gluebenchmark.com takes. Each table has the
columns index and prediction, and a line for every row of the test set: the NLI tasks by the names of their labels,
STS-B as a number from 0 to 5, the others as 0 or 1 (https://gluebenchmark.com/faq).
"""

import io
import os
import sys
import zipfile
from contextlib import suppress
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
from classifier.evaluation import metrics
from classifier.files import CannotWrite, read_json, write_text
from classifier.messages import BadInput, format_score, format_scores, log

FILES = {  # (task, split): (file, rows of the test set)
    ("cola", "test"): ("CoLA.tsv", 1063),
    ("sst2", "test"): ("SST-2.tsv", 1821),
    ("mrpc", "test"): ("MRPC.tsv", 1725),
    ("stsb", "test"): ("STS-B.tsv", 1379),
    ("mnli", "test_matched"): ("MNLI-m.tsv", 9796),
    ("mnli", "test_mismatched"): ("MNLI-mm.tsv", 9847),
    ("ax", "test"): ("AX.tsv", 1104),  # predicted by the model of mnli
    ("qnli", "test"): ("QNLI.tsv", 5463),
    ("rte", "test"): ("RTE.tsv", 3000),
    ("wnli", "test"): ("WNLI.tsv", 146),
    ("qqp", "test"): ("QQP.tsv", 390_965),
}
TASKS = list(dict.fromkeys(name for name, _ in FILES))
BY_NAME = ("mnli", "ax", "qnli", "rte")  # the others by the number of the label
SIMILARITY = (0, 5)  # of STS-B: what is beyond is refused
HEADER = "index\tprediction"


def write_submission(folder, runs, fill, load):
    """Write the tables and submission.zip into a folder, from saved runs: complete, or nothing of them.

    fill: for a task without a run predict the majority class of its training split, else raise BadInput; load: a
    function of a run to its Predictor, called once for each.
    """
    chosen = choose_runs(runs)
    missing = [name for name in TASKS if name not in chosen]
    if not chosen:
        raise BadInput("none of --runs is a finished run of a GLUE task", "Train one: python train.py --task mrpc")
    if missing and not fill:
        words = f"no run of {', '.join(missing)}: the leaderboard wants all tasks"
        raise BadInput(words, "Train them, or predict the majority class there: --fill_missing.")
    data = {name: read_data(name, name in missing) for name in TASKS}  # first: a mistake shows before hours of work
    load = lru_cache(maxsize=1)(load)  # that of mnli is asked for twice, one after the other
    tables = {}
    for name in TASKS:
        task, splits = data[name]
        if name in missing:
            log.warning(f"WARNING: {name}: no run of it: FILLED with the majority of the training labels")
            majority = majority_prediction(
                task, column_array(data["mnli" if name == "ax" else name][1]["train"], "label")
            )
        for split in [split for of, split in FILES if of == name]:
            rows = splits[split]
            log.info(f"{name}: {split}, {len(rows):,} rows{f', {chosen[name]}' if name in chosen else ''}")
            values = predictions(chosen[name], task, rows, load) if name in chosen else [majority] * len(rows)
            tables[FILES[name, split][0]] = table(name, task, read_column(task, split, rows, "idx"), values)
            if name in chosen:
                say_score(name, task, values, column_array(rows, "label"))
    put_in_place(Path(folder), tables)


def choose_runs(runs):
    """Return {task: run} of folders, of several runs of a task the best on its validation split.

    What else a pattern such as runs/* may name, unfinished runs and those of other tasks, is passed over, and said.
    """
    found = {}
    for run in runs:
        if not Path(run).exists():
            raise BadInput(f"--runs {run}: is not there", "Give the folders of runs, for example runs/*.")
        folder = next((each for each in (Path(run) / "model", Path(run)) if (each / "task.json").is_file()), None)
        if folder is None:
            log.info(f"{run}: passed over, holds no finished model")
            continue
        task, _ = tasks.read_saved_task(folder)
        if task.name not in TASKS or task.name == "ax":
            log.info(f"{run}: passed over, {task.name} is no task of GLUE's")
            continue
        ours = tasks.read_task(task.name)
        if (task.text, task.labels) != (ours.text, ours.labels):
            log.info(f"{run}: passed over, its text columns or labels are not those of data/{task.name}.yaml")
            continue
        found.setdefault(task.name, {})[run] = validation_score(folder, ours.metrics[0])
    chosen = {}
    for name, scores in found.items():
        metric, (best, *others) = tasks.read_task(name).metrics[0], scores
        for other in others:
            best = other if metrics.is_better(metric, scores[other], scores[best]) else best
        score, *of_others = (format_score(scores[run]) for run in (best, *scores))
        for run, of_run in zip(scores, of_others, strict=True):
            if run != best:
                log.info(f"{run}: passed over, {metric} {of_run} on validation, {best} {score}")
        chosen[name] = best
    return chosen | ({"ax": chosen["mnli"]} if "mnli" in chosen else {})


def validation_score(folder, metric):
    """Return the score of a model folder on its first validation split; None where it is not known."""
    file = folder / "metrics.json"
    if not file.is_file():
        return None
    with read_json(file) as content:
        scores = next((scores for split, scores in content["scores"].items() if split.startswith("validation")), {})
        return scores.get(metric)


def read_data(name, with_train):
    """Return (task, splits) of a task of data/: all of them, or the test sets alone; these are the leaderboard's."""
    task = tasks.read_task(name)
    if not with_train:  # hundreds of thousands of rows that nobody asks for; without validation, train would lose some
        task = replace(task, splits={split: split for of, split in FILES if of == name})
    task, splits, _, _ = load_splits(task)
    for (of, split), (_, number) in FILES.items():
        if of == name and len(splits[split]) != number:
            words = f"{name}: {split}: {len(splits[split]):,} rows; the leaderboard's has {number:,}"
            raise BadInput(words, f"Is data/{name}.yaml, or the mirror in HF_ENDPOINT, another data set?")
    return task, splits


def predictions(run, task, rows, load):
    """Return label ids in the order of the task's labels, or values from 0 to 5, of a run for the rows of a split."""
    predictor = load(run)
    logits = predictor.logits_of_rows(rows)
    if not np.isfinite(logits).all():  # argmax would make a label of them
        raise BadInput(f"{run}: its logits are not finite", "Name another run of this task, or train again.")
    values = predictions_from_logits(predictor.task, logits)
    if task.is_regression:
        return np.clip(values, *SIMILARITY)
    return np.array([task.labels.index(label) for label in predictor.task.labels])[values]


def table(name, task, indices, values):
    """Return a table of the submission as text, in the order of the data set's own index."""
    lines = [HEADER]
    for index, value in sorted(zip(map(int, indices), values, strict=True)):
        if task.is_regression:
            lines.append(f"{index}\t{value:.6f}")
        else:
            lines.append(f"{index}\t{task.labels[value] if name in BY_NAME else value}")
    return "\n".join(lines) + "\n"


def say_score(name, task, values, labels):
    """Say the score on a test set whose labels are in the data, as MRPC's are; of a hidden one nothing."""
    if not (np.isnan(labels) if task.is_regression else labels == UNLABELLED).any():
        words = format_scores(metrics.compute_metrics(task.metrics, values, labels))
        of_score = metrics.format_intervals(metrics.intervals(task.metrics, values, labels))
        log.info(f"{name}: its test labels are in the data: {words} (95 %: {of_score})")


def put_in_place(folder, tables):
    """Write the tables and their zip, which problems() must have nothing against; the zip appears last."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as files:
        for file, text in tables.items():
            files.writestr(file, text)
    if problem := next(problems(archive), None):
        raise BadInput(f"the leaderboard would refuse this: {problem}", "Nothing was written; please report it.")
    path, temporary = folder / "submission.zip", folder / f"submission.zip.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # an older one is not to lie beside new tables
        for file, text in tables.items():
            write_text(folder / file, text)
        temporary.write_bytes(archive.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(folder, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
    log.info(f"{path}: {len(tables)} tables")


def problems(archive):
    """Yield in words what the leaderboard would refuse of a zip: a path, or an open file."""
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
            words = tasks.read_task(task).labels if task in BY_NAME else ("0", "1")
            for number, line in enumerate(lines[:-1]):
                index, _, word = line.partition("\t")
                if index != str(number) or not (is_similarity(word) if task == "stsb" else word in words):
                    yield f"{file}, line {number + 2}: {line!r}"
                    break
        if extra := set(names) - {file for file, _ in FILES.values()}:
            yield f"not asked for: {', '.join(sorted(extra))}"


def is_similarity(word):
    try:
        return SIMILARITY[0] <= float(word) <= SIMILARITY[1]  # NaN is neither
    except ValueError:
        return False


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument_group("submission").add_argument
    add("--runs", nargs="+", required=True, metavar="DIR", help="runs of its tasks; of several the best on validation")
    add("--output", default="glue", metavar="DIR", help="folder for the tables and the zip (default: glue)")
    add("--fill_missing", action="store_true", help="predict the majority class where a task has no run")
    common.add_machine_arguments(parser)
    args = parser.parse_args()
    # torch takes seconds: --help and a mistake are to come at once.
    from classifier.predictor import load

    accelerator = processes.start(args, stream=sys.stderr)
    if accelerator.num_processes > 1:
        raise BadInput("a submission is written by one process", "For this: python examples/glue_submission.py")
    write_submission(
        args.output, args.runs, args.fill_missing, lambda run: load(run, accelerator, args.eval_batch_size)
    )
    return accelerator


if __name__ == "__main__":
    processes.run(main)
