# SPDX-License-Identifier: Apache-2.0
"""How a nested MLP is computed, on plain tensors: prefixes for one width, a staircase for many, similarities for all.

Shapes: T tokens, D hidden size, H MLP width, E experts. Expert e is the first `widths[e]` of the H neurons.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Projections(NamedTuple):
    """Weights of one MLP, down(act(gate(x)) * up(x)), or down(act(up(x))) where `gate` is None. Views, never copies."""

    gate: torch.Tensor | None  # (H, D)
    gate_bias: torch.Tensor | None  # (H,)
    up: torch.Tensor  # (H, D)
    up_bias: torch.Tensor | None  # (H,)
    down: torch.Tensor  # (D, H)
    down_bias: torch.Tensor | None  # (D,)
    act: Callable[[torch.Tensor], torch.Tensor]

    def hidden(self, x_TD, low, high):
        """Activations of neurons `low` to `high`, the input of the down projection: (T, high - low)."""

        def project(weight, bias):
            return F.linear(x_TD, weight[low:high], None if bias is None else bias[low:high])

        up = project(self.up, self.up_bias)
        return self.act(up) if self.gate is None else self.act(project(self.gate, self.gate_bias)) * up


def prefix_mlp(x_TD, weights, width):
    """The first `width` neurons for every token: (T, D) -> (T, D). Memory traffic and FLOPs fall with the width."""
    return F.linear(weights.hidden(x_TD, 0, width), weights.down[:, :width], weights.down_bias)


def staircase_mlp(x_TD, expert_T, weights, widths):
    """
    Each token through its own prefix: (T, D), (T,) int -> (T, D).

    Tokens are sorted by expert, largest first; the block of neurons that expert e adds to expert e-1 then serves a
    prefix of the sorted tokens. So there are E dense products, each weight is read at most once, and nothing is padded.
    """
    order_T = torch.argsort(expert_T, descending=True, stable=True)
    counts = torch.bincount(expert_T, minlength=len(widths)).tolist()
    if max(counts) == len(order_T):
        return prefix_mlp(x_TD, weights, widths[counts.index(len(order_T))])
    x_TD = x_TD[order_T]
    y_TD = torch.zeros_like(x_TD) if weights.down_bias is None else weights.down_bias.expand_as(x_TD).clone()
    low, served = 0, len(order_T)
    for count, high in zip(counts, widths):
        if high > low and served:
            y_TD[:served].addmm_(weights.hidden(x_TD[:served], low, high), weights.down[:, low:high].t())
        low, served = high, served - count
    return torch.empty_like(y_TD).index_copy(0, order_T, y_TD)


def similarity_profile(output_TD, tail_ETD, similarity, error_weight=None):
    """
    How close each expert's output comes to the full one: (T, D), (E-1, T, D) -> (T, E), float32, rising, last column 1.

    `tail_ETD[e]` is O - O_e, what expert e leaves out; all similarities follow from it, with <O_e, O> = <O, O> -
    <O - O_e, O>. Each column is the largest so far: the smallest expert whose similarity reaches a threshold
    is the same, and a rising profile is one that a router can predict.
    """
    output_TD, tail_ETD = output_TD.float(), tail_ETD.float()
    energy_T = output_TD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    if similarity == "loss_weighted":
        profile_ET = 1 / (1 + error_weight * tail_ETD.square().sum(-1))
    elif similarity == "relative_error":
        profile_ET = 1 - (tail_ETD.square().sum(-1) / energy_T).sqrt()
    else:
        inner_ET = energy_T - (tail_ETD * output_TD).sum(-1)
        if similarity == "cosine":
            # What is left of a null expert's O - (O - O_e) is rounding, and has no direction.
            norm_ET = (output_TD - tail_ETD).square().sum(-1)
            norm_ET = norm_ET.masked_fill(norm_ET < 1e-10 * energy_T, torch.inf)
            profile_ET = inner_ET / (norm_ET * energy_T).sqrt()
        else:
            profile_ET = inner_ET / energy_T
    profile_ET = profile_ET.clamp(max=1).cummax(0).values
    return torch.cat([profile_ET, torch.ones_like(energy_T)[None]]).t()


def label_of(profile_TE, sensitivity):
    """min { e : s_e >= theta }: (T, E), a number or (T,) -> (T,) int64."""
    if isinstance(sensitivity, torch.Tensor):
        sensitivity = sensitivity[:, None]
    return (profile_TE[:, :-1] < sensitivity).sum(-1)  # the profile rises, so this counts the experts that fall short
