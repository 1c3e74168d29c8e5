"""Experts of a mixture that are cut off for good to different widths."""

import copy

import pytest
import torch
from conftest import tiny_dense, tiny_dynamoe, tiny_tokenizer
from reference import assert_close, nested_mixture
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dynamoe_hf import DynaMoEForCausalLM, calibrate_budgets, convert_model, evaluate_model, export_dense, train_model
from dynamoe_hf.convert import cut_experts
from dynamoe_hf.folder import count_parameters, inspect_folder, load_model
from dynamoe_hf.importance import massive_experts
from dynamoe_hf.modeling import mlp_backends
from dynamoe_hf.modeling.mlp_backends import Costs, Decision
from dynamoe_hf.modeling.moe_base import is_mixture


NULL = [0, 0.25, 0.5, 1]


def cut_model(family, widths=(48, 16, 8, 24), **settings):
    """A tiny mixture each of whose layers has four experts of these widths."""
    model = tiny_dynamoe(family, **settings)
    mixtures = [mlp for mlp in model.nested_mlps if is_mixture(mlp)]
    for mlp in mixtures:
        mlp.cut_widths = [min(width, mlp.widths[-1]) for width in widths]
        mlp.layout.cut(mlp, mlp.cut_widths)
    model.config.cut_widths = [getattr(mlp, "cut_widths", None) for mlp in model.nested_mlps]
    return model, mixtures


def pairs(experts, tokens):
    """x (1, T, D), index and weights of experts (1, T, K), and widths (1, T, K)."""
    generator = torch.Generator().manual_seed(0)
    hidden = experts.router.input.in_features
    index = torch.rand(1, tokens, 4, generator=generator).argsort(-1)[..., :2]
    width = torch.randint(4, index.shape, generator=generator)
    return torch.randn(1, tokens, hidden, generator=generator), index, torch.rand(index.shape, generator=generator), width


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_execution_equals_the_masked_loop_with_gradients(family, tokens, monkeypatch):
    """The reference knows of no cut: it multiplies the zeros."""
    monkeypatch.setattr(mlp_backends, "CPU_COSTS", Costs(0, 0))
    _, (experts, *_) = cut_model(family, expert_widths=NULL)
    x, index, weight, width = pairs(experts, tokens)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    leaves, target = [x, weight, experts.gate_up_proj, experts.down_proj], torch.randn(tokens, x.shape[-1])
    actual = experts.run(x, index, weight, Decision(width))
    expected, _ = nested_mixture(experts, x[0], index[0], weight[0], width[0])
    assert_close("output", actual, expected, atol=1e-4)
    found, wanted = (torch.autograd.grad((y * target).sum(), leaves) for y in (actual, expected))
    for name, a, e in zip(("x", "weight", "gate_up_proj", "down_proj"), found, wanted):
        assert_close(f"gradient of {name}", a, e, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tokens", [1, 40])
def test_what_is_cut_is_not_multiplied_and_not_counted(tokens, monkeypatch):
    monkeypatch.setattr(mlp_backends, "CPU_COSTS", Costs(0, 0))
    model, (experts, *_) = cut_model("qwen3_moe", expert_widths=NULL)
    x, index, weight, width = pairs(experts, tokens)
    taken = [min(experts.widths[w], experts.cut_widths[n]) for n, w in zip(index.flatten().tolist(), width.flatten().tolist())]
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which the counter does not know
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        experts.run(x, index, weight, Decision(width))
    assert counter.get_total_flops() == 2 * 3 * 32 * sum(taken)
    record = experts.record(x, index, Decision(width, experts.router(x, index, weight)))
    whole = torch.tensor(experts.cut_widths)[index[0]].sum(1)
    assert_close("share", record.share[0], torch.tensor(taken).view(tokens, 2).sum(1) / whole)
    gates = (torch.arange(4) <= width[..., None]).float().requires_grad_()
    record = experts.record(x, index, Decision(width, experts.router(x, index, weight), gates))
    assert_close("width", record.width, record.share)
    (price,) = torch.autograd.grad(record.width.sum(), gates)
    for place in torch.cartesian_prod(torch.arange(tokens), torch.arange(2)).tolist():
        ends = [0, *experts.widths_of(int(index[0][tuple(place)]))]
        assert_close("price", price[0][tuple(place)] * whole[place[0]], torch.tensor(ends).diff().float())
    counts = count_parameters(model)
    assert counts["mlp"] == 2 * 2 * 3 * 32 * sum(experts.cut_widths) / 4  # two layers, two experts a token
    assert counts["idle"] == 2 * 4 * 3 * 32 * 48 - counts["mlp"]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_full_width_is_the_base_with_the_cut_neurons_at_zero(family, token_ids, tmp_path):
    model, _ = cut_model(family)
    dense = tiny_dense(family)
    whole = dense(token_ids).logits
    for place, mlp in zip(dense.model.layers, model.nested_mlps):
        if is_mixture(mlp):
            experts = getattr(place.mlp, "experts", None)
            for number, width in enumerate(mlp.cut_widths):
                down = experts.down_proj[number] if experts.is_transposed else experts.down_proj[number].t()
                down.data[width:] = 0
    expected = dense(token_ids).logits
    assert torch.equal(model(token_ids).logits, expected) and not torch.allclose(expected, whole, atol=1e-2)
    assert_close("logits", model(token_ids, sensitivity=torch.ones(2)).logits, expected, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = DynaMoEForCausalLM.from_pretrained(tmp_path)
    assert [getattr(mlp, "cut_widths", None) for mlp in again.nested_mlps] == model.config.cut_widths
    first = DynaMoEForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)
    assert first.config.cut_widths == model.config.cut_widths[:1]
    outputs = [each(token_ids, sensitivity=0.4, output_router_logits=True) for each in (again, model, copy.deepcopy(model))]
    for other in outputs[1:]:
        assert_close("logits", outputs[0].logits, other.logits)
        assert_close("shares", torch.stack(outputs[0].mlp_shares), torch.stack(other.mlp_shares))


def test_the_least_important_neurons_of_a_layer_are_cut():
    model = tiny_dynamoe("qwen3_moe", expert_widths=NULL)
    scores = [torch.arange(192.0).view(4, 48) + 1 for _ in range(2)]
    scores[1][3] = 0  # saw too few tokens
    none, massive = torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, False, False])
    cut_experts(model, scores, [none, massive], 0.5)
    least = 12  # the smallest width that is not 0
    assert model.config.cut_widths == [[least, least, 48, 48], [48, least, least, 48]]
    experts = model.nested_mlps[0]
    assert experts.cut_widths == [least, least, 48, 48]
    assert not experts.down_proj[0, :, least:].any() and experts.down_proj[0, :, :least].all()
    assert not experts.gate_up_proj[0].unflatten(0, (2, 48))[:, least:].any() and experts.gate_up_proj[2].all()
    for part, widths in ((0.0, [48] * 4), (0.25, [least, 48, 48, 48]), (0.375, [least, 24, 48, 48]), (1.0, [least] * 4)):
        model = tiny_dynamoe("qwen3_moe", expert_widths=NULL)
        cut_experts(model, scores[:1] * 2, [none, none], part)
        assert model.config.cut_widths[0] == widths, part


def test_an_expert_with_massive_activations_is_found():
    dense = tiny_dense("deepseek_v3")
    blocks = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense.model.layers[1].mlp.experts.down_proj[2] *= 50
    first, second, shared = massive_experts(dense, blocks)
    assert first.shape == shared.shape == () and not first and not shared
    assert second.tolist() == [False, False, True, False]


def test_from_conversion_to_export(text_file, tmp_path, token_ids):
    """A plain folder pads the experts with zeros: its family knows one width."""
    base, converted, trained = (tmp_path / name for name in ("base", "converted", "trained"))
    tiny_dense("qwen3_moe").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    text = {"text": text_file, "block_size": 64}
    convert_model(base, converted, max_tokens=2048, widths=NULL, cut=0.3, **text)
    seen = inspect_folder(converted)["conversion"]["routed_experts"]
    model = load_model(converted)
    left = [width for widths in model.config.cut_widths for width in widths]
    assert seen["cut"] == pytest.approx(1 - sum(left) / (8 * 48), abs=1e-3) and 0.15 < seen["cut"] <= 0.3
    assert seen["massive"] >= 1 and 48 in left and len(set(left)) > 2
    train_model(converted, trained, max_tokens=1024, router_tokens=512, batch_size=4, **text)
    model = load_model(trained)
    for experts in model.nested_mlps:
        for number, width in enumerate(experts.cut_widths):
            assert not experts.down_proj[number, :, width:].any(), "training moves what was cut"
    calibrate_budgets(trained, budgets=[0.5, 0.9], max_tokens=1024, **text)
    (full,) = evaluate_model(trained, sensitivity=1.0, max_tokens=1024, **text)
    (half,) = evaluate_model(trained, budget=0.5, baselines=["static", "random"], max_tokens=1024, **text)
    assert full["mean_share"] == 1 and abs(half["mean_share"] - 0.5) < 0.1
    whole = {**inspect_folder(converted)["parameters"]}
    assert full["active_parameters"] == whole["total"] - whole["idle"] < whole["total"] - 2 * 2 * 3 * 32 * 48
    record = export_dense(trained, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert record["mlp_width"] == 48 == dense.config.moe_intermediate_size
    assert_close("logits", dense(token_ids).logits, model(token_ids, sensitivity=1.0).logits, atol=1e-4)


def test_what_cannot_be_cut(dense_folder, text_file, tmp_path):
    with pytest.raises(ValueError, match="Only experts of a mixture can be cut: found cut=0.2"):
        convert_model(dense_folder, tmp_path / "out", cut=0.2, text=text_file, max_tokens=512, block_size=64)
    assert not (tmp_path / "out").exists()
    for cuts, told in (
        ([[48] * 4], "one entry for each of 2 MLPs, found 1"),
        ("none", "lists of whole numbers"),
        ([[48, 0.5, 8, 8], None], "lists of whole numbers"),
        ([[48] * 3, None], "layer 0 must be 4 numbers of at most 48"),
        ([None, [49] * 4], "layer 1 must be 4 numbers of at most 48"),
    ):
        with pytest.raises(ValueError, match=told):
            tiny_dynamoe("qwen3_moe", cut_widths=cuts)
