# SPDX-License-Identifier: Apache-2.0
"""
What packed weights save when one sequence is decoded on one thread: a single MLP, a step of a model of Llama-3.2-1B's shape, and a step
of a calibrated model folder. Sparsity, prefixes and bits, apart and together.

    python benchmarks/packed.py runs/demo/trained

Single MLPs and the large model have random weights, and their shares are forced: a prefix of 3/4 of the width, two thirds of whose
weights are kept. Parity comes first: the int8 model beside the float one at full width. Everything that is compared runs in turn in each
round, and each ratio is the median of those of the rounds.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.benchmark import COLD_BYTES, SHAPES, interleaved, machine, torch_threads
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import load_model, load_tokenizer, write_json
from dynamoe_hf.modeling.mlp_backends import Decision, run_experts
from dynamoe_hf.modeling.sparsity import thresholds_at
from dynamoe_hf.threshold_fit import fit_thresholds


WIDTH, DENSITY = 5, 2 / 3  # the expert of 3/4 of the width, and the share of its weights that is kept: half of all
PROMPT = 64
ROWS = (1, 2, 4, 8, 16, 32, 64)


def random_model(hidden_size, mlp_width, layers, **settings):
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=mlp_width, num_hidden_layers=layers, **{"vocab_size": 8, **settings}
    )
    widths = [eighth / 8 for eighth in range(1, 9)]
    model = DynaMoEForCausalLM.from_dense(LlamaForCausalLM(config), expert_widths=widths).eval()
    generator = torch.Generator().manual_seed(0)
    fit_thresholds(model, torch.randint(config.vocab_size, (1, 64), generator=generator), uniform=True)
    return model


def single_mlps(rounds, name="Llama-3.2-1B"):
    """One token through as many MLPs as no cache holds."""
    hidden_size, mlp_width = SHAPES[name]
    model = random_model(hidden_size, mlp_width, max(1, COLD_BYTES // (3 * hidden_size * mlp_width)), num_attention_heads=8)
    x = torch.randn(1, 1, hidden_size, generator=torch.Generator().manual_seed(0))
    dense = {dtype: copy.deepcopy(model).to(dtype).nested_mlps for dtype in (torch.float32, torch.bfloat16)}
    packed = {kind: copy.deepcopy(model).pack(kind).nested_mlps for kind in ("int8", "bfloat16")}
    # Thresholds of the inputs that are timed: those of a real model are fitted to its own.
    sizes = x.abs().flatten().sort().values[int(len(x.flatten()) * (1 - DENSITY))].item()

    def modules(mlps, x):
        for mlp in mlps:
            mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    def routed(mlps, expert, sparse, x=x):
        for mlp in mlps:
            hidden = thresholds_at(model.config.thresholds, DENSITY, 0.0)[0] if sparse else None
            thresholds = None if hidden is None else hidden._replace(input=sizes)
            run_experts(x, Decision(expert, thresholds=thresholds), mlp.weights(x, Decision(expert, thresholds=thresholds)))

    full = len(model.nested_mlps[0].widths) - 1
    runs: dict[str, Any] = {"float32": partial(modules, dense[torch.float32], x)}
    runs["bfloat16"] = partial(modules, dense[torch.bfloat16], x.bfloat16())
    for kind, mlps in packed.items():
        runs |= {
            f"packed {kind}, all": partial(routed, mlps, full, False),
            f"packed {kind}, 3/4 of the width": partial(routed, mlps, WIDTH, False),
            f"packed {kind}, 2/3 of the weights": partial(routed, mlps, full, True),
            f"packed {kind}, half by both": partial(routed, mlps, WIDTH, True),
        }
    return interleaved({name: [run] for name, run in runs.items()}, rounds, f"MLP of {name}")


def batches(rounds, name="Llama-3.2-1B"):
    """Tokens at a time: each reads rows of its own, or the weights are unpacked for one product of all; time over float32's."""
    hidden_size, mlp_width = SHAPES[name]
    model = random_model(hidden_size, mlp_width, 4, num_attention_heads=8)
    packed, thresholds = copy.deepcopy(model).pack("int8").nested_mlps, thresholds_at(model.config.thresholds, DENSITY, 0.0)
    assert thresholds is not None
    rows = {}
    for tokens in ROWS:
        x = torch.randn(1, tokens, hidden_size, generator=torch.Generator().manual_seed(0))

        def dense(x=x):
            for mlp in model.nested_mlps:
                mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

        def packed_tables(together, x=x):
            for mlp, both in zip(packed, thresholds):
                tables, least = mlp.packed.tables, [[float(value)] * len(x[0]) for value in both[:2]]
                (tables.run_together if together else tables.run)(x[0], [mlp.widths[WIDTH]] * len(x[0]), least, both.ramp)

        own, together = partial(packed_tables, False), partial(packed_tables, True)
        runs = {"float32": [dense], "rows of its own": [own], "together": [together]}
        for case, row in interleaved(runs, rounds, f"{tokens} tokens").items():
            rows[f"{tokens} tokens, {case}"] = row
    return rows


def steps_of(model, prompt, count, **options):
    """Decoding steps over a cache, and one that takes it back to the prompt."""
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    step = partial(model, prompt[:, :1], past_key_values=cache, use_cache=True, **options)
    return [*[step] * count, lambda: cache.crop(-count)]


def large_model(rounds):
    """A step at Llama-3.2-1B's shape."""
    model = random_model(*SHAPES["Llama-3.2-1B"], 16, vocab_size=128256, num_attention_heads=32, num_key_value_heads=8,
                         tie_word_embeddings=True)  # fmt: skip
    dense, prompt = dense_prefix(model, 1.0), torch.arange(PROMPT)[None]
    packed = copy.deepcopy(model).pack("int8")
    half = {"force_expert": WIDTH, "density": DENSITY}
    with model.routing(records=[]) as routing:
        model(prompt, use_cache=False, **half)
    share = torch.stack([record.share for record in routing.records]).mean().item()
    assert abs(share - 0.5) < 0.02, f"a token reads {share:.3f} of the MLPs' weights, not half"
    runs = {
        "float32": steps_of(dense, prompt, 2),
        "packed int8, all": steps_of(packed, prompt, 2, force_expert=7),
        "packed int8, half by both": steps_of(packed, prompt, 2, **half),
    }
    return interleaved(runs, rounds, "Llama-3.2-1B's shape")


def folder_model(folder, rounds, new_tokens=8):
    """A step of a calibrated model, at each budget."""
    model, tokenizer = load_model(folder, dtype=torch.float32, device_map="cpu"), load_tokenizer(folder)
    prompt = token_blocks(documents_for("held-out"), tokenizer, PROMPT, PROMPT)
    packed = load_model(folder, dtype=torch.float32, device_map="cpu").pack("int8")
    logits, expected = packed(prompt, sensitivity=1.0).logits, model(prompt, sensitivity=1.0).logits
    error = ((logits - expected).norm() / expected.norm()).item()
    assert error < 0.1, f"int8 logits differ from the float ones by {error:.2g} of their norm"
    dense = dense_prefix(model, 1.0)
    runs = {"float32": steps_of(dense, prompt, new_tokens)}
    runs["bfloat16"] = steps_of(copy.deepcopy(dense).bfloat16(), prompt, new_tokens)
    for budget in [1.0, *sorted(map(float, model.config.budgets), reverse=True)]:
        theta = model.config.sensitivity_of(budget)
        runs[f"float32, budget {budget:g}"] = steps_of(model, prompt, new_tokens, sensitivity=theta)
        runs[f"packed int8, budget {budget:g}"] = steps_of(packed, prompt, new_tokens, sensitivity=theta)
    rows = interleaved(runs, rounds, "Model folder")
    return {name: {**row, "tokens_per_second": new_tokens / row["seconds"]} for name, row in rows.items()}, error


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="calibrated model folder")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--skip-large", action="store_true", help="leave out the model of a billion parameters: 12 GB of memory"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    with torch_threads(args.threads):
        tables = {"one MLP of 2,048 x 8,192, one token": single_mlps(args.rounds)}
        tables["MLPs of 2,048 x 8,192, half of the weights"] = batches(args.rounds)
        tables["a step of the folder"], error = folder_model(args.folder, args.rounds)
        if not args.skip_large:
            tables["a step at Llama-3.2-1B's shape"] = large_model(max(3, args.rounds // 3))
    for title, rows in tables.items():
        print(f"{title}, time over float32's")
        for name, row in rows.items():
            print(f"  {name:36} {row['ratio']:.3f} ({row['range'][0]:.3f} to {row['range'][1]:.3f})")
    about = machine(args.threads) | {"rounds": args.rounds, "int8 logits to float's": error}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"packed_{about['name']}.json", {"machine": about, **tables})


if __name__ == "__main__":
    main()
