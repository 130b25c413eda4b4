"""Run contenders in turn, each in its own process (A B C A B C ...), and compare their speed.

Runs share no threads, allocators or caches, and a machine that slows down slows all contenders. A contender is an entry
(title, function, base): function(args) is called in the new process and returns a dict with `examples` and `seconds`;
base names the contender to compare with, None for a base itself.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "sentence-transformers")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")  # instructions for matrix products


def argument_parser(description, contenders):
    from classifier.processes import available_cores

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=contenders, metavar="NAME", help=f"of {', '.join(contenders)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="(default: all cores, %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="also write the numbers of every run")
    parser.add_argument("--contender", choices=contenders, help=argparse.SUPPRESS)  # for the process of one contender
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def choose_contenders(contenders, only):
    """Return the named contenders and their bases, or all contenders if none is named."""
    names = set(only or contenders)
    names |= {contenders[name][2] for name in names}
    return {name: contender for name, contender in contenders.items() if name in names}


def run_command(command, args, folder, is_launched=False):
    """Run a command in a folder, with the device and threads of args; exit if it fails.

    is_launched: by plain `accelerate launch`, which then sets the number of threads.
    """
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_NUM_"))}
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    variables["CUDA_VISIBLE_DEVICES"] = gpu if args.device == "cuda" else ""
    if not is_launched:
        variables["OMP_NUM_THREADS"] = str(args.threads)
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def run_contender(script, name, arguments, args, is_launched=False):
    """Run a contender in a new process, in an empty folder; return the result of its function."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"] if is_launched else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [*launcher, script, *arguments, "--device", args.device, "--threads", str(args.threads)]
        run_command([*command, "--contender", name, "--result", str(result)], args, folder, is_launched)
        return json.loads(result.read_text(encoding="utf-8"))


def write_result(contenders, args):
    """Call the function of args.contender, in its own process, and write the result to args.result."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU")
    args.result.write_text(json.dumps(contenders[args.contender][1](args)), encoding="utf-8")


def synchronise():
    """Wait until the GPU, if there is one, has finished its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def log_progress(text):
    print(text, file=sys.stderr, flush=True)


def compare_rates(contenders, rates):
    """Return a row for each contender: median, minimum and maximum of its rates, and how many times faster its base is.

    rates: {name: [examples/s of each round]}. `ratio` is the ratio of the medians, `paired_ratio` the median of the
    ratios of each round.
    """
    rows = []
    for name, (title, _, base) in contenders.items():
        row = {"name": name, "words": title, "base": base, "median": statistics.median(rates[name])}
        row |= {"min": min(rates[name]), "max": max(rates[name]), "ratio": None, "paired_ratio": None}
        if base:
            row["ratio"] = statistics.median(rates[base]) / row["median"]
            row["paired_ratio"] = statistics.median(a / b for a, b in zip(rates[base], rates[name], strict=True))
        rows.append(row)
    return rows


def format_table(rows):
    """Return the rows of compare_rates as a Markdown table."""
    lines = [
        "| | examples/s (median) | min to max | ours is faster by | median of the rounds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [f"{row[key]:.2f} x" if row["base"] else "" for key in ("ratio", "paired_ratio")]
        lines.append(
            f"| {row['words']} | {row['median']:.1f} | {row['min']:.1f} to {row['max']:.1f} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def describe_machine(args):
    """Return the command, the hardware and the versions that the numbers depend on."""
    import torch

    from classifier import processes

    cpu = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = None
    return {
        "command": f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "hardware": {
            "cpu": names[0] if names else platform.machine(),
            "cores": processes.available_cores(),
            "threads": args.threads,
            "cpu_flags": [flag for flag in CPU_FLAGS if flag in processes.cpu_flags()],
            "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        },
        "versions": versions,
    }


def write_content(path, content):
    from classifier.files import write_json

    if path:
        write_json(path, content)
        log_progress(f"written: {path}")
