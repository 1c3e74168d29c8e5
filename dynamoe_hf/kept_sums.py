# SPDX-License-Identifier: Apache-2.0
"""Sums over blocks of text, kept in a file while they grow, so that measuring goes on where a killed run left it."""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .disk import staging_of, sync_entry, told_of


SECONDS = 60.0  # of work between two writings, which a killed run loses at most


def digest_of_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of the numbers of all tensors, its first twelve digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


class KeptSums:
    """
    The file of sums that grow block by block. It is written whole or not at all, at most once in `SECONDS`; whoever has used the sums
    deletes it.

    Args:
        file: where they are kept.
        settings: what they are sums of. They are in the file, too.
    """

    def __init__(self, file: Path, settings: dict[str, str]):
        self.file, self.settings, self.written = file, settings, time.monotonic()

    def read(self, sums: Sequence[torch.Tensor]) -> int:
        """
        Fill `sums` from the file, if there is one, and return how many blocks are in them. Raises `FileExistsError` where the file is
        of other settings.
        """
        if not self.file.exists():
            return 0
        try:
            with safe_open(self.file, "pt") as file:
                found, tensors = file.metadata(), [file.get_tensor(str(index)) for index in range(len(file.keys()))]
        except SafetensorError:
            found, tensors = {}, []
        done = int(found.pop("blocks", 0))
        if wrong := [name for name, value in self.settings.items() if found.get(name) != value]:
            told = ", ".join(f"{name} {found.get(name)}, and now {self.settings[name]}" for name in wrong)
            raise FileExistsError(
                f"{self.file} keeps what another conversion has measured: found {told}. Give the same settings to go on with it, or "
                "delete it to begin anew."
            )
        for tensor, kept in zip(sums, tensors, strict=True):
            tensor.copy_(kept)
        return done

    def keep(self, sums: Sequence[torch.Tensor], blocks: int, last: bool = False) -> None:
        """Write the sums over so many blocks, if it is time, or if these are the last ones. Raises `OSError` where nothing can be written."""
        if not last and time.monotonic() - self.written < SECONDS:
            return
        content = save({str(index): tensor for index, tensor in enumerate(sums)}, {**self.settings, "blocks": str(blocks)})
        staging = staging_of(self.file)
        try:
            with told_of(self.file):
                with open(staging, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(staging, self.file)
                sync_entry(self.file)
        finally:
            staging.unlink(missing_ok=True)
        self.written = time.monotonic()
