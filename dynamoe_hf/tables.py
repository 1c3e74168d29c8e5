# SPDX-License-Identifier: Apache-2.0
"""The words and tables for evaluations and timings, shared by the report, the model card and the command line."""

import math
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape
from markupsafe import Markup


# Baselines of `evaluate_model`; the line break is for figures.
BASELINE_LABELS = {"static": "one width\nfor all tokens", "random": "random\nrouting", "label": "true difficulty\n(oracle)"}


def render_template(file: str, **values) -> str:
    """Render a file of `templates/`. Values are escaped, as HTML or as Markdown: names of files can hold either."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(("html", "md")),
        finalize=escaped_markdown if file.endswith(".md") else None,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    functions = (shown, interval, ratio_text, text_name, setting_label, baseline_label)
    templates.globals |= {function.__name__: function for function in functions}
    return templates.get_template(file).render(values)


def escaped_markdown(value):
    """A string as Markdown shows it, on one line, without markup of its own; anything else, and what is marked as safe, as it is."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", re.sub(r"\s*[\r\n]\s*", " ", value))
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def shown(value, pattern: str = "{}", bounds=None) -> str:
    """A formatted number with its interval, `1.050 (1.010 to 1.090)`; "not measured" for None and for Jinja's undefined."""
    if not isinstance(value, int | float | str):
        return "not measured"
    between = interval(bounds, pattern)
    return pattern.format(value) + (f" ({between})" if between else "")


def interval(bounds, pattern: str = "{:.2f}") -> str:
    """`14.1 to 15.7`; empty if there are no bounds or they are NaN, as those of a single block are."""
    return " to ".join(pattern.format(bound) for bound in bounds) if bounds and not math.isnan(bounds[0]) else ""


def ratio_text(point: dict) -> str:
    """Ratio of the perplexity to the dense base's, and its 95% interval."""
    return shown(point.get("ratio_to_dense"), "{:.3f}", point.get("ratio_interval"))


def text_name(text: str | list[str]) -> str:
    """The name of a text or base model without the folders of the machine that it was on."""
    if isinstance(text, str):
        return Path(text).name if text.startswith(("/", ".", "~")) else text
    return ", ".join(Path(path).name for path in text)


def setting_label(budget: float | None) -> str:
    """`budget 0.5`, as evaluations and timings name it; `the dial` for a variant without a budget of its own."""
    return "the dial" if budget is None else f"budget {budget:g}"


def baseline_label(kind: str) -> str:
    """The label of a baseline on one line."""
    return BASELINE_LABELS.get(kind, kind).replace("\n", " ")


def by_text(evaluations: list[dict]) -> dict[str, list[dict]]:
    """Evaluations grouped by the name of their text, in order of appearance."""
    groups: dict[str, list[dict]] = {}
    for entry in evaluations:
        groups.setdefault(text_name(entry["text"]), []).append(entry)
    return groups


def same_sensitivity(a: float | None, b: float | None) -> bool:
    """Whether two sensitivities are equal up to the rounding of JSON; None equals nothing."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9)


def join_records(evaluations: list[dict], budgets: dict[str, float], benchmark: dict) -> list[dict]:
    """
    One row for each entry of `results.json`, then one for each calibrated budget that was not evaluated.

    A row is the entry with its `budget` (None for other settings), its `tasks` as {task: {metric: value}} without standard
    errors and counts, and the timings `decode` (of one sequence), `int8` and `prefill` at the same setting, {} if there is none.
    """
    calibrated = {float(budget): theta for budget, theta in budgets.items()}

    def budget_of(entry):  # by sensitivity, since the name of the setting may be from an older calibration
        return next((b for b, theta in calibrated.items() if same_sensitivity(entry.get("sensitivity"), theta)), None)

    rows = [{**entry, "budget": budget_of(entry)} for entry in evaluations]
    missing = calibrated.keys() - {row["budget"] for row in rows}
    rows += [{"setting": setting_label(b), "budget": b, "sensitivity": calibrated[b]} for b in sorted(missing)]
    timings = {kind: benchmark.get(kind, []) for kind in ("decode", "int8", "prefill")}
    timings["decode"] = [timing for timing in timings["decode"] if timing["batch"] == 1]
    for row in rows:
        row |= {kind: next((t for t in all_t if t["setting"] == row["setting"]), {}) for kind, all_t in timings.items()}
        row["tasks"] = {
            task: {key.split(",")[0]: value for key, value in metrics.items() if "," in key and "stderr" not in key}
            for task, metrics in row.get("tasks", {}).items()
        }
    return rows


def evaluation_table(entries: list[dict]) -> str:
    """The evaluations as a text table for a terminal, each with its baselines and tasks below it."""
    lines = [
        f"{'setting':20} {'MLP share':>9} {'width':>6} {'active':>9} {'perplexity (95%)':>26} {'to dense (95%)':>24} {'agreement':>9}"
    ]
    for entry in entries:
        agreement = "" if entry["router_agreement"] is None else f"{entry['router_agreement']:.0%}"
        lines.append(
            f"{entry['setting']:20} {entry['mean_share']:9.1%} {entry.get('mean_width', entry['mean_share']):6.1%} "
            f"{entry['active_parameters'] / 1e6:7.1f} M "
            f"{entry['perplexity']:8.2f} ({interval(entry['perplexity_interval'])}) {ratio_text(entry):>24} {agreement:>9}"
        )
        for kind, point in entry["baselines"].items():
            ratio = point.get("ratio_to_dense", math.nan)
            lines.append(f"  {kind:18} {point['mean_share']:9.1%} {'':16} {point['perplexity']:8.2f}   ratio {ratio:.3f}")
        for task, metrics in entry.get("tasks", {}).items():
            lines.append(f"  {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return "\n".join(lines)


def demo_table(rows: list[dict]) -> str:
    """
    The dense perplexity, and a Markdown table with one line for each budget.

    Args:
        rows: evaluations with `budget`, `tokens_per_second`, `speed_ratio` and `baseline_ratios`, as `run_demo` makes them.
    """
    lines = [
        f"\nDense perplexity on held-out topics: {rows[0]['dense_perplexity']:.2f} ({rows[0]['tokens']:,} tokens)\n",
        "| budget | mean MLP share | active parameters | perplexity | ratio to dense (95%) | static prefix | random routes "
        "| tokens/s, int8 | to dense |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        ratios = {kind: f"{ratio:.3f}" for kind, ratio in row["baseline_ratios"].items()}
        lines.append(
            f"| {row['budget']:.0%} | {row['mean_share']:.1%} | {row['active_parameters'] / 1e6:.1f} M "
            f"| {row['perplexity']:.2f} | {ratio_text(row)} | {ratios.get('static', '')} | {ratios.get('random', '')} "
            f"| {row['tokens_per_second']:.1f} | {row['speed_ratio']:.2f}x |"
        )
    return "\n".join(lines)
