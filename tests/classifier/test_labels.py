"""Labels: label strings -> ids, numbers, and rows of 0 and 1, through files and the Hub; what is no label."""

import json
import logging

import datasets
import numpy as np
import pytest
from data_help import AB, FORMATS, FakeHub, files_task, hub_table, hub_task, put_table, refusal, text_task

from classifier.data.cache import column_array
from classifier.data.labels import is_number, is_whole, label_ids, label_strings, weights_of_classes
from classifier.data.splits import load_splits
from classifier.data.tasks import Task
from classifier.messages import BadInput
from common import with_metrics

REGRESSION = {"labels": "regression"}
MULTI = {"problem": "multi_label"}


pytestmark = pytest.mark.usefixtures("empty_cache")


def labelled(values):
    return [(f"text {number}", value) for number, value in enumerate(values)]


# ------------------------------------------------------------------------------------------------ strings of labels


@pytest.mark.parametrize(
    ("value", "message", "multi"),
    [
        ("a", "a", ["a"]),
        ("a,b", "a,b", ["a", "b"]),
        (" a , b ,", " a , b ,", ["a", "b"]),
        ("", None, []),
        (None, None, None),
        (3, "3", ["3"]),
        (0.5, "0.5", ["0.5"]),
        (True, "true", ["true"]),
        (["a", 2, False], ValueError, ["a", "2", "false"]),
        ([], ValueError, []),
        (["a,b"], ValueError, ["a,b"]),
        (["a", None], ValueError, ValueError),
        (["a", ["b"]], ValueError, ValueError),
        ({"a": 1}, ValueError, ValueError),
        (float("nan"), ValueError, ValueError),
        # Lists as pandas writes them into a cell, in Python and in JSON; and what looks like one.
        ("['a', 'b c']", ValueError, ["a", "b c"]),
        ('["a", "b,c"]', ValueError, ["a", "b,c"]),
        ("[1, 0, 1]", ValueError, ["1", "0", "1"]),
        ("[True, false]", "[True, false]", ValueError),
        ("[True, False]", ValueError, ["true", "false"]),
        (" [] ", ValueError, []),
        ("[POS]", "[POS]", ValueError),
        ("['a' 'b']", "['a' 'b']", ValueError),  # numpy's: Python would join the strings
        ("[0 1 1]", "[0 1 1]", ValueError),
        ("['a'", "['a'", ValueError),
        (float("inf"), ValueError, ValueError),
    ],
)
def test_a_value_as_a_label_and_as_several(value, message, multi):
    for task, expected in ((Task("one"), message), (Task("several", **MULTI), multi)):
        if expected is ValueError:
            with pytest.raises(ValueError, match="holds "):
                label_strings(task, value)
        else:
            assert label_strings(task, value) == expected


def test_what_is_a_number():
    message = ["1", "-1", "01", "1.0", "1e-3", "nan", "inf", "", "a", "--1", "²"]
    assert [is_number(word) for word in message] == [True] * 5 + [False] * 6
    assert [is_whole(word) for word in message] == [True] * 3 + [False] * 8


# --------------------------------------------------------------------------------------------------- names and ids


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "2", "1"], ["1", "2", "10"]),
        (["1", "-1", "0"], ["-1", "0", "1"]),
        (["b10", "b2", "B"], ["B", "b10", "b2"]),
        (["True", "False"], ["False", "True"]),
        (["true", "false"], ["false", "true"]),
        (["nan", "None", "inf"], ["None", "inf", "nan"]),
        (["07", "7", "6"], ["6", "07", "7"]),
    ],
)
def test_the_order_of_labels(tmp_path, labels, order):
    rows = labelled(labels)
    task, splits, _, _ = load_splits(files_task(tmp_path, train=rows, validation=rows))
    assert task.labels == order
    assert [order[number] for number in splits["train"]["label"]] == labels


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
        (["false", "true"], ["true", "false"], [1, 0]),
    ],
)
def test_labels_by_name_and_by_id(tmp_path, names, values, ids):
    rows = labelled(values)
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, validation=rows, task={"labels": names}))
    assert splits["train"]["label"][:] == ids


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("values", "names"), [([1, 0, 1], ["0", "1"]), ([True, False, True], ["false", "true"])])
def test_numbers_and_booleans_are_labels(tmp_path, suffix, values, names):
    task, splits, _, _ = load_splits(
        files_task(tmp_path, suffix=suffix, train=labelled(values), validation=labelled(values))
    )
    assert task.labels == names and splits["train"]["label"][:] == [int(value) for value in values]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["10", "1", "one"], "mixes numbers (10: {0}, line 2) and names (one: {0}, line 4)"),
        (["bad", "a", "7"], "mixes numbers (7: {0}, line 4) and names (bad: {0}, line 2)"),
    ],
)
def test_numbers_among_names_are_told_with_both_places(tmp_path, values, message):
    task = files_task(tmp_path, train=labelled(values))
    error = refusal(task)
    assert message.format(task.files["train"]) in error.reason and "labels: [...]" in error.advice
    task, *_ = load_splits(files_task(tmp_path, train=labelled(values * 9), task={"labels": sorted(values)}))
    assert task.labels == sorted(values)  # by request


@pytest.mark.parametrize("decimal", ["0.5", "1.01", "-2.25", "1e-3"])
def test_decimals_are_refused_with_the_way_to_regression(tmp_path, decimal):
    task = files_task(tmp_path, ("text", "score"), train=[("a", "1"), ("b", decimal)], task={"label": "score"})
    error = refusal(task)
    assert f'line 3: the label column "score" holds decimals such as {decimal}' in error.reason
    assert "label: score, labels: regression, metrics: [pearson, spearmanr]" in error.advice


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", True], "line 1 holds 'a', a string; {0}, line 2 holds True, true or false"),
        ([0, "1"], "line 1 holds 0, a number; {0}, line 2 holds '1', a string"),
        ([1, 0, False], "line 1 holds 1, a number; {0}, line 3 holds False, true or false"),
    ],
)
def test_labels_of_json_of_two_kinds(tmp_path, values, message):
    task = files_task(tmp_path, suffix=".jsonl", train=labelled(values))
    assert message.format(task.files["train"]) in refusal(task).reason


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize(("values", "labels"), [([1.0, 0.0, 1.0], ["0", "1"]), ([5.0, 10.0, 2.0], ["2", "5", "10"])])
def test_whole_numbers_written_as_floats_are_classes(tmp_path, suffix, values, labels, log_lines):
    rows = labelled(values)
    task, splits, _, _ = load_splits(files_task(tmp_path, suffix=suffix, train=rows, validation=rows[:2]))
    assert task.labels == labels
    assert column_array(splits["train"], "label").tolist() == [labels.index(str(int(value))) for value in values]
    assert any("are classes; to predict a number, write `labels: regression`" in line for line in log_lines)


def test_whole_floats_beside_decimals_are_decimals(tmp_path):
    error = refusal(files_task(tmp_path, train=labelled([1.0, 2.0, 2.5])))
    assert "holds decimals such as" in error.reason and "labels: regression" in error.advice


def test_other_spellings_of_a_label_are_that_label():
    ids, known = label_ids(Task("t", labels=["1", "2"]), ["2.0", "1", "2.5", "3.0"])
    assert ids.tolist() == [1, 0, -1, -1] and known.tolist() == [True, True, False, False]
    ids, known = label_ids(Task("t", labels=["false", "true"]), ["True", "FALSE", "true", "yes"])
    assert ids.tolist() == [1, 0, 1, -1] and known.tolist() == [True, True, True, False]
    ids, _ = label_ids(Task("t", labels=["True", "true"]), ["true", "True"])  # two labels stay two
    assert ids.tolist() == [1, 0]


def test_the_place_of_a_decimal_is_that_of_the_very_label(tmp_path):
    error = refusal(files_task(tmp_path, train=labelled(["v1.5", "1.5", "2"])))
    assert "train.csv, line 3: " in error.reason


@pytest.mark.parametrize(
    ("values", "message"),
    [(["x", "x"], 'train.csv: the label column "label" has 1 value(s): x'), (["", ""], "no label")],
)
def test_fewer_than_two_classes_are_refused(tmp_path, values, message):
    assert message in refusal(files_task(tmp_path, train=labelled(values))).reason


def test_labels_cannot_be_found_without_a_train_split(tmp_path):
    assert "no train split" in refusal(files_task(tmp_path, test=AB)).reason


# ----------------------------------------------------------------------------------------------- unknown and missing


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_unknown_label_is_told_with_its_row_and_the_nearest_name(tmp_path, split):
    good = [("a", "positive"), ("b", "negative")]
    tables = {"train": good, "validation": good, "test": good, split: [*good, ("c", "postive"), ("d", "x")]}
    task = files_task(tmp_path, **tables, task={"labels": ["negative", "positive"]})
    error = refusal(task)
    message = 'line 4: column "label" holds \'postive\', no label (did you mean "positive"?) (2 such rows)'
    assert error.reason == f"{split} split, {task.files[split]}, {message}"
    assert "negative, positive" in error.advice and "--on_bad_row skip" in error.advice


@pytest.mark.parametrize("value", ["0", "4", "2"])
def test_a_number_that_is_no_label_of_numbered_classes_is_no_id(tmp_path, value):
    """With the classes 1, 3 and 5 found in train, a 0 or a 2 of another split is a mistake, not the class 1 or 5."""
    task = files_task(tmp_path, train=labelled("135"), validation=[("d", value)])
    assert f"line 2: column \"label\" holds '{value}', no label" in refusal(task).reason


@pytest.mark.parametrize("value", ["2", "-2", "1.0"])
def test_an_id_out_of_range(tmp_path, value):
    task = files_task(tmp_path, train=[("a", "1"), ("b", value)], task={"labels": ["neg", "pos"]})
    assert f"line 3: column \"label\" holds '{value}', no label" in refusal(task).reason


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("value", ["", "-1"])
def test_a_missing_label_is_refused_where_labels_are_needed(tmp_path, split, value):
    tables = {"train": AB, "validation": AB, split: [*AB, ("c", value), ("d", value)]}
    error = refusal(files_task(tmp_path, **tables, task={"labels": ["a", "b"]}))
    assert f'{split}.csv, line 4: column "label" holds no label' in error.reason


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "holds no label"),
        (["a", "b"], "not one label (for several labels per text: `problem: multi_label`)"),
        ({"name": "a"}, "not one label"),
        (float("nan"), "holds nan, not a label"),
    ],
)
def test_a_value_of_json_that_is_no_label(tmp_path, value, message):
    error = refusal(files_task(tmp_path, suffix=".jsonl", train=[*AB, ("three", value)]))
    assert "line 3" in error.reason and message in error.reason


def test_a_test_split_may_lack_labels(tmp_path):
    task = files_task(tmp_path, train=AB, validation=AB, test=[("c", "b"), ("d", ""), ("e", "-1")])
    assert load_splits(task)[1]["test"]["label"][:] == [1, -1, -1]
    put_table(tmp_path, "test.csv", [("c",), ("d",)], ("text",))  # without the column
    test = load_splits(task)[1]["test"]
    assert test["label"][:] == [-1, -1] and test["text"][:] == ["c", "d"]


# --------------------------------------------------------------------------------------------------------- regression


def test_regression_labels_are_floats(tmp_path):
    values = ["0.1", "1e-5", "-3", "4.999999999"]
    tables = {"train": labelled(values), "validation": labelled(["2"]), "test": labelled(["", "1"])}
    task, splits, _, _ = load_splits(files_task(tmp_path, **tables, task=REGRESSION))
    assert splits["train"]["label"][:] == [0.1, 1e-5, -3.0, 4.999999999]
    assert str(splits["train"].features["label"].dtype) == "float64"
    assert np.isnan(splits["test"]["label"][0]) and splits["test"]["label"][1] == 1.0
    assert task.is_regression


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_numbers_of_json_and_parquet_in_regression(tmp_path, suffix):
    values = [0.1, 1e-300, -3.0]
    task = files_task(tmp_path, suffix=suffix, train=labelled(values), validation=labelled([2]), task=REGRESSION)
    assert load_splits(task)[1]["train"]["label"][:] == values


@pytest.mark.parametrize(
    ("value", "message"),
    [("good", "holds 'good', no label"), ("inf", "holds 'inf'"), ("1,5", "holds '1,5'"), ("", "holds no label")],
)
def test_a_regression_label_that_is_no_number(tmp_path, value, message):
    error = refusal(files_task(tmp_path, train=[("a", "1"), ("b", value)], task=REGRESSION))
    assert f'train.csv, line 3: column "label" {message}' in error.reason


def test_minus_one_is_a_number_in_regression_unless_the_whole_test_split_has_it(tmp_path):
    rows = labelled(["-1", "2"])
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, validation=rows[:1], test=rows, task=REGRESSION))
    assert splits["validation"]["label"][:] == [-1.0] and splits["test"]["label"][:] == [-1.0, 2.0]
    unlabelled = labelled(["-1.0", "-1.0"])  # as in GLUE's STS-B
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, validation=rows, test=unlabelled, task=REGRESSION))
    assert np.isnan(splits["test"]["label"][:]).all()


# -------------------------------------------------------------------------------------------------------- multi-label


LISTS = [["b", "a"], [], ["c"], ["a", "a"]]
MATRIX = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]  # columns a, b, c


@pytest.mark.parametrize(
    ("name", "as_lists"), [*((name, False) for name in FORMATS), *((name, True) for name in FORMATS[2:])]
)
def test_several_labels_a_text(tmp_path, name, as_lists):
    rows = labelled(LISTS if as_lists else [", ".join(labels) for labels in LISTS])
    file = put_table(tmp_path, name, rows)
    task, splits, _, bad_rows = load_splits(Task("mine", files={"train": file, "validation": file}, **MULTI))
    assert task.labels == ["a", "b", "c"] and bad_rows == []
    assert with_metrics(task).metrics == ["f1_micro", "f1_macro"]
    for split in ("train", "validation"):
        assert splits[split]["label"][:] == MATRIX
    assert column_array(splits["train"], "label").dtype == np.int8
    assert column_array(splits["train"].select([2, 0]), "label").tolist() == [MATRIX[2], MATRIX[0]]


def test_labels_by_name_and_by_id_and_another_separator(tmp_path):
    rows = labelled(["x|z", "1", "z | 0", ""])
    keys = {**MULTI, "labels": ["z", "y", "x"], "separator": "|"}
    _, splits, _, _ = load_splits(files_task(tmp_path, train=rows, validation=rows, task=keys))
    assert splits["train"]["label"][:] == [[1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_numbers_as_several_labels(tmp_path):
    rows = labelled([[10, 2], 3, [True]])
    task, splits, _, _ = load_splits(files_task(tmp_path, suffix=".jsonl", train=rows, validation=rows[:1], task=MULTI))
    assert task.labels == ["2", "3", "10", "true"]
    assert splits["train"]["label"][:] == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "c", "label": None}, 'column "label" holds no label'),
        ({"text": "c"}, 'no column "label"'),
        ({"text": "c", "label": ["a", None]}, "a list with an empty label"),
        ({"text": "c", "label": {"a": 1}}, "not one label"),
    ],
)
def test_a_row_without_a_list_of_labels(tmp_path, row, message):
    rows = [*({"text": text, "label": [label]} for text, label in AB * 9), row]
    lines = "\n".join(map(json.dumps, rows))
    error = refusal(text_task(tmp_path, lines, "train.jsonl", **MULTI))
    assert "train.jsonl, line 19: " in error.reason and message in error.reason
    _, splits, _, bad_rows = load_splits(text_task(tmp_path, lines, "train.jsonl", **MULTI, on_bad_row="skip"))
    assert [bad_row["row"] for bad_row in bad_rows] == [19] and message in bad_rows[0]["reason"]
    assert sum(map(len, splits.values())) == 18


@pytest.mark.parametrize("unknown", ["d", "-1", "3"])
def test_an_unknown_label_among_several(tmp_path, unknown):
    keys = {**MULTI, "labels": ["a", "b", "c"]}
    tables = {"train": labelled(["a,b", "c"]), "validation": labelled(["a", f"b,{unknown}"])}
    error = refusal(files_task(tmp_path, **tables, task=keys))
    assert f"validation.csv, line 3: column \"label\" holds ['b', '{unknown}'], no label" in error.reason
    assert "a, b, c" in error.advice
    task = files_task(tmp_path, **tables, task={**keys, "on_bad_row": "skip"})
    assert load_splits(task)[1]["validation"]["label"][:] == [[1, 0, 0]]


NAMES = ["toxic", "obscene", "threat"]
HOT = [[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize("form", [list, str, json.dumps, lambda row: ",".join(map(str, row))])
@pytest.mark.parametrize("kind", [int, float, bool])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_0_or_1_for_each_label(tmp_path, suffix, kind, form):
    if form is list and suffix == ".csv":
        pytest.skip("a cell holds a string")
    values = [form([kind(value) for value in row]) for row in HOT]
    task = files_task(
        tmp_path,
        suffix=suffix,
        train=labelled(values),
        validation=labelled(values[:2]),
        task={**MULTI, "labels": NAMES},
    )
    _, splits, _, _ = load_splits(task)
    assert column_array(splits["train"], "label").tolist() == HOT
    assert column_array(splits["validation"], "label").tolist() == HOT[:2]


def test_lists_of_ids_stay_lists_of_ids(tmp_path):
    keys = {**MULTI, "labels": NAMES}
    rows = labelled([[0, 1], [1], [], [2, 0, 1]])
    _, splits, _, _ = load_splits(files_task(tmp_path, suffix=".jsonl", train=rows, validation=rows[:1], task=keys))
    assert column_array(splits["train"], "label").tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("labels", "values", "reason", "advice"),
    [
        (NAMES[:2], [[0, 1], [1, 0]], "or the ids of those that apply", "Write true and false"),
        (None, HOT, "whose names are not known", "labels: [first, second, ...]"),
        (NAMES[:2], HOT, "the task has 2 labels", "as many 0 and 1 as there are labels"),
        (
            NAMES,
            [*HOT, [0, 1]],
            "['0', '1', '1'], no label",
            "toxic, obscene, threat",
        ),  # 0 and 1 in lists of other lengths
    ],
)
def test_0_and_1_that_are_not_one_for_each_label_are_refused(tmp_path, labels, values, reason, advice):
    task = files_task(
        tmp_path,
        suffix=".jsonl",
        train=labelled(values),
        validation=labelled(values[:1]),
        task={**MULTI, "labels": labels},
    )
    error = refusal(task)
    assert reason in error.reason and advice in error.advice


@pytest.mark.parametrize("values", [[[0, 0], [1, 0]], [[True, False], [False, True]], [[0.0, 1.0], [1.0, 0.0]]])
def test_two_labels_are_0_and_1_where_they_cannot_be_ids(tmp_path, values):
    rows = labelled(values)
    keys = {**MULTI, "labels": NAMES[:2]}
    _, splits, _, _ = load_splits(files_task(tmp_path, suffix=".jsonl", train=rows, validation=rows, task=keys))
    assert column_array(splits["train"], "label").tolist() == [[int(value) for value in row] for row in values]


def test_a_test_file_without_labels_in_multi_label(tmp_path):
    task = files_task(tmp_path, train=labelled(["a,b", "c"]), validation=labelled(["a"]), task=MULTI)
    task.files["test"] = put_table(tmp_path, "test.csv", [("c",), ("d",)], ("text",))
    assert load_splits(task)[1]["test"]["label"][:] == [[-1, -1, -1], [-1, -1, -1]]


# ------------------------------------------------------------------------------------------------------------ the Hub


@pytest.mark.parametrize(
    ("labels", "ids", "order"),
    [
        (["negative", "positive"], [1, 0, 0], None),
        (["positive", "negative"], [0, 1, 1], None),
        (None, [1, 0, 0], ["negative", "positive"]),  # the order of the ClassLabel
    ],
)
@pytest.mark.parametrize("names", [["negative", "positive"]])
def test_classes_of_the_hub_are_matched_by_name(hub, labels, ids, order, names):
    hub.update(train=hub_table([1, 0, 0], names), validation=hub_table([0], names), test=hub_table([-1, -1], names))
    task, splits, _, _ = load_splits(hub_task(labels))
    assert splits["train"]["label"][:] == ids and task.labels == (order or labels)
    assert splits["validation"]["label"][:] == [ids[1]]
    assert splits["test"]["label"][:] == [-1, -1]
    assert splits["train"]["row"][:] == [0, 1, 2] and splits["train"]["sentence"][0] == "text 0"


def test_the_order_of_a_class_label_is_that_of_the_labels(hub):
    names = ["world", "sports", "business", "10", "9"]
    hub.update(train=hub_table([1, 0, 2], names), validation=hub_table([4], names))
    for _ in "twice":  # the second time from the cache
        task, splits, _, _ = load_splits(hub_task())
        assert (
            task.labels == names
            and splits["train"]["label"][:] == [1, 0, 2]
            and splits["validation"]["label"][:] == [4]
        )


def test_plain_numbers_of_the_hub(hub):
    hub.update(train=hub_table([0, 1, 1]), validation=hub_table([1, 0]), test=hub_table([-1]))
    _, splits, _, _ = load_splits(hub_task(["no", "yes"]))
    assert splits["train"]["label"][:] == [0, 1, 1] and splits["test"]["label"][:] == [-1]


def test_regression_on_the_hub_and_its_unlabelled_test_split(hub):
    values, kind = [0.5, 4.75, -1.0], datasets.Value("float64")
    hub.update(train=hub_table(values, feature=kind), validation=hub_table([1.0], feature=kind))
    hub["test"] = hub_table([-1.0, -1.0], feature=kind)
    _, splits, _, _ = load_splits(hub_task("regression"))
    assert splits["train"]["label"][:] == values
    assert np.isnan(splits["test"]["label"][:]).all()


@pytest.mark.parametrize(("labels", "row"), [(None, [1, 1, 0]), (["z", "y", "x"], [0, 1, 1])])
def test_lists_of_class_labels_of_the_hub(hub, labels, row):
    lists = datasets.List(datasets.ClassLabel(names=["x", "y", "z"]))
    hub.update(train=hub_table([[0, 1], []], feature=lists), validation=hub_table([[1]], feature=lists))
    task, splits, _, _ = load_splits(hub_task(labels, **MULTI))
    assert task.labels == (labels or ["x", "y", "z"])
    assert splits["train"]["label"][:] == [row, [0, 0, 0]] and splits["validation"]["label"][:] == [[0, 1, 0]]


def test_names_that_the_task_does_not_have(hub):
    """Told, not left out, though a missing label stands before them."""
    names = ["ham", "spam"]
    hub.update(train=hub_table([-1, 0, 1], names), validation=hub_table([1], names))
    message = 'train split, some/data, row 2: column "label" holds \'spam\', no label (did you mean "spain"?)'
    assert message in refusal(hub_task(["ham", "spain"])).reason


@pytest.mark.parametrize(
    ("feature", "labels"),
    [(datasets.Value("float64"), [1.0, float("nan")]), (datasets.List(datasets.Value("string")), [["a"], ["b"]])],
    ids=["nan", "lists"],
)
def test_values_of_the_hub_that_are_no_label(hub, feature, labels):
    hub.update(train=hub_table(labels, feature=feature), validation=hub_table(labels[:1], feature=feature))
    error = refusal(hub_task("regression" if labels[0] == 1.0 else ["a", "b"]))
    assert "some/data, row " in error.reason and 'column "label" holds' in error.reason


@pytest.mark.parametrize("split", ["train", "validation"])
def test_missing_labels_of_the_hub_are_left_out_and_counted(hub, split, caplog):
    names = ["no", "yes"]
    hub.update(train=hub_table([0, 1, 1], names), validation=hub_table([1, 0], names))
    hub[split] = hub_table([0, -1, None, 1], names)
    with caplog.at_level(logging.WARNING):
        _, splits, _, bad_rows = load_splits(hub_task())
    assert splits[split]["row"][:] == [0, 3] and splits[split]["label"][:] == [0, 1] and bad_rows == []
    (message,) = [record.getMessage() for record in caplog.records if "no label" in record.getMessage()]
    assert message == f"WARNING: some/data: 2 of 4 rows of {split} have no label and are skipped"


def test_label_ids_of_strings():
    ids, known = label_ids(Task("t", labels=["a", "b"]), ["b", "0", None, "-1", "c"])
    assert ids.tolist() == [1, 0, -1, -1, -1] and known.tolist() == [True, True, True, True, False]
    numbers, known = label_ids(Task("t", **REGRESSION), ["1", "x", None])
    assert numbers[0] == 1 and np.isnan(numbers[1:]).all() and known.tolist() == [True, False, True]


# ------------------------------------------------------------------------------------------- a column for each label

COLUMNS = {"text": ["text"], "label": ["toxic", "obscene"], "labels": ["toxic", "obscene"], **MULTI}
HEADER = ("text", "toxic", "obscene")


def columns_task(folder, rows, suffix=".csv", **keys):
    train = [(f"text {number}", *row) for number, row in enumerate(rows)]
    return files_task(
        folder, header=HEADER, suffix=suffix, task={**COLUMNS, "split": {"validation": [0, 1]}, **keys}, train=train
    )


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("no, yes", [(0, 1), (0.0, 1.0), (False, True), ("0", "1"), ("0.0", "1.0"), ("False", "true")])
def test_a_column_for_each_label_holds_0_and_1_however_they_are_written(tmp_path, suffix, no, yes):
    task = columns_task(tmp_path, [(no, no), (yes, no), (no, no), (yes, yes), (no, yes)], suffix)
    _, splits, _, _ = load_splits(task)
    assert column_array(splits["train"], "label").tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]


@pytest.mark.parametrize("value, found", [(0.6, "0.6"), (2, "2"), ("yes", "'yes'"), ("", "nothing")])
def test_another_value_in_the_column_of_a_label_is_a_bad_row(tmp_path, value, found):
    rows = [(0, 1), (1, 0), (1, value), (0, 0)]
    error = refusal(columns_task(tmp_path, rows, ".jsonl"))
    assert f'line 3: column "obscene" holds {found}, not 0 or 1' in error.reason
    _, splits, _, bad_rows = load_splits(columns_task(tmp_path, rows, ".jsonl", on_bad_row="skip"))
    assert len(splits["train"]) == 2 and [row["row"] for row in bad_rows] == [3]


def test_rows_of_a_test_split_without_labels_can_be_predicted(tmp_path):
    rows, unlabelled = [("a", 0, 1), ("b", 1, 0), ("c", 1, 1)], [("d", -1, -1), ("e", -1, -1)]
    _, splits, _, _ = load_splits(files_task(tmp_path, HEADER, task=COLUMNS, train=rows, test=unlabelled))
    assert column_array(splits["test"], "label").tolist() == [[-1, -1], [-1, -1]]
    error = refusal(files_task(tmp_path, HEADER, task=COLUMNS, train=[*rows, *unlabelled]))
    assert 'train.csv, line 5: column "toxic" holds no label' in error.reason


def test_a_missing_column_of_a_label_is_named(tmp_path):
    task = files_task(tmp_path, header=("text", "toxic", "obscen"), task=COLUMNS, train=[("a", 0, 1), ("b", 1, 0)])
    error = refusal(task)
    assert 'no column "obscene" (did you mean' in error.reason and "--label_columns" in error.advice


def test_columns_of_labels_on_the_hub(empty_cache, monkeypatch):
    hub = FakeHub(monkeypatch)
    hub["train"] = hub_table([1, 0, 1, 0], second=[0, 0, 1, 1])
    hub["validation"] = hub_table([1, 0], second=[0, 1])
    _, splits, _, _ = load_splits(hub_task(["first", "other"], label=["label", "second"], **MULTI))
    assert column_array(splits["train"], "label").tolist() == [[1, 0], [0, 0], [1, 1], [0, 1]]


# ---------------------------------------------------------------------------------------------------------- weights


ABC = Task("abc", labels=["a", "b", "c"])


def test_balanced_weights_are_inverse_to_the_frequencies():
    weights = weights_of_classes("balanced", ABC, np.array([0, 0, 0, 1]))  # nobody has class 2
    assert weights[:2].tolist() == pytest.approx([4 / (2 * 3), 4 / 2])
    assert weights[[0, 0, 0, 1]].mean() == pytest.approx(1)


def test_weights_of_classes_by_name_have_a_mean_of_one():
    first, last = ABC.labels[0], ABC.labels[-1]
    labels = np.array([0, 0, 1, 2])
    weights = weights_of_classes(f"{first}=3,{last}=0.5", ABC, labels)
    assert weights.tolist() == pytest.approx([3 / 1.875, 1 / 1.875, 0.5 / 1.875])  # (3 + 3 + 1 + 0.5) / 4 = 1.875
    assert weights_of_classes("none", ABC, labels) is None


@pytest.mark.parametrize("words", ["nobody=1", "1", "{}=0", "{}=-1", "{}=many", "{}=inf", "{}=1,", "balance"])
def test_weights_that_cannot_be_read_are_refused(words):
    with pytest.raises(BadInput, match=r"--class_weights .*: not a label of this task and a number above 0"):
        weights_of_classes(words.format(ABC.labels[0]), ABC, np.array([0, 1, 2]))


def test_weights_of_several_labels_are_negatives_to_positives():
    task = Task("abc", labels=["a", "b", "c"], problem="multi_label")
    labels = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 0]])
    assert weights_of_classes("balanced", task, labels).tolist() == [3, 0.25, 3]
    assert weights_of_classes("b=5", task, labels).tolist() == [1, 5, 1]
