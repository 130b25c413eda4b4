"""A strict reader of tables: CSV, TSV, JSON, JSONL, lines of text (optionally gzipped) and Parquet.

Rows come with their line numbers. No type is guessed: "None", "00456" and "1e5" stay these very strings. A file that is
not a clean table raises BadInput with the file, the line, the value, and how to fix it.
"""

import csv
import gzip
import json
import os
import re
import zipfile
import zlib
from itertools import chain
from pathlib import Path

from classifier.data.encodings import SURROGATE, diagnose_encoding, open_bytes, text_stream
from classifier.messages import BadInput, BadRow, NoRows, location, nearest

# Characters in a field. Python's default limit of 131,072 is too low for documents; without a limit, one unclosed quote
# turns the rest of the file into a single field.
LONGEST_FIELD = 10_000_000
csv.field_size_limit(LONGEST_FIELD)

DELIMITERS = {"csv": ",", "tsv": "\t"}
BLANKS = " \t\r\n"  # the whitespace of JSON


def table_format(path, has_lines=False):
    """Return "csv", "tsv", "json", "jsonl" or "parquet" by a file's name, ignoring .gz; with has_lines, also "txt".

    Raises BadInput for any other name.
    """
    name = str(path).lower().removesuffix(".gz")
    kind = name.rpartition(".")[2]
    if kind not in ("csv", "tsv", "json", "jsonl", "parquet", *(["txt"] if has_lines else [])):
        raise BadInput(
            f"{path}: cannot tell the format of this file by its name",
            "Name it .csv (quoted), .tsv (unquoted), .jsonl (one object per line), .json (a list), any of these with "
            ".gz, or .parquet. A file in an archive: archive.zip::folder/name.csv.",
        )
    return kind


def read_rows(path, columns=None, quoting=None, encoding="utf-8", delimiter=None, on_bad_row="fail", texts=None):
    """Yield (line, row) for each row of a table: row is a dict, line counts from 1 (in JSON and Parquet: records).

    CSV is read quoted (RFC 4180) and TSV unquoted (as in GLUE) unless `quoting` overrides it; their values are strings.
    columns: the names, for files without a header. texts: read .txt files too, one text per line for one name, two
    separated by a tab for two names.
    on_bad_row: what happens to a row that is ragged, undecodable, too long or holds NUL. "fail" raises its BadRow,
    "skip" leaves the row out, "yield" yields (line, BadRow).
    Raises BadInput for a file that is missing, in another encoding, not a table, or without a single good row.
    """
    kind, first_bad, has_good, is_scanned = table_format(path, has_lines=texts), None, False, False
    try:
        with open_bytes(path) as raw:
            try:
                if kind == "parquet":
                    rows = _parquet_rows(path, raw)
                elif kind in DELIMITERS:
                    rows = _delimited_rows(path, text_stream(raw, encoding), kind, columns, quoting, delimiter)
                elif kind == "txt":
                    rows = lines_of_text(path, text_stream(raw, encoding), texts)
                else:
                    rows = _json_rows(path, text_stream(raw, encoding), kind)
                for line, row, text in rows:
                    if not isinstance(row, BadRow) and (problem := _find_problem(row, text)):
                        row = BadRow(path, line, problem)
                    if not isinstance(row, BadRow):
                        has_good = True
                        yield line, row
                        continue
                    if "is not UTF-8, after" in row.problem and not is_scanned:  # once, as it reads the file again
                        is_scanned = True
                        # In JSON every undecodable byte makes a bad row, so the file's first one is in this row.
                        offset, fix = diagnose_encoding(path, 0 if kind in ("json", "jsonl") else line)
                        row = BadRow(path, line, row.problem + offset, fix)
                    first_bad = first_bad or row
                    if on_bad_row == "fail":
                        raise row
                    if on_bad_row == "yield":
                        yield line, row
            except UnicodeError as error:
                raise BadInput(f"{path}: is not {encoding} ({error})", f"{diagnose_encoding(path)[1]}.") from None
    except (FileNotFoundError, NotADirectoryError):
        file = Path(str(path).partition("::")[0])
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise BadInput(f"{path}: no such file{nearest(file.name, siblings)}", "Check the path of the file.") from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        reason = f"{path}: is not a complete .gz or .zip file ({error})"
        raise BadInput(reason, "Download or compress it again.") from None
    except OSError as error:
        if os.path.isdir(str(path).partition("::")[0]):  # Windows raises PermissionError for a folder
            raise BadInput(f"{path}: is a folder, not a file", "Name a file inside it.") from None
        reason = f"{path}: cannot be read ({error.strerror or error})"
        is_refused = isinstance(error, PermissionError)  # on Windows, also where another program has it open
        advice = "Is it open in another program? Close it there, or check" if is_refused else "Check the path and"
        raise BadInput(reason, f"{advice} the permissions.") from None
    if first_bad and not has_good:  # a problem of the whole file, such as its encoding, must not look like no rows
        raise BadInput(f"{first_bad.reason} (every row of this file is bad)", first_bad.fix)
    if not has_good:
        raise NoRows(f"{path}: has no rows", "A table needs a header with the column names and at least one row.")


def read_header(path, encoding="utf-8", delimiter=None):
    """Return the column names of a table without rows; none where the format has no header."""
    kind = table_format(path, has_lines=True)
    with open_bytes(path) as raw:
        if kind == "parquet":
            from pyarrow import parquet

            return parquet.read_schema(raw).names
        if kind not in DELIMITERS:
            return []
        lines = csv.reader(text_stream(raw, encoding), delimiter=delimiter or DELIMITERS[kind])
        return next(filter(None, lines), [])


def count_rows(path):
    """Return a table's approximate number of rows, by its line ends; exact for Parquet, None where unknown."""
    kind = table_format(path, has_lines=True)
    try:
        if kind == "parquet":
            from pyarrow import parquet

            return parquet.read_metadata(path).num_rows
        with open_bytes(path) as raw:
            ends = sum(block.count(b"\n") for block in iter(lambda: raw.read(2**20), b""))
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError):  # read_rows will report it
        return None
    return None if kind == "json" else ends - (kind in DELIMITERS)


def check_file(path):
    """Raise read_rows' BadInput for a missing file: an early check, before the slow import of torch."""
    if not os.path.exists(str(path).partition("::")[0]):
        next(read_rows(path, texts=["text"]), None)


# ---------------------------------------------------------------------------------------------------------- characters


def _find_problem(row, text=None):
    """Return what is wrong with the characters of a row, or an empty string; `text` is that of _undecodable."""
    problem = ""
    for column, value in row.items():
        is_text, is_nested = isinstance(value, str), isinstance(value, (list, dict))
        string = value if is_text else json.dumps(value, ensure_ascii=False, default=str) if is_nested else ""
        if undecodable := _undecodable(column, text) or _undecodable(string, text):
            return f'column "{column}": {undecodable}'
        if is_text and len(value) > LONGEST_FIELD:
            problem = problem or f'column "{column}": the field has more than {LONGEST_FIELD:,} characters'
        if is_text and "\0" in value:
            problem = problem or f'column "{column}": the field holds a NUL character'
    return problem


def _undecodable(string, text=None):
    """Return a description of the first surrogate in a string, or an empty string.

    text: the JSON that the string was parsed from. A surrogate that is not in there was written as an escape.
    """
    if string.isascii() or not (match := SURROGATE.search(string)):
        return ""
    is_byte = "\udc80" <= match[0] <= "\udcff" and (text is None or match[0] in text)
    what = f"byte {ord(match[0]) - 0xDC00:#04x} is not UTF-8" if is_byte else "an unpaired surrogate (half a character)"
    return f"{what}, after {string[: match.start()][-20:]!r}"


# ------------------------------------------------------------------------------------------------------ the formats


def _delimited_rows(path, stream, kind, header, quoting, delimiter):
    """Yield (line, dict or BadRow, None) of CSV and TSV."""
    separator, quoted = delimiter or DELIMITERS[kind], kind == "csv" if quoting is None else quoting
    options = {"quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, "strict": True}
    table, lines_before = csv.reader(stream, delimiter=separator, **options), 0
    expected = "the task names" if header else "the header has"
    _check_names(f"{path}: the task names the column", header or [])
    line = 1
    while True:
        start, fields = line, None
        try:
            fields = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            # A field that is too long within one line is a bad row; over many lines it is a quote that never closes.
            if "field larger" not in str(error) or lines_before + table.line_num > start:
                hint = "is a quote left open?" if quoted else "one field is far too long"
                raise BadInput(f"{path}, from line {start}: {error} ({hint})", "Fix this row.") from None
        line = lines_before + table.line_num + 1
        if fields is None:
            problem = f"a field has more than {LONGEST_FIELD:,} characters"
            if header is None:
                raise BadInput(f"{path}, line {start}, header: {problem}", "Put the column names in the first line.")
            yield start, BadRow(path, start, problem, "Shorten it"), None
        elif not fields:  # an empty line
            pass
        elif start == 1 and (mark := re.fullmatch("sep=(.)", separator.join(fields), re.DOTALL)):  # for Excel
            separator, lines_before = mark[1], 1
            table = csv.reader(stream, delimiter=separator, **options)
        elif header is None:
            header = fields
            _check_header(path, start, header, quoted, separator, is_given=bool(delimiter))
        elif len(fields) != len(header):
            fix = "Quote fields that contain a delimiter" if quoted else "Remove tabs and line breaks from fields"
            problem = f"{len(fields)} fields, but {expected} {len(header)} columns ({', '.join(header)})"
            yield start, BadRow(path, start, problem, fix), None
        else:
            yield start, dict(zip(header, fields, strict=True)), None


def lines_of_text(path, lines, columns):
    """Yield (line, dict or BadRow, None) of lines of text: one column per line, or two separated by a tab."""
    for line, text in enumerate(lines, start=1):
        fields = text.rstrip("\r\n").split("\t") if len(columns) == 2 else [text.rstrip("\r\n")]
        if len(fields) == len(columns):
            yield line, dict(zip(columns, fields, strict=True)), None
        else:
            problem = f"{len(fields)} text(s), the model reads {len(columns)}"
            yield line, BadRow(path, line, problem, "Separate the two texts of a pair with one tab"), None


def _check_header(path, line, header, quoted, separator, is_given):
    """Raise BadInput for a header that cannot be decoded, names a column twice, or was split or quoted otherwise."""
    if problem := _find_problem(dict(zip(header, header, strict=True))):
        advice = "Fix the header"
        if "is not UTF-8, after" in problem:
            offset, advice = diagnose_encoding(path, line)
            problem += offset
        raise BadInput(f"{path}, line {line}, header: {problem}", f"{advice}.")
    _check_names(f"{path}, line {line}: the header names the column", header)
    other = next((other for other in ";\t|," if len(header) == 1 and other in header[0]), None)
    if other and not is_given:
        shown, current = ("tab" if each == "\t" else repr(each) for each in (other, separator))
        raise BadInput(
            f"{path}, line {line}: the header is one column, {header[0]!r}, divided by {separator!r}",
            f"If {shown} separates its columns: --delimiter {shown}. If it is one column: --delimiter {current}.",
        )
    if not quoted and any(len(name) > 1 and name[0] == name[-1] == '"' for name in header):
        raise BadInput(
            f"{path}, line {line}: the header is quoted, but this file is read unquoted",
            "Set `quoting: true` in the task's YAML, or name the file .csv and give --delimiter tab.",
        )


def _check_names(subject, names):
    """Raise BadInput, `SUBJECT "NAME" twice`, where a name is repeated."""
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadInput(f'{subject} "{repeated}" twice', "Give every column its own name.")


def _json_rows(path, stream, kind):
    """Yield (line, dict or BadRow, its JSON) of JSON lines, or (record, ...) of a .json file's list or one object."""
    while (first := stream.read(1)) and first in BLANKS:
        pass
    is_list = kind == "json" and first == "["
    if not is_list:
        stream.seek(0)
        if kind == "json" and (records := _records_of_one_object(path, stream)):
            yield from ((number, record, None) for number, record in enumerate(records, start=1))
            return
        stream.seek(0)
    for number, value, text in _list_elements(path, stream) if is_list else _line_values(path, stream):
        if not isinstance(value, (dict, BadRow)):
            problem = _undecodable(text) or f"is not a JSON object but {text.strip()[:40]}"
            value = BadRow(path, number, problem, 'Write each row as {"text": "...", "label": "..."}')
        yield number, value, text


def _records_of_one_object(path, stream):
    """Return the rows under data, rows or examples of the one object of a .json file; None where it holds others."""
    lines = filter(str.strip, stream)
    first, second = next(lines, ""), next(lines, None)
    try:
        content = json.loads(first)
        if second is not None:  # JSON lines
            return None
    except (ValueError, RecursionError):
        try:
            stream.seek(0)
            content = json.loads(stream.read())
        except (ValueError, RecursionError):
            return None
    if not isinstance(content, dict):
        return None
    if content.keys() >= {"columns", "data"} or (content and all(isinstance(each, dict) for each in content.values())):
        reason = f"{path}: holds one object of columns, as pandas writes it, and no list of rows"
        raise BadInput(reason, 'Write it again: df.to_json(FILE, orient="records").')
    records = next((content[key] for key in ("data", "rows", "examples") if isinstance(content.get(key), list)), None)
    return records if records and all(isinstance(record, dict) for record in records) else None


def _line_values(path, stream):
    decode = json.JSONDecoder(object_pairs_hook=_object).decode
    for line, text in enumerate(stream, start=1):
        if text.strip():
            try:
                value = _decode(path, line, decode, text)
            except (ValueError, RecursionError) as error:
                problem = _undecodable(text) or f"is not JSON ({error})"
                value = BadRow(path, line, problem, "Put one complete object on the line")
            yield line, value, text


def _list_elements(path, stream, block_size=1 << 16):
    """Yield the elements of a JSON list whose bracket has been read, with only some of the file in memory."""
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    blanks = re.compile(f"[{BLANKS}]*")
    text, after_last, number = "", 0, 1
    while not text.startswith("]", start := blanks.match(text, after_last).end()):
        try:
            if number > 1:
                if not text.startswith(",", start):
                    raise ValueError("no comma before it")
                start = blanks.match(text, start + 1).end()
            value, end = _decode(path, number, decode, text, start)
            if isinstance(value, (int, float)) and not text[end:].strip("+-.0123456789eE"):
                raise ValueError("the list is not closed")  # or the number continues in the next block
        except (ValueError, RecursionError) as error:
            more = stream.read(max(block_size, len(text)))  # doubling: few attempts at a long element
            if more:
                text, after_last = text[after_last:] + more, 0
                continue
            # msg: json's message without a position, which would be that in the block.
            reason = f"{location(path, number)}: is not JSON ({getattr(error, 'msg', error)})"
            offset, advice = diagnose_encoding(path) if _undecodable(text) else ("", "Fix the file at this place")
            raise BadInput(reason + (offset and f", and the file is not UTF-8{offset}"), f"{advice}.") from None
        yield number, value, text[start:end]
        number, after_last = number + 1, end
    rest = text[start + 1 :]
    while not rest.strip(BLANKS):
        if not (rest := stream.read(block_size)):
            return
    reason = f"{path}: is not one JSON list: after its end comes {rest.strip()[:40]!r}"
    raise BadInput(reason, "Put all rows into one list, or one object on each line.")


def _decode(path, number, decode, *arguments):
    """Return decode(*arguments); adds the location to a BadInput of _object, which does not know it."""
    try:
        return decode(*arguments)
    except BadInput as error:
        raise BadInput(f"{location(path, number)}: {error.reason}", error.advice) from None


def _object(pairs):
    """Return a JSON object's pairs as a dict. Raises BadInput for equal keys, of which json would keep the last."""
    row = dict(pairs)
    if len(row) < len(pairs):
        _check_names("a JSON object names", [name for name, _ in pairs])
    return row


def _parquet_rows(path, raw):
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(raw)
        _check_names(f"{path}: the file names the column", file.schema_arrow.names)
        batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=1000))
        for number, row in enumerate(chain.from_iterable(batches), start=1):
            yield number, row, None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: holds text that is not UTF-8 ({error})", "Write it again, in UTF-8.") from None
    except (pa.ArrowException, OSError, OverflowError) as error:  # a damaged page; a year that Python does not have
        raise BadInput(f"{path}: is not a Parquet file ({error})", "Write it again, or give a CSV.") from None
