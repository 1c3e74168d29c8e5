# SPDX-License-Identifier: Apache-2.0
"""What vLLM calls in each of its processes (entry point group `vllm.general_plugins`), so that it serves DynaMoE folders by itself."""


def register() -> None:
    """Tell vLLM and transformers of the model. It may be called again."""
    from vllm import ModelRegistry

    import dynamoe_hf.modeling  # noqa: F401  # registers with the Auto classes

    ModelRegistry.register_model("DynaMoEForCausalLM", "dynamoe_hf.vllm_model:DynaMoEForCausalLM")
