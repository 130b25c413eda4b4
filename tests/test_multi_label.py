"""Multi-label tasks from training to prediction, against scikit-learn and transformers' own pipeline."""

import csv
import json
import random

import numpy as np
import pytest
import yaml
from conftest import bert_config, lines_of, make_rows, temperature_of, write_table
from sklearn.metrics import f1_score
from sklearn.preprocessing import MultiLabelBinarizer
from test_preemption import ended, start, start_2
from transformers import pipeline

LABELS = ["bad", "good", "room", "very"]
METRICS = ["f1_micro", "f1_macro", "accuracy"]
SAME = ("--threads", 1)
FLAGS = ("--task", "tags.yaml", *SAME, "--log_every", 1)
NEW = ["predicted_label", "probability", *(f"probability_{name}" for name in LABELS)]


def tags_of(text, label):
    """What is said of a text: its verdict, and whether it names a room, or anything very much."""
    return [name for name in ("room", "very") if name in text.split()] + [
        {"positive": "good", "negative": "bad"}[label]
    ]


def make_tags(number, seed):
    """(text, labels as one string) rows; some texts have none, and the order of labels in a row means nothing."""
    chooser, rows = random.Random(seed), []
    for position, (text, label) in enumerate(make_rows(number, seed)):
        tags = tags_of(text, label) if position % 10 else []
        chooser.shuffle(tags)
        rows.append((text if tags else "the , and .", " | ".join(tags)))
    return rows


def read_table(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def matrix_of(column):
    """A 0 or 1 for each label of each row, by scikit-learn."""
    return MultiLabelBinarizer(classes=LABELS).fit_transform(
        [[x.strip() for x in row.split("|") if x] for row in column]
    )


def scores_by_scikit_learn(truth, predicted):
    return {
        "f1_micro": f1_score(truth, predicted, average="micro"),
        "f1_macro": f1_score(truth, predicted, average="macro", zero_division=0),
        "accuracy": np.mean([(a == b).all() for a, b in zip(truth, predicted, strict=True)]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vocabulary):
    """The data, the task and a run on them that has learned something."""
    folder = tmp_path_factory.mktemp("tags")
    for name, number, seed in (("train", 200, 1), ("validation", 60, 2), ("test", 41, 3)):
        write_table(folder / f"{name}.csv", make_tags(number, seed), header=("text", "tags"))
    task = {
        "files": {name: f"{name}.csv" for name in ("train", "validation", "test")},
        "label": "tags",
        "problem": "multi_label",
        "separator": "|",
        "metrics": METRICS,
        "model": bert_config(vocabulary),
        "defaults": {"learning_rate": 0.01, "warmup_steps": 5, "batch_size": 16, "mixed_precision": "no"},
    }
    (folder / "tags.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    flags = [*FLAGS, "--max_steps", 30, "--final_test", "--output_dir", "run"]
    code, _, errors = ended(start(folder, *flags), timeout=300)
    assert code == 0, errors
    return folder


@pytest.fixture
def run(run_inside, folder):
    """Run a script in this process; it must succeed. Returns what was printed."""

    def run(script, *arguments):
        code, printed, errors = run_inside(script, *SAME, *arguments, cwd=folder)
        assert code == 0, printed + errors
        return printed

    return run


def test_training_finds_the_labels_and_reports_its_scores(folder):
    results, config = read_json(folder / "run/results.json"), read_json(folder / "run/model/config.json")
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == LABELS
    assert read_json(folder / "run/model/task.json")["labels"] == LABELS
    assert list(results["scores"]["validation"]) == METRICS
    assert results["scores"]["validation"]["f1_micro"] > results["majority_baseline"]["validation"]["f1_micro"] + 0.05
    tags = matrix_of([row["tags"] for row in read_table(folder / "train.csv")])
    assert results["data"]["splits"]["train"]["labels"] == dict(zip(LABELS, tags.sum(0).tolist(), strict=True))
    assert lines_of(folder / "run")[0]["loss"] == pytest.approx(np.log(2), abs=0.05)  # each label alone: one bit


def test_the_majority_baseline_is_that_of_each_label(folder):
    train = matrix_of([row["tags"] for row in read_table(folder / "train.csv")])
    constant = [int(rate > 0.5) for rate in train.mean(axis=0)]
    assert 0 < sum(constant) < 4
    assert read_json(folder / "run/model/metrics.json")["majority"] == constant
    for split in ("validation", "test"):
        truth = matrix_of([row["tags"] for row in read_table(folder / f"{split}.csv")])
        expected = scores_by_scikit_learn(truth, np.tile(constant, (len(truth), 1)))
        assert read_json(folder / "run/results.json")["majority_baseline"][split] == pytest.approx(expected, abs=1e-12)


def test_evaluation_equals_scikit_learn_on_its_predictions(folder, run):
    printed = run("evaluate.py", "--model", "run", "--split", "test")
    evaluation = read_json(folder / "run/evaluation-test/evaluation.json")
    rows, source = read_table(folder / "run/evaluation-test/predictions.csv"), read_table(folder / "test.csv")
    assert list(rows[0]) == ["text", "label", *NEW]
    assert [row["text"] for row in rows] == [row["text"] for row in source]
    truth, predicted = (matrix_of([row[name] for row in rows]) for name in ("label", "predicted_label"))
    assert (truth == matrix_of([row["tags"] for row in source])).all()
    assert len({row["predicted_label"] for row in rows}) > 2 and not (truth == predicted).all()
    assert evaluation["scores"] == pytest.approx(scores_by_scikit_learn(truth, predicted), abs=1e-12)
    results = read_json(folder / "run/results.json")
    assert evaluation["scores"] == results["scores"]["test"]
    assert evaluation["majority_baseline"] == results["majority_baseline"]["test"]
    assert f"(majority: f1_micro {evaluation['majority_baseline']['f1_micro']:.4f}" in printed
    probabilities = np.array([[float(row[f"probability_{name}"]) for name in LABELS] for row in rows])
    thresholds = read_json(folder / "run/model/task.json")["thresholds"]
    assert len(thresholds) == 4 and ((probabilities > thresholds) == predicted).all()
    logits = np.log(probabilities / (1 - probabilities)) * temperature_of(folder / "run/model")
    entropy = np.log1p(np.exp(logits)) - truth * logits
    assert evaluation["loss"] == pytest.approx(entropy.mean(), rel=1e-5)
    joint = np.where(predicted, probabilities, 1 - probabilities).prod(axis=1)
    assert [float(row["probability"]) for row in rows] == pytest.approx(joint.tolist())


def test_prediction_equals_a_pipeline_of_transformers(folder, run):
    classify = pipeline("text-classification", model=str(folder / "run" / "model"), top_k=None)
    temperature = temperature_of(folder / "run/model")

    def cooled(p):
        return 1 / (1 + (1 / p - 1) ** (1 / temperature))

    texts = [text for text, _ in make_rows(20, 9)]
    write_table(folder / "in.csv", [(text,) for text in texts], header=("text",))
    run("predict.py", "--mixed_precision", "no", "--model", "run", "--input", "in.csv", "--output", "out.csv")
    rows, thresholds = read_table(folder / "out.csv"), read_json(folder / "run/model/task.json")["thresholds"]
    assert list(rows[0]) == ["text", *NEW]
    for row, text in zip(rows, texts, strict=True):
        answer = {each["label"]: cooled(each["score"]) for each in classify([text])[0]}
        assert {name: float(row[f"probability_{name}"]) for name in LABELS} == pytest.approx(answer, abs=1e-5)
        applies = [name for name, threshold in zip(LABELS, thresholds, strict=True) if answer[name] > threshold]
        assert row["predicted_label"] == "|".join(applies)
    printed = run("predict.py", "--mixed_precision", "no", "--model", "run", "--text", texts[0])
    answer = {each["label"]: cooled(each["score"]) for each in classify([texts[0]])[0]}
    expected = sorted(((f"{value:.4f}", label) for label, value in answer.items()), reverse=True)
    assert [tuple(line.split()) for line in printed.splitlines()] == expected


def test_a_model_of_several_labels_without_our_files_is_read_as_it_is(folder, run, tmp_path):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "run/model" / name).read_bytes())
    flags = ("--mixed_precision", "no", "--text", "the room was very good .")
    ours, foreign = (run("predict.py", "--model", model, *flags).split() for model in ("run", tmp_path))
    assert ours[1::2] == foreign[1::2]  # the labels, likeliest first; the temperature is in task.json
    logits = [np.log(p / (1 - p)) for p in (np.array(words[::2], float) for words in (ours, foreign))]
    assert logits[0] * temperature_of(folder / "run/model") == pytest.approx(logits[1], abs=0.02)


@pytest.mark.slow
def test_two_processes_and_micro_batches_change_nothing(folder, run):
    flags = ["--max_steps", 10, "--output_dir"]
    run("train.py", *FLAGS, *flags, "one")
    for process in start_2(folder, *FLAGS, *flags, "two", "--micro_batch_size", 3):
        code, _, errors = ended(process, timeout=300)
        assert code == 0, errors
    one, two = ([line["loss"] for line in lines_of(folder / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    scores = [read_json(folder / name / "results.json")["scores"]["validation"] for name in ("one", "two")]
    assert scores[0] == pytest.approx(scores[1])


def test_other_metrics_do_not_fit(folder, run_inside):
    code, _, errors = run_inside("train.py", *FLAGS, "--metrics", "f1", "--output_dir", "no", cwd=folder)
    assert code == 2 and "f1 is not for multi-label tasks: use f1_micro" in errors
    assert not (folder / "no").exists()


def test_the_usual_metrics_are_two_f1(folder, run):
    content = yaml.safe_load((folder / "tags.yaml").read_text())
    del content["metrics"]
    (folder / "usual.yaml").write_text(yaml.safe_dump(content))
    run("train.py", "--task", "usual.yaml", "--max_steps", 1, "--output_dir", "usual")
    assert list(read_json(folder / "usual/results.json")["scores"]["validation"]) == ["f1_micro", "f1_macro"]


@pytest.mark.slow
def test_a_column_for_each_label_is_the_same_task(folder, run):
    for name in ("train", "validation", "test"):
        rows = read_table(folder / f"{name}.csv")
        lines = [
            (row["text"], *applies) for row, applies in zip(rows, matrix_of([row["tags"] for row in rows]), strict=True)
        ]
        write_table(folder / f"columns_{name}.csv", lines, header=("text", *LABELS))
    content = yaml.safe_load((folder / "tags.yaml").read_text())
    content = {key: value for key, value in content.items() if key not in ("label", "problem", "separator")}
    content["files"] = {name: f"columns_{name}.csv" for name in ("train", "validation", "test")}
    (folder / "columns.yaml").write_text(yaml.safe_dump({**content, "label": LABELS}))
    (folder / "no_label.yaml").write_text(yaml.safe_dump(content))
    flags = ["--log_every", 1, "--max_steps", 30, "--output_dir"]
    run("train.py", "--task", "tags.yaml", *flags, "one_column")
    run("train.py", "--task", "columns.yaml", *flags, "columns")
    run("train.py", "--task", "no_label.yaml", "--label_columns", ",".join(LABELS), *flags, "columns_by_flag")
    losses = [line["loss"] for line in lines_of(folder / "one_column") if line["type"] == "train"]
    for name in ("columns", "columns_by_flag"):
        assert [line["loss"] for line in lines_of(folder / name) if line["type"] == "train"] == losses
    run("evaluate.py", "--model", "columns", "--split", "test")
    run("evaluate.py", "--model", "columns", "--file", "columns_test.csv", "--output_dir", "on_file")
    scores = [
        read_json(file / "evaluation.json")["scores"]
        for file in (folder / "columns/evaluation-test", folder / "on_file")
    ]
    assert scores[0] == scores[1]
    run("predict.py", "--model", "columns", "--input", "columns_test.csv", "--output", "columns_out.csv")
    rows = read_table(folder / "columns_out.csv")
    added = [*NEW, *(f"predicted_{name}" for name in LABELS)]
    assert list(rows[0]) == ["text", *LABELS, *added]
    assert len({row["predicted_label"] for row in rows}) > 1
    for row in rows:
        applies = [name for name in LABELS if row[f"predicted_{name}"] == "1"]
        assert row["predicted_label"] == ",".join(applies)
