"""A run that was stopped, anywhere and in any way, and started again by the same command: equal to one that was not.

The runs are real processes that end as real ones do, but forked from one that has imported the libraries already: a
start takes half a second and not five. One cell of the matrix, and punisher.py, start them as users do.
With SLOW=1 in the environment each pair of the matrix's values meets in some cell, with FULL=1 all combinations do.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import (
    ROOT,
    TORCHRUN_2,
    bert_config,
    lines_of,
    make_rows,
    run_script,
    write_review_task,
    write_reviews,
    write_table,
)
from punisher import punish
from test_launch import FP16, WRAPPER

from classifier.training import batching

ROWS, BATCH_SIZE, EPOCHS = 200, 16, 3
STEPS_PER_EPOCH = 13  # the last step of an epoch has 8 examples
STEPS = STEPS_PER_EPOCH * EPOCHS
FLAGS = ("--log_every", 1, "--threads", 1)


# ------------------------------------------------------------------------------------- processes that start quickly

# Reads a job in JSON from each line of its input, forks a process for each rank, which becomes a script of its own,
# and answers with their exit codes. Like a launcher it ends the other processes once one has failed.
LAUNCHER = """
import gc, json, os, runpy, signal, socket, sys, time
sys.path.insert(0, {root!r})
import numpy as np
import torch, transformers, accelerate.utils, accelerate.tracking, safetensors.torch
import common
from classifier.data import facts
from classifier.evaluation import metrics, page, report
from classifier.model import dropout, inference, packing
from classifier.training import batching, checkpoint, preemption, progress
import jinja2, matplotlib.figure, scipy.sparse
from matplotlib import font_manager
from transformers import BertForSequenceClassification, get_scheduler, trainer_pt_utils
metrics.compute_metrics(["accuracy", "f1"], np.array([0, 1]), np.array([0, 1]))

gc.collect()
gc.freeze()  # else every run that ends looks through all that is imported here

def wait(pids):
    codes, failed_at, signals = {{}}, None, [signal.SIGTERM, signal.SIGKILL]
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            failed_at = failed_at or (codes[pid] != 0 and time.monotonic())
        elif failed_at and signals and time.monotonic() - failed_at > (5, 15)[2 - len(signals)]:
            number = signals.pop(0)
            for other in set(pids) - codes.keys():
                os.kill(other, number)
        else:
            time.sleep(0.01)
    return [codes[pid] for pid in pids]

for line in sys.stdin:
    job, pids = json.loads(line), []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for rank in range(job["processes"]):
        pid = os.fork()
        # The first one leads the group. Here, as it may not have begun to run when the next one would join it.
        if pid == 0:
            break
        pids.append(pid)
        os.setpgid(pid, pids[0])
    else:
        print(json.dumps(wait(pids)), flush=True)
        continue
    if job["processes"] > 1:
        names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=job["processes"], LOCAL_WORLD_SIZE=job["processes"])
        names |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="tests")
        os.environ.update({{name: str(value) for name, value in names.items()}})
    for number, name in enumerate(["out", "err"], start=1):
        os.dup2(os.open(f"{{job['log']}}.{{name}}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(job["folder"])
    sys.argv = ["train.py", *job["flags"]]
    exec(job["change"])
    runpy.run_path({root!r} + "/train.py", run_name="__main__")
    break
"""


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """A function that trains and returns what a CompletedProcess has; returncodes: of each rank."""
    logs = tmp_path_factory.mktemp("logs")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_NUM", "TORCHELASTIC"))}
    server = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER.format(root=str(ROOT))],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    number = itertools.count()

    def run(*flags, cwd, processes=1, change=""):
        log = logs / str(next(number))
        job = {"flags": [*map(str, flags)], "folder": str(cwd), "change": change, "log": str(log)}
        server.stdin.write(json.dumps({**job, "processes": processes}) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
        out, err = (log.with_name(f"{log.name}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
        return SimpleNamespace(returncodes=codes, stdout=out, stderr=err)

    yield run
    server.stdin.close()
    server.wait(timeout=30)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, vocabulary):
    """A folder with two tasks on the same reviews: off.yaml without dropout, on.yaml with it."""
    folder = tmp_path_factory.mktemp("tasks")
    write_reviews(folder, ROWS)
    for name, rate in (("off", 0.0), ("on", 0.1)):
        rates = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        write_task(folder / f"{name}.yaml", bert_config(vocabulary, **rates))
    return folder


def write_task(file, model):
    return write_review_task(file, model, batch_size=BATCH_SIZE, epochs=EPOCHS, eval_batch_size=8)


@pytest.fixture(scope="module")
def whole(tasks, launch):
    """A function that returns the folder of an unbroken run; each is trained once, and not to be changed."""
    made = {}

    def run(dropout="off", processes=1, *flags, change=""):
        key = (dropout, processes, flags, change)
        if key not in made:
            folder = tasks / f"whole-{len(made)}"
            options = ["--task", f"{dropout}.yaml", *FLAGS, *flags, "--output_dir", folder]
            done = launch(*options, cwd=tasks, processes=processes, change=change)
            assert done.returncodes == [0] * processes, done.stderr
            made[key] = folder
        return made[key]

    return run


# ---------------------------------------------------------------------------------- where and how a run is stopped

# Polls for signals between any two steps, and not once a second: so it is known where the run ends.
STOP = """
import os, signal
from classifier.model import dropout, inference
from classifier.training import preemption
preemption.SECONDS_BETWEEN_POLLS = 0
def stop(calls):
    calls.append(1)
    if len(calls) == 1 and int(os.environ.get("RANK", "0")) in {ranks!r}:
        os.kill(os.getpid(), signal.{how})
"""
IN_A_STEP = """
set_batch, calls = dropout.Masks.set_batch, []
def stopping(self, step, *given):
    set_batch(self, step, *given)
    if step == {step}:
        stop(calls)
dropout.Masks.set_batch = stopping
"""
# In the second of the seven batches of 8 of an evaluation, or of the four that a process has.
IN_AN_EVALUATION = """
compute_logits, evaluations, batches, calls = inference.compute_logits, [], [], []
def count(*_):
    batches.append(1)
    if len(batches) == 2:
        stop(calls)
def stopping(model, *given):
    evaluations.append(1)
    if len(evaluations) != {evaluation}:
        return compute_logits(model, *given)
    handle = model.register_forward_pre_hook(count)
    try:
        return compute_logits(model, *given)
    finally:
        handle.remove()
inference.compute_logits = stopping
"""
# Where: what stops it there, and the steps after which a run that saves every 5 resumes when it was killed. A
# model is saved at its evaluation, too, where it is the best: the first one, after step 13, always is.
WHERE = {
    "in the first epoch": (IN_A_STEP.format(step=7), 7, {5}),
    "in a later epoch": (IN_A_STEP.format(step=34), 34, {30}),
    "in the last step of an epoch": (IN_A_STEP.format(step=13), 13, {10}),
    "in the first step of an epoch": (IN_A_STEP.format(step=14), 14, {13}),
    "in an evaluation": (IN_AN_EVALUATION.format(evaluation=2), 26, {25}),
    "in the last evaluation": (IN_AN_EVALUATION.format(evaluation=3), 39, {35}),
}
FACTORS = {
    "where": list(WHERE),
    "how": ["SIGTERM", "SIGKILL"],
    "processes": [1, 2],
    "told": ["all", "the last"],  # which processes get the signal
    "workers": [0, 2],
    "accumulates": [False, True],
    "dropout": ["off", "on"],
}


def cells():
    """Return the combinations to test: all of them, or so many that each pair of two factors' values is in one."""
    every = [dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())]
    every = [tuple(cell.values()) for cell in every if (cell["processes"], cell["told"]) != (1, "the last")]
    random.Random(0).shuffle(every)
    if os.environ.get("FULL") == "1":
        return sorted(every, key=str)

    def pairs(cell):
        return set(itertools.combinations(enumerate(cell), 2))

    chosen, missing = [], set().union(*map(pairs, every))
    while missing:
        chosen.append(max(every, key=lambda cell: len(pairs(cell) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def names_of(cell):
    return ", ".join(f"{name} {value}" for name, value in zip(FACTORS, cell, strict=True))


def stopping(where, how="SIGTERM", processes=1, told="all"):
    """Return the change that stops a run, and the exit code of a single process."""
    ranks = list(range(processes)) if told == "all" else [processes - 1]
    return STOP.format(how=how, ranks=ranks) + where


def state_of(run):
    return json.loads((run / "state.json").read_text(encoding="utf-8"))


def results_of(run):
    return json.loads((run / "results.json").read_text(encoding="utf-8"))


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def curve_of(run):
    """All that metrics.jsonl says of a training but its speed, each number to its last bit."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    exact = ("loss", "learning_rate", "grad_norm")
    hexadecimal = [{name: line[name].hex() for name in exact if line.get(name) is not None} for line in lines]
    clocked = {"examples_per_second": None, "seconds": None}
    return [{**line, **numbers, **clocked} for line, numbers in zip(lines, hexadecimal, strict=True)]


def assert_equal(run, whole):
    """Two runs on the same number of processes have the same curve, scores and weights, to the last bit."""
    steps = [line["step"] for line in lines_of(run)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) == len(lines_of(whole))
    evaluated = [line["step"] for line in lines_of(run, "eval")]
    assert evaluated == sorted(set(evaluated))
    assert curve_of(run) == curve_of(whole)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
    assert hashlib.sha256(weights[0]).hexdigest() == hashlib.sha256(weights[1]).hexdigest()
    names = ("best_step", "scores", "majority_baseline", "steps", "epochs", "train_examples", "padding_fraction")
    results = [{name: results_of(folder)[name] for name in names} for folder in (run, whole)]
    assert results[0] == results[1]
    assert state_of(run)["status"] == "done"
    assert not (run / "checkpoints").exists() and not (run / "lock.json").exists()


# ---------------------------------------------------------------------------------------------------------- the matrix


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("cell", cells(), ids=names_of)
def test_a_run_that_was_stopped_is_equal_to_one_that_was_not(tasks, whole, launch, tmp_path, cell):
    where, how, processes, told, workers, accumulates, dropout = cell
    change, step_of_signal, steps_of_saves = WHERE[where]
    flags = ["--micro_batch_size", 3] if accumulates else []
    expected = whole(dropout, processes, *flags)
    flags += ["--task", f"{dropout}.yaml", *FLAGS, "--num_workers", workers, "--save_every", 5]
    flags += ["--output_dir", tmp_path / "run"]
    stopped = launch(*flags, cwd=tasks, processes=processes, change=stopping(change, how, processes, told))
    if how == "SIGTERM":
        assert stopped.returncodes == [75] * processes, stopped.stderr
        assert state_of(tmp_path / "run")["status"] == "preempted"
        assert "Traceback" not in stopped.stderr
        resumed_steps = {step_of_signal}
    else:
        assert stopped.returncodes[-1] == -9 and 0 not in stopped.returncodes
        # A process that is left notes that the other is gone, unless the collective that it waits in aborts it.
        assert state_of(tmp_path / "run")["status"] in ("running", "failed" if told == "the last" else "running")
        resumed_steps = steps_of_saves
    done = launch(*flags, cwd=tasks, processes=processes)
    assert done.returncodes == [0] * processes, done.stderr
    assert any(f"resuming after step {step}: " in done.stdout for step in resumed_steps), done.stdout
    assert_equal(tmp_path / "run", expected)


@pytest.mark.slow
def test_two_processes_of_torchrun_go_on(tasks, whole, tmp_path):
    """The signal reaches one process; the other one ends with it."""
    script = tmp_path / "stopped.py"
    change = stopping(WHERE["in a later epoch"][0], "SIGTERM", 2, "the last")
    script.write_text(WRAPPER.format(root=str(ROOT), change=change), encoding="utf-8")
    flags = ["--task", "on.yaml", *FLAGS, "--output_dir", tmp_path / "run"]
    stopped = run_script(script, *flags, cwd=tasks, launcher=TORCHRUN_2)
    assert stopped.returncode == 1
    assert state_of(tmp_path / "run")["status"] == "preempted"
    done = run_script("train.py", *flags, cwd=tasks, launcher=TORCHRUN_2)
    assert done.returncode == 0 and "resuming after step 34" in done.stdout, done.stderr
    assert_equal(tmp_path / "run", whole("on", 2))


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_is_equal(tasks, whole, launch, tmp_path):
    flags = ["--task", "on.yaml", *FLAGS, "--output_dir", tmp_path / "run"]
    for step in (1, 13, 14, 26, 38, 39):
        stopped = launch(*flags, cwd=tasks, change=stopping(IN_A_STEP.format(step=step)))
        assert stopped.returncodes == [75], stopped.stderr
        assert len(list((tmp_path / "run" / "checkpoints").iterdir())) <= 3  # two, and the best one
    assert launch(*flags, cwd=tasks).returncodes == [0]
    assert_equal(tmp_path / "run", whole("on"))


# The next look for signals is some steps later: before it, the batches of a worker that has ended would be missed.
TO_ALL = """
import os, signal, time
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def signalling(self, step, *given):
    set_batch(self, step, *given)
    if step == 7:
        os.killpg(os.getpgid(0), signal.{how})
        time.sleep(1)
dropout.Masks.set_batch = signalling
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_to_all_processes_of_a_run_spares_those_that_load_batches(tasks, whole, launch, tmp_path, how):
    """Clusters and terminals signal the whole group."""
    flags = ["--task", "off.yaml", *FLAGS, "--num_workers", 2, "--output_dir", tmp_path / "run"]
    stopped = launch(*flags, cwd=tasks, change=TO_ALL.format(how=how))
    assert stopped.returncodes == [75], stopped.stderr
    assert launch(*flags, cwd=tasks).returncodes == [0]
    assert_equal(tmp_path / "run", whole())


# ------------------------------------------------------------------------------------------------------ other layouts

SEEN = """
import json, os
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def noting(self, step, ids, *given):
    with open("{file}-" + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps([step, [int(example) for example in ids]]) + chr(10))
    return set_batch(self, step, ids, *given)
dropout.Masks.set_batch = noting
"""


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_sees_the_remaining_examples_of_the_plan(
    tasks, whole, launch, tmp_path, before, after
):
    flags = ["--task", "on.yaml", *FLAGS, "--output_dir", tmp_path / "run"]
    change = stopping(IN_A_STEP.format(step=20), processes=before)
    assert launch(*flags, cwd=tasks, processes=before, change=change).returncodes == [75] * before
    done = launch(*flags, cwd=tasks, processes=after, change=SEEN.format(file=tmp_path / "seen"))
    assert done.returncodes == [0] * after, done.stderr
    assert f"on {after} process(es), before on {before}: the plan's remaining examples" in done.stdout
    seen = {}
    for rank in range(after):
        for line in (tmp_path / f"seen-{rank}").read_text(encoding="utf-8").splitlines():
            step, ids = json.loads(line)
            if step:  # 0 are passes before the training
                seen[step] = sorted(seen.get(step, []) + ids)
    plan = batching.make_plan(ROWS, BATCH_SIZE, seed=42, steps=STEPS)
    assert seen == {step: sorted(batch) for step, batch in enumerate(plan, start=1) if step > 20}
    losses = [[line["loss"] for line in lines_of(folder)] for folder in (tmp_path / "run", whole("on"))]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    np.testing.assert_allclose(losses[0][:21], losses[1][:21], rtol=1e-6)
    assert results_of(tmp_path / "run")["train_examples"] == ROWS * EPOCHS


@pytest.mark.slow
def test_what_changes_no_number_may_change(tasks, whole, launch, tmp_path):
    flags = ["--task", "on.yaml", "--threads", 1, "--output_dir", tmp_path / "run"]
    change = stopping(IN_A_STEP.format(step=20))
    assert launch(*flags, "--log_every", 1, cwd=tasks, change=change).returncodes == [75]
    others = ["--log_every", 4, "--save_every", "1m", "--keep_checkpoints", 5, "--micro_batch_size", 5]
    done = launch(*flags, *others, "--num_workers", 1, "--eval_batch_size", 50, cwd=tasks, processes=2)
    assert done.returncodes == [0, 0], done.stderr
    lines = {line["step"]: line["loss"] for line in lines_of(tmp_path / "run")}
    assert list(lines) == [*range(1, 21), 24, 26, 28, 32, 36, 39]
    losses = [line["loss"] for line in lines_of(whole("on"))]
    assert [lines[step] for step in range(1, 21)] == losses[:20]
    # The mean of steps 21 to 24 and of 37 to 39; the last step of an epoch has 8 examples.
    assert lines[24] == pytest.approx(np.mean(losses[20:24]), rel=1e-5)
    assert lines[39] == pytest.approx(np.average(losses[36:39], weights=[16, 16, 8]), rel=1e-5)


def test_other_settings_and_other_data_are_refused(tasks, launch, tmp_path):
    shutil.copytree(tasks, tmp_path / "tasks", ignore=shutil.ignore_patterns("whole-*"))
    folder = tmp_path / "tasks"
    flags = ["--task", "off.yaml", *FLAGS, "--output_dir", "run"]
    change = stopping(IN_A_STEP.format(step=3))
    assert launch(*flags, cwd=folder, change=change).returncodes == [75]
    before = contents_of(folder)
    for others, words in {
        ("--learning_rate", 0.001): "learning_rate: 0.003 before, 0.001 now",
        ("--seed", 1): "seed: 42 before, 1 now",
        ("--epochs", 4): "epochs: 3.0 before, 4.0 now",
        ("--batch_size", 8): "batch_size: 16 before, 8 now",
        ("--resume", "never"): "holds a run",
    }.items():
        refused = launch(*flags, *others, cwd=folder)
        assert refused.returncodes == [2] and words in refused.stderr, refused.stderr
        assert len(refused.stderr.splitlines()) == 2
    assert contents_of(folder) == before
    same_rows = launch(*flags, "--train_file", "./train.csv", "--learning_rate", 0.001, cwd=folder)
    assert "train_file" not in same_rows.stderr  # of files, the rows count
    write_table(folder / "train.csv", make_rows(ROWS, 99))
    refused = launch(*flags, cwd=folder)
    assert refused.returncodes == [2] and "data: other rows" in refused.stderr


def test_resume_never_wants_an_empty_folder_and_trains_there(tasks, whole, launch, tmp_path):
    flags = ["--task", "off.yaml", *FLAGS, "--resume", "never", "--output_dir", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    assert launch(*flags, cwd=tasks).returncodes == [0]
    assert_equal(tmp_path / "run", whole())
    before = contents_of(tmp_path)
    refused = launch(*flags, cwd=tasks)
    assert refused.returncodes == [2] and "--resume never needs an empty folder" in refused.stderr
    assert contents_of(tmp_path) == before


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_gone_on_from_in_a_new_folder(tasks, whole, launch, tmp_path):
    flags = ["--task", "on.yaml", *FLAGS]
    change = stopping(IN_A_STEP.format(step=20))
    first = tmp_path / "first"
    assert launch(*flags, "--output_dir", first, cwd=tasks, change=change).returncodes == [75]
    before = contents_of(first)
    for number, source in enumerate([first, first / "checkpoints" / "step-00000013"]):
        second = tmp_path / f"second-{number}"
        done = launch(*flags, "--output_dir", second, "--resume", source, cwd=tasks)
        assert done.returncodes == [0], done.stderr
        assert f"resuming after step {(20, 13)[number]}" in done.stdout
        results = [results_of(folder) for folder in (second, whole("on"))]
        for name in ("best_step", "scores", "steps", "train_examples"):
            assert results[0][name] == results[1][name]
        weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (second, whole("on"))]
        assert weights[0] == weights[1]
        # The lines before are in the other folder.
        rest = [line for line in curve_of(whole("on")) if line["step"] > (20, 13)[number]]
        assert curve_of(second) == rest
    assert contents_of(first) == before
    for wrong in (tmp_path / "nowhere", tasks):
        refused = launch(*flags, "--output_dir", tmp_path / "third", "--resume", wrong, cwd=tasks)
        assert refused.returncodes == [2], refused.stderr
    refused = launch(*flags, "--seed", 1, "--output_dir", tmp_path / "third", "--resume", first, cwd=tasks)
    assert refused.returncodes == [2] and "seed: 42 before, 1 now" in refused.stderr


# ------------------------------------------------------------------------------------------------ what has to be kept


# As XLNet does where its tensors have the positions first.
TORCHS_OWN = """
import torch
from classifier.model import dropout
def forward(self, values):
    return torch.nn.functional.dropout(values, self.p, self.training)
dropout.Dropout.forward = forward
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "processes"), [("SIGTERM", 2), ("SIGKILL", 1)])
def test_a_model_that_draws_from_torchs_generator_goes_on_with_the_same_draws(
    tasks, whole, launch, tmp_path, how, processes
):
    expected = whole("on", processes, change=TORCHS_OWN)
    assert curve_of(expected) != curve_of(whole("on", processes))
    flags = ["--task", "on.yaml", *FLAGS, "--save_every", 5, "--output_dir", tmp_path / "run"]
    change = TORCHS_OWN + stopping(IN_A_STEP.format(step=20), how, processes)
    launch(*flags, cwd=tasks, processes=processes, change=change)
    done = launch(*flags, cwd=tasks, processes=processes, change=TORCHS_OWN)
    assert f"resuming after step {20 if how == 'SIGTERM' else 15}" in done.stdout
    assert "some of this model's dropout is torch's own" in done.stdout
    assert_equal(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_scale_of_fp16_survives(tasks, whole, launch, tmp_path, processes):
    """It is halved in the first steps; a run that began with it anew would skip steps once more."""
    fp16 = FP16.format(power=26)
    expected = whole("off", processes, change=fp16)
    overflows = [line["step"] for line in lines_of(expected) if line["grad_norm"] is None]
    assert overflows and max(overflows) < 20
    flags = ["--task", "off.yaml", *FLAGS, "--output_dir", tmp_path / "run"]
    change = stopping(IN_A_STEP.format(step=20), processes=processes)
    stopped = launch(*flags, cwd=tasks, processes=processes, change=change + fp16)
    assert stopped.returncodes == [75] * processes, stopped.stderr
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-00000020" / "progress.json").read_text())
    assert saved["scaler"]["scale"] == 2.0 ** (26 - len(overflows))
    assert launch(*flags, cwd=tasks, processes=processes, change=fp16).returncodes == [0] * processes
    assert_equal(tmp_path / "run", expected)


@pytest.mark.slow
def test_early_stopping_counts_on(tasks, launch, tmp_path):
    """A model that learns nothing is best at its first evaluation; two more of them do not help."""
    flags = ["--task", "off.yaml", *FLAGS, "--learning_rate", 0, "--early_stopping_patience", 2, "--epochs", 9]
    assert launch(*flags, "--output_dir", "unlearning", cwd=tasks).returncodes == [0]
    flags += ["--output_dir", tmp_path / "run"]
    assert launch(*flags, cwd=tasks, change=stopping(IN_A_STEP.format(step=30))).returncodes == [75]
    done = launch(*flags, cwd=tasks)
    assert "stopped early" in done.stdout
    assert [line["step"] for line in lines_of(tmp_path / "run", "eval")] == [13, 26, 39]
    assert_equal(tmp_path / "run", tasks / "unlearning")


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(
    ("where", "how"),
    [("in a later epoch", "SIGKILL"), ("in an evaluation", "SIGTERM"), ("in the last evaluation", "SIGKILL")],
)
def test_tensorboard_shows_one_clean_curve(tasks, whole, launch, tmp_path, where, how):
    flags = ["--task", "off.yaml", *FLAGS, "--trackers", "tensorboard", "--output_dir", tmp_path / "run"]
    launch(*flags, cwd=tasks, change=stopping(WHERE[where][0], how))
    assert launch(*flags, cwd=tasks).returncodes == [0]
    assert_equal(tmp_path / "run", whole())
    assert_same_in_tensorboard(tmp_path / "run")


def assert_same_in_tensorboard(run):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(run / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines_of(run)]
    # An evaluation that is repeated may be there twice, as the same point of the same curve.
    seen = [
        point
        for point, _ in itertools.groupby((event.step, event.value) for event in events.Scalars("validation/loss"))
    ]
    assert seen == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines_of(run, "eval")]


@pytest.mark.slow
def test_an_evaluation_that_is_repeated_is_noted_once(tasks, whole, launch, tmp_path):
    """Saved before it by a signal, and killed after it: it is done again, and its lines written again."""
    flags = ["--task", "off.yaml", *FLAGS, "--trackers", "tensorboard", "--output_dir", tmp_path / "run"]
    assert launch(*flags, cwd=tasks, change=stopping(IN_A_STEP.format(step=26))).returncodes == [75]
    killed = """
import os
from classifier.training.progress import Progress
log_evaluation = Progress.log_evaluation
def killing(self, *given):
    log_evaluation(self, *given)
    for tracker in self.accelerator.trackers:
        tracker.writer.flush()
    os.kill(os.getpid(), 9)
Progress.log_evaluation = killing
"""
    assert launch(*flags, cwd=tasks, change=killed).returncodes == [-9]
    assert [line["step"] for line in lines_of(tmp_path / "run", "eval")] == [13, 26]
    assert launch(*flags, cwd=tasks).returncodes == [0]
    assert_equal(tmp_path / "run", whole())
    assert_same_in_tensorboard(tmp_path / "run")


# ---------------------------------------------------------------------------------------------- killed while it writes


def killed_where(function, condition):
    """A change that kills the run at a call of os.replace or shutil.rmtree by files.py where this holds."""
    module, name = function.split(".")
    return f"""
import os, shutil, types
from classifier import files
original = {function}
def killing(*given, **options):
    if {condition}:
        os.kill(os.getpid(), 9)
    return original(*given, **options)
files.{module} = types.SimpleNamespace(**{{**vars({module}), {name!r}: killing}})
"""


def test_killed_between_done_and_the_removal_of_checkpoints(tasks, whole, launch, tmp_path):
    flags = ["--task", "off.yaml", *FLAGS, "--output_dir", tmp_path / "run"]
    change = killed_where("shutil.rmtree", "str(given[0]).endswith('checkpoints')")
    assert launch(*flags, cwd=tasks, change=change).returncodes == [-9]
    assert state_of(tmp_path / "run")["status"] == "done" and (tmp_path / "run" / "checkpoints").exists()
    done = launch(*flags, cwd=tasks)
    assert done.returncodes == [0] and "already complete" in done.stdout
    (tmp_path / "run" / "lock.json").unlink(missing_ok=True)  # of the process that was killed
    assert_equal(tmp_path / "run", whole())


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("has_one", [False, True])
def test_killed_while_the_model_is_put_in_place(tasks, whole, launch, tmp_path, has_one):
    """Before its rename; where there is a model of an earlier run, that one has just been moved aside for it."""
    flags = ["--task", "off.yaml", *FLAGS, "--output_dir", tmp_path / "run"]
    again, model = [], tmp_path / "run" / "model"
    if has_one:
        assert launch(*flags, "--seed", 1, cwd=tasks).returncodes == [0]
        again, before = ["--overwrite"], contents_of(model)
    change = killed_where("os.replace", "str(given[1]).endswith('/model')")
    assert launch(*flags, *again, cwd=tasks, change=change).returncodes == [-9]
    assert model.with_name("model.tmp").exists() and not model.exists()
    assert model.with_name("model.old").exists() == has_one
    assert state_of(tmp_path / "run")["status"] == "running"
    if has_one:  # the model before is there again until the new one is
        change = (
            "from classifier.training import checkpoint\n\ndef stop(*_):\n    os._exit(3)\n\ncheckpoint.load = stop\n"
        )
        assert launch(*flags, cwd=tasks, change=change).returncodes == [3]
        assert contents_of(model) == before
    assert launch(*flags, cwd=tasks).returncodes == [0]
    assert_equal(tmp_path / "run", whole())
    assert not list((tmp_path / "run").glob("model.*"))


# os.replace of the finished folder, and of the files that make it complete.
SAVING = {
    "with some of its files": "str(given[1]).endswith('progress.json') and 'step-00000020' in str(given[1])",
    "before its manifest": "str(given[1]).endswith('manifest.json') and 'step-00000020' in str(given[1])",
    "before its rename": "str(given[1]).endswith('step-00000020')",
}


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("moment", SAVING)
def test_killed_while_a_checkpoint_is_written(tasks, whole, launch, tmp_path, moment):
    change = killed_where("os.replace", SAVING[moment])
    flags = ["--task", "on.yaml", *FLAGS, "--save_every", 10, "--output_dir", tmp_path / "run"]
    assert launch(*flags, cwd=tasks, change=change).returncodes == [-9]
    left = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert left == {"step-00000010", "step-00000013", "step-00000020.tmp"}
    done = launch(*flags, cwd=tasks)
    assert done.returncodes == [0] and "resuming after step 13" in done.stdout, done.stderr
    assert_equal(tmp_path / "run", whole("on"))


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written_for_the_second_time(tasks, whole, launch, tmp_path):
    """Resumed at a step and told at once to end, a run saves that step again: it is never without it."""
    flags = ["--task", "on.yaml", *FLAGS, "--keep_checkpoints", 1, "--output_dir", tmp_path / "run"]
    assert launch(*flags, cwd=tasks, change=stopping(IN_A_STEP.format(step=7))).returncodes == [75]
    signalled = "from classifier.training.preemption import SignalWatch\npoll = SignalWatch.poll\n\n"
    signalled += "def signalled(self, step=None):\n    self.received = 15\n    return poll(self, step)\n\n"
    change = f"{signalled}SignalWatch.poll = signalled\n" + killed_where(
        "os.replace", "str(given[1]).endswith('step-00000007')"
    )
    assert launch(*flags, cwd=tasks, change=change).returncodes == [-9]
    done = launch(*flags, cwd=tasks)
    assert done.returncodes == [0], done.stderr
    assert "resuming after step 7" in done.stdout
    assert_equal(tmp_path / "run", whole("on"))


# -------------------------------------------------------------------------------------------------------- the punisher


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_the_punisher_changes_nothing(tmp_path, processes):
    kills, steps = (25, 1200) if os.environ.get("FULL") == "1" else {1: (3, 480), 2: (2, 300)}[processes]
    rounds = punish(tmp_path, kills, processes, seed=processes, steps=steps)
    assert all(run["is_equal"] for run in rounds), rounds
