"""Padding: batches of examples of different lengths, and the side on which padding changes no answer of a model."""

import torch

from classifier.messages import BadInput, log
from classifier.model.load_errors import format_error
from classifier.model.tokenization import padded


def pad(examples, pad_token_id, side="right", min_width=1):
    """Return the padded columns of examples, tensors (examples, longest or min_width), with attention_mask."""
    columns = padded(examples, pad_token_id, side, min_width)
    return {name: torch.from_numpy(values) for name, values in columns.items()}


def probe_examples(model, tokenizer):
    """Return two examples of different lengths as columns, the longest first."""
    texts = ["one two three, four; five. Six?", "seven"]
    encoded = tokenizer(texts)
    limit = (getattr(model.config, "max_position_embeddings", None) or 0) - 2  # RoBERTa's positions begin at 2
    if 0 < limit < len(encoded["input_ids"][0]):
        encoded = tokenizer(texts, truncation=True, max_length=limit)
    return {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}


def choose_padding_side(model, tokenizer):
    """Return the side on which padding changes no answer: the tokenizer's, or the other one where only that does.

    XLNet's head reads the last token, and GPT-2 counts positions from the left. Where padding matters on both sides
    (FNet has no mask), the tokenizer's is returned with a warning. The model is as transformers made it. Raises
    BadInput for one that cannot compute a text, or texts of different lengths together.
    """
    return probe_padding(model, tokenizer, probe_examples(model, tokenizer))[0]


def probe_padding(model, tokenizer, examples):
    """Return (the side of choose_padding_side, the logits of the examples with padding there)."""
    side, pad_token_id = tokenizer.padding_side, tokenizer.pad_token_id
    single = [{name: [column[number]] for name, column in examples.items()} for number in range(2)]
    logits = {}
    try:
        alone = torch.cat([eval_logits(model, pad(example, pad_token_id)) for example in single])
    except Exception as error:  # a model's code may raise anything
        raise cannot_compute(model, error, "a text") from None
    for candidate in (side, "left" if side == "right" else "right"):
        try:
            logits[candidate] = eval_logits(model, pad(examples, pad_token_id, candidate))
        except Exception as error:
            failure = error
            continue
        if torch.allclose(logits[candidate], alone, rtol=1e-4, atol=1e-5):
            return candidate, logits[candidate]
    if not logits:
        raise cannot_compute(model, failure, "texts of different lengths together")
    log.warning(
        "WARNING: this model's answer to a text depends on the padding, and so on the other texts of its batch; "
        "it is the same each time with --eval_batch_size 1"
    )
    return next(iter(logits.items()))


@torch.no_grad()
def eval_logits(model, inputs):
    """Return a model's logits (examples, outputs) in evaluation mode; its mode is then as it was."""
    was_training = model.training
    model.eval()
    try:
        return model(**inputs).logits
    finally:
        model.train(was_training)


def cannot_compute(model, error, what):
    """Return the BadInput for a model whose forward pass fails."""
    advice = "transformers itself fails with this model and tokenizer. Do they belong together? Try another model."
    if "eos" in str(error):  # encoder-decoders read the last end of a text
        advice = (
            f"Each text must end with the model's end token (eos_token_id {model.config.eos_token_id} in config.json): "
            "use the tokenizer that the model was trained with."
        )
    name = model.name_or_path or f"the {model.config.model_type} model"
    return BadInput(f"{name}: cannot compute {what} ({format_error(error)})", advice)
