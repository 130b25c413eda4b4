"""The launch configurations: accelerate parses them, they do what their names say, and the CPU ones run."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import write_basic_config
from conftest import ACCELERATE, run_script

FOLDER = Path(__file__).resolve().parent.parent / "accelerate_configs"

# name: distributed type, processes, CPU only, mixed precision (None: left to the scripts)
EXPECTED = {
    "cpu": ("NO", 1, True, None),
    "multi_cpu": ("MULTI_GPU", 2, False, None),
    "single_gpu": ("NO", 1, False, None),
    "fp16": ("NO", 1, False, "fp16"),
    "bf16": ("NO", 1, False, "bf16"),
    "multi_gpu": ("MULTI_GPU", 2, False, None),
    "multi_node": ("MULTI_GPU", 4, False, None),
}

# The order of the last lines matters: without it a gloo group that did all its work may abort on the way out.
SCRIPT = """
import gc, json, os, sys
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.cuda.is_available())
total = accelerator.reduce(torch.tensor([10.0 ** accelerator.process_index]), "sum").item()
square = torch.ones(2, 2, device=accelerator.device)
with accelerator.autocast():
    product = square @ square
seen = {
    "product": str(product.dtype),
    "rank": accelerator.process_index,
    "processes": accelerator.num_processes,
    "total": total,
    "type": accelerator.distributed_type.value,
    "device": accelerator.device.type,
    "precision": accelerator.mixed_precision,
    "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
}
with open(os.path.join(sys.argv[1], f"rank{os.environ.get('RANK', 0)}.json"), "w") as file:
    json.dump(seen, file)
accelerator.wait_for_everyone()
accelerator.free_memory()
gc.collect()
accelerator.end_training()
"""


def launch(name, folder):
    """Runs SCRIPT through `accelerate launch` with one of our files; what each process saw, by RANK."""
    (folder / "script.py").write_text(SCRIPT)
    # Without what a surrounding launcher or user set, and without the user's own default configuration.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(key, None)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / f"{name}.yaml")]
    command += [str(folder / "script.py"), str(folder)]
    done = subprocess.run(
        command, env=kept | {"HF_HOME": str(folder)}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def test_every_file_is_expected_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= set(EXPECTED)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_parses_and_names_itself(path):
    # The parser raises for keys it does not know; what accelerate's dataclass has is what launch reads.
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    lines = path.read_text().splitlines()
    assert lines[0].startswith(f"# accelerate launch --config_file accelerate_configs/{path.name} train.py --task ")
    assert "Tested: " in lines[1]
    keys = [line for line in lines if not line.startswith("#")]
    assert all(": " in line and " # " in line for line in keys), keys
    assert 4 <= len(lines) <= 18


@pytest.mark.parametrize("name", EXPECTED)
def test_does_what_its_name_says(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    seen = (config.distributed_type.value, config.num_processes, config.use_cpu, config.mixed_precision)
    assert seen == EXPECTED[name]
    assert config.num_machines == (2 if name == "multi_node" else 1)
    assert (config.gpu_ids == "-1,-1") == (name == "multi_cpu")


def test_multi_cpu_is_one_gloo_group_of_two(tmp_path):
    ranks = launch("multi_cpu", tmp_path)
    assert [seen["rank"] for seen in ranks] == [0, 1]
    for seen in ranks:
        # 1 from rank 0 and 10 from rank 1: they met.
        assert (seen["processes"], seen["total"], seen["backend"]) == (2, 11.0, "gloo")
        assert (seen["type"], seen["device"]) == ("MULTI_CPU", "cpu")


@pytest.mark.slow(after=1)
@pytest.mark.parametrize(("name", "precision"), [("cpu", "no"), ("bf16", "bf16")])
def test_single_process_files_run(tmp_path, name, precision):
    (seen,) = launch(name, tmp_path)
    assert (seen["processes"], seen["type"], seen["precision"]) == (1, "NO", precision)
    assert seen["product"] == {"no": "torch.float32", "bf16": "torch.bfloat16"}[precision]
    assert name != "cpu" or seen["device"] == "cpu"


@pytest.mark.slow
def test_training_starts_with_the_file_of_accelerate_config_default(review_task):
    file = review_task.parent / "default.yaml"
    write_basic_config(save_location=str(file))
    launcher = (*ACCELERATE, "--config_file", str(file))
    flags = ["--task", review_task, "--max_steps", 2, "--output_dir", "run"]
    ended = run_script("train.py", *flags, cwd=review_task.parent, launcher=launcher)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((review_task.parent / "run" / "state.json").read_text())["status"] == "done"


@pytest.mark.slow
def test_multi_node_is_one_run_of_two_launchers(review_task):
    """Two launchers on this machine, one CPU process each, that meet at a c10d rendezvous."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--config_file", str(FOLDER / "multi_node.yaml"), "--main_process_port", str(port)]
    flags = ["--task", review_task, "--max_steps", 2, "--output_dir", "run"]

    def machine(rank):
        launcher = (*ACCELERATE, *options, "--num_processes", "2", "--machine_rank", str(rank))
        hidden = {"CUDA_VISIBLE_DEVICES": ""}
        return run_script("train.py", *flags, cwd=review_task.parent, launcher=launcher, environment=hidden)

    with ThreadPoolExecutor() as pool:
        ended = list(pool.map(machine, (0, 1)))
    assert [one.returncode for one in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    assert json.loads((review_task.parent / "run" / "results.json").read_text())["num_processes"] == 2
    assert sum("1.00, step" in one.stdout or "step 2 |" in one.stdout for one in ended) == 1  # one of them tells


@pytest.mark.slow
def test_multi_cpu_trains_on_two_processes(review_task):
    launcher = (*ACCELERATE, "--config_file", str(FOLDER / "multi_cpu.yaml"))
    flags = ["--task", review_task, "--max_steps", 2, "--output_dir", "run"]
    ended = run_script("train.py", *flags, cwd=review_task.parent, launcher=launcher)
    assert ended.returncode == 0, ended.stderr
    assert json.loads((review_task.parent / "run" / "results.json").read_text())["num_processes"] == 2


ANSWERS = {  # what `accelerate config` may have written: (its file, the start of the first line that train.py prints)
    "FSDP": (
        {"distributed_type": "FSDP", "num_processes": 2, "use_cpu": True, "fsdp_config": {"fsdp_version": 2}},
        "train.py: error: the launcher was told to use FSDP, ",
    ),
    "Megatron-LM": (
        {"distributed_type": "MEGATRON_LM", "num_processes": 2, "use_cpu": True, "megatron_lm_config": {}},
        "train.py: error: the launcher was told to use Megatron-LM, ",
    ),
    "several GPUs that are not there": ({"distributed_type": "MULTI_GPU", "num_processes": 2}, "cpu, 2 processes, "),
    "an old file": ({"distributed_type": "NO", "num_processes": 1, "mixed_precision": "no"}, "cpu, 1 process, "),
}


@pytest.mark.slow
@pytest.mark.parametrize("answer", ANSWERS)
def test_each_answer_of_accelerate_config_trains_or_is_refused_in_two_lines(review_task, answer):
    content, first = ANSWERS[answer]
    file = review_task.parent / "config.yaml"
    file.write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", **content}))
    flags = ["--task", review_task, "--max_steps", 2, "--output_dir", "run"]
    launcher = (*ACCELERATE, "--config_file", str(file))
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    ended = run_script("train.py", *flags, cwd=review_task.parent, launcher=launcher, environment=hidden)
    if "error" in first:
        lines = [line for line in ended.stderr.splitlines() if line.startswith("train.py: ")]
        assert ended.returncode == 1 and len(lines) == 2 and lines[0].startswith(first), ended.stderr
        assert "accelerate_configs/multi_gpu.yaml" in lines[1]
        assert not (review_task.parent / "run").exists() and not ended.stdout
    else:
        assert ended.returncode == 0 and ended.stdout.startswith(first), ended.stderr
        assert json.loads((review_task.parent / "run" / "state.json").read_text())["status"] == "done"
