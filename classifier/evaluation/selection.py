"""Selection: what validation rows choose, and what scores are worth on the very rows that chose something.

    fit_temperature(task, logits, labels)                -> a task whose probabilities fit
    fit_min_probabilities(task, logits, labels)          -> a task that knows above which of them it is right
    fit_thresholds(task, logits, labels)                 -> a task with a threshold for each label
    corrected_scores(task, candidates, labels, chosen)   -> ({"f1": 0.8312}, {"f1": [0.7911, 0.8650]})

The best of several scores is too high on the rows that it was chosen by. A bootstrap repeats the choice many times.
benchmarks/selection.py simulates how close the corrected scores come to the true ones.
"""

from dataclasses import replace

import numpy as np

from classifier.data.labels import predictions_from_logits, probabilities
from classifier.evaluation import intervals, metrics
from classifier.evaluation.metrics import DIRECTION, FORMULAS, REGRESSION

DRAWS, DRAWS_OF_THRESHOLDS = 500, 200
NUMBERS_AT_A_TIME = 10**7
ROWS_OF_SHARED = 20  # as many as the threshold that all labels share counts
SHARED_LOGITS = np.linspace(-7, 7, 141)  # of the probabilities tried for it, among them 0.5

# -------------------------------------------------------------------------------------------- probabilities that fit

SPREAD_OF_LOG_TEMPERATURE = 0.5  # expected of models: with few rows a temperature stays near 1
TARGETS = [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995]  # accuracies


def fit_temperature(task, logits, labels):
    """Return the task with the temperature with which its probabilities fit best (Guo et al. 2017, arXiv:1706.04599).

    It minimises the log loss; no prediction changes. Few rows, all of them right, would make every prediction certain,
    so that the logarithm of the temperature has a normal prior.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    logits = logits.astype(np.float64)

    def loss(log_temperature):
        scaled = logits / np.exp(log_temperature)
        if task.is_multi_label:
            losses = (np.logaddexp(0, scaled) - labels * scaled).mean(axis=1)
        else:
            losses = logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]
        return losses.sum() + (log_temperature / SPREAD_OF_LOG_TEMPERATURE) ** 2 / 2

    best = minimize_scalar(loss, bounds=(-3, 3), method="bounded").x
    return replace(task, temperature=float(np.exp(best)))


def fit_min_probabilities(task, logits, labels):
    """Return the task with the least probability for each of several accuracies: labels above it are right as often.

    task: of one label for each text. None stands for an accuracy that these rows cannot promise.
    """
    chances = probabilities(task, logits)
    found = (chances.max(axis=1), chances.argmax(axis=1) == labels)
    return replace(task, min_probabilities={str(target): min_probability(*found, target) for target in TARGETS})


def min_probability(confidence, is_right, target):
    """Return the least probability above which at least a target share of predictions is right; None if there is none.

    confidence, is_right: (rows,). That holds with a probability of 95 % for the choice among several cuts: each is
    tested by the exact binomial test, and they share the 5 % (Angelopoulos et al. 2021, arXiv:2110.01052).
    """
    from scipy.stats import binom

    order, level = np.argsort(-confidence, kind="stable"), 1 - intervals.LEVEL
    confidence, is_right = confidence[order], is_right[order]
    ends = np.append(np.flatnonzero(confidence[1:] < confidence[:-1]) + 1, len(confidence))  # rows above a cut
    fewest = np.log(level) / np.log(target)  # rows, all of them right, that show it
    cuts = len(confidence) * 0.85 ** np.arange(200)
    cuts = cuts[cuts >= fewest]
    for cut in cuts:
        rows = int(ends[ends <= cut].max(initial=0))
        if rows and binom.sf(is_right[:rows].sum() - 1, rows, target) <= level / len(cuts):
            return float(confidence[rows - 1])
    return None


# ---------------------------------------------------------------------------------------------------------- thresholds


def fit_thresholds(task, logits, labels):
    """Return a multi-label task with thresholds: for each label the probability above which it applies.

    A label's own best threshold, by F1, counts as many rows as have the label; the best that all labels share, by the
    mean of F1, counts 20. So a label of few rows has almost the shared one. Averaged are the thresholds' logits.
    """
    return replace(task, thresholds=_threshold_fitter(probabilities(task, logits), labels)().tolist())


def _threshold_fitter(scores, labels):
    """Return a function of how often each row was drawn, (rows,) or 1, that returns thresholds (labels,).

    scores, labels: (rows, labels), probabilities and 0 or 1. They are sorted once for all draws.
    """
    order = np.argsort(-scores, axis=0, kind="stable")
    scores, labels = (np.take_along_axis(side, order, axis=0) for side in (scores, labels))
    below = np.append(scores[1:], np.zeros_like(scores[:1]), axis=0)
    is_cut, own_cuts = below < scores, (scores + below) / 2
    shared_cuts = 1 / (1 + np.exp(-SHARED_LOGITS))
    above_shared = np.stack([np.searchsorted(-column, -shared_cuts) for column in scores.T], axis=1)  # (cuts, labels)

    def fit(times=1):
        times = np.broadcast_to(times, len(order))[order]
        hits, predicted = np.cumsum(times * labels, axis=0), np.cumsum(times, axis=0)
        rows = hits[-1]
        f1 = 2 * hits / np.maximum(predicted + rows, 1)  # of predicting each row and those above it
        best = np.where(is_cut, f1, -1).argmax(axis=0)
        own = _logit(np.take_along_axis(own_cuts, best[None], axis=0)[0])
        f1_of_shared = np.take_along_axis(np.append(np.zeros_like(f1[:1]), f1, axis=0), above_shared, axis=0)
        weights = rows / (rows + ROWS_OF_SHARED)
        mean = f1_of_shared @ weights
        shared = np.median(SHARED_LOGITS[mean == mean.max()])
        return 1 / (1 + np.exp(-(weights * own + (1 - weights) * shared)))

    return fit


def _logit(probability):
    probability = np.clip(probability, 1e-9, 1 - 1e-9)
    return np.log(probability / (1 - probability))


# ---------------------------------------------------------------------------------------------------------- correction


def corrected_scores(task, candidates, labels, chosen):
    """Return ({metric: score}, {metric: [low, high]}) of what was chosen, corrected for the choice.

    candidates: (candidates, rows, ...), the predictions to choose from by the first metric: ids, values, in multi-label
    logits; chosen: the one that was. labels: (rows,) or (rows, labels). In multi-label the chosen one's thresholds were
    fitted to the same rows. None stands for a score that is undefined, and for no interval.

    Rows are drawn, the best candidate on them is chosen, and scored on the rows left out, of all draws together
    (Tsamardinos et al. 2018, doi:10.1007/s10994-018-5714-4). Thresholds are fitted to drawn rows: what their score on
    these exceeds that on all rows is subtracted (Efron and Gong 1983, doi:10.1080/00031305.1983.10483087). Intervals
    are those of the score, moved, and wider by how much the score varies with the choice.
    """
    generator = np.random.default_rng(0)
    decided = (
        np.stack([predictions_from_logits(replace(task, thresholds=None), candidate) for candidate in candidates])
        if task.is_multi_label
        else np.asarray(candidates)
    )
    final = predictions_from_logits(task, candidates[chosen]) if task.is_multi_label else decided[chosen]
    scores = metrics.compute_metrics(task.metrics, final, labels, warns=False)
    excess, variances = _excess_of_choice(task.metrics, decided, labels, chosen, generator)
    if task.is_multi_label:
        excess_of_fit, variances_of_fit = _excess_of_thresholds(task, candidates[chosen], labels, generator)
        excess = {name: excess[name] + excess_of_fit[name] for name in task.metrics}
        variances = {name: variances[name] + variances_of_fit[name] for name in task.metrics}
    corrected = {name: _within_limits(name, score, excess[name]) for name, score in scores.items()}
    bounds = intervals.score_intervals(task.metrics, final, labels, corrected, variances)
    return corrected, bounds


def _within_limits(name, score, excess):
    """Return a score less its excess, which is never negative, in mse never positive: choosing makes no score worse."""
    if score is None or not np.isfinite(excess):
        return None
    excess = min(excess, 0) if DIRECTION[name] == "min" else max(excess, 0)
    return float(np.clip(score - excess, *metrics.limits(name)))


def _excess_of_choice(names, candidates, labels, chosen, generator):
    """Return (how much too high each score is for having been chosen, variance of the true score by the choice).

    candidates: (candidates, rows, ...), predictions. Both are dicts by metric.
    """
    if len(candidates) == 1:
        return dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    number, rows = len(candidates), len(labels)
    left_out, choices = np.zeros((number, rows)), []
    at_a_time = max(1, NUMBERS_AT_A_TIME // rows)
    for first in range(0, DRAWS, at_a_time):
        drawn = generator.integers(0, rows, (min(at_a_time, DRAWS - first), rows))
        times = np.stack([np.bincount(draw, minlength=rows) for draw in drawn])
        drawn_scores = np.stack([_scores_of_draws(names[0], each, labels, drawn, times) for each in candidates])
        worst = np.inf if DIRECTION[names[0]] == "min" else -np.inf
        drawn_scores = np.where(np.isnan(drawn_scores), worst, drawn_scores)
        best = drawn_scores.argmin(axis=0) if DIRECTION[names[0]] == "min" else drawn_scores.argmax(axis=0)
        np.add.at(left_out, best, times == 0)
        choices.append(best)
    counts = np.bincount(np.concatenate(choices), minlength=number) / DRAWS
    excess, variances = {}, {}
    for name in names:
        scores = np.array([_score(name, each, labels) for each in candidates])
        pooled = _score(name, np.concatenate(candidates), np.concatenate([labels] * number), left_out.reshape(-1))
        excess[name] = float(scores[chosen] - pooled)
        is_chosen = (counts > 0) & np.isfinite(scores)
        mean = np.average(scores[is_chosen], weights=counts[is_chosen]) if is_chosen.any() else 0.0
        variances[name] = float((counts * np.where(is_chosen, scores - mean, 0) ** 2).sum())
    return excess, variances


def _excess_of_thresholds(task, logits, labels, generator):
    """Return the same as _excess_of_choice, of thresholds that were fitted to the rows."""
    scores = probabilities(task, logits)
    fit, excesses, scores_of_all = _threshold_fitter(scores, labels), [], []
    for _ in range(DRAWS_OF_THRESHOLDS):
        times = np.bincount(generator.integers(0, len(labels), len(labels)), minlength=len(labels))
        predictions = (scores > fit(times)).astype(int)
        drawn, everything = (metrics.count_classes(predictions, labels, each) for each in (times, None))
        scores_of_all.append([float(FORMULAS[name](everything)) for name in task.metrics])
        excesses.append([float(FORMULAS[name](drawn)) for name in task.metrics])
    excess = np.mean(excesses, axis=0) - np.mean(scores_of_all, axis=0)
    variance = np.var(scores_of_all, axis=0)
    return dict(zip(task.metrics, excess, strict=True)), dict(zip(task.metrics, variance, strict=True))


def _scores_of_draws(name, predictions, labels, drawn, times):
    """Return the score of each draw of rows, (draws,). drawn: (draws, rows), row numbers; times: how often each is."""
    if name in REGRESSION:
        with np.errstate(invalid="ignore"):
            return FORMULAS[name](predictions[drawn], labels[drawn])
    return FORMULAS[name](metrics.count_classes(predictions, labels, times))


def _score(name, predictions, labels, times=None):
    """Return a score of rows that count `times`, once by default; NaN where it is undefined."""
    if name in REGRESSION:
        times = np.ones(len(labels)) if times is None else times
        predictions, labels = (
            np.repeat(np.asarray(side, np.float64), times.astype(int)) for side in (predictions, labels)
        )
        return (
            np.nan if metrics.why_undefined(name, predictions, labels) else float(FORMULAS[name](predictions, labels))
        )
    return float(FORMULAS[name](metrics.count_classes(predictions, labels, times)))
