"""card.py: the model card says what the model is, what its scores are worth, what it cannot, and how to load it."""

import copy
from dataclasses import replace

import yaml

from classifier.data.tasks import Task
from classifier.evaluation.report import model_card

TASK = Task(
    name="reviews",
    text=["text"],
    labels=["negative", "positive"],
    metrics=["f1", "accuracy"],
    max_length=128,
    dataset={"path": "org/reviews"},
    source="https://example.org",
    licence="CC0",
)
RESULTS = {
    "model": "org/encoder",
    "model_commit": "abc",
    "train_examples": 12_300,
    "steps": 10,
    "seed": 42,
    "mixed_precision": "no",
    "settings": {
        "epochs": 3.0,
        "batch_size": 32,
        "learning_rate": 5e-05,
        "scheduler": "linear",
        "weight_decay": 0.01,
        "freeze": "none",
        "class_weights": "none",
    },
    "scores": {"validation": {"f1": 0.81234, "accuracy": None}},
    "intervals": {"validation": {"f1": [0.7, 0.9], "accuracy": None}},
    "majority_baseline": {"validation": {"f1": None, "accuracy": 0.5}},
    "data": {
        "splits": {
            "train": {
                "rows": 4100,
                "labels": {"negative": 4000, "positive": 100},
                "tokens": {"median": 53.0, "p95": 74.0, "longest": 103},
                "unknown": 0.02,
            }
        }
    },
}


def test_scores_baselines_data_and_recipe():
    card = model_card(TASK, RESULTS)
    assert "org/encoder at commit abc" in card
    assert "| validation | f1 | 0.8123 | 0.7000 to 0.9000 | undefined |" in card
    assert "| validation | accuracy | undefined | none | 0.5000 |" in card
    assert "one of negative, positive" in card and "https://example.org (CC0)" in card
    assert "learning_rate 5e-05" in card and "12,300 examples" in card and "10 steps, fp32." in card


def test_the_hub_can_read_its_head():
    _, head, _ = model_card(TASK, RESULTS).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "metrics": ["f1", "accuracy"],
        "base_model": "org/encoder",
        "datasets": ["org/reviews"],
    }
    of_new_weights = {**RESULTS, "model": {"model_type": "bert"}, "model_commit": None}
    card = model_card(replace(TASK, dataset=None, files={"train": "a.csv"}), of_new_weights)
    assert "base_model" not in card and "datasets:" not in card and "trained from new weights" in card


def test_limits():
    card = model_card(TASK, RESULTS)
    assert "negative 4,000, positive 100." in card
    assert "4,100 texts of 53 tokens (median), 95 % of them up to 74" in card and "beyond 128 tokens" in card
    assert "2.0% of the tokens" in card
    whole = copy.deepcopy(RESULTS)
    whole["data"]["splits"]["train"]["unknown"] = 0.0
    assert "vocabulary does not hold" not in model_card(TASK, whole)


def test_the_lines_that_load_it():
    assert 'pipeline("text-classification", model="THIS_FOLDER")\nprint(classify("..."))' in model_card(TASK, RESULTS)
    pairs = model_card(replace(TASK, text=["a", "b"]), RESULTS)
    assert 'classify({"text": "...", "text_pair": "..."})' in pairs and "4,100 pairs" in pairs
    assert 'function_to_apply="none"' in model_card(replace(TASK, labels="regression"), RESULTS)
    several = model_card(replace(TASK, problem="multi_label", thresholds=[0.25, 0.5]), RESULTS)
    assert "any number of negative, positive" in several and "top_k=None" in several
    assert "negative 0.25, positive 0.50." in several
