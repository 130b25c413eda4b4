"""uncertainty.py: intervals that cover what they promise, and numbers of scipy, statsmodels and scikit-learn."""

import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from classifier.evaluation import metrics

# Of a population: the share of positive labels, and how often the model is right about either kind.
POSITIVE, SENSITIVITY, SPECIFICITY = 0.6, 0.85, 0.7
TRUE_ACCURACY = POSITIVE * SENSITIVITY + (1 - POSITIVE) * SPECIFICITY
TRUE_F1 = 2 * POSITIVE * SENSITIVITY / (POSITIVE + POSITIVE * SENSITIVITY + (1 - POSITIVE) * (1 - SPECIFICITY))


def draw(generator, rows):
    """Return (predictions, labels) of rows of the population."""
    labels = (generator.random(rows) < POSITIVE).astype(int)
    is_right = generator.random(rows) < np.where(labels == 1, SENSITIVITY, SPECIFICITY)
    return np.where(is_right, labels, 1 - labels), labels


def test_95_percent_intervals_hold_the_truth_in_95_percent_of_samples():
    covered = {"accuracy": 0, "f1": 0}
    for seed in range(1000):
        of_sample = draw(np.random.default_rng(seed), rows=400)
        found = metrics.intervals(list(covered), *of_sample, resamples=2000)
        for name, truth in (("accuracy", TRUE_ACCURACY), ("f1", TRUE_F1)):
            low, high = found[name]
            covered[name] += low <= truth <= high
    assert all(930 <= number <= 970 for number in covered.values()), covered


def test_95_percent_intervals_of_a_correlation_hold_the_truth():
    covered = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        x, noise = generator.normal(size=(2, 200))
        low, high = metrics.intervals(["pearson"], 0.6 * x + 0.8 * noise, x, resamples=1000)["pearson"]
        covered += low <= 0.6 <= high
    assert 0.92 * 300 <= covered <= 0.98 * 300, covered


def by_scipy(statistic, *columns, seed=0):
    result = stats.bootstrap(
        columns, statistic, paired=True, vectorized=False, n_resamples=2000, method="percentile", rng=seed
    )
    return pytest.approx(list(result.confidence_interval), abs=0.01)


def test_intervals_are_those_of_scipy():
    predictions, labels = draw(np.random.default_rng(0), 500)
    found = metrics.intervals(["accuracy", "f1", "matthews_correlation"], predictions, labels)
    assert found["accuracy"] == by_scipy(lambda p, y: np.mean(p == y), predictions, labels)
    assert found["f1"] == by_scipy(lambda p, y: sklearn_metrics.f1_score(y, p), predictions, labels)
    assert found["matthews_correlation"] == by_scipy(
        lambda p, y: sklearn_metrics.matthews_corrcoef(y, p), predictions, labels
    )


def test_intervals_of_several_labels_and_of_regression_are_those_of_scipy():
    generator = np.random.default_rng(1)
    labels = (generator.random((400, 3)) < [0.5, 0.3, 0.1]).astype(int)
    predictions = np.where(generator.random((400, 3)) < 0.85, labels, 1 - labels)
    rows = np.arange(400)
    found = metrics.intervals(["f1_micro", "f1_macro", "accuracy"], predictions, labels)
    for name, average in (("f1_micro", "micro"), ("f1_macro", "macro")):
        expected = by_scipy(lambda i, a=average: sklearn_metrics.f1_score(labels[i], predictions[i], average=a), rows)
        assert found[name] == expected
    assert found["accuracy"] == by_scipy(lambda i: sklearn_metrics.accuracy_score(labels[i], predictions[i]), rows)
    x = generator.normal(size=400)
    y = x + generator.normal(size=400)
    found = metrics.intervals(["pearson", "spearmanr"], y, x)
    assert found["pearson"] == by_scipy(lambda a, b: stats.pearsonr(a, b).statistic, y, x)
    assert found["spearmanr"] == by_scipy(lambda a, b: stats.spearmanr(a, b).statistic, y, x)


def test_scores_of_resamples_are_those_of_the_rows_drawn():
    """A row that counts twice is a row that is there twice, also where a class has gone missing."""
    generator = np.random.default_rng(2)
    for _ in range(30):
        labels, predictions = generator.integers(0, 4, (2, 12))
        times = generator.multinomial(12, np.full(12, 1 / 12))
        counts = metrics.count_classes(predictions, labels, times[None])
        drawn = np.repeat(np.arange(12), times)
        for name in ("accuracy", "matthews_correlation", "f1_macro", "f1_weighted", "precision_weighted"):
            expected = metrics.compute([name], predictions[drawn], labels[drawn])[name]
            assert metrics.FORMULAS[name](counts) == pytest.approx(expected, abs=1e-12), name


def test_a_difference_is_that_of_the_same_resamples():
    generator = np.random.default_rng(3)
    one, labels = draw(generator, 600)
    other = np.where(generator.random(600) < 0.9, one, 1 - one)
    found = metrics.differences(["accuracy"], one, other, labels)["accuracy"]
    assert found == by_scipy(lambda a, b, y: np.mean(a == y) - np.mean(b == y), one, other, labels)
    # By itself either score varies more than their difference does.
    low, high = metrics.intervals(["accuracy"], one, labels)["accuracy"]
    assert found[1] - found[0] < high - low
    assert metrics.differences(["accuracy", "f1"], one, one, labels) == {"accuracy": [0, 0], "f1": [0, 0]}


@pytest.mark.parametrize("table", [(40, 5, 12, 43), (10, 0, 0, 10), (3, 1, 0, 9), (200, 31, 17, 152)])
def test_mcnemar_is_that_of_statsmodels(table):
    from statsmodels.stats.contingency_tables import mcnemar

    both, only_one, only_other, none = table
    one = np.repeat([True, True, False, False], table)
    other = np.repeat([True, False, True, False], table)
    expected = mcnemar([[both, only_one], [only_other, none]], exact=True).pvalue
    assert metrics.mcnemar(one, other) == (only_one, only_other, pytest.approx(min(expected, 1.0)))


def test_errors_that_all_shift_by_rounding_are_no_difference():
    generator = np.random.default_rng(6)
    labels = generator.normal(size=60)
    predictions = labels + generator.normal(size=60) + 1
    for scale in (1e-3, 1, 1e3):  # labels have a unit of their own
        score = float(np.mean((scale * (predictions - labels)) ** 2))
        for shift, is_shown in ((9e-07, False), (-9e-07, False), (0.01, True), (-0.01, True)):
            ours = scale * (predictions + shift)
            (interval,) = metrics.differences(["mse"], ours, scale * predictions, scale * labels).values()
            assert interval[0] > 0 or interval[1] < 0  # in every resample
            margin = metrics.rounding_margin("mse", float(np.mean((ours - scale * labels) ** 2)), score)
            assert margin == pytest.approx(1e-4 * score, rel=0.02)
            assert metrics.is_beyond_margin(interval, margin) == is_shown


def test_rounding_of_a_score_is_that_of_its_scale():
    for name in set(metrics.DIRECTION) - {"mse"}:
        assert metrics.rounding_margin(name, 0.9, 0.2) == metrics.rounding_margin(name, -0.1, 0.0) == 1e-4
    assert (
        metrics.rounding_margin("mse", 30.0, 20.0) == metrics.rounding_margin("mse", 20.0, 30.0) == pytest.approx(3e-3)
    )
    assert metrics.rounding_margin("mse", 0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ([0.2, 0.3], True),
        ([-0.3, -0.2], True),
        ([0.05, 0.3], False),  # it may be 0.05, and that rounding
        ([-0.3, -0.05], False),
        ([0.1, 0.1], False),
        ([-0.3, 0.3], False),
        ([0, 0], False),
    ],
)
def test_a_difference_is_shown_by_an_interval_beyond_the_margin(interval, expected):
    assert metrics.is_beyond_margin(interval, 0.1) == expected


def test_a_difference_in_words_is_0_only_where_there_is_none():
    differences = (0.0, 9e-07, -9e-07, 4.99e-05, 5e-05, -0.0123, 1.0, 1e-300, float("nan"))
    expected = ["0", "+9.0e-07", "-9.0e-07", "+5.0e-05", "+0.0001", "-0.0123", "+1.0000", "+1.0e-300", "+nan"]
    assert [metrics.format_difference(difference) for difference in differences] == expected


def test_what_has_no_interval():
    assert metrics.intervals(["accuracy"], np.array([1]), np.array([1])) == {"accuracy": None}  # one row
    assert metrics.intervals(["f1", "accuracy"], np.zeros(9, int), np.zeros(9, int)) == {
        "f1": None,  # undefined
        "accuracy": [1.0, 1.0],
    }
    constant = metrics.intervals(["pearson", "mse"], np.full(5, 0.5), np.arange(5.0))
    assert constant["pearson"] is None and constant["mse"][0] < constant["mse"][1]
    nan = np.array([0.1, np.nan, 0.3])
    assert metrics.intervals(["pearson"], nan, np.arange(3.0)) == {"pearson": None}
    assert metrics.intervals([], np.zeros(3, int), np.zeros(3, int)) == {}


def test_intervals_are_the_same_each_time():
    of_sample = draw(np.random.default_rng(5), 100)
    assert metrics.intervals(["f1"], *of_sample) == metrics.intervals(["f1"], *of_sample)


def test_100_000_rows_take_seconds():
    predictions, labels = draw(np.random.default_rng(0), 100_000)
    started = time.process_time()
    metrics.intervals(list(metrics.CLASSIFICATION), predictions, labels)
    assert time.process_time() - started < 20
