"""Benchmarks: parity is asked first, rows are complete, limits are what bytes and FLOPs say."""

import json
from functools import partial
from itertools import product

import pytest
import torch
from conftest import tiny_dynamoe, tiny_tokenizer

from dynamoe_hf.benchmark import (
    bench_decode,
    bench_folder,
    bench_mlp,
    bench_prefill,
    decode_bytes,
    interleaved,
    machine,
    peak_memory,
)
from dynamoe_hf.cli import main
from dynamoe_hf.folder import load_model
from dynamoe_hf.modeling.dense_base import Projections


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "model"
    tiny_dynamoe(budgets={"0.6": 0.4}, dense_settings={"max_position_embeddings": 1024}).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def test_ratio_is_the_median_of_rounds(monkeypatch, tmp_path):
    clock = iter([0, 9, 0, 9, 0, 2, 0, 1, 0, 4, 0, 1, 0, 1, 0, 5])  # warm-up, then rounds of 2:1, 4:1, 1:5
    monkeypatch.setattr("dynamoe_hf.benchmark.RAPL", tmp_path)
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    row = interleaved({"dense": [lambda: None], "ours": [lambda: None]}, rounds=3)["ours"]
    assert row["ratio"] == 0.5
    assert row["range"] == [0.25, 5]
    assert "energy_ratio" not in row, "nothing counts energy here"


def test_runs_take_turns_step_by_step():
    order = []
    runs = {name: [lambda step=f"{name}{index}": order.append(step) for index in range(2)] for name in "ab"}
    interleaved(runs, rounds=1)
    assert order == ["a0", "b0", "a1", "b1"] * 2


def test_energy_where_the_processor_counts_it(monkeypatch, tmp_path):
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    counter.parent.mkdir()
    counter.write_text("1000")
    monkeypatch.setattr("dynamoe_hf.benchmark.RAPL", tmp_path)

    def use(energy):
        return lambda: counter.write_text(str(int(counter.read_text()) + energy))

    assert interleaved({"dense": [use(40)], "ours": [use(30)]}, rounds=2)["ours"]["energy_ratio"] == 0.75


@pytest.mark.parametrize(
    ("processor", "name"), [("AMD EPYC 7R13 Processor", "amd-epyc"), ("Intel(R) Xeon(R) Processor @ 2.60GHz", "intel-xeon")]
)
def test_a_machine_has_a_name_for_files(processor, name, monkeypatch):
    monkeypatch.setattr("dynamoe_hf.benchmark._cpu_info", lambda: ["flags\t: amx", f"model name\t: {processor}"])
    record = machine(threads=1)
    assert record["processor"] == processor
    assert record["name"].startswith(f"{name}_20")


def test_peak_memory():
    if peak_memory(lambda: None) is None:
        pytest.skip("this system does not tell a process its peak memory")
    torch.ones(10)  # what torch loads at its first call is not the call's
    small, large = (peak_memory(lambda size=size: torch.ones(size).sum()) for size in (2**18, 2**24))
    assert large == pytest.approx(4 * 2**24, rel=0.1)
    assert small < 2**22


def test_a_folder(folder, monkeypatch):
    monkeypatch.setattr("dynamoe_hf.benchmark.TOKENS", (1, 4))
    monkeypatch.setattr("dynamoe_hf.benchmark.SHAPES", {"tiny": (32, 64)})
    monkeypatch.setattr("dynamoe_hf.benchmark.COLD_BYTES", 2**16)
    monkeypatch.setattr("dynamoe_hf.benchmark.BATCHES", (1, 8))
    monkeypatch.setattr("dynamoe_hf.benchmark.PROMPTS", (32, 64))
    record = bench_folder(folder, rounds=1, new_tokens=4, shapes=["tiny"], shares=[0.7])
    assert json.loads((folder / "benchmark.json").read_text()) == record
    assert record["parity"]["largest_relative_difference"] < 1e-5
    settings = ["budget 0.6", "full width", "share 0.7"]
    assert [(row["batch"], row["setting"]) for row in record["decode"]] == list(product((1, 8), settings))
    assert [(row["tokens"], row["setting"]) for row in record["prefill"]] == list(product((32, 64), settings))
    assert all(row["peak_bytes"] is None or row["peak_bytes"] >= 0 for row in record["generate"])
    for row in record["mlp"] + record["decode"] + record["prefill"] + record["generate"]:
        assert row["reached"] == pytest.approx(row["limit"] / row["ratio"])
        assert 0 < row["share"] <= 1
    full = [row for row in record["decode"] + record["prefill"] + record["generate"] if row["setting"] == "full width"]
    assert all(row["limit"] == 1 and row["share"] == 1 for row in full)


def test_limits(folder):
    model = load_model(folder)
    tokens = torch.randint(3, 128, (2, 40))
    rows = bench_decode(model, tokens, {"a": 0.4}, new_tokens=4, rounds=1)
    total, mlp, router = decode_bytes(model)
    assert mlp == 4 * 2 * 3 * 32 * 64
    assert total == 4 * sum(p.numel() for n, p in model.named_parameters() if "router" not in n and "embed_tokens" not in n)
    assert (total - (1 - rows[0]["share"]) * mlp + router) / total <= rows[0]["limit"] + 1e-9, (
        "a batch pays for its hardest token"
    )
    prefill = bench_prefill(model, tokens, {"a": 0.4, "full": 1.0}, rounds=1)
    assert prefill[0]["limit"] < prefill[1]["limit"] == 1


def test_the_dial_where_the_timed_text_takes_a_share(folder):
    """Beside the calibrated marks, and on the decoded tokens, or the prompt, themselves."""
    model, tokens = load_model(folder), torch.randint(3, 128, (4, 40), generator=torch.Generator().manual_seed(0))
    for bench in (partial(bench_decode, new_tokens=8), bench_prefill):
        at_budget, at_share = bench(model, tokens, {"a": 0.4}, rounds=1, shares=(0.6,))
        assert at_budget["setting"] == "a"
        assert at_share["setting"] == "share 0.6"
        assert 0.6 <= at_share["share"] < 0.65
        again = bench(model, tokens, {"b": at_share["sensitivity"]}, rounds=1)[0]
        assert again["share"] == at_share["share"]
        assert again["limit"] == at_share["limit"]


def test_a_share_out_of_reach(folder, monkeypatch):
    monkeypatch.setattr(
        "dynamoe_hf.benchmark.interleaved", lambda *args: pytest.fail("timed before the shares were looked at")
    )
    with pytest.raises(
        ValueError, match=r"share=0.2 is out of reach: the smallest experts read 0.25 of .* Choose shares between"
    ):
        bench_folder(folder, shares=(0.5, 0.2))


def test_shares_without_a_dial(tmp_path):
    tiny_dynamoe(router_type="argmax").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="argmax router has no dial.*for shares"):
        bench_folder(tmp_path, shares=(0.5,))


def test_compiled_decoding(folder, monkeypatch):
    """The same steps, both sides compiled whole, with static caches."""
    backends, original = [], torch.compile

    def compile(run, **options):
        backends.append(options)
        return original(run, backend="aot_eager", **options)

    monkeypatch.setattr("torch.compile", compile)
    torch._dynamo.reset()
    rows = bench_decode(
        load_model(folder), torch.randint(3, 128, (1, 20)), {"a": 0.4, "full": 1.0}, new_tokens=4, rounds=1, compile=True
    )
    assert [row["setting"] for row in rows] == ["a", "full"]
    assert backends == [{"fullgraph": True}] * 4  # each setting beside a dense side of its own
    bench_decode(load_model(folder), torch.randint(3, 128, (1, 20)), {"a": 0.4}, 4, 1, compile=True, int8=True)
    assert len(backends) == 6


def test_int8_decoding(folder, capsys, monkeypatch):
    """The packed model against the dense one in its own dtype; the limit is that of bytes, and the command shows it."""
    tokens, model = torch.randint(3, 128, (1, 20)), load_model(folder)
    total, mlp, router = decode_bytes(model)
    rows = bench_decode(model, tokens, {"a": 0.4, "full": 1.0}, new_tokens=4, rounds=1, int8=True)
    assert all(mlp.packed is not None for mlp in model.nested_mlps)
    assert rows[1]["limit"] == 1 / 4
    assert rows[0]["limit"] == pytest.approx(((total - (1 - rows[0]["share"]) * mlp) / 4 + router) / total)
    monkeypatch.setattr("dynamoe_hf.benchmark.TOKENS", (1,))
    monkeypatch.setattr("dynamoe_hf.benchmark.SHAPES", {"tiny": (32, 64)})
    monkeypatch.setattr("dynamoe_hf.benchmark.COLD_BYTES", 2**16)
    monkeypatch.setattr("dynamoe_hf.benchmark.BATCHES", (1,))
    monkeypatch.setattr("dynamoe_hf.benchmark.PROMPTS", (32,))
    assert main(["bench", str(folder), "--shapes", "tiny", "--rounds", "1", "--new-tokens", "2", "--int8"]) == 0
    assert "decode, int8, budget 0.6" in capsys.readouterr().out
    assert [row["setting"] for row in json.loads((folder / "benchmark.json").read_text())["int8"]] == [
        "budget 0.6",
        "full width",
    ]


def test_single_mlp_cases(monkeypatch):
    monkeypatch.setattr("dynamoe_hf.benchmark.COLD_BYTES", 2**16)
    rows = bench_mlp(32, 64, tokens=(1, 3), rounds=1)
    assert [(row["tokens"], row["case"]) for row in rows] == [(1, "forced")] * 3 + [(3, "mixed")]
    assert [row["limit"] for row in rows[:3]] == [0.25, 0.5, 0.75]


def test_a_dtype_of_its_own(folder, monkeypatch, capsys):
    monkeypatch.setattr("dynamoe_hf.benchmark.TOKENS", (1, 4))
    monkeypatch.setattr("dynamoe_hf.benchmark.SHAPES", {"tiny": (32, 64)})
    monkeypatch.setattr("dynamoe_hf.benchmark.COLD_BYTES", 2**16)
    monkeypatch.setattr("dynamoe_hf.benchmark.BATCHES", (1,))
    monkeypatch.setattr("dynamoe_hf.benchmark.PROMPTS", (32,))
    computed, original = set(), Projections.output

    def output(self, hidden):
        computed.update((hidden.dtype, self.down.dtype))
        return original(self, hidden)

    monkeypatch.setattr(Projections, "output", output)
    assert main(["bench", str(folder), "--dtype", "bfloat16", "--shapes", "tiny", "--rounds", "1", "--new-tokens", "2"]) == 0
    assert "bfloat16" in capsys.readouterr().out
    assert json.loads((folder / "benchmark.json").read_text())["machine"]["dtype"] == "bfloat16"
    assert computed == {torch.bfloat16}


def test_an_unknown_shape(folder):
    with pytest.raises(ValueError, match="Unknown shapes Huge"):
        bench_folder(folder, shapes=["SmolLM2-135M", "Huge"])


@pytest.mark.parametrize("wrong", ["bflot16", "nn"])
def test_a_dtype_that_is_none(folder, wrong, capsys):
    assert main(["bench", str(folder), "--dtype", wrong]) == 1
    assert f"no such dtype: found {wrong!r}" in " ".join(capsys.readouterr().err.split())


def test_nothing_is_timed_where_parity_fails(folder, monkeypatch):
    monkeypatch.setattr("dynamoe_hf.benchmark.dense_prefix", lambda model, width: tiny_dynamoe(seed=3))
    monkeypatch.setattr("dynamoe_hf.benchmark.interleaved", lambda *args: pytest.fail("timed before parity"))
    with pytest.raises(ValueError, match="does not equal its dense base"):
        bench_folder(folder)
