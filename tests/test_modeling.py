"""The model: every family equals its dense base at full width, every route equals the plain loop, the dial turns."""

import copy
import sys

import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_dense, tiny_dynamoe
from reference import assert_close, nested_mlp
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from dynamoe_hf import DynaMoEConfig, DynaMoEForCausalLM
from dynamoe_hf.modeling import DynaMoEModel
from dynamoe_hf.modeling.dense_base import decoder_layers, mlp_places, weight_of
from dynamoe_hf.modeling.moe_base import layout_at
from dynamoe_hf.modeling.routing import Routing


BIT_EQUAL = {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "gptj", "opt", "xglm", "biogpt"}

SPARSE = {
    "sensitivity": 0.4,
    "thresholds": {"density": [0.5], "input": [[0.3, 0.3]], "hidden": [[0.05, 0.05]]},
    "density_path": [[0.4, 0.5]],
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_equals_dense(family, tied, token_ids):
    dense = tiny_dense(family, tie_word_embeddings=tied)
    model = DynaMoEForCausalLM.from_dense(copy.deepcopy(dense))
    padded = torch.ones_like(token_ids)
    padded[0, :5] = 0  # left padding
    with torch.no_grad():
        expected = dense(token_ids).logits, dense(token_ids, attention_mask=padded).logits
        # The dial at 1 takes the dense kernels; the routed path with every token at full width must agree as well.
        for settings in ({}, {"force_expert": 3}, {"force_expert": 3, "output_router_logits": True}):
            actual = model(token_ids, **settings).logits, model(token_ids, attention_mask=padded, **settings).logits
            for name, a, e in zip(("logits", "logits of a padded batch"), actual, expected):
                if family in BIT_EQUAL:
                    assert torch.equal(a, e), f"{family}: {name} differ by {(a - e).abs().max():.3g}"
                assert_close(f"{family} {name}", a, e)
    options = {"attention_mask": padded, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(token_ids, **options), dense.generate(token_ids, **options))
    assert expected[0].std() > 1e-3, "the tiny model is degenerate, so this test would prove nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
        {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ],
    ids=["350m", "no biases"],
)
def test_opt_in_all_its_forms(settings, token_ids):
    """With norms behind the layers and embeddings of another size, as OPT-350m has; and without biases, as Galactica."""
    dense = tiny_dense("opt", **settings)
    expected = copy.deepcopy(dense)(token_ids).logits
    model = DynaMoEForCausalLM.from_dense(dense)
    assert torch.equal(model(token_ids).logits, expected)
    hidden_states = model.base_model(token_ids).last_hidden_state
    assert torch.equal(model.logits_of(hidden_states), expected)
    assert not torch.allclose(model(token_ids, force_expert=0).logits, expected, atol=1e-2), "the MLPs do nothing here"


@pytest.mark.parametrize("family", ["gpt2", "opt", "xglm"])
def test_families_without_a_module_of_linear_layers(family, token_ids, tmp_path):
    """Their narrow experts are prefixes of the dense base's own weights, for each token its own, whatever shape a layer gives its tokens."""
    dense = tiny_dense(family)
    places = list(mlp_places(dense.base_model))
    weights = [(weight_of(getattr(place.mlp, layout_at(place).down)).detach().clone(), layout_at(place)) for place in places]
    model = tiny_dynamoe(family)
    for mlp, (down, layout) in zip(model.nested_mlps, weights):
        assert all(type(getattr(mlp, name)) is torch.nn.Linear for name in layout.projections)
        assert torch.equal(mlp.down_linear.weight, down) and mlp.down_linear.weight.is_contiguous()
    calls = []
    hooks = [mlp.register_forward_hook(lambda mlp, args, output: calls.append((args[0], output))) for mlp in model.nested_mlps]
    sensitivity = torch.tensor([0.1, 0.8])
    out = model(token_ids, sensitivity=sensitivity, output_router_logits=True)
    for mlp, (x, y), expert, hook in zip(model.nested_mlps, calls, out.expert_indices, hooks):
        hook.remove()
        assert expert.shape == token_ids.shape and len(expert.unique()) > 1
        assert_close(family, y.flatten(0, -2), nested_mlp(mlp, x.flatten(0, -2), expert.flatten()))
    alone = [model(token_ids[i : i + 1], sensitivity=theta).logits for i, theta in enumerate(sensitivity.tolist())]
    assert_close("each sequence at its own sensitivity", out.logits, torch.cat(alone))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close("loaded", loaded(token_ids, sensitivity=sensitivity).logits, out.logits)


def test_sensitivity_is_a_dial(token_ids):
    model = tiny_dynamoe()
    widths = []
    for sensitivity in (0.02, 0.1, 0.3, 0.6, 0.9, 1.0):
        out = model(token_ids, sensitivity=sensitivity, output_router_logits=True)
        widths.append(sum(expert.float().mean().item() for expert in out.expert_indices))
        logits = out.router_logits[0]
        assert (logits.diff(dim=-1) >= 0).all(), "the predicted profile must rise"
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] == 2 * 3, widths


def test_adapters_on_routers_are_heard(token_ids):
    """In decoding too, one token at a time."""
    peft = pytest.importorskip("peft")
    model = tiny_dynamoe()
    with torch.no_grad():
        model(token_ids[:1, :1], sensitivity=0.4)  # before the routers are wrapped
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["router"]))
        for name, parameter in wrapped.named_parameters():
            if "modules_to_save.default.output" in name:
                parameter.normal_(std=3.0)
        mlp, x = model.model.layers[1].mlp, torch.randn(1, 8, 32)
        for sensitivity in (0.2, 0.4, 0.6, 0.8):
            chosen = mlp.router.choose(mlp.router(x), sensitivity)
            with model.routing(sensitivity=sensitivity):
                for token, expert in zip(x[0], chosen[0]):
                    assert_close("one token", mlp(token[None, None])[0], nested_mlp(mlp, token[None], expert[None]))


@pytest.mark.parametrize("router", ["profile", "argmax"])
def test_routers_that_a_checkpoint_lacks_are_fresh(router, token_ids):
    """transformers makes empty tensors of what is missing, and draws what it knows how to draw."""
    model = tiny_dynamoe(router_type=router)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
    loaded = DynaMoEForCausalLM.from_pretrained(None, config=model.config, state_dict=weights)
    for mlp in loaded.nested_mlps:
        expected = copy.deepcopy(mlp.router)
        expected.reset()
        assert torch.equal(mlp.router.output.weight, expected.output.weight)
        assert torch.equal(mlp.router.output.bias, expected.output.bias)
        assert 0.5 < mlp.router.input.weight.std() * 32**0.5 < 1.5 and not mlp.router.input.bias.any()
    assert_close("full width", loaded(token_ids).logits, tiny_dense()(token_ids).logits)


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "AdaLoraConfig"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_neox", "gpt2"])
def test_adapters_go_where_those_of_a_dense_model_go(kind, family, token_ids):
    """By default on what the base's family has by default, but that IA3 follows Llama; with `all-linear` not on routers."""
    peft = pytest.importorskip("peft")
    steps = {"total_step": 10} if kind == "AdaLoraConfig" else {}
    for targets in (None, "all-linear"):
        if (kind == "IA3Config" and targets) or (kind, family, targets) == ("AdaLoraConfig", "gpt_neox", None):
            continue  # PEFT has no such default
        config = getattr(peft, kind)
        adapted = []
        like = "llama" if kind == "IA3Config" and family not in ("gpt_neox", "gpt2") else family
        for model in (tiny_dense(like), tiny_dynamoe(family)):
            wrapped = peft.get_peft_model(model, config(task_type="CAUSAL_LM", target_modules=targets, **steps))
            adapted.append(set(wrapped.base_model.targeted_module_names))
        assert adapted[0] == adapted[1]
        assert wrapped(token_ids, sensitivity=0.4).logits.isfinite().all()


def test_sensitivity_for_each_sequence(token_ids):
    model = tiny_dynamoe()
    both = model(token_ids, sensitivity=torch.tensor([0.1, 0.8])).logits
    assert_close("first", both[:1], model(token_ids[:1], sensitivity=0.1).logits)
    assert_close("second", both[1:], model(token_ids[1:], sensitivity=0.8).logits)
    assert model.config.sensitivity == 1.0, "a per-call value must not stay"
    generated = model.generate(token_ids, sensitivity=torch.tensor([0.1, 0.8]), max_new_tokens=5, num_beams=2, do_sample=False)
    alone = model.generate(token_ids[1:], sensitivity=0.8, max_new_tokens=5, num_beams=2, do_sample=False)
    assert torch.equal(generated[1:, : alone.shape[1]], alone)


@pytest.mark.parametrize("dial", [{"sensitivity": 0.3}, {"force_expert": 0}, {"sensitivity": torch.tensor([0.1, 0.9])}])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_both_passes_of_guidance_hear_the_dial(dial, options, token_ids):
    model, heard = tiny_dynamoe(), []
    for mlp in model.nested_mlps:
        mlp.register_forward_pre_hook(lambda mlp, args: heard.append((args[0].shape[0], mlp.slot.current)))
    options = {"do_sample": False, "max_new_tokens": 3, "guidance_scale": 1.5, **options}
    model.generate(token_ids, **dial, **options)
    for batch, routing in heard:
        for name, value in dial.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(getattr(routing, name), value.repeat_interleave(batch // 2))
            else:
                assert getattr(routing, name) == value
    assert model.slot.requested == Routing() and len(heard) > 2 * 3 * 2 - 1


def test_an_assistant_drafts_at_its_own_place_of_the_dial(token_ids):
    model, draft, heard = tiny_dynamoe(), tiny_dynamoe(sensitivity=0.2), {"model": set(), "draft": set()}
    for name, each in (("model", model), ("draft", draft)):
        for mlp in each.nested_mlps:
            mlp.register_forward_pre_hook(lambda mlp, args, name=name: heard[name].add(mlp.slot.current.sensitivity))
    options = {"do_sample": False, "max_new_tokens": 8}
    found = model.generate(token_ids[:1], sensitivity=0.7, assistant_model=draft, **options)
    assert heard == {"model": {0.7}, "draft": {0.2}}
    assert torch.equal(found, model.generate(token_ids[:1], sensitivity=0.7, **options))
    with model.routing(sensitivity=0.7):
        assert torch.equal(found, model.generate(token_ids[:1], **options)), "what is asked for around the call is heard too"


def test_cache_equals_no_cache(token_ids):
    model = tiny_dynamoe()
    model.set_sensitivity(0.4)
    whole = model(token_ids).logits
    out, steps = model(token_ids[:, :6], use_cache=True), []
    for position in range(6, token_ids.shape[1]):
        step = model(token_ids[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        steps.append(step.logits)
    assert_close("decoded logits", torch.cat(steps, 1), whole[:, 6:])


def test_budgets():
    model = tiny_dynamoe(budgets={"0.5": 0.2, "0.75": 0.6})
    model.set_budget(0.75)
    assert model.config.sensitivity == 0.6
    model.set_budget(0.625)
    assert model.config.sensitivity == pytest.approx(0.4)
    model.set_budget(1)
    assert model.config.sensitivity == 1.0
    with pytest.raises(ValueError, match=r"outside the calibrated range 0\.5 to 1"):
        model.set_budget(0.3)
    with pytest.raises(ValueError, match="no calibrated budgets"):
        tiny_dynamoe().set_budget(0.5)


def test_widths_for_each_layer(token_ids):
    model = tiny_dynamoe(expert_widths=[[0.25, 1.0], [0.5, 1.0]])
    assert [layer.mlp.widths for layer in model.model.layers] == [[16, 64], [32, 64]]
    assert torch.isfinite(model(token_ids, force_expert=0).logits).all()


def test_training_forward_reaches_router_and_experts(token_ids):
    model = tiny_dynamoe().train()
    out = model(token_ids, labels=token_ids)
    assert_close("loss", out.loss, out.lm_loss + out.router_loss)
    out.loss.backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still, f"no gradient reached {still}"


@pytest.mark.parametrize("route", ["label", "router", "random"])
def test_gradient_checkpointing_changes_nothing(route, token_ids):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_dynamoe(train_route=route).train()
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(5)
        loss = model(token_ids, labels=token_ids).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()} | {"loss": loss.detach()})
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected)


def test_gradients_equal_the_reference_model(token_ids):
    """The whole training loss against a model that runs every token and layer through the plain loop."""
    model = tiny_dynamoe().train()
    with model.routing(route="label", sensitivity=0.5, needs_labels=True, records=[]) as routing:
        out = model(token_ids, labels=token_ids)
        experts = [record.expert for record in routing.records]
    out.lm_loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if "router" not in name}
    model.zero_grad()
    for layer, expert in zip(model.model.layers, experts):
        mlp = layer.mlp
        mlp.forward = lambda x, mlp=mlp, expert=expert: nested_mlp(mlp, x.flatten(0, 1), expert.flatten()).view_as(x)
    model.eval()
    model(token_ids, labels=token_ids).lm_loss.backward()
    assert len({int(e) for expert in experts for e in expert.flatten()}) > 1, "the routes must be mixed to prove anything"
    for name, gradient in expected.items():
        assert_close(name, model.get_parameter(name).grad, gradient, atol=1e-5 + 1e-4 * gradient.abs().max().item())


def test_argmax_router(token_ids):
    model = tiny_dynamoe(router_type="argmax")
    out = model.train()(token_ids, labels=token_ids, output_router_logits=True)
    assert out.router_logits[0].shape == (2, 12, 4)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    with pytest.raises(ValueError, match="fixed by its training"):
        model.set_sensitivity(0.5)


def test_outputs_behave_as_on_the_base(token_ids):
    dense = tiny_dense()
    model = DynaMoEForCausalLM.from_dense(copy.deepcopy(dense))
    for settings in ({"output_hidden_states": True}, {"logits_to_keep": 1}, {"num_logits_to_keep": 1},
                     {"logits_to_keep": torch.tensor([2, 5])}, {"labels": token_ids}):  # fmt: skip
        ours, theirs = model(token_ids, **settings), dense(token_ids, **settings)
        assert torch.equal(ours.logits, theirs.logits), settings
        if theirs.loss is not None:
            assert torch.equal(ours.loss, theirs.loss)
        if theirs.hidden_states is not None:
            assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
    assert torch.equal(model(token_ids, return_dict=False)[0], dense(token_ids).logits)
    assert model.base_model is model.model
    assert torch.equal(model.model(token_ids).last_hidden_state, dense.model(token_ids).last_hidden_state)
    eager = DynaMoEForCausalLM.from_dense(tiny_dense(attn_implementation="eager"))
    assert eager(token_ids, output_attentions=True).attentions[0].shape == (2, 4, 12, 12)
    assert_close("eager", eager(token_ids).logits, model(token_ids).logits)
    model.set_attn_implementation("eager")
    assert_close("set to eager", model(token_ids).logits, eager(token_ids).logits)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resize_token_embeddings(tied, token_ids):
    model = DynaMoEForCausalLM.from_dense(tiny_dense(tie_word_embeddings=tied))
    before = model(token_ids).logits
    model.resize_token_embeddings(140, mean_resizing=False)
    after = model(token_ids).logits
    assert after.shape[-1] == 140 == model.config.vocab_size
    assert_close("kept logits", after[..., :128], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_float16_keeps_float32_routers(token_ids, tmp_path):
    tiny_dynamoe().save_pretrained(tmp_path)
    model = DynaMoEForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for n, p in model.named_parameters() if ".router." in n} == {torch.float32}
    for ids in (token_ids, token_ids[:1, :1]):
        out = model(ids, sensitivity=0.5)
        assert out.logits.dtype == torch.float16
        assert out.logits.isfinite().all()


def test_bfloat16(token_ids):
    model = tiny_dynamoe().to(torch.bfloat16)
    out = model(token_ids, sensitivity=0.5)
    assert out.logits.dtype == torch.bfloat16
    assert torch.isfinite(out.logits).all()
    loss = model.train()(token_ids, labels=token_ids).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("route", ["label", "router", "random"])
def test_training_forward_never_waits_for_the_device(route, monkeypatch):
    """On the meta device there are no numbers to read back, and a tensor made from a list would be a copy to wait for."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense(), train_route=route).to("meta").train()
    ids = torch.zeros(2, 12, dtype=torch.long, device="meta")

    make_tensor = torch.tensor

    def refuse(*args, **kwargs):
        assert "modeling_dynamoe" not in sys._getframe(1).f_code.co_filename, "the host made a tensor from numbers"
        return make_tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", refuse)
    out = model(ids, labels=ids, attention_mask=None)
    out.loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        out.loss.item()


def test_changed_weights_are_used(token_ids):
    """Moved, cast, loaded, replaced or edited weights count in the next call, for many tokens and for one."""
    model, one = tiny_dynamoe(), token_ids[:1, :1]
    with torch.no_grad():
        before = model(token_ids, sensitivity=0.4).logits
        model(one, sensitivity=0.4)
        fresh = tiny_dynamoe(seed=4)
        expected, expected_one = fresh(token_ids, sensitivity=0.4).logits, fresh(one, sensitivity=0.4).logits
        model.load_state_dict(fresh.state_dict())
        assert_close("loaded", model(token_ids, sensitivity=0.4).logits, expected)
        assert_close("loaded, one token", model(one, sensitivity=0.4).logits, expected_one)
        model.double()
        assert_close("cast", model(token_ids, sensitivity=0.4).logits.float(), expected, atol=1e-3)
        assert_close("cast, one token", model(one, sensitivity=0.4).logits.float(), expected_one, atol=1e-3)
        model.float()
        model(one, sensitivity=0.4)
        other = tiny_dynamoe()
        for layer, source in zip(model.model.layers, other.model.layers):
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, name).weight = getattr(source.mlp, name).weight
            layer.mlp.router = source.mlp.router
        model.model.layers[0].mlp.up_proj.weight.data = other.model.layers[0].mlp.up_proj.weight.data.clone()
        for index, layer in enumerate(model.model.layers):
            other.set_sensitivity(0.4), model.set_sensitivity(0.4)
            for x in (torch.randn(2, 5, 32), torch.randn(1, 1, 32)):
                assert_close("replaced", layer.mlp(x), other.model.layers[index].mlp(x))
        assert not torch.allclose(before, expected)


def shifted(module):
    module = copy.deepcopy(module)
    for parameter in module.parameters():
        parameter.data += 0.5
    return module


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda mlp: setattr(mlp.up_proj, "weight", shifted(mlp.up_proj).weight), id="parameter"),
        pytest.param(lambda mlp: setattr(mlp.up_proj.weight, "data", mlp.up_proj.weight + 0.5), id="data"),
        pytest.param(lambda mlp: setattr(mlp, "down_proj", shifted(mlp.down_proj)), id="projection"),
        pytest.param(lambda mlp: setattr(mlp, "router", shifted(mlp.router)), id="router"),
        pytest.param(lambda mlp: setattr(mlp.router, "output", shifted(mlp.router.output)), id="output of the router"),
    ],
)
def test_a_step_of_decoding_follows_its_layers(change, token_ids):
    """What is swapped in a layer, the last one too, is seen by the next step."""
    model, one = tiny_dynamoe(), token_ids[:1, :1]
    with torch.no_grad():
        for _ in range(2):
            before = model(one, sensitivity=0.4).logits
        change(model.model.layers[-1].mlp)
        expected = model(one.repeat(2, 1), sensitivity=0.4).logits[:1]
        for _ in range(2):
            assert_close("after the change", model(one, sensitivity=0.4).logits, expected)
        assert not torch.allclose(before, expected)


def test_compiled_layers_decode(token_ids):
    """Each layer compiled alone, inside a model that is not."""
    torch._dynamo.reset()
    model, one = tiny_dynamoe(), token_ids[:1, :1]
    with torch.no_grad():
        expected = [model(one, sensitivity=theta).logits for theta in (0.4, 0.4, 0.9)][1:]
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
        found = [model(one, sensitivity=theta).logits for theta in (0.4, 0.9)]
    for before, after in zip(expected, found):
        assert_close("compiled layers", after, before)


def test_deepcopy_is_independent(token_ids):
    model = tiny_dynamoe()
    other = copy.deepcopy(model)
    other.set_sensitivity(0.1)
    assert model.config.sensitivity == 1.0
    assert not torch.equal(other(token_ids).logits, model(token_ids).logits)
    assert_close("copy", other(token_ids, sensitivity=1.0).logits, model(token_ids).logits)


def test_mlp_implementation_falls_back_to_torch(monkeypatch, token_ids):
    """Whatever is chosen, the kernel is used where it can run: tests/test_triton.py has it run."""
    model = tiny_dynamoe()
    assert model.slot.mlp_implementation == "auto"
    expected = model(token_ids, sensitivity=0.4).logits
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "TRITON", False)
    with pytest.raises(ImportError, match=r"needs Triton 3\.3"):
        model.set_mlp_implementation("triton")
    with pytest.raises(ValueError, match="found 'cuda'.*auto, torch, triton"):
        model.set_mlp_implementation("cuda")
    monkeypatch.setattr(module, "TRITON", True)
    model.set_mlp_implementation("triton")
    assert torch.equal(model(token_ids, sensitivity=0.4).logits, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run `pytest -m gpu` where there is one")
def test_gpu_equals_cpu(token_ids):
    model = tiny_dynamoe()
    expected = model(token_ids, sensitivity=0.5).logits
    model.cuda()
    token_ids = token_ids.cuda()
    assert_close("logits", model(token_ids, sensitivity=0.5).logits.cpu(), expected, atol=1e-3)
    model.train()
    torch.cuda.set_sync_debug_mode("error")  # the training forward must not wait for the device
    try:
        loss = model(token_ids, labels=token_ids).loss
    finally:
        torch.cuda.set_sync_debug_mode("default")
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize(("widths", "message"), [([0.5, 0.25, 1], "must rise"), ([0.25, 0.5], "exactly 1"), ([-0.5, 1], "at least 0"),
                                             ([], "must rise"), ([[0.5, 1], [1]], "equally many"), ([[0.5, 1]], "one entry for each"),
                                             ([0.5, 0.501, 1], "do not rise")])  # fmt: skip
def test_bad_widths(widths, message):
    with pytest.raises(ValueError, match=message):
        DynaMoEForCausalLM.from_dense(tiny_dense(), expert_widths=widths)


@pytest.mark.parametrize("share", ["half", "0", "1.5", None])
def test_bad_budgets(share):
    with pytest.raises(ValueError, match=f"`budgets` must have shares.*found {share!r}"):
        tiny_dynamoe(budgets={share: 0.5})
    with pytest.raises(ValueError, match=r"`budgets` must have sensitivities in \(0, 1\] as values, found 2 for 0.5"):
        tiny_dynamoe(budgets={"0.5": 2})


@pytest.mark.parametrize("value", [0, -1, 1.5, float("nan"), "high"])
def test_bad_sensitivity(value, token_ids):
    model = tiny_dynamoe()
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        model.set_sensitivity(value)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        model(token_ids, sensitivity=value)
    with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
        DynaMoEConfig(sensitivity=value)
    for name in ("sensitivity", "density"):
        found = [value] if value == "high" else [value, torch.tensor(value), torch.tensor([0.5, value])]
        for each in found:
            with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
                model(token_ids, **{name: each})
            with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
                model.model(token_ids, **{name: each})
            with pytest.raises(ValueError, match=r"must be in \(0, 1\]"), model.routing(**{name: each}):
                pass


@pytest.mark.parametrize("expert", [-1, 4, 1.5, True, "1"])
def test_bad_expert(expert, token_ids):
    model = tiny_dynamoe()
    with pytest.raises(ValueError, match="`force_expert` must be.*experts 0 to 3"):
        model(token_ids, force_expert=expert)
    with pytest.raises(ValueError, match="`force_expert` must be.*experts 0 to 3"):
        model.generate(token_ids, force_expert=expert, max_new_tokens=1)
    with pytest.raises(ValueError, match="`force_expert` must be.*experts 0 to 3"), model.routing(force_expert=expert):
        pass
    with pytest.raises(ValueError, match="`force_expert` must be.*experts 0 to 3"):
        DynaMoEConfig(force_expert=expert)


def test_a_tensor_without_dimensions_is_a_number(token_ids):
    model = tiny_dynamoe()
    for sensitivity in (0.4, 1.0):
        expected = model(token_ids, sensitivity=sensitivity).logits
        assert torch.equal(model(token_ids, sensitivity=torch.tensor(sensitivity, dtype=torch.float64)).logits, expected)
        with model.routing(sensitivity=torch.tensor(sensitivity, dtype=torch.float64)):
            assert torch.equal(model(token_ids).logits, expected)


def test_other_bad_settings(token_ids):
    model = tiny_dynamoe()
    with pytest.raises(ValueError, match="experts 0 to 3"):
        DynaMoEConfig(force_expert=4)
    with pytest.raises(ValueError, match="one for each sequence or token of"):
        model(token_ids, sensitivity=torch.ones(3))
    for shape in ((3,), (0,), (2, 5), (2, 12, 1)):
        with (
            pytest.raises(ValueError, match="one for each sequence or token"),
            model.routing(sensitivity=torch.full(shape, 0.5)),
        ):
            model(token_ids)
    with pytest.raises(ValueError, match="`route` is unknown"):
        model(token_ids, route="best")
    with pytest.raises(ValueError, match="`route` is unknown"), model.routing(route="best"):
        pass
    with pytest.raises(ValueError, match="`similarity` is unknown"):
        DynaMoEConfig(similarity="euclid")
    with pytest.raises(ValueError, match="format_version=99"):
        DynaMoEConfig(format_version=99)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8}, "family llama4_text is not supported: it multiplies a token"),
        ("bitnet", {}, r"model\.layers\.0\.mlp.*BitNetMLP.*Supported are"),
        ("mpt", {"d_model": 32}, "not at `model.layers"),
        ("xglm", {"activation_dropout": 0.1}, "`activation_dropout` is not supported: found 0.1"),
        ("granitemoehybrid", {"num_local_experts": 2}, r"found experts \(`block_sparse_moe`\) beside its MLPs"),
    ],
)
def test_what_cannot_be_converted(family, settings, message):
    dense = AutoModelForCausalLM.from_config(tiny_config(family, **settings))
    before = {name: type(module) for name, module in dense.named_modules()}
    with pytest.raises(ValueError, match=message):
        DynaMoEForCausalLM.from_dense(dense)
    assert before == {name: type(module) for name, module in dense.named_modules()}, "the dense model was changed"


def test_converting_twice_or_a_vision_model():
    with pytest.raises(ValueError, match="DynaMoE model already"):
        DynaMoEForCausalLM.from_dense(tiny_dynamoe())
    with pytest.raises(ValueError, match="no causal language model"):
        DynaMoEForCausalLM(DynaMoEConfig(base_config=AutoConfig.for_model("vit")))


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "starcoder2"])
def test_compiled_decoding_equals_eager(family, fullgraph, token_ids):
    """One graph for all tokens: no break, no recompilation, with the static cache."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_dynamoe(family)
    model.set_sensitivity(0.4)
    compiled, seen = torch.compile(model, fullgraph=fullgraph, backend="aot_eager"), []
    for ids in (token_ids, token_ids[:1]):
        results = []
        for run in (model, compiled):
            cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=16)
            logits = [model(ids[:, :8], past_key_values=cache).logits[:, -1]]
            with torch.no_grad():
                for position in range(8, 12):
                    places = torch.tensor([[position]])
                    step = run(ids[:, position : position + 1], past_key_values=cache, position_ids=places)
                    logits.append(step.logits[:, -1])
                    if run is compiled:
                        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            results.append(torch.stack(logits))
        assert_close(f"{family}, batch {len(ids)}", results[1], results[0])
    assert seen[0] == seen[3], "the graph was compiled again for a later token"
    assert not torch._dynamo.utils.counters["graph_break"]
    compiled(token_ids[:1, :1], sensitivity=0.9)
    assert model.slot.current is None, "the dial of a compiled call stays in force after it"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_model_is_not_loaded_as_a_llama(family, tmp_path):
    """Its config has no `base_config`, whose default is a Llama's."""
    dense = tiny_dense(family)
    dense.save_pretrained(tmp_path)
    config = dense.config
    for load in (
        lambda: DynaMoEForCausalLM.from_pretrained(tmp_path),
        lambda: DynaMoEModel.from_pretrained(tmp_path),
        lambda: DynaMoEForCausalLM.from_pretrained(tmp_path, config=config),
        lambda: DynaMoEForCausalLM(config),
        lambda: DynaMoEConfig.from_pretrained(tmp_path),
        lambda: DynaMoEConfig.from_dict(config.to_dict()),
    ):
        with pytest.raises(ValueError, match=f"This is a dense model, found model type '{family}'. Convert it"):
            load()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("widths", [[0.5, 1], [[0.25, 1], [0.5, 1], [0.75, 1]]])
def test_a_model_loads_with_its_first_layers_alone(family, widths, tmp_path, token_ids):
    """Depth pruning, as of a dense model: lists with an entry for each layer are cut, and what was calibrated on all layers goes."""
    settings = {"expert_widths": widths, "error_weights": [0.1, 0.2, 0.3], "budgets": {"0.5": 0.4}, "sensitivity": 0.6}
    thresholds = {"density": [0.5], "input": [[0.1, 0.2, 0.3]], "hidden": [[0.1, 0.2, 0.3]]}
    sparse = {"thresholds": thresholds, "density_path": [[0.4, 0.5]]}
    whole = tiny_dynamoe(family, dense_settings={"num_hidden_layers": 3}, **settings, **sparse)
    whole.save_pretrained(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "whole", num_hidden_layers=2).save_pretrained(tmp_path / "shorter")
    shorter = AutoModelForCausalLM.from_pretrained(tmp_path / "shorter")
    assert shorter.config.error_weights == [0.1, 0.2] and shorter.config.budgets == {} and shorter.config.density_path == []
    assert shorter.config.thresholds == {"density": [0.5], "input": [[0.1, 0.2]], "hidden": [[0.1, 0.2]]}
    del decoder_layers(whole.base_model)[2]
    with whole.routing(density=0.5), shorter.routing(density=0.5):
        assert torch.equal(whole(token_ids, use_cache=False).logits, shorter(token_ids, use_cache=False).logits)


def test_what_cannot_be_loaded_is_not_saved(tmp_path):
    """Depth pruning in memory leaves lists with an entry for each layer; a field may be set to anything."""
    model = tiny_dynamoe(error_weights=[0.1, 0.2])
    model.save_pretrained(tmp_path / "whole")
    for name, value, message in (
        ("sensitivity", 2.0, r"sensitivity must be in \(0, 1\], found 2.0"),
        ("num_hidden_layers", 1, "`error_weights` must have one entry for each of 1 MLPs"),
        ("error_weights", [0.1], "`error_weights` must have one entry for each of 2 MLPs"),
        ("train_sensitivity", [0.9, 0.1], "`train_sensitivity` must be two numbers that rise"),
    ):
        model = DynaMoEForCausalLM.from_pretrained(tmp_path / "whole")
        setattr(model.config, name, value)
        for save in (model.save_pretrained, model.config.save_pretrained):
            with pytest.raises(ValueError, match=message):
                save(tmp_path / "wrong")
        assert not (tmp_path / "wrong").exists()
    model = DynaMoEForCausalLM.from_pretrained(tmp_path / "whole")
    del model.model.layers[1]
    with pytest.raises(ValueError, match="found 1 MLPs, and in the config num_hidden_layers=2 and nested_shared=\\[\\]"):
        model.save_pretrained(tmp_path / "wrong")
    model.config.num_hidden_layers, model.config.error_weights = 1, [0.1]
    model.save_pretrained(tmp_path / "pruned")
    assert len(DynaMoEForCausalLM.from_pretrained(tmp_path / "pruned").nested_mlps) == 1


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox", "mixtral"])
@pytest.mark.parametrize(
    "change", ["intermediate_size", "vocab_size", "num_attention_heads", "expert_widths", "router_dim", "head"]
)
def test_weights_that_are_not_those_of_the_config_are_not_saved(family, change, tmp_path):
    """Whoever sets a size of the config, or replaces a weight, without the other."""
    model, name = tiny_dynamoe(family), "lm_head.weight" if change == "head" else "layers.0"
    if change == "head":
        model.set_output_embeddings(torch.nn.Linear(32, 96, bias=False))
    elif change == "num_attention_heads" and family == "gpt_neox":
        pytest.skip("its weights do not depend on it")
    else:
        value = {"expert_widths": [0.5, 1.0], "router_dim": 24, "vocab_size": 64, "num_attention_heads": 8}.get(change, 32)
        setattr(model.config, change, value)
        name = "embed" if change == "vocab_size" else "head_dim|layers.0" if change == "num_attention_heads" else name
    with pytest.raises(ValueError, match=f"The folder could not be read: found .*({name}|embed_out)"):
        model.save_pretrained(tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"sensitivity": 0.4}, {"force_expert": 1}, SPARSE], ids=["full", "dial", "forced", "sparse"]
)
def test_an_exported_program_takes_any_length(strict, settings):
    model = tiny_dynamoe(**settings)

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(ids, use_cache=False).logits

    with torch.no_grad():
        lengths = {"ids": {0: torch.export.Dim("batch", min=2, max=4), 1: torch.export.Dim("length", min=2, max=64)}}
        program = torch.export.export(Logits(), (torch.randint(3, 128, (2, 24)),), dynamic_shapes=lengths, strict=strict)
        for shape in ((2, 2), (2, 8), (3, 16), (2, 17), (4, 60)):
            ids = torch.randint(3, 128, shape)
            assert_close(f"logits of {shape}", program.module()(ids), model(ids).logits)
