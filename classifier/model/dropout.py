"""Counter-based dropout: masks that do not depend on the number of processes, micro-batches, padding or resumes.

A mask is not drawn from a generator's stream. It is a function of the seed, the step, the example, the place in the
model, the position and the column. An example gets the same mask packed or padded, and a resumed run has no generator
to restore.

It is also cheap. Each (example, position, four columns) has a 64-bit number, scrambled as in splitmix64 (Steele, Lea
and Flood 2014, https://doi.org/10.1145/2714064.2660195) once per step, for all places. A place multiplies it by an odd
number of its own (multiply-shift hashing, Dietzfelbinger et al. 1997, https://doi.org/10.1006/jagm.1997.0873), and each
of the four columns compares 15 of the 64 bits with the rate.
"""

import math

import torch
from torch import nn

GOLDEN = -0x61C8864680B583EB  # 2**64 / golden ratio, odd, as a signed 64-bit number
LANES = 0x0001000100010001  # a 1 in each 16 bits of 64
ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}  # the bits of 1.0


def mix(numbers):
    """Scramble int64 numbers in place, so that one changed bit changes about half of all bits; return them."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, None)):
        # splitmix64 shifts zeros in, torch copies of the sign bit.
        numbers.bitwise_xor_((numbers >> shift).bitwise_and_(2 ** (64 - shift) - 1))
        if factor:
            numbers.mul_(factor)
    return numbers


def signed(number):
    """Return an integer wrapped to the range of int64."""
    return (number + 2**63) % 2**64 - 2**63


class Masks:
    """The dropout masks of a model. Call set_batch before each forward pass."""

    def __init__(self, seed, places):
        self.seed, self.places = seed, places
        self.keys = self.packed = None

    def __getstate__(self):
        """Leave out what is on a device: workers that load batches are sent this object, where they are spawned."""
        return {"seed": self.seed, "places": self.places, "keys": None, "packed": None}

    def set_batch(self, step, ids, device, packed=None):
        """Set the examples of the next forward pass: their ids (examples,), in the order of the micro-batch.

        step: the optimiser step; packed: the packing.PackedBatch, or None where the examples are padded.
        """
        self.packed = packed
        ids = torch.as_tensor(ids, dtype=torch.int64)
        key = mix(torch.tensor([signed(self.seed * 2**32 + step)]))
        self.keys = mix(key + ids * GOLDEN).to(device)
        self.factors = (mix(key - torch.arange(1, self.places + 1) * GOLDEN) | 1).tolist()
        self._numbers = {}

    def is_packed(self, shape):
        """Return whether values of this shape are those of a packed batch's tokens."""
        return self.packed is not None and len(shape) > 2 and tuple(shape[:2]) == (1, self.packed.tokens)

    def numbers(self, shape, examples=slice(None)):
        """Return scrambled numbers for values of this shape, (examples, ..., columns): one for each four columns.

        The middle dimensions are positions, heads and the like. A number depends on the indices along them, not on the
        address in memory, so the width of a batch makes no difference. examples: a slice of the batch.
        """
        numbers, sizes = self.keys[examples], shape[1:-1]
        if self.is_packed(shape):
            numbers = mix(numbers[self.packed.example] + (self.packed.position + 1) * GOLDEN).unsqueeze(0)
            sizes = shape[2:-1]
        for size in (*sizes, -(-shape[-1] // 4)):
            numbers = mix(numbers.unsqueeze(-1) + torch.arange(1, size + 1, device=numbers.device) * GOLDEN)
        return numbers

    def keep(self, shape, place, p, dtype):
        """Return a mask of this shape and type: 0 (drop) with probability p, rounded to 15 bits, else 1."""
        if shape not in self._numbers:
            self._numbers[shape] = self.numbers(shape)
        return self._mask(self._numbers[shape], place, p, dtype)[..., : shape[-1]]

    def keep_weights(self, heads, place, p, dtype):
        """Return the masks of the attention weights (examples, heads, queries, keys) of a packed batch's groups."""
        shapes = [(group.number, heads, group.width, group.width) for group in self.packed.groups]
        if heads not in self._numbers:
            pairs = zip(shapes, (group.examples for group in self.packed.groups), strict=True)
            self._numbers[heads] = torch.cat([self.numbers(shape, examples).flatten() for shape, examples in pairs])
        masks = self._mask(self._numbers[heads], place, p, dtype).split([math.prod(shape) for shape in shapes])
        return [mask.view(shape) for mask, shape in zip(masks, shapes, strict=True)]

    def _mask(self, numbers, place, p, dtype):
        numbers = numbers * self.factors[place]
        numbers.bitwise_xor_(numbers >> 32)  # the lower bits of a product depend on the lower bits alone
        # 15 random bits in each 16. Adding 1 - p carries into the 16th bit where they are at least p.
        numbers.bitwise_and_(0x7FFF * LANES).add_(signed((0x8000 - to_15_bits(p)) * LANES))
        numbers.bitwise_right_shift_(15).bitwise_and_(LANES)
        return numbers.mul_(ONE[dtype]).view(dtype) if dtype in ONE else numbers.view(torch.int16).to(dtype)

    def drop(self, values, place, p):
        """Return values, a fraction p of them set to 0 and the rest scaled to keep the expectation."""
        fits = self.is_packed(values.shape) or len(values) == len(self.keys)
        if not fits or p == 1:  # XLNet has the positions first; see draws_from_torch
            return nn.functional.dropout(values, p)
        return Drop.apply(values, self.keep(tuple(values.shape), place, p, values.dtype), scale(p))


def to_15_bits(p):
    """Return a probability as an integer from 0 to 2**15."""
    return round(p * 2**15)


def scale(p):
    """Return the factor of the values that are kept, which preserves the expectation."""
    return 2**15 / (2**15 - to_15_bits(p))


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
    """Replaces an nn.Dropout."""

    def __init__(self, p, place, masks):
        super().__init__()
        self.p, self.place, self.masks = p, place, masks

    def forward(self, values):
        return self.masks.drop(values, self.place, self.p) if self.training and self.p else values


def install(model, seed):
    """Replace a model's dropout by counter-based dropout; return its Masks. Places are numbered in module order."""
    modules = list(model.named_modules())
    masks = Masks(seed, len(modules))
    for place, (name, module) in enumerate(modules):
        module.counted_dropout = (masks, place)
        if type(module) is nn.Dropout:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Dropout(module.p, place, masks))
    return masks


def uninstall(model):
    """Give a model torch's own dropout again."""
    for name, module in list(model.named_modules()):
        if type(module) is Dropout:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Dropout(module.p).train(module.training))


@torch.no_grad()
def draws_from_torch(model, masks, example):
    """Return whether a training pass still draws from torch's generator: some dropout is in the model's own code.

    example: token ids with their special tokens, which encoder-decoders look for.
    """
    logits, was_training = [], model.training
    ids = torch.tensor([example, example])
    model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            for seed in (0, 1):
                torch.manual_seed(seed)
                masks.set_batch(0, [0, 1], "cpu")
                logits.append(model(input_ids=ids).logits)
    finally:
        model.train(was_training)
    return not torch.equal(*logits)
