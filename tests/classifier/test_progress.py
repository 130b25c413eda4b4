"""progress.py: what a run shows and notes while it goes, and the times that it adds up."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TORCHRUN_2, lines_of, run_script
from datasets import Dataset

from classifier import files
from classifier.model import inference
from classifier.training import batching
from classifier.training.checkpoint import State
from classifier.training.progress import Progress, log_dry_run


def take_steps(progress, first, last, losses, norm=0.5, ids=(3, 1, 2, 0)):
    """Note steps of two micro-batches of 2 examples with these losses, 10 tokens and 16 positions each."""
    counts = {"examples": 2, "tokens": 10, "positions": 16}
    for step in range(first, last + 1):
        parts = [({**counts, "ids": np.array(ids[i : i + 2])}, torch.tensor(losses[i : i + 2])) for i in (0, 2)]
        progress.record_step(step, np.array(ids), torch.tensor(norm), parts)
        progress.state.step = step
        progress.state.learning_rate = 1e-3 / step


SCORES = {"f1": 0.8, "accuracy": None}
EVALUATIONS = {"validation": {"loss": 0.3, "scores": SCORES, "majority": {"f1": 0.7, "accuracy": 0.5}}}


def noted_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def progress_in(tmp_path, monkeypatch):
    """A function that makes a Progress of 20 steps, 10 an epoch, with a line on the screen for each in the file."""
    monkeypatch.setattr("classifier.training.progress.SECONDS_BETWEEN_LINES", 0)

    def make(state=None):
        return Progress(Accelerator(cpu=True), tmp_path, state or State(), total_steps=20, steps_per_epoch=10)

    return make


def test_progress_adds_up_and_writes_lines_of_metrics(tmp_path, log_lines, progress_in):
    progress = progress_in()
    take_steps(progress, 1, 5, [0.0, 1.0, 0.25, 0.75])
    progress.log_step()
    take_steps(progress, 6, 10, [0.25, 0.25, 0.0, 0.5], norm=0.125)
    progress.log_step()
    progress.log_evaluation(EVALUATIONS, is_best=True)
    take_steps(progress, 11, 15, [0.0, 0.125, 0.0, 0.125])
    progress.log_step()
    progress.log_evaluation(EVALUATIONS, is_best=False)
    progress.close()
    lines = noted_in(tmp_path)
    assert [(line["type"], line["step"], line["epoch"]) for line in lines] == [
        *(("train", 5, 0.5), ("train", 10, 1.0), ("eval", 10, 1.0)),
        *(("train", 15, 1.5), ("eval", 15, 1.5)),
    ]
    assert [line["loss"] for line in lines] == [0.5, 0.25, 0.3, 0.0625, 0.3]
    assert [line["grad_norm"] for line in lines[:2]] == [0.5, 0.125]
    assert [line["learning_rate"] for line in lines[:2]] == [1e-3 / 5, 1e-3 / 10]
    assert lines[2]["scores"] == SCORES
    assert log_lines[0].startswith("step 5/20, epoch 0.50, loss 0.5000, lr 2.00e-04, ")
    assert "train loss 0.3750, validation loss 0.3000" in log_lines[2]
    assert "f1 0.8000, accuracy undefined | majority: f1 0.7000, accuracy 0.5000" in log_lines[2]
    assert log_lines[2].endswith("| best")
    assert "train loss 0.0625" in log_lines[4]  # since the evaluation before
    totals = progress.totals()
    assert (totals["steps"], totals["epochs"], totals["train_examples"]) == (15, 1.5, 60)
    assert totals["padding_fraction"] == pytest.approx(1 - 20 / 32)
    assert totals["train_examples_per_second"] == pytest.approx(60 / totals["train_seconds"])
    assert totals["train_tokens_per_second"] == pytest.approx(300 / totals["train_seconds"])


def test_examples_with_weight_0_do_not_count(tmp_path, progress_in):
    progress = progress_in()
    nothing = {"examples": 0.0, "tokens": 0.0, "positions": 0.0, "ids": np.array([7])}
    take_steps(progress, 1, 1, [1.0, 2.0, 3.0, 4.0])
    progress.record_step(2, np.array([7]), torch.tensor(1.0), [(nothing, torch.tensor([0.0]))])
    progress.state.step = 2
    progress.log_step()
    assert noted_in(tmp_path)[0]["loss"] == 2.5
    assert progress.totals()["train_examples"] == 4


def test_sums_do_not_depend_on_when_they_are_read(tmp_path, progress_in):
    """A run that is saved, or stopped, in between must round as one that is not."""
    losses = np.random.default_rng(0).uniform(0, 3, (20, 4)).astype(np.float32).tolist()
    sums = []
    for every in (1, 3, 20):
        progress = progress_in()
        for step in range(1, 21):
            take_steps(progress, step, step, losses[step - 1])
            if step % every == 0:
                progress.sync()
        progress.sync()
        sums.append(progress.state.sums)
    assert sums[0] == sums[1] == sums[2]
    assert sums[0] == pytest.approx([np.sum(losses), 80, 400, 640])


def test_lines_that_are_refused_are_kept_and_written_later(tmp_path, log_lines, progress_in, monkeypatch):
    """As while metrics.jsonl is open in Excel."""
    progress, refusing, real = progress_in(), [], open

    def refuse(path, mode="r", **options):
        if refusing and mode == "a":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, mode, **options)

    monkeypatch.setattr("builtins.open", refuse)
    for step in range(1, 5):
        take_steps(progress, step, step, [0.0, 1.0, 0.25, 0.75])
        refusing[:] = [step] * (step in (2, 3))
        progress.log_step()
        assert [line["step"] for line in noted_in(tmp_path)] == {1: [1], 2: [1], 3: [1], 4: [1, 2, 3, 4]}[step]
    take_steps(progress, 5, 5, [0.0, 1.0, 0.25, 0.75])
    refusing.append(5)
    progress.log_step()
    refusing.clear()
    progress.close()
    assert [line["step"] for line in noted_in(tmp_path)] == [1, 2, 3, 4, 5]
    assert sum("metrics.jsonl cannot be written (Permission denied)" in line for line in log_lines) == 2  # twice opened


def test_lines_that_cannot_be_cut_back_are_told_in_two_lines(tmp_path, progress_in, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EACCES, "Permission denied")

    (tmp_path / "metrics.jsonl").write_text("")
    monkeypatch.setattr(files, "SECONDS_OF_RETRIES", 0)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(files.CannotWrite, match=r"metrics.jsonl: cannot be written.*\nIs it open in another program"):
        progress_in()


def test_time_without_training_is_left_out(progress_in, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("classifier.training.progress.time.perf_counter", lambda: now[0])
    progress = progress_in()
    take_steps(progress, 1, 4, [1.0] * 4)
    now[0] += 3
    with progress.saving():
        now[0] += 50  # a checkpoint is written
    take_steps(progress, 5, 6, [1.0] * 4)
    now[0] += 1
    progress.log_step()
    now[0] += 20
    progress.log_evaluation(EVALUATIONS, is_best=True)
    state = progress.state
    assert (state.train_seconds, state.evaluation_seconds, state.save_seconds) == (4, 20, 50)
    assert noted_in(progress.lines.parent)[0]["examples_per_second"] == 6 * 4 / 4


def test_lines_that_came_after_the_checkpoint_are_taken_out(tmp_path, progress_in):
    def line(kind, step, **more):
        return json.dumps({"type": kind, "step": step, **more}) + "\n"

    before = [line("train", 5, loss=0.1 + 0.2), line("train", 10), line("eval", 10, split="a"), line("train", 12)]
    after = [line("train", 13), line("train", 15), line("eval", 15), '{"type": "train", "st']
    (tmp_path / "metrics.jsonl").write_text("".join(before + after))
    progress_in(State(step=12, evaluated_step=10))
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before)
    # Saved at step 10 before its evaluation, which is to be repeated.
    progress_in(State(step=10, evaluated_step=5))
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(before[:2])
    progress_in(State())
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_run_that_goes_on_adds_to_what_was(tmp_path, progress_in):
    state = State(step=10, train_seconds=7.0, sums=[9.0, 40.0, 100.0, 200.0], since_line=[1.0, 4.0, 10.0, 20.0])
    state.since_evaluation = [2.0, 4.0, 10.0, 20.0]
    progress = progress_in(state)
    take_steps(progress, 11, 11, [0.0] * 4)
    progress.log_step()
    assert noted_in(tmp_path)[0]["loss"] == 1 / 8
    totals = progress.totals()
    assert totals["train_examples"] == 44 and 7 < totals["train_seconds"] < 60
    assert state.since_evaluation == [2.0, 8.0, 30.0, 52.0]


@pytest.mark.parametrize(
    ("losses", "norms", "words"),
    [
        (
            [1.0, float("nan"), 1.0, float("inf")],
            [1.0, 1.0],
            "step 1: the loss is nan; training examples, counted from 0: 0, 1",
        ),
        (
            [1.0] * 4,
            [1.0, float("inf")],
            "step 2: the norm of the gradient is inf; training examples, counted from 0: 0, 1, 2",
        ),
        ([1.0] * 4, [float("nan")] * 2, "step 1: the norm of the gradient is nan"),
    ],
)
def test_the_first_step_that_is_not_finite_is_named(progress_in, losses, norms, words):
    progress = progress_in()
    for step, norm in enumerate(norms, start=1):
        take_steps(progress, step, step, losses, norm)
    with pytest.raises(FloatingPointError, match=words):
        progress.sync()


def test_under_a_scaler_a_gradient_may_overflow(tmp_path, progress_in):
    progress = progress_in()
    progress.accelerator.scaler = torch.amp.GradScaler("cpu")
    take_steps(progress, 1, 2, [1.0] * 4, norm=float("inf"))
    progress.log_step()
    assert noted_in(tmp_path)[0]["grad_norm"] is None  # infinity is no JSON
    take_steps(progress, 3, 3, [float("nan")] * 4)
    with pytest.raises(FloatingPointError, match="step 3: the loss is nan"):
        progress.sync()


@pytest.mark.slow
def test_trackers_hear_of_one_run_of_two_processes(review_task):
    """TensorBoard, W&B without a network, and MLflow in files: each number once, all of it in the run's folder."""
    pytest.importorskip("tensorboard"), pytest.importorskip("wandb"), pytest.importorskip("mlflow")
    before = {*os.listdir(review_task.parent), "run"}
    flags = ("--task", review_task, "--max_steps", 4, "--log_every", 2, "--threads", 1, "--output_dir", "run")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    trackers = ("--trackers", "tensorboard,wandb,mlflow")
    ended = run_script(
        "train.py", *flags, *trackers, cwd=review_task.parent, launcher=TORCHRUN_2, environment=environment
    )
    assert ended.returncode == 0, ended.stderr
    assert set(os.listdir(review_task.parent)) == before
    run = review_task.parent / "run"
    losses = [line["loss"] for line in lines_of(run)]
    (noted,) = run.glob("mlruns/*/*/metrics/train/loss")
    rows = [line.split() for line in noted.read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step, *_ in rows] == list(zip(losses, (2, 4), strict=True))
    (settings,) = run.glob("mlruns/*/*/params/batch_size")
    assert settings.read_text() == "16"
    (offline,) = run.glob("wandb/offline-run-*/*.wandb")
    assert offline.read_bytes().count(b"train/loss") >= 2 and b"validation/accuracy" in offline.read_bytes()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, pytest.approx(loss)) for step, loss in zip((2, 4), losses, strict=True)
    ]


# ---------------------------------------------------------------------------------------------------------- a dry run


def dry_run_table(
    monkeypatch, log_lines, tmp_path, differences, device="npu", lengths=(10,) * 100, is_packed=True, **changes
):
    """The table that a dry run of 100 steps of 4 logs, on a device whose numbers differ so much from a CPU's."""
    args = {
        "batch_size": 4,
        "micro_batch_size": None,
        "eval_every": "epoch",
        "eval_train_rows": None,
        "keep_checkpoints": 2,
        "freeze": "none",
    }
    args = SimpleNamespace(output_dir="runs/two", **{**args, **changes})
    monkeypatch.setattr(inference, "compare_with_cpu", lambda *arguments: differences)
    monkeypatch.setattr(inference, "peak_memory", lambda device: 3 * 2**29)
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
    monkeypatch.setattr(batching, "load_steps", lambda *arguments: [[{"inputs": {}, "labels": None}]])
    plan = batching.make_plan(100, 4, seed=1, steps=100)
    model = torch.nn.Linear(1000, 1000, bias=False)
    packer = SimpleNamespace(is_packed=is_packed)
    log_dry_run(args, accelerator, model, packer, plan, examples, progress)
    return dict(line.split(maxsplit=1) for line in log_lines[-1].splitlines())


def test_a_dry_run_counts_what_is_to_come(monkeypatch, log_lines, tmp_path):
    table = dry_run_table(monkeypatch, log_lines, tmp_path, [1e-3, 2e-3])
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
    table = dry_run_table(monkeypatch, log_lines, tmp_path, [0, 0], lengths=lengths, is_packed=is_packed)
    padded = sum(2 * sum(sorted(lengths[batch])[2:]) for batch in batching.make_plan(100, 4, seed=1, steps=100))
    seconds = round((100 * 4 * 20 if is_packed else padded) / 100)  # 100 positions a second
    assert (seconds == 80) == is_packed
    assert f"(0:01:{seconds - 60:02} training" in table["time"]


def test_rows_of_train_that_are_scored_cost_time(monkeypatch, log_lines, tmp_path):
    table = dry_run_table(monkeypatch, log_lines, tmp_path, [0, 0], eval_every="10", eval_train_rows=900)
    assert table["steps"].endswith("; 10 evaluations")
    assert table["time"].startswith("0:01:30 (0:00:40 training, 0:00:50 evaluating)")  # 10 x (300 + 1000) / 300 + 7


@pytest.mark.parametrize("differences", [[0.5, 1e-3], [1e-3, 0.5], [float("nan"), 0.0], [0.0, float("nan")]])
def test_a_device_that_computes_other_numbers_is_warned_of(monkeypatch, log_lines, tmp_path, differences):
    dry_run_table(monkeypatch, log_lines, tmp_path, differences)
    assert log_lines[0].startswith("WARNING: NPU RESULTS DIFFER FROM THE CPU'S: largest difference")


def test_a_cpu_is_not_compared_with_itself(monkeypatch, log_lines, tmp_path):
    assert "check" not in dry_run_table(monkeypatch, log_lines, tmp_path, [1.0, 1.0], device="cpu")
