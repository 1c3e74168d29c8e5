# SPDX-License-Identifier: Apache-2.0
"""
Decoding with sparsity on a GPU in Triton: up to four tokens, which read, within their prefixes, the weights of what they keep.

What is kept is tested on the device, and the grids are those of the whole MLP, so the host never waits and CUDA graphs can capture it. A
load that is masked fetches nothing where all that lies beside it in memory is masked too. So the weights must lie by what is left out: all
neurons of one input side by side, then those of the next, and likewise all outputs of one neuron (`lay_by_inputs`).

Two kernels. The first sums over the inputs, activates and clears what is under the threshold; the second sums over the neurons, in
parts, which are added in a fixed order: the same numbers in every run. Products are added up element by element and across a block
once, at the end, since adding across a block takes as long as many loads.

Shapes: T tokens (at most `FEW`), D hidden size, H MLP width, P parts.
"""

import torch
from torch import nn

from .dense_base import Projections
from .nested_mlp_triton import ACTIVATIONS, _activate, _tokens, constexpr, jit, runs_triton, tl, triton
from .sparsity import Thresholds


FEW = 4  # tokens: each further one is likely to need what the others leave out
# Rows of weights in a block, and what they give, of the first kernel and of the second. Several tokens share the rows, or registers spill.
ROWS, NEURONS = 128, 32
HIDDEN_ROWS, OUTPUTS = 256, 16
PARTS = 4  # of the second kernel's sum: few outputs would leave most of a chip idle
WARPS, OUTPUT_WARPS = 4, 8


@jit
def _kept(values, least_ptr, row, live, EACH: constexpr):
    """The values (T, K) of tokens that are larger than the token's threshold, the others as zeros. Without `EACH` it is one number."""
    least = tl.load(least_ptr + row, live, 0.0)[:, None] if EACH else least_ptr
    return tl.where(tl.abs(values) <= least, 0.0, values)  # what is not a number stays, to be seen in the output


@jit
def _block(values, weight_ptr, stride, row, column, row_live, column_live):
    """The block of weights (K, N) that values (T, K) are multiplied with. Rows that no token keeps are not read."""
    needed = (tl.max((values != 0).to(tl.int32), 0) > 0) & row_live
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(weight_ptr + offset, needed[:, None] & column_live[None, :], 0.0)


@jit
def _products(values, block):
    """(T, K, N), to be summed over K."""
    return values[:, :, None] * block.to(tl.float32)[None, :, :]


@jit
def _hidden_kernel(
    x_ptr, expert_ptr, least_ptr, least_hidden_ptr, gate_ptr, gate_bias_ptr, up_ptr, up_bias_ptr, hidden_ptr,
    T, D, H, gate_stride, up_stride, widths,
    ACT: constexpr, GATED: constexpr, EACH: constexpr, TOKENS: constexpr, BLOCK_D: constexpr, BLOCK_H: constexpr,
):  # fmt: skip
    """Activations of kept inputs, without those under the threshold or beyond the prefix: (T, H) float32. Beyond all of them: not written."""
    neuron = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    token, live, width = _tokens(expert_ptr, 0, T, widths, TOKENS)
    widest = tl.max(width, 0)
    if tl.program_id(0) * BLOCK_H >= widest:
        return
    neuron_live = neuron < widest
    first = tl.zeros((TOKENS, BLOCK_D, BLOCK_H), tl.float32)
    second = tl.zeros((TOKENS, BLOCK_D, BLOCK_H), tl.float32)
    row = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + token[:, None] * D + row[None, :], live[:, None] & (row < D)[None, :], 0.0).to(tl.float32)
    x = _kept(x, least_ptr, token, live, EACH)
    up = _block(x, up_ptr, up_stride, row, neuron, row < D, neuron_live)
    gate = up
    if GATED:
        gate = _block(x, gate_ptr, gate_stride, row, neuron, row < D, neuron_live)
    for start in range(BLOCK_D, D + BLOCK_D, BLOCK_D):  # fetch a block, multiply the one before: the last fetch reads nothing
        row = start + tl.arange(0, BLOCK_D)
        here = live[:, None] & (row < D)[None, :]
        next_x = tl.load(x_ptr + token[:, None] * D + row[None, :], here, 0.0).to(tl.float32)
        next_x = _kept(next_x, least_ptr, token, live, EACH)
        next_up = _block(next_x, up_ptr, up_stride, row, neuron, row < D, neuron_live)
        next_gate = next_up
        if GATED:
            next_gate = _block(next_x, gate_ptr, gate_stride, row, neuron, row < D, neuron_live)
            first += _products(x, gate)
        second += _products(x, up)
        x, up, gate = next_x, next_up, next_gate
    hidden = tl.sum(second, 1)
    if up_bias_ptr is not None:
        hidden += tl.load(up_bias_ptr + neuron, neuron_live, 0.0).to(tl.float32)[None, :]
    if GATED:
        gated = tl.sum(first, 1)
        if gate_bias_ptr is not None:
            gated += tl.load(gate_bias_ptr + neuron, neuron_live, 0.0).to(tl.float32)[None, :]
        gated, _ = _activate(gated, ACT)
        hidden = hidden * gated
    else:
        hidden, _ = _activate(hidden, ACT)
    hidden = tl.where(neuron[None, :] < width[:, None], hidden, 0.0)
    hidden = _kept(hidden, least_hidden_ptr, token, live, EACH)
    tl.store(hidden_ptr + token[:, None] * H + neuron[None, :], hidden, live[:, None] & neuron_live[None, :])


@jit
def _output_kernel(
    hidden_ptr, expert_ptr, down_ptr, bias_ptr, y_ptr, T, D, H, down_stride, widths,
    TOKENS: constexpr, PARTS: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """hidden down' and its bias, of the sum's one part or of several without the bias: (P, T, D)."""
    output = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = tl.program_id(1)
    token, live, width = _tokens(expert_ptr, 0, T, widths, TOKENS)
    widest = tl.max(width, 0)
    output_live = output < D
    sums = tl.zeros((TOKENS, BLOCK_H, BLOCK_D), tl.float32)
    row = part * BLOCK_H + tl.arange(0, BLOCK_H)
    hidden = tl.load(hidden_ptr + token[:, None] * H + row[None, :], live[:, None] & (row < widest)[None, :], 0.0)
    down = _block(hidden, down_ptr, down_stride, row, output, row < widest, output_live)
    for start in range((part + PARTS) * BLOCK_H, widest + PARTS * BLOCK_H, PARTS * BLOCK_H):
        row = start + tl.arange(0, BLOCK_H)
        here = live[:, None] & (row < widest)[None, :]
        next_hidden = tl.load(hidden_ptr + token[:, None] * H + row[None, :], here, 0.0)
        next_down = _block(next_hidden, down_ptr, down_stride, row, output, row < widest, output_live)
        sums += _products(hidden, down)
        hidden, down = next_hidden, next_down
    y = tl.sum(sums, 1)
    if PARTS == 1 and bias_ptr is not None:
        y += tl.load(bias_ptr + output, output_live, 0.0).to(tl.float32)[None, :]
    place = (part * T + token[:, None]) * D + output[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), live[:, None] & output_live[None, :])


def _forward(x_TD, expert_T, least, weights, act, widths):
    """`least`: two numbers, or two tensors (T,)."""
    (least_input, least_hidden), (gate, gate_bias, up, up_bias, down, down_bias) = least, weights
    (T, D), H = x_TD.shape, up.shape[0]
    x_TD, expert_T, tokens = x_TD.contiguous(), expert_T.contiguous(), triton.next_power_of_2(len(x_TD))
    hidden = x_TD.new_empty(T, H, dtype=torch.float32)
    y = x_TD.new_empty(PARTS, T, D, dtype=x_TD.dtype if PARTS == 1 else torch.float32)
    gated, first = gate is not None, up if gate is None else gate
    with torch.cuda.device_of(x_TD):
        _hidden_kernel[(triton.cdiv(H, NEURONS),)](
            x_TD, expert_T, least_input, least_hidden, first, gate_bias, up, up_bias, hidden,
            T, D, H, first.stride(1), up.stride(1), tuple(widths),
            ACT=ACTIVATIONS[act], GATED=gated, EACH=isinstance(least_input, torch.Tensor),
            TOKENS=tokens, BLOCK_D=max(16, ROWS // tokens), BLOCK_H=NEURONS, num_warps=WARPS,
        )  # fmt: skip
        _output_kernel[triton.cdiv(D, OUTPUTS), PARTS](
            hidden, expert_T, down, down_bias, y, T, D, H, down.stride(1), tuple(widths),
            TOKENS=tokens, PARTS=PARTS, BLOCK_H=max(16, HIDDEN_ROWS // tokens), BLOCK_D=OUTPUTS, num_warps=OUTPUT_WARPS,
        )  # fmt: skip
    if PARTS == 1:
        return y[0]
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
    each = any(isinstance(value, torch.Tensor) for value in thresholds) or torch.compiler.is_compiling()
    # Filled on the device: a tensor made from a list would make the host wait for the copy.
    least = [
        value.expand(*shape, 1).flatten()
        if isinstance(value, torch.Tensor)
        else torch.full((len(x_TD),), value, device=x.device)
        if each
        else value
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
