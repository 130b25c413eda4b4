"""A saved model as a function: texts in, logits and labels out. For predict.py, and for programs of your own.

    from classifier.predictor import load
    predictor = load("runs/mrpc")                                 # or an exported model: runs/mrpc/model/onnx
    table = predictor.table([["He left."], ["He went away."]])    # {"predicted_label": [...], "probability": [...]}

It writes no files and needs no other process: an engine with one Predictor per worker can divide the rows as it likes.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from classifier import processes
from classifier.data import tasks
from classifier.data.labels import prediction_columns, prediction_rows
from classifier.files import digest, sha256
from classifier.messages import BadInput, log
from classifier.model.tokenization import check_ids, embedding_rows, encode, largest_id, longest_input, padded

ROWS_AT_A_TIME = 4096  # enough to batch texts of similar length


@dataclass
class Predictor:
    """A loaded model; see load."""

    task: tasks.Task
    tokenizer: object
    forward: Callable  # from a batch, {column: ragged ids}, to its logits, float32 (examples, outputs)
    batch_size: int
    sources: list  # the model's files, or the id and commit of a Hub model
    rows: int | None = None  # of the model's token embeddings

    @cached_property
    def digest(self):
        """A digest of the weights and the task."""
        return digest([sha256(source) if isinstance(source, Path) else source for source in self.sources])

    def logits(self, texts):
        """Return the logits of texts, float32 (texts, outputs). texts: one list for each of the task's text columns."""
        encoded, _ = encode(self.task, self.tokenizer, texts, self.task.max_length)
        check_ids(max(map(max, filter(None, encoded["input_ids"])), default=0), self.rows)
        order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable")  # similar lengths together
        logits = np.empty((len(order), 1 if self.task.is_regression else len(self.task.labels)), dtype=np.float32)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            logits[batch] = self.forward({name: [ids[i] for i in batch] for name, ids in encoded.items()})
        return logits

    def dataset_logits(self, rows):
        """Return the logits of a Dataset, (rows, outputs), in constant memory for its texts."""
        slices = (rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME))
        return np.concatenate([self.logits([columns[name] for name in self.task.text]) for columns in slices])

    def table(self, texts):
        """Return the columns that predict.py adds to a table: {name: values}. texts: as for logits."""
        rows = list(prediction_rows(self.task, self.logits(texts)))
        return {name: [row[at] for row in rows] for at, name in enumerate(prediction_columns(self.task))}


def least_probability(task, given, target_accuracy):
    """Return the probability below which no label is given, None where each text gets one.

    given: that probability, or None; target_accuracy: None, or the share of the labels that is to be right, by the
    validation examples of the training. Raises BadInput where they cannot promise it.
    """
    if not (given or target_accuracy):
        return None
    if task.is_regression or task.is_multi_label:
        raise BadInput("--min_probability and --target_accuracy need one label for each text", "Drop them.")
    if given:
        return given
    fitted = {float(target): least for target, least in (task.min_probabilities or {}).items()}
    target = min((each for each in fitted if each >= target_accuracy), default=None)
    if target is None or fitted[target] is None:
        reason = f"--target_accuracy {target_accuracy}: the validation examples of this model do not promise that"
        promised = [each for each, least in fitted.items() if least is not None]
        raise BadInput(reason, f"They promise up to {promised[-1]}." if promised else "Give --min_probability.")
    log.info(f"labels below a probability of {fitted[target]:.4f} are left empty, for an accuracy of {target}")
    return fitted[target]


def onnx_file(path):
    """Return the .onnx file at a path, which may be a folder with model.onnx; None for any other model."""
    file = Path(path) if str(path).endswith(".onnx") else Path(path) / "model.onnx"
    return file if file.is_file() else None


def load(path, accelerator=None, batch_size=64, threads=None):
    """Return the Predictor of a run, a model folder, a Hub id, or a folder that export.py wrote.

    accelerator: chooses the device and the precision (default: a new Accelerator). threads: for an exported model
    (default: all available cores). Raises BadInput for anything that is not a classifier.
    """
    if file := onnx_file(path):
        return _load_exported(file, batch_size, threads)
    import torch
    from accelerate import Accelerator
    from accelerate.utils import send_to_device
    from accelerate.utils.memory import clear_device_cache

    from classifier.model.models import load_model, model_folder, with_head_labels
    from classifier.model.packing import prepare_to_infer

    folder = model_folder(path)
    model, tokenizer, facts = load_model(folder)
    task, _ = tasks.read_saved_task(folder)
    task = task or tasks.Task(
        name=Path(folder).name,
        text=["text"],
        labels=None if model.config.num_labels > 1 else "regression",
        problem="multi_label" if model.config.problem_type == "multi_label_classification" else None,
    )
    task = with_head_labels(model, facts, task)
    task = replace(task, max_length=task.max_length or longest_input(model, tokenizer))
    accelerator = accelerator or Accelerator()
    model, packer = prepare_to_infer(model, tokenizer, accelerator)
    model.eval()

    def forward(batch):
        lengths = [len(ids) for ids in batch["input_ids"]]
        try:
            inputs = send_to_device(packer.collate(batch), accelerator.device)
            packer.set_batch(0, range(len(lengths)), lengths, accelerator.device)
            with torch.inference_mode():
                return model(**inputs).logits.float().cpu().numpy()
        except RuntimeError as error:
            if len(lengths) == 1 or not processes.is_out_of_memory(error):
                raise
        clear_device_cache(garbage_collection=True)  # out of memory: in two halves
        middle = len(lengths) // 2
        halves = [{name: ids[half] for name, ids in batch.items()} for half in (slice(middle), slice(middle, None))]
        return np.concatenate([forward(half) for half in halves])

    files = sorted(file for file in Path(folder).glob("*") if file.is_file() and file.suffix != ".md")
    sources = [path, facts["commit"]] if facts["commit"] else files
    return Predictor(task, tokenizer, forward, batch_size, sources, embedding_rows(model))


class _Tokenizer:
    """The tokenizer.json of an exported model, for tokenization.encode: transformers' tokenizers would import torch."""

    unk_token_id = None  # unknown tokens are not counted

    def __init__(self, file, columns):
        from tokenizers import Tokenizer

        self.backend, self.model_input_names = Tokenizer.from_file(str(file)), columns
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, *texts, return_special_tokens_mask):
        encoded = self.backend.encode_batch(list(zip(*texts, strict=True)) if len(texts) > 1 else list(texts[0]))
        attributes = {"input_ids": "ids", "token_type_ids": "type_ids", "special_tokens_mask": "special_tokens_mask"}
        return {name: [getattr(example, attribute) for example in encoded] for name, attribute in attributes.items()}


def _load_exported(file, batch_size, threads):
    """Return the Predictor of an .onnx file that export.py wrote, without torch, whose import takes seconds."""
    try:
        import onnxruntime
    except ImportError:
        raise BadInput(f"{file}: needs the package onnxruntime", "pip install -r requirements-extra.txt") from None
    folder = file.parent
    task, _ = tasks.read_saved_task(folder)
    if task is None:
        raise BadInput(f"{file}: has no task.json next to it", "Keep all files that export.py wrote together.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or processes.available_cores()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        columns = [column.name for column in session.get_inputs()]
        tokenizer = _Tokenizer(folder / "tokenizer.json", columns)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        pad_token_id, padding_side = config.get("pad_token_id") or 0, config.get("padding_side", "right")
        special = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
        rows, largest = config.get("vocab_size"), largest_id(tokenizer.backend.get_vocab(), special, [pad_token_id])
    except Exception as error:  # onnxruntime and tokenizers raise types of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"{file}: cannot be loaded ({reason})", "Export again, or copy the folder again.") from None
    if rows and largest >= rows:
        reason = f"{file}: tokenizer.json has token ids up to {largest}, but config.json a vocabulary of {rows}"
        raise BadInput(reason, "Keep all files that export.py wrote together, or export again.")
    gc.enable()  # see processes.run

    def forward(batch):
        return session.run(["logits"], padded(batch, pad_token_id, padding_side))[0]

    sources = [*sorted(folder.glob(f"{file.name}*")), folder / "tokenizer.json", folder / "task.json"]
    return Predictor(task, tokenizer, forward, batch_size, sources, rows)


def start_exported(args, stream=None):
    """Return (a stand-in for the Accelerator, threads) for ONNX Runtime: one process, no torch.

    Raises BadInput for several processes and for a precision.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("ONNX Runtime uses one process, but the launcher started several", "Launch with python alone.")
    if args.mixed_precision not in ("auto", "no"):
        reason = f"--mixed_precision {args.mixed_precision}: the precision of an exported model is fixed"
        raise BadInput(reason, "Drop the flag. For a smaller and faster model: export.py --quantize int8.")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    threads, threads_reason = processes.choose_threads(
        args.threads, os.environ.get("OMP_NUM_THREADS"), processes.available_cores(), 1, launched
    )
    processes.log_to(stream or sys.stdout)
    log.info(f"onnxruntime, cpu, 1 process, precision of the file, {threads_reason}")

    def no_op(*_):
        pass

    facts = {"is_main_process": True, "process_index": 0, "num_processes": 1, "mixed_precision": "no"}
    methods = dict.fromkeys(("wait_for_everyone", "free_memory", "end_training"), no_op)
    return SimpleNamespace(**facts, **methods), threads
