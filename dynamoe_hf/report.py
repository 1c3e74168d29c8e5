# SPDX-License-Identifier: Apache-2.0
"""Pictures of a model folder: quality against compute, use of experts by layer, and a text coloured by difficulty."""

import base64
import html
import json
import math
import re
import textwrap
import unicodedata
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .arguments import ReportArguments, resolve
from .data import documents_for
from .folder import RESULTS, inspect_folder, load_model, load_tokenizer, read_json
from .label import expert_shares
from .modeling import DynaMoEForCausalLM


PASSAGE, LONGEST = 1200, 6000  # characters shown of the default text, and at most of a text file
LINES = 60  # of the picture; the page has the whole passage
INK, FAINT, PAPER = "#1b1f24", "#66707b", "#ffffff"
EASY, HARD = "#f4f8fe", "#428ce4"  # both carry black text
# What is drawn of an evaluation: its label, colour (Okabe and Ito's, told apart by every eye), marker and line.
SERIES = {
    "router": ("router", "#0072B2", "o", "-"),
    "static": ("one width\nfor all tokens", "#D55E00", "s", "--"),
    "random": ("random\nrouting", "#A6608A", "^", "-."),
    "label": ("true difficulty\n(oracle)", "#009E73", "D", ":"),
}


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
    _figure(1, 1)  # a missing matplotlib shows before the model is loaded
    documents = documents_for("held-out", text)
    if text is None:  # the topic with the most prose, rather than a page of grammar
        documents = sorted(documents, key=lambda document: -sum(map(str.isalpha, document[:PASSAGE])))
    passage = _beginning(documents[0], PASSAGE if text is None else LONGEST)
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    sensitivity, dial = _dial(model.config, arguments.budget)
    pieces, shares_LT = _whole_characters(*token_difficulty(model, tokenizer, passage, sensitivity))
    out = Path(folder) / "report" if arguments.out is None else Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {
        "frontier.png": draw_frontier(evaluations),
        "experts.png": draw_experts(evaluations, expert_shares(model)),
        "tokens.png": draw_tokens(pieces, shares_LT, dial),
    }
    for name, figure in pictures.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # emoji become boxes in the PNG only
            figure.savefig(out / name, dpi=200, facecolor=PAPER)
    (out / "tokens.html").write_text(tokens_page(pieces, shares_LT, dial), encoding="utf-8")
    images = {name: base64.b64encode((out / name).read_bytes()).decode() for name in pictures}
    (out / "index.html").write_text(_index_page(images, evaluations, inspect_folder(folder)), encoding="utf-8")
    return [out / name for name in (*pictures, "tokens.html", "index.html")]


@torch.no_grad()
def token_difficulty(
    model: DynaMoEForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, sensitivity: float | None = None
) -> tuple[list[str], torch.Tensor]:
    """
    The tokens of a text, and the share of MLP width that each takes in each layer: T strings and (L, T) float32.

    The strings joined are `text`, character by character. Where a tokenizer cuts one character into several tokens, the
    first has the character and the others are empty.

    Args:
        sensitivity: theta in (0, 1]; by default what the config says. At 1 every share is 1.

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
    # Offsets may leave out white space and name one character several times, so each token takes what is not yet taken.
    ends, tokens, start = [end for _, end in encoded["offset_mapping"]], [], 0
    ends[-1] = len(text)
    for end in ends:
        tokens.append(text[start:end])
        start = max(start, end)
    ids = torch.tensor([encoded["input_ids"]], device=model.device)
    outputs = model(ids, sensitivity=sensitivity, output_router_logits=True, use_cache=False, logits_to_keep=1)
    experts_LT = torch.cat([expert.cpu() for expert in outputs.expert_indices])
    return tokens, expert_shares(model).gather(1, experts_LT)


def _dial(config, budget):
    """The sensitivity to colour a text at, and its name."""
    if budget is None and config.sensitivity >= 1 and config.budgets:
        budget = min(map(float, config.budgets))
    if budget is not None:
        return config.sensitivity_of(budget), f"budget {budget:g}"
    return (
        config.sensitivity,
        "the argmax router" if config.router_type == "argmax" else f"sensitivity {config.sensitivity:.4g}",
    )


def _beginning(text, limit):
    """At most `limit` characters, up to the end of a word."""
    return text if len(text) <= limit else re.sub(r"\s+\S*$", "", text[: limit + 1])


def _whole_characters(tokens, shares_LT):
    """Join the tokens of one character to one piece with their mean share: nothing can be drawn of a third of an emoji."""
    piece = (torch.tensor([token != "" for token in tokens]).cumsum(0) - 1).clamp(min=0)
    member_TP = torch.nn.functional.one_hot(piece).float()
    return [token for token in tokens if token], shares_LT @ (member_TP / member_TP.sum(0))


def _figure(width, height):
    """A figure of its own, in inches: pyplot's figures and back-end belong to whoever calls us."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"Pictures need matplotlib ({error}). Install it: `pip install 'dynamoe_hf[report]'`.") from error
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def _note(axis, text, anchor, offset, **style):
    """Text at an anchor in fractions of the axis, moved by an offset in points."""
    style = {"xycoords": "axes fraction", "color": FAINT, "fontsize": 9.5, **style}
    axis.annotate(text, anchor, xytext=offset, textcoords="offset points", **style)


def _routed(entries):
    """The entries in which routers choose, cheapest first."""
    return sorted((entry for entry in entries if "sensitivity" in entry), key=lambda entry: entry["mean_share"])


def _by_text(evaluations):
    groups = {}
    for entry in evaluations:
        groups.setdefault(_text_name(entry), []).append(entry)
    return groups


def _text_name(entry):
    text = entry["text"]
    return text if isinstance(text, str) else ", ".join(Path(path).name for path in text)


def draw_frontier(evaluations: list[dict]):
    """Quality against compute, one panel for each text: a matplotlib `Figure`."""
    groups = _by_text(evaluations)
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    head, body, foot = 0.9 if columns == 1 else 1.35, 3.4, 0.6  # inches of each row of panels
    height = rows * (head + body + foot)
    figure = _figure(9, height)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.07, right=0.98, bottom=foot / height, top=1 - head / height, wspace=0.18, hspace=(head + foot) / body
    )
    for axis, (text, entries) in zip(axes.flat, groups.items()):
        _draw_panel(axis, text, entries, inches=8.2 if columns == 1 else 3.75)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    return figure


def _draw_panel(axis, text, entries, inches):
    forced = [entry for entry in entries if "sensitivity" not in entry]
    series = {"router": _routed(entries)}
    for kind in list(SERIES)[1:]:
        points = [entry["baselines"][kind] for entry in entries if kind in entry.get("baselines", {})]
        series[kind] = sorted(points + (forced if kind == "static" else []), key=lambda point: point["mean_share"])
    series = {kind: points for kind, points in series.items() if points}
    ratio = all("ratio_to_dense" in point for points in series.values() for point in points)
    value, interval = ("ratio_to_dense", "ratio_interval") if ratio else ("perplexity", "perplexity_interval")
    times = "×" if ratio else ""

    dense = 1.0 if ratio else next((entry["dense_perplexity"] for entry in entries if "dense_perplexity" in entry), None)
    if dense is not None:
        axis.axhline(dense, color=FAINT, linewidth=1, zorder=1)
        _note(axis, "dense", (1, dense), (-4, -3), xycoords=("axes fraction", "data"), ha="right", va="top")
    for kind, points in series.items():
        _, colour, marker, line = SERIES[kind]
        y = [point[value] for point in points]
        error = [[max(0.0, abs(bound - v)) for v, bound in zip(y, bounds)] for bounds in zip(*(p[interval] for p in points))]
        main = kind == "router"
        axis.errorbar([100 * point["mean_share"] for point in points], y, error if main else None, color=colour, marker=marker,
                      linestyle=line, linewidth=2.4 if main else 1.5, markersize=7 if main else 5, capsize=3,
                      zorder=4 if main else 3)  # fmt: skip
    values = [point[value] for points in series.values() for point in points] + ([] if dense is None else [dense])
    if max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.set_yticks([tens * digit for tens in (1, 10, 100, 1000) for digit in (1, 1.5, 2, 3, 5, 7)])
        axis.minorticks_off()
        axis.set_ylim(min(values) * 0.85, max(values) * 1.15)
    axis.yaxis.set_major_formatter(lambda v, _: f"{v:.4g}{times}")
    axis.margins(y=0.12)

    # The labels stand in a gutter left of all points, where the lines lie furthest apart.
    left, right = (100 * end(p["mean_share"] for points in series.values() for p in points) for end in (min, max))
    gutter = 1.35 / inches
    width = max(right - left, 10) / (0.96 - gutter)
    axis.set_xlim(left - gutter * width, left + (1 - gutter) * width)
    ticks = [tick for tick in axis.get_xticks() if left - 1 <= tick <= right + 1]
    axis.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    to_axes = axis.transScale + axis.transLimits
    ends = sorted((to_axes.transform((left, points[0][value]))[1], kind) for kind, points in series.items())
    heights = _spread([height for height, _ in ends], 0.115)
    for (_, kind), height in zip(ends, heights):
        label, colour, *_ = SERIES[kind]
        first = series[kind][0]
        x, y = to_axes.transform((100 * first["mean_share"], first[value]))
        start = gutter - 0.2 / inches
        axis.plot([start, x - 0.1 / inches], [height, y], transform=axis.transAxes, color=colour, linewidth=0.8, alpha=0.6)
        axis.text(start - 0.06 / inches, height, label, transform=axis.transAxes, color=colour, ha="right", va="center",
                  fontsize=10, linespacing=1.05, fontweight="bold" if kind == "router" else "normal",
                  bbox={"facecolor": PAPER, "linewidth": 0, "pad": 1})  # fmt: skip

    quality = "Perplexity against the dense model" if ratio else "Perplexity"
    name = text if len(text) < 32 else f"{text[:30]}…"
    subtitle = textwrap.fill(f"{name}, {entries[0]['tokens']:,} tokens. {quality}, lower is better.", int(15 * inches))
    _note(axis, subtitle, (0, 1), (-18, 8))
    claim = textwrap.fill(_claim(series, value, ratio), int(11 * inches))
    _note(axis, claim, (0, 1), (-18, 26 + 13 * subtitle.count("\n")), color=INK, fontsize=11, fontweight="bold")
    axis.set_xlabel("Share of the MLP width that a token uses, on average", color=FAINT, fontsize=9.5)
    axis.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=FAINT, labelsize=9.5, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c5cbd2")


def _claim(series, value, ratio):
    """What the panel shows, in words: the cheapest routed setting against one width for all tokens."""
    if "router" not in series:
        return "Perplexity with one expert for all tokens"
    cheapest = series["router"][0]
    static = cheapest.get("baselines", {}).get("static")
    times, against = ("×", " the dense") if ratio else ("", "")
    claim = f"{cheapest['mean_share']:.0%} of the MLP width gives {cheapest[value]:.2f}{times}{against} perplexity"
    return claim + (f", one width for all tokens {static[value]:.2f}{times}" if static else "")


def _spread(heights, gap):
    """Rising heights moved up until they are `gap` apart, then all down to where they were on average."""
    placed = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    shift = (sum(placed) - sum(heights)) / len(heights)
    return [height - shift for height in placed]


def draw_experts(evaluations: list[dict], shares_LE: torch.Tensor):
    """
    Use of experts by layer as a heat map, at up to four settings on the first text: a matplotlib `Figure`.

    Args:
        shares_LE: width of each expert as a share of the layer's MLP, as `expert_shares` gives it.
    """
    entries = next(iter(_by_text(evaluations).values()))
    entries = [entry for entry in _routed(entries) if entry["mean_share"] < 1] or entries
    entries = entries[:: math.ceil(len(entries) / 4)]
    layers, experts = shares_LE.shape
    height = 1.75 + 0.155 * max(layers, 6)
    figure = _figure(9, height)
    axes = figure.subplots(1, len(entries), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.055, right=0.945, bottom=0.55 / height, top=1 - 1.2 / height, wspace=0.24)
    same = bool((shares_LE == shares_LE[0]).all())
    names = [f"{share:.0%}" for share in shares_LE[0].tolist()] if same else [str(e) for e in range(experts)]
    crowded = experts * len(entries) > 20
    named = range((experts - 1) % 2, experts, 2) if crowded else range(experts)  # the last one has its name
    for axis, entry in zip(axes, entries):
        use_LE = torch.tensor(entry["expert_use"])
        axis.imshow(use_LE.tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for layer, row in enumerate(use_LE.tolist()):
            for e, use in enumerate(row):
                label = f"{use:.0%}".rstrip("%" if crowded else "")
                axis.text(e, layer, label, fontsize=7, ha="center", va="center", color=PAPER if use > 0.6 else INK)
        for layer, mean in enumerate((use_LE * shares_LE).sum(1).tolist()):
            _note(axis, f"{mean:.0%}", (experts - 0.5, layer), (5, 0), xycoords="data", fontsize=8, color=INK, va="center")
        _note(axis, "mean\nwidth", (1, 1), (5, 4), fontsize=8)
        axis.set_title(entry["setting"], loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=5)
        axis.set_xticks(named, [names[e] for e in named])
        axis.set_xlabel("width of the expert" if same else "expert", fontsize=9, color=FAINT)
        axis.set_yticks(range(0, layers, 1 if layers <= 12 else 5))
        axis.tick_params(colors=FAINT, labelsize=9, length=0)
        axis.spines[:].set_visible(False)
    _note(axes[0], "layer", (0, 1), (-6, 6), fontsize=9, ha="right")
    mean_L = (torch.tensor(entries[0]["expert_use"]) * shares_LE).sum(1)
    thrifty, hungry = mean_L.argmin().item(), mean_L.argmax().item()
    claim = f"Layer {thrifty} gets by with {mean_L[thrifty]:.0%} of its width, layer {hungry} takes {mean_L[hungry]:.0%}"
    figure.text(0.02, 1 - 0.32 / height, f"{claim}, at {entries[0]['setting']}", fontsize=12, fontweight="bold", color=INK)
    subtitle = "Share of a layer's tokens that take each expert" + (", in percent" if crowded else "")
    figure.text(0.02, 1 - 0.62 / height, subtitle, fontsize=9.5, color=FAINT)
    return figure


def _scale(means_T):
    """The shares that the ends of the colour scale stand for. A few outliers, such as the first token, must not set them."""
    low, high = torch.quantile(means_T, torch.tensor([0.02, 0.98])).tolist()
    return (low, high) if high - low > 0.001 else (high - 0.001, high)


def _colours(means_T):
    """Place of each token on the colour scale, in [0, 1]."""
    low, high = _scale(means_T)
    return ((means_T - low) / (high - low)).clamp(0, 1).tolist()


def _summary(means_T):
    low, high = _scale(means_T)
    if high - low <= 0.0011:
        return f"Every token takes {means_T.mean():.0%} of the MLP width"
    return f"Easy tokens take {low:.0%} of the MLP width, hard ones {high:.0%}, and the average {means_T.mean():.0%}"


def draw_tokens(pieces: list[str], shares_LT: torch.Tensor, dial: str, columns: int = 92):
    """A text whose tokens are coloured by their mean share of MLP width, wrapped at `columns`: a matplotlib `Figure`."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    means_T = shares_LT.mean(0)
    low, high = _scale(means_T)
    colour = LinearSegmentedColormap.from_list("difficulty", [EASY, HARD])
    places = _colours(means_T)
    cells = [cell for cell in _wrap(pieces, columns) if cell[0] < LINES]
    lines = cells[-1][0] + 1
    margin, advance, spacing, head = 0.2, (9 - 2 * 0.2) / columns, 0.215, 0.95
    height = head + spacing * lines + 0.15
    figure = _figure(9, height)
    axis = figure.add_axes((margin / 9, 0.15 / height, 1 - 2 * margin / 9, spacing * lines / height))
    axis.set(xlim=(0, columns), ylim=(lines, 0))
    axis.axis("off")
    size = advance * 72 / 0.602  # DejaVu Sans Mono, which matplotlib brings, is 0.602 em wide
    for (line, token), run in groupby(cells, key=lambda cell: (cell[0], cell[2])):
        run = list(run)
        start, end = run[0][1], run[-1][1] + run[-1][4]
        box = Rectangle((start + 0.04, line + 0.06), end - start - 0.08, 0.88, color=colour(places[token]), linewidth=0)
        axis.add_patch(box)
        for _, column, _, character, _ in run:
            if not character.isspace():  # `parse_math`: a dollar is a dollar
                faint = character == "↵"
                axis.text(column, line + 0.52, character, family="DejaVu Sans Mono", fontsize=size, va="center_baseline",
                          color=FAINT if faint else INK, alpha=0.5 if faint else 1, parse_math=False)  # fmt: skip
    x = margin / 9
    figure.text(x, 1 - 0.33 / height, _summary(means_T), fontsize=12, fontweight="bold", color=INK)
    figure.text(x, 1 - 0.66 / height, f"easy ≤ {low:.0%}", fontsize=9.5, color=FAINT, va="center")
    strip = figure.add_axes((x + 0.095, 1 - 0.73 / height, 0.2, 0.14 / height))
    strip.imshow([[i / 99 for i in range(100)]], cmap=colour, aspect="auto")
    strip.axis("off")
    caption = f"hard ≥ {high:.0%}     mean over {len(shares_LT)} layers, {dial}"
    figure.text(x + 0.305, 1 - 0.66 / height, caption, fontsize=9.5, color=FAINT, va="center")
    return figure


def _wrap(pieces, columns):
    """Lay out characters on a grid, breaking lines between words: (line, column, piece, character, width) of each."""
    owner = [index for index, piece in enumerate(pieces) for _ in piece]
    cells, line, column = [], 0, 0
    for word in re.finditer(r"\n|[^\S\n]+|\S+", "".join(pieces)):
        widths = [_columns(character) for character in word[0]]
        if column and not word[0].isspace() and column + sum(widths) > columns:
            line, column = line + 1, 0
        for position, (character, width) in enumerate(zip(word[0], widths), word.start()):
            if column + width > columns and character != "\n":
                line, column = line + 1, 0
            cells.append((line, column, owner[position], "↵" if character == "\n" else character, width))
            line, column = (line + 1, 0) if character == "\n" else (line, column + width)
    return cells


def _columns(character):
    """Width of a character on a monospace grid."""
    if character == "\t":
        return 4
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #57606a; --paper: #fff; --line: #d8dee4; --hard: 66 140 228; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #9aa4ae; --paper: #0f1318; --line: #30363d; --hard: 38 106 196; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 5rem; max-width: 58rem; background: var(--paper); color: var(--ink);
       font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.35rem; line-height: 1.3; margin: 0 0 .25rem; text-wrap: balance; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem; }
p { margin: 0 0 1rem; }
.faint { color: var(--faint); }
:focus-visible { outline: 2px solid var(--ink); outline-offset: 1px; }
"""

TOKEN_STYLE = """
.bar { position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .25rem 2rem; align-items: center; padding: .75rem 0;
       background: var(--paper); border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; z-index: 1; }
.bar label, .bar div { display: flex; align-items: center; gap: .6rem; }
.bar input { width: 11rem; accent-color: rgb(var(--hard)); }
.bar output { min-width: 6.5rem; }
.bar i { width: 8rem; height: .8rem; border-radius: 2px;
         background: linear-gradient(90deg, rgb(var(--hard) / .06), rgb(var(--hard))); }
#text { margin-top: 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.75 ui-monospace, monospace; }
#text span { --share: 0; padding: .15em 0; border-radius: 3px; box-shadow: inset 1px 0 var(--paper);
             background: rgb(var(--hard) / calc(.06 + .94 * var(--share))); }
#text .newline::before { content: "↵"; color: var(--faint); }
#text span:focus::after { content: attr(title); position: fixed; inset: auto 0 0; padding: .75rem 1rem; font: 1rem system-ui;
                          white-space: normal; text-align: center; background: var(--ink); color: var(--paper); }
"""

# Row 0 of `rows` is the mean over layers, row l + 1 is layer l, in tenths of a percent.
TOKEN_SCRIPT = """
const slider = document.getElementById("layer"), spans = document.querySelectorAll("#text span");
function show() {
  const row = rows[slider.value], single = slider.value > 0;
  const [low, high] = single ? [floor, 1000] : scale;
  const name = single ? "layer " + (slider.value - 1) : "all layers";
  slider.setAttribute("aria-valuetext", name);
  document.getElementById("name").value = name;
  document.getElementById("low").textContent = (single ? "" : "≤ ") + Math.round(low / 10) + "%";
  document.getElementById("high").textContent = (single ? "" : "≥ ") + Math.round(high / 10) + "%";
  spans.forEach((span, i) => {
    span.style.setProperty("--share", high > low ? Math.min(1, Math.max(0, (row[i] - low) / (high - low))) : 1);
    span.title = single ? row[i] / 10 + "% of the MLP width in layer " + (slider.value - 1) : titles[i];
  });
}
const titles = Array.from(spans, span => span.title);
slider.addEventListener("input", show);
show();
"""


def tokens_page(pieces: list[str], shares_LT: torch.Tensor, dial: str) -> str:
    """
    A self-contained page that shows a text coloured by difficulty, on average and layer by layer.

    Without scripts it shows the average. The tokens are the last thing on the page, so their tab stops are in nobody's way.
    """
    means_T = shares_LT.mean(0)
    low, high = _scale(means_T)
    rows = (1000 * torch.cat([means_T[None], shares_LT])).round().int().tolist()
    layers = len(shares_LT)
    spans = []
    for piece, mean, place, share_L in zip(pieces, means_T.tolist(), _colours(means_T), shares_LT.T):
        title = f"{mean:.1%} of the MLP width, mean over {layers} layers ({share_L.min():.0%} to {share_L.max():.0%})"
        kind = ' class="newline"' if piece.endswith("\n") and not piece.strip() else ""
        spans.append(f'<span tabindex="0"{kind} style="--share:{place:.3f}" title="{title}">{html.escape(piece)}</span>')
    body = f"""
<h1>{_summary(means_T)}</h1>
<p class="faint">{len(pieces)} tokens at {dial}. Point at a token, tap it or tab to it for its numbers.</p>
<div class="bar">
<label>Layers <input id="layer" type="range" min="0" max="{layers}" value="0"><output id="name">all layers</output></label>
<div>easy <b id="low">≤ {low:.0%}</b><i></i><b id="high">≥ {high:.0%}</b> hard</div>
</div>
<div id="text" dir="auto">{"".join(spans)}</div>
<script>
const rows = {json.dumps(rows, separators=(",", ":"))}, scale = [{1000 * low:.1f}, {1000 * high:.1f}],
  floor = {min(map(min, rows[1:]))};{TOKEN_SCRIPT}</script>"""
    return _page("Token difficulty", STYLE + TOKEN_STYLE, body)


def _page(title, style, body):
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title><style>{style}</style></head>\n'
        f"<body>{body}\n</body></html>\n"
    )


INDEX_STYLE = """
img { width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 6px; }
figure { margin: 1.5rem 0; }
figcaption { color: var(--faint); font-size: .9rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .75rem .35rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: bold; padding: 1rem 0 .25rem; }
.baseline td { color: var(--faint); border-bottom-style: dotted; }
.baseline td:first-child { padding-left: 1.25rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; font-size: .9rem; }
dt { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; }
"""

CAPTIONS = {
    "frontier.png": "Perplexity against the share of MLP width that tokens use; bars are 95% intervals.",
    "experts.png": "Share of the tokens that each expert takes in each layer, and the mean width of the layer.",
    "tokens.png": "A text coloured by the share of MLP width that its tokens take.",
}


def _index_page(images, evaluations, facts):
    """One page with the pictures, the table of evaluations and the facts of the folder."""
    title = f"{Path(facts['folder']).resolve().name}: report"
    pictures = "\n".join(
        f'<figure><img src="data:image/png;base64,{image}" alt="{name[:-4]}"><figcaption>{CAPTIONS[name]}</figcaption></figure>'
        for name, image in images.items()
    )
    pictures += '\n<p><a href="tokens.html">The text, layer by layer</a></p>'
    tables = "\n".join(_table(text, entries) for text, entries in _by_text(evaluations).items())
    known = {name: value for name, value in facts.items() if name != "results" and value not in (None, {}, [])}
    rows = "\n".join(f"<dt>{html.escape(name.replace('_', ' '))}</dt><dd>{_fact(value)}</dd>" for name, value in known.items())
    tables = f"<h2>Evaluations</h2>\n{tables}\n<h2>The model</h2>\n<dl>\n{rows}\n</dl>"
    return _page(title, STYLE + INDEX_STYLE, f"<h1>{html.escape(title)}</h1>\n{pictures}\n{tables}")


def _table(text, entries):
    head = ("Setting", "MLP width", "Active parameters", "Perplexity", "95% interval", "To dense", "Router right")
    rows = []
    for entry in sorted(entries, key=lambda entry: entry["mean_share"]):
        rows.append(_row(entry["setting"], entry))
        for kind, point in entry.get("baselines", {}).items():
            rows.append(_row(SERIES[kind][0].replace("\n", " ") if kind in SERIES else kind, point, "baseline"))
    header = "".join(f'<th scope="col">{name}</th>' for name in head)
    caption = f"{html.escape(text)}, {entries[0]['tokens']:,} tokens"
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{html.escape(text)}"><table><caption>{caption}</caption>\n'
        f"<tr>{header}</tr>\n" + "\n".join(rows) + "\n</table></div>"
    )


def _row(name, point, kind="setting"):
    low, high = point["perplexity_interval"]
    ratio, agreement, active = (point.get(key) for key in ("ratio_to_dense", "router_agreement", "active_parameters"))
    cells = (
        html.escape(name),
        f"{point['mean_share']:.1%}",
        "" if active is None else f"{active / 1e6:,.1f} M",
        f"{point['perplexity']:.2f}",
        "" if math.isnan(low) else f"{low:.2f} to {high:.2f}",
        "" if ratio is None else f"{ratio:.3f}×",
        "" if agreement is None else f"{agreement:.0%}",
    )
    return f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _fact(value):
    """A short fact as it is, a long one folded."""
    if isinstance(value, dict | list) and len(json.dumps(value)) > 100:
        return f"<details><summary>show</summary><pre>{html.escape(json.dumps(value, indent=2))}</pre></details>"
    return html.escape(value if isinstance(value, str) else json.dumps(value))
