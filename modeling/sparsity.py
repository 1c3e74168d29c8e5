# SPDX-License-Identifier: Apache-2.0
"""
Magnitude sparsity inside the chosen experts: what a product reads is left out where its size is under a threshold (TEAL, Liu et al.,
2024, arXiv 2408.14690). A *density* is the share of a full-width MLP's weights that is then still read; a model holds the thresholds
of some densities, and its dial says which density goes with which sensitivity.

Shapes: B batch, S sequence, L layers, K densities.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .checks import is_number, is_size


PRODUCTS = ("input", "hidden")  # what thresholds are of: |x|, which gate and up read, and |h|, which down reads


class Thresholds(NamedTuple):
    """The sizes under which what one MLP's products read is left out: numbers, or tensors that broadcast over (B, S, 1)."""

    input: float | torch.Tensor
    hidden: float | torch.Tensor
    ramp: float = 0.0

    def kept_input(self, x: torch.Tensor) -> torch.Tensor:
        """What gate and up read of x (B, S, D), zero where it is left out."""
        return keep_large(x, self.input, self.ramp)

    def kept_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """What down reads of the activations (B, S, H), zero where it is left out."""
        return keep_large(hidden, self.hidden, self.ramp)


def keep_large(values: torch.Tensor, threshold: float | torch.Tensor, ramp: float) -> torch.Tensor:
    """
    Zero what is small. What is larger than the threshold t stays. With a ramp r, what is larger than (1 - r) t falls from t to 0 in a
    straight line, sign(v) (|v| - (1 - r) t) / r; without one it is zero. The gradient is that of this function, and what is not a number
    stays.
    """
    if ramp:
        foot: Any = (1 - ramp) * threshold
        falling = (values - values.clamp(-foot, foot)) / ramp
        return torch.where(values.abs() <= threshold, falling.to(values.dtype), values)
    if not isinstance(threshold, torch.Tensor):
        return F.hardshrink(values, threshold)  # one pass over memory, where the line below takes three
    return values.masked_fill(values.abs() <= threshold, 0)


def thresholds_at(table: dict[str, list], density: float | torch.Tensor, ramp: float) -> tuple[Thresholds, ...] | None:
    """
    The thresholds of each layer at a density, interpolated; `None` at density 1, where nothing is left out.

    Args:
        table: `density` (K,) rising and below 1, `input` and `hidden` (K, L), falling along K.
        density: a number, or (B,) or (B, S), which gives thresholds (B, 1 or S, 1).
        ramp: of `keep_large`.
    """
    known = [*table["density"], 1.0]
    if isinstance(density, torch.Tensor):
        return _thresholds_of_each(table, known, density.float().view(len(density), -1), ramp)
    if density >= 1:
        return None
    high = next(index for index, value in enumerate(known) if density <= value)
    low = max(0, high - 1)
    part = (density - known[low]) / (known[high] - known[low]) if high > low else 0.0
    layers: list[list[float]] = []
    for name in PRODUCTS:
        rows = [*table[name], [0.0] * len(table[name][0])]
        layers.append([a + part * (b - a) for a, b in zip(rows[low], rows[high])])
    return tuple(Thresholds(of_input, of_hidden, ramp) for of_input, of_hidden in zip(*layers))


def _thresholds_of_each(table, known, density_BS, ramp):
    known_K = torch.tensor(known, device=density_BS.device)
    high_BS = torch.searchsorted(known_K, density_BS.clamp(known[0], 1.0)).clamp(min=1)
    low_BS = high_BS - 1
    part_BS = ((density_BS - known_K[low_BS]) / (known_K[high_BS] - known_K[low_BS])).clamp(0, 1)[..., None]
    per_layer = []
    for name in PRODUCTS:
        rows_KL = torch.tensor([*table[name], [0.0] * len(table[name][0])], device=density_BS.device)
        per_layer.append(torch.lerp(rows_KL[low_BS], rows_KL[high_BS], part_BS).movedim(-1, 0)[..., None])
    return tuple(Thresholds(of_input, of_hidden, ramp) for of_input, of_hidden in zip(*per_layer))


def density_at(path: Sequence[Sequence[float]], sensitivity: float | torch.Tensor) -> float | torch.Tensor:
    """The density that goes with a sensitivity: `path` holds rising pairs of both, the last one is (1, 1) without being named."""
    points = [*path, (1.0, 1.0)]
    if isinstance(sensitivity, torch.Tensor):
        found = torch.full_like(sensitivity, points[0][1], dtype=torch.float32)
        for (low, density_low), (high, density_high) in zip(points, points[1:]):
            part = (sensitivity - low) / (high - low)
            found = torch.where(sensitivity > low, density_low + part * (density_high - density_low), found)
        return found
    for (low, density_low), (high, density_high) in zip(points, points[1:]):
        if sensitivity <= high:
            return density_low + max(0.0, (sensitivity - low) / (high - low)) * (density_high - density_low)
    return 1.0


def share_read(x: torch.Tensor, hidden: torch.Tensor, width: torch.Tensor, inputs: int) -> torch.Tensor:
    """
    Share of an MLP's weights that each token reads: (B, S).

    Args:
        x: what gate and up read, zero where it is left out, (B, S, D).
        hidden: what down reads, zero where it is left out, of all neurons, (B, S, H).
        width: neurons that each token has, (B, S).
        inputs: projections that read x: 2 with a gate, else 1.
    """
    neurons = hidden.shape[-1]
    in_prefix = torch.arange(neurons, device=hidden.device) < width[..., None]
    kept_inputs = (x != 0).float().mean(-1)
    kept_neurons = ((hidden != 0) & in_prefix).sum(-1)
    return (inputs * kept_inputs * width + kept_neurons) / ((inputs + 1) * neurons)


def check_thresholds(table: Any, layers: int) -> None:
    """Raise `ValueError` unless `table` is one that `thresholds_at` reads, for so many layers."""
    if table is None:
        return
    fields = {"density", *PRODUCTS}
    if not isinstance(table, dict) or table.keys() != fields:
        found = ", ".join(sorted(map(str, table))) if isinstance(table, dict) else repr(table)
        raise ValueError(
            f"`thresholds` must hold {', '.join(sorted(fields))}, found {found}. `dynamoe calibrate` writes them."
        )
    density = table["density"]
    if not _rises(density) or density[-1] >= 1:
        raise ValueError(f"`thresholds` must have densities that rise between 0 and 1, found {density}.")
    for name in PRODUCTS:
        rows = table[name]
        shape = [len(row) if isinstance(row, list) else None for row in rows] if isinstance(rows, list) else None
        if shape != [layers] * len(density):
            raise ValueError(
                f"`thresholds` must hold {len(density)} lists of {layers} numbers in `{name}`, one a density: found {shape}."
            )
        for place, row in enumerate(rows):
            if not all(map(is_size, row)):
                raise ValueError(f"`thresholds` must be finite and not negative, found {row} in `{name}` {place}.")


def check_ramp(value: Any) -> None:
    """Raise `ValueError` unless `value` is a ramp that `keep_large` takes."""
    if not is_number(value) or not 0 <= value < 1:
        raise ValueError(
            f"`threshold_ramp` must be in [0, 1), found {value!r}. 0 is a step at the threshold; 0.2 lets engines agree at budget 0.75."
        )


def check_density_path(path: Any, table: Any) -> None:
    """Raise `ValueError` unless `path` is one that `density_at` reads, and there are thresholds to go with it."""
    if not path:
        return
    if table is None:
        raise ValueError("`density_path` needs `thresholds`, found none. `dynamoe calibrate` writes both.")
    pairs = path if isinstance(path, list) else [path]
    numbers = all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in pairs)
    sensitivities, densities = zip(*pairs) if numbers else ((), ())
    falls = any(a > b for a, b in zip(densities, densities[1:]))
    if not _rises(list(sensitivities)) or sensitivities[-1] >= 1 or falls:
        raise ValueError(
            f"`density_path` must be pairs of sensitivity and density that rise together, found {path!r}. `dynamoe calibrate` writes it."
        )
    if not all(0 < value <= 1 for value in densities):
        raise ValueError(f"`density_path` must have densities in (0, 1], found {list(densities)}.")


def _rises(values):
    """Whether these are positive numbers, each larger than the one before."""
    numbers = isinstance(values, list) and bool(values) and all(map(is_number, values))
    return numbers and values[0] > 0 and all(a < b for a, b in zip(values, values[1:]))
