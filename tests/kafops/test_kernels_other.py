"""Kernels other than the Gaussian: values, derivatives and exactness against formulas and the float64 reference."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import BF16, DTYPES, F16, Case
from forms import assert_equal_to_rounding, forms, make_arguments
from other_kernels import F32, F64, KERNELS, KNOT, curve, defined, of_kernels

import kafops
from kafops import backends, bases, kernels, plain

ROOT = Path(__file__).parents[2]


def derivatives(f, arguments, grad):
    """y, its gradients, and the gradients of a weighted sum of these, by name."""
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    y = f(*arguments)
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    v = [((7 * torch.arange(t.numel()) % 5 - 2) / 2).reshape(t.shape).to(t.dtype) for t in first]  # -1, -1/2, ... 1
    second = torch.autograd.grad(first, (grad, *leaves), v, materialize_grads=True)
    return [t.detach() for t in (y, *first, *second)]


# ------------------------------------------------------------------------------------------------------ the definitions


@pytest.mark.parametrize(
    ("kernel", "u", "wanted"),
    [
        ("gaussian", 1.0, math.exp(-1)),
        ("rational_quadratic", 1.0, 1 / 2),
        ("rational_quadratic", -2.0, 1 / 5),
        ("matern32", 1.0, (1 + math.sqrt(2)) * math.exp(-math.sqrt(2))),
        ("matern32", -3 / math.sqrt(2), 4 * math.exp(-3)),
        ("bspline", KNOT / 2, 1 - 3 / 8 + 3 / 32),
        ("bspline", -KNOT, 1 / 4),
        ("bspline", 1.5 * KNOT, 1 / 32),
        ("bspline", 2 * KNOT, 0),
        ("bspline", -5.0, 0),
    ],
)
def test_values_by_hand(kernel, u, wanted):
    assert kernels.value(kernel, torch.tensor(u, dtype=F64)).item() == pytest.approx(wanted, rel=1e-14, abs=1e-15)


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_all_have_one_height_and_one_curvature(kernel):
    """And their derivatives are those of the formulas, by finite differences, at knots and elsewhere."""
    zero = torch.zeros((), dtype=F64)
    assert [kernels.value(kernel, zero, order).item() for order in range(3)] == [1, 0, -2]
    u, h = torch.cat([torch.linspace(-4, 4, 801, dtype=F64), KNOT * torch.arange(-2, 3, dtype=F64)]), 1e-6
    for order in (0, 1):
        slope = (kernels.value(kernel, u + h, order) - kernels.value(kernel, u - h, order)) / (2 * h)
        # Rounding leaves 2e-16/h = 2e-10, and a jump of the third derivative, at most 9, leaves 9h/4.
        torch.testing.assert_close(kernels.value(kernel, u, order + 1), slope, rtol=0, atol=5e-6)
    limits = kernels.value(kernel, torch.tensor([math.inf, -math.inf, 1e30], dtype=F64))
    assert (limits <= 1e-36).all()
    assert kernels.value(kernel, torch.tensor(math.nan)).isnan()


def test_splines_reproduce_straight_lines():
    """With the default γ the knots are the points: Σ_k (a + b δ_k) κ = 3/2 (a + b x), as B-splines sum to 1 at 2/3."""
    layer = kafops.KAF(1, 9, 2.0, kernel="bspline", dtype=F64)
    layer.alpha.data.copy_(3 - 2 * layer.points())
    x = torch.linspace(-1.5, 1.5, 101, dtype=F64)  # the outermost points see no neighbour
    torch.testing.assert_close(layer(x).detach(), 1.5 * (3 - 2 * x), rtol=0, atol=1e-13)


def test_one_kernel_of_three_points_by_hand():
    x = torch.tensor([[0.5]], dtype=F64)
    alpha = torch.tensor([[1.0, 2.0, -1.0]], dtype=F64)
    gamma = torch.tensor([4.0], dtype=F64)  # u = 2 (x − δ) = 5, 1, −3 for δ = −2, 0, 2
    y = kafops.kaf(x, alpha, gamma, 2.0, kernel="rational_quadratic")
    assert y.item() == pytest.approx(1 / 26 + 2 / 2 - 1 / 10, rel=1e-14)


def test_the_others_are_all_tested():
    assert set(KERNELS) == set(kernels.KERNELS) - {"gaussian"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_half_precision_is_rounded_once(kernel, order, dtype):
    u = torch.tensor([0.0, 0.3, -1.7, 100.0, -60000.0]).to(dtype)
    assert torch.equal(kernels.value(kernel, u, order), kernels.value(kernel, u.float(), order).to(dtype))


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_compiled_values_are_those_of_eager_calls(kernel):
    """Also where a square overflows and where |u| has no derivative; and their slopes, as far as there are any."""
    u = [0.0, 0.3, -1.7, KNOT, -2 * KNOT, 30.0, 1e30, math.inf, -math.inf, math.nan]
    u = torch.tensor(u, dtype=F64, requires_grad=True)

    def values(u):
        return [kernels.value(kernel, u, order) for order in range(3)]

    compiled = torch.compile(values, backend="eager", fullgraph=True)(u)
    for order, (got, want) in enumerate(zip(compiled, values(u), strict=True)):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        if order < 2:
            got, want = (torch.autograd.grad(y[:-1].sum(), u)[0][:-1] for y in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_wrong_arguments_are_named():
    x, alpha, gamma = torch.zeros(2, 3), torch.zeros(3, 4), torch.ones(3)
    for call in (
        lambda k: kafops.kaf(x, alpha, gamma, 1.0, kernel=k),
        lambda k: kafops.kaf_free(x, alpha, gamma, alpha, kernel=k),
        lambda k: kafops.reference.kaf(x, alpha, gamma, 1.0, kernel=k),
        lambda k: kafops.KAF(3, kernel=k),
        lambda k: kafops.init.ridge(torch.tanh, alpha[0], gamma, kernel=k),
        lambda k: kafops.init.gradient_factor(alpha, gamma, alpha, kernel=k),
        lambda k: kafops.init.Isometric(kernel=k),
        lambda k: kernels.value(k, x),
    ):
        with pytest.raises(ValueError, match=r"kernel must be one of 'gaussian'.*got 'matern'; .* 'matern32'"):
            call("matern")
        with pytest.raises(TypeError, match=r"kernel must be one of .*got NoneType"):
            call(None)
    with pytest.raises(ValueError, match="order must be an integer from 0 to 2 for 'bspline', got 3"):
        kernels.value("bspline", x, 3)
    with pytest.raises(ValueError, match="gamma must have one row per channel"):
        kafops.kaf(x, alpha, torch.ones(2), kernel="bspline")


# ------------------------------------------------------------------------------------- exactness, on a table of cases


def majorants(p):
    """For each value of `derivatives`, the sum of the absolute values of its terms if every kernel value were 1."""
    channels = p.x.shape[1] if p.x.dim() > 1 else 1
    shape = p.x.transpose(0, 1).shape if p.x.dim() > 1 else p.x.shape

    def as_x(t):  # [C, positions] or [C, 1] -> as x
        t = t.expand(channels, p.x.numel() // max(channels, 1)).reshape(shape)
        return t.transpose(0, 1) if p.x.dim() > 1 else t

    def like(t, parameter):  # [C, D] or [C, 1] -> as the parameter
        t = t.expand(channels, p.alpha.shape[1]) if parameter.dim() == 2 else t[:, 0]
        return t.sum(0, keepdim=True) if len(parameter) == 1 else t

    g = p.grad.double().abs()
    g = (g.transpose(0, 1) if g.dim() > 1 else g).reshape(channels, g.numel() // max(channels, 1))  # [C, positions]
    a = p.alpha.double().abs().expand(channels, -1)  # [C, D]
    gamma = p.gamma.double().expand(channels).unsqueeze(1)  # [C, 1]
    root, half, free = gamma.sqrt(), 1 / (2 * gamma), float(p.dictionary is not None)
    sum_a, sum_g, size = a.sum(1, keepdim=True), g.sum(1, keepdim=True), a.shape[1]
    # L = <v, gradients> with |v| ≤ 1 has four parts, from the gradients of x, alpha, gamma and the dictionary.
    of_x, of_alpha, of_gamma, of_points = root * sum_a, torch.full_like(root, size), half * sum_a, free * root * sum_a
    along = of_x + of_alpha + of_gamma + of_points
    first = [as_x(root * sum_a * g), like(sum_g, p.alpha), like(half * sum_a * sum_g, p.gamma)]
    # A derivative by γ of u^p κ^(o) with p ≤ 1, of √γ and of 1/γ: 3/γ covers each.
    second = [as_x(along), as_x(root * g * (along + of_gamma)), like((root + half + free * root) * sum_g, p.alpha)]
    second.append(like(3 / gamma * along * sum_g, p.gamma))
    if p.dictionary is not None:
        first.append(like(root * a * sum_g, p.dictionary))
        second.append(like(root * (a * (root + 2 * half) + 1 + root * a) * sum_g, p.dictionary))
    return [as_x(sum_a), *first, *second]


ALONE = frozenset({"alpha", "gamma", "dictionary"})
SMALL = [
    Case(shape=(5, 3)),
    Case(shape=(2, 3, 300), free=True),
    Case(shape=(2, 18, 5, 7), layout="channels_last", grad_layout="transposed", size=5),
]
TABLE = [
    *SMALL,
    *(Case(shape=s, shared=ALONE, free=f) for s in ((), (600,), (0,)) for f in (False, True)),
    *(Case(shape=s) for s in ((1, 1), (3, 17, 4, 4), (2, 3, 4, 5, 6), (0, 3, 4), (2, 0, 4), (9000, 2))),
    *(Case(shape=(4, 6, 9, 5), size=5, layout=name, grad_layout=other, free=free) for name, other, free in (
        ("channels_last", "contiguous", False), ("cropped", "expanded", True),
        ("every_other_channel", "cropped", False), ("expanded_channel", "swapped", True),
        ("overlapping", "channels_last", False))),
    *(replace(SMALL[2], dtype=dtype) for dtype in (BF16, F16, F64)),
    *(Case(dtype=a, parameter_dtype=b, free=a == F64) for a in DTYPES for b in (F32, F64)),
    Case(dtype=F64),  # even points in float64, whatever alpha is
    *(Case(size=d, spacing=t, free=f) for d, t, f in (
        (1, 1 / 6, False), (2, 1 / 8, True), (20, 3 / 2, False), (33, 8.0, True), (128, 1 / 6, False),
        (64, 1e4, True))),
    *(Case(boundary=b) for b in (1e-3, 1e3)),
    *(Case(shape=(40, 3), shared=frozenset(s), free=True, varied=True)
      for s in (("alpha",), ("gamma",), ("dictionary",), ("alpha", "gamma"), ("gamma", "dictionary"))),
]  # fmt: skip


@of_kernels
@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case, kernel):
    """A term, of size 2 at most, is within 8 roundings of the truth, those of its u included; adding D costs D more.

    Where x has a half type autograd adds up to eight parts that are each rounded to it.
    """
    p = case.problem(device="cpu")

    def f(functions, kernel=kernel):
        if p.dictionary is None:
            return lambda x, alpha, gamma: functions.kaf(x, alpha, gamma, p.boundary, kernel)
        return lambda *arguments: functions.kaf_free(*arguments, kernel)

    arguments = [t.detach().requires_grad_() for t in p.arguments.values()]
    got = derivatives(f(kafops), arguments, p.grad.detach().requires_grad_())
    doubled = [t.detach().double().requires_grad_() for t in arguments]
    exact = derivatives(f(kafops.reference), doubled, p.grad.detach().double().requires_grad_())
    unit = torch.finfo(torch.promote_types(p.x.dtype, F32)).eps / 2
    for value, truth, allowed in zip(got, exact, majorants(p), strict=True):
        assert value.shape == truth.shape
        own = torch.finfo(value.dtype)
        rounding = own.eps / 2 * (8 * allowed if value.dtype in (BF16, F16) else truth.abs()) + own.smallest_normal
        error = (value.double() - truth).abs()
        assert (error <= (8 + case.size) * unit * allowed + rounding).all(), (error / allowed / unit).max()
    x = arguments[0]
    assert got[0].dtype == x.dtype
    assert got[0].stride() == got[1].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_even_points_are_as_exact_as_x(kernel):
    """In float64 where x is, by the compiled kernels, in plain PyTorch and by the definition, whatever alpha is."""
    x, alpha, gamma = (t.detach() for t in make_arguments(False, (50, 3), size=20))
    alpha, gamma = alpha.float(), gamma.float()
    want = kafops.reference.kaf(x, alpha.double(), gamma.double(), 3.0, kernel)
    code = kernels.KERNELS[kernel].code
    got = [f(x, alpha, gamma, 3.0, kernel) for f in (kafops.kaf, kafops.reference.kaf)]
    for y in (*got, plain.kaf(x, alpha, gamma, None, 3.0, code)):
        torch.testing.assert_close(y, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("kernel", kernels.KERNELS)
@forms
def test_second_derivatives_of_half_precision_are_not_rounded_on_the_way(free, kernel, dtype):
    """The gradient of Σ v g f′(x) in the parameters, which are float32, is that for the same numbers in float32."""
    x, *parameters = make_arguments(free, (5, 3), dtype=F32)
    x, grad, v = (t.detach().to(dtype) for t in (x, x.sin(), x.cos()))

    def second(arithmetic, create_graph):
        z = x.detach().to(arithmetic).requires_grad_()
        y = curve(kernel)(z, *parameters)
        (dx,) = torch.autograd.grad(y, z, grad.to(arithmetic), create_graph=True)
        return torch.autograd.grad(dx, parameters, v.to(arithmetic), create_graph=create_graph)

    for create_graph in (False, True):
        for got, want in zip(second(dtype, create_graph), second(F32, create_graph), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_table_on_other_instruction_sets(capability):
    environment = os.environ | {"KAFOPS_CPU_CAPABILITY": capability}
    if backends.cpu.load_error is not None:
        pytest.skip(f"no compiled kernels: {backends.cpu.load_error}")
    names = "test_table and (5x3 or 2x3x300 or 2x18x5x7)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if "does not run here" in done.stdout + done.stderr:
        pytest.skip(f"{capability} does not run here")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# ------------------------------------------------------------------------------------------------------------- promises


@of_kernels
@forms
def test_second_derivatives_at_points_and_knots(kernel, free):
    """Where |x − δ| has no derivative, and where a piece of the spline ends: x on every point, with γ = 3/(2Δ²)."""
    points = torch.linspace(-2, 2, 5, dtype=F64).repeat(3, 1)
    gamma = torch.full((3,), 1.5, dtype=F64).requires_grad_()
    x = points.T.clone().requires_grad_()
    alpha = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    arguments = (x, alpha, gamma, points.requires_grad_())[: 4 if free else 3]
    grad = torch.ones_like(x, requires_grad=True)
    assert_equal_to_rounding(derivatives(curve(kernel), arguments, grad), derivatives(defined(kernel), arguments, grad))


@of_kernels
@forms
def test_gradcheck(kernel, free):
    """By finite differences, away from the knots' jumps of third derivatives as far as chance goes."""
    arguments = make_arguments(free, (2, 3, 2), size=4)
    assert torch.autograd.gradcheck(curve(kernel), arguments, check_forward_ad=True, check_batched_grad=True)
    arguments = make_arguments(free, (2, 3), size=4)
    assert torch.autograd.gradgradcheck(curve(kernel), arguments, check_fwd_over_rev=True)


@of_kernels
@pytest.mark.parametrize("route", ["fused", "reference"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16])
def test_nan_and_infinity(kernel, route, dtype):
    """NaN in its own element only; at ±inf the limit 0, flat; the largest numbers as good as that."""
    x = torch.tensor([math.nan, math.inf, -math.inf, torch.finfo(dtype).max, 0.4, -0.6], dtype=dtype)
    x = x.reshape(6, 1).requires_grad_()
    alpha = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    gamma = torch.tensor([1.5], requires_grad=True)

    def f(x):
        with kafops.backend("reference" if route == "reference" else "cpu"):
            return kafops.kaf(x, alpha, gamma, 1.0, kernel=kernel)

    if route == "fused" and backends.cpu.load_error is not None:
        pytest.skip("no compiled kernels")
    y = f(x)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x, retain_graph=True)
    for t in (y, dx, ddx):
        assert t.isnan().flatten().tolist() == [True, False, False, False, False, False]
        assert t[1:3].abs().max() == 0
        assert t[3].abs() <= 1e-6
        assert (t[4:].abs() > 0.01).all()
    some = x.detach()[1:]  # without the NaN
    leaves = (alpha, gamma)
    got = torch.autograd.grad(f(some).float().sum(), leaves)
    want = torch.autograd.grad(f(some[3:]).float().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert all(t.isnan().all() for t in torch.autograd.grad(f(x).float().sum(), leaves))


@of_kernels
@pytest.mark.parametrize("name", ["alpha", "gamma", "dictionary"])
def test_nan_in_a_parameter_reaches_its_channel_only(kernel, name):
    arguments = dict(zip(("x", "alpha", "gamma", "dictionary"), make_arguments(True, requires_grad=False), strict=True))
    arguments[name][1] = math.nan
    x = arguments["x"].requires_grad_()
    y = kafops.kaf_free(**arguments, kernel=kernel)
    (dx,) = torch.autograd.grad(y.sum(), x)
    for t in (y, dx):
        assert t.isnan().all(0).tolist() == t.isnan().any(0).tolist() == [False, True, False]


@of_kernels
@forms
def test_same_bits_on_every_run_and_any_number_of_threads(kernel, free):
    arguments = make_arguments(free, (3, 5, 90, 100), dtype=F32)
    grad = torch.randn_like(arguments[0], requires_grad=True)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(derivatives(curve(kernel), arguments, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@of_kernels
@forms
def test_derivatives_beyond_smoothness_raise(kernel, free):
    """A third one of splines and Matérn kernels; the rational quadratic has it."""
    arguments = make_arguments(free)
    for route in (curve(kernel), reference_curve(kernel)):
        for i, name in enumerate(("x", "alpha", "gamma", "dictionary")[: len(arguments)]):
            y = route(*arguments).sin().sum()
            for _ in range(2):
                (g,) = torch.autograd.grad(y, arguments[i], create_graph=True)
                y = g.pow(2).sum()
            if name == "alpha" or kernel == "rational_quadratic":  # in alpha, all derivatives are those of the sine
                torch.autograd.grad(y, arguments[i])
            else:
                with pytest.raises(RuntimeError, match="no more than 2 derivatives"):
                    torch.autograd.grad(y, arguments[i])


def reference_curve(kernel):
    def f(x, alpha, gamma, dictionary=None):
        if dictionary is None:
            return kafops.reference.kaf(x, alpha, gamma, 2.0, kernel)
        return kafops.reference.kaf_free(x, alpha, gamma, dictionary, kernel)

    return f


@of_kernels
@forms
def test_only_inputs_are_saved_for_backward(kernel, free):
    arguments = make_arguments(free, (8, 16, 4, 4), size=20, dtype=F32)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = curve(kernel)(*arguments)
    x = arguments[0]
    assert x.data_ptr() in kept
    sizes = [t.untyped_storage().nbytes() for at, t in kept.items() if at != x.data_ptr()]
    assert sum(sizes) <= 8 * (2 * 16 * 20 + 16)  # the parameters in float64
    y.sum().backward()


def test_where_there_are_no_kernels_a_warning_says_so(monkeypatch):
    x, alpha, gamma = (t.detach() for t in make_arguments(False))
    want = kafops.reference.kaf(x, alpha, gamma, 1.0, "matern32")
    monkeypatch.setattr(backends, "choose", lambda x: "triton")
    backends._warn_of_kernel.cache_clear()
    with pytest.warns(UserWarning, match=r"'matern32' in plain PyTorch.*backend 'triton' has 'gaussian' only"):
        got = kafops.kaf(x, alpha, gamma, 1.0, kernel="matern32")
    assert_equal_to_rounding(got, want)
    monkeypatch.undo()
    with kafops.backend("reference"):
        assert torch.equal(kafops.kaf(x, alpha, gamma, 1.0, kernel="matern32"), want)
    on_meta = kafops.kaf(x.to("meta"), alpha.to("meta"), gamma.to("meta"), 1.0, kernel="matern32")
    assert on_meta.device.type == "meta"
    assert on_meta.shape == x.shape


@pytest.mark.parametrize("kernel", kernels.KERNELS)
@pytest.mark.parametrize("base", [None, *bases.BASES])
def test_the_reference_has_gradients_of_nan_that_are_nan(kernel, base):
    x = torch.tensor([math.nan, 1.0, math.inf], requires_grad=True)
    alpha = torch.ones(1, 5)
    y = kafops.reference.kaf(x, alpha, torch.ones(1), kernel=kernel, base=base)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.isnan().tolist() == dx.isnan().tolist() == [True, False, False]
