"""
Decoding with sparsity on a GPU: the Triton kernel of `sparse_decode_triton.py` against dense cuBLAS, and against the kernel that
reads whole prefixes. Parity first, then time.

    python benchmarks/gpu_sparse.py [--shapes 2048x8192 4096x14336] [--rows 1 2 4 8] [--dtype bfloat16] [--search]

One MLP with random weights: 2048x8192 is that of Llama-3.2-1B, 4096x14336 that of Llama-3.1-8B and Mistral-7B. All sides run as
CUDA graphs, in turn, over several copies of the weights so that none waits in L2; a ratio is the median over rounds, by CUDA events.
The router is not part of it. `width` and `density` are forced; `read` is the share of the weights that one token reads, `union` that
of the rows of weights that any of the tokens needs.

`--search` times other sizes of blocks at one token first. Writes benchmarks/results/gpu-sparse-CARD-DTYPE.json.
"""

import argparse
import datetime
import itertools
import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import triton
from gpu import COPIES, TOLERANCE, captured, dense, milliseconds, nested_mlps, paired

from dynamoe_hf.modeling import sparse_decode_triton as kernel
from dynamoe_hf.modeling.mlp_backends import Decision, run_experts
from dynamoe_hf.modeling.sparsity import Thresholds, keep_large


MIXES = [(1.0, 1.0), (1.0, 0.7), (1.0, 0.5), (0.75, 0.7), (0.5, 1.0), (0.5, 0.7), (0.5, 0.5)]  # width and density
# Sizes of blocks that `--search` tries: of the first kernel, then, with the best of those, of the second.
FIRST = {"ROWS": (64, 128, 256), "NEURONS": (32, 64), "WARPS": (4, 8)}
SECOND = {"HIDDEN_ROWS": (64, 128, 256), "OUTPUTS": (16, 32, 64), "PARTS": (1, 2, 4), "OUTPUT_WARPS": (4, 8)}


class Layers:
    """Copies of an MLP, as they are and laid out by inputs, and an input with the thresholds that leave a density of it."""

    def __init__(self, shape, dtype):
        self.plain, self.by_inputs = nested_mlps(*shape, dtype), nested_mlps(*shape, dtype)
        for mlp, other in zip(self.plain, self.by_inputs):
            other.load_state_dict(mlp.state_dict())
            for name in other.layout.projections:
                kernel.lay_by_inputs(getattr(other, name))

    def thresholds(self, x, width, density):
        """One for x and one for h that each leave a share `density` of the numbers."""
        if density == 1:
            return Thresholds(0.0, 0.0)
        least = x.abs().float().flatten().quantile(1 - density).item()
        mlp, kept = self.plain[0], keep_large(x.float(), least).to(x.dtype)
        hidden = F.silu(F.linear(kept, mlp.gate_proj.weight)) * F.linear(kept, mlp.up_proj.weight)
        return Thresholds(least, hidden[..., :width].abs().float().flatten().quantile(1 - density).item())


@torch.no_grad()
def reference(mlp, x, width, thresholds):
    """In float64: the output (1, T, D), the share of the weights that a token reads, and that of the rows that some token needs."""
    kept = keep_large(x.float(), thresholds.input)[0].double()
    gate, up, down = (p.weight.double() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    hidden = keep_large(F.silu(kept @ gate[:width].t()) * (kept @ up[:width].t()), thresholds.hidden)
    total = 3 * up.shape[0]
    inputs, neurons = (kept != 0).double(), (hidden != 0).double()
    read = (2 * width * inputs.mean(-1) + neurons.sum(-1)).mean().item() / total
    union = (2 * width * inputs.amax(0).mean() + neurons.amax(0).sum()).item() / total
    return hidden @ down[:, :width].t(), read, union


@torch.no_grad()
def row(layers, x, width_share, density, dtype, rounds):
    """Times of one setting, or None where the kernels do not give the reference's numbers."""
    mlp = layers.plain[0]
    expert = min(range(len(mlp.widths)), key=lambda index: abs(mlp.widths[index] / mlp.widths[-1] - width_share))
    width = mlp.widths[expert]
    thresholds = layers.thresholds(x, width, density)
    index = torch.full(x.shape[:2], expert, device="cuda")

    def run_sparse(each=None):
        for other in layers.by_inputs if each is None else [each]:
            y = kernel.sparse_decode(x, index, thresholds, other.tensors(x), other.act_name, other.widths)
        return y

    def run_dense():
        for other in layers.plain:
            dense(other, x)

    def run_prefix():
        for other in layers.plain:
            run_experts(x, Decision(index), other.weights(x))

    expected, read, union = reference(mlp, x, width, thresholds)
    error = ((run_sparse(layers.by_inputs[0])[0] - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE[dtype]:
        sys.exit(f"No parity, so nothing is timed: {len(x[0])} tokens, width {width}, density {density}: error {error:.2g}.")
    sparse = captured(run_sparse)
    to_dense, to_prefix = paired(captured(run_dense), sparse, rounds), paired(captured(run_prefix), sparse, rounds)
    return {
        "rows": x.shape[1], "width": width / mlp.widths[-1], "density": density, "read": read, "union": union, "error": error,
        "to_dense": to_dense["ratio"], "quartiles": to_dense["quartiles"], "to_prefix": to_prefix["ratio"],
        "dense_ms": to_dense["dense_ms"], "prefix_ms": to_prefix["dense_ms"], "sparse_ms": to_dense["kernel_ms"],
    }  # fmt: skip


def choices(names):
    """Every choice of the sizes of one kernel, those left out whose blocks are very small or spill registers."""
    for values in itertools.product(*names.values()):
        if 2048 <= values[0] * values[1] <= 8192:
            yield dict(zip(names, values))


def set_sizes(sizes):
    for name, value in sizes.items():
        setattr(kernel, name, value)


def a_token(layers, shape, dtype):
    """A call of the kernel for one token: three quarters of the width and 70% of its inputs."""
    x, expert = torch.randn(1, 1, shape[0], device="cuda", dtype=dtype), round(0.75 * len(layers.plain[0].widths)) - 1
    thresholds = layers.thresholds(x, layers.plain[0].widths[expert], 0.7)
    index = torch.full((1, 1), expert, device="cuda")

    def run():
        for mlp in layers.by_inputs:
            kernel.sparse_decode(x, index, thresholds, mlp.tensors(x), mlp.act_name, mlp.widths)

    return run


@torch.no_grad()
def search(layers, shape, dtype):
    """Milliseconds of each choice of sizes, the fastest first, of the first kernel and then of the second. The best are set."""
    run, found = a_token(layers, shape, dtype), []
    for names in (FIRST, SECOND):
        times = []
        for sizes in choices(names):
            set_sizes(sizes)
            graph = captured(run)
            times.append((min(milliseconds(graph) for _ in range(12)) / COPIES, sizes))
        times.sort(key=lambda each: each[0])
        set_sizes(times[0][1])
        found += [{"ms": ms, **sizes} for ms, sizes in times]
        print(f"{shape}: sizes of blocks, the fastest first; the last of {len(times)} takes {times[-1][0]:.4f} ms")
        for ms, sizes in times[:5]:
            print(f"  {ms:.4f} ms", sizes)
    return found


def compile_all(shape, dtype_name, jobs=15):
    """Let several processes fill Triton's cache, since a kernel takes a second to compile."""
    command = [sys.executable, __file__, "--shapes", shape, "--dtype", dtype_name, "--compile"]
    workers = [subprocess.Popen([*command, f"{job}/{jobs}"]) for job in range(jobs)]
    for worker in workers:
        worker.wait()


@torch.no_grad()
def compile_some(shape, dtype, part):
    job, jobs = map(int, part.split("/"))
    run = a_token(Layers(shape, dtype), shape, dtype)
    for sizes in [*choices(FIRST), *choices(SECOND)][job::jobs]:
        set_sizes(sizes)
        run()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x8192", "4096x14336"], metavar="DxH")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8], help="tokens of one step")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--search", action="store_true", help="time other sizes of blocks")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    dtype, shapes = getattr(torch, args.dtype), [tuple(map(int, each.split("x"))) for each in args.shapes]
    if args.compile:
        compile_some(shapes[0], dtype, args.compile)
        return
    card = torch.cuda.get_device_name()
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
    }
    record = {
        "card": card,
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "dtype": args.dtype,
        "copies": COPIES,
    }
    record |= {"command": " ".join(["python", "benchmarks/gpu_sparse.py", *sys.argv[1:]]), "shapes": {}}
    if args.search:
        compile_all(args.shapes[0], args.dtype)
    args.out.mkdir(exist_ok=True)
    for shape in shapes:
        entry = record["shapes"][f"{shape[0]}x{shape[1]}"] = {"rows": []}
        layers = Layers(shape, dtype)
        if args.search and shape == shapes[0]:  # the same sizes serve every shape
            entry["search"] = search(layers, shape, dtype)
        print(
            f"\n{card}, {args.dtype}, {shape}\n| rows | width | density | read | union | to dense | to prefix |\n|---|---|---|---|---|---|---|"
        )
        for rows in args.rows:
            x = torch.randn(1, rows, shape[0], device="cuda", dtype=dtype)
            for width, density in MIXES:
                found = row(layers, x, width, density, dtype, args.rounds)
                entry["rows"].append(found)
                figures = (found[name] for name in ("width", "density", "read", "union", "to_dense", "to_prefix"))
                print(f"| {rows} |", " | ".join(f"{figure:.3f}" for figure in figures), "|", flush=True)
        del layers
        path = args.out / f"gpu-sparse-{card.replace(' ', '-').lower()}-{args.dtype}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
