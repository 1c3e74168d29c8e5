# SPDX-License-Identifier: Apache-2.0
"""What a base costs before anything is downloaded: sizes, arithmetic, memory and hours, from its config alone."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from .arguments import HARDWARE, ConvertArguments, PlanArguments, resolve
from .convert import TRAINING_SHARES
from .folder import active_parameters, count_parameters, load_config
from .losses import LOGIT_ROWS
from .modeling import DynaMoEForCausalLM
from .modeling.dense_base import check_places, dense_class_of


TRAINED_SHARE = sum(TRAINING_SHARES) / 2  # of the MLPs, that tokens take on average while experts are trained
MOMENTS = 2  # numbers that AdamW keeps for each weight


def plan_base(base: str | Path, arguments: PlanArguments | None = None, **settings: Any) -> dict:
    """
    What a dense base, or a model folder, will cost as a DynaMoE model. No weights are read.

    Args:
        base: Hub id or folder, or a config.json.
        arguments, settings: the fields of `PlanArguments`, as one object or by name.

    Returns:
        `parameters` (`total`, which is the dense count, `mlp`, and `router`, which comes on top); for each of `budgets` active
        parameters, bytes and FLOPs of a token, and, where the bandwidth is known, the most tokens/s at which one sequence can be
        decoded; `training` with FLOPs, and `hours` where the hardware is known; `memory` of a training process in bytes, by what it
        is for, whole and divided by FSDP2; and the `assumptions`.

    Raises:
        ValueError: there is no such config, it cannot be converted, or the hardware is not known.
    """
    arguments = resolve(PlanArguments, arguments, settings)
    tflops, bandwidth = _hardware(arguments)
    if (least := min(arguments.budgets)) <= 0 or max(arguments.budgets) > 1:
        raise ValueError(f"Budgets are mean shares of the MLPs in (0, 1], found {least:g} to {max(arguments.budgets):g}.")
    model = _model(base)
    counts = count_parameters(model)
    counts["total"] -= counts["router"]
    config = model.config.base_config
    itemsize = getattr(torch, arguments.dtype).itemsize
    forward = {budget: _forward_flops(model, counts, budget, arguments.block_size) for budget in arguments.budgets}
    budgets = {}
    for budget, flops in forward.items():
        active = active_parameters(counts, budget)
        read = (active - _looked_up(model)) * itemsize
        budgets[f"{budget:g}"] = {"active_parameters": active, "bytes": active * itemsize, "forward_flops": flops}
        if bandwidth:
            budgets[f"{budget:g}"]["decoded_tokens_per_second"] = round(bandwidth * 1e9 / read, 1)
    return {
        "base": str(base) if not Path(base).exists() else Path(base).name,
        "family": config.model_type,
        "dtype": arguments.dtype,
        "parameters": counts,
        "budgets": budgets,
        "training": _training(model, counts, arguments, tflops),
        "memory": _memory(model, counts, arguments),
        "assumptions": _assumptions(arguments, tflops, bandwidth),
    }


def _hardware(arguments) -> tuple[float | None, float | None]:
    """TFLOPS and GB/s of one device, as far as they are known."""
    if arguments.hardware is None:
        return arguments.tflops, arguments.bandwidth
    if arguments.tflops or arguments.bandwidth:
        raise ValueError("Both hardware and its speed were given. Give one of them: `hardware`, or `tflops` and `bandwidth`.")
    if arguments.hardware not in HARDWARE:
        raise ValueError(
            f"The hardware is unknown: found {arguments.hardware!r}. Choose one of {', '.join(HARDWARE)}, or give `tflops` and `bandwidth`."
        )
    return HARDWARE[arguments.hardware]


def _model(base) -> DynaMoEForCausalLM:
    """The model without its weights."""
    config = load_config(base)
    with torch.device("meta"):
        if config.model_type == "dynamoe":
            return DynaMoEForCausalLM(config)
        dense_class_of(config)
        dense = AutoModelForCausalLM.from_config(config)
        check_places(dense)
        return DynaMoEForCausalLM.from_dense(dense, expert_widths=list(ConvertArguments.widths))


def _head_sizes(config) -> tuple[int, int]:
    """Numbers of one token in all queries, and in all keys."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size


def _looked_up(model) -> int:
    """Numbers of the embeddings, of tokens and of positions, of which a token reads one row and none multiplies; not those of a tied head."""
    head = model.get_input_embeddings() if model.config.base_config.tie_word_embeddings else None
    found = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not head]
    return sum(module.weight.numel() for module in found)


def _forward_flops(model, counts, share: float, context: int) -> int:
    """FLOPs of one token: two for each weight that multiplies, and attention to half of the context on average."""
    config = model.config.base_config
    attention = 2 * config.num_hidden_layers * context * _head_sizes(config)[0]
    return 2 * (active_parameters(counts, share) - _looked_up(model) + counts["router"]) + attention


def _training(model, counts, arguments, tflops) -> dict:
    student = _forward_flops(model, counts, TRAINED_SHARE, arguments.block_size)
    teacher = _forward_flops(model, counts, 1.0, arguments.block_size)
    flops = (4 if arguments.gradient_checkpointing else 3) * student + teacher
    found: dict[str, Any] = {"tokens": arguments.tokens, "flops_per_token": flops, "flops": flops * arguments.tokens}
    if tflops:
        speed = arguments.devices * tflops * 1e12 * arguments.utilisation
        found["hours"] = round(found["flops"] / speed / 3600, 3)
    return found


def _memory(model, counts, arguments) -> dict:
    """Bytes of one process that trains the layers: all of it, and with weights divided over the devices."""
    config, itemsize = model.config.base_config, getattr(torch, arguments.dtype).itemsize
    weights = counts["total"] + counts["router"]
    outer = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    trained = weights - sum(p.numel() for p in outer)
    tokens, (queries, keys) = arguments.batch_size * arguments.block_size, _head_sizes(config)
    # What backward needs of a layer: inputs and outputs of norms, projections, attention, and of the MLP's products.
    layer = tokens * (4 * model.nested_mlps[0].widths[-1] + 10 * config.hidden_size + 2 * (queries + keys))
    outputs = 2 * tokens * config.hidden_size * config.num_hidden_layers  # of each layer and of the teacher's
    kept = layer + outputs // 2 if arguments.gradient_checkpointing else layer * config.num_hidden_layers
    logits = 4 * min(LOGIT_ROWS, tokens) * config.vocab_size
    rest = {"activations": (kept + outputs) * itemsize + 4 * logits}

    def of(parts):
        whole = {"weights": weights, "gradients": trained, "optimizer": MOMENTS * trained, "teacher": weights}
        found = {name: -(-count // parts) * itemsize for name, count in whole.items()} | rest
        return {**found, "total": sum(found.values())}

    return {"whole": of(1), "divided": of(arguments.devices)}


def _assumptions(arguments, tflops, bandwidth) -> list[str]:
    found = [
        f"Training is the recipe's first phase: layers are trained at a mean share of {TRAINED_SHARE:.1%} of the MLPs, in sequences of "
        f"{arguments.block_size} tokens; backward takes twice the FLOPs of forward; a frozen teacher runs forward at full width.",
        f"Weights, gradients, AdamW's two moments and activations are {arguments.dtype}. Activations are an estimate, for "
        f"{arguments.batch_size} sequences a process.",
        f"Divided: FSDP2 over {arguments.devices} devices, all weights of one layer gathered at a time, which comes on top.",
    ]
    if tflops:
        found.append(
            f"{arguments.devices} devices of {tflops:g} TFLOPS each, of which {arguments.utilisation:.0%} are reached."
        )
    if bandwidth:
        found.append(
            f"Decoding one sequence reads the active weights once a token, at {bandwidth:g} GB/s; caches are not counted."
        )
    return found
