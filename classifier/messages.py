"""The log, errors of two lines, and numbers formatted as text."""

import logging
from difflib import get_close_matches

log = logging.getLogger("classifier")


class Preempted(KeyboardInterrupt):
    """A signal asked the run to stop; the same command resumes it. Like Ctrl-C, it passes `except Exception`."""


class RunFailed(Exception):
    """The run cannot continue; the message is shown to the user without a traceback."""


class BadInput(Exception):
    """Unusable input from the user: one line of reason and one of advice, shown without a traceback, exit code 2."""

    def __init__(self, reason, advice):
        self.reason = _one_line(reason)
        self.advice = _one_line(advice)
        super().__init__(f"{self.reason}\n{self.advice}")


class NoRows(BadInput):
    """A table without a row."""


class BadRow(BadInput):
    """A mistake in a single row: the rest of the table can be used, with --on_bad_row skip.

    `line` is the row's number, `problem` the reason without its place, `fix` the advice where rows cannot be skipped.
    """

    def __init__(self, path, line, problem, fix="Fix this row"):
        super().__init__(f"{location(path, line)}: {problem}", f"{fix}, or skip such rows: --on_bad_row skip.")
        self.line = line
        self.problem = _one_line(problem)
        self.fix = f"{_one_line(fix)}."


def _one_line(text):
    """Return text that may quote a file or a library as a single line that UTF-8 can encode."""
    line = " ".join(part.strip() for part in text.splitlines())
    return line.encode("utf-8", "backslashreplace").decode("utf-8")


def nearest(name, names):
    """Return ` (did you mean "x"?)` for the closest match among `names`, or an empty string."""
    matches = get_close_matches(str(name), [str(known) for known in names], n=1)
    return f' (did you mean "{matches[0]}"?)' if matches else ""


def location(path, number):
    """Return how messages name a row of a file: `FILE, line 7`, or `FILE, record 7` in JSON and Parquet."""
    has_records = str(path).lower().removesuffix(".gz").endswith((".json", ".parquet"))
    return f"{path}, {'record' if has_records else 'line'} {number}"


def in_red(text):
    """Return text in the terminal's red; unchanged where the log goes to a file or a pipe."""
    return f"\x1b[1;31m{text}\x1b[0m" if log.handlers and log.handlers[0].stream.isatty() else text


def format_duration(seconds):
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_score(number):
    """Return a score with four decimals, or `undefined` for None."""
    return "undefined" if number is None else f"{number:.4f}"


def format_scores(scores):
    """Return {metric: score} as text: `f1 0.8123, accuracy 0.6838`."""
    return ", ".join(f"{name} {format_score(score)}" for name, score in scores.items())
