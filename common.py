"""Shared by two or more scripts, in data-flow order: flags, a task's data, losses, scores.

The loss is example_losses(), the scores are score_logits(). Everything else a script needs it imports from classifier/.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from classifier.data import tasks
from classifier.data.cache import column_array, one_process_at_a_time
from classifier.data.labels import UNLABELLED, predictions_from_logits
from classifier.data.splits import check_files, load_splits
from classifier.data.tasks import CHOICES, SPLIT_NAMES
from classifier.evaluation import metrics, selection
from classifier.messages import BadInput, log

# ------------------------------------------------------------------------------------------------------------- flags


def _number_type(name, convert, is_allowed, description):
    """Return an argparse type. argparse reports text that is no number at all as an "invalid NAME value"."""

    def checked(text):
        if not is_allowed(text):
            raise argparse.ArgumentTypeError(f"{text} is not {description}")
        return convert(text)

    checked.__name__ = name
    return checked


def _is_positive_int(text):
    return text.isdecimal() and int(text) > 0


positive_int = _number_type("positive_int", int, _is_positive_int, "a whole number above 0")
non_negative_int = _number_type("non_negative_int", int, str.isdecimal, "a whole number from 0")
non_negative_float = _number_type("float", float, lambda text: 0 <= float(text) < math.inf, "a number from 0")
positive_fraction = _number_type("float", float, lambda text: 0 < float(text) <= 1, "above 0 and up to 1")
fraction = _number_type("fraction", float, lambda text: 0 <= float(text) < 1, "from 0 to below 1")


def positive_int_or_auto(text):
    return text if text == "auto" else positive_int(text)


def argument_parser(description, data=False):
    """Return a parser whose --help shows the script's docstring, and whose errors are two lines like all others.

    data: include the flags that select data.
    """

    def fail(message):
        raise BadInput(message, "See --help.")

    verbatim = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=verbatim, allow_abbrev=False)
    parser.error = fail
    if data:
        add_data_arguments(parser)
    return parser


def add_data_arguments(parser):
    """Add the flags that select data, the same in every script that reads a data set."""
    add = parser.add_argument_group("data").add_argument
    add("--task", metavar="NAME|FILE", help="a task of data/, or a YAML file of your own")
    add("--dataset", metavar="ID[:CONFIG]", help="a data set on the Hub, without a YAML")
    formats = "csv, tsv, json, jsonl (.gz), parquet; a path or URL"
    for split in SPLIT_NAMES:
        add(f"--{split}_file", metavar="FILE", help=f"{split} data: {formats}")
    add("--text_columns", metavar="A[,B]", help="one text column, or two for pairs (default: text)")
    add("--label_column", metavar="NAME", help="the label column (default: label)")
    add("--label_columns", metavar="A,B[,C]", help="several labels for each text: a column of 0 and 1 for each label")
    add("--group_column", metavar="NAME", help="keep rows with equal values in one split, where splits are made")
    add("--fold", metavar="K/N", help="cross-validation: validate on the K-th of N parts of train, train on the others")
    add("--encoding", metavar="NAME", help="of text files (default: utf-8)")
    add("--delimiter", metavar="MARK", help="between columns, such as ';' or tab (default: by the file's name)")
    add("--on_bad_row", choices=["fail", "skip"], help="skip: leave bad rows out and list them (default: fail)")
    add("--metrics", metavar="A[,B]", help="scores; the first one chooses the best checkpoint")
    add("--max_length", type=positive_int, metavar="TOKENS", help="truncate longer texts (default: the model's limit)")
    add("--truncate", choices=CHOICES["truncate"], help="which end of a long text to keep (default: head)")
    add("--limit", action="append", metavar="SPLIT=N", help="use a sample of N rows of a split, seeded and stratified")
    add("--refresh", action="store_true", help="ask the Hub for newer commits of the data and the model")


def add_machine_arguments(parser):
    """Add the flags that say how to compute. They change no result beyond rounding."""
    add = parser.add_argument_group("machine").add_argument
    description = "auto: the launcher's, else what this hardware computes natively (default: auto)"
    add("--mixed_precision", choices=["auto", "no", "fp16", "bf16"], default="auto", help=description)
    add("--threads", type=positive_int, help="CPU threads of each process (default: cores / local processes)")
    add("--eval_batch_size", type=positive_int, default=64, help="examples at a time (default: 64)")


def parse_arguments(parser, default=None):
    """Return (args, task). Flags override the task's own defaults. default: the task where none is named."""
    task = tasks.task_from_args(parser.parse_args(), default)
    check_files(task)
    tasks.set_defaults(parser, task)
    return parser.parse_args(), task


# ------------------------------------------------------------------------------------------------------ a task's data


def load_data(task, args):
    """Return (task, splits, fingerprints, bad_rows) of splits.load_splits; the task has its metrics, too.

    One process of a machine reads the data. The others wait, and read its cache.
    """
    with one_process_at_a_time():
        task, splits, fingerprints, bad_rows = load_splits(task, args.refresh)
    for name in dict.fromkeys(bad_row["split"] for bad_row in bad_rows):
        reasons = [bad_row["reason"] for bad_row in bad_rows if bad_row["split"] == name]
        skipped = f"{len(reasons)} bad rows left out, listed in bad_rows.csv; the first: {reasons[0]}"
        log.warning(f"WARNING: {name}: {skipped}")
    return with_metrics(task), splits, fingerprints, bad_rows


def with_metrics(task):
    """Return the task with its metrics: the usual ones where it names none. Its labels must be known.

    Raises BadInput for metrics that do not fit the problem.
    """
    usual = ["pearson", "spearmanr"] if task.is_regression else ["f1_macro", "accuracy"]
    task = replace(task, metrics=task.metrics or (["f1_micro", "f1_macro"] if task.is_multi_label else usual))
    try:
        metrics.check_metrics(task.metrics, None if task.is_regression else len(task.labels), task.is_multi_label)
    except ValueError as error:
        reason, *advice = str(error).splitlines()
        raise BadInput(f"task {task.name}: {reason}", " ".join(advice) or "Choose others with --metrics.") from None
    return task


def check_splits(task, splits, names):
    """Raise BadInput unless the named splits exist and all their examples have labels."""
    for name in names:
        if name not in splits:
            raise BadInput(f"task {task.name}: has no {name} split", f"Splits: {', '.join(splits)}.")
        labels = column_array(splits[name], "label").reshape(len(splits[name]), -1)
        missing = (np.isnan(labels) if task.is_regression else labels == UNLABELLED).any(axis=1).sum()
        if missing:
            raise BadInput(
                f"task {task.name}: {missing} of {len(labels)} examples of the {name} split have no label",
                "They can be predicted (predict.py), not scored. The validation split can be scored.",
            )


def check_unchanged(names, before, now, advice):
    """Raise BadInput where a named split differs from the one used in training. before, now: fingerprints by split."""
    if changed := [name for name in names if before.get(name, now[name]) != now[name]]:
        reason = f"the {changed[0]} split is not the one used in training: its data or the rule that made it changed"
        raise BadInput(reason, advice)


# -------------------------------------------------------------------------------------------------- losses and scores


def example_losses(task, logits, labels, label_smoothing=0.0, class_weights=None, focal_gamma=0.0):
    """Return the loss of each example, shape (examples,).

    That is the cross entropy; in regression the squared error; in multi-label the binary cross entropy, averaged over
    the labels. logits: (examples, outputs), float32. labels: (examples,), ids or floats; in multi-label (examples,
    labels) of 0 and 1. class_weights: of labels.weights_of_classes, or None. focal_gamma: a loss counts (1 - p) **
    gamma, p being the probability of what is right (Lin et al. 2017, https://arxiv.org/abs/1708.02002).
    """
    from torch.nn import functional

    if task.is_regression:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
    if task.is_multi_label:
        targets = labels.to(logits.dtype)
        losses = functional.binary_cross_entropy_with_logits(
            logits, targets, reduction="none", pos_weight=class_weights
        )
    else:
        losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        losses = losses if class_weights is None else losses * class_weights[labels]
    if focal_gamma:
        if task.is_multi_label:
            wrong = (logits.sigmoid() - targets).abs()
        else:
            wrong = 1 - logits.softmax(-1).gather(-1, labels.long()[:, None]).squeeze(-1)
        losses = losses * wrong.clamp_min(1e-6) ** focal_gamma  # the slope of a power is infinite at 0
    return losses.mean(-1) if task.is_multi_label else losses


def score_logits(task, logits, labels, majority):
    """Score a model's logits (examples, outputs) against labels (examples,); return a dict.

    `losses` of the examples and their mean, `loss`; `scores` by the task's metrics; `predictions`: label ids or values,
    in multi-label 0 and 1; `constant`: the one prediction where all are the same, else None; `majority`: the scores of
    always predicting `majority`; `logits` and `labels`. Raises FloatingPointError for logits that are not finite.
    """
    import torch

    labels, is_broken = np.asarray(labels), (~np.isfinite(logits)).any(axis=1)
    if is_broken.any():
        raise FloatingPointError(f"{is_broken.sum()} of {len(labels)} examples have logits that are not finite")
    predictions = predictions_from_logits(task, logits)
    losses = example_losses(task, torch.from_numpy(logits), torch.tensor(labels))
    is_constant = len(predictions) > 1 and (predictions == predictions[0]).all()
    return {
        "loss": losses.mean().item(),
        "losses": losses.numpy(),
        "scores": metrics.compute_metrics(task.metrics, predictions, labels),
        "predictions": predictions,
        "constant": predictions[0].tolist() if is_constant else None,
        # Correlation is always undefined for a constant prediction: no warning.
        "majority": metrics.compute_metrics(task.metrics, np.broadcast_to(majority, labels.shape), labels, warns=False),
        "logits": logits,
        "labels": labels,
    }


def score_splits(task, splits, compute_logits, majority):
    """Return {split: score_logits} for {split: examples}. compute_logits: a function of examples."""
    logits = {name: compute_logits(examples) for name, examples in splits.items()}
    labels = {name: column_array(examples, "label") for name, examples in splits.items()}
    return {name: score_logits(task, logits[name], labels[name], majority) for name in splits}


def fit_probabilities(task, evaluations, split, majority, refit=None):
    """Return (task, evaluations) with what is fitted to a split: a temperature, and what to make of probabilities.

    In multi-label that is a threshold for each label; else the probability above which labels are right often enough.
    refit: a run from which both are taken instead, since the rows of this split were trained on.
    """
    if task.is_regression:
        return task, evaluations
    if refit:
        fitted, _ = tasks.read_saved_task(Path(refit) / "model")
        names = ("temperature", "thresholds", "min_probabilities")
        task = replace(task, **{name: getattr(fitted, name) for name in names})
    else:
        logits, labels = evaluations[split]["logits"], evaluations[split]["labels"]
        task = selection.fit_temperature(task, logits, labels)
        fit = selection.fit_thresholds if task.is_multi_label else selection.fit_min_probabilities
        task = fit(task, logits, labels)
    if not task.is_multi_label:  # no prediction changes
        return task, evaluations
    logits_and_labels = {name: (scored["logits"], scored["labels"]) for name, scored in evaluations.items()}
    return task, {name: score_logits(task, *pair, majority) for name, pair in logits_and_labels.items()}
