"""Files and folders that are complete or absent, on the disk before they have their names; digests and JSON."""

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from classifier.files import (
    CannotWrite,
    atomic_file,
    check_output_folder,
    digest,
    read_json,
    recover_folder,
    replace_folder,
    sha256,
    write_json,
    write_text,
)
from classifier.messages import BadInput


def test_a_digest_is_the_same_everywhere():
    assert digest("rows", 1, ["a"], {"y": 1, "x": None}) == digest("rows", 1, ["a"], {"x": None, "y": 1})
    # printf '["rows", 1]' | sha256sum
    assert digest("rows", 1) == "36b914be43a193d5e4461abc7e0d693e"
    assert digest("a") != digest(["a"])


def test_the_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --------------------------------------------------------------------------------------------------------------- files


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


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_atomic_file_that_fails_leaves_the_old_one(tmp_path, error):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.tmp").write_text("half, of a process that was killed")
    kind = CannotWrite if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind) as raised, atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        raise error
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"
    if isinstance(error, OSError):
        assert raised.value.reason == f"{tmp_path}/a: cannot be written (No space left on device)"
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"scores": {"f1"', "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"{}", "KeyError: 'scores'"),
        (b"[1]", "TypeError"),
        (b'{"scores": 1}', "AttributeError"),
    ],
)
def test_damaged_json_of_a_saved_model_is_refused_in_two_lines(tmp_path, content, problem):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(BadInput) as refusal, read_json(tmp_path / "a.json") as saved:
        saved["scores"].get("f1")
    assert refusal.value.reason.startswith(f"{tmp_path}/a.json: is damaged ({problem}")
    assert refusal.value.advice == "Copy the model folder again, or train again."
    write_json(tmp_path / "a.json", {"scores": {"f1": 0.5}})
    with read_json(tmp_path / "a.json") as saved:
        assert saved["scores"].get("f1") == 0.5


# ------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", ["a file", "a file/run", "a" * 300])
def test_a_folder_that_cannot_be_made(tmp_path, name):
    (tmp_path / "a file").write_text("")
    with pytest.raises(BadInput, match="--output_dir"):
        check_output_folder(tmp_path / name)
    check_output_folder(tmp_path / "new" / "run")
    check_output_folder(tmp_path)
    assert os.listdir(tmp_path) == ["a file"]


def fill(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


def test_a_folder_takes_the_place_of_another_once_it_is_on_the_disk(tmp_path, monkeypatch):
    events, sync, replace = [], os.fsync, os.replace

    def noting_sync(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path.parent).as_posix())
        sync(descriptor)

    def noting_replace(old, new):
        events.append((Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    parent = tmp_path.name
    written, renamed = [f"{parent}/model.tmp/file", f"{parent}/model.tmp"], [("model.tmp", "model"), parent]
    replace_folder(fill(tmp_path / "model.tmp", "new"), tmp_path / "model")
    assert events == [*written, *renamed]
    events.clear()
    replace_folder(fill(tmp_path / "model.tmp", "newer"), tmp_path / "model")
    assert events == [*written, ("model", "model.old"), *renamed]
    assert (tmp_path / "model" / "file").read_text() == "newer" and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o640), (0o022, 0o644)])
def test_files_of_a_folder_have_the_mode_that_the_umask_asks_for(tmp_path, mask, mode):
    (fill(tmp_path / "model.tmp", "new") / "file").chmod(0o600)  # as safetensors leaves them
    before = os.umask(mask)
    try:
        replace_folder(tmp_path / "model.tmp", tmp_path / "model")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model" / "file").stat().st_mode) == mode


class Died(BaseException):
    """A process that is killed."""


@pytest.mark.parametrize(("number", "remaining"), [(1, "model"), (2, "model.old")])
def test_a_folder_survives_a_death_at_any_rename(tmp_path, monkeypatch, number, remaining):
    calls, replace = [], os.replace

    def dying_replace(old, new):
        calls.append(new)
        if len(calls) == number:
            raise Died
        replace(old, new)

    fill(tmp_path / "model", "old")
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(os, "replace", dying_replace)
        replace_folder(fill(tmp_path / "model.tmp", "new"), tmp_path / "model")
    assert sorted(os.listdir(tmp_path)) == sorted([remaining, "model.tmp"])
    recover_folder(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model" / "file").read_text() == "old"


def test_a_folder_that_was_moved_aside_goes_where_its_successor_came(tmp_path):
    fill(tmp_path / "model", "new"), fill(tmp_path / "model.old", "old")
    recover_folder(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"] and (tmp_path / "model" / "file").read_text() == "new"
    recover_folder(tmp_path / "nothing")
    assert os.listdir(tmp_path) == ["model"]
