"""
Which order of neurons is best? Perplexity of an untrained conversion with each importance, on several texts.

    python benchmarks/importance.py BASE --text perl-doc.txt postgresql-doc-15.txt [--tokens 8192]

Static prefixes of 75 and 50% of every MLP, and labels of the loss-weighted similarity at the same mean shares. The topics'
held-out split is always the first text; calibration is the topics' calibration split.
"""

import argparse
import copy
import math

import torch

from dynamoe_hf.convert import load_dense, reorder, scale_difficulty
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.importance import IMPORTANCES
from dynamoe_hf.modeling import DynaMoEForCausalLM
from dynamoe_hf.observe import expert_shares, sensitivity_for, similarity_profiles


@torch.no_grad()
def perplexity(model, blocks, **settings):
    total = 0.0
    for block in blocks:
        logits = model(block[None], **settings).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, block[1:], reduction="sum").item()
    return math.exp(total / (blocks.shape[0] * (blocks.shape[1] - 1)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--text", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--importance", nargs="*", default=list(IMPORTANCES))
    args = parser.parse_args()
    dense, tokenizer = load_dense(args.base)
    calibration = token_blocks(documents_for("calibration"), tokenizer, 512, 8192)
    texts = {"topics": documents_for("held-out"), **{path: documents_for("", path) for path in args.text}}
    texts = {name: token_blocks(documents, tokenizer, 512, args.tokens) for name, documents in texts.items()}
    print("| order | text | dense | static 75% | static 50% | labels 75% | labels 50% |\n|---|---|---|---|---|---|---|")
    for name in args.importance:
        scores = IMPORTANCES[name](dense, calibration)
        model = DynaMoEForCausalLM.from_dense(copy.deepcopy(dense))
        for layer, score in zip(model.model.layers, scores):
            reorder(layer.mlp, torch.argsort(score, descending=True))
        model.config.error_weights, _ = scale_difficulty(model, calibration)
        profiles, shares = similarity_profiles(model, calibration), expert_shares(model)
        thetas = [sensitivity_for(profiles, shares, share) for share in (0.75, 0.5)]
        for text, blocks in texts.items():
            row = [
                perplexity(model, blocks),
                perplexity(model, blocks, force_expert=2),
                perplexity(model, blocks, force_expert=1),
            ]
            row += [perplexity(model, blocks, route="label", sensitivity=theta) for theta in thetas]
            print(f"| {name} | {text.rpartition('/')[2]} | " + " | ".join(f"{value:.1f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
