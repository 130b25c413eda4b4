"""Files and folders that are complete or absent, on the disk before they have their names; digests and JSON."""

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from classifier import files
from classifier.files import (
    CannotWrite,
    atomic_file,
    check_longest_path,
    check_output_folder,
    copy_folder,
    digest,
    read_json,
    recover_folder,
    remove_folder,
    replace_folder,
    safe_name,
    sha256,
    sync,
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


def test_a_new_file_that_a_scanner_holds_for_a_moment_is_renamed_a_moment_later(tmp_path, monkeypatch):
    refusals, rename = [], os.replace

    def refuse_twice(old, new):
        if len(refusals) < 2:
            refusals.append(new)
            raise PermissionError(errno.EACCES, "Access is denied")
        rename(old, new)

    monkeypatch.setattr(os, "replace", refuse_twice)
    write_text(tmp_path / "a.txt", "new")
    assert len(refusals) == 2 and os.listdir(tmp_path) == ["a.txt"]


def test_a_file_that_stays_open_elsewhere_is_not_blamed_on_the_disk(tmp_path, monkeypatch):
    def refuse(old, new):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(files, "SECONDS_OF_RETRIES", 0.2)
    monkeypatch.setattr(os, "replace", refuse)
    (tmp_path / "a.csv").write_text("old")
    with pytest.raises(CannotWrite) as raised, atomic_file(tmp_path / "a.csv") as temporary:
        temporary.write_text("new")
    assert raised.value.reason == f"{tmp_path}/a.csv: cannot be written (Access is denied)"
    assert "another program" in raised.value.advice and "space" not in raised.value.advice
    assert os.listdir(tmp_path) == ["a.csv"] and (tmp_path / "a.csv").read_text() == "old"
    assert "Free some space" in CannotWrite("a", OSError(errno.ENOSPC, "No space left on device")).advice


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_folder_that_cannot_be_flushed_is_taken_as_it_is(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match=os.strerror(number)):  # of a file, that is no whim of the file system
        sync(tmp_path / "a")


def test_a_folder_that_could_not_be_flushed_since_the_disk_fails_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output"):
        sync(tmp_path)


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


def test_where_modes_are_refused_a_folder_is_put_in_place_and_copied(tmp_path, monkeypatch):
    def refuse(path, *given, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(os, "chmod", refuse)
    replace_folder(fill(tmp_path / "model.tmp", "new"), tmp_path / "model")
    copy_folder(tmp_path / "model", tmp_path / "other" / "copy")
    assert (tmp_path / "other" / "copy" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["model", "other"]


def test_what_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, told):
    fill(tmp_path / "checkpoints", "open in another program")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda *given, **options: (_ for _ in ()).throw(PermissionError()))
        remove_folder(tmp_path / "checkpoints")
    assert f"WARNING: {tmp_path}/checkpoints could not be removed" in told.text
    told.clear()
    remove_folder(tmp_path / "checkpoints")
    remove_folder(tmp_path / "checkpoints")
    assert told.text == "" and os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("mrpc,learning_rate=3e-05", "mrpc,learning_rate=3e-05"),
        ("label_column=Is it good?", "label_column=Is it good-"),
        ('<>:"/\\|?*\t', "----------"),
        ("ends with a dot. . ", "ends with a dot"),
        ("CON", "-CON"),
        ("nul.tar.gz", "-nul.tar.gz"),
        ("Com1", "-Com1"),
        ("LPT\u00b9.txt", "-LPT\u00b9.txt"),
        ("console", "console"),
        ("com10", "com10"),
        ("..", "-"),
        ("", "-"),
        ("half a \ud800", "half a -"),
        ("\u4e2d" * 20, "\u4e2d" * 20),
    ],
)
def test_a_name_that_every_system_takes(tmp_path, text, name):
    assert safe_name(text) == name
    (tmp_path / name).touch()


def test_a_long_name_is_cut_between_characters_and_stays_apart_from_others():
    names = [safe_name("\u4e2d" * 30 + end) for end in "ab"]
    assert names[0] != names[1]
    for name in names:
        assert name.startswith("\u4e2d" * 20 + ",") and len(name.encode()) == 69
    assert safe_name("a" * 100, limit=100) == "a" * 100


def test_the_longest_path_is_tried_and_nothing_is_left(tmp_path):
    check_longest_path(tmp_path, "checkpoints/step.tmp/a")
    assert os.listdir(tmp_path) == []
    (tmp_path / "checkpoints").mkdir()
    check_longest_path(tmp_path, "checkpoints/step.tmp/a")
    assert os.listdir(tmp_path) == ["checkpoints"] and os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("number", [errno.ENAMETOOLONG, errno.ENOENT])
def test_a_path_that_would_be_too_long_is_refused_with_its_length(tmp_path, monkeypatch, number):
    def refuse(path, *given, **options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(BadInput) as raised:
        check_longest_path(tmp_path / "run", "checkpoints/a")
    assert f"up to {len(str(tmp_path / 'run/checkpoints/a'))} characters" in raised.value.reason
    assert "--output_dir" in raised.value.advice and os.listdir(tmp_path) == []
    number = errno.ENOSPC
    with pytest.raises(CannotWrite, match="No space"):
        check_longest_path(tmp_path / "run", "checkpoints/a")
