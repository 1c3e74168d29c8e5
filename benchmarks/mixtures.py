# SPDX-License-Identifier: Apache-2.0
"""
Bases that are mixtures: what narrower experts save.

    python benchmarks/mixtures.py layer [--threads 1]

`layer`: the experts of one layer of Qwen3-30B-A3B's shape (hidden size 2048, 128 experts of 768 neurons, 8 for a token, random weights,
float32) at 512 tokens and at one, beside the implementations of transformers on the same tensors, after a check that all give the same
numbers. Half of the active weights is read in three ways: one width for all pairs; widths that the layer's router chooses at a place of
the dial, its own time included; and widths drawn evenly from a quarter, a half and three quarters, the worst case, for each expert then
reads most of its rings. With `pack("rows")` and without. Ratios are times over those of the fastest implementation of transformers, the
median of rounds in turn.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from dynamoe_hf import DynaMoEConfig
from dynamoe_hf.benchmark import interleaved, machine, torch_threads
from dynamoe_hf.folder import write_json
from dynamoe_hf.modeling.dense_base import MLPPlace
from dynamoe_hf.modeling.mlp_backends import Decision
from dynamoe_hf.modeling.nested_moe import nest_experts
from dynamoe_hf.modeling.routing import Routing, RoutingSlot
from dynamoe_hf.observe import bisect_rising


QWEN3_30B_A3B = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("layer",))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    with torch_threads(args.threads):
        rows = layer(args)
    for name, row in rows.items():
        low, high = row["range"]
        print(f"{name:36} {row['ratio']:.3f} ({low:.3f} to {high:.3f}) {row['ratio'] / row['share']:.3f} of the ideal")
    about = machine(args.threads) | {"rounds": args.rounds, "shape": QWEN3_30B_A3B}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"mixtures-layer_{about['name']}.json", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
