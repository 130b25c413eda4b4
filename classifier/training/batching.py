"""From rows to logits: their tokens, the plan (which examples are in which step), a process's share of it, evaluation.

The plan is a list of global batches, each an array of example ids, and a function of (seed, batch_size) alone. Each
process takes its share of every global batch *before* the DataLoader, so neither the number of processes nor the size
of a micro-batch changes which examples make a step, and going on at step N is an index into the plan.
"""

import signal
from functools import partial
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader

from classifier.data.cache import column_array
from classifier.data.splits import stratified
from classifier.training.preemption import SIGNALS

TOKENS_WORTH_A_PASS = {"cpu": 256}  # of padding, from which on it is faster to compute them in a pass of their own


def stratified_sample(examples, number):
    """Return `number` of the examples, always the same ones, in which each class keeps its share."""
    drawn, _ = stratified(column_array(examples, "label"), min(number, len(examples)), seed=0, keep=0)
    return examples.select(drawn)


def make_plan(number_of_examples, batch_size, seed, steps):
    """Return the global batches of a run, one for each step.

    An epoch is every example id once, shuffled by (seed, epoch); its last batch may be smaller.
    """
    batches = []
    for epoch in count():
        if len(batches) >= steps:
            return batches[:steps]
        order = np.random.default_rng([seed, epoch]).permutation(number_of_examples).astype(np.int32)
        batches += [order[start : start + batch_size] for start in range(0, number_of_examples, batch_size)]


def micro_batches_of_rank(batch, rank, number_of_processes, micro_batch_size):
    """Return the micro-batches of one process: lists of (ids, weight), one at least.

    Every n-th example goes to the same process. A process that gets none computes the batch's first example with
    weight 0, since the gradients of a step are averaged by all processes or by none.
    """
    ids = batch[rank::number_of_processes]
    if len(ids) == 0:
        return [(batch[:1], 0.0)]
    return [(ids[start : start + micro_batch_size], 1.0) for start in range(0, len(ids), micro_batch_size)]


def split_by_length(ids, lengths, worth):
    """Return the ids, longest first, cut into halves, and these again, where that saves more than `worth` tokens of
    padding.

    lengths: (examples,), of these ids. Halves, since parts of few sizes have few shapes (see packing.rounded).
    """
    half = len(ids) // 2
    if half * (lengths[0] - lengths[-half]) <= worth:
        return [ids]
    halves = slice(-half), slice(-half, None)
    return [part for some in halves for part in split_by_length(ids[some], lengths[some], worth)]


def min_saving(packer, device):
    """Return `worth` of of_like_lengths on a device; None where examples lie end to end, and nothing is padded."""
    return None if packer.is_packed else TOKENS_WORTH_A_PASS.get(device.type, 8192)


def divide(batch, lengths, rank, number_of_processes, micro_batch_size, worth):
    """Return one process's micro-batches of a global batch as step_loader computes them: lists of (ids, weight).

    lengths: (examples,), of all examples; worth: see worth_of_a_pass.
    """
    # Longest first: micro-batches of like lengths, and as much work for each process.
    ordered = batch[np.argsort(-lengths[batch], kind="stable")]
    mine = micro_batches_of_rank(ordered, rank, number_of_processes, micro_batch_size)
    if worth is None:
        return mine
    return [(part, weight) for ids, weight in mine for part in split_by_length(ids, lengths[ids], worth)]


def padded_tokens(lengths, batches, number_of_processes, micro_batch_size, worth):
    """Return the number of tokens, padding among them, that all processes compute for these batches.

    Parameters as in divide. Examples of weight 0 are not counted.
    """
    if worth is None:
        return sum(int(lengths[batch].sum()) for batch in batches)
    return sum(
        int(lengths[ids].max()) * len(ids)
        for batch in batches
        for rank in range(min(number_of_processes, len(batch)))  # the others have none, but an example of weight 0
        for ids, _ in divide(batch, lengths, rank, number_of_processes, micro_batch_size, worth)
    )


def padding_fraction(examples, batches, accelerator, micro_batch_size, packer):
    """Return the fraction of padding in what the processes compute for these batches: 0 where nothing is padded."""
    lengths, worth = column_array(examples, "length"), min_saving(packer, accelerator.device)
    computed = padded_tokens(lengths, batches, accelerator.num_processes, micro_batch_size, worth)
    return 1 - sum(int(lengths[batch].sum()) for batch in batches) / computed


def step_loader(examples, batches, accelerator, micro_batch_size, packer, num_workers=0):
    """Return a DataLoader that yields, for every global batch, this process's micro-batches of it.

    A micro-batch is a dict of `ids`, `lengths`, `inputs` (tensors for the model), `labels`, `weight`, and counts; all
    of it still on the CPU. The loader is not for accelerator.prepare(): it is divided among the processes already.
    """
    rank, number_of_processes = accelerator.process_index, accelerator.num_processes
    lengths, worth = column_array(examples, "length"), min_saving(packer, accelerator.device)
    divided = [divide(batch, lengths, rank, number_of_processes, micro_batch_size, worth) for batch in batches]
    return DataLoader(
        divided,
        batch_size=None,
        collate_fn=partial(collate_step, examples, packer),  # no closure: worker processes must receive it
        num_workers=num_workers,
        worker_init_fn=ignore_signals,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own the loader draws from torch's, and the model's dropout would depend on it.
        generator=torch.Generator(),
    )


def ignore_signals(_):
    """A terminal or a cluster signals all processes: a worker that dies of it ends the training before it is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def collate_step(examples, packer, micro_batches):
    """Return the micro-batches of one step, given as (ids, weight), as the dicts of step_loader."""
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
