# SPDX-License-Identifier: Apache-2.0
"""
Layers that others leave alone, and what changes where an inference engine builds the model. vLLM and SGLang set an attention of their
own and then replace every `nn.Linear` by a layer that cannot be cut (on a CPU vLLM even gives its weights away), so nested MLPs keep
layers that are none. Routers always have such layers: PEFT's `all-linear` and quantisers take every `nn.Linear`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .moe_base import is_mixture


# Names of attention implementations that say who builds the model.
ENGINES = ("vllm", "sglang")
# Engines multiply logits by `config.logit_scale`, as Cohere does. These families scale them by `logits_scaling`, to this power.
LOGITS_SCALING = {"granite": -1, "granite_swa": -1, "hyperclovax": 1}


class BareLinear(nn.Module):
    """A linear layer that holds the parameters of an `nn.Linear` and is none: (..., D) -> (..., H)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


def keeps_layers(config) -> bool:
    """Whether nested MLPs keep linear layers of their own: not where every token takes the full width, whatever requests ask for."""
    return not config.is_dense or getattr(config, "request_dials", False)


def prepare_for_engine(config, nested_mlps: Sequence[nn.Module]) -> None:
    """
    Keep the linear layers of `nested_mlps` from being replaced, where an engine builds the model, and tell it the scale of logits.

    Raises:
        ValueError: the base is a mixture, or scales its logits in a way that engines are not told of.
    """
    if config._attn_implementation not in ENGINES:
        return
    if any(map(is_mixture, nested_mlps)):
        raise ValueError(
            "Engines replace the experts of a mixture by their own, which have one width: found a base of the family "
            f"{config.base_config.model_type!r}. Serve it with transformers."
        )
    scaling, family = getattr(config, "logits_scaling", 1), config.base_config.model_type
    if scaling != 1:
        if family not in LOGITS_SCALING:
            raise ValueError(
                f"The engine would leave out the scale of the logits: found logits_scaling={scaling} in a base of the family "
                f"{family!r}. Serve it with transformers, or export one width (`dynamoe export`)."
            )
        config.logit_scale = scaling ** LOGITS_SCALING[family]
    if not keeps_layers(config):
        return  # the engine's own are right then, and fast
    for mlp in nested_mlps:
        for owner in list(mlp.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(owner, name, BareLinear(child))
