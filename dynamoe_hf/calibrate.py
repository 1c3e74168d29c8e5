# SPDX-License-Identifier: Apache-2.0
"""Budgets -> sensitivities: find where the dial must stand for a mean share of MLP width, and write it into the config."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .arguments import CalibrateArguments, resolve
from .data import documents_for, text_names, token_blocks
from .folder import CALIBRATION, load_model, load_tokenizer, update_config, write_json
from .modeling import DynaMoEForCausalLM
from .observe import bisect_rising, expert_shares, run_routers


TOLERANCE = 0.02  # a budget is reached when the mean share is this near on the calibration text


def calibrate_budgets(folder: str | Path, arguments: CalibrateArguments | None = None, **settings: Any) -> dict:
    """
    Find the sensitivity that reaches each budget, a mean share of MLP width over tokens and layers.

    Narrow experts in early layers change what later routers read, so a threshold cannot be read off one pass: the model is
    run at each candidate, and the next one is solved for on the router outputs of that run.

    Args:
        folder: trained model folder; its config gets `budgets`, and the largest budget as default sensitivity.
        arguments, settings: the fields of `CalibrateArguments`, as one object or by name.

    Returns:
        The calibration record, also written to `calibration.json`: for each budget the sensitivity, the mean share reached and its
        95% interval over blocks (None for one block), which says how near other text of the kind will come; and the tokens.

    Raises:
        ValueError: a budget is out of reach, for example because the routers are untrained; nothing is written then.
    """
    arguments = resolve(CalibrateArguments, arguments, settings)
    text, batch_size = arguments.text, arguments.batch_size
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    shares = expert_shares(model)
    budgets = sorted({float(budget) for budget in arguments.budgets}, reverse=True)
    check_reach(model, budgets, "budget")
    blocks = token_blocks(documents_for("calibration", text), tokenizer, arguments.block_size, arguments.max_tokens)
    found, run = {}, run_routers(model, blocks, shares, 0.5, batch_size)
    for budget in tqdm(budgets, desc="Calibrating", leave=False):
        (sensitivity, share_N), run = solve_budget(model, blocks, shares, budget, run, batch_size)
        reached = share_N.mean().item()
        if abs(reached - budget) > TOLERANCE:
            raise ValueError(
                f"budget={budget:g} cannot be reached: the nearest mean share is {reached:.3f}, at sensitivity {sensitivity:.4f}. "
                "Routers that see no difference between tokens cannot divide them: run `dynamoe train` first, or train longer."
            )
        half = 1.96 * share_N.std().item() / len(share_N) ** 0.5 if len(share_N) > 1 else None
        interval = None if half is None else [round(reached - half, 4), round(reached + half, 4)]
        found[f"{budget:g}"] = {"sensitivity": sensitivity, "mean_share": round(reached, 4), "interval": interval}
    found = dict(sorted(found.items(), key=lambda item: float(item[0])))
    thetas = [entry["sensitivity"] for entry in found.values()]
    if thetas != sorted(thetas):
        raise ValueError(f"The dial is not monotone: budgets {', '.join(found)} need sensitivities {thetas}. Train longer.")
    record = {
        "budgets": found,
        "text": text_names(text),
        "tokens": blocks.numel(),
        "block_size": blocks.shape[1],
    }
    update_config(folder, budgets={budget: entry["sensitivity"] for budget, entry in found.items()}, sensitivity=max(thetas))
    write_json(Path(folder) / CALIBRATION, record)
    return record


def check_reach(model: DynaMoEForCausalLM, shares: Sequence[float], what: str) -> None:
    """Raise ValueError, which calls it a `what`, for a mean share of MLP width that no sensitivity gives, or without a dial."""
    if not model.config.has_dial:
        raise ValueError(
            f"The argmax router has no dial to calibrate. Convert with the profile router (`--router-type profile`) for {what}s."
        )
    smallest = expert_shares(model)[:, 0].mean().item()
    for share in shares:
        if not smallest < share < 1:
            raise ValueError(
                f"{what}={share:g} is out of reach: the smallest experts take {smallest:.2f} of the MLP width on average, the "
                f"full width 1. Choose {what}s between."
            )


def solve_budget(model, blocks, shares, budget, run, batch_size, rounds=5, tolerance=0.004):
    """The sensitivity nearest to `budget` and the share of each block there (N,), starting from an earlier run; and the last run."""
    best, distance = None, float("inf")
    for _ in range(rounds):
        # The share that the logits of the last run give is a rising step function of the threshold.
        logits_LTE = run[1]

        def share_at(threshold, logits_LTE=logits_LTE):
            return shares.gather(1, (logits_LTE < threshold).sum(-1)).mean().item()

        threshold = torch.tensor(bisect_rising(share_at, budget, -30.0, 30.0), dtype=torch.float64)
        sensitivity = min(max(threshold.sigmoid().item(), 1e-9), 1 - 1e-7)
        run = run_routers(model, blocks, shares, sensitivity, batch_size)
        reached = abs(run[0].mean().item() - budget)
        if reached < distance:
            best, distance = (sensitivity, run[0]), reached
        if distance < tolerance:
            break
    return best, run
