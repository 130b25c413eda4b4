"""A device that computes on the CPU, for tests on machines without a GPU: `cuda`, `mps`, or any name of your own.

    PYTHONPATH=FOLDER_OF_THIS_FILE EMULATED_DEVICE=mps python train.py         # an unchanged program
    PYTHONPATH=FOLDER_OF_THIS_FILE EMULATED_DEVICE=npu ACCELERATE_TORCH_DEVICE=npu python train.py

torch itself loads this module, at the end of `import torch` (the entry point torch.backends beside it), in workers and
under launchers too. device.cpp is compiled once with g++, in 15 seconds, and kept in EMULATED_DEVICE_CACHE.

All refuse tensors of two devices. `mps` refuses what Apple's GPUs refuse: float64, operators without a kernel; and what
torch computes wrongly there. `cuda` has EMULATED_DEVICE_MEMORY bytes (80 GB) and native bf16. Others have no fused
AdamW; with EMULATED_DEVICE_NEW_PARAMETERS=1 a module that moves there gets new parameters, as torch has it where a
device's package does not say otherwise.

What it cannot tell: the numbers of a real device, its speed, what its kernels refuse by type or shape, what is read too
early. There is one device, and no communication between processes on it.
"""

import contextlib
import hashlib
import os
import re
import subprocess
import types
from pathlib import Path

SOURCE = Path(__file__).resolve().with_name("device.cpp")
NO_KERNEL = (
    "is not currently implemented for the MPS device (emulated). As a temporary fix, you can set the environment "
    "variable `PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op."
)
NO_FLOAT64 = (
    "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
    "Please use float32 instead."
)
# What torch 2.13 computes wrongly on MPS, without a word; here it is an error that ends with one of these words.
FAULTS = {
    "cast": "a copy to the CPU that changes the type of a view: https://github.com/pytorch/pytorch/issues/194344",
    "non_blocking": "may read memory that is free again: https://github.com/pytorch/pytorch/issues/189690",
    "scalar": "a view of the CPU with one element in arithmetic: https://github.com/pytorch/pytorch/issues/187117",
    "matmul": "sums of 32,767 products and more, on M1 and M2: https://github.com/pytorch/pytorch/issues/193487",
}
# What has kernels for MPS that native_functions.yaml does not name: MPSFallback.mm computes these on the CPU.
ON_THE_CPU = {"embedding_renorm_", "linalg_svd", "linalg_svd.U", "col2im", "upsample_nearest3d.vec"}
# Primitives here, whatever a device has.
PRIMITIVES = {"copy_", "_copy_from", "_copy_from_and_resize", "set_data"}


def autoload():
    """Called by torch: install the device that EMULATED_DEVICE names, if any."""
    if name := os.environ.get("EMULATED_DEVICE"):
        install(name)


def install(name):
    """Make a device of this name, once in a process."""
    import torch

    torch.ops.load_library(build())
    functions = torch.ops.emulated_device
    functions.become(name)
    if name == "mps":
        _become_mps(torch, functions)
    elif name == "cuda":
        _become_cuda(torch, functions)
    else:
        torch.utils.rename_privateuse1_backend(name)
        torch._register_device_module(name, _module(torch, functions, name))
        torch.utils.generate_methods_for_privateuse1_backend()
        functions.refuse(["aten::_fused_adamw_", "aten::_fused_adamw_.tensor_lr"], "has no kernel for it (emulated)")
        if os.environ.get("EMULATED_DEVICE_NEW_PARAMETERS") == "1":
            functions.replace_parameters()


def build():
    """Compile device.cpp for this torch, unless that was done before; return the path of the library."""
    import torch

    root = Path(torch.__file__).parent
    key = hashlib.sha256("\0".join([SOURCE.read_text(), torch.__version__, str(root)]).encode()).hexdigest()[:16]
    cache = Path(os.environ["EMULATED_DEVICE_CACHE"])
    library = cache / f"{key}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        made = cache / f"{key}.{os.getpid()}.tmp"
        include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
        options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", *include]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(made), *link], check=True)
        os.replace(made, library)
    return str(library)


def operators_without_mps(text):
    """Return the names (`aten::name.overload`) of operators that a table, native_functions.yaml, has nothing of for
    MPS: neither a kernel of its own nor one composed of others."""
    dispatch, delegates = {}, {}
    for block in re.split(r"^- func: ", text, flags=re.MULTILINE)[1:]:
        name = block[: block.index("(")]
        keys = re.findall(r"^    (\w[\w, ]*): ", block, flags=re.MULTILINE) if "\n  dispatch:" in block else None
        dispatch[name] = keys and {key for some in keys for key in some.split(", ")}
        if found := re.search(r"^  structured_delegate: (\S+)", block, flags=re.MULTILINE):
            delegates[name] = found[1]

    def is_known(name):
        keys = dispatch.get(delegates.get(name, name))
        return keys is None or "MPS" in keys or any(key.startswith("Composite") for key in keys)

    return [f"aten::{name}" for name in dispatch if not is_known(name) and name not in ON_THE_CPU | PRIMITIVES]


def _become_mps(torch, functions):
    """Answer what torch asks of the MPS backend, which this build of torch has not."""
    import multiprocessing

    from torchgen import packaged

    class Generator:
        """torch.mps.manual_seed and its kin."""

        def get_state(self):
            return functions.generator_state()

        def set_state(self, state):
            functions.set_generator_state(state)

        def manual_seed(self, seed):
            functions.seed(seed)

    answers = {
        "is_available": lambda: True,
        "is_on_macos_or_newer": lambda *_: True,
        "is_in_bad_fork": lambda: False,
        "get_default_generator": Generator,
        "get_name": lambda: "emulated",
        "get_core_count": lambda: 1,
        "deviceSynchronize": lambda: None,
        "emptyCache": lambda: None,
        "setMemoryFraction": lambda _: None,
        "driverAllocatedMemory": lambda: 0,
        "recommendedMaxMemory": lambda: 2**34,
    }
    torch._C._has_mps = True
    for name, answer in answers.items():
        setattr(torch._C, f"_mps_{name}", answer)
    torch.backends.mps.is_available.cache_clear()
    table = Path(packaged.__path__[0], "ATen/native/native_functions.yaml").read_text(encoding="utf-8")
    functions.refuse(operators_without_mps(table), NO_KERNEL)
    functions.refuse_float64(NO_FLOAT64)
    functions.refuse_faults("MPS would compute this wrongly (emulated_device.FAULTS): ")
    if multiprocessing.get_start_method(allow_none=True) is None:  # as on macOS
        multiprocessing.set_start_method("spawn")


def _become_cuda(torch, functions):
    """Answer what torch.cuda asks of the CUDA backend, which this build of torch has not."""
    import torch.cuda.graphs

    cuda, memory = torch.cuda, int(os.environ.get("EMULATED_DEVICE_MEMORY", "84942979072"))  # bytes
    functions.limit_memory(memory)
    properties = types.SimpleNamespace(name="emulated", major=9, minor=0, total_memory=memory)

    def begin():
        cuda.default_generators = (functions.default_generator(),)

    answers = {
        "init": begin,
        "getDeviceCount": lambda: 1,
        "getDevice": lambda: 0,
        "setDevice": lambda _: None,
        "isInBadFork": lambda: False,
        "getCurrentRawStream": lambda _=None: 0,
        "getArchFlags": lambda: "sm_80 sm_90",
        "synchronize": lambda: None,
        "isCurrentStreamCapturing": lambda: False,
        "emptyCache": lambda: None,
        "ipc_collect": lambda: None,
    }
    torch._C._has_cuda = True
    for name, answer in answers.items():
        setattr(torch._C, f"_cuda_{name}", answer)
    torch.version.cuda = "13.0"
    cuda._cudart = types.SimpleNamespace()
    cuda._is_in_bad_fork = answers["isInBadFork"]
    cuda._exchange_device = cuda._maybe_exchange_device = lambda _: 0
    cuda._get_device_properties = lambda _: properties
    cuda._device_count_nvml = lambda: -1  # so that the count is what getDeviceCount says
    cuda.graphs._cuda_isCurrentStreamCapturing = answers["isCurrentStreamCapturing"]


def _module(torch, functions, name):
    """Return torch.NAME."""
    answers = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "manual_seed": functions.seed,
        "manual_seed_all": functions.seed,
        "get_rng_state": lambda device=None: functions.generator_state(),
        "set_rng_state": lambda state, device=None: functions.set_generator_state(state),
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_bf16_supported": lambda *_, **__: True,
        "device": contextlib.nullcontext,  # under `with`: there is one device
    }
    module = types.ModuleType(f"torch.{name}")
    vars(module).update(answers)
    return module
