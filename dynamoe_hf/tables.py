# SPDX-License-Identifier: Apache-2.0
"""The words and tables for evaluations and timings, shared by the report, the model card and the command line."""

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, select_autoescape


# Baselines of `evaluate_model`; the line break is for figures.
BASELINE_LABELS = {"static": "one width\nfor all tokens", "random": "random\nrouting", "label": "true difficulty\n(oracle)"}


def render_template(file: str, **values) -> str:
    """Render a file of `templates/`. Values are escaped in `.html` files, and not in `.md` files."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(("html",)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    functions = (shown, interval, perplexity_text, ratio_text, time_text, text_name, setting_label, baseline_label)
    templates.globals |= {function.__name__: function for function in functions}
    return templates.get_template(file).render(values)


def shown(value, pattern: str = "{}", bounds=None) -> str:
    """A formatted number with its interval, `1.050 (1.010 to 1.090)`; "not measured" for None and for Jinja's undefined."""
    if not isinstance(value, int | float | str):
        return "not measured"
    between = interval(bounds, pattern)
    return pattern.format(value) + (f" ({between})" if between else "")


def interval(bounds, pattern: str = "{:.2f}") -> str:
    """`14.1 to 15.7`; empty if there are no bounds or they are NaN, as those of a single block are."""
    return " to ".join(pattern.format(bound).strip() for bound in bounds) if bounds and not math.isnan(bounds[0]) else ""


def perplexity_text(point: dict, width: int = 0) -> str:
    """Perplexity and its 95% interval; the number is padded to `width` characters."""
    return shown(point.get("perplexity"), f"{{:{width}.2f}}" if width else "{:.2f}", point.get("perplexity_interval"))


def ratio_text(point: dict) -> str:
    """Ratio of the perplexity to the dense base's, and its 95% interval."""
    return shown(point.get("ratio_to_dense"), "{:.3f}", point.get("ratio_interval"))


def time_text(timing: dict, detail: str, pattern: str = "{}") -> str:
    """Time relative to the dense model with its range, and one more field of the timing: `0.57 (0.55 to 0.58), 512 tokens`."""
    if not timing:
        return shown(None)
    return f"{shown(timing['ratio'], '{:.2f}', timing['range'])}, {shown(timing[detail], pattern)}"


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
    groups = {}
    for entry in evaluations:
        groups.setdefault(text_name(entry["text"]), []).append(entry)
    return groups


def cheapest_first(points: list[dict]) -> list[dict]:
    """Evaluations or baselines by rising share of MLP width."""
    return sorted(points, key=lambda point: point["mean_share"])


def same_sensitivity(a: float | None, b: float | None) -> bool:
    """Whether two sensitivities are equal up to the rounding of JSON; None equals nothing."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9)


def budget_of(entry: dict, budgets: dict[str, float]) -> str | None:
    """The budget whose sensitivity an entry was evaluated at. The name of its setting may be that of an older calibration."""
    matches = (budget for budget, theta in budgets.items() if same_sensitivity(entry.get("sensitivity"), theta))
    return next(matches, None)


def task_metrics(entry: dict) -> dict[str, dict[str, float]]:
    """Metrics of an evaluation's lm-eval tasks, `acc,none` as `acc`, without standard errors and counts."""
    return {
        task: {key.split(",")[0]: value for key, value in metrics.items() if "," in key and "stderr" not in key}
        for task, metrics in entry.get("tasks", {}).items()
    }


def join_records(evaluations: list[dict], budgets: dict[str, float], benchmark: dict) -> list[dict]:
    """
    One row for each evaluation, then one for each calibrated budget without an evaluation.

    Each row is its entry of `results.json` with `budget` (a float or None), `tasks`, and the timings `decode` (of one
    sequence) and `prefill` of `benchmark.json` that were made at the same setting, empty where there is none.
    """
    rows = [{**entry, "budget": budget_of(entry, budgets)} for entry in evaluations]
    evaluated = {row["budget"] for row in rows}
    rows += [
        {"setting": f"budget {budget}", "budget": budget, "sensitivity": theta}
        for budget, theta in budgets.items()
        if budget not in evaluated
    ]
    timings = {
        "decode": [timing for timing in benchmark.get("decode", []) if timing["batch"] == 1],
        "prefill": benchmark.get("prefill", []),
    }
    for row in rows:
        row["budget"] = None if row["budget"] is None else float(row["budget"])
        row["tasks"] = task_metrics(row)
        for kind, entries in timings.items():
            row[kind] = next((timing for timing in entries if timing["setting"] == row["setting"]), {})
    return rows


def evaluation_table(entries: list[dict]) -> str:
    """The evaluations as a text table for a terminal, each with its baselines and tasks below it."""
    lines = [f"{'setting':20} {'MLP share':>9} {'active':>9} {'perplexity (95%)':>26} {'to dense (95%)':>24} {'agreement':>9}"]
    for entry in entries:
        agreement = "" if entry["router_agreement"] is None else f"{entry['router_agreement']:.0%}"
        lines.append(
            f"{entry['setting']:20} {entry['mean_share']:9.1%} {entry['active_parameters'] / 1e6:7.1f} M "
            f"{perplexity_text(entry, width=8)} {ratio_text(entry):>24} {agreement:>9}"
        )
        for kind, point in entry["baselines"].items():
            ratio = point.get("ratio_to_dense", math.nan)
            lines.append(f"  {kind:18} {point['mean_share']:9.1%} {'':9} {point['perplexity']:8.2f}   ratio {ratio:.3f}")
        for task, metrics in entry.get("tasks", {}).items():
            lines.append(f"  {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
    return "\n".join(lines)


def demo_table(rows: list[dict]) -> str:
    """
    The dense perplexity and a Markdown table with one line for each budget.

    Args:
        rows: evaluations with `budget`, `tokens_per_second`, `speed_ratio` and `baseline_ratios`, as `run_demo` makes them.
    """
    columns = ("budget", "mean MLP share", "active parameters", "perplexity", "ratio to dense (95%)", "static prefix",
               "random routes", "tokens/s", "to dense")  # fmt: skip
    table = [columns]
    for row in rows:
        ratios = row["baseline_ratios"]
        table.append((
            f"{row['budget']:.0%}", f"{row['mean_share']:.1%}", f"{row['active_parameters'] / 1e6:.1f} M",
            f"{row['perplexity']:.2f}", ratio_text(row), *(f"{ratios[k]:.3f}" if k in ratios else "" for k in ("static", "random")),
            f"{row['tokens_per_second']:.1f}", f"{row['speed_ratio']:.2f}x",
        ))  # fmt: skip
    head, *body = (f"| {' | '.join(cells)} |" for cells in table)
    dense = f"\nDense perplexity on held-out topics: {rows[0]['dense_perplexity']:.2f} ({rows[0]['tokens']:,} tokens)\n"
    return "\n".join([dense, head, "|---" * len(columns) + "|", *body])
