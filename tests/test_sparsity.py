"""Sparsity inside experts: thresholds, the density that the dial joins to a sensitivity, what is read, and how thresholds are fitted."""

import itertools

import pytest
import torch
from conftest import tiny_dynamoe
from reference import kept, sparse_mlp

from dynamoe_hf import DynaMoEConfig, DynaMoEForCausalLM
from dynamoe_hf.calibrate import cheapest_mixes
from dynamoe_hf.modeling.sparsity import density_at, keep_large, thresholds_at
from dynamoe_hf.observe import expert_shares, run_routers
from dynamoe_hf.threshold_fit import DENSITIES, fit_thresholds


TABLE = {"density": [0.4, 0.7], "input": [[0.8, 1.0], [0.2, 0.4]], "hidden": [[2.0, 3.0], [1.0, 1.2]]}
PATH = [[0.3, 0.4], [0.8, 0.7]]


def sparse_model(**settings):
    return tiny_dynamoe(thresholds=TABLE, density_path=PATH, **settings)


def test_thresholds_between_densities():
    assert thresholds_at(TABLE, 1.0, 0.2) is None
    assert thresholds_at(TABLE, 0.4, 0.2)[1] == pytest.approx((1.0, 3.0, 0.2))
    assert thresholds_at(TABLE, 0.1, 0.2) == thresholds_at(TABLE, 0.4, 0.2), "no further than what was measured"
    assert thresholds_at(TABLE, 0.55, 0.0)[0] == pytest.approx((0.5, 1.5, 0.0))
    assert thresholds_at(TABLE, 0.85, 0.0)[0] == pytest.approx((0.1, 0.5, 0.0)), "at density 1 nothing is left out"


def test_each_sequence_as_alone():
    densities = torch.tensor([0.1, 0.4, 0.5, 0.7, 0.9, 1.0])
    for layer, both in enumerate(thresholds_at(TABLE, densities, 0.2)):
        for of_each, name in zip(both[:2], ("input", "hidden"), strict=True):
            alone = [thresholds_at(TABLE, d, 0.2) for d in densities.tolist()]
            expected = [0.0 if found is None else getattr(found[layer], name) for found in alone]
            assert of_each.shape == (6, 1, 1)
            assert of_each.flatten().tolist() == pytest.approx(expected, abs=1e-6)
        assert both.ramp == 0.2
    sensitivities = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95, 1.0])
    assert density_at(PATH, sensitivities).tolist() == pytest.approx([density_at(PATH, s) for s in sensitivities.tolist()])


@pytest.mark.parametrize("of_each", [False, True], ids=["a number", "of each sequence"])
@pytest.mark.parametrize("ramp", [0.0, 0.2, 0.95])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_is_small_falls_to_zero(dtype, ramp, of_each):
    """The function and its gradient, number by number; what is not a number, or not finite, stays."""
    least = torch.tensor([0.5, 2.0]) if of_each else torch.tensor([0.5, 0.5])
    values = torch.linspace(-3, 3, 40).repeat(2, 1).to(dtype).requires_grad_()
    threshold = least.view(2, 1) if of_each else 0.5
    found = keep_large(values, threshold, ramp)
    found.sum().backward()
    assert found.dtype == dtype
    exact = values.detach().double().requires_grad_()
    expected = torch.stack([torch.stack([kept(v, t, ramp) for v in row]) for row, t in zip(exact, least.tolist())])
    expected.sum().backward()
    close = {"atol": 0.02 / (1 - ramp), "rtol": 0.02} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **close)
    torch.testing.assert_close(values.grad.double(), exact.grad, **close)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    torch.testing.assert_close(keep_large(odd, least[:1] if of_each else 0.5, ramp), odd, equal_nan=True)


@pytest.mark.parametrize("threshold", [0.5, torch.tensor([0.5])], ids=["a number", "a tensor"])
def test_a_ramp_has_no_step(threshold):
    """What rounding moves, moves the result by that over the ramp, and no more."""
    values = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    steps = [keep_large(values, threshold, ramp).diff().abs().max().item() for ramp in (0.0, 0.2)]
    assert steps[0] > 0.49
    assert steps[1] == pytest.approx(1e-4 / 0.2, rel=1e-6)


def test_the_dial_moves_both():
    assert [density_at(PATH, s) for s in (0.1, 0.3, 0.55, 0.8, 0.9, 1.0)] == pytest.approx([0.4, 0.4, 0.55, 0.7, 0.85, 1.0])
    assert density_at([], 0.5) == 1


@pytest.mark.parametrize("family", ["llama", "starcoder2", "phi3"])
@pytest.mark.parametrize("sensitivity", [0.5, torch.tensor([0.35, 0.9])], ids=["a number", "of each sequence"])
@pytest.mark.parametrize("ramp", [0.0, 0.2])
def test_a_model_leaves_out_what_the_dial_says(family, sensitivity, ramp, token_ids):
    """Against the plain loop, layer by layer; with and without records; and the share of the weights that is read."""
    model, calls = sparse_model(family=family, threshold_ramp=ramp), []
    for mlp in model.nested_mlps:
        mlp.register_forward_hook(lambda mlp, args, output: calls.append((mlp, args[0], output)))
    densities = torch.as_tensor(density_at(PATH, sensitivity)).expand(2)
    of_each = thresholds_at(TABLE, densities, ramp)
    with torch.no_grad():
        plain = model(token_ids, sensitivity=sensitivity).logits
        calls.clear()
        with model.routing(records=[]) as routing:
            logits = model(token_ids, sensitivity=sensitivity).logits
        torch.testing.assert_close(plain, logits, atol=1e-4, rtol=1e-4)
        for (mlp, x, output), record in zip(calls, routing.records, strict=True):
            own = [value.expand(*x.shape[:2], 1).flatten() for value in of_each[mlp.layer][:2]]
            expected, shares = sparse_mlp(mlp, x.flatten(0, 1), record.expert.flatten(), *own, ramp=ramp)
            torch.testing.assert_close(output, expected.view_as(output), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(record.share.flatten(), shares)
            assert shares.min() > 0 and shares.max() < 1


def test_at_sensitivity_1_nothing_is_left_out(token_ids):
    model, dense = sparse_model(), tiny_dynamoe()
    with torch.no_grad():
        assert torch.equal(model(token_ids, sensitivity=1.0).logits, dense(token_ids).logits)
        assert torch.equal(model(token_ids, force_expert=3).logits, dense(token_ids).logits)
        assert torch.equal(model(token_ids, sensitivity=0.5, density=1.0).logits, dense(token_ids, sensitivity=0.5).logits)
        assert not torch.equal(model(token_ids, sensitivity=0.5).logits, dense(token_ids, sensitivity=0.5).logits)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_labels_and_sparsity_together(family, token_ids):
    """Training: labels are those of what sparsity leaves, and the loss reaches experts and routers."""
    model = sparse_model(family=family).train()
    model.config.thresholds = {
        **TABLE,
        "hidden": [[0.2, 0.3], [0.1, 0.12]],
    }  # experts of a mixture are small, and what they give
    out = model(token_ids, labels=token_ids)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("ramp", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_decoding_equals_one_pass(family, ramp, token_ids):
    model = sparse_model(family=family, threshold_ramp=ramp)
    with torch.no_grad():
        whole = model(token_ids, sensitivity=0.5).logits
        cache, steps = None, []
        for step in token_ids.split(1, dim=1):
            out = model(step, past_key_values=cache, use_cache=True, sensitivity=0.5)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-4, rtol=1e-4)


def test_saved_and_loaded(tmp_path, token_ids):
    model = sparse_model(threshold_ramp=0.3)
    model.save_pretrained(tmp_path)
    again = DynaMoEForCausalLM.from_pretrained(tmp_path)
    assert again.config.thresholds == TABLE and again.config.density_path == PATH and again.config.threshold_ramp == 0.3
    with torch.no_grad():
        assert torch.equal(model(token_ids, sensitivity=0.5).logits, again(token_ids, sensitivity=0.5).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thresholds": [0.1]}, "`thresholds` must hold density, hidden, input, found"),
        ({"thresholds": {**TABLE, "density": [0.7, 0.4]}}, "densities that rise"),
        ({"thresholds": {**TABLE, "density": [0.4, 1.0]}}, "densities that rise"),
        ({"thresholds": {**TABLE, "input": [[0.1, 0.2]]}}, "2 lists of 2 numbers in `input`"),
        ({"thresholds": {**TABLE, "hidden": [[0.1, float("nan")], [0.1, 0.2]]}}, "finite and not negative"),
        *(({"threshold_ramp": ramp}, r"`threshold_ramp` must be in \[0, 1\)") for ramp in (1, -0.1, float("nan"), True, "0.2", None)),
        ({"thresholds": None, "density_path": PATH}, "needs `thresholds`"),
        ({"density_path": [[0.8, 0.4], [0.3, 0.7]]}, "rise together"),
        ({"density_path": [[0.3, 0.7], [0.8, 0.4]]}, "rise together"),
        ({"density_path": [[0.3, 0.7], [1.0, 0.8]]}, "rise together"),
        ({"density_path": [[0.3, 0.0]]}, "in \\(0, 1\\]"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(fields, message):
    base = tiny_dynamoe().config.base_config
    with pytest.raises(ValueError, match=message):
        DynaMoEConfig(base_config=base, **{"thresholds": TABLE, "density_path": PATH, **fields})


@pytest.mark.parametrize("density", [0.0, 1.5, float("nan"), torch.tensor([0.5, 0.5, 0.5])])
def test_densities_that_are_none(density, token_ids):
    with pytest.raises(ValueError, match="`density` must be"):
        sparse_model()(token_ids, density=density)


def test_a_density_needs_thresholds(token_ids):
    with pytest.raises(ValueError, match=r"needs thresholds.*dynamoe calibrate"):
        tiny_dynamoe()(token_ids, density=0.5)


def blocks_of(count=24, length=32):
    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("uniform", "ramp"), [(False, 0.0), (True, 0.0), (True, 0.3)])
@pytest.mark.parametrize("family", ["llama", "starcoder2", "qwen3_moe"])
def test_fitted_thresholds_reach_their_densities(family, uniform, ramp):
    model, blocks = tiny_dynamoe(family, error_weights=[0.5, 2.0], threshold_ramp=ramp), blocks_of()
    table = fit_thresholds(model, blocks, uniform)
    assert table["density"] == list(DENSITIES)
    for rows in (table["input"], table["hidden"]):
        assert all(a >= b for low, high in itertools.pairwise(rows) for a, b in zip(low, high)), (
            "thresholds fall along density"
        )
    model.config.check()
    for density in (0.4, 0.5, 0.75):
        read = run_routers(model, blocks, expert_shares(model), 1.0, density=density).share_N.mean().item()
        assert read == pytest.approx(density, abs=0.06)


def test_fitted_thresholds_cost_less_than_uniform_ones():
    """The sum of what both products of all layers lose, in units of loss, measured as the fit measures it: each alone."""
    model, blocks = tiny_dynamoe(error_weights=[0.1, 5.0]), blocks_of()
    lost = {}
    for uniform in (False, True):
        fit_thresholds(model, blocks, uniform)
        lost[uniform] = 0.0
        inputs: list = []
        hooks = [
            mlp.register_forward_pre_hook(lambda mlp, args, into=inputs: into.append(args[0])) for mlp in model.nested_mlps
        ]
        with torch.no_grad():
            model(blocks)
            for mlp, x, both in zip(model.nested_mlps, inputs, thresholds_at(model.config.thresholds, 0.5, 0.0)):
                for part in (both._replace(hidden=0.0), both._replace(input=0.0)):
                    error = mlp.down_linear(mlp.sparse_hidden(x, part)) - mlp.down_linear(mlp.hidden(x))
                    lost[uniform] += model.config.error_weights[mlp.layer] * error.square().sum(-1).mean().item()
        for hook in hooks:
            hook.remove()
    assert lost[False] < 0.8 * lost[True]


def test_the_cheapest_mixes_are_monotone():
    """Of mixes whose costs add up: near the least cost by brute force, and both fall with the budget."""
    values = (0.4, 0.55, 0.7, 0.85, 1.0)

    def cost(width, density):
        return 0.5 * (1 - width) ** 2 + 2 * (1 - density) ** 3

    mixes = [
        {"width": w, "sensitivity": w - 0.01, "density": d, "share": w * d, "kl": cost(w, d)}
        for w, d in itertools.product(values, values)
    ]
    budgets = (0.9, 0.75, 0.6, 0.5, 0.4)
    chosen = cheapest_mixes(mixes, budgets, lambda width: width - 0.01)
    for earlier, later in itertools.pairwise(chosen):
        assert later[0] < earlier[0] and later[1] <= earlier[1]
    for budget, (sensitivity, density) in zip(budgets, chosen):
        width = sensitivity + 0.01
        assert width * density == pytest.approx(budget, abs=0.02)
        steps = torch.linspace(max(0.4, budget), 1, 200).tolist()
        best = min(cost(w, budget / w) for w in steps if budget / w >= 0.4)
        assert cost(width, density) < 1.15 * best + 1e-3
