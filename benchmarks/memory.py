"""Peak anonymous memory of train.py on 10,000 and on 1,000,000 rows: reading, tokenising and training keep it level.

    python benchmarks/memory.py [--rows 1000000] [--suffix csv|jsonl|json|parquet]

Measures RssAnon, since the resident size counts the mapped pages of the cache, which the system may take back. Linux.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def peak_memory(command, cwd, cache):
    """Run a command; return (largest RssAnon in MB, seconds)."""
    started, largest = time.monotonic(), 0
    process = subprocess.Popen(command, cwd=cwd, env={**os.environ, "HF_HOME": cache}, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            largest = max(largest, *map(int, re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        except (OSError, TypeError):  # it ended just now
            pass
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return largest / 1000, time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--suffix", default="csv", choices=["csv", "jsonl", "json", "parquet"])
    args = parser.parse_args()
    peaks = []
    for number in (10_000, args.rows):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, f"rows.{args.suffix}")
            write_table(file, number, args.suffix)
            description = (ROOT / "data/demo.yaml").read_text(encoding="utf-8")
            description = re.sub(r"files: .*", f"files: {{train: {file}}}", description)
            description = description.replace("demo/vocab.txt", str(ROOT / "data/demo/vocab.txt"))
            description = description.replace("[negative, positive]", "[a, b]")
            Path(folder, "rows.yaml").write_text(description, encoding="utf-8")
            command = [sys.executable, str(ROOT / "train.py"), "--task", "rows.yaml", "--max_steps", "200"]
            peak, seconds = peak_memory([*command, "--limit", "validation=1000"], folder, f"{folder}/cache")
            peaks.append(peak)
            print(f"{number:>9,} rows ({args.suffix}): peak RssAnon {peak:.0f} MB, {seconds:.0f} s", flush=True)
    print(f"difference: {peaks[1] - peaks[0]:.0f} MB")


if __name__ == "__main__":
    main()
