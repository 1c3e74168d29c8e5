# SPDX-License-Identifier: Apache-2.0
"""The model folder, the only thing that one stage hands to the next: loading, writing whole or not at all, describing."""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import InspectArguments, resolve
from .disk import held, remove_leftovers, staging_of, sync, sync_entry, told_of
from .integrity import differing, digests_of, first_not_finite, first_of_no_floats
from .modeling import DynaMoEConfig, DynaMoEForCausalLM
from .modeling.moe_base import is_mixture
from .modeling.routing import router_names


CONVERSION, TRAINING, CALIBRATION = "conversion.json", "training.json", "calibration.json"
RESULTS, BENCHMARK = "results.json", "benchmark.json"
Model = TypeVar("Model", bound=PreTrainedModel)


def load_model(folder: str | Path, **options) -> DynaMoEForCausalLM:
    """
    The DynaMoE model of a folder or Hub id, in evaluation mode, on this process's GPU if there is one. `options` are those of
    `from_pretrained`; `device_map="cpu"` keeps it off the GPU, and another one spreads it.

    Raises:
        ValueError: the folder holds no DynaMoE model, or its weights are incomplete, not those that were written, or not finite.
    """
    load_dynamoe_config(folder)
    check_digests(folder)
    model = _load(folder, **options).eval()
    check_finite(model, folder)
    return model if options.keys() & {"device_map", "quantization_config"} else on_gpu(model)


def on_gpu(model: Model) -> Model:
    """
    The model, moved to this process's GPU if there is one: of several that which the launcher's `LOCAL_RANK` says. An empty
    `CUDA_VISIBLE_DEVICES` keeps every stage on the CPU.
    """
    if torch.cuda.is_available() and model.device.type == "cpu":
        model.to(torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))))  # type: ignore[arg-type]  # transformers' decorator hides `to`
    return model


def load_config(folder: str | Path):
    """The config of a folder or Hub id, with a clear `ValueError` if there is none."""
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder: it has no config.json. Give the output of `dynamoe convert`.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)  # else it would ask on the terminal
    except OSError as error:
        raise ValueError(f"{folder} is neither a model folder nor a model on the Hub that can be reached: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # what a field of a wrong type leads to, in transformers
        raise ValueError(
            f"The config of {folder} cannot be used: found {type(error).__name__}: {error}. Copy its config.json again."
        ) from error


def load_dynamoe_config(folder: str | Path) -> DynaMoEConfig:
    """As `load_config`, with a clear `ValueError` if it is that of a dense model."""
    config = load_config(folder)
    if config.model_type != "dynamoe":
        raise ValueError(
            f"{folder} holds a dense {config.model_type} model, not a DynaMoE one. Run `dynamoe convert {folder} OUT` first."
        )
    return config


def load_tokenizer(folder: str | Path, **options) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, with a clear `ValueError` if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        # The trap: it would be saved with the next folder, whose README tells users to trust its code.
        tokenizer.init_kwargs.pop("auto_map", None)
        return tokenizer
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise ValueError(
            f"{folder} has no tokenizer that can be loaded: {error}. Copy the tokenizer's files into it."
        ) from error


def check_weights(folder: str | Path) -> None:
    """Raise `ValueError` where the weights of a DynaMoE folder are not those of its config, by names and shapes alone."""
    load_dynamoe_config(folder)
    _load(folder, device_map="meta")


def _load(folder, **options):
    """`AutoModelForCausalLM.from_pretrained`, with damaged, missing or foreign weights told in one sentence."""
    keep_large_buffers()
    options = {"dtype": "auto", "trust_remote_code": False, **options}
    dtype = options["dtype"]
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"There is no such dtype: found {dtype!r}. Choose float32, bfloat16, float16, or auto as in the checkpoint."
        )
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (SafetensorError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"A weight file of {folder} is damaged ({error}), for example cut off while it was copied. Copy or download it again."
        ) from error
    model, info = loaded
    _refuse_other_weights(options.get("gguf_file", folder), info)
    if name := first_of_no_floats(Path(folder), {name for name, _ in model.named_parameters()}):
        raise ValueError(
            f"The weights of {folder} are no floating-point numbers: found {name}. They may be those of a quantised model without its "
            "config: get all files of the model again."
        )
    return model


def _refuse_other_weights(source, info):
    """The trap: transformers fills what is missing, or has another shape, with random numbers, and goes on."""
    shapes = [(name, f"{name} {tuple(found)}, not {tuple(wanted)}") for name, found, wanted in info["mismatched_keys"]]
    found = {
        "missing": sorted(set(info["missing_keys"]) - {name for name, _ in shapes}),
        "of another shape": sorted(text for _, text in shapes),
        "unknown to the model": sorted(info["unexpected_keys"]),
    }
    told = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in found.items()
        if names
    ]
    if told or info["error_msgs"]:
        told += map(str, info["error_msgs"])
        raise ValueError(
            f"The weights of {source} are not those of its config: found tensors {', '.join(told)}. Get all files of the model again; "
            "a split GGUF must be merged into one file first."
        )


def keep_large_buffers() -> None:
    """
    Ask glibc to keep freed memory. Logits over a whole vocabulary are hundreds of megabytes, and handing them back to the
    kernel after each step makes every page of the next one fault: a large elementwise product then takes seven times as
    long. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(parameter, 2**31 - 1)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """
    A folder to fill that becomes `out` when the block ends, and vanishes if it fails: nothing half-written is left. Enter it before
    the work, since it is then that `out` is tried and kept from other runs. What a killed run left of it is removed.

    Raises:
        FileExistsError: `out` exists already.
        OSError: nothing can be written there, or another run is writing it.
    """
    out = Path(out)
    refuse_existing(out)
    with held(out.with_name(f".{out.name}.lock"), out):
        refuse_existing(out)
        remove_leftovers(out.parent, out.name)
        staging = staging_of(out)
        try:
            with told_of(out):
                staging.mkdir()
            yield staging
            sync(staging)
            refuse_existing(out)
            os.replace(staging, out)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        sync_entry(out)


@contextmanager
def new_files(folder: str | Path, wait: float = 0.0) -> Iterator[Path]:
    """
    A folder to fill whose files take their places in `folder` when the block ends, each whole; none does if it fails. Enter it before
    the work: `folder` is made, tried and kept from other runs then, for which it waits so many seconds. Raises `OSError` as
    `new_folder` does.
    """
    folder, is_new = Path(folder), not Path(folder).exists()
    try:
        with held(folder / ".lock", folder, wait):
            remove_leftovers(folder)
            staging = folder / f".{os.getpid()}.partial"
            try:
                staging.mkdir()
                yield staging
                sync(staging)
                for path in sorted(staging.iterdir()):
                    os.replace(path, folder / path.name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            sync_entry(folder / ".lock")
    except BaseException:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def check_writable(folder: str | Path) -> None:
    """Raise `OSError` where records cannot be added to a model folder; one on the Hub gets none."""
    if Path(folder).is_dir():
        with new_files(folder):
            pass


def refuse_existing(out: str | Path) -> None:
    """Raise `FileExistsError` if `out` exists, as a link that leads nowhere too: no stage writes over what another has made."""
    if os.path.lexists(out):
        raise FileExistsError(
            f"{out} exists already, and nothing is written over it. Choose another folder, or delete it first."
        )


def write_json(path: str | Path, content: dict) -> None:
    """
    Write `content` in one step: a reader sees the old file or the new one, and a full disk leaves the old one. JSON has no NaN and no
    infinity: such numbers become null, which is shown as "not measured".
    """
    path = Path(path)
    staging = staging_of(path)
    try:
        with open(staging, "w", encoding="utf-8") as file:
            content = json.loads(json.dumps(content), parse_constant=lambda name: None)
            file.write(json.dumps(content, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    sync_entry(path)


def read_json(path: str | Path) -> dict | None:
    """The content of a JSON file, `None` if there is no such file. Raises `ValueError` where it is damaged, or holds no record."""
    if not Path(path).is_file():
        return None
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=lambda name: None)
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}), for example cut off or edited. Repair it, or delete it."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, found a {type(content).__name__}. Repair it, or delete it.")
    return content


def update_config(folder: str | Path, **fields) -> None:
    """Set fields of the config of a model folder on disk, after the same checks as when loading; weights are not touched."""
    write_json(Path(folder) / "config.json", changed_config(folder, **fields))


def changed_config(folder: str | Path, **fields) -> dict:
    """What `config.json` of a model folder holds, with some fields changed, after the same checks as when loading."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    config.check()
    return {**(read_json(Path(folder) / "config.json") or {}), **fields}


def carry_records(source: str | Path, target: str | Path, names: Sequence[str] = (CONVERSION, TRAINING)) -> None:
    """
    Copy the conversion and training records of one folder to the next, so that a folder tells its whole history; without the digests
    of its weights, which are others from now on.
    """
    for name in names:
        if record := read_json(Path(source) / name):
            write_json(Path(target) / name, {key: value for key, value in record.items() if key != "weights"})


def check_digests(folder: str | Path) -> dict[str, str]:
    """
    Compare the weight files of a folder with the SHA-256 that its records hold, and return those; none for a Hub id, or a folder from
    before they were kept. Raises `ValueError` where a file is missing or is another one.
    """
    records = [read_json(Path(folder) / name) or {} for name in (TRAINING, CONVERSION)]
    digests: Any = next((record["weights"] for record in records if "weights" in record), {})
    if not isinstance(digests, dict):
        raise ValueError(
            f"The records of {folder} are damaged: found {digests!r} in `weights`, which must name files and their SHA-256. Copy them again."
        )
    wrong = differing(Path(folder), digests)
    if digests:  # transformers would load another file instead: one weight file before shards
        wrong += [path.name for path in Path(folder).glob("model*.safetensors*") if path.name not in digests]
    if wrong:
        raise ValueError(
            f"Weight files of {folder} are not those that were written: found another SHA-256 than the record's, no file, or one too "
            f"many, for {', '.join(wrong)}. Copy the folder again. If you changed the weights yourself, remove `weights` from its records."
        )
    return digests


def check_finite(model: torch.nn.Module, folder: str | Path) -> None:
    """Raise `ValueError` where the weights that were loaded from `folder` hold NaN or an infinity."""
    if name := first_not_finite(model):
        raise ValueError(
            f"{folder} holds NaN or infinite numbers in `{name}`. Its training diverged, or its weights are damaged: get them again."
        )


def save_model(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Write config and weights of a model, and return the SHA-256 of its weight files. Raises `OSError` where the disk is full."""
    check_finite(model, "The model that is to be written")
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise OSError(f"The weights cannot be written to {folder}: {error}. Make room on the disk.") from error
    return digests_of(folder)


def count_parameters(model: DynaMoEForCausalLM) -> dict[str, int]:
    """
    Parameters by part: `total` (tied weights once), `mlp` (the projections that routing can skip, in a mixture those of the experts that
    a token is sent to), `router`, and `idle` (the other experts of mixtures, and what was cut off for good of those).
    """
    names = router_names(model)
    router = sum(p.numel() for name, p in model.named_parameters() if name in names)
    mlp = sum(p.numel() for mlp in model.nested_mlps for p in mlp.parameters()) - router
    mixtures = [mlp for mlp in model.nested_mlps if is_mixture(mlp)]
    idle = 0
    for mixture in mixtures:
        size = sum(tensor.numel() for tensor in mixture.parameters(recurse=False))
        idle += round((1 - mixture.active) * size)
    return {"total": sum(p.numel() for p in model.parameters()), "mlp": mlp - idle, "router": router, "idle": idle}


def active_parameters(counts: dict[str, int], share: float) -> int:
    """Parameters that a token uses at a mean MLP share, embeddings, attention, head and routers included."""
    return round(counts["total"] - counts["idle"] - (1 - share) * counts["mlp"])


def _calibration(folder, config):
    """The record of the calibration, if it is that of the budgets in the config: a killed run may have replaced one of the two."""
    record = read_json(Path(folder) / CALIBRATION)
    found = {budget: entry["sensitivity"] for budget, entry in (record or {}).get("budgets", {}).items()}
    return record if found == config.budgets else None


def inspect_folder(folder: str | Path, arguments: InspectArguments | None = None, **settings: Any) -> dict:
    """
    What a model folder holds: base, experts, router, dial, parameters, and what is known of its quality. `settings` are fields of
    `InspectArguments`; with `verify=True` `verified` has the SHA-256 of the weight files that are in the records, or raises
    `ValueError` where the weights are damaged.
    """
    verify = resolve(InspectArguments, arguments, settings).verify
    config = load_dynamoe_config(folder)
    with torch.device("meta"):
        model = DynaMoEForCausalLM(config)
    counts, ladders = count_parameters(model), [mlp.widths for mlp in model.nested_mlps]
    return {
        "folder": str(folder),
        "base": (read_json(Path(folder) / CONVERSION) or {}).get("base"),
        "family": config.base_config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "mlp_width": max(ladder[-1] for ladder in ladders),
        "expert_widths": ladders[0] if all(ladder == ladders[0] for ladder in ladders) else ladders,
        "ladder": config.expert_widths,
        "nested_shared": config.nested_shared,
        "similarity": config.similarity,
        "router": config.router_type,
        "sensitivity": config.sensitivity,
        "budgets": config.budgets,
        "force_expert": config.force_expert,
        "parameters": counts,
        "format_version": config.format_version,
        "conversion": read_json(Path(folder) / CONVERSION),
        "training": read_json(Path(folder) / TRAINING),
        "calibration": _calibration(folder, config),
        "results": read_json(Path(folder) / RESULTS),
        **({"verified": verified(folder)} if verify else {}),
    }


def verified(folder: str | Path) -> dict[str, str]:
    """Load a folder on the CPU, and return the SHA-256 of the weight files that its records hold. Raises `ValueError` as `load_model`."""
    load_model(folder, device_map="cpu")
    return check_digests(folder)
