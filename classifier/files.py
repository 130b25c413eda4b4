"""Files and folders that are complete or absent, on every system and disk; legal names; content digests, JSON.

Whatever is put in place is written under a temporary name, flushed where the disk can do that, and renamed.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path, PureWindowsPath

from classifier.messages import BadInput, log

SECONDS_OF_RETRIES = 2  # of a rename that is refused


class CannotWrite(BadInput):
    """The disk is full, the folder may not be written to, or another program holds the file; the input is fine."""

    def __init__(self, path, error):
        super().__init__(f"{path}: cannot be written ({error.strerror or error})", advice_for(error))


def advice_for(error):
    """Return what to do about an OSError of writing, as a sentence."""
    if isinstance(error, PermissionError):  # Windows does not replace a file that Excel, for one, has open
        return "Is it open in another program? Close it there, or choose another place."
    return "Free some space, or choose another place."


def digest(*parts):
    """Return a name for content: the first 32 hexadecimal digits of the SHA-256 of `parts`, which are JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def sha256(path):
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digests():
    """Return {file: digest} of the scripts and the package, and {library: version} of those that compute."""
    package = Path(__file__).resolve().parent
    files = sorted([*package.parent.glob("*.py"), *package.rglob("*.py")])
    digests = {file.relative_to(package.parent).as_posix(): sha256(file)[:16] for file in files}
    return digests | {name: version(name) for name in ("torch", "transformers", "accelerate")}


# --------------------------------------------------------------------------------------------------------------- files


def replace(source, target):
    """Rename a file or folder, over an existing file too. Raises PermissionError only if that lasts for two seconds.

    On Windows a virus scanner, an indexer or a cloud drive opens a new file for a moment, and it cannot be renamed.
    """
    deadline = time.monotonic() + SECONDS_OF_RETRIES
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.05)


def sync(path):
    """Flush a file, or the directory entries of a folder, to disk, where that is possible."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":  # Windows cannot open folders
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:  # another program has it open; the system flushes it later
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Network and FUSE file systems flush files, but may refuse folders.
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def temporary_file(path, suffix=None):
    """Yield a temporary path for a file that is flushed and renamed to `path` at the end, unless an error came."""
    temporary = Path(f"{path}{suffix or f'.{os.getpid()}.tmp'}")
    try:
        yield temporary
        sync(temporary)
        replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path):
    """Like temporary_file, for an output that the user named. Raises CannotWrite."""
    try:
        # The same name for every process: the next one overwrites what a killed one left.
        with temporary_file(path, ".tmp") as temporary:
            yield temporary
    except OSError as error:
        raise CannotWrite(path, error) from None


def write_text(path, text):
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content):
    """Write a file atomically: it is complete or absent, even after a power cut."""
    with temporary_file(path) as temporary:
        temporary.write_bytes(content)


def write_json(path, content):
    """Write JSON atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def read_json(path):
    """Open a JSON file of a saved model and yield its content.

    Raises BadInput where it is no JSON, or where the body of the `with` misses a key or finds a value of another type.
    """
    try:
        yield json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        reason = f"{path}: is damaged ({type(error).__name__}: {error})"
        raise BadInput(reason, "Copy the model folder again, or train again.") from None


# ------------------------------------------------------------------------------------------------------------- folders


def check_output_folder(folder):
    """Raise BadInput where a folder cannot be made because a file is in its place or in that of a parent."""
    for path in (folder, *folder.parents):
        try:
            is_file = path.exists() and not path.is_dir()
        except OSError as error:  # a name that is too long
            raise BadInput(f"{path}: cannot be a folder ({error.strerror})", "Choose another --output_dir.") from None
        if is_file:
            raise BadInput(f"{path}: is a file, not a folder", "Choose another --output_dir.")


def check_longest_path(folder, longest):
    """Make and remove a file of the longest path that will be written below a folder. Raises BadInput where it cannot.

    Windows refuses 260 characters, unless its user has enabled long paths: better before a training than after it.
    """
    file = folder / longest
    new_folders = [path for path in file.parents if not path.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        # Windows says of a path that is too long that it is not found.
        if error.errno not in (errno.ENAMETOOLONG, errno.ENOENT, errno.EINVAL):
            raise CannotWrite(folder, error) from None
        length = len(os.path.abspath(file))
        reason = f"{folder}: paths below it would have up to {length} characters, too many here ({error.strerror})"
        raise BadInput(reason, "Choose a shorter --output_dir.") from None
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        for path in new_folders:
            with suppress(OSError):
                path.rmdir()


def replace_folder(temporary, path):
    """Flush a complete folder to disk and rename it to `path`; an existing folder is moved aside until then."""
    flush_folder(temporary)
    old = path.with_name(f"{path.name}.old")
    if path.exists():  # a folder cannot be renamed over one that holds files
        shutil.rmtree(old, ignore_errors=True)
        replace(path, old)
    replace(temporary, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush_folder(folder):
    """Flush a folder of files to disk, and give them the mode that the umask asks for."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        with suppress(OSError):  # /mnt/c under WSL, network disks and FAT have no modes, and refuse
            file.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
        sync(file)
    sync(folder)


def recover_folder(path):
    """Restore a folder that replace_folder had moved aside when it was killed; remove the unfinished replacement."""
    old = path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        replace(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(path.with_name(f"{path.name}.tmp"), ignore_errors=True)


def remove_folder(path):
    """Remove a folder; warn of what is left where another program has a file of it open."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        log.warning(f"WARNING: {path} could not be removed completely. Is a file of it open in another program?")


def copy_folder(source, target):
    """Copy a folder of files: their contents alone, since not every disk takes modes and times."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


# --------------------------------------------------------------------------------------------------------------- names

# The devices of Windows, with or without an extension; superscript digits count there as digits.
RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE)


def safe_name(text, limit=60):
    """Return text as the name of a file or folder that every system takes.

    What is longer than `limit` bytes in UTF-8 is cut there, and a digest of the whole is appended.
    """
    name = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate becomes "?"
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "-", name).strip(" ")
    if len(name.encode("utf-8")) > limit:
        name = f"{name.encode('utf-8')[:limit].decode('utf-8', 'ignore')},{digest(text)[:8]}"
    name = name.rstrip(" .") or "-"
    return f"-{name}" if RESERVED.fullmatch(name) else name


def is_path(text):
    """Return whether text can only be a path, on whatever system, and not an id of the Hub: NAME, or OWNER/NAME."""
    is_windows_path = "\\" in text or bool(PureWindowsPath(text).drive)
    return is_windows_path or text.startswith((".", "/", "~")) or text.count("/") > 1


def run_name(task_name, changed):
    """Return the folder name of a run: the task, then the settings that differ from the task's defaults."""
    parts = [task_name]
    for key, value in changed.items():
        if key not in ("dataset", "train_file", "validation_file", "test_file"):
            value = "+".join(map(str, value)) if isinstance(value, list) else str(value).replace(",", "+")
            parts.append(f"{key}={Path(value).name}")  # the last part of a model's name
    return safe_name(",".join(parts))
