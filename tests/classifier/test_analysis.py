"""analysis.py against scikit-learn and values worked out by hand."""

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

import common
from classifier.data.tasks import Task
from classifier.evaluation import analysis

TASK = Task("letters", text=["text"], labels=["a", "b", "c"], metrics=["accuracy", "f1_macro"])
SEVERAL = Task("tags", text=["text"], labels=["x", "y"], problem="multi_label", metrics=["f1_micro"])


def of_classes(seed, rows=200):
    """Return (logits, labels) of a model that is right more often than not."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, rows)
    logits = generator.normal(size=(rows, 3)).astype(np.float32)
    logits[np.arange(rows), labels] += 1
    return logits, labels


def test_classes_and_confusion_are_those_of_scikit_learn():
    logits, labels = of_classes(0)
    predictions = logits.argmax(axis=1)
    expected = sklearn_metrics.precision_recall_fscore_support(labels, predictions)
    rows = analysis.class_scores(TASK, predictions, labels)
    assert [row["label"] for row in rows] == ["a", "b", "c"]
    for name, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        assert [row[name] for row in rows] == pytest.approx(values.tolist())
    assert analysis.confusion(3, predictions, labels) == sklearn_metrics.confusion_matrix(labels, predictions).tolist()


def test_several_labels_have_a_row_each():
    labels = np.array([[1, 0], [1, 1], [0, 0], [0, 0]])
    predictions = np.array([[1, 0], [0, 0], [1, 0], [0, 0]])
    first, second = analysis.class_scores(SEVERAL, predictions, labels)
    assert first == {"label": "x", "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2, "predicted": 2}
    assert second == {"label": "y", "precision": None, "recall": 0.0, "f1": 0.0, "support": 1, "predicted": 0}


def test_calibration_by_hand():
    """Ten predictions of 0.9, of which six are right: 0.3 too sure; ten of 0.62, of which seven: 0.08 too little."""
    sure = np.repeat([0.9, 0.62], 10)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    labels = np.array([0] * 6 + [1] * 4 + [0] * 7 + [1] * 3)
    found = analysis.calibration(probabilities, np.zeros(20, int), labels)
    assert found["expected_calibration_error"] == pytest.approx((0.3 + 0.08) / 2)
    assert [(bin["examples"], bin["accuracy"]) for bin in found["bins"]] == [(10, 0.7), (10, 0.6)]
    assert all(bin["low"] <= bin["confidence"] <= bin["high"] for bin in found["bins"])
    # Each label of several is a prediction of its own: here two that are sure and right, one that is wrong.
    found = analysis.calibration(np.array([[1.0, 0.0, 1.0]]), np.array([[1, 0, 1]]), np.array([[1, 0, 0]]))
    assert found["expected_calibration_error"] == pytest.approx(1 / 3)


def test_a_model_that_says_how_sure_it_is_has_no_calibration_error():
    generator = np.random.default_rng(0)
    sure = generator.uniform(0.5, 1, 200_000)
    labels = (generator.random(200_000) > sure).astype(int)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    assert analysis.calibration(probabilities, np.zeros(200_000, int), labels)["expected_calibration_error"] < 0.005


def test_mistakes_come_worst_first():
    logits = np.array([[2.0, 0, 0], [0, 1.0, 0], [0, 3.0, 0], [0, 0, 1.0]], dtype=np.float32)
    labels = np.array([0, 0, 0, 2])
    numbers, losses = analysis.mistakes(common.score_logits(TASK, logits, labels, majority=0))
    assert numbers.tolist() == [2, 1]
    assert losses == pytest.approx([np.log(2 + np.e**3), np.log(2 + np.e)])


def test_parts_of_the_data():
    parts = analysis.parts_by_word(["b", "a", "b", "c"])
    assert [(word, numbers.tolist()) for word, numbers in parts] == [("b", [0, 2]), ("a", [1]), ("c", [3])]
    many = analysis.parts_by_word([str(number % 30) for number in range(61)])
    assert len(many) == 21 and many[0][0] == "0" and many[-1][0] == "(10 others)"
    assert sorted(np.concatenate([numbers for _, numbers in many])) == list(range(61))
    lengths = np.array([9, 1, 2, 3, 4, 5, 6, 7])
    parts = analysis.parts_by_length(lengths)
    assert [(word, sorted(lengths[numbers])) for word, numbers in parts] == [
        ("1 to 2 tokens", [1, 2]),
        ("3 to 4 tokens", [3, 4]),
        ("5 to 6 tokens", [5, 6]),
        ("7 to 9 tokens", [7, 9]),
    ]
    assert [word for word, _ in analysis.parts_by_length(np.full(5, 7))] == ["7 tokens"]
    assert [word for word, _ in analysis.parts_by_length(np.array([3]))] == ["3 tokens"]


def test_scores_of_a_part_are_those_of_its_examples():
    logits, labels = of_classes(1)
    predictions = logits.argmax(axis=1)
    numbers = np.flatnonzero(np.arange(200) % 3 == 0)
    (part,) = analysis.part_scores(["accuracy"], predictions, labels, [("third", numbers)])
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
    logits, labels = of_classes(2)
    lengths = np.arange(200) % 50 + 3
    result = common.score_logits(TASK, logits, labels, majority=0)
    content = analysis.analyse(TASK, result, lengths, {"source": ["web"] * 100 + ["book"] * 100})
    assert set(content) == {"slices", "classes", "never_predicted", "calibration", "confusion"}
    assert [part["slice"] for part in content["slices"]["source"]] == ["book", "web"]
    assert sum(part["examples"] for part in content["slices"]["length"]) == 200

    regression = Task("r", text=["text"], labels="regression", metrics=["pearson"])
    values = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    result = common.score_logits(regression, values, values[:, 0] * 2, majority=0.0)
    content = analysis.analyse(regression, result, np.arange(50), {})
    assert set(content) == {"slices"}

    logits = np.array([[3.0, -3.0], [3.0, -1.0]], dtype=np.float32)
    labels = np.array([[1, 0], [1, 1]])
    result = common.score_logits(SEVERAL, logits, labels, majority=[1, 0])
    content = analysis.analyse(SEVERAL, result, np.array([3, 4]), {})
    assert content["never_predicted"] == ["y"] and "confusion" not in content
