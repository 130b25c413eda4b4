"""One run per folder: a lock file that names its owner, and whose modification time is the heartbeat."""

import json
import os
import socket
import sys
import threading
from contextlib import contextmanager, suppress

import psutil

from classifier.files import write_json
from classifier.messages import BadInput

HEARTBEAT = 20  # seconds between two touches of the lock
SILENCE = 90  # seconds without a heartbeat after which a run counts as dead


@contextmanager
def locked(folder):
    """Create a run's folder and hold its lock. Raises BadInput if another run holds it, or it is not writable."""
    path, claim = folder / "lock.json", _claim()
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, claim)
    except OSError as error:
        _remove_empty(new_folders)
        raise BadInput(f"{folder}: cannot be written ({error.strerror})", "Choose another --output_dir.") from None
    ended = threading.Event()
    beating = threading.Thread(target=_keep_heartbeat, args=(path, claim, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == claim:
            path.unlink(missing_ok=True)
        _remove_empty(new_folders)  # of a run that failed before it wrote anything


def holder(folder):
    """Return {"host", "pid", ...} of the live run that holds a folder; None where there is none."""
    path = folder / "lock.json"
    found = _read(path)
    return found if found and not _is_dead(path, found, _claim()) else None


def _claim():
    """Return what this process writes into a lock."""
    return {
        "host": socket.gethostname(),
        "system": _system(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _remove_empty(folders):
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _take(path, claim):
    """Write the lock. Raises BadInput if a live run holds it."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(claim, file)
        return
    except FileExistsError:
        holder = _read(path)
    except OSError:  # on a full disk the empty file is there
        path.unlink(missing_ok=True)
        raise
    if not _is_dead(path, holder, claim):
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise BadInput(
            f"{path.parent}: {who} is already training here",
            f"Wait for it, or choose another --output_dir. A run that died is taken over after {SILENCE} seconds.",
        )
    write_json(path, claim)
    # Two may take over at once. The last to write keeps it, and the other one sees that a moment later.
    threading.Event().wait(1)
    if _read(path) != claim:
        raise BadInput(f"{path.parent}: another process has just begun to train here", "Choose another --output_dir.")


def _is_dead(path, holder, claim):
    """Return whether the run that holds the lock died without removing it."""
    # Compare two times of the disk: this machine's clock may differ.
    now = path.with_name(f"lock.json.{os.getpid()}.tmp")
    try:
        now.touch()
        if now.stat().st_mtime - path.stat().st_mtime > SILENCE:
            return True
    except FileNotFoundError:  # the run has just ended
        return True
    finally:
        now.unlink(missing_ok=True)
    if not holder:  # the lock is being written
        return False
    if holder["job"] and holder["job"] == claim["job"] and holder["restart"] < claim["restart"]:
        return True  # Slurm restarts a job only after its processes have ended
    is_here = all(holder.get(name) == claim[name] for name in ("host", "system"))
    return is_here and not psutil.pid_exists(holder["pid"])


def _system():
    """Return what tells apart the systems of one host name, each with process numbers of its own.

    They are Windows, its WSL distributions, and containers.
    """
    try:
        return f"{sys.platform} {os.readlink('/proc/self/ns/pid')}"
    except (OSError, AttributeError):  # not on Linux
        return sys.platform


def _read(path):
    """Return the content of a lock, or None if it is missing or invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if {"host", "pid", "job", "restart"} <= content.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _keep_heartbeat(path, claim, ended):
    """Touch the lock every few seconds; end the process at once if another run has taken it over."""
    while not ended.wait(HEARTBEAT):
        holder = _read(path)
        if holder not in (claim, None):  # this process was suspended for too long (a closed laptop, a stopped job)
            print(f"{path.parent}: another run has taken this folder over; leaving it", file=sys.stderr, flush=True)
            os._exit(1)
        with suppress(OSError):  # a short outage of a file server is no reason to end
            os.utime(path)
