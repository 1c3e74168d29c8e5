# SPDX-License-Identifier: Apache-2.0
"""Token difficulty: how close each expert comes to the full MLP, and what that is worth in each layer."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .modeling import DynaMoEForCausalLM
from .modeling.nested_mlp import NestedMLP
from .modeling.difficulty import label_of


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


@torch.no_grad()
def projection_at_every_width(hidden_TH: torch.Tensor, down_DH: torch.Tensor) -> torch.Tensor:
    """
    Projection similarity <O_w, O> / <O, O> of the first w neurons, for every w at once: (T, H), (D, H) -> (T, H).

    With O = W h and g = W^T O, <O_w, O> is the prefix sum of h * g, so one more product gives all widths. For choosing
    where the widths of the experts should lie; a layer with a bias on its down projection is measured without it.
    """
    output_TD = hidden_TH @ down_DH.t()
    gain_TH = output_TD @ down_DH
    return (hidden_TH * gain_TH).cumsum(-1) / output_TD.square().sum(-1, keepdim=True)


@torch.no_grad()
def similarity_profiles(model: DynaMoEForCausalLM, blocks: torch.Tensor, batch_size: int = 4) -> torch.Tensor:
    """Similarities of all tokens in all layers with every earlier layer at full width: (N, S) -> (L, N * S, E) float32."""
    profiles = []
    with model.routing(force_expert=model.config.expert_count - 1, needs_labels=True, records=[]) as routing:
        for batch in tqdm(blocks.split(batch_size), desc="Measuring difficulty", leave=False):
            model.model(batch.to(model.device), use_cache=False)
            profiles.append(torch.stack([record.profile.flatten(0, 1).cpu() for record in routing.records]))
            routing.records.clear()
    return torch.cat(profiles, 1)


def mean_share(profiles_LTE: torch.Tensor, shares_LE: torch.Tensor, sensitivity: float) -> float:
    """Mean share of MLP width when every token follows its label at `sensitivity`."""
    labels_LT = torch.stack([label_of(profile_TE, sensitivity) for profile_TE in profiles_LTE])
    return shares_LE.gather(1, labels_LT).mean().item()


def sensitivity_for(profiles_LTE: torch.Tensor, shares_LE: torch.Tensor, share: float) -> float:
    """The sensitivity at which the labels reach a mean share of MLP width; 1 at most."""
    return sensitivity_at(partial(mean_share, profiles_LTE, shares_LE), share)


def sensitivity_at(share_at: Callable[[float], float], share: float, rounds: int = 40) -> float:
    """The smallest sensitivity, to 2^-rounds, at which `share_at` of it, which rises, is no less than `share`, by bisection; 1 at most."""
    low, high = 0.0, 1.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if share_at(middle) < share else (low, middle)
    return high


def expert_shares(model: DynaMoEForCausalLM) -> torch.Tensor:
    """Width of each expert of each layer as a share of the layer's MLP: (L, E) float32."""
    return torch.tensor([[width / layer.mlp.widths[-1] for width in layer.mlp.widths] for layer in model.model.layers])


def error_weights(model: DynaMoEForCausalLM, blocks: Iterable[torch.Tensor]) -> list[float]:
    """
    c_l: mean over tokens of the squared gradient of the summed LM loss at the output of layer l's MLP, at full width.

    To second order an error d of a layer's output changes the loss by E[(g d)^2] = c_l |d|^2 / D if d points anywhere,
    so this is what makes an error of one layer comparable with the same error of another. Parameters get no gradient, and
    layers are recomputed in backward: memory is that of the model and one layer's activations.
    """
    totals, tokens = torch.zeros(len(model.model.layers), dtype=torch.float64), 0

    def add(index, gradient):
        totals[index] += gradient.double().square().sum().item()

    recompute_layers(model, True)
    try:
        with mlp_gradients(model, add), model.routing(force_expert=model.config.expert_count - 1):
            for block in tqdm(blocks, desc="Measuring gradients", leave=False):
                block = block.view(1, -1).to(model.device)
                logits = model(block, use_cache=False).logits[0, :-1].float()
                torch.nn.functional.cross_entropy(logits, block[0, 1:], reduction="sum").backward()
                tokens += block.numel()
    finally:
        recompute_layers(model, False)
    return (totals / tokens / model.config.hidden_size).tolist()


@contextmanager
def mlp_gradients(model: DynaMoEForCausalLM, see: Callable[[int, torch.Tensor], None]):
    """Inside, each backward pass calls `see(layer, gradient of the output of its MLP)`; parameters get no gradient."""

    def watch(index):
        def hook(module, args, output):
            output.register_hook(lambda gradient: see(index, gradient))

        return hook

    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [layer.mlp.register_forward_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    # Parameters are frozen, so the graph must begin somewhere.
    hooks.append(model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_()))
    model.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in wanted:
            parameter.requires_grad_()


def recompute_layers(model: PreTrainedModel, enable: bool) -> None:
    """Activation checkpointing in evaluation mode: it looks at the layer's own `training` flag, which dropout does not read."""
    model._set_gradient_checkpointing(enable, partial(checkpoint, use_reentrant=False))
    for layer in model.model.layers:
        layer.training = enable
