"""comparison.py: predictions of a file find their examples; what two models' scores allow to say."""

import csv

import numpy as np
import pytest
from datasets import Dataset
from sklearn import metrics as sklearn_metrics

from classifier.data.tasks import Task
from classifier.evaluation import analysis
from classifier.messages import BadInput

TASK = Task("two", text=["text"], labels=["no", "yes"], metrics=["f1", "accuracy"])
PAIRS = Task("pairs", text=["first", "second"], labels="regression", metrics=["pearson"])
TAGS = Task("tags", text=["text"], labels=["x", "y", "z"], problem="multi_label", separator=";", metrics=["f1_micro"])


def write(path, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_predictions_are_found_by_their_texts(tmp_path):
    rows = Dataset.from_dict({"text": ["a", 'b, "b"', "a", "c\nc"]})
    found = [("c\nc", "yes"), ("a", "no"), ("not scored here", "no"), ('b, "b"', "yes"), ("a", "yes")]
    file = write(tmp_path / "predictions.csv", [{"text": text, "predicted_label": label} for text, label in found])
    for path in (file, tmp_path):
        assert analysis.predictions_in(path, TASK, rows).tolist() == [0, 1, 1, 1]


def test_predictions_of_values_and_of_several_labels(tmp_path):
    rows = Dataset.from_dict({"first": ["a", "a"], "second": ["b", "c"]})
    values = [{"first": "a", "second": second, "predicted_value": value} for second, value in (("c", 1.5), ("b", -2))]
    assert analysis.predictions_in(write(tmp_path / "a.csv", values), PAIRS, rows).tolist() == [-2.0, 1.5]
    rows = Dataset.from_dict({"text": ["a", "b"]})
    tags = [{"text": "a", "predicted_label": "z;x"}, {"text": "b", "predicted_label": ""}]
    found = analysis.predictions_in(write(tmp_path / "b.csv", tags), TAGS, rows)
    assert found.tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "other", "predicted_label": "no"}, "has no prediction for example 0, 'a'"),
        ({"text": "a", "predicted_label": "maybe"}, "line 2: 'maybe' is no prediction of this task"),
        ({"text": "a", "predicted_labels": "no"}, 'has no column "predicted_label" (did you mean "predicted_labels"?)'),
        ({"texts": "a", "predicted_label": "no"}, 'has no column "text" (did you mean "texts"?)'),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, row, words):
    with pytest.raises(BadInput) as refused:
        analysis.predictions_in(write(tmp_path / "a.csv", [row]), TASK, Dataset.from_dict({"text": ["a"]}))
    assert words in refused.value.reason


def compare(other_is_right, rows=500):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, rows)
    here, other = (np.where(generator.random(rows) < rate, labels, 1 - labels) for rate in (0.85, other_is_right))
    content = analysis.compare(TASK, ("here", "there"), here, other, labels)
    return content, here, other, labels


def test_a_clear_difference_is_said():
    content, here, other, labels = compare(other_is_right=0.6)
    for metric, score in (("f1", sklearn_metrics.f1_score), ("accuracy", sklearn_metrics.accuracy_score)):
        difference = score(labels, here) - score(labels, other)
        assert content["differences"][metric]["difference"] == pytest.approx(difference)
        low, high = content["differences"][metric]["interval"]
        assert 0 < low < difference < high
    assert content["mcnemar"]["p"] < 1e-6
    assert content["conclusion"].startswith("here is better than there by f1")
    assert "there is better than here" in analysis.compare(TASK, ("here", "there"), other, here, labels)["conclusion"]


def test_a_difference_that_may_be_chance_is_not_one():
    content, here, other, labels = compare(other_is_right=0.85)
    assert content["conclusion"].startswith("These examples do not tell here and there apart by f1")
    only = analysis.only_one_right(here, other, labels)
    assert ((here[only] == labels[only]) != (other[only] == labels[only])).all()
    assert len(only) == content["mcnemar"]["only_here_right"] + content["mcnemar"]["only_other_right"]


def test_where_a_score_has_no_value_nothing_is_said():
    constant, values = np.zeros(9), np.arange(9.0)
    content = analysis.compare(PAIRS, ("here", "there"), constant, values, values)
    assert content["differences"]["pearson"] == {"difference": None, "interval": None}
    assert content["conclusion"].startswith("Nothing can be said") and "mcnemar" not in content


def test_a_smaller_error_is_better():
    task = Task("r", text=["text"], labels="regression", metrics=["mse"])
    values = np.random.default_rng(0).normal(size=200)
    content = analysis.compare(task, ("here", "there"), values + 0.1, values + 1.0, values)
    assert content["conclusion"].startswith("here is better than there by mse")


def test_a_difference_that_is_rounding_is_none():
    task = Task("r", text=["text"], labels="regression", metrics=["mse"])
    values = np.random.default_rng(0).normal(size=200)
    for shift, words in (
        (9e-07, "These examples show no difference of here and there by mse beyond the 1.0e-04 that rounding explains"),
        (0.0, "These examples do not tell here and there apart by mse: the difference is 0, 95 % interval 0 to 0, 200"),
        (0.01, "there is better than here by mse"),
    ):
        for scale in (1e-2, 1, 1e2):
            there, labels = scale * (values + 1), scale * values
            sentence = analysis.compare(task, ("here", "there"), there + scale * shift, there, labels)["conclusion"]
            assert sentence.startswith(words.replace("1.0e-04", f"{1e-4 * scale**2:.1e}"))
            assert "0.0000" not in sentence


def test_a_few_rows_of_100_000_are_no_difference():
    task = Task("two", text=["text"], labels=["no", "yes"], metrics=["accuracy"])
    labels = np.zeros(100_000, dtype=int)
    for wrong, words in ((5, "These examples show no difference"), (50, "there is better than here by accuracy")):
        here = (np.arange(100_000) < wrong).astype(int)
        content = analysis.compare(task, ("here", "there"), here, labels, labels)
        assert content["differences"]["accuracy"]["interval"][1] < 0
        assert content["conclusion"].startswith(words) and "0.0000" not in content["conclusion"]
