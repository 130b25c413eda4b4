"""For the tests of predictions: a saved model of random weights that does not say the same of all texts."""

import torch
from conftest import make_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from classifier.data.tasks import save_task


def save_model(folder, base, task, labels=None, seed=0):
    """Write a model folder for a task; return the model. base: a folder as of tiny_bert; labels: in the head's order.

    A number that it predicts has a mean of 2.5 and a standard deviation of 2.5.
    """
    torch.manual_seed(seed)
    names = dict(enumerate(labels or (["value"] if task.is_regression else task.labels)))
    numbers = {name: number for number, name in names.items()}
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=names, label2id=numbers).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [[text for text, _ in make_rows(50, seed)] for seed in range(len(task.text))]
    head = model.classifier
    with torch.no_grad():
        for weight in model.bert.encoder.parameters():
            if weight.ndim == 2:
                weight *= 10  # those of a fresh encoder hardly let the texts through
        head.weight.normal_()
        logits = model(**tokenizer(*texts, padding=True, truncation=True, max_length=32, return_tensors="pt")).logits
        deviation = logits.std(dim=0)
        head.weight *= 2.5 / deviation[:, None]
        head.bias.copy_(2.5 - logits.mean(dim=0) * 2.5 / deviation)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_task(task, {}, folder / "task.json")
    return model
