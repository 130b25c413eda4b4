"""Flags, exit codes, the choice of processes, models and their heads, losses and baselines."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, WORDS, bert_config
from safetensors.torch import load_file, save_file

import common
from reader import BadInput
from tasks import Task

TWO = Task(name="two", text=["text"], labels=["negative", "positive"])
NUMBER = Task(name="number", text=["text"], labels="regression", metrics=["pearson"])


# ---------------------------------------------------------------------------------------------------------- processes


def exit_of(function, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        common.run(function)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


def test_bad_input_is_two_lines_and_exit_code_2(monkeypatch, capsys):
    code, errors = exit_of(raising(BadInput("no such thing", "look elsewhere")), monkeypatch, capsys)
    assert (code, errors) == (2, "train.py: error: no such thing\ntrain.py: look elsewhere\n")


def test_divergence_and_interruption_are_exit_code_1_without_a_traceback(monkeypatch, capsys):
    assert exit_of(raising(FloatingPointError("step 3")), monkeypatch, capsys) == (1, "train.py: error: step 3\n")
    code, errors = exit_of(raising(KeyboardInterrupt()), monkeypatch, capsys)
    assert code == 1
    assert "Traceback" not in errors


def test_other_errors_keep_their_traceback(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        common.run(raising(ZeroDivisionError()))


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
    parser.add_argument("--warmup_ratio", type=common.share)
    with pytest.raises(BadInput):
        parser.parse_args(["--warmup_ratio", text])
    assert parser.parse_args(["--warmup_ratio", "0.1"]).warmup_ratio == 0.1


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "predict.py"])
def test_help_reads_like_a_page(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert f"python {script}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


# ------------------------------------------------------------------------------------------------------------- models


def test_a_base_model_gets_a_new_head_with_the_tasks_labels(tiny_bert, caplog):
    model, tokenizer, facts = common.load_model(str(tiny_bert), TWO)
    assert facts["new"] == ["classifier.bias", "classifier.weight"]
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.problem_type == "single_label_classification"
    assert tokenizer.model_input_names == ["input_ids", "token_type_ids", "attention_mask"]
    loaded, saved = model.bert.state_dict(), load_file(tiny_bert / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())


def test_a_mapping_is_trained_from_scratch_with_its_own_vocabulary(vocabulary):
    model, tokenizer, facts = common.load_model(bert_config(vocabulary), TWO)
    assert facts["new"] == ["every weight"]
    assert model.config.vocab_size == len(tokenizer) == len(WORDS) + 5
    assert tokenizer.tokenize("The ROOM was") == ["the", "room", "was"]


def test_a_vocabulary_that_is_not_there_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="no such vocabulary file"):
        common.load_model(bert_config(tmp_path / "nowhere.txt"), TWO)


def save_classifier(folder, tiny_bert, labels):
    model, tokenizer, _ = common.load_model(str(tiny_bert), Task(name="", text=["text"], labels=labels))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_head_for_the_same_labels_is_kept(tmp_path, tiny_bert):
    before = save_classifier(tmp_path, tiny_bert, TWO.labels)
    model, _, facts = common.load_model(str(tmp_path), TWO)
    assert facts["new"] == []
    assert torch.equal(model.classifier.weight, before.classifier.weight)


@pytest.mark.parametrize("labels", [["happy", "sad"], ["positive", "negative"], ["a", "b", "c"]])
def test_a_head_for_other_labels_is_replaced_never_taken_by_position(tmp_path, tiny_bert, labels):
    before = save_classifier(tmp_path, tiny_bert, labels)
    model, _, facts = common.load_model(str(tmp_path), TWO)
    assert facts["new"] == ["classifier.bias", "classifier.weight"]
    assert model.classifier.weight.shape == (2, 32)
    assert not torch.equal(model.classifier.weight, before.classifier.weight[:2])
    assert torch.equal(model.bert.pooler.dense.weight, before.bert.pooler.dense.weight)


def test_evaluation_matches_labels_by_name_and_refuses_others(tmp_path, tiny_bert):
    save_classifier(tmp_path, tiny_bert, ["positive", "negative"])
    model, _, facts = common.load_model(str(tmp_path))
    assert common.with_labels_of(model, facts, TWO).labels == ["positive", "negative"]
    with pytest.raises(BadInput, match="positive, negative"):
        common.with_labels_of(model, facts, Task(name="", text=["text"], labels=["a", "b"]))
    with pytest.raises(BadInput, match="regression"):
        common.with_labels_of(model, facts, NUMBER)
    model, _, facts = common.load_model(str(tiny_bert))
    with pytest.raises(BadInput, match="no trained head"):
        common.with_labels_of(model, facts, TWO)


def test_weights_are_float32_whatever_the_checkpoint_holds(tmp_path, tiny_bert):
    model = save_classifier(tmp_path, tiny_bert, TWO.labels)
    model.half().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    loaded, _, _ = common.load_model(str(tmp_path), TWO)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_broken_model_folders_are_bad_input(tmp_path, tiny_bert):
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    weights = load_file(tmp_path / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"classifier\.bias hold NaN"):
        common.load_model(str(tmp_path), TWO)
    (tmp_path / "config.json").unlink()
    with pytest.raises(BadInput, match="cannot be loaded"):
        common.load_model(str(tmp_path), TWO)


def test_half_a_weights_file_is_bad_input(tmp_path, tiny_bert):
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match="cannot be loaded"):
        common.load_model(str(tmp_path), TWO)


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
    result = common.evaluate(task, logits, [0, 1, 0, 0])
    assert result["predictions"].tolist() == [0, 1, 1, 0]
    assert result["scores"] == {"accuracy": 0.75, "f1": pytest.approx(2 / 3)}
    assert common.majority(task, np.array([1, 1, 0])) == 1
    assert common.majority_scores(task, 1, [0, 1, 0, 0]) == {"accuracy": 0.25, "f1": pytest.approx(0.4)}
    assert common.majority(NUMBER, np.array([1.0, 2.0, 6.0])) == 3.0
    assert common.majority_scores(NUMBER, 3.0, [1.0, 2.0]) == {"pearson": None}


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="1 of 2 examples"):
        common.evaluate(TWO, np.array([[0.0, np.nan], [0.0, 1.0]], dtype=np.float32), [0, 1])


def test_predictions_carry_probabilities_that_sum_to_one():
    logits = np.array([[1000.0, 0.0], [0.0, np.log(3)]], dtype=np.float32)
    rows = list(common.prediction_rows(TWO, logits))
    assert common.prediction_columns(TWO) == [
        *("predicted_label", "probability"),
        *("probability_negative", "probability_positive"),
    ]
    assert rows[0] == ["negative", 1.0, 1.0, 0.0]
    assert rows[1] == ["positive", *map(pytest.approx, (0.75, 0.25, 0.75))]
    assert list(common.prediction_rows(NUMBER, np.array([[0.5]]))) == [[0.5]]


# ------------------------------------------------------------------------------------------------ facts we rely on


def test_no_trained_code_of_a_model_folder_is_run(tmp_path, tiny_bert):
    """A folder with auto_map would ask on the terminal, unless trust_remote_code=False is passed."""
    save_classifier(tmp_path, tiny_bert, TWO.labels)
    content = json.loads((tmp_path / "config.json").read_text())
    content["auto_map"] = {"AutoConfig": "trap.Config", "AutoModelForSequenceClassification": "trap.Model"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    common.load_model(str(tmp_path), TWO)
    assert not (tmp_path / "sprung").exists()


def test_the_launchers_accumulation_is_overruled(monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    args = SimpleNamespace(mixed_precision="no", threads=None)
    accelerator = common.start(args)
    assert accelerator.gradient_accumulation_steps == 1
    assert "gradient_accumulation_steps=4 is ignored" in capsys.readouterr().out


def test_one_process_that_was_to_be_two_stops(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(BadInput, match="asked for several processes"):
        common.start(SimpleNamespace(mixed_precision="no", threads=None))
