"""A run on disk: its folder, its checkpoints whole or absent, damage found, the same weights in the end."""

import hashlib
import json
import os
import random
import shutil
import stat
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from run_help import DATA, SETTINGS, fill, names, record
from safetensors import SafetensorError
from test_preemption import ended, start, state_of

from classifier import files
from classifier.files import replace_folder, sha256
from classifier.messages import BadInput, RunFailed
from classifier.training import checkpoint, lock, run_folder

FILES = ["model.safetensors", "optimizer.safetensors", "generators.safetensors", "progress.json", "manifest.json"]


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
        evaluation = {"scores": {"f1": 0.1}, "majority": {"f1": 0.0}, "constant": None, "loss": 1.0}
        evaluation["predictions"] = np.array([0, 1, self.state.step])
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
        return numbers, rates, self.scheduler.state_dict(), asdict(self.state)


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
    assert names(path) == sorted([*FILES, "validation_predictions.safetensors"])
    assert checkpoint.find_damage(path) is None
    later = training.steps(2).all_of_it()

    other = Training(training.folder, training.accelerator, seed=1)
    assert other.all_of_it()[0] != expected[0]
    assert other.load(path).all_of_it() == expected
    assert other.state.best["step"] == 3 and other.state.best_before is None
    assert other.state.best["evaluations"]["validation"].keys() == {"scores", "majority", "constant"}
    assert {step: values.tolist() for step, values in other.state.candidates.items()} == {3: [0, 1, 3]}
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
    return tmp_path / "new"


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
    written = []
    monkeypatch.setattr(checkpoint, "write_model_files", lambda *given: written.append(given))
    with pytest.raises(
        RunFailed, match=r"no model could be saved.*\nThe model of the last step is in (.*)\. .*the same"
    ):
        checkpoint.load_best(training.folder, training.accelerator, training.state, training.model, None, None, None)
    (place, model, *_), *_ = written
    assert model is training.model and place.parent == training.folder.parent and place.is_dir()


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
    run_folder.write_state(finished, "running")
    checkpoint.begin_or_resume(finished, SETTINGS, DATA)
    assert (finished / "model" / "file").read_text() == "old"
    assert names(finished) == ["model", "results.json", "state.json"]


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


@pytest.mark.slow
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
