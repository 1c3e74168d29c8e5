# SPDX-License-Identifier: Apache-2.0
"""
Slices of quantised weights. Slicing a tensor of a quantiser's own class, such as torchao's int8 with a scale for each row, takes
as long as a third of the product that it saves in a small model, so the slices are kept while the weights are the same objects.
`benchmarks/int8.py` shows the gain. Without this file quantised MLPs are masked: the same numbers, no speed-up.
"""

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


class QuantizedSlices:
    """The slices of one layer. They are made anew when a weight, or a tensor inside it, is another object than before."""

    def __init__(self):
        self._parts: list[torch.Tensor] = []
        self._tensors: Projections | None = None

    def tensors(self, mlp: nn.Module, layout: Layout, widths: list[int], x: torch.Tensor) -> Projections | None:
        """The weights of `mlp`, or `None` where a weight is on another device than `x` or its slices do not compute the same."""
        weights: list = [getattr(getattr(mlp, name), "weight", None) for name in layout.projections]
        if torch.compiler.is_compiling() or any(weight is None or weight.device != x.device for weight in weights):
            return None
        parts = [part for weight in weights for part in inner_tensors(weight)]
        if len(parts) != len(self._parts) or any(a is not b for a, b in zip(parts, self._parts)):
            self._tensors, self._parts = _checked_tensors(mlp, layout, widths, x), parts
        if self._tensors is not None and torch.is_grad_enabled():
            return layout.tensors(mlp)  # slices made without gradients pass none on
        return self._tensors

    def __deepcopy__(self, memo):
        return QuantizedSlices()

    def __reduce__(self):
        return QuantizedSlices, ()


def inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a tensor of a wrapping class holds, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in inner_tensors(getattr(tensor, name))]


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
