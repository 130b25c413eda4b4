"""What two or more scripts need, in the order data meets it: arguments, processes, tokens, model, losses, scores."""

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import hardware
import metrics
import tasks
from cache import array_of, digest, one_process_at_a_time  # noqa: F401 - digest for train.py
from labels import UNLABELLED
from models import freeze, load_model, with_labels_of  # noqa: F401 - for the scripts
from reader import BadInput
from splits import check_files, load_splits
from tasks import amount, count, positive, share  # noqa: F401 - the types of flags, for the scripts
from writer import write_bad_rows  # noqa: F401 - for train.py

log = logging.getLogger("classifier")

# torch then asks for memory in pages of 2 MB, of which a CPU has fewer to get: see keep_freed_memory for the rest.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


class Preempted(KeyboardInterrupt):
    """A signal asked the run to end; the same command goes on. Like Ctrl-C, it passes through `except Exception`."""


class RunFailed(Exception):
    """What the user is to know of a run that could not go on."""


# --------------------------------------------------------------------------------------------------------- arguments


def argument_parser(description, data=False):
    """Return a parser whose --help shows the script's docstring, and whose errors are two lines like all others.

    data: with the flags that say which data to read.
    """

    def fail(message):
        raise BadInput(message, "See --help.")

    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=as_it_is, allow_abbrev=False)
    parser.error = fail
    if data:
        tasks.add_data_arguments(parser)
    return parser


def parse_arguments(parser, default=None):
    """Return (args, task): the command line over the task's own defaults; `default` is the task where none is given."""
    task = tasks.task_of(parser.parse_args(), default)
    check_files(task)
    tasks.set_defaults(parser, task)
    return parser.parse_args(), task


def add_machine_arguments(parser):
    """Add the flags that say how to compute: they change no result beyond rounding."""
    add = parser.add_argument_group("machine").add_argument
    add(
        "--mixed_precision",
        choices=["auto", "no", "fp16", "bf16"],
        default="auto",
        help="auto: the launcher's, else what this hardware computes natively (default: %(default)s)",
    )
    add("--threads", type=positive, help="CPU threads of each process (default: cores / local processes)")
    add("--eval_batch_size", type=positive, default=64, help="examples at a time (default: %(default)s)")


# --------------------------------------------------------------------------------------------------------- processes


def run(main):
    """Call main() and turn what it raises into an exit code: 2 with a reason and an advice for bad input, 1 else."""
    script = Path(sys.argv[0]).name
    # The libraries' imports make millions of objects that stay: to look for garbage among them, again and again, takes
    # 0.6 s. load_model, after the last of them, turns it on again.
    gc.disable()
    try:
        empty = next((word for word in sys.argv[1:] if word == "" or (word[:2] == "--" and word[-1] == "=")), None)
        if empty is not None:
            raise BadInput(f"an argument is empty: {' '.join(map(repr, sys.argv[1:]))}", "Is a shell variable not set?")
        return main()
    except BadInput as error:
        code, words = 2, f"{script}: error: {error.reason}\n{script}: {error.advice}"
    except (FloatingPointError, RunFailed) as error:  # a run that diverged: which step and examples, and what to try
        code, words = 1, f"{script}: error: {error}"
    except Preempted as error:
        code, words = 75, f"{script}: {error}"
    except KeyboardInterrupt:
        code, words = 1, f"\n{script}: interrupted"
    finally:
        gc.enable()
    # Every process finds the same mistake. The first one says it, and the launcher ends the others while they wait
    # here; a process that fails alone gets to say it too. Being ended is no news of its own.
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if is_first or code != 75:
        print(words, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The process group is still up, and its threads would abort an ordinary exit and hide the code.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def start(args, stream=None, **accelerator_options):
    """Return the Accelerator for this process: precision and threads chosen, libraries quiet, processes counted.

    Log lines of the main process go to `stream` (standard output).
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    quieten_libraries()
    environment = os.environ
    device = "cpu" if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else best_device()
    if device == "cpu":
        keep_freed_memory()
    capability = torch.cuda.get_device_capability() if device in ("cuda", "rocm") else None
    launcher_precision = environment.get("ACCELERATE_MIXED_PRECISION")
    try:
        precision, precision_words = hardware.choose_precision(
            args.mixed_precision, launcher_precision, device, capability, hardware.cpu_flags()
        )
        threads, threads_words = hardware.choose_threads(
            args.threads,
            environment.get("OMP_NUM_THREADS"),
            hardware.available_cores(),
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            launched=launcher_precision is not None or "TORCHELASTIC_RUN_ID" in environment,
        )
    except ValueError as error:
        reason, _, advice = str(error).partition("\n")
        raise BadInput(reason, advice) from None
    accelerator = Accelerator(
        cpu=device == "cpu",  # without this, two processes on a machine without a GPU are both rank 0 of 1
        mixed_precision=precision,
        # A plugin is the one way to overrule the launcher: --batch_size alone says how large a step is.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        **accelerator_options,
    )
    torch.set_num_threads(threads)
    log_to(stream or sys.stdout, logging.INFO if accelerator.is_main_process else logging.ERROR)
    number = accelerator.num_processes
    check_processes(number)
    processes = f"{number} process{'es' if number > 1 else ''}"
    log.info(f"{accelerator.device.type}, {processes}, precision {precision_words}, {threads_words}")
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        log.info(
            f"the launcher's gradient_accumulation_steps={accumulation} is ignored: --batch_size is the size of a "
            "step, --micro_batch_size cuts it"
        )
    return accelerator


def start_exported(args, stream=None):
    """Return (what stands for the Accelerator where onnxruntime computes, threads): one process, and no torch."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("onnxruntime computes in one process, the launcher started several", "Launch with python alone.")
    if args.mixed_precision not in ("auto", "no"):
        words = f"--mixed_precision {args.mixed_precision}: an exported model has its precision in it"
        raise BadInput(words, "Drop the flag. Smaller and faster: export.py --quantize int8.")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    threads, words = hardware.choose_threads(
        args.threads, os.environ.get("OMP_NUM_THREADS"), hardware.available_cores(), 1, launched
    )
    log_to(stream or sys.stdout)
    log.info(f"onnxruntime, cpu, 1 process, precision of the file, {words}")

    def nothing(*_):
        pass

    alone = {"is_main_process": True, "process_index": 0, "num_processes": 1, "mixed_precision": "no"}
    calls = {"wait_for_everyone": nothing, "free_memory": nothing, "end_training": nothing}
    return SimpleNamespace(**alone, **calls), threads


def log_to(stream, level=logging.INFO):
    """Send the log lines of this process to a stream."""
    log.handlers = [logging.StreamHandler(stream)]
    log.setLevel(level)
    log.propagate = False


def keep_freed_memory():
    """Let glibc keep what tensors give back for the next ones: fresh memory from the system costs up to a quarter of a
    step (benchmarks/RESULTS.md).

    See mallopt(3) in Linux's manual. Other C libraries have no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: tensors of up to 1 GiB share the memory that is kept


def check_processes(number):
    """Raise BadInput where a launcher started, or was to start, other than this number of processes as one group."""
    if hardware.asked_for_more_processes(os.environ):
        raise BadInput(
            "the launcher was asked for several processes, but started one (as accelerate does with --cpu, MULTI_CPU)",
            "Launch with --config_file accelerate_configs/multi_cpu.yaml or torchrun --nproc_per_node N; "
            "for one process, drop --num_processes and unset MASTER_ADDR.",
        )
    started = int(os.environ.get("WORLD_SIZE", number))
    if started != number:
        raise BadInput(
            f"the launcher started {started} processes, but each believes it is one of {number}",
            "Launch with: accelerate launch --config_file accelerate_configs/multi_cpu.yaml (or multi_gpu.yaml).",
        )


def best_device():
    """Return "cuda", "rocm", "mps", "cpu", ...: the device that torch would use."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator().type
    return "rocm" if kind == "cuda" and torch.version.hip else kind


def quieten_libraries():
    """Keep the libraries' progress bars and load reports off the terminal; their errors stay."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers warns in workers, and uses one core
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def on_main_process(accelerator, function, *arguments):
    """Call a function on the main process alone; return its answer on all of them, or raise its BadInput on all."""
    from accelerate.utils import broadcast_object_list

    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function(*arguments)
        except BadInput as error:
            answer[1] = (error.reason, error.advice)
    broadcast_object_list(answer)
    if answer[1]:
        raise BadInput(*answer[1])
    return answer[0]


def finish(accelerator, *prepared):
    """End the processes. Without this order of calls, a third of 2-process runs on gloo abort at their very end."""
    accelerator.wait_for_everyone()
    accelerator.free_memory(*prepared)
    gc.collect()
    accelerator.end_training()


# ---------------------------------------------------------------------------------------------------- data and model


def load_data(task, args):
    """Return (task, splits, fingerprints, bad_rows) of splits.load_splits, one process of a machine after the other."""
    with one_process_at_a_time():
        task, splits, fingerprints, bad_rows = load_splits(task, args.refresh)
    for name in dict.fromkeys(bad_row["split"] for bad_row in bad_rows):
        reasons = [bad_row["reason"] for bad_row in bad_rows if bad_row["split"] == name]
        words = f"{len(reasons)} bad rows left out, listed in bad_rows.csv; the first: {reasons[0]}"
        log.warning(f"WARNING: {name}: {words}")
    return task, splits, fingerprints, bad_rows


def lay_out(model, tokenizer, seed=0):
    """Prepare a model for examples that lie end to end, and for dropout that is a function of them; return its Layout.

    Two examples are tried both ways. A model that answers otherwise where they lie end to end runs padded, and that is
    said.
    """
    import dropout
    import packing

    masks = dropout.install(model, seed)
    layout = packing.Layout(model, masks, tokenizer.pad_token_id)
    if dropout.draws_from_torch(model, masks):
        log.warning(
            "WARNING: some of this model's dropout is torch's own: its masks change with the number of processes"
        )
    encoded = tokenizer(["one two three, four; five. Six?", "seven"])
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    layout.is_row = packing.agrees(model, layout, columns)
    if not layout.is_row:
        log.info("this model needs padding: its examples run padded, those of like length together")
    return layout


def features_of(*arguments):
    """Return features.of_splits, imported where it is needed."""
    import features

    return features.of_splits(*arguments)


def check_splits(task, splits, names):
    """Raise BadInput unless the named splits are there, and all their examples have labels."""
    for name in names:
        if name not in splits:
            raise BadInput(f"task {task.name}: has no {name} split", f"Splits: {', '.join(splits)}.")
        labels = array_of(splits[name], "label").reshape(len(splits[name]), -1)
        missing = (np.isnan(labels) if task.is_regression else labels == UNLABELLED).any(axis=1).sum()
        if missing:
            raise BadInput(
                f"task {task.name}: {missing} of {len(labels)} examples of the {name} split have no label",
                "They can be predicted (predict.py), not scored; the validation split can be scored.",
            )


def check_unchanged(names, before, now, advice):
    """Raise BadInput where a named split is not the one of the training. before, now: fingerprints by split."""
    if changed := [name for name in names if before.get(name, now[name]) != now[name]]:
        words = f"the {changed[0]} split is not the one of the training: its data or the rule that made it have changed"
        raise BadInput(words, advice)


def probabilities(task, logits):
    """Return each label's probability, in float64, shape (examples, labels): softmax, or sigmoid in multi-label."""
    if task.is_multi_label:
        return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -700, 700)))  # exp(710) overflows
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def predictions_of(task, logits):
    """Return what logits (examples, outputs) predict: label ids, values in regression, 0 and 1 in multi-label."""
    if task.is_regression:
        return logits[:, 0]
    if task.is_multi_label:
        return (probabilities(task, logits) > (task.thresholds or 0.5)).astype(int)
    return logits.argmax(axis=1)


def label_word(task, label):
    """Return a label, as an example of a split holds it, in words; a value in regression."""
    if task.is_multi_label:
        return task.separator.join(task.labels[position] for position in np.flatnonzero(label))
    return label if task.is_regression else task.labels[label]


def prediction_columns(task):
    """Return the names of the columns that predictions add to a table."""
    if task.is_regression:
        return ["predicted_value"]
    return ["predicted_label", "probability", *(f"probability_{name}" for name in task.labels)]


def prediction_rows(task, logits):
    """Yield the values of prediction_columns for each row of logits (examples, outputs)."""
    if task.is_regression:
        yield from ([float(value)] for value in logits[:, 0])
        return
    for logits_of_row, row in zip(logits, probabilities(task, logits), strict=True):
        if task.is_multi_label:  # as one string, and the probability of just these labels
            applies = predictions_of(task, logits_of_row[None])[0].astype(bool)
            label = task.separator.join(name for name, does in zip(task.labels, applies, strict=True) if does)
            probability = np.where(applies, row, 1 - row).prod()
        else:
            label, probability = task.labels[int(row.argmax())], row.max()
        yield [label, float(probability), *(float(value) for value in row)]


# -------------------------------------------------------------------------------------------------- losses and scores


def example_losses(task, logits, labels, label_smoothing=0.0, class_weights=None):
    """Return the loss of each example, shape (examples,): cross entropy; squared error in regression; in multi-label
    the mean over the labels of each one's binary cross entropy.

    logits: (examples, outputs) in float32; labels: (examples,), ids or floats, or (examples, labels) of 0 and 1;
    class_weights: (labels,) or None.
    """
    from torch.nn import functional

    if task.is_regression:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
    if task.is_multi_label:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses if class_weights is None else losses * class_weights[labels]


def balanced_weights(task, labels):
    """Return the weight of each class, shape (labels,): inverse to its frequency, of mean 1 over the examples."""
    import torch

    counts = np.bincount(labels, minlength=len(task.labels))
    return torch.tensor(len(labels) / ((counts > 0).sum() * np.maximum(counts, 1)), dtype=torch.float32)


def evaluate(task, logits, labels, majority):
    """Return {"loss", "scores", "predictions", "constant", "majority", "logits", "labels"} of logits (examples,
    outputs) for labels (examples,).

    `loss` is the mean over the examples, `scores` the task's metrics, `predictions` label ids or values (in multi-label
    0 and 1), `constant` the one prediction where all are the same, `majority` the metrics of always predicting
    `majority`.
    Raises FloatingPointError for logits that are not finite.
    """
    import torch

    labels, broken = np.asarray(labels), (~np.isfinite(logits)).any(axis=1)
    if broken.any():
        raise FloatingPointError(f"{broken.sum()} of {len(labels)} examples have logits that are not finite")
    predictions = predictions_of(task, logits)
    loss = example_losses(task, torch.from_numpy(logits), torch.tensor(labels)).mean().item()
    is_constant = len(predictions) > 1 and (predictions == predictions[0]).all()
    # A constant has no correlation: that is known, and no news.
    majority_scores = metrics.compute(task.metrics, np.broadcast_to(majority, labels.shape), labels, warns=False)
    return {
        "loss": loss,
        "scores": metrics.compute(task.metrics, predictions, labels),
        "predictions": predictions,
        "constant": predictions[0].tolist() if is_constant else None,
        "majority": majority_scores,
        "logits": logits,
        "labels": labels,
    }


def with_thresholds(task, logits, labels):
    """Return a multi-label task with the probability above which each label applies: where its F1 is highest."""
    from sklearn.metrics import precision_recall_curve

    thresholds = []
    for of_label, applies in zip(probabilities(task, logits).T, labels.T, strict=True):
        if not applies.any():  # nothing to choose by
            thresholds.append(0.5)
            continue
        precision, recall, cuts = precision_recall_curve(applies, of_label)  # a label applies from its cut on
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        thresholds.append(float((cuts[best] + (cuts[best - 1] if best else 0)) / 2))
    return replace(task, thresholds=thresholds)


def majority(task, labels):
    """Return what a model that sees no text would predict: the most frequent label id; the mean in regression; in
    multi-label a list, 1 for each label that more than half of the examples have."""
    if task.is_multi_label:
        return (labels.mean(axis=0) > 0.5).astype(int).tolist()
    return float(np.mean(labels)) if task.is_regression else int(np.bincount(labels).argmax())


def clock(seconds):
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def number_words(number):
    """Return a score as a word: 0.8123, or undefined."""
    return "undefined" if number is None else f"{number:.4f}"


def score_words(values):
    """Return scores as words: `f1 0.8123, accuracy 0.6838`."""
    return ", ".join(f"{name} {number_words(value)}" for name, value in values.items())


def is_better(task, score, best):
    """Return whether a score of the task's first metric beats the best so far; an undefined one never does."""
    return metrics.is_better(task.metrics[0], score, best)
