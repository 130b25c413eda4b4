"""The log, errors of two lines, and numbers formatted as text."""

import logging
import re
from difflib import get_close_matches

log = logging.getLogger("classifier")
MOST_NAMES, LONGEST_NAME = 10, 40  # in a line; characters
# What breaks or reorders a line, or cannot be written as UTF-8: control characters, line and paragraph separators,
# marks of the writing direction, halves of surrogate pairs. Others that do not show, as inside an emoji, stay.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


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
    return f' (did you mean "{escape(matches[0])}"?)' if matches else ""


def escape(name):
    """Return a name with its line breaks and other control characters as escapes, so that it stays on its line."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), name)


def format_name(name, limit=LONGEST_NAME):
    """Return the name of a class or a column, or a value, as messages show it: on one line, and shortened."""
    name = escape(str(name))
    return name if len(name) <= limit else f"{name[: limit - 3]}..."


def join_some(words):
    """Return words as `a, b, c`; of more than ten, the first ten and how many more there are."""
    words = list(words)
    more = f" and {len(words) - MOST_NAMES:,} more" if len(words) > MOST_NAMES else ""
    return ", ".join(words[:MOST_NAMES]) + more


def list_names(names):
    """Return names of classes or columns as a part of a line: join_some of format_name."""
    return join_some(map(format_name, names))


def location(path, number):
    """Return how messages name a row of a file: `FILE, line 7`, or `FILE, record 7` in JSON and Parquet."""
    has_records = str(path).lower().removesuffix(".gz").endswith((".json", ".parquet"))
    return f"{path}, {'record' if has_records else 'line'} {number}"


def in_red(text):
    """Return text in the terminal's red; unchanged where the log goes to a file or a pipe."""
    stream = log.handlers[0].stream if log.handlers else None
    return f"\x1b[1;31m{text}\x1b[0m" if stream and not stream.closed and stream.isatty() else text


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
