# SPDX-License-Identifier: Apache-2.0
"""
A dense model as a GGUF file, for llama.cpp. To add a family: one entry in `FAMILIES`, whose tensors llama.cpp computes as
transformers does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .gguf_tokenizer import add_tokenizer


class Family(NamedTuple):
    """What llama.cpp calls a family, and how its tensors differ from those of transformers."""

    architecture: str
    activation: str = "silu"
    paired: bool = False  # RoPE turns neighbours, not halves: the rows of q and k are in that order
    norm_offset: float = 0.0  # what transformers adds to the weight of a norm
    by_layer: str | None = None  # the architecture that computes the same with a width for each layer


FAMILIES = {
    "llama": Family("llama", paired=True, by_layer="deci"),
    "mistral": Family("llama", paired=True, by_layer="deci"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", activation="gelu_pytorch_tanh", norm_offset=1.0),
}
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # `gguf.LlamaFileType`


def check_gguf(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, by_layer: bool) -> None:
    """
    Raise `ValueError` if a dense model with this config and this tokenizer has no GGUF file, or, `by_layer`, none whose layers
    differ in width; and if the package `gguf` is missing.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ValueError(
            f"A GGUF file needs the package gguf ({error}). Install it: `pip install 'dynamoe_hf[gguf]'`."
        ) from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"There is no GGUF file of a {config.model_type} model here. Supported are {', '.join(FAMILIES)}. Export without --gguf, and "
            "use llama.cpp's own converter."
        )
    if by_layer and family.by_layer is None:
        named = ", ".join(name for name, other in FAMILIES.items() if other.by_layer)
        raise ValueError(
            f"llama.cpp has one MLP width for all layers of a {config.model_type} model. Give --width instead of --budget; widths by "
            f"layer are for {named}."
        )
    for what, found in _not_computed(config, family).items():
        raise ValueError(f"llama.cpp computes this model in another way: found {what} {found}. Export without --gguf.")
    add_tokenizer(gguf.GGUFWriter(None, family.architecture), tokenizer, config.vocab_size, [])  # refuses as when writing


def _not_computed(config, family) -> dict[str, Any]:
    """What of a config llama.cpp would leave out or compute in another way."""
    found: dict[str, Any] = {}
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != family.activation:
        found["the activation"] = activation
    for kind, rope in _ropes(config).items():
        allowed = ["default", "linear", "llama3"] if family.paired else ["default", "linear"]
        if rope.get("rope_type", "default") not in (allowed if kind == "full_attention" else ["default"]):
            found["RoPE of type"] = rope["rope_type"]
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            found["RoPE on a part of a head,"] = rope["partial_rotary_factor"]
    if family.architecture == "gemma3":
        scale = config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 62 else config.head_dim
        if config.query_pre_attn_scalar != scale:
            found["attention scaled for a head of"] = config.query_pre_attn_scalar
        if config.attn_logit_softcapping is not None:
            found["soft-capped attention at"] = config.attn_logit_softcapping
        if getattr(config, "use_bidirectional_attention", False):
            found["bidirectional attention,"] = True
    elif "sliding_attention" in (getattr(config, "layer_types", None) or []) and config.model_type != "mistral":
        found["a sliding window of"] = config.sliding_window
    return found


def _ropes(config) -> dict[str, dict]:
    """The RoPE settings of each kind of layer."""
    parameters = config.rope_parameters
    return parameters if "full_attention" in parameters else {"full_attention": parameters}


def write_gguf(
    path: Path,
    config: PreTrainedConfig,
    tensors: dict[str, torch.Tensor],
    widths: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    kind: str,
) -> None:
    """
    Write a dense model. Memory beyond the model is that of one tensor.

    Args:
        config: of the dense model; `intermediate_size` is not read.
        tensors: its state dict, MLPs cut to `widths`.
        widths: neurons of each layer's MLP.
        ends: ids of the tokens at which a text ends.
        kind: a key of `FILE_TYPES`. Vectors stay float32, and so do matrices whose rows do not divide into blocks, as float16.
    """
    import gguf

    family = FAMILIES[config.model_type]
    name = family.architecture if len(set(widths)) == 1 else family.by_layer
    assert name is not None, "`check_gguf` lets widths by layer through only where there is an architecture for them"
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    writer.add_name(path.stem)
    _add_config(writer, config, widths)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, config.vocab_size, ends)
    placed = {}
    if config.tie_word_embeddings:
        tensors = {key: tensor for key, tensor in tensors.items() if key != "lm_head.weight"}
    for key, tensor in {**tensors, **_rope_factors(config)}.items():
        target = key if key.startswith("rope_freqs") else names.get_name(key, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(
                f"llama.cpp has no place for the tensor `{key}` of a {config.model_type} model. Export without --gguf."
            )
        form = _form(tensor, kind)
        block, size = gguf.GGML_QUANT_SIZES[form]
        writer.add_tensor_info(target, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, form)
        placed[key] = (tensor, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for key, (tensor, form) in placed.items():
        values = _as_llama_cpp(key, tensor, config, family)
        if form == gguf.GGMLQuantizationType.F16 and values.abs().max() > torch.finfo(torch.float16).max:
            raise ValueError(f"`{key}` holds numbers that float16 cannot: found up to {values.abs().max():.3g}. Choose bf16.")
        writer.write_tensor_data(gguf.quantize(values.numpy(), form))
    writer.close()


def _form(tensor, kind):
    """The type in which a tensor is written."""
    import gguf

    if tensor.ndim == 1:
        return gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and tensor.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[kind.upper()]


def _as_llama_cpp(key, tensor, config, family) -> torch.Tensor:
    """A tensor with the numbers that llama.cpp expects, float32 and contiguous."""
    tensor = tensor.detach().float().cpu()
    if key.endswith("norm.weight"):
        tensor = tensor + family.norm_offset
    for projection, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if family.paired and f"{projection}." in key:
            tensor = tensor.view(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    return tensor.contiguous()


def _add_config(writer, config, widths):
    """The sizes of a model."""
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window:
        context = min(context, window)  # llama.cpp has no window here; within it, attention is the same
    ropes = _ropes(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(widths[0] if len(set(widths)) == 1 else list(widths))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(ropes["full_attention"]["rope_theta"])
    if ropes["full_attention"].get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(ropes["full_attention"]["factor"])
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _rope_factors(config) -> dict[str, torch.Tensor]:
    """What the frequencies of Llama 3's RoPE are divided by, (head size / 2,)."""
    rope = _ropes(config)["full_attention"]
    if rope.get("rope_type") != "llama3":
        return {}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float32) / len(scaled))
    return {"rope_freqs.weight": plain / scaled}
