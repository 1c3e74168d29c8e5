# SPDX-License-Identifier: Apache-2.0
"""The model card of a folder: every number in it is read from the folder's JSON files, or the card says "not measured"."""

import hashlib
import math
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

from ._version import __version__
from .folder import BENCHMARK, inspect_folder, read_json


TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TAGS = ("dynamoe", "dynamic-moe", "conditional-computation")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Variant(NamedTuple):
    """One published setting of the dial and where it lies; without a budget it is the dial itself, as the folder has it."""

    repo: str
    sensitivity: float
    budget: float | None = None
    revision: str = "main"


def render_card(
    folder: str | Path,
    variant: Variant | None = None,
    family: Sequence[Variant] = (),
    base_model: str | None = None,
    local_files_only: bool = False,
    name: str | None = None,
) -> ModelCard:
    """
    The card of a model folder or of one published variant of it. A checkpoint of a run that is not over has one too.

    Args:
        folder: model folder, on disk.
        variant: what the card stands beside on the Hub; by default the folder itself, loaded from where one stands.
        family: all published variants, to link them.
        base_model: Hub id of the dense base; by default the one that was converted, if the Hub or the cache knows it.
        local_files_only: ask no network for the base's own card, which has the license and the languages.
        name: of the model, where neither the folder nor the variant has it: a folder that is still being written.

    Raises:
        ValueError: the folder holds no DynaMoE model.
    """
    folder = Path(folder)
    facts = inspect_folder(folder)
    variant = variant or Variant(".", facts["sensitivity"])
    base, base_data = _base_of(facts, base_model, local_files_only)
    evaluations = (facts["results"] or {}).get("evaluations", [])
    benchmark = read_json(folder / BENCHMARK) or {}
    name = name or (folder.resolve().name if variant.repo == "." else variant.repo.split("/")[-1])
    training = facts["training"] or {}
    # A streamed dataset is a name; text files are a list, and the default text is no dataset of the Hub.
    dataset = training.get("text") if isinstance(training.get("text"), str) else ""
    dataset = dataset.split(":")[0] if HUB_ID.fullmatch(dataset.split(":")[0]) else None
    config = read_json(folder / "config.json")
    data = ModelCardData(
        base_model=base,
        base_model_relation=base and ("quantized" if "quantization_config" in config else "finetune"),
        library_name="transformers",
        pipeline_tag="text-generation",
        license=base_data.get("license"),
        license_name=base_data.get("license_name"),
        license_link=_license_link(base, base_data.get("license_link")),
        language=base_data.get("language"),
        datasets=dataset and [dataset],
        tags=[*TAGS, *_dial_tags(variant, family)],
        model_name=name,
        eval_results=_eval_results(evaluations, facts["budgets"]) or None,
    )
    rows = _rows(evaluations, facts, benchmark)
    checkpoint = None if training else read_json(folder / "trainer_state.json")
    logged = [entry for entry in (checkpoint or {}).get("log_history", training.get("history", [])) if "loss" in entry]
    return ModelCard.from_template(
        data, template_path=str(TEMPLATE), name=name, variant=variant, base=base, facts=facts, training=training,
        checkpoint=checkpoint, losses={k: v for k, v in (logged or [{}])[-1].items() if k.endswith("loss")},
        family=[member for member in family if member != variant], budgets=sorted(facts["budgets"], key=float),
        own=next((row for row in rows if "perplexity" in row and _same(row.get("sensitivity"), variant.sensitivity)), {}),
        rows=rows, compared=[row for row in rows if row.get("baselines")], machine=benchmark.get("machine", {}),
        texts=list(dict.fromkeys(_named(entry["text"]) for entry in evaluations)),
        pictures={path.stem for path in (folder / "report").glob("*.png")}, commands=_commands(facts),
        code={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.py"))},
        shown=_shown, named=_named, package_version=__version__,
    )  # fmt: skip


def _base_of(facts, base_model, local_files_only) -> tuple[str | None, dict]:
    """Hub id of the dense base, None where there is none, and the metadata of its card."""
    base = base_model or facts["base"]
    if base is None:
        return None, {}
    if base_model is None and Path(base).is_dir():
        readme = Path(base) / "README.md"
        return None, _metadata(readme) if readme.is_file() else {}
    if not HUB_ID.fullmatch(base):
        return None, {}
    if not local_files_only:
        try:  # not a download, which would retry for half a minute where there is no network
            return base, (HfApi().model_info(base, timeout=10).card_data or ModelCardData()).to_dict()
        except (RepositoryNotFoundError, HFValidationError):
            return base_model, {}
        except (HTTPError, ConnectionError):  # nobody to ask
            pass
    # The trap: a folder of the machine that converted it, such as runs/base, looks like an id. So the cache has to know it.
    readme, config = (try_to_load_from_cache(base, name) for name in ("README.md", "config.json"))
    known = base_model or (base if isinstance(readme or config, str) else None)
    return known, _metadata(readme) if isinstance(readme, str) else {}


def _metadata(readme) -> dict:
    return ModelCard(Path(readme).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()


def _license_link(base, link):
    """A link that was relative to the base's repository, made absolute."""
    return link if not link or "://" in link or base is None else f"https://huggingface.co/{base}/blob/main/{link}"


def _dial_tags(variant, family):
    """What the Hub can filter by. It reads the tags of `main`, so there they name every variant that is a branch."""
    members = [variant, *(member for member in family if member.repo == variant.repo and variant.revision == "main")]
    tags = [f"sensitivity-{member.sensitivity:.2f}" for member in members]
    tags += [f"mlp-share-{member.budget:.2f}" for member in members if member.budget is not None]
    return list(dict.fromkeys(tags))


def _eval_results(evaluations, budgets) -> list[EvalResult]:
    """A `model-index` entry for every result, each with the setting of the dial that it was measured at."""
    results = []
    for entry in evaluations:
        setting = {"setting": entry["setting"], "mean_mlp_share": entry["mean_share"]}
        for name in ("sensitivity", "force_expert"):
            if name in entry:
                setting[name] = entry[name]
        if (budget := _budget_of(entry, budgets)) is not None:
            setting["variant"] = budget

        def add(dataset, metric, value, entry=entry, setting=setting):
            kind = re.sub(r"[^\w.-]+", "-", dataset).strip("-")
            results.append(EvalResult(
                task_type="text-generation", task_name="Text generation", dataset_type=kind, dataset_name=dataset,
                metric_type=metric, metric_value=value, metric_name=f"{metric} at {entry['setting']}", metric_args=setting,
            ))  # fmt: skip

        add(_named(entry["text"]), "perplexity", entry["perplexity"])
        for task, metrics in _tasks(entry).items():
            for metric, value in metrics.items():
                add(task, metric, value)
    return results


def _tasks(entry) -> dict[str, dict[str, float]]:
    """Metrics of the lm-eval tasks of an evaluation, `acc,none` as `acc`, without standard errors and counts."""
    return {
        task: {key.split(",")[0]: value for key, value in metrics.items() if "," in key and "stderr" not in key}
        for task, metrics in entry.get("tasks", {}).items()
    }


def _rows(evaluations, facts, benchmark) -> list[dict[str, Any]]:
    """Rows of the table: every evaluation, then the calibrated budgets that have none, and the speed of each."""
    rows = []
    for entry in evaluations:
        budget = _budget_of(entry, facts["budgets"])
        rows.append({**entry, "budget": None if budget is None else float(budget), "tasks": _tasks(entry)})
    evaluated = {row["budget"] for row in rows}
    for budget, sensitivity in facts["budgets"].items():
        if float(budget) not in evaluated:
            rows.append({"setting": f"budget {budget}", "budget": float(budget), "sensitivity": sensitivity, "tasks": {}})
    timed = [entry for entry in benchmark.get("decode", []) if entry["batch"] == 1]
    for row in rows:
        for name, entries in (("decode", timed), ("prefill", benchmark.get("prefill", []))):
            row[name] = next((entry for entry in entries if entry["setting"] == row["setting"]), {})
    return rows


def _budget_of(entry, budgets) -> str | None:
    """The budget whose sensitivity an evaluation was made at. Names do not count: a later calibration moves them."""
    return next((budget for budget, sensitivity in budgets.items() if _same(entry.get("sensitivity"), sensitivity)), None)


def _same(a, b):
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-9)


def _commands(facts) -> list[str]:
    """The commands that make this folder again, as far as its records tell."""
    conversion, training, calibration = facts["conversion"], facts["training"], facts["calibration"]
    commands = []

    def add(stage, *folders, text=None, **options):
        files = [] if text is None or isinstance(text, str) else ["--text", *(Path(path).name for path in text)]
        flags = []
        for name, value in options.items():
            if value is not None:
                flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [f"{value}"])]
        commands.append(shlex.join(["dynamoe", stage, *folders, *files, *flags]))

    if conversion:
        read = conversion["calibration"]
        widths = [f"{width / facts['mlp_width']:g}" for width in facts["expert_widths"] if isinstance(width, int)]
        add("convert", _named(conversion["base"]), "converted", text=read["text"], widths=",".join(widths) or None,
            importance=conversion["importance"], similarity=facts["similarity"], **{"router-type": facts["router_type"],
            "max-tokens": read["tokens"], "block-size": read["block_size"], "seed": conversion["seed"]})  # fmt: skip
    stages = [*training.get("earlier", []), training] if training else []
    folders = ["converted", *(f"trained-{index + 1}" for index in range(len(stages) - 1)), "trained"]
    for stage, source, out in zip(stages, folders, folders[1:]):
        settings = {"choice_share": 0.0, **stage["settings"]}  # records of before routers learned by choosing do not name it
        bf16 = ["--bf16"] if settings.pop("bf16") else []
        dataset = stage["text"] if stage.get("distinct_tokens") is None and isinstance(stage["text"], str) else None
        settings = {name.replace("_", "-"): value for name, value in settings.items()}
        add("train", source, out, *bf16, text=stage["text"], dataset=dataset, **{"max-tokens": stage["tokens"]}, **settings)
    if calibration:
        add("calibrate", "trained", text=calibration["text"], budgets=",".join(calibration["budgets"]),
            **{"max-tokens": calibration["tokens"], "block-size": calibration.get("block_size")})  # fmt: skip
    budgets = {}  # of each text, as it was cut into blocks
    for entry in (facts["results"] or {"evaluations": []})["evaluations"]:
        if entry["setting"].startswith("budget "):
            text = entry["text"] if isinstance(entry["text"], str) else tuple(entry["text"])
            budgets.setdefault((text, entry.get("block_size"), entry["tokens"]), {})[entry["setting"].split()[1]] = None
    for (text, block_size, tokens), names in budgets.items():
        options = {"budget": ",".join(names), "base": conversion and _named(conversion["base"])}
        if block_size:  # each block's first token is not predicted
            options |= {"max-tokens": tokens // (block_size - 1) * block_size, "block-size": block_size}
        add("evaluate", "trained", text=text, **options)
    return commands


def _named(text) -> str:
    """A text or base as a card names it: files and folders without the paths of the machine they were on."""
    if isinstance(text, str):
        return Path(text).name if text.startswith(("/", ".", "~")) else text
    return ", ".join(Path(path).name for path in text)


def _shown(value, pattern: str = "{}") -> str:
    """A number by a format pattern; "not measured" for None and for what a template finds no value of."""
    return pattern.format(value) if isinstance(value, int | float | str) else "not measured"
