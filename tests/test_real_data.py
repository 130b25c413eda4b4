"""The whole online path on real data and real weights, through a hub on loopback. Needs REAL_DATA (see README.md)."""

import csv
import json
import sys

import pytest
from conftest import lines_of, run_script
from sklearn.metrics import f1_score

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="session")
def hub(real_data):
    """The words in front of a command that give it a hub: real data sets, real weights, no network."""
    return (sys.executable, str(real_data / "tools/loopback_hub.py"), "--root", str(real_data / "hub"))


@pytest.fixture(scope="session")
def mrpc(hub, tmp_path_factory):
    """A folder with runs/mrpc: MiniLM, fine-tuned on a part of MRPC by plain `accelerate launch`."""
    folder = tmp_path_factory.mktemp("mrpc")
    launch = (*hub, "--log", str(folder / "requests"), "--", sys.executable, "-m", "accelerate.commands.launch")
    arguments = ["--task", "mrpc", "--model", MINILM, "--learning_rate", "5e-5", "--limit", "train=640", "--epochs", 2]
    done = run_script("train.py", *arguments, "--output_dir", "runs/mrpc", cwd=folder, launcher=launch, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def test_mrpc_trains_from_the_hub_and_notes_the_commits(mrpc):
    results = json.loads((mrpc / "runs/mrpc/results.json").read_text())
    assert results["model"] == MINILM
    assert len(results["model_commit"]) == 40
    assert results["train_examples"] == 2 * 640
    # The majority class of MRPC's dev set: a fact of the data (279 of 408 pairs are paraphrases).
    assert results["majority_baseline"]["validation"]["accuracy"] == pytest.approx(279 / 408)
    assert results["majority_baseline"]["validation"]["f1"] == pytest.approx(2 * 279 / (2 * 279 + 129))
    losses = [line["loss"] for line in lines_of(mrpc / "runs/mrpc")]
    assert losses[-1] < losses[0]
    task = json.loads((mrpc / "runs/mrpc/model/task.json").read_text())
    assert len(task["dataset"]["revision"]) == 40


def test_evaluate_says_what_training_said(mrpc):
    results = json.loads((mrpc / "runs/mrpc/results.json").read_text())
    done = run_script("evaluate.py", "--model", "runs/mrpc", cwd=mrpc)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((mrpc / "runs/mrpc/evaluation-validation/evaluation.json").read_text())
    assert evaluation["scores"] == results["scores"]["validation"]
    assert evaluation["examples"] == 408
    with open(mrpc / "runs/mrpc/evaluation-validation/predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [[row[name] for row in rows] for name in ("label", "predicted_label")]
    assert f1_score(*columns, pos_label="equivalent") == pytest.approx(evaluation["scores"]["f1"], abs=1e-12)


def test_predict_labels_the_raw_file_and_keeps_its_columns(mrpc, real_data):
    rows = [["Quality", "sentence1", "sentence2"]]
    with open(real_data / "data/mrpc_glue_tsv/dev.tsv", encoding="utf-8-sig") as file:
        for line in list(file)[1:41]:
            quality, _, _, first, second = line.rstrip("\r\n").split("\t")
            rows.append([quality, first, second])
    with open(mrpc / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    done = run_script("predict.py", "--model", "runs/mrpc", "--input", "pairs.csv", "--output", "out.csv", cwd=mrpc)
    assert done.returncode == 0, done.stderr
    with open(mrpc / "out.csv", encoding="utf-8", newline="") as file:
        labelled = list(csv.reader(file))
    assert [row[:3] for row in labelled] == rows
    assert labelled[0][3:5] == ["predicted_label", "probability"]
    assert {row[3] for row in labelled[1:]} <= {"equivalent", "not_equivalent"}


def test_a_second_run_asks_the_hub_for_nothing_but_file_lists(mrpc, hub):
    """Data and tokens come from the cache: no file is downloaded again."""
    launch = (*hub, "--log", str(mrpc / "requests2"), "--", sys.executable)
    arguments = [
        "--task",
        "mrpc",
        "--model",
        MINILM,
        "--limit",
        "train=640",
        "--max_steps",
        2,
        "--output_dir",
        "second",
    ]
    done = run_script("train.py", *arguments, cwd=mrpc, launcher=launch)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tokens from the cache") == 2
    first = (mrpc / "requests").read_text()
    assert "GET" in first and "model.safetensors" in first and "train-00000-of-00001.parquet" in first
    second = (mrpc / "requests2").read_text().splitlines() if (mrpc / "requests2").exists() else []
    assert [line for line in second if "/resolve/" in line and line.startswith("GET")] == []


@pytest.mark.parametrize(
    ("task", "metric", "rows"), [("cola", "matthews_correlation", 1043), ("stsb", "pearson", 1500)]
)
def test_other_tasks_run_through_the_same_way(hub, task, metric, rows, tmp_path):
    arguments = ["--task", task, "--model", MINILM, "--limit", "train=320", "--epochs", 1, "--learning_rate", "1e-4"]
    launch = (*hub, "--", sys.executable)
    done = run_script("train.py", *arguments, "--output_dir", "run", cwd=tmp_path, launcher=launch, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    done = run_script("evaluate.py", "--model", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "run/evaluation-validation/evaluation.json").read_text())
    assert evaluation["scores"] == results["scores"]["validation"]
    assert evaluation["examples"] == rows
    assert metric in evaluation["scores"]
