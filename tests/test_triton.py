"""
The Triton kernels equal the plain loops. `make test-triton` runs this on a CPU, under Triton's interpreter, and compiles the
kernels for real chips; `make test-gpu` runs the same cases on a GPU.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import run_mlp, tiny_dynamoe
from reference import assert_close, in_a_gap, nested_mlp, sparse_mlp
from test_sparsity import PATH, TABLE
from transformers.activations import ACT2FN


triton = pytest.importorskip("triton")
from dynamoe_hf.modeling import nested_mlp_triton as kernels  # noqa: E402
from dynamoe_hf.modeling.dense_base import Projections  # noqa: E402
from dynamoe_hf.modeling.mlp_backends import Call, Decision, choose_execution  # noqa: E402
from dynamoe_hf.modeling.sparsity import Thresholds  # noqa: E402


DEVICE = "cpu" if kernels.INTERPRETED else "cuda"
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
on_gpu = pytest.mark.skipif(DEVICE == "cpu" or not torch.cuda.is_available(), reason="needs a GPU, and no TRITON_INTERPRET")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("bfloat16_products"),
    pytest.mark.skipif(
        DEVICE == "cuda" and not torch.cuda.is_available(),
        reason="needs a GPU, or TRITON_INTERPRET=1 before Triton is imported",
    ),
]


def tiny_mlp(family="llama", widths=(0.25, 0.5, 0.7, 1), dtype=torch.float32, **settings):
    """Widths and sizes that are no multiples of any tile, and more neurons than the largest tile has."""
    settings = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 1, **settings}
    model = tiny_dynamoe(family, dense_settings=settings, expert_widths=list(widths)).to(DEVICE, dtype)
    model.set_mlp_implementation("triton")
    return model.model.layers[0].mlp


def results(mlp, x, run):
    """Output and all gradients, in float32."""
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    y = run(x)
    (y * (torch.arange(y.numel(), device=y.device) % 7 - 3).view_as(y)).sum().backward()  # the same in every dtype
    grads = {f"gradient of {name}": p.grad for name, p in mlp.named_parameters() if "router" not in name}
    return {name: tensor.float().clone() for name, tensor in {"output": y, "gradient of x": x.grad, **grads}.items()}


def assert_equals_the_plain_loop(mlp, x, expert, name=""):
    # Both start from the same numbers; the loop goes on in float64, the kernel rounds hidden to its dtype.
    actual = results(mlp, x, lambda x: run_mlp(mlp, x[None], expert[None])[0])
    dtype = x.dtype
    expected = results(mlp.double(), x.double(), lambda x: nested_mlp(mlp, x, expert))
    mlp.to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for key, value in expected.items():
        assert_close(f"{key}, {name}", actual[key], value, atol=tolerance * value.abs().max().item() + 1e-7, rtol=tolerance)


CASES = {
    "gated": {},
    "with biases": {"mlp_bias": True},
    "fused": {"family": "phi3"},
    "without a gate": {"family": "starcoder2"},
    "null expert": {"family": "gemma", "widths": (0, 0.37, 1)},
    "one expert": {"widths": (1,)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 70, 150])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop(case, tokens, dtype):
    mlp = tiny_mlp(dtype=dtype, **CASES[case])
    assert mlp.weights(mlp.up_linear.weight).triton, "the kernel is not used, so this test would prove nothing"
    torch.manual_seed(tokens)
    x, last = torch.randn(tokens, 72).to(DEVICE, dtype), len(mlp.widths) - 1
    assert_equals_the_plain_loop(mlp, x, torch.randint(last + 1, (tokens,)).to(DEVICE), "mixed")
    if tokens == 7:
        for expert in (0, last):
            assert_equals_the_plain_loop(mlp, x, torch.full((tokens,), expert, device=DEVICE), f"all {expert}")


@pytest.fixture
def fresh_memory_holds_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("tokens", [70, 300])
@pytest.mark.parametrize("bulk", [False, True], ids=["by pointers", "in bulk"])
@pytest.mark.parametrize("case", ["with biases", "fused", "without a gate", "null expert"])
def test_tiles_of_large_chips(case, bulk, tokens, fresh_memory_holds_nan, monkeypatch):
    """Hopper's: larger tiles, fetched by its copy engine where rows start at multiples of 16 bytes."""
    if DEVICE == "cpu":
        monkeypatch.setattr(kernels, "_shared_memory", lambda x: 232448)
    # In bfloat16 rows of 76 numbers do not.
    mlp = tiny_mlp(dtype=torch.bfloat16, **CASES[case], hidden_size=72 if bulk else 76, num_attention_heads=2)
    torch.manual_seed(tokens)
    x = torch.randn(tokens, mlp.up_linear.in_features).to(DEVICE, torch.bfloat16)
    *weights, _ = mlp.tensors(x)
    assert kernels._bulk(x, *weights[::2][:3]) == (bulk and kernels._large(x))
    expert = torch.randint(len(mlp.widths), (tokens,), device=DEVICE)
    assert_equals_the_plain_loop(mlp, x, expert)
    if tokens > kernels.PREFILL_LARGE.tokens:  # the first tile is wider than the others
        assert_equals_the_plain_loop(mlp, x, (torch.arange(tokens, device=DEVICE) == 7).long())


@pytest.mark.parametrize("act", kernels.ACTIVATIONS)
def test_activations_and_their_slopes(act):
    torch.manual_seed(0)
    x, up, down = (torch.randn(*shape, device=DEVICE) for shape in ((9, 24), (40, 24), (24, 40)))
    x.requires_grad_()
    weights = Projections(None, None, up, None, down, None, None)
    y = kernels.triton_mlp(x, torch.zeros(9, dtype=torch.long, device=DEVICE), weights, act, [40])
    expected = (ACT2FN[act](x.double() @ up.double().t()) @ down.double().t()).float()
    assert_close("output", y, expected, atol=1e-6 * expected.abs().max().item(), rtol=1e-4)
    incoming = torch.randn_like(y)
    grads = [torch.autograd.grad(out, x, incoming)[0] for out in (y, expected)]
    assert_close("gradient", *grads, atol=1e-6 * grads[1].abs().max().item(), rtol=1e-4)


@pytest.mark.parametrize("tokens", [7, 150])
def test_nothing_unwritten_or_beyond_the_prefix_is_read(tokens, fresh_memory_holds_nan):
    """Every neuron beyond the tile that the widest token ends in is poisoned as well."""
    mlp = tiny_mlp(intermediate_size=512, widths=(0.25, 0.4, 1))
    torch.manual_seed(0)
    x, expert = torch.randn(tokens, 72, device=DEVICE), torch.randint(2, (tokens,), device=DEVICE)
    assert x.new_empty(3).isnan().all()
    assert_equals_the_plain_loop(mlp, x, expert)
    with torch.no_grad():
        expected = run_mlp(mlp, x[None], expert[None])
        mlp.gate_proj.weight[256:] = mlp.up_proj.weight[256:] = mlp.down_proj.weight[:, 256:] = float("nan")
        assert_close("poisoned", run_mlp(mlp, x[None], expert[None]), expected)
        assert torch.isnan(run_mlp(mlp, x[None], expert[None] + 1)).any(), "the poison is there"


def test_tiles_beyond_their_widest_token_do_nothing(fresh_memory_holds_nan):
    mlp = tiny_mlp(intermediate_size=512, widths=(0.25, 0.4, 1))
    expert = torch.tensor([0, 1, 2] * 64, device=DEVICE)
    x = torch.randn(len(expert), 72, device=DEVICE)
    *weights, _ = mlp.tensors(x)
    plan, (expert, order) = kernels._plan(x), kernels._sorted(expert)
    hidden, _, _ = kernels._hidden(x[order], None, expert, weights[:5], "silu", mlp.widths, plan, False)
    assert plan.tokens == plan.hidden.columns == 64
    for tile, width in enumerate((512, 256, 128)):  # whole tiles of neurons
        rows = hidden[tile * 64 : tile * 64 + 64]
        assert torch.isfinite(rows[:, :width]).all()
        assert torch.isnan(rows[:, width:]).all(), f"tile {tile} computed more than {width} neurons"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_routers_choose_the_same(dtype):
    mlp, (B, S) = tiny_mlp(dtype=dtype), (3, 11)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in mlp.router.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(B, S, 72, device=DEVICE, dtype=dtype)
    logits = mlp.router(x).float()
    taken = set()
    for sensitivity in (0.2, 0.5, 0.8, torch.tensor([0.2, 0.5, 0.9])):
        expert = mlp.router.choose_fused(x, sensitivity)
        if dtype == torch.float32:
            assert torch.equal(expert, mlp.router.choose(logits, sensitivity))
        else:  # in float32 within, so that a logit may end on the other side of a threshold that it all but reaches
            for shift in (0.1, -0.1):
                moved = mlp.router.choose(logits + shift, sensitivity)
                assert ((expert - moved) * (1 if shift > 0 else -1)).min() >= 0
        taken |= set(expert.flatten().tolist())
    assert taken == {0, 1, 2, 3}


def test_routers_that_the_kernel_does_not_know():
    x = torch.randn(1, 5, 72, device=DEVICE)
    assert tiny_mlp(widths=(1,)).router.choose_fused(x, 0.5) is None
    mlp = tiny_mlp()
    mlp.router.output = torch.nn.Sequential(mlp.router.output)
    assert mlp.router.choose_fused(x, 0.5) is None


def test_inputs_with_strides():
    mlp = tiny_mlp()
    x = torch.randn(72, 40, device=DEVICE).t()
    expert = torch.randint(4, (40, 2), device=DEVICE)[:, 0]
    *weights, _ = mlp.tensors(x)
    expected = kernels.triton_mlp_op(x.contiguous(), expert.contiguous(), *weights, "silu", mlp.widths)
    weights = [weight if weight is None or weight.ndim == 1 else weight.t().contiguous().t() for weight in weights]
    assert_close("output", kernels.triton_mlp_op(x, expert, *weights, "silu", mlp.widths), expected)
    assert kernels.triton_mlp_op(x[:0], expert[:0], *weights, "silu", mlp.widths).shape == (0, 72)


@pytest.mark.parametrize("case", ["with biases", "without a gate"])
def test_the_operator_is_a_proper_one(case):
    mlp = tiny_mlp(**CASES[case])
    expert = torch.randint(4, (5,), device=DEVICE)
    *weights, _ = mlp.tensors(torch.zeros(1, device=DEVICE))
    weights = [None if weight is None else weight.detach().requires_grad_() for weight in weights]
    x = torch.randn(5, 72, device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels.triton_mlp_op, (x, expert, *weights, "silu", mlp.widths))
    hidden, weight, bias = torch.randn(5, 16, device=DEVICE), torch.randn(3, 16, device=DEVICE), torch.randn(3, device=DEVICE)
    for thresholds in (None, torch.randn(5, device=DEVICE)):
        torch.library.opcheck(kernels.triton_choose_op, (hidden, weight, bias, 0.5, thresholds))


def test_frozen_experts_pass_the_gradient_on():
    mlp = tiny_mlp()
    for parameter in mlp.parameters():
        parameter.requires_grad = False
    x, expert = torch.randn(1, 20, 72, device=DEVICE, requires_grad=True), torch.randint(4, (1, 20), device=DEVICE)
    (grad,) = torch.autograd.grad(run_mlp(mlp, x, expert).sum(), x)
    (expected,) = torch.autograd.grad(nested_mlp(mlp, x[0], expert[0]).sum(), x)
    assert_close("gradient", grad, expected, atol=1e-3)
    assert mlp.up_linear.weight.grad is None


def test_autocast():
    mlp = tiny_mlp()
    x, expert = torch.randn(1, 20, 72, device=DEVICE), torch.randint(4, (1, 20), device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = run_mlp(mlp, x, expert)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert mlp.up_linear.weight.grad.dtype == torch.float32
    expected = nested_mlp(mlp, x[0], expert[0])
    assert_close("output", y[0].float(), expected, atol=3e-2 * expected.abs().max().item())


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2"])
def test_the_model_is_the_same(family, token_ids):
    model, ids = tiny_dynamoe(family).to(DEVICE), token_ids.to(DEVICE)
    model.set_sensitivity(0.4)
    outcomes = {}
    for name in ("torch", "triton"):
        model.set_mlp_implementation(name)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        grads = {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}
        greedy = model.generate(ids, max_new_tokens=5, do_sample=False)
        one = model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        outcomes[name] = {"logits": out.logits, "greedy": greedy.float(), "one": one.float(), **grads}
    for name, expected in outcomes["torch"].items():
        assert_close(name, outcomes["triton"][name], expected, atol=1e-4 * expected.abs().max().item() + 1e-5)


def test_compiled_in_one_graph(token_ids):
    torch._dynamo.reset()
    model, ids = tiny_dynamoe().to(DEVICE), token_ids.to(DEVICE)
    model.set_mlp_implementation("triton")
    model.set_sensitivity(0.4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close("logits", compiled(ids).logits, model(ids).logits)
    dials = torch.tensor([0.3, 0.6], device=DEVICE)
    assert_close("logits", compiled(ids, sensitivity=dials).logits, model(ids, sensitivity=dials).logits)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids).logits.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected, atol=1e-4 * expected.abs().max().item() + 1e-6)


# Runs without the interpreter and without a GPU: host code as it is, every launch turned into a compilation for one chip.
COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from dynamoe_hf.modeling import nested_mlp_triton as kernels

capability, shared = int(sys.argv[1]), int(sys.argv[2])
cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

class Chip:
    get_current_target = lambda self: GPUTarget("cuda", capability, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

def launch(kernel, grid):
    def run(*args, **options):
        binary = kernel.run(*args, grid=grid, warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(binary.asm["cubin"])
            usage = subprocess.run([cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
        registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", usage).groups()
        bulk = len(re.findall(r"cp\\.async\\.bulk\\.tensor", binary.asm["ptx"]))
        wide = bulk + len(re.findall(r"cp\\.async\\.c[ag]\\.\\S+ \\[[^]]*\\], \\[[^]]*\\], (?:0x10|16)\\b", binary.asm["ptx"]))
        copies = bulk + len(re.findall(r"cp\\.async\\.c[ag]\\.", binary.asm["ptx"]))
        print("kernel", case, kernel.__name__, registers, stack, binary.metadata.shared, wide, copies)
    return run

class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        print("call", function.name())
        return function(*args, **kwargs or {})

driver.set_active(Chip())
JITFunction.__getitem__ = launch
kernels._shared_memory = lambda x: shared
D, H, widths = 4096, 14336, [3584, 7168, 10752, 14336]
for dtype in (torch.bfloat16, torch.float32):
    gate, up, down = (torch.empty(*shape, dtype=dtype) for shape in ((H, D), (H, D), (D, H)))
    for tokens in (1, 8, 64, 2048):
        x, expert = torch.empty(tokens, D, dtype=dtype), torch.zeros(tokens, dtype=torch.long)
        case = f"{str(dtype)[6:]}-{tokens}"
        with Calls():
            kernels.triton_mlp_op._init_fn(x, expert, gate, None, up, None, down, None, "silu", widths)
    case += "-backward"
    with Calls():
        kernels.triton_mlp_backward_op._init_fn(x, x, expert, gate, None, up, None, down, "silu", widths, True, True)
    case = f"{str(dtype)[6:]}-ramp"
    kernels.triton_mlp_op._init_fn(x, expert, gate, None, up, None, down, None, "silu", widths, 0.0, torch.empty(tokens), 0.2)
expert = torch.zeros(8, dtype=torch.long)
x, up, down, bias, D_bias = (torch.empty(*s, dtype=torch.bfloat16) for s in ((8, 64), (256, 64), (64, 256), (256,), (64,)))
for act in ("gelu", "gelu_new", "relu", "relu2"):
    case = act
    kernels.triton_mlp_op._init_fn(x, expert[:8], None, None, up, bias, down, D_bias, act, [0, 100, 256])
    case += "-backward"
    kernels.triton_mlp_backward_op._init_fn(x, x, expert[:8], None, None, up, bias, down, act, [0, 100, 256], True, True)
"""
CHIPS = {"A100": (80, 166912), "RTX 3090": (86, 101376), "H100": (90, 232448)}
# What the host asks of the device besides kernels: nothing that has to answer.
CALLS = {
    "aten::empty.memory_format",
    "aten::new_empty",
    "aten::empty_like",
    "aten::sort.stable",
    "aten::index_select",
    "aten::sum.dim_IntList",
    "aten::_to_copy",  # to another dtype; `test_the_host_never_waits` sees that it stays on the device
}


@pytest.mark.parametrize("chip", CHIPS)
def test_compiles_for_real_chips(chip, tmp_path):
    """At Mistral-7B's shape: within shared memory, few registers spilled, loads of 16 bytes or bulk; and the host never waits."""
    capability, shared = CHIPS[chip]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, str(capability), str(shared)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert set(re.findall(r"^call (\S+)$", result.stdout, flags=re.M)) <= CALLS
    compiled = re.findall(r"^kernel (\S+) (\w+) (\d+) (\d+) (\d+) (\d+) (\d+)$", result.stdout, flags=re.M)
    assert len(compiled) == 26 + 4 + 4 * 6
    for case, kernel, _, spilled, used, wide, copies in compiled:
        assert int(used) <= shared, f"{case} {kernel} wants {used} bytes of shared memory"
        # The sums of the backward pass do spill on an H100, and are faster so than in smaller tiles. Elsewhere only Triton
        # before 3.7 spills a few, in float32, which is the default nowhere.
        sums = kernel == "_hidden_kernel" and case.endswith("backward")
        allowed = 200 if sums and chip == "H100" else 80 if sums and case.startswith("float32") and OLD_TRITON else 16
        assert int(spilled) <= allowed, f"{case} {kernel} spills {spilled} bytes of each thread's registers"
        assert int(wide) == int(copies) > 0, f"{case} {kernel}: {wide} of {copies} asynchronous copies are of 16 bytes"


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 300])
def test_the_host_never_waits(tokens):
    mlp = tiny_mlp(dtype=torch.bfloat16)
    x = torch.randn(1, tokens, 72, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mlp.config.sensitivity = 0.4
    mlp(x).sum().backward()  # compiled outside
    torch.cuda.set_sync_debug_mode("error")
    try:
        mlp.train()(x).sum().backward()
        with torch.no_grad():
            mlp.eval()(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tokens", [1, 8, 64, 300])
def test_cuda_graphs(tokens):
    """Captured once, replayed with other routes."""
    mlp = tiny_mlp()
    x, expert = torch.randn(1, tokens, 72, device="cuda"), torch.zeros(1, tokens, dtype=torch.long, device="cuda")
    with torch.no_grad():
        run_mlp(mlp, x, expert)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run_mlp(mlp, x, expert)
        for seed in range(3):
            torch.manual_seed(seed)
            x.normal_()
            expert.random_(4)
            graph.replay()
            assert_close(f"replay {seed}", y, run_mlp(mlp, x, expert))


SPARSE_CASES = {**CASES, "relu": {"family": "starcoder2", "hidden_act": "relu"}}


@pytest.mark.parametrize("ramp", [0.0, 0.3], ids=["a step", "a ramp"])
@pytest.mark.parametrize("of_each", [False, True], ids=["one threshold", "thresholds of each sequence"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("case", SPARSE_CASES)
def test_prefixes_with_thresholds_equal_the_plain_loop(case, tokens, of_each, ramp, fresh_memory_holds_nan):
    """40 tokens are sorted by their experts, and their thresholds with them."""
    mlp = tiny_mlp(**SPARSE_CASES[case])
    torch.manual_seed(tokens)
    x, experts = torch.randn(tokens, 1, 72).to(DEVICE), len(mlp.widths)
    least_input = in_a_gap(x, 0.2, 0.9)
    hidden = mlp.hidden(x * (x.abs() >= least_input))
    least = [least_input] * tokens, [in_a_gap(hidden, 0.01, 2.0)] * tokens
    thresholds = Thresholds(least[0][0], least[1][0], ramp)
    if of_each:
        least[1][::2] = [0.0] * len(least[1][::2])
        thresholds = Thresholds(*(torch.tensor(values, device=DEVICE).view(-1, 1, 1) for values in least), ramp)
    expert = torch.arange(tokens, device=DEVICE).view(-1, 1) % experts
    with torch.no_grad():
        call = Call(x, Decision(expert, thresholds=thresholds), mlp.weights(x, Decision(expert, thresholds=thresholds)))
        assert choose_execution(call).name == "triton"
        y = choose_execution(call).run(call)[:, 0]
        expected, _ = sparse_mlp(mlp.double(), x[:, 0].double(), expert.flatten(), *least, ramp=ramp)
    assert_close(f"{tokens} tokens", y.double(), expected, atol=1e-5 * expected.abs().max().item() + 1e-7)


def test_what_is_not_a_number_is_seen():
    """A threshold must not hide a broken input."""
    mlp, x = tiny_mlp(), torch.randn(2, 1, 72, device=DEVICE)
    x[0, 0, 3] = float("nan")
    with torch.no_grad():
        expert = torch.full((2, 1), 3, device=DEVICE)
        call = Call(x, Decision(expert, thresholds=Thresholds(0.5, 0.1)), mlp.weights(x, Decision(expert)))
        assert choose_execution(call).name == "triton"
        y = choose_execution(call).run(call)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_thresholds_with_gradients_are_not_for_the_kernels():
    mlp, expert = tiny_mlp(), torch.full((2, 1), 3, device=DEVICE)
    x = torch.randn(2, 1, 72, device=DEVICE, requires_grad=True)
    decision = Decision(expert, thresholds=Thresholds(0.5, 0.1))
    assert choose_execution(Call(x, decision, mlp.weights(x, decision))).name != "triton"


@pytest.mark.parametrize("ramp", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "starcoder2"])
def test_a_calibrated_model_decodes_as_without_the_kernels(family, ramp, token_ids):
    settings = {"thresholds": TABLE, "density_path": PATH, "threshold_ramp": ramp}
    plain, model = (tiny_dynamoe(family, **settings).to(DEVICE) for _ in range(2))
    plain.set_mlp_implementation("torch")
    model.set_mlp_implementation("triton")
    ids = token_ids.to(DEVICE)
    with torch.no_grad():
        for dial in (0.5, torch.tensor([0.35, 0.9], device=DEVICE)):
            expected, caches = plain(ids, sensitivity=dial).logits, None
            steps = []
            for step in ids.split(1, dim=1):
                out = model(step, past_key_values=caches, use_cache=True, sensitivity=dial)
                caches = out.past_key_values
                steps.append(out.logits)
            assert (torch.cat(steps, 1) - expected).norm() < 0.02 * expected.norm()
