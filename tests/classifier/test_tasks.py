"""Tasks: the shipped descriptions, mistakes in a user's own, the flags, and task.json."""

import argparse
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

import common
import train
from classifier.data import tasks
from classifier.data.tasks import Task
from classifier.messages import BadInput

SHIPPED = sorted((ROOT / "data").glob("*.yaml"))
LEAST = {"files": {"train": "a.csv"}}  # the least that a description says


def describe(folder, content=None, **keys):
    """Write a description (YAML text, or keys) to my.yaml and return the file."""
    file = folder / "my.yaml"
    file.write_text(yaml.safe_dump({**LEAST, **keys}) if content is None else content, encoding="utf-8")
    return file


def refusal(function, *arguments):
    """The BadInput that a call ends with: one line of reason, one of advice."""
    with pytest.raises(BadInput) as caught:
        function(*arguments)
    assert "\n" not in caught.value.reason and "\n" not in caught.value.advice
    assert caught.value.advice
    return caught.value


def arguments(*flags):
    """The data flags of the scripts, read from a command line."""
    parser = argparse.ArgumentParser()
    common.add_data_arguments(parser)
    return parser.parse_args(map(str, flags))


def with_defaults(*flags, **defaults):
    """What train.py's parser makes of a command line under a task's `defaults`."""
    parser = train.build_parser()
    tasks.set_defaults(parser, Task("mine", defaults=defaults))
    return parser.parse_args(flags)


# ------------------------------------------------------------------------------------------------- the shipped tasks


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_task_loads(file):
    task = tasks.read_task(file.stem)
    assert task == tasks.read_task(file) and task.name == file.stem
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert set(content) <= set(tasks.TYPES)
    assert content["source"] and content["licence"]
    if task.labels is not None:
        assert common.with_metrics(task).metrics == content["metrics"]  # raises where one does not fit the labels
    assert 1 <= len(task.text or ["text"]) <= 2
    for data in (task.files or {}).values():
        assert tasks.is_url(data) or Path(data).is_file()


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_the_defaults_of_a_shipped_task_are_flags_of_train(file):
    defaults = yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", {})
    parser = train.build_parser()
    for name in defaults:
        assert f"--{name} " in parser.format_help()
    tasks.set_defaults(parser, tasks.read_task(file.stem))
    args = vars(parser.parse_args([]))
    for name, value in defaults.items():
        assert args[name] == value and type(args[name]) in (type(value), float)


def test_glue_tasks_as_published():
    """Names, id order and metrics of the GLUE paper and of the data on the Hub (nyu-mll/glue)."""
    for name in ("ax", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"):
        assert tasks.read_task(name).dataset == {"path": "nyu-mll/glue", "name": name}
    nli = ["entailment", "neutral", "contradiction"]
    assert tasks.read_task("mnli").labels == tasks.read_task("ax").labels == nli
    assert tasks.read_task("qnli").labels == tasks.read_task("rte").labels == ["entailment", "not_entailment"]
    assert (
        next(name for name in tasks.read_task("mnli").splits if name.startswith("validation")) == "validation_matched"
    )
    assert set(tasks.read_task("qqp").metrics) == {"f1", "accuracy"}
    mrpc, cola = tasks.read_task("mrpc"), tasks.read_task("cola")
    sst2, stsb = tasks.read_task("sst2"), tasks.read_task("stsb")
    assert mrpc.text == ["sentence1", "sentence2"]
    assert mrpc.labels == ["not_equivalent", "equivalent"] and set(mrpc.metrics) == {"f1", "accuracy"}
    assert cola.text == ["sentence"] and cola.labels == ["unacceptable", "acceptable"]
    assert cola.metrics[0] == "matthews_correlation"
    assert sst2.text == ["sentence"] and sst2.labels == ["negative", "positive"] and sst2.metrics[0] == "accuracy"
    assert stsb.is_regression and set(stsb.metrics) == {"pearson", "spearmanr"}


# ------------------------------------------------------------------------------------------ a description of one's own


def test_a_description_with_every_key(tmp_path):
    task = tasks.read_task(
        describe(
            tmp_path,
            text="first",
            label="score",
            labels=["low", "high"],
            metrics=["f1_micro"],
            model={"model_type": "bert", "vocab": "words/vocab.txt"},
            max_length=64,
            files={"train": "a.zip::in/a.csv", "validation": "sub/b.tsv.gz", "test": "https://x.org/c.jsonl?raw=1"},
            problem="multi_label",
            separator="|",
            columns=["first", "score"],
            quoting=False,
            delimiter="tab",
            encoding="latin-1",
            split={"seed": 7, "validation": [0, 500], "test": 0.2, "group": "author"},
            truncate="head_tail",
            defaults={"epochs": 1},
            source="here",
            licence="CC0",
        )
    )
    assert task == Task(
        name="my",
        text=["first"],
        label="score",
        labels=["low", "high"],
        metrics=["f1_micro"],
        model={"model_type": "bert", "vocab": str(tmp_path / "words/vocab.txt")},
        max_length=64,
        files={
            "train": str(tmp_path / "a.zip::in/a.csv"),
            "validation": str(tmp_path / "sub/b.tsv.gz"),
            "test": "https://x.org/c.jsonl?raw=1",
        },
        problem="multi_label",
        separator="|",
        columns=["first", "score"],
        quoting=False,
        delimiter="\t",
        encoding="latin-1",
        split={"seed": 7, "validation": [0, 500], "test": 0.2, "group": "author"},
        truncate="head_tail",
        defaults={"epochs": 1},
        source="here",
        licence="CC0",
    )


def test_the_least_description(tmp_path):
    task = tasks.read_task(describe(tmp_path))
    assert (task.text, task.label, task.labels, task.max_length) == (None, "label", None, None)
    assert (task.problem, task.metrics, task.split, task.limit, task.defaults) == (None, None, {}, {}, {})
    assert (task.separator, task.quoting, task.delimiter, task.encoding, task.truncate) == (
        ",",
        None,
        None,
        "utf-8",
        "head",
    )
    assert task.on_bad_row == "fail" and task.files == {"train": str(tmp_path / "a.csv")}
    assert not task.is_regression and not task.is_multi_label


def test_files_are_relative_to_the_description_not_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    describe(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    assert tasks.read_task("here/my.yaml").files == {"train": str(tmp_path / "here" / "a.csv")}


def test_labels_that_are_numbers_are_names_too(tmp_path):
    assert tasks.read_task(describe(tmp_path, labels=[1, 0, "two"])).labels == ["1", "0", "two"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("files: {train: a.csv}\nmetric: [f1]", ['unknown key "metric" (did you mean "metrics"?)']),
        ("files: {train: a.csv}\nlables: [a, b]", ['unknown key "lables" (did you mean "labels"?)']),
        ("files: {train: a.csv}\nzzz: 1", ['unknown key "zzz"']),
        ("files: {train: a.csv}\nno: 1", ['unknown key "False"']),
        ("files: {trian: a.csv}", ['unknown key "trian" in "files" (did you mean "train"?)']),
        ("dataset: {path: a/b, nmae: c}", ['unknown key "nmae" in "dataset" (did you mean "name"?)']),
        ("files: {train: a.csv}\nsplit: {validaton: 0.1}", ['"validaton" in "split" (did you mean "validation"?)']),
        ("files: {train: a.csv}\nlabels: no", ['"labels" is False, a bool', "in quotes"]),
        ("files: {train: a.csv}\nlabels: [yes, no]", ["the label True", "in quotes"]),
        ("files: {train: a.csv}\nlabels: [low, 0.5]", ["the label 0.5"]),
        ("files: {train: a.csv}\nlabels: regresion", ["'regresion'", "labels: regression"]),
        ("files: {train: a.csv}\nlabels: [a, b, a]", ["['a', 'b', 'a']", "each of them once"]),
        ("files: {train: a.csv}\nlabels: [1, '1']", ["each of them once"]),
        ("files: {train: a.csv}\nlabels: [a]", ["two or more"]),
        ("files: {train: a.csv}\nlabels: []", ["two or more"]),
        ('files: {train: a.csv}\nmax_length: "128"', ["\"max_length\" is '128', a str", "a whole number"]),
        ("files: {train: a.csv}\nmax_length: 12.5", ['"max_length" is 12.5, a float']),
        ("files: {train: a.csv}\nmax_length: yes", ['"max_length" is True, a bool']),
        ("files: {train: a.csv}\nmetrics: f1", ["\"metrics\" is 'f1', a str", "a list"]),
        ("files: {train: a.csv}\nlabel: 1", ['"label" is 1, a int', "a word"]),
        ("files: {train: a.csv}\nlabel:", ['"label" is None']),
        ("files: a.csv", ["\"files\" is 'a.csv', a str", "a mapping"]),
        ("dataset: nyu-mll/glue", ["\"dataset\" is 'nyu-mll/glue'"]),
        ("dataset: {name: mrpc}", ['"dataset" has no path']),
        ("files: {train: a.csv}\nmodel: {model_type: bert}", ['"model" has no vocab']),
        ("labels: [a, b]", ["either `dataset`", "or `files`"]),
        ("files: {train: a.csv}\ntext: [a, 1]", ["\"text\" is ['a', 1]", "a list of words"]),
        ("files: {train: a.csv}\ntext: []", ['"text" is []']),
        ("files: {train: a.csv}\ncolumns: [a, no]", ["\"columns\" is ['a', False]", "in quotes"]),
        ("files: {train: a.csv}\nmetrics: [f1, 1]", ['"metrics" is']),
        ("files: {train: a.csv}\nquoting: 1", ['"quoting" is 1, a int', "a truth value"]),
        ('files: {train: a.csv}\nseparator: ""', ['"separator" is']),
        ("files: {train: a.csv}\ndelimiter: ;;", ["delimiter ';;': is not one character"]),
        ("files: {train: a.csv}\nproblem: multilabel", ["\"problem\" is 'multilabel'", "Allowed: multi_label"]),
        ("files: {train: a.csv}\ntruncate: middle", ["\"truncate\" is 'middle'", "head, tail, head_tail"]),
        ("files: {train: a.csv}\nproblem: multi_label\nlabels: regression", ["both multi_label and regression"]),
        ("files: {train: a.csv}\nmax_length: 0", ['"max_length" is 0']),
        ("files: {train: a.csv}\nlabel: a\nlabel: b", ['the key "label" occurs twice', "line 3"]),
        ("files: {train: a.csv, train: b.csv}", ['the key "train" occurs twice']),
        ("files: {train: a.csv}\nsplit: {validation: 0.1}\nsplit: {}", ['the key "split" occurs twice']),
        ("files: {train: null}", ['"files" has train: None']),
        ("dataset: {path: a/b, name: 2020}", ['"dataset" has name: 2020', "in quotes"]),
        ("dataset: {path: a/b, revision: 1.0}", ['"dataset" has revision: 1.0']),
        ("dataset: {path: a/b}\nsplits: {train: [a]}", ["\"splits\" has train: ['a']"]),
        ("files: {train: a.csv}\nsource: 2020-13-01", ["is not YAML", "month"]),
        ("files: {train: a.csv}\non_bad_row: skip", ['unknown key "on_bad_row"']),
        ("files: {train: a.csv}\ndataset: {path: a/b}", ["either `dataset`", "or `files`"]),
        ("", ["is not a mapping"]),
        ("- a\n- b", ["is not a mapping"]),
        ("files: {train: a.csv", ["is not YAML", "line 1"]),
    ],
)
def test_a_mistake_in_a_description(tmp_path, text, parts):
    file = describe(tmp_path, text)
    error = refusal(tasks.read_task, file)
    assert str(file) in error.reason
    assert all(part in str(error) for part in parts), str(error)


@pytest.mark.parametrize(
    "split",
    [
        *({"validation": share} for share in (0, 1, 1.0, -0.1, 10, "1e-1", None, True, float("nan"))),
        *({"test": bounds} for bounds in ([0], [5, 5], [5, 4], [-1, 4], [0.0, 5.0], ["0", "5"], [0, 1, 2], [])),
        {"train": 0.5},
        {"seed": "a"},
        {"seed": -1},
        {"seed": True},
        {"group": 1},
        {"group": ""},
    ],
    ids=str,
)
def test_a_rule_that_makes_no_split(tmp_path, split):
    ((name, value),) = split.items()
    error = refusal(tasks.read_task, describe(tmp_path, split=split))
    assert f'"split" has {name}: {value!r}' in error.reason and str(tmp_path) in error.reason
    assert ("group: COLUMN" if name in ("seed", "group") else "[0, 500]") in error.advice


def test_ranges_that_overlap(tmp_path):
    error = refusal(tasks.read_task, describe(tmp_path, split={"test": [40, 50], "train": [0, 41]}))
    assert "train [0, 41] and test [40, 50] overlap" in error.reason


def test_files_have_no_splits_to_rename(tmp_path):
    error = refusal(tasks.read_task, describe(tmp_path, splits={"validation": "dev"}))
    assert "`splits` is for data sets of the Hub" in error.reason


def test_a_description_that_is_not_utf_8(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_bytes("source: 中文".encode("gb18030"))
    assert "is not YAML" in refusal(tasks.read_task, file).reason


def test_a_description_that_is_not_there(tmp_path):
    assert "cannot be read (No such file" in refusal(tasks.read_task, tmp_path / "none.yaml").reason


def test_an_unknown_task_is_told_with_the_nearest_name():
    error = refusal(tasks.read_task, "mprc")
    assert 'no task is named "mprc" (did you mean "mrpc"?)' in error.reason
    assert all(file.stem in error.advice for file in SHIPPED) and "--train_file" in error.advice


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"labels": ["a", "b", "c"], "metrics": ["f1"]}, "f1 is for two labels, this task has 3"),
        ({"labels": ["a", "b"], "metrics": ["pearson"]}, "pearson is for regression"),
        ({"labels": "regression", "metrics": ["f1_macro"]}, "f1_macro is for classification"),
        ({"labels": ["a", "b"], "metrics": ["acuracy"]}, 'did you mean "accuracy"'),
        (
            {"labels": ["a", "b"], "metrics": ["matthews_correlation"], "problem": "multi_label"},
            "not for multi-label tasks",
        ),
    ],
)
def test_metrics_that_do_not_fit(keys, message):
    error = refusal(common.with_metrics, Task("mine", **keys))
    assert error.reason.startswith("task mine:") and message in str(error)


@pytest.mark.parametrize(
    ("keys", "usual"),
    [
        ({"labels": ["a", "b"]}, ["f1_macro", "accuracy"]),
        ({"labels": "regression"}, ["pearson", "spearmanr"]),
        ({"labels": ["a", "b"], "problem": "multi_label"}, ["f1_micro", "f1_macro"]),
        ({"labels": ["a", "b"], "metrics": ["f1"]}, ["f1"]),
    ],
)
def test_the_usual_metrics_where_a_task_names_none(keys, usual):
    assert common.with_metrics(Task("mine", **keys)) == Task("mine", **{**keys, "metrics": usual})


# ----------------------------------------------------------------------------------------------- `defaults` of a task


def test_defaults_give_way_to_the_command_line():
    assert with_defaults(batch_size=8, epochs=1).batch_size == 8
    args = with_defaults("--batch_size", "16", batch_size=8, epochs=1)
    assert (args.batch_size, args.epochs) == (16, 1.0)


def test_1e_5_is_a_number_though_yaml_reads_a_string(tmp_path):
    task = tasks.read_task(describe(tmp_path, "files: {train: a.csv}\ndefaults: {learning_rate: 1e-5, epochs: 2}"))
    assert task.defaults["learning_rate"] == "1e-5"  # YAML 1.1
    args = with_defaults(**task.defaults)
    assert args.learning_rate == 0.00001 and isinstance(args.learning_rate, float)
    assert args.epochs == 2.0 and isinstance(args.epochs, float)


def test_defaults_of_each_kind_of_flag():
    args = with_defaults(eval_every=500, scheduler="cosine", adam_betas=[0.9, 0.98], gradient_checkpointing=True)
    assert args.eval_every == "500" and args.scheduler == "cosine"
    assert args.adam_betas == [0.9, 0.98] and args.gradient_checkpointing is True
    assert with_defaults(final_test=False).final_test is False


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rte", 1, 'no flag (did you mean "learning_rate"?)'),
        ("learning_rate", "fast", "'fast'"),
        ("learning_rate", [1e-5, 2e-5], "no value for --learning_rate"),
        ("learning_rate", None, "no value for --learning_rate"),
        ("batch_size", 0, "0 in `defaults` is no value for --batch_size"),
        ("batch_size", 32.5, "32.5"),
        ("label_smoothing", 1.0, "no value for --label_smoothing"),
        ("seed", True, "no value for --seed"),
        ("scheduler", "liner", "Allowed: linear, cosine"),
        ("mixed_precision", False, "Allowed: auto, no"),  # YAML 1.1 reads `no` so
        ("adam_betas", 0.9, "no value for --adam_betas"),
        ("adam_betas", [0.9, "x"], "no value for --adam_betas"),
        ("final_test", "false", "no value for --final_test"),
        ("final_test", 1, "no value for --final_test"),
        ("max_length", 128, "describes the data, not the training"),
        ("task", "mrpc", "describes the data, not the training"),
    ],
)
def test_a_mistake_in_the_defaults(name, value, message):
    with pytest.raises(BadInput) as caught:
        with_defaults(**{name: value})
    assert "task mine" in caught.value.reason and name in caught.value.reason and message in str(caught.value)


# ------------------------------------------------------------------------------------------------------ the data flags


def test_the_default_task():
    assert tasks.task_from_args(arguments(), default="mrpc") == tasks.read_task("mrpc")
    assert tasks.task_from_args(arguments("--task", "cola"), default="mrpc") == tasks.read_task("cola")


def test_files_alone_are_a_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = tasks.task_from_args(
        arguments("--train_file", "my.reviews.csv.gz", "--test_file", "/x/t.tsv"), default="demo"
    )
    assert task == Task(
        name="my",
        files={"train": str(tmp_path / "my.reviews.csv.gz"), "test": "/x/t.tsv"},
    )
    assert task.labels is None and task.label == "label" and task.text is None


def test_files_replace_the_data_of_a_task_and_keep_its_keys(tmp_path):
    mrpc = tasks.read_task("mrpc")
    task = tasks.task_from_args(arguments("--task", "mrpc", "--train_file", tmp_path / "a.csv"))
    assert task.dataset is None and task.files == {"train": str(tmp_path / "a.csv")}
    for key in ("name", "text", "labels", "metrics", "model", "max_length", "defaults"):
        assert getattr(task, key) == getattr(mrpc, key)


def test_files_replace_the_data_of_a_saved_task_and_keep_its_keys(tmp_path):
    saved = Task("old", text=["a", "b"], label="score", labels="regression", dataset={"path": "x/y"}, metrics=["mse"])
    task = tasks.task_from_args(arguments("--test_file", tmp_path / "a.csv"), default=saved)
    assert task.files == {"test": str(tmp_path / "a.csv")} and task.dataset is None
    assert (task.text, task.label, task.labels, task.metrics) == (["a", "b"], "score", "regression", ["mse"])
    assert tasks.task_from_args(arguments(), default=saved) == saved
    assert tasks.task_from_args(arguments("--task", "cola"), default=saved) == tasks.read_task("cola")


def test_flags_go_before_the_keys_of_the_task():
    flags = ["--text_columns", "a,b", "--label_column", "y", "--metrics", "accuracy,f1", "--max_length", "17"]
    task = tasks.task_from_args(arguments("--task", "sst2", *flags))
    assert (task.text, task.label, task.metrics, task.max_length) == (["a", "b"], "y", ["accuracy", "f1"], 17)
    assert task.labels == ["negative", "positive"]
    assert tasks.task_from_args(arguments("--text_columns", "a"), default="mrpc").text == ["a"]


@pytest.mark.parametrize(
    ("flags", "keys"),
    [
        (["--encoding", "gb18030"], {"encoding": "gb18030"}),
        (["--delimiter", ";"], {"delimiter": ";"}),
        (["--delimiter", "tab"], {"delimiter": "\t"}),
        (["--delimiter", "\\t"], {"delimiter": "\t"}),
        (["--on_bad_row", "skip"], {"on_bad_row": "skip"}),
        (["--truncate", "head_tail"], {"truncate": "head_tail"}),
        (["--group_column", "author"], {"split": {"validation": 0.2, "seed": 1, "group": "author"}}),
        (["--limit", "train=5", "--limit", "test=7"], {"limit": {"train": 5, "test": 7}}),
    ],
)
def test_flags_of_how_data_are_read(flags, keys):
    saved = Task("old", files={"train": "/a.csv"}, split={"validation": 0.2, "seed": 1})
    assert tasks.task_from_args(arguments(*flags), default=saved) == replace(saved, **keys)


@pytest.mark.parametrize("mark", [";;", "comma", "'"])
def test_a_delimiter_is_one_character(mark):
    if len(mark) == 1:
        assert tasks.task_from_args(arguments("--delimiter", mark), default="mrpc").delimiter == mark
    else:
        assert f"delimiter {mark!r}" in refusal(tasks.task_from_args, arguments("--delimiter", mark), "mrpc").reason


@pytest.mark.parametrize("flag", ["--on_bad_row", "--truncate"])
def test_a_choice_that_is_none(flag):
    with pytest.raises(SystemExit):
        arguments(flag, "perhaps")


@pytest.mark.parametrize(
    ("flag", "dataset", "name"),
    [
        ("stanfordnlp/imdb", {"path": "stanfordnlp/imdb"}, "imdb"),
        ("nyu-mll/glue:cola", {"path": "nyu-mll/glue", "name": "cola"}, "cola"),
        ("imdb", {"path": "imdb"}, "imdb"),
    ],
)
def test_a_dataset_of_the_hub_without_a_yaml(flag, dataset, name):
    assert tasks.task_from_args(arguments("--dataset", flag), default="demo") == Task(name, dataset=dataset)
    saved = Task("old", text=["a"], labels=["x", "y"], files={"train": "/a.csv"}, limit={"train": 3})
    task = tasks.task_from_args(arguments("--dataset", flag), default=saved)
    assert task == replace(saved, dataset=dataset, files=None, limit={})


@pytest.mark.parametrize("flags", [["--task", "mrpc"], ["--train_file", "a.csv"], ["--test_file", "a.csv"]])
def test_data_given_twice(flags):
    assert "given twice" in refusal(tasks.task_from_args, arguments("--dataset", "a/b", *flags), "mrpc").reason


def test_urls_and_archives_as_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = tasks.task_from_args(
        arguments("--train_file", "https://x.org/my.csv.gz?raw=1", "--test_file", "a.zip::b/c.tsv")
    )
    assert task.files == {"train": "https://x.org/my.csv.gz?raw=1", "test": f"{tmp_path}/a.zip::b/c.tsv"}
    assert task.name == "my"


def test_more_than_two_text_columns():
    error = refusal(tasks.task_from_args, arguments("--task", "sst2", "--text_columns", "a,b,c"))
    assert "a,b,c" in error.reason and "two for pairs" in error.advice


def test_limits():
    assert tasks.parse_limits(None) == tasks.parse_limits([]) == {}
    assert tasks.parse_limits(["train=100", "validation_matched=1"]) == {
        "train": 100,
        "validation_matched": 1,
    }


@pytest.mark.parametrize("text", ["train", "100", "train=", "train=0", "train=-5", "train=1.5", "train=ten", "train:5"])
def test_a_mistake_in_a_limit(text):
    error = refusal(tasks.parse_limits, [text])
    assert f"--limit {text}:" in error.reason and "--limit train=1000" in error.advice


# ----------------------------------------------------------------------------------------------------------- task.json


@pytest.mark.parametrize(
    "task",
    [
        Task(
            "a", text=["x"], labels=["no", "是", "1"], files={"train": "/a.csv"}, split={"validation": 0.1, "seed": 3}
        ),
        Task("b", text=["x", "y"], labels="regression", metrics=["mse"], dataset={"path": "p/q", "revision": "0" * 40}),
        Task("c", text=["x"], labels=["0", "1"], model={"model_type": "bert", "vocab": "/v"}, max_length=9, source="s"),
        Task(
            "d", problem="multi_label", labels=["x", "y"], separator="|", columns=["a"], quoting=False, delimiter="\t"
        ),
        Task("e", split={"train": [0, 5], "group": "g"}, limit={"train": 3}, on_bad_row="skip", encoding="latin-1"),
        Task("f", dataset={"path": "p"}, splits={"validation_matched": "x"}, truncate="tail"),
    ],
    ids=lambda task: task.name,
)
def test_a_task_comes_back_from_its_file(tmp_path, task):
    tasks.save_task(task, {"train": "abc"}, tmp_path / "task.json")
    assert tasks.read_saved_task(tmp_path) == (task, {"train": "abc"})
    assert json.loads((tmp_path / "task.json").read_bytes())["labels"] == task.labels


def test_a_model_folder_keeps_no_defaults_of_the_training(tmp_path):
    tasks.save_task(Task("a", labels=["x", "y"], defaults={"epochs": 3}), {}, tmp_path / "task.json")
    assert tasks.read_saved_task(tmp_path) == (Task("a", labels=["x", "y"]), {})


def test_a_folder_without_task_json(tmp_path):
    assert tasks.read_saved_task(tmp_path) == (None, {})


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fingerprints": {}}', '{"name": "a"}', "1"])
def test_a_damaged_task_json(tmp_path, content):
    (tmp_path / "task.json").write_text(content)
    error = refusal(tasks.read_saved_task, tmp_path)
    assert f"{tmp_path}/task.json: is damaged" in error.reason and "again" in error.advice


def test_keys_of_a_later_version_are_passed_over(tmp_path):
    (tmp_path / "task.json").write_text('{"name": "a", "key_to_come": 1, "fingerprints": {}}')
    assert tasks.read_saved_task(tmp_path) == (Task("a"), {})


def test_every_data_flag_has_help():
    parser = common.argument_parser("a script", data=True)
    flags = set(re.findall(r"--[a-z_]+", parser.format_help()))
    assert {"--task", "--dataset", "--train_file", "--text_columns", "--limit", "--refresh", "--on_bad_row"} <= flags
    assert all(action.help for action in parser._actions)


def test_label_columns_are_labels_of_their_own(tmp_path):
    task = tasks.read_task(describe(tmp_path, label=["toxic", "threat"]))
    assert (task.label, task.labels, task.problem) == (["toxic", "threat"], ["toxic", "threat"], "multi_label")
    task = tasks.read_task(describe(tmp_path, label=["a", "b"], labels=["toxic", "threat"]))
    assert (task.label, task.labels) == (["a", "b"], ["toxic", "threat"])
    flags = arguments("--train_file", "a.csv", "--label_columns", "toxic,threat")
    task = tasks.task_from_args(flags)
    assert (task.label, task.labels, task.problem) == (["toxic", "threat"], ["toxic", "threat"], "multi_label")
    saved = Task("saved", label=["a", "b"], labels=["a", "b"], problem="multi_label")
    task = tasks.task_from_args(arguments("--train_file", "a.csv", "--label_columns", "x,y"), saved)
    assert (task.label, task.labels) == (["x", "y"], ["a", "b"])


@pytest.mark.parametrize(
    "flags, reason",
    [
        (("--label_columns", "toxic"), "label columns toxic"),
        (("--label_columns", "a,b,a"), "label columns a,b,a"),
        (("--label_columns", "a,,b"), "label columns a,,b"),
        (("--label_columns", "a,b", "--label_column", "c"), "--label_column and --label_columns"),
        (("--task", "demo", "--label_columns", "a,b,c"), "3 columns of labels (a, b, c), but the task has 2 labels"),
        (("--task", "stsb", "--label_columns", "a,b"), "2 columns of labels (a, b), but the task has a number"),
    ],
)
def test_label_columns_that_do_not_fit(flags, reason):
    files = () if "--task" in flags else ("--train_file", "a.csv")
    assert reason in refusal(tasks.task_from_args, arguments(*files, *flags)).reason


def test_the_member_of_an_archive_is_no_part_of_its_path(tmp_path, monkeypatch):
    """abspath of Windows turns every slash."""
    monkeypatch.setattr(os.path, "abspath", lambda path: f"C:/{path}".replace("/", "\\"))
    assert tasks._absolute(Path("data"), "a.zip::in/a.csv") == r"C:\data\a.zip::in/a.csv"
    assert tasks._absolute(Path("data"), "in/a.csv") == r"C:\data\in\a.csv"
