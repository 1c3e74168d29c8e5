# SPDX-License-Identifier: Apache-2.0
"""Wall-clock against the dense model in the same run, each figure beside the limit that bytes and FLOPs allow."""

import ctypes
import datetime
import gc
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from .arguments import BenchArguments, resolve
from .calibrate import check_reach
from .card import WAIT, check_records, new_records
from .convert import prove_parity
from .data import documents_for, token_blocks
from .export import dense_prefix
from .folder import BENCHMARK, check_writable, count_parameters, load_model, load_tokenizer, write_json
from .modeling import DynaMoEForCausalLM
from .modeling.dense_base import decoder_layers
from .modeling.mlp_backends import Decision, run_experts
from .modeling.moe_base import is_mixture
from .modeling.routing import router_names
from .observe import bisect_rising, expert_shares, run_routers, shares_read, shares_taken


# (hidden size, MLP width) of what people serve. Mistral-7B's MLPs have the shape of Llama-3.1-8B's.
SHAPES = {
    "SmolLM2-135M": (576, 1536),
    "Llama-3.2-1B": (2048, 8192),
    "Llama-3.1-8B": (4096, 14336),
    "Mistral-7B": (4096, 14336),
}
TOKENS = (1, 2, 3, 4, 8, 12, 16, 64, 512)  # of single MLPs
BATCHES = (1, 8, 32)  # of decoding
PROMPTS = (512, 2048)  # of prefill
RAPL = Path("/sys/class/powercap")
COLD_BYTES = 2**28  # of single MLPs, more than a cache holds


@torch.no_grad()
def bench_folder(folder: str | Path, arguments: BenchArguments | None = None, **settings: Any) -> dict:
    """
    Time a model folder against the dense model of the same shape and weights, and single MLPs of known shapes: on the CPU, also
    where there is a GPU (which `benchmarks/gpu.py` times).

    Parity comes first, and nothing is timed where it fails. All settings then run in turn in one process, and every ratio is
    the median of those of its rounds, so that a machine whose speed drifts slows them all.

    Args:
        folder: calibrated model folder; `benchmark.json` is written into it.
        arguments, settings: the fields of `BenchArguments`, as one object or by name.
            `generate` makes twice as many `new_tokens`. `shares` are of the timed text itself: budgets are calibrated on other
            text, from which a short one differs by some points. `compile` decodes one sequence with a static cache.

    Returns:
        `machine` (with the dtype), `parity`, and rows of `mlp`, `decode`, `prefill`, `generate`, and `compiled` and `int8` where asked for.
        A row has `share` (of the MLPs' weights), `ratio` (time over the dense side's), its `range`, the `limit` of that ratio, `reached`
        (limit / ratio: 1 is perfect), and `energy_ratio` where the machine counts energy.

    Raises:
        ValueError: no calibrated budgets, an unknown shape, a share out of reach, or full-width logits differ from the dense ones.
    """
    arguments = resolve(BenchArguments, arguments, settings)
    shapes, shares, rounds, new_tokens = arguments.shapes, arguments.shares, arguments.rounds, arguments.new_tokens
    if unknown := set(shapes) - set(SHAPES):
        raise ValueError(f"Unknown shapes {', '.join(sorted(unknown))}. Choose from {', '.join(SHAPES)}.")
    check_writable(folder)
    check_records(folder)
    model, tokenizer = load_model(folder, device_map="cpu", dtype=arguments.dtype), load_tokenizer(folder)
    if shares:
        check_reach(model, shares, "share")
    marks = [float(b) for b in model.config.budgets] if arguments.budgets is None else list(arguments.budgets)
    thetas = {f"budget {b:g}": model.config.sensitivity_of(b) for b in marks} | {"full width": 1.0}

    def texts(count, length):
        return token_blocks(documents_for("held-out"), tokenizer, length, count * length)

    with torch_threads(arguments.threads):
        dense = dense_prefix(model, 1.0)
        full = {"force_expert": model.config.expert_count - 1}
        tokens = texts(1, 64)
        parity = prove_parity(dense(tokens).logits, model(tokens, **full).logits, model.dtype)
        record = {
            "machine": {**machine(arguments.threads), "dtype": str(model.dtype).removeprefix("torch.")},
            "parity": parity,
            "mlp": [row for name in shapes for row in bench_mlp(*SHAPES[name], rounds=rounds, name=name, dtype=model.dtype)],
            "decode": [
                row
                for batch in BATCHES
                for row in bench_decode(model, texts(batch, 64 + new_tokens), thetas, new_tokens, rounds, shares=shares)
            ],
            "prefill": [row for length in PROMPTS for row in bench_prefill(model, texts(1, length), thetas, rounds, shares)],
            "generate": bench_generate(model, texts(1, 64), thetas, 2 * new_tokens, rounds),
        }
        for name, option in (("compiled", "compile"), ("int8", "int8")):  # the last replaces the weights
            if getattr(arguments, option):
                how: dict[str, Any] = {"shares": shares, "compile": arguments.compile, option: True}
                record[name] = bench_decode(model, texts(1, 64 + new_tokens), thetas, new_tokens, rounds, **how)
    _keep(folder, record)
    return record


def _keep(folder, record):
    if Path(folder).is_dir():
        with new_records(folder, wait=WAIT) as staging:
            write_json(staging / BENCHMARK, record)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Inside, torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(threads: int) -> dict:
    """What a figure must be read with: processor, threads, versions, day; `name` is for files, `amd-epyc_202611`."""
    processor = next(
        (line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")), platform.processor()
    )
    today = datetime.date.today()
    words = re.findall(r"[a-z0-9]+", re.sub(r"\((r|tm)\)", "", processor.lower()))
    return {
        "name": f"{'-'.join(words[:2])}_{today:%Y%m}",
        "processor": processor,
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": today.isoformat(),
    }


def _cpu_info():
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def interleaved(runs: Mapping[str, Sequence[Callable[[], Any]]], rounds: int, what: str = "Timing") -> dict[str, dict]:
    """
    Run all in turn, `rounds` times after one to warm up. A run is a list of steps, equally many for all, which take turns one by
    one: what disturbs the machine for longer than a step then slows every run.

    For each run but the first: the median of its time over the first's, round by round, the range of that, the median `seconds`
    and those of the first, and the ratio of energy where it is counted.
    """
    measured = [_round(runs) for _ in tqdm(range(rounds + 1), desc=what, leave=False)][1:]
    first, *others = runs
    rows = {}
    for name in others:
        ratios = [each[name][0] / each[first][0] for each in measured]
        rows[name] = {
            "ratio": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "dense_seconds": statistics.median(each[first][0] for each in measured),
            "seconds": statistics.median(each[name][0] for each in measured),
        }
        if all(each[side][1] for each in measured for side in (first, name)):
            rows[name]["energy_ratio"] = statistics.median(each[name][1] / each[first][1] for each in measured)
    return rows


def _round(runs):
    """Seconds of each run, and microjoules where the processor counts them."""
    totals = {name: [0.0, 0] for name in runs}
    for steps in zip(*runs.values(), strict=True):
        for total, step in zip(totals.values(), steps):
            energy, start = _microjoules(), time.perf_counter()
            step()
            total[0] += time.perf_counter() - start
            total[1] += 0 if energy is None else _microjoules() - energy
    return totals


def _microjoules():
    """What the RAPL counters of all packages say, or None where there are none or they may not be read."""
    try:
        return sum(int(path.read_text()) for path in RAPL.glob("intel-rapl:?/energy_uj")) or None
    except OSError:
        return None


def peak_memory(run: Callable[[], None]) -> int | None:
    """Bytes of main memory that `run` needs at its peak beyond what is held before; None where the system does not say."""
    status = Path("/proc/self/status")
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None

    def kilobytes(name):
        return int(next(line.split()[1] for line in status.read_text().splitlines() if line.startswith(name)))

    before = kilobytes("VmRSS")
    run()
    return 1024 * (kilobytes("VmHWM") - before)


def _against(row, limit):
    return {**row, "limit": limit, "reached": limit / row["ratio"]}


@torch.no_grad()
def bench_mlp(
    hidden_size: int,
    mlp_width: int,
    tokens: Sequence[int] | None = None,
    rounds: int = 7,
    name: str = "",
    dtype: torch.dtype = torch.float32,
) -> list[dict]:
    """
    One nested MLP against the dense one: forced experts for one token, and for more each expert for as many of them, from the
    widest down, in random order. The router is not part of it; the limit is the share of the width, for mixed experts the mean.
    """
    # As many layers as no cache holds: in a model the weights of each layer come from memory.
    layers = max(1, round(COLD_BYTES / (3 * dtype.itemsize * hidden_size * mlp_width)))
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden_size, intermediate_size=mlp_width, num_hidden_layers=layers, num_attention_heads=8
    )
    dense_model: Any = LlamaForCausalLM(config)  # transformers' decorator hides `to`
    model = DynaMoEForCausalLM.from_dense(dense_model.to(dtype)).eval()
    mlps = model.nested_mlps
    widths = mlps[0].widths
    generator = torch.Generator().manual_seed(0)
    rows = []

    def measure(x, expert, share, case):
        def dense():
            for mlp in mlps:
                mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

        def nested():
            for mlp in mlps:
                run_experts(x, Decision(expert), mlp.weights(x))

        row = _against(
            interleaved({"dense": [dense], "nested": [nested]}, rounds, f"MLP {name}, {x.shape[1]} tokens")["nested"], share
        )
        rows.append({"shape": name or f"{hidden_size}x{mlp_width}", "tokens": x.shape[1], "case": case, "share": share, **row})

    one = torch.randn(1, 1, hidden_size, generator=generator).to(dtype)
    for index, width in enumerate(widths[:-1]):
        measure(one, index, width / mlp_width, "forced")
    for count in [count for count in tokens or TOKENS if count > 1]:
        x = torch.randn(1, count, hidden_size, generator=generator).to(dtype)
        expert = len(widths) - 1 - torch.randperm(count, generator=generator)[None] % len(widths)
        share = torch.tensor(widths)[expert].float().mean().item() / mlp_width
        measure(x, expert, share, "mixed")
    return rows


@torch.no_grad()
def bench_decode(
    model: DynaMoEForCausalLM,
    tokens: torch.Tensor,
    sensitivities: dict[str, float],
    new_tokens: int = 32,
    rounds: int = 7,
    compile: bool = False,
    shares: Sequence[float] = (),
    int8: bool = False,
) -> list[dict]:
    """
    Decoding with a cache, token by token, over the same given text on both sides: token ids (B, S), prefill not counted.

    The limit counts bytes: all weights that a step reads, of the MLPs the widest expert that a sequence of the batch takes.
    With `compile`, both sides are compiled whole (`fullgraph`) and use static caches. Besides `sensitivities`, by name, those
    are timed at which the decoded tokens take these mean `shares` of the MLPs' weights. With `int8`, the model is packed for good
    (`DynaMoEForCausalLM.pack`), the dense side keeps its dtype, and the limit counts the rows that a token keeps.
    """
    dense, start, sizes = dense_prefix(model, 1.0), tokens.shape[1] - new_tokens, decode_bytes(model)
    if int8:
        model.pack("int8")
    prompt, steps = tokens[:, :start], tokens[:, start:].split(1, dim=1)
    sensitivities = sensitivities | _dial(shares, lambda theta: _decode_shares(model, prompt, steps, theta)[0])

    def decoder(side, **options):
        cache = StaticCache(config=dense.config, max_cache_len=tokens.shape[1]) if compile else None
        cache = side(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        step_of = torch.compile(partial(side, **options), fullgraph=True) if compile else partial(side, **options)

        timed_steps = []
        for position, step in enumerate(steps, start):
            places = {"position_ids": torch.tensor([[position]])} if compile else {}
            timed_steps.append(partial(step_of, step, past_key_values=cache, use_cache=True, **places))

        def back():  # to where the prompt ends
            if compile:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(start)
            else:
                cache.crop(-new_tokens)

        return [*timed_steps, back]

    timed: dict[str, dict] = {}
    # A graph for each setting is one more whose guards every step tries in turn, so each setting is compiled alone.
    for group in [{name: theta} for name, theta in sensitivities.items()] if compile else [sensitivities]:
        if compile:
            torch._dynamo.reset()
        sides = {name: decoder(model, sensitivity=theta) for name, theta in group.items()}
        timed |= interleaved({"dense": decoder(dense), **sides}, rounds, f"Decoding, batch {len(tokens)}")
    rows = []
    for name, theta in sensitivities.items():
        share, widest = _decode_shares(model, prompt, steps, theta)
        limit = decode_limit(sizes, share, theta, 1 / model.dtype.itemsize) if int8 else decode_limit(sizes, widest, theta)
        row = {"setting": name, "sensitivity": theta, "batch": len(tokens), "share": share, **_against(timed[name], limit)}
        rows.append({**row, "tokens_per_second": tokens.shape[0] * new_tokens / row["seconds"]})
    return rows


@torch.no_grad()
def bench_prefill(
    model: DynaMoEForCausalLM,
    tokens: torch.Tensor,
    sensitivities: dict[str, float],
    rounds: int = 7,
    shares: Sequence[float] = (),
) -> list[dict]:
    """
    One pass over token ids (B, S), logits of the last position only. The limit counts FLOPs, attention scores included.
    Besides `sensitivities`, by name, those are timed at which the tokens take these mean `shares` of the MLPs' weights.
    """
    dense = dense_prefix(model, 1.0)

    def share_at(theta):
        return run_routers(model, tokens, expert_shares(model), theta, len(tokens)).share_N.mean().item()

    sensitivities = sensitivities | _dial(shares, share_at)
    runs = {"dense": [partial(dense, tokens, use_cache=False, logits_to_keep=1)]}
    for name, theta in sensitivities.items():
        runs[name] = [partial(model, tokens, use_cache=False, logits_to_keep=1, sensitivity=theta)]
    timed, rows = interleaved(runs, rounds, f"Prefill of {tokens.shape[1]}"), []
    layers = decoder_layers(model.base_model)
    counts = count_parameters(model)
    mlp, routers = counts["mlp"], counts["router"]
    rest = sum(p.numel() for p in layers.parameters()) - mlp - routers - counts["idle"]
    rest += len(layers) * tokens.shape[1] * model.config.hidden_size  # q k and p v, causal, for each token
    for name, theta in sensitivities.items():
        share = share_at(theta)
        limit = (share * mlp + (routers if theta < 1 else 0) + rest) / (mlp + rest)
        row = {"setting": name, "sensitivity": theta, "tokens": tokens.shape[1], "share": share}
        rows.append({**row, **_against(timed[name], limit)})
    return rows


@torch.no_grad()
def bench_generate(
    model: DynaMoEForCausalLM, tokens: torch.Tensor, sensitivities: dict[str, float], new_tokens: int = 32, rounds: int = 7
) -> list[dict]:
    """
    `generate` end to end, greedy, equally many tokens on both sides, whose texts may differ: prompts (B, S). Also the memory
    that it needs beyond the weights. The limit is that of decoding the model's own text; the prompt is left out of it.
    """
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    # transformers gives `generate` a type of `self` that its own classes do not match.
    dense: Any = dense_prefix(model, 1.0)
    routed: Any = model
    runs = {"dense": partial(dense.generate, tokens, **options)}
    for name, theta in sensitivities.items():
        runs[name] = partial(routed.generate, tokens, sensitivity=theta, **options)
    timed, rows = interleaved({name: [run] for name, run in runs.items()}, rounds, "Generating"), []
    dense_peak = peak_memory(runs["dense"])
    for name, theta in sensitivities.items():
        written = runs[name]()
        steps = written[:, tokens.shape[1] : -1].split(1, dim=1)
        share, widest = _decode_shares(model, tokens, steps, theta)
        limit = decode_limit(decode_bytes(model), widest, theta)
        row = {"setting": name, "sensitivity": theta, "batch": len(tokens), "share": share, **_against(timed[name], limit)}
        memory = {"dense_peak_bytes": dense_peak, "peak_bytes": peak_memory(runs[name])}
        rows.append({**row, "tokens_per_second": len(tokens) * new_tokens / row["seconds"], **memory})
    return rows


def decode_limit(sizes: tuple[float, float, float], share: float, theta: float, packed: float = 1.0) -> float:
    """
    Bytes that a step reads with a share of the MLPs, over those of the dense model: `sizes` as `decode_bytes` gives them, all but the
    routers `packed` to this part of them.
    """
    bytes_all, bytes_mlp, bytes_router = sizes
    return (packed * (bytes_all - (1 - share) * bytes_mlp) + (bytes_router if theta < 1 else 0)) / bytes_all


def decode_bytes(model: DynaMoEForCausalLM) -> tuple[float, float, float]:
    """
    Bytes that a decoding step of one token reads of a dense model, of which MLPs, and of the routers. An untied embedding is not read,
    nor are experts of a mixture that the token is not sent to.
    """
    size = {"mlp": 0.0, "router": 0.0, "rest": 0.0}
    routers = router_names(model)
    read = {id(p): mlp.active if is_mixture(mlp) else 1.0 for mlp in model.nested_mlps for p in mlp.parameters()}
    for name, parameter in model.named_parameters():
        part = "router" if name in routers else "mlp" if id(parameter) in read else "rest"
        if "embed_tokens" in name and parameter is not model.lm_head.weight:
            continue
        size[part] += parameter.numel() * parameter.element_size() * (read[id(parameter)] if part == "mlp" else 1)
    return size["mlp"] + size["rest"], size["mlp"], size["router"]


def _dial(shares, share_at):
    """The sensitivity of each of `shares`, by name."""
    progress = tqdm(shares, desc="Setting the dial", leave=False)
    return {f"share {share:g}": bisect_rising(share_at, share, 0.0, 1.0, rounds=12) for share in progress}


def _decode_shares(model, prompt, steps, theta):
    """Mean share of the decoded tokens, and mean over steps and layers of the widest expert in the batch."""
    mean, widest = [], []
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
    for step in steps:
        with model.routing(records=[]) as routing:
            model(step, past_key_values=cache, use_cache=True, sensitivity=theta)
        mean.append(shares_read(model, routing.records).mean().item())
        taken = shares_taken(expert_shares(model), [record.expert for record in routing.records])
        widest.append(taken.flatten(1).max(1).values.mean().item())
    return statistics.fmean(mean), statistics.fmean(widest)
