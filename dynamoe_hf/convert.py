# SPDX-License-Identifier: Apache-2.0
"""Dense model -> DynaMoE: rank the neurons, reorder them, add routers, prove parity."""

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
from .importance import IMPORTANCES, massive_experts
from .kept_sums import KeptSums, digest_of_tensors
from .label import error_weights
from .modeling import DynaMoEForCausalLM
from .modeling.configuration_dynamoe import CODE_FIELDS
from .modeling.dense_base import check_places, dense_class_of, mlp_places
from .modeling.moe_base import is_mixture
from .observe import (
    expert_shares,
    mean_share,
    sensitivity_for,
    similarity_profiles,
)


CUT_STEP = 8  # neurons, in which experts are cut
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
    While the neurons are ranked, the longest part, `OUT.ranking.safetensors` keeps what is known so far: the same call goes on from there.

    Args:
        base: Hub id or folder of a dense causal language model, or a `.gguf` file or its folder, which is dequantised.
        out: folder to write.
        arguments, settings: the fields of `ConvertArguments`, as one object or by name.

    Returns:
        The conversion record, also written to `conversion.json`: parity, calibration, versions.

    Raises:
        ValueError: the base cannot be converted, holds NaN, lacks weights, or full-width logits differ from the dense ones.
        FileExistsError: `out` exists, or a ranking for it that was begun with other settings.
        OSError: nothing can be written to `out`, another run is writing it, or the disk is full.
    """
    arguments = resolve(ConvertArguments, arguments, settings)
    if arguments.importance not in IMPORTANCES:
        raise ValueError(f"The importance {arguments.importance!r} is unknown. Choose one of {', '.join(IMPORTANCES)}.")
    ranking = Path(out).with_name(f"{Path(out).name}.ranking.safetensors")
    try:
        with new_folder(out) as folder:
            model, tokenizer, record, (expected, *probe) = _converted(base, arguments, ranking)
            record["weights"] = save_model(model, folder)
            del model  # two at a time are more than there may be memory for
            tokenizer.save_pretrained(folder)
            written = load_model(folder)
            record["parity"] = prove_parity(expected, _logits(written, *probe), written.dtype)
            write_json(folder / CONVERSION, record)
    except ValueError:  # which the same call would meet again
        ranking.unlink(missing_ok=True)
        raise
    ranking.unlink(missing_ok=True)
    return record


def _converted(
    base, arguments: ConvertArguments, ranking: Path
) -> tuple[DynaMoEForCausalLM, PreTrainedTokenizerBase, dict, tuple]:
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
    if arguments.cut and not any(is_mixture(place.mlp) for place in mlp_places(dense.base_model)):
        raise ValueError(
            f"Only experts of a mixture can be cut: found cut={arguments.cut:g}, and no mixture in {base}. Leave it out."
        )
    probe = torch.randint(dense.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    routes: dict[int, tuple] = {}
    expected = _logits(dense, probe, routes)
    settings = {
        "importance": importance,
        "text": f"{blocks.numel()} tokens in blocks of {blocks.shape[1]} ({digest_of_tensors([blocks])})",
        "weights": f"{dense.dtype} ({digest_of_tensors(dense.parameters())})".removeprefix("torch."),
    }
    scores = IMPORTANCES[importance](dense, blocks, KeptSums(ranking, settings))
    massive = massive_experts(dense, blocks) if arguments.cut else []
    torch.manual_seed(arguments.seed)
    model = DynaMoEForCausalLM.from_dense(dense, **fields)
    for mlp, score in zip(tqdm(model.nested_mlps, desc="Reordering", leave=False), scores):
        mlp.layout.reorder(mlp, torch.argsort(score, descending=True, stable=True))
    prove_parity(expected, _logits(model, probe, routes), model.dtype)
    if model.is_mixture:  # at full width the base's own code runs; this runs ours, with every expert chosen
        prove_parity(expected, _logits(model, probe, routes, sensitivity=torch.ones(len(probe))), model.dtype)
    if arguments.cut:  # what is written is proved to be what was cut
        cut_experts(model, scores, massive, arguments.cut)
        expected = _logits(model, probe, routes)
    model.config.error_weights, model.config.train_sensitivity = scale_difficulty(model, blocks)

    record = {
        "base": _name(base),
        **({"gguf_file": gguf.name} if (gguf := gguf_file(base)) else {}),
        "importance": importance,
        "calibration": {"text": text_names(text), "tokens": blocks.numel(), "block_size": blocks.shape[1]},
        **({"routed_experts": _experts_seen(scores) | _experts_cut(model, massive)} if model.is_mixture else {}),
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


def _experts_cut(model, massive) -> dict[str, Any]:
    """What the record says of a mixture whose experts were cut: the part that is gone, and how many experts keep all as massive ones."""
    cuts = [(mlp.cut_widths, mlp.widths[-1]) for mlp in model.nested_mlps if is_mixture(mlp) and mlp.cut_widths]
    if not cuts:
        return {}
    left = sum(map(sum, (widths for widths, _ in cuts))) / sum(len(widths) * full for widths, full in cuts)
    return {"cut": round(1 - left, 4), "massive": sum(int(each.sum()) for each in massive)}


def cut_experts(model: DynaMoEForCausalLM, scores: list[torch.Tensor], massive: list[torch.Tensor], part: float) -> None:
    """
    Cut this part of the neurons of each layer's experts off for good: those of the lowest scores (N, H), whose order the model has. Experts
    that are massive (N,), or whose scores are 0, keep all, and the others at least their smallest width that is not 0.
    """
    cuts: list = []
    for mlp, score, kept in zip(model.nested_mlps, scores, massive):
        if not is_mixture(mlp):
            cuts.append(None)
            continue
        score = score.sort(-1, descending=True).values
        score[kept | (score == 0).all(-1)] = torch.inf
        count = min(round(part * score.numel()), int(score.isfinite().sum()))
        highest = score.flatten().sort().values[count - 1] if count else -torch.inf  # of those that are cut
        least = next(width for width in mlp.widths if width)
        steps = [-(-left // CUT_STEP) * CUT_STEP for left in (score > highest).sum(-1).tolist()]
        cuts.append([min(max(width, least), mlp.widths[-1]) for width in steps])
        mlp.cut_widths = cuts[-1]
        mlp.layout.cut(mlp, mlp.cut_widths)
    model.config.cut_widths = cuts


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
