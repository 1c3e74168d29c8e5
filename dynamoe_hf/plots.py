# SPDX-License-Identifier: Apache-2.0
"""Figures of a report: quality against compute, use of experts by layer, and a text coloured by difficulty."""

import math
import re
import textwrap
import unicodedata
from collections import namedtuple
from itertools import groupby, product
from typing import NamedTuple

import torch

from .tables import BASELINE_LABELS, by_text


WIDTH = 9  # inches, of every figure
SHARED = " (shared)"  # in the names of MLPs (`DynaMoEConfig.mlp_names`)
TEXT_LINES = 60  # of a text that `draw_tokens` shows; the HTML page has all of it
INK, FAINT, PAPER = "#1b1f24", "#66707b", "#ffffff"
EASY, HARD = "#f4f8fe", "#428ce4"  # black text is legible on both
# Colour, marker and line of each series. The colours are Okabe and Ito's, which colour-blind readers can distinguish.
SERIES = {
    "router": ("#0072B2", "o", "-"),
    "static": ("#D55E00", "s", "--"),
    "random": ("#A6608A", "^", "-."),
    "label": ("#009E73", "D", ":"),
}


def new_figure(width: float, height: float):
    """A `Figure` in inches that pyplot, which belongs to the caller, does not know. `ValueError` if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(f"Pictures need matplotlib ({error}). Install it: `pip install 'dynamoe_hf[report]'`.") from error
    return Figure(figsize=(width, height))


def _note(axis, text, anchor, offset, **style):
    """Text at an anchor in fractions of the axis, moved by an offset in points."""
    style = {"xycoords": "axes fraction", "color": FAINT, "fontsize": 9.5, **style}
    axis.annotate(text, anchor, xytext=offset, textcoords="offset points", **style)


def _cheapest_first(points):
    return sorted(points, key=lambda point: point["mean_share"])


class _Panel(NamedTuple):
    """What one panel of the frontier shows."""

    series: dict[str, list[dict]]  # points of each line, cheapest first
    value: str  # key of what is drawn: `ratio_to_dense`, or `perplexity` if a point has no ratio
    interval: str  # key of its interval
    unit: str
    dense: float | None  # value of the dense base, if it was evaluated
    inches: float  # width of the axis


def _panel(entries, inches):
    series = {"router": [entry for entry in entries if "sensitivity" in entry]}
    for kind in BASELINE_LABELS:
        series[kind] = [entry["baselines"][kind] for entry in entries if kind in entry.get("baselines", {})]
    # A forced expert is one width for all tokens too.
    series["static"] += [entry for entry in entries if "sensitivity" not in entry]
    series = {kind: _cheapest_first(points) for kind, points in series.items() if points}
    if all("ratio_to_dense" in point for points in series.values() for point in points):
        return _Panel(series, "ratio_to_dense", "ratio_interval", "×", 1.0, inches)
    dense = next((entry["dense_perplexity"] for entry in entries if "dense_perplexity" in entry), None)
    return _Panel(series, "perplexity", "perplexity_interval", "", dense, inches)


def draw_frontier(evaluations: list[dict]):
    """Quality against compute, one panel for each text: a matplotlib `Figure`."""
    groups = by_text(evaluations)
    columns = min(2, len(groups))
    rows = math.ceil(len(groups) / columns)
    head, body, foot = 0.9 if columns == 1 else 1.35, 3.4, 0.6  # inches of each row of panels
    height = rows * (head + body + foot)
    figure = new_figure(WIDTH, height)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=0.07, right=0.98, bottom=foot / height, top=1 - head / height, wspace=0.18, hspace=(head + foot) / body
    )
    for axis, (text, entries) in zip(axes.flat, groups.items()):
        panel = _panel(entries, inches=8.2 if columns == 1 else 3.75)
        _draw_points(axis, panel)
        _label_lines(axis, panel, _set_limits(axis, panel))
        shown = (text if len(text) < 32 else f"{text[:30]}…").replace("$", r"\$")  # which begins a formula
        _style_panel(axis, panel, f"{shown}, {entries[0]['tokens']:,} tokens")
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    return figure


def _draw_points(axis, panel):
    """The lines with their points, and the dense base as a horizontal line."""
    if panel.dense is not None:
        axis.axhline(panel.dense, color=FAINT, linewidth=1, zorder=1)
        _note(axis, "dense", (1, panel.dense), (-4, -3), xycoords=("axes fraction", "data"), ha="right", va="top")
    for kind, points in panel.series.items():
        colour, marker, line = SERIES[kind]
        main = kind == "router"
        x, y = ([scale * point[key] for point in points] for key, scale in (("mean_share", 100), (panel.value, 1)))
        # Distances down and up; NaN bounds, as of a single block, give 0.
        error = [[max(0.0, abs(bound - v)) for v, bound in zip(y, ends)] for ends in zip(*(p[panel.interval] for p in points))]
        axis.errorbar(x, y, error if main else None, color=colour, marker=marker, linestyle=line, capsize=3,
                      linewidth=2.4 if main else 1.5, markersize=7 if main else 5, zorder=4 if main else 3)  # fmt: skip


def _set_limits(axis, panel):
    """Limits and ticks of both axes. The fraction of the axis left of all points, which is for labels, is returned."""
    points = [point for points in panel.series.values() for point in points]
    values = [point[panel.value] for point in points] + ([] if panel.dense is None else [panel.dense])
    if max(values) > 4 * min(values):
        axis.set_yscale("log")
        axis.set_yticks([tens * digit for tens in (1, 10, 100, 1000) for digit in (1, 1.5, 2, 3, 5, 7)])
        axis.minorticks_off()
        axis.set_ylim(min(values) * 0.85, max(values) * 1.15)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}{panel.unit}")
    axis.margins(y=0.12)

    left, right = (100 * end(point["mean_share"] for point in points) for end in (min, max))
    gutter = 1.35 / panel.inches
    width = max(right - left, 10) / (0.96 - gutter)
    axis.set_xlim(left - gutter * width, left + (1 - gutter) * width)
    ticks = [tick for tick in axis.get_xticks() if left - 1 <= tick <= right + 1]
    axis.set_xticks(ticks, [f"{tick:g}%" for tick in ticks])
    return gutter


def _label_lines(axis, panel, gutter):
    """The label of each line beside its leftmost point, where the lines are furthest apart."""
    to_axes = axis.transScale + axis.transLimits
    left = 100 * min(points[0]["mean_share"] for points in panel.series.values())
    ends = sorted((to_axes.transform((left, points[0][panel.value]))[1], kind) for kind, points in panel.series.items())
    for (_, kind), height in zip(ends, _spread([height for height, _ in ends], 0.115)):
        label, colour = BASELINE_LABELS.get(kind, kind), SERIES[kind][0]
        first = panel.series[kind][0]
        x, y = to_axes.transform((100 * first["mean_share"], first[panel.value]))
        start = gutter - 0.2 / panel.inches
        line = [start, x - 0.1 / panel.inches], [height, y]
        axis.plot(*line, transform=axis.transAxes, color=colour, linewidth=0.8, alpha=0.6)
        axis.text(start - 0.06 / panel.inches, height, label, transform=axis.transAxes, color=colour, ha="right", va="center",
                  fontsize=10, linespacing=1.05, fontweight="bold" if kind == "router" else "normal",
                  bbox={"facecolor": PAPER, "linewidth": 0, "pad": 1})  # fmt: skip


def _spread(heights, gap):
    """Rising heights moved up until they are `gap` apart, then all moved down so that their mean is what it was."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    shift = (sum(placed) - sum(heights)) / len(heights)
    return [height - shift for height in placed]


def _style_panel(axis, panel, text):
    quality = "Perplexity against the dense model" if panel.unit else "Perplexity"
    subtitle = textwrap.fill(f"{text}. {quality}, lower is better.", int(15 * panel.inches))
    _note(axis, subtitle, (0, 1), (-18, 8))
    claim = textwrap.fill(_claim(panel), int(11 * panel.inches))
    _note(axis, claim, (0, 1), (-18, 26 + 13 * subtitle.count("\n")), color=INK, fontsize=11, fontweight="bold")
    axis.set_xlabel("Share of the MLPs' weights that a token reads, on average", color=FAINT, fontsize=9.5)
    axis.grid(axis="y", color="#e6e9ed", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(which="both", colors=FAINT, labelsize=9.5, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#c5cbd2")


def _claim(panel):
    """The result in words: the cheapest routed setting against one width for all tokens."""
    if "router" not in panel.series:
        return "Perplexity with one expert for all tokens"
    cheapest = panel.series["router"][0]
    static = cheapest.get("baselines", {}).get("static")
    against = " the dense" if panel.unit else ""
    claim = (
        f"{cheapest['mean_share']:.0%} of the MLPs' weights gives {cheapest[panel.value]:.2f}{panel.unit}{against} perplexity"
    )
    return claim + (f", one width for all tokens {static[panel.value]:.2f}{panel.unit}" if static else "")


def draw_experts(evaluations: list[dict], shares_LE: torch.Tensor, names: list[str]):
    """
    Use of experts by MLP as a heat map, at up to four settings on the first text: a matplotlib `Figure`. `shares_LE` has
    the width of each expert as a share of its own MLP, (L, E) float, and `names` what the MLPs are called (`DynaMoEConfig.mlp_names`).
    """
    entries = next(iter(by_text(evaluations).values()))
    routed = _cheapest_first(entry for entry in entries if "sensitivity" in entry)
    entries = [entry for entry in routed if entry["mean_share"] < 1] or entries
    entries = entries[:: math.ceil(len(entries) / 4)]
    layers, experts = shares_LE.shape
    height = 1.75 + 0.155 * max(layers, 6)
    figure = new_figure(WIDTH, height)
    axes = figure.subplots(1, len(entries), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.055, right=0.945, bottom=0.55 / height, top=1 - 1.2 / height, wspace=0.24)
    crowded = experts * len(entries) > 20
    for axis, entry in zip(axes, entries):
        _draw_heat_map(axis, torch.tensor(entry["expert_use"]), shares_LE, names, crowded)
        axis.set_title(entry["setting"], loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=5)
    _note(axes[0], "layer", (0, 1), (-6, 6), fontsize=9, ha="right")
    mean_L = (torch.tensor(entries[0]["expert_use"]) * shares_LE).sum(1)
    least, most = int(mean_L.argmin()), int(mean_L.argmax())
    claim = f"Layer {names[least]} gets by with {mean_L[least]:.0%} of its width, layer {names[most]} takes {mean_L[most]:.0%}"
    figure.text(0.02, 1 - 0.32 / height, f"{claim}, at {entries[0]['setting']}", fontsize=12, fontweight="bold", color=INK)
    subtitle = "Share of a layer's tokens that take each expert" + (", in percent" if crowded else "")
    subtitle += "; s: its shared expert" if any(SHARED in name for name in names) else ""
    figure.text(0.02, 1 - 0.62 / height, subtitle, fontsize=9.5, color=FAINT)
    return figure


def _draw_heat_map(axis, use_LE, shares_LE, names_L, crowded):
    """The use of experts of one setting, and the mean width of each MLP beside it. Where crowded, labels are left out."""
    layers, experts = shares_LE.shape
    axis.imshow(use_LE.tolist(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for layer, expert in product(range(layers), range(experts)):
        use = use_LE[layer, expert].item()
        label = f"{use:.0%}".rstrip("%" if crowded else "")
        axis.text(expert, layer, label, fontsize=7, ha="center", va="center", color=PAPER if use > 0.6 else INK)
    for layer, mean in enumerate((use_LE * shares_LE).sum(1).tolist()):
        _note(axis, f"{mean:.0%}", (experts - 0.5, layer), (5, 0), xycoords="data", fontsize=8, color=INK, va="center")
    _note(axis, "mean\nwidth", (1, 1), (5, 4), fontsize=8)
    same = bool((shares_LE == shares_LE[0]).all())
    names = [f"{share:.0%}" for share in shares_LE[0].tolist()] if same else [str(expert) for expert in range(experts)]
    labelled = range((experts - 1) % 2, experts, 2) if crowded else range(experts)  # always the last one
    axis.set_xticks(labelled, [names[expert] for expert in labelled])
    axis.set_xlabel("width of the expert" if same else "expert", fontsize=9, color=FAINT)
    rows = range(0, layers, 1 if layers <= 12 else 5)
    axis.set_yticks(rows, [names_L[row].replace(SHARED, "s") for row in rows])
    axis.tick_params(colors=FAINT, labelsize=9, length=0)
    axis.spines[:].set_visible(False)


# The shares at the ends of the scale, the place of each token between them in [0, 1], and a sentence about them.
ColourScale = namedtuple("ColourScale", "low high places summary")


def colour_scale(means_T: torch.Tensor) -> ColourScale:
    """
    The colour scale for mean shares of MLP width (T,). It ends at their quantiles 0.02 and 0.98, so that a few outliers, such
    as the first token, do not determine it.
    """
    low, high = torch.quantile(means_T, torch.tensor([0.02, 0.98])).tolist()
    summary = f"Easy tokens take {low:.0%} of the MLPs' weights, hard ones {high:.0%}, and the average {means_T.mean():.0%}"
    if high - low <= 0.001:
        low, summary = high - 0.001, f"Every token takes {means_T.mean():.0%} of the MLPs' weights"
    return ColourScale(low, high, ((means_T - low) / (high - low)).clamp(0, 1).tolist(), summary)


def draw_tokens(pieces: list[str], means_T: torch.Tensor, dial: str, columns: int = 92):
    """
    A text in T pieces, coloured by their mean share of MLP width (T,): a matplotlib `Figure`. `dial` names the setting in the caption,
    and a line has `columns` characters.
    """
    from matplotlib.colors import LinearSegmentedColormap

    scale = colour_scale(means_T)
    colours = LinearSegmentedColormap.from_list("difficulty", [EASY, HARD])
    cells = [cell for cell in _wrap(pieces, columns) if cell.line < TEXT_LINES]
    lines = cells[-1].line + 1
    margin, spacing, head, foot = 0.2, 0.215, 0.95, 0.15  # inches
    height = head + spacing * lines + foot
    figure = new_figure(WIDTH, height)
    axis = figure.add_axes((margin / WIDTH, foot / height, 1 - 2 * margin / WIDTH, spacing * lines / height))
    axis.set(xlim=(0, columns), ylim=(lines, 0))
    axis.axis("off")
    size = (WIDTH - 2 * margin) / columns * 72 / 0.602  # points: DejaVu Sans Mono, part of matplotlib, is 0.602 em wide
    _draw_cells(axis, cells, [colours(place) for place in scale.places], size)
    x = margin / WIDTH
    figure.text(x, 1 - 0.33 / height, scale.summary, fontsize=12, fontweight="bold", color=INK)
    figure.text(x, 1 - 0.66 / height, f"easy ≤ {scale.low:.0%}", fontsize=9.5, color=FAINT, va="center")
    strip = figure.add_axes((x + 0.095, 1 - 0.73 / height, 0.2, 0.14 / height))
    strip.imshow([[i / 99 for i in range(100)]], cmap=colours, aspect="auto")
    strip.axis("off")
    caption = f"hard ≥ {scale.high:.0%}     mean over all layers, {dial}"
    figure.text(x + 0.305, 1 - 0.66 / height, caption, fontsize=9.5, color=FAINT, va="center")
    return figure


# A character on a grid, the index of the part of the text that it is from, and its width in columns.
_Cell = namedtuple("_Cell", "line column piece character width")


def _draw_cells(axis, cells, colours, size):
    """A box for each run of a part's characters on a line, and the characters in it at `size` points."""
    from matplotlib.patches import Rectangle

    for (line, piece), cells_of_run in groupby(cells, key=lambda cell: (cell.line, cell.piece)):
        run = list(cells_of_run)
        start, end = run[0].column, run[-1].column + run[-1].width
        box = Rectangle((start + 0.04, line + 0.06), end - start - 0.08, 0.88, color=colours[piece], linewidth=0)
        axis.add_patch(box)
        for cell in run:
            if not cell.character.isspace():  # without `parse_math=False`, text between dollars becomes a formula
                faint = cell.character == "↵"
                axis.text(cell.column, line + 0.52, cell.character, family="DejaVu Sans Mono", fontsize=size, parse_math=False,
                          va="center_baseline", color=FAINT if faint else INK, alpha=0.5 if faint else 1)  # fmt: skip


def _wrap(pieces, columns):
    """Lay out the characters on a grid, with line breaks between words where possible: a list of `_Cell`."""
    owner = [index for index, piece in enumerate(pieces) for _ in piece]
    cells, line, column = [], 0, 0
    for word in re.finditer(r"\n|[^\S\n]+|\S+", "".join(pieces)):
        widths = [_columns(character) for character in word[0]]
        if column and not word[0].isspace() and column + sum(widths) > columns:
            line, column = line + 1, 0
        for position, (character, width) in enumerate(zip(word[0], widths), word.start()):
            if column + width > columns and character != "\n":
                line, column = line + 1, 0
            cells.append(_Cell(line, column, owner[position], "↵" if character == "\n" else character, width))
            line, column = (line + 1, 0) if character == "\n" else (line, column + width)
    return cells


def _columns(character):
    """Width of a character on a monospace grid."""
    if character == "\t":
        return 4
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
