# SPDX-License-Identifier: Apache-2.0
"""Wall-clock against the dense base in the same run."""

import statistics
import time
from collections.abc import Sequence

import torch

from .convert import dense_prefix, prove_parity
from .modeling import DynaMoEForCausalLM


@torch.no_grad()
def decode_speed(
    model: DynaMoEForCausalLM,
    prompt: torch.Tensor,
    sensitivities: Sequence[float],
    new_tokens: int = 32,
    rounds: int = 5,
) -> list[dict]:
    """
    Tokens per second of greedy decoding with a cache, dense and at each sensitivity, prefill not counted.

    The dense side is the base's own class with the full-width weights of `model`, so that parity can be asked of it exactly.
    The runs are interleaved round by round, and each ratio is the median of those of its pairs, so that a machine whose
    speed drifts slows both sides. The first round warms up and is not counted.

    Args:
        prompt: token ids (B, S).
        sensitivities: settings of the dial.

    Returns:
        For each sensitivity: `tokens_per_second`, `dense_tokens_per_second` (medians), `speed_ratio` (median of paired ratios)
        and `speed_ratio_range`.

    Raises:
        ValueError: at full width the model does not equal the dense one; nothing is timed then.
    """
    dense = dense_prefix(model, 1.0)
    expected, actual = dense(prompt).logits, model(prompt, force_expert=model.config.expert_count - 1).logits
    prove_parity(expected, actual, model.dtype)
    times: dict[float | None, list[float]] = {None: [], **{s: [] for s in sensitivities}}
    for _ in range(rounds + 1):
        for sensitivity, values in times.items():
            options = {} if sensitivity is None else {"sensitivity": sensitivity}
            values.append(_decode_seconds(dense if sensitivity is None else model, prompt, new_tokens, **options))
    base = times.pop(None)[1:]
    rows = []
    for sensitivity, values in times.items():
        ratios = [b / v for b, v in zip(base, values[1:])]
        rows.append(
            {
                "sensitivity": sensitivity,
                "tokens_per_second": prompt.shape[0] * new_tokens / statistics.median(values[1:]),
                "dense_tokens_per_second": prompt.shape[0] * new_tokens / statistics.median(base),
                "speed_ratio": statistics.median(ratios),
                "speed_ratio_range": [min(ratios), max(ratios)],
            }
        )
    return rows


def _decode_seconds(model, prompt, new_tokens, **options):
    out = model(prompt, use_cache=True, logits_to_keep=1, **options)
    start = time.perf_counter()
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True, **options)
    return time.perf_counter() - start
