"""Decoding that drafts for itself: the tokens are those of the full width, what cannot be drafted is refused, and what it did is told."""

import pytest
import torch
from conftest import VOCABULARY, tiny_dynamoe
from transformers import StaticCache

from dynamoe_hf.modeling.self_draft import SelfDraftOutput


PROMPT = torch.arange(3, 13)[None]
GREEDY = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": VOCABULARY - 1}


def model_of(family="llama", **settings):
    return tiny_dynamoe(family, budgets={"0.4": 0.3, "0.7": 0.6}, **settings)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "phi3", "cohere"])
def test_the_tokens_are_those_of_the_full_width(family):
    """Also where a window is shorter than the text."""
    model = model_of(family)
    model.set_budget(0.4)
    expected = model.generate(PROMPT, force_expert=3, **GREEDY)
    found = model.generate(PROMPT, draft_budget=0.4, return_dict_in_generate=True, **GREEDY)
    assert isinstance(found, SelfDraftOutput)
    assert torch.equal(found.sequences, expected)
    assert torch.equal(model.generate(PROMPT, draft_budget=0.4, **GREEDY), expected)
    assert 0 <= found.accepted <= found.drafted
    # The prompt's pass gives the first token, each check the tokens that it accepts and one more.
    assert found.accepted + found.passes + 1 >= 24
    assert found.draft_seconds > 0 and found.check_seconds > 0


@pytest.mark.parametrize("draft_tokens", [1, 3, 9])
def test_a_draft_that_is_always_right(draft_tokens, monkeypatch):
    """It then takes one check for each draft and the token after it."""
    model = model_of()
    monkeypatch.setattr("dynamoe_hf.modeling.self_draft.LEAST_PROBABILITY", 0.0)
    for mlp in model.nested_mlps:
        torch.nn.init.zeros_(mlp.down_proj.weight[:, 16:])  # what the smallest expert leaves out
    found = model.generate(
        PROMPT, draft_budget=0.4, draft_tokens=draft_tokens, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 21}
    )
    assert torch.equal(found.sequences, model.generate(PROMPT, force_expert=3, **{**GREEDY, "max_new_tokens": 21}))
    assert found.accepted == found.drafted
    assert found.passes == -(-20 // (draft_tokens + 1))


def test_the_check_is_at_the_sensitivity_of_the_call():
    model = model_of()
    expected = model.generate(PROMPT, sensitivity=0.6, **GREEDY)
    assert torch.equal(model.generate(PROMPT, sensitivity=0.6, draft_budget=0.4, **GREEDY), expected)
    assert not torch.equal(model.generate(PROMPT, draft_budget=0.4, **GREEDY), expected)


def test_it_stops_where_the_full_width_stops():
    """At a stop token in the midst of a draft, at a length, and under processors of logits."""
    model = model_of()
    full = model.generate(PROMPT, force_expert=3, **GREEDY)[0, 10:]
    for stop in full[:8].tolist():
        options = {**GREEDY, "eos_token_id": [stop, VOCABULARY - 1]}
        expected = model.generate(PROMPT, force_expert=3, **options)
        assert torch.equal(model.generate(PROMPT, draft_budget=0.4, **options), expected)
    for options in ({"max_new_tokens": 1}, {"max_new_tokens": 7}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}):
        expected = model.generate(PROMPT, force_expert=3, **{**GREEDY, **options})
        assert torch.equal(model.generate(PROMPT, draft_budget=0.4, **{**GREEDY, **options}), expected), options


def test_packed_weights_draft_too():
    model = model_of()
    model.pack("int8")
    expected = model.generate(PROMPT, force_expert=3, **GREEDY)
    assert torch.equal(model.generate(PROMPT, draft_budget=0.4, **GREEDY), expected)


def test_tokens_are_streamed():
    class Kept:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    streamer = Kept()
    found = model_of().generate(PROMPT, draft_budget=0.4, streamer=streamer, **GREEDY)
    assert streamer.tokens == found[0].tolist()
    assert streamer.ended == 1


REFUSED = {
    "several sequences": ({"inputs": PROMPT.repeat(2, 1)}, "found several sequences"),
    "padding": ({"attention_mask": torch.tensor([[0] + [1] * 9])}, "found padding"),
    "sampling": ({"do_sample": True}, "found sampling"),
    "beams": ({"num_beams": 2}, "beams"),
    "guidance": ({"guidance_scale": 1.5}, "found guidance"),
    "static": ({"cache_implementation": "static"}, "a cache of another kind"),
    "no cache": ({"use_cache": False}, "no cache"),
    "scores": ({"output_scores": True, "return_dict_in_generate": True}, "scores or states"),
    "full": ({"draft_budget": 1.0}, "cannot pay"),
    "as wide": ({"sensitivity": 0.3}, "cannot pay"),
    "uncalibrated": ({"draft_budget": 0.2}, "outside the calibrated range"),
    "tokens": ({"draft_tokens": 0}, "at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drafted_is_refused(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        model_of().generate(**{"inputs": PROMPT, "draft_budget": 0.4, **GREEDY, **options})


def test_a_model_without_a_dial_and_a_cache_that_is_there_are_refused():
    with pytest.raises(ValueError, match="argmax router"):
        tiny_dynamoe(router_type="argmax").generate(PROMPT, draft_budget=0.4, **GREEDY)
    model = model_of()
    cache = StaticCache(model.config.get_text_config(decoder=True), max_cache_len=64)
    with pytest.raises(ValueError, match="with `past_key_values`"):
        model.generate(PROMPT, draft_budget=0.4, past_key_values=cache, **GREEDY)
