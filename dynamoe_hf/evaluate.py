# SPDX-License-Identifier: Apache-2.0
"""Quality at a setting of the dial: perplexity against the dense base on the same tokens, use of experts, lm-eval tasks."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
import transformers
from tqdm.auto import tqdm

from .arguments import Baseline, EvaluateArguments, resolve
from .card import WAIT, check_records, new_records
from .convert import load_dense
from .data import check_ids, documents_for, text_names, token_blocks
from .export import one_width
from .folder import (
    RESULTS,
    active_parameters,
    check_writable,
    count_parameters,
    load_dynamoe_config,
    load_model,
    load_tokenizer,
    read_json,
    write_json,
)
from .modeling.checks import check_sensitivity
from .modeling.sparsity import density_at
from .observe import expert_shares, sensitivity_for, shares_read, similarity_profiles, watch


# The set of the literature on dynamic computation, with its numbers of examples in the prompt.
TASKS = {"arc_easy": 0, "lambada_openai": 0, "piqa": 0, "winogrande": 0, "mmlu": 5, "hellaswag": 10}
BASELINES = get_args(Baseline)


def evaluate_model(folder: str | Path, arguments: EvaluateArguments | None = None, **settings: Any) -> list[dict]:
    """
    Evaluate one or more settings of the dial on the same tokens, and add the entries to the folder's `results.json`.

    Args:
        folder: model folder or Hub id; results are kept where it is a folder.
        arguments, settings: the fields of `EvaluateArguments`, as one object or by name.
            Of its baselines, `"static"` is a prefix of the same share for every token, `"random"` draws experts with the routers'
            own frequencies in each layer, and `"label"` takes the true labels (an oracle); its task `"literature"` is `TASKS`.

    Returns:
        One entry a setting: `perplexity` with a 95% interval over blocks, `tokens`, `mean_share` (of the MLPs' weights that a token
        reads), `active_parameters`,
        `mean_width` (the share that routing alone leaves), `expert_use` (L x E shares of the tokens), `router_agreement` with the labels (which routers that learned by choosing
        follow less, and do better), and with a base `ratio_to_dense` with a paired interval.

    Raises:
        ValueError: more than one kind of setting, an uncalibrated budget, or too little text.
    """
    arguments = resolve(EvaluateArguments, arguments, settings)
    base, baselines, text, tasks = arguments.base, arguments.baselines, arguments.text, arguments.tasks
    block_size, batch_size = arguments.block_size, arguments.batch_size
    dial = (arguments.budget, arguments.sensitivity, arguments.force_expert)
    if sum(value is not None for value in dial) > 1:
        raise ValueError("More than one of budget, sensitivity and force_expert was given. Give one of them.")
    if unknown := set(baselines) - set(BASELINES):
        raise ValueError(f"Unknown baselines {', '.join(unknown)}. Choose from {', '.join(BASELINES)}.")
    check_writable(folder)
    check_records(folder)  # damaged files are told before the work whose results they should take
    tokenizer = load_tokenizer(folder)
    config = load_dynamoe_config(folder)
    routings = _settings(config, *dial)
    blocks = token_blocks(documents_for("held-out", text), tokenizer, block_size, arguments.max_tokens)
    check_ids(blocks, config, tokenizer)
    if len(blocks) < 2:
        raise ValueError(
            f"One block of {block_size} tokens gives no interval. Give more text or tokens, or a smaller --block-size."
        )
    dense_nll = None
    if base is not None:
        dense, _ = load_dense(base)
        dense_nll = block_nll(dense, blocks, batch_size, "Dense base")
        del dense  # before ours is loaded: a GPU may have room for one of them
    model = load_model(folder)
    named = "pydoc_data.topics (held-out)" if text is None else text_names(text)
    entries = []
    for name, routing in routings:
        entry, found = _evaluation(model, blocks, batch_size, name, routing, dense_nll)
        entry["text"] = named
        entry["baselines"] = {
            kind: _baseline(model, blocks, batch_size, kind, routing, found, dense_nll) for kind in baselines
        }
        if tasks:
            with model.routing(**routing):
                entry["tasks"] = run_tasks(model, tokenizer, tasks, arguments.task_limit, batch_size)
        entry["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        entries.append(entry)
    if Path(folder).is_dir():
        _keep(folder, entries)
    return entries


def _keep(folder, entries):
    """Add entries to the results of a folder, in place of those of the same settings and text."""
    with new_records(folder, wait=WAIT) as staging:
        kept = (read_json(Path(folder) / RESULTS) or {"evaluations": []})["evaluations"]
        replaced = {(entry["setting"], str(entry["text"])) for entry in entries}
        kept = [entry for entry in kept if (entry["setting"], str(entry["text"])) not in replaced]
        write_json(staging / RESULTS, {"evaluations": kept + entries})


def _evaluation(model, blocks, batch_size, name, routing, dense_nll):
    """The entry of one setting of the dial, and what was seen at it."""
    full = routing.get("force_expert") is not None
    found = routed_nll(model, blocks, batch_size, needs_labels=not full, description=name, **routing)
    nll, use, share, counts = found.nll, found.use, found.share, count_parameters(model)
    width = (use * expert_shares(model)).sum(-1).mean().item()
    entry = {
        "setting": name, **routing, "text": None, "tokens": nll.numel() * (blocks.shape[1] - 1), "block_size": blocks.shape[1],
        **_perplexity(nll), "mean_share": round(share, 4), "mean_width": round(width, 4),
        "active_parameters": active_parameters(counts, share), "total_parameters": counts["total"],
        "expert_use": [[round(v, 4) for v in row] for row in use.tolist()], "router_agreement": found.agreement,
    }  # fmt: skip
    if dense_nll is not None:
        entry |= {"dense_perplexity": math.exp(dense_nll.mean().item()), **ratio_to(nll, dense_nll)}
    return entry, found


def _settings(config, budget, sensitivity, force_expert):
    """(name, fields of `Routing`) of each setting to evaluate."""

    def many(value):
        return value if isinstance(value, Sequence) else [value]

    if budget is not None:
        return [(f"budget {b:g}", {"sensitivity": config.sensitivity_of(b)}) for b in many(budget)]
    if force_expert is not None:
        type(config)(**{**config.to_dict(), "force_expert": force_expert})  # the same check as when loading
        return [(f"expert {force_expert}", {"force_expert": force_expert})]
    if sensitivity is None and config.force_expert is not None:
        return [(f"expert {config.force_expert}", {"force_expert": config.force_expert})]
    values = many(config.sensitivity if sensitivity is None else sensitivity)
    for value in values:
        check_sensitivity(value)
    return [(f"sensitivity {value:.4g}", {"sensitivity": value}) for value in values]


def _perplexity(nll):
    """Perplexity and its 95% interval, from the mean negative log-likelihood of each block (N,)."""
    mean, error = nll.mean().item(), _standard_error(nll)
    if not mean + 1.96 * error < 700:  # also where it is NaN; `exp` of more is no float
        raise ValueError(
            f"The model says nothing about this text: found a loss of {mean:.3g} a token. Look whether its weights and its tokenizer "
            "are those that belong together (`dynamoe inspect FOLDER --verify`)."
        )
    return {
        "perplexity": math.exp(mean),
        "perplexity_interval": [math.exp(mean - 1.96 * error), math.exp(mean + 1.96 * error)],
    }


def ratio_to(nll, dense_nll):
    """Ratio of perplexities on the same blocks, and its 95% interval: paired, so what makes a block hard cancels."""
    difference = nll - dense_nll
    mean, error = difference.mean().item(), _standard_error(difference)
    return {"ratio_to_dense": math.exp(mean), "ratio_interval": [math.exp(mean - 1.96 * error), math.exp(mean + 1.96 * error)]}


def _standard_error(values):
    return values.std().item() / math.sqrt(len(values))


def block_nll(model, blocks: torch.Tensor, batch_size: int = 4, description: str = "Evaluating", **options) -> torch.Tensor:
    """Mean negative log-likelihood of each block's tokens under any causal language model: (N, S) -> (N,) float64."""
    batches = tqdm(blocks.split(batch_size), desc=description, leave=False)
    return torch.tensor([value for batch in batches for value in _nll_of(model, batch, **options)], dtype=torch.float64)


@torch.no_grad()
def _nll_of(model, batch, **options):
    batch = batch.to(model.device)
    logits = model(batch, use_cache=False, **options).logits
    # One sequence at a time: float32 logits of a batch would be the largest tensor.
    return [F.cross_entropy(row[:-1].float(), ids[1:]).item() for row, ids in zip(logits, batch)]


class RoutedLoss(NamedTuple):
    """What `routed_nll` saw."""

    nll: torch.Tensor  # (N,) mean negative log-likelihood of each block's tokens, float64
    use: torch.Tensor  # (L, E) share of the tokens that take each expert
    share: float  # mean share of the MLPs' weights that a token reads
    agreement: float | None  # of the routers with the labels


def routed_nll(model, blocks, batch_size=4, needs_labels=False, description="Evaluating", **routing) -> RoutedLoss:
    """
    Run a DynaMoE model on blocks (N, S) with `routing` (fields of `Routing`). `agreement` is None without `needs_labels`.
    """
    experts, values, agreement, read = model.config.expert_count, [], [], []
    use = torch.zeros(len(model.nested_mlps), experts)

    def run(batch):
        values.extend(_nll_of(model, batch))

    for records in watch(model, blocks, batch_size, description, run, needs_labels=needs_labels, **routing):
        read.append(shares_read(model, records).mean((0, 2)))
        for index, record in enumerate(records):
            use[index] += torch.bincount(record.expert.flatten().cpu(), minlength=experts)
            if needs_labels:
                agreement.append(torch.eq(record.expert, record.label).flatten().float().cpu())
    mean = torch.cat(agreement).mean().item() if agreement else None
    nll = torch.tensor(values, dtype=torch.float64)
    return RoutedLoss(nll, use / use.sum(-1, keepdim=True), torch.cat(read).mean().item(), mean)


def _baseline(model, blocks, batch_size, kind, routing, found: RoutedLoss, dense_nll):
    """One baseline with the weights of `model`, at the mean share of the setting at which `found` was seen."""
    shares, share = expert_shares(model), found.share
    if kind == "static":
        with one_width(model, share):
            nll, reached = block_nll(model, blocks, batch_size, f"Static {share:.2f}", force_expert=0), share
    else:
        if kind == "label":  # theta of the labels that gives them the same share as the routers
            profiles, width = similarity_profiles(model, blocks, batch_size), (found.use * shares).sum(-1).mean().item()
            routing = {
                **_density_of(model, routing),
                "route": "label",
                "sensitivity": sensitivity_for(profiles, shares, width),
            }
        else:
            routing = {**_density_of(model, routing), "route": "random", "histogram": found.use}
        torch.manual_seed(0)
        run = routed_nll(model, blocks, batch_size, description=kind.capitalize(), **routing)
        nll, reached = run.nll, run.share
    return {**_perplexity(nll), "mean_share": round(reached, 4), **({} if dense_nll is None else ratio_to(nll, dense_nll))}


def _density_of(model, routing) -> dict:
    """The density of a setting of the dial, as a field of `Routing`."""
    if model.config.thresholds is None or routing.get("sensitivity") is None:
        return {}
    return {"density": density_at(model.config.density_path, routing["sensitivity"])}


def run_tasks(model, tokenizer, tasks, limit=None, batch_size=4) -> dict:
    """
    lm-evaluation-harness on any causal language model, under the routing in force: {task: {metric: value}}. `"literature"`
    stands for `TASKS`, whose data is downloaded; a path names a local task file, which needs no network.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Tasks need lm-evaluation-harness ({error}). Install it: `pip install 'dynamoe_hf[eval]'`."
        ) from error
    wanted = [name for task in tasks for name in (TASKS if task == "literature" else [task])]
    local = {Path(name).parent for name in wanted if name.endswith(".yaml")}
    online = any(not name.endswith(".yaml") for name in wanted)
    manager = TaskManager(include_path=[str(folder) for folder in local] or None, include_defaults=online)
    results = {}
    for name in wanted:
        task = Path(name).stem if name.endswith(".yaml") else name
        out = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=[task], num_fewshot=TASKS.get(name), task_manager=manager, limit=limit, bootstrap_iters=0,
        )  # fmt: skip
        metrics = out["results"][task]
        results[task] = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    return results
