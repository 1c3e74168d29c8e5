# SPDX-License-Identifier: Apache-2.0
"""
The settings of every stage: names, types, defaults and help, each written once. The stage functions, the command line and the
API reference read them here. This file imports the standard library only, so that `dynamoe --help` answers at once.

A stage function takes them as one object or by name: `calibrate_budgets(folder, CalibrateArguments(max_tokens=4096))` equals
`calibrate_budgets(folder, max_tokens=4096)`. A default of `None` leaves the choice to the stage; the docstring says what it is.
"""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args


# The strings name the form in which the command line reads a value: `flags.FORMS`.
Count = Annotated[int, "count"]
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
TrainedParts = Literal["routers", "mlp", "layers", "all", "lora"]
Teacher = Literal["frozen", "self", "none"]
Route = Literal["router", "label", "random"]
Harm = Literal["layer", "token"]

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
    return replace(arguments, **settings)  # type: ignore[type-var]


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
    """Expert widths as rising fractions of the MLP width that end at 1. From Python also one such list for each layer."""
    text: Files | None = None
    """Text files for calibration. Without them: a split of Python's own documentation topics."""
    importance: Importance = "taylor_share"
    """How the neurons of an MLP are ranked."""
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
    seed: int = 0
    """Seed of the routers' initial weights."""


@dataclass(kw_only=True)
class CalibrateArguments:
    """Settings of `calibrate_budgets`."""

    budgets: Numbers = (0.4, 0.5, 0.6, 0.75, 0.9)
    """Mean shares of the MLPs' weights that a token reads, in (0, 1)."""
    lowest_density: float = 0.4
    """Least share of an expert's weights that sparsity may leave; 1 leaves experts dense, so that routing saves alone."""
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
    """Settings of `generate_text`. At most one of `budget` and `sensitivity`; without them, the config's."""

    budget: float | None = None
    """Calibrated mean share of the MLPs' weights."""
    sensitivity: float | None = None
    """Threshold in (0, 1]; 1 is the dense model."""
    max_new_tokens: Count = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy."""
    chat: bool = False
    """Treat the prompt as a question, through the chat template."""
    int8: bool = False
    """Decode from int8 weights, on a CPU: a token reads only the rows of what it keeps."""
    seed: int = 0
    """Seed of sampling."""


@dataclass(kw_only=True)
class InspectArguments:
    """Settings of `inspect_folder`."""

    verify: bool = False
    """Read all weights too: compare their SHA-256 with the records, and look whether they load and are finite."""


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

    width: float = 1.0
    """Share of the MLP width in (0, 1]."""


@dataclass(kw_only=True)
class DemoArguments:
    """Settings of `run_demo`."""

    out: str | Path = "runs/demo"
    """Folder for everything that is made."""
    budgets: Numbers = (0.9, 0.75, 0.6, 0.5)
    """Mean shares of the MLPs' weights."""
    max_tokens: Count = 65_536
    """Training tokens."""


@with_help
@dataclass(kw_only=True)
class NestedTrainingArguments:
    """
    How nested experts are trained. The loss of a batch is

        lm_loss_coef * LM loss + router_loss_coef * router loss + kd_loss_coef * KL(full width || chosen experts)
        + hidden_loss_coef * mean over layers of |h - h_full|^2 / |h_full|^2, h the output of a layer,
        + width_loss_coef * (1 / sensitivity - 1) * share of the MLPs' width,

    each summed over the tokens that have a label and divided by their number in the whole accumulated batch. The loss of the
    DynaMoE paper is `lm_loss_coef=0.2, router_loss_coef=1, kd_loss_coef=0, hidden_loss_coef=0`.

    Raises:
        ValueError: an unknown value, or a number outside its range.
    """

    train_parts: TrainedParts = "layers"
    """What is trained: routers, mlp (routers and MLPs), layers (all but embeddings and head), all, or lora (the
    adapters).
    """
    teacher: Teacher = "frozen"
    """Whose full width is distilled: frozen (the model as it was before; a second copy in memory unless LoRA or routers
    alone are trained), self (the current weights), or none.
    """
    route: Route = "router"
    """Which expert each token takes in training: the router's choice, its label (the smallest expert that is similar
    enough), or a random one.
    """
    density_range: Range | None = None
    """Lowest and highest density that sequences draw: the share of an expert's weights that sparsity leaves. It needs
    thresholds (`fit_thresholds`); by default 0.4 1 where the model has them, else experts stay dense, as with 1 1.
    """
    sensitivity_range: Range | None = None
    """Lowest and highest sensitivity that sequences draw; by default `train_sensitivity` of the model's config. 1 1
    trains the full width alone.
    """
    lm_loss_coef: float = 0.0
    """Weight of the LM loss: the next tokens of the text."""
    router_loss_coef: float = 0.0
    """Weight of the router loss: routers learn the labels while experts learn. 0 leaves routers as they are."""
    kd_loss_coef: float = 1.0
    """Weight of KL(full width || chosen experts), on the teacher's logits."""
    hidden_loss_coef: float = 10.0
    """Weight of the relative error of each layer's output to that of the full width. It keeps two hidden states a layer
    in memory.
    """
    width_loss_coef: float = 0.0
    """Weight of the price of width. Above 0 the routers learn from what their choices do to all losses, which needs
    profile routers that were fitted before. It is 0 here because a Trainer runs one phase, and experts are trained
    before routers choose; with it, leave hidden_loss_coef at 0, or routers learn to spare hidden states and choose
    worse.
    """
    logit_fraction: float = 1.0
    """Share of the positions whose logits are computed, at random: less takes less time, and the losses stay unbiased.
    """
    router_learning_rate: float = 1e-3
    """Learning rate of the routers, where a loss trains them."""

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for an unknown value, or a number outside its range."""
        for name, allowed in (("train_parts", TrainedParts), ("teacher", Teacher), ("route", Route)):
            check_choice(name, getattr(self, name), allowed)
        if not 0 < self.logit_fraction <= 1:
            raise ValueError(f"`logit_fraction` must be in (0, 1], found {self.logit_fraction}.")
        check_range(self.sensitivity_range)
        check_range(self.density_range, "density_range")


@with_help
@dataclass(kw_only=True)
class StageArguments:
    """The text, the steps and the checkpoints of a training stage."""

    text: Files | None = None
    """Text files, a path or several; by default the training split of Python's documentation topics. In `train`, `self` among
    them is text that the model writes itself.
    """
    dataset: str | None = None
    """Instead of text: ID or ID:CONFIG of a dataset on the Hub, or its folder, streamed."""
    column: str = "text"
    """Text column of the dataset."""
    max_tokens: Count = 100_000
    """Tokens to train on; a shorter text is repeated."""
    learning_rate: float = 2e-4
    """Learning rate of all but the routers."""
    resume: bool = False
    """Continue an interrupted run from its last checkpoint."""
    block_size: Count = 256
    """Tokens in one sequence."""
    batch_size: Count = 4
    """Sequences in one batch."""
    gradient_accumulation_steps: Count = 1
    """Batches in one step."""
    bf16: bool = False
    """Compute under bfloat16 autocast, for GPUs and for CPUs with AMX or AVX512_BF16; weights keep their type."""
    gradient_checkpointing: bool = False
    """Compute activations twice: less memory, a third more time."""
    save_steps: Count = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything random in the stage."""


@with_help
@dataclass(kw_only=True)
class AdaptArguments(StageArguments):
    """What `adapt_model` takes."""

    max_tokens: Count = 65_536
    """Tokens to train on; a shorter text is repeated."""
    learning_rate: float = 6e-5
    """Learning rate, lower than in training: the full width is to keep what it knows."""


@with_help
@dataclass(kw_only=True)
class TrainArguments(NestedTrainingArguments, StageArguments):
    """What `train_model` takes. The defaults are the recipe of docs/results.md."""

    width_loss_coef: float = 0.9
    """Weight of the price of width in the last phase, in which routers learn by choosing (see choice_share); the phases
    before have none. A higher price gives narrower experts at the same sensitivity, and `calibrate` finds the new
    sensitivities.
    """
    router_tokens: int = 65_536
    """Tokens of the text, at most, on which routers are fitted: before the training with route=router, and anew after
    it. 0 leaves routers as the training made them. With train_parts=routers they are fitted on all max_tokens.
    """
    harm: Harm | None = None
    """What an error costs when routers are fitted: the same for all tokens of a layer (layer), or what its token's
    gradient says (token). By default token, where the similarity weighs errors by the loss and routers have a profile.
    """
    choice_share: float | None = None
    """Share of max_tokens, at the end, on which routers alone learn by choosing: from KL(full width || chosen experts)
    and the price of width. By default 0.2 where routers have a profile and are fitted, else 0.
    """
    self_tokens: Count = 131_072
    """Tokens that the model writes itself, at full width, where `self` is among the files of text."""
    lora_rank: Count = 16
    """Rank of the adapters, with train_parts=lora."""

    def check(self) -> None:
        super().check()
        if self.harm is not None:
            check_choice("harm", self.harm, Harm)
        if self.choice_share is not None and not 0 <= self.choice_share <= 1:
            raise ValueError(f"`choice_share` must be in [0, 1], found {self.choice_share}.")


def nested_settings(arguments: NestedTrainingArguments) -> dict:
    """The fields of `NestedTrainingArguments` alone, by name."""
    return {field.name: getattr(arguments, field.name) for field in fields(NestedTrainingArguments)}
