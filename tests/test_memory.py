"""Too little memory: how many examples are computed at a time is found out, halved, and changes no number."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import lines_of
from test_preemption import ended, start, start_2, state_of

from classifier.messages import BadInput, RunFailed
from classifier.model import inference, padding

LENGTHS = [3, 9, 4, 8, 5, 7, 6, 2, 9, 1]
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.75 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


class Model(torch.nn.Module):
    """Has memory for so many examples. Its dropout is torch's own, and draws from torch's generator."""

    def __init__(self, room, message=CUDA):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 2)
        self.dropout = torch.nn.Dropout(0.5)
        self.room, self.message, self.shapes, self.modes = room, message, [], []

    def forward(self, input_ids, attention_mask):
        self.shapes.append(tuple(input_ids.shape))
        self.modes.append(self.training)
        if len(input_ids) > self.room:
            raise RuntimeError(self.message)
        return SimpleNamespace(logits=self.head(self.dropout(self.embedding(input_ids)).mean(dim=1)))


@pytest.fixture
def probe(accelerator):
    examples = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in LENGTHS], "length": LENGTHS})
    seen = []
    packer = SimpleNamespace(
        collate=lambda rows: padding.pad(rows, 0),
        set_batch=lambda step, ids, lengths, device: seen.append((ids.tolist(), lengths.tolist())),
    )
    probed = lambda model, size: inference.largest_micro_batch(accelerator, model, packer, examples, size)  # noqa: E731
    return probed, seen, examples, packer


@pytest.mark.parametrize("message", [CUDA, CPU])
@pytest.mark.parametrize(
    ("room", "size", "tried"),
    [(99, 8, [8]), (8, 8, [8]), (7, 8, [8, 4]), (3, 8, [8, 4, 2]), (1, 7, [7, 4, 2, 1]), (5, 6, [6, 3]), (1, 1, [1])],
)
def test_the_size_or_a_half_or_a_quarter_of_it(probe, message, room, size, tried):
    model = Model(room, message)
    largest, seen, *_ = probe
    assert largest(model, size) == tried[-1]
    assert model.shapes == [(size, 9) for size in tried]  # the longest examples
    assert seen == [([1, 8, 3, 5, 6, 4, 2, 0][:size], [9, 9, 8, 7, 6, 5, 4, 3][:size]) for size in tried]


def test_fewer_examples_than_the_size(probe):
    model = Model(99)
    assert probe[0](model, 64) == 64
    assert model.shapes == [(10, 9)]


def test_probing_leaves_no_trace(probe):
    model = Model(3).train()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.get_rng_state()
    probe[0](model, 8)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert model.training


def test_room_for_the_optimizer_is_set_aside(probe, monkeypatch):
    shapes, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda value: shapes.append(value.shape) or empty_like(value))
    model = Model(99)
    model.embedding.requires_grad_(False)  # has no moments
    probe[0](model, 8)
    assert shapes == [(2, 4), (2, 4), (2,), (2,)]


def test_not_even_one_is_bad_input(probe):
    with pytest.raises(BadInput, match="not even one example") as caught:
        probe[0](Model(0), 8)
    assert "--max_length" in caught.value.advice


def test_other_errors_pass(probe):
    with pytest.raises(RuntimeError, match="shapes"):
        probe[0](Model(0, "mat1 and mat2 shapes cannot be multiplied"), 8)


def test_the_processes_agree_on_the_least(probe, monkeypatch):
    monkeypatch.setattr(inference, "gather_object", lambda sizes: [*sizes, 4, 5])
    assert probe[0](Model(99), 8) == 4
    assert probe[0](Model(3), 8) == 2


# --------------------------------------------------------------------------------------------------------- end to end

# Each example of a micro-batch asks for 64 MB; there are 700 MB. What torch raises then is the real thing.
LITTLE_MEMORY = """
import resource, torch
def ask_for(examples):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 700 * 2**20, limits[1]))
    try:
        torch.empty(examples * 2**24)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
"""
IN_TRAINING = """
from classifier.model import dropout
set_batch = dropout.Masks.set_batch
def hungry(self, step, ids, *arguments):
    if step in {steps} and torch.is_grad_enabled() and os.environ.get("RANK", "0") == {rank!r}:
        ask_for(len(ids))
    return set_batch(self, step, ids, *arguments)
dropout.Masks.set_batch = hungry
"""
IN_EVALUATION = """
import functools
from transformers import BertForSequenceClassification
forward = BertForSequenceClassification.forward
@functools.wraps(forward)
def hungry(self, *arguments, **inputs):
    if torch.is_inference_mode_enabled():
        ask_for(int((inputs["position_ids"] == 1).sum()))  # each example has one of them
    return forward(self, *arguments, **inputs)
BertForSequenceClassification.forward = hungry
"""
FLAGS = ("--threads", 1, "--log_every", 1, "--save_every", 3, "--output_dir", "run")


def hungry(steps, rank="0"):
    return LITTLE_MEMORY + IN_TRAINING.format(steps=steps, rank=rank)


def losses_of(run):
    return [line["loss"] for line in lines_of(run)]


@pytest.fixture
def losses(review_task):
    """The losses of a run that has memory enough."""
    flags = [*FLAGS[:-1], "whole"]
    assert ended(start(review_task.parent, "--task", review_task, *flags))[0] == 0
    return losses_of(review_task.parent / "whole")


def test_a_run_that_runs_out_of_memory_resumes_by_the_same_command(review_task, losses):
    folder = review_task.parent
    change = hungry("range(5, 99)")
    code, _, err = ended(start(folder, "--task", review_task, *FLAGS, change=change))
    assert code == 1
    assert err == (
        "train.py: error: out of memory with 16 examples at a time\n"
        "The same command resumes with micro-batches of 8, which give the same numbers.\n"
    )
    state = state_of(folder / "run")
    assert (state["status"], state["micro_batch_size"]) == ("failed", 8)
    assert state["reason"] == "out of memory with 16 examples at a time"
    code, log, err = ended(start(folder, "--task", review_task, *FLAGS, change=change))
    assert (code, err) == (0, "") and "after step 3" in log
    np.testing.assert_allclose(losses_of(folder / "run"), losses, rtol=2e-6)
    assert json.loads((folder / "run" / "results.json").read_text())["steps"] == 26


@pytest.mark.slow
def test_it_is_halved_again_and_stays_so(review_task, losses):
    folder = review_task.parent
    change = hungry("range(5, 99)").replace("700 * 2**20", "300 * 2**20")
    codes, sizes = [], []
    for _ in range(3):
        code, *_ = ended(start(folder, "--task", review_task, *FLAGS, change=change))
        codes.append(code)
        sizes.append(state_of(folder / "run")["micro_batch_size"])
    assert (codes, sizes) == ([1, 1, 0], [8, 4, 4])
    np.testing.assert_allclose(losses_of(folder / "run"), losses, rtol=2e-6)


def test_auto_finds_what_fits_before_the_first_step(review_task, losses):
    folder = review_task.parent
    flags = ("--task", review_task, *FLAGS, "--micro_batch_size", "auto")
    code, log, err = ended(start(folder, *flags, change=hungry("range(99)")))
    assert (code, err) == (0, "")
    assert "micro-batches of 8 (--micro_batch_size auto)" in log
    np.testing.assert_allclose(losses_of(folder / "run"), losses, rtol=2e-6)


@pytest.mark.slow
def test_auto_is_not_asked_again_where_the_run_goes_on(review_task):
    """Other sizes would round otherwise: the same weights need the same one."""
    folder = review_task.parent
    flags = ("--task", review_task, *FLAGS, "--micro_batch_size", "auto")
    kill = """
from classifier.training import progress
log_step = progress.Progress.log_step
def dying(self):
    log_step(self)
    if self.state.step == 8:
        os._exit(9)
progress.Progress.log_step = dying
"""
    assert ended(start(folder, *flags, change=hungry("range(99)") + kill))[0] == 9
    code, log, _ = ended(start(folder, *flags))  # there is memory enough now
    assert code == 0 and "after step 6" in log and "micro-batches of 8" in log


def test_auto_tries_what_training_will_do(review_task, tiny_bert):
    noting = """
from classifier.model import inference
largest = inference.largest_micro_batch
def noted(accelerator, model, *arguments):
    print("TRAINING", model.training)
    return largest(accelerator, model, *arguments)
inference.largest_micro_batch = noted
"""
    flags = ("--task", review_task, *FLAGS, "--micro_batch_size", "auto", "--model", tiny_bert, "--max_steps", 1)
    code, log, err = ended(start(review_task.parent, *flags, change=noting))
    assert code == 0, err
    assert "TRAINING True" in log


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_one_of_two_processes_runs_out_of_memory(review_task, rank):
    folder = review_task.parent
    change = hungry("range(5, 99)", rank).replace("700 * 2**20", "400 * 2**20")  # 8 examples each
    processes = start_2(folder, "--task", review_task, *FLAGS, change=change)
    done = [ended(process, 40) for process in processes]
    assert done[int(rank)][0] == 1
    assert done[int(rank)][2].startswith("train.py: error: out of memory with 8 examples at a time\n")
    assert done[1 - int(rank)][0] != 0
    state = state_of(folder / "run")
    assert (state["status"], state["micro_batch_size"]) == ("failed", 4)
    assert state["reason"] == "out of memory with 8 examples at a time"
    done = [ended(process, 40) for process in start_2(folder, "--task", review_task, *FLAGS, change=change)]
    assert [code for code, *_ in done] == [0, 0]


@pytest.mark.slow
def test_out_of_memory_in_an_evaluation_halves_its_batch(review_task):
    folder = review_task.parent
    flags = ("--task", review_task, *FLAGS, "--eval_batch_size")
    scores = []
    for size in (40, 10):
        run = ("--output_dir", f"run-{size}")
        code, _, err = ended(start(folder, *flags, size, *run, change=LITTLE_MEMORY + IN_EVALUATION))
        assert (code, err) == (0, "")
        scores.append(json.loads((folder / f"run-{size}" / "results.json").read_text(encoding="utf-8"))["scores"])
    assert scores[0] == scores[1]
    flags = ("--model", "run-40", "--threads", 1, "--eval_batch_size", 40)
    code, _, err = ended(start(folder, *flags, script="evaluate.py", change=LITTLE_MEMORY + IN_EVALUATION))
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    "message", [CUDA, CPU, "DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes"]
)
def test_a_batch_without_memory_is_computed_in_halves(probe, accelerator, message):
    examples, packer = probe[2:]
    sizes, room = [], 3

    def length(inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > room:
            raise RuntimeError(message)
        return inputs["attention_mask"].sum(1, keepdim=True)

    assert inference.compute_outputs(length, examples, accelerator, 8, packer)[:, 0].tolist() == LENGTHS
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2]
    room = 0
    with pytest.raises(RunFailed, match="out of memory with one example in an evaluation\nTry a smaller --max_length"):
        inference.compute_outputs(length, examples, accelerator, 8, packer)
