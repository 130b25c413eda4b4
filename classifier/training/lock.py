"""One run per folder: a file that says which process trains here, and whose age says that it still does."""

import json
import os
import socket
import sys
import threading
from contextlib import contextmanager, suppress

import psutil

from classifier.files import write_json
from classifier.messages import BadInput

HEARTBEAT, SILENCE = 20, 90  # seconds between two signs of life; without one for how long a run counts as dead


@contextmanager
def locked(folder):
    """Hold the lock of a run's folder. Raises BadInput where another run holds it, or nothing can be written there."""
    path = folder / "lock.json"
    mine = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _take(path, mine)
    except OSError as error:
        _remove_empty(new)
        raise BadInput(f"{folder}: cannot be written ({error.strerror})", "Choose another --output_dir.") from None
    ended = threading.Event()
    beating = threading.Thread(target=_keep_heartbeat, args=(path, mine, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        _remove_empty(new)  # it failed before it wrote anything


def _remove_empty(folders):
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _take(path, mine):
    try:
        with open(path, "x", encoding="utf-8") as file:
            json.dump(mine, file)
        return
    except FileExistsError:
        holder = _read(path)
    except OSError:  # a full disk has room for its name
        path.unlink(missing_ok=True)
        raise
    if not _is_dead(path, holder, mine):
        who = f"process {holder['pid']} on {holder['host']}" if holder else "another process"
        raise BadInput(
            f"{path.parent}: {who} trains here",
            f"Wait for it, or choose another --output_dir. A run that died is taken over after {SILENCE} seconds.",
        )
    write_json(path, mine)
    # Two may take over at once. The last one to write stays; the other sees it after a moment.
    threading.Event().wait(1)
    if _read(path) != mine:
        raise BadInput(f"{path.parent}: another process has just begun to train here", "Choose another --output_dir.")


def _is_dead(path, holder, mine):
    """Return whether the run that holds the lock has ended without a word."""
    # Its time is that of the disk, whatever this machine's clock says.
    now = path.with_name(f"lock.json.{os.getpid()}.tmp")
    try:
        now.touch()
        if now.stat().st_mtime - path.stat().st_mtime > SILENCE:
            return True
    except FileNotFoundError:  # it has just ended
        return True
    finally:
        now.unlink(missing_ok=True)
    if not holder:  # it is being written just now
        return False
    if holder["job"] and holder["job"] == mine["job"] and holder["restart"] < mine["restart"]:
        return True  # Slurm restarts a job when its processes have ended
    return holder["host"] == mine["host"] and not psutil.pid_exists(holder["pid"])


def _read(path):
    """Return the content of a lock, or None where it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if {"host", "pid", "job", "restart"} <= content.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _keep_heartbeat(path, mine, ended):
    """Touch the lock every few seconds; leave at once where another run has taken it over."""
    while not ended.wait(HEARTBEAT):
        holder = _read(path)
        if holder not in (mine, None):  # this process stood still for too long (a closed laptop, a stopped job)
            print(f"{path.parent}: another run has taken this folder over; leaving it", file=sys.stderr, flush=True)
            os._exit(1)
        with suppress(OSError):  # a file server that is away for a moment is no reason to end
            os.utime(path)
