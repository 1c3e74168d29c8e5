# SPDX-License-Identifier: Apache-2.0
"""
The routed experts of one mixture layer, each of them nested. The base's own router chooses K experts for a token and weighs them; a
width is then chosen for each of these pairs, which are rows of the dispatcher as tokens are (`mlp_backends.py`).

Shapes: B batch, S sequence, T = B * S tokens, D hidden size, N experts of the mixture, K of them for a token, H neurons of each, E widths.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dense_base import MLPPlace, blank_model
from .difficulty import label_of, left_out, similarity_profile
from .engine_layers import BareLinear
from .mlp_backends import Decision, Weights, climb, costs_of, run_experts, staircase_blocks, with_rows
from .moe_base import check_mixture, checked_cuts, layout_at, rows_by_expert, rows_by_width
from .nested_mlp import NestedLayer
from .routing import LayerRecord, ProfileRouter, Routing, RoutingSlot, default_router_dim
from .sparsity import Thresholds, keep_large


SMALLEST_WEIGHT = 1e-6  # of an expert, so that its logarithm is finite


class PairRouter(ProfileRouter):
    """
    One head for all experts of a mixture, read at the K that a token is sent to: (..., D), index and weights (..., K) ->
    (..., K, E - 1) logits.

    The error of a token's output is that of the expert times its weight w, so that 1 / s - 1 has a factor w^2. The head predicts the
    rest; -2 log w, which is known, is added to the logits.
    """

    def __init__(self, hidden_size: int, router_dim: int, widths: int, experts: int):
        super().__init__(hidden_size, router_dim, widths)
        self.output = BareLinear(nn.Linear(router_dim, experts * self.outputs(widths)))
        self.experts, self.per_expert = experts, self.outputs(widths)

    def forward(self, x: torch.Tensor, index: Any, weight: Any) -> torch.Tensor:  # type: ignore[override]
        outputs = self.read(x).unflatten(-1, (self.experts, self.per_expert))
        chosen = outputs.gather(-2, index[..., None].expand(*index.shape, self.per_expert))
        return self.logits_of(chosen) - 2 * weight.detach().float().clamp_min(SMALLEST_WEIGHT).log()[..., None]


class NestedExperts(NestedLayer):
    """
    The experts module of a mixture, a subclass of the base's own class too: tokens (T, D), the index and the weights of their experts
    (T, K) -> (T, D). Its weights keep their names; only `router.*` is added.
    """

    nesting: Any  # the `DynaMoEConfig`; `config` is the base's
    packed: None
    cut_widths: list[int] | None  # neurons of each expert that were not cut off for good
    num_experts: int  # N
    top_k: int  # K
    down_proj: nn.Parameter

    def forward(self, hidden_states, top_k_index, top_k_weights):
        routing = self.slot.of_layer(self.nesting)
        shape = routing.shape or torch.Size((1, len(hidden_states)))
        x, index, weight = (tensor.view(*shape, -1) for tensor in (hidden_states, top_k_index, top_k_weights))
        decision = self.decide(x, index, weight, routing)
        if routing.records is not None:
            routing.records.append(self.record(x, index, decision))
        full = not isinstance(decision.expert, torch.Tensor) and decision.expert == len(self.widths) - 1
        if full and decision.thresholds is None:
            return super().forward(hidden_states, top_k_index, top_k_weights)  # the base's own way
        return self.run(x, index, weight, decision)

    def decide(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, routing: Routing) -> Decision:
        """The width of each pair, (B, S, K), or one for all, and what was computed on the way to it."""
        forced = routing.force_expert
        if forced is None and routing.route == "router" and self.router.is_off(routing.sensitivity):
            forced = len(self.widths) - 1
        thresholds = None if routing.thresholds is None else routing.thresholds[self.layer]
        if forced is not None and routing.records is None and not routing.needs_labels:
            return Decision(forced, thresholds=thresholds)
        logits, profile, neurons, label = self.router(x, index, weight), None, None, None
        labelled = routing.needs_labels or routing.route == "label"
        if labelled or thresholds is not None and routing.records is not None:
            profile, neurons = self.observe(x, index, weight, thresholds, labelled)
        if profile is not None:
            sensitivity: Any = routing.sensitivity
            if isinstance(sensitivity, torch.Tensor):
                sensitivity = sensitivity.to(x.device, torch.float32).view(len(x), -1).expand(x.shape[:2]).flatten()
            label = label_of(profile.flatten(0, 1), sensitivity).view(index.shape)
        expert, gates = (forced, None) if forced is not None else self.choose(logits, label, routing)
        return Decision(expert, logits, gates, None, profile, label, thresholds, None, neurons)

    def record(self, x: torch.Tensor, index: torch.Tensor, decision: Decision) -> LayerRecord:
        """What this layer did with its tokens, x (B, S, D) and index (B, S, K)."""
        expert, logits, gates, profile = decision.expert, decision.router_logits, decision.gates, decision.profile
        if not isinstance(expert, torch.Tensor):
            expert = torch.full_like(index, expert)
        assert logits is not None, "`decide` asks the router where records are wanted"
        loss = None if profile is None else self.router.loss(logits, profile, decision.label).mean(-1)
        # Of what was not cut, so that the full width is 1.
        reached = torch.tensor([self.widths_of(number) for number in range(self.num_experts)], device=index.device)[index]
        whole = reached[..., -1].sum(-1).clamp_min(1)
        taken = reached.gather(-1, expert[..., None]).sum((-1, -2))
        share, width = taken / whole, None
        if decision.thresholds is not None:
            assert decision.neurons is not None, "`decide` counts what is read where records of it are wanted"
            kept_inputs = (decision.thresholds.kept_input(x) != 0).float().mean(-1)
            read = decision.neurons.gather(-1, expert[..., None]).sum((-1, -2))
            share = (2 * kept_inputs * taken + read) / (3 * whole)  # gate and up read x, down reads neurons
        if gates is not None:
            width = (gates * F.pad(reached, (1, 0)).diff()).sum((-1, -2)) / whole
        return LayerRecord(logits, expert, share, profile, decision.label, loss, width, index, self.layer)

    @property
    def reads(self) -> float:
        """Neurons that a token reads at full width: of K experts, on average without what was cut off for good."""
        return self.top_k * (self.widths[-1] if self.cut_widths is None else sum(self.cut_widths) / self.num_experts)

    @property
    def active(self) -> float:
        """Part of the experts' weights that a token reads at full width."""
        return self.reads / (self.num_experts * self.widths[-1])

    def widths_of(self, number: int) -> list[int]:
        """The widths of one expert in neurons, without what was cut off for good."""
        return self.widths if self.cut_widths is None else [min(width, self.cut_widths[number]) for width in self.widths]

    def run(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, decision: Decision) -> torch.Tensor:
        """Each expert's prefixes on the tokens that were sent to it, (B, S, D), weighted and added: (T, D)."""
        chosen, expert, gates = index.shape[-1], decision.expert, decision.gates
        x_TD, kept = sparse_rows(x, decision.thresholds)
        if not isinstance(expert, torch.Tensor):
            expert = torch.full_like(index, expert)
        y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x.dtype, torch.float32))
        if len(x_TD) == 1 and gates is None and x.device.type == "cpu":
            return self.run_token(x_TD, y_TD, index, weight, expert, kept).to(x.dtype)
        costs, weight, tensors_of = costs_of(self.down_proj), weight.flatten(), self.layout.tensors_of_all(self)
        for number, rows, counts in rows_by_width(index, expert, self.num_experts, len(self.widths)):
            tensors, token = tensors_of(number), rows // chosen
            of_rows, share, of_hidden = (
                x_TD.index_select(0, token),
                weight.index_select(0, rows)[:, None],
                partial(kept, token),
            )
            if gates is None:
                blocks = staircase_blocks(counts, self.widths_of(number), x_TD.shape[1], costs)
                y = climb(of_rows, blocks, tensors, of_hidden)
                y = y if tensors.down_bias is None else with_rows(y, len(rows), tensors.down_bias)
            else:
                gated = Decision(expert.flatten()[rows][None], gates=gates.flatten(0, 2)[rows][None])
                weights = Weights(lambda x: of_hidden(tensors.hidden(x)), tensors.output, tensors, self.widths)  # noqa: B023
                y = run_experts(of_rows[None], gated, weights)[0]
            # Added while it is in the cache. An expert has a token once, so the order of the sums is always the same.
            y_TD.index_add_(0, token[: len(y)], (y * share[: len(y)]).to(y_TD.dtype))
        return y_TD.to(x.dtype)

    def run_token(
        self, x_TD: torch.Tensor, y_TD: torch.Tensor, index: Any, weight: Any, expert: Any, kept: Any
    ) -> torch.Tensor:
        """As `run` for one token on a CPU, where sorting would take longer than a narrow expert does; added to y (1, D)."""
        first = index.new_zeros(1)
        for number, taken, share in zip(index.flatten().tolist(), expert.flatten().tolist(), weight.flatten().unbind()):
            width = self.widths_of(number)[taken]
            prefix = self.layout.tensors(self, number).block(0, width)
            if width or prefix.down_bias is not None:
                y_TD = y_TD + prefix.output(kept(first, prefix.hidden(x_TD))) * share
        return y_TD

    @torch.no_grad()
    def observe(
        self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, thresholds: Thresholds | None, labelled: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """
        What each width of the chosen experts does, (B, S, D), (B, S, K) twice -> (B, S, K, E) twice: where `labelled`, the similarity of
        its weighted output to that of the whole expert, float32; and the neurons that down reads, which are those that are not 0.
        """
        chosen, weights, (x_TD, kept) = index.shape[-1], self.nesting.error_weights, sparse_rows(x, thresholds)
        settings = self.nesting.similarity, weights[self.layer] if weights else 1.0, self.widths
        profile = torch.empty(index.numel(), len(self.widths), device=x.device)
        neurons = torch.zeros_like(profile)
        for number, rows in rows_by_expert(index, self.num_experts):
            tensors, of_rows, token = self.layout.tensors(self, number), weight.flatten()[rows, None], rows // chosen
            hidden = kept(token, tensors.hidden(x_TD[token]))
            neurons[rows] = torch.stack([(hidden[:, :width] != 0).sum(-1) for width in self.widths_of(number)], -1).float()
            if not labelled:
                continue
            smaller = left_out(self.widths, lambda low, high: F.linear(hidden[:, low:high], tensors.down[:, low:high]))  # noqa: B023
            output = tensors.output(hidden) * of_rows
            left_out_ETD = torch.stack(smaller) * of_rows if smaller else output.new_zeros(0, *output.shape)
            profile[rows] = similarity_profile(output, left_out_ETD, *settings)
        return profile.view(*index.shape, -1) if labelled else None, neurons.view(*index.shape, -1)

    @property
    def main_weight(self) -> torch.Tensor:
        """A weight, whose device and dtype are the layer's."""
        return self.down_proj

    def __reduce__(self):
        cls, base_class = type(self).__bases__
        return blank_model, (cls, base_class), self.__dict__


def sparse_rows(x: torch.Tensor, thresholds: Thresholds | None) -> tuple[torch.Tensor, Callable]:
    """
    Of tokens (B, S, D) the rows (T, D), without what is under the threshold of the input, and `kept(token, hidden)`, which leaves out
    what is under that of the activations (R, H) of the first R of `token`.
    """
    if thresholds is None:
        return x.flatten(0, 1), lambda token, hidden: hidden
    x_TD, least, ramp = thresholds.kept_input(x).flatten(0, 1), thresholds.hidden, thresholds.ramp
    if not isinstance(least, torch.Tensor):
        return x_TD, lambda token, hidden: keep_large(hidden, least, ramp)
    least = least.expand(*x.shape[:2], 1).flatten(0, 1)
    return x_TD, lambda token, hidden: keep_large(hidden, least[token[: len(hidden)]], ramp)


def nest_experts(place: MLPPlace, config: Any, layer: int, slot: RoutingSlot) -> NestedExperts:
    """The experts at a place, nested; the module there is used up. Raises `ValueError` as `layout_at` and `check_mixture`."""
    check_mixture(config)
    experts: Any = place.mlp
    nested: Any = blank_model(NestedExperts, type(experts))
    nested.__dict__ = experts.__dict__
    nested.layout, nested.nesting, nested.layer, nested.slot, nested.packed = layout_at(place), config, layer, slot, None
    width, nested.top_k = nested.layout.width(experts), config.num_experts_per_tok
    nested.widths = config.layer_widths(layer, width)
    nested.cut_widths = checked_cuts(config, layer, nested.num_experts, width)
    router_dim = config.router_dim or default_router_dim(width * nested.top_k)
    nested.router = PairRouter(config.hidden_size, router_dim, len(nested.widths), nested.num_experts)
    return nested
