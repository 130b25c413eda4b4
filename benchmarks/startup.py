"""How long a command takes to begin: --help of each script, and the first step of a training whose tokens are cached.

    python benchmarks/startup.py                # the demo
    python benchmarks/startup.py --task mrpc --model sentence-transformers/all-MiniLM-L6-v2 --learning_rate 5e-5

Beside it stand the imports alone that a training needs. Medians of --runs rounds, in turn; a training that fills the
cache comes before them. Other flags are train.py's.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import ROOT, progress

IMPORTS = "import torch, transformers, accelerate, datasets"


def seconds(command, file=None):
    """Run a command; return the seconds until it ended well or, where a file is named, until this was there."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (file and file.exists()):
        time.sleep(0.005)
    needed = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    process.kill()
    process.wait()
    return needed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each command (default: %(default)s)")
    args, flags = parser.parse_known_args()
    helps = {f"{name} --help": [sys.executable, ROOT / name, "--help"] for name in ("train.py", "predict.py")}
    imports = {"imports alone": [sys.executable, "-c", IMPORTS]}
    times = {name: [] for name in (*helps, *imports, "train.py, first step")}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        train = [
            sys.executable,
            ROOT / "train.py",
            *(flags or ["--task", "demo"]),
            "--output_dir",
            run,
            "--log_every",
            "1",
        ]
        subprocess.run([*train, "--max_steps", "1"], stdout=subprocess.DEVNULL, check=True)
        for number in range(args.runs):
            for name, command in {**helps, **imports}.items():
                times[name].append(seconds(command))
            shutil.rmtree(run)
            times["train.py, first step"].append(seconds(train, run / "metrics.jsonl"))
            progress(f"round {number + 1}")
    print("| | seconds (median) | least to most |\n|---|---|---|")
    for name, of_name in times.items():
        print(f"| {name} | {statistics.median(of_name):.2f} | {min(of_name):.2f} to {max(of_name):.2f} |")
    more = statistics.median(times["train.py, first step"]) - statistics.median(times["imports alone"])
    print(f"\nThe first step comes {more:.2f} s after the imports alone would be done.")


if __name__ == "__main__":
    main()
