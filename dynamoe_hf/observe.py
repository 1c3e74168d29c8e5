# SPDX-License-Identifier: Apache-2.0
"""
Watching a model: run blocks of tokens through it and see, MLP by MLP, which experts the tokens take, what the routers say, how
difficult the tokens are, and what gradient arrives. All stages watch through here.

Shapes: N blocks of S tokens, T = N * S, L nested MLPs (`DynaMoEConfig.mlp_names`), E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .modeling import DynaMoEForCausalLM
from .modeling.dense_base import decoder_layers
from .modeling.difficulty import label_of
from .modeling.mlp_backends import block_sizes
from .modeling.routing import LayerRecord


KEPT_BYTES = 2 * 2**30  # of activations, for which layers need not run twice


def watch(
    model: DynaMoEForCausalLM,
    blocks: torch.Tensor,
    batch_size: int = 4,
    description: str = "Running",
    run: Callable[[torch.Tensor], object] | None = None,
    **routing,
) -> Iterator[list[LayerRecord]]:
    """
    Run the blocks (N, S) through the model in batches and yield what each layer did with each batch.

    Args:
        run: what is done with a batch of token ids on the model's device; by default the backbone, without gradients.
        routing: fields of `Routing` that the passes are routed by.
    """

    @torch.no_grad()
    def backbone(batch):
        model.base_model(batch, use_cache=False)

    for batch in tqdm(blocks.split(batch_size), desc=description, leave=False):
        records: list[LayerRecord] = []
        with model.routing(records=records, **routing):
            (run or backbone)(batch.to(model.device))
        yield records


def mlp_parts(model: DynaMoEForCausalLM) -> torch.Tensor:
    """
    How much each MLP counts in a mean over them: (L,) float32 of mean 1, by the weights that a token reads at full width. In a mixture
    these are K experts, a shared expert, or the MLP of a dense layer.
    """
    reads = torch.tensor([mlp.reads for mlp in model.nested_mlps], dtype=torch.float64)
    return (reads / reads.mean()).float()


def expert_shares(model: DynaMoEForCausalLM) -> torch.Tensor:
    """Width of each expert as a share of its MLP, times `mlp_parts`, so that a mean over MLPs is a share of all: (L, E) float32."""
    return torch.tensor([mlp.shares for mlp in model.nested_mlps]) * mlp_parts(model)[:, None]


def of_tokens(values: torch.Tensor) -> torch.Tensor:
    """Of what a layer decided, (B, S), or in a mixture (B, S, K), the mean over each token's K experts: (B, S)."""
    return values if values.ndim == 2 else values.mean(-1)


def shares_taken(shares_LE: torch.Tensor, experts: Sequence[torch.Tensor]) -> torch.Tensor:
    """What each token takes of `expert_shares` (L, E) in each MLP: L tensors (B, S), of routed experts (B, S, K) -> (L, B, S)."""
    return torch.stack([of_tokens(shares[expert.cpu()]) for shares, expert in zip(shares_LE, experts)])


def shares_read(model: DynaMoEForCausalLM, records: list[LayerRecord]) -> torch.Tensor:
    """
    Share of each MLP's weights that each token reads, sparsity included, times `mlp_parts`, so that a mean over MLPs is a share of all:
    L records -> (L, B, S).
    """
    return torch.stack([record.share.cpu() for record in records]) * mlp_parts(model)[:, None, None]


def in_rows(tensors: list[torch.Tensor]) -> torch.Tensor:
    """
    What L MLPs recorded, (B, S, E) or of routed experts (B, S, K, E), one below the other: (L, T * K, E). Other MLPs beside these have
    each token K times, which leaves all means as they are.
    """
    rows = [tensor.flatten(0, -2).cpu() for tensor in tensors]
    most = max(map(len, rows))
    return torch.stack([each.repeat_interleave(most // len(each), 0) for each in rows])


def similarity_profiles(model: DynaMoEForCausalLM, blocks: torch.Tensor, batch_size: int = 4, **routing) -> torch.Tensor:
    """
    True similarities of all tokens in all MLPs: (N, S) -> (L, T, E) float32, in mixtures a row for each of a token's K experts. By
    default every earlier layer runs at full width; `routing` (fields of `Routing`) says otherwise.
    """
    routing = routing or {"force_expert": model.config.expert_count - 1}
    profiles = []
    for records in watch(model, blocks, batch_size, "Measuring difficulty", needs_labels=True, **routing):
        profiles.append(in_rows([record.profile for record in records]))
    return torch.cat(profiles, 1)


class Consistency(NamedTuple):
    """
    How alike neighbouring tokens choose among units, such as the experts of a mixture (Liang et al., 2025, arXiv 2505.16056): whether
    units can be fetched ahead, or kept outside of fast memory.
    """

    performance: float  # SRP: the best F1 of one group of units for all tokens of a segment
    hits: float  # SCH: share of the choices that a cache of a fixed size holds, which is filled anew for each segment


def consistency(taken_BSU: torch.Tensor, segment: int, cache: float = 2.0) -> Consistency | None:
    """
    Of all segments of so many tokens, for units that each token takes or not, (B, S, U) bool. The cache has room for `cache` times as many
    units as a token takes on average. `None` where there is no segment, or nothing is taken.
    """
    before = F.pad(taken_BSU.double().cumsum(1), (0, 0, 1, 0))
    counts = (before[:, segment:] - before[:, :-segment]).flatten(0, 1)  # tokens of each segment that take each unit
    chosen = counts.sum().item()
    if not chosen:
        return None
    # The best group of a size has the units that most tokens take: all that are taken `least` times or more.
    groups = [counts[counts >= least] for least in range(1, segment + 1)]
    performance = max(2 * group.sum().item() / (len(group) * segment + chosen) for group in groups)
    room = max(1, round(cache * chosen / (len(counts) * segment)))
    return Consistency(performance, counts.topk(min(room, counts.shape[1])).values.sum().item() / chosen)


def mixture_consistency(
    model: DynaMoEForCausalLM, ids: torch.Tensor, segment: int, **routing
) -> dict[int, tuple[Consistency | None, ...]]:
    """
    For each layer that is a mixture: of the experts that the base's router chooses, and of their rings, the neurons between one width
    and the next, that the widths take. Token ids (N, S); `routing` are fields of `Routing`.
    """
    (records,) = watch(model, ids, len(ids), "Watching routes", **routing)
    found: dict[int, tuple[Consistency | None, ...]] = {}
    for name, mlp, record in zip(model.config.mlp_names, model.nested_mlps, records):
        if record.index is not None:
            rings = torch.tensor(block_sizes(mlp.widths)) > 0
            experts = F.one_hot(record.index.cpu(), mlp.num_experts).bool()  # (N, S, K, experts)
            reached = record.expert.cpu()[..., None] >= torch.arange(len(rings))[rings]  # (N, S, K, rings)
            taken = (experts[..., None] & reached[..., None, :]).any(2).flatten(2)
            found[int(name)] = (consistency(experts.any(2), segment), consistency(taken, segment))
    return found


class RouterRun(NamedTuple):
    """What `run_routers` saw."""

    share_N: torch.Tensor  # mean share of the MLPs' weights that the tokens of each block read
    width: float  # mean share of the MLPs' width
    logits_LTE: torch.Tensor  # of the routers, E - 1 a row of `in_rows`


def run_routers(
    model: DynaMoEForCausalLM,
    blocks: torch.Tensor,
    shares_LE: torch.Tensor,
    sensitivity: float,
    batch_size: int = 4,
    density: float | None = None,
) -> RouterRun:
    """Run the blocks (N, S) at a sensitivity; `density` by default as the dial says."""
    read, width, logits = [], [], []
    for records in watch(model, blocks, batch_size, "Running routers", sensitivity=sensitivity, density=density):
        read.append(shares_read(model, records))
        width.append(shares_taken(shares_LE, [record.expert for record in records]))
        logits.append(in_rows([record.router_logits.float() for record in records]))
    return RouterRun(torch.cat(read, 1).mean((0, 2)), torch.cat(width, 1).mean().item(), torch.cat(logits, 1))


def mean_share(profiles_LTE: torch.Tensor, shares_LE: torch.Tensor, sensitivity: float) -> float:
    """Mean share of MLP width when every token follows its label at `sensitivity`."""
    labels_LT = torch.stack([label_of(profile_TE, sensitivity) for profile_TE in profiles_LTE])
    return shares_LE.gather(1, labels_LT).mean().item()


def sensitivity_for(profiles_LTE: torch.Tensor, shares_LE: torch.Tensor, share: float) -> float:
    """The sensitivity at which the labels reach a mean share of MLP width; 1 at most."""
    return bisect_rising(partial(mean_share, profiles_LTE, shares_LE), share, 0.0, 1.0)


def bisect_rising(value_at: Callable[[float], float], target: float, low: float, high: float, rounds: int = 40) -> float:
    """The smallest argument, to (high - low) / 2^rounds, at which a rising function is no less than `target`; `high` at most."""
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if value_at(middle) < target else (low, middle)
    return high


@contextmanager
def gradients_of_activations(model: PreTrainedModel, tokens: int = 0) -> Iterator[None]:
    """
    Inside, gradients flow back to the embeddings and parameters get none.

    Args:
        tokens: of a batch. Where their activations would not fit into `KEPT_BYTES`, layers run again in backward, so that memory is
            that of the model and one layer's activations, for a third more time.
    """
    recompute = _activation_bytes(model, tokens) > KEPT_BYTES
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Parameters are frozen, so the graph must begin somewhere.
    begin = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    model.requires_grad_(False)
    if recompute:
        _recompute_layers(model, True)
    try:
        with torch.enable_grad():
            yield
    finally:
        if recompute:
            _recompute_layers(model, False)
        begin.remove()
        for parameter in wanted:
            parameter.requires_grad_()


def loss_backward(model: PreTrainedModel, batch: torch.Tensor, **options) -> None:
    """Backward of the LM loss summed over all tokens of a batch (B, S). `options` are those of the model's `forward`."""
    logits = model(batch, use_cache=False, **options).logits.float()
    targets = F.pad(
        batch[:, 1:], (0, 1), value=-100
    )  # not the logits are cut: backward would make a second tensor of their size
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()


@contextmanager
def output_gradients(modules: Sequence[nn.Module], add: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Inside, each backward pass calls `add(index of the module, gradient of its output)`."""

    def watcher(index):
        def hook(module, args, output):
            output.register_hook(partial(add, index))

        return hook

    hooks = [module.register_forward_hook(watcher(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _activation_bytes(model, tokens: int) -> int:
    """
    What backward keeps of so many tokens, at most: inputs and outputs of the layers' products, and as much again of norms,
    activations and attention.
    """
    if not tokens:
        return 0
    experts = getattr(model.config, "num_experts_per_tok", None) or 1  # of a mixture, whose weights have three dimensions
    weights = [(p, experts if p.ndim == 3 else 1) for p in decoder_layers(model.base_model).parameters() if p.ndim >= 2]
    return sum(2 * sum(weight.shape[-2:]) * weight.element_size() * times for weight, times in weights) * tokens


def _recompute_layers(model, enable):
    """Activation checkpointing in evaluation mode: it looks at the layer's own `training` flag, which dropout does not read."""
    model._set_gradient_checkpointing(enable, partial(checkpoint, use_reentrant=False))
    for layer in decoder_layers(model.base_model):
        layer.training = enable
