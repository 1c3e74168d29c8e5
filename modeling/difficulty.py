# SPDX-License-Identifier: Apache-2.0
"""
Token difficulty: how close the output O_e of each nested expert comes to the output O of the full MLP, for each token.

To add a measure: one function here, one entry in `SIMILARITIES`, one plain loop in the tests' reference.

Shapes: T tokens, D hidden size, E experts. A profile is (T, E) float32, rises along E, and its last column is 1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Errors(NamedTuple):
    """What the measures are made of. What expert e leaves out is O - O_e; <O_e, O> follows as <O, O> - <O - O_e, O>."""

    output_TD: torch.Tensor  # O, float32
    left_out_ETD: torch.Tensor  # O - O_e of all experts but the last, (E - 1, T, D) float32
    energy_T: torch.Tensor  # <O, O>, never 0
    loss_weight: float  # mean squared gradient of the LM loss at the output of this layer's MLP
    widths: Sequence[int]  # neurons of each of the E experts

    @property
    def squared_ET(self) -> torch.Tensor:
        """|O - O_e|^2, (E - 1, T)."""
        return self.left_out_ETD.square().sum(-1)


def loss_weighted(errors: Errors) -> torch.Tensor:
    """1 / (1 + c |O - O_e|^2), c the loss weight of the layer: (E - 1, T)."""
    return 1 / (1 + errors.loss_weight * errors.squared_ET)


def loss_gain(errors: Errors) -> torch.Tensor:
    """1 / (1 + c g_e), g_e what the best wider expert takes off the squared error for each unit of width: (E - 1, T)."""
    return 1 / (1 + errors.loss_weight * best_gain(errors.squared_ET, errors.widths))


def relative_error(errors: Errors) -> torch.Tensor:
    """1 - |O - O_e| / |O|: (E - 1, T)."""
    return 1 - (errors.squared_ET / errors.energy_T).sqrt()


def projection(errors: Errors) -> torch.Tensor:
    """<O_e, O> / <O, O>, the paper's: (E - 1, T)."""
    return (errors.energy_T - (errors.left_out_ETD * errors.output_TD).sum(-1)) / errors.energy_T


def cosine(errors: Errors) -> torch.Tensor:
    """<O_e, O> / (|O_e| |O|): (E - 1, T)."""
    inner_ET = errors.energy_T - (errors.left_out_ETD * errors.output_TD).sum(-1)
    squared_ET = (errors.output_TD - errors.left_out_ETD).square().sum(-1)
    # An expert without neurons has the output 0; what rounding leaves of O - (O - 0) has no direction.
    squared_ET = squared_ET.masked_fill(squared_ET < 1e-10 * errors.energy_T, torch.inf)
    return inner_ET / (squared_ET * errors.energy_T).sqrt()


class Similarity(NamedTuple):
    """One measure of difficulty."""

    measure: Callable[[Errors], torch.Tensor]
    loss_weighted: bool  # whether it uses `Errors.loss_weight`, so that one threshold costs the same loss in every layer


SIMILARITIES = {
    "loss_weighted": Similarity(loss_weighted, True),
    "loss_gain": Similarity(loss_gain, True),
    "projection": Similarity(projection, False),
    "cosine": Similarity(cosine, False),
    "relative_error": Similarity(relative_error, False),
}


def similarity_profile(
    output_TD: torch.Tensor, left_out_ETD: torch.Tensor, similarity: str, loss_weight: float, widths: Sequence[int]
) -> torch.Tensor:
    """
    Similarity of each expert's output to the full one: O (T, D), O - O_e (E - 1, T, D) -> (T, E) float32.

    Each column is the largest so far. That leaves the smallest expert that reaches a threshold the same, and a rising profile
    is one that a router can predict.
    """
    output_TD, left_out_ETD = output_TD.float(), left_out_ETD.float()
    energy_T = output_TD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    errors = Errors(output_TD, left_out_ETD, energy_T, loss_weight, widths)
    profile_ET = SIMILARITIES[similarity].measure(errors).clamp(max=1).cummax(0).values
    return torch.cat([profile_ET, torch.ones_like(energy_T)[None]]).t()


def left_out(widths: Sequence[int], block: Callable[[int, int], torch.Tensor]) -> list[torch.Tensor]:
    """
    What each expert but the last leaves out of the output, E - 1 tensors: the blocks that each adds, summed from the last one down.
    `block(low, high)` is the output of the neurons between.
    """
    found: list[torch.Tensor] = []
    for low, high in reversed(list(zip(widths, widths[1:]))):
        found.append(block(low, high) if not found else found[-1] + block(low, high))
    return found[::-1]


def best_gain(error_ET: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """
    What the best wider expert takes off the error, for each unit of width that it adds.

    The smallest expert that no wider one beats by more than lambda a unit of width is the one with the least
    error + lambda * width. A threshold on this gain therefore minimises the sum of errors at a mean width: it picks points
    of the lower convex hull of (width, error).

    Args:
        error_ET: errors of all experts but the last, whose error is 0: (E - 1, T).
        widths: E widths, in any unit.

    Returns:
        (E - 1, T), per full width.
    """
    error_ET, full = F.pad(error_ET, (0, 0, 0, 1)), widths[-1]
    gains = [error_ET[:0]]
    for index, width in enumerate(widths[:-1]):
        added = torch.tensor([(other - width) / full for other in widths[index + 1 :]], device=error_ET.device)
        gains.append(((error_ET[index] - error_ET[index + 1 :]) / added[:, None]).max(0, keepdim=True).values)
    return torch.cat(gains).clamp_min(0)


def label_of(profile: torch.Tensor, sensitivity: float | torch.Tensor) -> torch.Tensor:
    """The smallest expert whose similarity reaches the sensitivity: (T, ..., E), a number or (T,) -> (T, ...) int64."""
    if isinstance(sensitivity, torch.Tensor):
        sensitivity = sensitivity.view(-1, *[1] * (profile.ndim - 1))
    return (profile[..., :-1] < sensitivity).sum(-1)  # the profile rises, so this counts the experts that fall short
