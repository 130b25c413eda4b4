"""What can be known before a training: facts about the data, its mistakes, and what the training will take.

Pure functions of tokenised splits and numbers; report.py puts their results into words.
"""

import numpy as np

from cache import array_of, arrow_column

# The largest relative difference of a device's logits and gradients from fp32 on the CPU that rounding explains.
TOLERANCE = {"no": 1e-2, "fp16": 0.1, "bf16": 0.2}  # fp32 on a GPU may be TF32, of 10 bits
FEW = 16  # rows of a class; below this, few-shot methods are likely better than fine-tuning


def data_facts(task, splits, examples, special_tokens, padding):
    """Return what is worth knowing about the data, as JSON values.

    splits: rows with `hash` and the texts; examples: the same, tokenised (see tokens.encode); special_tokens: in each
    example; padding: its share of what a step computes. The other shares are of rows, `unknown` and
    `tokens_per_character` of tokens of the text.
    """
    facts = {"splits": {}, "label_variants": label_variants(task)}
    facts["duplicates"] = {name: duplicates(splits["train"], splits[name]) for name in splits if name != "train"}
    for name, rows in examples.items():
        full, length = array_of(rows, "full_length"), array_of(rows, "length")
        text_tokens = max(1, int((full - special_tokens).sum()))
        facts["splits"][name] = {
            "rows": len(rows),
            "labels": label_counts(task, array_of(rows, "label")),
            "tokens": {
                "median": float(np.median(full)),
                "p95": float(np.percentile(full, 95)),
                "longest": int(full.max()),
            },
            "truncated": float((full > length).mean()),
            "unknown": int(array_of(rows, "unknown").sum()) / text_tokens,
            "tokens_per_character": text_tokens / max(1, int(array_of(rows, "characters").sum())),
            "conflicts": conflicts(splits[name]),
        }
    return facts | {"padding": padding}


def label_counts(task, labels):
    """Return {label name: rows}; in regression the smallest, mean and largest value; rows without a label left out."""
    if task.is_regression:
        labels = labels[np.isfinite(labels)]
        return {what: float(getattr(labels, what)()) for what in ("min", "mean", "max")} if len(labels) else {}
    of_label = [labels[:, number] == 1 if labels.ndim == 2 else labels == number for number in range(len(task.labels))]
    return {name: int(found.sum()) for name, found in zip(task.labels, of_label, strict=True)}


def label_variants(task):
    """Return lists of label names that differ only in case and blanks, as "Positive" and "positive "."""
    names = {}
    for name in [] if task.is_regression else task.labels:
        names.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [variants for variants in names.values() if len(variants) > 1]


def text_numbers(*splits):
    """Return an array (rows of all splits, one after the other) in which equal texts have equal numbers.

    Compares the 16-byte hashes with NumPy: a hash table of a million texts would take several times the memory.
    """
    columns = [arrow_column(rows, "hash") for rows in splits]
    halves = np.concatenate(
        [np.frombuffer(c.buffers()[2], np.uint64, 2 * len(c), 16 * c.offset).reshape(-1, 2) for c in columns]
    )
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    halves = halves[order]
    numbers = np.zeros(len(order), dtype=np.int32)
    numbers[order[1:]] = np.cumsum((halves[1:] != halves[:-1]).any(axis=1))
    return numbers


def conflicts(rows):
    """Return {"texts": number of texts that occur with different labels, "position": one of them, or None}."""
    texts, labels = text_numbers(rows), array_of(rows, "label").reshape(len(rows), -1)
    order = np.argsort(texts, kind="stable")
    texts, labels = texts[order], labels[order]
    different = (texts[1:] == texts[:-1]) & (labels[1:] != labels[:-1]).any(axis=1)
    position = int(order[1:][different][0]) if different.any() else None
    return {"texts": len(np.unique(texts[1:][different])), "position": position}


def duplicates(train, rows):
    """Return {"rows": number of rows whose texts are in train too, "share", "position": one of them, or None}."""
    texts = text_numbers(train, rows)
    found = np.flatnonzero(np.isin(texts[len(train) :], texts[: len(train)]))
    return {"rows": len(found), "share": len(found) / len(rows), "position": int(found[0]) if len(found) else None}


def is_chinese(texts):
    """Return whether most letters of the texts are Chinese characters."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > len(letters) / 2


def peak_memory(device):
    """Return the largest memory so far in bytes: of the process on a CPU, else of its tensors on the device."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    import resource  # Windows has none
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def compare_with_cpu(model, layout, micro_batch, loss_of, device_autocast):
    """Compute a batch on its device and in fp32 on the CPU; return the largest differences of logits and gradients.

    Both without dropout; each difference is divided by the largest value of the CPU's result. `loss_of(logits, labels)`
    is the loss, `device_autocast` a context for the forward pass on the device. The model keeps no gradients.
    """
    import copy

    import torch
    from accelerate.utils import send_to_device

    results = []
    copies = copy.deepcopy((model, layout))  # together: the copy's attention asks the copied layout
    copies[0].cpu().float()
    for (one, its_layout), autocast in (((model, layout), device_autocast), (copies, torch.enable_grad())):
        device = next(one.parameters()).device
        its_layout.begin(0, micro_batch["ids"], micro_batch["lengths"], device)
        was_training = one.training
        one.eval()
        one.zero_grad()
        with autocast:
            logits = one(**send_to_device(micro_batch["inputs"], device)).logits.float()
        loss_of(logits, micro_batch["labels"].to(device)).backward()
        gradients = [parameter.grad.flatten().cpu() for parameter in one.parameters() if parameter.grad is not None]
        results.append((logits.detach().cpu(), torch.cat(gradients)))
        one.zero_grad()
        one.train(was_training)
    return [float((here - there).abs().max() / there.abs().max()) for here, there in zip(*results, strict=True)]
