# SPDX-License-Identifier: Apache-2.0
"""The processes that a launcher (`accelerate launch`, torchrun) has started: which one this is, and what they hand to each other."""

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState


WAIT = timedelta(days=30)  # for the process that writes, or fits, while the others have nothing to do
T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process writes files: under a launcher only the first one does."""
    return int(os.environ.get("RANK", 0)) == 0


def launched_processes() -> int:
    """How many processes the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join_processes() -> None:
    """
    Connect the processes of a launcher, if there are several. Raises `ValueError` where FSDP would have loaded the weights in the
    first one alone.
    """
    if launched_processes() == 1:
        return
    check_all_load()
    if not dist.is_initialized():
        PartialState(cpu=not torch.accelerator.is_available(), timeout=WAIT)


def leave_processes() -> None:
    """End the connection, which torch asks for at the end of a program."""
    if process_count() > 1:
        dist.destroy_process_group()


def check_all_load() -> None:
    """Raise `ValueError` where FSDP has asked transformers for models without weights in all processes but the first."""
    if all(
        os.environ.get(name, "").lower() in ("1", "true") for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
    ):
        raise ValueError(
            "Every process needs the weights, to fit routers and to keep a teacher: found fsdp_cpu_ram_efficient_loading: true. "
            "Set it to false in the config of accelerate."
        )


def check_division(state) -> None:
    """Raise `ValueError` where accelerate's state says that FSDP divides the model in a way that cannot be trained here."""
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        return
    check_all_load()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"Nested experts are trained with FSDP2, found fsdp_version: {plugin.fsdp_version}. Set it to 2 in the config of accelerate."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP's activation checkpointing runs layers again without knowing which experts their tokens took: found "
            "fsdp_activation_checkpointing: true. Leave it out, and set gradient_checkpointing=True (`--gradient-checkpointing`)."
        )


def process_count() -> int:
    """Connected processes; 1 where there is no connection."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which of the connected processes this is, from 0."""
    return dist.get_rank() if process_count() > 1 else 0


def from_main(value: T | None) -> T:
    """What the first process gives here, in all of them. They wait for each other."""
    box: list[Any] = [value]
    if process_count() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


@torch.no_grad()
def hand_over(tensors: Iterable[torch.Tensor], source: int) -> None:
    """Fill the tensors of all processes with what the process `source` has in them."""
    for tensor in tensors if process_count() > 1 else ():
        dist.broadcast(tensor, source)


def gather_rows(own: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """
    The rows that the processes have, one after the other: this one has `own`, (rows[i], ...), and all get (sum of rows, ...).
    """
    if len(rows) == 1:
        return own
    parts = [own.new_empty(count, *own.shape[1:]) for count in rows]
    parts[process_index()] = own.contiguous()
    for source, part in enumerate(parts):
        dist.broadcast(part, source)
    return torch.cat(parts)
