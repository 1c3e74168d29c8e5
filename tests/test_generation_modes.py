"""The ways in which `generate` decodes: at full width each gives what the dense model gives, below it each sequence what it gets alone."""

import pytest
import torch
from conftest import tiny_dense, tiny_dynamoe
from reference import assert_close

from dynamoe_hf import DynaMoEForCausalLM


# Alike in one respect each: plain attention, windows that the text outgrows, and layers that keep a state.
FAMILIES = ["llama", "gemma3_text", "lfm2"]
MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 8},
    "guidance": {"guidance_scale": 1.5},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 5},
    "sample": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beam sample": {"do_sample": True, "num_beams": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}
ALONE = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "assistant": {"assistant_confidence_threshold": 0.0}}


def options_of(mode):
    assistant = {"assistant_model": tiny_dense(seed=5)} if mode == "assistant" else {}
    return {"do_sample": False, "max_new_tokens": 12, **(MODES | ALONE)[mode], **assistant}


def written(model, ids, **options):
    torch.manual_seed(3)
    return model.generate(ids, **options)


@pytest.mark.parametrize("mode", [*MODES, *ALONE])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_width_writes_what_the_dense_model_writes(family, mode, token_ids):
    """By the base's own code, and with every token routed to the full width."""
    options, ids = options_of(mode), token_ids[:1] if mode in ALONE else token_ids
    expected = written(tiny_dense(family), ids, **options)
    model = DynaMoEForCausalLM.from_dense(tiny_dense(family)).eval()
    assert torch.equal(written(model, ids, **options), expected)
    assert torch.equal(written(model, ids, sensitivity=torch.ones(len(ids)), **options), expected)


@pytest.mark.parametrize("mode", [mode for mode, options in MODES.items() if not options.get("do_sample")])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sequence_is_written_as_alone(family, mode, token_ids):
    """Two sequences, each at its own place of the dial."""
    options, model = options_of(mode), tiny_dynamoe(family, sensitivity=0.6).eval()
    together = written(model, token_ids, sensitivity=torch.tensor([0.2, 0.8]), **options)
    each = options.get("num_return_sequences", 1)
    for row, sensitivity in enumerate((0.2, 0.8)):
        alone = written(model, token_ids[row : row + 1], sensitivity=sensitivity, **options)
        found = together[row * each : (row + 1) * each, : alone.shape[1]]
        assert torch.equal(found, alone)


@pytest.mark.parametrize("mode", ALONE)
@pytest.mark.parametrize("dial", [{"sensitivity": 0.4}, {"force_expert": 1}])
def test_drafts_change_no_text(mode, dial, token_ids):
    model = tiny_dynamoe(sensitivity=0.6).eval()
    greedy = written(model, token_ids[:1], do_sample=False, max_new_tokens=12, **dial)
    assert torch.equal(written(model, token_ids[:1], **options_of(mode), **dial), greedy)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_generate_returns(family, token_ids):
    """Scores, logits, states and attentions, one a step, are those of the dense model."""
    named = ("scores", "logits", "hidden_states", "attentions")
    options = {f"output_{name}": True for name in named} | {
        "return_dict_in_generate": True,
        "do_sample": False,
        "max_new_tokens": 5,
    }
    outputs = []
    for model in (tiny_dense(family), DynaMoEForCausalLM.from_dense(tiny_dense(family)).eval()):
        model.set_attn_implementation("eager")
        outputs.append(written(model, token_ids, **options))
    for name in named:
        dense, ours = (torch.utils._pytree.tree_leaves(output[name]) for output in outputs)
        assert len(dense) == len(ours) > 4
        for one, other in zip(dense, ours):
            assert_close(name, other, one)


@pytest.mark.parametrize("dial", [{}, {"sensitivity": torch.tensor([0.2, 0.8])}, {"force_expert": 0}])
def test_prompts_of_other_forms(dial, token_ids):
    """As embeddings, padded on the left, and begun by an earlier call."""
    model, options = tiny_dynamoe(sensitivity=0.6).eval(), {"do_sample": False, "max_new_tokens": 6}
    expected = written(model, token_ids, **options, **dial)
    embedded = model.get_input_embeddings()(token_ids).detach()
    assert torch.equal(model.generate(inputs_embeds=embedded, **options, **dial), expected[:, token_ids.shape[1] :])
    padded, mask = (torch.nn.functional.pad(t, (3, 0)) for t in (token_ids, torch.ones_like(token_ids)))
    assert torch.equal(written(model, padded, attention_mask=mask, **options, **dial)[:, 3:], expected)
    begun = written(model, token_ids, return_dict_in_generate=True, **{**options, "max_new_tokens": 3}, **dial)
    rest = {**options, "max_new_tokens": 3, "past_key_values": begun.past_key_values}
    assert torch.equal(written(model, begun.sequences, **rest, **dial), expected)
