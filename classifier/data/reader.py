"""Strict tables: CSV, TSV, JSON, JSONL, lines of text (each also .gz) and Parquet -> rows with their line numbers.

Text stays as it is written: no type is guessed, "None", "00456" and "1e5" arrive as these very characters. A file that
is not a clean table ends with BadInput, which names the file, the line, what was found and what to do.
"""

import codecs
import csv
import gzip
import io
import json
import os
import re
import zipfile
import zlib
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from classifier.messages import BadInput, BadRow, location, nearest, without_skip

# Characters in a field. Python's own limit of 131,072 is too low for documents, and without any limit one unclosed
# quote makes the rest of a file a single field.
LONGEST_FIELD = 10_000_000
csv.field_size_limit(LONGEST_FIELD)

DELIMITERS = {"csv": ",", "tsv": "\t"}
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, or a byte that could not be decoded
BLANKS = " \t\r\n"  # of JSON


def fail(bad_row):
    """What happens to a BadRow unless the caller of read_rows knows better."""
    raise bad_row


def table_format(path, has_lines=False):
    """Return "csv", "tsv", "json", "jsonl" or "parquet" by the name of a file, with or without .gz.

    has_lines: "txt", too, where the rows are lines of text.
    """
    name = str(path).lower().removesuffix(".gz")
    kind = name.rpartition(".")[2]
    if kind not in ("csv", "tsv", "json", "jsonl", "parquet", *(["txt"] if has_lines else [])):
        raise BadInput(
            f"{path}: cannot tell the format of this file by its name",
            "Name it .csv (quoted), .tsv (unquoted), .jsonl (an object a line) or .json (a list), each perhaps with "
            ".gz, or .parquet; a file in an archive: archive.zip::folder/name.csv.",
        )
    return kind


def read_rows(path, columns=None, quoting=None, encoding="utf-8", delimiter=None, on_bad_row=fail, texts=None):
    """Yield (line, row) of a table: the line where a row starts (in JSON and Parquet its number), from 1, and a dict.

    CSV is read quoted (RFC 4180), TSV unquoted (as GLUE's files are) unless `quoting` says otherwise; their values are
    str. `columns` names the columns of a file without a header. A value in JSON is what JSON makes of it. With `texts`,
    .txt files are read, too: their lines are values of this column, or of these two, with a tab between. A row that is
    ragged, undecodable, over-long or holds NUL goes to `on_bad_row` as a BadRow.
    Raises BadInput for a file that is missing, in another encoding, without a good row, or no table.
    """
    kind, first_bad, has_good, is_scanned = table_format(path, has_lines=texts), None, False, False
    try:
        with open_bytes(path) as raw:
            try:
                if kind == "parquet":
                    rows = _parquet_rows(path, raw)
                elif kind in DELIMITERS:
                    rows = _delimited_rows(path, _text(raw, encoding), kind, columns, quoting, delimiter)
                elif kind == "txt":
                    rows = lines_of_text(path, _text(raw, encoding), texts)
                else:
                    rows = _json_rows(path, _text(raw, encoding), kind)
                for line, row, text in rows:
                    if not isinstance(row, BadRow) and (flaw := _flaw(row, text)):
                        row = BadRow(path, line, flaw)
                    if not isinstance(row, BadRow):
                        has_good = True
                        yield line, row
                        continue
                    if "is not UTF-8, after" in row.flaw and not is_scanned:  # only the first one: it reads the file
                        is_scanned = True
                        # A bad byte in JSON is always told as such: the first of the file is in this row.
                        at, advice = _about_encoding(path, 0 if kind == "json" or kind == "jsonl" else line)
                        row = BadRow(path, line, row.flaw + at, advice)
                    first_bad = first_bad or row
                    on_bad_row(row)
            except UnicodeError as error:
                raise BadInput(f"{path}: is not {encoding} ({error})", without_skip(_about_encoding(path)[1])) from None
    except (FileNotFoundError, NotADirectoryError):
        file = Path(str(path).partition("::")[0])
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise BadInput(f"{path}: no such file{nearest(file.name, siblings)}", "Check the path of the file.") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, not a file", "Name one file of it.") from None
    except (gzip.BadGzipFile, zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: is not a whole .gz or .zip file ({error})", "Download or compress it again.") from None
    except OSError as error:
        words = error.strerror or str(error)
        raise BadInput(f"{path}: cannot be read ({words})", "Check the path and the permissions.") from None
    if first_bad and not has_good:  # a mistake about the whole file, such as its encoding, must not look like no rows
        raise BadInput(f"{first_bad.reason} (every row of this file is bad)", without_skip(first_bad.advice))
    if not has_good:
        raise BadInput(f"{path}: has no rows", "A table needs a header with the column names and at least one row.")


def count_rows(path):
    """Return about how many rows a table has, by its line ends; exactly that of a Parquet file; None if unknown."""
    kind = table_format(path, has_lines=True)
    try:
        if kind == "parquet":
            from pyarrow import parquet

            return parquet.read_metadata(path).num_rows
        with open_bytes(path) as raw:
            ends = sum(block.count(b"\n") for block in iter(lambda: raw.read(2**20), b""))
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError):  # told where the rows are read
        return None
    return None if kind == "json" else ends - (kind in DELIMITERS)


def check_file(path):
    """Raise the BadInput of read_rows where a file is not there, so that this is said before torch is imported."""
    if not os.path.exists(str(path).partition("::")[0]):
        next(read_rows(path, texts=["text"]), None)


# ------------------------------------------------------------------------------------------------- bytes and characters


@contextmanager
def open_bytes(path):
    """Open a file, a .gz file, or a member of a zip archive (ARCHIVE.zip::MEMBER) for reading bytes."""
    if "\0" in str(path):
        raise FileNotFoundError(path)  # open() would raise ValueError
    archive, _, member = str(path).partition("::")
    if member:
        with zipfile.ZipFile(archive) as files:
            if member not in files.namelist():
                names = [name for name in files.namelist() if not name.endswith("/")]
                raise BadInput(
                    f"{archive}: has no member {member}{nearest(member, names)}", f"Members: {', '.join(names[:20])}."
                )
            try:
                raw = files.open(member)
            except RuntimeError as error:  # encrypted, or compressed in a way unknown here (NotImplementedError)
                raise BadInput(
                    f"{path}: cannot be unpacked ({error})", "Unpack it, and name the file itself."
                ) from None
            with raw, gzip.open(raw) if member.lower().endswith(".gz") else raw as stream:
                yield stream
    else:
        with gzip.open(path) if str(path).lower().endswith(".gz") else open(path, "rb") as stream:
            yield stream


def _text(raw, encoding):
    """Return a text stream. Of UTF-8, a byte that cannot be decoded arrives as a lone surrogate, found in its row."""
    # newline="" leaves line ends inside quoted fields alone; utf-8-sig drops a byte order mark.
    try:
        if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig"):
            return io.TextIOWrapper(raw, encoding, newline="")
    except (LookupError, ValueError):  # TextIOWrapper takes no codec such as rot13, which does not decode bytes
        raise BadInput(f"--encoding {encoding}: unknown", "Known are utf-8, gb18030, latin-1, utf-16, ...") from None
    start = raw.peek(1000)[:1000]
    if likely := _utf_16(start):
        at = 0 if likely == "utf-16" else start.index(0)
        raise UnicodeError(f"byte {at} of the file is {start[at]:#04x}")
    return io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")


def _flaw(row, text=None):
    """Return what is wrong with the characters of a row, in words, or an empty string; `text` is as of _undecodable."""
    flaw = ""
    for column, value in row.items():
        is_text, is_nested = isinstance(value, str), isinstance(value, (list, dict))
        string = value if is_text else json.dumps(value, ensure_ascii=False, default=str) if is_nested else ""
        if undecodable := _undecodable(column, text) or _undecodable(string, text):
            return f'column "{column}": {undecodable}'
        if is_text and len(value) > LONGEST_FIELD:
            flaw = flaw or f'column "{column}": the field has more than {LONGEST_FIELD:,} characters'
        if is_text and "\0" in value:
            flaw = flaw or f'column "{column}": the field holds a NUL character'
    return flaw


def _undecodable(string, text=None):
    """Return the words for the first surrogate of a string, or an empty string.

    `text` is the JSON that the string is made of: a surrogate that is not in there was written as an escape.
    """
    if string.isascii() or not (found := SURROGATE.search(string)):
        return ""
    is_byte = "\udc80" <= found[0] <= "\udcff" and (text is None or found[0] in text)
    what = f"byte {ord(found[0]) - 0xDC00:#04x} is not UTF-8" if is_byte else "half of a character"
    return f"{what}, after {string[: found.start()][-20:]!r}"


def _about_encoding(path, line=0):
    """Return (words for the place of the first byte that is not UTF-8, from a line on; advice on the encoding)."""
    with open_bytes(path) as raw:
        utf_16 = _utf_16(raw.peek(1000)[:1000])
        before = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape", newline="").read(100_000)
    offset, after = 0, ""
    with open_bytes(path) as raw:
        stream = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape", newline="")
        pieces = stream if line else iter(lambda: stream.read(1 << 16), "")  # a JSON list may be one long line
        for number, text in enumerate(pieces, start=1):
            found = SURROGATE.search(text) if number >= line and not text.isascii() else None
            offset += len(text[: found.start() if found else None].encode("utf-8", "surrogateescape"))
            if found:
                after = text[found.start() :] + stream.read(100_000)
                break
    at, broken = f" (byte {offset:,} of the file)", len(SURROGATE.findall(before + after))
    if not utf_16 and len(re.findall(r"[^\0-\x7f]", before + after)) > 2 * broken > 0:
        return at, "Most of the file is UTF-8, and this byte is damaged: mend it,"
    # Chinese in GB18030 comes in pairs of high bytes; the accents of Latin-1 stand alone.
    high = re.findall(rb"[\x80-\xff]+", after.encode("utf-8", "surrogateescape"))
    likely = utf_16 or ("gb18030" if sum(map(len, high)) > 1.5 * len(high) else "latin-1" if broken else "utf-8")
    advice = f"The file looks like {likely}: give --encoding {likely},"
    return at, advice if likely == "utf-8" else f"{advice} or convert it to UTF-8,"


def _utf_16(start):
    """Return the kind of UTF-16 that a file is by its first bytes, or None."""
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    is_utf8 = not SURROGATE.search(start.decode("utf-8", "surrogateescape")[:-3])  # the last character may be cut off
    units = [start[at : at + 2] for at in range(0, len(start), 2)]
    # Only the ends of lines may hold NUL in Chinese; in UTF-8, NUL there is a slip, but not at the start of the file.
    if not is_utf8 and (b"\n\0" in units or b"\0\n" in units):
        return "utf-16-le" if b"\n\0" in units else "utf-16-be"
    return {0: "utf-16-be", 1: "utf-16-le"}.get(start[:2].find(0))


# ------------------------------------------------------------------------------------------------------ the formats


def _delimited_rows(path, stream, kind, header, quoting, delimiter):
    """Yield (line, dict or BadRow, None) of CSV and TSV."""
    mark, quoted = delimiter or DELIMITERS[kind], kind == "csv" if quoting is None else quoting
    table = csv.reader(stream, delimiter=mark, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, strict=True)
    width_of = "the task names" if header else "the header has"
    _check_names(f"{path}: the task names the column", header or [])
    line = 1
    while True:
        start, fields = line, None
        try:
            fields = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            # One physical line is one bad row; a field that ran over many lines is a quote that never closes.
            if "field larger" not in str(error) or table.line_num > start:
                hint = "is a quote left open?" if quoted else "one field is far too long"
                raise BadInput(f"{path}, from line {start}: {error} ({hint})", "Mend this row, run again.") from None
        line = table.line_num + 1
        if fields is None:
            flaw = f"a field has more than {LONGEST_FIELD:,} characters"
            if header is None:
                raise BadInput(f"{path}, line {start}, header: {flaw}", "Write the column names into the first line.")
            yield start, BadRow(path, start, flaw, "Shorten it,"), None
        elif not fields:  # an empty line
            pass
        elif header is None:
            header = fields
            _check_header(path, start, header, quoted, mark, is_told=bool(delimiter))
        elif len(fields) != len(header):
            hint = "Quote a field that holds a delimiter," if quoted else "Take tabs and line breaks out of fields,"
            columns = f"{width_of} {len(header)} columns ({', '.join(header)})"
            yield start, BadRow(path, start, f"{len(fields)} fields, but {columns}", hint), None
        else:
            yield start, dict(zip(header, fields, strict=True)), None


def lines_of_text(path, lines, columns):
    """Yield (line, dict or BadRow, None) of lines: each the value of one column, or of two with a tab between."""
    for line, text in enumerate(lines, start=1):
        fields = text.rstrip("\r\n").split("\t") if len(columns) == 2 else [text.rstrip("\r\n")]
        if len(fields) == len(columns):
            yield line, dict(zip(columns, fields, strict=True)), None
        else:
            flaw = f"{len(fields)} text(s), the model reads {len(columns)}"
            yield line, BadRow(path, line, flaw, "Put one tab between the two texts of a pair,"), None


def _check_header(path, line, header, quoted, mark, is_told):
    where = f"{path}, line {line}"
    if flaw := _flaw(dict(zip(header, header, strict=True))):
        advice = "Mend the header,"
        if "is not UTF-8, after" in flaw:
            at, advice = _about_encoding(path, line)
            flaw += at
        raise BadInput(f"{where}, header: {flaw}", without_skip(advice))
    _check_names(f"{where}: the header names the column", header)
    other = next((other for other in ";\t|," if len(header) == 1 and other in header[0]), None)
    if other and not is_told:
        one, two = ("tab" if each == "\t" else repr(each) for each in (other, mark))
        raise BadInput(
            f"{where}: the header is one column, {header[0]!r}, divided by {mark!r}",
            f"If {one} divides its columns: --delimiter {one}. If it is one column: --delimiter {two}.",
        )
    if not quoted and any(len(name) > 1 and name[0] == name[-1] == '"' for name in header):
        raise BadInput(
            f"{where}: the header is quoted, and this file is read unquoted",
            "Write `quoting: true` into the task's YAML, or name the file .csv and give --delimiter tab.",
        )


def _check_names(who_names, names):
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise BadInput(f'{who_names} "{repeated}" twice', "Give every column its own name.")


def _json_rows(path, stream, kind):
    """Yield (line, dict or BadRow, its text) of JSON lines, or (record, ...) where a .json file holds one list."""
    while (first := stream.read(1)) and first in BLANKS:
        pass
    is_list = kind == "json" and first == "["
    if not is_list:
        stream.seek(0)
    for number, value, text in _list_elements(path, stream) if is_list else _line_values(path, stream):
        if not isinstance(value, (dict, BadRow)):
            flaw = _undecodable(text) or f"is not a JSON object but {text.strip()[:40]}"
            value = BadRow(path, number, flaw, 'Write each row as {"text": "...", "label": "..."},')
        yield number, value, text


def _line_values(path, stream):
    decode = json.JSONDecoder(object_pairs_hook=_object).decode
    for line, text in enumerate(stream, start=1):
        if text.strip():
            try:
                value = _decoded(path, line, decode, text)
            except (ValueError, RecursionError) as error:
                flaw = _undecodable(text) or f"is not JSON ({error})"
                value = BadRow(path, line, flaw, "Put one whole object on the line,")
            yield line, value, text


def _list_elements(path, stream, characters_at_a_time=1 << 16):
    """Yield the elements of a JSON list, past its bracket, of which only a part is in memory."""
    decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
    blanks = re.compile(f"[{BLANKS}]*")
    text, after_last, number = "", 0, 1
    while not text.startswith("]", start := blanks.match(text, after_last).end()):
        try:
            if number > 1:
                if not text.startswith(",", start):
                    raise ValueError("no comma before it")
                start = blanks.match(text, start + 1).end()
            value, end = _decoded(path, number, decode, text, start)
            if isinstance(value, (int, float)) and not text[end:].strip("+-.0123456789eE"):
                raise ValueError("the list is not closed")  # or the number goes on in the next piece
        except (ValueError, RecursionError) as error:
            more = stream.read(max(characters_at_a_time, len(text)))  # twice as much: few attempts at a long element
            if more:
                text, after_last = text[after_last:] + more, 0
                continue
            reason = (
                f"{location(path, number)}: is not JSON ({getattr(error, 'msg', error)})"  # without its place in text
            )
            at, advice = _about_encoding(path) if _undecodable(text) else ("", "Mend the file at this place,")
            raise BadInput(reason + (at and f", and the file is not UTF-8{at}"), without_skip(advice)) from None
        yield number, value, text[start:end]
        number, after_last = number + 1, end
    rest = text[start + 1 :]
    while not rest.strip(BLANKS):
        if not (rest := stream.read(characters_at_a_time)):
            return
    reason = f"{path}: is not one JSON list: after its end comes {rest.strip()[:40]!r}"
    raise BadInput(reason, "Put all rows into one list, or one object on each line.")


def _decoded(path, number, decode, *arguments):
    try:
        return decode(*arguments)
    except BadInput as error:  # of _object, which does not know the place
        raise BadInput(f"{location(path, number)}: {error.reason}", error.advice) from None


def _object(pairs):
    """Make a dict of a JSON object's pairs; json itself would keep the last of two equal keys."""
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
    except (pa.ArrowException, OSError) as error:  # OSError is a damaged page
        raise BadInput(f"{path}: is not a Parquet file ({error})", "Write it again, or give a CSV.") from None
