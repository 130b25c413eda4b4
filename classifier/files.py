"""Files and folders that are complete or absent, content digests, JSON."""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from classifier.messages import BadInput


class CannotWrite(BadInput):
    """The disk is full, or the folder may not be written to; the input is fine."""

    def __init__(self, path, error):
        super().__init__(
            f"{path}: cannot be written ({error.strerror or error})", "Free some space, or choose another place."
        )


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


def write_text(path, text):
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path, content):
    """Write a file atomically: it is complete or absent, even after a power cut."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


@contextmanager
def atomic_file(path):
    """Yield a temporary path for a file that is renamed to `path` at the end, unless an error came."""
    temporary = Path(f"{path}.tmp")  # the same for every process: the next one overwrites what a killed one left
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


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


def replace_folder(temporary, path):
    """Flush a complete folder to disk and rename it to `path`; an existing folder is moved aside until then."""
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
    """Restore a folder that replace_folder had moved aside when it was killed; remove the unfinished replacement."""
    old = path.with_name(f"{path.name}.old")
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(path.with_name(f"{path.name}.tmp"), ignore_errors=True)


def sync(path):
    """Flush a file, or the directory entries of a folder, to disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
