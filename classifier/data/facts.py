"""Facts about the data before a training: labels, lengths, duplicates, conflicting labels; logged with warnings."""

import numpy as np

from classifier.data.cache import arrow_column, column_array
from classifier.messages import MOST_NAMES, format_name, join_some, log

FEW_ROWS = 16  # rows of a class; below this, few-shot methods are likely better than fine-tuning


def data_facts(task, splits, examples, special_tokens, padding):
    """Return statistics of the data, as JSON values.

    splits: {name: rows with `hash` and the texts}; examples: the same, tokenised (tokenization.encode); special_tokens:
    their number in an example; padding: the fraction of the tokens that a step computes. `truncated` and `share` are
    fractions of rows, `unknown` is one of the texts' tokens.
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
    """Return {label name: rows}, in regression {"min", "mean", "max"} of the values; unlabelled rows do not count."""
    if task.is_regression:
        labels = labels[np.isfinite(labels)]
        return {name: float(getattr(labels, name)()) for name in ("min", "mean", "max")} if len(labels) else {}
    is_in_class = labels == 1 if labels.ndim == 2 else labels[:, None] == np.arange(len(task.labels))
    return dict(zip(task.labels, is_in_class.sum(axis=0).tolist(), strict=True))


def label_variants(task):
    """Return lists of label names that differ only in case and whitespace, such as "Positive" and "positive "."""
    names = {}
    for name in [] if task.is_regression else task.labels:
        names.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [variants for variants in names.values() if len(variants) > 1]


def text_group_ids(*splits):
    """Return an array (rows of all splits, concatenated) in which rows of equal texts have equal numbers.

    It sorts the 16-byte hashes with NumPy: a hash table of a million texts would take several times the memory.
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
    """Return {"texts": number of texts with different labels, "position": the row of one of them, or None}."""
    texts, labels = text_group_ids(rows), column_array(rows, "label").reshape(len(rows), -1)
    order = np.argsort(texts, kind="stable")
    texts, labels = texts[order], labels[order]
    different = (texts[1:] == texts[:-1]) & (labels[1:] != labels[:-1]).any(axis=1)
    position = int(order[1:][different][0]) if different.any() else None
    return {"texts": len(np.unique(texts[1:][different])), "position": position}


def duplicates(train, rows):
    """Return {"rows": number of rows that are in train too, "share": of all rows, "position": the first, or None}."""
    texts = text_group_ids(train, rows)
    repeated = np.flatnonzero(np.isin(texts[len(train) :], texts[: len(train)]))
    position = int(repeated[0]) if len(repeated) else None
    return {"rows": len(repeated), "share": len(repeated) / len(rows), "position": position}


def is_chinese(texts):
    """Return whether most letters of the texts are Chinese characters."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    return sum("\u4e00" <= letter <= "\u9fff" for letter in letters) > len(letters) / 2


def log_data_facts(task, splits, examples, tokenizer, padding):
    """Log the facts of the data and warnings about it; return the facts (see data_facts)."""
    special_tokens = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
    facts = data_facts(task, splits, examples, special_tokens, padding)
    for name, split_facts in facts["splits"].items():
        log.info(f"{name}: {_format_split(task, split_facts)}")
    if padding:
        log.info(f"padding: {padding:.1%} of what a step computes")
    for warning in _data_warnings(task, splits, facts):
        log.warning(f"WARNING: {warning}")
    return facts


def _format_split(task, facts):
    """Return the facts of one split as a line of the log."""
    rows, tokens, labels = facts["rows"], facts["tokens"], facts["labels"]
    if task.is_regression:
        text = ", ".join(f"{name} {value:.2f}" for name, value in labels.items())
    else:
        counts = largest_first(labels).items()
        text = join_some(f"{format_name(label)} {number:,} ({number / rows:.1%})" for label, number in counts)
    return (
        f"{rows:,} rows | labels: {text} | tokens: median {tokens['median']:.0f}, 95 % up to {tokens['p95']:.0f}, "
        f"longest {tokens['longest']}; {facts['truncated']:.1%} of texts truncated, {facts['unknown']:.2%} of tokens "
        f"unknown, {facts['tokens_per_character']:.2f} tokens per character"
    )


def largest_first(counts):
    """Return {label name: rows} with the largest classes first where not all are listed, else as it is."""
    return counts if len(counts) <= MOST_NAMES else dict(sorted(counts.items(), key=lambda item: -item[1]))


def _data_warnings(task, splits, facts):
    """Yield warnings about the data."""

    def quote(split, position):
        return repr(" / ".join(splits[split][position][column] for column in task.text)[:80])

    train_facts = facts["splits"]["train"]
    if train_facts["unknown"] > 0.2:
        chinese = is_chinese(splits["train"][:1000][task.text[0]])
        better = "google-bert/bert-base-chinese" if chinese else "FacebookAI/xlm-roberta-base"
        unknown = f"{train_facts['unknown']:.0%} OF THE TOKENS ARE UNKNOWN"
        yield f"THE TOKENIZER DOES NOT KNOW THIS LANGUAGE: {unknown}. The model cannot read them; try --model {better}"
    elif train_facts["unknown"] > 0.01:
        yield f"{train_facts['unknown']:.1%} of the tokens are unknown to the tokenizer: is this the right model?"
    if all_variants := facts["label_variants"]:
        names = join_some(" and ".join(format_name(repr(name)) for name in variants) for variants in all_variants)
        yield f"labels that differ only in case or whitespace: {names}; each is its own class"
    for name, split_facts in facts["splits"].items():
        conflicting = split_facts["conflicts"]
        if conflicting["texts"]:
            example = quote(name, conflicting["position"])
            yield f"{name}: {conflicting['texts']} texts occur with different labels, such as {example}"
    for name, repeated in facts["duplicates"].items():
        if repeated["rows"]:
            rows = f"{repeated['rows']} of {len(splits[name])} rows of {name} ({repeated['share']:.1%})"
            yield f"{rows} are in train too, which inflates its scores; such as {quote(name, repeated['position'])}"
    if warning := small_classes_warning(task, train_facts["labels"]):
        yield warning


def small_classes_warning(task, counts):
    """Return a warning about classes with few rows in train, or None. counts: those of label_counts."""
    counts = {} if task.is_regression else counts
    smallest = sorted(counts.items(), key=lambda item: item[1])
    small = [f"{format_name(name)} ({rows})" for name, rows in smallest if rows < FEW_ROWS]
    if small:
        return (
            f"classes with fewer than {FEW_ROWS} rows in train: {join_some(small)}; "
            "few-shot methods, such as SetFit, are likely better at them"
        )
