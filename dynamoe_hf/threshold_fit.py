# SPDX-License-Identifier: Apache-2.0
"""
Fit thresholds: how large an input of each layer's products must be to be read, for each of a few densities, so that what is left out
costs the least loss.

Shapes: T tokens, D hidden size, H neurons, L layers, P quantiles, K densities.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from .modeling import DynaMoEForCausalLM
from .modeling.mlp_backends import Decision
from .modeling.moe_base import is_mixture, rows_by_expert
from .modeling.sparsity import Thresholds, keep_large
from .observe import bisect_rising, mlp_parts


DENSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # between them the dial interpolates
QUANTILES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the sizes, at which costs are measured
STEPS = 100  # of the finer scale on which the quantiles are chosen
THRESHOLD_TOKENS = 2048
SAMPLE = 1 << 20  # numbers of which quantiles are taken


class Costs(NamedTuple):
    """Of one product of one layer: what leaving out the smallest of its inputs costs, and the sizes that they have."""

    sizes: list[float]  # (P,) thresholds under which those shares of the inputs are left out
    costs: list[float]  # (P,) error of the MLP's output without what is smaller, squared, in units of loss
    weights: float  # share of the MLP's weights that the product reads, times the MLP's part of all (`mlp_parts`)


def fit_thresholds(model: DynaMoEForCausalLM, blocks: torch.Tensor, uniform: bool = False) -> dict:
    """
    Measure thresholds on token ids (N, S), at full width, and write them into `model.config.thresholds`.

    A layer's error counts `error_weights[l]`, what it costs in loss to second order; without error weights, relative to its
    output. The errors of all layers and products add up, so the quantiles of a density are where the last weight that is left out
    costs the same everywhere.

    Args:
        uniform: the same quantile for every layer and product instead.

    Returns:
        What is written: `density` (K,), and `input` and `hidden` (K, L).
    """
    curves = _measure(model, blocks)
    rows: dict[str, list] = {"density": [], "input": [], "hidden": []}
    for density in DENSITIES:
        chosen = _uniform(curves, density) if uniform else _cheapest(curves, density)
        rows["density"].append(density)
        for place, name in enumerate(("input", "hidden")):
            rows[name].append([_at(each[place].sizes, q[place]) for each, q in zip(curves, chosen)])
    model.config.thresholds = rows
    return rows


@torch.no_grad()
def _measure(model, blocks) -> list[tuple[Costs, Costs]]:
    """The costs of both products of each layer: those that read x, and the one that reads h."""
    length = blocks.shape[1]
    batch = blocks[: max(1, THRESHOLD_TOKENS // length)].to(model.device)
    mlps, curves = model.nested_mlps, {}
    progress = tqdm(total=len(mlps), desc="Measuring thresholds", leave=False)

    def measure(mlp, args):
        curves[mlp.layer] = _costs_of(mlp, args, model.config.error_weights, model.config.threshold_ramp)
        progress.update()

    hooks = [mlp.register_forward_pre_hook(measure) for mlp in mlps]
    try:
        with progress, model.routing(force_expert=model.config.expert_count - 1):
            model.base_model(batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    pairs = (curves[mlp.layer] for mlp in mlps)  # some mixtures call the shared expert before the routed ones
    parts = mlp_parts(model).tolist()
    return [(x._replace(weights=x.weights * part), h._replace(weights=h.weights * part)) for part, (x, h) in zip(parts, pairs)]


def _costs_of(mlp: Any, args: tuple, error_weights: list[float] | None, ramp: float) -> tuple[Costs, Costs]:
    """Of an MLP, or of the experts of a mixture, on what it is called with. In a mixture all chosen experts together are one output."""
    x = args[0]
    if is_mixture(mlp):
        x, index, chosen_weight = (tensor[None] for tensor in args)
        rows = rows_by_expert(index, mlp.num_experts)
        of_each = [mlp.layout.tensors(mlp, number).hidden(args[0][row // index.shape[-1]]) for number, row in rows]
        hidden, inputs = torch.cat(of_each), 2

        def without(of_x, of_hidden):
            thresholds = Thresholds(of_x, of_hidden, ramp)
            return mlp.run(x, index, chosen_weight, Decision(len(mlp.widths) - 1, thresholds=thresholds))
    else:
        hidden, inputs = mlp.hidden(x), 1 if mlp.layout.ungated else 2

        def without(of_x, of_hidden):
            return mlp.down_linear(keep_large(mlp.hidden(keep_large(x, of_x, ramp)) if of_x else hidden, of_hidden, ramp))

    output = without(0.0, 0.0).float()
    weight = error_weights[mlp.layer] if error_weights else 1 / output.square().sum(-1).mean().clamp_min(1e-12).item()

    def curve(values, run, projections):
        sizes = [size / (1 - ramp) for size in _quantiles(values)]  # what is read begins at the foot of the ramp
        errors = ((run(size).float() - output).square().sum(-1).mean().item() for size in sizes[1:])
        return Costs(sizes, [0.0, *(weight * error for error in errors)], projections / (inputs + 1))

    return curve(x, lambda size: without(size, 0.0), inputs), curve(hidden, lambda size: without(0.0, size), 1)


def _quantiles(values):
    """Sizes at `QUANTILES`, of a sample; the first is 0, under which nothing is."""
    sizes = values.abs().flatten().float()
    sizes = sizes[:: max(1, sizes.numel() // SAMPLE)].sort().values
    return [0.0, *(sizes[int(q * (len(sizes) - 1))].item() for q in QUANTILES[1:])]


def _at(values, quantile):
    """The value at a quantile, linear between those at `QUANTILES`."""
    place = min(quantile / (QUANTILES[1] - QUANTILES[0]), len(QUANTILES) - 1.0)
    low = min(int(place), len(QUANTILES) - 2)
    return values[low] + (place - low) * (values[low + 1] - values[low])


def _density(curves, quantiles: Sequence[tuple[float, float]]) -> float:
    """Share of the weights that is read at these quantiles of x and h of each layer."""
    left_out = [each.weights * q for pair, chosen in zip(curves, quantiles) for each, q in zip(pair, chosen)]
    return 1 - sum(left_out) / len(curves)


def _uniform(curves, density):
    return [(min(1 - density, QUANTILES[-1]),) * 2] * len(curves)


def _cheapest(curves, density):
    """The quantiles of least cost at a density: where the price of a weight is the same everywhere."""
    scale = [step * QUANTILES[-1] / STEPS for step in range(STEPS + 1)]
    # Between quantiles the size of the error, not its square, is nearly linear.
    fine = [[[_at([c**0.5 for c in each.costs], q) ** 2 for q in scale] for each in pair] for pair in curves]
    slopes = [[_rising_slopes(f, each.weights) for f, each in zip(*pairs)] for pairs in zip(fine, curves)]

    def choose(price):
        return [tuple(scale[sum(slope <= price for slope in each)] for each in pair) for pair in slopes]

    def left_out(log_price):
        return 1 - _density(curves, choose(10**log_price))

    return choose(10 ** bisect_rising(left_out, 1 - density, -12.0, 6.0))


def _rising_slopes(costs, share):
    """Cost of each further step for each weight that it leaves out, made to rise: the lower convex hull of the curve."""
    slopes: list[tuple[float, int]] = []
    for low, high in zip(costs, costs[1:]):
        slopes.append(((high - low) / share, 1))
        while len(slopes) > 1 and slopes[-2][0] >= slopes[-1][0]:
            (a, m), (b, n) = slopes[-2:]
            slopes[-2:] = [((a * m + b * n) / (m + n), m + n)]
    return [slope for slope, count in slopes for _ in range(count)]
