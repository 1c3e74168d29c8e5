# SPDX-License-Identifier: Apache-2.0
"""How a nested MLP is computed, on plain tensors: prefixes for one width, a staircase for many, similarities for all.

Shapes: T tokens, D hidden size, H MLP width, E experts. Expert e is the first `widths[e]` of the H neurons.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN


class Costs(NamedTuple):
    """
    What calls cost beside multiplications, where a weight is. A block of its own costs a handful of calls, so for a small one it is
    cheaper to let the few tokens that stop inside a larger block run along, and to clear what they may not use. All measured, on
    CPUs with one thread if not said otherwise.
    """

    block: int  # multiplications of one projection in the smallest block that pays
    sort: int  # the same of all tokens and neurons, below which one product does for all (`_masked_mlp`)
    steps: tuple[int, ...]  # numbers of rows below which a product of fewer takes as long
    whole: int  # rows to which a masked product is padded where it has more than half of them
    apart: int = 1  # tokens up to which each has products of its own (`_apart_mlp`)


# Measured on an AMD EPYC: four rows take 15% less than three, twelve 13% less than sixteen, two rows no less than one and one.
ON_CPU = Costs(1_000_000, 4_000_000, (4,), 4, apart=2)
IN_THREADS = Costs(2_500_000, 15_000_000, (8, 16), 4)  # two: eight rows take as long as four, sixteen as long as ten
# Processors with units for products of bfloat16 (AMX) are Intel's: eight or twelve rows take as long as sixteen, or longer.
ON_INTEL = Costs(2_500_000, 15_000_000, (4, 16), 16)
IN_MATRIX_UNITS = Costs(100_000_000, 15_000_000, (32,), 16)
IN_BFLOAT16 = Costs(2_500_000, 15_000_000, (4,), 1)  # without such units
# A GPU on which the kernels of `nested_mlp_triton.py` are not used. To sort, the host waits for the routes and then makes a dozen calls:
# 0.3 ms, in which an H100 multiplies so much (bfloat16) that only some thousand tokens are worth it.
ON_DEVICE = Costs(8_000_000_000, 50_000_000_000, (), 16)
FEW = 16  # tokens that are routed and counted on the host: each call costs as much as a token or two
SILU = (nn.SiLU, type(ACT2FN["silu"]))  # activations that torch can compute in place


class Projections(NamedTuple):
    """Weights of one MLP, down(act(gate(x)) * up(x)), or down(act(up(x))) where `gate` is None. Views, never copies."""

    gate: torch.Tensor | None  # (H, D)
    gate_bias: torch.Tensor | None  # (H,)
    up: torch.Tensor  # (H, D)
    up_bias: torch.Tensor | None  # (H,)
    down: torch.Tensor  # (D, H)
    down_bias: torch.Tensor | None  # (D,)
    act: Callable[[torch.Tensor], torch.Tensor]

    def block(self, low, high):
        """Neurons `low` to `high` alone."""
        rows = (None if tensor is None else tensor[low:high] for tensor in self[:4])
        return Projections(*rows, self.down[:, low:high], self.down_bias, self.act)

    def hidden(self, x_TD):
        """Activations, the input of the down projection: (T, D) -> (T, H)."""
        up = F.linear(x_TD, self.up, self.up_bias)
        return self.gated(up, None if self.gate is None else F.linear(x_TD, self.gate, self.gate_bias))

    def gated(self, up, gate):
        """Activations from what the projections give; (T, H) each, `gate` None where there is none. May write over both."""
        if gate is None:
            return self.act(up)
        if torch.is_grad_enabled():
            return self.act(gate) * up
        # In place: memory that is not asked for costs no page faults, and is in the cache already.
        gate = F.silu(gate, inplace=True) if type(self.act) in SILU else self.act(gate)
        return gate.mul_(up)


class Prefixes(list):
    """
    The `Projections` of each expert; and of blocks between two widths, each made when it is first asked for: four blocks' slices
    take as long as two sorts, 1% of 64 tokens in an MLP of SmolLM2's size.
    """

    def __init__(self, whole, widths):
        super().__init__(whole.block(0, width) for width in widths)
        self.blocks = {}

    def block(self, low, high):
        """Neurons `low` to `high` alone."""
        block = self.blocks.get((low, high))
        if block is None:
            block = self.blocks[low, high] = self[-1].block(low, high)
        return block


def dense_mlp(x_TD, weights):
    """All neurons of `weights` for every token: (T, D) -> (T, D)."""
    return F.linear(weights.hidden(x_TD), weights.down, weights.down_bias)


def routed_mlp(x_TD, expert_T, prefixes):
    """
    Each token through its own prefix: (T, D), (T,) int -> (T, D). `prefixes` are the `Projections` of each expert.

    One token needs a slice, two may have one each, and few share one product and a mask. More are a staircase: sorted by expert,
    largest first, so that the block of neurons between two widths serves a prefix of the sorted tokens. There are at most E dense
    products, each weight is read at most once, and nothing is padded.
    """
    if len(expert_T) == 1:
        return dense_mlp(x_TD, prefixes[expert_T.item()])
    if x_TD.device.type != "cpu" and x_TD.numel() * prefixes[-1].down.shape[1] < ON_DEVICE.sort:
        return _masked_mlp(x_TD, expert_T, prefixes)
    if len(expert_T) <= FEW:
        return few_mlp(x_TD, expert_T.tolist(), prefixes, expert_T)
    return _staircase_mlp(x_TD, expert_T, prefixes, torch.bincount(expert_T, minlength=len(prefixes)).tolist())


def few_mlp(x_TD, taken, prefixes, expert_T=None):
    """As `routed_mlp`, where the host knows the experts: (T, D), a list of T -> (T, D). `expert_T` is made if it is not given."""
    widest = max(taken)
    if min(taken) == widest:
        return dense_mlp(x_TD, prefixes[widest])
    here = costs(prefixes[widest].down)
    if len(taken) <= here.apart:
        return _apart_mlp(x_TD, [prefixes[expert] for expert in taken])
    if expert_T is None:
        expert_T = torch.tensor(taken, device=x_TD.device)
    if x_TD.numel() * prefixes[widest].down.shape[1] < here.sort:
        return _masked_mlp(x_TD, expert_T, prefixes[: widest + 1])
    return _staircase_mlp(x_TD, expert_T, prefixes, [taken.count(expert) for expert in range(len(prefixes))])


def _apart_mlp(x_TD, own):
    """
    As `routed_mlp`, a row at a time: (T, D), the prefix of each of the T -> (T, D). Projection by projection, so that the next row
    finds in the processor's cache what the one before has read.
    """
    rows = list(zip(x_TD.split(1), own))
    ups = [F.linear(x, prefix.up, prefix.up_bias) for x, prefix in rows]
    gates = [None if prefix.gate is None else F.linear(x, prefix.gate, prefix.gate_bias) for x, prefix in rows]
    hidden = [prefix.gated(up, gate) for prefix, up, gate in zip(own, ups, gates)]
    return torch.cat([F.linear(row, prefix.down, prefix.down_bias) for prefix, row in zip(own, hidden)])


def _staircase_mlp(x_TD, expert_T, prefixes, counts):
    """As `routed_mlp`, in blocks. `counts` are the tokens of each expert."""
    widest = max(expert for expert, count in enumerate(counts) if count)
    if counts[widest] == len(expert_T):
        return dense_mlp(x_TD, prefixes[widest])
    stairs = _stairs(counts, prefixes)
    if len(stairs) == 1:
        return _masked_mlp(x_TD, expert_T, prefixes[: widest + 1])
    order_T = torch.argsort(expert_T, descending=True, stable=True)
    x_TD, weights, y_TD = x_TD.index_select(0, order_T), prefixes[-1], None
    for rows, low, high, stops in stairs:
        block = prefixes.block(low, high)
        hidden = block.hidden(x_TD[:rows])
        if stops and hidden.requires_grad:
            hidden = hidden.clone()  # some activations, such as relu, need their own output in backward
        for row, stop in stops:
            hidden[row:, stop - low :] = 0
        if y_TD is None:  # written, not added to: a pass over memory less
            y_TD = F.linear(hidden, block.down, weights.down_bias)
            if rows < len(order_T):  # with a null expert: the tokens that stop before the first neuron
                rest = y_TD.new_zeros(len(order_T) - rows, y_TD.shape[1])
                y_TD = torch.cat([y_TD, rest if weights.down_bias is None else rest + weights.down_bias])
        elif type(block.down) is torch.Tensor and block.down.dtype == hidden.dtype:
            y_TD[:rows].addmm_(hidden, block.down.t())
        else:  # the tensors of quantisers know `linear` and little else, and autocast knows no product in place
            y_TD[:rows] += F.linear(hidden, block.down)
    return y_TD.index_select(0, order_T.argsort())  # to gather takes a quarter of what it takes to scatter (`index_copy_`)


def _stairs(counts, prefixes):
    """
    The blocks worth a product of their own: how many of the sorted tokens it serves, its neurons from and to, and where tokens
    stop inside it, as (first row that has stopped, neuron). `counts` are the tokens of each expert.
    """
    tokens = rows = going_on = sum(counts)
    hidden_size, low, stops, stairs = prefixes[-1].up.shape[1], 0, [], []
    here = costs(prefixes[-1].down)
    for count, prefix in zip(counts, prefixes):
        if count == 0:  # nobody stops at this width, so the next block takes its neurons along
            continue
        high = prefix.down.shape[1]
        going_on -= count
        following = min(tokens, next((step for step in here.steps if going_on <= step), going_on))
        if going_on and (rows - following) * (high - low) * hidden_size < here.block:
            stops.append((going_on, high))
            continue
        if high > low:
            stairs.append((rows, low, high, stops))
        # Who runs along into the next block has stopped at its first neuron.
        low, rows, stops = high, following, [(going_on, high)] if following > going_on else []
    return stairs


def costs(weight):
    """The `Costs` where `weight` is, of products with it."""
    if weight.device.type != "cpu":
        return ON_DEVICE
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    if dtype == torch.bfloat16:
        return IN_MATRIX_UNITS if has_matrix_units() else IN_BFLOAT16
    if has_matrix_units():
        return ON_INTEL
    return ON_CPU if torch.get_num_threads() == 1 else IN_THREADS


@cache
def has_matrix_units():
    """Whether the processor multiplies bfloat16 in units of its own (AMX)."""
    return getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)  # older torch does not say


def _masked_mlp(x_TD, expert_T, prefixes):
    """As `routed_mlp` in one product of the last prefix, for few tokens: sorting them would cost more than it saves."""
    tokens, rows = len(x_TD), costs(prefixes[-1].down).whole
    if rows // 2 < tokens < rows:
        x_TD, expert_T = F.pad(x_TD, (0, 0, 0, rows - tokens)), F.pad(expert_T, (0, rows - tokens))
    widths, hidden = tuple(prefix.down.shape[1] for prefix in prefixes), prefixes[-1].hidden(x_TD)
    own = _own(widths, hidden.element_size(), x_TD.device).index_select(0, expert_T)
    if torch.is_grad_enabled():
        hidden = hidden.masked_fill(own == 0, 0)
    else:  # the trap: a product with zero would leave what is infinite; and to fill by a mask goes number by number
        hidden.view(own.dtype).bitwise_and_(own)
    y_TD = F.linear(hidden, prefixes[-1].down, prefixes[-1].down_bias)
    return y_TD if len(y_TD) == tokens else y_TD[:tokens]


@lru_cache(maxsize=64)
def _own(widths, size, device):
    """
    Which neurons each expert has: (E, H) integers of `size` bytes, all bits set or none. The same for all layers of a model, so it
    stays in the processor's cache.
    """
    own = torch.arange(widths[-1], device=device) < torch.tensor(widths, device=device)[:, None]
    return -own.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[size])


@torch.compiler.assume_constant_result
def reads_numbers():
    """Whether the graph in the making may hold a number read from a tensor, as with `fullgraph=True`; elsewhere it would break there."""
    context = torch._guards.TracingContext.try_get()
    return context is not None and context.fake_mode is not None and context.fake_mode.shape_env.allow_scalar_outputs


def sliced_mlp(x_TD, expert_T, weights, widths):
    """One token, for compilers that `reads_numbers`: products of a size known when they run. (1, D), (1,) int -> (1, D)."""
    width = torch.tensor(widths, device=x_TD.device).index_select(0, expert_T).item()
    torch._check(width >= widths[0])
    torch._check(width <= widths[-1])
    return dense_mlp(x_TD, weights.block(0, width))


@torch.library.custom_op("dynamoe::routed_mlp", mutates_args=())
def routed_mlp_op(
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
    """`routed_mlp` as one node of a compiled graph: what it computes depends on numbers that a compiler does not have."""
    weights = Projections(gate, gate_bias, up, up_bias, down, down_bias, _activation(act))
    if len(expert_T) == 1:  # once a layer in decoding: no more slices than this one needs
        y_TD = dense_mlp(x_TD, weights.block(0, widths[expert_T.item()]))
    else:
        y_TD = routed_mlp(x_TD, expert_T, Prefixes(weights, widths))
    return y_TD.to(x_TD.dtype)  # autocast gives products a lower one, which the graph does not know


@routed_mlp_op.register_fake
def _(x_TD, expert_T, gate, gate_bias, up, up_bias, down, down_bias, act, widths):
    return torch.empty_like(x_TD)


@cache
def _activation(name):
    return ACT2FN[name]


def similarity_profile(output_TD, tail_ETD, similarity, error_weight=None, widths=None):
    """
    How close each expert's output comes to the full one: (T, D), (E-1, T, D) -> (T, E), float32, rising, last column 1.

    `tail_ETD[e]` is O - O_e, what expert e leaves out; all similarities follow from it, with <O_e, O> = <O, O> -
    <O - O_e, O>. Each column is the largest so far: the smallest expert whose similarity reaches a threshold
    is the same, and a rising profile is one that a router can predict.
    """
    output_TD, tail_ETD = output_TD.float(), tail_ETD.float()
    energy_T = output_TD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    if similarity == "loss_weighted":
        profile_ET = 1 / (1 + error_weight * tail_ETD.square().sum(-1))
    elif similarity == "loss_gain":
        profile_ET = 1 / (1 + error_weight * best_gain(tail_ETD.square().sum(-1), widths))
    elif similarity == "relative_error":
        profile_ET = 1 - (tail_ETD.square().sum(-1) / energy_T).sqrt()
    else:
        inner_ET = energy_T - (tail_ETD * output_TD).sum(-1)
        if similarity == "cosine":
            # What is left of a null expert's O - (O - O_e) is rounding, and has no direction.
            norm_ET = (output_TD - tail_ETD).square().sum(-1)
            norm_ET = norm_ET.masked_fill(norm_ET < 1e-10 * energy_T, torch.inf)
            profile_ET = inner_ET / (norm_ET * energy_T).sqrt()
        else:
            profile_ET = inner_ET / energy_T
    profile_ET = profile_ET.clamp(max=1).cummax(0).values
    return torch.cat([profile_ET, torch.ones_like(energy_T)[None]]).t()


def best_gain(error_ET, widths):
    """
    What the best wider expert takes off the error, for each unit of width it adds: (E-1, T) errors of all but the last, whose
    error is none, and E widths of any unit -> (E-1, T), per full width.

    The smallest expert that no wider one beats by more than lambda a width is the one with the least error + lambda * width,
    so a threshold on this minimises the sum of errors at a mean width (the lower convex hull of the points (width, error)).
    """
    error_ET, full = F.pad(error_ET, (0, 0, 0, 1)), widths[-1]
    gains = [error_ET[:0]]
    for index, width in enumerate(widths[:-1]):
        added = torch.tensor([(other - width) / full for other in widths[index + 1 :]], device=error_ET.device)
        gains.append(((error_ET[index] - error_ET[index + 1 :]) / added[:, None]).max(0, keepdim=True).values)
    return torch.cat(gains).clamp_min(0)


def label_of(profile_TE, sensitivity):
    """min { e : s_e >= theta }: (T, E), a number or (T,) -> (T,) int64."""
    if isinstance(sensitivity, torch.Tensor):
        sensitivity = sensitivity[:, None]
    return (profile_TE[:, :-1] < sensitivity).sum(-1)  # the profile rises, so this counts the experts that fall short
