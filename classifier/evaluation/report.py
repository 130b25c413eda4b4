"""What is told of a run: what its data are like, what it will take, what it came to; results.json."""

import json
import platform
from importlib.metadata import version

import torch
import yaml

from classifier.data.cache import column_array
from classifier.evaluation import analysis, metrics
from classifier.messages import RunFailed, format_duration, format_score, format_scores, in_red, log


def collect_results(args, task, facts, progress, evaluations, data, accelerator):
    """Return the content of results.json; evaluations: of the best model, by split."""
    return {
        "task": task.name,
        "model": facts["model"],
        "model_commit": facts["commit"],
        "seed": args.seed,
        **progress.totals(),
        "best_step": progress.state.best["step"],
        "scores": {name: evaluation["scores"] for name, evaluation in evaluations.items()},
        "intervals": {
            name: metrics.intervals(task.metrics, evaluation["predictions"], evaluation["labels"])
            for name, evaluation in evaluations.items()
        },
        "majority_baseline": {name: evaluation["majority"] for name, evaluation in evaluations.items()},
        "data": data,
        "settings": vars(args),
        **environment(accelerator),
    }


def format_results(results):
    """Return the scores of a finished run as lines: each split's, the majority's, and 95 % intervals."""
    lines = [
        f"{results['steps']} steps in {format_duration(results['train_seconds'])}, "
        f"{results['train_examples_per_second']:.0f} examples/s; best at step {results['best_step']}"
    ]
    for split, scores in results["scores"].items():
        lines.append(
            f"{split}: {format_scores(scores)} (majority: {format_scores(results['majority_baseline'][split])})"
        )
        lines.append(
            f"{split}, 95 % intervals: {metrics.format_intervals(results.get('intervals', {}).get(split, {}))}"
        )
    return "\n".join(lines)


def epoch_table(lines):
    """Return the evaluations in metrics.jsonl as lines of a table: losses, scores, and the time that each took."""
    rows, before = [], 0.0
    lines = [line for line in lines if line["type"] == "eval"]
    names = list(lines[0]["scores"]) if lines else []
    for line in lines:
        # All splits of one evaluation come together; the time goes with the first of them.
        seconds, before = line["seconds"] - before, line["seconds"]
        numbers = [line["train_loss"], line["loss"], *(line["scores"][name] for name in names)]
        rows.append([f"{line['epoch']:.2f}", line["split"], *map(format_score, numbers), format_duration(seconds)])
    rows = [["epoch", "split", "train loss", "loss", *names, "h:mm:ss"], *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True)) for row in rows)


def overfitting_warning(lines):
    """Return a hint where the validation loss has risen since its lowest while the training loss fell, else None."""
    lines = [line for line in lines if line["type"] == "eval" and line["split"] != "train"]
    lines = [line for line in lines if line["split"] == lines[0]["split"]]
    lowest, last = min(lines, key=lambda line: line["loss"], default=None), lines[-1] if lines else None
    if not lines or last["loss"] <= 1.05 * lowest["loss"] or last["train_loss"] >= lowest["train_loss"]:
        return None
    return (
        f"{lowest['split']} loss rose from {lowest['loss']:.4f} (epoch {lowest['epoch']:.2f}) to {last['loss']:.4f} "
        "while that of train fell: the model learns its examples by heart. What usually helps: fewer --epochs, "
        "--early_stopping_patience 2, a lower --learning_rate, --weight_decay 0.1, more data."
    )


def log_results(folder, task, results, evaluations, progress):
    """Log what a run has come to: first what is wrong with it, then the table of its epochs, and its scores."""
    if progress.state.step < progress.total_steps:
        since = progress.state.evaluations_since_best
        log.info(f"no better {task.metrics[0]} in {since} evaluations: stopped early")
    for name, evaluation in evaluations.items():
        if warning := collapse_warning(task, name, evaluation):
            log.warning(in_red(f"WARNING: {warning}"))
    lines = read_metric_lines(folder)
    if hint := overfitting_warning(lines):
        log.warning(f"WARNING: {hint}")
    log.info(
        f"{epoch_table(lines)}\n{format_results(results)}\nmodel: {folder / 'model'}, report: {folder / 'report.html'}"
    )


def read_metric_lines(folder):
    """Return the lines of a run's metrics.jsonl; none where there is no such file."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def write_page(folder, task, results, evaluations, splits, examples):
    """Write report.html and plots/ of a run. Raises RunFailed where that does not work."""
    from classifier.evaluation import page

    contents = []
    for split in [name for name in evaluations if name != "train"]:
        evaluation = evaluations[split]
        contents.append(
            {
                "split": split,
                "examples": len(evaluation["labels"]),
                "scores": evaluation["scores"],
                "majority_baseline": evaluation["majority"],
                "intervals": results["intervals"][split],
                "warning": collapse_warning(task, split, evaluation),
                **analysis.analyse(task, evaluation, column_array(examples[split], "length"), {}),
                "mistakes": page.mistakes_of(task, splits[split], evaluation["logits"], *analysis.worst_mistakes(evaluation)),
            }
        )
    lines = read_metric_lines(folder)
    headline = {
        "title": task.name,
        "model": format_origin(results),
        "text": f"{results['steps']} steps in {format_duration(results['train_seconds'])}, "
        f"{results['train_examples_per_second']:.0f} examples/s; the best at step {results['best_step']}",
        "hint": overfitting_warning(lines),
    }
    tables = {
        "Settings": results["settings"],
        "Data": {**results["data"], "source": task.source, "licence": task.licence},
        "Environment": {name: results[name] for name in ("num_processes", "mixed_precision", "versions", "hardware")},
    }
    try:
        page.write(folder, task, headline, contents, lines, tables)
    except OSError as error:
        words = f"{folder}/report.html could not be written: {error}\nMend this; then the same command."
        raise RunFailed(words) from error


def log_finished(folder, results, final_test):
    """Log the scores of a run that is finished."""
    log.info(f"{folder}: already complete (--overwrite trains again)\n{format_results(results)}")
    if final_test and not any(name.startswith("test") for name in results["scores"]):
        log.info(f"its test split was not scored: evaluate.py --model {folder} --split test")


def collapse_warning(task, split, evaluation):
    """Return None, or in words that a model has learnt nothing: one prediction for all, no better than the majority."""
    metric, constant = task.metrics[0], evaluation["constant"]
    score, limit = evaluation["scores"][metric], evaluation["majority"][metric]
    if constant is not None:
        what = f"ON {split.upper()} THE MODEL PREDICTS THE SAME FOR EVERY EXAMPLE"
        if not task.is_multi_label:
            what += f": {constant if task.is_regression else task.labels[constant]!r}"
    elif limit is not None and not metrics.is_better(metric, score, limit):
        words = f"{metric} {format_score(score)} to {format_score(limit)}"
        what = f"ON {split.upper()} THE MODEL IS NO BETTER THAN THE MAJORITY CLASS ({words})"
    else:
        return None
    return (
        f"{what}.\nIt has learnt nothing of use. What usually helps: a lower --learning_rate, "
        "--warmup_ratio 0.1, more --epochs, another --seed, --class_weights balanced; or the labels are wrong."
    )


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


RECIPE = ("epochs", "batch_size", "learning_rate", "scheduler", "weight_decay", "freeze", "class_weights")


def model_card(task, results):
    """Return the README.md of a model folder. results: the content of results.json."""
    about = {"library_name": "transformers", "pipeline_tag": "text-classification", "metrics": task.metrics}
    if isinstance(results["model"], str):
        about["base_model"] = results["model"]
    if task.dataset:
        about["datasets"] = [task.dataset["path"]]
    settings = [f"{name} {results['settings'][name]}" for name in RECIPE]
    return f"""---
{yaml.safe_dump(about)}---

# {task.name}

A text classifier, {format_origin(results)}.

- Input: {" and ".join(task.text)}, up to {task.max_length} tokens.
- Output: {_format_output(task)}.
- Data: {task.source or task.dataset or ", ".join(task.files)}{f" ({task.licence})" if task.licence else ""}.
- Recipe: {", ".join(settings)}, seed {results["seed"]}; {results["train_examples"]:,} examples seen in
  {results["steps"]:,} steps, {results["mixed_precision"] if results["mixed_precision"] != "no" else "fp32"}.

## Scores

| split | metric | score | 95 % interval | majority class |
|---|---|---|---|---|
{_format_score_rows(results)}

## Limits

{_format_limits(task, results["data"]["splits"])}

## Use

```python
from transformers import pipeline
classify = pipeline("text-classification", model="THIS_FOLDER"{_pipeline_options(task)})
print(classify({'"..."' if len(task.text) == 1 else '{"text": "...", "text_pair": "..."}'}))
```
"""


def format_origin(results):
    """Return in words what a run started from."""
    if not isinstance(results["model"], str):
        return "trained from new weights"
    commit = f" at commit {results['model_commit']}" if results["model_commit"] else ""
    return f"fine-tuned from {results['model']}{commit}"


def _format_output(task):
    if task.is_regression:
        return "a number"
    return ("any number of " if task.is_multi_label else "one of ") + ", ".join(task.labels)


def _format_score_rows(results):
    rows = []
    for split, scores in results["scores"].items():
        for name, score in scores.items():
            majority = results["majority_baseline"][split][name]
            interval = metrics.format_intervals({name: results["intervals"][split][name]}).removeprefix(f"{name} ")
            rows.append(f"| {split} | {name} | {format_score(score)} | {interval} | {format_score(majority)} |")
    return "\n".join(rows)


def _format_limits(task, data):
    """Return what the facts of the data say that the model cannot be trusted with, as a list in Markdown."""
    train, lines = data["train"], []
    if task.is_regression:
        lines.append("It answers any text with a number, one of another kind too.")
    else:
        labels = ", ".join(f"{label} {number:,}" for label, number in train["labels"].items())
        lines.append(f"It answers any text with these labels, one of another kind too. It has seen of each: {labels}.")
    tokens, number = train["tokens"], len(task.text)
    words = "pairs" if number == 2 else "texts"
    lines.append(
        f"It learnt from {train['rows']:,} {words} of {tokens['median']:.0f} tokens (median), 95 % of them up to "
        f"{tokens['p95']:.0f}: of longer ones it knows little. What lies beyond {task.max_length} tokens is not read."
    )
    if train["unknown"] >= 0.001:
        lines.append(f"Its vocabulary does not hold {train['unknown']:.1%} of the tokens it learnt from.")
    if task.is_multi_label:
        cuts = ", ".join(f"{label} {cut:.2f}" for label, cut in zip(task.labels, task.thresholds, strict=True))
        lines.append(f"A label applies from its own probability on, which transformers does not know: {cuts}.")
    lines.append("The scores hold for texts like those of the splits above, and the intervals say how far.")
    return "\n".join(f"- {line}" for line in lines)


def _pipeline_options(task):
    if task.is_regression:
        return ', function_to_apply="none"'
    return ", top_k=None" if task.is_multi_label else ""
