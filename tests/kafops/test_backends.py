"""Which backend is chosen, how one is forced, and what is said where none can serve."""

import contextlib
import importlib
import itertools
import math
import os
import pkgutil
import random
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import kafops
from kafops import backends, kernels, ops, torch_private
from kafops.backends import cpu, cuda, triton

ROOT = Path(__file__).parents[2]
compiled = pytest.mark.skipif(cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}")


def ask_again() -> None:
    backends.gpus.too_old.cache_clear()
    cuda._not_built_for.cache_clear()


class Gpus:
    """Stands for the GPUs of a machine, in place of those that there are."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(cuda, "load_error", None)
        monkeypatch.setattr(triton, "load_error", None)
        monkeypatch.setattr(triton, "interpreted", False)
        self.are((9, 0))
        self.built("8.0 9.0 12.0+PTX")

    def are(self, *capabilities: tuple[int, int]) -> None:
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        self.monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU of {capabilities[i]}")
        ask_again()

    def built(self, architectures: str) -> None:
        module = type("module", (), {"architectures": staticmethod(lambda: architectures)})
        self.monkeypatch.setattr(cuda, "_C_cuda", module, raising=False)
        ask_again()

    def lack(self, module: object, reason: str) -> None:
        self.monkeypatch.setattr(module, "load_error", reason)
        ask_again()


@pytest.fixture
def gpus(monkeypatch):
    before = dict(backends._active)
    yield Gpus(monkeypatch)
    ask_again()
    backends._warn_once.cache_clear()
    for which in backends._active.keys() - before.keys():
        torch_private.unregister(backends._active.pop(which))


def on_gpu() -> torch.Tensor:
    with FakeTensorMode():
        return torch.empty(2, 3, device="cuda")


# ------------------------------------------------------------------------------------------------------- choice


@compiled
def test_cpu_tensors_go_to_the_cpu_kernels():
    assert backends.choose(torch.empty(1)) == "cpu"
    assert backends.explain(torch.empty(1)) == f"cpu: compiled kernels, instruction set {cpu.capability()}"


def test_cuda_tensors_go_to_cuda_else_to_triton_else_to_the_reference(gpus):
    x = on_gpu()
    assert backends.choose(x) == "cuda"
    assert backends.explain(x) == "cuda: compiled CUDA kernels"
    assert backends.available("cuda") == ("cuda", "triton", "reference")
    gpus.lack(cuda, "libtorch_cuda.so: cannot open shared object file")
    assert backends.choose(x) == "triton"
    assert backends.explain(x) == (
        "triton: Triton kernels, because the compiled CUDA kernels could not be loaded (libtorch_cuda.so: cannot open "
        "shared object file)"
    )
    gpus.lack(triton, "the package triton is not installed")
    assert backends.available("cuda") == ("reference",)
    text = backends.explain(x)
    assert text.startswith("reference: plain PyTorch, because the compiled CUDA kernels could not be loaded (libtorch")
    assert "; the Triton kernels could not be loaded (the package triton is not installed)" in text


def test_an_interpreter_is_asked_by_name_only(gpus, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", True)
    gpus.lack(cpu, "not built")
    assert backends.available("cpu") == ("triton", "reference")
    assert backends.explain("cpu").startswith("reference: plain PyTorch, because the compiled CPU kernels could not be")
    with kafops.backend("triton"):
        assert backends.choose(torch.empty(1)) == "triton"


def test_the_reference_is_announced_once_with_its_reasons(gpus, monkeypatch):
    gpus.lack(cuda, "no nvcc")
    gpus.lack(triton, "no triton")
    x = on_gpu()
    monkeypatch.setattr(backends.torch, "empty", lambda *size, device: x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [backends.choose(x) for _ in range(3)] == ["reference"] * 3
    (warning,) = caught
    for part in ("plain PyTorch reference, which is slow", "no nvcc", "no triton"):
        assert part in str(warning.message)


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),  # later minor version
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),  # machine code is for one major version
        ("8.0+PTX", (9, 0), True),
        ("8.0+PTX", (7, 5), False),
        ("8.0 9.0 12.0+PTX", (10, 0), False),
        ("8.0 9.0 12.0+PTX", (12, 1), True),
        ("9.0a", (9, 0), True),
        ("9.0a", (9, 1), False),
        ("Ampere", (8, 0), False),
    ],
)
def test_gpus_that_compiled_kernels_run_on(built, capability, runs):
    assert cuda.covers(built.split(), capability) is runs


def test_a_gpu_that_the_compiled_kernels_were_not_built_for_goes_to_triton(gpus):
    gpus.are((9, 0), (7, 5))
    x = on_gpu()
    assert backends.choose(x) == "triton"
    text = backends.explain(x)
    assert "built for compute capabilities 8.0, 9.0, 12.0+PTX, and GPU 1 (GPU of (7, 5)) has 7.5" in text
    assert "TORCH_CUDA_ARCH_LIST=7.5" in text


def test_a_gpu_below_the_minimum_goes_to_the_reference(gpus):
    gpus.are((7, 0))
    x = on_gpu()
    assert backends.available("cuda") == ("reference",)
    assert "need compute capability 7.5, and GPU 0 (GPU of (7, 0)) has 7.0" in backends.explain(x)


def test_every_gpu_is_looked_at(gpus):
    x = on_gpu()
    gpus.are((9, 0), (7, 0))
    text = backends.explain(x)
    assert text.startswith("reference: ")
    assert text.count("GPU 1 (GPU of (7, 0)) has 7.0") == 1
    gpus.are((7, 5), (9, 0))  # the minimum itself
    assert backends.available("cuda") == ("triton", "reference")
    gpus.built("7.5 9.0")
    assert backends.choose(x) == "cuda"


def test_gpus_of_amd_have_capabilities_of_their_own(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    gpus.are((6, 0))
    gpus.lack(cuda, "not for AMD")
    assert backends.choose(on_gpu()) == "triton"


def test_meta_tensors_need_no_kernels():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.choose(torch.empty(1, device="meta")) == "reference"
    assert "no compiled kernels for device type 'meta'" in backends.explain(torch.empty(1, device="meta"))


def test_a_backend_is_one_file_and_one_row():
    names = {m.name for m in pkgutil.iter_modules(backends.__path__)}
    modules = [importlib.import_module(f"kafops.backends.{name}") for name in sorted(names)]
    found = [m.BACKEND for m in modules if hasattr(m, "BACKEND")]
    assert sorted(b.name for b in found) == sorted(b.name for b in backends.ORDER)
    assert all(b in backends.ORDER for b in found)
    assert [b.name for b in backends.ORDER] == ["cpu", "cuda", "triton", "reference"]
    for b in backends.ORDER:
        assert b.kernels <= kernels.KERNELS.keys()
        assert all(hasattr(ops, name) for name in b.operators)
        if b.devices is not None and b.default_devices is not None:
            assert b.default_devices <= b.devices


@pytest.mark.parametrize("b", backends.ORDER, ids=lambda b: b.name)
def test_a_backend_has_functions_for_its_operators(b):
    """Those that loading has registered, or that activating it does."""
    for device_type in sorted(b.default_devices or ()):
        if b.why_not(device_type) is not None:
            continue
        kept = b.activate(device_type) if b.activate is not None else None
        for name in b.operators:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"kafops::{name}", device_type.upper())
        if kept is not None:
            torch_private.unregister(kept)


@compiled
def test_explain_takes_tensors_devices_and_their_names(gpus):
    for wanted, device in (("cpu: compiled kernels", "cpu"), ("cuda: compiled CUDA kernels", "cuda:1")):
        text = backends.explain(device)
        assert text.startswith(wanted)
        assert text == backends.explain(torch.device(device))
    assert backends.explain(torch.empty(1)) == backends.explain("cpu")
    assert backends.explain(on_gpu()) == backends.explain("cuda")
    with pytest.raises(RuntimeError, match="gpu"):
        backends.explain("gpu")


@pytest.mark.parametrize("device_type", ["xpu", "mps"])
def test_other_devices_go_to_the_reference(device_type):
    assert backends.available(device_type) == ("reference",)
    wanted = f"reference: plain PyTorch, because kafops has no compiled kernels for device type {device_type!r}"
    assert backends.explain(device_type) == wanted


@pytest.mark.parametrize("kernel", sorted(kernels.KERNELS))
def test_kernels_that_a_backend_does_not_have_are_announced(kernel, gpus):
    backends._warn_of_kernel.cache_clear()
    x = on_gpu()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert backends.choose_for(kernel, x) == "cuda"
        with kafops.backend("triton"):
            assert backends.choose_for(kernel, x) == backends.choose_for(kernel, x) == "triton"
        if cpu.load_error is None:
            assert backends.choose_for(kernel, torch.empty(1)) == "cpu"
        with kafops.backend("reference"):
            assert backends.choose_for(kernel, x) == "reference"
    if kernel == "gaussian":
        assert not caught
    else:
        (warning,) = caught
        assert f"computes kernel {kernel!r} in plain PyTorch" in str(warning.message)
        assert "because backend 'triton' has 'gaussian' only" in str(warning.message)


def test_what_is_asked_of_gpus_is_asked_once(gpus, monkeypatch):
    x, asked = on_gpu(), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: asked.append(i) or (9, 0))
    for _ in range(3):
        assert backends.choose(x) == "cuda"
        assert backends.available("cuda") == ("cuda", "triton", "reference")
    assert asked == [0, 0]  # is it too old, and were the kernels built for it


def test_what_is_asked_of_gpus_is_a_constant_under_torch_compile(gpus, monkeypatch):
    """Neither traced, which would break the graph, nor asked again."""

    def double_where_cuda_serves(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if cuda.BACKEND.why_not("cuda") is None else x

    def double_where_triton_serves(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if triton.BACKEND.why_not("cuda") is None else x

    def capability(i: int) -> tuple[int, int]:
        torch._dynamo.graph_break()  # as what PyTorch does there would
        return (9, 0)

    x = torch.ones(3)
    for f in (double_where_cuda_serves, double_where_triton_serves):
        ask_again()
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
        compiled = torch.compile(f, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), 2 * x)


@compiled
def test_explain_tells_what_was_chosen_at_load():
    """The kernels choose an instruction set once: a later change of the environment changes neither them nor this."""
    done = run(
        """
import os, torch, kafops
x, alpha, gamma = torch.linspace(-3, 3, 20).reshape(2, 10), torch.ones(1, 20), torch.ones(1)
y = kafops.kaf(x, alpha, gamma)
for other in ("portable", "avx2", "sse9", ""):
    print(kafops.backends.explain("cpu"), kafops.backends.cpu.capability(), torch.equal(kafops.kaf(x, alpha, gamma), y))
    os.environ["KAFOPS_CPU_CAPABILITY"] = other
""",
        KAFOPS_CPU_CAPABILITY=(chosen := cpu.capability()),
    )
    line = f"cpu: compiled kernels, instruction set {chosen} {chosen} True"
    assert done.stdout.splitlines() == [line] * 4, done.stdout + done.stderr


ON_A_GPU = """
import sys, types, torch

def asked(*arguments):
    raise AssertionError("importing kafops asked for the GPUs")

torch.version.cuda = "13.0"
torch.cuda.device_count = torch.cuda.get_device_capability = torch.cuda.get_device_name = asked
module = types.ModuleType("kafops._C_cuda")
module.architectures = lambda: "8.0"
sys.modules["kafops._C_cuda"] = module
import kafops
from kafops import backends
from torch._subclasses.fake_tensor import FakeTensorMode

registrations = []
impl = torch.library.Library.impl

def count(library, name, function, key="", **options):
    if key == "CUDA":
        registrations.append(name)
    impl(library, name, function, key, **options)

torch.library.Library.impl = count

def registered():
    assert len(set(registrations)) == len(registrations)
    return torch._C._dispatch_has_kernel_for_dispatch_key("kafops::kaf", "CUDA")

with FakeTensorMode():
    x = torch.empty(2, 3, device="cuda")
    arguments = x, torch.empty(3, 4, device="cuda"), torch.empty(3, device="cuda")
print(registered())
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda i: (9, 0)
torch.cuda.get_device_name = lambda i: "H100"
print(backends.explain(x).startswith("triton: "), backends.available("cuda")[0], registered())
"""
CALLS = {  # and what they print
    "eager": ("print([kafops.kaf(*arguments).shape for _ in range(2)])", "[torch.Size([2, 3]), torch.Size([2, 3])]"),
    "compile": ("print(torch.compile(lambda x: backends.choose(x), backend='eager', fullgraph=True)(x))", "triton"),
    "export": (
        """
class Curve(torch.nn.Module):
    def forward(self, *arguments):
        return kafops.kaf(*arguments)

nodes = torch.export.export(Curve(), arguments, strict=True).graph.nodes
print([str(node.target) for node in nodes if node.op == "call_function"])
""",
        "['kafops.kaf.default']",
    ),
}


@pytest.mark.skipif(triton.load_error is not None, reason=str(triton.load_error))
@pytest.mark.parametrize(("call", "printed"), CALLS.values(), ids=CALLS)
def test_functions_are_registered_by_choosing_and_not_by_asking(call, printed):
    """Where the compiled kernels are not for this GPU, Triton's are there before the first call, traced or not."""
    done = run(f"{ON_A_GPU}{call}\nprint(registered())", KAFOPS_BACKEND="")
    assert done.stdout.splitlines() == ["False", "True triton False", printed, "True"], done.stdout + done.stderr


@pytest.mark.skipif(triton.load_error is not None, reason=str(triton.load_error))
def test_operators_may_be_called_directly_where_the_cuda_kernels_could_not_be_loaded():
    """As an exported program does, which chooses nothing."""
    program = "print(torch._C._dispatch_has_kernel_for_dispatch_key('kafops::kaf', 'CUDA'))"
    done = run(without("kafops._C_cuda", "ImportError('no')") + program, KAFOPS_BACKEND="")
    assert done.stdout.splitlines() == ["True"], done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------- forcing


def test_forcing_the_reference():
    x, alpha, gamma = torch.randn(7, 3), torch.randn(3, 20), torch.ones(3)
    with kafops.backend("reference"):
        assert backends.choose(x) == "reference"
        assert backends.explain(x) == "reference: plain PyTorch, because kafops.backend('reference') is in force"
        assert torch.equal(kafops.kaf(x, alpha, gamma), kafops.reference.kaf(x, alpha, gamma, 3.0))
    assert backends._forced is None


@compiled
def test_forced_backends_nest_and_end_with_an_error():
    x = torch.empty(1)

    def use_and_fail() -> None:
        with kafops.backend("cpu"):
            assert backends.choose(x) == "cpu"
            raise KeyError

    with kafops.backend("reference"):
        with pytest.raises(KeyError):
            use_and_fail()
        assert backends.choose(x) == "reference"
    assert backends.choose(x) == "cpu"


@compiled
def test_a_compiled_function_notices_what_is_forced():
    layer = torch.compile(kafops.KAF1d(3, dtype=torch.float64), backend="eager", fullgraph=True)
    x = torch.randn(5, 3, dtype=torch.float64)
    y = layer(x)
    with kafops.backend("reference"):
        expected = layer(x)
        assert torch.equal(expected, layer(x))
        assert not torch.equal(expected, y)
    torch.testing.assert_close(y, expected)
    assert torch.equal(layer(x), y)


def test_unknown_backend():
    with pytest.raises(ValueError, match="there is no backend 'cudnn'; kafops has 'cpu', 'cuda', 'triton', 'refere"):
        kafops.backend("cudnn").__enter__()


def test_a_backend_that_cannot_be_used_here(monkeypatch):
    monkeypatch.setattr(cpu, "load_error", "not built")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot be used here: .* could not be loaded \(not built\)"):
        kafops.backend("cpu").__enter__()
    assert backends._forced is None


def test_a_tensor_that_the_forced_backend_cannot_serve(gpus):
    with kafops.backend("cuda"):
        assert backends.choose(on_gpu()) == "cuda"
        with pytest.raises(
            RuntimeError, match=r"kafops.backend\('cuda'\) is in force, which cannot serve a tensor on 'cpu'"
        ):
            kafops.kaf(torch.ones(2, 3), torch.ones(3, 4), torch.ones(3))


def test_forcing_triton_puts_its_functions_before_the_others(gpus, monkeypatch):
    """On CPU tensors, for the interpreter serves those too; the function is replaced by one that is easy to know."""
    monkeypatch.setattr(triton, "interpreted", True)
    monkeypatch.setattr(triton, "kaf", lambda x, *arguments: torch.full_like(x, 7.0))
    x, arguments = torch.ones(2, 3), (torch.ones(3, 4), torch.ones(3), None, 3.0)
    before = ops.kaf(x, *arguments)
    with kafops.backend("triton"):
        assert backends.explain(x).startswith("triton: Triton kernels, run by Triton's interpreter, because")
        assert torch.equal(ops.kaf(x, *arguments), torch.full_like(x, 7.0))
        assert torch.equal(kafops.kaf(x, arguments[0], arguments[1]), torch.full_like(x, 7.0))
    assert torch.equal(ops.kaf(x, *arguments), before)


@compiled
def test_the_last_entered_is_in_force_and_leaving_takes_ones_own():
    """In whatever order they leave, as contexts of several threads do."""
    x = torch.empty(1)
    a, b, c = kafops.backend("reference"), kafops.backend("cpu"), kafops.backend("reference")
    chosen = []
    for step in (a.__enter__, b.__enter__, c.__enter__):
        step()
        chosen.append(backends.choose(x))
    for context in (b, a, c):
        context.__exit__(None, None, None)
        chosen.append(backends.choose(x))
    assert chosen == ["reference", "cpu", "reference", "reference", "reference", "cpu"]
    assert backends._forced is None


@compiled
def test_two_threads_that_overlap_leave_nothing_behind():
    """A in, B in, A out, B out."""
    x = torch.empty(1)
    steps = {name: threading.Event() for name in ("A is in", "B is in", "A is out")}
    seen = {}

    def first() -> None:
        with kafops.backend("reference"):
            steps["A is in"].set()
            assert steps["B is in"].wait(60)
            seen["both are in"] = backends.choose(x)
        seen["A is out"] = backends.choose(x)
        steps["A is out"].set()

    def second() -> None:
        assert steps["A is in"].wait(60)
        with kafops.backend("cpu"):
            steps["B is in"].set()
            assert steps["A is out"].wait(60)
            seen["B is in"] = backends.choose(x)

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(first), pool.submit(second)]:
            done.result()
    assert seen == dict.fromkeys(("both are in", "A is out", "B is in"), "cpu")
    assert backends._forced is None
    assert "is in force" not in backends.explain(x)


def test_a_thread_waits_until_another_has_entered(gpus, monkeypatch):
    """While functions are registered for one thread, none can enter in between and be overruled."""
    monkeypatch.setattr(triton, "interpreted", True)
    halfway, go_on, first_entered, second_entered, done = (threading.Event() for _ in range(5))
    impl = torch.library.Library.impl

    def slow(*arguments, **options):
        halfway.set()
        assert go_on.wait(60)
        impl(*arguments, **options)

    def first() -> None:
        with kafops.backend("triton"):
            first_entered.set()
            assert done.wait(60)

    def second() -> None:
        with kafops.backend("reference"):
            second_entered.set()
            assert done.wait(60)

    monkeypatch.setattr(torch.library.Library, "impl", slow)
    with ThreadPoolExecutor(2) as pool:
        threads = [pool.submit(first)]
        assert halfway.wait(60)
        threads.append(pool.submit(second))
        second_entered.wait(0.5)  # time to enter in between, if it could
        go_on.set()
        assert first_entered.wait(60)
        assert second_entered.wait(60)
        in_force = backends._forced
        done.set()
        for thread in threads:
            thread.result()
    assert in_force == "reference"
    assert backends._forced is None


def test_many_threads_leave_nothing_behind(gpus, monkeypatch):
    """Neither a backend in force nor a function of Triton's: each thread enters and leaves, nested, many times."""
    monkeypatch.setattr(triton, "interpreted", True)
    monkeypatch.setattr(triton, "kaf", lambda x, *arguments: torch.full_like(x, 7.0))
    x, arguments = torch.ones(2, 3), (torch.ones(3, 4), torch.ones(3), None, 3.0)
    before = ops.kaf(x, *arguments)

    def enter_and_leave(seed: int) -> None:
        names = random.Random(seed).choices(("triton", "reference", "cuda"), k=40)
        for outer, inner in itertools.pairwise(names):
            with kafops.backend(outer), kafops.backend(inner):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter_and_leave, range(8)))
    assert backends._forced is None
    assert torch.equal(ops.kaf(x, *arguments), before)


@pytest.mark.parametrize("around", [None, "reference"])
@pytest.mark.parametrize("fails_at", [1, 3, 4, 6])  # within the functions of the first device, and of the second
def test_an_error_on_entry_leaves_nothing_behind(fails_at, around, gpus, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", True)
    monkeypatch.setattr(triton, "kaf", lambda x, *arguments: torch.full_like(x, 7.0))
    x, arguments = torch.ones(2, 3), (torch.ones(3, 4), torch.ones(3), None, 3.0)
    before = ops.kaf(x, *arguments)
    count = itertools.count(1)
    impl = torch.library.Library.impl

    def fail(self, *arguments, **options):
        if next(count) == fails_at:
            raise KeyError("no room")
        impl(self, *arguments, **options)

    with kafops.backend(around) if around else contextlib.nullcontext():
        with monkeypatch.context() as patch:
            patch.setattr(torch.library.Library, "impl", fail)
            with pytest.raises(KeyError, match="no room") as kept:  # and what its frames refer to
                kafops.backend("triton").__enter__()
        assert backends._forced == around
        assert torch.equal(ops.kaf(x, *arguments), before)
        with kafops.backend("triton"):  # it may be entered later
            assert torch.equal(ops.kaf(x, *arguments), torch.full_like(x, 7.0))
    assert backends._forced is None
    assert torch.equal(ops.kaf(x, *arguments), before)
    assert kept.value.args == ("no room",)


@pytest.mark.parametrize("inner", ["triton", "reference", "cuda"])
def test_leaving_an_inner_backend_restores_the_functions_of_the_outer(inner, gpus, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", True)
    monkeypatch.setattr(triton, "kaf", lambda x, *arguments: torch.full_like(x, 7.0))
    x, arguments = torch.ones(2, 3), (torch.ones(3, 4), torch.ones(3), None, 3.0)
    before, sevens = ops.kaf(x, *arguments), torch.full((2, 3), 7.0)
    with kafops.backend("triton"):
        kept = list(backends._overrides)  # does not keep them in force
        assert len(kept) == 2  # for CPU and CUDA tensors
        with kafops.backend(inner):
            assert torch.equal(ops.kaf(x, *arguments), sevens if inner == "triton" else before)
        assert torch.equal(ops.kaf(x, *arguments), sevens)
        kept += backends._overrides
    assert torch.equal(ops.kaf(x, *arguments), before)


def test_what_is_available_does_not_depend_on_what_is_forced(gpus):
    before = backends.available("cpu"), backends.available("cuda")
    with kafops.backend("reference"):
        assert (backends.available("cpu"), backends.available("cuda")) == before


def test_meta_tensors_obey_no_backend_in_force(gpus):
    with kafops.backend("cuda"):
        assert backends.choose(torch.empty(1, device="meta")) == "reference"
        assert backends.explain("meta").endswith("no compiled kernels for device type 'meta'")


@pytest.mark.skipif(triton.interpreted, reason="says why it serves no CPU tensors without its interpreter")
def test_triton_serves_cpu_tensors_by_its_interpreter_only(gpus):
    with (
        kafops.backend("triton"),
        pytest.raises(RuntimeError, match=r"cannot serve a tensor on 'cpu': .* where TRITON_INTERPRET=1 interprets"),
    ):
        backends.choose(torch.empty(1))


@compiled
def test_entering_again_compiles_nothing_again():
    counter = CompileCounter()
    layer = torch.compile(kafops.KAF1d(3), backend=counter, fullgraph=True)
    x = torch.randn(5, 3)
    for _ in range(10):
        layer(x)
        with kafops.backend("reference"):
            layer(x)
            with kafops.backend("cpu"):
                layer(x)
    assert counter.frame_count == 3  # one each for nothing in force, the reference, and the CPU


@compiled
@pytest.mark.parametrize("around", [None, "cpu"])
def test_a_compiled_function_may_force_a_backend(around):
    """In one graph, and with nothing left behind."""
    layer = kafops.KAF1d(3)

    def by_both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with kafops.backend("reference"):
            y = layer(x)
        return y, layer(x)

    counter = CompileCounterWithBackend("eager")
    x = torch.randn(5, 3)
    with kafops.backend(around) if around else contextlib.nullcontext():
        for got, want in zip(torch.compile(by_both, backend=counter, fullgraph=True)(x), by_both(x), strict=True):
            assert torch.equal(got, want)
        assert backends._forced == around
    assert backends._forced is None
    (graph,) = counter.graphs
    assert [str(n.target) for n in graph.graph.nodes].count("kafops.kaf.default") == 1


def test_a_function_that_forces_triton_is_compiled_around_it(gpus, monkeypatch):
    """Its functions have to be in place when the graph runs, not when it is traced."""
    monkeypatch.setattr(triton, "interpreted", True)
    monkeypatch.setattr(triton, "kaf", lambda x, *arguments: torch.full_like(x, 7.0))
    x, alpha, gamma = torch.ones(2, 3), torch.ones(3, 4), torch.ones(3)
    before = kafops.kaf(x, alpha, gamma)

    @torch.compile(backend="eager")
    def by_triton(x: torch.Tensor) -> torch.Tensor:
        with kafops.backend("triton"):
            return kafops.kaf(x, alpha, gamma)

    @torch.compile(backend="eager")
    def by_cuda(x: torch.Tensor) -> torch.Tensor:
        with kafops.backend("cuda"):
            return ops.kaf(x, alpha, gamma, None, 3.0)

    for _ in range(2):
        assert torch.equal(by_triton(x), torch.full_like(x, 7.0))
        assert backends._forced is None
        assert torch.equal(kafops.kaf(x, alpha, gamma), before)
        with kafops.backend("triton"):
            assert torch.equal(by_cuda(x), before)  # and around one that takes them away
            assert torch.equal(kafops.kaf(x, alpha, gamma), torch.full_like(x, 7.0))


@pytest.mark.parametrize("x", [math.inf, -math.inf, 1e19])
@pytest.mark.parametrize("kernel", sorted(kernels.KERNELS))
def test_far_inputs_add_nothing_to_the_gradients_of_the_reference(kernel, x):
    """Neither NaN, as an infinite distance times a kernel value of 0 would, nor anything else."""

    def y_and_gradients(*values: float) -> tuple[torch.Tensor, ...]:
        z = torch.tensor([values]).T.requires_grad_()
        alpha, gamma, dictionary = torch.ones(1, 3), torch.ones(1), torch.tensor([[-1.0, 0.0, 1.0]])
        parameters = tuple(p.requires_grad_() for p in (alpha, gamma, dictionary))
        with kafops.backend("reference"):
            y = kafops.kaf_free(z, *parameters, kernel=kernel)
        return y, *torch.autograd.grad(y.sum(), (z, *parameters))

    y, of_z, *of_parameters = y_and_gradients(0.5, x)
    assert y[1] == 0 or math.isfinite(x)
    assert of_z[1] == 0
    for got, want in zip(of_parameters, y_and_gradients(0.5)[2:], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def run(program: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


def test_the_environment_forces_a_backend():
    program = "import torch, kafops; print(kafops.backends.explain(torch.empty(1)))"
    done = run(program, KAFOPS_BACKEND="reference")
    assert "because KAFOPS_BACKEND=reference asks for backend 'reference'" in done.stdout, done.stderr
    done = run(
        "import torch, kafops\nwith kafops.backend('reference'): print(kafops.backends.explain('cpu'))\n"
        "print(kafops.backends.explain('cpu'))",
        KAFOPS_BACKEND="reference",
    )
    inner, outer = done.stdout.splitlines()
    assert inner.endswith("because kafops.backend('reference') is in force")
    assert outer.endswith("because KAFOPS_BACKEND=reference asks for backend 'reference'")
    done = run(program, KAFOPS_BACKEND="nonsense")
    assert done.returncode != 0
    assert "there is no backend 'nonsense'" in done.stderr


def test_importing_kafops_does_not_import_triton():
    done = run("import sys, kafops; print('triton' in sys.modules)", KAFOPS_BACKEND="")
    assert done.stdout.strip() == "False", done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- what is not there


def without(module: str, message: str) -> str:
    """Return the start of a program in which importing a module fails."""
    return f"""
import importlib, sys, warnings
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise {message}
sys.meta_path.insert(0, Missing())
import torch, kafops
"""


def test_cuda_kernels_that_cannot_be_loaded():
    """The reason is kept, and all else works: one wheel serves a torch without CUDA, which lacks libtorch_cuda.so."""
    message = "ImportError('libtorch_cuda.so: cannot open shared object file')"
    program = "print(kafops.backends.cuda.load_error); print(kafops.KAF1d(3)(torch.ones(2, 3)).shape)"
    done = run("import torch; torch.version.cuda = None\n" + without("kafops._C_cuda", message) + program)
    assert done.stdout.splitlines() == ["this torch was built without CUDA", "torch.Size([2, 3])"], done
    assert "CUDA kernels" not in done.stderr


def test_cuda_kernels_that_a_torch_with_cuda_cannot_load_are_not_passed_over_in_silence():
    message = "ImportError('libcudart.so.13: cannot open shared object file')"
    done = run("import torch; torch.version.cuda = '12.8'\n" + without("kafops._C_cuda", message))
    assert "UserWarning: kafops cannot load its CUDA kernels, so Triton's serve" in done.stderr
    assert "were built for CUDA 13, and this torch for CUDA 12.8; build them for it" in done.stderr
    assert cuda.reason(ImportError("undefined symbol: f"), "13.0") == "undefined symbol: f"


def test_cuda_kernels_that_were_not_built():
    done = run(without("kafops._C_cuda", "ModuleNotFoundError('no module')") + "print(kafops.backends.cuda.load_error)")
    assert "installed without CUDA kernels; reinstall it where there is nvcc" in done.stdout, done.stderr
