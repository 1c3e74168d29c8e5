# SPDX-License-Identifier: Apache-2.0
"""
DynaMoE: a dense causal language model whose MLPs are nested experts, chosen token by token.

- The base's own model is built from its own config, so attention, RoPE variants, caches, soft-caps and heads are the base's.
- Each `layer.mlp` becomes a `NestedMLP` that keeps the dense parameter names; only `mlp.router.*` is added.
- Expert e is the first `widths[e]` neurons of the MLP; the last expert is the dense MLP.
- The router predicts how close each expert comes to the full MLP, and the token takes the smallest that is close enough.

Shapes: B batch, S sequence, T = B * S tokens, D hidden size, H MLP width, E experts.
"""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, repeat
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from .configuration_dynamoe import DynaMoEConfig, check_sensitivity
from .nested_mlp import (
    FEW,
    SILU,
    Prefixes,
    Projections,
    dense_mlp,
    few_mlp,
    label_of,
    reads_numbers,
    routed_mlp,
    routed_mlp_op,
    similarity_profile,
    sliced_mlp,
)
from .nested_mlp_triton import TRITON, pays, runs_triton, triton_choose, triton_mlp


logger = logging.get_logger(__name__)

ROUTES = ("router", "label", "random")
MLP_IMPLEMENTATIONS = ("auto", "torch", "triton")


@dataclass
class DynaMoECausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast`, and:

    lm_loss (`torch.Tensor` of shape (1,)): the language-model part of `loss`, when `labels` are given.
    router_loss (`torch.Tensor` of shape (1,)): mean over layers of the router loss, normalised like `lm_loss`.
    router_logits (`tuple` of (B, S, E - 1), or (B, S, E) with the argmax router): with `output_router_logits=True`, one
        for each layer. The sigmoid of a profile router's logits is the predicted similarity of each smaller expert.
    expert_indices (`tuple` of (B, S) int64): the experts taken, one for each layer, with `output_router_logits=True`.
    """

    lm_loss: torch.FloatTensor | None = None
    router_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None


class LayerRecord(NamedTuple):
    """What one layer did with each token of one forward pass. `profile` and what follows only where labels were needed."""

    router_logits: torch.Tensor  # (B, S, E - 1); (B, S, E) with the argmax router
    expert: torch.Tensor  # (B, S) int64
    profile: torch.Tensor | None = None  # (B, S, E) true similarities
    label: torch.Tensor | None = None  # (B, S) int64
    router_loss: torch.Tensor | None = None  # (B, S)
    width: torch.Tensor | None = None  # (B, S) share of the MLP's width, with a gradient, where the routing has a temperature


@dataclass
class Routing:
    """How the tokens of one forward pass find their experts. `None` means: as the config says."""

    sensitivity: float | torch.Tensor | None = None  # a number, or (B,) with one for each sequence
    force_expert: int | None = None
    route: str = "router"
    needs_labels: bool = False
    histogram: torch.Tensor | None = None  # (L, E) frequencies of the random route; uniform where it is None
    temperature: float | None = None  # of `TokenRouter.gates`, for routers that learn by choosing
    records: list[LayerRecord] | None = None  # filled layer by layer where it is a list
    steady: bool = False  # whether this is a step of decoding for `NestedMLP._few_tokens`


@dataclass
class RoutingSlot:
    """The routing in force, shared by all layers of a model: decoder layers hand nothing but hidden states to their MLP."""

    current: Routing = field(default_factory=Routing)
    mlp_implementation: str = "auto"


class TokenRouter(nn.Module):
    """
    Predicts the difficulty of a token for one layer from what the MLP reads: (..., D) -> (..., E - 1) logits.

    The sigmoid of logit e is the predicted similarity of expert e, rising in e by construction. With
    `router_type="argmax"`: (..., D) -> (..., E) logits, the largest of which names the expert.
    """

    def __init__(self, hidden_size, router_dim, experts, router_type):
        super().__init__()
        self.router_type = router_type
        self.input = nn.Linear(hidden_size, router_dim)
        self.output = nn.Linear(router_dim, experts if router_type == "argmax" else experts - 1)

    @torch.no_grad()
    def reset(self):
        """Begin anew: every token looks alike."""
        nn.init.normal_(self.input.weight, std=self.input.in_features**-0.5)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        if self.router_type == "argmax":
            self.output.bias[-1] = 1.0  # untrained, it takes the full width, as sensitivity 1 does with the other router

    def forward(self, x):
        x = x.to(self.input.weight.dtype)
        if torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() == x.shape[-1] and self._is_plain(x):
            return self._one_row(x)
        logits = self.output(F.silu(self.input(x)))
        if self.router_type == "argmax" or logits.shape[-1] == 0:
            return logits
        # diff with a plain router: each logit adds a positive step to the one before, so the profile rises.
        return torch.cat([logits[..., :1], F.softplus(logits[..., 1:])], -1).cumsum(-1)

    def _one_row(self, x):
        """
        As `forward`, of one token on a CPU, for compilers: in sums, which become one kernel with what is around them. A library's
        product, or a cumulative sum, is a call of its own, and in decoding each costs as much as all of the arithmetic.
        """
        hidden = F.silu((self.input.weight * x.flatten()).sum(-1) + self.input.bias)
        logits = (self.output.weight * hidden).sum(-1) + self.output.bias
        if self.router_type == "profile" and len(logits) > 0:
            steps = torch.cat([logits[:1], F.softplus(logits[1:])])
            logits = (steps * torch.ones(len(steps), len(steps), dtype=x.dtype, device=x.device).tril()).sum(-1)
        return logits.view(*x.shape[:-1], -1)

    def is_off(self, sensitivity):
        """Whether this sensitivity gives the full width to every token, so that there is nothing to predict."""
        return self.router_type == "profile" and not isinstance(sensitivity, torch.Tensor) and sensitivity >= 1

    def choose(self, logits, sensitivity):
        """Expert of each token: logits, a number or (B,) -> (B, S) int64. Compared as logits: theta = 1 is never reached."""
        if self.router_type == "argmax":
            return logits.argmax(-1)
        return (logits.float() < self._threshold(sensitivity, logits.device)).sum(-1)

    def _threshold(self, sensitivity, device):
        if isinstance(sensitivity, torch.Tensor):
            return torch.logit(sensitivity.to(device, torch.float32)).view(-1, 1, 1)
        return logit_of(sensitivity)

    def gates(self, logits, sensitivity, temperature):
        """
        Which blocks of neurons each token takes, for training: (B, S, E - 1) logits -> (B, S, E), 1 or 0, the first always 1.

        A profile router's choice under one draw of logistic noise a token, with the gradient of a sigmoid: the straight-through
        estimator of binary concrete variables (Maddison, Mnih and Teh, 2017). So what a block does to a loss reaches the logit
        that decides on it.
        """
        logits = logits.float()
        noise = torch.logit(torch.rand_like(logits[..., :1]), eps=1e-4) * temperature
        margin = self._threshold(sensitivity, logits.device) + noise - logits
        soft = (margin / temperature).sigmoid()
        return F.pad((margin > 0).float() + soft - soft.detach(), (1, 0), value=1.0)

    def _is_plain(self, x):
        """Whether the weights may be read. Where layers are wrapped (LoRA) or offloaded, only modules know how."""
        return type(self.input) is type(self.output) is nn.Linear and self.input.weight.device == x.device

    def choose_few(self, x, sensitivity):
        """Experts of a few tokens, as a list: (B, S, D). Once a layer in decoding, so in few and small steps, and on the host."""
        if not self._is_plain(x):
            return self.choose(self(x), sensitivity).flatten().tolist()
        first, second = self.input, self.output
        hidden = F.silu(F.linear(x.flatten(0, 1).to(first.weight.dtype), first.weight, first.bias))
        rows = F.linear(hidden, second.weight, second.bias).tolist()
        return [self.choose_one(row, sensitivity) for row in rows]

    def choose_one(self, row, sensitivity):
        """
        The expert of one token, from its row of the output layer, a list of numbers. Steps of few tokens come by here unless they are
        compiled, so who wraps it hears which experts are taken.
        """
        if self.router_type == "argmax":
            return row.index(max(row))
        threshold, logit = logit_of(float(sensitivity)), 0.0
        for expert, step in enumerate(row):
            logit += step if expert == 0 else max(step, 0.0) + math.log1p(math.exp(-abs(step)))  # softplus
            if logit >= threshold:
                return expert
        return len(row)

    def choose_on_device(self, x, sensitivity):
        """As `choose(self(x), sensitivity)` by Triton, (B, S, D) -> (B, S), or None for what its kernel does not know."""
        first, second = self.input, self.output
        if self.router_type == "argmax" or not self._is_plain(x) or second.out_features == 0:
            return None
        threshold = self._threshold(sensitivity, x.device)
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.expand(*x.shape[:2], 1).flatten()
        hidden = first(x.to(first.weight.dtype)).flatten(0, 1)
        return triton_choose(hidden, second.weight, second.bias, threshold).view(x.shape[:2])

    def loss(self, logits, profile, label):
        """Binary cross-entropy for each token, (B, S): against the profile, or the one-hot label for the argmax router."""
        target = F.one_hot(label, profile.shape[-1]) if self.router_type == "argmax" else profile[..., :-1].clamp(0, 1)
        loss = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
        return loss.mean(-1) if loss.shape[-1] else loss.sum(-1)


def logit_of(sensitivity):
    """The logit that a predicted similarity must reach, on the host: infinite at sensitivity 1."""
    return math.log(sensitivity / (1 - sensitivity)) if sensitivity < 1 else math.inf


class Layout(NamedTuple):
    """Names of the parts of a dense MLP. `gate` is None where there is no gate, or where `up` holds both, gate first."""

    gate: str | None
    up: str
    down: str
    act: str
    fused: bool = False

    @property
    def projections(self):
        return [name for name in self[:3] if name is not None]


LAYOUTS = (
    Layout("gate_proj", "up_proj", "down_proj", "act_fn"),
    Layout(None, "gate_up_proj", "down_proj", "activation_fn", fused=True),
    Layout(None, "c_fc", "c_proj", "act"),
    Layout(None, "up_proj", "down_proj", "act_fn"),
    Layout(None, "fc1", "fc2", "activation_fn"),
    Layout(None, "dense_h_to_4h", "dense_4h_to_h", "act"),
)


def layout_of(mlp, name="mlp"):
    """The `Layout` of a dense MLP. Raises `ValueError`, naming the module, for anything that is not one of `LAYOUTS`."""
    linears = {child for child, module in mlp.named_children() if isinstance(module, nn.Linear)}
    others = {child for child, module in mlp.named_children() if any(True for _ in module.parameters())} - linears
    for layout in LAYOUTS:
        if linears == set(layout.projections) and hasattr(mlp, layout.act) and others <= {layout.act}:
            up, down = getattr(mlp, layout.up), getattr(mlp, layout.down)
            if up.out_features == down.in_features * (2 if layout.fused else 1):
                return layout
    supported = "; ".join(", ".join(layout.projections) for layout in LAYOUTS)
    raise ValueError(
        f"`{name}` cannot be split into nested experts: found {type(mlp).__name__} with "
        f"{', '.join(sorted(linears | others)) or 'no linear layers'}. Supported are dense MLPs made of: {supported}. "
        "A model that is a mixture of experts already, or puts a norm inside its MLP, stays as it is."
    )


def addresses(tensor):
    """Where the numbers of a tensor are; of a class that wraps other tensors, where theirs are."""
    if type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.data_ptr()]
    return [place for name in tensor.__tensor_flatten__()[0] for place in addresses(getattr(tensor, name))]


class Place(NamedTuple):
    """Where a linear layer is, and where its weight lies."""

    owner: dict[str, nn.Module]  # the modules that hold it
    name: str  # its name there
    linear: nn.Linear
    parameters: dict[str, nn.Parameter]
    address: int | list[int]  # a list where the weight is a quantiser's own class

    @classmethod
    def of(cls, owner, name):
        parameters = owner[name]._parameters
        weight = parameters["weight"]
        address = weight.data_ptr() if type(weight) is nn.Parameter else addresses(weight)
        return cls(owner, name, owner[name], parameters, address)


def unmoved(places):
    """Whether all are still where they were. The trap: moving or casting a module swaps the tensor inside its parameter."""
    for owner, name, linear, parameters, address in places:
        weight = parameters.get("weight")
        if owner[name] is not linear or weight is None:
            return False
        if (weight.data_ptr() if type(address) is int else addresses(weight)) != address:
            return False
    return True


class Kept(NamedTuple):
    """What one layer needs for a few tokens, looked up once."""

    places: list[Place]  # of the projections and of the router's layers
    router: TokenRouter
    router_input: tuple[torch.Tensor, torch.Tensor]  # weight, bias
    router_output: tuple[torch.Tensor, torch.Tensor]
    prefixes: Prefixes


# What a layer keeps between calls: slices of plain weights, slices of a quantiser's tensors, and what few tokens need.
NOTHING_KEPT = {"_sliced": (None, None), "_sliced_quantised": (None, None), "_kept": None}


class NestedMLP(nn.Module):
    """
    The dense MLP of one layer as E nested experts: (B, S, D) -> (B, S, D). Adopts the dense MLP's modules under their own
    names, so its checkpoint is the dense one plus `router.*`.

    Linear layers are sliced, so that only the chosen prefix is computed; quantised ones too where their tensors can be.
    Where a projection is wrapped (LoRA), offloaded, or quantised into something that does not slice, its module runs in full
    and the hidden activation is masked: the same numbers, no speed-up.
    """

    def __init__(self, dense, config, layer, slot):
        super().__init__()
        self.layout = layout_of(dense, f"model.layers.{layer}.mlp")
        for name, module in dense.named_children():
            self.add_module(name, module)
        if not isinstance(getattr(dense, self.layout.act), nn.Module):
            setattr(self, self.layout.act, getattr(dense, self.layout.act))
        self.dropout = getattr(dense, "residual_dropout", 0.0)  # starcoder2
        # A compiled graph cannot hold the activation module, but its name.
        self.act_name = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
        self.config, self.layer, self.slot = config, layer, slot
        self._forget()
        width, hidden_size = self.down_linear.in_features, self.down_linear.out_features
        self.widths = config.layer_widths(layer, width)
        self.router = TokenRouter(
            hidden_size, config.router_dim or default_router_dim(hidden_size, width), len(self.widths), config.router_type
        )

    @property
    def block_sizes(self):
        """Neurons that each expert has more than the one before."""
        return [high - low for low, high in zip([0, *self.widths], self.widths)]

    @property
    def up_linear(self):
        return getattr(self, self.layout.up)

    @property
    def down_linear(self):
        return getattr(self, self.layout.down)

    @property
    def activation(self):
        return getattr(self, self.layout.act)

    def forward(self, x):
        routing = self.slot.current
        if not torch.compiler.is_dynamo_compiling() and routing.steady:
            return self._few_tokens(x, routing.sensitivity)
        full = len(self.widths) - 1
        sensitivity, forced = routing.sensitivity, routing.force_expert
        if sensitivity is None:  # the backbone is called alone; the model's own `forward` has asked the config
            sensitivity, forced = self.config.sensitivity, self.config.force_expert if forced is None else forced
        record = routing.records is not None
        if not record and not routing.needs_labels and routing.route == "router":
            # Nothing to ask the router: the dense kernels, in the dense order, or one prefix for all.
            if forced is None and self.router.is_off(sensitivity):
                forced = full
            if forced == full:
                return self._drop(self.down_linear(self.hidden(x)))
            if forced is None and not self.training:
                one_dial = x.shape[0] == 1 or not isinstance(sensitivity, torch.Tensor)
                if self._on_device(x):
                    if routing.temperature is None and (expert := self.router.choose_on_device(x, sensitivity)) is not None:
                        return self._drop(self._run(x, expert))
                elif x.shape[0] * x.shape[1] <= FEW and one_dial and not torch.compiler.is_compiling():
                    if not torch.is_grad_enabled() and not self.keeps():
                        self._kept = self._keep(x)  # for the next step
                    experts = self.router.choose_few(x, sensitivity)
                    if len(set(experts)) > 1:
                        return self._drop(self._run(x, torch.tensor(experts, device=x.device).view(x.shape[:2])))
                    forced = experts[0]
            if forced is not None:
                return self._drop(self._run(x, forced))

        logits, gates = self.router(x), None
        needs_labels = routing.needs_labels or routing.route == "label"
        if needs_labels:
            hidden = self.hidden(x)
            profile = self.profile(hidden.detach())
            label = label_of(profile.flatten(0, 1), self._for_each_token(sensitivity, x)).view(x.shape[:2])
        if forced is not None:
            expert = torch.full(x.shape[:2], forced, device=x.device)
        elif routing.route == "label":
            expert = label
        elif routing.route == "random":
            expert = self._random(routing.histogram, x)
        elif routing.temperature is not None:
            gates = self.router.gates(logits, sensitivity, routing.temperature)
            expert = gates.detach().round().long().sum(-1) - 1
        else:
            expert = self.router.choose(logits, sensitivity)
        if record:
            extra = (profile, label, self.router.loss(logits, profile, label)) if needs_labels else ()
            width = None if gates is None else self._width(gates)
            routing.records.append(LayerRecord(logits, expert, *extra, width=width))
        if gates is not None:
            y = self.down_linear(self._gated(hidden if needs_labels else self.hidden(x), gates))
        elif needs_labels:  # labels need every neuron anyway, so then the rest of the work is one mask
            y = self.down_linear(self._mask(hidden, expert))
        else:
            y = self._run(x, expert)
        return self._drop(y)

    def _few_tokens(self, x, sensitivity):
        """
        A step of decoding, (B, S, D), in which every layer `keeps`. What can be kept is not looked up, and what all layers have
        in common is not asked again: since a layer's last turn the weights of all others have passed through the processor's
        cache, so that each lookup waits for memory. For the same reason one token's MLP is written out.
        """
        _, router, (weight, bias), second, prefixes = self._kept
        hidden = F.silu(F.linear(x if x.dtype == weight.dtype else x.to(weight.dtype), weight, bias), inplace=True)
        rows = F.linear(hidden, *second).tolist()
        if len(rows) > 1 or len(rows[0]) > 1:
            experts = [router.choose_one(row, sensitivity) for sequence in rows for row in sequence]
            return few_mlp(x.flatten(0, 1), experts, prefixes).view_as(x)
        gate, gate_bias, up, up_bias, down, down_bias, act = prefixes[router.choose_one(rows[0][0], sensitivity)]
        hidden = F.linear(x, up, up_bias)
        hidden = act(hidden) if gate is None else act(F.linear(x, gate, gate_bias)).mul_(hidden)
        return F.linear(hidden, down, down_bias)

    def keeps(self):
        """Whether what `_few_tokens` needs is at hand and in place."""
        kept = self._kept
        return kept is not None and not self.training and self._modules["router"] is kept.router and unmoved(kept.places)

    def _keep(self, x):
        """What `_few_tokens` needs, or None where there are no `prefixes`, or the router is none that `_is_plain` at `x`."""
        router, prefixes = self.router, self.prefixes(x)
        if type(router) is not TokenRouter or prefixes is None:
            return None
        first, second = router.input, router.output
        for linear in (first, second):
            weight = linear._parameters.get("weight") if type(linear) is nn.Linear else None
            if type(weight) is not nn.Parameter or weight.device != x.device:
                return None
        places = self._places() + [Place.of(router._modules, name) for name in ("input", "output")]
        in_silu = type(self.activation) in SILU
        act = partial(F.silu, inplace=True) if in_silu else getattr(self.activation, "forward", self.activation)
        whole = prefixes[-1]._replace(act=act)  # in place, or without what a module's call adds
        return Kept(places, router, (first.weight, first.bias), (second.weight, second.bias), Prefixes(whole, self.widths))

    def hidden(self, x):
        """Activations of all neurons, through the modules: (B, S, D) -> (B, S, H)."""
        up = self.up_linear(x)
        if self.layout.fused:
            gate, up = up.chunk(2, dim=-1)
            return up * self.activation(gate)
        if self.layout.gate is None:
            return self.activation(up)
        return self.activation(getattr(self, self.layout.gate)(x)) * up

    @torch.no_grad()
    def profile(self, hidden):
        """
        Similarity of each expert's output to the full one: (B, S, H) -> (B, S, E), float32.

        The blocks that each expert adds, summed from the last one down, are what the smaller experts leave out. That takes
        (1 - widths[0] / H) of one extra down product, and gives every similarity exactly.
        """
        output, tails = self.down_linear(hidden), []
        plain = self.prefixes(hidden) is not None
        for low, high in reversed(list(zip(self.widths, self.widths[1:]))):
            if plain:
                block = F.linear(hidden[..., low:high], self.down_linear.weight[:, low:high])
            else:
                only = torch.zeros_like(hidden)
                only[..., low:high] = hidden[..., low:high]
                block = self.down_linear(only) - self.down_linear(torch.zeros_like(hidden[:1, :1]))
            tails.append(block if not tails else tails[-1] + block)
        output = output.flatten(0, 1)
        tail_ETD = torch.stack(tails[::-1]).flatten(1, 2) if tails else output.new_zeros(0, *output.shape)
        error_weight = self.config.error_weights[self.layer] if self.config.error_weights else 1.0
        profile = similarity_profile(output, tail_ETD, self.config.similarity, error_weight, self.widths)
        return profile.view(*hidden.shape[:2], -1)

    def prefixes(self, x):
        """
        The `Projections` of each expert, as views, or None where a projection is wrapped, offloaded, elsewhere than `x`, or
        quantised without slices. Kept between calls without gradients: making them anew costs as much as the router.
        """
        keeps = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        places, prefixes = self._sliced
        if keeps and prefixes is not None and unmoved(places) and prefixes[-1].down.device == x.device:
            return prefixes
        linears = self._projections()
        weights = [linear._parameters["weight"] if type(linear) is nn.Linear else None for linear in linears]
        if any(type(weight) is not nn.Parameter or weight.device != x.device for weight in weights):
            return self._quantised_prefixes(linears, weights, x)
        prefixes = self._slice(linears)
        if keeps:
            self._forget()
            self._sliced = self._places(), prefixes
        return prefixes

    def _projections(self):
        return [self._modules[name] for name in self.layout.projections]

    def _places(self):
        return [Place.of(self._modules, name) for name in self.layout.projections]

    def _quantised_prefixes(self, linears, weights, x):
        """As `prefixes`, where a weight is a tensor of a quantiser's own class, such as torchao's int8 with a scale for each row."""
        if any(weight is None or weight.device != x.device for weight in weights) or torch.compiler.is_compiling():
            return None
        if self._sliced_quantised[0] is None or not unmoved(self._sliced_quantised[0]):
            self._forget()
            self._sliced_quantised = self._places(), self._checked_slice(linears, x)
        prefixes = self._sliced_quantised[1]
        return self._slice(linears) if prefixes is not None and torch.is_grad_enabled() else prefixes

    @torch.no_grad()
    def _checked_slice(self, linears, x):
        """
        `_slice`, or None where the slices do not compute what the modules compute with a mask. A quantiser's tensors may not
        slice at all, or not where a cut runs through a group with one scale, or may scale each input by its largest number.
        """
        x = torch.arange(self.down_linear.out_features, device=x.device).cos().to(x.dtype).view(1, 1, -1)
        try:
            prefixes, low = self._slice(linears), 0
            hidden = self.hidden(x)
            stairs = self.down_linear(torch.zeros_like(hidden))
            for expert, high in enumerate(self.widths):
                expected = self.down_linear(self._mask(hidden, torch.full((1, 1), expert, device=x.device)))
                block, low = prefixes[-1].block(low, high), high
                stairs = stairs + F.linear(block.hidden(x), block.down)
                for y in (dense_mlp(x, prefixes[expert]), stairs):
                    # Two roundings of a low precision, or the order of a sum in float32.
                    if not (y - expected).norm() <= max(1e-5, 2 * torch.finfo(x.dtype).eps) * expected.norm():
                        return None
        except Exception:  # whatever a foreign tensor class raises where it cannot do this
            return None
        return prefixes

    def _slice(self, linears):
        *gate, up, down = linears
        up_weight, up_bias, width = up.weight, up.bias, down.in_features
        gate_weight, gate_bias = (gate[0].weight, gate[0].bias) if gate else (None, None)
        if self.layout.fused:
            gate_weight, up_weight = up_weight[:width], up_weight[width:]
            gate_bias, up_bias = (None, None) if up_bias is None else (up_bias[:width], up_bias[width:])
        whole = Projections(gate_weight, gate_bias, up_weight, up_bias, down.weight, down.bias, self.activation)
        return Prefixes(whole, self.widths)

    def _apply(self, *args, **kwargs):
        self._forget()  # or the old tensors would live on beside the moved ones
        return super()._apply(*args, **kwargs)

    def __getstate__(self):
        return {**super().__getstate__(), **NOTHING_KEPT}

    def _forget(self):
        self.__dict__.update(NOTHING_KEPT)

    def _run(self, x, expert):
        """The chosen experts, (B, S) or one index for all, by the cheapest way that these modules and shapes allow."""
        one_for_all, compiling = not isinstance(expert, torch.Tensor), torch.compiler.is_compiling()
        prefixes = self.prefixes(x)
        if prefixes is None:
            if not compiling:  # logging would break the graph
                logger.warning_once(
                    "DynaMoE: the MLP projections are wrapped, offloaded, or quantised into something that cannot be sliced, so "
                    "every neuron is computed and the unused ones are masked: the same numbers, no speed-up. Merged adapters "
                    "(`merge_and_unload`) and int8 weights of torchao (`Int8WeightOnlyConfig`) are sliced."
                )
        elif one_for_all:
            return dense_mlp(x.flatten(0, 1), prefixes[expert]).view_as(x)
        elif self._on_device(x) and type(prefixes[-1].down) is torch.Tensor:  # not a quantiser's own class
            return triton_mlp(x.flatten(0, 1), expert.flatten(), prefixes[-1], self.act_name, self.widths).view_as(x)
        elif not self.training and not compiling:
            return routed_mlp(x.flatten(0, 1), expert.flatten(), prefixes).view_as(x)
        elif not (
            self.training or torch.is_grad_enabled()
        ):  # compiled, and no gradient is asked for, which the op does not have
            if expert.numel() == 1 and x.device.type == "cpu" and reads_numbers():
                return sliced_mlp(x.flatten(0, 1), expert.flatten(), prefixes[-1], self.widths).view_as(x)
            if self.act_name is not None and x.device.type == "cpu":  # it reads the routes, which CUDA graphs cannot
                *weights, _ = prefixes[-1]
                return routed_mlp_op(x.flatten(0, 1), expert.flatten(), *weights, self.act_name, self.widths).view_as(x)
        # In training the mask keeps the host out of the way: reading the counts would wait for the device.
        if one_for_all:
            expert = torch.full(x.shape[:2], expert, device=x.device)
        return self.down_linear(self._mask(self.hidden(x), expert))

    def _on_device(self, x):
        name = self.slot.mlp_implementation
        if name == "auto" and (not pays(x) or torch.is_grad_enabled()):
            return False
        return name != "torch" and runs_triton(x, self.act_name)

    def _mask(self, hidden, expert):
        """Zero the neurons beyond each token's expert: (B, S, H), (B, S) -> (B, S, H)."""
        # Filled on the device: a tensor made from a list would make the host wait for the copy.
        needs = torch.cat([torch.full((size,), index, device=hidden.device) for index, size in enumerate(self.block_sizes)])
        return hidden.masked_fill(needs > expert.unsqueeze(-1), 0)

    def _gated(self, hidden, gates):
        """Each block of neurons times its gate: (B, S, H), (B, S, E) -> (B, S, H)."""
        pairs = zip(hidden.split(self.block_sizes, -1), gates.to(hidden.dtype).split(1, -1))
        return torch.cat([block * gate for block, gate in pairs], -1)

    def _width(self, gates):
        """Share of the MLP's width that gates (B, S, E) let through: (B, S)."""
        return sum(gate * (size / self.widths[-1]) for gate, size in zip(gates.unbind(-1), self.block_sizes))

    def _random(self, histogram, x):
        if histogram is None:
            return torch.randint(len(self.widths), x.shape[:2], device=x.device)
        frequency = histogram[self.layer].to(x.device)
        return torch.multinomial(frequency, x.shape[0] * x.shape[1], replacement=True).view(x.shape[:2])

    def _for_each_token(self, sensitivity, x):
        if isinstance(sensitivity, torch.Tensor):
            return sensitivity.to(x.device, torch.float32).view(-1, 1).expand(x.shape[:2]).flatten()
        return sensitivity

    def _drop(self, y):
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


def default_router_dim(hidden_size, mlp_width):
    """Hidden size of a router that costs about 1% of a gated MLP of this shape, a multiple of 8: 48 for SmolLM2-135M."""
    return max(8, round(0.01 * 3 * mlp_width / 8) * 8)


class DynaMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """
    A dense causal language model of any supported family, its MLPs replaced by nested experts.

    `self.model` is the base's own backbone and `self.lm_head` its own head; the head's arithmetic (logit scales, soft-caps)
    is the base class's `forward`, run on this model. Build one from a dense model in memory with `from_dense`.
    """

    config_class = DynaMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    model_tags = ["dynamoe", "dynamic-moe", "conditional-computation"]
    # Routers stay float32 in float16 models, and quantisers skip what is listed here. The trap: they match from the start of
    # the full name, so that "router" alone would skip nothing.
    _keep_in_fp32_modules = [".*router"]

    def __init__(self, config, dense=None):
        dense_class = dense_class_of(config.base_config)
        # What attention back-ends the model supports is the base class's knowledge, and `super().__init__` asks for it.
        for flag in dir(dense_class):
            value = getattr(dense_class, flag)
            if (flag.startswith("_supports_") or flag == "_can_compile_fullgraph") and isinstance(value, bool):
                object.__setattr__(self, flag, value)
        super().__init__(config)
        adopting = dense is not None
        if not adopting:
            config.base_config._attn_implementation = config._attn_implementation
            dense = dense_class(config.base_config)
        layers = layers_of(dense)
        self.dense_class = dense_class
        self.slot = RoutingSlot()
        self.model, self.lm_head = dense.model, dense.lm_head
        # Plain attributes that the base's `forward` may read, such as Cohere's `logit_scale`.
        for name, value in vars(dense).items():
            if name not in vars(self) and not name.startswith("_"):
                setattr(self, name, value)
        for index, layer in enumerate(self.model.layers):
            layer.mlp = NestedMLP(layer.mlp, config, index, self.slot)
            layer.mlp.train(self.model.training)
        self._tied_weights_keys = dense._tied_weights_keys
        if adopting:
            # The weights are trained ones: only the routers are new, and `post_init` must not touch the rest.
            self.init_weights = lambda: None
            for module in self.modules():
                if isinstance(module, TokenRouter):
                    self._init_weights(module)
                    module.to(layers[0].mlp.down_linear.weight.device, layers[0].mlp.down_linear.weight.dtype)
        self.post_init()
        if adopting:
            del self.init_weights
            self.generation_config = dense.generation_config
            self.train(dense.training)
        # A prefix of a column-sharded projection would differ from rank to rank, so tensor parallelism replicates the MLPs.
        for module in (self, self.model):
            if getattr(module, "_tp_plan", None):
                module._tp_plan = {key: plan for key, plan in module._tp_plan.items() if ".mlp" not in key}

    @classmethod
    def from_dense(cls, dense, **config):
        """
        Turn a dense model in memory into a DynaMoE model, without copying a weight. `dense` is used up: its layers now
        hold nested MLPs. Routers are fresh and sensitivity is 1, so the outputs are still those of the dense model.

        Args:
            dense (`PreTrainedModel`): a causal language model of a supported family.
            config: fields of `DynaMoEConfig`, for example `expert_widths=[0.5, 1]`.

        Raises:
            ValueError: the family, or one of its layers, cannot be split; nothing has been changed then.
        """
        return cls(cls.config_for(dense, **config), dense=dense)

    @classmethod
    def config_for(cls, dense, **config):
        """The config that `from_dense` would give, with all its checks and without touching the model."""
        if getattr(dense.config, "model_type", None) == cls.config_class.model_type:
            raise ValueError("The model is a DynaMoE model already. Convert its dense base, or train it as it is.")
        dense_class_of(dense.config)
        own = cls.config_class(base_config=dense.config, **config)
        own.dtype = dense.config.dtype
        for index, layer in enumerate(layers_of(dense)):
            layout = layout_of(layer.mlp, f"model.layers.{index}.mlp")
            own.layer_widths(index, getattr(layer.mlp, layout.down).in_features)
        return own

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, TokenRouter):
            module.reset()
            for parameter in module.parameters():
                parameter._is_hf_initialized = True
        elif not (isinstance(module, nn.Linear) and getattr(module.weight, "_is_hf_initialized", False)):
            super()._init_weights(module)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        slot = self.slot

        def checkpoint_with_routing(function, *args, **options):
            # The trap: backward runs the layer again, after `forward` has put the routing back. So carry it along.
            again = replace(slot.current, records=None if slot.current.records is None else [])
            routings = chain([slot.current], repeat(again))

            def run(*inputs):
                previous, slot.current = slot.current, next(routings)
                try:
                    return function(*inputs)
                finally:
                    slot.current = previous

            return gradient_checkpointing_func(run, *args, **options)

        super()._set_gradient_checkpointing(enable, checkpoint_with_routing if enable else checkpoint, **kwargs)

    @contextmanager
    def routing(self, **settings):
        """
        Every forward pass inside is routed as `settings` say (fields of `Routing`); yields the records of the last pass.

        >>> with model.routing(route="label", records=[]) as routing:
        ...     model(input_ids)
        >>> routing.records[0].expert  # (B, S) of layer 0
        """
        previous, self.slot.current = self.slot.current, Routing(**settings)
        try:
            yield self.slot.current
        finally:
            self.slot.current = previous

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        sensitivity=None,
        force_expert=None,
        route=None,
        output_router_logits=None,
        return_dict=None,
        **kwargs,
    ):
        r"""
        As the base's `forward`, and:

        Args:
            sensitivity (`float` or `torch.Tensor` of shape (B,), *optional*):
                For this call only; a tensor gives each sequence its own. Defaults to `config.sensitivity`.
            force_expert (`int`, *optional*): one expert for every token, for this call only.
            route (`str`, *optional*):
                `"router"`, or for training and as baselines `"label"` (true difficulty) and `"random"` (uniform).
            output_router_logits (`bool`, *optional*): return `router_logits` and `expert_indices`.

        In training mode with `labels`, the tokens follow `config.train_route` at a sensitivity drawn for each sequence
        from `config.train_sensitivity`, and `loss` is the LM loss + `config.router_loss_coef` * the router loss.
        """
        config = self.config
        inputs = input_ids if input_ids is not None else inputs_embeds
        batch = inputs.shape[0]
        if isinstance(sensitivity, torch.Tensor):
            if sensitivity.shape not in ((batch,), ()):
                raise ValueError(
                    f"`sensitivity` must be a number or one for each of {batch} sequences, found {tuple(sensitivity.shape)}."
                )
            sensitivity = sensitivity.expand(batch)
        elif sensitivity is not None:
            check_sensitivity(sensitivity)
        if route is not None and route not in ROUTES:
            raise ValueError(f"`route` is unknown: found {route!r}. Choose one of {', '.join(ROUTES)}.")
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        outer = self.slot.current
        settings = {"sensitivity": sensitivity, "force_expert": force_expert, "route": route}
        routing = replace(outer, **{name: value for name, value in settings.items() if value is not None})
        train_routers = self.training and labels is not None and force_expert is None and config.force_expert is None
        if train_routers:
            routing.needs_labels = True
            if route is None and outer.route == "router":
                routing.route = config.train_route
            if routing.sensitivity is None:
                low, high = config.train_sensitivity
                routing.sensitivity = low + (high - low) * torch.rand(batch, device=inputs.device)
        if routing.sensitivity is None:
            routing.sensitivity = config.sensitivity
            if routing.force_expert is None:
                routing.force_expert = config.force_expert
        if routing.records is not None:
            routing.records.clear()
        elif output_router_logits or train_routers:
            routing.records = []
        routing.steady = self._is_steady(routing, inputs)
        self.slot.current = routing
        try:
            outputs = self.dense_class.forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                return_dict=True,
                **kwargs,
            )
        finally:
            self.slot.current = outer

        outputs = DynaMoECausalLMOutputWithPast(**outputs)
        if labels is not None:
            outputs.lm_loss = outputs.loss
        if train_routers:
            mask = loss_mask(labels, kwargs.get("shift_labels"))
            outputs.router_loss = mean_router_loss(routing.records, mask, kwargs.get("num_items_in_batch"))
            outputs.loss = outputs.lm_loss + config.router_loss_coef * outputs.router_loss
        if output_router_logits:
            outputs.router_logits = tuple(record.router_logits for record in routing.records)
            outputs.expert_indices = tuple(record.expert for record in routing.records)
        if not (config.return_dict if return_dict is None else return_dict):
            return outputs.to_tuple()
        return outputs

    def _is_steady(self, routing, inputs):
        """Whether this is a step of decoding that `NestedMLP._few_tokens` knows, in every layer."""
        return (
            not torch.compiler.is_compiling()
            and inputs.shape[0] * inputs.shape[1] <= FEW
            and not torch.is_grad_enabled()
            and not isinstance(routing.sensitivity, torch.Tensor)
            and routing.sensitivity < 1
            and routing.force_expert is None
            and routing.records is None
            and not routing.needs_labels
            and routing.route == "router"
            and routing.temperature is None
            and all(layer.mlp.keeps() for layer in self.model.layers)
        )

    def logits_of(self, hidden_states):
        """
        Logits of what the backbone returned, (B, S, D) -> (B, S, V), with the base's own scales and soft-caps: for losses that
        take the positions in chunks, since the logits of a whole batch are the largest tensor of a training step.
        """
        return self.dense_class.forward(_AfterBackbone(self, hidden_states), return_dict=True).logits

    def set_sensitivity(self, sensitivity):
        """Set the dial, theta in (0, 1], and release `force_expert`. Stored in the config, so it is saved with the model."""
        check_sensitivity(sensitivity)
        self._refuse_fixed_router()
        self.config.sensitivity, self.config.force_expert = float(sensitivity), None

    def set_budget(self, budget):
        """Set the dial by mean share of MLP width, within the budgets that `dynamoe calibrate` wrote. 1 is the dense model."""
        self._refuse_fixed_router()
        self.config.sensitivity, self.config.force_expert = self.config.sensitivity_of(budget), None

    def set_mlp_implementation(self, name):
        """
        `"torch"`, or `"triton"` for kernels whose routes never leave the GPU, in forward and backward: nothing waits for the
        device, and CUDA graphs can capture it. They need an NVIDIA GPU, Ampere or newer; elsewhere, and for wrapped or quantised
        MLPs, torch goes on. `"auto"`, the default, is Triton where it was measured to pay: without gradients, in two-byte
        dtypes, at compute capability 9.0 (H100, H200). Not saved with the model.
        """
        if name not in MLP_IMPLEMENTATIONS:
            raise ValueError(
                f"The MLP implementation is unknown: found {name!r}. Choose one of {', '.join(MLP_IMPLEMENTATIONS)}."
            )
        if name == "triton" and not TRITON:
            raise ImportError(
                "The Triton kernel needs Triton 3.3 or newer: none is installed. Install torch for CUDA, or `triton`."
            )
        self.slot.mlp_implementation = name
        for layer in self.model.layers:
            layer.mlp._kept = None  # made for another one

    def _refuse_fixed_router(self):
        if self.config.router_type == "argmax":
            raise ValueError(
                'This model has the argmax router, whose sensitivity is fixed by its training. Convert with router_type="profile" '
                "for a dial, or set `config.force_expert`."
            )


class _AfterBackbone:
    """A causal language model whose backbone has run, so that the base's `forward` is its head alone."""

    def __init__(self, causal_lm, hidden_states):
        self._causal_lm, self._hidden_states = causal_lm, hidden_states

    def __getattr__(self, name):
        return getattr(self._causal_lm, name)

    def model(self, **kwargs):
        return BaseModelOutputWithPast(last_hidden_state=self._hidden_states)


def dense_class_of(base_config):
    """The `...ForCausalLM` class of a dense config. Raises `ValueError` for what is not a dense causal language model."""
    if type(base_config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{type(base_config).__name__} (model type {base_config.model_type!r}) has no causal language model. "
            "Give a decoder of a family built like Llama, for example llama, mistral, qwen3, gemma2 or phi3."
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(base_config)]


def layers_of(dense):
    """The decoder layers of a dense model. Raises `ValueError` unless they are at `model.layers` and each has an `mlp`."""
    layers = getattr(dense.base_model, "layers", None)
    if dense.base_model_prefix != "model" or layers is None or not all(hasattr(layer, "mlp") for layer in layers):
        raise ValueError(
            f"{type(dense).__name__} cannot be converted: its layers are not at `model.layers.*.mlp`. "
            "Supported are decoder families built like Llama, for example llama, mistral, qwen3, gemma2 or phi3."
        )
    return layers


def loss_mask(labels, shift_labels=None):
    """(B, S) bool: the positions whose next token counts in the LM loss, so that all losses share one normaliser."""
    return F.pad(labels[..., 1:] != -100, (0, 1)) if shift_labels is None else shift_labels != -100


def mean_router_loss(records, mask, num_items=None):
    """
    Mean over layers and real tokens. A sum divided by `num_items_in_batch`, like the LM loss: a mean for each micro-batch
    would change the update with gradient accumulation.
    """
    total = sum((record.router_loss * mask.to(record.router_loss.device)).sum().to(mask.device) for record in records)
    return total / len(records) / (mask.sum() if num_items is None else num_items)


__all__ = ["DynaMoEForCausalLM"]
