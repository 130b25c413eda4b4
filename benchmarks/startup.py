"""Measure start-up: --help, and the time to the first step of a training whose tokens are cached.

    python benchmarks/startup.py                # the demo
    python benchmarks/startup.py --task mrpc --model sentence-transformers/all-MiniLM-L6-v2 --learning_rate 5e-5

For comparison, it also times only the imports that a training needs. Prints medians of --runs rounds, in turn, after a
training that fills the cache. Other flags go to train.py.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import ROOT, log_progress

IMPORTS = "import torch, transformers, accelerate, datasets"


def time_command(command, file=None):
    """Run a command; return the seconds until it succeeds or, given a file, until that file exists."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (file and file.exists()):
        time.sleep(0.005)
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    process.kill()
    process.wait()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each command (default: 5)")
    args, flags = parser.parse_known_args()
    helps = {f"{name} --help": [sys.executable, ROOT / name, "--help"] for name in ("train.py", "predict.py")}
    imports = {"imports alone": [sys.executable, "-c", IMPORTS]}
    times = {name: [] for name in (*helps, *imports, "train.py, first step")}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train = [sys.executable, ROOT / "train.py", *(flags or ["--task", "demo"])]
        train += ["--output_dir", run, "--log_every", "1"]
        subprocess.run([*train, "--max_steps", "1"], stdout=subprocess.DEVNULL, check=True)
        for number in range(args.runs):
            for name, command in {**helps, **imports}.items():
                times[name].append(time_command(command))
            shutil.rmtree(run)
            times["train.py, first step"].append(time_command(train, run / "metrics.jsonl"))
            log_progress(f"round {number + 1}")
    print("| | seconds (median) | min to max |\n|---|---|---|")
    for name, seconds in times.items():
        print(f"| {name} | {statistics.median(seconds):.2f} | {min(seconds):.2f} to {max(seconds):.2f} |")
    more = statistics.median(times["train.py, first step"]) - statistics.median(times["imports alone"])
    print(f"\nThe first step is done {more:.2f} s after the imports alone.")


if __name__ == "__main__":
    main()
