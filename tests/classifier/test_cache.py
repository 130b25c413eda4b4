"""cache.py: tables that are complete or absent, digests, arrays of columns, and files from a web server of our own."""

import json
import os
import socket
import threading
from pathlib import Path

import datasets
import filelock
import numpy as np
import pyarrow
import pytest
from data_help import served, use_cache

from classifier.data import cache
from classifier.files import digest, write_json, write_text
from classifier.messages import BadInput

SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("row", pyarrow.int64())])


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    return use_cache(monkeypatch, tmp_path / "the cache")


def test_a_digest_is_the_same_everywhere():
    assert digest("rows", 1, ["a"], {"y": 1, "x": None}) == digest("rows", 1, ["a"], {"x": None, "y": 1})
    # printf '["rows", 1]' | sha256sum
    assert digest("rows", 1) == "36b914be43a193d5e4461abc7e0d693e"
    assert digest("a") != digest(["a"])


# ------------------------------------------------------------------------------------------------------------- tables


def batches():
    yield {"text": ["one", "two"], "row": [2, 3]}
    yield {"text": ["中"], "row": [4]}


def test_a_table_is_made_once_and_memory_mapped(empty_cache):
    rows, is_new = cache.cached_table("key", SCHEMA, batches())
    assert is_new and rows.to_dict() == {"text": ["one", "two", "中"], "row": [2, 3, 4]}
    again, is_new = cache.cached_table("key", SCHEMA, (pytest.fail("made again") for _ in "1"))
    assert not is_new and again.to_dict() == rows.to_dict()
    assert [file["filename"] for file in again.cache_files] == [str(empty_cache / "key.arrow")]
    assert [file.name for file in empty_cache.iterdir()] == ["key.arrow"]


@pytest.mark.parametrize("error", [ValueError("a bad row"), KeyboardInterrupt()])
def test_a_table_that_is_not_finished_leaves_nothing(empty_cache, error):
    def broken():
        yield {"text": ["one"], "row": [2]}
        raise error

    with pytest.raises(type(error)):
        cache.cached_table("key", SCHEMA, broken())
    assert list(empty_cache.iterdir()) == []
    assert cache.cached_table("key", SCHEMA, batches())[1]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([0, 1, -1], "int64", np.array([0, 1, -1])),
        ([0.5, float("nan")], "float64", np.array([0.5, np.nan])),
        ([[0, 1, 1], [1, 0, 0]], None, np.array([[0, 1, 1], [1, 0, 0]])),
        (["中", "b"], "string", np.array(["中", "b"])),
    ],
)
def test_columns_as_arrays(values, kind, expected):
    feature = datasets.Value(kind) if kind else datasets.List(datasets.Value("int8"))
    rows = datasets.Dataset.from_dict(
        {"x": values, "other": ["o"] * len(values)},
        features=datasets.Features({"x": feature, "other": datasets.Value("string")}),
    )
    np.testing.assert_array_equal(cache.column_array(rows, "x"), expected)
    np.testing.assert_array_equal(cache.column_array(rows.select([1]), "x"), expected[1:2])


def test_one_process_at_a_time():
    with cache.one_process_at_a_time(), pytest.raises(filelock.Timeout):
        cache.one_process_at_a_time().acquire(timeout=0)
    cache.one_process_at_a_time().acquire(timeout=0).lock.release()


# ----------------------------------------------------------------------------------------------------- files from URLs


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("/a.csv", "a.csv"),
        ("/a.csv?raw=1&x=b.tsv", "a.csv"),
        ("/folder/my.zip::in/b.csv.gz", "my.zip::in/b.csv.gz"),
    ],
)
def test_a_download_is_kept_under_its_name(tmp_path, address, name):
    (tmp_path / "web" / "folder").mkdir(parents=True)
    for file in ("a.csv", "folder/my.zip"):
        (tmp_path / "web" / file).write_bytes(b"the bytes\r\n\0")
    with served(tmp_path / "web") as (server, asked):
        path = cache.download_file(server + address, refresh=False)
        assert path.endswith(f"/{name}") and Path(path.partition("::")[0]).read_bytes() == b"the bytes\r\n\0"
        assert cache.download_file(server + address, refresh=False) == path and len(asked) == 1
        assert cache.download_file(server + address, refresh=True) == path and len(asked) == 2
    assert cache.download_file(server + address, refresh=False) == path  # without the server


def test_files_of_one_name_from_two_addresses_are_two(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.csv").write_text(folder)
    with served(tmp_path) as (server, _):
        paths = [cache.download_file(f"{server}/{folder}/a.csv", False) for folder in "xy"]
    assert [Path(path).read_text() for path in paths] == ["x", "y"]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answer_once(answer):
    """Answer one request with these bytes, then hang up; returns the address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        with server, server.accept()[0] as connection:
            connection.recv(10_000)
            connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}/a.csv"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (lambda: f"http://127.0.0.1:{free_port()}/a.csv", "refused"),
        (lambda: "http:///a.csv", "no host given"),
        (lambda: "http://127.0.0.1:x/a.csv", "cannot be downloaded"),
        (lambda: answer_once(b"HTTP/1.0 404 Not Found\r\n\r\n"), "404"),
        (lambda: answer_once(b"what?\r\n\r\n"), "what?"),
        (lambda: answer_once(b""), "closed connection without response"),
        (
            lambda: answer_once(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\ntext,label\n"),
            "the connection ended after 11 of 1,000 bytes",
        ),
    ],
    ids=["refused", "no host", "no port", "404", "no HTTP", "no answer", "cut short"],
)
def test_a_download_that_fails(empty_cache, address, words):
    address = address()
    with pytest.raises(BadInput) as caught:
        cache.download_file(address, refresh=False)
    assert address in caught.value.reason and words in caught.value.reason
    assert "give the file's path" in caught.value.advice
    assert not [file for file in empty_cache.rglob("*") if file.is_file()]


def test_a_refresh_that_fails_keeps_the_file(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with served(tmp_path) as (server, _):
        path = cache.download_file(f"{server}/a.csv", False)
    with pytest.raises(BadInput):
        cache.download_file(f"{server}/a.csv", refresh=True)
    assert Path(path).read_text() == "old"


# ------------------------------------------------------------------------------------------- files complete or absent


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, None, 0.1], "a": "中"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"b": [1, None, 0.1], "a": "中"}
    write_json(tmp_path / "a.json", 2)  # replaces
    assert (tmp_path / "a.json").read_text() == "2\n"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "content",
    [{"score": float("nan")}, [np.inf], {"a": object()}, "a lone surrogate \ud800"],
    ids=["nan", "infinity", "no JSON", "no UTF-8"],
)
def test_json_that_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, content):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "a.json", content)
    assert os.listdir(tmp_path) == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


def test_a_write_that_is_cut_short_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    at_the_end = []

    def full_disk(old, new):
        at_the_end.append((Path(old).read_text(), Path(new).read_text()))
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.txt", "new")
    assert at_the_end == [("new", "old")]  # written elsewhere, as a whole, before it takes the place
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "old"


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace

    def noting_sync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        sync(descriptor)

    def noting_replace(old, new):
        events.append(("rename", str(old), str(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    write_text(tmp_path / "a.txt", "twelve bytes")
    temporary = f"{tmp_path}/a.txt.{os.getpid()}.tmp"
    assert events == [("sync", temporary, 12), ("rename", temporary, f"{tmp_path}/a.txt")]
