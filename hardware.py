"""What this machine does best: threads and precision, chosen by pure functions from plain values.

Nothing here imports torch. The scripts pass in what they see (device, compute capability, CPU flags, environment), so
that the table is tested for hardware that the tests do not run on. Every choice comes with words for one log line.
"""

import math
import os
from pathlib import Path, PurePosixPath

# CPUs that multiply matrices in bf16: x86 as /proc/cpuinfo spells it, then Arm. Having AVX-512 alone is not enough:
# there oneDNN emulates bf16.
CPU_BF16_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")


def choose_threads(
    requested: int | None,
    omp_num_threads: str | None,
    available_cores: int,
    local_processes: int,
    launched: bool = True,
) -> tuple[int, str]:
    """Threads for torch in this process, and in words where the number came from.

    `--threads`, else OMP_NUM_THREADS, else the cores this process may use divided by the processes on this machine.
    A launcher sets OMP_NUM_THREADS when nobody did: torchrun (2 processes or more) and accelerate to 1, accelerate with
    `use_cpu` to the cores of the whole machine, whatever a container or a job scheduler allows. So under a launcher
    (`launched`: ACCELERATE_MIXED_PRECISION or TORCHELASTIC_RUN_ID is in the environment) only a value above 1 and up to
    `available_cores` counts as somebody's wish.

    Raises ValueError if `requested` is below 1.
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


def choose_precision(
    requested: str,
    launcher: str | None,
    device: str,
    capability: tuple[int, int] | None,
    cpu_flags: set[str],
) -> tuple[str, str]:
    """Mixed precision `no`, `fp16` or `bf16`, and in words where it came from.

    `requested` is --mixed_precision (`auto` leaves the choice to the rest), `launcher` is ACCELERATE_MIXED_PRECISION,
    `device` a torch device type, `rocm` for CUDA devices of a torch built for ROCm (torch.version.hip), `capability`
    torch.cuda.get_device_capability() (None where there is none). The first that says something wins: our flag, the
    launcher, the hardware. The launcher's `no` says nothing: it is also what it sends when nobody chose.

    Raises ValueError (a line of reason, a line of advice) for fp16 on a CPU, fp8, and names that are none of these.
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


def native_precision(device: str, capability: tuple[int, int] | None, cpu_flags: set[str]) -> tuple[str, str]:
    """The 16-bit type the hardware multiplies matrices in, `no` without one, and why.

    By capability and flags, never by torch's is_bf16_supported(), which is True where bf16 is emulated
    (https://github.com/pytorch/pytorch/issues/148322).
    """
    if device == "cpu":
        flags = [flag for flag in CPU_BF16_FLAGS if flag in cpu_flags]
        return ("bf16", f"native on this CPU: {flags[0]}") if flags else ("no", "no native bf16 products on this CPU")
    if device in ("cuda", "rocm") and capability is not None:
        major, minor = capability
        if device == "cuda":
            # Ampere (8.0) brought bf16 to the tensor cores, Volta and Turing (7.x) have fp16 only.
            precision = "bf16" if major >= 8 else "fp16" if major == 7 else "no"
        else:
            # gfx90a (MI200) reports 9.0, MI300 9.4, RDNA 3 and 4 11.x and 12.x; RDNA 1 and 2 (10.x) lack bf16 products.
            # MI100 reports 9.0 too and has them at half the rate; so does MI50, which has none: it needs the flag.
            precision = "bf16" if major == 9 or major >= 11 else "no"
        found = "native on" if precision != "no" else "no native 16-bit matrix products on"
        return precision, f"{found} {device} {major}.{minor}"
    return "no", f"no 16-bit type is known to be faster on {device}"


def asked_for_more_processes(environment: dict[str, str]) -> bool:
    """Return whether `accelerate launch` was asked for several processes, but started one.

    Its one-process launcher sets the meeting point only where more than one process was asked for, and no world size.
    """
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    launched_alone = "ACCELERATE_MIXED_PRECISION" in environment and not any(name in environment for name in sizes)
    return launched_alone and environment.get("MASTER_ADDR") == "127.0.0.1" and "MASTER_PORT" in environment


def cpu_flags(cpuinfo: str = "/proc/cpuinfo") -> set[str]:
    """Instruction-set flags of the first CPU, as Linux spells them; empty on other systems."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() in ("flags", "Features"):  # x86, Arm
                    return set(value.split())
    except OSError:
        pass
    return set()


def available_cores(root: str = "/") -> int:
    """Physical cores this process may use: its CPU affinity, and the CPU time its control groups allow; at least 1.

    Two hardware threads of one core share its multipliers, so they count once. Outside Linux: the logical CPUs.
    `root` is where proc and sys are found, for tests.
    """
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    topology = Path(root, "sys/devices/system/cpu")
    allowed = os.sched_getaffinity(0)
    cores = {_read(topology / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    # Rounded up: with a quota of 1.5, two throttled threads get more done than one.
    return max(1, math.ceil(min(len(cores), _cgroup_quota(Path(root)))))


def _cgroup_quota(root: Path) -> float:
    """CPU seconds per second that the control groups of this process allow, infinity without a limit.

    Limits of all parents apply. A container may show its path as the host sees it: what is not there is passed over.
    Sources, in the kernel's Documentation: admin-guide/cgroup-v2.rst (cpu.max), scheduler/sched-bwc.rst (version 1).
    """
    quota = math.inf
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        for group in [PurePosixPath(path), *PurePosixPath(path).parents]:
            folder = mount / str(group).lstrip("/")
            if controllers:
                limit = [_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")]
            else:
                limit = _read(folder / "cpu.max").split()
            # "max" and -1 mean unlimited.
            if len(limit) == 2 and all(number.isdecimal() for number in limit):
                quota = min(quota, int(limit[0]) / int(limit[1]))
    return quota


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _count(number: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural if number != 1 else ''}"
