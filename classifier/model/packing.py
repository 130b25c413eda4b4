"""Examples laid end to end: no work on padding, and the numbers of the padded model.

A micro-batch is one row of the tokens of all its examples, so that linear layers, norms and activations see real tokens
alone. Three parts make that right: attention, which sees each example by itself (attend); position ids that begin
anew with each example; and heads, which read the first token of each row: where the encoder ends, the first tokens of
the examples become rows. A model that needs more than that is found out by `agrees`, and runs padded.
"""

from functools import partial

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from classifier.messages import log
from classifier.model.dropout import scale
from classifier.model.tokenization import padded

GROUP_LIMIT = 2**19  # attention weights in a group, where it has more than one example: what a core's cache holds
LONG = 96  # tokens from which on torch's own attention is faster on a CPU, where nothing is dropped


class LengthGroup:
    """Examples of like length that lie side by side in the row; in attention, a rectangle (examples, width)."""

    def __init__(self, examples, lengths, first_slot, device):
        self.examples, self.number = examples, len(lengths)
        self.width = -(-int(lengths[0]) // 8) * 8  # the longest comes first; see rounded
        self.first_slot, self.slots = first_slot, self.number * self.width
        self.is_real = np.arange(self.width) < lengths[:, None]
        self.device = device
        self._forbidden = {}

    def forbidden(self, heads, window, dtype):
        """Return what is added to the weights so that a query sees no padding, and no key as far as `window`; or None.

        Shape (examples x heads, queries or 1, keys).
        """
        name = heads, window, dtype
        if name not in self._forbidden:
            allowed = self.is_real[:, None, None, :]
            if window is not None and self.width > window:
                position = np.arange(self.width)
                allowed = allowed & (abs(position[:, None] - position) < window)
            is_forbidden = torch.from_numpy(~allowed).to(self.device)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
            mask.masked_fill_(is_forbidden, torch.finfo(dtype).min)
            self._forbidden[name] = None if allowed.all() else mask.expand(-1, heads, -1, -1).flatten(0, 1)
        return self._forbidden[name]


class PackedBatch:
    """How the examples of a micro-batch lie end to end: `example` and `position` of each token, groups of examples.

    lengths: (examples,), longest first; heads: of the model's attention.
    """

    def __init__(self, lengths, heads, device):
        lengths = np.asarray(lengths)
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.tokens = round_up(int(lengths.sum()))
        filling = np.zeros(self.tokens - lengths.sum(), dtype=np.int64)
        example = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(lengths.sum()) - self.starts[example]
        self.first_tokens = torch.from_numpy(self.starts).to(device)
        self.example = torch.from_numpy(np.concatenate([example, filling])).to(device)
        self.position = torch.from_numpy(np.concatenate([position, filling])).to(device)
        self.real_tokens, self.device = len(example), device
        self.calls = 0  # of attention
        self.groups, first, slot = [], 0, 0
        while first < len(lengths):
            # A power of two, for the same reason as `rounded`.
            number = min(len(lengths) - first, max(1, GROUP_LIMIT // (int(lengths[first]) ** 2 * heads)))
            last = first + 2 ** (number.bit_length() - 1)
            self.groups.append(LengthGroup(slice(first, last), lengths[first:last], slot, device))
            first, slot = last, slot + self.groups[-1].slots
        self.width = self.groups[0].width  # the largest
        self._indices = {}

    def indices(self, heads):
        """Return how rows of (tokens x heads) become rows of (groups x examples x heads x positions), and back: for
        each of the two which row is taken, and which of the result are filling."""
        if heads not in self._indices:
            taken, empty, head = [], [], np.arange(heads)[:, None]
            back = np.zeros(self.tokens * heads, dtype=np.int64)
            for group in self.groups:
                tokens = np.where(group.is_real, self.starts[group.examples][:, None] + np.arange(group.width), 0)
                rows = tokens[:, None, :] * heads + head  # (examples, heads, positions)
                is_real = np.broadcast_to(group.is_real[:, None, :], rows.shape)
                slots = np.arange(rows.size).reshape(rows.shape) + group.first_slot * heads
                back[rows[is_real]] = slots[is_real]
                taken.append(rows.reshape(-1))
                empty.append(slots[~is_real])
            beyond = np.arange(self.real_tokens * heads, self.tokens * heads)
            indices = np.concatenate(taken), np.concatenate(empty), back, beyond
            self._indices[heads] = [torch.from_numpy(index).to(self.device) for index in indices]
        return self._indices[heads]


class GatherRows(torch.autograd.Function):
    """rows[index]. What is taken more than once, or as filling, has no gradient there: so the gradient is a look-up,
    too (`back`), with 0 in the rows `filling`."""

    @staticmethod
    def forward(ctx, rows, index, back, filling):
        ctx.back, ctx.filling = back, filling
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.back).index_fill_(0, ctx.filling, 0), None, None, None


class ExplicitAttention(torch.autograd.Function):
    """softmax(query @ key.T * scaling + added) * mask * scale @ value, without steps that autograd would keep.

    query, key, value: (examples x heads, width, size); added: broadcast to the weights (examples x heads, width,
    width), or None; mask: of the weights' shape, see dropout.Masks.keep, or None.
    """

    @staticmethod
    def forward(ctx, query, key, value, added, mask, scaling, scale):
        if added is None:
            weights = torch.baddbmm(query.new_zeros(()), query, key.mT, beta=0, alpha=scaling)
        else:
            weights = torch.baddbmm(added.expand(-1, *query.shape[1:2], -1), query, key.mT, alpha=scaling)
        # In bf16 a softmax over any number but a multiple of 32 is slow on a CPU, and less exact.
        weights = weights.softmax(-1, dtype=torch.promote_types(weights.dtype, torch.float32)).to(weights.dtype)
        ctx.save_for_backward(query, key, value, weights, mask)
        ctx.scaling, ctx.scale = scaling, scale
        return _product(weights if mask is None else weights * mask, value, scale)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, weights, mask = ctx.saved_tensors
        of_value = _product((weights if mask is None else weights * mask).mT, gradient, ctx.scale)
        of_weights = _product(gradient, value.mT, ctx.scale)
        if mask is not None:
            of_weights.mul_(mask)
        of_weights = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = _product(of_weights, key, ctx.scaling)
        of_key = _product(of_weights.mT, query, ctx.scaling)
        return of_query, of_key, of_value, of_weights if ctx.needs_input_grad[3] else None, None, None, None


def _product(one, other, factor):
    return torch.baddbmm(one.new_zeros(()), one, other, beta=0, alpha=factor)


def packed_attention(packed, query, key, value, scaling, window=None, bias=None, keep=None, scale=1.0):
    """Attention of each example to itself: (tokens, heads, size) three times to the same shape.

    window: how far a query sees, exclusive, or None; bias: (1, heads, width, width) of the longest example, added to
    the weights of each one, or None; keep(heads, dtype): the masks of the groups' weights (see dropout.Masks), and
    `scale` what the output is multiplied by; None: no dropout.
    """
    heads, size = query.shape[1:]
    taken, empty, back, beyond = packed.indices(heads)
    parts = [group.number * heads * group.width for group in packed.groups]
    query, key, value = (
        GatherRows.apply(values.reshape(-1, size), taken, back, beyond).split(parts) for values in (query, key, value)
    )
    masks = keep(heads, value[0].dtype) if keep else [None] * len(parts)
    outputs = []
    for group, mask, *inputs in zip(packed.groups, masks, query, key, value, strict=True):
        shape = (group.number, heads, group.width)
        added = group.forbidden(heads, window, value[0].dtype)
        if keep is None and bias is None and (group.width >= LONG or value[0].device.type != "cpu"):
            inputs = [values.view(*shape, size) for values in inputs]
            added = None if added is None else added.unflatten(0, shape[:2])
            output = scaled_dot_product_attention(*inputs, added, scale=scaling)
        else:
            if bias is not None:
                part = bias[..., : group.width, : group.width].expand(group.number, -1, -1, -1).flatten(0, 1)
                added = part if added is None else added + part
            inputs = [values.view(-1, group.width, size) for values in inputs]
            mask = None if mask is None else mask.flatten(0, 1)
            output = ExplicitAttention.apply(*inputs, added, mask, scaling, scale)
        outputs.append(output.view(-1, size))
    return GatherRows.apply(torch.cat(outputs), back, taken, empty).view(-1, heads, size)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Attention for transformers' interface: query (examples, heads, tokens, size) to (examples, tokens, heads, size).

    In a row, attention_mask is what is added to each example's weights (`bias` of attend), or None.
    """
    masks, place = module.counted_dropout
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if masks.packed is not None:
        masks.packed.calls += 1
        query, key, value = (values.squeeze(0).transpose(0, 1) for values in (query, key, value))

        def keep(heads, dtype):
            return masks.keep_weights(heads, place, dropout, dtype)

        dropping = (keep, scale(dropout)) if dropout else ()
        window = options.get("sliding_window")
        return packed_attention(masks.packed, query, key, value, scaling, window, attention_mask, *dropping).unsqueeze(
            0
        ), None
    if not dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and getattr(module, "is_causal", False):  # a mask that transformers left to torch
        attention_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = masks.drop(weights.softmax(dim=-1).to(value.dtype), place, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("counted_dropout", attention)


def mask(*sizes, attention_mask=None, **options):
    """Make the mask of padded examples; in a row there is none to make."""
    return None if attention_mask is None else sdpa_mask(*sizes, attention_mask=attention_mask, **options)


AttentionMaskInterface.register("counted_dropout", mask)


def teach_mpnet(model, masks):
    """Let MPNet, which computes attention by itself, ask transformers' interface for it, as other models do.

    Its encoder adds a bias that depends on the distance of two positions alone: in a row, that of the longest example
    holds all others.
    """
    model.config._attn_implementation = "counted_dropout"  # of the mask; set_attn_implementation refuses
    encoder = model.base_model.encoder
    # partial, since a copy of the model must have one of its own
    encoder.compute_position_bias = partial(_bias_of_longest, encoder.compute_position_bias, masks)
    for layer in encoder.layer:
        layer.attention.attn.forward = partial(_mpnet_attention, layer.attention.attn)


def _bias_of_longest(compute, masks, hidden):
    return compute(hidden if masks.packed is None else hidden[:, : masks.packed.width])


def _mpnet_attention(module, hidden, attention_mask=None, position_bias=None, output_attentions=False):
    """Stand in for MPNetSelfAttention.forward."""
    projections = (module.q, module.k, module.v)
    projected = (linear(hidden).unflatten(-1, (-1, module.attention_head_size)) for linear in projections)
    query, key, value = (values.transpose(1, 2) for values in projected)
    bias = position_bias.to(query.dtype)
    if attention_mask is not None:
        bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
    rate = module.dropout.p if module.training else 0.0
    return (module.o(attention(module, query, key, value, bias, dropout=rate)[0].flatten(2)),)


class Packer:
    """How a micro-batch becomes a model's inputs: as one row where `is_packed`, else as rows padded to the longest."""

    def __init__(self, model, masks, pad_token_id):
        self.masks, self.pad_token_id, self.is_packed = masks, pad_token_id, False
        if model.config.model_type == "mpnet":
            teach_mpnet(model, masks)
        self.heads = getattr(model.config, "num_attention_heads", 1)
        model.set_attn_implementation("counted_dropout")
        tables = [part for name, part in model.named_modules() if name.endswith("position_embeddings")]
        padding = getattr(tables[0], "padding_idx", None) if tables else None
        self.first_position = 0 if padding is None else padding + 1  # RoBERTa, XLM-R and MPNet begin there
        base = model.base_model
        encoder = next((part for name, part in base.named_children() if name in ("encoder", "transformer")), base)
        encoder.register_forward_hook(self._first_rows)
        for name, part in base.named_children():
            if "embed" in name:
                part.register_forward_hook(self._short_numbers)

    def collate(self, examples):
        """Return the inputs of examples, given as a dict of lists: tensors on the CPU."""
        return pack(examples, self.first_position) if self.is_packed else pad(examples, self.pad_token_id)

    def set_batch(self, step, ids, lengths, device):
        """Say which examples come next, in the order of the micro-batch."""
        self.masks.set_batch(step, ids, device, PackedBatch(lengths, self.heads, device) if self.is_packed else None)

    def _short_numbers(self, module, given, output):
        """Under autocast to bf16 on a CPU: hand bf16 on from the embeddings; sums of layers then need no casts."""
        is_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return output.bfloat16() if self.is_packed and is_bf16 and output.device.type == "cpu" else output

    def _first_rows(self, module, given, output):
        """Where the encoder ends: make the first token of each example a row, since heads read the first of a row."""
        packed = self.masks.packed
        if packed is None:
            return output
        rows = output[0][0, packed.first_tokens].unsqueeze(1)
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output.last_hidden_state = rows
        return output


def round_up(tokens):
    """Return how many tokens a row of at least so many has: one of few numbers, at most a 32nd (or 31) more.

    On a CPU torch compiles a matrix product for each new shape (oneDNN), which takes longer than to compute it.
    """
    step = max(32, 2 ** (tokens.bit_length() - 6))
    return -(-tokens // step) * step


def pack(examples, first_position):
    """Lay the columns of examples out as one row: a dict of tensors (1, tokens), with the positions.

    The row is filled up (see rounded) with tokens that nothing reads.
    """
    lengths = [len(ids) for ids in examples["input_ids"]]
    positions = [_positions(ids, first_position) for ids in examples["input_ids"]]
    columns = {name: examples[name] for name in ("input_ids", "token_type_ids") if name in examples}
    row = np.zeros((len(columns) + 1, 1, round_up(sum(lengths))), dtype=np.int64)
    for values, column in zip(row, [*columns.values(), positions], strict=True):
        values[0, : sum(lengths)] = np.concatenate(column)
    return {name: torch.from_numpy(values) for name, values in zip([*columns, "position_ids"], row, strict=True)}


def _positions(ids, first_position):
    """Return the positions of an example's tokens, counted as transformers counts them."""
    if first_position == 0:
        return np.arange(len(ids))
    # A padding token that stands in the text itself, as a user may write it, is not counted.
    counts = np.asarray(ids) != first_position - 1
    return np.cumsum(counts) * counts + first_position - 1


def pad(examples, pad_token_id):
    """Lay the columns of examples out as rectangles, as wide as the longest: a dict of tensors."""
    return {name: torch.from_numpy(values) for name, values in padded(examples, pad_token_id).items()}


@torch.no_grad()
def matches_padded(model, packer, examples):
    """Return whether a model gives the same logits for examples in a row as for padded ones, longest first.

    And whether each of its layers has asked for attention: one that does not sees the other examples, too.
    """
    was_training = model.training
    model.eval()
    lengths = [len(ids) for ids in examples["input_ids"]]
    logits = []
    try:
        for packer.is_packed in (False, True):
            packer.set_batch(0, range(len(lengths)), lengths, "cpu")
            logits.append(model(**packer.collate(examples)).logits)
        same = logits[0].shape == logits[1].shape and torch.allclose(*logits, rtol=1e-4, atol=1e-5)
        return same and packer.masks.packed.calls == model.config.num_hidden_layers
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # a model that cannot do with a row
        return False
    finally:
        packer.is_packed, packer.masks.packed = False, None
        model.train(was_training)


def prepare_model(model, tokenizer, seed=0):
    """Prepare a model for examples that lie end to end, and for dropout that is a function of them; return its Layout.

    Two examples are tried both ways. A model that answers otherwise where they lie end to end runs padded, and that is
    said.
    """
    from classifier.model import dropout

    masks = dropout.install(model, seed)
    packer = Packer(model, masks, tokenizer.pad_token_id)
    if dropout.draws_from_torch(model, masks):
        log.warning(
            "WARNING: some of this model's dropout is torch's own: its masks change with the number of processes"
        )
    encoded = tokenizer(["one two three, four; five. Six?", "seven"])
    columns = {name: encoded[name] for name in ("input_ids", "token_type_ids") if name in encoded}
    packer.is_packed = matches_padded(model, packer, columns)
    if not packer.is_packed:
        log.info("this model needs padding: its examples run padded, those of like length together")
    return packer
