"""What a score is made of: classes, confusion, calibration, slices, worst mistakes; and how two models differ.

Pure functions of logits, labels and texts; nothing here knows models, and only `read_predictions` opens a file.
"""

from pathlib import Path

import numpy as np

from classifier.data.labels import probabilities
from classifier.data.reader import read_rows
from classifier.evaluation import intervals, metrics, selection
from classifier.messages import BadInput, format_name, format_score, format_scores, list_names, nearest

CALIBRATION_BINS = 15
TARGET_ACCURACIES = [0.8, 0.9, 0.95, 0.99]  # of the texts that are answered
BATCH_OF_SCORES = 32  # examples per bar of the plot of scores by batch
MOST_LISTED, MOST_CONFUSED = 20, 10  # classes, and slices of a column; pairs of classes

# -------------------------------------------------------------------------------------------------------- one model


def analyse(task, evaluation, lengths, columns):
    """Return the parts of evaluation.json that break a score down; the scores themselves come from the caller.

    evaluation: the result of common.score_logits; lengths: (examples,), in tokens; columns: {name: a value for each
    example}, to score each value as a slice of its own.
    """
    predictions, labels, names = evaluation["predictions"], evaluation["labels"], task.metrics
    slices = {"length": slices_by_length(lengths)}
    slices |= {column: slices_by_value(values) for column, values in columns.items()}
    content = {"slices": {name: score_slices(names, predictions, labels, parts) for name, parts in slices.items()}}
    if task.is_regression:
        return content
    content["classes"] = class_scores(task, predictions, labels)
    content["never_predicted"] = [row["label"] for row in content["classes"] if row["support"] and not row["predicted"]]
    chances = probabilities(task, evaluation["logits"])
    content["calibration"] = calibration(chances, predictions, labels)
    if not task.is_multi_label:
        content["coverage"] = coverage(task, chances, labels)
        content["confusion"] = confusion_counts(len(task.labels), predictions, labels)
    if "matthews_correlation" in names:
        content["batches"] = batch_scores("matthews_correlation", predictions, labels)
    return content


def class_scores(task, predictions, labels):
    """Return precision, recall, F1, support and number of predictions of each class; None for a rate of 0/0."""
    rows = []
    for number, name in enumerate(task.labels):
        is_predicted, is_actual = (
            values[:, number] == 1 if task.is_multi_label else values == number for values in (predictions, labels)
        )
        hits, predicted, support = (int(side.sum()) for side in (is_predicted & is_actual, is_predicted, is_actual))
        rates = {"precision": (hits, predicted), "recall": (hits, support), "f1": (2 * hits, predicted + support)}
        rates = {rate: part / whole if whole else None for rate, (part, whole) in rates.items()}
        rows.append({"label": name, **rates, "support": support, "predicted": predicted})
    return rows


def largest_classes(classes):
    """Return the rows of class_scores, of more than 20 those of the 20 classes with most examples."""
    if len(classes) <= MOST_LISTED:
        return classes
    return sorted(classes, key=lambda row: -row["support"])[:MOST_LISTED]


def most_confused(matrix, names):
    """Return the ten commonest confusions as (label, predicted label, examples). matrix: of confusion_counts."""
    counts = np.array(matrix)
    np.fill_diagonal(counts, 0)
    cells = np.argsort(-counts, axis=None, kind="stable")[:MOST_CONFUSED]
    pairs = ((*divmod(int(cell), len(names)), int(counts.flat[cell])) for cell in cells)
    return [(names[label], names[predicted], number) for label, predicted, number in pairs if number]


def confusion_counts(classes, predictions, labels):
    """Return counts as nested lists: a row for each label, a column for each prediction."""
    cells = np.bincount(labels * classes + predictions, minlength=classes**2)
    return cells.reshape(classes, classes).tolist()


def calibration(probabilities, predictions, labels):
    """Return the expected calibration error and its bins (Guo et al. 2017, https://arxiv.org/abs/1706.04599).

    Each of 15 bins holds predictions of similar confidence and has their mean confidence and their accuracy. The error
    is the mean distance of the two, weighted by examples. In multi-label each label of each example is a prediction.
    `chance_alone` is what 95 of 100 calibrated models of these confidences stay below; with few examples it is large.
    """
    if labels.ndim == 2:
        confidence, is_right = np.maximum(probabilities, 1 - probabilities).ravel(), (predictions == labels).ravel()
    else:
        confidence, is_right = probabilities.max(axis=1), predictions == labels
    bin_numbers = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins, error = [], 0.0
    for number in np.unique(bin_numbers):
        inside = bin_numbers == number
        mean, rate = float(confidence[inside].mean()), float(is_right[inside].mean())
        error += inside.mean() * abs(mean - rate)
        edges = {"low": float(number / CALIBRATION_BINS), "high": float((number + 1) / CALIBRATION_BINS)}
        accuracy = {"accuracy": rate, "interval": intervals.binomial_interval(is_right[inside].sum(), inside.sum())}
        bins.append({**edges, "examples": int(inside.sum()), "confidence": mean, **accuracy})
    return {"expected_calibration_error": float(error), "chance_alone": _calibration_by_chance(bins), "bins": bins}


def _calibration_by_chance(bins, draws=2000):
    examples, confidence = (np.array([row[name] for row in bins]) for name in ("examples", "confidence"))
    right = np.random.default_rng(0).binomial(examples, confidence, (draws, len(bins)))
    errors = np.abs(right / examples - confidence) @ examples / examples.sum()
    return float(np.quantile(errors, intervals.LEVEL))


def coverage(task, probabilities, labels):
    """Return which share of the texts can be answered if 80, 90, 95 and 99 % of the answers are to be right.

    Only texts above a probability are answered: the one that was fitted in training, as predict.py has it, else one
    that is fitted to these examples. An accuracy that cannot be promised has None for it.
    """
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    rows = []
    for target in TARGET_ACCURACIES:
        fitted = (task.min_probabilities or {}).get(str(target), 0.0)
        least = selection.min_probability(confidence, is_right, target) if fitted == 0.0 else fitted
        row = {"target": target, "min_probability": least, "fitted_in_training": fitted != 0.0}
        answered = confidence >= (2 if least is None else least)
        row |= {"answered": float(answered.mean()), "accuracy": None, "interval": None}
        if answered.any():
            row["accuracy"] = float(is_right[answered].mean())
            row["interval"] = intervals.binomial_interval(is_right[answered].sum(), answered.sum())
        rows.append(row)
    return rows


def slices_by_value(values):
    """Return [(value, numbers of its examples)], the largest slice first; beyond 20, the rest is one slice."""
    values, codes, counts = np.unique(np.asarray(values, dtype=str), return_inverse=True, return_counts=True)
    slices = [(str(values[code]), np.flatnonzero(codes == code)) for code in np.argsort(-counts, kind="stable")]
    if len(slices) > MOST_LISTED:
        rest = np.sort(np.concatenate([numbers for _, numbers in slices[MOST_LISTED:]]))
        slices[MOST_LISTED:] = [(f"({len(slices) - MOST_LISTED} others)", rest)]
    return slices


def slices_by_length(lengths):
    """Return [(range of lengths, numbers of the examples)], quarters of about equal size, the shortest first."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75], method="lower"))
    codes = np.searchsorted(edges, lengths)
    slices = []
    for code in np.unique(codes):
        numbers = np.flatnonzero(codes == code)
        low, high = lengths[numbers].min(), lengths[numbers].max()
        slices.append((f"{low} tokens" if low == high else f"{low} to {high} tokens", numbers))
    return slices


def score_slices(names, predictions, labels, slices):
    """Return the scores of each slice, with their intervals."""
    rows = []
    for name, numbers in slices:
        columns = predictions[numbers], labels[numbers]
        scores = metrics.compute_metrics(names, *columns, warns=False)
        row = {"slice": name, "examples": len(numbers), "scores": scores}
        rows.append({**row, "intervals": intervals.score_intervals(names, *columns)})
    return rows


def batch_scores(name, predictions, labels):
    """Return a metric of every 32 examples, in order: how much the score of a small sample varies."""
    starts = range(0, len(labels), BATCH_OF_SCORES)
    batches = [slice(start, start + BATCH_OF_SCORES) for start in starts]
    return [metrics.compute_metrics([name], predictions[part], labels[part], warns=False)[name] for part in batches]


def worst_mistakes(evaluation):
    """Return (numbers, losses) of the wrong examples, highest loss first; in regression of all that are not exact."""
    losses = evaluation["losses"]
    numbers = np.flatnonzero(~is_right(evaluation["predictions"], evaluation["labels"]))
    numbers = numbers[np.argsort(-losses[numbers], kind="stable")]
    return numbers, losses[numbers]


def is_right(predictions, labels):
    """Return whether each example is predicted right, shape (examples,); in multi-label if all its labels are."""
    return (predictions == labels).reshape(len(labels), -1).all(axis=1)


# -------------------------------------------------------------------------------------------------------- two models


def read_predictions(path, task, rows):
    """Return the predictions for `rows` from a file, matched by text: ids, values in regression, or 0 and 1.

    path: a table as evaluate.py and predict.py write it, or a folder with such a predictions.csv. Raises BadInput for
    a missing column, an unknown label, or a row without a prediction.
    """
    path = Path(path)
    path = path / "predictions.csv" if path.is_dir() else path
    column = "predicted_value" if task.is_regression else "predicted_label"
    predictions_by_text = {}
    for line, row in read_rows(str(path)):
        for name in (*task.text, column):
            if name not in row:
                reason = f'{path}, line {line}: has no column "{name}"{nearest(name, row)}'
                raise BadInput(reason, "Give a table that evaluate.py or predict.py wrote for these examples.")
        texts = tuple(row[name] for name in task.text)
        prediction = _parse_prediction(task, row[column], path, line)
        predictions_by_text.setdefault(texts, []).append(prediction)
    predictions = []
    for number, texts in enumerate(zip(*(rows[name] for name in task.text), strict=True)):
        if not predictions_by_text.get(texts):
            reason = f"{path}: has no prediction for example {number}, {' / '.join(texts)[:80]!r}"
            raise BadInput(reason, "Give predictions for exactly the examples that are scored here.")
        predictions.append(predictions_by_text[texts].pop(0))  # duplicate texts come in the same order
    return np.array(predictions)


def _parse_prediction(task, text, path, line):
    try:
        if task.is_regression:
            return float(text)
        if task.is_multi_label:
            names = [name.strip() for name in text.split(task.separator) if name.strip()]
            ids = [task.labels.index(name) for name in names]
            return np.isin(np.arange(len(task.labels)), ids).astype(int)
        return task.labels.index(text)
    except ValueError:
        allowed = "a number" if task.is_regression else list_names(task.labels)
        reason = f"{path}, line {line}: {format_name(repr(text), 100)} is not a prediction of this task"
        raise BadInput(reason, f"Allowed: {allowed}.") from None


def compare_models(task, names, predictions, others, labels):
    """Return the comparison in evaluation.json: two models, `here` and `other`, on the same examples.

    names: (here, other), as the user knows them; predictions, others, labels: (examples,), or (examples, labels) of 0
    and 1.
    """
    here, other = (metrics.compute_metrics(task.metrics, side, labels, warns=False) for side in (predictions, others))
    found = intervals.difference_intervals(task.metrics, predictions, others, labels)
    content = {"other": names[1], "scores": other, "differences": {}}
    for metric in task.metrics:
        is_defined = found[metric] is not None
        content["differences"][metric] = {
            "difference": here[metric] - other[metric] if is_defined else None,
            "interval": found[metric],
        }
    metric = task.metrics[0]
    if found[metric] is not None:
        p = intervals.randomisation_test(metric, predictions, others, labels)
        content["randomisation_test"] = {"metric": metric, "p": p}
    if not task.is_regression:
        only_here, only_other, p = intervals.mcnemar(is_right(predictions, labels), is_right(others, labels))
        content["mcnemar"] = {"only_here_right": only_here, "only_other_right": only_other, "p": p}
    if np.array_equal(predictions, others):
        content["conclusion"] = f"{names[0]} and {names[1]} predict the same for all {len(labels)} examples."
    else:
        content["conclusion"] = draw_conclusion(names, metric, len(labels), content)
    return content


def draw_conclusion(names, metric, examples, content):
    """Return one sentence: what the examples show about two models. content: the dict of compare_models so far.

    One is called better only where both its interval leaves 0 out and a test that is exact for any number of rows says
    so: with few rows, or scores near 1, intervals alone say too much.
    """
    difference, interval = content["differences"][metric].values()
    if interval is None:
        return f"No conclusion is possible: {metric} is undefined for one of the two models, or there is one example."
    is_accuracy = metric == "accuracy"  # then the two tests are one, and McNemar's needs no random draws
    p = content["mcnemar" if is_accuracy else "randomisation_test"]["p"]
    low, high = map(intervals.format_difference, interval)
    figures = (
        f"{intervals.format_difference(difference)}, 95 % interval {low} to {high}, {_format_p(p)}, {examples} examples"
    )
    other = content["scores"][metric]
    margin = intervals.rounding_margin(metric, other + difference, other)
    if interval[0] <= 0 <= interval[1] or p > 1 - intervals.LEVEL:
        needed = intervals.detectable_difference(interval)
        return (
            f"These examples do not tell {names[0]} and {names[1]} apart by {metric}: the difference is {figures}. "
            f"With a probability of 80 %, they would show one of {needed:.2g} or more."
        )
    if not intervals.is_beyond_margin(interval, margin):
        return (
            f"These examples show no difference between {names[0]} and {names[1]} by {metric} beyond the {margin:.1e} "
            f"that rounding explains: it is {figures}."
        )
    better, worse = names if metrics.is_better(metric, difference, 0) else names[::-1]
    return f"{better} is better than {worse} by {metric}, for these two trainings: the difference is {figures}."


def _format_p(p):
    return f"p = {p:.4f}" if p >= 0.0001 else "p < 0.0001"


def only_one_right(predictions, others, labels):
    """Return the numbers of the examples that exactly one of two models gets right."""
    return np.flatnonzero(is_right(predictions, labels) != is_right(others, labels))


# ---------------------------------------------------------------------------------------------------- on the terminal


def format_evaluation(content):
    """Return the content of evaluation.json as lines for the terminal."""
    scores, majority = content["scores"], content["majority_baseline"]
    examples, skipped = content["examples"], content["bad_rows"]
    number = f"scored {examples} of {examples + skipped} examples" if skipped else f"{examples} examples"
    lines = [
        f"{content['split']}: {format_scores(scores)}, loss {content['loss']:.4f}, {number} "
        f"(majority: {format_scores(majority)})",
        f"95 % intervals: {intervals.format_intervals(content['intervals'], content['no_interval'])}",
        intervals.MEANING,
        *(f"{name}: {format_scores(scores)}" for name, scores in content["baselines"].items()),
    ]
    if "choice" in content:
        corrected = format_scores(content["corrected_scores"])
        lines.insert(1, f"these examples chose {content['choice']} in training; corrected for that: {corrected}")
    if "classes" in content:
        lines += _format_classes(content["classes"])
        if content["never_predicted"]:
            lines.append(f"never predicted: {list_names(content['never_predicted'])}")
        lines.append(f"calibration: {format_calibration(content['calibration'])}")
    lines += [format_coverage(row) for row in content.get("coverage", [])]
    for column, slices in content["slices"].items():
        lines += [f"by {column}", *(f"  {format_name(row['slice'])}: {_format_slice(row)}" for row in slices)]
    if "comparison" in content:
        lines.append(content["comparison"]["conclusion"])
        if mcnemar := content["comparison"].get("mcnemar"):
            lines.append(
                f"right only here: {mcnemar['only_here_right']}, only there: {mcnemar['only_other_right']} "
                f"(McNemar's exact test: {_format_p(mcnemar['p'])})"
            )
    return "\n".join(lines)


def format_calibration(calibration):
    """Return the calibration error as text, beside what chance alone may give."""
    error, chance = calibration["expected_calibration_error"], calibration["chance_alone"]
    return (
        f"confidence and accuracy differ by {error:.4f} on average; chance alone gives up to {chance:.4f} "
        f"with {sum(row['examples'] for row in calibration['bins'])} examples"
    )


def format_coverage(row):
    """Return in a line which share of the texts is answered for an accuracy. row: of coverage."""
    words = f"to be right in {row['target']:.0%}: "
    if row["min_probability"] is None:
        return f"{words}too few examples, or too many errors, to promise that"
    words += f"--min_probability {row['min_probability']:.4f} answers {row['answered']:.1%} of the texts"
    if row["accuracy"] is None:
        return words
    low, high = row["interval"]
    return f"{words}, {row['accuracy']:.1%} of them right ({low:.1%} to {high:.1%})"


def _format_classes(classes):
    """Return the rows of class_scores as the lines of a table; of many classes, the largest."""
    listed = largest_classes(classes)
    width = max(len(format_name(row["label"])) for row in listed)
    lines = [f"{'':{width}}  precision  recall      f1  examples"]
    for row in listed:
        precision, recall, f1 = (
            "none" if row[rate] is None else f"{row[rate]:.4f}" for rate in ("precision", "recall", "f1")
        )
        lines.append(f"{format_name(row['label']):{width}}{precision:>11}{recall:>8}{f1:>8}{row['support']:10}")
    if len(classes) > len(listed):
        lines.append(f"and {len(classes) - len(listed):,} more with fewer examples, in evaluation.json")
    return lines


def _format_slice(row):
    name, score = next(iter(row["scores"].items()))
    interval = row["intervals"][name]
    bounds = f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
    return f"{name} {format_score(score)}{bounds}, {row['examples']} example{'s' * (row['examples'] > 1)}"
