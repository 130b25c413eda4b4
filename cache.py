"""The cache: Arrow tables of rows and of tokens, named by their content, and files from URLs.

Tables are memory-mapped, so that a second run makes nothing again, and a large data set needs no memory.
"""

import hashlib
import json
import os
import shutil
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from reader import BadInput


def cache_folder():
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / "text-classification-scripts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def digest(*parts):
    """A name for content: 32 hexadecimal digits of the SHA-256 of `parts`, which must be JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def sha256(path):
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path, text):
    """Write a file under a temporary name and rename it: it is complete or absent, after a power cut too."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def table_path(key):
    return cache_folder() / f"{key}.arrow"


def open_table(key):
    """Return the table named `key` of the cache: a Dataset, memory-mapped."""
    from datasets import Dataset

    return Dataset.from_file(str(table_path(key)))


def write_table(key, schema, columns):
    """Write the table named `key`: `columns` yields those of some rows at a time. The file is complete or absent."""
    import pyarrow as pa

    path = table_path(key)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for some in columns:
                writer.write_batch(pa.RecordBatch.from_pydict(some, schema=schema))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cached_table(key, schema, make_columns):
    """Return (Dataset, made): the table named `key` from the cache, written by make_columns() where it is not there."""
    made = not table_path(key).exists()
    if made:
        write_table(key, schema, make_columns())
    return open_table(key), made


def one_process_at_a_time():
    """A lock for preparing data: one process of a machine makes the tables, the others wait and read its cache."""
    from filelock import FileLock

    # Not a barrier: a process that waits there dies of the collective's timeout when the data are large.
    return FileLock(cache_folder() / "prepare.lock")


def arrow_column(rows, column):
    """Return a column of a Dataset as one Arrow array."""
    values = rows.data.column(column).combine_chunks()
    # rows[column] would make a Python object of each index of a selection: slow, and gigabytes for millions of rows.
    return values if rows._indices is None else values.take(rows._indices.column(0).combine_chunks())


def array_of(rows, column):
    """Return a column of a Dataset as an array: shape (rows,); the labels in multi-label: (rows, labels)."""
    values = arrow_column(rows, column)
    if hasattr(values, "offsets"):  # lists
        return values.flatten().to_numpy().reshape(len(rows), -1)
    return values.to_numpy(zero_copy_only=False)


def download_file(url, refresh):
    """Return the path of a URL's file in the cache, downloaded once; a part after :: names a member of an archive."""
    url, mark, member = url.partition("::")
    path = cache_folder() / "downloads" / digest(url) / Path(url.partition("?")[0]).name
    if refresh or not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with urlopen(url, timeout=60) as answer, open(temporary, "wb") as file:
                shutil.copyfileobj(answer, file)
                length = answer.headers["Content-Length"]
                if length and file.tell() != int(length):  # read() of a part of an answer does not complain
                    raise OSError(f"the connection ended after {file.tell():,} of {int(length):,} bytes")
            os.replace(temporary, path)
        # URLError and HTTPError are OSErrors; ValueError: not a URL; HTTPException: an answer that is none.
        except (OSError, ValueError, HTTPException) as error:
            words = str(error).removeprefix("<urlopen error ").removesuffix(">")
            raise BadInput(
                f"{url}: cannot be downloaded ({words})", "Check the address, or download it and give the file's path."
            ) from None
        finally:
            temporary.unlink(missing_ok=True)
    return f"{path}{mark}{member}"
