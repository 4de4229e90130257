"""What only a CUDA device can show, for each backend that computes there; `make gpu` runs it.

KAFOPS_TEST_DEVICE=cpu tries, on the CPU's backends, those of the tests that could run anywhere.
"""

import faulthandler
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from cases import BF16, DTYPES, F16, F32, F64, Case
from forms import assert_equal_to_rounding
from test_distributed import PROCESSES, make_data, make_net, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kafops
from kafops import check, ops, reference
from kafops.accuracy import Problem, bounds, excess, values
from kafops.ops import Needs

DEVICE = os.environ.get("KAFOPS_TEST_DEVICE", "cuda")
BACKENDS = ("cuda", "triton") if DEVICE == "cuda" else ("cpu", "triton")
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not GPUS, reason="PyTorch finds no CUDA device"),
]
needs_gpu = pytest.mark.skipif(not GPUS, reason="needs a CUDA device")
needs_two_gpus = pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")

ALONE = frozenset({"alpha", "gamma", "dictionary"})
CASES = [
    Case((8, 33, 50, 50)),
    Case((8, 33, 50, 50), layout="channels_last", dtype=BF16),
    Case((8, 33, 50, 50), layout="channels_last", free=True, varied=True),
    Case((8, 33, 50, 50), layout="transposed", grad_layout="channels_last", dtype=F16),
    Case((4, 17, 300), size=64, spacing=2.0),
    Case((4, 17, 300), dtype=F64, parameter_dtype=F64),
    Case((100_003,), shared=ALONE),
    Case((300, 70), size=5),
]
of_cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Compute with one backend, and skip where it cannot serve the device."""
    need(request.param)
    with kafops.backend(request.param):
        yield request.param


def need(name: str) -> None:
    if name not in kafops.backends.available(DEVICE):
        with_reason = kafops.backends.explain(torch.empty(0, device=DEVICE))
        pytest.skip(f"backend {name!r} does not serve {DEVICE!r} here; {with_reason}")


def call(p: Problem, *arguments: Tensor) -> Tensor:
    x, alpha, gamma, *dictionary = arguments or p.arguments.values()
    if dictionary:
        return kafops.kaf_free(x, alpha, gamma, *dictionary)
    return kafops.kaf(x, alpha, gamma, p.boundary)


def assert_exact(p: Problem, got: dict[str, Tensor], name: object = "") -> None:
    wrong = {k: e for k, e in excess(p, got).items() if not e <= 1}
    assert not wrong, f"{name}: errors as multiples of what is allowed: {wrong}"


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    different = [name for name, t in got.items() if not torch.equal(t, want[name])]
    assert not different, f"other bits in {different}"


def assert_agree(p: Problem, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Each may be as far from the truth as `bounds` says, and is rounded to its dtype."""
    for name, allowed in bounds(p).items():
        one, other = (t[name].to(allowed.device, F64) for t in (a, b))
        dtype = torch.finfo(a[name].dtype)
        rounding = dtype.eps / 2 * (torch.maximum(one.abs(), other.abs()) + dtype.smallest_normal)
        assert ((one - other).abs() <= 2 * (allowed + rounding)).all(), name


def tensors(p: Problem) -> list[Tensor]:
    return [*p.arguments.values(), p.grad, *(v for v in p.v if v is not None)]


# ----------------------------------------------------------------------------------------- graphs, streams, compilers


@needs_gpu
@of_cases
def test_cuda_graph_replays_the_bits_of_eager(case, backend):
    """Forward, backward and double backward in one graph, replayed on other inputs than it was captured with."""
    p = case.problem(device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture needs everything compiled and loaded
        values(p, kafops)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = values(p, kafops)
    for t, other in zip(tensors(p), tensors(case.problem(seed=1, device="cuda")), strict=True):
        t.copy_(other)
    for t in got.values():
        t.fill_(torch.nan)
    graph.replay()
    assert_same_bits(got, values(p, kafops))


@needs_gpu
@of_cases
def test_current_stream(case, backend):
    """All kernels wait for what their own stream does: x is written late, and only there."""
    p = case.problem(device="cuda")
    want = values(p, kafops)
    late = p.x.clone()
    p.x.zero_()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles: tens of milliseconds
        p.x.copy_(late)
        got = values(p, kafops)
    stream.synchronize()
    assert_same_bits(got, want)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[-2]], ids=str)
@pytest.mark.parametrize("mode", ["default", pytest.param("reduce-overhead", marks=needs_gpu)])
def test_compiled(case, mode, backend):
    """Whole graphs; "reduce-overhead" replays them as CUDA graphs from the third call on."""
    torch._dynamo.reset()
    p = case.problem(device=DEVICE)
    compiled = torch.compile(lambda *arguments: call(p, *arguments), fullgraph=True, mode=mode)
    first = None
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        arguments = {name: t.detach().requires_grad_() for name, t in p.arguments.items()}
        y = compiled(*arguments.values())
        gradients = torch.autograd.grad(y, list(arguments.values()), p.grad)
        got = {"y": y} | {f"backward {name}": g for name, g in zip(arguments, gradients, strict=True)}
        assert y.stride() == torch.empty_like(p.x).stride()
        got = {name: t.detach().clone() for name, t in got.items()}  # the next step overwrites a graph's outputs
        if first is None:
            assert_exact(p, first := got)
        assert_same_bits(got, first)


# ------------------------------------------------------------------------------------------------------ mixed precision


@pytest.mark.parametrize("free", [False, True], ids=["uniform", "free"])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_autocast_with_a_gradient_scaler(dtype, free, backend):
    torch.manual_seed(0)
    layer = kafops.KAF2d(8, learn_gamma=free, learn_dictionary=free)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Flatten(), nn.Linear(8 * 36, 4)).to(DEVICE)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=128.0)
    seen = {}

    def keep(_, inputs, y):
        seen["x"], seen["y"] = inputs[0], y
        inputs[0].retain_grad()
        y.retain_grad()

    layer.register_forward_hook(keep)

    def backward(x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype):
            loss = net(x).float().pow(2).mean()
        scaler.scale(loss).backward()

    x = torch.randn(16, 3, 8, 8, device=DEVICE)
    backward(x)
    assert seen["x"].dtype == seen["y"].dtype == dtype
    assert {p.grad.dtype for p in net.parameters()} == {F32}

    # The same layer in float64 on the very inputs and cotangents that half precision left it.
    exact = kafops.KAF2d(8, learn_gamma=free, learn_dictionary=free).to(DEVICE, F64)
    exact.load_state_dict(layer.state_dict())
    z = seen["x"].detach().double().requires_grad_()
    if free:
        want = reference.kaf_free(z, exact.alpha, exact.bandwidths(), exact.dictionary)
    else:
        want = reference.kaf(z, exact.alpha, exact.bandwidths(), exact.boundary)
    want.backward(seen["y"].grad.double())
    eps, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    size = exact.alpha.detach().abs().sum(1).max()
    for got, value, scale in ((seen["y"], want, size), (seen["x"].grad, z.grad, z.grad.abs().max())):
        atol = float(1e-6 * scale) + eps / 2 * smallest
        torch.testing.assert_close(got.double(), value, rtol=eps / 2, atol=atol)
    for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=float(1e-5 * q.grad.abs().max()))

    before = [p.detach().clone() for p in net.parameters()]
    wanted = [p.detach() - 0.1 * p.grad / 128 for p in net.parameters()]
    scaler.step(optimizer)
    scaler.update()
    for p, w in zip(net.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), w)
    assert any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 128

    # A gradient that is not a number spoils no parameter: the step is left out, and the scale halved.
    before = [p.detach().clone() for p in net.parameters()]
    x[0] = torch.nan
    backward(x)
    assert layer.alpha.grad.isnan().any()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert scaler.get_scale() == 64


# ---------------------------------------------------------------------------------------------------- values and memory


@of_cases
def test_same_bits_twice(case, backend):
    p = case.problem(device=DEVICE)
    first = values(p, kafops)
    assert_exact(p, first)
    for size in (1, 1000, 10**7):
        between = torch.full((size,), torch.nan, device=DEVICE)  # results move to other memory, with other leftovers
        assert_same_bits(values(p, kafops), first)
        del between


@needs_gpu
@of_cases
def test_as_on_the_cpu(case, backend):
    host, p = case.problem(device="cpu"), case.problem(device="cuda")
    with kafops.backend(kafops.backends.available("cpu")[0]):
        on_cpu = values(host, kafops)
    assert_agree(p, values(p, kafops), on_cpu)


@of_cases
def test_backends_agree(case):
    p = case.problem(device=DEVICE)
    found = []
    for name in BACKENDS:
        need(name)
        with kafops.backend(name):
            found.append(values(p, kafops))
    assert_agree(p, *found)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape, dtype, backend):
    p = Case(shape, dtype=dtype).problem(device=DEVICE)
    got = values(p, kafops)
    for name in ("y", "backward x", "double backward grad", "double backward x"):
        assert (got[name].shape, got[name].dtype, got[name].device) == (p.x.shape, dtype, p.x.device)
    for name, t in {"alpha": p.alpha, "gamma": p.gamma}.items():
        for stage in ("backward", "double backward"):
            assert got[f"{stage} {name}"].shape == t.shape
            assert not got[f"{stage} {name}"].any()


@needs_gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("free", [False, True], ids=["uniform", "free"])
def test_memory(free, layout, backend):
    """Forward and backward need memory for y and the gradient of x, and nothing else of their size."""
    p = Case((16, 64, 128, 128), layout=layout, grad_layout=layout, free=free).problem(device="cuda")
    arguments = [t.requires_grad_() for t in p.arguments.values()]

    def work() -> None:
        torch.autograd.grad(call(p, *arguments), arguments, p.grad)

    work()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    assert torch.cuda.max_memory_allocated() - before <= 2.1 * p.x.nbytes


def test_check(backend, capsys):
    assert check.main(["--device", DEVICE]) == 0
    output = capsys.readouterr().out
    assert f"{backend}: " in output
    assert "RIGHT" in output.splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------- devices


@needs_gpu
@pytest.mark.parametrize("name", ["alpha", "gamma", "dictionary"])
def test_a_parameter_left_on_the_cpu(name, backend):
    p = Case((4, 3), size=5, free=True).problem(device="cuda")
    moved = p.arguments | {name: p.arguments[name].cpu()}
    with pytest.raises(ValueError, match=rf"^{name} is on cpu but x is on cuda:0"):
        kafops.kaf_free(**moved)


@needs_two_gpus
@pytest.mark.parametrize("name", ["alpha", "gamma", "dictionary"])
def test_tensors_on_two_gpus(name, backend):
    p = Case((4, 3), size=5, free=True).problem(device="cuda:0")
    moved = p.arguments | {name: p.arguments[name].to("cuda:1")}
    with pytest.raises(ValueError, match=rf"^{name} is on cuda:1 but x is on cuda:0"):
        kafops.kaf_free(**moved)


@needs_two_gpus
@of_cases
def test_other_device_than_the_current_one(case, backend):
    assert torch.cuda.current_device() == 0
    p = case.problem(device="cuda:1")
    got = values(p, kafops)
    assert {t.device for t in got.values()} == {torch.device("cuda:1")}
    assert torch.cuda.current_device() == 0
    assert_exact(p, got)


def _worker(rank: int, directory: str, name: str) -> None:
    faulthandler.enable()
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{directory}/store", rank=rank, world_size=PROCESSES, device_id=device
    )
    try:
        own = [t.chunk(PROCESSES)[rank].to(device) for t in make_data()]
        with kafops.backend(name):
            net = DistributedDataParallel(make_net().to(device), device_ids=[rank])
            found = [[t.cpu() for t in part] for part in train(net, *own)]
        torch.save(found, f"{directory}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@needs_two_gpus
def test_data_parallel_over_nccl(backend, tmp_path):
    """Two GPUs with half of the batch each, against one with all of it."""
    torch.multiprocessing.spawn(_worker, (str(tmp_path), backend), nprocs=PROCESSES)
    parts = train(make_net().to("cuda:0"), *(t.to("cuda:0") for t in make_data()))
    want = [[t.cpu() for t in part] for part in parts]
    for rank in range(PROCESSES):
        for got, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), want, strict=True):
            assert_equal_to_rounding(got, wanted)


# ---------------------------------------------------------------------------------------------------------------- size

# Just above 2^31 elements: one curve for all; many elements in a channel; channels side by side.
LARGE = {
    "shared": Case((2**31 + 5,), shared=ALONE, size=6, dtype=BF16),
    "runs": Case((3, 5, 143_165_577), size=6, dtype=BF16),
    "columns": Case((2**25 + 1, 64), size=6, dtype=BF16),
}


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("case", LARGE.values(), ids=LARGE)
def test_more_than_two_to_the_31_elements(case, backend):
    n = torch.Size(case.shape).numel()
    assert n > 2**31
    torch.cuda.empty_cache()
    needed = 2 * n * 4 + 4 * 2**30  # x, grad, y and dx, and some float64
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory on the GPU, there are {free / 2**30:.0f}")
    small = replace(case, shape=(1,) * (len(case.shape) > 1) + case.shape[1:2] + (1,)).problem(device="cuda")
    alpha, gamma = small.alpha, small.gamma
    draw = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(case.shape, dtype=BF16, device="cuda", generator=draw)
    grad = torch.randn(case.shape, dtype=BF16, device="cuda", generator=draw)
    y = kafops.kaf(x, alpha, gamma)
    dx, dalpha, *_ = ops.kaf_backward(grad, x, alpha, gamma, None, 3.0, Needs.X | Needs.ALPHA)
    for index in _windows(case.shape):
        some = Problem(x[index], alpha, gamma, None, 3.0, grad[index], (torch.zeros_like(x[index]), None, None))
        assert_exact(some, {"y": y[index], "backward x": dx[index]}, f"at {index}")
    del y, dx
    want, terms = torch.zeros_like(alpha, dtype=F64), torch.zeros_like(alpha, dtype=F64)
    points = reference.uniform_dictionary(6, 3.0, like=want)[0]
    channels = alpha.shape[0]
    for a, g in _pieces(x, grad, channels):  # [C, positions]
        for k, point in enumerate(points):
            kernel = torch.exp(-gamma.double().unsqueeze(1) * (a.double() - point) ** 2)
            want[:, k] += (g.double() * kernel).sum(1)
            terms[:, k] += (g.double().abs() * kernel).sum(1)
    # Every thread adds up some dozens of terms in float32, a block its threads: some roundings of Σ|g|K.
    assert ((dalpha.double() - want).abs() <= 32 * torch.finfo(F32).eps / 2 * terms).all()


def _windows(shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """Return parts at both ends and on either side of element 2^31, with all channels."""
    if len(shape) == 1:
        return [(slice(s, s + 4096),) for s in (0, 2**30, 2**31 - 2048, shape[0] - 4096)]
    if len(shape) == 2:
        return [(slice(s, s + 256),) for s in (0, 2**24, 2**25 - 128, shape[0] - 256)]
    last = shape[2]
    return [(slice(n, n + 1), slice(None), slice(s, s + 1000)) for n in (0, 2) for s in (0, last // 2, last - 1000)]


def _pieces(x: Tensor, grad: Tensor, channels: int):
    """Yield x and grad a part at a time, as [channels, positions]."""
    length = 2**25
    if x.dim() == 1:
        for a, g in zip(x.split(length), grad.split(length), strict=True):
            yield a.unsqueeze(0), g.unsqueeze(0)
    elif x.dim() == 2:
        for a, g in zip(x.split(length // channels), grad.split(length // channels), strict=True):
            yield a.T, g.T
    else:
        for a, g in zip(x, grad, strict=True):
            yield from zip(a.split(length // channels, 1), g.split(length // channels, 1), strict=True)
