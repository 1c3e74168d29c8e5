"""benchmarks/mixtures.py on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import mixtures


@pytest.fixture
def tiny_shape(monkeypatch):
    shape = {"hidden_size": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    monkeypatch.setattr(mixtures, "QWEN3_30B_A3B", shape)


def test_a_layer_is_timed_at_half_of_its_weights(tiny_shape, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mixtures.py", "layer", "--rounds", "2", "--out", str(tmp_path)])
    mixtures.main()
    (path,) = tmp_path.glob("mixtures-layer_*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 16
    assert all(row["ratio"] > 0 for row in rows.values())
    for name, row in rows.items():
        if not name.startswith("1 token") and "half" in name:  # one token draws few widths
            assert row["share"] == pytest.approx(0.5, abs=0.01), name


def test_no_time_is_taken_where_numbers_differ(tiny_shape, monkeypatch):
    block = mixtures.nested_layer()
    with torch.no_grad():
        inputs = next(iter(mixtures.drawn(block, 8)))
        mixtures.check_parity(block.experts, inputs)
        monkeypatch.setattr(mixtures, "own", lambda experts, decide, x, *_: x)
        with pytest.raises(AssertionError, match="ours differs"):
            mixtures.check_parity(block.experts, inputs)
