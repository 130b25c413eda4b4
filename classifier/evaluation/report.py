"""The results of a run: results.json, its summary in the log, the report page and the model card."""

import json
import platform
import re
from importlib.metadata import version

import torch

from classifier.data.cache import column_array
from classifier.data.facts import largest_first
from classifier.evaluation import analysis, intervals, metrics, selection
from classifier.messages import (
    MOST_NAMES,
    format_duration,
    format_name,
    format_score,
    format_scores,
    in_red,
    join_some,
    log,
)

# ------------------------------------------------------------------------------------------------------ results.json


def collect_results(args, task, model_facts, progress, evaluations, data_facts, accelerator):
    """Return the content of results.json. evaluations: {split: result of common.score_logits} of the best model."""
    return {
        "task": task.name,
        "model": model_facts["model"],
        "model_commit": model_facts["commit"],
        "seed": args.seed,
        **progress.totals(),
        "best_step": progress.state.best["step"],
        "trained_on": ["train", "validation"] if args.refit else ["train"],
        "examples": {name: len(evaluation["labels"]) for name, evaluation in evaluations.items()},
        "scores": {name: evaluation["scores"] for name, evaluation in evaluations.items()},
        "intervals": {
            name: intervals.score_intervals(task.metrics, evaluation["predictions"], evaluation["labels"])
            for name, evaluation in evaluations.items()
        },
        "no_interval": {
            name: intervals.missing_intervals(task.metrics, evaluation["predictions"], evaluation["labels"])
            for name, evaluation in evaluations.items()
        },
        **correct_scores(args, task, progress.state, evaluations),
        "majority_baseline": {name: evaluation["majority"] for name, evaluation in evaluations.items()},
        "data": data_facts,
        "settings": vars(args),
        **environment(accelerator),
    }


def correct_scores(args, task, state, evaluations):
    """Return what results.json says of the first split, whose rows chose: `choice`, corrected scores and intervals.

    `choice`: what was chosen by these rows, as text, empty if nothing was; the corrected scores are then the scores.
    """
    split, evaluation = next(iter(evaluations.items()))
    steps = sorted(state.candidates)
    if args.refit or state.best["step"] not in steps:  # nothing chosen; the run began before predictions were kept
        return {"choice": {}, "corrected_scores": {}, "corrected_intervals": {}}
    number = f"the best of {len(steps)} evaluations" if len(steps) > 1 else ""
    thresholds = "the labels' thresholds" if task.is_multi_label else ""
    scores, bounds = selection.corrected_scores(
        task, [state.candidates[step] for step in steps], evaluation["labels"], steps.index(state.best["step"])
    )
    return {
        "choice": {split: " and ".join(filter(None, [number, thresholds]))},
        "corrected_scores": {split: scores},
        "corrected_intervals": {split: bounds},
    }


def environment(accelerator):
    """Return the versions that numbers depend on, and the hardware and precision in use.

    `products` is observed, not configured: the dtype of a matrix product under autocast.
    """
    names = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy")
    device = accelerator.device
    matrix = torch.ones(1, 1, device=device)
    with accelerator.autocast():
        products = (matrix @ matrix).dtype
    return {
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "hardware": {
            "device": device.type,
            "name": device_name(device),
            "threads": torch.get_num_threads(),
            "products": str(products).removeprefix("torch."),
            "gradient_scaler": accelerator.scaler is not None,
        },
    }


def device_name(device):
    """Return the name of a device, such as NVIDIA H100 80GB HBM3; of a CPU its architecture."""
    if device.type == "mps":
        return torch.backends.mps.get_name()
    module = None if device.type == "cpu" else torch.get_device_module(device)
    return module.get_device_name(device) if hasattr(module, "get_device_name") else platform.machine()


# ----------------------------------------------------------------------------------------------------------- the log


SKIPPED_AT_FIRST = 5  # steps that fp16 may skip in any run


def log_results(folder, task, results, evaluations, progress):
    """Log the outcome of a run: first what is wrong with it, then the table of its epochs and its scores."""
    if progress.state.step < progress.total_steps:
        number = progress.state.evaluations_since_best
        log.info(f"no better {task.metrics[0]} in {number} evaluations: stopped early")
    if skipped := results["skipped_steps"]:
        message = f"{skipped} of {results['steps']} steps changed no weight: their gradients overflowed in fp16"
        if skipped <= SKIPPED_AT_FIRST:  # until the scale of the gradients is found
            log.info(message)
        else:
            log.warning(in_red(f"WARNING: {message}. Try a lower --learning_rate, or --mixed_precision no."))
    for name, evaluation in evaluations.items():
        if warning := collapse_warning(task, name, evaluation):
            log.warning(in_red(f"WARNING: {warning}"))
    lines = read_metric_lines(folder)
    if hint := overfitting_warning(lines):
        log.warning(f"WARNING: {hint}")
    log.info(
        f"{epoch_table(lines)}\n{format_results(results)}\nmodel: {folder / 'model'}, report: {folder / 'report.html'}"
    )


def log_finished(folder, results, final_test):
    """Log the scores of a run that had finished before."""
    log.info(f"{folder}: already complete (--overwrite trains again)\n{format_results(results)}")
    if final_test and not any(name.startswith("test") for name in results["scores"]):
        log.info(f"the test split was not scored. To score it: evaluate.py --model {folder} --split test")


def format_results(results):
    """Return the scores of a finished run as lines: each split's, the majority's, and 95 % intervals.

    Of the split that chose something, the scores corrected for the choice come first.
    """
    lines = [f"{_format_speed(results)}; best at step {results['best_step']}"]
    for split, scores in results["scores"].items():
        rows = f"{split}, {results['examples'][split]:,} examples" if "examples" in results else split
        majority = format_scores(results["majority_baseline"][split])
        choice, corrected, bounds = corrected_or_plain(results, split)
        if choice:
            lines += [
                f"{rows}: {format_scores(corrected)}, corrected for having chosen {choice} by these examples",
                f"{split}, on the examples that chose: {format_scores(scores)} (majority: {majority})",
            ]
        else:
            lines.append(f"{rows}: {format_scores(scores)} (majority: {majority})")
        bounds = intervals.format_intervals(bounds, results.get("no_interval", {}).get(split, {}))
        lines.append(f"{split}, 95 % intervals: {bounds}")
    return "\n".join([*lines, intervals.MEANING])


def corrected_or_plain(results, split):
    """Return (what the split's rows chose or "", scores, intervals): corrected for the choice where there was one."""
    if choice := results.get("choice", {}).get(split):
        return choice, results["corrected_scores"][split], results["corrected_intervals"][split]
    return "", results["scores"][split], results.get("intervals", {}).get(split, {})


def _format_speed(results):
    seconds, rate = results["train_seconds"], results["train_examples_per_second"]
    return f"{results['steps']} steps in {format_duration(seconds)}, {rate:.0f} examples/s"


def read_metric_lines(folder):
    """Return the lines of a run's metrics.jsonl; none if there is no such file."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def epoch_table(lines):
    """Return the evaluations in metrics.jsonl as lines of a table: losses, scores, and the time each epoch took."""
    rows, previous = [], 0.0
    lines = [line for line in lines if line["type"] == "eval"]
    names = list(lines[0]["scores"]) if lines else []
    for line in lines:
        # All splits of one evaluation come together: the first of them gets the time.
        seconds, previous = line["seconds"] - previous, line["seconds"]
        numbers = [line["train_loss"], line["loss"], *(line["scores"][name] for name in names)]
        rows.append([f"{line['epoch']:.2f}", line["split"], *map(format_score, numbers), format_duration(seconds)])
    rows = [["epoch", "split", "train loss", "loss", *names, "h:mm:ss"], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def overfitting_warning(lines):
    """Return a hint if the validation loss has risen since its lowest while the training loss fell, else None."""
    lines = [line for line in lines if line["type"] == "eval" and line["split"] != "train"]
    lines = [line for line in lines if line["split"] == lines[0]["split"]]
    lowest, last = min(lines, key=lambda line: line["loss"], default=None), lines[-1] if lines else None
    if not lines or last["loss"] <= 1.05 * lowest["loss"] or last["train_loss"] >= lowest["train_loss"]:
        return None
    return (
        f"{lowest['split']} loss rose from {lowest['loss']:.4f} (epoch {lowest['epoch']:.2f}) to {last['loss']:.4f} "
        "while the train loss fell: the model is overfitting. What usually helps: fewer --epochs, "
        "--early_stopping_patience 2, a lower --learning_rate, --weight_decay 0.1, more data."
    )


def collapse_warning(task, split, evaluation):
    """Return a warning if the model predicts the same for all examples or does not beat the majority, else None."""
    metric, constant = task.metrics[0], evaluation["constant"]
    score, majority = evaluation["scores"][metric], evaluation["majority"][metric]
    if constant is not None:
        symptom = f"ON {split.upper()} THE MODEL MAKES THE SAME PREDICTION FOR EVERY EXAMPLE"
        if not task.is_multi_label:
            symptom += f": {constant if task.is_regression else format_name(repr(task.labels[constant]))}"
    elif majority is not None and not metrics.is_better(metric, score, majority):
        scores = f"{metric} {format_score(score)}; majority class {format_score(majority)}"
        symptom = f"ON {split.upper()} THE MODEL IS NO BETTER THAN THE MAJORITY CLASS ({scores})"
    else:
        return None
    return (
        f"{symptom}.\nIt has learned nothing useful. What usually helps: a lower --learning_rate, --warmup_ratio 0.1, "
        "more --epochs, another --seed, --class_weights balanced. Or the labels are wrong."
    )


# --------------------------------------------------------------------------------------------------- the report page


def write_report(folder, task, results, evaluations, splits, examples):
    """Write report.html and plots/ of a run. Only warns if they cannot be written: the model still has to be."""
    from classifier.evaluation import page

    contents = []
    for split in [name for name in evaluations if name != "train"]:
        evaluation = evaluations[split]
        numbers, losses = analysis.worst_mistakes(evaluation)
        contents.append(
            {
                "split": split,
                "examples": len(evaluation["labels"]),
                "scores": evaluation["scores"],
                **dict(zip(("choice", "shown_scores", "intervals"), corrected_or_plain(results, split), strict=True)),
                "majority_baseline": evaluation["majority"],
                "no_interval": results["no_interval"][split],
                "warning": collapse_warning(task, split, evaluation),
                **analysis.analyse(task, evaluation, column_array(examples[split], "length"), {}),
                "mistakes": page.mistake_rows(task, splits[split], evaluation["logits"], numbers, losses),
            }
        )
    lines = read_metric_lines(folder)
    headline = {
        "title": task.name,
        "model": format_origin(results),
        "text": f"{_format_speed(results)}; best checkpoint at step {results['best_step']}",
        "hint": overfitting_warning(lines),
    }
    tables = {
        "Settings": results["settings"],
        "Data": {**results["data"], "source": task.source, "licence": task.licence},
        "Environment": {name: results[name] for name in ("num_processes", "mixed_precision", "versions", "hardware")},
    }
    try:
        page.write_page(folder, task, headline, contents, lines, tables)
    except Exception as error:  # of drawing, of the template, of the disk: none is worth a finished training
        reason = f"{folder}/report.html could not be written ({type(error).__name__}: {error})"
        log.warning(in_red(f"WARNING: {reason}; evaluate.py --model {folder} writes one for the validation split"))


def format_origin(results):
    """Return what a run started from, as text."""
    if not isinstance(results["model"], str):
        return "trained from scratch"
    commit = f" at commit {results['model_commit']}" if results["model_commit"] else ""
    return f"fine-tuned from {results['model']}{commit}"


# ---------------------------------------------------------------------------------------------------- the model card

RECIPE = ("epochs", "batch_size", "learning_rate", "scheduler", "weight_decay", "freeze", "class_weights")


def model_card(task, results):
    """Return the README.md of a model folder. results: the content of results.json."""
    settings = [f"{name} {results['settings'][name]}" for name in RECIPE]
    if results["settings"]["recipe"].startswith("small data"):  # many steps, as few rows need them
        settings.insert(0, "that of small data")
    return f"""---
{_card_metadata(task, results)}
---

# {task.name}

A text classifier, {format_origin(results)}.

- Input: {" and ".join(task.text)}, up to {task.max_length} tokens.
- Output: {_format_output(task)}.
- Data: {task.source or task.dataset or ", ".join(task.files)}{f" ({task.licence})" if task.licence else ""}.
- Recipe: {", ".join(settings)}, seed {results["seed"]}; {results["train_examples"]:,} examples seen in
  {results["steps"]:,} steps, {results["mixed_precision"] if results["mixed_precision"] != "no" else "fp32"}.

## Scores

| split | metric | score | 95 % interval | on the examples that chose | majority class |
|---|---|---|---|---|---|
{_format_score_rows(results)}

{_format_choice(results)}The intervals show how much a score would vary with other texts like these, not with another
seed.

## Limits

{_format_limits(task, results["data"]["splits"])}

## Use

```python
from transformers import pipeline
classify = pipeline("text-classification", model="THIS_FOLDER"{_pipeline_options(task)})
print(classify({'"..."' if len(task.text) == 1 else '{"text": "...", "text_pair": "..."}'}))
```
"""


def _card_metadata(task, results):
    """Return the YAML head of a model card, from which the Hub takes its filters and the scores that it shows."""
    from huggingface_hub import EvalResult, ModelCardData

    eval_results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=task.dataset["path"],
            dataset_name=task.name,
            dataset_config=task.dataset.get("name"),
            dataset_split=split,
            metric_type=metric,
            metric_value=score,
        )
        for split in results["scores"]
        for metric, score in corrected_or_plain(results, split)[1].items()
        if task.dataset and score is not None
    ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        metrics=task.metrics,
        base_model=results["model"] if isinstance(results["model"], str) else None,
        datasets=[task.dataset["path"]] if task.dataset else None,
        model_name=task.name if eval_results else None,
        eval_results=eval_results or None,
    ).to_yaml()


def _format_output(task):
    if task.is_regression:
        return "a number"
    number = "any number of" if task.is_multi_label else "one of"
    return f"{number} {join_some(map(_card_name, task.labels))}{_where_all_are(task, 'config.json')}"


def _card_name(name):
    """Return the name of a class as text of the card, in which no character is a mark of Markdown or HTML."""
    # An underscore inside a word is none: it stays as users know it.
    return re.sub(r"[\\`*\[\]<>|&~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", format_name(name))


def _where_all_are(task, file):
    return f" (`{file}` has all)" if len(task.labels) > MOST_NAMES else ""


def _format_score_rows(results):
    rows = []
    for split, scores in results["scores"].items():
        choice, corrected, found = corrected_or_plain(results, split)
        for name, score in scores.items():
            interval = intervals.format_intervals({name: found[name]}, results["no_interval"][split])
            numbers = format_score(corrected[name]), interval.removeprefix(f"{name} ")
            numbers += format_score(score) if choice else "", format_score(results["majority_baseline"][split][name])
            rows.append(f"| {split}, {results['examples'][split]:,} examples | {name} | {' | '.join(numbers)} |")
    return "\n".join(rows)


def _format_choice(results):
    """Return a sentence on what was chosen by which split; empty if nothing was."""
    chosen = [f"The examples of {split} chose {choice}" for split, choice in results["choice"].items() if choice]
    return "".join(f"{words}: scores on them are corrected for that. " for words in chosen)


def _format_limits(task, data):
    """Return what the model cannot be trusted with, by the facts of its training data, as a list in Markdown."""
    train, lines = data["train"], []
    if task.is_regression:
        lines.append("It predicts a number for any text, also for texts unlike its training data.")
    else:
        counts = largest_first(train["labels"]).items()
        counts = join_some(f"{_card_name(label)} {number:,}" for label, number in counts)
        lines.append(
            "It chooses among these labels for any text, also for texts unlike its training data. "
            f"Training examples per label: {counts}."
        )
    tokens, kind = train["tokens"], "pairs" if len(task.text) == 2 else "texts"
    lines.append(
        f"It was trained on {train['rows']:,} {kind} with a median of {tokens['median']:.0f} tokens; 95 % have at most "
        f"{tokens['p95']:.0f}. Expect less of it on longer ones. It reads at most {task.max_length} tokens."
    )
    if train["unknown"] >= 0.001:
        lines.append(f"{train['unknown']:.1%} of its training tokens are not in its vocabulary.")
    if task.is_multi_label:
        pairs = zip(task.labels, task.thresholds, strict=True)
        thresholds = join_some(f"{_card_name(label)} {value:.2f}" for label, value in pairs)
        thresholds += _where_all_are(task, "task.json")
        lines.append(f"Each label has its own decision threshold, which transformers' pipeline ignores: {thresholds}.")
    if task.temperature:
        lines.append(
            f"For probabilities that fit the validation examples, its logits are divided by {task.temperature:.3f}; "
            "transformers' pipeline ignores that."
        )
    lines.append("The scores apply to texts like those of the splits above; the intervals show how precise they are.")
    return "\n".join(f"- {line}" for line in lines)


def _pipeline_options(task):
    if task.is_regression:
        return ', function_to_apply="none"'
    return ", top_k=None" if task.is_multi_label else ""
