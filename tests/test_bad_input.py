"""Bad input as a user meets it, through the scripts: exit code 2, a line of reason, a line of advice, nothing written.

What is expected here is written by hand, from what a user needs: which file, line, column and value, and what to do.
"""

import csv
import gzip
import io
import json
import shutil
import zipfile
from pathlib import Path

import pyarrow
import pytest
import torch
import yaml
from conftest import CACHE, TORCHRUN_2, WORDS, bert_config, run_script
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from classifier.data.cache import cache_folder

TRAIN = """text,label
the room was good,positive
the film was bad,negative
the meal was very fine,positive
the book was dull,negative
"""
VALIDATION = "text,label\nthe hotel was great,positive\nthe train was awful,negative\n"
BOTH = ("--train_file", "train.csv", "--validation_file", "validation.csv")
TASK = {
    "files": {"train": "train.csv", "validation": "validation.csv"},
    "text": "text",
    "label": "label",
    "labels": ["negative", "positive"],
    "metrics": ["accuracy"],
}
# A whole reason, not a part of it, where it is written with this mark; HERE stands for the folder of the files.
EXACTLY = "= "
LOGGED = ", 1 process, precision "


def contents_of(folder):
    """Return {path: bytes} of all files, and {path: None} of all folders, under a folder."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def write_files(folder, files):
    for name, content in files.items():
        if isinstance(content, dict):
            content = yaml.safe_dump(content)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def check(errors, reason, advice, folder, script="train.py"):
    """Check what a script printed on standard error: two lines, with these parts."""
    assert "Traceback" not in errors
    lines = errors.splitlines()
    if script == "predict.py":  # its standard output is for predictions: its log goes to standard error, too
        lines = [line for line in lines if LOGGED not in line]
    assert len(lines) == 2 and errors.endswith("\n"), errors
    first, second = f"{script}: error: ", f"{script}: "
    assert lines[0].startswith(first) and lines[1].startswith(second), errors
    assert not lines[1].startswith(first) and len(lines[1]) > len(second) + 3, errors
    shown_reason, shown_advice = lines[0].removeprefix(first), lines[1].removeprefix(second)
    for part in [reason] if isinstance(reason, str) else reason:
        part = part.replace("HERE", str(folder))
        is_exact = part.startswith(EXACTLY)
        assert shown_reason == part.removeprefix(EXACTLY) if is_exact else part in shown_reason, shown_reason
    for part in advice:
        assert part in shown_advice, shown_advice


@pytest.fixture
def refused(run_inside, tmp_path):
    """A function that runs a script on bad input in tmp_path, and checks all that this file promises."""

    def run(*flags, reason, advice, script="train.py"):
        before = contents_of(tmp_path)
        code, printed, errors = run_inside(script, "--threads", 1, *flags, cwd=tmp_path)
        assert code == 2, printed + errors
        assert "Traceback" not in printed
        check(errors, reason, advice, tmp_path, script)
        assert contents_of(tmp_path) == before
        assert not list(Path(CACHE).rglob("*.tmp"))

    return run


def case(name, files, reason, *advice, flags=BOTH):
    """A row of a table of bad input."""
    return pytest.param(files, flags, reason, advice, id=name)


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(f"{name}.csv", content)
    return file.getvalue()


def table(**columns):
    """The bytes of a Parquet file."""
    file = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def lines(*objects):
    """JSON lines; a str is a line as it is."""
    return "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in objects)


def row(text, label):
    return {"text": text, "label": label}


# ------------------------------------------------------------------------------------------------------------- files


CHINESE = "text,label\n这家酒店的房间非常干净服务员也很热情,好\n房间又小又吵早餐也不好吃,坏\n"
GERMAN = "text,label\nDas Frühstück war schön,gut\nDie Straße vor der Tür ist zu laut,schlecht\n"
JSONL = ("--train_file", "train.jsonl", "--validation_file", "validation.csv")
PARQUET = ("--train_file", "train.parquet", "--validation_file", "validation.csv")
ZIPPED = archive(train=TRAIN, validation=VALIDATION)
GZIPPED = gzip.compress(TRAIN.encode() * 50, mtime=0)

FILES = [
    case(
        "no such file",
        {},
        '= HERE/trian.csv: no such file (did you mean "train.csv"?)',
        "path",
        flags=("--train_file", "trian.csv"),
    ),
    case("a folder", {}, ("HERE", "is a folder"), "file", flags=("--train_file", "folder.csv")),
    case(
        "an unknown suffix",
        {"train.txt": TRAIN},
        ("HERE/train.txt: ", "format"),
        *(".csv", ".tsv", ".jsonl", ".parquet"),
        flags=("--train_file", "train.txt"),
    ),
    case("an empty file", {"train.csv": ""}, "= HERE/train.csv: has no rows", "header", "one row"),
    case("a header alone", {"train.csv": "text,label\n"}, "= HERE/train.csv: has no rows", "header", "one row"),
    case(
        "an empty JSON list",
        {"train.json": "[]"},
        "= HERE/train.json: has no rows",
        "one row",
        flags=("--train_file", "train.json"),
    ),
    case("no rows in validation", {"validation.csv": "text,label\n"}, "= HERE/validation.csv: has no rows", "one row"),
    case(
        "a member that is not there",
        {"data.zip": ZIPPED},
        '= HERE/data.zip: has no member trian.csv (did you mean "train.csv"?)',
        "train.csv, validation.csv",
        flags=("--train_file", "data.zip::trian.csv"),
    ),
    case(
        "no archive",
        {},
        "HERE/data.zip::train.csv: no such file",
        "path",
        flags=("--train_file", "data.zip::train.csv"),
    ),
    case(
        "half a .gz",
        {"train.csv.gz": GZIPPED[: len(GZIPPED) // 2]},
        ("HERE/train.csv.gz: ", ".gz"),
        "again",
        flags=("--train_file", "train.csv.gz"),
    ),
    case(
        "a .gz with a wrong byte",
        {"train.csv.gz": GZIPPED[:-6] + b"?" + GZIPPED[-5:]},
        ("HERE/train.csv.gz: ", ".gz"),
        "again",
        flags=("--train_file", "train.csv.gz"),
    ),
    case(
        "a .gz that is none",
        {"train.csv.gz": TRAIN},
        ("HERE/train.csv.gz: ", ".gz"),
        "again",
        flags=("--train_file", "train.csv.gz"),
    ),
    case("a .parquet that is none", {"train.parquet": TRAIN}, "HERE/train.parquet: is not a Parquet", flags=PARQUET),
    case(
        "GB18030",
        {"train.csv": CHINESE.encode("gb18030")},
        # "text,label" and a line break are 11 bytes.
        ("HERE/train.csv, line 2: ", 'column "text"', "0xd5 is not UTF-8", "byte 11 of the file"),
        "--encoding gb18030",
    ),
    case(
        "Latin-1",
        {"train.csv": GERMAN.encode("cp1252")},
        ("HERE/train.csv, line 2: ", 'column "text"', "0xfc is not UTF-8", "'Das Fr'", "byte 17 of the file"),
        "--encoding cp1252",
    ),
    case(
        "UTF-16",
        {"train.csv": CHINESE.encode("utf-16")},
        ("HERE/train.csv: is not ", "byte 0 of the file is 0xff"),
        "--encoding utf-16",
    ),
    case(
        "not the encoding that was given",
        {"train.csv": GERMAN},
        "HERE/train.csv: is not ascii",
        "--encoding utf-8",
        flags=(*BOTH, "--encoding", "ascii"),
    ),
    case(
        "an unknown encoding",
        {},
        "--encoding latin-one",
        "latin-1",
        flags=(*BOTH, "--encoding", "latin-one"),
    ),
    # ----------------------------------------------------------------------------------------------- columns
    case(
        "no label column",
        {"train.csv": "text,sentiment\nthe room was good,positive\n"},
        ("HERE/train.csv, line ", 'no column "label"'),
        "text, sentiment",
        "--label_column",
    ),
    case(
        "a misspelt label column",
        {"train.csv": TRAIN.replace("label", "lable")},
        ("HERE/train.csv, line ", 'no column "label" (did you mean "lable"?)'),
        "text, lable",
        "--label_column",
    ),
    case(
        "a misspelt text column",
        {},
        ("HERE/train.csv, line ", 'no column "txt" (did you mean "text"?)'),
        "text, label",
        "--text_columns",
        flags=(*BOTH, "--text_columns", "txt"),
    ),
    case(
        "two text columns or one",
        {"train.csv": "question,answer,label\nwhy,so,positive\n"},
        "= HERE/train.csv: cannot tell the text column among: question, answer",
        "--text_columns FIRST,SECOND",
    ),
    case(
        "a column of validation",
        {"validation.csv": VALIDATION.replace("text", "review")},
        ("HERE/validation.csv, line ", 'no column "text"'),
        "review, label",
        "--text_columns",
    ),
    case(
        "a column twice",
        {"train.csv": "text,label,text\na,b,c\n"},
        ("HERE/train.csv, line 1: ", '"text" twice'),
        "its own name",
    ),
    case(
        "a JSON key twice",
        {"train.jsonl": lines(row("a", "b"), '{"text": "a", "label": "b", "text": "c"}')},
        ("HERE/train.jsonl, line 2: ", '"text" twice'),
        "its own name",
        flags=JSONL,
    ),
    case(
        "no group column",
        {},
        ("HERE/train.csv, line ", 'no column "author"'),
        "text, label",
        "--group_column",
        flags=("--train_file", "train.csv", "--group_column", "author"),
    ),
    case(
        "semicolons",
        {"train.csv": TRAIN.replace(",", ";")},
        ("HERE/train.csv, line 1: ", "'text;label'"),
        "--delimiter ';'",
    ),
    case(
        "tabs in a .csv",
        {"train.csv": TRAIN.replace(",", "\t")},
        ("HERE/train.csv, line 1: ", r"'text\tlabel'"),
        "--delimiter tab",
    ),
    case(
        "a delimiter of two characters",
        {},
        "'||'",
        "tab",
        flags=(*BOTH, "--delimiter", "||"),
    ),
    case(
        "a text that is a number in JSON",
        {"train.jsonl": lines(row("the room was good", "positive"), row(5, "negative"))},
        '= HERE/train.jsonl, line 2: column "text" holds 5, not text',
        "--on_bad_row skip",
        flags=JSONL,
    ),
    case(
        "a text column of numbers in JSON",
        {"train.jsonl": lines(row(5, "positive"), row(6, "negative"))},
        '= HERE/train.jsonl, line 1: column "text" holds 5, not text',
        "--on_bad_row skip",
        flags=JSONL,
    ),
    case(
        "a text column of numbers in Parquet",
        {"train.parquet": table(text=[5, 6], label=["positive", "negative"])},
        '= HERE/train.parquet, record 1: column "text" holds 5, not text',
        flags=PARQUET,
    ),
    case(
        "a text column of numbers in Parquet, named",
        {"train.parquet": table(text=[5, 6], label=["positive", "negative"])},
        '= HERE/train.parquet, record 1: column "text" holds 5, not text',
        flags=(*PARQUET, "--text_columns", "text"),
    ),
    # -------------------------------------------------------------------------------------------------- rows
    case(
        "a ragged row",
        {"train.csv": TRAIN + "nice, clean and quiet,positive\n"},
        ("HERE/train.csv, line 6: 3 fields", "2 columns (text, label)"),
        "Quote",
        "--on_bad_row skip",
    ),
    case(
        "a short row",
        {"train.csv": TRAIN + "clean and quiet\n"},
        ("HERE/train.csv, line 6: 1 field", "2 columns (text, label)"),
        "--on_bad_row skip",
    ),
    case(
        "a quote left open",
        {"train.csv": TRAIN + '"clean and quiet,positive\nbad,negative\n'},
        ("HERE/train.csv, from line 6: ", "quote left open"),
        "Fix",
    ),
    case(
        "a quote inside",
        {"train.csv": TRAIN + '"clean" and quiet,positive\n'},
        ("HERE/train.csv, from line 6: ", "quote"),
        "Fix",
    ),
    case(
        "an empty text",
        {"train.csv": TRAIN + ",positive\n"},
        '= HERE/train.csv, line 6: column "text" is empty',
        "Fix",
        "--on_bad_row skip",
    ),
    case(
        "a text of blanks",
        {"train.csv": TRAIN + "  ,positive\n"},
        ('HERE/train.csv, line 6: column "text" ',),
        "--on_bad_row skip",
    ),
    case(
        "no label",
        {"train.csv": TRAIN + "clean and quiet,\n"},
        '= HERE/train.csv, line 6: column "label" holds no label',
        "Fix",
        "--on_bad_row skip",
    ),
    case(
        "a null as label",
        {"train.jsonl": lines(row("a", "positive"), row("b", "negative"), row("c", None))},
        '= HERE/train.jsonl, line 3: column "label" holds no label',
        "--on_bad_row skip",
        flags=JSONL,
    ),
    case(
        "a list as label",
        {"train.jsonl": lines(row("a", "positive"), row("b", ["negative", "positive"]))},
        ('HERE/train.jsonl, line 2: column "label" holds [', "multi_label"),
        "--on_bad_row skip",
        flags=JSONL,
    ),
    case(
        "NaN as label",
        {"train.jsonl": lines(row("a", "positive"), '{"text": "b", "label": NaN}')},
        '= HERE/train.jsonl, line 2: column "label" holds nan, not a label',
        "--on_bad_row skip",
        flags=JSONL,
    ),
    case(
        "no JSON on a line",
        {"train.jsonl": lines(row("a", "positive"), '{"text": "b", "label": ')},
        "HERE/train.jsonl, line 2: is not JSON",
        "object",
        flags=JSONL,
    ),
    case(
        "a list on a JSON line",
        {"train.jsonl": lines(row("a", "positive"), '["b", "negative"]')},
        ("HERE/train.jsonl, line 2: ", '["b", "negative"]'),
        '{"text": ',
        flags=JSONL,
    ),
    case(
        "NUL",
        {"train.csv": TRAIN + "clean and\0quiet,positive\n"},
        '= HERE/train.csv, line 6: column "text": the field holds a NUL character',
        "--on_bad_row skip",
    ),
    # ------------------------------------------------------------------------------------------------ labels
    case(
        "an unknown label in validation",
        {"validation.csv": VALIDATION + "the phone was fine,postive\n"},
        ("HERE/validation.csv, line 4: column \"label\" holds 'postive'", 'did you mean "positive"'),
        "negative, positive",
        "--on_bad_row skip",
    ),
    case(
        "a label that is not in the task",
        {"train.csv": TRAIN + "so so,neutral\n", "my.yaml": TASK},
        "HERE/train.csv, line 6: column \"label\" holds 'neutral'",
        "negative, positive",
        flags=("--task", "my.yaml"),
    ),
    case(
        "one class",
        {"train.csv": "text,label\na,positive\nb,positive\n"},
        ("HERE/train.csv", '"label"', "positive"),
        "two",
        "--label_column",
    ),
    case(
        "numbers and names",
        {"train.csv": "text,label\na,positive\nb,0\nc,positive\n"},
        ('"label"', "0: HERE/train.csv, line 3", "positive: HERE/train.csv, line 2"),
        "labels: [",
    ),
    case(
        "truth values and names",
        {"train.jsonl": lines(row("a", True), row("b", "negative"), row("c", "positive"))},
        ('"label"', "HERE/train.jsonl, line 1", "true"),
        flags=JSONL,
    ),
    case(
        "decimals",
        {"train.csv": "text,label\na,2\nb,0.5\nc,3.25\n"},
        ("HERE/train.csv, line 3: ", '"label"', "0.5"),
        *("--task", "labels: regression", "label: label", "files", "text", "metrics: ["),
    ),
    case(
        "a word where the task asks for numbers",
        {
            "train.csv": "text,label\na,2\nb,0.5\nc,good\n",
            "my.yaml": TASK | {"labels": "regression", "metrics": ["mse"]},
        },
        "HERE/train.csv, line 4: column \"label\" holds 'good'",
        "a number",
        flags=("--task", "my.yaml"),
    ),
]


@pytest.mark.parametrize(("files", "flags", "reason", "advice"), FILES)
def test_data(tmp_path, refused, files, flags, reason, advice):
    (tmp_path / "folder.csv").mkdir()
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, **files})
    refused(*flags, reason=reason, advice=advice)


def test_a_field_of_more_than_10_million_characters(tmp_path, refused):
    write_files(tmp_path, {"train.csv": f"{TRAIN}{'x' * 10_000_001},positive\n"})
    reason = ("HERE/train.csv, line 6: ", "10,000,000 characters")
    refused("--train_file", "train.csv", reason=reason, advice=("--on_bad_row skip",))


# ------------------------------------------------------------------------------------------------- tasks and flags


def without(key):
    return {name: value for name, value in TASK.items() if name != key}


YAML = [
    case("an unknown key", TASK | {"owner": "me"}, '= my.yaml: unknown key "owner"', "dataset, files, text, label"),
    case("a misspelt key", TASK | {"metrisc": ["f1"]}, 'my.yaml: unknown key "metrisc" (did you mean "metrics"?)'),
    case(
        "a misspelt key inside",
        TASK | {"files": {"trian": "train.csv"}},
        ("my.yaml: ", '"trian" in "files" (did you mean "train"?)'),
        "test, train, validation",
    ),
    case("a flag of training", TASK | {"learning_rate": 1e-5}, 'my.yaml: unknown key "learning_rate"', "defaults"),
    case(
        "yes and no",
        yaml.safe_dump(without("labels")) + "labels: [yes, no]\n",
        ("my.yaml: ", '"labels"', "True"),
        "quotes",
    ),
    case(
        "one label",
        TASK | {"labels": ["positive"]},
        ("my.yaml: ", '"labels"', "['positive']"),
        "two or more",
    ),
    case("a label twice", TASK | {"labels": ["a", "b", "a"]}, ("my.yaml: ", '"labels"'), "once"),
    case(
        "a string for a number",
        TASK | {"max_length": "64"},
        ("my.yaml: ", "\"max_length\" is '64'"),
        "a whole number above 0",
    ),
    case("a word for a list", TASK | {"metrics": "accuracy"}, ("my.yaml: ", "\"metrics\" is 'accuracy'"), "a list"),
    case("a truth value", TASK | {"quoting": "on"}, ("my.yaml: ", "\"quoting\" is 'on'"), "a truth value"),
    case("no choice", TASK | {"truncate": "middle"}, ("my.yaml: ", '"truncate"'), "head, tail, head_tail"),
    case(
        "a key twice",
        yaml.safe_dump(TASK) + "text: review\n",
        ("my.yaml: ", 'the key "text" occurs twice', "line 1"),  # 10 or 11
        "Fix",
    ),
    case("no YAML", "files: {train: train.csv\nlabel: x\n", ("my.yaml: is not YAML", "line 2"), "Fix"),
    case("an empty YAML", "", "my.yaml: is not a mapping", "data/demo.yaml"),
    case("no data", without("files"), "my.yaml: needs either `dataset`", "data/demo.yaml"),
    case("data twice", TASK | {"dataset": {"path": "glue"}}, "my.yaml: needs either `dataset`", "data/demo.yaml"),
    case("a share of 1.5", TASK | {"split": {"test": 1.5}}, ("my.yaml: ", "test: 1.5"), "test: 0.1"),
    case(
        "another metric", TASK | {"metrics": ["acuracy"]}, ("task my: ", "'acuracy'", 'did you mean "accuracy"'), "..."
    ),
    case(
        "a wrong default",
        TASK | {"defaults": {"learning_rat": 1e-5}},
        ("task my: ", '"learning_rat" in `defaults`', 'did you mean "learning_rate"'),
        "--help",
    ),
    case(
        "a word as default",
        TASK | {"defaults": {"learning_rate": "fast"}},
        ("task my: ", "learning_rate: 'fast' in `defaults`"),
        "--help",
    ),
    case(
        "a default out of range",
        TASK | {"defaults": {"batch_size": 0}},
        ("task my: ", "batch_size: 0 in `defaults`"),
        "--help",
    ),
    case(
        "no choice as default",
        TASK | {"defaults": {"scheduler": "quadratic"}},
        ("task my: ", "scheduler: 'quadratic' in `defaults`"),
        "linear, cosine, polynomial",
    ),
    case(
        "a default about the data",
        TASK | {"defaults": {"max_length": 20}},
        ("task my: ", '"max_length" in `defaults`'),
        "key of the task",
    ),
    case("a model without vocab", TASK | {"model": {"model_type": "bert"}}, "my.yaml: ", "vocab: "),
    case(
        "no vocabulary there",
        TASK | {"model": {"model_type": "bert", "vocab": "vocab.txt"}},
        "= HERE/vocab.txt: no such vocabulary file",
        "`vocab`",
    ),
    case(
        "an empty vocabulary",
        TASK | {"model": {"model_type": "bert", "vocab": "train.csv.empty"}},
        "= HERE/train.csv.empty: has no vocabulary",
        "one token on each line",
    ),
]


@pytest.mark.parametrize(("content", "_", "reason", "advice"), YAML)
def test_tasks(tmp_path, refused, content, _, reason, advice):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, "train.csv.empty": "", "my.yaml": content})
    refused("--task", "my.yaml", reason=reason, advice=[part for part in advice if part != "..."])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_sise": 64}, 'unknown key "hidden_sise" in `model` (did you mean "hidden_size"?)'),
        ({"model_type": "brt"}, "brt"),
        ({"hidden_size": "32"}, "'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "number of attention heads (3)"),
    ],
    ids=["a misspelt key", "a misspelt type", "a string for a number", "sizes that do not fit"],
)
def test_models_in_a_yaml(tmp_path, refused, vocabulary, changes, reason):
    model = bert_config(vocabulary, **changes)
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, "my.yaml": TASK | {"model": model}})
    refused("--task", "my.yaml", reason=("task my: ", reason), advice=("config.json",))


FLAGS = [
    case("an unknown task", {}, '= no task is named "mrcp" (did you mean "mrpc"?)', "mrpc", flags=("--task", "mrcp")),
    case("no such YAML", {}, "nosuch.yaml: cannot be read", "--task", flags=("--task", "nosuch.yaml")),
    case("a wrong metric", {}, ("'acuracy'", 'did you mean "accuracy"'), flags=(*BOTH, "--metrics", "acuracy")),
    case("a metric for numbers", {}, ("pearson", "accuracy"), flags=(*BOTH, "--metrics", "pearson")),
    case(
        "a limit of a split that is not there",
        {},
        "--limit",
        "train, validation",
        flags=(*BOTH, "--limit", "tset=5"),
    ),
    case("a limit that is none", {}, "--limit train", "train=1000", flags=(*BOTH, "--limit", "train")),
    case(
        "data given twice",
        {},
        ("--dataset", "twice"),
        "one of them",
        flags=(*BOTH, "--dataset", "glue:mrpc"),
    ),
    # As from a shell where a variable is not set.
    *(
        case(
            f"an empty {flag}",
            {},
            flag,
            flags=(flag, "", "--max_steps", 1),
        )
        for flag in ("--task", "--dataset", "--train_file")
    ),
    case(
        "an empty text column",
        {},
        "text columns text,: neither one nor two",
        "A,B",
        flags=(*BOTH, "--text_columns", "text,"),
    ),
    case(
        "a seed of 11 digits",
        {},
        "--seed",
        flags=(*BOTH, "--model", "tiny", "--seed", 99999999999),
    ),
    case(
        "a long name of a folder",
        {},
        "too long",
        "--output_dir",
        flags=(*BOTH, "--model", "tiny", "--output_dir", 300 * "a"),
    ),
    case(
        "no test split",
        {},
        "has no test split",
        "train, validation",
        flags=(*BOTH, "--final_test"),
    ),
    case(
        "a model that cannot be downloaded",
        {},
        ("nosuch/model", "https://huggingface.co"),
        *("HF_ENDPOINT", "--train_file", "--model FOLDER", "--task demo"),
        flags=(*BOTH, "--model", "nosuch/model"),
    ),
    case(
        "no such model folder",
        {},
        '= ./folder.cvs: no such folder (did you mean "folder.csv"?)',
        "--model",
        flags=(*BOTH, "--model", "./folder.cvs"),
    ),
    case(
        "a mistyped folder with backslashes",
        {},
        '= .\\folder.cvs: no such folder (did you mean "folder.csv"?)',
        "--model",
        flags=(*BOTH, "--model", ".\\folder.cvs"),
    ),
    case(
        "a folder on a drive",
        {},
        "= C:/models/mine: no such folder",
        "--model",
        flags=(*BOTH, "--model", "C:/models/mine"),
    ),
    case(
        "a folder as a data set",
        {},
        "= --dataset C:\\data\\set: is a path, not an id of the Hub",
        "--train_file",
        flags=("--dataset", "C:\\data\\set"),
    ),
    case(
        "the working folder as a data set",
        {},
        "= --dataset .: is a path, not an id of the Hub",
        "--train_file",
        flags=("--dataset", "."),
    ),
    case(
        "a mistyped model in a run",
        {},
        "= runs/tiny/modle: no such folder",
        "--model",
        flags=(*BOTH, "--model", "runs/tiny/modle"),
    ),
    case(
        "a model that is a file",
        {},
        "= train.csv: is a file, not a model folder",
        "config.json",
        flags=(*BOTH, "--model", "train.csv"),
    ),
    case(
        "a data set that cannot be downloaded",
        {},
        "nosuch/data",
        *("HF_ENDPOINT", "--train_file", "--task demo"),
        flags=("--dataset", "nosuch/data"),
    ),
]


@pytest.mark.parametrize(("files", "flags", "reason", "advice"), FLAGS)
def test_flags(tmp_path, refused, tiny_bert, files, flags, reason, advice):
    (tmp_path / "folder.csv").mkdir()
    shutil.copytree(tiny_bert, tmp_path / "tiny")
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, **files})
    refused(*flags, reason=reason, advice=advice)


@pytest.mark.parametrize("output", ["taken", "taken/run"])
def test_an_output_folder_that_is_a_file(tmp_path, refused, output):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, "taken": "notes"})
    refused(*BOTH, "--output_dir", output, reason="= taken: is a file, not a folder", advice=("--output_dir",))


# ------------------------------------------------------------------------------------------------------------- models


def change(folder, **values):
    """Change keys of a model folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def fewer_words(folder):
    key = "embeddings.word_embeddings.weight"
    change_weights(folder, lambda weights: weights.update({key: weights[key][:10].clone()}))
    change(folder, vocab_size=10)


def a_nan(folder):
    change_weights(folder, lambda weights: weights["encoder.layer.1.output.dense.weight"][3].fill_(float("nan")))


def of_another_model(folder):
    save_file({"wte.weight": torch.zeros(10, 32)}, folder / "model.safetensors", metadata={"format": "pt"})


def half_the_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def bin_of(size):
    """Return a function that puts the first part of a pytorch_model.bin in the place of model.safetensors."""

    def shorten(folder):
        file = folder / "pytorch_model.bin"
        torch.save(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors").unlink()
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * size)])

    return shorten


def a_pointer(folder):
    (folder / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab\nsize 440473133\n"
    (folder / "pytorch_model.bin").write_text(pointer)


def without_files(*patterns):
    def remove(folder):
        for pattern in patterns:
            for file in folder.glob(pattern):
                file.unlink()

    return remove


MODELS = {
    "too few embeddings": (
        fewer_words,
        (f"token ids up to {len(WORDS) + 4}, but the model has embeddings for 10 only", "ids 0 to 9"),
        f"resize_token_embeddings({len(WORDS) + 5})",
    ),
    "NaN": (
        a_nan,
        "= model: the weights bert.encoder.layer.1.output.dense.weight contain NaN or infinite values",
        "checkpoint",
    ),
    "half a model.safetensors": (half_the_weights, "classifier: model.safetensors is damaged (", "again"),
    "half a pytorch_model.bin": (bin_of(1 / 2), ": pytorch_model.bin is damaged", "again"),
    "the start of a pytorch_model.bin": (bin_of(1 / 100), ": pytorch_model.bin is damaged", "again"),
    "an empty pytorch_model.bin": (bin_of(0), ": pytorch_model.bin is damaged", "again"),
    "a pointer of git-lfs": (a_pointer, ": pytorch_model.bin is a pointer of git-lfs", "git lfs pull"),
    "no weights": (without_files("model.safetensors"), ("model: cannot be loaded", "model.safetensors"), "weights"),
    "an empty folder": (without_files("*"), "model: cannot be loaded", "config.json"),
    "no config.json": (without_files("config.json"), ("model: cannot be loaded", "config.json"), "--model"),
    "no tokenizer": (without_files("*token*", "vocab*"), "= model: has no vocabulary", "tokenizer.json"),
    "half a config.json": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "be'),
        ("model: cannot be loaded", "config.json"),
        "--model",
    ),
    "a list as config.json": (lambda folder: (folder / "config.json").write_text("[]"), "model: cannot be", "config"),
    "half a tokenizer.json": (
        lambda folder: (folder / "tokenizer.json").write_text('{"version": '),
        "model: cannot be loaded",
        "tokenizer",
    ),
    "a size that is a word": (
        lambda folder: change(folder, hidden_size="small"),
        ("model: cannot be loaded", "'hidden_size' expected int"),
        "config.json",
    ),
    "a type that is unknown": (lambda folder: change(folder, model_type="brt"), ("model: cannot be", "brt"), "config"),
    "an image model": (lambda folder: change(folder, model_type="vit"), ("model: cannot be", "vit"), "--model"),
    "sizes of another model": (
        lambda folder: change(folder, hidden_size=64),
        ("model: ", "another shape", "bert.embeddings.LayerNorm.bias"),
        "same checkpoint",
    ),
    "weights of another model": (of_another_model, "the checkpoint lacks 37", "same checkpoint"),
}


@pytest.mark.parametrize("damage", MODELS)
def test_model_folders(tmp_path, refused, tiny_bert, damage):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION})
    shutil.copytree(tiny_bert, tmp_path / "model")
    do, reason, advice = MODELS[damage]
    do(tmp_path / "model")
    refused(*BOTH, "--model", "model", reason=reason, advice=(advice,))


def test_more_tokens_than_positions(tmp_path, refused, tiny_bert):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION})
    flags = [*BOTH, "--model", tiny_bert, "--max_length", 33]
    refused(*flags, reason=("max_length 33", "32 positions"), advice=("--max_length 32",))


def test_a_part_of_a_model_that_is_not_there(tmp_path, refused, tiny_bert):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION})
    reason = "= --freeze 3: no such part of this model"
    refused(*BOTH, "--model", tiny_bert, "--freeze", 3, reason=reason, advice=("none, encoder, embeddings, 1, 2",))


def test_a_model_of_the_hub_whose_files_are_out_of_reach(tmp_path, refused):
    # Its commit is known here, of a run that was interrupted, say.
    (cache_folder() / "models--some--model--main.commit").write_text("0" * 40)
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION})
    reason = ("cannot download some/model from https://", "cached files")
    advice = ("HF_ENDPOINT", "--model FOLDER", "--task demo")
    refused(*BOTH, "--model", "some/model", reason=reason, advice=advice)


@pytest.fixture
def classifier(tmp_path, tiny_bert):
    """A function that makes a model folder with a head for these labels, and no task.json."""
    from transformers import BertConfig, BertForSequenceClassification

    def make(*labels):
        config = BertConfig.from_pretrained(tiny_bert, id2label=dict(enumerate(labels)), label2id=None)
        config.label2id = {label: number for number, label in enumerate(labels)}
        folder = tmp_path / "model"
        shutil.copytree(tiny_bert, folder)
        BertForSequenceClassification(config).save_pretrained(folder)
        return folder

    return make


def test_a_head_that_does_not_fit_is_refused_by_evaluate_and_replaced_by_train(
    tmp_path, refused, classifier, run_inside
):
    classifier("world", "sport")
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, "my.yaml": TASK})
    refused(
        *("--model", "model", "--task", "my.yaml"),
        script="evaluate.py",
        reason="= model: its head is for world, sport; the labels of the task my are negative, positive",
        advice=("train.py --model model",),
    )
    flags = ["--threads", 1, "--task", "my.yaml", "--model", "model", "--max_steps", 1, "--output_dir", "run"]
    code, printed, errors = run_inside("train.py", *flags, cwd=tmp_path)
    assert code == 0, errors
    assert "newly initialised: classifier (" in printed


EVALUATED = {
    "no head": (["--model", "base", "--task", "my.yaml"], "base: has no trained head (", "train.py --model base"),
    "no task": (["--model", "base"], "= base: has no task.json, so its data are not known", "--task"),
    "no such split": (["--model", "model", "--task", "my.yaml", "--split", "tset"], "no tset split", "train, valid"),
    "no such file": (["--model", "model", "--task", "my.yaml", "--file", "trian.csv"], "no such file (did", "path"),
    "an empty folder": (["--model", "empty", "--task", "my.yaml"], "= empty: holds no model", "finished run"),
    "an unknown label": (["--model", "model", "--task", "my.yaml", "--file", "bad.csv"], "bad.csv, line 2", "negative"),
    "a taken output": (
        ["--model", "model", "--task", "my.yaml", "--output_dir", "bad.csv"],
        "bad.csv: is a",
        "--output",
    ),
}


@pytest.mark.parametrize("mistake", EVALUATED)
def test_evaluate(tmp_path, refused, classifier, tiny_bert, mistake):
    classifier("negative", "positive")
    shutil.copytree(tiny_bert, tmp_path / "base")
    (tmp_path / "empty").mkdir()
    bad = "text,label\nthe room was good,postive\n"
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, "bad.csv": bad, "my.yaml": TASK})
    flags, reason, advice = EVALUATED[mistake]
    refused(*flags, script="evaluate.py", reason=reason, advice=(advice,))


OUT = ("--output", "out.csv")
PREDICTED = {
    "no head": (["--model", "base", "--text", "good"], "base: has no trained head (", "train.py --model base"),
    "an empty folder": (["--model", "empty", "--text", "good"], "= empty: holds no model", "finished run"),
    "a task that does not fit": (
        ["--model", "odd", "--text", "good"],
        "its head is for negative, positive",
        "train.py",
    ),
    "a damaged task.json": (["--model", "damaged", "--text", "good"], "damaged/task.json: is damaged", "again"),
    "no such input": (["--model", "model", "--input", "trian.csv", *OUT], "no such file (did you mean", "path"),
    "no text column": (["--model", "model", "--input", "txt.csv", *OUT], ("txt.csv, line 2", '"text"'), "txt, label"),
    "a ragged row at the end": (["--model", "model", "--input", "ragged.csv", *OUT], "ragged.csv, line 6: 3", "Quote"),
    "a number as text": (["--model", "model", "--input", "number.jsonl", *OUT], ("line 2", '"text" holds 5'), "skip"),
    "an unknown output": (["--model", "model", "--input", "train.csv", "--output", "out.xls"], "out.xls", ".jsonl"),
    "a pair for one text": (["--model", "model", "--text", "a", "--text_pair", "b"], "1 text(s)", "only --text"),
}


@pytest.mark.parametrize("mistake", PREDICTED)
def test_predict(tmp_path, refused, classifier, tiny_bert, mistake):
    classifier("negative", "positive")
    shutil.copytree(tiny_bert, tmp_path / "base")
    for name in ("odd", "damaged"):
        shutil.copytree(tmp_path / "model", tmp_path / name)
    task = {"name": "odd", "text": ["text"], "labels": ["cat", "dog"], "fingerprints": {}}
    (tmp_path / "odd" / "task.json").write_text(json.dumps(task))
    (tmp_path / "damaged" / "task.json").write_text(json.dumps(task)[:30])
    (tmp_path / "empty").mkdir()
    numbers = lines(row("good", "positive"), row(5, "negative"))
    ragged = TRAIN + "nice, clean and quiet,positive\n"
    files = {"train.csv": TRAIN, "txt.csv": "txt,label\na,b\n", "number.jsonl": numbers, "ragged.csv": ragged}
    write_files(tmp_path, files)
    flags, reason, advice = PREDICTED[mistake]
    refused(*flags, script="predict.py", reason=reason, advice=(advice,))


def test_predict_advises_to_skip_rows_only_where_they_can_be_listed(tmp_path, classifier, run_inside):
    classifier("negative", "positive")
    write_files(tmp_path, {"ragged.csv": TRAIN + "nice, clean and quiet,positive\n"})
    flags = ["--model", "model", "--input", "ragged.csv"]
    code, _, errors = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 2 and "--on_bad_row" not in errors
    code, _, errors = run_inside("predict.py", *flags, *OUT, cwd=tmp_path)
    assert code == 2 and "--on_bad_row skip" in errors


# ------------------------------------------------------------------------------------------------------- as processes


HUB = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
PROCESSES = {
    "no such file": (
        ["train.py", "--train_file", "trian.csv"],
        {},
        '= HERE/trian.csv: no such file (did you mean "train.csv"?)',
        ("path",),
    ),
    "no Hub": (
        ["train.py", *BOTH, "--model", "google-bert/bert-base-uncased"],
        HUB,
        "cannot download google-bert/bert-base-uncased from http://127.0.0.1:9 (",
        ("HF_ENDPOINT", "--train_file", "--model FOLDER", "--task demo"),
    ),
    "no head for predict": (
        ["predict.py", "--model", "base", "--text", "good"],
        {},
        "base: has no trained head (",
        ("train.py --model base",),
    ),
}


@pytest.mark.parametrize("mistake", PROCESSES)
def test_a_process(tmp_path, tiny_bert, mistake):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION})
    shutil.copytree(tiny_bert, tmp_path / "base")
    before = contents_of(tmp_path)
    (script, *flags), environment, reason, advice = PROCESSES[mistake]
    ended = run_script(script, *flags, cwd=tmp_path, environment=environment)
    assert ended.returncode == 2 and "Traceback" not in ended.stdout
    check(ended.stderr, reason, advice, tmp_path, script)
    assert contents_of(tmp_path) == before and not list(Path(CACHE).rglob("*.tmp"))


@pytest.mark.slow
def test_two_processes_say_it_once(tmp_path):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION.replace("positive", "postive")})
    before = contents_of(tmp_path)
    ended = run_script("train.py", *BOTH, cwd=tmp_path, launcher=TORCHRUN_2)
    assert ended.returncode == 1  # the launcher's
    ours = [line for line in ended.stderr.splitlines() if line.startswith("train.py: ")]
    reason = ("HERE/validation.csv, line 2: column \"label\" holds 'postive'", 'did you mean "positive"')
    check("".join(f"{line}\n" for line in ours), reason, ("negative, positive",), tmp_path)
    assert ended.stderr.count("Traceback") <= 1  # the launcher's own
    assert ended.stderr.index(ours[1]) < (ended.stderr + "Traceback").index("Traceback")
    assert contents_of(tmp_path) == before and not list(Path(CACHE).rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------------ --on_bad_row


SKIP = ("--threads", 1, "--on_bad_row", "skip", "--max_steps", 1, "--output_dir", "run")
BAD_ROWS = {  # rows of a file, and what bad_rows.csv says of each
    "train.csv": [
        (b"nice, clean and quiet,positive", "3 fields"),
        (b"clean and quiet", "1 field"),
        (b",positive", 'column "text" is empty'),
        (b"clean and quiet,", 'column "label" holds no label'),
        (b"clean and\0quiet,positive", "NUL"),
        (b"clean and\xfcquiet,positive", "0xfc is not UTF-8"),
        (b"x" * 10_000_001 + b",positive", "10,000,000 characters"),
    ],
    "validation.csv": [(b"so so,postive", "column \"label\" holds 'postive'"), (b"so so,", "no label")],
    "train.jsonl": [
        (b'{"text": "a", "label": NaN}', "nan, not a label"),
        (b'{"text": 5, "label": "positive"}', 'column "text" holds 5'),
        (b'{"text": "a"', "is not JSON"),
        (b'{"text": "a", "lable": "positive"}', 'no column "label"'),
    ],
}
GOOD = {
    "train.csv": TRAIN,
    "validation.csv": VALIDATION,
    "train.jsonl": lines(*(row(*line.split(",")) for line in TRAIN.splitlines()[1:])),
}


@pytest.mark.parametrize("train_file", ["train.csv", "train.jsonl"])
def test_bad_rows_are_skipped_and_listed(tmp_path, tiny_bert, run_inside, train_file):
    """Each between good rows: a bad row costs no other."""
    files, expected = {"train": train_file, "validation": "validation.csv"}, []
    for split, name in files.items():
        first, *rest = GOOD[name].encode().splitlines()
        rows = [first, *(bad for bad, _ in BAD_ROWS[name]), *rest]
        (tmp_path / name).write_bytes(b"\n".join(rows) + b"\n")
        expected += [(split, name, number, reason) for number, (_, reason) in enumerate(BAD_ROWS[name], start=2)]
    flags = [*("--train_file", train_file, "--validation_file", "validation.csv"), "--model", tiny_bert, *SKIP]
    code, printed, errors = run_inside("train.py", *flags, cwd=tmp_path)
    assert code == 0, errors
    with open(tmp_path / "run" / "bad_rows.csv", encoding="utf-8", newline="") as file:
        header, *listed = csv.reader(file)
    assert header == ["split", "file", "row", "reason"]
    for (*place, reason), (split, name, number, part) in zip(listed, expected, strict=True):
        assert place == [split, str(tmp_path / name), str(number)] and part in reason
    warnings = [line for line in printed.splitlines() if "bad_rows.csv" in line]
    for warning, (split, name) in zip(warnings, files.items(), strict=True):
        assert warning.startswith(f"WARNING: {split}: {len(BAD_ROWS[name])} ") and BAD_ROWS[name][0][1] in warning
    splits = json.loads((tmp_path / "run" / "results.json").read_text())["data"]["splits"]
    assert {name: splits[name]["rows"] for name in splits} == {"train": 4, "validation": 2}


def test_a_dry_run_counts_bad_rows_and_writes_nothing(tmp_path, tiny_bert, run_inside):
    write_files(tmp_path, {"train.csv": f"{TRAIN},positive\na,b,c\nfine,\n", "validation.csv": VALIDATION})
    before = contents_of(tmp_path)
    code, printed, errors = run_inside(
        "train.py", *BOTH, "--model", tiny_bert, "--on_bad_row", "skip", "--threads", 1, "--dry_run", cwd=tmp_path
    )
    assert code == 0, errors
    assert "WARNING: train: 3 " in printed and 'column "text" is empty' in printed
    assert contents_of(tmp_path) == before


UNSKIPPED = [
    case("a column twice", {"train.csv": "text,label,text\na,b,c\n"}, ("HERE/train.csv, line 1: ", "twice"), "name"),
    case("a header with NUL", {"train.csv": "te\0xt,label\na,b\n"}, ("HERE/train.csv, line 1", "NUL"), "header"),
    case("semicolons", {"train.csv": TRAIN.replace(",", ";")}, "HERE/train.csv, line 1: ", "--delimiter ';'"),
    case("a quote left open", {"train.csv": TRAIN + '"a,b\nc,d\n'}, "HERE/train.csv, from line 6: ", "Fix"),
    case(
        "half a .gz",
        {"train.csv.gz": GZIPPED[: len(GZIPPED) // 2]},
        "HERE/train.csv.gz: ",
        "again",
        flags=("--train_file", "train.csv.gz"),
    ),
    case("UTF-16", {"train.csv": CHINESE.encode("utf-16")}, "HERE/train.csv: is not ", "--encoding utf-16"),
    case("no label column", {"train.csv": TRAIN.replace("label", "lable")}, 'no column "label"', "--label_column"),
    case("no good row", {"train.csv": "text,label\na,b,c\nd\n"}, ("HERE/train.csv", "every row"), "Quote"),
    case("no good label", {"validation.csv": "text,label\na,b\n"}, ("HERE/validation.csv", "'b'"), "Check"),
]


@pytest.mark.parametrize(("files", "flags", "reason", "advice"), UNSKIPPED)
def test_what_is_no_row_cannot_be_skipped(tmp_path, refused, files, flags, reason, advice):
    write_files(tmp_path, {"train.csv": TRAIN, "validation.csv": VALIDATION, **files})
    refused(*flags, "--on_bad_row", "skip", reason=reason, advice=advice)
