# SPDX-License-Identifier: Apache-2.0
"""
All that is known about the dense base: where a family keeps its MLPs, how it lays them out, and how to subclass its model.

To add a family whose MLPs have other names: one entry in `LAYOUTS`. To add one that keeps them elsewhere: `mlp_places`. Two kinds of
families do not have MLPs of `nn.Linear` layers: GPT-2 holds its weights as (in, out), in `Conv1D`, and layers like OPT's have their
projections and no module around them.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D


EXAMPLES = "for example llama, mistral, qwen3, gemma2 or phi3"


class Projections(NamedTuple):
    """
    Weights of one MLP, down(act(gate(x)) * up(x)), or down(act(up(x))) where `gate` is None. Views, never copies.

    Shapes: T tokens, D hidden size, H neurons.
    """

    gate: torch.Tensor | None  # (H, D)
    gate_bias: torch.Tensor | None  # (H,)
    up: torch.Tensor  # (H, D)
    up_bias: torch.Tensor | None  # (H,)
    down: torch.Tensor  # (D, H)
    down_bias: torch.Tensor | None  # (D,)
    act: Callable[[torch.Tensor], torch.Tensor]

    def block(self, low: int, high: int) -> "Projections":
        """Neurons `low` to `high` alone."""
        gate, gate_bias, up, up_bias, down, down_bias, act = self
        return Projections(
            None if gate is None else gate[low:high],
            None if gate_bias is None else gate_bias[low:high],
            up[low:high],
            None if up_bias is None else up_bias[low:high],
            down[:, low:high],
            down_bias,
            act,
        )

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Activations, what the down projection reads: (..., D) -> (..., H)."""
        up = nn.functional.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return self.act(up)
        return self.act(nn.functional.linear(x, self.gate, self.gate_bias)) * up

    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) -> (..., D)."""
        return nn.functional.linear(hidden, self.down, self.down_bias)


class Layout(NamedTuple):
    """
    Names of the parts of a dense MLP. `gate` is None where there is no gate, or where `up` holds both, gate first; `act` where the
    activation function is SiLU and has no name. `transposed`: the base holds its weights in `Conv1D`; a nested MLP has `nn.Linear`.
    """

    gate: str | None
    up: str
    down: str
    act: str | None
    fused: bool = False
    transposed: bool = False

    @property
    def projections(self) -> list[str]:
        """Names of the linear layers: gate (if there is one), up, down."""
        return [name for name in self[:3] if name is not None]

    def width(self, mlp: nn.Module) -> int:
        """Neurons of `mlp`."""
        return weight_sizes(getattr(mlp, self.down))[1]

    @property
    def ungated(self) -> bool:
        """Whether one projection alone reads the input."""
        return self.gate is None and not self.fused

    def activation(self, mlp: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """The activation function of `mlp`."""
        return nn.functional.silu if self.act is None else getattr(mlp, self.act)

    def hidden(self, mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Activations of all neurons, through the modules of `mlp`: (..., D) -> (..., H)."""
        activation, up = self.activation(mlp), getattr(mlp, self.up)(x)
        if self.fused:
            gate, up = up.chunk(2, dim=-1)
            return up * activation(gate)
        if self.gate is None:
            return activation(up)
        return activation(getattr(mlp, self.gate)(x)) * up

    def tensors(self, mlp: nn.Module) -> Projections:
        """The weights of `mlp`, whose linear layers must be plain ones or slice like them."""
        # Once a layer in decoding. Looking a parameter up as an attribute takes ten times as long as in its dictionary.
        modules: dict[str, Any] = mlp._modules
        up, down, act = modules[self.up]._parameters, modules[self.down]._parameters, self.activation(mlp)
        weight, bias = up["weight"], up.get("bias")
        if self.fused:
            width = down["weight"].shape[1]
            gate_bias, bias = (None, None) if bias is None else (bias[:width], bias[width:])
            return Projections(weight[:width], gate_bias, weight[width:], bias, down["weight"], down.get("bias"), act)
        gate = {} if self.gate is None else modules[self.gate]._parameters
        return Projections(gate.get("weight"), gate.get("bias"), weight, bias, down["weight"], down.get("bias"), act)

    @torch.no_grad()
    def reorder(self, mlp: nn.Module, order: torch.Tensor) -> None:
        """Permute the neurons of `mlp` in place: rows of gate and up and their biases, columns of down."""
        down = getattr(mlp, self.down)
        for name in self.projections[:-1]:
            linear = getattr(mlp, name)
            rows = torch.cat([order, order + down.in_features]) if self.fused else order
            linear.weight.copy_(linear.weight[rows])
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[rows])
        down.weight.copy_(down.weight[:, order])

    def narrow(self, name: str, tensor: torch.Tensor, neurons: int) -> torch.Tensor:
        """The first `neurons` of one tensor of an MLP, named as in its state dict, such as `up_proj.weight`, as the base holds it."""
        projection, _, kind = name.rpartition(".")
        if projection == self.down:
            tensor = tensor[:, :neurons] if kind == "weight" else tensor
        elif self.fused:
            tensor = torch.cat([half[:neurons] for half in tensor.chunk(2)])
        else:
            tensor = tensor[:neurons]
        return (tensor.t() if self.transposed and kind == "weight" else tensor).contiguous()


LAYOUTS = (
    Layout("w1", "w3", "w2", None),  # lfm2
    Layout("gate_proj", "up_proj", "down_proj", "act_fn"),
    Layout(None, "gate_up_proj", "down_proj", "activation_fn", fused=True),
    Layout(None, "input_linear", "output_linear", "activation", fused=True),  # granitemoehybrid
    Layout(None, "c_fc", "c_proj", "act"),
    Layout(None, "up_proj", "down_proj", "act_fn"),
    Layout(None, "fc1", "fc2", "activation_fn"),
    Layout(None, "dense_h_to_4h", "dense_4h_to_h", "act"),
    Layout(None, "fc_in", "fc_out", "act"),  # gptj, codegen
)
PROJECTIONS = sorted({name for layout in LAYOUTS for name in layout.projections})


def weight_sizes(linear: Any) -> tuple[int, int]:
    """(out, in) of a linear layer or a `Conv1D`."""
    return (linear.nf, linear.nx) if isinstance(linear, Conv1D) else (linear.out_features, linear.in_features)


def weight_of(linear: Any) -> torch.Tensor:
    """The weight of a linear layer or a `Conv1D`, a view: (out, in)."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def as_linear(module: nn.Module) -> nn.Module:
    """The `nn.Linear` that computes what a `Conv1D` does, its weight copied; other modules as they are."""
    if not isinstance(module, Conv1D):
        return module
    out, into = weight_sizes(module)
    linear = nn.Linear(into, out, device="meta")
    linear.weight = nn.Parameter(weight_of(module).detach().contiguous(), module.weight.requires_grad)
    linear.bias = module.bias
    return linear


def layout_of(mlp: nn.Module, name: str = "mlp") -> Layout:
    """The `Layout` of a dense MLP. Raises `ValueError`, naming the module, for anything that is not one of `LAYOUTS`."""
    linears = {child for child, module in mlp.named_children() if isinstance(module, nn.Linear | Conv1D)}
    others = {child for child, module in mlp.named_children() if any(True for _ in module.parameters())} - linears
    modules = {child for child, _ in mlp.named_children()}
    for layout in LAYOUTS:
        activates = modules == linears if layout.act is None else hasattr(mlp, layout.act) and others <= {layout.act}
        if linears == set(layout.projections) and activates:
            up, down = getattr(mlp, layout.up), getattr(mlp, layout.down)
            if weight_sizes(up)[0] == weight_sizes(down)[1] * (2 if layout.fused else 1):
                return layout._replace(transposed=isinstance(up, Conv1D))
    supported = "; ".join(", ".join(layout.projections) for layout in LAYOUTS)
    raise ValueError(
        f"`{name}` cannot be split into nested experts: found {type(mlp).__name__} with "
        f"{', '.join(sorted(linears | others)) or 'no linear layers'}. Supported are dense MLPs made of: {supported}. "
        "A model that puts a norm inside its MLP stays as it is."
    )


def can_be_split(mlp: nn.Module | None) -> bool:
    """Whether there is an MLP, and `layout_of` knows it."""
    try:
        return mlp is not None and bool(layout_of(mlp))
    except ValueError:
        return False


class MLPPlace(NamedTuple):
    """
    Where one MLP sits: `getattr(owner, attribute)`, called `name` in the model's state dict. Where a layer has its projections and no
    module around them, the nested MLP takes the place of the first, and `others` become identities.
    """

    owner: nn.Module
    attribute: str
    name: str
    others: tuple[str, ...] = ()

    @property
    def is_shared(self) -> bool:
        """Whether it is the shared expert of a mixture."""
        return self.attribute in SHARED_NAMES

    @property
    def mlp(self) -> Any:
        """The MLP: dense, of a flat layer its parts in a module of their own, or nested."""
        found: Any = getattr(self.owner, self.attribute)
        if not self.others or not isinstance(found, nn.Linear):
            return found
        return nn.ModuleDict({name: getattr(self.owner, name) for name in (self.attribute, *self.others)})

    @property
    def base_name(self) -> str:
        """What the base calls the module that holds the MLP's parts."""
        return self.name.removesuffix(f".{self.attribute}") if self.others else self.name

    def put(self, nested: nn.Module) -> None:
        """Let `nested` take the place of the MLP, whose parts it has adopted."""
        setattr(self.owner, self.attribute, nested)
        for name in self.others:
            setattr(self.owner, name, nn.Identity())


# What decoder layers call their MLP. Where it is a mixture, its routed experts are `experts`.
MLP_NAMES = ("mlp", "feed_forward", "shared_mlp", "block_sparse_moe")
# What decoder layers without a module for their MLP call its parts, in their order: up, activation function, down.
FLAT = ("fc1", "activation_fn", "fc2")
# What mixtures call the expert that every token reads.
SHARED_NAMES = ("shared_expert", "shared_experts")
# Families that look like supported ones, and why they are not.
REFUSED = {
    "llama4_text": "it multiplies a token by the weight of an expert before the expert reads it, and runs every expert on every token"
}


def outside_mlps(plan: dict[str, str] | None) -> dict[str, str] | None:
    """A plan of tensor parallelism without the MLPs, of which each rank would cut another prefix: they are copied."""
    own = {*MLP_NAMES, FLAT[0]}
    return plan and {key: style for key, style in plan.items() if own.isdisjoint(key.split("."))}


def decoder_of(backbone: Any) -> Any:
    """The module of a backbone that runs its layers: `backbone` itself, or (OPT) its `decoder`, which heads call directly."""
    return backbone._modules.get("decoder", backbone)


def decoder_layers(backbone: Any) -> Any:
    """The decoder layers of a backbone, a `ModuleList`, or `None` where it has none that are known."""
    modules = decoder_of(backbone)._modules
    return modules.get("layers", modules.get("h"))


def mlp_name(layer: nn.Module) -> str | None:
    """What a decoder layer calls its MLP, or `None` where it is called something else."""
    name = next((name for name in MLP_NAMES if layer._modules.get(name) is not None), None)
    return FLAT[0] if name is None and layer._modules.keys() >= {*FLAT} else name


def shared_layers(backbone: Any) -> list[int]:
    """The layers of a dense backbone whose MLP is a mixture with a shared expert that can be split; of a nested one, those where it is."""
    if (nested := getattr(backbone.config, "nested_shared", None)) is not None:
        return nested
    mlps = [getattr(layer, mlp_name(layer) or "", None) for layer in decoder_layers(backbone)]
    return [index for index, mlp in enumerate(mlps) if can_be_split(getattr(mlp, shared_name(mlp) or "", None))]


def shared_name(mlp: Any) -> str | None:
    """What a mixture calls its shared expert, or `None` where it has none, or is none."""
    return next((name for name in SHARED_NAMES if hasattr(mlp, "experts") and mlp._modules.get(name) is not None), None)


def mlp_places(backbone: Any, shared_in: list[int] | None = None) -> Iterator[MLPPlace]:
    """
    The MLPs of a backbone (`LlamaModel` and the like), in the order of its layers, one a layer, of a mixture its routed experts. In the
    layers `shared_in`, by default `shared_layers`, the shared expert is a place of its own behind them. Raises `ValueError` where one of
    these has none.
    """
    layers, shared_in = decoder_layers(backbone), shared_layers(backbone) if shared_in is None else shared_in
    path = next(name for name, module in backbone.named_modules() if module is layers)
    for index, layer in enumerate(layers):
        attribute = mlp_name(layer)
        assert attribute is not None, "`check_places` has looked"
        name, mlp = f"{backbone.base_model_prefix}.{path}.{index}.{attribute}", getattr(layer, attribute)
        if hasattr(mlp, "experts"):
            yield MLPPlace(mlp, "experts", f"{name}.experts")
        else:
            yield MLPPlace(layer, attribute, name, FLAT[1:] if attribute == FLAT[0] else ())
        if index in shared_in:
            if (shared := shared_name(mlp)) is None:
                raise ValueError(
                    f"`nested_shared` must name layers that have a shared expert: found layer {index}, with {type(mlp).__name__}. Take "
                    "the config from the folder that holds the weights."
                )
            yield MLPPlace(mlp, shared, f"{name}.{shared}")


@torch.no_grad()
def fold_multipliers(backbone: Any, config: Any) -> None:
    """Let the weights of MLPs hold the constants that a family multiplies them by (falcon_h1), and `config`, the base's, say 1."""
    if getattr(config, "mlp_multipliers", None) in (None, [1.0, 1.0]):
        return
    for place in mlp_places(backbone):
        layout = layout_of(place.mlp, place.name)
        for name, multiplier in zip((layout.gate, layout.down), config.mlp_multipliers):
            for parameter in getattr(place.mlp, str(name)).parameters():
                parameter.mul_(multiplier)
    config.mlp_multipliers = [1.0, 1.0]


# What configs call the width of the MLPs.
WIDTH_NAMES = ("shared_intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "intermediate_size")


def set_mlp_width(config: Any, width: int) -> None:
    """Write the width of all MLPs, in neurons, into the config of a dense model."""
    setattr(config, next((name for name in WIDTH_NAMES if hasattr(config, name)), WIDTH_NAMES[-1]), width)
    if hasattr(config, "block_auto_adjust_ff_dim"):  # lfm2 would round it
        config.block_auto_adjust_ff_dim = False


def check_places(dense: Any) -> None:
    """Raise `ValueError` unless the MLPs of a dense causal language model are where `mlp_places` looks for them."""
    if reason := REFUSED.get(dense.config.model_type):
        raise ValueError(f"The family {dense.config.model_type} is not supported: {reason}. Convert another base, {EXAMPLES}.")
    config, backbone = getattr(dense.config, "base_config", dense.config), dense.base_model
    # The trap: the decoder of an encoder-decoder has layers too, in a wrapper that is not its family's backbone.
    layers = decoder_layers(backbone) if isinstance(backbone, backbone_class_of(config)) else None
    if layers is None or not all(map(mlp_name, layers)):
        raise ValueError(
            f"{type(dense).__name__} cannot be converted: its MLPs are not at `model.layers.*.mlp`, or named alike. "
            f"Supported are decoder families built like Llama, {EXAMPLES}."
        )
    for name in ("activation_dropout", "layerdrop"):
        if getattr(config, name, None):
            raise ValueError(
                f"`{name}` is not supported: found {getattr(config, name)} in the config, and nested experts are trained without it. "
                "Set it to 0 in the config of the base; without training it does nothing."
            )
    if any(None not in (layer._modules.get("shared_mlp"), layer._modules.get("block_sparse_moe")) for layer in layers):
        raise ValueError(
            f"{type(dense).__name__} cannot be converted: found experts (`block_sparse_moe`) beside its MLPs. A layer may hold "
            f"either. Convert another base, {EXAMPLES}."
        )


def dense_class_of(base_config) -> type:
    """The `...ForCausalLM` class of a dense config. Raises `ValueError` for what is not a dense causal language model."""
    return _mapped(MODEL_FOR_CAUSAL_LM_MAPPING, base_config)


def backbone_class_of(base_config) -> type:
    """The backbone class of a dense config, such as `LlamaModel`. Raises `ValueError` as `dense_class_of`."""
    dense_class_of(base_config)
    return _mapped(MODEL_MAPPING, base_config)


def _mapped(mapping, base_config):
    if type(base_config) not in mapping:
        raise ValueError(
            f"{type(base_config).__name__} (model type {base_config.model_type!r}) has no causal language model. "
            f"Give a decoder of a family built like Llama, {EXAMPLES}."
        )
    return mapping[type(base_config)]


@cache
def nested_class(cls: type, base_class: type) -> type:
    """
    `cls` (`DynaMoEModel` or `DynaMoEForCausalLM`) over a base's own class: a subclass of both.

    Everything that is not about experts (attention, caches, heads, soft-caps, plans for devices) is then inherited from
    the base. The flags that say what a model supports are looked up on `cls` first, so the base's are written over them.
    """
    flags = {
        name: getattr(base_class, name)
        for name in dir(base_class)
        if name == "base_model_prefix"
        or (name.startswith("_supports_") or name == "_can_compile_fullgraph")
        and isinstance(getattr(base_class, name), bool)
    }
    # transformers keys what a model can record (`output_hidden_states`) by the class's full name, so bases need their own.
    names = {
        "__module__": cls.__module__,
        "__qualname__": f"{cls.__qualname__}[{base_class.__name__}]",
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls, base_class), {**flags, **names, "base_class": base_class})


def blank_model(cls: type, base_class: type) -> nn.Module:
    """An instance of `nested_class` without contents, for copy and pickle, which cannot find that class by its name."""
    return object.__new__(nested_class(cls, base_class))


def take_over(model: nn.Module, dense: nn.Module) -> None:
    """Let `model`, made by `PreTrainedModel.__init__`, hold the modules and settings of `dense`, which is used up."""
    # Weights are saved under the names that they have here, not under those of the checkpoint that transformers renamed them from.
    own = ("config", "name_or_path", "_weight_conversions")
    model.__dict__.update({name: value for name, value in vars(dense).items() if name not in own})


class AfterBackbone:
    """A causal language model whose backbone has run already, so that the `forward` of the base is its head alone."""

    def __init__(self, causal_lm: Any, hidden_states: torch.Tensor):
        self._causal_lm, self._backbone = causal_lm, _Done(causal_lm.base_model, hidden_states)

    def __getattr__(self, name: str) -> Any:
        return self._backbone if name == self._causal_lm.base_model_prefix else getattr(self._causal_lm, name)


class _Done:
    """A backbone that returns what it has returned before."""

    def __init__(self, backbone: nn.Module, hidden_states: torch.Tensor):
        self._backbone, self._hidden_states = backbone, hidden_states

    def __getattr__(self, name: str) -> Any:
        return self if name == "decoder" else getattr(self._backbone, name)

    def __call__(self, *args, **kwargs) -> MoeModelOutputWithPast:
        outputs = MoeModelOutputWithPast(last_hidden_state=self._hidden_states)
        outputs.__dict__["cross_attentions"] = None  # heads of GPT-2 hand it on
        return outputs
