# SPDX-License-Identifier: Apache-2.0
"""
The settings of training, as `arguments.py` holds those of the other stages: of the recipe, the stages and the Trainer. The standard
library alone, too.
"""

from dataclasses import dataclass, fields
from typing import Annotated

from .arguments import (
    Count,
    Files,
    Harm,
    Ramp,
    Range,
    Rate,
    Route,
    Seed,
    Teacher,
    TrainedParts,
    Weight,
    check_choice,
    check_numbers,
    check_range,
    with_help,
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
    density_range: Range | None = None
    """Lowest and highest density that sequences draw: the share of an expert's weights that sparsity leaves. It needs
    thresholds (`fit_thresholds`); by default 0.4 1 where the model has them, else experts stay dense, as with 1 1.
    """
    sensitivity_range: Range | None = None
    """Lowest and highest sensitivity that sequences draw; by default `train_sensitivity` of the model's config. 1 1
    trains the full width alone.
    """
    lm_loss_coef: Weight = 0.0
    """Weight of the LM loss: the next tokens of the text."""
    router_loss_coef: Weight = 0.0
    """Weight of the router loss: routers learn the labels while experts learn. 0 leaves routers as they are."""
    kd_loss_coef: Weight = 1.0
    """Weight of KL(full width || chosen experts), on the teacher's logits."""
    hidden_loss_coef: Weight = 10.0
    """Weight of the relative error of each layer's output to that of the full width. It keeps two hidden states a layer
    in memory.
    """
    width_loss_coef: Weight = 0.0
    """Weight of the price of width. Above 0 the routers learn from what their choices do to all losses, which needs
    profile routers that were fitted before. It is 0 here because a Trainer runs one phase, and experts are trained
    before routers choose; with it, leave hidden_loss_coef at 0, or routers learn to spare hidden states and choose
    worse.
    """
    logit_fraction: Annotated[float, "share"] = 1.0
    """Share of the positions whose logits are computed, at random: less takes less time, and the losses stay unbiased.
    """
    router_learning_rate: Rate = 1e-3
    """Learning rate of the routers, where a loss trains them."""

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raise `ValueError` for an unknown value, or a number outside its range."""
        for name, allowed in (("train_parts", TrainedParts), ("teacher", Teacher), ("route", Route)):
            check_choice(name, getattr(self, name), allowed)
        check_range(self.sensitivity_range)
        check_range(self.density_range, "density_range")
        check_numbers(self)


@with_help
@dataclass(kw_only=True)
class StageArguments:
    """The text, the steps and the checkpoints of a training stage."""

    text: Files | None = None
    """Text files, a path or several; by default the training split of Python's documentation topics. In `train`, `self` among
    them is text that the model writes itself.
    """
    dataset: str | None = None
    """Instead of text, streamed: ID or ID:CONFIG of a dataset on the Hub; a JSONL or Parquet file, or a folder of them; or
    a folder of `save_to_disk`.
    """
    column: str = "text"
    """Column of the dataset: of texts, or of messages, whose answers alone are learned, in the tokenizer's chat template.
    """
    documents_apart: bool = False
    """Let the tokens of a dataset see their own document alone, and none be learned from the one before, where several are packed into
    one sequence.
    """
    max_tokens: Count = 100_000
    """Tokens to train on; a shorter text is repeated."""
    learning_rate: Rate = 2e-4
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
    seed: Seed = 0
    """Seed of everything random in the stage."""


@with_help
@dataclass(kw_only=True)
class AdaptArguments(StageArguments):
    """What `adapt_model` takes."""

    max_tokens: Count = 65_536
    """Tokens to train on; a shorter text is repeated."""
    learning_rate: Rate = 6e-5
    """Learning rate, lower than in training: the full width is to keep what it knows."""


@with_help
@dataclass(kw_only=True)
class TrainArguments(NestedTrainingArguments, StageArguments):
    """What `train_model` takes. The defaults are the recipe of docs/results.md."""

    width_loss_coef: Weight = 0.9
    """Weight of the price of width in the last phase, in which routers learn by choosing (see choice_share); the phases
    before have none. A higher price gives narrower experts at the same sensitivity, and `calibrate` finds the new
    sensitivities.
    """
    router_tokens: Annotated[int, "tokens"] = 65_536
    """Tokens of the text, at most, on which routers are fitted: before the training with route=router, and anew after
    it. 0 leaves routers as the training made them. With train_parts=routers they are fitted on all max_tokens.
    """
    harm: Harm | None = None
    """What an error costs when routers are fitted: the same for all tokens of a layer (layer), or what its token's
    gradient says (token). By default token, where the similarity weighs errors by the loss and routers have a profile.
    """
    choice_share: Annotated[float, "part"] | None = None
    """Share of max_tokens, at the end, on which routers alone learn by choosing: from KL(full width || chosen experts)
    and the price of width. By default 0.2 where routers have a profile and are fitted, else 0.
    """
    threshold_ramp: Ramp | None = None
    """r in [0, 1), as in `calibrate`: what thresholds leave out falls to zero in a straight line, and experts are trained through it.
    Without it: what the folder has, 0 if never set.
    """
    self_tokens: Count = 131_072
    """Tokens that the model writes itself, at full width, where `self` is among the files of text."""
    lora_rank: Count = 16
    """Rank of the adapters, with train_parts=lora."""

    def check(self) -> None:
        super().check()
        if self.harm is not None:
            check_choice("harm", self.harm, Harm)


def nested_settings(arguments: NestedTrainingArguments) -> dict:
    """The fields of `NestedTrainingArguments` alone, by name."""
    return {field.name: getattr(arguments, field.name) for field in fields(NestedTrainingArguments)}
