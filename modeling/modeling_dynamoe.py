# SPDX-License-Identifier: Apache-2.0
"""
DynaMoE: a dense causal language model whose MLPs are nested experts, chosen token by token.

- A model is a subclass of its base's own class, so attention, RoPE variants, caches, soft-caps and heads are the base's.
- Each `layer.mlp` becomes a `NestedMLP` that keeps the dense parameter names (but GPT-2's, OPT's); only `mlp.router.*` is added.
- Expert e is the first `widths[e]` neurons of the MLP; the last expert is the dense MLP.
- Where the MLP is a mixture, each of its routed experts is nested, and its shared expert as an MLP of its own; its router stays.
- The router predicts how close each expert comes to the full MLP, and the token takes the smallest that is close enough.

A forward pass: resolve the routing once -> the base's `forward`, whose layers read it -> outputs and losses.

Shapes: B batch, S sequence, D hidden size, V vocabulary, E experts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .checks import (
    DIALS,
    check_adapters,
    check_can_be_read,
    check_expert,
    check_labels_arrive,
    check_model_type,
    check_one_of,
    check_sensitivity,
    checked_dial,
    checked_request,
    each_of,
)
from .configuration_dynamoe import DynaMoEConfig
from .dense_base import (
    AfterBackbone,
    backbone_class_of,
    blank_model,
    check_places,
    dense_class_of,
    fold_multipliers,
    mlp_places,
    nested_class,
    shared_layers,
    take_over,
)
from .engine_layers import prepare_for_engine
from .moe_base import check_mixture, is_mixture, layout_at
from .nested_mlp import NestedLayer, NestedMLP
from .nested_mlp_triton import TRITON
from .nested_moe import nest_experts
from .outputs import DynaMoECausalLMOutputWithPast, DynaMoEModelOutputWithPast, experts_of
from .packed_weights import pack_model
from .request_dials import RequestDials
from .routing import ROUTES, Routing, RoutingSlot, TokenRouter, checkpoint_with_routing, loss_mask, mean_router_loss
from .self_draft import SelfDraftGenerationMixin
from .tensor_parallel import plan_with_mlps


MLP_IMPLEMENTATIONS = ("auto", "torch", "triton")


class DynaMoEPreTrainedModel(PreTrainedModel):
    """What the backbone and the model with a head share: the dial, the routing of a pass, and the routers' initialisation."""

    config_class = DynaMoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    model_tags = ["dynamoe", "dynamic-moe", "conditional-computation"]
    # Routers stay float32, and quantisers skip them. The trap: names match from their start; mixtures have a `router` of their own.
    _keep_in_fp32_modules: Any = [r".*router\.(input|output)"]
    # What engines ask of the class, before there is a model. The class of a model has the flags of its base.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    base_class: ClassVar[Any] = None  # the base's own class, in the subclasses of `nested_class`
    slot: RoutingSlot

    @staticmethod
    def base_class_of(base_config) -> type:
        """The class of the base's own model. Raises `ValueError` for what is not a dense causal language model."""
        raise NotImplementedError

    def __new__(cls, config=None, *args, **kwargs):
        if cls.base_class is None and config is not None:  # `DataParallel` makes its replicas without one
            check_model_type(config.model_type)
            cls = nested_class(cls, cls.base_class_of(config.base_config))  # type: ignore[arg-type]  # `cache` of a class
        return super().__new__(cls)

    def __reduce__(self):
        cls, base_class = type(self).__bases__
        return blank_model, (cls, base_class), self.__dict__

    def _adopt(self, config, dense):
        """Hold the parts of `dense`, or of a fresh base."""
        config.check()  # fields may have been set since the config was made
        PreTrainedModel.__init__(self, config)  # not `super()`: the base's own would build a second model
        if dense is None:
            config.base_config._attn_implementation = config._attn_implementation
            dense = self.base_class(config.base_config)
        take_over(self, dense)
        self._keep_in_fp32_modules = {*(self._keep_in_fp32_modules or ()), *DynaMoEPreTrainedModel._keep_in_fp32_modules}
        self._tp_plan = plan_with_mlps(self)

    @property
    def nested_mlps(self) -> list[Any]:
        """The nested MLPs, `NestedMLP` or of a mixture `NestedExperts`, in the order of `DynaMoEConfig.mlp_names`."""
        return sorted((module for module in self.modules() if isinstance(module, NestedLayer)), key=lambda mlp: mlp.layer)

    @property
    def is_mixture(self) -> bool:
        """Whether an MLP is a mixture of experts."""
        return any(map(is_mixture, self.nested_mlps))

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, TokenRouter):
            if not all(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters()):
                module.reset()
        elif not (isinstance(module, torch.nn.Linear) and getattr(module.weight, "_is_hf_initialized", False)):
            super()._init_weights(module)

    # Else transformers would pass by modules without parameters of their own, such as routers, and buffers of some bases.
    is_custom_code: Any = classmethod(lambda cls: False)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, *args, **kwargs):
        function = checkpoint_with_routing(self.slot, gradient_checkpointing_func) if enable else checkpoint
        super()._set_gradient_checkpointing(enable, function, *args, **kwargs)

    @contextmanager
    def routing(self, **settings) -> Iterator[Routing]:
        """
        Every forward pass inside, in this thread, is routed as `settings` say (fields of `Routing`), where a call does not say
        otherwise. `records` hold the last pass.

        >>> with model.routing(route="label", records=[]) as routing:
        ...     model(input_ids)
        >>> routing.records[0].expert  # (B, S) of layer 0
        """
        with self.slot.request(Routing(**checked_request(settings, self.config.expert_count, ROUTES))) as routing:
            yield routing

    def resolve_routing(
        self, inputs: torch.Tensor, sensitivity=None, density=None, force_expert=None, route=None, record=False, train=False
    ) -> Routing:
        """
        The routing of one forward pass: what the call says, else what `routing(...)` asks for, else the config.

        Args:
            inputs: token ids (B, S), or embeddings (B, S, D).
            sensitivity, density, force_expert, route: as in `DynaMoEForCausalLM.forward`.
            record: whether records are needed.
            train: whether routers are trained in this pass: labels, and a sensitivity drawn for each sequence.
        """
        shape = inputs.shape[:2]
        sensitivity = checked_dial("sensitivity", sensitivity, shape)
        density = checked_dial("density", density, shape)
        check_expert(force_expert, self.config.expert_count)
        if route is not None:
            check_one_of("route", route, ROUTES)
        asked = {"sensitivity": sensitivity, "density": density, "force_expert": force_expert, "route": route}
        requested = self.slot.requested
        own = {name: each_of(name, getattr(requested, name), shape) for name in DIALS if asked[name] is None}
        routing = replace(requested, **own, **{name: value for name, value in asked.items() if value is not None})
        self.slot.draw_alike(inputs.device, self.training or routing.draws)
        if train:
            if route is None and routing.route == "router":
                routing = replace(routing, route=self.config.train_route)
            if routing.sensitivity is None:
                low, high = self.config.train_sensitivity
                routing = replace(routing, sensitivity=low + (high - low) * torch.rand(shape[0], device=inputs.device))
            routing = replace(routing, needs_labels=True)
        if routing.records is not None:
            routing.records.clear()
        elif record or train:
            routing = replace(routing, records=[])
        return replace(routing, shape=shape, gradients=torch.is_grad_enabled()).with_defaults(self.config)

    def _run_base(self, routing: Routing, inputs: dict) -> Any:
        """The outputs of the base's own `forward`, whose layers read `routing`."""
        previous = self.slot.exchange(routing)
        try:
            return super().forward(**self._without_base_routers(inputs), return_dict=True)
        finally:
            self.slot.exchange(previous)
            if self.config.nested_shared and routing.records:  # some families run the shared expert first
                routing.records.sort(key=lambda record: record.layer)

    def _without_base_routers(self, inputs):
        """The trap: a mixture reads `output_router_logits` from the config too, where it asks for ours."""
        records = "router_logits" in (self._can_record_outputs or ())
        return {**inputs, "output_router_logits": False} if records else inputs

    def _returned(self, outputs, return_dict):
        """The outputs in the form that was asked for: an object, or a tuple."""
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    def set_sensitivity(self, sensitivity: float) -> None:
        """Set the dial, theta in (0, 1], and release `force_expert`. Stored in the config, so it is saved with the model."""
        check_sensitivity(sensitivity)
        self._refuse_fixed_router()
        self.config.sensitivity, self.config.force_expert = float(sensitivity), None

    def set_budget(self, budget: float) -> None:
        """Set the dial by mean share of the MLPs' weights, within what `dynamoe calibrate` wrote. 1 is the dense model."""
        self._refuse_fixed_router()
        self.config.sensitivity, self.config.force_expert = self.config.sensitivity_of(budget), None

    def _refuse_fixed_router(self):
        if not self.config.has_dial:
            raise ValueError(
                "This model has the argmax router, whose sensitivity is fixed by its training. Convert with the profile router "
                "(`--router-type profile`) for a dial, or set `config.force_expert`."
            )

    def pack(self, kind: str = "int8") -> "DynaMoEPreTrainedModel":
        """
        Lay the weights out for decoding with sparsity: a token then reads, of the MLPs, only the weights of what it keeps.

        Args:
            kind: `"int8"`, with a scale and an offset for each row, or `"bfloat16"`, for few tokens on a CPU; `"onednn"`, the
                numbers as they are, for any number of tokens on a CPU; `"rows"`, the same for the experts of a mixture.

        Returns:
            This model. But for `"rows"` it can no longer be trained or saved: its folder stays as it is.

        Raises:
            ValueError: an unknown kind, another device, or MLPs that are wrapped, quantised, packed or not of the kind.
        """
        return pack_model(self, self.nested_mlps, kind)

    def _load_from_state_dict(self, *args, **kwargs):
        check_adapters(self)  # PEFT injects its modules, then loads their weights
        super()._load_from_state_dict(*args, **kwargs)

    def load_adapter(self, *args, **kwargs):
        """As the base class. Raises `ValueError` for adapters of the dense base on MLP projections."""
        found = super().load_adapter(*args, **kwargs)
        check_adapters(self)
        return found

    def save_pretrained(self, *args, **kwargs):
        """As the base class; refused where weights are packed, which have no place in a folder, and where the folder could not be read."""
        self.config.check()
        check_can_be_read(self)
        if any(mlp.packed is not None for mlp in self.nested_mlps):
            raise ValueError(
                "A packed model cannot be saved: its float weights are gone. Copy the folder that it was loaded from."
            )
        return super().save_pretrained(*args, **kwargs)

    def set_mlp_implementation(self, name: str) -> None:
        """
        `"torch"`, or `"triton"` for kernels whose routes never leave the GPU, in forward and backward: nothing waits for the
        device, and CUDA graphs can capture it. They need an NVIDIA GPU, Ampere or newer; elsewhere, and for wrapped or quantised
        MLPs, torch goes on. `"auto"`, the default, is Triton where it was measured to be faster: without gradients, in two-byte
        dtypes, at compute capability 9.0 (H100, H200). Not saved with the model.
        """
        if name not in MLP_IMPLEMENTATIONS:
            raise ValueError(
                f"The MLP implementation is unknown: found {name!r}. Choose one of {', '.join(MLP_IMPLEMENTATIONS)}."
            )
        if name == "triton" and not TRITON:
            raise ImportError(
                "The Triton kernel needs Triton 3.3 or newer: none is installed. Install torch for CUDA, or `triton`."
            )
        self.slot.mlp_implementation = name


class DynaMoEModel(DynaMoEPreTrainedModel):
    """
    The backbone: hidden states of a dense model whose MLPs are nested experts. `DynaMoEForCausalLM(...).model`, or on its own
    with `AutoModel.from_pretrained(folder)`.
    """

    base_class_of = staticmethod(backbone_class_of)

    def __init__(self, config: DynaMoEConfig, dense: PreTrainedModel | None = None):
        self._adopt(config, dense)
        self.slot = RoutingSlot()
        fold_multipliers(self, config.base_config)
        for index, place in enumerate(mlp_places(self)):
            nest = (config, index, self.slot)
            nested = nest_experts(place, *nest) if is_mixture(place.mlp) else NestedMLP(place.mlp, *nest, place.name)
            place.put(nested.train(self.training))
        for mlp in self.nested_mlps:
            mlp.router.reset()
            mlp.router.to(mlp.main_weight.device, mlp.main_weight.dtype)
        prepare_for_engine(config, self.nested_mlps)
        self._backward_compatibility_gradient_checkpointing()  # of `config.gradient_checkpointing`, as the base does

    def forward(  # type: ignore[misc]  # some of the keywords are named
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        sensitivity=None,
        density=None,
        force_expert=None,
        route=None,
        output_router_logits=False,
        return_dict=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""As the base's `forward`, with `sensitivity`, `density`, `force_expert`, `route` and `output_router_logits` of `DynaMoEForCausalLM`."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs}
        if self.slot.current is not None:  # called by `DynaMoEForCausalLM`, which has resolved the routing
            return super().forward(**self._without_base_routers(inputs))
        self.slot.check_first_run()
        given = input_ids if input_ids is not None else inputs_embeds
        routing = self.resolve_routing(given, sensitivity, density, force_expert, route, bool(output_router_logits))
        outputs = self._run_base(routing, inputs)
        if output_router_logits:
            outputs = DynaMoEModelOutputWithPast(**outputs, **experts_of(routing))
        return self._returned(outputs, return_dict)


class DynaMoEForCausalLM(DynaMoEPreTrainedModel, RequestDials, SelfDraftGenerationMixin):
    """
    A dense causal language model of any supported family, its MLPs replaced by nested experts. Build one from a dense model
    in memory with `from_dense`.
    """

    base_class_of = staticmethod(dense_class_of)

    def __init__(self, config: DynaMoEConfig, dense: PreTrainedModel | None = None):
        self._adopt(config, dense)
        check_places(self)
        base: Any = self.base_model
        backbone = DynaMoEModel(config, dense=base)
        setattr(self, self.base_model_prefix, backbone)
        self.slot = backbone.slot

    @classmethod
    def from_dense(cls, dense: PreTrainedModel, **config) -> "DynaMoEForCausalLM":
        """
        Turn a dense model in memory into a DynaMoE model, without copying a weight (but GPT-2's). `dense` is used up: its layers now
        hold nested MLPs. Routers are fresh and sensitivity is 1, so the outputs are still those of the dense model.

        Args:
            dense (`PreTrainedModel`): a causal language model of a supported family.
            config: fields of `DynaMoEConfig`, for example `expert_widths=[0.5, 1]`.

        Raises:
            ValueError: the family, or one of its layers, cannot be split; nothing has been changed then.
        """
        return cls(cls.config_for(dense, **config), dense=dense)

    @classmethod
    def config_for(cls, dense: PreTrainedModel, **config) -> DynaMoEConfig:
        """The config that `from_dense` would give, with all its checks and without touching the model."""
        if getattr(dense.config, "model_type", None) == cls.config_class.model_type:
            raise ValueError("The model is a DynaMoE model already. Convert its dense base, or train it as it is.")
        dense_class_of(dense.config)
        check_places(dense)
        own = cls.config_class(**{"base_config": dense.config, "nested_shared": shared_layers(dense.base_model), **config})
        own.dtype = dense.config.dtype
        for index, place in enumerate(mlp_places(dense.base_model, own.nested_shared)):
            own.layer_widths(index, layout_at(place).width(place.mlp))
            if is_mixture(place.mlp):
                check_mixture(own)
        return own

    def forward(  # type: ignore[misc]  # some of the keywords are named
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        sensitivity=None,
        density=None,
        force_expert=None,
        route=None,
        output_router_logits=None,
        return_dict=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        r"""
        As the base's `forward`, and:

        Args:
            sensitivity (`float` or `torch.Tensor` of shape (B,) or (B, S), *optional*):
                For this call only; a tensor gives each sequence, or each token, its own. Defaults to `config.sensitivity`.
            density (`float` or `torch.Tensor` of shape (B,) or (B, S), *optional*):
                For this call only: share of an expert's weights that sparsity leaves. By default what the dial joins to the
                sensitivity.
            force_expert (`int`, *optional*): one expert for every token, for this call only.
            route (`str`, *optional*):
                `"router"`, or for training and as baselines `"label"` (true difficulty) and `"random"` (uniform).
            output_router_logits (`bool`, *optional*): return `router_logits` and `expert_indices`.

        In training mode with `labels`, the tokens follow `config.train_route` at a sensitivity drawn for each sequence
        from `config.train_sensitivity`, and `loss` is the LM loss + `config.router_loss_coef` * the router loss.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "labels": labels}
        inputs |= {"use_cache": use_cache, "logits_to_keep": logits_to_keep, **kwargs}
        record = self.config.output_router_logits if output_router_logits is None else output_router_logits
        train = self.training and labels is not None and force_expert is None and self.config.force_expert is None
        check_labels_arrive(labels, kwargs.get("num_items_in_batch"))
        given = input_ids if input_ids is not None else inputs_embeds
        routing = self.resolve_routing(given, sensitivity, density, force_expert, route, record, train)
        found = self._run_base(routing, inputs)
        outputs: Any = DynaMoECausalLMOutputWithPast(**found, **(experts_of(routing) if record else {}))
        if labels is not None:
            outputs.lm_loss = outputs.loss
        if train:
            mask = loss_mask(labels, kwargs.get("shift_labels"))
            assert routing.records is not None
            outputs.router_loss = mean_router_loss(routing.records, mask, kwargs.get("num_items_in_batch"))
            outputs.loss = outputs.lm_loss + self.config.router_loss_coef * outputs.router_loss
        return self._returned(outputs, return_dict)

    def generate(self, *args, sensitivity=None, density=None, force_expert=None, route=None, **kwargs):
        """
        As the base class. `sensitivity`, `density`, `force_expert` and `route`, as in `forward`, hold in every pass of this model,
        such as the second one of `guidance_scale`; an assistant model drafts as its own config says.
        """
        asked = {"sensitivity": sensitivity, "density": density, "force_expert": force_expert, "route": route}
        asked = {name: value for name, value in asked.items() if value is not None}
        checked = checked_request(asked, self.config.expert_count, ROUTES)
        passed = {} if kwargs.get("assistant_model") is not None else asked
        with self.slot.request(replace(self.slot.requested, **checked)):
            return super().generate(*args, **passed, **kwargs)

    def logits_of(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Logits of what the backbone returned, (B, S, D) -> (B, S, V), with the base's own scales and soft-caps: for losses that
        take the positions in chunks, since the logits of a whole batch are the largest tensor of a training step.
        """
        return self.base_class.forward(AfterBackbone(self, hidden_states), return_dict=True).logits


__all__ = ["DynaMoEForCausalLM", "DynaMoEModel"]
