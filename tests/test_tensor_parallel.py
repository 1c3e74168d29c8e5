"""Two processes hold a model by transformers' plan of tensor parallelism, and give what one gives: logits, gradients, folder."""

import json
import os
import subprocess
import sys
from itertools import product
from unittest.mock import patch

import pytest
import torch
from conftest import tiny_dynamoe
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from dynamoe_hf.modeling.dense_base import mlp_places
from dynamoe_hf.modeling.tensor_parallel import NestedMLPParallel, plan_with_mlps


THRESHOLDS = {"density": [0.4, 0.7], "input": [[0.5, 0.6], [0.2, 0.3]], "hidden": [[0.1, 0.15], [0.03, 0.05]]}
SPARSE = {"thresholds": THRESHOLDS, "density_path": [[0.3, 0.4], [0.8, 0.7]]}
CASES = {
    "llama": ("llama", {}),
    "sparse": ("llama", SPARSE),
    "fused": ("phi3", {"expert_widths": [0.0, 0.25, 1.0]}),
    "biases": ("starcoder2", {"expert_widths": [0.375, 1.0]}),
    "layers": ("gpt_neox", {"expert_widths": [[0.5, 1.0], [0.125, 1.0]]}),
    "transposed": ("gpt2", {}),
    "flat": ("opt", {}),
    "mixture": ("deepseek_v3", {}),
}
SCRIPT = """
import json, os, sys
import torch
from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.observe import mlp_parts
torch.set_num_threads(1)
folder, out = sys.argv[1:]
rank = int(os.environ["RANK"])
ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(1))
models = [DynaMoEForCausalLM.from_pretrained(folder, distributed_config=how) for how in (None, {"tp_size": 2})]

def assert_same(name, values):
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-5, msg=lambda told: f"{name}: {told}")

def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

dials = {"full": {}, "routed": {"sensitivity": 0.6}, "apart": {"sensitivity": torch.tensor([0.3, 0.8])}, "label": {"route": "label"},
         "narrow": {"force_expert": 0}, "random": {"route": "random"}}

def seeded(model):  # processes may have drawn different numbers before
    torch.manual_seed(2 + rank % 2 * (model is models[1]))
    return model

with torch.no_grad():
    for name, asked in dials.items():
        pair = [seeded(model)(ids, output_router_logits=True, **asked) for model in models]
        assert_same(name, [each.logits for each in pair])
        assert_same(name, [torch.stack(each.mlp_shares) for each in pair])
        assert all(share.mean() > 0.1 for share in pair[0].mlp_shares) or name == "narrow"
        assert_same("few tokens", [seeded(model)(ids[:, :4], **asked).logits for model in models])
    assert torch.equal(*map(mlp_parts, models)), "a divided MLP counts for what all processes read"
    texts = [model.generate(ids, max_new_tokens=6, do_sample=False, sensitivity=0.6) for model in models]
    assert torch.equal(*texts)
labels = {"labels": ids}
# What the call is given, and what it is routed by beside that.
passes = {"labels": (labels, {}), "router": ({"sensitivity": 0.6}, {}), "random": (labels, {"route": "random"}),
          "gates": ({"sensitivity": 0.6, **labels, "route": "router"}, {"temperature": 0.5}),
          "gates alone": ({"sensitivity": 0.6}, {"temperature": 0.5})}
for name, (given, asked) in passes.items():
    if models[0].is_mixture and "temperature" in asked:
        continue
    losses = []
    for model in map(seeded, models):
        model.train()
        model.zero_grad()
        with model.routing(records=[], **asked) as routing:
            outputs = model(ids, **given)
            loss = outputs.logits.square().mean() if outputs.loss is None else outputs.loss
            loss = loss + sum(record.width.mean() for record in routing.records if record.width is not None)
        loss.backward()
        losses.append(loss.detach())
    assert_same(name, losses)
    gradients = [{key: whole(value.grad) for key, value in model.named_parameters() if value.grad is not None} for model in models]
    assert gradients[0].keys() == gradients[1].keys() and any("mlp" in key or "fc1" in key for key in gradients[0])
    for key, gradient in gradients[0].items():
        assert_same(f"{name} {key}", [gradient, gradients[1][key]])
try:
    models[1].pack("int8")
except ValueError as error:
    assert "cannot be packed: its projections are wrapped, hooked, quantised, divided" in str(error)
else:
    raise AssertionError("a divided model was packed")
models[1].save_pretrained(out)
parts = {key: value.to_local() for key, value in models[1].state_dict().items() if hasattr(value, "to_local")}
torch.save(parts, f"{out}.{rank}")
torch.distributed.barrier()
os._exit(0)
"""


def launched(folder, out, processes=2, script=SCRIPT):
    """The result of a script in some processes."""
    (out.parent / "script.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        processes,
        out.parent / "script.py",
    ]
    command += [folder, out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(case, tmp_path):
    family, settings = CASES[case]
    model = tiny_dynamoe(family, **settings)
    model.save_pretrained(tmp_path / "one")
    result = launched(tmp_path / "one", tmp_path / "two")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "are copied" not in result.stderr and "every neuron is computed" not in result.stderr
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    second.pop("lm_head.weight" if family == "starcoder2" else "", None)  # transformers writes tied weights twice here
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "two" / "config.json").read_text()
    parts = [torch.load(tmp_path / f"two.{rank}") for rank in (0, 1)]
    names = {parameter: name for name, parameter in model.named_parameters()}
    shared = [place.mlp for place in mlp_places(model.base_model) if place.is_shared]  # copied, as the routed experts are
    assert not {names[parameter] for mlp in shared for parameter in mlp.parameters()} & parts[0].keys()
    divided = [mlp for mlp in model.nested_mlps if mlp.layout.projections and mlp not in shared]
    assert divided
    for mlp, projection in product(divided, divided[0].layout.projections):
        whole, dim = getattr(mlp, projection).weight, int(projection == mlp.layout.down)
        for width in mlp.widths:  # each has half of every expert
            layout = mlp.layout._replace(transposed=False)  # as the nested MLP holds them, not the base
            halves = [layout.narrow(f"{projection}.weight", part[names[whole]], width // 2) for part in parts]
            prefix = layout.narrow(f"{projection}.weight", whole, width)
            assert torch.equal(torch.cat(halves, dim).sort(dim).values, prefix.sort(dim).values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("widths", "processes", "found"), [([33 / 64, 1.0], 2, "an expert of 33 neurons"), ([0.5, 1.0], 4, "4 processes")]
)
def test_what_cannot_be_divided_is_copied_with_a_warning(widths, processes, found, tmp_path):
    tiny_dynamoe(expert_widths=widths).save_pretrained(tmp_path / "one")
    script = SCRIPT.split("labels =")[0] + "os._exit(0)"
    if processes == 4:  # FSDP beside it
        script = script.replace('{"tp_size": 2}', '{"tp_size": 2, "fsdp_size": 2}')
    result = launched(tmp_path / "one", tmp_path / "two", processes, script)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"MLPs are copied to each of 2 processes, not divided over them: found {found}" in result.stderr


def test_the_part_of_a_weight_is_read_without_a_call():
    """It is a plain tensor in the place of the parameter, and must not be taken for one that is quantised."""
    mlp = tiny_dynamoe().nested_mlps[0]
    mlp.up_linear._parameters["weight"] = mlp.up_linear.weight.detach()
    with patch.object(mlp.quantized_slices, "tensors", side_effect=AssertionError("taken for a quantised weight")):
        assert mlp.tensors(torch.zeros(1, 1, 32)).up is mlp.up_linear._parameters["weight"]


def test_the_plan_is_the_models_and_not_in_its_folder(tmp_path):
    """Engines and adapters read the config, and do not know the style."""
    model = tiny_dynamoe()
    assert model.tp_plan["model.layers.*.mlp"] == model.model.tp_plan["layers.*.mlp"] == "nested_mlp"
    assert model.tp_plan["model.layers.*.self_attn.q_proj"] == "colwise"
    model.save_pretrained(tmp_path)
    assert "nested_mlp" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_engines_get_a_plan_without_mlps(engine):
    model = tiny_dynamoe()
    model.config._attn_implementation = engine
    plan = plan_with_mlps(model)
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise" and not any("mlp" in key or "fc1" in key for key in plan)


def test_adapters_on_a_divided_mlp_are_refused():
    model = tiny_dynamoe()
    get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match=r"must have plain projections: found peft.*Linear in layer 1. Leave MLPs out"):
        with NestedMLPParallel().context_around_forward(model.nested_mlps[1], None):
            pass
