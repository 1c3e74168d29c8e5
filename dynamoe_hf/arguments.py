# SPDX-License-Identifier: Apache-2.0
"""
The arguments of the stages, with their only defaults. The functions, the Trainer and the command line all read them here.

Standard library only: the command line builds its help from this file, and importing torch would take seconds.
"""

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args


# The strings name the form in which the command line reads a value.
Count = Annotated[int, "count"]
Files = Annotated[str | Path | Sequence[str | Path], "files"]
Range = Annotated[list[float], "range"]  # a list, because `HfArgumentParser` knows no other sequence

TrainedParts = Literal["routers", "mlp", "layers", "all", "lora"]
Teacher = Literal["frozen", "self", "none"]
Route = Literal["router", "label", "random"]
Harm = Literal["layer", "token"]

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


def with_help(cls):
    """
    Class decorator: the docstring below each field becomes its `metadata["help"]`, which `HfArgumentParser` shows. Without
    source code (a frozen application) the fields stay without help.
    """
    try:
        nodes = list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(cls)))))
    except (OSError, TypeError):
        return cls
    body = next(node for node in nodes if isinstance(node, ast.ClassDef)).body
    for pair in zip(body, body[1:]):
        match pair:
            case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                # argparse formats its help with `%`.
                cls.__dataclass_fields__[name].metadata = {"help": " ".join(text.split()).replace("%", "%%")}
    return cls


def check_choice(name: str, value, allowed) -> None:
    """Raise `ValueError` unless `value` is one of the strings of a `Literal`."""
    if value not in get_args(allowed):
        raise ValueError(f"`{name}` is unknown: found {value!r}. Choose one of {', '.join(get_args(allowed))}.")


def check_range(sensitivity_range: Sequence[float] | None) -> None:
    """Raise `ValueError` unless sensitivities can be drawn from this range; None is the model's own."""
    if sensitivity_range is None:
        return
    if len(sensitivity_range) != 2 or not 0 < sensitivity_range[0] <= sensitivity_range[1] <= 1:
        found = " to ".join(f"{value:g}" for value in sensitivity_range)
        raise ValueError(
            f"`sensitivity_range` must rise within 0 and 1, found {found}. Give a range such as 0.2 1, or 1 1 for the full "
            "width alone."
        )


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


@with_help
@dataclass(kw_only=True)
class StageArguments:
    """The text, the steps and the checkpoints of a training stage."""

    text: Files | None = None
    """Text files, a path or several; by default the training split of Python's documentation topics."""
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
