# SPDX-License-Identifier: Apache-2.0
"""
Nested experts on a GPU in Triton: each token through its own prefix, and the host never waits for the device.

Tokens are sorted by width on the device, widest first, so that neighbours share a tile. The grids are those of the dense
MLP; a tile that lies beyond its widest token returns at once. So no shape depends on the routes, and CUDA graphs can
capture it all. Tokens of several widths in one tile are masked one by one: the numbers are exact for any widths.

Shapes: T tokens, D hidden size, H MLP width, E experts. A token has a "row" in the input and a "place" after sorting.
"""

from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl

    jit, constexpr, _ = triton.jit, tl.constexpr, tl.tuple  # kernels take tuples of numbers since Triton 3.3
except (ImportError, AttributeError):  # the CPU build of torch comes without Triton; nothing calls the kernels then
    triton = constexpr = None

    def jit(function):
        return function


# Names of transformers -> names in `_activate`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON = triton is not None


@jit
def _activate(z, ACT: constexpr):
    """The activation and its slope."""
    if ACT == "silu":
        gate = tl.sigmoid(z)
        value = z * gate
        slope = gate + value * (1 - gate)
    elif ACT == "gelu":
        gate = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        value = z * gate
        slope = gate + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACT == "gelu_tanh":  # 0.5 * (1 + tanh(a)) is sigmoid(2 a)
        gate = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        value = z * gate
        slope = gate + value * (1 - gate) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    else:
        positive = tl.maximum(z, 0.0)
        if ACT == "relu2":
            value = positive * positive
            slope = 2 * positive
        else:
            value = positive
            slope = tl.where(z > 0, 1.0, 0.0)
    return value, slope


@jit
def _tile(rows, columns, GROUP: constexpr):
    """This program's tile: widest tokens first, down a group of rows before the next column, so that weights stay in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    return first + program % (GROUP * columns) % size, program % (GROUP * columns) // size


@jit
def _width(expert_ptr, row, live, widths):
    expert = tl.load(expert_ptr + row, live, -1)
    width = tl.zeros_like(row).to(tl.int32)
    for e in tl.static_range(len(widths)):
        width = tl.where(expert == e, widths[e], width)
    return width


@jit
def _tokens(order_ptr, expert_ptr, tile, T, widths, BLOCK_T: constexpr):
    """Places, whether there is a token, rows and widths of one tile of tokens. Without `order` the places are the rows."""
    place = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live = place < T
    row = place
    if order_ptr is not None:
        row = tl.load(order_ptr + place, live, 0)
    return place, live, row, _width(expert_ptr, row, live, widths)


@jit
def _hidden_kernel(
    x_ptr, grad_ptr, expert_ptr, order_ptr, gate_ptr, gate_bias_ptr, up_ptr, up_bias_ptr, down_ptr,
    hidden_ptr, gate_grad_ptr, up_grad_ptr, T, D, H,
    gate_stride_h, gate_stride_d, up_stride_h, up_stride_d, down_stride_d, down_stride_h, widths,
    ACT: constexpr, BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """
    hidden = act(x gate') * (x up'), sorted, (T, H); where `grad` of the output is given, the gradients of both products too.

    Tiles beyond their widest token are left unwritten; in the others every neuron is written, unused ones as zeros.
    """
    tile_T, tile_H = _tile(tl.cdiv(T, BLOCK_T), tl.cdiv(H, BLOCK_H), 8)
    place, live, row, width = _tokens(order_ptr, expert_ptr, tile_T, T, widths, BLOCK_T)
    if tile_H * BLOCK_H >= tl.max(width, 0):
        return
    d = tl.arange(0, BLOCK_D)
    h = tile_H * BLOCK_H + tl.arange(0, BLOCK_H)
    h_live = h < H
    # Rows may be more than 2^31 numbers from the start.
    token = row[:, None] * D + d[None, :]
    neuron = h[None, :].to(tl.int64)
    column = d[:, None].to(tl.int64)
    up = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    gate = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    grad = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d_live = d < D - d0
        token_live = live[:, None] & d_live[None, :]
        weight_live = d_live[:, None] & h_live[None, :]
        x = tl.load(x_ptr + token + d0, token_live, 0.0)
        w = tl.load(up_ptr + neuron * up_stride_h + (column + d0) * up_stride_d, weight_live, 0.0)
        up = tl.dot(x, w, up, input_precision="ieee")
        if gate_ptr is not None:
            w = tl.load(gate_ptr + neuron * gate_stride_h + (column + d0) * gate_stride_d, weight_live, 0.0)
            gate = tl.dot(x, w, gate, input_precision="ieee")
        if grad_ptr is not None:
            dy = tl.load(grad_ptr + token + d0, token_live, 0.0)
            w = tl.load(down_ptr + neuron * down_stride_h + (column + d0) * down_stride_d, weight_live, 0.0)
            grad = tl.dot(dy, w, grad, input_precision="ieee")
    if up_bias_ptr is not None:
        up += tl.load(up_bias_ptr + h, h_live, 0.0)[None, :].to(tl.float32)
    if gate_bias_ptr is not None:
        gate += tl.load(gate_bias_ptr + h, h_live, 0.0)[None, :].to(tl.float32)
    used = h[None, :] < width[:, None]
    here = place[:, None] * H + h[None, :]
    written = live[:, None] & h_live[None, :]
    dtype: constexpr = hidden_ptr.dtype.element_ty
    if gate_ptr is not None:
        value, slope = _activate(gate, ACT)
        hidden = value * up
        if grad_ptr is not None:
            tl.store(gate_grad_ptr + here, tl.where(used, grad * up * slope, 0.0).to(dtype), written)
            tl.store(up_grad_ptr + here, tl.where(used, grad * value, 0.0).to(dtype), written)
    else:
        hidden, slope = _activate(up, ACT)
        if grad_ptr is not None:
            tl.store(up_grad_ptr + here, tl.where(used, grad * slope, 0.0).to(dtype), written)
    tl.store(hidden_ptr + here, tl.where(used, hidden, 0.0).to(dtype), written)


@jit
def _output_kernel(
    a_ptr, a_weight_ptr, b_ptr, b_weight_ptr, bias_ptr, expert_ptr, order_ptr, out_ptr, T, D, H,
    a_stride_h, a_stride_d, b_stride_h, b_stride_d, widths,
    BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr, BLOCK_K: constexpr,
):  # fmt: skip
    """out = a a_weight + b b_weight + bias over the neurons that a tile's widest token uses: sorted (T, H) -> (T, D) as x."""
    tile_T, tile_D = _tile(tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D), 8)
    place, live, row, width = _tokens(order_ptr, expert_ptr, tile_T, T, widths, BLOCK_T)
    # The trap: what lies beyond the last tile of `_hidden_kernel` was never written. As a multiple of BLOCK_H the end
    # is known to be a round number, so that loads stay wide; a mask by `width` itself would make them single numbers.
    end = tl.cdiv(tl.max(width, 0), BLOCK_H) * BLOCK_H
    k = tl.arange(0, BLOCK_K)
    d = tile_D * BLOCK_D + tl.arange(0, BLOCK_D)
    d_live = d < D
    token = place[:, None] * H + k[None, :]
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k0 in range(0, end, BLOCK_K):
        k_live = (k < end - k0) & (k < H - k0)
        token_live = live[:, None] & k_live[None, :]
        weight_live = k_live[:, None] & d_live[None, :]
        neuron = (k0 + k[:, None]).to(tl.int64)
        a = tl.load(a_ptr + token + k0, token_live, 0.0)
        w = tl.load(a_weight_ptr + neuron * a_stride_h + d[None, :].to(tl.int64) * a_stride_d, weight_live, 0.0)
        out = tl.dot(a, w, out, input_precision="ieee")
        if b_ptr is not None:
            b = tl.load(b_ptr + token + k0, token_live, 0.0)
            w = tl.load(b_weight_ptr + neuron * b_stride_h + d[None, :].to(tl.int64) * b_stride_d, weight_live, 0.0)
            out = tl.dot(b, w, out, input_precision="ieee")
    if bias_ptr is not None:
        out += tl.load(bias_ptr + d, d_live, 0.0)[None, :].to(tl.float32)
    written = live[:, None] & d_live[None, :]
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), written)


@jit
def _weight_grad_kernel(
    a_ptr, b_ptr, expert_ptr, out_ptr, bias_out_ptr, T, D, H, out_stride_h, out_stride_d, widths,
    BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr,
):  # fmt: skip
    """out = a' b over the tokens that use a tile's neurons: (T, H), (T, D), both sorted -> (H, D); and the sums of a."""
    tile_D, tile_H = _tile(tl.cdiv(D, BLOCK_D), tl.cdiv(H, BLOCK_H), 8)
    h = tile_H * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tile_D * BLOCK_D + tl.arange(0, BLOCK_D)
    h_live, d_live = h < H, d < D
    # Widest first, so the tokens that use these neurons are the first ones.
    using = 0
    for t0 in range(0, T, 1024):
        row = t0 + tl.arange(0, 1024)
        using += tl.sum((_width(expert_ptr, row, row < T, widths) > tile_H * BLOCK_H).to(tl.int32), 0)
    out = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for t0 in range(0, using, BLOCK_T):
        place = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = place < using
        a = tl.load(a_ptr + place[None, :] * H + h[:, None], h_live[:, None] & live[None, :], 0.0)
        b = tl.load(b_ptr + place[:, None] * D + d[None, :], live[:, None] & d_live[None, :], 0.0)
        out = tl.dot(a, b, out, input_precision="ieee")
        if bias_out_ptr is not None:
            total += tl.sum(a.to(tl.float32), 1)
    here = h[:, None].to(tl.int64) * out_stride_h + d[None, :].to(tl.int64) * out_stride_d
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), h_live[:, None] & d_live[None, :])
    if bias_out_ptr is not None:
        tl.store(bias_out_ptr + h, total.to(bias_out_ptr.dtype.element_ty), h_live & (tile_D == 0))


# The kernels run on a CPU where TRITON_INTERPRET=1 was set before this file was imported.
INTERPRETED = TRITON and not isinstance(_hidden_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """One program's share of a product: columns of the result, steps of the inner sum, and warps."""

    columns: int
    inner: int
    warps: int


class Plan(NamedTuple):
    """Tokens of a tile (of `weight`: the inner sum), and each kernel's tile. `weight` works on `hidden.columns` neurons."""

    tokens: int
    hidden: Tile
    output: Tile
    weight: Tile | None = None


# By bytes of a number. A table, since timing candidates at the first call would make the host wait. Few tokens wait for the
# weights, each read once: narrow tiles, many of them. Float32 products hold their operands in registers, so tiles are smaller.
DECODE = {2: Plan(16, Tile(32, 128, 4), Tile(16, 256, 4)), 4: Plan(16, Tile(32, 64, 4), Tile(16, 128, 4))}
BATCH = {2: Plan(64, Tile(64, 64, 4), Tile(32, 128, 4)), 4: Plan(64, Tile(32, 32, 8), Tile(32, 64, 8))}
PREFILL = {2: Plan(128, Tile(64, 64, 8), Tile(128, 64, 8)), 4: Plan(64, Tile(64, 32, 8), Tile(64, 32, 8))}
BACKWARD = {
    2: Plan(64, Tile(64, 32, 8), Tile(128, 64, 8), Tile(128, 64, 8)),
    4: Plan(64, Tile(64, 32, 8), Tile(64, 32, 8), Tile(64, 32, 8)),
}
# Hopper and its successors multiply two-byte numbers straight from their larger shared memory.
PREFILL_LARGE = Plan(128, Tile(128, 64, 8), Tile(128, 64, 8))
BACKWARD_LARGE = Plan(128, Tile(64, 64, 8), Tile(128, 64, 8), Tile(128, 64, 8))


def _shared_memory(x):
    """Bytes that one program may have."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 101376


def _plan(x_TD, backward=False):
    size = x_TD.element_size()
    large = size == 2 and _shared_memory(x_TD) > 200_000
    if backward:
        return BACKWARD_LARGE if large else BACKWARD[size]
    for plans in (DECODE, BATCH):
        if len(x_TD) <= plans[size].tokens:
            return plans[size]
    return PREFILL_LARGE if large else PREFILL[size]


def _options(tile, lines, x):
    """Launch options: as many stages as shared memory holds, at most four. Each reads `lines` of `inner` numbers."""
    stages = (_shared_memory(x) - 2048) // (lines * tile.inner * x.element_size())
    return {"num_warps": tile.warps, "num_stages": max(1, min(4, stages))}


def _order(expert_T):
    return torch.argsort(expert_T, descending=True, stable=True)


def _hidden(x_TD, grad_TD, expert_T, order_T, gate, gate_bias, up, up_bias, down, act, widths, plan):
    """Launch `_hidden_kernel`: sorted hidden (T, H), and with `grad_TD` the gradients of gate and up products, or `None`."""
    (T, D), H, tile = x_TD.shape, len(up), plan.hidden
    backward, gated = grad_TD is not None, gate is not None
    hidden_TH = x_TD.new_empty(T, H)
    gate_grad_TH = x_TD.new_empty(T, H) if backward and gated else None
    up_grad_TH = x_TD.new_empty(T, H) if backward else None
    _hidden_kernel[(triton.cdiv(T, plan.tokens) * triton.cdiv(H, tile.columns),)](
        x_TD, grad_TD, expert_T, order_T, gate, gate_bias, up, up_bias, down if backward else None,
        hidden_TH, gate_grad_TH, up_grad_TH, T, D, H,
        *(gate.stride() if gated else (0, 0)), *up.stride(), *down.stride(), tuple(widths),
        ACT=ACTIVATIONS[act], BLOCK_T=plan.tokens, BLOCK_H=tile.columns, BLOCK_D=tile.inner,
        **_options(tile, (1 + backward) * plan.tokens + (1 + gated + backward) * tile.columns, x_TD),
    )  # fmt: skip
    return hidden_TH, gate_grad_TH, up_grad_TH


def _output(a_TH, a_weight_HD, b_TH, b_weight_HD, bias, expert_T, order_T, widths, plan):
    """Launch `_output_kernel`: (T, D). Each weight is (H, D) with any strides."""
    (T, H), D, tile = a_TH.shape, a_weight_HD.shape[1], plan.output
    out_TD = a_TH.new_empty(T, D)
    _output_kernel[(triton.cdiv(T, plan.tokens) * triton.cdiv(D, tile.columns),)](
        a_TH, a_weight_HD, b_TH, b_weight_HD, bias, expert_T, order_T, out_TD, T, D, H,
        *a_weight_HD.stride(), *((0, 0) if b_TH is None else b_weight_HD.stride()), tuple(widths),
        BLOCK_T=plan.tokens, BLOCK_H=plan.hidden.columns, BLOCK_D=tile.columns, BLOCK_K=tile.inner,
        **_options(tile, (1 if b_TH is None else 2) * (plan.tokens + tile.columns), a_TH),
    )  # fmt: skip
    return out_TD


def _weight_grad(a_TH, b_TD, like, bias, expert_T, widths, plan, transposed=False):
    """Launch `_weight_grad_kernel`: gradients of a weight, and of its bias where that is not `None`."""
    (T, D), H, tile = b_TD.shape, a_TH.shape[1], plan.weight
    weight_grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    bias_grad = None if bias is None else torch.empty_like(bias)
    _weight_grad_kernel[(triton.cdiv(D, tile.columns) * triton.cdiv(H, plan.hidden.columns),)](
        a_TH, b_TD, expert_T, weight_grad, bias_grad, T, D, H, *weight_grad.stride()[:: -1 if transposed else 1],
        tuple(widths), BLOCK_T=tile.inner, BLOCK_H=plan.hidden.columns, BLOCK_D=tile.columns,
        **_options(tile, plan.hidden.columns + tile.columns, b_TD),
    )  # fmt: skip
    return weight_grad, bias_grad


@torch.library.custom_op("dynamoe::triton_mlp", mutates_args=())
def triton_mlp_op(
    x_TD: torch.Tensor,
    expert_T: torch.Tensor,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    act: str,
    widths: list[int],
) -> torch.Tensor:
    """Each token through its own prefix: (T, D), (T,) int -> (T, D)."""
    x_TD, expert_T, plan = x_TD.contiguous(), expert_T.contiguous(), _plan(x_TD)
    with torch.cuda.device_of(x_TD):
        order_T = _order(expert_T) if len(x_TD) > plan.tokens else None  # within one tile any order will do
        hidden_TH, _, _ = _hidden(x_TD, None, expert_T, order_T, gate, gate_bias, up, up_bias, down, act, widths, plan)
        return _output(hidden_TH, down.t(), None, None, down_bias, expert_T, order_T, widths, plan)


@triton_mlp_op.register_fake
def _(x_TD, expert_T, gate, gate_bias, up, up_bias, down, down_bias, act, widths):
    return x_TD.new_empty(x_TD.shape)  # contiguous, whatever x is


@torch.library.custom_op("dynamoe::triton_mlp_backward", mutates_args=())
def triton_mlp_backward_op(
    grad_TD: torch.Tensor,
    x_TD: torch.Tensor,
    expert_T: torch.Tensor,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    act: str,
    widths: list[int],
    of_x: bool,
    of_weights: bool,
) -> list[torch.Tensor]:
    """Gradients of x, gate, its bias, up, its bias and down: those that exist and are asked for. Hidden is computed again."""
    x_TD, expert_T, grad_TD = x_TD.contiguous(), expert_T.contiguous(), grad_TD.contiguous()
    plan, grads = _plan(x_TD, backward=True), []
    with torch.cuda.device_of(x_TD):
        order_T = _order(expert_T)
        hidden_TH, gate_grad_TH, up_grad_TH = _hidden(
            x_TD, grad_TD, expert_T, order_T, gate, gate_bias, up, up_bias, down, act, widths, plan
        )
        if of_x:
            grads.append(_output(up_grad_TH, up, gate_grad_TH, gate, None, expert_T, order_T, widths, plan))
        if of_weights:
            # The inner sum runs over tokens: rows found through `order` would have each step wait for two loads.
            x_TD, grad_TD, route = x_TD[order_T], grad_TD[order_T], (expert_T, widths, plan)
            if gate is not None:
                grads += _weight_grad(gate_grad_TH, x_TD, gate, gate_bias, *route)
            grads += _weight_grad(up_grad_TH, x_TD, up, up_bias, *route)
            grads += _weight_grad(hidden_TH, grad_TD, down, None, *route, transposed=True)
    return [grad for grad in grads if grad is not None]


@triton_mlp_backward_op.register_fake
def _(grad_TD, x_TD, expert_T, gate, gate_bias, up, up_bias, down, act, widths, of_x, of_weights):
    inputs = [x_TD] * of_x + [gate, gate_bias, up, up_bias, down] * of_weights
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _save(ctx, inputs, output):
    x_TD, expert_T, *weights, _, ctx.act, ctx.widths = inputs
    ctx.save_for_backward(x_TD, expert_T, *weights)


def _backward(ctx, grad_TD):
    x_TD, expert_T, *weights = ctx.saved_tensors
    of_x, of_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:7])
    grads = iter(triton_mlp_backward_op(grad_TD, x_TD, expert_T, *weights, ctx.act, ctx.widths, of_x, of_weights))
    of_input = next(grads) if of_x else None
    of_each = [next(grads) if of_weights and weight is not None else None for weight in weights]
    return of_input, None, *of_each, grad_TD.sum(0) if ctx.needs_input_grad[7] else None, None, None


triton_mlp_op.register_autograd(_backward, setup_context=_save)


def runs_triton(x, act):
    """Whether the kernels take this input: on a GPU (or interpreted), in a dtype and with an activation that they know."""
    here = x.is_cuda and torch.version.hip is None or INTERPRETED and x.device.type == "cpu"
    return TRITON and here and x.dtype in DTYPES and act in ACTIVATIONS


def triton_mlp(x_TD, expert_T, weights, act, widths):
    """
    Each token through its own prefix, without waiting for the device: (T, D), (T,) int -> (T, D).

    Args:
        weights: the `Projections` of the whole MLP.
        act: name of the activation, one of `ACTIVATIONS`.
        widths: neurons of each expert.
    """
    tensors = x_TD, *weights[:6]
    if torch.is_autocast_enabled(x_TD.device.type):  # autocast knows no custom kernels
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        tensors = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    x_TD, *weights = tensors
    return triton_mlp_op(x_TD, expert_T, *weights, act, widths)
