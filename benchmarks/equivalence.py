"""Compare one training in many layouts: how far losses, weights and scores are from those of a single process.

    python benchmarks/equivalence.py [--steps 50 200] [--layouts one micro_4 ...] [--dropout 0.1]

Trains the demo's small BERT, batch 32, for 50 steps in fp32 and 200 in float64, without and with dropout, on gloo
processes. Float64 is for this comparison only; the scripts offer fp32 and 16-bit types. Prints a table for RESULTS.md.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
ACCELERATE += [str(ROOT / "accelerate_configs/multi_cpu.yaml"), "--num_processes"]
LAYOUTS = {  # name: (title, launcher, flags)
    "one": ("1 process", [sys.executable], []),
    "micro_4": ("accumulation by 4 (8 + 8 + 8 + 8)", [sys.executable], ["--micro_batch_size", "8"]),
    "micro_3": ("accumulation by 3 (11 + 11 + 10)", [sys.executable], ["--micro_batch_size", "11"]),
    "torchrun_2": ("2 processes, torchrun", [*TORCHRUN, "2"], []),
    "torchrun_4": ("4 processes, torchrun", [*TORCHRUN, "4"], []),
    "accelerate_2": ("2 processes, accelerate launch", [*ACCELERATE, "2"], []),
    "accelerate_4": ("4 processes, accelerate launch", [*ACCELERATE, "4"], []),
}


def train_in_float64(arguments):
    """Run train.py with these arguments and its model in float64."""
    from classifier.model import models

    load_model = models.load_model

    def load_double(*arguments):
        model, tokenizer, facts = load_model(*arguments)
        return model.double(), tokenizer, facts

    models.load_model = load_double
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def task_with_dropout(folder, rate):
    """Write the demo's task with this dropout rate into a folder; return the file."""
    import yaml

    content = yaml.safe_load((ROOT / "data/demo.yaml").read_text(encoding="utf-8"))
    content["files"] = {split: str(ROOT / "data" / file) for split, file in content["files"].items()}
    content["model"]["vocab"] = str(ROOT / "data" / content["model"]["vocab"])
    content["model"] |= {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    file = Path(folder, f"dropout-{rate}.yaml")
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return str(file)


def train(layout, task, steps, is_float64, folder):
    """Train; return (losses of all steps, weights by name in float64, evaluations, best step)."""
    import torch
    from safetensors.torch import load_file

    _, launcher, flags = LAYOUTS[layout]
    output = Path(folder, f"{layout}-{Path(task).stem}-{steps}-{is_float64}")
    script = [__file__, "--float64"] if is_float64 else [str(ROOT / "train.py")]
    arguments = ["--task", task, "--batch_size", "32", "--max_steps", str(steps), "--log_every", "1", "--threads", "1"]
    arguments += ["--eval_every", str(max(1, steps // 4)), "--mixed_precision", "no", "--output_dir", str(output)]
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
    }  # more processes than cores: waiting threads must not spin
    done = subprocess.run(
        [*launcher, *script, *arguments, *flags], env=environment, cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{layout}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = torch.tensor([line["loss"] for line in lines if line["type"] == "train"], dtype=torch.float64)
    weights = {name: value.double() for name, value in load_file(output / "model/model.safetensors").items()}
    evaluations = [line["scores"] for line in lines if line["type"] == "eval"]
    return losses, weights, evaluations, json.loads((output / "results.json").read_text())["best_step"]


def compare_runs(result, base):
    """Return (largest relative difference of a loss, relative L2 difference of all weights, decisions as text)."""
    losses, weights, evaluations, best_step = result
    squares = sum(((weights[name] - value) ** 2).sum() for name, value in base[1].items())
    total = sum((value**2).sum() for value in base[1].values())
    decisions = "equal" if (evaluations, best_step) == base[2:] else f"best step {best_step}, {evaluations[-1]}"
    return ((losses - base[0]) / base[0]).abs().max().item(), (squares / total).sqrt().item(), decisions


def main():
    if "--float64" in sys.argv:
        return train_in_float64([word for word in sys.argv[1:] if word != "--float64"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=[50, 200], help="in fp32 and in float64")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1], help="dropout rates")
    args = parser.parse_args()
    fp32, float64 = args.steps
    print(
        f"| layout | dropout | loss, {fp32} steps fp32 | loss, {float64} steps float64 | weights, float64 | decisions |"
    )
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for rate in args.dropout:
            task = task_with_dropout(folder, rate)
            bases = {}
            for layout in dict.fromkeys(["one", *args.layouts]):
                cells = []
                for steps, is_float64 in ((fp32, False), (float64, True)):
                    result = train(layout, task, steps, is_float64, folder)
                    cells.append(compare_runs(result, bases.setdefault(is_float64, result)))
                (loss32, _, _), (loss64, weights, decisions) = cells
                numbers = " | ".join(f"{number:.1e}" for number in (loss32, loss64, weights))
                print(f"| {LAYOUTS[layout][0]} | {rate or 'off'} | {numbers} | {decisions} |", flush=True)


if __name__ == "__main__":
    main()
