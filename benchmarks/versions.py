# SPDX-License-Identifier: Apache-2.0
"""
Two versions of `modeling/` in one process: decoding of one and of eight sequences, a prompt, a training step.

    git worktree add ../other COMMIT
    python benchmarks/versions.py ../other [--base HuggingFaceTB/SmolLM2-135M-Instruct]

Both convert the same dense weights and have the same routers, with random weights by which tokens differ. They must give the same
logits and experts before anything is timed, and take turns step by step, so that what disturbs the machine slows both. A ratio is the
time of this version over the other's, the median of the rounds; `speed` is its inverse.
"""

import argparse
import copy
import importlib
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.benchmark import machine, torch_threads
from dynamoe_hf.convert import load_dense
from dynamoe_hf.demo import obtain_model
from dynamoe_hf.folder import write_json


WIDTHS = [eighth / 8 for eighth in range(1, 9)]
CONTEXT, NEW_TOKENS, PROMPT = 64, 16, 512
SENSITIVITY = 0.9  # at which these routers take about half of the MLPs


def other_class(checkout: Path, into: Path) -> type:
    """`DynaMoEForCausalLM` of another checkout, under names of its own: torch knows an operator's name once a process."""
    package = into / "other_modeling"
    package.mkdir()
    for path in (checkout / "modeling").glob("*.py"):
        text = (
            path.read_text()
            .replace('"dynamoe::', '"other_dynamoe::')
            .replace('model_type = "dynamoe"', 'model_type = "other_dynamoe"')
        )
        (package / path.name).write_text("" if path.name == "__init__.py" else text)
    sys.path.insert(0, str(into))
    return importlib.import_module("other_modeling.modeling_dynamoe").DynaMoEForCausalLM


def converted(cls, dense):
    """A model whose routers disagree from token to token, the same for both versions."""
    torch.manual_seed(7)
    model = cls.from_dense(copy.deepcopy(dense), expert_widths=WIDTHS, similarity="loss_gain").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router.output." in name:
                parameter.normal_(std=1.5)
    return model


@torch.no_grad()
def decoding(model, ids):
    """Steps of decoding, and one that goes back to where the prompt ended."""
    cache = model(ids[:, :CONTEXT], use_cache=True, logits_to_keep=1).past_key_values
    step = torch.no_grad()(partial(model, past_key_values=cache, use_cache=True, sensitivity=SENSITIVITY))
    steps = [partial(step, ids[:, place : place + 1]) for place in range(CONTEXT, CONTEXT + NEW_TOKENS)]
    return [*steps, lambda: cache.crop(-NEW_TOKENS)]


def training(model, ids):
    """One step: all losses of the model's own `forward`, and their gradients."""

    def step():
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        model.eval()

    return [step]


def ratio(runs, rounds, what):
    """Time of this version over the other's, round by round: the median and the range."""
    ratios = []
    for number in tqdm(range(rounds + 1), desc=what, leave=False):
        seconds = dict.fromkeys(runs, 0.0)
        for steps in zip(*runs.values(), strict=True):
            pairs = list(zip(runs, steps))
            for name, step in pairs if number % 2 else reversed(pairs):
                start = time.perf_counter()
                step()
                seconds[name] += time.perf_counter() - start
        ratios.append(seconds["this"] / seconds["other"])
    return {"ratio": statistics.median(ratios[1:]), "range": [min(ratios[1:]), max(ratios[1:])]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="checkout of the other version")
    parser.add_argument("--base", help="dense model; SmolLM2-135M-Instruct by default")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    dense, _ = load_dense(args.base or obtain_model("runs/base"))
    with tempfile.TemporaryDirectory() as folder, torch_threads(args.threads):
        classes = {"other": other_class(args.other, Path(folder)), "this": DynaMoEForCausalLM}
        models = {name: converted(cls, dense) for name, cls in classes.items()}
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(dense.config.vocab_size, (8, PROMPT), generator=generator)
        with torch.no_grad():
            seen = [m(ids[:2, :64], sensitivity=SENSITIVITY, output_router_logits=True) for m in models.values()]
            difference = ((seen[0].logits - seen[1].logits).abs().max() / seen[0].logits.abs().max()).item()
        same = all(torch.equal(a, b) for a, b in zip(seen[0].expert_indices, seen[1].expert_indices))
        assert same and difference < 1e-4, (
            f"the versions differ: logits by {difference:.2g} of the largest, experts equal: {same}"
        )
        prompts = {
            name: [torch.no_grad()(partial(m, ids[:1], use_cache=False, logits_to_keep=1, sensitivity=SENSITIVITY))]
            for name, m in models.items()
        }
        cases = {f"decode {batch}": {name: decoding(m, ids[:batch]) for name, m in models.items()} for batch in (1, 8)}
        cases |= {
            f"prompt {PROMPT}": prompts,
            "training step": {name: training(m, ids[:2, :128]) for name, m in models.items()},
        }
        rows = {what: ratio(runs, args.rounds, what) for what, runs in cases.items()}
    for what, row in rows.items():
        print(
            f"{what:14} time {row['ratio']:.3f} ({row['range'][0]:.3f} to {row['range'][1]:.3f}), speed {1 / row['ratio']:.3f}"
        )
    about = machine(args.threads) | {"rounds": args.rounds, "parity": difference}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"versions_{about['name']}.json", {"machine": about, **rows})


if __name__ == "__main__":
    main()
