"""Dropout whose masks do not depend on how the work is divided: among processes, micro-batches, paddings, resumed runs.

A mask is no draw from a generator's stream but a function of what it is for: the seed, the step, the example, the place
in the model, the position and the column. So the same examples meet the same masks in every layout, and a resumed run
has no generator to restore. It is cheap, too: a few integer operations on each 64 bits, of which four elements take 16
each. The mixing is that of splitmix64 (Steele, Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195).
"""

import logging

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

log = logging.getLogger("classifier")
GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as a signed 64-bit number


def mix(numbers):
    """Scramble int64 numbers in place, so that numbers that differ in one bit become unlike in all; return them."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        # torch shifts the sign in; the generator is made for zeros.
        numbers.bitwise_xor_((numbers >> shift).bitwise_and_(2 ** (64 - shift) - 1))
        if factor:
            numbers.mul_(factor)
    return numbers


def signed(number):
    """Return a whole number as torch's int64 would hold it, wrapped round."""
    return (number + 2**63) % 2**64 - 2**63


class Masks:
    """The masks of a model's dropout for the examples at hand. `begin` names these before each forward pass."""

    def __init__(self, seed):
        self.seed = seed
        self.keys = None

    def begin(self, step, ids, device):
        """Say which examples come next: ids (examples,), in the order of the micro-batch, at this optimiser step."""
        ids = torch.as_tensor(ids, dtype=torch.int64)
        key = mix(torch.tensor([signed(self.seed * 2**32 + step)]))
        self.keys = mix(key + ids * GOLDEN).to(device)

    def keep(self, shape, place, p):
        """Return a bool mask of this shape, (examples, ..., columns): False, with probability p, where to drop.

        The middle dimensions are positions in the text, heads, and the like; each number of them counts, not its place
        in memory, so that the width of a batch makes no difference.
        """
        bits = mix(self.keys + signed(place * GOLDEN))
        # One number for four columns.
        for size in (*shape[1:-1], -(-shape[-1] // 4)):
            bits = mix(bits.unsqueeze(-1) + torch.arange(1, size + 1, device=bits.device) * GOLDEN)
        lanes = bits.view(torch.int16)[..., : shape[-1]]
        return lanes >= round(p * 2**16) - 2**15

    def drop(self, values, place, p):
        """Return values with a share p of them set to 0, and the rest scaled so that the expectation stays."""
        if len(values) != len(self.keys) or p == 1:  # XLNet has the positions first: left to torch, and told by install
            return nn.functional.dropout(values, p)
        return values * (2**16 / (2**16 - round(p * 2**16))) * self.keep(values.shape, place, p)


class Dropout(nn.Module):
    """Takes the place of an nn.Dropout."""

    def __init__(self, p, place, masks):
        super().__init__()
        self.p, self.place, self.masks = p, place, masks

    def forward(self, values):
        return self.masks.drop(values, self.place, self.p) if self.training and self.p else values


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Attention for transformers' interface: query (examples, heads, tokens, size) to (examples, tokens, heads, size).

    With dropout on the attention weights in explicit products, without it torch's own.
    """
    if not dropout:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    if (groups := getattr(module, "num_key_value_groups", 1)) > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    weights = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is None and getattr(module, "is_causal", False):  # a mask that transformers left to torch
        attention_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, torch.finfo(weights.dtype).min)
    elif attention_mask is not None:
        weights = weights + attention_mask
    masks, place = module.counted_dropout
    weights = masks.drop(weights.softmax(dim=-1).to(value.dtype), place, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("counted_dropout", attention)
AttentionMaskInterface.register("counted_dropout", sdpa_mask)


def install(model, seed):
    """Let a model drop by these masks; return them. Each place in the model has a number, in the order of its modules.

    A model that drops in another way, too, is told in the log: only its own code could change that.
    """
    masks = Masks(seed)
    for place, (name, module) in enumerate(list(model.named_modules()), start=1):
        module.counted_dropout = (masks, place)
        if type(module) is nn.Dropout:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Dropout(module.p, place, masks))
    model.set_attn_implementation("counted_dropout")
    if draws_from_torch(model, masks):
        log.warning(
            "WARNING: some of this model's dropout is torch's own: its masks change with the number of processes"
        )
    return masks


@torch.no_grad()
def draws_from_torch(model, masks):
    """Return whether a training pass depends on torch's generator, too."""
    logits, was_training = [], model.training
    ids = torch.arange(16).reshape(2, 8) % model.get_input_embeddings().num_embeddings
    model.train()
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            masks.begin(0, [0, 1], "cpu")
            logits.append(model(input_ids=ids).logits)
    model.train(was_training)
    return not torch.equal(*logits)
