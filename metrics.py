"""Metrics: the GLUE scores and their kin, as in-memory `evaluate.Metric` objects: no network, no files.

    compute(["f1", "accuracy"], predictions, references)      -> {"f1": 0.8122, "accuracy": 0.6838}

Scores equal scikit-learn's and scipy's in float64; one that has no value is None. Predictions and references are
integer class ids (after the argmax), floats for regression, or 0 and 1 of shape (rows, labels) for multi-label.
"""

import difflib
import functools
import importlib
import math
import sys
import warnings
from pathlib import Path

import numpy as np

REGRESSION = "pearson spearmanr mse".split()
CLASSIFICATION = "accuracy f1 matthews_correlation f1_macro f1_weighted precision_weighted recall_weighted".split()
MULTI_LABEL = "f1_micro f1_macro accuracy".split()
DIRECTION = dict.fromkeys(CLASSIFICATION + MULTI_LABEL + REGRESSION, "max") | {"mse": "min"}  # which way is better


def is_better(name, score, best):
    """Return whether `score` beats `best`: None never wins, anything beats None, a tie keeps the older one."""
    require_known(name)
    if score is None or math.isnan(score):
        return False
    if best is None or math.isnan(best):
        return True
    return score > best if DIRECTION[name] == "max" else score < best


def require_known(name):
    if name not in DIRECTION:
        nearest = difflib.get_close_matches(str(name), DIRECTION, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise ValueError(f"unknown metric {name!r}: {hint}Allowed: {', '.join(DIRECTION)}")


def check(names, number_of_labels, multi_label=False):
    """Raise ValueError, in one line, where a metric is unknown or does not fit; regression: None labels."""
    if not names:
        raise ValueError(f"no metric is named. Allowed: {', '.join(DIRECTION)}")
    for name in names:
        require_known(name)
        if multi_label and name not in MULTI_LABEL:
            raise ValueError(f"{name} is not for several labels a text: use {', '.join(MULTI_LABEL)}")
        if not multi_label and name == "f1_micro":
            raise ValueError("f1_micro is for several labels a text; with one label it is the accuracy: use that")
        if number_of_labels is None and name not in REGRESSION:
            raise ValueError(f"{name} is for classification, this task is regression: use {', '.join(REGRESSION)}")
        if number_of_labels is not None and name in REGRESSION:
            fitting = [other for other in CLASSIFICATION if other != "f1" or number_of_labels == 2]
            raise ValueError(f"{name} is for regression, this task has labels: use {', '.join(fitting)}")
        if name == "f1" and number_of_labels != 2:
            raise ValueError(f"f1 is for two labels, this task has {number_of_labels}: use f1_macro")


def compute(names, predictions, references):
    """Return {name: score}. Warns once, with the reasons, where scores are undefined."""
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
                if values.dtype.kind not in "biu":  # `evaluate` would cut 1.7 to 1 in silence
                    raise ValueError(f"{name} needs integer class ids, the {side} are {values.dtype}: take the argmax")
            if references.min() < 0:
                raise ValueError(f"{name} needs labels, the references hold {references.min()}: leave such rows out")
        metric = load(name, multi_label=references.ndim == 2)
        scores.update(metric.compute(predictions=predictions, references=references))
        if scores[name] is None:
            undefined.append(f"{name} is undefined: {why_undefined(name, predictions, references)}")
    if undefined:
        warnings.warn("; ".join(undefined), stacklevel=2)
    return scores


def load(name, multi_label=False):
    """Return an `evaluate.Metric`, as `evaluate.load` would; add, add_batch and compute work as usual."""
    require_known(name)
    evaluate = import_evaluate()
    from datasets import Features, List, Value

    value = Value("float64" if name in REGRESSION else "int64")
    column = List(value) if multi_label else value

    class Metric(evaluate.Metric):
        def _info(self):
            features = Features(predictions=column, references=column)  # as format="numpy" it would be float32
            return evaluate.MetricInfo(description=FORMULAS[name].__doc__, citation="", features=features)

        def _build_data_dir(self):
            return ""  # the library makes an empty folder in the cache here, even with keep_in_memory

        def _compute(self, predictions, references):
            predictions, references = (np.asarray(side, value.dtype) for side in (predictions, references))
            defined = not why_undefined(name, predictions, references)
            return {name: float(FORMULAS[name](predictions, references)) if defined else None}

    Metric.__name__ = name  # the library names the metric after its class
    return Metric(keep_in_memory=True)


@functools.cache
def import_evaluate():
    """Return the `evaluate` library, which this project's script evaluate.py hides from every script beside it.

    For this one import, folders with a file evaluate.py leave sys.path, and that script leaves sys.modules.
    """
    path, found = sys.path, sys.modules.get("evaluate")
    if hasattr(found, "__path__"):  # a package: the library is there already
        return found
    sys.path = [entry for entry in path if not Path(entry, "evaluate.py").is_file()]
    sys.modules.pop("evaluate", None)
    try:
        return importlib.import_module("evaluate")
    finally:
        sys.path = path
        if found is not None:
            sys.modules["evaluate"] = found


def why_undefined(name, predictions, references):
    """Return why this score has no value, in plain words; an empty string where it has one."""
    if len(references) == 0:
        return "there are no rows"
    if name in ("f1", "f1_micro") and not ((predictions == 1).any() or (references == 1).any()):
        nothing = "class 1 is neither predicted nor present" if name == "f1" else "no label is predicted or present"
        return f"{nothing}, 0/0"
    if name in REGRESSION:
        for side, values in (("predictions", predictions), ("references", references)):
            # The squares of larger ones overflow; NaN is not below anything.
            if not (np.abs(values.astype(np.float64)) < 1e100).all():
                return f"the {side} hold NaN, infinity or values beyond 1e+100"
            if name != "mse" and len(values) < 2:
                return "one row has no correlation"
            if name != "mse" and (values == values[0]).all():
                return f"all {side} are equal"
    return ""


def count_classes(predictions, references):
    """Return in how many rows each class that occurs (in multi-label: each) is right, is predicted, is present."""
    if references.ndim == 2:
        return (predictions & references).sum(axis=0), predictions.sum(axis=0), references.sum(axis=0)
    classes, codes = np.unique(np.concatenate([predictions, references]), return_inverse=True)
    predicted, actual = np.split(codes, 2)
    columns = (predicted[predicted == actual], predicted, actual)
    return tuple(np.bincount(column, minlength=len(classes)) for column in columns)


def accuracy(predictions, references):
    """Rows predicted right / rows; in multi-label a row is right where all of its labels are."""
    return np.mean((predictions == references).reshape(len(references), -1).all(axis=1))


def f1(predictions, references):
    """2 tp / (2 tp + fp + fn), the positive class being id 1 (van Rijsbergen 1979; GLUE's MRPC and QQP)."""
    hits = np.sum((predictions == 1) & (references == 1))
    return 2 * hits / (np.sum(predictions == 1) + np.sum(references == 1))


def f1_macro(predictions, references):
    """Plain mean of each class's F1; 0 for a label of a multi-label task that is neither predicted nor present."""
    hits, predicted, actual = count_classes(predictions, references)
    return np.mean(2 * hits / np.maximum(predicted + actual, 1))


def f1_weighted(predictions, references):
    """Mean of each class's F1, weighted by its rows in the references."""
    hits, predicted, actual = count_classes(predictions, references)
    return np.average(2 * hits / (predicted + actual), weights=actual)


def precision_weighted(predictions, references):
    """Mean of each class's precision, weighted by its rows in the references; 0 for a class never predicted."""
    hits, predicted, actual = count_classes(predictions, references)
    return np.average(hits / np.maximum(predicted, 1), weights=actual)


def matthews_correlation(predictions, references):
    """R_K for any number of classes (Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006); for two, Matthews 1975."""
    hits, predicted, actual = (counts.astype(np.float64) for counts in count_classes(predictions, references))
    rows = actual.sum()
    covariance = hits.sum() * rows - predicted @ actual
    variances = (rows**2 - predicted @ predicted) * (rows**2 - actual @ actual)
    return covariance / math.sqrt(variances) if variances else 0.0  # 0/0 is 0, as in scikit-learn


def pearson(predictions, references):
    """Covariance / (standard deviation * standard deviation) (Pearson 1895), as scipy.stats.pearsonr computes it."""
    deviations = [values - values.mean() for values in (predictions, references)]
    # Scaled to a largest value of 1 first: the squares of tiny deviations would be 0.
    x, y = (values / np.abs(values).max() for values in deviations)
    return np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1.0, 1.0)  # rounding may give 1 + 2e-16


def spearmanr(predictions, references):
    """Pearson's correlation of the ranks, ties sharing their average rank (Spearman 1904)."""
    ranks = []
    for values in (predictions, references):
        _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[codes])
    return pearson(*ranks)


def mse(predictions, references):
    """Mean squared error, in squared label units."""
    return np.mean((predictions - references) ** 2)


f1_micro = f1  # of all labels of all rows together
recall_weighted = accuracy  # each class's recall, weighted by its rows in the references: the same number
# (predictions, references) -> score, where why_undefined has no objection.
FORMULAS = {name: globals()[name] for name in DIRECTION}
