"""What a run tells while it goes: a progress bar or lines, metrics.jsonl, trackers, a row for every evaluation."""

import json
import math
import platform
import sys
import time
from importlib.metadata import version

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import is_better, log, score_words

SECONDS_BETWEEN_LINES = 10


def clock(seconds):
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Progress:
    """Shows and notes the progress of one run, and adds up its times. Every process calls it; the main one writes."""

    def __init__(self, accelerator, folder, total_steps, steps_per_epoch):
        self.accelerator = accelerator
        self.lines = folder / "metrics.jsonl"
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.sums, self.sums_at_evaluation = np.zeros(4), np.zeros(4)  # as train.read_interval returns them
        self.train_seconds = 0.0  # without evaluating and saving
        self.started = self.last_line = self.last_read = time.monotonic()
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, unit="step", dynamic_ncols=True, disable=not on_terminal)
        self.redirect = logging_redirect_tqdm([log])
        if on_terminal:  # else a row of the table would break the bar
            self.redirect.__enter__()

    def train(self, step, sums, learning_rate, grad_norm):
        """Note the training since the line before; show it on the bar or, every few seconds, as a line.

        sums: [loss, examples, tokens, tokens with padding] since the line before, of all processes.
        """
        now = time.monotonic()
        seconds, self.last_read = now - self.last_read, now
        self.train_seconds += seconds
        self.sums += sums
        loss, examples_per_second, grad_norm = sums[0] / sums[1], sums[1] / seconds, float(grad_norm)
        values = {
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # an overflow in fp16
            "examples_per_second": round(examples_per_second, 2),
        }
        self._note("train", step, values)
        self._track("train", step, values)
        epoch = step / self.steps_per_epoch
        self.bar.set_postfix_str(f"epoch {epoch:.2f}, loss {loss:.4f}, lr {learning_rate:.2e}", refresh=False)
        self.bar.update(step - self.bar.n)
        if self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (now - self.started) / step * (self.total_steps - step)
            log.info(
                f"step {step}/{self.total_steps}, epoch {epoch:.2f}, loss {loss:.4f}, lr {learning_rate:.2e}, "
                f"{examples_per_second:.0f} examples/s, {clock(left)} left"
            )

    def evaluation(self, step, learning_rate, evaluations, baselines, is_best):
        """Note evaluations of splits, and show each as a row with the scores of the majority class beside its own."""
        loss_sum, examples, *_ = self.sums - self.sums_at_evaluation
        self.sums_at_evaluation = self.sums.copy()
        for split, evaluation in evaluations.items():
            loss, scores = evaluation["loss"], evaluation["scores"]
            self._note("eval", step, {"split": split, "loss": loss, "scores": scores})
            self._track(split, step, {"loss": loss, **scores})
            log.info(
                f"epoch {step / self.steps_per_epoch:.2f}, step {step} | train loss {loss_sum / examples:.4f}, "
                f"{split} loss {loss:.4f}, lr {learning_rate:.2e} | {score_words(scores)} | "
                f"majority: {score_words(baselines[split])} | {clock(time.monotonic() - self.started)}"
                f"{' | best' if is_best else ''}"
            )
        self.last_read = time.monotonic()

    def totals(self):
        """Return the times and sums of the whole training, by their names in results.json."""
        _, examples, tokens, positions = self.sums
        return {
            "train_seconds": self.train_seconds,
            "train_examples": int(examples),
            "train_examples_per_second": examples / self.train_seconds,
            "train_tokens_per_second": tokens / self.train_seconds,
            "padding_fraction": 1 - tokens / positions,
        }

    def _note(self, kind, step, values):
        line = {"type": kind, "step": step, "epoch": round(step / self.steps_per_epoch, 4), **values}
        if self.accelerator.is_main_process:
            with open(self.lines, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")

    def _track(self, group, step, values):
        self.accelerator.log({f"{group}/{k}": value for k, value in values.items() if value is not None}, step=step)

    def close(self):
        """Take the bar off the terminal."""
        if not self.bar.disable:
            self.redirect.__exit__(None, None, None)
        self.bar.close()


def summary(results):
    """Return the scores of a finished run as lines, each split's beside those of the majority class."""
    lines = [
        f"{results['steps']} steps in {clock(results['train_seconds'])}, "
        f"{results['train_examples_per_second']:.0f} examples/s; best at step {results['best_step']}"
    ]
    for split, scores in results["scores"].items():
        lines.append(f"{split}: {score_words(scores)} (majority: {score_words(results['majority_baseline'][split])})")
    return "\n".join(lines)


def warn_of_collapse(task, split, evaluation, baseline):
    """Warn, loudly, of a model that has learnt nothing: one prediction for all, or not better than the majority."""
    metric, predictions = task.metrics[0], evaluation["predictions"]
    score, limit = evaluation["scores"][metric], baseline[metric]
    if len(predictions) > 1 and (predictions == predictions[0]).all():
        value = predictions[0] if task.is_regression else task.labels[predictions[0]]
        what = f"ON {split.upper()} THE MODEL PREDICTS {value!r} FOR EVERY EXAMPLE"
    elif limit is not None and not is_better(task, score, limit):
        words = "undefined" if score is None else f"{score:.4f}"
        what = f"ON {split.upper()} THE MODEL IS NO BETTER THAN THE MAJORITY CLASS ({metric} {words} to {limit:.4f})"
    else:
        return
    log.warning(
        f"WARNING: {what}.\nIt has learnt nothing of use. What usually helps: a lower --learning_rate, "
        "--warmup_ratio 0.1, more --epochs, another --seed, --class_weights balanced; or the labels are wrong."
    )


def model_card(task, results):
    """Return the README.md of a model folder: what it is, its scores, and how to load it."""
    rows = "\n".join(
        f"| {split} | {name} | {'undefined' if value is None else f'{value:.4f}'} | "
        + ("undefined |" if (base := results["majority_baseline"][split][name]) is None else f"{base:.4f} |")
        for split, scores in results["scores"].items()
        for name, value in scores.items()
    )
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
{rows}

```python
from transformers import pipeline
classify = pipeline("text-classification", model="THIS_FOLDER")
print(classify("..."))
```
"""


def versions():
    """Return the versions of Python and of the libraries that numbers depend on."""
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def machine(accelerator):
    """Return what the numbers were computed on, as observed: `products` is the type of a product under autocast."""
    device = accelerator.device
    one = torch.ones(1, 1, device=device)
    with accelerator.autocast():
        products = (one @ one).dtype
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "products": str(products).removeprefix("torch."),
        "gradient_scaler": accelerator.scaler is not None,
    }
