"""train.py: what a run writes, the same numbers however it is launched and cut, what it refuses and how it says so."""

import csv
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    ACCELERATE,
    TORCHRUN_2,
    bert_config,
    lines_of,
    make_rows,
    run_script,
    write_review_task,
    write_reviews,
    write_table,
)
from sklearn.metrics import accuracy_score, f1_score
from sklearn.utils.class_weight import compute_class_weight
from test_preemption import ended, start, start_2
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    pipeline,
)

from classifier import processes
from classifier.training import batching

MODEL_FILES = {
    *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
    *("task.json", "metrics.json", "README.md"),
}
# Threads that wait for each other cost seconds where other programs run; the batches are too small to gain by them.
ONE_THREAD = ("--threads", 1)
# With these the tiny model learns the reviews within two epochs.
LEARNING = ("--learning_rate", 0.01, "--warmup_steps", 5)
RUN_FILES = {
    "metrics.jsonl",
    "results.json",
    "state.json",
    "validation_predictions.safetensors",
    "report.html",
    "plots",
    *(f"model/{name}" for name in MODEL_FILES),
}


def change_task(file, **changes):
    """Change keys of a task's YAML; a value of None takes the key out."""
    content = {**yaml.safe_load(file.read_text(encoding="utf-8")), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def make_ratings(number, seed):
    """(text, number) rows: above 0 for good things, below for bad ones, further from it with each "very"."""
    signs = {"positive": 1, "negative": -1}
    return [(text, f"{signs[label] * (1 + text.count('very') / 4):.2f}") for text, label in make_rows(number, seed)]


def make_regression(task):
    for name, number, seed in (("train", 200, 1), ("validation", 50, 2), ("test", 50, 3)):
        write_table(task.parent / f"{name}.csv", make_ratings(number, seed))
    return change_task(task, labels="regression", metrics=["pearson", "mse"])


def files_under(folder):
    """Return the files, all pictures as one."""
    paths = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str((path.parent if path.suffix == ".png" else path).relative_to(folder)) for path in paths}


def contents_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def read_results(run):
    return json.loads((Path(run) / "results.json").read_text(encoding="utf-8"))


def read_state(run):
    return json.loads((Path(run) / "state.json").read_text(encoding="utf-8"))


def values_of(run, key="loss"):
    return [line[key] for line in lines_of(run)]


def table_of(file):
    """The columns text and label of a CSV file."""
    with open(file, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture
def train(run_inside):
    """Train in this process and return what was printed; the run must succeed."""

    def run(task, *arguments, output=None):
        where = ["--output_dir", output] if output else []
        code, printed, errors = run_inside("train.py", "--task", task, *ONE_THREAD, *where, *arguments, cwd=task.parent)
        assert code == 0, printed + errors
        return printed

    return run


@pytest.fixture
def refused(run_inside):
    """A mistake of the user's: exit code 2, two lines, no traceback, nothing written. Returns the two lines."""

    def run(*arguments, cwd):
        before = contents_of(cwd)
        code, printed, errors = run_inside("train.py", *ONE_THREAD, *arguments, cwd=cwd)
        assert code == 2, printed + errors
        assert len(errors.splitlines()) == 2, errors
        assert all(line.startswith("train.py: ") and len(line) > 12 for line in errors.splitlines()), errors
        assert "Traceback" not in printed + errors
        assert contents_of(cwd) == before
        return errors

    return run


# The command of the run that most tests look at. Other flags of it are no settings (--threads, --log_every, ...).
TYPED = ("--task", "reviews.yaml", "--eval_every", 6, *LEARNING)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, vocabulary):
    """A folder with the reviews task, trained by plain `python train.py`: (folder, the CompletedProcess)."""
    folder = tmp_path_factory.mktemp("launched")
    write_review_task(write_reviews(folder) / "reviews.yaml", bert_config(vocabulary))
    done = run_script("train.py", *TYPED, *ONE_THREAD, "--log_every", 1, "--final_test", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.fixture
def finished(launched, tmp_path):
    """A copy of that folder, to change: the folder of the task, and its run."""
    folder = tmp_path / "copy"
    shutil.copytree(launched[0], folder)
    (run,) = (folder / "runs").iterdir()
    return folder, run


def run_of(launched):
    (run,) = (launched[0] / "runs").iterdir()
    return run


# ---------------------------------------------------------------------------------------------- what a run leaves


def test_a_run_writes_its_files_and_nothing_else(launched):
    folder, done = launched
    data = {"train.csv", "validation.csv", "test.csv", "reviews.yaml"}
    assert files_under(folder) == data | {
        f"runs/reviews,learning_rate=0.01,warmup_steps=5,eval_every=6/{name}" for name in RUN_FILES
    }
    assert not (run_of(launched) / "checkpoints").exists()
    assert read_state(run_of(launched))["status"] == "done"
    assert done.stderr == ""


def test_files_of_a_model_have_the_mode_that_the_umask_asks_for(launched):
    mask = os.umask(0)
    os.umask(mask)
    for file in (run_of(launched) / "model").iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask, file.name


def test_results_hold_what_happened(launched, vocabulary):
    run = run_of(launched)
    results = read_results(run)
    assert results["task"] == "reviews"
    assert results["model"]["hidden_size"] == 32
    assert (results["seed"], results["num_processes"], results["mixed_precision"]) == (42, 1, "no")
    assert (results["steps"], results["epochs"], results["train_examples"]) == (26, 2.0, 400)
    assert results["hardware"]["products"] == "float32" and results["hardware"]["gradient_scaler"] is False
    assert results["settings"]["learning_rate"] == 0.01 and results["settings"]["batch_size"] == 16
    assert results["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert 0 < results["train_seconds"] < 300

    texts, labels = table_of(launched[0] / "train.csv")
    lengths = np.array([len(ids) for ids in BertTokenizer(str(vocabulary))(texts)["input_ids"]])
    tokens = 2 * lengths.sum()
    assert results["padding_fraction"] == 0  # the examples lie end to end
    assert results["train_tokens_per_second"] == pytest.approx(tokens / results["train_seconds"], rel=1e-9)
    assert results["train_examples_per_second"] == pytest.approx(400 / results["train_seconds"], rel=1e-9)

    most_frequent = Counter(labels).most_common(1)[0][0]
    for split in ("validation", "test"):
        truth = table_of(launched[0] / f"{split}.csv")[1]
        baseline = accuracy_score(truth, [most_frequent] * len(truth))
        assert results["majority_baseline"][split]["accuracy"] == pytest.approx(baseline)


def test_metrics_hold_a_line_for_every_step_and_evaluation(launched):
    lines = lines_of(run_of(launched))
    assert [line["step"] for line in lines] == list(range(1, 27))
    keys = {"type", "step", "epoch", "loss", "learning_rate", "grad_norm", "examples_per_second"}
    assert all(set(line) == keys for line in lines)
    assert [line["epoch"] for line in lines] == [round(step / 13, 4) for step in range(1, 27)]
    lines = lines_of(run_of(launched), "eval")
    assert [line["step"] for line in lines] == [6, 12, 18, 24, 26]
    keys = {"type", "step", "epoch", "split", "loss", "scores", "train_loss", "seconds"}
    assert all(set(line) == keys for line in lines)
    assert {line["split"] for line in lines} == {"validation"}  # the test split is scored once, at the end
    assert all(list(line["scores"]) == ["accuracy", "f1"] for line in lines)


def test_the_saved_model_is_the_best_one_and_its_scores_are_right(launched):
    folder, _ = launched
    results, evaluations = read_results(run_of(launched)), lines_of(run_of(launched), "eval")
    scores = [line["scores"]["accuracy"] for line in evaluations]
    best = evaluations[int(np.argmax(scores))]  # of equal ones, the first
    assert results["best_step"] == best["step"] < 26
    assert results["scores"]["validation"] == best["scores"]

    model = AutoModelForSequenceClassification.from_pretrained(run_of(launched) / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_of(launched) / "model")
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    for split in ("validation", "test"):
        texts, labels = table_of(folder / f"{split}.csv")
        truth = torch.tensor([model.config.label2id[label] for label in labels])
        with torch.no_grad():
            logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        predictions = logits.argmax(1)
        assert results["scores"][split]["accuracy"] == pytest.approx(accuracy_score(truth, predictions))
        assert results["scores"][split]["f1"] == pytest.approx(f1_score(truth, predictions))
        assert results["scores"][split]["accuracy"] >= 0.9
        if split == "validation":
            loss = torch.nn.functional.cross_entropy(logits, truth).item()
            assert best["loss"] == pytest.approx(loss, rel=1e-5)
            assert all(line["loss"] != pytest.approx(loss, rel=1e-3) for line in evaluations if line is not best)


def test_a_pipeline_of_transformers_loads_the_model_and_answers_with_label_names(launched):
    classify = pipeline("text-classification", model=str(run_of(launched) / "model"))
    texts, labels = table_of(launched[0] / "test.csv")
    answers = [answer["label"] for answer in classify(texts)]
    scores = read_results(run_of(launched))["scores"]["test"]
    assert set(answers) == {"negative", "positive"}
    assert accuracy_score(labels, answers) == pytest.approx(scores["accuracy"])


def test_the_model_folder_describes_itself(launched):
    folder, results = run_of(launched) / "model", read_results(run_of(launched))
    task = json.loads((folder / "task.json").read_text())
    assert (task["text"], task["labels"], task["max_length"]) == (["text"], ["negative", "positive"], 32)
    assert task["metrics"] == ["accuracy", "f1"] and set(task["fingerprints"]) == {"train", "validation", "test"}
    saved = json.loads((folder / "metrics.json").read_text())
    assert all(saved[key] == results[key] for key in ("scores", "choice", "corrected_scores"))
    card = (folder / "README.md").read_text()
    for split, scores in results["scores"].items():
        shown = results["corrected_scores"].get(split, scores)["accuracy"]
        assert f"| {split}, {results['examples'][split]} examples | accuracy | {shown:.4f} | " in card


def test_printed_scores_are_those_of_the_results(launched):
    _, done = launched
    results = read_results(run_of(launched))
    for split, scores in results["scores"].items():
        shown = results["corrected_scores"].get(split, scores)
        line = f"{split}, {results['examples'][split]} examples: accuracy {shown['accuracy']:.4f}, f1 {shown['f1']:.4f}"
        assert line in done.stdout
    scores = results["scores"]["validation"]
    assert f"on the examples that chose: accuracy {scores['accuracy']:.4f}" in done.stdout
    assert "step 6 | train loss" in done.stdout and " | majority: accuracy 0." in done.stdout


# ------------------------------------------------------------------------------------------------- the same numbers


def assert_same_training(run, other, splits=("validation",)):
    """The losses of every step, the evaluations and the choice of the best are the same up to fp32's rounding."""
    steps, losses = values_of(run, "step"), values_of(run)
    assert values_of(other, "step") == steps and len(steps) == len(set(steps)) > 1
    assert values_of(other) == pytest.approx(losses, rel=1e-5)
    assert values_of(other, "learning_rate") == values_of(run, "learning_rate")
    assert values_of(other, "grad_norm") == pytest.approx(values_of(run, "grad_norm"), rel=1e-4)
    for line, other_line in zip(lines_of(run, "eval"), lines_of(other, "eval"), strict=True):
        assert other_line["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other_line["scores"] == pytest.approx(line["scores"], rel=1e-4)
    results, other_results = read_results(run), read_results(other)
    for key in ("best_step", "train_examples"):
        assert other_results[key] == results[key]
    for split in splits:
        assert other_results["scores"][split] == pytest.approx(results["scores"][split], rel=1e-4)
        assert other_results["majority_baseline"][split] == results["majority_baseline"][split]


def test_accelerate_launch_trains_as_python_does(launched, tmp_path):
    folder, _ = launched
    other = run_script(
        *("train.py", *TYPED, *ONE_THREAD, "--log_every", 1, "--output_dir", tmp_path / "run"),
        cwd=folder,
        launcher=ACCELERATE,
    )
    assert other.returncode == 0, other.stderr
    assert_same_training(run_of(launched), tmp_path / "run")


def test_two_processes_train_as_one_does(launched, tmp_path):
    other = run_script(
        *("train.py", *TYPED, *ONE_THREAD, "--log_every", 1, "--output_dir", tmp_path / "run"),
        *("--final_test",),
        cwd=launched[0],
        launcher=TORCHRUN_2,
    )
    assert other.returncode == 0, other.stderr
    assert_same_training(run_of(launched), tmp_path / "run", ("validation", "test"))
    assert read_results(tmp_path / "run")["num_processes"] == 2
    assert other.stdout.count("best at step") == 1  # one process speaks
    assert files_under(tmp_path / "run") == RUN_FILES
    here, there = read_results(run_of(launched)), read_results(tmp_path / "run")
    assert there["train_tokens_per_second"] * there["train_seconds"] == pytest.approx(
        here["train_tokens_per_second"] * here["train_seconds"]
    )


def train_on_two(task, *flags):
    """Train on two processes, which are forked and not launched, for speed."""
    for process in start_2(task.parent, "--task", task, *ONE_THREAD, *flags):
        code, _, errors = ended(process)
        assert code == 0, errors


@pytest.mark.slow
def test_two_processes_agree_on_uneven_batches_class_weights_and_label_smoothing(review_task, train):
    rows = [row for row in make_rows(120, 5) if row[1] == "positive" or len(row[0]) % 3 == 0]
    write_table(review_task.parent / "train.csv", rows)
    flags = ["--batch_size", 7, "--class_weights", "balanced", "--label_smoothing", 0.1, "--log_every", 1]
    flags += ["--max_steps", 16, "--weight_decay", 0.1]
    train(review_task, *flags, output="whole")
    train_on_two(review_task, *flags, "--micro_batch_size", 3, "--output_dir", "two")
    assert_same_training(review_task.parent / "whole", review_task.parent / "two")


@pytest.mark.slow
def test_more_processes_than_examples_in_a_step(review_task, train):
    make_regression(review_task)
    flags = ["--batch_size", 1, "--max_steps", 12, "--eval_every", 5, "--log_every", 1]
    train(review_task, *flags, output="one")
    train_on_two(review_task, *flags, "--output_dir", "two")
    assert_same_training(review_task.parent / "one", review_task.parent / "two")
    results = read_results(review_task.parent / "two")
    assert results["train_examples"] == 12 and results["padding_fraction"] == 0


@pytest.mark.slow(after=1)
@pytest.mark.parametrize("kind", ["plain", "weighted", "regression"])
def test_micro_batches_of_any_size_change_nothing(review_task, train, kind):
    flags = ["--max_steps", 14, "--log_every", 1]
    if kind == "weighted":
        rows = [row for row in make_rows(200, 5) if row[1] == "positive" or len(row[0]) % 3 == 0]
        write_table(review_task.parent / "train.csv", rows)
        flags += ["--class_weights", "balanced", "--label_smoothing", 0.2, "--batch_size", 7]
    elif kind == "regression":
        make_regression(review_task)
    train(review_task, *flags, output="whole")
    for size in (3, 1) if kind == "plain" else (3,):
        train(review_task, *flags, "--micro_batch_size", size, output=f"micro-{size}")
        assert_same_training(review_task.parent / "whole", review_task.parent / f"micro-{size}")


def plain_training(folder, vocabulary, steps, total_steps, loss_of, **settings):
    """Losses, gradient norms and learning rates of a loop in plain torch, for the task's training rows."""
    default = {"warmup": 0, "batch_size": 16, "seed": 42, "decay": 0.01, "clip": 1.0, "outputs": 2}
    options = {**default, "betas": (0.9, 0.999), "epsilon": 1e-8, **settings}
    values = {key: value for key, value in bert_config(vocabulary).items() if key not in ("vocab", "model_type")}
    tokenizer = BertTokenizer(str(vocabulary))
    texts, labels = table_of(folder / "train.csv")
    torch.manual_seed(options["seed"])
    config = BertConfig(vocab_size=len(tokenizer), num_labels=options["outputs"], **values)
    model = BertForSequenceClassification(config).train()
    undecayed = [p for name, p in model.named_parameters() if name.endswith("bias") or "LayerNorm" in name]
    decayed = [p for name, p in model.named_parameters() if not (name.endswith("bias") or "LayerNorm" in name)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options["decay"]}, {"params": undecayed, "weight_decay": 0.0}],
        betas=options["betas"],
        eps=options["epsilon"],
    )
    history = {"loss": [], "grad_norm": [], "learning_rate": []}
    for step, batch in enumerate(batching.make_plan(len(texts), options["batch_size"], options["seed"], steps)):
        warmup = options["warmup"]
        rate = 0.003 * (step / warmup if step < warmup else (total_steps - step) / (total_steps - warmup))
        inputs = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt")
        loss = loss_of(model(**inputs).logits, [labels[i] for i in batch], labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for key, value in (("loss", loss.item()), ("grad_norm", norm.item()), ("learning_rate", rate)):
            history[key].append(value)
    return history


def cross_entropy(logits, labels, all_labels):
    return torch.nn.functional.cross_entropy(logits, torch.tensor([label == "positive" for label in labels]).long())


def weighted_smoothed(logits, labels, all_labels):
    """Label smoothing 0.2 (Szegedy 2016, eq. 7) with the weights that scikit-learn calls balanced."""
    weights = compute_class_weight("balanced", classes=np.array(["negative", "positive"]), y=np.array(all_labels))
    ids = torch.tensor([label == "positive" for label in labels]).long()
    log_p = logits.log_softmax(-1)
    losses = -(0.8 * log_p[range(len(ids)), ids] + 0.2 * log_p.mean(-1))
    return (losses * torch.tensor(weights, dtype=torch.float32)[ids]).sum() / len(ids)


def squared_error(logits, labels, all_labels):
    return ((logits[:, 0] - torch.tensor([float(label) for label in labels])) ** 2).mean()


@pytest.mark.parametrize("kind", ["defaults", "other settings", "weighted", "regression"])
def test_losses_and_rates_are_those_of_a_loop_in_plain_torch(review_task, vocabulary, train, kind):
    flags, settings, loss_of, total_steps = ["--warmup_ratio", 0.1], {"warmup": 3}, cross_entropy, 26
    if kind == "other settings":
        flags = ["--warmup_steps", 2, "--max_steps", 9, "--weight_decay", 0.5, "--max_grad_norm", 0.05, "--seed", 7]
        flags += ["--adam_betas", 0.8, 0.99, "--adam_epsilon", 1e-3, "--batch_size", 48]
        settings = {"warmup": 2, "decay": 0.5, "clip": 0.05, "seed": 7, "betas": (0.8, 0.99), "epsilon": 1e-3}
        settings, total_steps = {**settings, "batch_size": 48}, 9
    elif kind == "weighted":
        write_table(review_task.parent / "train.csv", [r for r in make_rows(260, 5) if r[1] == "positive"][:130])
        write_table(review_task.parent / "train.csv", make_rows(60, 6, ("positive",)) + make_rows(140, 7))
        flags += ["--label_smoothing", 0.2, "--class_weights", "balanced"]
        loss_of = weighted_smoothed
    elif kind == "regression":
        make_regression(review_task)
        settings, loss_of = {**settings, "outputs": 1}, squared_error
    train(review_task, *flags, "--log_every", 1, output="run")
    expected = plain_training(review_task.parent, vocabulary, total_steps, total_steps, loss_of, **settings)
    run = review_task.parent / "run"
    assert values_of(run)[:5] == pytest.approx(expected["loss"][:5], rel=1e-6)
    assert values_of(run) == pytest.approx(expected["loss"], rel=1e-4)
    assert values_of(run, "grad_norm")[:5] == pytest.approx(expected["grad_norm"][:5], rel=1e-5)
    assert values_of(run, "learning_rate") == pytest.approx(expected["learning_rate"], rel=1e-9, abs=1e-15)


@pytest.mark.slow
def test_lines_between_are_means_over_their_examples(review_task, train):
    train(review_task, "--log_every", 1, "--epochs", 1, output="each")
    train(review_task, "--log_every", 5, "--epochs", 1, output="some")
    losses = values_of(review_task.parent / "each")
    means = [np.mean(losses[:5]), np.mean(losses[5:10]), np.average(losses[10:], weights=[16, 16, 8])]
    assert values_of(review_task.parent / "some", "step") == [5, 10, 13]
    assert values_of(review_task.parent / "some") == pytest.approx(means, rel=1e-6)


def test_the_seed_alone_decides_what_is_drawn_also_with_dropout(review_task, vocabulary, train):
    change_task(review_task, model=bert_config(vocabulary, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1))
    flags = ["--max_steps", 8, "--log_every", 1]
    train(review_task, *flags, output="first")
    train(review_task, *flags, "--eval_every", 3, "--num_workers", 1, output="again")
    train(review_task, *flags, "--seed", 43, output="other")
    first, again, other = (values_of(review_task.parent / name) for name in ("first", "again", "other"))
    assert first == again
    assert first[0] != pytest.approx(other[0], abs=1e-4)


def test_gradient_checkpointing_changes_no_loss(review_task, vocabulary, train):
    flags = ["--max_steps", 6, "--log_every", 1]
    train(review_task, *flags, output="plain")
    train(review_task, *flags, "--gradient_checkpointing", output="checkpointing")
    assert_same_training(review_task.parent / "plain", review_task.parent / "checkpointing")


def test_the_launchers_accumulation_is_ignored_and_said(review_task, train, monkeypatch):
    flags = ["--max_steps", 6, "--log_every", 1]
    printed = train(review_task, *flags, output="plain")
    assert "gradient_accumulation_steps" not in printed
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    printed = train(review_task, *flags, output="accumulating")
    assert "gradient_accumulation_steps=4 is ignored" in printed
    assert_same_training(review_task.parent / "plain", review_task.parent / "accumulating")


# ---------------------------------------------------------------------------------------- folders and finished runs


@pytest.mark.slow
def test_the_folder_is_named_after_the_task_and_the_settings_that_differ(review_task, train):
    train(review_task, "--max_steps", 1)
    train(review_task, "--max_steps", 1, "--learning_rate", "1e-3")
    train(review_task, "--max_steps", 1, "--learning_rate", "3e-3", "--seed", 43, "--log_every", 1)
    names = {path.name for path in (review_task.parent / "runs").iterdir()}
    assert names == {
        *("reviews,max_steps=1", "reviews,max_steps=1,learning_rate=0.001", "reviews,max_steps=1,seed=43"),
    }


def test_without_other_settings_the_folder_has_the_tasks_name(review_task, train):
    change_task(review_task, defaults={"max_steps": 1, "learning_rate": 0.003})
    train(review_task)
    train(review_task, "--learning_rate", "0.001")
    names = {path.name for path in (review_task.parent / "runs").iterdir()}
    assert names == {"reviews", "reviews,learning_rate=0.001"}


def test_a_file_without_a_task_names_the_run_and_its_model(reviews, tiny_bert, run_inside):
    arguments = ["--train_file", "train.csv", "--model", tiny_bert, "--max_steps", 2, "--max_length", 24]
    code, printed, errors = run_inside("train.py", *ONE_THREAD, *arguments, cwd=reviews)
    assert code == 0, errors
    run = reviews / "runs" / f"train,max_length=24,model={tiny_bert.name},max_steps=2"
    results = read_results(run)
    assert results["task"] == "train" and list(results["scores"]["validation"]) == ["f1_macro", "accuracy"]
    assert "train: 180 rows | " in printed and "validation: 20 rows | " in printed
    assert "newly initialised: classifier" in printed


def test_a_finished_run_typed_again_prints_its_scores_and_trains_nothing(finished, run_inside):
    folder, run = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, printed, errors = run_inside("train.py", *TYPED, *ONE_THREAD, cwd=folder)
    assert (code, errors) == (0, "")
    assert "already complete" in printed
    results = read_results(run)
    scores, corrected = results["scores"]["validation"], results["corrected_scores"]["validation"]
    assert f"validation, 50 examples: accuracy {corrected['accuracy']:.4f}, f1 {corrected['f1']:.4f}" in printed
    assert f"that chose: accuracy {scores['accuracy']:.4f}, f1 {scores['f1']:.4f}" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_settings_in_the_folder_of_a_run_are_refused_and_named(finished, refused):
    folder, run = finished
    errors = refused(*TYPED, "--output_dir", run, "--learning_rate", "0.001", "--seed", 1, cwd=folder)
    assert "learning_rate: 0.01 before, 0.001 now" in errors and "seed: 42 before, 1 now" in errors
    assert "batch_size" not in errors and "--overwrite" in errors


def test_other_data_in_the_folder_of_a_run_are_refused(finished, refused):
    folder, _ = finished
    write_table(folder / "train.csv", [*make_rows(199, 1), ("the room was dull .", "negative")])
    assert "data" in refused(*TYPED, cwd=folder)


# How an unfinished run resumes is in test_resume.py.
@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_an_unfinished_run_without_a_checkpoint_starts_again_by_the_same_command(finished, run_inside, status):
    folder, run = finished
    weights, losses = (run / "model" / "model.safetensors").read_bytes(), values_of(run)
    state = {**read_state(run), "status": status, "reason": "the power went"}
    (run / "state.json").write_text(json.dumps(state))
    shutil.rmtree(run / "model")
    code, printed, errors = run_inside("train.py", *TYPED, *ONE_THREAD, "--log_every", 1, cwd=folder)
    assert (code, errors) == (0, "") and "already complete" not in printed
    assert values_of(run) == losses  # once, not twice
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    assert (read_state(run)["status"], read_state(run)["reason"]) == ("done", "")
    assert files_under(run) == RUN_FILES


@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_an_unfinished_run_with_other_settings_is_refused_and_overwrite_starts_again(
    finished, refused, run_inside, status
):
    folder, run = finished
    (run / "state.json").write_text(json.dumps({**read_state(run), "status": status}))
    flags = ["--task", "reviews.yaml", "--output_dir", run, "--max_steps", 2, "--log_every", 1]
    errors = refused(*flags, cwd=folder)
    assert "max_steps: None before, 2 now" in errors and "--overwrite" in errors
    code, _, errors = run_inside("train.py", *ONE_THREAD, *flags, "--overwrite", cwd=folder)
    assert code == 0, errors
    assert [line["step"] for line in lines_of(run)] == [1, 2]


@pytest.mark.parametrize(
    "flags",
    [
        ["--resume", "nowhere"],
        ["--resume", "auto", "--save_every", "0"],
        ["--save_every", "often"],
        ["--save_every", "-5m"],
        ["--save_every", "2.5"],
        ["--save_every", "infm"],
        ["--keep_checkpoints", 0],
        ["--overwrite", "--resume", "never"],
    ],
)
def test_mistakes_of_saving_and_going_on_are_refused(review_task, refused, flags):
    errors = refused("--task", review_task, "--max_steps", 1, *flags, cwd=review_task.parent)
    assert flags[-2].removeprefix("--") in errors


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_folder_that_holds_no_run_is_left_alone(review_task, refused, flags):
    folder = review_task.parent / "precious"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.bin").write_text("years of work")
    (folder / "results.json").write_text("{}")
    errors = refused("--task", review_task, "--output_dir", folder, *flags, cwd=review_task.parent)
    assert "contains no run" in errors


@pytest.mark.parametrize("content", ['{"version": 4}', "[1, 2]", "not JSON"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_state_file_of_another_program_makes_no_run(review_task, refused, content, flags):
    folder = review_task.parent / "terraform"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "weights.bin").write_text("years of work")
    (folder / "state.json").write_text(content)
    refused("--task", review_task, "--max_steps", 1, "--output_dir", folder, *flags, cwd=review_task.parent)


def test_an_output_folder_that_is_a_file_is_refused(review_task, refused):
    (review_task.parent / "taken").write_text("a file")
    assert "taken" in refused("--task", review_task, "--output_dir", "taken", cwd=review_task.parent)


# A tokenizer changes its own state when it cuts the first texts: no part of the key of the cache may depend on it.
@pytest.mark.slow
def test_a_second_run_takes_all_tokens_from_the_cache(review_task, train):
    write_table(review_task.parent / "train.csv", make_rows(200, 1234))  # rows that no other test has tokenised
    write_table(review_task.parent / "validation.csv", make_rows(50, 1235))
    change_task(review_task, files={"train": "train.csv", "validation": "validation.csv"})
    assert "tokenised: train, validation\n" in train(review_task, "--max_steps", 1, output="first")
    printed = train(review_task, "--max_steps", 1, output="second")
    assert "tokens from the cache\n" in printed and "tokenised" not in printed
    write_table(review_task.parent / "validation.csv", make_rows(50, 1236))
    assert "tokenised: validation\n" in train(review_task, "--max_steps", 1, output="third")


def test_an_empty_folder_is_used(review_task, train):
    (review_task.parent / "empty").mkdir()
    train(review_task, "--max_steps", 1, output="empty")
    assert files_under(review_task.parent / "empty") == RUN_FILES


def test_overwrite_starts_again_and_removes_what_the_run_left_alone(finished, run_inside):
    folder, run = finished
    (run / "notes.txt").write_text("mine")
    (run / "evaluation-test").mkdir()
    (run / "evaluation-test" / "evaluation.json").write_text("{}")
    (run / "model" / "old.bin").write_text("of the run before")
    (run / "checkpoints" / "step-00000003.tmp").mkdir(parents=True)
    flags = ["--task", "reviews.yaml", "--output_dir", run, "--overwrite", "--max_steps", 3, "--log_every", 1]
    code, _, errors = run_inside("train.py", *ONE_THREAD, *flags, cwd=folder)
    assert code == 0, errors
    assert files_under(run) == RUN_FILES | {"notes.txt", "evaluation-test/evaluation.json"}
    assert not (run / "checkpoints").exists()
    assert [line["step"] for line in lines_of(run)] == [1, 2, 3]
    assert read_results(run)["steps"] == 3 and list(read_results(run)["scores"]) == ["validation"]


# ----------------------------------------------------------------------------------------------- length of a training


@pytest.mark.slow
def test_max_steps_and_parts_of_an_epoch(review_task, train):
    train(review_task, "--max_steps", 5, output="steps")
    assert read_results(review_task.parent / "steps")["steps"] == 5
    assert [line["step"] for line in lines_of(review_task.parent / "steps", "eval")] == [5]
    train(review_task, "--epochs", 0.5, output="half")
    results = read_results(review_task.parent / "half")
    assert (results["steps"], results["train_examples"]) == (7, 7 * 16)
    assert results["epochs"] == pytest.approx(7 / 13)


def test_early_stopping_stops_and_says_so(review_task, train):
    flags = ["--learning_rate", 0, "--eval_every", 2, "--early_stopping_patience", 3, "--log_every", 1]
    printed = train(review_task, *flags, output="run")
    assert "accuracy in 3 evaluations: stopped early" in printed
    results = read_results(review_task.parent / "run")
    assert (results["steps"], results["best_step"], results["train_examples"]) == (8, 2, 128)
    assert [line["step"] for line in lines_of(review_task.parent / "run", "eval")] == [2, 4, 6, 8]


def test_a_metric_that_is_better_when_small_chooses_the_smallest(review_task, train):
    make_regression(review_task)
    flags = ["--metrics", "mse", "--eval_every", 2, "--learning_rate", 0.03, "--max_steps", 20]
    train(review_task, *flags, output="run")
    scores = {line["step"]: line["scores"]["mse"] for line in lines_of(review_task.parent / "run", "eval")}
    results = read_results(review_task.parent / "run")
    assert results["best_step"] == min(scores, key=scores.get) != 20
    assert results["scores"]["validation"]["mse"] == min(scores.values())


def test_final_test_needs_labels_and_a_test_split(review_task, refused):
    write_table(review_task.parent / "test.csv", [(text,) for text, _ in make_rows(50, 3)], header=("text",))
    errors = refused("--task", review_task, "--final_test", cwd=review_task.parent)
    assert "50 of 50 examples of the test split have no label" in errors
    files = {name: f"{name}.csv" for name in ("train", "validation")}
    change_task(review_task, files=files)
    assert "no test split" in refused("--task", review_task, "--final_test", cwd=review_task.parent)


def test_without_final_test_the_test_split_is_not_scored(review_task, train):
    train(review_task, "--max_steps", 1, output="run")
    assert list(read_results(review_task.parent / "run")["scores"]) == ["validation"]


# ------------------------------------------------------------------------------------------------ model and optimiser


@pytest.mark.parametrize("part", ["encoder", "embeddings", "1"])
def test_frozen_parts_keep_their_weights(review_task, tiny_bert, train, part):
    train(review_task, "--model", tiny_bert, "--freeze", part, "--max_steps", 4, "--weight_decay", 0.1, output="run")
    before, after = weights_of(tiny_bert), weights_of(review_task.parent / "run" / "model")
    changed = {name for name in before if not torch.equal(before[name], after[f"bert.{name}"])}
    frozen = {
        "encoder": set(before),
        "embeddings": {name for name in before if name.startswith("embeddings.")},
        "1": {name for name in before if name.startswith(("embeddings.", "encoder.layer.0."))},
    }[part]
    assert frozen and changed == set(before) - frozen


@pytest.mark.parametrize("part", ["nonsense", "3", "0", "-1"])
def test_a_part_that_is_not_there_cannot_be_frozen(review_task, refused, part):
    errors = refused("--task", review_task, f"--freeze={part}", cwd=review_task.parent)
    assert f"--freeze {part}" in errors and "none, encoder, embeddings, 1, 2" in errors


def test_a_head_for_other_labels_is_replaced_and_said(finished, run_inside):
    folder, run = finished
    flags = ["--task", "reviews.yaml", "--model", run / "model", "--log_every", 1, "--max_steps", 2]
    code, printed, errors = run_inside("train.py", *ONE_THREAD, *flags, "--output_dir", "same", cwd=folder)
    assert code == 0 and "newly initialised" not in printed, errors
    for name, number, seed in (("train", 200, 1), ("validation", 50, 2)):
        rows = [(text, {"positive": "joy", "negative": "anger"}[label]) for text, label in make_rows(number, seed)]
        write_table(folder / f"{name}.csv", rows)
    change_task(folder / "reviews.yaml", labels=["joy", "anger"], files={"train": "train.csv"})
    code, printed, errors = run_inside("train.py", *ONE_THREAD, *flags, "--output_dir", "other", cwd=folder)
    assert code == 0 and "newly initialised: classifier" in printed, errors
    assert values_of(folder / "same")[0] < 0.5 < values_of(folder / "other")[0]  # ln 2: a head that knows nothing
    config = json.loads((folder / "other" / "model" / "config.json").read_text())
    assert config["id2label"] == {"0": "joy", "1": "anger"}


def test_a_head_of_another_size_is_replaced_and_said(finished, run_inside):
    folder, run = finished
    rows = [(text, f"{label} {len(text) % 2}") for text, label in make_rows(60)]
    write_table(folder / "four.csv", rows)
    flags = ["--train_file", "four.csv", "--model", run / "model", "--max_steps", 1, "--output_dir", "four"]
    code, printed, errors = run_inside("train.py", *ONE_THREAD, *flags, cwd=folder)
    assert code == 0 and "newly initialised: classifier" in printed, errors
    assert len(json.loads((folder / "four" / "model" / "config.json").read_text())["id2label"]) == 4


def test_weights_that_are_not_finite_are_refused(review_task, tiny_bert, refused):
    from safetensors.torch import save_file

    shutil.copytree(tiny_bert, review_task.parent / "broken")
    weights = weights_of(tiny_bert)
    weights["encoder.layer.1.output.dense.weight"][3, 4] = float("nan")
    save_file(weights, review_task.parent / "broken" / "model.safetensors", metadata={"format": "pt"})
    errors = refused("--task", review_task, "--model", "broken", cwd=review_task.parent)
    assert "encoder.layer.1.output.dense.weight" in errors and "NaN" in errors


def test_more_tokens_than_positions_are_refused(review_task, tiny_bert, refused):
    errors = refused("--task", review_task, "--model", tiny_bert, "--max_length", 33, cwd=review_task.parent)
    assert "33" in errors and "32 positions" in errors


def test_checkpoints_in_half_precision_are_trained_in_float32(review_task, tiny_bert, train):
    from safetensors.torch import save_file

    shutil.copytree(tiny_bert, review_task.parent / "half")
    halves = {name: weight.half() for name, weight in weights_of(tiny_bert).items()}
    save_file(halves, review_task.parent / "half" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny_bert / "config.json").read_text())
    (review_task.parent / "half" / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    train(review_task, "--model", "half", "--max_steps", 2, output="run")
    assert {weight.dtype for weight in weights_of(review_task.parent / "run" / "model").values()} == {torch.float32}


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_ends_the_run_naming_step_and_examples(review_task, run_inside, refused):
    flags = ["--task", review_task, "--learning_rate", 1e30, "--output_dir", "run"]
    code, printed, errors = run_inside("train.py", *ONE_THREAD, *flags, cwd=review_task.parent)
    assert code == 1 and "Traceback" not in errors, printed + errors
    # The first step changes the weights, so that the second is the first to suffer; noted only at step 10.
    assert "step 2: the loss is" in errors and "training examples" in errors and "--learning_rate" in errors
    named = errors.partition("training examples, counted from 0: ")[2].partition("\n")[0]
    assert {int(number) for number in named.split(", ")} <= set(batching.make_plan(200, 16, 42, 2)[1].tolist())
    state = read_state(review_task.parent / "run")
    assert state["status"] == "failed" and state["reason"].startswith("step 2: the loss is")
    assert not (review_task.parent / "run" / "model").exists()
    assert not (review_task.parent / "run" / "results.json").exists()
    # The same command finds the same; another one is to have another folder, or to start again.
    code, _, errors = run_inside("train.py", *ONE_THREAD, *flags, cwd=review_task.parent)
    assert code == 1 and "step 2: the loss is" in errors
    assert "--overwrite" in refused(*flags, "--learning_rate", 0.001, cwd=review_task.parent)
    code, _, errors = run_inside(
        "train.py", *ONE_THREAD, *flags, "--learning_rate", 0.001, "--overwrite", cwd=review_task.parent
    )
    assert code == 0, errors


def test_a_model_that_has_learnt_nothing_is_warned_of(review_task, train):
    printed = train(review_task, "--learning_rate", 0, "--max_steps", 1, output="nothing")
    assert "WARNING: ON VALIDATION THE MODEL" in printed
    seen = [text for text, _ in make_rows(200, 1)]  # rows that are in train too would be warned of
    rows = [row for row in make_rows(60, 2) if row[0] not in seen]
    write_table(review_task.parent / "validation.csv", rows[:50])
    printed = train(review_task, *LEARNING, output="something")
    assert "WARNING" not in printed


MISTAKES = {
    "an unknown flag": (["--learning_rat", "1"], "--learning_rat"),
    "an abbreviated flag": (["--epoch", "1"], "--epoch"),
    "no such task": (["--task", "mrcp"], 'did you mean "mrpc"'),
    "no such task file": (["--task", "nosuch.yaml"], "nosuch.yaml"),
    "no such file": (["--train_file", "trian.csv"], 'did you mean "train.csv"'),
    "eval_every 0": (["--eval_every", "0"], "--eval_every 0"),
    "eval_every a word": (["--eval_every", "often"], "--eval_every often"),
    "fp16 on a CPU": (["--mixed_precision", "fp16"], "fp16 on a CPU"),
    "epochs 0": (["--epochs", "0"], "--epochs 0"),
    "epochs below 0": (["--epochs", "-1"], "--epochs"),
    "batch size 0": (["--batch_size", "0"], "--batch_size"),
    "no number": (["--seed", "x"], "--seed"),
    "warm-up beyond the end": (["--warmup_ratio", "1.5"], "--warmup_ratio"),
    "a limit of nothing": (["--limit", "train=0"], "--limit"),
    "an unknown metric": (["--metrics", "acuracy"], "accuracy"),
    "a metric of regression": (["--metrics", "pearson"], "pearson"),
    "no such text column": (["--text_columns", "txt"], 'did you mean "text"'),
    "no such label column": (["--label_column", "lable"], 'did you mean "label"'),
    "an unknown tracker": (["--trackers", "tensorbored"], "tensorbored"),
    "no such model": (["--model", "nosuch/folder/here"], "nosuch/folder/here"),
    "epochs nan": (["--epochs", "nan"], "--epochs"),
    "epochs inf": (["--epochs", "inf"], "--epochs"),
    "learning rate below 0": (["--learning_rate", "-0.001"], "--learning_rate"),
    "learning rate nan": (["--learning_rate", "nan"], "--learning_rate"),
    "betas beyond 1": (["--adam_betas", "0.9", "1.5"], "--adam_betas"),
    "epsilon below 0": (["--adam_epsilon", "-1"], "--adam_epsilon"),
    "workers below 0": (["--num_workers", "-1"], "--num_workers"),
    "seed below 0": (["--seed", "-1"], "--seed"),
    "max_length below 0": (["--max_length", "-5"], "--max_length"),
    "warm-up below 0": (["--warmup_steps", "-1"], "--warmup_steps"),
    "weight decay below 0": (["--weight_decay", "-1"], "--weight_decay"),
    "clipping below 0": (["--max_grad_norm", "-1"], "--max_grad_norm"),
    "max_length 0": (["--max_length", "0"], "--max_length"),
    "max_length 1": (["--max_length", "1"], "max_length 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_two_lines_and_writes_nothing(review_task, refused, mistake):
    flags, words = MISTAKES[mistake]
    errors = refused("--task", review_task, "--max_steps", 1, *flags, cwd=review_task.parent)
    assert words in errors


@pytest.mark.parametrize(
    "defaults", [{"batch_size": 0}, {"warmup_ratio": 2}, {"learning_rate": "fast"}, {"learning_rat": 1}]
)
def test_defaults_of_a_task_are_checked_like_flags(review_task, refused, defaults):
    change_task(review_task, defaults=defaults)
    errors = refused("--task", review_task, "--max_steps", 1, cwd=review_task.parent)
    assert next(iter(defaults)) in errors


@pytest.mark.parametrize(
    ("kind", "flag", "message"),
    [
        ("regression", ("--class_weights", "balanced"), "--class_weights and --focal_gamma are for labels"),
        ("regression", ("--focal_gamma", "2"), "--class_weights and --focal_gamma are for labels"),
        ("regression", ("--label_smoothing", "0.1"), "--label_smoothing is for tasks with one class for each text"),
        ("multi-label", ("--label_smoothing", "0.1"), "--label_smoothing is for tasks with one class for each text"),
    ],
)
def test_losses_of_classes_are_refused_for_other_problems(review_task, refused, kind, flag, message):
    if kind == "regression":
        make_regression(review_task)
    else:
        change_task(review_task, problem="multi_label", metrics=None)
    assert message in refused("--task", review_task, *flag, cwd=review_task.parent)


def test_a_tracker_that_is_not_installed_is_refused(review_task, refused):
    from accelerate.utils import is_aim_available

    if is_aim_available():
        pytest.skip("aim is installed")
    assert "aim" in refused("--task", review_task, "--max_steps", 1, "--trackers", "aim", cwd=review_task.parent)


def test_tensorboard_gets_what_the_metrics_file_gets(review_task, train):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(review_task, "--trackers", "tensorboard", "--max_steps", 4, "--log_every", 1, output="run")
    folder = review_task.parent / "run"
    assert {name for name in files_under(folder) if not name.startswith("tensorboard/")} == RUN_FILES
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    seen = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert seen == [(line["step"], pytest.approx(line["loss"], rel=1e-6)) for line in lines_of(folder)]
    (score,) = events.Scalars("validation/accuracy")
    assert (score.step, score.value) == (4, pytest.approx(lines_of(folder, "eval")[0]["scores"]["accuracy"]))


@pytest.mark.slow
def test_a_mistake_under_accelerate_launch_is_said_plainly_and_all_cores_are_used(review_task):
    before = files_under(review_task.parent)
    done = run_script(
        "train.py", "--task", review_task, "--freeze", "nonsense", cwd=review_task.parent, launcher=ACCELERATE
    )
    ours, _, launchers = done.stderr.partition("Traceback")
    first, second = ours.splitlines()[-2:]
    assert done.returncode == 1  # the launcher's
    assert first == "train.py: error: --freeze nonsense: no such part of this model"
    assert second.startswith("train.py: Parts: ")
    assert "train.py" in launchers and "Traceback" not in launchers
    assert files_under(review_task.parent) == before
    # This launcher sets OMP_NUM_THREADS=1.
    cores = processes.available_cores()
    assert f"cpu, 1 process, precision no (--mixed_precision), {cores} thread" in done.stdout


@pytest.mark.slow
def test_the_threads_that_were_chosen_are_those_in_use(review_task, train):
    torch.set_num_threads(2)
    train(review_task, "--max_steps", 1, output="one")
    assert read_results(review_task.parent / "one")["hardware"]["threads"] == 1
    train(review_task, "--max_steps", 1, "--threads", 3, output="three")
    assert read_results(review_task.parent / "three")["hardware"]["threads"] == 3


def test_a_mistake_under_torchrun_is_said_once(review_task):
    before = files_under(review_task.parent)
    done = run_script("train.py", "--task", review_task, "--eval_every", 0, cwd=review_task.parent, launcher=TORCHRUN_2)
    assert done.returncode == 1
    assert done.stderr.count("--eval_every 0: neither epoch nor a number") == 1, done.stderr
    assert files_under(review_task.parent) == before


@pytest.mark.slow
def test_two_processes_that_accelerate_would_run_as_one_are_refused(review_task):
    before = files_under(review_task.parent)
    launcher = (*ACCELERATE, "--cpu", "--num_processes", "2")
    done = run_script("train.py", "--task", review_task, cwd=review_task.parent, launcher=launcher)
    assert done.returncode == 1
    assert "asked for several processes, but started one" in done.stderr and "multi_cpu.yaml" in done.stderr
    assert done.stderr.count("Traceback") == 1  # the launcher's
    assert files_under(review_task.parent) == before


# ------------------------------------------------------------------------------------------------- facts of the data


@pytest.mark.parametrize("is_packed", [True, False])
def test_facts_of_the_data_are_told_and_kept(review_task, vocabulary, train, monkeypatch, is_packed):
    monkeypatch.setattr("classifier.model.packing.matches_padded", lambda *given: is_packed)
    rows = make_rows(60, 1)
    rows[7] = (rows[3][0], {"positive": "negative", "negative": "positive"}[rows[3][1]])
    write_table(review_task.parent / "train.csv", rows)
    seen = {text for text, _ in rows}
    fresh = [row for row in make_rows(60, 2) if row[0] not in seen][:18]
    write_table(review_task.parent / "validation.csv", [*fresh, rows[5], rows[3]])
    change_task(review_task, files={"train": "train.csv", "validation": "validation.csv"})
    printed = train(review_task, "--max_steps", 4, "--max_length", 14, "--micro_batch_size", 5, output="run")
    data = read_results(review_task.parent / "run")["data"]

    lengths = [len(ids) for ids in BertTokenizer(str(vocabulary))([text for text, _ in rows])["input_ids"]]
    counts = Counter(label for _, label in rows)
    found = data["splits"]["train"]
    assert (found["rows"], found["labels"]) == (60, {name: counts[name] for name in ("negative", "positive")})
    tokens = {"median": np.median(lengths), "p95": np.percentile(lengths, 95), "longest": max(lengths)}
    assert found["tokens"] == pytest.approx(tokens)
    assert 0 < found["truncated"] < 1 and found["truncated"] == np.mean(np.array(lengths) > 14)
    assert found["unknown"] == 0 and found["conflicts"]["texts"] == 1
    assert found["tokens_per_character"] == pytest.approx((sum(lengths) - 120) / sum(len(text) for text, _ in rows))
    assert data["duplicates"]["validation"] == {"rows": 2, "share": 0.1, "position": 18}
    # The plan's first epoch is what these 4 steps are: what was trained on is what was foretold.
    cut = [sorted(np.minimum(lengths, 14)[batch], reverse=True) for batch in batching.make_plan(60, 16, 42, 4)]
    parts = [batch[start : start + 5] for batch in cut for start in range(0, len(batch), 5)]
    padding = 0 if is_packed else 1 - np.minimum(lengths, 14).sum() / sum(len(part) * part[0] for part in parts)
    assert data["padding"] == pytest.approx(padding, abs=1e-12) and (padding > 0.01 or is_packed)
    assert read_results(review_task.parent / "run")["padding_fraction"] == pytest.approx(padding, abs=1e-12)

    def percent(label):
        return f"{label} {counts[label]} ({counts[label] / 60:.1%})"

    assert f"train: 60 rows | labels: {percent('negative')}, {percent('positive')} | tokens: median " in printed
    assert f"longest {max(lengths)}; {found['truncated']:.1%} of texts truncated, 0.00% of tokens unknown" in printed
    assert (f"padding: {padding:.1%} of what a step computes" in printed) != is_packed
    assert f"WARNING: train: 1 texts occur with different labels, such as {rows[3][0][:80]!r}" in printed
    assert "WARNING: 2 of 20 rows of validation (10.0%) are in train too" in printed
    assert f"such as {rows[5][0][:80]!r}" in printed
    assert "THE TOKENIZER DOES NOT KNOW" not in printed and "fewer than" not in printed


def test_a_tokenizer_of_another_language_is_warned_of(review_task, train):
    for name in ("train", "validation"):
        rows = [(f"这家酒店很好{number}", ("negative", "positive")[number % 2]) for number in range(40)]
        write_table(review_task.parent / f"{name}.csv", rows)
    printed = train(review_task, "--max_steps", 1, output="run")
    unknown = read_results(review_task.parent / "run")["data"]["splits"]["train"]["unknown"]
    assert unknown > 0.9
    assert f"THE TOKENIZER DOES NOT KNOW THIS LANGUAGE: {unknown:.0%} OF THE TOKENS ARE UNKNOWN" in printed
    assert "--model google-bert/bert-base-chinese" in printed


def test_variants_of_a_label_and_rare_classes_are_warned_of(reviews, review_task, train):
    rows = [*make_rows(60, 1), ("the room was good .", "Positive"), ("the film was fine .", "Positive")]
    write_table(reviews / "train.csv", rows)
    change_task(review_task, labels=None, metrics=None, files={"train": "train.csv", "validation": "validation.csv"})
    printed = train(review_task, "--max_steps", 1, output="run")
    assert "labels that differ only in case or whitespace: 'Positive' and 'positive'; each is its own class" in printed
    assert "classes with fewer than 16 rows in train: Positive (2)" in printed


@pytest.mark.slow
def test_hundreds_of_classes_with_odd_names_break_no_line(tmp_path, tiny_bert, run_inside):
    names = ["a line\nbreak", "a pipe|", "tab\t", "x" * 300, "房間 👍", *(f"class {number}" for number in range(295))]
    rows = [(text, names[number % 300]) for number, (text, _) in enumerate(make_rows(900))]
    write_table(tmp_path / "many.csv", rows)
    write_table(tmp_path / "new.csv", [("the room was good .",)], header=("text",))
    flags = ("--mixed_precision", "no", "--threads", 1)
    printed = []
    for script, *arguments in (
        ("train.py", "--train_file", "many.csv", "--model", tiny_bert, "--max_steps", 2, "--output_dir", "run"),
        ("evaluate.py", "--model", "run"),
        ("predict.py", "--model", "run", "--text", "the room was good ."),
        ("predict.py", "--model", "run", "--input", "new.csv", "--output", "out.csv"),
        ("evaluate.py", "--model", "run", "--file", "new.csv", "--text_columns", "none"),
    ):
        code, out, errors = run_inside(script, *arguments, *flags, cwd=tmp_path)
        assert code == (2 if "none" in arguments else 0), errors
        printed.append(out + errors)
    lines = "".join(printed).splitlines()
    assert max(map(len, lines)) < 1000 and not any(line.startswith("break") for line in lines)
    assert "and 280 more with fewer examples, in evaluation.json" in printed[1]
    assert len(printed[2].splitlines()) == 10 + 2 and "and 290 more: --top_k 300" in printed[2]
    card = (tmp_path / "run/model/README.md").read_text(encoding="utf-8")
    body = card.split("---\n", 2)[2]
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 and {line.replace("\\|", "").count("|") for line in table} == {7}
    assert max(map(len, body.splitlines())) < 1000 and "line\\\\nbreak" in body and " and 290 more" in body
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file).fieldnames)[3:] == [f"probability_{name}" for name in sorted(names)]


def test_a_warm_up_longer_than_the_run_is_a_warning(review_task, train):
    words = "WARNING: the warm-up of 6 steps is longer than the run of 5"
    assert words in train(review_task, "--warmup_steps", 6, "--max_steps", 5, output="longer")
    rates = values_of(review_task.parent / "longer", "learning_rate")
    assert read_state(review_task.parent / "longer")["status"] == "done" and rates[-1] < 0.003
    assert "the warm-up" not in train(review_task, "--warmup_steps", 5, "--max_steps", 5, output="as long")


# ------------------------------------------------------------------------------ rows of train, bad rows, several splits


def test_rows_of_train_are_scored_at_each_evaluation(review_task, train):
    flags = ["--eval_train_rows", 40, "--eval_every", 10, "--log_every", 1]
    printed = train(review_task, *flags, *LEARNING, output="run")
    lines = lines_of(review_task.parent / "run", "eval")
    assert [(line["step"], line["split"]) for line in lines] == [
        (step, split) for step in (10, 20, 26) for split in ("validation", "train")
    ]
    results = read_results(review_task.parent / "run")
    best = {line["split"]: line for line in lines if line["step"] == results["best_step"]}
    assert results["scores"] == {split: line["scores"] for split, line in best.items()}
    assert printed.count("validation loss") == printed.count("train_sample loss") == 3
    labels = results["data"]["splits"]["train"]["labels"]  # which the sample keeps
    share = round(40 * labels["positive"] / 200) / 40
    assert results["majority_baseline"]["train"]["accuracy"] == pytest.approx(max(share, 1 - share))
    train(review_task, "--eval_every", 10, "--log_every", 1, *LEARNING, output="without")
    assert_same_training_of_validation(review_task.parent / "without", review_task.parent / "run")


def assert_same_training_of_validation(run, other):
    assert values_of(other) == values_of(run)
    of_other, of_run = ([{**line, "seconds": None} for line in lines_of(folder, "eval")] for folder in (other, run))
    assert [line for line in of_other if line["split"] == "validation"] == of_run


def test_scores_of_train_rows_stay_apart_in_tensorboard(review_task, train):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = ["--trackers", "tensorboard", "--max_steps", 4, "--log_every", 1, "--eval_train_rows", 10]
    train(review_task, *flags, output="run")
    events = reader.EventAccumulator(str(review_task.parent / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("train_sample/loss")] == [4]


BAD = {
    "train": [
        ("text,label\n", None),
        ("the room was bad .,negative,extra\n", "3 fields, but the header has 2 columns (text, label)"),
        (",positive\n", 'column "text" is empty'),
        ('"the ""film"" was\nfine .",positive\n', None),
        ("the film was good .,postive\n", "column \"label\" holds 'postive', no label"),
        ("the book was fine .,\n", 'column "label" holds no label'),
    ],
    "validation": [("text,label\n", None), ('"  ",positive\n', "column \"text\" holds '  ', not text")],
}


@pytest.fixture
def bad_rows(review_task):
    """Put bad rows in front of the reviews; return what bad_rows.csv should hold."""
    expected = []
    for name, rows in BAD.items():
        file = review_task.parent / f"{name}.csv"
        good, line = file.read_text().partition("\n")[2], 1
        for text, reason in rows:
            if reason:
                expected.append({"split": name, "file": str(file), "row": str(line), "reason": reason})
            line += text.count("\n")
        file.write_text("".join(text for text, _ in rows) + good)
    return expected


def read_bad_rows(file):
    with open(file, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_bad_rows_end_the_run_unless_they_are_to_be_skipped(review_task, bad_rows, train, refused, run_inside):
    folder = review_task.parent
    assert "train.csv, line 2: 3 fields, but the header has 2 columns" in refused("--task", review_task, cwd=folder)
    flags = ["--on_bad_row", "skip", "--max_steps", 3]
    for _ in range(2):  # the second time from the cache
        printed = train(review_task, *flags, "--overwrite", output="run")
        assert read_bad_rows(folder / "run" / "bad_rows.csv") == bad_rows
        assert "WARNING: train: 4 bad rows left out, listed in bad_rows.csv; the first: 3 fields" in printed
        assert "WARNING: validation: 1 bad rows left out" in printed
    assert files_under(folder / "run") == RUN_FILES | {"bad_rows.csv"}
    assert read_results(folder / "run")["data"]["splits"]["train"]["rows"] == 201

    code, printed, errors = run_inside("evaluate.py", "--model", "run", *ONE_THREAD, cwd=folder)
    assert code == 0, errors
    assert "scored 50 of 51 examples" in printed and "errors.csv, bad_rows.csv" in printed
    output = folder / "run" / "evaluation-validation"
    assert read_bad_rows(output / "bad_rows.csv") == [row for row in bad_rows if row["split"] == "validation"]
    evaluation = json.loads((output / "evaluation.json").read_text())
    assert (evaluation["examples"], evaluation["bad_rows"]) == (50, 1)
    assert evaluation["scores"] == read_results(folder / "run")["scores"]["validation"]
    code, printed, errors = run_inside("evaluate.py", "--model", "run", "--split", "test", *ONE_THREAD, cwd=folder)
    assert code == 0 and ", 50 examples (majority" in printed, errors
    assert not (folder / "run" / "evaluation-test" / "bad_rows.csv").exists()


def test_a_run_without_bad_rows_says_nothing_of_them(review_task, train):
    printed = train(review_task, "--on_bad_row", "skip", "--max_steps", 1, output="run")
    assert "bad" not in printed.replace("bad_rows.csv", "bad").split("WARNING")[0]
    assert not (review_task.parent / "run" / "bad_rows.csv").exists()


def test_the_first_validation_split_chooses_and_all_are_scored(review_task, train, monkeypatch):
    """As MNLI has them, on the Hub. The names of files' splits are fixed, so they are renamed as they are read."""
    import common
    from classifier.data import splits

    def load(task, refresh=False):
        task, splits, fingerprints, bad_rows = load_splits(task, refresh)
        names = {"train": "train", "validation_matched": "validation", "validation_mismatched": "test"}
        splits, fingerprints = (
            {name: values[theirs] for name, theirs in names.items()} for values in (splits, fingerprints)
        )
        return task, splits, fingerprints, bad_rows

    load_splits = splits.load_splits
    monkeypatch.setattr(common, "load_splits", load)
    printed = train(review_task, "--eval_every", 10, *LEARNING, output="run")
    lines = lines_of(review_task.parent / "run", "eval")
    both = ["validation_matched", "validation_mismatched"]
    assert [(line["step"], line["split"]) for line in lines] == [(step, name) for step in (10, 20, 26) for name in both]
    results = read_results(review_task.parent / "run")
    assert list(results["scores"]) == list(results["majority_baseline"]) == both
    scores = {line["step"]: line["scores"]["accuracy"] for line in lines if line["split"] == both[0]}
    assert results["best_step"] == max(scores, key=scores.get)
    assert all(f"{name}, {results['examples'][name]} examples: accuracy" in printed for name in both)
    assert results["choice"] == {both[0]: "the best of 3 evaluations"}
    card = (review_task.parent / "run" / "model" / "README.md").read_text()
    assert all(f"| {name}, {results['examples'][name]} examples | accuracy | " in card for name in both)


# ---------------------------------------------------------------------------------------------------------- dry runs


def without_torchs_own(folder):
    """The names in a temporary folder that are not of torch's or its launcher's making."""
    return [path.name for path in folder.iterdir() if not path.name.startswith(("torchinductor", "torchelastic"))]


def dry_run(task, processes, expected, *flags):
    """Start so many processes, forked and not launched, for speed; return [(exit code, output, errors)] of them.

    Their exit codes must be `expected`, and their temporary folder empty at the end.
    """
    start_all = start_2 if processes == 2 else lambda *arguments, **options: [start(*arguments, **options)]
    with tempfile.TemporaryDirectory() as scratch:
        change = f"import tempfile\ntempfile.tempdir = {scratch!r}\n"
        outputs = [ended(one) for one in start_all(task.parent, "--task", task, *ONE_THREAD, *flags, change=change)]
        assert [code for code, *_ in outputs] == [expected] * processes, outputs
        assert without_torchs_own(Path(scratch)) == []
    for file in task.parent.glob("output of *"):  # what the processes print
        file.unlink()
    return outputs


@pytest.mark.parametrize("processes", [1, 2])
def test_a_dry_run_tells_what_the_run_takes_and_leaves_nothing(review_task, processes):
    before = contents_of(review_task.parent)
    flags = ["--dry_run", "--epochs", 100, "--eval_every", 5, "--micro_batch_size", 3, "--eval_train_rows", 100]
    outputs = dry_run(review_task, processes, 0, *flags, "--trackers", "tensorboard")
    assert contents_of(review_task.parent) == before
    printed = outputs[0][1]
    table = dict(line.split(maxsplit=1) for line in printed.splitlines()[-5:])
    assert list(table) == ["steps", "batch", "memory", "time", "files"]
    assert table["steps"] == "1300 of 16, 13 an epoch; 260 evaluations"
    assert table["batch"] == f"16 = {processes} process(es) x {16 // processes}, 3 at a time"
    assert 0.1 < float(table["memory"].split()[0]) < 16 and "GiB" in table["memory"]
    hours, minutes, seconds = (int(part) for part in table["time"].split()[0].split(":"))
    assert 0 < hours * 3600 + minutes * 60 + seconds < 3600
    assert table["files"].startswith("runs/reviews,epochs=100.0,eval_every=5/: model/ 0 MB")
    assert printed.count("validation loss") == 1 and "train: 200 rows | " in printed


@pytest.mark.slow
def test_a_dry_run_foretells_the_time(review_task, train):
    """Roughly: on a machine that others use, too."""
    flags = ["--epochs", 40, "--eval_every", 100]
    printed = train(review_task, *flags, "--dry_run")
    time = next(line for line in printed.splitlines() if line.startswith("time"))
    hours, minutes, seconds = (int(part) for part in time.split()[1].split(":"))
    train(review_task, *flags, output="run")
    taken = read_results(review_task.parent / "run")["train_seconds"]
    assert taken / 4 - 2 < hours * 3600 + minutes * 60 + seconds < 4 * taken + 4


@pytest.mark.parametrize("metrics", ["f1", "pearson"])
def test_a_score_without_a_value_does_not_break_a_dry_run(review_task, train, metrics):
    if metrics == "pearson":
        make_regression(review_task)
    else:
        for name in ("train", "validation"):  # hardly a positive one: none in the one batch that is scored
            rows = [*make_rows(60, 1, ("negative",)), ("the room was good .", "positive")]
            write_table(review_task.parent / f"{name}.csv", rows)
    before = contents_of(review_task.parent)
    flags = ["--metrics", metrics, "--eval_batch_size", 1, "--learning_rate", 0.001]
    with pytest.warns(UserWarning, match=f"{metrics} is undefined"):
        printed = train(review_task, *flags, "--dry_run")
    assert f"{metrics} undefined" in printed and "\ntime " in printed
    assert contents_of(review_task.parent) == before


def test_a_dry_run_finds_mistakes_and_leaves_nothing_then(review_task, refused, run_inside, monkeypatch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    for flags in (["--trackers", "tensorbored"], ["--freeze", "nonsense"], ["--final_test", "--metrics", "pearson"]):
        refused("--task", review_task, "--dry_run", *flags, cwd=review_task.parent)
    flags = ["--task", review_task, "--learning_rate", 1e30, "--dry_run"]
    before = contents_of(review_task.parent)
    code, _, errors = run_inside("train.py", *ONE_THREAD, *flags, cwd=review_task.parent)
    assert code == 1 and "step 2: the loss is" in errors
    assert contents_of(review_task.parent) == before and list(scratch.iterdir()) == []


@pytest.mark.slow
def test_two_processes_leave_nothing_of_a_dry_run_that_failed(review_task):
    before = contents_of(review_task.parent)
    outputs = dry_run(review_task, 2, 1, "--dry_run", "--learning_rate", "1e30")
    assert all("step 2: the loss is" in errors for _, _, errors in outputs)
    assert contents_of(review_task.parent) == before


def test_a_dry_run_beside_a_finished_run_touches_nothing(finished, run_inside):
    folder, _ = finished
    before = contents_of(folder)
    code, printed, errors = run_inside("train.py", *TYPED, *ONE_THREAD, "--dry_run", cwd=folder)
    assert (code, errors) == (0, "") and "already complete" not in printed and "\nsteps   26 of 16" in printed
    assert contents_of(folder) == before


# ------------------------------------------------------------------------------------------- small data, and a refit


def test_a_file_of_ones_own_is_trained_on_by_the_recipe_of_small_data(reviews, tiny_bert, run_inside):
    flags = ["--train_file", "train.csv", "--model", tiny_bert, "--limit", "train=20", "--threads", 1]
    code, printed, errors = run_inside("train.py", *flags, "--mixed_precision", "no", cwd=reviews)
    assert code == 0, errors
    # Two steps of 16 are an epoch of 20 rows.
    words = "epochs 40, batch size 16, warmup ratio 0.1, learning rate 0.0001"
    assert f"recipe: small data, 20 rows: {words} (--recipe plain: as in most tutorials)" in printed
    (run,) = (reviews / "runs").iterdir()
    results = read_results(run)
    assert (results["epochs"], results["steps"]) == (40, 80)
    assert results["settings"]["recipe"] == f"small data: {words}"
    assert "Recipe: that of small data, epochs 40, batch_size 16" in (run / "model" / "README.md").read_text()
    rates = [line["learning_rate"] for line in lines_of(run)]
    assert max(rates) == pytest.approx(1e-4, rel=0.05) and rates[-1] < 1e-5  # warmed up by step 8, linear to 0
    code, printed, errors = run_inside("train.py", *flags, "--mixed_precision", "no", cwd=reviews)
    assert code == 0 and "complete" in printed + errors  # the same command finds its run


def test_a_refit_trains_on_validation_too_and_keeps_what_was_fitted_before(review_task, reviews, run_inside):
    fp32 = ("--threads", 1, "--mixed_precision", "no")
    flags = ["--task", review_task, *fp32]
    code, _, errors = run_inside("train.py", *flags, "--output_dir", "run", cwd=reviews)
    assert code == 0, errors
    code, _, errors = run_inside("train.py", *flags, "--output_dir", "again", "--refit", "run", cwd=reviews)
    assert code == 0, errors
    before, after = (read_results(reviews / name) for name in ("run", "again"))
    assert (before["train_examples"], after["train_examples"]) == (2 * 200, 2 * 250)
    assert list(after["scores"]) == ["train"] and after["examples"] == {"train": 250}
    assert after["best_step"] == after["steps"]  # nothing chooses
    tasks = [json.loads((reviews / name / "model" / "task.json").read_text()) for name in ("run", "again")]
    for name in ("temperature", "min_probabilities"):
        assert tasks[0][name] == tasks[1][name] is not None
    code, printed, errors = run_inside("evaluate.py", "--model", "again", *fp32, cwd=reviews)
    assert code == 0 and "the model was trained on validation" in printed + errors
    code, printed, errors = run_inside("evaluate.py", "--model", "run", *fp32, cwd=reviews)
    assert code == 0 and "was trained on" not in printed + errors
    code, _, errors = run_inside("train.py", *flags, "--refit", "nowhere", "--output_dir", "no", cwd=reviews)
    assert code == 2 and "--refit nowhere: is no finished run" in errors and not (reviews / "no").exists()
