# SPDX-License-Identifier: Apache-2.0
"""
Weights packed for decoding on a CPU, in int8 or bfloat16: transposed, so that a token reads the rows of what it keeps and no others.
y = sum over kept i of x_i W^T[i] is an embedding bag with weights, which PyTorch has kernels for. Attention's projections and the head
are packed alike, and read whole.

Shapes: T tokens, D hidden size, H neurons. The rows of gate and up are cut into chunks of C neurons, so that a prefix of the neurons is
the first chunks; those of down into S parts, so that threads share the work.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dense_base import Layout, Projections
from .routing import plain_parameters
from .sparsity import Thresholds


KINDS = ("int8", "bfloat16")
FEW_TOKENS = 4  # tokens up to which each reads its own rows; from there on one product serves all
SMALLEST_CHUNK = 64  # neurons: shorter rows cost more than what they save
PART = 512  # outputs of the down projection in one row, at least
BLOCK = 1024  # outputs of another linear layer in one row, at most where they divide


class Table(nn.Module):
    """Rows of numbers (R, C) in int8 with a scale and an offset each, or in bfloat16, and weighted sums of them."""

    rows: torch.Tensor

    def __init__(self, rows: torch.Tensor, kind: str):
        super().__init__()
        self.kind, self.width = kind, rows.shape[1]
        packed = (
            torch.ops.quantized.embedding_bag_byte_prepack(rows.float().contiguous()) if kind == "int8" else rows.bfloat16()
        )
        self.register_buffer("rows", packed.contiguous(), persistent=False)

    def dense(self) -> torch.Tensor:
        """All rows, (R, C) float32 or bfloat16."""
        return torch.ops.quantized.embedding_bag_byte_unpack(self.rows) if self.kind == "int8" else self.rows

    def sums(self, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums of rows, one for each of `offsets` (B,) where its rows begin in `indices` (N,): (B, C) float32."""
        if self.kind == "int8":
            bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
            return bag(self.rows, indices, offsets, False, 0, False, weights)
        rows = F.embedding_bag(indices, self.rows, offsets, mode="sum", per_sample_weights=weights.bfloat16())
        return rows.float()


class PackedMLP(nn.Module):
    """The projections of one MLP, packed."""

    chunk_starts: torch.Tensor  # first row of each chunk of `inputs`
    part_starts: torch.Tensor  # first row of each part of `outputs`
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def __init__(self, tensors: Projections, widths: list[int], kind: str):
        super().__init__()
        hidden_size, neurons = tensors.down.shape
        chunk = math.gcd(*widths)
        self.chunk = chunk if chunk >= SMALLEST_CHUNK else neurons
        parts = max(1, hidden_size // PART)
        self.parts = parts if hidden_size % parts == 0 else 1
        inputs = [weight for weight in (tensors.gate, tensors.up) if weight is not None]
        chunks_GCND = torch.stack([weight.view(-1, self.chunk, hidden_size) for weight in inputs])
        self.inputs = Table(chunks_GCND.permute(1, 3, 0, 2).flatten(0, 1).flatten(1), kind)
        self.outputs = Table(tensors.down.t().view(neurons, self.parts, -1).transpose(0, 1).flatten(0, 1), kind)
        for name in ("gate_bias", "up_bias", "down_bias"):
            bias = getattr(tensors, name)
            self.register_buffer(name, None if bias is None else bias.float(), persistent=False)
        self.act, self.gated = tensors.act, tensors.gate is not None
        starts = torch.arange(neurons // self.chunk)[:, None] * hidden_size
        self.register_buffer("chunk_starts", starts, persistent=False)
        self.register_buffer("part_starts", torch.arange(self.parts)[:, None] * neurons, persistent=False)

    def tensors(self, dtype: torch.dtype) -> Projections:
        """The weights as plain tensors, made anew: for calls of many tokens, which they cost little beside."""
        hidden_size = self.inputs.rows.shape[0] // len(self.chunk_starts)
        chunks = self.inputs.dense().to(dtype).view(len(self.chunk_starts), hidden_size, -1, self.chunk)
        weights = chunks.permute(2, 0, 3, 1).flatten(1, 2)
        gate, up = (weights[0], weights[1]) if self.gated else (None, weights[0])
        down = self.outputs.dense().to(dtype).view(self.parts, -1, hidden_size // self.parts).transpose(0, 1).flatten(1).t()
        biases: list[Any] = [
            None if bias is None else bias.to(dtype) for bias in (self.gate_bias, self.up_bias, self.down_bias)
        ]
        return Projections(gate, biases[0], up, biases[1], down, biases[2], self.act)

    def run(self, x: torch.Tensor, widths: list[int], thresholds: Thresholds | None) -> torch.Tensor:
        """Few tokens, each through its own prefix without what is small: (T, D) -> (T, D)."""
        limits: list[list[float]] = [[0.0] * len(x)] * 2
        if thresholds is not None:
            limits = [torch.as_tensor(value).expand(len(x), 1, 1).flatten().tolist() for value in thresholds]
        rows = [self._token(*each) for each in zip(x.float(), widths, *limits)]
        return _stacked(rows).to(x.dtype)

    def _token(self, x, width, least_input, least_hidden):
        y = self._output(self._hidden(x, width, least_input), least_hidden)
        return y if self.down_bias is None else y + self.down_bias

    def _hidden(self, x, width, least):
        """Activations of the first `width` neurons: (D,) -> (width,)."""
        if width == 0:
            return x[:0]
        chunks = -(-width // self.chunk)
        both = _sums(self.inputs, x, least, self.chunk_starts[:chunks]).view(chunks, -1, self.chunk)
        gate = both[:, 0].flatten()[:width]
        if self.gate_bias is not None:
            gate = gate + self.gate_bias[:width]
        if not self.gated:
            return self.act(gate if self.up_bias is None else gate + self.up_bias[:width])
        up = both[:, 1].flatten()[:width]
        return self.act(gate) * (up if self.up_bias is None else up + self.up_bias[:width])

    def _output(self, hidden, least):
        """(width,) -> (D,)."""
        return _sums(self.outputs, hidden, least, self.part_starts).flatten()


def _stacked(rows):
    """T tensors of one length (D,) -> (T, D)."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _sums(table, values, least, starts):
    """For each block of rows that begins at `starts` (B, 1): the sum of its rows, times the values (N,) that are not small."""
    blocks, kept = len(starts), None
    if least > 0:
        kept = (values.abs() >= least).nonzero().flatten()
        values = values[kept]
    count = len(values)
    if count == 0:
        return values.new_zeros(blocks, table.width)
    kept = torch.arange(count) if kept is None else kept
    if blocks == 1:
        return table.sums(kept, starts[0], values)
    # The trap: of a single value `reshape` gives a view without a stride, which the kernel reads as if it were contiguous.
    weights = values.expand(blocks, -1).reshape(-1).contiguous()
    return table.sums((starts + kept).flatten(), torch.arange(0, blocks * count, count), weights)


class PackedProjection(nn.Module):
    """One projection of a packed MLP, for what asks for it by its name: hooks, labels, shapes."""

    def __init__(self, mlp: PackedMLP, place: str, like: nn.Linear):
        super().__init__()
        self.holder = (mlp,)  # not a child: the tables belong to the MLP
        self.place, self.dtype = place, like.weight.dtype
        self.in_features, self.out_features = like.in_features, like.out_features

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), made anew."""
        tensors: Any = self.holder[0].tensors(self.dtype)
        return torch.cat([tensors.gate, tensors.up]) if self.place == "both" else getattr(tensors, self.place)

    @property
    def bias(self) -> torch.Tensor | None:
        """(outputs,), or `None`."""
        mlp: Any = self.holder[0]
        if self.place == "both":
            bias = None if mlp.gate_bias is None else torch.cat([mlp.gate_bias, mlp.up_bias])
        else:
            bias = getattr(mlp, f"{self.place}_bias")
        return None if bias is None else bias.to(self.dtype)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer with packed weights: (..., in) -> (..., out). Its outputs are cut into blocks, the rows of a table."""

    bias: torch.Tensor | None
    indices: torch.Tensor  # of all rows of all blocks
    offsets: torch.Tensor  # where those of each block begin

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.blocks = next(count for count in range(-(-self.out_features // BLOCK), 0, -1) if self.out_features % count == 0)
        blocks = linear.weight.detach().view(self.blocks, -1, self.in_features)
        self.table = Table(blocks.transpose(1, 2).flatten(0, 1), kind)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)
        self.register_buffer("indices", torch.arange(self.blocks * self.in_features), persistent=False)
        self.register_buffer("offsets", torch.arange(self.blocks) * self.in_features, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), made anew."""
        return self.table.dense().view(self.blocks, self.in_features, -1).transpose(1, 2).flatten(0, 1)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features).float()
        if len(flat) > FEW_TOKENS:
            return F.linear(flat, self.weight.float(), self.bias).to(x.dtype).view(*x.shape[:-1], -1)
        y = _stacked([self._token(token) for token in flat])
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    def _token(self, x):
        weights = x if self.blocks == 1 else x.expand(self.blocks, -1).reshape(-1).contiguous()
        return self.table.sums(self.indices, self.offsets, weights).flatten()


def pack_model(model: Any, mlps: list[Any], kind: str) -> None:
    """
    Pack the nested MLPs of a model, and all its other linear layers but the routers. Raises `ValueError`, before anything is
    changed, where that cannot be done.
    """
    if kind not in KINDS:
        raise ValueError(f"The kind of packing is unknown: found {kind!r}. Choose one of {', '.join(KINDS)}.")
    if model.device.type != "cpu":
        raise ValueError(f"Packed weights are for the CPU, found a model on {model.device}. Move it with `model.to('cpu')`.")
    for mlp in mlps:
        if plain_parameters([getattr(mlp, name) for name in mlp.layout.projections], model.device) is None:
            raise ValueError(
                f"The MLP of layer {mlp.layer} cannot be packed: its projections are wrapped, hooked, quantised or packed already. "
                "Merge adapters (`merge_and_unload`), or load the model anew."
            )
    for mlp in mlps:
        mlp.pack(kind)
    pack_linears(model, kind, tuple({type(mlp) for mlp in mlps}))


def pack_mlp(mlp: nn.Module, layout: Layout, widths: list[int], kind: str) -> PackedMLP:
    """The packed form of an MLP, whose projections become `PackedProjection`; the float weights are let go."""
    with torch.no_grad():
        packed = PackedMLP(layout.tensors(mlp), widths, kind)
    places = {layout.up: "both" if layout.fused else "up", layout.down: "down"}
    if layout.gate:
        places[layout.gate] = "gate"
    for name, place in places.items():
        setattr(mlp, name, PackedProjection(packed, place, getattr(mlp, name)))
    return packed


def pack_linears(module: nn.Module, kind: str, spared: tuple[type, ...]) -> None:
    """Every linear layer below `module` becomes a `PackedLinear`, but for those inside of modules of the types `spared`."""
    for name, child in module.named_children():
        if isinstance(child, spared):
            continue
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child, kind))
        else:
            pack_linears(child, kind, spared)
