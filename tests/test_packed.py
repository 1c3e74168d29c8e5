"""Packed weights: int8 and bfloat16 rows, and oneDNN's layout, compute what the same numbers compute, for few tokens and for many."""

import copy

import pytest
import torch
from conftest import run_mlp, tiny_dynamoe
from reference import assert_close, in_a_gap, sparse_mlp
from test_sparsity import PATH, TABLE

from dynamoe_hf.modeling import onednn_weights, packed_weights
from dynamoe_hf.modeling.mlp_backends import Call, Decision, choose_execution
from dynamoe_hf.modeling.onednn_weights import EXACT_ROWS, OneDnnLinear, block_ends
from dynamoe_hf.modeling.packed_weights import FEW_TOKENS, PackedLinear, Tables, pack_rows, row_sums, unpack_rows
from dynamoe_hf.modeling.sparsity import Thresholds


FAMILIES = {
    "gated": ("llama", {}),
    "gated with biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "fused": ("phi3", {}),
    "without a gate, with biases": ("starcoder2", {}),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    """Several chunks, parts and blocks in tiny models."""
    monkeypatch.setattr(packed_weights, "SMALLEST_CHUNK", 8)
    monkeypatch.setattr(onednn_weights, "SMALLEST_BLOCK", 32 * 3 * 20)
    monkeypatch.setattr(packed_weights, "PART", 16)
    monkeypatch.setattr(packed_weights, "BLOCK", 32)


def model(family="gated", **settings):
    name, dense_settings = FAMILIES[family]
    settings = {"thresholds": TABLE, "density_path": PATH, **settings}
    return tiny_dynamoe(name, dense_settings=dense_settings, **settings)


def plain(mlp):
    """A copy of a packed MLP with the numbers of its tables as float32 weights."""
    unpacked = copy.deepcopy(mlp)
    unpacked.packed = None
    for name in mlp.layout.projections:
        packed = getattr(mlp, name)
        linear = torch.nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        linear.weight.data = packed.weight.float()
        if packed.bias is not None:
            linear.bias.data = packed.bias.float()
        setattr(unpacked, name, linear)
    return unpacked


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
def test_a_table_sums_its_rows(kind):
    torch.manual_seed(0)
    rows = torch.randn(12, 24)
    packed = pack_rows(rows, kind)
    largest, dense = rows.abs().max().item(), unpack_rows(packed).float()
    assert_close("rows", dense, rows, atol=largest / 100)
    indices, weights = torch.tensor([3, 5, 7, 0, 1]), torch.randn(5)
    expected = torch.stack([weights[:2] @ dense[[3, 5]], weights[2:] @ dense[[7, 0, 1]]])
    assert_close("sums", row_sums(packed, indices, torch.tensor([0, 2]), weights), expected, atol=0.02 * largest, rtol=0.02)


@pytest.mark.parametrize("ramp", [None, 0.0, 0.2], ids=["dense experts", "thresholds", "thresholds with a ramp"])
@pytest.mark.parametrize("widths", [(0.25, 0.5, 0.75, 1), (0, 0.3, 1), (1,)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["int8", "onednn"])
def test_every_token_reads_its_prefix(kind, family, widths, ramp):
    """Against the plain loop on the very numbers of the tables."""
    mlp = model(family, expert_widths=list(widths)).model.layers[1].mlp
    mlp.pack(kind)
    reference = plain(mlp)
    torch.manual_seed(0)
    for tokens in (1, 3, FEW_TOKENS, FEW_TOKENS + 5, 2 * EXACT_ROWS + 5):
        x, thresholds = torch.randn(1, tokens, 32), None
        if ramp is not None:
            least_input = in_a_gap(x, 0.2, 0.6)
            kept = x * (x.abs() >= least_input)
            thresholds = Thresholds(least_input, in_a_gap(reference.hidden(kept), 0.2, 1.0), ramp)
        for number, expert in enumerate((torch.arange(tokens).view(1, -1) % len(widths), len(widths) - 1, 0)):
            mlp.packed.skips = bool(number)  # of `Tables` alone
            own = torch.full((tokens,), expert) if isinstance(expert, int) else expert[0]
            least = [torch.full((tokens,), value) for value in (thresholds or (0.0, 0.0))[:2]]
            with torch.no_grad():
                y = run_mlp(mlp, x, expert, thresholds=thresholds)
                expected, _ = sparse_mlp(reference, x[0], own, *least, ramp=ramp or 0.0)
            assert_close(f"{tokens} tokens", y[0], expected, atol=1e-4 * expected.abs().max().item() + 1e-6)


@pytest.mark.parametrize("pays", [True, False])
def test_rows_are_skipped_where_that_is_faster(pays, monkeypatch):
    """Measured once a model; the numbers are the same to rounding."""
    clock, run = [0.0], Tables.run

    def timed(tables, *args):
        clock[0] += 1.0 if tables.skips == pays else 2.0
        return run(tables, *args)

    monkeypatch.setattr(Tables, "run", timed)
    monkeypatch.setattr(packed_weights.time, "perf_counter", lambda: clock[0])
    packed = model().pack("int8")
    assert all(mlp.packed.skips == pays for mlp in packed.nested_mlps)


@pytest.mark.parametrize("kind", ["int8", "bfloat16", "onednn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_is_near_the_float_one(family, kind, token_ids):
    """A prompt, and then token by token: both near the float model, and int8 the same both ways."""
    float_model, packed = model(family), model(family).pack(kind)
    for dial in (1.0, 0.5, torch.tensor([0.4, 0.9])):
        with torch.no_grad():
            expected = float_model(token_ids, sensitivity=dial).logits
            whole = packed(token_ids, sensitivity=dial).logits
            cache, steps = None, []
            for step in token_ids.split(1, dim=1):
                out = packed(step, past_key_values=cache, use_cache=True, sensitivity=dial)
                cache = out.past_key_values
                steps.append(out.logits)
        if isinstance(dial, float):  # else rounding may turn a choice of these wild routers
            assert (torch.cat(steps, 1) - expected).norm() < 0.2 * expected.norm()
            assert (whole - expected).norm() < 0.05 * expected.norm()
        if kind == "onednn":
            assert_close("whole", whole, expected, atol=1e-4 * expected.abs().max().item())
        if kind != "bfloat16" and isinstance(dial, float) and dial == 1:  # below, rounding may take a value across a threshold
            assert_close("step by step", torch.cat(steps, 1), whole, atol=1e-4 * expected.abs().max().item())


def test_generate_and_records(token_ids):
    packed = model().pack()
    with packed.routing(records=[]) as routing:
        tokens = packed.generate(token_ids, max_new_tokens=4, sensitivity=0.5)
    assert tokens.shape == (2, 16)
    assert all(0 < record.share.max() < 1 for record in routing.records)


def test_packed_weights_are_for_inference():
    mlp, x = model().model.layers[1].mlp, torch.randn(1, 3, 32)
    mlp.pack("int8")
    with torch.no_grad():
        assert choose_execution(Call(x, Decision(2), mlp.weights(x))).name == "packed"
    assert choose_execution(Call(x, Decision(2), mlp.weights(x))).name == "prefix"


def test_float_weights_are_gone(token_ids, tmp_path):
    packed = model().pack()
    names = [name for name, _ in packed.named_parameters()]
    assert not [name for name in names if "_proj" in name or "lm_head" in name]
    assert isinstance(packed.lm_head, PackedLinear) and isinstance(packed.model.layers[0].self_attn.q_proj, PackedLinear)
    assert [name for name in names if ".router." in name], "routers stay as they are"
    with pytest.raises(ValueError, match=r"cannot be saved.*Copy the folder"):
        packed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be packed.*packed already"):
        packed.pack()
    with pytest.raises(ValueError, match=r"kind of packing is unknown: found 'int3'"):
        model().pack("int3")


@pytest.mark.parametrize("kind", ["int8", "onednn"])
def test_labels_of_a_packed_model(kind, token_ids):
    """What needs all neurons, such as the true difficulty, takes the numbers of the tables."""
    packed = model().pack(kind)
    with torch.no_grad(), packed.routing(route="label", records=[]) as routing:
        packed(token_ids, sensitivity=0.5)
    for record, mlp in zip(routing.records, packed.nested_mlps):
        assert record.profile.shape == (2, 12, len(mlp.widths))
        assert torch.equal(record.expert, record.label)


@pytest.mark.parametrize("tokens", [1, FEW_TOKENS + 1])
@pytest.mark.parametrize("kind", ["int8", "onednn"])
def test_what_is_not_a_number_is_seen(kind, tokens):
    """A threshold must not hide a broken input."""
    mlp, x = model().model.layers[1].mlp, torch.randn(1, tokens, 32)
    mlp.pack(kind)
    x[0, 0, 3] = float("nan")
    with torch.no_grad():
        assert run_mlp(mlp, x, 3, thresholds=Thresholds(0.4, 0.5))[0, 0].isnan().all()


def test_widths_without_a_common_chunk():
    """One chunk, cut behind the product: the same numbers."""
    mlp = model(expert_widths=[0.3, 0.7, 1]).model.layers[1].mlp
    mlp.pack("int8")
    assert mlp.packed.chunk == 64
    x = torch.randn(1, 2, 32)
    with torch.no_grad():
        y, expected = run_mlp(mlp, x, torch.tensor([[0, 1]])), run_mlp(plain(mlp), x, torch.tensor([[0, 1]]))
    assert_close("output", y, expected, atol=1e-4 * expected.abs().max().item())


DIALS = {"full width": 1.0, "routed": 0.5, "of each sequence": torch.tensor([0.4])}


@pytest.mark.parametrize(
    ("kind", "dial", "settings", "skips", "fullgraph"),
    [
        *((kind, dial, {}, True, True) for kind in ("int8", "bfloat16", "onednn") for dial in DIALS),
        *((kind, dial, {"threshold_ramp": 0.2}, True, True) for kind in ("int8", "onednn") for dial in DIALS),
        ("int8", "routed", {}, False, True),
        ("int8", "routed", {}, True, False),
        ("int8", "routed", {"expert_widths": [0, 0.25, 1]}, True, True),
        ("int8", "routed", {"expert_widths": [0.3, 0.7, 1]}, True, True),  # without a common chunk
    ],
)
def test_compiled(kind, dial, settings, skips, fullgraph, token_ids, monkeypatch):
    monkeypatch.setattr(packed_weights, "skipping_pays", lambda tables: skips)
    packed, step, dial = model("gated with biases", **settings).pack(kind), token_ids[:1, :1], DIALS[dial]
    torch._dynamo.reset()
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=fullgraph)
    with torch.no_grad():
        expected = packed(step, sensitivity=dial, use_cache=False).logits
        logits = compiled(step, sensitivity=dial, use_cache=False).logits
    assert_close("logits", logits, expected, atol=1e-4 * expected.abs().max().item())


def test_laid_out_in_the_models_own_dtype(token_ids):
    """bfloat16 is refused where the processor has none; copies of what never changes share it."""
    packed = model().pack("onednn")
    assert isinstance(packed.lm_head, OneDnnLinear)
    assert torch.equal(packed.lm_head.weight, model().lm_head.weight)
    again = copy.deepcopy(packed)
    with torch.no_grad():
        assert torch.equal(again(token_ids, sensitivity=0.5).logits, packed(token_ids, sensitivity=0.5).logits)
    with pytest.raises(ValueError, match=r"cannot be laid out for oneDNN: found torch.float16"):
        model().half().pack("onednn")


def test_blocks_end_at_widths_and_are_worth_their_calls(monkeypatch):
    monkeypatch.setattr(onednn_weights, "SMALLEST_BLOCK", 1000)
    assert block_ends([16, 32, 48, 64], 100) == [16, 32, 48, 64]
    assert block_ends([16, 32, 48, 64], 40) == [32, 64]
    assert block_ends([0, 5, 64], 100) == [64]
    assert block_ends([16, 32, 60, 64], 40) == [32, 64]
    assert block_ends([4, 8], 1) == [8]
