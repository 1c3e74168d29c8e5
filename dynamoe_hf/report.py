# SPDX-License-Identifier: Apache-2.0
"""The report of a model folder: figures of its evaluations, and a text coloured by difficulty as a picture and a page."""

import base64
import json
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .arguments import ReportArguments, resolve
from .card import check_records, new_records
from .data import documents_for
from .folder import RESULTS, inspect_folder, load_model, load_tokenizer, new_files, read_json
from .modeling import DynaMoEForCausalLM
from .modeling.routing import LayerRecord
from .observe import mixture_consistency, mlp_parts
from .plots import PAPER, colour_scale, draw_experts, draw_frontier, draw_tokens, new_figure
from .tables import by_text, render_template, setting_label, text_name


DEFAULT_LENGTH, LONGEST = 1200, 6000  # characters shown of the default text, and at most of a text file
SEGMENT = 16  # tokens, in which the routes of a mixture are compared


def report_folder(folder: str | Path, arguments: ReportArguments | None = None, **settings: Any) -> list[Path]:
    """
    Draw what `results.json` of a model folder holds, and a text coloured by difficulty. An earlier report is replaced.

    Args:
        folder: model folder that has been evaluated.
        arguments, settings: the fields of `ReportArguments`, as one object or by name.

    Returns:
        The files written: `frontier.png`, `experts.png`, `tokens.png`, `tokens.html` and `index.html`, which shows them all.

    Raises:
        ValueError: the folder has no results, the budget is not calibrated, or matplotlib is missing.
    """
    arguments = resolve(ReportArguments, arguments, settings)
    text = arguments.text
    evaluations = (read_json(Path(folder) / RESULTS) or {}).get("evaluations")
    if not evaluations:
        raise ValueError(f"{folder} has nothing to draw: no evaluations in {RESULTS}. Run `dynamoe evaluate {folder}` first.")
    check_records(folder)
    new_figure(1, 1)  # fails before the model is loaded if matplotlib is missing
    passage = _passage(text)
    out = Path(folder) / "report" if arguments.out is None else Path(arguments.out)
    with new_records(folder) if arguments.out is None else nullcontext(), new_files(out) as staging:
        names = _draw(staging, folder, passage, arguments.budget, evaluations)
    return [out / name for name in names]


def _draw(out: Path, folder, passage: str, budget: float | None, evaluations: list[dict]) -> list[str]:
    """Write the report into `out`, and return the names of its files."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    sensitivity, dial = _dial(model.config, budget)
    pieces, shares_LT = _whole_characters(*token_difficulty(model, tokenizer, passage, sensitivity))
    names, widths_LE = model.config.mlp_names, torch.tensor([mlp.shares for mlp in model.nested_mlps])
    means_T = (shares_LT * mlp_parts(model)[:, None]).mean(0)
    figures = {
        "frontier.png": draw_frontier(evaluations),
        "experts.png": draw_experts(evaluations, widths_LE, names),
        "tokens.png": draw_tokens(pieces, means_T, dial),
    }
    for name, figure in figures.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # emoji become boxes in the PNG only
            figure.savefig(out / name, dpi=200, facecolor=PAPER)
    ids = tokenizer(passage, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    routes = mixture_consistency(model, ids, SEGMENT, sensitivity=sensitivity) if model.is_mixture else {}
    images = {name: base64.b64encode((out / name).read_bytes()).decode() for name in figures}
    page = tokens_page(pieces, means_T, dict(zip(names, shares_LT)), dial)
    (out / "tokens.html").write_text(page, encoding="utf-8")
    (out / "index.html").write_text(_index_page(images, evaluations, inspect_folder(folder), routes), encoding="utf-8")
    return [*figures, "tokens.html", "index.html"]


@torch.no_grad()
def token_difficulty(
    model: DynaMoEForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, sensitivity: float | None = None
) -> tuple[list[str], torch.Tensor]:
    """
    The tokens of a text, and the share of its weights that each takes in each MLP: T strings and (L, T) float32.

    The strings joined are `text`, character by character. Where a tokenizer cuts one character into several tokens, the
    first has the character and the others are empty.

    Args:
        sensitivity: in (0, 1]; by default what the config says. At 1 every share is 1.

    Raises:
        ValueError: the text is empty, or the tokenizer does not say where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer cannot say where its tokens lie in the text: found {type(tokenizer).__name__}, which is not "
            "a fast one. Load the model with a tokenizer that has a `tokenizer.json`."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if not encoded["input_ids"]:
        raise ValueError(f"The text has no tokens: found {text!r}. Give some words.")
    # Offsets may skip white space and may cover one character several times, so each token gets what is left up to its end.
    ends, tokens, start = [end for _, end in encoded["offset_mapping"]], [], 0
    ends[-1] = len(text)
    for end in ends:
        tokens.append(text[start:end])
        start = max(start, end)
    ids = torch.tensor([encoded["input_ids"]], device=model.device)
    records: list[LayerRecord] = []
    with model.routing(records=records):
        model(ids, sensitivity=sensitivity, use_cache=False, logits_to_keep=1)
    return tokens, torch.cat([record.share.cpu() for record in records])


def _passage(text):
    """The beginning of a text file, or of the default text, up to the end of a word."""
    documents = documents_for("held-out", text)
    if text is None:  # the topic with the most letters at its beginning is prose, and not a page of grammar
        documents = sorted(documents, key=lambda document: -sum(map(str.isalpha, document[:DEFAULT_LENGTH])))
    document, limit = documents[0], DEFAULT_LENGTH if text is None else LONGEST
    return document if len(document) <= limit else re.sub(r"\s+\S*$", "", document[: limit + 1])


def _dial(config, budget):
    """The sensitivity to colour a text at, and the name of this setting."""
    if budget is None and config.sensitivity >= 1 and config.budgets:
        budget = min(map(float, config.budgets))
    if budget is not None:
        return config.sensitivity_of(budget), setting_label(budget)
    return config.sensitivity, f"sensitivity {config.sensitivity:.4g}" if config.has_dial else "the argmax router"


def _whole_characters(tokens, shares_LT):
    """Join the tokens of one character to one piece with their mean share, since a third of an emoji cannot be drawn."""
    piece = (torch.tensor([token != "" for token in tokens]).cumsum(0) - 1).clamp(min=0)
    member_TP = torch.nn.functional.one_hot(piece).float()
    return [token for token in tokens if token], shares_LT @ (member_TP / member_TP.sum(0))


def tokens_page(pieces: list[str], means_T: torch.Tensor, shares: dict[str, torch.Tensor], dial: str) -> str:
    """
    A self-contained HTML page that shows a text in T pieces, coloured by their share of MLP width in each MLP, (T,) float by its name,
    and by the mean (T,), which is all that it shows without scripts. `dial` names the setting.
    """
    scale, shares_LT = colour_scale(means_T), torch.stack([*shares.values()])
    rows = (1000 * torch.cat([means_T[None], shares_LT])).round().int().tolist()
    numbers = (means_T.tolist(), shares_LT.amin(0).tolist(), shares_LT.amax(0).tolist())
    tokens = list(zip(pieces, scale.places, *numbers))
    floor = min(map(min, rows[1:]))
    return render_template("tokens.html", tokens=tokens, scale=scale, rows=rows, names=list(shares), floor=floor, dial=dial)


def _index_page(images, evaluations, facts, routes):
    """One page with the pictures, the table of evaluations, what the routes of a mixture look like, and the facts of the folder."""
    title = f"{Path(facts['folder']).resolve().name}: report"
    groups = by_text(evaluations)
    facts |= {"folder": Path(facts["folder"]).resolve().name, "base": facts["base"] and text_name(facts["base"])}
    return render_template(
        "report.html", title=title, images=images, groups=groups, facts=facts, dumps=json.dumps, routes=routes, segment=SEGMENT
    )
