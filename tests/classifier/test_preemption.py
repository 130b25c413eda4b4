"""Signals that end a run, and the time to save: in one process, in two, under torchrun, with loader processes."""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import ROOT, TORCHRUN_2, lines_of

from classifier import files
from classifier.files import sha256, sync
from classifier.messages import BadInput, Preempted, RunFailed
from classifier.training import checkpoint, preemption

# ------------------------------------------------------------------- scripts in processes of their own, started quickly

# Set up as a shell would do it: a session, a folder, an environment, files for what it prints.
IN_A_PROCESS = """
import multiprocessing, os, runpy, signal, sys, time
multiprocessing.set_start_method("fork", force=True)  # for loaders: as in a process that was not forked itself
os.setsid()
os.chdir({folder!r})
os.environ.update({environment!r})
os.dup2(os.open({output!r} + ".out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
os.dup2(os.open({output!r} + ".err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)
sys.stdin = open(0, closefd=False)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = {argv!r}
sys.path.insert(0, {root!r})
{change}
if __name__ == "__main__":
    runpy.run_path({script!r}, run_name="__main__")
"""


# What train.py, evaluate.py and predict.py import in their functions.
IMPORTED = [
    *("common", "classifier.evaluation.report", "classifier.model.inference", "classifier.model.models"),
    *("classifier.model.packing", "classifier.predictor", "classifier.chunks", "classifier.training.checkpoint"),
    *("classifier.training.progress", "classifier.training.preemption"),
]


def start(folder, *flags, change="", script="train.py", name="run", environment=None):
    """Start a script of the project in a process of its own, after a change made to the project's code there.

    It is forked from a server that has imported everything: half a second instead of five. Returns the process, with
    its output's path beside it, for `ended`.
    """
    if not forkserver._forkserver._forkserver_pid:
        modules = [*IMPORTED, "transformers.models.bert.modeling_bert"]
        multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = str(ROOT)  # Python 3.11 imports the modules with its own sys.path
        forkserver.ensure_running()
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
    output = str(Path(folder) / f"output of {name}")
    variables = {"TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    words = {"folder": str(folder), "environment": variables, "output": output, "root": str(ROOT), "change": change}
    argv = [str(ROOT / script), *map(str, flags)]
    file = Path(f"{output}.py")
    file.write_text(IN_A_PROCESS.format(**words, argv=argv, script=str(ROOT / script)), encoding="utf-8")
    process = multiprocessing.get_context("forkserver").Process(
        target=runpy.run_path, args=(str(file), None, "__main__")
    )
    process.start()
    process.output = output
    return process


def start_2(folder, *flags, environment=None, **options):
    """Start two processes of one group, as torchrun does, but without a launcher that would end one with the other."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    group["OMP_NUM_THREADS"] = "1"
    return [
        start(
            folder,
            *flags,
            name=f"rank {rank}",
            environment={**group, "RANK": rank, "LOCAL_RANK": rank, **(environment or {})},
            **options,
        )
        for rank in "01"
    ]


def ended(process, timeout=60):
    """Wait for a process of `start`; return (exit code, standard output, standard error)."""
    process.join(timeout)
    out, err = (Path(f"{process.output}.{end}").read_text(encoding="utf-8") for end in ("out", "err"))
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it did not end in {timeout} s:\n{out}\n{err}")
    return process.exitcode, out, err


def wait_for(condition, timeout=60):
    """Wait until condition() is true."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def state_of(run):
    return json.loads((run / "state.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------------------------------- in this process


@pytest.mark.parametrize(
    ("words", "interval"),
    [("epoch", (13, None)), ("5", (5, None)), ("0.5m", (None, 0.5)), ("10m", (None, 10.0)), ("1e2m", (None, 100.0))],
)
def test_the_words_of_save_every(words, interval):
    assert preemption.save_interval(words, 13) == interval


@pytest.mark.parametrize("words", ["0", "-1", "1.5", "", "m", "0m", "-1m", "nanm", "infm", "10s", "epochs", "10 m m"])
def test_words_that_are_no_interval(words):
    with pytest.raises(BadInput, match="no interval") as caught:
        preemption.save_interval(words, 13)
    assert "epoch" in caught.value.advice


class Clock:
    """Stands in for the module time; counts how often it is asked."""

    def __init__(self):
        self.now, self.asked = 100.0, 0

    def monotonic(self):
        self.asked += 1
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(preemption, "time", clock)
    return clock


@pytest.fixture
def signals():
    """A SignalWatch of one process; the signals go back to what they did before."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield preemption.SignalWatch(SimpleNamespace(num_processes=1))
    for number, handler in before.items():
        signal.signal(number, handler)


def never():
    pytest.fail("saved")


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_outside_of_training_a_signal_ends_the_process_there_and_then(signals, number):
    with pytest.raises(Preempted, match=f"{number.name}: stopped; the same command resumes"):
        signal.raise_signal(number)
    with signals.training(never, (None, None), 0):
        pass
    with pytest.raises(Preempted):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_in_training_a_signal_waits_for_the_next_look_and_saves_once(signals, number):
    saves = []

    def save():
        assert signals.is_training  # another signal must not end the process in the middle of it
        saves.append(1)
        return True

    with (
        pytest.raises(Preempted, match=f"{number.name}: saved between two steps"),
        signals.training(save, (5, None), 0),
    ):
        assert signals.poll(1) is False
        signal.raise_signal(number)
        assert saves == []
        signals.poll_next_time()
        signals.poll(2)
    assert saves == [1]


def test_a_signal_whose_save_fails_is_a_failure(signals):
    with pytest.raises(RunFailed, match="SIGTERM: not saved"), signals.training(lambda: False, (5, None), 0):
        signal.raise_signal(signal.SIGTERM)
        signals.poll(1)


def test_other_errors_of_the_training_are_not_saved(signals):
    with pytest.raises(KeyError), signals.training(never, (5, None), 0):
        raise KeyError
    assert not signals.is_training


def test_a_second_interrupt_ends_it_at_once_but_not_within_a_second(signals, clock):
    with pytest.raises(Preempted, match="SIGINT: saved between"), signals.training(lambda: True, (5, None), 0):
        signal.raise_signal(signal.SIGINT)
        clock.now += 0.9
        try:  # the launcher sends on what the terminal has sent already
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pytest.fail("not one interrupt, but two")
        clock.now += 0.2
        signal.raise_signal(signal.SIGTERM)  # a cluster that asks again gets the same answer
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGINT)
        assert type(caught.value) is KeyboardInterrupt
        signals.poll(1)


def test_the_first_signal_is_the_one_that_is_named(signals):
    with pytest.raises(Preempted, match="SIGUSR1"), signals.training(lambda: True, (5, None), 0):
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        signals.poll(1)


@pytest.mark.parametrize(("seconds", "least", "most"), [(0.001, 10, 25), (0.02, 10, 16), (0.4, 10, 26), (3, 3, 4)])
def test_processes_meet_about_once_a_second(signals, clock, seconds, least, most):
    with signals.training(never, (None, None), 0):
        clock.asked = 0
        for step in range(1, round(10 / seconds) + 2):
            signals.poll(step)
            clock.now += seconds
        assert least <= clock.asked <= most


def test_a_reset_looks_at_once(signals, clock):
    with signals.training(never, (None, None), 0):
        for step in range(2000):
            signals.poll(step)
            clock.now += 0.001
        clock.asked = 0
        signals.poll(2001)
        assert clock.asked == 0
        signals.poll_next_time()
        clock.asked = 0
        signals.poll(2002)
        assert clock.asked == 1


def test_saves_by_steps_are_due_at_multiples_that_are_new(signals, clock):
    with signals.training(never, (5, None), 10):  # it resuming after step 10, which is saved
        due = []
        for step in range(10, 31):
            clock.now += 0.001
            if signals.poll(step):
                due.append(step)
        assert due == [15, 20, 25, 30]
        assert signals.poll() is False  # in an evaluation


def test_saves_by_minutes_are_due_when_they_are_over(signals, clock):
    with signals.training(never, (None, 1), 0):
        due = []
        for step in range(600):
            if signals.poll(step):
                due.append(clock.now - 100)
            signals.poll()  # an evaluation's: no place to save
            clock.now += 0.5
        assert len(due) == 4
        for number, seconds in enumerate(due, start=1):
            assert 60 * number <= seconds <= 60 * number + 3 * number


def test_without_sigusr1_as_on_windows(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    before = {name: signal.getsignal(getattr(signal, name)) for name in ("SIGINT", "SIGTERM")}
    module = runpy.run_path(preemption.__file__)
    assert module["SIGNALS"] == [signal.SIGINT, signal.SIGTERM]
    signals = module["SignalWatch"](SimpleNamespace(num_processes=1))
    try:
        with pytest.raises(Preempted, match="SIGTERM"), signals.training(lambda: True, (5, None), 0):
            signal.raise_signal(signal.SIGTERM)
            signals.poll(1)
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize(("system", "synced"), [("nt", ["a.txt"]), ("posix", ["", "a.txt"])])
def test_windows_opens_no_folder_to_sync_it(tmp_path, monkeypatch, system, synced):
    opened = []

    def noting_open(path, flags):
        opened.append(path)
        return os.open(path, flags)

    some = {name: getattr(os, name) for name in ("O_RDONLY", "O_RDWR", "fsync", "close")}
    monkeypatch.setattr(files, "os", SimpleNamespace(name=system, open=noting_open, **some))
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path, tmp_path / "a.txt"):
        sync(path)
    assert opened == [tmp_path / name for name in synced]


# ---------------------------------------------------------------------------------------------- processes of their own

SLOW_STEPS = """
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def slow(*given):
    time.sleep(0.05)
    return set_batch(*given)
dropout.Masks.set_batch = slow
"""
# Each batch of an evaluation takes a while; that one has begun is noted in a file.
SLOW_EVALUATION = """
from classifier.model import inference
send = inference.send_to_device
def slow(*given):
    open("evaluating", "a").close()
    time.sleep({seconds})
    return send(*given)
inference.send_to_device = slow
"""
FLAGS = ("--output_dir", "run", "--threads", 1, "--log_every", 1, "--epochs", 100)


def step_of(run):
    return max((line["step"] for line in lines_of(run)), default=0) if (run / "metrics.jsonl").exists() else 0


def check_preempted(run, name):
    """The run says that it was preempted, and every checkpoint is whole; return the step after which it resumes."""
    state = state_of(run)
    assert (state["status"], state["reason"]) == (
        "preempted",
        f"{name}: saved between two steps; the same command resumes",
    )
    paths = checkpoint.checkpoint_paths(run)
    assert paths and [checkpoint.find_damage(path) for path in paths] == [None] * len(paths)
    assert not (run / "lock.json").exists()
    assert not list(run.rglob("*.tmp"))
    return int(checkpoint.newest_valid(run).name.removeprefix("step-"))


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_saves_and_ends_with_75(review_task, number):
    run = review_task.parent / "run"
    process = start(review_task.parent, "--task", review_task, *FLAGS, change=SLOW_STEPS)
    wait_for(lambda: step_of(run) >= 5)
    os.kill(process.pid, number)
    code, _, err = ended(process, 15)
    assert (code, err) == (75, f"train.py: {number.name}: saved between two steps; the same command resumes\n")
    assert check_preempted(run, number.name) >= step_of(run) - 1
    # No line is for a step that is not in the checkpoint, nor is one missing.
    assert [line["step"] for line in lines_of(run)] == list(range(1, step_of(run) + 1))


def test_a_signal_before_the_training_ends_at_once(review_task):
    slow = "def slow(*given):\n    open('tokenising', 'w')\n    time.sleep(60)\n"
    change = f"from classifier.model import tokenization\n{slow}tokenization.tokenize_splits = slow"
    process = start(review_task.parent, "--task", review_task, *FLAGS, change=change)
    wait_for((review_task.parent / "tokenising").exists)
    os.kill(process.pid, signal.SIGTERM)
    code, _, err = ended(process, 5)
    assert (code, err) == (75, "train.py: SIGTERM: stopped; the same command resumes\n")
    assert not (review_task.parent / "run").exists()


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("number_of_processes", [1, 2])
def test_a_signal_in_a_long_evaluation_does_not_wait_for_its_end(review_task, number_of_processes):
    folder = review_task.parent
    flags = ("--task", review_task, *FLAGS, "--eval_batch_size", 1)  # 50 batches
    start_them = start_2 if number_of_processes == 2 else lambda *given, **options: [start(*given, **options)]
    processes = start_them(folder, *flags, change=SLOW_EVALUATION.format(seconds=1))
    wait_for((folder / "evaluating").exists)
    os.kill(processes[-1].pid, signal.SIGTERM)  # one of them is told, all end
    before = time.monotonic()
    assert [ended(process, 20)[0] for process in processes] == [75] * number_of_processes
    assert time.monotonic() - before < 15
    assert check_preempted(folder / "run", "SIGTERM") == 13
    assert lines_of(folder / "run", "eval") == []  # it comes again, as a whole


def test_a_second_interrupt_does_not_wait(review_task):
    folder = review_task.parent
    process = start(folder, "--task", review_task, *FLAGS, change=SLOW_EVALUATION.format(seconds=60))
    wait_for((folder / "evaluating").exists)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.2)
    os.kill(process.pid, signal.SIGINT)
    code, _, err = ended(process, 5)
    assert (code, err) == (1, "\ntrain.py: interrupted\n")
    assert (state_of(folder / "run")["status"], state_of(folder / "run")["reason"]) == ("failed", "interrupted")


# The terminal sends Ctrl-C to all, the processes that load batches included.
def test_an_interrupt_of_all_processes_with_loaders(review_task):
    run = review_task.parent / "run"
    flags = ("--task", review_task, *FLAGS, "--num_workers", 2)
    process = start(review_task.parent, *flags, change=SLOW_STEPS)
    wait_for(lambda: step_of(run) >= 3)
    assert len(psutil.Process(process.pid).children()) >= 2
    os.killpg(process.pid, signal.SIGINT)
    code, _, err = ended(process, 15)
    assert (code, err) == (75, "train.py: SIGINT: saved between two steps; the same command resumes\n")
    check_preempted(run, "SIGINT")


SPAWN = """
import multiprocessing
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn", force=True)
"""


@pytest.mark.slow
def test_loaders_that_are_spawned_as_on_windows_and_macs(review_task):
    flags = ("--task", review_task, "--threads", 1, "--epochs", 1, "--log_every", 1, "--output_dir")
    assert ended(start(review_task.parent, *flags, "forked"))[0] == 0
    code, _, err = ended(start(review_task.parent, *flags, "spawned", "--num_workers", 2, change=SPAWN), 120)
    assert (code, err) == (0, "")
    losses = [[line["loss"] for line in lines_of(review_task.parent / name)] for name in ("forked", "spawned")]
    assert losses[0] == losses[1]
    models = [review_task.parent / name / "model" / "model.safetensors" for name in ("forked", "spawned")]
    assert sha256(models[0]) == sha256(models[1])


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("target", ["launcher", "one worker"])
def test_two_processes_under_torchrun_end_together(review_task, target):
    folder = review_task.parent
    script = folder / "slow.py"
    words = {"root": str(ROOT), "change": SLOW_STEPS, "script": str(ROOT / "train.py")}
    content = "import runpy, sys, time\nsys.path.insert(0, {root!r})\n{change}\nsys.argv[0] = 'train.py'\n"
    script.write_text((content + "runpy.run_path({script!r}, run_name='__main__')\n").format(**words))
    command = [*TORCHRUN_2, str(script), "--task", str(review_task), *map(str, FLAGS)]
    with open(folder / "output", "w") as output:
        launcher = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    try:
        wait_for(lambda: step_of(folder / "run") >= 3, 120)
        workers = psutil.Process(launcher.pid).children()
        first = json.loads((folder / "run" / "lock.json").read_text())["pid"]
        other = next(worker.pid for worker in workers if worker.pid != first)
        os.kill(launcher.pid if target == "launcher" else other, signal.SIGTERM)
        before = time.monotonic()
        code = launcher.wait(30)
        seconds = time.monotonic() - before
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    said = (folder / "output").read_text()
    assert code != 0
    assert seconds < 15, said
    assert not any(worker.is_running() for worker in workers)
    check_preempted(folder / "run", "SIGTERM")
    assert "train.py: SIGTERM: saved between two steps; the same command resumes\n" in said
