"""A search for good settings with Optuna: trials on disk, shared by processes; hopeless ones end early."""

import json
import math
import sys
import threading
from contextlib import suppress

from classifier.messages import BadInput
from classifier.training.lock import locked

SPACE = ["learning_rate=1e-5..2e-4", "batch_size=8,16,32", "epochs=2..10"]  # unless --grid says otherwise
STARTUP_TRIALS = 5  # drawn at random, and never ended early
TENTHS = 10  # trials are compared at the same part of their steps


def import_optuna():
    """Return the package. Raises BadInput where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise BadInput("--search: the package optuna is not installed", "pip install optuna") from None
    return optuna


class Search:
    """The trials of a search in a folder, shared by the threads and processes that work on it."""

    def __init__(self, folder, space, number, is_minimal=False):
        """space: [(flag, "LOW..HIGH" or [values])]; number: of trials; is_minimal: less is better."""
        optuna = import_optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        path = str(folder / "search.jsonl")
        lock = JournalFileOpenLock(path) if sys.platform == "win32" else None  # a symbolic link needs rights there
        self.folder, self.space, self.number = folder, space, number
        self.study = optuna.create_study(
            study_name="search",
            storage=JournalStorage(JournalFileBackend(path, lock)),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS, n_warmup_steps=TENTHS // 3),
            direction="minimize" if is_minimal else "maximize",
            load_if_exists=True,
        )
        self.reported = {}  # {number of a trial: the tenths that the study knows of}
        self.choosing = threading.Lock()

    def take(self, claims):
        """Return (the next trial, its {flag: value}), or None where there are enough.

        claims: an ExitStack, which holds the trial's lock until it is told. A trial that nobody holds was left by a
        process that was killed: the same values are tried again, and its run goes on.
        """
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        with self.choosing:
            trials = self.study.get_trials(deepcopy=False)
            for left in trials:
                if left.state == TrialState.RUNNING and self._claim(left.number, claims):
                    self.study.tell(left.number, state=TrialState.FAIL)
                    self.study.enqueue_trial(left.params)
                    break
            else:
                if sum(trial.state != TrialState.FAIL for trial in trials) >= self.number:
                    return None
            trial = self.study.ask()
            self._claim(trial.number, claims)
            # A seed for each trial: two processes that begin together would else draw the same.
            seeded = {"seed": trial.number, "n_startup_trials": STARTUP_TRIALS, "constant_liar": True}
            self.study.sampler = TPESampler(**seeded)
            return trial, as_flags({name: suggest(trial, name, values) for name, values in self.space})

    def _claim(self, number, claims):
        """Lock a trial; return whether nobody else holds it."""
        try:
            claims.enter_context(locked(self.folder / "trials" / str(number)))
        except BadInput:
            return False
        return True

    def is_hopeless(self, trial, run):
        """Tell the study what a running training has scored so far; return whether it should end. run: its folder."""
        known = self.reported.setdefault(trial.number, set())
        for line in evaluations_of(run):
            tenth = round(TENTHS * line["epoch"] / float(trial.params.get("epochs", TENTHS)))
            score = next(iter(line["scores"].values()))
            if score is not None and tenth not in known:
                known.add(tenth)
                trial.report(score, tenth)
        return trial.should_prune()

    def tell(self, trial, score):
        """End a trial with its score; None: it was ended early."""
        from optuna.trial import TrialState

        with self.choosing:
            self.study.tell(trial, score, state=TrialState.PRUNED if score is None else None)

    def settings(self):
        """Return ({flag: value} of each trial that was trained to its end, how many were ended early)."""
        from optuna.trial import TrialState

        with suppress(OSError):  # others may still hold some
            (self.folder / "trials").rmdir()
        trials = self.study.get_trials(deepcopy=False)
        finished = {str(flags := as_flags(each.params)): flags for each in trials if each.state == TrialState.COMPLETE}
        return list(finished.values()), sum(each.state == TrialState.PRUNED for each in trials)


def is_range(values):
    """Return whether the values of a flag are LOW..HIGH. Raises BadInput where the ends are no such numbers."""
    low, dots, high = values.partition("..")
    try:
        if dots and not 0 <= float(low) < float(high) < math.inf:
            raise ValueError
    except ValueError:
        raise BadInput(f"{values}: not LOW..HIGH, two numbers from 0", "Write 1e-5..2e-4, or 2..10.") from None
    return bool(dots)


def suggest(trial, name, values):
    """Return the trial's value of a flag. values: a list, or a range LOW..HIGH, of whole numbers or of others."""
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    low, high = values.split("..")
    if low.isdecimal() and high.isdecimal():
        return trial.suggest_int(name, int(low), int(high))
    low, high = float(low), float(high)
    return trial.suggest_float(name, low, high, log=low > 0 and high / low >= 10)


def as_flags(params):
    """Return the values of a trial as text, short enough for the name of a folder."""
    return {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in params.items()}


def evaluations_of(run):
    """Return the evaluations in a run's metrics.jsonl so far, of the split that chooses."""
    lines = []
    with suppress(OSError, ValueError):  # not begun, or a line that is being written
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    evaluations = [line for line in lines if line["type"] == "eval"]
    return [line for line in evaluations if line["split"] == evaluations[0]["split"]]
