# SPDX-License-Identifier: Apache-2.0
"""
Weights laid out for oneDNN on a CPU: the numbers of the model, in the order in which the processor multiplies them. PyTorch's float32
products on AMD processors take two to five times as long as these, at any number of tokens (docs/results.md).

A layout cannot be cut afterwards, so blocks of neurons that end at widths have their own, gate above up, and a prefix is the first
blocks. Where a width lies within a block, the block is computed and what is beyond is cleared.

Shapes: T tokens, D hidden size, C neurons of a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .dense_base import Projections
from .mlp_backends import activation_of
from .sparsity import Thresholds, keep_large


SMALLEST_BLOCK = 500_000  # weights: a call takes as long as reading a third of them
EXACT_ROWS = 32  # oneDNN prepares each number of rows once; above, numbers are rounded up to a few


def lay_out(weight: torch.Tensor) -> torch.Tensor:
    """(outputs, inputs) as oneDNN reads it: opaque, and of the same dtype."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """(T, inputs) -> (T, outputs)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def add_product(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y + product(x, weight)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, y, weight, None, "add")


def is_available(dtype: torch.dtype) -> bool:
    """Whether this PyTorch and this processor have the products, in that dtype."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Blocks(NamedTuple):
    """The projections of one MLP, in blocks of neurons that end at `ends`."""

    ends: list[int]  # rising
    inputs: list[torch.Tensor]  # (2 C, D), or (C, D) without a gate
    outputs: list[torch.Tensor]  # (D, C)
    input_biases: list[torch.Tensor | None]
    down_bias: torch.Tensor | None  # (D,)
    act: Callable[[torch.Tensor], torch.Tensor]
    gated: bool

    def run(
        self,
        x: torch.Tensor,
        expert: int | torch.Tensor,
        widths: list[int],
        thresholds: Thresholds | None,
        neurons: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Each token through its expert, without what is small: (B, S, D), an index or (B, S) -> (B, S, D). The neurons that down reads
        of all tokens, where something is left out, are added to `neurons`, (1,) float64.
        """
        if thresholds is not None:
            x = thresholds.kept_input(x)
            if isinstance(thresholds.hidden, torch.Tensor):
                thresholds = thresholds._replace(hidden=thresholds.hidden.expand(*x.shape[:2], 1).flatten(0, 1))
        x_TD = x.reshape(-1, x.shape[-1])
        if isinstance(expert, torch.Tensor) and len(x_TD) > 1:
            counts = torch.bincount(expert.flatten(), minlength=len(widths)).tolist()
            if max(counts) < len(x_TD):
                return self._staircase(x_TD, expert.flatten(), [*zip(widths, counts)], thresholds, neurons).view_as(x)
            expert = counts.index(len(x_TD))
        return self._blocks(x_TD, [(widths[int(expert)], len(x_TD))], thresholds, neurons).view_as(x)

    def _staircase(self, x_TD, expert_T, counts, thresholds, neurons):
        """Tokens of several experts: sorted, widest first."""
        order_T = torch.argsort(expert_T, descending=True, stable=True)
        if thresholds is not None and isinstance(thresholds.hidden, torch.Tensor):
            thresholds = thresholds._replace(hidden=thresholds.hidden.index_select(0, order_T))
        y_TD = self._blocks(x_TD.index_select(0, order_T), counts[::-1], thresholds, neurons)
        return y_TD.index_select(0, order_T.argsort())

    def _blocks(self, x_TD, counts, thresholds, neurons):
        """
        Sorted tokens through the blocks that they need. `counts`: (width, tokens) of each expert, the widest first. `thresholds`: numbers,
        or one for each token, (T, 1).
        """
        y_TD: Any = None
        tokens, low = len(x_TD), 0
        for block, end in enumerate(self.ends):
            rows = sum(count for width, count in counts if width > low)
            if y_TD is None and rows < tokens:
                y_TD = self._bias_alone(x_TD)
            if rows == 0:
                break
            taken = rounded(rows, tokens)
            hidden = self._hidden(x_TD[:taken], block)
            if thresholds is not None:
                least = thresholds.hidden
                least = least[:taken] if isinstance(least, torch.Tensor) else least
                hidden = keep_large(hidden, least, thresholds.ramp)
            first = 0
            for width, count in counts:  # those that stop within this block, or before it
                if count and width < end:
                    hidden[first : first + count, max(0, width - low) :] = 0
                first += count
            if neurons is not None and thresholds is not None:
                neurons += torch.count_nonzero(hidden)
            if taken == tokens:
                y_TD = self._added(y_TD, hidden, block)
            else:
                y_TD[:taken] = self._added(y_TD[:taken], hidden, block)
            low = end
        return y_TD

    def _hidden(self, x_TD, block):
        """Activations of one block: (T, D) -> (T, C)."""
        both = product(x_TD, self.inputs[block], self.input_biases[block])
        if self.gated:
            gate, up = both.chunk(2, -1)
            return self.act(gate) * up
        return self.act(both)

    def _added(self, y_TD, hidden, block):
        if y_TD is None:
            return product(hidden, self.outputs[block], self.down_bias)
        return add_product(y_TD, hidden, self.outputs[block])

    def _bias_alone(self, x_TD):
        y_TD = torch.zeros_like(x_TD)
        return y_TD if self.down_bias is None else y_TD + self.down_bias


def block_ends(widths: list[int], weights: int) -> list[int]:
    """Where blocks end: at widths, and not before a block is worth its calls. `weights`: of one neuron."""
    ends: list[int] = []
    for width in widths:
        if (width - (ends[-1] if ends else 0)) * weights >= SMALLEST_BLOCK:
            ends.append(width)
    return [*ends[:-1], widths[-1]]


def rounded(rows: int, tokens: int) -> int:
    """Rows that a product takes for so many of all tokens: exact where there are few, else one of some eight numbers."""
    if tokens <= EXACT_ROWS:
        return rows
    step = 1 << (tokens.bit_length() - 4)
    return min(tokens, -(-rows // step) * step)


class OneDnnMLP(nn.Module):
    """The projections of one MLP, laid out for oneDNN: what `PackedMLP` is for int8."""

    def __init__(self, tensors: Projections, widths: list[int], activation: str | None):
        super().__init__()
        self.activation = activation
        self.neurons: torch.Tensor | None = None  # where `Blocks.run` counts
        ends = block_ends(widths, tensors.down.shape[0] * (2 if tensors.gate is None else 3))
        sides = [tensors.block(low, high) for low, high in zip([0, *ends], ends)]
        self.blocks = Blocks(
            ends,
            [lay_out(torch.cat([side.gate, side.up]) if side.gate is not None else side.up) for side in sides],
            [lay_out(side.down) for side in sides],
            [_joined(side.gate_bias, side.up_bias) for side in sides],
            None if tensors.down_bias is None else tensors.down_bias.detach(),
            tensors.act,
            tensors.gate is not None,
        )

    def __deepcopy__(self, memo):
        return self  # what is laid out never changes, and cannot be copied

    def tensors(self, dtype: torch.dtype) -> Projections:
        """The weights as plain tensors, made anew."""
        blocks = self.blocks
        inputs, sides = [weight.to_dense().to(dtype) for weight in blocks.inputs], 1 + blocks.gated
        weights = [torch.cat([weight.chunk(sides)[side] for weight in inputs]) for side in range(sides)]
        down = torch.cat([weight.to_dense().to(dtype) for weight in blocks.outputs], 1)
        biases: list[torch.Tensor | None] = [None] * sides
        if blocks.input_biases[0] is not None:
            biases = [
                torch.cat([bias.chunk(sides)[side] for bias in blocks.input_biases if bias is not None])
                for side in range(sides)
            ]
        gate, gate_bias = (weights[0], biases[0]) if blocks.gated else (None, None)
        return Projections(gate, gate_bias, weights[-1], biases[-1], down, blocks.down_bias, blocks.act)

    def run(
        self, x: torch.Tensor, expert: int | torch.Tensor, widths: list[int], thresholds: Thresholds | None
    ) -> torch.Tensor:
        """Each token through its expert, without what is small: (B, S, D), an index or (B, S) -> (B, S, D)."""
        if not torch.compiler.is_compiling():
            return self.blocks.run(x, expert, widths, thresholds, self.neurons)
        if not isinstance(expert, torch.Tensor):
            expert = torch.full(x.shape[:2], expert)
        of_each = [None if thresholds is None else torch.as_tensor(value) for value in (thresholds or (0, 0))[:2]]
        ramp = 0.0 if thresholds is None else thresholds.ramp
        *tensors, _, gated = self.blocks
        counted = None if thresholds is None else self.neurons
        y, neurons = onednn_mlp_op(x, expert, *of_each, ramp, *tensors, self.activation, gated, widths, counted is not None)
        if counted is not None:
            counted.add_(neurons)
        return y


def _joined(first, second):
    """The biases of gate and up as one."""
    return second if first is None or second is None else torch.cat([first, second]).detach()


@torch.library.custom_op("dynamoe::onednn_mlp", mutates_args=())
def onednn_mlp_op(
    x: torch.Tensor,
    expert: torch.Tensor,
    least_input: torch.Tensor | None,
    least_hidden: torch.Tensor | None,
    ramp: float,
    ends: list[int],
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    input_biases: list[torch.Tensor | None],
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    widths: list[int],
    counted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`OneDnnMLP.run` as one node of a compiled graph: (B, S, D), (B, S) -> (B, S, D), and the neurons that down reads, (1,) float64."""
    neurons = torch.zeros(1, dtype=torch.float64)
    blocks = Blocks(ends, inputs, outputs, input_biases, down_bias, activation_of(activation), gated)
    thresholds = None if least_input is None or least_hidden is None else Thresholds(least_input, least_hidden, ramp)
    return blocks.run(x, expert, widths, thresholds, neurons if counted else None), neurons


@onednn_mlp_op.register_fake
def _(x, *inputs):
    return torch.empty_like(x), x.new_empty(1, dtype=torch.float64)


class OneDnnLinear(nn.Module):
    """A linear layer laid out for oneDNN: (..., in) -> (..., out)."""

    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.laid_out = lay_out(linear.weight)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)

    def __deepcopy__(self, memo):
        return self

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), made anew."""
        return self.laid_out.to_dense()

    def forward(self, x):
        return product(x, self.laid_out, self.bias)
