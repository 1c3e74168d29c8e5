# SPDX-License-Identifier: Apache-2.0
"""
The settings of every stage: names, types, defaults and help, each written once. The stage functions, the command line and the
API reference read them here. This file imports the standard library only, so that `dynamoe --help` answers at once.

A stage function takes them as one object or by name: `calibrate_budgets(folder, CalibrateArguments(max_tokens=4096))` equals
`calibrate_budgets(folder, max_tokens=4096)`. A default of `None` leaves the choice to the stage; the docstring says what it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar


# The strings name the form in which the command line reads a value: `flags.FORMS`.
Count = Annotated[int, "count"]
Numbers = Annotated[Sequence[float], "numbers"]
OneOrMoreNumbers = Annotated[float | Sequence[float], "numbers"]
Widths = Annotated[Sequence[float] | Sequence[Sequence[float]], "numbers"]
Range = Annotated[Sequence[float], "range"]
Files = Annotated[str | Path | Sequence[str | Path], "files"]

Importance = Literal["taylor_share", "taylor", "activation", "normalised"]
Similarity = Literal["loss_gain", "loss_weighted", "projection", "cosine", "relative_error"]
RouterType = Literal["profile", "argmax"]
Baseline = Literal["static", "random", "label"]
Layout = Literal["repos", "revisions"]

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

    budgets: Numbers = (0.5, 0.6, 0.75, 0.9)
    """Mean shares of MLP width in (0, 1)."""
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
    """Calibrated mean shares of MLP width."""
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
    """Calibrated mean share of MLP width."""
    sensitivity: float | None = None
    """Threshold in (0, 1]; 1 is the dense model."""
    max_new_tokens: Count = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """Temperature of sampling; 0 is greedy."""
    chat: bool = False
    """Treat the prompt as a question, through the chat template."""
    seed: int = 0
    """Seed of sampling."""


@dataclass(kw_only=True)
class BenchArguments:
    """Settings of `bench_folder`."""

    budgets: Numbers | None = None
    """Budgets to time. Without them: all calibrated ones."""
    shares: Numbers = ()
    """Mean shares of MLP width to time decoding and prefill at besides, reached on the timed text itself."""
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
    """Send nothing; write what would be sent."""
    out: str | Path | None = None
    """Folder of a dry run; must not exist. Without it: FOLDER.publish."""
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
    """Mean shares of MLP width."""
    max_tokens: Count = 65_536
    """Training tokens."""


@dataclass(kw_only=True)
class AdaptArguments:
    """Settings of `adapt_model`."""

    text: Files | None = None
    """Text files to train on. Without them: the training split of Python's own documentation topics."""
    dataset: str | None = None
    """Or a dataset, ID[:CONFIG], streamed."""
    column: str = "text"
    """Text column of the dataset."""
    max_tokens: Count = 65_536
    """Tokens to train on; shorter texts are repeated."""
    learning_rate: float = 6e-5
    """Learning rate of everything but the routers."""
    resume: bool = False
    """Go on with an interrupted run."""
    block_size: Count = 256
    """Tokens in one sequence."""
    batch_size: Count = 4
    """Sequences in one forward pass."""
    gradient_accumulation_steps: Count = 1
    """Forward passes in one step."""
    bf16: bool = False
    """Mixed precision; for GPUs, and CPUs with AMX or AVX512_BF16."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""
    save_steps: Count = 50
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of everything that is drawn."""


@dataclass(kw_only=True)
class TrainArguments(AdaptArguments):
    """Settings of `train_model`."""

    max_tokens: Count = 100_000
    """Tokens to train on; shorter texts are repeated."""
    learning_rate: float = 2e-4
    """Learning rate of everything but the routers."""
    train_parts: Literal["routers", "mlp", "layers", "all", "lora"] = "layers"
    """What is trained: mlp is routers and MLPs, layers is all but the embeddings."""
    route: Literal["router", "label", "random"] = "router"
    """Expert of each token in training; routers are fitted before, and after."""
    teacher: Literal["frozen", "self", "none"] = "frozen"
    """Whose full width is distilled."""
    sensitivity_range: Range | None = None
    """Range that sequences draw their sensitivity from; 1 1 trains the full width alone. Without it: the config's."""
    router_learning_rate: float = 1e-3
    """Learning rate of the routers, if they have a loss."""
    lm_loss_coef: float = 0.0
    """Weight of the LM loss."""
    router_loss_coef: float = 0.0
    """Weight of the router loss while experts learn."""
    kd_loss_coef: float = 1.0
    """Weight of the distillation of the full width's logits."""
    hidden_loss_coef: float = 10.0
    """Weight of the relative error of each layer's hidden states to the full width's."""
    logit_fraction: float = 1.0
    """Share of positions whose logits are computed; less saves time."""
    router_tokens: int = 65536
    """Tokens of the fit of the routers, at most; 0: none."""
    harm: Literal["layer", "token"] | None = None
    """What an error costs in the fit of the routers: the same in a layer, or what its token's gradient says. Without it: by token where
    the similarity allows."""
    choice_share: float | None = None
    """Share of the tokens, at the end, on which routers learn by choosing; 0: none. Without it: 0.2 where they have a profile and are
    fitted."""
    width_loss_coef: float = 0.9
    """Price of width that choosing routers weigh the loss against."""
    lora_rank: Count = 16
    """Rank of the LoRA adapters."""
