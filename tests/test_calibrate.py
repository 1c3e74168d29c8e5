"""Calibration: budgets are reached on other text, the dial is monotone, and a failure writes nothing."""

import json
import statistics

import pytest
import torch
from conftest import tiny_dense, tiny_tokenizer

from dynamoe_hf import DynaMoEForCausalLM
from dynamoe_hf.calibrate import calibrate_budgets
from dynamoe_hf.data import documents_for, token_blocks
from dynamoe_hf.evaluate import evaluate_model
from dynamoe_hf.folder import load_model, load_tokenizer
from dynamoe_hf.modeling.sparsity import density_at


FAST = {"max_tokens": 16384, "block_size": 64, "batch_size": 32}


@pytest.fixture
def folder(tmp_path):
    """A folder whose routers tell tokens apart, though nothing has been learnt."""
    model = DynaMoEForCausalLM.from_dense(tiny_dense(num_hidden_layers=3), error_weights=[0.01] * 3)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router.output." in name:
                parameter.normal_(std=1.0)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_budgets_are_reached_on_other_text(folder):
    budgets = (0.5, 0.6, 0.75, 0.9)
    record = calibrate_budgets(folder, budgets=budgets, **FAST)
    assert list(record["budgets"]) == ["0.5", "0.6", "0.75", "0.9"]
    for entry in record["budgets"].values():
        low, high = entry["interval"]
        assert low < entry["mean_share"] < high < low + 0.05
    config = load_model(folder).config
    thetas = list(config.budgets.values())
    assert thetas == sorted(thetas)
    assert config.sensitivity == thetas[-1], "the default is the largest budget"
    for budget, entry in zip(budgets, evaluate_model(folder, budget=budgets, **FAST)):
        assert abs(entry["mean_share"] - budget) < 0.02, f"budget {budget} reached {entry['mean_share']} on held-out text"


def test_the_interval_is_that_of_the_blocks(folder):
    """Against the definition, each block run alone; one block has none."""
    entry = calibrate_budgets(folder, budgets=(0.6,), max_tokens=256, block_size=64)["budgets"]["0.6"]
    model, blocks = load_model(folder), token_blocks(documents_for("calibration"), load_tokenizer(folder), 64, 256)
    shares = [evaluate_share(model, block[None], entry["sensitivity"]) for block in blocks]
    half = 1.96 * statistics.stdev(shares) / 2
    assert entry["interval"] == pytest.approx([statistics.mean(shares) - half, statistics.mean(shares) + half], abs=2e-4)
    assert calibrate_budgets(folder, budgets=(0.6,), max_tokens=64, block_size=64)["budgets"]["0.6"]["interval"] is None


def evaluate_share(model, ids, sensitivity):
    with torch.no_grad(), model.routing(sensitivity=sensitivity, records=[]) as routing:
        model(ids)
    return torch.stack([record.share for record in routing.records]).mean().item()


def test_dense_experts(folder):
    """With `lowest_density=1` routing saves alone."""
    record = calibrate_budgets(folder, budgets=(0.5, 0.75), lowest_density=1.0, **FAST)
    config = load_model(folder).config
    assert config.thresholds is None and config.density_path == [] and record["mixes"] == []
    for entry in record["budgets"].values():
        assert entry["density"] == 1 and entry["mean_width"] == entry["mean_share"]


def test_the_dial_of_budgets(folder):
    """What is written is what a model reads: the sensitivity of a budget brings its density along."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"format_version": 2', '"format_version": 1'))
    record = calibrate_budgets(folder, budgets=(0.4, 0.75), **FAST)
    config = load_model(folder).config
    assert config.format_version == 2, "earlier code would read the folder without its thresholds"
    for entry in record["budgets"].values():
        assert entry["mean_share"] < entry["mean_width"], "sparsity takes part"
        assert density_at(config.density_path, entry["sensitivity"]) == pytest.approx(entry["density"], abs=1e-4)
    assert all(mix["kl"] >= 0 and 0 < mix["share"] <= 1 for mix in record["mixes"])


def test_a_ramp_is_written_and_kept(folder):
    """With thresholds fitted for it: budgets are reached, and the same weights are read as with a step."""
    settings = {"budgets": (0.5, 0.75), **FAST}
    calibrate_budgets(folder, **settings)
    step = load_model(folder).config
    assert step.threshold_ramp == 0 and step.format_version == 2
    record = calibrate_budgets(folder, threshold_ramp=0.2, **settings)
    config = load_model(folder).config
    assert config.threshold_ramp == 0.2 and config.density_path
    assert config.format_version == 3, "earlier code would read the folder without its ramp"
    for budget, entry in zip((0.5, 0.75), evaluate_model(folder, budget=(0.5, 0.75), **FAST)):
        assert entry["mean_share"] == pytest.approx(record["budgets"][f"{budget:g}"]["mean_share"], abs=0.02)
        assert entry["mean_share"] == pytest.approx(budget, abs=0.02)
    for low, high in zip(step.thresholds["input"], config.thresholds["input"]):
        assert sum(high) > sum(low), "what is read begins below the threshold"
    calibrate_budgets(folder, **settings)
    assert load_model(folder).config.threshold_ramp == 0.2, "kept, where nothing else is said"
    calibrate_budgets(folder, threshold_ramp=0, **settings)
    assert load_model(folder).config.thresholds == step.thresholds


@pytest.mark.parametrize("ramp", [1.0, -0.1, float("nan"), True])
def test_ramps_that_are_none(ramp, folder):
    before = (folder / "config.json").read_text()
    with pytest.raises(ValueError, match=r"`threshold_ramp` must be in \[0, 1\), found"):
        calibrate_budgets(folder, threshold_ramp=ramp, **FAST)
    with pytest.raises(ValueError, match=r"`threshold_ramp` needs sparsity inside experts, found 0.2"):
        calibrate_budgets(folder, threshold_ramp=0.2, lowest_density=1.0, **FAST)
    assert (folder / "config.json").read_text() == before


def test_densities_out_of_range(folder):
    with pytest.raises(ValueError, match=r"`lowest_density` must be in \[0.3, 1\], found 0.1"):
        calibrate_budgets(folder, lowest_density=0.1, **FAST)


def test_weights_are_not_touched(folder):
    before = (folder / "model.safetensors").read_bytes()
    calibrate_budgets(folder, budgets=(0.6,), **FAST)
    assert (folder / "model.safetensors").read_bytes() == before


def test_calibrating_again_replaces_the_budgets(folder):
    calibrate_budgets(folder, budgets=(0.6, 0.8), **FAST)
    first = load_model(folder).config.budgets
    calibrate_budgets(folder, budgets=(0.6,), **FAST)
    second = load_model(folder).config.budgets
    assert list(second) == ["0.6"]
    assert second["0.6"] == pytest.approx(first["0.6"], abs=0.02)


def test_failures_write_nothing(folder):
    before = (folder / "config.json").read_text()
    for budgets, message in (((0.05,), "out of reach"), ((1.0,), "out of reach"), ((0.6, 0.1), "out of reach")):
        with pytest.raises(ValueError, match=message):
            calibrate_budgets(folder, budgets=budgets, **FAST)
    model = load_model(folder)
    for layer in model.model.layers:
        layer.mlp.router.reset()
    untrained = folder.with_name("untrained")
    model.save_pretrained(untrained)
    tiny_tokenizer().save_pretrained(untrained)
    with pytest.raises(ValueError, match=r"cannot be reached.*dynamoe train"):
        calibrate_budgets(untrained, budgets=(0.6,), **FAST)
    assert (folder / "config.json").read_text() == before
    assert not (folder / "calibration.json").exists()
    assert json.loads((untrained / "config.json").read_text())["budgets"] == {}
