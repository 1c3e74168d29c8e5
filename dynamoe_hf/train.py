# SPDX-License-Identifier: Apache-2.0
"""The stages `train_model` and `adapt_model`: a recipe is a list of phases, and one loop runs them and can resume them."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset, IterableDataset
from transformers import default_data_collator
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .arguments import AdaptArguments, Route, TrainArguments, nested_settings, resolve
from .card import render_card
from .data import documents_for, iterate_blocks, text_names, token_blocks
from .folder import (
    TRAINING,
    carry_records,
    load_dynamoe_config,
    load_model,
    load_tokenizer,
    new_folder,
    read_json,
    refuse_existing,
    write_json,
)
from .router_fit import checked_harm, fit_routers
from .self_text import SELF, own_text_file
from .threshold_fit import THRESHOLD_TOKENS, fit_thresholds
from .trainer import DENSITY_RANGE, DynaMoETrainer, DynaMoETrainingArguments, LossBar, lora_config


CHOICE_SHARE = 0.2  # of the steps, at the end, on which routers learn by choosing
# What an adaptation has instead of the recipe: the LM loss at full width alone.
ADAPTATION: dict[str, Any] = {
    "sensitivity_range": [1, 1],
    "teacher": "none",
    "lm_loss_coef": 1.0,
    "kd_loss_coef": 0.0,
    "hidden_loss_coef": 0.0,
    "router_tokens": 0,
    "choice_share": 0.0,
    "density_range": [1, 1],
}


@dataclass(frozen=True)
class Phase:
    """One part of a recipe: routers are fitted, where `fit` says so, and then `steps` are trained."""

    name: str  # of the folder of its checkpoints
    steps: int  # optimizer steps; 0 if the phase is a fit alone
    fit: Route | None  # route of the tokens while the inputs of the routers are collected; None leaves routers as they are
    sparse: bool  # whether thresholds are fitted before it
    settings: dict  # what is trained and by which losses: fields of `NestedTrainingArguments`


def train_recipe(arguments: TrainArguments, steps: int) -> list[Phase]:
    """
    Train experts on the routes of fitted routers, with what thresholds leave out of them left out; fit thresholds and routers
    anew to what the experts have become, then let the routers alone learn by choosing. `arguments` as `_settled` gives them.
    """
    nested, choice_steps = nested_settings(arguments), round((arguments.choice_share or 0.0) * steps)
    sparse = min(arguments.density_range or [1]) < 1
    expert_steps = 0 if arguments.train_parts == "routers" else steps - choice_steps
    follows_routers = arguments.route == "router"
    fits, phases = arguments.router_tokens > 0, []
    if expert_steps:
        before: Route | None = "label" if follows_routers and fits else None
        phases.append(Phase(arguments.train_parts, expert_steps, before, sparse, {**nested, "width_loss_coef": 0.0}))
    anew: Route = "router" if follows_routers and phases else "label"
    choose = {"train_parts": "routers", "route": "router", "teacher": "frozen", "lm_loss_coef": 0.0, "router_loss_coef": 0.0,
              "kd_loss_coef": 1.0, "hidden_loss_coef": 0.0}  # fmt: skip
    phases.append(Phase("routers", choice_steps, anew if fits else None, sparse, {**nested, **choose}))
    return [phase for phase in phases if phase.steps or phase.fit]


def adapt_recipe(arguments: TrainArguments, steps: int) -> list[Phase]:
    """One phase, which trains the full width and no router."""
    return [Phase("adapt", steps, None, False, {**nested_settings(arguments), "width_loss_coef": 0.0})]


def train_model(folder: str | Path, out: str | Path, arguments: TrainArguments | None = None, **settings: Any) -> dict:
    """
    Train a DynaMoE folder and write the result as another one.

    Checkpoints lie in `OUT.checkpoints` while training goes on, each phase's in a folder of its own; each checkpoint is a
    model folder, with `train_parts="lora"` an adapter. An interrupted run continues with `resume=True`. LoRA adapters are
    merged into the weights that are written.

    The defaults are the recipe of docs/results.md, three parts: routers are fitted, and the layers learn on their routes
    to give the logits and hidden states of the full width as it was; routers are fitted anew; and at the end routers
    alone learn from the effect of their choices on the logits, against the price of width.

    Args:
        folder, out: model folder to read, and to write.
        arguments: by default those of the recipe.
        settings: fields of `TrainArguments`, in place of those of `arguments`.

    Returns:
        The training record, also written to `training.json`: settings, tokens, the logged history, and, without their
        histories, the records of the `earlier` trainings of `folder`. `seconds` are those of all parts of a resumed run.

    Raises:
        ValueError: no DynaMoE folder, a wrong value, too little text, or an unfinished run without `resume`.
        TypeError: a setting that is no field of `TrainArguments`.
        FileExistsError: `out` exists.
    """
    return _run_stage(folder, out, resolve(TrainArguments, arguments, settings), train_recipe)


def adapt_model(folder: str | Path, out: str | Path, arguments: AdaptArguments | None = None, **settings: Any) -> dict:
    """
    Train the full width on a text as a dense model, gently, before `train_model` teaches it to the narrower experts.

    For text that the base does not know. An LM loss in `train_model` instead would pull the full width away from
    everything else, and without either the full width stays what the base is. `settings` are fields of `AdaptArguments`;
    result and errors are those of `train_model`.
    """
    arguments = resolve(AdaptArguments, arguments, settings)
    if SELF in text_names(arguments.text):
        raise ValueError("`adapt` teaches a text that the base does not know, and it knows its own: found `self`. Give files.")
    return _run_stage(folder, out, TrainArguments(**vars(arguments), **ADAPTATION), adapt_recipe)


def _run_stage(folder, out, arguments: TrainArguments, recipe: Callable[[TrainArguments, int], list[Phase]]) -> dict:
    """Run the phases of a recipe that are not done yet, write the model folder and return its record."""
    refuse_existing(out)
    run = Run(folder, out, arguments)
    model, state = run.load_model(), run.state
    phases = recipe(run.arguments, max(1, run.arguments.max_tokens // run.step_tokens))
    for phase in phases[state.phase :]:
        model = _run_phase(phase, model, run)
        state.phase, state.fitted = state.phase + 1, False
        if state.phase < len(phases):
            run.save(model)
    record = _record(run, chooses=any(phase.name == "routers" and phase.steps for phase in phases))
    if is_main_process():
        with new_folder(out) as target:
            model.save_pretrained(target)
            run.tokenizer.save_pretrained(target)
            carry_records(folder, target)
            write_json(target / TRAINING, record)
            render_card(target, local_files_only=True, name=Path(out).name).save(target / "README.md")
        shutil.rmtree(run.work, ignore_errors=True)
        run.own_text.unlink(missing_ok=True)
    return record


def _run_phase(phase: Phase, model, run: "Run"):
    """Fit the routers and train, from where an interrupted run stopped; keep the state of `run`, and return the model."""
    arguments, state, folder = run.arguments, run.state, run.work / f"{run.state.phase}-{phase.name}"
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if phase.sparse and not state.fitted:
        fit_thresholds(model, run.blocks(THRESHOLD_TOKENS))
    if phase.fit and not state.fitted:
        shared = ("seed", "harm", "sensitivity_range", "density_range", "bf16")
        settings = {name: getattr(arguments, name) for name in shared}
        state.fit = fit_routers(model, run.blocks(arguments.router_tokens), route=phase.fit, **settings)
        state.fitted = True
        if phase.steps:
            run.save(model)
    if phase.steps == 0:
        return model
    lora = phase.settings["train_parts"] == "lora"
    if lora:
        from peft import get_peft_model

        model = get_peft_model(model, lora_config(arguments.lora_rank, 2 * arguments.lora_rank))
    trainer = DynaMoETrainer(
        model=model,
        args=_trainer_arguments(arguments, phase, folder),
        train_dataset=run.training_blocks(state.steps, phase.steps),
        processing_class=run.tokenizer,
        # Blocks are of one length, so nothing is padded: many tokenizers have no padding token.
        data_collator=default_data_collator,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    trainer.add_callback(WriteRun(run))
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    state.history += [{**entry, "step": state.steps + entry["step"]} for entry in logged]
    state.steps += trainer.state.global_step  # fewer than `phase.steps` where a streamed dataset has ended
    return (model.merge_and_unload() if lora else model).requires_grad_(True)


def _trainer_arguments(arguments: TrainArguments, phase: Phase, folder: Path) -> DynaMoETrainingArguments:
    """The arguments of a phase's Trainer: AdamW, and a cosine schedule to a twentieth of the learning rate."""
    passed_on = ("gradient_accumulation_steps", "learning_rate", "bf16", "save_steps", "seed")
    settings = {name: getattr(arguments, name) for name in passed_on} | phase.settings
    if arguments.gradient_checkpointing:
        settings["gradient_checkpointing"] = True  # where it is not wanted, newer versions would warn of the name
    return DynaMoETrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=arguments.batch_size,
        adam_beta2=0.95,
        warmup_steps=min(10, phase.steps // 10),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        use_cpu=not torch.accelerator.is_available(),
        save_total_limit=2,
        logging_steps=max(1, min(10, phase.steps // 10)),
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},
        **settings,
    )


def _record(run: "Run", chooses: bool) -> dict:
    """What `training.json` says."""
    names = ("route", "teacher", "sensitivity_range", "density_range", "block_size", "batch_size", "gradient_accumulation_steps",
             "learning_rate", "router_learning_rate", "lm_loss_coef", "kd_loss_coef", "hidden_loss_coef",
             "router_loss_coef", "logit_fraction", "router_tokens", "harm", "choice_share", "width_loss_coef", "lora_rank",
             "bf16", "seed")  # fmt: skip
    arguments, state = run.arguments, run.state
    settings = {"train": arguments.train_parts, **{name: getattr(arguments, name) for name in names}}
    settings["width_loss_coef"] = arguments.width_loss_coef if chooses else None
    settings["self_tokens"] = arguments.self_tokens if SELF in text_names(arguments.text) else None
    settings["lora_rank"] = arguments.lora_rank if arguments.train_parts == "lora" else None
    before = read_json(run.folder / TRAINING)
    earlier = [] if before is None else [*before.pop("earlier", []), {k: v for k, v in before.items() if k != "history"}]
    return {
        "from": run.folder.name,
        "text": arguments.dataset or text_names(arguments.text),
        "tokens": state.steps * run.step_tokens,
        "distinct_tokens": None if run.distinct is None else run.distinct.numel(),
        "steps": state.steps,
        "router_fit": state.fit,
        "seconds": round(run.seconds(), 1),
        "settings": settings,
        "earlier": earlier,
        "history": state.history,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@dataclass
class State:
    """How far a run has come: what `OUT.checkpoints/run.json` holds."""

    settings: dict  # arguments that must not change when a run is resumed
    phase: int = 0  # index of the current phase
    fitted: bool = False  # whether the routers were fitted for it
    model: str | None = None  # folder beside run.json of the model that the phase, or its training after the fit, starts from
    steps: int = 0  # of the phases that are done
    history: list[dict] = field(default_factory=list)  # what these phases have logged
    fit: dict | None = None  # record of the last fit of the routers
    seconds: float = 0.0  # that the run has taken, over all its parts


class Run:
    """A run of a stage: its arguments, its text, and its state, kept in `OUT.checkpoints` until the end."""

    def __init__(self, folder: str | Path, out: str | Path, arguments: TrainArguments):
        self.folder, self.work = Path(folder), Path(f"{out}.checkpoints")
        self.state = _resumed(self.work, arguments)
        self.started = time.monotonic() - self.state.seconds
        self.arguments, self.tokenizer = _settled(arguments, load_dynamoe_config(folder)), load_tokenizer(folder)
        processes = int(os.environ.get("WORLD_SIZE", 1))
        self.step_blocks = processes * arguments.batch_size * arguments.gradient_accumulation_steps
        self.step_tokens = self.step_blocks * self.arguments.block_size
        self.own_text = Path(f"{out}.text")  # beside `work`, which a run that begins anew empties
        self.text = own_text_file(arguments.text, folder, self.own_text, arguments.self_tokens, arguments.seed, arguments.bf16)
        self.distinct = None if arguments.dataset is not None else self.blocks(arguments.max_tokens)

    def documents(self):
        """The documents of the text, from the first one on."""
        return documents_for("training", self.text, self.arguments.dataset, self.arguments.column)

    def blocks(self, tokens: int) -> torch.Tensor:
        """At most so many tokens of the text, (N, S)."""
        return token_blocks(self.documents(), self.tokenizer, self.arguments.block_size, tokens)

    def training_blocks(self, first_step: int, steps: int) -> Dataset:
        """What the Trainer reads in `steps` steps from `first_step` on."""
        start = first_step * self.step_blocks
        if self.distinct is not None:
            return RepeatedBlocks(self.distinct, start, steps * self.step_blocks)
        return StreamedBlocks(self.documents, self.tokenizer, self.arguments.block_size, start)

    def seconds(self) -> float:
        """Time that the run has taken, over all its parts."""
        return time.monotonic() - self.started

    def load_model(self):
        """The model that the current phase, or the training after its fit, starts from, with the random state of then."""
        if self.state.model is None:
            return load_model(self.folder)
        folder = self.work / self.state.model
        random = torch.load(folder / "rng_state.pth")
        model = load_model(folder)
        torch.set_rng_state(random["cpu"])
        torch.cuda.set_rng_state_all(random["cuda"])
        return model

    def save(self, model) -> None:
        """Keep the model that the current phase, or the training after its fit, starts from."""
        if not is_main_process():
            return
        before, self.state.model = self.state.model, f"model-{self.state.phase}{'-fitted' * self.state.fitted}"
        shutil.rmtree(self.work / self.state.model, ignore_errors=True)
        with new_folder(self.work / self.state.model) as target:
            model.save_pretrained(target)
            carry_records(self.folder, target)
            torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, target / "rng_state.pth")
        self.write()
        if before:
            shutil.rmtree(self.work / before)

    def write(self) -> None:
        """Write `run.json`."""
        self.state.seconds = self.seconds()
        write_json(self.work / "run.json", asdict(self.state))


def _settled(arguments: TrainArguments, config) -> TrainArguments:
    """
    The arguments with every default that depends on the model filled in. Raises `ValueError` where the model cannot
    have one.
    """
    choice_share = arguments.choice_share
    if choice_share is None:
        choice_share = CHOICE_SHARE if config.has_dial and arguments.router_tokens else 0.0
    elif choice_share and not config.has_dial:
        raise ValueError(
            f"`choice_share` needs profile routers, found {config.router_class.__name__}. Leave it at 0, or convert with "
            "`--router-type profile`."
        )
    if choice_share and not arguments.width_loss_coef:
        raise ValueError(
            f"Routers that learn by choosing need a price of width, found width_loss_coef=0 and choice_share={choice_share:g}. "
            "Give it a weight, such as 0.9, or set choice_share to 0."
        )
    routers_alone = arguments.train_parts == "routers"
    # Without a dial there is nothing that would move the density.
    routes_alone = not config.has_dial
    longest = getattr(config, "max_position_embeddings", None)
    return replace(
        arguments,
        harm=checked_harm(config, arguments.harm),
        choice_share=float(choice_share),
        density_range=[1, 1] if routes_alone else list(arguments.density_range or DENSITY_RANGE),
        router_tokens=arguments.max_tokens if routers_alone else min(arguments.router_tokens, arguments.max_tokens),
        block_size=min(arguments.block_size, longest) if longest else arguments.block_size,
    )


def _resumed(work: Path, arguments: TrainArguments) -> State:
    """The state in `work`, or that of a new run. Raises `ValueError` where it is not what `arguments` say."""
    may_change = ("resume", "save_steps", "gradient_checkpointing")
    settings = {name: value for name, value in asdict(arguments).items() if name not in may_change}
    settings = json.loads(json.dumps({**settings, "text": text_names(arguments.text)}))
    found = read_json(work / "run.json")
    older = [path.name for pattern in ("checkpoint-*", "choice") for path in work.glob(pattern)]
    if older and not found:
        raise ValueError(
            f"{work} holds an unfinished run of an older version, which this one cannot resume: found {older[0]}. Finish it "
            "with the version that began it, or delete it to begin anew."
        )
    if found and not arguments.resume:
        raise ValueError(f"{work} holds an unfinished run. Go on with it (`--resume`), or delete it to begin anew.")
    if arguments.resume and not found:
        raise ValueError(f"There is nothing to resume: {work} holds no checkpoint. Leave out `--resume`.")
    if not found:
        if work.is_dir() and is_main_process():
            shutil.rmtree(work)  # left by a run that ended before its first checkpoint was complete
        return State(settings)
    changed = [name for name, value in settings.items() if value != found["settings"].get(name)]
    if changed:
        raise ValueError(
            f"{work} holds a run with other settings: found another {', '.join(changed)}. Resume it with the settings that "
            "it began with, or delete it to begin anew."
        )
    return State(**found)


class WriteRun(TrainerCallback):
    """Writes `run.json` with every checkpoint."""

    def __init__(self, run: Run):
        self.run = run

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.write()


def is_main_process() -> bool:
    """Whether this process writes files: under a launcher only the first one does."""
    return int(os.environ.get("RANK", 0)) == 0


class RepeatedBlocks(Dataset):
    """`count` token blocks from `start` on, of blocks (N, S) repeated without end: one epoch is a whole phase."""

    def __init__(self, blocks, start, count):
        self.blocks, self.start, self.count = blocks, start, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        # Each pass over the text is in another order, the same in every run.
        rounds, place = divmod(self.start + index, len(self.blocks))
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(rounds))
        block = self.blocks[order[place]]
        return {"input_ids": block, "labels": block}


class StreamedBlocks(IterableDataset):
    """Blocks of a streamed dataset, from one on, of which only one batch is in memory at a time."""

    def __init__(self, documents, tokenizer, block_size, start):
        self.documents, self.tokenizer, self.block_size, self.start = documents, tokenizer, block_size, start

    def __iter__(self):
        for block in islice(iterate_blocks(self.documents(), self.tokenizer, self.block_size), self.start, None):
            ids = torch.tensor(block)
            yield {"input_ids": ids, "labels": ids}
