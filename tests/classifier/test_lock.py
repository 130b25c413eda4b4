"""One run per folder: exclusive, taken over from the dead and from nobody else, gone at the end."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT
from test_preemption import SLOW_STEPS, ended, start, start_2, state_of, step_of, wait_for

from classifier.messages import BadInput
from classifier.training import lock

HERE = socket.gethostname()
SYSTEM = lock._system()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path):
    """A folder of a run with a lock that some other process left there: a function that writes it."""
    folder = tmp_path / "run"
    folder.mkdir()

    def left(seconds=0, **changes):
        holder = {"host": HERE, "system": SYSTEM, "pid": os.getppid(), "job": None, "restart": 0, **changes}
        path = folder / "lock.json"
        path.write_text(json.dumps(holder))
        os.utime(path, (time.time() - seconds,) * 2)
        return folder

    return left


@pytest.fixture(scope="session")
def dead_pid():
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def holder_of(folder):
    return json.loads((folder / "lock.json").read_text())


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------- in this process


def test_the_folder_is_made_held_and_given_back(tmp_path):
    folder = tmp_path / "runs" / "new"
    with lock.locked(folder):
        assert holder_of(folder) == {"host": HERE, "system": SYSTEM, "pid": os.getpid(), "job": None, "restart": 0}
        (folder / "state.json").touch()
    assert files(folder) == ["state.json"]


def test_a_new_folder_in_which_nothing_came_to_be_is_gone(tmp_path):
    with pytest.raises(KeyError), lock.locked(tmp_path / "new"):
        raise KeyError
    assert files(tmp_path) == []
    (tmp_path / "mine").mkdir()
    with lock.locked(tmp_path / "mine"):
        pass
    assert files(tmp_path) == ["mine"]  # it was there before


def test_it_is_exclusive(tmp_path):
    with lock.locked(tmp_path):
        before = holder_of(tmp_path)
        with pytest.raises(BadInput) as caught, lock.locked(tmp_path):
            pytest.fail("entered")
        assert f"process {os.getpid()} on {HERE} is already training here" in caught.value.reason
        assert holder_of(tmp_path) == before  # the one that was refused took nothing away
        assert files(tmp_path) == ["lock.json"]
    with lock.locked(tmp_path):
        pass


def test_at_its_end_a_run_takes_no_lock_along_that_is_not_its_own(tmp_path):
    other = {"host": "elsewhere", "pid": 1, "job": None, "restart": 0}
    with lock.locked(tmp_path):
        (tmp_path / "lock.json").write_text(json.dumps(other))
    assert holder_of(tmp_path) == other


def test_a_process_that_lives_is_waited_for(run):
    with pytest.raises(BadInput, match=f"process {os.getppid()} on {HERE}"), lock.locked(run()):
        pytest.fail("entered")


def taken_over(folder):
    with lock.locked(folder):
        assert holder_of(folder)["pid"] == os.getpid()
    assert files(folder) == []


def test_a_dead_process_of_this_host_is_followed_at_once(run, dead_pid):
    taken_over(run(pid=dead_pid))


def test_a_dead_pid_means_nothing_in_another_system_of_this_host(run, dead_pid):
    """Two WSL distributions, WSL and Windows, two containers: one host name, but process numbers of their own."""
    for system in (f"{sys.platform} pid:[1]", "win32"):
        folder = run(system=system, pid=dead_pid)
        with pytest.raises(BadInput, match=f"process {dead_pid} on {HERE} is already training"), lock.locked(folder):
            pass


def test_a_dead_pid_means_nothing_on_another_host(run, dead_pid):
    with (
        pytest.raises(BadInput, match="on elsewhere is already training here"),
        lock.locked(run(host="elsewhere", pid=dead_pid)),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("host", ["elsewhere", HERE])
def test_silence_of_ninety_seconds_is_death(run, host):
    assert lock.SILENCE == 90 > 4 * lock.HEARTBEAT  # a beat or two may be late
    with pytest.raises(BadInput, match="is already training here"), lock.locked(run(host=host, seconds=80)):
        pytest.fail("entered")
    taken_over(run(host=host, seconds=95))


@pytest.mark.parametrize(
    ("job", "restart", "is_followed"), [("7", 1, True), ("7", 0, False), ("8", 1, False), (None, 1, False)]
)
def test_a_requeued_job_follows_itself_at_once(run, monkeypatch, job, restart, is_followed):
    folder = run(host="elsewhere", job="7", restart=0)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    if is_followed:
        taken_over(folder)
    else:
        with pytest.raises(BadInput), lock.locked(folder):
            pytest.fail("entered")


@pytest.mark.parametrize("content", ["", "{", "null", "[1]", '{"host": "x"}'])
def test_a_lock_that_cannot_be_read_is_held_until_it_is_silent(run, content):
    folder = run()
    (folder / "lock.json").write_text(content)
    with pytest.raises(BadInput, match="another process is already training here"), lock.locked(folder):
        pytest.fail("entered")
    os.utime(folder / "lock.json", (time.time() - 95,) * 2)
    taken_over(folder)


def test_it_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    with lock.locked(tmp_path):
        path = tmp_path / "lock.json"
        os.utime(path, (0, 0))
        wait_for(lambda: path.stat().st_mtime > time.time() - 5, 5)
        path.unlink()  # by a person who thought it stale; it is not made again, and nobody dies of that
        time.sleep(0.2)
        assert files(tmp_path) == []
    assert threading.active_count() < 50


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(BadInput, match=r"cannot be written \(Not a directory\)"),
        lock.locked(tmp_path / "file" / "run"),
    ):
        pytest.fail("entered")


def test_two_that_take_over_at_once_see_each_other(run, dead_pid, monkeypatch):
    """The other one writes its name while this one waits."""
    folder = run(pid=dead_pid)
    other = {"host": "elsewhere", "pid": 1, "job": None, "restart": 0}

    class Event:
        def wait(self, seconds):
            (folder / "lock.json").write_text(json.dumps(other))

    monkeypatch.setattr(lock, "threading", SimpleNamespace(Event=Event))
    with pytest.raises(BadInput, match="another process has just begun"), lock.locked(folder):
        pytest.fail("entered")
    assert holder_of(folder) == other


# ---------------------------------------------------------------------------------------------- processes of their own

RACER = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from classifier.messages import BadInput
from classifier.training import lock
while not os.path.exists("go"):
    time.sleep(0.001)
try:
    with lock.locked(Path(sys.argv[1])):
        print("won")
        time.sleep(3)
except BadInput as error:
    print("lost:", error.reason)
"""


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("is_stale", [True, False])
def test_of_several_that_begin_at_once_one_wins(run, dead_pid, tmp_path, is_stale):
    folder = run(pid=dead_pid)
    if not is_stale:
        (folder / "lock.json").unlink()
    (tmp_path / "racer.py").write_text(RACER)
    racers = [start(tmp_path, folder, ROOT, script=tmp_path / "racer.py", name=f"racer {n}") for n in range(4)]
    time.sleep(1)
    (tmp_path / "go").touch()
    words = [ended(racer)[1] for racer in racers]
    assert sum(word == "won\n" for word in words) == 1, words
    assert sum(word.startswith("lost: ") for word in words) == 3
    assert files(folder) == []


FLAGS = ("--threads", 1, "--epochs", 100, "--log_every", 1, "--output_dir", "run")


@pytest.fixture
def trains(review_task):
    """A run that trains for long; its folder."""
    process = start(review_task.parent, "--task", review_task, *FLAGS, change=SLOW_STEPS, name="first")
    wait_for(lambda: step_of(review_task.parent / "run") >= 2)
    yield process, review_task.parent / "run"
    process.kill()
    process.join()


def test_a_second_run_in_the_folder_is_refused(trains, review_task):
    first, folder = trains
    before = time.monotonic()
    one, two = (
        start(folder.parent, "--task", review_task, *FLAGS),
        start_2(folder.parent, "--task", review_task, *FLAGS),
    )
    reason = f"train.py: error: run: process {first.pid} on {HERE} is already training here\n"
    for process in (one, *two):
        code, _, err = ended(process, 30)
        assert code == 2
        assert err.startswith(reason) and err.count("\n") == 2 and "--output_dir" in err
    assert time.monotonic() - before < 30
    assert holder_of(folder)["pid"] == first.pid and first.exitcode is None
    assert state_of(folder)["status"] == "running"
    step = step_of(folder)
    wait_for(lambda: step_of(folder) > step + 1)  # the first one does not mind


def test_a_run_whose_folder_was_taken_over_leaves_and_takes_nothing_along(review_task):
    folder = review_task.parent / "run"
    change = f"{SLOW_STEPS}\nfrom classifier.training import lock\nlock.HEARTBEAT = 0.2"
    process = start(folder.parent, "--task", review_task, *FLAGS, change=change)
    wait_for(lambda: step_of(folder) >= 2)
    other = {"host": "elsewhere", "pid": 1, "job": None, "restart": 0}
    (folder / "lock.json.tmp").write_text(json.dumps(other))
    os.replace(folder / "lock.json.tmp", folder / "lock.json")
    code, _, err = ended(process, 10)
    assert (code, err) == (1, "run: another run has taken this folder over; leaving it\n")
    assert holder_of(folder) == other
    assert state_of(folder)["status"] == "running"  # the other's


def test_after_a_kill_the_same_command_takes_over_at_once(trains, review_task):
    first, folder = trains
    os.kill(first.pid, 9)
    first.join()
    assert holder_of(folder)["pid"] == first.pid
    code, _, err = ended(start(folder.parent, "--task", review_task, *FLAGS, "--max_steps", 3))
    assert (code, "max_steps: None before, 3 now" in err) == (2, True)  # looked at before it is claimed
    process = start(folder.parent, "--task", review_task, *FLAGS, change=SLOW_STEPS)
    wait_for(lambda: process.exitcode is not None or holder_of(folder)["pid"] == process.pid, 15)
    assert process.exitcode is None
    os.kill(process.pid, 15)
    assert ended(process)[0] == 75


def test_nothing_stays_of_a_run_that_could_not_begin(review_task):
    code, _, err = ended(start(review_task.parent, "--task", review_task, *FLAGS, "--model", "./nowhere"))
    assert code == 2, err
    code, _, err = ended(start(review_task.parent, "--task", review_task, *FLAGS, "--max_length", 9999))
    assert code == 2, err
    assert not (review_task.parent / "run").exists()


def test_no_lock_stays_of_a_run_that_ended(review_task):
    flags = ("--task", review_task, *FLAGS, "--max_steps", 2)
    assert ended(start(review_task.parent, *flags))[0] == 0
    folder = review_task.parent / "run"
    assert not [name for name in files(folder) if "lock" in name]
    before = {name: (folder / name).stat().st_mtime_ns for name in files(folder)}
    assert ended(start(review_task.parent, *flags))[0] == 0  # already complete: nothing is touched
    assert {name: (folder / name).stat().st_mtime_ns for name in files(folder)} == before
