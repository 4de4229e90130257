"""Derivatives by torch.autograd: against the reference's, against finite differences, and where they must raise."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from cases import LAYOUTS
from forms import NAMES, assert_equal_to_rounding, forms, kaf, make_arguments, reference

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


def third(f, arguments, i):
    """A third derivative in argument i, by three calls of torch.autograd.grad."""
    y = f(*arguments).sin().sum()
    for _ in range(2):
        (g,) = torch.autograd.grad(y, arguments[i], create_graph=True)
        y = g.pow(2).sum()
    return torch.autograd.grad(y, arguments[i])


@forms
def test_third_derivative_raises(free):
    arguments = make_arguments(free)
    for i in range(len(arguments)):
        third(reference, arguments, i)
        with pytest.raises(RuntimeError, match="third derivative"):
            third(kaf, arguments, i)


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
