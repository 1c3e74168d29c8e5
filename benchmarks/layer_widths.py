# SPDX-License-Identifier: Apache-2.0
"""
What does a width for each layer bring over one width for all, without routers?

    python benchmarks/layer_widths.py FOLDER

Ratios of perplexity to the full width on held-out tokens, for `dynamoe export --budget` and `--width`.
"""

import argparse
import copy

import torch

from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import block_nll, ratio_to
from dynamoe_hf.export import dense_prefix, widths_for
from dynamoe_hf.folder import load_model, load_tokenizer


SHARES = (0.9, 0.75, 0.6, 0.5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    measured, held_out = (
        token_blocks(documents_for(split, None), tokenizer, 512, tokens)
        for split, tokens in (("calibration", 4096), ("held-out", 8192))
    )
    full = dense_prefix(model, 1.0)
    full_nll = block_nll(full, held_out)
    print("share  one width for all  a width for each layer")
    for share in SHARES:
        widths, cut = widths_for(model, measured, share), copy.deepcopy(full)
        with torch.no_grad():
            for layer, width in zip(cut.model.layers, widths):
                layer.mlp.down_proj.weight[:, width:] = 0
        one, own = (ratio_to(block_nll(dense, held_out), full_nll) for dense in (dense_prefix(model, share), cut))
        print(f"{share:5.0%}  {one['ratio_to_dense']:17.3f}  {own['ratio_to_dense']:22.3f}  {widths}", flush=True)


if __name__ == "__main__":
    main()
