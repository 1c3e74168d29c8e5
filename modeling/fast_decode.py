# SPDX-License-Identifier: Apache-2.0
"""
The step of a few tokens on a CPU: decide and run in one go, for the case that decoding is made of. It gives what the general way
gives, 4 to 8% of a step of SmolLM2-135M sooner (`dynamoe bench`, rows "decode"): between two turns of a layer the weights of all
others pass through the processor's cache, so that each object looked up, and each kind of call, waits for memory.

To do without it, delete the line that calls it in `NestedMLP.forward`. It steps aside wherever something else is asked for.
"""

import torch
import torch.nn.functional as F

from .routing import Routing, TokenRouter, has_hooks, plain_parameters


FEW = 16  # tokens up to which a mask row by row is cheaper than sorting


def run_few_tokens(mlp, x: torch.Tensor, routing: Routing) -> torch.Tensor | None:
    """A `NestedMLP` on few tokens, (B, S, D) -> (B, S, D), or `None` where the general way must be taken."""
    if torch.compiler.is_compiling():  # first of all: a graph keeps what is asked of its shapes as a limit
        return None
    tokens = x.shape[0] * x.shape[1]
    if tokens > FEW or x.device.type != "cpu" or torch.is_grad_enabled() or mlp.training:
        return None
    if routing.records is not None or routing.needs_labels or routing.route != "router" or routing.temperature is not None:
        return None
    router = mlp._modules["router"]
    if routing.force_expert is not None or router.is_off(routing.sensitivity):
        return None
    own = getattr(type(router), "forward", None) is not TokenRouter.forward  # wrapped, or a rule with a `forward` of its own
    layers = plain_parameters([router._modules.get("input"), router._modules.get("output")], x.device)
    packed = mlp.packed
    tensors = None if packed else mlp.tensors(x)
    if own or layers is None or has_hooks(router) or (packed or tensors) is None:
        return None
    first, second = layers
    hidden = F.silu(F.linear(x.to(first["weight"].dtype), first["weight"], first["bias"]))
    logits = router.logits_of(F.linear(hidden, second["weight"], second["bias"]))
    expert = router.choose(logits, routing.sensitivity)
    thresholds = None if routing.thresholds is None else routing.thresholds[mlp.layer]
    if mlp.meter is not None:
        mlp.meter(x, expert, thresholds)
    if packed is not None:
        return packed.run(x, expert, mlp.widths, thresholds)
    widths = [mlp.widths[index] for index in expert.flatten().tolist()]
    widest = max(widths)
    assert tensors is not None
    prefix = tensors.block(0, widest)
    if thresholds is None:
        hidden = prefix.hidden(x)
    else:
        hidden = thresholds.kept_hidden(prefix.hidden(thresholds.kept_input(x)))
    if min(widths) < widest:
        for row, width in zip(hidden.view(tokens, widest), widths):
            row[width:] = 0
    return prefix.output(hidden)
