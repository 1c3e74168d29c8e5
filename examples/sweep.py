# SPDX-License-Identifier: Apache-2.0
"""
One checkpoint, many budgets: perplexity, share and speed along the whole dial, as a table and a picture.

    make demo && python examples/sweep.py           # runs/demo/trained -> runs/sweep, 6 minutes on one core
    python examples/sweep.py FOLDER OUT --steps 12 --max-tokens 16384

Writes `sweep.md` and `sweep.png`. The budgets lie evenly between the smallest calibrated one and the full width; between the
marks the dial interpolates, so the share that was reached stands beside the one that was asked for. Close other programs: the
speed is that of this machine at that moment. The evaluations are added to the folder's `results.json`, from where
`dynamoe report` draws them too.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamoe_hf import evaluate_model
from dynamoe_hf.benchmark import bench_decode
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.plots import draw_frontier


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/demo/trained", help="calibrated model folder (%(default)s)")
    parser.add_argument("out", nargs="?", default="runs/sweep", help="folder to write into (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="number of budgets (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=4096, help="held-out tokens to evaluate on (%(default)s)")
    args = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=False)
    smallest = min(map(float, model.config.budgets))
    budgets = [round(budget, 3) for budget in torch.linspace(smallest, 1.0, args.steps).tolist()]

    # Held-out text by default, and beside each setting one width for all tokens that costs the same.
    entries = evaluate_model(args.folder, budget=budgets, baselines=["static"], max_tokens=args.max_tokens)
    # Greedy decoding of one sequence, each budget in turn with the dense model, so that both feel a busy machine alike.
    text = token_blocks(documents_for("held-out"), tokenizer, 96, 96)
    thetas = {f"budget {budget:g}": model.config.sensitivity_of(budget) for budget in budgets}
    speeds = bench_decode(model, text, thetas, rounds=3)

    lines = [
        "| budget | sensitivity | mean share | perplexity | 95% interval | one width | tokens/s | to dense |",
        "|---" * 8 + "|",
    ]
    for budget, entry, speed in zip(budgets, entries, speeds):
        low, high = entry["perplexity_interval"]
        static = entry["baselines"]["static"]["perplexity"]
        lines.append(
            f"| {budget:.1%} | {entry['sensitivity']:.3f} | {entry['mean_share']:.1%} | {entry['perplexity']:.2f} "
            f"| {low:.2f} to {high:.2f} | {static:.2f} | {speed['tokens_per_second']:.1f} | {1 / speed['ratio']:.2f}x |"
        )
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "sweep.md").write_text("\n".join(lines) + "\n")
    draw_frontier(entries).savefig(out / "sweep.png", dpi=200)
    print("\n".join(lines))
    print(f"{entries[0]['tokens']:,} held-out tokens. Written: {out / 'sweep.md'}, {out / 'sweep.png'}")


if __name__ == "__main__":
    main()
