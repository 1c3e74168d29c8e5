# SPDX-License-Identifier: Apache-2.0
"""
Which numbers should an MLP leave out? Sparsity of the full width, without training for it, one change a row: how large a number is
(its score), what the thresholds are, and where they hold.

    python benchmarks/sparsity_search.py FOLDER [--text more.txt]

FOLDER is a model folder. Cells are ratios of perplexity to its full width on held-out tokens, at a share of the weights that is read. The
thresholds are those of other tokens (the calibration split of Python's topics).
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dynamoe_hf.benchmark import machine
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import block_nll, ratio_to
from dynamoe_hf.folder import load_model, load_tokenizer, write_json
from dynamoe_hf.modeling.sparsity import keep_large, thresholds_at
from dynamoe_hf.threshold_fit import fit_thresholds


SHARES = (0.7, 0.6, 0.5, 0.375)
SINKS = 4  # positions


class Layer(NamedTuple):
    """One MLP and what it read on the calibration tokens."""

    mlp: Any
    x: torch.Tensor  # (T, D)
    hidden: torch.Tensor  # (T, H)


Forward = Callable[[torch.Tensor], torch.Tensor]


def smallest(scores: torch.Tensor, share: float) -> float:
    """The score under which a share of the numbers lies."""
    flat = scores.flatten()
    return flat[:: max(1, flat.numel() // (1 << 20))].sort().values[int(share * (min(flat.numel(), 1 << 20) - 1))].item()


def by_score(layer: Layer, share: float, of_x: torch.Tensor | float = 1.0, of_h: torch.Tensor | float = 1.0) -> Forward:
    """Numbers whose size, times a factor for each input, is among the smallest are left out: one quantile for both products."""
    least_x, least_h = smallest(layer.x.abs() * of_x, 1 - share), smallest(layer.hidden.abs() * of_h, 1 - share)
    mlp = layer.mlp

    def forward(x):
        hidden = mlp.hidden(x * (x.abs() * of_x >= least_x))
        return mlp.down_linear(hidden * (hidden.abs() * of_h >= least_h))

    return forward


def wina(layer: Layer, share: float) -> Forward:
    """WINA (arXiv 2505.19427): times the norm of the weights that read the input."""
    mlp = layer.mlp
    inputs = torch.cat([getattr(mlp, name).weight for name in mlp.layout.projections[:-1]])
    return by_score(layer, share, inputs.norm(dim=0), mlp.down_linear.weight.norm(dim=0))


def in_axes(layer: Layer, share: float, axes: torch.Tensor, back: torch.Tensor, mean: torch.Tensor | float = 0.0) -> Forward:
    """Thresholds of the input in other axes, x -> (x - mean) axes, which the weights absorb by `back`; h as it is."""
    least_x, least_h = smallest(((layer.x - mean) @ axes).abs(), 1 - share), smallest(layer.hidden.abs(), 1 - share)

    def forward(x):
        hidden = layer.mlp.hidden(keep_large((x - mean) @ axes, least_x, 0.0) @ back + mean)
        return layer.mlp.down_linear(keep_large(hidden, least_h, 0.0))

    return forward


def centred(layer: Layer, share: float) -> Forward:
    """Less the mean input, which a bias absorbs."""
    same = torch.eye(layer.x.shape[1])
    return in_axes(layer, share, same, same, layer.x.mean(0))


def rotated(layer: Layer, share: float, of: Sequence[Layer] = ()) -> Forward:
    """As LaRoSA (arXiv 2507.01299): the input is rotated to its principal axes. `of`: layers that share one rotation."""
    axes = torch.linalg.eigh(sum(each.x.T @ each.x / each.x.square().sum() for each in of or [layer])).eigenvectors
    return in_axes(layer, share, axes, axes.T)


def output_axes(layer: Layer, share: float) -> Forward:
    """In the principal axes of what gate and up give, so that an axis that is left out costs its square and no more."""
    weight = torch.cat([getattr(layer.mlp, name).weight for name in layer.mlp.layout.projections[:-1]]).double()
    sizes, axes = torch.linalg.eigh((layer.x.T @ layer.x).double())
    scaled = axes * sizes.clamp_min(sizes.max() * 1e-9).sqrt()
    left = torch.linalg.svd(weight @ scaled, full_matrices=False)[0]
    into = (left.T @ weight).T
    return in_axes(layer, share, into.float(), torch.linalg.inv(into).float())


def gate_first(layer: Layer, share: float) -> Forward:
    """CATS (arXiv 2404.08763): neurons whose gate is small are left out of up and down; the gate is read whole, a third."""
    mlp = layer.mlp
    gate, act = getattr(mlp, mlp.layout.gate), getattr(mlp, mlp.layout.act)
    least = smallest(act(gate(layer.x)).abs(), 1 - max(0.0, (share - 1 / 3) * 1.5))

    def forward(x):
        return mlp.down_linear(keep_large(act(gate(x)), least, 0.0) * mlp.up_linear(x))

    return forward


def by_cost(layer: Layer, share: float, thresholds, soft: bool = False, spare: int = 0) -> Forward:
    """The thresholds of the product; soft ones also take the threshold off what is kept; the first `spare` positions are read whole."""
    mlp, (least_x, least_h, ramp) = layer.mlp, thresholds[layer.mlp.layer]

    def cut(values, least):
        kept = keep_large(values, least, ramp)
        kept = kept - kept.sign() * least if soft else kept
        return torch.cat([values[:, :spare], kept[:, spare:]], 1) if spare else kept

    return lambda x: mlp.down_linear(cut(mlp.hidden(cut(x, least_x)), least_h))


def neighbours(layers: Sequence[Layer], layer: Layer, count: int) -> Sequence[Layer]:
    """The group of so many layers that one belongs to."""
    first = layer.mlp.layer // count * count
    return layers[first : first + count]


@contextmanager
def replaced(layers: Sequence[Layer], forwards: Sequence[Forward]):
    for layer, forward in zip(layers, forwards):
        layer.mlp.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.mlp.forward


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="held-out text files, besides Python's topics")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--only", default="", help="variants whose name holds this, such as `ax` or `rotat`")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    model, tokenizer = load_model(args.folder, dtype=torch.float32), load_tokenizer(args.folder)
    model.set_sensitivity(1.0)
    calibration = token_blocks(documents_for("calibration"), tokenizer, 256, 2048)
    texts = {"topics": token_blocks(documents_for("held-out"), tokenizer, 512, args.max_tokens)}
    texts |= {path.stem: token_blocks(documents_for("", path), tokenizer, 512, args.max_tokens) for path in args.text}
    inputs: list[torch.Tensor] = []
    hooks = [mlp.register_forward_pre_hook(lambda mlp, given: inputs.append(given[0])) for mlp in model.nested_mlps]
    model.model(calibration, use_cache=False)
    for hook in hooks:
        hook.remove()
    layers = [Layer(mlp, x.flatten(0, 1), mlp.hidden(x).flatten(0, 1)) for mlp, x in zip(model.nested_mlps, inputs)]
    fitted, ramp = fit_thresholds(model, calibration), model.config.threshold_ramp
    model.config.thresholds = None
    variants: dict[str, Callable[[Layer, float], Forward]] = {
        "size, one quantile": by_score,
        "size times the weights' norm (WINA)": wina,
        "size less the mean": centred,
        "rotated input (LaRoSA)": rotated,
        "rotated, one rotation for five layers": lambda layer, share: rotated(layer, share, neighbours(layers, layer, 5)),
        "rotated, one rotation for all": lambda layer, share: rotated(layer, share, layers),
        "axes of the output": output_axes,
        "gate first (CATS)": gate_first,
        "size, quantiles by cost": lambda layer, share: by_cost(layer, share, thresholds_at(fitted, share, ramp)),
        "as before, soft": lambda layer, share: by_cost(layer, share, thresholds_at(fitted, share, ramp), soft=True),
        "by cost, first positions read whole": lambda layer, share: by_cost(
            layer, share, thresholds_at(fitted, share, ramp), spare=SINKS
        ),
    }
    full = {name: block_nll(model, blocks, 2, name) for name, blocks in texts.items()}
    rows: dict[str, dict] = {}
    variants = {name: make for name, make in variants.items() if args.only in name}
    for name, make in variants.items():
        for share in SHARES:
            with replaced(layers, [make(layer, share) for layer in layers]):
                for text, blocks in texts.items():
                    found = ratio_to(block_nll(model, blocks, 2, f"{name}, {share:g}"), full[text])
                    rows.setdefault(name, {})[f"{text} {share:g}"] = {
                        "ratio": found["ratio_to_dense"],
                        "interval": found["ratio_interval"],
                    }
        print(f"{name:38}", *(f"{cell['ratio']:.3f}" for cell in rows[name].values()), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(torch.get_num_threads()) | {"model": args.folder.name, "tokens": args.max_tokens}
    write_json(
        args.out / f"sparsity-search{args.only and '-'}{args.only}_{about['name']}.json", {"machine": about, "rows": rows}
    )


if __name__ == "__main__":
    main()
