"""Fine-tune a text classifier: one explicit loop, the same on a CPU, a GPU, many of them, or a cluster.

    accelerate launch train.py --task mrpc                      # a GLUE task from the Hub
    accelerate launch train.py --train_file my.csv              # a file with the columns text and label
    python train.py                                             # the demo: no network, a minute on a CPU
    torchrun --nproc_per_node 2 train.py --task mrpc            # two processes: the same batches, the same numbers
    accelerate launch --config_file accelerate_configs/fp16.yaml train.py --task mrpc

Writes runs/TASK/ (--output_dir): model/ for evaluate.py, predict.py and transformers; metrics.jsonl, results.json and
state.json. Evaluates as it goes and keeps the checkpoint that the task's first metric likes best.
"""

import math
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device, set_seed
from torch.nn import ModuleList
from transformers import get_scheduler

import batching
import checkpoint
import common
import report
from common import BadInput, log

# What these say changes no result, or only where it is written: they neither name a run's folder nor tell runs apart.
BOOKKEEPING = {
    *("task", "output_dir", "overwrite", "final_test", "log_every", "num_workers", "trackers", "threads", "refresh"),
    *("micro_batch_size", "eval_batch_size", "eval_train_rows", "gradient_checkpointing", "dry_run"),
}
DRY_RUN_STEPS = 50  # at most; a few seconds are enough


def build_parser():
    parser = common.argument_parser(__doc__, data=True)
    amount, count, positive, share = common.amount, common.count, common.positive, common.share

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="ID|DIR", help="a pretrained encoder (default: the task's)")
    model.add_argument(
        "--freeze", default="none", metavar="PART", help="none, encoder, embeddings, or N: these and the first N layers"
    )
    model.add_argument("--gradient_checkpointing", action="store_true", help="compute twice, keep less in memory")

    steps = parser.add_argument_group("steps")
    steps.add_argument("--epochs", type=amount, default=3, help="passes over the training data (default: %(default)s)")
    steps.add_argument("--max_steps", type=positive, help="stop after this many optimiser steps (overrides --epochs)")
    steps.add_argument(
        "--batch_size", type=positive, default=32, help="examples per step, of all processes (default: %(default)s)"
    )
    steps.add_argument("--micro_batch_size", type=positive, help="examples in memory at a time (default: the share)")
    steps.add_argument("--seed", type=count, default=42, help="of new weights, order, dropout (default: %(default)s)")
    steps.add_argument(
        "--num_workers", type=count, default=0, help="processes that load batches (default: %(default)s)"
    )

    optimiser = parser.add_argument_group("optimiser")
    optimiser.add_argument("--learning_rate", type=amount, default=2e-5, help="at its peak (default: %(default)s)")
    optimiser.add_argument("--weight_decay", type=amount, default=0.01, help="of matrices (default: %(default)s)")
    optimiser.add_argument("--adam_betas", type=share, nargs=2, default=[0.9, 0.999], metavar="B", help="of AdamW")
    optimiser.add_argument("--adam_epsilon", type=amount, default=1e-8, help="of AdamW (default: %(default)s)")
    optimiser.add_argument("--max_grad_norm", type=amount, default=1.0, help="0: no clipping (default: %(default)s)")
    optimiser.add_argument(
        "--scheduler",
        default="linear",
        choices=["linear", "cosine", "polynomial", "constant", "constant_with_warmup"],
        help="the course of the learning rate (default: %(default)s)",
    )
    optimiser.add_argument("--warmup_ratio", type=share, default=0.0, help="share of the steps (default: %(default)s)")
    optimiser.add_argument("--warmup_steps", type=count, help="number of steps (overrides --warmup_ratio)")

    loss = parser.add_argument_group("loss")
    loss.add_argument("--label_smoothing", type=share, default=0.0, help="(default: %(default)s)")
    loss.add_argument("--class_weights", choices=["none", "balanced"], default="none", help="balanced: by frequency")

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval_every", default="epoch", metavar="epoch|N", help="or N steps (default: epoch)")
    evaluation.add_argument(
        "--early_stopping_patience", type=positive, metavar="N", help="stop after N evaluations without a better score"
    )
    evaluation.add_argument("--eval_train_rows", type=positive, metavar="N", help="score N rows of train, too")
    evaluation.add_argument("--final_test", action="store_true", help="score the test split once, with the best model")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", metavar="DIR", help="(default: runs/TASK, and the settings that differ)")
    output.add_argument("--overwrite", action="store_true", help="replace a run in this folder")
    output.add_argument("--dry_run", action="store_true", help="tell what the run takes, and write nothing")
    output.add_argument("--log_every", type=positive, default=10, help="steps between log lines (default: %(default)s)")
    output.add_argument("--trackers", metavar="A[,B]", help="log to these too: tensorboard")
    common.add_machine_arguments(parser)
    return parser


def parse_arguments():
    """Return (args, task, settings): the command line over the task's defaults, and what tells two runs apart."""
    parser = build_parser()
    args, task = common.parse_arguments(parser, default="demo")
    if args.eval_every != "epoch" and not (args.eval_every.isdecimal() and int(args.eval_every)):
        raise BadInput(f"--eval_every {args.eval_every}: neither epoch nor a number of steps", "Write epoch, or 500.")
    if not 0 < args.epochs <= 1e6:
        raise BadInput(f"--epochs {args.epochs}: not above 0 and up to a million", "Give a number such as 3 or 0.5.")
    if args.seed >= 2**32:
        raise BadInput(f"--seed {args.seed}: NumPy's limit is 2**32 - 1", "Give a smaller one.")
    if (task.is_regression or task.is_multi_label) and (args.label_smoothing or args.class_weights != "none"):
        raise BadInput("--label_smoothing and --class_weights are for tasks with one class for each text", "Drop them.")
    settings = {name: value for name, value in vars(args).items() if name not in BOOKKEEPING}
    if not args.output_dir:
        given = {name: value for name, value in settings.items() if value != parser.get_default(name)}
        args.output_dir = str(Path("runs", run_name(task.name, given)))
    of_task = ("text", "label", "labels", "problem", "metrics", "max_length", "truncate", "splits", "split", "limit")
    return args, task, {**settings, **{key: getattr(task, key) for key in of_task}, "model": args.model or task.model}


def run_name(name, given):
    """Return the folder name of a run: the task, then the settings that were given and differ from the task's own."""
    words = [name]
    for key, value in given.items():
        if key not in ("dataset", "train_file", "validation_file", "test_file"):
            value = "+".join(map(str, value)) if isinstance(value, list) else str(value).replace(",", "+")
            words.append(f"{key}={Path(value).name}")  # of a model, the last part of its name
    name = ",".join(words)
    return name if len(name) <= 150 else f"{name[:140]},{batching.digest(name)[:8]}"  # a folder name has 255 bytes


def freeze(model, part):
    """Stop the gradients of a pretrained part: none, encoder, embeddings, or N (embeddings and the first N layers)."""
    encoder = model.base_model
    embeddings = [module for name, module in encoder.named_children() if "embed" in name]
    layers = next(
        (list(m) for m in encoder.modules() if isinstance(m, ModuleList) and len(m) == model.config.num_hidden_layers),
        [],
    )
    parts = {"none": [], "encoder": [encoder], "embeddings": embeddings}
    parts |= {str(number): embeddings + layers[:number] for number in range(1, len(layers) + 1)}
    if part not in parts:
        raise BadInput(f"--freeze {part}: no such part of this model", f"Parts: {', '.join(parts)}.")
    for module in parts[part]:
        module.requires_grad_(False)


def build_optimizer(model, args):
    """AdamW, fused where torch has it, without decay on biases and norm weights: on all that is no matrix."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, args.learning_rate, tuple(args.adam_betas), args.adam_epsilon, fused=True)


def build_scheduler(optimizer, args, total_steps):
    warmup_steps = math.ceil(args.warmup_ratio * total_steps) if args.warmup_steps is None else args.warmup_steps
    if warmup_steps > total_steps:
        log.warning(f"WARNING: the warm-up of {warmup_steps} steps is longer than the run of {total_steps}")
    return get_scheduler(args.scheduler, optimizer, warmup_steps, total_steps)


def read_interval(recent, batches, under_scaler):
    """Return [loss sum, examples, tokens, tokens with padding] of the steps in `recent`, over all processes; empty it.

    Called every few steps, not in each: reading a number from a GPU makes it wait. The sums are the same on all
    processes, so that all stop together: raises FloatingPointError, naming the first step whose loss or gradient is not
    finite. recent: a list of (step, gradient norm, [(micro-batch, its losses), ...]); batches: the plan.
    """
    sums, broken = np.zeros(4), []
    for step, grad_norm, losses_of_step in recent:
        for micro_batch, losses in losses_of_step:
            losses = losses.double().numpy(force=True)
            sums += [losses.sum(), micro_batch["examples"], micro_batch["tokens"], micro_batch["positions"]]
            wrong = ~np.isfinite(losses)
            if wrong.any():
                broken.append((step, "loss", float(losses[wrong][0]), micro_batch["ids"][wrong].tolist()))
        # Under a scaler (fp16) an infinite gradient is an overflow: that step is skipped, and all is well.
        if not (under_scaler or grad_norm.isfinite()):
            broken.append((step, "norm of the gradient", float(grad_norm), batches[step - 1].tolist()))
    recent.clear()
    everywhere = gather_object([(sums, broken)])
    broken = [found for _, of_process in everywhere for found in of_process]
    if broken:
        step, what, value, _ = min(broken, key=lambda found: found[:2])
        ids = sorted({example for found in broken if found[:2] == (step, what) for example in found[3]})
        raise FloatingPointError(
            f"step {step}: the {what} is {value}; training examples, from 0: {', '.join(map(str, ids))}\n"
            "Try a lower --learning_rate, --warmup_ratio 0.1 or --mixed_precision no, and look at these examples."
        )
    return sum(sums for sums, _ in everywhere)


def score_split(task, model, examples, accelerator, batch_size, pad_token_id, majority):
    """Return common.evaluate of tokenised examples, the same on every process."""
    logits = batching.all_logits(model, examples, accelerator, batch_size, pad_token_id)
    return common.evaluate(task, logits, batching.array_of(examples, "label"), majority)


def main():
    args, task, settings = parse_arguments()
    folder = Path(args.output_dir)
    trackers = report.tracker_names(args.trackers)
    accelerator = common.start(args, log_with=None if args.dry_run else trackers, project_dir=folder)

    # The data, and the folder: is this run there already, or something else?
    task, splits, fingerprints, bad_rows = common.load_data(task, args)
    tests = [name for name in splits if name.startswith("test")]
    common.check_splits(task, splits, ["train", *((tests or ["test"]) if args.final_test else [])])
    splits = {name: rows for name, rows in splits.items() if args.final_test or name not in tests}
    finished = None if args.dry_run else checkpoint.look_at(folder, settings, fingerprints, args.overwrite)
    if finished:
        report.already_complete(folder, finished, args.final_test)
        return common.finish(accelerator)

    # Model and tokens. The same seed gives every process the same new head.
    set_seed(args.seed)
    model, tokenizer, facts = common.load_model(args.model or task.model, task, args.refresh)
    task, examples = batching.tokenize_splits(task, splits, fingerprints, model, tokenizer)
    padding = tokenizer.pad_token_id

    # The plan: the same global batches whatever the number of processes. Each process loads its share of them.
    steps_per_epoch = math.ceil(len(examples["train"]) / args.batch_size)
    total_steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
    eval_every = steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)
    batches = whole_plan = batching.plan(len(examples["train"]), args.batch_size, args.seed, total_steps)
    micro_batch_size = args.micro_batch_size or args.batch_size
    data = report.describe_data(task, splits, examples, batches, micro_batch_size, accelerator, tokenizer)

    labels = batching.array_of(examples["train"], "label")
    majority = common.majority(task, labels)
    scoring = (accelerator, args.eval_batch_size, padding, majority)

    # What is scored at each evaluation; the first split chooses the best model.
    validation_splits = [name for name in splits if name.startswith("validation")]
    evaluated = {name: examples[name] for name in validation_splits}
    if args.eval_train_rows:
        evaluated["train"] = batching.sample(examples["train"], args.eval_train_rows)
    if args.dry_run:  # the same loop for a few steps, and one batch of each evaluation
        batches, args.log_every = batches[:DRY_RUN_STEPS], 1
        evaluated = {name: batching.sample(rows, args.eval_batch_size) for name, rows in evaluated.items()}
    loader = batching.step_loader(examples["train"], batches, accelerator, micro_batch_size, padding, args.num_workers)

    # Model and optimiser are prepared; the schedule is not: accelerate would step it once per process.
    masks = common.counted_dropout(model, args.seed)
    freeze(model, args.freeze)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = build_optimizer(model, args)
    scheduler = build_scheduler(optimizer, args, total_steps)
    model, optimizer = accelerator.prepare(model, optimizer)
    plain_model = accelerator.unwrap_model(model)  # evaluated without DDP, whose forward waits for other processes
    is_weighted = args.class_weights == "balanced"
    class_weights = common.balanced_weights(task, labels).to(accelerator.device) if is_weighted else None

    scratch = tempfile.TemporaryDirectory(prefix="dry-run-") if args.dry_run else nullcontext()
    folder = Path(scratch.name) if args.dry_run else folder
    accelerator.wait_for_everyone()  # every process has looked at the folder before one of them writes
    if accelerator.is_main_process:
        checkpoint.begin(folder, settings, fingerprints)
        common.write_bad_rows(folder, bad_rows)
    accelerator.wait_for_everyone()
    with scratch, checkpoint.failure_noted(folder):
        accelerator.init_trackers("tensorboard")
        progress = report.Progress(accelerator, folder, total_steps, steps_per_epoch)
        best_step, best_score, evaluations_since_best, recent = None, None, 0, []

        # Now we train.
        model.train()
        for step, (batch, micro_batches) in enumerate(zip(batches, loader, strict=True), start=1):
            losses_of_step = []
            for number, micro_batch in enumerate(micro_batches, start=1):
                inputs, labels = send_to_device((micro_batch["inputs"], micro_batch["labels"]), accelerator.device)
                masks.begin(step, micro_batch["ids"], accelerator.device)
                # The processes add up their gradients once in a step, with the last micro-batch.
                with nullcontext() if number == len(micro_batches) else accelerator.no_sync(model):
                    logits = model(**inputs).logits
                    losses = common.example_losses(task, logits, labels, args.label_smoothing, class_weights)
                    losses = losses * micro_batch["weight"]  # 0 where this process has no example in the step
                    # The mean over the examples of the whole step. DDP averages over processes, hence the factor.
                    accelerator.backward(losses.sum() / len(batch) * accelerator.num_processes)
                losses_of_step.append((micro_batch, losses.detach()))
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
            learning_rate = scheduler.get_last_lr()[0]
            if accelerator.scaler is None:  # a step whose gradient is not finite changes nothing, as under a scaler
                optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            recent.append((step, grad_norm, losses_of_step))

            due = progress.has_timed_enough() if args.dry_run else step % eval_every == 0
            evaluates = due or step == len(batches)
            if evaluates or step % args.log_every == 0:
                sums = read_interval(recent, batches, under_scaler=accelerator.scaler is not None)
                progress.train(step, sums, learning_rate, grad_norm)
            if not evaluates:
                continue

            # Evaluate, and keep the best. Every process has all logits, so that all decide alike.
            evaluations = {name: score_split(task, plain_model, rows, *scoring) for name, rows in evaluated.items()}
            score = evaluations[validation_splits[0]]["scores"][task.metrics[0]]
            evaluations_since_best += 1
            if best_step is None or common.is_better(task, score, best_score):
                best_step, best_score, best_evaluations, evaluations_since_best = step, score, evaluations, 0
                if accelerator.is_main_process:
                    checkpoint.save_best(folder, step, plain_model)
            progress.evaluation(step, learning_rate, evaluations, is_best=best_step == step)
            if args.dry_run:
                break
            if args.early_stopping_patience and evaluations_since_best >= args.early_stopping_patience:
                log.info(f"no better {task.metrics[0]} in {evaluations_since_best} evaluations: stopping early")
                break
        progress.close()
        if args.dry_run:
            whole = (whole_plan, examples, validation_splits)
            report.describe_run(task, args, accelerator, plain_model, *whole, progress, micro_batch)
            return common.finish(accelerator, model, optimizer)

        # The best model: tested once, written once.
        accelerator.wait_for_everyone()
        checkpoint.load_best(folder, best_step, plain_model)
        for name in [name for name in splits if name.startswith("test")]:
            best_evaluations[name] = score_split(task, plain_model, examples[name], *scoring)
        results = {
            "task": task.name,
            "model": facts["model"],
            "model_commit": facts["commit"],
            "seed": args.seed,
            **progress.totals(),
            "best_step": best_step,
            "scores": {name: evaluation["scores"] for name, evaluation in best_evaluations.items()},
            "majority_baseline": {name: evaluation["majority"] for name, evaluation in best_evaluations.items()},
            "data": data,
            "settings": vars(args),
            **report.environment(accelerator),
        }
        if accelerator.is_main_process:
            card = report.model_card(task, results)
            checkpoint.write_model(folder, plain_model, tokenizer, task, fingerprints, majority, results, card)
        log.info(f"{report.summary(results)}\nmodel: {folder / 'model'}")
        for name, evaluation in best_evaluations.items():
            report.warn_of_collapse(task, name, evaluation)
        del loader, scheduler, plain_model
        common.finish(accelerator, model, optimizer)


if __name__ == "__main__":
    common.run(main)
