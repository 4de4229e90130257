"""Derivatives by torch.autograd: against the reference's, against finite differences, and where they must raise."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import LAYOUTS
from forms import NAMES, assert_equal_to_rounding, forms, kaf, make_arguments, reference

import kafops
from kafops import ops
from kafops.ops import Needs

shared = pytest.mark.parametrize("shared", [False, True], ids=["per_channel", "shared"])


def layout_of(t, name):
    return LAYOUTS[name](t.detach()).detach().requires_grad_()


def assert_same_derivatives(arguments, grad):
    """First and second derivatives of kaf and of the reference, in every argument that requires grad."""
    wanted = [t for t in arguments if t.requires_grad]
    results = []
    for f in (kaf, reference):
        y = f(*arguments)
        first = torch.autograd.grad(y, wanted, grad, create_graph=True)
        v = [torch.sin(torch.arange(g.numel(), dtype=g.dtype)).reshape(g.shape) for g in first]
        second = torch.autograd.grad(first, (grad, *wanted), v, allow_unused=True, materialize_grads=True)
        results.append((y, *first, *second))
    for got, want in zip(*results, strict=True):
        assert_equal_to_rounding(got, want)


@forms
@shared
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "every_third", "expanded_batch"])
def test_derivatives_match_the_reference(free, shared, layout):
    x, *parameters = make_arguments(free, (3, 4, 2, 5), shared=shared)
    x = layout_of(x, layout)
    grad = layout_of(torch.randn_like(x), "channels_last")
    assert_same_derivatives((x, *parameters), grad)


@forms
@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 3, 0), (1, 1), (4, 3), (2, 3, 2, 1, 2)], ids=str)
def test_derivatives_of_every_shape(free, shape):
    arguments = make_arguments(free, shape)
    assert_same_derivatives(arguments, torch.randn_like(arguments[0], requires_grad=True))


@forms
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
def test_derivatives_of_a_shared_curve_of_any_rank(free, shape):
    arguments = make_arguments(free, shape, shared=True)
    assert_same_derivatives(arguments, torch.randn_like(arguments[0], requires_grad=True))


ALONE_OR_NOT = [c for n in (1, 2, 3) for c in itertools.combinations(NAMES, n)]


@pytest.mark.parametrize("names", ALONE_OR_NOT, ids="+".join)
def test_derivatives_where_only_some_arguments_require_grad(names):
    for free in (False, True) if "dictionary" not in names else (True,):
        arguments = make_arguments(free, (4, 3, 2))
        for name, t in zip(NAMES, arguments, strict=False):
            t.requires_grad_(name in names)
        assert_same_derivatives(arguments, torch.randn_like(arguments[0], requires_grad=True))


@forms
@shared
def test_gradcheck(free, shared):
    assert torch.autograd.gradcheck(
        kaf,
        make_arguments(free, (2, 3, 2), size=4, shared=shared),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@forms
@shared
def test_gradgradcheck(free, shared):
    assert torch.autograd.gradgradcheck(
        kaf,
        make_arguments(free, (2, 3), size=4, shared=shared),
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
        check_batched_grad=True,
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_each_argument_alone(name):
    arguments = [t.requires_grad_(n == name) for n, t in zip(NAMES, make_arguments(True), strict=True)]
    flags = {"check_batched_grad": True}
    assert torch.autograd.gradcheck(kaf, arguments, check_forward_ad=True, check_batched_forward_grad=True, **flags)
    assert torch.autograd.gradgradcheck(kaf, arguments, check_fwd_over_rev=True, **flags)
    if name != "dictionary":
        assert torch.autograd.gradcheck(kaf, arguments[:3], check_forward_ad=True, **flags)
        assert torch.autograd.gradgradcheck(kaf, arguments[:3], check_fwd_over_rev=True, **flags)


@forms
def test_forward_mode_matches_the_reference(free):
    arguments = make_arguments(free, (2, 3, 4), requires_grad=False)
    tangents = [torch.randn_like(t) for t in arguments]
    for chosen in itertools.product([False, True], repeat=len(arguments)):
        if not any(chosen):
            continue
        results = []
        for f in (kaf, reference):
            with forward_ad.dual_level():
                duals = [
                    forward_ad.make_dual(t, v) if c else t for t, v, c in zip(arguments, tangents, chosen, strict=True)
                ]
                results.append(forward_ad.unpack_dual(f(*duals)))
        assert_equal_to_rounding(*results)


@forms
def test_only_inputs_are_saved_for_backward(free):
    arguments = make_arguments(free, (8, 16, 4, 4), size=20, dtype=torch.float32)
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = kaf(*arguments)
    assert storages == {t.untyped_storage().data_ptr(): t.nbytes for t in arguments}
    y.sum().backward()


@forms
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_identical_gradients(free, use_reentrant):
    def gradients(f, dtype=torch.float32):
        arguments = make_arguments(free, (5, 3, 4), dtype=dtype)
        f(*arguments).pow(2).sum().backward()
        return [t.grad for t in arguments]

    def block(*arguments):
        return kaf(*arguments).sin() * 2

    plain = gradients(block)
    checkpointed = gradients(lambda *t: torch.utils.checkpoint.checkpoint(block, *t, use_reentrant=use_reentrant))
    exact = gradients(lambda *t: reference(*t).sin() * 2, dtype=torch.float64)
    for a, b, want in zip(plain, checkpointed, exact, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def first(f):
    """The gradients of Σ sin f, differentiable."""

    def gradients(*arguments):
        return torch.autograd.grad(f(*arguments).sin().sum(), arguments, create_graph=True)

    return gradients


def second(f):
    """The gradients of the squared norm of those."""

    def gradients(*arguments):
        penalty = sum((g * g).sum() for g in first(f)(*arguments))
        return torch.autograd.grad(penalty, arguments, create_graph=True)

    return gradients


@forms
@shared
def test_third_order(free, shared):
    arguments = make_arguments(free, (3, 2), size=3, shared=shared)
    assert torch.autograd.gradgradcheck(first(kaf), arguments)


@forms
def test_fourth_order(free):
    arguments = make_arguments(free, (2, 2), size=2)
    assert torch.autograd.gradgradcheck(second(kaf), arguments)


@pytest.mark.parametrize("rows", [(1, 2, 2), (2, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 1)], ids=str)
def test_third_order_where_some_parameters_are_shared(rows):
    """Coefficients such as s α have a row for each channel where either factor has; α's gradient has one."""
    x, *parameters = make_arguments(True, (3, 2), size=3)
    parameters = [p.detach()[:n].clone().requires_grad_() for p, n in zip(parameters, rows, strict=True)]
    assert torch.autograd.gradgradcheck(first(kaf), (x, *parameters))
    results = [second(f)(x, *parameters) for f in (kaf, reference)]
    assert_equal_to_rounding(*results)
    tangents = [t.cos().detach() for t in (x, *parameters)]
    results = [
        torch.func.jvp(
            torch.func.grad(lambda *a, f=f: f(*a).sin().sum(), (0, 1, 2, 3)), (x, *parameters), tuple(tangents)
        )[1]
        for f in (kaf, reference)
    ]
    assert_equal_to_rounding(*results)


@pytest.mark.parametrize("base", ["identity", "relu", "silu", "gelu"])
def test_a_base_enters_the_true_curve_only(base):
    """Derivatives of calls with other coefficients are made without it: in every pair of arguments, to third order."""

    def with_base(f):
        return lambda *arguments: f(*arguments, base=base)

    arguments = make_arguments(True, (4, 3), size=3)
    for order in (first, second):
        results = [order(with_base(f))(*arguments) for f in (kafops.kaf_free, kafops.reference.kaf_free)]
        assert_equal_to_rounding(*results)
    assert torch.autograd.gradcheck(first(with_base(kafops.kaf_free)), arguments)


@pytest.mark.parametrize("kernel", ["rational_quadratic", "matern32", "bspline"])
def test_other_kernels_as_far_as_they_are_smooth(kernel):
    """Second derivatives of all; beyond, of the analytic one only."""
    arguments = make_arguments(True, (4, 3), size=3)

    def with_kernel(f):
        return lambda *arguments: f(*arguments, kernel)

    assert_equal_to_rounding(*(first(with_kernel(f))(*arguments) for f in (kafops.kaf_free, kafops.reference.kaf_free)))
    assert torch.autograd.gradcheck(first(with_kernel(kafops.kaf_free)), arguments)
    if kernel == "rational_quadratic":
        assert torch.autograd.gradgradcheck(first(with_kernel(kafops.kaf_free)), arguments)
        return
    gradients = second(with_kernel(kafops.kaf_free))(*arguments)
    with pytest.raises(RuntimeError, match=f"{kernel}.* no more than 2 derivatives"):
        torch.autograd.grad(sum(g.sum() for g in gradients), arguments)


def test_orders_end_with_an_error():
    """n + 2m = 12 is the last; what comes after says so."""
    x, alpha, gamma = make_arguments(False, (4, 3), size=3)
    y = kaf(x, alpha, gamma)
    exact = reference(x, alpha, gamma)
    for _ in range(12):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (exact,) = torch.autograd.grad(exact.sum(), x, create_graph=True)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10 * exact.abs().max().item())
    with pytest.raises(RuntimeError, match=r"n \+ 2m = 12, got n = 13 and m = 0"):
        torch.autograd.grad(y.sum(), x)


def test_only_what_a_backward_pass_asks_for_is_computed(monkeypatch):
    """torch.autograd.grad(y, x) of parameters that require gradients makes no sums over elements."""
    x, alpha, gamma = make_arguments(False)
    asked, backward = [], ops.kaf_backward
    monkeypatch.setattr(ops, "kaf_backward", lambda *a: asked.append(a[6]) or backward(*a))
    (g,) = torch.autograd.grad(kaf(x * 1, alpha, gamma).sum(), x, create_graph=True)
    torch.autograd.grad(g.sum(), x, create_graph=True)
    torch.autograd.grad(kaf(x, alpha, gamma.log().exp()).sum(), (alpha, gamma), create_graph=True)
    assert list(dict.fromkeys(asked)) == [Needs.X, Needs.ALPHA + Needs.GAMMA]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", ["gaussian", "matern32"])
def test_second_derivatives_in_half_precision_round_no_products(dtype, kernel):
    """⟨v g, …⟩ summed over many elements: products rounded to a half type would be 1 % off where they are alike."""
    x = torch.full((4096, 1), 0.3).to(dtype).requires_grad_()
    alpha, gamma = torch.ones(1, 5, requires_grad=True), torch.ones(1)
    for differentiable in (False, True):
        y = kafops.kaf(x, alpha, gamma, kernel=kernel)
        (g,) = torch.autograd.grad(y, x, torch.full_like(y, 1.0078125), create_graph=True)
        (got,) = torch.autograd.grad(g, alpha, torch.full_like(g, 1.0078125), create_graph=differentiable)
        z = x.detach().double().requires_grad_()
        y = kafops.reference.kaf(z, alpha.double(), gamma.double(), 3.0, kernel)
        (g,) = torch.autograd.grad(y, z, torch.full_like(y, 1.0078125), create_graph=True)
        (want,) = torch.autograd.grad(g, alpha, torch.full_like(g, 1.0078125))
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * want.abs().max().item())


@forms
def test_no_tensor_of_elements_times_points_at_any_order(free):
    """The most memory that is taken at once, in tensors of the size of x, where one of N × D would be 20."""
    arguments = make_arguments(free, (64, 8, 32), size=20, dtype=torch.float32)
    x = arguments[0]

    def step():
        y = kaf(*arguments)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        y.square().sum().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 6 * x.nbytes  # of one operator: its outputs and nothing else


def test_zero_tensors_as_gradients_and_tangents():
    """PyTorch stands zeros in by tensors without storage; an operator must take them or say no, not crash."""
    x, alpha, gamma, dictionary = make_arguments(True, (3, 2), size=3)
    zero = torch._efficientzerotensor((3, 2), dtype=torch.float64)
    (g,) = torch.autograd.grad(kaf(x, alpha, gamma, dictionary), x, zero)
    assert g.abs().sum() == 0
    assert_equal_to_rounding(
        kaf(zero, alpha, gamma, dictionary), reference(torch.zeros(3, 2, dtype=torch.float64), alpha, gamma, dictionary)
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), zero)
        tangent = forward_ad.unpack_dual(kaf(dual, alpha.detach(), gamma.detach(), dictionary.detach())).tangent
        assert tangent is None or tangent.abs().sum() == 0


@forms
def test_derivative_of_a_tangent_made_by_two_backward_passes(free):
    """Jv as the gradient of <Jᵀu, v> in u: its gradient is a second derivative, and not refused as a third."""
    arguments = make_arguments(free)
    results = []
    for f in (kaf, reference):
        y = f(*arguments)
        u = torch.zeros_like(y, requires_grad=True)
        v = [torch.ones_like(t, requires_grad=True) for t in arguments]
        first = torch.autograd.grad(y, arguments, u, create_graph=True)
        (tangent,) = torch.autograd.grad(first, u, v, create_graph=True)
        results.append((tangent, *torch.autograd.grad(tangent.sin().sum(), (*arguments, *v))))
    for got, want in zip(*results, strict=True):
        assert_equal_to_rounding(got, want)
