"""intervals.py against scipy and simulated samples, of which benchmarks/coverage.py has more."""

import time

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sklearn_metrics

from classifier.evaluation import intervals, metrics

# Of a population: the share of positive labels, and how often the model is right about either kind.
POSITIVE, SENSITIVITY, SPECIFICITY = 0.6, 0.85, 0.7
TRUE_ACCURACY = POSITIVE * SENSITIVITY + (1 - POSITIVE) * SPECIFICITY
TRUE_F1 = 2 * POSITIVE * SENSITIVITY / (POSITIVE + POSITIVE * SENSITIVITY + (1 - POSITIVE) * (1 - SPECIFICITY))
CLASSES = ["accuracy", "f1_macro", "f1_weighted", "precision_weighted", "matthews_correlation"]


def draw(generator, rows):
    """Return (predictions, labels) of rows of the population."""
    labels = (generator.random(rows) < POSITIVE).astype(int)
    is_right = generator.random(rows) < np.where(labels == 1, SENSITIVITY, SPECIFICITY)
    return np.where(is_right, labels, 1 - labels), labels


# --------------------------------------------------------------------------------------------------- of a score


@pytest.mark.parametrize("rows", [20, 50, 400])
def test_95_percent_intervals_hold_the_truth_in_95_percent_of_samples(rows):
    covered = {"accuracy": 0, "f1": 0}
    for seed in range(1000):
        result = intervals.score_intervals(list(covered), *draw(np.random.default_rng(seed), rows))
        for name, truth in (("accuracy", TRUE_ACCURACY), ("f1", TRUE_F1)):
            low, high = result[name]
            covered[name] += low <= truth <= high
    assert all(930 <= number <= 990 for number in covered.values()), covered


@pytest.mark.parametrize("rows", [20, 50])
@pytest.mark.parametrize("ratio", [1, 9])
def test_intervals_of_a_model_that_is_hardly_wrong_hold_the_truth(rows, ratio):
    """Where the percentile bootstrap holds it in two of three samples: many have no error at all."""
    share = ratio / (1 + ratio)
    truth = sklearn_metrics.f1_score([0, 0, 1, 1], [0, 1, 0, 1], average="macro", sample_weight=[
        0.95 * share, 0.05 * share, 0.05 * (1 - share), 0.95 * (1 - share)
    ])  # fmt: skip
    covered, given = {"accuracy": 0, "f1_macro": 0}, {"accuracy": 0, "f1_macro": 0}
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        labels = (generator.random(rows) > share).astype(int)
        predictions = np.where(generator.random(rows) < 0.95, labels, 1 - labels)
        result = intervals.score_intervals(list(covered), predictions, labels)
        for name, true in (("accuracy", 0.95), ("f1_macro", truth)):
            if result[name]:
                low, high = result[name]
                given[name] += 1
                covered[name] += low <= true <= high
    assert given["accuracy"] == 1000
    assert all(covered[name] >= 0.93 * given[name] for name in covered), (covered, given)


def test_the_interval_of_accuracy_is_the_exact_binomial_one():
    for right, rows in ((0, 7), (3, 10), (6, 6), (190, 200), (2, 2)):
        labels = np.arange(rows) % 2
        predictions = np.where(np.arange(rows) < right, labels, 1 - labels)
        expected = stats.binomtest(right, rows).proportion_ci(method="exact")
        result = intervals.score_intervals(["accuracy"], predictions, labels)["accuracy"]
        assert result == pytest.approx([expected.low, expected.high], abs=1e-4), (right, rows)
    several = intervals.score_intervals(["accuracy"], np.eye(3, dtype=int), np.eye(3, dtype=int))["accuracy"]
    assert several == pytest.approx([0.025 ** (1 / 3), 1])


def test_six_of_six_right_and_rows_that_are_all_alike_have_intervals_with_a_width():
    labels = np.array([0, 1] * 3)
    low, high = intervals.score_intervals(["accuracy"], labels, labels)["accuracy"]
    assert (low, high) == (pytest.approx(0.025 ** (1 / 6)), 1)  # 0.54: what 6 of 6 right exclude at 2.5 %
    for predictions, labels in ((np.ones(9, int), np.ones(9, int)), (np.zeros(9, int), np.ones(9, int))):
        for interval in intervals.score_intervals(["accuracy", "f1_weighted"], predictions, labels).values():
            assert 0 <= interval[0] < interval[1] <= 1


@pytest.mark.filterwarnings("error")
def test_every_interval_has_a_width_and_holds_its_score():
    """Few rows, models that are always or never right, classes that are never predicted or not there."""
    generator = np.random.default_rng(0)
    for number in range(600):
        rows, classes = generator.integers(2, 40), generator.integers(1, 4)
        labels = generator.integers(0, classes, rows)
        predictions = np.where(generator.random(rows) < generator.choice([0, 0.5, 0.9, 1]), labels, 0)
        if number % 10 == 0 and classes == 2:
            predictions = 1 - labels
        names = CLASSES + (["f1"] if classes < 3 and predictions.max() < 2 else [])
        scores = metrics.compute_metrics(names, predictions, labels, warns=False) if number % 10 == 0 else {}
        for name, interval in intervals.score_intervals(names, predictions, labels).items():
            if interval:
                low, high = interval
                assert low < high, (name, predictions, labels)
                assert low <= scores.get(name, low) <= high, (name, predictions, labels)


def score(name, predictions, labels):
    """Return a score by the formulas, which test_metrics.py holds against scikit-learn: compute_metrics is slow."""
    if name in metrics.REGRESSION:
        return metrics.FORMULAS[name](predictions, labels)
    return metrics.FORMULAS[name](metrics.count_classes(predictions, labels))


def bootstrap(statistic, *columns):
    result = stats.bootstrap(
        columns, statistic, paired=True, vectorized=False, n_resamples=600, method="percentile", rng=0
    )
    return list(result.confidence_interval)


@pytest.mark.slow
def test_with_many_rows_they_are_those_of_the_bootstrap():
    """Which is right there, too."""
    generator = np.random.default_rng(0)
    predictions, labels = draw(generator, 2000)
    rows = np.arange(2000)
    tags = (generator.random((2000, 3)) < [0.5, 0.3, 0.1]).astype(int)
    predicted_tags = np.where(generator.random((2000, 3)) < 0.85, tags, 1 - tags)
    x = generator.normal(size=2000)
    y = x + generator.normal(size=2000)
    by_scikit_learn = {
        "f1": lambda p, t: sklearn_metrics.f1_score(t, p),
        "f1_macro": lambda p, t: sklearn_metrics.f1_score(t, p, average="macro"),
        "f1_micro": lambda p, t: sklearn_metrics.f1_score(t, p, average="micro"),
        "f1_weighted": lambda p, t: sklearn_metrics.f1_score(t, p, average="weighted"),
        "precision_weighted": lambda p, t: sklearn_metrics.precision_score(t, p, average="weighted"),
        "matthews_correlation": lambda p, t: sklearn_metrics.matthews_corrcoef(t, p),
        "pearson": lambda p, t: stats.pearsonr(p, t).statistic,
        "spearmanr": lambda p, t: stats.spearmanr(p, t).statistic,
        "mse": lambda p, t: sklearn_metrics.mean_squared_error(t, p),
    }
    for names, columns in (
        (["f1", *CLASSES[1:]], (predictions, labels)),
        (["f1_micro", "f1_macro"], (predicted_tags, tags)),
        (["pearson", "spearmanr", "mse"], (y, x)),
    ):
        for name, interval in intervals.score_intervals(names, *columns).items():
            expected = bootstrap(lambda i, c=columns, n=name: by_scikit_learn[n](c[0][i], c[1][i]), rows)
            width = expected[1] - expected[0]
            assert interval == pytest.approx(expected, abs=0.15 * width), name


def test_the_jackknife_is_that_of_leaving_each_row_out():
    generator = np.random.default_rng(1)
    x = generator.normal(size=30)
    y = 2 * x + generator.normal(size=30) + 5
    for name in ("pearson", "mse"):
        score, without = intervals._leave_one_out(name, x, y)
        assert score == pytest.approx(metrics.compute_metrics([name], x, y)[name])
        expected = [metrics.FORMULAS[name](np.delete(x, row), np.delete(y, row)) for row in range(30)]
        assert without == pytest.approx(expected)


@pytest.mark.parametrize("ties", [False, True])
def test_a_rank_correlation_has_the_variance_that_it_has(ties):
    scores, variances = [], []
    for seed in range(600):
        generator = np.random.default_rng(seed)
        x = generator.integers(1, 6, 80).astype(float) if ties else generator.normal(size=80)
        y = x + generator.normal(size=80)
        score, without = intervals._leave_one_out("spearmanr", y, x)
        assert score == pytest.approx(stats.spearmanr(x, y).statistic)
        scores.append(score)
        variances.append(intervals._jackknife_variance(without))
    assert np.mean(variances) == pytest.approx(np.var(scores), rel=0.15)


def test_what_has_no_interval_and_why():
    def why(name, predictions, labels):
        columns = np.asarray(predictions), np.asarray(labels)
        reason = intervals.missing_intervals([name], *columns).get(name, "")
        assert (intervals.score_intervals([name], *columns)[name] is None) == bool(reason)
        return reason

    assert why("accuracy", [1], [1]) == "one row"
    assert why("f1", [0] * 9, [0] * 9) == "class 1 is neither predicted nor present, 0/0"
    assert why("f1", [0, 1] * 4, [0, 1] * 4) == "the positive class has 4 rows, 5 are needed"
    assert why("f1", [0, 1] * 5, [0, 1] * 5) == ""
    assert why("f1_macro", [0] * 20, [0] * 19 + [1]) == "a class has 1 row, 5 are needed"
    assert why("precision_weighted", [0, 1] * 19, [0, 1] * 19) == "a class has 19 rows, 20 are needed"
    assert why("matthews_correlation", [0, 1, 1] * 9, [1] * 27) == "one class only"
    assert why("f1_weighted", [0] * 20, [0] * 19 + [1]) == why("accuracy", [0, 0], [0, 0]) == ""
    assert why("f1_micro", [[1, 0]] * 4, [[1, 0]] * 4) == "all labels together have 4 rows, 5 are needed"
    assert why("f1_macro", [[1, 0]] * 9, [[1, 0]] * 9) == "a class has 0 rows, 5 are needed"
    assert why("pearson", np.full(6, 0.5), np.arange(6.0)) == "all predictions are equal"
    assert why("mse", np.full(6, 0.5), np.arange(6.0)) == ""
    assert why("mse", np.arange(6.0) + 1, np.arange(6.0)) == why("spearmanr", np.arange(6.0) ** 2, np.arange(6.0))
    assert why("pearson", np.arange(4.0) ** 2, np.arange(4.0)) == "4 rows, 5 are needed"
    assert "NaN" in why("pearson", [0.1, np.nan, 0.3], np.arange(3.0))
    assert intervals.score_intervals([], np.zeros(3, int), np.zeros(3, int)) == {}
    text = intervals.format_intervals({"f1": [0.5, 0.75], "accuracy": None, "mse": None}, {"accuracy": "one row"})
    assert text == "f1 0.5000 to 0.7500, accuracy none (one row), mse none"


def test_100_000_rows_and_500_classes_take_seconds():
    predictions, labels = draw(np.random.default_rng(0), 100_000)
    started = time.process_time()
    intervals.score_intervals(list(metrics.CLASSIFICATION), predictions, labels)
    labels = np.arange(100_000) % 500
    intervals.score_intervals(CLASSES, np.where(labels % 7 == 0, 3, labels), labels)
    assert time.process_time() - started < 20


# ---------------------------------------------------------------------------------------------- of two models


def test_a_difference_is_that_of_two_models_on_the_same_rows():
    generator = np.random.default_rng(3)
    first, labels = draw(generator, 1500)
    second = np.where(generator.random(1500) < 0.9, first, 1 - first)
    x = generator.normal(size=1500)
    y, z = x + generator.normal(size=1500), x + 1.2 * generator.normal(size=1500)
    rows = np.arange(1500)
    for names, columns in ((["accuracy", "f1_macro"], (first, second, labels)), (["pearson", "mse"], (y, z, x))):
        for name, interval in intervals.difference_intervals(names, *columns).items():

            def difference(drawn, columns=columns, formula=name):
                here, there, truth = (column[drawn] for column in columns)
                return score(formula, here, truth) - score(formula, there, truth)

            expected = bootstrap(difference, rows) if name != "f1_macro" else None
            if expected:
                assert interval == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0])), name
    # By itself either score varies more than their difference does.
    low, high = intervals.difference_intervals(["accuracy"], first, second, labels)["accuracy"]
    alone = intervals.score_intervals(["accuracy"], first, labels)["accuracy"]
    assert 0 < high - low < alone[1] - alone[0]


def test_a_difference_of_three_rows_has_a_width_and_no_more_than_there_is():
    labels = np.array([0, 1, 1])
    low, high = intervals.difference_intervals(["accuracy"], labels, 1 - labels, labels)["accuracy"]
    assert 0 < low < 0.5 and high == 1
    assert intervals.difference_intervals(["accuracy"], labels[:1], labels[:1], labels[:1]) == {"accuracy": None}


def test_a_randomisation_test_is_that_of_scipy_and_for_accuracy_mcnemars():
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 2, 60)
    first = np.where(generator.random(60) < 0.9, labels, 1 - labels)
    second = np.where(generator.random(60) < 0.75, labels, 1 - labels)
    *_, expected = intervals.mcnemar(first == labels, second == labels)
    assert intervals.randomisation_test("accuracy", first, second, labels) == pytest.approx(expected, abs=0.01)
    x = generator.normal(size=40)
    y, z = x + generator.normal(size=40), x + 1.5 * generator.normal(size=40)
    for name, columns in (("f1_macro", (first, second, labels)), ("mse", (y, z, x)), ("spearmanr", (y, z, x))):
        here, there, truth = columns

        def difference(one, other, formula=name, truth=truth):
            return score(formula, one, truth) - score(formula, other, truth)

        expected = stats.permutation_test(
            (here, there), difference, permutation_type="samples", vectorized=False, n_resamples=2000, rng=0
        ).pvalue
        assert intervals.randomisation_test(name, here, there, truth) == pytest.approx(expected, abs=0.04), name
    assert intervals.randomisation_test("accuracy", first, first, labels) == 1
    tags, labels = generator.integers(0, 2, (2, 50, 3))
    assert intervals.randomisation_test("f1_micro", labels, tags, labels) < 0.001


def test_a_difference_that_can_be_shown_is_shown_four_times_in_five():
    """Of two models that get each row right independently of each other."""
    rows, shown, needed = 300, 0, []
    for seed in range(400):
        generator = np.random.default_rng(seed)
        labels = np.zeros(rows, int)
        first, second = ((generator.random(rows) > share).astype(int) for share in (0.85, 0.763))
        interval = intervals.difference_intervals(["accuracy"], first, second, labels)["accuracy"]
        needed.append(intervals.detectable_difference(interval))
        shown += interval[0] > 0
    assert np.mean(needed) == pytest.approx(0.087, abs=0.006)
    assert 0.7 * 400 < shown < 0.87 * 400


@pytest.mark.parametrize("table", [(40, 5, 12, 43), (10, 0, 0, 10), (3, 1, 0, 9), (200, 31, 17, 152)])
def test_mcnemar_is_that_of_statsmodels(table):
    from statsmodels.stats.contingency_tables import mcnemar

    both, only_one, only_other, none = table
    first = np.repeat([True, True, False, False], table)
    second = np.repeat([True, False, True, False], table)
    expected = mcnemar([[both, only_one], [only_other, none]], exact=True).pvalue
    assert intervals.mcnemar(first, second) == (only_one, only_other, pytest.approx(min(expected, 1.0)))


def test_errors_that_all_shift_by_rounding_are_no_difference():
    generator = np.random.default_rng(6)
    labels = generator.normal(size=60)
    predictions = labels + generator.normal(size=60) + 1
    for scale in (1e-3, 1, 1e3):  # labels have a unit of their own
        score = float(np.mean((scale * (predictions - labels)) ** 2))
        for shift, is_shown in ((9e-07, False), (-9e-07, False), (0.01, True), (-0.01, True)):
            ours = scale * (predictions + shift)
            (interval,) = intervals.difference_intervals(["mse"], ours, scale * predictions, scale * labels).values()
            assert interval[0] > 0 or interval[1] < 0  # since all rows shift alike
            margin = intervals.rounding_margin("mse", float(np.mean((ours - scale * labels) ** 2)), score)
            assert margin == pytest.approx(1e-4 * score, rel=0.02)
            assert intervals.is_beyond_margin(interval, margin) == is_shown


def test_rounding_of_a_score_is_that_of_its_scale():
    for name in set(metrics.DIRECTION) - {"mse"}:
        assert intervals.rounding_margin(name, 0.9, 0.2) == intervals.rounding_margin(name, -0.1, 0.0) == 1e-4
    assert (
        intervals.rounding_margin("mse", 30.0, 20.0)
        == intervals.rounding_margin("mse", 20.0, 30.0)
        == pytest.approx(3e-3)
    )
    assert intervals.rounding_margin("mse", 0.0, 0.0) == 0


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
    assert intervals.is_beyond_margin(interval, 0.1) == expected


def test_a_difference_in_words_is_0_only_where_there_is_none():
    differences = (0.0, 9e-07, -9e-07, 4.99e-05, 5e-05, -0.0123, 1.0, 1e-300, float("nan"))
    expected = ["0", "+9.0e-07", "-9.0e-07", "+5.0e-05", "+0.0001", "-0.0123", "+1.0000", "+1.0e-300", "+nan"]
    assert [intervals.format_difference(difference) for difference in differences] == expected
