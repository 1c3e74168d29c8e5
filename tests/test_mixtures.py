"""Bases that are mixtures: each routed expert nested, a width for each pair of token and expert."""

import copy
import pickle
from functools import partial

import pytest
import torch
from conftest import MIXTURES, tiny_config, tiny_dense, tiny_dynamoe, tiny_tokenizer
from reference import assert_close, nested_mixture
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from dynamoe_hf import DynaMoEForCausalLM, calibrate_budgets, evaluate_model, export_dense, train_model
from dynamoe_hf.benchmark import bench_decode, bench_prefill, decode_bytes
from dynamoe_hf.convert import _logits, convert_model, prove_parity
from dynamoe_hf.export import dense_prefix, one_width
from dynamoe_hf.folder import active_parameters, count_parameters, inspect_folder, load_model
from dynamoe_hf.generate import generate_text
from dynamoe_hf.importance import FEW_TOKENS, IMPORTANCES
from dynamoe_hf.modeling import mlp_backends
from dynamoe_hf.modeling.dense_base import mlp_places
from dynamoe_hf.modeling.engine_layers import prepare_for_engine
from dynamoe_hf.modeling.mlp_backends import Costs, Decision
from dynamoe_hf.modeling.moe_base import base_routers, is_mixture, rows_by_expert, rows_by_width
from dynamoe_hf.modeling.sparsity import Thresholds, density_at, thresholds_at
from dynamoe_hf.trainable import choose_trainable, router_parameters


NULL = [0, 0.25, 0.5, 1]  # the first width is none


def mixtures_of(model):
    return [mlp for mlp in model.nested_mlps if is_mixture(mlp)]


def pairs(experts, tokens, seed=0):
    """x (1, T, D), index and weights of experts (1, T, K), and widths (1, T, K)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = experts.router.input.in_features
    index = torch.rand(1, tokens, experts.num_experts, generator=generator).argsort(-1)[..., : experts.top_k]
    width = torch.randint(len(experts.widths), index.shape, generator=generator)
    return torch.randn(1, tokens, hidden, generator=generator), index, torch.rand(index.shape, generator=generator), width


@pytest.mark.parametrize("family", MIXTURES)
def test_full_width_equals_the_base(family, token_ids):
    dense = tiny_dense(family)
    model = DynaMoEForCausalLM.from_dense(copy.deepcopy(dense))
    padded = torch.ones_like(token_ids)
    padded[0, :5] = 0
    with torch.no_grad():
        expected = dense(token_ids).logits
        for settings in ({}, {"force_expert": 3}, {"output_router_logits": True}):
            assert torch.equal(model(token_ids, **settings).logits, expected), settings
        assert torch.equal(model(token_ids, attention_mask=padded).logits, dense(token_ids, attention_mask=padded).logits)
        # Here every pair goes through our own code, and chooses the full width.
        assert_close(family, model(token_ids, sensitivity=torch.ones(2)).logits, expected)
        assert not torch.allclose(model(token_ids, force_expert=0).logits, expected, atol=1e-2), "the experts do nothing here"
    options = {"attention_mask": padded, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(token_ids, **options), dense.generate(token_ids, **options))


@pytest.mark.parametrize("family", MIXTURES)
def test_reordering_changes_nothing_at_full_width(family, token_ids):
    dense = tiny_dense(family)
    expected = dense(token_ids).logits
    model = DynaMoEForCausalLM.from_dense(dense)
    for experts in mixtures_of(model):
        orders = [torch.randperm(experts.widths[-1]) for _ in range(experts.num_experts)]
        before = [experts.layout.tensors(experts, number).down.clone() for number in range(experts.num_experts)]
        experts.layout.reorder(experts, torch.stack(orders))
        for number, order in enumerate(orders):
            assert torch.equal(experts.layout.tensors(experts, number).down, before[number][:, order])
    assert_close(family, model(token_ids).logits, expected, atol=1e-4)


@pytest.mark.parametrize("costs", [None, Costs(0, 0)], ids=["few rows", "sorted"])
@pytest.mark.parametrize("tokens", [1, 2, 40])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_execution_equals_the_masked_loop_with_gradients(family, tokens, costs, monkeypatch):
    if costs is not None:
        monkeypatch.setattr(mlp_backends, "CPU_COSTS", costs)
    experts = mixtures_of(tiny_dynamoe(family, expert_widths=NULL))[-1]
    x, index, weight, width = pairs(experts, tokens)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    leaves = [x, weight, *experts.parameters(recurse=False)]
    target = torch.randn(tokens, x.shape[-1])
    actual = experts.run(x, index, weight, Decision(width))
    expected, _ = nested_mixture(experts, x[0], index[0], weight[0], width[0])
    assert_close("output", actual, expected, atol=1e-4)
    found, wanted = (torch.autograd.grad((y * target).sum(), leaves) for y in (actual, expected))
    for name, a, e in zip(["x", "weight", *dict(experts.named_parameters(recurse=False))], found, wanted):
        assert_close(f"gradient of {name}", a, e, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("of_each", [False, True], ids=["a number", "of each token"])
@pytest.mark.parametrize("costs", [None, Costs(0, 0)], ids=["few rows", "sorted"])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_sparse_execution_equals_the_plain_loop_with_gradients(family, tokens, costs, of_each, monkeypatch):
    if costs is not None:
        monkeypatch.setattr(mlp_backends, "CPU_COSTS", costs)
    experts = mixtures_of(tiny_dynamoe(family, expert_widths=NULL))[-1]
    x, index, weight, width = pairs(experts, tokens)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    leaves = [x, weight, *experts.parameters(recurse=False)]
    target = torch.randn(tokens, x.shape[-1])
    least = torch.linspace(0.2, 0.9, tokens) if of_each else torch.full((tokens,), 0.5)
    hidden, ramp = 0.1 * least, 0.2 if tokens == 1 else 0.0
    thresholds = Thresholds(*((each[None, :, None] if of_each else each[0].item()) for each in (least, hidden)), ramp)
    actual = experts.run(x, index, weight, Decision(width, thresholds=thresholds))
    expected, _ = nested_mixture(experts, x[0], index[0], weight[0], width[0], least, hidden, ramp)
    dense, _ = nested_mixture(experts, x[0], index[0], weight[0], width[0])
    assert not torch.allclose(expected, dense, atol=1e-3), "nothing is left out here"
    assert_close("output", actual, expected, atol=1e-4)
    found, wanted = (torch.autograd.grad((y * target).sum(), leaves) for y in (actual, expected))
    for name, a, e in zip(["x", "weight", *dict(experts.named_parameters(recurse=False))], found, wanted):
        assert_close(f"gradient of {name}", a, e, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("ramp", [0.0, 0.2])
@pytest.mark.parametrize("sensitivity", [0.5, torch.tensor([0.35, 0.9])], ids=["a number", "of each sequence"])
def test_a_mixture_leaves_out_what_the_dial_says(sensitivity, ramp, token_ids):
    """Layer by layer, with and without records, and the share of the weights that is read."""
    table = {"density": [0.4, 0.7], "input": [[0.8, 1.0], [0.2, 0.4]], "hidden": [[0.2, 0.3], [0.1, 0.12]]}
    path, calls = [[0.3, 0.4], [0.8, 0.7]], []
    model = tiny_dynamoe("qwen3_moe", expert_widths=NULL, thresholds=table, density_path=path, threshold_ramp=ramp)
    for experts in mixtures_of(model):
        experts.register_forward_hook(lambda experts, args, output: calls.append((experts, args, output)))
    of_each = thresholds_at(table, torch.as_tensor(density_at(path, sensitivity)).expand(2), ramp)
    with torch.no_grad():
        plain = model(token_ids, sensitivity=sensitivity).logits
        calls.clear()
        with model.routing(records=[]) as routing:
            logits = model(token_ids, sensitivity=sensitivity).logits
        assert_close("logits", plain, logits, atol=1e-4)
        for (experts, args, output), record in zip(calls, routing.records, strict=True):
            own = [value.expand(*token_ids.shape, 1).flatten() for value in of_each[experts.layer][:2]]
            expected, shares = nested_mixture(experts, *args, record.expert.flatten(0, 1), *own, ramp=ramp)
            assert_close("output", output, expected, atol=1e-4)
            assert_close("share", record.share.flatten(), shares)
            assert 0 < shares.mean() < 1
        assert torch.equal(
            model(token_ids, sensitivity=1.0).logits, tiny_dynamoe("qwen3_moe", expert_widths=NULL)(token_ids).logits
        )


def test_choosing_routers_of_a_mixture_learn_beside_sparsity(token_ids):
    table = {"density": [0.4], "input": [[0.5, 0.5]], "hidden": [[0.1, 0.1]]}
    model = tiny_dynamoe("qwen3_moe", expert_widths=NULL, thresholds=table)
    with model.routing(records=[], temperature=1.0, sensitivity=0.5, density=0.4) as routing:
        sparse = model(token_ids).logits
        shares = torch.stack([record.share for record in routing.records])
        widths = torch.stack([record.width for record in routing.records])
    with model.routing(temperature=1.0, sensitivity=0.5):
        assert not torch.allclose(model(token_ids).logits, sparse, atol=1e-3)
    assert 0 < shares.mean() < 0.8 * widths.mean()
    (sparse.float().square().mean() + widths.mean()).backward()
    for experts in mixtures_of(model):
        assert all(parameter.grad.any() for parameter in experts.router.parameters())


def test_no_expert_has_a_gradient_as_large_as_all(token_ids):
    """The gradient of `tensor[number]` is as large as the tensor: with 128 experts, 128 times what it need be."""
    experts = mixtures_of(tiny_dynamoe("qwen3_moe", expert_widths=NULL))[0]
    x, index, weight, width = pairs(experts, 40)
    todo, names = [experts.run(x, index, weight, Decision(width)).grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in names:
            names.add(node)
            todo.extend(following for following, _ in node.next_functions)
    kinds = [node.name() for node in names]
    assert kinds.count("UnbindBackward0") == 2 and not any("Select" in kind and "Index" not in kind for kind in kinds)


@pytest.mark.parametrize("tokens", [1, 3])
def test_outputs_of_experts_are_added_in_float32(tokens):
    """In bfloat16 what experts of little weight give would be lost, one by one."""
    experts = mixtures_of(tiny_dynamoe("qwen3_moe", dense_settings={"num_experts_per_tok": 4}))[0].bfloat16()
    with torch.no_grad():
        for tensor in (experts.gate_up_proj, experts.down_proj):
            tensor[1:] = tensor[0]
    x, index, weight, _ = pairs(experts, tokens)
    weight = torch.tensor([1, 1 / 600, 1 / 600, 1 / 600]).expand_as(weight)
    few, many = (experts.run(x.bfloat16(), index, w.bfloat16(), Decision(3)) for w in (weight * torch.eye(4)[0], weight))
    assert many.dtype == torch.bfloat16
    assert abs((many.float() / few.float()).mean().item() - 1.005) < 0.002


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_autocast_runs_the_experts_in_its_dtype(family, token_ids):
    model = tiny_dynamoe(family, expert_widths=NULL)
    expected = model(token_ids, sensitivity=0.4).logits
    for ids in (token_ids, token_ids[:1, :1]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids, sensitivity=0.4).logits
        assert logits.dtype == torch.bfloat16
        assert_close("logits", logits.float(), expected[: len(ids), : ids.shape[1]], atol=0.2)
        logits.float().square().mean().backward()
    assert all(experts.down_proj.grad.isfinite().all() and experts.down_proj.grad.any() for experts in mixtures_of(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_prefix_takes_its_share_of_multiplications_and_copies_no_weight(family, monkeypatch):
    monkeypatch.setattr(mlp_backends, "CPU_COSTS", Costs(0, 0))
    experts = mixtures_of(tiny_dynamoe(family, expert_widths=NULL))[0]
    x, index, weight, width = pairs(experts, 40)

    def in_place(y, a, b, **_):  # which the counter does not know
        return 2 * a[0] * a[1] * b[1]

    def multiplications(decision):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
            experts.run(x, index, weight, decision)
        return counter.get_total_flops()

    full = multiplications(Decision(3))
    neurons = torch.tensor(experts.widths)[width].sum().item()
    assert multiplications(Decision(width)) / full == pytest.approx(neurons / (width.numel() * experts.widths[-1]))
    assert multiplications(Decision(0)) == 0
    held = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    prefix = experts.layout.tensors(experts, 1).block(0, experts.widths[1])
    assert {tensor.untyped_storage().data_ptr() for tensor in prefix if isinstance(tensor, torch.Tensor)} <= held


@pytest.mark.parametrize("similarity", ["loss_weighted", "loss_gain"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_profile_and_label_equal_the_plain_loop(family, similarity):
    model = tiny_dynamoe(family, similarity=similarity, error_weights=[0.5, 2.0])
    experts = mixtures_of(model)[1]
    x, index, weight, _ = pairs(experts, 6)
    profile = experts.observe(x, index, weight, None, True)[0]
    assert profile.shape == (1, 6, 2, 4)
    for token in range(6):
        for place in range(2):
            pair = x[0, token : token + 1], index[0, token, place].view(1, 1), weight[0, token, place].view(1, 1)
            widths = [nested_mixture(experts, *pair, torch.full((1, 1), width))[0] for width in range(4)]
            errors = [(output - widths[-1]).square().sum() for output in widths]
            if similarity == "loss_gain":
                shares = experts.shares
                gains = [[(errors[e] - errors[f]) / (shares[f] - shares[e]) for f in range(e + 1, 4)] for e in range(3)]
                errors = [max(torch.stack(gain).max(), torch.tensor(0.0)) for gain in gains] + [torch.tensor(0.0)]
            expected = torch.stack([1 / (1 + 2.0 * error) for error in errors]).cummax(0).values
            assert_close("profile", profile[0, token, place], expected, rtol=1e-3)
    routing = {"sensitivity": torch.full((1,), 0.6), "shape": torch.Size((1, 6)), "route": "label"}
    with model.routing(**{name: value for name, value in routing.items() if name != "shape"}, records=[]) as asked:
        experts(x[0], index[0], weight[0])
    label = asked.records[0].label
    assert torch.equal(label, (profile[..., :-1] < 0.6).sum(-1)) and len(label.unique()) > 1


def test_an_expert_that_counts_less_is_cut_further():
    """1 / s - 1 has the factor w^2, in the truth and, exactly, in what the router says."""
    experts = mixtures_of(tiny_dynamoe("qwen3_moe", expert_widths=NULL))[0]
    x, index, weight, _ = pairs(experts, 30)
    profile = partial(experts.observe, thresholds=None, labelled=True)
    for measure in (lambda *given: profile(*given)[0], lambda *given: experts.router(*given).sigmoid()):
        harm, less = (1 / measure(x, index, w)[..., :3].double() - 1 for w in (weight, weight / 20))
        assert torch.allclose(less, harm / 400, rtol=2e-2, atol=1e-6)
    whole, little = (experts.router.choose(experts.router(x, index, w), 0.5) for w in (weight, weight / 20))
    assert (little <= whole).all() and (little < whole).any()
    assert (experts.router.choose(experts.router(x, index, weight * 0), 0.5) == 0).all(), "nothing is lost without it"


def test_router_reads_its_outputs_at_the_chosen_experts():
    router = mixtures_of(tiny_dynamoe("olmoe"))[0].router
    x, index, weight = torch.randn(1, 5, 32), torch.tensor([[[0, 3]] * 5]), torch.rand(1, 5, 2)
    logits = router(x, index, weight)
    for token in range(5):
        hidden = torch.nn.functional.silu(router.input.weight @ x[0, token] + router.input.bias)
        outputs = (router.output.weight @ hidden + router.output.bias).view(4, 3)
        for place, number in enumerate((0, 3)):
            first, *steps = outputs[number]
            rising = torch.stack([first + sum(torch.nn.functional.softplus(step) for step in steps[:k]) for k in range(3)])
            assert_close("logits", logits[0, token, place], rising - 2 * weight[0, token, place].log())


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_records_and_dial_of_each_sequence(family, token_ids):
    model = tiny_dynamoe(family)
    each = torch.tensor([0.05, 0.7])
    out = model(token_ids, sensitivity=each, output_router_logits=True)
    for row, sensitivity in enumerate(each.tolist()):
        alone = model(token_ids[row : row + 1], sensitivity=sensitivity, output_router_logits=True)
        assert_close("logits", out.logits[row : row + 1], alone.logits, atol=1e-4)
    for mlp, expert, share in zip(model.nested_mlps, out.expert_indices, out.mlp_shares):
        assert expert.shape == (2, 12, 2) if is_mixture(mlp) else (2, 12)
        assert_close("share", share, torch.tensor(mlp.shares)[expert].view(2, 12, -1).mean(-1))
    tokens = model(token_ids, sensitivity=each[:, None].expand(2, 12)).logits
    assert torch.equal(tokens, out.logits)
    mixed = [len(expert.unique()) > 1 for expert in out.expert_indices]
    assert any(mixed[1:]), "no mix of widths, so this would prove nothing"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_decoding_with_a_cache_equals_without(family, token_ids):
    model = tiny_dynamoe(family, expert_widths=NULL)
    with torch.no_grad():
        expected = model(token_ids, sensitivity=0.3).logits[:, -3:]
        cache = model(token_ids[:, :-3], sensitivity=0.3, use_cache=True).past_key_values
        steps = []
        for index in range(-3, 0):
            token = token_ids[:, index:][:, :1]
            steps.append(model(token, past_key_values=cache, use_cache=True, sensitivity=0.3).logits)
    assert_close("logits", torch.cat(steps, 1), expected, atol=1e-4)


def test_training_forward_reaches_routers_and_experts(token_ids):
    model = tiny_dynamoe("qwen3_moe").train()
    model.gradient_checkpointing_enable()
    losses = []
    for route in ("label", "router", "random"):
        model.zero_grad()
        torch.manual_seed(0)
        out = model(token_ids, labels=token_ids, route=route)
        out.loss.backward()
        losses.append(out.router_loss.item())
        for experts in mixtures_of(model):
            assert experts.gate_up_proj.grad.any() and experts.router.output.weight.grad.any()
    assert all(loss > 0 for loss in losses)


def test_routers_learn_from_what_their_choices_do(token_ids):
    model = tiny_dynamoe("gpt_oss").train()
    with model.routing(route="router", sensitivity=0.4, temperature=0.5, records=[]) as routing:
        (model(token_ids).logits.square().mean() + sum(record.width.mean() for record in routing.records)).backward()
    for experts in mixtures_of(model):
        assert experts.router.output.weight.grad.any()


def test_the_router_of_the_base_is_not_ours_and_stays_frozen():
    for family in ("gpt_oss", "qwen2_moe", "granitemoe", "ernie4_5_moe"):
        model = tiny_dynamoe(family)
        routers, gates = (
            {id(p) for p in each}
            for each in (router_parameters(model), sum([[*m.parameters()] for m in base_routers(model.model)], []))
        )
        assert gates and not routers & gates
        for parts in ("routers", "mlp", "layers", "all"):
            choose_trainable(model, parts)
            trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
            assert trained and not trained & gates
            assert routers <= trained
            assert parts == "routers" or all(id(experts.down_proj) in trained for experts in mixtures_of(model))


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "mixtral"])
def test_float16_keeps_our_routers_in_float32_alone(family, token_ids, tmp_path):
    tiny_dynamoe(family).save_pretrained(tmp_path)
    model = DynaMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {parameter.dtype for parameter in router_parameters(model)} == {torch.float32}
    assert {parameter.dtype for module in base_routers(model.model) for parameter in module.parameters()} == {torch.float16}
    assert torch.isfinite(model(token_ids, sensitivity=0.4).logits).all()


def test_asking_the_config_for_router_logits_gives_ours(token_ids):
    """The base reads the same field, for the logits of its own router."""
    model = tiny_dynamoe("mixtral", output_router_logits=True)
    for out in (model(token_ids, labels=token_ids), model.model(token_ids, output_router_logits=True)):
        assert [tuple(logits.shape) for logits in out.router_logits] == [(2, 12, 2, 3)] * 2
    hidden = model.model(token_ids).last_hidden_state
    assert_close("logits", model.logits_of(hidden), model(token_ids).logits)


def test_parameters_that_a_token_uses():
    model = tiny_dynamoe("qwen3_moe")
    counts = count_parameters(model)
    one = 3 * 32 * 48  # an expert
    assert counts["mlp"] == counts["idle"] == 2 * 2 * one  # two layers, two of four experts
    assert counts["router"] == sum(parameter.numel() for parameter in router_parameters(model))
    assert active_parameters(counts, 0.5) == counts["total"] - 2 * 2 * one - 2 * one


def test_copies_and_pickles(token_ids):
    model = tiny_dynamoe("mixtral")
    expected = model(token_ids, sensitivity=0.4).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(token_ids, sensitivity=0.4).logits, expected)
        assert type(other.nested_mlps[0]) is type(model.nested_mlps[0])
        with torch.no_grad():
            other.nested_mlps[0].down_proj.zero_()
    assert torch.equal(model(token_ids, sensitivity=0.4).logits, expected)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_importance_ranks_the_neurons_of_each_expert(family, importance):
    dense = tiny_dense(family)
    blocks = torch.randint(3, 128, (6, 32), generator=torch.Generator().manual_seed(0))
    layout, place = "alternating" if family == "gpt_oss" else "", list(mlp_places(dense.model, shared_in=[]))[-1]
    with torch.no_grad():
        down = place.mlp.down_proj if family == "gpt_oss" else place.mlp.down_proj.transpose(1, 2)  # (N, H, D)
        down[:, 7], down[:, 9] = 0, down[:, 9] * 30
        if layout:
            place.mlp.gate_up_proj[:, :, 14:16], place.mlp.gate_up_proj_bias[:, 14], place.mlp.gate_up_proj_bias[:, 15] = (
                0,
                0,
                0,
            )
        else:
            place.mlp.gate_up_proj[:, 7] = 0
    before = {name: parameter.clone() for name, parameter in dense.named_parameters()}
    scores = [score for score in IMPORTANCES[importance](dense, blocks) if score.ndim == 2][-1]
    assert scores.shape == (4, place.mlp.gate_up_proj.shape[2 if layout else 1] // 2)
    seen = scores.any(-1)
    assert seen.any()
    assert (scores[seen][:, 7] == 0).all()
    if importance != "activation":
        assert (scores[seen].argmax(-1) == 9).all()
    assert all(torch.equal(before[name], parameter) for name, parameter in dense.named_parameters())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in dense.parameters())
    assert "forward" not in vars(place.mlp), "the experts are still watched"


def test_taylor_equals_autograd_in_an_expert():
    dense = tiny_dense("mixtral")
    blocks = torch.randint(3, 128, (3, 32), generator=torch.Generator().manual_seed(0))
    scores = IMPORTANCES["taylor"](dense, blocks)[0]
    experts, expected, seen = dense.model.layers[0].mlp.experts, torch.zeros(4, 64, dtype=torch.float64), torch.zeros(4)
    kept = []

    def forward(x, index, weight):
        y = torch.zeros_like(x)
        for token in range(len(x)):
            for number, share in zip(index[token].tolist(), weight[token]):
                hidden = experts._apply_gate(experts.gate_up_proj[number] @ x[token])
                hidden.retain_grad()
                kept.append((token, number, hidden))
                y[token] = y[token] + share * (experts.down_proj[number] @ hidden)
        return y

    experts.forward = forward
    for row in blocks:
        kept.clear()
        logits = dense(row[None]).logits[0]
        torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
        for token, number, hidden in kept:
            if token >= 4:
                expected[number] += (hidden * hidden.grad).abs().double()
                seen[number] += 1
    assert (seen >= FEW_TOKENS).any()
    assert_close("scores", scores, expected * (seen >= FEW_TOKENS)[:, None], atol=1e-6, rtol=1e-3)


def test_rows_of_each_expert():
    index = torch.tensor([[2, 0], [0, 3], [2, 3]])
    assert {number: rows.tolist() for number, rows in rows_by_expert(index, 5)} == {0: [1, 2], 2: [0, 4], 3: [3, 5]}
    width = torch.tensor([[0, 2], [1, 0], [2, 0]])
    sorted_rows = [(number, rows.tolist(), counts) for number, rows, counts in rows_by_width(index, width, 5, 3)]
    assert sorted_rows == [(0, [1, 2], [0, 1, 1]), (2, [4, 0], [1, 0, 1]), (3, [3, 5], [2, 0, 0])]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe"])
def test_rows_change_memory_and_no_number(family, token_ids, tmp_path):
    """A prefix is then one piece of memory in each projection; the model is saved and trained as before."""
    model = tiny_dynamoe(family)
    expected, weights = model(token_ids, sensitivity=0.4).logits, copy.deepcopy(model.state_dict())
    assert model.pack("rows") is model
    experts = mixtures_of(model)[0]
    prefix = experts.layout.tensors(experts, 1).block(0, experts.widths[1])
    for rows in (prefix.up, prefix.down.t()):
        assert rows.is_contiguous()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert_close("logits", model(token_ids, sensitivity=0.4).logits, expected)
    model.save_pretrained(tmp_path)
    assert_close("logits", DynaMoEForCausalLM.from_pretrained(tmp_path)(token_ids, sensitivity=0.4).logits, expected)
    model.train()(token_ids, labels=token_ids).loss.backward()
    assert experts.down_proj.grad.any()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny mixture with its tokenizer, one of whose experts no token is sent to. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("mixture") / "tiny-glm"
    dense = tiny_dense("glm4_moe", num_hidden_layers=3)
    dense.model.layers[1].mlp.gate.e_score_correction_bias[2] = -10
    dense.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_model(base, out, max_tokens=1024, block_size=64, widths=NULL)
    return out


def test_conversion_keeps_the_order_of_unseen_experts_and_says_so(base, converted):
    record = inspect_folder(converted)["conversion"]
    assert record["routed_experts"] == {"count": 8, "in_base_order": 1}
    before, after = AutoModelForCausalLM.from_pretrained(base).model, load_model(converted).model
    for number in range(4):
        rows = [model.layers[1].mlp.experts.down_proj[number] for model in (before, after)]
        assert torch.equal(*rows) == (number == 2)
        assert torch.equal(*(row.sort(-1).values for row in rows))


def test_a_folder_keeps_its_weights_as_they_are_named_here(converted, tmp_path, token_ids):
    """The base's checkpoint has a tensor for each expert, which transformers joins; a folder has them joined."""
    model = load_model(converted)
    model.save_pretrained(tmp_path / "again")
    again, info = DynaMoEForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(again(token_ids, sensitivity=0.4).logits, model(token_ids, sensitivity=0.4).logits)


def test_from_a_dense_folder_to_generated_text(base, converted, text_file, tmp_path, token_ids):
    text = {"text": text_file, "block_size": 64}
    trained = tmp_path / "trained"
    record = train_model(converted, trained, max_tokens=1024, router_tokens=1024, batch_size=4, **text)
    assert record["settings"]["density_range"] == [0.4, 1]
    assert record["router_fit"]["router_agreement"] > 0
    calibration = calibrate_budgets(trained, budgets=[0.6, 0.8], max_tokens=1024, **text)
    assert {mix["density"] for mix in calibration["mixes"]} > {0.4, 1.0}
    assert load_model(trained).config.thresholds is not None
    with pytest.raises(ValueError, match="Adapters wrap linear layers, and a mixture"):
        train_model(converted, tmp_path / "adapted", train_parts="lora", **text)
    card = (trained / "README.md").read_text()
    assert "--widths 0,0.25,0.5,1" in card, (
        "the card's command makes other widths, though the ladder is the same in all layers"
    )
    (entry,) = evaluate_model(trained, budget=0.6, base=base, baselines=["label", "random", "static"], max_tokens=1024, **text)
    assert abs(entry["mean_share"] - 0.6) < 0.1
    assert entry["baselines"].keys() == {"label", "random", "static"}
    assert entry["active_parameters"] < entry["total_parameters"]
    assert len(entry["expert_use"][1]) == 4
    generation = generate_text(trained, "The ", max_new_tokens=4, budget=0.6)
    assert 0 < generation.share < 1
    export_dense(trained, tmp_path / "dense")
    dense, model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), load_model(trained)
    assert type(dense).__name__ == "Glm4MoeForCausalLM"
    assert_close("logits", dense(token_ids).logits, model(token_ids, sensitivity=1.0).logits)
    export_dense(trained, tmp_path / "narrow", width=0.5)
    narrow = AutoModelForCausalLM.from_pretrained(tmp_path / "narrow")
    assert_close("logits", narrow(token_ids).logits, model(token_ids, force_expert=2).logits, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_export_of_one_width(family, tmp_path, token_ids):
    model = tiny_dynamoe(family)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    record = export_dense(tmp_path / "model", tmp_path / "dense", width=0.5)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert record["mlp_width"] == model.nested_mlps[0].widths[1]
    assert_close("logits", dense(token_ids).logits, model(token_ids, force_expert=1).logits, atol=1e-4)


def test_what_a_mixture_does_not_have(token_ids):
    for settings in ({"similarity": "projection"}, {"router_type": "argmax"}):
        with pytest.raises(ValueError, match="A mixture weighs the error of an expert"):
            DynaMoEForCausalLM.from_dense(tiny_dense("mixtral"), **settings)
    model = tiny_dynamoe("mixtral")
    with pytest.raises(ValueError, match="experts of a mixture can be packed in \"rows\" alone: found 'int8'"):
        model.pack("int8")
    with pytest.raises(ValueError, match='"rows" is for the experts of mixtures'):
        tiny_dynamoe("llama").pack("rows")
    model.config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="Engines replace the experts of a mixture"):
        prepare_for_engine(model.config, model.nested_mlps)


def test_experts_that_cannot_be_split_are_named(monkeypatch):
    dense = AutoModelForCausalLM.from_config(tiny_config("mixtral"))
    monkeypatch.setattr(type(dense.model.layers[0].mlp.experts), "_apply_gate", lambda self, both: both)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts.*MixtralExperts.*Supported are mixtures"):
        DynaMoEForCausalLM.from_dense(dense)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_parity_is_not_decided_by_experts_that_weigh_nearly_the_same(family):
    """Rounding may send a token to another expert, as the changed router of the base does here. The proof keeps the experts."""
    dense, probe, routes = tiny_dense(family), torch.randint(128, (2, 32)), {}
    expected = _logits(dense, probe, routes)
    model = DynaMoEForCausalLM.from_dense(dense)
    with torch.no_grad():
        for router in base_routers(model.model):
            router.weight.add_(torch.randn_like(router.weight) * 0.5)
    with pytest.raises(ValueError, match="does not equal its dense base"):
        prove_parity(expected, _logits(model, probe, {}), model.dtype)
    for routing in ({}, {"sensitivity": torch.ones(2)}):
        prove_parity(expected, _logits(model, probe, routes, **routing), model.dtype)
    with torch.no_grad():
        mixtures_of(model)[0].down_proj[routes[mixtures_of(model)[0].layer][0][0, 0]].mul_(1.1)
    with pytest.raises(ValueError, match="does not equal its dense base"):
        prove_parity(expected, _logits(model, probe, routes), model.dtype)


def test_the_benchmark_counts_the_experts_that_are_read(token_ids):
    model = tiny_dynamoe("qwen3_moe")
    total, mlp, router = decode_bytes(model)
    one = 4 * 3 * 32 * 48  # bytes of an expert
    assert mlp == 2 * 2 * one  # two layers, two of four experts
    assert router == 4 * sum(parameter.numel() for parameter in router_parameters(model))
    embeddings = model.get_input_embeddings().weight.numel()
    assert total == 4 * (sum(parameter.numel() for parameter in model.parameters()) - embeddings) - router - mlp
    rows = bench_decode(model, token_ids, {"full width": 1.0, "narrow": 0.3}, 2, 1)
    rows += bench_prefill(model, token_ids[:1], {"full width": 1.0, "narrow": 0.3}, 1)
    assert [row["limit"] for row in rows if row["setting"] == "full width"] == [1, 1]
    assert all(row["limit"] < 1.1 for row in rows)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_one_width_is_the_dense_prefix(family, token_ids):
    model = tiny_dynamoe(family)
    before = [mlp.widths for mlp in model.nested_mlps]
    with one_width(model, 0.6):
        logits = model(token_ids, force_expert=0).logits
    assert_close("logits", logits, dense_prefix(model, 0.6)(token_ids).logits, atol=1e-4)
    assert [mlp.widths for mlp in model.nested_mlps] == before
