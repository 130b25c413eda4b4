"""A task's splits, read from the Hub or from files, with label ids; missing splits are made from train."""

import hashlib
import json
import warnings
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from classifier.data import cache
from classifier.data.labels import is_multi_hot, label_columns, row_labels, with_label_ids, with_label_names
from classifier.data.reader import check_file, read_rows, table_format
from classifier.data.tasks import SPLIT_NAMES, is_url
from classifier.files import digest, sha256, write_json
from classifier.messages import BadInput, BadRow, list_names, location, log, nearest

# -------------------------------------------------------------------------------------------------------------- splits


@dataclass
class Source:
    """One split as it was read, with its labels as strings."""

    rows: object  # a Dataset with the text columns, `label`, `group` (or None), `row` and `hash`
    key: str  # a digest of the content and of how it is read
    origin: str  # a file, or a data set of the Hub
    is_file: bool
    bad_rows: list  # [row, problem] of those that were skipped

    def location(self, row):
        """Return how messages name a row, by its number in the file or on the Hub."""
        return location(self.origin, row) if self.is_file else f"{self.origin}, row {row}"

    def check_rows(self, rows):
        """Raise BadInput unless some rows are left."""
        if not len(rows):
            example = f" (the first: {self.bad_rows[0][1]})" if self.bad_rows else ""
            raise BadInput(f"{self.origin}: every row is bad{example}", "Check the data: there is nothing left to use.")


def load_splits(task, refresh=False):
    """Read the task's data and return (task, splits, fingerprints, bad_rows).

    The task comes back with its text columns, labels and Hub commit filled in. Each split is a Dataset with the text
    columns, `label`, `row` (the line in its file, or the row on the Hub) and `hash` (16 bytes, of the texts). A label
    is an id, in regression a float, in multi-label a 0 or 1 for each label; -1 (NaN in regression) means unlabelled.
    `bad_rows` lists the skipped rows as dicts of split, file, row and reason.
    Raises BadInput for data that cannot be read or do not fit the task.
    """
    task, sources = _hub_splits(task, refresh) if task.dataset else _file_splits(task, refresh)
    multi_hot = is_multi_hot(task, sources)
    task = with_label_names(task, sources)
    splits = {name: with_label_ids(task, name, source, multi_hot) for name, source in sources.items()}
    splits = make_missing_splits(task, splits)
    for name, number in task.limit.items():
        if name not in splits:
            raise BadInput(f'--limit names the split "{name}"', f"Splits: {', '.join(splits)}.")
        if number < len(splits[name]):
            drawn, _ = stratified(cache.column_array(splits[name], "label"), number, seed=0, keep=0)
            splits[name] = splits[name].select(drawn)
    fingerprints = {}
    for name, rows in splits.items():
        key = sources[name if name in sources else "train"].key
        # The row numbers cover everything else: made splits, limits, labels that order a draw, skipped rows.
        fingerprints[name] = digest(key, name, hashlib.sha256(cache.column_array(rows, "row").tobytes()).hexdigest())
    bad_rows = [
        {"split": name, "file": source.origin, "row": row, "reason": reason}
        for name, source in sources.items()
        for row, reason in sorted(source.bad_rows)
    ]
    return task, splits, fingerprints, bad_rows


def check_files(task):
    """Raise BadInput where a file of the task is missing."""
    for file in (task.files or {}).values():
        try:
            if not is_url(file):
                check_file(file)
        except BadInput as error:
            advice = f"{error.advice} The task's data come from {task.source}." if task.source else error.advice
            raise BadInput(error.reason, advice) from None


def _file_splits(task, refresh):
    check_files(task)
    sources = {}
    for name, file in task.files.items():
        path = cache.download_file(file, refresh) if is_url(file) else file
        options = _read_options(task)
        try:
            content = sha256(path.partition("::")[0])
            if not task.text:
                _, first = next(read_rows(path, **options, on_bad_row="skip"), (0, {}))
                task = replace(task, text=[_only_text_column(first, task, path)])
        except OSError:
            next(read_rows(path))  # raises BadInput with the reason
        member, labels = path.partition("::")[2].replace("\\", "/"), [task.label, task.problem, task.separator]
        key = digest("rows", content, member, table_format(path), task.text, labels, options)
        # "lists": cells that hold lists were read as strings once.
        table = digest(key, "lists", task.split.get("group"), task.on_bad_row, name.startswith("test"))
        sources[name] = _cached_source(key, table, task, path, True, _file_rows(task, name, path))
    return task, sources


def _read_options(task):
    """Return the options of read_rows for the task's files."""
    return {name: getattr(task, name) for name in ("columns", "quoting", "encoding", "delimiter")}


def _file_rows(task, split, path):
    """Yield (line, texts, label, group) for each row of a file, or a BadRow."""
    needed, needs_label = _needed_columns(task, split), not split.startswith("test")
    group = task.split.get("group") if split == "train" else None
    is_json = table_format(path).startswith("json")  # there, each row has its own columns
    kinds = {}  # of labels: mixing true and "positive" would create an extra class
    for line, row in read_rows(path, **_read_options(task), on_bad_row="yield"):
        if isinstance(row, BadRow):
            yield row
            continue
        missing = next((column for column in needed if column not in row), None)
        if missing:
            problem, advice = _missing_column(missing, row, task)
            if not is_json:
                raise BadInput(f"{location(path, line)}: {problem}", advice)
            yield BadRow(path, line, problem, f"{advice} Fix this row")
            continue
        try:
            texts, label = _texts_and_label(task, row, needs_label)
        except ValueError as error:
            yield BadRow(path, line, str(error))
            continue
        if label is not None and not (task.is_multi_label or task.is_regression):
            value = row[task.label]
            kind = {bool: "true or false", str: "a string"}.get(type(value), "a number")
            kinds.setdefault(kind, f"{location(path, line)} holds {value!r}, {kind}")
            if len(kinds) > 1:
                reason = f'the column "{task.label}": {"; ".join(kinds.values())}'
                raise BadInput(reason, "Write all labels the same way.")
        yield line, texts, label, row.get(group)


def _needed_columns(task, split):
    """Return the columns that a split's file must have."""
    labels = [] if split.startswith("test") else label_columns(task)  # unlabelled, it can still be predicted
    group = [task.split["group"]] if split == "train" and "group" in task.split else []
    return [*task.text, *labels, *group]


def _texts_and_label(task, row, needs_label):
    """Return (texts, label string) of a row of a file. Raises ValueError, whose message is the row's problem."""
    texts = [row[column] for column in task.text]
    for column, text in zip(task.text, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'column "{column}" {"is empty" if text in (None, "") else f"holds {text!r}, not text"}')
    label = row_labels(task, row)
    if label is None and needs_label:
        raise ValueError(f'column "{label_columns(task)[0]}" holds no label')
    return texts, label


def _missing_column(column, row, task):
    """Return (problem, advice) for a column that a row does not have."""
    option = "--group_column" if column == task.split.get("group") else "--text_columns"
    if column in label_columns(task):
        option = "--label_column" if column == task.label else "--label_columns"
    advice = f"Columns: {list_names(row)}. Name the right one with {option}."
    return f'no column "{column}"{nearest(column, row)}', advice


def _only_text_column(row, task, origin):
    """Return `text`, or the only column besides the label and the group that holds text. Raises BadInput."""
    others = (*label_columns(task), task.split.get("group"))
    if "text" in row and "text" not in others:
        return "text"
    columns = [name for name, value in row.items() if name not in others and isinstance(value, str)]
    if len(columns) != 1:
        reason = f"{origin}: cannot tell the text column among: {list_names(columns) or 'none'}"
        advice = "Name it with --text_columns COLUMN, or two for sentence pairs: --text_columns FIRST,SECOND."
        raise BadInput(reason, advice)
    return columns[0]


def read_column(task, name, rows, column):
    """Return another column of the data for the rows of a split, as strings. Raises BadInput where there is none."""
    if task.dataset:
        hub_name = (task.splits or {}).get(name, name)
        table = cache.download(task.dataset["path"], task.dataset.get("name"), task.dataset["revision"])
        table = table[hub_name if hub_name in table else "train"]  # a made split consists of rows of train
        if column not in table.column_names:
            reason = f'{task.dataset["path"]}: has no column "{column}"{nearest(column, table.column_names)}'
            raise BadInput(reason, f"Columns: {list_names(table.column_names)}.")
        return [str(value) for value in table.select(rows["row"])[column]]
    file = task.files[name if name in task.files else "train"]
    path = cache.download_file(file, refresh=False) if is_url(file) else file
    values = {}
    for line, row in read_rows(path, **_read_options(task), on_bad_row="skip"):
        if column not in row:
            reason = f'{location(file, line)}: has no column "{column}"{nearest(column, row)}'
            raise BadInput(reason, f"Columns: {list_names(row)}.")
        values[line] = str(row[column])
    return [values[line] for line in rows["row"]]


def _hub_splits(task, refresh):
    path, name = task.dataset["path"], task.dataset.get("name")
    commit = cache.hub_commit(path, "dataset", task.dataset.get("revision"), refresh)
    task = replace(task, dataset={**task.dataset, "revision": commit})
    repository = digest("hub", path, name, commit)
    listing = cache.cache_folder() / f"{repository}.json"
    downloaded = None
    if not listing.exists():
        downloaded = cache.download(path, name, commit)
        features = next(iter(downloaded.values())).features
        types = {column: getattr(feature, "dtype", "list") for column, feature in features.items()}
        names = {column: _class_names(feature) for column, feature in features.items()}
        write_json(listing, {"splits": list(downloaded), "columns": types, "names": names})
    content = json.loads(listing.read_text(encoding="utf-8"))
    task = _check_hub_columns(task, content["columns"])
    if task.labels is None:
        task = replace(task, labels=content["names"].get(task.label))  # label columns bring their own names
    hub_names = content["splits"]
    chosen = task.splits or {split: split for split in hub_names if split.startswith(SPLIT_NAMES)}
    unused = [split for split in hub_names if split not in chosen.values()]
    if not task.splits and unused:
        log.info(f"{path}: not used: {', '.join(unused)} (`splits: {{validation: {unused[0]}}}` in a YAML would)")
    sources = {}
    for split, hub_name in chosen.items():
        if hub_name not in hub_names:
            reason = f'{path}: has no split "{hub_name}"{nearest(hub_name, hub_names)}'
            raise BadInput(reason, f"Splits: {', '.join(hub_names)}.")
        key = digest("rows", repository, split, hub_name, task.text, task.label, task.problem, task.separator)
        table = digest(key, task.split.get("group"))
        if downloaded is None and not cache.table_path(table).exists():
            downloaded = cache.download(path, name, commit)
        rows = _hub_rows(task, downloaded and downloaded[hub_name])
        sources[split] = _cached_source(key, table, task, path, False, rows)
    return task, sources


def _check_hub_columns(task, types):
    """Return the task with its text columns; raise BadInput unless the data set has its columns. types: by column."""
    path = task.dataset["path"]
    if not task.text:
        strings = {column: "" if kind == "string" else None for column, kind in types.items()}
        task = replace(task, text=[_only_text_column(strings, task, path)])
    for column in _needed_columns(task, "train"):
        if column not in types:
            problem, advice = _missing_column(column, types, task)
            raise BadInput(f"{path}: {problem}", advice)
        if column in task.text and types[column] not in ("string", "large_string"):
            raise BadInput(f'{path}: the column "{column}" holds {types[column]}, not text', "Name another one.")
    return task


def _hub_rows(task, rows):
    """Yield (row, texts, label, group) for each row of a Hub data set's split.

    Empty texts, an error in a user's own file, are only counted here: others have published scores on these very rows.
    """
    path, empty = task.dataset["path"], 0
    names = _class_names(rows.features[task.label]) if isinstance(task.label, str) else None

    def label_name(label):
        return None if label is None or label < 0 else names[label]

    for number, row in enumerate(rows):
        if names:
            label = row[task.label]
            label = [label_name(each) for each in label] if isinstance(label, list) else label_name(label)
            row = {**row, task.label: label}
        try:
            label = row_labels(task, row)
        except ValueError as error:
            reason = f"{path}, row {number}: {error}"
            raise BadInput(reason, "Choose another column of labels with --label_column.") from None
        texts = [row[column] or "" for column in task.text]
        empty += not all(text.strip() for text in texts)
        yield number, texts, label, row.get(task.split.get("group"))
    if empty:
        log.warning(f"{path}: {empty} of {len(rows)} rows have an empty text")


def _class_names(feature):
    """Return the names of a Hub column of ClassLabel, or of lists of it; None for others."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _cached_source(key, table, task, origin, is_file, rows):
    """Return a Source. Its rows and bad rows come from the cache under the key `table`, else from `rows`.

    rows: an iterable of (row, texts, label, group) or BadRow; it is not read where the cache has the table.
    """
    import pyarrow as pa

    if len(set(task.text)) < len(task.text):
        raise BadInput(f"{origin}: a text column is given twice", "Name two different ones with --text_columns.")
    for column in task.text:
        if column in ("label", "group", "row", "hash"):
            raise BadInput(f"{origin}: a text column cannot be named {column!r}", "Rename this column in the data.")
    label_type = pa.list_(pa.string()) if task.is_multi_label else pa.string()
    schema = pa.schema(
        [(column, pa.string()) for column in task.text]
        + [("label", label_type), ("group", pa.string()), ("row", pa.int64()), ("hash", pa.binary())]
    )
    skipped = cache.cache_folder() / f"{table}.bad_rows.json"
    rows, _ = cache.cached_table(table, schema, _columns(task, rows, skipped))
    source = Source(rows, key, origin, is_file, json.loads(skipped.read_text(encoding="utf-8")))
    source.check_rows(rows)
    return source


def _columns(task, rows, skipped):
    """Yield the columns of up to 1000 rows at a time, then write [row, problem] of the bad rows to the file `skipped`.

    Raises the first BadRow unless the task skips bad rows.
    """
    bad_rows = []

    def good_rows():
        for row in rows:
            if not isinstance(row, BadRow):
                yield row
            elif task.on_bad_row == "skip":
                bad_rows.append([row.line, row.problem])
            else:
                raise row

    good = good_rows()
    while batch := list(islice(good, 1000)):
        numbers, texts, labels, groups = zip(*batch, strict=True)
        hashes = [hashlib.blake2b("\x1f".join(each).encode(), digest_size=16).digest() for each in texts]
        groups = [None if group is None else str(group) for group in groups]
        text_columns = dict(zip(task.text, zip(*texts, strict=True), strict=True))
        yield {**text_columns, "label": labels, "group": groups, "row": numbers, "hash": hashes}
    write_json(skipped, bad_rows)


# ------------------------------------------------------------------------------------------------------ made splits


def stratified(labels, number, seed, keep=1):
    """Draw `number` rows in proportion to the classes; return (drawn, rest), sorted row numbers.

    Counts are rounded by largest remainder, so that they add up. At least `keep` rows of a class stay in the rest.
    Labels that are no ids (regression, multi-label) have no classes: then rows are drawn uniformly.
    """
    generator = np.random.default_rng(seed)
    classes = labels.ndim == 1 and labels.dtype.kind == "i"
    groups = [np.flatnonzero(labels == value) for value in np.unique(labels)] if classes else [np.arange(len(labels))]
    groups = [generator.permutation(group) for group in groups]
    exact = np.array([len(group) * number / len(labels) for group in groups])
    counts = np.floor(exact).astype(int)
    for position in np.argsort(counts - exact, kind="stable")[: number - counts.sum()]:
        counts[position] += 1
    counts = np.minimum(counts, [len(group) - keep for group in groups]) if classes else counts
    drawn = np.sort(np.concatenate([group[:count] for group, count in zip(groups, counts, strict=True)]))
    return drawn, np.setdiff1d(np.arange(len(labels)), drawn)


def draw_groups(groups, number, seed):
    """Draw entire groups in the seed's order, as close to `number` rows as possible; return as stratified.

    groups: (rows,), the value of the group column in each row. At least one group stays on either side.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    totals = np.cumsum(sizes[order])[:-1]  # the last group stays
    if not len(totals):
        return np.array([], dtype=int), np.arange(len(groups))
    is_drawn = np.isin(codes, order[: np.abs(totals - number).argmin() + 1])
    return np.flatnonzero(is_drawn), np.flatnonzero(~is_drawn)


def make_missing_splits(task, splits):
    """Take missing splits out of train: by the task's ranges and fractions, else 10 % for validation."""
    if "train" not in splits:
        return splits
    if "fold" in task.split:
        return _with_fold(task, splits)
    rules = {name: rule for name, rule in task.split.items() if name in SPLIT_NAMES and name not in splits}
    if "validation" not in rules and not any(name.startswith("validation") for name in splits):
        rules["validation"] = 0.1
    ranges = {name: rule for name, rule in rules.items() if isinstance(rule, list)}
    fractions = {name: rule for name, rule in rules.items() if name not in ranges}
    if "train" in task.split:
        ranges["train"] = task.split["train"]
    number_of_rows = len(splits["train"])
    splits = {**splits, **_take_ranges(task, splits["train"], ranges)}
    for name, fraction in fractions.items():
        train, number = splits["train"], max(1, round(fraction * number_of_rows))
        drawn, rest = _draw(task, train, number)
        if not len(rest) or not len(drawn) or number >= len(train):
            what = f"groups of {task.split['group']}" if "group" in task.split else "rows"
            reason = f"too few {what} (in {number_of_rows} rows) to make a {name} split"
            if not len(drawn) and "group" not in task.split and number < len(train):
                reason = f"each label has one row, which stays in train, so there is none for a {name} split"
            raise BadInput(reason, f"Give --{name}_file, or more rows.")
        splits[name], splits["train"] = train.select(drawn), train.select(rest)
    return splits


def _with_fold(task, splits):
    """Return the splits with one fold of train as the validation split, in the place of any other."""
    from sklearn import model_selection

    (fold, folds), train = task.split["fold"], splits["train"]
    labels, has_groups = cache.column_array(train, "label"), "group" in task.split
    has_classes = labels.ndim == 1 and labels.dtype.kind == "i"
    kind = f"{'Stratified' if has_classes else ''}{'Group' if has_groups else ''}KFold"
    splitter = getattr(model_selection, kind)(folds, shuffle=True, random_state=task.split.get("seed", 42))
    groups = [value or "" for value in cache.column_array(train, "group").tolist()] if has_groups else None
    try:
        with warnings.catch_warnings(action="ignore"):  # a class may have fewer rows than there are folds
            drawn = list(splitter.split(np.zeros(len(train)), labels if has_classes else None, groups))
    except ValueError as error:
        what = f"groups of {task.split['group']}" if has_groups else "rows of any label"
        raise BadInput(f"too few {what} in {len(train)} rows for {folds} folds ({error})", "Take fewer.") from None
    rest, held_out = drawn[fold - 1]
    kept = {name: rows for name, rows in splits.items() if name.startswith("test")}
    return {"train": train.select(rest), "validation": train.select(held_out), **kept}


def _take_ranges(task, train, ranges):
    """Return {name: rows} of ranges of train, which keeps the remaining rows unless it has a range itself."""
    splits, is_taken = {}, np.zeros(len(train), dtype=bool)
    for name, (start, end) in ranges.items():
        if end > len(train):
            reason = f"task {task.name}: `split` has {name}: [{start}, {end}], the file {len(train)} rows"
            raise BadInput(reason, "Give the complete file, or fix `split` in a YAML of your own.")
        splits[name] = train.select(range(start, end))
        is_taken[start:end] = True
    if ranges and "train" not in ranges:
        splits["train"] = train.select(np.flatnonzero(~is_taken))
    return splits


def _draw(task, train, number):
    """Draw about `number` rows, in entire groups where the task has a group column; return (drawn, rest)."""
    seed = task.split.get("seed", 42)
    if "group" not in task.split:
        return stratified(cache.column_array(train, "label"), number, seed)
    # Rows without a group stay together: they may belong to any.
    groups = np.array([value or "" for value in cache.column_array(train, "group").tolist()])
    return draw_groups(groups, number, seed)
