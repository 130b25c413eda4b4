"""Selection: thresholds of few and of many rows, and scores corrected for having been chosen, against the truth."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

from classifier.data.labels import predictions_from_logits, probabilities
from classifier.data.tasks import Task
from classifier.evaluation import intervals, metrics
from classifier.evaluation.selection import (
    corrected_scores,
    fit_min_probabilities,
    fit_temperature,
    fit_thresholds,
    min_probability,
)

TAGS = Task("tags", text=["text"], labels=["x", "y", "z"], problem="multi_label", metrics=["f1_macro", "accuracy"])
CLASSES = Task("classes", text=["text"], labels=["a", "b"], metrics=["accuracy", "f1_macro"])
NUMBERS = Task("numbers", text=["text"], labels="regression", metrics=["mse", "pearson"])


def to_logits(probabilities):
    return np.log(probabilities / (1 - probabilities))


# -------------------------------------------------------------------------------------------- probabilities that fit


def draw_classes(generator, rows, scale):
    """Draw two classes and logits whose true temperature is about scale / 2.2: the log ratio of two normals."""
    labels = generator.integers(0, 2, rows)
    evidence = generator.standard_normal((rows, 2))
    evidence[np.arange(rows), labels] += 2.2
    return scale * evidence, labels


@pytest.mark.parametrize("scale", [1.1, 2.2, 4.4])
def test_with_many_rows_the_temperature_is_the_true_one_and_labels_stay(scale):
    logits, labels = draw_classes(np.random.default_rng(0), 20_000, scale)
    task = fit_temperature(CLASSES, logits, labels)
    assert task.temperature == pytest.approx(scale / 2.2, rel=0.05)
    assert (predictions_from_logits(task, logits) == predictions_from_logits(CLASSES, logits)).all()
    assert log_loss(labels, probabilities(task, logits)) < log_loss(labels, probabilities(CLASSES, logits)) + 1e-4
    several = fit_temperature(TAGS, np.tile(logits[:, 1:] - logits[:, :1], 3), np.tile(labels[:, None], 3))
    assert several.temperature == pytest.approx(scale / 2.2, rel=0.05)  # a logit is the difference of two


def test_few_rows_that_are_all_right_do_not_make_it_certain():
    logits, labels = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), np.array([0, 1, 0])
    assert 0.5 < fit_temperature(CLASSES, logits, labels).temperature < 1


@pytest.mark.parametrize("rows", [100, 1000])
def test_a_promised_accuracy_is_kept_in_at_least_95_of_100_samples(rows):
    generator, kept, answered = np.random.default_rng(0), [], []
    fresh_logits, fresh_labels = draw_classes(generator, 100_000, 2.2)
    confidence = probabilities(CLASSES, fresh_logits).max(axis=1)
    is_right = fresh_logits.argmax(axis=1) == fresh_labels
    assert is_right.mean() < 0.95
    for _ in range(200):
        least = fit_min_probabilities(CLASSES, *draw_classes(generator, rows, 2.2)).min_probabilities
        assert least["0.5"] <= least["0.8"] <= (least["0.95"] or 1) <= (least["0.99"] or 1)
        for target in (0.9, 0.95, 0.99):
            if least[str(target)] is not None:
                kept.append(is_right[confidence >= least[str(target)]].mean() >= target)
        answered.append((confidence >= least["0.9"]).mean() if least["0.9"] else 0)
    assert np.mean(kept) >= 0.95
    assert np.mean(answered) > {100: 0.6, 1000: 0.95}[rows]  # it is no empty promise


def test_what_few_rows_cannot_promise():
    confidence = np.linspace(0.5, 1, 58)
    assert min_probability(confidence, np.ones(58, bool), 0.95) is None  # 0.95 ** 58 is above 5 %
    assert min_probability(np.linspace(0.5, 1, 200), np.zeros(200, bool), 0.5) is None
    equal = np.full(200, 0.7)  # no cut among equals: half of them are right
    assert min_probability(equal, np.arange(200) % 2 == 0, 0.8) is None
    assert min_probability(equal, np.arange(200) % 10 > 0, 0.8) == 0.7


# ---------------------------------------------------------------------------------------------------------- thresholds


def draw_tags(generator, rows, shares):
    labels = (generator.random((rows, len(shares))) < shares).astype(int)
    return np.clip(0.3 * labels + generator.uniform(0, 0.6, labels.shape), 0.01, 0.99), labels


def test_with_many_rows_a_threshold_is_that_of_the_highest_f1():
    probabilities, labels = draw_tags(np.random.default_rng(0), 20_000, [0.5, 0.3, 0.2])
    thresholds = fit_thresholds(TAGS, to_logits(probabilities), labels).thresholds
    for column, threshold in enumerate(thresholds):
        score = f1_score(labels[:, column], probabilities[:, column] > threshold)
        cuts = np.linspace(0.01, 0.99, 197)
        best = max(f1_score(labels[:, column], probabilities[:, column] > cut) for cut in cuts)
        assert score == pytest.approx(best, abs=0.003)


def test_a_label_of_few_rows_has_about_the_threshold_that_all_share():
    generator = np.random.default_rng(0)
    probabilities, labels = draw_tags(generator, 2_000, [0.5, 0.5, 0.5])
    labels[:, 2], labels[7, 2] = 0, 1  # one row
    probabilities[:, 2], probabilities[7, 2] = generator.uniform(0, 0.05, 2_000), 0.06
    shared_by_two = fit_thresholds(TAGS, to_logits(probabilities), labels).thresholds
    own = 0.055  # above which its one row alone is
    assert abs(shared_by_two[2] - own) > 0.1 and shared_by_two[2] == pytest.approx(np.mean(shared_by_two[:2]), abs=0.06)
    labels[7, 2] = 0  # none: exactly the shared one, of those that were tried
    thresholds = fit_thresholds(TAGS, to_logits(probabilities), labels).thresholds
    tried = 1 / (1 + np.exp(-np.linspace(-7, 7, 141)))
    assert (
        np.abs(tried - thresholds[2]).min() < 1e-9 or np.abs((tried[1:] + tried[:-1]) / 2 - thresholds[2]).min() < 1e-3
    )


@pytest.mark.parametrize("labels", [np.zeros((5, 3), int), np.ones((5, 3), int)])
def test_labels_that_no_row_or_every_row_has(labels):
    probabilities = np.random.default_rng(0).uniform(0.1, 0.9, (5, 3))
    thresholds = fit_thresholds(TAGS, to_logits(probabilities), labels).thresholds
    assert len(thresholds) == 3 and all(0 < threshold < 1 for threshold in thresholds)


def test_on_fresh_rows_thresholds_are_not_worse_than_one_half():
    """A timid model of rare labels, where 0.5 finds nothing, and a calibrated one: means over 30 samples."""
    generator, shares = np.random.default_rng(0), np.array([0.05, 0.1, 0.3])

    def draw(rows, scale, shift):
        labels = (generator.random((rows, 3)) < shares).astype(int)
        evidence = 2 * (generator.standard_normal((rows, 3)) + 2 * labels) - 2
        return scale * (np.log(shares / (1 - shares)) + evidence) + shift, labels

    for scale, shift, least in ((0.4, -1.0, 0.2), (1.0, 0.0, -0.005)):
        fresh_logits, fresh_labels = draw(20_000, scale, shift)
        gains = []
        for _ in range(30):
            task = fit_thresholds(TAGS, *draw(100, scale, shift))
            scores = [
                f1_score(fresh_labels, predictions_from_logits(each, fresh_logits), average="macro")
                for each in (task, TAGS)
            ]
            gains.append(scores[0] - scores[1])
        assert np.mean(gains) > least


# ---------------------------------------------------------------------------------------------------------- correction


def draw_equal(generator, candidates, rows, accuracy=0.8):
    """Draw candidates that are all right in 80 of 100 rows, and half of the time for the same reason."""
    labels = generator.integers(0, 2, rows)
    common, own = generator.random((1, rows)), generator.random((candidates, rows))
    is_right = np.where(generator.random((candidates, rows)) < 0.5, common, own) < accuracy
    return np.where(is_right, labels, 1 - labels), labels


def test_the_best_of_equal_candidates_is_worth_what_each_is():
    generator, found, corrected, held = np.random.default_rng(0), [], [], []
    for _ in range(40):
        candidates, labels = draw_equal(generator, 10, 100)
        scores = [accuracy_score(labels, candidate) for candidate in candidates]
        chosen = int(np.argmax(scores))
        worth, bounds = corrected_scores(CLASSES, candidates, labels, chosen)
        found.append(scores[chosen])
        corrected.append(worth["accuracy"])
        held.append(bounds["accuracy"][0] <= 0.8 <= bounds["accuracy"][1])
    assert np.mean(found) > 0.83
    assert np.mean(corrected) == pytest.approx(0.8, abs=0.012)
    assert np.mean(held) >= 0.93


def test_where_one_is_clearly_the_best_there_is_little_to_correct():
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 400)
    candidates = np.stack([np.where(generator.random(400) < right, labels, 1 - labels) for right in (0.6, 0.7, 0.95)])
    worth, _ = corrected_scores(CLASSES, candidates, labels, 2)
    assert worth["accuracy"] == pytest.approx(accuracy_score(labels, candidates[2]), abs=1e-3)


def test_without_a_choice_nothing_is_corrected():
    candidates, labels = draw_equal(np.random.default_rng(0), 1, 60)
    worth, bounds = corrected_scores(CLASSES, candidates, labels, 0)
    names = CLASSES.metrics
    assert worth == metrics.compute_metrics(names, candidates[0], labels)
    assert bounds == intervals.score_intervals(names, candidates[0], labels)


@pytest.mark.slow
def test_fitted_thresholds_are_corrected_for():
    generator, shares = np.random.default_rng(0), np.array([0.1, 0.2, 0.4])
    distance = 1.5

    def draw(rows):
        labels = (generator.random((rows, 3)) < shares).astype(int)
        return distance * (generator.standard_normal((rows, 3)) + distance * labels) - 2, labels

    fresh_logits, fresh_labels = draw(40_000)
    found, corrected, true = [], [], []
    for _ in range(25):
        logits, labels = draw(150)
        task = fit_thresholds(TAGS, logits, labels)
        found.append(f1_score(labels, predictions_from_logits(task, logits), average="macro"))
        true.append(f1_score(fresh_labels, predictions_from_logits(task, fresh_logits), average="macro"))
        corrected.append(corrected_scores(task, [logits], labels, 0)[0]["f1_macro"])
    too_high = np.mean(found) - np.mean(true)
    assert too_high > 0.02
    assert abs(np.mean(corrected) - np.mean(true)) < min(0.012, too_high / 2)


def test_the_smallest_error_of_many_is_too_small():
    generator, found, corrected = np.random.default_rng(0), [], []
    for _ in range(20):
        labels = generator.standard_normal(80).astype(np.float32)
        candidates = labels + generator.standard_normal((10, 80)).astype(np.float32)
        errors = ((candidates - labels) ** 2).mean(axis=1)
        worth, bounds = corrected_scores(NUMBERS, candidates, labels, int(errors.argmin()))
        found.append(errors.min())
        corrected.append(worth["mse"])
        assert bounds["mse"][0] < worth["mse"] < bounds["mse"][1]
        assert bounds["pearson"][0] < worth["pearson"] < bounds["pearson"][1]
    assert np.mean(found) < 0.85
    assert np.mean(corrected) == pytest.approx(1.0, abs=0.06)


def test_a_choice_among_candidates_without_a_score():
    labels = np.arange(20, dtype=np.float32)
    constant = np.zeros(20, np.float32)
    task = Task("numbers", labels="regression", metrics=["pearson", "mse"])
    worth, bounds = corrected_scores(task, [constant, constant], labels, 0)
    assert worth["pearson"] is None and bounds["pearson"] is None
    worth, _ = corrected_scores(task, [constant, labels + np.sin(labels)], labels, 1)
    assert worth["pearson"] == pytest.approx(np.corrcoef(labels, labels + np.sin(labels))[0, 1], abs=1e-3)


def test_the_same_candidates_give_the_same_numbers():
    candidates, labels = draw_equal(np.random.default_rng(0), 5, 50)
    assert corrected_scores(CLASSES, candidates, labels, 2) == corrected_scores(CLASSES, candidates.copy(), labels, 2)
