# SPDX-License-Identifier: Apache-2.0
"""
Self-speculative decoding (Leviathan et al., 2023, arXiv 2211.17192): the model drafts a few tokens at a small budget and checks them
together at full width, which needs one pass over the weights. Greedy, so the text is that of the full width but for near-ties.

Draft and check share one cache: what the draft has written is cropped, and the check writes those positions again.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .checks import ROUTED_BY, check_generation_config


LEAST_PROBABILITY = 0.4  # of a drafted token; after a less likely one the draft is checked, since it is probably wrong


@dataclass
class SelfDraftOutput(GenerateDecoderOnlyOutput):
    """
    `GenerateDecoderOnlyOutput`, and:

    drafted, accepted (`int`): tokens that were drafted, and those of them that the check confirmed.
    passes (`int`): checks at full width, the prompt's not counted. Without a draft every token would take one.
    draft_seconds, check_seconds (`float`): time of the draft, and of the checks, the prompt's not counted.
    """

    drafted: int | None = None
    accepted: int | None = None
    passes: int | None = None
    draft_seconds: float | None = None
    check_seconds: float | None = None


class SelfDraftGenerationMixin(GenerationMixin):
    """`generate` with `draft_budget`."""

    config: Any
    _refuse_fixed_router: Any  # of `DynaMoEPreTrainedModel`

    def generate(self: Any, *args, draft_budget: float | None = None, draft_tokens: int = 4, **kwargs):
        """
        As that of transformers, and:

        Args:
            draft_budget (`float`, *optional*): calibrated budget, below 1, at which the model drafts for itself. The tokens are
                those of the full width, or of the `sensitivity` of this call, but for near-ties. One sequence, greedy, dynamic cache.
                With `return_dict_in_generate=True` the output is a `SelfDraftOutput`.
            draft_tokens (`int`, defaults to 4): tokens that are drafted at most before they are checked.

        Raises:
            ValueError: several sequences, sampling or beams, guidance, another cache, a budget that is not calibrated, or a draft that
                reads as much as its check; a dial in a generation config.
        """
        for config in (*args[1:2], kwargs.get("generation_config"), self.generation_config):
            check_generation_config(config)
        if draft_budget is None:
            return GenerationMixin.generate(self, *args, **kwargs)
        self._refuse_fixed_router()
        if not isinstance(draft_tokens, int) or draft_tokens < 1:
            raise ValueError(f"`draft_tokens` must be a whole number of at least 1, found {draft_tokens!r}. 4 is the default.")
        draft = self.config.sensitivity_of(draft_budget)
        checked = kwargs.get("sensitivity", 1.0)
        if draft >= (checked if isinstance(checked, int | float) else min(checked.tolist())):
            raise ValueError(
                f"draft_budget={draft_budget:g} cannot pay: the draft's sensitivity is {draft:.4g} and that of the check {checked}. Choose a "
                "smaller budget, or generate without it."
            )
        if taken := [
            name for name in ("assistant_model", "custom_generate", "past_key_values") if kwargs.get(name) is not None
        ]:
            raise ValueError(f"`draft_budget` was given with `{taken[0]}`, which decodes in its own way. Give one of them.")
        # `generate` hands a streamer to its own methods only.
        options = {"draft": {"sensitivity": draft}, "draft_tokens": draft_tokens, "streamer": kwargs.get("streamer")}
        kwargs["custom_generate"] = partial(draft_and_check, **options)
        return GenerationMixin.generate(self, *args, **kwargs)


def draft_and_check(
    model, input_ids, logits_processor, stopping_criteria, generation_config, draft, draft_tokens, streamer=None, **inputs
):
    """A decoding method for `generate(custom_generate=...)`: (1, S) token ids -> (1, S + new), or a `SelfDraftOutput`."""
    _refuse(generation_config, input_ids, inputs)
    check = {name: inputs[name] for name in ROUTED_BY if inputs.get(name) is not None}
    check = check or {"force_expert": model.config.expert_count - 1}
    # Not the cache of `generate`: where a window has passed, layers with windows cannot be cropped.
    cache, ids = DynamicCache(), input_ids
    drafted = accepted = passes = 0
    draft_seconds = check_seconds = 0.0

    def scores(tokens, kept, dial):
        """Processed logits (kept, V) after the last tokens (1, n) of the text; they are then in the cache."""
        outputs = model(
            tokens[:, cache.get_seq_length() :], past_key_values=cache, use_cache=True, logits_to_keep=kept, **dial
        )
        logits = outputs.logits[:, -kept:].float()
        ends = range(tokens.shape[1] - kept + 1, tokens.shape[1] + 1)
        return torch.cat([logits_processor(tokens[:, :end], logits[:, row]) for row, end in enumerate(ends)])

    confirmed = scores(ids, 1, check).argmax(-1)
    while True:
        for token in confirmed:
            ids = torch.cat([ids, token.view(1, 1)], 1)
            if streamer is not None:
                streamer.put(token.view(1).cpu())
            if stopping_criteria(ids, None).all():
                if streamer is not None:
                    streamer.end()
                if not generation_config.return_dict_in_generate:
                    return ids
                told: dict[str, Any] = {"drafted": drafted, "accepted": accepted, "passes": passes}
                told |= {"sequences": ids, "past_key_values": cache}
                return SelfDraftOutput(**told, draft_seconds=draft_seconds, check_seconds=check_seconds)
        begun, length, guess = time.perf_counter(), ids.shape[1], ids
        # One token more than is drafted comes out of each check.
        for _ in range(min(draft_tokens, generation_config.max_length - length - 1)):
            best = scores(guess, 1, draft).softmax(-1).max(-1)
            guess = torch.cat([guess, best.indices.view(1, 1)], 1)
            if best.values.item() < LEAST_PROBABILITY:
                break
        _crop(cache, length - 1)
        checking = time.perf_counter()
        confirmed = scores(guess, guess.shape[1] - length + 1, check).argmax(-1)
        matches = int((guess[0, length:] == confirmed[:-1]).long().cumprod(0).sum())
        confirmed = confirmed[: matches + 1]
        _crop(cache, length + matches)
        drafted, accepted, passes = drafted + guess.shape[1] - length, accepted + matches, passes + 1
        draft_seconds += checking - begun
        check_seconds += time.perf_counter() - checking


def _refuse(generation_config, input_ids, inputs):
    """Raise `ValueError` for what only the usual decoding does."""
    found = {
        "several sequences": input_ids.shape[0] > 1,
        "padding": inputs.get("attention_mask") is not None and not bool(inputs["attention_mask"].all()),
        "embeddings as inputs": input_ids.shape[1] == 0 or inputs.get("inputs_embeds") is not None,
        "sampling": generation_config.do_sample,
        "beams": generation_config.num_beams > 1,
        "guidance": generation_config.guidance_scale not in (None, 1),  # its processor takes one token after the other
        "a cache of another kind": generation_config.cache_implementation not in (None, "dynamic"),
        "no cache": generation_config.use_cache is False,
        "scores or states as outputs": any(
            getattr(generation_config, f"output_{name}") for name in ("scores", "logits", "attentions", "hidden_states")
        ),
    }
    if named := [what for what, is_so in found.items() if is_so]:
        raise ValueError(
            f"`draft_budget` decodes one sequence greedily with a dynamic cache: found {', '.join(named)}. Leave `draft_budget` out."
        )


def _crop(cache, length):
    """Forget what stands after the first `length` tokens."""
    if (surplus := cache.get_seq_length() - length) > 0:
        cache.crop(-surplus)
