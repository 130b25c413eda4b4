"""From texts to token ids: what a model reads of them, what is cut from one that is too long, how they are padded."""

import numpy as np


def token_columns(tokenizer):
    """Return the columns that a model of this tokenizer reads, besides the mask."""
    return [name for name in ("input_ids", "token_type_ids") if name in tokenizer.model_input_names]


def encode(task, tokenizer, texts, max_length):
    """Tokenise texts (one list, or two of equal length) and cut those above max_length; return (columns, facts).

    columns: token_columns, ragged lists. facts: for each example its `full_length` in tokens before the cut, its number
    of `unknown` tokens and of `characters`.
    Of a pair, tokens are taken from the longer text until both fit. `head_tail` keeps a quarter from the start and the
    rest from the end, the proportion of Sun et al. 2019, https://arxiv.org/abs/1905.05583 (128 and 382 tokens).
    """
    encoded = tokenizer(*texts, return_special_tokens_mask=True)
    ids = encoded["input_ids"]
    facts = {
        "full_length": [len(one) for one in ids],
        "unknown": [one.count(tokenizer.unk_token_id) for one in ids],
        "characters": [sum(map(len, of_example)) for of_example in zip(*texts, strict=True)],
    }
    for example, length in enumerate(facts["full_length"]):
        if length > max_length:
            keep = _kept(encoded["special_tokens_mask"][example], max_length, task.truncate)
            for name in token_columns(tokenizer):
                encoded[name][example] = [encoded[name][example][position] for position in keep]
    return {name: encoded[name] for name in token_columns(tokenizer)}, facts


def _kept(is_special, max_length, truncate):
    """Return the positions that stay of one example: all special tokens, and max_length in all."""
    texts, specials = [[]], []  # the positions of each text's tokens; special tokens lie between the texts
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


def padded(examples, pad_token_id):
    """Return ragged columns of tokens, and their attention_mask, as int64 arrays (examples, longest)."""
    lengths = np.array([len(ids) for ids in examples["input_ids"]])
    mask = np.arange(lengths.max()) < lengths[:, None]
    inputs = {"attention_mask": mask.astype(np.int64)}
    for name, padding in (("input_ids", pad_token_id), ("token_type_ids", 0)):
        if name in examples:
            inputs[name] = np.full(mask.shape, padding, dtype=np.int64)
            inputs[name][mask] = np.concatenate(examples[name])
    return inputs
