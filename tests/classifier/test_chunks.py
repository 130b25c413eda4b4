"""chunks.py: logits in chunks on disk, each computed once, by one of the processes; a killed prediction resumes."""

from types import SimpleNamespace

import numpy as np
import pytest

from classifier import chunks
from classifier.messages import RunFailed

ROWS = [(line, {"text": str(line)}) for line in range(2, 13)]  # eleven rows, in chunks of four: 4, 4, 3


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(chunks, "ROWS_PER_CHUNK", 4)


def process(index=0, number=1):
    return SimpleNamespace(
        process_index=index, num_processes=number, is_main_process=index == 0, wait_for_everyone=lambda: None
    )


class Model:
    """Its logits are the line numbers; it notes what it computed, and breaks at a line."""

    def __init__(self, breaks_at=None):
        self.computed, self.breaks_at, self.reported = [], breaks_at, []

    def __call__(self, rows):
        lines = [line for line, _ in rows]
        if self.breaks_at in lines:
            raise KeyboardInterrupt
        self.computed += lines
        return np.array([[line, -line] for line in lines], dtype=np.float32)

    def report(self, rows, computed):
        self.reported.append((rows, computed))


def compute(folder, model, settings="a", index=0, number=1):
    process_chunks = chunks.LogitChunks(folder / "out.csv", {"of": settings}, process(index, number))
    process_chunks.compute(iter(ROWS), model, model.report)
    return chunks.LogitChunks(folder / "out.csv", {"of": settings}, process())


def values(logit_chunks):
    pairs = logit_chunks.read(iter(ROWS))
    return [(row["text"], *values) for rows, logits in pairs for row, values in zip(rows, logits, strict=True)]


EXPECTED = [(str(line), line, -line) for line in range(2, 13)]


def test_rows_come_back_in_order_with_their_logits(tmp_path):
    model = Model()
    logit_chunks = compute(tmp_path, model)
    assert values(logit_chunks) == EXPECTED
    assert model.reported == [(4, 4), (4, 4), (3, 3)]
    logit_chunks.remove()
    assert list(tmp_path.iterdir()) == []


def test_processes_take_turns(tmp_path):
    models = [Model(), Model()]
    for index, model in enumerate(models):
        logit_chunks = compute(tmp_path, model, index=index, number=2)
    assert [model.computed for model in models] == [[2, 3, 4, 5, 10, 11, 12], [6, 7, 8, 9]]
    assert values(logit_chunks) == EXPECTED


def test_what_is_there_is_not_computed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, Model(breaks_at=7))
    model = Model()
    assert values(compute(tmp_path, model)) == EXPECTED
    assert model.computed == list(range(6, 13)) and model.reported == [(4, 0), (4, 4), (3, 3)]


def test_other_settings_start_again(tmp_path):
    compute(tmp_path, Model(), settings="a")
    model = Model()
    assert values(compute(tmp_path, model, settings="b")) == EXPECTED
    assert model.computed == list(range(2, 13))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00v", None])
def test_a_damaged_chunk_is_computed_again(tmp_path, content):
    compute(tmp_path, Model())
    chunk = tmp_path / "out.csv.parts" / "00000001.npy"
    chunk.write_bytes(chunk.read_bytes()[:-4] if content is None else content)
    model = Model()
    assert values(compute(tmp_path, model)) == EXPECTED
    assert model.computed == [6, 7, 8, 9]


def test_a_chunk_that_another_command_removed_is_reported(tmp_path):
    logit_chunks = compute(tmp_path, Model())
    (tmp_path / "out.csv.parts" / "00000002.npy").unlink()
    with pytest.raises(RunFailed, match="another process"):
        values(logit_chunks)
