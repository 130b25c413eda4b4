"""The writer: tables of predictions in each format, complete or absent."""

import csv
import datetime
import decimal
import errno
import gzip
import json
import uuid

import pandas
import pyarrow
import pytest
from pyarrow import parquet

from classifier.data import writer
from classifier.data.reader import read_rows
from classifier.files import CannotWrite
from classifier.messages import BadInput

ROWS = [
    {"id": "007", "text": 'he said "no", twice\nand left', "probability": 0.1},
    {"id": "1e5", "text": "房間 é", "probability": 1 / 3},
]


def write(path, rows=ROWS):
    with writer.open_writer(path) as write_row:
        for row in rows:
            write_row(row)


def test_csv_and_json_lines_are_read_back_by_pythons_own(tmp_path):
    write(tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [{key: str(value) for key, value in row.items()} for row in ROWS]
    write(tmp_path / "out.jsonl.gz")
    with gzip.open(tmp_path / "out.jsonl.gz", "rt", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == ROWS
    assert {file.name for file in tmp_path.iterdir()} == {"out.csv", "out.jsonl.gz"}


def test_tsv_has_no_quotes_and_no_line_breaks(tmp_path):
    write(tmp_path / "out.tsv", ROWS[1:])
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8") == f"id\ttext\tprobability\n1e5\t房間 é\t{1 / 3}\n"
    for text in ("a\tb", "a\nb", "a\rb"):
        with pytest.raises(BadInput, match="tab or a line break"):
            write(tmp_path / "bad.tsv", [{"text": text}])
    assert not (tmp_path / "bad.tsv").exists()


HOUR = datetime.timedelta(hours=1)
TYPED = {  # name: (value, in JSON lines, in a cell)
    "date": (datetime.date(2026, 1, 31), "2026-01-31", "2026-01-31"),
    "local": (datetime.datetime(2026, 1, 31, 9, 5, 7), "2026-01-31T09:05:07", "2026-01-31T09:05:07"),
    "zoned": (
        datetime.datetime(2026, 1, 31, 9, 5, 7, 250_000, datetime.timezone(HOUR)),
        "2026-01-31T09:05:07.250000+01:00",
        "2026-01-31T09:05:07.250000+01:00",
    ),
    "time": (datetime.time(9, 5), "09:05:00", "09:05:00"),
    "duration": (datetime.timedelta(days=1, hours=2, minutes=3, seconds=4.5), "P1DT2H3M4.5S", "P1DT2H3M4.5S"),
    "days": (datetime.timedelta(days=3), "P3DT0H0M0S", "P3DT0H0M0S"),
    "none": (datetime.timedelta(), "P0DT0H0M0S", "P0DT0H0M0S"),
    "back": (-datetime.timedelta(seconds=90), "P-1DT23H58M30S", "P-1DT23H58M30S"),
    "short": (datetime.timedelta(microseconds=1500), "P0DT0H0M0.0015S", "P0DT0H0M0.0015S"),
    "price": (decimal.Decimal("1234567890123456789.10"), "1234567890123456789.10", "1234567890123456789.10"),
    "tiny": (decimal.Decimal("1E-9"), "0.000000001", "0.000000001"),
    "uuid": (uuid.UUID(int=5), str(uuid.UUID(int=5)), "00000000-0000-0000-0000-000000000005"),
    "bytes": (b"\x00\xffab", "AP9hYg==", "AP9hYg=="),
    "list": (["a", None, "é"], ["a", None, "é"], '["a", null, "é"]'),
    "struct": (
        {"day": datetime.date(2026, 1, 31), "raw": [b"ab"]},
        {"day": "2026-01-31", "raw": ["YWI="]},
        '{"day": "2026-01-31", "raw": ["YWI="]}',
    ),
    "empty": (None, None, ""),
    "nan": (float("nan"), None, "nan"),
    "infinite": (float("inf"), None, "inf"),
    "number": (1.5, 1.5, "1.5"),
    "whole": (3, 3, "3"),
    "flag": (True, True, "True"),
}


@pytest.mark.parametrize("name", TYPED)
def test_a_typed_value_is_written_as_text_that_others_read(tmp_path, name):
    value, in_json, in_cell = TYPED[name]
    rows = [{"id": 1, "value": value}, {"id": 2, "value": None}]
    write(tmp_path / "out.jsonl", rows)
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"id": 1, "value": in_json},
        {"id": 2, "value": None},
    ]
    write(tmp_path / "out.csv", rows)
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["id", "value"], ["1", in_cell], ["2", ""]]
    write(tmp_path / "out.tsv", rows)
    assert (tmp_path / "out.tsv").read_text(encoding="utf-8") == f"id\tvalue\n1\t{in_cell}\n2\t\n"


def test_typed_values_stay_what_they_are_in_parquet(tmp_path):
    names = [name for name in TYPED if name not in ("nan", "empty")]
    rows = [{name: TYPED[name][0] for name in names}]
    write(tmp_path / "out.parquet", rows)
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows


LATER = {  # name: (type, value): columns whose first values are all missing
    "whole": (pyarrow.int32(), 3),
    "large": (pyarrow.uint64(), 2**64 - 1),
    "number": (pyarrow.float32(), 0.5),
    "text": (pyarrow.large_string(), "é"),
    "category": (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), "é"),
    "zoned": (pyarrow.timestamp("ms", "Europe/Berlin"), datetime.datetime(2026, 1, 31, tzinfo=datetime.UTC)),
    "exact": (pyarrow.timestamp("ns"), pandas.Timestamp("2026-01-31 09:05:07.123456789")),
    "time": (pyarrow.time32("ms"), datetime.time(9, 5)),
    "duration": (pyarrow.duration("ns"), pandas.Timedelta(-1001, "ns")),
    "price": (pyarrow.decimal128(12, 3), decimal.Decimal("123456789.120")),
    "bytes": (pyarrow.binary(2), b"\x00\xff"),
    "map": (pyarrow.map_(pyarrow.string(), pyarrow.int16()), [("a", 1)]),
}


@pytest.mark.parametrize("name", LATER)
def test_parquet_keeps_the_types_of_its_source_also_where_a_column_begins_empty(tmp_path, monkeypatch, name):
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", 2)
    kind, value = LATER[name]
    source = pyarrow.table({"value": pyarrow.array([None, None, None, value, None], kind)})
    parquet.write_table(source, tmp_path / "in.parquet")
    with writer.open_writer(tmp_path / "out.parquet", tmp_path / "in.parquet") as write_row:
        for _, row in read_rows(tmp_path / "in.parquet"):
            write_row({**row, "probability": 0.5})
    found = parquet.read_table(tmp_path / "out.parquet")
    assert found.column_names == ["value", "probability"] and found["probability"].to_pylist() == [0.5] * 5
    assert found["value"].type == kind and found["value"].to_pylist() == source["value"].to_pylist()


def test_categories_are_kept_without_an_order_that_the_rows_do_not_have(tmp_path):
    words = [f"{number:03}" for number in range(199, -1, -1)]  # more than int8 has indices
    kind = pyarrow.dictionary(pyarrow.int8(), pyarrow.string(), ordered=True)
    with parquet.ParquetWriter(tmp_path / "in.parquet", pyarrow.schema([("word", kind)])) as file:
        for half in (words[:100], words[100:]):
            file.write_table(pyarrow.table({"word": pyarrow.array(half, kind)}))
    with writer.open_writer(tmp_path / "out.parquet", tmp_path / "in.parquet") as write_row:
        for _, row in read_rows(tmp_path / "in.parquet"):
            write_row(row)
    found = parquet.read_table(tmp_path / "out.parquet")["word"]
    assert found.to_pylist() == words and found.type == pyarrow.dictionary(pyarrow.int32(), pyarrow.string())


def test_decimals_may_grow_and_a_number_beyond_the_range_of_parquet_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", 1)
    prices = [decimal.Decimal("1.20"), decimal.Decimal("123.20")]
    parquet.write_table(pyarrow.table({"p": pyarrow.array(prices, pyarrow.decimal128(8, 2))}), tmp_path / "in.parquet")
    with writer.open_writer(tmp_path / "out.parquet", tmp_path / "in.parquet") as write_row:
        for _, row in read_rows(tmp_path / "in.parquet"):
            write_row(row)
    assert parquet.read_table(tmp_path / "out.parquet") == parquet.read_table(tmp_path / "in.parquet")
    with pytest.raises(BadInput, match="beyond its range"):
        write(tmp_path / "large.parquet", [{"id": 2**70}])
    assert {file.name for file in tmp_path.iterdir()} == {"in.parquet", "out.parquet"}


@pytest.mark.parametrize("number", [1, 3, 4])  # of rows, three to a group
def test_parquet_keeps_types_and_nothing(tmp_path, monkeypatch, number):
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", 3)
    rows = [{"id": row, "text": None if row == 1 else "a", "list": [row]} for row in range(number)]
    write(tmp_path / "out.parquet", rows)
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows


def test_a_column_of_two_types_cannot_be_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "ROWS_PER_GROUP", 2)
    with pytest.raises(BadInput, match="more than one type") as refusal:
        write(tmp_path / "out.parquet", [{"id": 1}, {"id": 2}, {"id": "three"}])
    assert ".jsonl" in refusal.value.advice
    assert list(tmp_path.iterdir()) == []


def test_rows_with_other_columns_are_for_json_lines(tmp_path):
    rows = [{"a": 1, "b": 2}, {"b": 4, "a": 3}, {"a": 5}]
    with pytest.raises(BadInput, match="different columns"):
        write(tmp_path / "out.csv", rows)
    write(tmp_path / "out.jsonl", rows)
    write(tmp_path / "two.csv", rows[:2])
    assert (tmp_path / "two.csv").read_text() == "a,b\n1,2\n3,4\n"
    assert {file.name for file in tmp_path.iterdir()} == {"out.jsonl", "two.csv"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyError("any")])
def test_an_error_leaves_the_file_that_was_there(tmp_path, error):
    (tmp_path / "out.csv").write_text("before")
    raised = pytest.raises(CannotWrite if isinstance(error, OSError) else KeyError)
    with raised, writer.open_writer(tmp_path / "out.csv") as write_row:
        write_row(ROWS[0])
        raise error
    assert [file.read_text() for file in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("out.json", "format"), ("out.parquet.gz", "format"), ("out", "format"), ("no/out.csv", "no such folder")],
)
def test_a_name_that_cannot_be_written_is_refused_at_once(tmp_path, name, message):
    with pytest.raises(BadInput, match=message):
        writer.check_output_file(tmp_path / name)


def test_lists_may_have_two_columns_of_one_name_and_an_error_leaves_nothing(tmp_path):
    writer.write_csv(tmp_path / "out.csv", ["a", "a"], [[1, "x\ry"], [2, 'z "']])
    assert (tmp_path / "out.csv").read_bytes() == b'a,a\n"1","x\ry"\n2,"z """\n'
    with pytest.raises(ZeroDivisionError):
        writer.write_csv(tmp_path / "out.csv", ["a"], ([1 / number] for number in (1, 0)))
    assert (tmp_path / "out.csv").read_bytes().startswith(b"a,a") and len(list(tmp_path.iterdir())) == 1
