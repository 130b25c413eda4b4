"""The rows of a task's splits, from the Hub or from files, with label ids; missing splits are made."""

import hashlib
import json
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from classifier.data.cache import cache_folder, cached_table, column_array, download, download_file, hub_commit
from classifier.data.labels import label_strings, with_label_ids, with_label_names
from classifier.data.reader import check_file, read_rows, table_format
from classifier.data.tasks import SPLIT_NAMES, is_url
from classifier.files import digest, write_json
from classifier.messages import BadInput, BadRow, location, log, nearest

# --------------------------------------------------------------------------------------------------- rows of a split


@dataclass
class Source:
    """The rows of one split as they were found, with label strings, and what had to be left out."""

    rows: object  # a Dataset with the text columns, `label`, `group` (or None), `row` and `hash`
    key: str  # a digest of the content and of how it is read
    where: str  # a file, or a data set of the Hub
    is_file: bool
    bad_rows: list  # [row, what is wrong with it]

    def location(self, row):
        return location(self.where, row) if self.is_file else f"{self.where}, row {row}"

    def check_rows(self, rows):
        """Raise BadInput where no row is left."""
        if not len(rows):
            example = f" (the first: {self.bad_rows[0][1]})" if self.bad_rows else ""
            raise BadInput(f"{self.where}: every row is bad{example}", "Look at the data; nothing is left to use.")


def load_splits(task, refresh=False):
    """Read the task's data and return (task, splits, fingerprints, bad_rows).

    The task comes back with what was left open filled in: text columns, labels, the commit on the Hub. Each
    split is a Dataset with the text columns, `label`, `row` (the line in its file, or the row on the Hub) and `hash`
    (16 bytes of the texts). A label is an id, a float in regression, a 0 or 1 for each label in multi-label; -1 (NaN in
    regression) where there is none. `bad_rows` are dicts of split, file, row and reason of the rows left out.
    """
    task, sources = _hub_splits(task, refresh) if task.dataset else _file_splits(task, refresh)
    task = with_label_names(task, sources)
    splits = {name: with_label_ids(task, name, source) for name, source in sources.items()}
    splits = make_missing_splits(task, splits)
    for name, number in task.limit.items():
        if name not in splits:
            raise BadInput(f'--limit names the split "{name}"', f"Splits: {', '.join(splits)}.")
        if number < len(splits[name]):
            chosen, _ = stratified(column_array(splits[name], "label"), number, seed=0, keep=0)
            splits[name] = splits[name].select(chosen)
    fingerprints = {}
    for name, rows in splits.items():
        key = sources[name if name in sources else "train"].key
        # Which rows they are says it all: made splits, limits, labels that order a draw, bad rows left out.
        fingerprints[name] = digest(key, name, hashlib.sha256(column_array(rows, "row").tobytes()).hexdigest())
    bad_rows = [
        {"split": name, "file": source.where, "row": row, "reason": reason}
        for name, source in sources.items()
        for row, reason in sorted(source.bad_rows)
    ]
    return task, splits, fingerprints, bad_rows


def check_files(task):
    """Raise BadInput where a file of the task is not there."""
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
        path = download_file(file, refresh) if is_url(file) else file
        options = {name: getattr(task, name) for name in ("columns", "quoting", "encoding", "delimiter")}
        try:
            with open(path.partition("::")[0], "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            if not task.text:
                _, first = next(read_rows(path, **options, on_bad_row=lambda bad_row: None), (0, {}))
                task = replace(task, text=[_only_text_column(first, task, path)])
        except OSError:
            next(read_rows(path))  # raises BadInput with the reason
        member, labels = path.partition("::")[2], [task.label, task.problem, task.separator]
        key = digest("rows", content, member, table_format(path), task.text, labels, options)
        table = digest(key, task.split.get("group"), task.on_bad_row, name.startswith("test"))
        sources[name] = _source(key, table, task, path, True, _file_values(task, name, path, options))
    return task, sources


def _file_values(task, split, file, options):
    """Return a function of on_bad_row that yields (row, texts, label, group) of a file, checked."""
    needed, needs_label = _needed_columns(task, split), not split.startswith("test")
    group = task.split.get("group") if split == "train" else None
    is_json = table_format(file).startswith("json")  # there, each row has its own columns

    def values(on_bad_row):
        kinds = {}  # of labels: true beside "positive" would make a class of its own
        for line, row in read_rows(file, **options, on_bad_row=on_bad_row):
            absent = next((column for column in needed if column not in row), None)
            if absent:
                what, advice = _missing_column(absent, row, task)
                if not is_json:
                    raise BadInput(f"{location(file, line)}: {what}", advice)
                on_bad_row(BadRow(file, line, what, f"{advice} Mend this row,"))
                continue
            try:
                texts, label = _texts_and_label(task, row, needs_label)
            except ValueError as error:
                on_bad_row(BadRow(file, line, str(error)))
                continue
            if label is not None and not (task.is_multi_label or task.is_regression):
                value = row[task.label]
                kind = {bool: "true or false", str: "a string"}.get(type(value), "a number")
                kinds.setdefault(kind, f"{location(file, line)} holds {value!r}, {kind}")
                if len(kinds) > 1:
                    raise BadInput(f'the column "{task.label}": {"; ".join(kinds.values())}', "Write all labels alike.")
            yield line, texts, label, row.get(group)

    return values


def _needed_columns(task, split):
    """Return the columns that a file must have; one of train has all that the task names."""
    label = [] if split.startswith("test") else [task.label]  # without labels, it can still be predicted
    group = [task.split["group"]] if split == "train" and "group" in task.split else []
    return [*task.text, *label, *group]


def _texts_and_label(task, row, needs_label):
    """Return (texts, label) of a row of a file. Raises ValueError that says what is wrong with the row."""
    texts = [row[column] for column in task.text]
    for column, text in zip(task.text, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'column "{column}" {"is empty" if text in (None, "") else f"holds {text!r}, not text"}')
    try:
        label = label_strings(task, row.get(task.label))
    except ValueError as error:
        raise ValueError(f'column "{task.label}" {error}') from None
    if label is None and needs_label:
        raise ValueError(f'column "{task.label}" holds no label')
    return texts, label


def _missing_column(column, row, task):
    option = {task.label: "--label_column", task.split.get("group"): "--group_column"}.get(column, "--text_columns")
    advice = f"Columns: {', '.join(row)}. Name the right one with {option}."
    return f'no column "{column}"{nearest(column, row)}', advice


def _only_text_column(row, task, where):
    """The column `text`, or the only one besides the label and the group that holds text."""
    others = (task.label, task.split.get("group"))
    if "text" in row and "text" not in others:
        return "text"
    columns = [name for name, value in row.items() if name not in others and isinstance(value, str)]
    if len(columns) != 1:
        words = f"{where}: cannot tell the text column among: {', '.join(columns) or 'none'}"
        advice = "Name it with --text_columns COLUMN, or two for sentence pairs: --text_columns FIRST,SECOND."
        raise BadInput(words, advice)
    return columns[0]


def column_of(task, name, rows, column):
    """Return another column of the data for the rows of a split, as words. Raises BadInput where there is none."""
    if task.dataset:
        theirs = (task.splits or {}).get(name, name)
        table = download(task.dataset["path"], task.dataset.get("name"), task.dataset["revision"])
        table = table[theirs if theirs in table else "train"]  # of which a split that is not there was made
        if column not in table.column_names:
            words = f'{task.dataset["path"]}: has no column "{column}"{nearest(column, table.column_names)}'
            raise BadInput(words, f"Columns: {', '.join(table.column_names)}.")
        return [str(value) for value in table.select(rows["row"])[column]]
    file = task.files[name if name in task.files else "train"]
    path = download_file(file, refresh=False) if is_url(file) else file
    options = {option: getattr(task, option) for option in ("columns", "quoting", "encoding", "delimiter")}
    values = {}
    for line, row in read_rows(path, **options, on_bad_row=lambda bad_row: None):
        if column not in row:
            words = f'{location(file, line)}: has no column "{column}"{nearest(column, row)}'
            raise BadInput(words, f"Columns: {', '.join(row)}.")
        values[line] = str(row[column])
    return [values[line] for line in rows["row"]]


def _hub_splits(task, refresh):
    path, name = task.dataset["path"], task.dataset.get("name")
    commit = hub_commit(path, "dataset", task.dataset.get("revision"), refresh)
    task = replace(task, dataset={**task.dataset, "revision": commit})
    source = digest("hub", path, name, commit)
    listing = cache_folder() / f"{source}.json"
    downloaded = None
    if not listing.exists():
        downloaded = download(path, name, commit)
        features = next(iter(downloaded.values())).features
        types = {column: getattr(feature, "dtype", "list") for column, feature in features.items()}
        names = {column: _class_names(feature) for column, feature in features.items()}
        write_json(listing, {"splits": list(downloaded), "columns": types, "names": names})
    content = json.loads(listing.read_text())
    columns, their_splits = content["columns"], content["splits"]
    if not task.text:
        types = {column: "" if kind == "string" else None for column, kind in columns.items()}
        task = replace(task, text=[_only_text_column(types, task, path)])
    for column in _needed_columns(task, "train"):
        if column not in columns:
            what, advice = _missing_column(column, columns, task)
            raise BadInput(f"{path}: {what}", advice)
        if column in task.text and columns[column] not in ("string", "large_string"):
            raise BadInput(f'{path}: the column "{column}" holds {columns[column]}, not text', "Name another one.")
    if task.labels is None:
        task = replace(task, labels=content["names"].get(task.label))
    wanted = task.splits or {split: split for split in their_splits if split.startswith(SPLIT_NAMES)}
    unused = [split for split in their_splits if split not in wanted.values()]
    if not task.splits and unused:
        log.info(f"{path}: not used: {', '.join(unused)} (`splits: {{validation: {unused[0]}}}` in a YAML would)")
    sources = {}
    for split, theirs in wanted.items():
        if theirs not in their_splits:
            words = f'{path}: has no split "{theirs}"{nearest(theirs, their_splits)}'
            raise BadInput(words, f"Splits: {', '.join(their_splits)}.")
        key = digest("rows", source, split, theirs, task.text, task.label, task.problem, task.separator)
        table = digest(key, task.split.get("group"))
        if downloaded is None and not (cache_folder() / f"{table}.arrow").exists():
            downloaded = download(path, name, commit)
        values = _hub_values(task, downloaded and downloaded[theirs])
        sources[split] = _source(key, table, task, path, False, values)
    return task, sources


def _hub_values(task, rows):
    """Return a function that yields (row, texts, label, group) of a Hub data set's split.

    Rules that a user's own file must keep are counted here: others have published scores on these very rows.
    """

    path = task.dataset["path"]

    def values(on_bad_row):
        names, empty = _class_names(rows.features[task.label]), 0

        def named(label):
            return None if label is None or label < 0 else names[label]

        for number, row in enumerate(rows):
            label = row[task.label]
            if names:
                label = [named(one) for one in label] if isinstance(label, list) else named(label)
            try:
                label = label_strings(task, label)
            except ValueError as error:
                words = f'{path}, row {number}: column "{task.label}" {error}'
                raise BadInput(words, "Name another column of labels with --label_column.") from None
            texts = [row[column] or "" for column in task.text]
            empty += not all(text.strip() for text in texts)
            yield number, texts, label, row.get(task.split.get("group"))
        if empty:
            log.warning(f"{path}: {empty} of {len(rows)} rows have an empty text")

    return values


def _class_names(feature):
    """Return the names of a Hub column of ClassLabel, or of lists of it; None for others."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def _source(key, table, task, where, is_file, read_values):
    """Return a Source; its table and the list of its bad rows come from the cache (as `table`), or are read now."""
    import pyarrow as pa

    if len(set(task.text)) < len(task.text):
        advice = "Name two different ones with --text_columns."
        raise BadInput(f"{where}: a text column cannot be given twice", advice)
    for column in task.text:
        if column in ("label", "group", "row", "hash"):
            raise BadInput(f"{where}: a text column cannot be named {column!r}", "Rename this column in the data.")
    label_type = pa.list_(pa.string()) if task.is_multi_label else pa.string()
    schema = pa.schema(
        [(column, pa.string()) for column in task.text]
        + [("label", label_type), ("group", pa.string()), ("row", pa.int64()), ("hash", pa.binary())]
    )
    left_out = cache_folder() / f"{table}.bad_rows.json"

    def columns():
        bad_rows = []

        def skip(bad_row):
            if task.on_bad_row != "skip":
                raise bad_row
            bad_rows.append([bad_row.line, bad_row.flaw])

        values = iter(read_values(skip))
        while some := list(islice(values, 1000)):
            rows, texts, labels, groups = zip(*some, strict=True)
            hashes = [hashlib.blake2b("\x1f".join(each).encode(), digest_size=16).digest() for each in texts]
            groups = [None if group is None else str(group) for group in groups]
            of_text = dict(zip(task.text, zip(*texts, strict=True), strict=True))
            yield {**of_text, "label": labels, "group": groups, "row": rows, "hash": hashes}
        write_json(left_out, bad_rows)

    rows, _ = cached_table(table, schema, columns)
    source = Source(rows, key, where, is_file, json.loads(left_out.read_text(encoding="utf-8")))
    source.check_rows(rows)
    return source


# ------------------------------------------------------------------------------------------------------ made splits


def stratified(labels, number, seed, keep=1):
    """Draw `number` of the rows so that each class keeps its share; return (drawn, rest), sorted row numbers.

    The shares are rounded by largest remainder, so that they add up. A class keeps at least `keep` rows in the rest.
    Where labels are not ids (regression, multi-label) the rows are drawn at random.
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
    """Draw whole groups, shuffled by the seed, that come nearest to `number` rows; return (drawn, rest) as stratified.

    groups: (rows,), the value of the group column in each row. One group at least stays on either side.
    """
    names, codes, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    totals = np.cumsum(sizes[order])[:-1]  # the last group stays
    if not len(totals):
        return np.array([], dtype=int), np.arange(len(groups))
    is_drawn = np.isin(codes, order[: np.abs(totals - number).argmin() + 1])
    return np.flatnonzero(is_drawn), np.flatnonzero(~is_drawn)


def make_missing_splits(task, splits):
    """Take the splits that are missing out of train: by the task's ranges and fractions, else 10 % for validation."""
    if "train" not in splits:
        return splits
    rules = {name: rule for name, rule in task.split.items() if name in SPLIT_NAMES and name not in splits}
    if "validation" not in rules and not any(name.startswith("validation") for name in splits):
        rules["validation"] = 0.1
    ranges = {name: rule for name, rule in rules.items() if isinstance(rule, list)}
    fractions = {name: rule for name, rule in rules.items() if name not in ranges}
    if "train" in task.split:
        ranges["train"] = task.split["train"]
    number_of_rows = len(splits["train"])
    splits = {**splits, **_ranges_of(task, splits["train"], ranges)}
    for name, fraction in fractions.items():
        train, number = splits["train"], max(1, round(fraction * number_of_rows))
        drawn, rest = _draw(task, train, number)
        if not len(rest) or not len(drawn) or number >= len(train):
            what = f"groups of {task.split['group']}" if "group" in task.split else "rows"
            words = f"too few {what} (in {number_of_rows} rows) to make a {name} split"
            raise BadInput(words, f"Give --{name}_file, or more rows.")
        splits[name], splits["train"] = train.select(drawn), train.select(rest)
    return splits


def _ranges_of(task, train, ranges):
    """Return {name: rows} of ranges of train; where none of them is for train itself, it keeps the rows between."""
    splits, is_taken = {}, np.zeros(len(train), dtype=bool)
    for name, (start, end) in ranges.items():
        if end > len(train):
            words = f"task {task.name}: `split` has {name}: [{start}, {end}], the file {len(train)} rows"
            raise BadInput(words, "Give the whole file, or mend `split` in a YAML of your own.")
        splits[name] = train.select(range(start, end))
        is_taken[start:end] = True
    if ranges and "train" not in ranges:
        splits["train"] = train.select(np.flatnonzero(~is_taken))
    return splits


def _draw(task, train, number):
    """Draw about `number` rows, or whole groups where the task names a column of them; return (drawn, rest)."""
    seed = task.split.get("seed", 42)
    if "group" not in task.split:
        return stratified(column_array(train, "label"), number, seed)
    # Rows without a group stay together: they may belong to any.
    groups = np.array([value or "" for value in column_array(train, "group").tolist()])
    return draw_groups(groups, number, seed)
