"""A task is data, not code: a YAML file in data/, or a few flags -> Task; and task.json, its copy in a model folder."""

import argparse
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import pairwise
from pathlib import Path

import yaml

import metrics
from reader import BadInput, nearest

DATA_FOLDER = Path(__file__).resolve().parent / "data"
SPLIT_NAMES = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """What is learnt from which data. The fields are the keys of data/NAME.yaml; README.md explains each."""

    name: str
    # The data: one of the first two.
    dataset: dict | None = None  # {path, name, revision} on the Hub
    files: dict | None = None  # {train, validation, test}: paths, URLs, members of archives (a.zip::b.csv)
    text: list[str] | None = None  # one column, or two for sentence pairs; None: `text`, or the only text column
    label: str = "label"
    labels: list[str] | str | None = None  # names in id order, "regression", or None: taken from the train split
    problem: str | None = None  # "multi_label": any number of labels apply to a text
    separator: str = ","  # between the labels of a text, where a column holds them as one string
    columns: list[str] | None = None  # the names of the columns in files without a header
    quoting: bool | None = None  # None: .csv quoted, .tsv not
    delimiter: str | None = None
    encoding: str = "utf-8"
    on_bad_row: str = "fail"  # or "skip"
    # The splits: taken from the data, made out of train, cut to a number of rows.
    splits: dict | None = None  # {name here: name in the Hub's data set}; the first validation split chooses
    split: dict = field(default_factory=dict)  # {validation: 0.1 or [first row, end], seed: 42, group: column}
    limit: dict = field(default_factory=dict)  # {split: rows}
    # The recipe.
    metrics: list[str] | None = None  # the first chooses the checkpoint; None: the usual ones (with_metrics)
    model: str | dict = "google-bert/bert-base-uncased"  # a mapping of config values + vocab: trained from scratch
    max_length: int | None = None  # tokens; None: as many as the model can read
    truncate: str = "head"  # which tokens of a longer text are kept: head, tail, head_tail
    defaults: dict = field(default_factory=dict)  # values for flags of train.py
    source: str = ""
    licence: str = ""

    @property
    def is_regression(self):
        return self.labels == "regression"

    @property
    def is_multi_label(self):
        return self.problem == "multi_label"


# ------------------------------------------------------------------------------------------- reading a description

KINDS = {
    "a word": lambda value: isinstance(value, str) and value != "",
    "a list of words": lambda value: isinstance(value, list) and value and all(KINDS["a word"](one) for one in value),
    "a whole number above 0": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    "a mapping": lambda value: isinstance(value, dict),
    "a truth value": lambda value: isinstance(value, bool),
}
TYPES = {
    "dataset": "a mapping",
    "files": "a mapping",
    "text": "a word or a list of words",
    "label": "a word",
    "labels": "a word or a list of words",
    "problem": "a word",
    "separator": "a word",
    "columns": "a list of words",
    "quoting": "a truth value",
    "delimiter": "a word",
    "encoding": "a word",
    "splits": "a mapping",
    "split": "a mapping",
    "metrics": "a list of words",
    "model": "a word or a mapping",
    "max_length": "a whole number above 0",
    "truncate": "a word",
    "defaults": "a mapping",
    "source": "a word",
    "licence": "a word",
}
INNER_KEYS = {
    "dataset": {"path", "name", "revision"},
    "files": set(SPLIT_NAMES),
    "split": {*SPLIT_NAMES, "seed", "group"},
}
CHOICES = {"problem": ["multi_label"], "truncate": ["head", "tail", "head_tail"]}


def read_task(name_or_file):
    """Return the Task of data/NAME.yaml, or of a YAML file. Raises BadInput that names the key with the mistake."""
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
        raise BadInput(
            f"{path}: is not YAML ({' '.join(str(error).split())})", "Mend the file at this place."
        ) from None
    return replace(task_from_mapping(content, path), name=path.stem)


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys; here that is an error."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        repeated = next((key for at, (key, _) in enumerate(node.value) if key.value in names[:at]), None)
        if repeated:
            raise yaml.constructor.ConstructorError(
                problem=f'the key "{repeated.value}" occurs twice', problem_mark=repeated.start_mark
            )
        return super().construct_mapping(node, deep)


def task_from_mapping(content, path):
    """Check the keys and types of a task's description and return the Task; files are relative to the YAML's folder."""
    if not isinstance(content, dict):
        raise BadInput(f"{path}: is not a mapping of keys to values", "See data/demo.yaml for the form of a task.")
    content = dict(content)
    if isinstance(content.get("labels"), list):
        # YAML reads `no` as False and 1 as a number: a name must be a string, whatever it looks like.
        for name in content["labels"]:
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                raise BadInput(f'{path}: the label {name!r} in "labels" is not a name', "Put each name in quotes.")
        content["labels"] = names = [str(name) for name in content["labels"]]
        if len(names) < 2 or len(set(names)) < len(names):
            raise BadInput(f'{path}: "labels" is {names}', "Write two or more names, each of them once.")
    for key, value in content.items():
        if key not in TYPES:
            raise BadInput(f'{path}: unknown key "{key}"{nearest(key, TYPES)}', f"Keys: {', '.join(TYPES)}.")
        if not any(KINDS[kind](value) for kind in TYPES[key].split(" or ")):
            raise BadInput(
                f'{path}: "{key}" is {value!r}, a {type(value).__name__}',
                f"Write {TYPES[key]}; put a word that YAML reads as something else in quotes.",
            )
        if value not in CHOICES.get(key, [value]):
            raise BadInput(f'{path}: "{key}" is {value!r}', f"Allowed: {', '.join(CHOICES[key])}.")
        for inner in value if key in INNER_KEYS else ():
            if inner not in INNER_KEYS[key]:
                raise BadInput(
                    f'{path}: unknown key "{inner}" in "{key}"{nearest(inner, INNER_KEYS[key])}',
                    f"Keys: {', '.join(sorted(INNER_KEYS[key]))}.",
                )
        for inner, word in value.items() if key in ("dataset", "files", "splits") else ():
            if not KINDS["a word"](word):
                raise BadInput(f'{path}: "{key}" has {inner}: {word!r}', "Write a word; put what is none in quotes.")
    if ("dataset" in content) == ("files" in content):
        raise BadInput(f"{path}: needs either `dataset` (on the Hub) or `files`", "See data/mrpc.yaml, data/demo.yaml.")
    if "splits" in content and "files" in content:
        raise BadInput(f"{path}: `splits` renames those of a data set on the Hub", "Name files in `files` as you wish.")
    if isinstance(content.get("text"), str):
        content["text"] = [content["text"]]
    if isinstance(content.get("labels", ""), str) and content.get("labels", "regression") != "regression":
        raise BadInput(f'{path}: "labels" is {content["labels"]!r}', "Write a list of names, or: labels: regression")
    if content.get("problem") and content.get("labels") == "regression":
        raise BadInput(f"{path}: is both multi_label and regression", "Drop `problem` or `labels`.")
    _check_split(content.get("split", {}), path)
    if "path" not in content.get("dataset", {"path": ""}):
        raise BadInput(
            f'{path}: "dataset" has no path', "Write dataset: {path: ...}, and name: ... where it has parts."
        )
    if isinstance(content.get("model"), dict) and "vocab" not in content["model"]:
        raise BadInput(f'{path}: "model" has no vocab', "Name a vocabulary file: model: {model_type: ..., vocab: ...}.")
    folder = Path(path).resolve().parent
    if "files" in content:
        content["files"] = {split: _located(folder, file) for split, file in content["files"].items()}
    if isinstance(content.get("model"), dict):
        content["model"] = {**content["model"], "vocab": str(folder / str(content["model"]["vocab"]))}
    if "delimiter" in content:
        content["delimiter"] = _delimiter(content["delimiter"], f"{path}: ")
    return Task(name="", **content)


def _located(folder, file):
    """Return a file of a task as an absolute path; a URL stays as it is."""
    return str(file) if is_url(file) else os.path.abspath(folder / str(file))


def is_url(file):
    return str(file).startswith(("http://", "https://"))


def _delimiter(word, where="--"):
    mark = "\t" if word in ("tab", "\\t") else word
    if len(mark) != 1:
        raise BadInput(f"{where}delimiter {word!r}: is not one character", "Write one such as ; or |, or the word tab.")
    return mark


def _check_split(split, path):
    """Raise BadInput unless each made split is a fraction of train's rows or a range of them."""
    for name, value in split.items():
        is_range = (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(end, int) for end in value)
            and 0 <= value[0] < value[1]
        )
        is_fraction = isinstance(value, float) and 0 < value < 1 and name != "train"
        if name in SPLIT_NAMES and not (is_range or is_fraction):
            raise BadInput(
                f'{path}: "split" has {name}: {value!r}',
                f"Write a fraction of the rows ({name}: 0.1), or a range ({name}: [0, 500], without row 500).",
            )
        is_seed = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if (name == "seed" and not is_seed) or (name == "group" and not KINDS["a word"](value)):
            raise BadInput(f'{path}: "split" has {name}: {value!r}', "Write seed: 42, group: COLUMN.")
    ranges = sorted((value, name) for name, value in split.items() if isinstance(value, list))
    for (first, name), (second, other) in pairwise(ranges):
        if second[0] < first[1]:
            raise BadInput(f'{path}: "split": {name} {first} and {other} {second} overlap', "A row has one split.")


# ------------------------------------------------------------------------------------------- the flags of scripts


def positive(text):
    """A whole number above 0, as a type of argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def count(text):
    """A whole number from 0, as a type of argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0")
    return int(text)


def amount(text):
    """A finite number from 0, as a type of argparse."""
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return float(text)


def share(text):
    """A number from 0 to below 1, as a type of argparse."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return float(text)


def add_data_arguments(parser):
    """Add the flags that say which data: the same in every script that reads a data set."""
    group = parser.add_argument_group("data")
    group.add_argument("--task", metavar="NAME|FILE", help="a task of data/, or a YAML file of your own")
    group.add_argument("--dataset", metavar="ID[:CONFIG]", help="a data set of the Hub, without a YAML")
    for split in SPLIT_NAMES:
        group.add_argument(
            f"--{split}_file", metavar="FILE", help=f"{split} data: csv, tsv, json, jsonl (.gz), parquet; a path or URL"
        )
    group.add_argument("--text_columns", metavar="A[,B]", help="one text column, or two for pairs (default: text)")
    group.add_argument("--label_column", metavar="NAME", help="the column of labels (default: label)")
    group.add_argument(
        "--group_column", metavar="NAME", help="rows of one value stay in one split, where splits are made"
    )
    group.add_argument("--encoding", metavar="NAME", help="of text files (default: utf-8)")
    group.add_argument("--delimiter", metavar="MARK", help="between columns, such as ';' or tab (default: by the name)")
    group.add_argument(
        "--on_bad_row", choices=["fail", "skip"], help="skip: leave bad rows out, list them (default: fail)"
    )
    group.add_argument("--metrics", metavar="A[,B]", help="scores; the first one chooses the best checkpoint")
    group.add_argument(
        "--max_length", type=positive, metavar="TOKENS", help="longer texts are cut (default: the model's limit)"
    )
    group.add_argument(
        "--truncate", choices=CHOICES["truncate"], help="which end of a long text to keep (default: head)"
    )
    group.add_argument(
        "--limit", action="append", metavar="SPLIT=N", help="use N rows of a split, drawn seeded and stratified"
    )
    group.add_argument("--refresh", action="store_true", help="ask the Hub for newer commits of the data and the model")


def task_of(args, default=None):
    """Return the Task that --task and the data flags describe; `default` is the name of a task, or a Task."""
    files = {split: getattr(args, f"{split}_file") for split in SPLIT_NAMES}
    files = {split: _located(Path.cwd(), file) for split, file in files.items() if file}
    if args.dataset and (files or args.task):
        raise BadInput("--dataset beside --task or a file: the data are given twice", "Give one of them.")
    if args.dataset:
        path, _, name = args.dataset.partition(":")
        content = {"dataset": {"path": path, **({"name": name} if name else {})}, "files": None}
        task = (
            replace(default, **content, limit={})
            if isinstance(default, Task)
            else Task(name or Path(path).name, **content)
        )
    elif args.task or not files or isinstance(default, Task):
        task = default if isinstance(default, Task) and not args.task else read_task(args.task or default)
        # New files replace the task's own data; everything else it says still holds.
        task = replace(task, dataset=None, files=files, limit={}) if files else task
    else:
        task = Task(name=Path(next(iter(files.values()))).name.split(".")[0], files=files)
    given = {
        "text": args.text_columns and args.text_columns.split(","),
        "label": args.label_column,
        "metrics": args.metrics and args.metrics.split(","),
        "delimiter": args.delimiter and _delimiter(args.delimiter),
        "split": args.group_column and {**task.split, "group": args.group_column},
        "limit": limits_of(args.limit),
        **{name: getattr(args, name) for name in ("max_length", "encoding", "truncate", "on_bad_row")},
    }
    task = replace(task, **{key: value for key, value in given.items() if value})
    if task.text and (len(task.text) > 2 or "" in task.text):
        raise BadInput(f"text columns {','.join(task.text)}: neither one nor two", "Give one, or two for pairs: A,B.")
    return task


def set_defaults(parser, task):
    """Make the task's `defaults` those of the parser, so that a flag on the command line still goes before."""
    actions = {action.dest: action for action in parser._actions}
    of_data = [
        action.dest for group in parser._action_groups if group.title == "data" for action in group._group_actions
    ]
    for name, value in task.defaults.items():
        action = actions.get(name)
        if name in of_data:
            raise BadInput(
                f'task {task.name}: "{name}" in `defaults` says which data, not how to train',
                f"Say it in a key of the task: {', '.join(TYPES)}.",
            )
        if action is None:
            raise BadInput(
                f'task {task.name}: "{name}" in `defaults` is no flag{nearest(name, actions)}', "See --help."
            )
        try:
            if action.nargs == 0:  # a switch
                if not isinstance(value, bool):
                    raise ValueError
            else:
                # Through text, as on the command line: YAML 1.1 reads 1e-5 as a string.
                values = [(action.type or str)(str(one)) for one in (value if isinstance(value, list) else [value])]
                if len(values) != (action.nargs or 1):
                    raise ValueError
                value = values if action.nargs else values[0]
        except (ValueError, argparse.ArgumentTypeError):
            raise BadInput(
                f"task {task.name}: {name}: {value!r} in `defaults` is no value for --{name}", "See --help."
            ) from None
        if action.choices and value not in action.choices:
            raise BadInput(
                f"task {task.name}: {name}: {value!r} in `defaults`", f"Allowed: {', '.join(action.choices)}."
            )
        parser.set_defaults(**{name: value})


def limits_of(texts):
    """Return {split: rows} of the values of --limit."""
    limits = {}
    for text in texts or []:
        split, _, number = text.partition("=")
        if not number.isdecimal() or int(number) < 1:
            raise BadInput(f"--limit {text}: not SPLIT=N", "Write for example --limit train=1000.")
        limits[split] = int(number)
    return limits


# ------------------------------------------------------------------------------------------- task.json


def with_metrics(task):
    """Return the task with its metrics, the usual ones where it names none. Its labels must be known (load_splits).

    Raises BadInput for metrics that do not fit the problem.
    """
    usual = ["pearson", "spearmanr"] if task.is_regression else ["f1_macro", "accuracy"]
    task = replace(task, metrics=task.metrics or (["f1_micro", "f1_macro"] if task.is_multi_label else usual))
    try:
        metrics.check(task.metrics, None if task.is_regression else len(task.labels), task.is_multi_label)
    except ValueError as error:
        reason, *advice = str(error).splitlines()
        raise BadInput(f"task {task.name}: {reason}", " ".join(advice) or "Choose others with --metrics.") from None
    return task


def save_task(task, fingerprints, path):
    """Write task.json: everything that evaluate.py and predict.py need, and the fingerprints of the data."""
    content = {**asdict(task), "fingerprints": fingerprints}
    content.pop("defaults")
    write_json(path, content)


def saved_task(folder):
    """Return (Task, fingerprints by split) of a model folder; (None, {}) where there is no task.json."""
    path = Path(folder) / "task.json"
    if not path.is_file():
        return None, {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(Task)}
        return Task(**{key: value for key, value in content.items() if key in known}), content["fingerprints"]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{path}: is damaged ({words})", "Copy the model folder again, or train again.") from None


def write_text(path, text):
    """Write a file under a temporary name and rename it: it is complete or absent."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
