"""How sure a score is: intervals, and the comparison of two models on the same examples.

An interval holds the middle 95 % of the scores of resamples: as many rows, drawn with replacement (the percentile
bootstrap; Efron 1979, https://doi.org/10.1214/aos/1176344552). It says what another sample of texts would have given
this model, not what another seed would have given this recipe.
"""

import numpy as np

import metrics

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


def rounding(name, score, other):
    """Return how far two scores of a metric may lie apart by rounding alone.

    An error has the scale of its labels, every other score that of 1.
    """
    return ROUNDING * (max(score, other) if metrics.DIRECTION[name] == "min" else 1)


def is_shown(interval, margin):
    """Return whether an interval of a difference lies on one side of 0, and beyond the margin of `rounding`.

    The margin, since another order of sums shifts the errors of all rows alike: by a millionth, but then in every
    resample, and the interval leaves out 0.
    """
    return interval[0] > margin or interval[1] < -margin


def signed(difference):
    """Return a difference as a word that is 0 only where there is none: +0.0123, -9.0e-07, 0."""
    if difference == 0:
        return "0"
    return f"{difference:+.4f}" if abs(difference) >= 5e-5 else f"{difference:+.1e}"


def words(of_metrics):
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
    undefined = {name for name in names if any(metrics.why_undefined(name, of, references) for of in models)}
    of_classes = bool(names) and names[0] not in metrics.REGRESSION
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
            given = [(metrics.count_classes(predictions, references, times),) for predictions in models]
        else:
            drawn = generator.integers(0, rows, (number, rows))
            given = [(predictions[drawn], references[drawn]) for predictions in models]
        with np.errstate(invalid="ignore"):  # a resample of equal values has no correlation
            for name, of_models in scores.items():
                for of_model, of_resamples in zip(given, of_models, strict=True):
                    of_resamples.append(metrics.FORMULAS[name](*of_model))
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
