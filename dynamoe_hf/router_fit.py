# SPDX-License-Identifier: Apache-2.0
"""Fit routers to the difficulty of tokens, on cached inputs. (A module named `fit_routers` would hide the function.)"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from tqdm.auto import tqdm

from .arguments import Harm, Range, Route, check_choice, check_range, resolve
from .modeling import DynaMoEForCausalLM
from .modeling.difficulty import label_of
from .modeling.routing import TokenRouter
from .observe import gradients_of_activations, loss_backward, output_gradients, watch
from .processes import gather_rows, hand_over, process_count, process_index


# Limits of the target: a single token must not outweigh all others, and the logarithm of a harm of 0 is not finite.
LARGEST_WEIGHT, SMALLEST_HARM = 30.0, 1e-3
BATCH = 4  # sequences that are run together


@dataclass(kw_only=True)
class RouterFit:
    """How `fit_routers` fits."""

    steps: int = 800
    """Steps of AdamW for each router, with a one-cycle schedule."""
    batch_size: int = 512
    """Tokens in one step."""
    learning_rate: float = 2e-2
    """Highest learning rate."""
    cache_bytes: int = 3 * 2**30
    """Bytes of router inputs cached at a time, as 16-bit numbers; more layers than fit take further passes over the
    text.
    """
    seed: int = 0
    """Seed of the sensitivities, of the initial weights and of the batches."""
    harm: Harm | None = None
    """What an error costs: the same for every token of a `"layer"`, as in the labels, or for each `"token"` the squared
    gradient of the loss at its own MLP output, which takes a backward pass. A router cannot know a token's gradient,
    but it learns the mean that its input predicts. `"token"` needs profile routers and a similarity weighted by the
    loss, and is the default there.
    """
    route: Route = "label"
    """Which experts tokens take while inputs are collected: narrow experts in early layers change what later routers
    read.
    """
    sensitivity_range: Range | None = None
    """Each sequence draws its sensitivity from this range; by default from `config.train_sensitivity`."""
    density_range: Range | None = None
    """Each sequence draws its density from this range; by default experts are dense."""
    bf16: bool = False
    """Collect inputs under bfloat16 autocast."""

    def __post_init__(self):
        check_choice("route", self.route, Route)
        check_range(self.sensitivity_range)
        check_range(self.density_range, "density_range")


def fit_routers(model: DynaMoEForCausalLM, blocks: torch.Tensor, **settings) -> dict:
    """
    Fit every router from new initial weights to the difficulty of tokens, layer by layer. The rest of the model runs
    once, to collect the inputs of the routers, so hundreds of steps cost less than a few of full training. Where several processes
    are connected, all of them call this: they share the sequences, then the layers, and end with the same routers.

    Args:
        blocks: token ids (N, S) int64; the last tenth of the tokens is held out, to measure the agreement.
        settings: fields of `RouterFit`.

    Returns:
        `tokens`, the `harm` that was used, `router_agreement` with the labels on the tokens held out, and
        `label_frequency`, the share of the commonest label among them.

    Raises:
        ValueError: an unknown setting, or a `harm` that the model's similarity or router type does not have.
    """
    fit = resolve(RouterFit, None, settings)
    fit.harm = checked_harm(model.config, fit.harm)
    torch.manual_seed(fit.seed + process_index())
    model.eval()
    mlps, processes = model.nested_mlps, process_count()
    held_out = max(1, blocks.numel() // 10)
    group = max(1, fit.cache_bytes // (blocks.numel() * model.config.hidden_size * 2))
    measured = torch.zeros(len(mlps), 2, device=model.device)  # agreement, and share of the commonest label
    with tqdm(total=len(mlps), desc="Fitting routers", leave=False) as progress:
        for start in range(0, len(mlps), group):
            part = range(start, min(start + group, len(mlps)))
            inputs, profiles, weights, thetas = router_inputs(model, part, blocks, fit)
            for index, read, profile, weight in zip(part, inputs, profiles, weights):
                if index % processes != process_index():
                    continue
                torch.manual_seed(fit.seed + index)
                router = mlps[index].router
                fitted = None if weight is None else weight[:-held_out]
                data = [each[:-held_out] for each in read], profile[:-held_out], thetas[:-held_out]
                fit_router(router, *data, fit.steps, fit.batch_size, fit.learning_rate, fitted)
                data = [each[-held_out:] for each in read], profile[-held_out:], thetas[-held_out:]
                label, chosen = _labels_and_choices(router, *data)
                measured[index, 0] = (chosen == label).float().mean()
                measured[index, 1] = label.flatten().bincount().max() / label.numel()
                progress.update()
    for index, mlp in enumerate(mlps):
        hand_over([*mlp.router.parameters(), measured[index]], index % processes)
    agreement, commonest = measured.mean(0).tolist()
    return {
        "tokens": blocks.numel(),
        "harm": fit.harm,
        "router_agreement": round(agreement, 4),
        "label_frequency": round(commonest, 4),
    }


@torch.no_grad()
def _labels_and_choices(router, inputs, profile, thetas):
    """Label and chosen expert of each token, both (T, ...): what `fit_router` takes."""
    x, *others = inputs
    logits = router(x.to(router.input.weight.dtype), *others)
    return label_of(profile, thetas), router.choose(logits[:, None], thetas)[:, 0]


def checked_harm(config, harm: Harm | None) -> Harm:
    """
    The `harm` that routers of a model with this config are fitted to (`RouterFit`). Raises `ValueError` where they
    cannot be.
    """
    knows_tokens = config.has_dial and config.weighs_loss
    if harm is None:
        return "token" if knows_tokens else "layer"
    check_choice("harm", harm, Harm)
    if harm == "token" and not knows_tokens:
        raise ValueError(
            f'harm="token" needs a profile router and a similarity weighted by the loss, found {config.router_class.__name__} and '
            f'{config.similarity!r}. Convert with similarity loss_weighted or loss_gain, or leave harm at "layer".'
        )
    return harm


def router_inputs(
    model: DynaMoEForCausalLM, layers: range, blocks: torch.Tensor, fit: RouterFit
) -> tuple[list, list, list, torch.Tensor]:
    """
    What the routers of `layers` are fitted on, of token ids (N, S) with T tokens.

    Returns:
        Three lists with an entry for each layer: what the router reads, x (T, D) bfloat16, and in a mixture index and weights of
        a token's experts (T, K); profiles (T, E) or (T, K, E), the similarity of each expert to the full width; weights (T,) of
        mean 1, the squared gradient of the loss at the MLP's output, or None with harm="layer". And the sensitivity of each
        token (T,).
    """
    kept: list[dict[int, list]] = [{index: [] for index in layers} for _ in range(3)]
    inputs, profiles, squares = kept
    sensitivities, densities = _drawn(model, len(blocks), fit)
    ends = _ends_of_parts(len(blocks))
    own = slice(ends[process_index()], ends[process_index() + 1])
    dials = zip(sensitivities[own].split(BATCH), densities[own].split(BATCH))
    mlps, by_token = model.nested_mlps, fit.harm == "token"

    def keep_inputs(index, router, args):
        x, *others = (each.detach().flatten(0, 1) for each in args)
        inputs[index].append([x.to(torch.bfloat16), *others])

    hooks = [mlps[index].router.register_forward_pre_hook(partial(keep_inputs, index)) for index in layers]

    def keep_square(index, gradient):
        if index in squares:
            squares[index].append(gradient.float().square().sum(-1).flatten())

    def run(batch):
        sensitivity, density = next(dials)
        dial: dict = {"sensitivity": sensitivity}
        if model.config.thresholds is not None:
            dial["density"] = 1.0 if fit.density_range is None or fit.density_range[0] == 1 else density
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=fit.bf16):
            if by_token:
                loss_backward(model, batch, **dial)
            else:
                model.base_model(batch, use_cache=False, **dial)

    watched = output_gradients(mlps if by_token else [], keep_square)
    try:
        with watched, gradients_of_activations(model) if by_token else torch.no_grad():
            for records in watch(
                model, blocks[own], BATCH, "Collecting router inputs", run, route=fit.route, needs_labels=True
            ):
                for index in layers:
                    profiles[index].append(records[index].profile.flatten(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    rows = [(end - begin) * blocks.shape[1] for begin, end in pairwise(ends)]
    weights = [gather_rows(torch.cat(each), rows) if each else None for each in squares.values()]
    return (
        [[gather_rows(torch.cat(arguments), rows) for arguments in zip(*each)] for each in inputs.values()],
        [gather_rows(torch.cat(each), rows) for each in profiles.values()],
        [None if weight is None else weight / weight.mean().clamp_min(1e-30) for weight in weights],
        sensitivities.repeat_interleave(blocks.shape[1]),
    )


def _drawn(model, count: int, fit: RouterFit) -> tuple[torch.Tensor, torch.Tensor]:
    """Sensitivities and densities of `count` sequences, the same in all processes: (N,), (N,)."""
    ranges = fit.sensitivity_range or model.config.train_sensitivity, fit.density_range or (1, 1)
    drawn_2N = torch.rand(2, count, generator=torch.Generator().manual_seed(fit.seed)).to(model.device)
    first, second = (low + (high - low) * drawn for (low, high), drawn in zip(ranges, drawn_2N))
    return first, second


def _ends_of_parts(count: int) -> list[int]:
    """
    Where the parts of `count` sequences end that the processes run, in whole batches, so that these are those of one process. Raises
    `ValueError` where there is none for some.
    """
    batches, processes = math.ceil(count / BATCH), process_count()
    if batches < processes:
        raise ValueError(
            f"Each process needs a batch of {BATCH} sequences to fit routers on, found {count} sequences for {processes} processes. "
            "Give more router_tokens, or fewer processes."
        )
    return [min(count, BATCH * (batches * index // processes)) for index in range(processes + 1)]


def fit_router(
    router: TokenRouter,
    inputs: Sequence[torch.Tensor],
    profile: torch.Tensor,
    thetas: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    weights: torch.Tensor | None = None,
) -> None:
    """
    Train one router from new initial weights, its first layer scaled to the size of its input, on what it reads, x (T, D) first,
    profiles (T, E), in a mixture (T, K, E), and sensitivities (T,).

    With `weights` (T,), how much an error costs each token relative to the mean of its layer, the router learns to
    predict the mean of the harm, weight * (1 / similarity - 1), as exp(-logit). The loss is the negative log-likelihood
    of a gamma distribution of fixed shape: harm varies over orders of magnitude, and a budget of width should be spent by
    its mean.
    """
    (x, *others), dtype = inputs, router.input.weight.dtype
    router.float().requires_grad_()
    with torch.no_grad():
        router.reset()
        router.input.weight /= x[:4096].float().square().mean().sqrt().clamp_min(1e-6)
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    label = label_of(profile, thetas)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), device=x.device)
        logits = router(x[rows].float(), *(each[rows] for each in others))
        if weights is None:
            loss = router.loss(logits, profile[rows], label[rows]).mean()
        else:
            weight = weights[rows].view(-1, *[1] * (profile.ndim - 1)).clamp_max(LARGEST_WEIGHT)
            harm = (1 / profile[rows, ..., :-1].clamp_min(1e-6) - 1) * weight
            loss = ((harm + SMALLEST_HARM) * logits.clamp(max=12).exp() - logits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    router.zero_grad()
    router.to(dtype)
