"""Strict tables: CSV, TSV and JSONL files (also .gz) -> rows with their line numbers.

Text stays as it is written: no type is guessed, "None", "00456" and "1e5" arrive as these very characters. A file that
is not a clean table ends with BadInput, which names the file, the line, what was found and what to do.
"""

import csv
import gzip
import io
import json
import zlib
from difflib import get_close_matches
from pathlib import Path

# One field may hold a long document. Python's own limit of 131,072 characters is too low, and without any limit one
# unclosed quote makes the rest of a file a single field.
LONGEST_FIELD = 10_000_000
csv.field_size_limit(LONGEST_FIELD)


class BadInput(Exception):
    """What a user gave cannot be used: one line of reason and one of advice, shown without a traceback, exit code 2."""

    def __init__(self, reason, advice):
        super().__init__(f"{reason}\n{advice}")
        self.reason = reason
        self.advice = advice


def nearest(name, names):
    """Return ` (did you mean "x"?)` for the name in `names` most like `name`, or an empty string."""
    matches = get_close_matches(str(name), [str(known) for known in names], n=1)
    return f' (did you mean "{matches[0]}"?)' if matches else ""


def table_format(path):
    """Return "csv", "tsv" or "jsonl" by the name of a file, with or without .gz."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in (".csv", ".tsv", ".jsonl"):
        raise BadInput(
            f"{path}: cannot tell the format of this file by its name",
            "Name it .csv (quoted), .tsv (unquoted) or .jsonl (one JSON object a line); each may end in .gz.",
        )
    return suffixes[-1][1:]


def read_rows(path):
    """Yield (line, row) for every row of a table file: the line on which it starts, from 1, and a dict by column name.

    CSV is read quoted (RFC 4180), TSV unquoted (as GLUE's files are); their values are str. A JSONL value is what JSON
    makes of it. Raises BadInput for a file that is missing, not UTF-8, without rows, or ragged.
    """
    path = Path(path)
    kind = table_format(path)
    try:
        with _open(path) as raw:
            # newline="" leaves line ends inside quoted fields alone; utf-8-sig drops a byte order mark.
            stream = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
            rows = _jsonl_rows(path, stream) if kind == "jsonl" else _delimited_rows(path, stream, kind)
            is_empty = True
            for row in rows:
                is_empty = False
                yield row
    except (FileNotFoundError, NotADirectoryError):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise BadInput(f"{path}: no such file{nearest(path.name, siblings)}", "Check the path of the file.") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder, not a file", "Name one file of it.") from None
    except UnicodeDecodeError as error:
        line = _first_broken_line(path)
        raise BadInput(
            f"{path}, line {line}: is not UTF-8: byte {error.object[error.start]:#04x} ({error.reason})",
            f"Convert it first, for example: iconv -f GB18030 -t UTF-8 {path.name} > utf8-{path.name}",
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: is not a whole gzip file ({error})", "Download or compress it again.") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})", "Check the path and the permissions.") from None
    if is_empty:
        raise BadInput(f"{path}: has no rows", "A table needs a header with the column names and at least one row.")


def _open(path):
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def _first_broken_line(path):
    with _open(path) as raw:
        for line, text in enumerate(raw, start=1):
            try:
                text.decode("utf-8")
            except UnicodeDecodeError:
                return line


def _delimited_rows(path, stream, kind):
    quoting = csv.QUOTE_MINIMAL if kind == "csv" else csv.QUOTE_NONE
    table = csv.reader(stream, delimiter="," if kind == "csv" else "\t", quoting=quoting, strict=True)
    header, line = None, 1
    try:
        for fields in table:
            if not fields:  # an empty line
                pass
            elif header is None:
                header = fields
                repeated = sorted({name for name in header if header.count(name) > 1})
                if repeated:
                    raise BadInput(
                        f'{path}, line {line}: the header names the column "{repeated[0]}" twice',
                        "Give every column a name of its own.",
                    )
            elif len(fields) != len(header):
                hint = (
                    "Quote a field that holds a comma" if kind == "csv" else "Take tabs and line breaks out of fields"
                )
                raise BadInput(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} columns "
                    f"({', '.join(header)})",
                    f"{hint}, or mend this row.",
                )
            else:
                yield line, dict(zip(header, fields, strict=True))
            line = table.line_num + 1
    except csv.Error as error:
        hint = "is a quote left open?" if kind == "csv" else "one field is far too long"
        raise BadInput(f"{path}, from line {line}: {error} ({hint})", "Mend this row, then run again.") from None


def _jsonl_rows(path, stream):
    for line, text in enumerate(stream, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError as error:
            raise BadInput(
                f"{path}, line {line}: is not JSON ({error})", "Put one whole JSON object on each line."
            ) from None
        if not isinstance(row, dict):
            raise BadInput(
                f"{path}, line {line}: is not a JSON object but {text.strip()[:40]}",
                'Write each row as {"text": "...", "label": "..."}.',
            )
        yield line, row
