"""evaluate.py: the scores that training printed, each example once, on any number of processes; what it refuses."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TORCHRUN_2, bert_config, make_rows, run_script, temperature_of, write_table
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SAME = ("--threads", 1)  # the precision is that of the training, whatever this hardware would choose


def read_table(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_json(file):
    return json.loads(Path(file).read_text(encoding="utf-8"))


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, vocabulary):
    """A folder with the data (a comma, quotes and line breaks among them), the task and a run that learnt a part."""
    folder = tmp_path_factory.mktemp("trained")
    for name, number, seed in (("train", 200, 1), ("validation", 50, 2), ("test", 61, 3)):
        rows = make_rows(number, seed)
        rows[5] = ('the "room" was\nbad , very bad .', "negative")
        rows[9] = rows[5]  # equal texts are two examples
        write_table(folder / f"{name}.csv", rows)
    task = {
        "files": {name: f"{name}.csv" for name in ("train", "validation", "test")},
        "text": "text",
        "labels": ["negative", "positive"],
        "metrics": ["accuracy", "f1"],
        "model": bert_config(vocabulary),
        "defaults": {"learning_rate": 0.01, "warmup_steps": 5, "batch_size": 16, "mixed_precision": "no"},
    }
    (folder / "reviews.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    flags = ["--task", "reviews.yaml", "--threads", 1, "--max_steps", 17, "--final_test", "--output_dir", "run"]
    ended = run_script("train.py", *flags, cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def copy(trained, tmp_path, monkeypatch):
    """A copy of that folder, to change; task.json names the data by their place, so the run's task is moved too."""
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    file = folder / "run" / "model" / "task.json"
    file.write_text(file.read_text().replace(str(trained), str(folder)))
    return folder


@pytest.fixture
def evaluate(run_inside):
    def run(*arguments, cwd):
        code, printed, errors = run_inside("evaluate.py", *SAME, *arguments, cwd=cwd)
        assert code == 0, printed + errors
        return printed

    return run


@pytest.fixture
def refused(run_inside):
    """A mistake of the user's: exit code 2, two lines, no traceback, nothing written. Returns the two lines."""

    def run(*arguments, cwd):
        before = contents_of(cwd)
        code, printed, errors = run_inside("evaluate.py", *SAME, *arguments, cwd=cwd)
        assert code == 2, printed + errors
        assert len(errors.splitlines()) == 2 and "Traceback" not in printed, errors
        assert all(line.startswith("evaluate.py: ") for line in errors.splitlines()), errors
        assert contents_of(cwd) == before
        return errors

    return run


def test_scores_are_those_that_training_printed(copy, evaluate):
    before = set(contents_of(copy))
    printed = evaluate("--model", "run", cwd=copy)
    evaluation, results = (
        read_json(copy / "run/evaluation-validation/evaluation.json"),
        read_json(copy / "run/results.json"),
    )
    assert evaluation["scores"] == results["scores"]["validation"]
    assert 0.6 < evaluation["scores"]["accuracy"] < 1  # a model that is right and wrong, so that scores can differ
    lines = (copy / "run/metrics.jsonl").read_text().splitlines()
    (line,) = [
        line for line in map(json.loads, lines) if line["type"] == "eval" and line["step"] == results["best_step"]
    ]
    assert evaluation["loss"] == pytest.approx(line["loss"], rel=1e-6)
    assert f"validation: accuracy {line['scores']['accuracy']:.4f}, f1 {line['scores']['f1']:.4f}" in printed
    assert (evaluation["split"], evaluation["examples"]) == ("validation", 50)
    # These rows chose the model, so the training corrected its scores on them.
    choice, corrected = (results[key]["validation"] for key in ("choice", "corrected_scores"))
    assert (evaluation["choice"], evaluation["corrected_scores"]) == (choice, corrected)
    words = f"these examples chose {choice} in training; corrected for that: accuracy {corrected['accuracy']:.4f}"
    assert choice.startswith("the best of ") and words in printed
    assert set(contents_of(copy)) - before == {
        f"run/evaluation-validation/{name}"
        for name in (
            *("evaluation.json", "predictions.csv", "errors.csv", "report.html"),
            *("plots/confusion-validation.png", "plots/calibration-validation.png"),
        )
    }


@pytest.mark.parametrize("flags", [("--split", "test"), ("--file", "validation.csv"), ("--limit", "validation=40")])
def test_other_rows_than_those_that_chose_need_no_correction(copy, evaluate, flags):
    printed = evaluate("--model", "run", *flags, "--output_dir", "out", cwd=copy)
    assert "chose" not in printed and "corrected_scores" not in read_json(copy / "out/evaluation.json")


def test_the_model_folder_itself_may_be_named(copy, evaluate):
    evaluate("--model", "run/model", "--output_dir", "elsewhere", cwd=copy)
    scores = read_json(copy / "elsewhere" / "evaluation.json")["scores"]
    assert scores == read_json(copy / "run/results.json")["scores"]["validation"]
    assert not (copy / "run" / "evaluation-validation").exists()


def test_the_test_split_each_row_once_in_order_with_the_scores_of_scikit_learn(copy, evaluate):
    evaluate("--model", "run", "--split", "test", "--eval_batch_size", 7, cwd=copy)
    evaluation = read_json(copy / "run/evaluation-test/evaluation.json")
    rows, source = read_table(copy / "run/evaluation-test/predictions.csv"), read_table(copy / "test.csv")
    assert [(row["text"], row["label"]) for row in rows] == [(row["text"], row["label"]) for row in source]
    truth, predicted = [row["label"] for row in rows], [row["predicted_label"] for row in rows]
    assert set(predicted) == {"negative", "positive"}
    assert evaluation["scores"]["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    assert evaluation["scores"]["f1"] == pytest.approx(f1_score(truth, predicted, pos_label="positive"), abs=1e-12)
    assert evaluation["scores"] == read_json(copy / "run/results.json")["scores"]["test"]

    # The probabilities, one text at a time, without padding, by transformers alone.
    model = AutoModelForSequenceClassification.from_pretrained(copy / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(copy / "run" / "model")
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in source])
    expected = (logits / temperature_of(copy / "run" / "model")).softmax(-1).numpy()
    columns = ("probability_negative", "probability_positive")
    probabilities = np.array([[float(row[column]) for column in columns] for row in rows])
    assert probabilities == pytest.approx(expected, abs=1e-5)
    assert [float(row["probability"]) for row in rows] == list(probabilities.max(1))
    ids = torch.tensor([["negative", "positive"].index(label) for label in truth])
    assert evaluation["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, ids).item(), rel=1e-5)


@pytest.mark.slow
def test_two_processes_write_what_one_does(copy, evaluate):
    evaluate("--model", "run", "--split", "test", "--eval_batch_size", 8, "--output_dir", "one", cwd=copy)
    ended = run_script(
        *("evaluate.py", *SAME, "--model", "run", "--split", "test", "--eval_batch_size", 8, "--output_dir", "two"),
        cwd=copy,
        launcher=TORCHRUN_2,
    )
    assert ended.returncode == 0, ended.stderr
    assert contents_of(copy / "one") == contents_of(copy / "two")
    assert ended.stdout.count(", 61 examples (majority: ") == 1 and "2 processes" in ended.stdout


def test_a_file_is_scored_instead_of_a_split(copy, evaluate):
    write_table(copy / "more.csv", make_rows(23, 9))
    evaluate("--model", "run", "--file", "more.csv", cwd=copy)
    rows = read_table(copy / "run/evaluation-more/predictions.csv")
    evaluation = read_json(copy / "run/evaluation-more/evaluation.json")
    assert [(row["text"], row["label"]) for row in rows] == make_rows(23, 9)
    accuracy = accuracy_score([row["label"] for row in rows], [row["predicted_label"] for row in rows])
    assert evaluation["scores"]["accuracy"] == pytest.approx(accuracy)


def test_a_file_named_train_is_scored_whole(copy, evaluate):
    evaluate("--model", "run", "--file", "train.csv", cwd=copy)
    assert read_json(copy / "run/evaluation-train.csv/evaluation.json")["examples"] == 200


def test_files_of_other_formats_and_other_metrics(copy, evaluate):
    write_table(copy / "more.jsonl", make_rows(23, 9))
    evaluate("--model", "run", "--file", "more.jsonl", "--metrics", "f1_macro,matthews_correlation", cwd=copy)
    scores = read_json(copy / "run/evaluation-more/evaluation.json")["scores"]
    rows = read_table(copy / "run/evaluation-more/predictions.csv")
    f1_macro = f1_score([r["label"] for r in rows], [r["predicted_label"] for r in rows], average="macro")
    assert list(scores) == ["f1_macro", "matthews_correlation"] and scores["f1_macro"] == pytest.approx(f1_macro)


def test_a_made_validation_split_is_made_again(reviews, vocabulary, run_inside, evaluate, refused):
    task = {"files": {"train": "train.csv"}, "model": bert_config(vocabulary), "defaults": {"mixed_precision": "no"}}
    (reviews / "made.yaml").write_text(yaml.safe_dump({**task, "split": {"validation": 0.2, "seed": 5}}))
    flags = ["--task", "made.yaml", "--threads", 1, "--max_steps", 3, "--learning_rate", 0.01, "--output_dir", "run"]
    code, printed, errors = run_inside("train.py", *flags, cwd=reviews)
    assert code == 0 and "validation: 40 rows" in printed, errors
    evaluate("--model", "run", cwd=reviews)
    evaluation = read_json(reviews / "run/evaluation-validation/evaluation.json")
    assert evaluation["scores"] == read_json(reviews / "run/results.json")["scores"]["validation"]
    assert evaluation["examples"] == 40
    shutil.rmtree(reviews / "run" / "evaluation-validation")
    write_table(reviews / "train.csv", make_rows(199, 1))
    assert "is not the one used in training" in refused("--model", "run", cwd=reviews)


def test_labels_are_matched_by_name(copy, evaluate):
    """The same model with its two outputs exchanged, names and all, scores the same."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(copy / "run" / "model", copy / "exchanged")
    weights = load_file(copy / "exchanged" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name].flip(0).contiguous()
    save_file(weights, copy / "exchanged" / "model.safetensors", metadata={"format": "pt"})
    config = read_json(copy / "exchanged" / "config.json")
    config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (copy / "exchanged" / "config.json").write_text(json.dumps(config))
    evaluate("--model", "run", "--metrics", "accuracy,f1_macro", "--output_dir", "as-it-was", cwd=copy)
    evaluate("--model", "exchanged", "--metrics", "accuracy,f1_macro", "--output_dir", "other", cwd=copy)
    here, there = (read_json(copy / folder / "evaluation.json")["scores"] for folder in ("as-it-was", "other"))
    assert here == there
    here, there = (read_table(copy / folder / "predictions.csv") for folder in ("as-it-was", "other"))
    for row, other in zip(here, there, strict=True):
        assert {key: row[key] for key in ("text", "label", "predicted_label")}.items() <= other.items()
        assert float(row["probability_positive"]) == pytest.approx(float(other["probability_positive"]), abs=1e-6)


def test_regression(reviews, vocabulary, run_inside, evaluate, refused):
    for name, number, seed in (("train", 120, 1), ("validation", 41, 2)):
        rows = [(text, f"{len(text) / 20:.3f}") for text, _ in make_rows(number, seed)]
        write_table(reviews / f"{name}.csv", rows, header=("text", "score"))
    task = {"text": "text", "label": "score", "labels": "regression", "metrics": ["pearson", "mse"]}
    task |= {"files": {"train": "train.csv", "validation": "validation.csv"}, "model": bert_config(vocabulary)}
    (reviews / "lengths.yaml").write_text(yaml.safe_dump(task))
    # In bf16 so young a model rounds all its predictions to one value.
    flags = ["--max_steps", 12, "--learning_rate", 0.003, "--mixed_precision", "no", "--output_dir", "run", *SAME]
    flags = ["--task", "lengths.yaml", *flags]
    code, _, errors = run_inside("train.py", *flags, cwd=reviews)
    assert code == 0, errors
    evaluate("--model", "run", cwd=reviews)
    evaluation = read_json(reviews / "run/evaluation-validation/evaluation.json")
    assert evaluation["scores"] == pytest.approx(
        read_json(reviews / "run/results.json")["scores"]["validation"], rel=1e-3
    )
    rows, source = (read_table(reviews / f) for f in ("run/evaluation-validation/predictions.csv", "validation.csv"))
    assert list(rows[0]) == ["text", "label", "predicted_value"]
    assert [row["text"] for row in rows] == [row["text"] for row in source]
    truth, predicted = np.array([[float(row["label"]), float(row["predicted_value"])] for row in rows]).T
    assert list(truth) == [float(row["score"]) for row in source]
    assert evaluation["scores"]["pearson"] == pytest.approx(pearsonr(truth, predicted).statistic, rel=1e-9)
    assert evaluation["scores"]["mse"] == pytest.approx(np.mean((truth - predicted) ** 2), rel=1e-9)
    assert evaluation["loss"] == pytest.approx(evaluation["scores"]["mse"], rel=1e-5)
    write_table(reviews / "words.csv", make_rows(5), header=("text", "score"))
    assert "a number" in refused("--model", "run", "--file", "words.csv", cwd=reviews)


# ---------------------------------------------------------------------------------- what the training said of its data


def change_saved_task(folder, **changes):
    file = folder / "run/model/task.json"
    file.write_text(json.dumps({**read_json(file), **changes}))


def test_the_majority_is_that_of_the_training_labels(copy, evaluate):
    """Not of the labels that are scored: train is mostly positive here, and this file mostly negative."""
    assert read_json(copy / "run/model/metrics.json")["majority"] in (0, 1)
    (copy / "run/model/metrics.json").write_text(json.dumps({"majority": 1, "mixed_precision": "no"}))
    write_table(copy / "more.csv", [*make_rows(10, 1, ("negative",)), *make_rows(5, 1, ("positive",))])
    printed = evaluate("--model", "run", "--file", "more.csv", cwd=copy)
    baseline = read_json(copy / "run/evaluation-more/evaluation.json")["majority_baseline"]
    assert baseline == {"accuracy": pytest.approx(1 / 3), "f1": pytest.approx(0.5)}
    assert "15 examples (majority: accuracy 0.3333, f1 0.5000)" in printed
    # Of a model that does not say, the majority of these very labels: no baseline is higher.
    (copy / "run/model/metrics.json").unlink()
    evaluate("--model", "run", "--file", "more.csv", "--mixed_precision", "no", cwd=copy)
    baseline = read_json(copy / "run/evaluation-more/evaluation.json")["majority_baseline"]
    assert baseline == {"accuracy": pytest.approx(2 / 3), "f1": 0.0}


def test_bad_rows_are_left_out_listed_and_counted(copy, evaluate, refused):
    rows = make_rows(20, 9)
    text = "".join(f"{text},{label}\n" for text, label in rows)
    bad = "the room,was,good\n,positive\nthe film was good .,9\n"
    (copy / "more.csv").write_text("text,label\n" + bad + text)
    assert "more.csv, line 2" in refused("--model", "run", "--file", "more.csv", cwd=copy)
    printed = evaluate("--model", "run", "--file", "more.csv", "--on_bad_row", "skip", cwd=copy)
    assert "scored 20 of 23 examples (majority: " in printed
    output = copy / "run/evaluation-more"
    assert [(row["text"], row["label"]) for row in read_table(output / "predictions.csv")] == rows
    file = "more.csv"  # as it was typed
    assert read_table(output / "bad_rows.csv") == [
        {"split": "file", "file": file, "row": row, "reason": reason}
        for row, reason in (
            ("2", "3 fields, but the header has 2 columns (text, label)"),
            ("3", 'column "text" is empty'),
            ("4", "column \"label\" holds '9', no label"),
        )
    ]
    assert read_json(output / "evaluation.json")["bad_rows"] == 3


@pytest.mark.slow
def test_rules_of_the_training_hold_again(reviews, vocabulary, run_inside, evaluate):
    """on_bad_row, limit, truncate, encoding, delimiter and the columns' names: all in task.json, none typed again."""
    for name, number, seed in (("train", 120, 1), ("validation", 60, 2)):
        rows = [f"{text};{label};é" for text, label in make_rows(number, seed)]
        text = "\n".join(["sentence;verdict;note", *rows[:3], ";positive;é", *rows[3:]]) + "\n"
        (reviews / f"{name}.csv").write_bytes(text.encode("latin-1"))
    task = {
        "files": {name: f"{name}.csv" for name in ("train", "validation")},
        "model": bert_config(vocabulary),
        "defaults": {"mixed_precision": "no", "learning_rate": 0.01, "max_steps": 12, "batch_size": 16},
    }
    (reviews / "odd.yaml").write_text(yaml.safe_dump(task))
    flags = ["--encoding", "latin-1", "--delimiter", ";", "--on_bad_row", "skip", "--limit", "validation=41"]
    flags += ["--text_columns", "sentence", "--label_column", "verdict", "--truncate", "tail", "--max_length", 9]
    code, _, errors = run_inside("train.py", "--task", "odd.yaml", *SAME, *flags, "--output_dir", "run", cwd=reviews)
    assert code == 0, errors
    saved = read_json(reviews / "run/model/task.json")
    assert (saved["encoding"], saved["delimiter"], saved["on_bad_row"]) == ("latin-1", ";", "skip")
    assert (saved["limit"], saved["truncate"], saved["max_length"]) == ({"validation": 41}, "tail", 9)
    evaluate("--model", "run", cwd=reviews)
    evaluation = read_json(reviews / "run/evaluation-validation/evaluation.json")
    assert evaluation["scores"] == read_json(reviews / "run/results.json")["scores"]["validation"]
    assert (evaluation["examples"], evaluation["bad_rows"]) == (41, 1)
    # The ends of the texts were read, by the probabilities of transformers.
    model = AutoModelForSequenceClassification.from_pretrained(reviews / "run" / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(reviews / "run" / "model", truncation_side="left")
    rows = read_table(reviews / "run/evaluation-validation/predictions.csv")
    inputs = tokenizer(
        [row["sentence"] for row in rows], truncation=True, max_length=9, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = (logits / temperature_of(reviews / "run" / "model")).softmax(-1)[:, 1].numpy()
    assert [float(row["probability_positive"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    # A limit that is asked for here goes before, and is no change of the data.
    evaluate("--model", "run", "--limit", "validation=10", "--output_dir", "ten", cwd=reviews)
    assert read_json(reviews / "ten/evaluation.json")["examples"] == 10
    # A file is scored whole.
    evaluate("--model", "run", "--file", "validation.csv", "--output_dir", "whole", cwd=reviews)
    assert read_json(reviews / "whole/evaluation.json")["examples"] == 60


@pytest.mark.slow
def test_every_split_of_the_name_is_scored(copy, evaluate, monkeypatch):
    """As MNLI has them, on the Hub. The names of files' splits are fixed, so they are renamed as they are read."""
    import common
    from classifier.data import splits

    def load(task, refresh=False):
        task, splits, fingerprints, bad_rows = load_splits(task, refresh)
        names = {"validation_matched": "validation", "validation_mismatched": "test", "validationary": "train"}
        splits, fingerprints = (
            {name: values[source] for name, source in names.items()} for values in (splits, fingerprints)
        )
        return task, splits, fingerprints, bad_rows

    load_splits = splits.load_splits
    monkeypatch.setattr(common, "load_splits", load)
    names = ["validation_matched", "validation_mismatched"]
    printed = evaluate("--model", "run", cwd=copy)
    results = read_json(copy / "run/results.json")["scores"]
    for name, split, examples in zip(names, ("validation", "test"), (50, 61), strict=True):
        evaluation = read_json(copy / f"run/evaluation-{name}/evaluation.json")
        assert (evaluation["split"], evaluation["examples"]) == (name, examples)
        assert evaluation["scores"] == results[split]
        assert len(read_table(copy / f"run/evaluation-{name}/predictions.csv")) == examples
        assert f"\n{name}: accuracy " in printed
    assert {path.name for path in (copy / "run").glob("evaluation-*")} == {f"evaluation-{name}" for name in names}
    evaluate("--model", "run", "--output_dir", "here", cwd=copy)
    assert sorted(path.name for path in (copy / "here").iterdir()) == names
    evaluate("--model", "run", "--split", names[1], "--output_dir", "one", cwd=copy)
    assert read_json(copy / "one/evaluation.json")["examples"] == 61


# ------------------------------------------------------------------------------------------------------- refusals


def test_a_test_split_without_labels_cannot_be_scored(copy, refused):
    write_table(copy / "unlabelled.csv", [(text,) for text, _ in make_rows(12, 3)], header=("text",))
    errors = refused("--model", "run", "--split", "test", "--test_file", "unlabelled.csv", cwd=copy)
    assert "12 of 12 examples of the test split have no label" in errors and "predict.py" in errors


@pytest.mark.parametrize("split", ["validation", "test"])
def test_data_that_have_changed_since_the_training_are_refused(copy, refused, evaluate, split):
    rows = [(row["text"], row["label"]) for row in read_table(copy / f"{split}.csv")]
    write_table(copy / f"{split}.csv", [*rows[1:], ("the meal was dull .", "positive")])
    errors = refused("--model", "run", "--split", split, cwd=copy)
    assert f"the {split} split is not the one used in training" in errors and "--file" in errors
    evaluate("--model", "run", "--file", f"{split}.csv", cwd=copy)  # the advice works


def test_a_head_for_other_labels_is_refused(copy, refused):
    rows = [(text, {"positive": "joy", "negative": "anger"}[label]) for text, label in make_rows(20)]
    write_table(copy / "joy.csv", rows)
    task = yaml.safe_load((copy / "reviews.yaml").read_text())
    task |= {"labels": ["anger", "joy"], "files": {"validation": "joy.csv"}}
    (copy / "joy.yaml").write_text(yaml.safe_dump(task))
    errors = refused("--model", "run", "--task", "joy.yaml", cwd=copy)
    assert "its head is for negative, positive" in errors and "anger, joy" in errors
    assert "joy" in refused("--model", "run", "--file", "joy.csv", cwd=copy)


def test_a_model_without_a_head_is_refused(copy, tiny_bert, refused):
    errors = refused("--model", tiny_bert, "--task", "reviews.yaml", cwd=copy)
    assert "no trained head" in errors and "train.py" in errors
    assert "--task" in refused("--model", tiny_bert, cwd=copy)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "run", "--split", "tset"], "no tset split"),
        (["--model", "run", "--file", "mroe.csv"], "mroe.csv: no such file"),
        (["--model", "nosuch"], "nosuch"),
        (["--model", "nosuch/folder/here"], "nosuch/folder/here"),
        (["--model", "."], "holds no model"),
        (["--split", "test"], "--model"),
        (["--model", "run", "--metrics", "pearson"], "pearson"),
        (["--model", "run", "--mixed_precision", "fp16"], "fp16 on a CPU"),
    ],
)
def test_a_mistake_gets_two_lines_and_writes_nothing(copy, refused, flags, message):
    assert message in refused(*flags, cwd=copy)


def test_the_folder_of_a_run_that_failed_holds_no_model(copy, refused):
    shutil.rmtree(copy / "run" / "model")
    assert "holds no model" in refused("--model", "run", cwd=copy)


def test_an_output_folder_that_is_a_file_is_refused(copy, refused):
    assert "reviews.yaml" in refused("--model", "run", "--output_dir", "reviews.yaml", cwd=copy)


@pytest.mark.slow
def test_models_in_one_folder_and_files_of_like_names_have_a_folder_each(copy, evaluate):
    for number in (1, 2):
        shutil.copytree(copy / "run" / "model", copy / "out" / f"checkpoint-{number}")
        evaluate("--model", f"out/checkpoint-{number}", "--split", "test", cwd=copy)
    evaluate("--model", "checkpoint-1", "--split", "test", cwd=copy / "out")
    (copy / "reviews.2024.csv").write_bytes((copy / "test.csv").read_bytes())
    for file in ("reviews.2024.csv", "test.csv"):
        evaluate("--model", "out/checkpoint-2", "--file", file, cwd=copy)
    names = {path.name for path in (copy / "out").glob("evaluation-*")}
    of_second = {
        "evaluation-checkpoint-2-reviews.2024",
        "evaluation-checkpoint-2-test.csv",
        "evaluation-checkpoint-2-test",
    }
    assert names == {"evaluation-checkpoint-1-test", *of_second}
    for name in names:
        model = read_json(copy / "out" / name / "evaluation.json")["model"]
        assert Path(model).name == name.split("-")[1] + "-" + name.split("-")[2]


# ---------------------------------------------------------------------------------------- what stands beside a score


def test_errors_are_the_wrong_rows_worst_first(copy, evaluate):
    turned = {"positive": "negative", "negative": "positive"}
    rows = [(text, label if n % 3 else turned[label]) for n, (text, label) in enumerate(make_rows(30, 5))]
    write_table(copy / "more.csv", rows)
    evaluate("--model", "run", "--file", "more.csv", cwd=copy)
    rows = read_table(copy / "run/evaluation-more/predictions.csv")
    errors = read_table(copy / "run/evaluation-more/errors.csv")
    wrong = {number for number, row in enumerate(rows) if row["label"] != row["predicted_label"]}
    assert {int(row["example"]) for row in errors} == wrong and len(errors) == len(wrong) >= 9
    temperature = temperature_of(copy / "run" / "model")
    for row in errors:
        assert {name: row[name] for name in rows[0]} == rows[int(row["example"])]
        powers = {label: float(row[f"probability_{label}"]) ** temperature for label in turned}
        loss = -np.log(powers[row["label"]] / sum(powers.values()))  # that of training, without the temperature
        assert float(row["loss"]) == pytest.approx(loss, abs=1e-3)
    losses = [float(row["loss"]) for row in errors]
    assert losses == sorted(losses, reverse=True)


def test_intervals_classes_and_lengths_are_printed_and_written(copy, evaluate):
    printed = evaluate("--model", "run", cwd=copy)
    evaluation = read_json(copy / "run/evaluation-validation/evaluation.json")
    low, high = evaluation["intervals"]["accuracy"]
    assert low < evaluation["scores"]["accuracy"] < high
    assert f"95 % intervals: accuracy {low:.4f} to {high:.4f}" in printed
    assert sum(row["support"] for row in evaluation["classes"]) == 50
    assert np.trace(evaluation["confusion"]) == round(50 * evaluation["scores"]["accuracy"])
    assert sum(part["examples"] for part in evaluation["slices"]["length"]) == 50
    assert read_json(copy / "run/results.json")["intervals"]["validation"] == evaluation["intervals"]
    low, high = read_json(copy / "run/results.json")["intervals"]["test"]["accuracy"]
    assert f"| {low:.4f} to {high:.4f} |" in (copy / "run/model/README.md").read_text()


def test_slices_are_the_values_of_a_column(copy, evaluate, refused):
    rows = [(text, label, ("web", "book", "web")[n % 3]) for n, (text, label) in enumerate(make_rows(30, 5))]
    write_table(copy / "more.csv", rows, header=("text", "label", "source"))
    printed = evaluate("--model", "run", "--file", "more.csv", "--slices", "source,label", cwd=copy)
    slices = read_json(copy / "run/evaluation-more/evaluation.json")["slices"]
    predictions = read_table(copy / "run/evaluation-more/predictions.csv")
    assert [(part["slice"], part["examples"]) for part in slices["source"]] == [("web", 20), ("book", 10)]
    for part in slices["source"]:
        part_rows = [row for row, (*_, source) in zip(predictions, rows, strict=True) if source == part["slice"]]
        expected = np.mean([row["label"] == row["predicted_label"] for row in part_rows])
        assert part["scores"]["accuracy"] == pytest.approx(expected)
    assert {part["slice"] for part in slices["label"]} == {"negative", "positive"}
    assert "by source" in printed
    lines = refused("--model", "run", "--file", "more.csv", "--slices", "sources", cwd=copy)
    assert 'has no column "sources" (did you mean "source"?)' in lines


def test_slices_of_a_split_that_was_made(reviews, vocabulary, evaluate, run_inside):
    rows = [(text, label, str(n)) for n, (text, label) in enumerate(make_rows(60, 1))]
    write_table(reviews / "numbered.csv", rows, header=("text", "label", "number"))
    task = {"files": {"train": "numbered.csv"}, "text": "text", "split": {"validation": 0.25}}
    (reviews / "made.yaml").write_text(yaml.safe_dump({**task, "model": bert_config(vocabulary)}))
    flags = ("--task", "made.yaml", "--max_steps", 1, "--output_dir", "run", "--mixed_precision", "no")
    assert run_inside("train.py", *flags, cwd=reviews)[0] == 0
    evaluate("--model", "run", "--slices", "number", cwd=reviews)
    predictions = read_table(reviews / "run/evaluation-validation/predictions.csv")
    slices = read_json(reviews / "run/evaluation-validation/evaluation.json")["slices"]["number"]
    assert {rows[int(part["slice"])][0] for part in slices} == {row["text"] for row in predictions}


def test_compare_with_a_run_an_evaluation_and_a_file(copy, evaluate, run_inside):
    """All three say the same, and a model does not differ from itself."""
    flags = ("--task", "reviews.yaml", "--threads", 1, "--max_steps", 4, "--output_dir", "other")
    assert run_inside("train.py", *flags, cwd=copy)[0] == 0
    evaluate("--model", "other", cwd=copy)
    there = read_table(copy / "other/evaluation-validation/predictions.csv")
    comparisons = []
    for other in ("other", "other/evaluation-validation", "other/evaluation-validation/predictions.csv"):
        printed = evaluate("--model", "run", "--compare", other, cwd=copy)
        comparison = read_json(copy / "run/evaluation-validation/evaluation.json")["comparison"]
        assert comparison["conclusion"] in printed
        comparisons.append({key: comparison[key] for key in ("scores", "differences", "mcnemar")})
    assert comparisons[0] == comparisons[1] == comparisons[2]
    labels, predicted = ([row[name] for row in there] for name in ("label", "predicted_label"))
    assert comparisons[0]["scores"]["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    here = read_table(copy / "run/evaluation-validation/predictions.csv")
    only_one = read_table(copy / "run/evaluation-validation/compared.csv")
    differ = [
        n for n, rows in enumerate(zip(here, there, strict=True)) if len({r["predicted_label"] for r in rows}) > 1
    ]
    assert [int(row["example"]) for row in only_one] == differ
    assert [(row["here"], row["other"]) for row in only_one] == [
        (here[number]["predicted_label"], there[number]["predicted_label"]) for number in differ
    ]
    evaluate("--model", "run", "--compare", "run", cwd=copy)
    comparison = read_json(copy / "run/evaluation-validation/evaluation.json")["comparison"]
    margin = 1.959964 * 2**0.5 / 52  # of no difference in 50 rows and one in each direction (Bonett and Price 2012)
    assert comparison["differences"]["accuracy"] == {"difference": 0, "interval": pytest.approx([-margin, margin])}
    assert comparison["conclusion"] == "run and run predict the same for all 50 examples."


@pytest.mark.slow
def test_compare_with_a_model_whose_labels_have_other_ids(copy, evaluate, run_inside):
    task = yaml.safe_load((copy / "reviews.yaml").read_text())
    (copy / "turned.yaml").write_text(yaml.safe_dump({**task, "labels": ["positive", "negative"]}))
    flags = ("--task", "turned.yaml", "--threads", 1, "--max_steps", 17, "--output_dir", "turned")
    assert run_inside("train.py", *flags, cwd=copy)[0] == 0
    evaluate("--model", "turned", cwd=copy)
    rows = read_table(copy / "turned/evaluation-validation/predictions.csv")
    accuracy = np.mean([row["label"] == row["predicted_label"] for row in rows])
    evaluate("--model", "run", "--compare", "turned", cwd=copy)
    comparison = read_json(copy / "run/evaluation-validation/evaluation.json")["comparison"]
    assert comparison["scores"]["accuracy"] == pytest.approx(accuracy)


def test_baselines_stand_beside_the_model(copy, evaluate, refused, tiny_bert):
    results = read_json(copy / "run/results.json")
    (copy / "run/results.json").write_text(json.dumps({**results, "model": str(tiny_bert)}))  # as if it began there
    printed = evaluate("--model", "run", "--baseline", cwd=copy)
    baselines = read_json(copy / "run/evaluation-validation/evaluation.json")["baselines"]
    assert set(baselines) == {"bag of words", "frozen encoder"}
    # The reviews' words say it all: a linear model on them is hard to beat.
    assert baselines["bag of words"]["accuracy"] > 0.9 and 0 < baselines["frozen encoder"]["accuracy"] <= 1
    assert f"bag of words: accuracy {baselines['bag of words']['accuracy']:.4f}" in printed
    assert "no train split" in refused("--model", "run", "--file", "test.csv", "--baseline", cwd=copy)


def test_a_bag_of_words_is_the_one_of_scikit_learn(copy, evaluate):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    evaluate("--model", "run", "--split", "test", "--baseline", cwd=copy)
    train, test = (read_table(copy / f"{name}.csv") for name in ("train", "test"))
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    model = make_pipeline(vectorizer, LogisticRegression(max_iter=1000))
    model.fit([row["text"] for row in train], [row["label"] for row in train])
    expected = accuracy_score([row["label"] for row in test], model.predict([row["text"] for row in test]))
    baselines = read_json(copy / "run/evaluation-test/evaluation.json")["baselines"]
    assert baselines == {"bag of words": pytest.approx({"accuracy": expected, "f1": baselines["bag of words"]["f1"]})}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compare", "nowhere"], "--compare nowhere: does not exist"),
        (["--compare", "test.csv"], 'has no column "predicted_label"'),
        (["--compare", "reviews.yaml"], "reviews.yaml"),
    ],
)
def test_what_cannot_be_compared_is_refused(copy, refused, flags, message):
    assert message in refused("--model", "run", *flags, cwd=copy)


@pytest.mark.parametrize("file", ["errors.csv.tmp", "evaluation.json"])
def test_a_full_disk_is_told_in_two_lines(copy, run_inside, monkeypatch, file):
    def full(path, *arguments, **options):
        if Path(path).name.startswith(file):
            path = "/dev/full"
        return ordinary(path, *arguments, **options)

    ordinary = open
    monkeypatch.setattr("builtins.open", full)
    monkeypatch.setattr("io.open", full)
    code, _, errors = run_inside("evaluate.py", *SAME, "--model", "run", "--output_dir", "out", cwd=copy)
    assert code == 2 and len(errors.splitlines()) == 2 and "cannot be written (No space left on device)" in errors
    assert not (copy / "out" / file).exists() and not list((copy / "out").glob("*.tmp"))


def test_a_model_that_learnt_nothing_is_said_first(copy, evaluate):
    write_table(copy / "one.csv", [(text, "positive") for text, label in make_rows(40, 6) if label == "positive"])
    printed = evaluate("--model", "run", "--file", "one.csv", cwd=copy).splitlines()
    (warning,) = [number for number, line in enumerate(printed) if line.startswith("WARNING: ON ONE THE MODEL")]
    (scores,) = [number for number, line in enumerate(printed) if line.startswith("one: accuracy")]
    assert warning < scores
    assert read_json(copy / "run/evaluation-one/evaluation.json")["warning"] in "\n".join(printed)


def test_few_rows_of_a_class_are_said_beside_the_baselines(reviews, vocabulary, evaluate, run_inside):
    task = {"files": {"train": "train.csv", "validation": "validation.csv"}, "text": "text"}
    (reviews / "few.yaml").write_text(yaml.safe_dump({**task, "model": bert_config(vocabulary)}))
    write_table(reviews / "train.csv", make_rows(20, 1))
    flags = ("--task", "few.yaml", "--max_steps", 1, "--output_dir", "run", "--mixed_precision", "no")
    assert run_inside("train.py", *flags, cwd=reviews)[0] == 0
    assert "few-shot methods" in evaluate("--model", "run", "--baseline", cwd=reviews)
