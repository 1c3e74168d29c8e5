"""
Every row of the table of executions equals the plain loop: outputs and gradients, dtypes, biases, layouts, null experts. And each is
chosen where its row says. `make test-triton` adds the Triton kernels, under their interpreter.
"""

import pytest
import torch
from conftest import run_mlp, tiny_dynamoe
from reference import assert_close, gated_mlp, nested_mlp, sparse_mlp
from torch import nn

from dynamoe_hf.modeling import mlp_backends
from dynamoe_hf.modeling.dense_base import Projections
from dynamoe_hf.modeling.mlp_backends import EXECUTIONS, Call, Costs, Decision, Weights, choose_execution, staircase_blocks
from dynamoe_hf.modeling.nested_mlp_triton import INTERPRETED, TRITON
from dynamoe_hf.modeling.sparsity import Thresholds


LAYOUTS = {
    "gated": ("llama", {}),
    "gated with biases": ("llama", {"mlp_bias": True}),
    "fused": ("phi3", {}),
    "without a gate, with biases": ("starcoder2", {}),
    # relu needs its own output in backward, which must not be masked in place
    "relu": ("starcoder2", {"hidden_act": "relu"}),
    "gelu": ("gemma2", {}),
}
RUNS = {row.name: row.run for row in EXECUTIONS}
ELSEWHERE = {"packed", "sparse triton"}  # need weights in another form: test_packed.py, test_triton.py
NAMES = [
    pytest.param(name, marks=[pytest.mark.triton]) if name == "triton" else name
    for name in dict.fromkeys(RUNS)
    if name not in ELSEWHERE
]
WITHOUT_GRADIENT = {"sliced", "operator"}  # of compiled graphs, chosen where no gradient is asked for
ONE_TOKEN = {"sliced"}
ONE_WIDTH = {"dense", "prefix"}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def fix_costs(monkeypatch, product, block):
    """Whatever the processor."""
    monkeypatch.setattr(mlp_backends, "costs_of", lambda weight: Costs(product, block))


def layer(layout="gated", widths=(0.25, 0.5, 0.75, 1), dtype=torch.float32, **settings):
    family, dense_settings = LAYOUTS[layout]
    model = tiny_dynamoe(family, expert_widths=list(widths), dense_settings=dense_settings, **settings).to(dtype)
    return model.model.layers[1].mlp


def cases(name, tokens, widths):
    """Routes for an execution: what it must be right for."""
    experts = len(widths)
    if name == "dense":
        return {"full width": experts - 1}
    if name == "prefix":
        return {"an index": 0, "all alike": torch.full((1, tokens), experts - 1)}
    mixed = torch.arange(tokens).view(1, -1).flip(-1) % experts
    if name == "staircase" and widths[0] == 0:
        return {"mixed": mixed}  # tokens that all take nothing are the prefix of nothing
    return {"mixed": mixed, "smallest": torch.zeros(1, tokens, dtype=torch.long)}


def run_row(name, mlp, x, expert, gates=None, thresholds=None):
    """One row of the table, with the shape of call that it is chosen for."""
    weights, settings = mlp.weights(x), {"gates": gates, "thresholds": thresholds}
    if name == "triton":
        weights = weights._replace(triton=True)
    if name in WITHOUT_GRADIENT:
        # Called as the compiled graph calls it: by the plain tensors.
        with torch.no_grad():
            if name == "sliced":
                fixed = torch.compile(
                    lambda x, expert: run_mlp(mlp, x, expert, **settings), backend="aot_eager", fullgraph=True
                )
                torch._dynamo.reset()
                return fixed(x, expert)
            return RUNS[name](Call(x, Decision(expert, **settings), weights))
    return RUNS[name](Call(x, Decision(expert, **settings), weights))


def with_gradients(mlp, x, run):
    """Output and gradients of x and of all parameters that `run` uses."""
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    y = run(x)
    (y * (torch.arange(y.numel(), device=y.device) % 7 - 3).view_as(y)).sum().backward()
    found = {f"gradient of {n}": p.grad.clone() for n, p in mlp.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "gradient of x": x.grad, **found}


def assert_same(name, actual, expected, dtype):
    for key, value in expected.items():
        if key in actual:
            scale = value.abs().max().item()
            close = {"atol": TOLERANCE[dtype] * scale + 1e-7, "rtol": TOLERANCE[dtype]}
            assert_close(f"{key}, {name}", actual[key].double(), value.double(), **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", [(0.25, 0.5, 0.75, 1), (0, 0.3, 1), (1,)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_execution_equals_the_plain_loop(name, layout, widths, dtype, monkeypatch, request):
    if name == "triton":
        if not (INTERPRETED or TRITON and torch.cuda.is_available()):
            pytest.skip("needs Triton, and TRITON_INTERPRET=1 or a GPU")
        request.getfixturevalue("bfloat16_products")
    fix_costs(monkeypatch, 0, 0)  # a block of the staircase for each width
    tokens = 1 if name in ONE_TOKEN else 9
    mlp = layer(layout, widths, dtype)
    device = "cuda" if name == "triton" and not INTERPRETED else "cpu"
    mlp.to(device)
    torch.manual_seed(0)
    x = torch.randn(1, tokens, 32).to(device, dtype)
    for case, expert in cases(name, tokens, widths).items():
        expert = expert.to(device) if isinstance(expert, torch.Tensor) else expert
        label = f"{name}, {case}"
        own = expert if isinstance(expert, torch.Tensor) else torch.full((1, tokens), expert, device=device)
        if name == "gated":
            gates = (torch.arange(len(widths)) <= own[..., None]).to(dtype) * 0.75
            actual = with_gradients(mlp, x, lambda x, o=own, g=gates: run_row(name, mlp, x, o, g))
            expected = with_gradients(mlp.double(), x.double(), lambda x, g=gates: gated_mlp(mlp, x[0], g[0].double())[None])
        elif name in WITHOUT_GRADIENT:
            actual = {"output": run_row(name, mlp, x, own)}
            expected = {"output": nested_mlp(mlp.double(), x[0].double(), own[0])[None].detach()}
        else:
            actual = with_gradients(mlp, x, lambda x, e=expert: run_row(name, mlp, x, e))
            expected = with_gradients(mlp.double(), x.double(), lambda x, o=own: nested_mlp(mlp, x[0], o[0])[None])
        mlp.to(dtype)
        assert actual["output"].dtype == dtype
        assert_same(label, actual, expected, dtype)
        if name not in WITHOUT_GRADIENT | {"gated"}:
            with torch.no_grad():
                y = run_row(name, mlp, x, expert)
            assert_same(f"{label}, no gradient", {"output": y}, expected, dtype)


SPARSE = {
    "numbers": Thresholds(0.4, 0.5),
    "of each sequence": Thresholds(torch.tensor([0.2, 0.7]).view(2, 1, 1), torch.tensor([1.0, 0.3]).view(2, 1, 1)),
}
SPARSE |= {f"{name}, with a ramp": thresholds._replace(ramp=0.3) for name, thresholds in SPARSE.items()}


@pytest.mark.parametrize("thresholds", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("widths", [(0.25, 0.5, 0.75, 1), (0, 0.3, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "triton" and name not in ELSEWHERE])
def test_every_execution_leaves_out_what_is_small(name, layout, widths, thresholds, monkeypatch):
    fix_costs(monkeypatch, 0, 0)
    mlp = layer(layout, widths).double()
    single = name in ONE_TOKEN
    if isinstance(thresholds.input, torch.Tensor) and (single or name == "operator"):
        pytest.skip("is chosen for one threshold alone")
    torch.manual_seed(0)
    x = torch.randn(1, 1, 32).double() if single else torch.randn(2, 5, 32).double()
    of_each = [torch.as_tensor(value).double().expand(*x.shape[:2], 1).flatten() for value in thresholds[:2]]
    for case, expert in cases(name, x.shape[0] * x.shape[1], widths).items():
        own = torch.full(x.shape[:2], expert) if isinstance(expert, int) else expert.view(x.shape[:2])
        expert = own if isinstance(expert, torch.Tensor) else expert
        gates = None
        if name == "gated":
            gates = (torch.arange(len(widths)) <= own[..., None]).double() * 0.75
        flat = None if gates is None else gates.flatten(0, 1)

        def plain(x, own=own, flat=flat):
            return sparse_mlp(mlp, x.flatten(0, 1), own.flatten(), *of_each, flat, thresholds.ramp)[0].view_as(x)

        if name in WITHOUT_GRADIENT:
            actual, expected = {"output": run_row(name, mlp, x, expert, gates, thresholds)}, {"output": plain(x).detach()}
        else:
            actual = with_gradients(mlp, x, lambda x, e=expert, g=gates: run_row(name, mlp, x, e, g, thresholds))
            expected = with_gradients(mlp, x, plain)
            assert actual.keys() == expected.keys()
        assert_same(f"{name}, {case}", actual, expected, torch.float32)


def test_the_table_names_its_reasons():
    assert {row.name for row in EXECUTIONS} == set(RUNS)
    assert all(row.why and len(row.why) > 20 for row in EXECUTIONS)
    assert EXECUTIONS[-1].when(None), "the last row takes what is left"


def chosen(mlp, tokens, expert=None, **decision):
    x = torch.randn(1, tokens, 32)
    expert = torch.arange(tokens).view(1, -1) % 4 if expert is None else expert
    return choose_execution(Call(x, Decision(expert, **decision), mlp.weights(x))).name


def test_when_each_execution_is_chosen(monkeypatch):
    mlp = layer().eval()
    fix_costs(monkeypatch, 10_000, 10_000)
    assert chosen(mlp, 1) == chosen(mlp, 3, 2) == chosen(mlp, 3, torch.full((1, 3), 2)) == "prefix"
    assert chosen(mlp, 3) == "few"
    assert chosen(mlp, 40) == "staircase"
    assert chosen(mlp, 40, 3) == "dense"
    hidden = mlp.hidden(torch.randn(1, 40, 32))
    assert chosen(mlp, 40, hidden=hidden) == "masked"
    assert chosen(mlp, 40, gates=torch.ones(1, 40, 4)) == "gated"
    assert chosen(mlp.train(), 40) == "masked"
    fix_costs(monkeypatch, 0, 10**12)
    assert chosen(mlp.eval(), 40) == "few", "one block is one product"


def hooked(module):
    return module.register_forward_hook(lambda *args: None)


@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "down_proj"])
def test_hooks_fire_in_every_mode(where, token_ids):
    """A projection with hooks is called as a module, whatever else would be faster."""
    model, seen = tiny_dynamoe(), []
    module = getattr(model.model.layers[1].mlp, where)
    expected = {ids.shape: model(ids, sensitivity=0.4).logits for ids in (token_ids, token_ids[:1, :1])}
    for register in (module.register_forward_hook, module.register_forward_pre_hook, module.register_full_backward_hook):
        handle = register(lambda *args: seen.append(1))
        for ids in (token_ids, token_ids[:1, :1], token_ids[:2, :1]):
            seen.clear()
            logits = model(ids, sensitivity=0.4).logits
            if register == module.register_full_backward_hook:
                logits.sum().backward()
            assert seen, f"{register.__name__} on {ids.shape}"
            if ids.shape in expected:
                assert_close("logits", logits, expected[ids.shape])
        handle.remove()


@pytest.mark.parametrize("train", [False, True])
def test_hooks_on_routers_fire_in_every_mode(train, token_ids):
    model, seen = tiny_dynamoe().train(train), []
    mlp = model.model.layers[1].mlp
    for module in (mlp.router, mlp.router.input, mlp.router.output):
        handle = module.register_forward_hook(lambda *args: seen.append(1))
        for ids in (token_ids, token_ids[:1, :1]):
            seen.clear()
            with torch.no_grad():
                model(ids, sensitivity=0.4)
            assert seen
        handle.remove()


def test_a_patched_projection_is_called():
    """Libraries replace `forward` of a module; what they put there counts."""
    mlp = layer()
    x, expert = torch.randn(1, 3, 32), torch.tensor([[0, 1, 2]])
    before = run_mlp(mlp, x, expert)
    mlp.up_proj.forward = lambda x: nn.functional.linear(x, mlp.up_proj.weight) * 2
    assert_close("twice", run_mlp(mlp, x, expert), 2 * before)


@pytest.mark.parametrize("smallest_block", [0, 5000, 10**9], ids=["a block each", "some merged", "one block"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", [[0.25, 0.5, 0.75, 1], [0, 0.3, 1], [1]], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 12, 40])
def test_mlp_equals_the_plain_loop(layout, widths, tokens, smallest_block, monkeypatch):
    """Through `run_experts`, as a model calls it, in evaluation and in training."""
    fix_costs(monkeypatch, 0 if smallest_block < 10**9 else 15_000_000, smallest_block)
    mlp = layer(layout, widths)
    torch.manual_seed(tokens)
    x = torch.randn(1, tokens, 32)
    experts = {"mixed": torch.randint(len(widths), (1, tokens)), "smallest": torch.zeros(1, tokens, dtype=torch.long)}
    for mix, expert in experts.items():
        expected = with_gradients(mlp, x, lambda x, e=expert: nested_mlp(mlp, x[0], e[0])[None])
        for training in (False, True):
            mlp.train(training)
            actual = with_gradients(mlp, x, lambda x, e=expert: run_mlp(mlp, x, e))
            assert actual.keys() == expected.keys()
            assert_same(f"{mix}, training={training}", actual, expected, torch.float32)
        with torch.no_grad():
            assert_same(f"{mix}, no gradient", {"output": run_mlp(mlp.eval(), x, expert)}, expected, torch.float32)


@pytest.mark.parametrize("smallest_block", [0, 10**9], ids=["a block each", "one block"])
@pytest.mark.parametrize("layout", ["gated", "without a gate, with biases"])
@pytest.mark.parametrize("widths", [[0.25, 0.5, 0.75, 1], [0, 0.3, 1]], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 12, 40, 100])
def test_autocast(layout, widths, tokens, smallest_block, monkeypatch):
    """Weights in float32, products in bfloat16, as a `Trainer` with bf16 evaluates: near the plain loop in float32."""
    fix_costs(monkeypatch, 0, smallest_block)
    mlp = layer(layout, widths)
    torch.manual_seed(tokens)
    x, expert = torch.randn(1, tokens, 32, requires_grad=True), torch.randint(len(widths), (1, tokens))
    expected = nested_mlp(mlp, x[0], expert[0])
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    for with_gradient in (True, False):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(with_gradient):
            y = run_mlp(mlp, x, expert)[0].float()
            op = torch.ops.dynamoe.routed_mlp(x, expert, *mlp.tensors(x)[:6], mlp.act_name, mlp.widths)
        assert op.dtype == x.dtype, "the graph of a compiled model has the dtype of the input"
        for name, actual in (("output", y), ("output of the operator", op[0])):
            assert_close(name, actual, expected, atol=0.03 * expected.abs().max().item() + 1e-6, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        y = run_mlp(mlp, x, expert)
    (gradient,) = torch.autograd.grad(y.float().square().sum(), x)
    assert_close("gradient", gradient, expected_gradient, atol=0.05 * expected_gradient.abs().max().item() + 1e-6, rtol=0)


def test_only_the_chosen_prefix_is_computed(token_ids):
    """Poison every neuron beyond the forced prefix: the output must not notice."""
    model = tiny_dynamoe()
    with torch.no_grad():
        expected = model(token_ids, force_expert=1).logits
        for mlp in model.nested_mlps:
            mlp.gate_proj.weight[32:] = float("nan")
            mlp.down_proj.weight[:, 32:] = float("nan")
        assert_close("logits", model(token_ids, force_expert=1).logits, expected)
        # A single token takes the same prefix, and a mixed batch no more than its widest token needs.
        mlp = model.model.layers[1].mlp
        assert not torch.isnan(run_mlp(mlp, torch.randn(1, 1, 32), torch.tensor([[1]]))).any()
        assert not torch.isnan(run_mlp(mlp, torch.randn(1, 6, 32), torch.tensor([[0, 1, 0, 1, 1, 0]]))).any()
        assert torch.isnan(run_mlp(mlp, torch.randn(1, 6, 32), torch.tensor([[0, 1, 0, 2, 1, 0]]))).any(), (
            "the poison is there"
        )


@pytest.mark.parametrize("tokens", [2, 6, 40])
def test_what_is_infinite_beyond_a_token_is_not_its_own(tokens):
    """In float16 a neuron may overflow. One that a token does not have must not reach it, not even as zero times infinite."""
    mlp = layer()
    x, expert = torch.randn(1, tokens, 32), torch.zeros(1, tokens, dtype=torch.long)
    with torch.no_grad():
        expected = run_mlp(mlp, x, expert)
        expert[0, -1] = 3
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[-8:] = torch.inf
        y = run_mlp(mlp, x, expert)
    assert not y[0, -1].isfinite().all(), "who has the neuron sees it"
    assert_close("tokens without it", y[:, :-1], expected[:, :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("units", [True, False])
def test_fewer_blocks_where_units_multiply(dtype, units, monkeypatch):
    """With matrix units for bfloat16 multiplications are cheaper and calls are not."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": units}, raising=False)
    monkeypatch.setattr(mlp_backends, "has_matrix_units", mlp_backends.has_matrix_units.__wrapped__)
    down, widths = torch.empty(576, 1536, dtype=dtype), [384, 768, 1152, 1536]

    def blocks():
        return staircase_blocks([64] * 4, widths, 576, mlp_backends.costs_of(down))

    assert len(blocks()) == (2 if units and dtype == torch.bfloat16 else 4)
    assert blocks()[-1].high == 1536
    if dtype == torch.float32:
        with torch.autocast("cpu", torch.bfloat16):
            assert len(blocks()) == (2 if units else 4)


@pytest.mark.parametrize(("tokens", "reads"), [(1, True), (4, False), (512, False), (8192, True)])
def test_routes_are_read_from_a_device_where_it_pays(tokens, reads):
    """One token's prefix, and blocks of thousands of tokens: else the host would wait longer than they save. A meta tensor cannot be read."""
    with torch.device("meta"):
        up, down = torch.empty(8192, 2048), torch.empty(2048, 8192)
        x, expert = torch.empty(1, tokens, 2048), torch.empty(1, tokens, dtype=torch.long)
    weights = Weights.of_tensors(Projections(up, None, up, None, down, None, nn.SiLU()), [2048, 4096, 6144, 8192])
    assert mlp_backends.costs_of(down) == mlp_backends.GPU_COSTS
    if reads:
        with pytest.raises((RuntimeError, NotImplementedError), match="[Mm]eta"):
            mlp_backends.run_experts(x, Decision(expert), weights)
    else:
        assert mlp_backends.run_experts(x, Decision(expert), weights).shape == x.shape


@pytest.mark.parametrize("where", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("dial", [{"sensitivity": 0.4}, {"force_expert": 1}, {"sensitivity": 1.0}])
@pytest.mark.parametrize("train", [False, True])
def test_a_projection_with_a_forward_of_its_own_is_called(where, dial, train, token_ids):
    """A calibrator counts what it reads and changes nothing; other such classes round."""

    class Calibrator(nn.Linear):
        calls = 0

        def forward(self, x):
            Calibrator.calls += 1
            return super().forward(x)

    model = tiny_dynamoe().train(train)
    expected = {ids.shape: model(ids, **dial).logits for ids in (token_ids, token_ids[:1, :1])}
    getattr(model.model.layers[1].mlp, where).__class__ = Calibrator
    for shape, logits in expected.items():
        for gradients in (False, True):
            Calibrator.calls = 0
            with torch.set_grad_enabled(gradients):
                assert_close("logits", model(token_ids[: shape[0], : shape[1]], **dial).logits, logits)
            assert Calibrator.calls


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_that_torch_has_quantised_dynamically(token_ids):
    """Their weight is no tensor; routers stay as they are."""
    model = tiny_dynamoe()
    expected = model(token_ids, sensitivity=1.0).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.model.layers[0].mlp.up_proj) is not nn.Linear
    assert quantised.model.layers[0].mlp.router.input.weight.dtype == torch.float32
    assert_close("logits", quantised(token_ids, sensitivity=1.0).logits, expected, atol=0.1 * expected.abs().max().item())
    for ids in (token_ids, token_ids[:1, :1]):
        found = quantised(ids, sensitivity=0.4, output_router_logits=True)
        assert len(torch.stack(found.expert_indices).unique()) > 1 or ids.numel() == 1
        for mlp, expert, share in zip(quantised.nested_mlps, found.expert_indices, found.mlp_shares):
            assert_close("shares", share, torch.tensor(mlp.shares)[expert])
    assert quantised(token_ids, labels=token_ids).loss.isfinite()
