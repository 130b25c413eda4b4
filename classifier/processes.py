"""The processes of a script: start, agree, end, exit codes; and the precision and threads that suit the hardware.

The choice of precision and threads is a pure table of plain values, without torch, so that it is tested for hardware
that the tests do not run on.
"""

import ctypes
import gc
import logging
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path, PurePosixPath

import psutil

from classifier.messages import BadInput, Preempted, RunFailed, in_red, log

# Makes torch ask for memory in pages of 2 MB, of which a CPU has to fetch fewer. See also keep_freed_memory.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# Without links, as on Windows, the cache holds copies, and huggingface_hub says so in six lines.
os.environ.setdefault("HF_HUB_DISABLE_SYMLINKS_WARNING", "1")

# What `accelerate config` offers and these scripts cannot do: checkpoints that resume to the same numbers need whole
# weights in every process, and a step that is computed as it is written.
UNSUPPORTED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}

# CPU flags of native bf16 matrix products, on x86 and Arm. With plain AVX-512, oneDNN only emulates them.
CPU_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


# -------------------------------------------------------------------------------------------------------- start to end


def run(main):
    """Call main() and exit with 0, or with the code of what it raised: 2 bad input, 75 preempted, 1 anything else.

    main returns its Accelerator, or None. Its processes end here, once no variable of main refers to the model.
    """
    script = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal or a pipe cannot encode is escaped, not lost
            stream.reconfigure(errors="backslashreplace")
    if is_busy():
        # Read when torch is imported. Spinning would keep a core from the thread that is waited for (RESULTS.md).
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # Imports create millions of permanent objects; searching them for garbage again and again takes 0.6 s. load_model
    # turns the garbage collector on again, after the last import.
    gc.disable()
    try:
        empty = next((word for word in sys.argv[1:] if word == "" or (word[:2] == "--" and word[-1] == "=")), None)
        if empty is not None:
            raise BadInput(f"an argument is empty: {' '.join(map(repr, sys.argv[1:]))}", "Is a shell variable not set?")
        finish(main())
        return
    except BadInput as error:
        code, message = 2, f"{script}: error: {error.reason}\n{script}: {error.advice}"
    except (FloatingPointError, RunFailed) as error:
        code, message = 1, f"{script}: error: {error}"
    except Preempted as error:
        code, message = 75, f"{script}: {error}"
    except KeyboardInterrupt:
        code, message = 1, f"\n{script}: interrupted"
    finally:
        gc.enable()
    # All processes find the same mistake. Rank 0 reports it, and the launcher ends the others while they wait here; a
    # process that fails alone reports after the wait. Being ended by the launcher is not worth a message.
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if is_first or code != 75:
        print(message, file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The process group is still up, and its threads would abort an ordinary exit and hide the exit code.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def start(args, stream=None, **accelerator_options):
    """Return this process's Accelerator, with precision and threads chosen and libraries quiet.

    The main process logs to `stream` (default: standard output), the others log errors only. Raises BadInput for a
    precision that the device lacks, and where the launcher's processes form no group.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import GradientAccumulationPlugin

    quieten_libraries()
    environment = os.environ
    check_launcher(environment)
    device = "cpu" if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes") else best_device()
    leaves_gpu = device == "mps" and int(environment.get("WORLD_SIZE", "1")) > 1
    if leaves_gpu:
        device = "cpu"
    elif device == "mps":  # by default it may take 1.7 times what the machine recommends, and swaps
        torch.mps.set_per_process_memory_fraction(1.0)
    if device == "cpu":
        keep_freed_memory()
    capability = torch.cuda.get_device_capability() if device in ("cuda", "rocm") else None
    launcher_precision = environment.get("ACCELERATE_MIXED_PRECISION")
    try:
        precision, precision_text = choose_precision(
            args.mixed_precision, launcher_precision, device, capability, cpu_flags()
        )
        threads, threads_text = choose_threads(
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
        # Only a plugin overrides the launcher's accumulation: --batch_size alone is the size of a step.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        **accelerator_options,
    )
    torch.set_num_threads(threads)
    log_to(stream or sys.stdout, logging.INFO if accelerator.is_main_process else logging.ERROR)
    check_processes(accelerator.num_processes)
    number = _count(accelerator.num_processes, "process")
    if environment.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
        threads_text += ", which sleep while they wait (OMP_WAIT_POLICY)"
    log.info(f"{accelerator.device.type}, {number}, precision {precision_text}, {threads_text}")
    if device == "cpu" and torch.version.cuda is None and shutil.which("nvidia-smi"):
        advice = "Install torch's CUDA build: see pytorch.org."
        log.warning(in_red(f"WARNING: THERE IS AN NVIDIA GPU, AND THIS BUILD OF TORCH CANNOT USE IT. {advice}"))
    if leaves_gpu:
        log.info("several processes take the CPU: on Apple's GPUs they cannot communicate")
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        log.warning(
            f"WARNING: the launcher's dynamo backend {backend} compiles the model for each new shape of a batch: the "
            "first steps take minutes. Answer no in `accelerate config`."
        )
    accumulation = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if accumulation != "1":
        log.info(
            f"the launcher's gradient_accumulation_steps={accumulation} is ignored: --batch_size is the size of a "
            "step, --micro_batch_size splits it"
        )
    return accelerator


def quieten_libraries():
    """Silence the libraries' progress bars and load reports; their errors stay."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else tokenizers warns in workers, and uses one core
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def best_device():
    """Return the device that torch would use: "cuda", "rocm", "mps", "cpu", ..."""
    import torch

    if not torch.accelerator.is_available():
        return "cpu"
    kind = torch.accelerator.current_accelerator().type
    return "rocm" if kind == "cuda" and torch.version.hip else kind


def keep_freed_memory():
    """Let glibc keep freed tensors' memory for the next ones: new memory from the system costs up to a quarter of a
    step (benchmarks/RESULTS.md).

    See mallopt(3) in Linux's manual. Other C libraries have no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing goes back to the system
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: tensors up to 1 GiB share the memory that is kept


def log_to(stream, level=logging.INFO):
    """Send the log lines of this process to a stream."""
    log.handlers = [logging.StreamHandler(stream)]
    log.setLevel(level)
    log.propagate = False


def check_launcher(environment):
    """Raise BadInput where the launcher was told to use what these scripts cannot."""
    for variable, name in UNSUPPORTED.items():
        if environment.get(variable, "").lower() in ("1", "true", "yes"):
            raise BadInput(
                f"the launcher was told to use {name}, with which a run could not resume, nor give the same numbers",
                "Launch with --config_file accelerate_configs/multi_gpu.yaml, or answer no in `accelerate config`.",
            )


def check_processes(number):
    """Raise BadInput unless the launcher started, and meant to start, one group of `number` processes."""
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


def on_main_process(accelerator, function, *arguments):
    """Call a function on the main process only; return its result, or raise its BadInput, on all processes."""
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


def is_out_of_memory(error):
    """Return whether an exception says that memory ran out, on any device and system."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, RuntimeError):  # accelerate does not know the words of Windows
        return "not enough memory" in str(error) or should_reduce_batch_size(error)
    return isinstance(error, MemoryError)


def finish(accelerator):
    """End the processes. Without these calls in this order, a third of two-process gloo runs abort on exit."""
    if accelerator is None:
        return
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


# ----------------------------------------------------------------------------------------------- precision and threads


def choose_precision(requested, launcher, device, capability, cpu_flags):
    """Return (mixed precision: no, fp16 or bf16; the same with its source, for the log).

    The first of these decides: `requested` unless auto; `launcher` unless no, which is also its default; the hardware.
    device: a torch device type, or rocm; capability: CUDA's, or None. Raises ValueError, "reason\\nadvice".
    """
    if requested not in ("auto", "no", "fp16", "bf16"):
        raise ValueError(f"--mixed_precision {requested}: unknown\nallowed are auto, no, fp16 and bf16")
    native, native_source = native_precision(device, capability, cpu_flags)
    if requested != "auto":
        precision, source = requested, "--mixed_precision"
    elif launcher in ("fp16", "bf16"):
        precision, source = launcher, "from the launcher"
    elif launcher in (None, "", "no"):
        precision, source = native, native_source
        if launcher == "no" and native != "no":
            source += "; the launcher's 'no' is also its default, --mixed_precision no if you meant it"
    else:
        raise ValueError(
            f"mixed precision {launcher!r} from the launcher: these scripts know no, fp16 and bf16\n"
            "choose one of these in the launcher's configuration, or give --mixed_precision"
        )
    if precision == "fp16" and device == "cpu":
        raise ValueError(
            f"fp16 on a CPU ({source}): torch would silently compute in fp32\n"
            f"use --mixed_precision {native}, the best on this CPU"
        )
    if (precision == "bf16" and native != "bf16") or (precision == "fp16" and native == "no"):
        source += f"; not native on this device, {native!r} is likely faster"
    return precision, f"{precision} ({source})"


def native_precision(device, capability, cpu_flags):
    """Return (the 16-bit type in which the hardware multiplies matrices, or no; the reason).

    Not torch's is_bf16_supported(): it is True where bf16 is emulated (github.com/pytorch/pytorch/issues/148322).
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
        # MI100 reports 9.0 too and has them at half the rate. So does MI50, which has none and needs the flag.
        precision = "bf16" if major == 9 or major >= 11 else "no"
    support = "native on" if precision != "no" else "no native 16-bit matrix products on"
    return precision, f"{support} {device} {major}.{minor}"


def choose_threads(requested, omp_num_threads, available_cores, local_processes, launched=True):
    """Return (threads of torch in this process, the same with its source, for the log). Raises ValueError.

    --threads, else OMP_NUM_THREADS, else this process's part of the cores. Launchers set OMP_NUM_THREADS where nobody
    did: to 1, or (accelerate with `use_cpu`) to the cores of the machine, whatever a container allows. So if
    `launched`, only a value above 1 and up to `available_cores` counts as the user's.
    """
    if requested is not None:
        if requested < 1:
            raise ValueError(f"--threads {requested}: at least 1 is needed\nleave it out to use all available cores")
        return requested, f"{_count(requested, 'thread')} (--threads)"
    # OpenMP allows a list, one number per level of nesting ("4,1"); torch uses the first.
    first = (omp_num_threads or "").split(",")[0].strip()
    wanted = int(first) if first.isdecimal() else 0
    if wanted >= 1 and (not launched or 1 < wanted <= available_cores):
        return wanted, f"{_count(wanted, 'thread')} (OMP_NUM_THREADS)"
    threads = max(1, available_cores // local_processes)
    source = f"{_count(available_cores, 'core')} / {_count(local_processes, 'process')}"
    if wanted >= 1 and wanted != threads:
        source += f"; OMP_NUM_THREADS={wanted} was set by the launcher, --threads {wanted} if you meant it"
    elif omp_num_threads and wanted < 1:
        source += f"; OMP_NUM_THREADS={omp_num_threads!r} is not a number of threads"
    return threads, f"{_count(threads, 'thread')} ({source})"


def asked_for_more_processes(environment):
    """Return whether `accelerate launch` was asked for several processes, but started one."""
    # Its one-process launcher sets a rendezvous address only if more than one was asked for, and never a world size.
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched_alone = "ACCELERATE_MIXED_PRECISION" in environment and not any(name in environment for name in sizes)
    return launched_alone and environment.get("MASTER_ADDR") == "127.0.0.1" and "MASTER_PORT" in environment


def cpu_flags(cpuinfo="/proc/cpuinfo"):
    """Return the instruction-set flags of the first CPU, as Linux spells them; an empty set on other systems.

    Not torch.cpu.get_capabilities(), which also reports bf16 on Apple's CPUs, where it has not been tried.
    """
    for line in _read(Path(cpuinfo)).splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return set(value.split())
    return set()


def available_cores(root="/"):
    """Return the physical cores that affinity and cgroups allow this process, at least 1 (`root`: for tests)."""
    if not hasattr(os, "sched_getaffinity"):  # outside Linux
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cpus = Path(root, "sys/devices/system/cpu")
    # Two hardware threads share one core's multipliers, so they count once.
    cores = {_read(cpus / f"cpu{cpu}/topology/thread_siblings_list") or cpu for cpu in os.sched_getaffinity(0)}
    # Rounded up: with a quota of 1.5, two throttled threads get more done than one.
    return max(1, math.ceil(min(len(cores), _cgroup_quota(Path(root)))))


def is_busy(environment=os.environ, root="/"):
    """Return whether other processes compute on the cores that this one and its local siblings would use.

    False where that is not known (outside Linux), and where a variable says how threads wait. root: for tests.
    """
    if any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        return False
    ours = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    unused_cores = (os.cpu_count() or 1) - available_cores(root)
    for pause in (0, 0.005, 0.005):  # three times: a process that wakes up for a moment is no load
        time.sleep(pause)
        fields = _read(Path(root, "proc/loadavg")).split()  # "0.20 0.18 0.12 2/345 11206": 2 of 345 threads run
        running = int(fields[3].partition("/")[0]) if len(fields) > 3 else 0
        if running - ours <= unused_cores:
            return False
    return True


def _cgroup_quota(root):
    """Return the CPU seconds per second that this process's cgroups and their parents allow, else infinity."""
    # In Linux's documentation: admin-guide/cgroup-v2.rst (cpu.max), scheduler/sched-bwc.rst (version 1).
    quota = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for group in [PurePosixPath(path), *PurePosixPath(path).parents]:
            folder = mount / str(group).lstrip("/")  # a container may show the host's path, which it does not have
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
