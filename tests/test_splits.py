"""splits.py: labels, text columns, made splits against scikit-learn's, the cache, and the Hub without a network."""

import gzip
import shutil
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from conftest import make_rows, write_table
from sklearn.model_selection import train_test_split

import splits
from reader import BadInput
from splits import hub_commit, load_splits, make_missing_splits, stratified
from tasks import Task

COMMIT, LATER = "1" * 40, "2" * 40


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A cache folder of its own for each test."""
    folder = tmp_path / "the cache"
    folder.mkdir()
    monkeypatch.setattr(splits, "cache_folder", lambda: folder)
    return folder


def files_task(folder, header=("text", "label"), name="mine", suffix=".csv", **tables):
    """A task on tables written to files; keys of the task go in as `task`, a dict."""
    keys = tables.pop("task", {})
    files = {split: str(write_table(folder / f"{split}{suffix}", rows, header)) for split, rows in tables.items()}
    return Task(name=name, files=files, **keys)


def refusal(task, **options):
    """The BadInput of loading a task: one line of reason, one of advice."""
    with pytest.raises(BadInput) as caught:
        load_splits(task, **options)
    assert "\n" not in caught.value.reason and "\n" not in caught.value.advice
    assert caught.value.advice
    return caught.value


AB = [("one", "a"), ("two", "b")]


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_rows_keep_their_text_label_id_and_line(tmp_path, suffix):
    rows = [("good, very", "pos"), ("bad", "neg"), ("00456", "pos"), ("None", "neg")]
    task, found, _ = load_splits(files_task(tmp_path, suffix=suffix, train=rows, validation=rows[:2]))
    assert (task.labels, task.text) == (["neg", "pos"], ["text"])
    first = 1 if suffix == ".jsonl" else 2
    assert found["train"].to_dict() == {
        "text": ["good, very", "bad", "00456", "None"],
        "label": [1, 0, 1, 0],
        "row": [first, first + 1, first + 2, first + 3],
    }
    assert found["validation"]["label"][:] == [1, 0]


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["1", "-1", "0"], ["-1", "0", "1"]),
        (["b10", "b2", "B"], ["B", "b10", "b2"]),
        (["x", "10", "9"], ["9", "10", "x"]),
        (["True", "False"], ["False", "True"]),
        (["nan", "None", "inf"], ["None", "inf", "nan"]),
        (["07", "7", "6"], ["6", "07", "7"]),
    ],
)
def test_the_order_of_labels(tmp_path, labels, order):
    rows = [(f"text {number}", label) for number, label in enumerate(labels)]
    task, found, _ = load_splits(files_task(tmp_path, train=rows, validation=rows))
    assert task.labels == order
    assert [order[number] for number in found["train"]["label"]] == labels


@pytest.mark.parametrize(
    ("names", "values", "ids"),
    [
        (["neg", "pos"], ["pos", "neg"], [1, 0]),
        (["pos", "neg"], ["pos", "neg"], [0, 1]),  # the order of the task, not of the alphabet
        (["neg", "pos"], ["1", "0"], [1, 0]),  # ids
        (["neg", "pos"], ["1", "neg"], [1, 0]),
        (["1", "0"], ["1", "0"], [0, 1]),  # names, though they look like ids
        (["1", "2", "3"], ["1", "3"], [0, 2]),
        (["-1", "1"], ["-1", "1"], [0, 1]),
    ],
)
def test_labels_by_name_and_by_id(tmp_path, names, values, ids):
    rows = [("text", value) for value in values]
    _, found, _ = load_splits(files_task(tmp_path, train=rows, validation=rows, task={"labels": names}))
    assert found["train"]["label"][:] == ids


def test_numbers_and_booleans_of_json_are_labels(tmp_path):
    for values, names in (([1, 0, 1], ["0", "1"]), ([True, False], ["False", "True"])):
        rows = [("text", value) for value in values]
        task, found, _ = load_splits(files_task(tmp_path, suffix=".jsonl", train=rows, validation=rows))
        assert task.labels == names and found["train"]["label"][:] == [int(value) for value in values]


@pytest.mark.parametrize("decimal", ["0.5", "1.0", "-2.25", "1e-3"])
def test_decimals_are_refused_with_the_way_to_regression(tmp_path, decimal):
    task = files_task(tmp_path, ("text", "score"), train=[("a", "1"), ("b", decimal)], task={"label": "score"})
    error = refusal(task)
    assert f'"score" holds decimals such as {decimal}' in error.reason
    assert "label: score, labels: regression, metrics: [pearson, spearmanr]" in error.advice


@pytest.mark.parametrize("rows", [[("a", "x"), ("b", "x")], [("a", ""), ("b", "")]])
def test_fewer_than_two_classes_are_refused(tmp_path, rows):
    error = refusal(files_task(tmp_path, train=rows))
    assert '"label" of the train split' in error.reason and "--label_column" in error.advice


def test_labels_cannot_be_found_without_a_train_split(tmp_path):
    assert "no train split" in refusal(files_task(tmp_path, test=AB)).reason


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_unknown_label_is_told_with_its_row_and_the_nearest_name(tmp_path, split):
    good = [("a", "positive"), ("b", "negative")]
    tables = {"train": good, "validation": good, "test": good}
    tables[split] = [*good, ("c", "postive")]
    error = refusal(files_task(tmp_path, **tables, task={"labels": ["negative", "positive"]}))
    assert f"{split} split, row 4: the label is 'postive' (did you mean \"positive\"?)" in error.reason
    assert "negative, positive" in error.advice


@pytest.mark.parametrize("value", ["0", "4", "2"])
def test_a_number_that_is_no_label_of_numbered_classes_is_no_id(tmp_path, value):
    """With the classes 1, 3 and 5 found in train, a 0 or a 2 of another split is a mistake, not the class 1 or 5."""
    rows = [("a", "1"), ("b", "3"), ("c", "5")]
    error = refusal(files_task(tmp_path, train=rows, validation=[("d", value)]))
    assert f"validation split, row 2: the label is '{value}'" in error.reason


@pytest.mark.parametrize("value", ["2", "-2", "1.0"])
def test_an_id_out_of_range(tmp_path, value):
    task = files_task(tmp_path, train=[("a", "1"), ("b", value)], task={"labels": ["neg", "pos"]})
    assert f"row 3: the label is '{value}'" in refusal(task).reason


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("value", ["", "-1"])
def test_a_missing_label_is_refused_where_labels_are_needed(tmp_path, split, value):
    tables = {"train": AB, "validation": AB, split: [*AB, ("c", value), ("d", value)]}
    error = refusal(files_task(tmp_path, **tables, task={"labels": ["a", "b"]}))
    assert f"{split} split, row 4: no label (2 such rows)" in error.reason


def test_a_null_label_of_json_is_a_missing_one(tmp_path):
    task = files_task(tmp_path, suffix=".jsonl", train=[*AB, ("c", None)])
    assert "row 3: no label (1 such rows)" in refusal(task).reason


def test_a_test_split_may_lack_labels(tmp_path):
    task = files_task(tmp_path, train=AB, validation=AB, test=[("c", "b"), ("d", ""), ("e", "-1")])
    assert load_splits(task)[1]["test"]["label"][:] == [1, -1, -1]
    write_table(tmp_path / "test.csv", [("c",), ("d",)], ("text",))  # without the column
    found = load_splits(task)[1]["test"]
    assert found["label"][:] == [-1, -1] and found["text"][:] == ["c", "d"]


def test_regression_labels_are_floats(tmp_path):
    values = ["0.1", "1e-5", "-3", "4.999999999"]
    tables = {"train": [("t", value) for value in values], "validation": [("t", "2")], "test": [("t", ""), ("u", "1")]}
    keys = {"labels": "regression", "metrics": ["pearson"]}
    task, found, _ = load_splits(files_task(tmp_path, **tables, task=keys))
    assert found["train"]["label"][:] == [0.1, 1e-5, -3.0, 4.999999999]
    assert str(found["train"].features["label"].dtype) == "float64"
    assert np.isnan(found["test"]["label"][0]) and found["test"]["label"][1] == 1.0
    assert task.is_regression


@pytest.mark.parametrize(
    ("value", "words"),
    [("good", "the label is 'good'"), ("inf", "the label is 'inf'"), ("1,5", "the label is '1,5'"), ("", "no label")],
)
def test_a_regression_label_that_is_no_number(tmp_path, value, words):
    keys = {"labels": "regression", "metrics": ["pearson"]}
    error = refusal(files_task(tmp_path, train=[("a", "1"), ("b", value)], task=keys))
    assert f"train split, row 3: {words}" in error.reason


def test_minus_one_is_a_number_in_regression_unless_the_whole_test_split_has_it(tmp_path):
    rows, keys = [("a", "-1"), ("b", "2")], {"labels": "regression", "metrics": ["pearson"]}
    _, found, _ = load_splits(files_task(tmp_path, train=rows, validation=rows[:1], test=rows, task=keys))
    assert found["validation"]["label"][:] == [-1.0] and found["test"]["label"][:] == [-1.0, 2.0]
    write_table(tmp_path / "test.csv", [("a", "-1.0"), ("b", "-1.0")])  # as in GLUE's STS-B
    _, found, _ = load_splits(files_task(tmp_path, train=rows, validation=rows, task=keys))
    task = Task("mine", files={"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")}, **keys)
    assert np.isnan(load_splits(task)[1]["test"]["label"][:]).all()


def test_metrics_are_checked_once_the_labels_are_known(tmp_path):
    rows = [("a", "x"), ("b", "y"), ("c", "z")]
    error = refusal(files_task(tmp_path, train=rows, validation=rows, task={"metrics": ["f1"]}))
    assert "f1 is for two labels, this task has 3" in error.reason


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
    task, found, _ = load_splits(files_task(tmp_path, header, train=rows, validation=rows))
    assert task.text == [expected] and found["train"][expected][:] == [f"{expected} a", f"{expected} b"]


def test_a_column_of_json_numbers_is_not_text(tmp_path):
    rows = [(1, "one", "a"), (2, "two", "b")]
    header = ("id", "review", "label")
    task, _, _ = load_splits(files_task(tmp_path, header, suffix=".jsonl", train=rows, validation=rows))
    assert task.text == ["review"]


@pytest.mark.parametrize(
    ("header", "words"), [(("title", "body", "label"), "among: title, body"), (("label",), "among: none")]
)
def test_a_text_column_that_cannot_be_told(tmp_path, header, words):
    error = refusal(files_task(tmp_path, header, train=[["x"] * len(header)]))
    assert words in error.reason and "--text_columns" in error.advice


def test_pairs(tmp_path):
    rows = [("q1", "a1", "yes"), ("q2", "a2", "no")]
    task = files_task(tmp_path, ("question", "answer", "label"), train=rows, validation=rows)
    task = Task("mine", files=task.files, text=["answer", "question"])
    _, found, _ = load_splits(task)
    assert found["train"].column_names == ["answer", "question", "row", "label"]
    assert found["train"]["answer"][:] == ["a1", "a2"] and found["train"]["question"][:] == ["q1", "q2"]


@pytest.mark.parametrize(
    ("keys", "words", "option"),
    [
        ({"text": ["sentense"]}, 'no column "sentense" (did you mean "sentence"?)', "--text_columns"),
        ({"text": ["sentence"], "label": "lable"}, 'no column "lable" (did you mean "label"?)', "--label_column"),
    ],
)
def test_a_column_that_is_not_there(tmp_path, keys, words, option):
    error = refusal(files_task(tmp_path, ("sentence", "label"), train=AB, task=keys))
    assert f"{tmp_path}/train.csv, line 2: {words}" in error.reason
    assert "Columns: sentence, label." in error.advice and option in error.advice


def test_a_json_row_that_lacks_the_column_or_holds_no_text(tmp_path):
    for second, words in (
        ('{"label": "b"}', 'line 2: no column "text"'),
        ('{"text": 3, "label": "b"}', "holds 3, not"),
    ):
        (tmp_path / "a.jsonl").write_text('{"text": "a", "label": "a"}\n' + second)
        error = refusal(Task("mine", text=["text"], files={"train": str(tmp_path / "a.jsonl")}))
        assert words in error.reason


def test_a_file_that_is_not_there(tmp_path):
    write_table(tmp_path / "train.csv", AB)
    error = refusal(Task("mine", files={"train": str(tmp_path / "tran.csv")}))
    assert "no such file" in error.reason and "train.csv" in error.reason


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
        _, theirs = train_test_split(labels, test_size=number, random_state=0, stratify=labels)
        assert (np.abs(in_drawn - np.bincount(theirs, minlength=len(counts))) <= 1).all()


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
    drawn, rest = stratified(labels, 10, seed=0, classes=False)
    assert len(drawn) == 10 and sorted([*drawn, *rest]) == list(range(50))


def test_a_tenth_of_train_becomes_the_validation_split(tmp_path):
    rows = [(f"text {number}", "a" if number % 4 else "b") for number in range(200)]
    task = files_task(tmp_path, train=rows, test=AB)
    _, found, _ = load_splits(task)
    assert list(found) == ["train", "test", "validation"] and len(found["test"]) == 2
    assert Counter(found["validation"]["label"]) == {0: 15, 1: 5}
    assert Counter(found["train"]["label"]) == {0: 135, 1: 45}
    assert sorted([*found["train"]["row"], *found["validation"]["row"]]) == list(range(2, 202))
    for split in ("train", "validation"):
        for row in found[split]:
            assert (row["text"], "ab"[row["label"]]) == rows[row["row"] - 2]
    _, again, _ = load_splits(task)
    assert all(again[split].to_dict() == found[split].to_dict() for split in found)


def test_splits_that_are_there_are_left_alone(tmp_path):
    _, found, _ = load_splits(files_task(tmp_path, train=AB * 20, validation=AB, task={"split": {"validation": 0.5}}))
    assert {split: len(rows) for split, rows in found.items()} == {"train": 40, "validation": 2}
    _, found, _ = load_splits(files_task(tmp_path, test=AB, task={"labels": ["a", "b"]}))
    assert list(found) == ["test"]


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
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(100)]
    _, found, _ = load_splits(files_task(tmp_path, train=rows, task={"split": split}))
    assert {name: len(table) for name, table in found.items()} == sizes
    assert sorted(row for table in found.values() for row in table["row"]) == list(range(2, 102))
    for table in found.values():
        assert Counter(table["label"]) == {0: len(table) // 2, 1: len(table) // 2}


def test_the_seed_of_the_task_draws_another_split(tmp_path):
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(100)]
    drawn = [
        load_splits(files_task(tmp_path, train=rows, task={"split": split}))[1]["validation"]["row"][:]
        for split in ({}, {"seed": 42}, {"seed": 43})
    ]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("share", [0, 1, 1.0, -0.1, 10, "1e-1", None])
def test_a_fraction_that_is_none(tmp_path, share):
    error = refusal(files_task(tmp_path, train=AB * 20, task={"split": {"validation": share}}))
    assert f"`split` has validation: {share!r}" in error.reason and "0.1" in error.advice


@pytest.mark.parametrize("split", [{}, {"validation": 0.5, "test": 0.5}, {"validation": 0.9, "test": 0.9}])
def test_too_few_rows_for_a_split(tmp_path, split):
    rows = AB if not split else AB * 20
    error = refusal(files_task(tmp_path, train=rows, task={"split": split}))
    assert f"too few rows ({len(rows)})" in error.reason and "_file" in error.advice


def test_a_made_split_in_regression(tmp_path):
    rows = [(f"text {number}", str(number / 7)) for number in range(30)]
    keys = {"labels": "regression", "metrics": ["pearson"]}
    _, found, _ = load_splits(files_task(tmp_path, train=rows, task=keys))
    assert (len(found["train"]), len(found["validation"])) == (27, 3)
    assert set(found["train"]["label"]) | set(found["validation"]["label"]) == {number / 7 for number in range(30)}


def test_two_validation_splits_are_enough():
    table = datasets.Dataset.from_dict({"label": [0, 1] * 50})
    given = {"train": table, "validation_matched": table, "validation_mismatched": table}
    assert make_missing_splits(Task("mnli", labels=["a", "b"]), given) == given


# ------------------------------------------------------------------------------------------------------------- limits


def test_a_limit_is_a_seeded_stratified_sample(tmp_path):
    rows = [(f"text {number}", "a" if number % 10 < 7 else "b") for number in range(300)]
    task = files_task(tmp_path, train=rows, validation=rows[:50])
    _, found, _ = load_splits(task, {"train": 100})
    assert Counter(found["train"]["label"]) == {0: 70, 1: 30} and len(found["validation"]) == 50
    lines = found["train"]["row"][:]
    assert lines == sorted(set(lines)) and lines != list(range(2, 102))
    assert load_splits(task, {"train": 100})[1]["train"]["row"][:] == lines
    for row in found["train"]:
        assert row["text"] == rows[row["row"] - 2][0]


@pytest.mark.parametrize("number", [1, 2, 3, 55, 95, 99])
def test_a_limit_is_the_number_of_rows_whatever_the_classes(tmp_path, number):
    rows = [(f"text {i}", f"class {i // 10}") for i in range(97)] + [(f"rare {i}", f"rare {i}") for i in range(3)]
    task = files_task(tmp_path, train=rows, validation=rows)
    assert len(load_splits(task, {"train": number})[1]["train"]) == number


def test_a_limit_beyond_the_rows_takes_all(tmp_path):
    assert len(load_splits(files_task(tmp_path, train=AB, validation=AB), {"train": 9})[1]["train"]) == 2


def test_a_limit_for_a_made_split(tmp_path):
    task = files_task(tmp_path, train=make_rows(100))
    _, found, _ = load_splits(task, {"validation": 4, "train": 20})
    assert {name: len(table) for name, table in found.items()} == {"train": 20, "validation": 4}
    assert set(found["validation"]["row"]) <= set(load_splits(task)[1]["validation"]["row"])


def test_a_limit_for_a_split_that_is_not_there(tmp_path):
    error = refusal(files_task(tmp_path, train=AB, validation=AB), limits={"tets": 5})
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


def test_the_fingerprint_of_a_made_split_follows_train_and_the_rule(tmp_path):
    rows = make_rows(40)

    def fingerprint(rows, split, limits=None):
        return load_splits(files_task(tmp_path, train=rows, task={"split": split}), limits)[2]["validation"]

    first = fingerprint(rows, {"validation": 0.2})
    assert fingerprint(rows, {"validation": 0.2}) == first
    others = {
        fingerprint(rows, {"validation": 0.3}),
        fingerprint(rows, {"validation": 0.2, "seed": 1}),
        fingerprint([*rows[:-1], ("changed", rows[-1][1])], {"validation": 0.2}),
        fingerprint(rows, {"validation": 0.2}, {"validation": 3}),
    }
    assert len(others) == 4 and first not in others


def test_the_second_load_reads_no_row(tmp_path, monkeypatch):
    task = files_task(tmp_path, train=make_rows(60), test=make_rows(9))
    first = load_splits(task)

    def read_one_row(file, read=splits.read_rows):
        yield next(iter(read(file)))  # for the text column
        pytest.fail("a second row is read")

    monkeypatch.setattr(splits, "read_rows", read_one_row)
    again = load_splits(task)
    monkeypatch.setattr(splits, "read_rows", lambda file: pytest.fail("the file is read"))
    named = load_splits(Task("mine", files=task.files, text=["text"]))
    for _, found, fingerprints in (again, named):
        assert fingerprints == first[2]
        assert all(found[split].to_dict() == first[1][split].to_dict() for split in first[1])


def test_rows_are_memory_mapped_from_the_cache(tmp_path, empty_cache):
    _, found, _ = load_splits(files_task(tmp_path, train=AB, validation=AB))
    assert {Path(file["filename"]).parent for file in found["train"].cache_files} == {empty_cache}


def test_a_file_with_a_mistake_leaves_nothing_in_the_cache(tmp_path, empty_cache):
    (tmp_path / "a.csv").write_text("text,label\n" + "good,a\n" * 1500 + "ragged\n")
    task = Task("mine", files={"train": str(tmp_path / "a.csv")})
    for _ in "twice":
        assert "line 1502" in refusal(task).reason
        assert list(empty_cache.iterdir()) == []


def test_more_rows_than_are_read_at_a_time(tmp_path):
    rows = [(f"text {number}", "ab"[number % 2]) for number in range(2500)]
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(write_table(tmp_path / "a.csv", rows).read_bytes()))
    _, found, _ = load_splits(Task("mine", files={"train": str(file), "validation": str(tmp_path / "a.csv")}))
    assert found["train"]["text"][:] == found["validation"]["text"][:] == [text for text, _ in rows]
    assert found["train"]["row"][:] == list(range(2, 2502))


def test_a_digest_is_the_same_everywhere():
    assert splits.digest("rows", 1, ["a"], {"y": 1, "x": None}) == splits.digest("rows", 1, ["a"], {"x": None, "y": 1})
    # printf '["rows", 1]' | sha256sum
    assert splits.digest("rows", 1) == "36b914be43a193d5e4461abc7e0d693e"
    assert splits.digest("a") != splits.digest(["a"])


# ------------------------------------------------------------------------------------------------------------ the Hub


def hub_table(labels, names=None, kind="int64"):
    """A split as the Hub serves it: a ClassLabel feature where names are given."""
    feature = datasets.ClassLabel(names=names) if names else datasets.Value(kind)
    columns = {"sentence": [f"text {number}" for number in range(len(labels))], "label": labels}
    columns["idx"] = list(range(len(labels)))
    features = {"sentence": datasets.Value("string"), "label": feature, "idx": datasets.Value("int32")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.fixture
def hub(monkeypatch):
    """A Hub without a network: a dict of splits to fill, and what was asked of it."""

    class Hub(dict):
        commit = COMMIT

    served = Hub()
    served.asked = []

    def load_dataset(*arguments, **options):
        served.asked.append((*arguments, options["revision"]))
        return datasets.DatasetDict(served)

    def repo_info(self, repository, *, repo_type, revision=None, **options):
        served.asked.append(("commit", repository, repo_type, revision))
        return huggingface_hub.hf_api.DatasetInfo(id=repository, sha=served.commit, private=False, tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return served


def hub_task(labels=None, **keys):
    return Task("hubby", text=["sentence"], labels=labels, dataset={"path": "some/data", "name": "part"}, **keys)


@pytest.mark.parametrize(
    ("labels", "ids"), [(["negative", "positive"], [1, 0, 0]), (["positive", "negative"], [0, 1, 1])]
)
def test_classes_of_the_hub_are_matched_by_name(hub, labels, ids):
    names = ["negative", "positive"]
    hub.update(train=hub_table([1, 0, 0], names), validation=hub_table([0], names), test=hub_table([-1, -1], names))
    task, found, _ = load_splits(hub_task(labels))
    assert found["train"]["label"][:] == ids and task.labels == labels
    assert found["validation"]["label"][:] == [ids[1]]
    assert found["test"]["label"][:] == [-1, -1]
    assert found["train"]["row"][:] == [0, 1, 2] and found["train"]["sentence"][0] == "text 0"


def test_classes_of_the_hub_are_found_where_the_task_names_none(hub):
    hub.update(train=hub_table([1, 0], ["world", "sports"]), validation=hub_table([0], ["world", "sports"]))
    task, found, _ = load_splits(hub_task())
    assert [task.labels[number] for number in found["train"]["label"]] == ["sports", "world"]


def test_plain_numbers_of_the_hub(hub):
    hub.update(train=hub_table([0, 1, 1]), validation=hub_table([1, 0]), test=hub_table([-1]))
    _, found, _ = load_splits(hub_task(["no", "yes"]))
    assert found["train"]["label"][:] == [0, 1, 1] and found["test"]["label"][:] == [-1]
    assert load_splits(hub_task())[0].labels == ["0", "1"]


def test_regression_on_the_hub_and_its_unlabelled_test_split(hub):
    values = [0.5, 4.75, -1.0]
    hub.update(train=hub_table(values, kind="float64"), validation=hub_table([1.0], kind="float64"))
    hub["test"] = hub_table([-1.0, -1.0], kind="float64")
    _, found, _ = load_splits(hub_task("regression", metrics=["pearson"]))
    assert found["train"]["label"][:] == values
    assert np.isnan(found["test"]["label"][:]).all()


def test_names_that_the_task_does_not_have(hub):
    hub.update(train=hub_table([0, 1], ["ham", "spam"]), validation=hub_table([1], ["ham", "spam"]))
    error = refusal(hub_task(["ham", "spain"]))
    assert "train split, row 1: the label is 'spam' (did you mean \"spain\"?)" in error.reason


@pytest.mark.parametrize(
    ("keys", "words"), [({"label": "lable"}, 'no column "lable" (did you mean "label"?)'), ({}, "cannot tell the text")]
)
def test_columns_of_the_hub(hub, keys, words):
    hub.update(train=hub_table([0, 1]))
    task = Task("hubby", dataset={"path": "some/data"}, text=["sentence"] if keys else None, **keys)
    error = refusal(task)
    assert words in error.reason and "some/data" in error.reason
    assert "idx" in str(error)


def test_a_missing_validation_split_of_the_hub_is_made(hub):
    hub.update(train=hub_table([0, 1] * 30), test=hub_table([0, 1]), unsupervised=hub_table([-1] * 5))
    _, found, _ = load_splits(hub_task(["no", "yes"]))
    assert {name: len(table) for name, table in found.items()} == {"train": 54, "test": 2, "validation": 6}


def test_hub_data_with_a_test_split_only(hub):
    hub["test"] = hub_table([-1, -1])
    _, found, _ = load_splits(hub_task(["no", "yes"]))
    assert list(found) == ["test"]


def test_the_data_of_one_commit_are_downloaded_once_and_pinned(hub):
    hub.update(train=hub_table([0, 1]), validation=hub_table([1]))
    task, _, first = load_splits(hub_task(["no", "yes"]))
    assert task.dataset == {"path": "some/data", "name": "part", "revision": COMMIT}
    assert hub.asked == [("commit", "some/data", "dataset", None), ("some/data", "part", COMMIT)]
    hub.commit = LATER  # the Hub moves on, this project does not
    hub.asked.clear()
    hub.update(train=hub_table([1, 0]))
    task, found, again = load_splits(hub_task(["no", "yes"]))
    assert hub.asked == [] and again == first and found["train"]["label"][:] == [0, 1]
    task, found, newer = load_splits(hub_task(["no", "yes"]), refresh=True)
    assert hub.asked == [("commit", "some/data", "dataset", None), ("some/data", "part", LATER)]
    assert task.dataset["revision"] == LATER and newer != first and found["train"]["label"][:] == [1, 0]


def test_other_columns_of_a_known_commit_are_downloaded_again(hub):
    hub.update(train=hub_table([0, 1]), validation=hub_table([1, 0]))
    load_splits(hub_task())
    hub.asked.clear()
    task = Task("hubby", text=["sentence"], label="idx", dataset={"path": "some/data", "name": "part"})
    assert load_splits(task)[0].labels == ["0", "1"]
    assert hub.asked == [("some/data", "part", COMMIT)]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' doesn't exist"), "doesn't exist"),
        (ValueError("BuilderConfig 'part' not found.\nAvailable: ['cola', 'mrpc']"), "Available: ['cola', 'mrpc']"),
        (ConnectionError("Couldn't reach 'some/data' on the Hub"), "cannot download some/data"),
    ],
    ids=["no such data", "no such part", "no network"],
)
def test_a_download_that_fails(hub, monkeypatch, error, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert words in refusal(hub_task(["a", "b"])).reason


# ---------------------------------------------------------------------------------------------- the commit on the Hub


def test_the_commit_is_asked_for_once(hub, empty_cache):
    assert hub_commit("org/model", "model") == COMMIT
    hub.commit = LATER
    assert hub_commit("org/model", "model") == COMMIT
    assert hub.asked == [("commit", "org/model", "model", None)]
    assert hub_commit("org/model", "model", refresh=True) == LATER
    assert hub_commit("org/model", "model") == LATER
    assert len(hub.asked) == 2
    assert [file.suffix for file in empty_cache.iterdir()] == [".commit"]


def test_each_repository_kind_and_revision_has_a_commit_of_its_own(hub):
    questions = [("a/b", "model"), ("a/b", "dataset"), ("a/c", "model"), ("a/b", "model", "v1"), ("b", "model")]
    questions.append(("a/b", "dataset", "refs/convert/parquet"))
    expected = {}
    for number, question in enumerate(questions):
        hub.commit = expected[question] = str(number) * 40
        assert hub_commit(*question) == hub.commit
    assert {question: hub_commit(*question) for question in questions} == expected
    assert len(hub.asked) == len(questions)


def fail_with(monkeypatch, error):
    def repo_info(self, *arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)


def hub_refusal(*arguments, **options):
    with pytest.raises(BadInput) as caught:
        hub_commit(*arguments, **options)
    assert "\n" not in caught.value.reason and "\n" not in caught.value.advice
    return caught.value


def errors_of_a_network():
    """What HfApi raises without a network: in offline mode, and from the HTTP library underneath."""
    http_error = huggingface_hub.errors.HfHubHTTPError.__mro__[1]  # of requests, httpx or httpx2, by version
    return [
        huggingface_hub.errors.OfflineModeIsEnabled("offline mode"),
        http_error("[Errno 111]\nConnection refused"),
        TimeoutError("timed out"),
    ]


@pytest.mark.parametrize("error", errors_of_a_network(), ids=["offline", "refused", "timed out"])
def test_an_unreachable_hub(monkeypatch, error):
    fail_with(monkeypatch, error)
    refused = hub_refusal("org/model", "model")
    assert "cannot download org/model" in refused.reason
    assert "HF_ENDPOINT" in refused.advice and "--task demo" in refused.advice and "--train_file" in refused.advice


def test_offline_mode_as_it_is():
    """Without a stand-in: the tests run with HF_HUB_OFFLINE=1."""
    assert "HF_ENDPOINT" in hub_refusal("org/model", "model").advice


@pytest.mark.parametrize("error", errors_of_a_network(), ids=["offline", "refused", "timed out"])
@pytest.mark.parametrize(("kind", "revision", "reference"), [("model", None, "main"), ("dataset", "v1", "v1")])
def test_what_another_tool_downloaded_serves_without_a_network(
    tmp_path, monkeypatch, empty_cache, kind, revision, reference, error
):
    fail_with(monkeypatch, error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = tmp_path / "hub" / f"{kind}s--org--name" / "refs" / reference
    file.parent.mkdir(parents=True)
    file.write_text(LATER + "\n")
    assert hub_commit("org/name", kind, revision) == LATER
    file.unlink()
    assert hub_commit("org/name", kind, revision) == LATER  # pinned


@pytest.mark.parametrize(("kind", "words"), [("model", "give a folder"), ("dataset", "give a file")])
def test_a_repository_that_is_not_there(monkeypatch, kind, words):
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    fail_with(monkeypatch, huggingface_hub.errors.RepositoryNotFoundError("404", response=response))
    refused = hub_refusal("org/nmae", kind)
    assert f'no {kind} "org/nmae"' in refused.reason and words in refused.advice


def test_a_mistyped_folder_is_no_repository(tmp_path):
    """A path of several parts cannot be a repository: huggingface_hub says so before it asks."""
    refused = hub_refusal("runs/mprc/model", "model")
    assert 'no model "runs/mprc/model"' in refused.reason and "give a folder" in refused.advice


def test_pins_are_plain_text(hub, empty_cache):
    hub_commit("org/model", "model")
    (file,) = empty_cache.iterdir()
    assert file.read_text() == COMMIT and "org--model" in file.name


@pytest.mark.parametrize("label", [["a", "b"], {"name": "a"}])
def test_a_label_that_is_a_list_or_an_object_is_refused(tmp_path, label):
    error = refusal(files_task(tmp_path, suffix=".jsonl", train=[*AB, ("three", label)]))
    assert "row 3" in error.reason


def test_another_rule_for_made_splits_changes_the_fingerprint_of_every_split_it_touches(tmp_path):
    """Tokens are cached by fingerprint: the same one for other rows would train on the wrong texts."""
    rows = make_rows(40)
    found = [
        load_splits(files_task(tmp_path, train=rows, task={"split": {"validation": 0.2, "seed": seed}}))
        for seed in (1, 2)
    ]
    for name in ("train", "validation"):
        assert found[0][1][name]["text"][:] != found[1][1][name]["text"][:]
        assert found[0][2][name] != found[1][2][name]
