"""The demo: its data are made by a script, a bag of words cannot solve them, and the small BERT does, in a minute."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT, run_script

DEMO = ROOT / "data" / "demo"


def read(split):
    with open(DEMO / f"{split}.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def splits():
    return {split: read(split) for split in ("train", "validation", "test")}


def test_the_script_makes_the_very_files_that_ship(tmp_path):
    shutil.copy(DEMO / "make_demo.py", tmp_path)
    subprocess.run([sys.executable, tmp_path / "make_demo.py"], check=True, timeout=120, capture_output=True)
    for name in ("train.csv", "validation.csv", "test.csv", "vocab.txt"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_there_are_enough_reviews_balanced_and_no_sentence_twice(splits):
    assert len(splits["train"]) >= 5000
    for rows in splits.values():
        counts = Counter(label for _, label in rows)
        assert counts["positive"] == pytest.approx(counts["negative"], rel=0.05)
    plain = [re.sub(r"[^a-z ]", "", text.lower()) for rows in splits.values() for text, _ in rows]
    assert len(set(plain)) == len(plain)


@pytest.mark.parametrize("word", ["although", "even though", "though", "despite"])
def test_a_concession_comes_first_and_last(splits, word):
    """What is seen in one place only is understood there only: "X, even though Y" would be read as "X, but Y"."""
    for label in ("negative", "positive"):
        texts = [text.lower() for text, label_of_text in splits["train"] if label_of_text == label]
        assert sum(text.startswith(f"{word} ") for text in texts) >= 50
        assert sum(f", {word} " in text for text in texts) >= 50


def test_a_bag_of_words_does_not_solve_it(splits):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    classifier = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=1000))
    classifier.fit(*zip(*splits["train"], strict=True))
    assert classifier.score(*zip(*splits["test"], strict=True)) < 0.65


def test_the_demo_reaches_93_percent_of_the_test_split_without_a_network(tmp_path):
    done = run_script("train.py", "--final_test", cwd=tmp_path, timeout=600)  # no arguments: --task demo
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "runs" / "demo" / "results.json").read_text())
    assert results["scores"]["test"]["accuracy"] >= 0.93
    assert results["majority_baseline"]["test"]["accuracy"] <= 0.55
