# SPDX-License-Identifier: Apache-2.0
"""
Tensor parallelism by transformers' own plan: each of R processes has 1/R of the neurons of every expert.

The neurons of an MLP are cut into equal blocks, as wide as all its widths allow, and each block is divided over the processes. A prefix
of the MLP is then a prefix of each part, and the outputs of the parts add up to its output. Routers are copied; they read the same in
all processes and choose the same. What cannot be divided is copied, with a warning.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from transformers.utils import logging

from .dense_base import decoder_layers, mlp_name, outside_mlps
from .engine_layers import ENGINES


if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard


logger = logging.get_logger(__name__)
STYLE = "nested_mlp"


def plan_with_mlps(model: Any) -> dict[str, str]:
    """The plan of a base, with the whole MLPs in place of their layers. Engines do not know this style: they copy MLPs."""
    plan, backbone = dict(outside_mlps(model._tp_plan) or {}), model.base_model
    if model.config._attn_implementation not in ENGINES:
        layers = decoder_layers(backbone) or ()
        path = next((name for name, module in model.named_modules() if module is layers), None)
        plan |= {f"{path}.*.{name}": STYLE for name in map(mlp_name, layers) if name}
    return plan


def read_by_parts(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """`tensor`, the same in all processes of `mesh`, for what differs between them: its gradient is the sum of theirs."""
    if mesh is None or not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def sum_of_parts(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    """The sum of what the processes of `mesh` have, in all of them. Without a mesh, what this one has."""
    return tensor if mesh is None else DTensor.from_local(tensor, mesh, [Partial()], run_check=False).full_tensor()


class NestedMLPParallel(TensorParallelLayer):
    """Divides a `NestedMLP`. The experts of a mixture are copied."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        """Replace the parameters of the projections by divided ones, to be loaded, and `forward` by one that reads this part."""
        for layer in module.modules():
            if hasattr(layer, "slot"):
                layer.slot.mesh = mesh
        if not hasattr(module, "layout"):
            return module
        ranks = mesh.size()
        if obstacle := _obstacle(module, ranks):
            if mesh.get_local_rank() == 0:
                logger.warning_once(
                    f"DynaMoE: MLPs are copied to each of {ranks} processes, not divided over them: found {obstacle}. Plain weights "
                    f"are divided, where the widths of all experts are multiples of {ranks}."
                )
            return module
        blocks = module.widths[-1] // math.gcd(*module.widths)
        for name in module.layout.projections:
            _divide(getattr(module, name), mesh, blocks, name == module.layout.down, module.layout.fused)
        module.widths = [width // ranks for width in module.widths]
        module.mesh = mesh
        return super().install_forward(module, mesh)

    @contextmanager
    def context_around_forward(self, module: Any, mesh: Any) -> Iterator[None]:
        """Plain tensors, which can be cut, in place of divided parameters."""
        linears = [module._modules[name] for name in module.layout.projections]
        for linear in linears:
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"An MLP that is divided over processes must have plain projections: found {type(linear).__module__}."
                    f"{type(linear).__name__} in layer {module.config.mlp_names[module.layer]}. Leave MLPs out of an adapter's `target_modules`, or load the "
                    "model without tensor parallelism."
                )
        whole = [dict(linear._parameters) for linear in linears]
        for linear in linears:
            for name, tensor in linear._parameters.items():
                if isinstance(tensor, DTensor):
                    linear._parameters[name] = tensor.to_local()
                elif tensor is not None:  # the bias of the last projection: each process adds its share
                    linear._parameters[name] = read_by_parts(tensor, mesh) / mesh.size()
        try:
            yield
        finally:
            for linear, parameters in zip(linears, whole):
                linear._parameters.update(parameters)


def _obstacle(mlp, ranks):
    """What keeps an MLP from being divided, in words, or `None`."""
    linears = [getattr(mlp, name) for name in mlp.layout.projections]
    if getattr(mlp.config, "quantization_config", None) or any(type(linear) is not nn.Linear for linear in linears):
        return "quantised weights"
    if (processes := torch.distributed.get_world_size()) > ranks:  # FSDP knows no blocks, and would load other neurons
        return f"{processes} processes, as with FSDP"
    odd = [width for width in mlp.widths if width % ranks]
    return f"an expert of {odd[0]} neurons" if odd else None


def _divide(linear, mesh, blocks, is_down, fused):
    """Replace the parameters of a projection by their part: of `blocks` equal blocks of neurons, twice as many where gate and up are one."""
    placement = _StridedShard(dim=1 if is_down else 0, split_factor=blocks * (2 if fused and not is_down else 1))
    for name, tensor in linear.named_parameters():
        if name == "weight" or not is_down:
            part = distribute_tensor(tensor, mesh, [placement], src_data_rank=None)
            linear._parameters[name] = nn.Parameter(part, requires_grad=tensor.requires_grad)


if torch.distributed.is_available():
    style: Any = NestedMLPParallel()
    ALL_PARALLEL_STYLES.register(STYLE, style)
