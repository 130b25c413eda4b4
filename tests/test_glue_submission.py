"""The files that the leaderboard takes, checked by a validator that shares nothing with examples/glue_submission.py."""

import json
import math
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN_2, make_rows, run_script
from data_help import COMMIT
from model_help import save_model
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoTokenizer

from classifier.data.tasks import Task, read_task, save_task
from classifier.messages import BadInput

sys.path.insert(0, str(ROOT / "examples"))
import glue_submission

BINARY, NLI, ENTAILS = {"0", "1"}, {"entailment", "neutral", "contradiction"}, {"entailment", "not_entailment"}
PUBLISHED = {  # as https://gluebenchmark.com has them: the file, of which part and split, its rows, its predictions
    "CoLA.tsv": ("cola", "test", 1063, BINARY),
    "SST-2.tsv": ("sst2", "test", 1821, BINARY),
    "MRPC.tsv": ("mrpc", "test", 1725, BINARY),
    "STS-B.tsv": ("stsb", "test", 1379, None),
    "MNLI-m.tsv": ("mnli", "test_matched", 9796, NLI),
    "MNLI-mm.tsv": ("mnli", "test_mismatched", 9847, NLI),
    "QNLI.tsv": ("qnli", "test", 5463, ENTAILS),
    "RTE.tsv": ("rte", "test", 3000, ENTAILS),
    "WNLI.tsv": ("wnli", "test", 146, BINARY),
    "QQP.tsv": ("qqp", "test", 390_965, BINARY),
    "AX.tsv": ("ax", "test", 1104, NLI),
}
HUB = {  # the columns and the label names of nyu-mll/glue, in id order
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "stsb": (["sentence1", "sentence2"], None),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "ax": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
}
ROWS = {file: 20 + number for number, file in enumerate(PUBLISHED)}  # of the stand-ins
TRAINED = [name for name in HUB if name != "ax"]


def validated(archive, rows):
    """Read a submission as the leaderboard does and return {file: predictions}; rows: how many each file has."""
    with zipfile.ZipFile(archive) as files:
        assert files.testzip() is None
        assert sorted(files.namelist()) == sorted(PUBLISHED)
        content = {file: files.read(file).decode("ascii") for file in PUBLISHED}
    predictions = {}
    for file, text in content.items():
        lines = re.findall(r"(.*)\n", text)
        assert "".join(f"{line}\n" for line in lines) == text and "\r" not in text
        assert lines[0] == "index\tprediction"
        indices, words = zip(*(line.split("\t") for line in lines[1:]), strict=True)
        assert list(map(int, indices)) == list(range(rows[file]))
        allowed = PUBLISHED[file][3]
        if allowed:
            assert set(words) <= allowed
        else:
            assert all(0 <= float(word) <= 5 for word in words)
        predictions[file] = words
    return predictions


def hub_split(name, split, number, labels):
    columns, names = HUB[name]
    texts = [[text for text, _ in make_rows(number, hash_of(name, split, column))] for column in columns]
    indices = list(reversed(range(number))) if name == "rte" else list(range(number))  # who says that it is in order?
    feature = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
    features = {**dict.fromkeys(columns, datasets.Value("string")), "label": feature, "idx": datasets.Value("int32")}
    values = {**dict(zip(columns, texts, strict=True)), "label": labels, "idx": indices}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def hash_of(*words):
    return sum(map(ord, "".join(words)))


@pytest.fixture(scope="module")
def parts():
    """nyu-mll/glue in small: {part: {split: rows}}. The test labels of MRPC are there, those of all others are not."""
    made = {name: {} for name in HUB}
    for file, (name, split, _, _) in PUBLISHED.items():
        labels = [number % 2 for number in range(ROWS[file])] if name == "mrpc" else [-1] * ROWS[file]
        made[name][split] = hub_split(name, split, ROWS[file], labels)
    for name in TRAINED:  # two thirds of train are of the last class; of STS-B the mean is 3
        names = HUB[name][1]
        labels = [number % len(names) if number % 3 else len(names) - 1 for number in range(30)] if names else [2.0, 4]
        for split in ["train", "validation_matched", "validation_mismatched"] if name == "mnli" else ["train", "valid"]:
            split = "validation" if split == "valid" else split
            made[name][split] = hub_split(name, split, len(labels), labels)
    return made


@pytest.fixture
def small_glue(parts, monkeypatch, empty_cache):
    """The Hub and the leaderboard with few rows."""
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, revision: datasets.DatasetDict(parts[name]))
    facts = huggingface_hub.hf_api.DatasetInfo(id="nyu-mll/glue", sha=COMMIT, private=False, tags=[])
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *words, **keys: facts)
    files = {(name, split): (file, ROWS[file]) for file, (name, split, _, _) in PUBLISHED.items()}
    monkeypatch.setattr(glue_submission, "FILES", files)
    return parts


@pytest.fixture(scope="module")
def models(tiny_bert, tmp_path_factory):
    """(a folder with a run of each task, {task: its model in transformers})."""
    folder = tmp_path_factory.mktemp("runs")
    saved = {}
    for number, name in enumerate(TRAINED):
        labels = HUB[name][1]
        backwards = labels and labels[::-1] if name in ("mnli", "wnli") else None  # a head may have another order
        task = replace(read_task(name), max_length=32)
        saved[name] = save_model(folder / name / "model", tiny_bert, task, labels=backwards, seed=number)
    return folder, saved


@pytest.fixture
def submit(run_inside, tmp_path):
    """A function that runs the script in this process, with the module as patched; returns (exit code, its log)."""
    script = tmp_path / "glue_submission.py"
    script.write_text("import glue_submission\nfrom classifier import processes\nprocesses.run(glue_submission.main)\n")

    def run(*runs, fill=False):
        machine = ["--mixed_precision", "no", "--threads", 1, "--eval_batch_size", 8]
        flags = ["--runs", *runs, *(["--fill_missing"] if fill else [])]
        code, printed, errors = run_inside(script, *machine, *flags, cwd=tmp_path)
        assert printed == ""
        return code, errors

    return run


def logits_of(model, tiny_bert, rows, columns):
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    inputs = tokenizer(
        *(list(rows[column]) for column in columns), padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def in_order(rows, values):
    return [value for _, value in sorted(zip(rows["idx"], values, strict=True))]


# ---------------------------------------------------------------------------------------------------- a submission


def test_a_submission_holds_what_the_models_predict(submit, models, small_glue, tiny_bert, tmp_path):
    folder, saved = models
    code, said = submit(*sorted(folder.iterdir()))
    assert code == 0, said
    found = validated(tmp_path / "glue/submission.zip", ROWS)
    assert {path.name for path in (tmp_path / "glue").iterdir()} == {*PUBLISHED, "submission.zip"}
    for file, words in found.items():
        lines = (tmp_path / "glue" / file).read_text().splitlines()[1:]
        assert [line.split("\t")[1] for line in lines] == list(words)
        name, split, _, allowed = PUBLISHED[file]
        model, rows = saved["mnli" if name == "ax" else name], small_glue[name][split]
        logits = in_order(rows, logits_of(model, tiny_bert, rows, HUB[name][0]).tolist())
        if allowed is None:
            values = [min(max(value, 0), 5) for (value,) in logits]
            np.testing.assert_allclose([float(word) for word in words], values, atol=1e-3)
            assert {0.0, 5.0} < set(map(float, words))
            continue
        names = [model.config.id2label[int(np.argmax(row))] for row in logits]
        expected = [str(HUB[name][1].index(label)) for label in names] if allowed == BINARY else names
        assert list(words) == expected
        assert len(set(words)) > 1
    assert "FILLED" not in said


def test_the_score_of_mrpc_is_said_and_of_no_other(submit, models, small_glue, tmp_path):
    code, said = submit(*sorted(models[0].iterdir()))
    assert code == 0, said
    (line,) = [line for line in said.splitlines() if "test labels" in line]
    words = [int(word) for word in validated(tmp_path / "glue/submission.zip", ROWS)["MRPC.tsv"]]
    labels = small_glue["mrpc"]["test"]["label"]
    scores = {"f1": f1_score(labels, words), "accuracy": accuracy_score(labels, words)}
    assert line.startswith("mrpc: ")
    for name, score in scores.items():
        assert f"{name} {score:.4f}" in line
        low, high = map(float, re.search(rf"95 %.* {name} (\S+) to (\d\.\d+)", line).groups())
        assert low < score < high


def test_missing_tasks_are_filled_with_the_majority_of_train_and_said(submit, models, small_glue, tmp_path):
    code, said = submit(models[0] / "cola", models[0] / "qnli", fill=True)
    assert code == 0, said
    found = validated(tmp_path / "glue/submission.zip", ROWS)
    assert re.findall(r"(\w+): no run: FILLED", said) == [
        "sst2",
        "mrpc",
        "stsb",
        "mnli",
        "ax",
        "rte",
        "wnli",
        "qqp",
    ]
    for file, words in found.items():
        if file in ("CoLA.tsv", "QNLI.tsv"):
            assert len(set(words)) > 1
        elif file == "STS-B.tsv":
            assert set(map(float, words)) == {3.0}
        else:
            name, _, _, allowed = PUBLISHED[file]
            assert set(words) == ({"1"} if allowed == BINARY else {HUB[name][1][-1]})
    assert "test labels" not in said  # the score of a guess is none of this person's


def test_each_model_is_loaded_once(models, small_glue, tmp_path, log_lines):
    from classifier import predictor

    loaded = []

    def load(run):
        loaded.append(Path(run).name)
        return predictor.load(run)

    glue_submission.write_submission(tmp_path / "glue", sorted(models[0].iterdir()), False, load)
    assert sorted(loaded) == sorted(TRAINED)


# ---------------------------------------------------------------------------------------------------- which runs


@pytest.fixture
def runs(tmp_path):
    """A function that makes a run of a task, with a score, that has no weights."""

    def make(name, task, scores=None, folder=None):
        model = (folder or tmp_path / "runs") / name / "model"
        model.mkdir(parents=True)
        save_task(task, {}, model / "task.json")
        if scores:
            (model / "metrics.json").write_text(json.dumps({"scores": scores}))
        return str(model.parent)

    return make


def test_of_several_runs_the_best_on_validation_is_taken(runs, log_lines):
    mrpc, mnli = read_task("mrpc"), read_task("mnli")
    scores = {"1": 0.8, "2": 0.85, "3": None, "4": 0.85}
    made = [runs(f"mrpc,seed={seed}", mrpc, {"validation": {"accuracy": 0, "f1": f1}}) for seed, f1 in scores.items()]
    unknown = runs("copied", mrpc)
    of_mnli = [
        runs("mnli,a", mnli, {"validation_matched": {"accuracy": 0.7}, "validation_mismatched": {"accuracy": 0.9}}),
        runs("mnli,b", mnli, {"validation_matched": {"accuracy": 0.8}, "validation_mismatched": {"accuracy": 0.1}}),
    ]
    chosen = glue_submission.choose_runs([unknown, *made, *of_mnli])
    assert chosen == {"mrpc": made[1], "mnli": of_mnli[1], "ax": of_mnli[1]}
    assert f"{made[0]}: skipped, f1 0.8000 on validation, {made[1]} 0.8500" in log_lines
    assert f"{unknown}: skipped, f1 undefined on validation, {made[1]} 0.8500" in log_lines
    assert len(log_lines) == 5
    assert glue_submission.choose_runs([unknown]) == {"mrpc": unknown}


def test_what_else_lies_among_the_runs_is_skipped_and_said(runs, tmp_path, log_lines):
    good = runs("cola", read_task("cola"))
    others = [
        runs("demo", read_task("demo")),
        runs("ax", read_task("ax")),
        runs("rte", Task(name="rte", text=["a", "b"], labels=["entailment", "not_entailment"])),
        runs("sst2", Task(name="sst2", text=["sentence"], labels=["bad", "good"])),
    ]
    (tmp_path / "runs" / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "notes.txt").write_text("to do")
    others += [str(tmp_path / "runs" / name) for name in ("unfinished", "notes.txt")]
    assert glue_submission.choose_runs([*others, good]) == {"cola": good}
    for run in others:
        assert sum(line.startswith(f"{run}: skipped, ") for line in log_lines) == 1


def test_a_model_folder_is_as_good_as_a_run(runs):
    run = runs("cola", read_task("cola"))
    assert glue_submission.choose_runs([f"{run}/model"]) == {"cola": f"{run}/model"}


# ---------------------------------------------------------------------------------------------------- mistakes


def assert_refused(code, said, *words):
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("glue_submission.py: ")]
    assert len(lines) == 2 and "Traceback" not in said, said
    for word in words:
        assert word in "\n".join(lines)


def test_missing_tasks_are_refused_by_name(submit, models, small_glue, tmp_path):
    code, said = submit(models[0] / "cola", models[0] / "qnli")
    assert_refused(code, said, "sst2, mrpc, stsb, mnli, ax, rte, wnli, qqp", "--fill_missing")
    assert not (tmp_path / "glue").exists()


def test_no_run_at_all_is_refused_even_where_all_would_be_filled(submit, runs, tmp_path):
    assert_refused(*submit(runs("demo", read_task("demo")), fill=True), "none of --runs")
    assert_refused(*submit("no-runs/*", fill=True), "--runs no-runs/*: does not exist")
    code, said = submit("*", fill=True)  # expanded, where the shell has not done so
    assert code == 2 and "skipped, holds no finished model" in str(said)
    assert not (tmp_path / "glue").exists()


def test_a_test_set_of_other_length_is_refused_before_anything_is_predicted(
    submit, models, small_glue, monkeypatch, tmp_path
):
    monkeypatch.setitem(glue_submission.FILES, ("qnli", "test"), ("QNLI.tsv", 5463))
    code, said = submit(models[0] / "cola", fill=True)
    assert_refused(code, said, f"qnli: test: {ROWS['QNLI.tsv']} rows", "5,463")
    assert not (tmp_path / "glue").exists()


def test_logits_that_are_no_numbers_are_refused(models, small_glue, tmp_path, log_lines):
    """As of a model whose products are beyond fp16."""
    task = read_task("cola")
    broken = SimpleNamespace(task=task, dataset_logits=lambda rows: np.full((len(rows), 2), math.nan))
    with pytest.raises(BadInput, match="cola: its logits are not finite"):
        glue_submission.write_submission(tmp_path / "glue", [models[0] / "cola"], True, lambda run: broken)
    assert not (tmp_path / "glue").exists()


def test_a_folder_that_cannot_be_made_is_refused(submit, models, small_glue, tmp_path):
    (tmp_path / "glue").write_text("a file")
    assert_refused(*submit(models[0] / "cola", fill=True), "glue: cannot be written")


@pytest.mark.slow
def test_several_processes_are_refused(models, tmp_path):
    flags = ["--runs", models[0] / "cola", "--threads", 1]
    ended = run_script("examples/glue_submission.py", *flags, cwd=tmp_path, launcher=TORCHRUN_2)
    assert ended.returncode and "one process writes a submission" in ended.stderr


# ---------------------------------------------------------------------------------------------------- the validator


@pytest.fixture(scope="module")
def whole():
    """The tables of a submission of full size: {file: text}."""
    words = {file: sorted(allowed)[0] if allowed else "2.5" for file, (_, _, _, allowed) in PUBLISHED.items()}
    return {
        file: "index\tprediction\n" + "".join(f"{number}\t{words[file]}\n" for number in range(rows))
        for file, (_, _, rows, _) in PUBLISHED.items()
    }


def write_zip(path, tables):
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in tables.items():
            archive.writestr(file, text)
    return path


def test_a_submission_of_full_size_passes_both_validators(whole, tmp_path, log_lines):
    glue_submission.write_tables(tmp_path / "a" / "b", whole)
    found = validated(tmp_path / "a/b/submission.zip", {file: rows for file, (_, _, rows, _) in PUBLISHED.items()})
    assert len(found["QQP.tsv"]) == 390_965
    assert list(glue_submission.find_problems(tmp_path / "a/b/submission.zip")) == []


FLAWS = {
    "no such file": ("WNLI.tsv", None, "WNLI.tsv is missing"),
    "empty": ("WNLI.tsv", lambda text: "", "the first line is ''"),
    "header": ("CoLA.tsv", lambda text: text.replace("index", "id", 1), "the first line is 'id\\tprediction'"),
    "no header": ("CoLA.tsv", lambda text: text.partition("\n")[2], "the first line"),
    "one too few": ("RTE.tsv", lambda text: text.rpartition("2999")[0], "not 3000"),
    "one too many": ("RTE.tsv", lambda text: text + "3000\tentailment\n", "not 3000"),
    "from 1 on": ("WNLI.tsv", lambda text: text.replace("\n0\t", "\n1\t"), "WNLI.tsv, line 2"),
    "a name": ("MRPC.tsv", lambda text: text.replace("7\t0", "7\tequivalent", 1), "MRPC.tsv, line 9"),
    "a number": ("QNLI.tsv", lambda text: text.replace("0\tentailment", "0\t0", 1), "QNLI.tsv, line 2"),
    "a label of another task": ("RTE.tsv", lambda text: text.replace("entailment", "neutral", 1), "RTE.tsv, line 2"),
    "beyond 5": ("STS-B.tsv", lambda text: text.replace("2.5", "5.001", 1), "STS-B.tsv, line 2"),
    "no value": ("STS-B.tsv", lambda text: text.replace("2.5", "nan", 1), "STS-B.tsv, line 2"),
    "a word": ("STS-B.tsv", lambda text: text.replace("2.5", "much", 1), "STS-B.tsv, line 2"),
    "three fields": ("CoLA.tsv", lambda text: text.replace("\t0\n", "\t0\t0\n", 1), "CoLA.tsv, line 2"),
    "Windows": ("CoLA.tsv", lambda text: text.replace("\n", "\r\n"), "the first line"),
    "another file": ("README.md", lambda text: "hello", "unexpected: README.md"),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found(whole, tmp_path, flaw, monkeypatch):
    small = {key: value for key, value in glue_submission.FILES.items() if value[0] != "QQP.tsv"}
    monkeypatch.setattr(glue_submission, "FILES", small)  # for speed
    file, change, words = FLAWS[flaw]
    tables = {name: text for name, text in whole.items() if name != "QQP.tsv"}
    assert list(glue_submission.find_problems(write_zip(tmp_path / "good.zip", tables))) == []
    tables[file] = change(tables.get(file, "")) if change else None
    bad = {name: text for name, text in tables.items() if text is not None}
    found = list(glue_submission.find_problems(write_zip(tmp_path / "bad.zip", bad)))
    assert any(words in problem for problem in found), found
    with pytest.raises(BadInput, match="would refuse"):
        glue_submission.write_tables(tmp_path / "glue", bad)
    assert not (tmp_path / "glue").exists()


def test_a_submission_that_fails_leaves_the_older_one_alone(whole, tmp_path, log_lines, monkeypatch):
    monkeypatch.setattr(glue_submission, "FILES", {("wnli", "test"): ("WNLI.tsv", 146)})
    glue_submission.write_tables(tmp_path, {"WNLI.tsv": whole["WNLI.tsv"]})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(BadInput):
        glue_submission.write_tables(tmp_path, {"WNLI.tsv": "index\tprediction\n"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_zip_is_never_beside_tables_of_another_submission(whole, tmp_path, log_lines, monkeypatch):
    monkeypatch.setattr(glue_submission, "FILES", {("wnli", "test"): ("WNLI.tsv", 146)})
    glue_submission.write_tables(tmp_path, {"WNLI.tsv": whole["WNLI.tsv"]})

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(glue_submission, "write_text", fail)
    with pytest.raises(BadInput, match="No space left"):
        glue_submission.write_tables(tmp_path, {"WNLI.tsv": whole["WNLI.tsv"].replace("\t0", "\t1")})
    assert [path.name for path in tmp_path.iterdir()] == ["WNLI.tsv"]


# ---------------------------------------------------------------------------------------------------- real data


def test_the_test_sets_of_the_hub_are_those_of_the_leaderboard(real_data, tmp_path):
    """MRPC, CoLA and STS-B: rows, index, and labels for MRPC alone."""
    program = """
import logging, sys
sys.path.insert(0, "examples")
from classifier.data.cache import column_array
from classifier.data.splits import read_column
from classifier.processes import log_to
import glue_submission
log_to(sys.stderr)
for name in ("mrpc", "cola", "stsb"):
    task, splits = glue_submission.read_data(name, False)
    rows = splits["test"]
    print(name, read_column(task, "test", rows, "idx") == [str(row) for row in range(len(rows))])
    glue_submission.log_score(name, task, [1] * len(rows), column_array(rows, "label"))
"""
    hub = [sys.executable, str(real_data / "tools/loopback_hub.py"), "--root", str(real_data / "hub"), "--"]
    done = subprocess.run([*hub, sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["mrpc True", "cola True", "stsb True"]
    # 1,147 of the 1,725 pairs are paraphrases: a fact of the data.
    accuracy, f1 = 1147 / 1725, 2 * 1147 / (1725 + 1147)
    (line,) = [line for line in done.stderr.splitlines() if "test labels" in line]
    assert f"mrpc: its test labels are public: f1 {f1:.4f}, accuracy {accuracy:.4f} (95 %: " in line
