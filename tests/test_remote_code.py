"""The files that travel: a folder loads, generates, saves and loads again where the package cannot be imported."""

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense, tiny_dynamoe
from reference import assert_close
from safetensors.torch import load_file
from test_sparsity import PATH, TABLE
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files

import dynamoe_hf
from dynamoe_hf import DynaMoEConfig
from dynamoe_hf.convert import convert_model
from dynamoe_hf.modeling.configuration_dynamoe import FORMAT_VERSION


ROOT = Path(__file__).parent.parent
TRAVELLING = {
    "configuration_dynamoe.py", "modeling_dynamoe.py", "dense_base.py", "difficulty.py", "routing.py", "nested_mlp.py",
    "mlp_backends.py", "quantized_slices.py", "fast_decode.py", "nested_mlp_triton.py", "packed_weights.py", "sparsity.py",
    "engine_layers.py", "onednn_weights.py", "request_dials.py", "checks.py", "outputs.py",
    "self_draft.py", "moe_base.py", "nested_moe.py", "tensor_parallel.py",
}  # fmt: skip

# Runs in a process where importing the package fails, as on a machine that never had it.
WITHOUT_PACKAGE = """
import sys
sys.modules["dynamoe_hf"] = None
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, StaticCache
folder, again, out = sys.argv[1:]
ids, mask = torch.load(folder + "/ids.pt"), torch.ones(2, 12, dtype=torch.long)
mask[0, :5] = 0
results = {}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
results["logits"] = model(ids, attention_mask=mask).logits
options = {"attention_mask": mask, "max_new_tokens": 5}
results["greedy"] = model.generate(ids, do_sample=False, **options)
results["static"] = model.generate(ids, do_sample=False, cache_implementation="static", **options)
results["beam"] = model.generate(ids, do_sample=False, num_beams=3, **options)
torch.manual_seed(0)
results["sampled"] = model.generate(ids, do_sample=True, **options)
model.save_pretrained(again)
again = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
results["again"] = again(ids, attention_mask=mask).logits
forced = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, force_expert=0)
results["forced"] = forced(ids, attention_mask=mask).logits
dial = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, sensitivity=0.2)
results["dial"] = dial(ids, attention_mask=mask).logits
torch.save(results, out)
"""


def run_without_package(*args):
    result = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *map(str, args)], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("qwen3", True), ("gemma2", True), ("phi3", False), ("starcoder2", False), ("qwen3_moe", False)],
)
def test_folder_needs_no_package(family, tied, tmp_path, token_ids):
    model = tiny_dynamoe(family, dense_settings={"tie_word_embeddings": tied})
    model.config.sensitivity = 0.5
    if family == "llama":
        model.config.thresholds, model.config.density_path, model.config.threshold_ramp = TABLE, PATH, 0.2
    model.save_pretrained(tmp_path / "model")
    torch.save(token_ids, tmp_path / "model" / "ids.pt")
    run_without_package(tmp_path / "model", tmp_path / "again", tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")

    mask = torch.ones_like(token_ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(token_ids, attention_mask=mask).logits
        assert_close("logits", results["logits"], expected)
        assert_close("after saving again", results["again"], expected)
        assert_close("force_expert", results["forced"], model(token_ids, attention_mask=mask, force_expert=0).logits)
        assert_close("sensitivity", results["dial"], model(token_ids, attention_mask=mask, sensitivity=0.2).logits)
    options = {"attention_mask": mask, "max_new_tokens": 5}
    assert torch.equal(results["greedy"], model.generate(token_ids, do_sample=False, **options))
    assert torch.equal(results["static"], results["greedy"])
    assert torch.equal(results["beam"], model.generate(token_ids, do_sample=False, num_beams=3, **options))
    torch.manual_seed(0)
    assert torch.equal(results["sampled"], model.generate(token_ids, do_sample=True, **options))
    for folder in ("model", "again"):
        assert {path.name for path in (tmp_path / folder).glob("*.py")} == TRAVELLING


def test_converted_folder_needs_no_package(dense_folder, tmp_path, token_ids):
    """The whole folder that `convert` writes, tokenizer and records included."""
    convert_model(dense_folder, tmp_path / "model", max_tokens=512, block_size=64)
    torch.save(token_ids, tmp_path / "model" / "ids.pt")
    run_without_package(tmp_path / "model", tmp_path / "again", tmp_path / "results.pt")
    mask = torch.ones_like(token_ids)
    mask[0, :5] = 0
    dense = AutoModelForCausalLM.from_pretrained(dense_folder)
    assert_close(
        "logits", torch.load(tmp_path / "results.pt")["logits"], dense(token_ids, attention_mask=mask).logits, atol=1e-4
    )
    assert {path.name for path in (tmp_path / "model").glob("*.py")} == TRAVELLING


def test_folder_with_package_needs_no_trust(tmp_path, token_ids):
    model = tiny_dynamoe()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__module__ == "dynamoe_hf.modeling.modeling_dynamoe"
    assert_close("logits", loaded(token_ids, sensitivity=0.3).logits, model(token_ids, sensitivity=0.3).logits)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_dynamoe.DynaMoEConfig",
        "AutoModel": "modeling_dynamoe.DynaMoEModel",
        "AutoModelForCausalLM": "modeling_dynamoe.DynaMoEForCausalLM",
    }


def test_loading_options(tmp_path, token_ids):
    model = tiny_dynamoe("gemma2", dense_settings={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    expected = model(token_ids, sensitivity=0.4).logits
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_close("sharded", loaded(token_ids, sensitivity=0.4).logits, expected)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", device_map="cpu")
    assert_close("device_map", mapped(token_ids, sensitivity=0.4).logits, expected)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", attn_implementation="eager")
    assert_close("eager", eager(token_ids, sensitivity=0.4).logits, expected)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.config.base_config.dtype == torch.bfloat16


def test_offloaded_weights_give_the_same_logits(tmp_path, token_ids):
    """Weights that wait on disk are on the meta device when the MLP looks at them, so it must run the modules."""
    model = tiny_dynamoe()
    model.save_pretrained(tmp_path / "model")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
                  "model.layers.0": "cpu", "model.layers.1": "disk"}  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "disk")
    assert loaded.model.layers[1].mlp.gate_proj.weight.device.type == "meta"
    assert_close("offloaded", loaded(token_ids, sensitivity=0.4).logits, model(token_ids, sensitivity=0.4).logits)
    few = token_ids[:1, :3]
    assert_close("few tokens", loaded(few, sensitivity=0.4).logits, model(few, sensitivity=0.4).logits)
    options = {"sensitivity": 0.4, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(few, **options), model.generate(few, **options))


def test_dense_checkpoint_loads_with_only_routers_missing(tmp_path, token_ids):
    dense = tiny_dense("qwen2")
    dense.save_pretrained(tmp_path)
    config = DynaMoEConfig(base_config=dense.config)
    model, info = dynamoe_hf.DynaMoEForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"]
    assert all(".router." in name for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert_close("logits", model(token_ids).logits, dense(token_ids).logits)
    assert torch.isfinite(model(token_ids, sensitivity=0.4).logits).all(), "the missing routers were not initialised"


@pytest.mark.parametrize(
    "fixture", sorted((Path(__file__).parent / "fixtures").glob("config_v*.json")), ids=lambda path: path.stem
)
def test_old_configs_keep_loading(fixture, tmp_path):
    (tmp_path / "config.json").write_text(fixture.read_text())
    config = DynaMoEConfig.from_pretrained(tmp_path)
    assert config.format_version == json.loads(fixture.read_text())["format_version"] < FORMAT_VERSION
    assert config.threshold_ramp == 0
    model = dynamoe_hf.DynaMoEForCausalLM(config)
    assert model.config.hidden_size == json.loads(fixture.read_text())["base_config"]["hidden_size"]
    model.config.threshold_ramp = 0.2  # which code of then would not see
    model.save_pretrained(tmp_path / "again")
    again = DynaMoEConfig.from_pretrained(tmp_path / "again")
    assert again.threshold_ramp == 0.2 and again.format_version == FORMAT_VERSION


def test_travelling_files_are_the_declared_ones():
    main = ROOT / "modeling" / "modeling_dynamoe.py"
    found = {Path(path).name for path in get_relative_import_files(main)} | {main.name}
    assert found == TRAVELLING
    assert {path.name for path in (ROOT / "modeling").glob("*.py")} == TRAVELLING | {"__init__.py"}


@pytest.mark.parametrize("name", sorted(TRAVELLING))
def test_travelling_files_import_only_torch_transformers_and_siblings(name):
    allowed = {"torch", "transformers"} | sys.stdlib_module_names
    forbidden = {
        "os",
        "io",
        "socket",
        "subprocess",
        "urllib",
        "http",
        "pathlib",
        "shutil",
        "importlib",
        "ctypes",
        "multiprocessing",
    }
    tree = ast.parse((ROOT / "modeling" / name).read_text())
    optional = [node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert f"{node.module}.py" in TRAVELLING
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for module in modules:
                top = module.split(".")[0]
                assert top in allowed - forbidden or (top == "triton" and node in optional), f"{name} imports {module}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"open", "exec", "eval", "__import__", "compile"}, f"{name} calls {node.func.id}"


def test_there_is_one_copy_of_the_classes():
    assert "modeling" not in sys.modules
    assert dynamoe_hf.DynaMoEConfig.__module__ == "dynamoe_hf.modeling.configuration_dynamoe"


@pytest.mark.slow
def test_wheel_holds_modeling_inside_the_package(tmp_path):
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"dynamoe_hf/modeling/{name}" for name in TRAVELLING | {"__init__.py"}} <= set(names)
    assert not any(name.startswith("modeling/") for name in names)


def test_a_folder_of_the_release_before_gives_the_same_logits():
    """tests/fixtures/folder_v1 was written, with what it gives, by the code of 2026-11-27 (2439b83)."""
    folder = ROOT / "tests" / "fixtures" / "folder_v1"
    expected = load_file(folder / "expected.safetensors")
    ids, model = expected.pop("input_ids"), AutoModelForCausalLM.from_pretrained(folder)
    settings = {"default": {}, "0.2": {"sensitivity": 0.2}, "0.7": {"sensitivity": 0.7}, "expert_0": {"force_expert": 0}}
    assert len({logits.sum().item() for logits in expected.values()}) == len(settings) + 1, "the settings must differ"
    with torch.no_grad():
        for name, options in settings.items():
            assert_close(name, model(ids, **options).logits, expected[name])
        assert_close("one token", model(ids[:1, :1]).logits, expected["one_token"])
    assert model.config.budgets == {"0.5": 0.3, "0.75": 0.6} and model.config.format_version == 1
