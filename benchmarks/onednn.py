# SPDX-License-Identifier: Apache-2.0
"""
What `pack("onednn")` saves on a CPU: MLPs in the layout of oneDNN, whole and in blocks that end at the widths of experts, beside
PyTorch's own products, at one token and at many; and a model folder, decoding and reading a prompt.

    python benchmarks/onednn.py FOLDER [--threads 2]

Single MLPs have random weights and as many copies as no cache holds. Ratios are times over PyTorch's own at the same number of tokens, the
median of those of the rounds.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from packed import PROMPT, steps_of
from transformers import LlamaConfig, LlamaForCausalLM

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.benchmark import COLD_BYTES, SHAPES, interleaved, machine, torch_threads
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.folder import load_model, load_tokenizer, write_json
from dynamoe_hf.modeling.mlp_backends import Decision, run_experts
from dynamoe_hf.modeling.onednn_weights import OneDnnMLP, is_available


TOKENS, EIGHTHS = (1, 8, 32, 256), [eighth / 8 for eighth in range(1, 9)]


def single_mlps(shape, dtype, rounds):
    """{case: times} of all MLPs of a shape, each at full width, at half, and with experts drawn evenly (a mean width of 9/16)."""
    hidden_size, width = SHAPES[shape]
    layers = max(2, COLD_BYTES // (3 * hidden_size * width))
    config = LlamaConfig(
        hidden_size=hidden_size, intermediate_size=width, num_hidden_layers=layers, vocab_size=8, num_attention_heads=8
    )
    model = DynaMoEForCausalLM.from_dense(LlamaForCausalLM(config), expert_widths=EIGHTHS).to(dtype).eval()
    plain = model.nested_mlps
    blocks = copy.deepcopy(model).pack("onednn").nested_mlps
    whole = [OneDnnMLP(mlp.layout.tensors(mlp), mlp.widths[-1:], mlp.act_name) for mlp in plain]
    rows = {}
    for tokens in TOKENS:
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(1, tokens, hidden_size, generator=generator).to(dtype)
        drawn = torch.randint(len(EIGHTHS), (1, tokens), generator=generator) if tokens > 1 else torch.tensor([[4]])
        check_parity(plain[0], blocks[0], x, drawn)

        def modules(x=x):
            for mlp in plain:
                mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

        def one_block(x=x):
            for packed in whole:
                packed.run(x, 0, packed.blocks.ends, None)

        def experts(mlps, expert, x=x):
            for mlp in mlps:
                run_experts(x, Decision(expert), mlp.weights(x, Decision(expert)))

        runs: dict[str, Any] = {"PyTorch, dense": modules, "oneDNN, dense": one_block}
        for case, expert in (("full width", 7), ("half", 3), ("experts drawn", drawn)):
            runs[f"PyTorch, {case}"] = partial(experts, plain, expert)
            runs[f"oneDNN, {case}"] = partial(experts, blocks, expert)
        name = f"{shape}, {str(dtype).removeprefix('torch.')}, {tokens} token{'s' if tokens > 1 else ''}"
        found = interleaved({case: [run] for case, run in runs.items()}, rounds, name)
        rows |= {f"{name}: {case}": row for case, row in found.items()}
    return rows


def check_parity(mlp, packed, x, expert):
    """Both give the same numbers, but for rounding."""
    expected, found = (run_experts(x, Decision(expert), each.weights(x)) for each in (mlp, packed))
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < (1e-4 if x.dtype == torch.float32 else 0.02), f"oneDNN's outputs differ by {error:.2g}"


def folder_model(folder, rounds, new_tokens=8):
    """Steps of decoding and a prompt of 512 tokens, plain and packed, at each budget."""
    plain, tokenizer = load_model(folder, dtype=torch.float32, device_map="cpu"), load_tokenizer(folder)
    packed = load_model(folder, dtype=torch.float32, device_map="cpu").pack("onednn")
    prompt = token_blocks(documents_for("held-out"), tokenizer, 512, 512)
    error = (packed(prompt, sensitivity=1.0).logits - plain(prompt, sensitivity=1.0).logits).abs().max().item()
    assert error < 1e-2, f"packed logits differ by {error:.2g}"
    prompts: dict[str, Any] = {}
    steps: dict[str, Any] = {}
    for side, model in (("PyTorch", plain), ("oneDNN", packed)):
        for budget in [1.0, *sorted(map(float, model.config.budgets), reverse=True)]:
            name, theta = f"{side}, budget {budget:g}", model.config.sensitivity_of(budget)
            prompts[name] = [partial(model, prompt, sensitivity=theta, use_cache=True, logits_to_keep=1)]
            steps[name] = steps_of(model, prompt[:, :PROMPT], new_tokens, sensitivity=theta)
    rows = {}
    for task, runs in (("prompt", prompts), ("decode", steps)):
        rows |= {f"{task}: {name}": row for name, row in interleaved(runs, rounds, task).items()}
    return rows


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="calibrated model folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    rows = {}
    with torch_threads(args.threads):
        for dtype in filter(is_available, (torch.float32, torch.bfloat16)):
            for shape in ("SmolLM2-135M", "Llama-3.2-1B"):
                rows |= single_mlps(shape, dtype, args.rounds)
        rows |= folder_model(args.folder, args.rounds)
    for name, row in rows.items():
        print(f"{name:60} {row['ratio']:.3f} ({row['range'][0]:.3f} to {row['range'][1]:.3f})")
    about = machine(args.threads) | {"rounds": args.rounds}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"onednn_{about['name']}.json", {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
