# SPDX-License-Identifier: Apache-2.0
"""
How far rounding moves a model: log-probabilities of the same tokens under the two attention implementations of transformers, which
differ by rounding alone, at full width, by routing alone, and with sparsity too.

    python benchmarks/rounding.py FOLDER
"""

import argparse
from pathlib import Path

import torch

from dynamoe_hf.benchmark import machine
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.folder import load_model, load_tokenizer, write_json


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="calibrated model folder")
    parser.add_argument("--budget", type=float, default=0.75)
    parser.add_argument("--max-tokens", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    tokens = token_blocks(documents_for("held-out"), load_tokenizer(args.folder), 100, args.max_tokens)
    sides = [
        load_model(args.folder, dtype=torch.float32, device_map="cpu", attn_implementation=name) for name in ("sdpa", "eager")
    ]
    theta = sides[0].config.sensitivity_of(args.budget)
    cases = {"full width": {"sensitivity": 1.0}, "routing alone": {"sensitivity": theta, "density": 1.0}}
    cases["routing and sparsity"] = {"sensitivity": theta}
    rows = {}
    for case, options in cases.items():
        first, second = (
            model(tokens, use_cache=False, **options).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
            for model in sides
        )
        error = (first - second).abs()
        rows[case] = {"mean": error.mean().item(), "largest": error.max().item()}
        print(f"{case:22} mean {rows[case]['mean']:.1e}, largest {rows[case]['largest']:.1e}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(torch.get_num_threads()) | {"model": args.folder.name, "tokens": tokens.numel(), "budget": args.budget}
    write_json(args.out / f"rounding_{about['name']}.json", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
