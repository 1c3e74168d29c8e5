# SPDX-License-Identifier: Apache-2.0
"""The stages `train_model` and `adapt_model`: a recipe is a list of phases, and one loop runs them and can resume them."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import torch
import transformers
from torch.utils.data import Dataset, IterableDataset
from transformers import default_data_collator
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .arguments import AdaptArguments, Route, TrainArguments, nested_settings
from .card import render_card
from .data import documents_for, iterate_blocks, text_names, token_blocks
from .folder import TRAINING, carry_records, load_model, load_tokenizer, new_folder, read_json, refuse_existing, write_json
from .router_fit import checked_harm, fit_routers
from .trainer import DynaMoETrainer, DynaMoETrainingArguments, LossBar, lora_config


CHOICE_SHARE = 0.2  # of the steps, at the end, on which routers learn by choosing
# What an adaptation has instead of the recipe: the LM loss at full width alone.
ADAPTATION = {"sensitivity_range": [1, 1], "teacher": "none", "lm_loss_coef": 1.0, "kd_loss_coef": 0.0, "hidden_loss_coef": 0.0,
              "router_tokens": 0, "choice_share": 0.0}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One part of a recipe: routers are fitted, where `fit` says so, and then `steps` are trained."""

    name: str
    """Name of the folder of its checkpoints."""
    steps: int
    """Optimizer steps; 0 if it is a fit alone."""
    fit: Route | None = None
    """Route of the tokens while the inputs of the routers are collected; None if routers are not fitted before."""
    settings: dict = field(default_factory=dict)
    """What is trained and by which losses: fields of `NestedTrainingArguments`."""


def train_recipe(arguments: TrainArguments, steps: int) -> list[Phase]:
    """
    Train experts on the routes of fitted routers, fit the routers anew to what the experts have become, then let the routers alone
    learn by choosing. `arguments` as `_settled` gives them.
    """
    nested, choice_steps = nested_settings(arguments), round(arguments.choice_share * steps)
    expert_steps = 0 if arguments.train_parts == "routers" else steps - choice_steps
    follows_routers = arguments.route == "router"
    fits, phases = arguments.router_tokens > 0, []
    if expert_steps:
        fit = "label" if follows_routers and fits else None
        phases.append(Phase(arguments.train_parts, expert_steps, fit, {**nested, "width_loss_coef": 0.0}))
    fit = ("router" if follows_routers and phases else "label") if fits else None
    choose = {"train_parts": "routers", "route": "router", "teacher": "frozen", "lm_loss_coef": 0.0, "router_loss_coef": 0.0,
              "kd_loss_coef": 1.0, "hidden_loss_coef": 0.0}  # fmt: skip
    phases.append(Phase("choose", choice_steps, fit, {**nested, **choose}))
    return [phase for phase in phases if phase.steps or phase.fit]


def adapt_recipe(arguments: TrainArguments, steps: int) -> list[Phase]:
    """One phase, which trains the full width and no router."""
    return [Phase("adapt", steps, None, {**nested_settings(arguments), "width_loss_coef": 0.0})]


def train_model(folder: str | Path, out: str | Path, arguments: TrainArguments | None = None, **settings) -> dict:
    """
    Train a DynaMoE folder and write the result as another one.

    Checkpoints lie in `OUT.checkpoints` while training goes on, each phase's in a folder of its own; each checkpoint is a model folder,
    with `train_parts="lora"` an adapter. An interrupted run continues with `resume=True`. LoRA adapters are merged into the weights
    that are written.

    The defaults are the recipe of docs/results.md, three phases: routers are fitted, and the layers learn on their routes to give the
    logits and hidden states of the full width as it was; routers are fitted anew; and at the end routers alone learn from the
    effect of their choices on the logits, against the price of width.

    Args:
        folder, out: model folder to read, and to write.
        arguments: by default those of the recipe.
        settings: fields of `TrainArguments`, in place of those of `arguments`.

    Returns:
        The training record, also written to `training.json`: settings, tokens, the logged history, and, without their histories, the
        records of the `earlier` trainings of `folder`. `seconds` are those of all parts of a resumed run.

    Raises:
        ValueError: no DynaMoE folder, a wrong value, too little text, or an unfinished run without `resume`.
        TypeError: a setting that is no field of `TrainArguments`.
        FileExistsError: `out` exists.
    """
    return _run_stage(folder, out, replace(arguments or TrainArguments(), **settings), train_recipe)


def adapt_model(folder: str | Path, out: str | Path, arguments: AdaptArguments | None = None, **settings) -> dict:
    """
    Train the full width on a text as a dense model, gently, before `train_model` teaches it to the narrower experts.

    For text that the base does not know. An LM loss in `train_model` instead would pull the full width away from everything else, and
    without either the full width stays what the base is. `settings` are fields of `AdaptArguments`; result and errors are those of
    `train_model`.
    """
    arguments = replace(arguments or AdaptArguments(), **settings)
    return _run_stage(folder, out, TrainArguments(**vars(arguments), **ADAPTATION), adapt_recipe)


def _run_stage(folder, out, arguments: TrainArguments, recipe: Callable[[TrainArguments, int], list[Phase]]) -> dict:
    """Run the phases of a recipe that are not done yet, write the model folder and return its record."""
    refuse_existing(out)
    run = Run.begin(folder, out, arguments)
    model, tokenizer = run.load_model(), load_tokenizer(folder)
    arguments = _settled(arguments, model.config)
    text = Text(arguments, tokenizer)
    phases = recipe(arguments, max(1, arguments.max_tokens // text.step_tokens))
    for phase in phases[run.phase :]:
        model = _run_phase(phase, model, text, run)
        run.phase, run.fitted = run.phase + 1, False
        if run.phase < len(phases):
            run.save(model)
    chooses = phases[-1].steps if phases[-1].name == "choose" else 0
    record = _record(arguments, text, run, chooses > 0)
    if is_main_process():
        with new_folder(out) as target:
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)
            carry_records(folder, target)
            write_json(target / TRAINING, record)
            render_card(target, local_files_only=True, name=Path(out).name).save(target / "README.md")
        shutil.rmtree(run.work, ignore_errors=True)
    return record


def _settled(arguments: TrainArguments, config) -> TrainArguments:
    """The arguments with every default that depends on the model filled in. Raises `ValueError` where the model cannot have one."""
    choice_share = arguments.choice_share
    if choice_share is None:
        choice_share = CHOICE_SHARE if config.router_type == "profile" and arguments.router_tokens else 0.0
    elif choice_share and config.router_type != "profile":
        raise ValueError(
            f"`choice_share` needs profile routers, found router_type={config.router_type!r}. Leave it at 0, or convert with "
            'router_type="profile".'
        )
    routers_alone = arguments.train_parts == "routers"
    longest = getattr(config, "max_position_embeddings", None)
    return replace(
        arguments,
        harm=checked_harm(config, arguments.harm),
        choice_share=float(choice_share),
        router_tokens=arguments.max_tokens if routers_alone else min(arguments.router_tokens, arguments.max_tokens),
        block_size=min(arguments.block_size, longest) if longest else arguments.block_size,
    )


def _run_phase(phase: Phase, model, text: "Text", run: "Run"):
    """Fit the routers and train, from where an interrupted run stopped; update `run`, and return the model."""
    arguments = text.arguments
    folder = run.work / f"{run.phase}-{phase.name}"
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if phase.fit and not run.fitted:
        options = {"seed": arguments.seed, "harm": arguments.harm, "bf16": arguments.bf16}
        options["sensitivity_range"] = arguments.sensitivity_range
        run.fit = fit_routers(model, text.blocks(arguments.router_tokens), route=phase.fit, **options)
        run.fitted = True
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
        train_dataset=text.training_blocks(run.steps, phase.steps),
        processing_class=text.tokenizer,
        # Blocks are of one length, so nothing is padded: many tokenizers have no padding token.
        data_collator=default_data_collator,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    trainer.add_callback(WriteRun(run))
    trainer.train(resume_from_checkpoint=checkpoint)
    run.history += [{**entry, "step": run.steps + entry["step"]} for entry in trainer.state.log_history if "loss" in entry]
    run.steps += trainer.state.global_step  # fewer than `phase.steps` where a streamed dataset has ended
    return (model.merge_and_unload() if lora else model).requires_grad_(True)


def _trainer_arguments(arguments: TrainArguments, phase: Phase, folder: Path) -> DynaMoETrainingArguments:
    """The arguments of a phase's Trainer: AdamW with a cosine schedule to a twentieth of the learning rate."""
    # Named only where it is wanted: a model whose family has no checkpointing refuses a False too.
    checkpointing = {"gradient_checkpointing": True} if arguments.gradient_checkpointing else {}
    return DynaMoETrainingArguments(
        output_dir=str(folder),
        max_steps=phase.steps,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        learning_rate=arguments.learning_rate,
        adam_beta2=0.95,
        warmup_steps=min(10, phase.steps // 10),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        bf16=arguments.bf16,
        use_cpu=not torch.accelerator.is_available(),
        save_steps=arguments.save_steps,
        save_total_limit=2,
        logging_steps=max(1, min(10, phase.steps // 10)),
        report_to="none",
        seed=arguments.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},
        **checkpointing,
        **phase.settings,
    )


def _record(arguments: TrainArguments, text: "Text", run: "Run", chooses: bool) -> dict:
    """What `training.json` says."""
    names = ("route", "teacher", "sensitivity_range", "block_size", "batch_size", "gradient_accumulation_steps",
             "learning_rate", "router_learning_rate", "lm_loss_coef", "kd_loss_coef", "hidden_loss_coef", "router_loss_coef",
             "logit_fraction", "router_tokens", "harm", "choice_share", "width_loss_coef", "lora_rank", "bf16", "seed")  # fmt: skip
    settings = {"train": arguments.train_parts, **{name: getattr(arguments, name) for name in names}}
    span = arguments.sensitivity_range
    settings["sensitivity_range"] = None if span is None else list(span)
    settings["width_loss_coef"] = arguments.width_loss_coef if chooses else None
    settings["lora_rank"] = arguments.lora_rank if arguments.train_parts == "lora" else None
    before = read_json(run.folder / TRAINING)
    earlier = [] if before is None else [*before.pop("earlier", []), {k: v for k, v in before.items() if k != "history"}]
    return {
        "from": run.folder.name,
        "text": arguments.dataset or text_names(arguments.text),
        "tokens": run.steps * text.step_tokens,
        "distinct_tokens": None if text.distinct is None else text.distinct.numel(),
        "steps": run.steps,
        "router_fit": run.fit,
        "seconds": round(run.seconds, 1),
        "settings": settings,
        "earlier": earlier,
        "history": run.history,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


class Run:
    """
    What a run has done, and where: `OUT.checkpoints/run.json`, written with every checkpoint, and beside it the model that the
    current phase started from.
    """

    FIELDS = ("settings", "phase", "fitted", "model", "steps", "history", "fit", "seconds")

    def __init__(self, folder, work, settings, state=None):
        self.folder, self.work, self.settings = Path(folder), work, settings
        self.phase, self.fitted, self.model = 0, False, None  # index of the current phase; its fit is done; its first model
        self.steps, self.history, self.fit = 0, [], None  # of the phases that are done
        vars(self).update(state or {})
        self.started = time.monotonic() - (state or {"seconds": 0.0})["seconds"]

    @classmethod
    def begin(cls, folder, out, arguments: TrainArguments) -> "Run":
        """The run that `OUT.checkpoints` holds, or a new one. Raises `ValueError` where `resume` says otherwise."""
        work = Path(f"{out}.checkpoints")
        state = read_json(work / "run.json")
        if state is None and work.is_dir() and any(work.glob("clock.json")):
            raise ValueError(
                f"{work} holds an unfinished run of an older version, which this one cannot resume: found clock.json. Finish it with "
                "the version that began it, or delete it to begin anew."
            )
        if state and not arguments.resume:
            raise ValueError(f"{work} holds an unfinished run. Go on with it (`--resume`), or delete it to begin anew.")
        if state is None and arguments.resume:
            raise ValueError(f"There is nothing to resume: {work} holds no checkpoint. Leave out `--resume`.")
        settings = {name: value for name, value in asdict(arguments).items() if name not in ("text", "resume", "save_steps")}
        settings["text"] = text_names(arguments.text)
        for name, value in settings.items() if state else ():
            if state["settings"].get(name) != (list(value) if isinstance(value, tuple) else value):
                raise ValueError(
                    f"{work} holds a run with another `{name}`: found {state['settings'].get(name)!r}, now {value!r}. Resume it "
                    "with its own settings, or delete it to begin anew."
                )
        if state is None and is_main_process():
            shutil.rmtree(work, ignore_errors=True)  # of a run that ended before its first checkpoint was complete
        return cls(folder, work, settings, state)

    @property
    def seconds(self) -> float:
        """Time that all parts of the run have taken."""
        return time.monotonic() - self.started

    def load_model(self):
        """The model that the current phase starts from, with the random state that it had then."""
        if self.model is None:
            return load_model(self.folder)
        model = load_model(self.work / self.model)
        states = torch.load(self.work / self.model / "rng_state.pth")
        torch.set_rng_state(states["cpu"])
        torch.cuda.set_rng_state_all(states["cuda"])
        return model

    def save(self, model) -> None:
        """Keep the model that the current phase, or what follows its fit, starts from."""
        if not is_main_process():
            return
        before, self.model = self.model, f"model-{self.phase}{'-fitted' if self.fitted else ''}"
        shutil.rmtree(self.work / self.model, ignore_errors=True)
        with new_folder(self.work / self.model) as target:
            model.save_pretrained(target)
            carry_records(self.folder, target)
            torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, target / "rng_state.pth")
        self.write()
        if before:
            shutil.rmtree(self.work / before, ignore_errors=True)

    def write(self) -> None:
        """Write `run.json`."""
        write_json(self.work / "run.json", {name: getattr(self, name) for name in self.FIELDS})


class WriteRun(TrainerCallback):
    """Writes `run.json` with every checkpoint, so that the run can be resumed from it and knows how long it has taken."""

    def __init__(self, run: Run):
        self.run = run

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.run.write()


def is_main_process() -> bool:
    """Whether this process writes files: under a launcher only the first one does."""
    return int(os.environ.get("RANK", 0)) == 0


class Text:
    """The text of a stage as token blocks: `distinct` (N, S) holds all of it, or is None where a dataset is streamed."""

    def __init__(self, arguments: TrainArguments, tokenizer):
        self.arguments, self.tokenizer = arguments, tokenizer
        self.step_blocks = arguments.batch_size * arguments.gradient_accumulation_steps
        self.step_tokens = self.step_blocks * arguments.block_size
        self.distinct = None if arguments.dataset is not None else self.blocks(arguments.max_tokens)

    def documents(self):
        """The documents, from the first one on."""
        return documents_for("training", self.arguments.text, self.arguments.dataset, self.arguments.column)

    def blocks(self, tokens: int) -> torch.Tensor:
        """At most so many tokens, (N, S)."""
        return token_blocks(self.documents(), self.tokenizer, self.arguments.block_size, tokens)

    def training_blocks(self, first_step: int, steps: int) -> Dataset:
        """What the Trainer reads in `steps` steps from `first_step` on."""
        start = first_step * self.step_blocks
        if self.distinct is not None:
            return RepeatedBlocks(self.distinct, start, steps * self.step_blocks)
        return StreamedBlocks(self.documents, self.tokenizer, self.arguments.block_size, start)


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
            block = torch.tensor(block)
            yield {"input_ids": block, "labels": block}
