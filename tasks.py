"""A task is data, not code: a YAML file in data/, or a few flags -> Task; and task.json, its copy in a model folder."""

import argparse
import json
import os
from dataclasses import asdict, dataclass, field, fields, replace
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
    text: list[str] | None = None  # one column, or two for sentence pairs; None: `text`, or the only text column
    label: str = "label"
    labels: list[str] | str | None = None  # names in id order, "regression", or None: taken from the train split
    metrics: list[str] = field(default_factory=lambda: ["f1_macro", "accuracy"])  # the first chooses the checkpoint
    model: str | dict = "google-bert/bert-base-uncased"  # a mapping of config values + vocab: trained from scratch
    max_length: int | None = None  # tokens; None: as many as the model can read
    dataset: dict | None = None  # {path, name, revision} on the Hub
    files: dict | None = None  # {train, validation, test}
    split: dict = field(default_factory=dict)  # fractions of train for missing splits: {validation: 0.1, seed: 42}
    defaults: dict = field(default_factory=dict)  # values for flags of train.py
    source: str = ""
    licence: str = ""

    @property
    def is_regression(self):
        return self.labels == "regression"

    @property
    def number_of_outputs(self):
        return 1 if self.is_regression else len(self.labels)


# ------------------------------------------------------------------------------------------- reading a description

TYPES = {
    "text": (str, list),
    "label": str,
    "labels": (str, list),
    "metrics": list,
    "model": (str, dict),
    "max_length": int,
    "dataset": dict,
    "files": dict,
    "split": dict,
    "defaults": dict,
    "source": str,
    "licence": str,
}
INNER_KEYS = {
    "dataset": {"path", "name", "revision"},
    "files": set(SPLIT_NAMES),
    "split": {"validation", "test", "seed"},
}


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
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})", "Check the path given to --task.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(
            f"{path}: is not YAML ({' '.join(str(error).split())})", "Mend the file at this place."
        ) from None
    return replace(task_from_mapping(content, path), name=path.stem)


def task_from_mapping(content, path):
    """Check the keys and types of a task's description and return the Task; files are relative to the YAML's folder."""
    if not isinstance(content, dict):
        raise BadInput(f"{path}: is not a mapping of keys to values", "See data/demo.yaml for the form of a task.")
    for key, value in content.items():
        if key not in TYPES:
            raise BadInput(f'{path}: unknown key "{key}"{nearest(key, TYPES)}', f"Keys: {', '.join(TYPES)}.")
        if not isinstance(value, TYPES[key]) or isinstance(value, bool):
            raise BadInput(
                f'{path}: "{key}" is {value!r}, a {type(value).__name__}',
                f"Write {_type_words(TYPES[key])}; put a word that YAML reads as something else in quotes.",
            )
        for inner in value if key in INNER_KEYS else ():
            if inner not in INNER_KEYS[key]:
                raise BadInput(
                    f'{path}: unknown key "{inner}" in "{key}"{nearest(inner, INNER_KEYS[key])}',
                    f"Keys: {', '.join(sorted(INNER_KEYS[key]))}.",
                )
    if ("dataset" in content) == ("files" in content):
        raise BadInput(f"{path}: needs either `dataset` (on the Hub) or `files`", "See data/mrpc.yaml, data/demo.yaml.")
    content = dict(content)
    if isinstance(content.get("text"), str):
        content["text"] = [content["text"]]
    if isinstance(content.get("labels"), list):
        # YAML reads `no` as False and 1 as a number: a name must be a string, whatever it looks like.
        for name in content["labels"]:
            if not isinstance(name, (str, int)) or isinstance(name, bool):
                raise BadInput(f'{path}: the label {name!r} in "labels" is not a name', "Put each name in quotes.")
        content["labels"] = names = [str(name) for name in content["labels"]]
        if len(names) < 2 or len(set(names)) < len(names):
            raise BadInput(f'{path}: "labels" is {names}', "Write two or more names, each of them once.")
    elif content.get("labels", "regression") != "regression":
        raise BadInput(f'{path}: "labels" is {content["labels"]!r}', "Write a list of names, or: labels: regression")
    if "path" not in content.get("dataset", {"path": ""}):
        raise BadInput(
            f'{path}: "dataset" has no path', "Write dataset: {path: ...}, and name: ... where it has parts."
        )
    if isinstance(content.get("model"), dict) and "vocab" not in content["model"]:
        raise BadInput(f'{path}: "model" has no vocab', "Name a vocabulary file: model: {model_type: ..., vocab: ...}.")
    folder = Path(path).resolve().parent
    if "files" in content:
        content["files"] = {split: str(folder / str(file)) for split, file in content["files"].items()}
    if isinstance(content.get("model"), dict):
        content["model"] = {**content["model"], "vocab": str(folder / str(content["model"]["vocab"]))}
    return Task(name="", **content)


def _type_words(types):
    words = {str: "a word", list: "a list", dict: "a mapping", int: "a whole number"}
    return " or ".join(words[kind] for kind in (types if isinstance(types, tuple) else (types,)))


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
    for split in ("train", "validation", "test"):
        group.add_argument(f"--{split}_file", metavar="FILE", help=f"{split} data: .csv, .tsv, .jsonl (or these .gz)")
    group.add_argument("--text_columns", metavar="A[,B]", help="one text column, or two for pairs (default: text)")
    group.add_argument("--label_column", metavar="NAME", help="the column of labels (default: label)")
    group.add_argument("--metrics", metavar="A[,B]", help="scores; the first one chooses the best checkpoint")
    group.add_argument(
        "--max_length", type=positive, metavar="TOKENS", help="longer texts are cut (default: the model's limit)"
    )
    group.add_argument(
        "--limit", action="append", metavar="SPLIT=N", help="use N rows of a split, drawn seeded and stratified"
    )
    group.add_argument("--refresh", action="store_true", help="ask the Hub for newer commits of the data and the model")


def task_of(args, default=None):
    """Return the Task that --task and the data flags describe; `default` is the name of a task, or a Task."""
    files = {split: getattr(args, f"{split}_file") for split in ("train", "validation", "test")}
    files = {split: os.path.abspath(file) for split, file in files.items() if file}
    if args.task or not files or isinstance(default, Task):
        task = default if isinstance(default, Task) and not args.task else read_task(args.task or default)
        # New files replace the task's own data; everything else it says still holds.
        task = replace(task, dataset=None, files=files) if files else task
    else:
        task = Task(name=Path(next(iter(files.values()))).name.split(".")[0], files=files)
    given = {
        "text": args.text_columns and args.text_columns.split(","),
        "label": args.label_column,
        "metrics": args.metrics and args.metrics.split(","),
        "max_length": args.max_length,
    }
    task = replace(task, **{key: value for key, value in given.items() if value})
    if task.text and len(task.text) > 2:
        raise BadInput(f"--text_columns {','.join(task.text)}: more than two", "Give one column, or two for pairs.")
    return task


def set_defaults(parser, task):
    """Make the task's `defaults` those of the parser, so that a flag on the command line still goes before."""
    actions = {action.dest: action for action in parser._actions}
    for name, value in task.defaults.items():
        action = actions.get(name)
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


def limits_of(args):
    """Return {split: rows} of the --limit flags."""
    limits = {}
    for text in args.limit or []:
        split, _, number = text.partition("=")
        if not number.isdecimal() or int(number) < 1:
            raise BadInput(f"--limit {text}: not SPLIT=N", "Write for example --limit train=1000.")
        limits[split] = int(number)
    return limits


# ------------------------------------------------------------------------------------------- task.json


def check_task(task):
    """Raise BadInput where text columns or metrics do not fit. The labels must be known (see load_splits)."""
    try:
        metrics.check(task.metrics, None if task.is_regression else len(task.labels))
    except ValueError as error:
        reason, *advice = str(error).splitlines()
        raise BadInput(f"task {task.name}: {reason}", " ".join(advice) or "Choose others with --metrics.") from None


def save_task(task, fingerprints, path):
    """Write task.json: everything that evaluate.py and predict.py need, and the fingerprints of the data."""
    content = {**asdict(task), "fingerprints": fingerprints}
    content.pop("defaults")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def saved_task(folder):
    """Return (Task, fingerprints by split) of a model folder; (None, {}) where there is no task.json."""
    path = Path(folder) / "task.json"
    if not path.is_file():
        return None, {}
    content = json.loads(path.read_text(encoding="utf-8"))
    known = {f.name for f in fields(Task)}
    return Task(**{key: value for key, value in content.items() if key in known}), content.get("fingerprints", {})


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
