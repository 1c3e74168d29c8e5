# SPDX-License-Identifier: Apache-2.0
"""
Tokens per second in vLLM: the dense base (the folder's full width as a plain model) against the folder at each budget, in one run, for
several numbers of requests at once.

    python benchmarks/serving.py FOLDER DENSE [--dtype bfloat16] [--eager]

Run it with the Python of an environment that has vLLM and this package (`make test-vllm` makes one). DENSE is what
`dynamoe export FOLDER DENSE --width 1` writes. Every contender is an engine in a process of its own; the dense one runs first, last, and
between the others, so that a machine that gets slower shows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch


REQUESTS, PROMPT, NEW_TOKENS, REPEATS = (1, 8, 32), 64, 32, 3


def worker(folder, sensitivity, dtype, eager):
    """Seconds of each repeat, by number of requests: printed as one line of JSON."""
    from vllm import LLM, SamplingParams

    overrides: dict = {} if sensitivity is None else {"sensitivity": sensitivity}
    engine = LLM(
        folder, dtype=dtype, enforce_eager=eager, hf_overrides=overrides, max_model_len=512, max_num_seqs=32,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    settings = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    seconds = {}
    for requests in REQUESTS:
        prompts = torch.randint(1000, 20_000, (requests, PROMPT), generator=generator).tolist()
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        engine.generate(given, settings, use_tqdm=False)
        seconds[requests] = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            engine.generate(given, settings, use_tqdm=False)
            seconds[requests].append(time.perf_counter() - start)
    print(json.dumps(seconds), flush=True)


def measure(folder, sensitivity, args):
    """Tokens per second by number of requests, the fastest repeat and the median."""
    command = [sys.executable, __file__, str(folder), "-", "--worker", json.dumps(sensitivity), "--dtype", args.dtype]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command + ["--eager"] * args.eager, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    seconds = json.loads(done.stdout.strip().splitlines()[-1])
    return {
        int(requests): {
            "median": int(requests) * NEW_TOKENS / statistics.median(times),
            "best": int(requests) * NEW_TOKENS / min(times),
        }
        for requests, times in seconds.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dense", type=Path)
    parser.add_argument(
        "--budgets", default="1,0.75,0.5", help="shares of the MLPs' weights, as `dynamoe calibrate` wrote them"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="without vLLM's compiler")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(str(args.folder), json.loads(args.worker), args.dtype, args.eager)
        return
    from dynamoe_hf import DynaMoEConfig
    from dynamoe_hf.benchmark import machine
    from dynamoe_hf.folder import write_json

    config = DynaMoEConfig.from_pretrained(args.folder)
    dense, rows = [measure(args.dense, None, args)], []
    for budget in map(float, args.budgets.split(",")):
        sensitivity = config.sensitivity_of(budget) if budget < 1 else 1.0
        rows.append(
            {"budget": budget, "sensitivity": sensitivity, "tokens_per_second": measure(args.folder, sensitivity, args)}
        )
        dense.append(measure(args.dense, None, args))
        ratios = {
            n: rows[-1]["tokens_per_second"][n]["median"] / statistics.mean(d[n]["median"] for d in dense[-2:])
            for n in REQUESTS
        }
        rows[-1]["ratio_to_dense"] = ratios
        speeds = {n: round(dense[-1][n]["median"], 1) for n in REQUESTS}
        print(f"budget {budget:g}: { ({n: round(r, 3) for n, r in ratios.items()}) }; dense {speeds} tokens/s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    about = machine(torch.get_num_threads()) | {"model": args.folder.name, "dtype": args.dtype, "compiled": not args.eager}
    name = f"serving-{args.dtype}-{'eager' if args.eager else 'compiled'}_{about['name']}.json"
    write_json(args.out / name, {"machine": about, "dense": dense, "rows": rows})


if __name__ == "__main__":
    main()
