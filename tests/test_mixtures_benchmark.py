"""benchmarks/mixtures.py on tiny shapes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_dense, tiny_tokenizer
from reference import assert_close


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import mixtures
from dense_to_mixture import activate, empty_mixture, fitted_router, make_mixture


@pytest.fixture
def tiny_shape(monkeypatch):
    shape = {"hidden_size": 16, "moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
    monkeypatch.setattr(mixtures, "QWEN3_30B_A3B", shape)


def test_a_layer_is_timed_at_half_of_its_weights(tiny_shape, tmp_path):
    mixtures.main(["--out", str(tmp_path), "layer", "--rounds", "2"])
    (path,) = tmp_path.glob("mixtures-layer_*.json")
    rows = json.loads(path.read_text())["found"]
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


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A tiny Llama wide enough for eight routed experts and a shared one, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("wide") / "llama"
    model = tiny_dense("llama", intermediate_size=192)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


def test_a_mixture_of_all_experts_is_the_dense_model(dense, token_ids):
    blocks = torch.randint(3, 128, (16, 32), generator=torch.Generator().manual_seed(0))
    mixture, routers = make_mixture(dense[1], blocks)
    with torch.no_grad():
        expected = dense[1](token_ids).logits
        assert_close("logits", mixture(token_ids).logits, expected, atol=1e-4)
        counts = []
        with mixtures.gated(mixture, lambda _, index: torch.arange(index.shape[1]) < 3, counts):
            fewer = mixture(token_ids).logits
        assert counts == [3 / 8] * 2 and not torch.allclose(fewer, expected, atol=0.1)
        activate(mixture, routers, 3)
        _, weight, index = mixture.model.layers[0].mlp.gate(torch.randn(200, 32))
    assert index.shape == (200, 3)
    assert_close("weights", weight * 8, torch.ones_like(weight), atol=0.5)


def test_the_fitted_router_chooses_what_is_large():
    generator = torch.Generator().manual_seed(0)
    x, hidden = torch.randn(500, 16, generator=generator), torch.randn(8, 16, generator=generator)
    size = (x @ hidden.t()).exp()
    chosen = (x @ fitted_router(x, size).t()).topk(2).indices
    assert size.gather(1, chosen).sum() > 0.8 * size.topk(2).values.sum()


def test_only_a_plain_llama_becomes_a_mixture():
    with pytest.raises(ValueError, match="cannot be held by Qwen2MoeForCausalLM"):
        empty_mixture(tiny_dense("qwen3", intermediate_size=192))


def test_pruning_leaves_out_the_experts_that_do_least(dense):
    blocks = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(0))
    mixture, routers = make_mixture(dense[1], blocks)
    with torch.no_grad():
        activate(mixture, routers, 4)
        for layer in mixture.model.layers:
            layer.mlp.experts.down_proj[5] = 0
        sizes = mixtures.sizes_of_outputs(mixture, blocks)
        places = mixtures.without_training(mixture, blocks, blocks)
    assert (sizes.argmin(1) == 5).all() and (sizes[:, 5] == 0).all()
    (whole, nll), (less, pruned) = places["pruned"][:2]
    assert whole == 1 and less < 1 and torch.allclose(nll, pruned), "nothing is lost without an expert that does nothing"
    assert [share for share, _ in places["top-k"]] == [1, 0.75, 0.5, 0.25]
    middle = mixtures.between(places["top-k"], 0.625)
    assert torch.allclose(middle, (places["top-k"][1][1] + places["top-k"][2][1]) / 2)
    assert mixtures.between(places["top-k"], 0.1) is None


def test_the_recipe_from_dense_to_a_table(dense, text_file, tmp_path, capsys, monkeypatch):
    texts = ["--text", str(text_file), "--held-out", str(text_file), "--block-size", "64"]
    few = ["--tokens", "2048", "--cluster-tokens", "1024", "--eval-tokens", "512"]
    command = ["--out", str(tmp_path), "smollm2", str(dense[0]), str(tmp_path / "work"), *texts, *few]
    mixtures.main(command)
    (path,) = tmp_path.glob("mixtures-smollm2_*.json")
    found = json.loads(path.read_text())["found"]
    assert found["mixture"]["active_share_of_dense"] == (32 + 6 * 20) / 192
    assert found["contenders"].keys() == {"top-k", "pruned", "ours", "ours, null"}
    for name, cells in found["contenders"].items():
        for share in ("1.0", "0.75", "0.5"):
            assert cells[share] is None or cells[share]["ratio_to_dense"] > 0
        if name.startswith("ours"):
            assert cells["reached at 0.75"] == pytest.approx(0.75, abs=0.1)
    assert capsys.readouterr().out.count("75%: ") == 4
    for name in ("make_mixture", "distil", "convert_model", "train_model"):  # what is finished is not done again
        monkeypatch.delattr(mixtures, name)
    mixtures.main(command)
    assert json.loads(path.read_text())["found"]["contenders"]["pruned"] == found["contenders"]["pruned"]
