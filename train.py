"""Fine-tune a text classifier: one explicit loop, the same on a CPU, a GPU, several GPUs, or a cluster.

    accelerate launch train.py --task mrpc                      # a GLUE task from the Hub
    accelerate launch train.py --train_file my.csv              # a file with the columns text and label
    python train.py                                             # the demo: no network, a minute on a CPU
    torchrun --nproc_per_node 2 train.py --task mrpc            # two processes: the same batches, the same numbers
    accelerate launch --config_file accelerate_configs/fp16.yaml train.py --task mrpc

Writes runs/TASK/ (--output_dir): model/ for evaluate.py, predict.py and transformers; metrics.jsonl, results.json and
state.json. Evaluates along the way and keeps the checkpoint with the best score by the task's first metric. Run the
same command again to resume a run that was interrupted.
"""

import math
import tempfile
from contextlib import closing, nullcontext
from pathlib import Path

import common
from classifier import processes
from classifier.data.cache import column_array
from classifier.data.facts import log_data_facts
from classifier.data.labels import majority_prediction, weights_of_classes
from classifier.data.writer import write_bad_rows
from classifier.evaluation.metrics import is_better
from classifier.files import run_name, sha256
from classifier.messages import BadInput
from classifier.training import recipe
from common import fraction, non_negative_float, non_negative_int, positive_fraction, positive_int, positive_int_or_auto

# What imports torch is imported inside the functions: it takes seconds, and --help and bad input are answered at once.

# Flags that do not affect results: ignored when naming a run's folder and when comparing runs.
BOOKKEEPING = {
    *("task", "output_dir", "overwrite", "final_test", "log_every", "num_workers", "trackers", "threads", "refresh"),
    *("resume", "save_every", "keep_checkpoints", "micro_batch_size", "eval_batch_size", "eval_train_rows"),
    *("gradient_checkpointing", "dry_run"),
}
DRY_RUN_STEPS = 50  # at most; a few seconds are enough


def build_parser():
    parser = common.argument_parser(__doc__, data=True)

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="ID|DIR", help="a pretrained encoder (default: the task's)")
    add(
        "--freeze", default="none", metavar="PART", help="none, encoder, embeddings, or N: these and the first N layers"
    )
    add("--gradient_checkpointing", action="store_true", help="recompute activations to save memory")

    add = parser.add_argument_group("steps").add_argument
    words = "auto: what small data need, for files of your own; plain: 3 epochs, batch size 32, learning rate 2e-05"
    add("--recipe", choices=["auto", "plain"], default="auto", help=words)
    add("--epochs", type=non_negative_float, help="passes over the training data (default: the recipe's)")
    add("--max_steps", type=positive_int, help="stop after this many optimiser steps (overrides --epochs)")
    add("--batch_size", type=positive_int, help="examples per step, over all processes (default: the recipe's)")
    words = "examples at a time in each process (default: all of its part)"
    add("--micro_batch_size", type=positive_int_or_auto, metavar="N|auto", help=words)
    add("--seed", type=non_negative_int, default=42, help="for new weights, order and dropout (default: 42)")
    add("--num_workers", type=non_negative_int, default=0, help="processes that load batches (default: 0)")

    add = parser.add_argument_group("optimiser").add_argument
    add("--learning_rate", type=non_negative_float, help="peak learning rate (default: the recipe's)")
    words = "each layer's learning rate, as a part of that of the layer above (default: 1.0)"
    add("--layerwise_lr_decay", type=positive_fraction, default=1.0, metavar="D", help=words)
    add("--weight_decay", type=non_negative_float, default=0.01, help="on matrices only (default: 0.01)")
    add("--adam_betas", type=fraction, nargs=2, default=[0.9, 0.999], metavar="B", help="(default: 0.9 0.999)")
    add("--adam_epsilon", type=non_negative_float, default=1e-8, help="(default: 1e-08)")
    add("--max_grad_norm", type=non_negative_float, default=1.0, help="0: no clipping (default: 1.0)")
    schedulers = ["linear", "cosine", "polynomial", "constant", "constant_with_warmup"]
    add("--scheduler", default="linear", choices=schedulers, help="learning rate schedule (default: linear)")
    add("--warmup_ratio", type=fraction, help="fraction of the steps (default: the recipe's)")
    add("--warmup_steps", type=non_negative_int, help="number of steps (overrides --warmup_ratio)")

    add = parser.add_argument_group("loss").add_argument
    add("--label_smoothing", type=fraction, default=0.0, help="(default: 0.0)")
    words = "balanced: by inverse frequency (default: none)"
    add("--class_weights", default="none", metavar="none|balanced|A=1,B=5", help=words)
    words = "above 0, examples that are nearly right count less; 2 is usual (default: 0.0)"
    add("--focal_gamma", type=non_negative_float, default=0.0, metavar="G", help=words)

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", default="epoch", metavar="epoch|N", help="each epoch, or N steps (default: epoch)")
    words = "stop after N evaluations without a better score"
    add("--early_stopping_patience", type=positive_int, metavar="N", help=words)
    add("--eval_train_rows", type=positive_int, metavar="N", help="also score N rows of train")
    add("--final_test", action="store_true", help="score the test split once, with the best model")
    words = "train on train and validation, with the thresholds and the temperature of this run, to its last step"
    add("--refit", metavar="RUN", help=words)

    add = parser.add_argument_group("output").add_argument
    add("--output_dir", metavar="DIR", help="(default: runs/TASK, plus the settings that differ)")
    add("--overwrite", action="store_true", help="replace a run in this folder")
    words = "resume this run, never, or another checkpoint (default: auto)"
    add("--resume", default="auto", metavar="auto|never|DIR", help=words)
    add(
        "--save_every", default="epoch", metavar="epoch|N|Nm", help="each epoch, or N steps or minutes (default: epoch)"
    )
    add("--keep_checkpoints", type=positive_int, default=2, metavar="N", help="besides the best (default: 2)")
    add("--dry_run", action="store_true", help="run a few steps, report what the whole run takes, write nothing")
    add("--log_every", type=positive_int, default=10, metavar="N", help="steps per line of metrics.jsonl (default: 10)")
    add("--trackers", metavar="A[,B]", help="also log to tensorboard, wandb, mlflow")
    common.add_machine_arguments(parser)
    return parser


def parse_arguments():
    """Return (args, task, settings). Flags override the task's defaults; settings are what tells two runs apart."""
    parser = build_parser()
    args, task = common.parse_arguments(parser, default="demo")
    if args.dry_run:
        args.log_every = 1  # its few steps are timed one by one
    if args.eval_every != "epoch" and not (args.eval_every.isdecimal() and int(args.eval_every)):
        raise BadInput(f"--eval_every {args.eval_every}: neither epoch nor a number of steps", "Write epoch, or 500.")
    if args.overwrite and args.resume != "auto":
        raise BadInput("--overwrite starts again, --resume resumes", "Give one of the two.")
    if args.epochs is not None and not 0 < args.epochs <= 1e6:
        raise BadInput(f"--epochs {args.epochs}: not above 0 and up to a million", "Give a number such as 3 or 0.5.")
    if args.seed >= 2**32:
        raise BadInput(f"--seed {args.seed}: NumPy's limit is 2**32 - 1", "Give a smaller one.")
    if args.refit and not Path(args.refit, "model", "task.json").is_file():
        raise BadInput(f"--refit {args.refit}: is no finished run", "Name the run whose settings proved good.")
    if task.is_regression and (args.focal_gamma or args.class_weights != "none"):
        raise BadInput("--class_weights and --focal_gamma are for labels, not for numbers", "Drop them.")
    if (task.is_regression or task.is_multi_label) and args.label_smoothing:
        raise BadInput("--label_smoothing is for tasks with one class for each text", "Drop it.")
    from classifier.training.preemption import save_interval

    save_interval(args.save_every, steps_per_epoch=1)
    named = {name: value for name, value in vars(args).items() if name not in BOOKKEEPING}
    if recipe.is_plain(args, task):
        recipe.fill_in(args, recipe.PLAIN)
    settings = {name: vars(args)[name] for name in named}
    if not args.output_dir:
        changed = {name: value for name, value in named.items() if value != parser.get_default(name)}
        args.output_dir = str(Path("runs", run_name(task.name, changed)))
    task_keys = ("text", "label", "labels", "problem", "metrics", "max_length", "truncate", "splits", "split", "limit")
    model = args.model or task.model
    if isinstance(model, dict):  # the content of its vocabulary counts, not the path
        model = {**model, "vocab": sha256(model["vocab"]) if Path(model["vocab"]).is_file() else None}
    return args, task, {**settings, **{key: getattr(task, key) for key in task_keys}, "model": model}


def load_splits(task, args):
    """Return (task, splits, fingerprints, bad_rows) of common.load_data, without test splits unless they get scored."""
    task, splits, fingerprints, bad_rows = common.load_data(task, args)
    test_splits = [name for name in splits if name.startswith("test")]
    common.check_splits(task, splits, ["train", *((test_splits or ["test"]) if args.final_test else [])])
    splits = {name: rows for name, rows in splits.items() if args.final_test or name not in test_splits}
    if args.refit:
        splits, fingerprints = join_validation(splits, fingerprints)
    return task, splits, fingerprints, bad_rows


def join_validation(splits, fingerprints):
    """Return (splits, fingerprints) with the validation splits as a part of train."""
    from datasets import concatenate_datasets

    names = [name for name in splits if name == "train" or name.startswith("validation")]
    others = {name: rows for name, rows in splits.items() if name not in names}
    train = concatenate_datasets([splits[name] for name in names])
    fingerprints = {**fingerprints, "train": "+".join(fingerprints[name] for name in names)}
    return {"train": train, **others}, {name: fingerprints[name] for name in ("train", *others)}


def splits_to_evaluate(args, examples):
    """Return {split: examples} to score at each evaluation. The first, a validation split, chooses the model."""
    from classifier.training.batching import stratified_sample

    evaluated = {name: rows for name, rows in examples.items() if name.startswith("validation")}
    if args.eval_train_rows or args.refit:
        evaluated["train"] = stratified_sample(examples["train"], args.eval_train_rows or len(examples["train"]))
    if args.dry_run:  # one batch of each
        evaluated = {name: stratified_sample(rows, args.eval_batch_size) for name, rows in evaluated.items()}
    return evaluated


def steps_between_evaluations(args, steps_per_epoch):
    """Return --eval_every in steps. A dry run evaluates once, at its end, and so does a refit: it chooses nothing."""
    if args.dry_run or args.refit:
        return DRY_RUN_STEPS if args.dry_run else 10**9
    return steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)


def main():
    args, task, settings = parse_arguments()
    from accelerate.utils import send_to_device, set_seed

    from classifier.evaluation import report
    from classifier.model import inference, models, packing, tokenization
    from classifier.training import batching, checkpoint, run_folder
    from classifier.training.optimizer import build_optimizer, build_scheduler, may_step
    from classifier.training.preemption import SignalWatch, save_interval
    from classifier.training.progress import Progress, log_dry_run, start_trackers, tracker_names

    accelerator = processes.start(args, log_with=tracker_names(args), project_dir=args.output_dir)
    signals = SignalWatch(accelerator)

    # --- the data; a finished run is only reported, a folder with something else is refused
    task, splits, fingerprints, bad_rows = load_splits(task, args)
    settings["mixed_precision"] = accelerator.mixed_precision  # what "auto" resolved to
    if not args.dry_run:
        folder = Path(args.output_dir)
        finished = processes.on_main_process(
            accelerator, run_folder.finished_results, folder, settings, fingerprints, args.resume, args.overwrite
        )
        if finished:
            report.log_finished(folder, finished, args.final_test)
            return accelerator

    state = checkpoint.State()
    scratch = tempfile.TemporaryDirectory(prefix="dry-run-") if args.dry_run else nullcontext(args.output_dir)
    with scratch as place, run_folder.hold(Path(place), accelerator, state) as folder:
        # --- model and tokenised splits (the same seed gives every process the same new head)
        set_seed(args.seed)
        model, tokenizer, model_facts = models.load_model(args.model or task.model, task, args.refresh)
        task, examples = tokenization.tokenize_splits(task, splits, fingerprints, model, tokenizer)
        recipe.choose(args, model, len(examples["train"]))
        train_labels = column_array(examples["train"], "label")
        majority = majority_prediction(task, train_labels)

        # --- the plan: the examples of every step, the same for any number of processes
        steps_per_epoch = math.ceil(len(examples["train"]) / args.batch_size)
        total_steps = args.max_steps or math.ceil(args.epochs * steps_per_epoch)
        whole_plan = batching.make_plan(len(examples["train"]), args.batch_size, args.seed, total_steps)
        plan = whole_plan[:DRY_RUN_STEPS] if args.dry_run else whole_plan

        # --- model and optimiser get prepared; the schedule does not, since accelerate would step it once per process
        packer = packing.prepare_model(model, tokenizer, args.seed)
        models.freeze(model, args.freeze)
        if args.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model = accelerator.prepare(model.train())  # before the optimiser: some devices replace the parameters
        plain_model = accelerator.unwrap_model(model)  # for evaluation: DDP's forward waits for the other processes
        packing.check_on_device(plain_model, packer, accelerator)
        plain_optimizer = build_optimizer(plain_model, args)
        scheduler = build_scheduler(plain_optimizer, args, total_steps)
        optimizer = accelerator.prepare(plain_optimizer)
        class_weights = weights_of_classes(args.class_weights, task, train_labels, accelerator.device)
        loss_options = (args.label_smoothing, class_weights, args.focal_gamma)

        # --- resume from the last checkpoint, or begin
        path, limit = processes.on_main_process(
            accelerator, checkpoint.begin_or_resume, folder, settings, fingerprints, args.resume, args.overwrite
        )
        checkpoint.load(path, accelerator, state, plain_model, plain_optimizer, scheduler)
        size = inference.choose_micro_batch_size(
            args, state, limit, accelerator, plain_model, packer, examples["train"]
        )
        padding = batching.padding_fraction(examples["train"], plan[:steps_per_epoch], accelerator, size, packer)
        data_facts = log_data_facts(task, splits, examples, tokenizer, padding)
        if args.freeze == "encoder":  # run it once over each split and train on its features
            packer, examples = inference.features_of_splits(plain_model, packer, examples, accelerator, args, state)
        steps = batching.load_steps(examples["train"], plan[state.step :], accelerator, size, packer, args.num_workers)

        # --- what happens between two steps
        evaluated = splits_to_evaluate(args, examples)
        choosing_split = next(iter(evaluated))
        eval_every = steps_between_evaluations(args, steps_per_epoch)
        progress = Progress(accelerator, folder, state, total_steps, steps_per_epoch)
        if accelerator.is_main_process:
            write_bad_rows(folder / "bad_rows.csv", bad_rows)
        start_trackers(accelerator, folder, task.name, settings, state.step)

        def compute_logits(rows):  # on every process, so that all make the same decisions
            return inference.compute_logits(plain_model, rows, accelerator, args.eval_batch_size, packer, signals)

        def save():
            with progress.saving():
                return checkpoint.save(
                    folder, accelerator, state, plain_model, plain_optimizer, scheduler, args.keep_checkpoints
                )

        # Now we train. When a signal asks the run to end, poll() raises on all processes and save() is called.
        with signals.training(save, save_interval(args.save_every, steps_per_epoch), state.step), closing(steps):
            while True:
                # --- between two steps: evaluate and save where due, or end
                is_last = state.step == len(plan) or (args.dry_run and progress.has_timed_enough())
                save_is_due = signals.poll(state.step)
                # evaluated_step lags behind step, so that a run killed during an evaluation repeats it.
                if state.step > state.evaluated_step and (is_last or state.step % eval_every == 0):
                    evaluations = common.score_splits(task, evaluated, compute_logits, majority)
                    score_now = evaluations[choosing_split]["scores"][task.metrics[0]]
                    is_best = state.best is None or is_better(task.metrics[0], score_now, state.best["score"])
                    checkpoint.record_evaluation(state, score_now, evaluations, is_best)
                    progress.log_evaluation(evaluations, is_best)
                    save_is_due = save_is_due or is_best
                if save_is_due:
                    save()
                if is_last or state.evaluations_since_best >= (args.early_stopping_patience or math.inf):
                    break

                # --- one optimiser step: the examples of plan[state.step], in micro-batches
                batch, micro_batches, step_losses = plan[state.step], next(steps), []
                for number, micro_batch in enumerate(micro_batches, start=1):
                    inputs, labels = send_to_device((micro_batch["inputs"], micro_batch["labels"]), accelerator.device)
                    # Dropout masks are a function of the seed, the step (counted from 1) and the examples.
                    packer.set_batch(state.step + 1, micro_batch["ids"], micro_batch["lengths"], accelerator.device)
                    # Processes sum their gradients once per step, at the last micro-batch.
                    with nullcontext() if number == len(micro_batches) else accelerator.no_sync(model):
                        logits = model(**inputs).logits
                        losses = common.example_losses(task, logits, labels, *loss_options)
                        losses = losses * micro_batch["weight"]  # 0 where this process has no example in the step
                        # The mean over all examples of the step: DDP averages over processes, so multiply by them.
                        accelerator.backward(losses.sum() / len(batch) * accelerator.num_processes)
                    step_losses.append((micro_batch, losses.detach()))
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
                state.learning_rate = scheduler.get_last_lr()[0]
                # A step whose gradient is not finite changes nothing; a scaler sees to that itself.
                if accelerator.scaler or may_step(plain_optimizer, grad_norm):
                    optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                state.step += 1
                progress.record_step(state.step, batch, grad_norm, step_losses)
                if state.step == len(plan) or state.step % args.log_every == 0 or state.step % eval_every == 0:
                    progress.log_step()
        progress.close()
        if args.dry_run:
            log_dry_run(args, accelerator, plain_model, packer, whole_plan, examples, progress)
            return accelerator

        # --- the best model: scored once more for the report, then written
        checkpoint.load_best(folder, accelerator, state, plain_model, tokenizer, task, fingerprints)
        evaluated |= {name: rows for name, rows in examples.items() if name.startswith("test")}
        evaluations = common.score_splits(task, evaluated, compute_logits, majority)
        task, evaluations = common.fit_probabilities(task, evaluations, choosing_split, majority, args.refit)
        results = report.collect_results(args, task, model_facts, progress, evaluations, data_facts, accelerator)
        if accelerator.is_main_process:
            report.write_report(folder, task, results, evaluations, splits, examples)
            card = report.model_card(task, results)
            run_folder.write_model(folder, state, plain_model, tokenizer, task, fingerprints, majority, results, card)
        report.log_results(folder, task, results, evaluations, progress)
    return accelerator


if __name__ == "__main__":
    processes.run(main)
