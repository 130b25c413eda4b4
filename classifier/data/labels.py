"""Labels: strings of a table -> ids (classes), floats (regression), 0s and 1s (multi-label); logits -> labels.

Invalid labels are reported with their row.
"""

import ast
import io
import json
import math
import tokenize
from dataclasses import replace

import numpy as np

from classifier.messages import BadInput, format_name, join_some, list_names, log, nearest

UNLABELLED = -1  # the label id of an example without a label (the Hub's GLUE test sets); NaN in regression

# ------------------------------------------------------------------------------------------- strings of a table -> ids


def label_columns(task):
    """Return the columns of the labels: one, or one of 0 and 1 for each label."""
    return task.label if isinstance(task.label, list) else [task.label]


def row_labels(task, row):
    """Return the label of a row as a string, in multi-label as a list of strings; None where there is none.

    Raises ValueError, whose message is the row's problem.
    """
    if isinstance(task.label, str):
        try:
            return label_strings(task, row.get(task.label))
        except ValueError as error:
            raise ValueError(f'column "{task.label}" {error}') from None
    values = {column: row.get(column) for column in task.label}
    if all(value in (None, "") or str(value) in UNLABELLED_SPELLINGS for value in values.values()):
        return None
    for column, value in values.items():
        if str(value) not in MULTI_HOT:
            raise ValueError(f'column "{column}" holds {"nothing" if value in (None, "") else repr(value)}, not 0 or 1')
    return [name for name, value in zip(task.labels, values.values(), strict=True) if MULTI_HOT[str(value)]]


def label_strings(task, label):
    """Return a label as a string, in multi-label as a list of strings; None where there is none.

    Raises ValueError, whose message is the row's problem.
    """
    if isinstance(label, str) and (cell := _list_in_cell(task, label)) is not None:
        label = cell
    if task.is_multi_label and isinstance(label, str):
        return [part.strip() for part in label.split(task.separator) if part.strip()]
    if task.is_multi_label and label is not None:
        single, labels = replace(task, problem=None), label if isinstance(label, list) else [label]
        strings = [label_strings(single, each) for each in labels]
        if None in strings:
            raise ValueError(f"holds {label!r}, a list with an empty label")
        return strings
    if isinstance(label, (list, dict)):
        raise ValueError(f"holds {label!r}, not one label (for several labels per text: `problem: multi_label`)")
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f"holds {label}, not a label")
    if isinstance(label, bool):
        return str(label).lower()
    return None if label in (None, "") else str(label)


def _list_in_cell(task, cell):
    """Return the list that a cell holds as text, as pandas writes it (JSON or Python); None if it is no list.

    Raises ValueError for a cell of a multi-label column that looks like a list and is none.
    """
    if not cell.strip().startswith("["):
        return None
    for parse in (json.loads, _python_list):
        try:
            values = parse(cell.strip())
        except (ValueError, SyntaxError, tokenize.TokenError):
            continue
        if isinstance(values, list):
            return values
    if task.is_multi_label:
        raise ValueError(f'holds {cell!r}, which looks like a list and is none (a list: ["one", "two"])')
    return None


def _python_list(text):
    values = ast.literal_eval(text)
    strings = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type == tokenize.STRING]
    if len(strings) != sum(isinstance(value, str) for value in values):
        raise ValueError("numpy's ['a' 'b'], which Python would read as ['ab']")
    return values


def with_label_names(task, sources):
    """Return the task with label names from the train split where it has none: numbers by value, others by name.

    sources: {split: splits.Source}. Raises BadInput for labels that are decimals, mixed, or a single one.
    """
    if task.labels is not None:
        return task
    if "train" not in sources:
        raise BadInput(f"task {task.name}: has no train split to take the labels from", "Give --train_file.")
    source = sources["train"]
    column = source.rows.data.column("label").combine_chunks()
    names = (column.flatten() if task.is_multi_label else column).unique().drop_null().to_pylist()

    def first_location(name):
        for row in source.rows:
            if name == row["label"] or (task.is_multi_label and name in (row["label"] or [])):
                return source.location(row["row"])

    # pandas writes whole numbers as floats where a cell of the column was empty once.
    if any(name.endswith(".0") for name in names) and all(is_whole(name.removesuffix(".0")) for name in names):
        names = sorted({name.removesuffix(".0") for name in names})
        log.info(
            f'{source.origin}: the whole numbers of "{task.label}", such as {names[-1]}.0, are classes; '
            "to predict a number, write `labels: regression` in a YAML for --task"
        )
    decimal = next((name for name in names if is_number(name) and not is_whole(name)), None)
    if decimal is not None and sum(map(is_number, names)) > len(names) / 2:
        raise BadInput(
            f'{first_location(decimal)}: the label column "{task.label}" holds decimals such as {decimal}',
            f"To predict a number, write a YAML for --task with: files, text, label: {task.label}, labels: regression, "
            "metrics: [pearson, spearmanr].",
        )
    numbers = [name for name in names if is_whole(name)]
    others = [name for name in names if not is_whole(name)]
    if numbers and others and not task.is_multi_label:
        number, word = (f"{format_name(name)}: {first_location(name)}" for name in (numbers[0], others[0]))
        raise BadInput(
            f'{source.origin}: the label column "{task.label}" mixes numbers ({number}) and names ({word})',
            "Write all labels as names or all as numbers, or list them in a YAML: labels: [...].",
        )
    if len(names) < 2:
        raise BadInput(
            f'{source.origin}: the label column "{task.label}" has {len(names)} value(s): {list_names(names)}',
            "A classifier needs two or more; is it the right column (--label_column)?",
        )
    return replace(task, labels=sorted(numbers, key=lambda name: (int(name), name)) + sorted(others))


def is_number(text):
    """Return whether a string, or None, is a finite number."""
    try:
        return bool(np.isfinite(float(text)))
    except (TypeError, ValueError):
        return False


def is_whole(text):
    """Return whether a string is an integer."""
    return text.removeprefix("-").isdecimal()


UNLABELLED_SPELLINGS = ("-1", "-1.0", "nan")
MULTI_HOT = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1, "False": 0, "True": 1}


def is_multi_hot(task, sources):
    """Return whether a multi-label task's lists hold one 0 or 1 for each label, and not the labels that apply.

    sources: {split: splits.Source}. They do where all have as many values as there are labels, and nothing but 0 and
    1, or true and false. Raises BadInput where such lists may be either, or where the labels have no names.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    names_are_numbers = task.labels and any(map(is_whole, task.labels))
    if not task.is_multi_label or isinstance(task.label, list) or names_are_numbers:
        return False
    columns = [source.rows.data.column("label").combine_chunks() for source in sources.values()]
    column = pa.concat_arrays(columns).drop_null()
    values, lengths = pc.unique(column.flatten()).to_pylist(), pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) != 1 or lengths[0] < 2 or not set(values) <= MULTI_HOT.keys():
        return False
    rows = np.array([MULTI_HOT[value] for value in column.flatten().to_pylist()]).reshape(len(column), -1)
    # As ids each label is named once: two are alike in any row of three or more.
    may_be_ids = set(values) <= {"0", "1"} and not (lengths[0] > 2 or (rows[:, 0] == rows[:, 1]).any())
    origin = next(iter(sources.values())).origin
    example = f'{origin}: the column "{task.label}" holds lists such as [{join_some(column[0].as_py())}]'
    if task.labels is None:
        if may_be_ids:
            return False
        raise BadInput(
            f"{example}: one 0 or 1 for each label, whose names are not known",
            "List the names in a YAML for --task, in this order: labels: [first, second, ...].",
        )
    if lengths[0] != len(task.labels):
        if may_be_ids:
            return False
        reason = f"{example}, and the task has {len(task.labels)} labels: {list_names(task.labels)}"
        raise BadInput(reason, "Write as many 0 and 1 as there are labels, or the names of those that apply.")
    if may_be_ids:
        raise BadInput(
            f"{example}: one 0 or 1 for each of the {len(task.labels)} labels, or the ids of those that apply",
            "Write true and false for the first, and names of labels for the second.",
        )
    return True


OTHER_SPELLINGS = {"true": ["True", "TRUE"], "false": ["False", "FALSE"], "True": ["true"], "False": ["false"]}


def label_ids(task, values):
    """Return (ids, whether it is known) of label strings, two arrays; in regression floats.

    A string is the name of a label, else its id; where a name is itself a whole number ("1" to "5"), only names count.
    None and the id -1 mean unlabelled, except in multi-label, where an unlabelled row has an empty list.
    """
    if task.is_regression:
        numbers = [float(value) if is_number(value) else np.nan for value in values]
        known = [value is None or is_number(value) for value in values]
        return np.array(numbers, dtype=np.float64), np.array(known, dtype=bool)
    ids = {name: position for position, name in enumerate(task.labels)}
    # Other spellings of the same: 1.0 of a column of floats, true of JSON and True of a CSV that Python wrote.
    ids = {f"{name}.0": position for name, position in ids.items() if is_whole(name)} | ids
    ids = {spelling: ids[name] for name in ids for spelling in OTHER_SPELLINGS.get(name, [])} | ids
    if not any(map(is_whole, task.labels)):
        ids |= {str(position): position for position in range(len(task.labels))}
    if not task.is_multi_label:  # there, -1 would be a column of the matrix
        ids = {None: UNLABELLED, str(UNLABELLED): UNLABELLED} | ids
    numbers = [ids.get(value, UNLABELLED) for value in values]
    known = [value in ids for value in values]
    return np.array(numbers, dtype=np.int64), np.array(known, dtype=bool)


def with_label_ids(task, split, source, multi_hot=False):
    """Return the rows of a splits.Source with ids in place of label strings. multi_hot: of is_multi_hot.

    A row with an unknown label, or outside of test splits without a label, is bad: skipped and added to source.bad_rows
    where the task skips bad rows, else BadInput. In Hub data a missing label is skipped with a warning.
    """
    rows, skips = source.rows, task.on_bad_row == "skip" and source.is_file
    ids, unknown = _encode_labels(task, rows.data.column("label").combine_chunks(), multi_hot)
    if task.is_regression and split.startswith("test") and (ids == UNLABELLED).all():
        ids = np.full(len(ids), np.nan)  # GLUE's STS-B: -1.0 in every row
    unlabelled = np.isnan(ids) if task.is_regression else (ids == UNLABELLED).reshape(len(ids), -1).any(axis=1)
    missing = unlabelled & ~unknown
    if split.startswith("test") and (missing.all() or not skips):
        missing[:] = False  # they can be predicted; common.check_splits refuses to score them
    bad = np.flatnonzero(unknown | missing)
    # Only the first is reported, and an unknown label before a missing one, which Hub data may have.
    first = np.flatnonzero(unknown)[:1] if unknown.any() else bad[:1]
    for position in (bad if skips else first).tolist():
        row = rows[position]
        quoted = repr(row["label"]) if skips else format_name(repr(row["label"]), 100)  # bad_rows.csv has room for all
        value = f"{quoted}, no label" if unknown[position] else "no label"
        problem = f'column "{label_columns(task)[0]}" holds {value}'
        if skips:
            source.bad_rows.append([row["row"], problem])
        elif source.is_file or unknown[position]:
            allowed = "a number" if task.is_regression else f"one of: {list_names(task.labels)}"
            hint = "" if task.is_regression or task.is_multi_label else nearest(row["label"], task.labels)
            raise BadInput(
                f"{split} split, {source.location(row['row'])}: {problem}{hint} ({len(bad)} such rows)",
                f"Each label must be {allowed}. Fix the rows, or skip them: --on_bad_row skip.",
            )
        else:
            reason = f"{len(bad)} of {len(rows)} rows of {split} have no label and are skipped"
            log.warning(f"WARNING: {source.origin}: {reason}")
    rows = rows.remove_columns("label").add_column("label", _arrow_column(ids))
    if len(bad):
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), bad))
    source.check_rows(rows)
    return rows


def _encode_labels(task, column, multi_hot):
    """Return (ids, unknown) of an Arrow column of label strings, or in multi-label of lists of them.

    ids: (rows,), in multi-label (rows, labels) of 0 and 1; unknown: (rows,), whether a row holds an unknown label.
    """
    import pyarrow.compute as pc

    if multi_hot:
        matrix = np.full((len(column), len(task.labels)), UNLABELLED, dtype=np.int8)
        flat = [MULTI_HOT[value] for value in column.flatten().to_pylist()]
        matrix[column.is_valid().to_numpy(zero_copy_only=False)] = np.array(flat).reshape(-1, len(task.labels))
        return matrix, np.zeros(len(column), dtype=bool)
    strings = pc.dictionary_encode(column.flatten() if task.is_multi_label else column)
    # The additional last one is the id of a null.
    ids, known = label_ids(task, [*strings.dictionary.to_pylist(), None])
    codes = strings.indices.fill_null(len(ids) - 1).to_numpy(zero_copy_only=False)
    ids, unknown = ids[codes], ~known[codes]
    if not task.is_multi_label:
        return ids, unknown
    rows = pc.list_parent_indices(column).to_numpy()  # the row of each string
    matrix = np.zeros((len(column), len(task.labels)), dtype=np.int8)
    matrix[rows[~unknown], ids[~unknown]] = 1
    matrix[column.is_null().to_numpy(zero_copy_only=False)] = UNLABELLED
    # An id that stands twice, as in [0, 1, 1]: rather a 0 or 1 for each label, among lists of another length.
    is_id = np.array([*map(is_whole, strings.dictionary.to_pylist()), False])[codes]
    lengths, ids_only = (np.bincount(rows, weights, len(column)) for weights in (None, is_id))
    twice = (lengths > (matrix == 1).sum(axis=1)) & (lengths == ids_only)
    return matrix, np.isin(np.arange(len(column)), rows[unknown]) | twice


def _arrow_column(ids):
    """Return ids (rows,), or a matrix (rows, labels) as lists, as an Arrow array."""
    import pyarrow as pa

    if ids.ndim == 1:
        return pa.array(ids)
    offsets = np.arange(len(ids) + 1, dtype=np.int32) * ids.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(ids.reshape(-1)))


# --------------------------------------------------------------------------------------------------- logits -> labels


def probabilities(task, logits):
    """Return each label's probability, (examples, labels) in float64: the softmax, in multi-label the sigmoid.

    The logits are divided by the task's temperature, if it has one.
    """
    logits = logits.astype(np.float64) / (task.temperature or 1.0)
    if task.is_multi_label:
        return 1 / (1 + np.exp(-np.clip(logits, -700, 700)))  # exp(710) overflows
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def predictions_from_logits(task, logits):
    """Return the predictions of logits (examples, outputs): ids, in regression values, in multi-label 0 and 1."""
    if task.is_regression:
        return logits[:, 0]
    if task.is_multi_label:
        return (probabilities(task, logits) > (task.thresholds or 0.5)).astype(int)
    return logits.argmax(axis=1)


def format_label(task, label):
    """Return the name of a label as a split's example holds it: an id, or a row of 0 and 1; regression: the value."""
    if task.is_multi_label:
        return task.separator.join(task.labels[position] for position in np.flatnonzero(label))
    return label if task.is_regression else task.labels[label]


def prediction_columns(task):
    """Return the names of the columns that predictions add to a table."""
    if task.is_regression:
        return ["predicted_value"]
    columns = ["predicted_label", "probability", *(f"probability_{name}" for name in task.labels)]
    if isinstance(task.label, list):  # as the labels were read: 0 or 1 for each
        columns += [f"predicted_{name}" for name in task.labels]
    return columns


def prediction_rows(task, logits):
    """Yield the values of prediction_columns for each row of logits (examples, outputs)."""
    if task.is_regression:
        yield from ([float(value)] for value in logits[:, 0])
        return
    for row, row_probabilities in zip(logits, probabilities(task, logits), strict=True):
        if task.is_multi_label:  # the labels as one string, and the probability of exactly this set
            applies = predictions_from_logits(task, row[None])[0].astype(bool)
            label = format_label(task, applies)
            probability = np.where(applies, row_probabilities, 1 - row_probabilities).prod()
        else:
            label, probability = task.labels[int(row_probabilities.argmax())], row_probabilities.max()
        values = [label, float(probability), *map(float, row_probabilities)]
        yield [*values, *map(int, applies)] if isinstance(task.label, list) else values


def weights_of_classes(words, task, labels, device=None):
    """Return the weight of each class, shape (labels,), with a mean of 1 over the examples; None for "none".

    In multi-label it is how often each positive counts, not averaged. words: "balanced", inversely proportional to the
    frequency (in multi-label negatives / positives); or "a=1,b=5", where classes that are not named count 1. Raises
    BadInput for other words.
    """
    import torch

    if words == "none":
        return None
    weights = np.ones(len(task.labels))
    if words == "balanced":
        positives = labels.sum(axis=0) if task.is_multi_label else np.bincount(labels, minlength=len(task.labels))
        weights = np.maximum(len(labels) - positives, 1) if task.is_multi_label else weights
        weights = weights / np.maximum(positives, 1)
    else:
        for word in words.split(","):
            name, _, number = word.rpartition("=")
            try:
                weights[task.labels.index(name)] = float(number)
            except ValueError:
                number = "nan"
            if not 0 < float(number) < math.inf:
                reason = f"--class_weights {word}: not a label of this task and a number above 0"
                example = f"{task.labels[0]}=1,{task.labels[-1]}=5"
                raise BadInput(reason + nearest(name, task.labels), f"Write balanced, or for example {example}.")
    scale = 1 if task.is_multi_label else weights[labels].mean()
    return torch.tensor(weights / scale, dtype=torch.float32, device=device)


def majority_prediction(task, labels):
    """Return the best prediction without a text: the most frequent label id; in regression the mean.

    In multi-label a list, with 1 for each label of more than half of the examples.
    """
    if task.is_multi_label:
        return (labels.mean(axis=0) > 0.5).astype(int).tolist()
    return float(np.mean(labels)) if task.is_regression else int(np.bincount(labels).argmax())
