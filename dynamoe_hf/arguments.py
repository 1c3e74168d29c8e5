# SPDX-License-Identifier: Apache-2.0
"""
The settings of every stage: names, types, defaults and help, each written once. The stage functions, the command line and the
API reference read them here. This file imports the standard library only, so that `dynamoe --help` answers at once.

A stage function takes them as one object or by name: `calibrate_budgets(folder, CalibrateArguments(max_tokens=4096))` equals
`calibrate_budgets(folder, max_tokens=4096)`. A default of `None` leaves the choice to the stage; the docstring says what it is.
"""

import ast
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints


# The strings name the form in which the command line reads a value: `flags.FORMS`.
Count = Annotated[int, "count"]
Seed = Annotated[int, "seed"]
Weight = Annotated[float, "weight"]
Rate = Annotated[float, "rate"]
Ramp = Annotated[float, "ramp"]
Numbers = Annotated[Sequence[float], "numbers"]
OneOrMoreNumbers = Annotated[float | Sequence[float], "numbers"]
Widths = Annotated[Sequence[float] | Sequence[Sequence[float]], "numbers"]
Range = Annotated[list[float], "range"]  # a list, because `HfArgumentParser` knows no other sequence
Files = Annotated[str | Path | Sequence[str | Path], "files"]

Importance = Literal["taylor_share", "taylor", "activation", "normalised"]
Similarity = Literal["loss_gain", "loss_weighted", "projection", "cosine", "relative_error"]
RouterType = Literal["profile", "argmax"]
Baseline = Literal["static", "random", "label"]
Layout = Literal["repos", "revisions"]
GGUF = Literal["f32", "f16", "bf16", "q8_0"]
TrainedParts = Literal["routers", "mlp", "layers", "all", "lora"]
Teacher = Literal["frozen", "self", "none"]
Route = Literal["router", "label", "random"]
Harm = Literal["layer", "token"]
Engine = Literal["auto", "vllm", "transformers"]

EIGHTHS = tuple(eighth / 8 for eighth in range(1, 9))

T = TypeVar("T")


def resolve(kind: type[T], arguments: T | None, settings: dict[str, Any]) -> T:
    """
    The arguments of a stage: `arguments`, or the defaults of `kind`, with the fields that `settings` names replaced.

    Raises:
        TypeError: `arguments` is something else, or a setting is no field of `kind`.
    """
    if arguments is None:
        arguments = kind()
    if not isinstance(arguments, kind):
        raise TypeError(
            f"`arguments` must be {kind.__name__}, found {type(arguments).__name__}. Give single settings by name."
        )
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # a TypeVar cannot be bound to dataclasses
    if unknown := settings.keys() - set(names):
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}. Its settings are {', '.join(names)}.")
    check_numbers(found := replace(arguments, **settings))  # type: ignore[type-var]
    return found


# By the name that marks a field's type: what it must be, its type, its least value, and the first one that is too large.
KINDS: dict[str, tuple[str, Any, float, float]] = {
    "count": ("a whole number of at least 1", int, 1, math.inf),
    "tokens": ("a whole number of at least 0", int, 0, math.inf),
    "seed": ("a whole number from 0 to 2**32 - 1", int, 0, 2**32),
    "weight": ("a finite number of at least 0", int | float, 0, math.inf),
    "share": ("in (0, 1]", int | float, math.ulp(0.0), math.nextafter(1, 2)),
    "part": ("in [0, 1]", int | float, 0, math.nextafter(1, 2)),
    "ramp": ("in [0, 1)", int | float, 0, 1),
    "rate": ("a finite number above 0", int | float, math.ulp(0.0), math.inf),
}


def check_numbers(arguments: Any) -> None:
    """Raise `ValueError` for a field that is not the number that its type is marked as. `None` is the default of some."""
    for name, hint in get_type_hints(type(arguments), include_extras=True).items():
        for part in (hint, *get_args(hint)):
            if get_origin(part) is Annotated and part.__metadata__[0] in KINDS:
                told, kind, least, beyond = KINDS[part.__metadata__[0]]
                value = getattr(arguments, name)
                if value is not None and (type(value) is bool or not isinstance(value, kind) or not least <= value < beyond):
                    raise ValueError(f"`{name}` must be {told}, found {value!r}.")


def field_helps(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, those of its bases included. Empty without source code."""
    helps = {}
    for base in reversed(kind.__mro__[:-1]):
        try:
            body = ast.parse(inspect.getsource(base)).body[0]
        except (OSError, TypeError):  # a frozen application
            continue
        assert isinstance(body, ast.ClassDef)
        for field, text in pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                helps[ast.unparse(field.target)] = " ".join(ast.literal_eval(text.value).split())
    return helps


def with_help(cls):
    """Class decorator: the docstring below each field becomes its `metadata["help"]`, which `HfArgumentParser` shows."""
    for name, text in field_helps(cls).items():
        # argparse formats its help with `%`.
        cls.__dataclass_fields__[name].metadata = {"help": text.replace("%", "%%")}
    return cls


def check_choice(name: str, value, allowed) -> None:
    """Raise `ValueError` unless `value` is one of the strings of a `Literal`."""
    if value not in get_args(allowed):
        raise ValueError(f"`{name}` is unknown: found {value!r}. Choose one of {', '.join(get_args(allowed))}.")


def check_range(drawn_from: Sequence[float] | None, name: str = "sensitivity_range") -> None:
    """Raise `ValueError` unless sensitivities, or densities, can be drawn from this range; None is the model's own."""
    if drawn_from is None:
        return
    if len(drawn_from) != 2 or not 0 < drawn_from[0] <= drawn_from[1] <= 1:
        found = " to ".join(f"{value:g}" for value in drawn_from)
        alone = "the full width" if name == "sensitivity_range" else "dense experts"
        raise ValueError(
            f"`{name}` must rise within 0 and 1, found {found}. Give a range such as 0.4 1, or 1 1 for {alone} alone."
        )


@dataclass(kw_only=True)
class ConvertArguments:
    """Settings of `convert_model`."""

    widths: Widths = EIGHTHS
    """Expert widths as rising fractions of the MLP width that end at 1. From Python also one such list for each MLP."""
    text: Files | None = None
    """Text files for calibration. Without them: a split of Python's own documentation topics."""
    importance: Importance = "taylor_share"
    """How the neurons of an MLP are ranked."""
    cut: Annotated[float, "part"] = 0.0
    """Part of the neurons of a mixture's experts that is cut off for good, those of least importance in each layer. Experts
    with massive activations, or that saw too few tokens, keep theirs.
    """
    similarity: Similarity = "loss_gain"
    """How near an expert's output is to the full MLP's: what the routers learn to predict."""
    router_type: RouterType = "profile"
    """`profile` predicts every expert's similarity and can be set by a sensitivity; `argmax` is the paper's."""
    router_dim: Count | None = None
    """Hidden size of the routers. Without it: such that a router is about 1% of its MLP."""
    max_tokens: Count = 8192
    """Calibration tokens, a sample of the text."""
    block_size: Count = 512
    """Tokens in one sequence."""
    dtype: str = "auto"
    """Dtype of the weights: float32, bfloat16, float16, or auto as in the checkpoint."""
    seed: Seed = 0
    """Seed of the routers' initial weights."""


@dataclass(kw_only=True)
class CalibrateArguments:
    """Settings of `calibrate_budgets`."""

    budgets: Numbers = (0.4, 0.5, 0.6, 0.75, 0.9)
    """Mean shares of the MLPs' weights that a token reads, in (0, 1)."""
    lowest_density: float = 0.4
    """Least share of an expert's weights that sparsity may leave; 1 leaves experts dense, so that routing saves alone."""
    threshold_ramp: Ramp | None = None
    """r in [0, 1): what is smaller than a threshold t falls to zero between t and (1 - r) t instead of at once, so that rounding
    moves little and engines agree; 0.2 does at a budget of 0.75. Without it: what the folder has, 0 if never set.
    """
    text: Files | None = None
    """Text files that were not trained on. Without them: a split of Python's own documentation topics."""
    max_tokens: Count = 8192
    """Calibration tokens, a sample of the text."""
    block_size: Count = 512
    """Tokens in one sequence."""
    batch_size: Count = 4
    """Sequences in one forward pass."""


@dataclass(kw_only=True)
class EvaluateArguments:
    """Settings of `evaluate_model`. At most one of `budget`, `sensitivity` and `force_expert`; without them, the config's."""

    text: Files | None = None
    """Held-out text files. Without them: the held-out split of Python's own documentation topics."""
    budget: OneOrMoreNumbers | None = None
    """Calibrated mean shares of the MLPs' weights."""
    sensitivity: OneOrMoreNumbers | None = None
    """Thresholds in (0, 1]; 1 is the dense model."""
    force_expert: int | None = None
    """One expert for every token, counted from 0."""
    base: str | Path | None = None
    """The dense base (Hub id or folder). With it, ratios of perplexity are stated."""
    baselines: Sequence[Baseline] = ()
    """Baselines with the same weights at the same share: a static prefix, random experts, the true labels."""
    tasks: Sequence[str] = ()
    """lm-eval task names, task files (.yaml), or `literature` for those of the literature."""
    task_limit: Count | None = None
    """Examples of each task at most."""
    max_tokens: Count = 16384
    """Tokens to evaluate on."""
    block_size: Count = 512
    """Tokens in one sequence."""
    batch_size: Count = 4
    """Sequences in one forward pass."""


@dataclass(kw_only=True)
class GenerateArguments:
    """Settings of `generate_text`. At most one of `budget`, `sensitivity` and `draft_budget`; without them, the config's."""

    budget: float | None = None
    """Calibrated mean share of the MLPs' weights."""
    sensitivity: float | None = None
    """Threshold in (0, 1]; 1 is the dense model."""
    draft_budget: float | None = None
    """The dense model's text: the model drafts for itself at this budget, and checks at full width."""
    max_new_tokens: Count = 64
    """Tokens to generate at most."""
    temperature: Weight = 0.0
    """Temperature of sampling; 0 is greedy."""
    chat: bool = False
    """Treat the prompt as a question, through the chat template. On the command line without a prompt: a conversation."""
    int8: bool = False
    """Decode from int8 weights, on a CPU: a token reads only the rows of what it keeps."""
    seed: Seed = 0
    """Seed of sampling."""


@dataclass(kw_only=True)
class ServeArguments:
    """Settings of `serve_folder`. At most one of `budget` and `sensitivity`; without them, the config's."""

    budget: float | None = None
    """Calibrated mean share of the MLPs' weights."""
    sensitivity: float | None = None
    """Threshold in (0, 1]; 1 is the dense model."""
    engine: Engine = "auto"
    """What serves; the best that is installed is vllm, then transformers."""
    host: str = "127.0.0.1"
    """Address to listen at. 0.0.0.0 lets other machines in."""
    port: Count = 8000
    """Port to listen at."""
    dtype: str = "auto"
    """Numbers to compute in, such as bfloat16."""
    request_dials: bool = False
    """Let each request bring a sensitivity of its own: with vLLM on a CPU, and without its prefix caching."""
    engine_flags: str = ""
    """Further flags of the engine, as one text."""


@dataclass(kw_only=True)
class InspectArguments:
    """Settings of `inspect_folder`."""

    verify: bool = False
    """Read all weights too: compare their SHA-256 with the records, and look whether they load and are finite."""


# TFLOPS of dense bfloat16 products and GB/s of memory, from the makers' data sheets.
HARDWARE: dict[str, tuple[float, float]] = {
    "a100": (312, 2039),
    "h100": (989, 3350),
    "h200": (989, 4800),
    "l40s": (362, 864),
    "rtx4090": (165, 1008),
}


@dataclass(kw_only=True)
class PlanArguments:
    """Settings of `plan_base`. Either `hardware`, or `tflops` and `bandwidth`; without them neither hours nor speeds are told."""

    tokens: Count = 100_000
    """Tokens to train on."""
    hardware: str | None = None
    """What it is to run on: a100 (80 GB), h100, h200, l40s or rtx4090."""
    tflops: float | None = None
    """Speed of one device, in 10^12 floating-point operations a second."""
    bandwidth: float | None = None
    """Speed of its memory, in GB/s."""
    devices: Count = 1
    """Devices that train together."""
    utilisation: Annotated[float, "share"] = 0.3
    """Share of the speed that training reaches."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights; training keeps it."""
    budgets: Numbers = (0.5, 0.75, 1.0)
    """Mean shares of the MLPs' weights."""
    block_size: Count = 256
    """Tokens in one sequence."""
    batch_size: Count = 4
    """Sequences in one batch of one device."""
    gradient_checkpointing: bool = False
    """Compute activations twice in training."""

    def __post_init__(self):
        check_choice("dtype", self.dtype, Literal["float32", "bfloat16"])
        for name in ("tflops", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be a finite number above 0, found {value!r}.")


@dataclass(kw_only=True)
class BenchArguments:
    """Settings of `bench_folder`."""

    budgets: Numbers | None = None
    """Budgets to time. Without them: all calibrated ones."""
    shares: Numbers = ()
    """Mean shares of the MLPs' weights to time decoding and prefill at besides, reached on the timed text itself."""
    threads: Count = 1
    """Threads of torch. On a busy machine two can be a hundred times slower than one."""
    rounds: Count = 5
    """Counted rounds, after one to warm up."""
    new_tokens: Count = 16
    """Tokens decoded in each round."""
    shapes: Sequence[str] = ("SmolLM2-135M", "Llama-3.2-1B")
    """Models whose MLP shapes are timed alone: SmolLM2-135M, Llama-3.2-1B, Llama-3.1-8B, Mistral-7B."""
    compile: bool = False
    """Also decode with torch.compile on both sides, which takes minutes to compile."""
    int8: bool = False
    """Also decode with weights packed in int8 (`dynamoe generate --int8`), against the same dense side; with `compile`, both compiled."""
    dtype: str = "auto"
    """Dtype in which both sides are timed, for example bfloat16; auto as in the folder."""


@dataclass(kw_only=True)
class ReportArguments:
    """Settings of `report_folder`."""

    out: str | Path | None = None
    """Folder for the pictures. Without it: `report` in the model folder."""
    text: str | Path | None = None
    """Text file to colour, its first 6000 characters. Without it: a held-out topic of Python's own documentation."""
    budget: float | None = None
    """Budget at which the text is coloured. Without it: what the config says, or the lowest calibrated one."""


@dataclass(kw_only=True)
class PublishArguments:
    """Settings of `publish_model`."""

    variants: Numbers | None = None
    """Calibrated budgets to publish. Without them: all."""
    layout: Layout = "repos"
    """A repository for each variant and a Collection of them, or a branch for each in one repository."""
    dry_run: bool = False
    """Send nothing, and say what would be sent."""
    out: str | Path | None = None
    """Folder in which a dry run writes what would be sent; must not exist. Without it, nothing is written."""
    private: bool = False
    """Create private repositories."""
    create_pr: bool = False
    """Open pull requests instead of committing."""
    commit_message: str | None = None
    """Message of the commits. Without it: one that names the variant."""
    base_model: str | None = None
    """Hub id of the dense base, if the folder was converted from a local copy."""


@dataclass(kw_only=True)
class ExportArguments:
    """Settings of `export_dense`."""

    width: float | None = None
    """Share of the MLP width in (0, 1], the same in every layer. Without it and without a budget: 1."""
    budget: float | None = None
    """A width for each layer instead: mean share of the MLPs, divided where it costs least. With gguf only."""
    gguf: GGUF | None = None
    """Write a GGUF file for llama.cpp, with the tokenizer in it, in this type. Without it: a folder for transformers."""
    text: Files | None = None
    """Text files on which the budget is divided. Without them: Python's own documentation."""
    max_tokens: Count = 4096
    """Tokens of it to use."""
    block_size: Count = 512
    """Tokens in one sequence."""


@dataclass(kw_only=True)
class DemoArguments:
    """Settings of `run_demo`."""

    out: str | Path = "runs/demo"
    """Folder for everything that is made."""
    budgets: Numbers = (0.9, 0.75, 0.6, 0.5)
    """Mean shares of the MLPs' weights."""
    max_tokens: Count = 65_536
    """Training tokens."""
