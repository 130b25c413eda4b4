"""Progress lines, the table of evaluations, warnings, the model card."""

import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from datasets import Dataset

import batching
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
    evaluations = {"validation": {"loss": 0.3, "scores": scores, "majority": {"f1": 0.7, "accuracy": 0.5}}}
    progress.evaluation(10, 5e-4, evaluations, is_best=True)
    progress.train(15, np.array([1.0, 16, 200, 280]), 1e-4, 0.1)
    progress.evaluation(15, 1e-4, evaluations, is_best=False)
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
    assert (totals["steps"], totals["epochs"], totals["train_examples"]) == (15, 1.5, 48)
    assert totals["padding_fraction"] == pytest.approx(1 - 400 / 600)
    assert totals["train_examples_per_second"] == pytest.approx(48 / totals["train_seconds"])


@pytest.mark.parametrize(
    ("f1", "predictions", "words"),
    [
        (0.9, [0, 1, 1], None),
        (0.9, [1, 1, 1], "THE MODEL PREDICTS THE SAME FOR EVERY EXAMPLE: 'positive'"),
        (0.9, [[0, 1], [0, 1]], "THE MODEL PREDICTS THE SAME FOR EVERY EXAMPLE"),
        (0.9, [[0, 1], [1, 1]], None),
        (0.7, [0, 1, 1], "NO BETTER THAN THE MAJORITY CLASS"),
        (None, [0, 0, 1], "NO BETTER THAN THE MAJORITY CLASS"),
    ],
)
def test_a_model_that_learnt_nothing_is_warned_of(log_lines, f1, predictions, words):
    evaluation = {"scores": {"f1": f1, "accuracy": 0.5}, "predictions": np.array(predictions)}
    report.warn_of_collapse(TASK, "validation", {**evaluation, "majority": {"f1": 0.7, "accuracy": 0.5}})
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


# ---------------------------------------------------------------------------------------------------------- a dry run


def describe(monkeypatch, log_lines, tmp_path, differences, device="npu", **changes):
    """What describe_run says of 100 steps of 4 after a few of them, on a device whose numbers differ so much."""
    args = {"batch_size": 4, "micro_batch_size": None, "eval_every": "epoch", "eval_train_rows": None}
    args = SimpleNamespace(output_dir="runs/two", **{**args, **changes})
    monkeypatch.setattr(report.facts, "compare_with_cpu", lambda *arguments: differences)
    monkeypatch.setattr(report.facts, "peak_memory", lambda device: 3 * 2**29)
    progress = SimpleNamespace(lines=tmp_path / "metrics.jsonl", steps_per_epoch=25, evaluation_seconds=7.0)
    # 100 positions a second, once the slow first steps are over.
    progress.intervals = [(9.0, 10), (3.0, 10), (0.1, 10), (0.3, 30)]
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"0" * 4_600_000)
    examples = {
        "train": Dataset.from_dict({"length": [10] * 100}),
        "validation": Dataset.from_dict({"length": [6] * 50}),
    }
    accelerator = SimpleNamespace(
        device=SimpleNamespace(type=device),
        num_processes=2,
        is_main_process=True,
        mixed_precision="bf16",
        autocast=lambda: None,
    )
    batches = batching.plan(100, 4, seed=1, steps=100)
    micro_batch = {"inputs": {}, "labels": None}
    report.describe_run(TASK, args, accelerator, None, batches, examples, ["validation"], progress, micro_batch)
    return dict(line.split(maxsplit=1) for line in log_lines[-1].splitlines())


def test_a_dry_run_counts_what_is_to_come(monkeypatch, log_lines, tmp_path):
    table = describe(monkeypatch, log_lines, tmp_path, [1e-3, 2e-3])
    assert list(table) == ["steps", "batch", "memory", "time", "files", "check"]
    assert table["steps"] == "100 of 4, 25 an epoch; 4 evaluations"
    assert table["batch"] == "4 = 2 process(es) x 2, 2 at a time"
    assert table["memory"].startswith("1.50 GiB in each process")
    # 100 steps of 4 x 10 positions; 4 evaluations of 300 tokens at a third of the price, and 7 seconds that were seen.
    assert table["time"].startswith("0:00:51 (0:00:40 training, 0:00:11 evaluating)")
    assert table["files"].startswith("runs/two/: model/ 5 MB")
    assert table["check"] == "largest difference from fp32 on the CPU: logits 1.0e-03, gradients 2.0e-03"
    assert len(log_lines) == 1


def test_rows_of_train_that_are_scored_cost_time(monkeypatch, log_lines, tmp_path):
    table = describe(monkeypatch, log_lines, tmp_path, [0, 0], eval_every="10", eval_train_rows=900)
    assert table["steps"].endswith("; 10 evaluations")
    assert table["time"].startswith("0:01:30 (0:00:40 training, 0:00:50 evaluating)")  # 10 x (300 + 1000) / 300 + 7


@pytest.mark.parametrize("differences", [[0.5, 1e-3], [1e-3, 0.5], [float("nan"), 0.0], [0.0, float("nan")]])
def test_a_device_that_computes_other_numbers_is_warned_of(monkeypatch, log_lines, tmp_path, differences):
    describe(monkeypatch, log_lines, tmp_path, differences)
    assert log_lines[0].startswith("WARNING: NPU COMPUTES OTHER NUMBERS THAN THE CPU: largest difference")


def test_a_cpu_is_not_compared_with_itself(monkeypatch, log_lines, tmp_path):
    assert "check" not in describe(monkeypatch, log_lines, tmp_path, [1.0, 1.0], device="cpu")
