# SPDX-License-Identifier: Apache-2.0
"""
TRL's SFTTrainer on chats: experts and routers learn to answer, then the dial is calibrated and measured on other questions.

    make demo && pip install trl && python examples/sft_chat.py      # runs/demo/trained -> runs/chat, 5 minutes on one core

The chats ask what functions of Python's standard library do, and its own docstrings answer; the modules asked about at the end
are others than those trained on. Prints the parts of the loss and the share of MLP width while training, then the loss of the
answers before and after, at each calibrated budget, with the share of the MLPs' weights that chats took there.

Prompts are masked (label -100), and the mask holds for every loss: routers learn from the tokens that answers are predicted
from, and from no others. Prompts are routed all the same, by what the routers knew before.
"""

import argparse
import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from dynamoe_hf import DynaMoETrainer, DynaMoETrainingArguments, calibrate_budgets
from dynamoe_hf.data import token_blocks
from dynamoe_hf.evaluate import routed_nll
from dynamoe_hf.folder import refuse_existing


TRAINING = ["os", "os.path", "shutil", "random", "statistics", "functools", "math", "time", "inspect", "ast"]
CALIBRATION = ["asyncio", "locale", "sys", "tempfile", "threading", "unicodedata"]
HELD_OUT = ["calendar", "copy", "fnmatch", "glob", "heapq", "json", "struct", "textwrap", "warnings"]


@dataclass
class ChatArguments(DynaMoETrainingArguments, SFTConfig):
    """How experts are trained, and how chats are read."""


class ChatTrainer(DynaMoETrainer, SFTTrainer):
    """
    TRL's reading of chats, the losses of `DynaMoETrainer`. `SFTTrainer` alone would train experts and leave the routers as they
    are: it runs the backbone past the model's `forward` and makes an LM loss of what that returns.
    """


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/demo/trained", help="calibrated model folder (%(default)s)")
    parser.add_argument("out", nargs="?", default="runs/chat", help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of eight chats each (%(default)s)")
    args = parser.parse_args()
    refuse_existing(args.out)
    set_seed(0)

    model = AutoModelForCausalLM.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    budgets = [*map(float, model.config.budgets), 1.0]
    # Of your own: datasets.load_dataset("json", data_files="chats.jsonl", split="train"), rows as `chats` makes them.
    training, calibration, held_out = map(chats, (TRAINING, CALIBRATION, HELD_OUT))
    trainer = ChatTrainer(
        model=model,
        args=ChatArguments(
            output_dir=args.out, save_strategy="no", max_steps=args.steps, per_device_train_batch_size=8, max_length=256,
            learning_rate=5e-5, warmup_steps=2, logging_steps=5, dataloader_pin_memory=torch.cuda.is_available(),
            # The LM loss and no teacher, to learn what the full width does not know yet; routers learn beside the MLPs.
            train_parts="mlp", lm_loss_coef=1.0, teacher="none", route="label", router_loss_coef=1.0,
            # TRL's defaults are for GPUs: bfloat16, and activations computed twice to save memory.
            bf16=False, activation_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(training),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer,
    )  # fmt: skip
    blocks = token_blocks(rendered(held_out, tokenizer), tokenizer, 256, 1024)
    before = [measure(trainer, blocks, budget) for budget in budgets]
    trainer.train()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)

    # Experts and routers have changed, so the marks on the dial must be found anew, on text like that they are meant for.
    text = Path(args.out) / "calibration.txt"
    text.write_text("\f".join(rendered(calibration, tokenizer)), encoding="utf-8")
    found = calibrate_budgets(args.out, budgets=budgets[:-1], text=text, max_tokens=2048, block_size=256)["budgets"]
    model.config.budgets = {budget: entry["sensitivity"] for budget, entry in found.items()}
    print(f"Answers to {len(held_out)} questions about other modules:")
    print("| budget | loss before | at share | after | at share |\n|---|---|---|---|---|")
    for budget, old in zip(budgets, before):
        new = measure(trainer, blocks, budget)
        print(f"| {budget:.0%} | {old[0]:.3f} | {old[1]:.1%} | {new[0]:.3f} | {new[1]:.1%} |")


def chats(modules):
    """Questions about the public functions of modules, in TRL's prompt-completion form: both are lists of messages."""
    rows = []
    for module in modules:
        for name, function in inspect.getmembers(importlib.import_module(module), inspect.isroutine):
            answer = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
            if not name.startswith("_") and len(answer) > 40:
                prompt = [{"role": "user", "content": f"What does {module}.{name} do in Python?"}]
                rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]})
    return rows


def rendered(rows, tokenizer):
    """Whole chats as text."""
    return [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]


def measure(trainer, blocks, budget):
    """Mean loss of the answers' tokens at a budget, and the mean share of the MLPs' weights that chats (N, S) took."""
    model = trainer.model
    model.set_budget(budget)
    loss = trainer.evaluate()["eval_loss"]
    share = routed_nll(model, blocks, sensitivity=model.config.sensitivity).share
    return loss, share


if __name__ == "__main__":
    main()
