"""Mixtures whose shared expert is nested too: an MLP of its own, with its own router, and its own part of every mean."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import MIXTURES, tiny_dense, tiny_dynamoe, tiny_tokenizer
from reference import assert_close, nested_mixture, nested_mlp
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from dynamoe_hf import (
    DynaMoEConfig,
    DynaMoEForCausalLM,
    calibrate_budgets,
    convert_model,
    evaluate_model,
    export_dense,
    fit_thresholds,
    train_model,
)
from dynamoe_hf.calibrate import check_reach
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.folder import active_parameters, count_parameters, inspect_folder, load_model, load_tokenizer
from dynamoe_hf.generate import share_of
from dynamoe_hf.importance import IMPORTANCES
from dynamoe_hf.modeling.dense_base import mlp_places, shared_layers
from dynamoe_hf.modeling.moe_base import is_mixture
from dynamoe_hf.modeling.nested_mlp import NestedMLP
from dynamoe_hf.observe import expert_shares, mlp_parts, run_routers, shares_read
from dynamoe_hf.plan import plan_base
from dynamoe_hf.report import report_folder
from dynamoe_hf.trainer import DynaMoETrainer, DynaMoETrainingArguments


# Those that read the shared expert before the routed ones, and those that read it after them.
SHARED = {"qwen2_moe": [0, 1], "ernie4_5_moe": [1], "deepseek_v2": [1], "deepseek_v3": [1], "glm4_moe": [1]}
NULL = [0, 0.25, 0.5, 1]


def shared_of(model):
    return [place.mlp for place in mlp_places(model.base_model) if place.is_shared]


@pytest.mark.parametrize("family", MIXTURES)
def test_the_shared_expert_is_an_mlp_of_its_own(family, token_ids):
    dense, layers = tiny_dense(family), SHARED.get(family, [])
    expected = dense(token_ids).logits
    assert shared_layers(dense.base_model) == layers
    model = DynaMoEForCausalLM.from_dense(dense)
    assert model.config.nested_shared == layers
    assert model.config.mlp_names == (["0", "0 (shared)"] if 0 in layers else ["0"]) + (
        ["1", "1 (shared)"] if layers else ["1"]
    )
    assert [mlp.layer for mlp in model.nested_mlps] == list(range(2 + len(layers)))
    assert [type(mlp) for mlp in shared_of(model)] == [NestedMLP] * len(layers)
    assert torch.equal(model(token_ids).logits, expected)
    assert_close("logits", model(token_ids, sensitivity=torch.ones(2)).logits, expected)
    for mlp in set(model.nested_mlps) - {*shared_of(model)}:
        mlp.widths = [mlp.widths[-1]] * 4
    narrow = model(token_ids, force_expert=0).logits
    assert bool(layers) == (not torch.allclose(narrow, expected, atol=1e-2)), (
        "a narrow shared expert must be seen in the logits"
    )


@pytest.mark.parametrize("family", SHARED)
def test_records_are_in_the_order_of_the_names(family, token_ids):
    model = tiny_dynamoe(family)
    out = model(token_ids, sensitivity=0.5, output_router_logits=True)
    for mlp, expert, share in zip(model.nested_mlps, out.expert_indices, out.mlp_shares, strict=True):
        assert expert.shape == ((2, 12, 2) if is_mixture(mlp) else (2, 12))
        assert_close("share", share, torch.tensor(mlp.shares)[expert].view(2, 12, -1).mean(-1))
    model.train().gradient_checkpointing_enable()
    with model.routing(route="label", records=[]) as routing:
        out = model(token_ids, labels=token_ids)
        out.loss.backward()
    assert [record.layer for record in routing.records] == list(range(len(model.nested_mlps)))
    assert all(mlp.router.output.weight.grad.any() and mlp.up_proj.weight.grad.any() for mlp in shared_of(model))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_a_layer_at_mixed_widths_equals_the_plain_loop_with_gradients(family):
    model, seen = tiny_dynamoe(family, expert_widths=NULL), []
    block = model.model.layers[1].mlp
    (shared,) = (mlp for mlp in shared_of(model) if mlp in set(block.modules()))
    shared.router.output.bias.data.fill_(0.0)
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    hook = block.experts.register_forward_pre_hook(lambda experts, args: seen.append(args))
    with model.routing(sensitivity=0.5, records=[]) as routing:
        actual = block(x)[0]
    hook.remove()
    ((x_TD, index, weight),) = seen
    record = {record.layer: record for record in routing.records}
    routed, own = record[block.experts.layer].expert[0], record[shared.layer].expert[0]
    assert len(routed.unique()) > 1 and len(own.unique()) > 1, "no mix of widths, so this would prove nothing"
    expected = nested_mlp(shared, x_TD, own)
    if family == "qwen2_moe":
        expected = block.shared_expert_gate(x_TD).sigmoid() * expected
    expected = expected + nested_mixture(block.experts, x_TD, index, weight, routed)[0]
    assert_close("output", actual, expected, atol=1e-4)
    names, leaves = zip(*((name, p) for name, p in block.named_parameters() if p.requires_grad and ".router." not in name))
    target = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    found, wanted = (
        torch.autograd.grad((y * target).sum(), [x, *leaves], retain_graph=True, allow_unused=True) for y in (actual, expected)
    )
    for name, a, e in zip(["x", *names], found, wanted):
        assert (a is None) == (e is None), name
        if a is not None:
            assert_close(f"gradient of {name}", a, e, atol=1e-3, rtol=1e-3)


def test_parts_are_the_weights_that_a_token_reads(token_ids):
    """Of 64 neurons of the dense layer, two routed experts of 48, and a shared one of 48."""
    model = tiny_dynamoe("glm4_moe", expert_widths=NULL)
    assert_close("parts", mlp_parts(model), torch.tensor([64, 96, 48]) * 3 / 208)
    assert_close("shares", expert_shares(model).mean(0), torch.tensor(NULL, dtype=torch.float32))
    out = model(token_ids, sensitivity=0.5, output_router_logits=True)
    dense, routed, shared = (share.mean().item() for share in out.mlp_shares)
    expected = (64 * dense + 96 * routed + 48 * shared) / 208
    assert expected != pytest.approx((dense + routed + shared) / 3, abs=1e-3), "the parts do not show here"
    run = run_routers(model, token_ids, expert_shares(model), 0.5)
    assert run.share_N.mean().item() == pytest.approx(expected, abs=1e-6) == run.width
    model.config.sensitivity = 0.5
    assert share_of(model, token_ids) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="the smallest experts read 0.25"):
        check_reach(tiny_dynamoe("glm4_moe"), [0.2], "budget")
    # The share and the parameters tell the same: those that narrow experts leave out.
    sizes, counts = {0: 3 * 32 * 64, 1: 3 * 32 * 96, 2: 3 * 32 * 48}, count_parameters(model)
    assert counts["mlp"] == sum(sizes.values())
    read = sum(size * share for size, share in zip(sizes.values(), (dense, routed, shared)))
    assert active_parameters(counts, expected) == pytest.approx(counts["total"] - counts["idle"] - counts["mlp"] + read, abs=2)
    # A mixture of which half of the neurons were cut off for good counts for half.
    experts = model.nested_mlps[1]
    experts.cut_widths = [48, 24, 24, 0]
    assert_close("parts", mlp_parts(model), torch.tensor([64, 48, 48]) * 3 / 160)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_equal_parts_change_no_bit(family, token_ids):
    model = tiny_dynamoe(family, dense_settings={"num_hidden_layers": 7})
    assert mlp_parts(model).tolist() == [1.0] * 7
    assert expert_shares(model).tolist() == torch.tensor([mlp.shares for mlp in model.nested_mlps]).tolist()
    with model.routing(sensitivity=0.4, records=[]) as routing:
        model(token_ids)
    assert shares_read(model, routing.records).mean() == torch.stack([record.share for record in routing.records]).mean()


def test_training_counts_the_parts(token_ids, tmp_path):
    model = tiny_dynamoe("deepseek_v3")
    settings = {"report_to": [], "route": "router", "width_loss_coef": 1.0, "train_parts": "routers", "router_loss_coef": 0.0}
    settings |= {"lm_loss_coef": 0.0, "kd_loss_coef": 0.0, "hidden_loss_coef": 0.0, "sensitivity_range": (0.5, 0.5)}
    arguments = DynaMoETrainingArguments(str(tmp_path), **settings)
    trainer, kept = DynaMoETrainer(model, arguments, train_dataset=[]), []
    keep = trainer._keep_metrics
    trainer._keep_metrics = lambda records, *args, **losses: kept.append((records, losses)) or keep(records, *args, **losses)
    model.train()
    trainer.compute_loss(model, {"input_ids": token_ids, "labels": token_ids})
    ((records, losses),) = kept
    mask, parts = torch.ones(2, 12), torch.tensor([64, 96, 48]) / 208
    mask[:, -1] = 0
    width = sum(part * (record.width * mask).sum() / mask.sum() for part, record in zip(parts, records))
    assert losses["width_loss"].item() == pytest.approx(width.item(), rel=1e-5)
    taken = [
        torch.tensor(mlp.shares)[record.expert].view(2, 12, -1).mean(-1) for mlp, record in zip(model.nested_mlps, records)
    ]
    width = sum(part * (share * mask).sum() / mask.sum() for part, share in zip(parts, taken))
    assert trainer._parts["mean_width"][-1].item() == pytest.approx(width.item(), rel=1e-5)


@pytest.mark.parametrize("family", SHARED)
def test_neurons_of_the_shared_expert_are_ranked(family):
    dense = tiny_dense(family)
    blocks = torch.randint(3, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    place = list(mlp_places(dense.base_model))[-1]
    assert place.is_shared
    with torch.no_grad():
        place.mlp.down_proj.weight[:, 7] = 0
        place.mlp.down_proj.weight[:, 9] *= 30
    for importance in ("normalised", "taylor_share"):
        score = IMPORTANCES[importance](dense, blocks)[-1]
        assert score.shape == (place.mlp.down_proj.in_features,)
        assert score.argmax() == 9 and score[7] == 0


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_a_folder_holds_what_belongs_to_it(family, token_ids, tmp_path):
    names = len(SHARED[family])
    weights = [0.1 * number for number in range(2 + names)]
    model = tiny_dynamoe(family, error_weights=weights, expert_widths=[NULL, *[[0.1, 0.2, 0.3, 1]] * (1 + names)])
    model.save_pretrained(tmp_path)
    again, info = DynaMoEForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.nested_shared == SHARED[family] and again.config.format_version == 3
    for other in (again, copy.deepcopy(model)):
        assert torch.equal(other(token_ids, sensitivity=0.4).logits, model(token_ids, sensitivity=0.4).logits)
    first = DynaMoEForCausalLM.from_pretrained(tmp_path, num_hidden_layers=1)
    kept = 2 if family == "qwen2_moe" else 1
    assert first.config.error_weights == weights[:kept] and len(first.config.expert_widths) == kept == len(first.nested_mlps)
    del model.model.layers[1]
    with pytest.raises(ValueError, match=rf"found {kept} MLPs, and in the config num_hidden_layers=2 and nested_shared="):
        model.save_pretrained(tmp_path / "wrong")


def test_what_does_not_fit_the_base_is_refused(tmp_path):
    for wrong in ([2], [1, 0], [1, 1], "1", [0.5], [-1]):
        with pytest.raises(ValueError, match="`nested_shared` must be rising numbers of layers, from 0 to 1"):
            tiny_dynamoe("qwen2_moe", nested_shared=wrong)
    for family, layer in (("deepseek_v3", 0), ("mixtral", 0), ("llama", 1)):
        with pytest.raises(ValueError, match=f"have a shared expert: found layer {layer}"):
            tiny_dynamoe(family, nested_shared=[layer])
    with pytest.raises(ValueError, match="`error_weights` must have one entry for each of 4 MLPs, found 2"):
        tiny_dynamoe("qwen2_moe", error_weights=[1.0, 1.0])
    model = tiny_dynamoe("qwen2_moe", nested_shared=[1])
    assert model.config.mlp_names == ["0", "1", "1 (shared)"] and len(model.nested_mlps) == 3
    with pytest.raises(ValueError, match=r"\"rows\" alone: found 'int8', and a mixture in layer 0\."):
        model.pack("int8")
    assert DynaMoEConfig().nested_shared == [] and DynaMoEConfig().format_version == 2


def test_a_shared_expert_that_cannot_be_split_stays_whole(token_ids):
    dense = tiny_dense("deepseek_v3")
    dense.model.layers[1].mlp.shared_experts.norm = nn.LayerNorm(32)
    expected = dense(token_ids).logits
    model = DynaMoEForCausalLM.from_dense(dense)
    assert model.config.nested_shared == [] and len(model.nested_mlps) == 2
    assert torch.equal(model(token_ids).logits, expected)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("qwen2_moe", {}), ("deepseek_v2", {}), ("deepseek_v3", {"n_shared_experts": 2}), ("glm4_moe", {}), ("ernie4_5_moe", {})],
)
def test_export_of_one_width(family, settings, token_ids, tmp_path):
    model = tiny_dynamoe(family, dense_settings=settings)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    record = export_dense(tmp_path / "model", tmp_path / "dense", width=0.5)
    assert record["mlp_width"] == [mlp.widths[1] for mlp in model.nested_mlps]
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_close("logits", dense(token_ids).logits, model(token_ids, force_expert=1).logits, atol=1e-4)
    # 0.6 of 48 neurons are not a multiple of 8, and a shared expert follows the routed ones.
    export_dense(tmp_path / "model", tmp_path / "odd", width=0.6)
    odd = AutoModelForCausalLM.from_pretrained(tmp_path / "odd")
    assert odd(token_ids).logits.isfinite().all() and odd.config.moe_intermediate_size == 32


def test_a_mixture_of_the_release_before_keeps_its_shared_experts_whole(tmp_path):
    """tests/fixtures/mixture_v2 was written, with what it gives, by the code of 0.1.0."""
    folder = Path(__file__).parent / "fixtures" / "mixture_v2"
    expected = load_file(folder / "expected.safetensors")
    ids, shares, model = expected.pop("input_ids"), expected.pop("shares"), DynaMoEForCausalLM.from_pretrained(folder)
    settings = {"default": {}, "0.2": {"sensitivity": 0.2}, "0.7": {"sensitivity": 0.7}, "expert_0": {"force_expert": 0}}
    settings["full_width"] = {"sensitivity": 1.0}
    model.save_pretrained(tmp_path)
    for other in (model, DynaMoEForCausalLM.from_pretrained(tmp_path)):
        assert other.config.nested_shared == [] and other.config.format_version == 2
        assert type(other.model.layers[1].mlp.shared_expert).__name__ == "Qwen2MoeMLP" and len(other.nested_mlps) == 2
        with torch.no_grad():
            for name, options in settings.items():
                assert_close(name, other(ids, **options).logits, expected[name])
            assert_close("one token", other(ids[:1, :1]).logits, expected["one_token"])
            assert_close("shares", torch.stack(other(ids, output_router_logits=True).mlp_shares), shares)


def test_a_whole_shared_expert_cannot_follow_an_export(tmp_path):
    tiny_dynamoe("glm4_moe", nested_shared=[]).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"cannot hold experts of 24 neurons.*shared_experts"):
        export_dense(tmp_path / "model", tmp_path / "narrow", width=0.5)
    assert not (tmp_path / "narrow").exists()


def test_from_a_dense_folder_to_a_budget(text_file, tmp_path):
    """The share that calibration and evaluation reach is the weighted one, here added up by hand."""
    base, converted, trained = (tmp_path / name for name in ("base", "converted", "trained"))
    tiny_dense("ernie4_5_moe").save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    text = {"text": text_file, "block_size": 64}
    planned = plan_base(base)["parameters"]
    convert_model(base, converted, widths=NULL, cut=0.2, max_tokens=1024, **text)
    facts = inspect_folder(converted)
    assert facts["nested_shared"] == [1] and len(load_model(converted).config.error_weights) == 3
    cuts = load_model(converted).config.cut_widths
    assert cuts[0] is cuts[2] is None and len(cuts[1]) == 4 and sum(cuts[1]) < 4 * 48
    assert planned["mlp"] == 3 * 32 * (64 + 2 * 48 + 48)
    train_model(converted, trained, max_tokens=1024, router_tokens=512, batch_size=4, **text)
    calibrate_budgets(trained, budgets=[0.6, 0.8], max_tokens=1024, **text)
    (entry,) = evaluate_model(trained, budget=0.6, baselines=["label", "random", "static"], max_tokens=1024, **text)
    model = load_model(trained)
    blocks = token_blocks(documents_for("held-out", text_file), load_tokenizer(trained), 64, 1024)
    with model.routing(sensitivity=model.config.sensitivity_of(0.6), records=[]) as routing, torch.no_grad():
        model(blocks)
    dense, routed, shared = (record.share.mean().item() for record in routing.records)
    left = 2 * sum(cuts[1]) / 4  # neurons of two experts, on average
    by_hand = (64 * dense + left * routed + 48 * shared) / (64 + left + 48)
    assert entry["mean_share"] == pytest.approx(by_hand, abs=1e-4) == pytest.approx(0.6, abs=0.1)
    assert len(entry["expert_use"]) == 3
    counts = count_parameters(model)
    assert counts["mlp"] == pytest.approx(3 * 32 * (64 + left + 48), abs=1)
    assert entry["active_parameters"] == pytest.approx(active_parameters(counts, by_hand), abs=2)
    report_folder(trained)
    page = (trained / "report" / "tokens.html").read_text()
    assert 'names = ["0","1","1 (shared)"]' in page


def test_thresholds_of_mlps_of_different_sizes_reach_the_density_together():
    dense = tiny_dense("llama", intermediate_size=192)
    dense.model.layers[1].mlp = tiny_dense("llama", intermediate_size=16).model.layers[1].mlp
    model = DynaMoEForCausalLM.from_dense(dense, error_weights=[1.0, 0.01])
    assert_close("parts", mlp_parts(model), torch.tensor([192, 16]) * 2 / 208)
    blocks = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(0))
    fit_thresholds(model, blocks)
    with model.routing(sensitivity=1.0, density=0.6, records=[]) as routing, torch.no_grad():
        model(blocks)
    wide, narrow = (record.share.mean().item() for record in routing.records)
    assert (192 * wide + 16 * narrow) / 208 == pytest.approx(0.6, abs=0.02)
    assert (wide + narrow) / 2 != pytest.approx(0.6, abs=0.05), "the parts do not show here"
