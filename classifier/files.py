"""Files and folders that are complete or absent; their digests."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from classifier.messages import BadInput


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


def check_output_folder(folder):
    """Raise BadInput where a file stands in the place of a folder that is to be written."""
    for path in (folder, *folder.parents):
        try:
            is_other = path.exists() and not path.is_dir()
        except OSError as error:  # a name too long
            raise BadInput(f"{path}: cannot be a folder ({error.strerror})", "Choose another --output_dir.") from None
        if is_other:
            raise BadInput(f"{path}: is a file, not a folder", "Choose another --output_dir.")


def replace_folder(temporary, path):
    """Rename a whole folder to its name, all of it on the disk first; one that is there is moved aside until then."""
    mask = os.umask(0)
    os.umask(mask)
    for file in temporary.iterdir():
        file.chmod(0o666 & ~mask)  # safetensors makes files that only their owner may read
        sync(file)
    sync(temporary)
    old = path.with_name(f"{path.name}.old")
    if path.exists():  # a folder cannot be renamed over one that holds files
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(temporary, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(path):
    """Bring back a folder that was moved aside for a new one that never came; remove what was to be the new one."""
    old = path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(path.with_name(f"{path.name}.tmp"), ignore_errors=True)


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk and not only in memory."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CannotWrite(BadInput):
    """A disk that is full, a folder that may not be written to: nothing is wrong with the rows."""

    def __init__(self, path, error):
        super().__init__(
            f"{path}: cannot be written ({error.strerror or error})", "Make room there, or choose another place."
        )


@contextmanager
def atomic_file(path):
    """Yield a temporary name for a file, which gets its own at the end, where no error came."""
    temporary = Path(f"{path}.tmp")  # always the same: what a killed process left is written anew
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)
