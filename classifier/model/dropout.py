"""Dropout whose masks do not depend on how the work is divided: among processes, micro-batches, paddings, resumed runs.

A mask is no draw from a generator's stream but a function of what it is for: the seed, the step, the example, the place
in the model, the position and the column. So the same examples meet the same masks in every packer, and a resumed run
has no generator to restore.

It is cheap, too. Each example, position and four columns have a number of 64 bits, scrambled as in splitmix64 (Steele,
Lea and Flood 2014, https://doi.org/10.1145/2714064.2660195), once for all places of a step. A place multiplies it by an
odd number of its own (multiply-shift hashing, Dietzfelbinger et al. 1997, https://doi.org/10.1006/jagm.1997.0873), and
each of the four columns compares 15 of the 64 bits with the rate.
"""

import math

import torch
from torch import nn

GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as a signed 64-bit number
LANES = 0x0001000100010001  # a 1 in each 16 bits of 64
ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}  # the bits of 1.0


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

    def __init__(self, seed, places):
        self.seed, self.places = seed, places
        self.keys = self.packed = None

    def set_batch(self, step, ids, device, packed=None):
        """Say which examples come next: ids (examples,), in the order of the micro-batch, at this optimiser step.

        packed: a packing.PackedBatch where they lie end to end.
        """
        self.packed = packed
        ids = torch.as_tensor(ids, dtype=torch.int64)
        key = mix(torch.tensor([signed(self.seed * 2**32 + step)]))
        self.keys = mix(key + ids * GOLDEN).to(device)
        self.factors = (mix(key - torch.arange(1, self.places + 1) * GOLDEN) | 1).tolist()
        self._numbers = {}

    def is_packed(self, shape):
        """Return whether values of this shape are those of all tokens, laid end to end."""
        return self.packed is not None and len(shape) > 2 and tuple(shape[:2]) == (1, self.packed.tokens)

    def numbers(self, shape, examples=slice(None)):
        """Return scrambled numbers for values of this shape, (examples, ..., columns): one for four columns.

        The middle dimensions are positions in the text, heads, and the like; each number of them counts, not its place
        in memory, so that the width of a batch makes no difference. examples: which of those at hand.
        """
        numbers, sizes = self.keys[examples], shape[1:-1]
        if self.is_packed(shape):
            numbers = mix(numbers[self.packed.example] + (self.packed.position + 1) * GOLDEN).unsqueeze(0)
            sizes = shape[2:-1]
        for size in (*sizes, -(-shape[-1] // 4)):
            numbers = mix(numbers.unsqueeze(-1) + torch.arange(1, size + 1, device=numbers.device) * GOLDEN)
        return numbers

    def keep(self, shape, place, p, dtype):
        """Return a mask of this shape and type: 0, with probability p (to 15 bits), where to drop, else 1."""
        if shape not in self._numbers:
            self._numbers[shape] = self.numbers(shape)
        return self._mask(self._numbers[shape], place, p, dtype)[..., : shape[-1]]

    def keep_weights(self, heads, place, p, dtype):
        """Return the masks of the attention weights (examples, heads, queries, keys) of a row's groups, in one pass."""
        shapes = [(group.number, heads, group.width, group.width) for group in self.packed.groups]
        if heads not in self._numbers:
            numbers = [self.numbers(*of) for of in zip(shapes, (g.examples for g in self.packed.groups), strict=True)]
            self._numbers[heads] = torch.cat([of_group.flatten() for of_group in numbers])
        masks = self._mask(self._numbers[heads], place, p, dtype).split([math.prod(shape) for shape in shapes])
        return [mask.view(shape) for mask, shape in zip(masks, shapes, strict=True)]

    def _mask(self, numbers, place, p, dtype):
        numbers = numbers * self.factors[place]
        numbers.bitwise_xor_(numbers >> 32)  # the lower bits of a product depend on the lower bits alone
        # 15 random bits in each 16; added to this, those that are at least p carry into the 16th.
        numbers.bitwise_and_(0x7FFF * LANES).add_(signed((0x8000 - share_of_bits(p)) * LANES))
        numbers.bitwise_right_shift_(15).bitwise_and_(LANES)
        return numbers.mul_(ONE[dtype]).view(dtype) if dtype in ONE else numbers.view(torch.int16).to(dtype)

    def drop(self, values, place, p):
        """Return values with a share p of them set to 0, and the rest scaled so that the expectation stays."""
        fits = self.is_packed(values.shape) or len(values) == len(self.keys)
        if not fits or p == 1:  # XLNet has the positions first: left to torch, and told by install
            return nn.functional.dropout(values, p)
        return Drop.apply(values, self.keep(tuple(values.shape), place, p, values.dtype), scale(p))


def share_of_bits(p):
    return round(p * 2**15)


def scale(p):
    """Return what the values that stay are multiplied by, so that the expectation stays."""
    return 2**15 / (2**15 - share_of_bits(p))


class Drop(torch.autograd.Function):
    """values * mask * scale, in one pass forward and one backward."""

    @staticmethod
    def forward(ctx, values, mask, scale):
        ctx.save_for_backward(mask)
        ctx.scale = scale
        return torch.addcmul(values.new_zeros(()), values, mask, value=scale)

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return torch.addcmul(gradient.new_zeros(()), gradient, mask, value=ctx.scale), None, None


class Dropout(nn.Module):
    """Takes the place of an nn.Dropout."""

    def __init__(self, p, place, masks):
        super().__init__()
        self.p, self.place, self.masks = p, place, masks

    def forward(self, values):
        return self.masks.drop(values, self.place, self.p) if self.training and self.p else values


def install(model, seed):
    """Let a model drop by masks; return them. Each place in the model has a number, in the order of its modules."""
    modules = list(model.named_modules())
    masks = Masks(seed, len(modules))
    for place, (name, module) in enumerate(modules):
        module.counted_dropout = (masks, place)
        if type(module) is nn.Dropout:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Dropout(module.p, place, masks))
    return masks


@torch.no_grad()
def draws_from_torch(model, masks):
    """Return whether a training pass depends on torch's generator, too: only the model's own code could change that."""
    logits, was_training = [], model.training
    ids = torch.arange(16).reshape(2, 8) % model.get_input_embeddings().num_embeddings
    model.train()
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 1):
            torch.manual_seed(seed)
            masks.set_batch(0, [0, 1], "cpu")
            logits.append(model(input_ids=ids).logits)
    model.train(was_training)
    return not torch.equal(*logits)
