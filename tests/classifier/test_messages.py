"""Messages: errors of two lines that quote anything, places of rows, and numbers as text."""

import io
import logging

import pytest

from classifier.messages import (
    BadInput,
    BadRow,
    Preempted,
    format_duration,
    format_score,
    format_scores,
    in_red,
    list_names,
    location,
    log,
    nearest,
)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\u2028", "\x0b"])
def test_a_message_that_quotes_line_breaks_is_two_lines(end):
    error = BadInput(f"a library says{end}   many things{end}", f"do{end}this")
    assert (error.reason, error.advice) == ("a library says many things", "do this")
    assert str(error) == "a library says many things\ndo this"
    assert BadInput("blanks  within a value stay", "x").reason == "blanks  within a value stay"


def test_a_message_can_always_be_written_as_utf_8():
    error = BadRow("a.csv", 3, "holds 中 \ud800")
    assert str(error).encode("utf-8").decode().startswith("a.csv, line 3: holds 中 \\ud800\n")
    assert error.problem == "holds 中 \\ud800"


def test_a_bad_row_has_advice_for_where_rows_can_be_skipped_and_where_they_cannot():
    error = BadRow("a.jsonl.gz", 7, "is not JSON", "Put one complete object on the line")
    assert error.reason == "a.jsonl.gz, line 7: is not JSON" and error.line == 7
    assert error.advice == "Put one complete object on the line, or skip such rows: --on_bad_row skip."
    assert error.fix == "Put one complete object on the line."
    assert BadRow("a.csv", 7, "x").advice == "Fix this row, or skip such rows: --on_bad_row skip."
    assert isinstance(error, BadInput) and not isinstance(Preempted(), Exception)


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.csv", "a.csv, line 2"), ("a.jsonl.gz", "a.jsonl.gz, line 2"), ("standard input", "standard input, line 2")]
    + [(path, f"{path}, record 2") for path in ("a.json", "A.JSON.gz", "a.zip::b.parquet")],
)
def test_a_row_has_a_line_or_a_record(path, expected):
    assert location(path, 2) == expected


def test_nearest():
    assert nearest("lable", ["text", "label"]) == ' (did you mean "label"?)'
    assert nearest("xyz", ["text", "label"]) == ""
    assert nearest(False, ["text"]) == ""  # YAML's `no`


@pytest.mark.parametrize("is_terminal", [True, False])
def test_red_is_for_terminals(monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(stream)])
    assert in_red("bad") == ("\x1b[1;31mbad\x1b[0m" if is_terminal else "bad")
    monkeypatch.setattr(log, "handlers", [])
    assert in_red("bad") == "bad"


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90000, "25:00:00")]
)
def test_time_is_h_mm_ss(seconds, expected):
    assert format_duration(seconds) == expected


def test_scores_have_four_decimals():
    assert format_score(None) == "undefined" and format_score(2 / 3) == "0.6667"
    assert format_scores({"f1": 0.81234, "accuracy": None}) == "f1 0.8123, accuracy undefined"


def test_names_are_listed_on_one_line_and_not_all_of_them():
    names = [f"class {number}" for number in range(300)]
    assert list_names(names[:10]) == ", ".join(names[:10])
    assert list_names(names) == ", ".join(names[:10]) + " and 290 more"
    assert list_names(iter(["one"])) == "one" and list_names([]) == ""
    assert list_names(["\u202ea\ud800", "👩\u200d👧"]) == "\\u202ea\\ud800, 👩\u200d👧"
    odd = ["a\nb", "c\td\x1b[31m", "e\u2028f", "x" * 300, "房間 👍🏽 é|<b>", 7]
    assert list_names(odd) == ("a\\nb, c\\td\\x1b[31m, e\\u2028f, " + "x" * 37 + "..., 房間 👍🏽 é|<b>, 7")
