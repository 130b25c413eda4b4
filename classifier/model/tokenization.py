"""From texts to token ids: tokenization, truncation and padding; token tables in the cache."""

from dataclasses import replace

import numpy as np

from classifier.data.cache import cached_table, one_process_at_a_time
from classifier.files import digest
from classifier.messages import BadInput, log


def token_columns(tokenizer):
    """Return the input columns of a model with this tokenizer, apart from attention_mask."""
    return [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]


def encode(task, tokenizer, texts, max_length):
    """Tokenise texts (one list, or two of equal length) and truncate them to max_length; return (columns, facts).

    columns: token_columns, as ragged lists. facts: for each example its `full_length` in tokens before truncation, its
    number of `unknown` tokens and of `characters`.
    Of a pair, tokens are removed from the longer text until both fit. `head_tail` keeps a quarter from the start and
    the rest from the end, the proportion of Sun et al. 2019, https://arxiv.org/abs/1905.05583 (128 and 382 tokens).
    """
    encoded = tokenizer(*texts, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    facts = {
        "full_length": [len(example) for example in ids],
        "unknown": [example.count(tokenizer.unk_token_id) for example in ids],
        "characters": [sum(map(len, example)) for example in zip(*texts, strict=True)],
    }
    for example, length in enumerate(facts["full_length"]):
        if length > max_length:
            keep = _kept_positions(encoded["special_tokens_mask"][example], max_length, task.truncate)
            for name in token_columns(tokenizer):
                encoded[name][example] = [encoded[name][example][position] for position in keep]
    return {name: encoded[name] for name in token_columns(tokenizer)}, facts


def _kept_positions(is_special, max_length, truncate):
    """Return the positions of an example that truncation keeps: max_length of them, with all special tokens."""
    texts, specials = [[]], []  # the positions of each text's tokens; special tokens separate the texts
    for position, special in enumerate(is_special):
        if special:
            specials.append(position)
            texts.append([])
        else:
            texts[-1].append(position)
    texts = [positions for positions in texts if positions]
    numbers = [max_length - len(specials)]
    if len(texts) == 2:
        shorter = int(len(texts[1]) < len(texts[0]))
        half = min(len(texts[shorter]), numbers[0] // 2)
        numbers = [numbers[0] - half, half] if shorter else [half, numbers[0] - half]
    kept = specials
    for positions, number in zip(texts, numbers, strict=True):
        head = {"head": number, "tail": 0, "head_tail": number // 4}[truncate]
        kept = kept + positions[:head] + positions[len(positions) - (number - head) :]
    return sorted(kept)


def padded(examples, pad_token_id, side="right", min_width=1):
    """Return ragged columns of tokens, and their attention_mask, as int64 arrays (examples, longest or min_width).

    side: where padding goes, "right" or "left".
    """
    lengths = np.array([len(ids) for ids in examples["input_ids"]])
    mask = np.arange(max(lengths.max(), min_width)) < lengths[:, None]
    if side == "left":
        mask = mask[:, ::-1]
    inputs = {"attention_mask": mask.astype(np.int64)}
    for name, padding in (("input_ids", pad_token_id), ("token_type_ids", 0)):
        if name in examples:
            inputs[name] = np.full(mask.shape, padding, dtype=np.int64)
            inputs[name][mask] = np.concatenate(examples[name])
    return inputs


def embedding_rows(model):
    """Return the number of token ids that a model has embeddings for, or None where it has no table of them."""
    try:
        return model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):  # CANINE hashes characters
        return None


def largest_id(vocabulary, special_tokens, used=()):
    """Return the largest id of a vocabulary, {token: id}, that inputs are expected to hold. used: ids that they do.

    A special token that no input gets is none of them: a mask token is often published without an embedding, and
    transformers adds <|endoftext|> to any tokenizer of a Qwen2.
    """
    return max(*used, 0, *(number for token, number in vocabulary.items() if token not in special_tokens))


def check_ids(largest, rows):
    """Raise BadInput for texts that hold a special token without an embedding. rows: see embedding_rows."""
    if rows is not None and largest >= rows:
        raise BadInput(
            f"a text holds the token id {largest}, but the model has embeddings for the ids 0 to {rows - 1} only",
            "Remove the tokenizer's special tokens, such as a mask, from the texts: the model cannot read them all.",
        )


def longest_input(model, tokenizer):
    """Return the largest number of tokens that a model has positions for."""
    from torch.nn import Embedding

    limit = getattr(model.config, "max_position_embeddings", None) or 0
    limit = limit if limit > 0 else tokenizer.model_max_length  # XLNet has no limit: -1
    for name, module in model.named_modules():
        # RoBERTa, XLM-R and MPNet count positions from padding_idx + 1.
        if name.endswith("position_embeddings") and isinstance(module, Embedding):
            limit = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return min(limit, tokenizer.model_max_length)


def tokenize(task, rows, fingerprint, model, tokenizer):
    """Return (examples, is_new): a Dataset with the columns and facts of `encode`, `length` and `label`.

    It is cached, keyed by the content of the rows, the tokenizer and the settings. Raises BadInput for a max_length
    that does not fit, and for a token without an embedding.
    """
    import pyarrow as pa

    limit = longest_input(model, tokenizer)
    max_length = task.max_length or limit
    if max_length > limit:
        raise BadInput(f"max_length {max_length} is more than the model's {limit} positions", f"--max_length {limit}")
    specials = tokenizer.num_special_tokens_to_add(pair=len(task.text) == 2)
    if max_length < specials + len(task.text):
        reason = f"--max_length {max_length} leaves no room for text besides {specials} special tokens"
        raise BadInput(reason, "Give a larger one.")
    columns = token_columns(tokenizer)
    label_type = rows.features.arrow_schema.field("label").type
    counts = ["length", "full_length", "unknown", "characters"]
    schema = [(name, pa.list_(pa.int32())) for name in columns] + [(name, pa.int32()) for name in counts]

    def tokens():
        for start_row in range(0, len(rows), 1000):
            batch = rows[start_row : start_row + 1000]
            encoded, facts = encode(task, tokenizer, [batch[column] for column in task.text], max_length)
            lengths = [len(ids) for ids in encoded["input_ids"]]
            yield {**encoded, **facts, "length": lengths, "label": batch["label"]}

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:  # the truncation and padding of its last call would become part of the key
        backend.no_truncation()
        backend.no_padding()
    vocabulary = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    # The order of the labels is part of the key: `label` holds ids.
    settings = [columns, task.text, task.labels, max_length, task.truncate]
    key = digest("tokens", fingerprint, type(tokenizer).__name__, vocabulary, settings)
    examples, is_new = cached_table(key, pa.schema([*schema, ("label", label_type)]), tokens())
    largest = max((int(chunk.values.to_numpy().max()) for chunk in examples.data.column("input_ids").chunks), default=0)
    check_ids(largest, embedding_rows(model))
    return examples, is_new


def tokenize_splits(task, splits, fingerprints, model, tokenizer):
    """Return (task with its max_length filled in, {split: examples}); log what was tokenised and what was cached."""
    with one_process_at_a_time():
        tokenized = {name: tokenize(task, rows, fingerprints[name], model, tokenizer) for name, rows in splits.items()}
    new = [name for name, (_, is_new) in tokenized.items() if is_new]
    log.info(f"tokenised: {', '.join(new)}" if new else "tokens from the cache")
    task = replace(task, max_length=task.max_length or longest_input(model, tokenizer))
    return task, {name: examples for name, (examples, _) in tokenized.items()}
