# SPDX-License-Identifier: Apache-2.0
"""
Decoding with sparsity on a GPU in Triton: up to four tokens, which read, within their prefixes, the weights of what they keep.

What is kept is tested on the device, and the grids are those of the whole MLP, so the host never waits and CUDA graphs can capture it. A
load that is masked fetches nothing where all that lies beside it in memory is masked too. So the weights must lie by what is left out: all
neurons of one input side by side, then those of the next, and likewise all outputs of one neuron (`lay_by_inputs`).

Two kernels. The first sums over the inputs, in parts (`SPLIT`), since few tokens would leave most of a chip idle; the second adds the parts
up, activates, and sums over the neurons, in parts again. Parts are added in a fixed order: the same numbers in every run.

Shapes: T tokens (at most `FEW`), D hidden size, H MLP width, P parts.
"""

import torch
from torch import nn

from .dense_base import Projections
from .nested_mlp_triton import ACTIVATIONS, _activate, _tokens, constexpr, jit, runs_triton, tl, triton
from .sparsity import Thresholds


FEW = 4  # tokens: each further one is likely to need what the others leave out
READ, WRITTEN = 16, 128  # rows of weights in a block, and what they give; of several tokens half of it, or registers spill
SPLIT = 8  # parts of a sum


@jit
def _kept(values, least_ptr, row, live):
    """The values (T, K) of tokens that are not smaller than the token's threshold, the others as zeros."""
    least = tl.load(least_ptr + row, live, 0.0)
    return tl.where(tl.abs(values) < least[:, None], 0.0, values)  # what is not a number stays, to be seen in the output


@jit
def _products(values, weight_ptr, stride, row, column, row_live, column_live):
    """
    values (T, K) by the block of weights with K rows: (T, N). Rows that no token keeps are not read.
    """
    needed = (tl.max((values != 0).to(tl.int32), 0) > 0) & row_live
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    block = tl.load(weight_ptr + offset, needed[:, None] & column_live[None, :], 0.0).to(tl.float32)
    return tl.sum(values[:, :, None] * block[None, :, :], 1)


@jit
def _input_kernel(
    x_ptr, expert_ptr, least_ptr, gate_ptr, up_ptr, part_ptr, T, D, H, gate_stride, up_stride, widths,
    GATED: constexpr, TOKENS: constexpr, SPLIT: constexpr, BLOCK_D: constexpr, BLOCK_H: constexpr,
):  # fmt: skip
    """One part of x gate' and x up': (P, 2, T, H) float32. What lies beyond a token's prefix is not written."""
    neuron = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    part = tl.program_id(1)
    token, live, width = _tokens(expert_ptr, 0, T, widths, TOKENS)
    widest = tl.max(width, 0)
    if tl.program_id(0) * BLOCK_H >= widest:
        return
    neuron_live = neuron < widest
    gate = tl.zeros((TOKENS, BLOCK_H), tl.float32)
    up = tl.zeros((TOKENS, BLOCK_H), tl.float32)
    for start in range(part * BLOCK_D, D, SPLIT * BLOCK_D):
        row = start + tl.arange(0, BLOCK_D)
        here = live[:, None] & (row < D)[None, :]
        x = tl.load(x_ptr + token[:, None] * D + row[None, :], here, 0.0).to(tl.float32)
        x = _kept(x, least_ptr, token, live)
        if GATED:
            gate += _products(x, gate_ptr, gate_stride, row, neuron, row < D, neuron_live)
        up += _products(x, up_ptr, up_stride, row, neuron, row < D, neuron_live)
    place = (part * 2 * T + token[:, None]) * H + neuron[None, :]
    written = live[:, None] & neuron_live[None, :]
    if GATED:
        tl.store(part_ptr + place, gate, written)
    tl.store(part_ptr + place + T * H, up, written)


@jit
def _output_kernel(
    part_ptr, expert_ptr, least_ptr, gate_bias_ptr, up_bias_ptr, down_ptr, y_ptr, T, D, H, down_stride, widths,
    ACT: constexpr, GATED: constexpr, TOKENS: constexpr, SPLIT: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """One part of hidden down': (P, T, D) float32."""
    output = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    token, live, width = _tokens(expert_ptr, 0, T, widths, TOKENS)
    widest = tl.max(width, 0)
    y = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for start in range(part * BLOCK_H, widest, SPLIT * BLOCK_H):
        row = start + tl.arange(0, BLOCK_H)
        row_live = row < widest
        here = live[:, None] & row_live[None, :]
        first = tl.zeros((TOKENS, BLOCK_H), tl.float32)
        up = tl.zeros((TOKENS, BLOCK_H), tl.float32)
        for other in range(SPLIT):
            place = (other * 2 * T + token[:, None]) * H + row[None, :]
            if GATED:
                first += tl.load(part_ptr + place, here, 0.0)
            up += tl.load(part_ptr + place + T * H, here, 0.0)
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + row, row_live, 0.0).to(tl.float32)[None, :]
        if GATED:
            if gate_bias_ptr is not None:
                first += tl.load(gate_bias_ptr + row, row_live, 0.0).to(tl.float32)[None, :]
            hidden, _ = _activate(first, ACT)
            hidden = hidden * up
        else:
            hidden, _ = _activate(up, ACT)
        hidden = tl.where(row[None, :] < width[:, None], hidden, 0.0)
        hidden = _kept(hidden, least_ptr, token, live)
        y += _products(hidden, down_ptr, down_stride, row, output, row_live, output < D)
    written = live[:, None] & (output < D)[None, :]
    tl.store(y_ptr + (part * T + token[:, None]) * D + output[None, :], y, written)


def _forward(x_TD, expert_T, least, weights, act, widths):
    (least_input, least_hidden), (gate, gate_bias, up, up_bias, down, down_bias) = least, weights
    (T, D), H = x_TD.shape, up.shape[0]
    x_TD, expert_T, tokens = x_TD.contiguous(), expert_T.contiguous(), triton.next_power_of_2(len(x_TD))
    parts = x_TD.new_empty(SPLIT, 2, T, H, dtype=torch.float32)
    y = x_TD.new_empty(SPLIT, T, D, dtype=torch.float32)
    gated, first = gate is not None, up if gate is None else gate
    sizes = {"GATED": gated, "TOKENS": tokens, "SPLIT": SPLIT}
    block = WRITTEN if tokens == 1 else WRITTEN // 2
    with torch.cuda.device_of(x_TD):
        _input_kernel[triton.cdiv(H, block), SPLIT](
            x_TD, expert_T, least_input, first, up, parts, T, D, H, first.stride(1), up.stride(1), tuple(widths),
            **sizes, BLOCK_D=READ, BLOCK_H=block,
        )  # fmt: skip
        _output_kernel[triton.cdiv(D, block), SPLIT](
            parts, expert_T, least_hidden, gate_bias, up_bias, down, y, T, D, H, down.stride(1), tuple(widths),
            ACT=ACTIVATIONS[act], **sizes, BLOCK_H=READ, BLOCK_D=block,
        )  # fmt: skip
    y = y.sum(0)
    return (y if down_bias is None else y + down_bias).to(x_TD.dtype)


@torch.library.custom_op("dynamoe::sparse_decode", mutates_args=())
def sparse_decode_op(
    x_TD: torch.Tensor,
    expert_T: torch.Tensor,
    least_input: torch.Tensor,
    least_hidden: torch.Tensor,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    act: str,
    widths: list[int],
) -> torch.Tensor:
    """Few tokens, each through its prefix without what is under its thresholds (T,): (T, D), (T,) int -> (T, D)."""
    weights = (gate, gate_bias, up, up_bias, down, down_bias)
    return _forward(x_TD, expert_T, (least_input, least_hidden), weights, act, widths)


@sparse_decode_op.register_fake
def _(x_TD, *inputs):
    return x_TD.new_empty(x_TD.shape)


def sparse_decode(
    x: torch.Tensor, expert: int | torch.Tensor, thresholds: Thresholds, weights: Projections, act: str, widths: list[int]
) -> torch.Tensor:
    """
    Few tokens, each through its expert without what is small: (B, S, D), an index or (B, S) -> (B, S, D).

    Args:
        weights: of the whole MLP, laid out by `lay_by_inputs`.
        act: name of the activation, one of `ACTIVATIONS`.
    """
    x_TD, shape = x.flatten(0, 1), x.shape[:2]
    expert_T = expert.flatten() if isinstance(expert, torch.Tensor) else torch.full((len(x_TD),), expert, device=x.device)
    # Filled on the device: a tensor made from a list would make the host wait for the copy.
    least = [
        value.expand(*shape, 1).flatten()
        if isinstance(value, torch.Tensor)
        else torch.full((len(x_TD),), value, device=x.device)
        for value in thresholds
    ]
    if torch.compiler.is_compiling():
        return sparse_decode_op(x_TD, expert_T, *least, *weights[:6], act, widths).view_as(x)
    return _forward(x_TD, expert_T, least, weights[:6], act, widths).view_as(x)


def runs_sparse_decode(x: torch.Tensor, weights: Projections, act: str) -> bool:
    """Whether the kernels take this input: few tokens, without gradients, and weights that lie by their inputs."""
    few = x.shape[0] * x.shape[1] <= FEW and not torch.is_grad_enabled()
    lie = all(weight is None or weight.stride(0) == 1 for weight in (weights.gate, weights.up, weights.down))
    return few and lie and runs_triton(x, act)


@torch.no_grad()
def lay_by_inputs(linear: nn.Linear) -> None:
    """Lay the weights of a linear layer in memory so that all outputs of one input lie side by side. No number changes."""
    linear.weight.data = linear.weight.data.t().contiguous().t()
