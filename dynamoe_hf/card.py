# SPDX-License-Identifier: Apache-2.0
"""The model card of a folder: every number in it is read from the folder's JSON files, or the card says "not measured"."""

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

from ._version import __version__
from .disk import staging_of
from .folder import BENCHMARK, inspect_folder, load_dynamoe_config, new_files, read_json
from .integrity import digests_of
from .modeling import modeling_dynamoe
from .tables import by_text, join_records, render_template, same_sensitivity, text_name


TAGS = ("dynamoe", "dynamic-moe", "conditional-computation")
WAIT = 600.0  # seconds for another run that adds its records to the same folder
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Variant(NamedTuple):
    """A published default of the sensitivity and where it is. Without a budget it is the folder with its own default."""

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
    The card of a model folder or of one published variant of it. A checkpoint of an unfinished run has one too.

    Args:
        folder: model folder, on disk.
        variant: what the card describes on the Hub; by default the folder itself, to be loaded from the current directory.
        family: all published variants, to link them.
        base_model: Hub id of the dense base; by default the one that was converted, if the Hub or the cache knows it.
        local_files_only: do not ask the Hub for the base's own card, from which license and languages come.
        name: title of the card, where the folder's name is not the final one.

    Raises:
        ValueError: the folder holds no DynaMoE model.
    """
    folder = Path(folder)
    facts = inspect_folder(folder)
    variant = variant or Variant(".", facts["sensitivity"])
    name = name or (folder.resolve().name if variant.repo == "." else variant.repo.split("/")[-1])
    base, base_data = _base_of(facts, base_model, local_files_only)
    evaluations = (facts["results"] or {}).get("evaluations", [])
    benchmark = read_json(folder / BENCHMARK) or {}
    rows = join_records(evaluations, facts["budgets"], benchmark)
    link = base_data.get("license_link")
    if link and base and "://" not in link:
        link = f"https://huggingface.co/{base}/blob/main/{link}"
    quantized = "quantization_config" in (read_json(folder / "config.json") or {})
    data = ModelCardData(
        base_model=base, base_model_relation=base and ("quantized" if quantized else "finetune"), model_name=name,
        library_name="transformers", pipeline_tag="text-generation", tags=[*TAGS, *_dial_tags(variant, family)],
        license=base_data.get("license"), license_name=base_data.get("license_name"),
        license_link=link, language=base_data.get("language"),
        datasets=_datasets(facts["training"]), eval_results=_eval_results(rows) or None,
    )  # fmt: skip
    checkpoint = None if facts["training"] else read_json(folder / "trainer_state.json")
    stages = _stages(facts["training"])
    content = render_template(
        "model_card.md", card_data=data.to_yaml(), name=name, variant=variant, family=family, base=base, facts=facts,
        rows=rows, own=next((row for row in rows if same_sensitivity(row.get("sensitivity"), variant.sensitivity)), {}),
        machine=benchmark.get("machine"), texts=list(by_text(evaluations)), trained_on=_seen(stages, evaluations),
        baselines=list(dict.fromkeys(kind for row in rows for kind in row.get("baselines", {}))), stages=stages,
        history=(checkpoint or {}).get("log_history") or (facts["training"] or {}).get("history", []),
        budgets=sorted(facts["budgets"], key=float), pictures={path.stem for path in (folder / "report").glob("*.png")},
        code=digests_of(folder, ["*.py"]), changed_code=changed_code(folder), chat=_has_chat_template(folder),
        commands=_commands(facts), checkpoint=checkpoint, package_version=__version__,
        mlps=load_dynamoe_config(folder).mlp_names,
    )  # fmt: skip
    return ModelCard(content)


def check_records(folder: str | Path) -> None:
    """Raise `ValueError` where no card can be made of a model folder's records, which a stage would find out after its work."""
    if not Path(folder).is_dir():  # on the Hub
        return
    try:
        render_card(folder, local_files_only=True)
    except (ValueError, OSError):
        raise
    except Exception as error:  # whatever a field that is missing, or of another type, leads to
        raise ValueError(
            f"The records of {folder} are damaged: found {type(error).__name__}: {error}. Copy its JSON files again, or delete the one "
            "that was edited."
        ) from error


def _has_chat_template(folder) -> bool:
    settings = read_json(folder / "tokenizer_config.json") or {}
    return (folder / "chat_template.jinja").is_file() or "chat_template" in settings


def changed_code(folder: Path) -> list[str]:
    """The Python files of a folder that are not, byte for byte, those of this package's `modeling/`."""
    ours = digests_of(Path(modeling_dynamoe.__file__).parent, ["*.py"])
    return [name for name, digest in digests_of(folder, ["*.py"]).items() if ours.get(name) != digest]


@contextmanager
def new_records(folder: str | Path, wait: float = 0.0) -> Iterator[Path]:
    """
    As `new_files`, for records of a model folder, whose card is then written again: unless somebody has edited it, or it is that of
    another version.
    """
    path = Path(folder) / "README.md"
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    title = re.search(r"^# (.+)$", before, re.MULTILINE)  # of the folder when it was written
    name = title[1] if title else None
    try:
        ours = before and before == str(render_card(folder, local_files_only=True, name=name))
    except Exception:  # records that no card can be made of are the stage's to judge
        ours = False
    with new_files(folder, wait) as staging:
        yield staging
    if ours:
        render_card(folder, local_files_only=True, name=name).save(staging_of(path))
        os.replace(staging_of(path), path)


def _stages(training):
    """The records of all trainings that led to a folder, the first one first."""
    return [*training.get("earlier", []), training] if training else []


def _seen(stages, evaluations):
    """File names, or the name of a dataset, that are among the texts of both trainings and evaluations."""
    trained, evaluated = (
        {name for record in records for name in ([record["text"]] if isinstance(record["text"], str) else record["text"])}
        for records in (stages, evaluations)
    )
    return sorted(trained & evaluated)


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
        try:  # a download instead would retry for half a minute without a network
            return base, (HfApi().model_info(base, timeout=10).card_data or ModelCardData()).to_dict()
        except (RepositoryNotFoundError, HFValidationError):
            return base_model, {}
        except (HTTPError, ConnectionError):  # the Hub cannot be reached
            pass
    # A folder of the machine that converted it, such as runs/base, looks like a Hub id, so the cache must know it.
    card, config = (try_to_load_from_cache(base, name) for name in ("README.md", "config.json"))
    known = base_model or (base if isinstance(card or config, str) else None)
    return known, _metadata(card) if isinstance(card, str) else {}


def _metadata(readme) -> dict:
    return ModelCard(Path(readme).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()


def _datasets(training):
    """Hub ids of what was trained on. A streamed dataset is recorded as a name, text files as a list."""
    text = (training or {}).get("text")
    name = text.split(":")[0] if isinstance(text, str) else ""
    return [name] if HUB_ID.fullmatch(name) else None


def _dial_tags(variant, family):
    """Tags that the Hub can filter by. It reads them from `main` alone, so that card names the variants on branches too."""
    members = [variant, *(member for member in family if member.repo == variant.repo and variant.revision == "main")]
    tags = [f"sensitivity-{member.sensitivity:.2f}" for member in members]
    tags += [f"mlp-share-{member.budget:.2f}" for member in members if member.budget is not None]
    return list(dict.fromkeys(tags))


def _eval_results(rows) -> list[EvalResult]:
    """A `model-index` entry for every result, each with the setting that it was measured at."""
    results = []
    for row in rows:
        if "perplexity" not in row:
            continue
        setting = {"setting": row["setting"], "mean_mlp_share": row["mean_share"]}
        setting |= {name: row[name] for name in ("sensitivity", "force_expert") if name in row}
        if row["budget"] is not None:
            setting["variant"] = f"{row['budget']:g}"
        for dataset, metrics in {text_name(row["text"]): {"perplexity": row["perplexity"]}, **row["tasks"]}.items():
            kind = re.sub(r"[^\w.-]+", "-", dataset).strip("-")
            results += [EvalResult(
                task_type="text-generation", task_name="Text generation", dataset_type=kind, dataset_name=dataset,
                metric_type=metric, metric_value=value, metric_name=f"{metric} at {row['setting']}", metric_args=setting,
            ) for metric, value in metrics.items()]  # fmt: skip
    return results


def _command(stage, *folders, text=None, **options) -> str:
    """A command line; text that is not a list of files is the default one. Options that are None or False are left out."""
    words = ["dynamoe", stage, *folders]
    if text is not None and not isinstance(text, str):
        words += ["--text", *(Path(path).name for path in text)]
    for name, value in options.items():
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else map(str, value if isinstance(value, list) else [value])
    return shlex.join(" ".join(word.split()) for word in words)  # a line of its own could end the code block


def _commands(facts) -> list[str]:
    """The commands that make this folder again, as far as its records tell."""
    conversion, calibration = facts["conversion"], facts["calibration"]
    commands = []
    if conversion:
        read = conversion["calibration"]
        widths = [f"{share:g}" for share in facts["ladder"] if not isinstance(share, list)]
        commands.append(_command(
            "convert", text_name(conversion["base"]), "converted", text=read["text"], widths=",".join(widths) or None,
            importance=conversion["importance"], similarity=facts["similarity"], **{"router-type": facts["router"]},
            max_tokens=read["tokens"], block_size=read["block_size"], seed=conversion["seed"],
        ))  # fmt: skip
    stages = _stages(facts["training"])
    folders = ["converted", *(f"trained-{index + 1}" for index in range(len(stages) - 1)), "trained"]
    for stage, source, out in zip(stages, folders, folders[1:]):
        streamed = stage.get("distinct_tokens") is None and isinstance(stage["text"], str)
        # Records from before the routers learned by choosing have no `choice_share`, whose default is not 0.
        options = {"max_tokens": stage["tokens"], "choice_share": 0.0, **stage["settings"]}
        options["dataset"] = stage["text"] if streamed else None
        commands.append(_command("train", source, out, text=stage["text"], **options))
    if calibration:
        commands.append(_command("calibrate", "trained", text=calibration["text"], budgets=",".join(calibration["budgets"]),
                                 max_tokens=calibration["tokens"], block_size=calibration.get("block_size")))  # fmt: skip
    budgets: dict[tuple, dict] = {}  # of each text, as it was cut into blocks
    for entry in (facts["results"] or {}).get("evaluations", []):
        if entry["setting"].startswith("budget "):
            text = entry["text"] if isinstance(entry["text"], str) else tuple(entry["text"])
            budgets.setdefault((text, entry.get("block_size"), entry["tokens"]), {})[entry["setting"].split()[1]] = None
    for (text, size, tokens), names in budgets.items():
        options = {"budget": ",".join(names), "base": conversion and text_name(conversion["base"])}
        if size:  # `tokens` counts predicted tokens, all but the first of each block
            options |= {"max_tokens": tokens // (size - 1) * size, "block_size": size}
        commands.append(_command("evaluate", "trained", text=text, **options))
    return commands
