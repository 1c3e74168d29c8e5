# SPDX-License-Identifier: Apache-2.0
"""
llama.cpp for `benchmarks/quality_time.py`, in an environment of its own, since it is no dependency of this project:

    python -m venv llama && CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_AMX_INT8=OFF -DGGML_AMX_TILE=OFF -DGGML_AMX_BF16=OFF" \\
        llama/bin/pip install llama-cpp-python==0.3.36

Reads one JSON request a line and answers with one: `quantize` a GGUF file, `nll` of token blocks from the model's own logits, seconds to
`decode` given tokens one by one.
"""

import json
import math
import sys
import time

import llama_cpp
import numpy as np


CONTEXT = 600
MODELS: dict = {}


def model_of(path):
    if path not in MODELS:
        MODELS[path] = llama_cpp.Llama(path, n_ctx=CONTEXT, n_threads=1, n_threads_batch=2, logits_all=True, verbose=False)
    return MODELS[path]


def quantize(source, target, kind):
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)
    assert not failed, f"{source} could not be quantised to {kind}"
    return True


def nll(path, blocks):
    """Mean negative log-likelihood of each block's tokens."""
    model, found = model_of(path), []
    for block in blocks:
        model.reset()
        model.eval(block)
        logits = np.asarray(model.scores[: len(block) - 1], dtype=np.float64)
        following = logits[np.arange(len(block) - 1), block[1:]]
        top = logits.max(-1)
        found.append(float((np.log(np.exp(logits - top[:, None]).sum(-1)) + top - following).mean()))
    assert all(map(math.isfinite, found))
    return found


def decode(path, prompt, tokens):
    """Seconds to read the tokens one by one after the prompt."""
    model = model_of(path)
    model.reset()
    model.eval(prompt)
    start = time.perf_counter()
    for token in tokens:
        model.eval([token])
    return time.perf_counter() - start


def main():
    commands = {"quantize": quantize, "nll": nll, "decode": decode}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(commands[request.pop("command")](**request)), flush=True)


if __name__ == "__main__":
    main()
