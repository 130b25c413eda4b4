"""A frozen encoder runs once: what the head reads of each example is kept in the cache, and training begins there.

A head reads one vector of an example: what the encoder's pooler returns or, without a pooler, the first token's hidden
state. Where a model's head reads more (all tokens, the last one), its encoder runs in each step like any other.
"""

import hashlib
import math
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from classifier.data.cache import column_array, load_table, table_path, write_table
from classifier.files import digest
from classifier.messages import BadInput, RunFailed, log

FEATURE_ROWS_AT_A_TIME = 10_000  # in memory: 15 MB for a vector of 384


class FeaturePacker:
    """Takes the place of a packing.Layout where each example comes with its features."""

    is_packed = True  # nothing is padded

    def __init__(self, masks):
        self.masks = masks

    def collate(self, examples):
        """Return the inputs of examples, given as a dict of columns: as texts of one token."""
        return {"inputs_embeds": torch.from_numpy(examples["features"]).unsqueeze(1)}

    def set_batch(self, step, ids, lengths, device):
        """Say which examples come next, in the order of the micro-batch."""
        self.masks.set_batch(step, ids, device)


def pass_features(*_, inputs_embeds, **options):
    """Return features (examples, 1, size) as an encoder's output. Takes the place of an encoder's forward."""
    return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0])


def head_input(encoder, accelerator, inputs):
    """Return what a head reads of each example: (examples, size), in the precision in force and the weights' type."""
    with accelerator.autocast():
        output = encoder(**inputs)
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state[:, 0] if pooled is None else pooled).to(next(encoder.parameters()).dtype)


@torch.no_grad()
def probe_head(model, packer, examples, accelerator):
    """Return the features (2, size) of the longest example and the shortest, or None where the head needs more."""
    encoder, lengths, was_training = model.base_model, column_array(examples, "length"), model.training
    if encoder is model:
        return None
    ids = np.array([lengths.argmax(), lengths.argmin()])
    inputs = send_to_device(packer.collate(examples[ids]), accelerator.device)
    model.eval()
    try:
        packer.set_batch(0, ids, lengths[ids], accelerator.device)
        logits, features = model(**inputs).logits, head_input(encoder, accelerator, inputs)
        encoder.forward = pass_features
        FeaturePacker(packer.masks).set_batch(0, ids, lengths[ids], accelerator.device)
        same = torch.allclose(model(inputs_embeds=features.unsqueeze(1)).logits, logits, rtol=1e-4, atol=1e-5)
        return features if same else None
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # a head that cannot do with one vector
        return None
    finally:
        vars(encoder).pop("forward", None)
        model.train(was_training)


def encoder_digest(encoder):
    """Return a name for what an encoder computes: of its weights, its config and the versions of what computes."""
    weights = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(value.numpy(force=True)))
    versions = [version(name) for name in ("torch", "transformers")]
    return digest(weights.hexdigest(), encoder.config.to_json_string(), versions)


def features_table(key, schema, tokens, encoder, packer, accelerator, batch_size):
    """Return (Dataset of `features`, made): from the cache, or computed by all processes together first."""
    import pyarrow as pa

    def columns():
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        with tqdm(total=len(tokens), desc="features", unit="example", disable=not on_terminal) as bar:

            def compute_batch(inputs):
                values = head_input(encoder, accelerator, inputs)
                bar.update(len(values) * accelerator.num_processes)
                return values

            for first in range(0, len(tokens), FEATURE_ROWS_AT_A_TIME):
                some = tokens.select(range(first, min(first + FEATURE_ROWS_AT_A_TIME, len(tokens))))
                values = compute_outputs(compute_batch, some, accelerator, batch_size, packer)
                yield {"features": pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])}

    made = not all(gather_object([table_path(key).exists()]))
    if made and accelerator.is_local_main_process:
        write_table(key, schema, columns())
    elif made:
        for _ in columns():  # this machine's first process writes
            pass
    accelerator.wait_for_everyone()
    return load_table(key), made


def features_of_splits(model, packer, examples, accelerator, args, state):
    """Return (packer, {split: examples}) with which a model trains and is scored without running its frozen encoder.

    Those given where its head needs more than features. The time goes into state, as training and as evaluation.
    """
    import pyarrow as pa
    from datasets import concatenate_datasets

    if args.dry_run:  # which must not take as long as the whole pass over the data
        return packer, examples
    encoder, tried = model.base_model, probe_head(model, packer, examples["train"], accelerator)
    if tried is None:
        log.info("this model's head reads more than one vector of an example: the frozen encoder runs in each step")
        return packer, examples
    number = pa.from_numpy_dtype(tried.cpu().numpy().dtype)
    schema = pa.schema([("features", pa.list_(number, tried.shape[1]))])
    made_by = [encoder_digest(encoder), accelerator.mixed_precision, accelerator.device.type]
    with_features, made = {}, []
    for name, tokens in examples.items():
        started = time.monotonic()
        key = digest("features", made_by, Path(tokens.cache_files[0]["filename"]).stem)  # named by the tokens
        table, is_made = features_table(key, schema, tokens, encoder, packer, accelerator, args.eval_batch_size)
        columns = [column for column in tokens.column_names if column not in ("input_ids", "token_type_ids")]
        table = concatenate_datasets([tokens.select_columns(columns), table], axis=1)
        with_features[name] = table.with_format("numpy", columns=["features"], output_all_columns=True)
        seconds = time.monotonic() - started
        if name == "train":
            state.train_seconds += seconds
        else:
            state.evaluation_seconds += seconds
        made += [f"{name} in {seconds:.1f} s"] * is_made
    log.info(f"features of the frozen encoder: {', '.join(made) or 'from the cache'}")
    encoder.forward = pass_features
    return FeaturePacker(packer.masks), with_features


def largest_micro_batch(accelerator, model, packer, examples, share):
    """Return how many of the longest examples fit into memory at a time: a process's share, or a half, a quarter, ...

    Tried in a forward and a backward pass, with room for AdamW's two moments set aside; the same for all processes.
    Raises BadInput where not even one fits.
    """
    lengths = column_array(examples, "length")
    longest, size = np.argsort(-lengths, kind="stable"), share
    moments = []
    while True:
        try:
            moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
            inputs = send_to_device(packer.collate(examples[longest[:size]]), accelerator.device)
            packer.set_batch(0, longest[:size], lengths[longest[:size]], accelerator.device)
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


def choose_micro_batch_size(args, state, limit, accelerator, model, packer, examples):
    """Return how many examples a process computes at a time, of its part of a step; keep it in the State of the run.

    limit: half of what memory could not hold when this run was last tried, or None. --micro_batch_size auto tries what
    memory holds, unless an earlier start of this run has found that out.
    """
    examples_per_process = math.ceil(args.batch_size / accelerator.num_processes)
    size = args.micro_batch_size or examples_per_process
    if size == "auto":
        size = state.micro_batch_size or largest_micro_batch(accelerator, model, packer, examples, examples_per_process)
        log.info(f"micro-batches of {size} (--micro_batch_size auto)")
    state.micro_batch_size = min(size, examples_per_process, limit or examples_per_process)
    return state.micro_batch_size


def compute_logits(model, examples, accelerator, batch_size, packer, signals=None):
    """Return the logits of all examples, by example id: a float32 array (examples, outputs), on every process."""
    was_training = model.training
    model.eval()
    logits = compute_outputs(
        lambda inputs: model(**inputs).logits.float(), examples, accelerator, batch_size, packer, signals
    )
    model.train(was_training)
    return logits


@torch.inference_mode()
def compute_outputs(compute, examples, accelerator, batch_size, packer, signals=None):
    """Return what compute(inputs) does for all examples, by example id: an array (examples, outputs), on every process.

    Examples of like length go together, longest first, so that little is padded and memory runs out at once or never.
    Each process takes every n-th batch; each example is counted once, by its id. Raises RuntimeError where one is not.
    signals: a preemption.Watch, which raises where a signal asks the run to end.
    """
    lengths = column_array(examples, "length")
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    mine = []
    if signals:
        signals.poll_next_time()
    for first in range(0, len(batches), accelerator.num_processes):
        if signals:  # as often on a process that has a batch less
            signals.poll()
        for batch in batches[first : first + accelerator.num_processes][accelerator.process_index :][:1]:
            inputs = send_to_device(packer.collate(examples[batch]), accelerator.device)
            packer.set_batch(0, batch, lengths[batch], accelerator.device)
            try:
                # To the CPU at the end: asking for each batch's outputs would make the GPU wait for Python.
                mine.append((batch, compute(inputs)))
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
                words = f"Try --eval_batch_size {math.ceil(batch_size / 2)}: it changes no score."
                raise RunFailed(f"out of memory with {len(batch)} examples in an evaluation\n{words}") from None
    if signals:
        signals.poll_next_time()
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


# The largest relative difference of a device's logits and gradients from fp32 on the CPU that rounding explains.
TOLERANCE = {"no": 1e-2, "fp16": 0.1, "bf16": 0.2}  # fp32 on a GPU may be TF32, of 10 bits


def peak_memory(device):
    """Return the largest memory so far in bytes: of the process on a CPU, else of its tensors on the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # Windows has none
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare_with_cpu(model, packer, micro_batch, device_autocast):
    """Compute a batch on its device and in fp32 on the CPU; return the largest differences of logits and gradients.

    Both without dropout; each difference is divided by the largest value of the CPU's result. The gradients are those of
    the mean squared logit; device_autocast: a context for the forward pass on the device. The model keeps none.
    """
    import copy

    import torch
    from accelerate.utils import send_to_device

    results = []
    copies = copy.deepcopy((model, packer))  # together: the copy's attention asks the copied packer
    copies[0].cpu().float()
    for (one, its_packer), autocast in (((model, packer), device_autocast), (copies, torch.enable_grad())):
        device = next(one.parameters()).device
        its_packer.set_batch(0, micro_batch["ids"], micro_batch["lengths"], device)
        was_training = one.training
        one.eval()
        one.zero_grad()
        with autocast:
            logits = one(**send_to_device(micro_batch["inputs"], device)).logits.float()
        logits.square().mean().backward()
        gradients = [parameter.grad.flatten().cpu() for parameter in one.parameters() if parameter.grad is not None]
        results.append((logits.detach().cpu(), torch.cat(gradients)))
        one.zero_grad()
        one.train(was_training)
    return [float((here - there).abs().max() / there.abs().max()) for here, there in zip(*results, strict=True)]
