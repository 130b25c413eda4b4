"""predictor.py: a saved model as a function of texts."""

import numpy as np
import pytest
import torch
from conftest import make_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

from classifier import predictor
from classifier.data.tasks import Task, save_task

FAMILY = {"labels": ["negative", "positive"], "max_length": 32}


@pytest.fixture
def saved(tiny_bert, tmp_path):
    """A function of a task: a model folder with a head of two labels, and the model in transformers."""

    def save(task):
        torch.manual_seed(1)
        names = dict(enumerate(task.labels))
        model = AutoModelForSequenceClassification.from_pretrained(
            tiny_bert, id2label=names, label2id={name: number for number, name in names.items()}
        )
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
        save_task(task, {}, tmp_path / "task.json")
        return tmp_path, model.eval()

    return save


@pytest.mark.parametrize("texts", [1, 2])
def test_predictions_are_those_of_transformers_in_the_order_of_the_texts(saved, tiny_bert, texts):
    columns = [[text for text, _ in make_rows(30, seed)] for seed in range(texts)]
    folder, plain = saved(Task(name="", text=["a", "b"][:texts], **FAMILY))
    loaded = predictor.load(folder, batch_size=7)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    inputs = tokenizer(*columns, padding=True, truncation="longest_first", max_length=32, return_tensors="pt")
    assert len(set(inputs["attention_mask"].sum(dim=1).tolist())) > 3
    with torch.no_grad():
        expected = plain(**inputs).logits
    np.testing.assert_allclose(loaded.logits(columns), expected, rtol=1e-5, atol=1e-5)
    table = loaded.table(columns)
    assert list(table) == ["predicted_label", "probability", "probability_negative", "probability_positive"]
    probabilities = expected.softmax(dim=1)
    assert table["predicted_label"] == [FAMILY["labels"][number] for number in expected.argmax(dim=1)]
    np.testing.assert_allclose(table["probability_positive"], probabilities[:, 1], atol=1e-6)
    np.testing.assert_allclose(table["probability"], probabilities.max(dim=1).values, atol=1e-6)


def test_the_digest_is_that_of_weights_and_task(saved):
    folder, model = saved(Task(name="", text=["a"], **FAMILY))
    first = predictor.load(folder).digest
    (folder / "README.md").write_text("a card")
    assert predictor.load(folder).digest == first
    save_task(Task(name="", text=["a"], labels=FAMILY["labels"], max_length=16), {}, folder / "task.json")
    of_another_task = predictor.load(folder).digest
    with torch.no_grad():
        model.classifier.bias += 1
    model.save_pretrained(folder)
    assert len({first, of_another_task, predictor.load(folder).digest}) == 3


def test_a_batch_too_large_for_the_memory_is_halved(saved, monkeypatch):
    folder, _ = saved(Task(name="", text=["a"], **FAMILY))
    texts = [[text for text, _ in make_rows(21)]]
    expected = predictor.load(folder).logits(texts)
    loaded = predictor.load(folder, batch_size=16)
    sizes, forward = [], BertForSequenceClassification.forward

    def with_room_for_5(self, **inputs):
        sizes.append((inputs["input_ids"] == loaded.tokenizer.cls_token_id).sum().item())
        if sizes[-1] > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, **inputs)

    monkeypatch.setattr(BertForSequenceClassification, "forward", with_room_for_5)
    np.testing.assert_allclose(loaded.logits(texts), expected, rtol=1e-5, atol=1e-5)
    assert sizes == [16, 8, 4, 4, 8, 4, 4, 5]


def test_another_error_of_the_model_is_not_hidden(saved, monkeypatch):
    folder, _ = saved(Task(name="", text=["a"], **FAMILY))
    loaded = predictor.load(folder)

    def broken(self, **inputs):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(BertForSequenceClassification, "forward", broken)
    with pytest.raises(RuntimeError, match="do not fit"):
        loaded.logits([["a", "b", "c"]])
