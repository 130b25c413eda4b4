"""The cache: tables that are complete or absent, columns as arrays, files from a web server of our own, and the Hub."""

import errno
import os
import socket
import threading
from pathlib import Path

import datasets
import filelock
import huggingface_hub
import numpy as np
import pyarrow
import pytest
from data_help import COMMIT, LATER, served, use_cache

from classifier.data import cache
from classifier.messages import BadInput

SCHEMA = pyarrow.schema([("text", pyarrow.string()), ("row", pyarrow.int64())])


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    return use_cache(monkeypatch, tmp_path / "the cache")


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
    ("address", "message"),
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
def test_a_download_that_fails(empty_cache, address, message):
    address = address()
    with pytest.raises(BadInput) as caught:
        cache.download_file(address, refresh=False)
    assert address in caught.value.reason and message in caught.value.reason
    assert "give the file's path" in caught.value.advice
    assert not [file for file in empty_cache.rglob("*") if file.is_file()]


def test_a_refresh_that_fails_keeps_the_file(tmp_path):
    (tmp_path / "a.csv").write_text("old")
    with served(tmp_path) as (server, _):
        path = cache.download_file(f"{server}/a.csv", False)
    with pytest.raises(BadInput):
        cache.download_file(f"{server}/a.csv", refresh=True)
    assert Path(path).read_text() == "old"


# ------------------------------------------------------------------------------------------------------------- the Hub


def test_the_commit_is_asked_for_once(hub, empty_cache):
    assert cache.hub_commit("org/model", "model") == COMMIT
    (pin,) = empty_cache.iterdir()
    assert pin.read_text() == COMMIT and pin.name == "models--org--model--main.commit"
    hub.commit = LATER
    assert cache.hub_commit("org/model", "model") == COMMIT
    assert hub.asked == [("commit", "org/model", "model", None)]
    assert cache.hub_commit("org/model", "model", refresh=True) == LATER
    assert cache.hub_commit("org/model", "model") == LATER
    assert len(hub.asked) == 2


def test_a_commit_needs_no_asking(hub):
    assert cache.hub_commit("org/model", "model", LATER, refresh=True) == LATER and hub.asked == []


def test_each_repository_kind_and_revision_has_a_commit_of_its_own(hub):
    questions = [("a/b", "model"), ("a/b", "dataset"), ("a/c", "model"), ("a/b", "model", "v1"), ("b", "model")]
    questions.append(("a/b", "dataset", "refs/convert/parquet"))
    expected = {}
    for number, question in enumerate(questions):
        hub.commit = expected[question] = str(number) * 40
        assert cache.hub_commit(*question) == hub.commit
    assert {question: cache.hub_commit(*question) for question in questions} == expected
    assert len(hub.asked) == len(questions)


def test_a_model_was_loaded_where_that_is_noted_and_its_files_are_still_there(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert not cache.was_loaded("org/model", COMMIT)  # a download may have broken off
    cache.note_loaded("org/model", COMMIT)
    assert cache.was_loaded("org/model", COMMIT)
    assert not cache.was_loaded("org/model", LATER) and not cache.was_loaded("org/other", COMMIT)
    snapshot.rmdir()
    assert not cache.was_loaded("org/model", COMMIT)


def fail_with(monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)


def refusal(function, *arguments, **options):
    with pytest.raises(BadInput) as caught:
        function(*arguments, **options)
    assert "\n" not in caught.value.reason and "\n" not in caught.value.advice
    return caught.value


HTTP_ERROR = huggingface_hub.errors.HTTPError  # of requests, httpx or httpx2, by version
NETWORK_ERRORS = {
    "offline": huggingface_hub.errors.OfflineModeIsEnabled("offline mode"),
    "refused": HTTP_ERROR("[Errno 111]\nConnection refused"),
    "timed out": TimeoutError("timed out"),
}
# What HfApi raises without a network: in offline mode, and from the HTTP library underneath.
network_errors = pytest.mark.parametrize("error", NETWORK_ERRORS.values(), ids=NETWORK_ERRORS)


@network_errors
@pytest.mark.parametrize("call", [(cache.hub_commit, "org/name", "model"), (cache.download, "org/name", None, COMMIT)])
def test_an_unreachable_hub(monkeypatch, error, call):
    fail_with(monkeypatch, error)
    refused = refusal(*call)
    assert "cannot download org/name" in refused.reason and str(error).split("\n")[-1] in refused.reason
    assert all(word in refused.advice for word in ("HF_ENDPOINT", "--task demo", "--train_file"))


def test_offline_mode_as_it_is():
    """Without a stand-in: the tests run with HF_HUB_OFFLINE=1."""
    assert "HF_ENDPOINT" in refusal(cache.hub_commit, "org/model", "model").advice


@network_errors
@pytest.mark.parametrize(("kind", "revision", "reference"), [("model", None, "main"), ("dataset", "v1", "v1")])
def test_what_another_tool_downloaded_serves_without_a_network(tmp_path, monkeypatch, kind, revision, reference, error):
    fail_with(monkeypatch, error)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    file = tmp_path / "hub" / f"{kind}s--org--name" / "refs" / reference
    file.parent.mkdir(parents=True)
    file.write_text(LATER + "\n")
    assert cache.hub_commit("org/name", kind, revision) == LATER
    file.unlink()
    assert cache.hub_commit("org/name", kind, revision) == LATER  # pinned


@pytest.mark.parametrize("error", ["RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError"])
@pytest.mark.parametrize(("kind", "message"), [("model", "give a folder"), ("dataset", "give a file")])
def test_a_repository_or_revision_that_is_not_there(monkeypatch, kind, message, error):
    response = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()
    fail_with(monkeypatch, getattr(huggingface_hub.errors, error)("404", response=response))
    refused = refusal(cache.hub_commit, "org/nmae", kind, "v9")
    assert f'no {kind} "org/nmae" at v9' in refused.reason and message in refused.advice


def test_a_mistyped_folder_is_no_repository():
    """A path of several parts cannot be a repository: huggingface_hub says so before it asks."""
    refused = refusal(cache.hub_commit, "runs/mprc/model", "model")
    assert 'no model "runs/mprc/model"' in refused.reason and "give a folder" in refused.advice


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' doesn't exist"), "doesn't exist"),
        (ValueError("BuilderConfig 'part' not found.\nAvailable: ['cola', 'mrpc']"), "Available: ['cola', 'mrpc']"),
        (datasets.exceptions.DatasetGenerationError("a damaged file"), "a damaged file"),
        (FileNotFoundError("no data files"), "no data files"),
    ],
    ids=["no such data", "no such part", "damaged", "no files"],
)
def test_a_data_set_that_cannot_be_loaded(monkeypatch, error, message):
    fail_with(monkeypatch, error)
    refused = refusal(cache.download, "some/data", "part", COMMIT)
    assert refused.reason.startswith("some/data (part): ") and message in refused.reason
    assert "dataset: {path, name}" in refused.advice


@pytest.mark.parametrize("obstacle", ["a file", "no permission", "a read-only disk"])
def test_a_cache_that_cannot_be_written_is_bad_input(tmp_path, monkeypatch, obstacle):
    folder = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
    if obstacle == "a file":
        folder.write_text("")
    elif obstacle == "no permission":  # which the root of a container has everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:

        def refuse(*_, **__):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(BadInput, match="the cache cannot be written there") as caught:
        cache.cache_folder()
    assert "HF_HOME" in caught.value.advice
