# SPDX-License-Identifier: Apache-2.0
"""The model folder, the only thing that one stage hands to the next: loading, writing whole or not at all, describing."""

import ctypes
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .modeling import DynaMoEConfig, DynaMoEForCausalLM


CONVERSION, TRAINING, CALIBRATION = "conversion.json", "training.json", "calibration.json"
RESULTS, BENCHMARK = "results.json", "benchmark.json"
Model = TypeVar("Model", bound=PreTrainedModel)


def load_model(folder: str | Path, **options) -> DynaMoEForCausalLM:
    """
    The DynaMoE model of a folder or Hub id, in evaluation mode, on this process's GPU if there is one. `options` are those of
    `from_pretrained`; `device_map="cpu"` keeps it off the GPU, and another one spreads it.

    Raises:
        ValueError: the folder holds no DynaMoE model, or its weights are incomplete.
    """
    load_dynamoe_config(folder)
    model = _load(folder, **options).eval()
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
        return AutoConfig.from_pretrained(folder)
    except OSError as error:
        raise ValueError(f"{folder} is neither a model folder nor a model on the Hub that can be reached: {error}") from error


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
        return AutoTokenizer.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
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
    options = {"dtype": "auto", **options}
    dtype = options["dtype"]
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"There is no such dtype: found {dtype!r}. Choose float32, bfloat16, float16, or auto as in the checkpoint."
        )
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (SafetensorError, EOFError) as error:
        raise ValueError(
            f"A weight file of {folder} is damaged ({error}), for example cut off while it was copied. Copy or download it again."
        ) from error
    model, info = loaded
    _refuse_other_weights(options.get("gguf_file", folder), info)
    return model


def _refuse_other_weights(source, info):
    """The trap: transformers fills what is missing, or has another shape, with random numbers, and goes on."""
    shapes = [(name, f"{name} {tuple(found)}, not {tuple(wanted)}") for name, found, wanted in info["mismatched_keys"]]
    found = {
        "missing": sorted(info["missing_keys"] - {name for name, _ in shapes}),
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
    A folder to fill that becomes `out` when the block ends, and vanishes if it fails: nothing half-written is left.

    Raises:
        FileExistsError: `out` exists already.
    """
    out = Path(out)
    refuse_existing(out)
    staging = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        staging.mkdir(parents=True)
        yield staging
        os.replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def refuse_existing(out: str | Path) -> None:
    """Raise `FileExistsError` if `out` exists: no stage writes over what another has made."""
    if Path(out).exists():
        raise FileExistsError(
            f"{out} exists already, and nothing is written over it. Choose another folder, or delete it first."
        )


def write_json(path: str | Path, content: dict) -> None:
    """Write `content` in one step: a reader sees the old file or the new one, and a full disk leaves the old one."""
    path = Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        staging.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(staging, path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def read_json(path: str | Path) -> dict | None:
    """The content of a JSON file, `None` if there is no such file. Raises `ValueError` where it is damaged."""
    if not Path(path).is_file():
        return None
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}), for example cut off or edited. Repair it, or delete it."
        ) from error


def update_config(folder: str | Path, **fields) -> None:
    """Set fields of the config of a model folder on disk, after the same checks as when loading; weights are not touched."""
    config = AutoConfig.from_pretrained(folder)
    for name, value in fields.items():
        setattr(config, name, value)
    config.check()
    content = read_json(Path(folder) / "config.json") or {}
    write_json(Path(folder) / "config.json", {**content, **fields})


def carry_records(source: str | Path, target: str | Path) -> None:
    """Copy the conversion and training records of one folder to the next, so that a folder tells its whole history."""
    for name in (CONVERSION, TRAINING):
        if (Path(source) / name).is_file():
            shutil.copy(Path(source) / name, Path(target) / name)


def count_parameters(model: DynaMoEForCausalLM) -> dict[str, int]:
    """Parameters by part: `total` (tied weights once), `mlp` (the projections that routing can skip) and `router`."""
    router = sum(p.numel() for name, p in model.named_parameters() if ".router." in name)
    mlp = sum(p.numel() for layer in model.model.layers for p in layer.mlp.parameters())
    return {"total": sum(p.numel() for p in model.parameters()), "mlp": mlp - router, "router": router}


def active_parameters(counts: dict[str, int], share: float) -> int:
    """Parameters that a token uses at a mean MLP share, embeddings, attention, head and routers included."""
    return round(counts["total"] - (1 - share) * counts["mlp"])


def inspect_folder(folder: str | Path) -> dict:
    """What a model folder holds: base, experts, router, dial, parameters, and what is known of its quality."""
    config = load_dynamoe_config(folder)
    with torch.device("meta"):
        counts = count_parameters(DynaMoEForCausalLM(config))
    mlp = config.base_config.intermediate_size
    ladders = [config.layer_widths(layer, mlp) for layer in range(config.num_hidden_layers)]
    return {
        "folder": str(folder),
        "base": (read_json(Path(folder) / CONVERSION) or {}).get("base"),
        "family": config.base_config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "mlp_width": mlp,
        "expert_widths": ladders[0] if all(ladder == ladders[0] for ladder in ladders) else ladders,
        "similarity": config.similarity,
        "router": config.router_type,
        "sensitivity": config.sensitivity,
        "budgets": config.budgets,
        "force_expert": config.force_expert,
        "parameters": counts,
        "format_version": config.format_version,
        "conversion": read_json(Path(folder) / CONVERSION),
        "training": read_json(Path(folder) / TRAINING),
        "calibration": read_json(Path(folder) / CALIBRATION),
        "results": read_json(Path(folder) / RESULTS),
    }
