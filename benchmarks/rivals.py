"""
Against rivals in the same run: time and perplexity at one share of the MLPs.

    python benchmarks/rivals.py FOLDER [--budget 0.5] [--rounds 7]

FOLDER is a trained and calibrated model. Every rival is made from its full width, which is the dense model of the comparison:

- static width: the first neurons, the same for all tokens;
- shared + routed experts (CMoE, arXiv 2502.04416, in our own words): the neurons that are active most often form a shared expert of a
  quarter of the width; the others form six experts of an eighth each by balanced clustering of when they are active; the
  expert's most typical neuron is its router, and a token takes the best two. Training-free. Its experts run in the loop
  of transformers, and in transformers' `grouped_mm`.

Writes benchmarks/results/rivals_<processor>_<yyyymm>.{json,md}.
"""

import argparse
import copy
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from dynamoe_hf.benchmark import interleaved, machine
from dynamoe_hf.convert import prove_parity
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import block_nll
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import load_model, load_tokenizer
from dynamoe_hf.observe import expert_shares, run_routers


GROUPS, SHARED, TOP_K = 8, 2, 2  # eighths of the width: two shared, six routed, two of which are taken
ACTIVE = 10  # neurons that count as active for a token


class SharedAndRouted(nn.Module):
    """
    One MLP as shared and routed experts: (B, S, D) -> (B, S, D). `hidden_TH` is what the neurons do on calibration text; of
    `groups` equal parts, `shared` serve all tokens, and each token takes `top_k` (may be set anew) of the rest.
    """

    def __init__(self, mlp, hidden_TH, groups=GROUPS, shared=SHARED, top_k=TOP_K):
        super().__init__()
        size, routed, self.top_k = hidden_TH.shape[1] // groups, groups - shared, top_k
        hidden_TH = hidden_TH.cpu()  # clusters are made row by row
        active_TH = torch.zeros_like(hidden_TH).scatter_(1, hidden_TH.abs().topk(ACTIVE, dim=1).indices, 1)
        by_rate_H = active_TH.mean(0).argsort(descending=True, stable=True)
        shared, rest = by_rate_H[: shared * size], by_rate_H[shared * size :]
        members_EI, typical_E = balanced_clusters(active_TH[:, rest].t(), routed)
        routed_EI, typical_E = rest[members_EI], rest[typical_E]
        gate, up, down = mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data
        self.act = mlp.act_fn
        self.shared = [gate[shared], up[shared], down[:, shared].contiguous()]
        self.router = [gate[typical_E], up[typical_E]]
        config = MixtralConfig(
            hidden_size=gate.shape[1], intermediate_size=size, num_local_experts=routed, num_experts_per_tok=top_k
        )
        config._experts_implementation = "eager"
        self.experts = MixtralExperts(config).requires_grad_(False)
        self.experts.gate_up_proj.data = torch.cat([gate[routed_EI], up[routed_EI]], 1)
        self.experts.down_proj.data = down.t()[routed_EI].transpose(1, 2).contiguous()

    def forward(self, x):
        x_TD = x.flatten(0, 1)
        gate, up, down = self.shared
        y_TD = nn.functional.linear(self.act(nn.functional.linear(x_TD, gate)) * nn.functional.linear(x_TD, up), down)
        gate, up = self.router
        score_TE = (self.act(nn.functional.linear(x_TD, gate)) * nn.functional.linear(x_TD, up)).abs()
        index_TK = score_TE.topk(self.top_k).indices
        return (y_TD + self.experts(x_TD, index_TK, torch.ones_like(index_TK, dtype=x.dtype))).view_as(x)


def balanced_clusters(rows_NF, count, rounds=10):
    """Equally large clusters by k-means with room for N / count rows each: members (count, N / count), the most typical (count,)."""
    size = len(rows_NF) // count
    centres = rows_NF[torch.linspace(0, len(rows_NF) - 1, count).long()]
    for _ in range(rounds):
        distance = torch.cdist(rows_NF, centres)
        room, taken = [size] * count, torch.zeros(len(rows_NF), dtype=torch.long)
        # Who would lose most by the second choice chooses first.
        regret = distance.topk(2, largest=False).values.diff(dim=1)[:, 0]
        for row in regret.argsort(descending=True).tolist():
            cluster = next(c for c in distance[row].argsort().tolist() if room[c])
            room[cluster] -= 1
            taken[row] = cluster
        members = torch.stack([(taken == cluster).nonzero()[:, 0] for cluster in range(count)])
        centres = rows_NF[members].mean(1)
    typical = [int(rows[(rows_NF[rows] - centre).norm(dim=1).argmin()]) for rows, centre in zip(members, centres)]
    return members, torch.tensor(typical)


@torch.no_grad()
def shared_and_routed(dense, blocks, **division):
    """The dense model with every MLP as shared and routed experts, in transformers' loop over experts."""
    hidden = [[] for _ in dense.model.layers]
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, kept=kept: kept.append(args[0].flatten(0, 1)))
        for layer, kept in zip(dense.model.layers, hidden)
    ]
    for block in blocks:
        dense(block[None].to(dense.device), use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    loop = copy.deepcopy(dense)
    for layer, kept in zip(tqdm(loop.model.layers, desc="Shared + routed experts", leave=False), hidden):
        layer.mlp = SharedAndRouted(layer.mlp, torch.cat(kept), **division)
    return loop


def decoding(run, tokens, new_tokens):
    """The steps of decoding a given text, as `interleaved` takes them."""
    cache = run(tokens[:, :-new_tokens], use_cache=True, logits_to_keep=1).past_key_values
    steps = [partial(run, step, past_key_values=cache, use_cache=True) for step in tokens[:, -new_tokens:].split(1, dim=1)]
    return [*steps, partial(cache.crop, -new_tokens)]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=4096, help="that the perplexities are measured on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.folder, device_map="cpu"), load_tokenizer(args.folder)
    dense = dense_prefix(model, 1.0)
    blocks = token_blocks(documents_for("held-out"), tokenizer, 512, args.tokens)
    full = {"force_expert": model.config.expert_count - 1}
    parity = prove_parity(dense(blocks[:1, :64]).logits, model(blocks[:1, :64], **full).logits, model.dtype)
    theta = model.config.sensitivity_of(args.budget)

    def dynamoe(*inputs, **options):
        return model(*inputs, sensitivity=theta, **options)

    dynamoe.device = model.device

    share = run_routers(model, blocks[:4], expert_shares(model), theta)[0].mean().item()
    loop = shared_and_routed(dense, token_blocks(documents_for("calibration"), tokenizer, 512, 4096))
    grouped = copy.deepcopy(loop)
    for layer in grouped.model.layers:
        layer.mlp.experts.config._experts_implementation = "grouped_mm"
    fixed = (SHARED + TOP_K) / GROUPS
    contenders = {  # name: (what runs, its share of MLP width by its own definition, what it gives up)
        "dense": (dense, 1.0, ""),
        "DynaMoE": (dynamoe, share, "needs a router and one short training"),
        "static width": (dense_prefix(model, args.budget), args.budget, "every token gets the same, hard ones too"),
        "shared + routed, loop": (loop, fixed, "one share for good: no dial; easy and hard tokens cost the same"),
        "shared + routed, grouped_mm": (grouped, fixed, "as above; weights regrouped, so it cannot be undone"),
    }
    cases = {
        "decode, batch 1": lambda run: decoding(run, token_blocks(documents_for("held-out"), tokenizer, 96, 96), 24),
        "decode, batch 8": lambda run: decoding(run, token_blocks(documents_for("held-out"), tokenizer, 96, 8 * 96), 16),
        "prefill 512": lambda run: [partial(run, blocks[:1], use_cache=False, logits_to_keep=1)],
    }
    rows = {name: {"share": share, "gives_up": loss} for name, (_, share, loss) in contenders.items()}
    for case, prepare in tqdm(cases.items(), desc="Timing"):
        timed = interleaved({name: prepare(run) for name, (run, _, _) in contenders.items()}, args.rounds)
        for name, row in timed.items():
            rows[name][case] = row
    reference = block_nll(dense, blocks, 1).mean().exp().item()
    for name, (run, _, _) in tqdm(contenders.items(), desc="Perplexity"):
        rows[name]["perplexity_to_dense"] = block_nll(run, blocks, 1).mean().exp().item() / reference

    record = {
        "machine": machine(args.threads),
        "parity": parity,
        "dense_perplexity": reference,
        "tokens": blocks.numel(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"rivals_{record['machine']['name']}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
    path.with_suffix(".md").write_text(table(record, list(cases)))
    print(table(record, list(cases)))


def table(record, cases):
    machine = record["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['date']}. Time over the dense model's in the same run, medians (range); perplexity over the dense model's, "
        f"{record['tokens']:,} held-out tokens. Made by `python benchmarks/rivals.py FOLDER`.",
        "",
        "| | MLP share | " + " | ".join(cases) + " | perplexity to dense | what it gives up |",
        "|---" * (4 + len(cases)) + "|",
    ]
    for name, row in record["rows"].items():
        times = [
            f"{row[case]['ratio']:.2f} ({row[case]['range'][0]:.2f} to {row[case]['range'][1]:.2f})" if case in row else "1"
            for case in cases
        ]
        lines.append(
            f"| {name} | {row['share']:.1%} | {' | '.join(times)} | {row['perplexity_to_dense']:.3f} | {row['gives_up']} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
