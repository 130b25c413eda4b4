"""Intervals: how far a score, or the difference of two models, may lie from that of all texts like these.

    score_intervals(["accuracy"], predictions, references)               -> {"accuracy": [0.6070, 0.9000]}
    difference_intervals(["accuracy"], predictions, others, references)  -> {"accuracy": [-0.0412, 0.1812]}

All of them follow from the influence of each row on the score, so nothing is drawn at random. They say what other texts
would change, and not what another seed would. benchmarks/coverage.py simulates how often they hold the true score.
"""

import numpy as np

from classifier.evaluation import metrics
from classifier.evaluation.metrics import DIRECTION, FORMULAS, REGRESSION, Counts, why_undefined

LEVEL, POWER = 0.95, 0.8
MEANING = "(intervals: of other texts like these, not of other seeds)"
NUMBERS_AT_A_TIME = 10**7  # drawn for a randomisation test: 80 MB
# Of each class. With fewer, no interval that was tried holds a true score of classes in 95 % of samples.
MIN_ROWS = {"f1": 5, "f1_macro": 5, "f1_micro": 5, "matthews_correlation": 5, "precision_weighted": 20}
MIN_ROWS_OF_REGRESSION = 5

# ---------------------------------------------------------------------------------------------------------- intervals


def score_intervals(names, predictions, references, scores=None, variances=None):
    """Return {name: [low, high]}, 95 % intervals; None where why_no_interval has a reason.

    predictions, references: (rows,), or (rows, labels) of 0 and 1, as in metrics.compute_metrics. scores, variances:
    by name, corrected scores (selection.py) in place of those of the rows, and what their variances have besides.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    scores, variances, result = scores or {}, variances or {}, {}
    for name in names:
        is_missing = why_no_interval(name, predictions, references) or (name in scores and scores[name] is None)
        interval = _correlation_or_error if name in REGRESSION else _share
        more = scores.get(name), variances.get(name, 0.0)
        result[name] = None if is_missing else interval(name, predictions, references, *more)
    return result


def missing_intervals(names, predictions, references):
    """Return {name: why it has no interval} of the scores that have none."""
    sides = np.asarray(predictions), np.asarray(references)
    return {name: reason for name in names if (reason := why_no_interval(name, *sides))}


def why_no_interval(name, predictions, references):
    """Return why this score has no interval, or an empty string where it has one."""
    if reason := why_undefined(name, predictions, references):
        return reason
    if len(references) < 2:
        return "one row"
    if name in REGRESSION:
        if len(references) < MIN_ROWS_OF_REGRESSION:
            return f"{len(references)} rows, {MIN_ROWS_OF_REGRESSION} are needed"
        residuals = predictions - references
        if (residuals == residuals[0]).all() or (name != "mse" and abs(FORMULAS[name](predictions, references)) == 1):
            return "all errors are equal"
        return ""
    if name not in MIN_ROWS:
        return ""
    if references.ndim == 2:
        rows = references.sum(axis=0)
    elif name == "f1":
        rows = np.array([(references == 1).sum()])
    else:
        rows = np.unique(references, return_counts=True)[1]
        if len(rows) == 1:
            return "one class only"
    fewest = int(rows.sum() if name == "f1_micro" else rows.min())
    if fewest >= MIN_ROWS[name]:
        return ""
    owner = {"f1": "the positive class has", "f1_micro": "all labels together have"}.get(name, "a class has")
    return f"{owner} {fewest} row{'s' * (fewest != 1)}, {MIN_ROWS[name]} are needed"


def format_intervals(values, reasons=None):
    """Return {name: interval} as text: `f1 0.8192 to 0.8805, accuracy none`. reasons: {name: why there is none}."""
    reasons = reasons or {}
    return ", ".join(
        f"{name} {interval[0]:.4f} to {interval[1]:.4f}"
        if interval
        else f"{name} none" + (f" ({reasons[name]})" if name in reasons else "")
        for name, interval in values.items()
    )


def _share(name, predictions, references, corrected=None, more_variance=0.0):
    """Return the interval of a score from 0 to 1, or from -1 to 1, of classes.

    The exact binomial interval for the number of rows that a share of the same variance would have, as for the
    effective sample size of a survey (Korn and Graubard 1998); for accuracy these are the rows.
    The variance is taken with two more rows, a right and a wrong one, since without errors there would be none.
    """
    low, high = metrics.limits(name)
    scale = high - low
    score = FORMULAS[name](metrics.count_classes(predictions, references)) if corrected is None else corrected
    score = float(np.clip((score - low) / scale, 0, 1))
    wrong, right, times = _wrong_row(predictions, references)
    rows = len(references)
    smoothed, influences = _influences(
        name,
        np.concatenate([predictions, wrong, references]),
        np.concatenate([references, right, references]),
        times := np.concatenate([np.ones(rows), times, np.full(rows, 1 / rows)]),
    )
    share, variance = (smoothed - low) / scale, np.average((influences / scale) ** 2, weights=times) / rows
    effective_rows = share * (1 - share) / (variance + more_variance / scale**2)
    return [low + scale * bound for bound in binomial_interval(score * effective_rows, effective_rows)]


def binomial_interval(right, rows):
    """Return the exact interval [low, high] of a share, of `right` among `rows` (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    outside = (1 - LEVEL) / 2
    low = beta.ppf(outside, right, rows - right + 1) if right > 0 else 0
    high = beta.ppf(1 - outside, right + 1, rows - right) if right < rows else 1
    return [float(low), float(high)]


def _correlation_or_error(name, predictions, references, corrected=None, more_variance=0.0):
    """Return the interval of a score of regression, by the jackknife (Tukey 1958) and Student's t.

    A correlation on the scale of Fisher's z, an error on that of its logarithm: there they are about normal.
    """
    change, back = (np.log, np.exp) if name == "mse" else (np.arctanh, np.tanh)
    score, without = _leave_one_out(name, predictions, references)
    slope = 1 / score if name == "mse" else 1 / (1 - score**2)  # of the scale
    variance = _jackknife_variance(change(without)) + more_variance * slope**2
    margin, score = _t_quantile(len(without)) * np.sqrt(variance), score if corrected is None else corrected
    return [float(back(change(score) - margin)), float(back(change(score) + margin))]


def _t_quantile(rows):
    from scipy.stats import t

    return t.ppf((1 + LEVEL) / 2, max(rows - 2, 1))


def _jackknife_variance(without):
    """Return the variance of a score. without: (rows,), the score without each of the rows."""
    return (len(without) - 1) * without.var()


def difference_intervals(names, predictions, others, references):
    """Return {name: [low, high]} of the score of predictions - that of others; None where a score has no interval.

    Both models are scored on the same rows, so what they have in common cancels. In classification the variance is
    taken with two more rows, each right in one model only (Bonett and Price 2012, doi:10.3102/1076998611411915).
    """
    from scipy.stats import norm

    predictions, others, references = map(np.asarray, (predictions, others, references))
    result = {}
    for name in names:
        if any(why_undefined(name, side, references) for side in (predictions, others)) or len(references) < 2:
            result[name] = None
            continue
        if name in REGRESSION:
            (score, without), (other_score, others_without) = (
                _leave_one_out(name, side, references) for side in (predictions, others)
            )
            variance, quantile = _jackknife_variance(without - others_without), _t_quantile(len(references))
        else:
            score, other_score = (
                FORMULAS[name](metrics.count_classes(side, references)) for side in (predictions, others)
            )
            variance, quantile = (
                _variance_of_difference(name, predictions, others, references),
                norm.ppf((1 + LEVEL) / 2),
            )
        margin = quantile * np.sqrt(variance)
        low, high = metrics.limits(name)
        limit = high - low
        bounds = np.clip([score - other_score - margin, score - other_score + margin], -limit, limit)
        result[name] = bounds.tolist()
    return result


def _variance_of_difference(name, predictions, others, references):
    wrong, right, times = _wrong_row(predictions, references)
    references, times = np.concatenate([references, right, right]), np.concatenate([np.ones(len(others)), times, times])
    _, influences = _influences(name, np.concatenate([predictions, wrong, right]), references, times)
    _, other_influences = _influences(name, np.concatenate([others, right, wrong]), references, times)
    return np.average((influences - other_influences) ** 2, weights=times) / times.sum()


def _wrong_row(predictions, references):
    """Return (predictions, references, times) of one row in all, spread over many that are wrong.

    Each of these has the reference of one row and the prediction of another.
    """
    order = np.lexsort(np.column_stack([predictions, references]).T)
    wrong, right = np.roll(predictions[order], len(order) // 2, axis=0), references[order]
    is_wrong = (wrong != right).reshape(len(right), -1).any(axis=1)
    if not is_wrong.any():  # all rows are alike
        wrong, is_wrong = (
            (1 - right if right.ndim == 2 else np.where(right > 0, right - 1, 1)),
            np.ones(len(right), dtype=bool),
        )
    return wrong[is_wrong], right[is_wrong], np.full(is_wrong.sum(), 1 / is_wrong.sum())


# ------------------------------------------------------------------------------------------ differences of two models

ROUNDING = 1e-4  # of a score's scale: what summing in another order may change


def detectable_difference(interval):
    """Return the true difference that such rows would show with a probability of 80 %. interval: of the difference."""
    from scipy.stats import norm

    quantile = norm.ppf((1 + LEVEL) / 2)
    return (interval[1] - interval[0]) / 2 * (1 + norm.ppf(POWER) / quantile)


def rounding_margin(name, score, other):
    """Return how far two scores may differ by rounding alone. The scale of an error is itself, of other scores 1."""
    return ROUNDING * (max(score, other) if DIRECTION[name] == "min" else 1)


def is_beyond_margin(interval, margin):
    """Return whether an interval of a difference is on one side of 0 and beyond the margin of `rounding_margin`.

    Excluding 0 is not enough: summing in another order shifts all errors alike, by a millionth, in every resample.
    """
    return interval[0] > margin or interval[1] < -margin


def format_difference(difference):
    """Return a difference as text that is 0 only if the difference is: +0.0123, -9.0e-07, 0."""
    if difference == 0:
        return "0"
    return f"{difference:+.4f}" if abs(difference) >= 5e-5 else f"{difference:+.1e}"


def mcnemar(is_right, other_is_right):
    """Return (rows only one gets right, rows only the other gets right, p): McNemar's exact test.

    is_right, other_is_right: (rows,), bools. p: how likely counts at least this uneven are if both models are right
    equally often. https://doi.org/10.1007/BF02295996
    """
    from scipy.stats import binomtest

    only_one = int((is_right & ~other_is_right).sum())
    only_other = int((~is_right & other_is_right).sum())
    differ = only_one + only_other
    return only_one, only_other, float(binomtest(only_one, differ).pvalue) if differ else 1.0


def randomisation_test(name, predictions, others, references, draws=9_999):
    """Return how likely a difference at least this large is if two models are alike, so that each row may be swapped.

    Noreen 1989; Yeh 2000, https://aclanthology.org/C00-2137. For accuracy it is McNemar's test. Of all swaps, `draws`
    are drawn, the same each time, and fewer where there are very many rows.
    """
    predictions, others, references = map(np.asarray, (predictions, others, references))
    generator, formula = np.random.default_rng(0), FORMULAS[name]
    if name in REGRESSION:
        number = len(references)

        def differences(draws):
            is_swapped = generator.random((draws, number)) < 0.5
            sides = np.where(is_swapped, others, predictions), np.where(is_swapped, predictions, others)
            first, second = (formula(side, np.broadcast_to(references, side.shape)) for side in sides)
            return first - second

        observed = formula(predictions, references) - formula(others, references)
    else:
        # Rows with the same label and predictions are interchangeable: only how many of them are swapped matters.
        kinds, counts = np.unique(np.column_stack([references, predictions, others]), axis=0, return_counts=True)
        references, predictions, others = (
            part if references.ndim == 2 else part[:, 0] for part in np.split(kinds, 3, axis=1)
        )
        number = len(kinds)
        sides, both = np.concatenate([predictions, others]), np.concatenate([references, references])

        def differences_of(swapped):
            times = np.concatenate([counts - swapped, swapped], axis=-1)
            other_times = np.concatenate([swapped, counts - swapped], axis=-1)
            first, second = (formula(metrics.count_classes(sides, both, each)) for each in (times, other_times))
            return first - second

        def differences(draws):
            return differences_of(generator.binomial(counts, 0.5, (draws, number)))

        observed = differences_of(np.zeros(number))
    draws = max(999, min(draws, 2 * NUMBERS_AT_A_TIME // number))
    at_a_time = max(1, NUMBERS_AT_A_TIME // number)
    as_large = sum(
        np.sum(np.abs(differences(min(at_a_time, draws - first))) >= abs(observed) - 1e-12)
        for first in range(0, draws, at_a_time)
    )
    return float((1 + as_large) / (1 + draws))


# ---------------------------------------------------------------------------------------------------------- influences


def _influences(name, predictions, references, times):
    """Return (score, influence of each row (rows,)) of a score of classes; `times` is how often each row counts.

    The influence is the derivative of the score by the row's share of all rows: the variance of the score is the mean
    of its square / rows (Efron 1982, the infinitesimal jackknife).
    """
    columns = metrics.class_columns(predictions, references)
    counts = metrics.count_classes(predictions, references, times)
    total, score = times.sum(), float(FORMULAS[name](counts))

    def derivatives(field):
        """Return the derivative of the score by each number of a field of Counts."""
        value = np.atleast_1d(getattr(counts, field)).astype(np.float64)
        step = 1e-6 * total
        moved = value + step * np.eye(len(value))
        many = {name: np.broadcast_to(part, (len(value), *np.shape(part))) for name, part in counts._asdict().items()}
        many[field] = moved if np.ndim(getattr(counts, field)) else moved[:, 0]
        return (FORMULAS[name](Counts(**many)) - score) / step

    influences = derivatives("rows") + derivatives("right") * columns["right"]
    for field in ("hits", "predicted", "actual"):
        influences = influences + columns[field] @ derivatives(field)
    return score, total * influences


def _leave_one_out(name, predictions, references):
    """Return (score, scores without each of the rows (rows,)) of a score of regression."""
    predictions, references = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    left = len(references) - 1
    if name == "mse":
        errors = (predictions - references) ** 2
        return errors.mean(), np.maximum(errors.sum() - errors, 0) / left
    if name == "spearmanr":
        score, influences = _influences_on_ranks(predictions, references)
        return score, np.clip(score - influences / left, -1 + 1e-12, 1 - 1e-12)
    x, y = ((values - values.mean()) / np.abs(values - values.mean()).max() for values in (predictions, references))
    covariance, *variances = (
        (one * other).sum() - one * other * (1 + 1 / left) for one, other in ((x, y), (x, x), (y, y))
    )
    without = covariance / np.sqrt(np.maximum(variances[0] * variances[1], 1e-300))
    return float(metrics.pearson(predictions, references)), np.clip(without, -1 + 1e-12, 1 - 1e-12)


def _influences_on_ranks(predictions, references):
    """Return (Spearman's correlation, influence of each row on it (rows,)), which a row has through others' ranks, too.

    The derivative of the correlation of the two distribution functions (Croux and Dehon 2010,
    doi:10.1007/s10260-010-0142-z); ties have their middle rank.
    """
    from scipy.stats import rankdata

    rows = len(references)
    sides = [(values, (rankdata(values) - 0.5) / rows) for values in (predictions, references)]

    def mean_of_larger(values, shares):
        """Return for each row the mean over all rows of the shares of larger values, of equal ones a half."""
        order = np.argsort(values, kind="stable")
        ordered, sums = values[order], np.append(np.cumsum(shares[order][::-1])[::-1], 0)
        first, last = (sums[np.searchsorted(ordered, values, side)] for side in ("left", "right"))
        return (first + last) / 2 / rows

    def product(one, other):
        influence = one[1] * other[1] + mean_of_larger(one[0], other[1]) + mean_of_larger(other[0], one[1])
        return np.mean(one[1] * other[1]) - 0.25, influence - influence.mean()

    (covariance, of_covariance), (x, of_x), (y, of_y) = (
        product(*pair) for pair in (sides, [sides[0]] * 2, [sides[1]] * 2)
    )
    score = covariance / np.sqrt(x * y)
    return float(score), of_covariance / np.sqrt(x * y) - score / 2 * (of_x / x + of_y / y)
