"""What can be known before a training: facts about the data, its mistakes, and what the training will take.

Pure functions of tokenised splits and numbers; report.py puts their results into words.
"""

import numpy as np

from classifier.data.cache import arrow_column, column_array
from classifier.messages import log

FEW_ROWS = 16  # rows of a class; below this, few-shot methods are likely better than fine-tuning


def data_facts(task, splits, examples, special_tokens, padding):
    """Return what is worth knowing about the data, as JSON values.

    splits: rows with `hash` and the texts; examples: the same, tokenised (see tokens.encode); special_tokens: in each
    example; padding: its share of what a step computes. The other shares are of rows, `unknown` and
    `tokens_per_character` of tokens of the text.
    """
    facts = {"splits": {}, "label_variants": label_variants(task)}
    facts["duplicates"] = {name: duplicates(splits["train"], splits[name]) for name in splits if name != "train"}
    for name, rows in examples.items():
        full, length = column_array(rows, "full_length"), column_array(rows, "length")
        text_tokens = max(1, int((full - special_tokens).sum()))
        facts["splits"][name] = {
            "rows": len(rows),
            "labels": label_counts(task, column_array(rows, "label")),
            "tokens": {
                "median": float(np.median(full)),
                "p95": float(np.percentile(full, 95)),
                "longest": int(full.max()),
            },
            "truncated": float((full > length).mean()),
            "unknown": int(column_array(rows, "unknown").sum()) / text_tokens,
            "tokens_per_character": text_tokens / max(1, int(column_array(rows, "characters").sum())),
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


def text_group_ids(*splits):
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
    texts, labels = text_group_ids(rows), column_array(rows, "label").reshape(len(rows), -1)
    order = np.argsort(texts, kind="stable")
    texts, labels = texts[order], labels[order]
    different = (texts[1:] == texts[:-1]) & (labels[1:] != labels[:-1]).any(axis=1)
    position = int(order[1:][different][0]) if different.any() else None
    return {"texts": len(np.unique(texts[1:][different])), "position": position}


def duplicates(train, rows):
    """Return {"rows": number of rows whose texts are in train too, "share", "position": one of them, or None}."""
    texts = text_group_ids(train, rows)
    found = np.flatnonzero(np.isin(texts[len(train) :], texts[: len(train)]))
    return {"rows": len(found), "share": len(found) / len(rows), "position": int(found[0]) if len(found) else None}


def is_chinese(texts):
    """Return whether most letters of the texts are Chinese characters."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > len(letters) / 2


def log_data_facts(task, splits, examples, tokenizer, padding):
    """Log the facts of the data, and what may be wrong with them; return the facts (see data_facts)."""
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
    data = data_facts(task, splits, examples, special, padding)
    for name, of_split in data["splits"].items():
        log.info(f"{name}: {_format_split(task, of_split)}")
    if padding:
        log.info(f"padding: {padding:.1%} of what a step computes")
    for warning in _data_warnings(task, splits, data):
        log.warning(f"WARNING: {warning}")
    return data


def _format_split(task, of_split):
    """Return the facts of one split in words."""
    rows, tokens, labels = of_split["rows"], of_split["tokens"], list(of_split["labels"].items())
    if task.is_regression:
        words = ", ".join(f"{what} {value:.2f}" for what, value in labels)
    else:
        words = ", ".join(f"{label} {number:,} ({number / rows:.1%})" for label, number in labels[:10])
    return (
        f"{rows:,} rows | labels: {words} | tokens: median {tokens['median']:.0f}, 95 % up to {tokens['p95']:.0f}, "
        f"longest {tokens['longest']}; {of_split['truncated']:.1%} of the texts cut, {of_split['unknown']:.2%} of the "
        f"tokens unknown, {of_split['tokens_per_character']:.2f} a character"
    )


def _data_warnings(task, splits, data):
    """Yield in words what may be wrong with the data."""

    def example(split, row):
        return repr(" / ".join(splits[split][row][column] for column in task.text)[:80])

    of_train = data["splits"]["train"]
    if of_train["unknown"] > 0.2:
        chinese = is_chinese(splits["train"][:1000][task.text[0]])
        better = "google-bert/bert-base-chinese" if chinese else "FacebookAI/xlm-roberta-base"
        unknown = f"{of_train['unknown']:.0%} OF THE TOKENS ARE UNKNOWN"
        yield f"THE TOKENIZER DOES NOT KNOW THIS LANGUAGE: {unknown}. The model cannot read them; try --model {better}"
    elif of_train["unknown"] > 0.01:
        yield f"{of_train['unknown']:.1%} of the tokens are unknown to the tokenizer: does the model fit the language?"
    for variants in data["label_variants"]:
        yield f"labels that differ only in case or blanks: {', '.join(map(repr, variants))}; one class each"
    for name, of_split in data["splits"].items():
        found = of_split["conflicts"]
        if found["texts"]:
            row = example(name, found["position"])
            yield f"{name}: {found['texts']} texts occur with different labels, such as {row}"
    for name, found in data["duplicates"].items():
        if found["rows"]:
            row = example(name, found["position"])
            words = f"{found['rows']} of {len(splits[name])} rows of {name} ({found['share']:.1%}) are in train too"
            yield f"{words}: its scores are too good by that; such as {row}"
    if words := small_classes_warning(task, of_train["labels"]):
        yield words


def small_classes_warning(task, counts):
    """Return in words which classes have few rows in train, as facts.label_counts gives them; None where none has."""
    few = [] if task.is_regression else [f"{name} ({rows})" for name, rows in counts.items() if rows < FEW_ROWS]
    words = f"classes with fewer than {FEW_ROWS} rows in train: {', '.join(few[:10])}"
    return f"{words}; methods made for few examples, such as SetFit, are likely better at them" if few else None
