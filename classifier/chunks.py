"""Logits of a large table, in chunks on disk: a killed prediction resumes, and several processes share the work.

OUTPUT.parts/ holds one file for each 4,096 rows, complete or absent, and settings.json, which says what the logits
depend on. Once all chunks exist, the output is written from them in one pass, atomically, and the folder is removed.
"""

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np

from classifier.files import CannotWrite, temporary_file, write_json
from classifier.messages import RunFailed
from classifier.predictor import ROWS_AT_A_TIME

ROWS_PER_CHUNK = ROWS_AT_A_TIME


class LogitChunks:
    """The chunks of one output. Each process makes one; chunks of other `settings` are removed."""

    def __init__(self, output, settings, accelerator):
        self.folder = Path(f"{output}.parts")
        self.accelerator = accelerator
        file = self.folder / "settings.json"
        if accelerator.is_main_process and not (
            file.is_file() and json.loads(file.read_text(encoding="utf-8")) == settings
        ):
            self.remove()
            try:
                self.folder.mkdir()
                write_json(file, settings)
            except OSError as error:
                raise CannotWrite(output, error) from None
        accelerator.wait_for_everyone()

    def compute(self, rows, compute_logits, report):
        """Compute the missing chunks; each process takes every n-th chunk.

        rows: an iterator of (line, row); compute_logits: from a list of such pairs to logits (rows, outputs);
        report(rows, computed): called after each chunk of this process with its rows, and how many were computed now.
        """
        for number, chunk in enumerate(split_into_chunks(rows)):
            if number % self.accelerator.num_processes != self.accelerator.process_index:
                continue
            is_cached = self._read(number, len(chunk)) is not None
            if not is_cached:
                logits = compute_logits(chunk)
                try:
                    with temporary_file(self._path(number)) as temporary, open(temporary, "wb") as file:
                        np.save(file, logits, allow_pickle=False)
                except OSError as error:
                    raise CannotWrite(self.folder, error) from None
            report(len(chunk), 0 if is_cached else len(chunk))
        self.accelerator.wait_for_everyone()

    def read(self, rows):
        """Yield (rows, their logits) for each chunk. rows: the (line, row) pairs that compute was given."""
        for number, chunk in enumerate(split_into_chunks(rows)):
            logits = self._read(number, len(chunk))
            if logits is None:
                raise RunFailed(f"{self._path(number)}: is gone. Does another process write the same --output?")
            yield [row for _, row in chunk], logits

    def remove(self):
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number):
        return self.folder / f"{number:08}.npy"

    def _read(self, number, rows):
        """Return the logits of a chunk, or None where it is missing or incomplete."""
        try:
            logits = np.load(self._path(number), allow_pickle=False)
        except (FileNotFoundError, ValueError, EOFError):
            return None
        return logits if len(logits) == rows else None


def split_into_chunks(rows):
    """Yield lists of at most ROWS_PER_CHUNK rows."""
    rows = iter(rows)
    while chunk := list(islice(rows, ROWS_PER_CHUNK)):
        yield chunk
