"""For the tests of a run's folder and its checkpoints."""

import os
from pathlib import Path

from classifier.data.tasks import Task

TASK = Task(name="reviews", text=["text"], labels=["negative", "positive"], files={"train": "train.csv"})
SETTINGS = {"learning_rate": 0.1, "seed": 1}
DATA = {"train": "abc"}
RESULTS = {  # what write_model reads of results.json
    "scores": {},
    "choice": {},
    "corrected_scores": {},
    "majority_baseline": {},
    "best_step": 10,
    "trained_on": ["train"],
    "mixed_precision": "no",
}


def make_folder(path):
    path.mkdir()
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(path, content):
    path.mkdir()
    (path / "file").write_text(content)
    return path


def record(monkeypatch):
    """Note all fsyncs and renames, in order: ("sync", path), ("rename", old, new, names in the folder of new)."""
    events, sync, replace = [], os.fsync, os.replace

    def noting_sync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    def noting_replace(old, new):
        replace(old, new)
        events.append(("rename", str(old), str(new), names(Path(new).parent)))

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return events
