# SPDX-License-Identifier: Apache-2.0
"""
Quality against time: perplexity over the dense base's, and tokens per second of one sequence on one thread, of a model folder at each
budget and of what a user would take instead. In one run, on the same tokens.

    python benchmarks/quality_time.py runs/demo/trained runs/base [--llama llama/bin/python]

The base is a folder with a GGUF file. With `--llama`, the Python of an environment that has llama-cpp-python (see
`benchmarks/llama_worker.py`), llama.cpp runs that file and its Q8_0, perplexity computed from its own logits.
"""

import argparse
import copy
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dynamoe_hf.benchmark import machine, torch_threads
from dynamoe_hf.convert import load_dense
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import block_nll, ratio_to
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import load_model, load_tokenizer, write_json


PROMPT, NEW_TOKENS, BLOCK = 64, 16, 512
FIGURE = "quality-time"


class Llama:
    """The worker process of llama.cpp."""

    def __init__(self, python: str):
        worker = Path(__file__).with_name("llama_worker.py")
        self.process = subprocess.Popen([python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command, **request):
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command, **request}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"llama.cpp has ended at {command}"
        return json.loads(answer)


def seconds_of(model, prompt, tokens, **options):
    """Seconds to read the tokens one by one after the prompt."""
    cache = model(prompt, use_cache=True, logits_to_keep=1, **options).past_key_values
    start = time.perf_counter()
    for token in tokens.split(1, 1):
        model(token, past_key_values=cache, use_cache=True, **options)
    return time.perf_counter() - start


def contenders(folder, base, blocks, prompt, tokens):
    """Name -> (losses of the blocks, function that gives the seconds of decoding)."""
    model, dense = load_model(folder, dtype=torch.float32, device_map="cpu"), load_dense(base, "float32")[0]
    packed = load_model(folder, dtype=torch.float32, device_map="cpu").pack("int8")
    found: dict[str, tuple[torch.Tensor, Callable[[], float]]] = {}

    def add(name, side, **options):
        nll = block_nll(_with(side, options), blocks, 2, name)
        found[name] = nll, partial(seconds_of, side, prompt, tokens, **options)

    add("PyTorch float32", dense)
    add("PyTorch bfloat16", copy.deepcopy(dense).bfloat16())
    add("ours float32, static 75%", dense_prefix(model, 0.75))
    for budget in [1.0, *sorted(map(float, model.config.budgets), reverse=True)]:
        theta = model.config.sensitivity_of(budget)
        add(f"ours int8, {budget:.0%}", packed, sensitivity=theta)
    add("ours float32, 75%", model, sensitivity=model.config.sensitivity_of(0.75))
    return found


def _with(model, options):
    """The model with options in force, for what calls it without them."""

    def run(*inputs, **more):
        return model(*inputs, **more, **options)

    run.device = model.device  # type: ignore[attr-defined]
    return run


def llama_contenders(python, base, blocks, prompt, tokens, work):
    llama, gguf = Llama(python), next(Path(base).glob("*.gguf"))
    files = {f"llama.cpp {gguf.stem.rpartition('.')[2]}": str(gguf), "llama.cpp Q8_0": f"{work}/q8.gguf"}
    llama.ask("quantize", source=str(gguf), target=files["llama.cpp Q8_0"], kind="Q8_0")
    return {
        name: (
            torch.tensor(llama.ask("nll", path=path, blocks=blocks.tolist()), dtype=torch.float64),
            partial(llama.ask, "decode", path=path, prompt=prompt[0].tolist(), tokens=tokens[0].tolist()),
        )
        for name, path in files.items()
    }


def draw(rows, path):
    """Perplexity over dense against tokens per second."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5))
    for ours, color in ((True, "tab:blue"), (False, "tab:orange")):
        points = [
            (row["tokens_per_second"], row["ratio"], name)
            for name, row in rows.items()
            if name.startswith("ours int8") == ours
        ]
        axis.plot([p[0] for p in points], [p[1] for p in points], "o-" if ours else "s", color=color)
        for number, (speed, ratio, name) in enumerate(sorted(points)):
            label, below = name.removeprefix("ours int8, "), not ours and number % 2
            axis.annotate(
                label,
                (speed, ratio),
                textcoords="offset points",
                xytext=(4, -14 - 10 * (number > 2) if below else 6),
                fontsize=8,
            )
    axis.set_title("blue: ours in int8, by budget", fontsize=10, loc="left")
    axis.set_xlabel("tokens/s, one sequence, one thread")
    axis.set_ylabel("perplexity over dense")
    axis.set_ylim(bottom=0.94)
    axis.margins(x=0.1)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="calibrated model folder")
    parser.add_argument("base", type=Path, help="folder with the base's GGUF file")
    parser.add_argument("--llama", help="Python of an environment with llama-cpp-python")
    parser.add_argument("--text", type=Path, help="held-out text file; Python's held-out topics by default")
    parser.add_argument("--max-tokens", type=int, default=6144)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.folder)
    blocks = token_blocks(documents_for("held-out", args.text), tokenizer, BLOCK, args.max_tokens)
    timed = blocks[:1, : PROMPT + NEW_TOKENS]
    prompt, tokens = timed[:, :PROMPT], timed[:, PROMPT:]
    with tempfile.TemporaryDirectory() as work:
        sides = contenders(args.folder, args.base, blocks, prompt, tokens)
        if args.llama:
            sides |= llama_contenders(args.llama, args.base, blocks, prompt, tokens, work)
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        with torch_threads(1):
            for _ in tqdm(range(args.rounds + 1), desc="Timing", leave=False):
                for name, (_, run) in sides.items():
                    seconds[name].append(run())
    first = "PyTorch float32"
    rows = {}
    for name, (nll, _) in sides.items():
        ratios = [ours / dense for ours, dense in zip(seconds[name][1:], seconds[first][1:])]
        quality = ratio_to(nll, sides[first][0])
        rows[name] = {
            "ratio": quality["ratio_to_dense"],
            "interval": quality["ratio_interval"],
            "time_to_float32": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
            "tokens_per_second": NEW_TOKENS / statistics.median(seconds[name][1:]),
        }
        row = rows[name]
        print(
            f"{name:28} {row['ratio']:.3f} of dense, {row['tokens_per_second']:6.1f} tokens/s, {1 / row['time_to_float32']:.2f}x"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(1) | {"tokens": blocks.numel(), "text": args.text.stem if args.text else "topics", "rounds": args.rounds}
    write_json(args.out / f"{FIGURE}_{about['name']}.json", {"machine": about, "rows": rows})
    draw(rows, args.out / f"{FIGURE}_{about['name']}.png")


if __name__ == "__main__":
    main()
