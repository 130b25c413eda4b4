"""What a run tells while it goes: a progress bar or lines, metrics.jsonl, trackers, a row for every evaluation."""

import json
import math
import os
import sys
import time
from contextlib import contextmanager

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, TensorBoardTracker, get_available_trackers
from accelerate.utils import gather_object
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from classifier.data import cache
from classifier.files import write_text
from classifier.messages import BadInput, format_duration, format_scores, log
from classifier.model import inference
from classifier.training import batching

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Shows and notes the progress of one run, and adds up its times. Every process calls it; the main one writes."""

    def __init__(self, accelerator, folder, state, total_steps, steps_per_epoch):
        self.accelerator = accelerator
        self.lines = folder / "metrics.jsonl"
        self.state = state  # a checkpoint.State: what is added up here must outlive a killed run
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.recent = []  # of the steps since the last look: (step, ids, gradient norm, [(micro-batch, its losses)])
        self.grad_norm = math.nan
        self.intervals = []  # (seconds, tokens with padding)
        self.last_line = self.last_look = time.monotonic()
        self.started = self.last_look - state.train_seconds - state.evaluation_seconds - state.save_seconds
        if accelerator.is_main_process and self.lines.exists():
            self._cut_back()
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=state.step, unit="step", dynamic_ncols=True, disable=not on_terminal)
        self.redirect = logging_redirect_tqdm([log])
        if on_terminal:  # else a row of the table would break the bar
            self.redirect.__enter__()

    def _cut_back(self):
        """Take the lines out of metrics.jsonl that came after the checkpoint: they will be written again."""
        kept = []
        for line in self.lines.read_text(encoding="utf-8").splitlines():
            try:
                of_step = json.loads(line)
            except ValueError:  # cut off by a crash
                break
            if of_step["step"] <= (self.state.step if of_step["type"] == "train" else self.state.evaluated_step):
                kept.append(line)
        write_text(self.lines, "".join(f"{line}\n" for line in kept))

    def record_step(self, step, ids, grad_norm, losses_of_step):
        """Note a step: its number, its examples, the gradient's norm, [(micro-batch, losses)] of this process."""
        self.recent.append((step, ids, grad_norm, losses_of_step))

    def sync(self):
        """Add the steps since the last call up, over all processes.

        Called every few steps, not in each: reading a number from a GPU makes it wait. The sums are the same on all
        processes, so that all stop together: raises FloatingPointError, naming the first step whose loss or gradient is
        not finite.
        """
        # Step by step, not interval by interval: where a run is saved in between must not change how sums are rounded.
        sums, broken = np.zeros((len(self.recent), 4)), []
        for row, (step, ids, grad_norm, losses_of_step) in zip(sums, self.recent, strict=True):
            for micro_batch, losses in losses_of_step:
                losses = losses.double().numpy(force=True)
                row += [losses.sum(), micro_batch["examples"], micro_batch["tokens"], micro_batch["positions"]]
                wrong = ~np.isfinite(losses)
                if wrong.any():
                    broken.append((step, "loss", float(losses[wrong][0]), micro_batch["ids"][wrong].tolist()))
            self.grad_norm = float(grad_norm)
            # Under a scaler (fp16) an infinite gradient is an overflow: that step is skipped, and all is well.
            if not (self.accelerator.scaler or math.isfinite(self.grad_norm)):
                broken.append((step, "norm of the gradient", self.grad_norm, ids.tolist()))
        everywhere = gather_object([(sums, broken)])
        self.recent.clear()
        if broken := [found for _, of_process in everywhere for found in of_process]:
            step, what, value, _ = min(broken, key=lambda found: found[:2])
            ids = sorted({example for found in broken if found[:2] == (step, what) for example in found[3]})
            raise FloatingPointError(
                f"step {step}: the {what} is {value}; training examples, from 0: {', '.join(map(str, ids))}\n"
                "Try a lower --learning_rate, --warmup_ratio 0.1 or --mixed_precision no, and look at these examples."
            )
        state = self.state
        for of_step in sum(sums for sums, _ in everywhere):
            state.sums = (state.sums + of_step).tolist()
            state.since_line = (state.since_line + of_step).tolist()
            state.since_evaluation = (state.since_evaluation + of_step).tolist()
        seconds = self._seconds()
        state.line_seconds += seconds
        state.train_seconds += seconds

    def _seconds(self):
        """Return the time since the last call."""
        now = time.monotonic()
        seconds, self.last_look = now - self.last_look, now
        return seconds

    @contextmanager
    def saving(self):
        """Under `with`, time counts as saving; what is saved knows of all steps so far."""
        self.sync()
        try:
            yield
        finally:
            self.state.save_seconds += self._seconds()

    def log_step(self):
        """Note the training since the line before; show it on the bar or, every few seconds, as a line."""
        self.sync()
        state, step = self.state, self.state.step
        (loss_sum, examples, _, positions), seconds = state.since_line, state.line_seconds
        state.since_line, state.line_seconds = [0.0] * 4, 0.0
        self.intervals.append((seconds, positions))
        loss, examples_per_second = loss_sum / examples, examples / seconds
        values = {
            "loss": loss,
            "learning_rate": state.learning_rate,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,  # an overflow in fp16
            "examples_per_second": round(examples_per_second, 2),
        }
        self._log("train", step, values, "train", values)
        epoch, now = step / self.steps_per_epoch, time.monotonic()
        rate = f"lr {state.learning_rate:.2e}"
        self.bar.set_postfix_str(f"epoch {epoch:.2f}, loss {loss:.4f}, {rate}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (now - self.started) / step * (self.total_steps - step)
            log.info(
                f"step {step}/{self.total_steps}, epoch {epoch:.2f}, loss {loss:.4f}, {rate}, "
                f"{examples_per_second:.0f} examples/s, {format_duration(left)} left"
            )

    def log_evaluation(self, evaluations, is_best):
        """Note evaluations of splits, and show each as a row with the scores of the majority class beside its own."""
        state, step = self.state, self.state.step
        loss_sum, examples, *_ = state.since_evaluation
        state.since_evaluation = [0.0] * 4
        for split, evaluation in evaluations.items():
            loss, scores = evaluation["loss"], evaluation["scores"]
            name = "train_sample" if split == "train" else split  # "train loss" is that of the steps
            values = {"split": split, "loss": loss, "scores": scores, "train_loss": loss_sum / examples}
            values["seconds"] = round(time.monotonic() - self.started, 2)  # of the whole run until here
            self._log("eval", step, values, name, {"loss": loss, **scores})
            log.info(
                f"epoch {step / self.steps_per_epoch:.2f}, step {step} | train loss {loss_sum / examples:.4f}, "
                f"{name} loss {loss:.4f}, lr {state.learning_rate:.2e} | {format_scores(scores)} | "
                f"majority: {format_scores(evaluation['majority'])} | {format_duration(time.monotonic() - self.started)}"
                f"{' | best' if is_best else ''}"
            )
        state.evaluation_seconds += self._seconds()

    def has_timed_enough(self):
        """Return whether a dry run can end, the same on all processes: after 5 seconds, and 3 steps."""
        if self.accelerator.is_main_process and len(self.intervals) >= 3 and self.state.train_seconds >= 5:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def totals(self):
        """Return the times and sums of the whole training, by their names in results.json."""
        state = self.state
        _, examples, tokens, positions = state.sums
        return {
            "steps": state.step,
            "epochs": state.step / self.steps_per_epoch,
            "train_seconds": state.train_seconds,
            "evaluation_seconds": state.evaluation_seconds,
            "save_seconds": state.save_seconds,
            "train_examples": int(examples),
            "train_examples_per_second": examples / state.train_seconds,
            "train_tokens_per_second": tokens / state.train_seconds,
            "padding_fraction": 1 - tokens / positions,
        }

    def _log(self, kind, step, values, group, numbers):
        """Write values as a line of metrics.jsonl; tell the trackers the numbers that are not None, as GROUP/NAME."""
        if self.accelerator.is_main_process:
            line = {"type": kind, "step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
            with open(self.lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {f"{group}/{name}": number for name, number in numbers.items() if number is not None}
        self.accelerator.log(numbers, step=step)

    def close(self):
        """Take the bar off the terminal."""
        if not self.bar.disable:
            self.redirect.__exit__(None, None, None)
        self.bar.close()


def tracker_names(args):
    """Return the names in --trackers; None where there are none, and in a dry run. Raises BadInput for one that is unknown or not installed."""
    names = args.trackers.split(",") if args.trackers else []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BadInput(f"--trackers {name}: unknown", f"Known: {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in [tracker.value for tracker in get_available_trackers()]:
            raise BadInput(f"--trackers {name}: the package is not installed", f"pip install {name}")
    return None if args.dry_run else names or None


def start_trackers(accelerator, folder, project, settings, step):
    """Start the trackers of --trackers: their files go into the run's folder, unless they write to a server.

    settings: {name: value}, of the run; step: the one that a run goes on from, 0 for a new one.
    """
    kinds = list(map(str, accelerator.log_with))
    if "mlflow" in kinds and "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = (folder / "mlruns").resolve().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    if "tensorboard" in kinds:  # events after the step, of a run that was killed, are hidden
        board = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        accelerator.log_with = [board if kind == "tensorboard" else kind for kind in kinds]
    options = {"wandb": {"dir": str(folder), "name": folder.name}, "mlflow": {"run_name": folder.name}}
    accelerator.init_trackers(project, init_kwargs=options)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # which would make a second run of them
            tracker.store_init_configuration(settings)


def log_dry_run(args, accelerator, model, packer, plan, examples, progress):
    """Log what the whole run will take, after a few steps of it; on a GPU also how its numbers differ from a CPU's.

    plan: the global batches of the whole run. The time is that of training and evaluating, without the start.
    """
    processes, steps = accelerator.num_processes, len(plan)
    of_process = math.ceil(args.batch_size / processes)
    micro_batch_size = min(progress.state.micro_batch_size, of_process)
    seconds, filled = np.sum(progress.intervals[len(progress.intervals) // 2 :], axis=0)  # the first steps warm up
    rate = filled / seconds
    lengths = cache.column_array(examples["train"], "length")
    worth = batching.min_saving(packer, accelerator.device)
    training = batching.padded_tokens(lengths, plan, processes, micro_batch_size, worth) / rate
    every = progress.steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)
    evaluations = math.ceil(steps / every)
    validation = [rows for name, rows in examples.items() if name.startswith("validation")]
    tokens = sum(int(cache.column_array(rows, "length").sum()) for rows in validation)
    tokens += lengths.mean() * min(args.eval_train_rows or 0, len(lengths))
    # A forward pass alone takes a third of a training step; with a frozen encoder, whose features are computed once
    # for all epochs but not here, most of it. Once, the metrics are loaded.
    bound, part = ("at most ", 1) if args.freeze == "encoder" else ("", 1 / 3)
    evaluating = evaluations * tokens * part / rate + progress.state.evaluation_seconds
    whole = format_duration(training + evaluating)
    parts = f"{format_duration(training)} training, {format_duration(evaluating)} evaluating"
    saved = sum(file.stat().st_size for file in (progress.lines.parent / "checkpoints").rglob("*") if file.is_file())
    weights = sum(value.nbytes for value in model.state_dict().values())
    memory = inference.peak_memory(accelerator.device) / 2**30
    table = {
        "steps": f"{steps} of {args.batch_size}, {progress.steps_per_epoch} an epoch; {evaluations} evaluations",
        "batch": f"{args.batch_size} = {processes} process(es) x {of_process}, {micro_batch_size} at a time",
        "memory": f"{memory:.2f} GiB in each process; the longest texts may need more",
        "time": f"{bound}{whole} ({parts}), give or take 20 %",
        "files": f"{args.output_dir}/: model/ {weights / 1e6:.0f} MB, and until then up to "
        f"{args.keep_checkpoints + 2} checkpoints of {saved / 1e6:.0f} MB",
    }
    if accelerator.device.type != "cpu" and accelerator.is_main_process:
        table["check"] = _check_against_cpu(accelerator, model, packer, plan, examples, micro_batch_size)
    log.info("\n".join(f"{name:8}{words}" for name, words in table.items()))


def _check_against_cpu(accelerator, model, packer, plan, examples, micro_batch_size):
    """Return in words how far the device's numbers are from the CPU's; warn where that is too far."""
    micro_batch = next(iter(batching.step_loader(examples["train"], plan[:1], accelerator, micro_batch_size, packer)))[
        0
    ]
    logits, gradients = inference.compare_with_cpu(model, packer, micro_batch, accelerator.autocast())
    words = f"largest difference from fp32 on the CPU: logits {logits:.1e}, gradients {gradients:.1e}"
    tolerance = inference.TOLERANCE[accelerator.mixed_precision]
    if not (logits < tolerance and gradients < tolerance):  # NaN is not below anything, and no maximum
        log.warning(f"WARNING: {accelerator.device.type.upper()} COMPUTES OTHER NUMBERS THAN THE CPU: {words}")
    return words
