"""Routers fitted on cached inputs: better than a constant, and to the harm that they are asked for."""

import pytest
import torch
from reference import assert_close, causal_losses
from training import tiny_model

from dynamoe_hf import fit_routers
from dynamoe_hf.convert import scale_difficulty
from dynamoe_hf.modeling.routing import ProfileRouter
from dynamoe_hf.router_fit import RouterFit, fit_router, router_inputs


@pytest.mark.parametrize("router_type", ["profile", "argmax"])
def test_fitted_routers_beat_the_best_constant(router_type):
    model = tiny_model(router_type=router_type)
    blocks = torch.randint(3, 128, (200, 16), generator=torch.Generator().manual_seed(0))
    model.config.error_weights, model.config.train_sensitivity = scale_difficulty(model, blocks[:40])
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if ".router." not in name}
    whole = fit_routers(model, blocks, steps=300, harm="layer")
    assert whole["router_agreement"] > whole["label_frequency"] + 0.15, whole
    assert whole["tokens"] == 3200
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in before.items())
    # One layer at a time, as where memory is short, must do as well.
    by_layer = fit_routers(model, blocks, steps=300, harm="layer", cache_bytes=1)
    assert by_layer["router_agreement"] == pytest.approx(whole["router_agreement"], abs=0.06)
    assert fit_routers(model, blocks, steps=1, sensitivity_range=(1, 1))["label_frequency"] == 1, (
        "at 1 every label is the widest"
    )


def test_token_harm_is_the_gradient_of_the_loss():
    """The weights of tokens are the squared gradients at each MLP's output, and collecting them leaves the parameters alone."""
    model, blocks = tiny_model().eval(), torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
    model.requires_grad_(True)
    model.config.train_sensitivity = [0.5, 0.5]
    span = model.config.train_sensitivity
    inputs, profiles, weights, _ = router_inputs(model, range(2), blocks, RouterFit(harm="token", sensitivity_range=span))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    outputs = []
    hooks = [layer.mlp.register_forward_hook(lambda *args: outputs.append(args[-1])) for layer in model.model.layers]
    with model.routing(route="label", sensitivity=0.5, needs_labels=True, records=[]):
        logits = model(blocks).logits
    for hook in hooks:
        hook.remove()
    lm_loss, _ = causal_losses(logits, logits, blocks)
    for gradient, weight in zip(torch.autograd.grad(lm_loss, outputs), weights):
        expected = gradient.square().sum(-1).flatten()
        assert_close("weights", weight, expected / expected.mean(), rtol=1e-4)
    by_layer = RouterFit(harm="layer", sensitivity_range=span)
    plain_inputs, plain_profiles, nothing, _ = router_inputs(model, range(2), blocks, by_layer)
    assert nothing == [None, None]
    for kept, plain in zip(sum(inputs, []) + profiles, sum(plain_inputs, []) + plain_profiles):
        assert torch.equal(kept, plain)


def test_a_router_predicts_the_mean_harm():
    """Two kinds of tokens, whose weights are as likely to be small as large: what is predicted is each kind's mean, not its middle."""
    torch.manual_seed(0)
    kind = torch.randint(2, (4000,))
    x = torch.randn(4000, 8) * 0.1 + kind[:, None]
    weights = torch.distributions.Exponential(1.0).sample((4000,)) * (1 + 3 * kind)
    profile = torch.tensor([0.5, 0.8, 1.0]).expand(4000, 3)  # harms of 1 and a quarter
    router = ProfileRouter(8, 16, 3)
    fit_router(router, [x], profile, torch.full((4000,), 0.5), 400, 512, 2e-2, weights)
    with torch.no_grad():
        predicted = (-router(x)).exp()
    for index in range(2):
        mean = weights[kind == index].mean().item()
        assert predicted[kind == index].mean(0).tolist() == pytest.approx([mean, mean / 4], rel=0.1)


@pytest.mark.parametrize(
    ("settings", "harm", "message"),
    [({}, "best", "`harm` is unknown: found 'best'"), ({"similarity": "cosine"}, "token", "weighted by the loss, found ProfileRouter"),
     ({"router_type": "argmax"}, "token", "found ArgmaxRouter")],
)  # fmt: skip
def test_harm_that_a_model_does_not_have(settings, harm, message):
    with pytest.raises(ValueError, match=message):
        fit_routers(tiny_model(**settings), torch.randint(3, 128, (4, 16)), harm=harm)


@pytest.mark.parametrize(
    ("settings", "harm"), [({}, "token"), ({"similarity": "cosine"}, "layer"), ({"router_type": "argmax"}, "layer")]
)
def test_harm_by_default(settings, harm):
    """By token where the model knows it, and with everything frozen too, as after LoRA."""
    model = tiny_model(**settings).requires_grad_(False)
    before = model.state_dict()["model.layers.0.mlp.router.output.weight"].clone()
    assert fit_routers(model, torch.randint(3, 128, (4, 16)), steps=2)["harm"] == harm
    assert not torch.equal(model.state_dict()["model.layers.0.mlp.router.output.weight"], before)


def test_fitting_leaves_activation_checkpointing_as_it_was():
    """A model of one's own script may have it enabled already: harm by token takes a backward pass of its own."""
    model = tiny_model()
    model.gradient_checkpointing_enable()
    fit_routers(model, torch.randint(3, 128, (4, 16)), steps=2, harm="token")
    assert model.is_gradient_checkpointing
