"""Facts about data on small tables, by hand."""

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import bert_config, write_table
from datasets import Dataset

from classifier.data import facts
from classifier.data.facts import log_data_facts
from classifier.data.splits import load_splits
from classifier.data.tasks import Task
from classifier.model import tokenization
from classifier.model.models import load_model
from classifier.training.batching import padding_fraction

TASK = Task(name="", text=["text"], labels=["no", "yes"])
MANY = Task(name="", text=["text"], labels=["a", "b", "c"], problem="multi_label")
NUMBER = Task(name="", text=["text"], labels="regression")


def rows_of(*pairs):
    """Rows of (hash, label): a hash is written as one or two characters, and filled up to 16 bytes."""
    hashes = [(text.encode() * 16)[:16] if isinstance(text, str) else text for text, _ in pairs]
    return Dataset.from_dict({"hash": hashes, "label": [label for _, label in pairs]})


# ------------------------------------------------------------------------------------------------- a table, by hand


@pytest.fixture
def table(tmp_path, vocabulary):
    """Task, splits, tokenised splits and tokenizer of two files of a few rows, cut to 6 tokens."""
    write_table(
        tmp_path / "train.csv",
        [
            ("the room was good .", "yes"),  # 5 tokens and 2 special ones, 19 characters
            ("the film was bad", "no"),  # 4, 16
            ("the room was good .", "no"),  # 5, 19; with another label
            ("zzz the", "yes"),  # 2, one of them unknown, 7
        ],
    )
    write_table(tmp_path / "validation.csv", [("fine", "yes"), ("zzz the", "yes"), ("the film was bad", "no")])
    files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "validation")}
    task = Task(name="", text=["text"], labels=["no", "yes"], files=files, max_length=6)
    task, splits, fingerprints, _ = load_splits(task)
    model, tokenizer, _ = load_model(bert_config(vocabulary), task)
    task, examples = tokenization.tokenize_splits(task, splits, fingerprints, model, tokenizer)
    return task, splits, examples


def test_facts_of_a_table(table):
    task, splits, examples = table
    data = facts.data_facts(task, splits, examples, special_tokens=2, padding=0.25)
    assert data["splits"]["train"] == {
        "rows": 4,
        "labels": {"no": 2, "yes": 2},
        "tokens": {"median": 6.5, "p95": 7.0, "longest": 7},  # of 4, 6, 7 and 7: before the cut
        "truncated": 0.5,
        "unknown": 1 / 16,
        "tokens_per_character": 16 / 61,
        "conflicts": {"texts": 1, "position": 2},
    }
    assert data["splits"]["validation"] == {
        "rows": 3,
        "labels": {"no": 1, "yes": 2},
        "tokens": {"median": 4.0, "p95": pytest.approx(5.8), "longest": 6},  # of 3, 4 and 6
        "truncated": 0.0,
        "unknown": 1 / 7,
        "tokens_per_character": 7 / 27,
        "conflicts": {"texts": 0, "position": None},
    }
    assert data["duplicates"] == {"validation": {"rows": 2, "share": 2 / 3, "position": 1}}
    assert data["label_variants"] == [] and data["padding"] == 0.25


@pytest.mark.parametrize(
    ("micro_batch_size", "is_packed", "expected"), [(2, False, 1 - 22 / 24), (1, False, 0), (2, True, 0)]
)
def test_padding_and_warnings_are_logged(table, log_lines, micro_batch_size, is_packed, expected):
    """Lengths after the cut: 6 6 6 4. The batches: 12 tokens in 2 x 6, and 10 in 2 x 6."""
    task, splits, examples = table
    batches = [np.array([0, 1]), np.array([3, 2])]
    tokenizer = type("Tokenizer", (), {"num_special_tokens_to_add": lambda self, pair: 2})()
    packer = type("Packer", (), {"is_packed": is_packed})
    padding = padding_fraction(examples["train"], batches, Accelerator(), micro_batch_size, packer)
    data = log_data_facts(task, splits, examples, tokenizer, padding)
    assert padding == pytest.approx(expected) and data == facts.data_facts(task, splits, examples, 2, padding)
    assert ("padding: 8.3% of what a step computes" in log_lines) == (expected > 0)
    train = "train: 4 rows | labels: no 2 (50.0%), yes 2 (50.0%) | tokens: median 6, 95 % up to 7, longest 7; "
    assert f"{train}50.0% of texts truncated, 6.25% of tokens unknown, 0.26 tokens per character" in log_lines
    for warning in (
        "6.2% of the tokens are unknown to the tokenizer: is this the right model?",
        "train: 1 texts occur with different labels, such as 'the room was good .'",
        "2 of 3 rows of validation (66.7%) are in train too, which inflates its scores; such as 'zzz the'",
    ):
        assert f"WARNING: {warning}" in log_lines
    assert any("few-shot methods" in line and "no (2), yes (2)" in line for line in log_lines)


# ------------------------------------------------------------------------------------------------------------ labels


def test_labels_are_counted_by_name():
    assert facts.label_counts(TASK, np.array([1, 1, 0, -1])) == {"no": 1, "yes": 2}
    assert facts.label_counts(MANY, np.array([[1, 0, 0], [1, 1, 0], [-1, -1, -1]])) == {"a": 2, "b": 1, "c": 0}
    assert facts.label_counts(NUMBER, np.array([1.0, np.nan, 4.0, 2.5])) == {"min": 1.0, "mean": 2.5, "max": 4.0}
    assert facts.label_counts(NUMBER, np.array([np.nan])) == {}


def test_label_variants_differ_in_case_and_blanks_alone():
    labels = ["Positive", "negative", "positive ", "POSITIVE", "two  words", "two words", "twowords"]
    variants = facts.label_variants(Task(name="", labels=labels))
    assert variants == [["Positive", "positive ", "POSITIVE"], ["two  words", "two words"]]
    assert facts.label_variants(TASK) == facts.label_variants(NUMBER) == []


def test_warnings_of_many_classes_name_the_smallest_and_lines_the_largest():
    names = [f"class {number}" for number in range(30)]
    task = Task(name="", labels=names)
    warning = facts.small_classes_warning(task, dict(zip(names, range(30, 0, -1), strict=True)))
    assert "in train: class 29 (1), class 28 (2)," in warning and "class 20 (10) and 5 more;" in warning
    assert list(facts.largest_first({"a": 1, "b": 2})) == ["a", "b"]  # all are listed: in their order
    largest = facts.largest_first({name: number for number, name in enumerate(names)})
    assert list(largest)[:2] == ["class 29", "class 28"]


# -------------------------------------------------------------------------------------------- the same text, twice


def test_texts_with_different_labels():
    assert facts.conflicts(rows_of(("a", 0), ("b", 1), ("c", 0))) == {"texts": 0, "position": None}
    assert facts.conflicts(rows_of(("a", 0), ("b", 1), ("a", 0))) == {"texts": 0, "position": None}  # the same label
    assert facts.conflicts(rows_of(("a", 0), ("b", 1), ("a", 1))) == {"texts": 1, "position": 2}
    for labels in ((0, 1, 0), (0, 0, 1), (0, 1, 2)):  # three copies are one text
        result = facts.conflicts(rows_of(*(("a", label) for label in labels), ("b", 7)))
        assert result["texts"] == 1 and result["position"] in (1, 2)
    two = rows_of(("b", 0), ("a", 1), ("b", 1), ("a", 0), ("c", 3))
    assert facts.conflicts(two)["texts"] == 2 and facts.conflicts(two)["position"] in (2, 3)
    assert facts.conflicts(rows_of(("a", 0.5), ("a", 0.25)))["texts"] == 1
    assert facts.conflicts(rows_of(("a", [1, 0]), ("a", [1, 0]), ("b", [0, 0])))["texts"] == 0
    assert facts.conflicts(rows_of(("a", [1, 0]), ("a", [1, 1]), ("b", [0, 0])))["texts"] == 1


def test_rows_that_are_in_train_too():
    train = rows_of(("a", 0), ("b", 1), ("b", 1))
    assert facts.duplicates(train, rows_of(("c", 0), ("d", 0))) == {"rows": 0, "share": 0.0, "position": None}
    other = rows_of(("c", 0), ("b", 0), ("a", 1), ("b", 1))  # each row counts, whatever its label
    assert facts.duplicates(train, other) == {"rows": 3, "share": 0.75, "position": 1}


def test_a_collision_of_half_a_hash_is_none():
    half = b"12345678"
    first, second, third = half + b"aaaaaaaa", half + b"bbbbbbbb", half + b"cccccccc"
    both = rows_of((first, 0), (second, 1))
    assert facts.conflicts(both) == {"texts": 0, "position": None}
    assert facts.duplicates(both, rows_of((third, 0)))["rows"] == 0
    assert facts.duplicates(both, rows_of((third, 0), (second, 0), (first, 0)))["rows"] == 2  # and none is overlooked
    assert facts.conflicts(rows_of((first, 0), (second, 1), (second, 0), (first, 1)))["texts"] == 2


@pytest.mark.parametrize("byte", range(16))
def test_hashes_that_differ_in_one_bit_are_two_texts(byte):
    first = b"abcdefghijklmnop"
    second = first[:byte] + bytes([first[byte] ^ 1]) + first[byte + 1 :]
    assert facts.conflicts(rows_of((first, 0), (second, 1)))["texts"] == 0
    assert facts.duplicates(rows_of((first, 0)), rows_of((second, 0)))["rows"] == 0


def test_rows_that_were_drawn_are_compared_not_those_of_the_file():
    train = rows_of(("a", 0), ("b", 1), ("a", 1)).select([1, 2])
    assert facts.conflicts(train) == {"texts": 0, "position": None}
    assert facts.duplicates(train, rows_of(("a", 0), ("b", 0), ("c", 0)).select([2, 1]))["position"] == 1


def test_hashes_tell_a_pair_from_its_texts_in_one(tmp_path):
    """The texts of load_splits: `a b` with `c` is not `a` with `b c`, and no blank is lost."""
    pairs = [("a b", "c"), ("a", "b c"), ("a b ", "c"), ("a b", "c")]
    file = write_table(
        tmp_path / "t.csv", [(*pair, str(i % 2)) for i, pair in enumerate(pairs * 6)], ("x", "y", "label")
    )
    task = Task(name="", text=["x", "y"], files={"train": str(file), "validation": str(file)}, labels=["0", "1"])
    _, splits, _, _ = load_splits(task)
    assert len(set(splits["train"]["hash"])) == 3 and {len(hash) for hash in splits["train"]["hash"]} == {16}
    assert facts.conflicts(splits["train"])["texts"] == 1


# ---------------------------------------------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["这家酒店很好。"], True),
        (["这家 hotel 很好,下次还来"], True),
        (["the room was good", "the hotel 好"], False),
        (["部屋はとてもきれいでした"], False),  # Japanese is mostly kana
        (["123 !?"], False),
        ([], False),
    ],
)
def test_is_chinese(texts, expected):
    assert facts.is_chinese(texts) == expected
