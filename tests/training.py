"""Tiny models, examples and one training run: what the tests of training share."""

import torch
from conftest import tiny_dense
from transformers import TrainingArguments

from dynamoe_hf import DynaMoEForCausalLM, DynaMoETrainer, DynaMoETrainingArguments


# Experts on the routes of the labels, with routers that learn the labels beside them: nothing has to be fitted before.
LABELS = {"train_parts": "mlp", "route": "label", "router_loss_coef": 1.0, "hidden_loss_coef": 0.0, "logit_fraction": 0.25}


def tiny_model(**settings):
    return DynaMoEForCausalLM.from_dense(tiny_dense(), error_weights=[0.05, 0.02], **settings)


def rows(count=8, length=16, seed=0, ignored=True):
    """Training examples of which some positions do not count, differently in each."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        ids = torch.randint(3, 128, (length,), generator=generator)
        labels = ids.clone()
        if ignored:
            labels[: index % 5] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return examples


def train(model, folder, trainer_class=DynaMoETrainer, examples=None, data_collator=None, **settings):
    """The trainer after its run: with `DynaMoETrainer` as `LABELS` say, but for `settings`."""
    ours = trainer_class is DynaMoETrainer
    defaults = {"max_steps": 1, "per_device_train_batch_size": 8, "report_to": "none", "save_strategy": "no",
                "logging_steps": 1, "learning_rate": 1e-3, "disable_tqdm": True, "use_cpu": True}  # fmt: skip
    settings = {**defaults, **(LABELS if ours else {}), **settings}
    args = (DynaMoETrainingArguments if ours else TrainingArguments)(output_dir=str(folder), **settings)
    trainer = trainer_class(model=model, args=args, train_dataset=examples or rows(), data_collator=data_collator)
    trainer.train()
    return trainer
