# SPDX-License-Identifier: Apache-2.0
"""Which parts of a model a training moves, and what it is held to: parameters, adapters, the frozen teacher, densities."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .arguments import TrainedParts
from .modeling import DynaMoEForCausalLM
from .modeling.dense_base import FLAT, MLP_NAMES, PROJECTIONS, decoder_layers
from .modeling.moe_base import base_routers
from .modeling.routing import router_names


DENSITY_RANGE = (0.4, 1.0)  # that densities are drawn from, where a model has thresholds


def frozen_copy(model: DynaMoEForCausalLM) -> DynaMoEForCausalLM:
    """
    A copy of the weights, in evaluation mode and without gradients. Its configs are those of `model` itself, so that what is set later,
    by Trainer or by `set_attn_implementation`, holds for both.
    """
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    configs += [model.config.base_config]
    return copy.deepcopy(model, {id(config): config for config in configs}).eval().requires_grad_(False)


def divide_layers(model: DynaMoEForCausalLM) -> None:
    """
    Leave each of the connected processes its part of the layers' weights (FSDP2), gathered where a layer runs. Embeddings and head
    stay whole, as the head also runs on its own.
    """
    from torch.distributed.fsdp import fully_shard

    outer = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    backbone: Any = model.base_model
    for layer in decoder_layers(backbone):
        fully_shard(layer)
    fully_shard(backbone, ignored_params=outer)


def density_range_of(config, asked: Sequence[float] | None) -> Sequence[float] | None:
    """
    What densities are drawn from in training, `None` for a model without thresholds. Raises `ValueError` where there are no thresholds
    for what is asked.
    """
    if config.thresholds is None:
        if asked is not None and min(asked) < 1:
            low, high = asked
            raise ValueError(
                f"`density_range` needs thresholds, found {low:g} to {high:g} and none in the config. Call `fit_thresholds(model, "
                "blocks)` first, or leave `density_range` out."
            )
        return None
    return DENSITY_RANGE if asked is None else asked


def router_parameters(model) -> list[torch.nn.Parameter]:
    """All parameters of the routers of a model, wrapped or not."""
    names = router_names(model)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def choose_trainable(model: DynaMoEForCausalLM, parts: TrainedParts) -> None:
    """
    Set `requires_grad` of every parameter; "lora" leaves them as PEFT set them. What chooses the experts of a mixture stays as it is:
    trained without the losses that keep it in balance it would send all tokens to a few experts.
    """
    if parts == "lora":
        return
    outer = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    routers, mlps = ({id(p) for p in found} for found in (router_parameters(model), _parameters(model.nested_mlps)))
    gates = {id(p) for p in _parameters(base_routers(model.base_model))}
    for parameter in model.parameters():
        trained = {
            "routers": id(parameter) in routers,
            "mlp": id(parameter) in mlps,
            "layers": id(parameter) not in outer,
            "all": True,
        }
        parameter.requires_grad_(trained[parts] and id(parameter) not in gates)


@contextmanager
def adapters_off(wrapped: Any) -> Iterator[None]:
    """Inside, PEFT's adapters are off. The trap: where they are on again PEFT has made all of them, and the routers, trainable."""
    wanted = [(parameter, parameter.requires_grad) for parameter in wrapped.parameters()]
    with wrapped.disable_adapter():
        yield
    for parameter, trained in wanted:
        parameter.requires_grad_(trained)


def _parameters(modules):
    return [parameter for module in modules for parameter in module.parameters()]


def lora_config(rank: int = 16, alpha: int = 32, **settings):
    """A PEFT `LoraConfig` with adapters on the MLP projections of any supported family, and routers trained in full."""
    from peft import LoraConfig

    projections = rf".*\.({'|'.join((*MLP_NAMES, FLAT[0]))})\.({'|'.join(PROJECTIONS)})"
    settings = {"target_modules": projections, "modules_to_save": ["router"], "task_type": "CAUSAL_LM", **settings}
    return LoraConfig(r=rank, lora_alpha=alpha, **settings)


def with_adapters(model: DynaMoEForCausalLM, rank: int, seed: int):
    """The model in PEFT's wrapper, with the adapters of `lora_config`, scaled as usual: alpha twice the rank."""
    from peft import get_peft_model

    torch.manual_seed(seed)  # the first weights of the adapters are drawn, alike in all processes
    return get_peft_model(model, lora_config(rank, 2 * rank))
