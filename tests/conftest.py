"""Tiny random models of every family, a tiny tokenizer built in code, fixed seeds, no network."""

import os
import signal


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Tiny products gain nothing from a second thread, and on a busy machine waiting for it can cost a hundredfold.
os.environ["OMP_NUM_THREADS"] = "1"
# A shell without job control starts what runs in the background with these ignored, and so would be all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGQUIT"):
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.modeling.mlp_backends import Decision, run_experts
from dynamoe_hf.modeling.nested_mlp_triton import INTERPRETED


torch.set_num_threads(1)


def pytest_configure(config):
    """Tests put their inputs on the CPU, so where there is a GPU, stages must not see it, but for the tests that ask for one."""
    asked = config.option.markexpr.replace("not gpu", "").replace("not triton", "")
    if "gpu" not in asked and "triton" not in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


# The smallest settings that still exercise what is special about each family.
FAMILIES = {
    "llama": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                  "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {"pad_token_id": 0},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 2.0, "sliding_window": 4},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "phi3": {"pad_token_id": 0},
    "glm4": {"head_dim": 8, "pad_token_id": 0},
    "starcoder2": {"use_bias": True, "residual_dropout": 0.1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "intermediate_size": 96, "block_multiple_of": 8},
    "falcon_h1": {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
                  "mlp_multipliers": [0.9, 0.6]},
    "granitemoehybrid": {"num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"],
                         "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "gpt_neox": {"hidden_act": "gelu"},
    # GPT-2 has `Conv1D`; layers of OPT, XGLM and BioGPT have no module for their MLP.
    "gpt2": {"n_inner": 64, "activation_function": "gelu_new"},
    "gptj": {"n_inner": 64, "rotary_dim": 4},
    "opt": {"ffn_dim": 64},
    "xglm": {"ffn_dim": 64},
    "biogpt": {},
}  # fmt: skip
# Mixtures, with the smallest settings likewise. Where `first_k_dense_replace` or the like is 1, the first layer is dense.
SMALL_MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK = {**SMALL_MIXTURE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4,
            "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**SMALL_MIXTURE, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**SMALL_MIXTURE, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 8.0, "residual_multiplier": 0.5},
    "deepseek_v2": {**DEEPSEEK, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**DEEPSEEK, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "moe_layer_start_index": 1,
                     "moe_num_shared_experts": 1},
    "glm4_moe": {**SMALL_MIXTURE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4},
}  # fmt: skip
VOCABULARY = 128


def tiny_config(family="llama", **settings):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
    return AutoConfig.for_model(family, **{**sizes, **(FAMILIES | MIXTURES).get(family, {}), **settings})


def tiny_dense(family="llama", seed=0, **settings):
    """A dense model with weights large enough that its logits differ from token to token."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim in (2, 3):  # 3: of all experts of a mixture
                parameter.mul_(6)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def tiny_dynamoe(family="llama", seed=0, dense_settings=None, **settings):
    """A tiny DynaMoE whose routers disagree from token to token, so that mixed batches are really mixed."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense(family, seed, **(dense_settings or {})), **settings)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router.output." in name:
                parameter.normal_(std=3.0)
    return model


def run_mlp(mlp, x, expert, **decision):
    """A `NestedMLP` on x (B, S, D) with the experts given, (B, S) or one index for all."""
    return run_experts(x, Decision(expert, **decision), mlp.weights(x))


def tiny_tokenizer():
    """One token for each ASCII character, so that any text tokenizes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {chr(code) if 32 <= code < 127 or code == 10 else f"<{code}>": code for code in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<3>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<1>", eos_token="<2>", pad_token="<0>", unk_token="<3>"
    )


@pytest.fixture(scope="module")
def bfloat16_products():
    """The interpreter multiplies the bit patterns of bfloat16 numbers (Triton 3.7), so give it float32 ones."""
    if not INTERPRETED:
        yield
        return
    import triton
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _convert_float

    def as_float32(handle):
        if handle.dtype.scalar != triton.language.bfloat16:
            return handle
        data = _convert_float(handle.data, triton.language.bfloat16, triton.language.float32, None)
        return TensorHandle(data.view("float32"), triton.language.float32)

    plain = InterpreterBuilder.create_dot
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: plain(self, as_float32(a), as_float32(b), *rest)
    yield
    InterpreterBuilder.create_dot = plain


@pytest.fixture
def token_ids():
    torch.manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 12))


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """A tiny dense Llama with its tokenizer, saved. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    tiny_dense(num_hidden_layers=3).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """Some 24,000 characters of English, in paragraphs."""
    import pydoc_data.topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    topics = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    path.write_text(topics.encode("ascii", "ignore").decode()[:24000])
    return path
