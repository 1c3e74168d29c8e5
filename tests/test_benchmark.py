"""Benchmarks: parity is asked first, rows are complete, limits are what bytes and FLOPs say."""

import json

import pytest
import torch
from conftest import tiny_tokenizer
from test_modeling import tiny_dynamoe

from dynamoe_hf.benchmark import _bytes, bench_decode, bench_folder, bench_mlp, bench_prefill, paired
from dynamoe_hf.folder import load_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "model"
    tiny_dynamoe(budgets={"0.6": 0.4}, dense_settings={"max_position_embeddings": 1024}).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_ratio_is_the_median_of_pairs(monkeypatch):
    clock = iter([0, 9, 0, 9, 0, 2, 0, 1, 0, 4, 0, 1, 0, 1, 0, 5])  # warm-up, then pairs 2:1, 4:1, 1:5
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    row = paired(lambda: None, lambda: None, rounds=3)
    assert row["ratio"] == 0.5
    assert row["range"] == [0.25, 5]


def test_a_folder(folder, monkeypatch):
    monkeypatch.setattr("dynamoe_hf.benchmark.TOKENS", (1, 4))
    monkeypatch.setattr("dynamoe_hf.benchmark.SHAPES", {"tiny": (32, 64)})
    record = bench_folder(folder, rounds=1, new_tokens=4, shapes=["tiny"])
    assert json.loads((folder / "benchmark.json").read_text()) == record
    assert record["parity"]["largest_relative_difference"] < 1e-5
    assert [(row["setting"], row["batch"]) for row in record["decode"]] == [
        ("budget 0.6", 1), ("full width", 1), ("budget 0.6", 8), ("full width", 8)
    ]  # fmt: skip
    for row in record["mlp"] + record["decode"] + record["prefill"]:
        assert row["reached"] == pytest.approx(row["limit"] / row["ratio"])
        assert 0 < row["share"] <= 1
    full = [row for row in record["decode"] + record["prefill"] if row["setting"] == "full width"]
    assert all(row["limit"] == 1 and row["share"] == 1 for row in full)


def test_limits(folder):
    model = load_model(folder)
    tokens = torch.randint(3, 128, (2, 40))
    rows = bench_decode(model, tokens, {"a": 0.4}, new_tokens=4, rounds=1)
    total, mlp, router = _bytes(model)
    assert mlp == 4 * 2 * 3 * 32 * 64
    assert total == 4 * sum(p.numel() for n, p in model.named_parameters() if "router" not in n and "embed_tokens" not in n)
    assert (total - (1 - rows[0]["share"]) * mlp + router) / total <= rows[0]["limit"] + 1e-9, (
        "a batch pays for its hardest token"
    )
    prefill = bench_prefill(model, tokens, {"a": 0.4, "full": 1.0}, rounds=1)
    assert prefill[0]["limit"] < prefill[1]["limit"] == 1


def test_single_mlp_cases():
    rows = bench_mlp(32, 64, tokens=(1, 3), rounds=1)
    assert [(row["tokens"], row["case"]) for row in rows] == [(1, "forced")] * 3 + [(3, "mixed")]
    assert [row["limit"] for row in rows[:3]] == [0.25, 0.5, 0.75]


def test_nothing_is_timed_where_parity_fails(folder, monkeypatch):
    monkeypatch.setattr("dynamoe_hf.benchmark.dense_prefix", lambda model, width: tiny_dynamoe(seed=3))
    monkeypatch.setattr("dynamoe_hf.benchmark.paired", lambda *args: pytest.fail("timed before parity"))
    with pytest.raises(ValueError, match="does not equal its dense base"):
        bench_folder(folder)
