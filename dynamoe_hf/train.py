# SPDX-License-Identifier: Apache-2.0
"""The stages `train_model` and `adapt_model`: a recipe is a list of phases, and one loop runs them and can resume them."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import default_data_collator
from transformers.trainer_callback import ProgressCallback

from .arguments import Route, resolve
from .card import check_records, render_card
from .data import dataset_name, text_names
from .disk import staging_of
from .folder import TRAINING, carry_records, new_folder, read_json, save_model, write_json
from .processes import from_main, is_main_process, join_processes
from .router_fit import fit_routers
from .run import Run, WatchRun, newest_whole
from .self_text import SELF
from .threshold_fit import THRESHOLD_TOKENS, fit_thresholds
from .trainable import with_adapters
from .trainer import DynaMoETrainer, DynaMoETrainingArguments, LossBar, know_nothing
from .training_arguments import AdaptArguments, TrainArguments, nested_settings


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
        OSError: nothing can be written to `out`, another run is writing it, or the disk is full.
        FloatingPointError: the training diverged. The checkpoints from before stay.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run is kept, and `resume=True` goes on with it.
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
    join_processes()
    if not is_main_process():
        _run_phases(Run(folder, out, arguments), recipe)
        return from_main({})
    with new_folder(out) as target:
        check_records(folder)
        run = Run(folder, out, arguments)
        with run.interruptible():
            model, record = _run_phases(run, recipe)
            record["weights"] = save_model(model, target)
            run.tokenizer.save_pretrained(target)
            carry_records(folder, target)
            write_json(target / TRAINING, record)
            render_card(target, local_files_only=True, name=Path(out).name).save(target / "README.md")
    os.replace(run.work, staging_of(run.work))  # what is half deleted is no run to resume
    shutil.rmtree(staging_of(run.work), ignore_errors=True)
    return from_main(record)


def _run_phases(run: Run, recipe) -> tuple[Any, dict]:
    """The model as the recipe makes it, from where an interrupted run stopped, and the record of the run."""
    model, state = run.load_model(), run.state
    phases = recipe(run.arguments, max(1, run.arguments.max_tokens // run.step_tokens))
    for phase in phases[state.phase :]:
        model = _run_phase(phase, model, run)
        state.phase, state.fitted = state.phase + 1, False
        if state.phase < len(phases):
            run.save(model)
    return model, _record(run, chooses=any(phase.name == "routers" and phase.steps for phase in phases))


def _run_phase(phase: Phase, model, run: Run):
    """Fit the routers and train, from where an interrupted run stopped; keep the state of `run`, and return the model."""
    arguments, state, folder = run.arguments, run.state, run.checkpoints_of(phase.name)
    checkpoint = from_main(newest_whole(folder) if is_main_process() and folder.is_dir() else None)
    trainer_arguments = _trainer_arguments(arguments, phase, folder)
    if phase.steps and not phase.fit and know_nothing(model, trainer_arguments):
        raise ValueError(
            "Tokens would follow routers that know nothing: found route=router, routers as `dynamoe convert` makes them, "
            f"router_tokens={arguments.router_tokens} and router_loss_coef=0. Fit routers on some tokens (`--router-tokens`), or set "
            "`--route label --router-loss-coef 1`."
        )
    if phase.sparse and not state.fitted:
        fit_thresholds(model, run.blocks(THRESHOLD_TOKENS))
        model.config.thresholds = from_main(model.config.thresholds)
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

    def wrap(model):
        return with_adapters(model, arguments.lora_rank, arguments.seed) if lora else model

    trainer = DynaMoETrainer(
        model=wrap(model),
        args=trainer_arguments,
        train_dataset=run.training_blocks(state.steps, phase.steps),
        processing_class=run.tokenizer,
        # Blocks are of one length, so nothing is padded: many tokenizers have no padding token.
        data_collator=default_data_collator,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    trainer.add_callback(WatchRun(run))
    run.trains = True
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    run.trains = False
    if run.stop:
        raise run.interruption()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    state.history += [{**entry, "step": state.steps + entry["step"]} for entry in logged]
    state.steps += trainer.state.global_step
    model = run.whole_model(trainer, wrap)
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


def _record(run: Run, chooses: bool) -> dict:
    """What `training.json` says."""
    names = ("route", "teacher", "sensitivity_range", "density_range", "threshold_ramp", "block_size", "batch_size", "gradient_accumulation_steps",
             "learning_rate", "router_learning_rate", "lm_loss_coef", "kd_loss_coef", "hidden_loss_coef",
             "router_loss_coef", "logit_fraction", "router_tokens", "harm", "choice_share", "width_loss_coef", "lora_rank",
             "bf16", "seed")  # fmt: skip
    arguments, state = run.arguments, run.state
    settings = {"train": arguments.train_parts, **{name: getattr(arguments, name) for name in names}}
    settings["width_loss_coef"] = arguments.width_loss_coef if chooses else None
    settings["self_tokens"] = arguments.self_tokens if SELF in text_names(arguments.text) else None
    settings["lora_rank"] = arguments.lora_rank if arguments.train_parts == "lora" else None
    before = read_json(run.folder / TRAINING)
    earlier = (
        []
        if before is None
        else [*before.pop("earlier", []), {k: v for k, v in before.items() if k not in ("history", "weights")}]
    )
    return {
        "from": run.folder.name,
        "text": text_names(arguments.text) if arguments.dataset is None else dataset_name(arguments.dataset),
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
