"""predict.py: labels for new text, from anywhere to anywhere; the input unchanged beside them, whole or not at all."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ACCELERATE, bert_config, make_rows, run_script, write_table
from transformers import pipeline

FP32 = ("--mixed_precision", "no", "--threads", 1)
NEW = ["predicted_label", "probability", "probability_negative", "probability_positive"]
AWKWARD = [
    ("00456", "None", 'he said "the room was bad" , twice'),
    ("1e5", "", "the film was good ,\nand the meal was dull ."),
    ("-0", " é 房 ", "the book, was very, very fine"),
    ("007", "NaN", ""),
    ("2,5", '""', " the train was awful . "),
]


def read_table(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


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

    def ask(inputs):
        return [{answer["label"]: answer["score"] for answer in classify([text])[0]} for text in inputs]

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
    assert_probabilities(found, answers)

    printed = predict("--text", rows[0][1], "--text_pair", rows[0][0], "--top_k", 1, model=pairs)
    label = max(answers[0], key=answers[0].get)
    assert printed.split() == [f"{answers[0][label]:.4f}", label]

    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{first}\t{second}\n" for second, first in rows)))
    header, *lines = [line.split("\t") for line in predict("--input", "-", model=pairs).splitlines()]
    assert_probabilities([dict(zip(header, line, strict=True)) for line in lines], answers)

    assert "--text_pair" in refused("--text", "the room was good .", model=pairs)
    monkeypatch.setattr("sys.stdin", io.StringIO("one text\n"))
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
    (answer,) = expected([text])
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
