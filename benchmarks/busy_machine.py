"""Training speed on a machine that computes something else meanwhile: how long should idle threads spin?

    python benchmarks/busy_machine.py --output busy_machine.json        # three rounds; an hour on two cores

Each contender is timed by train_speed.py's clock on a quiet machine, and beside one and two processes that compute all
the time. The threads of a matrix product wait for the slowest of them; a thread that spins while it waits keeps a core
from the one that it waits for, as soon as something else wants a core too. OpenMP reads how long to spin from
OMP_WAIT_POLICY and GOMP_SPINCOUNT (libgomp: about 300,000 turns unless told otherwise).
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import rounds
import train_speed

FP32 = ["--mixed_precision", "no"]
CONTENDERS = {  # name: (title, function, the contender to compare with); the environment is in ENVIRONMENTS
    "ours": ("train.py", train_speed.ours, None),
    "spin_300000": ("spinning 300,000 turns, as libgomp does", train_speed.ours, "ours"),
    "spin_10000": ("spinning 10,000 turns", train_speed.ours, "ours"),
    "spin_1000": ("spinning 1,000 turns", train_speed.ours, "ours"),
    "passive": ("not spinning", train_speed.ours, "ours"),
    "one_thread": ("one thread", partial(train_speed.ours, flags=["--threads", "1"]), "ours"),
    "ours_fp32": ("train.py, fp32", partial(train_speed.ours, flags=FP32), None),
    "spin_300000_fp32": ("fp32, spinning 300,000 turns", partial(train_speed.ours, flags=FP32), "ours_fp32"),
    "spin_1000_fp32": ("fp32, spinning 1,000 turns", partial(train_speed.ours, flags=FP32), "ours_fp32"),
    "passive_fp32": ("fp32, not spinning", partial(train_speed.ours, flags=FP32), "ours_fp32"),
    "trainer": ("Trainer, fp32", train_speed.trainer, "ours_fp32"),
}
ENVIRONMENTS = {
    name: {"GOMP_SPINCOUNT": name.split("_")[1]} if name.startswith("spin") else {"OMP_WAIT_POLICY": "PASSIVE"}
    for name in CONTENDERS
    if name.startswith(("spin", "passive"))
}


@contextmanager
def busy_processes(number):
    """Keep this many processes busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def environment(variables):
    """Set variables for the processes that are started."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def main():
    parser = rounds.argument_parser(__doc__, CONTENDERS)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="processes beside (default: 0 1 2)")
    parser.add_argument("--steps", type=int, default=14, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--task", default="mrpc")
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2", help="an id or a folder")
    parser.set_defaults(runs=3)
    args = parser.parse_args()
    if args.contender:
        return rounds.write_result(CONTENDERS, args)
    contenders = rounds.choose_contenders(CONTENDERS, args.only)
    arguments = []
    for name in ("task", "model", "batch_size", "warmup", "steps"):
        value = getattr(args, name)
        arguments += [f"--{name}", str(Path(value).resolve() if Path(str(value)).exists() else value)]
    rates = {number: {name: [] for name in contenders} for number in args.busy}
    tables = {}
    for run in range(1, args.runs + 1):
        for number in args.busy:
            for name in contenders:
                with busy_processes(number), environment(ENVIRONMENTS.get(name, {})):
                    result = rounds.run_contender(__file__, name, arguments, args)
                rates[number][name].append(result["examples"] / result["seconds"])
                rounds.log_progress(f"round {run}, {number} busy, {name}: {rates[number][name][-1]:.2f} examples/s")
    for number in args.busy:
        tables[number] = rounds.compare_rates(contenders, rates[number])
        print(f"\nbeside {number} busy processes\n\n{rounds.format_table(tables[number])}")
    content = {"benchmark": "busy_machine", **rounds.describe_machine(args), "tables": tables, "rates": rates}
    rounds.write_content(args.output, content)


if __name__ == "__main__":
    main()
