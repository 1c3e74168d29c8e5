# SPDX-License-Identifier: Apache-2.0
"""Dense model -> DynaMoE: rank the neurons, reorder them, add routers, prove parity."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from .arguments import ConvertArguments, resolve
from .data import check_ids, documents_for, text_names, token_blocks
from .folder import CONVERSION, _load, load_config, load_model, load_tokenizer, new_folder, on_gpu, save_model, write_json
from .label import error_weights
from .modeling import DynaMoEForCausalLM
from .modeling.configuration_dynamoe import CODE_FIELDS
from .modeling.dense_base import check_places, dense_class_of, mlp_places
from .modeling.moe_base import is_mixture, layout_at, rows_by_expert
from .observe import (
    expert_shares,
    gradients_of_activations,
    loss_backward,
    mean_share,
    sensitivity_for,
    similarity_profiles,
)


SINK_POSITIONS = 4  # the first tokens of a sequence draw huge activations, whatever they say (attention sinks)
FEW_TOKENS = 16  # of the calibration text: what fewer say of an expert of a mixture is noise, and its neurons keep their order
GRADIENT_BLOCKS = 6  # sequences that estimate the error weights: more do not change them
# Mean shares that the sensitivities drawn in training span, by the labels. Without the full width among them it drifts.
TRAINING_SHARES = (0.35, 1.0)


# The trap: autocast keeps casts of weights. Inside of it the reordered ones would be measured, and proved, by the old ones.
@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def convert_model(base: str | Path, out: str | Path, arguments: ConvertArguments | None = None, **settings: Any) -> dict:
    """
    Convert a dense model into a DynaMoE model folder.

    The neurons of every MLP are ranked on calibration text and reordered in place, so a full-width model computes what the
    dense one does; its logits are compared with the dense ones before anything is written, and again when the folder is
    loaded. Peak memory is the model, a layer, and the activations of one sequence, of one layer alone where all take over 2 GB.

    Args:
        base: Hub id or folder of a dense causal language model, or a `.gguf` file or its folder, which is dequantised.
        out: folder to write.
        arguments, settings: the fields of `ConvertArguments`, as one object or by name.

    Returns:
        The conversion record, also written to `conversion.json`: parity, calibration, versions.

    Raises:
        ValueError: the base cannot be converted, holds NaN, lacks weights, or full-width logits differ from the dense ones.
        FileExistsError: `out` exists.
        OSError: nothing can be written to `out`, another run is writing it, or the disk is full.
    """
    arguments = resolve(ConvertArguments, arguments, settings)
    if arguments.importance not in IMPORTANCES:
        raise ValueError(f"The importance {arguments.importance!r} is unknown. Choose one of {', '.join(IMPORTANCES)}.")
    with new_folder(out) as folder:
        model, tokenizer, record, (expected, *probe) = _converted(base, arguments)
        record["weights"] = save_model(model, folder)
        del model  # two at a time are more than there may be memory for
        tokenizer.save_pretrained(folder)
        written = load_model(folder)
        record["parity"] = prove_parity(expected, _logits(written, *probe), written.dtype)
        write_json(folder / CONVERSION, record)
    return record


def _converted(base, arguments: ConvertArguments) -> tuple[DynaMoEForCausalLM, PreTrainedTokenizerBase, dict, tuple]:
    """The model, its tokenizer, the record of the conversion, and the dense logits, token ids and routes to prove what is written."""
    importance, text = arguments.importance, arguments.text
    dense, tokenizer = load_dense(base, arguments.dtype)
    fields = {
        "expert_widths": [w if isinstance(w, float | int) else list(w) for w in arguments.widths],
        "similarity": arguments.similarity, "router_type": arguments.router_type, "router_dim": arguments.router_dim,
    }  # fmt: skip
    DynaMoEForCausalLM.config_for(dense, **fields)  # what cannot be converted is told before the long work
    block_size = min(arguments.block_size, _longest(dense))
    blocks = token_blocks(documents_for("calibration", text), tokenizer, block_size, arguments.max_tokens)
    check_ids(blocks, dense.config, tokenizer)
    probe = torch.randint(dense.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    routes: dict[int, tuple] = {}
    expected = _logits(dense, probe, routes)
    scores = IMPORTANCES[importance](dense, blocks)
    torch.manual_seed(arguments.seed)
    model = DynaMoEForCausalLM.from_dense(dense, **fields)
    for mlp, score in zip(tqdm(model.nested_mlps, desc="Reordering", leave=False), scores):
        mlp.layout.reorder(mlp, torch.argsort(score, descending=True, stable=True))
    prove_parity(expected, _logits(model, probe, routes), model.dtype)
    if model.is_mixture:  # at full width the base's own code runs; this runs ours, with every expert chosen
        prove_parity(expected, _logits(model, probe, routes, sensitivity=torch.ones(len(probe))), model.dtype)
    model.config.error_weights, model.config.train_sensitivity = scale_difficulty(model, blocks)

    record = {
        "base": _name(base),
        **({"gguf_file": gguf.name} if (gguf := gguf_file(base)) else {}),
        "importance": importance,
        "calibration": {"text": text_names(text), "tokens": blocks.numel(), "block_size": blocks.shape[1]},
        **({"routed_experts": _experts_seen(scores)} if model.is_mixture else {}),
        "seed": arguments.seed,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    model.config.base_config._name_or_path = _name(base)
    for name in CODE_FIELDS:  # the folder needs no code of the base
        vars(model.config.base_config).pop(name, None)
    return model, tokenizer, record, (expected, probe, routes)


def load_dense(base: str | Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A dense causal language model and its tokenizer, checked for what conversion needs, on this process's GPU if there is one.

    Raises:
        ValueError: not a causal language model, a DynaMoE model, adapters, damaged, missing or NaN weights, several GGUF files.
    """
    if gguf := gguf_file(base):
        dense = _load(gguf.parent, gguf_file=gguf.name, dtype=torch.float32 if dtype == "auto" else dtype)
        tokenizer = load_tokenizer(gguf.parent, gguf_file=gguf.name)
        _forget_gguf(dense)
    else:
        config = load_config(base)
        if config.model_type == "dynamoe":
            raise ValueError(f"{base} is a DynaMoE model already. Train or calibrate it, or convert its dense base.")
        dense_class_of(config)
        with torch.device("meta"):
            check_places(AutoModelForCausalLM.from_config(config))  # before weights that are not those of such a model
        quantised = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
        if quantised:
            method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
            raise ValueError(
                f"{base} is quantised, and a dense base must have plain weights: found {method}. Give the model before it was quantised, "
                "or its GGUF file."
            )
        dense, tokenizer = _load(base, dtype=dtype), load_tokenizer(base)
    if getattr(dense, "_hf_peft_config_loaded", False):
        dense = _with_adapters_merged(base, dense)
    if dense.config.is_encoder_decoder:  # `is_decoder` says nothing: GPT-NeoX has it False
        raise ValueError(f"{base} is a {dense.config.model_type} model, which is not a causal language model.")
    for name, parameter in dense.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{base} holds NaN or infinite numbers in `{name}`. Its weights are damaged: get them again.")
    return on_gpu(dense).eval(), tokenizer


def gguf_file(base: str | Path) -> Path | None:
    """The GGUF file that `base` is, or the one in the folder that it is. Raises `ValueError` where a folder holds several."""
    path = Path(base)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise ValueError(f"{base} holds {len(found)} GGUF files, found {names}. Give the path of one of them.")
    return found[0] if found else None


def _with_adapters_merged(base, loaded):
    """
    The model of a folder that holds merged weights and, still, their adapters, which `loaded` has on top once more. Raises
    `ValueError` where the weights are not those of the adapters' own base with the adapters merged.
    """
    from peft import PeftConfig, PeftModel

    written = {name.replace(".base_layer", "").replace(".original_module", ""): t for name, t in loaded.state_dict().items()}
    source = PeftConfig.from_pretrained(base).base_model_name_or_path
    try:
        merged = PeftModel.from_pretrained(_load(source, dtype=loaded.dtype), base).merge_and_unload()
        alike = all(name in written and _alike(written[name], tensor) for name, tensor in merged.state_dict().items())
    except (OSError, ValueError):  # their base is not to be had
        alike = False
    if not alike:
        raise ValueError(
            f"{base} holds adapters beside its weights, and it cannot be told whether they are merged: found adapter_config.json, and "
            f"the weights are not those of {source} with these adapters. If they are merged, delete the files adapter_*. If not, save "
            "`merge_and_unload()` of both into a new folder."
        )
    return merged


def _alike(one, other):
    """Whether two tensors differ by rounding alone."""
    return one.shape == other.shape and bool((one - other).abs().max() <= 4 * torch.finfo(one.dtype).eps * one.abs().max())


def _forget_gguf(dense):
    """The trap: a model loaded from GGUF refuses `save_pretrained`, though its weights are plain tensors by now."""
    for holder in (dense, dense.base_model):
        for name in ("hf_quantizer", "quantization_method", "is_quantized"):
            if name in vars(holder):
                delattr(holder, name)
    if hasattr(dense.config, "quantization_config"):
        del dense.config.quantization_config


def _longest(dense):
    return getattr(dense.config, "max_position_embeddings", None) or 1 << 30


def _name(base):
    """A Hub id as it is; of a folder, or that of a file, its name alone, since records travel and its place is nobody's business."""
    folder = Path(base).parent if Path(base).is_file() else Path(base)
    return folder.resolve().name if folder.is_dir() else str(base)


@torch.no_grad()
def _logits(model, probe, routes, **routing):
    """
    Logits of token ids. The experts of a mixture, and their weights, are those of the first pass, which `routes` keeps by layer. The
    trap: rounding decides between experts that weigh nearly the same, so passes that differ by rounding may differ by an expert.
    """

    def keep(layer, experts, args):
        return args[0], *routes.setdefault(layer, args[1:])

    places = enumerate(mlp_places(model.base_model))
    hooks = [place.mlp.register_forward_pre_hook(partial(keep, layer)) for layer, place in places if is_mixture(place.mlp)]
    try:
        return model(probe.to(model.device), **routing).logits.float().cpu()
    finally:
        for hook in hooks:
            hook.remove()


def _experts_seen(scores) -> dict[str, int]:
    """What the record says of a mixture: how many experts there are, and how many of them keep the base's order of neurons."""
    experts = torch.cat([score.flatten(0, -2) for score in scores if score.ndim > 1])
    return {"count": len(experts), "in_base_order": int((experts == 0).all(-1).sum())}


def prove_parity(expected: torch.Tensor, actual: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """
    Largest difference of full-width logits from the dense ones, relative to the largest logit.

    Reordered neurons are summed in another order, so the bound is that of the dtype's rounding, not zero.

    Raises:
        ValueError: the difference is beyond rounding.
    """
    difference = ((expected - actual).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    bound = max(1e-4, 8 * torch.finfo(dtype).eps)
    if not difference <= bound:
        raise ValueError(
            f"At full width the converted model does not equal its dense base: logits differ by {difference:.2g} of the largest, "
            f"and rounding explains {bound:.2g}. The family's MLP or head must differ from what is supported; nothing was written."
        )
    return {"largest_relative_difference": difference, "bound": bound, "tokens": expected.shape[0] * expected.shape[1]}


def scale_difficulty(model: DynaMoEForCausalLM, blocks: torch.Tensor) -> tuple[list[float], list[float]]:
    """
    Weights of the loss-weighted similarities and the range of sensitivities to train on, from calibration blocks.

    c_l is measured (`label.error_weights`) and all of them multiplied by one factor that puts the dial's middle,
    sensitivity 0.5, at a mean share of 75%. The range is that of the sensitivities which span `TRAINING_SHARES`.
    """
    weights = error_weights(model, blocks[:GRADIENT_BLOCKS])
    model.config.error_weights = weights
    profiles, shares = similarity_profiles(model, blocks), expert_shares(model)
    theta = sensitivity_for(profiles, shares, max(0.75, mean_share(profiles, shares, 0.0)))
    if model.config.weighs_loss and 0 < theta < 1:
        # 1 / (1 + c err) = theta  <=>  1 / (1 + c err theta / (1 - theta)) = 1/2
        factor = theta / (1 - theta)
        weights = [factor * weight for weight in weights]
        # Profiles of the scaled weights follow from the old ones, no second pass.
        profiles = 1 / (1 + factor * (1 / profiles.clamp_min(1e-12) - 1))
    spanned = TRAINING_SHARES if model.config.has_dial else (0.75, 0.75)
    return weights, [min(max(round(sensitivity_for(profiles, shares, share), 4), 1e-4), 0.9999) for share in spanned]


def _accumulate(dense, blocks, statistic, gradients=False):
    """
    Sum of `statistic(hidden (T, H), gradient or None, down weight) -> (H,)` over calibration tokens, for each layer: (H,), or (N, H) for
    the N experts of a mixture, where experts that see fewer than `FEW_TOKENS` have 0.
    """
    places = list(mlp_places(dense.base_model))
    layouts = [layout_at(place) for place in places]
    shapes = [(place.mlp.num_experts,) if is_mixture(place.mlp) else () for place in places]
    sizes = zip(shapes, layouts, places)
    scores = [torch.zeros((*shape, layout.width(place.mlp)), dtype=torch.float64) for shape, layout, place in sizes]
    seen = [torch.zeros(shape, dtype=torch.int64) for shape in shapes]

    def watch(index, down, expert, positions, hidden):
        kept = positions >= SINK_POSITIONS

        def add(hidden, gradient):
            hidden, gradient = (None if t is None else t.flatten(0, -2)[kept] for t in (hidden, gradient))
            scores[index][expert] += statistic(hidden.float(), gradient, down).double().cpu()
            seen[index][expert] += len(hidden)

        if gradients:
            values = hidden.detach()
            hidden.register_hook(lambda gradient: add(values, gradient.float()))
        else:
            add(hidden.detach(), None)

    with _watched(places, layouts, watch), gradients_of_activations(dense, blocks.shape[1]) if gradients else torch.no_grad():
        for block in tqdm(blocks, desc="Ranking neurons", leave=False):
            block = block.view(1, -1).to(dense.device)
            loss_backward(dense, block) if gradients else dense.base_model(block, use_cache=False)
    return [score if score.ndim == 1 else score * (rows >= FEW_TOKENS)[:, None] for score, rows in zip(scores, seen)]


@contextmanager
def _watched(places, layouts, watch):
    """Inside, `watch(layer, down weight, expert or (), positions (T,), hidden)` sees the activations of one sequence in every MLP."""

    def dense_hook(index, linear, args):
        watch(index, linear.weight, (), torch.arange(args[0].shape[-2], device=args[0].device), args[0])

    def mixture(index, experts, layout, x_TD, index_TK, weight_TK):
        y_TD, each = torch.zeros_like(x_TD), index_TK.shape[-1]
        for expert, rows in rows_by_expert(index_TK, experts.num_experts):
            tensors, tokens = layout.tensors(experts, expert), rows // each
            hidden = tensors.hidden(x_TD[tokens])
            watch(index, tensors.down, expert, tokens, hidden)
            y_TD = y_TD.index_add(0, tokens, (tensors.output(hidden) * weight_TK.flatten()[rows, None]).to(y_TD.dtype))
        return y_TD

    hooks = []
    try:
        for index, (place, layout) in enumerate(zip(places, layouts)):
            if is_mixture(place.mlp):
                place.mlp.forward = partial(mixture, index, place.mlp, layout)
            else:
                hooks.append(getattr(place.mlp, layout.down).register_forward_pre_hook(partial(dense_hook, index)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for place in filter(lambda place: is_mixture(place.mlp), places):
            vars(place.mlp).pop("forward", None)


def mean_activation(dense: PreTrainedModel, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Importance of each neuron: mean |h|, the paper's. Blocks (N, S) -> (H,) for each layer, of a mixture (N, H)."""
    return _accumulate(dense, blocks, lambda hidden, gradient, down: hidden.abs().sum(0))


def normalised_activation(dense: PreTrainedModel, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Importance of each neuron: |h| times the norm of its down column, as a share of the token's total. (H,) for each layer."""

    def statistic(hidden, gradient, down):
        size = hidden.abs() * down.float().norm(dim=0)
        return (size / size.sum(-1, keepdim=True).clamp_min(1e-12)).sum(0)

    return _accumulate(dense, blocks, statistic)


def taylor(dense: PreTrainedModel, blocks: torch.Tensor) -> list[torch.Tensor]:
    """Importance of each neuron: mean |h dL/dh|, the first-order change of the LM loss without it. (H,) for each layer."""
    return _accumulate(dense, blocks, lambda hidden, gradient, down: (hidden * gradient).abs().sum(0), gradients=True)


def taylor_share(dense: PreTrainedModel, blocks: torch.Tensor) -> list[torch.Tensor]:
    """
    Importance of each neuron: |h dL/dh| as a share of the token's total. (H,) for each layer. As `taylor`, but a few tokens with
    large gradients do not decide for all.
    """

    def statistic(hidden, gradient, down):
        effect = (hidden * gradient).abs()
        return (effect / effect.sum(-1, keepdim=True).clamp_min(torch.finfo(effect.dtype).tiny)).sum(0)

    return _accumulate(dense, blocks, statistic, gradients=True)


IMPORTANCES: dict[str, Callable] = {
    "activation": mean_activation,
    "normalised": normalised_activation,
    "taylor": taylor,
    "taylor_share": taylor_share,
}
