"""Task: the data and the recipe, from a YAML file of data/ or from flags; task.json saves it with a model."""

import argparse
import os
import re
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import yaml

from classifier.files import is_path, read_json, write_json
from classifier.messages import MOST_NAMES, BadInput, format_name, join_some, list_names, nearest

DATA_FOLDER = Path(__file__).resolve().parents[2] / "data"
SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """The data and the recipe. The fields are the keys of data/NAME.yaml; README.md explains each."""

    name: str
    # The data: `dataset` or `files`.
    dataset: dict | None = None  # {path, name, revision} on the Hub
    files: dict | None = None  # {train, validation, test}: paths, URLs, members of archives (a.zip::b.csv)
    text: str | list[str] | None = None  # a list once read: of one column, or of two for pairs; None: the only one
    label: str | list[str] = "label"  # a list: one column of 0 and 1 for each label, whose names the labels have
    labels: str | list[str] | None = None  # "regression", or names in id order; None: taken from the train split
    problem: str | None = None  # "multi_label": any number of labels apply to a text
    separator: str = ","  # between the labels of a text, where a column holds them as one string
    columns: list[str] | None = None  # the names of the columns in files without a header
    quoting: bool | None = None  # None: .csv quoted, .tsv not
    delimiter: str | None = None
    encoding: str = "utf-8"
    on_bad_row: str = "fail"  # or "skip"
    # The splits: taken from the data, made from train, limited to a number of rows.
    splits: dict | None = None  # {name here: name in the Hub's data set}; the first validation split selects the model
    split: dict = field(default_factory=dict)  # {validation: 0.1 or [first row, end], seed: 42, group: column}
    limit: dict = field(default_factory=dict)  # {split: rows}
    # The recipe.
    metrics: list[str] | None = None  # the first selects the checkpoint; None: the usual ones (with_metrics)
    model: str | dict = "google-bert/bert-base-uncased"  # a mapping of config values + vocab: trained from scratch
    max_length: int | None = None  # tokens; None: as many as the model has positions
    truncate: str = "head"  # which tokens of a longer text are kept: head, tail, head_tail
    defaults: dict = field(default_factory=dict)  # values for flags of train.py
    source: str = ""
    licence: str = ""
    # Of a trained model; None: not fitted.
    thresholds: list[float] | None = None  # the probability above which each label of a multi-label task applies
    temperature: float | None = None  # logits are divided by it before they become probabilities
    min_probabilities: dict | None = None  # {target accuracy: the probability above which labels keep it, or None}

    @property
    def is_regression(self):
        return self.labels == "regression"

    @property
    def is_multi_label(self):
        return self.problem == "multi_label"


# ------------------------------------------------------------------------------------------- reading a description


def _is_word(value):
    return isinstance(value, str) and value != ""


KINDS = {  # of values in YAML, by the types of Task's fields: (name, check)
    str: ("a word", _is_word),
    list[str]: ("a list of words", lambda value: isinstance(value, list) and value and all(map(_is_word, value))),
    int: ("a whole number above 0", lambda value: type(value) is int and value > 0),  # not True
    dict: ("a mapping", lambda value: isinstance(value, dict)),
    bool: ("a truth value", lambda value: isinstance(value, bool)),
}
NOT_IN_YAML = ("name", "on_bad_row", "limit", "thresholds", "temperature", "min_probabilities")
KEYS = [key for key in fields(Task) if key.name not in NOT_IN_YAML]
TYPES = {key.name: [KINDS[kind] for kind in get_args(key.type) or [key.type] if kind in KINDS] for key in KEYS}
INNER_KEYS = {
    "dataset": {"path", "name", "revision"},
    "files": set(SPLIT_NAMES),
    "split": {*SPLIT_NAMES, "seed", "group", "fold"},
}
CHOICES = {"problem": ["multi_label"], "truncate": ["head", "tail", "head_tail"]}


def read_task(name_or_file):
    """Return the Task of data/NAME.yaml, or of a YAML file. Raises BadInput, which names the wrong key."""
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml"):
        path = DATA_FOLDER / f"{name_or_file}.yaml"
        known = sorted(p.stem for p in DATA_FOLDER.glob("*.yaml"))
        if not path.exists():
            raise BadInput(
                f'no task is named "{name_or_file}"{nearest(name_or_file, known)}',
                f"Tasks: {', '.join(known)}. For a file of your own: --train_file my.csv, or --task my.yaml.",
            )
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _StrictLoader)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})", "Check the path given to --task.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or a date such as 2020-13-01
        raise BadInput(f"{path}: is not YAML ({error})", "Fix the file at this place.") from None
    return replace(task_from_mapping(content, path), name=path.stem)


class _StrictLoader(yaml.SafeLoader):
    """A loader that rejects repeated keys, of which PyYAML would keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        repeated = next((key for index, (key, _) in enumerate(node.value) if key.value in keys[:index]), None)
        if repeated:
            raise yaml.constructor.ConstructorError(
                problem=f'the key "{repeated.value}" occurs twice', problem_mark=repeated.start_mark
            )
        return super().construct_mapping(node, deep)


def task_from_mapping(content, path):
    """Return the Task of a YAML's content, its keys and types checked; files are relative to the YAML's folder."""
    if not isinstance(content, dict):
        raise BadInput(f"{path}: is not a mapping of keys to values", "See data/demo.yaml for an example.")
    content = dict(content)
    if isinstance(content.get("labels"), list):
        content["labels"] = _label_names(content["labels"], path)
    for key, value in content.items():
        _check_key(key, value, path)

    folder = Path(path).resolve().parent
    if ("dataset" in content) == ("files" in content):
        raise BadInput(f"{path}: needs either `dataset` (on the Hub) or `files`", "See data/mrpc.yaml, data/demo.yaml.")
    if "dataset" in content and "path" not in content["dataset"]:
        raise BadInput(f'{path}: "dataset" has no path', "Write dataset: {path: ..., name: CONFIGURATION if any}.")
    if "files" in content:
        content["files"] = {split: _absolute(folder, file) for split, file in content["files"].items()}
    if "files" in content and "splits" in content:
        raise BadInput(f"{path}: `splits` is for data sets of the Hub", "Name the splits in `files` directly.")
    if "delimiter" in content:
        content["delimiter"] = parse_delimiter(content["delimiter"], f"{path}: ")
    if isinstance(content.get("text"), str):
        content["text"] = [content["text"]]
    labels = content.get("labels")
    if isinstance(labels, str) and labels != "regression":
        raise BadInput(f'{path}: "labels" is {labels!r}', "Write a list of names, or: labels: regression")
    if isinstance(content.get("label"), list):
        content |= _labels_of_columns(content["label"], labels, f"{path}: ")
    if labels == "regression" and "problem" in content:
        raise BadInput(f"{path}: is both multi_label and regression", "Drop `problem` or `labels`.")
    _check_split(content.get("split", {}), path)
    model = content.get("model")
    if isinstance(model, dict):
        if "vocab" not in model:
            raise BadInput(f'{path}: "model" has no vocab', "Name a file: model: {model_type: ..., vocab: ...}.")
        content["model"] = {**model, "vocab": str(folder / str(model["vocab"]))}
    return Task(name="", **content)


def _label_names(labels, path):
    """Return the names in `labels` as strings. YAML reads 1 as a number, which is fine, and `no` as False."""
    for name in labels:
        if type(name) not in (str, int):
            raise BadInput(f'{path}: the label {name!r} in "labels" is not a name', "Put each name in quotes.")
    names = [str(name) for name in labels]
    if len(names) < 2 or len(set(names)) < len(names):
        if len(names) > MOST_NAMES:  # not all are shown: those that stand there twice come first
            names = sorted(names, key=lambda name: names.count(name) == 1)
        listed = join_some(format_name(repr(name)) for name in names)
        raise BadInput(f'{path}: "labels" is [{listed}]', "Write two or more names, each of them once.")
    return names


def _labels_of_columns(columns, labels, place):
    """Return the task's keys for one column of 0 and 1 for each label. labels: their names if they have others."""
    if len(columns) < 2 or len(set(columns)) < len(columns) or "" in columns:
        raise BadInput(f"{place}label columns {','.join(columns)}", "Name two or more, each of them once.")
    if labels == "regression" or (labels and len(labels) != len(columns)):
        kind = "a number" if labels == "regression" else f"{len(labels)} labels"
        reason = f"{place}{len(columns)} columns of labels ({list_names(columns)}), but the task has {kind}"
        raise BadInput(reason, "Name one column for each label, in the same order.")
    return {"label": columns, "labels": labels or columns, "problem": "multi_label"}


def _check_key(key, value, path):
    """Raise BadInput unless the key exists and its value has the right type and is one of its choices."""
    if key not in TYPES:
        raise BadInput(f'{path}: unknown key "{key}"{nearest(key, TYPES)}', f"Keys: {', '.join(TYPES)}.")
    if not any(is_kind(value) for _, is_kind in TYPES[key]):
        kinds = " or ".join(name for name, _ in TYPES[key])
        advice = f"Write {kinds}; put a word that YAML reads as something else in quotes."
        raise BadInput(f'{path}: "{key}" is {value!r}, a {type(value).__name__}', advice)
    if value not in CHOICES.get(key, [value]):
        raise BadInput(f'{path}: "{key}" is {value!r}', f"Allowed: {', '.join(CHOICES[key])}.")
    known = INNER_KEYS.get(key)
    for inner in value if known else ():
        if inner not in known:
            reason = f'{path}: unknown key "{inner}" in "{key}"{nearest(inner, known)}'
            raise BadInput(reason, f"Keys: {', '.join(sorted(known))}.")
    if key in ("files", "splits"):
        _check_split_names(value, path)
    for inner, word in value.items() if key in ("dataset", "files", "splits") else ():
        if not _is_word(word):
            raise BadInput(f'{path}: "{key}" has {inner}: {word!r}', "Write a word, if need be in quotes.")


def _check_split_names(names, path):
    """Raise BadInput for names with other characters than letters, digits, _, . and -: they become folder names."""
    for name in names or ():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise BadInput(f"{path}: {name!r} cannot name a split", "Use only letters, digits and _.")


def _absolute(folder, file):
    """Return a task's file as an absolute path; a URL unchanged."""
    if is_url(file):
        return str(file)
    path, mark, member = str(file).partition("::")  # abspath would turn the slashes of the member into backslashes
    return f"{os.path.abspath(folder / path)}{mark}{member}"


def is_url(file):
    return str(file).startswith(("http://", "https://"))


def parse_delimiter(word, prefix="--"):
    """Return the character that a word names: itself, or a tab for `tab` and `\\t`. Raises BadInput."""
    character = "\t" if word in ("tab", "\\t") else word
    if len(character) != 1:
        raise BadInput(f"{prefix}delimiter {word!r}: is not one character", "Write one such as ; or |, or: tab.")
    return character


def _check_split(split, path):
    """Raise BadInput unless each made split is a fraction of train's rows, or a range that overlaps no other."""
    for name, value in split.items():
        advice = f"Write a fraction of the rows ({name}: 0.1), or a range ({name}: [0, 500], without row 500)."
        match name, value:
            case (("seed" | "group"), _):
                fits = type(value) is int and value >= 0 if name == "seed" else _is_word(value)
                advice = "Write seed: 42, group: COLUMN."
            case ("fold", [int(number), int(folds)]):
                fits = 1 <= number <= folds and folds > 1
                advice = "Write for example fold: [2, 5], the second of five."
            case [_, [int(start), int(end)]]:
                fits = 0 <= start < end
            case [_, float()]:
                fits = 0 < value < 1 and name != "train"
            case _:
                fits = False
        if not fits:
            raise BadInput(f'{path}: "split" has {name}: {value!r}', advice)
    ranges = sorted((split[name], name) for name in SPLIT_NAMES if isinstance(split.get(name), list))
    for (first, name), (second, other) in pairwise(ranges):
        if second[0] < first[1]:
            raise BadInput(f'{path}: "split": {name} {first} and {other} {second} overlap', "A row has one split.")


def task_from_args(args, default=None):
    """Return the Task that --task and the data flags describe; `default` is a task's name, or a Task."""
    files = {split: getattr(args, f"{split}_file") for split in SPLIT_NAMES}
    files = {split: _absolute(Path.cwd(), file) for split, file in files.items() if file}
    if args.dataset and (files or args.task):
        raise BadInput("--dataset with --task or a file: the data are given twice", "Give one of them.")
    if args.dataset and is_path(args.dataset):
        raise BadInput(f"--dataset {args.dataset}: is a path, not an id of the Hub", "Give files with --train_file.")
    if args.dataset:
        path, _, name = args.dataset.partition(":")
        task = default if isinstance(default, Task) else Task(name or Path(path).name)
        dataset = {"path": path, "name": name} if name else {"path": path}
        task = replace(task, dataset=dataset, files=None, limit={})
    elif args.task or not files or isinstance(default, Task):
        task = default if isinstance(default, Task) and not args.task else read_task(args.task or default)
        # New files replace the task's own data; its other keys still apply.
        task = replace(task, dataset=None, files=files, limit={}) if files else task
    else:
        task = Task(name=Path(next(iter(files.values()))).name.split(".")[0], files=files)
    flags = {
        "text": args.text_columns and args.text_columns.split(","),
        "label": args.label_column,
        "metrics": args.metrics and args.metrics.split(","),
        "delimiter": args.delimiter and parse_delimiter(args.delimiter),
        "split": {**task.split, **parse_fold(args.fold), **({"group": args.group_column} if args.group_column else {})},
        "limit": parse_limits(args.limit),
        **{name: getattr(args, name) for name in ("max_length", "encoding", "truncate", "on_bad_row")},
    }
    task = replace(task, **{key: value for key, value in flags.items() if value})
    if args.label_columns:
        if args.label_column:
            raise BadInput("--label_column and --label_columns: the labels are named twice", "Give one of the two.")
        task = replace(task, **_labels_of_columns(args.label_columns.split(","), task.labels, ""))
    if task.text and (len(task.text) > 2 or "" in task.text):
        raise BadInput(f"text columns {','.join(task.text)}: neither one nor two", "Give one, or two for pairs: A,B.")
    return task


def set_defaults(parser, task):
    """Make the task's `defaults` those of the parser, below flags on the command line. Raises BadInput."""
    actions = {action.dest: action for action in parser._actions}
    data_flags = [
        action.dest for group in parser._action_groups if group.title == "data" for action in group._group_actions
    ]
    for name, value in task.defaults.items():
        action, place = actions.get(name), f'task {task.name}: "{name}" in `defaults`'
        if name in data_flags:
            keys = ", ".join(TYPES)
            raise BadInput(f"{place} describes the data, not the training", f"Use a key of the task: {keys}.")
        if action is None:
            raise BadInput(f"{place} is no flag{nearest(name, actions)}", "See --help.")
        place = f"task {task.name}: {name}: {value!r} in `defaults`"
        try:
            if action.nargs == 0:  # a switch
                if not isinstance(value, bool):
                    raise ValueError
            else:
                # Through text, as on the command line: YAML 1.1 reads 1e-5 as a string.
                values = [(action.type or str)(str(each)) for each in (value if isinstance(value, list) else [value])]
                if len(values) != (action.nargs or 1):
                    raise ValueError
                value = values if action.nargs else values[0]
        except (ValueError, argparse.ArgumentTypeError):
            raise BadInput(f"{place} is no value for --{name}", "See --help.") from None
        if action.choices and value not in action.choices:
            raise BadInput(f"{place} is no choice of --{name}", f"Allowed: {', '.join(action.choices)}.")
        parser.set_defaults(**{name: value})


def parse_fold(text):
    """Return the `fold` of a task's `split`, {"fold": [2, 5]}, from the value of --fold, 2/5. Raises BadInput."""
    if not text:
        return {}
    number, _, folds = text.partition("/")
    if not (number.isdecimal() and folds.isdecimal() and 1 <= int(number) <= int(folds) and int(folds) > 1):
        raise BadInput(f"--fold {text}: not K/N", "Write for example --fold 2/5, the second of five.")
    return {"fold": [int(number), int(folds)]}


def parse_limits(texts):
    """Return {split: rows} from the values of --limit. Raises BadInput."""
    limits = {}
    for text in texts or []:
        split, _, number = text.partition("=")
        if not number.isdecimal() or int(number) < 1:
            raise BadInput(f"--limit {text}: not SPLIT=N", "Write for example --limit train=1000.")
        limits[split] = int(number)
    return limits


def save_task(task, fingerprints, path):
    """Write task.json: what evaluate.py, predict.py and export.py need, and the fingerprints of the data."""
    content = {**asdict(task), "fingerprints": fingerprints}
    content.pop("defaults")
    write_json(path, content)


def read_saved_task(folder):
    """Return (Task, fingerprints by split) of a model folder; (None, {}) where there is no task.json.

    Raises BadInput for a file that is damaged.
    """
    path = Path(folder) / "task.json"
    if not path.is_file():
        return None, {}
    known = {key.name for key in fields(Task)}
    with read_json(path) as content:
        for key in ("files", "splits"):
            _check_split_names(content.get(key), path)
        return Task(**{key: value for key, value in content.items() if key in known}), content["fingerprints"]
