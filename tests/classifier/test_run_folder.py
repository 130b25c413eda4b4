"""A run's folder: whose it is, what state.json says of it, the model folder at the end."""

import builtins
import errno
import io
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
import transformers
from run_help import DATA, RESULTS, SETTINGS, TASK, fill, names, record
from test_preemption import state_of
from transformers import BertTokenizer

from classifier import files
from classifier.files import code_digests
from classifier.messages import BadInput, Preempted, RunFailed
from classifier.model.models import load_model, model_folder, saved_metrics
from classifier.training import checkpoint, run_folder


def test_a_new_or_empty_folder_may_be_used(tmp_path):
    assert run_folder.finished_results(tmp_path / "new", SETTINGS, DATA) is None
    assert run_folder.finished_results(tmp_path, SETTINGS, DATA) is None
    (tmp_path / "lock.json").touch()  # of a run that did not come to writing more
    assert run_folder.finished_results(tmp_path, SETTINGS, DATA, resume="never") is None


def test_a_finished_run_gives_its_results_and_overwrite_starts_again(finished):
    assert run_folder.finished_results(finished, SETTINGS, DATA) == {"steps": 7}
    assert run_folder.finished_results(finished, SETTINGS, DATA, overwrite=True) is None


def test_a_finished_run_says_what_code_has_changed_since(finished, told, monkeypatch):
    run_folder.finished_results(finished, SETTINGS, DATA)
    assert "code changed" not in told.text
    digests = code_digests()
    monkeypatch.setattr(run_folder, "code_digests", lambda: {**digests, "common.py": "edited"})
    assert run_folder.finished_results(finished, SETTINGS, DATA) == {"steps": 7}
    assert "code changed since this run began: common.py" in told.text


def test_a_finished_run_has_no_use_for_checkpoints(finished):
    (finished / "checkpoints" / "step-00000003").mkdir(parents=True)  # it was killed while it removed them
    assert run_folder.finished_results(finished, SETTINGS, DATA) == {"steps": 7}
    assert not (finished / "checkpoints").exists()


@pytest.mark.parametrize("gone", ["model", "results.json"])
def test_a_finished_run_without_its_model_or_results_is_refused(finished, gone):
    shutil.rmtree(finished / gone) if gone == "model" else (finished / gone).unlink()
    with pytest.raises(BadInput, match="are gone"):
        run_folder.finished_results(finished, SETTINGS, DATA)


def test_other_settings_or_data_are_refused_with_the_differences(finished):
    with pytest.raises(BadInput, match=r"learning_rate: 0\.1 before, 0\.2 now"):
        run_folder.finished_results(finished, {**SETTINGS, "learning_rate": 0.2}, DATA)
    with pytest.raises(BadInput, match="data: other rows"):
        run_folder.finished_results(finished, SETTINGS, {"train": "abd"})
    with pytest.raises(BadInput, match="new: None before, 3 now; seed: 1 before, None now"):
        run_folder.finished_results(finished, {"learning_rate": 0.1, "new": 3}, DATA)
    assert run_folder.finished_results(finished, {**SETTINGS, "learning_rate": 0.2}, DATA, overwrite=True) is None


@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_an_unfinished_run_may_go_on(finished, status):
    run_folder.write_state(finished, status, "the power went")
    assert run_folder.finished_results(finished, SETTINGS, DATA) is None
    with pytest.raises(BadInput, match="learning_rate"):
        run_folder.finished_results(finished, {**SETTINGS, "learning_rate": 0.2}, DATA)


@pytest.mark.parametrize("status", ["running", "done"])
def test_resume_never_wants_an_empty_folder(finished, status):
    run_folder.write_state(finished, status)
    with pytest.raises(BadInput, match="holds a run"):
        run_folder.finished_results(finished, SETTINGS, DATA, resume="never")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("thesis.txt", "years of work"),
        ("state.json", "{}"),
        ("state.json", "[1]"),
        ("state.json", '{"settings": 3, "data": 4}'),
        ("state.json", "no JSON"),
        ("state.json", ""),
    ],
)
def test_files_that_are_no_run_are_never_touched(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    for overwrite in (False, True):
        with pytest.raises(BadInput, match="contains no run"):
            run_folder.finished_results(tmp_path, SETTINGS, DATA, overwrite=overwrite)
    assert (tmp_path / name).read_text() == content


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput, match="is a file, not a folder"):
            run_folder.finished_results(path, SETTINGS, DATA)
    with pytest.raises(BadInput, match="cannot be a folder"):
        run_folder.finished_results(tmp_path / ("x" * 300), SETTINGS, DATA)


def test_overwrite_removes_what_a_run_left_and_nothing_else(finished):
    (finished / "notes.txt").write_text("mine")
    for name in ("bad_rows.csv", "metrics.jsonl"):
        (finished / name).write_text("old")
    for name in ("tensorboard", "checkpoints/step-00000003"):
        (finished / name).mkdir(parents=True)
    assert checkpoint.begin_or_resume(finished, SETTINGS, DATA, overwrite=True) == (None, None)
    # The old model stays until there is a new one.
    assert names(finished) == ["model", "notes.txt", "state.json"]
    assert state_of(finished)["status"] == "running"


def test_what_a_killed_run_left_half_is_removed(finished):
    (finished / "state.json.123.tmp").write_text("{")
    (finished / "results.json.123.tmp").write_text("{")
    (finished / "checkpoints" / "step-00000003.tmp").mkdir(parents=True)
    (finished / "checkpoints" / "step-00000003.tmp" / "model.safetensors").touch()
    (finished / "model.tmp").mkdir()
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    assert names(finished) == ["checkpoints", "model", "results.json", "state.json"]
    assert names(finished / "checkpoints") == []


def test_other_code_is_said_and_goes_on(finished, told, monkeypatch):
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    assert "other code" not in told.text
    code = state_of(finished)["code"]
    assert {"train.py", "classifier/training/checkpoint.py", "torch"} <= code.keys()
    run_folder.write_state(finished, "failed", code={**code, "train.py": "0123", "torch": "1.0"})
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    assert "code changed since this run began: train.py, torch" in told.text
    assert state_of(finished)["code"] == code


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "failed", "interrupted"),
        (ValueError("no\nmore"), "failed", "no"),
        (OSError(), "failed", "OSError"),
        (SystemExit(1), "failed", "1"),
        (Preempted("SIGTERM: gone"), "preempted", "SIGTERM: gone"),
    ],
)
def test_a_failure_is_noted_and_goes_on(finished, accelerator, error, status, reason):
    with pytest.raises(type(error)), run_folder.hold(finished, accelerator, checkpoint.State()):
        checkpoint.begin_or_resume(finished, SETTINGS, DATA)
        raise error
    state = state_of(finished)
    assert (state["status"], state["reason"], state["settings"]) == (status, reason, SETTINGS)
    assert not (finished / "lock.json").exists()


def test_what_fails_before_the_run_began_changes_nothing(finished, accelerator):
    for error in (BadInput("wrong", "mend it"), Preempted("SIGINT")):
        with pytest.raises(type(error)), run_folder.hold(finished, accelerator, checkpoint.State()):
            raise error
    assert state_of(finished)["status"] == "done"
    with pytest.raises(BadInput), run_folder.hold(finished.parent / "new", accelerator, checkpoint.State()):
        raise BadInput("wrong", "mend it")
    assert not (finished.parent / "new").exists()


def test_the_first_process_that_fails_is_believed(finished):
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    run_folder.record_end(finished, "failed", "the disk is on fire")
    run_folder.record_end(finished, "failed", "connection closed by peer")
    assert state_of(finished)["reason"] == "the disk is on fire"


@pytest.mark.parametrize(
    ("size", "words", "half"), [(8, "resumes with micro-batches of 4", 4), (5, "of 3", 3), (1, "--gradient_ch", 1)]
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_notes_half_the_micro_batch(finished, accelerator, size, words, half, error):
    state = checkpoint.State()
    with pytest.raises(RunFailed, match=words), run_folder.hold(finished, accelerator, state) as folder:
        assert folder == finished
        checkpoint.begin_or_resume(finished, SETTINGS, DATA)
        state.micro_batch_size = size
        raise error
    assert state_of(finished)["micro_batch_size"] == half
    assert state_of(finished)["reason"] == f"out of memory with {size} examples at a time"
    assert checkpoint.begin_or_resume(finished, SETTINGS, DATA) == (None, half)
    assert checkpoint.begin_or_resume(finished, SETTINGS, DATA, overwrite=True) == (None, None)


def test_the_model_folder_is_whole_readable_and_the_last_thing_written(tmp_path, tiny_bert, vocabulary, monkeypatch):
    model = load_model(str(tiny_bert), TASK)[0]
    checkpoint.begin_or_resume(tmp_path, SETTINGS, DATA)
    (tmp_path / "checkpoints").mkdir()
    events = record(monkeypatch)
    mask = os.umask(0o027)
    try:
        run_folder.write_model(
            tmp_path, checkpoint.State(), model, BertTokenizer(str(vocabulary)), TASK, DATA, 1, RESULTS, "a card"
        )
    finally:
        os.umask(mask)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "model").iterdir()}
    assert modes.keys() == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("task.json", "metrics.json", "README.md"),
    }
    assert set(modes.values()) == {0o640}
    assert names(tmp_path) == ["model", "results.json", "state.json"]
    assert state_of(tmp_path)["status"] == "done"
    assert saved_metrics(tmp_path / "model") == {**RESULTS, "majority": 1}
    assert saved_metrics(tmp_path) == {}
    renamed = [Path(event[2]).name for event in events if event[0] == "rename"]
    assert renamed[-3:] == ["model", "results.json", "state.json"]  # "done" is said once all is there
    synced = {event[1] for event in events if event[0] == "sync"}
    assert {f"{tmp_path}/model.tmp/{name}" for name in modes} <= synced


def test_a_model_that_cannot_be_written_leaves_the_old_one(finished, tiny_bert, vocabulary, monkeypatch):
    model = load_model(str(tiny_bert), TASK)[0]
    (finished / "model" / "old").touch()
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    fill(finished / "checkpoints", "kept")

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_text", full)
    monkeypatch.chdir(finished.parent)
    monkeypatch.setattr(tempfile, "tempdir", str(finished.parent))
    with pytest.raises(
        RunFailed, match=r"model could not be written: .*No space.*\nFix this, then .* the same command"
    ):
        run_folder.write_model(
            finished, checkpoint.State(), model, BertTokenizer(str(vocabulary)), TASK, DATA, 1, RESULTS, "a card"
        )
    assert names(finished.parent) == ["run"]  # where no place can take it, none is left with a half
    assert names(finished) == ["checkpoints", "model", "results.json", "state.json"]
    assert names(finished / "model") == ["old"] and names(finished / "checkpoints") == ["file"]
    assert state_of(finished)["status"] == "running"


def refuse_from(number, folder, error, monkeypatch):
    """Refuse whatever writes into a folder from the call of this number on; return the calls before that."""
    calls = []

    def refusing(module, name, is_meant):
        real = getattr(module, name)

        def call(*given, **options):
            if is_meant(*given, **options):
                if len(calls) >= number:
                    raise error
                calls.append((name, *map(str, given[:2])))
            return real(*given, **options)

        monkeypatch.setattr(module, name, call)

    def is_inside(path):
        return not isinstance(path, int) and os.path.abspath(path).startswith(f"{folder}{os.sep}")

    for module in (io, builtins):
        refusing(module, "open", lambda path, mode="r", *_, **__: set(mode) & set("wax+") and is_inside(path))
    refusing(os, "replace", lambda source, target: is_inside(target))
    refusing(os, "mkdir", lambda path, *_, **__: is_inside(path))
    refusing(transformers.modeling_utils, "safe_save_file", lambda tensors, path, **_: is_inside(path))
    return calls


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Access is denied"),
        FileNotFoundError(errno.ENOENT, "The system cannot find the path specified"),
    ],
    ids=["full", "refused", "too long"],
)
def test_a_model_is_somewhere_whichever_of_the_final_writes_is_refused(
    tmp_path, tiny_bert, vocabulary, monkeypatch, told, error
):
    monkeypatch.setattr(files, "SECONDS_OF_RETRIES", 0)
    state = checkpoint.State()
    state.candidates = {10: np.zeros(3, "int32")}
    facts = (load_model(str(tiny_bert), TASK)[0], BertTokenizer(str(vocabulary)), TASK, DATA, 1, RESULTS, "a card")
    weights = {name: value.clone() for name, value in facts[0].state_dict().items()}
    places = []
    for number in range(100):
        run = tmp_path / f"run {number}"
        run.mkdir()
        checkpoint.begin_or_resume(run, SETTINGS, DATA)
        (run / "checkpoints").mkdir()
        with monkeypatch.context() as patch:
            calls = refuse_from(number, run, error, patch)
            try:
                run_folder.write_model(run, state, *facts)
                break
            except RunFailed as failure:
                message = str(failure)
        assert len(calls) == number and message.count("\n") == 1 and str(error) in message
        (place,) = re.findall(r"\nThe model is in (.*)\. Fix this, then run the same command again\.", message)
        places.append(Path(place))
        model = load_model(place, TASK)[0]
        assert all(value.equal(weights[name]) for name, value in model.state_dict().items())
        assert names(run) in (["checkpoints", "state.json"], sorted({*names(run), "model", "checkpoints"}))
        assert state_of(run)["status"] == "running"
        if places[-1].parent == tmp_path:
            assert saved_metrics(place) == {**RESULTS, "majority": 1} and "results.json" in names(places[-1])
            assert f"CANNOT TAKE THE MODEL. IT IS IN {place}" in told.text
        run_folder.write_model(run, state, *facts)  # what was refused is mended
        assert names(run) == ["model", "results.json", "state.json", run_folder.PREDICTIONS]
    assert number > 10
    assert [place.name == "model" for place in places] == sorted(place.name == "model" for place in places)
    assert len({place.parent for place in places}) > 2  # beside the run; then in it, once the model is there


def test_a_model_whose_run_was_renamed_is_beside_it(tmp_path, tiny_bert, vocabulary, monkeypatch):
    (tmp_path / "run").mkdir()
    checkpoint.begin_or_resume(tmp_path / "run", SETTINGS, DATA)
    (tmp_path / "run").rename(tmp_path / "renamed")
    model, tokenizer = load_model(str(tiny_bert), TASK)[0], BertTokenizer(str(vocabulary))
    with pytest.raises(RunFailed, match=r"was it renamed\?\nThe model is in .*/run-model-"):
        run_folder.write_model(tmp_path / "run", checkpoint.State(), model, tokenizer, TASK, DATA, 1, RESULTS, "a card")
    place, renamed = names(tmp_path)[::-1]
    assert (renamed, place[:10]) == ("renamed", "run-model-")
    load_model(str(tmp_path / place), TASK)


def test_the_next_place_takes_a_model_that_neither_the_run_nor_its_neighbourhood_takes(tmp_path, monkeypatch, told):
    for name in ("runs", "working", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "working")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    refused = []

    def write(place):
        (place / "half").touch()
        if place.parent.name in refused:
            raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("runs", "working", "temporary"):
        place = run_folder.save_elsewhere(tmp_path / "runs" / "run", write)
        assert place.parent.name == name and (place / "half").exists()
        shutil.rmtree(place)
        refused.append(name)
    assert run_folder.save_elsewhere(tmp_path / "runs" / "run", write) is None
    assert [names(tmp_path / name) for name in refused] == [[], [], []]


def test_a_model_is_found_in_its_run(tmp_path, tiny_bert):
    assert model_folder(tiny_bert) == str(tiny_bert)
    assert model_folder("org/name") == "org/name"
    (tmp_path / "model").mkdir()
    with pytest.raises(BadInput, match="holds no model"):
        model_folder(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_folder(tmp_path) == str(tmp_path / "model")
