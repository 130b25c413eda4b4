"""What a score is made of: each class, the confusion, calibration, parts of the data, the worst mistakes.

All of it is a function of logits and labels; nothing here knows of models or files.
"""

from pathlib import Path

import numpy as np

from classifier.data.labels import probabilities
from classifier.data.reader import read_rows
from classifier.evaluation import metrics
from classifier.messages import BadInput, format_score, format_scores, nearest

BINS = 15
EXAMPLES_OF_A_BAR = 32
LISTED = 20  # classes, and parts of the data


def analyse(task, evaluation, lengths, columns):
    """Return what evaluation.json says beside the scores and their intervals.

    evaluation: of common.score_logits; lengths: (examples,), in tokens; columns: {name: a word for each example}. The
    examples that share a word, or a quarter of the lengths, are scored alone.
    """
    predictions, labels, names = evaluation["predictions"], evaluation["labels"], task.metrics
    parts = {"length": parts_by_length(lengths)} | {name: parts_by_word(words) for name, words in columns.items()}
    content = {"slices": {name: list(part_scores(names, predictions, labels, of)) for name, of in parts.items()}}
    if task.is_regression:
        return content
    content["classes"] = class_scores(task, predictions, labels)
    content["never_predicted"] = [row["label"] for row in content["classes"] if row["support"] and not row["predicted"]]
    content["calibration"] = calibration(probabilities(task, evaluation["logits"]), predictions, labels)
    if not task.is_multi_label:
        content["confusion"] = confusion(len(task.labels), predictions, labels)
    if "matthews_correlation" in names:
        content["batches"] = batch_scores("matthews_correlation", predictions, labels)
    return content


def class_scores(task, predictions, labels):
    """Return precision, recall, F1 and number of rows of each class; None where a rate is 0/0."""
    if not task.is_multi_label:
        classes = np.arange(len(task.labels))
        predictions, labels = predictions[:, None] == classes, labels[:, None] == classes
    predictions, labels = predictions.astype(bool), labels.astype(bool)
    rows = []
    for name, hits, predicted, support in zip(
        task.labels, (predictions & labels).sum(axis=0), predictions.sum(axis=0), labels.sum(axis=0), strict=True
    ):
        rates = {"precision": (hits, predicted), "recall": (hits, support), "f1": (2 * hits, predicted + support)}
        rates = {rate: float(part / whole) if whole else None for rate, (part, whole) in rates.items()}
        rows.append({"label": name, **rates, "support": int(support), "predicted": int(predicted)})
    return rows


def confusion(classes, predictions, labels):
    """Return counts as lists: a row for each label, a column for each prediction."""
    cells = np.bincount(labels * classes + predictions, minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def calibration(probabilities, predictions, labels):
    """Return the expected calibration error and its bins (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    In each of 15 bins of like confidence: how sure the model is on average, and how often it is right. The error is the
    mean distance of the two, weighted by examples. In multi-label each label of each example counts as a prediction.
    """
    if labels.ndim == 2:
        confidence, is_right = np.maximum(probabilities, 1 - probabilities).ravel(), (predictions == labels).ravel()
    else:
        confidence, is_right = probabilities.max(axis=1), predictions == labels
    of_example = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins, error = [], 0.0
    for number in np.unique(of_example):
        inside = of_example == number
        mean, rate = float(confidence[inside].mean()), float(is_right[inside].mean())
        error += inside.mean() * abs(mean - rate)
        edges = {"low": float(number / BINS), "high": float((number + 1) / BINS)}
        bins.append({**edges, "examples": int(inside.sum()), "confidence": mean, "accuracy": rate})
    return {"expected_calibration_error": float(error), "bins": bins}


def parts_by_word(words):
    """Return [(word, numbers of the examples that have it)], the largest part first; beyond 20, the rest as one."""
    words, of_example, counts = np.unique(np.asarray(words, dtype=str), return_inverse=True, return_counts=True)
    parts = [(str(words[code]), np.flatnonzero(of_example == code)) for code in np.argsort(-counts, kind="stable")]
    if len(parts) > LISTED:
        rest = np.sort(np.concatenate([numbers for _, numbers in parts[LISTED:]]))
        parts[LISTED:] = [(f"({len(parts) - LISTED} others)", rest)]
    return parts


def parts_by_length(lengths):
    """Return [(words, numbers of the examples)] of four parts of about equal size, the shortest first."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="lower"))
    of_example = np.searchsorted(edges, lengths)
    parts = [np.flatnonzero(of_example == number) for number in np.unique(of_example)]
    ends = [(lengths[numbers].min(), lengths[numbers].max()) for numbers in parts]
    words = [f"{low} tokens" if low == high else f"{low} to {high} tokens" for low, high in ends]
    return list(zip(words, parts, strict=True))


def part_scores(names, predictions, labels, parts):
    """Yield the scores of each part of the examples, with their intervals."""
    for word, numbers in parts:
        given = names, predictions[numbers], labels[numbers]
        scores = {"scores": metrics.compute_metrics(*given, warns=False), "intervals": metrics.intervals(*given)}
        yield {"slice": word, "examples": len(numbers), **scores}


def batch_scores(name, predictions, labels):
    """Return a metric of each 32 examples in their order: how much a score of few examples wanders."""
    starts = range(0, len(labels), EXAMPLES_OF_A_BAR)
    parts = [slice(start, start + EXAMPLES_OF_A_BAR) for start in starts]
    return [metrics.compute_metrics([name], predictions[part], labels[part], warns=False)[name] for part in parts]


def mistakes(evaluation):
    """Return (numbers, losses) of the examples that are wrong, worst first; in regression of all that are not exact."""
    labels, losses = evaluation["labels"], evaluation["losses"]
    is_wrong = (evaluation["predictions"] != labels).reshape(len(labels), -1).any(axis=1)
    numbers = np.flatnonzero(is_wrong)
    numbers = numbers[np.argsort(-losses[numbers], kind="stable")]
    return numbers, losses[numbers]


def format_evaluation(content):
    """Return what evaluation.json says, as lines for the terminal."""
    scores, of_majority = content["scores"], content["majority_baseline"]
    examples, left_out = content["examples"], content["bad_rows"]
    number = f"scored {examples} of {examples + left_out} examples" if left_out else f"{examples} examples"
    lines = [
        f"{content['split']}: {format_scores(scores)}, loss {content['loss']:.4f}, {number} "
        f"(majority: {format_scores(of_majority)})",
        f"95 % intervals: {metrics.format_intervals(content['intervals'])}",
        *(f"{name}: {format_scores(scores)}" for name, scores in content["baselines"].items()),
    ]
    if "classes" in content:
        width = max(len(row["label"]) for row in content["classes"][:LISTED])
        lines.append(f"{'':{width}}  precision  recall      f1  examples")
        for row in content["classes"][:LISTED]:
            rates = "".join(
                f"{'none' if row[rate] is None else format(row[rate], '.4f'):>{column}}"
                for rate, column in (("precision", 11), ("recall", 8), ("f1", 8))
            )
            lines.append(f"{row['label']:{width}}{rates}{row['support']:10}")
        if len(content["classes"]) > LISTED:
            lines.append(f"... {len(content['classes']) - LISTED} more classes in evaluation.json")
        if content["never_predicted"]:
            lines.append(f"never predicted: {', '.join(content['never_predicted'][:LISTED])}")
        error = content["calibration"]["expected_calibration_error"]
        lines.append(f"calibration: how sure the model is and how often it is right differ by {error:.4f} on average")
    for column, parts in content["slices"].items():
        lines += [f"by {column}", *(f"  {part['slice']}: {_format_part(part)}" for part in parts)]
    if "comparison" in content:
        lines.append(content["comparison"]["conclusion"])
        if of_errors := content["comparison"].get("mcnemar"):
            lines.append(
                f"right here alone: {of_errors['only_here_right']}, there alone: {of_errors['only_other_right']} "
                f"(McNemar's exact test: p = {of_errors['p']:.4f})"
            )
    return "\n".join(lines)


def _format_part(part):
    name, score = next(iter(part["scores"].items()))
    interval = part["intervals"][name]
    words = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{name} {format_score(score)}{words}, {part['examples']} example{'s' * (part['examples'] > 1)}"


def predictions_in(path, task, rows):
    """Return the predictions that a file holds for rows, found by their texts: ids, values, or 0 and 1.

    path: a table as evaluate.py and predict.py write it, or a folder with such a predictions.csv.
    """
    path = Path(path)
    path = path / "predictions.csv" if path.is_dir() else path
    column = "predicted_value" if task.is_regression else "predicted_label"
    found = {}
    for line, row in read_rows(str(path)):
        for name in (*task.text, column):
            if name not in row:
                words = f'{path}, line {line}: has no column "{name}"{nearest(name, row)}'
                raise BadInput(words, "Give a table that evaluate.py or predict.py wrote of these examples.")
        found.setdefault(tuple(row[name] for name in task.text), []).append(
            _parse_prediction(task, row[column], path, line)
        )
    predictions = []
    for number, texts in enumerate(zip(*(rows[name] for name in task.text), strict=True)):
        if not found.get(texts):
            words = f"{path}: has no prediction for example {number}, {' / '.join(texts)[:80]!r}"
            raise BadInput(words, "Give predictions of the very examples that are scored here.")
        predictions.append(found[texts].pop(0))  # texts that occur twice come in order
    return np.array(predictions)


def _parse_prediction(task, word, path, line):
    try:
        if task.is_regression:
            return float(word)
        if task.is_multi_label:
            names = [name.strip() for name in word.split(task.separator) if name.strip()]
            ids = [task.labels.index(name) for name in names]
            return np.isin(np.arange(len(task.labels)), ids).astype(int)
        return task.labels.index(word)
    except ValueError:
        labels = "a number" if task.is_regression else ", ".join(task.labels)
        words = f"{path}, line {line}: {word!r} is no prediction of this task"
        raise BadInput(words, f"It predicts: {labels}.") from None


def compare(task, names, predictions, others, labels):
    """Return what evaluation.json says of two models, here and other, on the same examples.

    names: (here, other), in words; predictions, others, labels: (examples,), or (examples, labels) of 0 and 1.
    """
    here, other = (metrics.compute_metrics(task.metrics, of, labels, warns=False) for of in (predictions, others))
    intervals = metrics.difference_intervals(task.metrics, predictions, others, labels)
    content = {"other": names[1], "scores": other, "differences": {}}
    for metric in task.metrics:
        both = None not in (here[metric], other[metric])
        difference = here[metric] - other[metric] if both else None
        content["differences"][metric] = {"difference": difference, "interval": intervals[metric] if both else None}
    if not task.is_regression:
        is_right, is_right_of_other = (
            (of == labels).reshape(len(labels), -1).all(axis=1) for of in (predictions, others)
        )
        only_here, only_other, p = metrics.mcnemar(is_right, is_right_of_other)
        content["mcnemar"] = {"only_here_right": only_here, "only_other_right": only_other, "p": p}
    content["conclusion"] = conclusion(names, task.metrics[0], len(labels), content)
    return content


def conclusion(names, metric, examples, content):
    """Return in one sentence what the examples allow to say of two models."""
    difference, interval = content["differences"][metric].values()
    if interval is None:
        return f"Nothing can be said: {metric} has no value for one of the two."
    low, high = map(metrics.format_difference, interval)
    figures = f"{metrics.format_difference(difference)}, 95 % interval {low} to {high}, {examples} examples"
    if interval[0] <= 0 <= interval[1]:
        return f"These examples do not tell {names[0]} and {names[1]} apart by {metric}: the difference is {figures}."
    other = content["scores"][metric]
    margin = metrics.rounding_margin(metric, other + difference, other)
    if not metrics.is_beyond_margin(interval, margin):
        return (
            f"These examples show no difference of {names[0]} and {names[1]} by {metric} beyond the {margin:.1e} that "
            f"rounding explains: it is {figures}."
        )
    is_better = metrics.is_better(metric, difference, 0)
    better, worse = names if is_better else names[::-1]
    return f"{better} is better than {worse} by {metric}, with these two trainings: the difference is {figures}."


def only_one_right(predictions, others, labels):
    """Return the numbers of the examples that one model gets right and the other does not, shape (examples,)."""
    is_right, is_right_of_other = ((of == labels).reshape(len(labels), -1).all(axis=1) for of in (predictions, others))
    return np.flatnonzero(is_right != is_right_of_other)
