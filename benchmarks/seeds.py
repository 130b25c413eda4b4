"""Train with several seeds in several layouts: do the scores agree within the spread between seeds?

    python benchmarks/seeds.py --output_dir FOLDER [--seeds 5] [--task demo] [--layouts fp32 bf16]

Trains with --final_test; runs that are complete in FOLDER are not trained again. Prints a table for RESULTS.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
LAYOUTS = {  # name: (launcher, flags)
    "fp32": ([sys.executable], ["--mixed_precision", "no"]),
    "fp32, 2 processes": (TORCHRUN, ["--mixed_precision", "no"]),
    "bf16": ([sys.executable], ["--mixed_precision", "bf16"]),
    "bf16, micro-batches of 8": ([sys.executable], ["--mixed_precision", "bf16", "--micro_batch_size", "8"]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--task", default="demo", help="one with a test split")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"| layout | {' | '.join(f'seed {seed}' for seed in range(args.seeds))} | mean ± std | seconds (median) |")
    print("|---" * (args.seeds + 3) + "|")
    for name in args.layouts:
        launcher, flags = LAYOUTS[name]
        scores, seconds = [], []
        for seed in range(args.seeds):
            folder = args.output_dir / f"{name.replace(' ', '_')}-{seed}"
            command = [*launcher, str(ROOT / "train.py"), "--task", args.task, "--final_test", "--seed", str(seed)]
            command += ["--output_dir", str(folder.resolve()), *flags]
            environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name}, seed {seed}: exit code {done.returncode}\n{done.stderr[-4000:]}")
            results = json.loads((folder / "results.json").read_text())
            scores.append(next(iter(results["scores"]["test"].values())))
            seconds.append(results["train_seconds"])
        cells = " | ".join(f"{score:.3f}" for score in scores)
        spread = f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}"
        print(f"| {name} | {cells} | {spread} | {statistics.median(seconds):.0f} |", flush=True)


if __name__ == "__main__":
    main()
