"""Parts of Windows, macOS and odd file systems, emulated on Linux: what a script does there, without being there.

Python imports a module of this name at its start. Choose what to emulate, separated by commas:

    PYTHONPATH=THIS_FOLDER EMULATE=text,names python train.py --task demo

    text      open() without encoding= is cp1252 (EMULATE_ENCODING), and text is written with \\r\\n, as on Windows;
              so are pipes at standard input and output
    open      a file or folder that is open or memory-mapped cannot be renamed, replaced or removed, as on Windows
    busy      the first rename to each name (like EMULATE_BUSY) fails, as while a virus scanner reads the new file
    names     names that Windows refuses: < > : " | ? * and controls, CON, NUL, a blank or dot last, 260 characters
    missing   modules and functions that Windows lacks: resource, os.sched_getaffinity, os.killpg, signal.SIGUSR1, ...
    clock     time.monotonic in ticks of 15.6 ms, as on Windows before Python 3.13
    spawn     worker processes start anew, as on Windows and macOS (and, nearly, on Linux from Python 3.14 on)
    backslash os.path.abspath turns / into \\ in the part of a path behind ::, as Windows does in all of it
    chmod     chmod is refused, as on /mnt/c under WSL, on network and FAT file systems
    fsync     fsync of a folder is refused (EINVAL), as on some network file systems
    symlink   symbolic and hard links are refused, as on Windows for ordinary users
    float64   Tensor.double() is refused, as for tensors on Apple's GPUs, which have no double precision
    mps       torch says that there is an Apple GPU; nothing runs on it: for what comes before the first tensor

EMULATE_LOCKED=*.csv,metrics.jsonl names files that another program opens as soon as they are there: then writing,
replacing and removing them fails. EMULATE_LOG=FILE notes each refusal with the line of the caller.

What it is not: only calls from Python are seen, none of the Rust and C++ below it (safetensors, pyarrow); os.linesep
stays \\n for the standard library's own writers; a mapped file counts as open, which Windows takes less strictly for
a rename.
"""

import builtins
import errno
import fnmatch
import io
import os
import sys
import time

WANTED = {name for name in os.environ.get("EMULATE", "").split(",") if name}
LOCKED = [pattern for pattern in os.environ.get("EMULATE_LOCKED", "").split(",") if pattern]
ENCODING = os.environ.get("EMULATE_ENCODING", "cp1252")
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{number}" for name in ("com", "lpt") for number in range(1, 10))}
real_open = io.open


def note(words):
    """Write a refusal, and who asked for it, to EMULATE_LOG."""
    if not (log := os.environ.get("EMULATE_LOG")):
        return
    frame, lines = sys._getframe(2), []
    while frame:
        lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    own = [line for line in lines if "site-packages" not in line and "/lib/python" not in line and __file__ not in line]
    with real_open(log, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"{os.getpid()} {words} at {own[0] if own else lines[0]}\n")


def before(module, name, check):
    """Call check(*arguments) before module.name(*arguments)."""
    real = getattr(module, name)

    def patched(*arguments, **options):
        check(*arguments, **options)
        return real(*arguments, **options)

    patched.__name__ = name
    setattr(module, name, patched)
    return real


# -------------------------------------------------------------------------------------------------------------- text


def open_as_on_windows(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **options):
    if "b" not in mode:
        if encoding in (None, "locale"):
            encoding = ENCODING
        if newline is None and set(mode) & set("wax+"):
            newline = "\r\n"
    return real_open(file, mode, buffering, encoding, errors, newline, *rest, **options)


def emulate_text():
    import locale

    io.open = builtins.open = open_as_on_windows
    locale.getpreferredencoding = lambda do_setlocale=True: ENCODING
    locale.getencoding = lambda: ENCODING
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "strict"), (sys.stderr, "backslashreplace")):
        if stream and not stream.isatty() and "PYTHONIOENCODING" not in os.environ:
            stream.reconfigure(encoding=ENCODING, errors=errors, newline=None if stream is sys.stdin else "\r\n")


# --------------------------------------------------------------------------------------------------- renames, removals


def in_use(path):
    """Return what this process or a child of it has open or mapped: the path, or something below it."""
    path = os.path.realpath(path)
    below = path + "/"
    try:
        with real_open(f"/proc/self/task/{os.getpid()}/children") as file:
            processes = ["self", *file.read().split()]
    except OSError:
        processes = ["self"]
    if (os.getcwd() + "/").startswith(below):
        return "the working folder"
    for process in processes:
        try:
            names = os.listdir(f"/proc/{process}/fd")
        except OSError:
            continue
        for name in names:
            try:
                target = os.readlink(f"/proc/{process}/fd/{name}")
            except OSError:
                continue
            if target == path or target.startswith(below):
                return f"open: {target}"
        with real_open(f"/proc/{process}/maps", errors="replace") as file:
            for line in file:
                target = line.rstrip("\n")[73:] if len(line) > 73 else ""
                if target == path or target.startswith(below):
                    return f"mapped: {target}"
    return None


def located(path, dir_fd=None):
    if isinstance(path, int):
        return None
    path = os.fsdecode(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path) if dir_fd is not None else path


def refuse_in_use(*paths):
    for path in paths:
        if path and os.path.lexists(path) and (words := in_use(path)):
            note(f"refused: {path} is {words}")
            raise PermissionError(errno.EACCES, "The process cannot access the file, it is being used", path)


seen = set()


def refuse_first(*paths):
    """Refuse each target once."""
    path = paths[-1]
    is_meant = path and fnmatch.fnmatch(os.path.basename(path), os.environ.get("EMULATE_BUSY", "*"))
    if is_meant and path not in seen and os.path.lexists(paths[0]):
        seen.add(path)
        note(f"refused once: {path}")
        raise PermissionError(errno.EACCES, "Access is denied", path)


def refuse_locked(*paths):
    for path in paths:
        if (
            path
            and os.path.lexists(path)
            and any(fnmatch.fnmatch(os.path.basename(path), pattern) for pattern in LOCKED)
        ):
            note(f"refused, locked: {path}")
            raise PermissionError(errno.EACCES, "Permission denied", path)


def watch_renames(refuse, removals=True):
    import shutil

    shutil._use_fd_functions = False  # as on Windows, where there are no folder descriptors

    def of_two(source, target, *, src_dir_fd=None, dst_dir_fd=None):
        refuse(located(source, src_dir_fd), located(target, dst_dir_fd))

    def of_one(path, *, dir_fd=None):
        refuse(located(path, dir_fd))

    for name in ("replace", "rename"):
        before(os, name, of_two)
    for name in ("unlink", "remove", "rmdir") if removals else ():
        before(os, name, of_one)


# -------------------------------------------------------------------------------------------------------------- names


def refuse_name(path):
    if isinstance(path, int):
        return
    path = os.fsdecode(path)
    if path.startswith(("/proc", "/sys", "/dev")):
        return
    for part in path.split("/"):
        flaw = next((mark for mark in part if mark in '<>:"|?*' or ord(mark) < 32), None)
        if flaw or part.split(".")[0].strip().lower() in RESERVED or (part.strip(".") and part[-1:] in (" ", ".")):
            note(f"refused, name: {path}")
            raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect", path)
    if len(os.path.abspath(path)) >= 260:
        note(f"refused, {len(os.path.abspath(path))} characters: {path}")
        raise FileNotFoundError(errno.ENOENT, "The system cannot find the path specified", path)


def emulate_names():
    opened = io.open

    def checked(file, *arguments, **options):
        refuse_name(file)
        return opened(file, *arguments, **options)

    io.open = builtins.open = checked
    for name in ("mkdir", "open"):
        before(os, name, lambda path, *_, **__: refuse_name(path))
    for name in ("replace", "rename"):
        before(os, name, lambda source, target, **_: refuse_name(target))


# ---------------------------------------------------------------------------------------------------- what is not there


def emulate_missing():
    import signal

    real_import = builtins.__import__

    def import_(name, variables=None, *rest, **more):
        caller = (variables or {}).get("__file__") or ""
        if name == "resource" and "site-packages" not in caller:  # libraries have other branches on Windows
            raise ModuleNotFoundError("No module named 'resource'", name="resource")
        return real_import(name, variables, *rest, **more)

    builtins.__import__ = import_
    for module, names in (
        (os, ("sched_getaffinity", "sched_setaffinity", "sync", "killpg", "getpgid", "getloadavg")),
        (signal, ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGALRM", "setitimer")),
    ):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)


def emulate_clock():
    tick, real = 1 / 64, time.monotonic
    time.monotonic = lambda: real() // tick * tick


def emulate_spawn():
    import multiprocessing

    multiprocessing.set_start_method("spawn")


def emulate_backslash():
    real = os.path.abspath

    def abspath(path):
        path, mark, member = os.fspath(real(path)).partition("::")
        return path + mark + member.replace("/", "\\")

    os.path.abspath = abspath


def emulate_chmod():
    def refuse(path, *_, **__):
        note(f"refused: chmod of {path}")
        raise PermissionError(errno.EPERM, "Operation not permitted", os.fspath(path))

    before(os, "chmod", refuse)


def emulate_fsync():
    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            note(f"refused: fsync of {os.readlink(f'/proc/self/fd/{descriptor}')}")
            raise OSError(errno.EINVAL, "Invalid argument")

    before(os, "fsync", refuse)


def emulate_symlink():
    def refuse(source, target, *_, **__):
        note(f"refused: a link {target} to {source}")
        raise OSError(errno.EPERM, "A required privilege is not held by the client", os.fspath(target))

    for name in ("symlink", "link"):
        before(os, name, refuse)


def after_torch(patch):
    """Call patch(torch) once torch is complete, as accelerate is imported."""
    from importlib.abc import MetaPathFinder

    class Finder(MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "accelerate" and "torch" in sys.modules:
                sys.meta_path.remove(self)
                patch(sys.modules["torch"])
            return None

    sys.meta_path.insert(0, Finder())


def emulate_float64():
    def patch(torch):
        def double(self, *arguments, **options):
            note("double precision of a tensor")
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

        torch.Tensor.double = double

    after_torch(patch)


def emulate_mps():
    def patch(torch):
        torch.accelerator.is_available = lambda: True
        torch.accelerator.current_accelerator = lambda *_, **__: torch.device("mps")

    after_torch(patch)


if "text" in WANTED:
    emulate_text()
if "names" in WANTED:
    emulate_names()
if "open" in WANTED:
    watch_renames(refuse_in_use)
if "busy" in WANTED:
    watch_renames(refuse_first, removals=False)
if LOCKED:
    watch_renames(refuse_locked)
    opened = io.open

    def open_unless_locked(file, mode="r", *arguments, **options):
        if not isinstance(file, int) and set(mode) & set("wax+"):
            refuse_locked(os.fsdecode(file))
        return opened(file, mode, *arguments, **options)

    io.open = builtins.open = open_unless_locked
for name in ("missing", "clock", "spawn", "backslash", "chmod", "fsync", "symlink", "float64", "mps"):
    if name in WANTED:
        globals()[f"emulate_{name}"]()
