# SPDX-License-Identifier: Apache-2.0
"""
Bases that are mixtures: what narrower experts save.

    python benchmarks/mixtures.py layer [--threads 1]
    python benchmarks/mixtures.py smollm2 BASE WORK --text TRAIN... --held-out TEXT...

`layer`: the experts of one layer of Qwen3-30B-A3B's shape (hidden size 2048, 128 experts of 768 neurons, 8 for a token, random weights,
float32) at 512 tokens and at one, beside the implementations of transformers on the same tensors, after a check that all give the same
numbers. Half of the active weights is read in three ways: one width for all pairs; widths that the layer's router chooses at a place of
the dial, its own time included; and widths drawn evenly from a quarter, a half and three quarters, the worst case, for each expert then
reads most of its rings. With `pack("rows")` and without. Ratios are times over those of the fastest implementation of transformers, the
median of rounds in turn.

`smollm2`: no mixture of a useful size is small enough for a CPU, so one is made of a dense Llama-style model, BASE (`dense_to_mixture.py`),
and learns from it. Then quality against active weights of its experts, the shared one included, at 75 and 50%: `top-k`, fewer experts a
token; `pruned`, the experts whose weighted outputs are smallest on the training text left out, and not replaced; `ours`, nested experts
trained by our recipe with sparsity, the shared one included, and at full width; `ours, null`, the same with a ladder that starts at 0.
In `top-k` and `pruned` the shared expert stays whole, so routed ones take the whole saving. Ratios are perplexities over the mixture's own
on held-out text, with 95% intervals over paired blocks; between two places of `top-k` or `pruned` the losses are interpolated. What is
finished lies in WORK and is not done again.
"""

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from dense_to_mixture import EXPERTS, activate, distil, make_mixture
from transformers import AutoModelForCausalLM, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dynamoe_hf import DynaMoEConfig, calibrate_budgets, convert_model, train_model
from dynamoe_hf.benchmark import interleaved, machine, torch_threads
from dynamoe_hf.convert import load_dense
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import block_nll, ratio_to, routed_nll
from dynamoe_hf.folder import load_model, new_folder, read_json, save_model, write_json
from dynamoe_hf.modeling.dense_base import MLPPlace, mlp_places
from dynamoe_hf.modeling.mlp_backends import Decision
from dynamoe_hf.modeling.moe_base import layout_at, rows_by_expert
from dynamoe_hf.modeling.nested_moe import nest_experts
from dynamoe_hf.modeling.routing import Routing, RoutingSlot
from dynamoe_hf.observe import bisect_rising


QWEN3_30B_A3B = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
BUDGETS = (0.75, 0.5)  # of the active weights of experts
SHARES = (1.0, *BUDGETS)
LADDERS = {"ours": [0.25, 0.5, 0.75, 1.0], "ours, null": [0.0, 0.25, 0.5, 1.0]}
MADE = "mixture.json"
INPUTS = 8  # which take turns, so that one token finds its experts in no cache


def nested_layer() -> Any:
    """The block of the base, its experts nested; weights are random."""
    config = Qwen3MoeConfig(**QWEN3_30B_A3B, num_hidden_layers=1, norm_topk_prob=True)
    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(config).eval()
    block.to_empty(device="cpu")
    for parameter in block.parameters():
        torch.nn.init.uniform_(parameter, -0.03, 0.03)
    block.experts = nest_experts(MLPPlace(block, "experts", "experts"), DynaMoEConfig(base_config=config), 0, RoutingSlot())
    block.experts.router.reset()
    torch.nn.init.normal_(block.experts.router.output.weight)
    return block


def drawn(block, tokens):
    """Inputs of the experts, each of `tokens` tokens: x (T, D), the index and the weights of experts (T, K)."""
    generator = torch.Generator().manual_seed(tokens)
    for _ in range(INPUTS):
        x = torch.randn(tokens, block.gate.hidden_dim, generator=generator)
        _, weight, index = block.gate(x)
        yield x, index, weight


def widths_drawn(experts, index):
    """A quarter, a half and three quarters equally often: (T, K) -> (1, T, K)."""
    order = torch.rand(index.numel(), generator=torch.Generator().manual_seed(0)).argsort()
    return (order % (len(experts.widths) - 1)).view(1, *index.shape)


def of_transformers(experts, name, x, index, weight):
    """The experts by one of transformers' implementations."""
    experts.config._experts_implementation = name
    return type(experts).__bases__[1].forward(experts, x, index, weight)


def routed(experts, routing, x, index, weight):
    """The experts as a model calls them, with one routing for all of its layers."""
    experts.slot.exchange(replace(routing, shape=torch.Size((1, len(x)))))
    return experts(x, index, weight)


def own(experts, decide, x, index, weight):
    """The experts at widths that are given."""
    return experts.run(x[None], index[None], weight[None], Decision(decide(index)))


def in_turn(run: Callable, inputs: list) -> list[Callable]:
    """One step for `interleaved`, which takes the inputs in turn."""
    each = cycle(inputs)
    return [lambda: run(*next(each))]


def check_parity(experts, inputs):
    """All implementations, and ours at full width for each pair, give the same numbers, but for rounding."""
    expected = of_transformers(experts, "eager", *inputs)
    found = {name: of_transformers(experts, name, *inputs) for name in IMPLEMENTATIONS[1:]}
    found["ours"] = own(experts, lambda index: torch.full_like(index, len(experts.widths) - 1), *inputs)
    for name, y in found.items():
        error = ((y - expected).norm() / expected.norm()).item()
        assert error < 1e-5, f"{name} differs by {error:.2g}"


def time_layer(block: Any, tokens: int, rounds: int, name: str) -> dict[str, dict]:
    """Times over those of the fastest implementation of transformers, by what was run, with the share of the weights that it reads."""
    experts, inputs = block.experts, list(drawn(block, tokens))
    few = [tuple(tensor[:8] for tensor in each) for each in inputs]  # `batched_mm` copies the weights of each pair
    check_parity(experts, few[0])
    tried = IMPLEMENTATIONS if tokens == 1 else ("eager", "grouped_mm")
    runs = {each: in_turn(partial(of_transformers, experts, each), inputs) for each in tried}
    times = {tried[0]: 1.0} | {
        each: row["ratio"] for each, row in interleaved(runs, rounds // 2, f"{name}: transformers").items()
    }
    fastest = min(times, key=times.__getitem__)
    shares = torch.tensor(experts.shares)

    def share_at(sensitivity):
        routing = Routing(sensitivity=sensitivity)
        taken = [experts.decide(*(tensor[None] for tensor in each), routing).expert for each in inputs]
        return torch.stack([shares[expert].mean() for expert in taken]).mean().item()

    theta = bisect_rising(share_at, 0.5, 0.0, 1.0, rounds=20)
    half = experts.shares.index(0.5)
    runs = {
        f"transformers, {fastest}": in_turn(partial(of_transformers, experts, fastest), inputs),
        "full width": in_turn(partial(routed, experts, Routing(sensitivity=1.0)), inputs),
        "half, one width": in_turn(partial(routed, experts, Routing(force_expert=half)), inputs),
        "half, by the router": in_turn(partial(routed, experts, Routing(sensitivity=theta)), inputs),
        "half, drawn": in_turn(partial(own, experts, partial(widths_drawn, experts)), inputs),
    }
    read = {"full width": 1.0, "half, one width": 0.5, "half, by the router": share_at(theta)}
    read["half, drawn"] = shares[widths_drawn(experts, inputs[0][1])].mean().item()
    rows = interleaved(runs, rounds, name)
    return {f"{name}: {case}": {"over": fastest, "share": read[case], **row} for case, row in rows.items()}


@torch.no_grad()
def layer(args) -> dict[str, dict]:
    """All cases, the experts as they are and then packed."""
    block = nested_layer()
    rows = {}
    for packed in (False, True):
        if packed:
            block.experts.layout.lay_by_neuron(block.experts)
        for tokens, rounds in ((1, 10 * args.rounds), (512, args.rounds)):
            name = f"{tokens} token{'s' if tokens > 1 else ''}{', packed' if packed else ''}"
            rows |= time_layer(block, tokens, rounds, name)
    return rows


def mixture_folder(args, tokenizer, dense, blocks: torch.Tensor) -> Path:
    """The mixture made of the dense model and trained, as a model folder."""
    folder = args.work / "mixture"
    if not folder.exists():
        mixture, routers = make_mixture(dense, blocks[: args.cluster_tokens // blocks.shape[1]])
        error = (mixture(blocks[:1]).logits - dense(blocks[:1]).logits).norm() / dense(blocks[:1]).logits.norm()
        assert error < 1e-3, f"with all experts the mixture differs from the dense model by {error:.2g}"
        activate(mixture, routers, args.per_token)
        with torch.enable_grad():
            settings = {"per_device_train_batch_size": args.batch_size, "learning_rate": args.learning_rate, "bf16": args.bf16}
            loss = distil(mixture, dense, blocks, args.work / "distillation", **settings)
        with new_folder(folder) as staging:
            save_model(mixture, staging)
            tokenizer.save_pretrained(staging)
            write_json(staging / MADE, {"tokens": blocks.numel(), "loss": loss, "per_token": args.per_token})
    return folder


@contextmanager
def gated(mixture: Any, keep: Callable[[int, torch.Tensor], torch.Tensor], taken: list):
    """Inside, a chosen expert counts where `keep(layer, index (T, K))` says so; `taken` gets the mean share of those that do."""

    def rule(layer, module, args, output):
        logits, weight, index = output
        kept = keep(layer, index).expand_as(index)
        taken.append(kept.float().mean().item())
        return logits, weight * kept, index

    gates = [layer.mlp.gate for layer in mixture.model.layers]
    hooks = [gate.register_forward_hook(partial(rule, layer)) for layer, gate in enumerate(gates)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def sizes_of_outputs(mixture: Any, blocks: torch.Tensor) -> torch.Tensor:
    """Of each layer and expert the sum over tokens of the size of its weighted output, on token ids (N, S): (L, experts)."""
    places = list(mlp_places(mixture.model, shared_in=[]))
    sizes = torch.zeros(len(places), EXPERTS)

    def add(layer, experts, args):
        x_TD, index_TK, weight_TK = args
        for expert, rows in rows_by_expert(index_TK, EXPERTS):
            tensors = layout_at(places[layer]).tensors(experts, expert)
            output = tensors.output(tensors.hidden(x_TD[rows // index_TK.shape[1]]))
            sizes[layer, expert] += (output.norm(dim=1) * weight_TK.flatten()[rows]).sum()

    hooks = [place.mlp.register_forward_pre_hook(partial(add, layer)) for layer, place in enumerate(places)]
    block_nll(mixture, blocks, description="Sizes of outputs")
    for hook in hooks:
        hook.remove()
    return sizes


def without_training(mixture: Any, calibration: torch.Tensor, blocks: torch.Tensor) -> dict[str, list[tuple]]:
    """(share of the routed weights, loss of each block) of `top-k` and `pruned`, from the whole mixture down."""
    found, per_token = {}, mixture.config.num_experts_per_tok
    smallest = sizes_of_outputs(mixture, calibration).argsort(1)

    def places(name, rules):
        for keep in rules:
            taken: list[float] = []
            with gated(mixture, keep, taken):
                nll = block_nll(mixture, blocks, description=name)
            found.setdefault(name, []).append((sum(taken) / len(taken), nll))

    places("top-k", [lambda _, index, k=k: torch.arange(index.shape[1]) < k for k in range(per_token, 0, -1)])
    dropped = [smallest[:, :count] for count in range(EXPERTS)]
    places("pruned", [lambda layer, index, gone=gone: ~torch.isin(index, gone[layer]) for gone in dropped])
    return found


def between(places: list[tuple], share: float) -> torch.Tensor | None:
    """The losses of the blocks at a share, linear between the two places around it; `None` where there are none."""
    for (high, above), (low, below) in zip(places, places[1:]):
        if low <= share <= high:
            part = (share - low) / max(high - low, 1e-12)
            return below + part * (above - below)
    return None


def nested_folder(args, name: str, mixture: Path, budgets: list[float]) -> Path:
    """Our recipe on the mixture: converted, trained, calibrated."""
    converted, folder = (args.work / f"{name.replace(', ', '-')}-{stage}" for stage in ("converted", "trained"))
    text = {"text": args.text, "block_size": args.block_size}
    with torch.enable_grad():
        if not converted.exists():
            convert_model(mixture, converted, widths=LADDERS[name], max_tokens=args.cluster_tokens, **text)
        if not folder.exists():
            routers = min(args.router_tokens, args.tokens)
            settings = {"batch_size": args.batch_size, "bf16": args.bf16, "logit_fraction": 0.5}
            train_model(converted, folder, max_tokens=args.tokens, router_tokens=routers, **settings, **text)
        calibrate_budgets(folder, budgets=budgets, max_tokens=args.cluster_tokens, **text)
    return folder


@torch.no_grad()
def smollm2(args) -> dict:
    """Quality against active weights, of every contender."""
    (dense, tokenizer), size = load_dense(args.base, "float32"), args.block_size
    dense.cpu()
    training = token_blocks(documents_for("training", args.text), tokenizer, size, max(args.tokens, args.mixture_tokens))
    blocks = token_blocks(documents_for("held-out", args.held_out), tokenizer, size, args.eval_tokens)
    folder = mixture_folder(args, tokenizer, dense, training[: args.mixture_tokens // size])
    dense_nll = block_nll(dense, blocks, description="Dense")
    mixture: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    config = mixture.config
    shared, routed = config.shared_expert_intermediate_size, config.num_experts_per_tok * config.moe_intermediate_size
    parts = {share: (share * (shared + routed) - shared) / routed for share in SHARES}  # of the routed weights
    own = block_nll(mixture, blocks, description="Mixture")
    calibration = training[: args.cluster_tokens // size]
    places = without_training(mixture, calibration, blocks)
    rows: dict[str, dict] = {
        name: {share: between(found, part) for share, part in parts.items()} for name, found in places.items()
    }
    for name in args.contenders:
        model = load_model(nested_folder(args, name, folder, list(BUDGETS)))
        for share in SHARES:
            sensitivity = model.config.sensitivity_of(share) if share < 1 else 1.0
            seen = routed_nll(model, blocks, description=name, sensitivity=sensitivity)
            rows.setdefault(name, {})[share] = seen.nll
            rows[name][f"reached at {share:g}"] = round(seen.share, 4)
    table = {
        name: {str(share): ratio_to(nll, own) if isinstance(nll, torch.Tensor) else nll for share, nll in found.items()}
        for name, found in rows.items()
    }
    about = {
        "made": read_json(folder / MADE),
        "active_share_of_dense": (shared + routed) / (shared + EXPERTS * config.moe_intermediate_size),
    }
    return {"mixture": {**about, **ratio_to(own, dense_nll)}, "contenders": table}


def print_smollm2(found: dict) -> None:
    """The table, a line a contender."""
    print(f"mixture over dense: {found['mixture']['ratio_to_dense']:.3f}")
    for name, cells in found["contenders"].items():
        ratios = [cells[str(share)] for share in SHARES]
        texts = [
            "none" if r is None else f"{r['ratio_to_dense']:.3f} ({' to '.join(f'{v:.3f}' for v in r['ratio_interval'])})"
            for r in ratios
        ]
        print(f"{name:12}", *(f"{share:.0%}: {text:24}" for share, text in zip(SHARES, texts)))


def print_layer(rows: dict) -> None:
    """The times, a line a case."""
    for name, row in rows.items():
        low, high = row["range"]
        print(f"{name:40} {row['ratio']:.3f} ({low:.3f} to {high:.3f}) {row['ratio'] / row['share']:.3f} of the ideal")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    kinds = parser.add_subparsers(dest="what", required=True)
    timed = kinds.add_parser("layer")
    timed.add_argument("--rounds", type=int, default=9)
    made = kinds.add_parser("smollm2")
    made.add_argument("base", help="folder or Hub id of a dense Llama-style model")
    made.add_argument("work", type=Path)
    made.add_argument("--text", nargs="*", help="files to train on; by default Python's topics")
    made.add_argument("--held-out", nargs="*", help="files to evaluate on, likewise")
    for name, default in (("per-token", 6), ("mixture-tokens", 300_000), ("tokens", 400_000), ("router-tokens", 65_536),
                          ("cluster-tokens", 8192), ("eval-tokens", 32_768), ("block-size", 256), ("batch-size", 4)):  # fmt: skip
        made.add_argument(f"--{name}", type=int, default=default)
    made.add_argument("--contenders", nargs="*", choices=[*LADDERS], default=[*LADDERS], help="which of ours")
    made.add_argument("--learning-rate", type=float, default=3e-4)
    made.add_argument("--bf16", action="store_true", help="train in mixed precision")
    args = parser.parse_args(argv)
    with torch_threads(args.threads):
        found = layer(args) if args.what == "layer" else smollm2(args)
    (print_layer if args.what == "layer" else print_smollm2)(found)
    about = machine(args.threads) | {
        key: str(value) for key, value in vars(args).items() if key not in ("what", "out", "work")
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"mixtures-{args.what}_{about['name']}.json", {"machine": about, "found": found})


if __name__ == "__main__":
    main()
