# SPDX-License-Identifier: Apache-2.0
"""Whether files are those that were written (SHA-256), and weights are numbers (finite)."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open


WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
DIGESTS = "digests.json"  # of all files of a checkpoint, written last


def digest_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(folder: Path, patterns: Iterable[str] = WEIGHT_FILES) -> dict[str, str]:
    """{path in `folder`: SHA-256} of its files that fit one of the patterns; `**/*` are all, those of shards in folders too."""
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in paths}


def differing(folder: Path, digests: dict[str, str]) -> list[str]:
    """The files of `folder` that are missing, or are not what `digests` say."""
    return [name for name, digest in digests.items() if not (folder / name).is_file() or digest_of(folder / name) != digest]


def first_of_no_floats(folder: Path, names: set[str]) -> str | None:
    """
    The first of these tensors in the weight files of a folder that holds no floating-point numbers, with its type: transformers casts
    whatever it finds. None where the config names a quantiser.
    """
    config = folder / "config.json"
    if not config.is_file() or "quantization_config" in config.read_text(encoding="utf-8"):
        return None
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in names.intersection(file.keys()):
                kind = file.get_slice(name).get_dtype()  # such as F32, BF16, F8_E4M3
                if not kind.startswith(("F", "BF")):
                    return f"{name} in {kind}"
    return None


@torch.no_grad()
def first_not_finite(model: torch.nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or an infinity. Types of numbers that a quantiser defines are not looked at."""
    for name, parameter in model.named_parameters():
        data = getattr(parameter.data, "_local_tensor", parameter.data)  # of a weight that FSDP divides, this process's part
        known = type(data) is torch.Tensor and data.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        # Both are NaN if one number is. `isfinite` instead would make a second tensor.
        if known and data.numel() and data.device.type != "meta" and not all(end.isfinite() for end in data.aminmax()):
            return name
    return None
