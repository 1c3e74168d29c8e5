# SPDX-License-Identifier: Apache-2.0
"""
A folder in vLLM against the same folder in transformers, both in float32: log-probabilities of held-out text, greedy tokens after it, and
the share of the MLPs' weights that the text reads, as `/metrics` counts it. At full width, by routing alone, and with sparsity too.

    python benchmarks/serving_parity.py FOLDER [--budget 0.75] [--eager]

Run it with the Python of an environment that has vLLM and this package (`make test-vllm` makes one).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from dynamoe_hf.benchmark import machine
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.folder import load_model, load_tokenizer, write_json
from dynamoe_hf.observe import bisect_rising


PROMPT, NEW_TOKENS = 100, 16


def worker(folder, overrides, eager):
    """vLLM's side: prompts as JSON on the input, log-probabilities, greedy tokens and the counted share as one line of JSON."""
    from prometheus_client import CollectorRegistry, multiprocess
    from vllm import LLM, SamplingParams

    from dynamoe_hf.vllm_metrics import FOLDER, SECONDS

    def counted(name):
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, path=os.environ[FOLDER])
        return registry.get_sample_value(name) or 0.0

    prompts = [{"prompt_token_ids": prompt} for prompt in json.load(sys.stdin)]
    engine = LLM(
        folder, dtype="float32", enforce_eager=eager, hf_overrides=overrides, max_model_len=512, max_num_seqs=4,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    names = "dynamoe:mlp_share_total", "dynamoe:mlp_tokens_total"
    time.sleep(3 * SECONDS)
    before = [counted(name) for name in names]
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    read = engine.generate(prompts, settings, use_tqdm=False)
    time.sleep(3 * SECONDS)
    share, tokens = (counted(name) - old for name, old in zip(names, before))
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    written = engine.generate(prompts, settings, use_tqdm=False)
    logprobs = [[next(iter(at.values())).logprob for at in each.prompt_logprobs[1:]] for each in read]
    found = {"logprobs": logprobs, "written": [list(each.outputs[0].token_ids) for each in written]}
    print(json.dumps({**found, "share": share / tokens if tokens else None}), flush=True)


def in_vllm(folder, overrides, prompts, eager):
    command = [sys.executable, __file__, str(folder), "--worker", json.dumps(overrides)] + ["--eager"] * eager
    with tempfile.TemporaryDirectory() as counters:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": counters, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


@torch.no_grad()
def in_transformers(model, tokens, **options):
    out = model(tokens, use_cache=False, output_router_logits=True, **options)
    logprobs = out.logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return logprobs, torch.stack(tuple(out.mlp_shares)).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="calibrated model folder")
    parser.add_argument("--budget", type=float, default=0.75)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(str(args.folder), json.loads(args.worker), args.eager)
        return
    tokens = token_blocks(documents_for("held-out"), load_tokenizer(args.folder), PROMPT, args.prompts * PROMPT)
    model = load_model(args.folder, dtype=torch.float32, device_map="cpu")
    theta = model.config.sensitivity_of(args.budget)

    def routed_share(sensitivity):
        return in_transformers(model, tokens, sensitivity=sensitivity, density=1.0)[1]

    # With sparsity, a budget leaves routing little to do.
    routing = theta if model.config.thresholds is None else bisect_rising(routed_share, args.budget, 0.0, 1.0, rounds=10)
    cases = {
        "full width": {"sensitivity": 1.0},
        "routing alone": {"sensitivity": routing, "thresholds": None, "density_path": []},
    }
    if model.config.thresholds is not None:
        cases["routing and sparsity"] = {"sensitivity": theta}
    rows = {}
    for case, overrides in tqdm(cases.items(), desc="Engines"):
        theirs = in_vllm(args.folder, overrides, tokens.tolist(), args.eager)
        options = {"sensitivity": overrides["sensitivity"]} | ({"density": 1.0} if "thresholds" in overrides else {})
        logprobs, share = in_transformers(model, tokens, **options)
        greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        written = model.generate(tokens, **greedy, **options)[:, PROMPT:].tolist()
        error = (torch.tensor(theirs["logprobs"]) - logprobs).abs()
        same = sum(a == b for a, b in zip(theirs["written"], written))
        rows[case] = {
            "mean_difference": error.mean().item(), "largest_difference": error.max().item(), "same_greedy_texts": same,
            "share": share, "share_counted": theirs["share"],
        }  # fmt: skip
        counted = "not counted" if theirs["share"] is None else f"{theirs['share']:.2%}"
        tqdm.write(
            f"{case:22} log-probabilities differ by {error.mean():.1e}, at most {error.max():.1e}; {same} of {len(written)} greedy "
            f"texts of {NEW_TOKENS} tokens are the same; share {share:.2%}, in vLLM {counted}"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(torch.get_num_threads()) | {"model": args.folder.name, "tokens": tokens.numel(), "budget": args.budget}
    name = f"serving-parity-{'eager' if args.eager else 'compiled'}_{about['name']}.json"
    write_json(args.out / name, {"machine": about, "rows": rows})


if __name__ == "__main__":
    main()
