# SPDX-License-Identifier: Apache-2.0
"""
All that is known about mixtures of experts as bases: how transformers holds the routed experts of a layer, and which neurons are whose.

Shapes: T tokens, D hidden size, N experts of a mixture, K of them for a token, H neurons of each.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .dense_base import Layout, MLPPlace, Projections, layout_of, mlp_places


class AlternatingProjections(Projections):
    """`Projections` whose `up` (2H, D) holds gate and up of each neuron in turn; `act` takes both: (..., 2H) -> (..., H)."""

    def block(self, low, high):
        rows = slice(2 * low, 2 * high)
        bias = None if self.up_bias is None else self.up_bias[rows]
        return self._replace(up=self.up[rows], up_bias=bias, down=self.down[:, low:high])


class ExpertsLayout(NamedTuple):
    """
    How one module holds the routed experts of a mixture: `gate_up_proj` (N, 2H, D) and `down_proj` (N, D, H), biases under the same
    names with `_bias`. `transposed`: the last two dimensions change places. `alternating`: gate and up of each neuron lie side by
    side, not all gates before all ups.
    """

    transposed: bool
    alternating: bool
    biased: bool

    @property
    def projections(self) -> list[str]:
        """Names of linear layers, which experts do not have."""
        return []

    def width(self, experts: Any) -> int:
        """Neurons of each expert."""
        return experts.down_proj.shape[1 if self.transposed else 2]

    @property
    def names(self) -> list[str]:
        """Of the tensors that hold all experts."""
        return [name + kind for kind in (("", "_bias") if self.biased else ("",)) for name in ("gate_up_proj", "down_proj")]

    def tensors(self, experts: Any, number: int) -> Projections:
        """The weights of one expert, as views."""
        return self._projections(experts, *(getattr(experts, name)[number] for name in self.names))

    def tensors_of_all(self, experts: Any) -> Callable[[int], Projections]:
        """
        `tensors`, of many experts in one pass. The trap: the gradient of `tensor[number]` is as large as the tensor of all experts, so
        with gradients that is taken apart once.
        """
        if not torch.is_grad_enabled():
            return partial(self.tensors, experts)
        parts = [getattr(experts, name).unbind(0) for name in self.names]
        return lambda number: self._projections(experts, *(part[number] for part in parts))

    def _projections(self, experts, gate_up, down, bias=None, down_bias=None):
        if self.transposed:
            gate_up, down = gate_up.t(), down.t()
        if self.alternating:
            return AlternatingProjections(None, None, gate_up, bias, down, down_bias, experts._apply_gate)
        (gate, up), (gate_bias, up_bias) = gate_up.chunk(2), (None, None) if bias is None else bias.chunk(2)
        return Projections(gate, gate_bias, up, up_bias, down, down_bias, experts.act_fn)

    @torch.no_grad()
    def reorder(self, experts: Any, order_NH: torch.Tensor) -> None:
        """Permute the neurons of each expert in place."""
        for name in self.names[:3]:  # all but the bias of the output
            for tensor, order in zip(getattr(experts, name), order_NH):
                index = order if name == "down_proj" else self._rows(order, len(order))
                dim = self._neurons_at(name) - 1
                tensor.copy_(tensor.index_select(dim, index.to(tensor.device)))

    def narrow(self, name: str, tensor: torch.Tensor, neurons: int) -> torch.Tensor:
        """The first `neurons` of one tensor of the experts, named as in their state dict."""
        if name == "down_proj_bias":
            return tensor
        dim, kept = self._neurons_at(name), torch.arange(neurons)
        if name != "down_proj":
            kept = self._rows(kept, tensor.shape[dim] // 2)
        return tensor.index_select(dim, kept.to(tensor.device))

    @torch.no_grad()
    def cut(self, experts: Any, widths: list[int]) -> None:
        """Let each expert have no neurons beyond its width: their weights become 0."""
        for number, width in enumerate(widths):
            outside = self.tensors(experts, number).block(width, self.width(experts))
            for tensor in outside[:5]:  # all but the bias of the output
                if tensor is not None:
                    tensor.zero_()

    @torch.no_grad()
    def lay_by_neuron(self, experts: Any) -> None:
        """Let the weights of each neuron follow one another in memory, so that a prefix is one piece of it. No number changes."""
        for name in ("gate_up_proj", "down_proj"):
            parameter, dim = getattr(experts, name), self._neurons_at(name)
            parameter.data = parameter.movedim(dim, 1).contiguous().movedim(1, dim)

    def _rows(self, neurons, width):
        """The rows of `gate_up_proj` that hold these of `width` neurons, in the same layout."""
        if self.alternating:
            return torch.stack([2 * neurons, 2 * neurons + 1], -1).flatten()
        return torch.cat([neurons, neurons + width])

    def _neurons_at(self, name):
        """The dimension along which a tensor of all experts has neurons."""
        if name == "gate_up_proj_bias":
            return 1
        return 1 if (name == "down_proj") == self.transposed else 2


def is_mixture(module: nn.Module) -> bool:
    """Whether a module holds the routed experts of a mixture: all of them in one tensor."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)


def layout_at(place: MLPPlace) -> Layout | ExpertsLayout:
    """The layout of an MLP or of a mixture's experts. Raises `ValueError`, naming the module, where they cannot be split."""
    experts: Any = place.mlp
    if place.attribute != "experts":
        return layout_of(experts, place.name)
    alternating = not getattr(experts, "is_concatenated", True)
    gate = getattr(type(experts), "_apply_gate", None)
    # Where gates lie before ups, a prefix is two blocks, for which the activation must be that of transformers: act(gate) * up.
    supported = gate is not None and (alternating or gate.__module__ == "transformers.integrations.moe")
    supported = supported and isinstance(getattr(experts, "gate_up_proj", None), nn.Parameter)
    if not supported or getattr(experts, "has_post_expert_norm", False):
        raise ValueError(
            f"`{place.name}` cannot be split into nested experts: found {type(experts).__name__}. Supported are mixtures that hold "
            "`gate_up_proj` and `down_proj` of all experts as transformers' `use_experts_implementation` asks, with an activation of the "
            "gate alone, or with gate and up side by side, and without a norm behind each expert."
        )
    return ExpertsLayout(experts.is_transposed, alternating, experts.has_bias)


def check_mixture(config: Any) -> None:
    """Raise `ValueError` unless a `DynaMoEConfig` has what a mixture needs: weights of experts enter the error, and the router's logits."""
    if not config.weighs_loss or config.router_type != "profile":
        raise ValueError(
            "A mixture weighs the error of an expert by the weight that its own router gives it, so it needs a similarity weighted by "
            f'the loss and the profile router: found {config.similarity!r} and {config.router_type!r}. Take "loss_gain" or '
            '"loss_weighted", and "profile".'
        )


def checked_cuts(config: Any, layer: int, experts: int, width: int) -> list[int] | None:
    """The `cut_widths` of a layer of a `DynaMoEConfig`. Raises `ValueError` where they are not those of so many experts of this width."""
    found = config.cut_widths and config.cut_widths[layer]
    if found and (len(found) != experts or max(found) > width):
        raise ValueError(
            f"`cut_widths` of layer {config.mlp_names[layer]} must be {experts} numbers of at most {width} neurons, found {found}. Take them from the config "
            "of the folder that holds the weights."
        )
    return found or None


def base_routers(backbone: Any) -> list[nn.Module]:
    """What chooses the experts of each mixture of a backbone: the base's own router."""
    blocks = [place.owner for place in mlp_places(backbone) if place.attribute == "experts"]
    return [getattr(block, name) for block in blocks for name in ("gate", "router") if hasattr(block, name)]


def rows_by_expert(index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Each expert that tokens are sent to, and its rows among the T * K pairs of token and expert, index (T, K)."""
    return ((expert, rows) for expert, rows, _ in rows_by_width(index, torch.zeros_like(index), experts, 1))


def rows_by_width(
    index: torch.Tensor, width: torch.Tensor, experts: int, widths: int
) -> Iterator[tuple[int, torch.Tensor, list[int]]]:
    """As `rows_by_expert`, the rows of an expert sorted by their width, widest first, and how many take each: (T, K) twice."""
    key = (index * widths + (widths - 1 - width)).flatten()
    counts = torch.bincount(key, minlength=experts * widths).view(experts, widths).flip(-1).tolist()
    found = [(expert, taken) for expert, taken in enumerate(counts) if any(taken)]
    rows = key.argsort(stable=True).split([sum(taken) for _, taken in found])
    return ((expert, each, taken) for (expert, taken), each in zip(found, rows))
