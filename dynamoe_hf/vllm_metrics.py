# SPDX-License-Identifier: Apache-2.0
"""
What the MLPs read in vLLM, for its `/metrics`: `dynamoe:mlp_share_total` / `dynamoe:mlp_tokens_total` is the mean share of the MLPs'
weights.

The model runs in other processes than the server, and vLLM passes no numbers of a model on. Prometheus's own way for several
processes does: each writes its counters into the folder that PROMETHEUS_MULTIPROC_DIR names, and the server reads them all.

Shapes: B batch, S sequence, D hidden size.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any

import torch
from torch import nn

from .modeling.engine_layers import keeps_layers
from .modeling.onednn_weights import OneDnnMLP
from .modeling.sparsity import Thresholds


FOLDER = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = 0.5  # between two looks at the counts, which wait for the device


class ShareMeter(nn.Module):
    """Counts, on the device, the share of its weights that one `NestedMLP` reads, added up over tokens; the first layer counts these."""

    share: torch.Tensor
    neurons: torch.Tensor  # that down reads, where what is small is left out
    tokens: torch.Tensor
    shares: torch.Tensor  # of each expert

    def __init__(self, mlp: Any, hidden_size: int, device: torch.device):
        super().__init__()
        # The trap: compilers take a float64 without dimensions for a number of Python's, and lose what is added to it.
        counts = {name: torch.zeros(1, dtype=torch.float64) for name in ("share", "neurons", "tokens")}
        for name, value in {**counts, "shares": torch.tensor(mlp.shares, dtype=torch.float64)}.items():
            self.register_buffer(name, value.to(device), persistent=False)
        self.counts_tokens = mlp.layer == 0
        inputs = 1 if mlp.layout.ungated else 2  # projections that read x
        self.of_input, self.of_neuron = inputs / (inputs + 1) / hidden_size, 1 / (inputs + 1) / mlp.widths[-1]

    def forward(self, x: torch.Tensor, expert: int | torch.Tensor, thresholds: Thresholds | None) -> None:
        """Count a pass, x (B, S, D), an index or (B, S). Where what is small is left out, `OneDnnMLP` counts what down reads."""
        share = self.shares[expert].expand(x.shape[:2])
        if thresholds is not None:
            share = (thresholds.kept_input(x) != 0).sum(-1) * share * self.of_input
        self.share.add_(share.sum())
        if self.counts_tokens:
            self.tokens.add_(x.shape[0] * x.shape[1])


class Meters:
    """
    The counts of a model's layers.

    Args:
        nested_mlps: those of this process, which count from now on.
        hidden_size, device: of the model.
        layers: of the whole model, where this process has some of them.
    """

    def __init__(self, nested_mlps: Sequence[Any], hidden_size: int, device: torch.device, layers: int):
        self.layers, self.lock = layers, Lock()
        self.of_layers = [ShareMeter(mlp, hidden_size, device) for mlp in nested_mlps]
        for mlp, meter in zip(nested_mlps, self.of_layers):
            mlp.meter = meter
            if isinstance(mlp.packed, OneDnnMLP):
                mlp.packed.neurons = meter.neurons

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Passes inside, which no one has asked for, do not count."""
        counts = [count for meter in self.of_layers for count in (meter.share, meter.neurons, meter.tokens)]
        with self.lock:
            before = [count.clone() for count in counts]
            yield
            for count, value in zip(counts, before):
                count.copy_(value)

    def totals(self) -> tuple[float, float]:
        """
        Shares of the MLPs' weights, means over the layers of the whole model, added up over tokens; and tokens, where this process
        has the first layer.
        """
        with self.lock:
            share = sum(meter.share.item() + meter.neurons.item() * meter.of_neuron for meter in self.of_layers)
            return share / self.layers, sum(meter.tokens.item() for meter in self.of_layers)

    def publish(self) -> None:
        """Keep the counters of this process up to date, in a thread."""
        from prometheus_client import Counter

        share = Counter("dynamoe:mlp_share", "Share of the MLPs' weights that a token reads, added up over tokens.")
        tokens = Counter("dynamoe:mlp_tokens", "Tokens that have passed the MLPs.")

        def write():
            before = 0.0, 0.0
            while True:
                now = self.totals()
                for counter, new, old in zip((share, tokens), now, before):
                    counter.inc(new - old)
                before = now
                time.sleep(SECONDS)

        Thread(target=write, daemon=True).start()


def are_read() -> bool:
    """Whether counters have a place where the server finds them."""
    return FOLDER in os.environ


def can_count(config: Any, nested_mlps: Sequence[Any]) -> bool:
    """Whether what is left out inside experts is counted: by `OneDnnMLP` alone."""
    nothing_left_out = config.thresholds is None or not keeps_layers(config)
    return nothing_left_out or all(isinstance(mlp.packed, OneDnnMLP) for mlp in nested_mlps)
