# SPDX-License-Identifier: Apache-2.0
"""Which neurons of a dense model matter most, and which experts of a mixture must keep all of theirs, measured on text."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .kept_sums import KeptSums
from .modeling.dense_base import mlp_places, weight_of
from .modeling.moe_base import is_mixture, layout_at, rows_by_expert
from .observe import gradients_of_activations, loss_backward


SINK_POSITIONS = 4  # the first tokens of a sequence draw huge activations, whatever they say (attention sinks)
FEW_TOKENS = 16  # of the calibration text: what fewer say of an expert of a mixture is noise, and its neurons keep their order


def _accumulate(dense, blocks, statistic, kept: KeptSums | None, gradients=False):
    """
    Sum of `statistic(hidden (T, H), gradient or None, down weight) -> (H,)` over calibration tokens, for each layer: (H,), or (N, H) for
    the N experts of a mixture, where experts that see fewer than `FEW_TOKENS` have 0. `kept`: where the sums are kept while they grow.
    """
    places = list(mlp_places(dense.base_model))
    layouts = [layout_at(place) for place in places]
    shapes = [(place.mlp.num_experts,) if is_mixture(place.mlp) else () for place in places]
    sizes = zip(shapes, layouts, places)
    scores = [torch.zeros((*shape, layout.width(place.mlp)), dtype=torch.float64) for shape, layout, place in sizes]
    seen = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]

    def watch(index, down, expert, positions, hidden):
        kept = positions >= SINK_POSITIONS

        def add(hidden, gradient):
            hidden, gradient = (None if t is None else t.flatten(0, -2)[kept] for t in (hidden, gradient))
            scores[index][expert] += statistic(hidden.float(), gradient, down).double().cpu()
            seen[index][expert] += len(hidden)

        if gradients:
            values = hidden.detach()
            hidden.register_hook(lambda gradient: add(values, gradient.float()))
        else:
            add(hidden.detach(), None)

    sums = [*scores, *seen]
    done = kept.read(sums) if kept else 0
    left = tqdm(blocks[done:], desc="Ranking neurons", leave=False, initial=done, total=len(blocks))
    with _watched(places, layouts, watch), gradients_of_activations(dense, blocks.shape[1]) if gradients else torch.no_grad():
        for number, block in enumerate(left, done + 1):
            block = block.view(1, -1).to(dense.device)
            loss_backward(dense, block) if gradients else dense.base_model(block, use_cache=False)
            if kept:
                kept.keep(sums, number, last=number == len(blocks))
    return [score if score.ndim == 1 else score * (rows >= FEW_TOKENS)[:, None] for score, rows in zip(scores, seen)]


@contextmanager
def _watched(places, layouts, watch):
    """Inside, `watch(layer, down weight, expert or (), positions (T,), hidden)` sees the activations of one sequence in every MLP."""

    def dense_hook(index, linear, args):
        watch(index, weight_of(linear), (), torch.arange(args[0].shape[-2], device=args[0].device), args[0])

    def mixture(index, experts, layout, x_TD, index_TK, weight_TK):
        y_TD, each = torch.zeros_like(x_TD), index_TK.shape[-1]
        for expert, rows in rows_by_expert(index_TK, experts.num_experts):
            tensors, tokens = layout.tensors(experts, expert), rows // each
            hidden = tensors.hidden(x_TD[tokens])
            watch(index, tensors.down, expert, tokens, hidden)
            y_TD = y_TD.index_add(0, tokens, (tensors.output(hidden) * weight_TK.flatten()[rows, None]).to(y_TD.dtype))
        return y_TD

    hooks = []
    try:
        for index, (place, layout) in enumerate(zip(places, layouts)):
            if is_mixture(place.mlp):
                place.mlp.forward = partial(mixture, index, place.mlp, layout)
            else:
                hooks.append(getattr(place.mlp, layout.down).register_forward_pre_hook(partial(dense_hook, index)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for place in filter(lambda place: is_mixture(place.mlp), places):
            vars(place.mlp).pop("forward", None)


def mean_activation(dense: PreTrainedModel, blocks: torch.Tensor, kept: KeptSums | None = None) -> list[torch.Tensor]:
    """Importance of each neuron: mean |h|, the paper's. Blocks (N, S) -> (H,) for each layer, of a mixture (N, H)."""
    return _accumulate(dense, blocks, lambda hidden, gradient, down: hidden.abs().sum(0), kept)


def normalised_activation(dense: PreTrainedModel, blocks: torch.Tensor, kept: KeptSums | None = None) -> list[torch.Tensor]:
    """Importance of each neuron: |h| times the norm of its down column, as a share of the token's total. (H,) for each layer."""

    def statistic(hidden, gradient, down):
        size = hidden.abs() * down.float().norm(dim=0)
        return (size / size.sum(-1, keepdim=True).clamp_min(1e-12)).sum(0)

    return _accumulate(dense, blocks, statistic, kept)


def taylor(dense: PreTrainedModel, blocks: torch.Tensor, kept: KeptSums | None = None) -> list[torch.Tensor]:
    """Importance of each neuron: mean |h dL/dh|, the first-order change of the LM loss without it. (H,) for each layer."""
    return _accumulate(dense, blocks, lambda hidden, gradient, down: (hidden * gradient).abs().sum(0), kept, gradients=True)


def taylor_share(dense: PreTrainedModel, blocks: torch.Tensor, kept: KeptSums | None = None) -> list[torch.Tensor]:
    """
    Importance of each neuron: |h dL/dh| as a share of the token's total. (H,) for each layer. As `taylor`, but a few tokens with
    large gradients do not decide for all.
    """

    def statistic(hidden, gradient, down):
        effect = (hidden * gradient).abs()
        return (effect / effect.sum(-1, keepdim=True).clamp_min(torch.finfo(effect.dtype).tiny)).sum(0)

    return _accumulate(dense, blocks, statistic, kept, gradients=True)


IMPORTANCES: dict[str, Callable] = {
    "activation": mean_activation,
    "normalised": normalised_activation,
    "taylor": taylor,
    "taylor_share": taylor_share,
}


@torch.no_grad()
def massive_experts(dense: PreTrainedModel, blocks: torch.Tensor) -> list[torch.Tensor]:
    """
    Which experts of each layer carry massive activations, (N,) bool, of dense layers (): those whose largest |output| is above 99.5% of all
    experts' and a tenth of the largest (Su et al., 2025, arXiv 2507.23279). Without them a mixture breaks down.
    """
    places = list(mlp_places(dense.base_model))
    largest = [torch.zeros(place.mlp.num_experts if is_mixture(place.mlp) else ()) for place in places]

    def watch(index, down, expert, positions, hidden):
        if largest[index].ndim:
            output = hidden @ down.t()
            largest[index][expert] = max(largest[index][expert], output.abs().max().float().cpu())

    with _watched(places, [layout_at(place) for place in places], watch):
        for block in tqdm(blocks, desc="Looking for massive activations", leave=False):
            dense.base_model(block.view(1, -1).to(dense.device), use_cache=False)
    every = torch.cat([sizes for sizes in largest if sizes.ndim])
    bound = max(every.quantile(0.995).item(), every.max().item() / 10)
    return [sizes >= bound for sizes in largest]
