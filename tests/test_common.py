"""Flags, exit codes, start-up, losses and scores."""

import ctypes
import gc
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
from classifier import processes
from classifier.data.labels import majority_prediction, prediction_columns, prediction_rows, probabilities
from classifier.data.tasks import Task
from classifier.messages import BadInput, Preempted, RunFailed
from classifier.model.models import load_model

TWO = Task(name="two", text=["text"], labels=["negative", "positive"], metrics=["accuracy", "f1"])
NUMBER = Task(name="number", text=["text"], labels="regression", metrics=["pearson"])
MANY = Task(
    name="many",
    text=["text"],
    labels=["a", "b", "c"],
    problem="multi_label",
    separator="; ",
    metrics=["f1_micro", "f1_macro", "accuracy"],
)


# ---------------------------------------------------------------------------------------------------------- processes


def exit_of(function, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        processes.run(function)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def test_bad_input_is_two_lines_and_exit_code_2(monkeypatch, capsys):
    code, errors = exit_of(raising(BadInput("no such thing", "look elsewhere")), monkeypatch, capsys)
    assert (code, errors) == (2, "train.py: error: no such thing\ntrain.py: look elsewhere\n")


def test_a_signal_is_exit_code_75_and_a_run_that_cannot_go_on_1(monkeypatch, capsys):
    assert exit_of(raising(Preempted("SIGTERM: saved")), monkeypatch, capsys) == (
        75,
        "train.py: SIGTERM: saved\n",
    )
    assert exit_of(raising(RunFailed("no\nroom")), monkeypatch, capsys) == (1, "train.py: error: no\nroom\n")


def test_divergence_and_interruption_are_exit_code_1_without_a_traceback(monkeypatch, capsys):
    assert exit_of(raising(FloatingPointError("step 3")), monkeypatch, capsys) == (1, "train.py: error: step 3\n")
    code, errors = exit_of(raising(KeyboardInterrupt()), monkeypatch, capsys)
    assert code == 1
    assert "Traceback" not in errors


def test_other_errors_keep_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        processes.run(raising(ZeroDivisionError()))


def test_wrong_flags_are_bad_input():
    parser = common.argument_parser("words", data=True)
    common.add_machine_arguments(parser)
    for wrong in (
        ["--nonsense"],
        ["--threads", "0"],
        ["--threads", "many"],
        ["--mixed_precision", "fp8"],
        ["--tas", "x"],
    ):
        with pytest.raises(BadInput):
            parser.parse_args(wrong)


@pytest.mark.parametrize("text", ["1", "-0.1", "nan"])
def test_a_share_is_from_0_to_below_1(text):
    parser = common.argument_parser("words")
    parser.add_argument("--warmup_ratio", type=common.fraction)
    with pytest.raises(BadInput):
        parser.parse_args(["--warmup_ratio", text])
    assert parser.parse_args(["--warmup_ratio", "0.1"]).warmup_ratio == 0.1


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_help_reads_like_a_page(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert f"python {script}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


SLOW_IMPORTS = {"torch", "transformers", "accelerate", "datasets", "evaluate", "sklearn", "scipy", "pandas", "pyarrow"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--nonsense"], ["no such file"]], ids=lambda arguments: arguments[0]
)
@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_help_and_mistakes_do_not_wait_for_imports_of_seconds(tmp_path, script, arguments):
    if arguments == ["no such file"]:
        model = [] if script == "train.py" else ["--model", "model"]
        flag = {"train.py": "--train_file", "evaluate.py": "--file", "predict.py": "--input"}[script]
        arguments = [*model, flag, "none.csv"]
    command = [sys.executable, "-X", "importtime", ROOT / script, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if arguments == ["--help"] else 2)
    assert "none.csv" not in arguments or "none.csv: no such file" in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "numpy" in imported  # so the names are read aright
    assert imported & SLOW_IMPORTS == set()


def test_garbage_is_collected_again_after_the_imports(tiny_bert, monkeypatch, capsys):
    were_collected = []
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def main():
        were_collected.append(gc.isenabled())
        load_model(str(tiny_bert), TWO)
        were_collected.append(gc.isenabled())

    processes.run(main)
    assert were_collected == [False, True]
    exit_of(raising(BadInput("no", "yes")), monkeypatch, capsys)
    assert gc.isenabled()


# -------------------------------------------------------------------------------------------------- losses and scores


def test_losses_are_per_example_and_their_mean_is_torchs_own():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(20, 2, generator=generator), torch.randint(2, (20,), generator=generator)
    losses = common.example_losses(TWO, logits, labels)
    assert losses.shape == (20,)
    torch.testing.assert_close(losses.mean(), torch.nn.CrossEntropyLoss()(logits, labels))
    smooth = common.example_losses(TWO, logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(smooth.mean(), torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels))
    weights = torch.tensor([0.5, 2.0])
    weighted = common.example_losses(TWO, logits, labels, class_weights=weights)
    expected = torch.nn.CrossEntropyLoss(weight=weights, reduction="sum")(logits, labels)
    torch.testing.assert_close(weighted.sum(), expected)
    values = torch.randn(20, 1, generator=generator)
    squared = common.example_losses(NUMBER, values, labels.double())
    torch.testing.assert_close(squared.mean(), torch.nn.MSELoss()(values[:, 0], labels.float()))


def test_evaluation_takes_the_argmax_and_the_majority_is_that_of_the_training_labels():
    logits = np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]], dtype=np.float32)
    task = Task(name="", text=["text"], labels=["a", "b"], metrics=["accuracy", "f1"])
    result = common.score_logits(task, logits, np.array([0, 1, 0, 0]), majority=1)
    assert result["predictions"].tolist() == [0, 1, 1, 0]
    assert result["scores"] == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert result["majority"] == {"accuracy": 0.25, "f1": pytest.approx(0.4)}
    assert majority_prediction(task, np.array([1, 1, 0])) == 1
    assert majority_prediction(NUMBER, np.array([1.0, 2.0, 6.0])) == 3.0
    regression = common.score_logits(NUMBER, np.array([[1.5], [2.0]]), np.array([1.0, 2.0]), majority=3.0)
    assert regression["majority"] == {"pearson": None}


@pytest.mark.parametrize(
    ("task", "logits", "labels", "constant"),
    [
        (TWO, [[0, 1], [0, 2], [5, 6]], [0, 1, 1], 1),
        (TWO, [[1, 0], [3, 2], [5, 4]], [0, 1, 1], 0),
        (TWO, [[0, 1], [0, 2], [7, 6]], [0, 1, 1], None),
        (TWO, [[0, 1]], [1], None),  # one prediction is always the same
        (NUMBER, [[0.5], [0.5]], [1.0, 2.0], 0.5),
        (NUMBER, [[0.5], [0.25]], [1.0, 2.0], None),
        (MANY, [[1, -1, 2], [3, -4, 5]], [[1, 0, 0], [0, 1, 1]], [1, 0, 1]),
        (MANY, [[1, -1, 2], [3, 4, 5]], [[1, 0, 0], [0, 1, 1]], None),
    ],
)
@pytest.mark.filterwarnings("ignore:pearson is undefined")
def test_one_prediction_for_all_is_told(task, logits, labels, constant):
    majority = [1, 1, 1] if task is MANY else 1
    result = common.score_logits(task, np.array(logits, dtype=np.float32), np.array(labels), majority)
    assert result["constant"] == constant
    json.dumps(result["constant"])  # it is kept in a checkpoint


def test_focal_losses_are_those_of_the_formula_and_have_a_slope_everywhere():
    """(1 - p) ** gamma times the cross entropy, for classes and, label by label, for several labels."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 3, generator=generator), torch.arange(9) % 3
    right = logits.softmax(-1)[range(9), labels]
    focal = common.example_losses(TWO, logits, labels, focal_gamma=2.0)
    torch.testing.assert_close(focal, -((1 - right) ** 2) * right.log())
    several = torch.randint(2, (9, 3), generator=generator)
    right = torch.where(several == 1, logits.sigmoid(), 1 - logits.sigmoid())
    focal = common.example_losses(MANY, logits, several, focal_gamma=0.5)
    torch.testing.assert_close(focal, -((1 - right) ** 0.5 * right.log()).mean(-1))
    sure = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    common.example_losses(TWO, sure, torch.tensor([0]), focal_gamma=0.5).sum().backward()
    assert sure.grad.isfinite().all()


def test_weights_of_several_labels_count_their_positives():
    logits = torch.tensor([[1.0, -2.0, 0.5]])
    losses = common.example_losses(MANY, logits, torch.tensor([[1, 0, 1]]), class_weights=torch.tensor([3.0, 2.0, 1.0]))
    p = logits.sigmoid()[0]
    torch.testing.assert_close(losses[0], -(3 * p[0].log() + (1 - p[1]).log() + p[2].log()) / 3)


def test_losses_of_several_labels_are_the_binary_cross_entropy_that_transformers_takes(tiny_bert):
    """One loss per example, the mean over its labels; their mean is the loss of transformers' own multi-label head."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, 3, generator=generator), torch.randint(2, (9, 3), generator=generator)
    losses = common.example_losses(MANY, logits, labels.to(torch.int8))
    probabilities = 1 / (1 + torch.exp(-logits))
    by_hand = -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log()).mean(1)
    torch.testing.assert_close(losses, by_hand)
    model, tokenizer, _ = load_model(str(tiny_bert), MANY)
    assert model.config.problem_type == "multi_label_classification"
    inputs = tokenizer(["the room was good .", "bad"], padding=True, return_tensors="pt")
    output = model.eval()(**inputs, labels=labels[:2].float())
    torch.testing.assert_close(common.example_losses(MANY, output.logits, labels[:2]).mean(), output.loss)


def test_several_labels_are_those_above_one_half_and_the_majority_is_of_each_label():
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=np.int8)
    assert majority_prediction(MANY, labels) == [1, 0, 0]  # b: exactly a half is no majority
    logits = np.array([[2, 1, -1], [3, -1, -1], [-1, 1, -1], [-4, -5, 0]], dtype=np.float32)
    result = common.score_logits(MANY, logits, labels, majority=[1, 0, 0])
    assert result["predictions"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    # tp, fp, fn: a 2 0 1, b 2 0 0, c 0 0 1
    assert result["scores"] == {"f1_micro": pytest.approx(8 / 10), "f1_macro": pytest.approx(1.8 / 3), "accuracy": 0.5}
    # a 3 1 0, b 0 0 2, c 0 0 1
    majority = {"f1_micro": pytest.approx(6 / 10), "f1_macro": pytest.approx(6 / 7 / 3), "accuracy": 0.25}
    assert result["majority"] == majority


def test_predictions_of_several_labels_are_joined_and_have_the_probability_of_them_all():
    logits = np.log(np.array([[3, 1 / 3, 4], [1 / 9, 1 / 3, 1 / 4], [1, 1, 1]], dtype=np.float64))
    rows = list(prediction_rows(MANY, logits))
    assert prediction_columns(MANY)[2:] == ["probability_a", "probability_b", "probability_c"]
    assert rows[0] == ["a; c", *map(pytest.approx, (0.75 * 0.75 * 0.8, 0.75, 0.25, 0.8))]
    assert rows[1] == ["", *map(pytest.approx, (0.9 * 0.75 * 0.8, 0.1, 0.25, 0.2))]
    assert rows[2] == ["", 0.125, 0.5, 0.5, 0.5]  # above a half, as a logit above 0
    extremes = probabilities(MANY, np.array([[-1e30, 1e30, 0]], dtype=np.float32))
    assert extremes.tolist() == [[pytest.approx(0, abs=1e-300), 1.0, 0.5]]


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="1 of 2 examples"):
        common.score_logits(TWO, np.array([[0.0, np.nan], [0.0, 1.0]], dtype=np.float32), np.array([0, 1]), majority=0)


def test_predictions_carry_probabilities_that_sum_to_one():
    logits = np.array([[1000.0, 0.0], [0.0, np.log(3)]], dtype=np.float32)
    rows = list(prediction_rows(TWO, logits))
    assert prediction_columns(TWO) == [
        *("predicted_label", "probability"),
        *("probability_negative", "probability_positive"),
    ]
    assert rows[0] == ["negative", 1.0, 1.0, 0.0]
    assert rows[1] == ["positive", *map(pytest.approx, (0.75, 0.25, 0.75))]
    assert list(prediction_rows(NUMBER, np.array([[0.5]]))) == [[0.5]]


# ------------------------------------------------------------------------------------------------ facts we rely on


def test_the_launchers_accumulation_is_overruled(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    args = SimpleNamespace(mixed_precision="no", threads=None)
    accelerator = processes.start(args)
    assert accelerator.gradient_accumulation_steps == 1
    assert "gradient_accumulation_steps=4 is ignored" in capsys.readouterr().out


def test_one_process_that_was_to_be_two_stops(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(BadInput, match="asked for several processes"):
        processes.start(SimpleNamespace(mixed_precision="no", threads=None))


FRESH_PAGES = """
import resource, sys, torch
from types import SimpleNamespace
from classifier import processes
if sys.argv[1] == "fresh":
    processes.keep_freed_memory = lambda: None
processes.start(SimpleNamespace(mixed_precision="no", threads=1), stream=sys.stderr)
for round in range(6):
    if round == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(size) for size in (100, 20_000_000, 3_000_000)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc")
def test_memory_that_was_freed_is_used_again():
    """Four rounds of 92 MB, in pages of 2 MB, or of 4 kB."""
    faults = {}
    for what in ("kept", "fresh"):
        command = [sys.executable, "-c", FRESH_PAGES, what]
        faults[what] = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert faults["kept"] < 20 and faults["fresh"] > 4 * 40, faults
