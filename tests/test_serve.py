"""`dynamoe serve`: which engine is started, how, and how it stops."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import tiny_dense, tiny_dynamoe, tiny_tokenizer

from dynamoe_hf import serve
from dynamoe_hf.arguments import ServeArguments
from dynamoe_hf.folder import write_json
from dynamoe_hf.integrity import digests_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    model = tiny_dynamoe()
    model.config.budgets = {"0.5": 0.4}
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def installed(monkeypatch, *modules):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in modules else None)


def test_the_best_engine_that_is_installed(monkeypatch):
    installed(monkeypatch, "vllm", "fastapi", "uvicorn", "openai")
    assert serve.chosen_engine("auto") == "vllm" and serve.chosen_engine("transformers") == "transformers"
    installed(monkeypatch, "fastapi", "uvicorn", "openai")
    assert serve.chosen_engine("auto") == "transformers"
    with pytest.raises(
        ImportError, match=r"found none of vllm installed. Install one. vllm: `pip install 'dynamoe_hf\[vllm\]'`"
    ):
        serve.chosen_engine("vllm")


def test_the_dial_reaches_the_engine(folder, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(serve, "run_until_stopped", lambda command, environment: commands.append(command) or 0)
    installed(monkeypatch, "vllm")
    serve.serve_folder(folder, budget=0.5, engine_flags="--max-model-len 64")
    assert json.loads(commands[0][commands[0].index("--hf-overrides") + 1]) == {"sensitivity": 0.4}
    assert commands[0][-2:] == ["--max-model-len", "64"] and "model" in commands[0]
    assert f"Serving {folder} with vllm at http://127.0.0.1:8000, sensitivity 0.4." in capsys.readouterr().err
    with pytest.raises(ValueError, match="Both a budget and a sensitivity"):
        serve.serve_folder(folder, budget=0.5, sensitivity=0.5)
    with pytest.raises(ValueError, match="budget=0.2 is outside the calibrated range"):
        serve.serve_folder(folder, budget=0.2)
    assert "RequestDials" not in "".join(commands[0])
    serve.serve_folder(folder, request_dials=True)
    assert {"dynamoe_hf.vllm_dials:RequestDials", "--no-enable-prefix-caching"} < set(commands[1])
    installed(monkeypatch, "fastapi", "uvicorn", "openai")
    with pytest.raises(ValueError, match="needs vLLM, found the engine transformers"):
        serve.serve_folder(folder, request_dials=True)


def test_vllm_counts_into_a_folder_that_goes_away(folder, monkeypatch):
    told = []
    monkeypatch.setattr(serve, "chosen_engine", lambda asked: "vllm")
    monkeypatch.setattr(serve, "run_until_stopped", lambda command, environment: told.append(environment) or 0)
    serve.serve_folder(folder)
    assert not os.path.exists(told[0]["PROMETHEUS_MULTIPROC_DIR"])


@pytest.mark.parametrize("damage", ["a dense folder", "a flipped bit", "a wrong sensitivity"])
def test_what_cannot_be_served_is_told_before_an_engine_starts(damage, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "run_until_stopped", lambda *given: pytest.fail("started"))
    installed(monkeypatch, "vllm")
    if damage == "a dense folder":
        tiny_dense().save_pretrained(tmp_path / "dense")
        with pytest.raises(ValueError, match="holds a dense llama model"):
            serve.serve_folder(tmp_path / "dense")
    elif damage == "a flipped bit":
        copied = shutil.copytree(folder, tmp_path / "copied")
        write_json(copied / "conversion.json", {"weights": digests_of(copied)})
        content = bytearray((copied / "model.safetensors").read_bytes())
        content[-5] ^= 1
        (copied / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="are not those that were written"):
            serve.serve_folder(copied)
    else:
        with pytest.raises(ValueError, match=r"must be in \(0, 1\], found 2.0"):
            serve.serve_folder(folder, sensitivity=2.0)


def test_an_engine_that_ends_by_itself_is_told(folder, monkeypatch):
    monkeypatch.setattr(serve, "chosen_engine", lambda asked: "vllm")
    monkeypatch.setattr(serve, "vllm_command", lambda *given: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(ChildProcessError, match="vllm left with status 3"):
        serve.serve_folder(folder)


WAITS = "import sys, time; from dynamoe_hf.serve import run_until_stopped; "


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_it_stops_when_told(number):
    """The engine is told too, and the end is no error."""
    engine = "import time; print('up', flush=True); time.sleep(60)"
    heard = f"import signal; signal.signal({int(number)}, signal.SIG_DFL); "  # also where these tests run under `nohup`
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS + heard + f"sys.exit(run_until_stopped([sys.executable, '-c', {engine!r}]))"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "up\n"
    process.send_signal(number)
    assert process.wait(20) == 0


def test_ctrl_c_at_a_terminal_reaches_the_engine_once():
    """A terminal sends it to all processes of its foreground group. The engine is in none, and is told by ours."""
    engine = "import os, time; print(os.getpgid(0), flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS + f"sys.exit(run_until_stopped([sys.executable, '-c', {engine!r}]))"],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert int(process.stdout.readline()) != os.getpgid(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(20) == 0


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, serve.ENGINES["transformers"][0])), reason="needs transformers[serving]"
)
def test_transformers_serves_a_folder(folder):
    """The library's own server, over HTTP: a chat whose text is that of `generate` at the budget."""
    import torch
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = serve.transformers_command(str(folder), 0.4, ServeArguments(port=port, dtype="float32"))
    with subprocess.Popen(command, env={**os.environ, "NO_PROXY": "127.0.0.1"}) as server:
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            for _ in range(120):
                try:
                    opener.open(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    assert server.poll() is None
                    time.sleep(1)
            client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=60)
            messages = [{"role": "user", "content": "The with statement"}]
            stream = client.chat.completions.create(
                model=str(folder), messages=messages, stream=True, temperature=0.0, max_tokens=8
            )
            text = "".join(part.choices[0].delta.content or "" for part in stream)
        finally:
            server.send_signal(signal.SIGTERM)
    from dynamoe_hf.generate import continue_text

    model = tiny_dynamoe().eval()
    model.set_sensitivity(0.4)
    with torch.no_grad():
        assert text == continue_text(model, tiny_tokenizer(), "The with statement", max_new_tokens=8)
