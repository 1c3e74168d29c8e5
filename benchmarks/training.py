"""
What a training step costs beside that of the dense model: time and memory, in one run.

    python benchmarks/training.py FOLDER [--batch-size 8] [--block-size 256] [--rounds 5]

FOLDER is a model folder whose routers are trained; both sides train all weights on the same tokens, forward and backward, without the optimiser:

- plain: the model with `labels` under any `Trainer`: difficulty labels, router loss and LM loss;
- ours: the same losses in `DynaMoETrainer`, logits of all positions in chunks;
- recipe: what `dynamoe train` does: no labels and no LM loss, but a frozen full-width teacher's logits and hidden states at all positions.

Memory is what a step needs at its peak beyond the weights. Writes benchmarks/results/training_<processor>_<yyyymm>.json.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import torch

from dynamoe_hf import DynaMoETrainer, DynaMoETrainingArguments
from dynamoe_hf.benchmark import interleaved, machine, peak_memory
from dynamoe_hf.convert import prove_parity
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import load_model, load_tokenizer


# The losses that the plain model has, in `DynaMoETrainer`.
PLAIN = {"route": "label", "router_loss_coef": 1.0, "lm_loss_coef": 0.2, "kd_loss_coef": 0.0, "hidden_loss_coef": 0.0}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_model(args.folder, device_map="cpu"), load_tokenizer(args.folder)
    dense = dense_prefix(model, 1.0)
    tokens = token_blocks(documents_for("training"), tokenizer, args.block_size, args.batch_size * args.block_size)
    with torch.no_grad():
        full = {"force_expert": model.config.expert_count - 1}
        parity = prove_parity(dense(tokens[:1, :64]).logits, model(tokens[:1, :64], **full).logits, model.dtype)
    batch = {"input_ids": tokens, "labels": tokens}

    def trainer(**settings):
        folder = tempfile.mkdtemp()
        arguments = DynaMoETrainingArguments(folder, train_parts="all", report_to="none", use_cpu=True, **settings)
        return DynaMoETrainer(model=model, args=arguments)

    losses = {
        "dense": lambda: dense(**batch, use_cache=False).loss,
        "plain": lambda: model(**batch, use_cache=False).loss,
        "ours": partial(trainer(**PLAIN).compute_loss, model, batch),
        "recipe": partial(trainer().compute_loss, model, batch),
    }
    sides = {name: dense if name == "dense" else model for name in losses}

    def step(name):
        sides[name].train()
        losses[name]().backward()
        sides[name].zero_grad(set_to_none=True)

    for side in (dense, model):
        side.requires_grad_(True)
    runs = {name: partial(step, name) for name in losses}
    rows = interleaved({name: [run] for name, run in runs.items()}, args.rounds)
    memory = {name: peak_memory(run) for name, run in runs.items()}
    for name, row in rows.items():
        row["peak_bytes"], row["dense_peak_bytes"] = memory[name], memory["dense"]
        print(
            f"{name:16} time {row['ratio']:.3f} ({row['range'][0]:.3f} to {row['range'][1]:.3f}) of the dense step's "
            f"{row['dense_seconds']:.1f} s, memory {row['peak_bytes'] / row['dense_peak_bytes']:.3f} of its {memory['dense'] / 2**30:.2f} GiB"
        )
    about = {"machine": machine(args.threads), "parity": parity, "batch_size": args.batch_size, "block_size": args.block_size}
    path = args.out / f"training_{about['machine']['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
