# SPDX-License-Identifier: Apache-2.0
"""
The dial in continuous batching: `generate_batch` of transformers runs in a thread of its own, packs the tokens of all requests into
one row, and passes nothing of ours on to `forward`.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers.generation import GenerationMixin

from .checks import DIALS, check_generation_config, check_sensitivity


class RequestDials(GenerationMixin):
    """`GenerationMixin`, whose `generate_batch` hears the dial."""

    slot: Any  # of `DynaMoEPreTrainedModel`

    def generate_batch(
        self, inputs: list[list[int]], *args, sensitivity: float | Sequence[float] | None = None, **kwargs
    ) -> dict[str, Any]:
        """
        As in transformers, and:

        Args:
            sensitivity: for this call only, a number, or one for each prompt (on a CPU). By default `config.sensitivity`.

        Raises:
            ValueError: a sensitivity outside (0, 1], more or fewer than prompts, or one together with `persistent_manager`; and
                for `density`, `force_expert` and `route`, and a dial in a generation config, which would not be heard; nor would
                `model.routing(...)`.
        """
        if unheard := sorted({"density", "force_expert", "route"} & kwargs.keys()):
            raise ValueError(
                f"`generate_batch` hears `sensitivity` alone, found {', '.join(unheard)}. Set the config, or call `generate`."
            )
        requested = self.slot.requested
        if requested.route != "router" or any(getattr(requested, name) is not None for name in (*DIALS, "force_expert")):
            raise ValueError(
                "`generate_batch` runs in a thread of its own, where `model.routing(...)` is not heard: found it around the call. Give it "
                "`sensitivity`, set the config, or call `generate`."
            )
        for config in (*args[:1], kwargs.get("generation_config"), self.generation_config):
            check_generation_config(config)
        if sensitivity is None:
            return super().generate_batch(inputs, *args, **kwargs)
        dials = self._checked_dials(sensitivity, len(inputs))
        if kwargs.get("persistent_manager"):
            raise ValueError(
                "A persistent manager would keep this call's sensitivity: found `persistent_manager=True` beside it. "
                "Use `set_sensitivity` for it."
            )
        # Not the model itself, whose other callers must not hear of it: a copy that shares all weights.
        view: Any = copy.copy(self)
        view.__dict__.pop("_cached_continuous_batching_manager", None)
        view.forward = partial(_forward, self, view, dials)
        view.init_continuous_batching = partial(_init, view)
        return super(RequestDials, view).generate_batch(inputs, *args, **kwargs)

    def _checked_dials(self, sensitivity, count) -> float | list[float]:
        alone = not isinstance(sensitivity, Sequence)
        values = [sensitivity] if alone else list(sensitivity)
        if not alone and len(values) != count:
            raise ValueError(f"`sensitivity` must be a number, or one for each of {count} prompts: found {len(values)}.")
        model: Any = self
        if not alone and model.device.type != "cpu":
            raise ValueError(
                f"`sensitivity` for each prompt needs a model on the CPU, found {model.device}: a captured graph would repeat the "
                "first step's. Give one number, or use `generate`."
            )
        for value in values:
            check_sensitivity(value)
        return float(sensitivity) if alone else [float(value) for value in values]


def _init(view, *args, **kwargs):
    view.manager = type(view).init_continuous_batching(view, *args, **kwargs)
    return view.manager


def _forward(model, view, dials, input_ids=None, **kwargs):
    if isinstance(dials, list):
        dials = of_each_token(view.manager, dials, input_ids.shape[1])
    return type(model).forward(model, input_ids=input_ids, sensitivity=dials, **kwargs)


def of_each_token(manager: Any, dials: list[float], tokens: int) -> torch.Tensor:
    """The sensitivity of each token of a packed row, (1, tokens); 1 for tokens that are only there to warm up or to pad."""
    values: list[float] = []
    for request in manager.batch_processor.inputs_and_outputs.requests_in_batch:
        index = int(request.state.request_id.removeprefix("req_").split("__")[0])
        values += [dials[index]] * request.query_length
    return torch.tensor([values + [1.0] * (tokens - len(values))])


__all__ = ["RequestDials"]
