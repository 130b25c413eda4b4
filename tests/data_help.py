"""For the tests of the data layer: tables in every format, a Hub and a web server without a network."""

import csv
import gzip
import io
import json
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pytest
from pyarrow import parquet

from classifier.data.splits import load_splits
from classifier.data.tasks import Task
from classifier.messages import BadInput

AB = [("one", "a"), ("two", "b")]
COMMIT, LATER = "1" * 40, "2" * 40  # two commits of a repository
FORMATS = ["a.csv", "a.tsv", "a.json", "a.jsonl", "a.parquet"]
FILES = [*FORMATS, *(f"{name}.gz" for name in FORMATS[:4]), "a.zip::folder/a.csv", "a.zip::a.jsonl", "a.zip::a.tsv.gz"]


def use_cache(monkeypatch, folder):
    """Make `folder` the cache of a test; return where this project's files lie in it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "text-classification-scripts"


def table_bytes(name, rows, header):
    kind = name.removesuffix(".gz").rpartition(".")[2]
    records = [dict(zip(header, row, strict=True)) for row in rows]
    if kind == "parquet":
        file = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
        content = file.getvalue()
    elif kind in ("json", "jsonl"):
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        content = (f"[{', '.join(lines)}]" if kind == "json" else "\n".join(lines)).encode()
    else:
        text, unquoted = io.StringIO(), {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        table = csv.writer(text, lineterminator="\n", **(unquoted if kind == "tsv" else {}))
        table.writerows([header, *rows])
        content = text.getvalue().encode()
    return gzip.compress(content) if name.endswith(".gz") else content


def put_table(folder, name, rows, header=("text", "label")):
    """Write rows in the format of the name, a member of an archive included; return the name to give to a task."""
    file, _, member = name.partition("::")
    content = table_bytes(member or file, rows, header)
    if member:
        with zipfile.ZipFile(folder / file, "a") as archive:
            archive.writestr(member, content)
    else:
        (folder / file).write_bytes(content)
    return f"{folder}/{name}"


def first_row(name):
    """The number of a table's first row: its line, or its record."""
    return 2 if ".csv" in name or ".tsv" in name else 1


def files_task(folder, header=("text", "label"), suffix=".csv", task=None, **tables):
    """A task on tables written to files; the keys of the task go in as `task`."""
    files = {split: put_table(folder, f"{split}{suffix}", rows, header) for split, rows in tables.items()}
    return Task("mine", files=files, **(task or {}))


def text_task(folder, content, name="train.csv", **keys):
    """A task on one train file with this content, text or bytes."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return Task("mine", files={"train": str(folder / name)}, **keys)


def refusal(task, **options):
    """The BadInput of loading a task: one line of reason, one of advice."""
    with pytest.raises(BadInput) as caught:
        load_splits(task, **options)
    assert "\n" not in caught.value.reason and "\n" not in caught.value.advice
    assert caught.value.advice
    return caught.value


def hub_table(labels, names=None, feature=None, **texts):
    """A split as the Hub serves it, with columns sentence, label and idx; a ClassLabel where names are given."""
    feature = feature or (datasets.ClassLabel(names=names) if names else datasets.Value("int64"))
    columns = {"sentence": [f"text {number}" for number in range(len(labels))], **texts}
    columns |= {"label": labels, "idx": list(range(len(labels)))}
    features = {name: datasets.Value("string") for name in columns}
    features |= {"label": feature, "idx": datasets.Value("int32")}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def hub_task(labels=None, **keys):
    dataset = {"path": "some/data", "name": "part"}
    return Task("hubby", labels=labels, **{"text": ["sentence"], "dataset": dataset, **keys})


class FakeHub(dict):
    """A Hub without a network: splits to fill in, the commit it is at, and what was asked of it."""

    def __init__(self, monkeypatch):
        self.commit, self.asked = COMMIT, []
        monkeypatch.setattr(datasets, "load_dataset", self.load_dataset)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda api, *args, **keys: self.info(*args, **keys))

    def load_dataset(self, *arguments, revision):
        self.asked.append((*arguments, revision))
        return datasets.DatasetDict(self)

    def info(self, repository, *, repo_type, revision=None, timeout):
        self.asked.append(("commit", repository, repo_type, revision))
        return huggingface_hub.hf_api.DatasetInfo(id=repository, sha=self.commit, private=False, tags=[])


@contextmanager
def served(folder):
    """Serve a folder over HTTP; gives the address, and the list of the paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(Path(folder)))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()
            thread.join()
