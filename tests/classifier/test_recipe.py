"""The recipe: who decides what, and how long few rows are trained on."""

from types import SimpleNamespace

import pytest

from classifier.data.tasks import Task
from classifier.training import recipe

OWN = Task("mine", files={"train": "mine.csv"})


def arguments(**given):
    return SimpleNamespace(**{"recipe": "auto", "model": None, **dict.fromkeys(recipe.PLAIN), **given})


def encoder(size=384):
    return SimpleNamespace(config=SimpleNamespace(hidden_size=size))


@pytest.mark.parametrize(
    ("given", "task", "expected"),
    [
        ({}, OWN, False),
        ({"recipe": "plain"}, OWN, True),
        ({}, Task("mrpc", defaults={"learning_rate": 2e-5, "epochs": 3}), True),
        ({}, Task("mine", defaults={"max_steps": 10}), True),
        ({}, Task("mine", defaults={"weight_decay": 0.1}), False),
        ({}, Task("mine", model={"model_type": "bert"}), True),  # new: nothing was measured for those
        ({"model": "some/encoder"}, Task("mine", model={"model_type": "bert"}), False),
    ],
)
def test_a_task_with_a_recipe_of_its_own_keeps_it(given, task, expected):
    assert recipe.is_plain(arguments(**given), task) == expected


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(20, 40), (120, 38), (300, 16), (1_000, 6), (10_000, 6)],  # 2, 8, 19, 63, 625 steps of 16 an epoch
)
def test_few_rows_are_trained_on_for_300_steps_within_6_to_40_epochs(rows, epochs):
    args = arguments()
    recipe.choose(args, encoder(), rows)
    assert args.epochs == epochs
    assert args.epochs in (6, 40) or 300 <= args.epochs * -(-rows // 16) < 300 + -(-rows // 16)
    assert args.recipe.startswith(f"small data: epochs {epochs}, batch size 16")


def test_many_rows_have_the_plain_recipe(log_lines):
    args = arguments()
    recipe.choose(args, encoder(), 10_001)
    assert {name: getattr(args, name) for name in recipe.PLAIN} == recipe.PLAIN
    assert "recipe: many rows, 10,001 rows: epochs 3, batch size 32, learning rate 2e-05" in "\n".join(log_lines)


def test_flags_that_are_given_stay(log_lines):
    args = arguments(epochs=2, learning_rate=1e-3)
    recipe.choose(args, encoder(), 300)
    assert (args.epochs, args.learning_rate, args.batch_size, args.warmup_ratio) == (2, 1e-3, 16, 0.1)
    assert any("recipe: small data, 300 rows: batch size 16, warmup ratio 0.1" in line for line in log_lines)
    given = arguments(epochs=2, learning_rate=1e-3, batch_size=8, warmup_ratio=0.0)
    recipe.choose(given, encoder(), 300)
    assert given.recipe == "auto"  # nothing was left to choose
    batches = arguments(batch_size=100)
    recipe.choose(batches, encoder(), 300)
    assert batches.epochs == 40  # 3 steps an epoch


def test_the_larger_the_encoder_the_lower_the_learning_rate():
    rates = [recipe.learning_rate_of(size) for size in (128, 384, 768, 1024, 4096)]
    assert rates == [1e-4, 1e-4, 5e-5, 3e-5, 3e-5]
