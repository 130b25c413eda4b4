"""Splits: rows of files in every format and of the Hub, bad rows, made splits, fingerprints."""

import logging
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import make_rows
from data_help import (
    AB,
    COMMIT,
    FILES,
    LATER,
    files_task,
    first_row,
    hub_table,
    hub_task,
    put_table,
    refusal,
    served,
    text_task,
)
from sklearn.model_selection import train_test_split

from classifier.data import reader
from classifier.data.reader import LONGEST_FIELD
from classifier.data.splits import draw_groups, load_splits, make_missing_splits, stratified
from classifier.data.tasks import Task

pytestmark = pytest.mark.usefixtures("empty_cache")


def alternating(number):
    return [(f"text {at}", "ab"[at % 2]) for at in range(number)]


def sizes(splits):
    return {name: len(rows) for name, rows in splits.items()}


# ------------------------------------------------------------------------------------------------------------ formats

LOOK_LIKE_VALUES = ["None", "NA", "null", "nan", "00456", "1e5", "True", "-0", " padded ", "1_000", "中, 文"]


@pytest.mark.parametrize("name", FILES)
def test_text_stays_text_in_every_format(tmp_path, name):
    rows = [(text, "pos" if len(text) > 3 else "neg") for text in LOOK_LIKE_VALUES]
    file = put_table(tmp_path, name, rows)
    task, splits, _, bad_rows = load_splits(Task("mine", files={"train": file, "validation": file}))
    assert (task.labels, task.text, bad_rows) == (["neg", "pos"], ["text"], [])
    for split in ("train", "validation"):
        assert splits[split]["text"][:] == LOOK_LIKE_VALUES
        assert splits[split]["label"][:] == [int(len(text) > 3) for text in LOOK_LIKE_VALUES]
        assert splits[split]["row"][:] == list(range(first_row(name), first_row(name) + 11))


def test_the_hash_of_a_row_is_that_of_its_texts(tmp_path):
    rows = [("a", "b", "x"), ("a", "b", "y"), ("ab", "c", "x"), ("a", "bc", "x")]
    task = files_task(tmp_path, ("one", "two", "label"), train=rows, validation=rows, task={"text": ["one", "two"]})
    hashes = load_splits(task)[1]["train"]["hash"][:]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3 and {len(value) for value in hashes} == {16}
    # printf 'a\x1fb' | b2sum -l 128
    assert hashes[0].hex() == "065ab5741cdfad44687cf119c1eb4ec9"


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_web_server(tmp_path, name):
    (tmp_path / "web").mkdir()
    put_table(tmp_path / "web", name, AB * 10)
    with served(tmp_path / "web") as (server, asked):
        task = Task("mine", files={"train": f"{server}/{name}"})
        first = load_splits(task)
        assert sizes(first[1]) == {"train": 18, "validation": 2} and first[0].labels == ["a", "b"]
        assert len(asked) == 1
    again = load_splits(task)  # the server is down
    assert again[2] == first[2] and again[1]["train"].to_dict() == first[1]["train"].to_dict()
    assert "cannot be downloaded" in refusal(task, refresh=True).reason


def test_a_refresh_downloads_a_newer_file(tmp_path):
    (tmp_path / "web").mkdir()
    put_table(tmp_path / "web", "a.csv", AB * 10)
    with served(tmp_path / "web") as (server, _):
        task = Task("mine", files={"train": f"{server}/a.csv"})
        first = load_splits(task)
        put_table(tmp_path / "web", "a.csv", AB * 20)
        assert load_splits(task)[2] == first[2]
        _, splits, newer, _ = load_splits(task, refresh=True)
        assert sizes(splits) == {"train": 36, "validation": 4} and newer["train"] != first[2]["train"]
        assert load_splits(task)[2] == newer
        assert "404" in refusal(Task("mine", files={"train": f"{server}/b.csv"})).reason


@pytest.mark.parametrize(
    ("name", "content", "keys"),
    [
        ("a.csv", 'one;"two";b\n"x;y";z;a\n', {"columns": ["text", "other", "label"], "delimiter": ";"}),
        ("a.tsv", 'one\ttwo\tb\n"x;y"\tz\ta\n', {"columns": ["text", "other", "label"], "quoting": True}),
        ("a.csv", "text|other|label\none|two|b\nx;y|z|a\n", {"delimiter": "|", "quoting": False}),
        ("a.tsv", "text,other,label\none,two,b\nx;y,z,a\n", {"delimiter": ","}),
        ("a.csv", "text,other,label\none,two,b\nx;y,z,a\n".encode("utf-16"), {"encoding": "utf-16"}),
    ],
    ids=["headerless ;", "headerless quoted tsv", "unquoted |", "tsv with commas", "utf-16"],
)
def test_how_a_table_is_written(tmp_path, name, content, keys):
    task = text_task(tmp_path, content, name, text=["text"], **keys)
    task.files["validation"] = task.files["train"]
    _, splits, _, _ = load_splits(task)
    assert splits["train"]["text"][:] == ["one", "x;y"] and splits["train"]["label"][:] == [1, 0]


def test_the_encoding_is_that_of_the_task(tmp_path):
    content = "text,label\n房间很干净,好\n服务真的太差了,差\n"
    tasks = [text_task(tmp_path, content.encode(code), f"{code}.csv", encoding=code) for code in ("utf-8", "gb18030")]
    for task in tasks:
        task.files["validation"] = task.files["train"]
        task, splits, _, _ = load_splits(task)
        assert task.labels == ["好", "差"] and splits["train"]["text"][:] == ["房间很干净", "服务真的太差了"]
    assert "--encoding gb18030" in refusal(Task("mine", files=tasks[1].files)).advice


# ------------------------------------------------------------------------------------------------------- text columns


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (("label", "text"), "text"),
        (("text", "label", "title"), "text"),
        (("label", "review"), "review"),
    ],
)
def test_the_text_column_is_text_or_the_only_other_one(tmp_path, header, expected):
    rows = [[{"label": label}.get(name, f"{name} {label}") for name in header] for label in "ab"]
    task, splits, _, _ = load_splits(files_task(tmp_path, header, train=rows, validation=rows))
    assert task.text == [expected] and splits["train"][expected][:] == [f"{expected} a", f"{expected} b"]


def test_a_column_of_json_numbers_is_not_text(tmp_path):
    rows = [(1, "one", "a"), (2, "two", "b")]
    header = ("id", "review", "label")
    task, _, _, _ = load_splits(files_task(tmp_path, header, suffix=".jsonl", train=rows, validation=rows))
    assert task.text == ["review"]


@pytest.mark.parametrize(
    ("header", "message"), [(("title", "body", "label"), "among: title, body"), (("label",), "among: none")]
)
def test_a_text_column_that_cannot_be_told(tmp_path, header, message):
    error = refusal(files_task(tmp_path, header, train=[["x"] * len(header)]))
    assert message in error.reason and "--text_columns" in error.advice


@pytest.mark.parametrize("column", ["label", "group", "row", "hash"])
def test_a_text_column_must_not_take_the_name_of_a_column_of_ours(tmp_path, column):
    """A text column called label would otherwise be overwritten by the labels."""
    task = files_task(tmp_path, (column, "class"), train=AB, task={"text": [column], "label": "class"})
    assert f"a text column cannot be named '{column}'" in refusal(task).reason


def test_the_same_text_column_twice(tmp_path):
    assert "given twice" in refusal(files_task(tmp_path, train=AB, task={"text": ["text", "text"]})).reason


def test_the_column_of_groups_is_no_text(tmp_path):
    rows = [(f"author {at % 5}", f"text {at}", "ab"[at % 2]) for at in range(20)]
    task = files_task(tmp_path, ("author", "review", "label"), train=rows, task={"split": {"group": "author"}})
    assert load_splits(task)[0].text == ["review"]


def test_the_first_row_may_lack_its_text(tmp_path):
    rows = [(None, "a"), *AB]
    keys = {"on_bad_row": "skip"}
    task, splits, _, bad_rows = load_splits(files_task(tmp_path, suffix=".jsonl", train=rows, validation=AB, task=keys))
    assert task.text == ["text"] and splits["train"]["text"][:] == ["one", "two"] and bad_rows[0]["row"] == 1


def test_pairs(tmp_path):
    rows = [("q1", "a1", "yes"), ("q2", "a2", "no")]
    task = files_task(tmp_path, ("question", "answer", "label"), train=rows, validation=rows)
    task = Task("mine", files=task.files, text=["answer", "question"])
    _, splits, _, _ = load_splits(task)
    assert splits["train"].column_names == ["answer", "question", "group", "row", "hash", "label"]
    assert splits["train"]["answer"][:] == ["a1", "a2"] and splits["train"]["question"][:] == ["q1", "q2"]


@pytest.mark.parametrize(
    ("keys", "message", "option"),
    [
        ({"text": ["sentense"]}, 'no column "sentense" (did you mean "sentence"?)', "--text_columns"),
        ({"text": ["sentence"], "label": "lable"}, 'no column "lable" (did you mean "label"?)', "--label_column"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, keys, message, option):
    error = refusal(files_task(tmp_path, ("sentence", "label"), train=AB, task=keys))
    assert f"{tmp_path}/train.csv, line 2: {message}" in error.reason
    assert "Columns: sentence, label." in error.advice and option in error.advice


def test_a_json_row_that_lacks_the_column_or_holds_no_text(tmp_path):
    for second, message in (
        ('{"label": "b"}', 'line 2: no column "text"'),
        ('{"text": 3, "label": "b"}', "holds 3, not"),
    ):
        (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "a"}\n' + second)
        error = refusal(Task("mine", text=["text"], files={"train": str(tmp_path / "a.jsonl")}))
        assert message in error.reason


def test_a_file_that_is_not_there(tmp_path):
    put_table(tmp_path, "train.csv", AB)
    error = refusal(Task("mine", files={"train": str(tmp_path / "tran.csv")}))
    assert "no such file" in error.reason and "train.csv" in error.reason


# ----------------------------------------------------------------------------------------------------------- bad rows


TOO_LONG = "x" * (LONGEST_FIELD + 1)
# (a row as it stands in the file, what is said of it)
FLAWED_CSV = [
    (b"one,a,more\n", "3 fields, but the header has 2 columns (text, label)"),
    (b"one\n", "1 fields, but the header has 2 columns (text, label)"),
    (b",a\n", 'column "text" is empty'),
    (b"  ,a\n", "column \"text\" holds '  ', not text"),
    (b"one,\n", 'column "label" holds no label'),
    (b"one,c\n", "column \"label\" holds 'c', no label"),
    (b"one,-1\n", 'column "label" holds no label'),
    (b"o\0ne,a\n", 'column "text": the field holds a NUL character'),
    (b"caf\xe9 one,a\n", 'column "text": byte 0xe9 is not UTF-8'),
    (TOO_LONG.encode() + b",a\n", f"a field has more than {LONGEST_FIELD:,} characters"),
]
FLAWED_JSON = [
    (b'{"text": null, "label": "a"}\n', 'column "text" is empty'),
    (b'{"text": 3, "label": "a"}\n', 'column "text" holds 3, not text'),
    (b'{"label": "a"}\n', 'no column "text"'),
    (b'{"text": "one"}\n', 'no column "label"'),
    (b'{"text": "one", "label": null}\n', 'column "label" holds no label'),
    (b'{"text": "one", "label": NaN}\n', 'column "label" holds nan, not a label'),
    (b'{"text": "one", "label": ["a"]}\n', "not one label"),
    (b'{"text": "one", "label": "false"}\n', "holds 'false', no label"),
    (b'{"text": "o\\u0000ne", "label": "a"}\n', "NUL"),
    (b'{"text": "caf\xe9", "label": "a"}\n', "is not UTF-8"),
    (b'{"text": "one", "label"\n', "is not JSON"),
    (b'["one", "a"]\n', "is not a JSON object"),
    (b'{"text": "' + TOO_LONG.encode() + b'", "label": "a"}\n', f"more than {LONGEST_FIELD:,} characters"),
]


@pytest.mark.parametrize(
    ("name", "header", "good", "flawed"),
    [
        ("train.csv", b"text,label\n", b"good %d,%s\n", FLAWED_CSV),
        ("train.jsonl", b"", b'{"text": "good %d", "label": "%s"}\n', FLAWED_JSON),
    ],
    ids=["csv", "jsonl"],
)
def test_exactly_the_flawed_rows_are_left_out(tmp_path, monkeypatch, name, header, good, flawed):
    content, line, kept, left_out = header, len(header) > 0, [], []
    for at, (row, message) in enumerate(flawed):  # before each flawed row stands a good one
        content += good % (at, b"ab"[at % 2 :][:1]) + row
        line += 2
        kept.append((line - 1, f"good {at}", at % 2))
        left_out.append((line, message))
    keys = {"text": ["text"], "labels": ["a", "b"], "split": {"validation": [0, 1]}}
    task = text_task(tmp_path, content, name, **keys, on_bad_row="skip")
    for time in ("read", "from the cache"):
        if time == "from the cache":
            monkeypatch.setattr(
                "classifier.data.splits.read_rows", lambda *file, **options: pytest.fail("the file is read")
            )
        _, splits, _, bad_rows = load_splits(task)
        rows = [*splits["validation"], *splits["train"]]
        assert [(row["row"], row["text"], row["label"]) for row in rows] == kept
        assert [bad_row["row"] for bad_row in bad_rows] == [line for line, _ in left_out]
        assert {(bad_row["split"], bad_row["file"]) for bad_row in bad_rows} == {("train", task.files["train"])}
        for bad_row, (_, message) in zip(bad_rows, left_out, strict=True):
            assert message in bad_row["reason"] and set(bad_row) == {"split", "file", "row", "reason"}
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "the cache")
    assert f"line {left_out[0][0]}" in refusal(replace(task, on_bad_row="fail")).reason  # the cache knows the rule


@pytest.mark.parametrize("row", [row for row, _ in FLAWED_CSV[:-1]], ids=str)
def test_a_file_of_bad_rows_only(tmp_path, row):
    content = b"text,label\n" + row * 3
    for labels in (["a", "b"], None):
        if labels or row not in (b"one,c\n", b"one,-1\n"):
            task = text_task(tmp_path, content, text=["text"], labels=labels, on_bad_row="skip")
            assert "every row" in refusal(task).reason and "bad" in refusal(task).reason


def test_bad_rows_of_each_split(tmp_path):
    tables = {"train": [*AB * 5, ("", "a")], "validation": [("", "b"), *AB], "test": [*AB, ("c", "x"), ("d", "")]}
    task = files_task(tmp_path, **tables, task={"on_bad_row": "skip", "labels": ["a", "b"]})
    _, splits, _, bad_rows = load_splits(task)
    assert sizes(splits) == {"train": 10, "validation": 2, "test": 2}
    listed = [(bad_row["split"], Path(bad_row["file"]).name, bad_row["row"]) for bad_row in bad_rows]
    assert listed == [("train", "train.csv", 12), ("validation", "validation.csv", 2)] + [
        ("test", "test.csv", line) for line in (4, 5)
    ]


def test_a_test_file_without_any_label_keeps_its_rows(tmp_path):
    task = files_task(tmp_path, train=AB, validation=AB, test=[("c", ""), ("d", "")], task={"on_bad_row": "skip"})
    _, splits, _, bad_rows = load_splits(task)
    assert splits["test"]["label"][:] == [-1, -1] and bad_rows == []


# -------------------------------------------------------------------------------------------------------- made splits


def classes(*counts):
    """Label ids in a mixed order: `counts[i]` rows of class i."""
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))


@pytest.mark.parametrize("number", [7, 10, 33, 50])
@pytest.mark.parametrize("counts", [(50, 50), (90, 10), (60, 30, 10), (97, 3), (13, 29, 31, 27), (100,)])
def test_a_stratified_draw_keeps_the_shares(counts, number):
    labels = classes(*counts)
    drawn, rest = stratified(labels, number, seed=3)
    assert sorted([*drawn, *rest]) == list(range(len(labels)))  # disjoint and complete
    assert len(drawn) == number and list(drawn) == sorted(drawn) and list(rest) == sorted(rest)
    in_drawn = np.bincount(labels[drawn], minlength=len(counts))
    assert (np.abs(in_drawn - np.array(counts) * number / len(labels)) < 1).all()
    if len(counts) > 1:
        _, expected = train_test_split(labels, test_size=number, random_state=0, stratify=labels)
        assert (np.abs(in_drawn - np.bincount(expected, minlength=len(counts))) <= 1).all()


def test_shares_are_rounded_by_largest_remainder():
    labels = classes(60, 30, 10)
    drawn, _ = stratified(labels, 7, seed=0)  # exactly 4.2, 2.1 and 0.7
    assert np.bincount(labels[drawn]).tolist() == [4, 2, 1]


def test_a_draw_depends_on_its_seed_alone():
    labels = classes(60, 40)
    first, again, other = (stratified(labels, 20, seed)[0].tolist() for seed in (1, 1, 2))
    assert first == again != other
    np.random.seed(5)  # numpy's global state has no part in it
    assert stratified(labels, 20, 1)[0].tolist() == first


def test_a_draw_is_spread_over_the_rows():
    drawn, _ = stratified(np.zeros(1000, int), 300, seed=0)
    assert 130 < (drawn < 500).sum() < 170  # neither the first rows nor the last


def test_a_class_with_one_row_stays_in_the_rest():
    labels = np.array([0, 1, 2, *[3] * 37])
    for seed in range(20):
        drawn, rest = stratified(labels, 20, seed)
        assert set(labels[rest]) == {0, 1, 2, 3} and set(labels[drawn]) == {3}
    drawn, rest = stratified(labels, 39, 0)
    assert set(labels[rest]) == {0, 1, 2, 3}


def test_numbers_are_drawn_whatever_their_values():
    labels = np.random.default_rng(0).normal(size=50)
    drawn, rest = stratified(labels, 10, seed=0)
    assert len(drawn) == 10 and sorted([*drawn, *rest]) == list(range(50))


def test_a_tenth_of_train_becomes_the_validation_split(tmp_path):
    rows = [(f"text {number}", "a" if number % 4 else "b") for number in range(200)]
    task = files_task(tmp_path, train=rows, test=AB)
    _, splits, _, _ = load_splits(task)
    assert list(splits) == ["train", "test", "validation"] and len(splits["test"]) == 2
    assert Counter(splits["validation"]["label"]) == {0: 15, 1: 5}
    assert Counter(splits["train"]["label"]) == {0: 135, 1: 45}
    assert sorted([*splits["train"]["row"], *splits["validation"]["row"]]) == list(range(2, 202))
    for split in ("train", "validation"):
        for row in splits[split]:
            assert (row["text"], "ab"[row["label"]]) == rows[row["row"] - 2]
    _, again, _, _ = load_splits(task)
    assert all(again[split].to_dict() == splits[split].to_dict() for split in splits)


def test_splits_that_are_there_are_left_alone(tmp_path):
    _, splits, _, _ = load_splits(
        files_task(tmp_path, train=AB * 20, validation=AB, task={"split": {"validation": 0.5}})
    )
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 40, "validation": 2}
    _, splits, _, _ = load_splits(files_task(tmp_path, test=AB, task={"labels": ["a", "b"]}))
    assert list(splits) == ["test"]


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ({"validation": 0.2}, {"train": 80, "validation": 20}),
        ({"validation": 0.2, "test": 0.3}, {"train": 50, "validation": 20, "test": 30}),
        ({"test": 0.3, "seed": 1}, {"train": 60, "test": 30, "validation": 10}),
        ({"seed": 1}, {"train": 90, "validation": 10}),
    ],
)
def test_fractions_are_of_all_rows(tmp_path, split, sizes):
    rows = alternating(100)
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, task={"split": split}))
    assert {name: len(table) for name, table in splits.items()} == sizes
    assert sorted(row for table in splits.values() for row in table["row"]) == list(range(2, 102))
    for table in splits.values():
        assert Counter(table["label"]) == {0: len(table) // 2, 1: len(table) // 2}


def test_the_seed_of_the_task_draws_another_split(tmp_path):
    rows = alternating(100)
    drawn = [
        load_splits(files_task(tmp_path, train=rows, task={"split": split}))[1]["validation"]["row"][:]
        for split in ({}, {"seed": 42}, {"seed": 43})
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("split", [{}, {"validation": 0.5, "test": 0.5}, {"validation": 0.9, "test": 0.9}])
def test_too_few_rows_for_a_split(tmp_path, split):
    rows = AB if not split else AB * 20
    error = refusal(files_task(tmp_path, train=rows, task={"split": split}))
    expected = "too few rows (in 40 rows)" if split else "each label has one row"
    assert expected in error.reason and "_file" in error.advice


def test_a_made_split_in_regression(tmp_path):
    rows = [(f"text {number}", str(number / 7)) for number in range(30)]
    keys = {"labels": "regression", "metrics": ["pearson"]}
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, task=keys))
    assert (len(splits["train"]), len(splits["validation"])) == (27, 3)
    assert set(splits["train"]["label"]) | set(splits["validation"]["label"]) == {number / 7 for number in range(30)}


def test_a_class_with_one_row_does_not_break_a_split(tmp_path):
    rows = [*alternating(40), ("rare", "c")]
    task, splits, _, _ = load_splits(files_task(tmp_path, train=rows, task={"split": {"validation": 0.2, "test": 0.2}}))
    assert task.labels == ["a", "b", "c"] and sizes(splits) == {"train": 25, "validation": 8, "test": 8}
    assert Counter(splits["train"]["label"]) == {0: 12, 1: 12, 2: 1}


@pytest.mark.parametrize("problem", [None, "multi_label"])
def test_a_draw_of_a_tenth_is_as_large_as_that_of_scikit_learn(tmp_path, problem):
    rows = [(f"text {at}", "a" if at % 10 < 7 else "b") for at in range(230)]
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, task={"problem": problem}))
    labels = [label for _, label in rows]
    train, validation = train_test_split(labels, test_size=23, random_state=0, stratify=labels)
    assert sizes(splits) == {"train": len(train), "validation": len(validation)}
    if not problem:
        for name, expected in (("train", train), ("validation", validation)):
            assert Counter("ab"[label] for label in splits[name]["label"]) == Counter(expected)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ({"validation": [10, 14], "test": [0, 3]}, {"train": [*range(3, 10), *range(14, 20)]}),
        ({"train": [0, 5], "validation": [5, 7], "test": [7, 20]}, {"train": range(5), "validation": [5, 6]}),
        ({"train": [2, 20], "validation": [0, 1]}, {"train": range(2, 20), "validation": [0]}),
    ],
)
def test_ranges_of_rows(tmp_path, split, expected):
    rows = alternating(20)
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, task={"split": split}))
    ranges = {name: range(*bounds) for name, bounds in split.items()} | expected
    assert {name: [row - 2 for row in table["row"]] for name, table in splits.items()} == {
        name: list(numbers) for name, numbers in ranges.items()
    }


def test_a_range_and_a_fraction(tmp_path):
    split = {"test": [0, 10], "validation": 0.2}
    _, splits, _, _ = load_splits(files_task(tmp_path, train=alternating(50), task={"split": split}))
    assert sizes(splits) == {"train": 30, "test": 10, "validation": 10} and splits["test"]["row"][:] == list(
        range(2, 12)
    )
    split = {"train": [10, 50]}
    _, splits, _, _ = load_splits(files_task(tmp_path, train=alternating(50), task={"split": split}))
    assert sizes(splits) == {"train": 35, "validation": 5} and min(splits["validation"]["row"]) >= 12


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_a_range_past_the_end(tmp_path, name):
    error = refusal(files_task(tmp_path, train=alternating(20), task={"split": {name: [15, 21]}}))
    assert f"`split` has {name}: [15, 21], the file 20 rows" in error.reason


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_a_group_is_on_one_side_only(tmp_path, seed, fraction):
    sizes_of_groups = np.random.default_rng(5).integers(1, 8, size=60)
    groups = np.random.default_rng(6).permutation(np.repeat(np.arange(60), sizes_of_groups))
    rows = [(f"text {at}", "ab"[at % 2], f"author {group}") for at, group in enumerate(groups)]
    keys = {"text": ["text"], "split": {"validation": fraction, "seed": seed, "group": "author"}}
    task = files_task(tmp_path, ("text", "label", "author"), train=rows, task=keys)
    _, splits, _, _ = load_splits(task)
    sides = [set(splits[name]["group"]) for name in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60
    assert sum(map(len, splits.values())) == len(rows)
    assert abs(len(splits["validation"]) - fraction * len(rows)) <= 4  # half of the largest group
    assert load_splits(task)[1]["validation"]["row"][:] == splits["validation"]["row"][:]
    reseeded = replace(task, split={**task.split, "seed": seed + 1})
    assert load_splits(reseeded)[1]["validation"]["row"][:] != splits["validation"]["row"][:]


def test_groups_are_drawn_as_a_whole():
    groups = np.array(["x", "y", "x", "z", "x", "y"])
    draws = {tuple(draw_groups(groups, 1, seed)[0].tolist()) for seed in range(20)}
    assert draws == {(3,), (1, 5), (0, 2, 4)}  # one group, whichever comes first
    drawn, rest = draw_groups(groups, 6, seed=0)
    assert len(drawn) < 6 and sorted([*drawn, *rest]) == list(range(6))  # one stays


@pytest.mark.parametrize(
    ("groups", "keys", "message"),
    [
        (["x"] * 20, {"group": "author"}, "too few groups of author (in 20 rows) to make a validation split"),
        (["x"] * 10 + ["y"] * 10, {"group": "author", "test": 0.1, "validation": 0.1}, "too few groups of author"),
        (["x"] * 20, {"group": "auhtor"}, 'no column "auhtor" (did you mean "author"?)'),
    ],
)
def test_groups_that_make_no_split(tmp_path, groups, keys, message):
    rows = [(text, label, group) for (text, label), group in zip(alternating(20), groups, strict=True)]
    task = files_task(tmp_path, ("text", "label", "author"), train=rows, task={"text": ["text"], "split": keys})
    error = refusal(task)
    assert message in error.reason and ("--group_column" in error.advice or "_file" in error.advice)


def test_numbers_as_groups_and_rows_without_a_group(tmp_path):
    groups = [None, 1, 2, 3] * 10
    rows = [(text, label, group) for (text, label), group in zip(alternating(40), groups, strict=True)]
    keys = {"text": ["text"], "split": {"validation": 0.25, "group": "author"}}
    task = files_task(tmp_path, ("text", "label", "author"), ".jsonl", train=rows, task=keys)
    _, splits, _, _ = load_splits(task)
    assert sizes(splits) == {"train": 30, "validation": 10} and len(set(splits["validation"]["group"])) == 1


def test_splits_that_are_given_need_no_groups(tmp_path):
    rows = [(text, label, "x") for text, label in alternating(20)]
    task = files_task(tmp_path, ("text", "label", "author"), train=rows, task={"split": {"group": "author"}})
    task.files["validation"] = put_table(tmp_path, "validation.csv", AB)  # without the column
    assert sizes(load_splits(task)[1]) == {"train": 20, "validation": 2}


def test_two_validation_splits_are_enough():
    table = datasets.Dataset.from_dict({"label": [0, 1] * 50})
    complete = {"train": table, "validation_matched": table, "validation_mismatched": table}
    assert make_missing_splits(Task("mnli", labels=["a", "b"]), complete) == complete


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_limit_is_a_seeded_stratified_sample(tmp_path):
    rows = [(f"text {number}", "a" if number % 10 < 7 else "b") for number in range(300)]
    task = files_task(tmp_path, train=rows, validation=rows[:50], task={"limit": {"train": 100}})
    _, splits, _, _ = load_splits(task)
    assert Counter(splits["train"]["label"]) == {0: 70, 1: 30} and len(splits["validation"]) == 50
    lines = splits["train"]["row"][:]
    assert lines == sorted(set(lines)) and lines != list(range(2, 102))
    assert load_splits(task)[1]["train"]["row"][:] == lines
    for row in splits["train"]:
        assert row["text"] == rows[row["row"] - 2][0]


@pytest.mark.parametrize("number", [1, 2, 3, 55, 95, 99])
def test_a_limit_is_the_number_of_rows_whatever_the_classes(tmp_path, number):
    rows = [(f"text {i}", f"class {i // 10}") for i in range(97)] + [(f"rare {i}", f"rare {i}") for i in range(3)]
    task = files_task(tmp_path, train=rows, validation=rows, task={"limit": {"train": number}})
    assert len(load_splits(task)[1]["train"]) == number


def test_a_limit_beyond_the_rows_takes_all(tmp_path):
    task = files_task(tmp_path, train=AB, validation=AB, task={"limit": {"train": 9}})
    assert len(load_splits(task)[1]["train"]) == 2


def test_a_limit_for_a_made_split(tmp_path):
    task = files_task(tmp_path, train=make_rows(100), task={"limit": {"validation": 4, "train": 20}})
    _, splits, _, _ = load_splits(task)
    assert {name: len(table) for name, table in splits.items()} == {"train": 20, "validation": 4}
    assert set(splits["validation"]["row"]) <= set(load_splits(replace(task, limit={}))[1]["validation"]["row"])


def test_a_limit_for_a_split_that_is_not_there(tmp_path):
    error = refusal(files_task(tmp_path, train=AB, validation=AB, task={"limit": {"tets": 5}}))
    assert 'the split "tets"' in error.reason and "train, validation" in error.advice


# ------------------------------------------------------------------------------------------ the cache and fingerprints


def test_fingerprints_name_the_content_not_the_place(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    rows = make_rows(40)
    first = load_splits(files_task(tmp_path / "one", train=rows, validation=rows[:9]))[2]
    shutil.copy(tmp_path / "one" / "train.csv", tmp_path / "two" / "my.train.v2.csv")
    files = {"train": str(tmp_path / "two" / "my.train.v2.csv"), "validation": str(tmp_path / "one" / "validation.csv")}
    assert load_splits(Task("other", files=files))[2] == first
    assert set(first) == {"train", "validation"} and len(set(first.values())) == 2


@pytest.mark.parametrize("change", ["a text", "a label", "a row more", "another order", "the label column"])
def test_a_change_changes_the_fingerprint(tmp_path, change):
    rows = [("one", "a", "b"), ("two", "b", "a"), ("three", "a", "b")]
    header = ("text", "label", "other")
    before = load_splits(files_task(tmp_path, header, train=rows, validation=rows, task={"text": ["text"]}))[2]
    keys, new = {"text": ["text"]}, [list(row) for row in rows]
    if change == "a text":
        new[2][0] = "Three"
    elif change == "a label":
        new[2][1] = "b"
    elif change == "a row more":
        new.append(("four", "a", "b"))
    elif change == "another order":
        new.reverse()
    else:
        keys["label"] = "other"
    after_all = load_splits(files_task(tmp_path, header, train=new, validation=rows, task=keys))
    assert after_all[2]["train"] != before["train"]
    assert (after_all[2]["validation"] == before["validation"]) is (change != "the label column")
    assert [list(row) for row in zip(after_all[1]["train"]["text"], after_all[1]["train"]["row"], strict=True)] == [
        [row[0], line] for line, row in enumerate(new, start=2)
    ]


def test_rows_are_memory_mapped_from_the_cache(tmp_path, empty_cache):
    _, splits, _, _ = load_splits(files_task(tmp_path, train=AB, validation=AB))
    assert {Path(file["filename"]).parent for file in splits["train"].cache_files} == {empty_cache}


def test_a_file_with_a_mistake_leaves_nothing_in_the_cache(tmp_path, empty_cache):
    (tmp_path / "a.csv").write_text("text,label\n" + "good,a\n" * 1500 + "ragged\n")
    task = Task("mine", files={"train": str(tmp_path / "a.csv")})
    for _ in "twice":
        assert "line 1502" in refusal(task).reason
        assert list(empty_cache.iterdir()) == []


def test_more_rows_than_are_read_at_a_time(tmp_path):
    rows = alternating(2500)
    task = files_task(tmp_path, suffix=".csv.gz", train=rows)
    task.files["validation"] = put_table(tmp_path, "a.parquet", rows)
    _, splits, _, _ = load_splits(task)
    assert splits["train"]["text"][:] == splits["validation"]["text"][:] == [text for text, _ in rows]
    assert splits["train"]["row"][:] == list(range(2, 2502)) and splits["validation"]["row"][:] == list(range(1, 2501))


def test_the_second_load_reads_no_row(tmp_path, monkeypatch):
    task = files_task(tmp_path, train=make_rows(60), test=make_rows(9))
    first = load_splits(task)

    def read_one_row(file, read=reader.read_rows, **options):
        yield next(read(file, **options))  # for the text column
        pytest.fail("a second row is read")

    monkeypatch.setattr("classifier.data.splits.read_rows", read_one_row)
    again = load_splits(task)
    monkeypatch.setattr("classifier.data.splits.read_rows", lambda *file, **options: pytest.fail("the file is read"))
    named = load_splits(replace(task, text=["text"]))
    for _, splits, fingerprints, _ in (again, named):
        assert fingerprints == first[2]
        assert all(splits[split].to_dict() == first[1][split].to_dict() for split in first[1])


ROWS = [(f"text {at}", "ab"[at % 3 == 0], str(at // 4)) for at in range(40)]


def fingerprints_of(folder, rows=ROWS, **keys):
    """The fingerprints of train, made from these rows, and of the splits made out of it."""
    keys = {"text": ["text"], **keys}
    return load_splits(files_task(folder, ("text", "label", "topic"), train=rows, task=keys))[2]


@pytest.mark.parametrize(
    "keys",
    [
        {"rows": [*ROWS[:-1], ("changed", "a", "9")]},
        {"split": {"validation": 0.3}},
        {"split": {"validation": 0.1, "seed": 1}},
        {"split": {"group": "topic"}},
        {"split": {"validation": [0, 4]}},
        {"labels": ["b", "a"]},  # the classes are drawn in the order of their ids
        {"label": "topic"},
        {"text": ["topic"]},
        {"text": ["text", "topic"]},
        {"problem": "multi_label"},
        {"limit": {"train": 20, "validation": 3}},
    ],
    ids=str,
)
def test_another_rule_changes_the_fingerprints_of_the_splits_it_touches(tmp_path, keys):
    """Tokens are cached by fingerprint: the same one for other rows would train on the wrong texts."""
    before, after = fingerprints_of(tmp_path), fingerprints_of(tmp_path, **keys)
    assert len({*before.values(), *after.values()}) == 4


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"split": {"validation": 0.1, "seed": 42}},  # as it is without
        {"labels": ["a", "b"]},
        {"on_bad_row": "skip"},  # there are none
        {"limit": {"train": 400}},
        {
            "metrics": ["accuracy"],
            "model": "another/model",
            "max_length": 9,
            "truncate": "tail",
            "defaults": {"seed": 1},
        },
    ],
    ids=str,
)
def test_a_rule_that_changes_no_row_changes_no_fingerprint(tmp_path, keys):
    assert fingerprints_of(tmp_path, **keys) == fingerprints_of(tmp_path)


def test_bad_rows_left_out_change_the_fingerprint(tmp_path):
    """The same number of other rows: those of the label c are left out, or those of b."""
    rows = [(f"text {at}", "abc"[at % 3]) for at in range(30)]
    task = files_task(tmp_path, train=rows, validation=rows, task={"on_bad_row": "skip"})
    fingerprints = [load_splits(replace(task, labels=labels))[2] for labels in (["a", "b"], ["a", "c"])]
    assert all(fingerprints[0][name] != fingerprints[1][name] for name in ("train", "validation"))


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.mark.parametrize(
    ("keys", "message", "advice"),
    [
        ({"label": "lable"}, 'no column "lable" (did you mean "label"?)', "--label_column"),
        ({"text": ["sentense"]}, 'no column "sentense" (did you mean "sentence"?)', "--text_columns"),
        ({"split": {"group": "x"}}, 'no column "x"', "Columns: sentence, title, label, idx."),
        ({"text": ["idx"]}, 'the column "idx" holds int32, not text', "another"),
        ({"text": None}, "cannot tell the text column among: sentence, title", "--text_columns"),
        ({"splits": {"train": "trian"}}, 'has no split "trian" (did you mean "train"?)', "Splits: train."),
    ],
)
def test_columns_and_splits_of_the_hub_that_are_not_there(hub, keys, message, advice):
    hub.update(train=hub_table([0, 1], title=["x", "y"]))
    error = refusal(hub_task(**keys))
    assert error.reason.startswith("some/data: ") and message in error.reason and advice in error.advice


def test_the_text_column_of_the_hub_is_the_only_one_of_strings(hub):
    hub.update(train=hub_table([0, 1] * 10))
    for _ in "twice":  # the second time from the cache
        assert load_splits(hub_task(text=None))[0].text == ["sentence"]


def test_other_names_for_the_splits_of_the_hub(hub, caplog):
    names = ["no", "yes"]
    hub.update(train=hub_table([0, 1], names), test=hub_table([1], names), dev=hub_table([0, 0, 1], names))
    with caplog.at_level(logging.INFO):
        _, splits, fingerprints, _ = load_splits(hub_task(splits={"train": "train", "validation": "dev"}))
    assert sizes(splits) == {"train": 2, "validation": 3} and set(fingerprints) == {"train", "validation"}
    assert "not used" not in caplog.text
    hub.asked.clear()
    assert sizes(load_splits(hub_task(splits={"train": "train", "validation": "test"}))[1])["validation"] == 1
    assert hub.asked == [("some/data", "part", COMMIT)]  # another split is read of the same commit


def test_unused_splits_of_the_hub_are_said(hub, caplog):
    hub.update(train=hub_table([0, 1] * 10), dev=hub_table([0]), unsupervised=hub_table([-1]))
    with caplog.at_level(logging.INFO):
        _, splits, _, _ = load_splits(hub_task())
    assert set(splits) == {"train", "validation"}
    assert "some/data: not used: dev, unsupervised (`splits: {validation: dev}` in a YAML would)" in caplog.text


def test_empty_texts_of_the_hub_are_kept_and_counted(hub, caplog):
    """Others have published scores on these very rows."""
    texts = {"sentence": ["one", None, "", " ", "five"]}
    hub.update(train=hub_table([0, 1, 0, 1, 0], ["no", "yes"], **texts), validation=hub_table([1], ["no", "yes"]))
    with caplog.at_level(logging.WARNING):
        _, splits, _, bad_rows = load_splits(hub_task())
    assert splits["train"]["sentence"][:] == ["one", "", "", " ", "five"] and bad_rows == []
    assert [record.getMessage() for record in caplog.records] == ["some/data: 3 of 5 rows have an empty text"]


def test_groups_of_the_hub(hub):
    hub.update(train=hub_table([0, 1] * 10, author=[f"author {at % 5}" for at in range(20)]))
    _, splits, _, _ = load_splits(hub_task(split={"validation": 0.2, "group": "author"}))
    assert sizes(splits) == {"train": 16, "validation": 4} and len(set(splits["validation"]["group"])) == 1


def test_an_empty_split_of_the_hub(hub):
    hub.update(train=hub_table([0, 1]), validation=hub_table([]))
    assert "some/data: every row is bad" in refusal(hub_task(["a", "b"])).reason


def test_a_missing_validation_split_of_the_hub_is_made(hub):
    hub.update(train=hub_table([0, 1] * 30), test=hub_table([0, 1]), unsupervised=hub_table([-1] * 5))
    _, splits, _, _ = load_splits(hub_task(["no", "yes"]))
    assert {name: len(table) for name, table in splits.items()} == {"train": 54, "test": 2, "validation": 6}


def test_hub_data_with_a_test_split_only(hub):
    hub["test"] = hub_table([-1, -1])
    _, splits, _, _ = load_splits(hub_task(["no", "yes"]))
    assert list(splits) == ["test"]


def test_the_data_of_one_commit_are_downloaded_once_and_pinned(hub):
    hub.update(train=hub_table([0, 1]), validation=hub_table([1]))
    task, _, first, _ = load_splits(hub_task(["no", "yes"]))
    assert task.dataset == {"path": "some/data", "name": "part", "revision": COMMIT}
    assert hub.asked == [("commit", "some/data", "dataset", None), ("some/data", "part", COMMIT)]
    hub.commit = LATER  # the Hub moves on, this project does not
    hub.asked.clear()
    hub.update(train=hub_table([1, 0]))
    task, splits, again, _ = load_splits(hub_task(["no", "yes"]))
    assert hub.asked == [] and again == first and splits["train"]["label"][:] == [0, 1]
    task, splits, newer, _ = load_splits(hub_task(["no", "yes"]), refresh=True)
    assert hub.asked == [("commit", "some/data", "dataset", None), ("some/data", "part", LATER)]
    assert task.dataset["revision"] == LATER and newer != first and splits["train"]["label"][:] == [1, 0]


def test_other_columns_of_a_known_commit_are_downloaded_again(hub):
    hub.update(train=hub_table([0, 1]), validation=hub_table([1, 0]))
    load_splits(hub_task())
    hub.asked.clear()
    task = Task("hubby", text=["sentence"], label="idx", dataset={"path": "some/data", "name": "part"})
    assert load_splits(task)[0].labels == ["0", "1"]
    assert hub.asked == [("some/data", "part", COMMIT)]


def test_labels_of_one_row_each_are_told_as_that(tmp_path):
    error = refusal(files_task(tmp_path, train=[(f"text {number}", f"label {number}") for number in range(30)]))
    assert error.reason == "each label has one row, which stays in train, so there is none for a validation split"
    assert "--validation_file" in error.advice


@pytest.mark.parametrize(
    "keys", [{}, {"labels": "regression"}, {"group": "author"}], ids=["classes", "numbers", "groups"]
)
def test_each_row_validates_in_one_fold(tmp_path, keys):
    generator = np.random.default_rng(7)
    label = (lambda at: str(at / 2)) if "labels" in keys else (lambda at: "abb"[at % 3])
    rows = [(f"text {at}", label(at), f"author {generator.integers(20)}") for at in range(90)]
    split = {"group": "author"} if "group" in keys else {}
    labels = {name: value for name, value in keys.items() if name == "labels"}
    validated = []
    for fold in (1, 2, 3):
        task = {"text": ["text"], "split": {**split, "fold": [fold, 3]}, **labels}
        task = files_task(
            tmp_path, ("text", "label", "author"), train=rows, validation=rows[:2], test=rows[:3], task=task
        )
        _, splits, _, _ = load_splits(task)
        assert list(splits) == ["train", "validation", "test"] and len(splits["test"]) == 3
        held_out = splits["validation"]["row"][:]
        assert sorted([*splits["train"]["row"], *held_out]) == list(range(2, 92))
        validated += held_out
        if "group" in keys:
            assert not set(splits["train"]["group"]) & set(splits["validation"]["group"])
        else:
            assert len(held_out) == 30
        if not keys:
            assert Counter(splits["validation"]["label"]) == {0: 10, 1: 20}
    assert sorted(validated) == list(range(2, 92))


def test_too_few_rows_for_the_folds(tmp_path):
    error = refusal(files_task(tmp_path, train=AB * 3, task={"split": {"fold": [1, 4]}}))
    assert "too few rows of any label in 6 rows for 4 folds" in error.reason
    groups = [(f"text {at}", "ab"[at % 2], f"author {at % 2}") for at in range(20)]
    keys = {"text": ["text"], "split": {"fold": [1, 3], "group": "author"}}
    error = refusal(files_task(tmp_path, ("text", "label", "author"), train=groups, task=keys))
    assert "too few groups of author in 20 rows for 3 folds" in error.reason
