"""Two processes train as one does with twice the accumulation: the same data, the same draws, the same losses and metrics."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynamoe_hf import convert_model, train_model
from dynamoe_hf.cli import main
from dynamoe_hf.folder import load_model
from dynamoe_hf.integrity import differing
from dynamoe_hf.processes import check_division
from dynamoe_hf.router_fit import _ends_of_parts


CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate"
COMMON = {"max_tokens": 960, "block_size": 16, "save_steps": 4, "router_tokens": 256, "batch_size": 2}
# FSDP sums the squares of a gradient in another order, and one number in 10^5 that passes a threshold for that is another result.
DENSE = {"density_range": [1, 1], "choice_share": 1 / 3, "logit_fraction": 0.5}
# What the recipe leaves out: a head that learns, routers that learn by their labels, layers that run twice.
LABELS = {"train_parts": "all", "route": "label", "router_loss_coef": 1.0, "lm_loss_coef": 0.5, "teacher": "self",
          "density_range": [1, 1], "choice_share": 0.0, "gradient_checkpointing": True}  # fmt: skip
LORA = {"train_parts": "lora", "lora_rank": 4, "route": "random", "density_range": [1, 1], "choice_share": 0.0}
SCRIPT = """
import json, os, sys
import torch
if "ACCELERATE_USE_FSDP" in os.environ:  # accelerate has FSDP for accelerators alone
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **options: ("gloo", DistributedType.MULTI_GPU)
    torch.distributed.init_process_group("gloo")
from dynamoe_hf import run, train_model
folder, out, text, settings, stop = sys.argv[1:]
if int(stop):
    run.WatchRun.on_step_end = lambda self, args, state, *rest, **more: os._exit(3) if state.global_step == int(stop) else None
train_model(folder, out, text=text, **json.loads(settings))
os._exit(0)  # torch's FSDP2 over gloo aborts one interpreter in eight while it ends
"""


@pytest.fixture(scope="module")
def converted(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    convert_model(dense_folder, out, text=text_file, max_tokens=1024, block_size=32)
    return out


def launched(config, folder, out, text, settings, stop=0, **changes):
    """The result of a training in two processes under one of the configs of accelerate."""
    script = out.parent / "script.py"
    script.write_text(SCRIPT)
    changed = out.parent / "config.yaml"
    lines = (CONFIGS / f"{config}.yaml").read_text()
    for name, value in changes.items():
        assert name in lines
        lines = "".join(f"  {name}: {value}\n" if name in line else line + "\n" for line in lines.splitlines())
    changed.write_text(lines)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", changed, "--num_processes", 2,
               "--main_process_port", 0, script, folder, out, text, json.dumps({**COMMON, **settings}), stop]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True, timeout=300)


def assert_same(first, second):
    """Histories to 1e-4, weights to a little more: steps of Adam on gradients near 0 are large."""
    one, two = (json.loads((folder / "training.json").read_text()) for folder in (first, second))
    assert two["tokens"] == one["tokens"] == 960 and two["steps"] == one["steps"] == 15
    assert len(two["history"]) == len(one["history"])
    for mine, other in zip(one["history"], two["history"]):
        assert mine.keys() == other.keys() >= {"loss", "kd_loss", "mean_width", "width_loss", "grad_norm", "share_expert_0"}
        for name, value in mine.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=2e-6), name  # metrics are rounded to six digits
    models = [dict(load_model(folder).named_parameters()) for folder in (first, second)]
    assert models[0].keys() == models[1].keys()
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-2, atol=1e-3, msg=name)
    assert not second.with_name(f"{second.name}.checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "settings"),
    [("ddp", {"choice_share": 1 / 3}), ("ddp", LABELS), ("fsdp2", DENSE), ("fsdp2", LABELS), ("fsdp2", LORA)],
    ids=["ddp", "ddp-labels", "fsdp2", "fsdp2-labels", "fsdp2-lora"],
)
def test_two_processes_train_as_one(config, settings, converted, text_file, tmp_path):
    train_model(converted, tmp_path / "one", text=text_file, **COMMON, **settings, gradient_accumulation_steps=2)
    result = launched(config, converted, tmp_path / "two", text_file, settings)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_divided_training_is_resumed(kind, converted, text_file, tmp_path):
    out = tmp_path / "out"
    arguments = ("fsdp2", converted, out, text_file)
    result = launched(*arguments, DENSE, stop=6, fsdp_state_dict_type=kind)
    assert result.returncode != 0 and not out.exists()
    checkpoint = tmp_path / "out.checkpoints" / "0-layers" / "checkpoint-4"
    digests = json.loads((checkpoint / "digests.json").read_text())
    assert not differing(checkpoint, digests) and any("fsdp" in name for name in digests)
    if kind == "FULL_STATE_DICT":  # it is a model folder, with the model's own code
        config = json.loads((checkpoint / "config.json").read_text())
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_dynamoe.DynaMoEForCausalLM"
        assert (checkpoint / "modeling_dynamoe.py").is_file() and not list(checkpoint.glob("_fsdp*"))
        assert load_model(checkpoint)(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    result = launched(*arguments, {**DENSE, "resume": True}, fsdp_state_dict_type=kind)
    assert result.returncode == 0, result.stderr[-3000:]
    train_model(converted, tmp_path / "alone", text=text_file, **COMMON, **DENSE, gradient_accumulation_steps=2)
    assert_same(tmp_path / "alone", out)


@pytest.mark.slow
def test_what_fsdp_cannot_do_is_refused_before_the_work(converted, text_file, tmp_path):
    changes = {"fsdp_cpu_ram_efficient_loading": "true"}
    result = launched("fsdp2", converted, tmp_path / "out", text_file, DENSE, **changes)
    assert result.returncode != 0 and "found fsdp_cpu_ram_efficient_loading: true. Set it to false" in result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.checkpoints").exists()


def test_division_that_cannot_be_trained():
    def state(version=2, recompute=False):
        return SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version, activation_checkpointing=recompute))

    check_division(SimpleNamespace())
    check_division(state())
    with pytest.raises(ValueError, match="found fsdp_version: 1. Set it to 2"):
        check_division(state(version=1))
    with pytest.raises(ValueError, match="found fsdp_activation_checkpointing: true. Leave it out, and set gradient_check"):
        check_division(state(recompute=True))


def test_sequences_are_divided_in_whole_batches(monkeypatch):
    ends = {}
    for processes in (1, 2, 3):
        monkeypatch.setattr("dynamoe_hf.router_fit.process_count", lambda count=processes: count)
        ends[processes] = _ends_of_parts(10)
    assert ends == {1: [0, 10], 2: [0, 4, 10], 3: [0, 4, 8, 10]}
    with pytest.raises(ValueError, match="found 8 sequences for 3 processes. Give more router_tokens"):
        _ends_of_parts(8)


def test_stages_that_do_not_train_run_in_the_first_process(converted, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert main(["inspect", str(converted)]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert main(["inspect", str(converted)]) == 0
    assert "experts" in capsys.readouterr().out
