"""The certificate of an exported model: how far its logits and scores are from torch's, how fast and large it is."""

import math
import time

import numpy as np

import common
import metrics
import uncertainty
from cache import array_of
from common import RunFailed
from tokens import encode

TIMED, ROUNDS = 128, 5  # examples that are timed, and how often
TOGETHER = 1024  # tokens up to which several examples of any length fit into memory with all their attention weights


def difference_of_lengths(model, columns, max_length, ours, theirs):
    """Return (lengths, largest difference of a logit) of random tokens: from 1 to the longest, alone and together.

    ours, theirs: forward passes, as a Predictor has them.
    """
    generator, lengths = np.random.default_rng(0), sorted({1, 2, max_length // 2, max_length})
    types = getattr(model.config, "type_vocab_size", None) or 1
    limits = {"input_ids": model.get_input_embeddings().num_embeddings, "token_type_ids": types}
    batch = {name: [generator.integers(0, limits[name], length) for length in lengths] for name in columns}
    # RoBERTa counts positions without the padding token.
    pad, size = model.config.pad_token_id, limits["input_ids"]
    batch["input_ids"] = [np.where(ids == pad, (ids + 1) % size, ids) for ids in batch["input_ids"]]
    batches = [{name: [rows[at]] for name, rows in batch.items()} for at in range(len(lengths))]
    if max_length <= TOGETHER:
        batches.append(batch)
    return lengths, max(float(abs(ours(some) - theirs(some)).max()) for some in batches)


def milliseconds(predictors, rows, size):
    """Return {name: milliseconds per example} of the forward passes, `size` examples at a time: medians of rounds.

    In turn, on the same batches: examples of all lengths, those of like length together.
    """
    task = predictors["torch"].task
    some = rows[np.linspace(0, len(rows) - 1, min(TIMED if size > 1 else TIMED // 4, len(rows))).astype(int)]
    encoded, _ = encode(task, predictors["torch"].tokenizer, [some[column] for column in task.text], task.max_length)
    order = np.argsort([-len(ids) for ids in encoded["input_ids"]])
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    batches = [{name: [ids[i] for i in part] for name, ids in encoded.items()} for part in parts]
    seconds = {name: [] for name in predictors}
    for _ in range(ROUNDS + 1):
        for name, predictor in predictors.items():
            started = time.perf_counter()
            for batch in batches:
                predictor.forward(batch)
            seconds[name].append(time.perf_counter() - started)
    return {name: 1000 * float(np.median(of[1:])) / len(order) for name, of in seconds.items()}  # the first warms up


def certify(task, logits, splits):
    """Return what certificate.json says of an exported model's logits beside torch's, by name and split.

    logits: {name: {split: (examples, outputs)}}, "torch" among the names; splits: {split: rows}.
    """
    metric, content = task.metrics[0], {}
    for name, of_splits in logits.items():
        content[name] = {"scores": {}}
        if name != "torch":
            content[name] |= {"differences": {}, "intervals": {}, "largest_logit_difference": 0.0}
        for split, found in of_splits.items():
            labels, theirs = array_of(splits[split], "label"), logits["torch"][split]
            if not np.isfinite(found).all():
                raise RunFailed(f"{name}: some logits of {split} are not finite")
            predictions, others = common.predictions_of(task, found), common.predictions_of(task, theirs)
            score = content[name]["scores"][split] = metrics.compute([metric], predictions, labels, warns=False)[metric]
            if name == "torch":
                continue
            before, this = content["torch"]["scores"][split], content[name]
            is_known = None not in (score, before)
            this["differences"][split] = score - before if is_known else None
            intervals = uncertainty.differences([metric], predictions, others, labels)
            this["intervals"][split] = intervals[metric] if is_known else None
            largest = float(abs(found.astype(np.float64) - theirs).max())
            this["largest_logit_difference"] = max(this["largest_logit_difference"], largest)
    return content


def check(task, content, atol):
    """Raise RunFailed where a logit in float32 is off by more than atol, or a score fell by more than chance."""
    metric, of_fp32 = task.metrics[0], content["fp32"]
    largest = max(of_fp32["largest_logit_difference"], content["lengths"]["largest_logit_difference"])
    if not largest <= atol:
        words = "Nothing was written. Give a larger --atol if your use allows it."
        raise RunFailed(f"fp32: a logit is {largest:.1e} from torch's, more than --atol {atol:g}\n{words}")
    for name in [name for name in ("fp32", "int8") if name in content]:
        for split, score in content[name]["scores"].items():
            before, interval = content["torch"]["scores"][split], content[name]["intervals"][split]
            if metrics.is_better(metric, before, score) and (words := _fall(metric, before, score, interval)):
                words = f"{name}: {metric} of {split} fell from {words}"
                raise RunFailed(f"{words}\nNothing was written.{' Export without --quantize.' * (name == 'int8')}")


def _fall(metric, before, score, interval):
    """Return a fall from one score to another in words; None where it may be chance, or rounding."""
    if interval is None:  # a fall to say of where only torch's score has a value
        return f"{before:.4f} to {common.number_words(score)}" if score is None else None
    margin = uncertainty.rounding(metric, before, score)
    if not uncertainty.is_shown(interval, margin):
        return None
    digits = max(4, math.ceil(-math.log10(margin)))  # an error may be smaller than 0.0001
    low, high = map(uncertainty.signed, interval)
    return (
        f"{before:.{digits}f} to {score:.{digits}f}, 95 % interval of the difference {low} to {high}; "
        f"rounding explains up to {margin:.1e}"
    )


def section(content):
    """Return a certificate as a section of the model card."""
    size, lines = content["batch_size"], []
    for name in [name for name in ("torch", "fp32", "int8") if name in content]:
        this = content[name]
        for split, score in this["scores"].items():
            words = ["", ""]
            if name != "torch":
                interval, difference = this["intervals"][split], this["differences"][split]
                words = [
                    "none" if difference is None else f"{difference:+.4f}",
                    f"{this['largest_logit_difference']:.1e}",
                ]
                words[0] += f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
            times = (f"{this[f'milliseconds_per_example_{how}']:.2f}" for how in ("in_batches", "alone"))
            cells = [
                f"{name} {this['file']}",
                split,
                common.number_words(score),
                *words,
                *times,
                f"{this['bytes'] / 1e6:.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(lines)
    threads = f"{content['threads']} thread{'s' if content['threads'] > 1 else ''}"
    return f"""## ONNX

`onnx/` holds this model for onnxruntime {content["versions"]["onnxruntime"]}, {threads} on a CPU:

| | split | {content["metric"]} | difference (95 %) | largest of a logit | ms, {size} at a time | ms, alone | MB |
|---|---|---|---|---|---|---|---|
{table}
"""
