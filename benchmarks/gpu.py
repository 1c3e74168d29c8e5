"""
The Triton kernels against dense cuBLAS on a GPU: parity first, then time.

    python benchmarks/gpu.py [--shape 4096 14336] [--tokens 1 8 64 2048] [--dtype bfloat16] [--layers 32]

First one MLP. Dense is the base's own, three `nn.Linear`. Both sides run in turn, eagerly and as CUDA graphs, over several
copies of the weights so that none waits in L2; a ratio is the median over rounds of kernel time / dense time, by CUDA events.
The router is not part of it. `limit` is what the ratio cannot fall below: the mean share of the width where arithmetic decides,
the widest token's where reading weights does.

Then decoding with a whole model of that shape (random weights, 32 layers, grouped-query attention, a static cache) as CUDA
graphs, routers included. A fresh router finds all tokens alike, so the dial picks one width for all; `mixed` gives the sequences
of a batch dials of their own. `limit` counts bytes of weights: with MLPs of the share that is read, and routers.

Writes benchmarks/results/gpu-CARD-DTYPE.json.
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
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.benchmark import decode_bytes, decode_limit
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.modeling.mlp_backends import Decision, run_experts
from dynamoe_hf.observe import expert_shares, shares_taken


COPIES = 4
MEMORY_BOUND = 64  # tokens up to which reading the weights takes longer than multiplying; some 300 on an H100 in bfloat16
CONTEXT, ROOM = 512, 1024  # tokens in the cache, and what it has room for: each replay adds one
VOCABULARY = 32000
DIALS = {0.4: 0.25, 0.6: 0.5, 0.75: 0.75, 0.9: 1.0}  # and the share that a fresh router then picks
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
    return ((run_experts(x, Decision(expert), mlp.weights(x))[0] - expected_TD).abs().max() / expected_TD.abs().max()).item()


def captured(run):
    """`run` as a CUDA graph, after warm-up on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(run=run):  # keeps what `run` holds: a graph knows addresses, and would read what is put there next
        graph.replay()

    return replay


def milliseconds(run):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def paired(base, kernel, rounds, runs=COPIES):
    """Medians over rounds, milliseconds for each of the `runs` that a call makes."""
    pairs = [(milliseconds(base) / runs, milliseconds(kernel) / runs) for _ in range(rounds + 5)][5:]
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
            run_experts(x, Decision(expert), mlp.weights(x))

    with torch.no_grad():
        modes = {
            "eager": paired(forward_dense, forward_kernel, rounds),
            "graph": paired(captured(forward_dense), captured(forward_kernel), rounds),
        }
    if x.shape[1] > MEMORY_BOUND:
        inputs = x.clone().requires_grad_()

        def train(run):
            for mlp in mlps:
                weights = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight]
                torch.autograd.grad(run(mlp), [inputs, *weights], x)

        base, kernel = (
            lambda: train(lambda mlp: dense(mlp, inputs)),
            lambda: train(lambda mlp: run_experts(inputs, Decision(expert), mlp.weights(inputs))),
        )
        modes["forward and backward, eager"] = paired(base, kernel, max(5, rounds // 5))
        modes["forward and backward, graph"] = paired(captured(base), captured(kernel), max(5, rounds // 5))
    return modes


def decode(shape, layers, batches, dtype, rounds):
    """Rows of decoding steps of a whole model, each setting against the dense model that shares its weights."""
    hidden_size, mlp_width = shape
    heads = hidden_size // 128
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden_size, intermediate_size=mlp_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 4), max_position_embeddings=ROOM,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    with torch.device("cuda"):
        base = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = DynaMoEForCausalLM.from_dense(base).to("cuda").eval()
    model.set_mlp_implementation("triton")
    base = dense_prefix(model, 1.0)

    def stepper(side, ids, **options):
        cache = StaticCache(config=config, max_cache_len=ROOM)
        side(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token, places = ids[:, :1].clone(), torch.full((len(ids), 1), CONTEXT, device="cuda")
        settings = {"past_key_values": cache, "use_cache": True, "position_ids": places, "logits_to_keep": 1}
        return captured(lambda: side(token, **settings, **options))

    rows = []
    for batch in batches:
        ids = torch.randint(VOCABULARY, (batch, CONTEXT), device="cuda")
        dials = {f"all {share:.0%}": theta for theta, share in DIALS.items()}
        if batch >= len(DIALS):
            dials["mixed"] = torch.tensor(list(DIALS) * batch, device="cuda")[:batch]
        dense_step = stepper(base, ids)
        for name, theta in dials.items():
            out = model(ids[:, :64], sensitivity=theta, output_router_logits=True)
            shares = shares_taken(expert_shares(model), out.expert_indices)
            assert name == "mixed" or f"all {shares.mean():.0%}" == name, f"{name} took {shares.mean():.1%}"
            model.set_mlp_implementation("torch")
            expected = model(ids[:, :64], sensitivity=theta).logits.double()
            model.set_mlp_implementation("triton")
            actual = model(ids[:, :64], sensitivity=theta).logits.double()
            error = ((actual - expected).norm() / expected.norm()).item()
            if not error < 0.05:  # through all layers
                sys.exit(f"No parity, so nothing is timed: batch {batch}, {name}, logits differ by {error:.2g} of their norm.")
            widest = shares.amax((1, 2)).mean().item()
            limit = decode_limit(decode_bytes(model), widest, max(DIALS))
            row = paired(dense_step, stepper(model, ids, sensitivity=theta), rounds, runs=1)
            row = {"batch": batch, "routes": name, "limit": limit, "error": error, **row, "reached": limit / row["ratio"]}
            rows.append(row)
            print(
                f"| {batch} | {name} | {limit:.3f} | {row['ratio']:.3f} | {row['dense_ms']:.3f} | {row['kernel_ms']:.3f} |",
                flush=True,
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=[4096, 14336], metavar=("D", "H"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 2048])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--layers", type=int, default=32, help="of the whole model; 0 leaves it out")
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
    if args.layers:
        del mlps, x, expert
        torch.cuda.empty_cache()
        print(f"\nDecoding, {args.layers} layers\n| batch | routes | limit | kernel / dense | dense ms | kernel ms |")
        print("|---|---|---|---|---|---|")
        with torch.no_grad():
            steps = decode(args.shape, args.layers, (1, 8), dtype, args.rounds)
        record["decode"] = {"layers": args.layers, "context": CONTEXT, "rows": steps}
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
