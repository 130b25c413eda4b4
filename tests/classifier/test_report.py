"""report.py: the table of evaluations, warnings, and the model card: what the model is, what its scores are worth, its
limits, and how to load it."""

import copy
from dataclasses import replace

import pytest
import yaml

from classifier.data.tasks import Task
from classifier.evaluation import report

TASK = Task(
    name="two",
    text=["text"],
    labels=["negative", "positive"],
    metrics=["f1", "accuracy"],
    max_length=64,
    files={"train": "my.csv"},
)


COLLAPSED = "THE MODEL MAKES THE SAME PREDICTION FOR EVERY EXAMPLE"


@pytest.mark.parametrize(
    ("task", "f1", "constant", "message"),
    [
        (TASK, 0.9, None, None),
        (TASK, 0.9, 1, f"{COLLAPSED}: 'positive'"),
        (TASK, 0.9, 0, f"{COLLAPSED}: 'negative'"),
        (replace(TASK, labels="regression"), 0.9, 0.0, f"{COLLAPSED}: 0.0"),
        (replace(TASK, problem="multi_label"), 0.9, [0, 1], COLLAPSED),
        (TASK, 0.7, None, "NO BETTER THAN THE MAJORITY CLASS"),
        (TASK, None, None, "NO BETTER THAN THE MAJORITY CLASS"),
    ],
)
def test_a_model_that_learnt_nothing_is_warned_of(task, f1, constant, message):
    evaluation = {"scores": {"f1": f1, "accuracy": 0.5}, "constant": constant}
    warning = report.collapse_warning(task, "validation", {**evaluation, "majority": {"f1": 0.7, "accuracy": 0.5}})
    if message is None:
        assert warning is None
    else:
        assert message in warning and "--learning_rate" in warning


def evaluation_line(epoch, train_loss, loss, split="validation", f1=0.5):
    numbers = {"epoch": epoch, "step": epoch * 10, "loss": loss, "train_loss": train_loss, "seconds": 60.0 * epoch}
    return {"type": "eval", "split": split, "scores": {"f1": f1}, **numbers}


def test_the_table_of_epochs_has_their_losses_scores_and_times():
    lines = [
        {"type": "train"},
        evaluation_line(1, 0.7, 0.6),
        evaluation_line(2, 0.5, 0.55, f1=None),
        evaluation_line(62, 0.1, 0.5),
    ]
    rows = [line.split() for line in report.epoch_table(lines).splitlines()]
    assert rows == [
        ["epoch", "split", "train", "loss", "loss", "f1", "h:mm:ss"],
        ["1.00", "validation", "0.7000", "0.6000", "0.5000", "0:01:00"],
        ["2.00", "validation", "0.5000", "0.5500", "undefined", "0:01:00"],
        ["62.00", "validation", "0.1000", "0.5000", "0.5000", "1:00:00"],
    ]


def test_a_validation_loss_that_rises_is_pointed_out():
    falls = [evaluation_line(1, 0.7, 0.6), evaluation_line(2, 0.5, 0.5)]
    assert report.overfitting_warning(falls) is None and report.overfitting_warning([]) is None
    hint = report.overfitting_warning([*falls, evaluation_line(3, 0.2, 0.8)])
    assert hint.startswith("validation loss rose from 0.5000 (epoch 2.00) to 0.8000 while the train loss fell")
    # Not where the training itself goes wrong, nor for the other splits that are scored.
    assert report.overfitting_warning([*falls, evaluation_line(3, 0.9, 0.8)]) is None
    assert report.overfitting_warning([*falls, evaluation_line(2, 0.5, 3.0, split="validation_mismatched")]) is None
    assert report.overfitting_warning([evaluation_line(2, 0.5, 0.1, split="train"), *falls]) is None


# ----------------------------------------------------------------------------------------------------- the model card

REVIEWS = Task(
    name="reviews",
    text=["text"],
    labels=["negative", "positive"],
    metrics=["f1", "accuracy"],
    max_length=128,
    dataset={"path": "org/reviews", "name": "small"},
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
    "trained_on": ["train"],
    "settings": {
        "recipe": "plain",
        "epochs": 3.0,
        "batch_size": 32,
        "learning_rate": 5e-05,
        "scheduler": "linear",
        "weight_decay": 0.01,
        "freeze": "none",
        "class_weights": "none",
    },
    "examples": {"validation": 1200},
    "scores": {"validation": {"f1": 0.81234, "accuracy": None}},
    "choice": {"validation": ""},
    "corrected_scores": {"validation": {"f1": 0.81234, "accuracy": None}},
    "corrected_intervals": {"validation": {"f1": [0.7, 0.9], "accuracy": None}},
    "intervals": {"validation": {"f1": [0.7, 0.9], "accuracy": None}},
    "no_interval": {"validation": {"accuracy": "one row"}},
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
    card = report.model_card(REVIEWS, RESULTS)
    assert "org/encoder at commit abc" in card
    assert "| validation, 1,200 examples | f1 | 0.8123 | 0.7000 to 0.9000 |  | undefined |" in card
    assert "| validation, 1,200 examples | accuracy | undefined | none (one row) |  | 0.5000 |" in card
    assert "not with another\nseed" in card and "chose" not in card.partition("## Scores")[2].partition("|---|")[2]
    assert "one of negative, positive" in card and "https://example.org (CC0)" in card
    assert "learning_rate 5e-05" in card and "12,300 examples" in card and "10 steps, fp32." in card


def test_a_corrected_score_comes_first_in_card_log_and_head():
    results = copy.deepcopy(RESULTS) | {
        "choice": {"validation": "the best of 3 evaluations"},
        "corrected_scores": {"validation": {"f1": 0.79, "accuracy": None}},
        "corrected_intervals": {"validation": {"f1": [0.68, 0.89], "accuracy": None}},
        "train_seconds": 9.0,
        "train_examples_per_second": 100.0,
        "best_step": 20,
    }
    results["scores"]["test"] = {"f1": 0.7, "accuracy": 0.6}
    results["examples"]["test"] = 50
    results["intervals"]["test"] = {"f1": [0.6, 0.8], "accuracy": [0.5, 0.7]}
    results["no_interval"]["test"], results["majority_baseline"]["test"] = {}, {"f1": None, "accuracy": 0.5}
    card = report.model_card(REVIEWS, results)
    assert "| validation, 1,200 examples | f1 | 0.7900 | 0.6800 to 0.8900 | 0.8123 | undefined |" in card
    assert "| test, 50 examples | f1 | 0.7000 | 0.6000 to 0.8000 |  | undefined |" in card
    assert "The examples of validation chose the best of 3 evaluations: scores on them are corrected for that." in card
    (index,) = yaml.safe_load(card.split("---\n", 2)[1])["model-index"]
    assert [metric["value"] for each in index["results"] for metric in each["metrics"]] == [0.79, 0.7, 0.6]
    assert report.format_results(results).splitlines()[1:] == [
        "validation, 1,200 examples: f1 0.7900, accuracy undefined, corrected for having chosen the best of 3 "
        "evaluations by these examples",
        "validation, on the examples that chose: f1 0.8123, accuracy undefined (majority: f1 undefined, accuracy "
        "0.5000)",
        "validation, 95 % intervals: f1 0.6800 to 0.8900, accuracy none (one row)",
        "test, 50 examples: f1 0.7000, accuracy 0.6000 (majority: f1 undefined, accuracy 0.5000)",
        "test, 95 % intervals: f1 0.6000 to 0.8000, accuracy 0.5000 to 0.7000",
        "(intervals: of other texts like these, not of other seeds)",
    ]


def test_the_hub_can_read_its_head():
    _, head, _ = report.model_card(REVIEWS, RESULTS).split("---\n", 2)
    head = yaml.safe_load(head)
    (index,) = head.pop("model-index")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "metrics": ["f1", "accuracy"],
        "base_model": "org/encoder",
        "datasets": ["org/reviews"],
    }
    (result,) = index["results"]  # an undefined score is none to show
    assert index["name"] == "reviews" and result["metrics"] == [{"type": "f1", "value": 0.81234}]
    assert result["dataset"] == {"name": "reviews", "type": "org/reviews", "config": "small", "split": "validation"}
    new_model = {**RESULTS, "model": {"model_type": "bert"}, "model_commit": None}
    card = report.model_card(replace(REVIEWS, dataset=None, files={"train": "a.csv"}), new_model)
    assert (
        "base_model" not in card
        and "datasets:" not in card
        and "model-index" not in card
        and "trained from scratch" in card
    )


def test_limits():
    card = report.model_card(REVIEWS, RESULTS)
    assert "negative 4,000, positive 100." in card
    assert "4,100 texts with a median of 53 tokens; 95 % have at most 74." in card and "at most 128 tokens" in card
    assert "2.0% of its training tokens" in card
    known = copy.deepcopy(RESULTS)
    known["data"]["splits"]["train"]["unknown"] = 0.0
    assert "vocabulary" not in report.model_card(REVIEWS, known)


def test_the_lines_that_load_it():
    assert 'pipeline("text-classification", model="THIS_FOLDER")\nprint(classify("..."))' in report.model_card(
        REVIEWS, RESULTS
    )
    pairs = report.model_card(replace(REVIEWS, text=["a", "b"]), RESULTS)
    assert 'classify({"text": "...", "text_pair": "..."})' in pairs and "4,100 pairs" in pairs
    assert 'function_to_apply="none"' in report.model_card(replace(REVIEWS, labels="regression"), RESULTS)
    several = report.model_card(replace(REVIEWS, problem="multi_label", thresholds=[0.25, 0.5]), RESULTS)
    assert "any number of negative, positive" in several and "top_k=None" in several
    assert "negative 0.25, positive 0.50." in several


def test_names_of_many_classes_are_text_of_the_card_and_not_its_marks():
    names = ["a|b", "<b>", "*x* `y` $1$", "under_score _u_", "line\nbreak", *(f"class {n}" for n in range(295))]
    results = copy.deepcopy(RESULTS)
    results["data"]["splits"]["train"]["labels"] = {name: number for number, name in enumerate(names)}
    card = report.model_card(replace(REVIEWS, labels=names), results)
    odd = "a\\|b, \\<b\\>, \\*x\\* \\`y\\` \\$1\\$, under_score \\_u\\_, line\\\\nbreak, class 0"
    assert f"- Output: one of {odd}" in card and "class 4 and 290 more (`config.json` has all)." in card
    assert "Training examples per label: class 294 299, class 293 298," in card
    several = replace(REVIEWS, labels=names, problem="multi_label", thresholds=[0.5] * 300)
    assert "class 4 0.50 and 290 more (`task.json` has all)." in report.model_card(several, results)
