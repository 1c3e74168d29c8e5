"""Plans from configs alone: published sizes, arithmetic that follows from them, and a training that was measured."""

import json
from pathlib import Path

import pytest
from conftest import tiny_config
from transformers import AutoConfig

from dynamoe_hf import plan_base
from dynamoe_hf.arguments import HARDWARE
from dynamoe_hf.cli import main
from dynamoe_hf.evaluate import count_parameters
from dynamoe_hf.folder import load_model


def sizes(vocab, hidden, mlp, layers, heads, kv, tied, **more):
    return {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "tie_word_embeddings": tied, **more}  # fmt: skip


# The configs' numbers on the Hub, and the numbers of parameters on the model pages.
PUBLISHED = {
    "Llama-3.2-1B": ("llama", sizes(128256, 2048, 8192, 16, 32, 8, True, head_dim=64), 1_235_814_400),
    "Llama-3.1-8B": ("llama", sizes(128256, 4096, 14336, 32, 32, 8, False), 8_030_261_248),
    "Llama-2-7b": ("llama", sizes(32000, 4096, 11008, 32, 32, 32, False), 6_738_415_616),
    "TinyLlama-1.1B": ("llama", sizes(32000, 2048, 5632, 22, 32, 4, False), 1_100_048_384),
    "SmolLM2-135M": ("llama", sizes(49152, 576, 1536, 30, 9, 3, True), 134_515_008),
    "SmolLM2-1.7B": ("llama", sizes(49152, 2048, 8192, 24, 32, 32, True), 1_711_376_384),
    "Mistral-7B-v0.1": ("mistral", sizes(32000, 4096, 14336, 32, 32, 8, False), 7_241_732_096),
    "Qwen2.5-0.5B": ("qwen2", sizes(151936, 896, 4864, 24, 14, 2, True), 494_032_768),
    "Qwen2.5-7B": ("qwen2", sizes(152064, 3584, 18944, 28, 28, 4, False), 7_615_616_512),
    "Qwen3-0.6B": ("qwen3", sizes(151936, 1024, 3072, 28, 16, 8, True, head_dim=128), 596_049_920),
    "gemma-2-2b": ("gemma2", sizes(256000, 2304, 9216, 26, 8, 4, True, head_dim=256), 2_614_341_888),
    "gemma-3-270m": ("gemma3_text", sizes(262144, 640, 2048, 18, 4, 1, True, head_dim=256), 268_098_176),
    "Phi-3-mini": ("phi3", sizes(32064, 3072, 8192, 32, 32, 32, False), 3_821_079_552),
}


def config_of(name, folder):
    family, numbers, _ = PUBLISHED[name]
    AutoConfig.for_model(family, **numbers).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    family, numbers, published = PUBLISHED[name]
    plan = plan_base(config_of(name, tmp_path), budgets=[0.5, 1])
    assert plan["family"] == family and plan["parameters"]["total"] == published
    mlps = 3 * numbers["hidden_size"] * numbers["intermediate_size"] * numbers["num_hidden_layers"]
    assert plan["parameters"]["mlp"] == mlps, "none of these families has biases there"
    assert plan["budgets"]["1"]["active_parameters"] == published
    assert plan["budgets"]["0.5"]["active_parameters"] == published - mlps // 2
    assert plan["budgets"]["0.5"]["bytes"] == 4 * (published - mlps // 2)
    assert 0 < plan["parameters"]["router"] < 0.03 * mlps


def test_flops_memory_and_hours(tmp_path):
    """By hand, for Llama-3.1-8B in bfloat16 on eight H100."""
    folder = config_of("Llama-3.1-8B", tmp_path)
    settings = {"tokens": 10**9, "devices": 8, "dtype": "bfloat16", "block_size": 1024, "utilisation": 0.4}
    plan = plan_base(folder, hardware="h100", **settings)
    total, router = 8_030_261_248, plan["parameters"]["router"]
    table, attention = 128256 * 4096, 2 * 32 * 1024 * 4096
    full = 2 * (total - table + router) + attention
    assert plan["budgets"]["1"]["forward_flops"] == full
    assert plan["budgets"]["0.5"]["forward_flops"] == full - plan["parameters"]["mlp"]
    student = full - 2 * 0.325 * plan["parameters"]["mlp"]
    training = plan["training"]
    assert training["flops_per_token"] == pytest.approx(3 * student + full)
    assert training["flops"] == training["flops_per_token"] * 10**9
    assert training["hours"] == pytest.approx(training["flops"] / (8 * 989e12 * 0.4) / 3600, rel=1e-3)
    assert plan["budgets"]["1"]["decoded_tokens_per_second"] == pytest.approx(3350e9 / (2 * (total - table)), rel=1e-3)
    whole, divided = plan["memory"]["whole"], plan["memory"]["divided"]
    assert whole["weights"] == whole["teacher"] == 2 * (total + router)
    assert whole["optimizer"] == 2 * whole["gradients"] == 4 * (total + router - 2 * table)
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert divided[name] == pytest.approx(whole[name] / 8, abs=8)
    assert divided["activations"] == whole["activations"] and whole["total"] == sum(whole.values()) - whole["total"]
    again = plan_base(folder, hardware="h100", gradient_checkpointing=True, **settings)
    assert again["memory"]["whole"]["activations"] < whole["activations"] / 2
    assert again["training"]["flops_per_token"] == pytest.approx(4 * student + full)
    slower = plan_base(folder, tflops=98.9, bandwidth=335, **settings)
    assert slower["training"]["hours"] == pytest.approx(10 * training["hours"], rel=1e-3)
    unknown = plan_base(folder, **settings)
    assert "hours" not in unknown["training"] and "decoded_tokens_per_second" not in unknown["budgets"]["1"]


def test_a_training_that_was_measured(tmp_path):
    """benchmarks/training.py on SmolLM2-135M: memory within a fifth; time, beside that of a dense step, within a third."""
    record = json.loads((Path(__file__).parent.parent / "benchmarks/results/training_amd-epyc_202611.json").read_text())
    measured, shape = record["rows"]["recipe"], (record["batch_size"], record["block_size"])
    plan = plan_base(config_of("SmolLM2-135M", tmp_path), batch_size=shape[0], block_size=shape[1])
    assert plan["memory"]["whole"]["total"] == pytest.approx(measured["peak_bytes"], rel=0.2)
    ratio = plan["training"]["flops_per_token"] / (3 * plan["budgets"]["1"]["forward_flops"])
    assert ratio == pytest.approx(measured["ratio"], rel=1 / 3)


def test_a_plan_of_a_model_folder_is_that_of_its_base(dense_folder, tmp_path):
    from dynamoe_hf import convert_model

    convert_model(dense_folder, tmp_path / "model", max_tokens=512, block_size=64)
    plans = [plan_base(folder) for folder in (dense_folder, tmp_path / "model", dense_folder / "config.json")]
    counts = count_parameters(load_model(tmp_path / "model"))
    for plan in plans:
        del plan["base"]
        assert plan == plans[0]
        assert plan["parameters"]["total"] == counts["total"] - counts["router"]


def test_the_command_reads_no_weights(tmp_path, capsys):
    tiny_config("qwen3").save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--tokens", "1000000", "--hardware", "h100"]) == 0
    told = capsys.readouterr().out
    assert "Training on 1,000,000 tokens" in told and "hours" in told and "989 TFLOPS" in told and str(tmp_path) not in told
    assert main(["plan", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "qwen3"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hardware": "abacus"}, "unknown: found 'abacus'. Choose one of a100, h100"),
        ({"hardware": "h100", "tflops": 1.0}, "Give one of them"),
        ({"tflops": 0.0}, "`tflops` must be a finite number above 0"),
        ({"bandwidth": float("nan")}, "`bandwidth` must be a finite number above 0"),
        ({"budgets": [0.0, 0.5]}, r"in \(0, 1\], found 0 to 0.5"),
        ({"dtype": "int3"}, "dtype"),
        ({"tokens": 0}, "`tokens` must be"),
    ],
)
def test_what_cannot_be_planned(settings, message, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        plan_base(tmp_path, **settings)


def test_a_mixture_has_idle_experts(tmp_path):
    """Mixtral-8x7B: 46.7 billion parameters, of which a token uses 12.9."""
    AutoConfig.for_model("mixtral").save_pretrained(tmp_path / "mixtral")
    plan = plan_base(tmp_path / "mixtral", budgets=(0.5, 1.0))
    assert plan["parameters"]["total"] == 46_702_792_704
    assert plan["budgets"]["1"]["active_parameters"] == 12_879_925_248
    assert plan["budgets"]["0.5"]["active_parameters"] == 12_879_925_248 - plan["parameters"]["mlp"] // 2


def test_bases_that_cannot_be_converted(tmp_path):
    AutoConfig.for_model("llama4_text", num_hidden_layers=1).save_pretrained(tmp_path / "llama4")
    AutoConfig.for_model("t5").save_pretrained(tmp_path / "t5")
    told = {"llama4": "llama4_text is not supported", "t5": "t5", "missing": "missing"}
    for name, message in told.items():
        with pytest.raises(ValueError, match=message):
            plan_base(tmp_path / name)


def test_known_hardware_is_in_the_help():
    from dynamoe_hf.arguments import PlanArguments, field_helps

    assert all(name in field_helps(PlanArguments)["hardware"] for name in HARDWARE)
