# SPDX-License-Identifier: Apache-2.0
"""
How the chosen experts are computed. `run_experts` is the only place that picks an execution, from the table `EXECUTIONS`.

To add an execution (a kernel, an engine): one function of a `Call`, one row of the table that says when it is chosen and
why, one case in the tests, which hold every execution to the same plain loop.

Shapes: B batch, S sequence, T = B * S tokens, D hidden size, H MLP width, E experts. Expert e is the first `widths[e]` of the
H neurons.
"""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN
from transformers.utils import logging

from .dense_base import Projections
from .nested_mlp_triton import triton_mlp
from .sparsity import Thresholds, keep_large


logger = logging.get_logger(__name__)


class Costs(NamedTuple):
    """
    Below how many multiplications of one projection it is cheaper to compute neurons that a token does not use, and to clear
    them, than to cut them off. Cutting takes calls, and a call takes as long as many multiplications.
    """

    product: int  # all tokens and neurons together: below, one product and a mask serve all tokens
    block: int  # what one more block of the staircase saves: below, its neurons go along with the next block


# The only constants of machines. Measured on an AMD EPYC and an Intel Xeon (CPU) and an H100 (GPU); docs/results.md.
CPU_COSTS = Costs(15_000_000, 2_500_000)
# bfloat16 on a CPU with matrix units (AMX): products are cheap beside calls.
MATRIX_UNIT_COSTS = Costs(15_000_000, 100_000_000)
# A GPU without the Triton kernels: to cut, the host waits for the routes and then makes a dozen calls, together 0.3 ms.
GPU_COSTS = Costs(50_000_000_000, 8_000_000_000)


def costs_of(weight: torch.Tensor) -> Costs:
    """The `Costs` of products with `weight`, by its device, its dtype (or autocast's) and the processor."""
    if weight.device.type != "cpu":
        return GPU_COSTS
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype
    return MATRIX_UNIT_COSTS if dtype == torch.bfloat16 and has_matrix_units() else CPU_COSTS


@cache
def has_matrix_units() -> bool:
    """Whether the processor multiplies bfloat16 in units of its own (AMX)."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.9 does not say
    return capabilities.get("amx_bf16", False)


class Decision(NamedTuple):
    """What was decided for the tokens of one layer."""

    expert: int | torch.Tensor  # one for all tokens, or (B, S) int64
    router_logits: torch.Tensor | None = None  # (B, S, outputs), where the router was asked
    gates: torch.Tensor | None = None  # (B, S, E) with a gradient, where routers learn from what their choices do
    hidden: torch.Tensor | None = None  # (B, S, H) activations of all neurons, where labels needed them
    profile: torch.Tensor | None = None  # (B, S, E) true similarities, where labels were needed
    label: torch.Tensor | None = None  # (B, S) int64
    thresholds: Thresholds | None = None  # where what is small is left out; `hidden` has it left out already
    output: torch.Tensor | None = None  # (B, S, D) of `hidden`, where labels needed it and no gradient is wanted
    neurons: torch.Tensor | None = None  # (B, S, K, E), of a mixture: how many down reads at each width


class Weights(NamedTuple):
    """The MLP of one layer: through its modules, and as plain tensors where it can be cut."""

    hidden: Callable[[torch.Tensor], torch.Tensor]  # (..., D) -> (..., H), all neurons
    output: Callable[[torch.Tensor], torch.Tensor]  # (..., H) -> (..., D)
    tensors: Projections | None  # `None` where a projection is wrapped, offloaded, hooked, or quantised and does not slice
    widths: list[int]
    activation: str | None = None  # its name in transformers
    training: bool = False
    triton: bool = False  # whether the Triton kernels serve this input
    packed: Any = None  # the `PackedMLP`, where it serves this input

    @classmethod
    def of_tensors(cls, tensors: Projections, widths: list[int]) -> "Weights":
        """Of plain tensors alone."""
        return cls(tensors.hidden, tensors.output, tensors, widths)

    def prefix(self, expert: int) -> Projections:
        """The tensors of one expert, as views."""
        assert self.tensors is not None
        return self.tensors.block(0, self.widths[expert])


class Call:
    """One call of an MLP, as the rows of `EXECUTIONS` see it: x (B, S, D), and what was decided for its tokens."""

    expert: Any  # one for all tokens, or (B, S) int64
    tensors: Any  # the `Projections`; `None` where the MLP cannot be cut

    def __init__(self, x: torch.Tensor, decision: Decision, weights: Weights):
        self.decision, self.weights, self.thresholds, self.given = decision, weights, decision.thresholds, x
        # What the projections read. Not a `cached_property`, whose lock compilers do not trace.
        self.x = x if self.thresholds is None or weights.packed is not None else self.thresholds.kept_input(x)
        self.expert, self.tensors = decision.expert, weights.tensors

    def kept(self, hidden: torch.Tensor, order_T: torch.Tensor | None = None) -> torch.Tensor:
        """Activations (..., H) without those under the threshold. `order_T`: which tokens the rows of `hidden` (T, H) are."""
        if self.thresholds is None:
            return hidden
        threshold = self.thresholds.hidden
        if order_T is not None and isinstance(threshold, torch.Tensor):
            threshold = threshold.expand(*self.x.shape[:2], 1).flatten(0, 1).index_select(0, order_T)
        return keep_large(hidden, threshold, self.thresholds.ramp)

    @property
    def routed(self) -> bool:
        """Whether tokens may take different experts."""
        return isinstance(self.expert, torch.Tensor)

    @property
    def x_TD(self) -> torch.Tensor:
        return self.x.flatten(0, 1)

    @property
    def expert_T(self) -> torch.Tensor:
        return self.expert.flatten()

    @property
    def multiplications(self) -> int:
        """Of all tokens and neurons, in one projection."""
        return self.given.numel() * self.weights.widths[-1]

    @cached_property
    def counts(self) -> list[int]:
        """Tokens of each expert. Reads the routes, so the host waits for the device here."""
        return torch.bincount(self.expert_T, minlength=len(self.weights.widths)).tolist()

    @property
    def single(self) -> int | None:
        """The expert of all tokens, if it is one."""
        return self._single_taken if self.routed else self.expert

    @cached_property
    def _single_taken(self):
        if self.expert.numel() == 1:
            return self.expert.item()
        taken = [expert for expert, count in enumerate(self.counts) if count]
        return taken[0] if len(taken) == 1 else None

    @cached_property
    def blocks(self) -> list["Block"]:
        """The blocks of the staircase."""
        costs = costs_of(self.tensors.down)
        return staircase_blocks(self.counts, self.weights.widths, self.x.shape[-1], costs)


# --- executions: functions of a `Call` -> (B, S, D) ------------------------------------------------------------------------


def run_dense(call: Call) -> torch.Tensor:
    """All neurons for every token, as in the base."""
    output = call.decision.output
    return call.weights.output(_all_hidden(call)) if output is None else output


def run_gated(call: Call) -> torch.Tensor:
    """All neurons, each block times its gate, which carries a gradient to the router."""
    gates, hidden = call.decision.gates, _all_hidden(call)
    assert gates is not None
    blocks = zip(hidden.split(block_sizes(call.weights.widths), -1), gates.to(hidden.dtype).split(1, -1))
    return call.weights.output(torch.cat([block * gate for block, gate in blocks], -1))


def run_masked(call: Call) -> torch.Tensor:
    """All neurons, those beyond each token's expert set to zero."""
    decision, weights = call.decision, call.weights
    if weights.tensors is None and decision.hidden is None and not torch.compiler.is_compiling():  # logging breaks graphs
        logger.warning_once(
            "DynaMoE: the MLP projections are wrapped, hooked, offloaded, or quantised into something that cannot be sliced, so "
            "every neuron is computed and the unused ones are masked: the same numbers, no speed-up. Merged adapters "
            "(`merge_and_unload`) and int8 weights of torchao (`Int8WeightOnlyConfig`) are sliced."
        )
    return call.weights.output(mask_hidden(_all_hidden(call), call.expert, call.weights.widths))


def run_prefix(call: Call) -> torch.Tensor:
    """One expert for all tokens: its prefix."""
    assert call.single is not None
    prefix = call.weights.prefix(call.single)
    return prefix.output(call.kept(prefix.hidden(call.x)))


def run_few(call: Call) -> torch.Tensor:
    """Few tokens: one product of the widest expert among them, and a mask."""
    widest = max(expert for expert, count in enumerate(call.counts) if count)
    prefix, widths = call.weights.prefix(widest), call.weights.widths[: widest + 1]
    return prefix.output(mask_hidden(call.kept(prefix.hidden(call.x)), call.expert, widths))


def run_staircase(call: Call) -> torch.Tensor:
    """
    Many tokens, sorted by expert, widest first, so that the block of neurons between two widths serves the first rows. There
    are at most E dense products, each weight is read at most once, and nothing is padded.
    """
    order_T = torch.argsort(call.expert_T, descending=True, stable=True)
    x_TD = call.x_TD.index_select(0, order_T)
    y_TD = climb(x_TD, call.blocks, call.tensors, lambda hidden: call.kept(hidden, order_T[: len(hidden)]))
    y_TD = with_rows(y_TD, len(order_T), call.tensors.down_bias)
    return y_TD.index_select(0, order_T.argsort()).view(*call.x.shape[:-1], -1)


def run_packed(call: Call) -> torch.Tensor:
    """By packed weights: few tokens read only the rows of what they keep."""
    return call.weights.packed.run(call.given, call.expert, call.weights.widths, call.thresholds)


def run_triton(call: Call) -> torch.Tensor:
    """Each token through its own prefix on a GPU, without waiting for the device. What is left out of it is read, as zeros."""
    weights, (_, threshold, ramp) = call.weights, call.thresholds or Thresholds(0.0, 0.0)
    if isinstance(threshold, torch.Tensor):
        threshold = threshold.expand(*call.x.shape[:2], 1).flatten()
    y_TD = triton_mlp(call.x_TD, call.expert_T, call.tensors, weights.activation, weights.widths, threshold, ramp)
    return y_TD.view_as(call.x)


def run_sliced(call: Call) -> torch.Tensor:
    """One token in a compiled graph: products whose size is known when they run."""
    widths = call.weights.widths
    width: Any = torch.tensor(widths, device=call.x.device).index_select(0, call.expert_T).item()
    torch._check(width >= widths[0])
    torch._check(width <= widths[-1])
    prefix = call.tensors.block(0, width)
    return prefix.output(call.kept(prefix.hidden(call.x)))


def run_operator(call: Call) -> torch.Tensor:
    """Several tokens in a compiled graph: one node, inside of which `run_experts` chooses by the routes."""
    *tensors, _ = call.tensors
    _, threshold, ramp = call.thresholds or Thresholds(0.0, 0.0)
    return routed_mlp_op(call.x, call.expert, *tensors, call.weights.activation, call.weights.widths, threshold, ramp)


# --- when each is chosen ---------------------------------------------------------------------------------------------------


def _all_full(call):
    full = not call.routed and call.expert == len(call.weights.widths) - 1
    return full and call.decision.gates is None and call.thresholds is None


def _packed(call):
    return call.weights.packed is not None and call.decision.hidden is None and call.decision.gates is None


def _all_neurons_needed(call):
    return call.decision.hidden is not None or call.weights.tensors is None or call.weights.training and call.routed


def _on_triton(call):
    sparse = call.thresholds is not None
    # The kernels' gradient knows no thresholds.
    return call.routed and call.weights.triton and not (sparse and torch.is_grad_enabled())


def _single_token_compiled(call):
    on_cpu = call.x.device.type == "cpu"
    return call.routed and compiled_for_inference() and on_cpu and call.expert.numel() == 1 and reads_numbers()


def _compiled(call):
    if not (call.routed and compiled_for_inference() and call.x.device.type == "cpu"):
        return False
    of_each = call.thresholds is not None and isinstance(call.thresholds.hidden, torch.Tensor)
    return call.weights.activation is not None and not of_each


def _routes_stay_on_device(call):
    if not call.routed:
        return False
    few = call.x.device.type != "cpu" and call.expert.numel() > 1 and call.multiplications < GPU_COSTS.product
    return torch.compiler.is_compiling() or few


def _few(call):
    return call.multiplications < costs_of(call.tensors.down).product or len(call.blocks) == 1


class Execution(NamedTuple):
    """One row of the table: the first one whose `when` holds is run."""

    name: str
    when: Callable[[Call], bool]
    run: Callable[[Call], torch.Tensor]
    why: str


EXECUTIONS = (
    Execution("packed", _packed, run_packed, "decoding waits for weights from memory, and packed ones are few bytes, of kept rows alone"),
    Execution("dense", _all_full, run_dense, "nothing to leave out: the base's own modules, in its own order"),
    Execution("gated", lambda call: call.decision.gates is not None, run_gated, "gates need a gradient through every block"),
    Execution("masked", _all_neurons_needed, run_masked,
              "labels have computed all neurons; in training reading the routes would wait for the device; or the MLP cannot be cut"),
    Execution("triton", _on_triton, run_triton, "routes never leave the GPU"),
    Execution("sliced", _single_token_compiled, run_sliced, "a compiled graph may hold one number that is read when it runs"),
    Execution("operator", _compiled, run_operator, "what is computed depends on numbers that a compiler does not have"),
    Execution("masked", _routes_stay_on_device, run_masked, "reading the routes would break the graph, or cost more than it saves"),
    Execution("prefix", lambda call: call.single is not None, run_prefix, "one width for all: three smaller products"),
    Execution("few", _few, run_few, "sorting and several products would take longer than the neurons they save"),
    Execution("staircase", lambda call: True, run_staircase, "each block of neurons for just the tokens that use it"),
)  # fmt: skip


def choose_execution(call: Call) -> Execution:
    """The first row of `EXECUTIONS` that fits the call."""
    return next(execution for execution in EXECUTIONS if execution.when(call))


def run_experts(x: torch.Tensor, decision: Decision, weights: Weights) -> torch.Tensor:
    """Each token through the expert that was decided for it: (B, S, D) -> (B, S, D)."""
    call = Call(x, decision, weights)
    return choose_execution(call).run(call)


# --- parts -----------------------------------------------------------------------------------------------------------------


def _all_hidden(call):
    return call.kept(call.weights.hidden(call.x)) if call.decision.hidden is None else call.decision.hidden


def block_sizes(widths: list[int]) -> list[int]:
    """Neurons that each expert has more than the one before."""
    return [high - low for low, high in zip([0, *widths], widths)]


def mask_hidden(hidden: torch.Tensor, expert: int | torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Zero the neurons beyond each token's expert: (..., H), (...) or one index for all -> (..., H)."""
    # Filled on the device: a tensor made from a list would make the host wait for the copy. The trap: a product with a mask
    # of zeros would leave what is infinite.
    sizes = enumerate(block_sizes(widths))
    needs = torch.cat([torch.full((size,), index, device=hidden.device) for index, size in sizes])
    return hidden.masked_fill(needs > (expert.unsqueeze(-1) if isinstance(expert, torch.Tensor) else expert), 0)


class Block(NamedTuple):
    """Neurons `low` to `high` for the first `rows` sorted tokens; `stops`: (first row, neuron) from which tokens use none."""

    rows: int
    low: int
    high: int
    stops: list[tuple[int, int]]


def staircase_blocks(counts: list[int], widths: list[int], hidden_size: int, costs: Costs) -> list[Block]:
    """The blocks that are worth a product of their own. `counts` are the tokens of each expert."""
    rows, low = sum(counts), 0
    stops: list[tuple[int, int]] = []
    blocks = []
    going_on = rows
    for count, high in zip(counts, widths):
        if count == 0:  # no token stops at this width, so the next block takes its neurons along
            continue
        going_on -= count
        if going_on and (rows - going_on) * (high - low) * hidden_size < costs.block:
            stops.append((going_on, high))
            continue
        if high > low:
            blocks.append(Block(rows, low, high, stops))
        low, rows, stops = high, going_on, []
    return blocks


def climb(x_TD: torch.Tensor, blocks: list[Block], tensors: Any, kept: Callable = lambda hidden: hidden) -> torch.Tensor:
    """Tokens sorted by expert, widest first, through the blocks of a staircase. Those that use no neuron have no row: (rows, D)."""
    y_TD = x_TD[:0]
    for index, block in enumerate(blocks):
        part = tensors.block(block.low, block.high)
        hidden = kept(part.hidden(x_TD[: block.rows]))
        if block.stops and hidden.requires_grad:
            hidden = hidden.clone()  # some activations, such as relu, need their own output in backward
        for row, neuron in block.stops:
            hidden[row:, neuron - block.low :] = 0
        if index == 0:  # written, not added to: one pass over memory less
            y_TD = F.linear(hidden, part.down, tensors.down_bias)
        elif type(part.down) is torch.Tensor and part.down.dtype == hidden.dtype:
            y_TD[: block.rows].addmm_(hidden, part.down.t())
        else:  # quantised tensors know `linear` and little else, and autocast has no product in place
            y_TD[: block.rows] += F.linear(hidden, part.down)
    return y_TD


def with_rows(y_TD: torch.Tensor, tokens: int, bias: torch.Tensor | None) -> torch.Tensor:
    """With a null expert, the last tokens stop before the first neuron: their output is the bias, or 0."""
    if len(y_TD) == tokens:
        return y_TD
    rest = y_TD.new_zeros(tokens - len(y_TD), y_TD.shape[1])
    return torch.cat([y_TD, rest if bias is None else rest + bias])


def compiled_for_inference() -> bool:
    """Whether a compiler is tracing a pass without gradients, which the operator does not have."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


@torch.compiler.assume_constant_result
def reads_numbers() -> bool:
    """Whether the graph in the making may hold a number read from a tensor, as with `fullgraph=True`; else it would break."""
    context: Any = torch._guards.TracingContext.try_get()
    return context is not None and context.fake_mode is not None and context.fake_mode.shape_env.allow_scalar_outputs


@torch.library.custom_op("dynamoe::routed_mlp", mutates_args=())
def routed_mlp_op(
    x: torch.Tensor,
    expert: torch.Tensor,
    gate: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    up: torch.Tensor,
    up_bias: torch.Tensor | None,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    activation: str,
    widths: list[int],
    threshold: float = 0.0,
    ramp: float = 0.0,
) -> torch.Tensor:
    """
    `run_experts` of plain tensors as one node of a compiled graph: (B, S, D), (B, S) -> (B, S, D). `threshold` and `ramp` are those of
    the activations; what x leaves out is zero already.
    """
    tensors = Projections(gate, gate_bias, up, up_bias, down, down_bias, activation_of(activation))
    thresholds = Thresholds(0.0, threshold, ramp) if threshold else None
    y = run_experts(x, Decision(expert, thresholds=thresholds), Weights.of_tensors(tensors, widths))
    return y.to(x.dtype)  # autocast gives products a lower dtype, which the graph does not know


@routed_mlp_op.register_fake
def _(x, *inputs):
    return torch.empty_like(x)


@cache
def activation_of(name: str) -> torch.nn.Module:
    """The activation function that transformers calls `name`."""
    return ACT2FN[name]
