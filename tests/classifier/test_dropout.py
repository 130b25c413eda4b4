"""dropout.py: the masks' rates and independence, the same masks packed and padded, and what stays unchanged."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from conftest import TORCHRUN_2, bert_config, lines_of, run_script, write_review_task
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

from classifier.messages import log
from classifier.model import dropout, packing
from classifier.model.dropout import Masks
from classifier.model.packing import prepare_model

SHAPE = (32, 40, 384)  # examples, positions, columns
FLAGS = ("--max_steps", 30, "--log_every", 1, "--threads", 1)


def make_masks(seed=42, step=1, ids=range(32)):
    masks = Masks(seed, places=9)
    masks.set_batch(step, list(ids), "cpu")
    return masks


def dropped(seed=42, step=1, place=1, p=0.1, shape=SHAPE, ids=range(32)):
    """Where a mask drops, as float64 0 and 1."""
    return 1 - make_masks(seed, step, ids).keep(shape, place, p, torch.float64)


def make_model(kind, **changes):
    """A 2-layer model of a family, with the dropout of its kind."""
    config = AutoConfig.for_model(kind)
    sizes = {"vocab_size": 100, "hidden_size": 32, "dim": 32, "embedding_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "n_layers": 2, "num_attention_heads": 2, "n_heads": 2, "hidden_dim": 64}
    sizes |= {"max_position_embeddings": 64, "pad_token_id": 0, "pooler_hidden_size": 32}
    rates = (
        "attention_dropout",
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "mlp_dropout",
        "embedding_dropout",
    )
    sizes |= {**dict.fromkeys(rates, 0.1), **changes}
    for name, value in sizes.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def install_masks(model):
    """Replace a model's dropout, as prepare_model does; return its masks."""
    return packing.Packer(model, dropout.install(model, seed=1), pad_token_id=0).masks


# ------------------------------------------------------------------------------------------------------ the numbers


def test_the_mixing_is_that_of_splitmix64():
    def splitmix64(number):
        whole = 2**64 - 1
        number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & whole
        number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & whole
        return number ^ (number >> 31)

    chooser = random.Random(0)
    numbers = [0, 1, 2**63, 2**64 - 1, *(chooser.getrandbits(64) for _ in range(1000))]
    mixed = dropout.mix(torch.tensor([dropout.signed(number) for number in numbers])).tolist()
    assert mixed == [dropout.signed(splitmix64(number)) for number in numbers]
    # The first output of the published generator with state 0: mix(golden gamma).
    assert dropout.mix(torch.tensor([dropout.GOLDEN])).tolist() == [dropout.signed(0xE220A8397B1DCDAF)]


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_rate_of_each_mask_and_of_many(p):
    rates = [dropped(step=step, place=place, p=p).mean().item() for step in range(1, 9) for place in range(1, 6)]
    # 491,520 elements: a standard deviation of up to 7e-4 in each, of 1.1e-4 in 40 of them together.
    assert max(abs(rate - p) for rate in rates) < 3.5e-3 * (p * (1 - p)) ** 0.5 / 0.5
    assert abs(np.mean(rates) - p) < 3.5e-4
    assert np.std(rates) == pytest.approx((p * (1 - p) / np.prod(SHAPE)) ** 0.5, rel=0.4)


def test_the_rate_is_right_to_a_thousandth_in_a_large_mask_and_a_ten_thousandth_over_many():
    rates = [dropped(step=step, shape=(32, 128, 768)).mean().item() for step in range(1, 13)]  # 3.1 million elements
    assert max(abs(rate - 0.1) for rate in rates) < 1e-3
    assert abs(np.mean(rates) - 0.1) < 1e-4


@pytest.fixture(scope="module")
def many():
    """Masks of 10 steps and 4 places: (steps, places, examples, positions, columns)."""
    shape = (16, 24, 96)
    return torch.stack(
        [torch.stack([dropped(step=s, place=p, shape=shape, ids=range(16)) for p in range(1, 5)]) for s in range(1, 11)]
    )


@pytest.mark.parametrize("axis", range(5), ids=["step", "place", "example", "position", "column"])
def test_the_rate_along_each_axis(many, axis):
    rates = many.mean(dim=[other for other in range(5) if other != axis])
    scores = (rates - 0.1) / (0.09 / (many.numel() / many.shape[axis])) ** 0.5
    assert scores.abs().max() < 4.5
    assert (scores**2).mean() < 1 + 5 * (2 / len(scores)) ** 0.5  # chi-square / degrees of freedom


@pytest.mark.parametrize("axis", range(5), ids=["step", "place", "example", "position", "column"])
@pytest.mark.parametrize("distance", [1, 2, 3])
def test_neighbours_are_not_correlated(many, axis, distance):
    centred = many - many.mean()
    size = many.shape[axis] - distance
    products = centred.narrow(axis, 0, size) * centred.narrow(axis, distance, size)
    assert abs(products.mean() / centred.var() * products.numel() ** 0.5) < 4.5


@pytest.mark.parametrize("changed", [{"seed": 43}, {"seed": 0}, {"step": 2}, {"place": 2}, {"ids": range(100, 132)}])
def test_another_key_makes_an_unrelated_mask(changed):
    mask, changed_mask = dropped() - 0.1, dropped(**changed) - 0.1
    assert abs((mask * changed_mask).mean() / 0.09 * mask.numel() ** 0.5) < 4.5


def test_places_are_not_correlated():
    """All pairs of 30 places; of each four columns, the first has the fewest random bits to its name."""
    masks = Masks(seed=7, places=30)
    for step in (1, 2, 3):
        masks.set_batch(step, list(range(64)), "cpu")
        dropped = torch.stack([0.9 - masks.keep((64, 30, 96), place, 0.1, torch.float64) for place in range(30)])
        for columns in (dropped, dropped[..., ::4]):
            rows = columns.flatten(1)
            scores = (rows @ rows.T / 0.09 / rows.shape[1] ** 0.5)[~torch.eye(30, dtype=torch.bool)]
            assert scores.abs().max() < 4.5 and scores.std() == pytest.approx(1, abs=0.15)


# ------------------------------------------------------------------------------------------------------ the packer


def test_a_mask_is_a_matter_of_the_example_not_of_the_batch():
    whole = dropped()
    assert torch.equal(dropped(ids=[7, 3], shape=(2, *SHAPE[1:])), whole[[7, 3]])
    assert torch.equal(dropped(shape=(32, 11, 384)), whole[:, :11])  # a narrower batch
    assert torch.equal(dropped(shape=(32, 40, 127)), whole[:, :, :127])  # fewer keys, not a multiple of four
    heads = dropped(shape=(32, 2, 9, 9))
    assert torch.equal(dropped(shape=(32, 2, 5, 5)), heads[:, :, :5, :5])


FAMILIES = ["bert", "distilbert", "roberta", "xlm-roberta", "mpnet", "electra", "albert", "modernbert", "deberta-v2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_drops_alike_in_every_layout(family):
    model = make_model(family)
    masks = install_masks(model)
    model.train()
    ids = torch.arange(5, 35).reshape(3, 10)
    mask = torch.ones_like(ids)
    ids[1, 6:] = mask[1, 6:] = 0

    def logits(rows, width, step=4):
        masks.set_batch(step, [10 + row for row in rows], "cpu")
        return model(input_ids=ids[rows, :width], attention_mask=mask[rows, :width]).logits

    whole = logits([0, 1, 2], 10)
    assert torch.equal(whole, logits([0, 1, 2], 10))  # nothing is drawn
    torch.testing.assert_close(logits([1], 6), whole[[1]], rtol=0, atol=1e-6)  # alone, without padding
    torch.testing.assert_close(logits([2, 0], 10), whole[[2, 0]], rtol=0, atol=1e-6)
    assert (logits([0, 1, 2], 10, step=5) - whole).abs().min() > 1e-5  # another step, other masks
    model.eval()
    assert torch.equal(logits([0, 1, 2], 10), logits([0, 1, 2], 10, step=5))


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "albert", "modernbert"])
def test_attention_computes_what_transformers_computes(family, monkeypatch):
    """Where nothing is dropped, the explicit products give the logits of transformers' own."""
    model = make_model(family)
    plain = copy.deepcopy(model).eval()
    ids = torch.arange(5, 35).reshape(3, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    expected = plain(input_ids=ids, attention_mask=mask).logits
    masks = install_masks(model)
    calls = []
    monkeypatch.setattr(Masks, "drop", lambda self, values, place, p: calls.append(values.ndim) or values)
    model.train()
    masks.set_batch(1, [0, 1, 2], "cpu")
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected, rtol=0, atol=1e-6)
    assert calls.count(4) == 2  # the attention weights of two layers


def test_expectation_and_gradient():
    values = torch.full((64, 100, 64), 2.0, requires_grad=True)
    result = make_masks(ids=range(64)).drop(values, 1, 0.25)
    assert result.detach().unique().tolist() == [0.0, pytest.approx(2 / 0.75)]
    assert result.mean().item() == pytest.approx(2.0, abs=0.01)
    result.sum().backward()
    assert torch.equal(values.grad == 0, result == 0)
    assert values.grad.max().item() == pytest.approx(1 / 0.75)


def test_the_models_own_rates_are_kept():
    model = make_model("bert", hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3, classifier_dropout=0.4)
    before = {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}
    dropout.install(model, seed=1)
    after = {name: module.p for name, module in model.named_modules() if isinstance(module, dropout.Dropout)}
    assert before == after and set(before.values()) == {0.2, 0.3, 0.4}
    places = [module.place for module in model.modules() if isinstance(module, dropout.Dropout)]
    assert len(set(places)) == len(places)


def test_a_shape_without_the_examples_first_is_left_to_torch_and_found_out():
    config = AutoConfig.for_model("xlnet", vocab_size=100, d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=0.1)
    model = AutoModelForSequenceClassification.from_config(config)
    assert dropout.draws_from_torch(model, install_masks(model), [2, 5, 6, 3])


def test_a_mask_of_numbers_is_added():
    """Models that make their attention mask themselves hand over what eager attention adds to the weights."""
    module = nn.Module()
    module.training, module.counted_dropout = True, (make_masks(ids=range(2)), 1)
    query, key, value = torch.randn(3, 2, 1, 4, 8)
    keep = torch.tensor([True, True, False, True]).expand(2, 1, 4, 4)
    of_numbers = torch.where(keep, 0.0, torch.finfo(torch.float32).min)
    outputs = [packing.attention(module, query, key, value, mask, dropout=0.5)[0] for mask in (keep, of_numbers)]
    torch.testing.assert_close(*outputs)


def test_dropout_that_is_torchs_own_is_logged(vocabulary, caplog, monkeypatch):
    class Escapes(nn.Module):
        def forward(self, values):
            return nn.functional.dropout(values, 0.5, self.training)

    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO")
    tokenizer = BertTokenizer(str(vocabulary))
    prepare_model(make_model("bert"), tokenizer)
    assert not caplog.records
    model = make_model("bert")
    model.bert.pooler.activation = Escapes()
    prepare_model(model, tokenizer)
    assert "torch's own" in caplog.text


# ------------------------------------------------------------------------------------------------------ a whole run


@pytest.mark.slow
def test_losses_are_those_of_one_process_with_dropout_on(review_task, vocabulary, tmp_path, run_inside):
    config = bert_config(vocabulary, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    task = write_review_task(review_task.with_name("dropout.yaml"), config)

    def losses(name, task, *flags):
        flags = [*FLAGS, "--task", task, *flags, "--output_dir", name]
        code, _, errors = run_inside("train.py", *flags, cwd=tmp_path)
        assert code == 0, errors
        return np.array([line["loss"] for line in lines_of(tmp_path / name)])

    one = losses("one", task)
    assert len(one) == 30
    np.testing.assert_allclose(losses("micro", task, "--micro_batch_size", 3), one, rtol=1e-5)
    done = run_script("train.py", *FLAGS, "--task", task, "--output_dir", "two", cwd=tmp_path, launcher=TORCHRUN_2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose([line["loss"] for line in lines_of(tmp_path / "two")], one, rtol=1e-5)
    config = json.loads((tmp_path / "one/model/config.json").read_text())
    assert "counted_dropout" not in json.dumps(config)
    assert config["hidden_dropout_prob"] == 0.1
    # Dropout was on: without it the same steps have other losses.
    assert abs(losses("off", review_task, "--max_steps", 1)[0] - one[0]) > 1e-4
