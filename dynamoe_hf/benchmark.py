# SPDX-License-Identifier: Apache-2.0
"""Wall-clock against the dense model in the same run, each figure beside the limit that bytes and FLOPs allow."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from .convert import dense_prefix, prove_parity
from .data import documents_for, token_blocks
from .folder import BENCHMARK, load_model, load_tokenizer, write_json
from .label import expert_shares
from .modeling import DynaMoEForCausalLM


# (hidden size, MLP width) of what people serve.
SHAPES = {"SmolLM2-135M": (576, 1536), "Llama-3.2-1B": (2048, 8192), "Llama-3.1-8B": (4096, 14336)}
TOKENS = (1, 2, 4, 8, 16, 64, 512)  # of single MLPs


@torch.no_grad()
def bench_folder(
    folder: str | Path,
    budgets: Sequence[float] | None = None,
    threads: int = 1,
    rounds: int = 7,
    new_tokens: int = 32,
    shapes: Sequence[str] = ("SmolLM2-135M", "Llama-3.2-1B"),
) -> dict:
    """
    Time a model folder against the dense model of the same shape and weights, and single MLPs of known shapes.

    Parity comes first, and nothing is timed where it fails. Both sides then run in turn in one process, and every ratio is
    the median of those of its pairs, so that a machine whose speed drifts slows both.

    Args:
        folder: calibrated model folder; `benchmark.json` is written into it.
        budgets: marks of the dial; all calibrated ones by default.
        threads: of torch. Two threads on a busy machine can be a hundred times slower than one, so one is the default.
        rounds: counted rounds of each pair, after one to warm up.
        new_tokens: tokens decoded in each round.
        shapes: names in `SHAPES` of the single MLPs.

    Returns:
        `machine`, `parity`, and rows of `mlp`, `decode`, `prefill`. A row has `share` (of MLP width), `ratio` (time over the
        dense side's), its `range`, the `limit` of that ratio, and `reached` (limit / ratio: 1 is perfect).

    Raises:
        ValueError: no calibrated budgets, or full-width logits differ from the dense ones.
    """
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    marks = [float(b) for b in model.config.budgets] if budgets is None else list(budgets)
    thetas = {f"budget {b:g}": model.config.sensitivity_of(b) for b in marks} | {"full width": 1.0}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokens = token_blocks(documents_for("held-out"), tokenizer, 512, 8 * 512)
        dense = dense_prefix(model, 1.0)
        full = {"force_expert": model.config.expert_count - 1}
        parity = prove_parity(dense(tokens[:1, :64]).logits, model(tokens[:1, :64], **full).logits, model.dtype)
        record = {
            "machine": machine(threads),
            "parity": parity,
            "mlp": [row for name in shapes for row in bench_mlp(*SHAPES[name], rounds=rounds, name=name)],
            "decode": [row for batch in (1, 8) for row in bench_decode(model, tokens[:batch], thetas, new_tokens, rounds)],
            "prefill": bench_prefill(model, tokens[:1], thetas, rounds),
        }
    finally:
        torch.set_num_threads(before)
    if Path(folder).is_dir():
        write_json(Path(folder) / BENCHMARK, record)
    return record


def machine(threads: int) -> dict:
    """What a figure must be read with: processor, threads, versions, day."""
    processor = next(
        (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")), platform.processor()
    )
    return {
        "processor": processor,
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _cpu_info():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def paired(dense: Callable[[], None], other: Callable[[], None], rounds: int) -> dict:
    """Run both in turn; the median of `other`'s time over `dense`'s, pair by pair, its range, and the median seconds of each."""
    times = [(_seconds(dense), _seconds(other)) for _ in range(rounds + 1)][1:]
    ratios = [b / a for a, b in times]
    return {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "dense_seconds": statistics.median(a for a, _ in times),
        "seconds": statistics.median(b for _, b in times),
    }


def _seconds(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _against(row, limit):
    return {**row, "limit": limit, "reached": limit / row["ratio"]}


@torch.no_grad()
def bench_mlp(
    hidden_size: int, mlp_width: int, tokens: Sequence[int] | None = None, rounds: int = 7, name: str = ""
) -> list[dict]:
    """
    One nested MLP against the dense one: forced experts for one token, and experts drawn uniformly for more. The router is
    not part of it; the limit is the share of the width, the mean over tokens for mixed experts.
    """
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden_size, intermediate_size=mlp_width, num_hidden_layers=1, num_attention_heads=8
    )
    mlp = DynaMoEForCausalLM.from_dense(LlamaForCausalLM(config)).eval().model.layers[0].mlp
    generator = torch.Generator().manual_seed(0)
    rows = []

    def measure(x, expert, share, case):
        repeats = min(100, max(1, int(3e9 / (6 * hidden_size * mlp_width * x.shape[1]))))

        def dense():
            for _ in range(repeats):
                mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

        def nested():
            for _ in range(repeats):
                mlp._run(x, expert)

        row = _against(paired(dense, nested, rounds), share)
        rows.append({"shape": name or f"{hidden_size}x{mlp_width}", "tokens": x.shape[1], "case": case, "share": share, **row})

    one = torch.randn(1, 1, hidden_size, generator=generator)
    for index, width in enumerate(mlp.widths[:-1]):
        measure(one, index, width / mlp_width, "forced")
    for count in tqdm([count for count in tokens or TOKENS if count > 1], desc=f"MLP {name}", leave=False):
        x = torch.randn(1, count, hidden_size, generator=generator)
        expert = torch.randint(len(mlp.widths), (1, count), generator=generator)
        share = torch.tensor(mlp.widths)[expert].float().mean().item() / mlp_width
        measure(x, expert, share, "mixed")
    return rows


@torch.no_grad()
def bench_decode(
    model: DynaMoEForCausalLM, tokens: torch.Tensor, sensitivities: dict[str, float], new_tokens: int = 32, rounds: int = 7
) -> list[dict]:
    """
    Decoding with a cache, token by token, over the same given text on both sides: token ids (B, S), prefill not counted.

    The limit counts bytes: all weights that a step reads, of the MLPs the widest expert that a sequence of the batch takes.
    """
    dense, start = dense_prefix(model, 1.0), tokens.shape[1] - new_tokens
    prompt, steps = tokens[:, :start], tokens[:, start:].split(1, dim=1)
    caches = {side: side(prompt, use_cache=True, logits_to_keep=1).past_key_values for side in (dense, model)}

    def decode(side, **options):
        for step in steps:
            side(step, past_key_values=caches[side], use_cache=True, **options)
        caches[side].crop(-new_tokens)  # as it was before, for the next round

    bytes_all, bytes_mlp, bytes_router = _bytes(model)
    rows = []
    for name, theta in tqdm(sensitivities.items(), desc=f"Decoding, batch {len(tokens)}", leave=False):
        row = paired(lambda: decode(dense), lambda theta=theta: decode(model, sensitivity=theta), rounds)
        share, widest = _decode_shares(model, prompt, steps, theta)
        limit = (bytes_all - (1 - widest) * bytes_mlp + (bytes_router if theta < 1 else 0)) / bytes_all
        rate = {"tokens_per_second": tokens.shape[0] * new_tokens / row["seconds"]}
        rows.append(
            {"setting": name, "sensitivity": theta, "batch": len(tokens), "share": share, **_against(row, limit), **rate}
        )
    return rows


@torch.no_grad()
def bench_prefill(
    model: DynaMoEForCausalLM, tokens: torch.Tensor, sensitivities: dict[str, float], rounds: int = 7
) -> list[dict]:
    """One pass over token ids (B, S), logits of the last position only. The limit counts FLOPs, attention scores included."""
    dense, rows = dense_prefix(model, 1.0), []
    for name, theta in tqdm(sensitivities.items(), desc="Prefill", leave=False):
        with model.routing(sensitivity=theta, records=[]) as routing:
            model.model(tokens, use_cache=False)
            share = _mean_share(model, routing.records)
        row = paired(
            lambda: dense(tokens, use_cache=False, logits_to_keep=1),
            lambda theta=theta: model(tokens, use_cache=False, logits_to_keep=1, sensitivity=theta),
            rounds,
        )
        layers = model.model.layers
        mlp = sum(p.numel() for layer in layers for n, p in layer.mlp.named_parameters() if not n.startswith("router"))
        router = sum(p.numel() for layer in layers for p in layer.mlp.router.parameters()) if theta < 1 else 0
        rest = sum(p.numel() for layer in layers for n, p in layer.named_parameters() if not n.startswith("mlp."))
        attention = len(layers) * tokens.shape[1] * model.config.hidden_size  # q k and p v, causal, for each token
        limit = (share * mlp + router + rest + attention) / (mlp + rest + attention)
        rows.append({"setting": name, "sensitivity": theta, "tokens": tokens.shape[1], "share": share, **_against(row, limit)})
    return rows


def _bytes(model):
    """Bytes that a decoding step reads of a dense model, of which MLPs, and of the routers. An untied embedding is not read."""
    size = {"mlp": 0, "router": 0, "rest": 0}
    for name, parameter in model.named_parameters():
        part = "router" if ".router." in name else "mlp" if ".mlp." in name else "rest"
        if "embed_tokens" in name and parameter is not model.lm_head.weight:
            continue
        size[part] += parameter.numel() * parameter.element_size()
    return size["mlp"] + size["rest"], size["mlp"], size["router"]


def _mean_share(model, records):
    shares = expert_shares(model)
    return torch.stack([share[record.expert] for share, record in zip(shares, records)]).mean().item()


def _decode_shares(model, prompt, steps, theta):
    """Mean share of the decoded tokens, and mean over steps and layers of the widest expert in the batch."""
    shares, mean, widest = expert_shares(model), [], []
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    for step in steps:
        with model.routing(sensitivity=theta, records=[]) as routing:
            model(step, past_key_values=cache, use_cache=True)
            taken = torch.stack([share[record.expert] for share, record in zip(shares, routing.records)])
        mean.append(taken.mean().item())
        widest.append(taken.flatten(1).max(1).values.mean().item())
    return statistics.fmean(mean), statistics.fmean(widest)
