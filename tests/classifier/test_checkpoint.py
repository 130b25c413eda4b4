"""A run on disk: its folder, its checkpoints whole or absent, damage found, the same weights in the end."""

import hashlib
import json
import os
import random
import shutil
import stat
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors import SafetensorError
from test_preemption import ended, start, state_of
from transformers import BertTokenizer

from classifier import files
from classifier.data.tasks import Task
from classifier.files import replace_folder, sha256
from classifier.messages import BadInput, Preempted, RunFailed, log
from classifier.model.models import load_model, model_folder, saved_metrics
from classifier.training import checkpoint, lock

TASK = Task(name="reviews", text=["text"], labels=["negative", "positive"], files={"train": "train.csv"})
SETTINGS = {"learning_rate": 0.1, "seed": 1}
DATA = {"train": "abc"}
FILES = ["model.safetensors", "optimizer.safetensors", "generators.safetensors", "progress.json", "manifest.json"]


@pytest.fixture
def accelerator():
    for state in (AcceleratorState, GradientState, PartialState):  # another test may have made one
        state._reset_state()
    return Accelerator(cpu=True)


@pytest.fixture
def told(caplog, monkeypatch):
    """What the scripts log: a fixture like caplog, whatever another test has done to their logger."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return caplog


@pytest.fixture
def finished(tmp_path):
    checkpoint.begin_or_resume(make_folder(tmp_path / "run"), SETTINGS, DATA)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "results.json").write_text('{"steps": 7}')
    checkpoint.write_state(tmp_path / "run", "done")
    return tmp_path / "run"


def make_folder(path):
    path.mkdir()
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------------- the run's folder


def test_a_new_or_empty_folder_may_be_used(tmp_path):
    assert checkpoint.finished_results(tmp_path / "new", SETTINGS, DATA) is None
    assert checkpoint.finished_results(tmp_path, SETTINGS, DATA) is None
    (tmp_path / "lock.json").touch()  # of a run that did not come to writing more
    assert checkpoint.finished_results(tmp_path, SETTINGS, DATA, resume="never") is None


def test_a_finished_run_gives_its_results_and_overwrite_starts_again(finished):
    assert checkpoint.finished_results(finished, SETTINGS, DATA) == {"steps": 7}
    assert checkpoint.finished_results(finished, SETTINGS, DATA, overwrite=True) is None


def test_a_finished_run_says_what_code_has_changed_since(finished, told, monkeypatch):
    checkpoint.finished_results(finished, SETTINGS, DATA)
    assert "code changed" not in told.text
    digests = checkpoint.code_digests()
    monkeypatch.setattr(checkpoint, "code_digests", lambda: {**digests, "common.py": "edited"})
    assert checkpoint.finished_results(finished, SETTINGS, DATA) == {"steps": 7}
    assert "code changed since this run began: common.py" in told.text


def test_a_finished_run_has_no_use_for_checkpoints(finished):
    (finished / "checkpoints" / "step-00000003").mkdir(parents=True)  # it was killed while it removed them
    assert checkpoint.finished_results(finished, SETTINGS, DATA) == {"steps": 7}
    assert not (finished / "checkpoints").exists()


@pytest.mark.parametrize("gone", ["model", "results.json"])
def test_a_finished_run_without_its_model_or_results_is_refused(finished, gone):
    shutil.rmtree(finished / gone) if gone == "model" else (finished / gone).unlink()
    with pytest.raises(BadInput, match="are gone"):
        checkpoint.finished_results(finished, SETTINGS, DATA)


def test_other_settings_or_data_are_refused_with_the_differences(finished):
    with pytest.raises(BadInput, match=r"learning_rate: 0\.1 before, 0\.2 now"):
        checkpoint.finished_results(finished, {**SETTINGS, "learning_rate": 0.2}, DATA)
    with pytest.raises(BadInput, match="data: other rows"):
        checkpoint.finished_results(finished, SETTINGS, {"train": "abd"})
    with pytest.raises(BadInput, match="new: None before, 3 now; seed: 1 before, None now"):
        checkpoint.finished_results(finished, {"learning_rate": 0.1, "new": 3}, DATA)
    assert checkpoint.finished_results(finished, {**SETTINGS, "learning_rate": 0.2}, DATA, overwrite=True) is None


@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_an_unfinished_run_may_go_on(finished, status):
    checkpoint.write_state(finished, status, "the power went")
    assert checkpoint.finished_results(finished, SETTINGS, DATA) is None
    with pytest.raises(BadInput, match="learning_rate"):
        checkpoint.finished_results(finished, {**SETTINGS, "learning_rate": 0.2}, DATA)


@pytest.mark.parametrize("status", ["running", "done"])
def test_resume_never_wants_an_empty_folder(finished, status):
    checkpoint.write_state(finished, status)
    with pytest.raises(BadInput, match="holds a run"):
        checkpoint.finished_results(finished, SETTINGS, DATA, resume="never")


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
            checkpoint.finished_results(tmp_path, SETTINGS, DATA, overwrite=overwrite)
    assert (tmp_path / name).read_text() == content


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput, match="is a file, not a folder"):
            checkpoint.finished_results(path, SETTINGS, DATA)
    with pytest.raises(BadInput, match="cannot be a folder"):
        checkpoint.finished_results(tmp_path / ("x" * 300), SETTINGS, DATA)


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
    checkpoint.write_state(finished, "failed", code={**code, "train.py": "0123", "torch": "1.0"})
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
    with pytest.raises(type(error)), checkpoint.hold(finished, accelerator, checkpoint.State()):
        checkpoint.begin_or_resume(finished, SETTINGS, DATA)
        raise error
    state = state_of(finished)
    assert (state["status"], state["reason"], state["settings"]) == (status, reason, SETTINGS)
    assert not (finished / "lock.json").exists()


def test_what_fails_before_the_run_began_changes_nothing(finished, accelerator):
    for error in (BadInput("wrong", "mend it"), Preempted("SIGINT")):
        with pytest.raises(type(error)), checkpoint.hold(finished, accelerator, checkpoint.State()):
            raise error
    assert state_of(finished)["status"] == "done"
    with pytest.raises(BadInput), checkpoint.hold(finished.parent / "new", accelerator, checkpoint.State()):
        raise BadInput("wrong", "mend it")
    assert not (finished.parent / "new").exists()


def test_the_first_process_that_fails_is_believed(finished):
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    checkpoint.record_end(finished, "failed", "the disk is on fire")
    checkpoint.record_end(finished, "failed", "connection closed by peer")
    assert state_of(finished)["reason"] == "the disk is on fire"


@pytest.mark.parametrize(
    ("size", "words", "half"), [(8, "resumes with micro-batches of 4", 4), (5, "of 3", 3), (1, "--gradient_ch", 1)]
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate")])
def test_out_of_memory_notes_half_the_micro_batch(finished, accelerator, size, words, half, error):
    state = checkpoint.State()
    with pytest.raises(RunFailed, match=words), checkpoint.hold(finished, accelerator, state) as folder:
        assert folder == finished
        checkpoint.begin_or_resume(finished, SETTINGS, DATA)
        state.micro_batch_size = size
        raise error
    assert state_of(finished)["micro_batch_size"] == half
    assert state_of(finished)["reason"] == f"out of memory with {size} examples at a time"
    assert checkpoint.begin_or_resume(finished, SETTINGS, DATA) == (None, half)
    assert checkpoint.begin_or_resume(finished, SETTINGS, DATA, overwrite=True) == (None, None)


# ------------------------------------------------------------------------------------------------- save and load


class Training:
    """A model of a few numbers, its optimiser and schedule, and a folder to save it in."""

    def __init__(self, folder, accelerator, seed=0, width=7):
        self.folder, self.accelerator = folder, accelerator
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(5, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 2)
        )
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "lr": 0.1}, {"params": others, "lr": 0.02, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.state = checkpoint.State()
        if not folder.exists():
            folder.mkdir()
            checkpoint.begin_or_resume(folder, SETTINGS, DATA)

    def steps(self, number):
        for _ in range(number):
            self.model(torch.randn(3, 5)).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.state.step += 1
            self.state.learning_rate = self.scheduler.get_last_lr()[0]
            self.state.sums = [value + random.random() for value in self.state.sums]
        return self

    def record_best(self):
        evaluation = {"scores": {"f1": 0.1}, "majority": {"f1": 0.0}, "constant": None, "loss": 1.0, "predictions": 0}
        checkpoint.record_evaluation(self.state, self.state.step / 10, {"validation": evaluation}, is_best=True)
        return self

    def save(self, keep=2):
        parts = (self.accelerator, self.state, self.model, self.optimizer, self.scheduler)
        return checkpoint.save(self.folder, *parts, keep)

    def load(self, path):
        checkpoint.load(path, self.accelerator, self.state, self.model, self.optimizer, self.scheduler)
        return self

    def all_of_it(self):
        """Everything there is to know, as one value to compare."""
        tensors = {**self.model.state_dict(), **checkpoint.optimizer_tensors(self.model, self.optimizer)}
        tensors["generator"] = torch.get_rng_state()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        numbers = {key: value.numpy().tobytes() for key, value in tensors.items()}
        return numbers, rates, self.scheduler.state_dict(), dict(vars(self.state))


@pytest.fixture
def training(tmp_path, accelerator):
    return Training(tmp_path / "run", accelerator)


def saved_thrice(training):
    """Steps 2 (the best), 4 and 6 saved; return the paths."""
    for number in (2, 4, 6):
        training.steps(2)
        if number == 2:
            training.record_best()
        assert training.save()
    return [training.folder / "checkpoints" / f"step-0000000{number}" for number in (2, 4, 6)]


def test_what_is_loaded_is_what_was_saved_bit_for_bit(training):
    training.steps(3).record_best().steps(2)
    assert training.save()
    expected = training.all_of_it()
    path = training.folder / "checkpoints" / "step-00000005"
    assert names(path) == sorted(FILES) and checkpoint.find_damage(path) is None
    later = training.steps(2).all_of_it()

    other = Training(training.folder, training.accelerator, seed=1)
    assert other.all_of_it()[0] != expected[0]
    assert other.load(path).all_of_it() == expected
    assert other.state.best["step"] == 3 and other.state.best_before is None
    assert other.state.best["evaluations"]["validation"].keys() == {"scores", "majority", "constant"}
    # And goes on alike: the moments are those of their parameters, the draws those that would have come.
    other.steps(2)
    assert other.all_of_it()[:3] == later[:3]


def test_without_a_checkpoint_all_is_as_it_begins(training):
    before = training.all_of_it()
    assert training.load(None).all_of_it() == before


def test_a_frozen_parameter_has_no_moments(training):
    for parameter in training.model[0].parameters():
        parameter.requires_grad_(False)
    training.steps(1)
    training.save()
    expected = training.all_of_it()
    other = Training(training.folder, training.accelerator, seed=1)
    for parameter in other.model[0].parameters():
        parameter.requires_grad_(False)
    assert other.load(training.folder / "checkpoints" / "step-00000001").all_of_it() == expected


def test_other_processes_are_said(training, told, monkeypatch):
    training.steps(1).save()
    path = training.folder / "checkpoints" / "step-00000001"
    progress = json.loads((path / "progress.json").read_text())
    progress["state"]["num_processes"] = 4
    (path / "progress.json").write_text(json.dumps(progress))
    training.load(path)
    assert "on 1 process(es), before on 4" in told.text


def test_one_that_is_kept_has_its_best_beside_it(training):
    for number in range(1, 7):
        training.steps(1)
        if number in (2, 5):
            training.record_best()
        training.save(keep=3)
    assert {f"step-0000000{number}" for number in (3, 4, 5, 6)} <= set(names(training.folder / "checkpoints"))
    (training.folder / "checkpoints" / "step-00000005" / "model.safetensors").unlink()  # the best of 5 and 6
    assert checkpoint.newest_valid(training.folder).name == "step-00000004"  # whose best is 2


def test_the_newest_and_the_best_are_kept(training):
    training.steps(1).record_best()
    for _ in range(5):
        training.save(keep=2)
        training.steps(1)
    assert names(training.folder / "checkpoints") == ["step-00000001", "step-00000004", "step-00000005"]
    checkpoint.prune(training.folder, None, 1)
    assert names(training.folder / "checkpoints") == ["step-00000001", "step-00000005"]  # which relies on it


@pytest.fixture
def new(tmp_path):
    """The folder of another run, which may adopt a checkpoint."""
    return make_folder(tmp_path / "new")


@pytest.mark.parametrize("source", ["run", "run/checkpoints/step-00000006", "run/checkpoints/step-00000004"])
def test_resume_brings_a_checkpoint_and_its_best(training, new, source):
    saved_thrice(training)
    path, limit = checkpoint.begin_or_resume(new, SETTINGS, DATA, resume=str(training.folder.parent / source))
    step = "step-00000004" if source.endswith("4") else "step-00000006"
    assert path == new / "checkpoints" / step and limit is None
    assert names(new / "checkpoints") == ["step-00000002", step]
    assert checkpoint.newest_valid(new) == path
    assert len(names(training.folder / "checkpoints")) == 3  # the source is as it was


def test_resume_from_an_earlier_one_of_its_own_drops_the_later(training):
    _, before, _ = saved_thrice(training)
    assert checkpoint.begin_or_resume(training.folder, SETTINGS, DATA, resume=str(before))[0] == before
    assert names(training.folder / "checkpoints") == ["step-00000002", "step-00000004"]


def test_resume_refuses_what_does_not_fit(training, new):
    *_, newest = saved_thrice(training)
    with pytest.raises(BadInput, match=r"other settings \(seed: 1 before, 2 now\)"):
        checkpoint.begin_or_resume(new, {**SETTINGS, "seed": 2}, DATA, resume=str(newest))
    with pytest.raises(BadInput, match=r"manifest\.json is missing"):
        checkpoint.begin_or_resume(new, SETTINGS, DATA, resume=str(new / "nothing"))
    flip(newest / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.safetensors has been altered"):
        checkpoint.begin_or_resume(new, SETTINGS, DATA, resume=str(newest))
    assert not (new / "checkpoints").exists()


def test_resume_refuses_one_whose_best_is_damaged(training, new):
    best, _, newest = saved_thrice(training)
    flip(best / "model.safetensors")
    with pytest.raises(BadInput, match="best"):
        checkpoint.begin_or_resume(new, SETTINGS, DATA, resume=str(newest))


def test_the_same_command_with_resume_goes_on_where_it_was(training, new):
    _, before, _ = saved_thrice(training)
    checkpoint.begin_or_resume(new, SETTINGS, DATA, resume=str(before))
    other = Training(new, training.accelerator).load(new / "checkpoints" / before.name)
    assert other.steps(5).save()
    assert checkpoint.begin_or_resume(new, SETTINGS, DATA, resume=str(before))[0].name == "step-00000009"


# ------------------------------------------------------------------------------------------------- a save that fails


class Died(BaseException):
    """The process ends here: no except, no finally of ours runs as it would after an error."""


def die_at_rename(number, monkeypatch):
    calls, replace = [], os.replace

    def dies(old, new):
        calls.append(new)
        if len(calls) == number:
            raise Died
        replace(old, new)

    monkeypatch.setattr(os, "replace", dies)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("save_model", SafetensorError("Error while serializing: I/O error: No space left")),
        ("save_file", SafetensorError("No space left on device (os error 28)")),
        ("write_json", OSError(28, "No space left on device")),
        ("sync", OSError(5, "Input/output error")),
    ],
)
def test_a_save_that_fails_keeps_the_one_before_and_leaves_nothing_half(training, function, error, monkeypatch, told):
    training.steps(2).record_best()
    assert training.save()
    before = {file: sha256(file) for file in training.folder.rglob("*") if file.is_file()}
    training.steps(2).record_best()

    def fails(*given):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files if function == "sync" else checkpoint, function, fails)
        assert training.save() is False
    assert {file: sha256(file) for file in training.folder.rglob("*") if file.is_file()} == before
    assert names(training.folder / "checkpoints") == ["step-00000002"]
    assert "step-00000004 could not be saved, training continues: " in told.text and str(error) in told.text
    # The model of this step is not there, and cannot be the best.
    assert training.state.best["step"] == 2
    assert training.steps(2).save()  # room was made
    assert checkpoint.newest_valid(training.folder).name == "step-00000006"


def test_the_first_best_that_cannot_be_saved_is_none(training, monkeypatch):
    training.steps(2).record_best()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10))
    assert training.save() is False
    assert training.state.best is None
    with pytest.raises(RunFailed, match=r"no model could be saved.*\n.*the same command"):
        checkpoint.load_best(training.folder, training.state.best, training.model)


def test_a_disk_without_room_is_said_before_anything_is_written(training, monkeypatch, told):
    monkeypatch.setattr(checkpoint, "save_model", lambda *given: pytest.fail("written"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 10**7, 300_000))
    training.steps(1)
    assert not training.save()
    assert "it needs 1 MB, the disk has 0 MB left" in told.text


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_death_at_any_rename_leaves_the_one_before(training, at, monkeypatch):
    """1: of progress.json, 2: of manifest.json, 3: of the folder."""
    training.steps(2)
    training.save()
    die_at_rename(at, monkeypatch)
    monkeypatch.setattr(shutil, "rmtree", lambda *given, **options: None)  # a process that is gone cleans nothing up
    with pytest.raises(Died):
        training.steps(2).save()
    monkeypatch.undo()
    assert names(training.folder / "checkpoints") == ["step-00000002", "step-00000004.tmp"]
    assert checkpoint.newest_valid(training.folder).name == "step-00000002"
    assert checkpoint.begin_or_resume(training.folder, SETTINGS, DATA)[0].name == "step-00000002"
    assert names(training.folder / "checkpoints") == ["step-00000002"]
    assert training.save()


@pytest.mark.parametrize("dies", [False, True])
def test_a_step_saved_again_is_not_lost_between_the_two_renames(training, dies, monkeypatch):
    """It is saved again where a signal came before its evaluation, and the run goes on with that."""
    training.steps(2)
    training.save()
    path = training.folder / "checkpoints" / "step-00000002"
    replace = os.replace

    def fails(old, new):
        if Path(old).name == f"{path.name}.tmp":
            raise Died if dies else OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", fails)
    if dies:
        with pytest.raises(Died):
            training.save()
    else:
        assert not training.save()
        assert checkpoint.find_damage(path) is None  # "what was there is there"
    monkeypatch.undo()
    assert checkpoint.begin_or_resume(training.folder, SETTINGS, DATA)[0] == path
    assert names(training.folder / "checkpoints") == [path.name]


# ------------------------------------------------------------------------------------------------- what is on the disk


def record(monkeypatch):
    """Note all fsyncs and renames, in order: ("sync", path), ("rename", old, new, names in the folder of new)."""
    events, sync, replace = [], os.fsync, os.replace

    def noting_sync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noting_replace(old, new):
        replace(old, new)
        events.append(("rename", str(old), str(new), names(Path(new).parent)))

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return events


def test_all_is_on_the_disk_before_the_checkpoint_has_its_name(training, monkeypatch):
    (training.folder / "metrics.jsonl").write_text("{}\n")
    training.steps(1)
    events = record(monkeypatch)
    training.save()
    path = training.folder / "checkpoints" / "step-00000001"
    syncs = [event[1] for event in events]
    renamed = next(at for at, event in enumerate(events) if event[:3] == ("rename", f"{path}.tmp", str(path)))
    for file in FILES:
        assert ("sync", f"{path}.tmp/{file}") in events[:renamed]
    assert events[renamed - 1] == ("sync", f"{path}.tmp")
    assert events[renamed + 1] == ("sync", str(path.parent))
    assert syncs.index(f"{training.folder}/metrics.jsonl") < renamed  # its lines up to this step will be kept
    # The manifest comes last: the others are complete when it has its name.
    manifest = next(event for event in events if event[0] == "rename" and event[2].endswith("manifest.json"))
    assert set(FILES) <= set(manifest[3])
    assert [event for event in events[renamed:] if event[0] == "rename"][1:] == []


def test_files_have_the_mode_that_the_umask_asks_for(training):
    for mask, mode in ((0o027, 0o640), (0o022, 0o644)):
        before = os.umask(mask)
        try:
            training.steps(1).save()
        finally:
            os.umask(before)
        path = training.folder / "checkpoints" / f"step-{training.state.step:08d}"
        # safetensors alone would leave 0600, which the group cannot read
        assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {mode}


def fill(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.mark.parametrize("at", [1, 2])
def test_a_model_that_was_moved_aside_comes_back(finished, at, monkeypatch):
    fill(finished / "old", "old")
    (finished / "model").rmdir()
    (finished / "old").rename(finished / "model")
    die_at_rename(at, monkeypatch)
    with pytest.raises(Died):
        replace_folder(fill(finished / "model.tmp", "new"), finished / "model")
    monkeypatch.undo()
    assert (finished / "model").exists() == (at == 1)
    checkpoint.write_state(finished, "running")
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    assert (finished / "model" / "file").read_text() == "old"
    assert names(finished) == ["model", "results.json", "state.json"]


def test_the_model_folder_is_whole_readable_and_the_last_thing_written(tmp_path, tiny_bert, vocabulary, monkeypatch):
    model = load_model(str(tiny_bert), TASK)[0]
    checkpoint.begin_or_resume(tmp_path, SETTINGS, DATA)
    (tmp_path / "checkpoints").mkdir()
    results = {"scores": {}, "majority_baseline": {}, "best_step": 10, "mixed_precision": "no"}
    events = record(monkeypatch)
    mask = os.umask(0o027)
    try:
        checkpoint.write_model(tmp_path, model, BertTokenizer(str(vocabulary)), TASK, DATA, 1, results, "a card")
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
    assert saved_metrics(tmp_path / "model") == ("no", 1)
    assert saved_metrics(tmp_path) == ("auto", None)
    renamed = [Path(event[2]).name for event in events if event[0] == "rename"]
    assert renamed[-2:] == ["model", "state.json"]  # "done" is said once all is there
    synced = {event[1] for event in events if event[0] == "sync"}
    assert {f"{tmp_path}/model.tmp/{name}" for name in modes} <= synced


def test_a_model_that_cannot_be_written_leaves_the_old_one(finished, tiny_bert, vocabulary, monkeypatch):
    model = load_model(str(tiny_bert), TASK)[0]
    (finished / "model" / "old").touch()
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    fill(finished / "checkpoints", "kept")
    results = {"scores": {}, "majority_baseline": {}, "best_step": 10, "mixed_precision": "no"}

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(RunFailed, match=r"model could not be written: .*No space.*\n.*the same command"):
        checkpoint.write_model(finished, model, BertTokenizer(str(vocabulary)), TASK, DATA, 1, results, "a card")
    assert names(finished) == ["checkpoints", "model", "results.json", "state.json"]
    assert names(finished / "model") == ["old"] and names(finished / "checkpoints") == ["file"]
    assert state_of(finished)["status"] == "running"


def test_a_model_is_found_in_its_run(tmp_path, tiny_bert):
    assert model_folder(tiny_bert) == str(tiny_bert)
    assert model_folder("org/name") == "org/name"
    (tmp_path / "model").mkdir()
    with pytest.raises(BadInput, match="holds no model"):
        model_folder(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert model_folder(tmp_path) == str(tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------- damage


def flip(file):
    """Invert 64 bytes in the middle, or all of a file that has fewer."""
    content = bytearray(file.read_bytes())
    start_at = max(0, len(content) // 2 - 32)
    for at in range(start_at, min(start_at + 64, len(content))):
        content[at] ^= 0xFF
    file.write_bytes(content)


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flipped": flip,
}
MATRIX = [(file, damage) for file in FILES for damage in DAMAGE]


@pytest.mark.parametrize(("name", "damage"), MATRIX)
def test_damage_is_found_and_the_one_before_is_taken(training, name, damage, told, monkeypatch):
    _, before, newest = saved_thrice(training)
    assert checkpoint.newest_valid(training.folder) == newest and not told.records
    DAMAGE[damage](newest / name)
    assert checkpoint.newest_valid(training.folder) == before
    (line,) = told.messages
    assert str(newest) in line and name in line
    reason = {"missing": "missing", "empty": "0 bytes", "cut": "bytes, not", "flipped": "altered"}[damage]
    assert (reason if name != "manifest.json" else "missing or damaged") in line


@pytest.mark.parametrize(("name", "damage"), MATRIX)
def test_one_whose_best_is_damaged_is_of_no_use(training, name, damage, told, monkeypatch):
    best, *_ = saved_thrice(training)
    DAMAGE[damage](best / name)
    assert checkpoint.newest_valid(training.folder) is None
    assert all("its best model, step-00000002: " in line and name in line for line in told.messages[:2])
    assert "no checkpoint is valid; the run starts again from step 0" in told.messages[-1]


def test_a_best_that_is_gone_is_noticed(training):
    best, *_ = saved_thrice(training)
    shutil.rmtree(best)
    assert checkpoint.newest_valid(training.folder) is None


def test_a_checkpoint_without_a_best_needs_none(training):
    training.steps(1).save()
    assert checkpoint.newest_valid(training.folder).name == "step-00000001"


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"model.safetensors": {}}', '"x"', "\x00"])
def test_a_manifest_that_is_none(training, content):
    _, before, newest = saved_thrice(training)
    (newest / "manifest.json").write_text(content)
    assert checkpoint.newest_valid(training.folder) == before


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "a/../../model.safetensors"])
def test_names_in_a_manifest_lead_nowhere_else(training, name, monkeypatch):
    _, _, newest = saved_thrice(training)
    (training.folder / "x").write_text("outside")
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest[name] = {"bytes": 7, "sha256": hashlib.sha256(b"outside").hexdigest()}
    (newest / "manifest.json").write_text(json.dumps(manifest))
    read = []
    monkeypatch.setattr(checkpoint, "sha256", lambda file: read.append(file) or sha256(file))
    assert checkpoint.find_damage(newest) is not None
    assert {file.resolve().parent for file in read} <= {newest}


# --------------------------------------------------------------------------------------------------------- end to end

# The process dies in the middle of step 17, as by kill -9.
DIES = """
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def dying(self, step, *given):
    if step == 17:
        os._exit(9)
    return set_batch(self, step, *given)
dropout.Masks.set_batch = dying
"""
FLAGS = ("--eval_every", 4, "--save_every", 5, "--keep_checkpoints", 3, "--threads", 1, "--log_every", 1)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, vocabulary):
    """A folder with a task, its run stopped in step 17, and whole, what the unbroken run ended with."""
    from conftest import bert_config, make_rows, write_table

    folder = tmp_path_factory.mktemp("stopped")
    for name, number, seed in (("train", 200, 1), ("validation", 50, 2)):
        write_table(folder / f"{name}.csv", make_rows(number, seed))
    task = {
        "files": {name: f"{name}.csv" for name in ("train", "validation")},
        "labels": ["negative", "positive"],
        "metrics": ["accuracy"],
        "model": bert_config(vocabulary, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1),
        "defaults": {"learning_rate": 0.01, "batch_size": 16, "epochs": 2, "mixed_precision": "no"},
    }
    (folder / "task.yaml").write_text(json.dumps(task))
    flags = ("--task", "task.yaml", *FLAGS)
    code, _, err = ended(start(folder, *flags, "--output_dir", "whole"))
    assert code == 0, err
    code, _, err = ended(start(folder, *flags, "--output_dir", "run", change=DIES))
    assert code == 9, err
    best = max(state["best"]["step"] for state in progress_of(folder / "run"))
    assert best < 15  # else damage in the newest would be damage in the best
    return folder


def progress_of(run):
    paths = checkpoint.checkpoint_paths(run)
    return [json.loads((path / "progress.json").read_text())["state"] for path in paths]


def outcome(run):
    """The weights, and the lines of metrics.jsonl without their times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for clocked in ("examples_per_second", "seconds"):
            line.pop(clocked, None)
    return sha256(run / "model" / "model.safetensors"), lines


def go_on(stopped, folder, damage_it):
    """Copy the stopped run, damage it, give the same command; return its log, once the outcome was seen to be right."""
    folder = folder / "copy"
    shutil.copytree(stopped, folder)
    damage_it(folder / "run")
    code, out, err = ended(start(folder, "--task", "task.yaml", *FLAGS, "--output_dir", "run"))
    assert code == 0, err
    assert outcome(folder / "run") == outcome(stopped / "whole")
    assert state_of(folder / "run")["status"] == "done"
    assert not {"checkpoints", "lock.json"} & set(names(folder / "run"))
    assert not list(folder.rglob("*.tmp"))
    return out


# Each file and each kind of damage at least once; all pairs with FULL=1.
SOME = [
    *(("model.safetensors", "flipped"), ("optimizer.safetensors", "empty"), ("generators.safetensors", "missing")),
    *(("progress.json", "cut"), ("manifest.json", "missing")),
]


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(("name", "damage"), MATRIX if os.environ.get("FULL") == "1" else SOME)
def test_the_same_command_goes_on_before_the_damage_to_the_same_weights(stopped, tmp_path, name, damage):
    log = go_on(stopped, tmp_path, lambda run: DAMAGE[damage](run / "checkpoints" / "step-00000015" / name))
    assert "step-00000015 skipped" in log and "resuming after step 10" in log


def test_the_same_command_goes_on_after_nothing_but_a_kill(stopped, tmp_path):
    log = go_on(stopped, tmp_path, lambda run: None)
    assert "resuming after step 15" in log and "skipped" not in log


@pytest.mark.slow
def test_the_same_command_starts_again_where_all_are_damaged(stopped, tmp_path):
    def damage(run):
        for path, kind in zip(checkpoint.checkpoint_paths(run), [*DAMAGE, *DAMAGE], strict=False):
            DAMAGE[kind](path / "optimizer.safetensors")

    log = go_on(stopped, tmp_path, damage)
    assert "the run starts again from step 0" in log and "resuming after" not in log


def test_overwrite_keeps_the_old_model_until_there_is_a_new_one(stopped, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    run = folder / "whole"
    before = sha256(run / "model" / "model.safetensors")
    flags = ("--task", "task.yaml", *FLAGS, "--seed", 1, "--output_dir", "whole", "--overwrite")
    assert ended(start(folder, *flags, change=DIES))[0] == 9
    assert sha256(run / "model" / "model.safetensors") == before
    assert "results.json" not in names(run)  # those of another run would be taken for its own
    assert ended(start(folder, *flags[:-1]))[0] == 0
    assert sha256(run / "model" / "model.safetensors") != before
    assert "model.old" not in names(run)


def test_a_lock_that_a_killed_run_left_is_in_nobodys_way(stopped):
    assert "lock.json" in names(stopped / "run")
    assert lock._read(stopped / "run" / "lock.json")["pid"] > 0
