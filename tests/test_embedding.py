"""embedding.py: the gradients of torch's own embedding, step after step, in memory that stays."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import embedding

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def models():
    """A model, and the same with an embedding that keeps its gradient. Token 0 is padding, which learns nothing."""
    plain = BertForSequenceClassification(BertConfig(**SIZES)).eval()
    ours = copy.deepcopy(plain)
    embedding.keep_gradient(ours)
    return plain, ours


def table_of(model):
    return model.bert.embeddings.word_embeddings


def ids_of(step):
    """Some tokens, each of them several times, among them padding; other ones at each step."""
    return torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(step)) % (10 + 5 * step)


def test_the_gradients_of_each_step_are_torchs(models):
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
    for step in range(4):
        for model in models:
            for part in ids_of(step).split(2):  # two micro-batches
                model(input_ids=part).logits.square().sum().backward()
        plain, ours = (table_of(model).weight.grad for model in models)
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)
        assert plain[0].abs().max() == 0 and 0 < (plain.abs().sum(dim=1) > 0).sum() < 40
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for plain, ours in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_a_step_whose_gradient_is_not_finite_leaves_nothing_behind(models):
    """Clipping multiplies all rows by max_norm / NaN."""
    _, model = models
    (model(input_ids=ids_of(0)).logits.sum() * float("nan")).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert table_of(model).weight.grad.isnan().all()
    model.zero_grad()
    model(input_ids=ids_of(0)).logits.sum().backward()
    gradient = table_of(model).weight.grad
    assert gradient.isfinite().all() and gradient[20:].abs().max() == 0 < gradient.abs().max()


def test_the_memory_stays(models):
    _, model = models
    places = set()
    for step in range(3):
        model(input_ids=ids_of(step)).logits.sum().backward()
        places.add(table_of(model).weight.grad.data_ptr())
        model.zero_grad()
        assert table_of(model).weight.grad is None
    assert len(places) == 1


def test_a_frozen_table_gets_no_gradient(models):
    _, model = models
    table_of(model).requires_grad_(False)
    model(input_ids=ids_of(1)).logits.sum().backward()
    assert table_of(model).weight.grad is None


def test_several_processes_keep_torchs_own(monkeypatch):
    """DistributedDataParallel waits for the gradients that autograd hands on."""
    monkeypatch.setattr(embedding, "PartialState", lambda: type("Two", (), {"num_processes": 2}))
    model = BertForSequenceClassification(BertConfig(**SIZES))
    embedding.keep_gradient(model)
    assert type(table_of(model)) is torch.nn.Embedding
