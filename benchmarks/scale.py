"""train.py on files of more and more rows: start-up, time per step, and peak anonymous memory, which stay level.

    python benchmarks/scale.py [--rows 1000 10000 100000 1000000] [--suffix csv|jsonl|json|parquet] [--device cpu|cuda]

Start-up is from the command to the end of the first step: with an empty cache (cold: reading and tokenising) and with
what the first run left (warm). Measures RssAnon, since the resident size counts the mapped pages of the cache, which
the system may take back. Linux.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE = 32
WORDS = [word for word in (ROOT / "data/demo/vocab.txt").read_text(encoding="utf-8").split() if word.isalpha()]


def write_table(path, number, suffix):
    """Write a table of `number` short reviews of random words."""
    chooser = random.Random(number)
    rows = ({"text": " ".join(chooser.choices(WORDS, k=12)), "label": chooser.choice("ab")} for _ in range(number))
    if suffix == "parquet":
        from datasets import Dataset

        return Dataset.from_list(list(rows)).to_parquet(path)
    with open(path, "w", encoding="utf-8") as file:
        if suffix == "csv":
            file.write("text,label\n")
        for position, row in enumerate(rows):
            lead = {"csv": "", "jsonl": "", "json": "[" if position == 0 else ","}[suffix]
            file.write(lead + (f"{row['text']},{row['label']}\n" if suffix == "csv" else json.dumps(row) + "\n"))
        file.write("]" if suffix == "json" else "")


def measure(command, folder, variables):
    """Run train.py in a folder; return (seconds to the first step, median ms of a step, largest RssAnon in MB)."""
    lines, begin, first, largest = Path(folder, "run/metrics.jsonl"), time.monotonic(), None, 0
    lines.unlink(missing_ok=True)
    process = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and lines.exists():
            first = time.monotonic() - begin
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            largest = max(largest, *map(int, re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        except (OSError, TypeError):  # it ended just now
            pass
        time.sleep(0.02)
    if process.returncode or first is None:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    rates = [json.loads(line).get("examples_per_second") for line in lines.read_text().splitlines()]
    return first, statistics.median(1000 * BATCH_SIZE / rate for rate in rates if rate), largest / 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--suffix", default="csv", choices=["csv", "jsonl", "json", "parquet"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    args = parser.parse_args()
    variables = dict(os.environ)
    if args.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    measured = []
    print("| rows | first step, cold | first step, warm | step | peak RssAnon |\n|---|---|---|---|---|", flush=True)
    for number in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"rows.{args.suffix}")
            write_table(file, number, args.suffix)
            description = (ROOT / "data/demo.yaml").read_text(encoding="utf-8")
            description = re.sub(r"files: .*", f"files: {{train: {file}}}", description)
            description = description.replace("demo/vocab.txt", str(ROOT / "data/demo/vocab.txt"))
            description = description.replace("[negative, positive]", "[a, b]")
            Path(folder, "rows.yaml").write_text(description, encoding="utf-8")
            command = [sys.executable, str(ROOT / "train.py"), "--task", "rows.yaml", "--max_steps", str(args.steps)]
            command += ["--limit", "validation=1000", "--batch_size", str(BATCH_SIZE), "--log_every", "1"]
            command += ["--eval_every", str(args.steps), "--output_dir", "run", "--overwrite"]
            variables["HF_HOME"] = f"{folder}/cache"
            cold, step, peak = measure(command, folder, variables)
            warm, *_ = measure(command, folder, variables)
        row = {"rows": number, "cold_seconds": cold, "warm_seconds": warm, "step_milliseconds": step, "peak_mb": peak}
        measured.append(row)
        print(f"| {number:,} | {cold:.1f} s | {warm:.1f} s | {step:.1f} ms | {peak:.0f} MB |", flush=True)
    print(f"\ndifference: {measured[-1]['peak_mb'] - measured[0]['peak_mb']:.0f} MB")
    content = {"benchmark": "scale", "suffix": args.suffix, "steps": args.steps, "device": args.device}
    if args.output:
        args.output.write_text(json.dumps({**content, "measured": measured}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
