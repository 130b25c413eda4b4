"""The rows of a task's splits, from the Hub or from files, with label ids; missing splits are made.

Rows lie in a cache of memory-mapped Arrow files named by their content, so that a second run reads nothing again, and a
large data set needs no memory.
"""

import hashlib
import json
import os
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from reader import BadInput, nearest, read_rows, table_format
from tasks import SPLIT_NAMES, check_task, write_json, write_text

UNLABELLED = -1  # the label id of an example without a label (the Hub's GLUE test sets); NaN in regression

# --------------------------------------------------------------------------------------------------- the Arrow cache


def cache_folder():
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "text-classification-scripts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts):
    """A name for content: 32 hexadecimal digits of the SHA-256 of `parts`, which must be JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def cached_table(key, schema, make_columns):
    """Return (Dataset, made): the table named `key` from the cache, made first where it is not there.

    make_columns() yields the columns of some rows at a time, as dicts of lists. The file is complete or absent: it is
    written under a temporary name and renamed.
    """
    import pyarrow as pa
    from datasets import Dataset

    path = cache_folder() / f"{key}.arrow"
    made = not path.exists()
    if made:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for columns in make_columns():
                    writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    return Dataset.from_file(str(path)), made


def one_process_at_a_time():
    """A lock for preparing data: one process of a machine downloads and tokenises, the others wait and read its cache.

    A file lock, not a barrier: a process that waits at a barrier dies of the collective's timeout when the data are
    large.
    """
    from filelock import FileLock

    return FileLock(cache_folder() / "prepare.lock")


# --------------------------------------------------------------------------------------------------- rows of a split


def load_splits(task, limits=None, refresh=False):
    """Read the task's data and return (task, splits, fingerprints).

    The task comes back with what was left open filled in: text columns, labels, the commit on the Hub. Each split is a
    Dataset with the text columns, `label` (an id; a float in regression; -1 or NaN where there is none) and `row` (the
    line in its file, or the row on the Hub). `limits` maps splits to a number of rows, drawn seeded and stratified.
    """
    if task.dataset:
        task, raw = _hub_splits(task, refresh)
    else:
        task, raw = _file_splits(task)
    task = _with_labels(task, raw)
    check_task(task)
    splits = {name: _with_label_ids(task, name, rows) for name, (rows, _) in raw.items()}
    splits = make_missing_splits(task, splits)
    for name, number in (limits or {}).items():
        if name not in splits:
            raise BadInput(f'--limit names the split "{name}"', f"Splits: {', '.join(splits)}.")
        if number < len(splits[name]):
            labels = np.array(splits[name]["label"])
            chosen, _ = stratified(labels, number, seed=0, classes=not task.is_regression, keep=0)
            splits[name] = splits[name].select(chosen)
    fingerprints = {}
    for name, rows in splits.items():
        source = raw[name if name in raw else "train"][1]
        # The rule of the made splits belongs to train, too: it says which rows were taken out.
        fingerprints[name] = digest(source, name, task.split, len(rows), (limits or {}).get(name))
    return task, splits, fingerprints


def _file_splits(task):
    raw = {}
    for name, file in task.files.items():
        try:
            with open(file, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError:
            next(iter(read_rows(file)))  # raises BadInput with the reason
        if not task.text:
            _, first = next(iter(read_rows(file)))
            task = replace(task, text=[_only_text_column(first, task.label, file)])
        key = digest("rows", content, table_format(file), task.text, task.label)
        raw[name] = (_raw_table(key, task, _file_values, name, file), key)
    return task, raw


def _file_values(task, split, file):
    # A test file may be without labels: it can still be predicted.
    needed = task.text if split.startswith("test") else [*task.text, task.label]
    for line, row in read_rows(file):
        for column in needed:
            if column not in row:
                option = "--label_column" if column == task.label else "--text_columns"
                raise BadInput(
                    f'{file}, line {line}: no column "{column}"{nearest(column, row)}',
                    f"Columns: {', '.join(row)}. Name the right one with {option}.",
                )
        texts = [row[column] for column in task.text]
        for column, text in zip(task.text, texts, strict=True):
            if not isinstance(text, str):
                raise BadInput(
                    f'{file}, line {line}: the column "{column}" holds {text!r}, not text', "Put the text in quotes."
                )
        yield line, texts, row.get(task.label)


def _only_text_column(row, label, where):
    """The column `text`, or the only one besides the label that holds text."""
    columns = [name for name, value in row.items() if name != label and isinstance(value, str)]
    if "text" in columns:
        return "text"
    if len(columns) != 1:
        raise BadInput(
            f"{where}: cannot tell the text column among: {', '.join(columns) or 'none'}",
            "Name it with --text_columns COLUMN, or two for sentence pairs: --text_columns FIRST,SECOND.",
        )
    return columns[0]


def _hub_splits(task, refresh):
    path, name = task.dataset["path"], task.dataset.get("name")
    commit = hub_commit(path, "dataset", task.dataset.get("revision"), refresh)
    task = replace(task, dataset={**task.dataset, "revision": commit})
    source = digest("hub", path, name, commit)
    listing = cache_folder() / f"{source}.json"
    downloaded = None
    if not listing.exists():
        downloaded = _download(path, name, commit)
        splits = {split: len(rows) for split, rows in downloaded.items() if split.startswith(SPLIT_NAMES)}
        write_json(listing, {"splits": splits, "columns": next(iter(downloaded.values())).column_names})
    content = json.loads(listing.read_text())
    if not task.text:
        task = replace(task, text=[_only_text_column(dict.fromkeys(content["columns"], ""), task.label, path)])
    for column in [*task.text, task.label]:
        if column not in content["columns"]:
            raise BadInput(
                f'{path}: no column "{column}"{nearest(column, content["columns"])}',
                f"Columns: {', '.join(content['columns'])}.",
            )
    raw = {}
    for split in content["splits"]:
        key = digest("rows", source, split, task.text, task.label)
        if downloaded is None and not (cache_folder() / f"{key}.arrow").exists():
            downloaded = _download(path, name, commit)
        raw[split] = (_raw_table(key, task, _hub_values, downloaded and downloaded[split]), key)
    return task, raw


def _hub_values(task, rows):
    names = getattr(rows.features[task.label], "names", None)  # of a ClassLabel
    for number, row in enumerate(rows):
        label = row[task.label]
        if names and label is not None:
            label = names[label] if label >= 0 else None
        yield number, [row[column] for column in task.text], label


def _download(path, name, commit):
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, name, revision=commit)
    except (DatasetNotFoundError, FileNotFoundError, ValueError) as error:
        raise BadInput(
            f"{path}{f' ({name})' if name else ''}: {' '.join(str(error).split())[:300]}",
            "Check `dataset: {path, name}` of the task.",
        ) from None
    except OSError as error:  # ConnectionError is one
        raise unreachable_hub(path, error) from None


def hub_commit(repository, kind, revision=None, refresh=False):
    """Return the commit of a Hub repository: the one it had when it was first used here; `refresh` asks the Hub again.

    kind is "model" or "dataset"; a revision that is a commit needs no asking.
    Raises BadInput where the Hub is out of reach or has no such repository.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError, HTTPError, RepositoryNotFoundError

    if revision and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    pin = cache_folder() / f"{kind}s--{repository}--{revision or 'main'}.commit".replace("/", "--")
    if pin.exists() and not refresh:
        return pin.read_text()
    try:
        commit = HfApi().repo_info(repository, repo_type=kind, revision=revision, timeout=30).sha
    except (RepositoryNotFoundError, GatedRepoError, HFValidationError):
        raise BadInput(
            f'the Hub has no {kind} "{repository}" that you may read',
            f"Check the name, log in with `hf auth login`, or give a {'folder' if kind == 'model' else 'file'}.",
        ) from None
    except (OSError, HTTPError) as error:  # HTTPError is of the library underneath: a refused connection, a time-out
        # Somebody may have downloaded it with another tool, for a cluster's compute nodes without a network.
        known = Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "refs", revision or "main")
        if not known.exists():
            raise unreachable_hub(repository, error) from None
        commit = known.read_text().strip()
    write_text(pin, commit)
    return commit


def unreachable_hub(repository, error):
    from huggingface_hub import constants

    words = " ".join(str(error).split())[:200]
    return BadInput(
        f"cannot download {repository} from {constants.ENDPOINT} ({words})",
        "Check the network or set HF_ENDPOINT to a mirror, give local files (--train_file, --model FOLDER), "
        "or try `--task demo`, which needs no network.",
    )


def _raw_table(key, task, read_values, *source):
    import pyarrow as pa

    schema = pa.schema([*((column, pa.string()) for column in task.text), ("label", pa.string()), ("row", pa.int64())])

    def columns():
        values = iter(read_values(task, *source))
        while some := list(islice(values, 1000)):
            rows, texts, labels = zip(*some, strict=True)
            by_column = dict(zip(task.text, zip(*texts, strict=True), strict=True))
            for row, label in zip(rows, labels, strict=True):
                if isinstance(label, (list, dict)):
                    raise BadInput(
                        f"row {row}: the label is {label!r}", "Give each example one label, as a name or id."
                    )
            labels = [None if label in (None, "") else str(label) for label in labels]
            yield {**{name: list(column) for name, column in by_column.items()}, "label": labels, "row": list(rows)}

    return cached_table(key, schema, columns)[0]


# ------------------------------------------------------------------------------------------------------------ labels


def _with_labels(task, raw):
    """Fill in the label names from the train split where the task has none: numbers by value, others by name."""
    if task.labels is not None:
        return task
    if "train" not in raw:
        raise BadInput(f"task {task.name}: has no train split to take the labels from", "Give --train_file.")
    names = [name for name in raw["train"][0].data.column("label").unique().to_pylist() if name is not None]
    if any(_is_number(name) and not _is_whole(name) for name in names):
        decimal = next(name for name in names if _is_number(name) and not _is_whole(name))
        raise BadInput(
            f'the label column "{task.label}" holds decimals such as {decimal}',
            f"To predict a number, write a YAML for --task with: files, text, label: {task.label}, labels: regression, "
            "metrics: [pearson, spearmanr].",
        )
    if len(names) < 2:
        raise BadInput(
            f'the label column "{task.label}" of the train split has {len(names)} value(s): {", ".join(names)}',
            "A classifier needs two or more; is it the right column (--label_column)?",
        )
    return replace(
        task, labels=sorted(names, key=lambda name: (0, int(name), name) if _is_whole(name) else (1, 0, name))
    )


def _is_number(text):
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _is_whole(text):
    return text.removeprefix("-").isdecimal()


def label_ids(task, values):
    """Return the label ids of strings, as an array: by name, else as an id; floats in regression.

    Where a name is a number itself ("1" to "5"), there are names only. None, and an id of -1, mean unlabelled. Raises
    KeyError with the first value that is none of these.
    """
    if task.is_regression:
        try:
            numbers = np.array([np.nan if value is None else float(value) for value in values])
        except ValueError:
            raise KeyError(next(value for value in values if value is not None and not _is_number(value))) from None
        if np.isinf(numbers).any():
            raise KeyError(values[int(np.isinf(numbers).argmax())])
        return numbers
    ids = {name: position for position, name in enumerate(task.labels)}
    if not any(_is_whole(name) for name in task.labels):
        ids |= {str(position): position for position in range(len(task.labels))}
    ids = {None: UNLABELLED, str(UNLABELLED): UNLABELLED} | ids
    return np.array([ids[value] for value in values], dtype=np.int64)


def _with_label_ids(task, split, rows):
    """Replace the column of label strings by one of ids; check that train and validation have a label in each row."""
    import pyarrow as pa

    strings = rows.data.column("label").to_pylist()
    try:
        ids = label_ids(task, strings)
    except KeyError as error:
        row = rows[strings.index(error.args[0])]["row"]
        allowed = "a number" if task.is_regression else f"one of: {', '.join(task.labels[:20])}"
        raise BadInput(
            f"{split} split, row {row}: the label is {error.args[0]!r}"
            + ("" if task.is_regression else nearest(error.args[0], task.labels)),
            f"Each label must be {allowed}.",
        ) from None
    if task.is_regression and split.startswith("test") and (ids == UNLABELLED).all():
        ids = np.full(len(ids), np.nan)  # GLUE's STS-B: -1.0 in every row
    missing = np.flatnonzero(np.isnan(ids) if task.is_regression else ids == UNLABELLED)
    if len(missing) and not split.startswith("test"):
        raise BadInput(
            f"{split} split, row {rows[int(missing[0])]['row']}: no label ({len(missing)} such rows)",
            "Give each row a label, or take it out.",
        )
    column = pa.array(ids, type=pa.float64() if task.is_regression else pa.int64())
    return rows.remove_columns("label").add_column("label", column)


# ------------------------------------------------------------------------------------------------------ made splits


def stratified(labels, number, seed, classes=True, keep=1):
    """Draw `number` of the rows so that each class keeps its share; return (drawn, rest), sorted row numbers.

    The shares are rounded by largest remainder, so that they add up. A class keeps at least `keep` rows in the rest.
    With classes=False the rows are drawn at random (regression).
    """
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels == value) for value in np.unique(labels)] if classes else [np.arange(len(labels))]
    groups = [generator.permutation(group) for group in groups]
    exact = np.array([len(group) * number / len(labels) for group in groups])
    counts = np.floor(exact).astype(int)
    for position in np.argsort(counts - exact, kind="stable")[: number - counts.sum()]:
        counts[position] += 1
    counts = np.minimum(counts, [len(group) - keep for group in groups]) if classes else counts
    drawn = np.sort(np.concatenate([group[:count] for group, count in zip(groups, counts, strict=True)]))
    return drawn, np.setdiff1d(np.arange(len(labels)), drawn)


def make_missing_splits(task, splits):
    """Take the splits that are missing out of train: by the task's fractions, else 10 % for validation."""
    if "train" not in splits:
        return splits
    fractions = {name: share for name, share in task.split.items() if name != "seed" and name not in splits}
    if "validation" not in fractions and not any(name.startswith("validation") for name in splits):
        fractions["validation"] = 0.1
    number_of_rows = len(splits["train"])
    for name, share in fractions.items():
        if not isinstance(share, float) or not 0 < share < 1:
            raise BadInput(f"task {task.name}: `split` has {name}: {share!r}", "Write a fraction such as 0.1.")
        labels = np.array(splits["train"]["label"])
        number = max(1, round(share * number_of_rows))
        drawn, rest = stratified(labels, number, task.split.get("seed", 42), classes=not task.is_regression)
        if number >= len(labels) or not len(drawn):
            raise BadInput(
                f"too few rows ({number_of_rows}) to make a {name} split", f"Give --{name}_file, or more rows."
            )
        splits = {**splits, name: splits["train"].select(drawn), "train": splits["train"].select(rest)}
    return splits
