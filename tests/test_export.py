"""Export: one width as a plain dense model, widths by layer, and GGUF files that transformers and llama.cpp read back."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import tiny_dense, tiny_tokenizer
from reference import assert_close
from tokenizers import pre_tokenizers
from tokenizers_of_bases import TEMPLATE, TOKENIZERS, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.convert import convert_model
from dynamoe_hf.export import cheapest_widths, dense_prefix, export_dense
from dynamoe_hf.folder import load_model
from dynamoe_hf.gguf_file import FAMILIES


gguf = pytest.importorskip("gguf")

FAST = {"max_tokens": 512, "block_size": 64}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# The kind of tokenizer that each family has. What transformers does not read back from a file is as its configs have it.
BASES = {
    "llama": ("smollm", ROPE),
    "mistral": ("llama2", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen2", {"tie_word_embeddings": True, "head_dim": 128}),
    "gemma3_text": ("gemma", {"query_pre_attn_scalar": 256, "head_dim": 256}),
}
TEXT = "Don't count 12345 with 3.14!  The quick  brown fox\n\n\njumps\tover <think> the lazy dog's ÄÖ 日本 🙂 we'LL see "


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, text_file):
    """Makes a tiny DynaMoE folder of a family, each once."""
    made = {}

    def make(family, kind=None, **settings):
        key = (family, kind, json.dumps(settings, sort_keys=True, default=str))
        if key not in made:
            own_kind, own = BASES.get(family, ("gpt2", {}))
            made[key] = tmp_path_factory.mktemp("folder") / family
            dense = tiny_dense(family, **{"vocab_size": 560, "num_hidden_layers": 3, **own, **settings})
            DynaMoEForCausalLM.from_dense(dense, expert_widths=[0.25, 0.5, 0.75, 1]).save_pretrained(made[key])
            tokenizer_of(kind or own_kind, text_file.read_text()).save_pretrained(made[key])
        return made[key]

    return make


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "phi3",
        "starcoder2",
        "gemma2",
        "lfm2",
        "falcon_h1",
        "granitemoehybrid",
        "gpt_neox",
        "gpt2",
        "gptj",
        "opt",
        "biogpt",
    ],
)
def test_export_is_an_ordinary_dense_model(family, tmp_path, token_ids):
    tiny_dense(family).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    convert_model(tmp_path / "dense", tmp_path / "model", **FAST)
    record = export_dense(tmp_path / "model", tmp_path / "half", width=0.5)
    assert record["mlp_width"] == 32
    small, info = AutoModelForCausalLM.from_pretrained(tmp_path / "half", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert small.config.model_type == family and type(small) is type(tiny_dense(family))
    model = load_model(tmp_path / "model")
    assert_close("logits", small(token_ids).logits, model(token_ids, force_expert=3).logits)
    assert_close("in memory", dense_prefix(model, 0.5)(token_ids).logits, small(token_ids).logits)
    with pytest.raises(ValueError, match=r"share of the MLP width in \(0, 1\]"):
        export_dense(tmp_path / "model", tmp_path / "none", width=0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", BASES)
def test_transformers_reads_the_gguf_file_back(family, kind, folder_of, tmp_path, token_ids):
    folder = folder_of(family)
    record = export_dense(folder, tmp_path / "out", width=0.75, gguf=kind)
    assert record["file"] == str(tmp_path / "out" / f"out-{kind}.gguf")
    expected = dense_prefix(load_model(folder), 0.75)
    assert record["parameters"] == sum(parameter.numel() for parameter in expected.parameters())
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file=f"out-{kind}.gguf", dtype=torch.float32)
    expected, found = expected(token_ids).logits, found(token_ids).logits
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < {"f32": 1e-5, "f16": 3e-3, "bf16": 3e-2, "q8_0": 3e-2}[kind], error


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_is_in_the_file(kind, folder_of, tmp_path):
    folder = folder_of("gemma3_text" if kind == "gemma" else "llama", kind)
    export_dense(folder, tmp_path / "out", width=0.5, gguf="f32")
    ours = AutoTokenizer.from_pretrained(folder)
    fields = gguf.GGUFReader(tmp_path / "out" / "out-f32.gguf").fields
    content = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items()}
    assert content["chat_template"] == TEMPLATE
    assert content["ggml.eos_token_id"] == ours.eos_token_id
    assert content["ggml.bos_token_id"] == ours.bos_token_id
    assert not content["ggml.add_bos_token"]
    kinds = dict(zip(content["ggml.tokens"], content["ggml.token_type"]))
    assert len(content["ggml.tokens"]) == len(kinds) == 560
    assert kinds["<s>"] == gguf.TokenType.CONTROL
    assert kinds["<think>"] == gguf.TokenType.USER_DEFINED
    assert kinds["[PAD559]"] == gguf.TokenType.UNUSED
    if kind in ("llama2", "gemma"):
        assert kinds["<0x0A>"] == gguf.TokenType.BYTE
        assert content["ggml.add_space_prefix"] == (kind == "llama2")
    if kind == "smollm":
        return  # transformers does not read that one's pattern
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="out-f32.gguf")
    # After a special token Llama 2's writes a space, and transformers makes a newer kind of it, which does not.
    text = TEXT.replace("<think>", "") if kind == "llama2" else TEXT
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]


def test_stop_tokens_of_generation_are_in_the_file(folder_of, tmp_path):
    model = load_model(folder_of("llama"))
    model.generation_config.eos_token_id = [7, 1, 9]
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder_of("llama")).save_pretrained(tmp_path / "model")
    export_dense(tmp_path / "model", tmp_path / "out", gguf="f32")
    fields = gguf.GGUFReader(tmp_path / "out" / "out-f32.gguf").fields
    assert [fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("eos", "eot", "eom")] == [1, 7, 9]


def test_numbers_beyond_float16_are_refused(folder_of, tmp_path):
    model = load_model(folder_of("llama"))
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e5
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(folder_of("llama")).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"up_proj.weight` holds numbers .* found up to 1e\+05. Choose bf16"):
        export_dense(tmp_path / "model", tmp_path / "out", gguf="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export_dense(tmp_path / "model", tmp_path / "out", gguf="bf16")


def test_several_chat_templates_are_in_the_file(folder_of, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder_of("llama"))
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "tools"}
    load_model(folder_of("llama")).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export_dense(tmp_path / "model", tmp_path / "out", gguf="f16")
    fields = gguf.GGUFReader(tmp_path / "out" / "out-f16.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == TEMPLATE
    assert fields["tokenizer.chat_template.tool_use"].contents() == "tools"


def test_the_context_of_a_window_that_llama_cpp_has_not(folder_of, tmp_path):
    """Its Mistral has no sliding window; within one, attention is the same."""
    export_dense(folder_of("mistral", sliding_window=32), tmp_path / "out", gguf="f16")
    fields = gguf.GGUFReader(tmp_path / "out" / "out-f16.gguf").fields
    assert fields["llama.context_length"].contents() == 32


def test_widths_by_layer(folder_of, tmp_path):
    folder = folder_of("llama")
    record = export_dense(folder, tmp_path / "out", budget=0.6, gguf="f32", **FAST)
    reader = gguf.GGUFReader(tmp_path / "out" / "out-f32.gguf")
    widths = reader.fields["deci.feed_forward_length"].contents()
    assert widths == record["mlp_width"]
    assert len(set(widths)) > 1
    assert sum(widths) <= 0.6 * 3 * 64
    assert set(widths) <= {16, 32, 48, 64}
    tensors, model = {tensor.name: tensor.data for tensor in reader.tensors}, load_model(folder)
    for layer, width in enumerate(widths):
        mlp = model.model.layers[layer].mlp
        assert np.array_equal(tensors[f"blk.{layer}.ffn_up.weight"], mlp.up_proj.weight[:width].detach())
        assert np.array_equal(tensors[f"blk.{layer}.ffn_down.weight"], mlp.down_proj.weight[:, :width].detach())


def test_widths_by_layer_cost_the_least():
    generator = torch.Generator().manual_seed(0)
    ladders = [[16, 32, 48, 64], [8, 64], [24, 40, 64]]
    for total in range(48, 200, 12):
        costs = [torch.rand(len(ladder), generator=generator).tolist() for ladder in ladders]
        choices = list(itertools.product(*(list(zip(*pair)) for pair in zip(costs, ladders))))
        best = min(sum(cost for cost, _ in choice) for choice in choices if sum(width for _, width in choice) <= total)
        found = cheapest_widths(costs, ladders, total)
        assert sum(found) <= total
        assert sum(row[ladder.index(width)] for row, ladder, width in zip(costs, ladders, found)) == pytest.approx(best)


def test_rope_of_llama3(folder_of, tmp_path):
    """llama.cpp divides each frequency by a factor from the file."""
    folder = folder_of("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                       "high_freq_factor": 4.0, "original_max_position_embeddings": 32})  # fmt: skip
    export_dense(folder, tmp_path / "out", gguf="f16")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "out" / "out-f16.gguf").tensors}
    plain = 1e4 ** -(torch.arange(4) / 4)
    scaled = load_model(folder).model.rotary_emb.inv_freq
    assert_close("frequencies", plain / torch.tensor(tensors["rope_freqs.weight"]), scaled)


REFUSED = {
    "family": ("phi3", {}, {}, "no GGUF file of a phi3 model"),
    "layers of a folder": ("llama", {}, {"budget": 0.5, "gguf": None}, "one MLP width for all layers"),
    "layers of a family": ("qwen3", {}, {"budget": 0.5}, "one MLP width for all layers of a qwen3"),
    "budget": ("llama", {}, {"budget": 0.1}, "smallest experts are 0.25"),
    "both": ("llama", {}, {"budget": 0.5, "width": 0.5}, "Both a width and a budget"),
    "activation": ("llama", {"hidden_act": "gelu"}, {}, "the activation gelu"),
    "RoPE": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "type dynamic"),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, {}, "sliding window of 4"),
    "scale": ("gemma3_text", {"query_pre_attn_scalar": 99}, {}, "scaled for a head of 99"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_in_another_way_is_refused(case, folder_of, tmp_path):
    family, config, settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        export_dense(folder_of(family, **config), tmp_path / "out", **{"gguf": "f32", **settings}, **FAST)
    assert not list(tmp_path.iterdir())


def test_other_tokenizers_are_refused(folder_of, tmp_path):
    model, tokenizer = load_model(folder_of("llama")), AutoTokenizer.from_pretrained(folder_of("llama"))

    def refuses(part, message):
        model.save_pretrained(tmp_path / part)
        tokenizer.save_pretrained(tmp_path / part)
        with pytest.raises(ValueError, match=message):
            export_dense(tmp_path / part, tmp_path / "out", gguf="f32")
        assert not (tmp_path / "out").exists()

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    refuses("cuts", "pre-tokenizer .*Whitespace")
    tokenizer = tiny_tokenizer()
    refuses("words", "type WordLevel")
    tokenizer = AutoTokenizer.from_pretrained(folder_of("llama", "llama2"))
    tokenizer.add_tokens(["<own>"])
    refuses("token", "added token '<own>'")
    tokenizer = AutoTokenizer.from_pretrained(folder_of("llama", "llama2"))
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["model"]["merges"] = definition["model"]["merges"][::2]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(definition))
    refuses("merges", "not those of a SentencePiece model")


def test_the_missing_package_is_named(folder_of, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'dynamoe_hf\[gguf\]'"):
        export_dense(folder_of("llama"), tmp_path / "out", gguf="f32")


LLAMA_CPP = """
import json, sys
import numpy as np
import llama_cpp
path, ids, text = json.load(sys.stdin)
model = llama_cpp.Llama(path, n_ctx=256, n_batch=1, n_ubatch=1, n_threads=1, type_k=0, type_v=0, verbose=False)
rows = []
for token in ids:
    model.eval([token])
    rows.append(np.ctypeslib.as_array(llama_cpp.llama_get_logits(model.ctx), (model.n_vocab(),)).tolist())
print(json.dumps([rows, model.tokenize(text.encode(), add_bos=False, special=True)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [*FAMILIES, "llama, rope", "llama, linear", "llama, layers", *(f"llama, {kind}" for kind in TOKENIZERS)]
)
def test_llama_cpp_computes_the_same(family, folder_of, tmp_path):
    """Logits of one token after another, and token ids. `LLAMA_PYTHON` names the Python of another environment that has llama.cpp."""
    python = os.environ.get("LLAMA_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not installed")
    family, _, what = family.partition(", ")
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    ropes = {"rope": rope, "linear": linear}
    # With twelve layers one in six has no window, with another RoPE.
    settings = (
        {"num_hidden_layers": 12} if family == "gemma3_text" else {"rope_parameters": ropes[what]} if what in ropes else {}
    )
    folder = folder_of(family, what if what in TOKENIZERS else None, **settings)
    size = {"budget": 0.6, **FAST} if what == "layers" else {"width": 0.75}
    record = export_dense(folder, tmp_path / "out", gguf="f32", **size)
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    expected = dense_prefix(model, 1.0 if what == "layers" else 0.75)
    if what == "layers":
        with torch.no_grad():
            for layer, width in zip(expected.model.layers, record["mlp_width"]):
                layer.mlp.down_proj.weight[:, width:] = 0
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    request = json.dumps([record["file"], ids[0].tolist(), TEXT])
    answer = subprocess.run([python, "-c", LLAMA_CPP], input=request, capture_output=True, text=True, check=True).stdout
    rows, tokens = json.loads(answer)
    assert tokens == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = expected(ids).logits[0]
    error = ((torch.tensor(rows) - logits).norm() / logits.norm()).item()
    assert error < 2e-3, error  # it looks GELU up in a table of float16
