"""The spread of several runs, against numbers worked out by hand and by scipy."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from classifier.data.tasks import DATA_FOLDER, Task
from classifier.evaluation import spread
from classifier.evaluation.metrics import DIRECTION
from classifier.messages import BadInput

TASK = Task("a", metrics=["accuracy"], labels=["x", "y"])


def run(score, majority=0.5, setting=None):
    results = {
        "scores": {"validation": {"accuracy": score}},
        "majority_baseline": {"validation": {"accuracy": majority}},
    }
    results["train_seconds"] = 10.0
    return SimpleNamespace(results=results, setting=setting, folder=Path(f"seed={score}"))


def test_mean_deviation_and_interval_by_hand():
    summary = spread.summarise(TASK, [run(0.7), run(0.8), run(0.9)])
    scores = summary["scores"]["accuracy"]
    assert (scores["mean"], scores["std"]) == (pytest.approx(0.8), pytest.approx(0.1))
    half = 4.302653 * 0.1 / 3**0.5  # Student's t of two degrees of freedom, from a table
    assert scores["interval"] == [pytest.approx(0.8 - half), 1.0]  # an accuracy ends at 1
    assert spread.describe_statistics("accuracy", scores).startswith(
        "accuracy 0.8000 ± 0.1000 (0.7000 to 0.9000), 95 %"
    )
    assert spread.summarise(TASK, [run(0.7), run(0.8)], with_interval=False)["scores"]["accuracy"]["interval"] is None


def test_a_run_that_does_not_beat_the_majority_has_collapsed():
    assert spread.summarise(TASK, [run(0.7), run(0.5), run(0.4)])["collapsed"] == ["seed=0.5", "seed=0.4"]


@pytest.mark.parametrize(
    ("scores", "verdict"), [([0.84, 0.85, 0.86], "PASS"), ([0.5, 0.51, 0.52], "FAIL"), ([0.98, 0.98, 0.99], "PASS")]
)
def test_a_mean_beside_a_published_one(monkeypatch, scores, verdict):
    expected = {"metric": "accuracy", "value": 0.85, "std": 0.02, "seeds": 20}
    monkeypatch.setattr(spread, "published", lambda name: expected)
    found = spread.compare_with_published("a", spread.summarise(TASK, [run(score) for score in scores]))
    assert found["verdict"] == verdict and found["words"].startswith(f"{verdict}: accuracy")
    ours = spread.statistics_of("accuracy", scores)
    half = 4.302653 * (ours["std"] ** 2 / 3 + 0.02**2 / 20) ** 0.5
    assert found["interval"] == pytest.approx([ours["mean"] - 0.85 - half, ours["mean"] - 0.85 + half])
    assert (found["interval"][1] < 0) == (verdict == "FAIL")


def test_of_one_published_run_the_deviation_is_ours(monkeypatch):
    monkeypatch.setattr(spread, "published", lambda name: {"metric": "accuracy", "value": 0.9, "std": None, "seeds": 1})
    low, high = spread.compare_with_published("a", spread.summarise(TASK, [run(0.7), run(0.8), run(0.9)]))["interval"]
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 * (1 + 1 / 3) ** 0.5)


def test_each_published_result_is_of_a_task_that_ships_and_a_metric_that_it_reports():
    content = yaml.safe_load(spread.PUBLISHED.read_text(encoding="utf-8"))
    for name, entry in content.items():
        task = yaml.safe_load((DATA_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        assert entry["metric"] in task["metrics"] and DIRECTION[entry["metric"]] == "max"
        assert set(entry) == {"metric", "value", "std", "seeds", "model"} and 0 < entry["value"] < 1
    with pytest.raises(BadInput, match=r"--check mrcp: no published result.*mrpc"):
        spread.published("mrcp")
