"""What this machine does best: threads and precision, each with words for one log line.

Pure functions of plain values, without torch: so they are tested for hardware that the tests do not run on.
"""

import ctypes
import gc
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path, PurePosixPath

from classifier.messages import BadInput, Preempted, RunFailed, log

# torch then asks for memory in pages of 2 MB, of which a CPU has fewer to get: see keep_freed_memory for the rest.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Flags of CPUs that multiply matrices in bf16, of x86 and of Arm; with AVX-512 alone, oneDNN only emulates it.
CPU_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


def choose_threads(requested, omp_num_threads, available_cores, local_processes, launched=True):
    """Return (threads for torch in this process, where the number came from in words).

    --threads, else OMP_NUM_THREADS, else the cores of this process. Launchers set OMP_NUM_THREADS when nobody did: to
    1, or (accelerate with `use_cpu`) to the cores of the whole machine, whatever a container allows. So when `launched`
    only a value above 1 and up to `available_cores` counts as somebody's wish.
    """
    if requested is not None:
        if requested < 1:
            raise ValueError(f"--threads {requested}: at least 1 is needed\nleave it out to use the cores there are")
        return requested, f"{_count(requested, 'thread')} (--threads)"
    # OpenMP allows a list, one number per level of nesting ("4,1"); torch uses the first.
    first = (omp_num_threads or "").split(",")[0].strip()
    wanted = int(first) if first.isdecimal() else 0
    if wanted >= 1 and (not launched or 1 < wanted <= available_cores):
        return wanted, f"{_count(wanted, 'thread')} (OMP_NUM_THREADS)"
    threads = max(1, available_cores // local_processes)
    words = f"{_count(available_cores, 'core')} / {_count(local_processes, 'process')}"
    if wanted >= 1 and wanted != threads:
        words += f"; OMP_NUM_THREADS={wanted} was set by the launcher, --threads {wanted} if you meant it"
    elif omp_num_threads and wanted < 1:
        words += f"; OMP_NUM_THREADS={omp_num_threads!r} is not a number of threads"
    return threads, f"{_count(threads, 'thread')} ({words})"


def choose_precision(requested, launcher, device, capability, cpu_flags):
    """Return (mixed precision `no`, `fp16` or `bf16`, where it came from in words).

    The first that says something wins: `requested` unless `auto`, `launcher` unless `no` (which it also sends when
    nobody chose), the hardware. `device` is a torch device type, or `rocm`; `capability` that of CUDA, or None.
    """
    if requested not in ("auto", "no", "fp16", "bf16"):
        raise ValueError(f"--mixed_precision {requested}: unknown\nallowed are auto, no, fp16 and bf16")
    native, native_words = native_precision(device, capability, cpu_flags)
    if requested != "auto":
        precision, words = requested, "--mixed_precision"
    elif launcher in ("fp16", "bf16"):
        precision, words = launcher, "from the launcher"
    elif launcher in (None, "", "no"):
        precision, words = native, native_words
        if launcher == "no" and native != "no":
            words += "; the launcher's 'no' is also its default, --mixed_precision no if you meant it"
    else:
        raise ValueError(
            f"mixed precision {launcher!r} from the launcher: these scripts know no, fp16 and bf16\n"
            "choose one of these in the launcher's configuration, or give --mixed_precision"
        )
    if precision == "fp16" and device == "cpu":
        raise ValueError(
            f"fp16 on a CPU ({words}): torch would silently compute in fp32\n"
            f"use --mixed_precision {native}, the best on this CPU"
        )
    if precision == "bf16" and native != "bf16":
        words += f"; not native on this device, {native!r} is likely faster"
    return precision, f"{precision} ({words})"


def native_precision(device, capability, cpu_flags):
    """Return (the 16-bit type the hardware multiplies matrices in, or `no`; why, in words).

    Not by torch's is_bf16_supported(): it is True where bf16 is emulated (github.com/pytorch/pytorch/issues/148322).
    """
    if device == "cpu":
        flags = [flag for flag in CPU_BF16_FLAGS if flag in cpu_flags]
        return ("bf16", f"native on this CPU: {flags[0]}") if flags else ("no", "no native bf16 products on this CPU")
    if device not in ("cuda", "rocm") or capability is None:
        return "no", f"no 16-bit type is known to be faster on {device}"
    major, minor = capability
    if device == "cuda":  # Ampere (8.0) brought bf16 to the tensor cores, Volta and Turing (7.x) have fp16 only
        precision = "bf16" if major >= 8 else "fp16" if major == 7 else "no"
    else:
        # gfx90a (MI200) reports 9.0, MI300 9.4, RDNA 3 and 4 11.x and 12.x; RDNA 1 and 2 (10.x) lack bf16 products.
        # MI100 reports 9.0 too and has them at half the rate; so does MI50, which has none: it needs the flag.
        precision = "bf16" if major == 9 or major >= 11 else "no"
    found = "native on" if precision != "no" else "no native 16-bit matrix products on"
    return precision, f"{found} {device} {major}.{minor}"


def asked_for_more_processes(environment):
    """Return whether `accelerate launch` was asked for several processes, but started one."""
    # Its one-process launcher sets the meeting point only where more than one was asked for, and never a world size.
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched_alone = "ACCELERATE_MIXED_PRECISION" in environment and not any(name in environment for name in sizes)
    return launched_alone and environment.get("MASTER_ADDR") == "127.0.0.1" and "MASTER_PORT" in environment


def cpu_flags(cpuinfo="/proc/cpuinfo"):
    """Return the instruction-set flags of the first CPU, as Linux spells them; an empty set on other systems."""
    for line in _read(Path(cpuinfo)).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return set(value.split())
    return set()


def available_cores(root="/"):
    """Return the physical cores that affinity and control groups allow this process, at least 1 (`root`: for tests)."""
    if not hasattr(os, "sched_getaffinity"):  # outside Linux: the logical CPUs
        return os.cpu_count() or 1
    cpus = Path(root, "sys/devices/system/cpu")
    # Two hardware threads of one core share its multipliers, so they count once.
    cores = {_read(cpus / f"cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in os.sched_getaffinity(0)}
    # Rounded up: with a quota of 1.5, two throttled threads get more done than one.
    return max(1, math.ceil(min(len(cores), _cgroup_quota(Path(root)))))


def _cgroup_quota(root):
    """Return the CPU seconds per second that this process's control groups and their parents allow, else infinity."""
    # In Linux's documentation: admin-guide/cgroup-v2.rst (cpu.max), scheduler/sched-bwc.rst (version 1).
    quota = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for group in [PurePosixPath(path), *PurePosixPath(path).parents]:
            folder = mount / str(group).lstrip("/")  # a container may show the host's path: then it is not there
            if controllers:
                limit = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
            else:
                limit = _read(folder / "cpu.max").split()
            if len(limit) == 2 and all(number.isdecimal() for number in limit):  # "max" and -1 mean unlimited
                quota = min(quota, int(limit[0]) / int(limit[1]))
    return quota


def _read(path):
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _count(number, noun):
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural if number != 1 else ''}"


# --------------------------------------------------------------------------------------------------------- processes


def run(main):
    """Call main() and turn what it raises into an exit code: 2 with a reason and an advice for bad input, 1 else.

    main returns its accelerator, whose processes end here: once nothing in main refers to the model any more.
    """
    script = Path(sys.argv[0]).name
    # The libraries' imports make millions of objects that stay: to look for garbage among them, again and again, takes
    # 0.6 s. load_model, after the last of them, turns it on again.
    gc.disable()
    try:
        empty = next((word for word in sys.argv[1:] if word == "" or (word[:2] == "--" and word[-1] == "=")), None)
        if empty is not None:
            raise BadInput(f"an argument is empty: {' '.join(map(repr, sys.argv[1:]))}", "Is a shell variable not set?")
        finish(main())
        return
    except BadInput as error:
        code, words = 2, f"{script}: error: {error.reason}\n{script}: {error.advice}"
    except (FloatingPointError, RunFailed) as error:  # a run that diverged: which step and examples, and what to try
        code, words = 1, f"{script}: error: {error}"
    except Preempted as error:
        code, words = 75, f"{script}: {error}"
    except KeyboardInterrupt:
        code, words = 1, f"\n{script}: interrupted"
    finally:
        gc.enable()
    # Every process finds the same mistake. The first one says it, and the launcher ends the others while they wait
    # here; a process that fails alone gets to say it too. Being ended is no news of its own.
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if is_first or code != 75:
        print(words, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The process group is still up, and its threads would abort an ordinary exit and hide the code.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def start(args, stream=None, **accelerator_options):
    """Return the Accelerator for this process: precision and threads chosen, libraries quiet, processes counted.

    Log lines of the main process go to `stream` (standard output).
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    quieten_libraries()
    environment = os.environ
    device = "cpu" if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else best_device()
    if device == "cpu":
        keep_freed_memory()
    capability = torch.cuda.get_device_capability() if device in ("cuda", "rocm") else None
    launcher_precision = environment.get("ACCELERATE_MIXED_PRECISION")
    try:
        precision, precision_words = choose_precision(
            args.mixed_precision, launcher_precision, device, capability, cpu_flags()
        )
        threads, threads_words = choose_threads(
            args.threads,
            environment.get("OMP_NUM_THREADS"),
            available_cores(),
            int(environment.get("LOCAL_WORLD_SIZE", "1")),
            launched=launcher_precision is not None or "TORCHELASTIC_RUN_ID" in environment,
        )
    except ValueError as error:
        reason, _, advice = str(error).partition("\n")
        raise BadInput(reason, advice) from None
    accelerator = Accelerator(
        cpu=device == "cpu",  # without this, two processes on a machine without a GPU are both rank 0 of 1
        mixed_precision=precision,
        # A plugin is the one way to overrule the launcher: --batch_size alone says how large a step is.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        **accelerator_options,
    )
    torch.set_num_threads(threads)
    log_to(stream or sys.stdout, logging.INFO if accelerator.is_main_process else logging.ERROR)
    number = accelerator.num_processes
    check_processes(number)
    processes = f"{number} process{'es' if number > 1 else ''}"
    log.info(f"{accelerator.device.type}, {processes}, precision {precision_words}, {threads_words}")
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        log.info(
            f"the launcher's gradient_accumulation_steps={accumulation} is ignored: --batch_size is the size of a "
            "step, --micro_batch_size cuts it"
        )
    return accelerator


def log_to(stream, level=logging.INFO):
    """Send the log lines of this process to a stream."""
    log.handlers = [logging.StreamHandler(stream)]
    log.setLevel(level)
    log.propagate = False


def keep_freed_memory():
    """Let glibc keep what tensors give back for the next ones: fresh memory from the system costs up to a quarter of a
    step (benchmarks/RESULTS.md).

    See mallopt(3) in Linux's manual. Other C libraries have no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: tensors of up to 1 GiB share the memory that is kept


def check_processes(number):
    """Raise BadInput where a launcher started, or was to start, other than this number of processes as one group."""
    if asked_for_more_processes(os.environ):
        raise BadInput(
            "the launcher was asked for several processes, but started one (as accelerate does with --cpu, MULTI_CPU)",
            "Launch with --config_file accelerate_configs/multi_cpu.yaml or torchrun --nproc_per_node N; "
            "for one process, drop --num_processes and unset MASTER_ADDR.",
        )
    started = int(os.environ.get("WORLD_SIZE", number))
    if started != number:
        raise BadInput(
            f"the launcher started {started} processes, but each believes it is one of {number}",
            "Launch with: accelerate launch --config_file accelerate_configs/multi_cpu.yaml (or multi_gpu.yaml).",
        )


def best_device():
    """Return "cuda", "rocm", "mps", "cpu", ...: the device that torch would use."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator().type
    return "rocm" if kind == "cuda" and torch.version.hip else kind


def quieten_libraries():
    """Keep the libraries' progress bars and load reports off the terminal; their errors stay."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers warns in workers, and uses one core
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def on_main_process(accelerator, function, *arguments):
    """Call a function on the main process alone; return its answer on all of them, or raise its BadInput on all."""
    from accelerate.utils import broadcast_object_list

    answer = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = function(*arguments)
        except BadInput as error:
            answer[1] = (error.reason, error.advice)
    broadcast_object_list(answer)
    if answer[1]:
        raise BadInput(*answer[1])
    return answer[0]


def finish(accelerator):
    """End the processes. Without this order of calls, a third of 2-process runs on gloo abort at their very end."""
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
