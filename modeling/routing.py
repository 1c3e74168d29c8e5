# SPDX-License-Identifier: Apache-2.0
"""
Which expert each token takes: the routers, the settings of one forward pass, and what its layers record.

Shapes: B batch, S sequence, D hidden size, E experts, R router size.
"""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .engine_layers import BareLinear
from .sparsity import Thresholds, density_at, thresholds_at


logger = logging.get_logger(__name__)
ROUTES = ("router", "label", "random")


class LayerRecord(NamedTuple):
    """
    What one layer did with each token of one forward pass. `profile` and what follows only where labels were needed. A mixture has
    router logits, expert, profile and label for each of the K experts that a token is sent to: (B, S, K, ...).
    """

    router_logits: torch.Tensor  # (B, S, E - 1); (B, S, E) with the argmax router
    expert: torch.Tensor  # (B, S) int64
    share: torch.Tensor  # (B, S) share of the MLP's weights that the token reads, float32
    profile: Any = None  # (B, S, E) true similarities
    label: Any = None  # (B, S) int64
    router_loss: Any = None  # (B, S)
    width: Any = None  # (B, S) share of the MLP's width, with a gradient, where the routing has a temperature
    index: Any = None  # (B, S, K) the experts of a mixture that its own router sends the token to
    layer: int = 0  # among the nested MLPs


@dataclass(frozen=True)
class Routing:
    """
    How the tokens of one forward pass find their experts. It is resolved once a pass and does not change within it.

    Args:
        sensitivity: a number, or one for each sequence, (B,), or token, (B, S). `None`: as the config says.
        density: share of an expert's weights that is read, likewise. `None`: what the dial joins to the sensitivity, and
            1 where an expert is forced.
        force_expert: one expert for every token.
        route: one of `ROUTES`: the router's choice, the true label, or drawn at random.
        needs_labels: measure the true similarities too, which takes every neuron.
        histogram: frequencies of the experts on the random route, (L, E); uniform where it is `None`.
        temperature: of `ProfileRouter.gates`, for routers that learn from what their choices do.
        records: a list that each pass empties and fills, one `LayerRecord` a nested MLP, in the order of `DynaMoEConfig.mlp_names`.
        thresholds: those of each nested MLP at this density; `with_defaults` sets them.
        shape: of the tokens, (B, S), which mixtures read as one row.
        gradients: whether the pass began with gradients.
    """

    sensitivity: float | torch.Tensor | None = None
    density: float | torch.Tensor | None = None
    force_expert: int | None = None
    route: str = "router"
    needs_labels: bool = False
    histogram: torch.Tensor | None = None
    temperature: float | None = None
    records: list[LayerRecord] | None = None
    thresholds: tuple[Thresholds, ...] | None = None
    shape: torch.Size | None = None
    gradients: bool = False

    @property
    def draws(self) -> bool:
        """Whether experts are drawn at random."""
        return self.route == "random" or self.temperature is not None

    def with_defaults(self, config) -> "Routing":
        """Filled in from the model's config: the sensitivity where none was asked for, and the thresholds."""
        routing = self
        if self.sensitivity is None:
            forced = config.force_expert if self.force_expert is None else self.force_expert
            routing = replace(self, sensitivity=config.sensitivity, force_expert=forced)
        density = routing.density
        if config.thresholds is None:
            if isinstance(density, torch.Tensor) or density not in (None, 1):
                raise ValueError(
                    f"`density` needs thresholds, found density={density} and none in the config. `dynamoe calibrate` fits them."
                )
            return routing
        if density is None:
            if routing.force_expert is not None:
                return routing
            density = density_at(
                config.density_path, config.sensitivity if routing.sensitivity is None else routing.sensitivity
            )
        return replace(routing, thresholds=thresholds_at(config.thresholds, density, config.threshold_ramp))


class RoutingSlot:
    """
    Hands the routing from a model to its layers: decoder layers pass nothing but hidden states to their MLP.

    Each thread has its own, so forward passes in several threads do not meet. Copies of a model get a slot of their own.
    """

    def __init__(self):
        self._local = threading.local()
        self.mlp_implementation = "auto"  # a setting of the model, not of a pass
        self.mesh: Any = None  # the processes of tensor parallelism

    @property
    def requested(self) -> Routing:
        """What `model.routing(...)` asks of every pass in this thread."""
        return getattr(self._local, "requested", Routing())

    @property
    def current(self) -> Routing | None:
        """The resolved routing of the pass that is running in this thread, or `None`."""
        return getattr(self._local, "current", None)

    @contextmanager
    def request(self, routing: Routing) -> Iterator[Routing]:
        """Passes inside are routed as `routing` says, where a call does not say otherwise."""
        previous, self._local.requested = self.requested, routing
        try:
            yield routing
        finally:
            self._local.requested = previous

    def draw_alike(self, device: torch.device, draws: bool) -> None:
        """Let all processes of tensor parallelism draw what the first one draws next, where a pass does: they must route alike."""
        if draws and self.mesh is not None:
            source: Any = torch if device.type == "cpu" else torch.get_device_module(device)
            state = source.get_rng_state().to(device)
            torch.distributed.broadcast(state, group=self.mesh.get_group(), group_src=0)
            source.set_rng_state(state.cpu())

    def exchange(self, routing: Routing | None) -> Routing | None:
        """Make `routing` the current one and return the one before. For `try`/`finally`, which compilers trace."""
        previous, self._local.current = self.current, routing
        return previous

    @staticmethod
    def check_first_run() -> None:
        """Raise `ValueError` where backward runs layers again without a routing: their pass, and what it asked for, are over."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise ValueError(
                "Backward runs a layer again and cannot know which experts its tokens took: found activation checkpointing around "
                "layers, such as torch's `checkpoint_wrapper` or FSDP's `activation_checkpointing`. Use the model's own: "
                "`model.gradient_checkpointing_enable()`, or `gradient_checkpointing=True` of a Trainer."
            )

    def of_layer(self, config) -> Routing:
        """
        The routing that a layer reads: the current one, or that of a call to the layer alone. Raises `ValueError` where what it
        records would get no gradient, and as `check_first_run`.
        """
        routing = self.current
        if routing is None:
            self.check_first_run()
            return self.requested.with_defaults(config)
        learns = routing.needs_labels or routing.temperature is not None
        if learns and routing.gradients and not torch.is_grad_enabled():
            raise ValueError(
                "Routers would get no gradient: found layers that run without gradients in a pass with them, as in reentrant activation "
                "checkpointing. Use the model's own: `model.gradient_checkpointing_enable()`, or `gradient_checkpointing=True` of a Trainer."
            )
        return routing

    def __deepcopy__(self, memo):
        copied = RoutingSlot()
        copied.mlp_implementation = self.mlp_implementation
        return copied

    def __reduce__(self):
        return RoutingSlot, ()


def checkpoint_with_routing(slot: RoutingSlot, checkpoint: Callable) -> Callable:
    """
    `checkpoint`, torch's with some of its options, for layers that read `slot`. The trap: backward runs a layer again, after the pass
    and maybe in another thread. So the routing is carried along. The reentrant kind runs layers without gradients: only what a layer
    returns gets one, and the losses of routers and hidden states do not. The other kind replaces it, with a warning; where it cannot
    be replaced, a layer that is called raises `ValueError`.
    """
    if isinstance(checkpoint, partial):  # torch's own default is the reentrant kind
        if checkpoint.keywords.get("use_reentrant"):
            logger.warning_once(
                "DynaMoE: reentrant activation checkpointing gives routers no gradient, found use_reentrant=True. It runs with "
                "use_reentrant=False."
            )
        checkpoint = partial(checkpoint.func, *checkpoint.args, **{**checkpoint.keywords, "use_reentrant": False})

    def checkpointed(function, *args, **options):
        current, gradients = slot.current, torch.is_grad_enabled()
        # The pass has its records already.
        again = current if current is None or current.records is None else replace(current, records=[])
        routings = chain([current], repeat(again))

        def run(*inputs):
            if gradients and not torch.is_grad_enabled():
                raise ValueError(
                    "Reentrant activation checkpointing gives routers no gradient, found use_reentrant=True. Set "
                    '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
                )
            previous = slot.exchange(next(routings))
            try:
                return function(*inputs)
            finally:
                slot.exchange(previous)

        return checkpoint(run, *args, **options)

    return checkpointed


class TokenRouter(nn.Module):
    """
    Predicts from what an MLP reads how difficult each token is for it: (..., D) -> (..., outputs) logits.

    A rule for routing is one subclass: what the logits mean (`logits_of`), the expert that they name (`choose`), and how they
    are trained (`loss`, and `gates` where they can learn from what their choices do).
    """

    has_dial: ClassVar[bool]  # whether `sensitivity` has a meaning after training

    def __init__(self, hidden_size: int, router_dim: int, experts: int):
        super().__init__()
        self.input = BareLinear(nn.Linear(hidden_size, router_dim))
        self.output = BareLinear(nn.Linear(router_dim, self.outputs(experts)))

    @staticmethod
    def outputs(experts: int) -> int:
        """Number of logits."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self) -> None:
        """Begin anew: every token gets the same logits."""
        nn.init.normal_(self.input.weight, std=self.input.in_features**-0.5)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits_of(self.read(x))

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of the last layer: (..., D) -> (..., outputs)."""
        first: Any = self.input
        return self.output(F.silu(first(x.to(first.weight.dtype))))

    def logits_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """The logits, from the outputs of the last layer: (..., outputs) -> (..., outputs)."""
        return outputs

    def is_off(self, sensitivity: float | torch.Tensor) -> bool:
        """Whether every token takes the full width at this sensitivity, so that there is nothing to predict."""
        return False

    def choose(self, logits: torch.Tensor, sensitivity: float | torch.Tensor) -> torch.Tensor:
        """Expert of each token: logits (B, S, ..., outputs), a number, (B,) or (B, S) -> (B, S, ...) int64."""
        raise NotImplementedError

    def choose_fused(self, x: torch.Tensor, sensitivity: float | torch.Tensor) -> torch.Tensor | None:
        """As `choose(self(x), sensitivity)` in one Triton kernel, (B, S, D) -> (B, S), or `None` where there is none."""
        return None

    def loss(self, logits: torch.Tensor, profile: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Loss of each token: (B, S, outputs), true similarities (B, S, E), labels (B, S) -> (B, S) float32."""
        raise NotImplementedError


class ProfileRouter(TokenRouter):
    """
    Predicts the whole profile: the sigmoid of logit e is the predicted similarity of expert e, rising in e by construction.
    A token takes the smallest expert whose predicted similarity reaches the sensitivity. (..., D) -> (..., E - 1) logits.
    """

    has_dial = True

    @staticmethod
    def outputs(experts):
        return experts - 1

    def logits_of(self, outputs):
        if outputs.shape[-1] < 2:
            return outputs
        # Each logit adds a positive step to the one before, so the profile rises.
        return torch.cat([outputs[..., :1], F.softplus(outputs[..., 1:])], -1).cumsum(-1)

    def is_off(self, sensitivity):
        return not isinstance(sensitivity, torch.Tensor) and sensitivity >= 1

    def choose(self, logits, sensitivity):
        # Compared as logits, so that sensitivity 1 is never reached.
        return (logits.float() < logit_of(sensitivity, logits)).sum(-1)

    def choose_fused(self, x, sensitivity):
        # The trap: vLLM pickles the config's module by value, with all that it refers to, and Triton's kernels cannot be pickled.
        from .nested_mlp_triton import triton_choose

        first, second = self.input, self.output
        if plain_parameters([first, second], x.device) is None or second.out_features == 0:
            return None
        threshold = logit_of(sensitivity, x)
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.expand(*x.shape[:2], 1).flatten()
        hidden = first(x.to(first.weight.dtype)).flatten(0, 1)
        return triton_choose(hidden, second.weight, second.bias, threshold).view(x.shape[:2])

    def gates(self, logits: torch.Tensor, sensitivity: float | torch.Tensor, temperature: float) -> torch.Tensor:
        """
        Which blocks of neurons each token takes, for training: (B, S, E - 1) logits -> (B, S, E), 1 or 0, the first always 1.

        The choice under one draw of logistic noise a token, with the gradient of a sigmoid: the straight-through estimator of
        binary concrete variables (Maddison, Mnih and Teh, 2017). So what a block does to a loss reaches the logit that
        decides on it.
        """
        logits = logits.float()
        noise = torch.logit(torch.rand_like(logits[..., :1]), eps=1e-4) * temperature
        margin = logit_of(sensitivity, logits) + noise - logits
        soft = (margin / temperature).sigmoid()
        return F.pad((margin > 0).float() + soft - soft.detach(), (1, 0), value=1.0)

    def loss(self, logits, profile, label):
        """Binary cross-entropy against the true similarities."""
        return _binary_cross_entropy(logits, profile[..., :-1].clamp(0, 1))


class ArgmaxRouter(TokenRouter):
    """The paper's: (..., D) -> (..., E) logits, the largest of which names the expert. Its training fixes the sensitivity."""

    has_dial = False

    @staticmethod
    def outputs(experts):
        return experts

    @torch.no_grad()
    def reset(self):
        super().reset()
        self.output.bias[-1] = 1.0  # untrained, it takes the full width, as the other router does at sensitivity 1

    def choose(self, logits, sensitivity):
        return logits.argmax(-1)

    def loss(self, logits, profile, label):
        """Binary cross-entropy against the one-hot label."""
        return _binary_cross_entropy(logits, F.one_hot(label, profile.shape[-1]))


ROUTERS: dict[str, type[TokenRouter]] = {"profile": ProfileRouter, "argmax": ArgmaxRouter}


def router_names(model: nn.Module) -> set[str]:
    """Names of the parameters of all routers, in a model wrapped or not. Bases that are mixtures have routers of their own."""
    routers = [(name, module) for name, module in model.named_modules() if isinstance(module, TokenRouter)]
    return {f"{name}.{leaf}" for name, router in routers for leaf, _ in router.named_parameters()}


def _binary_cross_entropy(logits, target):
    loss = F.binary_cross_entropy_with_logits(logits.float(), target.float(), reduction="none")
    return loss.mean(-1) if loss.shape[-1] else loss.sum(-1)


def logit_of(sensitivity: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """
    The logit that a predicted similarity must reach: a number, or (B,) or (B, S) -> (B, 1 or S, 1, ...), as many dimensions as
    `like` (B, S, ...) has. Infinite at sensitivity 1.
    """
    if isinstance(sensitivity, torch.Tensor):
        logits = torch.logit(sensitivity.to(like.device, torch.float32))
        return logits.view(len(sensitivity), -1, *[1] * (like.ndim - 2))
    return math.log(sensitivity / (1 - sensitivity)) if sensitivity < 1 else math.inf


def plain_parameters(linears: Iterable[nn.Module | None], device) -> list[dict] | None:
    """
    The parameters of linear layers whose weights may be read instead of calling the layers: bare ones on `device`, neither
    wrapped (LoRA), nor offloaded, nor quantised, and without hooks, which a call fires. `None` if one is not like that.
    """
    found = []
    for linear in linears:
        if linear is None or type(linear) not in (nn.Linear, BareLinear) or has_hooks(linear):
            return None
        weight: Any = linear._parameters.get("weight")
        if type(weight) not in (nn.Parameter, torch.Tensor) or weight.device != device:
            return None
        found.append(linear._parameters)
    return found


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its `forward`: hooks of its own or global ones, or a patched `forward`."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # accelerate replaces `forward` to move inputs between devices; a weight that is on the input's device needs no such move.
    patched = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
    return patched or bool(nn.modules.module._has_any_global_hook())


def default_router_dim(mlp_width: int) -> int:
    """Hidden size of a router that costs about 1% of a gated MLP of this width, a multiple of 8: 48 for SmolLM2-135M."""
    return max(8, round(0.01 * 3 * mlp_width / 8) * 8)


def loss_mask(labels: torch.Tensor, shift_labels: torch.Tensor | None = None) -> torch.Tensor:
    """(B, S) bool: the positions whose next token counts in the LM loss, so that all losses share one normaliser."""
    return F.pad(labels[..., 1:] != -100, (0, 1)) if shift_labels is None else shift_labels != -100


def mean_router_loss(records: list[LayerRecord], mask: torch.Tensor, num_items=None) -> torch.Tensor:
    """
    Mean over layers and positions of `mask`. A sum divided by `num_items` (`num_items_in_batch` of `Trainer`), like the LM
    loss: a mean for each micro-batch would change the update with gradient accumulation. 0 where no position counts.
    """
    total = sum((record.router_loss * mask.to(record.router_loss.device)).sum().to(mask.device) for record in records)
    count = mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)
    return total / len(records) / count.clamp_min(1)
