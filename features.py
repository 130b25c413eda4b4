"""A frozen encoder runs once: what the head reads of each example is kept in the cache, and training begins there.

A head reads one vector of an example: what the encoder's pooler returns or, without a pooler, the first token's hidden
state. Where a model's head reads more (all tokens, the last one), its encoder runs in each step like any other.
"""

import hashlib
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

import batching
from cache import array_of, digest, open_table, table_path, write_table
from common import log

ROWS_AT_A_TIME = 10_000  # in memory: 15 MB for a vector of 384


class Layout:
    """Takes the place of a packing.Layout where each example comes with its features."""

    is_row = True  # nothing is padded

    def __init__(self, masks):
        self.masks = masks

    def lay_out(self, examples):
        """Return the inputs of examples, given as a dict of columns: as texts of one token."""
        return {"inputs_embeds": torch.from_numpy(examples["features"]).unsqueeze(1)}

    def begin(self, step, ids, lengths, device):
        """Say which examples come next, in the order of the micro-batch."""
        self.masks.begin(step, ids, device)


def read(*_, inputs_embeds, **options):
    """Return features (examples, 1, size) as an encoder's output. Takes the place of an encoder's forward."""
    return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds, pooler_output=inputs_embeds[:, 0])


def compute(encoder, accelerator, inputs):
    """Return what a head reads of each example: (examples, size), in the precision in force and the weights' type."""
    with accelerator.autocast():
        output = encoder(**inputs)
    pooled = getattr(output, "pooler_output", None)
    return (output.last_hidden_state[:, 0] if pooled is None else pooled).to(next(encoder.parameters()).dtype)


@torch.no_grad()
def try_out(model, layout, examples, accelerator):
    """Return the features (2, size) of the longest example and the shortest, or None where the head needs more."""
    encoder, lengths, was_training = model.base_model, array_of(examples, "length"), model.training
    if encoder is model:
        return None
    ids = np.array([lengths.argmax(), lengths.argmin()])
    inputs = send_to_device(layout.lay_out(examples[ids]), accelerator.device)
    model.eval()
    try:
        layout.begin(0, ids, lengths[ids], accelerator.device)
        logits, features = model(**inputs).logits, compute(encoder, accelerator, inputs)
        encoder.forward = read
        Layout(layout.masks).begin(0, ids, lengths[ids], accelerator.device)
        same = torch.allclose(model(inputs_embeds=features.unsqueeze(1)).logits, logits, rtol=1e-4, atol=1e-5)
        return features if same else None
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # a head that cannot do with one vector
        return None
    finally:
        vars(encoder).pop("forward", None)
        model.train(was_training)


def digest_of(encoder):
    """Return a name for what an encoder computes: of its weights, its config and the versions of what computes."""
    weights = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(value.numpy(force=True)))
    versions = [version(name) for name in ("torch", "transformers")]
    return digest(weights.hexdigest(), encoder.config.to_json_string(), versions)


def table_of(key, schema, tokens, encoder, layout, accelerator, batch_size):
    """Return (Dataset of `features`, made): from the cache, or computed by all processes together first."""
    import pyarrow as pa

    def columns():
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        with tqdm(total=len(tokens), desc="features", unit="example", disable=not on_terminal) as bar:

            def compute_batch(inputs):
                values = compute(encoder, accelerator, inputs)
                bar.update(len(values) * accelerator.num_processes)
                return values

            for first in range(0, len(tokens), ROWS_AT_A_TIME):
                some = tokens.select(range(first, min(first + ROWS_AT_A_TIME, len(tokens))))
                values = batching.all_outputs(compute_batch, some, accelerator, batch_size, layout)
                yield {"features": pa.FixedSizeListArray.from_arrays(values.reshape(-1), values.shape[1])}

    made = not all(gather_object([table_path(key).exists()]))
    if made and accelerator.is_local_main_process:
        write_table(key, schema, columns())
    elif made:
        for _ in columns():  # this machine's first process writes
            pass
    accelerator.wait_for_everyone()
    return open_table(key), made


def of_splits(model, layout, examples, accelerator, args, state):
    """Return (layout, {split: examples}) with which a model trains and is scored without running its frozen encoder.

    Those given where its head needs more than features. The time goes into state, as training and as evaluation.
    """
    import pyarrow as pa
    from datasets import concatenate_datasets

    encoder, tried = model.base_model, try_out(model, layout, examples["train"], accelerator)
    if tried is None:
        log.info("this model's head reads more than one vector of an example: the frozen encoder runs in each step")
        return layout, examples
    number = pa.from_numpy_dtype(tried.cpu().numpy().dtype)
    schema = pa.schema([("features", pa.list_(number, tried.shape[1]))])
    made_by = [digest_of(encoder), accelerator.mixed_precision, accelerator.device.type]
    with_features, made = {}, []
    for name, tokens in examples.items():
        started = time.monotonic()
        key = digest("features", made_by, Path(tokens.cache_files[0]["filename"]).stem)  # named by the tokens
        table, is_made = table_of(key, schema, tokens, encoder, layout, accelerator, args.eval_batch_size)
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
    encoder.forward = read
    return Layout(layout.masks), with_features
