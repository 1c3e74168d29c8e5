"""Routing: a router's rule, and that the routing of a pass is its own: in every thread, after exceptions, when layers run again."""

import copy
import pickle
import sys
import threading
from dataclasses import FrozenInstanceError
from itertools import combinations

import pytest
import torch
from conftest import FAMILIES, run_mlp, tiny_dense, tiny_dynamoe
from reference import assert_close, expert_of
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.modeling import DynaMoEModel
from dynamoe_hf.modeling.routing import ROUTERS, Routing


@pytest.mark.parametrize("router_type", ROUTERS)
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_the_rule_of_a_router_is_the_plain_loop(router_type, experts):
    """One token or many, one sensitivity or one for each sequence."""
    torch.manual_seed(experts)
    router = ROUTERS[router_type](32, 16, experts)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 5, 32)
    for sensitivity in (0.05, 0.3, 0.5, 0.7, 0.95, 1.0):
        expected = torch.tensor([[expert_of(router, token, sensitivity) for token in row] for row in x])
        assert torch.equal(router.choose(router(x), sensitivity), expected)
        assert torch.equal(router.choose(router(x), torch.full((3,), sensitivity)), expected)
        one = router.choose(router(x[1:2, 2:3]), sensitivity)
        assert one.tolist() == [[expected[1, 2]]]


SPARSE = {
    "thresholds": {"density": [0.5], "input": [[0.3, 0.3]], "hidden": [[0.05, 0.05]]},
    "density_path": [[0.4, 0.5]],
}
ASKED = [{"sensitivity": 0.15}, {"sensitivity": 0.85}, {"sensitivity": torch.tensor([0.1, 0.9])}, {"force_expert": 0},
         {"force_expert": 2, "density": 0.6}, {"density": 0.5}, {"sensitivity": 0.4, "num_beams": 2}, {}]  # fmt: skip


def test_threads_do_not_meet(token_ids):
    """200 calls of `generate` and 200 of `forward` from 8 threads, at settings of all kinds, give what each gives alone."""
    model = tiny_dynamoe(sensitivity=0.6, **SPARSE).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}

    def call(asked):
        written = model.generate(token_ids, **options, **asked)
        with torch.no_grad():
            logits = model(token_ids, **{name: value for name, value in asked.items() if name != "num_beams"}).logits
        return torch.cat([logits.flatten(), *map(torch.flatten, written.logits), written.sequences.flatten()])

    alone = [call(asked) for asked in ASKED]
    assert not any(torch.equal(one, other) for one, other in combinations(alone, 2))
    outcomes, barrier = [], threading.Barrier(8)

    def work(thread):
        for turn in range(25):
            barrier.wait()
            index = (thread + turn) % 8
            outcomes.append(torch.equal(call(ASKED[index]), alone[index]))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 200
    assert all(outcomes)
    assert model.slot.current is None


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"])
def test_replicas_in_threads(family, monkeypatch, token_ids):
    """`nn.DataParallel` runs copies that share whatever is no module or tensor: 4 of them, each at its own place of the dial."""
    copies = sys.modules["torch.nn.parallel.replicate"]  # which sends tensors to GPUs; these stay here
    monkeypatch.setattr(
        copies, "_broadcast_coalesced_reshape", lambda tensors, devices, detach=False: [tensors] * len(devices)
    )
    model, found, barrier = tiny_dynamoe(family, sensitivity=0.6).eval(), {}, threading.Barrier(4)

    def work(replica, sensitivity):
        barrier.wait()
        found[sensitivity] = [replica(token_ids, sensitivity=sensitivity, labels=token_ids).logits for _ in range(5)]

    replicas = copies.replicate(model, [0, 1, 2, 3])
    threads = [threading.Thread(target=work, args=pair) for pair in zip(replicas, (0.1, 0.4, 0.7, 1.0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for sensitivity, logits in found.items():
        for each in logits:
            assert_close("logits", each, model(token_ids, sensitivity=sensitivity).logits)


def test_settings_of_one_thread_are_not_those_of_another(token_ids):
    model, found = tiny_dynamoe(), []
    expected = model(token_ids).logits
    with model.routing(force_expert=0):
        thread = threading.Thread(target=lambda: found.append(model(token_ids).logits))
        thread.start()
        thread.join()
        assert not torch.equal(model(token_ids).logits, expected)
    assert torch.equal(found[0], expected)


def test_an_exception_leaves_nothing_behind(token_ids):
    model = tiny_dynamoe()
    expected = model(token_ids).logits

    def fail(*args):
        raise RuntimeError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    for run in (lambda: model(token_ids, sensitivity=0.2), lambda: model.model(token_ids, force_expert=0)):
        with pytest.raises(RuntimeError, match="in the middle"):
            run()
        with pytest.raises(RuntimeError, match="in the middle"), model.routing(force_expert=1):
            run()
        assert model.slot.current is None and model.slot.requested == Routing()
    handle.remove()
    assert torch.equal(model(token_ids).logits, expected)


def test_routing_does_not_change():
    with pytest.raises(FrozenInstanceError):
        Routing().sensitivity = 0.5
    with pytest.raises(TypeError, match="unexpected keyword"), tiny_dynamoe().routing(sensitivty=0.5):
        pass


def test_a_call_wins_over_the_context_and_the_context_over_the_config(token_ids):
    model = tiny_dynamoe(sensitivity=0.9)
    expected = {s: model(token_ids, sensitivity=s).logits for s in (0.2, 0.5, 0.9)}
    with model.routing(sensitivity=0.5):
        assert torch.equal(model(token_ids).logits, expected[0.5])
        assert torch.equal(model(token_ids, sensitivity=0.2).logits, expected[0.2])
    assert torch.equal(model(token_ids).logits, expected[0.9])


def test_records_hold_the_last_pass(token_ids):
    model = tiny_dynamoe()
    with model.routing(sensitivity=0.4, records=[]) as routing:
        for run in (model, model.model, model):
            run(token_ids)
            assert len(routing.records) == len(model.nested_mlps)
        model.generate(token_ids[:1], max_new_tokens=3, do_sample=False)
        assert [record.expert.shape for record in routing.records] == [(1, 1)] * len(model.nested_mlps)
        layer = model.model.layers[0].mlp
        layer(torch.randn(1, 2, 32))  # a layer alone adds to them
        assert len(routing.records) == len(model.nested_mlps) + 1


def test_watching_changes_nothing(token_ids):
    """`output_router_logits` is the public way to see the experts, in decoding too, and gives the same numbers."""
    model = tiny_dynamoe()
    for ids in (token_ids, token_ids[:1, :1], token_ids[:2, :1]):
        seen = model(ids, sensitivity=0.4, output_router_logits=True)
        assert torch.equal(seen.logits, model(ids, sensitivity=0.4).logits)
        for mlp, logits, expert in zip(model.nested_mlps, seen.router_logits, seen.expert_indices):
            assert torch.equal(mlp.router.choose(logits, 0.4), expert)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_model_is_the_backbone(family, tied, tmp_path, token_ids):
    model = tiny_dynamoe(family, dense_settings={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    alone = AutoModel.from_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).base_model
    assert isinstance(alone, DynaMoEModel) and isinstance(whole, DynaMoEModel)
    for settings in ({}, {"sensitivity": 0.4}, {"force_expert": 1}, {"sensitivity": torch.tensor([0.2, 0.7])}):
        found, expected = alone(token_ids, **settings), whole(token_ids, **settings)
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        logits = model.logits_of(found.last_hidden_state)
        assert_close("through the head", logits, model(token_ids, **settings).logits)
    seen = alone(token_ids, sensitivity=0.4, output_router_logits=True)
    assert len(seen.expert_indices) == len(seen.router_logits) == 2
    assert torch.equal(alone(token_ids, return_dict=False)[0], alone(token_ids).last_hidden_state)
    assert len(alone(token_ids, output_hidden_states=True).hidden_states) == 3


def test_what_engines_ask_of_the_class():
    """Before there is a model; and the class of a model has the flags of its base."""
    for cls in (DynaMoEModel, DynaMoEForCausalLM):
        assert cls._supports_attention_backend and cls._supports_sdpa and cls.is_backend_compatible()
    dense = tiny_dense("gemma2")
    model = DynaMoEForCausalLM.from_dense(copy.deepcopy(dense))
    for flag in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_can_compile_fullgraph"):
        assert getattr(model, flag) == getattr(dense, flag)
        assert getattr(type(model.model), flag) == getattr(type(dense.model), flag)
    assert isinstance(model, type(dense)) and isinstance(model.model, type(dense.model))
    assert type(model).__name__ == "DynaMoEForCausalLM"
    assert set(model._no_split_modules) == set(dense._no_split_modules)


def test_two_families_in_one_process_record_their_own(token_ids):
    """transformers keeps what a class can record by its name; two bases must not share one."""
    models = [tiny_dynamoe(family) for family in ("llama", "gemma2", "starcoder2")]
    for model in models:
        assert len(model(token_ids, output_hidden_states=True).hidden_states) == 3


def test_copies_and_pickles_are_independent(token_ids):
    model = tiny_dynamoe("qwen3")
    expected = model(token_ids, sensitivity=0.4).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert other.slot is other.model.slot is other.nested_mlps[1].slot is not model.slot
        with other.routing(force_expert=0):
            assert torch.equal(model(token_ids, sensitivity=0.4).logits, expected)
        assert torch.equal(other(token_ids, sensitivity=0.4).logits, expected)


@pytest.mark.parametrize("options", [None, {}, {"use_reentrant": False}, {"use_reentrant": True}])
def test_layers_that_run_again_keep_their_routing(options, token_ids):
    """Activation checkpointing runs layers in backward, when the pass is over and another one has other settings."""
    gradients = []
    for checkpointing in (False, True):
        model = tiny_dynamoe().train()
        if checkpointing:
            model.gradient_checkpointing_enable(options)
        loss = model(token_ids, sensitivity=0.3).logits.square().mean()
        with model.routing(force_expert=3):
            loss.backward()
        assert model.slot.current is None
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected)


def test_checkpointing_that_would_lose_the_losses_of_routers_is_refused(token_ids):
    """The reentrant kind runs layers without gradients, where it cannot be replaced; evaluation is none of its business."""
    model = tiny_dynamoe().train()
    model._set_gradient_checkpointing(True, lambda function, *args: checkpoint(function, *args, use_reentrant=True))
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="gives routers no gradient, found use_reentrant=True"):
        model(token_ids, labels=token_ids)
    with torch.no_grad():
        model(token_ids, labels=token_ids)


@pytest.mark.parametrize("kind", list(CheckpointImpl))
@pytest.mark.parametrize("settings", [{}, {"sensitivity": 0.4}, {"force_expert": 1}])
def test_checkpointing_around_layers_is_refused(kind, settings, token_ids):
    """It runs a layer again when nothing says any more how its tokens were routed."""
    model = tiny_dynamoe().train()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, kind)
    with pytest.raises(ValueError, match="cannot know which experts its tokens took|Routers would get no gradient"):
        model(token_ids, labels=token_ids, **settings).loss.backward()
    assert model.slot.current is None


@pytest.mark.parametrize("kind", list(CheckpointImpl))
@pytest.mark.parametrize("settings", [{}, {"sensitivity": 0.4, "route": "router"}])
def test_checkpointing_around_the_backbone_is_refused(kind, settings, token_ids):
    """Its second run would ask the config alone, and one without gradients gives routers none."""
    model = tiny_dynamoe(sensitivity=0.6).train()
    model.model = checkpoint_wrapper(model.model, kind)
    with pytest.raises(ValueError, match="cannot know which experts its tokens took|Routers would get no gradient"):
        model(token_ids, labels=token_ids, **settings).loss.backward()
    with torch.no_grad():
        model(token_ids, labels=token_ids, **settings)
    assert model.slot.current is None


def test_a_layer_alone_follows_the_config():
    mlp = tiny_dynamoe(sensitivity=0.4).model.layers[1].mlp
    x = torch.randn(2, 5, 32)
    assert_close("output", mlp(x), run_mlp(mlp, x, mlp.router.choose(mlp.router(x), 0.4)))
