# SPDX-License-Identifier: Apache-2.0
"""
Do int8 weights and routing multiply? Decoding of one sequence on one thread: dense and routed, in float and in int8.

    python benchmarks/int8.py runs/demo/trained [--budget 0.5]

int8 is torchao's weight-only quantisation with one scale for each row, as `from_pretrained` applies it: all linear layers
but the head and the routers. All four run in each round, and each ratio is the median of those of the rounds. The bar is the
speed-up of routing in int8 over that in float.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch
import torchao
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from tqdm.auto import tqdm
from transformers import TorchAoConfig

from dynamoe_hf.benchmark import machine
from dynamoe_hf.convert import prove_parity
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import load_model, load_tokenizer, write_json
from dynamoe_hf.observe import expert_shares, shares_taken


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="calibrated model folder")
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=8, help="in each round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype, int8 = getattr(torch, args.dtype), Int8WeightOnlyConfig()
    routed = load_model(args.folder, dtype=dtype, device_map="cpu")
    routed_int8 = load_model(args.folder, dtype=dtype, quantization_config=TorchAoConfig(int8))
    dense, dense_int8 = dense_prefix(routed, 1.0), dense_prefix(routed, 1.0)
    quantize_(dense_int8, int8, lambda module, name: isinstance(module, torch.nn.Linear) and name != "lm_head")
    models = {"float dense": dense, "float routed": routed, "int8 dense": dense_int8, "int8 routed": routed_int8}

    tokens = token_blocks(documents_for("held-out"), load_tokenizer(args.folder), 128, 128)[:1]
    parity = prove_parity(dense_int8(tokens).logits, routed_int8(tokens, sensitivity=1.0).logits, dtype)
    prompt, steps = tokens[:, : -args.new_tokens], tokens[:, -args.new_tokens :].split(1, dim=1)
    theta = routed.config.sensitivity_of(args.budget)
    caches = {name: model(prompt, use_cache=True).past_key_values for name, model in models.items()}
    shares = {}
    for name in ("float routed", "int8 routed"):
        seen = models[name](tokens, sensitivity=theta, output_router_logits=True)
        taken = shares_taken(expert_shares(models[name]), seen.expert_indices)
        shares[name] = taken[..., -args.new_tokens :].mean().item()

    def decode(name):
        start = time.perf_counter()
        for step in steps:
            models[name](step, past_key_values=caches[name], **({"sensitivity": theta} if "routed" in name else {}))
        seconds = time.perf_counter() - start
        caches[name].crop(-args.new_tokens)  # as it was before, for the next round
        return seconds

    # Shuffled: who runs after whom matters on a busy machine, where a fixed order gave bars from 0.78 to 0.99.
    order = random.Random(0)
    rounds = [{n: decode(n) for n in order.sample(list(models), 4)} for _ in tqdm(range(args.rounds + 1), leave=False)][1:]

    def median(value):
        values = [value(seconds) for seconds in rounds]
        return {"median": statistics.median(values), "range": [min(values), max(values)]}

    ratios = {
        "float speed-up": median(lambda s: s["float dense"] / s["float routed"]),
        "int8 speed-up": median(lambda s: s["int8 dense"] / s["int8 routed"]),
        "int8 dense time over float": median(lambda s: s["int8 dense"] / s["float dense"]),
        "bar": median(lambda s: s["int8 dense"] / s["int8 routed"] / (s["float dense"] / s["float routed"])),
    }
    for name, row in ratios.items():
        print(f"{name}: {row['median']:.3f} ({row['range'][0]:.3f} to {row['range'][1]:.3f})")
    speed = {name: median(lambda s, name=name: len(steps) / s[name]) for name in models}
    about = machine(1) | {"torchao": torchao.__version__, "dtype": args.dtype, "rounds": args.rounds}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(
        args.out / f"int8_{about['name']}.json",
        {"machine": about, "parity": parity, "share": shares, "tokens per second": speed, **ratios},
    )


if __name__ == "__main__":
    main()
