# SPDX-License-Identifier: Apache-2.0
"""Fine-tune routers and experts: `DynaMoETrainer`, a `transformers.Trainer`, and the stage `train_model` around it."""

import copy
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments, default_data_collator
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from .arguments import AdaptArguments, TrainArguments, resolve
from .card import render_card
from .data import documents_for, iterate_blocks, text_names, token_blocks
from .folder import (
    CONVERSION,
    TRAINING,
    carry_records,
    load_model,
    load_tokenizer,
    new_folder,
    read_json,
    refuse_existing,
    write_json,
)
from .modeling import DynaMoEForCausalLM
from .modeling.difficulty import label_of
from .modeling.routing import ROUTES, loss_mask, mean_router_loss
from .observe import expert_shares, gradients_of_activations, output_gradients


TRAINED_PARTS = ("routers", "mlp", "layers", "all", "lora")
TEACHERS = ("frozen", "self", "none")
HARMS = ("layer", "token")
# A token whose loss is one of its kind would outweigh all others; and a harm of nothing has no logarithm.
LARGEST_WEIGHT, SMALLEST_HARM = 30.0, 1e-3
# Routers that learn by choosing: logits of noise on their threshold, and their part of a training's tokens.
ROUTER_TEMPERATURE, CHOICE_SHARE = 0.5, 0.2
# Positions whose logits are in memory at a time: 100 MB each of logits and of their gradient for 49,152 tokens in float32.
LOGIT_ROWS = 512


class LossesInChunks(torch.autograd.Function):
    """
    A weighted sum of losses over rows of hidden states, and the losses themselves, which have no gradient.

    The gradient is taken chunk by chunk on the way forward, so that no more than `LOGIT_ROWS` logits over a whole vocabulary are ever in
    memory and none is computed twice.

    Args:
        losses: function of (rows of `hidden`, rows of what follows it) -> (K,) sums over these rows.
        weights: (K,).
        hidden, others: (N, D) and further tensors of N rows that get no gradient.
        parameters: what `losses` reads besides, and gets a gradient.
    """

    @staticmethod
    def forward(ctx, losses, weights, hidden, *tensors):
        # Parameters are what asks for a gradient: targets never do.
        others = [tensor for tensor in tensors if not tensor.requires_grad]
        ctx.places = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        inputs = [tensor for tensor, needed in zip(tensors, ctx.needs_input_grad[3:]) if needed]
        needs_hidden, total, pieces, sums = 2 in ctx.places, 0.0, [], [torch.zeros_like(each) for each in inputs]
        for chunk, *rest in zip(*(tensor.split(LOGIT_ROWS) for tensor in (hidden, *others))):
            with torch.set_grad_enabled(bool(ctx.places)):
                chunk = chunk.detach().requires_grad_(needs_hidden)
                values = losses(chunk, *rest)
                weighted = values @ weights
            if ctx.places:
                gradients = torch.autograd.grad(weighted, [chunk] * needs_hidden + inputs)
                if needs_hidden:
                    pieces.append(gradients[0])
                for each, gradient in zip(sums, gradients[needs_hidden:]):
                    each += gradient
            total = total + values.detach()
        ctx.save_for_backward(*([torch.cat(pieces)] if needs_hidden else []), *sums)
        ctx.count = 3 + len(tensors)
        ctx.mark_non_differentiable(total)
        return total @ weights, total

    @staticmethod
    def backward(ctx, gradient, _):
        gradients = [None] * ctx.count
        for place, saved in zip(ctx.places, ctx.saved_tensors):
            gradients[place] = gradient * saved
        return tuple(gradients)


@dataclass
class DynaMoETrainingArguments(TrainingArguments):
    r"""
    `TrainingArguments`, and how nested experts are trained. The loss of a batch is

        lm_loss_coef * LM loss + router_loss_coef * router loss + kd_loss_coef * KL(full width || chosen experts)
        + hidden_loss_coef * mean over layers of |h - h_full|^2 / |h_full|^2, h the hidden state that a layer gives,
        + width_loss_coef * (1 / sensitivity - 1) * share of the MLPs' width,

    each summed over real tokens and divided by their number in the whole accumulated batch. The paper's is
    `lm_loss_coef=0.2, router_loss_coef=1, kd_loss_coef=0`.

    The defaults suit routers that know nothing yet: they learn beside the experts. `train_model` fits them on their own instead, and
    half the width is a tenth better for it. With a `Trainer` of one's own:

        fit_routers(model, blocks)
        DynaMoETrainer(model, DynaMoETrainingArguments(OUT, train_parts="layers", route="router", router_loss_coef=0,
                                                       hidden_loss_coef=10, logit_fraction=1), train_dataset=...).train()
        fit_routers(model, blocks, route="router")
        DynaMoETrainer(model, DynaMoETrainingArguments(OUT, train_parts="routers", route="router", router_loss_coef=0,
                                                       width_loss_coef=0.9, logit_fraction=1), train_dataset=...).train()

    > Parameters that control what is trained

    train_parts (`str`, defaults to `"mlp"`):
        `"routers"`, `"mlp"` (routers and MLPs), `"layers"` (all but embeddings and head), `"all"`, or `"lora"` (what the PEFT
        model has made trainable).
    teacher (`str`, defaults to `"frozen"`):
        Whose full width is distilled: `"frozen"`, the model as it was when training began (a second copy in memory
        where MLPs are trained; none with LoRA or routers), `"self"`, the weights of the moment, or `"none"`.

    > Parameters that control the route

    route (`str`, defaults to `"label"`):
        Expert of each token while training: its `"label"`, the `"router"`'s choice, or `"random"`.
    sensitivity_range (`list[float]`, *optional*):
        Each sequence draws its sensitivity from this range, those of a batch one from each of as many equal parts of it.
        Defaults to the model's `config.train_sensitivity`.

    > Parameters that control the losses

    lm_loss_coef, router_loss_coef, kd_loss_coef, hidden_loss_coef (`float`): weights of the losses. The last one keeps two
        hidden states a layer in memory.
    width_loss_coef (`float`, defaults to 0):
        Weight of the price of width, (1 / sensitivity - 1) * the mean share of the MLPs' width that a token takes. Over 0, the routers
        learn from what their choices do to all losses (`TokenRouter.gates`), and the price is what they weigh it against; it
        needs `route="router"` and profile routers. The trap: beside a loss on hidden states they learn to spare those, and
        choose worse than before, so leave that at 0 here.
    logit_fraction (`float`, defaults to 0.25):
        Share of the positions whose logits are computed. Logits over a whole vocabulary are the largest tensor of a
        step; a random quarter of the positions gives an unbiased estimate of the LM and distillation losses.
    router_learning_rate (`float`, defaults to 1e-3): learning rate of the routers, which start from nothing.
    """

    train_parts: str = field(default="mlp", metadata={"help": f"What is trained: {', '.join(TRAINED_PARTS)}."})
    teacher: str = field(default="frozen", metadata={"help": f"Whose full width is distilled: {', '.join(TEACHERS)}."})
    route: str = field(default="label", metadata={"help": "Expert of each token while training: label, router or random."})
    sensitivity_range: list[float] | None = field(default=None, metadata={"help": "Range of the sensitivities drawn."})
    lm_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the LM loss."})
    router_loss_coef: float = field(default=1.0, metadata={"help": "Weight of the router loss."})
    kd_loss_coef: float = field(default=1.0, metadata={"help": "Weight of the distillation loss."})
    hidden_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the distance between hidden states."})
    width_loss_coef: float = field(default=0.0, metadata={"help": "Weight of the price of width: routers learn by choosing."})
    logit_fraction: float = field(default=0.25, metadata={"help": "Share of the positions whose logits are computed."})
    router_learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of the routers."})

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in (("train_parts", TRAINED_PARTS), ("teacher", TEACHERS), ("route", ROUTES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is unknown: found {getattr(self, name)!r}. Choose one of {', '.join(allowed)}.")
        if not 0 < self.logit_fraction <= 1:
            raise ValueError(f"`logit_fraction` must be in (0, 1], found {self.logit_fraction}.")
        check_range(self.sensitivity_range)
        if self.width_loss_coef and self.route != "router":
            raise ValueError(
                f'`width_loss_coef` trains routers by what they choose, so it needs route="router", found {self.route!r}.'
            )
        if self.label_smoothing_factor:
            raise ValueError("`label_smoothing_factor` does not go with the router loss. Leave it at 0.")


def check_range(sensitivity_range: Sequence[float] | None) -> None:
    """Raise `ValueError` unless sensitivities can be drawn from this range; None is the model's own."""
    if sensitivity_range is None:
        return
    low, high = sensitivity_range
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"`sensitivity_range` must rise within 0 and 1, found {low:g} to {high:g}. Give a range such as 0.2 1, or 1 1 "
            "for the full width alone."
        )


class DynaMoETrainer(Trainer):
    """
    `Trainer` for a `DynaMoEForCausalLM`, or a PEFT model around one. Logs, beside the loss: `lm_loss`, `router_loss`,
    `kd_loss`, `hidden_loss`, `width_loss`, `mean_width` (share of MLP width on the trained route), `router_accuracy` (agreement
    of the routers with the labels, where the route or the router loss needs labels) and `share_expert_0` ... (of the tokens, on the trained route).

    Raises:
        ValueError: the model is no DynaMoE model, `train_parts="lora"` without adapters, or `"routers"` without their loss.
    """

    def __init__(self, model=None, args=None, **kwargs):
        core = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(getattr(core, "config", None), "model_type", None) != "dynamoe":
            raise ValueError(
                f"DynaMoETrainer trains DynaMoE models, found {type(core).__name__}. Run `dynamoe convert` first."
            )
        if args.train_parts == "lora" and core is model:
            raise ValueError(
                '`train_parts="lora"` needs adapters: wrap the model with `get_peft_model(model, lora_config())`.'
            )
        if args.train_parts == "routers" and not (args.router_loss_coef or args.width_loss_coef):
            raise ValueError(
                '`train_parts="routers"` needs a router loss, found router_loss_coef=0 and width_loss_coef=0. Give one a weight, such as 1.'
            )
        if args.width_loss_coef and core.config.router_type != "profile":
            raise ValueError(
                f"`width_loss_coef` needs profile routers, found router_type={core.config.router_type!r}. Leave it at 0, or "
                'convert with router_type="profile".'
            )
        self.core = core
        choose_trainable(core, args.train_parts)
        # No other loss reaches routers, and DDP waits for every gradient that was asked for.
        if not (args.router_loss_coef or args.width_loss_coef):
            for name, parameter in model.named_parameters():
                if ".router." in name:
                    parameter.requires_grad_(False)
        self.teacher = None
        if self._distils(args) and args.teacher == "frozen" and args.train_parts in ("mlp", "layers", "all"):
            self.teacher = copy.deepcopy(core).eval().requires_grad_(False)
        self._parts: dict[str, list[torch.Tensor]] = {}
        super().__init__(model=model, args=args, **kwargs)
        self.expert_shares = expert_shares(core).to(self.args.device)
        if self.teacher is not None:
            self.teacher.to(self.args.device)

    def create_optimizer(self, model=None):
        """As the base class, with the routers in a group of their own, at `router_learning_rate`."""
        if self.optimizer is None:
            super().create_optimizer(*([] if model is None else [model]))
            routers = {id(p) for name, p in self.model.named_parameters() if ".router." in name}
            for group in list(self.optimizer.param_groups):
                moved = [p for p in group["params"] if id(p) in routers]
                group["params"] = [p for p in group["params"] if id(p) not in routers]
                if moved:
                    own = {**group, "params": moved, "lr": self.args.router_learning_rate}
                    own.pop("initial_lr", None)
                    self.optimizer.add_param_group(own)
            # An empty group has no step to make, and some schedulers and savers trip over it.
            self.optimizer.param_groups = [group for group in self.optimizer.param_groups if group["params"]]
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args, core = self.args, self.core
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        low, high = args.sensitivity_range or core.config.train_sensitivity
        # One from each of equal parts of the range: a batch of a few sequences sees narrow and wide experts alike.
        count, device = labels.shape[0], labels.device
        sensitivity = low + (high - low) * (torch.randperm(count, device=device) + torch.rand(count, device=device)) / count
        positions = self._sample_positions(labels)
        needs_labels = args.route == "label" or args.router_loss_coef > 0
        choice = {"route": args.route, "temperature": ROUTER_TEMPERATURE if args.width_loss_coef else None}
        with core.routing(**choice, sensitivity=sensitivity, needs_labels=needs_labels, records=[]) as routing:
            hidden, states = self._hidden_states(model, core, inputs)

        mask = loss_mask(labels)
        items = mask.sum() if num_items_in_batch is None else num_items_in_batch
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
            width = torch.stack([record.width.to(device) for record in routing.records]).mean(0)
            width_loss = ((1 / sensitivity - 1)[:, None] * width * mask).sum() / items
        loss = outer_loss + args.router_loss_coef * router_loss + args.hidden_loss_coef * hidden_loss
        loss = loss + args.width_loss_coef * width_loss
        parts = {"lm_loss": lm_loss, "router_loss": router_loss, "kd_loss": kd_loss, "hidden_loss": hidden_loss}
        parts["width_loss"] = width_loss
        self._record(routing.records, sensitivity, mask, **parts)
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    @staticmethod
    def _distils(args):
        # Routers that do not learn by choosing get no gradient through the experts.
        reached = args.train_parts != "routers" or args.width_loss_coef
        return bool(reached and (args.kd_loss_coef or args.hidden_loss_coef)) and args.teacher != "none"

    def _sample_positions(self, labels):
        """Sorted positions, the same for all sequences of a batch: `logits_to_keep` selects along the sequence."""
        length = labels.shape[1] - 1
        count = max(1, math.ceil(self.args.logit_fraction * length))
        return torch.rand(length, device=labels.device).argsort()[:count].sort().values

    def _hidden_states(self, model, core, inputs):
        """
        What the head reads (B, S, D), and what each layer gives, as many, if the loss asks for it.

        By `model`'s own `forward` over no position: wrappers such as DDP must see the call.
        """
        kept = []
        watched = core.model.layers if self.args.hidden_loss_coef and self._distils(self.args) else []
        last = core.model.register_forward_hook(lambda module, args, output: kept.append(output[0]))
        with last, layer_outputs(watched) as states:
            model(**inputs, logits_to_keep=torch.zeros(0, dtype=torch.long, device=inputs["input_ids"].device))
        return kept[0], states

    @torch.no_grad()
    def _full_width_hidden(self, model, inputs):
        """As `_hidden_states`, of the teacher at its full width."""
        lora = self.args.train_parts == "lora" and self.args.teacher == "frozen"
        unwrapped = self.accelerator.unwrap_model(model)
        teacher, core = (unwrapped, self.core) if self.teacher is None else (self.teacher, self.teacher)
        with unwrapped.disable_adapter() if lora else nullcontext(), self.accelerator.autocast():
            teacher.eval()
            with core.routing(force_expert=core.config.expert_count - 1):
                found = self._hidden_states(teacher, core, inputs)
            model.train()
        return found

    def _losses_at(self, hidden, targets, target_hidden, scale):
        """
        The LM loss and KL(full width || chosen experts), each summed over positions and times `scale`: their weighted sum, which
        has a gradient, and both of them. (B, P, D), (B, P), (B, P, D) or None, a scalar -> three scalars.
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
        with self.accelerator.autocast():  # as `_full_width_hidden`: accelerate casts in the model's own `forward` alone
            loss, parts = LossesInChunks.apply(losses, weights, *rows, *head)
        return loss, *(parts * scale)

    @torch.no_grad()
    def _record(self, records, sensitivity, mask, **losses):
        """Keep the parts of the loss and the use of experts as device tensors; `log` is where the host reads them."""
        mask = mask.to(torch.float32)
        expert_LBS = torch.stack([record.expert.to(mask.device) for record in records])
        used_LE = (F.one_hot(expert_LBS, self.expert_shares.shape[1]) * mask[..., None]).sum((1, 2))
        tokens = mask.sum() * len(records)
        metrics = {**losses, "mean_width": (used_LE * self.expert_shares.to(mask.device)).sum() / tokens}
        if records[0].label is not None:
            agreement = 0.0
            for layer, record in zip(self.core.model.layers, records):
                chosen = layer.mlp.router.choose(record.router_logits, sensitivity)
                agreement = agreement + ((chosen == record.label).to(mask.device) * mask).sum()
            metrics["router_accuracy"] = agreement / tokens
        metrics |= {f"share_expert_{index}": count / tokens for index, count in enumerate(used_LE.sum(0))}
        for name, value in metrics.items():
            self._parts.setdefault(name, []).append(value.detach())

    def _save_checkpoint(self, model, trial):
        """As the base class, with its conversion's record and a model card: a run that stops here can be published truthfully."""
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero() and (folder / "config.json").is_file():  # a LoRA checkpoint is an adapter alone
            conversion = Path(self.core.name_or_path) / CONVERSION
            if conversion.is_file():
                shutil.copy(conversion, folder)
            render_card(folder, local_files_only=True).save(folder / "README.md")

    def log(self, logs, start_time=None):
        """Add the averages since the last log. Losses are sums over a whole accumulated batch, so they add up over it."""
        if "loss" in logs and self._parts:
            steps = self.args.gradient_accumulation_steps
            for name, values in self._parts.items():
                mean = self.accelerator.gather(torch.stack(values).mean()).mean().item()
                logs[name] = round(mean * steps if name.endswith("_loss") else mean, 6)
            self._parts.clear()
        super().log(logs, start_time)


@contextmanager
def layer_outputs(layers):
    """The hidden states (B, S, D) that `layers` give in a forward pass inside, one for each layer."""
    states = []
    hooks = [layer.register_forward_hook(lambda module, args, output: states.append(output)) for layer in layers]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def relative_error(states, targets):
    """Mean over layers of |h - t|^2 / |t|^2 of each token: lists of L tensors (B, S, D) -> (B, S), float32."""
    pairs = ((state.float(), target.float()) for state, target in zip(states, targets))
    return torch.stack([(h - t).square().sum(-1) / t.square().sum(-1) for h, t in pairs]).mean(0)


def choose_trainable(model: DynaMoEForCausalLM, parts: str) -> None:
    """Set `requires_grad` of every parameter for one of `TRAINED_PARTS`; lora leaves them as PEFT set them."""
    if parts == "lora":
        return
    outer = {id(p) for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    for name, parameter in model.named_parameters():
        trained = {
            "routers": ".mlp.router." in name,
            "mlp": ".mlp." in name,
            "layers": id(parameter) not in outer,
            "all": True,
        }
        parameter.requires_grad_(trained[parts])


def lora_config(rank: int = 16, alpha: int = 32, **settings):
    """A PEFT `LoraConfig` that fits: adapters on the MLP projections of any supported family, routers trained in full."""
    from peft import LoraConfig

    projections = r".*\.mlp\.(gate_proj|up_proj|gate_up_proj|down_proj|c_fc|c_proj|fc1|fc2|dense_h_to_4h|dense_4h_to_h)"
    settings = {"target_modules": projections, "modules_to_save": ["router"], "task_type": "CAUSAL_LM", **settings}
    return LoraConfig(r=rank, lora_alpha=alpha, **settings)


def fit_routers(
    model: DynaMoEForCausalLM,
    blocks: torch.Tensor,
    steps: int = 800,
    batch_size: int = 512,
    learning_rate: float = 2e-2,
    cache_bytes: int = 3 * 2**30,
    seed: int = 0,
    harm: str | None = None,
    route: str = "label",
    sensitivity_range: Sequence[float] | None = None,
    bf16: bool = False,
) -> dict:
    """
    Fit every router anew to the difficulty of tokens, layer by layer, on cached inputs: nothing else of the model is run
    again, so hundreds of steps cost less than a few of full training. Tokens follow their labels while they are collected,
    at sensitivities drawn as in training, since narrow experts in early layers change what later routers read.

    Args:
        blocks: token ids (N, S); the last tenth is not fitted to, and measures the agreement.
        steps, batch_size, learning_rate: of each router, AdamW with a one-cycle schedule.
        cache_bytes: inputs cached at a time, as 16-bit numbers; more layers than fit take further passes over the text.
        harm: what an error costs: as much for every token of a `"layer"`, as in the labels, or for each `"token"` by the squared
            gradient of the loss at its own MLP output, which takes a backward pass. A router cannot know a token's gradient, but
            learns what to expect of it. Needs a profile router and a similarity weighted by the loss, and is the default there.
        route: `"router"` lets tokens follow the routers as they are while inputs are collected.
        sensitivity_range: each sequence draws its sensitivity from it; by default from `config.train_sensitivity`.
        bf16: collect under autocast.

    Returns:
        `tokens`, `router_agreement` with the labels on the tokens held out, and `label_frequency`, that of the commonest label.

    Raises:
        ValueError: an unknown `harm`, or one that the model's similarity or router type does not have; a range that does not rise.
    """
    harm = checked_harm(model.config, harm)
    check_range(sensitivity_range)
    span = sensitivity_range or model.config.train_sensitivity
    torch.manual_seed(seed)
    model.eval()
    layers = model.model.layers
    held_out = max(1, blocks.numel() // 10)
    a_layer = blocks.numel() * model.config.hidden_size * 2
    group = max(1, cache_bytes // a_layer)
    agreement, commonest = [], []
    progress = tqdm(total=len(layers), desc="Fitting routers", leave=False)
    for start in range(0, len(layers), group):
        part = layers[start : start + group]
        inputs, profiles, weights, thetas = _collect(model, start, len(part), blocks, harm, route, span, bf16)
        for layer, x, profile, weight in zip(part, inputs, profiles, weights):
            router = layer.mlp.router
            fit_router(
                router, x[:-held_out], profile[:-held_out], thetas[:-held_out], steps, batch_size, learning_rate,
                None if weight is None else weight[:-held_out],
            )  # fmt: skip
            with torch.no_grad():
                label = label_of(profile[-held_out:], thetas[-held_out:])
                logits = router(x[-held_out:].to(router.input.weight.dtype))
                chosen = router.choose(logits[:, None], thetas[-held_out:])[:, 0]
            agreement.append((chosen == label).float().mean().item())
            commonest.append(label.bincount().max().item() / label.numel())
            progress.update()
    progress.close()
    return {
        "tokens": blocks.numel(),
        "harm": harm,
        "router_agreement": round(sum(agreement) / len(agreement), 4),
        "label_frequency": round(sum(commonest) / len(commonest), 4),
    }


def checked_harm(config, harm: str | None) -> str:
    """The `harm` that routers of a model with this config are fitted to (see `fit_routers`). Raises `ValueError` where they cannot be."""
    knows_tokens = config.router_type == "profile" and config.similarity.startswith("loss_")
    if harm is None:
        return "token" if knows_tokens else "layer"
    if harm not in HARMS:
        raise ValueError(f"`harm` is unknown: found {harm!r}. Choose one of {', '.join(HARMS)}.")
    if harm == "token" and not knows_tokens:
        raise ValueError(
            f'harm="token" needs a profile router and a similarity weighted by the loss, found {config.router_type!r} and '
            f'{config.similarity!r}. Convert with similarity loss_weighted or loss_gain, or leave harm at "layer".'
        )
    return harm


def checked_choice(config, choice_share: float | None, router_tokens: int) -> float:
    """The `choice_share` that a training has (see `train_model`). Raises `ValueError` where it cannot have it."""
    if choice_share is None:
        return CHOICE_SHARE if config.router_type == "profile" and router_tokens else 0.0
    if not 0 <= choice_share <= 1:
        raise ValueError(f"`choice_share` must be in [0, 1], found {choice_share}.")
    if choice_share and config.router_type != "profile":
        raise ValueError(
            f"`choice_share` needs profile routers, found router_type={config.router_type!r}. Leave it at 0, or convert with "
            'router_type="profile".'
        )
    return float(choice_share)


def _collect(model, start, count, blocks, harm, route, span, bf16):
    """
    Router inputs (T, D), profiles (T, E), and with harm="token" weights (T,) of mean 1, else None, of each of `count` layers from
    `start`; and the sensitivity of each token (T,).
    """
    layers = range(start, start + count)
    inputs, profiles, squares, thetas = {i: [] for i in layers}, {i: [] for i in layers}, {i: [] for i in layers}, []
    hooks = [
        model.model.layers[index].mlp.router.register_forward_pre_hook(
            lambda module, args, kept=inputs[index]: kept.append(args[0].detach().flatten(0, 1).to(torch.bfloat16))
        )
        for index in layers
    ]
    low, high = span

    def see(index, gradient):
        if index in squares:
            squares[index].append(gradient.float().square().sum(-1).flatten())

    try:
        with (
            gradients_of_activations(model) if harm == "token" else torch.no_grad(),
            output_gradients(model.nested_mlps if harm == "token" else [], see),
        ):
            for batch in tqdm(blocks.split(4), desc="Collecting router inputs", leave=False):
                batch = batch.to(model.device)
                sensitivity = low + (high - low) * torch.rand(len(batch), device=batch.device)
                with (
                    model.routing(route=route, sensitivity=sensitivity, needs_labels=True, records=[]) as routing,
                    torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16),
                ):
                    if harm == "token":
                        logits = model(batch, use_cache=False).logits[:, :-1].float()
                        F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").backward()
                    else:
                        model.model(batch, use_cache=False)
                thetas.append(sensitivity.repeat_interleave(batch.shape[1]))
                for index in layers:
                    profiles[index].append(routing.records[index].profile.flatten(0, 1))
    finally:
        for hook in hooks:
            hook.remove()
    weights = [torch.cat(kept) if kept else None for kept in squares.values()]
    weights = [None if weight is None else weight / weight.mean() for weight in weights]
    return (
        [torch.cat(kept) for kept in inputs.values()],
        [torch.cat(kept) for kept in profiles.values()],
        weights,
        torch.cat(thetas),
    )


def fit_router(router, x, profile, thetas, steps, batch_size, learning_rate, weights=None):
    """
    Train one router from nothing, its first layer scaled to the size of what it reads.

    With `weights` (T,), what an error costs each token beside the mean of its layer: the router then predicts the mean of the harm,
    weight * (1 / s_e - 1), as exp(-logit), by the likelihood of a gamma distribution: harm varies over orders of magnitude, and the mean is
    what a budget should be spent by.
    """
    dtype = router.input.weight.dtype
    router.float().requires_grad_()
    with torch.no_grad():
        router.reset()
        router.input.weight /= x[:4096].float().square().mean().sqrt().clamp_min(1e-6)
    optimizer = torch.optim.AdamW(router.parameters(), lr=learning_rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    label = label_of(profile, thetas)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch_size,), device=x.device)
        logits = router(x[rows].float())
        if weights is None:
            loss = router.loss(logits, profile[rows], label[rows]).mean()
        else:
            harm = (1 / profile[rows, :-1].clamp_min(1e-6) - 1) * weights[rows, None].clamp_max(LARGEST_WEIGHT)
            loss = ((harm + SMALLEST_HARM) * logits.clamp(max=12).exp() - logits).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    router.zero_grad()
    router.to(dtype)


class _Progress(ProgressCallback):
    """A bar that carries the numbers to watch, where the base class prints a dictionary at every log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in logs:
            names = ("loss", "kd_loss", "hidden_loss", "router_loss", "width_loss", "mean_width")
            # 0 is a loss that this training does not have.
            self.training_bar.set_postfix({name: f"{logs[name]:.3f}" for name in names if logs.get(name)})


class _Clock(TrainerCallback):
    """Keeps beside the checkpoints how long a run has taken: what is resumed from one has a history."""

    def __init__(self, path, started):
        self.path, self.started = path, started

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_json(self.path, {"seconds": time.monotonic() - self.started})


class _Blocks(Dataset):
    """Token blocks (N, S) as the Trainer reads them, from one on, repeated so that one epoch is the whole training."""

    def __init__(self, blocks, start, count):
        self.blocks, self.start, self.count = blocks, start, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        # Each pass over the text comes in another order, the same in every run.
        rounds, place = divmod(self.start + index, len(self.blocks))
        order = torch.randperm(len(self.blocks), generator=torch.Generator().manual_seed(rounds))
        block = self.blocks[order[place]]
        return {"input_ids": block, "labels": block}


class _StreamedBlocks(IterableDataset):
    """Blocks of a streamed dataset, from one on, of which only one batch is ever in memory."""

    def __init__(self, documents, tokenizer, block_size, start):
        self.documents, self.tokenizer, self.block_size, self.start = documents, tokenizer, block_size, start

    def __iter__(self):
        for block in islice(iterate_blocks(self.documents(), self.tokenizer, self.block_size), self.start, None):
            block = torch.tensor(block)
            yield {"input_ids": block, "labels": block}


def train_model(
    folder: str | Path,
    out: str | Path,
    text: str | Sequence[str] | None = None,
    dataset: str | None = None,
    column: str = "text",
    max_tokens: int = 100_000,
    train: str = "layers",
    route: str = "router",
    teacher: str = "frozen",
    sensitivity_range: Sequence[float] | None = None,
    resume: bool = False,
    block_size: int = 256,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 2e-4,
    router_learning_rate: float = 1e-3,
    lm_loss_coef: float = 0.0,
    router_loss_coef: float = 0.0,
    kd_loss_coef: float = 1.0,
    hidden_loss_coef: float = 10.0,
    logit_fraction: float = 1.0,
    router_tokens: int = 65536,
    harm: str | None = None,
    choice_share: float | None = None,
    width_loss_coef: float = 0.9,
    lora_rank: int = 16,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    save_steps: int = 50,
    seed: int = 0,
) -> dict:
    """
    Train a DynaMoE folder and write the result as another one.

    Checkpoints lie in `OUT.checkpoints` while training goes on; each is a model folder of its own. An interrupted run
    goes on with `resume=True`. With `train="lora"` the adapters are merged into the weights that are written.

    The defaults are the recipe of docs/results.md: routers are fitted first and hold still, layers learn on their routes what the
    full width of the model as it was says and holds in its hidden states, routers are fitted anew, and at the end they alone
    learn by choosing: from what leaving neurons out does to what the model says, against the price of width.

    Args:
        folder, out: model folder to read, and to write.
        text: text files; by default the training split of Python's own documentation topics.
        dataset, column: or a dataset id (streamed) and the name of its text column.
        max_tokens: tokens to train on; shorter texts are repeated.
        train: what is trained: routers, mlp (routers and MLPs), layers (all but embeddings and head), all, or lora.
        route, teacher, sensitivity_range, ..._coef, logit_fraction: see `DynaMoETrainingArguments`. A range of (1, 1) trains the full
            width alone, as one does with a dense model.
        router_tokens: after the training, routers are fitted anew on the first so many of its tokens at most (`fit_routers`), and
            with `route="router"` before it too; 0 leaves them as the training made them. With `train="routers"` the fit, on
            all `max_tokens`, is the whole training.
        harm: what an error costs when routers are fitted, as `fit_routers` says: the same in a `"layer"`, or by `"token"`; by
            default by token where the model's similarity and routers know it.
        choice_share: share of `max_tokens`, at the end, on which routers learn by choosing, from KL(full width || chosen experts) and
            the price of width alone; by default a fifth where the routers have a profile and are fitted, else nothing.
        width_loss_coef: weight of the price of width then, see `DynaMoETrainingArguments`. A higher one moves the dial: the same
            sensitivity gives narrower experts, and `calibrate` finds the new marks.
        save_steps: steps between checkpoints.

    Returns:
        The training record, also written to `training.json`: settings, tokens, the logged history, and without theirs the records
        of the `earlier` trainings that `folder` had behind it. `seconds` are those of all parts of a resumed run.

    Raises:
        ValueError: no DynaMoE folder, unknown setting, too little text, or an unfinished run without `resume`.
        FileExistsError: `out` exists.
    """
    refuse_existing(out)
    work = Path(f"{out}.checkpoints")
    choice_work = work / "choice"
    last, last_choice = (get_last_checkpoint(path) if path.is_dir() else None for path in (work, choice_work))
    if (last or last_choice) and not resume:
        raise ValueError(f"{work} holds an unfinished run. Go on with it (`--resume`), or delete it to begin anew.")
    if not (last or last_choice) and resume:
        raise ValueError(f"There is nothing to resume: {work} holds no checkpoint. Leave out `--resume`.")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    harm = checked_harm(model.config, harm)  # before hours of training, not after them
    choice_share = checked_choice(model.config, choice_share, router_tokens)
    check_range(sensitivity_range)
    longest = getattr(model.config, "max_position_embeddings", None)
    block_size = min(block_size, longest) if longest else block_size
    blocks_a_step = batch_size * gradient_accumulation_steps
    tokens_a_step = block_size * blocks_a_step
    steps = max(1, max_tokens // tokens_a_step)
    choice_steps = round(choice_share * steps)
    expert_steps = 0 if train == "routers" else steps - choice_steps

    def fit_blocks(tokens):
        return token_blocks(documents_for("training", text, dataset, column), tokenizer, block_size, tokens)

    distinct = None if dataset is not None else fit_blocks(max_tokens)
    fit_options = {"seed": seed, "harm": harm, "sensitivity_range": sensitivity_range, "bf16": bf16}
    clock = work / "clock.json"
    started = time.monotonic() - (read_json(clock) or {"seconds": 0.0})["seconds"]

    def run(model, folder, first, steps, resume_from, **settings):
        """Train for `steps` on the text from step `first` on: what was logged, and how many steps the text gave."""
        if dataset is not None:
            blocks = _StreamedBlocks(
                lambda: documents_for("training", text, dataset, column), tokenizer, block_size, first * blocks_a_step
            )
        else:
            blocks = _Blocks(distinct, first * blocks_a_step, steps * blocks_a_step)
        args = DynaMoETrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps, adam_beta2=0.95,
            warmup_steps=min(10, steps // 10), lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.05},
            bf16=bf16, use_cpu=not torch.accelerator.is_available(), save_steps=save_steps, save_total_limit=2,
            **({"gradient_checkpointing": True} if gradient_checkpointing else {}),
            logging_steps=max(1, min(10, steps // 10)), report_to="none", seed=seed,
            sensitivity_range=sensitivity_range, logit_fraction=logit_fraction,
            router_learning_rate=router_learning_rate, remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(), accelerator_config={"dispatch_batches": False}, **settings,
        )  # fmt: skip
        # Blocks are of one length, so nothing is padded: many tokenizers have no padding token.
        trainer = DynaMoETrainer(
            model=model, args=args, train_dataset=blocks, processing_class=tokenizer, data_collator=default_data_collator
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(_Progress)
        trainer.add_callback(_Clock(clock, started))
        trainer.train(resume_from_checkpoint=resume_from)
        logged = [{**entry, "step": first + entry["step"]} for entry in trainer.state.log_history if "loss" in entry]
        return logged, trainer.state.global_step

    before_choice = {"history": [], "steps": 0, "fit": None}
    router_tokens = max_tokens if train == "routers" else min(router_tokens, max_tokens)
    if last_choice:
        before_choice = read_json(choice_work / "before.json")
    else:
        if expert_steps:
            if route == "router" and router_tokens and last is None:
                fit_routers(model, fit_blocks(router_tokens), **fit_options)
            if train == "lora":
                from peft import get_peft_model

                model = get_peft_model(model, lora_config(lora_rank, 2 * lora_rank))
            before_choice["history"], before_choice["steps"] = run(
                model, work, 0, expert_steps, last, learning_rate=learning_rate, train_parts=train, route=route,
                teacher=teacher, lm_loss_coef=lm_loss_coef, router_loss_coef=router_loss_coef, kd_loss_coef=kd_loss_coef,
                hidden_loss_coef=hidden_loss_coef,
            )  # fmt: skip
            model = model.merge_and_unload() if train == "lora" else model
        model.requires_grad_(True)
        if router_tokens:
            own_route = "router" if route == "router" and expert_steps else "label"
            before_choice["fit"] = fit_routers(model, fit_blocks(router_tokens), route=own_route, **fit_options)
    history, steps_done, fit = before_choice["history"], before_choice["steps"], before_choice["fit"]
    if choice_steps:
        choice_work.mkdir(parents=True, exist_ok=True)
        write_json(choice_work / "before.json", before_choice)
        logged, done = run(
            model, choice_work, steps_done, choice_steps, last_choice, train_parts="routers", route="router",
            router_loss_coef=0.0, width_loss_coef=width_loss_coef,
        )  # fmt: skip
        history, steps_done = history + logged, steps_done + done
        model.requires_grad_(True)
    before = read_json(Path(folder) / TRAINING)
    earlier = [] if before is None else [*before.pop("earlier", []), {k: v for k, v in before.items() if k != "history"}]
    record = {
        "from": Path(folder).name,
        "text": dataset or text_names(text),
        "tokens": steps_done * tokens_a_step,
        "distinct_tokens": None if distinct is None else distinct.numel(),
        "steps": steps_done,
        "router_fit": fit,
        "seconds": round(time.monotonic() - started, 1),
        "settings": {
            "train": train, "route": route, "teacher": teacher,
            "sensitivity_range": None if sensitivity_range is None else list(sensitivity_range),
            "block_size": block_size, "batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps, "learning_rate": learning_rate,
            "router_learning_rate": router_learning_rate, "lm_loss_coef": lm_loss_coef, "kd_loss_coef": kd_loss_coef,
            "hidden_loss_coef": hidden_loss_coef, "router_loss_coef": router_loss_coef, "logit_fraction": logit_fraction,
            "router_tokens": router_tokens, "harm": harm, "choice_share": choice_share,
            "width_loss_coef": width_loss_coef if choice_steps else None, "lora_rank": lora_rank if train == "lora" else None,
            "bf16": bf16, "seed": seed,
        },
        "earlier": earlier,
        "history": history,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
    with new_folder(out) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        carry_records(folder, target)
        write_json(target / TRAINING, record)
        render_card(target, local_files_only=True, name=Path(out).name).save(target / "README.md")
    shutil.rmtree(work, ignore_errors=True)
    return record


def adapt_model(
    folder: str | Path,
    out: str | Path,
    text: str | Sequence[str] | None = None,
    dataset: str | None = None,
    column: str = "text",
    max_tokens: int = 65_536,
    resume: bool = False,
    block_size: int = 256,
    batch_size: int = 4,
    gradient_accumulation_steps: int = 1,
    learning_rate: float = 6e-5,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    save_steps: int = 50,
    seed: int = 0,
) -> dict:
    """
    Let the full width learn a text as a dense model would, gently, before routers and experts learn from it with `train_model`.

    For text that the base does not know: experts trained with an LM loss of their own would pull the full width away from
    everything else. Without this stage the full width stays what the base says. Arguments, result and errors are those of `train_model`.
    """
    return _train_model(
        folder, out, text, dataset, column, max_tokens, resume=resume, block_size=block_size, batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps, learning_rate=learning_rate, bf16=bf16,
        gradient_checkpointing=gradient_checkpointing, save_steps=save_steps, seed=seed,
        sensitivity_range=(1, 1), teacher="none", lm_loss_coef=1.0, kd_loss_coef=0.0, hidden_loss_coef=0.0, router_tokens=0,
        choice_share=0.0,
    )  # fmt: skip


# Stand-in until the stages of this file take their arguments themselves; dropped at the merge.
_train_model, _adapt_model = train_model, adapt_model


def _by_name(kind, arguments, settings):
    settings = {{"train": "train_parts"}.get(name, name): value for name, value in settings.items()}
    return vars(resolve(kind, arguments, settings))


def train_model(folder: str | Path, out: str | Path, arguments: TrainArguments | None = None, **settings: Any) -> dict:
    """`_train_model` with its settings as one object or by name."""
    values = dict(_by_name(TrainArguments, arguments, settings))
    return _train_model(folder, out, train=values.pop("train_parts"), **values)


def adapt_model(folder: str | Path, out: str | Path, arguments: AdaptArguments | None = None, **settings: Any) -> dict:
    """`_adapt_model` with its settings as one object or by name."""
    return _adapt_model(folder, out, **_by_name(AdaptArguments, arguments, settings))
