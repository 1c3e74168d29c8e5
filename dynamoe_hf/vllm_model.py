# SPDX-License-Identifier: Apache-2.0
"""
DynaMoE in vLLM: the model that its Transformers backend builds, with the MLPs divided over the ranks of tensor parallelism.

The neurons of an MLP are dealt to the ranks in turn, so that each rank holds its part of every expert: of R ranks, rank r has
neurons r, r + R, r + 2R, ..., and a prefix of all neurons is a prefix of each rank's.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.models.transformers import TransformersForCausalLM

from .modeling.engine_layers import keeps_layers
from .modeling.onednn_weights import is_available
from .vllm_dials import RequestDials, are_asked
from .vllm_metrics import Meters, are_read, can_count


class DynaMoEForCausalLM(TransformersForCausalLM):
    """`DynaMoEModel` with vLLM's attention, embeddings and head."""

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        # In the config, since vLLM keeps compiled graphs by it: these have a dial for each token, and counters.
        config.request_dials, config.counted = are_asked(vllm_config), are_read()
        self.meters: Meters | None = None
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """As the base class."""
        nobody = get_forward_context().attn_metadata is None  # a pass of vLLM's own, to warm up
        if self.config.request_dials:
            dials = RequestDials.of_engines[self.vllm_config.instance_id]
            kwargs["sensitivity"] = dials.of_tokens(positions.shape[-1], self.config.sensitivity)
            torch._dynamo.mark_dynamic(kwargs["sensitivity"], 1)
        with self.meters.stopped() if nobody and self.meters else nullcontext():
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)

    def init_parameters(self, module: nn.Module, dtype: torch.dtype | None = None) -> None:
        """Allocate what has not been replaced, and of each MLP only the part of this rank."""
        rank, ranks = self.tp_group.rank_in_group, self.tp_group.world_size
        if ranks > 1:
            for mlp in self.model.nested_mlps:
                divide(mlp, rank, ranks)
        super().init_parameters(module, dtype)
        if ranks > 1:
            for mlp in self.model.nested_mlps:
                load_part(mlp, rank, ranks)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """As the base class; on a CPU the MLPs are then laid out for oneDNN, as vLLM does with its own layers."""
        loaded = super().load_weights(weights)
        device, mlps = self.device_config.device, self.model.nested_mlps
        if keeps_layers(self.config) and device.type == "cpu" and is_available(self.model_config.dtype):
            for mlp in mlps:
                mlp.pack("onednn")
        if self.config.counted and can_count(self.config, mlps):
            self.meters = Meters(mlps, self.text_config.hidden_size, device, self.config.num_hidden_layers)
            if self.tp_group.rank_in_group == 0:
                self.meters.publish()
        return loaded


def divide(mlp: Any, rank: int, ranks: int) -> None:
    """Keep the neurons of one rank of a `NestedMLP` on the meta device, and add up the outputs of all ranks."""
    for name, dim in projections(mlp):
        linear = getattr(mlp, name)
        linear.weight = part_of(linear.weight, rank, ranks, dim, mlp.layout.fused)
        if linear.bias is not None and dim == 0:
            linear.bias = part_of(linear.bias, rank, ranks, dim, mlp.layout.fused)
        linear.out_features, linear.in_features = linear.weight.shape
    mlp.widths = [len(range(rank, width, ranks)) for width in mlp.widths]
    if rank and mlp.down_linear.bias is not None:
        mlp.down_linear.bias.data = torch.zeros_like(mlp.down_linear.bias)
    mlp.register_forward_hook(lambda mlp, inputs, output: tensor_model_parallel_all_reduce(output))


def projections(mlp) -> list[tuple[str, int]]:
    """The names of the linear layers, and the dimension of their weight that counts neurons."""
    return [(name, int(name == mlp.layout.down)) for name in mlp.layout.projections]


def part_of(tensor: torch.Tensor, rank: int, ranks: int, dim: int, fused: bool) -> nn.Parameter:
    """The neurons of one rank. `fused`: dimension 0 holds gate and up."""
    halves = tensor.chunk(2) if fused and dim == 0 else (tensor,)
    index = (slice(None),) * dim + (slice(rank, None, ranks),)
    return nn.Parameter(torch.cat([half[index] for half in halves]).contiguous(), requires_grad=False)


def load_part(mlp: Any, rank: int, ranks: int) -> None:
    """Let vLLM's loader copy the part of this rank."""
    for name, dim in projections(mlp):
        for kind, parameter in getattr(mlp, name).named_parameters():
            if kind == "weight" or dim == 0:
                parameter.weight_loader = partial(_copy_part, rank=rank, ranks=ranks, dim=dim, fused=mlp.layout.fused)
            elif rank:
                parameter.weight_loader = _copy_nothing


def _copy_part(parameter, loaded, rank, ranks, dim, fused):
    parameter.data.copy_(part_of(loaded, rank, ranks, dim, fused))


def _copy_nothing(parameter, loaded):
    """The bias of the last projection is added by rank 0 alone."""
    parameter.data.zero_()
