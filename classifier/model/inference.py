"""Forward passes outside the training loop: logits by example id, frozen features, the memory probe, the CPU check.

Features: a frozen encoder runs once. What the head reads of each example is cached, and training starts from there. A
head reads one vector per example: the output of the encoder's pooler or, without a pooler, the hidden state of the
first token. Where a model's head reads more (all tokens, the last one), its encoder runs in each step as usual.
"""

import copy
import hashlib
import math
import sys
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from classifier.data.cache import column_array, load_table, table_path, write_table
from classifier.files import digest
from classifier.messages import BadInput, RunFailed, log
from classifier.processes import is_out_of_memory

# With 32,767 tokens and more, torch 2.13 computes wrong gradients on Apple's M1 and M2, without an error
# (github.com/pytorch/pytorch/issues/177116).
TOKENS_ON_MPS = 32_000
FEATURE_ROWS_AT_A_TIME = 10_000  # in memory: 15 MB for vectors of 384

# The largest relative difference of logits and gradients on a device from fp32 on the CPU that rounding explains.
TOLERANCE = {"no": 1e-2, "fp16": 0.1, "bf16": 0.2}  # fp32 on a GPU may be TF32, of 10 bits


# ------------------------------------------------------------------------------------------------ logits by example id


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
    """Return compute(inputs) of all examples, by example id: an array (examples, outputs), on every process.

    Batches hold examples of similar length, longest first: little is padded, and memory runs out at once or never. Each
    process takes every n-th batch. signals: a preemption.SignalWatch, which raises where a signal asks the run to end.
    Where memory runs out, a batch is computed in two halves. Raises RuntimeError unless each example was computed
    exactly once, RunFailed where memory runs out with a single one.
    """
    lengths = column_array(examples, "length")
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    outputs_here = []
    if signals:
        signals.poll_next_time()
    for first in range(0, len(batches), accelerator.num_processes):
        if signals:  # equally often on a process that has one batch less
            signals.poll()
        for batch in batches[first : first + accelerator.num_processes][accelerator.process_index :][:1]:
            # Moved to the CPU at the end: doing so for each batch would make the GPU wait for Python.
            outputs_here += _outputs_of_batch(compute, examples, batch, accelerator.device, packer, lengths)
    if signals:
        signals.poll_next_time()
    outputs_here = [(batch, values.cpu().numpy()) for batch, values in outputs_here]
    if accelerator.device.type == "mps":  # it keeps freed memory by size, and each new length takes more
        torch.mps.empty_cache()
    # As objects: tensors of uneven shapes must not be gathered, and the processes have uneven numbers of batches.
    gathered = gather_object(outputs_here)
    counts = np.zeros(len(examples), dtype=int)
    for batch, _ in gathered:
        counts[batch] += 1
    if not (counts == 1).all():
        raise RuntimeError(f"{(counts != 1).sum()} of {len(counts)} examples were not evaluated exactly once")
    outputs = np.zeros((len(examples), *gathered[0][1].shape[1:]), dtype=gathered[0][1].dtype)
    for batch, values in gathered:
        outputs[batch] = values
    return outputs


def _outputs_of_batch(compute, examples, batch, device, packer, lengths):
    """Return [(example ids, their outputs)] of a batch, in halves where it does not fit into memory."""
    try:
        inputs = send_to_device(packer.collate(examples[batch]), device)
        packer.set_batch(0, batch, lengths[batch], device)
        return [(batch, compute(inputs))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    if len(batch) == 1:
        advice = "Try a smaller --max_length or model; the same command resumes."
        raise RunFailed(f"out of memory with one example in an evaluation\n{advice}")
    clear_device_cache(garbage_collection=True)
    middle = len(batch) // 2
    halves = batch[:middle], batch[middle:]
    return [each for half in halves for each in _outputs_of_batch(compute, examples, half, device, packer, lengths)]


# --------------------------------------------------------------------------------------- features of a frozen encoder


class FeaturePacker:
    """Replaces a packing.Packer where each example comes with its features."""

    is_packed = True  # nothing is padded

    def __init__(self, masks):
        self.masks = masks

    def collate(self, examples):
        """Return the model's inputs for examples as a dict of columns: each example is a text of one token."""
        return {"inputs_embeds": torch.from_numpy(examples["features"]).unsqueeze(1)}

    def set_batch(self, step, ids, lengths, device):
        """Set the examples of the next forward pass, in the order of the micro-batch."""
        self.masks.set_batch(step, ids, device)


def features_of_splits(model, packer, examples, accelerator, args, state):
    """Return (packer, {split: examples}) to train and score a model on the features of its frozen encoder.

    Returns them unchanged in a dry run, and where the head needs more than features. Adds the time to
    state.train_seconds and state.evaluation_seconds.
    """
    import pyarrow as pa
    from datasets import concatenate_datasets

    if args.dry_run:  # must not take as long as a pass over all data
        return packer, examples
    encoder, sample = model.base_model, probe_head(model, packer, examples["train"], accelerator)
    if sample is None:
        log.info("this model's head reads more than one vector of an example: the frozen encoder runs in each step")
        return packer, examples
    value_type = pa.from_numpy_dtype(sample.cpu().numpy().dtype)
    schema = pa.schema([("features", pa.list_(value_type, sample.shape[1]))])
    computed_by = [encoder_digest(encoder), accelerator.mixed_precision, accelerator.device.type]
    with_features, computed = {}, []
    for name, tokens in examples.items():
        started = time.perf_counter()
        tokens_key = Path(tokens.cache_files[0]["filename"]).stem
        key = digest("features", computed_by, tokens_key)
        table, is_new = features_table(key, schema, tokens, encoder, packer, accelerator, args.eval_batch_size)
        columns = [column for column in tokens.column_names if column not in ("input_ids", "token_type_ids")]
        table = concatenate_datasets([tokens.select_columns(columns), table], axis=1)
        with_features[name] = table.with_format("numpy", columns=["features"], output_all_columns=True)
        seconds = time.perf_counter() - started
        if name == "train":
            state.train_seconds += seconds
        else:
            state.evaluation_seconds += seconds
        if is_new:
            computed.append(f"{name} in {seconds:.1f} s")
    log.info(f"features of the frozen encoder: {', '.join(computed) or 'from the cache'}")
    encoder.forward = pass_features
    return FeaturePacker(packer.masks), with_features


@torch.no_grad()
def probe_head(model, packer, examples, accelerator):
    """Return the features (2, size) of the longest and the shortest example, or None where the head needs more."""
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
    except Exception:  # a head that cannot take one vector; its code may raise anything
        return None
    finally:
        vars(encoder).pop("forward", None)
        model.train(was_training)


def pass_features(*_, inputs_embeds, **options):
    """Replaces a frozen encoder's forward: return the features (examples, 1, size) as its output."""
    return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0])


def head_input(encoder, accelerator, inputs):
    """Return what a head reads of each example: (examples, size), in the precision in force and the weights' type."""
    with accelerator.autocast():
        output = encoder(**inputs)
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state[:, 0] if pooled is None else pooled).to(next(encoder.parameters()).dtype)


def encoder_digest(encoder):
    """Return a cache key for an encoder's function: its weights, its config and the libraries' versions."""
    weights = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(value.numpy(force=True)))
    versions = [version(name) for name in ("torch", "transformers")]
    return digest(weights.hexdigest(), encoder.config.to_json_string(), versions)


def features_table(key, schema, tokens, encoder, packer, accelerator, batch_size):
    """Return (Dataset of `features`, is_new): from the cache, or computed by all processes together."""
    import pyarrow as pa

    def columns():
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        with tqdm(total=len(tokens), desc="features", unit="example", disable=not on_terminal) as bar:

            def compute_batch(inputs):
                values = head_input(encoder, accelerator, inputs)
                bar.update(len(values) * accelerator.num_processes)
                return values

            for first in range(0, len(tokens), FEATURE_ROWS_AT_A_TIME):
                rows = tokens.select(range(first, min(first + FEATURE_ROWS_AT_A_TIME, len(tokens))))
                values = compute_outputs(compute_batch, rows, accelerator, batch_size, packer)
                yield {"features": pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])}

    is_new = not all(gather_object([table_path(key).exists()]))
    if is_new and accelerator.is_local_main_process:
        write_table(key, schema, columns())
    elif is_new:
        for _ in columns():  # this machine's first process writes the table
            pass
    accelerator.wait_for_everyone()
    return load_table(key), is_new


# ----------------------------------------------------------------------------------------------------- memory probe


def choose_micro_batch_size(args, state, limit, accelerator, model, packer, examples):
    """Return how many examples a process computes at a time, and store it in state.micro_batch_size.

    limit: half of the size that ran out of memory earlier in this run, or None. `--micro_batch_size auto` probes the
    memory, unless an earlier start of this run already has.
    """
    examples_per_process = math.ceil(args.batch_size / accelerator.num_processes)
    if accelerator.device.type == "mps":
        longest = int(column_array(examples, "length").max())
        limit = min(limit or examples_per_process, max(1, TOKENS_ON_MPS // longest))
    size = args.micro_batch_size or examples_per_process
    if size == "auto":
        size = state.micro_batch_size or largest_micro_batch(accelerator, model, packer, examples, examples_per_process)
        log.info(f"micro-batches of {size} (--micro_batch_size auto)")
    state.micro_batch_size = min(size, examples_per_process, limit or examples_per_process)
    return state.micro_batch_size


def largest_micro_batch(accelerator, model, packer, examples, size):
    """Return how many of the longest examples fit into memory: size, or a half, a quarter, ... of it.

    Each size is tried with a forward and a backward pass, and with memory allocated for AdamW's two moments. The result
    is the same on all processes. Raises BadInput where not even one example fits.
    """
    lengths = column_array(examples, "length")
    longest = np.argsort(-lengths, kind="stable")
    moments = []
    while True:
        try:
            moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in range(2)]
            inputs = send_to_device(packer.collate(examples[longest[:size]]), accelerator.device)
            packer.set_batch(0, longest[:size], lengths[longest[:size]], accelerator.device)
            with fork_generators(accelerator.device):  # some models draw masks from torch's generators
                accelerator.backward(model(**inputs).logits.float().sum())
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        model.zero_grad()
        moments.clear()
        clear_device_cache(garbage_collection=not fits)
        if fits:
            return min(gather_object([size]))
        if size == 1:
            advice = "Try --gradient_checkpointing, a smaller --max_length or model."
            raise BadInput("not even one example at a time fits into memory", advice)
        size = math.ceil(size / 2)


def fork_generators(device):
    """Return a context that leaves torch's random generators, of the CPU and of a device, as they were."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


# ----------------------------------------------------------------------------------------------- checks of a dry run


def peak_memory(device):
    """Return the peak memory in bytes: of the process on a CPU, of its tensors on another device."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare_with_cpu(model, packer, micro_batch, device_autocast):
    """Return the largest differences [of logits, of gradients] of a batch on its device from fp32 on the CPU.

    Relative to the largest value on the CPU, without dropout. The gradients are those of the mean squared logit; the
    model keeps none. device_autocast: the context of the forward pass on the device.
    """
    cpu_model, cpu_packer = copy.deepcopy((model, packer))  # together: attention in the copy asks the copied packer
    cpu_model.cpu().float()
    on_device = _logits_and_gradients(model, packer, micro_batch, device_autocast)
    on_cpu = _logits_and_gradients(cpu_model, cpu_packer, micro_batch, nullcontext())
    return [
        float((here - there).abs().max() / there.abs().max()) for here, there in zip(on_device, on_cpu, strict=True)
    ]


def _logits_and_gradients(model, packer, micro_batch, autocast):
    device, was_training = next(model.parameters()).device, model.training
    packer.set_batch(0, micro_batch["ids"], micro_batch["lengths"], device)
    model.eval()
    model.zero_grad()
    with autocast:
        logits = model(**send_to_device(micro_batch["inputs"], device)).logits.float()
    logits.square().mean().backward()
    gradients = [parameter.grad.flatten().cpu() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    model.train(was_training)
    return logits.detach().cpu(), torch.cat(gradients)
