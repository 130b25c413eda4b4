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
from typing import NamedTuple

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


def compute(names, predictions, references, warns=True):
    """Return {name: score}. Warns once, with the reasons, where scores are undefined, unless that is no news."""
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
    if undefined and warns:
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
            if why_undefined(name, predictions, references):
                return {name: None}
            given = (predictions, references) if name in REGRESSION else (count_classes(predictions, references),)
            return {name: float(FORMULAS[name](*given))}

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


class Counts(NamedTuple):
    """What scores of classes are made of, each a number or an array with the same leading axes (resamples of rows)."""

    rows: np.ndarray  # (...)
    right: np.ndarray  # (...): rows predicted right; in multi-label those of which all labels are
    hits: np.ndarray  # (..., classes): rows predicted right, by class
    predicted: np.ndarray  # (..., classes): rows that each class is predicted for
    actual: np.ndarray  # (..., classes): rows that each class is the reference of
    classes: np.ndarray  # (...): in how many of them an average over classes divides


def count_classes(predictions, references, times=None):
    """Return the Counts of rows, each of which counts `times` (..., rows) times, or once; of classes that occur."""
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
    times = np.ones(len(references)) if times is None else np.asarray(times, np.float64)
    hits, predicted, actual = (times @ part for part in (predicted * actual, predicted, actual))
    # With one label a row scikit-learn leaves a class that does not occur out of an average; with several it does not.
    number = np.sum((predicted + actual > 0) | (references.ndim == 2), axis=-1)
    return Counts(times.sum(axis=-1), times @ right, hits, predicted, actual, number)


def safe_divide(part, whole):
    """Return part / whole, and 0 where the whole is 0."""
    return part / np.where(whole == 0, 1, whole)


def accuracy(counts):
    """Rows predicted right / rows; in multi-label a row is right where all of its labels are."""
    return safe_divide(counts.right, counts.rows)


def f1_of_classes(counts):
    """2 tp / (2 tp + fp + fn) of each class (van Rijsbergen 1979), shape (..., classes)."""
    return safe_divide(2 * counts.hits, counts.predicted + counts.actual)


def f1(counts):
    """F1 of the positive class, which is the last (GLUE's MRPC and QQP)."""
    return f1_of_classes(counts)[..., -1]


def f1_micro(counts):
    """F1 of all labels of all rows together."""
    return safe_divide(2 * counts.hits.sum(axis=-1), (counts.predicted + counts.actual).sum(axis=-1))


def f1_macro(counts):
    """Plain mean of each class's F1, of the classes that occur; in multi-label of all, 0 for one that does not."""
    return safe_divide(f1_of_classes(counts).sum(axis=-1), counts.classes)


def f1_weighted(counts):
    """Mean of each class's F1, weighted by its rows in the references."""
    return safe_divide((f1_of_classes(counts) * counts.actual).sum(axis=-1), counts.rows)


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
    # Scaled to a largest value of 1 first: the squares of tiny deviations would be 0.
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
# Counts -> score, and in regression (predictions, references) -> score: where why_undefined has no objection.
FORMULAS = {name: globals()[name] for name in DIRECTION}

RESAMPLES, LEVEL = 10_000, 0.95
ROUNDING = 1e-4  # of a score's scale: what sums in another order may change
NUMBERS_AT_A_TIME = 10**7  # that resamples are drawn in: 80 MB


def intervals(names, predictions, references, resamples=RESAMPLES):
    """Return {name: [low, high]} of metrics by their names; None for a score that has no value, or one row alone."""
    scores = _resampled(names, references, predictions, resamples=resamples)
    return {name: _interval(of_model) for name, (of_model,) in scores.items()}


def differences(names, predictions, others, references, resamples=RESAMPLES):
    """Return {name: [low, high]} of the score of predictions - that of others: both meet the same resamples."""
    scores = _resampled(names, references, predictions, others, resamples=resamples)
    return {name: _interval(ours - theirs) for name, (ours, theirs) in scores.items()}


def rounding_margin(name, score, other):
    """Return how far two scores of a metric may lie apart by rounding alone.

    An error has the scale of its labels, every other score that of 1.
    """
    return ROUNDING * (max(score, other) if DIRECTION[name] == "min" else 1)


def is_beyond_margin(interval, margin):
    """Return whether an interval of a difference lies on one side of 0, and beyond the margin of `rounding`.

    The margin, since another order of sums shifts the errors of all rows alike: by a millionth, but then in every
    resample, and the interval leaves out 0.
    """
    return interval[0] > margin or interval[1] < -margin


def format_difference(difference):
    """Return a difference as a word that is 0 only where there is none: +0.0123, -9.0e-07, 0."""
    if difference == 0:
        return "0"
    return f"{difference:+.4f}" if abs(difference) >= 5e-5 else f"{difference:+.1e}"


def format_intervals(of_metrics):
    """Return intervals as words: `f1 0.8192 to 0.8805, accuracy none`."""
    return ", ".join(
        f"{name} {interval[0]:.4f} to {interval[1]:.4f}" if interval else f"{name} none"
        for name, interval in of_metrics.items()
    )


def _interval(scores):
    if len(scores) == 0 or not np.isfinite(scores).all():
        return None
    outside = (1 - LEVEL) / 2
    return np.quantile(scores, [outside, 1 - outside]).tolist()


def _resampled(names, references, *models, resamples):
    """Return {name: [scores (resamples,) of each model]}; models: the predictions of each. All draw the same rows."""
    references, models = np.asarray(references), [np.asarray(predictions) for predictions in models]
    rows, generator = len(references), np.random.default_rng(0)
    scores = {name: [[] for _ in models] for name in names}
    undefined = {name for name in names if any(why_undefined(name, of, references) for of in models)}
    of_classes = bool(names) and names[0] not in REGRESSION
    if of_classes:
        # Rows with the same label and predictions are interchangeable. How often each kind is drawn is multinomial:
        # a few numbers for a resample, however many rows there are.
        kinds, counts = np.unique(np.column_stack([references, *models]), axis=0, return_counts=True)
        columns = np.split(kinds, 1 + len(models), axis=1)
        references, *models = (column if references.ndim == 2 else column[:, 0] for column in columns)
    else:  # nothing but the rows themselves to draw: fewer resamples where there are very many
        resamples = min(resamples, max(1000, 3 * 10**6 // max(rows, 1)))
    size = len(references)
    at_a_time = max(1, NUMBERS_AT_A_TIME // max(size, 1))
    for first in range(0, resamples if rows > 1 else 0, at_a_time):
        number = min(at_a_time, resamples - first)
        if of_classes:
            times = generator.multinomial(rows, counts / rows, size=number)
            given = [(count_classes(predictions, references, times),) for predictions in models]
        else:
            drawn = generator.integers(0, rows, (number, rows))
            given = [(predictions[drawn], references[drawn]) for predictions in models]
        with np.errstate(invalid="ignore"):  # a resample of equal values has no correlation
            for name, of_models in scores.items():
                for of_model, of_resamples in zip(given, of_models, strict=True):
                    of_resamples.append(FORMULAS[name](*of_model))
    none = np.zeros(0)
    return {
        name: [none if name in undefined or not parts else np.concatenate(parts) for parts in of_models]
        for name, of_models in scores.items()
    }


def mcnemar(is_right, is_right_of_other):
    """Return ({only one, only the other}: counts, p): the exact test of McNemar, https://doi.org/10.1007/BF02295996.

    is_right: (rows,), bools. p: how likely counts as uneven as these are where both models are right equally often.
    """
    from scipy.stats import binomtest

    only_one = int((is_right & ~is_right_of_other).sum())
    only_other = int((~is_right & is_right_of_other).sum())
    differ = only_one + only_other
    return only_one, only_other, float(binomtest(only_one, differ).pvalue) if differ else 1.0
