"""What is particular to the Triton kernels. Their values are tested by test_kernels.py, run by Triton's interpreter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import BF16, F16, F32, F64, Case

import kafops
from kafops import ops
from kafops.accuracy import excess, values
from kafops.backends import triton
from kafops.backends.triton import cells
from kafops.backends.triton.geometry import geometry
from kafops.ops import Needs

ROOT = Path(__file__).parents[2]
OPERATORS = ("kaf", "kaf_backward", "kaf_double_backward")
SHARED = frozenset({"alpha", "gamma"})

needs_triton = pytest.mark.skipif(triton.load_error is not None, reason=str(triton.load_error))
interpreted = pytest.mark.skipif(not triton.interpreted, reason="is run by test_interpreted")


def python(*arguments: str, **environment: str) -> str:
    """Run python in a process of its own, interpreting nothing unless asked to; return what it prints."""
    plain = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "KAFOPS_BACKEND")}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=plain | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


# ------------------------------------------------------------------------------------------------------ importing


def test_imports_without_triton():
    program = "import sys; sys.modules['triton'] = None; from kafops.backends import triton; print(triton.load_error)"
    assert python("-c", program).strip() == "the package triton is not installed"


def test_triton_is_imported_only_when_needed():
    loaded = "print('triton' in sys.modules)"
    before, after = python("-c", f"import sys, torch; {loaded}; import kafops; {loaded}").split()
    assert before == after


# -------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("architecture", ["90", "hip", "interpreted"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_programs_cover_the_matrix_once(operator, architecture):
    """As `_place` and `_tile` in kernels.py share it, over all programs."""
    for B, C, L in ((1, 3, 1), (5, 3, 2), (37, 6, 16), (2, 3, 50_176), (127, 2, 49), (300, 70, 1), (1, 1, 100_003)):
        g = geometry(operator, architecture, B, C, L, 4)
        R, W, align = (g.constants[name] for name in ("R", "W", "ALIGN"))
        _, _, _, units, gap, parts, part, rows_each, magic, shift = g.integers
        seen = torch.zeros(B * C * L, dtype=torch.int32)
        for program in range(g.programs):
            chunk = program // C if g.constants["RUNS"] else program
            row = chunk // parts * rows_each
            if g.constants["RUNS"]:
                begin = chunk % parts * part
                offset = (row * C + program % C) * units * align + begin * align
                q = torch.arange(min(units - begin, part) * min(B - row, rows_each))
                run = q * (magic % 2**32) >> shift
                assert torch.equal(run, q // units if rows_each > 1 else 0 * q)
                at = offset + (q + run * gap)[:, None] * align + torch.arange(W)
            else:
                column = chunk % parts * W
                assert units * align == C * L
                q = torch.arange(min(B - row, rows_each))
                at = (row + q)[:, None] * C * L + torch.arange(column, min(column + W, C * L))
            seen[at.flatten()] += 1
        assert (seen == 1).all(), g
        assert g.tiling.threads * max(g.tiling.elements, 4) == R * W or architecture == "interpreted"


@pytest.mark.parametrize("architecture", ["75", "90", "hip"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_a_program_has_is_bounded(operator, architecture):
    """It adds up to 64 terms in float32, its indices fit int32, and partial sums for α, γ and δ take a tenth of x."""
    for B in (1, 5, 4096, 3 * 10**9):
        for C in (1, 3, 64, 1000):
            for L in (1, 9, 16, 49, 1024, 50_176, 2**31 + 4):
                g = geometry(operator, architecture, B, C, L, 4)
                rows = g.integers[6] * g.integers[7] if g.constants["RUNS"] else g.integers[7]
                assert rows <= g.constants["R"] * min(64, g.tiling.tiles)
                assert g.programs < 2**31 or B * C * L > 2**40
                if operator != "kaf":
                    assert g.chunks * g.columns * 41 <= max(B * C * L / 10, 41 * 2 * g.tiling.programs * 32)


@pytest.mark.parametrize("shape", [(64, 1), (64, 49), (64, 1024), (3, 50_176), (1, 10**6)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_constants_do_not_depend_on_the_batch(operator, shape):
    constants = [geometry(operator, "90", B, *shape, 4).constants for B in (1, 5, 8, 37, 128, 1000, 10**6)]
    assert all(c == constants[0] for c in constants)


# ---------------------------------------------------------------------------------------------------------- tables


def test_cells_are_those_of_the_cuda_kernels():
    """One set of numbers says on which cells a curve is a polynomial, exact enough: csrc/cuda has the same."""
    text = {name: (ROOT / "csrc" / "cuda" / name).read_text() for name in ("call.h", "tables.cuh", "cells.cuh")}
    whole = "\n".join(text.values())
    for expression in (
        f"{cells.WIDTH} / root", f"{cells.WIDEST} * width", "4.4721360 / root", f"kGroupReach = {cells.UNDERFLOW}f",
        "t >= 1.0 / 1024", f"t <= {cells.MOST_T}", f"kCoefficients = {cells.COEFFICIENTS}",
        f"kTablePoints = {cells.POINTS}", *(f"{n}f" for n in cells.NODES),
    ):  # fmt: skip
        assert expression in whole, expression
    assert cells.TAIL == 4.4721360
    assert "static_cast<int>((0.714 * (size - 1) + 8.95) / (0.52 * 1.12)) + 4" in text["call.h"]
    assert cells.cells_for(20) == 42


def test_polynomials_through_the_nodes():
    nodes = torch.tensor([-n for n in cells.NODES] + list(cells.NODES[::-1])).double()  # float32 first
    powers = nodes[:, None] ** torch.arange(8)
    torch.testing.assert_close(powers @ torch.tensor(cells.coefficients(), dtype=F64), torch.eye(8, dtype=F64))


def recorded(function, *arguments):
    recorder = triton._Recorder("90")
    token = triton._recorder.set(recorder)
    try:
        function(*arguments)
    finally:
        triton._recorder.reset(token)
    return recorder.launches


@needs_triton
@pytest.mark.parametrize(
    ("dtype", "layout", "count"), [(BF16, "channels_last", 5), (BF16, "contiguous", 9), (F32, "contiguous", 7)], ids=str
)
def test_a_training_run_compiles_few_kernels(dtype, layout, count):
    """Forward and backward of ResNet50's maps: one for each width of access, and what makes tables and adds sums."""
    compiled = set()
    for C, side in ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)):
        x = torch.empty(128, C, side, side, dtype=dtype, device="meta")
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        p = x, torch.empty(C, 20, device="meta"), torch.empty(C, device="meta"), None, 3.0
        for call in (triton.kaf, *p), (triton.kaf_backward, x, *p, int(Needs.X | Needs.ALPHA)):
            for kernel, _, given, constants in recorded(*call):
                types = tuple(v.dtype if isinstance(v, torch.Tensor) else v is None for v in given)
                compiled.add((kernel.__name__, types, tuple(constants.items())))
    assert len(compiled) == count


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("free", [False, True])
def test_memory(free, layout):
    """Tables take at most a quarter of x, and with partial sums as much as tests/gpu allows: a tenth."""
    for shape in ((16, 64, 128, 128), (8, 2048, 7, 7), (64, 2048, 7, 7), (4, 3, 40, 40)):
        x = torch.empty(shape, device="meta")
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        C = shape[1]
        alpha, gamma = torch.empty(C, 20, device="meta"), torch.empty(C, device="meta")
        launches = recorded(triton.kaf_backward, x, x, alpha, gamma, alpha if free else None, 3.0, 15)
        taken = {kernel.__name__: values for kernel, _, values, _ in launches}
        table = taken["tables_kernel"][6].nbytes if "tables_kernel" in taken else 0
        assert table <= x.nbytes / 4
        if x.nbytes > 2**26:
            assert table > 0
            assert table + taken["add_partial_sums_kernel"][0].nbytes <= 0.09 * x.nbytes


@needs_triton
def test_no_number_of_points_is_too_large():
    """Programs share elements alone where points are many."""
    x = torch.empty(64, 3, device="meta")
    alpha = torch.empty(3, 2_000_000, device="meta")
    launches = recorded(triton.kaf_backward, x, x, alpha, torch.empty(3, device="meta"), None, 3.0, 3)
    assert [kernel.__name__ for kernel, *_ in launches] == ["kaf_backward_kernel", "add_partial_sums_kernel"]
    assert launches[0][2][-2] == 1  # windows


# ------------------------------------------------------------------------------------------------------- compiling

COMPILE = """
import json, re, shutil, subprocess, sys, tempfile, warnings
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kafops.backends.triton import ahead_of_time
import triton.backends.nvidia as nvidia

name, dtype = sys.argv[1:]
amd = name.startswith("gfx")
target = GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
cuobjdump = shutil.which("cuobjdump", path=next(iter(nvidia.__path__)) + "/bin")
for c in ahead_of_time(getattr(torch, dtype), "hip" if amd else name.removeprefix("sm_")):
    compiled = triton.compile(ASTSource(c.kernel, c.signature, c.constexprs, c.attrs), target=target, options=c.options)
    if amd:
        text = compiled.asm["amdgcn"]
        # Scalar registers spill to vector registers, which costs no memory.
        spilled = sum(map(int, re.findall(r"\\.(?:vgpr_spill_count|private_segment_fixed_size):\\s+(\\d+)", text)))
        wide = "load_dwordx4" in text, "store_dwordx4" in text
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            run = lambda option: subprocess.run([cuobjdump, option, file.name], capture_output=True, text=True).stdout
            text, usage = run("-sass"), run("-res-usage")
        stack, local = re.search(r"STACK:(\\d+).*LOCAL:(\\d+)", usage).groups()
        spilled = int(stack) + int(local) + len(re.findall(r"\\b(?:LDL|STL)\\b", text))
        wide = bool(re.search(r"LDG\\.E\\S*\\.128", text)), bool(re.search(r"STG\\.E\\S*\\.128", text))
    integers = [p for p in c.kernel.params if c.signature[p.name] == "i32"]
    specialized = [p.name for p in integers if not p.do_not_specialize]
    found = {"name": c.name, "vector": c.vector, "spilled": spilled, "wide": wide, "specialized": specialized}
    print(json.dumps(found))
"""


@needs_triton
@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        *((a, F32) for a in ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")),
        *((a, BF16) for a in ("sm_75", "sm_90", "gfx942")),
        ("sm_90", F16),
        ("sm_90", F64),
    ],
    ids=str,
)
def test_compiles(architecture, dtype):
    """Without a GPU: every kernel, nothing spilled, 16 bytes at once where alignment permits, nothing specialized."""
    found = [json.loads(line) for line in python("-c", COMPILE, architecture, str(dtype)[6:]).splitlines()]
    assert {name for operator in OPERATORS for name in (f"{operator} contiguous", f"{operator} channels_last")} <= {
        c["name"] for c in found
    }
    for c in found:
        assert c["spilled"] == 0, c
        assert c["specialized"] == [], c
        if c["vector"] * dtype.itemsize >= 16:
            assert c["wide"] == [True, True], c


# -------------------------------------------------------------------------------------------------- by interpreter


@needs_triton
@pytest.mark.skipif(triton.interpreted, reason="this is the process that it starts")
def test_interpreted():
    command = "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "writes or change or operators_run"
    python(*command, TRITON_INTERPRET="1", KAFOPS_BACKEND="triton")


@pytest.fixture(autouse=True, scope="module")
def _interpreter():
    if triton.interpreted:
        from triton_interpreter import exact_fma, patch_once

        exact_fma()
        patch_once()


@pytest.fixture
def guarded(monkeypatch):
    """Make outputs and partial sums slices of larger tensors of NaN; return the function that checks these."""
    made, margin = [], 64

    def guard(t: torch.Tensor, whole: bool = True) -> torch.Tensor:
        around = t.new_full((t.untyped_storage().nbytes() // t.element_size() + 2 * margin,), torch.nan)
        inside = torch.as_strided(around, t.shape, t.stride(), margin)
        made.append((around, inside, whole))
        return inside

    def check() -> int:
        for around, inside, whole in made:
            assert not whole or not inside.isnan().any(), "an element was not written"
            inside.fill_(torch.nan)
            assert around.isnan().all(), "something beside the elements was written"
        return len(made)

    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **k: empty_like(t, **k) if k or t.is_meta else guard(empty_like(t))
    )
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        # Tables have one dimension, and room that channels do not need.
        lambda t, size, **k: (
            new_empty(t, size, **k)
            if "device" in k
            else guard(new_empty(t, size, **k), whole=not isinstance(size, int))
        ),
    )
    return check


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        Case((37, 19)),
        Case((300, 3), size=33),
        Case((3, 5, 7, 7), dtype=BF16, size=8),
        Case((2, 3, 130), dtype=F16, size=5),
        Case((2, 3, 131), size=5),
        Case((5, 3, 12, 11), layout="channels_last", grad_layout="cropped", size=5),
        Case((2, 3, 12, 11), spacing=8.0, size=5, dtype=F64, free=True),
        Case((20_001,), shared=SHARED, size=5),
        Case((600,), layout="offset", shared=SHARED, size=5),
    ],
    ids=str,
)
def test_writes_what_it_should_and_nothing_else(case, guarded):
    p = case.problem()
    arguments = p.x, p.alpha, p.gamma, p.dictionary, p.boundary
    v = (*p.v, None)[:4]
    triton.kaf(*arguments)
    triton.kaf_backward(p.grad, *arguments, int(Needs.X | Needs.ALPHA))
    triton.kaf_backward(p.grad, *arguments, 15)
    triton.kaf_double_backward(*v, p.grad, *arguments, 31)
    assert guarded() >= 18


@interpreted
@pytest.mark.parametrize("size", [2, 5, 20, 21, 128])
def test_around_the_change_of_formula(size, monkeypatch):
    """On both sides of the bounds for powers and for cells, with large coefficients and far inputs."""
    monkeypatch.setattr(triton, "worth", lambda *_: True)
    for spacing in (2**-10 * 0.999, 2**-10 * 1.001, 0.5, 0.52, 1.5, 8.0):
        p = Case((400, 2), size=size, spacing=spacing).problem()
        x = torch.linspace(-40, 40, p.x.numel(), dtype=F64).reshape(p.x.shape) * p.boundary / size
        p = replace(p, x=x.float() + p.x.sign() * p.boundary, alpha=p.alpha * 1e4)
        wrong = {k: e for k, e in excess(p, values(p, kafops)).items() if not e <= 1}
        assert not wrong, f"spacing={spacing}: {wrong}"


@interpreted
def test_operators_run_by_this_backend(monkeypatch):
    """That the tests above and test_kernels.py test these kernels, and not those of the CPU."""
    calls = []
    monkeypatch.setattr(triton, "_launch", lambda *a: calls.append(a[1].__name__))
    p = Case((5, 3)).problem()
    arguments = p.x, p.alpha, p.gamma, None, p.boundary
    ops.kaf(*arguments)
    ops.kaf_backward(p.grad, *arguments, 3)
    ops.kaf_double_backward(p.v[0], None, None, None, p.grad, *arguments, 1)
    kernels = ["kaf_kernel", "kaf_backward_kernel", "add_partial_sums_kernel", "kaf_double_backward_kernel"]
    assert calls == kernels


# -------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_cuda_graph(layout):
    """A graph can hold all operators, and replays them on new data: nothing is read on the host."""
    p = Case((8, 32, 17, 16), layout=layout).problem(device="cuda")

    def run() -> list[torch.Tensor]:
        arguments = p.x, p.alpha, p.gamma, None, p.boundary
        v = p.v[0], None, None, None
        return [
            triton.kaf(*arguments),
            *triton.kaf_backward(p.grad, *arguments, 7),
            *triton.kaf_double_backward(*v, p.grad, *arguments, 23),
        ]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    p.x.mul_(-0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))
