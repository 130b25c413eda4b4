"""reader.py against Python's csv, json and gzip, and tables written by hand, byte by byte."""

import csv
import gzip
import io
import json
import random
import zlib

import pytest

from reader import BadInput, nearest, read_rows, table_format

WORDS_THAT_LOOK_LIKE_VALUES = ["None", "NA", "null", "nan", "00456", "1e5", "True", "-0", "", " padded ", "1_000"]


def put(path, content):
    """Write text (as UTF-8) or bytes, compressed where the name ends in .gz; return the path."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def refusal(path):
    """The BadInput of reading a file, after a check of its form: one line that names the file, one of advice."""
    with pytest.raises(BadInput) as caught:
        list(read_rows(path))
    assert str(path) in caught.value.reason
    assert "\n" not in caught.value.reason and caught.value.advice
    assert str(caught.value) == f"{caught.value.reason}\n{caught.value.advice}"
    return caught.value


# ------------------------------------------------------------------------------------------------------ what is read


def test_csv_is_quoted_and_a_record_has_the_line_where_it_starts(tmp_path):
    file = put(
        tmp_path / "a.csv",
        'text,label\n"one, two",a\n"first\nsecond\n\nfourth",b\n"she said ""no""",c\n""", ""\n""",d\nplain,e\n',
    )
    assert list(read_rows(file)) == [
        (2, {"text": "one, two", "label": "a"}),
        (3, {"text": "first\nsecond\n\nfourth", "label": "b"}),
        (7, {"text": 'she said "no"', "label": "c"}),
        (8, {"text": '", "\n"', "label": "d"}),
        (10, {"text": "plain", "label": "e"}),
    ]


def test_tsv_is_unquoted(tmp_path):
    file = put(tmp_path / "a.tsv", 'text\tlabel\n"an open quote\ta\n5" by 3"\tb\n"whole"\tc\na "" b, c\td\n')
    assert list(read_rows(file)) == [
        (2, {"text": '"an open quote', "label": "a"}),
        (3, {"text": '5" by 3"', "label": "b"}),
        (4, {"text": '"whole"', "label": "c"}),
        (5, {"text": 'a "" b, c', "label": "d"}),
    ]


def test_jsonl_values_are_what_json_makes_of_them(tmp_path):
    file = put(
        tmp_path / "a.jsonl", '\n{"text": "a\\nb", "label": 1}\n\n   \n{"label": null, "text": "\\u4e2d 00456"}\n'
    )
    assert list(read_rows(file)) == [
        (2, {"text": "a\nb", "label": 1}),
        (5, {"text": "中 00456", "label": None}),
    ]


@pytest.mark.parametrize("ending", [".gz", ""])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_each_format_also_compressed(tmp_path, kind, ending):
    content = {"csv": "text,label\na,b\n", "tsv": "text\tlabel\na\tb\n", "jsonl": '{"text": "a", "label": "b"}\n'}[kind]
    file = put(tmp_path / f"my.data.{kind}{ending}", content)
    assert table_format(file) == kind
    assert list(read_rows(str(file))) == [(1 if kind == "jsonl" else 2, {"text": "a", "label": "b"})]


def test_suffixes_in_capitals(tmp_path):
    file = tmp_path / "A.CSV.GZ"
    file.write_bytes(gzip.compress(b"text\na\n"))
    assert list(read_rows(file)) == [(2, {"text": "a"})]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_byte_order_mark_line_ends_and_blank_lines_leave_no_trace(tmp_path, kind, bom, newline):
    lines = {
        "csv": ["", "text,label", "", "a,1", "", "", '"b",2', ""],
        "tsv": ["", "text\tlabel", "", "a\t1", "", "", "b\t2", ""],
        "jsonl": ["", "", "", '{"text": "a", "label": "1"}', "", "", '{"text": "b", "label": "2"}', ""],
    }[kind]
    file = put(tmp_path / f"a.{kind}", bom + newline.join(lines))
    assert list(read_rows(file)) == [(4, {"text": "a", "label": "1"}), (7, {"text": "b", "label": "2"})]


def test_a_quoted_header_after_a_byte_order_mark(tmp_path):
    assert list(read_rows(put(tmp_path / "a.csv", '\ufeff"text","the label"\r\na,b'))) == [
        (2, {"text": "a", "the label": "b"})
    ]


def test_line_ends_inside_quotes_are_kept_as_they_are(tmp_path):
    file = put(tmp_path / "a.csv", b'text,label\r\n"one\r\ntwo\nthree",x\r\nlast,y\r\n')
    assert list(read_rows(file)) == [
        (2, {"text": "one\r\ntwo\nthree", "label": "x"}),
        (5, {"text": "last", "label": "y"}),
    ]


@pytest.mark.parametrize("kind", ["csv", "tsv"])
@pytest.mark.parametrize("word", WORDS_THAT_LOOK_LIKE_VALUES)
def test_text_stays_text(tmp_path, kind, word):
    separator = "," if kind == "csv" else "\t"
    file = put(tmp_path / f"a.{kind}", f"text{separator}label\n{word}{separator}{word}\n")
    assert list(read_rows(file)) == [(2, {"text": word, "label": word})]


@pytest.mark.parametrize("word", WORDS_THAT_LOOK_LIKE_VALUES)
def test_text_stays_text_in_json(tmp_path, word):
    file = put(tmp_path / "a.jsonl", json.dumps({"text": word}))
    assert list(read_rows(file)) == [(1, {"text": word})]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_only_line_feeds_end_a_line(tmp_path, kind):
    text = "a\u2028b\x85c\x0bd\x1ce\u00a0"  # all of them end a line for str.splitlines
    separator = "," if kind == "csv" else "\t"
    table = f"text{separator}label\n{text}{separator}x\n"
    file = put(tmp_path / f"a.{kind}", json.dumps({"text": text}, ensure_ascii=False) if kind == "jsonl" else table)
    assert [row["text"] for _, row in read_rows(file)] == [text]


def test_csv_agrees_with_the_csv_module_on_any_text(tmp_path):
    chooser = random.Random(0)
    rows = [["".join(chooser.choices('ab ",\n中é\t', k=chooser.randrange(12))) for _ in "123"] for _ in range(300)]
    written = io.StringIO()
    table = csv.writer(written, lineterminator="\n", quoting=csv.QUOTE_ALL)
    table.writerows([["a", "b", "c"], *rows])
    line, expected = 2, []
    for row in rows:
        expected.append((line, dict(zip("abc", row, strict=True))))
        line += 1 + sum(field.count("\n") for field in row)
    assert list(read_rows(put(tmp_path / "a.csv", written.getvalue()))) == expected


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_field_of_200_000_characters(tmp_path, kind):
    text = "中文 " * 66_667
    content = {"csv": f'text\n"{text}"\n', "tsv": f"text\n{text}\n", "jsonl": json.dumps({"text": text})}[kind]
    ((_, row),) = read_rows(put(tmp_path / f"a.{kind}", content))
    assert len(row["text"]) == 200_001 and row["text"] == text


def test_rows_come_one_at_a_time(tmp_path):
    rows = read_rows(put(tmp_path / "a.csv", "text,label\na,b\nragged\n"))
    assert next(rows) == (2, {"text": "a", "label": "b"})
    with pytest.raises(BadInput):
        next(rows)


# --------------------------------------------------------------------------------------------------- what is refused


def test_a_missing_file_is_told_with_its_nearest_sibling(tmp_path):
    for name in ("train.csv", "validation.csv"):
        put(tmp_path / name, "text\na\n")
    error = refusal(tmp_path / "trian.csv")
    assert "no such file" in error.reason and 'did you mean "train.csv"?' in error.reason
    assert "did you mean" not in refusal(tmp_path / "0000.jsonl").reason


@pytest.mark.parametrize("name", ["nowhere/a.csv", "train.csv/a.csv", "nowhere/a.csv.gz"])
def test_a_file_in_a_folder_that_is_none(tmp_path, name):
    put(tmp_path / "train.csv", "text\na\n")
    assert "no such file" in refusal(tmp_path / name).reason


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    assert "is a folder" in refusal(tmp_path / name).reason


def test_a_file_that_the_system_refuses(tmp_path):
    error = refusal(tmp_path / ("a" * 300 + ".csv"))
    assert "cannot be read (File name too long)" in error.reason


@pytest.mark.parametrize("name", ["a.txt", "a.xlsx", "a", "a.gz", "a.csv.zip", ".csv"])
def test_an_unknown_suffix(tmp_path, name):
    error = refusal(put(tmp_path / name, b"text\na\n"))
    assert "cannot tell the format" in error.reason
    assert all(suffix in error.advice for suffix in (".csv", ".tsv", ".jsonl", ".gz"))


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "text,label\n", '\n"text","label"\r\n\r\n'])
def test_a_csv_without_rows(tmp_path, content):
    for name in ("a.csv", "b.csv.gz"):
        error = refusal(put(tmp_path / name, content))
        assert "has no rows" in error.reason and "header" in error.advice


@pytest.mark.parametrize(("name", "content"), [("a.tsv", "text\tlabel\n"), ("a.jsonl", "\n \n"), ("a.jsonl", "")])
def test_other_tables_without_rows(tmp_path, name, content):
    assert "has no rows" in refusal(put(tmp_path / name, content)).reason


@pytest.mark.parametrize(("name", "header"), [("a.csv", "text,label,text"), ("a.tsv", "text\tlabel\ttext")])
def test_a_duplicate_header(tmp_path, name, header):
    file = put(tmp_path / name, f"\n{header}\n{header}\n")
    assert ', line 2: the header names the column "text" twice' in refusal(file).reason


@pytest.mark.parametrize(
    ("name", "content", "line", "found", "advice"),
    [
        ("a.csv", "text,label\na,b\nc\n", 3, "1 fields, but the header has 2 columns (text, label)", "comma"),
        ("a.csv", 'text,label\n"a\nb",c\n\nx,y,z\n', 5, "3 fields, but the header has 2 columns", "Quote"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", 2, "3 fields, but the header has 2 columns (text, label)", "tabs"),
        ("a.csv.gz", "text,label\n ,\n \n", 3, "1 fields", "comma"),
    ],
)
def test_a_ragged_row(tmp_path, name, content, line, found, advice):
    error = refusal(put(tmp_path / name, content))
    assert f", line {line}: {found}" in error.reason
    assert advice in error.advice


@pytest.mark.parametrize(
    "content",
    ['text,label\na,b\n"open,c\nd,e\n', 'text,label\na,b\n"shut"no,c\n', 'text,label\na,b\n"open' + "x" * 10_000_001],
    ids=["unclosed", "text after the quote", "unclosed, too long"],
)
def test_a_stray_quote_is_told_with_the_line_where_its_record_starts(tmp_path, content):
    error = refusal(put(tmp_path / "a.csv", content))
    assert "from line 3" in error.reason and "is a quote left open?" in error.reason


def test_an_endless_field_of_a_tsv(tmp_path):
    error = refusal(put(tmp_path / "a.tsv", "text\n" + "x" * 10_000_001))
    assert "from line 2" in error.reason and "far too long" in error.reason


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_a_file_that_is_not_utf_8(tmp_path, kind, ending):
    good = {"csv": "text\n", "tsv": "text\n", "jsonl": '{"text": "x"}\n'}[kind] + "中文\n" * (kind != "jsonl")
    bad = {"csv": "中文", "tsv": "中文", "jsonl": '{"text": "中文"}'}[kind]
    broken = good.encode("utf-8") + bad.encode("gb18030") + b"\n"
    error = refusal(put(tmp_path / f"a.{kind}{ending}", broken))
    assert f", line {3 if kind != 'jsonl' else 2}: is not UTF-8: byte 0xd6" in error.reason
    assert "iconv -f GB18030 -t UTF-8" in error.advice


@pytest.mark.parametrize("text", ['"word"', "3", "null", '["text", "label"]', "true"])
def test_json_that_is_no_object(tmp_path, text):
    error = refusal(put(tmp_path / "a.jsonl", f'{{"text": "a"}}\n{text}\n'))
    assert f"line 2: is not a JSON object but {text}" in error.reason
    assert '{"text":' in error.advice


@pytest.mark.parametrize("text", ['{"text": "a"', "{'text': 'a'}", '{"text": "a"} {"text": "b"}', "text,label", "[\n"])
def test_broken_json(tmp_path, text):
    error = refusal(put(tmp_path / "a.jsonl", f'{{"text": "a"}}\n\n{text}\n'))
    assert "line 3: is not JSON" in error.reason


def test_a_truncated_gzip_file(tmp_path):
    whole = gzip.compress(("text\n" + "".join(f"row {number}\n" for number in range(5000))).encode())
    (tmp_path / "a.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert "is not a whole gzip file" in refusal(tmp_path / "a.csv.gz").reason


def test_a_damaged_gzip_file(tmp_path):
    head = gzip.compress(b"")[:10]
    (tmp_path / "a.csv.gz").write_bytes(head + b"\xff" * 50)  # a block type that deflate does not have
    with pytest.raises(zlib.error):
        gzip.decompress((tmp_path / "a.csv.gz").read_bytes())
    assert "is not a whole gzip file" in refusal(tmp_path / "a.csv.gz").reason


def test_a_plain_file_named_gz(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(b"text\na\n")
    assert "is not a whole gzip file" in refusal(tmp_path / "a.csv.gz").reason


def test_nearest():
    assert nearest("lable", ["text", "label"]) == ' (did you mean "label"?)'
    assert nearest("xyz", ["text", "label"]) == ""
    assert nearest(False, ["text"]) == ""  # YAML's `no`
