"""Trainings: runs of train.py as processes of their own, some at a time, which all end when a signal asks for it."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from classifier.messages import BadInput, Preempted, RunFailed, format_duration, format_score, log
from classifier.processes import available_cores
from classifier.training.lock import holder

SCRIPT = Path(__file__).resolve().parents[2] / "train.py"


@dataclass
class Run:
    """One training of a sweep."""

    setting: dict  # {flag: value}, of a grid or a search
    changes: dict  # {flag: value}: the setting, and the seed or fold
    folder: Path

    @property
    def results(self):
        """What train.py wrote at its end; None before."""
        path = self.folder / "results.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    @property
    def log_file(self):
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def score(self):
        """The first metric of the split that chose the model."""
        return next(iter(next(iter(self.results["scores"].values())).values()))


class Trainings:
    """Trains runs, some at a time."""

    def __init__(self, flags, workers):
        self.flags, self.workers = flags, workers
        self.processes, self.is_ending = set(), False
        for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.end)

    def end(self, *_):
        """Let each training save and end."""
        self.is_ending = True
        for process in list(self.processes):
            process.terminate()

    def train(self, run, is_hopeless=None):
        """Train a run to its end; return whether it got there.

        is_hopeless: a function that is asked each second whether to end the run early. Raises Preempted where a signal
        ended it, and BadInput or RunFailed where train.py failed.
        """
        if other := holder(run.folder):  # of a sweep that was killed
            log.info(f"{run.folder.name}: process {other['pid']} on {other['host']} still trains it")
        while holder(run.folder) and not self.is_ending:
            time.sleep(2)
        if self.is_ending:
            raise Preempted("stopped; the same command goes on")
        code, was_hopeless = self._run_script(run, is_hopeless)
        if code == 75 and was_hopeless and not self.is_ending:
            return False
        if code == 75:
            raise Preempted("stopped; the same command goes on")
        if code:
            raise describe_failure(run, code)
        return True

    def _run_script(self, run, is_hopeless):
        """Run train.py; return (its exit code, whether it was ended as hopeless)."""
        environment = dict(os.environ)
        if self.workers > 1:
            threads = max(1, available_cores() // self.workers)
            environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        changes = [word for name, value in run.changes.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(SCRIPT), *self.flags, *changes, "--output_dir", str(run.folder)]
        was_hopeless = False
        with open(run.log_file, "ab") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            self.processes.add(process)
            if self.is_ending:  # since it was asked
                process.terminate()
            while process.poll() is None:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1 if is_hopeless and not was_hopeless else None)
                if is_hopeless and not was_hopeless and is_hopeless():
                    was_hopeless = True
                    process.terminate()
            self.processes.discard(process)
        return process.returncode, was_hopeless

    def train_all(self, runs):
        """Train all runs to their ends; log a line for each."""
        started, finished = time.monotonic(), []

        def train(run):
            self.train(run)
            finished.append(run)
            left = (time.monotonic() - started) / len(finished) * (len(runs) - len(finished))
            time_left = f", about {format_duration(left)} left" if len(finished) < len(runs) else ""
            log.info(f"{describe_run(run)} ({len(finished)} of {len(runs)}{time_left})")

        self.call_for_each(train, runs)

    def call_for_each(self, function, items):
        """Call a function of each item, some at a time. The first failure ends all trainings, and is raised."""
        failure = None
        with ThreadPoolExecutor(self.workers) as pool:
            for future in as_completed([pool.submit(function, item) for item in items]):
                error = future.exception()
                if error and (failure is None or isinstance(failure, Preempted)):
                    failure = error
                    self.end()
        if failure:
            raise failure


def describe_failure(run, code):
    """Return the exception that a failed training ends the sweep with: its own last two lines, and where its log is."""
    lines = run.log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line.removeprefix("train.py: ") for line in lines if line.startswith("train.py: ")][-2:]
    reason, advice = [*errors, "", ""][:2] if errors else (f"train.py ended with exit code {code}", "")
    reason = f"{run.folder.name}: {reason.removeprefix('error: ')}"
    if code == 2 and not run.folder.exists():  # refused before it began: nothing is left behind
        run.log_file.unlink()
        with suppress(OSError):
            run.log_file.parent.rmdir()
    return BadInput(reason, advice) if code == 2 else RunFailed(f"{reason}\n{advice} See {run.log_file}.")


def describe_run(run):
    """Return a finished run in a line: its name, its first score and its time."""
    results = run.results
    name = next(iter(next(iter(results["scores"].values()))))
    return f"{run.folder.name}: {name} {format_score(run.score)}, {results['train_seconds']:.0f} s"
