"""The folder of a run: claimed, refused, emptied; weights complete or absent."""

import json
import os
import stat

import pytest
import torch
from transformers import BertTokenizer

import checkpoint
import common
from reader import BadInput
from tasks import Task

TASK = Task(name="reviews", text=["text"], labels=["negative", "positive"], files={"train": "train.csv"})
SETTINGS = {"learning_rate": 0.1, "seed": 1}
DATA = {"train": "abc"}


@pytest.fixture
def finished(tmp_path):
    checkpoint.begin(tmp_path / "run", SETTINGS, DATA)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"steps": 7}')
    checkpoint.write_state(tmp_path / "run", "done")
    return tmp_path / "run"


def test_a_new_or_empty_folder_may_be_used(tmp_path):
    assert checkpoint.look_at(tmp_path / "new", SETTINGS, DATA) is None
    assert checkpoint.look_at(tmp_path, SETTINGS, DATA) is None


def test_a_finished_run_gives_its_results_and_overwrite_starts_again(finished):
    assert checkpoint.look_at(finished, SETTINGS, DATA) == {"steps": 7}
    assert checkpoint.look_at(finished, SETTINGS, DATA, overwrite=True) is None


def test_other_settings_or_data_are_refused_with_the_differences(finished):
    with pytest.raises(BadInput, match=r"learning_rate: 0\.1 before, 0\.2 now"):
        checkpoint.look_at(finished, {**SETTINGS, "learning_rate": 0.2}, DATA)
    with pytest.raises(BadInput, match="data: other rows"):
        checkpoint.look_at(finished, SETTINGS, {"train": "abd"})


@pytest.mark.parametrize("status", ["running", "failed"])
def test_an_unfinished_run_is_refused_with_advice(finished, status):
    checkpoint.write_state(finished, status, "the power went")
    with pytest.raises(BadInput, match=r"did not finish .*\n.*--overwrite"):
        checkpoint.look_at(finished, SETTINGS, DATA)


def test_files_that_are_no_run_are_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(BadInput, match="holds no run"):
            checkpoint.look_at(tmp_path, SETTINGS, DATA, overwrite)
    assert (tmp_path / "thesis.txt").exists()


def test_begin_removes_what_a_run_left_and_nothing_else(finished):
    (finished / "notes.txt").write_text("mine")
    (finished / "bad_rows.csv").write_text("split,file,row,reason\n")
    checkpoint.begin(finished, SETTINGS, DATA)
    assert sorted(file.name for file in finished.iterdir()) == ["notes.txt", "state.json"]
    assert json.loads((finished / "state.json").read_text())["status"] == "running"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_bad_input(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="cannot be written"):
        checkpoint.begin(tmp_path / "run", SETTINGS, DATA)


@pytest.mark.parametrize(
    ("error", "reason"), [(KeyboardInterrupt(), "interrupted"), (ValueError("no\nmore"), "no"), (OSError(), "OSError")]
)
def test_a_failure_is_noted_and_goes_on(finished, error, reason):
    with pytest.raises(type(error)), checkpoint.failure_noted(finished):
        raise error
    state = json.loads((finished / "state.json").read_text())
    assert (state["status"], state["reason"], state["settings"]) == ("failed", reason, SETTINGS)


@pytest.fixture
def model(tiny_bert):
    return common.load_model(str(tiny_bert), TASK)[0]


def test_the_best_weights_replace_those_before_and_come_back_as_they_were(tmp_path, model):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.save_best(tmp_path, 10, model)
    torch.nn.init.ones_(model.classifier.weight)
    checkpoint.save_best(tmp_path, 20, model)
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000020"]
    torch.nn.init.zeros_(model.classifier.weight)
    checkpoint.load_best(tmp_path, 20, model)
    assert (model.classifier.weight == 1).all()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if "bert" in name)


def test_a_finished_run_without_its_model_is_refused(finished):
    (finished / "model").rmdir()
    with pytest.raises(BadInput, match="are gone"):
        checkpoint.look_at(finished, SETTINGS, DATA)


def test_a_failed_save_keeps_the_weights_before(tmp_path, model, monkeypatch):
    checkpoint.save_best(tmp_path, 10, model)
    monkeypatch.setattr(model, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save_best(tmp_path, 20, model)
    checkpoint.load_best(tmp_path, 10, model)
    assert not (tmp_path / "checkpoints" / "step-00000020").exists()


def test_the_model_folder_is_whole_readable_and_the_last_thing_written(tmp_path, model, vocabulary):
    checkpoint.begin(tmp_path, SETTINGS, DATA)
    checkpoint.save_best(tmp_path, 10, model)
    results = {"scores": {}, "majority_baseline": {}, "best_step": 10, "mixed_precision": "no"}
    mask = os.umask(0o027)
    try:
        checkpoint.write_model(tmp_path, model, BertTokenizer(str(vocabulary)), TASK, DATA, 1, results, "a card")
    finally:
        os.umask(mask)
    files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert files.keys() == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("task.json", "metrics.json", "README.md"),
    }
    assert set(files.values()) == {0o640}  # safetensors alone would leave 0600, which the group cannot read
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model", "results.json", "state.json"]
    assert json.loads((tmp_path / "state.json").read_text())["status"] == "done"
    assert checkpoint.trained(tmp_path / "model") == ("no", 1)
    assert checkpoint.trained(tmp_path) == ("auto", None)


def test_a_model_is_found_in_its_run(tmp_path, tiny_bert):
    assert checkpoint.model_folder(tiny_bert) == str(tiny_bert)
    assert checkpoint.model_folder("org/name") == "org/name"
    (tmp_path / "model").mkdir()
    with pytest.raises(BadInput, match="holds no model"):
        checkpoint.model_folder(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert checkpoint.model_folder(tmp_path) == str(tmp_path / "model")
