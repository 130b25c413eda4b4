"""What the scripts say: the log, errors of two lines, numbers as text."""

import logging
from difflib import get_close_matches

log = logging.getLogger("classifier")


class Preempted(KeyboardInterrupt):
    """A signal asked the run to end; the same command goes on. Like Ctrl-C, it passes through `except Exception`."""


class RunFailed(Exception):
    """What the user is to know of a run that could not go on."""


def format_duration(seconds):
    """Return seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def format_score(number):
    """Return a score as a word: 0.8123, or undefined."""
    return "undefined" if number is None else f"{number:.4f}"


def format_scores(values):
    """Return scores as words: `f1 0.8123, accuracy 0.6838`."""
    return ", ".join(f"{name} {format_score(value)}" for name, value in values.items())


SKIP = "or leave such rows out: --on_bad_row skip."


class BadInput(Exception):
    """What a user gave cannot be used: one line of reason and one of advice, shown without a traceback, exit code 2."""

    def __init__(self, reason, advice):
        self.reason = _one_line(reason)
        self.advice = _one_line(advice)
        super().__init__(f"{self.reason}\n{self.advice}")


class BadRow(BadInput):
    """A mistake in one row, which says nothing against the others: --on_bad_row skip leaves it out and goes on."""

    def __init__(self, where, line, flaw, advice="Mend this row,"):
        super().__init__(f"{location(where, line)}: {flaw}", f"{advice} {SKIP}")
        self.line = line
        self.flaw = _one_line(flaw)


def _one_line(words):
    """Return words that quote a file or a library without line breaks, and without what UTF-8 cannot write."""
    return " ".join(words.splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")


def nearest(name, names):
    """Return ` (did you mean "x"?)` for the name in `names` most like `name`, or an empty string."""
    matches = get_close_matches(str(name), [str(known) for known in names], n=1)
    return f' (did you mean "{matches[0]}"?)' if matches else ""


def location(path, number):
    """Return the words for a row of a file, as messages name it: `FILE, line 7`, or `FILE, record 7`."""
    has_records = str(path).lower().removesuffix(".gz").endswith((".json", ".parquet"))
    return f"{path}, {'record' if has_records else 'line'} {number}"


def without_skip(advice):
    """Return the advice about a row without that of leaving it out, for where this cannot be done."""
    return advice.removesuffix(SKIP).rstrip(" ,") + "."


def in_red(words):
    """Return words as a terminal shows them in red; as they are where the log goes elsewhere."""
    return f"\x1b[1;31m{words}\x1b[0m" if log.handlers and log.handlers[0].stream.isatty() else words
