"""What outsiders find: PEFT and engines that read the config flat, and engines that replace linear layers."""

from functools import partial

import pytest
import torch
from conftest import tiny_config, tiny_dense, tiny_dynamoe
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import assert_close
from test_sparsity import PATH, TABLE
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from dynamoe_hf import DynaMoEConfig, DynaMoEForCausalLM
from dynamoe_hf.modeling.engine_layers import BareLinear, prepare_for_engine
from dynamoe_hf.vllm_metrics import Meters, can_count


def test_the_bases_fields_are_at_the_top_of_the_config(tmp_path):
    config = DynaMoEConfig(base_config=tiny_config("qwen3", tie_word_embeddings=True))
    fields = config.to_dict()
    base = fields["base_config"]
    assert fields["hidden_size"] == base["hidden_size"] == 32 and fields["tie_word_embeddings"] is True
    assert fields["model_type"] == "dynamoe" and base["model_type"] == "qwen3"
    assert set(base) <= set(fields)
    config.save_pretrained(tmp_path)
    again = DynaMoEConfig.from_pretrained(tmp_path)
    assert again.to_dict() == {**fields, "transformers_version": again.to_dict()["transformers_version"]}
    assert DynaMoEConfig.from_pretrained(tmp_path, vocab_size=64).base_config.vocab_size == 64


def test_a_field_that_says_two_things_is_refused():
    fields = DynaMoEConfig(base_config=tiny_config()).to_dict()
    with pytest.raises(ValueError, match="`hidden_size` is there twice and differs: found 48, and 32 in `base_config`"):
        DynaMoEConfig(**{**fields, "hidden_size": 48})


def test_adapters_of_tied_tokens_merge(token_ids):
    """PEFT asks `config.to_dict()` whether embeddings are tied, and how large a model is."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense(tie_word_embeddings=True))
    adapter = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6, 7], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, adapter).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(1.0)
        before = adapted(token_ids).logits
        assert_close("merged", adapted.merge_and_unload()(token_ids).logits, before)


def test_prompt_tuning_finds_the_models_size(token_ids):
    tuned = get_peft_model(tiny_dynamoe(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    assert tuned(token_ids).logits.shape[1] == token_ids.shape[1] + 4


def test_plan_for_tensor_parallelism_copies_the_mlps():
    plan = DynaMoEConfig(base_config=tiny_config("llama")).base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj"] == "colwise" and not any("mlp" in key for key in plan)


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_engines_leave_the_layers_of_nested_mlps_alone(family, token_ids):
    model = tiny_dynamoe(family).eval()
    model.config._attn_implementation = "vllm"
    prepare_for_engine(
        model.config, model.nested_mlps
    )  # the engine's own layers are right where all tokens take the full width
    assert all(isinstance(mlp.down_linear, nn.Linear) for mlp in model.nested_mlps)
    model.config._attn_implementation = "sdpa"
    model.set_sensitivity(0.6)
    with torch.no_grad():
        expected = model(token_ids, sensitivity=0.6).logits
        few = model(token_ids[:1, :3], sensitivity=0.6).logits
    model.config._attn_implementation = "vllm"
    prepare_for_engine(model.config, model.nested_mlps)
    model.config._attn_implementation = "sdpa"
    layers = [module for mlp in model.nested_mlps for module in mlp.modules()]
    assert not any(isinstance(module, nn.Linear) for module in layers) and any(isinstance(m, BareLinear) for m in layers)
    with torch.no_grad():
        assert torch.equal(model(token_ids, sensitivity=0.6).logits, expected)
        assert torch.equal(model(token_ids[:1, :3], sensitivity=0.6).logits, few)
    x = torch.zeros(1, 1, 32)
    assert all(mlp.tensors(x) is not None for mlp in model.nested_mlps)  # they can still be cut


@pytest.mark.parametrize(("family", "settings", "scale"), [("granite", {"logits_scaling": 8.0}, 1 / 8), ("llama", {}, None)])
def test_engines_are_told_the_scale_of_logits(family, settings, scale):
    config = DynaMoEConfig(base_config=tiny_config(family, **settings))
    config._attn_implementation = "vllm"
    prepare_for_engine(config, [])
    assert getattr(config, "logit_scale", None) == scale


def test_a_scale_that_engines_are_not_told_of_is_refused():
    config = DynaMoEConfig(base_config=tiny_config("llama", logits_scaling=2.0))
    config._attn_implementation = "vllm"
    with pytest.raises(ValueError, match="found logits_scaling=2.0 in a base of the family 'llama'"):
        prepare_for_engine(config, [])


def test_a_dial_for_each_token(token_ids):
    """(B, S): each token is routed, and its experts are sparse, as in a call with its own sensitivity alone."""
    model = tiny_dynamoe(thresholds=TABLE, density_path=PATH).eval()
    dials = torch.tensor([0.4, 0.9]).repeat(2, 6)  # token by token, in turn
    with torch.no_grad(), model.routing(records=[]) as routing:
        model(token_ids, sensitivity=dials)
        mixed = [*routing.records]
        for value, first in ((0.4, 0), (0.9, 1)):
            model(token_ids, sensitivity=value)
            # The first layer alone reads the same in both.
            assert torch.equal(mixed[0].expert[:, first::2], routing.records[0].expert[:, first::2])
            assert_close("share", mixed[0].share[:, first::2], routing.records[0].share[:, first::2])
        with pytest.raises(ValueError, match=r"one for each sequence or token of \(2, 12\): found shape \(2, 5\)"):
            model(token_ids, sensitivity=dials[:, :5])


@pytest.fixture
def greedy():
    return GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)


# The trap: without a number of blocks it takes most of the memory that is free.
SMALL_CACHE = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)


def tokens_of(outputs):
    return [output.generated_tokens for output in outputs.values()]


def test_continuous_batching_hears_the_dial(greedy):
    """A number, and one for each prompt: each request gets what it gets alone, and the model's own dial stays."""
    model = tiny_dynamoe().eval()
    prompts = torch.randint(3, 127, (4, 9), generator=torch.Generator().manual_seed(0)).tolist()
    alone = {}
    for dial in (0.05, 0.9, 1.0):
        with torch.no_grad():
            alone[dial] = [
                model.generate(
                    torch.tensor([prompt]),
                    max_new_tokens=6,
                    do_sample=False,
                    sensitivity=dial,
                    eos_token_id=None,
                    pad_token_id=0,
                )[0, 9:].tolist()
                for prompt in prompts
            ]
    assert len({str(tokens) for tokens in alone.values()}) == 3, "the dial must matter here"
    assert tokens_of(model.generate_batch(prompts, greedy, SMALL_CACHE, sensitivity=0.05)) == alone[0.05]
    dials = [0.05, 1.0, 0.9, 0.05]
    found = tokens_of(model.generate_batch(prompts, greedy, SMALL_CACHE, sensitivity=dials))
    assert found == [alone[dial][index] for index, dial in enumerate(dials)]
    assert tokens_of(model.generate_batch(prompts, greedy, SMALL_CACHE)) == alone[1.0]
    assert model.config.sensitivity == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sensitivity": 2.0}, r"sensitivity must be in \(0, 1\], found 2.0"),
        ({"sensitivity": [0.5]}, "one for each of 2 prompts: found 1"),
        ({"density": 0.5}, "hears `sensitivity` alone, found density"),
        ({"sensitivity": 0.5, "persistent_manager": True}, "would keep this call's sensitivity"),
    ],
)
def test_what_continuous_batching_does_not_hear_is_refused(settings, message, greedy):
    with pytest.raises(ValueError, match=message):
        tiny_dynamoe().generate_batch([[3, 4], [5, 6]], greedy, **settings)


@pytest.mark.parametrize("asked", [{"sensitivity": 0.1}, {"force_expert": 0}, {"density": 0.5}, {"route": "random"}])
def test_continuous_batching_in_another_thread_is_not_misled(asked, greedy):
    model = tiny_dynamoe(sensitivity=0.6)
    with model.routing(**asked), pytest.raises(ValueError, match=r"`model.routing\(...\)` is not heard"):
        model.generate_batch([[3, 4], [5, 6]], greedy)


@pytest.mark.parametrize("asked", [{"sensitivity": 0.1}, {"force_expert": 0}, {"density": 0.5}, {"draft_budget": 0.4}])
def test_a_dial_in_a_generation_config_is_refused(asked, greedy, token_ids):
    """transformers keeps whatever a `GenerationConfig` is given, and nobody would hear it."""
    model, config = tiny_dynamoe(sensitivity=0.6), GenerationConfig(**greedy.to_diff_dict(), **asked)
    message = f"does not carry the dial: found {'='.join(map(str, *asked.items()))}"
    for call in (partial(model.generate, token_ids), partial(model.generate_batch, token_ids.tolist())):
        for given in ({"generation_config": config}, {"generation_config": config, "sensitivity": 0.5}):
            with pytest.raises(ValueError, match=message):
                call(**given)
        with pytest.raises(ValueError, match=message):
            call(config)
    model.generation_config.update(**asked)
    for name, value in asked.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        model.generate(token_ids, max_new_tokens=1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", ["routed", "laid out", "sparse", "with a ramp", "one width", "of each token"])
def test_meters_count_what_the_model_says(case, compiled, token_ids):
    """The share that vLLM's server tells, from counts on the way, is that of `mlp_shares`."""
    sparse = case in ("sparse", "with a ramp", "of each token")
    settings = {"thresholds": TABLE, "density_path": PATH} if sparse else {}
    model = tiny_dynamoe(sensitivity=0.5, threshold_ramp=0.3 if case == "with a ramp" else 0.0, **settings).eval()
    assert can_count(model.config, model.nested_mlps) == (not settings)  # what is left out is counted where it is laid out
    if case != "routed":
        for mlp in model.nested_mlps:
            mlp.pack("onednn")
    assert can_count(model.config, model.nested_mlps)
    dial = {"force_expert": 1} if case == "one width" else {"sensitivity": 0.5}
    if case == "of each token":
        dial = {"sensitivity": torch.linspace(0.2, 1, token_ids.numel()).view(token_ids.shape)}
    with torch.no_grad():
        expected = torch.stack(model(token_ids, output_router_logits=True, **dial).mlp_shares).mean()
        meters = Meters(model.nested_mlps, model.config.hidden_size, model.device, len(model.nested_mlps))
        torch._dynamo.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for inputs in (token_ids, *(row[:1, None] for row in token_ids)):  # decoding has a way of its own
            with meters.stopped():
                run(inputs, **({"sensitivity": 0.5} if case == "of each token" else dial))
        assert meters.totals() == (0, 0)
        for _ in range(2):
            run(token_ids, **dial)
        share, tokens = meters.totals()
    assert tokens == 2 * token_ids.numel()
    assert 0 < share / tokens < 1 and share / tokens == pytest.approx(expected.item(), abs=1e-6)


def test_meters_count_single_tokens(token_ids):
    model = tiny_dynamoe(thresholds=TABLE, density_path=PATH).eval()
    for mlp in model.nested_mlps:
        mlp.pack("onednn")
    meters = Meters(model.nested_mlps, model.config.hidden_size, model.device, len(model.nested_mlps))
    steps = token_ids.flatten()[:8].view(-1, 1, 1)
    with torch.no_grad():
        expected = [torch.stack(model(step, sensitivity=0.5, output_router_logits=True).mlp_shares).mean() for step in steps]
        with meters.stopped():
            pass
        before = meters.totals()
        for step in steps:
            model(step, sensitivity=0.5)
    share, tokens = (now - then for now, then in zip(meters.totals(), before))
    assert tokens == len(steps) and share == pytest.approx(sum(expected).item(), abs=1e-5)
