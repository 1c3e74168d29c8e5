# SPDX-License-Identifier: Apache-2.0
"""The files that travel to the Hub with every model. This one does not travel: it registers them with the Auto classes."""

from peft.utils import constants
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_dynamoe import DynaMoEConfig
from .modeling_dynamoe import DynaMoEForCausalLM, DynaMoEModel


AutoConfig.register("dynamoe", DynaMoEConfig, exist_ok=True)
AutoModel.register(DynaMoEConfig, DynaMoEModel, exist_ok=True)
AutoModelForCausalLM.register(DynaMoEConfig, DynaMoEForCausalLM, exist_ok=True)
# `save_pretrained` then copies the code beside the weights and writes `auto_map`.
DynaMoEConfig.register_for_auto_class()
DynaMoEModel.register_for_auto_class("AutoModel")
DynaMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
# What PEFT adapts by default. Its tables are read by the model type, so all bases get what Llama has, or GPT-NeoX and GPT-2 under their
# own names.
for name, table in vars(constants).items():
    if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING") and "llama" in table:
        table.setdefault("dynamoe", [*table["llama"], *table.get("gpt_neox", ()), *table.get("gpt2", ())])

__all__ = ["DynaMoEConfig", "DynaMoEForCausalLM", "DynaMoEModel"]
