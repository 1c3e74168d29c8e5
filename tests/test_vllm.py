"""A DynaMoE folder served by vLLM, over HTTP on loopback. `make test-vllm` runs these in an environment of their own."""

import copy
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_dynamoe, tiny_tokenizer
from test_sparsity import PATH, TABLE

from dynamoe_hf import DynaMoEForCausalLM


openai = pytest.importorskip("openai")
pytestmark = pytest.mark.vllm
SENSITIVITY = 0.6
# vLLM's attention wants heads of 32.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
REMOTE_CODE = ["--trust-remote-code"]
PLUG_IN: list[str] = []
FEW_BLOCKS = ["--num-gpu-blocks-override", "128"]  # of the cache, so that all have been used once before memory is counted


@contextmanager
def served(folder, log, *flags, **environment):
    """A server of `folder` and a client for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not the command `vllm`, which the CPU build's wheel breaks: it asks for the version of a package of another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model", str(folder), "--dtype", "float32", "--max-model-len", "256", "--served-model-name", "model", *flags]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1", **environment}
    with open(log, "w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
    try:
        for _ in range(600):
            assert server.poll() is None, Path(log).read_text()[-4000:]
            try:
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        client.process = server.pid
        yield client
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 128, (20, 100), generator=generator).tolist()


def saved(folder, family="llama", config=None, **settings):
    model = tiny_dynamoe(family, dense_settings={**SIZES, **settings}, **(config or {}))
    model.set_sensitivity(SENSITIVITY)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def answer(client, prompt, **settings):
    return client.completions.create(
        model="model", prompt=prompt, temperature=0, extra_body=settings.pop("extra", {}), **settings
    )


def assert_like_transformers(client, folder, prompts):
    """Log-probabilities of 2,000 tokens, and greedy answers."""
    model = DynaMoEForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor(prompts)).logits
    expected = logits[:, :-1].log_softmax(-1).gather(-1, torch.tensor(prompts)[:, 1:, None]).squeeze(-1)
    experts = model.generate(torch.tensor(prompts), max_new_tokens=16, do_sample=False, pad_token_id=0, eos_token_id=None)
    for row, prompt in enumerate(prompts):
        extra = {"prompt_logprobs": 0, "ignore_eos": True, "return_token_ids": True}
        choice = answer(client, prompt, max_tokens=16, extra=extra).choices[0]
        found = [at[str(token)]["logprob"] for at, token in zip(choice.prompt_logprobs[1:], prompt[1:])]
        torch.testing.assert_close(torch.tensor(found), expected[row], atol=1e-3, rtol=0)
        assert choice.token_ids == experts[row, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("flags", "plugins"),
    [
        pytest.param([*REMOTE_CODE, "--enforce-eager"], "", id="remote-code"),
        pytest.param(PLUG_IN, "dynamoe", id="plug-in-compiled"),
    ],
)
def test_served_like_transformers(flags, plugins, folder, prompts, tmp_path):
    log = tmp_path / "log"
    with served(folder, log, *flags, VLLM_PLUGINS=plugins) as client:
        assert_like_transformers(client, folder, prompts)
    assert "every neuron is computed" not in log.read_text()  # prefixes, not masks


@pytest.mark.parametrize(("family", "settings"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.25})])
def test_scales_of_logits_are_kept(family, settings, prompts, tmp_path):
    folder = saved(tmp_path / "model", family, **settings)
    with served(folder, tmp_path / "log", *REMOTE_CODE, "--enforce-eager", VLLM_PLUGINS="") as client:
        assert_like_transformers(client, folder, prompts[:4])


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_the_parts_of_the_ranks_add_up(family, monkeypatch):
    """Each rank holds its part of every expert, and the sum of their outputs is that of the whole MLP."""
    from dynamoe_hf import vllm_model

    monkeypatch.setattr(vllm_model, "tensor_model_parallel_all_reduce", lambda output: output)
    model = tiny_dynamoe(family, dense_settings=SIZES).eval()
    mlp, x = model.nested_mlps[0], torch.randn(2, 40, SIZES["hidden_size"])
    with torch.no_grad(), model.routing(sensitivity=SENSITIVITY):
        expected, total = mlp(x), 0
        for rank in range(2):
            part = copy.deepcopy(mlp)
            part.slot = mlp.slot
            vllm_model.divide(part, rank, 2)
            vllm_model.load_part(part, rank, 2)
            for name, parameter in part.named_parameters():
                if hasattr(parameter, "weight_loader"):
                    parameter.weight_loader(parameter, mlp.get_parameter(name))
            assert part.widths == [width // 2 for width in mlp.widths]
            assert part.down_linear.weight.shape[1] * 2 == mlp.down_linear.weight.shape[1]
            total = total + part(x)
    torch.testing.assert_close(total, expected)


def test_two_ranks_divide_every_expert(folder, prompts, tmp_path):
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_PLUGINS": "dynamoe"}
    with served(folder, tmp_path / "log", "--enforce-eager", "--tensor-parallel-size", "2", **threads) as client:
        assert_like_transformers(client, folder, prompts)


def test_the_dial_of_a_server(folder, prompts, tmp_path):
    overrides = ["--hf-overrides", '{"sensitivity": 1.0}']
    model = DynaMoEForCausalLM.from_pretrained(folder).eval()
    model.set_sensitivity(1.0)
    expected = model.generate(torch.tensor(prompts[:1]), max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    with served(folder, tmp_path / "log", "--enforce-eager", *overrides) as client:
        extra = {"ignore_eos": True, "return_token_ids": True}
        found = answer(client, prompts[0], max_tokens=16, extra=extra).choices[0].token_ids
        streamed = answer(client, prompts[0], max_tokens=16, stream=True, extra=extra)
        in_pieces = [token for part in streamed for token in part.choices[0].token_ids or []]
    assert found == expected[0, len(prompts[0]) :].tolist()
    assert in_pieces == found


def share_of(metrics):
    """The mean share of the MLPs' weights, and of how many tokens, by the text of `/metrics`."""
    found = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("dynamoe:"))
    tokens = float(found["dynamoe:mlp_tokens_total"])
    return float(found["dynamoe:mlp_share_total"]) / max(1, tokens), tokens


def metrics_of(address, tokens):
    """The text of `/metrics`, once so many tokens are in it."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(50):
        text = opener.open(f"{address}/metrics", timeout=5).read().decode()
        if share_of(text)[1] >= tokens:
            return text
        time.sleep(0.1)
    raise AssertionError(f"found no {tokens} tokens in {text}")


def test_the_share_that_tokens_take(prompts, tmp_path):
    """With thresholds, compiled: the share of `model(...)` on the same tokens."""
    folder = saved(tmp_path / "model", config={"thresholds": TABLE, "density_path": PATH})
    with torch.no_grad():
        shares = DynaMoEForCausalLM.from_pretrained(folder).eval()(torch.tensor(prompts), output_router_logits=True).mlp_shares
    (tmp_path / "counters").mkdir()
    where = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "counters"), "VLLM_PLUGINS": "dynamoe"}
    with served(folder, tmp_path / "log", **where) as client:
        for prompt in prompts:
            answer(client, prompt, max_tokens=1)
        share, tokens = share_of(metrics_of(f"http://127.0.0.1:{client.base_url.port}", 2000))
    assert tokens == 2000 and abs(share - torch.stack(shares).mean().item()) < 0.005


@pytest.mark.parametrize("flags", [["--enforce-eager"], []], ids=["eager", "compiled"])
def test_requests_of_one_batch_have_their_own_dials(flags, folder, prompts, tmp_path):
    """20 requests in 8 places, of several lengths and sensitivities: the answers and log-probabilities of each alone."""
    dials = [None, 0.3, 1.0, 0.55] * 5
    model = DynaMoEForCausalLM.from_pretrained(folder).eval()
    flags = [*flags, "--max-num-seqs", "8", "--logits-processors", "dynamoe_hf.vllm_dials:RequestDials"]
    with (
        served(folder, tmp_path / "log", *flags, "--no-enable-prefix-caching", VLLM_PLUGINS="dynamoe") as client,
        ThreadPoolExecutor(20) as pool,
    ):

        def request(number):
            extra = {"prompt_logprobs": 0, "ignore_eos": True, "return_token_ids": True}
            if dials[number]:
                extra["vllm_xargs"] = {"sensitivity": dials[number]}
            return answer(client, prompts[number], max_tokens=8 + number, extra=extra).choices[0]

        choices = list(pool.map(request, range(20)))
        with pytest.raises(openai.BadRequestError, match=r"sensitivity must be in \(0, 1\], found 2.0"):
            answer(client, prompts[0], max_tokens=1, extra={"vllm_xargs": {"sensitivity": 2.0}})
    for number, (choice, prompt, dial) in enumerate(zip(choices, prompts, dials)):
        inputs = torch.tensor([prompt])
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        alone = model.generate(inputs, max_new_tokens=8 + number, sensitivity=dial, **settings)[0, len(prompt) :]
        assert choice.token_ids == alone.tolist()
        with torch.no_grad():
            logits = model(inputs, sensitivity=dial).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(-1, inputs[0, 1:, None]).flatten()
        found = [at[str(token)]["logprob"] for at, token in zip(choice.prompt_logprobs[1:], prompt[1:])]
        torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("plugins", "error"),
    [
        ("dynamoe", "cannot be kept apart here: found prefix caching"),
        ("", "would not be heard: found the model DynaMoEForCausalLM, without the plug-in"),
    ],
    ids=["prefix caching", "no plug-in"],
)
def test_dials_that_would_mix_or_not_be_heard_are_refused(plugins, error, folder, tmp_path):
    log = tmp_path / "log"
    flags = [*REMOTE_CODE, "--enforce-eager", "--logits-processors", "dynamoe_hf.vllm_dials:RequestDials"]
    with pytest.raises(AssertionError), served(folder, log, *flags, VLLM_PLUGINS=plugins):
        pytest.fail("started")
    assert error in log.read_text()


def memory_of(process):
    """Bytes of a process and of all that it has started."""
    import psutil

    processes = [psutil.Process(process), *psutil.Process(process).children(recursive=True)]
    return sum(each.memory_info().rss for each in processes)


def test_five_hundred_requests_at_once(folder, prompts, tmp_path):
    """32 at a time, of many lengths, one in ten cancelled midway: the answers of one at a time, and no memory kept."""
    model = DynaMoEForCausalLM.from_pretrained(folder).eval()
    asked = [(prompt[: 10 + 4 * index], 8 + index) for index, prompt in enumerate(prompts)]
    expected = [
        model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, len(prompt) :
        ]
        for prompt, new in asked
    ]
    extra = {"ignore_eos": True, "return_token_ids": True}
    with (
        served(folder, tmp_path / "log", "--enforce-eager", "--max-num-seqs", "32", *FEW_BLOCKS) as client,
        ThreadPoolExecutor(32) as pool,
    ):

        def request(number):
            prompt, new = asked[number % len(asked)]
            if number % 10 == 7:
                with answer(client, prompt, max_tokens=100, stream=True, extra=extra) as stream:
                    next(iter(stream))
                return None
            return answer(client, prompt, max_tokens=new, extra=extra).choices[0].token_ids

        list(
            pool.map(request, range(2000))
        )  # oneDNN keeps what it prepares for each shape, up to a number: dense models do the same
        warm = memory_of(client.process)
        answers = list(pool.map(request, range(500)))
        assert memory_of(client.process) < 1.02 * warm
    wrong = [n for n, tokens in enumerate(answers) if tokens is not None and tokens != expected[n % len(asked)].tolist()]
    assert not wrong and answers.count(None) == 50


def test_dynamoe_serve_starts_it_and_stops_it(folder, prompts, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "dynamoe_hf.cli", "serve", str(folder), "--port", str(port), "--sensitivity", "0.6"]
    command += ["--dtype", "float32", "--engine-flags=--enforce-eager --max-model-len 128"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    for _ in range(120):
        assert server.poll() is None, (tmp_path / "log").read_text()[-4000:]
        try:
            opener.open(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            time.sleep(1)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
    client.completions.create(model=folder.name, prompt=prompts[0], max_tokens=1)
    metrics = metrics_of(f"http://127.0.0.1:{port}", len(prompts[0]))
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0
    assert "vllm:generation_tokens_total" in metrics and 0 < share_of(metrics)[0] < 1
    assert "with vllm at" in (tmp_path / "log").read_text()
