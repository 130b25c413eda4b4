"""What two or more scripts need, in the order data meets it: arguments, processes, tokens, model, losses, scores."""

import argparse
import csv
import gc
import inspect
import logging
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

import hardware
import metrics
import tasks
from reader import BadInput
from splits import UNLABELLED, hub_commit, load_splits, one_process_at_a_time
from tasks import amount, count, positive, share  # noqa: F401 - the types of flags, for the scripts

log = logging.getLogger("classifier")


# --------------------------------------------------------------------------------------------------------- arguments


def argument_parser(description, data=False):
    """Return a parser whose --help shows the script's docstring, and whose errors are two lines like all others.

    data: with the flags that say which data to read.
    """

    def fail(message):
        raise BadInput(message, "See --help.")

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = fail
    if data:
        tasks.add_data_arguments(parser)
    return parser


def parse_arguments(parser, default=None):
    """Return (args, task): the command line over the task's own defaults; `default` is the task where none is given."""
    task = tasks.task_of(parser.parse_args(), default)
    tasks.set_defaults(parser, task)
    return parser.parse_args(), task


def add_machine_arguments(parser):
    """Add the flags that say how to compute: they change no result beyond rounding."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--mixed_precision",
        choices=["auto", "no", "fp16", "bf16"],
        default="auto",
        help="auto: the launcher's, else what this hardware computes natively (default: %(default)s)",
    )
    group.add_argument(
        "--threads", type=positive, help="CPU threads of each process (default: cores / local processes)"
    )
    group.add_argument("--eval_batch_size", type=positive, default=64, help="examples at a time (default: %(default)s)")


# --------------------------------------------------------------------------------------------------------- processes


def run(main):
    """Call main() and turn what it raises into an exit code: 2 with a reason and an advice for bad input, 1 else."""
    script = Path(sys.argv[0]).name
    try:
        return main()
    except BadInput as error:
        code, words = 2, f"{script}: error: {error.reason}\n{script}: {error.advice}"
    except FloatingPointError as error:  # the run diverged: which step and examples, and what to try
        code, words = 1, f"{script}: error: {error}"
    except KeyboardInterrupt:
        code, words = 1, f"\n{script}: interrupted"
    # Every process finds the same mistake. The first one says it, and the launcher ends the others while they wait
    # here; a process that fails alone gets to say it too.
    if os.environ.get("RANK", "0") != "0":
        time.sleep(3)
    print(words, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The process group is still up, and its threads would abort an ordinary exit and hide the code.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def start(args, stream=None, **accelerator_options):
    """Return the Accelerator for this process: precision and threads chosen, libraries quiet, processes counted.

    Log lines of the main process go to `stream` (standard output). Raises BadInput where the processes that a launcher
    started would not form one group.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    quieten_libraries()
    environment = os.environ
    device = "cpu" if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else best_device()
    capability = torch.cuda.get_device_capability() if device in ("cuda", "rocm") else None
    try:
        precision, precision_words = hardware.choose_precision(
            args.mixed_precision,
            environment.get("ACCELERATE_MIXED_PRECISION"),
            device,
            capability,
            hardware.cpu_flags(),
        )
        threads, threads_words = hardware.choose_threads(
            args.threads,
            environment.get("OMP_NUM_THREADS"),
            hardware.available_cores(),
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            launched="ACCELERATE_MIXED_PRECISION" in environment or "TORCHELASTIC_RUN_ID" in environment,
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
    log.handlers = [logging.StreamHandler(stream or sys.stdout)]
    log.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    log.propagate = False
    if hardware.asked_for_more_processes(environment):
        raise BadInput(
            "the launcher was asked for several processes, but started one (as accelerate does with --cpu, MULTI_CPU)",
            "Launch with --config_file accelerate_configs/multi_cpu.yaml or torchrun --nproc_per_node N; "
            "for one process, drop --num_processes and unset MASTER_ADDR.",
        )
    started = int(environment.get("WORLD_SIZE", accelerator.num_processes))
    if started != accelerator.num_processes:
        raise BadInput(
            f"the launcher started {started} processes, but each believes it is one of {accelerator.num_processes}",
            "Launch with: accelerate launch --config_file accelerate_configs/multi_cpu.yaml (or multi_gpu.yaml).",
        )
    processes = f"{started} process{'es' if started > 1 else ''}"
    log.info(f"{accelerator.device.type}, {processes}, precision {precision_words}, {threads_words}")
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        log.info(
            f"the launcher's gradient_accumulation_steps={accumulation} is ignored: --batch_size is the size of a "
            "step, --micro_batch_size cuts it"
        )
    return accelerator


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


def finish(accelerator, *prepared):
    """End the processes. Without this order of calls, a third of 2-process runs on gloo abort at their very end."""
    accelerator.wait_for_everyone()
    accelerator.free_memory(*prepared)
    gc.collect()
    accelerator.end_training()


# ---------------------------------------------------------------------------------------------------- data and model


def load_data(task, args):
    """Return (task, splits, fingerprints) as splits.load_splits does, one process of a machine after the other."""
    with one_process_at_a_time():
        return load_splits(task, tasks.limits_of(args), args.refresh)


def load_model(name, task=None, refresh=False):
    """Return (model, tokenizer, facts) of a Hub id, a folder, or a mapping of config values (trained from scratch).

    With a task, a head that does not fit its labels is replaced by a new one. Weights are float32 whatever the
    checkpoint's type. `facts` holds `model`, `commit` and `new`: the names of newly initialised weights.
    Raises BadInput for a name that is neither on the Hub nor a model folder, and for weights that are not finite.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer

    head = {}
    if task and task.is_regression:
        head = {"num_labels": 1, "problem_type": "regression"}
    elif task:
        names = dict(enumerate(task.labels))
        head = {"id2label": names, "label2id": {label: number for number, label in names.items()}}
        head |= {"num_labels": len(names), "problem_type": "single_label_classification"}

    if isinstance(name, dict):
        if not Path(name["vocab"]).is_file():
            raise BadInput(f"{name['vocab']}: no such vocabulary file", "Mend `vocab` in the task's `model`.")
        tokenizer = BertTokenizer(name["vocab"])
        values = {key: value for key, value in name.items() if key != "vocab"}
        config = AutoConfig.for_model(**{"vocab_size": len(tokenizer), **values}, **head)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        facts = {"model": values, "commit": None, "new": ["every weight"]}
    else:
        options = {"revision": None, "trust_remote_code": False}
        if not Path(name).is_dir():
            options["revision"] = hub_commit(name, "model", refresh=refresh)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
            labels_before = AutoConfig.from_pretrained(name, **options).id2label
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, **options, **head, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            words = " ".join(str(error).split())[:300]
            raise BadInput(f"{name}: cannot be loaded as a text classifier ({words})", "Check --model.") from None
        new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
        if not new and task and not task.is_regression and list(labels_before.values()) != task.labels:
            # A head of the right size, but for other labels: its classes would be taken for ours by position.
            fresh = AutoModelForSequenceClassification.from_config(model.config, dtype=torch.float32)
            for child, module in fresh.named_children():
                if child != model.base_model_prefix:
                    setattr(model, child, module)
                    new |= {f"{child}.{key}" for key in module.state_dict()}
        facts = {"model": str(name), "commit": options["revision"], "new": sorted(new)}
    if facts["new"]:
        parts = sorted({key.rsplit(".", 1)[0] for key in facts["new"]})
        log.info(f"newly initialised: {', '.join(parts)} (not in the checkpoint: learnt in this training)")
    # Types such as token_type_ids are made by some tokenizers for models that do not know them.
    known = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [key for key in tokenizer.model_input_names if key in known]
    broken = [key for key, value in model.named_parameters() if not torch.isfinite(value).all()]
    if broken:
        raise BadInput(f"{name}: the weights {broken[0]} hold NaN or infinity", "Take another checkpoint.")
    return model, tokenizer, facts


def check_splits(task, splits, names):
    """Raise BadInput unless the named splits are there, and all their examples have labels."""
    for name in names:
        if name not in splits:
            raise BadInput(f"task {task.name}: has no {name} split", f"Splits: {', '.join(splits)}.")
        labels = np.asarray(splits[name]["label"])
        missing = np.isnan(labels).sum() if task.is_regression else (labels == UNLABELLED).sum()
        if missing:
            raise BadInput(
                f"task {task.name}: {missing} of {len(labels)} examples of the {name} split have no label",
                "They can be predicted (predict.py), not scored; the validation split can be scored.",
            )


def with_labels_of(model, facts, task):
    """Return the task with its labels in the order of the model's head; without a task's labels, with the model's.

    Labels are matched by name, never by position. Raises BadInput where model and task do not fit.
    """
    name, names = facts["model"], list(model.config.id2label.values())
    head_is_regression = model.config.num_labels == 1
    if facts["new"]:
        raise BadInput(f"{name}: has no trained head ({', '.join(facts['new'])})", f"First: train.py --model {name}")
    if head_is_regression != task.is_regression or not (
        task.is_regression or task.labels is None or sorted(task.labels) == sorted(names)
    ):
        raise BadInput(
            f"{name}: its head is for {'a number' if head_is_regression else ', '.join(names)}; the labels of the task "
            f"{task.name} are {', '.join(task.labels) if isinstance(task.labels, list) else task.labels}",
            f"Score it on data like those it was trained on, or fine-tune it first: train.py --model {name}",
        )
    return task if task.is_regression else replace(task, labels=names)


def probabilities(logits):
    """Return softmax(logits) over the last axis, in float64: (examples, labels)."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def csv_row_writer(stream):
    """Return a function that writes a row as CSV. Before Python 3.13 csv leaves a lone carriage return unquoted."""
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    return lambda row: (quoted if any("\r" in str(field) for field in row) else plain).writerow(row)


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
    for row in probabilities(logits):
        best = int(row.argmax())
        yield [task.labels[best], float(row[best]), *(float(value) for value in row)]


# -------------------------------------------------------------------------------------------------- losses and scores


def example_losses(task, logits, labels, label_smoothing=0.0, class_weights=None):
    """Return the loss of each example, shape (examples,): cross entropy, or squared error in regression.

    logits: (examples, outputs) in float32; labels: (examples,), ids or floats; class_weights: (labels,) or None.
    """
    from torch.nn import functional

    if task.is_regression:
        return functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
    losses = functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return losses if class_weights is None else losses * class_weights[labels]


def evaluate(task, logits, labels):
    """Return {"loss", "scores", "predictions"} of logits (examples, outputs) for labels (examples,).

    `loss` is the mean over the examples, `scores` the task's metrics, `predictions` label ids or values.
    Raises FloatingPointError for logits that are not finite.
    """
    import torch

    labels, broken = np.asarray(labels), (~np.isfinite(logits)).any(axis=1)
    if broken.any():
        raise FloatingPointError(f"{broken.sum()} of {len(labels)} examples have logits that are not finite")
    predictions = logits[:, 0] if task.is_regression else logits.argmax(axis=1)
    loss = example_losses(task, torch.from_numpy(logits), torch.from_numpy(labels)).mean().item()
    return {"loss": loss, "scores": metrics.compute(task.metrics, predictions, labels), "predictions": predictions}


def majority(task, labels):
    """Return what a model that sees no text would predict: the most frequent label id; the mean in regression."""
    return float(np.mean(labels)) if task.is_regression else int(np.bincount(labels).argmax())


def majority_scores(task, constant, labels):
    """Return the task's metrics of always predicting `constant`."""
    with warnings.catch_warnings():  # a constant has no correlation: that is known, and no news
        warnings.simplefilter("ignore")
        return metrics.compute(task.metrics, np.full(len(labels), constant), np.asarray(labels))


def is_better(task, score, best):
    """Return whether a score of the task's first metric beats the best so far; an undefined one never does."""
    return metrics.is_better(task.metrics[0], score, best)


def score_words(values):
    """Return scores as words: `f1 0.8123, accuracy 0.6838`."""
    return ", ".join(f"{name} {'undefined' if value is None else f'{value:.4f}'}" for name, value in values.items())
