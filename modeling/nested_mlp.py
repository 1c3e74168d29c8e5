# SPDX-License-Identifier: Apache-2.0
"""
The MLP of one layer as nested experts: decide which expert each token takes, record it if asked to, run the experts.

Shapes: B batch, S sequence, D hidden size, H MLP width, E experts.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .dense_base import Projections, as_linear, layout_of
from .difficulty import label_of, left_out, similarity_profile
from .fast_decode import run_few_tokens
from .mlp_backends import Decision, Weights, block_sizes, run_experts
from .nested_mlp_triton import runs_triton, triton_is_faster
from .onednn_weights import OneDnnMLP
from .packed_weights import PackedMLP, pack_mlp
from .quantized_slices import QuantizedSlices
from .routing import LayerRecord, Routing, RoutingSlot, default_router_dim, has_hooks, plain_parameters
from .sparsity import Thresholds, share_read
from .tensor_parallel import read_by_parts, sum_of_parts


class NestedLayer(nn.Module):
    """What the nested experts of an MLP and those of a mixture share. Experts are E `widths`, and `router` predicts how close each is."""

    layer: int  # among the nested MLPs (`DynaMoEConfig.mlp_names`), of which a layer with a shared expert has two
    slot: RoutingSlot
    widths: list[int]
    router: Any
    layout: Any

    @property
    def shares(self) -> list[float]:
        """Width of each expert as a share of the MLP's."""
        return [width / self.widths[-1] for width in self.widths]

    def choose(self, logits: torch.Tensor, label: Any, routing: Routing) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The experts (B, S, ...) that a route names, from router logits (B, S, ..., outputs) and labels (B, S, ...), and the gates
        (B, S, ..., E) where the routing has a temperature.
        """
        if routing.route == "label":
            return label, None
        if routing.route == "random":
            return self._random(routing.histogram, logits.shape[:-1], logits.device), None
        if routing.temperature is None:
            return self.router.choose(logits, routing.sensitivity), None
        gates = self.router.gates(logits, routing.sensitivity, routing.temperature)
        return gates.detach().round().long().sum(-1) - 1, gates

    def width_of(self, gates: torch.Tensor | None) -> torch.Tensor | None:
        """Share of the width that gates (..., E) let through, with their gradient: (...)."""
        if gates is None:
            return None
        parts = zip(gates.unbind(-1), block_sizes(self.widths))
        return torch.stack([gate * (size / self.widths[-1]) for gate, size in parts]).sum(0)

    def neurons_of(self, expert: torch.Tensor) -> torch.Tensor:
        """Neurons of each expert, on its device."""
        taken = torch.zeros_like(expert)
        for index, size in enumerate(block_sizes(self.widths)):
            taken += (expert >= index) * size
        return taken

    def _random(self, histogram, shape, device):
        if histogram is None:
            return torch.randint(len(self.widths), shape, device=device)
        frequency = histogram[self.layer].to(device)
        return torch.multinomial(frequency, shape.numel(), replacement=True).view(shape)


class NestedMLP(NestedLayer):
    """
    The dense MLP of one layer as E nested experts: (B, S, D) -> (B, S, D). Adopts the dense MLP's modules under their own
    names, so its checkpoint is the dense one plus `router.*`. `Conv1D` becomes `nn.Linear`, its weight transposed.
    """

    def __init__(self, dense: nn.Module, config, layer: int, slot: RoutingSlot, name: str = "mlp"):
        super().__init__()
        self.layout = layout_of(dense, name)
        self.dropout = getattr(dense, "residual_dropout", 0.0)  # starcoder2
        for child, module in dense.named_children():
            if isinstance(module, nn.Dropout):  # gpt2
                self.dropout = module.p
            else:
                self.add_module(child, as_linear(module))
        if self.layout.act is not None and not isinstance(getattr(dense, self.layout.act), nn.Module):
            setattr(self, self.layout.act, getattr(dense, self.layout.act))
        # A compiled graph cannot hold the activation module, but its name.
        named = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation", "activation_function"))
        self.act_name = "silu" if self.layout.act is None else next(filter(None, named), None)
        self.config, self.layer, self.slot = config, layer, slot
        self.quantized_slices = QuantizedSlices()
        self.packed: PackedMLP | OneDnnMLP | None = None
        self.mesh: Any = None  # the processes that this MLP is divided over
        self.meter: nn.Module | None = None  # is told what every pass decides: (x, expert, thresholds)
        width = self.down_linear.in_features
        self.widths = config.layer_widths(layer, width)
        router_dim = config.router_dim or default_router_dim(width)
        self.router = config.router_class(self.down_linear.out_features, router_dim, len(self.widths))

    @property
    def up_linear(self) -> Any:
        return getattr(self, self.layout.up)

    @property
    def down_linear(self) -> Any:
        return getattr(self, self.layout.down)

    @property
    def main_weight(self) -> torch.Tensor:
        """A weight, whose device and dtype are the layer's."""
        return self.down_linear.weight

    @property
    def reads(self) -> float:
        """Neurons that a token reads at full width, in all processes."""
        return self.widths[-1] * (1 if self.mesh is None else self.mesh.size())

    def forward(self, x):
        routing = self.slot.of_layer(self.config)
        if x.ndim == 2:  # OPT reads all tokens as one row
            return self.routed(x.view(*(routing.shape or (1, len(x))), -1), routing).flatten(0, 1)
        return self.routed(x, routing)

    def routed(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """As the routing in force asks for it: (B, S, D) -> (B, S, D)."""
        if (y := run_few_tokens(self, x, routing)) is not None:
            return sum_of_parts(y, self.mesh)
        decision = self.decide(x, routing)
        if routing.records is not None:
            routing.records.append(self.record(x, decision))
        if self.meter is not None:
            self.meter(x, decision.expert, decision.thresholds)
        if decision.gates is not None:
            decision = decision._replace(gates=read_by_parts(decision.gates, self.mesh))
        y = run_experts(read_by_parts(x, self.mesh), decision, self.weights(x, decision))
        y = sum_of_parts(y, self.mesh)
        return F.dropout(y, self.dropout, self.training) if self.dropout else y

    def decide(self, x: torch.Tensor, routing: Routing) -> Decision:
        """The expert of each token, and what was computed on the way to it."""
        router, sensitivity, forced = self.router, routing.sensitivity, routing.force_expert
        by_router = forced is None and routing.route == "router"
        if by_router and router.is_off(sensitivity):
            forced = len(self.widths) - 1
        asked = routing.records is not None or routing.needs_labels
        thresholds = None if routing.thresholds is None else routing.thresholds[self.layer]
        if forced is not None and not asked:
            return Decision(forced, thresholds=thresholds)
        if by_router and not asked and routing.temperature is None and not self.training and self._uses_triton(x):
            expert = router.choose_fused(x, sensitivity)
            if expert is not None:
                return Decision(expert, thresholds=thresholds)
        logits = router(x)
        hidden = profile = label = output = None
        labelled = routing.needs_labels or routing.route == "label"
        if labelled or thresholds is not None and routing.records is not None:
            read = read_by_parts(x, self.mesh)
            hidden = self.hidden(read) if thresholds is None else self.sparse_hidden(read, thresholds)
        if labelled:
            assert hidden is not None
            output = None if torch.is_grad_enabled() else self.down_linear(hidden)
            profile = self.profile(hidden.detach(), output)
            label = label_of(profile.flatten(0, 1), self._of_each_token(sensitivity, x)).view(x.shape[:2])
        expert, gates = (forced, None) if forced is not None else self.choose(logits, label, routing)
        return Decision(expert, logits, gates, hidden, profile, label, thresholds, output)

    def record(self, x: torch.Tensor, decision: Decision) -> LayerRecord:
        """What this layer did with its tokens, with the router's loss where the labels are known."""
        expert, logits, gates, hidden, profile, label, thresholds, *_ = decision
        if not isinstance(expert, torch.Tensor):
            expert = torch.full(x.shape[:2], expert, device=x.device)
        loss = None if profile is None else self.router.loss(logits, profile, label)
        taken = self.neurons_of(expert)
        share = taken / self.widths[-1]
        if thresholds is not None:
            assert hidden is not None, "`decide` computes all neurons where records of what is read are wanted"
            share = share_read(thresholds.kept_input(x), hidden, taken, 1 if self.layout.ungated else 2)
            share = sum_of_parts(share, self.mesh) / (1 if self.mesh is None else self.mesh.size())
        assert logits is not None, "`decide` asks the router where records are wanted"
        return LayerRecord(logits, expert, share, profile, label, loss, self.width_of(gates), layer=self.layer)

    def weights(self, x: torch.Tensor, decision: Decision | None = None) -> Weights:
        """This MLP as `run_experts` takes it, for an input like `x`. At full width for all it is called as modules, not cut."""
        expert = None if decision is None else decision.expert
        full_width = not isinstance(expert, torch.Tensor) and expert == len(self.widths) - 1
        full_width = full_width and (decision is None or decision.thresholds is None)
        if self.packed is not None and not torch.is_grad_enabled():
            return Weights(self.hidden, self.down_linear, None, self.widths, self.act_name, self.training, packed=self.packed)
        tensors = None if full_width else self.tensors(x)
        triton = tensors is not None and type(tensors.down) in (torch.Tensor, nn.Parameter) and self._uses_triton(x)
        modules: dict[str, Any] = self._modules
        return Weights(self.hidden, modules[self.layout.down], tensors, self.widths, self.act_name, self.training, triton)

    def tensors(self, x: torch.Tensor) -> Projections | None:
        """
        The weights as plain tensors that can be cut, or `None` where a projection must be called as a module: wrapped (LoRA),
        hooked, offloaded, elsewhere than `x`, or quantised into something that does not slice.
        """
        if self.packed is not None:
            return self.packed.tensors(x.dtype)
        linears: list[Any] = [self._modules[name] for name in self.layout.projections]
        if plain_parameters(linears, x.device) is not None:
            return self.layout.tensors(self)
        # A `forward` of its own may count, calibrate or round, so it is called.
        if all(getattr(type(linear), "forward", None) is nn.Linear.forward and not has_hooks(linear) for linear in linears):
            return self.quantized_slices.tensors(self, self.layout, self.widths, x)
        return None

    def pack(self, kind: str) -> None:
        """Let packed weights (`packed_weights.py`) replace the plain ones, in `"int8"`, `"bfloat16"` or `"onednn"`."""
        self.packed = pack_mlp(self, self.layout, self.widths, kind, self.act_name)

    def _apply(self, *args, **kwargs):
        self.quantized_slices = QuantizedSlices()  # torch swaps the tensors that it moves, and needs to be their only holder
        return super()._apply(*args, **kwargs)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Activations of all neurons, through the modules: (B, S, D) -> (B, S, H)."""
        return self.layout.hidden(self, x)

    def sparse_hidden(self, x: torch.Tensor, thresholds: Thresholds) -> torch.Tensor:
        """As `hidden`, with what is smaller than the thresholds left out, of x and of the activations."""
        return thresholds.kept_hidden(self.hidden(thresholds.kept_input(x)))

    @torch.no_grad()
    def profile(self, hidden: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor:
        """
        Similarity of each expert's output to the full one: (B, S, H) -> (B, S, E), float32. `output`: the full one (B, S, D), if it is
        known already.

        The blocks that each expert adds, summed from the last one down, are what the smaller experts leave out. That takes
        (1 - widths[0] / H) of one extra down product, and gives every similarity exactly.
        """
        plain = self.tensors(hidden) is not None

        def block(low, high):
            if plain:
                return F.linear(hidden[..., low:high], self.down_linear.weight[:, low:high])
            only = torch.zeros_like(hidden)
            only[..., low:high] = hidden[..., low:high]
            return self.down_linear(only) - self.down_linear(torch.zeros_like(hidden[:1, :1]))

        smaller = left_out(self.widths, block)
        output = sum_of_parts(self.down_linear(hidden) if output is None else output, self.mesh).flatten(0, 1)
        left_out_ETD = torch.stack(smaller).flatten(1, 2) if smaller else output.new_zeros(0, *output.shape)
        left_out_ETD = sum_of_parts(left_out_ETD, self.mesh)
        loss_weight = self.config.error_weights[self.layer] if self.config.error_weights else 1.0
        profile = similarity_profile(output, left_out_ETD, self.config.similarity, loss_weight, self.widths)
        return profile.view(*hidden.shape[:2], -1)

    def _uses_triton(self, x):
        name = self.slot.mlp_implementation
        if name == "auto" and (torch.is_grad_enabled() or not triton_is_faster(x)):
            return False
        return name != "torch" and runs_triton(x, self.act_name)

    def _of_each_token(self, sensitivity, x):
        if isinstance(sensitivity, torch.Tensor):
            return sensitivity.to(x.device, torch.float32).view(len(x), -1).expand(x.shape[:2]).flatten()
        return sensitivity
