"""From rows to logits: their tokens, the plan (which examples are in which step), a process's share of it, evaluation.

The plan is a list of global batches, each an array of example ids, and a function of (seed, batch_size) alone. Each
process takes its share of every global batch *before* the DataLoader, so neither the number of processes nor the size
of a micro-batch changes which examples make a step, and going on at step N is an index into the plan.
"""

import math
import signal
from dataclasses import replace
from functools import partial
from itertools import count

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.utils.data import DataLoader

from cache import array_of, cached_table, digest, one_process_at_a_time
from common import RunFailed, log
from preemption import SIGNALS
from reader import BadInput
from splits import stratified
from tokens import encode, token_columns

TOKENS_OF_A_PASS = {"cpu": 256}  # of padding, from which on it is faster to compute them in a pass of their own


def longest_input(model, tokenizer):
    """Return the number of tokens that the model has positions for."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    limit = limit if limit > 0 else tokenizer.model_max_length  # XLNet, which has no limit, says -1
    for name, module in model.named_modules():
        # RoBERTa, XLM-R and MPNet count positions from padding_idx + 1 on.
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return min(limit, tokenizer.model_max_length)


def tokenize(task, rows, fingerprint, model, tokenizer):
    """Return (examples, made): a Dataset of the columns and facts of `encode`, `length` and `label`.

    Made once, and cached under the content of the rows, the tokenizer and the settings.
    """
    import pyarrow as pa

    limit = longest_input(model, tokenizer)
    max_length = task.max_length or limit
    if max_length > limit:
        raise BadInput(f"max_length {max_length} is more than the model's {limit} positions", f"--max_length {limit}")
    specials = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
    if max_length < specials + len(task.text):
        words = f"--max_length {max_length} leaves no room beside {specials} special tokens"
        raise BadInput(words, "Give a larger one.")
    columns = token_columns(tokenizer)
    label_type = rows.features.arrow_schema.field("label").type
    counts = ["length", "full_length", "unknown", "characters"]
    schema = [(name, pa.list_(pa.int32())) for name in columns] + [(name, pa.int32()) for name in counts]

    def tokens():
        for start_row in range(0, len(rows), 1000):
            some = rows[start_row : start_row + 1000]
            encoded, facts = encode(task, tokenizer, [some[column] for column in task.text], max_length)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            yield {**encoded, **facts, "length": lengths, "label": some["label"]}

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:  # its last call is part of its state, and would be part of the key
        backend.no_truncation()
        backend.no_padding()
    vocabulary = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    # The labels' order is part of the key: `label` holds ids.
    settings = [columns, task.text, task.labels, max_length, task.truncate]
    key = digest("tokens", fingerprint, type(tokenizer).__name__, vocabulary, settings)
    examples, made = cached_table(key, pa.schema([*schema, ("label", label_type)]), tokens)
    largest = max((int(chunk.values.to_numpy().max()) for chunk in examples.data.column("input_ids").chunks), default=0)
    vocabulary_size = model.get_input_embeddings().num_embeddings
    if largest >= vocabulary_size:
        raise BadInput(
            f"the tokenizer makes the token id {largest}, the model's vocabulary ends at {vocabulary_size - 1}",
            "Tokenizer and model do not belong together: check the model folder.",
        )
    return examples, made


def tokenize_splits(task, splits, fingerprints, model, tokenizer):
    """Return (task, {split: examples}), the task with its max_length filled in; say what came from the cache."""
    with one_process_at_a_time():
        tokenized = {name: tokenize(task, rows, fingerprints[name], model, tokenizer) for name, rows in splits.items()}
    made = [name for name, (_, made) in tokenized.items() if made]
    log.info(f"tokenised: {', '.join(made)}" if made else "tokens from the cache")
    task = replace(task, max_length=task.max_length or longest_input(model, tokenizer))
    return task, {name: examples for name, (examples, _) in tokenized.items()}


def sample(examples, number):
    """Return `number` of the examples, always the same ones, in which each class keeps its share."""
    drawn, _ = stratified(array_of(examples, "label"), min(number, len(examples)), seed=0, keep=0)
    return examples.select(drawn)


def plan(number_of_examples, batch_size, seed, steps):
    """Return the global batches of a run, one for each step.

    An epoch is every example id once, shuffled by (seed, epoch); its last batch may be smaller.
    """
    batches = []
    for epoch in count():
        if len(batches) >= steps:
            return batches[:steps]
        order = np.random.default_rng([seed, epoch]).permutation(number_of_examples).astype(np.int32)
        batches += [order[start : start + batch_size] for start in range(0, number_of_examples, batch_size)]


def share(batch, rank, number_of_processes, micro_batch_size):
    """Return the micro-batches of one process: lists of (ids, weight), one at least.

    Every n-th example goes to the same process. A process that gets none computes the batch's first example with
    weight 0, since the gradients of a step are averaged by all processes or by none.
    """
    ids = batch[rank::number_of_processes]
    if len(ids) == 0:
        return [(batch[:1], 0.0)]
    return [(ids[start : start + micro_batch_size], 1.0) for start in range(0, len(ids), micro_batch_size)]


def of_like_lengths(ids, lengths, worth):
    """Return the ids, longest first, cut into halves, and these again, where that saves more than `worth` tokens of
    padding.

    lengths: (examples,), of these ids. Halves, since parts of few sizes have few shapes (see packing.rounded).
    """
    half = len(ids) // 2
    if half * (lengths[0] - lengths[-half]) <= worth:
        return [ids]
    halves = slice(-half), slice(-half, None)
    return [part for some in halves for part in of_like_lengths(ids[some], lengths[some], worth)]


def worth_of_a_pass(layout, device):
    """Return `worth` of of_like_lengths on a device; None where examples lie end to end, and nothing is padded."""
    return None if layout.is_row else TOKENS_OF_A_PASS.get(device.type, 8192)


def divide(batch, lengths, rank, number_of_processes, micro_batch_size, worth):
    """Return one process's micro-batches of a global batch as step_loader computes them: lists of (ids, weight).

    lengths: (examples,), of all examples; worth: see worth_of_a_pass.
    """
    # Longest first: micro-batches of like lengths, and as much work for each process.
    ordered = batch[np.argsort(-lengths[batch], kind="stable")]
    mine = share(ordered, rank, number_of_processes, micro_batch_size)
    if worth is None:
        return mine
    return [(part, weight) for ids, weight in mine for part in of_like_lengths(ids, lengths[ids], worth)]


def tokens_with_padding(lengths, batches, number_of_processes, micro_batch_size, worth):
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


def step_loader(examples, batches, accelerator, micro_batch_size, layout, num_workers=0):
    """Return a DataLoader that yields, for every global batch, this process's micro-batches of it.

    A micro-batch is a dict of `ids`, `lengths`, `inputs` (tensors for the model), `labels`, `weight`, and counts; all
    of it still on the CPU. The loader is not for accelerator.prepare(): it is divided among the processes already.
    """
    rank, number_of_processes = accelerator.process_index, accelerator.num_processes
    lengths, worth = array_of(examples, "length"), worth_of_a_pass(layout, accelerator.device)
    divided = [divide(batch, lengths, rank, number_of_processes, micro_batch_size, worth) for batch in batches]
    return DataLoader(
        divided,
        batch_size=None,
        collate_fn=partial(_laid_out, examples, layout),  # no closure: worker processes must receive it
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=accelerator.device.type == "cuda",
        # Without a generator of its own the loader draws from torch's, and the model's dropout would depend on it.
        generator=torch.Generator(),
    )


def leave_signals_to_the_parent(_):
    """A terminal or a cluster signals all processes: a worker that dies of it ends the training before it is saved."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _laid_out(examples, layout, micro_batches):
    """Return the micro-batches of one step, given as (ids, weight), as the dicts of step_loader."""
    step = []
    for ids, weight in micro_batches:
        rows = examples[ids]
        inputs = layout.lay_out(rows)
        step.append(
            {
                "ids": ids,
                "lengths": rows["length"],
                "inputs": inputs,
                "labels": torch.tensor(rows["label"]),
                "weight": weight,
                "examples": len(ids) * weight,
                "tokens": sum(rows["length"]) * weight,
                "positions": (sum(rows["length"]) if layout.is_row else inputs["input_ids"].numel()) * weight,
            }
        )
    return step


def largest_micro_batch(accelerator, model, layout, examples, share):
    """Return how many of the longest examples fit into memory at a time: a process's share, or a half, a quarter, ...

    Tried in a forward and a backward pass, with room for AdamW's two moments set aside; the same for all processes.
    Raises BadInput where not even one fits.
    """
    lengths = array_of(examples, "length")
    longest, size = np.argsort(-lengths, kind="stable"), share
    moments = []
    while True:
        try:
            moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
            inputs = send_to_device(layout.lay_out(examples[longest[:size]]), accelerator.device)
            layout.begin(0, longest[:size], lengths[longest[:size]], accelerator.device)
            with torch.random.fork_rng():  # a model may draw masks of its own
                accelerator.backward(model(**inputs).logits.float().sum())
            fits = True
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            fits = False
        model.zero_grad()
        moments.clear()
        clear_device_cache(garbage_collection=not fits)
        if fits:
            return min(gather_object([size]))
        if size == 1:
            words = "Try --gradient_checkpointing, a smaller --max_length or model."
            raise BadInput("not even one example at a time fits into memory", words)
        size = math.ceil(size / 2)


def all_logits(model, examples, accelerator, batch_size, layout, watch=None):
    """Return the logits of all examples, by example id: a float32 array (examples, outputs), on every process."""
    was_training = model.training
    model.eval()
    logits = all_outputs(
        lambda inputs: model(**inputs).logits.float(), examples, accelerator, batch_size, layout, watch
    )
    model.train(was_training)
    return logits


@torch.inference_mode()
def all_outputs(compute, examples, accelerator, batch_size, layout, watch=None):
    """Return what compute(inputs) does for all examples, by example id: an array (examples, outputs), on every process.

    Examples of like length go together, longest first, so that little is padded and memory runs out at once or never.
    Each process takes every n-th batch; each example is counted once, by its id. Raises RuntimeError where one is not.
    watch: a preemption.Watch, which raises where a signal asks the run to end.
    """
    lengths = array_of(examples, "length")
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = []
    if watch:
        watch.reset()
    for first in range(0, len(batches), accelerator.num_processes):
        if watch:  # as often on a process that has a batch less
            watch.look()
        for batch in batches[first : first + accelerator.num_processes][accelerator.process_index :][:1]:
            inputs = send_to_device(layout.lay_out(examples[batch]), accelerator.device)
            layout.begin(0, batch, lengths[batch], accelerator.device)
            try:
                # To the CPU at the end: asking for each batch's outputs would make the GPU wait for Python.
                mine.append((batch, compute(inputs)))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                words = f"Try --eval_batch_size {math.ceil(batch_size / 2)}: it changes no score."
                raise RunFailed(f"out of memory with {len(batch)} examples in an evaluation\n{words}") from None
    if watch:
        watch.reset()
    mine = [(batch, values.cpu().numpy()) for batch, values in mine]
    # As objects: tensors of uneven shapes must not be gathered, and the processes have uneven numbers of batches.
    everywhere = gather_object(mine)
    seen = np.zeros(len(examples), dtype=int)
    for batch, _ in everywhere:
        seen[batch] += 1
    if not (seen == 1).all():
        raise RuntimeError(f"{(seen != 1).sum()} of {len(seen)} examples were not evaluated exactly once")
    outputs = np.zeros((len(examples), *everywhere[0][1].shape[1:]), dtype=everywhere[0][1].dtype)
    for batch, values in everywhere:
        outputs[batch] = values
    return outputs
