"""Metrics: the GLUE scores and their relatives.

    compute_metrics(["f1", "accuracy"], predictions, references)      -> {"f1": 0.8122, "accuracy": 0.6838}

Scores match scikit-learn and scipy in float64; an undefined score is None. Predictions and references are integer class
ids (after the argmax), floats for regression, or 0 and 1 of shape (rows, labels) for multi-label. Each metric is an
in-memory `evaluate.Metric` that needs no network and writes no files.
"""

import functools
import importlib
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from classifier.messages import nearest

REGRESSION = "pearson spearmanr mse".split()
CLASSIFICATION = "accuracy f1 matthews_correlation f1_macro f1_weighted precision_weighted recall_weighted".split()
MULTI_LABEL = "f1_micro f1_macro accuracy".split()
DIRECTION = dict.fromkeys(CLASSIFICATION + MULTI_LABEL + REGRESSION, "max") | {"mse": "min"}  # which way is better

CORRELATIONS = "pearson spearmanr matthews_correlation".split()  # from -1 to 1

# ------------------------------------------------------------------------------------------------- names of metrics


def require_known(name):
    """Raise ValueError for a name that is not in DIRECTION."""
    if name not in DIRECTION:
        raise ValueError(f"unknown metric {name!r}{nearest(name, DIRECTION)}. Allowed: {', '.join(DIRECTION)}")


def check_metrics(names, number_of_labels, multi_label=False):
    """Raise ValueError, in one line, for a metric that is unknown or does not fit the task.

    number_of_labels: None for regression.
    """
    if not names:
        raise ValueError(f"no metrics given. Allowed: {', '.join(DIRECTION)}")
    for name in names:
        require_known(name)
        if multi_label and name not in MULTI_LABEL:
            raise ValueError(f"{name} is not for multi-label tasks: use {', '.join(MULTI_LABEL)}")
        if not multi_label and name == "f1_micro":
            raise ValueError("f1_micro is for multi-label tasks; with one label per text it equals accuracy: use that")
        if number_of_labels is None and name not in REGRESSION:
            raise ValueError(f"{name} is for classification, this task is regression: use {', '.join(REGRESSION)}")
        if number_of_labels is not None and name in REGRESSION:
            fitting = [metric for metric in CLASSIFICATION if metric != "f1" or number_of_labels == 2]
            raise ValueError(f"{name} is for regression, this task has labels: use {', '.join(fitting)}")
        if name == "f1" and number_of_labels != 2:
            raise ValueError(f"f1 is for two labels, this task has {number_of_labels}: use f1_macro")


def limits(name):
    """Return the least and the greatest value that a metric can have."""
    return (0, math.inf) if name == "mse" else (-1 if name in CORRELATIONS else 0, 1)


def is_better(name, score, best):
    """Return whether `score` beats `best`: None never wins, anything beats None, a tie keeps the older one."""
    require_known(name)
    if score is None or math.isnan(score):
        return False
    if best is None or math.isnan(best):
        return True
    return score > best if DIRECTION[name] == "max" else score < best


# ------------------------------------------------------------------------------------------------------------ scores


def compute_metrics(names, predictions, references, warns=True):
    """Return {name: score}; an undefined score is None, and one warning gives the reasons unless `warns` is False.

    Raises ValueError for columns of different shapes, and where class ids are not integers from 0.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.ndim not in (1, 2) or predictions.shape != references.shape:
        raise ValueError(f"need two equally long columns, got shapes {predictions.shape} and {references.shape}")
    scores, undefined = {}, []
    for name in names:
        require_known(name)
        if references.ndim == 2 and name not in MULTI_LABEL:
            raise ValueError(f"{name} needs two equally long columns, got shape {references.shape}")
        if name not in REGRESSION and len(references):
            for side, values in (("predictions", predictions), ("references", references)):
                if values.dtype.kind not in "biu":  # `evaluate` would silently truncate 1.7 to 1
                    raise ValueError(f"{name} needs integer class ids, the {side} are {values.dtype}: take the argmax")
            if references.min() < 0:
                raise ValueError(f"{name} needs labels, the references contain {references.min()}: drop such rows")
        metric = load_metric(name, multi_label=references.ndim == 2)
        scores.update(metric.compute(predictions=predictions, references=references))
        if scores[name] is None:
            undefined.append(f"{name} is undefined: {why_undefined(name, predictions, references)}")
    if undefined and warns:
        warnings.warn("; ".join(undefined), stacklevel=2)
    return scores


def why_undefined(name, predictions, references):
    """Return why this score is undefined, or an empty string where it is defined."""
    if len(references) == 0:
        return "there are no rows"
    if name in ("f1", "f1_micro") and not ((predictions == 1).any() or (references == 1).any()):
        absent = "class 1 is neither predicted nor present" if name == "f1" else "no label is predicted or present"
        return f"{absent}, 0/0"
    if name in REGRESSION:
        for side, values in (("predictions", predictions), ("references", references)):
            # The squares of larger values overflow. NaN fails the comparison too.
            if not (np.abs(values.astype(np.float64)) < 1e100).all():
                return f"the {side} contain NaN, infinity or values beyond 1e+100"
            if name != "mse" and len(values) < 2:
                return "one row has no correlation"
            if name != "mse" and (values == values[0]).all():
                return f"all {side} are equal"
    return ""


def load_metric(name, multi_label=False):
    """Return an `evaluate.Metric`, as `evaluate.load` would; add, add_batch and compute work as usual."""
    require_known(name)
    evaluate = import_evaluate()
    from datasets import Features, List, Value

    value = Value("float64" if name in REGRESSION else "int64")
    column = List(value) if multi_label else value

    class Metric(evaluate.Metric):
        def _info(self):
            features = Features(predictions=column, references=column)  # format="numpy" would make it float32
            return evaluate.MetricInfo(description=FORMULAS[name].__doc__, citation="", features=features)

        def _build_data_dir(self):
            return ""  # the library makes an empty folder in the cache here, even with keep_in_memory

        def _compute(self, predictions, references):
            predictions, references = (np.asarray(side, value.dtype) for side in (predictions, references))
            if why_undefined(name, predictions, references):
                return {name: None}
            if name in REGRESSION:
                return {name: float(FORMULAS[name](predictions, references))}
            return {name: float(FORMULAS[name](count_classes(predictions, references)))}

    Metric.__name__ = name  # the library names the metric after its class
    return Metric(keep_in_memory=True)


@functools.cache
def import_evaluate():
    """Return the `evaluate` library, which this project's script evaluate.py shadows for every script in its folder.

    For this one import, folders that contain an evaluate.py leave sys.path, and that script leaves sys.modules.
    """
    path, imported = sys.path, sys.modules.get("evaluate")
    if hasattr(imported, "__path__"):  # a package, so it is the library already
        return imported
    sys.path = [entry for entry in path if not Path(entry, "evaluate.py").is_file()]
    sys.modules.pop("evaluate", None)
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path = path
        if imported is not None:
            sys.modules["evaluate"] = imported


# ---------------------------------------------------------------------------------------------------------- formulas


class Counts(NamedTuple):
    """What classification scores are computed from. Leading axes (...) are resamples of the rows, if any."""

    rows: np.ndarray  # (...)
    right: np.ndarray  # (...): rows predicted right; in multi-label, rows with all labels right
    hits: np.ndarray  # (..., classes): rows predicted right, by class
    predicted: np.ndarray  # (..., classes): rows for which each class is predicted
    actual: np.ndarray  # (..., classes): rows whose reference is each class
    classes: np.ndarray  # (...): the number of classes that a macro average divides by


def class_columns(predictions, references):
    """Return fields of Counts for each row: `right` (rows,); `hits`, `predicted`, `actual`: sparse (rows, classes)."""
    from scipy.sparse import csr_array

    if references.ndim == 2:
        predicted, actual = csr_array(predictions), csr_array(references)
        right = (predictions == references).all(axis=1)
    else:
        classes, codes = np.unique(np.concatenate([predictions, references]), return_inverse=True)
        rows, ones = np.arange(len(references)), np.ones(len(references))
        predicted, actual = (
            csr_array((ones, (rows, side)), shape=(len(rows), len(classes))) for side in np.split(codes, 2)
        )
        right = predictions == references
    return {"right": right, "hits": predicted * actual, "predicted": predicted, "actual": actual}


def count_classes(predictions, references, times=None):
    """Return the Counts of rows; `times` (..., rows) is how often each row counts, once by default."""
    columns = class_columns(predictions, references)
    times = np.ones(len(references)) if times is None else np.asarray(times, np.float64)
    counts = {name: times @ column for name, column in columns.items()}
    # scikit-learn leaves classes that do not occur out of a macro average, but only with one label per row.
    occurs = (counts["predicted"] + counts["actual"] > 0) | (references.ndim == 2)
    return Counts(rows=times.sum(axis=-1), classes=np.sum(occurs, axis=-1), **counts)


def safe_divide(part, whole):
    """Return part / whole, and 0 where the denominator is 0."""
    return part / np.where(whole == 0, 1, whole)


def accuracy(counts):
    """Rows predicted right / rows; in multi-label a row is right if all of its labels are."""
    return safe_divide(counts.right, counts.rows)


def f1_by_class(counts):
    """2 tp / (2 tp + fp + fn) of each class (van Rijsbergen 1979), shape (..., classes)."""
    return safe_divide(2 * counts.hits, counts.predicted + counts.actual)


def f1(counts):
    """F1 of the positive class, which is the last (GLUE's MRPC and QQP)."""
    return f1_by_class(counts)[..., -1]


def f1_micro(counts):
    """F1 of all labels of all rows together."""
    return safe_divide(2 * counts.hits.sum(axis=-1), (counts.predicted + counts.actual).sum(axis=-1))


def f1_macro(counts):
    """Unweighted mean of F1 over the classes that occur; in multi-label over all, 0 for one that does not occur."""
    return safe_divide(f1_by_class(counts).sum(axis=-1), counts.classes)


def f1_weighted(counts):
    """Mean of each class's F1, weighted by its rows in the references."""
    return safe_divide((f1_by_class(counts) * counts.actual).sum(axis=-1), counts.rows)


def precision_weighted(counts):
    """Mean of each class's precision, weighted by its rows in the references; 0 for a class never predicted."""
    return safe_divide((safe_divide(counts.hits, counts.predicted) * counts.actual).sum(axis=-1), counts.rows)


def matthews_correlation(counts):
    """R_K for any number of classes (Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006); for two, Matthews 1975."""
    rows, predicted, actual = counts.rows, counts.predicted, counts.actual
    covariance = counts.right * rows - (predicted * actual).sum(axis=-1)
    variances = (rows**2 - (predicted**2).sum(axis=-1)) * (rows**2 - (actual**2).sum(axis=-1))
    return safe_divide(covariance, np.sqrt(variances))  # 0/0 is 0, as in scikit-learn


def pearson(predictions, references):
    """Covariance / (standard deviation * standard deviation) (Pearson 1895), as scipy.stats.pearsonr computes it."""
    deviations = [values - values.mean(axis=-1, keepdims=True) for values in (predictions, references)]
    # Scaled to a largest value of 1 first: the squares of tiny deviations would underflow to 0.
    x, y = (values / np.abs(values).max(axis=-1, keepdims=True) for values in deviations)
    covariance, variances = (x * y).sum(axis=-1), (x * x).sum(axis=-1) * (y * y).sum(axis=-1)
    return np.clip(covariance / np.sqrt(variances), -1.0, 1.0)  # rounding may give 1 + 2e-16


def spearmanr(predictions, references):
    """Pearson's correlation of the ranks, ties sharing their average rank (Spearman 1904)."""
    from scipy.stats import rankdata

    return pearson(rankdata(predictions, axis=-1), rankdata(references, axis=-1))


def mse(predictions, references):
    """Mean squared error, in squared label units."""
    return np.mean((predictions - references) ** 2, axis=-1)


recall_weighted = accuracy  # each class's recall, weighted by its rows in the references: the same number
# A function of Counts, or of (predictions, references) in regression; valid where why_undefined returns "".
FORMULAS = {name: globals()[name] for name in DIRECTION}
