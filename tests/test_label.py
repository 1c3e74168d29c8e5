"""Similarities and labels against the plain loop over tokens and experts."""

import pytest
import reference
import torch
from conftest import tiny_dense, tiny_dynamoe
from reference import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.label import difficulty_labels, error_weights
from dynamoe_hf.modeling.difficulty import SIMILARITIES
from dynamoe_hf.observe import expert_shares, mean_share, sensitivity_for, similarity_profiles


@pytest.fixture
def inputs():
    torch.manual_seed(3)
    return torch.randn(2, 9, 32)


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
@pytest.mark.parametrize("widths", [[0.25, 0.5, 0.75, 1], [0, 0.4, 1], [1]], ids=str)
@pytest.mark.parametrize("name", SIMILARITIES)
def test_profile_equals_the_plain_loop(family, widths, name, inputs):
    model = DynaMoEForCausalLM.from_dense(tiny_dense(family), expert_widths=widths, similarity=name, error_weights=[0.3, 0.02])
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        profile = mlp.profile(mlp.hidden(inputs))
        for sequence, rows in zip(inputs, profile):
            for x, row in zip(sequence, rows):
                plain = torch.stack([reference.similarity(mlp, x, e, name, 0.02) for e in range(len(widths))])
                # Cosine with the null expert is 0/0 in the definition; ours is 0, the loop's is NaN.
                plain = plain.nan_to_num(0.0)
                plain[-1] = 1
                assert_close(name, row, plain.clamp(max=1).cummax(0).values, atol=1e-4)


@pytest.mark.parametrize("sensitivity", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", SIMILARITIES)
def test_labels_equal_the_plain_loop(name, sensitivity, inputs):
    model = DynaMoEForCausalLM.from_dense(tiny_dense(), similarity=name, error_weights=[0.3, 0.02])
    mlp = model.model.layers[0].mlp
    labels = difficulty_labels(mlp, inputs, sensitivity)
    with torch.no_grad():
        plain = [[reference.label(mlp, x, sensitivity, name, 0.3) for x in sequence] for sequence in inputs]
    assert labels.tolist() == plain
    each = difficulty_labels(mlp, inputs, torch.tensor([sensitivity, 0.3]))
    assert torch.equal(each[0], labels[0])
    assert torch.equal(each[1], difficulty_labels(mlp, inputs, 0.3)[1])


@pytest.mark.parametrize("price", [0.5, 1.0, 2.0])
def test_loss_gain_takes_the_least_error_and_cost(price, inputs):
    """The threshold on the best gain is the argmin over all experts, found here by trying them."""
    widths = [0, 0.1, 0.25, 0.6, 1]
    model = DynaMoEForCausalLM.from_dense(tiny_dense(), expert_widths=widths, similarity="loss_gain", error_weights=[1.0, 1.0])
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        full = mlp(inputs)
        errors = torch.stack([(full - reference.expert_output(mlp, inputs, e)).square().sum(-1) for e in range(len(widths))])
    price = price * errors[0].mean().item()  # so that some tokens pay for width and some do not
    shares = expert_shares(model)[0].view(-1, 1, 1)
    cheapest = (errors + price * shares).argmin(0)
    assert cheapest.unique().numel() > 1
    # By 1 / (1 + gain) >= theta, in float32, where gains are far below one.
    mlp.config.error_weights = [1 / price, 1 / price]
    assert torch.equal(difficulty_labels(mlp, inputs, 0.5), cheapest)


def test_labels_rise_with_sensitivity(inputs):
    mlp = DynaMoEForCausalLM.from_dense(tiny_dense(), error_weights=[0.3, 0.02]).model.layers[0].mlp
    labels = torch.stack([difficulty_labels(mlp, inputs, theta) for theta in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)])
    assert (labels.diff(dim=0) >= 0).all()
    assert (labels[-1] == 3).all(), "at sensitivity 1 every token takes the full width"
    assert labels.unique().numel() > 2


class Products(TorchDispatchMode):
    """Keeps the shapes of the second factors of all products without a bias."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.mm.default:
            self.shapes.append(tuple(args[1].shape))
        return function(*args, **(kwargs or {}))


def test_measuring_computes_no_product_twice(inputs):
    """Beside the dense MLP only what each smaller expert leaves out: all blocks but the first, of the down product."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense(), expert_widths=[0.25, 0.5, 1])
    mlp = model.model.layers[0].mlp
    with torch.no_grad(), Products() as products, model.routing(force_expert=2, needs_labels=True, records=[]):
        output = mlp(inputs)
    assert sorted(products.shapes) == [(16, 32), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert torch.equal(output, mlp(inputs))


def test_wrapped_projections_give_the_same_profile(inputs):
    """LoRA hides the weights, so the profile goes through the modules instead."""
    mlp = DynaMoEForCausalLM.from_dense(tiny_dense("starcoder2"), error_weights=[0.3, 0.02]).model.layers[0].mlp
    with torch.no_grad():
        hidden = mlp.hidden(inputs)
        plain = mlp.profile(hidden)
        mlp.c_proj = torch.nn.Sequential(mlp.c_proj)
        mlp.c_proj.in_features = mlp.c_proj[0].in_features
        assert_close("profile", mlp.profile(hidden), plain)


def test_error_weights_equal_autograd(token_ids):
    """Against gradients of a forward pass that keeps them, layer by layer."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense())
    measured = error_weights(model, token_ids)
    expected = []
    for index, layer in enumerate(model.model.layers):
        total = 0.0
        for row in token_ids:
            kept = []
            hook = layer.mlp.register_forward_hook(
                lambda module, args, output, kept=kept: (output.retain_grad(), kept.append(output))[0]
            )
            logits = model(row[None]).logits[0]
            torch.nn.functional.cross_entropy(logits[:-1], row[1:], reduction="sum").backward()
            hook.remove()
            total += kept[0].grad.square().sum().item()
        expected.append(total / token_ids.numel() / 32)
        assert index < len(measured)
    assert measured == pytest.approx(expected, rel=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model is given back as it was"
    assert not any(layer.training for layer in model.model.layers)


def test_sensitivity_for_a_share(token_ids):
    model = DynaMoEForCausalLM.from_dense(tiny_dense(), error_weights=[0.3, 0.02])
    mlp = model.nested_mlps[0]
    mlp.layout.reorder(mlp, torch.randperm(64))
    profiles, shares = similarity_profiles(model, token_ids.repeat(8, 1)), expert_shares(model)
    assert profiles.shape == (2, 192, 4)
    for share in (0.5, 0.75):
        theta = sensitivity_for(profiles, shares, share)
        assert mean_share(profiles, shares, theta) == pytest.approx(share, abs=0.05)
    assert mean_share(profiles, shares, 1.0) == 1.0


def test_layers_run_twice_only_where_activations_are_too_large(monkeypatch):
    model, blocks = tiny_dynamoe(), torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    calls, found = [], []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(module))
    for limit in (2**31, 0):
        monkeypatch.setattr("dynamoe_hf.observe.KEPT_BYTES", limit)
        calls.clear()
        weights = error_weights(model, blocks)
        found.append((weights, len(calls)))
    assert [count for _, count in found] == [2, 4]
    assert found[0][0] == found[1][0] and min(found[0][0]) > 0
    numbers = sum(sum(weight.shape) for weight in model.model.layers.parameters() if weight.ndim == 2)
    monkeypatch.setattr("dynamoe_hf.observe.KEPT_BYTES", 2 * 4 * numbers * 24)
    calls.clear()
    error_weights(model, blocks)
    assert len(calls) == 2, "what just fits is kept"
