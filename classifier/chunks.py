"""Logits of a large table, in parts on disk: a killed prediction goes on, and several processes share the work.

OUTPUT.parts/ holds a file for each 4,096 rows, complete or absent, and settings.json, which says what they are of. When
all are there, the output is written from them in one pass, under a temporary name, and they go.
"""

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np

from classifier.files import CannotWrite, write_json
from classifier.messages import RunFailed
from classifier.predictor import ROWS_AT_A_TIME

ROWS_OF_A_CHUNK = ROWS_AT_A_TIME  # of a part: read, sorted by length, predicted


class LogitChunks:
    """The parts of one output. Every process makes one; `settings` tell what they must be of."""

    def __init__(self, output, settings, accelerator):
        self.folder = Path(f"{output}.parts")
        self.accelerator = accelerator
        file = self.folder / "settings.json"
        if accelerator.is_main_process and not (file.is_file() and json.loads(file.read_text()) == settings):
            self.remove()
            try:
                self.folder.mkdir()
                write_json(file, settings)
            except OSError as error:
                raise CannotWrite(output, error) from None
        accelerator.wait_for_everyone()

    def compute(self, rows, logits_of, done):
        """Compute the parts that are not there, each process every n-th.

        rows: an iterator of (line, row); logits_of: a function of such rows to logits (rows, outputs);
        done(rows, computed) is called after each part: how many rows it has, and how many of them were computed now.
        """
        for number, some in enumerate(chunked(rows)):
            if number % self.accelerator.num_processes != self.accelerator.process_index:
                continue
            is_there = self._read(number, len(some)) is not None
            if not is_there:
                logits = logits_of(some)
                temporary = self._path(number).with_suffix(".tmp")
                try:
                    with open(temporary, "wb") as file:
                        np.save(file, logits, allow_pickle=False)
                    os.replace(temporary, self._path(number))
                except OSError as error:
                    raise CannotWrite(self.folder, error) from None
            done(len(some), 0 if is_there else len(some))
        self.accelerator.wait_for_everyone()

    def rows(self, rows):
        """Yield (rows, their logits) for each part, of the (line, row) pairs that compute had."""
        for number, some in enumerate(chunked(rows)):
            logits = self._read(number, len(some))
            if logits is None:
                raise RunFailed(f"{self._path(number)}: is gone. Does another process write the same --output?")
            yield [row for _, row in some], logits

    def remove(self):
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number):
        return self.folder / f"{number:08}.npy"

    def _read(self, number, rows):
        """Return the logits of a part; None where they are not there, or not whole."""
        try:
            logits = np.load(self._path(number), allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return logits if len(logits) == rows else None


def chunked(rows):
    """Yield lists of at most ROWS rows."""
    rows = iter(rows)
    while some := list(islice(rows, ROWS_OF_A_CHUNK)):
        yield some
