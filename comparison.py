"""Two models on the same examples: how much better is one, and do these examples tell?"""

from pathlib import Path

import numpy as np

import metrics
import uncertainty
from reader import BadInput, nearest, read_rows


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
        found.setdefault(tuple(row[name] for name in task.text), []).append(_prediction(task, row[column], path, line))
    predictions = []
    for number, texts in enumerate(zip(*(rows[name] for name in task.text), strict=True)):
        if not found.get(texts):
            words = f"{path}: has no prediction for example {number}, {' / '.join(texts)[:80]!r}"
            raise BadInput(words, "Give predictions of the very examples that are scored here.")
        predictions.append(found[texts].pop(0))  # texts that occur twice come in order
    return np.array(predictions)


def _prediction(task, word, path, line):
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
    here, other = (metrics.compute(task.metrics, of, labels, warns=False) for of in (predictions, others))
    intervals = uncertainty.differences(task.metrics, predictions, others, labels)
    content = {"other": names[1], "scores": other, "differences": {}}
    for metric in task.metrics:
        both = None not in (here[metric], other[metric])
        difference = here[metric] - other[metric] if both else None
        content["differences"][metric] = {"difference": difference, "interval": intervals[metric] if both else None}
    if not task.is_regression:
        is_right, is_right_of_other = (
            (of == labels).reshape(len(labels), -1).all(axis=1) for of in (predictions, others)
        )
        only_here, only_other, p = uncertainty.mcnemar(is_right, is_right_of_other)
        content["mcnemar"] = {"only_here_right": only_here, "only_other_right": only_other, "p": p}
    content["conclusion"] = conclusion(names, task.metrics[0], len(labels), content)
    return content


def conclusion(names, metric, examples, content):
    """Return in one sentence what the examples allow to say of two models."""
    difference, interval = content["differences"][metric].values()
    if interval is None:
        return f"Nothing can be said: {metric} has no value for one of the two."
    low, high = map(uncertainty.signed, interval)
    figures = f"{uncertainty.signed(difference)}, 95 % interval {low} to {high}, {examples} examples"
    if interval[0] <= 0 <= interval[1]:
        return f"These examples do not tell {names[0]} and {names[1]} apart by {metric}: the difference is {figures}."
    other = content["scores"][metric]
    margin = uncertainty.rounding(metric, other + difference, other)
    if not uncertainty.is_shown(interval, margin):
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
