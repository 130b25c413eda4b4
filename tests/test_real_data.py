"""The whole online path on real data and real weights, through a hub on loopback. Needs REAL_DATA (see README.md)."""

import csv
import gzip
import json
import sys
import zipfile
from collections import Counter

import pytest
import yaml
from conftest import ROOT, TORCHRUN_2, bert_config, lines_of, run_script
from sklearn.metrics import f1_score, matthews_corrcoef

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


def test_a_second_run_asks_the_hub_for_nothing(mrpc, hub):
    """Data, tokens and model come from the cache."""
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
    assert "tokens from the cache" in done.stdout and "tokenised" not in done.stdout
    first = (mrpc / "requests").read_text()
    assert "GET" in first and "model.safetensors" in first and "train-00000-of-00001.parquet" in first
    second = (mrpc / "requests2").read_text().splitlines() if (mrpc / "requests2").exists() else []
    assert second == []


def test_four_processes_download_each_file_once(hub, own_cache, tmp_path):
    """Over a slow hub, with an empty cache: one process downloads, the others wait and read what it left."""
    launch = (*hub, "--latency", "0.3", "--log", str(tmp_path / "requests"), "--", *TORCHRUN_2[:-1], "4")
    limits = ["--limit", "train=64", "--limit", "validation=16"]
    arguments = ["--task", "mrpc", "--model", MINILM, *limits, "--max_steps", 1, "--threads", 1, "--output_dir", "run"]
    done = run_script("train.py", *arguments, cwd=tmp_path, launcher=launch)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/results.json").read_text())["num_processes"] == 4
    requests = (tmp_path / "requests").read_text().splitlines()
    fetched = Counter(line.split()[1] for line in requests if line.startswith("GET") and "/resolve/" in line)
    assert {path.rsplit("/", 1)[1] for path in fetched} >= {"model.safetensors", "tokenizer.json", "config.json"}
    assert sum(path.endswith(".parquet") for path in fetched) == 3
    assert set(fetched.values()) == {1}, fetched


@pytest.mark.parametrize(
    ("task", "metric", "rows"),
    [("cola", "matthews_correlation", 1043), pytest.param("stsb", "pearson", 1500, marks=pytest.mark.full)],
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


# ------------------------------------------------------------------------------------------------ every task of data/


@pytest.fixture(scope="session")
def small(real_data):
    """A function that writes a task of data/ with a small BERT from scratch on a real vocabulary, and local files.

    The stand-in for a model that is not on the loopback hub; everything else is the task as it ships.
    """

    def write(name, folder, vocabulary="bert-base-uncased", **files):
        content = yaml.safe_load((ROOT / f"data/{name}.yaml").read_text(encoding="utf-8"))
        vocabulary = real_data / f"data/vocabs/{vocabulary}-vocab.txt"
        content["model"] = bert_config(vocabulary, max_position_embeddings=512)
        if files:
            content["files"] = {split: str(file) for split, file in files.items()}
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        return file

    return write


def train(task, *arguments, cwd, launcher=(sys.executable,)):
    """Train a task into the folder run; return (standard output, results.json)."""
    options = ["--task", task, "--output_dir", "run", *arguments]
    done = run_script("train.py", *options, cwd=cwd, launcher=launcher, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((cwd / "run/results.json").read_text())


def evaluate(*arguments, cwd):
    done = run_script("evaluate.py", "--model", "run", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


GLUE = {  # the columns and the label names of the Hub's nyu-mll/glue, of the parts that the loopback hub does not have
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "ax": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
}
GLUE_SPLITS = {"mnli": ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]}
GLUE_SPLITS |= {"ax": ["test"]}


@pytest.fixture(scope="session")
def made_hub(real_data, tmp_path_factory):
    """A loopback hub with made rows in the form of GLUE's other parts."""
    from datasets import ClassLabel, Dataset, Features, Value

    root = tmp_path_factory.mktemp("hub")
    (root / "models").mkdir()
    folder = root / "datasets/nyu-mll/glue"
    configs = []
    for name, (columns, labels) in GLUE.items():
        splits = GLUE_SPLITS.get(name, ["train", "validation", "test"])
        (folder / name).mkdir(parents=True)
        for split in splits:
            number = 40 if split == "train" else 10
            rows = {column: [f"{column} {split} {i}" for i in range(number)] for column in columns}
            rows["label"] = [-1 if split.startswith("test") else i % len(labels) for i in range(number)]
            features = Features({**dict.fromkeys(columns, Value("string")), "label": ClassLabel(names=labels)})
            Dataset.from_dict(rows, features).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
        files = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
        configs.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
    return (sys.executable, str(real_data / "tools/loopback_hub.py"), "--root", str(root), "--", sys.executable)


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache for one test: the commit of the other hub's nyu-mll/glue must not be taken for this one's."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnli", "qnli", "qqp", "rte", "wnli", "sst2"])
def test_a_glue_task_in_the_form_of_the_hub(small, made_hub, own_cache, name, tmp_path):
    _, results = train(small(name, tmp_path), "--epochs", 1, cwd=tmp_path, launcher=made_hub)
    validation = [split for split in GLUE_SPLITS.get(name, ["validation"]) if split.startswith("validation")]
    metrics = ["f1", "accuracy"] if name == "qqp" else ["accuracy"]
    assert {split: list(scores) for split, scores in results["scores"].items()} == dict.fromkeys(validation, metrics)
    assert list(results["data"]["splits"]["train"]["labels"]) == GLUE[name][1]
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert list(config["id2label"].values()) == GLUE[name][1]
    evaluate(cwd=tmp_path)
    for split in validation:
        evaluation = json.loads((tmp_path / f"run/evaluation-{split}/evaluation.json").read_text())
        assert evaluation["scores"] == results["scores"][split]


def test_ax_is_there_to_be_predicted(small, made_hub, own_cache, tmp_path):
    train(small("mnli", tmp_path), "--max_steps", 1, cwd=tmp_path, launcher=made_hub)
    options = ["--model", "run", "--task", small("ax", tmp_path), "--split", "test"]
    done = run_script("evaluate.py", *options, cwd=tmp_path, launcher=made_hub)
    assert done.returncode == 2
    assert "10 of 10 examples of the test split have no label" in done.stderr and "predict.py" in done.stderr


def test_imdb_trains_on_the_hubs_split(small, hub, tmp_path):
    limits = [word for split in ("train=64", "validation=32", "test=48") for word in ("--limit", split)]
    task = small("imdb", tmp_path)
    _, results = train(task, *limits, "--max_steps", 3, cwd=tmp_path, launcher=(*hub, "--", sys.executable))
    rows = {split: facts["rows"] for split, facts in results["data"]["splits"].items()}
    assert rows == {"train": 64, "test": 48, "validation": 32}
    assert set(results["scores"]) == {"validation", "test"}
    assert results["data"]["splits"]["train"]["truncated"] > 0  # 14 % of the reviews are longer than 512 tokens


def test_imdb_csv_takes_the_rows_of_the_book(small, real_data, tmp_path):
    file = real_data / "data/movie_data.csv.gz"
    with gzip.open(file, "rt", encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))[1:]
    limits = [word for split in ("train=64", "validation=32", "test=48") for word in ("--limit", split)]
    task = small("imdb_csv", tmp_path, train=file)
    _, results = train(task, *limits, "--max_steps", 4, "--eval_train_rows", 20, cwd=tmp_path)
    assert set(results["scores"]) == {"train", "validation", "test"}
    assert [line["split"] for line in lines_of(tmp_path / "run", "eval")] == ["validation", "train"]
    evaluate("--split", "test", "--threads", 1, cwd=tmp_path)
    with open(tmp_path / "run/evaluation-test/predictions.csv", encoding="utf-8", newline="") as stream:
        scored = [row["review"] for row in csv.DictReader(stream)]
    assert len(scored) == 48 and set(scored) <= {text for text, _ in rows[40_000:]}
    # The limits leave nothing to count: the sizes of the whole splits.
    from classifier.data.splits import load_splits
    from classifier.data.tasks import read_task

    _, splits, _, _ = load_splits(read_task(str(task)))
    assert {name: len(found) for name, found in splits.items()} == {"train": 35_000, "validation": 5000, "test": 10_000}
    for name, first in (("train", 0), ("validation", 35_000), ("test", 40_000)):
        assert splits[name][0]["review"] == rows[first][0]
        assert splits[name][-1]["review"] == rows[first + len(splits[name]) - 1][0]


def test_cola_raw_from_the_archive(small, real_data, tmp_path):
    raw = real_data / "data/cola_public_raw"
    with zipfile.ZipFile(tmp_path / "cola.zip", "w") as archive:
        for name in ("in_domain_train.tsv", "out_of_domain_dev.tsv"):
            archive.write(raw / name, f"cola_public/raw/{name}")
    members = {"train": "in_domain_train.tsv", "test": "out_of_domain_dev.tsv"}
    files = {split: f"{tmp_path}/cola.zip::cola_public/raw/{name}" for split, name in members.items()}
    output, results = train(small("cola_raw", tmp_path, **files), "--max_steps", 30, cwd=tmp_path)
    lines = (raw / "in_domain_train.tsv").read_text(encoding="utf-8").splitlines()
    labels = Counter(line.split("\t")[1] for line in lines)
    facts = results["data"]["splits"]
    assert (facts["train"]["rows"], facts["validation"]["rows"], facts["test"]["rows"]) == (7696, 855, 516)
    assert facts["train"]["labels"]["acceptable"] + facts["validation"]["labels"]["acceptable"] == labels["1"]
    for split in ("train", "validation"):  # stratified: the share of positives in the log is that of the file
        assert f"acceptable {facts[split]['labels']['acceptable']:,} ({labels['1'] / len(lines):.1%})" in output
        assert f"longest {facts[split]['tokens']['longest']}" in output
    evaluate("--split", "test", cwd=tmp_path)
    with open(tmp_path / "run/evaluation-test/predictions.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    expected = [line.split("\t")[3] for line in (raw / "out_of_domain_dev.tsv").read_text("utf-8").splitlines()]
    assert [row["sentence"] for row in rows] == expected
    score = matthews_corrcoef(*([row[name] for row in rows] for name in ("label", "predicted_label")))
    assert results["scores"]["test"]["matthews_correlation"] == pytest.approx(score, abs=1e-12)


def test_cord19_keeps_a_query_on_one_side(small, real_data, tmp_path):
    task = small("cord19", tmp_path, train=real_data / "data/cord19_mini_query_title_label.csv")
    output, results = train(task, "--group_column", "query", cwd=tmp_path)
    assert "the warm-up of 500 steps is longer than the run of" in output
    assert "classes with fewer than 16 rows in train: relevant" in output
    rows = {name: facts["rows"] for name, facts in results["data"]["splits"].items()}
    assert sum(rows.values()) == 165
    evaluate(cwd=tmp_path)
    evaluate("--split", "train", cwd=tmp_path)
    queries = {}
    for split in ("train", "validation"):
        with open(tmp_path / f"run/evaluation-{split}/predictions.csv", encoding="utf-8", newline="") as stream:
            queries[split] = {row["query"] for row in csv.DictReader(stream)}
    assert queries["train"] and queries["validation"] and not queries["train"] & queries["validation"]


def test_food_reviews_are_chinese(small, real_data, tmp_path):
    file = real_data / "data/food_reviews_10k.csv"
    task = small("food_reviews", tmp_path, "bert-base-chinese", train=file)
    output, results = train(task, "--limit", "train=160", "--limit", "validation=100", cwd=tmp_path)
    with open(file, encoding="utf-8-sig", newline="") as stream:
        labels = [row["label"] for row in csv.DictReader(stream)]
    share = labels.count("1") / len(labels)
    # The file is sorted by label: without stratified draws a split would hold one class.
    for facts in results["data"]["splits"].values():
        assert facts["labels"]["POSITIVE"] / facts["rows"] == pytest.approx(share, abs=0.01)
    names = ["accuracy", "precision_weighted", "recall_weighted", "f1_weighted"]
    assert list(results["scores"]["validation"]) == names
    assert "DOES NOT KNOW" not in output
    task = small("food_reviews", tmp_path, "bert-base-uncased", train=file)
    done = run_script("train.py", "--task", task, "--limit", "train=160", "--dry_run", cwd=tmp_path)
    assert "THE TOKENIZER DOES NOT KNOW THIS LANGUAGE" in done.stdout
    assert "google-bert/bert-base-chinese" in done.stdout


def test_the_raw_files_of_mrpc_need_no_yaml(real_data, vocabulary, tiny_bert, tmp_path):
    folder = real_data / "data/mrpc_glue_tsv"
    columns = ["--text_columns", "#1 String,#2 String", "--label_column", "Quality"]
    files = ["--train_file", folder / "train.tsv", "--validation_file", folder / "dev.tsv"]
    options = [*files, *columns, "--model", tiny_bert, "--max_steps", 1, "--output_dir", "run"]
    done = run_script("train.py", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "run/results.json").read_text())["data"]["splits"]
    assert (rows["train"]["rows"], rows["validation"]["rows"]) == (3668, 408)  # as on the Hub
    assert rows["validation"]["labels"] == {"0": 129, "1": 279}
