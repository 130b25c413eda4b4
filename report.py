"""What a run tells while it goes: a progress bar or lines, metrics.jsonl, trackers, a row for every evaluation."""

import json
import math
import platform
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import gather_object
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

import facts
import metrics
from cache import write_text
from common import BadInput, example_losses, log, number_words, score_words

SECONDS_BETWEEN_LINES = 10


def clock(seconds):
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


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

    def step(self, step, ids, grad_norm, losses_of_step):
        """Note a step: its number, its examples, the gradient's norm, [(micro-batch, losses)] of this process."""
        self.recent.append((step, ids, grad_norm, losses_of_step))

    def read(self):
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

    def saved(self):
        """Note that what has passed since the last look went into saving."""
        self.state.save_seconds += self._seconds()

    def line(self):
        """Note the training since the line before; show it on the bar or, every few seconds, as a line."""
        self.read()
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
        self._note("train", step, values, "train", values)
        epoch, now = step / self.steps_per_epoch, time.monotonic()
        rate = f"lr {state.learning_rate:.2e}"
        self.bar.set_postfix_str(f"epoch {epoch:.2f}, loss {loss:.4f}, {rate}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (now - self.started) / step * (self.total_steps - step)
            log.info(
                f"step {step}/{self.total_steps}, epoch {epoch:.2f}, loss {loss:.4f}, {rate}, "
                f"{examples_per_second:.0f} examples/s, {clock(left)} left"
            )

    def evaluation(self, evaluations, is_best):
        """Note evaluations of splits, and show each as a row with the scores of the majority class beside its own."""
        state, step = self.state, self.state.step
        loss_sum, examples, *_ = state.since_evaluation
        state.since_evaluation = [0.0] * 4
        for split, evaluation in evaluations.items():
            loss, scores = evaluation["loss"], evaluation["scores"]
            name = "train_sample" if split == "train" else split  # "train loss" is that of the steps
            values = {"split": split, "loss": loss, "scores": scores}
            self._note("eval", step, values, name, {"loss": loss, **scores})
            log.info(
                f"epoch {step / self.steps_per_epoch:.2f}, step {step} | train loss {loss_sum / examples:.4f}, "
                f"{name} loss {loss:.4f}, lr {state.learning_rate:.2e} | {score_words(scores)} | "
                f"majority: {score_words(evaluation['majority'])} | {clock(time.monotonic() - self.started)}"
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

    def _note(self, kind, step, values, group, numbers):
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


def tracker_names(words):
    """Return the names in --trackers, or None. Raises BadInput for one that is unknown or not installed."""
    names = words.split(",") if words else []
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise BadInput(f"--trackers {name}: unknown", f"Known: {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in [tracker.value for tracker in get_available_trackers()]:
            raise BadInput(f"--trackers {name}: the package is not installed", f"pip install {name}")
    return names or None


def describe_data(task, splits, examples, batches, micro_batch_size, accelerator, tokenizer, layout):
    """Log the facts of the data, and what may be wrong with them; return the facts (see facts.data_facts)."""
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
    plan = (batches, micro_batch_size, accelerator.num_processes, special, layout.is_row)
    data = facts.data_facts(task, splits, examples, *plan)
    for name, of_split in data["splits"].items():
        log.info(f"{name}: {_split_words(task, of_split)}")
    if not layout.is_row:
        log.info(f"padding: {data['padding']:.1%} of what a step computes")
    for warning in _data_warnings(task, splits, data):
        log.warning(f"WARNING: {warning}")
    return data


def _split_words(task, of_split):
    """Return the facts of one split in words."""
    rows, tokens, labels = of_split["rows"], of_split["tokens"], list(of_split["labels"].items())
    if task.is_regression:
        words = ", ".join(f"{what} {value:.2f}" for what, value in labels)
    else:
        words = ", ".join(f"{label} {number:,} ({number / rows:.1%})" for label, number in labels[:10])
    return (
        f"{rows:,} rows | labels: {words} | tokens: median {tokens['median']:.0f}, 95 % up to {tokens['p95']:.0f}, "
        f"longest {tokens['longest']}; {of_split['truncated']:.1%} of the texts cut, {of_split['unknown']:.2%} of the "
        f"tokens unknown, {of_split['tokens_per_character']:.2f} a character"
    )


def _data_warnings(task, splits, data):
    """Yield in words what may be wrong with the data."""

    def example(split, row):
        return repr(" / ".join(splits[split][row][column] for column in task.text)[:80])

    of_train = data["splits"]["train"]
    if of_train["unknown"] > 0.2:
        chinese = facts.is_chinese(splits["train"][:1000][task.text[0]])
        better = "google-bert/bert-base-chinese" if chinese else "FacebookAI/xlm-roberta-base"
        unknown = f"{of_train['unknown']:.0%} OF THE TOKENS ARE UNKNOWN"
        yield f"THE TOKENIZER DOES NOT KNOW THIS LANGUAGE: {unknown}. The model cannot read them; try --model {better}"
    elif of_train["unknown"] > 0.01:
        yield f"{of_train['unknown']:.1%} of the tokens are unknown to the tokenizer: does the model fit the language?"
    for variants in data["label_variants"]:
        yield f"labels that differ only in case or blanks: {', '.join(map(repr, variants))}; one class each"
    for name, of_split in data["splits"].items():
        found = of_split["conflicts"]
        if found["texts"]:
            row = example(name, found["position"])
            yield f"{name}: {found['texts']} texts occur with different labels, such as {row}"
    for name, found in data["duplicates"].items():
        if found["rows"]:
            row = example(name, found["position"])
            words = f"{found['rows']} of {len(splits[name])} rows of {name} ({found['share']:.1%}) are in train too"
            yield f"{words}: its scores are too good by that; such as {row}"
    counts = {} if task.is_regression else of_train["labels"]
    few = [f"{label} ({number})" for label, number in counts.items() if number < facts.FEW]
    if few:
        yield f"classes with fewer than {facts.FEW} rows in train: {', '.join(few[:10])}"


def describe_run(task, args, accelerator, model, layout, plan, examples, validation_splits, progress, micro_batch):
    """Log what the whole run will take, after a few steps of it; on a GPU also how its numbers differ from a CPU's.

    plan: the global batches of the whole run; micro_batch: one that was trained on. The time is that of training and
    evaluating, without the start.
    """
    processes, steps = accelerator.num_processes, len(plan)
    of_process = math.ceil(args.batch_size / processes)
    micro_batch_size = min(progress.state.micro_batch_size, of_process)
    seconds, filled = np.sum(progress.intervals[len(progress.intervals) // 2 :], axis=0)  # the first steps warm up
    rate = filled / seconds
    lengths = facts.array_of(examples["train"], "length")
    training = facts.positions(lengths, plan, micro_batch_size, processes, layout.is_row) / rate
    every = progress.steps_per_epoch if args.eval_every == "epoch" else int(args.eval_every)
    evaluations = math.ceil(steps / every)
    tokens = sum(int(facts.array_of(examples[name], "length").sum()) for name in validation_splits)
    tokens += lengths.mean() * min(args.eval_train_rows or 0, len(lengths))
    # A forward pass alone takes a third of a training step; with a frozen encoder, whose features are computed once
    # for all epochs but not here, most of it. Once, the metrics are loaded.
    bound, part = ("at most ", 1) if args.freeze == "encoder" else ("", 1 / 3)
    evaluating = evaluations * tokens * part / rate + progress.state.evaluation_seconds
    whole, parts = clock(training + evaluating), f"{clock(training)} training, {clock(evaluating)} evaluating"
    saved = sum(file.stat().st_size for file in (progress.lines.parent / "checkpoints").rglob("*") if file.is_file())
    weights = sum(value.nbytes for value in model.state_dict().values())
    memory = facts.peak_memory(accelerator.device) / 2**30
    table = {
        "steps": f"{steps} of {args.batch_size}, {progress.steps_per_epoch} an epoch; {evaluations} evaluations",
        "batch": f"{args.batch_size} = {processes} process(es) x {of_process}, {micro_batch_size} at a time",
        "memory": f"{memory:.2f} GiB in each process; the longest texts may need more",
        "time": f"{bound}{whole} ({parts}), give or take 20 %",
        "files": f"{args.output_dir}/: model/ {weights / 1e6:.0f} MB, and until then up to "
        f"{args.keep_checkpoints + 2} checkpoints of {saved / 1e6:.0f} MB",
    }
    if accelerator.device.type != "cpu" and accelerator.is_main_process:
        table["check"] = _check_against_cpu(task, accelerator, model, layout, micro_batch)
    log.info("\n".join(f"{name:8}{words}" for name, words in table.items()))


def _check_against_cpu(task, accelerator, model, layout, micro_batch):
    """Return in words how far the device's numbers are from the CPU's; warn where that is too far."""

    def loss_of(logits, labels):
        return example_losses(task, logits, labels).mean()

    logits, gradients = facts.compare_with_cpu(model, layout, micro_batch, loss_of, accelerator.autocast())
    words = f"largest difference from fp32 on the CPU: logits {logits:.1e}, gradients {gradients:.1e}"
    tolerance = facts.TOLERANCE[accelerator.mixed_precision]
    if not (logits < tolerance and gradients < tolerance):  # NaN is not below anything, and no maximum
        log.warning(f"WARNING: {accelerator.device.type.upper()} COMPUTES OTHER NUMBERS THAN THE CPU: {words}")
    return words


def results(args, task, facts, progress, evaluations, data, accelerator):
    """Return the content of results.json; evaluations: of the best model, by split."""
    return {
        "task": task.name,
        "model": facts["model"],
        "model_commit": facts["commit"],
        "seed": args.seed,
        **progress.totals(),
        "best_step": progress.state.best["step"],
        "scores": {name: evaluation["scores"] for name, evaluation in evaluations.items()},
        "majority_baseline": {name: evaluation["majority"] for name, evaluation in evaluations.items()},
        "data": data,
        "settings": vars(args),
        **environment(accelerator),
    }


def summary(results):
    """Return the scores of a finished run as lines, each split's beside those of the majority class."""
    lines = [
        f"{results['steps']} steps in {clock(results['train_seconds'])}, "
        f"{results['train_examples_per_second']:.0f} examples/s; best at step {results['best_step']}"
    ]
    for split, scores in results["scores"].items():
        lines.append(f"{split}: {score_words(scores)} (majority: {score_words(results['majority_baseline'][split])})")
    return "\n".join(lines)


def already_complete(folder, results, final_test):
    """Log the scores of a run that is finished."""
    log.info(f"{folder}: already complete (--overwrite trains again)\n{summary(results)}")
    if final_test and not any(name.startswith("test") for name in results["scores"]):
        log.info(f"its test split was not scored: evaluate.py --model {folder} --split test")


def warn_of_collapse(task, split, evaluation):
    """Warn, loudly, of a model that has learnt nothing: one prediction for all, or not better than the majority."""
    metric, constant = task.metrics[0], evaluation["constant"]
    score, limit = evaluation["scores"][metric], evaluation["majority"][metric]
    if constant is not None:
        what = f"ON {split.upper()} THE MODEL PREDICTS THE SAME FOR EVERY EXAMPLE"
        if not task.is_multi_label:
            what += f": {constant if task.is_regression else task.labels[constant]!r}"
    elif limit is not None and not metrics.is_better(metric, score, limit):
        words = f"{metric} {number_words(score)} to {number_words(limit)}"
        what = f"ON {split.upper()} THE MODEL IS NO BETTER THAN THE MAJORITY CLASS ({words})"
    else:
        return
    log.warning(
        f"WARNING: {what}.\nIt has learnt nothing of use. What usually helps: a lower --learning_rate, "
        "--warmup_ratio 0.1, more --epochs, another --seed, --class_weights balanced; or the labels are wrong."
    )


def model_card(task, results):
    """Return the README.md of a model folder: what it is, its scores, and how to load it."""
    rows = []
    for split, scores in results["scores"].items():
        for name, score in scores.items():
            majority = results["majority_baseline"][split][name]
            rows.append(f"| {split} | {name} | {number_words(score)} | {number_words(majority)} |")
    table = "\n".join(rows)
    model = results["model"] if isinstance(results["model"], str) else "no checkpoint: trained from scratch"
    return f"""# {task.name}

A text classifier, fine-tuned from {model}{f" at commit {results['model_commit']}" if results["model_commit"] else ""}.

- Input: {" and ".join(task.text)}, up to {task.max_length} tokens.
- Output: {"a number" if task.is_regression else ", ".join(task.labels)}.
- Data: {task.source or task.dataset or ", ".join(task.files)}{f" ({task.licence})" if task.licence else ""}.
- Training: {results["train_examples"]} examples seen in {results["steps"]} steps, seed {results["seed"]}; the run's
  results.json holds the rest of the recipe.

| split | metric | score | majority class |
|---|---|---|---|
{table}

```python
from transformers import pipeline
classify = pipeline("text-classification", model="THIS_FOLDER")
print(classify("..."))
```
"""


def environment(accelerator):
    """Return the versions of Python and of the libraries that numbers depend on, and what they were computed on.

    As observed: `products` is the type of a product under autocast.
    """
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    device = accelerator.device
    one = torch.ones(1, 1, device=device)
    with accelerator.autocast():
        products = (one @ one).dtype
    return {
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "hardware": {
            "device": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "products": str(products).removeprefix("torch."),
            "gradient_scaler": accelerator.scaler is not None,
        },
    }
