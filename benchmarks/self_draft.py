# SPDX-License-Identifier: Apache-2.0
"""
Does it pay that the model drafts for itself? Time of greedy text at full width, with and without drafts, in turns in one process.

    python benchmarks/self_draft.py FOLDER [--pack int8] [--rounds 5]

FOLDER is a calibrated model folder. "plain" is text at the budget of the draft, without checks: what the draft costs by itself.
"""

import argparse
import statistics
import time

import torch

from dynamoe_hf.folder import keep_large_buffers, load_model, load_tokenizer


PROMPT = "The with statement is used to wrap the execution of a block with methods defined by a context manager."
TOKENS = 48


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--pack", help="int8 or bfloat16")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.5, 0.6])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_large_buffers()
    model, tokenizer = load_model(args.folder), load_tokenizer(args.folder)
    if args.pack:
        model.pack(args.pack)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"].to(model.device)
    contenders = {"full width": {"force_expert": model.config.expert_count - 1}}
    for budget in args.budgets:
        contenders[f"plain {budget:g}"] = {"sensitivity": model.config.sensitivity_of(budget)}
        for tokens in (2, 4):
            contenders[f"draft {budget:g}, {tokens} tokens"] = {"draft_budget": budget, "draft_tokens": tokens}
    seconds, outputs = {name: [] for name in contenders}, {}
    for _ in range(args.rounds + 1):  # the first to warm up
        for name, options in contenders.items():
            begun = time.perf_counter()
            outputs[name] = model.generate(ids, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
                                           pad_token_id=tokenizer.eos_token_id, return_dict_in_generate=True, **options)  # fmt: skip
            seconds[name].append(time.perf_counter() - begun)
    whole = seconds["full width"][1:]
    print(f"{'':22} {'time to full':>12} {'accepted':>9} {'passes':>7}  same text")
    for name, output in outputs.items():
        ratio = statistics.median(own / full for own, full in zip(seconds[name][1:], whole))
        share = f"{output.accepted / output.drafted:9.0%} {output.passes:7}" if "draft" in name else " " * 17
        print(f"{name:22} {ratio:12.2f} {share}  {torch.equal(output.sequences, outputs['full width'].sequences)}")


if __name__ == "__main__":
    main()
