"""Progress lines, the table of evaluations, warnings, the model card."""

import json
import logging

import numpy as np
import pytest
from accelerate import Accelerator

import common
import report
from tasks import Task

TASK = Task(
    name="two",
    text=["text"],
    labels=["negative", "positive"],
    metrics=["f1", "accuracy"],
    max_length=64,
    files={"train": "my.csv"},
)


@pytest.fixture
def log_lines(monkeypatch):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(common.log, "handlers", [handler])
    common.log.setLevel(logging.INFO)
    return lines


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90000, "25:00:00")]
)
def test_time_is_h_mm_ss(seconds, words):
    assert report.clock(seconds) == words


def test_progress_adds_up_and_writes_lines_of_metrics(tmp_path, log_lines, monkeypatch):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0)
    progress = report.Progress(Accelerator(cpu=True), tmp_path, total_steps=20, steps_per_epoch=10)
    progress.train(5, np.array([8.0, 16, 100, 160]), 1e-3, float("inf"))
    progress.train(10, np.array([4.0, 16, 100, 160]), 5e-4, 0.5)
    scores = {"f1": 0.8, "accuracy": None}
    evaluations = {"validation": {"loss": 0.3, "scores": scores}}
    progress.evaluation(10, 5e-4, evaluations, {"validation": {"f1": 0.7, "accuracy": 0.5}}, is_best=True)
    progress.train(15, np.array([1.0, 16, 200, 280]), 1e-4, 0.1)
    progress.evaluation(15, 1e-4, evaluations, {"validation": {"f1": 0.7, "accuracy": 0.5}}, is_best=False)
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["type"], line["step"], line["epoch"]) for line in lines] == [
        *(("train", 5, 0.5), ("train", 10, 1.0), ("eval", 10, 1.0)),
        *(("train", 15, 1.5), ("eval", 15, 1.5)),
    ]
    assert [line["loss"] for line in lines] == [0.5, 0.25, 0.3, 0.0625, 0.3]
    assert lines[0]["grad_norm"] is None  # infinity is no JSON
    assert lines[2]["scores"] == scores
    assert "train loss 0.3750, validation loss 0.3000" in log_lines[2]
    assert "f1 0.8000, accuracy undefined | majority: f1 0.7000, accuracy 0.5000" in log_lines[2]
    assert log_lines[2].endswith("| best")
    assert "train loss 0.0625" in log_lines[4]  # since the evaluation before
    totals = progress.totals()
    assert totals["train_examples"] == 48
    assert totals["padding_fraction"] == pytest.approx(1 - 400 / 600)
    assert totals["train_examples_per_second"] == pytest.approx(48 / totals["train_seconds"])


@pytest.mark.parametrize(
    ("f1", "predictions", "words"),
    [
        (0.9, [0, 1, 1], None),
        (0.9, [1, 1, 1], "THE MODEL PREDICTS 'positive' FOR EVERY EXAMPLE"),
        (0.7, [0, 1, 1], "NO BETTER THAN THE MAJORITY CLASS"),
        (None, [0, 0, 1], "NO BETTER THAN THE MAJORITY CLASS"),
    ],
)
def test_a_model_that_learnt_nothing_is_warned_of(log_lines, f1, predictions, words):
    evaluation = {"scores": {"f1": f1, "accuracy": 0.5}, "predictions": np.array(predictions)}
    report.warn_of_collapse(TASK, "validation", evaluation, {"f1": 0.7, "accuracy": 0.5})
    if words is None:
        assert log_lines == []
    else:
        assert words in log_lines[0]
        assert "--learning_rate" in log_lines[0]


def test_the_model_card_has_scores_baselines_and_a_way_to_load():
    results = {
        "model": "org/encoder",
        "model_commit": "abc",
        "train_examples": 300,
        "steps": 10,
        "seed": 42,
        "scores": {"validation": {"f1": 0.81234, "accuracy": None}},
        "majority_baseline": {"validation": {"f1": None, "accuracy": 0.5}},
    }
    card = report.model_card(TASK, results)
    assert "org/encoder at commit abc" in card
    assert "| validation | f1 | 0.8123 | undefined |" in card
    assert "| validation | accuracy | undefined | 0.5000 |" in card
    assert "negative, positive" in card
    assert 'pipeline("text-classification"' in card
