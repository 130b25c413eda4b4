"""A GPU, a Mac's, and a device that torch does not know: the unchanged scripts on devices that are emulated on the CPU.

emulated_device/ has the device: it refuses what a real one refuses, and computes with the CPU's kernels. So the numbers
must be the CPU's, up to the rounding of other ways to compute the same. A run that passes here need not pass there; one
that fails here fails there.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, lines_of, run_script
from other_systems.make_inputs import make_inputs
from test_preemption import ended, start, start_2, state_of

EMULATION = ROOT / "tests" / "emulated_device"
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: it compiles the emulated device"),
    pytest.mark.skipif(sys.platform != "linux", reason="the emulated device changes torch as it is built for Linux"),
]

# Installed in a process that was forked from one that has imported everything: half a second instead of five.
INSTALL = f"""
sys.path.insert(0, {str(EMULATION)!r})
import emulated_device
os.environ.pop("ACCELERATE_USE_CPU", None)
emulated_device.install(os.environ["EMULATED_DEVICE"])
"""

STOP_AFTER_STEP_6 = """
from classifier.training.progress import Progress
def record_step(self, step, *given, record=Progress.record_step):
    record(self, step, *given)
    if step == 6:
        os.kill(os.getpid(), signal.SIGTERM)
Progress.record_step = record_step
"""


@pytest.fixture(scope="session")
def compiled(request):
    """The folder of the compiled device, kept from one session to the next: compiling it takes 15 seconds."""
    folder = request.config.cache.mkdir("emulated_device")
    subprocess.run([sys.executable, "-c", "import torch"], check=True, env={**os.environ, **variables("mps", folder)})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    make_inputs(folder / "in")
    task = (folder / "in" / "tiny.yaml").read_text(encoding="utf-8")
    # Weights so large that attention counts, as it does in a model that has learned.
    large = task.replace("{model_type: bert,", "{model_type: bert, initializer_range: 0.3,")
    (folder / "in" / "large.yaml").write_text(large, encoding="utf-8")
    return folder


def variables(device, compiled):
    """The environment of a user's process on a device."""
    own = {"ACCELERATE_TORCH_DEVICE": device} if device not in ("cuda", "mps") else {}
    return {"EMULATED_DEVICE": device, "EMULATED_DEVICE_CACHE": str(compiled), "PYTHONPATH": str(EMULATION), **own}


@pytest.fixture(scope="module")
def run(folder, compiled):
    """A function that runs a script on a device, to its end; returns (its output, the folder of the run)."""

    def run(device, *flags, script="train.py", name=None, change="", exit_code=0, **environment):
        name = name or device
        if script == "train.py":
            flags = ("--task", "in/tiny.yaml", "--log_every", 1, "--output_dir", name, *flags)
        on_device = {} if device == "cpu" else variables(device, compiled)
        change = change if device == "cpu" else INSTALL + change
        process = start(
            folder, *flags, "--threads", 1, script=script, name=name, change=change, environment=on_device | environment
        )
        code, out, err = ended(process, timeout=120)
        assert code == exit_code, out + err
        assert "train.py" not in script or out.startswith(f"{device}, 1 process"), out
        return out + err, folder / name

    return run


@pytest.fixture(scope="module")
def runs(run):
    """A function that returns (the output, the folder) of the undisturbed run on a device, made once."""
    done = {}

    def run_once(device, *flags, **options):
        key = (device, *flags, *options.items())
        if key not in done:
            done[key] = run(device, *flags, name=f"undisturbed-{len(done)}", **options)
        return done[key]

    return run_once


def largest_difference(one, other):
    """The largest difference of a loss, in training or evaluation, of two runs of the same steps."""
    differences = []
    for kind in ("train", "eval"):
        lines = lines_of(one, kind), lines_of(other, kind)
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]] and lines[0]
        differences += [abs(here["loss"] - there["loss"]) for here, there in zip(*lines, strict=True)]
    return max(differences)


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


# ----------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(
    ("device", "environment"),
    [("mps", {}), ("cuda", {}), ("npu", {}), ("npu", {"EMULATED_DEVICE_NEW_PARAMETERS": "1"})],
    ids=["mps", "cuda", "npu", "npu, new parameters"],
)
def test_a_training_has_the_numbers_of_the_cpu(runs, device, environment):
    out, folder = runs(device, **environment)
    assert "differ from the CPU's" not in out
    assert largest_difference(folder, runs("cpu")[1]) < 1e-6
    assert state_of(folder)["status"] == "done"


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("device", ["mps", "npu"])
def test_a_run_that_is_ended_and_resumed_has_the_weights_of_an_undisturbed_one(run, runs, device):
    out, folder = run(device, name=f"ended-{device}", change=STOP_AFTER_STEP_6, exit_code=75)
    assert state_of(folder)["status"] == "preempted"
    out, _ = run(device, name=f"ended-{device}")
    assert "resuming after step 6" in out
    assert weights(folder) == weights(runs(device)[1])


@pytest.mark.slow
def test_a_dry_run_finds_the_numbers_of_the_cpu(run, folder):
    out, _ = run("mps", "--dry_run", name="dry")
    found = re.search(r"largest difference from fp32 on the CPU: logits (\S+), gradients (\S+)", out)
    assert max(map(float, found.groups())) < 1e-5 and "DIFFER" not in out
    assert not (folder / "dry").exists()


def probabilities(run, model, device):
    """The probabilities of the rows of test.csv, (rows, labels), as predict.py writes them."""
    flags = ("--model", model, "--mixed_precision", "no", "--input", "in/test.csv", "--output", f"{device}.csv")
    out, _ = run(device, *flags, script="predict.py", name="predict")
    assert out.startswith(f"{device}, 1 process")
    lines = (model.parent / f"{device}.csv").read_text(encoding="utf-8").splitlines()[1:]
    return np.array([line.split(",")[-2:] for line in lines], dtype=float)


@pytest.mark.slow
def test_a_model_is_scored_and_used_on_a_device_as_on_the_cpu(run, runs):
    _, model = runs("cpu")
    results = json.loads((model / "results.json").read_text())
    there = probabilities(run, model, "cpu")
    assert there.shape == (50, 2) and np.ptp(there) > 0.01
    for device in ("mps", "cuda"):
        np.testing.assert_allclose(probabilities(run, model, device), there, rtol=0, atol=1e-6)
        flags = ("--model", model, "--split", "validation", "--output_dir", f"scored-{device}")
        out, folder = run(device, *flags, script="evaluate.py", name=f"scored-{device}")
        assert out.startswith(f"{device}, 1 process")
        assert json.loads((folder / "evaluation.json").read_text())["scores"] == results["scores"]["validation"]


# ------------------------------------------------------------------------------------------------- what a device has


@pytest.mark.slow
def test_workers_are_spawned_on_a_mac(folder, compiled):
    flags = ("--task", "in/tiny.yaml", "--max_steps", 3, "--num_workers", 1, "--freeze", "encoder")
    done = run_script("train.py", *flags, "--output_dir", "workers", cwd=folder, environment=variables("mps", compiled))
    assert done.returncode == 0 and done.stdout.startswith("mps, 1 process"), done.stderr
    assert state_of(folder / "workers")["status"] == "done"


@pytest.mark.slow
def test_several_processes_on_a_mac_take_the_cpu(folder, compiled):
    flags = ("--task", "in/tiny.yaml", "--max_steps", 3, "--output_dir", "two")
    processes = start_2(folder, *flags, change=INSTALL, environment=variables("mps", compiled))
    (code, out, err), (other_code, *_) = map(ended, processes)
    assert (code, other_code) == (0, 0) and out.startswith("cpu, 2 processes"), out + err
    assert out.count("several processes take the CPU: on Apple's GPUs they cannot communicate") == 1


@pytest.mark.slow
def test_bf16_on_a_gpu(runs):
    out, folder = runs("cuda", "--mixed_precision", "bf16")
    assert "precision bf16" in out and "differ from the CPU's" not in out
    assert 1e-6 < largest_difference(folder, runs("cpu")[1]) < 1e-2


OVERFLOW = """
import functools, torch
torch.amp.GradScaler.__init__ = functools.partialmethod(torch.amp.GradScaler.__init__, init_scale=2.0**20)
"""


@pytest.mark.slow
def test_fp16_on_a_gpu_tells_the_steps_that_overflow_and_resumes_with_its_scale(run, runs):
    fp16 = ("--mixed_precision", "fp16")
    out, folder = runs("cuda", *fp16, change=OVERFLOW)
    results = json.loads((folder / "results.json").read_text())
    assert results["mixed_precision"] == "fp16" and 1 <= results["skipped_steps"] < 6
    assert f"{results['skipped_steps']} of 26 steps changed no weight" in out
    gradients = [line["grad_norm"] for line in lines_of(folder)]
    assert gradients.count(None) == results["skipped_steps"]
    run("cuda", *fp16, name="ended-fp16", change=OVERFLOW + STOP_AFTER_STEP_6, exit_code=75)  # after the overflows
    out, resumed = run("cuda", *fp16, name="ended-fp16", change=OVERFLOW)
    assert "resuming after step 6" in out and weights(resumed) == weights(folder)


TELL_HALVES = """
from classifier.model import inference
def clear(clear=inference.clear_device_cache, **options):
    print("out of memory, in halves")
    clear(**options)
inference.clear_device_cache = clear
"""


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_into_memory_loses_no_step(run, runs):
    options = {"change": TELL_HALVES, "EMULATED_DEVICE_MEMORY": "900000"}
    out, folder = run("cuda", "--micro_batch_size", 2, name="memory", **options)
    assert out.count("out of memory, in halves") >= 2
    assert largest_difference(folder, runs("cpu")[1]) < 1e-6


SKIPS = """
from types import SimpleNamespace
import torch
from classifier.training.optimizer import build_optimizer, may_step
model = torch.nn.Linear(3, 2).to("npu")
adam = {"adam_betas": (0.9, 0.999), "adam_epsilon": 1e-8}
args = SimpleNamespace(weight_decay=0.1, learning_rate=0.1, layerwise_lr_decay=1.0, **adam)
optimizer = build_optimizer(model, args)
states = [[value.tolist() for value in model.parameters()]]
for factor in (1.0, float("inf"), float("nan"), 1.0):
    model(torch.ones(4, 3, device="npu")).sum().mul(factor).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if may_step(optimizer, norm):
        optimizer.step()
    optimizer.zero_grad()
    moments = [value.tolist() for state in optimizer.state.values() for value in state.values()]
    states.append([value.tolist() for value in model.parameters()] + moments)
print([here == there for here, there in zip(states, states[1:])])
"""


@pytest.mark.slow
def test_without_a_fused_optimiser_a_gradient_that_is_not_finite_changes_nothing(run, folder):
    (folder / "skips.py").write_text(SKIPS)
    out, _ = run("npu", script=str(folder / "skips.py"), name="skips")
    assert out.strip() == str([False, True, True, False])


# ----------------------------------------------------------------------------------------- devices that compute wrongly

# Attention that does not see its mask, on the device alone.
FAULT = """
from torch.nn.functional import scaled_dot_product_attention
def unmasked(query, key, value, attn_mask=None, **options):
    attn_mask = None if query.device.type == "mps" else attn_mask
    return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
"""
IN_PACKED = FAULT + "from classifier.model import packing\npacking.scaled_dot_product_attention = unmasked\n"
EVERYWHERE = IN_PACKED + "import torch\ntorch.nn.functional.scaled_dot_product_attention = unmasked\n"
LARGE = ("--task", "in/large.yaml", "--max_steps", 8)
DIFFERS = "WARNING: on this device (mps, precision no) the logits of two {} examples differ from the CPU's by "


@pytest.mark.slow
def test_where_packed_examples_have_other_numbers_they_are_padded(run, runs):
    _, expected = runs("cpu", *LARGE)
    out, folder = run("mps", *LARGE, name="faulty", change=IN_PACKED)
    assert out.count(DIFFERS.format("packed")) == 1 and DIFFERS.format("padded") not in out
    assert largest_difference(folder, expected) < 1e-5
    out, _ = run("mps", "--model", expected, "--text", "good", script="predict.py", name="p", change=IN_PACKED)
    assert out.count(DIFFERS.format("packed")) == 1


@pytest.mark.slow
def test_a_device_that_computes_wrongly_whatever_is_done_is_told(run):
    out, _ = run("mps", *LARGE, name="wrong", change=EVERYWHERE)
    assert out.count(DIFFERS.format("packed")) == out.count(DIFFERS.format("padded")) == 1
