"""The reader against Python's csv, json and gzip, pyarrow, and tables written by hand, byte by byte."""

import csv
import gzip
import io
import json
import random
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from classifier.data import encodings
from classifier.data.reader import count_rows, read_rows, table_format
from classifier.messages import BadInput, BadRow

FORMATS = ["csv", "tsv", "jsonl", "json", "parquet"]
TOO_LONG = "x" * 10_000_001
CHINESE = "这家酒店的房间非常干净服务员也很热情。"
FRENCH = "Il a dit\xa0: «\xa0Vous êtes arrivés trop tôt\xa0», déjà très fâché"
GERMAN = "Das Frühstück war schön, aber die Straße vor der Tür ist größer"


def put(path, content):
    """Write text (as UTF-8) or bytes, compressed where the name ends in .gz; return the path."""
    content = content.encode("utf-8") if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


def table(kind, rows):
    """Return the bytes of a file with these rows, dicts of the same columns, as other programs would write them."""
    if kind == "parquet":
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        return file.getvalue()
    if kind in ("json", "jsonl"):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        return (f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines)).encode("utf-8")
    text, unquoted = io.StringIO(), {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    written = csv.writer(text, lineterminator="\n", **(unquoted if kind == "tsv" else {}))
    written.writerows([rows[0], *map(dict.values, rows)])
    return text.getvalue().encode("utf-8")


def archive(members):
    """Return the bytes of a zip archive with these members, by their names."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members_of:
        for name, content in members.items():
            members_of.writestr(name, content)
    return file.getvalue()


def values(path, **options):
    """The rows of a file without their numbers."""
    return [row for _, row in read_rows(path, **options)]


def refusal(path, kind=BadInput, **options):
    """The BadInput of reading a file, after a check of its form: one line that names the file, one of advice."""
    with pytest.raises(BadInput) as caught:
        list(read_rows(path, **options))
    error = caught.value
    assert isinstance(error, kind) and isinstance(error, BadRow) == (kind is BadRow)
    assert str(path).partition("::")[0] in error.reason
    assert "\n" not in error.reason and error.advice
    assert str(error) == f"{error.reason}\n{error.advice}"
    if kind is BadInput:  # only rows can be skipped
        with pytest.raises(BadInput) as again:
            list(read_rows(path, on_bad_row="skip", **options))
        assert str(again.value) == str(error) and type(again.value) is type(error)
    return error


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.csv", 'a,b\n"1, 2",x\n"1\n2\n\n4",y\nl,z\n', [(2, "1, 2", "x"), (3, "1\n2\n\n4", "y"), (7, "l", "z")]),
        ("a.csv", 'a,b\n"is ""no""",x\n""", ""\n""",y\nl,z', [(2, 'is "no"', "x"), (3, '", "\n"', "y"), (5, "l", "z")]),
        ("a.csv", '\ufeff"a","b"\r\n"1\r\n2\n3",x\r\nl,y\r\n', [(2, "1\r\n2\n3", "x"), (5, "l", "y")]),
        (
            "a.tsv",
            'a\tb\n"1\tx\n5" by 3"\ty\n"2", ""\tz\n',
            [(2, '"1', "x"), (3, '5" by 3"', "y"), (4, '"2", ""', "z")],
        ),
    ],
)
def test_csv_is_quoted_tsv_is_not_and_a_record_has_the_line_where_it_starts(tmp_path, name, content, rows):
    assert list(read_rows(put(tmp_path / name, content))) == [(line, {"a": a, "b": b}) for line, a, b in rows]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_values_of_json_lines_are_what_json_makes_of_them(tmp_path, name):
    file = put(tmp_path / name, '\n{"text": "a\\nb", "label": 1}\n\n   \n{"label": null, "text": "\\u4e2d 00456"}\n')
    assert list(read_rows(file)) == [(2, {"text": "a\nb", "label": 1}), (5, {"text": "中 00456", "label": None})]


def test_rows_of_parquet_are_counted_across_its_batches(tmp_path):
    rows = [{"text": f"row {n}", "label": n, "score": n / 2, "maybe": None if n % 2 else "NA"} for n in range(2500)]
    numbered = list(read_rows(put(tmp_path / "a.parquet", table("parquet", rows))))
    assert [number for number, _ in numbered] == list(range(1, 2501))  # they are read by 1000
    assert [row for _, row in numbered] == rows
    assert type(numbered[999][1]["label"]) is int and type(numbered[1000][1]["score"]) is float


@pytest.mark.parametrize("ending", [".gz", ""])
@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_also_compressed_and_in_an_archive(tmp_path, kind, ending):
    rows, first = [{"text": "a", "label": "中"}, {"text": "b", "label": "d"}], 2 if kind in ("csv", "tsv") else 1
    file = put(tmp_path / f"my.data.{kind}{ending}", table(kind, rows))
    put(tmp_path / "a.zip", archive({"other.csv": "x\n1\n", f"folder/my.data.{kind}{ending}": file.read_bytes()}))
    capitals = put(tmp_path / f"MY.{kind}{ending}".upper(), table(kind, rows))
    for path in (file, capitals, f"{tmp_path}/a.zip::folder/my.data.{kind}{ending}"):
        assert table_format(path) == kind
        assert list(read_rows(str(path))) == [(first, rows[0]), (first + 1, rows[1])]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_byte_order_mark_line_ends_and_blank_lines_leave_no_trace(tmp_path, kind, bom, newline):
    lines = {
        "csv": ["", "text,label", "", "a,1", "", "", '"b",2', ""],
        "tsv": ["", "text\tlabel", "", "a\t1", "", "", "b\t2", ""],
    }.get(kind, ["", "", "", '{"text": "a", "label": "1"}', "", " ", '{"text": "b", "label": "2"}', ""])
    file = put(tmp_path / f"a.{kind}", bom + newline.join(lines))
    assert list(read_rows(file)) == [(4, {"text": "a", "label": "1"}), (7, {"text": "b", "label": "2"})]


WORDS = ["None", "NA", "null", "nan", "NaN", "00456", "1e5", "True", "-0", "", "  spaces ", "1_0", '"', 'a "b" c', "'"]
LINE_ENDS = "a\u2028b\x85c\x0bd\x1ce\u00a0"  # all of them end a line for str.splitlines, but in no file
LONG = ["中" + "x" * 200_000, "x" * 10_000_000]  # above the limit of the csv module; the longest there may be


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("word", [*WORDS, LINE_ENDS, *LONG], ids=lambda word: word[:9])
def test_text_stays_text(tmp_path, kind, word):
    rows = [{"text": word, "label": word}, {"text": "x", "label": word}]
    assert values(put(tmp_path / f"a.{kind}", table(kind, rows))) == rows


def test_csv_agrees_with_the_csv_module_on_any_text(tmp_path):
    chooser = random.Random(0)
    rows = [["".join(chooser.choices('ab ",\n中é\t', k=chooser.randrange(12))) for _ in "123"] for _ in range(300)]
    written = io.StringIO()
    csv.writer(written, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([["a", "b", "c"], *rows])
    line, expected = 2, []
    for row in rows:
        expected.append((line, dict(zip("abc", row, strict=True))))
        line += 1 + sum(field.count("\n") for field in row)
    assert list(read_rows(put(tmp_path / "a.csv", written.getvalue()))) == expected


@pytest.mark.parametrize(
    ("name", "content", "options", "rows"),
    [
        ("a.csv", '"a, b",1\n\nc,2\n', {}, [(1, "a, b", "1"), (3, "c", "2")]),
        ("a.tsv", '\ufeff"a\t1\n"c"\t2\n', {}, [(1, '"a', "1"), (2, '"c"', "2")]),
        ("a.csv", '"a,1\n5" b,2\n', {"quoting": False}, [(1, '"a', "1"), (2, '5" b', "2")]),
        ("a.tsv", '"a\tb\n"\t1\n"""c"""\t2\n', {"quoting": True}, [(1, "a\tb\n", "1"), (3, '"c"', "2")]),
        ("a.csv", '"a;b";1\nc,d;2\n', {"delimiter": ";"}, [(1, "a;b", "1"), (2, "c,d", "2")]),
        ("a.csv", '"a\tb"\t1\nc, "d"\t2\n', {"delimiter": "\t"}, [(1, "a\tb", "1"), (2, 'c, "d"', "2")]),
        ("a.tsv", '"a|1\nb\tc|2\n', {"delimiter": "|"}, [(1, '"a', "1"), (2, "b\tc", "2")]),
    ],
)
def test_tables_without_header_unquoted_or_with_another_delimiter(tmp_path, name, content, options, rows):
    mark = options.get("delimiter", "," if name == "a.csv" else "\t")
    with_header = f"text{mark}label\n{content.removeprefix(chr(0xFEFF))}"
    headless, headed = put(tmp_path / f"1{name}", content), put(tmp_path / f"2{name}", with_header)
    expected = [(line, {"text": text, "label": label}) for line, text, label in rows]
    assert list(read_rows(headless, columns=["text", "label"], **options)) == expected
    assert list(read_rows(headed, **options)) == [(line + 1, row) for line, row in expected]
    assert values(put(tmp_path / name, "Title; more\na\n"), delimiter=",") == [{"Title; more": "a"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "a"}, {"text": "x" * 200_000}, {"text": "中" * 65_536}, {"text": "b"}],
        [{"text": [["a", [1]], []], "more": {"b": [{}]}}, {}, {"text": ']}, [{"'}, {"text": "\\"}],
        [{"text": f"row {number}", "label": number} for number in range(9000)],
        *([{"text": "x" * (65_500 + shift)}, {"text": '"é\U0001f600', "n": 12345}] for shift in range(0, 48, 5)),
    ],
    ids=lambda rows: f"{len(rows)} of {len(str(rows))}",
)
def test_a_json_list_is_read_in_pieces_of_65_536_characters(tmp_path, rows, indent):
    for name, bom, is_ascii in (("a.json", "", True), ("b.json.gz", "\ufeff \r\n", False)):
        file = put(tmp_path / name, bom + json.dumps(rows, indent=indent, ensure_ascii=is_ascii) + "\n")
        assert list(read_rows(file)) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("end", "record"), [('{"a": "b', 9001), ("{}", 9002), ("{},", 9002), ("{'a': 1}]", 9001), ("{}, {1}]", 9002)]
)
def test_a_json_list_that_is_broken_at_its_end(tmp_path, end, record):
    good = [{"text": f"row {number}"} for number in range(9000)]
    file = put(tmp_path / "a.json", json.dumps(good)[:-1] + ", " + end)
    rows = read_rows(file)
    assert [next(rows)[1] for _ in good] == good
    assert f"record {record}: is not JSON" in refusal(file).reason


# --------------------------------------------------------------------------------------------------------- encodings


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("encoding", "text"),  # in GB18030, some characters have four bytes, or an ASCII backslash as the second of two
    [("gb18030", CHINESE + "㐀昞𠀀"), ("cp1252", FRENCH + "€"), ("utf-16", CHINESE), ("utf-16-be", GERMAN)],
)
def test_other_encodings_are_read_when_named(tmp_path, kind, encoding, text):
    rows = [{text[:2]: text, "label": "1"}]
    file = put(tmp_path / f"a.{kind}", table(kind, rows).decode("utf-8").encode(encoding))
    assert values(file, encoding=encoding) == rows


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("encoding", "text"), [("gb18030", CHINESE), ("cp1252", FRENCH), ("cp1252", GERMAN), ("cp1252", "¿Qué año?")]
)
def test_another_encoding_is_told_with_its_place_and_likely_name(tmp_path, kind, ending, encoding, text):
    content = table(kind, [{"text": "中文"}, {"text": text}])
    broken = content.replace(text.encode("utf-8"), text.encode(encoding))
    file = put(tmp_path / f"a.{kind}{ending}", broken)
    error = refusal(file, kind=BadRow)
    first = next(n for n, character in enumerate(text) if not character.isascii())
    offset = content.index(text.encode("utf-8")) + first
    place = {"jsonl": "line 2", "json": "record 2"}.get(kind, "line 3")
    assert f', {place}: column "text": byte {text[first].encode(encoding)[0]:#04x} is not UTF-8' in error.reason
    assert f"(byte {offset} of the file)" in error.reason
    assert f"--encoding {encoding}," in error.advice


@pytest.mark.parametrize(("encoding", "text"), [("gb18030", "\xff"), ("ascii", FRENCH), ("utf-16", "ab")])
def test_a_file_that_is_not_in_the_named_encoding(tmp_path, encoding, text):
    file = put(tmp_path / "a.tsv", f"text\n{text}\n".encode("latin-1"))
    assert f"is not {encoding}" in refusal(file, encoding=encoding).reason
    with pytest.raises(BadInput, match=r"--encoding utf-9: unknown\nKnown are utf-8, gb18030"):
        list(read_rows(file, encoding="utf-9"))


# ------------------------------------------------------------------------------------------------ rows that are skipped


PARQUET = [{"text": "a"}, {"text": "\0"}, {"text": None}, {"text": TOO_LONG}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "good", "bad"),
    [
        (
            "a.csv",
            b'text,label\na,1\nragged\n"b\nb",2\nN\0UL,3\n\ncaf\xe9,4\nc,5\nth\xe9,6\n"d\nd",7,8\n"e\n",9\n',
            [(2, "a"), (4, "b\nb"), (9, "c"), (13, "e\n")],
            {3: "1 fields", 6: "NUL", 8: "0xe9 is not UTF-8, after 'caf' (byte 41 of", 10: "'th'", 11: "3 fields"},
        ),
        ("b.csv", b"text,b\n\xff\nx,\xfe\n1,2\n", [(4, "1")], {2: "1 fields", 3: "'' (byte 11 of"}),  # its own byte
        ("a.tsv.gz", b'text\n"a\nb\tc\n\xff\n"d"\n', [(2, '"a'), (5, '"d"')], {3: "2 fields", 4: '"text": byte 0xff'}),
        (
            "a.jsonl",
            b'{"text": "a"}\nno\n\n["b"]\n{"text": "c"}\n{"text": "\\ud800"}\n{"text": "d\xff"}\n{"text": "\\u0000"}\n'
            b'{"text": "e"\n{"text": "f"}{}\n{"text": "\\ud83d\\ude00"}\n',
            [(1, "a"), (5, "c"), (11, "\U0001f600")],
            {2: "not JSON", 4: 'but ["b"]', 6: "unpaired", 7: "(byte 68 of", 8: "NUL", 9: "not JSON", 10: "not JSON"},
        ),
        (
            "a.json.gz",
            b'[{"text": "a"}, 5, "b", {"text": "\\ude00"}, {"text": "c"}, [{"text": "d"}], {"text": "\xff"}]',
            [(1, "a"), (5, "c")],
            {2: "is not a JSON object but 5", 3: 'but "b"', 4: "an unpaired surrogate", 6: "but [{", 7: "0xff"},
        ),
        ("a.parquet", table("parquet", PARQUET), [(1, "a"), (3, None), (5, "b")], {2: "NUL", 4: "10,000,000"}),
        # LONG becomes a field that is one character too long; an open quote of one line harms no other line.
        ("a.csv", 'text\na\n"b\n"\nLONG\nc\n"d\n"\n', [(2, "a"), (3, "b\n"), (6, "c"), (7, "d\n")], {5: "10,000,000"}),
        ("a.csv.gz", 'text\na\n"LONG"\n\nc\n', [(2, "a"), (5, "c")], {3: "a field has more than 10,000,000 char"}),
        ("a.csv", 'text\na\n"LONG', [(2, "a")], {3: "10,000,000"}),
        ("a.tsv", 'text\na\n"LONG\nc\n', [(2, "a"), (4, "c")], {3: "10,000,000"}),
        ("a.jsonl", '{"text": "a"}\n{"text": "LONG"}\n{"text": "c"}\n', [(1, "a"), (3, "c")], {2: "10,000,000"}),
        ("a.json", '[{"text": "a"}, {"text": "LONG"}, {"text": "c"}]', [(1, "a"), (3, "c")], {2: "10,000,000"}),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 10 else "",
)
def test_exactly_the_bad_rows_are_skipped(tmp_path, name, content, good, bad):
    content = content.replace("LONG", TOO_LONG) if isinstance(content, str) else content
    file = put(tmp_path / name, content)
    assert [(number, row["text"]) for number, row in read_rows(file, on_bad_row="skip")] == good
    rows = list(read_rows(file, on_bad_row="yield"))
    assert [number for number, _ in rows] == sorted([*(number for number, _ in good), *bad])  # each in its place
    bad_rows = [row for _, row in rows if isinstance(row, BadRow)]
    word = "line" if name.partition(".")[2] in ("csv", "csv.gz", "tsv", "tsv.gz", "jsonl") else "record"
    for bad_row, (number, problem) in zip(bad_rows, bad.items(), strict=True):
        assert problem in bad_row.problem and bad_row.line == number
        assert bad_row.reason == f"{file}, {word} {number}: {bad_row.problem}"
        assert bad_row.advice == f"{bad_row.fix[:-1]}, or skip such rows: --on_bad_row skip."
    assert sum("of the file)" in bad_row.problem for bad_row in bad_rows) <= 1  # the place is found by reading it again
    assert str(refusal(file, kind=BadRow)) == str(bad_rows[0])


@pytest.mark.parametrize("record", ['"open,2\nb,3\n', '"shut"no,2\nb,3\n', '"open' + "a line\n" * 1_500_000], ids="123")
def test_a_stray_quote_ends_the_reading_with_the_line_where_its_record_starts(tmp_path, record):
    rows = read_rows(put(tmp_path / "a.csv", "text,label\nragged\na,1\n" + record), on_bad_row="yield")
    assert isinstance(next(rows)[1], BadRow) and next(rows) == (3, {"text": "a", "label": "1"})
    with pytest.raises(BadInput, match=r"from line 4: .*is a quote left open") as caught:
        next(rows)
    assert type(caught.value) is BadInput


@pytest.mark.parametrize(
    ("name", "content", "reason", "advice"),
    [
        ("a.csv", 'a,b\n"a\nb",c\n\nx,y,z\n', "5: 3 fields, but the header has 2 columns (a, b)", "Quote"),
        ("a.tsv", "a\tb\na\tb\tc\n", "2: 3 fields, but the header has 2 columns (a, b)", "tabs"),
        ("a.csv.gz", "a,b\n ,\n \n", "3: 1 fields", "delimiter"),
        *(("a.jsonl", f"{{}}\n\n{row}\n", "3: is not JSON", "") for row in ('{"a": "b', "{'a': 'b'}", "{} {}", "a,b")),
        *(("a.jsonl", f"{{}}\n\n{x}\n", f"3: is not a JSON object but {x}", "") for x in ('"b"', "3", "null", "[{}]")),
    ],
)
def test_what_a_bad_row_is_told_as(tmp_path, name, content, reason, advice):
    error = refusal(put(tmp_path / name, content), kind=BadRow)
    assert f", line {reason}" in error.reason and advice in error.advice


# --------------------------------------------------------------------------------------------- files and their headers


@pytest.mark.parametrize("name", ["train.csv", "train.csv.gz", "train.parquet", "train.zip"])
def test_a_missing_file_is_told_with_its_nearest_sibling(tmp_path, name):
    for sibling in (name, "validation.csv"):
        put(tmp_path / sibling, "text\na\n")
    wrong = name.replace("train", "trian") + ("::folder/a.csv" if name == "train.zip" else "")
    assert f'{wrong}: no such file (did you mean "{name}"?)' in refusal(tmp_path / wrong).reason
    assert "did you mean" not in refusal(tmp_path / "0000.jsonl").reason


@pytest.mark.parametrize(
    ("reason", "names"),
    [
        ("no such file", "a\0.csv nowhere/a.csv train.csv/a.csv nowhere/a.csv.gz nowhere/a.zip::a.csv"),
        ("is a folder", "folder.csv folder.csv.gz folder.json folder.parquet folder.zip::a.csv"),
        ("cannot be read (File name too long)", "a" * 300 + ".csv"),
    ],
)
def test_a_path_that_is_no_file(tmp_path, reason, names):
    put(tmp_path / "train.csv", "text\na\n")
    for name in names.split():
        if name.startswith("folder"):
            (tmp_path / name.partition("::")[0]).mkdir()
        assert reason in refusal(tmp_path / name).reason


@pytest.mark.parametrize("name", ["a.txt", "a.xlsx", "a", "csv", "a.gz", "a.csv.zip", "a.zip", "a.zip::b", "a.csv.bz2"])
def test_an_unknown_suffix(tmp_path, name):
    error = refusal(put(tmp_path / name, b"text\na\n"))
    assert "cannot tell the format" in error.reason
    assert all(end in error.advice for end in (".csv", ".tsv", ".jsonl", ".json ", ".gz", ".parquet", ".zip::"))


@pytest.mark.parametrize("inside", ["folder/a.csv", "folder\\a.csv"])
@pytest.mark.parametrize("typed", ["folder/a.csv", "folder\\a.csv"])
def test_a_member_is_found_with_slashes_of_either_kind(tmp_path, inside, typed):
    put(tmp_path / "a.zip", archive({inside: "text,label\nfine,1\n"}))
    assert [row for _, row in read_rows(f"{tmp_path}/a.zip::{typed}")] == [{"text": "fine", "label": "1"}]


def test_a_missing_member_of_an_archive(tmp_path):
    put(tmp_path / "a.zip", archive({"folder/": "", "folder/train.tsv": "text\na\n", "other.csv": "text\na\n"}))
    error = refusal(f"{tmp_path}/a.zip::folder/trian.tsv")
    assert 'a.zip: has no member folder/trian.tsv (did you mean "folder/train.tsv"?)' in error.reason
    assert error.advice == "Members: folder/train.tsv, other.csv."
    assert "did you mean" not in refusal(f"{tmp_path}/a.zip::0.jsonl").reason


WHOLE = b"text\n" + b"".join(b"row %d\n" % number for number in range(500))
DAMAGED = "is not a complete .gz or .zip file"
FINE = "text,label\nA fine film,good\n"
WIDE = {"a.csv": FINE, "a.tsv": f"文\n{CHINESE}\n", "a.jsonl": f'{{"文": "{CHINESE}"}}', "a.json": f'["{CHINESE}"]'}
UTF_16 = [(*item, name) for item in WIDE.items() for name in ("utf-16", "utf-16-le", "utf-16-be")]


@pytest.mark.parametrize(
    ("name", "content", "reason", "advice"),
    [
        *(("a.csv", text, "has no rows", "a header") for text in ("", "\n\n", "\ufeff", "a,b\n", '\n"a","b"\r\n\r\n')),
        *(("a.jsonl", content, "has no rows", "") for content in ("", "\n \n", "\ufeff")),
        *(("a.json", content, "has no rows", "") for content in ("", "\n \n", "\ufeff", "[]", "\ufeff\r\n[ \n ]\n")),
        ("a.tsv", "text\tlabel\n", "has no rows", "a header"),
        ("a.parquet", table("parquet", []), "has no rows", ""),
        ("a.csv", "\ntext,label,text\na,b,c\n", 'line 2: the header names the column "text" twice', "own name"),
        ("a.tsv", '"text"\t"label"\n"a"\t"b"\n', "line 1: the header is quoted", "`quoting: true`"),
        ("a.csv", "text;label\na;b\n", "the header is one column, 'text;label', divided by ','", "--delimiter ';'"),
        ("a.csv", "text\tlabel\na\tb\n", "the header is one column", "--delimiter tab"),
        ("a.csv", "Title; more\na\n", "the header is one column", "If it is one column: --delimiter ','."),
        ("a.tsv", "text,label\na,b\n", "divided by '\\t'", "--delimiter ','"),
        ("a.csv", f"文本,标签\n{CHINESE},好\n".encode("gb18030"), "line 1, header: ", "--encoding gb18030,"),
        ("a.csv", f"catégorie\n{FRENCH}\n".encode("cp1252"), "line 1, header: ", "--encoding cp1252,"),
        *((file, text.encode(name), "is not utf-8 (byte ", f"--encoding {name},") for file, text, name in UTF_16),
        ("a.zip::a.csv.gz", archive({"a.csv.gz": gzip.compress(WHOLE, mtime=0)[:-500]}), DAMAGED, "again"),
        ("a.zip::a.csv", archive({"a.csv": WHOLE})[:-9], DAMAGED, "again"),
        ("a.zip::a.csv", archive({"a.csv": WHOLE}).replace(b"row 99\n", b"row 98\n"), DAMAGED, "again"),  # check sum
        ("a.zip::a.csv", WHOLE, DAMAGED, "again"),
        *(("a.parquet", bad, "is not a Parquet file", "") for bad in (b"", WHOLE, table("parquet", [{"a": 1}])[:-5])),
        ("a.csv.gz", gzip.compress(WHOLE, mtime=0)[:-500], DAMAGED, "again"),
        # No block type of deflate: zlib.error. Without the time, which would be part of the test's name.
        ("a.csv.gz", gzip.compress(b"", mtime=0)[:10] + b"\xff" * 50, DAMAGED, "again"),
        ("a.csv.gz", WHOLE, DAMAGED, "again"),
    ],
)
def test_a_broken_file_or_header(tmp_path, name, content, reason, advice):
    put(tmp_path / "as it is", content).rename(tmp_path / name.partition("::")[0])
    error = refusal(tmp_path / name)
    assert reason in error.reason and advice in error.advice


ENCRYPTED = archive({"a.csv": "x\n1\n"}).replace(b"PK\1\2\x14\3\x14\0\0", b"PK\1\2\x14\3\x14\0\1")  # by its flag
TRUNCATED = archive({"a.csv.gz": gzip.compress(WHOLE, mtime=0)[:-9]})
DAMAGED_PAGE = table("parquet", [{"text": f"row {number}"} for number in range(2000)])
DAMAGED_PAGE = DAMAGED_PAGE[:40] + b"\xff" * 400 + DAMAGED_PAGE[440:]
SLIP = [CHINESE.encode(), b"caf\xff", CHINESE.encode()[:-3]]


def not_utf8(names):
    """Return a Parquet file whose columns have these names; each holds bytes that are not UTF-8."""
    file, strings = io.BytesIO(), pyarrow.array([b"caf\xe9"]).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table([strings] * len(names), names=names), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        # A whole file in another encoding is told as such, with the place and the likely name.
        ("a.csv", b"\xef\xbb\xbf\n\ncat\xe9gorie\na\n", {}, "line 3, header: .*byte 8 of the file"),
        ("a.jsonl", '{"text": "好昞"}\n'.encode("gb18030"), {}, r"(?s)line 1: .*\(byte 10 of .*--encoding gb18030,"),
        ("a.json", '[{"text": "好昞"}]'.encode("gb18030"), {}, r"(?s)not JSON .*\(byte 11 of .*--encoding gb18030,"),
        *(("a.tsv", b"\n".join(rows), {}, "(?s)^(?!.*--encoding).*damaged") for rows in (SLIP, SLIP[::-1])),
        *(("a.csv", f"text\n{FRENCH}\n", {"encoding": name}, "--encoding utf-8[.]") for name in ("ascii", "utf-16")),
        ("a.csv", "text\na\n", {"encoding": "rot13"}, "--encoding rot13: unknown"),
        ("a.csv", FINE.encode("utf-16-le"), {"encoding": "utf-16"}, "--encoding utf-16-le,"),
        # The name of a column, nested text and escapes.
        ("a.jsonl", b'{"te\xffxt": "a"}', {}, r"not UTF-8, after 'te' \(byte 4 of"),
        ("a.jsonl", b'["\xff"]', {}, r"not UTF-8, after .* \(byte 2 of"),
        *(("a.jsonl", row, {}, "unpaired") for row in ('{"\\ud800xt": ""}', '{"a": ["\\ud800"]}', '{"a": "\\udc80"}')),
        ("a.json", '[{"a": {"\\udc80": 1}}]', {}, "unpaired"),
        # The place of a mistake is told.
        ("a.jsonl", '{"x": 1}\n{"x": 1, "x": 1}\n', {}, r"a\.jsonl, line 2: .* \"x\" twice"),
        ("a.json", '[{"x": 1}, {"y": {"x": 1, "x": 2}}]', {}, r"a\.json, record 2: .* \"x\" twice"),
        ("a.json", '{"x": 1}\n{"x"\n', {}, r"a\.json, record 2"),
        *(("a.csv", f"{start}{TOO_LONG}\ntext\na\n", {}, "line 1, header: a field has more") for start in ("", "x,")),
        # A list is checked between and after its elements.
        *(("a.json", f'[{{"a": 1}}]{end}', {}, "is not one JSON list") for end in ('\n[{"a": 2}]', " " * 70_000 + "]")),
        *(("a.json", f"[{end}", {}, "record 2: is not JSON") for end in ("{} {}]", "{},,{}]", "{},]", "{}}", "{}:{}]")),
        ("a.json", "[,{}]", {}, "record 1: is not JSON"),
        ("a.json", " " * 70_000 + "[5]", {}, "but 5"),
        *(("a.json", "[" + " " * (65_536 - n) + "-12.5e3, {}]", {}, "but -12.5e3") for n in range(8)),
        ("a.csv", '"a\nb",c\n1\n', {}, r"1 fields, but the header has 2 columns \(a b, c\)"),
        ("a.csv", "a,b\nc\n", {"columns": ["x", "y"]}, r"line 2: 1 fields, but the task names 2 columns \(x, y\)"),
        # Every refusal is a BadInput.
        *((name, "[" * 100_000, {}, "is not JSON") for name in ("a.jsonl", "a.json")),
        ("a.zip::a.csv", ENCRYPTED, {}, "password"),
        ("a.csv", "a,b\n", {"columns": ["x", "y", "x"]}, 'the task names the column "x" twice'),
        ("a.parquet", not_utf8(["x", "y", "x"]), {}, 'the file names the column "x" twice'),
        ("a.parquet", not_utf8(["x", "y"]), {}, "(?s)^(?!.*--encoding).*not UTF-8"),
        ("a.parquet", DAMAGED_PAGE, {}, "(?s)^(?!.*permissions).*is not a Parquet file"),
        *(("a.zip::a.csv.gz", TRUNCATED, {"encoding": name}, "is not a complete .gz") for name in ("utf-8", "utf-16")),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_its_place(tmp_path, name, content, options, message):
    put(tmp_path / name.partition("::")[0], content)
    with pytest.raises(BadInput, match=message) as caught:
        list(read_rows(tmp_path / name, **options))
    assert str(caught.value).count("\n") == 1


def test_a_file_of_bad_rows_alone_is_refused_where_such_rows_are_skipped(tmp_path):
    rows = read_rows(put(tmp_path / "a.csv", "text,label\n好,1\n坏,2\n".encode("gb18030")), on_bad_row="yield")
    assert [next(rows)[1].line, next(rows)[1].line] == [2, 3]
    with pytest.raises(BadInput, match=r"line 2: .*byte 11 of the file\) \(every row") as caught:
        next(rows)
    assert "gb18030 ('好,1')" in caught.value.advice  # one character could be Korean, too


@pytest.mark.parametrize(
    ("name", "number"), [("a.csv", 3), ("a.csv.gz", 3), ("a.jsonl", 3), ("a.txt", 3), ("a.json", None)]
)
def test_rows_are_counted_without_being_read(tmp_path, name, number):
    lines = {"csv": "text\na\nb\nc\n", "jsonl": '{"text": "a"}\n' * 3, "txt": "a\nb\nc\n", "json": '[{"text": "a"}]'}
    content = lines[name.removesuffix(".gz").split(".")[1]].encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert count_rows(tmp_path / name) == number


def test_rows_of_parquet_are_counted_and_a_damaged_file_is_no_error_here(tmp_path):
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    assert count_rows(tmp_path / "a.parquet") == 2
    (tmp_path / "b.parquet").write_bytes(b"no")
    (tmp_path / "b.csv.gz").write_bytes(b"no")
    assert count_rows(tmp_path / "b.parquet") is None and count_rows(tmp_path / "b.csv.gz") is None


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
@pytest.mark.parametrize("separator", [";", ",", "\t", "|"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_excels_line_that_names_the_separator(tmp_path, suffix, separator, quote):
    if quote and suffix == "tsv":
        pytest.skip("unquoted")
    lines = [f"{quote}sep={separator}{quote}", "text,label", "a b,x", "c,y,z"]
    path = tmp_path / f"a.{suffix}"
    path.write_text(
        "\ufeff" + "\r\n".join(line if n == 0 else line.replace(",", separator) for n, line in enumerate(lines))
    )
    rows = list(read_rows(path, on_bad_row="yield"))
    assert rows[0] == (3, {"text": "a b", "label": "x"})
    assert rows[1][0] == rows[1][1].line == 4 and "3 fields" in rows[1][1].problem


@pytest.mark.parametrize("key", ["data", "rows", "examples"])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_under_a_key_of_one_object(tmp_path, key, indent):
    rows = [{"text": "a", "label": "x"}, {"text": "b\nc", "label": "y"}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": "1", key: rows}, indent=indent))
    assert list(read_rows(path)) == [(1, rows[0]), (2, rows[1])]
    path.write_text("\n".join(map(json.dumps, rows)))  # and still lines of objects, a single one too
    assert values(path) == rows
    path.write_text(json.dumps(rows[0]))
    assert values(path) == rows[:1]


@pytest.mark.parametrize("orient", ["columns", "index", "split"])
@pytest.mark.parametrize("indent", [None, 2])
def test_other_forms_of_pandas_are_named(tmp_path, orient, indent):
    columns = {"text": {str(n): f"a long text {n}" for n in range(99)}, "label": {str(n): "x" for n in range(99)}}
    forms = {"columns": columns, "index": {str(n): {"text": "a", "label": "x"} for n in range(99)}}
    forms["split"] = {"columns": ["text", "label"], "index": [0], "data": [["a", "x"]]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(forms[orient], indent=indent))
    error = refusal(path)
    assert "as pandas writes it" in error.reason and len(error.reason) < 200 and 'orient="records"' in error.advice


def test_a_file_that_windows_refuses_is_open_elsewhere_or_a_folder(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(encodings, "open", refuse, raising=False)
    error = refusal(put(tmp_path / "a.csv", "text\na\n"))
    assert "cannot be read (Permission denied)" in error.reason and "open in another program" in error.advice
    (tmp_path / "b.csv").mkdir()
    assert "is a folder, not a file" in refusal(tmp_path / "b.csv").reason
