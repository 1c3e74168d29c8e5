# SPDX-License-Identifier: Apache-2.0
"""What a call may ask of a model, told before any work: places of the dial, an expert, labels that reach the model, adapters."""

import copy
import math
import re
from typing import Any

import torch


def check_sensitivity(value: Any) -> None:
    """Raise `ValueError` unless `value` is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:  # NaN fails the comparison
        raise ValueError(
            f"sensitivity must be in (0, 1], found {value!r}. 1 is the dense model; lower values let more tokens take "
            "smaller experts. To aim at a share of compute instead, use `set_budget`."
        )


def check_density(value: Any) -> None:
    """Raise `ValueError` unless `value` is a number in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"`density` must be in (0, 1], found {value!r}. 1 leaves experts dense.")


DIALS = {"sensitivity": check_sensitivity, "density": check_density}
ROUTED_BY = (*DIALS, "force_expert", "route")  # what a call can say of its routing
ASKED_OF_GENERATE = (*ROUTED_BY, "draft_budget", "draft_tokens")


def check_expert(value: Any, experts: int) -> None:
    """Raise `ValueError` unless `value` is `None` or the index of one of so many experts."""
    if value is not None and not (is_whole(value) and 0 <= value < experts):
        raise ValueError(
            f"`force_expert` must be an expert's index, found {value!r}. This model has experts 0 to {experts - 1} (the last is the "
            "full width), or None to let the routers choose."
        )


def check_one_of(name: str, value: Any, allowed: Any) -> None:
    """Raise `ValueError` unless `value` is one of the strings in `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"`{name}` is unknown: found {value!r}. Choose one of {', '.join(allowed)}.")


def checked_dial(name: str, value: Any, shape: torch.Size | None = None) -> Any:
    """
    A sensitivity or density as a call takes it: `None`, a number, or a tensor with one for each sequence, (B,), or token, (B, S); a
    tensor without dimensions is a number. `shape`: that of the tokens, `None` where it is not known yet.

    Raises:
        ValueError: a number outside (0, 1], NaN too, or a tensor of another shape.
    """
    if value is None or not isinstance(value, torch.Tensor):
        if value is not None:
            DIALS[name](value)
        return value
    _check_shape(name, value, shape)
    if not _can_be_read(value):
        return value if shape is None or value.ndim else value.expand(shape[0])
    for number in value.flatten().tolist():
        DIALS[name](number)
    return value if value.ndim else value.item()


def checked_request(settings: dict[str, Any], experts: int, routes: Any) -> dict[str, Any]:
    """
    The fields of a `Routing` that passes are to follow. Raises `ValueError` as `checked_dial`, and for an unknown expert or route.
    Tensors on a GPU are taken as they are: to read them is to wait for it, at each step of a training.
    """
    check_expert(settings.get("force_expert"), experts)
    check_one_of("route", settings.get("route", routes[0]), routes)
    for name in DIALS.keys() & settings.keys():
        if not (isinstance(settings[name], torch.Tensor) and settings[name].is_cuda):
            settings = {**settings, name: checked_dial(name, settings[name])}
    return settings


def each_of(name: str, value: Any, shape: torch.Size) -> Any:
    """
    A number as it is, or a tensor with one for each sequence of tokens (B, S), which may be beams or samples of those it was given
    for. Raises `ValueError` for a tensor of another shape.
    """
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if 0 < len(value) < shape[0] and shape[0] % len(value) == 0:
        value = value.repeat_interleave(shape[0] // len(value), 0)
    _check_shape(name, value, shape)
    return value


def _check_shape(name, value, shape):
    if value.ndim > 2 or value.ndim and shape is not None and value.shape not in (shape[:1], shape):
        tokens = "" if shape is None else f" of {tuple(shape)}"
        raise ValueError(
            f"`{name}` must be a number, or one for each sequence or token{tokens}: found shape {tuple(value.shape)}."
        )


def _can_be_read(tensor):
    """Whether there are numbers to look at: a compiler and a CUDA graph in the making have none yet."""
    capturing = tensor.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or tensor.is_meta or capturing)


def check_labels_arrive(labels: torch.Tensor | None, num_items_in_batch: Any) -> None:
    """Raise `ValueError` where a Trainer has counted the labels of a batch and kept them from the model."""
    if labels is None and num_items_in_batch is not None:
        raise ValueError(
            "The routers' loss needs the labels, and the Trainer has taken them out of the batch: found `label_smoothing_factor` or "
            "`compute_loss_func`, whose loss trains no router. Leave both out, or train with `DynaMoETrainer`."
        )


def check_model_type(found: str | None) -> None:
    """Raise `ValueError` unless `found` is the model type of a DynaMoE config, or missing."""
    if found not in (None, "", "dynamoe"):
        raise ValueError(
            f"This is a dense model, found model type {found!r}. Convert it: `dynamoe convert MODEL OUT`, or in memory "
            "`DynaMoEForCausalLM.from_dense(AutoModelForCausalLM.from_pretrained(MODEL))`."
        )


def check_generation_config(config: Any) -> None:
    """Raise `ValueError` where a `GenerationConfig` holds what belongs to a call, which would not be heard."""
    found = {name: getattr(config, name) for name in ASKED_OF_GENERATE if getattr(config, name, None) is not None}
    if found:
        told = ", ".join(f"{name}={value!r}" for name, value in found.items())
        raise ValueError(
            f"A generation config does not carry the dial: found {told} in it. Give it to the call, such as "
            "`generate(..., sensitivity=0.5)`, or to the model, with `set_sensitivity` or `set_budget`."
        )


def check_can_be_read(model: Any) -> None:
    """Raise `ValueError` where the weights of a model are not those of its config, so that its folder could not be loaded."""
    mlps, config = len(model.nested_mlps), model.config
    if mlps != len(config.mlp_names):
        raise ValueError(
            f"The folder could not be read: found {mlps} MLPs, and in the config num_hidden_layers={config.num_hidden_layers} and "
            f"nested_shared={config.nested_shared}. Set these, and keep of each list of the config the entries of the layers that are left."
        )
    if getattr(model, "_tp_size", None):  # each rank holds parts
        return
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in type(model)(copy.deepcopy(config)).named_parameters()}
    for name, tensor in model.named_parameters():
        plain = type(tensor) is torch.nn.Parameter and tensor.numel()  # not packed by a quantiser, nor held elsewhere
        if plain and tensor.shape != wanted.get(name, tensor.shape):
            raise ValueError(
                f"The folder could not be read: found {name} of shape {tuple(tensor.shape)}, and the config gives "
                f"{tuple(wanted[name])}. Set the config to the sizes that the weights have."
            )


def check_adapters(model: Any) -> None:
    """
    Raise `ValueError` where PEFT's adapters of the dense base sit on MLP projections. Conversion has put the neurons there in another
    order, and adapters keep none. Adapters tell what they were trained on by its name alone.
    """
    base, own = str(model.config.base_config._name_or_path or ""), model.name_or_path
    if not base or model.config.error_weights is None:  # `from_dense` leaves the order as it is
        return
    for name, config in model.__dict__.get("peft_config", {}).items():
        found = str(getattr(config, "base_model_name_or_path", None) or "")
        if found != own and _same_name(found, base) and any(_adapts(mlp, name) for mlp in model.nested_mlps):
            raise ValueError(
                f"Adapters of the dense base do not fit this model's MLPs, whose neurons have another order: found {name!r}, trained on "
                f"{found}. Merge them into the base and convert the result; or, if they were trained on this model, write "
                f"{own!r} into `base_model_name_or_path` of their adapter_config.json."
            )


def _same_name(found, base):
    """Whether two names may be those of one model: a folder's last part is compared, since its place is not recorded."""
    if all(re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) for name in (found, base)):  # ids on the Hub
        return found == base
    return found.rstrip("/").split("/")[-1] == base.rstrip("/").split("/")[-1]


def _adapts(mlp, adapter):
    """Whether an adapter of this name sits on a projection of an MLP."""
    projections = [mlp._modules[name] for name in mlp.layout.projections]
    kinds = [getattr(module, kind) for module in projections for kind in getattr(module, "adapter_layer_names", ())]
    return any(adapter in kind for kind in kinds)


def is_number(value: Any) -> bool:
    """Whether this is a number, and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_size(value: Any) -> bool:
    """Whether this is a finite number of at least 0."""
    return is_number(value) and 0 <= value < math.inf


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool)
