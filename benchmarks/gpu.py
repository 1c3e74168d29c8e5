"""
The Triton kernel against dense cuBLAS on a GPU, at one MLP's shape: parity first, then time.

    python benchmarks/gpu.py [--shape 4096 14336] [--tokens 1 8 64 2048] [--dtype bfloat16]

Dense is the base's own MLP, three `nn.Linear`. Both sides run in turn, eagerly and as CUDA graphs, over several copies of the
weights so that none waits in L2; a ratio is the median over rounds of kernel time / dense time, by CUDA events. The router is
not part of it. `limit` is what the ratio cannot fall below: the mean share of the width where arithmetic decides, the widest
token's where reading weights does. Writes benchmarks/results/gpu-CARD-DTYPE.json.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import triton
from transformers import LlamaConfig, LlamaForCausalLM

from dynamoe_hf import DynaMoEForCausalLM


COPIES = 4
MEMORY_BOUND = 64  # tokens up to which reading the weights takes longer than multiplying; some 300 on an H100 in bfloat16
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}


def nested_mlps(hidden_size, mlp_width, dtype):
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden_size, intermediate_size=mlp_width, num_hidden_layers=COPIES, num_attention_heads=8
    )
    with torch.device("cuda"):
        base = LlamaForCausalLM(config)
    model = DynaMoEForCausalLM.from_dense(base).to("cuda", dtype).eval()
    model.set_mlp_implementation("triton")
    return [layer.mlp for layer in model.model.layers]


def dense(mlp, x):
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


@torch.no_grad()
def largest_error(mlp, x, expert):
    """Against masked products in float64, relative to the largest output."""
    widths_T = torch.tensor(mlp.widths, device=x.device)[expert[0]]
    x_TD, gate, up, down = (t.double() for t in (x[0], mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight))
    hidden_TH = F.silu(x_TD @ gate.t()) * (x_TD @ up.t()) * (torch.arange(len(up), device=x.device) < widths_T[:, None])
    expected_TD = hidden_TH @ down.t()
    return ((mlp._run(x, expert)[0] - expected_TD).abs().max() / expected_TD.abs().max()).item()


def captured(run):
    """`run` as a CUDA graph, after warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / COPIES


def paired(base, kernel, rounds):
    pairs = [(milliseconds(base), milliseconds(kernel)) for _ in range(rounds + 5)][5:]
    ratios = sorted(b / a for a, b in pairs)
    return {
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "dense_ms": statistics.median(a for a, _ in pairs),
        "kernel_ms": statistics.median(b for _, b in pairs),
    }


def measure(mlps, x, expert, rounds):
    """Paired times of every mode. `expert` stays on the device, so the kernel does not know whether it is the same for all."""

    def forward_dense():
        for mlp in mlps:
            dense(mlp, x)

    def forward_kernel():
        for mlp in mlps:
            mlp._run(x, expert)

    with torch.no_grad():
        modes = {
            "eager": paired(forward_dense, forward_kernel, rounds),
            "graph": paired(captured(forward_dense), captured(forward_kernel), rounds),
        }
    if x.shape[1] > MEMORY_BOUND:
        inputs = x.clone().requires_grad_()

        def train(run):
            for mlp in mlps:
                mlp.zero_grad()
                run(mlp).backward(x)

        base, kernel = lambda: train(lambda mlp: dense(mlp, inputs)), lambda: train(lambda mlp: mlp._run(inputs, expert))
        modes["forward and backward"] = paired(base, kernel, max(5, rounds // 5))
    return modes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("D", "H"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    torch.backends.cuda.matmul.allow_tf32 = False  # the kernel's float32 products are exact ones too
    mlps, rows = nested_mlps(*args.shape, dtype), []
    widths = mlps[0].widths
    card = torch.cuda.get_device_name()
    print(f"{card}, {args.dtype}, {args.shape}\n| tokens | routes | mode | limit | kernel / dense | dense ms | kernel ms |")
    print("|---|---|---|---|---|---|---|")
    for tokens in args.tokens:
        x = torch.randn(1, tokens, args.shape[0], device="cuda", dtype=dtype)
        routes = {
            f"all {width / args.shape[1]:.0%}": torch.full((1, tokens), e, device="cuda") for e, width in enumerate(widths)
        }
        if tokens > 1:
            routes["uniform"] = torch.randint(len(widths), (1, tokens), device="cuda")
        for name, expert in routes.items():
            error = largest_error(mlps[0], x, expert)
            if not error < TOLERANCE[dtype]:
                sys.exit(f"No parity, so nothing is timed: {tokens} tokens, {name}, error {error:.2g} of the largest output.")
            shares = torch.tensor(widths)[expert.cpu()] / args.shape[1]
            limit = (shares.max() if tokens <= MEMORY_BOUND else shares.mean()).item()
            for mode, row in measure(mlps, x, expert, args.rounds).items():
                row = {"tokens": tokens, "routes": name, "mode": mode, "limit": limit, "error": error, **row}
                rows.append({**row, "reached": limit / row["ratio"]})
                figures = f"{limit:.3f} | {row['ratio']:.3f} | {row['dense_ms']:.4f} | {row['kernel_ms']:.4f}"
                print(f"| {tokens} | {name} | {mode} | {figures} |", flush=True)
    record = {
        "card": card,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "shape": args.shape,
        "dtype": args.dtype,
        "rows": rows,
    }  # fmt: skip
    args.out.mkdir(exist_ok=True)
    path = args.out / f"gpu-{card.replace(' ', '-').lower()}-{args.dtype}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
