"""A full disk, and one that cannot be written: nothing half is left; with room the same command resumes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import bert_config, write_review_task, write_reviews
from run_help import DATA, RESULTS, SETTINGS, TASK, names
from test_checkpoint import Training, outcome
from test_preemption import ended, start, start_2, state_of
from transformers import BertTokenizer

from classifier.files import sha256
from classifier.messages import RunFailed
from classifier.model.models import load_model
from classifier.training import checkpoint, run_folder


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own: a function that mounts one of this many KiB, and returns its folder."""
    mounted = []

    def mount(kibibytes, *options):
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={kibibytes}k", *options]), "none", folder]
        try:
            mounting = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"no tmpfs can be mounted: {error}")
        if mounting.returncode:
            pytest.skip(f"no tmpfs can be mounted: {mounting.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder, left=0):
    """Let another program's file fill the disk, except for `left` KiB."""
    disk = os.statvfs(folder)
    kibibytes = disk.f_bavail * disk.f_frsize // 1024 - left
    descriptor = os.open(folder / "of another program", os.O_WRONLY | os.O_CREAT)
    try:
        os.posix_fallocate(descriptor, 0, max(1, kibibytes) * 1024)
    finally:
        os.close(descriptor)


def make_room(folder):
    (folder / "of another program").unlink()


# Fills the disk of the run in step 7, and makes room in step 12, or never.
FILLS = """
from pathlib import Path
from classifier.model import dropout
sys.path[:0] = [{tests!r}, {tests!r} + "/classifier"]
from test_disk import fill, make_room
set_batch = dropout.Masks.set_batch
def filling(self, step, *arguments):
    if step == 7:
        fill(Path({disk!r}), {left})
    if step == {until}:
        {then}
    return set_batch(self, step, *arguments)
dropout.Masks.set_batch = filling
"""
# The disk reports room that is gone once it is needed.
UNSEEN = """
import collections, shutil
shutil.disk_usage = lambda path: collections.namedtuple("usage", "total used free")(10**9, 0, 10**9)
"""


def train(task, disk, *flags, change="", left=0, until=0, then="pass", save_every=5):
    """Train with the run on this disk; return (exit code, standard output, standard error)."""
    filling = {"tests": os.path.dirname(__file__), "disk": str(disk), "left": left, "until": until, "then": then}
    change = f"{change}\n{FILLS.format(**filling)}" if until else change
    options = ("--task", task, "--threads", 1, "--save_every", save_every, "--log_every", 1, *flags)
    return ended(start(task.parent, *options, "--output_dir", disk / "run", change=change))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, vocabulary):
    """What the unbroken run of review_task ends with."""
    folder = write_reviews(tmp_path_factory.mktemp("whole"))
    code, _, err = train(write_review_task(folder / "reviews.yaml", bert_config(vocabulary)), folder)
    assert code == 0, err
    return outcome(folder / "run")


def warnings_of(log):
    return [line for line in log.splitlines() if "could not be saved" in line]


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(
    ("change", "words"), [("", "it needs 1 MB, the disk has 0 MB left"), (UNSEEN, "No space left")]
)
def test_training_goes_on_while_the_disk_is_full(review_task, disk, whole, change, words):
    folder = disk(4000)
    flags = {"change": change, "left": 64, "until": 12, "then": f"make_room(Path({str(folder)!r}))"}
    code, log, err = train(review_task, folder, **flags)
    assert (code, err) == (0, "")
    (warning,) = warnings_of(log)
    assert "step-00000010" in warning and words in warning
    assert outcome(folder / "run") == whole  # the best step could be saved
    assert "checkpoints" not in names(folder / "run") and not list(folder.rglob("*.tmp"))


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("change", ["", UNSEEN], ids=["foreseen", "unforeseen"])
def test_after_a_full_disk_and_a_kill_the_same_command_goes_on(review_task, disk, whole, change):
    folder = disk(4000)
    code, log, _ = train(review_task, folder, change=change, left=64, until=12, then="os._exit(9)")
    assert code == 9 and len(warnings_of(log)) == 1
    assert names(folder / "run" / "checkpoints") == ["step-00000005"]
    assert checkpoint.find_damage(folder / "run" / "checkpoints" / "step-00000005") is None
    assert not list(folder.rglob("*.tmp"))
    make_room(folder)
    code, log, err = train(review_task, folder)
    assert (code, err) == (0, "") and "resuming after step 5" in log
    assert outcome(folder / "run") == whole


def test_a_signal_while_the_disk_is_full_is_a_failure_and_goes_on_from_before(review_task, disk, whole):
    folder = disk(4000)
    code, log, err = train(review_task, folder, left=64, until=8, then="os.kill(os.getpid(), 15)", save_every=6)
    assert code == 1 and len(warnings_of(log)) >= 1
    assert err == "train.py: error: SIGTERM: not saved; the same command resumes from the previous checkpoint\n"
    assert state_of(folder / "run")["status"] == "failed"
    make_room(folder)
    assert train(review_task, folder, save_every=6)[0] == 0
    assert outcome(folder / "run") == whole


def test_a_disk_for_no_checkpoint_at_all_is_said_in_the_end(review_task, disk, whole):
    folder = disk(1000)
    code, log, err = train(review_task, folder)
    assert code == 1 and len(warnings_of(log)) >= 4
    assert err.count("\n") == 2 and "train.py: error: no model could be saved" in err
    assert "the same command" in err
    (place,) = re.findall(r"The model of the last step is in ([^ ]+)\. ", err)
    assert {"model.safetensors", "config.json", "tokenizer.json", "task.json"} <= set(names(Path(place)))
    assert state_of(folder / "run")["status"] == "failed"
    subprocess.run(["mount", "-o", "remount,size=4000k", folder], check=True)
    assert train(review_task, folder)[0] == 0
    assert outcome(folder / "run") == whole


def test_a_disk_that_ends_anywhere_in_a_checkpoint_leaves_the_one_before(disk, accelerator, monkeypatch):
    """The disk is as full as it takes to fail at each of the files in turn; nothing warns of it before."""
    folder = disk(4000)
    training = Training(folder / "run", accelerator, width=2000)
    usage = shutil.disk_usage
    training.steps(1).save()
    before = names(folder / "run" / "checkpoints")
    training.steps(1)
    failed = 0
    for left in range(0, 400, 8):
        fill(folder, left)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=10**9))
            is_saved = training.save()
        make_room(folder)
        if is_saved:
            break
        assert names(folder / "run" / "checkpoints") == before, left
        assert checkpoint.newest_valid(folder / "run").name == before[0]
        failed += 1
    assert failed > 30 and is_saved
    assert names(folder / "run" / "checkpoints") == ["step-00000001", "step-00000002"]


# --------------------------------------------------------------------------------------------------- the model folder


def written(folder, left, model, tokenizer):
    """Write a model folder on a disk with `left` KiB left; return the error that came, or None."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    checkpoint.begin_or_resume(run, SETTINGS, DATA)
    (run / "checkpoints").mkdir()
    fill(folder, left)
    error = None
    try:
        run_folder.write_model(run, checkpoint.State(), model, tokenizer, TASK, DATA, 1, RESULTS, "a card")
    except Exception as raised:
        error = raised
    make_room(folder)
    state = state_of(run)["status"]
    assert state == ("running" if error else "done")
    assert ("checkpoints" in names(run)) == bool(error)
    assert not list(run.rglob("*.tmp"))
    return error


def test_a_disk_that_ends_anywhere_in_the_model_is_told_in_two_lines(
    disk, tiny_bert, vocabulary, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = disk(3000)
    model = load_model(str(tiny_bert), TASK)[0]
    errors = [written(folder, left, model, BertTokenizer(str(vocabulary))) for left in range(0, 160, 4)]
    assert errors[0] is not None and errors[-1] is None
    others = [error for error in errors if error and not isinstance(error, RunFailed)]
    assert others == []
    for error in filter(None, errors):
        (place,) = re.findall("The model is in ([^ ]+)\\.", str(error))
        load_model(place, TASK)
    assert str(tmp_path / "run-model-") in str(errors[0])  # beside the run's folder the disk is as full


FILLS_LATE = """
from pathlib import Path
from classifier.training import run_folder
sys.path[:0] = [{tests!r}, {tests!r} + "/classifier"]
from test_disk import fill
write = run_folder.write_model
def filled(folder, *arguments):
    fill(Path({disk!r}), {left})
    return write(folder, *arguments)
run_folder.write_model = filled
"""


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("left", [8, 64])
def test_a_full_disk_at_the_model_is_told_and_the_same_command_finishes(review_task, disk, whole, left):
    folder = disk(4000)
    change = FILLS_LATE.format(tests=os.path.dirname(__file__), disk=str(folder), left=left)
    code, _, err = train(review_task, folder, change=change)
    assert code == 1
    assert err.count("\n") == 2 and "model could not be written: " in err and "the same command" in err
    state = state_of(folder / "run")
    assert state["status"] == "failed" and "No space left" in state["reason"]
    assert not {"model", "model.tmp", "lock.json"} & set(names(folder / "run"))
    (place,) = re.findall(r"The model is in ([^ ]+)\. ", err)
    assert sha256(Path(place) / "model.safetensors") == whole[0]
    make_room(folder)
    code, log, err = train(review_task, folder)
    assert (code, err) == (0, "") and "resuming after step 25" in log
    assert outcome(folder / "run") == whole


REPORT_FAILS = """
from classifier.evaluation import page
def fail(*arguments):
    raise {error}
page.{function} = fail
"""


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("function", ["write_text", "draw_curves", "save_png"])
def test_a_report_that_fails_does_not_cost_the_model(review_task, tmp_path, whole, function):
    error = 'ValueError("a bug of the drawing")' if function == "draw_curves" else 'PermissionError(13, "is open")'
    code, log, err = train(review_task, tmp_path, change=REPORT_FAILS.format(function=function, error=error))
    assert (code, err) == (0, "") and outcome(tmp_path / "run") == whole
    assert "report.html could not be written (" in log and f"evaluate.py --model {tmp_path}/run" in log
    assert state_of(tmp_path / "run")["status"] == "done"


# ------------------------------------------------------------------------------------------ what cannot be written


@pytest.mark.parametrize("number_of_processes", [1, 2])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(review_task, disk, number_of_processes):
    folder = disk(100, "ro")
    options = ("--task", review_task, "--threads", 1, "--output_dir", folder / "run")
    start_them = start_2 if number_of_processes == 2 else lambda *arguments: [start(*arguments)]
    for process in start_them(review_task.parent, *options):
        code, log, err = ended(process, 30)
        assert code == 2
        assert err.count("\n") == 2 and f"{folder}/run: cannot be written (Read-only file system)" in err
        assert "newly initialised" not in log and "tokens" not in log


def test_a_disk_that_is_full_at_the_start_is_no_run(review_task, disk):
    folder = disk(3000)
    fill(folder)
    code, _, err = train(review_task, folder)
    assert code == 2
    assert err.count("\n") == 2 and "cannot be written (No space left on device)" in err
    make_room(folder)
    code, _, err = train(review_task, folder)
    assert (code, err) == (0, "")


@pytest.mark.parametrize("number_of_processes", [1, 2])
def test_a_disk_with_room_for_the_lock_alone_is_told_in_two_lines(review_task, disk, number_of_processes):
    folder = disk(3000)
    fill(folder, 4)
    options = ("--task", review_task, "--threads", 1, "--output_dir", folder / "run")
    start_them = start_2 if number_of_processes == 2 else lambda *arguments: [start(*arguments)]
    processes = start_them(review_task.parent, *options)
    code, _, err = ended(processes[0], 30)
    for process in processes[1:]:  # a launcher would end it
        process.kill()
    assert code in (1, 2)
    assert "Traceback" not in err, err


def test_a_disk_without_room_for_a_line_is_told_in_two_lines(review_task, disk, whole):
    """Either the training goes on, or it ends with two lines; and the same command finishes."""
    folder = disk(4000)
    err = train(review_task, folder, left=0, until=12, then="pass")[2]
    make_room(folder)
    again = train(review_task, folder)
    assert again[0] == 0 and outcome(folder / "run") == whole
    assert "Traceback" not in err, err
