"""The plan: which examples are in which step, each process's part of a step, and the micro-batches it computes.

The plan is a list of global batches, each an array of example ids, and a function of (seed, batch_size) only. Each
process takes its part of every global batch *before* the DataLoader. So neither the number of processes nor the
micro-batch size changes which examples make a step, and to resume after step N is to index the plan.
"""

import signal
from functools import partial
from itertools import count
from multiprocessing import resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader

from classifier.data.cache import column_array
from classifier.data.splits import stratified
from classifier.training.preemption import SIGNALS

# Split a micro-batch where that saves more than this many tokens of padding.
TOKENS_WORTH_A_PASS = {"cpu": 256}
TOKENS_WORTH_A_PASS_ELSEWHERE = 8192


def stratified_sample(examples, number):
    """Return `number` of the examples, always the same ones, with the classes in their proportions."""
    drawn, _ = stratified(column_array(examples, "label"), min(number, len(examples)), seed=0, keep=0)
    return examples.select(drawn)


def make_plan(number_of_examples, batch_size, seed, steps):
    """Return the global batches of a run, one array of example ids per step.

    Each epoch holds every example once, shuffled by (seed, epoch). Its last batch may be smaller.
    """
    batches = []
    for epoch in count():
        if len(batches) >= steps:
            return batches[:steps]
        order = np.random.default_rng([seed, epoch]).permutation(number_of_examples).astype(np.int32)
        batches += [order[start : start + batch_size] for start in range(0, number_of_examples, batch_size)]


def micro_batches_of_rank(batch, rank, number_of_processes, micro_batch_size):
    """Return the micro-batches of one process as a list of (ids, weight), at least one.

    A process takes every n-th example. One that gets none computes the batch's first example with weight 0, since
    either all processes take part in averaging the gradients, or none.
    """
    ids = batch[rank::number_of_processes]
    if len(ids) == 0:
        return [(batch[:1], 0.0)]
    return [(ids[start : start + micro_batch_size], 1.0) for start in range(0, len(ids), micro_batch_size)]


def split_by_length(ids, lengths, min_saving):
    """Return the ids in parts of similar lengths: halved, again and again, where that saves more than `min_saving`
    tokens of padding.

    ids and lengths: (examples,), longest first. Halves, as parts of few sizes have few shapes (see packing.round_up).
    """
    half = len(ids) // 2
    if half * (lengths[0] - lengths[-half]) <= min_saving:
        return [ids]
    halves = slice(-half), slice(-half, None)
    return [part for half in halves for part in split_by_length(ids[half], lengths[half], min_saving)]


def choose_min_saving(packer, device):
    """Return the `min_saving` of split_by_length on a device; None for a packed layout, which has no padding."""
    return None if packer.is_packed else TOKENS_WORTH_A_PASS.get(device.type, TOKENS_WORTH_A_PASS_ELSEWHERE)


def divide(batch, lengths, rank, number_of_processes, micro_batch_size, min_saving):
    """Return the micro-batches of one process as load_steps computes them: a list of (ids, weight).

    batch: ids of a global batch; lengths: (examples,), of the whole split; min_saving: from the function of that name.
    """
    # Longest first: micro-batches of similar lengths, and equal work for all processes.
    ordered = batch[np.argsort(-lengths[batch], kind="stable")]
    micro_batches = micro_batches_of_rank(ordered, rank, number_of_processes, micro_batch_size)
    if min_saving is None:
        return micro_batches
    return [(part, weight) for ids, weight in micro_batches for part in split_by_length(ids, lengths[ids], min_saving)]


def padded_tokens(lengths, batches, number_of_processes, micro_batch_size, min_saving):
    """Return the number of tokens, padding included, that all processes compute for these batches.

    Parameters as for divide. Examples of weight 0 do not count.
    """
    if min_saving is None:
        return sum(int(lengths[batch].sum()) for batch in batches)
    return sum(
        int(lengths[ids].max()) * len(ids)
        for batch in batches
        for rank in range(min(number_of_processes, len(batch)))  # the other ranks have an example of weight 0
        for ids, _ in divide(batch, lengths, rank, number_of_processes, micro_batch_size, min_saving)
    )


def padding_fraction(examples, batches, accelerator, micro_batch_size, packer):
    """Return the fraction of padding in the tokens computed for these batches, 0 for a packed layout."""
    lengths = column_array(examples, "length")
    saving = choose_min_saving(packer, accelerator.device)
    computed = padded_tokens(lengths, batches, accelerator.num_processes, micro_batch_size, saving)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / computed


def load_steps(examples, batches, accelerator, micro_batch_size, packer, num_workers=0):
    """Yield for each global batch the list of this process's micro-batches. Closing it ends the workers.

    A micro-batch is a dict of `ids`, `lengths`, `inputs` (tensors for the model), `labels`, `weight` and counts, all
    on the CPU. Do not pass the loader to accelerator.prepare(), which would divide it among the processes again.
    """
    rank, number_of_processes = accelerator.process_index, accelerator.num_processes
    lengths = column_array(examples, "length")
    saving = choose_min_saving(packer, accelerator.device)
    divided = [divide(batch, lengths, rank, number_of_processes, micro_batch_size, saving) for batch in batches]
    loader = DataLoader(
        divided,
        batch_size=None,
        collate_fn=partial(collate_step, examples, packer),  # not a closure: it is pickled for worker processes
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        # Without its own generator the loader would draw from torch's, and change the model's dropout.
        generator=torch.Generator(),
    )
    yield from start_loader(loader)


def start_loader(loader):
    """Return an iterator over a DataLoader. A signal waits until its workers are started; they never get any.

    A spawned worker imports for seconds before it can ignore signals, and its death would end the run.
    """
    if not loader.num_workers:
        return iter(loader)
    received = []
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
    if can_block:
        resource_tracker.ensure_running()  # the first worker would start it, which unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS) if can_block else None  # which workers inherit
    try:
        return iter(loader)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if can_block:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in received[:1]:
            signal.raise_signal(number)


def ignore_signals(_):
    """Keep a worker alive when a terminal or cluster signals all processes: its death would end the run unsaved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate_step(examples, packer, micro_batches):
    """Return the micro-batches of one step, each given as (ids, weight), as the dicts that load_steps yields."""
    step = []
    for ids, weight in micro_batches:
        rows = examples[ids]
        inputs = packer.collate(rows)
        step.append(
            {
                "ids": ids,
                "lengths": rows["length"],
                "inputs": inputs,
                "labels": torch.tensor(rows["label"]),
                "weight": weight,
                "examples": len(ids) * weight,
                "tokens": sum(rows["length"]) * weight,
                "positions": (sum(rows["length"]) if packer.is_packed else inputs["input_ids"].numel()) * weight,
            }
        )
    return step
