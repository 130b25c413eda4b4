"""analysis.py against scikit-learn and hand-computed values; predictions by text; what two scores allow to say."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from scipy import stats
from sklearn import metrics as sklearn_metrics

import common
from classifier.data.tasks import Task
from classifier.evaluation import analysis
from classifier.messages import BadInput

LETTERS = Task("letters", text=["text"], labels=["a", "b", "c"], metrics=["accuracy", "f1_macro"])
TWO = Task("two", text=["text"], labels=["no", "yes"], metrics=["f1", "accuracy"])
PAIRS = Task("pairs", text=["first", "second"], labels="regression", metrics=["pearson"])
TAGS = Task("tags", text=["text"], labels=["x", "y", "z"], problem="multi_label", separator=";", metrics=["f1_micro"])
TAGGED = Task("tags", text=["text"], labels=["x", "y"], problem="multi_label", metrics=["f1_micro"])


def make_logits(seed, rows=200):
    """Return (logits, labels) of a model that is right more often than not."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, rows)
    logits = generator.normal(size=(rows, 3)).astype(np.float32)
    logits[np.arange(rows), labels] += 1
    return logits, labels


def test_classes_and_confusion_are_those_of_scikit_learn():
    logits, labels = make_logits(0)
    predictions = logits.argmax(axis=1)
    expected = sklearn_metrics.precision_recall_fscore_support(labels, predictions)
    rows = analysis.class_scores(LETTERS, predictions, labels)
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in rows] == pytest.approx(values.tolist())
    assert (
        analysis.confusion_counts(3, predictions, labels)
        == sklearn_metrics.confusion_matrix(labels, predictions).tolist()
    )


def test_several_labels_have_a_row_each():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 0]])
    predictions = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    first, second = analysis.class_scores(TAGGED, predictions, labels)
    assert first == {"label": "x", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "predicted": 2}
    assert second == {"label": "y", "precision": None, "recall": 0.0, "f1": 0.0, "support": 1, "predicted": 0}


def test_calibration_by_hand():
    """Ten predictions of 0.9, of which six are right: 0.3 too sure; ten of 0.62, of which seven: 0.08 too little."""
    sure = np.repeat([0.9, 0.62], 10)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    labels = np.array([0] * 6 + [1] * 4 + [0] * 7 + [1] * 3)
    result = analysis.calibration(probabilities, np.zeros(20, int), labels)
    assert result["expected_calibration_error"] == pytest.approx((0.3 + 0.08) / 2)
    assert [(bin["examples"], bin["accuracy"]) for bin in result["bins"]] == [(10, 0.7), (10, 0.6)]
    expected = stats.binomtest(7, 10).proportion_ci(method="exact")
    assert result["bins"][0]["interval"] == pytest.approx([expected.low, expected.high])
    assert all(bin["low"] <= bin["confidence"] <= bin["high"] for bin in result["bins"])
    # Each label of several is a prediction of its own: here two that are sure and right, one that is wrong.
    result = analysis.calibration(np.array([[1.0, 0.0, 1.0]]), np.array([[1, 0, 1]]), np.array([[1, 0, 0]]))
    assert result["expected_calibration_error"] == pytest.approx(1 / 3)


def test_coverage_by_hand():
    """Of 200 texts, the surer half is right in 99 of 100, the other half in 70."""
    confidence = np.concatenate([np.linspace(0.9, 1, 100), np.linspace(0.5, 0.6, 100)])
    labels = np.zeros(200, int)
    labels[0], labels[100:130] = 1, 1
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    by_target = {row["target"]: row for row in analysis.coverage(LETTERS, probabilities, labels)}
    assert by_target[0.8]["answered"] > 0.5 and by_target[0.99]["min_probability"] is None
    assert by_target[0.99]["answered"] == 0 and by_target[0.99]["accuracy"] is None
    task = replace(LETTERS, min_probabilities={"0.95": 0.9, "0.99": None})
    row = analysis.coverage(task, probabilities, labels)[2]
    assert (row["min_probability"], row["answered"], row["accuracy"]) == (0.9, 0.5, 0.99)
    assert row["fitted_in_training"] and row["interval"][0] < 0.95 < 0.99 < row["interval"][1]
    words = analysis.format_coverage(row)
    assert words.startswith("to be right in 95%: --min_probability 0.9000 answers 50.0% of the texts, 99.0% of")


def test_a_model_that_says_how_sure_it_is_has_no_calibration_error():
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.5, 1, 200_000)
    labels = (generator.random(200_000) > sure).astype(int)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    assert analysis.calibration(probabilities, np.zeros(200_000, int), labels)["expected_calibration_error"] < 0.005


@pytest.mark.parametrize("rows", [50, 300])
def test_95_of_100_calibrated_models_stay_below_what_chance_alone_gives(rows):
    above = 0
    for seed in range(400):
        generator = np.random.default_rng(seed)
        sure = generator.uniform(0.5, 1, rows)
        labels = (generator.random(rows) > sure).astype(int)
        result = analysis.calibration(np.stack([sure, 1 - sure], axis=1), np.zeros(rows, int), labels)
        above += result["expected_calibration_error"] > result["chance_alone"]
    assert 8 <= above <= 34


def test_mistakes_come_worst_first():
    logits = np.array([[2.0, 0, 0], [0, 1.0, 0], [0, 3.0, 0], [0, 0, 1.0]], dtype=np.float32)
    labels = np.array([0, 0, 0, 2])
    numbers, losses = analysis.worst_mistakes(common.score_logits(LETTERS, logits, labels, majority=0))
    assert numbers.tolist() == [2, 1]
    assert losses == pytest.approx([np.log(2 + np.e**3), np.log(2 + np.e)])


def test_parts_of_the_data():
    parts = analysis.slices_by_value(["b", "a", "b", "c"])
    assert [(word, numbers.tolist()) for word, numbers in parts] == [("b", [0, 2]), ("a", [1]), ("c", [3])]
    many = analysis.slices_by_value([str(number % 30) for number in range(61)])
    assert len(many) == 21 and many[0][0] == "0" and many[-1][0] == "(10 others)"
    assert sorted(np.concatenate([numbers for _, numbers in many])) == list(range(61))
    lengths = np.array([9, 1, 2, 3, 4, 5, 6, 7])
    parts = analysis.slices_by_length(lengths)
    assert [(word, sorted(lengths[numbers])) for word, numbers in parts] == [
        ("1 to 2 tokens", [1, 2]),
        ("3 to 4 tokens", [3, 4]),
        ("5 to 6 tokens", [5, 6]),
        ("7 to 9 tokens", [7, 9]),
    ]
    assert [word for word, _ in analysis.slices_by_length(np.full(5, 7))] == ["7 tokens"]
    assert [word for word, _ in analysis.slices_by_length(np.array([3]))] == ["3 tokens"]


def test_scores_of_a_part_are_those_of_its_examples():
    logits, labels = make_logits(1)
    predictions = logits.argmax(axis=1)
    numbers = np.flatnonzero(np.arange(200) % 3 == 0)
    (part,) = analysis.score_slices(["accuracy"], predictions, labels, [("third", numbers)])
    expected = sklearn_metrics.accuracy_score(labels[numbers], predictions[numbers])
    assert part["scores"]["accuracy"] == pytest.approx(expected) and part["examples"] == 67
    low, high = part["intervals"]["accuracy"]
    assert low < expected < high


def test_bars_are_scores_of_32_examples_each():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 2, (2, 70))
    bars = analysis.batch_scores("matthews_correlation", predictions, labels)
    expected = [sklearn_metrics.matthews_corrcoef(labels[s : s + 32], predictions[s : s + 32]) for s in (0, 32, 64)]
    assert bars == pytest.approx(expected)


def test_what_analyse_says_of_each_kind_of_task():
    logits, labels = make_logits(2)
    lengths = np.arange(200) % 50 + 3
    result = common.score_logits(LETTERS, logits, labels, majority=0)
    content = analysis.analyse(LETTERS, result, lengths, {"source": ["web"] * 100 + ["book"] * 100})
    assert set(content) == {"slices", "classes", "never_predicted", "calibration", "coverage", "confusion"}
    assert [part["slice"] for part in content["slices"]["source"]] == ["book", "web"]
    assert sum(part["examples"] for part in content["slices"]["length"]) == 200

    regression = Task("r", text=["text"], labels="regression", metrics=["pearson"])
    values = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    result = common.score_logits(regression, values, values[:, 0] * 2, majority=0.0)
    content = analysis.analyse(regression, result, np.arange(50), {})
    assert set(content) == {"slices"}

    logits = np.array([[3.0, -3.0], [3.0, -1.0]], dtype=np.float32)
    labels = np.array([[1, 0], [1, 1]])
    result = common.score_logits(TAGGED, logits, labels, majority=[1, 0])
    content = analysis.analyse(TAGGED, result, np.array([3, 4]), {})
    assert content["never_predicted"] == ["y"] and "confusion" not in content


# ------------------------------------------------------------------------------------------------------- two models


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_predictions_are_found_by_their_texts(tmp_path):
    rows = Dataset.from_dict({"text": ["a", 'b, "b"', "a", "c\nc"]})
    table = [("c\nc", "yes"), ("a", "no"), ("not scored here", "no"), ('b, "b"', "yes"), ("a", "yes")]
    file = write_rows(tmp_path / "predictions.csv", [{"text": text, "predicted_label": label} for text, label in table])
    for path in (file, tmp_path):
        assert analysis.read_predictions(path, TWO, rows).tolist() == [0, 1, 1, 1]


def test_predictions_of_values_and_of_several_labels(tmp_path):
    rows = Dataset.from_dict({"first": ["a", "a"], "second": ["b", "c"]})
    values = [{"first": "a", "second": second, "predicted_value": value} for second, value in (("c", 1.5), ("b", -2))]
    assert analysis.read_predictions(write_rows(tmp_path / "a.csv", values), PAIRS, rows).tolist() == [-2.0, 1.5]
    rows = Dataset.from_dict({"text": ["a", "b"]})
    tags = [{"text": "a", "predicted_label": "z;x"}, {"text": "b", "predicted_label": ""}]
    result = analysis.read_predictions(write_rows(tmp_path / "b.csv", tags), TAGS, rows)
    assert result.tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "other", "predicted_label": "no"}, "has no prediction for example 0, 'a'"),
        ({"text": "a", "predicted_label": "maybe"}, "line 2: 'maybe' is not a prediction of this task"),
        ({"text": "a", "predicted_labels": "no"}, 'has no column "predicted_label" (did you mean "predicted_labels"?)'),
        ({"texts": "a", "predicted_label": "no"}, 'has no column "text" (did you mean "texts"?)'),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, row, message):
    with pytest.raises(BadInput) as refused:
        analysis.read_predictions(write_rows(tmp_path / "a.csv", [row]), TWO, Dataset.from_dict({"text": ["a"]}))
    assert message in refused.value.reason


def test_a_refusal_names_ten_of_many_classes(tmp_path):
    many = Task("many", text=["text"], labels=[f"class {number}" for number in range(300)], metrics=["accuracy"])
    file = write_rows(tmp_path / "a.csv", [{"text": "a", "predicted_label": "line\nbreak" + "x" * 5000}])
    with pytest.raises(BadInput) as refused:
        analysis.read_predictions(file, many, Dataset.from_dict({"text": ["a"]}))
    assert "'line\\nbreakxxx" in refused.value.reason and len(refused.value.reason) < 300
    assert refused.value.advice.endswith("class 9 and 290 more.")


def compare_at_random(other_is_right, rows=500):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, rows)
    here, other = (np.where(generator.random(rows) < rate, labels, 1 - labels) for rate in (0.85, other_is_right))
    content = analysis.compare_models(TWO, ("here", "there"), here, other, labels)
    return content, here, other, labels


def test_a_clear_difference_is_said():
    content, here, other, labels = compare_at_random(other_is_right=0.6)
    for metric, score in (("f1", sklearn_metrics.f1_score), ("accuracy", sklearn_metrics.accuracy_score)):
        difference = score(labels, here) - score(labels, other)
        assert content["differences"][metric]["difference"] == pytest.approx(difference)
        low, high = content["differences"][metric]["interval"]
        assert 0 < low < difference < high
    assert content["mcnemar"]["p"] < 1e-6
    assert content["conclusion"].startswith("here is better than there by f1")
    assert (
        "there is better than here"
        in analysis.compare_models(TWO, ("here", "there"), other, here, labels)["conclusion"]
    )


def test_a_difference_that_may_be_chance_is_not_one():
    content, here, other, labels = compare_at_random(other_is_right=0.85)
    assert content["conclusion"].startswith("These examples do not tell here and there apart by f1")
    only = analysis.only_one_right(here, other, labels)
    assert ((here[only] == labels[only]) != (other[only] == labels[only])).all()
    assert len(only) == content["mcnemar"]["only_here_right"] + content["mcnemar"]["only_other_right"]


def test_where_a_score_has_no_value_nothing_is_said():
    constant, values = np.zeros(9), np.arange(9.0)
    content = analysis.compare_models(PAIRS, ("here", "there"), constant, values, values)
    assert content["differences"]["pearson"] == {"difference": None, "interval": None}
    assert content["conclusion"].startswith("No conclusion is possible") and "mcnemar" not in content


def test_a_smaller_error_is_better():
    task = Task("r", text=["text"], labels="regression", metrics=["mse"])
    values = np.random.default_rng(0).normal(size=200)
    content = analysis.compare_models(task, ("here", "there"), values + 0.1, values + 1.0, values)
    assert content["conclusion"].startswith("here is better than there by mse")


def test_a_difference_that_is_rounding_is_none():
    task = Task("r", text=["text"], labels="regression", metrics=["mse"])
    values = np.random.default_rng(0).normal(size=200)
    for shift, beginning in (
        (
            9e-07,
            "These examples show no difference between here and there by mse beyond the 1.0e-04 that rounding explains",
        ),
        (0.0, "here and there predict the same for all 200 examples."),
        (0.01, "there is better than here by mse"),
    ):
        for scale in (1e-2, 1, 1e2):
            there, labels = scale * (values + 1), scale * values
            sentence = analysis.compare_models(task, ("here", "there"), there + scale * shift, there, labels)[
                "conclusion"
            ]
            assert sentence.startswith(beginning.replace("1.0e-04", f"{1e-4 * scale**2:.1e}"))
            assert "0.0000" not in sentence


def test_a_few_rows_of_100_000_are_no_difference():
    task = Task("two", text=["text"], labels=["no", "yes"], metrics=["accuracy"])
    labels = np.zeros(100_000, dtype=int)
    for wrong, beginning in ((8, "These examples show no difference"), (50, "there is better than here by accuracy")):
        here = (np.arange(100_000) < wrong).astype(int)
        content = analysis.compare_models(task, ("here", "there"), here, labels, labels)
        assert content["differences"]["accuracy"]["interval"][1] < 0
        assert content["conclusion"].startswith(beginning) and "0.0000" not in content["conclusion"]


def test_three_rows_do_not_tell_two_models_apart():
    """One is right in all, the other in none: the interval leaves 0 out, but chance does as much in one of four."""
    task = Task("two", text=["text"], labels=["no", "yes"], metrics=["accuracy"])
    labels = np.array([0, 1, 1])
    content = analysis.compare_models(task, ("here", "there"), labels, 1 - labels, labels)
    assert content["differences"]["accuracy"]["interval"][0] > 0 and content["mcnemar"]["p"] == 0.25
    assert content["conclusion"].startswith("These examples do not tell here and there apart by accuracy")


@pytest.mark.parametrize(("metric", "rows"), [("accuracy", 10), ("accuracy", 60), ("f1_macro", 60), ("mse", 60)])
def test_of_two_equal_models_one_is_called_better_in_5_of_100_pairs_at_most(metric, rows):
    is_regression = metric == "mse"
    task = Task("t", text=["text"], labels="regression" if is_regression else ["no", "yes"], metrics=[metric])
    called_better = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        if is_regression:
            labels = generator.normal(size=rows)
            here, there = labels + generator.normal(size=(2, rows))
        else:
            labels = (generator.random(rows) < 0.3).astype(int)
            here, there = np.where(generator.random((2, rows)) < 0.85, labels, 1 - labels)
        called_better += " is better than " in analysis.compare_models(task, "ab", here, there, labels)["conclusion"]
    assert called_better <= 17  # in 99 of 100 cases, if each pair is called so with a probability of 5 %


def test_a_comparison_tells_what_difference_it_would_show():
    content, *_ = compare_at_random(other_is_right=0.85)
    low, high = content["differences"]["f1"]["interval"]
    assert f"would show one of {(high - low) / 2 * (1 + 0.8416 / 1.96):.2g} or more" in content["conclusion"]
