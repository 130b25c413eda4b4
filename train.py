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
from functools import partial
from pathlib import Path

import common
from classifier import processes
from classifier.data import writer
from classifier.data.labels import majority_prediction, with_thresholds
from classifier.files import digest
from classifier.messages import BadInput, log
from classifier.model.models import freeze, load_model
from classifier.model.packing import prepare_model

# What imports torch is imported in the functions: it takes seconds, and --help and a mistake are to come at once.

# What these say changes no result, or only where it is written: they neither name a run's folder nor tell runs apart.
BOOKKEEPING = {
    *("task", "output_dir", "overwrite", "final_test", "log_every", "num_workers", "trackers", "threads", "refresh"),
    *("resume", "save_every", "keep_checkpoints", "micro_batch_size", "eval_batch_size", "eval_train_rows"),
    *("gradient_checkpointing", "dry_run"),
}
DRY_RUN_STEPS = 50  # at most; a few seconds are enough


def positive_or_auto(word):
    return word if word == "auto" else common.positive_int(word)


def build_parser():
    parser = common.argument_parser(__doc__, data=True)
    amount, count, positive, share = (
        common.non_negative_float,
        common.non_negative_int,
        common.positive_int,
        common.fraction,
    )

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
    steps.add_argument(
        "--micro_batch_size", type=positive_or_auto, metavar="N|auto", help="examples at a time (default: the share)"
    )
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
    output.add_argument(
        "--resume", default="auto", metavar="auto|never|DIR", help="go on where this run, or DIR, was saved (auto)"
    )
    output.add_argument(
        "--save_every", default="epoch", metavar="epoch|N|Nm", help="or N steps, or minutes (default: epoch)"
    )
    output.add_argument("--keep_checkpoints", type=positive, default=2, metavar="N", help="and the best (default: 2)")
    output.add_argument("--dry_run", action="store_true", help="tell what the run takes, and write nothing")
    output.add_argument("--log_every", type=positive, default=10, help="steps between log lines (default: %(default)s)")
    output.add_argument("--trackers", metavar="A[,B]", help="log to these too: tensorboard, wandb, mlflow")
    common.add_machine_arguments(parser)
    return parser


def parse_arguments():
    """Return (args, task, settings): the command line over the task's defaults, and what tells two runs apart."""
    parser = build_parser()
    args, task = common.parse_arguments(parser, default="demo")
    if args.eval_every != "epoch" and not (args.eval_every.isdecimal() and int(args.eval_every)):
        raise BadInput(f"--eval_every {args.eval_every}: neither epoch nor a number of steps", "Write epoch, or 500.")
    if args.overwrite and args.resume != "auto":
        raise BadInput("--overwrite starts again, --resume goes on (or not)", "Give one of the two.")
    if not 0 < args.epochs <= 1e6:
        raise BadInput(f"--epochs {args.epochs}: not above 0 and up to a million", "Give a number such as 3 or 0.5.")
    if args.seed >= 2**32:
        raise BadInput(f"--seed {args.seed}: NumPy's limit is 2**32 - 1", "Give a smaller one.")
    if (task.is_regression or task.is_multi_label) and (args.label_smoothing or args.class_weights != "none"):
        raise BadInput("--label_smoothing and --class_weights are for tasks with one class for each text", "Drop them.")
    from classifier.files import sha256
    from classifier.training import preemption

    preemption.save_interval(args.save_every, steps_per_epoch=1)
    settings = {name: value for name, value in vars(args).items() if name not in BOOKKEEPING}
    if not args.output_dir:
        given = {name: value for name, value in settings.items() if value != parser.get_default(name)}
        args.output_dir = str(Path("runs", run_name(task.name, given)))
    of_task = ("text", "label", "labels", "problem", "metrics", "max_length", "truncate", "splits", "split", "limit")
    model = args.model or task.model
    if isinstance(model, dict):  # its vocabulary counts, not where the file lies
        model = {**model, "vocab": sha256(model["vocab"]) if Path(model["vocab"]).is_file() else None}
    return args, task, {**settings, **{key: getattr(task, key) for key in of_task}, "model": model}


def run_name(name, given):
    """Return the folder name of a run: the task, then the settings that were given and differ from the task's own."""
    words = [name]
    for key, value in given.items():
        if key not in ("dataset", "train_file", "validation_file", "test_file"):
            value = "+".join(map(str, value)) if isinstance(value, list) else str(value).replace(",", "+")
            words.append(f"{key}={Path(value).name}")  # of a model, the last part of its name
    name = ",".join(words)
    return name if len(name) <= 150 else f"{name[:140]},{digest(name)[:8]}"  # a folder name has 255 bytes


def start(args):
    """Return (accelerator, watch): with the run's trackers; for signals that ask the run to end."""
    from classifier.training import preemption, progress

    trackers = progress.tracker_names(args.trackers)
    options = {} if args.dry_run else {"log_with": trackers, "project_dir": args.output_dir}
    accelerator = processes.start(args, **options)
    return accelerator, preemption.SignalWatch(accelerator)


def build_optimizer(model, args):
    """AdamW, fused where torch has it, without decay on biases and norm weights: on all that is no matrix."""
    from torch.optim import AdamW

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, args.learning_rate, tuple(args.adam_betas), args.adam_epsilon, fused=True)


def build_scheduler(optimizer, args, total_steps):
    from transformers import get_scheduler

    warmup_steps = math.ceil(args.warmup_ratio * total_steps) if args.warmup_steps is None else args.warmup_steps
    if warmup_steps > total_steps:
        log.warning(f"WARNING: the warm-up of {warmup_steps} steps is longer than the run of {total_steps}")
    return get_scheduler(args.scheduler, optimizer, warmup_steps, total_steps)


def choose_micro_batch_size(args, state, share, limit, probe):
    """Return how many examples a process computes at a time, of its share of a step.

    limit: half of what memory could not hold when this run was last tried, or None; probe() finds what it holds.
    """
    wanted = args.micro_batch_size or share
    if wanted == "auto":
        wanted = state.micro_batch_size or probe()
        log.info(f"micro-batches of {wanted} (--micro_batch_size auto)")
    return min(wanted, share, limit or share)


def score(splits, task, model, accelerator, batch_size, layout, majority, watch, thresholds_of=None):
    """Return (task, {split: common.evaluate}); of several labels, with thresholds that one of the splits chooses."""
    from classifier.data import cache
    from classifier.model import inference

    labels = {name: cache.column_array(examples, "label") for name, examples in splits.items()}
    given = (accelerator, batch_size, layout, watch)
    logits = {name: inference.compute_logits(model, examples, *given) for name, examples in splits.items()}
    if thresholds_of and task.is_multi_label:
        task = with_thresholds(task, logits[thresholds_of], labels[thresholds_of])
    return task, {name: common.score_logits(task, logits[name], labels[name], majority) for name in splits}


def main():
    args, task, settings = parse_arguments()
    from accelerate.utils import send_to_device, set_seed

    from classifier.data import cache
    from classifier.data.facts import log_data_facts
    from classifier.evaluation import report
    from classifier.model import inference, tokenization
    from classifier.training import batching, checkpoint, preemption, progress

    accelerator, watch = start(args)

    # The data, and the folder: is this run there already, or something else?
    task, splits, fingerprints, bad_rows = common.load_data(task, args)
    tests = [name for name in splits if name.startswith("test")]
    common.check_splits(task, splits, ["train", *((tests or ["test"]) if args.final_test else [])])
    splits = {name: rows for name, rows in splits.items() if args.final_test or name not in tests}
    settings["mixed_precision"] = accelerator.mixed_precision  # what "auto" has come to
    run = (Path(args.output_dir), settings, fingerprints, args.resume, args.overwrite)
    finished = None if args.dry_run else processes.on_main_process(accelerator, checkpoint.finished_results, *run)
    if finished:
        report.log_finished(run[0], finished, args.final_test)
        return processes.finish(accelerator)

    place = tempfile.TemporaryDirectory(prefix="dry-run-") if args.dry_run else nullcontext(args.output_dir)
    with place as name, checkpoint.hold(folder := Path(name), accelerator) as state:
        # Model and tokens. The same seed gives every process the same new head.
        set_seed(args.seed)
        model, tokenizer, facts = load_model(args.model or task.model, task, args.refresh)
        task, examples = tokenization.tokenize_splits(task, splits, fingerprints, model, tokenizer)
        labels = cache.column_array(examples["train"], "label")
        majority = majority_prediction(task, labels)

        # The plan: the same global batches whatever the number of processes.
        steps_per_epoch = math.ceil(len(examples["train"]) / args.batch_size)
        total_steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
        whole_plan = batching.make_plan(len(examples["train"]), args.batch_size, args.seed, total_steps)
        batches = whole_plan[:DRY_RUN_STEPS] if args.dry_run else whole_plan

        # Model and optimiser are prepared; the schedule is not: accelerate would step it once per process.
        layout = prepare_model(model, tokenizer, args.seed)
        freeze(model, args.freeze)
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = build_optimizer(model, args)
        scheduler = build_scheduler(optimizer, args, total_steps)
        model, optimizer = accelerator.prepare(model.train(), optimizer)
        plain_model = accelerator.unwrap_model(model)  # evaluated without DDP, whose forward waits for other processes
        is_weighted = args.class_weights == "balanced"
        class_weights = common.balanced_weights(task, labels).to(accelerator.device) if is_weighted else None

        # Go on where this run was saved, or begin. Each process loads its share of the steps that remain.
        path, limit = processes.on_main_process(accelerator, checkpoint.begin_or_resume, folder, *run[1:])
        training = (accelerator, state, plain_model, optimizer.optimizer, scheduler)
        checkpoint.load(path, *training)
        probe = partial(inference.largest_micro_batch, accelerator, plain_model, layout, examples["train"])
        share = math.ceil(args.batch_size / accelerator.num_processes)
        state.micro_batch_size = choose_micro_batch_size(args, state, share, limit, partial(probe, share))
        described = (task, splits, examples, batches, state.micro_batch_size, accelerator, tokenizer, layout)
        data = log_data_facts(*described)
        if args.freeze == "encoder" and not args.dry_run:  # it runs once over each split, not in each step
            layout, examples = common.features_of(plain_model, layout, examples, accelerator, args, state)

        # What is scored at each evaluation; the first split chooses the best model.
        scoring = (task, plain_model, accelerator, args.eval_batch_size, layout, majority, watch)
        eval_every = steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)
        validation_splits = [name for name in splits if name.startswith("validation")]
        evaluated = {name: examples[name] for name in validation_splits}
        if args.eval_train_rows:
            evaluated["train"] = batching.stratified_sample(examples["train"], args.eval_train_rows)
        if args.dry_run:  # the same loop for a few steps, and one batch of each evaluation
            args.log_every, eval_every = 1, DRY_RUN_STEPS
            evaluated = {
                name: batching.stratified_sample(rows, args.eval_batch_size) for name, rows in evaluated.items()
            }
        plan = (batches[state.step :], accelerator, state.micro_batch_size, layout, args.num_workers)
        loader = iter(batching.step_loader(examples["train"], *plan))
        progress = progress.Progress(accelerator, folder, state, total_steps, steps_per_epoch)
        if accelerator.is_main_process:
            writer.write_bad_rows(folder / "bad_rows.csv", bad_rows)
        progress.start_trackers(accelerator, folder, task.name, settings, state.step)

        def save():
            progress.read()
            is_saved = checkpoint.save(folder, *training, args.keep_checkpoints)
            progress.saved()
            return is_saved

        # Now we train. Between two steps the run is evaluated, saved, ended, or gone on with.
        with watch.training(save, preemption.save_interval(args.save_every, steps_per_epoch), state.step):
            while True:
                is_over = state.step == len(batches) or (args.dry_run and progress.has_timed_enough())
                saves = watch.look(state.step)
                if state.step > state.evaluated_step and (is_over or state.step % eval_every == 0):
                    # Every process has all logits, so that all decide alike.
                    _, evaluations = score(evaluated, *scoring)
                    score_now = evaluations[validation_splits[0]]["scores"][task.metrics[0]]
                    state.evaluated_step = state.step
                    state.evaluations_since_best += 1
                    is_best = state.best is None or common.is_better(task, score_now, state.best["score"])
                    if is_best:
                        checkpoint.record_best(state, score_now, evaluations)
                    progress.evaluation(evaluations, is_best)
                    saves = saves or is_best
                if saves:
                    save()
                if is_over or state.evaluations_since_best >= (args.early_stopping_patience or math.inf):
                    break

                batch, micro_batches, losses_of_step = batches[state.step], next(loader), []
                for number, micro_batch in enumerate(micro_batches, start=1):
                    inputs, labels = send_to_device((micro_batch["inputs"], micro_batch["labels"]), accelerator.device)
                    layout.begin(state.step + 1, micro_batch["ids"], micro_batch["lengths"], accelerator.device)
                    # The processes add up their gradients once in a step, with the last micro-batch.
                    with nullcontext() if number == len(micro_batches) else accelerator.no_sync(model):
                        logits = model(**inputs).logits
                        losses = common.example_losses(task, logits, labels, args.label_smoothing, class_weights)
                        losses = losses * micro_batch["weight"]  # 0 where this process has no example in the step
                        # The mean over the examples of the whole step. DDP averages over processes, hence the factor.
                        accelerator.backward(losses.sum() / len(batch) * accelerator.num_processes)
                    losses_of_step.append((micro_batch, losses.detach()))
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                state.learning_rate = scheduler.get_last_lr()[0]
                if accelerator.scaler is None:  # a gradient that is not finite changes nothing, as under a scaler
                    optimizer.optimizer.found_inf = (~grad_norm.isfinite()).float()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                state.step += 1
                progress.step(state.step, batch, grad_norm, losses_of_step)
                if state.step == len(batches) or 0 in (state.step % args.log_every, state.step % eval_every):
                    progress.line()
        progress.close()
        if args.dry_run:
            whole = (whole_plan, examples, validation_splits)
            progress.log_dry_run(task, args, accelerator, plain_model, layout, *whole, progress, micro_batch)
            return processes.finish(accelerator, model, optimizer)

        # The best model: scored once more, for all that the report tells, and written once.
        checkpoint.load_best(folder, state.best, plain_model)
        evaluated |= {name: examples[name] for name in splits if name.startswith("test")}
        task, of_best = score(evaluated, *scoring, thresholds_of=validation_splits[0])
        results = report.collect_results(args, task, facts, progress, of_best, data, accelerator)
        if accelerator.is_main_process:
            report.write_page(folder, task, results, of_best, splits, examples)
            card = report.model_card(task, results)
            checkpoint.write_model(folder, plain_model, tokenizer, task, fingerprints, majority, results, card)
        report.log_results(folder, task, results, of_best, progress)
        del loader, scheduler, plain_model, probe, save
        processes.finish(accelerator, model, optimizer)


if __name__ == "__main__":
    processes.run(main)
