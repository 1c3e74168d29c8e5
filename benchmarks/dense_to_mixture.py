# SPDX-License-Identifier: Apache-2.0
"""
A mixture made of a dense Llama-style model, for `mixtures.py`: every MLP is cut into a shared expert and eight routed ones, of which a
token takes some. As it is made, with all eight active, it equals the dense model; then its routers are fitted, and it learns from the
dense model with fewer.

Shapes: T tokens, D hidden size, H neurons of a dense MLP, N routed experts of I neurons each.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rivals import balanced_clusters
from torch import nn
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, Trainer, TrainingArguments

from dynamoe_hf.losses import layer_outputs, relative_error


EXPERTS = 8
ACTIVE = 10  # neurons that count as active for a token
MASSIVE = 16  # neurons of the largest single effects, without which a model breaks down (massive activations)
SPREAD = (
    0.1  # standard deviation of the fitted routers' logits: which experts are chosen, and weights that stay near those of all
)
RIDGE = 1e-3  # of the mean square of what routers read


def expert_size(neurons: int) -> int:
    """Neurons of each routed expert, a multiple of 4: together about eleven twelfths of the MLP. The others are shared."""
    return neurons * 11 // 12 // EXPERTS // 4 * 4


def empty_mixture(dense: LlamaForCausalLM) -> Qwen2MoeForCausalLM:
    """A mixture with the weights of `dense` outside of its MLPs. Raises `ValueError` where the family has no place for something."""
    old, names = dense.config, ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
                                "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "pad_token_id", "bos_token_id",
                                "eos_token_id", "dtype")  # fmt: skip
    size = expert_size(old.intermediate_size)
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in names}, qkv_bias=False, num_experts=EXPERTS, num_experts_per_tok=EXPERTS,
        moe_intermediate_size=size, shared_expert_intermediate_size=old.intermediate_size - EXPERTS * size, norm_topk_prob=False,
    )  # fmt: skip
    mixture = Qwen2MoeForCausalLM(config).to(dense.dtype).eval()
    weights = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    found = mixture.load_state_dict(weights, strict=False)
    if found.unexpected_keys or any(".mlp." not in name for name in found.missing_keys):
        raise ValueError(
            f"The base cannot be held by {type(mixture).__name__}: found {found.unexpected_keys} too many, and "
            f"{[name for name in found.missing_keys if '.mlp.' not in name]} missing. Give a Llama without biases, such as SmolLM2-135M."
        )
    return mixture


@torch.no_grad()
def seen_by_mlps(dense: Any, blocks: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each MLP reads and what its neurons do, on token ids (N, S): (T, D) and (T, H)."""
    kept: list = [([], []) for _ in dense.model.layers]
    hooks = []
    for layer, lists in zip(dense.model.layers, kept):
        for module, each in zip((layer.mlp, layer.mlp.down_proj), lists):
            hooks.append(
                module.register_forward_pre_hook(lambda _, args, each=each: each.append(args[0].flatten(0, 1).float()))
            )
    for block in blocks:
        dense.model(block[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return [(torch.cat(x), torch.cat(hidden)) for x, hidden in kept]


@torch.no_grad()
def make_mixture(dense: Any, blocks: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
    """
    The mixture, all experts active for each token, and the routers (N, D) that are fitted to its layers, for `activate`. Neurons that
    are active most often are shared, the others clustered by when they are active.
    """
    mixture, routers = empty_mixture(dense), []
    layers = zip(dense.model.layers, mixture.model.layers, seen_by_mlps(dense, blocks))
    for old, new, (x_TD, hidden_TH) in tqdm(layers, desc="Cutting MLPs", total=len(dense.model.layers), leave=False):
        down_DH = old.mlp.down_proj.weight.float()
        effect_TH = hidden_TH.abs() * down_DH.norm(dim=0)
        active_TH = torch.zeros_like(effect_TH).scatter_(1, effect_TH.topk(ACTIVE, dim=1).indices, 1)
        size = expert_size(down_DH.shape[1])
        score_H = active_TH.mean(0)
        score_H[effect_TH.amax(0).topk(MASSIVE).indices] = torch.inf
        order = score_H.argsort(descending=True, stable=True)
        shared, rest = order[: -EXPERTS * size], order[-EXPERTS * size :]
        members_NI = rest[balanced_clusters(active_TH[:, rest].t(), EXPERTS)[0]]
        fill_block(new.mlp, old.mlp, shared, members_NI)
        size_TN = torch.stack([(hidden_TH[:, rows] @ down_DH[:, rows].t()).norm(dim=1) for rows in members_NI], 1)
        routers.append(fitted_router(x_TD, size_TN))
    return mixture, routers


def fill_block(block: Any, mlp: Any, shared: torch.Tensor, members_NI: torch.Tensor) -> None:
    """Neurons of an MLP as a shared and routed experts, so that the block without a router is the MLP."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    block.experts.gate_up_proj.copy_(torch.cat([gate[members_NI], up[members_NI]], 1))
    block.experts.down_proj.copy_(down.t()[members_NI].transpose(1, 2) * EXPERTS)  # each weighs 1 / EXPERTS
    block.shared_expert.gate_proj.weight.copy_(gate[shared])
    block.shared_expert.up_proj.weight.copy_(up[shared])
    block.shared_expert.down_proj.weight.copy_(down[:, shared] * 2)  # the gate of the shared expert is sigmoid(0)
    block.shared_expert_gate.weight.zero_()
    block.gate.weight.zero_()


def fitted_router(x_TD: torch.Tensor, size_TN: torch.Tensor) -> torch.Tensor:
    """The weight of a router whose logits rise with the size of an expert's output beside that of the others, by ridge regression."""
    target_TN = size_TN / size_TN.mean(1, keepdim=True).clamp_min(1e-12) - 1
    x, target = x_TD.double(), target_TN.double()
    square = x.t() @ x
    square.diagonal().add_(RIDGE * square.diagonal().mean())
    weight = torch.linalg.solve(square, x.t() @ target)
    return (weight * SPREAD / (x @ weight).std().clamp_min(1e-12)).t().float()


@torch.no_grad()
def activate(mixture: Any, routers: list[torch.Tensor], per_token: int) -> None:
    """Let fitted routers choose `per_token` experts."""
    mixture.config.num_experts_per_tok = per_token
    for layer, weight in zip(mixture.model.layers, routers):
        layer.mlp.gate.top_k = per_token
        layer.mlp.gate.weight.copy_(weight)


class Distillation(Trainer):
    """KL(dense || mixture) over the vocabulary, and the error of the hidden states after each layer."""

    def __init__(self, *args, teacher: nn.Module, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher: Any = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The trap: accelerate casts inside the trained model's `forward` alone.
        with torch.no_grad(), self.accelerator.autocast(), layer_outputs(self.teacher.model.layers) as targets:
            target = self.teacher(**inputs, use_cache=False).logits
        with layer_outputs(model.model.layers) as states:
            outputs = model(**inputs, use_cache=False)
        logs, wanted = (logits.float().log_softmax(-1).flatten(0, 1) for logits in (outputs.logits, target))
        loss = F.kl_div(logs, wanted, log_target=True, reduction="batchmean") + relative_error(states, targets).mean()
        return (loss, outputs) if return_outputs else loss


def distil(mixture: Any, dense: Any, blocks: torch.Tensor, out: Path, **settings: Any) -> float:
    """
    Train the experts and routers of a mixture on token ids (N, S) once, with these `settings` of `TrainingArguments`, and return the mean
    loss of the last tenth of the steps.
    """
    for name, parameter in mixture.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    arguments = TrainingArguments(
        output_dir=str(out), num_train_epochs=1, lr_scheduler_type="cosine", warmup_steps=0.05, logging_steps=1, report_to="none",
        save_strategy="no", seed=0, use_cpu=not torch.cuda.is_available(), **settings,
    )  # fmt: skip
    trainer = Distillation(mixture, arguments, train_dataset=[{"input_ids": row} for row in blocks], teacher=dense)
    trainer.train()
    mixture.cpu(), dense.cpu()  # a GPU trains, and nothing else here
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    mixture.requires_grad_(True).eval()
    return sum(losses[-max(1, len(losses) // 10) :]) / max(1, len(losses) // 10)
