# SPDX-License-Identifier: Apache-2.0
"""
LoRA with PEFT: fine-tune a model folder to Python source code, adapters on the experts, then the routers in full; merge, save, reload.

    make demo && python examples/lora.py            # runs/demo/trained -> runs/lora, 9 minutes on one core
    python examples/lora.py FOLDER OUT --steps 100

Prints what is trained and what that saves, then perplexity on source files that were not trained on, before and after, at
each calibrated budget, with the share of the MLPs' weights that it took there: marks calibrated on prose are off on code, and the
new ones hold. `dynamoe train FOLDER OUT --train lora` trains the same in one command, with records for the model card.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from dynamoe_hf import DynaMoETrainer, DynaMoETrainingArguments, calibrate_budgets, fit_routers, lora_config
from dynamoe_hf.data import read_documents, token_blocks
from dynamoe_hf.evaluate import routed_nll
from dynamoe_hf.folder import refuse_existing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default="runs/demo/trained", help="calibrated model folder (%(default)s)")
    parser.add_argument("out", nargs="?", default="runs/lora", help="folder to write (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of 1,024 tokens each (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (%(default)s)")
    args = parser.parse_args()
    refuse_existing(args.out)
    set_seed(0)

    # Every Python carries its own source. Files are held out whole, or the evaluation would measure memory; the smallest come
    # first, so that a few thousand tokens are of many of them.
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.stat().st_size)
    files = [file for file in files if file.stat().st_size > 2000]
    held_out, calibration, training = files[::8], files[1::8], [file for i, file in enumerate(files) if i % 8 > 1]

    model = AutoModelForCausalLM.from_pretrained(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    budgets = [*map(float, model.config.budgets), 1.0]
    test_blocks = token_blocks(read_documents(held_out), tokenizer, 256, 2048)
    before = [measure(model, test_blocks, budget) for budget in budgets]

    model = get_peft_model(model, lora_config(rank=args.rank, alpha=2 * args.rank))
    trainable, total = model.get_nb_trainable_parameters()
    # A gradient and Adam's two moments, in float32.
    print(
        f"Trained: {trainable:,} of {total:,} parameters, {12e-6 * trainable:,.0f} MB of optimiser instead of {12e-6 * total:,.0f}"
    )
    blocks = token_blocks(read_documents(training), tokenizer, 256, args.steps * 1024)
    trainer = DynaMoETrainer(
        model=model,
        args=DynaMoETrainingArguments(
            output_dir=args.out, save_strategy="no", max_steps=args.steps, per_device_train_batch_size=4, train_parts="lora",
            learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=2, logging_steps=5,
            dataloader_pin_memory=torch.cuda.is_available(),
            # The LM loss, to learn a new text. Distilling the frozen model, the default, would keep what it said of it before.
            lm_loss_coef=1.0, kd_loss_coef=0.0, hidden_loss_coef=0.0, logit_fraction=0.25,
            # By default, experts learn on the routes of the folder's routers, which do not change until they are fitted below.
        ),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
    )  # fmt: skip
    trainer.train()

    merged = model.merge_and_unload().eval()
    fit_routers(merged, blocks, route="router")
    merged.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    # Experts and routers have changed, and so has the text: the marks on the dial must be found anew.
    calibrate_budgets(args.out, budgets=budgets[:-1], text=calibration, max_tokens=2048, block_size=256)

    tuned = AutoModelForCausalLM.from_pretrained(args.out)
    with torch.no_grad():
        full = [m(test_blocks[:1], sensitivity=1.0).logits for m in (merged, tuned)]
    print(f"Largest difference of logits between merged and reloaded: {(full[0] - full[1]).abs().max():.1g}")
    print("| budget | perplexity before | at share | after | at share |\n|---|---|---|---|---|")
    for budget, old in zip(budgets, before):
        new = measure(tuned, test_blocks, budget)
        print(f"| {budget:.0%} | {old[0]:.2f} | {old[1]:.1%} | {new[0]:.2f} | {new[1]:.1%} |")
    tuned.set_budget(budgets[-2])
    inputs = tokenizer('def read_json(path):\n    """Return', return_tensors="pt")
    text = tuned.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    print(f"At budget {budgets[-2]:.0%}:\n{tokenizer.decode(text[0], skip_special_tokens=True)}")


def measure(model, blocks, budget):
    """Perplexity on token blocks (N, S) at a budget, and the mean share of the MLPs' weights that it really took."""
    found = routed_nll(model, blocks, sensitivity=model.config.sensitivity_of(budget))
    return found.nll.mean().exp().item(), found.share


if __name__ == "__main__":
    main()
