"""Measure speed and peak memory of train.py or predict.py on files of more and more rows: memory should stay level.

    python benchmarks/scale.py [--rows 1000 10000 100000 1000000] [--suffix csv|jsonl|json|parquet] [--device cpu|cuda]
    python benchmarks/scale.py --script predict --rows 10000 1000000

Start-up is from the command to the end of the first step, with an empty cache (cold: reads and tokenises) and with the
first run's cache (warm). predict.py's rate is the one that it logs: from the first row read to the last one written,
without loading. Memory is RssAnon: the resident size also counts mapped pages of the cache, which the system can
reclaim. Linux only.
"""

import argparse
import json
import os
import random
import re
import shlex
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
    generator = random.Random(number)
    rows = ({"text": " ".join(generator.choices(WORDS, k=12)), "label": generator.choice("ab")} for _ in range(number))
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


def peak_memory(command, folder, variables, poll=lambda: None):
    """Run a command, which must succeed; return its peak RssAnon in MB. poll() is called every 20 ms."""
    process, peak = subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL), 0
    while process.poll() is None:
        poll()
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *map(int, re.findall(r"RssAnon:\s+(\d+)", status)), 0)
        except (OSError, TypeError):  # the process has ended
            pass
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return peak / 1000


def measure_training(command, folder, variables):
    """Run train.py in a folder; return (seconds to the first step, median ms of a step, peak RssAnon in MB)."""
    lines, begin, first = Path(folder, "run/metrics.jsonl"), time.monotonic(), []
    lines.unlink(missing_ok=True)

    def poll():
        if not first and lines.exists():
            first.append(time.monotonic() - begin)

    peak = peak_memory(command, folder, variables, poll)
    rates = [json.loads(line).get("examples_per_second") for line in lines.read_text().splitlines()]
    return first[0], statistics.median(1000 * BATCH_SIZE / rate for rate in rates if rate), peak


def measure_prediction(file, folder, variables):
    """Label the file with the model of the run in a folder; return (rows/s, peak RssAnon in MB)."""
    command = [sys.executable, str(ROOT / "predict.py"), "--model", "run", "--input", str(file)]
    command += ["--output", "out.jsonl"]
    log = Path(folder, "log")
    peak = peak_memory(["bash", "-c", f"exec {shlex.join(command)} 2> {log}"], folder, variables)
    (rate,) = re.findall(r"out.jsonl: .* rows in .*, ([\d,]+) rows/s", log.read_text(encoding="utf-8"))
    return int(rate.replace(",", "")), peak


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", choices=["train", "predict"], default="train")
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
    train_header = "| rows | first step, cold | first step, warm | step | peak RssAnon |\n|---|---|---|---|---|"
    print(train_header if args.script == "train" else "| rows | rows/s | peak RssAnon |\n|---|---|---|", flush=True)
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
            if args.script == "predict":
                one_step = [*command, "--max_steps", "1", "--limit", "train=64", "--eval_every", "1"]
                subprocess.run(one_step, cwd=folder, env=variables, stdout=subprocess.DEVNULL, check=True)
                rate, peak = measure_prediction(file, folder, variables)
                measured.append({"rows": number, "rows_per_second": rate, "peak_mb": peak})
                print(f"| {number:,} | {rate:,} | {peak:.0f} MB |", flush=True)
                continue
            cold, step, peak = measure_training(command, folder, variables)
            warm, *_ = measure_training(command, folder, variables)
        row = {"rows": number, "cold_seconds": cold, "warm_seconds": warm, "step_milliseconds": step, "peak_mb": peak}
        measured.append(row)
        print(f"| {number:,} | {cold:.1f} s | {warm:.1f} s | {step:.1f} ms | {peak:.0f} MB |", flush=True)
    print(f"\ndifference: {measured[-1]['peak_mb'] - measured[0]['peak_mb']:.0f} MB")
    content = {
        "benchmark": "scale",
        "script": args.script,
        "suffix": args.suffix,
        "steps": args.steps,
        "device": args.device,
    }
    if args.output:
        args.output.write_text(json.dumps({**content, "measured": measured}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
