# SPDX-License-Identifier: Apache-2.0
"""
Weights packed for decoding on a CPU, in int8 or bfloat16: transposed, so that a token reads the rows of what it keeps and no others.
y = sum over kept i of x_i W^T[i] is an embedding bag with weights, which PyTorch has kernels for. Attention's projections and the head
are packed alike, and read whole.

Shapes: T tokens, D hidden size, H neurons. The rows of gate and up are cut into chunks of C neurons, so that a prefix of the neurons is
the first chunks; those of down into S parts, so that threads share the work.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .dense_base import Layout, Projections
from .mlp_backends import activation_of, reads_numbers
from .onednn_weights import OneDnnLinear, OneDnnMLP, is_available
from .routing import plain_parameters
from .sparsity import Thresholds, keep_large


KINDS = ("int8", "bfloat16", "onednn", "rows")
# Tokens up to which each reads its own rows; more take one product together. On an EPYC that is faster from 8 tokens on at
# SmolLM2-135M's shape, from 40 on at Llama-3.2-1B's (`benchmarks/packed.py`).
FEW_TOKENS = 16
SMALLEST_CHUNK = 64  # neurons: shorter rows cost more than what they save
PART = 512  # outputs of the down projection in one row, at least
BLOCK = 1024  # outputs of another linear layer in one row, at most where they divide


def pack_rows(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Rows of numbers (R, C) in int8, each followed by its own scale and offset, (R, C + 8) uint8; or in bfloat16."""
    if kind == "int8":
        return torch.ops.quantized.embedding_bag_byte_prepack(rows.float().contiguous())
    return rows.bfloat16().contiguous()


def unpack_rows(packed: torch.Tensor) -> torch.Tensor:
    """The numbers of packed rows, (R, C) float32 or bfloat16."""
    return torch.ops.quantized.embedding_bag_byte_unpack(packed) if packed.dtype == torch.uint8 else packed


def row_sums(packed: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows, one for each of `offsets` (B,) where its rows begin in `indices` (N,): (B, C) float32."""
    if packed.dtype == torch.uint8:
        bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default  # without its overload it cannot be compiled
        return bag(packed, indices, offsets, False, 0, False, weights)
    return F.embedding_bag(indices, packed, offsets, mode="sum", per_sample_weights=weights.bfloat16()).float()


class Tables(NamedTuple):
    """The projections of one MLP as packed rows."""

    inputs: torch.Tensor  # rows of gate and up: the neurons of one chunk, for one input
    outputs: torch.Tensor  # rows of down: one part of the outputs, for one neuron
    gate_bias: torch.Tensor | None  # (H,)
    up_bias: torch.Tensor | None  # (H,)
    down_bias: torch.Tensor | None  # (D,)
    act: Callable[[torch.Tensor], torch.Tensor]
    gated: bool
    chunk: int  # neurons
    parts: int
    skips: bool  # whether rows that are left out are not read; else they are read, and count 0 times

    @property
    def neurons(self) -> int:
        """H."""
        return self.outputs.shape[0] // self.parts

    def run(self, x: torch.Tensor, widths: list[int], thresholds: list[list[float]], ramp: float) -> torch.Tensor:
        """Few tokens, each through its own prefix, without what is under its own thresholds: (T, D) -> (T, D)."""
        rows = [self._token(*each, ramp) for each in zip(x.float(), widths, thresholds[0], thresholds[1])]
        return _stacked(rows).to(x.dtype)

    def run_together(self, x: torch.Tensor, widths: list[int], thresholds: list[list[float]], ramp: float) -> torch.Tensor:
        """As `run`, with one product of the widest prefix for all: each piece of the weights is unpacked once, in cache."""
        widest, inputs, outputs = max(widths), self.inputs, self.outputs
        least_input, least_hidden = (torch.tensor(least)[:, None] for least in thresholds)
        kept, hidden = keep_large(x.float(), least_input, ramp), [x.new_zeros(len(x), 0, dtype=torch.float32)]
        size = x.shape[1]
        for low in range(0, widest, self.chunk):
            start = low // self.chunk * size
            both = (kept @ unpack_rows(inputs[start : start + size]).float()).view(len(x), -1, self.chunk)
            hidden.append(self._activated(both[:, 0], both[:, -1], slice(low, low + self.chunk)))
        prefix = torch.arange(widest) < torch.tensor(widths)[:, None]
        hidden_TH = keep_large(torch.cat(hidden, 1)[:, :widest] * prefix, least_hidden, ramp)
        neurons = self.neurons
        starts = range(0, len(outputs), neurons)
        y = torch.cat([hidden_TH @ unpack_rows(outputs[start : start + widest]).float() for start in starts], 1)
        return (y if self.down_bias is None else y + self.down_bias).to(x.dtype)

    def _activated(self, first, up, neurons: slice):
        """Activations of some neurons, from the products of gate (or of up, where there is no gate) and up."""
        if not self.gated:
            return self.act(up if self.up_bias is None else up + self.up_bias[neurons])
        if self.gate_bias is not None and self.up_bias is not None:
            first, up = first + self.gate_bias[neurons], up + self.up_bias[neurons]
        return self.act(first) * up

    def _token(self, x, width, least_input, least_hidden, ramp):
        parts = torch.arange(self.parts)[:, None] * self.neurons
        hidden = self._hidden(keep_large(x, least_input, ramp) if least_input else x, width, least_input > 0)
        hidden = keep_large(hidden, least_hidden, ramp) if least_hidden else hidden
        y = self._sums(self.outputs, hidden, least_hidden > 0, parts).flatten()
        return y if self.down_bias is None else y + self.down_bias

    def _hidden(self, x, width, sparse):
        """Activations of the first `width` neurons: (D,) -> (width,)."""
        count = (width + self.chunk - 1) // self.chunk
        starts = torch.arange(count)[:, None] * len(x)
        both = self._sums(self.inputs, x, sparse, starts).view(count, 1 + self.gated, self.chunk)
        first, up = both[:, 0].flatten(), both[:, -1].flatten()
        if self.chunk == self.neurons:  # else the chunks end where the prefix does
            first, up = first[:width], up[:width]
        return self._activated(first, up, slice(width))

    def _sums(self, packed, values, sparse, starts):
        """For each block of rows that begins at `starts` (B, 1): the sum of its rows, times the values (N,). `sparse`: many are zero."""
        if sparse and self.skips:
            kept = values.nonzero().flatten()
            values = values[kept]
        else:
            kept = torch.arange(len(values))
        blocks = starts.shape[0]
        # The trap: of a single value `reshape` gives a view without a stride, which the kernel reads as if it were contiguous.
        weights = values.expand(blocks, -1).reshape(-1).contiguous()
        return row_sums(packed, (starts + kept).flatten(), torch.arange(blocks) * kept.shape[0], weights)


def _stacked(rows):
    """T tensors of one length (D,) -> (T, D)."""
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


class PackedMLP(nn.Module):
    """The projections of one MLP, packed."""

    inputs: torch.Tensor
    outputs: torch.Tensor
    gate_bias: torch.Tensor | None
    up_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def __init__(self, tensors: Projections, widths: list[int], kind: str, activation: str | None):
        super().__init__()
        (hidden_size, neurons), chunk, parts = tensors.down.shape, math.gcd(*widths), max(1, tensors.down.shape[0] // PART)
        self.chunk = chunk if chunk >= SMALLEST_CHUNK else neurons
        self.parts = parts if hidden_size % parts == 0 else 1
        self.skips = True
        self.hidden_size, self.act, self.activation, self.gated = (
            hidden_size,
            tensors.act,
            activation,
            tensors.gate is not None,
        )
        weights = [weight for weight in (tensors.gate, tensors.up) if weight is not None]
        chunks_GCND = torch.stack([weight.view(-1, self.chunk, hidden_size) for weight in weights])
        parts_PHD = tensors.down.t().view(neurons, self.parts, -1).transpose(0, 1)
        self.register_buffer(
            "inputs", pack_rows(chunks_GCND.permute(1, 3, 0, 2).flatten(0, 1).flatten(1), kind), persistent=False
        )
        self.register_buffer("outputs", pack_rows(parts_PHD.flatten(0, 1), kind), persistent=False)
        for name in ("gate_bias", "up_bias", "down_bias"):
            bias = getattr(tensors, name)
            self.register_buffer(name, None if bias is None else bias.float(), persistent=False)

    @property
    def tables(self) -> Tables:
        """What a token reads."""
        biases = self.gate_bias, self.up_bias, self.down_bias
        return Tables(self.inputs, self.outputs, *biases, self.act, self.gated, self.chunk, self.parts, self.skips)

    def tensors(self, dtype: torch.dtype) -> Projections:
        """The weights as plain tensors, made anew: for calls of many tokens, which they cost little beside."""
        chunks = unpack_rows(self.inputs).to(dtype).view(-1, self.hidden_size, 1 + self.gated, self.chunk)
        weights = chunks.permute(2, 0, 3, 1).flatten(1, 2)
        gate, up = (weights[0], weights[1]) if self.gated else (None, weights[0])
        parts = unpack_rows(self.outputs).to(dtype).view(self.parts, -1, self.hidden_size // self.parts)
        biases = (self.gate_bias, self.up_bias, self.down_bias)
        gate_bias, up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in biases)
        return Projections(gate, gate_bias, up, up_bias, parts.transpose(0, 1).flatten(1).t(), down_bias, self.act)

    def run(
        self, x: torch.Tensor, expert: int | torch.Tensor, widths: list[int], thresholds: Thresholds | None
    ) -> torch.Tensor:
        """Each token through its expert, without what is small: (B, S, D), an index or (B, S) -> (B, S, D)."""
        tokens, ramp = x.shape[0] * x.shape[1], 0.0 if thresholds is None else thresholds.ramp
        if not torch.compiler.is_compiling():
            taken = expert.flatten().tolist() if isinstance(expert, torch.Tensor) else [expert] * tokens
            least = _least(thresholds, x.shape[:2])
            run = self.tables.run if tokens <= FEW_TOKENS else self.tables.run_together
            return run(x.flatten(0, 1), [widths[index] for index in taken], least, ramp).view_as(x)
        if tokens == 1 and not _of_each(thresholds) and (reads_numbers() or not isinstance(expert, torch.Tensor)):
            # As part of the graph, which is quicker to call than an operator written in Python.
            return self.tables.run(x[0], [_width(widths, expert)], _least(thresholds, (1, 1)), ramp)[None]
        if not isinstance(expert, torch.Tensor):
            expert = torch.full(x.shape[:2], expert)
        of_each = [
            None if thresholds is None else torch.as_tensor(value, dtype=torch.float32) for value in (thresholds or (0, 0))[:2]
        ]
        *tables, _, gated, chunk, parts, skips = self.tables
        return packed_mlp_op(x, expert, *of_each, ramp, *tables, self.activation, gated, chunk, parts, skips, widths)


def _width(widths, expert):
    """The width of one token's expert, in a graph a number that it reads from a tensor."""
    if not isinstance(expert, torch.Tensor):
        return widths[expert]
    width = torch.tensor(widths)[expert.flatten()].item()
    torch._check(width >= min(widths))
    torch._check(width <= max(widths))
    return width


def _of_each(thresholds):
    """Whether each token has thresholds of its own."""
    return thresholds is not None and isinstance(thresholds.input, torch.Tensor)


def _least(thresholds, shape):
    """The thresholds of x and of h of each token, as lists."""
    if thresholds is None:
        return [[0.0] * (shape[0] * shape[1])] * 2
    if not _of_each(thresholds):
        return [[value] * (shape[0] * shape[1]) for value in thresholds[:2]]
    return [value.expand(*shape, 1).flatten().tolist() for value in thresholds[:2]]


@torch.library.custom_op("dynamoe::packed_mlp", mutates_args=())
def packed_mlp_op(
    x: torch.Tensor,
    expert: torch.Tensor,
    least_input: torch.Tensor | None,
    least_hidden: torch.Tensor | None,
    ramp: float,
    inputs: torch.Tensor,
    outputs: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    chunk: int,
    parts: int,
    skips: bool,
    widths: list[int],
) -> torch.Tensor:
    """`PackedMLP.run` as one node of a compiled graph: (B, S, D), (B, S) -> (B, S, D)."""
    tables = Tables(inputs, outputs, gate_bias, up_bias, down_bias, activation_of(activation), gated, chunk, parts, skips)
    thresholds = None if least_input is None or least_hidden is None else Thresholds(least_input, least_hidden, ramp)
    taken = [widths[index] for index in expert.flatten().tolist()]
    run = tables.run if len(taken) <= FEW_TOKENS else tables.run_together
    return run(x.flatten(0, 1), taken, _least(thresholds, x.shape[:2]), ramp).view(x.shape)


@packed_mlp_op.register_fake
def _(x, *inputs):
    return torch.empty_like(x)


class PackedProjection(nn.Module):
    """One projection of a packed MLP, for what asks for it by its name: hooks, labels, shapes."""

    def __init__(self, mlp: PackedMLP | OneDnnMLP, place: str, like: nn.Linear):
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
        tensors: Any = self.holder[0].tensors(self.dtype)
        if self.place == "both":
            return None if tensors.up_bias is None else torch.cat([tensors.gate_bias, tensors.up_bias])
        return getattr(tensors, f"{self.place}_bias")

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer with packed weights: (..., in) -> (..., out). Its outputs are cut into blocks, the rows of a table."""

    rows: torch.Tensor  # (blocks * in, out / blocks), packed
    bias: torch.Tensor | None
    indices: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, linear: nn.Linear, kind: str):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.blocks = next(count for count in range(-(-self.out_features // BLOCK), 0, -1) if self.out_features % count == 0)
        blocks = linear.weight.detach().view(self.blocks, -1, self.in_features)
        self.register_buffer("rows", pack_rows(blocks.transpose(1, 2).flatten(0, 1), kind), persistent=False)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float(), persistent=False)
        self.register_buffer("indices", torch.arange(self.blocks * self.in_features), persistent=False)
        self.register_buffer("offsets", torch.arange(self.blocks) * self.in_features, persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), made anew."""
        return unpack_rows(self.rows).view(self.blocks, self.in_features, -1).transpose(1, 2).flatten(0, 1)

    def forward(self, x):
        flat = x.reshape(-1, self.in_features)
        if len(flat) > FEW_TOKENS:
            pieces = (unpack_rows(piece).float() for piece in self.rows.chunk(self.blocks))
            y = torch.cat([flat.float() @ piece for piece in pieces], 1)
            return (y if self.bias is None else y + self.bias).to(x.dtype).view(*x.shape[:-1], -1)
        return packed_linear(flat, self.rows, self.bias, self.indices, self.offsets).view(*x.shape[:-1], -1)


def packed_linear(
    x: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, indices: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """(T, in) -> (T, out), token by token. `indices`: of all rows of all blocks; `offsets`: where those of each block begin."""
    blocks = len(offsets)
    weights = x.float() if blocks == 1 else x.float().repeat(1, blocks)
    y = _stacked([row_sums(rows, indices, offsets, token).flatten() for token in weights])
    return (y if bias is None else y + bias).to(x.dtype)


def pack_model(model: Any, mlps: list[Any], kind: str) -> Any:
    """
    Pack the nested MLPs of a model, and all its other linear layers but the routers, and return it. Raises `ValueError`, before
    anything is changed, where that cannot be done.
    """
    if kind not in KINDS:
        raise ValueError(f"The kind of packing is unknown: found {kind!r}. Choose one of {', '.join(KINDS)}.")
    if model.device.type != "cpu":
        raise ValueError(f"Packed weights are for the CPU, found a model on {model.device}. Move it with `model.to('cpu')`.")
    if kind == "rows":
        return lay_rows(model, mlps)
    if kind == "onednn" and not is_available(model.dtype):
        raise ValueError(
            f"Weights cannot be laid out for oneDNN: found {model.dtype}, and this PyTorch and processor offer it for float32, and for "
            'bfloat16 where the processor has it. Load the model in another dtype, or pack it "int8".'
        )
    for mlp in mlps:
        if not mlp.layout.projections:
            raise ValueError(
                f'The experts of a mixture can be packed in "rows" alone: found {kind!r}, and a mixture in layer {model.config.mlp_names[mlp.layer]}. '
                'Ask for "rows".'
            )
        if plain_parameters([getattr(mlp, name) for name in mlp.layout.projections], model.device) is None:
            raise ValueError(
                f"The MLP of layer {mlp.layer} cannot be packed: its projections are wrapped, hooked, quantised, divided or packed already. "
                "Merge adapters (`merge_and_unload`), or load the model anew."
            )
    for mlp in mlps:
        mlp.pack(kind)
    if kind != "onednn":
        skips = skipping_pays([mlp.packed for mlp in mlps])
        for mlp in mlps:
            mlp.packed.skips = skips
    pack_linears(model, kind, tuple({type(mlp) for mlp in mlps}))
    model.requires_grad_(False)
    return model


@torch.no_grad()
def skipping_pays(packed: list[PackedMLP]) -> bool:
    """
    Whether this processor reads 70% of the inputs' rows faster than all of them, measured in some milliseconds. A Xeon does; an EPYC
    fetches memory in streams, which gaps do not shorten. The outputs are the same, but for rounding.
    """
    least, seconds = 0.385, {True: math.inf, False: math.inf}  # 70% of normal numbers are larger
    x = torch.randn(1, packed[0].hidden_size, generator=torch.Generator().manual_seed(0))
    for skips in [True, False] * 4:
        start = time.perf_counter()
        for tables in (mlp.tables for mlp in packed):  # one after another, so that each comes from memory
            tables._replace(skips=skips).run(x, [tables.neurons], [[least], [0.0]], 0.0)
        seconds[skips] = min(seconds[skips], time.perf_counter() - start)
    return seconds[True] < seconds[False]


def lay_rows(model: Any, mlps: list[Any]) -> Any:
    """The model, the weights of each neuron of a mixture's experts one after another in memory; numbers and names stay."""
    mixtures = [mlp for mlp in mlps if not mlp.layout.projections]
    if not mixtures:
        raise ValueError('"rows" is for the experts of mixtures: found none. Choose "onednn", which lays out MLPs.')
    for mlp in mixtures:
        mlp.layout.lay_by_neuron(mlp)
    return model


def pack_mlp(mlp: nn.Module, layout: Layout, widths: list[int], kind: str, activation: str | None) -> PackedMLP | OneDnnMLP:
    """The packed form of an MLP, whose projections become `PackedProjection`; the plain weights are let go."""
    tensors = layout.tensors(mlp)
    with torch.no_grad():
        packed = OneDnnMLP(tensors, widths, activation) if kind == "onednn" else PackedMLP(tensors, widths, kind, activation)
    places = {layout.up: "both" if layout.fused else "up", layout.down: "down"}
    if layout.gate:
        places[layout.gate] = "gate"
    for name, place in places.items():
        setattr(mlp, name, PackedProjection(packed, place, getattr(mlp, name)))
    return packed


def pack_linears(module: nn.Module, kind: str, spared: tuple[type, ...]) -> None:
    """Every linear layer below `module` is packed, but for those inside of modules of the types `spared`."""
    for name, child in module.named_children():
        if isinstance(child, spared):
            continue
        if type(child) is nn.Linear:
            setattr(module, name, OneDnnLinear(child) if kind == "onednn" else PackedLinear(child, kind))
        else:
            pack_linears(child, kind, spared)
