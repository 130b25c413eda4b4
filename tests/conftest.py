"""Fixtures: a tiny BERT and its tokenizer, made in code; small tables; scripts run as users run them."""

import atexit
import csv
import json
import logging
import math
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "classifier")]  # the latter: its helpers, for one file run alone

# No test may reach the network, nor the caches of the person who runs it. Set before datasets is imported, which reads
# its cache folder once.
CACHE = tempfile.mkdtemp(prefix="cache-of-tests-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.update(HF_HOME=CACHE, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="true")
os.environ.pop("HF_DATASETS_CACHE", None)
os.environ.pop("HF_HUB_CACHE", None)
# Bytes and last digits are a CPU's: a Mac's GPU, or another, would give others. Tests of devices say otherwise.
os.environ.setdefault("ACCELERATE_USE_CPU", "true")
# Threads that wait must not spin: two processes of two threads each on two cores would slow each other down tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

ADJECTIVES = {"positive": ["good", "fine", "lovely", "great"], "negative": ["bad", "poor", "awful", "dull"]}
THINGS = ["room", "film", "book", "meal", "train", "course", "hotel", "phone", "garden", "museum"]
WORDS = sorted({"the", "was", "very", "and", ".", ",", *THINGS, *ADJECTIVES["positive"], *ADJECTIVES["negative"]})


# The files that take longest come first: two processes share the files, and neither is to wait at the end.
SLOWEST = [
    "test_resume",
    "test_real_data",
    "test_benchmarks",
    "test_slurm",
    "test_train",
    "test_launch",
    "test_predict",
    "test_export",
    "test_examples",
]


MORE_CASES = 2  # of a slow test with many cases, those that SLOW=1 adds to the README's command; FULL=1 runs all


def pytest_collection_modifyitems(items):
    slow, full = (os.environ.get(name) == "1" for name in ("SLOW", "FULL"))
    cases = Counter()
    for item in items:
        marker, test = item.get_closest_marker("slow"), (item.path, item.originalname)
        limit = marker.kwargs.get("after", 0) + (MORE_CASES if slow else 0) if marker else math.inf
        is_late = cases[test] >= limit
        cases[test] += 1
        if (is_late or item.get_closest_marker("full")) and not full:
            needed = "SLOW=1" if is_late and not slow else "FULL=1"
            item.add_marker(pytest.mark.skip(reason=f"takes long; {needed} in the environment runs it"))
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory):
    """A WordPiece vocabulary file of the words above."""
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n", encoding="utf-8")
    return file


def bert_config(vocabulary, **changes):
    """The `model:` mapping of a 2-layer BERT, without dropout unless a test asks for it."""
    return {
        "model_type": "bert",
        "vocab": str(vocabulary),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        **changes,
    }


@pytest.fixture(scope="session")
def tiny_bert(vocabulary, tmp_path_factory):
    """A folder with a 2-layer BERT (base model, no head) and its tokenizer, as the Hub would serve them."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    values = {key: value for key, value in bert_config(vocabulary).items() if key not in ("vocab", "model_type")}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(WORDS) + 5, **values)).save_pretrained(folder)
    BertTokenizer(str(vocabulary)).save_pretrained(folder)
    return folder


def make_rows(number, seed=0, labels=("negative", "positive")):
    """Return (text, label) rows that a tiny model learns in a few dozen steps; lengths differ."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(number):
        label = chooser.choice(labels)
        clauses = [
            f"the {chooser.choice(THINGS)} was {'very ' * chooser.randrange(3)}{chooser.choice(ADJECTIVES[label])}"
            for _ in range(chooser.randrange(1, 4))
        ]
        rows.append((" and ".join(clauses) + " .", label))
    return rows


def write_table(path, rows, header=("text", "label")):
    """Write rows as CSV, TSV or JSONL, by the name of the file; return the path."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            for row in rows:
                file.write(json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n")
        else:
            table = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
            table.writerows([header, *rows])
    return path


def write_reviews(folder, rows=200):
    """Write train.csv with so many rows, validation.csv (50) and test.csv (50); return the folder."""
    for name, number, seed in (("train", rows, 1), ("validation", 50, 2), ("test", 50, 3)):
        write_table(folder / f"{name}.csv", make_rows(number, seed))
    return folder


def write_review_task(file, model, **defaults):
    """Write a YAML task on the reviews beside it, in fp32; return the file."""
    task = {
        "files": {name: f"{name}.csv" for name in ("train", "validation", "test")},
        "text": "text",
        "label": "label",
        "labels": ["negative", "positive"],
        "metrics": ["accuracy", "f1"],
        "model": model,
        "defaults": {"learning_rate": 0.003, "batch_size": 16, "epochs": 2, "mixed_precision": "no", **defaults},
    }
    file.write_text(yaml.safe_dump(task), encoding="utf-8")
    return file


@pytest.fixture
def reviews(tmp_path):
    """A folder with train.csv (200 rows), validation.csv (50) and test.csv (50)."""
    return write_reviews(tmp_path)


@pytest.fixture
def review_task(reviews, vocabulary):
    """A YAML task on these reviews, with a 2-layer BERT trained from scratch, in fp32-sized steps."""
    return write_review_task(reviews / "reviews.yaml", bert_config(vocabulary))


def run_script(script, *arguments, cwd, launcher=(sys.executable,), stdin=None, environment=None, timeout=300):
    """Run a script of the project as a user would, from another folder; return the CompletedProcess with its text."""
    command = [*launcher, str(ROOT / script), *map(str, arguments)]
    # A test's own processes must not inherit what a launcher of the test session has set.
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_NUM", "TORCHELASTIC"))}
    return subprocess.run(
        command,
        cwd=cwd,
        input=stdin,
        env={**variables, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


TORCHRUN_2 = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")


def lines_of(folder, kind="train"):
    """Return the lines of a run's metrics.jsonl of one type."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["type"] == kind]


def temperature_of(folder):
    """Return what a model's logits are divided by before they become probabilities."""
    return json.loads((Path(folder) / "task.json").read_text(encoding="utf-8"))["temperature"]


def at_temperature(chances, folder):
    """Return the probabilities {label: p} of a softmax as they are at the temperature of a model's folder."""
    powers = {label: p ** (1 / temperature_of(folder)) for label, p in chances.items()}
    return {label: power / sum(powers.values()) for label, power in powers.items()}


@pytest.fixture(scope="session")
def real_data():
    """The folder of real data and models that REAL_DATA names; see README.md."""
    if not os.environ.get("REAL_DATA"):
        pytest.skip("REAL_DATA is not set: it names a folder with real data sets and a hub (README.md, Tests)")
    return Path(os.environ["REAL_DATA"]).resolve()


@pytest.fixture
def run_inside(monkeypatch, capfd):
    """Run a script as __main__ in this process, for speed: a function that returns (exit code, stdout, stderr)."""

    def run(script, *arguments, cwd):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        states = (AcceleratorState, GradientState, PartialState)
        for state in states:  # another test of this process may have made an Accelerator
            state._reset_state()
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
        capfd.readouterr()
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            for state in states:
                state._reset_state()
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def log_lines(monkeypatch):
    """The lines that a test's own process logs."""
    from classifier.messages import log

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(log, "handlers", [handler])
    log.setLevel(logging.INFO)
    return lines


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache of its own for a test of the data layer; the folder of this project in it."""
    from data_help import use_cache

    return use_cache(monkeypatch, tmp_path / "the cache")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that needs no network."""
    from data_help import FakeHub

    return FakeHub(monkeypatch)


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # another test may have made one
        state._reset_state()
    return Accelerator(cpu=True)


@pytest.fixture
def told(caplog, monkeypatch):
    """What the scripts log: a fixture like caplog, whatever another test has done to their logger."""
    from classifier.messages import log

    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return caplog


@pytest.fixture
def finished(tmp_path):
    """The folder of a finished run, without its model's files."""
    from run_help import DATA, SETTINGS

    from classifier.training import checkpoint, run_folder

    (tmp_path / "run" / "model").mkdir(parents=True)
    checkpoint.begin_or_resume(tmp_path / "run", SETTINGS, DATA)
    (tmp_path / "run" / "results.json").write_text('{"steps": 7}')
    run_folder.write_state(tmp_path / "run", "done")
    return tmp_path / "run"
