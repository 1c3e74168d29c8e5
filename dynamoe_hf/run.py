# SPDX-License-Identifier: Apache-2.0
"""A run of a training stage: its text, how far it has come, and what it keeps on disk so that it can be resumed at any point."""

import json
import logging
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset, IterableDataset
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import TrainerCallback

from .data import check_ids, documents_for, packed_blocks, text_names, token_blocks
from .folder import (
    carry_records,
    check_digests,
    check_weights,
    load_dynamoe_config,
    load_model,
    load_tokenizer,
    new_folder,
    read_json,
    save_model,
    write_json,
)
from .integrity import DIGESTS, differing, digest_of, digests_of
from .modeling import DynaMoEForCausalLM
from .processes import from_main, hand_over, is_main_process, launched_processes
from .router_fit import checked_harm
from .self_text import SELF, own_text_file
from .trainable import DENSITY_RANGE
from .trainer import CHECKPOINT
from .training_arguments import TrainArguments


CHOICE_SHARE = 0.2  # of the steps, at the end, on which routers learn by choosing
RANDOM = "random.safetensors"  # state of the random numbers, of the CPU and of each GPU
LOGGER = logging.getLogger(__name__)


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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM in a run; says what is kept and how to go on."""


class Run:
    """A run of a stage: its arguments, its text, and its state, kept in `OUT.checkpoints` until the end."""

    def __init__(self, folder: str | Path, out: str | Path, arguments: TrainArguments):
        self.folder, self.work = Path(folder), Path(out).with_name(f"{Path(out).name}.checkpoints")
        self.config = load_dynamoe_config(folder)
        self.arguments, self.tokenizer = _settled(arguments, self.config), load_tokenizer(folder)
        processes, state = launched_processes(), None
        if is_main_process():
            state = _resumed(self.work, arguments, {**_sources(folder, arguments), "processes": processes})
            check_weights(folder)  # before anything is written
        self.state = from_main(state)
        self.started = time.monotonic() - self.state.seconds
        self.step_blocks = processes * arguments.batch_size * arguments.gradient_accumulation_steps
        self.step_tokens = self.step_blocks * self.arguments.block_size
        own_text = self.work / "self.txt"
        if SELF in text_names(arguments.text):
            self.write()  # before the long work, so that its text is not written again
        self.text = own_text_file(arguments.text, folder, own_text, arguments.self_tokens, arguments.seed, arguments.bf16)
        self.distinct = None if arguments.dataset is not None else self.blocks(arguments.max_tokens)
        self.write()
        self.trains, self.stop = False, False  # whether a Trainer runs, and whether it is to end

    def documents(self):
        """The documents of the text, from the first one on."""
        return documents_for("training", self.text, self.arguments.dataset, self.arguments.column)

    def blocks(self, tokens: int) -> torch.Tensor:
        """At most so many tokens of the text, (N, S)."""
        found = token_blocks(self.documents(), self.tokenizer, self.arguments.block_size, tokens)
        check_ids(found, self.config, self.tokenizer)
        return found

    def training_blocks(self, first_step: int, steps: int) -> Dataset:
        """What the Trainer reads in `steps` steps from `first_step` on."""
        start = first_step * self.step_blocks
        if self.distinct is not None:
            return RepeatedBlocks(self.distinct, start, steps * self.step_blocks)
        return StreamedBlocks(self, start)

    def seconds(self) -> float:
        """Time that the run has taken, over all its parts."""
        return time.monotonic() - self.started

    def load_model(self):
        """The model that the current phase, or the training after its fit, starts from, with the random state of then."""
        if self.state.model is None:
            model = load_model(self.folder)
            model.config.threshold_ramp = self.arguments.threshold_ramp
            return model
        folder = self.work / self.state.model
        if wrong := differing(folder, read_json(folder / DIGESTS) or {DIGESTS: ""}):
            raise ValueError(
                f"{folder} is damaged: found {', '.join(wrong)} changed or missing. Delete {self.work} to begin anew."
            )
        model, random = load_model(folder), load_file(folder / RANDOM)
        torch.set_rng_state(random.pop("cpu"))
        torch.cuda.set_rng_state_all([random[name] for name in sorted(random, key=int)])
        return model

    def save(self, model) -> None:
        """Keep the model that the current phase, or the training after its fit, starts from."""
        before, self.state.model = self.state.model, f"model-{self.state.phase}{'-fitted' * self.state.fitted}"
        if not is_main_process():
            return
        shutil.rmtree(self.work / self.state.model, ignore_errors=True)
        with new_folder(self.work / self.state.model) as target:
            save_model(model, target)
            carry_records(self.folder, target)
            random = {"cpu": torch.get_rng_state()}
            random |= {str(index): state for index, state in enumerate(torch.cuda.get_rng_state_all())}
            save_file(random, target / RANDOM)
            write_json(target / DIGESTS, digests_of(target, ["*"]))
        self.write()
        if before:
            shutil.rmtree(self.work / before)

    def whole_model(self, trainer, wrap=lambda model: model):
        """
        The model that a Trainer has trained. Where FSDP or DeepSpeed have divided its weights over the processes, a new one that has
        all of them in each. `wrap`: what the Trainer was given, from a model of this run.
        """
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            return trainer.model
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        unset_hf_deepspeed_config()  # else transformers divides what it loads, too
        model = self.load_model()
        model.config.thresholds = trainer.core.config.thresholds
        model = wrap(model)
        if is_main_process():
            model.load_state_dict(weights)
        hand_over(model.state_dict().values(), 0)
        return model

    def write(self) -> None:
        """Write `run.json`."""
        if is_main_process():
            self.work.mkdir(parents=True, exist_ok=True)
            self.state.seconds = self.seconds()
            write_json(self.work / "run.json", asdict(self.state))

    def checkpoints_of(self, phase: str) -> Path:
        """Where the checkpoints of the current phase, which has this name, lie."""
        return self.work / f"{self.state.phase}-{phase}"

    def interruption(self) -> Interrupted:
        """What to raise where the run is interrupted now."""
        step = max([int(path.name.split("-")[1]) for path in checkpoints(self.work, f"{self.state.phase}-*/")], default=0)
        return Interrupted(
            f"Interrupted. {self.work} keeps the run up to step {self.state.steps + step}. Give the same command with `--resume` to go on."
        )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """
        Let Ctrl-C and SIGTERM end the run while the block runs: at once, or where a Trainer runs behind its step and a checkpoint. A
        second one ends it at once. Several processes, which would not end in the same step, and threads are left as they are.
        """
        if threading.current_thread() is not threading.main_thread() or launched_processes() > 1:
            yield
            return

        def handle(number, frame):
            if not self.trains or self.stop:
                raise self.interruption()
            self.stop = True

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
    if arguments.documents_apart and arguments.dataset is None:
        raise ValueError("`documents_apart` is for the documents of a dataset, found none. Give a dataset, or leave it out.")
    if arguments.train_parts == "lora" and _is_mixture(config):
        raise ValueError(
            "Adapters wrap linear layers, and a mixture holds its experts in one tensor: found train_parts='lora' and a base of the "
            f"family {config.base_config.model_type}. Train the layers, the MLPs or the routers."
        )
    routers_alone = arguments.train_parts == "routers"
    longest = getattr(config, "max_position_embeddings", None)
    return replace(
        arguments,
        harm=checked_harm(config, arguments.harm),
        choice_share=float(choice_share),
        threshold_ramp=config.threshold_ramp if arguments.threshold_ramp is None else arguments.threshold_ramp,
        # Without a dial there is nothing that would move the density.
        density_range=list(arguments.density_range or DENSITY_RANGE) if config.has_dial else [1, 1],
        router_tokens=arguments.max_tokens if routers_alone else min(arguments.router_tokens, arguments.max_tokens),
        block_size=min(arguments.block_size, longest) if longest else arguments.block_size,
    )


def _is_mixture(config) -> bool:
    with torch.device("meta"):
        return DynaMoEForCausalLM(config).is_mixture


def _sources(folder: str | Path, arguments: TrainArguments) -> dict:
    """What a run reads, by name and by the beginning of the SHA-256: a file of the same name can hold something else."""
    weights = (check_digests(folder) or digests_of(Path(folder))) if Path(folder).is_dir() else {}
    text = text_names(arguments.text)
    if arguments.text is not None:
        paths = [Path(path) for path in ([arguments.text] if isinstance(arguments.text, str | Path) else arguments.text)]
        text = [f"{path.name} {digest_of(path)[:12]}" if path.is_file() else path.name for path in paths]
    return {"from": [Path(folder).name, *(digest[:12] for digest in weights.values())], "text": text}


def _resumed(work: Path, arguments: TrainArguments, sources: dict) -> State:
    """The state in `work`, or that of a new run. Raises `ValueError` where it is not what `arguments` and `sources` say."""
    may_change = ("resume", "save_steps", "gradient_checkpointing")
    settings = {name: value for name, value in asdict(arguments).items() if name not in may_change}
    settings = json.loads(json.dumps({**settings, **sources}))
    found = read_json(work / "run.json")
    older = [path.name for pattern in ("checkpoint-*", "choice") for path in work.glob(pattern)]
    if found and found.keys() != {each.name for each in fields(State)}:
        found, older = None, ["another run.json"]
    if older and not found:
        raise ValueError(
            f"{work} holds an unfinished run of an older version, which this one cannot resume: found {older[0]}. Finish it "
            "with the version that began it, or delete it to begin anew."
        )
    if found and not arguments.resume and (found["model"] or checkpoints(work)):
        raise ValueError(f"{work} holds an unfinished run. Go on with it (`--resume`), or delete it to begin anew.")
    if arguments.resume and not found:
        raise ValueError(f"There is nothing to resume: {work} holds no checkpoint. Leave out `--resume`.")
    if not found or not arguments.resume:
        if work.is_dir():
            shutil.rmtree(work)  # left by a run that ended before its first checkpoint was complete
        return State(settings)
    before = found["settings"]
    changed = [name for name in {**settings, **before} if settings.get(name) != before.get(name)]
    if changed:
        told = ", ".join(f"{name} ({before.get(name)} before, {settings.get(name)} now)" for name in changed)
        raise ValueError(
            f"{work} holds a run with other settings: found another {told}. Resume it with the settings that "
            "it began with, or delete it to begin anew."
        )
    return State(**found)


def checkpoints(work: Path, phases: str = "*/") -> list[Path]:
    """The checkpoints that a run keeps."""
    return [path for path in work.glob(f"{phases}checkpoint-*") if CHECKPOINT.fullmatch(path.name)]


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of a folder whose files are those that were written, and a message of which one that is."""
    found = sorted(checkpoints(folder, ""), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for path in found:
        try:
            wrong = differing(path, read_json(path / DIGESTS) or {DIGESTS: ""})
        except ValueError:
            wrong = [DIGESTS]
        if not wrong:
            LOGGER.warning("Resuming from %s.", path)
            return path
        LOGGER.warning("%s is damaged and left out: found %s changed or missing.", path, ", ".join(wrong))
    LOGGER.warning("Resuming from the beginning of the phase: %s holds no whole checkpoint.", folder)
    return None


class WatchRun(TrainerCallback):
    """Writes `run.json` with every checkpoint, and ends the training behind one where the run is to end."""

    def __init__(self, run: Run):
        self.run = run

    def on_step_end(self, args, state, control, **kwargs):
        if self.run.stop:
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        self.run.write()


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

    def __init__(self, run: Run, start: int):
        self.run, self.start = run, start

    def __iter__(self):
        blocks = packed_blocks(self.run.documents(), self.run.tokenizer, self.run.arguments.block_size)
        for block in islice(blocks, self.start, None):
            check_ids(torch.tensor(block.ids), self.run.config, self.run.tokenizer)
            yield block.example(self.run.arguments.documents_apart)
