# SPDX-License-Identifier: Apache-2.0
"""
The outputs of a model: those of transformers, and what the experts did.

Shapes: B batch, S sequence, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .routing import Routing


@dataclass
class DynaMoEModelOutputWithPast(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, and the last three of `DynaMoECausalLMOutputWithPast`."""

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None  # of families like GPT-2
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None
    mlp_shares: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DynaMoECausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    `CausalLMOutputWithPast`, and:

    lm_loss (`torch.Tensor` of shape (1,)): the language-model part of `loss`, when `labels` are given.
    router_loss (`torch.Tensor` of shape (1,)): mean over MLPs of the router loss, normalised like `lm_loss`.
    router_logits (`tuple` of (B, S, E - 1), or (B, S, E) with the argmax router): with `output_router_logits=True`, one
        for each nested MLP (`DynaMoEConfig.mlp_names`). The sigmoid of a profile router's logits is the predicted similarity of each smaller expert.
    expert_indices (`tuple` of (B, S) int64): the experts taken, one for each nested MLP, with `output_router_logits=True`. Routed
        experts of mixtures have router logits and widths for each of a token's K experts: (B, S, K, E - 1) and (B, S, K).
    mlp_shares (`tuple` of (B, S)): with `output_router_logits=True`, the share of each MLP's weights that a token read.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None  # of families like GPT-2
    lm_loss: torch.Tensor | None = None
    router_loss: torch.Tensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None
    expert_indices: tuple[torch.LongTensor, ...] | None = None
    mlp_shares: tuple[torch.FloatTensor, ...] | None = None


def experts_of(routing: Routing) -> dict[str, Any]:
    """The outputs that tell which experts the tokens took."""
    records = routing.records or ()
    return {
        "router_logits": tuple(record.router_logits for record in records),
        "expert_indices": tuple(record.expert for record in records),
        "mlp_shares": tuple(record.share for record in records),
    }
