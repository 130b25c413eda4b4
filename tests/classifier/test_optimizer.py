"""The optimiser's groups and its schedule."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from classifier.training.optimizer import build_optimizer, build_scheduler, may_step

ARGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "adam_betas": [0.9, 0.99], "adam_epsilon": 1e-6}
SCHEDULE = {"scheduler": "linear", "warmup_ratio": 0.0, "warmup_steps": None}


def arguments(**changes):
    return SimpleNamespace(**{**ARGS, **SCHEDULE, "layerwise_lr_decay": 1.0, **changes})


@pytest.fixture
def model():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16))


def groups_by_name(model, optimizer):
    """Return {name of a trained parameter: the group that it is in}; each is in one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[parameter], group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


def test_weight_decay_is_for_matrices_and_frozen_parts_are_left_out(model):
    model.bert.embeddings.requires_grad_(False)
    optimizer = build_optimizer(model, arguments())
    groups = groups_by_name(model, optimizer)
    trained = {name: p for name, p in model.named_parameters() if not name.startswith("bert.embeddings")}
    assert set(groups) == set(trained)
    for name, group in groups.items():
        assert group["weight_decay"] == (0.1 if trained[name].ndim >= 2 else 0.0)
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.9, 0.99), 1e-6)


def test_each_layer_has_a_part_of_the_learning_rate_of_the_one_above(model):
    optimizer = build_optimizer(model, arguments(layerwise_lr_decay=0.5))
    rates = {name: group["lr"] for name, group in groups_by_name(model, optimizer).items()}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    for name, rate in rates.items():
        depth = {"bert.encoder.layer.1": 1, "bert.encoder.layer.0": 2}.get(name[:20], 0)
        depth = 3 if name.startswith("bert.embeddings") else depth
        assert rate == pytest.approx(1e-3 * 0.5**depth), name
    scheduler = build_scheduler(optimizer, arguments(warmup_ratio=0.5), 10)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-3)  # the head's, at its peak: what the log tells
    assert min(scheduler.get_last_lr()) == pytest.approx(1e-3 / 8)


def test_the_warm_up_is_a_fraction_or_a_number_of_steps(model, log_lines):
    def rates(total, **changes):
        optimizer = build_optimizer(model, arguments(**changes))
        scheduler, found = build_scheduler(optimizer, arguments(**changes), total), []
        for _ in range(total):
            found.append(scheduler.get_last_lr()[0] / 1e-3)
            optimizer.step()
            scheduler.step()
        return found

    assert rates(4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(4, warmup_ratio=0.3) == pytest.approx([0, 0.5, 1, 0.5])  # 1.2 steps are two
    assert rates(4, warmup_ratio=0.3, warmup_steps=1) == pytest.approx([0, 1, 2 / 3, 1 / 3])
    assert not log_lines
    rates(2, warmup_steps=3)
    assert log_lines == ["WARNING: the warm-up of 3 steps is longer than the run of 2 steps"]


@pytest.mark.parametrize("norm", ["1.0", "inf", "nan"])
def test_a_gradient_that_is_not_finite_changes_nothing(norm):
    model = torch.nn.Linear(2, 1)
    optimizer = build_optimizer(model, arguments())
    before = model.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    assert may_step(optimizer, torch.tensor(float(norm)))  # a fused one skips by itself
    optimizer.step()
    assert torch.equal(model.weight, before) == (norm != "1.0")
