"""Labels: the strings of a table -> ids, floats, or a 0 or 1 for each label; what is no label is told with its row."""

import math
from dataclasses import replace

import numpy as np

from classifier.messages import BadInput, log, nearest

UNLABELLED = -1  # the label id of an example without a label (the Hub's GLUE test sets); NaN in regression


def label_strings(task, label):
    """Return a label as a string, in multi-label as a list of strings; None where there is none, else ValueError."""
    if task.is_multi_label and isinstance(label, str):
        return [part.strip() for part in label.split(task.separator) if part.strip()]
    if task.is_multi_label and label is not None:
        one_label, several = replace(task, problem=None), label if isinstance(label, list) else [label]
        words = [label_strings(one_label, one) for one in several]
        if None in words:
            raise ValueError(f"holds {label!r}, a list with an empty label")
        return words
    if isinstance(label, (list, dict)):
        raise ValueError(f"holds {label!r}, not one label (several labels for a text: `problem: multi_label`)")
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f"holds {label}, not a label")
    if isinstance(label, bool):
        return str(label).lower()
    return None if label in (None, "") else str(label)


def with_label_names(task, sources):
    """Fill in the label names from the train split where the task has none: numbers by value, others by name."""
    if task.labels is not None:
        return task
    if "train" not in sources:
        raise BadInput(f"task {task.name}: has no train split to take the labels from", "Give --train_file.")
    source = sources["train"]
    column = source.rows.data.column("label").combine_chunks()
    is_list = task.is_multi_label
    names = (column.flatten() if is_list else column).unique().drop_null().to_pylist()

    def first_place(name):
        labels = ((row["row"], row["label"]) for row in source.rows)
        return source.location(
            next(row for row, label in labels if name == label or (is_list and name in (label or [])))
        )

    decimal = next((name for name in names if is_number(name) and not is_whole(name)), None)
    if decimal is not None and sum(map(is_number, names)) > len(names) / 2:
        raise BadInput(
            f'{first_place(decimal)}: the label column "{task.label}" holds decimals such as {decimal}',
            f"To predict a number, write a YAML for --task with: files, text, label: {task.label}, labels: regression, "
            "metrics: [pearson, spearmanr].",
        )
    whole = [name for name in names if is_whole(name)]
    words = [name for name in names if not is_whole(name)]
    if whole and words and not is_list:
        raise BadInput(
            f'{source.origin}: the label column "{task.label}" mixes numbers ({whole[0]}: {first_place(whole[0])}) '
            f"and names ({words[0]}: {first_place(words[0])})",
            "Write all labels as names or all as numbers, or list them in a YAML: labels: [...].",
        )
    if len(names) < 2:
        raise BadInput(
            f'{source.origin}: the label column "{task.label}" has {len(names)} value(s): {", ".join(names)}',
            "A classifier needs two or more; is it the right column (--label_column)?",
        )
    return replace(task, labels=sorted(whole, key=lambda name: (int(name), name)) + sorted(words))


def is_number(text):
    try:
        return bool(np.isfinite(float(text)))
    except (TypeError, ValueError):  # None, words
        return False


def is_whole(text):
    return text.removeprefix("-").isdecimal()


def label_ids(task, values):
    """Return (ids, known) of label strings, two arrays: a label's id by its name, else as an id; floats in regression.

    Where a name is a number itself ("1" to "5"), there are names only. None, and an id of -1, mean unlabelled (not in
    multi-label, where a row's list is empty).
    """
    if task.is_regression:
        numbers = [float(value) if is_number(value) else np.nan for value in values]
        known = [value is None or is_number(value) for value in values]
        return np.array(numbers, dtype=np.float64), np.array(known, dtype=bool)
    ids = {name: position for position, name in enumerate(task.labels)}
    if not any(map(is_whole, task.labels)):
        ids |= {str(position): position for position in range(len(task.labels))}
    if not task.is_multi_label:  # there, -1 would be a column of the matrix
        ids = {None: UNLABELLED, str(UNLABELLED): UNLABELLED} | ids
    numbers = [ids.get(value, UNLABELLED) for value in values]
    known = [value in ids for value in values]
    return np.array(numbers, dtype=np.int64), np.array(known, dtype=bool)


def with_label_ids(task, split, source):
    """Return the rows of a source (see splits.Source) with ids in the place of label strings.

    A row whose label is unknown, or is missing outside of a test split, is left out and noted in source.bad_rows where
    the task skips bad rows, else BadInput; a missing one in data of the Hub is left out and counted.
    """
    rows, skips = source.rows, task.on_bad_row == "skip"
    ids, unknown = _ids_of_column(task, rows.data.column("label").combine_chunks())
    if task.is_regression and split.startswith("test") and (ids == UNLABELLED).all():
        ids = np.full(len(ids), np.nan)  # GLUE's STS-B: -1.0 in every row
    without = np.isnan(ids) if task.is_regression else (ids == UNLABELLED).reshape(len(ids), -1).any(axis=1)
    missing = without & ~unknown
    if split.startswith("test") and (missing.all() or not (skips and source.is_file)):
        missing[:] = False  # they can be predicted; whoever wants scores checks them (common.check_splits)
    flawed = np.flatnonzero(unknown | missing)
    # The first is told; an unknown label before a missing one, which data of the Hub may have.
    first = np.flatnonzero(unknown)[:1] if unknown.any() else flawed[:1]
    for position in (flawed if skips and source.is_file else first).tolist():
        row = rows[position]
        flaw = f'column "{task.label}" holds ' + (f"{row['label']!r}, no label" if unknown[position] else "no label")
        if source.is_file and skips:
            source.bad_rows.append([row["row"], flaw])
        elif source.is_file or unknown[position]:
            allowed = "a number" if task.is_regression else f"one of: {', '.join(task.labels[:20])}"
            hint = "" if task.is_regression or task.is_multi_label else nearest(row["label"], task.labels)
            raise BadInput(
                f"{split} split, {source.location(row['row'])}: {flaw}{hint} ({len(flawed)} such rows)",
                f"Each label must be {allowed}. Mend the rows, or leave them out: --on_bad_row skip.",
            )
        else:
            words = f"{len(flawed)} of {len(rows)} rows of {split} have no label; they are left out"
            log.warning(f"WARNING: {source.origin}: {words}")
    rows = rows.remove_columns("label").add_column("label", _arrow_column(ids))
    if len(flawed):
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), flawed))
    source.check_rows(rows)
    return rows


def _ids_of_column(task, column):
    """Return (ids, unknown) of an Arrow column of label strings (or of lists of them, in multi-label).

    ids: (rows,), in multi-label (rows, labels) of 0 and 1; unknown: (rows,), whether a row holds a string of no label.
    """
    import pyarrow.compute as pc

    strings = pc.dictionary_encode(column.flatten() if task.is_multi_label else column)
    # One more than the strings there are: for a null.
    ids, known = label_ids(task, [*strings.dictionary.to_pylist(), None])
    codes = strings.indices.fill_null(len(ids) - 1).to_numpy(zero_copy_only=False)
    ids, unknown = ids[codes], ~known[codes]
    if not task.is_multi_label:
        return ids, unknown
    row_of = pc.list_parent_indices(column).to_numpy()
    matrix = np.zeros((len(column), len(task.labels)), dtype=np.int8)
    matrix[row_of[~unknown], ids[~unknown]] = 1
    matrix[column.is_null().to_numpy(zero_copy_only=False)] = UNLABELLED
    return matrix, np.isin(np.arange(len(column)), row_of[unknown])


def _arrow_column(ids):
    import pyarrow as pa

    if ids.ndim == 1:
        return pa.array(ids)
    offsets = np.arange(len(ids) + 1, dtype=np.int32) * ids.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(ids.reshape(-1)))


def probabilities(task, logits):
    """Return each label's probability, in float64, shape (examples, labels): softmax, or sigmoid in multi-label."""
    if task.is_multi_label:
        return 1 / (1 + np.exp(-np.clip(logits.astype(np.float64), -700, 700)))  # exp(710) overflows
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def predictions_from_logits(task, logits):
    """Return what logits (examples, outputs) predict: label ids, values in regression, 0 and 1 in multi-label."""
    if task.is_regression:
        return logits[:, 0]
    if task.is_multi_label:
        return (probabilities(task, logits) > (task.thresholds or 0.5)).astype(int)
    return logits.argmax(axis=1)


def format_label(task, label):
    """Return a label, as an example of a split holds it, in words; a value in regression."""
    if task.is_multi_label:
        return task.separator.join(task.labels[position] for position in np.flatnonzero(label))
    return label if task.is_regression else task.labels[label]


def prediction_columns(task):
    """Return the names of the columns that predictions add to a table."""
    if task.is_regression:
        return ["predicted_value"]
    return ["predicted_label", "probability", *(f"probability_{name}" for name in task.labels)]


def prediction_rows(task, logits):
    """Yield the values of prediction_columns for each row of logits (examples, outputs)."""
    if task.is_regression:
        yield from ([float(value)] for value in logits[:, 0])
        return
    for logits_of_row, row in zip(logits, probabilities(task, logits), strict=True):
        if task.is_multi_label:  # as one string, and the probability of just these labels
            applies = predictions_from_logits(task, logits_of_row[None])[0].astype(bool)
            label = task.separator.join(name for name, does in zip(task.labels, applies, strict=True) if does)
            probability = np.where(applies, row, 1 - row).prod()
        else:
            label, probability = task.labels[int(row.argmax())], row.max()
        yield [label, float(probability), *(float(value) for value in row)]


def with_thresholds(task, logits, labels):
    """Return a multi-label task with the probability above which each label applies: where its F1 is highest."""
    from sklearn.metrics import precision_recall_curve

    thresholds = []
    for of_label, applies in zip(probabilities(task, logits).T, labels.T, strict=True):
        if not applies.any():  # nothing to choose by
            thresholds.append(0.5)
            continue
        precision, recall, cuts = precision_recall_curve(applies, of_label)  # a label applies from its cut on
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        best = int(f1[:-1].argmax())
        thresholds.append(float((cuts[best] + (cuts[best - 1] if best else 0)) / 2))
    return replace(task, thresholds=thresholds)


def majority_prediction(task, labels):
    """Return what a model that sees no text would predict: the most frequent label id; the mean in regression; in
    multi-label a list, 1 for each label that more than half of the examples have."""
    if task.is_multi_label:
        return (labels.mean(axis=0) > 0.5).astype(int).tolist()
    return float(np.mean(labels)) if task.is_regression else int(np.bincount(labels).argmax())
