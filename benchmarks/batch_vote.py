# SPDX-License-Identifier: Apache-2.0
"""
Should the sequences of a batch agree on widths? When eight are decoded together, a layer reads the widest expert that one of them takes.

    python benchmarks/batch_vote.py FOLDER [--batch 8]

Without agreement each token takes its own expert; by a vote all tokens of a step take the same one, by the mean of their routers' logits,
or by the median of their experts; and for comparison the same expert at every step and layer. Of each: the width that a token takes, the width that the batch reads (the widest of a step and layer,
which is what costs time), and the ratio of perplexity to the full width on held-out text. Experts are dense. Then the ratio at equal
width that the batch reads, between the places that were tried.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from dynamoe_hf.benchmark import machine
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import block_nll, ratio_to
from dynamoe_hf.folder import load_model, load_tokenizer, write_json
from dynamoe_hf.modeling.routing import ProfileRouter
from dynamoe_hf.observe import expert_shares, shares_taken


SENSITIVITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
READ = (0.5, 0.6, 0.7, 0.8, 0.9)
VOTES = {
    "each its own": lambda choose, logits, theta: choose(logits, theta),
    "mean of the logits": lambda choose, logits, theta: choose(logits.mean(0, keepdim=True).expand_as(logits), theta),
    "median expert": lambda choose, logits, theta: (
        choose(logits, theta).median(0, keepdim=True).values.expand(logits.shape[:2])
    ),
}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model, tokenizer = load_model(args.folder, dtype=torch.float32, device_map="cpu"), load_tokenizer(args.folder)
    blocks = token_blocks(documents_for("held-out"), tokenizer, 128, args.max_tokens)
    batches = blocks[: len(blocks) // args.batch * args.batch].split(args.batch)
    model.set_sensitivity(1.0)
    full = block_nll(model, torch.cat(batches), args.batch, "Full width")
    shares, choose = expert_shares(model), ProfileRouter.choose
    rows: dict[str, list[dict]] = {}
    for vote, rule in VOTES.items():
        ProfileRouter.choose = lambda router, logits, theta, rule=rule: rule(
            lambda *given: choose(router, *given), logits, theta
        )
        for theta in SENSITIVITIES:
            records: list = []
            taken, nll = [], []
            with model.routing(sensitivity=theta, density=1.0, records=records):
                for batch in batches:
                    nll.append(block_nll(model, batch, args.batch))
                    taken.append(shares_taken(shares, [record.expert for record in records]))  # (L, B, S)
            widths = torch.stack(taken)
            row = {"sensitivity": theta, "width": widths.mean().item(), "read": widths.amax(2).mean().item()}
            rows.setdefault(vote, []).append({**row, "ratio": ratio_to(torch.cat(nll), full)["ratio_to_dense"]})
            print(f"{vote:20}", *(f"{name} {value:.3f}" for name, value in rows[vote][-1].items()), flush=True)
    ProfileRouter.choose = choose
    for expert, share in enumerate(shares.mean(0).tolist()[:-1]):
        with model.routing(force_expert=expert):
            nll = [block_nll(model, batch, args.batch) for batch in batches]
        row = {"width": share, "read": share, "ratio": ratio_to(torch.cat(nll), full)["ratio_to_dense"]}
        rows.setdefault("the same for all", []).append(row)
    print(f"{'read by the batch':20}", *(f"{read:6.0%}" for read in READ))
    for vote, found in rows.items():
        reads, ratios = zip(*((row["read"], row["ratio"]) for row in found))
        at = np.interp(READ, reads, ratios, left=np.nan)
        print(f"{vote:20}", *(f"{ratio:6.3f}" for ratio in at))
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(torch.get_num_threads()) | {"model": args.folder.name, "tokens": args.max_tokens, "batch": args.batch}
    write_json(args.out / f"batch-vote_{about['name']}.json", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
