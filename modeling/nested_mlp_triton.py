# SPDX-License-Identifier: Apache-2.0
"""
Nested experts on a GPU in Triton: each token through its own prefix, and the host never waits for the device.

Tokens are sorted by width on the device, widest first, so that neighbours share a tile. The grids are those of the dense
MLP; a tile that lies beyond its widest token returns at once. So no shape depends on the routes, and CUDA graphs can
capture it all. Tokens of several widths in one tile are masked one by one: the numbers are exact for any widths.

Shapes: T tokens, D hidden size, H MLP width, E experts. Tokens lie sorted in all kernels; the output goes back to their rows.
"""

from typing import NamedTuple

import torch


try:
    import triton
    import triton.language as tl

    jit, constexpr, _ = triton.jit, tl.constexpr, tl.tuple  # kernels take tuples of numbers since Triton 3.3
except (ImportError, AttributeError):  # the CPU build of torch comes without Triton; nothing calls the kernels then
    triton = constexpr = tl = None

    def jit(function):
        return function


try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None


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
def _tokens(expert_ptr, tile, T, widths, BLOCK_T: constexpr):
    """Places, whether there is a token, and widths of one tile of tokens."""
    place = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    live = place < T
    return place, live, _width(expert_ptr, place, live, widths)


@jit
def _load(source, offset, live, row, column, BULK: constexpr, TRANSPOSED: constexpr):
    """A tile of a matrix: by pointers, or with BULK in one piece by the copy engine, which puts zeros beyond the matrix."""
    if BULK:
        tile = source.load([row, column])
        if TRANSPOSED:
            tile = tile.T
    else:
        tile = tl.load(source + offset, live, 0.0)
    return tile


@jit
def _kept(hidden, used, least_ptr, least, place, live, RAMP: constexpr):
    """`keep_large` of the activations of used neurons, by the threshold of their token, or the one of all; 0 of the others."""
    if least_ptr is not None:
        least = tl.load(least_ptr + place, live, 0.0)[:, None]
    size, small = tl.abs(hidden), tl.zeros_like(hidden)
    if RAMP > 0:
        falling = tl.maximum(size - (1 - RAMP) * least, 0.0) / RAMP
        small = tl.where(hidden < 0, -falling, falling)
    return tl.where(used, tl.where(size <= least, small, hidden), 0.0)


@jit
def _hidden_kernel(
    x_ptr, grad_ptr, expert_ptr, gate_ptr, gate_bias_ptr, up_ptr, up_bias_ptr, down_ptr,
    hidden_ptr, gate_grad_ptr, up_grad_ptr, least_ptr, least, T, D, H,
    gate_stride_h, gate_stride_d, up_stride_h, up_stride_d, down_stride_d, down_stride_h, widths,
    ACT: constexpr, RAMP: constexpr, BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr, BULK: constexpr,
):  # fmt: skip
    """
    hidden = act(x gate') * (x up'), (T, H), as `_kept` leaves it; with `grad`, the gradients of both products too.

    Tiles beyond their widest token are left unwritten; in the others every neuron is written, unused ones as zeros.
    With BULK, x, grad and the weights are descriptors of their tiles.
    """
    tile_T, tile_H = _tile(tl.cdiv(T, BLOCK_T), tl.cdiv(H, BLOCK_H), 8)
    place, live, width = _tokens(expert_ptr, tile_T, T, widths, BLOCK_T)
    if tile_H * BLOCK_H >= tl.max(width, 0):
        return
    t0, h0 = tile_T * BLOCK_T, tile_H * BLOCK_H
    d = tl.arange(0, BLOCK_D)
    h = h0 + tl.arange(0, BLOCK_H)
    h_live = h < H
    # Rows may be more than 2^31 numbers from the start.
    token = place[:, None] * D + d[None, :]
    neuron = h[None, :].to(tl.int64)
    column = d[:, None].to(tl.int64)
    up = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    gate = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    grad = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d_live = d < D - d0
        token_live = live[:, None] & d_live[None, :]
        weight_live = d_live[:, None] & h_live[None, :]
        x = _load(x_ptr, token + d0, token_live, t0, d0, BULK, False)
        here = neuron * up_stride_h + (column + d0) * up_stride_d
        up = tl.dot(x, _load(up_ptr, here, weight_live, h0, d0, BULK, True), up, input_precision="ieee")
        if gate_ptr is not None:
            here = neuron * gate_stride_h + (column + d0) * gate_stride_d
            gate = tl.dot(x, _load(gate_ptr, here, weight_live, h0, d0, BULK, True), gate, input_precision="ieee")
        if grad_ptr is not None:
            dy = _load(grad_ptr, token + d0, token_live, t0, d0, BULK, False)
            here = neuron * down_stride_h + (column + d0) * down_stride_d
            grad = tl.dot(dy, _load(down_ptr, here, weight_live, d0, h0, BULK, False), grad, input_precision="ieee")
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
    tl.store(hidden_ptr + here, _kept(hidden, used, least_ptr, least, place, live, RAMP).to(dtype), written)


@jit
def _product(
    total, a_ptr, weight_ptr, stride_h, stride_d, place, live, d, t0, d0, end, D, H,
    BLOCK_K: constexpr, BULK: constexpr, TRANSPOSED: constexpr,
):  # fmt: skip
    """total + a weight over the first `end` neurons: (T, H), (H, D) with any strides -> (T, D)."""
    k = tl.arange(0, BLOCK_K)
    token = place[:, None] * H + k[None, :]
    for k0 in range(0, end, BLOCK_K):
        k_live = (k < end - k0) & (k < H - k0)
        a = _load(a_ptr, token + k0, live[:, None] & k_live[None, :], t0, k0, BULK, False)
        here = (k0 + k[:, None]).to(tl.int64) * stride_h + d[None, :].to(tl.int64) * stride_d
        if TRANSPOSED:
            row, column = d0, k0
        else:
            row, column = k0, d0
        w = _load(weight_ptr, here, k_live[:, None] & (d < D)[None, :], row, column, BULK, TRANSPOSED)
        total = tl.dot(a, w, total, input_precision="ieee")
    return total


@jit
def _output_kernel(
    a_ptr, a_weight_ptr, b_ptr, b_weight_ptr, bias_ptr, expert_ptr, order_ptr, out_ptr, T, D, H,
    a_stride_h, a_stride_d, b_stride_h, b_stride_d, widths,
    BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr, BLOCK_K: constexpr, BULK: constexpr, TRANSPOSED: constexpr,
):  # fmt: skip
    """
    out = a a_weight + b b_weight + bias over the neurons that a tile's widest token uses: (T, H) -> (T, D), rows as `order` says.

    With BULK, a, b and the weights are descriptors of their tiles; TRANSPOSED says that a weight is one of (D, H).
    """
    tile_T, tile_D = _tile(tl.cdiv(T, BLOCK_T), tl.cdiv(D, BLOCK_D), 4)
    place, live, width = _tokens(expert_ptr, tile_T, T, widths, BLOCK_T)
    # The trap: what lies beyond the last tile of `_hidden_kernel` was never written. As a multiple of BLOCK_H the end
    # is known to be a round number, so that loads stay wide; a mask by `width` itself would make them single numbers.
    end = tl.cdiv(tl.max(width, 0), BLOCK_H) * BLOCK_H
    t0, d0 = tile_T * BLOCK_T, tile_D * BLOCK_D
    d = d0 + tl.arange(0, BLOCK_D)
    out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    out = _product(
        out, a_ptr, a_weight_ptr, a_stride_h, a_stride_d, place, live, d, t0, d0, end, D, H, BLOCK_K, BULK, TRANSPOSED
    )
    if b_ptr is not None:
        out = _product(
            out, b_ptr, b_weight_ptr, b_stride_h, b_stride_d, place, live, d, t0, d0, end, D, H, BLOCK_K, BULK, TRANSPOSED
        )
    d_live = d < D
    if bias_ptr is not None:
        out += tl.load(bias_ptr + d, d_live, 0.0)[None, :].to(tl.float32)
    row = place
    if order_ptr is not None:
        row = tl.load(order_ptr + place, live, 0)
    written = live[:, None] & d_live[None, :]
    tl.store(out_ptr + row[:, None] * D + d[None, :], out.to(out_ptr.dtype.element_ty), written)


@jit
def _weight_grad_kernel(
    a_ptr, b_ptr, expert_ptr, out_ptr, bias_out_ptr, T, D, H, out_stride_h, out_stride_d, widths,
    BLOCK_T: constexpr, BLOCK_H: constexpr, BLOCK_D: constexpr, BULK: constexpr,
):  # fmt: skip
    """out = a' b over the tokens that use a tile's neurons: (T, H), (T, D) -> (H, D); and the sums of a. BULK: of descriptors."""
    tile_D, tile_H = _tile(tl.cdiv(D, BLOCK_D), tl.cdiv(H, BLOCK_H), 8)
    h0, d0 = tile_H * BLOCK_H, tile_D * BLOCK_D
    h = h0 + tl.arange(0, BLOCK_H)
    d = d0 + tl.arange(0, BLOCK_D)
    h_live, d_live = h < H, d < D
    # Widest first, so the tokens that use these neurons are the first ones. Those after them in the last tile have zeros.
    using = 0
    for t0 in range(0, T, 1024):
        place = t0 + tl.arange(0, 1024)
        using += tl.sum((_width(expert_ptr, place, place < T, widths) > h0).to(tl.int32), 0)
    out = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    for t0 in range(0, using, BLOCK_T):
        place = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = place < using
        a = _load(a_ptr, place[None, :] * H + h[:, None], h_live[:, None] & live[None, :], t0, h0, BULK, True)
        b = _load(b_ptr, place[:, None] * D + d[None, :], live[:, None] & d_live[None, :], t0, d0, BULK, False)
        out = tl.dot(a, b, out, input_precision="ieee")
        if bias_out_ptr is not None:
            total += tl.sum(a.to(tl.float32), 1)
    here = h[:, None].to(tl.int64) * out_stride_h + d[None, :].to(tl.int64) * out_stride_d
    tl.store(out_ptr + here, out.to(out_ptr.dtype.element_ty), h_live[:, None] & d_live[None, :])
    if bias_out_ptr is not None:
        tl.store(bias_out_ptr + h, total.to(bias_out_ptr.dtype.element_ty), h_live & (tile_D == 0))


@jit
def _choose_kernel(
    x_ptr, weight_ptr, bias_ptr, thresholds_ptr, expert_ptr, threshold, R, STEPS: constexpr, BLOCK_R: constexpr
):  # fmt: skip
    """
    The second half of a `TokenRouter`, one token a program: (T, R) products of its first layer -> (T,) experts.

    A token's logits rise by softplus steps; its expert is the number of logits that fall short of the threshold.
    """
    token = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    x = tl.load(x_ptr + token * R + r, r < R, 0.0).to(tl.float32)
    x = x * tl.sigmoid(x)
    if thresholds_ptr is not None:
        threshold = tl.load(thresholds_ptr + token)
    logit = 0.0
    expert = 0
    for e in tl.static_range(STEPS):
        step = tl.sum(x * tl.load(weight_ptr + e * R + r, r < R, 0.0).to(tl.float32), 0)
        step += tl.load(bias_ptr + e).to(tl.float32)
        if e > 0:
            step = tl.maximum(step, 0.0) + tl.log(1 + tl.exp(-tl.abs(step)))
        logit += step
        expert += (logit < threshold).to(tl.int32)
    tl.store(expert_ptr + token, expert)


# The kernels run on a CPU where TRITON_INTERPRET=1 was set before this file was imported.
INTERPRETED = TRITON and not isinstance(_hidden_kernel, triton.JITFunction)


class Tile(NamedTuple):
    """One program's share of a product: columns of the result, steps of the inner sum, warps, and stages in flight at most."""

    columns: int
    inner: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tokens of a tile (of `weight`: the inner sum), and each kernel's tile. `weight` works on `hidden.columns` neurons."""

    tokens: int
    hidden: Tile
    output: Tile
    weight: Tile | None = None


# By bytes of a number. A table, since timing candidates at the first call would make the host wait. Few tokens wait for the
# weights, each read once: narrow tiles, many of them. Float32 products hold their operands in registers, so tiles are smaller.
DECODE = {
    2: Plan(16, Tile(32, 256, 2, 3), Tile(32, 256, 2, 5)),
    4: Plan(16, Tile(32, 64, 4, 4), Tile(16, 128, 4, 4)),
}
BATCH = {
    2: Plan(64, Tile(64, 128, 4, 4), Tile(32, 128, 4, 5)),
    4: Plan(64, Tile(32, 32, 8, 4), Tile(32, 64, 8, 4)),
}
PREFILL = {
    2: Plan(128, Tile(64, 64, 8, 4), Tile(128, 64, 8, 4)),
    4: Plan(64, Tile(64, 32, 8, 4), Tile(64, 32, 8, 4)),
}
BACKWARD = {
    2: Plan(64, Tile(64, 32, 8, 4), Tile(128, 64, 8, 4), Tile(128, 64, 8, 4)),
    4: Plan(64, Tile(64, 32, 8, 4), Tile(64, 32, 8, 4), Tile(64, 32, 8, 4)),
}
# Hopper and its successors multiply two-byte numbers straight from their larger shared memory. The best of some 300 on an H200,
# as DECODE and BATCH. In the backward pass larger tiles win although the three sums of `hidden` spill a few registers.
PREFILL_LARGE = Plan(128, Tile(128, 64, 8, 3), Tile(256, 64, 8, 4))
BACKWARD_LARGE = Plan(128, Tile(128, 32, 8, 4), Tile(256, 64, 8, 4), Tile(256, 64, 8, 3))


def _shared_memory(x):
    """Bytes that one program may have."""
    return torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin if x.is_cuda else 101376


def _large(x):
    return x.element_size() == 2 and _shared_memory(x) > 200_000


def _plan(x_TD, backward=False):
    size = x_TD.element_size()
    if backward:
        return BACKWARD_LARGE if _large(x_TD) else BACKWARD[size]
    for plans in (DECODE, BATCH):
        if len(x_TD) <= plans[size].tokens:
            return plans[size]
    return PREFILL_LARGE if _large(x_TD) else PREFILL[size]


def _bulk(x_TD, *weights):
    """Whether the copy engine of Hopper and its successors can fetch the tiles: rows that start at multiples of 16 bytes."""
    if TensorDescriptor is None or not _large(x_TD):
        return False
    matrices = [x_TD, *(weight for weight in weights if weight is not None)]
    sizes = {size for matrix in matrices for size in (*matrix.shape[1:], matrix.stride(0))}
    aligned = all(size % 8 == 0 for size in sizes) and all(matrix.data_ptr() % 16 == 0 for matrix in matrices)
    return aligned and all(matrix.stride(1) == 1 for matrix in matrices)


def _source(matrix, rows, columns, bulk):
    """What a kernel reads tiles of (rows, columns) from."""
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if bulk and matrix is not None else matrix


def _options(tile, lines, x, bulk):
    """Launch options: as many stages as shared memory holds. Each reads `lines` of `inner` numbers."""
    stages = (_shared_memory(x) - 2048) // (lines * tile.inner * x.element_size())
    return {"BULK": bulk, "num_warps": tile.warps, "num_stages": max(1, min(tile.stages, stages))}


def _sorted(expert_T):
    """Experts, widest first, and the rows that they come from. Two bytes are sorted in half the time of eight."""
    return torch.sort(expert_T.to(torch.int16), descending=True, stable=True)


def _hidden(x_TD, grad_TD, expert_T, weights, act, widths, plan, bulk, thresholds=(0.0, None, 0.0)):
    """Launch `_hidden_kernel`: hidden (T, H), and with `grad_TD` the gradients of gate and up products, or `None`."""
    gate, gate_bias, up, up_bias, down = weights
    least, least_T, ramp = thresholds
    (T, D), H, tile = x_TD.shape, len(up), plan.hidden
    backward, gated = grad_TD is not None, gate is not None
    hidden_TH = x_TD.new_empty(T, H)
    gate_grad_TH = x_TD.new_empty(T, H) if backward and gated else None
    up_grad_TH = x_TD.new_empty(T, H) if backward else None
    token, weight = (plan.tokens, tile.inner, bulk), (tile.columns, tile.inner, bulk)
    _hidden_kernel[(triton.cdiv(T, plan.tokens) * triton.cdiv(H, tile.columns),)](
        _source(x_TD, *token), _source(grad_TD, *token), expert_T, _source(gate, *weight), gate_bias,
        _source(up, *weight), up_bias, _source(down if backward else None, tile.inner, tile.columns, bulk),
        hidden_TH, gate_grad_TH, up_grad_TH, least_T, least, T, D, H,
        *(gate.stride() if gated else (0, 0)), *up.stride(), *down.stride(), tuple(widths),
        ACT=ACTIVATIONS[act], RAMP=ramp, BLOCK_T=plan.tokens, BLOCK_H=tile.columns, BLOCK_D=tile.inner,
        **_options(tile, (1 + backward) * plan.tokens + (1 + gated + backward) * tile.columns, x_TD, bulk),
    )  # fmt: skip
    return hidden_TH, gate_grad_TH, up_grad_TH


def _output(first, second, bias, expert_T, order_T, widths, plan, bulk, transposed):
    """Launch `_output_kernel` on two pairs of activations and weight: (T, D). Weights are (H, D), or (D, H) where `transposed`."""
    (a_TH, a_weight), (b_TH, b_weight) = first, second
    (T, H), tile, shape = a_TH.shape, plan.output, (plan.output.inner, plan.output.columns)
    D = a_weight.shape[0 if transposed else 1]
    out_TD, turn = a_TH.new_empty(T, D), -1 if transposed else 1
    token, weight = (plan.tokens, tile.inner, bulk), (*shape[::turn], bulk)
    _output_kernel[(triton.cdiv(T, plan.tokens) * triton.cdiv(D, tile.columns),)](
        _source(a_TH, *token), _source(a_weight, *weight), _source(b_TH, *token), _source(b_weight, *weight),
        bias, expert_T, order_T, out_TD, T, D, H,
        *a_weight.stride()[::turn], *((0, 0) if b_weight is None else b_weight.stride()[::turn]), tuple(widths),
        BLOCK_T=plan.tokens, BLOCK_H=plan.hidden.columns, BLOCK_D=tile.columns, BLOCK_K=tile.inner, TRANSPOSED=transposed,
        **_options(tile, plan.tokens + tile.columns, a_TH, bulk),
    )  # fmt: skip
    return out_TD


def _weight_grad(a_TH, b_TD, like, bias, expert_T, widths, plan, bulk, transposed=False):
    """Launch `_weight_grad_kernel`: gradients of a weight, and of its bias where that is not `None`."""
    (T, D), H, tile, neurons = b_TD.shape, a_TH.shape[1], plan.weight, plan.hidden.columns
    weight_grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    bias_grad = None if bias is None else torch.empty_like(bias)
    _weight_grad_kernel[(triton.cdiv(D, tile.columns) * triton.cdiv(H, neurons),)](
        _source(a_TH, tile.inner, neurons, bulk), _source(b_TD, tile.inner, tile.columns, bulk),
        expert_T, weight_grad, bias_grad, T, D, H, *weight_grad.stride()[:: -1 if transposed else 1],
        tuple(widths), BLOCK_T=tile.inner, BLOCK_H=neurons, BLOCK_D=tile.columns,
        **_options(tile, neurons + tile.columns, b_TD, bulk),
    )  # fmt: skip
    return weight_grad, bias_grad


def _forward(x_TD, expert_T, weights, act, widths, least, least_T, ramp):
    *weights, down, down_bias = weights
    x_TD, expert_T, plan, order_T = x_TD.contiguous(), expert_T.contiguous(), _plan(x_TD), None
    bulk = plan is PREFILL_LARGE and _bulk(x_TD, weights[0], weights[2], down)
    with torch.cuda.device_of(x_TD):
        if len(x_TD) > plan.tokens:  # within one tile any order will do
            expert_T, order_T = _sorted(expert_T)
            x_TD = x_TD.index_select(0, order_T)
            least_T = None if least_T is None else least_T.index_select(0, order_T)
        hidden_TH, _, _ = _hidden(x_TD, None, expert_T, (*weights, down), act, widths, plan, bulk, (least, least_T, ramp))
        return _output((hidden_TH, down), (None, None), down_bias, expert_T, order_T, widths, plan, bulk, True)


@torch.library.custom_op("dynamoe::triton_mlp", mutates_args=())
def triton_mlp_op(
    x_TD: torch.Tensor, expert_T: torch.Tensor, gate: torch.Tensor | None, gate_bias: torch.Tensor | None, up: torch.Tensor,
    up_bias: torch.Tensor | None, down: torch.Tensor, down_bias: torch.Tensor | None, act: str, widths: list[int],
    least: float = 0.0, least_T: torch.Tensor | None = None, ramp: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Each token through its own prefix: (T, D), (T,) int -> (T, D)."""
    return _forward(x_TD, expert_T, (gate, gate_bias, up, up_bias, down, down_bias), act, widths, least, least_T, ramp)


@triton_mlp_op.register_fake
def _(x_TD, *inputs):
    return x_TD.new_empty(x_TD.shape)  # contiguous, whatever x is


@torch.library.custom_op("dynamoe::triton_mlp_backward", mutates_args=())
def triton_mlp_backward_op(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, expert_T: torch.Tensor, gate: torch.Tensor | None, gate_bias: torch.Tensor | None,
    up: torch.Tensor, up_bias: torch.Tensor | None, down: torch.Tensor, act: str, widths: list[int], of_x: bool, of_weights: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x, gate, its bias, up, its bias and down: those that exist and are asked for. Hidden is computed again."""
    plan, grads = _plan(x_TD, backward=True), []
    with torch.cuda.device_of(x_TD):
        expert_T, order_T = _sorted(expert_T)
        x_TD, grad_TD = x_TD.index_select(0, order_T), grad_TD.index_select(0, order_T)
        bulk = _bulk(x_TD, gate, up, down)
        weights = gate, gate_bias, up, up_bias, down
        hidden_TH, gate_grad_TH, up_grad_TH = _hidden(x_TD, grad_TD, expert_T, weights, act, widths, plan, bulk)
        if of_x:
            pairs = (up_grad_TH, up), (gate_grad_TH, gate)
            grads.append(_output(*pairs, None, expert_T, order_T, widths, plan, bulk, False))
        if of_weights:
            route = expert_T, widths, plan, bulk
            if gate is not None:
                grads += _weight_grad(gate_grad_TH, x_TD, gate, gate_bias, *route)
            grads += _weight_grad(up_grad_TH, x_TD, up, up_bias, *route)
            grads += _weight_grad(hidden_TH, grad_TD, down, None, *route, transposed=True)
    return [grad for grad in grads if grad is not None]


@triton_mlp_backward_op.register_fake
def _(grad_TD, x_TD, expert_T, gate, gate_bias, up, up_bias, down, act, widths, of_x, of_weights):
    inputs = [x_TD] * of_x + [gate, gate_bias, up, up_bias, down] * of_weights
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _chosen(x_TR, weight, bias, threshold, thresholds_T):
    expert_T = torch.empty(len(x_TR), dtype=torch.long, device=x_TR.device)
    steps, R = weight.shape
    with torch.cuda.device_of(x_TR):
        _choose_kernel[(len(x_TR),)](
            x_TR, weight, bias, thresholds_T, expert_T, threshold, R, STEPS=steps, BLOCK_R=triton.next_power_of_2(R)
        )
    return expert_T


@torch.library.custom_op("dynamoe::triton_choose", mutates_args=())
def triton_choose_op(
    x_TR: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: float, thresholds_T: torch.Tensor | None
) -> torch.Tensor:
    """Expert of each token, (T, R) products of the router's first layer -> (T,) int64."""
    return _chosen(x_TR, weight, bias, threshold, thresholds_T)


@triton_choose_op.register_fake
def _(x_TR, weight, bias, threshold, thresholds_T):
    return x_TR.new_empty(len(x_TR), dtype=torch.long)


@torch.no_grad()
def triton_choose(x_TR, weight, bias, threshold):
    """
    Expert of each token in one kernel, where plain torch takes some ten: (T, R) products of the router's first layer, the second
    layer's weight (E - 1, R) and bias, and the logit to reach, a number or (T,) float32 -> (T,) int64.
    """
    thresholds_T = None
    if isinstance(threshold, torch.Tensor):
        threshold, thresholds_T = 0.0, threshold.contiguous()
    choose = triton_choose_op if torch.compiler.is_compiling() else _chosen
    return choose(x_TR.contiguous(), weight, bias, threshold, thresholds_T)


def _save(ctx, inputs, output):
    x_TD, expert_T, *weights, _, ctx.act, ctx.widths, _, _, _ = inputs
    ctx.save_for_backward(x_TD, expert_T, *weights)


def _backward(ctx, grad_TD):
    x_TD, expert_T, *weights = ctx.saved_tensors
    of_x, of_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[2:7])
    grads = iter(triton_mlp_backward_op(grad_TD, x_TD, expert_T, *weights, ctx.act, ctx.widths, of_x, of_weights))
    of_input = next(grads) if of_x else None
    of_each = [next(grads) if of_weights and weight is not None else None for weight in weights]
    return of_input, None, *of_each, grad_TD.sum(0) if ctx.needs_input_grad[7] else None, *[None] * 5


triton_mlp_op.register_autograd(_backward, setup_context=_save)


def runs_triton(x, act):
    """Whether the kernels take this input: on a GPU (or interpreted), in a dtype and with an activation that they know."""
    here = x.is_cuda and torch.version.hip is None or INTERPRETED and x.device.type == "cpu"
    return TRITON and here and x.dtype in DTYPES and act in ACTIVATIONS


def triton_is_faster(x):
    """
    Whether the kernels were tested and found faster than dense products on such a device and in such a dtype: compute capability
    9.0, two bytes. In float32 they avoid TF32, as torch does by default, but lose to cuBLAS at any width.
    """
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _capability(x.device) == (9, 0)


@torch.compiler.assume_constant_result
def _capability(device):
    return torch.cuda.get_device_capability(device)


def triton_mlp(x_TD, expert_T, weights, act, widths, threshold=0.0, ramp=0.0):
    """
    Each token through its own prefix, without waiting for the device: (T, D), (T,) int -> (T, D).

    Args:
        weights: the `Projections` of the whole MLP.
        act: name of the activation, one of `ACTIVATIONS`.
        widths: neurons of each expert.
        threshold: activations that are not larger are zero, a number or (T,); above 0 there is no gradient.
        ramp: with one, activations below the threshold fall to zero as in `keep_large`.
    """
    tensors = x_TD, *weights[:6]
    if torch.is_autocast_enabled(x_TD.device.type):  # autocast knows no custom kernels
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        tensors = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    x_TD, *weights = tensors
    least, least_T = (0.0, threshold.contiguous()) if isinstance(threshold, torch.Tensor) else (threshold, None)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return triton_mlp_op(x_TD, expert_T, *weights, act, widths, least, least_T, ramp)
    # Without the operator's overhead, which a few tokens would feel.
    return _forward(x_TD, expert_T, weights, act, widths, least, least_T, ramp)
