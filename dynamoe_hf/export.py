# SPDX-License-Identifier: Apache-2.0
"""DynaMoE -> dense: one width for all layers, or one for each, as a plain model folder or as a GGUF file."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .arguments import ExportArguments, resolve
from .data import documents_for, token_blocks
from .folder import load_dynamoe_config, load_model, load_tokenizer, new_folder, refuse_existing, save_model
from .gguf_file import check_gguf, write_gguf
from .importance import SINK_POSITIONS
from .modeling import DynaMoEForCausalLM
from .modeling.configuration_dynamoe import CODE_FIELDS
from .modeling.dense_base import mlp_places, set_mlp_width
from .modeling.moe_base import is_mixture
from .modeling.routing import router_names
from .observe import similarity_profiles


SHARED_WIDTH = "shared_expert_intermediate_size"  # of configs that give shared experts a width of their own


def export_dense(folder: str | Path, out: str | Path, arguments: ExportArguments | None = None, **settings: Any) -> dict:
    """
    Write a plain dense model whose MLPs are the first neurons of the folder's: it loads without this package, in any runtime
    that knows the base's family. It needs no routers, so every token costs, and gets, the same.

    Args:
        folder: model folder or Hub id.
        out: folder to write: a model folder, or with `gguf` a folder with one `.gguf` file, tokenizer included.
        arguments, settings: the fields of `ExportArguments`, as one object or by name.

    Returns:
        `mlp_width`, in neurons, or a list of one for each MLP, and the number of `parameters`; with `gguf` the `file` too.

    Raises:
        ValueError: `width` or `budget` is out of range; the folder is not a DynaMoE model; or a GGUF file was asked for, and
            llama.cpp would compute this family, or cut text like this tokenizer, in another way.
        FileExistsError: `out` exists.
        OSError: nothing can be written to `out`, another run is writing it, or the disk is full.
    """
    arguments = resolve(ExportArguments, arguments, settings)
    refuse_existing(out)
    kind, budget = arguments.gguf, arguments.budget
    if budget is not None and arguments.width is not None:
        raise ValueError("Both a width and a budget were given. Give one of them.")
    config, tokenizer = load_dynamoe_config(folder), load_tokenizer(folder)
    if budget is not None and kind is None:
        raise ValueError(
            f"A plain {config.base_config.model_type} folder has one MLP width for all layers, and a budget gives each its own: found "
            f"budget={budget:g} without a GGUF file. Add --gguf f16, or give --width."
        )
    if kind is not None:
        check_gguf(config.base_config, tokenizer, by_layer=budget is not None)
    with new_folder(out) as target:
        model = load_model(folder)
        if budget is not None:
            texts = documents_for("calibration", arguments.text)
            blocks = token_blocks(texts, tokenizer, arguments.block_size, arguments.max_tokens)
            widths = widths_for(model, blocks, budget)
        else:
            widths = _prefix(model, 1.0 if arguments.width is None else arguments.width)
        if kind is None:
            dense = _dense(model, widths)
            save_model(dense, target)
            tokenizer.save_pretrained(target)
            return {"mlp_width": _one_or_all(widths), "parameters": sum(p.numel() for p in dense.parameters())}
        tensors = _narrowed(model, widths)
        name = f"{Path(out).name}-{kind}.gguf"
        write_gguf(target / name, model.config.base_config, tensors, widths, tokenizer, _ends(model, tokenizer), kind)
    parameters = sum({tensor.data_ptr(): tensor.numel() for tensor in tensors.values()}.values())
    return {"mlp_width": _one_or_all(widths), "parameters": parameters, "file": str(Path(out) / name)}


def dense_prefix(model: DynaMoEForCausalLM, width: float) -> PreTrainedModel:
    """
    A dense model of the base's own family whose MLPs are the first `width` (a share in (0, 1]) of the neurons of `model`.
    Weights outside the MLPs are shared with `model`, not copied.
    """
    return _dense(model, _prefix(model, width))


@contextmanager
def one_width(model: DynaMoEForCausalLM, width: float) -> Iterator[None]:
    """Inside, the first expert of every MLP is as wide as `dense_prefix` of `width`, also where no dense model can be."""
    mlps, kept = model.nested_mlps, [mlp.widths for mlp in model.nested_mlps]
    try:
        for mlp, neurons in zip(mlps, _prefix(model, width)):
            mlp.widths = [neurons, *mlp.widths[1:]]
        yield
    finally:
        for mlp, widths in zip(mlps, kept):
            mlp.widths = widths


@torch.no_grad()
def widths_for(model: DynaMoEForCausalLM, blocks: torch.Tensor, budget: float) -> list[int]:
    """
    One expert's width for each layer, in neurons, so that they are at most a share `budget` of the MLPs, at the least cost in loss:
    the sum over layers of mean c_l |O - O_e|^2 on token ids (N, S), with every other layer at full width. Experts of width 0
    are left out: llama.cpp has no layer without an MLP.

    Raises:
        ValueError: the smallest experts are wider than the budget, or it is above 1.
    """
    ladders = [[width for width in mlp.widths if width] for mlp in model.nested_mlps]
    total = sum(ladder[-1] for ladder in ladders)
    smallest = sum(ladder[0] for ladder in ladders) / total
    if not smallest <= budget <= 1:
        raise ValueError(
            f"budget={budget:g} is out of reach: the smallest experts are {smallest:.2f} of the MLPs, and the full width 1. Choose one "
            "between."
        )
    similarity, model.config.similarity = model.config.similarity, "loss_weighted"
    try:
        profiles_LTE = similarity_profiles(model, blocks)
    finally:
        model.config.similarity = similarity
    # 1 / s - 1 = c_l |O - O_e|^2. The first tokens of a sequence have huge activations, whatever they say.
    profiles_LTE = profiles_LTE.unflatten(1, blocks.shape)[:, :, SINK_POSITIONS:].flatten(1, 2)
    costs_LE = (1 / profiles_LTE.double().clamp_min(1e-12) - 1).mean(1)
    costs = [row[len(row) - len(ladder) :] for row, ladder in zip(costs_LE.tolist(), ladders)]
    return cheapest_widths(costs, ladders, math.floor(budget * total + 1e-6))


def cheapest_widths(costs: Sequence[Sequence[float]], ladders: Sequence[Sequence[int]], total: int) -> list[int]:
    """For each layer one width of its ladder, their sum at most `total`, so that the sum of their costs is the least. Exact."""
    unit = math.gcd(*(width for ladder in ladders for width in ladder))
    room = total // unit
    least, chosen = np.zeros(room + 1), []  # least[r]: cost of the layers so far in r units
    for row, ladder in zip(costs, ladders):
        options = np.full((len(ladder), room + 1), np.inf)
        for option, cost, width in zip(options, row, ladder):
            size = width // unit
            option[size:] = least[: max(room + 1 - size, 0)] + cost
        chosen.append(options.argmin(0))
        least = options.min(0)
    widths = []
    for choice, ladder in zip(reversed(chosen), reversed(ladders)):
        widths.append(ladder[choice[room]])
        room -= widths[-1] // unit
    return widths[::-1]


def _prefix(model, width) -> list[int]:
    """A share of the MLP width in neurons, for each MLP."""
    if not 0 < width <= 1:
        raise ValueError(f"`width` must be a share of the MLP width in (0, 1], found {width}. Give for example 0.5.")
    widths, routed, own = [], (1, 1), hasattr(model.config.base_config, SHARED_WIDTH)
    for place, mlp in zip(mlp_places(model.base_model), model.nested_mlps):
        step, neurons = 1, mlp.widths[-1]
        if is_mixture(mlp):
            # The trap: torch's grouped products, which plain mixtures run by, ask for rows of whole 16 bytes.
            step = 8 if width < 1 else 1
            routed = step, neurons
        elif place.is_shared and not own:  # its width is a multiple of that of the routed ones, which are before it
            step = routed[0] * neurons // routed[1]
        widths.append(min(neurons, max(step, round(width * neurons / step) * step)))
    return widths


def _one_or_all(widths):
    return widths[0] if len(set(widths)) == 1 else widths


def _narrowed(model, widths) -> dict[str, torch.Tensor]:
    """The state dict without routers, the MLPs cut to these numbers of neurons."""
    routers = router_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in routers}
    for place, mlp, width in zip(mlp_places(model.base_model), model.nested_mlps, widths):
        prefix = f"{place.name}."
        for name in [name for name in state if name.startswith(prefix)]:
            part = name.removeprefix(prefix)
            state[f"{place.base_name}.{part}"] = mlp.layout.narrow(part, state.pop(name), width)
    return state


def _dense(model, widths) -> PreTrainedModel:
    """
    A dense model of the base's own family, all layers equally wide. Raises `ValueError` where a mixture has no config for it: some
    families give the width of the shared expert as a multiple of that of a routed one, and it may have been left whole.
    """
    config = copy.deepcopy(model.config.base_config)
    for name in CODE_FIELDS:
        vars(config).pop(name, None)
    for place, width in zip(mlp_places(model.base_model), widths):
        if place.is_shared:
            if hasattr(config, SHARED_WIDTH):
                setattr(config, SHARED_WIDTH, width)
        elif is_mixture(place.mlp) and hasattr(config, "moe_intermediate_size"):
            config.moe_intermediate_size = width
        else:
            set_mlp_width(config, width)
    state = _narrowed(model, widths)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    wrong = [name for name, tensor in dense.state_dict().items() if tensor.shape != state[name].shape]
    if wrong:
        raise ValueError(
            f"A plain {config.model_type} folder cannot hold experts of {widths[-1]} neurons: found weights that its config gives "
            f"another shape, such as {wrong[0]}. Export the full width, or serve the folder itself."
        )
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    dense.load_state_dict(state, assign=True)
    for name, buffer in buffers.items():  # not part of a checkpoint, so still on the meta device: RoPE frequencies
        owner, _, leaf = name.rpartition(".")
        setattr(dense.get_submodule(owner), leaf, buffer)
    dense.tie_weights()
    dense.generation_config = model.generation_config
    return dense.eval()


def _ends(model, tokenizer) -> list[int]:
    """Ids of the tokens at which a text ends: the tokenizer's own, then those that generation stops at."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return list(dict.fromkeys(index for index in (tokenizer.eos_token_id, *ends) if index is not None))
