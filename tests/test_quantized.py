# SPDX-License-Identifier: Apache-2.0
"""Quantised weights: prefixes of what slices equal the same modules under a mask, and the rest is masked."""

import copy

import pytest
import torch
from conftest import run_mlp, tiny_dense, tiny_dynamoe
from reference import assert_close, nested_mlp
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.modeling import mlp_backends
from dynamoe_hf.modeling.dense_base import Projections
from dynamoe_hf.modeling.mlp_backends import Call, Decision, choose_execution


ao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install -e '.[quant]'")

INT8 = ao.Int8WeightOnlyConfig()
SLICING = {
    "int8": INT8,
    "int8 by tensor": ao.Int8WeightOnlyConfig(granularity=ao.PerTensor()),
    "int8 in groups": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)),
    "int4 in groups": ao.IntxWeightOnlyConfig(torch.int4, granularity=ao.PerGroup(16)),
    "float8": ao.Float8WeightOnlyConfig(),
}


def not_router(module, name):
    return isinstance(module, nn.Linear) and ".mlp." in name and "router" not in name


def quantised(family="llama", config=INT8, dtype=torch.float32, keep=not_router, **settings):
    model = tiny_dynamoe(family, **settings).to(dtype)
    ao.quantize_(model, config, keep)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", SLICING)
@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_prefixes_equal_the_masked_modules(family, kind, dtype):
    mlp = quantised(family, SLICING[kind], dtype, expert_widths=[0.25, 0.5, 0.75, 1]).model.layers[1].mlp
    tolerance = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for tokens in (1, 7):
        x = torch.randn(1, tokens, 32, dtype=dtype)
        assert mlp.tensors(x) is not None, "the slices were refused"
        for name, expert in {"mixed": torch.arange(tokens) % 4, "one": torch.ones(tokens, dtype=torch.long)}.items():
            expected = nested_mlp(mlp, x[0], expert)
            scale = expected.abs().max()
            assert_close(name, run_mlp(mlp, x, expert[None])[0] / scale, expected / scale, **tolerance)
            assert_close(f"{name}, masked", run_mlp(mlp.train(), x, expert[None])[0] / scale, expected / scale, **tolerance)
            mlp.eval()
        for expert in range(4):
            expected = nested_mlp(mlp, x[0], [expert] * tokens)
            scale = expected.abs().max()
            assert_close("one for all", run_mlp(mlp, x, expert)[0] / scale, expected / scale, **tolerance)


@torch.no_grad()
def test_only_the_chosen_prefix_is_computed(token_ids):
    """Poison the scales of every neuron beyond the forced prefix: the output must not notice."""
    model = quantised()
    expected = model(token_ids, force_expert=1).logits
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight.scale[32:] = float("nan")
    assert_close("logits", model(token_ids, force_expert=1).logits, expected)
    mlp = model.model.layers[1].mlp
    assert not torch.isnan(run_mlp(mlp, torch.randn(1, 6, 32), torch.tensor([[0, 1, 0, 1, 1, 0]]))).any()
    assert torch.isnan(run_mlp(mlp, torch.randn(1, 6, 32), torch.tensor([[0, 1, 0, 2, 1, 0]]))).any(), "the poison is there"


def test_from_pretrained_leaves_the_routers_alone(tmp_path, token_ids):
    tiny_dynamoe(budgets={"0.5": 0.4}).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=TorchAoConfig(INT8))
    mlp = model.model.layers[0].mlp
    assert type(mlp.up_proj.weight) is ao.Int8Tensor
    assert all(type(parameter) is nn.Parameter for parameter in mlp.router.parameters())
    with torch.no_grad():
        whole = model(token_ids).logits
        routed = model(token_ids, sensitivity=0.4).logits
        assert not torch.allclose(routed, whole)
        assert model.generate(token_ids[:1], sensitivity=0.4, max_new_tokens=4, do_sample=False).shape == (1, 16)
        # Full width is the dense model, quantised alike.
        dense = tiny_dense()
        ao.quantize_(dense, INT8, lambda module, name: isinstance(module, nn.Linear) and name != "lm_head")
        assert torch.equal(whole, dense(token_ids).logits)
        model.save_pretrained(tmp_path / "int8")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
        assert torch.equal(again(token_ids, sensitivity=0.4).logits, routed)


def test_routers_are_not_quantised(token_ids):
    """`quantize_` without a filter leaves them too."""
    model = quantised(keep=None)
    model.set_sensitivity(0.4)
    with torch.no_grad():
        many = model(token_ids[:1], output_router_logits=True)
        one = model(token_ids[:1, :1])
        assert_close("one token", one.logits[0, 0], model(token_ids[:1, :1].expand(2, 1)).logits[0, 0])
    assert type(model.model.layers[0].mlp.up_proj.weight) is ao.Int8Tensor
    assert type(model.model.layers[0].mlp.router.input.weight) is nn.Parameter
    assert len({int(e) for expert in many.expert_indices for e in expert.flatten()}) > 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "case"),
    [
        ({"config": ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(16)), "expert_widths": [0.125, 0.625, 1]}, "a cut group"),
        ({"config": ao.Int8DynamicActivationInt8WeightConfig()}, "inputs scaled by their largest number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_slice_is_masked(settings, case, monkeypatch, token_ids):
    warnings = []
    monkeypatch.setattr(mlp_backends.logger, "warning_once", warnings.append)
    mlp = quantised(**settings).model.layers[1].mlp
    x = torch.randn(1, 6, 32)
    expert = torch.tensor([0, 1, 2, 0, 1, 2])
    assert mlp.tensors(x) is None, case
    assert_close(case, run_mlp(mlp, x, expert[None])[0], nested_mlp(mlp, x[0], expert))
    assert "cannot be sliced" in warnings[0]


@torch.no_grad()
@pytest.mark.parametrize("trick", ["raises", "wrong scale", "ignores the cut"])
def test_a_tensor_that_slices_wrongly_is_masked(trick, monkeypatch):
    block = Projections.block

    def wrong(self, low, high):
        if trick == "raises":
            raise NotImplementedError("no slices")
        cut = block(self, low, high)
        if trick == "wrong scale":
            return cut._replace(down=cut.down.dequantize() * (1.01 if high < 64 else 1))
        return cut._replace(up=block(self, 0, high - low).up)

    mlp = quantised().model.layers[1].mlp
    monkeypatch.setattr(Projections, "block", wrong)
    x, expert = torch.randn(1, 4, 32), torch.tensor([0, 1, 2, 3])
    assert mlp.tensors(x) is None
    assert_close(trick, run_mlp(mlp, x, expert[None])[0], nested_mlp(mlp, x[0], expert))


@torch.no_grad()
def test_kept_slices_follow_the_weights():
    mlp, other = (quantised(seed=seed).model.layers[0].mlp for seed in (0, 5))
    x, expert = torch.randn(1, 3, 32), torch.tensor([[0, 2, 1]])
    first = run_mlp(mlp, x, expert)
    expected = run_mlp(other, x, expert)
    changed = copy.deepcopy(mlp)
    changed.load_state_dict(other.state_dict())
    assert_close("loaded in place", run_mlp(changed, x, expert), expected)
    changed = copy.deepcopy(mlp)
    run_mlp(changed, x, expert)
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(changed, name).weight = getattr(other, name).weight
    assert_close("replaced", run_mlp(changed, x, expert), expected)
    assert_close("the first is untouched", run_mlp(mlp, x, expert), first)
    mlp.to(torch.bfloat16).to(torch.float32)
    assert_close("cast", run_mlp(mlp, x, expert)[0], nested_mlp(mlp, x[0], expert[0]))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int8", "int8 in groups"])
@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_a_step_of_decoding_takes_prefixes(family, kind, token_ids):
    model = quantised(family, SLICING[kind])
    mlp = model.nested_mlps[0]
    assert (
        choose_execution(Call(torch.randn(1, 1, 32), Decision(torch.tensor([[1]])), mlp.weights(torch.zeros(1)))).name
        == "prefix"
    )
    for ids in (token_ids[:1, :1], token_ids[:2, :1], token_ids[:1, :5]):
        logits = model(ids, sensitivity=0.4).logits
        assert_close("again, with the slices that were kept", model(ids, sensitivity=0.4).logits, logits)
        masked = copy.deepcopy(model)
        for layer in masked.nested_mlps:
            layer.down_linear.register_forward_hook(lambda *args: None)  # a hook: every neuron is computed and masked
        assert_close("masked", logits, masked(ids, sensitivity=0.4).logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda mlp, other: setattr(mlp.up_proj, "weight", other.up_proj.weight), id="parameter"),
        pytest.param(lambda mlp, other: setattr(mlp.up_proj.weight, "qdata", other.up_proj.weight.qdata), id="numbers"),
        pytest.param(lambda mlp, other: setattr(mlp.up_proj.weight, "scale", other.up_proj.weight.scale), id="scale"),
        pytest.param(lambda mlp, other: setattr(mlp, "down_proj", other.down_proj), id="projection"),
        pytest.param(lambda mlp, other: mlp.load_state_dict(other.state_dict()), id="loaded"),
        pytest.param(
            lambda mlp, other: setattr(mlp.gate_proj, "weight", nn.Parameter(torch.ones(64, 32))), id="not quantised"
        ),
    ],
)
def test_a_step_of_decoding_follows_its_layers(change, token_ids):
    """What is swapped in a quantised layer is seen by the next step: a copy of the model has nothing kept."""
    model, one = quantised(), token_ids[:1, :1]
    for _ in range(2):
        before = model(one, sensitivity=0.4).logits
    change(model.model.layers[-1].mlp, quantised(seed=5).model.layers[-1].mlp)
    expected = copy.deepcopy(model)(one, sensitivity=0.4).logits
    assert not torch.allclose(before, expected)
    for _ in range(2):
        assert_close("after the change", model(one, sensitivity=0.4).logits, expected)


def test_gradients_pass_through():
    """In front of a frozen quantised MLP something may be trained."""
    mlp = quantised().model.layers[0].mlp
    x, expert = torch.randn(1, 5, 32), torch.tensor([0, 1, 2, 3, 1])
    gradients = []
    for run in (lambda x: run_mlp(mlp, x, expert[None])[0], lambda x: nested_mlp(mlp, x[0], expert)):
        inputs = x.clone().requires_grad_()
        run(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    assert_close("gradient", *gradients, atol=1e-5 * gradients[1].abs().max().item())


def test_compiled_equals_eager(token_ids):
    """In a compiled graph quantised MLPs are masked: the same numbers."""
    torch._dynamo.reset()
    model = quantised()
    model.set_sensitivity(0.4)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close("logits", compiled(token_ids).logits, model(token_ids).logits, atol=1e-4)


def test_adapters_over_quantised_weights_are_masked(token_ids):
    peft = pytest.importorskip("peft")
    model = quantised()
    with torch.no_grad():
        expected = model(token_ids, sensitivity=0.4).logits
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj", "down_proj"]))
        assert wrapped.base_model.model.model.layers[0].mlp.tensors(torch.zeros(1, 1, 32)) is None
        assert_close("fresh adapters change nothing", wrapped(token_ids, sensitivity=0.4).logits, expected)
    assert isinstance(model, DynaMoEForCausalLM)
