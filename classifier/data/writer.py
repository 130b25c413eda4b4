"""Write tables atomically: CSV, TSV, JSON lines (optionally gzipped) and Parquet.

Parquet keeps the types of values. In the others dates, times and durations are ISO 8601, decimals are exact, bytes are
base64; lists and structs are JSON in a cell; a missing value is an empty cell, in JSON lines null.
"""

import base64
import csv
import datetime
import decimal
import gzip
import json
import math
import uuid
from contextlib import contextmanager
from pathlib import Path

from classifier.data.encodings import open_bytes
from classifier.data.reader import table_format
from classifier.files import atomic_file
from classifier.messages import BadInput, list_names

KINDS = ("csv", "tsv", "jsonl", "parquet")
ROWS_PER_GROUP = 10_000  # in Parquet


def check_output_file(path):
    """Raise BadInput for a name without a known format, or a folder that does not exist."""
    kind = table_format(path)
    if kind not in KINDS or str(path).endswith(".parquet.gz"):
        raise BadInput(f"{path}: cannot be written in this format", "Name it .csv, .tsv, .jsonl (.gz), or .parquet.")
    if not Path(path).parent.is_dir():
        raise BadInput(f"{path}: cannot be written (no such folder)", "Choose another --output.")


def csv_row_writer(stream):
    """Return a function that writes a row as CSV. Before Python 3.13, csv leaves a lone carriage return unquoted."""
    plain = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    return lambda row: (quoted if any("\r" in str(field) for field in row) else plain).writerow(row)


def write_csv(path, header, rows):
    """Write a CSV of rows that are lists; unlike the dicts of open_writer, two columns may have the same name."""
    with atomic_file(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        write_row = csv_row_writer(stream)
        for row in (header, *rows):
            write_row(row)


def write_bad_rows(path, bad_rows):
    """Write a table of the rows that --on_bad_row skip skipped, if any."""
    if bad_rows:
        write_csv(path, list(bad_rows[0]), (row.values() for row in bad_rows))


@contextmanager
def open_writer(path, source=None):
    """Open a table for writing and yield a function that writes a row (a dict). The file appears only on success.

    source: the table that the rows come from. From Parquet to Parquet, its columns keep their types.
    """
    with atomic_file(path) as temporary:
        if table_format(path) == "parquet":
            with _parquet(temporary, source) as write:
                yield write
        else:
            open_file = gzip.open if str(path).endswith(".gz") else open
            with open_file(temporary, "wt", encoding="utf-8", newline="") as stream:
                yield row_writer(stream, table_format(path))


def write_empty(path, columns):
    """Write a table without rows; in JSON lines, an empty file."""
    with atomic_file(path) as temporary:
        if table_format(path) == "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.table({column: pa.array([], pa.string()) for column in columns}), temporary)
            return
        open_file = gzip.open if str(path).endswith(".gz") else open
        with open_file(temporary, "wt", encoding="utf-8", newline="") as stream:
            if table_format(path) == "csv":
                csv_row_writer(stream)(columns)
            elif table_format(path) == "tsv":
                stream.write("\t".join(columns) + "\n")


def to_json(value):
    """Return a value as JSON has it; decimals and what JSON lacks as strings, NaN and infinity as None."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case datetime.date() | datetime.time():  # a datetime is a date, too
            return value.isoformat()
        case datetime.timedelta():
            import pandas

            return pandas.Timedelta(value).isoformat()
        case decimal.Decimal():
            return f"{value:f}"
        case uuid.UUID():
            return str(value)
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case dict():
            return {str(key): to_json(each) for key, each in value.items()}
        case list() | tuple():
            return [to_json(each) for each in value]
    return value


def to_cell(value):
    """Return a value as a cell of CSV and TSV holds it."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(to_json(value), ensure_ascii=False)
    return value if isinstance(value, (str, bool, int, float)) else to_json(value)


def row_writer(stream, kind):
    """Return a function that writes a row (a dict) to a stream. kind: "csv" (quoted), "tsv" (unquoted) or "jsonl"."""
    header = None
    write_fields = csv_row_writer(stream)

    def write(row):
        nonlocal header
        if kind == "jsonl":
            stream.write(json.dumps(to_json(row), ensure_ascii=False) + "\n")
            return
        rows = [row.values()]
        if header is None:
            header = list(row)
            rows = [header, row.values()]
        elif list(row) != header:
            if row.keys() != set(header):
                reason = f"the rows have different columns: {list_names(row)}; {list_names(header)}"
                raise BadInput(reason, "Name the output .jsonl.")
            rows = [[row[column] for column in header]]
        for fields in rows:
            fields = [to_cell(field) for field in fields]
            if kind == "csv":
                write_fields(fields)
                continue
            line = "\t".join(map(str, fields))
            if line.count("\t") >= len(header) or "\n" in line or "\r" in line:
                reason = "a field contains a tab or a line break, which TSV cannot hold"
                raise BadInput(reason, "Name the output .csv or .jsonl.")
            stream.write(line + "\n")

    return write


def _types_of(source):
    """Return {column: type} of a Parquet file; nothing for None and other tables."""
    import pyarrow as pa
    from pyarrow import parquet

    if source is None or table_format(source, has_lines=True) != "parquet":
        return {}
    with open_bytes(source) as raw:
        schema = parquet.read_schema(raw)
    # Not of extensions, such as bool8: pyarrow may not take back the values that it gave.
    types = {field.name: field.type for field in schema if not isinstance(field.type, pa.BaseExtensionType)}
    for name, kind in types.items():
        # Categories come in the order of the rows, and a group of rows here may have more of them than one there.
        if pa.types.is_dictionary(kind):
            types[name] = pa.dictionary(pa.int32(), kind.value_type)
    return types


@contextmanager
def _parquet(path, source):
    """Like open_writer, for Parquet; the first group of rows determines the types that `source` does not."""
    import pyarrow as pa
    from pyarrow import parquet

    rows, writer, source_types = [], None, _types_of(source)

    def find_schema():
        others = [{name: value for name, value in row.items() if name not in source_types} for row in rows]
        types = {field.name: field.type for field in pa.Table.from_pylist(others).schema} | source_types
        return pa.schema([(name, types[name]) for name in rows[0]])

    def flush():
        nonlocal writer
        try:
            group = pa.Table.from_pylist(rows, schema=writer.schema if writer else find_schema())
        except (pa.ArrowException, OverflowError) as error:
            reason = f"a column holds values of more than one type, or beyond its range ({error})"
            raise BadInput(reason, "Name the output .jsonl.") from None
        writer = writer or parquet.ParquetWriter(path, group.schema)
        writer.write_table(group)
        rows.clear()

    def write(row):
        rows.append(row)
        if len(rows) == ROWS_PER_GROUP:
            flush()

    try:
        yield write
        if rows:
            flush()
    finally:
        if writer:
            writer.close()
