"""The progress of a run: a bar or log lines, metrics.jsonl, trackers, the sums and times; what a dry run reports."""

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
from classifier.files import CannotWrite, write_text
from classifier.messages import BadInput, format_duration, format_scores, log
from classifier.model import inference
from classifier.training import batching

SECONDS_BETWEEN_LINES = 10


class Progress:
    """Logs the progress of one run, and adds up its sums and times. All processes call it, and the main one writes."""

    def __init__(self, accelerator, folder, state, total_steps, steps_per_epoch):
        self.accelerator = accelerator
        self.lines = folder / "metrics.jsonl"
        self.state = state  # a checkpoint.State: sums and times must survive a killed run
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.unwritten = ""  # lines for metrics.jsonl while another program has it open
        self.recent = []  # steps since the last sync: (step, ids, gradient norm, [(micro-batch, its losses)])
        self.grad_norm = math.nan
        self.intervals = []  # (seconds, tokens with padding)
        self.last_line = self.last_sync = time.perf_counter()
        self.started = self.last_sync - state.train_seconds - state.evaluation_seconds - state.save_seconds
        if accelerator.is_main_process and self.lines.exists():
            self._cut_back()
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=state.step, unit="step", dynamic_ncols=True, disable=not on_terminal)
        self.redirect = logging_redirect_tqdm([log])
        if on_terminal:  # log lines must not break the bar
            self.redirect.__enter__()

    def _cut_back(self):
        """Remove the lines after the checkpoint from metrics.jsonl: they will be written again."""
        kept = []
        for line in self.lines.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # truncated by a crash
                break
            if entry["step"] <= (self.state.step if entry["type"] == "train" else self.state.evaluated_step):
                kept.append(line)
        try:
            write_text(self.lines, "".join(f"{line}\n" for line in kept))
        except OSError as error:
            raise CannotWrite(self.lines, error) from None

    def record_step(self, step, ids, grad_norm, step_losses):
        """Record a step. ids: of the global batch; step_losses: [(micro-batch, losses)] of this process, tensors."""
        self.recent.append((step, ids, grad_norm, step_losses))

    def sync(self):
        """Add up the steps since the last call, over all processes.

        Called every few steps only, since reading a number makes a GPU wait. Raises FloatingPointError on all processes
        if a loss or gradient is not finite, naming the first such step.
        """
        # Step by step, so that a save between two steps does not change how the sums are rounded.
        sums, broken = np.zeros((len(self.recent), 4)), []
        for step_sums, (step, ids, grad_norm, step_losses) in zip(sums, self.recent, strict=True):
            for micro_batch, losses in step_losses:
                losses = losses.detach().cpu().float().numpy().astype(np.float64)  # Apple's GPUs have no float64
                step_sums += [losses.sum(), micro_batch["examples"], micro_batch["tokens"], micro_batch["positions"]]
                is_broken = ~np.isfinite(losses)
                if is_broken.any():
                    broken.append((step, "loss", float(losses[is_broken][0]), micro_batch["ids"][is_broken].tolist()))
            self.grad_norm = float(grad_norm)
            # With a scaler (fp16), an infinite gradient is an overflow: the scaler skips the step.
            if not math.isfinite(self.grad_norm) and self.accelerator.scaler:
                self.state.skipped_steps += 1
            elif not math.isfinite(self.grad_norm):
                broken.append((step, "norm of the gradient", self.grad_norm, ids.tolist()))
        everywhere = gather_object([(sums, broken)])
        self.recent.clear()
        if broken := [entry for _, entries in everywhere for entry in entries]:
            step, name, value, _ = min(broken, key=lambda entry: entry[:2])
            ids = sorted({example for entry in broken if entry[:2] == (step, name) for example in entry[3]})
            raise FloatingPointError(
                f"step {step}: the {name} is {value}; training examples, counted from 0: {', '.join(map(str, ids))}\n"
                "Try a lower --learning_rate, --warmup_ratio 0.1 or --mixed_precision no, and look at these examples."
            )
        state = self.state
        for step_sums in sum(sums for sums, _ in everywhere):
            state.sums = (state.sums + step_sums).tolist()
            state.since_line = (state.since_line + step_sums).tolist()
            state.since_evaluation = (state.since_evaluation + step_sums).tolist()
        seconds = self._seconds()
        state.line_seconds += seconds
        state.train_seconds += seconds

    def _seconds(self):
        """Return the seconds since the last call."""
        now = time.perf_counter()
        seconds, self.last_sync = max(now - self.last_sync, 1e-9), now
        return seconds

    @contextmanager
    def saving(self):
        """Count the time under `with` as saving, after a sync so that the state to save includes all steps."""
        self.sync()
        try:
            yield
        finally:
            self.state.save_seconds += self._seconds()

    def log_step(self):
        """Write the training since the last line to metrics.jsonl, and to the bar or, every few seconds, the log."""
        self.sync()
        state, step = self.state, self.state.step
        (loss_sum, examples, _, positions), seconds = state.since_line, state.line_seconds
        state.since_line, state.line_seconds = [0.0] * 4, 0.0
        self.intervals.append((seconds, positions))
        loss, examples_per_second = loss_sum / examples, examples / seconds
        values = {
            "loss": loss,
            "learning_rate": state.learning_rate,
            "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else None,  # None: overflow in fp16
            "examples_per_second": round(examples_per_second, 2),
        }
        self._log("train", step, values, "train", values)
        epoch, now = step / self.steps_per_epoch, time.perf_counter()
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
        """Write the evaluation of each split to metrics.jsonl and the log, next to the majority baseline's scores."""
        state, step = self.state, self.state.step
        loss_sum, examples, *_ = state.since_evaluation
        state.since_evaluation = [0.0] * 4
        for split, evaluation in evaluations.items():
            loss, scores = evaluation["loss"], evaluation["scores"]
            name = "train_sample" if split == "train" else split  # "train" is the loss of the steps
            values = {"split": split, "loss": loss, "scores": scores, "train_loss": loss_sum / examples}
            seconds = time.perf_counter() - self.started  # since the run began, without pauses between its starts
            values["seconds"] = round(seconds, 2)
            self._log("eval", step, values, name, {"loss": loss, **scores})
            log.info(
                f"epoch {step / self.steps_per_epoch:.2f}, step {step} | train loss {loss_sum / examples:.4f}, "
                f"{name} loss {loss:.4f}, lr {state.learning_rate:.2e} | {format_scores(scores)} | "
                f"majority: {format_scores(evaluation['majority'])} | {format_duration(seconds)}"
                f"{' | best' if is_best else ''}"
            )
        state.evaluation_seconds += self._seconds()

    def has_timed_enough(self):
        """Return whether a dry run can end, the same on all processes: after 5 seconds and 3 steps."""
        if self.accelerator.is_main_process and len(self.intervals) >= 3 and self.state.train_seconds >= 5:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def totals(self):
        """Return the times and sums of the training, by their names in results.json."""
        state = self.state
        _, examples, tokens, positions = state.sums
        return {
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
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
        """Append values to metrics.jsonl, and log the numbers that are not None to the trackers as GROUP/NAME."""
        if self.accelerator.is_main_process:
            line = {"type": kind, "step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
            self._write(json.dumps(line, allow_nan=False) + "\n")
        numbers = {f"{group}/{name}": number for name, number in numbers.items() if number is not None}
        self.accelerator.log(numbers, step=step)

    def _write(self, line):
        """Append a line to metrics.jsonl. Where that is refused, warn once, and keep it until the next one is written.

        Windows refuses while the file is open in Excel, for one. It is not found where the run's folder was renamed.
        """
        is_refused_again = bool(self.unwritten)
        self.unwritten += line
        try:
            with open(self.lines, "a", encoding="utf-8", newline="\n") as file:
                file.write(self.unwritten)
            self.unwritten = ""
        except (PermissionError, FileNotFoundError) as error:
            if not is_refused_again:
                reason = f"{self.lines} cannot be written ({error.strerror}). Is it open in another program?"
                log.warning(f"WARNING: {reason} Its lines are kept, and written once that is possible.")

    def close(self):
        """Close the bar, and write what metrics.jsonl could not take before."""
        if self.unwritten:
            self._write("")
        if not self.bar.disable:
            self.redirect.__exit__(None, None, None)
        self.bar.close()


def tracker_names(args):
    """Return the names in --trackers; None if there are none, or in a dry run.

    Raises BadInput for a tracker that is unknown or not installed.
    """
    names = args.trackers.split(",") if args.trackers else []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BadInput(f"--trackers {name}: unknown", f"Known: {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in [tracker.value for tracker in get_available_trackers()]:
            raise BadInput(f"--trackers {name}: the package is not installed", f"pip install {name}")
    return None if args.dry_run else names or None


def start_trackers(accelerator, folder, project, settings, step):
    """Start the trackers. Their files go into the run's folder, unless they write to a server.

    settings: {name: value}; step: the last one before a resume, 0 for a new run.
    """
    kinds = list(map(str, accelerator.log_with))
    if "mlflow" in kinds and "MLFLOW_TRACKING_URI" not in os.environ:
        os.environ["MLFLOW_TRACKING_URI"] = (folder / "mlruns").resolve().as_uri()
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    if "tensorboard" in kinds:  # hides the events that a killed run wrote after its checkpoint
        board = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        accelerator.log_with = [board if kind == "tensorboard" else kind for kind in kinds]
    options = {"wandb": {"dir": str(folder), "name": folder.name}, "mlflow": {"run_name": folder.name}}
    accelerator.init_trackers(project, init_kwargs=options)
    for tracker in accelerator.trackers:
        if tracker.name != "tensorboard":  # TensorBoard would show them as a second run
            tracker.store_init_configuration(settings)


def log_dry_run(args, accelerator, model, packer, plan, examples, progress):
    """Log what the full run will take, after a few steps of it; on a GPU, also how its numbers differ from a CPU's.

    plan: the global batches of the full run. The time is that of training and evaluation, without the start.
    """
    processes, steps = accelerator.num_processes, len(plan)
    examples_per_process = math.ceil(args.batch_size / processes)
    micro_batch_size = min(progress.state.micro_batch_size, examples_per_process)
    seconds, positions = np.sum(progress.intervals[len(progress.intervals) // 2 :], axis=0)  # the first steps warm up
    rate = positions / seconds  # tokens per second, padding included
    lengths = cache.column_array(examples["train"], "length")
    min_saving = batching.choose_min_saving(packer, accelerator.device)
    training = batching.padded_tokens(lengths, plan, processes, micro_batch_size, min_saving) / rate
    eval_every = progress.steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)
    evaluations = math.ceil(steps / eval_every)
    validation_splits = [split for name, split in examples.items() if name.startswith("validation")]
    tokens = sum(int(cache.column_array(split, "length").sum()) for split in validation_splits)
    tokens += lengths.mean() * min(args.eval_train_rows or 0, len(lengths))
    # A forward pass takes a third of a training step. With a frozen encoder it takes most of it, and the full run is
    # faster: it computes the encoder's features once. The time measured includes loading the metrics, once.
    bound, fraction = ("at most ", 1) if args.freeze == "encoder" else ("", 1 / 3)
    evaluating = evaluations * tokens * fraction / rate + progress.state.evaluation_seconds
    total = format_duration(training + evaluating)
    parts = f"{format_duration(training)} training, {format_duration(evaluating)} evaluating"
    saved = sum(file.stat().st_size for file in (progress.lines.parent / "checkpoints").rglob("*") if file.is_file())
    weights = sum(value.nbytes for value in model.state_dict().values())
    memory = inference.peak_memory(accelerator.device) / 2**30
    table = {
        "steps": f"{steps} of {args.batch_size}, {progress.steps_per_epoch} an epoch; {evaluations} evaluations",
        "batch": f"{args.batch_size} = {processes} process(es) x {examples_per_process}, {micro_batch_size} at a time",
        "memory": f"{memory:.2f} GiB in each process; the longest texts may need more",
        "time": f"{bound}{total} ({parts}), give or take 20 %",
        "files": f"{args.output_dir}/: model/ {weights / 1e6:.0f} MB, and until then up to "
        f"{args.keep_checkpoints + 2} checkpoints of {saved / 1e6:.0f} MB",
    }
    if accelerator.device.type != "cpu" and accelerator.is_main_process:
        table["check"] = _check_against_cpu(accelerator, model, packer, plan, examples, micro_batch_size)
    log.info("\n".join(f"{name:8}{text}" for name, text in table.items()))


def _check_against_cpu(accelerator, model, packer, plan, examples, micro_batch_size):
    """Return the difference of the device's numbers from the CPU's, as text, and warn if it is too large."""
    loader = batching.load_steps(examples["train"], plan[:1], accelerator, micro_batch_size, packer)
    micro_batch = next(iter(loader))[0]
    logits, gradients = inference.compare_with_cpu(model, packer, micro_batch, accelerator.autocast())
    text = f"largest difference from fp32 on the CPU: logits {logits:.1e}, gradients {gradients:.1e}"
    tolerance = inference.TOLERANCE[accelerator.mixed_precision]
    if not (logits < tolerance and gradients < tolerance):  # NaN is not below anything, and no maximum
        log.warning(f"WARNING: {accelerator.device.type.upper()} RESULTS DIFFER FROM THE CPU'S: {text}")
    return text
