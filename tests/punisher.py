"""Kill a training at random moments, again and again, and see that it ends as an unbroken one does.

    python tests/punisher.py --kills 25                              # one process
    python tests/punisher.py --kills 25 --processes 2 --seed 1       # two, under torchrun

Each run is killed and started by the same command until it is complete; then the next one, until all kills are spent.
Prints where the kills hit, and whether the weights, the curve and the scores of each run are those of the unbroken one.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import yaml
from conftest import ROOT, TORCHRUN_2, WORDS, bert_config, make_rows, write_table

EVAL_EVERY, SAVE_EVERY = 60, 25  # steps
# What a kill aims at, and how often.
AIMS = {"any moment": 9, "a save": 6, "an evaluation": 5, "the start": 3, "the end": 2}
SECONDS = 120  # for anything that takes ten where nothing else runs


def make_task(folder):
    """Write a task on 200 reviews, for a small BERT with dropout; return its file."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    for name, number, seed in (("train", 200, 1), ("validation", 100, 2)):
        write_table(folder / f"{name}.csv", make_rows(number, seed))
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    task = {
        "files": {name: f"{name}.csv" for name in ("train", "validation")},
        "text": "text",
        "label": "label",
        "labels": ["negative", "positive"],
        "metrics": ["accuracy", "f1"],
        "model": bert_config(folder / "vocab.txt", **rates),
        # Few examples a batch and a low rate, so that the evaluations take a while and find better models for long.
        "defaults": {"learning_rate": 2e-4, "batch_size": 16, "eval_batch_size": 2, "mixed_precision": "no"},
    }
    (folder / "reviews.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return folder / "reviews.yaml"


class Attempt:
    """One start of the command of a run; ends by itself or by a signal."""

    def __init__(self, task, run, processes, steps):
        flags = ["--max_steps", steps, "--eval_every", EVAL_EVERY, "--save_every", SAVE_EVERY, "--log_every", 1]
        flags += ["--threads", 1, "--output_dir", run]
        launcher = TORCHRUN_2 if processes == 2 else (sys.executable,)
        drop = ("ACCELERATE_", "OMP_NUM", "TORCHELASTIC")
        self.run, self.number_of_ranks = run, processes
        self.saved_step = newest_step(run)
        self.curve_before = file_number(run / "metrics.jsonl")
        self.log = run.with_name(f"{run.name}.log")
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*map(str, [*launcher, ROOT / "train.py", "--task", task, *flags])],
                cwd=task.parent,
                env={name: value for name, value in os.environ.items() if not name.startswith(drop)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def has_ended(self):
        return self.process.poll() is not None

    def is_training(self):
        """Whether it has come further than the checkpoint that it began with."""
        is_new = file_number(self.run / "metrics.jsonl") not in (None, self.curve_before)
        return is_new and last_line(self.run).get("step", 0) > self.saved_step

    def is_saving(self):
        return any((self.run / "checkpoints").glob("*.tmp"))

    def is_evaluating(self):
        line = last_line(self.run)
        return line.get("type") == "train" and line["step"] % EVAL_EVERY == 0

    def is_at_the_end(self):
        return (self.run / "model.tmp").exists() or (self.run / "results.json").exists()

    def place(self):
        """Where it is just now."""
        if not self.is_training():
            return "the start"
        if self.is_at_the_end():
            return "the end"
        return "a save" if self.is_saving() else "an evaluation" if self.is_evaluating() else "a step"

    def wait_for(self, condition, seconds=SECONDS):
        """Return whether this holds, before the command ended by itself or so much time has passed."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.has_ended() or time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    def family(self):
        """The command's process and all that it has started; the ranks are those that run the script themselves."""
        everyone = []
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            everyone = [parent, *parent.children(recursive=True)]
        ranks = []
        for process in everyone:
            with suppress(psutil.NoSuchProcess):
                if Path([*process.cmdline(), "", "", ""][2 if "-u" in process.cmdline() else 1]).name == "train.py":
                    ranks.append(process)
        return everyone, ranks

    def end(self, number=None, to_all=True, chooser=random):
        """Send a signal, or none, and wait until the command has ended; return its exit code."""
        everyone, ranks = self.family()
        targets = everyone if to_all or not ranks else [chooser.choice(ranks)]
        for process in targets if number else []:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        try:
            code = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = "hung"
        for process in everyone:  # a launcher that is killed cannot end the others
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in everyone:
            with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                process.wait(10)
        text = self.log.read_text(encoding="utf-8")
        if code == "hung":
            raise RuntimeError(f"{number} to {targets} did not end the run in {SECONDS} s:\n{text}")
        if number is None and code != 0:
            raise RuntimeError(f"the run failed by itself, with exit code {code}:\n{text}")
        return code


def file_number(path):
    """A number that changes when a file is replaced, as metrics.jsonl is on resume; None without one."""
    with suppress(OSError):
        return path.stat().st_ino
    return None


def last_line(run):
    """The last whole line of metrics.jsonl, or an empty dict."""
    with suppress(OSError, ValueError), open(run / "metrics.jsonl", "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
        lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else {}
    return {}


def newest_step(run):
    """The step of the newest checkpoint; 0 without one."""
    names = [path.parent.name for path in (run / "checkpoints").glob("step-*/manifest.json")]
    return max((int(name[5:]) for name in names if "." not in name), default=0)


def outcome(run):
    """What must be equal: the digest of the weights, all numbers of the curve but its speed, the scores."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    return {
        "weights": hashlib.sha256((run / "model" / "model.safetensors").read_bytes()).hexdigest(),
        "curve": [{**line, "examples_per_second": 0, "seconds": 0, "loss": line["loss"].hex()} for line in lines],
        "scores": [results[name] for name in ("best_step", "scores", "steps", "train_examples")],
    }


def kill(attempt, chooser):
    """Kill a run at some moment; return (signal, to whom, where), or None where it was complete before."""
    aim = chooser.choices(list(AIMS), list(AIMS.values()))[0]
    number = chooser.choice([signal.SIGTERM, signal.SIGKILL])
    to_all = chooser.random() < 0.5
    delay = chooser.uniform(0, 8 if aim == "the start" else 2 if aim == "any moment" else 0.01)
    if aim != "the start":
        attempt.wait_for(attempt.is_training)
    conditions = {"a save": attempt.is_saving, "an evaluation": attempt.is_evaluating, "the end": attempt.is_at_the_end}
    if aim in conditions:
        attempt.wait_for(conditions[aim])
    attempt.wait_for(lambda: False, delay)
    place = attempt.place()
    if attempt.end(number, to_all, chooser) == 0:
        return None
    return number.name, "all" if to_all else "one", place


def punish(folder, kills, processes=1, seed=0, steps=1200):
    """Train for so many steps, and kill, until so many kills are spent.

    Returns the runs: {"kills": [(signal, to whom, where)], "seconds", "is_equal": whether all is as in the unbroken
    one, "differs": what is not}.
    """
    chooser, task, rounds = random.Random(seed), make_task(folder), []
    started = time.monotonic()
    Attempt(task, folder / "whole", processes, steps).end()
    whole = outcome(folder / "whole")
    rounds.append({"kills": [], "seconds": time.monotonic() - started, "is_equal": True, "differs": []})
    left = kills
    while left:
        run, spent, started = folder / f"run-{len(rounds)}", [], time.monotonic()
        is_complete = False
        while left and not is_complete:
            hit = kill(Attempt(task, run, processes, steps), chooser)
            is_complete = hit is None
            spent += [hit or ("none", "", "complete before")]
            left -= 1
            state = run / "state.json"
            if state.exists():  # complete or absent, whenever a kill comes
                json.loads(state.read_text(encoding="utf-8"))
        Attempt(task, run, processes, steps).end()
        result = outcome(run)
        differs = [name for name in whole if result[name] != whole[name]]
        differs += [path.name for path in run.iterdir() if path.suffix in (".tmp", ".old") or "lock" in path.name]
        differs += ["checkpoints"] if (run / "checkpoints").exists() else []
        seconds = time.monotonic() - started
        rounds.append({"kills": spent, "seconds": seconds, "is_equal": not differs, "differs": differs})
    return rounds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="in all (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="punisher-") as folder:
        rounds = punish(Path(folder), args.kills, args.processes, args.seed)
    counts = Counter(hit for run in rounds for hit in run["kills"])
    print(f"{'signal':10}{'to':6}{'where':18}times")
    for (name, to_whom, where), number in sorted(counts.items()):
        print(f"{name:10}{to_whom:6}{where:18}{number:5}")
    print(f"\n{'run':10}{'kills':8}{'seconds':10}equal to the unbroken one")
    for number, run in enumerate(rounds):
        answer = "yes" if run["is_equal"] else f"NO: {', '.join(run['differs'])}"
        name = f"run {number}" if number else "unbroken"
        print(f"{name:10}{len(run['kills']):<8}{run['seconds']:<10.1f}{answer}")
    return 0 if all(run["is_equal"] for run in rounds) else 1


if __name__ == "__main__":
    sys.exit(main())
