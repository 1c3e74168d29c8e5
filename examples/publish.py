# SPDX-License-Identifier: Apache-2.0
"""
What goes to the Hub, without sending it: the dial itself and a variant for each calibrated budget, each with its own card.

    make demo && python examples/publish.py                   # runs/demo/trained -> runs/publish, seconds
    python examples/publish.py FOLDER OUT --repo you/NAME

Prints each repository with its dial and size, then loads one variant as somebody who downloads it would. Weights are hard
links, so that the folder costs next to nothing. For real, after `hf auth login`, it is one line:

    python -c "from dynamoe_hf import publish_model; publish_model('runs/demo/trained', 'you/NAME')"
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from dynamoe_hf import publish_model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/demo/trained", help="calibrated model folder (%(default)s)")
    parser.add_argument("out", nargs="?", default="runs/publish", help="folder to write; must not exist (%(default)s)")
    parser.add_argument("--repo", default="user/SmolLM2-135M-DynaMoE", help="name on the Hub (%(default)s)")
    args = parser.parse_args()

    summary = publish_model(args.folder, args.repo, dry_run=True, out=args.out)
    print("| repository | budget | sensitivity | files | MB |\n|---|---|---|---|---|")
    for variant in summary["variants"]:
        budget = "the dial" if variant["budget"] is None else f"{variant['budget']:.0%}"
        size, count = variant["bytes"] / 1e6, len(variant["files"])
        print(f"| {variant['repo']} | {budget} | {variant['sensitivity']:.3f} | {count} | {size:,.1f} |")
    print(f"Collection: {summary['collection']}. Nothing was sent; look into {summary['out']}.")

    # A variant is a model folder like any other, set to its budget, and its card says how it was measured.
    folder = Path(summary["out"]) / summary["variants"][1]["repo"].split("/")[-1]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    inputs = tokenizer("The with statement", return_tensors="pt")
    text = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(f"{folder.name} at sensitivity {model.config.sensitivity:.3f}: {tokenizer.decode(text[0])!r}")


if __name__ == "__main__":
    main()
