# SPDX-License-Identifier: Apache-2.0
"""`DynaMoETrainer`, a `transformers.Trainer` for nested experts and their routers, and its arguments."""

import copy
import math
import os
import random
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.utils import logging

from .card import render_card
from .disk import sync, sync_entry
from .folder import CONVERSION, carry_records, write_json
from .integrity import DIGESTS, digests_of, first_not_finite
from .losses import LossesInChunks, layer_outputs, relative_error, without_hooks
from .modeling import DynaMoEForCausalLM
from .modeling.dense_base import decoder_layers, decoder_of
from .modeling.routing import loss_mask, mean_router_loss
from .observe import expert_shares, mlp_parts, of_tokens
from .processes import check_division
from .trainable import adapters_off, choose_trainable, density_range_of, divide_layers, frozen_copy, router_parameters
from .training_arguments import NestedTrainingArguments


logger = logging.get_logger(__name__)
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Scale of the logistic noise on the routers' threshold, in logits, while they learn by choosing.
ROUTER_TEMPERATURE = 0.5


@dataclass
class DynaMoETrainingArguments(NestedTrainingArguments, TrainingArguments):
    """
    `TrainingArguments` with the fields of `NestedTrainingArguments`. The defaults are those of `train_model`, in the
    phase that trains experts. The whole recipe, with Trainers of one's own:

        fit_thresholds(model, blocks)
        fit_routers(model, blocks)
        DynaMoETrainer(model, DynaMoETrainingArguments(OUT), train_dataset=...).train()
        fit_thresholds(model, blocks)
        fit_routers(model, blocks, route="router")
        arguments = DynaMoETrainingArguments(OUT, train_parts="routers", hidden_loss_coef=0, width_loss_coef=0.9)
        DynaMoETrainer(model, arguments, train_dataset=...).train()

    Raises:
        ValueError: as `NestedTrainingArguments`; `width_loss_coef` on another route than the routers'; label smoothing.
    """

    def __post_init__(self):
        # Past `NestedTrainingArguments`, to the class of the other base, which may be a subclass of `TrainingArguments`.
        super(NestedTrainingArguments, self).__post_init__()
        self.check()
        if self.width_loss_coef and self.route != "router":
            raise ValueError(
                f'`width_loss_coef` trains routers by what they choose, so it needs route="router", found {self.route!r}.'
            )
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` does not go with the router loss. Leave it at 0.")


class DynaMoETrainer(Trainer):
    """
    `Trainer` for a `DynaMoEForCausalLM`, or a PEFT model around one. Logs, beside the loss: `lm_loss`, `router_loss`,
    `kd_loss`, `hidden_loss`, `width_loss`, `mean_width` (share of the MLPs' width that tokens took), `mean_share` (share of
    their weights that tokens read, where sparsity leaves some out), `router_accuracy`
    (agreement of the routers with the labels, where the route or the router loss needs labels) and `share_expert_0` ...
    (share of the tokens). Where tokens would follow routers that know nothing and do not learn, they follow their labels and the
    router loss has weight 1, with a warning.

    Raises:
        ValueError: the model is no DynaMoE model; `train_parts="lora"` without adapters, or `"routers"` without a loss
            for them; several GPUs without a launcher; `compute_loss_func`, which this Trainer would not call.
        FloatingPointError: in training, a loss, a gradient or a weight is not finite. Checkpoints written before stay.
    """

    args: DynaMoETrainingArguments

    def __init__(self, model=None, args=None, **kwargs):
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        check_model(core, args, adapted=core is not model)
        if know_nothing(core, args):
            logger.warning(
                'DynaMoE: tokens would follow routers that know nothing, found route="router" and router_loss_coef=0. They follow their '
                'labels, and the routers learn these: route="label", router_loss_coef=1. To let them follow routers, call '
                "`fit_routers(model, blocks)` first."
            )
            args = copy.copy(args)
            args.route, args.router_loss_coef = "label", 1.0
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "`compute_loss_func` does not go with the losses of this Trainer. Subclass it, and `compute_loss`."
            )
        self.core = core
        choose_trainable(core, args.train_parts)
        if not (args.router_loss_coef or args.width_loss_coef):
            # No other loss gives routers a gradient, and DDP waits for the gradient of every trainable parameter.
            for parameter in router_parameters(model):
                parameter.requires_grad_(False)
        self.teacher = None
        if self._distils(args) and args.teacher == "frozen" and args.train_parts in ("mlp", "layers", "all"):
            self.teacher = frozen_copy(core)
        self._aside: Path | None = None  # where a checkpoint is written until it is whole
        self._batch = (0, 0)  # the step that is being made and its batch, from 1
        self._parts: dict[str, list[torch.Tensor]] = {}  # losses and metrics since the last log; `_metrics` is a name of TRL
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:  # here, because the base class sets it to 1 for a model that is spread over several devices
            raise ValueError(
                f"Training on {self.args.n_gpu} GPUs needs one process for each: start it with `accelerate launch` or "
                "torchrun, or show it one GPU with `CUDA_VISIBLE_DEVICES=0`."
            )
        check_division(self.accelerator.state)
        self.expert_shares, self.mlp_parts = (shares(core).to(self.args.device) for shares in (expert_shares, mlp_parts))
        self.sensitivity_range = self.args.sensitivity_range or core.config.train_sensitivity
        self.density_range = density_range_of(core.config, self.args.density_range)
        if self.teacher is not None:
            self.teacher.to(self.args.device)  # type: ignore[arg-type]  # transformers' decorator hides `to`
            if self.is_fsdp_enabled:
                divide_layers(self.teacher)

    def create_optimizer(self, model=None):
        """As the base class, with the routers in a group of their own, at `router_learning_rate`."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        routers = {id(parameter) for parameter in router_parameters(self.model)}
        for group in list(optimizer.param_groups):
            moved = [p for p in group["params"] if id(p) in routers]
            group["params"] = [p for p in group["params"] if id(p) not in routers]
            if moved:
                own = {**group, "params": moved, "lr": self.args.router_learning_rate}
                own.pop("initial_lr", None)
                optimizer.add_param_group(own)
        # Some schedulers and checkpoint formats fail on an empty group.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def training_step(self, model, *args, **kwargs):
        """As the base class; a batch whose loss or gradient is not finite ends the training before it reaches a weight."""
        step, batch = self.state.global_step + 1, self._batch[1] + 1 if self._batch[0] == self.state.global_step + 1 else 1
        self._batch = (step, batch)
        loss = super().training_step(model, *args, **kwargs)
        self._refuse_not_finite("loss", loss)
        # Shards of a gradient are not looked at, and float16 finds its scale by gradients that are not finite.
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled or getattr(self.accelerator, "scaler", None)):
            gradients = [p.grad for p in self.core.parameters() if p.grad is not None]
            if gradients:
                self._refuse_not_finite("gradient", torch.nn.utils.get_total_norm(gradients, math.inf))
        return loss

    def _refuse_not_finite(self, what, value):
        if not value.isfinite():
            step, batch = self._batch
            raise FloatingPointError(
                f"Training diverged: found a {what} of {value.item():g} in step {step}, batch {batch} of "
                f"{self.args.gradient_accumulation_steps}. Earlier checkpoints stay. Take a lower learning rate, or look at the text "
                "of this batch."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The loss of `NestedTrainingArguments` in training, that of the base class in evaluation. `num_items_in_batch`:
        tokens with a label in the whole accumulated batch; without any, the loss and its gradient are 0.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args, core = self.args, self.core
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        # What is drawn, in the layers too, depends on the place of a batch in the training, not on the process that has it.
        torch.manual_seed(self._seed_of(self._place()))
        sensitivity, density = self._draw("sensitivity_range", labels), None
        if self.density_range is not None:
            density = 1.0 if min(self.density_range) == 1 else self._draw("density_range", labels)
        positions = self._sample_positions(labels)
        needs_labels = args.route == "label" or args.router_loss_coef > 0
        choice = {"route": args.route, "temperature": ROUTER_TEMPERATURE if args.width_loss_coef else None}
        dial = {"sensitivity": sensitivity, "density": density}
        with core.routing(**choice, **dial, needs_labels=needs_labels, records=[]) as routing:
            # Outputs are where DDP looks for the parameters that get a gradient.
            hidden, states = self._hidden_states(model, core, {**inputs, "output_router_logits": needs_labels})

        mask = loss_mask(labels)
        items = mask.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=labels.device)
        items = items.clamp_min(1)
        sampled = mask[:, positions]
        # A sum over the sampled positions stands for the sum over all of them.
        scale = mask.sum() / sampled.sum().clamp_min(1) / items
        targets = torch.where(mask, F.pad(labels[:, 1:], (0, 1)), -100)[:, positions]
        target_hidden, hidden_loss = None, torch.zeros_like(scale)
        if self._distils(args):
            target_hidden, target_states = self._full_width_hidden(model, inputs)
            target_hidden = target_hidden[:, positions]
            if states:
                hidden_loss = (relative_error(states, target_states) * mask).sum() / items
        outer_loss, lm_loss, kd_loss = self._losses_at(hidden[:, positions], targets, target_hidden, scale)
        router_loss = mean_router_loss(routing.records, mask, items) if needs_labels else torch.zeros_like(outer_loss)
        width_loss = torch.zeros_like(scale)
        if args.width_loss_coef:
            widths_LBS = torch.stack([record.width.to(labels.device) for record in routing.records])
            width = (widths_LBS * self.mlp_parts.to(labels.device)[:, None, None]).mean(0)
            # What a token pays for is what it reads.
            price = (1 / sensitivity - 1) * (1.0 if density is None else density)
            width_loss = (price[:, None] * width * mask).sum() / items
        loss = outer_loss + args.router_loss_coef * router_loss + args.hidden_loss_coef * hidden_loss
        loss = loss + args.width_loss_coef * width_loss
        losses = {"lm_loss": lm_loss, "router_loss": router_loss, "kd_loss": kd_loss, "hidden_loss": hidden_loss}
        # Processes are averaged over, but `items` are those of all of them.
        shared = args.average_tokens_across_devices and num_items_in_batch is not None
        processes = self.accelerator.num_processes if shared else 1
        losses = {name: value * processes for name, value in {**losses, "width_loss": width_loss}.items()}
        self._keep_metrics(routing.records, sensitivity, mask, **losses)
        loss = loss * processes
        return (loss, {"loss": loss}) if return_outputs else loss

    @staticmethod
    def _distils(args):
        # Routers that do not learn by choosing get no gradient through the experts.
        reached = args.train_parts != "routers" or args.width_loss_coef
        return bool(reached and (args.kd_loss_coef or args.hidden_loss_coef)) and args.teacher != "none"

    def _place(self) -> int:
        """The place of this process's batch among those of a step: in one process with more accumulation it is the same."""
        return max(0, self._batch[1] - 1) * self.accelerator.num_processes + self.accelerator.process_index

    def _seed_of(self, what) -> int:
        return random.Random(f"{self.args.seed} {self.state.global_step} {what}").getrandbits(32)

    def _draw(self, name, labels):
        """
        (B,): one from each of as many equal parts of a range as a step has sequences, in all its batches and processes, so that
        a step of a few sequences has narrow and wide experts, or sparse and dense ones, alike.
        """
        low, high = getattr(self, name)
        batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        generator, count = torch.Generator().manual_seed(self._seed_of(name)), labels.shape[0] * batches
        drawn = (torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count
        own = drawn.view(batches, -1)[self._place() % batches]
        return low + (high - low) * own.to(labels.device)

    def _sample_positions(self, labels):
        """Sorted positions (P,), the same for all sequences of a batch, of those that have a next token."""
        length = labels.shape[1] - 1
        count = max(1, math.ceil(self.args.logit_fraction * length))
        return torch.rand(length, device=labels.device).argsort()[:count].sort().values

    def _hidden_states(self, model, core, inputs):
        """
        What the head reads (B, S, D), and the outputs of all layers where the hidden loss needs them, else none.

        Through `model`'s own `forward`, because wrappers such as DDP must see the call; it computes no logits.
        """
        kept = []
        watched = decoder_layers(core.base_model) if self.args.hidden_loss_coef and self._distils(self.args) else []
        last = decoder_of(core.base_model).register_forward_hook(lambda module, args, output: kept.append(output[0]))
        with last, layer_outputs(watched) as states:
            # With a cache, models would not see where packed documents begin.
            inputs = {**inputs, "use_cache": False}
            model(**inputs, logits_to_keep=torch.zeros(0, dtype=torch.long, device=inputs["input_ids"].device))
        return kept[0], states

    @torch.no_grad()
    def _full_width_hidden(self, model, inputs):
        """As `_hidden_states`, of the teacher at its full width."""
        lora = self.args.train_parts == "lora" and self.args.teacher == "frozen"
        unwrapped = self.accelerator.unwrap_model(model)
        teacher, core = (unwrapped, self.core) if self.teacher is None else (self.teacher, self.teacher)
        with adapters_off(unwrapped) if lora else nullcontext(), self.accelerator.autocast():
            teacher.eval()
            with core.routing(force_expert=core.config.expert_count - 1):
                found = self._hidden_states(teacher, core, inputs)
            model.train()
        return found

    def _losses_at(self, hidden, targets, target_hidden, scale):
        """
        The LM loss and KL(full width || chosen experts), each summed over positions and multiplied by `scale`: their
        weighted sum, which has a gradient, and both of them. (B, P, D), (B, P), (B, P, D) or None, a scalar -> three
        scalars.
        """
        core, teacher = self.core, self.core if self.teacher is None else self.teacher

        def losses(hidden, targets, target_hidden=None):
            log_probs = core.logits_of(hidden[None])[0].float().log_softmax(-1)
            lm_loss = F.nll_loss(log_probs, targets, ignore_index=-100, reduction="sum")
            if target_hidden is None:
                return torch.stack([lm_loss, lm_loss.new_zeros(())])
            with torch.no_grad():
                target = teacher.logits_of(target_hidden[None])[0].float().log_softmax(-1)
            kl = F.kl_div(log_probs, target, log_target=True, reduction="none").sum(-1)
            return torch.stack([lm_loss, (kl * (targets != -100)).sum()])

        rows = [tensor.flatten(0, 1) for tensor in (hidden, targets, target_hidden) if tensor is not None]
        head = [parameter for parameter in core.get_output_embeddings().parameters() if parameter.requires_grad]
        weights = scale * torch.tensor([self.args.lm_loss_coef, self.args.kd_loss_coef], device=hidden.device)
        # FSDP has gathered the head in the model's `forward`; its hooks would take the end of a chunk for that of backward.
        heads = {core.get_output_embeddings(), teacher.get_output_embeddings()} if self.is_fsdp_enabled else ()
        # accelerate casts in the model's own `forward` alone, which this is not.
        with without_hooks(heads), self.accelerator.autocast():
            loss, parts = LossesInChunks.apply(losses, weights, *rows, *head)
        return loss, *(parts * scale)

    @torch.no_grad()
    def _keep_metrics(self, records, sensitivity, mask, **losses):
        """
        Keep the losses and the use of experts as device tensors until `log`: reading them here would wait for the
        device.
        """
        mask = mask.to(torch.float32)
        used = [F.one_hot(record.expert.to(mask.device), self.expert_shares.shape[1]).float() for record in records]
        used = [each if each.ndim == 3 else each.mean(2) for each in used]  # of a token's experts in a mixture
        used_LE = (torch.stack(used) * mask[..., None]).sum((1, 2))
        tokens = (mask.sum() * len(records)).clamp_min(1)
        metrics = {**losses, "mean_width": (used_LE * self.expert_shares.to(mask.device)).sum() / tokens}
        if self.density_range is not None:
            read = torch.stack([(record.share.to(mask.device) * mask).sum() for record in records])
            metrics["mean_share"] = (read * self.mlp_parts.to(mask.device)).sum() / tokens
        if records[0].label is not None:
            agreement = 0.0
            for mlp, record in zip(self.core.nested_mlps, records):
                chosen = mlp.router.choose(record.router_logits, sensitivity)
                agreement = agreement + (of_tokens((chosen == record.label).float()).to(mask.device) * mask).sum()
            metrics["router_accuracy"] = agreement / tokens
        metrics |= {f"share_expert_{index}": count / tokens for index, count in enumerate(used_LE.sum(0))}
        for name, value in metrics.items():
            self._parts.setdefault(name, []).append(value.detach())

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model, trial):
        """
        As the base class, with the records, a model card and digests of all files, so that a checkpoint can be published, and checked.
        It is written aside and gets its name when the disk has all of it.
        """
        final = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if name := first_not_finite(self.core):
            raise FloatingPointError(
                f"Training diverged: found NaN or an infinity in `{name}` after step {self.state.global_step}. Earlier checkpoints "
                "stay. Take a lower learning rate."
            )
        if self.args.push_to_hub:  # the client still reads the folder after this
            super()._save_checkpoint(model, trial)
            return
        aside = final.parent / ".saving"
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._aside = aside
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._name_checkpoint(aside / final.name, final)
        except (OSError, SafetensorError, RuntimeError) as error:  # torch and safetensors have their own for a full disk
            raise OSError(
                f"{final} cannot be written: {error}. Earlier checkpoints stay. Make room on the disk, then resume the training."
            ) from error
        finally:
            self._aside = None
            if self.args.should_save:
                shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _name_checkpoint(self, written: Path, final: Path) -> None:
        """Complete a checkpoint that was written aside, give it its name, and remove those beyond `save_total_limit`."""
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        if (written / "config.json").is_file():  # a LoRA checkpoint is an adapter alone
            carry_records(self.core.name_or_path, written, [CONVERSION])
            render_card(written, local_files_only=True).save(written / "README.md")
        write_json(written / DIGESTS, digests_of(written, ["**/*"]))
        sync(written)
        if final.exists():  # damaged, and resumed from one before it
            os.replace(final, written.parent / "replaced")
        os.replace(written, final)
        sync_entry(final)
        kept = {final, Path(self.state.best_model_checkpoint or final)}
        paths = [path for path in final.parent.iterdir() if CHECKPOINT.fullmatch(path.name) and path not in kept]
        paths.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in paths[max(0, self.args.save_total_limit - len(kept)) :] if self.args.save_total_limit else []:
            os.replace(path, written.parent / path.name)  # what is half deleted has no name either

    def _save(self, output_dir=None, state_dict=None):
        """As the base class, without the pickle of the arguments, which nothing reads."""
        if self.is_fsdp_enabled:
            # FSDP gives the model a class of its own, and a folder gets the code of the class's module, by its name.
            type(self.core).__module__, type(self.core).__name__ = DynaMoEForCausalLM.__module__, DynaMoEForCausalLM.__name__
        super()._save(output_dir, state_dict)
        Path(output_dir or self.args.output_dir or ".", TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def log(self, logs, start_time=None):
        """Add the averages since the last log. Losses are sums over a whole accumulated batch, so they add up over it."""
        if "loss" in logs and self._parts:
            steps = self.args.gradient_accumulation_steps
            means = torch.stack([torch.stack(values).mean() for values in self._parts.values()])
            for name, mean in zip(self._parts, self.accelerator.reduce(means, "mean").tolist()):
                logs[name] = round(mean * steps if name.endswith("_loss") else mean, 6)
            self._parts.clear()
        super().log(logs, start_time)


def check_model(core, args: DynaMoETrainingArguments, adapted: bool) -> None:
    """Raise `ValueError` where a model cannot be trained with these arguments. `adapted`: it has adapters around it."""
    if getattr(getattr(core, "config", None), "model_type", None) != "dynamoe":
        raise ValueError(f"DynaMoETrainer trains DynaMoE models, found {type(core).__name__}. Run `dynamoe convert` first.")
    if args.train_parts == "lora" and not adapted:
        raise ValueError('`train_parts="lora"` needs adapters: wrap the model with `get_peft_model(model, lora_config())`.')
    if args.train_parts == "routers" and not (args.router_loss_coef or args.width_loss_coef):
        raise ValueError(
            '`train_parts="routers"` needs a router loss, found router_loss_coef=0 and width_loss_coef=0. Give one a weight, '
            "such as 1."
        )
    if args.width_loss_coef and not core.config.has_dial:
        raise ValueError(
            f"`width_loss_coef` needs profile routers, found {core.config.router_class.__name__}. Leave it at 0, or convert with "
            "`--router-type profile`."
        )
    density_range_of(core.config, args.density_range)


def know_nothing(core, args: DynaMoETrainingArguments) -> bool:
    """Whether tokens would follow routers as `dynamoe convert` makes them, and nothing would train these."""
    full_width_alone = (args.sensitivity_range or core.config.train_sensitivity)[0] == 1
    if args.route != "router" or args.router_loss_coef or args.width_loss_coef or full_width_alone:
        return False
    outputs = [p for name, p in core.named_parameters() if ".router." in name and name.endswith("output.weight")]
    return any(weight.numel() and not weight.any() for weight in outputs)


class LossBar(ProgressCallback):
    """A progress bar that shows the losses, where the base class prints a dictionary at every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            names = ("loss", "kd_loss", "hidden_loss", "router_loss", "width_loss", "mean_width")
            # This training does not have a loss that is 0.
            self.training_bar.set_postfix({name: f"{logs[name]:.3f}" for name in names if logs.get(name)})
