"""Each example runs as it stands, offline, and does what it says."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense, tiny_tokenizer
from reference import assert_close
from transformers import AutoModelForCausalLM

from dynamoe_hf import calibrate_budgets, convert_model, train_model
from dynamoe_hf.export import dense_prefix
from dynamoe_hf.folder import read_json


EXAMPLES = Path(__file__).parent.parent / "examples"
BUDGETS = [0.5, 0.75]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A calibrated folder as `make demo` leaves it, tiny, with a chat template. Treat it as read-only."""
    root = tmp_path_factory.mktemp("examples")
    # The vocabulary of the tokenizer is that of the model, and chats are longer than the families' 256 tokens.
    tiny_dense(num_hidden_layers=3, max_position_embeddings=512).save_pretrained(root / "dense")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(root / "dense")
    convert_model(root / "dense", root / "converted", block_size=64, max_tokens=2048)
    train_model(root / "converted", root / "trained", train_parts="routers", block_size=64, max_tokens=4096)
    calibrate_budgets(root / "trained", budgets=BUDGETS, block_size=64, max_tokens=4096)
    return root / "trained"


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example in this process, as `python examples/NAME.py ...` would; what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def table(text):
    """The rows of the Markdown table in a text, numbers as numbers and the rest as it is."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    number = re.compile(r"([\d.]+)(%|x)?$")
    return [[float(m[1]) if (m := number.match(cell)) else cell for cell in row] for row in rows[1:]]


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def changed(before, after, part):
    return any(not torch.equal(before[name], after[name]) for name in before if part in name)


def test_quickstart():
    result = subprocess.run([sys.executable, EXAMPLES / "quickstart.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "budget 50%" in result.stdout


def test_lora(example, trained, tmp_path, token_ids):
    text = example("lora", trained, tmp_path / "lora", "--steps", 3, "--rank", 4)
    assert "Largest difference of logits between merged and reloaded: 0\n" in text
    assert re.search(r"Trained: ([\d,]+) of", text)[1] == f"{3 * (3 * 4 * (32 + 64) + 8 * 33 + 7 * 9):,}"  # adapters, routers
    before, after = weights(trained), weights(tmp_path / "lora")
    assert before.keys() == after.keys()  # merged: no adapter is left, and the routers are where they were
    assert changed(before, after, ".router.") and changed(before, after, "down_proj")
    assert not changed(before, after, "self_attn") and not changed(before, after, "embed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lora")
    assert_close("full width", model(token_ids, sensitivity=1.0).logits, dense_prefix(model, 1.0)(token_ids).logits)
    assert [float(budget) for budget in model.config.budgets] == BUDGETS
    rows = table(text)
    assert [row[0] for row in rows] == [50, 75, 100]
    assert all(new < old for _, old, _, new, _ in rows)  # it has learnt the new text, on files that it has not seen
    assert rows[-1][2] == rows[-1][4] == 100
    assert "At budget 75%:\ndef read_json" in text


def test_sft_chat(example, trained, tmp_path):
    pytest.importorskip("trl")
    text = example("sft_chat", trained, tmp_path / "chat", "--steps", 5)
    (logged,) = re.findall(r"{'loss'.*}", text)
    parts = {name: float(value) for name, value in re.findall(r"'(\w+)': '([\d.e-]+)'", logged)}
    assert parts["lm_loss"] > 0 and 0 < parts["router_loss"] < 1 and 0 < parts["mean_width"] < 1
    before, after = weights(trained), weights(tmp_path / "chat")
    assert changed(before, after, ".router.") and changed(before, after, "down_proj")
    rows = table(text)
    assert [row[0] for row in rows] == [50, 75, 100]
    assert all(new < old for _, old, _, new, _ in rows)
    assert rows[0][4] < rows[1][4] < rows[2][4] == 100
    assert read_json(tmp_path / "chat" / "calibration.json")["text"] == ["calibration.txt"]


def test_plain_sft_trainer_leaves_routers_alone(trained, tmp_path):
    """The reason of the subclass in `sft_chat.py`. Where this fails, TRL runs the model's own `forward`: drop the subclass."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    module = runpy.run_path(str(EXAMPLES / "sft_chat.py"))
    rows = Dataset.from_list(module["chats"](["glob", "textwrap"]))
    before, moved = weights(trained), {}
    for trainer_class, arguments in ((trl.SFTTrainer, trl.SFTConfig), (module["ChatTrainer"], module["ChatArguments"])):
        ours = trainer_class is not trl.SFTTrainer
        settings = {"train_parts": "mlp", "route": "label", "router_loss_coef": 1.0} if ours else {}
        args = arguments(output_dir=tmp_path, max_steps=1, learning_rate=1e-3, warmup_steps=0, save_strategy="no",
                         bf16=False, activation_checkpointing=False, **settings)  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(trained)
        tokenizer = module["AutoTokenizer"].from_pretrained(trained)
        trainer = trainer_class(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        after = trainer.model.state_dict()
        moved[trainer_class.__name__] = changed(before, after, ".router."), changed(before, after, "down_proj")
    assert moved == {"SFTTrainer": (False, True), "ChatTrainer": (True, True)}


def test_masked_prompts_do_not_reach_the_router_loss(trained, token_ids):
    """What `sft_chat.py` says of the mask: losses are those of the answer's positions, whatever the prompt's labels were."""
    model = AutoModelForCausalLM.from_pretrained(trained).train()
    model.config.train_sensitivity = [0.5, 0.5]
    labels = token_ids.clone()
    labels[:, :6] = -100
    outputs = model(token_ids, labels=labels, output_router_logits=True)
    with model.routing(route="label", sensitivity=0.5, needs_labels=True, records=[]) as routing:
        model.model(token_ids)
    by_hand = torch.stack([record.router_loss[:, 5:-1].mean() for record in routing.records]).mean()
    assert_close("router loss", outputs.router_loss, by_hand)


def test_sweep(example, trained, tmp_path):
    pytest.importorskip("matplotlib")
    folder = shutil.copytree(trained, tmp_path / "trained")
    text = example("sweep", folder, tmp_path / "sweep", "--steps", 3, "--max-tokens", 1024)
    rows = table(text)
    assert [row[0] for row in rows] == [50, 75, 100]
    shares = [row[2] for row in rows]
    assert shares == sorted(set(shares)) and shares[-1] == 100
    for budget, _, share, perplexity, interval, static, speed, _ in rows:
        low, high = map(float, interval.split(" to "))
        assert abs(share - budget) < 10 and low < perplexity < high and static > 1 and speed > 0
    assert rows[-1][3] == rows[-1][5]  # at full width both are the dense model
    assert (tmp_path / "sweep" / "sweep.md").read_text().splitlines() == text.splitlines()[: 2 + len(rows)]
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_json(folder / "results.json")["evaluations"]) == 3


def test_publish(example, trained, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *args, **options: sent.append(args))
    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", lambda *args, **options: sent.append(args))
    files = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    text = example("publish", trained, tmp_path / "out", "--repo", "user/tiny")
    assert not sent and "Nothing was sent" in text
    assert files == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    dial = read_json(trained / "config.json")
    folders = {"tiny": dial["sensitivity"], "tiny-0.5": dial["budgets"]["0.5"], "tiny-0.75": dial["budgets"]["0.75"]}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(folders)
    assert [row[0] for row in table(text)] == [f"user/{name}" for name in folders]
    for name, sensitivity in folders.items():
        assert read_json(tmp_path / "out" / name / "config.json")["sensitivity"] == sensitivity
        assert f"user/{name}" in (tmp_path / "out" / name / "README.md").read_text()
        assert (tmp_path / "out" / name / "model.safetensors").samefile(trained / "model.safetensors")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_what_it_does(path):
    header, documentation, *_ = path.read_text().split('"""')
    assert header == "# SPDX-License-Identifier: Apache-2.0\n"
    assert f"python examples/{path.name}" in documentation
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()
