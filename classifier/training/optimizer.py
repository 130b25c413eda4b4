"""The optimiser and its schedule: AdamW, with weight decay for matrices alone and smaller steps for lower layers."""

import math

from torch.optim import AdamW
from transformers import get_scheduler

from classifier.messages import log
from classifier.model.models import pretrained_parts


def build_optimizer(model, args):
    """Return AdamW, fused where the device has that. Weight decay is for matrices, not for biases and norm weights.

    With --layerwise_lr_decay D, each layer has D times the learning rate of the one above it, and the embeddings of the
    lowest layer; the head has all of it (Howard and Ruder 2018). The first group's learning rate is the head's.
    """
    groups = []
    for rate, parameters in _parameters_by_rate(model, args.learning_rate, args.layerwise_lr_decay):
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.ndim >= 2]
        vectors = [parameter for parameter in trained if parameter.ndim < 2]
        groups.append({"params": matrices, "weight_decay": args.weight_decay, "lr": rate})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr": rate})
    is_fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps", "xpu")  # others may have none
    return AdamW(groups, args.learning_rate, tuple(args.adam_betas), args.adam_epsilon, fused=is_fused)


def _parameters_by_rate(model, rate, decay):
    """Return [(learning rate, parameters)], the head's first; one entry for all parameters where nothing decays."""
    if decay == 1:
        return [(rate, list(model.parameters()))]
    embeddings, layers = pretrained_parts(model)
    parts, seen = [], set()
    for depth, modules in enumerate([*([layer] for layer in reversed(layers)), embeddings], start=1):
        parameters = [parameter for module in modules for parameter in module.parameters() if parameter not in seen]
        seen.update(parameters)  # a parameter may be shared by two modules
        parts.append((rate * decay**depth, parameters))
    return [(rate, [parameter for parameter in model.parameters() if parameter not in seen]), *parts]


def build_scheduler(optimizer, args, total_steps):
    """Return the schedule of the learning rate over all steps, as transformers has it."""
    warmup_steps = math.ceil(args.warmup_ratio * total_steps) if args.warmup_steps is None else args.warmup_steps
    if warmup_steps > total_steps:
        log.warning(f"WARNING: the warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps")
    return get_scheduler(args.scheduler, optimizer, warmup_steps, total_steps)


def may_step(optimizer, grad_norm):
    """Return whether to take a step: not where the gradient is not finite. A fused AdamW skips such a step itself."""
    if optimizer.defaults["fused"]:  # so that the host need not wait for the number; others refuse found_inf
        optimizer.found_inf = (~grad_norm.isfinite()).float()
        return True
    return bool(grad_norm.isfinite())
