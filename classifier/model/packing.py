"""Sequence packing: no computation on padding, and the numbers of the padded model.

A packed batch is one sequence: the tokens of all its examples, concatenated. Linear layers, norms and activations see
real tokens only. Three changes keep the numbers right: attention stays within each example (packed_attention), position
ids restart at each example, and at the end of the encoder the first token of each example becomes a row, which is what
heads read. `matches_padded` finds models that need more than that; they run padded. So does a device on which packed
examples have other numbers (check_on_device).
"""

from functools import partial

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from classifier.messages import log
from classifier.model.dropout import draws_from_torch, install, scale, uninstall
from classifier.model.padding import cannot_compute, eval_logits, pad, probe_examples, probe_padding

GROUP_LIMIT = 2**19  # attention weights in a group of more than one example: they fit into a core's cache
LONG = 96  # tokens from which torch's own attention is faster on a CPU, without dropout

# The difference of logits on a device from a CPU's in fp32 that rounding explains, relative to the largest or, where
# all are close to 0, as a new head's may be, to SMALL_LOGIT. Of a BERT of 12 layers it is 1e-6, in fp16 4e-4, in bf16
# 0.01; where attention ignores its mask, it is 0.2 and more. fp32 on a GPU may be TF32, which rounds as fp16 does.
LOGIT_TOLERANCE = {"no": 0.01, "fp16": 0.02, "bf16": 0.1}
SMALL_LOGIT = 0.1


class LengthGroup:
    """Neighbouring examples of similar length in a packed batch. Attention pads them to (examples, width)."""

    def __init__(self, examples, lengths, first_slot, device):
        self.examples, self.number = examples, len(lengths)
        self.width = -(-int(lengths[0]) // 8) * 8  # the longest comes first; see round_up
        self.first_slot, self.slots = first_slot, self.number * self.width
        self.is_real = np.arange(self.width) < lengths[:, None]
        self.device = device
        self._forbidden = {}

    def forbidden(self, heads, window, dtype):
        """Return the mask added to the attention weights, (examples x heads, queries or 1, keys), or None.

        It hides padding, and keys at a distance of `window` or more.
        """
        key = heads, window, dtype
        if key not in self._forbidden:
            allowed = self.is_real[:, None, None, :]
            if window is not None and self.width > window:
                position = np.arange(self.width)
                allowed = allowed & (abs(position[:, None] - position) < window)
            is_forbidden = torch.from_numpy(~allowed).to(self.device)
            mask = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
            mask.masked_fill_(is_forbidden, torch.finfo(dtype).min)
            self._forbidden[key] = None if allowed.all() else mask.expand(-1, heads, -1, -1).flatten(0, 1)
        return self._forbidden[key]


class PackedBatch:
    """The geometry of a packed batch: the `example` and `position` of each token, and the groups for attention.

    lengths: (examples,), longest first; heads: the number of attention heads.
    """

    def __init__(self, lengths, heads, device):
        lengths = np.asarray(lengths)
        self.starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self.tokens = round_up(int(lengths.sum()))
        filler = np.zeros(self.tokens - lengths.sum(), dtype=np.int64)
        example = np.repeat(np.arange(len(lengths)), lengths)
        position = np.arange(lengths.sum()) - self.starts[example]
        self.first_tokens = torch.from_numpy(self.starts).to(device)
        self.example = torch.from_numpy(np.concatenate([example, filler])).to(device)
        self.position = torch.from_numpy(np.concatenate([position, filler])).to(device)
        self.real_tokens, self.device = len(example), device
        self.calls = 0  # of attention, counted for matches_padded
        self.groups, first, slot = [], 0, 0
        while first < len(lengths):
            # A power of two, for the same reason as in round_up.
            number = min(len(lengths) - first, max(1, GROUP_LIMIT // (int(lengths[first]) ** 2 * heads)))
            last = first + 2 ** (number.bit_length() - 1)
            self.groups.append(LengthGroup(slice(first, last), lengths[first:last], slot, device))
            first, slot = last, slot + self.groups[-1].slots
        self.width = self.groups[0].width  # the largest
        self._indices = {}

    def indices(self, heads):
        """Return the indices that move rows between (tokens x heads) and (groups x examples x heads x positions).

        Four tensors: which rows to gather and which of the result are padding; the same two for the way back.
        """
        if heads not in self._indices:
            gather, padding, head = [], [], np.arange(heads)[:, None]
            back = np.zeros(self.tokens * heads, dtype=np.int64)
            for group in self.groups:
                tokens = np.where(group.is_real, self.starts[group.examples][:, None] + np.arange(group.width), 0)
                rows = tokens[:, None, :] * heads + head  # (examples, heads, positions)
                is_real = np.broadcast_to(group.is_real[:, None, :], rows.shape)
                slots = np.arange(rows.size).reshape(rows.shape) + group.first_slot * heads
                back[rows[is_real]] = slots[is_real]
                gather.append(rows.reshape(-1))
                padding.append(slots[~is_real])
            back_padding = np.arange(self.real_tokens * heads, self.tokens * heads)
            indices = np.concatenate(gather), np.concatenate(padding), back, back_padding
            self._indices[heads] = [torch.from_numpy(index).to(self.device) for index in indices]
        return self._indices[heads]


class GatherRows(torch.autograd.Function):
    """rows[index]. Its gradient is a gather too, not a slow scatter-add: gradient[back], and 0 in the rows `padding`.

    This is right because a row that is gathered more than once, or as padding, gets no gradient there.
    """

    @staticmethod
    def forward(ctx, rows, index, back, padding):
        ctx.back, ctx.padding = back, padding
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.index_select(0, ctx.back).index_fill_(0, ctx.padding, 0), None, None, None


class ExplicitAttention(torch.autograd.Function):
    """softmax(query @ key.T * scaling + added) * mask * scale @ value, keeping fewer tensors than autograd would.

    query, key, value: (examples x heads, width, size); added: broadcast to the weights (examples x heads, width,
    width), or None; mask: the dropout mask of the weights (dropout.Masks.keep), or None.
    """

    @staticmethod
    def forward(ctx, query, key, value, added, mask, scaling, scale):
        if added is None:
            weights = torch.baddbmm(query.new_zeros(()), query, key.mT, beta=0, alpha=scaling)
        else:
            weights = torch.baddbmm(added.expand(-1, *query.shape[1:2], -1), query, key.mT, alpha=scaling)
        # A bf16 softmax is slow on a CPU, and less exact, unless its size is a multiple of 32.
        weights = weights.softmax(-1, dtype=torch.promote_types(weights.dtype, torch.float32)).to(weights.dtype)
        ctx.save_for_backward(query, key, value, weights, mask)
        ctx.scaling, ctx.scale = scaling, scale
        return _product(weights if mask is None else weights * mask, value, scale)

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, weights, mask = ctx.saved_tensors
        grad_value = _product((weights if mask is None else weights * mask).mT, gradient, ctx.scale)
        grad_weights = _product(gradient, value.mT, ctx.scale)
        if mask is not None:
            grad_weights.mul_(mask)
        grad_weights = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        grad_query = _product(grad_weights, key, ctx.scaling)
        grad_key = _product(grad_weights.mT, query, ctx.scaling)
        return grad_query, grad_key, grad_value, grad_weights if ctx.needs_input_grad[3] else None, None, None, None


def _product(left, right, factor):
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=factor)


def packed_attention(packed, query, key, value, scaling, window=None, bias=None, keep=None, scale=1.0):
    """Return the attention of each example to itself. query, key, value and the result: (tokens, heads, size).

    window: how far a query sees, exclusive, or None; bias: (1, heads, width, width) for the longest example, added to
    the weights of every example, or None; keep(heads, dtype): the dropout masks of the groups' weights (see
    dropout.Masks), or None; scale: the factor of the output under dropout.
    """
    heads, size = query.shape[1:]
    gather, padding, back, back_padding = packed.indices(heads)
    parts = [group.number * heads * group.width for group in packed.groups]
    query, key, value = (
        GatherRows.apply(values.reshape(-1, size), gather, back, back_padding).split(parts)
        for values in (query, key, value)
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
        outputs.append(output.reshape(-1, size))  # a kernel of SDPA on CUDA returns heads and positions transposed
    return GatherRows.apply(torch.cat(outputs), back, gather, padding).reshape(-1, heads, size)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Attention for transformers' interface: query (examples, heads, tokens, size) to (examples, tokens, heads, size).

    In a packed batch, attention_mask is the `bias` of packed_attention, or None.
    """
    masks, place = module.counted_dropout
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if masks.packed is not None:
        masks.packed.calls += 1
        query, key, value = (values.squeeze(0).transpose(0, 1) for values in (query, key, value))

        def keep(heads, dtype):
            return masks.keep_weights(heads, place, dropout, dtype)

        dropping = {"keep": keep, "scale": scale(dropout)} if dropout else {}
        window = options.get("sliding_window")
        output = packed_attention(masks.packed, query, key, value, scaling, window, attention_mask, **dropping)
        return output.unsqueeze(0), None
    if not dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    weights = query @ key.transpose(2, 3) * scaling
    if attention_mask is None and getattr(module, "is_causal", False):  # transformers leaves this mask to torch
        attention_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    weights = masks.drop(weights.softmax(dim=-1).to(value.dtype), place, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("counted_dropout", attention)


def mask(*sizes, attention_mask=None, **options):
    """Return the attention mask of padded examples. A packed batch needs none."""
    return None if attention_mask is None else sdpa_mask(*sizes, attention_mask=attention_mask, **options)


AttentionMaskInterface.register("counted_dropout", mask)


def patch_mpnet(model, masks):
    """Route MPNet's own attention code through transformers' attention interface, as other models do.

    Its encoder adds a bias that depends only on the distance of two positions. In a packed batch, the bias of the
    longest example contains those of all others.
    """
    model.config._attn_implementation = "counted_dropout"  # for the mask; set_attn_implementation refuses
    encoder = model.base_model.encoder
    # partial rather than a closure, so that a deep copy of the model gets one of its own
    encoder.compute_position_bias = partial(_bias_of_longest, encoder.compute_position_bias, masks)
    for layer in encoder.layer:
        layer.attention.attn.forward = partial(_mpnet_attention, layer.attention.attn)


def _bias_of_longest(compute, masks, hidden):
    return compute(hidden if masks.packed is None else hidden[:, : masks.packed.width])


def _mpnet_attention(module, hidden, attention_mask=None, position_bias=None, output_attentions=False):
    """Replaces MPNetSelfAttention.forward."""
    projections = (module.q, module.k, module.v)
    projected = (linear(hidden).unflatten(-1, (-1, module.attention_head_size)) for linear in projections)
    query, key, value = (values.transpose(1, 2) for values in projected)
    bias = position_bias.to(query.dtype)
    if attention_mask is not None:
        bias = bias.masked_fill(~attention_mask, torch.finfo(bias.dtype).min)
    rate = module.dropout.p if module.training else 0.0
    return (module.o(attention(module, query, key, value, bias, dropout=rate)[0].flatten(2)),)


class Packer:
    """Collates micro-batches for a model: packed into one sequence where `is_packed`, else padded to the longest."""

    def __init__(self, model, masks, pad_token_id, padding_side="right"):
        self.masks, self.pad_token_id, self.padding_side, self.is_packed = masks, pad_token_id, padding_side, False
        if model.config.model_type == "mpnet":
            patch_mpnet(model, masks)
        self.heads = getattr(model.config, "num_attention_heads", 1)
        self.min_width = getattr(model.config, "downsampling_rate", 1)  # CANINE fails with fewer characters
        model.set_attn_implementation("counted_dropout")
        tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
        padding = getattr(tables[0], "padding_idx", None) if tables else None
        self.first_position = 0 if padding is None else padding + 1  # RoBERTa, XLM-R and MPNet start there
        base = model.base_model
        children = dict(base.named_children())
        encoder = children.get("encoder", children.get("transformer", base))
        encoder.register_forward_hook(self._first_tokens_as_rows)
        for name, module in children.items():
            if "embed" in name:
                module.register_forward_hook(self._embeddings_to_bf16)

    def collate(self, examples):
        """Return the model's inputs, tensors on the CPU, for examples as a dict of columns."""
        if self.is_packed:
            return pack(examples, self.first_position)
        return pad(examples, self.pad_token_id, self.padding_side, self.min_width)

    def set_batch(self, step, ids, lengths, device):
        """Set the examples of the next forward pass, in the order of the micro-batch."""
        self.masks.set_batch(step, ids, device, PackedBatch(lengths, self.heads, device) if self.is_packed else None)

    def _embeddings_to_bf16(self, module, inputs, output):
        """Under bf16 autocast on a CPU, cast the embeddings' output: residual sums then need no casts."""
        is_bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return output.bfloat16() if self.is_packed and is_bf16 and output.device.type == "cpu" else output

    def _first_tokens_as_rows(self, module, inputs, output):
        """At the end of the encoder, make the first token of each example a row: heads read the first of each row."""
        packed = self.masks.packed
        if packed is None:
            return output
        rows = output[0][0, packed.first_tokens].unsqueeze(1)
        if isinstance(output, tuple):
            return (rows, *output[1:])
        output.last_hidden_state = rows
        return output


def round_up(tokens):
    """Return the length of a packed batch of so many tokens: one of few, at most a 32nd (or 31 tokens) longer.

    On a CPU, torch compiles a matrix product for each new shape (oneDNN), which takes longer than computing it.
    """
    step = max(32, 2 ** (tokens.bit_length() - 6))
    return -(-tokens // step) * step


def pack(examples, first_position):
    """Concatenate the columns of examples: a dict of tensors (1, tokens), with position_ids.

    Tokens that nothing reads fill them up to the length of round_up.
    """
    lengths = [len(ids) for ids in examples["input_ids"]]
    positions = [_positions(ids, first_position) for ids in examples["input_ids"]]
    columns = {name: examples[name] for name in ("input_ids", "token_type_ids") if name in examples}
    columns["position_ids"] = positions
    packed = np.zeros((len(columns), 1, round_up(sum(lengths))), dtype=np.int64)
    for values, column in zip(packed, columns.values(), strict=True):
        values[0, : sum(lengths)] = np.concatenate(column)
    return {name: torch.from_numpy(values) for name, values in zip(columns, packed, strict=True)}


def _positions(ids, first_position):
    """Return the positions of an example's tokens, counted as transformers counts them."""
    if first_position == 0:
        return np.arange(len(ids))
    # A user may write the padding token in a text. It is not counted.
    counts = np.asarray(ids) != first_position - 1
    return np.cumsum(counts) * counts + first_position - 1


@torch.no_grad()
def matches_padded(model, packer, examples):
    """Return whether a model gives the same logits for packed examples as for padded ones. examples: longest first.

    Each layer must have called our attention exactly once, too: one that does not may mix examples unnoticed.
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
    except Exception:  # a model that cannot take packed inputs; its code may raise anything
        return False
    finally:
        packer.is_packed, packer.masks.packed = False, None
        model.train(was_training)


def prepare_model(model, tokenizer, seed=0):
    """Change a model in place for packed batches and counter-based dropout; return its Packer.

    Two examples are computed packed and padded. A model that answers differently runs padded, which is logged. One
    whose code does not take our attention and dropout keeps transformers' own. Raises BadInput for one that fails.
    """
    examples = probe_examples(model, tokenizer)
    padding_side, expected = probe_padding(model, tokenizer, examples)
    own_attention = model.config._attn_implementation
    masks = install(model, seed)
    packer = Packer(model, masks, tokenizer.pad_token_id, padding_side)
    packer.probe = examples, expected.numpy()  # for check_on_device
    for is_ours in (True, False):
        if not is_ours:
            uninstall(model)
            model.set_attn_implementation(own_attention)
        try:
            masks.set_batch(0, range(2), "cpu")
            same = torch.allclose(eval_logits(model, packer.collate(examples)), expected, rtol=1e-4, atol=1e-5)
            if is_ours and not same:
                continue
            draws = draws_from_torch(model, masks, examples["input_ids"][0])
            break
        except Exception as error:  # a model's code may raise anything
            if not is_ours:
                raise cannot_compute(model, error, "a text in training") from None
    if draws:
        log.warning(
            "WARNING: some of this model's dropout is torch's own: its masks change with the number of processes"
        )
    packer.is_packed = is_ours and matches_padded(model, packer, examples)
    if not packer.is_packed:
        log.info("this model needs padding: examples of similar length are padded together")
    return packer


def prepare_to_infer(model, tokenizer, accelerator):
    """Return (the model on its device, its Packer), for evaluation and prediction. Raises BadInput as prepare_model."""
    packer = prepare_model(model, tokenizer)
    model = accelerator.prepare_model(model, evaluation_mode=True)
    check_on_device(model, packer, accelerator)
    return model, packer


def check_on_device(model, packer, accelerator):
    """Compare two examples' logits with those of prepare_model, which are a CPU's, padded, in fp32; warn of others.

    model: prepared, without DDP's wrapper. Where packing is at fault on this device or in this precision, the model
    runs padded from here on: torch's attention, for one, has given wrong numbers on Apple's GPUs, without an error
    (github.com/pytorch/pytorch/issues/184180).
    """
    device, precision = accelerator.device, accelerator.mixed_precision
    if device.type == "cpu":  # where prepare_model has compared them
        return
    examples, expected = packer.probe
    size = max(abs(expected).max(), SMALL_LOGIT)
    for is_packed in (True, False) if packer.is_packed else (False,):
        packer.is_packed = is_packed
        packer.set_batch(0, range(2), [len(ids) for ids in examples["input_ids"]], device)
        logits = eval_logits(model, send_to_device(packer.collate(examples), device)).float().cpu().numpy()
        difference = abs(logits - expected).max() / size
        if difference < LOGIT_TOLERANCE[precision]:  # NaN is not below anything
            return
        log.warning(
            f"WARNING: on this device ({device.type}, precision {precision}) the logits of two "
            f"{'packed' if is_packed else 'padded'} examples differ from the CPU's by {difference:.1e} of the largest: "
            + ("examples are padded instead" if is_packed else "its results may be wrong")
        )
