"""Kernels other than the Gaussian by the routes on which PyTorch asks for derivatives."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from forms import NAMES, assert_equal_to_rounding, forms, make_arguments
from other_kernels import F32, F64, curve, defined, of_kernels
from test_func import FIRST, SECOND, along, gradient, leaves, loop, mapped_arguments
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import kafops
from kafops.backends import cpu

needs_kernels = pytest.mark.skipif(cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}")

# ------------------------------------------------------------------------------------------- torch.func, forward mode

CHOSEN = ("jacfwd", "hessian", "jacfwd of jacfwd")
CHOSEN = {name: {**FIRST, **SECOND}[name] for name in CHOSEN}


@of_kernels
@forms
@pytest.mark.parametrize("transform", CHOSEN.values(), ids=CHOSEN)
def test_transform_matches_the_definition(kernel, free, transform):
    arguments = make_arguments(free, (2, 3, 2), size=3, requires_grad=False)
    assert_equal_to_rounding(leaves(transform(curve(kernel), arguments)), leaves(transform(defined(kernel), arguments)))


@of_kernels
@forms
def test_vmap(kernel, free):
    """Over samples, over sets of parameters, and of per-sample gradients."""
    for in_dims in ((0, None, None, None), (None, 0, 0, 0), (1, 0, -1, 0)):
        in_dims = in_dims[: 4 if free else 3]
        for shape, shared in (((2, 3), False), ((2, 3, 2), True), ((5,), True)):
            arguments = mapped_arguments(free, shape, shared, in_dims)
            for of in (lambda f: f, gradient_of_all):
                got = torch.func.vmap(of(curve(kernel)), in_dims)(*arguments)
                assert_equal_to_rounding(got, loop(of(defined(kernel)), arguments, in_dims))


def gradient_of_all(f):
    return lambda *a: torch.func.grad(lambda *b: f(*b).sin().sum(), tuple(range(len(a))))(*a)


@pytest.mark.parametrize(("kernel", "order"), [("matern32", 2), ("bspline", 2), ("bspline", 3)])
def test_every_mixture_of_modes_is_right_or_raises(kernel, order):
    arguments = make_arguments(True, (2, 3), size=3, requires_grad=False)
    outermost = [along, gradient] if order == 2 else [gradient]
    for modes in itertools.product(outermost, *([along, gradient],) * (order - 1)):
        for chosen in itertools.product(range(4), repeat=order):

            def derivative(f, fixed, remaining):
                if not remaining:
                    return f(*fixed).sin()
                (i, mode), *rest = remaining
                return mode(lambda t: derivative(f, [*fixed[:i], t, *fixed[i + 1 :]], rest))(fixed[i])

            steps = list(zip(chosen, modes, strict=True))
            names = [NAMES[i] for i in chosen]
            try:
                got = derivative(curve(kernel), arguments, steps)
            except RuntimeError as error:
                if order == 2 or names.count("alpha") > 1 or "no more than 2 derivatives" not in str(error):
                    raise
            else:
                assert order == 2 or "alpha" in names, (names, modes)
                assert_equal_to_rounding(got, derivative(defined(kernel), arguments, steps))


@of_kernels
@forms
def test_transforms_of_the_backward_of_a_plain_call(kernel, free):
    """A vmap, and a level of forward mode, entered after the forward pass has run the operator."""
    arguments = make_arguments(free, (2, 3, 2))
    y, want = (f(*arguments) for f in (curve(kernel), defined(kernel)))
    basis = torch.randn(4, *y.shape, dtype=F64)
    assert_equal_to_rounding(
        *(torch.autograd.grad(t, arguments, basis, is_grads_batched=True, retain_graph=True) for t in (y, want))
    )
    with forward_ad.dual_level():
        tangents = torch.autograd.grad(y, arguments, forward_ad.make_dual(basis[0], basis[1]))
        tangents = [forward_ad.unpack_dual(t).tangent for t in tangents]
    assert_equal_to_rounding(tangents, torch.autograd.grad(want, arguments, basis[1]))


# ------------------------------------------------------------------------------------------------------- torch.compile


def outputs_and_gradients(f, arguments):
    y = f(*arguments)
    return y, *torch.autograd.grad(y.sin().sum(), arguments)


@needs_kernels
@of_kernels
@forms
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_makes_one_graph_of_one_operator(kernel, free, dynamic):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *t: curve(kernel)(*t) * 2, backend=counter, fullgraph=True, dynamic=dynamic)
    compilations = set()
    for shape in [(4, 3, 6), (6, 7, 8)] if dynamic else [(4, 3, 6)]:
        arguments = make_arguments(free, shape)
        want = outputs_and_gradients(lambda *t: defined(kernel)(*t) * 2, arguments)
        assert_equal_to_rounding(outputs_and_gradients(compiled, arguments), want)
        compilations.add(counter.frame_count)
    assert len(compilations) == 1
    targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    assert targets.count("kafops.kaf.default") == 1


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_inductor_trains_a_layer(backend):
    if backend == "cpu" and cpu.load_error is not None:
        pytest.skip("no compiled kernels")
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), kafops.KAF2d(4, 5, kernel="matern32", learn_gamma=True)).to(F64)
    x = torch.randn(2, 3, 6, 6, dtype=F64).to(memory_format=torch.channels_last)
    with kafops.backend(backend):
        got = torch.compile(net, fullgraph=True)(x)
        got = (got, *torch.autograd.grad(got.sin().sum(), tuple(net.parameters())))
    want = net(x)
    assert_equal_to_rounding(got, (want, *torch.autograd.grad(want.sin().sum(), tuple(net.parameters()))))


def test_forward_mode_inside_compile():
    arguments = make_arguments(False, requires_grad=False)
    torch._dynamo.reset()

    def tangent(*t):
        return torch.func.jvp(curve("bspline"), t, t)[1]

    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    assert_equal_to_rounding(compiled(*arguments), tangent(*arguments))


@needs_kernels
def test_traced_graphs_hold_the_operators():
    arguments = make_arguments(True)
    f = curve("rational_quadratic")
    graph = make_fx(lambda *t: outputs_and_gradients(f, t), tracing_mode="symbolic")(*arguments)
    assert {"kafops.kaf.default", "kafops.kaf_backward.default"} <= {str(n.target) for n in graph.graph.nodes}
    others = [(t.detach() + 0.1).requires_grad_() for t in arguments]
    assert_equal_to_rounding(graph(*others), outputs_and_gradients(defined("rational_quadratic"), others))
    layer = kafops.KAF1d(3, 5, kernel="rational_quadratic")
    x = torch.randn(2, 3)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_autocast_leaves_it_to_x():
    layer = kafops.KAF1d(4, kernel="bspline")
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.alpha.grad.dtype == F32
    exact = kafops.reference.kaf(x.double(), layer.alpha.double(), layer.gamma.double(), 3.0, "bspline")
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)
