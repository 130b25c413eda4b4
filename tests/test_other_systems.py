"""Windows, macOS, network disks and odd locales, emulated on Linux: a run ends well where its user has another system.

other_systems/sitecustomize.py patches Python to refuse what such a system refuses. A run that passes here need not pass
there, since only calls from Python are seen; one that fails here fails there.
"""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from other_systems.make_inputs import make_inputs
from test_preemption import ended, start, state_of

EMULATION = ROOT / "tests" / "other_systems"
EMULATED = f"runpy.run_path({str(EMULATION / 'sitecustomize.py')!r})"
QUESTION = [f"--{split}_file=in/question.csv" for split in ("train", "validation", "test")]


@pytest.fixture
def folder(tmp_path):
    make_inputs(tmp_path / "in")
    return tmp_path


def train_on(system, folder, *flags, **environment):
    """Start a training on an emulated system: in half a second, for what need not be emulated from the very start."""
    options = ("--task", "in/tiny.yaml", "--threads", 1, "--save_every", 5, *flags)
    return start(folder, *options, change=EMULATED, environment={"EMULATE": system, **environment})


def run_on(system, folder, script, *arguments):
    """Run a script on an emulated system, to a good end."""
    environment = {**os.environ, "EMULATE": system, "PYTHONPATH": str(EMULATION), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    # What is printed may be in the code page of Windows.
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300)
    printed = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0 and "Logging error" not in printed and "could not be saved" not in printed, printed


def assert_complete(run):
    assert state_of(run)["status"] == "done"
    assert (run / "model" / "model.safetensors").is_file() and (run / "report.html").is_file()
    assert not (run / "checkpoints").exists() and not list(run.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------------ disks and names


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(
    "system", ["busy,chmod,fsync", "busy", "chmod", "fsync", "open", "symlink"], ids=lambda system: system
)
def test_a_disk_that_refuses_now_and_then_costs_no_save_and_no_model(folder, system):
    code, log, err = ended(train_on(system, folder, "--output_dir", "run"))
    assert (code, err) == (0, "") and "could not be" not in log
    assert_complete(folder / "run")


@pytest.mark.slow
def test_a_resumed_run_ends_well_where_mapped_files_cannot_be_removed(folder):
    flags = ("--output_dir", "run", "--epochs", 8)
    process = train_on("open,names", folder, *flags)
    while process.exitcode is None and not list(folder.glob("run/checkpoints/step-*[0-9]")):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert ended(process)[0] == 75
    code, log, err = ended(train_on("open,names", folder, *flags))
    assert (code, err) == (0, "") and "resuming after step" in log and "WARNING: run" not in log
    assert_complete(folder / "run")


def test_the_name_of_a_folder_is_one_that_windows_takes(folder):
    flags = ("--label_column", "Is it good?", "--max_steps", 2)
    code, _, err = ended(train_on("names", folder, *QUESTION, *flags))
    assert (code, err) == (0, "")
    assert_complete(folder / "runs" / "tiny,label_column=Is it good-,max_steps=2")


def test_paths_that_become_too_long_are_refused_before_the_training(folder):
    deep = folder / "/".join(["folder " * 5 + "x"] * ((250 - len(str(folder))) // 37))
    for length in (259, 230 - len("/checkpoints")):
        name = "n" * (length - len(str(deep)) - 1)
        code, log, err = ended(train_on("names", folder, "--output_dir", deep / name))
        assert code == 2 and err.count("\n") == 2 and "--output_dir" in err
        assert "epoch" not in log and not deep.exists()


@pytest.mark.slow
def test_a_member_of_an_archive_is_found_whichever_way_its_slashes_lean(folder):
    for member in ("folder/train.csv", "folder\\train.csv"):
        flags = ("--train_file", f"in/data.zip::{member}", "--output_dir", "run", "--overwrite", "--max_steps", 2)
        code, _, err = ended(train_on("backslash", folder, *flags))
        assert (code, err) == (0, "")
        assert_complete(folder / "run")


def test_metrics_that_another_program_has_open_do_not_end_the_run(folder):
    flags = ("--output_dir", "run", "--log_every", 1, "--epochs", 1)
    code, log, err = ended(train_on("none", folder, *flags, EMULATE_LOCKED="metrics.jsonl"))
    assert (code, err) == (0, "")
    assert log.count("Is it open in another program?") == 1
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1]  # made before the other program could open it
    assert state_of(folder / "run")["status"] == "done"


# -------------------------------------------------------------------------------- what must be emulated from the start


@pytest.mark.full
@pytest.mark.parametrize(
    ("system", "flags"),
    [
        ("missing", ["--dry_run"]),
        ("clock", ["--freeze", "encoder", "--log_every", 1, "--batch_size", 4]),
        ("float64", []),
        ("spawn", ["--num_workers", 2, "--epochs", 1]),
        ("text,open,busy,chmod,fsync,names,missing", []),
    ],
    ids=["no module resource", "coarse clock", "no double precision", "spawn", "all of Windows"],
)
def test_a_training_ends_well(folder, system, flags):
    run_on(system, folder, "train.py", "--task", "in/tiny.yaml", "--output_dir", "run", *flags)
    if "--dry_run" not in flags:
        assert_complete(folder / "run")


@pytest.mark.full
def test_labels_that_the_locale_cannot_write_are_learnt_and_answered(folder):
    run_on("text", folder, "train.py", "--task", "in/world.yaml", "--output_dir", "run")
    run_on("text", folder, "predict.py", "--model", "run", "--text", "the film was good")


@pytest.mark.slow
def test_ctrl_c_while_spawned_workers_start_ends_the_run_in_a_line(folder):
    environment = {**os.environ, "EMULATE": "spawn", "PYTHONPATH": str(EMULATION), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), "--task", "in/tiny.yaml", "--output_dir", "run"]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        [*command, "--num_workers", "2"], cwd=folder, env=environment, start_new_session=True, **pipes
    )
    while len(psutil.Process(process.pid).children(recursive=True)) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal signals the whole group
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in errors and errors.count("\n") == 1, errors
    assert state_of(folder / "run")["status"] == "preempted"
