# SPDX-License-Identifier: Apache-2.0
"""Token difficulty: the label of each token, and what an error of each layer costs in loss."""

from collections.abc import Iterable

import torch
from tqdm.auto import tqdm

from .modeling import DynaMoEForCausalLM
from .modeling.difficulty import label_of
from .modeling.nested_mlp import NestedMLP
from .observe import gradients_of_activations, loss_backward, output_gradients


@torch.no_grad()
def difficulty_labels(mlp: NestedMLP, x: torch.Tensor, sensitivity: float | torch.Tensor) -> torch.Tensor:
    """
    The smallest expert of one layer that is close enough to the full MLP, for each token.

    Args:
        mlp: the layer; its config names the similarity (see `DynaMoEConfig`).
        x: what the MLP reads, (B, S, D).
        sensitivity: theta in (0, 1], a number or (B,).

    Returns:
        (B, S) int64, label = min { e : s_e >= theta }.
    """
    profile = mlp.profile(mlp.hidden(x))
    theta = sensitivity.view(-1, 1).expand(x.shape[:2]).flatten() if isinstance(sensitivity, torch.Tensor) else sensitivity
    return label_of(profile.flatten(0, 1), theta).view(x.shape[:2])


def error_weights(model: DynaMoEForCausalLM, blocks: Iterable[torch.Tensor]) -> list[float]:
    """
    c_l: mean over tokens of the squared gradient of the summed LM loss at the output of layer l's MLP, at full width.

    To second order an error d of a layer's output changes the loss by E[(g d)^2] = c_l |d|^2 / D if d points anywhere,
    so this is what makes an error of one layer comparable with the same error of another.
    """
    mlps = model.nested_mlps
    totals, tokens = torch.zeros(len(mlps), dtype=torch.float64), 0

    def add(index, gradient):
        totals[index] += gradient.double().square().sum().item()

    full_width, blocks = {"force_expert": model.config.expert_count - 1}, list(blocks)
    longest = max((block.numel() for block in blocks), default=0)
    with gradients_of_activations(model, longest), output_gradients(mlps, add), model.routing(**full_width):
        for block in tqdm(blocks, desc="Measuring gradients", leave=False):
            loss_backward(model, block.view(1, -1).to(model.device))
            tokens += block.numel()
    return (totals / tokens / model.config.hidden_size).tolist()
