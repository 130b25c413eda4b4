"""Looking words up without a new gradient as large as the vocabulary at every step.

The gradient of a table of 30,000 words is zero but for the few hundred that a step uses. torch makes it anew each time;
on a CPU the fresh memory alone costs more than all norms of a small encoder. Here it stays, and the rows that the last
step used are cleared. The optimiser sees the same numbers.
"""

import torch
from accelerate import PartialState
from torch import nn


class Embedding(nn.Embedding):
    """An nn.Embedding that keeps its gradient's memory. Its gradient does not pass through autograd's hooks: not for
    DistributedDataParallel."""

    kept = None  # the gradient, and the ids whose rows are not zero

    def forward(self, ids):
        return Lookup.apply(self.weight, ids, self)

    def add_gradient(self, ids, gradient):
        ids, gradient = ids.flatten(), gradient.flatten(0, -2)
        if self.padding_idx is not None:
            gradient = gradient.masked_fill((ids == self.padding_idx).unsqueeze(1), 0)
        if self.weight.grad is None:
            if self.kept is None:
                self.kept = torch.zeros_like(self.weight), []
            table, used = self.kept
            for before in used:
                if not table[before].isfinite().all():  # scaled by NaN, it is NaN everywhere
                    table.zero_()
                table.index_fill_(0, before, 0)
            used.clear()
            self.weight.grad = table
        self.kept[1].append(ids)
        self.weight.grad.index_add_(0, ids, gradient.to(self.weight.dtype))


class Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, module):
        ctx.ids, ctx.module = ids, module
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, gradient):
        ctx.module.add_gradient(ctx.ids, gradient)
        return None, None, None


def keep_gradient(model):
    """Let a model's table of words keep its gradient, where one process trains on a CPU."""
    table = model.get_input_embeddings()
    if type(table) is nn.Embedding and PartialState().num_processes == 1 and PartialState().device.type == "cpu":
        table.__class__ = Embedding
