"""Conversion: order, proof of parity, folder; and that bad input leaves nothing behind."""

import copy
import json
import shutil
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_dense, tiny_tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from reference import assert_close
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from dynamoe_hf import (
    DynaMoEForCausalLM,
    calibrate_budgets,
    convert,
    evaluate_model,
    export_dense,
    importance,
    kept_sums,
    publish_model,
    train_model,
)
from dynamoe_hf.convert import convert_model, load_dense, prove_parity
from dynamoe_hf.folder import load_model, read_json, write_json
from dynamoe_hf.importance import IMPORTANCES
from dynamoe_hf.modeling.configuration_dynamoe import FORMAT_VERSION
from dynamoe_hf.observe import loss_backward


FAST = {"max_tokens": 512, "block_size": 64}


@pytest.fixture(scope="module")
def converted(dense_folder, tmp_path_factory):
    """A converted tiny Llama. Treat it as read-only."""
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_model(dense_folder, out, **FAST)
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_reordering_changes_nothing_at_full_width(family, token_ids):
    dense = tiny_dense(family)
    expected = dense(token_ids).logits
    model = DynaMoEForCausalLM.from_dense(dense)
    for mlp in model.nested_mlps:
        mlp.layout.reorder(mlp, torch.randperm(64))
    assert_close(family, model(token_ids).logits, expected, atol=1e-4)
    assert not torch.allclose(model(token_ids, force_expert=0).logits, expected, atol=1e-2), "the MLPs do nothing here"


def test_reordering_puts_neurons_in_the_asked_order():
    model = DynaMoEForCausalLM.from_dense(tiny_dense("phi3"))
    mlp = model.model.layers[0].mlp
    before, order = copy.deepcopy(mlp), torch.randperm(64)
    mlp.layout.reorder(mlp, order)
    assert torch.equal(mlp.down_proj.weight, before.down_proj.weight[:, order])
    assert torch.equal(mlp.gate_up_proj.weight[:64], before.gate_up_proj.weight[:64][order])
    assert torch.equal(mlp.gate_up_proj.weight[64:], before.gate_up_proj.weight[64:][order])


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_importance_ranks_a_silent_neuron_last_and_a_loud_one_first(importance, token_ids):
    dense = tiny_dense()
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.up_proj.weight[7] = 0
            layer.mlp.up_proj.weight[9] *= 30
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    for scores in IMPORTANCES[importance](dense, token_ids):
        assert scores.shape == (64,)
        assert scores[7] == 0 == scores.min()
        assert scores.argmax() == 9
    assert all(torch.equal(before[name], parameter) for name, parameter in dense.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in dense.parameters())


@pytest.mark.parametrize("importance", ["taylor", "taylor_share"])
def test_taylor_equals_autograd(importance, token_ids):
    dense = tiny_dense()
    scores, kept = IMPORTANCES[importance](dense, token_ids), []
    layer = dense.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: (args[0].retain_grad(), kept.append(args[0]))[0])
    expected = 0
    for row in token_ids:
        logits = dense(row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        effect = (kept[-1] * kept[-1].grad)[0, 4:].abs().double()
        # Nothing follows the last token, so it has no gradient, and no share to divide.
        expected = expected + (effect if importance == "taylor" else effect[:-1] / effect[:-1].sum(-1, keepdim=True)).sum(0)
    assert_close(importance, scores[1], expected.detach(), rtol=1e-3)


def test_folder_holds_the_proof_and_the_dial(converted, dense_folder, token_ids):
    record = json.loads((converted / "conversion.json").read_text())
    assert record["base"] == dense_folder.name, "a record travels, so it names no place on this machine"
    assert record["parity"]["largest_relative_difference"] < 1e-5
    model = load_model(converted)
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    assert_close("logits", model(token_ids).logits, dense(token_ids).logits, atol=1e-4)
    assert len(model.config.error_weights) == 3
    low, high = model.config.train_sensitivity
    assert 0 < low < high <= 1


def test_dense_checkpoint_plus_routers(converted, dense_folder):
    """Nothing is added but routers, and nothing changes but the order of neurons."""
    ours, theirs = load_model(converted).state_dict(), AutoModelForCausalLM.from_pretrained(dense_folder).state_dict()
    assert {name for name in ours if ".router." not in name} == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name].sort().values if ".mlp." not in name else ours[name].flatten().sort().values,
                           tensor.sort().values if ".mlp." not in name else tensor.flatten().sort().values), name  # fmt: skip


def test_bfloat16_base(dense_folder, tmp_path, token_ids):
    record = convert_model(dense_folder, tmp_path / "model", dtype="bfloat16", **FAST)
    assert record["parity"]["largest_relative_difference"] < record["parity"]["bound"] < 0.1
    assert load_model(tmp_path / "model").dtype == torch.bfloat16


def test_widths_and_argmax(dense_folder, tmp_path):
    convert_model(dense_folder, tmp_path / "a", widths=(0, 0.5, 1), router_type="argmax", similarity="projection", **FAST)
    model = load_model(tmp_path / "a")
    assert model.model.layers[0].mlp.widths == [0, 32, 64]
    assert model.config.train_sensitivity[0] == model.config.train_sensitivity[1]
    convert_model(dense_folder, tmp_path / "b", widths=[[0.25, 1], [0.5, 1], [0.75, 1]], **FAST)
    assert [layer.mlp.widths[0] for layer in load_model(tmp_path / "b").model.layers] == [16, 32, 48]


def write_gguf(path, dense, left_out=()):
    """A GGUF file of a tiny Llama and a vocabulary of ASCII, as llama.cpp would write it."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    c = dense.config
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    vocabulary = [chr(33 + i) for i in range(94)] + ["ab"] + [f"<filler {i}>" for i in range(c.vocab_size - 95)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
             "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "lm_head": "output"}  # fmt: skip
    for name, parameter in dense.named_parameters():
        if name in left_out:
            continue
        parts = name.removesuffix(".weight").removeprefix("model.").split(".", 2)
        target = f"blk.{parts[1]}.{names[parts[2]]}" if parts[0] == "layers" else names[parts[0]]
        array = parameter.detach().numpy()
        if target.endswith(("attn_q", "attn_k")):  # llama.cpp interleaves the halves of each head
            heads = c.num_attention_heads if target.endswith("attn_q") else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{target}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_llama(seed=0):
    return tiny_dense("llama", seed, rope_parameters=None)


def test_gguf_base(tmp_path, token_ids):
    """A GGUF file made here from a tiny Llama; transformers dequantises it and then refuses to save the result."""
    dense = gguf_llama()
    write_gguf(tmp_path / "tiny.gguf", dense)
    loaded, _ = load_dense(tmp_path)
    assert_close("dequantised", loaded(token_ids).logits, dense(token_ids).logits)
    (tmp_path / "text.txt").write_text("abcdefgh" * 400)
    convert_model(tmp_path, tmp_path / "out", text=tmp_path / "text.txt", **FAST)
    assert_close("converted", load_model(tmp_path / "out")(token_ids).logits, dense(token_ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size >= dense.config.vocab_size


def test_one_of_several_gguf_files_is_asked_for(tmp_path, token_ids):
    base, dense = tmp_path / "base", gguf_llama()
    base.mkdir()
    (tmp_path / "text.txt").write_text("abcdefgh" * 400)
    write_gguf(base / "model-Q2_K.gguf", gguf_llama(seed=5))
    write_gguf(base / "model-f32.GGUF", dense)
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, found model-Q2_K.gguf, model-f32.GGUF. Give the path of one"):
        convert_model(base, tmp_path / "out", text=tmp_path / "text.txt", **FAST)
    record = convert_model(base / "model-f32.GGUF", tmp_path / "out", text=tmp_path / "text.txt", **FAST)
    assert (record["base"], record["gguf_file"]) == ("base", "model-f32.GGUF")
    assert record == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert_close("converted", load_model(tmp_path / "out")(token_ids).logits, dense(token_ids).logits)


def test_a_part_of_a_gguf_model_is_refused(tmp_path):
    left_out = "model.layers.1.mlp.up_proj.weight"
    write_gguf(tmp_path / "m-00001-of-00002.gguf", gguf_llama(), {left_out})
    with pytest.raises(
        ValueError, match=rf"m-00001-of-00002.gguf are not those of its config: found tensors 1 missing \({left_out}"
    ):
        load_dense(tmp_path)


@pytest.mark.parametrize("target", ["q_proj", "up_proj"])
def test_adapters_left_beside_merged_weights(target, dense_folder, tmp_path, token_ids):
    """transformers puts them on top of the weights, once more, and saves adapters alone afterwards. What they made is converted."""
    config = LoraConfig(target_modules=[target], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(dense_folder), config).eval()
    expected = wrapped(token_ids).logits
    wrapped.save_pretrained(tmp_path / "tuned")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    convert_model(tmp_path / "tuned", tmp_path / "out", **FAST)
    assert_close("converted", load_model(tmp_path / "out")(token_ids).logits, expected)


@pytest.mark.parametrize("beside", ["base", "other weights", "no base"])
def test_adapters_beside_weights_that_they_did_not_make_are_refused(beside, dense_folder, tmp_path):
    """They may belong on top of the weights, or be left over: who knows is asked."""
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(dense_folder), config)
    if beside == "no base":
        wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    wrapped.save_pretrained(tmp_path / "tuned")
    merged = wrapped.merge_and_unload()
    weights = {
        "base": AutoModelForCausalLM.from_pretrained(dense_folder),
        "other weights": tiny_dense(num_hidden_layers=3, seed=7),
    }
    weights.get(beside, merged).save_pretrained(tmp_path / "tuned")
    tiny_tokenizer().save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="holds adapters beside its weights.* delete the files adapter_"):
        convert_model(tmp_path / "tuned", tmp_path / "out", **FAST)
    assert not (tmp_path / "out").exists()


def test_adapters_of_the_dense_base_are_refused_on_neurons_in_another_order(converted, dense_folder, tmp_path, token_ids):
    """Wherever they come in; those on attention fit, as do those that were trained on the converted model."""
    for name, targets, source in (
        ("attention", ["q_proj"], dense_folder),
        ("mlp", ["q_proj", "down_proj"], dense_folder),
        ("own", ["down_proj"], converted),
    ):
        config = LoraConfig(target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(source), config).save_pretrained(tmp_path / name)
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(dense_folder), tmp_path / "attention")(
        token_ids
    ).logits
    attention = PeftModel.from_pretrained(load_model(converted), tmp_path / "attention")
    assert_close("attention", attention(token_ids).logits, expected)
    PeftModel.from_pretrained(load_model(converted), tmp_path / "own")
    native = load_model(converted)
    native.load_adapter(str(tmp_path / "attention"))
    assert_close("attention by transformers", native(token_ids).logits, expected)
    for load in (
        lambda: PeftModel.from_pretrained(load_model(converted), tmp_path / "mlp"),
        lambda: attention.load_adapter(tmp_path / "mlp", "second"),
        lambda: load_model(converted).load_adapter(str(tmp_path / "mlp")),
    ):
        with pytest.raises(ValueError, match=r"neurons have another order: found '\w+', trained on .*tiny-llama"):
            load()
    # In memory nothing has been reordered.
    unordered = DynaMoEForCausalLM.from_dense(AutoModelForCausalLM.from_pretrained(dense_folder))
    PeftModel.from_pretrained(unordered, tmp_path / "mlp")


def test_parity_is_that_of_the_written_folder(dense_folder, tmp_path, monkeypatch):
    def damaged(model, folder, **options):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0] += 1
        return save(model, folder, **options)

    save = DynaMoEForCausalLM.save_pretrained
    monkeypatch.setattr(DynaMoEForCausalLM, "save_pretrained", damaged)
    with pytest.raises(ValueError, match="does not equal its dense base"):
        convert_model(dense_folder, tmp_path / "out", **FAST)
    assert not list(tmp_path.iterdir())


FAULTS = {
    "missing": ({"model.layers.1.mlp.up_proj.weight": None}, r"found tensors 1 missing \(model.layers.1.mlp.up_proj.weight\)"),
    "unknown": ({"model.layers.9.x": torch.ones(2)}, r"found tensors 1 unknown to the model \(model.layers.9.x\)"),
    "shape": ({"model.norm.weight": torch.ones(5)}, r"found tensors 1 of another shape \(model.norm.weight \(5,\), not \(32,\)\)"),
    "head": ({"lm_head.weight": None}, r"found tensors 1 missing \(lm_head.weight\)"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=list(FAULTS))
def test_weights_that_are_not_the_configs_are_refused_by_every_stage(changes, message, converted, dense_folder, tmp_path):
    """transformers would fill what is missing with random numbers."""
    for source, name in ((dense_folder, "dense"), (converted, "model")):
        shutil.copytree(source, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors") | changes
        weights = {key: tensor for key, tensor in weights.items() if tensor is not None}
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    model, dense, out = tmp_path / "model", tmp_path / "dense", tmp_path / "out"
    record = read_json(model / "conversion.json")
    write_json(model / "conversion.json", {name: value for name, value in record.items() if name != "weights"})  # no digests
    for stage in (
        lambda: load_model(model),
        lambda: convert_model(dense, out, **FAST),
        lambda: calibrate_budgets(model, **FAST),
        lambda: evaluate_model(model, **FAST),
        lambda: evaluate_model(converted, base=dense, **FAST),
        lambda: export_dense(model, out),
        lambda: publish_model(model, "me/model", dry_run=True, out=out),
        lambda: train_model(model, out),
    ):
        with pytest.raises(ValueError, match=message):
            stage()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "model"]


def test_parity_is_refused_where_it_fails():
    expected = torch.randn(2, 8, 32)
    assert prove_parity(expected, expected, torch.float32)["largest_relative_difference"] == 0
    with pytest.raises(ValueError, match="does not equal its dense base"):
        prove_parity(expected, expected + 0.01, torch.float32)
    with pytest.raises(ValueError, match="does not equal its dense base"):
        prove_parity(expected, expected * float("nan"), torch.float32)


def test_a_family_that_would_be_wrong_is_refused(tmp_path, monkeypatch):
    """As if a family's MLP did something that its module names do not tell."""
    dense = tiny_dense()
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(type(dense.model.layers[0].mlp), "forward",
                        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + 0.1 * x)  # fmt: skip
    with pytest.raises(ValueError, match="does not equal its dense base"):
        convert_model(tmp_path / "dense", tmp_path / "out", **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


class TestBadInput:
    """Each is told in words, and nothing is left in the output folder."""

    def refused(self, tmp_path, message, base, error=ValueError, **settings):
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(error, match=message):
            convert_model(base, tmp_path / "out", **{**FAST, **settings})
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    def test_existing_output(self, dense_folder, tmp_path):
        (tmp_path / "out").mkdir()
        self.refused(tmp_path, "exists already", dense_folder, FileExistsError)

    def test_not_a_causal_model(self, tmp_path):
        BertModel(
            BertConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        ).save_pretrained(tmp_path / "bert")
        tiny_tokenizer().save_pretrained(tmp_path / "bert")
        self.refused(tmp_path, "not a causal language model|not at `model.layers", tmp_path / "bert")

    @pytest.mark.parametrize(
        ("family", "message"), [("llama4_text", "family llama4_text is not supported"), ("mpt", "not at `model.layers")]
    )
    def test_families(self, family, message, tmp_path, monkeypatch):
        AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path / family)
        tiny_tokenizer().save_pretrained(tmp_path / family)
        for name in IMPORTANCES:
            monkeypatch.setitem(IMPORTANCES, name, lambda *args: pytest.fail("ranked neurons before looking at the family"))
        self.refused(tmp_path, message, tmp_path / family)

    def test_already_dynamoe(self, converted, tmp_path):
        self.refused(tmp_path, "DynaMoE model already", converted)

    def test_no_such_folder(self, tmp_path):
        self.refused(tmp_path, "neither a model folder nor a model on the Hub", str(tmp_path / "nowhere"))
        (tmp_path / "empty").mkdir()
        self.refused(tmp_path, r"no config\.json", tmp_path / "empty")

    def test_nan_weights(self, dense_folder, tmp_path):
        dense = AutoModelForCausalLM.from_pretrained(dense_folder)
        dense.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
        dense.save_pretrained(tmp_path / "nan")
        tiny_tokenizer().save_pretrained(tmp_path / "nan")
        self.refused(tmp_path, r"NaN or infinite numbers in `model\.layers\.1\.mlp\.up_proj\.weight`", tmp_path / "nan")

    def test_truncated_weights(self, dense_folder, tmp_path):
        shutil.copytree(dense_folder, tmp_path / "cut")
        weights = tmp_path / "cut" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
        self.refused(tmp_path, "is damaged", tmp_path / "cut")

    def test_settings(self, dense_folder, tmp_path):
        self.refused(tmp_path, "must rise", dense_folder, widths=(0.5, 0.25, 1))
        self.refused(tmp_path, "exactly 1", dense_folder, widths=(0.25, 0.5))
        self.refused(tmp_path, "importance 'magic' is unknown", dense_folder, importance="magic")
        self.refused(tmp_path, "`router_dim` must be a whole number of at least 1, found -3", dense_folder, router_dim=-3)

    def test_short_text(self, dense_folder, tmp_path):
        (tmp_path / "short.txt").write_text("too short")
        self.refused(tmp_path, "too short", dense_folder, text=tmp_path / "short.txt")
        (tmp_path / "short.txt").write_text("")
        self.refused(tmp_path, "is empty", dense_folder, text=tmp_path / "short.txt")

    def test_newer_format(self, converted, tmp_path):
        shutil.copytree(converted, tmp_path / "newer")
        config = tmp_path / "newer" / "config.json"
        config.write_text(config.read_text().replace(f'"format_version": {FORMAT_VERSION}', '"format_version": 99'))
        with pytest.raises(ValueError, match=rf"format_version=99.*reads 1 to {FORMAT_VERSION}"):
            load_model(tmp_path / "newer")

    def test_full_disk(self, dense_folder, tmp_path):
        """A process whose files may not grow beyond 20 kB: as on a full disk, the write itself fails."""
        code = (
            "import resource, signal, sys; import torch; torch.set_num_threads(1)\n"
            "from dynamoe_hf.convert import convert_model\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
            f"convert_model({str(dense_folder)!r}, {str(tmp_path / 'out')!r}, max_tokens=512, block_size=64)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode, "the limit was not felt"
        assert "too large" in result.stderr or "OSError" in result.stderr, result.stderr[-500:]
        assert [path.name for path in tmp_path.iterdir()] == ["out.ranking.safetensors"], "something half-written was left"


@pytest.mark.slow
def test_peak_memory(tmp_path):
    """Converting may take the loaded model, one layer and activations, not a second model."""
    code = """
import resource, sys, torch
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, "tests")
if sys.argv[1] == "make":
    config = LlamaConfig(vocab_size=128, hidden_size=1024, intermediate_size=6144, num_hidden_layers=16, num_attention_heads=8)
    LlamaForCausalLM(config).save_pretrained(sys.argv[2])
    from conftest import tiny_tokenizer
    tiny_tokenizer().save_pretrained(sys.argv[2])
elif sys.argv[1] == "load":
    from dynamoe_hf.convert import load_dense
    load_dense(sys.argv[2])
else:
    from dynamoe_hf.convert import convert_model
    convert_model(sys.argv[2], sys.argv[3], max_tokens=512, block_size=64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

    def peak(*args):
        command = [sys.executable, "-c", code, *map(str, args)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])

    peak("make", tmp_path / "dense")
    size = (tmp_path / "dense" / "model.safetensors").stat().st_size / 2**20
    loaded, converted = peak("load", tmp_path / "dense"), peak("convert", tmp_path / "dense", tmp_path / "out")
    layer = size / 16
    assert size > 1300
    assert converted < loaded + 2 * layer + 100, (
        f"model {size:.0f} MiB: loading peaks at {loaded:.0f}, converting at {converted:.0f}"
    )


class TestResume:
    """What a killed conversion has measured is kept, and used by the same conversion alone."""

    @pytest.fixture
    def killed(self, dense_folder, tmp_path, monkeypatch):
        """A conversion that ended in its fourth block; the sums over three are kept."""
        monkeypatch.setattr(kept_sums, "SECONDS", 0)
        monkeypatch.setattr(importance, "loss_backward", self.counted(ends_in=4))
        with pytest.raises(KeyboardInterrupt):
            convert_model(dense_folder, tmp_path / "out", **FAST)
        assert [path.name for path in tmp_path.iterdir()] == ["out.ranking.safetensors"]
        return tmp_path / "out"

    def counted(self, ends_in=None):
        self.blocks = 0

        def backward(*args):
            self.blocks += 1
            if self.blocks == ends_in:
                raise KeyboardInterrupt
            loss_backward(*args)

        return backward

    @pytest.mark.parametrize("failed_later", [False, True])
    def test_goes_on_and_gives_the_same(self, failed_later, killed, converted, dense_folder, monkeypatch):
        monkeypatch.setattr(importance, "loss_backward", self.counted())
        if failed_later:
            with monkeypatch.context() as patch:
                patch.setattr(convert, "scale_difficulty", Mock(side_effect=OSError("the disk is full")))
                with pytest.raises(OSError, match="full"):
                    convert_model(dense_folder, killed, **FAST)
        record = convert_model(dense_folder, killed, **FAST)
        assert self.blocks == 8 - 3, "512 tokens are eight blocks, of which three had been measured"
        assert record == read_json(converted / "conversion.json"), "the digests of the weights are in it"
        assert [path.name for path in killed.parent.iterdir()] == ["out"]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"importance": "taylor"}, "found importance taylor_share, and now taylor"),
            ({"max_tokens": 256}, r"found text 512 tokens in blocks of 64 \(\w{12}\), and now 256 tokens"),
            ({"dtype": "bfloat16"}, r"found weights float32 \(\w{12}\), and now bfloat16"),
        ],
    )
    def test_other_settings_are_refused(self, settings, message, killed, dense_folder):
        kept = killed.with_name("out.ranking.safetensors")
        before = kept.read_bytes()
        with pytest.raises(
            FileExistsError, match=f"keeps what another conversion has measured: {message}.* or delete it to begin anew"
        ):
            convert_model(dense_folder, killed, **{**FAST, **settings})
        assert kept.read_bytes() == before and not killed.exists()

    def test_a_disk_that_is_full_by_then(self, killed, dense_folder, tmp_path, monkeypatch):
        kept = killed.with_name("out.ranking.safetensors")
        before = kept.read_bytes()
        monkeypatch.setattr(kept_sums.os, "fsync", Mock(side_effect=OSError(28, "No space left on device", "somewhere")))
        with pytest.raises(OSError, match="out.ranking.safetensors cannot be written: No space left on device"):
            convert_model(dense_folder, killed, **FAST)
        assert [path.name for path in tmp_path.iterdir()] == [kept.name] and kept.read_bytes() == before

    def test_other_weights_and_damage_are_refused(self, killed, dense_folder, tmp_path):
        tiny_dense(num_hidden_layers=3, seed=1).save_pretrained(tmp_path / "other")
        tiny_tokenizer().save_pretrained(tmp_path / "other")
        with pytest.raises(FileExistsError, match=r"found weights float32 \(\w{12}\), and now float32"):
            convert_model(tmp_path / "other", killed, **FAST)
        kept = killed.with_name("out.ranking.safetensors")
        kept.write_bytes(kept.read_bytes()[:100])
        with pytest.raises(FileExistsError, match="found importance None, and now taylor_share"):
            convert_model(dense_folder, killed, **FAST)
