"""Runs of contenders in turn, each in a process of its own: A B C A B C ..., and what their numbers come to.

Threads, allocators and caches of one run reach no other; a machine that slows down slows all of them. A contender is an
entry (words, function, base): function(args) is called in the new process and returns a dict with `examples` and
`seconds`; base names the contender that it is compared with, None for such a one itself.
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
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")  # that products are made with


def argument_parser(description, contenders):
    from classifier.processes import available_cores

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of each contender (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=contenders, metavar="NAME", help=f"of {', '.join(contenders)}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=available_cores(), help="(default: all cores, %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write every run's numbers, too")
    parser.add_argument("--contender", choices=contenders, help=argparse.SUPPRESS)  # what a process of its own computes
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def chosen(contenders, only):
    """Return the contenders that were asked for, and those that they are compared with; all where none was named."""
    names = set(only or contenders)
    names |= {contenders[name][2] for name in names}
    return {name: contender for name, contender in contenders.items() if name in names}


def run(command, args, folder, is_launched=False):
    """Run a command in a folder, on the device and with the threads of args; end this script if it fails.

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


def start(script, name, arguments, args, is_launched=False):
    """Run a contender in a process of its own, in an empty folder; return what its function returned."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"] if is_launched else [sys.executable]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.json")
        command = [*launcher, script, *arguments, "--device", args.device, "--threads", str(args.threads)]
        run([*command, "--contender", name, "--result", str(result)], args, folder, is_launched)
        return json.loads(result.read_text(encoding="utf-8"))


def compute(contenders, args):
    """Call the function of args.contender and write what it returns to args.result."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU")
    args.result.write_text(json.dumps(contenders[args.contender][1](args)), encoding="utf-8")


def synchronise():
    """Wait until the GPU, where there is one, has done what it was told."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def progress(words):
    print(words, file=sys.stderr, flush=True)


def compare(contenders, rates):
    """Return a row for each contender: median, least and largest of its rates, and how many times as fast its base is.

    rates: {name: [examples/s of each round]}. `ratio` is the quotient of the medians, `paired_ratio` the median of the
    quotients of each round.
    """
    rows = []
    for name, (words, _, base) in contenders.items():
        of_name, of_base = rates[name], rates.get(base)
        row = {"name": name, "words": words, "base": base, "median": statistics.median(of_name)}
        row |= {"min": min(of_name), "max": max(of_name), "ratio": None, "paired_ratio": None}
        if base:
            row["ratio"] = statistics.median(of_base) / row["median"]
            row["paired_ratio"] = statistics.median(a / b for a, b in zip(of_base, of_name, strict=True))
        rows.append(row)
    return rows


def table(rows):
    """Return the rows of `compare` as a table in Markdown."""
    lines = [
        "| | examples/s (median) | least to most | ours is faster by | median of the rounds |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = [f"{row[key]:.2f} x" if row["base"] else "" for key in ("ratio", "paired_ratio")]
        lines.append(
            f"| {row['words']} | {row['median']:.1f} | {row['min']:.1f} to {row['max']:.1f} | {' | '.join(ratios)} |"
        )
    return "\n".join(lines)


def surroundings(args):
    """Return the command, the hardware and the versions that numbers depend on."""
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


def write(path, content):
    from classifier.files import write_json

    if path:
        write_json(path, content)
        progress(f"written: {path}")
