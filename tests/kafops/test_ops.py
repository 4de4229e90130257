"""The operators as torch.library sees them: schemas, fake kernels, registrations; on every layout."""

import pytest
import torch
from cases import LAYOUTS
from forms import BOUNDARY, assert_equal_to_rounding, forms, make_arguments, reference
from torch import library

from kafops import kernels, ops, plain
from kafops.ops import Needs

X_AND_PARAMETERS = Needs.X + Needs.ALPHA + Needs.GAMMA + Needs.DICTIONARY

# name: shape of x, layout, one row for all channels
TENSORS = {
    "contiguous": ((2, 3, 2, 2), "contiguous", False),
    "channels_last": ((2, 3, 2, 2), "channels_last", False),
    "transposed": ((2, 3, 2, 2), "transposed", False),
    "every_third": ((2, 3, 4), "every_third", False),
    "expanded": ((2, 3, 4), "expanded_batch", False),
    "empty": ((0, 3, 2), "contiguous", False),
    "no_channels": ((2, 0, 2), "contiguous", False),
    "matrix": ((4, 3), "contiguous", False),
    "shared": ((2, 3, 2), "contiguous", True),
    "shared_vector": ((5,), "contiguous", True),
    "shared_scalar": ((), "contiguous", True),
}
tensors = pytest.mark.parametrize(("shape", "layout", "shared"), TENSORS.values(), ids=TENSORS.keys())


def arguments_in_layout(free, shape, layout, shared, requires_grad=True):
    """x, alpha, gamma and dictionary or None; parameters transposed, so that their strides matter too."""
    x, *parameters = make_arguments(free, shape, shared=shared, requires_grad=False)
    x = LAYOUTS[layout](x)
    parameters = [LAYOUTS["transposed"](p) for p in parameters]
    leaves = [t.detach().requires_grad_(requires_grad) for t in (x, *parameters)]
    return (*leaves, None)[:4]


@forms
@tensors
def test_opcheck_forward(free, shape, layout, shared):
    arguments = arguments_in_layout(free, shape, layout, shared)
    torch.library.opcheck(ops.kaf, (*arguments, BOUNDARY))
    want = reference(*arguments)
    y = ops.kaf(*arguments, BOUNDARY)
    assert_equal_to_rounding(y, want)
    assert y.stride() == torch.empty_like(arguments[0]).stride()


@forms
@tensors
def test_opcheck_backward(free, shape, layout, shared):
    arguments = arguments_in_layout(free, shape, layout, shared)
    y = reference(*arguments)
    grad = torch.randn_like(y, requires_grad=True)
    needs = X_AND_PARAMETERS
    torch.library.opcheck(ops.kaf_backward, (grad, *arguments, BOUNDARY, needs))
    leaves = [t for t in arguments if t is not None]
    got = ops.kaf_backward(grad, *arguments, BOUNDARY, needs)
    assert_equal_to_rounding(got[: len(leaves)], torch.autograd.grad(y, leaves, grad))
    assert got[0].stride() == torch.empty_like(arguments[0]).stride()


@forms
@tensors
def test_opcheck_double_backward(free, shape, layout, shared):
    arguments = arguments_in_layout(free, shape, layout, shared)
    y = reference(*arguments)
    grad = torch.randn_like(y, requires_grad=True)
    leaves = [t for t in arguments if t is not None]
    first = torch.autograd.grad(y, leaves, grad, create_graph=True)
    v = [torch.randn_like(t) for t in first]
    inputs = (*(*v, None)[:4], grad, *arguments, BOUNDARY)
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
    torch.library.opcheck(ops.kaf_double_backward, (*detached, X_AND_PARAMETERS + Needs.GRAD))
    # The first output, Jv, can be differentiated again.
    torch.library.opcheck(ops.kaf_double_backward, (*inputs, int(Needs.GRAD)))
    got = ops.kaf_double_backward(*detached, X_AND_PARAMETERS + Needs.GRAD)
    want = torch.autograd.grad(first, (grad, *leaves), v, allow_unused=True, materialize_grads=True)
    assert_equal_to_rounding(got[: len(want)], want)
    assert got[0].stride() == got[1].stride() == torch.empty_like(arguments[0]).stride()


@forms
def test_gradients_not_asked_for_are_empty(free):
    x, alpha, gamma, *rest = make_arguments(free, requires_grad=False)
    arguments = (x, alpha, gamma, *rest, None)[:4]
    whole = ops.kaf_backward(torch.ones_like(x), *arguments, BOUNDARY, X_AND_PARAMETERS)
    for needs in range(16):
        got = ops.kaf_backward(torch.ones_like(x), *arguments, BOUNDARY, needs)
        for i, (g, w) in enumerate(zip(got, whole, strict=True)):
            assert torch.equal(g, w) if needs & (1 << i) else g.shape == (0,)


@forms
@pytest.mark.parametrize("needs", range(16))
def test_dtypes_and_orders_of_what_is_not_asked_for(free, needs):
    """As the kernels have them: a parameter's own dtype, and orders checked of what is computed alone."""
    x, *parameters = make_arguments(free, requires_grad=False)
    arguments = (x, *(p.float() for p in parameters), None)[:4]
    library.opcheck(ops.kaf_backward, (torch.ones_like(x), *arguments, BOUNDARY, needs))
    for backward in (ops.kaf_backward, plain.kaf_backward):
        got = backward(torch.ones_like(x), *arguments, BOUNDARY, needs)
        assert [g.dtype for g in got] == [(x if t is None else t).dtype for t in arguments]
    meta = [None if t is None else t.to("meta") for t in (torch.ones_like(x), *arguments)]
    kappa = kernels.KERNELS["matern32"].code
    for order in ((12, 0), (13, 0), (0, 6), (0, 7), (1, 0), (2, 0), (4, 0)):
        for code in (0, kappa):
            failed = []
            for a in ([torch.ones_like(x), *arguments], meta):
                try:
                    ops.kaf_backward(*a, BOUNDARY, needs, code, 0, *order)
                except RuntimeError:
                    failed.append(a is meta)
            assert failed in ([], [False, True]), (order, code)
