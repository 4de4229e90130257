"""torch.func transforms: against the same transform of the reference, or against loops over samples."""

import itertools

import pytest
import torch
from forms import NAMES, assert_equal_to_rounding, forms, kaf, make_arguments, reference
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import kafops
from kafops import backends
from kafops import reference as definition

shared = pytest.mark.parametrize("shared", [False, True], ids=["per_channel", "shared"])


def constants(free, *args, **kwargs):
    return make_arguments(free, *args, requires_grad=False, **kwargs)


def curve(f):
    """A function with second derivatives in every pair of arguments, whose cotangents depend on its arguments."""
    return lambda *arguments: f(*arguments).sin()


def total(f):
    return lambda *arguments: curve(f)(*arguments).sum()


def all_of(arguments):
    return tuple(range(len(arguments)))


FIRST = {
    "grad": lambda f, a: grad(total(f), all_of(a))(*a),
    "grad_and_value": lambda f, a: grad_and_value(total(f), all_of(a))(*a),
    "jacrev": lambda f, a: jacrev(curve(f), all_of(a))(*a),
    "jacrev_in_chunks": lambda f, a: jacrev(curve(f), all_of(a), chunk_size=2)(*a),
    "jacfwd": lambda f, a: jacfwd(curve(f), all_of(a))(*a),
    "vjp": lambda f, a: vjp(curve(f), *a)[1](torch.ones_like(a[0])),
    "jvp": lambda f, a: jvp(curve(f), a, tuple(t.cos() for t in a)),
    "linearize": lambda f, a: linearize(curve(f), *a)[1](*(t.cos() for t in a)),
}
SECOND = {
    "hessian": lambda f, a: hessian(total(f), all_of(a))(*a),
    "jacrev of jacrev": lambda f, a: jacrev(jacrev(total(f), all_of(a)), all_of(a))(*a),
    "jacrev of jacfwd": lambda f, a: jacrev(jacfwd(total(f), all_of(a)), all_of(a))(*a),
    "jacfwd of jacfwd": lambda f, a: jacfwd(jacfwd(total(f), all_of(a)), all_of(a))(*a),
    "jvp of jvp in x": lambda f, a: jvp(
        lambda x: jvp(lambda x: curve(f)(x, *a[1:]), (x,), (a[0],))[1], a[:1], (a[0].cos(),)
    ),
    "jvp of jvp": lambda f, a: jvp(lambda *b: jvp(curve(f), b, tuple(t.sin() for t in b))[1], a, a),
    "grad of a gradient's norm": lambda f, a: grad(
        lambda *a: sum(g.pow(2).sum() for g in grad(total(f), all_of(a))(*a)), all_of(a)
    )(*a),
    "hessian-vector product": lambda f, a: jvp(grad(total(f), all_of(a)), a, tuple(t.cos() for t in a)),
    "vjp of jvp": lambda f, a: vjp(lambda *a: jvp(curve(f), a, a)[1], *a)[1](torch.ones_like(a[0])),
}
transforms = pytest.mark.parametrize("transform", [*FIRST.values(), *SECOND.values()], ids=[*FIRST, *SECOND])


@forms
@shared
@transforms
def test_transform_matches_the_reference(transform, free, shared):
    arguments = constants(free, (2, 3, 2), size=4, shared=shared)
    assert_equal_to_rounding(transform(kaf, arguments), transform(reference, arguments))


@forms
@transforms
def test_transform_of_the_fallback(transform, free, monkeypatch):
    """Without compiled kernels the functions are the reference itself, transforms included."""
    monkeypatch.setattr(backends.cpu, "load_error", "not built")
    backends._warn_once.cache_clear()
    arguments = constants(free, (2, 3), size=4)
    with pytest.warns(UserWarning, match="not built"):
        got = transform(kaf, arguments)
    assert_equal_to_rounding(got, transform(reference, arguments))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tangents_of_other_dtypes_than_the_parameters_are_not_rounded(dtype):
    """Products and sums on the way, and the derivatives of the casts: up to third derivatives."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    arguments = (draw(64, 1).to(dtype), 3 * draw(1, 20), torch.tensor([1.67]), torch.linspace(-3, 3, 20)[None])
    along = (draw(64, 1).to(dtype), draw(1, 20), draw(1), draw(1, 20))
    weight = draw(64, 1).to(dtype)

    def derivatives(f, a, v, w):
        gradients = lambda *a: vjp(f, *a)[1](w)  # noqa: E731
        tangent = lambda g: lambda *a: jvp(g, a, v)[1]  # noqa: E731
        nested = [tangent(f), tangent(tangent(f)), gradients, tangent(gradients), tangent(tangent(gradients))]
        alone = [
            jvp(lambda t, i=i, g=g: g(*a[:i], t, *a[i + 1 :]), (a[i],), (v[i],))[1]
            for g in (f, gradients)
            for i in range(4)
        ]
        return leaves([*(g(*a) for g in nested), *alone])

    exact = [[t.double() for t in ts] for ts in (arguments, along)]
    want = derivatives(definition.kaf_free, *map(tuple, exact), weight.double())
    got = derivatives(kafops.kaf_free, arguments, along, weight)
    for g, w in zip(
        got, want, strict=True
    ):  # 55 at most were seen, of 64 terms that cancel in part; 1e4 before the cast
        assert (g.double() - w).abs().max() <= 128 * torch.finfo(g.dtype).eps * w.abs().max()


def test_a_tangent_of_half_precision_does_not_overflow_on_its_way():
    x, alpha, gamma = torch.randn(8, 1).half(), torch.randn(1, 20), torch.tensor([1.67])
    weight = torch.full((8, 1), 300.0).half()
    tangent = jvp(lambda x: vjp(lambda a: kafops.kaf(x, a, gamma), alpha)[1](weight)[0], (x,), (weight,))[1]
    assert tangent.isfinite().all()


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


@forms
@transforms
def test_transform_on_meta_tensors(transform, free):
    arguments = constants(free, (2, 3), size=4)
    want = leaves(transform(reference, arguments))
    got = leaves(transform(kaf, tuple(t.to("meta") for t in arguments)))
    assert [(t.shape, t.dtype, t.device.type) for t in got] == [(t.shape, t.dtype, "meta") for t in want]


# --------------------------------------------------------------------------------------------------------------- vmap


def loop(f, arguments, in_dims):
    """What vmap computes, sample by sample."""
    mapped = list(zip(arguments, in_dims, strict=True))
    batch = next(t.shape[d] for t, d in mapped if d is not None)
    results = [f(*(t if d is None else t.select(d, i) for t, d in mapped)) for i in range(batch)]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(r) for r in zip(*results, strict=True))
    return torch.stack(results)


def mapped_arguments(free, shape, shared, in_dims, batch=3, size=4):
    """Arguments with a dimension of `batch` samples where in_dims says."""
    sizes = [None if d is None else batch for d in in_dims]
    arguments = constants(free, shape, size=size, shared=shared, batch=sizes)
    return [t if d is None else t.movedim(0, d) for t, d in zip(arguments, in_dims, strict=True)]


IN_DIMS = [
    (0, None, None, None),
    (1, None, None, None),
    (-1, None, None, None),
    (None, 0, 0, 0),
    (None, 1, 1, 2),
    (None, -1, None, None),
    (None, None, 0, None),
    (0, 0, 0, 0),
    (1, 2, 1, 0),
    (-1, 0, -1, 1),
    (0, 0, None, None),
    (0, None, 1, 2),
]
SHAPES = [(2, 3), (2, 3, 2, 2), (0, 3), (2, 0, 2)]
SHARED_SHAPES = [(2, 3), (2, 3, 2), (5,), (), (0,), (2, 3, 0)]
shapes = pytest.mark.parametrize(
    ("shape", "shared"), [*((s, False) for s in SHAPES), *((s, True) for s in SHARED_SHAPES)], ids=str
)


def mappings(free, shape):
    """IN_DIMS that fit."""
    fitting = {d[: 4 if free else 3] for d in IN_DIMS if d[0] is None or d[0] <= len(shape)}
    return sorted(fitting - {(None,) * 3}, key=str)


@forms
@shapes
def test_vmap(free, shape, shared):
    for in_dims in mappings(free, shape):
        arguments = mapped_arguments(free, shape, shared, in_dims)
        want = loop(reference, arguments, in_dims)
        assert_equal_to_rounding(vmap(kaf, in_dims)(*arguments), want)
        assert_equal_to_rounding(vmap(kaf, in_dims, out_dims=-1)(*arguments).movedim(-1, 0), want)


@forms
@shapes
def test_gradients_of_each_sample(free, shape, shared):
    def gradients(f):
        return grad(total(f), tuple(range(4 if free else 3)))

    for in_dims in mappings(free, shape):
        arguments = mapped_arguments(free, shape, shared, in_dims)
        got = vmap(gradients(kaf), in_dims)(*arguments)
        assert_equal_to_rounding(got, loop(gradients(reference), arguments, in_dims))


@forms
@pytest.mark.parametrize("in_dims", IN_DIMS[:1] + IN_DIMS[3:5] + IN_DIMS[7:10], ids=str)
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_of_each_sample(free, in_dims, name):
    in_dims = in_dims[: 4 if free else 3]
    arguments = mapped_arguments(free, (2, 3), False, in_dims, batch=2, size=3)

    def second(f):
        return lambda *sample: tuple(leaves(SECOND[name](f, sample)))

    assert_equal_to_rounding(vmap(second(kaf), in_dims)(*arguments), loop(second(reference), arguments, in_dims))


@forms
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap_of_the_fallback(free, in_dims, monkeypatch):
    monkeypatch.setattr(backends, "choose", lambda x: "reference")
    in_dims = in_dims[: 4 if free else 3]
    arguments = mapped_arguments(free, (2, 3, 2), False, in_dims)
    assert_equal_to_rounding(vmap(kaf, in_dims)(*arguments), loop(reference, arguments, in_dims))


@forms
def test_nested_vmap(free):
    """Samples of x inside, sets of parameters outside, and the other way round."""
    x, *parameters = constants(free, (2, 3, 2), batch=(4, 5, 5, 5))
    fixed, mapped = (None,) * len(parameters), (0,) * len(parameters)

    def all_gradients(f):
        return lambda *a: torch.cat([g.flatten() for g in grad(total(f), all_of(a))(*a)])

    for got, want in ((kaf, reference), (all_gradients(kaf), all_gradients(reference))):
        expected = torch.stack([torch.stack([want(s, *p) for s in x]) for p in zip(*parameters, strict=True)])
        inside = vmap(vmap(got, (0, *fixed)), (None, *mapped))(x, *parameters)
        outside = vmap(vmap(got, (None, *mapped)), (1, *fixed))(x.movedim(0, 1), *parameters)
        assert_equal_to_rounding(inside, expected)
        assert_equal_to_rounding(outside.movedim(0, 1), expected)


@forms
def test_gradients_of_an_ensemble_of_layers(free):
    """functional_call under vmap, as in PyTorch's tutorial on model ensembling: layers at once against one by one."""
    torch.manual_seed(0)
    layers = [kafops.KAF1d(3, 5, learn_gamma=free, learn_dictionary=free, dtype=torch.float64) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(6, 3, dtype=torch.float64)

    def loss(parameters, buffers, x):
        return functional_call(layers[0], (parameters, buffers), (x,)).sin().sum()

    got = vmap(grad(loss), (0, 0, None))(parameters, buffers, x)
    for i, layer in enumerate(layers):
        wanted = dict(layer.named_parameters())
        y = reference_of(layer, x).sin().sum()
        for name, g in zip(wanted, torch.autograd.grad(y, wanted.values()), strict=True):
            assert_equal_to_rounding(got[name][i], g)


def reference_of(layer, x):
    if layer.dictionary is not None:
        return definition.kaf_free(x, layer.alpha, layer.bandwidths(), layer.dictionary)
    return definition.kaf(x, layer.alpha, layer.bandwidths(), layer.boundary)


# -------------------------------------------------------------------------------------------------------------- limits


def along(f):
    """The derivative of f in the direction of ones, by forward mode."""
    return lambda t: jvp(f, (t,), (torch.ones_like(t),))[1]


def gradient(f):
    """The gradient of the sum of f, by reverse mode."""
    return grad(lambda t: f(t).sum())


@forms
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("innermost", [along, gradient])
def test_every_mixture_of_modes_is_right(free, order, innermost):
    """Any arguments, forward and reverse, to the third order."""
    arguments = constants(free)
    names = NAMES[: len(arguments)]
    for modes in itertools.product([along, gradient], repeat=order - 1):
        for chosen in itertools.product(names, repeat=order):
            check_derivative(arguments, chosen, (*modes, innermost))


def check_derivative(arguments, names, modes):
    """Differentiate once for each mode, the outermost first, in the argument named beside it."""

    def derivative(f, fixed, remaining):
        if not remaining:
            return curve(f)(*fixed)
        (i, mode), *rest = remaining
        return mode(lambda t: derivative(f, [*fixed[:i], t, *fixed[i + 1 :]], rest))(fixed[i])

    steps = [(NAMES.index(name), mode) for name, mode in zip(names, modes, strict=True)]
    assert_equal_to_rounding(derivative(kaf, arguments, steps), derivative(reference, arguments, steps))


@forms
@shared
@pytest.mark.parametrize("depth", [2, 3])
def test_forward_over_forward_with_arguments_that_have_tangents_themselves(free, shared, depth):
    """γ = exp(log γ), as layers learn it, and points that move with it: products within a jvp keep outer tangents."""
    x, alpha, gamma, *dictionary = constants(free, (2, 3), size=3, shared=shared)

    def at(f):
        def of(log_gamma):
            points = [p * log_gamma.unsqueeze(1).cos() for p in dictionary]
            return curve(f)(x * log_gamma.sum().sin(), alpha * log_gamma.unsqueeze(1), log_gamma.exp(), *points)

        for _ in range(depth):
            of = jacfwd(of)
        return of(gamma.log())

    assert_equal_to_rounding(at(kaf), at(reference))


@forms
def test_tangents_that_have_tangents(free):
    """The direction of one forward pass varied by another: PyTorch loses it in a jvp's own operators."""
    x, *parameters = constants(free)

    def directional(f):
        def at(s):  # the tangent of the gradient in x, for a cotangent that moves with speed s while x moves
            def gradient_in_x(x, cotangent):
                return vjp(lambda x: f(x, *parameters), x)[1](cotangent)[0]

            return jvp(gradient_in_x, (x, x.cos()), (x.sin(), s * x))[1]

        return jvp(at, (x.new_tensor(0.7),), (x.new_tensor(1.0),))

    assert_equal_to_rounding(directional(kaf), directional(reference))


@forms
def test_vmap_over_the_rows_of_a_parameter_in_any_dimension(free):
    """Gradients of shared parameters keep their one row, whichever dimension the samples are in."""
    x, alpha, gamma, *rest = constants(
        free, (2, 3), size=4, shared=True, batch=[None, 5, None, None][: 4 if free else 3]
    )
    alpha = alpha.movedim(0, 1).contiguous()  # [1, B, D]
    grad_y = torch.ones_like(x)
    dictionary = rest[0] if rest else None
    needs = kafops.ops.Needs.ALPHA | kafops.ops.Needs.GAMMA
    call = torch.ops.kafops.kaf_backward

    def backward(alpha):
        return call(grad_y, x, alpha, gamma, dictionary, 3.0, needs)[1:3]

    got = vmap(backward, in_dims=1)(alpha)
    want = [torch.stack(t) for t in zip(*(backward(a) for a in alpha.unbind(1)), strict=True)]
    assert got[0].shape == (5, 1, 4)
    assert_equal_to_rounding(got, tuple(want))
