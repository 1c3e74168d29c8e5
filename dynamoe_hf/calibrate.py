# SPDX-License-Identifier: Apache-2.0
"""
Budgets -> places of the dial: find the mix of narrow experts and of sparsity inside them that reaches a mean share of the MLPs' weights
at the least cost, and write it into the config.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .arguments import CalibrateArguments, resolve
from .card import new_records
from .data import check_ids, documents_for, text_names, token_blocks
from .folder import CALIBRATION, changed_config, load_model, load_tokenizer, write_json
from .modeling import DynaMoEForCausalLM
from .observe import RouterRun, bisect_rising, expert_shares, run_routers, shares_read
from .threshold_fit import DENSITIES as FITTED
from .threshold_fit import fit_thresholds


TOLERANCE = 0.02  # a budget is reached when the mean share is this near on the calibration text
NEAR = 0.004  # when the search for it stops
STEP = 1e-4  # between the sensitivities of two budgets, at least
WIDTHS = (1.0, 0.85, 0.7, 0.55, 0.4)  # mean shares of the width at which mixes are tried
DENSITIES = (1.0, 0.85, 0.7, 0.55, 0.4)  # inside them
MIX_TOKENS = 2048  # on which mixes are compared
FINE = 61  # places between the mixes that were tried, by interpolation, along each axis


class Place(NamedTuple):
    """A place of the dial, and what was seen there."""

    sensitivity: float
    density: float
    run: RouterRun


def calibrate_budgets(folder: str | Path, arguments: CalibrateArguments | None = None, **settings: Any) -> dict:
    """
    Find the sensitivity and the density that reach each budget, a mean share of the MLPs' weights over tokens and MLPs.

    Thresholds are fitted first. Mixes of routing and sparsity are then compared by KL(full width || mix) on some of the text, and
    for each budget the cheapest is taken that keeps the dial monotone. Narrow experts in early layers change what later routers
    read, so no threshold can be read off one pass: the model is run at each place, and the next one is solved for on that run.

    Args:
        folder: trained model folder; its config gets `budgets`, `thresholds`, `threshold_ramp`, `density_path`, and the largest
            budget as default sensitivity.
        arguments, settings: the fields of `CalibrateArguments`, as one object or by name.

    Returns:
        The calibration record, also written to `calibration.json`: for each budget the sensitivity, the density, the mean share
        reached and its 95% interval over blocks (None for one block), which says how near other text of the kind will come, and
        the mean share of the width; the `mixes` that were compared; and the tokens.

    Raises:
        ValueError: a budget is out of reach, for example because the routers are untrained; nothing is written then.
    """
    arguments = resolve(CalibrateArguments, arguments, settings)
    if not Path(folder).is_dir():
        raise ValueError(
            f"`calibrate` writes into a model folder on this machine: found {folder}. Give the output of `dynamoe train`."
        )
    with new_records(folder) as staging:
        record, written = _calibrated(folder, arguments)
        write_json(staging / "config.json", changed_config(folder, **written))
        write_json(staging / CALIBRATION, record)
    return record


def _calibrated(folder, arguments: CalibrateArguments) -> tuple[dict, dict]:
    """The record, and the fields of the config."""
    text, batch_size, lowest = arguments.text, arguments.batch_size, arguments.lowest_density
    if not FITTED[0] <= lowest <= 1:
        raise ValueError(f"`lowest_density` must be in [{FITTED[0]:g}, 1], found {lowest:g}. 1 leaves experts dense.")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if lowest == 1 and arguments.threshold_ramp:
        raise ValueError(
            f"`threshold_ramp` needs sparsity inside experts, found {arguments.threshold_ramp:g} and a lowest density of 1, which leaves "
            "experts dense. Leave it out, or give a lower `lowest_density`."
        )
    budgets = sorted({float(budget) for budget in arguments.budgets}, reverse=True)
    check_reach(model, budgets, "budget", lowest)
    blocks = token_blocks(documents_for("calibration", text), tokenizer, arguments.block_size, arguments.max_tokens)
    check_ids(blocks, model.config, tokenizer)
    model.config.density_path, model.config.thresholds = [], None
    if arguments.threshold_ramp is not None:
        model.config.threshold_ramp = arguments.threshold_ramp
    logits_LTE = run_routers(model, blocks, expert_shares(model), 0.5, batch_size).logits_LTE
    if logits_LTE.numel() and logits_LTE[..., 0].max() == logits_LTE[..., 0].min():
        raise ValueError(
            "The budgets cannot be reached by routing: found routers that see no difference between tokens. Run `dynamoe train` first."
        )
    mixes: list[dict] = []
    starts = [(start_sensitivity(model, logits_LTE, budget), 1.0) for budget in budgets]
    if lowest < 1:
        fit_thresholds(model, blocks)
        mixes = compare_mixes(model, blocks[: max(1, MIX_TOKENS // blocks.shape[1])], logits_LTE, lowest)
        starts = cheapest_mixes(mixes, budgets, lambda width: start_sensitivity(model, logits_LTE, width))
    places: list[Place] = []
    for budget, start in zip(tqdm(budgets, desc="Calibrating", leave=False), starts):
        places.append(_solve(model, blocks, budget, start, places[-1] if places else None, lowest, batch_size))
    found = dict(sorted(((f"{b:g}", _entry(place)) for b, place in zip(budgets, places)), key=lambda item: float(item[0])))
    path = [[entry["sensitivity"], entry["density"]] for entry in found.values()]
    record = {
        "budgets": found,
        "text": text_names(text),
        "tokens": blocks.numel(),
        "block_size": blocks.shape[1],
        "mixes": mixes,
    }
    written = {"budgets": {budget: entry["sensitivity"] for budget, entry in found.items()}, "sensitivity": path[-1][0]}
    written |= {"thresholds": model.config.thresholds, "density_path": path if model.config.thresholds else []}
    written["threshold_ramp"] = ramp = model.config.threshold_ramp
    # Code of format 1 would not see the thresholds, and code of format 2 not the ramp. No more, for the code beside the weights stays.
    written["format_version"] = max(model.config.format_version, 3 if ramp else 2)
    return record, written


def check_reach(model: DynaMoEForCausalLM, shares: Sequence[float], what: str, density: float = 1.0) -> None:
    """Raise ValueError, which calls it a `what`, for a mean share of the weights that no place of the dial gives, or without a dial."""
    if not model.config.has_dial:
        raise ValueError(
            f"The argmax router has no dial to calibrate. Convert with the profile router (`--router-type profile`) for {what}s."
        )
    smallest = expert_shares(model)[:, 0].mean().item() * density
    for share in shares:
        if not smallest < share < 1:
            raise ValueError(
                f"{what}={share:g} is out of reach: the smallest experts read {smallest:.2f} of the MLPs' weights on average, the "
                f"full width 1. Choose {what}s between."
            )


def start_sensitivity(model: DynaMoEForCausalLM, logits_LTE: torch.Tensor, width: float) -> float:
    """The sensitivity at which tokens with these router logits take a mean share of the MLPs' width."""
    shares_LE = expert_shares(model)

    def share_at(threshold):
        return shares_LE.gather(1, (logits_LTE < threshold).sum(-1)).mean().item()

    threshold = torch.tensor(bisect_rising(share_at, min(width, 0.999), -30.0, 30.0), dtype=torch.float64)
    return min(max(threshold.sigmoid().item(), 1e-9), 1 - 1e-7)


@torch.no_grad()
def compare_mixes(model: DynaMoEForCausalLM, blocks: torch.Tensor, logits_LTE: torch.Tensor, lowest: float) -> list[dict]:
    """
    Every mix of `WIDTHS` and `DENSITIES`, none below `lowest`, on token ids (N, S): `width`, `sensitivity`, `density`, the `share`
    of the weights that tokens read, and `kl`, the mean of KL(full width || mix).
    """
    densities = [density for density in DENSITIES if density > lowest] + [lowest]
    mixes = [
        {
            "width": width,
            "sensitivity": start_sensitivity(model, logits_LTE, width),
            "density": density,
            "share": 0.0,
            "kl": 0.0,
        }
        for width in WIDTHS
        for density in densities
    ]
    full = {"force_expert": model.config.expert_count - 1}
    for batch in tqdm(blocks.split(1), desc="Comparing mixes", leave=False):
        batch = batch.to(model.device)
        with model.routing(**full):
            expected = model(batch, use_cache=False).logits[0].float().log_softmax(-1)
        for mix in mixes:
            records: list = []
            with model.routing(sensitivity=mix["sensitivity"], density=mix["density"], records=records):
                found = model(batch, use_cache=False).logits[0].float().log_softmax(-1)
            mix["share"] += shares_read(model, records).mean().item() / len(blocks)
            kl = F.kl_div(found, expected, log_target=True, reduction="batchmean").item()
            mix["kl"] += max(0.0, kl) / len(blocks)  # rounding takes a KL of nothing below 0
    return mixes


def cheapest_mixes(mixes: list[dict], budgets: Sequence[float], sensitivity_of) -> list[tuple[float, float]]:
    """
    The sensitivity and density of the cheapest mix for each of the falling `budgets`, so that both fall too. Between the mixes that
    were compared, the share and the root of KL are nearly linear. `sensitivity_of` gives the sensitivity of a width.
    """
    widths, densities = (sorted({mix[name] for mix in mixes}) for name in ("width", "density"))
    seen = {(mix["width"], mix["density"]): mix for mix in mixes}
    tables = [[[seen[w, d][name] ** power for d in densities] for w in widths] for name, power in (("share", 1), ("kl", 0.5))]
    share, root = (
        F.interpolate(torch.tensor([tables]), size=(FINE, FINE), mode="bilinear", align_corners=True)[0].double().numpy()
    )
    fine_w, fine_d = (np.interp(np.linspace(0, len(v) - 1, FINE), range(len(v)), v) for v in (widths, densities))
    chosen, row_limit, density_limit = [], FINE, 1.0
    for budget in budgets:
        candidates = []
        for row in range(row_limit):
            if share[row, 0] <= budget <= share[row, -1]:
                density = np.interp(budget, share[row], fine_d)
                candidates.append((np.interp(density, fine_d, root[row]), row, density))
        allowed = [each for each in candidates if each[2] <= density_limit + 1e-9] or candidates
        if not allowed:  # the budget is beyond what was compared: go on from the nearest mix
            allowed = [(0.0, min(row_limit - 1, int(abs(share[:, 0] - budget).argmin())), fine_d[0])]
        _, row, density = min(allowed)
        chosen.append((sensitivity_of(fine_w[row]), float(min(density, density_limit))))
        row_limit, density_limit = max(1, row), chosen[-1][1]
    return chosen


def sensitivity_at(
    model: DynaMoEForCausalLM,
    blocks: torch.Tensor,
    share: float,
    batch_size: int = 4,
    tolerance: float = NEAR,
    rounds: int = 8,
) -> float:
    """The sensitivity at which token ids (N, S) read a mean `share` of the MLPs' weights, along the dial as it is calibrated."""
    low, high = (-16.0, expert_shares(model)[:, 0].mean().item()), (16.0, 1.0)
    guess, nearest = 0.0, (1.0, 1.0)
    for _ in range(rounds):
        sensitivity = torch.tensor(guess, dtype=torch.float64).sigmoid().item()
        reached = run_routers(model, blocks, expert_shares(model), sensitivity, batch_size).share_N.mean().item()
        if abs(reached - share) < abs(nearest[1] - share):
            nearest = (sensitivity, reached)
        if abs(reached - share) < tolerance:
            break
        low, high = (low, (guess, reached)) if reached > share else ((guess, reached), high)
        part = (share - low[1]) / (high[1] - low[1])
        guess = low[0] + min(max(part, 0.1), 0.9) * (high[0] - low[0])
    return nearest[0]


def _solve(model, blocks, budget, start, above: Place | None, lowest, batch_size, rounds=6) -> Place:
    """
    The place nearest to `budget`, from the mix `start`, with less sensitivity than `above` and no more density. The density is
    moved while it may be, between `lowest` and that of `above`; else the sensitivity.
    """
    limit, highest = (above.sensitivity - STEP, above.density) if above else (1.0, 1.0)
    sensitivity, density = min(start[0], limit), min(start[1], highest)
    shares, best = expert_shares(model), None
    for _ in range(rounds):
        run = run_routers(model, blocks, shares, sensitivity, batch_size, density)
        reached = run.share_N.mean().item()
        if best is None or abs(reached - budget) < abs(best.run.share_N.mean().item() - budget):
            best = Place(sensitivity, density, run)
        if abs(reached - budget) < NEAR:
            break
        wanted = density * budget / reached
        density = min(max(wanted, lowest), highest)
        if density != wanted:
            width = run.width * wanted / density
            sensitivity = min(start_sensitivity(model, run.logits_LTE, width), limit)
    assert best is not None
    reached = best.run.share_N.mean().item()
    if abs(reached - budget) > TOLERANCE:
        raise ValueError(
            f"budget={budget:g} cannot be reached: the nearest mean share is {reached:.3f}, at sensitivity {best.sensitivity:.4f}. "
            "Routers that see no difference between tokens cannot divide them: run `dynamoe train` first, or train longer."
        )
    return best


def _entry(place: Place) -> dict:
    """What the record says of a budget."""
    share_N = place.run.share_N
    reached, half = share_N.mean().item(), None
    if len(share_N) > 1:
        half = 1.96 * share_N.std().item() / len(share_N) ** 0.5
    return {
        "sensitivity": place.sensitivity,
        "density": round(place.density, 4),
        "mean_share": round(reached, 4),
        "interval": None if half is None else [round(reached - half, 4), round(reached + half, 4)],
        "mean_width": round(place.run.width, 4),
    }
