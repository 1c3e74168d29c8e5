# SPDX-License-Identifier: Apache-2.0
"""
Slices of quantised weights. Slicing a tensor of a quantiser's own class, such as torchao's int8 with a scale for each row, takes
as long as a third of the product that it saves in a small model, so the slices are kept while the weights are the same objects.
`benchmarks/int8.py` shows the gain. Without this file quantised MLPs are masked: the same numbers, no speed-up.
"""

from typing import NamedTuple

import torch
from torch import nn

from .dense_base import Layout, Projections
from .mlp_backends import mask_hidden


class KeptProjections(Projections):
    """`Projections` that make each block once."""

    def block(self, low, high):
        blocks = self.__dict__.setdefault("blocks", {})
        if (low, high) not in blocks:
            blocks[low, high] = super().block(low, high)
        return blocks[low, high]


class Part(NamedTuple):
    """A tensor and where it is held."""

    holder: dict
    name: str
    tensor: torch.Tensor


class QuantizedSlices:
    """The slices of one layer. They are made anew when a weight, or a tensor inside it, is another object than before."""

    def __init__(self):
        self._parts: list[Part] = []
        self._tensors: Projections | None = None

    def tensors(self, mlp: nn.Module, layout: Layout, widths: list[int], x: torch.Tensor) -> Projections | None:
        """The weights of `mlp`, or `None` where a weight is on another device than `x` or its slices do not compute the same."""
        linears = [getattr(mlp, name) for name in layout.projections]
        weights: list = [linear._parameters.get("weight") for linear in linears]
        if torch.compiler.is_compiling() or any(weight is None for weight in weights):
            return None
        same = all(holder.get(name) is part for holder, name, part in self._parts)
        if not self._parts or not same or any(kept[0] is not w._parameters for kept, w in zip(self._parts, linears)):
            if any(weight.device != x.device for weight in weights):
                return None
            self._tensors = _checked_tensors(mlp, layout, widths, x)
            self._parts = [Part(linear._parameters, "weight", weight) for linear, weight in zip(linears, weights)]
            self._parts += [part for weight in weights for part in inner_parts(weight)]
        # Slices made without gradients pass none on, and the numbers of a plain weight may be replaced inside of it.
        if self._tensors is not None and (torch.is_grad_enabled() or any(type(w) is nn.Parameter for w in weights)):
            return layout.tensors(mlp)
        return self._tensors

    def __deepcopy__(self, memo):
        return QuantizedSlices()

    def __reduce__(self):
        return QuantizedSlices, ()


def inner_parts(tensor: torch.Tensor) -> list[Part]:
    """The tensors that a tensor of a wrapping class holds, and those that they hold."""
    found: list[Part] = []
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            found += [Part(vars(tensor), name, part), *inner_parts(part)]
    return found


@torch.no_grad()
def _checked_tensors(mlp, layout, widths, x):
    """
    The weights, or `None` where slices do not compute what the modules compute with a mask. A quantiser's tensors may not
    slice at all, or not where a cut runs through a group with one scale, or may scale each input by its largest number.
    """
    down = getattr(mlp, layout.down)
    x = torch.arange(down.out_features, device=x.device).cos().to(x.dtype).view(1, 1, -1)
    try:
        tensors, low = KeptProjections(*layout.tensors(mlp)), 0
        hidden = layout.hidden(mlp, x)
        stairs = down(torch.zeros_like(hidden))
        for expert, high in enumerate(widths):
            expected = down(mask_hidden(hidden, expert, widths))
            block, low = tensors.block(low, high), high
            prefix, stairs = tensors.block(0, high), stairs + nn.functional.linear(block.hidden(x), block.down)
            for y in (prefix.output(prefix.hidden(x)), stairs):
                # Two roundings of a low precision, or the order of a sum in float32.
                if not (y - expected).norm() <= max(1e-5, 2 * torch.finfo(x.dtype).eps) * expected.norm():
                    return None
    except Exception:  # whatever a foreign tensor class raises where it cannot do this
        return None
    return tensors
