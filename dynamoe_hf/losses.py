# SPDX-License-Identifier: Apache-2.0
"""Losses on hidden states, and on logits that are computed in chunks."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


# Rows of logits in memory at a time: at a vocabulary of 49,152, 100 MB of float32 and as much of their gradient.
LOGIT_ROWS = 512


class LossesInChunks(torch.autograd.Function):
    """
    A weighted sum of losses over rows of hidden states, and the losses themselves, which have no gradient.

    The gradient is computed chunk by chunk in the forward pass, so that at most `LOGIT_ROWS` rows of logits are in memory at a
    time and none is computed twice.

    Args:
        losses: function of (rows of `hidden`, the same rows of each of `others`) -> (K,), sums over these rows.
        weights: (K,).
        hidden, others: (N, D), and further tensors of N rows that get no gradient.
        parameters: tensors that `losses` uses besides, each with `requires_grad`; they get a gradient.

    Returns:
        The weighted sum, a scalar, and the sums (K,).
    """

    @staticmethod
    def forward(ctx, losses, weights, hidden, *tensors):
        # `others` and `parameters` arrive in one list: only parameters require a gradient.
        others = [tensor for tensor in tensors if not tensor.requires_grad]
        ctx.places = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        inputs = [tensor for tensor, needed in zip(tensors, ctx.needs_input_grad[3:]) if needed]
        needs_hidden, total, pieces, sums = 2 in ctx.places, 0.0, [], [torch.zeros_like(each) for each in inputs]
        for chunk, *rest in zip(*(tensor.split(LOGIT_ROWS) for tensor in (hidden, *others))):
            with torch.set_grad_enabled(bool(ctx.places)):
                chunk = chunk.detach().requires_grad_(needs_hidden)
                values = losses(chunk, *rest)
                weighted = values @ weights
            if ctx.places:
                gradients = torch.autograd.grad(weighted, [chunk] * needs_hidden + inputs)
                if needs_hidden:
                    pieces.append(gradients[0])
                for each, gradient in zip(sums, gradients[needs_hidden:]):
                    each += gradient
            total = total + values.detach()
        ctx.save_for_backward(*([torch.cat(pieces)] if needs_hidden else []), *sums)
        ctx.count = 3 + len(tensors)
        ctx.mark_non_differentiable(total)
        return total @ weights, total

    @staticmethod
    def backward(ctx, gradient, _):
        gradients = [None] * ctx.count
        for place, saved in zip(ctx.places, ctx.saved_tensors):
            gradients[place] = gradient * saved
        return tuple(gradients)


@contextmanager
def layer_outputs(layers: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Yields a list that the forward passes inside fill with the outputs (B, S, D) of `layers`, in the order of the calls."""
    states = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output: states.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in layers
    ]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, calls of the modules fire none of their forward hooks."""
    kept = [(module, module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module, *_ in kept:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, before, after in kept:
            module._forward_pre_hooks, module._forward_hooks = before, after


def relative_error(states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    Mean over layers of |h - t|^2 / |t|^2 of each token: L tensors (B, S, D) and as many targets -> (B, S), float32. Where t is 0, as
    it can be at padding, there is no such error, and 0 is taken.
    """
    errors = []
    for state, target in zip(states, targets):
        size = target.float().square().sum(-1)
        # By infinity, not by a small number: its gradient too is 0.
        errors.append((state.float() - target.float()).square().sum(-1) / size.masked_fill(size == 0, torch.inf))
    return torch.stack(errors).mean(0)
