"""Progress lines, the table of evaluations, warnings."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset

from classifier.data.tasks import Task
from classifier.evaluation import report
from classifier.training import batching
from classifier.training.checkpoint import State

TASK = Task(
    name="two",
    text=["text"],
    labels=["negative", "positive"],
    metrics=["f1", "accuracy"],
    max_length=64,
    files={"train": "my.csv"},
)


COLLAPSED = "THE MODEL PREDICTS THE SAME FOR EVERY EXAMPLE"


@pytest.mark.parametrize(
    ("task", "f1", "constant", "words"),
    [
        (TASK, 0.9, None, None),
        (TASK, 0.9, 1, f"{COLLAPSED}: 'positive'"),
        (TASK, 0.9, 0, f"{COLLAPSED}: 'negative'"),
        (replace(TASK, labels="regression"), 0.9, 0.0, f"{COLLAPSED}: 0.0"),
        (replace(TASK, problem="multi_label"), 0.9, [0, 1], COLLAPSED),
        (TASK, 0.7, None, "NO BETTER THAN THE MAJORITY CLASS"),
        (TASK, None, None, "NO BETTER THAN THE MAJORITY CLASS"),
    ],
)
def test_a_model_that_learnt_nothing_is_warned_of(task, f1, constant, words):
    evaluation = {"scores": {"f1": f1, "accuracy": 0.5}, "constant": constant}
    warning = report.collapse_warning(task, "validation", {**evaluation, "majority": {"f1": 0.7, "accuracy": 0.5}})
    if words is None:
        assert warning is None
    else:
        assert words in warning and "--learning_rate" in warning


# ---------------------------------------------------------------------------------------------------------- a dry run


def describe(
    monkeypatch, log_lines, tmp_path, differences, device="npu", lengths=(10,) * 100, is_packed=True, **changes
):
    """What describe_run says of 100 steps of 4 after a few of them, on a device whose numbers differ so much."""
    args = {
        "batch_size": 4,
        "micro_batch_size": None,
        "eval_every": "epoch",
        "eval_train_rows": None,
        "keep_checkpoints": 2,
        "freeze": "none",
    }
    args = SimpleNamespace(output_dir="runs/two", **{**args, **changes})
    monkeypatch.setattr(report.facts, "compare_with_cpu", lambda *arguments: differences)
    monkeypatch.setattr(report.facts, "peak_memory", lambda device: 3 * 2**29)
    state = State(evaluation_seconds=7.0, micro_batch_size=4)
    progress = SimpleNamespace(lines=tmp_path / "metrics.jsonl", steps_per_epoch=25, state=state)
    # 100 positions a second, once the slow first steps are over.
    progress.intervals = [(9.0, 10), (3.0, 10), (0.1, 10), (0.3, 30)]
    (tmp_path / "checkpoints" / "step-00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000004" / "model.safetensors").write_bytes(b"0" * 4_600_000)
    examples = {
        "train": Dataset.from_dict({"length": list(lengths)}),
        "validation": Dataset.from_dict({"length": [6] * 50}),
    }
    accelerator = SimpleNamespace(
        device=SimpleNamespace(type=device),
        num_processes=2,
        is_main_process=True,
        mixed_precision="bf16",
        autocast=lambda: None,
    )
    batches = batching.make_plan(100, 4, seed=1, steps=100)
    micro_batch = {"inputs": {}, "labels": None}
    model = torch.nn.Linear(1000, 1000, bias=False)
    packer = SimpleNamespace(is_packed=is_packed)
    of_run = (packer, batches, examples, ["validation"], progress, micro_batch)
    progress.describe_run(TASK, args, accelerator, model, *of_run)
    return dict(line.split(maxsplit=1) for line in log_lines[-1].splitlines())


def test_a_dry_run_counts_what_is_to_come(monkeypatch, log_lines, tmp_path):
    table = describe(monkeypatch, log_lines, tmp_path, [1e-3, 2e-3])
    assert list(table) == ["steps", "batch", "memory", "time", "files", "check"]
    assert table["steps"] == "100 of 4, 25 an epoch; 4 evaluations"
    assert table["batch"] == "4 = 2 process(es) x 2, 2 at a time"
    assert table["memory"].startswith("1.50 GiB in each process")
    # 100 steps of 4 x 10 positions; 4 evaluations of 300 tokens at a third of the price, and 7 seconds that were seen.
    assert table["time"].startswith("0:00:51 (0:00:40 training, 0:00:11 evaluating)")
    # A million weights of 4 bytes; two checkpoints, the best, and one that is being written.
    assert table["files"] == "runs/two/: model/ 4 MB, and until then up to 4 checkpoints of 5 MB"
    assert table["check"] == "largest difference from fp32 on the CPU: logits 1.0e-03, gradients 2.0e-03"
    assert len(log_lines) == 1


@pytest.mark.parametrize("is_packed", [False, True])
def test_padding_costs_time(monkeypatch, log_lines, tmp_path, is_packed):
    """Of four examples, longest first, the third is padded to the first's length, the fourth to the second's."""
    lengths = np.array([10, 30] * 50)
    table = describe(monkeypatch, log_lines, tmp_path, [0, 0], lengths=lengths, is_packed=is_packed)
    padded = sum(2 * sum(sorted(lengths[batch])[2:]) for batch in batching.make_plan(100, 4, seed=1, steps=100))
    seconds = round((100 * 4 * 20 if is_packed else padded) / 100)  # 100 positions a second
    assert (seconds == 80) == is_packed
    assert f"(0:01:{seconds - 60:02} training" in table["time"]


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


def evaluated(epoch, train_loss, loss, split="validation", f1=0.5):
    numbers = {"epoch": epoch, "step": epoch * 10, "loss": loss, "train_loss": train_loss, "seconds": 60.0 * epoch}
    return {"type": "eval", "split": split, "scores": {"f1": f1}, **numbers}


def test_the_table_of_epochs_has_their_losses_scores_and_times():
    lines = [{"type": "train"}, evaluated(1, 0.7, 0.6), evaluated(2, 0.5, 0.55, f1=None), evaluated(62, 0.1, 0.5)]
    rows = [line.split() for line in report.epoch_table(lines).splitlines()]
    assert rows == [
        ["epoch", "split", "train", "loss", "loss", "f1", "h:mm:ss"],
        ["1.00", "validation", "0.7000", "0.6000", "0.5000", "0:01:00"],
        ["2.00", "validation", "0.5000", "0.5500", "undefined", "0:01:00"],
        ["62.00", "validation", "0.1000", "0.5000", "0.5000", "1:00:00"],
    ]


def test_a_validation_loss_that_rises_is_pointed_out():
    falls = [evaluated(1, 0.7, 0.6), evaluated(2, 0.5, 0.5)]
    assert report.overfitting_warning(falls) is None and report.overfitting_warning([]) is None
    hint = report.overfitting_warning([*falls, evaluated(3, 0.2, 0.8)])
    assert hint.startswith("validation loss rose from 0.5000 (epoch 2.00) to 0.8000 while that of train fell")
    # Not where the training itself goes wrong, nor for the other splits that are scored.
    assert report.overfitting_warning([*falls, evaluated(3, 0.9, 0.8)]) is None
    assert report.overfitting_warning([*falls, evaluated(2, 0.5, 3.0, split="validation_mismatched")]) is None
    assert report.overfitting_warning([evaluated(2, 0.5, 0.1, split="train"), *falls]) is None
