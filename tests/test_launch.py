"""Several processes: decisions are taken by all or none, nothing hangs, and the fp16 loop with its scaler, on a CPU."""

import json
import time

import numpy as np
import pytest
from conftest import ROOT, TORCHRUN_2, lines_of, run_script
from test_preemption import ended, start, start_2

# A script that trains after a change made to the project's own code, in every process.
WRAPPER = """
import runpy, sys, os, time
sys.path.insert(0, {root!r})
{change}
sys.argv[0] = "train.py"
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def train(task, *flags, change=""):
    """Train under torchrun with a change; return (CompletedProcess, seconds, folder of the run)."""
    folder = task.parent
    script = folder / "changed.py"
    script.write_text(WRAPPER.format(root=str(ROOT), change=change), encoding="utf-8")
    options = ["--task", task, "--threads", 1, "--output_dir", "run", *flags]
    started = time.monotonic()
    done = run_script(script, *options, cwd=folder, launcher=TORCHRUN_2, timeout=120)
    return done, time.monotonic() - started, folder / "run"


def train_quickly(task, *flags, processes=2, change=""):
    """Train without a launcher in processes that are forked; return the folder of the run, which must succeed."""
    start_all = start_2 if processes == 2 else lambda *arguments, **options: [start(*arguments, **options)]
    flags = ("--task", task, "--threads", 1, "--output_dir", "run", *flags)
    for process in start_all(task.parent, *flags, change=change):
        code, _, errors = ended(process, 120)
        assert code == 0, errors
    return task.parent / "run"


def state(folder):
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


# Collectives that wait for longer than 15 seconds fail; to tokenise two splits takes 20.
SLOW_TOKENS = """
import datetime
import torch.distributed
begin = torch.distributed.init_process_group
def impatient(*given, **options):
    return begin(*given, **{**options, "timeout": datetime.timedelta(seconds=15)})
torch.distributed.init_process_group = impatient
from classifier.model import tokenization
encode = tokenization.encode
def slow(*given):
    time.sleep(10)
    return encode(*given)
tokenization.encode = slow
"""


@pytest.mark.slow
def test_tokenising_may_take_longer_than_a_collective(review_task, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(review_task.parent / "cache"))  # other tests' tokens would be found, and no wait
    done, seconds, folder = train(review_task, "--max_steps", 2, change=SLOW_TOKENS)
    assert done.returncode == 0, done.stderr
    assert seconds > 20
    assert state(folder)["status"] == "done"


@pytest.mark.slow
def test_early_stopping_is_decided_once(review_task):
    flags = ["--learning_rate", 0, "--eval_every", 3, "--early_stopping_patience", 2, "--epochs", 20]
    folder = train_quickly(review_task, *flags)
    assert [line["step"] for line in lines_of(folder, "eval")] == [3, 6, 9]
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert (results["best_step"], results["steps"]) == (3, 9)


# One example's loss is not finite, in whichever process has it.
BROKEN_LOSS = """
import common
losses_of = common.example_losses
def broken(task, logits, labels, *given):
    losses = losses_of(task, logits, labels, *given)
    if common.step_of_test == 4 and os.environ.get("RANK", "0") == {rank!r}:
        losses = losses * float("nan")
    return losses
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def noting(self, step, *given):
    common.step_of_test = step
    return set_batch(self, step, *given)
dropout.Masks.set_batch = noting
common.step_of_test = 0
common.example_losses = broken
"""


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_loss_that_is_not_finite_stops_all_and_is_told_once(review_task, rank):
    done, _, folder = train(review_task, "--log_every", 5, change=BROKEN_LOSS.format(rank=rank))
    assert done.returncode == 1
    assert done.stderr.count("train.py: error: step 4: the loss is nan") == 1
    assert state(folder)["status"] == "failed" and "step 4" in state(folder)["reason"]
    assert not (folder / "model").exists()


ONE_RANK_FAILS = """
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def failing(self, step, *given):
    if step == 3 and os.environ["RANK"] == {rank!r}:
        raise ValueError("the disk of this machine is on fire")
    return set_batch(self, step, *given)
dropout.Masks.set_batch = failing
"""


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_fails_alone_ends_the_job_in_seconds_with_its_message(review_task, rank):
    done, seconds, folder = train(review_task, "--epochs", 50, change=ONE_RANK_FAILS.format(rank=rank))
    assert done.returncode == 1
    assert "the disk of this machine is on fire" in done.stderr, done.stderr
    assert seconds < 60  # start included; a collective would wait for half an hour
    ended = state(folder)
    assert (ended["status"], ended["reason"]) == ("failed", "the disk of this machine is on fire")


# A gradient that is not finite at step 3 leaves the weights as they were: the loss of step 4 is that of these weights.
NO_UPDATE = """
import torch
from classifier import processes
start = processes.start
def started(*given, **options):
    accelerator = start(*given, **options)
    clip = accelerator.clip_grad_norm_
    norms = []
    def broken(parameters, limit):
        parameters = list(parameters)
        norms.append(1)
        if len(norms) == 3:
            parameters[0].grad.fill_(float("inf"))
        before = [parameter.detach().clone() for parameter in parameters]
        if len(norms) == 4:
            words = "UNCHANGED " + str(all(map(torch.equal, before, processes.kept)))
            os.write(1, (words + chr(10)).encode())  # in one piece: both processes write here
        processes.kept = before
        return clip(parameters, limit)
    accelerator.clip_grad_norm_ = broken
    return accelerator
processes.start = started
"""


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_changes_no_weight(review_task):
    done, _, _ = train(review_task, "--log_every", 6, change=NO_UPDATE)
    assert done.returncode == 1
    assert done.stdout.count("UNCHANGED True") == 2  # of each process
    assert done.stderr.count("step 3: the norm of the gradient is") == 1


FP16 = """
import torch
from classifier import processes
start = processes.start
def started(*given, **options):
    accelerator = start(*given, **options)
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**{power}, growth_interval=10**6)
    return accelerator
processes.start = started
"""


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(("power", "processes"), [(10, 1), (26, 1), (26, 2)])
def test_the_loop_of_fp16_with_its_scaler(review_task, power, processes):
    """A scale of 2**26 overflows float16 until it is halved often enough: such steps stop nothing."""
    flags = ["--log_every", 1, "--scheduler", "linear", "--epochs", 4]
    folder = train_quickly(review_task, *flags, processes=processes, change=FP16.format(power=power))
    lines = lines_of(folder)
    rates = [line["learning_rate"] for line in lines]
    overflows = [line["grad_norm"] is None for line in lines]
    assert (sum(overflows) == 0) == (power == 10)
    assert sum(overflows) < 15
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["skipped_steps"] == sum(overflows)
    # The rate is a function of the step, whether this was taken or not.
    np.testing.assert_allclose(rates, 0.003 * (1 - np.arange(len(rates)) / len(rates)), rtol=1e-9)
    losses = [line["loss"] for line in lines]
    assert np.mean(losses[-5:]) < losses[0] - 0.1
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["hardware"]["gradient_scaler"] and results["hardware"]["products"] == "float16"
