# SPDX-License-Identifier: Apache-2.0
"""
A dial for each request in vLLM, on a CPU: `--logits-processors dynamoe_hf.vllm_dials:RequestDials --no-enable-prefix-caching`, and in a
request `vllm_xargs={"sensitivity": 0.6}`.

vLLM hands the arguments of a request to logits processors alone, and these live in the process of the model. This one touches no
logits: it keeps the sensitivity of each place in the batch, and the model asks it for that of each token.
"""

from typing import Any, ClassVar

import torch
from vllm import ModelRegistry
from vllm.forward_context import get_forward_context
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from .modeling.checks import check_sensitivity


class RequestDials(LogitsProcessor):
    """The sensitivities that the requests of a batch ask for."""

    of_engines: ClassVar[dict[str, "RequestDials"]] = {}  # by `VllmConfig.instance_id`

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        known = {"DynaMoEForCausalLM"}.intersection(ModelRegistry.get_supported_archs())
        if not known.intersection(found := vllm_config.model_config.architectures):
            raise ValueError(
                f"`RequestDials` would not be heard: found the model {', '.join(found)}, {'with' if known else 'without'} the plug-in "
                "`dynamoe`. Serve a DynaMoE folder, with the plug-in among VLLM_PLUGINS where that is set."
            )
        self.of_places: dict[int, float] = {}
        self.of_engines[vllm_config.instance_id] = self

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise `ValueError`, which the server answers with, for a sensitivity outside (0, 1]."""
        if (sensitivity := asked(sampling_params)) is not None:
            check_sensitivity(sensitivity)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def update_state(self, batch_update: Any) -> None:
        """Follow what enters, leaves and moves in the batch; vLLM calls this before each pass."""
        process_dict_updates(self.of_places, batch_update, lambda parameters, prompt, output: asked(parameters))

    def of_tokens(self, tokens: int, default: float) -> torch.Tensor:
        """The sensitivity of each token of the pass that is running, (1, tokens) float32; `default` where none was asked for."""
        dials = torch.full((1, tokens), default)
        metadata = get_forward_context().attn_metadata
        if metadata and self.of_places:
            assert isinstance(metadata, dict), "on a CPU vLLM does not divide its batches"
            starts = next(iter(metadata.values())).query_start_loc.tolist()
            for place, sensitivity in self.of_places.items():
                dials[:, starts[place] : starts[place + 1]] = sensitivity
        return dials


def asked(sampling_params: Any) -> float | None:
    """The sensitivity that a request asks for, if it does."""
    return (sampling_params.extra_args or {}).get("sensitivity")


def are_asked(vllm_config: Any) -> bool:
    """
    Whether requests may have dials.

    Raises:
        ValueError: they may, and this engine cannot keep them apart.
    """
    if not {RequestDials, f"{__name__}:{RequestDials.__name__}"}.intersection(
        vllm_config.model_config.logits_processors or ()
    ):
        return False
    config = vllm_config.model_config.hf_config
    found = None
    if vllm_config.device_config.device.type != "cpu":
        found = f"a {vllm_config.device_config.device.type} device, whose graphs would repeat the first step's. Serve on a CPU"
    elif vllm_config.cache_config.enable_prefix_caching:
        found = "prefix caching, which would hand on what was computed with another dial. Add `--no-enable-prefix-caching`"
    elif not config.has_dial or config.force_expert is not None:
        found = f"{config.router_class.__name__} and force_expert={config.force_expert}. Convert with the profile router"
    if found:
        raise ValueError(
            f"A sensitivity for each request cannot be kept apart here: found {found}, or leave `RequestDials` out."
        )
    return True
