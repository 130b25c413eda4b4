"""The table of precision and threads, for hardware that is not here: plain values in, a choice and its words out."""

import os
import subprocess
import sys

import psutil
import pytest
import torch
from conftest import ROOT

from classifier import processes
from classifier.messages import BadInput

NOTHING = set()
ZEN4 = {"avx512f", "avx512_bf16"}


@pytest.mark.parametrize(
    ("name", "device", "capability", "flags", "expected"),
    [
        ("P100", "cuda", (6, 0), NOTHING, "no"),
        ("GTX 1080", "cuda", (6, 1), NOTHING, "no"),
        ("V100", "cuda", (7, 0), NOTHING, "fp16"),
        ("T4", "cuda", (7, 5), NOTHING, "fp16"),
        ("T4 in a host with bf16", "cuda", (7, 5), ZEN4, "fp16"),
        ("A100", "cuda", (8, 0), NOTHING, "bf16"),
        ("RTX 3090", "cuda", (8, 6), NOTHING, "bf16"),
        ("L4", "cuda", (8, 9), NOTHING, "bf16"),
        ("H100", "cuda", (9, 0), NOTHING, "bf16"),
        ("B200", "cuda", (10, 0), NOTHING, "bf16"),
        ("MI100", "rocm", (9, 0), NOTHING, "bf16"),
        ("MI250", "rocm", (9, 0), NOTHING, "bf16"),
        ("MI300X", "rocm", (9, 4), NOTHING, "bf16"),
        ("RX 6900", "rocm", (10, 3), NOTHING, "no"),
        ("RX 7900", "rocm", (11, 0), NOTHING, "bf16"),
        ("Apple M3", "mps", None, NOTHING, "no"),
        ("a device without a row", "xpu", None, NOTHING, "no"),
        ("Zen 4", "cpu", None, ZEN4, "bf16"),
        ("Sapphire Rapids", "cpu", None, {"avx512f", "avx512_bf16", "amx_bf16"}, "bf16"),
        ("Graviton 3", "cpu", None, {"asimd", "sve", "bf16"}, "bf16"),
        ("Skylake: AVX-512 without bf16", "cpu", None, {"avx2", "avx512f"}, "no"),
        ("Graviton 2", "cpu", None, {"asimd"}, "no"),
        ("macOS, where flags are not read", "cpu", None, NOTHING, "no"),
    ],
)
def test_native_precision(name, device, capability, flags, expected):
    precision, words = processes.choose_precision("auto", None, device, capability, flags)
    assert precision == expected, name
    assert words.startswith(f"{expected} (")


@pytest.mark.parametrize(
    ("requested", "launcher", "device", "capability", "flags", "expected", "said"),
    [
        ("no", "bf16", "cuda", (8, 0), NOTHING, "no", "--mixed_precision"),
        ("fp16", "bf16", "cuda", (8, 0), NOTHING, "fp16", "--mixed_precision"),
        ("bf16", "fp16", "cpu", None, ZEN4, "bf16", "--mixed_precision"),
        ("bf16", "fp8", "cuda", (9, 0), NOTHING, "bf16", "--mixed_precision"),
        ("bf16", None, "cuda", (7, 5), NOTHING, "bf16", "not native on this device, 'fp16' is likely faster"),
        ("auto", "fp16", "cuda", (8, 0), NOTHING, "fp16", "from the launcher"),
        ("auto", "bf16", "cpu", None, NOTHING, "bf16", "not native on this device, 'no' is likely faster"),
        ("auto", "no", "cuda", (8, 0), NOTHING, "bf16", "--mixed_precision no if you meant it"),
        ("auto", "no", "mps", None, NOTHING, "no", "known to be faster on mps"),
        ("auto", "", "cpu", None, ZEN4, "bf16", "native on this CPU: avx512_bf16"),
        ("no", None, "cpu", None, ZEN4, "no", "--mixed_precision"),
    ],
)
def test_flag_then_launcher_then_hardware(requested, launcher, device, capability, flags, expected, said):
    precision, words = processes.choose_precision(requested, launcher, device, capability, flags)
    assert precision == expected
    assert said in words
    assert "\n" not in words


@pytest.mark.parametrize(
    ("requested", "launcher", "device", "reason", "advice"),
    [
        ("fp16", None, "cpu", "fp16 on a CPU (--mixed_precision): torch would", "use --mixed_precision bf16"),
        ("auto", "fp16", "cpu", "fp16 on a CPU (from the launcher): torch would", "use --mixed_precision bf16"),
        ("auto", "fp8", "cuda", "'fp8' from the launcher", "give --mixed_precision"),
        ("fp8", None, "cuda", "--mixed_precision fp8: unknown", "auto, no, fp16 and bf16"),
    ],
)
def test_refused_precisions(requested, launcher, device, reason, advice):
    with pytest.raises(ValueError) as error:
        processes.choose_precision(requested, launcher, device, (9, 0), ZEN4)
    first, second = str(error.value).split("\n")
    assert reason in first
    assert advice in second


@pytest.mark.parametrize(
    ("requested", "omp", "cores", "local_processes", "launched", "expected", "words"),
    [
        (3, "8", 64, 8, True, 3, "3 threads (--threads)"),
        (1, None, 2, 1, False, 1, "1 thread (--threads)"),
        (None, None, 2, 1, False, 2, "2 threads (2 cores / 1 process)"),
        (None, None, 64, 8, True, 8, "8 threads (64 cores / 8 processes)"),
        (None, None, 7, 2, True, 3, "3 threads (7 cores / 2 processes)"),
        (None, None, 2, 4, True, 1, "1 thread (2 cores / 4 processes)"),
        (None, "1", 1, 1, True, 1, "1 thread (1 core / 1 process)"),
        (None, "1", 2, 1, True, 2, "OMP_NUM_THREADS=1 was set by the launcher, --threads 1 if you meant it)"),
        (None, "1", 2, 1, False, 1, "1 thread (OMP_NUM_THREADS)"),
        (None, "4", 8, 1, True, 4, "4 threads (OMP_NUM_THREADS)"),
        (None, "4", 8, 4, True, 4, "4 threads (OMP_NUM_THREADS)"),
        (None, "4,2", 8, 1, True, 4, "4 threads (OMP_NUM_THREADS)"),
        # accelerate with use_cpu counts the cores of the host, not those the container may use.
        (None, "64", 2, 1, True, 2, "OMP_NUM_THREADS=64 was set by the launcher, --threads 64 if you meant it)"),
        (None, "64", 2, 1, False, 64, "64 threads (OMP_NUM_THREADS)"),
        (None, "", 2, 1, True, 2, "2 threads (2 cores / 1 process)"),
        (None, "all", 2, 1, False, 2, "OMP_NUM_THREADS='all' is not a number of threads"),
        (None, "0", 2, 1, False, 2, "OMP_NUM_THREADS='0' is not a number of threads"),
    ],
)
def test_threads(requested, omp, cores, local_processes, launched, expected, words):
    threads, text = processes.choose_threads(requested, omp, cores, local_processes, launched)
    assert threads == expected
    assert words in text


def test_threads_are_at_least_one():
    with pytest.raises(ValueError, match="--threads 0: at least 1"):
        processes.choose_threads(0, None, 2, 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx512_bf16\nbugs\t\t:\n\nprocessor\t: 1\nflags\t\t: other\n",
            {"fpu", "avx512_bf16"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor\t: 0\nhart\t\t: 0\nisa\t\t: rv64imafdc\n", set()),
    ],
)
def test_cpu_flags(tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert processes.cpu_flags(str(tmp_path / "cpuinfo")) == expected
    assert processes.cpu_flags(str(tmp_path / "missing")) == set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        # Version 2: the own group's limit, a parent's that is lower, none at all, and a path only the host knows.
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "0::/pod/job\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/job/cpu.max": "400000 100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000\n"}, 8),
        # Version 1: -1 is no limit; other controllers are not asked.
        (
            {
                "proc/self/cgroup": "3:cpuset:/\n1:cpu,cpuacct:/docker/abc\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        # Eight hardware threads on four cores.
        (
            {
                f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n % 4},{n % 4 + 4}\n"
                for n in range(8)
            },
            4,
        ),
    ],
)
def test_available_cores(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert processes.available_cores(str(tmp_path)) == expected


def test_available_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None if logical else 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    assert processes.available_cores() == 5  # two threads of a core are one
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: None)
    assert processes.available_cores() == 10
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert processes.available_cores() == 1


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallelism"),
    ],
)
def test_what_the_launcher_offers_and_the_scripts_cannot_do_is_refused(variable, name):
    processes.check_launcher({variable: "false"})
    with pytest.raises(BadInput, match=f"the launcher was told to use {name}, ") as refused:
        processes.check_launcher({variable: "true"})
    assert "answer no in `accelerate config`" in refused.value.advice


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch can use a GPU")
def test_a_gpu_that_this_build_of_torch_cannot_use_is_said(tmp_path):
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    script = "from types import SimpleNamespace; from classifier import processes; "
    script += "processes.start(SimpleNamespace(mixed_precision='no', threads=1))"
    said = []
    for path in (os.environ["PATH"], f"{tmp_path}:{os.environ['PATH']}"):
        variables = {**os.environ, "PATH": path}
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        said.append("THERE IS AN NVIDIA GPU, AND THIS BUILD OF TORCH CANNOT USE IT" in done.stdout)
    assert said == [False, True]


def test_what_a_pipe_cannot_encode_is_escaped():
    script = "from classifier import processes; processes.run(lambda: print('label 好 é'))"
    variables = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, env=variables)
    assert (done.returncode, done.stdout) == (0, b"label \\u597d \xe9\n"), done.stderr


@pytest.mark.parametrize(
    ("loadavg", "cores", "variables", "expected"),
    [
        ("0.00 0.00 0.00 1/98 4768", 4, {}, False),  # this process alone
        ("3.53 2.83 1.56 2/98 4768", 4, {}, True),
        ("9.00 9.00 9.00 1/98 4768", 4, {}, False),  # what was busy is over
        ("0.00 0.00 0.00 4/98 4768", 4, {"LOCAL_WORLD_SIZE": "4"}, False),  # its siblings
        ("0.00 0.00 0.00 5/98 4768", 4, {"LOCAL_WORLD_SIZE": "4"}, True),
        ("0.00 0.00 0.00 3/98 4768", 2, {}, False),  # two others, on two cores that are left
        ("0.00 0.00 0.00 4/98 4768", 2, {}, True),
        ("0.00 0.00 0.00 9/98 4768", 4, {"OMP_WAIT_POLICY": "ACTIVE"}, False),
        ("0.00 0.00 0.00 9/98 4768", 4, {"GOMP_SPINCOUNT": "1000"}, False),
        (None, 4, {}, False),  # not Linux
    ],
)
def test_a_busy_machine_is_noticed(tmp_path, monkeypatch, loadavg, cores, variables, expected):
    if loadavg is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/loadavg").write_text(loadavg)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(processes, "available_cores", lambda root: cores)
    assert processes.is_busy(variables, tmp_path) == expected


def test_threads_sleep_beside_a_busy_process(tmp_path):
    """As a user sees it: the log says so, and libgomp reads it when torch is imported."""
    script = "import os, sys; from classifier import processes\n"
    script += "processes.is_busy = lambda: True\n"
    script += "processes.run(lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "PASSIVE False\n", done.stderr


def test_a_script_without_an_accelerator_ends_at_once():
    processes.finish(None)


def test_this_machine():
    assert 1 <= processes.available_cores() <= os.cpu_count()
