"""search.py: what is drawn, what is given up, and what another process left."""

import json
from contextlib import ExitStack

import pytest

from classifier.messages import BadInput
from classifier.training.search import Search, as_flags, is_range

pytest.importorskip("optuna")
SPACE = [("learning_rate", "1e-5..1e-3"), ("batch_size", ["8", "16"]), ("epochs", "2..4")]


def write_evaluations(run, scores):
    """Write a metrics.jsonl with an evaluation each epoch, and lines that do not count."""
    run.mkdir(exist_ok=True)
    lines = [{"type": "train", "step": 1, "epoch": 0.1, "loss": 1.0}]
    for epoch, score in enumerate(scores, start=1):
        for split, value in (("validation", score), ("train_sample", 1.0)):
            lines.append({"type": "eval", "split": split, "epoch": epoch, "scores": {"accuracy": value, "f1": 0.0}})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"type": "ev')


def test_what_is_drawn_is_within_the_space_and_short_enough_for_a_folder(tmp_path):
    study, drawn = Search(tmp_path, SPACE, 20), []
    with ExitStack() as claims:
        while found := study.take(claims):
            drawn.append(found[1])
            study.tell(found[0], 0.5)
    assert len(drawn) == 20 and study.take(ExitStack()) is None
    rates = [float(setting["learning_rate"]) for setting in drawn]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and sum(rate < 1e-4 for rate in rates) > 3  # by its logarithm
    assert {setting["batch_size"] for setting in drawn} == {"8", "16"}
    assert {setting["epochs"] for setting in drawn} == {"2", "3", "4"}
    assert max(len(setting["learning_rate"]) for setting in drawn) <= 8
    settings, ended_early = study.settings()
    assert all(setting in settings for setting in drawn) and ended_early == 0


def test_a_trial_that_falls_behind_is_hopeless_and_one_that_leads_is_not(tmp_path):
    study = Search(tmp_path, [("epochs", ["10"])], 10)
    with ExitStack() as claims:
        for number in range(5):
            trial, _ = study.take(claims)
            write_evaluations(tmp_path / "run", [0.1 * (number + 1)] * 10)
            assert not study.is_hopeless(trial, tmp_path / "run")  # the first five are never given up
            study.tell(trial, 0.1 * (number + 1))
        trial, _ = study.take(claims)
        assert not study.is_hopeless(trial, tmp_path / "absent")
        write_evaluations(tmp_path / "run", [0.2])
        assert not study.is_hopeless(trial, tmp_path / "run")  # too early to tell
        write_evaluations(tmp_path / "run", [0.2] * 5)
        assert study.is_hopeless(trial, tmp_path / "run")  # the median is 0.3
        study.tell(trial, None)
        trial, _ = study.take(claims)
        write_evaluations(tmp_path / "run", [0.2, 0.4, 0.2, 0.2, 0.2])
        assert not study.is_hopeless(trial, tmp_path / "run")  # its best counts
    assert study.settings()[1] == 1


def test_a_trial_is_taken_over_when_nobody_holds_it_and_not_before(tmp_path):
    first, claims = Search(tmp_path, SPACE, 2), ExitStack()
    _, setting = first.take(claims)
    with ExitStack() as others:
        trial, other_setting = Search(tmp_path, SPACE, 2).take(others)
        assert other_setting != setting
        assert Search(tmp_path, SPACE, 2).take(ExitStack()) is None  # two are under way
        first.tell(trial, 0.5)
    claims.close()  # the first one's process died
    with ExitStack() as others:
        _, again = Search(tmp_path, SPACE, 2).take(others)
    assert again == setting


@pytest.mark.parametrize("values", ["1..", "..2", "2..1", "a..b", "-1..1", "1..inf", "nan..2"])
def test_a_range_has_two_numbers(values):
    with pytest.raises(BadInput, match=r"not LOW\.\.HIGH"):
        is_range(values)
    assert is_range("1e-5..1e-4") and not is_range("1e-5,1e-4")


def test_values_of_a_trial_are_flags():
    assert as_flags({"a": 3.14159e-05, "b": 2, "c": "x"}) == {"a": "3.14e-05", "b": "2", "c": "x"}
