"""predict.py: labels for new text, from anywhere to anywhere; the input unchanged beside them, whole or not at all."""

import csv
import datetime
import decimal
import errno
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
import yaml
from conftest import ACCELERATE, ROOT, TORCHRUN_2, at_temperature, bert_config, make_rows, run_script, write_table
from data_help import put_table
from pyarrow import parquet
from transformers import pipeline

from predict import progress_bar

FP32 = ("--mixed_precision", "no", "--threads", 1)
NEW = ["predicted_label", "probability", "probability_negative", "probability_positive"]
AWKWARD = [
    ("00456", "None", 'he said "the room was bad" , twice'),
    ("1e5", "", "the film was good ,\nand the meal was dull ."),
    ("-0", " é 房 ", "the book, was very, very fine"),
    ("007", "NaN", ""),
    ("2,5", '""', " the train was awful . "),
]


def read_table(text, delimiter=","):
    quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting))


def stream(text):
    """A standard input that holds this text."""
    return io.TextIOWrapper(io.BytesIO(text.encode()))


def files_in(folder):
    return {path.name for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, vocabulary):
    """A run on reviews, plain and undecided, so that probabilities are neither 0 nor 1."""
    folder = tmp_path_factory.mktemp("trained")
    write_table(folder / "train.csv", make_rows(200, 1))
    task = {
        "files": {"train": "train.csv"},
        "text": "text",
        "labels": ["negative", "positive"],
        "model": bert_config(vocabulary),
        "defaults": {"learning_rate": 0.01, "warmup_steps": 5, "batch_size": 16, "mixed_precision": "no"},
    }
    (folder / "reviews.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    flags = ["--task", "reviews.yaml", "--threads", 1, "--max_steps", 24, "--output_dir", "run"]
    ended = run_script("train.py", *flags, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def expected(trained):
    """What transformers' own pipeline answers: a function of texts (or pairs, as dicts) -> [{label: probability}]."""
    classify = pipeline("text-classification", model=str(trained / "model"), top_k=None)

    def ask(inputs, has_task=True):
        answers = [{answer["label"]: answer["score"] for answer in classify([text])[0]} for text in inputs]
        return [at_temperature(answer, trained / "model") for answer in answers] if has_task else answers

    return ask


@pytest.fixture
def predict(run_inside, trained, tmp_path):
    """Predict in this process, in tmp_path; it must succeed. Returns what was printed on standard output."""

    def run(*arguments, model=trained):
        code, printed, errors = run_inside("predict.py", *FP32, "--model", model, *arguments, cwd=tmp_path)
        assert code == 0, printed + errors
        return printed

    return run


@pytest.fixture
def refused(run_inside, trained, tmp_path):
    """A mistake of the user's: exit code 2, two lines on standard error beside the log, nothing written."""

    def run(*arguments, model=trained):
        before = files_in(tmp_path)
        code, printed, errors = run_inside("predict.py", *FP32, "--model", model, *arguments, cwd=tmp_path)
        assert code == 2, printed + errors
        lines = [line for line in errors.splitlines() if line.startswith("predict.py: ")]
        assert len(lines) == 2 and errors.splitlines()[-2:] == lines and "Traceback" not in errors, errors
        assert files_in(tmp_path) == before
        return "\n".join(lines)

    return run


def assert_probabilities(rows, expected):
    for row, answer in zip(rows, expected, strict=True):
        found = {name: float(row[f"probability_{name}"]) for name in ("negative", "positive")}
        assert sum(found.values()) == pytest.approx(1, abs=1e-12)
        assert found == pytest.approx(answer, abs=1e-5)
        assert row["predicted_label"] == max(found, key=found.get)
        assert float(row["probability"]) == max(found.values())


# ------------------------------------------------------------------------------------------------------- one text


def test_one_text_gets_every_label_likeliest_first(predict, expected):
    text = "the room was lovely and the film was bad ."
    (answer,) = expected([text])
    words = sorted(((f"{value:.4f}", label) for label, value in answer.items()), reverse=True)
    assert [tuple(line.split()) for line in predict("--text", text).splitlines()] == words
    assert [tuple(line.split()) for line in predict("--text", text, "--top_k", 1).splitlines()] == words[:1]
    assert len(predict("--text", text, "--top_k", 7).splitlines()) == 2


@pytest.mark.parametrize("number", [0, -1])
def test_top_k_is_a_number_above_0(refused, number):
    assert "--top_k" in refused("--text", "the room was good .", f"--top_k={number}")


def test_the_answer_to_one_text_goes_to_the_output_that_was_asked_for(predict, tmp_path):
    predict("--text", "the room was good .", "--output", "answer.csv")
    assert (tmp_path / "answer.csv").exists()


# --------------------------------------------------------------------------------------------------------- tables


def test_a_csv_keeps_its_columns_and_rows_and_gets_the_probabilities_of_a_pipeline(predict, expected, tmp_path):
    rows = AWKWARD + [(str(number), "", text) for number, (text, _) in enumerate(make_rows(40, 8))]
    write_table(tmp_path / "in.csv", rows, header=("id", "note", "text"))
    printed = predict("--input", "in.csv", "--output", "out.csv", "--eval_batch_size", 7)
    assert printed == "" and files_in(tmp_path) == {"in.csv", "out.csv"}
    found = read_table((tmp_path / "out.csv").read_bytes().decode())
    assert list(found[0]) == ["id", "note", "text", *NEW]
    assert [(row["id"], row["note"], row["text"]) for row in found] == rows
    assert_probabilities(found, expected([text for _, _, text in rows]))
    assert {row["predicted_label"] for row in found} == {"negative", "positive"}


# csv.writer leaves it without quotes before Python 3.13.
def test_a_carriage_return_in_a_field_stays_in_its_field(predict, tmp_path):
    write_table(tmp_path / "in.csv", [], header=("id", "text"))
    (tmp_path / "in.csv").write_bytes(b'id,text\n"1\r2","the room\rwas good ."\n')
    predict("--input", "in.csv", "--output", "out.csv")
    (row,) = read_table((tmp_path / "out.csv").read_bytes().decode())
    assert (row["id"], row["text"]) == ("1\r2", "the room\rwas good .")


def test_standard_output_holds_predictions_alone(predict, tmp_path):
    write_table(tmp_path / "in.csv", AWKWARD, header=("id", "note", "text"))
    printed = predict("--input", "in.csv")
    predict("--input", "in.csv", "--output", "out.csv")
    assert printed.encode() == (tmp_path / "out.csv").read_bytes()


def test_tsv_is_neither_unquoted_nor_quoted(predict, expected, tmp_path):
    rows = [('"1', 'the "room" was good .'), ("02", '"the film'), ("3", "was, bad")]
    (tmp_path / "in.tsv").write_text("id\ttext\n" + "".join(f"{a}\t{b}\n" for a, b in rows), encoding="utf-8")
    predict("--input", "in.tsv", "--output", "out.tsv")
    lines = [line.split("\t") for line in (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()]
    assert lines[0] == ["id", "text", *NEW] and [tuple(line[:2]) for line in lines[1:]] == rows
    found = [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
    assert_probabilities(found, expected([text for _, text in rows]))


def test_a_tsv_cannot_hold_line_breaks(refused, tmp_path):
    write_table(tmp_path / "in.csv", AWKWARD, header=("id", "note", "text"))
    errors = refused("--input", "in.csv", "--output", "out.tsv")
    assert "tab or a line break" in errors and ".csv or .jsonl" in errors


def test_jsonl_keeps_the_types_of_its_values(predict, expected, tmp_path):
    rows = [
        {"id": 7, "text": "the room was good .", "flag": True, "nothing": None, "list": [1, {"a": "é"}]},
        {"id": "007", "text": "the meal\twas\nbad .", "flag": False, "nothing": "", "list": 1.5},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    predict("--input", "in.jsonl", "--output", "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in found] == rows
    assert [list(row) for row in found] == [[*rows[0], *NEW]] * 2
    assert_probabilities(found, expected([row["text"] for row in rows]))


def test_values_of_jsonl_stand_under_their_own_columns_in_a_csv(predict, tmp_path):
    lines = ['{"id": "1", "text": "the room was good ."}', '{"text": "the film was bad .", "id": "2"}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    predict("--input", "in.jsonl", "--output", "out.csv")
    found = read_table((tmp_path / "out.csv").read_text())
    assert [(row["id"], row["text"]) for row in found] == [("1", "the room was good ."), ("2", "the film was bad .")]


def test_rows_of_jsonl_with_other_keys_make_no_ragged_csv(run_inside, trained, tmp_path):
    lines = ['{"id": "1", "text": "the room was good ."}', '{"text": "the film was bad ."}']
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--input", "in.jsonl", "--output", "out.csv"]
    code, _, _ = run_inside("predict.py", *FP32, "--model", trained, *flags, cwd=tmp_path)
    if code == 0:
        table = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
        assert {len(fields) for fields in table} == {2 + len(NEW)}
    else:
        assert code == 2 and not (tmp_path / "out.csv").exists()


def test_an_output_named_gz_is_compressed_or_refused(run_inside, trained, tmp_path):
    write_table(tmp_path / "in.csv", make_rows(3))
    flags = ["--input", "in.csv", "--output", "out.csv.gz"]
    code, _, _ = run_inside("predict.py", *FP32, "--model", trained, *flags, cwd=tmp_path)
    assert (tmp_path / "out.csv.gz").read_bytes()[:2] == b"\x1f\x8b" if code == 0 else code == 2


def test_a_large_file_keeps_its_order_and_an_error_at_its_end_leaves_nothing(predict, refused, tmp_path):
    """Larger than what is read at a time (4096 rows): the first part is written by the time the error is met."""
    rows = [(str(number), text) for number, (text, _) in enumerate(make_rows(4110, 4))]
    write_table(tmp_path / "in.csv", rows, header=("id", "text"))
    predict("--input", "in.csv", "--output", "out.csv", "--eval_batch_size", 512)
    whole = (tmp_path / "out.csv").read_bytes()
    found = read_table(whole.decode())
    assert [(row["id"], row["text"]) for row in found] == rows
    by_text = {}
    for row in found:
        probability = float(row["probability_positive"])
        assert by_text.setdefault(row["text"], probability) == pytest.approx(probability, abs=1e-5)
    with open(tmp_path / "in.csv", "a") as file:
        file.write("4110,one,field,too many\n")
    errors = refused("--input", "in.csv", "--output", "out.csv", "--eval_batch_size", 512)
    assert "line 4112" in errors
    assert (tmp_path / "out.csv").read_bytes() == whole
    refused("--input", "in.csv", "--output", "new.csv", "--eval_batch_size", 512)


def test_the_input_may_be_replaced_by_the_output(predict, tmp_path):
    write_table(tmp_path / "in.csv", make_rows(5))
    predict("--input", "in.csv", "--output", "in.csv")
    found = read_table((tmp_path / "in.csv").read_text())
    assert [(row["text"], row["label"]) for row in found] == make_rows(5) and list(found[0])[2:] == NEW


def test_lines_of_text_and_json_and_parquet(predict, expected, tmp_path):
    texts = ["the room was good .", 'the "meal" was, very bad', "", " the book was fine . "]
    (tmp_path / "in.txt").write_bytes("\r\n".join(texts).encode() + b"\r\n")
    with gzip.open(tmp_path / "in.txt.gz", "wb") as file:
        file.write("\n".join(texts).encode())
    (tmp_path / "in.json").write_text(json.dumps([{"text": text, "id": 7} for text in texts]))
    for name in ("in.txt", "in.txt.gz", "in.json"):
        predict("--input", name, "--output", "out.jsonl")
        found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [row["text"] for row in found] == texts
        assert_probabilities(found, expected(texts))
    predict("--input", "in.json", "--output", "out.parquet")
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table.column_names == ["text", "id", *NEW] and table["id"].to_pylist() == [7] * 4
    assert [str(table.schema.field(name).type) for name in ("text", "id", NEW[1])] == ["string", "int64", "double"]
    assert_probabilities(table.to_pylist(), expected(texts))
    parquet.write_table(table.select(["id", "text"]), tmp_path / "in.parquet")
    predict("--input", "in.parquet", "--output", "again.parquet")
    assert parquet.read_table(tmp_path / "again.parquet").select(table.column_names).equals(table)


def test_typed_columns_of_parquet_in_every_format(predict, tmp_path):
    day, price = datetime.date(2026, 1, 31), decimal.Decimal("19.90")
    columns = {
        "text": ["the room was good .", "the film was bad ."],
        "day": [day, None],
        "at": [datetime.datetime(2026, 1, 31, 9, 5, tzinfo=datetime.UTC)] * 2,
        "price": [price, None],
        "raw": [b"ab", b""],
        "took": [datetime.timedelta(seconds=90)] * 2,
        "tags": [["a", "b"], None],
        "count": pyarrow.array([3, None], pyarrow.int32()),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    for name in ("out.jsonl", "out.csv", "out.tsv", "out.parquet"):
        predict("--input", "in.parquet", "--output", name)
    names = list(columns)[1:]
    first, second = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [first[name] for name in names] == [
        *("2026-01-31", "2026-01-31T09:05:00+00:00", "19.90", "YWI=", "P0DT0H1M30S"),
        *(["a", "b"], 3),
    ]
    assert [second[name] for name in names] == [None, first["at"], None, "", first["took"], None, None]
    tables = read_table((tmp_path / "out.csv").read_text()), read_table((tmp_path / "out.tsv").read_text(), "\t")
    for table in tables:
        cells = [str(first[name]) for name in names[:5]] + ['["a", "b"]', "3"]
        assert [table[0][name] for name in names] == cells
        assert [table[1][name] for name in names] == ["", first["at"], "", "", first["took"], "", ""]
    again = parquet.read_table(tmp_path / "out.parquet").select(["text", *names])
    assert again == parquet.read_table(tmp_path / "in.parquet")  # int32, too


def test_standard_output_holds_what_json_lines_do_and_a_date_that_python_lacks_is_refused(predict, refused, tmp_path):
    columns = {"text": ["the room was good ."], "day": [datetime.date(2026, 1, 31)], "raw": [b"ab"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    printed = predict("--input", "in.parquet")
    assert printed.startswith('{"text": "the room was good .", "day": "2026-01-31", "raw": "YWI=", "predicted_label": ')
    predict("--input", "in.parquet", "--output", "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == printed
    columns["day"] = pyarrow.array([10**7], pyarrow.date32())
    parquet.write_table(pyarrow.table(columns), tmp_path / "in.parquet")
    assert "in.parquet: " in refused("--input", "in.parquet", "--output", "later.csv")


def test_another_encoding_and_another_delimiter(predict, expected, refused, tmp_path):
    texts = ["the room was good .", "é the film was bad ."]
    (tmp_path / "in.csv").write_bytes(b"id;text\n" + "".join(f"é;{text}\n" for text in texts).encode("latin-1"))
    flags = ["--input", "in.csv", "--output", "out.jsonl", "--delimiter", ";"]
    assert "--encoding cp1252" in refused(*flags)
    predict(*flags, "--encoding", "latin-1")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in found] == [("é", text) for text in texts]
    assert_probabilities(found, expected(texts))


def test_bad_rows_end_it_or_are_listed_beside(predict, expected, refused, tmp_path):
    (tmp_path / "in.csv").write_bytes(b"id,text\n1,the room was good .\n2,a,b\n3,\xff\n4,the film was bad .\n")
    flags = ["--input", "in.csv", "--output", "out.csv"]
    errors = refused(*flags)
    assert "in.csv, line 3: 3 fields" in errors and "--on_bad_row skip" in errors
    predict(*flags, "--on_bad_row", "skip")
    assert files_in(tmp_path) == {"in.csv", "out.csv", "out.csv.bad_rows.csv"}
    found = read_table((tmp_path / "out.csv").read_text())
    assert [row["id"] for row in found] == ["1", "4"]
    assert_probabilities(found, expected(["the room was good .", "the film was bad ."]))
    bad = read_table((tmp_path / "out.csv.bad_rows.csv").read_text())
    assert [(row["file"], row["row"]) for row in bad] == [("in.csv", "3"), ("in.csv", "4")]
    assert "3 fields" in bad[0]["reason"] and "0xff" in bad[1]["reason"]
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n{"text": null}\n{"txet": "bad"}\n')
    predict("--input", "in.jsonl", "--output", "out.jsonl", "--on_bad_row", "skip")
    assert [row["row"] for row in read_table((tmp_path / "out.jsonl.bad_rows.csv").read_text())] == ["2", "3"]


def test_columns_behind_the_probabilities_do_not_count_as_labels():
    import predict as script
    from classifier.data.tasks import Task

    task = Task("two", text=["text"], labels=["no", "yes"])
    assert script.likeliest(task, ["yes", 0.9, 0.1, 0.9, 0.8], top_k=2) == [("yes", 0.9), ("no", 0.1)]


def test_the_likeliest_labels_alone(predict, expected, tmp_path):
    texts = [text for text, _ in make_rows(9, 3)]
    write_table(tmp_path / "in.csv", [(text,) for text in texts], header=("text",))
    predict("--input", "in.csv", "--output", "out.csv", "--top_k", 1)
    found = read_table((tmp_path / "out.csv").read_text())
    assert list(found[0]) == ["text", "predicted_label", "probability", "label_1", "probability_1"]
    for row, answer in zip(found, expected(texts), strict=True):
        assert row["predicted_label"] == row["label_1"] == max(answer, key=answer.get)
        assert float(row["probability_1"]) == float(row["probability"]) == pytest.approx(max(answer.values()), abs=1e-5)
    predict("--input", "in.csv", "--output", "out.csv", "--top_k", 7)
    assert list(read_table((tmp_path / "out.csv").read_text())[0])[-2:] == ["label_2", "probability_2"]


# --------------------------------------------------------------------------------------- processes, kills, a full disk


def write_many(path, number=20_000):
    """Write rows of five parts, where there are 20,000."""
    return write_table(path, [(str(row), text) for row, (text, _) in enumerate(make_rows(number, 4))], ("id", "text"))


def test_labels_below_a_probability_are_left_empty(predict, refused, trained, tmp_path):
    rows = [(text,) for text, _ in make_rows(60, 3)]
    write_table(tmp_path / "in.csv", rows, header=("text",))
    predict("--input", "in.csv", "--output", "all.csv")
    everything = read_table((tmp_path / "all.csv").read_text())
    middle = sorted(float(row["probability"]) for row in everything)[30]
    predict("--input", "in.csv", "--output", "out.csv", "--min_probability", middle)
    for row, full in zip(read_table((tmp_path / "out.csv").read_text()), everything, strict=True):
        is_sure = float(full["probability"]) >= middle
        assert row == {**full, "predicted_label": full["predicted_label"] if is_sure else ""}
    task = json.loads((trained / "model" / "task.json").read_text())
    task["min_probabilities"] = {"0.9": middle, "0.95": None}
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    (model / "task.json").write_text(json.dumps(task))
    predict("--input", "in.csv", "--output", "target.csv", "--target_accuracy", 0.85, model=model)
    assert (tmp_path / "target.csv").read_text() == (tmp_path / "out.csv").read_text()
    errors = refused("--input", "in.csv", "--output", "no.csv", "--target_accuracy", 0.95, model=model)
    assert "do not promise that" in errors and "They promise up to 0.9." in errors
    assert "two ways to say the same" in refused("--text", "a", "--target_accuracy", 0.9, "--min_probability", 0.5)


@pytest.mark.slow
def test_two_processes_write_what_one_does(trained, predict, tmp_path):
    write_many(tmp_path / "in.csv")
    predict("--input", "in.csv", "--output", "one.csv")
    flags = [*FP32, "--model", trained, "--input", "in.csv", "--output", "two.csv"]
    done = run_script("predict.py", *flags, cwd=tmp_path, launcher=TORCHRUN_2)
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path) == {"in.csv", "one.csv", "two.csv"}
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert done.stderr.count("20,000 rows in") == 1
    done = run_script("predict.py", "--model", trained, "--text", "a", cwd=tmp_path, launcher=TORCHRUN_2)
    assert done.returncode == 1 and "several processes need a file" in done.stderr


@pytest.mark.slow
def test_killed_three_times_it_ends_with_the_same_bytes(trained, predict, tmp_path):
    write_many(tmp_path / "in.csv")
    predict("--input", "in.csv", "--output", "unbroken.csv")
    flags = [*FP32, "--model", trained, "--input", "in.csv", "--output", "out.csv"]
    command = [sys.executable, ROOT / "predict.py", *flags]
    parts, computed = tmp_path / "out.csv.parts", {}
    for kill in range(3):
        running = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while len(list(parts.glob("*.npy"))) <= kill and time.monotonic() < deadline:
            time.sleep(0.01)
        running.kill()
        assert running.wait() == -signal.SIGKILL
        now = {file.name: file.stat().st_mtime_ns for file in parts.glob("*.npy")}
        assert kill < len(now) < 5 and not (tmp_path / "out.csv").exists()
        assert computed.items() <= now.items()  # nothing is computed twice
        computed = now
    predict("--input", "in.csv", "--output", "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "unbroken.csv").read_bytes()
    assert files_in(tmp_path) == {"in.csv", "unbroken.csv", "out.csv"}


def test_the_rows_done_and_the_time_left_are_logged(tmp_path, log_lines, monkeypatch):
    write_table(tmp_path / "in.csv", make_rows(100))
    now = [0.0]
    monkeypatch.setattr("predict.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with progress_bar(tmp_path / "in.csv", SimpleNamespace(num_processes=2, is_main_process=True)) as report:
        for seconds, rows, computed in [(4, 10, 0), (12, 20, 20), (16, 5, 5), (40, 15, 15)]:
            now[0] = seconds
            report(rows, computed)
    # Twice its own rows, as the other process is as far; those that were there cost no time. 40 rows in 12 seconds.
    lines = [line.replace(" ", "") for line in log_lines]
    assert len(lines) == 2 and lines[0].endswith("60/100[00:12<00:12,3.33rows/s]")
    assert lines[1].endswith("100/100[00:40<00:00,2.00rows/s]")


def test_parts_of_another_model_or_input_are_not_used(predict, tmp_path):
    write_table(tmp_path / "in.csv", [("0", "the room was good .")], ("id", "text"))
    predict("--input", "in.csv", "--output", "out.csv")
    expected = (tmp_path / "out.csv").read_bytes()
    parts = tmp_path / "out.csv.parts"
    parts.mkdir()
    (parts / "settings.json").write_text('{"model": "another"}')
    np.save(parts / "00000000.npy", np.array([[9, -9]], dtype=np.float32))
    predict("--input", "in.csv", "--output", "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == expected and not parts.exists()


def test_a_full_disk_keeps_the_work(trained, run_inside, predict, tmp_path, monkeypatch):
    write_many(tmp_path / "in.csv", 5000)
    predict("--input", "in.csv", "--output", "unbroken.csv")
    replace = os.replace

    def full(source, target):
        if str(target) == "out.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        flags = [*FP32, "--model", trained, "--input", "in.csv", "--output", "out.csv"]
        code, _, errors = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 2 and "out.csv: cannot be written (No space left on device)" in errors
    assert files_in(tmp_path) == {"in.csv", "unbroken.csv", "out.csv.parts"}
    assert len(list((tmp_path / "out.csv.parts").glob("*.npy"))) == 2
    predict("--input", "in.csv", "--output", "out.csv")
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "unbroken.csv").read_bytes()


# ---------------------------------------------------------------------------------------------------------- many files


@pytest.fixture
def several(tmp_path):
    """Seven small files in in/, of several formats; returns {name of the output: its texts}."""
    (tmp_path / "in").mkdir()
    texts = {}
    for number in range(7):
        name, out = [("a.csv", "a.csv"), ("b.jsonl", "b.jsonl"), ("c.txt", "c.tsv")][number % 3]
        texts[f"{number}{out}"] = of_file = [text for text, _ in make_rows(5 + number, number)]
        path = tmp_path / "in" / f"{number}{name}"
        if path.suffix == ".txt":
            path.write_text("\n".join(of_file) + "\n")
        else:
            write_table(path, [(text,) for text in of_file], header=("text",))
    return texts


def texts_of(path):
    lines = path.read_text().splitlines()
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in lines]
    return [row["text"] for row in csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")]


def test_a_file_without_rows_has_an_output_without_rows(trained, run_inside, tmp_path):
    (tmp_path / "in").mkdir()
    rows = [(text,) for text, _ in make_rows(3)]
    for name in ("a.csv", "e.parquet"):
        put_table(tmp_path / "in", name, rows, header=("text",))
    for name, content in (("b.csv", "text,note\n"), ("c.jsonl", ""), ("d.txt", "")):
        (tmp_path / "in" / name).write_text(content)
    with gzip.open(tmp_path / "in" / "f.csv.gz", "wt") as stream:
        stream.write("text\n")
    parquet.write_table(parquet.read_table(tmp_path / "in" / "e.parquet").slice(0, 0), tmp_path / "in" / "g.parquet")
    flags = [*FP32, "--model", trained, "--input", "in/*", "--output", "out"]
    code, _, printed = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 0, printed
    columns = "predicted_label,probability,probability_negative,probability_positive"
    out = tmp_path / "out"
    assert (out / "b.csv").read_text() == f"text,note,{columns}\n"
    assert (out / "c.jsonl").read_text() == ""
    assert (out / "d.tsv").read_text() == f"text,{columns}\n".replace(",", "\t")
    with gzip.open(out / "f.csv.gz", "rt") as stream:
        assert stream.read() == f"text,{columns}\n"
    empty = parquet.read_table(out / "g.parquet")
    assert empty.num_rows == 0 and empty.column_names == f"text,{columns}".split(",")
    assert len(texts_of(out / "a.csv")) == 3 and parquet.read_table(out / "e.parquet").num_rows == 3
    assert "out/b.csv: 0 rows" in printed
    manifest = json.loads((out / "manifest-1-of-1.json").read_text())
    assert [manifest[name]["rows"] for name in ("a.csv", "b.csv", "g.parquet")] == [3, 0, 0]


def test_a_file_that_cannot_be_read_does_not_stop_the_others(trained, run_inside, predict, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "d.csv"):
        write_table(tmp_path / "in" / name, [(text,) for text, _ in make_rows(3)], header=("text",))
    (tmp_path / "in" / "b.csv.gz").write_bytes(b"no gzip")
    write_table(tmp_path / "in" / "c.csv", [("a text",)], header=("words",))
    flags = [*FP32, "--model", trained, "--input", "in/*", "--output", "out"]
    code, _, errors = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 2 and "in/b.csv.gz: is not a complete .gz" in errors
    assert files_in(tmp_path / "out") == {"a.csv", "manifest-1-of-1.json"}
    code, _, errors = run_inside("predict.py", *flags, "--on_bad_row", "skip", cwd=tmp_path)
    assert code == 2
    assert errors.count("goes on with the next file") == 2
    last = [line for line in errors.splitlines() if "predict.py: " in line]
    assert "not predicted: in/b.csv.gz: is not a complete .gz" in last[0] and "1 more of 4 files" in last[0]
    assert files_in(tmp_path / "out") == {"a.csv", "d.csv", "manifest-1-of-1.json"}


def test_shards_write_each_file_once_and_a_second_time_nothing(predict, several, tmp_path):
    flags = ["--input", "in/*", "--output", "out"]
    for number in (1, 2, 3):
        predict(*flags, "--shard", f"{number}/3")
    manifests = [json.loads((tmp_path / f"out/manifest-{number}-of-3.json").read_text()) for number in (1, 2, 3)]
    assert [len(manifest) for manifest in manifests] == [3, 2, 2]
    told = {name: facts for manifest in manifests for name, facts in manifest.items()}
    assert told.keys() == several.keys()
    for name, texts in several.items():
        assert texts_of(tmp_path / "out" / name) == texts and told[name]["rows"] == len(texts)
        assert told[name]["sha256"] == hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest()
    manifest_names = {f"manifest-{number}-of-3.json" for number in (1, 2, 3)}
    assert files_in(tmp_path / "out") == several.keys() | manifest_names

    def state():
        return {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in several}

    before = state()
    predict(*flags)  # divided otherwise: what is there counts
    assert state() == before
    (tmp_path / "out" / "3a.csv").unlink()
    write_table(tmp_path / "in" / "1b.jsonl", [("the room was good .",)], header=("text",))
    predict(*flags, "--shard", "1/1")
    assert {name for name, at in state().items() if at != before[name]} == {"3a.csv", "1b.jsonl"}
    assert texts_of(tmp_path / "out" / "1b.jsonl") == ["the room was good ."]


def test_files_of_other_settings_are_not_taken_for_these(predict, several, tmp_path):
    flags, name = ["--input", "in/*", "--output", "out"], tmp_path / "out" / "0a.csv"
    predict(*flags)
    first = name.read_bytes()
    predict(*flags, "--top_k", 1, "--shard", "1/2")
    second = name.read_bytes()
    assert second != first
    predict(*flags)  # the first manifest is still there, and right about another file
    assert name.read_bytes() == first


def test_files_that_would_have_one_name_are_refused(refused, several, tmp_path):
    (tmp_path / "in" / "2c.tsv").write_text("text\na\n")
    assert "two files would be written as 2c.tsv" in refused("--input", "in/*", "--output", "out")


@pytest.mark.parametrize("words", ["0/3", "4/3", "1", "a/b", "1/2/3"])
def test_a_shard_is_one_of_n(refused, several, words):
    assert "--shard" in refused("--input", "in/*", "--output", "out", "--shard", words)


FILES, KILLS = (1000, 50) if os.environ.get("FULL") == "1" else (40, 2)


@pytest.mark.slow
def test_many_shards_and_random_kills(trained, tmp_path):
    """Two jobs at a time, killed at random moments: every row exactly once, and the bytes of an unbroken command."""
    (tmp_path / "in").mkdir()
    for number in range(FILES):
        rows = [(f"{number}-{row}", text) for row, (text, _) in enumerate(make_rows(6 + number % 5, number))]
        write_table(tmp_path / "in" / f"{number:04}.csv", rows, ("id", "text"))

    def start(folder, shard):
        flags = ["--model", trained, "--input", "in/*.csv", "--output", folder, "--shard", shard, *FP32]
        command = [sys.executable, *map(str, [ROOT / "predict.py", *flags])]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)

    def written():
        return len(list((tmp_path / "out").glob("*.csv")))

    assert start("unbroken", "1/1").wait() == 0
    chooser, kills, shards = random.Random(0), 0, ["1/2", "2/2"]
    while shards:
        running = {shard: start("out", shard) for shard in shards}
        if kills < KILLS:  # some files later, at any moment of a file
            enough, deadline = written() + chooser.randrange(FILES * 2 // KILLS), time.monotonic() + 60
            while written() < enough and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(chooser.uniform(0, 0.05))
            for process in running.values():
                kills += process.poll() is None
                process.kill()
        shards = [shard for shard, process in running.items() if process.wait() != 0]
    assert kills >= KILLS
    names = [f"{number:04}.csv" for number in range(FILES)]
    assert files_in(tmp_path / "out") == {*names, "manifest-1-of-2.json", "manifest-2-of-2.json"}
    ids = [row["id"] for name in names for row in read_table((tmp_path / "out" / name).read_text())]
    assert ids == [f"{number}-{row}" for number in range(FILES) for row in range(6 + number % 5)]
    merged = {at: b"".join((tmp_path / at / name).read_bytes() for name in names) for at in ("out", "unbroken")}
    assert hashlib.sha256(merged["out"]).digest() == hashlib.sha256(merged["unbroken"]).digest()


# -------------------------------------------------------------------------------------------------- standard input


def test_lines_of_standard_input_get_lines_of_standard_output(trained, expected, tmp_path):
    texts = ["the room was good .", 'the "meal" was, very bad', "", "the book was fine ."]
    stdin = "\n".join(texts) + "\n"
    launcher = ACCELERATE  # its own words must not reach standard output either
    flags = [*FP32, "--model", trained, "--input", "-"]
    ended = run_script("predict.py", *flags, cwd=tmp_path, stdin=stdin, launcher=launcher)
    assert ended.returncode == 0, ended.stderr
    header, *lines = [line.split("\t") for line in ended.stdout.split("\n")[:-1]]
    assert header == ["text", *NEW] and [line[0] for line in lines] == texts
    assert_probabilities([dict(zip(header, line, strict=True)) for line in lines], expected(texts))
    assert files_in(tmp_path) == set()


def test_a_line_is_answered_before_the_next_one_comes(trained, expected, tmp_path):
    """A person types, or a program asks at a pipe."""
    command = [sys.executable, ROOT / "predict.py", *FP32, "--model", trained, "--input", "-"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    asked = subprocess.Popen(list(map(str, command)), cwd=tmp_path, **pipes, text=True, bufsize=1)
    for number, text in enumerate(["the room was good .", "the film was bad .", "é"]):
        asked.stdin.write(text + "\n")
        asked.stdin.flush()
        if number == 0:
            header = asked.stdout.readline().rstrip("\n").split("\t")
        answer = dict(zip(header, asked.stdout.readline().rstrip("\n").split("\t"), strict=True))
        assert answer["text"] == text
        assert_probabilities([answer], expected([text]))
    rest, _ = asked.communicate("the meal was dull .")  # without a line's end
    assert rest.split("\t")[0] == "the meal was dull ." and asked.returncode == 0


def test_predictions_on_a_pipe_are_utf_8_whatever_the_locale(trained, tmp_path):
    command = [sys.executable, ROOT / "predict.py", *map(str, FP32), "--model", trained, "--input", "-"]
    variables, text = {**os.environ, "PYTHONIOENCODING": "cp1252"}, "the room was 好 .\n".encode()
    done = subprocess.run(command, input=text, cwd=tmp_path, capture_output=True, env=variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").splitlines()[1].startswith("the room was 好 .\t")


def test_bytes_that_are_no_text_are_refused_at_standard_input(trained, run_inside, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"good\n\xff\xfe\n")))
    flags = [*FP32, "--model", trained, "--input", "-"]
    code, _, errors = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 2 and "standard input: is not utf-8" in errors
    code, _, errors = run_inside("predict.py", *flags, "--encoding", "utf-99", cwd=tmp_path)
    assert code == 2 and "--encoding utf-99: unknown" in errors
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("good\nbad\n".encode("utf-16-le"))))
    code, _, errors = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 2 and "standard input: looks like utf-16-le, not utf-8" in errors
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("good\r\nbad".encode("utf-8-sig"))))
    code, printed, _ = run_inside("predict.py", *flags, cwd=tmp_path)
    assert code == 0 and [line.split("\t")[0] for line in printed.splitlines()[1:]] == ["good", "bad"]


# ----------------------------------------------------------------------------------------------- pairs, regression


@pytest.fixture
def pairs(tmp_path_factory, vocabulary, run_inside):
    """A run on pairs of texts."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [(text, *other) for (text, _), other in zip(make_rows(60, 1), make_rows(60, 2), strict=True)]
    write_table(folder / "train.csv", rows, header=("first", "second", "label"))
    task = {"files": {"train": "train.csv"}, "text": ["first", "second"]}
    task["model"] = bert_config(vocabulary, max_position_embeddings=64)
    (folder / "pairs.yaml").write_text(yaml.safe_dump(task))
    flags = ["--task", "pairs.yaml", "--max_steps", 4, "--learning_rate", 0.01, "--output_dir", "run", *FP32]
    code, _, errors = run_inside("train.py", *flags, cwd=folder)
    assert code == 0, errors
    return folder / "run"


def test_pairs(pairs, predict, refused, run_inside, tmp_path, monkeypatch):
    rows = [(a, b) for (a, _), (b, _) in zip(make_rows(9, 5), make_rows(9, 6), strict=True)]
    write_table(tmp_path / "in.csv", rows, header=("second", "first"))  # by name, not by position
    predict("--input", "in.csv", "--output", "out.csv", model=pairs)
    found = read_table((tmp_path / "out.csv").read_text())
    classify = pipeline("text-classification", model=str(pairs / "model"), top_k=None)
    answers = [classify({"text": first, "text_pair": second}) for second, first in rows]
    answers = [{answer["label"]: answer["score"] for answer in answers_to_one} for answers_to_one in answers]
    answers = [at_temperature(answer, pairs / "model") for answer in answers]
    assert_probabilities(found, answers)

    printed = predict("--text", rows[0][1], "--text_pair", rows[0][0], "--top_k", 1, model=pairs)
    label = max(answers[0], key=answers[0].get)
    assert printed.split() == [f"{answers[0][label]:.4f}", label]

    monkeypatch.setattr("sys.stdin", stream("".join(f"{first}\t{second}\n" for second, first in rows)))
    header, *lines = [line.split("\t") for line in predict("--input", "-", model=pairs).splitlines()]
    assert_probabilities([dict(zip(header, line, strict=True)) for line in lines], answers)

    assert "--text_pair" in refused("--text", "the room was good .", model=pairs)
    (tmp_path / "in.jsonl").write_text('{"first": "a", "second": "b"}\n{"first": "a", "second": 7}\n')
    errors = refused("--input", "in.jsonl", "--output", "out.jsonl", model=pairs)
    assert 'in.jsonl, line 2: the column "second" holds 7, not text' in errors
    monkeypatch.setattr("sys.stdin", stream("one text\n"))
    assert "standard input, line 1: 1 text(s), the model reads 2" in refused("--input", "-", model=pairs)


def test_regression_gives_a_predicted_value(tmp_path, vocabulary, run_inside, predict):
    write_table(tmp_path / "train.csv", [(text, f"{len(text) / 20:.3f}") for text, _ in make_rows(60)])
    task = {"files": {"train": "train.csv"}, "text": "text", "labels": "regression", "metrics": ["mse"]}
    (tmp_path / "lengths.yaml").write_text(yaml.safe_dump({**task, "model": bert_config(vocabulary)}))
    flags = ["--task", "lengths.yaml", "--max_steps", 6, "--learning_rate", 0.003, "--output_dir", "run", *FP32]
    code, _, errors = run_inside("train.py", *flags, cwd=tmp_path)
    assert code == 0, errors
    texts = [text for text, _ in make_rows(7, 5)]
    write_table(tmp_path / "in.csv", [(text,) for text in texts], header=("text",))
    predict("--input", "in.csv", "--output", "out.csv", model="run")
    found = read_table((tmp_path / "out.csv").read_text())
    classify = pipeline("text-classification", model=str(tmp_path / "run" / "model"), function_to_apply="none")
    answers = [classify(text)[0]["score"] for text in texts]
    assert list(found[0]) == ["text", "predicted_value"]
    assert [float(row["predicted_value"]) for row in found] == pytest.approx(answers, abs=1e-5)
    assert float(predict("--text", texts[0], model="run")) == pytest.approx(answers[0], abs=1e-4)


def test_texts_longer_than_the_model_reads_are_cut(predict, expected):
    text = "the room was good . " * 30
    printed = predict("--text", text, "--top_k", 1)
    (answer,) = expected(["the room was good . " * 6])  # 32 positions: [CLS], 30 words, [SEP]
    assert printed.split()[0] == f"{max(answer.values()):.4f}"


def test_a_classifier_without_our_files_is_read_as_it_is(trained, expected, predict, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "foreign")
    for name in ("task.json", "metrics.json", "README.md"):
        (tmp_path / "foreign" / name).unlink()
    text = "the garden was dull ."
    (answer,) = expected([text], has_task=False)
    printed = predict("--text", text, "--top_k", 1, model="foreign")
    assert printed.split()[0] == f"{max(answer.values()):.4f}"


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("column", NEW)
def test_a_column_that_would_be_there_twice_is_refused(refused, tmp_path, column):
    write_table(tmp_path / "in.csv", [("the room was good .", "x")], header=("text", column))
    errors = refused("--input", "in.csv", "--output", "out.csv")
    assert f'"{column}"' in errors and "line 2" in errors


def test_a_missing_text_column_is_refused_with_the_nearest_name(refused, tmp_path):
    write_table(tmp_path / "in.csv", [("the room was good .", "x")], header=("txet", "other"))
    errors = refused("--input", "in.csv", "--output", "out.csv")
    assert 'the column "text" is not there (did you mean "txet"?)' in errors and "Columns: txet, other." in errors


def test_a_text_that_is_no_text_is_refused_by_line(refused, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "good"}\n\n{"text": null}\n')
    assert "in.jsonl, line 3" in refused("--input", "in.jsonl", "--output", "out.jsonl")


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "--text or --input"),
        (["--text", "a", "--input", "in.csv"], "--text or --input"),
        (["--text", "a", "--text_pair", "b"], "1 text(s)"),
        (["--input", "on.csv", "--output", "out.csv"], 'did you mean "in.csv"'),
        (["--input", "in.csv", "--output", "out.txt"], "out.txt"),
        (["--input", "in.csv", "--output", "no/such/folder/out.csv"], "cannot be written"),
        (["--input", "in.txt", "--output", "out.csv"], "in.txt"),
        (["--input", "in.csv", "--mixed_precision", "fp16"], "fp16 on a CPU"),
        (["--input", "in.csv", "--oputput", "out.csv"], "--oputput"),
    ],
)
def test_a_mistake_gets_two_lines_and_writes_nothing(refused, tmp_path, flags, words):
    write_table(tmp_path / "in.csv", make_rows(3))
    assert words in refused(*flags)


@pytest.mark.parametrize("model", ["nosuch", ".", "nosuch/folder/here"])
def test_no_such_model(refused, model):
    assert model in refused("--text", "a", model=model)


def test_a_model_without_a_head_is_refused(refused, tiny_bert):
    assert "no trained head" in refused("--text", "a", model=tiny_bert)
