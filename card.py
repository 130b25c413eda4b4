"""The model card, README.md of a model folder as the Hub shows it: what a model is, its scores, limits and use."""

import yaml

import uncertainty
from common import number_words

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

A text classifier, {model_words(results)}.

- Input: {" and ".join(task.text)}, up to {task.max_length} tokens.
- Output: {_output_words(task)}.
- Data: {task.source or task.dataset or ", ".join(task.files)}{f" ({task.licence})" if task.licence else ""}.
- Recipe: {", ".join(settings)}, seed {results["seed"]}; {results["train_examples"]:,} examples seen in
  {results["steps"]:,} steps, {results["mixed_precision"] if results["mixed_precision"] != "no" else "fp32"}.

## Scores

| split | metric | score | 95 % interval | majority class |
|---|---|---|---|---|
{_score_rows(results)}

## Limits

{_limits(task, results["data"]["splits"])}

## Use

```python
from transformers import pipeline
classify = pipeline("text-classification", model="THIS_FOLDER"{_pipeline_options(task)})
print(classify({'"..."' if len(task.text) == 1 else '{"text": "...", "text_pair": "..."}'}))
```
"""


def model_words(results):
    """Return in words what a run started from."""
    if not isinstance(results["model"], str):
        return "trained from new weights"
    commit = f" at commit {results['model_commit']}" if results["model_commit"] else ""
    return f"fine-tuned from {results['model']}{commit}"


def _output_words(task):
    if task.is_regression:
        return "a number"
    return ("any number of " if task.is_multi_label else "one of ") + ", ".join(task.labels)


def _score_rows(results):
    rows = []
    for split, scores in results["scores"].items():
        for name, score in scores.items():
            majority = results["majority_baseline"][split][name]
            interval = uncertainty.words({name: results["intervals"][split][name]}).removeprefix(f"{name} ")
            rows.append(f"| {split} | {name} | {number_words(score)} | {interval} | {number_words(majority)} |")
    return "\n".join(rows)


def _limits(task, data):
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
