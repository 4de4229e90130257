"""torch.compile, torch.export and AOTInductor: the operators in one graph, with the reference's values."""

import io

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from forms import NAMES, assert_equal_to_rounding, forms, kaf, make_arguments, reference
from torch import nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import kafops
from kafops import backends

F64 = torch.float64
backend = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def outputs_and_gradients(f, arguments):
    y = f(*arguments)
    return y, *torch.autograd.grad(y.sin().sum(), arguments)


@forms
@backend
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_forward_and_backward(free, backend, dynamic):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(lambda *t: kaf(*t) * 2 + t[0], backend=counter, fullgraph=True, dynamic=dynamic)
    compilations = []
    for shape in [(4, 3, 6), (6, 7, 8), (9, 7, 4)] if dynamic else [(4, 3, 6)]:
        arguments = make_arguments(free, shape)
        want = outputs_and_gradients(lambda *t: reference(*t) * 2 + t[0], arguments)
        assert_equal_to_rounding(outputs_and_gradients(compiled, arguments), want)
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1
    assert [str(node.target) for node in counter.graphs[-1].graph.nodes].count("kafops.kaf.default") == 1
    with torch.no_grad():
        assert_equal_to_rounding(compiled(*arguments), want[0])


@forms
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_one_argument_alone(free, name):
    if name == "dictionary" and not free:
        return
    arguments = make_arguments(free)
    for n, t in zip(NAMES, arguments, strict=False):
        t.requires_grad_(n == name)
    wanted = arguments[NAMES.index(name)]
    compiled = torch.compile(kaf, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(*arguments).sin().sum(), wanted) for f in (compiled, reference))
    assert_equal_to_rounding(got, want)


@forms
@backend
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_memory_format_is_kept(free, backend, layout):
    x, *parameters = make_arguments(free, (4, 3, 5, 6))
    x = x.detach().to(memory_format=torch.channels_last)
    x = (x if layout == "channels_last" else x.detach().contiguous().mT.contiguous().mT).requires_grad_()
    compiled = torch.compile(kaf, backend=backend, fullgraph=True)
    y = compiled(x, *parameters)
    assert y.stride() == x.stride()
    got = outputs_and_gradients(compiled, (x, *parameters))
    assert got[1].stride() == x.stride()
    assert_equal_to_rounding(got, outputs_and_gradients(reference, (x, *parameters)))


class Net(nn.Module):
    """A small network: convolutions, an even and a trained dictionary, a shared curve, a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            kafops.KAF2d(8),
            nn.Conv2d(8, 16, 3, stride=2),
            kafops.KAF2d(16, 7, learn_gamma=True, learn_dictionary=True),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
            kafops.KAF(1, init="silu"),
        )

    def forward(self, x):
        return self.body(x)


def make_net():
    torch.manual_seed(0)
    return Net().to(F64)


@pytest.fixture
def on_reference(monkeypatch):
    """A function that calls another, with the reference in place of the kernels."""

    def call(f, *args):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "choose", lambda x: "reference")
            return f(*args)

    return call


def train_step(net, x):
    y = net(x)
    parameters = tuple(net.parameters())
    return y, *torch.autograd.grad(y.sin().sum(), parameters)


@pytest.mark.parametrize(
    ("backend", "memory_format"),
    [
        ("aot_eager", torch.contiguous_format),
        ("aot_eager", torch.channels_last),
        ("inductor", torch.channels_last),  # one only: it takes half a minute
    ],
    ids=["aot_eager-nchw", "aot_eager-nhwc", "inductor-nhwc"],
)
def test_network(backend, memory_format, on_reference):
    net = make_net().to(memory_format=memory_format)
    compiled = torch.compile(net, backend=backend, fullgraph=True, dynamic=True)
    for shape in ((4, 3, 12, 12), (7, 3, 14, 14)):
        x = torch.randn(shape, dtype=F64).to(memory_format=memory_format)
        assert_equal_to_rounding(train_step(compiled, x), on_reference(train_step, net, x))


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(strict, on_reference):
    net = make_net()
    dynamic_shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(
        net, (torch.randn(4, 3, 12, 12, dtype=F64),), dynamic_shapes=dynamic_shapes, strict=strict
    )
    assert [str(n.target) for n in program.graph.nodes].count("kafops.kaf.default") == 3
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, program.run_decompositions(), torch.export.load(file)):
        for batch in (1, 4, 9):
            x = torch.randn(batch, 3, 12, 12, dtype=F64)
            want = on_reference(net, x)
            assert_equal_to_rounding(exported.module()(x), want)


@forms
def test_export_of_the_fallback(free, monkeypatch):
    """Without compiled kernels what is exported is the reference's plain operators."""
    monkeypatch.setattr(backends, "choose", lambda x: "reference")

    class Function(nn.Module):
        def forward(self, *arguments):
            return kaf(*arguments)

    arguments = make_arguments(free, (4, 3, 5), requires_grad=False)
    batch = torch.export.Dim("batch")
    shapes = ({0: batch}, *({} for _ in arguments[1:]))
    program = torch.export.export(Function(), arguments, dynamic_shapes=(shapes,))
    assert not [n for n in program.graph.nodes if "kafops" in str(n.target)]
    arguments = make_arguments(free, (7, 3, 5), requires_grad=False)
    assert_equal_to_rounding(program.module()(*arguments), reference(*arguments))


def test_aot_inductor(tmp_path, on_reference):
    net = make_net()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(net, (torch.randn(4, 3, 12, 12, dtype=F64),), dynamic_shapes={"x": {0: batch}})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for size in (1, 4, 9):
        x = torch.randn(size, 3, 12, 12, dtype=F64)
        want = on_reference(net, x)
        assert_equal_to_rounding(package(x), want)


@forms
def test_compiled_fallback(free, monkeypatch):
    monkeypatch.setattr(backends.cpu, "load_error", "not built")
    compiled = torch.compile(kaf, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in [(4, 3, 5), (6, 7, 8)]:
        arguments = make_arguments(free, shape)
        assert_equal_to_rounding(
            outputs_and_gradients(compiled, arguments), outputs_and_gradients(reference, arguments)
        )


def test_layer_follows_the_global_choice_of_backend(monkeypatch):
    """`backends.choose` is traced, and guarded: kernels that vanish are noticed."""
    layer = torch.compile(
        kafops.KAF(3, dtype=F64), backend=(counter := CompileCounterWithBackend("aot_eager")), fullgraph=True
    )
    x = torch.randn(5, 3, dtype=F64)
    y = layer(x)
    monkeypatch.setattr(backends.cpu, "load_error", "not built")
    assert_equal_to_rounding(layer(x), y)
    assert counter.frame_count == 2
    assert not [n for n in counter.graphs[1].graph.nodes if "kafops" in str(n.target)]


# --------------------------------------------------------------------------------------------------------- derivatives


def along_ones(f):
    return lambda t: jvp(f, (t,), (torch.ones_like(t),))[1]


def along_ones_in_a_dual_level(f):
    def tangent(t):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(t, torch.ones_like(t)))).tangent

    return tangent


TRANSFORMS = {
    "grad": lambda f: grad(lambda t: f(t).sum()),
    "jacrev": jacrev,
    "vjp": lambda f: lambda t: vjp(f, t)[1](torch.ones_like(t))[0],
    "jvp": along_ones,
    "dual level": along_ones_in_a_dual_level,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda t: f(t).sum()),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(lambda t: f(t).sum())),
    "vmap of grad": lambda f: vmap(grad(lambda t: f(t.unsqueeze(0)).sum())),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


def in_x(f, arguments):
    return lambda x: f(x, *arguments[1:]).sin()


def torch_can(call):
    """Whether PyTorch compiles the same of its own sine whole: what it cannot, nobody can."""
    torch._dynamo.reset()
    try:
        call()
    except Unsupported:
        return False
    finally:
        torch._dynamo.reset()
    return True


@forms
@transforms
def test_compiled_derivative(free, transform):
    arguments = make_arguments(free, (2, 3), requires_grad=False)
    want = transform(in_x(reference, arguments))(arguments[0])
    broken = torch.compile(transform(in_x(kaf, arguments)), backend="aot_eager")
    assert_equal_to_rounding(broken(arguments[0]), want)
    if torch_can(lambda: torch.compile(transform(torch.sin), backend="aot_eager", fullgraph=True)(arguments[0])):
        whole = torch.compile(transform(in_x(kaf, arguments)), backend="aot_eager", fullgraph=True)
        assert_equal_to_rounding(whole(arguments[0]), want)


@forms
@transforms
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_derivative_of_a_compiled_function(free, transform, warm):
    arguments = make_arguments(free, (2, 3), requires_grad=False)
    want = transform(in_x(reference, arguments))(arguments[0])
    for fullgraph in (False, True):
        if fullgraph and not torch_can(
            lambda: transform(torch.compile(torch.sin, backend="aot_eager", fullgraph=True))(arguments[0])
        ):
            continue
        torch._dynamo.reset()
        compiled = torch.compile(in_x(kaf, arguments), backend="aot_eager", fullgraph=fullgraph)
        if warm:  # what was compiled without a transform must not be taken with one
            assert_equal_to_rounding(compiled(arguments[0]), in_x(reference, arguments)(arguments[0]))
        assert_equal_to_rounding(transform(compiled)(arguments[0]), want)


@forms
def test_tangents_of_parameters_of_a_compiled_function(free):
    """A level of forward mode around a compiled call, where x has no tangent but a captured parameter has."""
    x, *parameters = make_arguments(free, requires_grad=False)
    tangents = [torch.randn_like(p) for p in parameters]

    def tangent(f, compiler):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, v) for p, v in zip(parameters, tangents, strict=True)]
            return forward_ad.unpack_dual(compiler(lambda x: f(x, *duals))(x)).tangent

    want = tangent(reference, lambda f: f)
    assert_equal_to_rounding(tangent(kaf, torch.compile(backend="aot_eager")), want)


PENALTIES = {
    "hessian": lambda f, t: hessian(lambda q: f(q).sum())(t),
    "grad of a jvp of a grad": lambda f, t: grad(
        lambda q: jvp(grad(lambda r: f(r).sum()), (q,), (torch.ones_like(q),))[1].square().sum()
    )(t),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("penalty", PENALTIES.values(), ids=PENALTIES.keys())
def test_derivatives_in_each_argument_compiled_whole(name, penalty):
    arguments = make_arguments(True, (3, 2), size=3, requires_grad=False)
    i = NAMES.index(name)

    def at(f):
        return lambda q: f(*arguments[:i], q, *arguments[i + 1 :]).sin()

    compiled = torch.compile(lambda t: penalty(at(kaf), t), backend="aot_eager", fullgraph=True)
    assert_equal_to_rounding(compiled(arguments[i]), penalty(at(reference), arguments[i]))


class Pinn(nn.Module):
    """A network of one input and one output, of functions with all derivatives."""

    def __init__(self):
        super().__init__()
        options = {
            "base": "silu",
            "init": kafops.init.Normal(0.3),
            "learn_gamma": True,
            "channel_dim": -1,
            "dtype": F64,
        }
        self.body = nn.Sequential(
            nn.Linear(1, 8, dtype=F64), kafops.KAF(8, 7, **options), nn.Linear(8, 8, dtype=F64),
            kafops.KAF(8, 7, learn_dictionary=True, **options), nn.Linear(8, 1, dtype=F64),
        )  # fmt: skip

    def forward(self, t):
        return self.body(t)


@backend
def test_a_step_with_third_derivatives_compiled_whole(backend, on_reference):
    """The loss of u‴ + u u′ = 0, as for the Korteweg-de Vries equation, and its gradients: one graph."""
    torch.manual_seed(0)
    net = Pinn()
    points = torch.linspace(-1, 1, 5, dtype=F64)
    names = [name for name, _ in net.named_parameters()]

    def loss(parameters, points):
        def u(t):
            return torch.func.functional_call(net, parameters, (t.reshape(1, 1),)).sum()

        d3 = vmap(grad(grad(grad(u))))(points)
        return (d3 + vmap(u)(points) * vmap(grad(u))(points)).square().mean()

    def step(points):
        return grad(loss)(dict(net.named_parameters()), points)

    want = on_reference(step, points)
    got = torch.compile(step, backend=backend, fullgraph=True)(points)
    assert_equal_to_rounding(tuple(got[n] for n in names), tuple(want[n] for n in names))


@forms
@backend
def test_compiled_vmap(free, backend):
    arguments = make_arguments(free, (2, 3, 4), batch=(5, 5, 5, 5))
    for in_dims in [(0,) * len(arguments), (0, *(None,) * (len(arguments) - 1))]:
        some = [t if d == 0 else t[0] for t, d in zip(arguments, in_dims, strict=True)]
        compiled = torch.compile(vmap(kaf, in_dims), backend=backend, fullgraph=True)
        got = outputs_and_gradients(compiled, some)
        assert_equal_to_rounding(got, outputs_and_gradients(vmap(reference, in_dims), some))


@forms
@backend
def test_double_backward_through_compile_raises(free, backend):
    arguments = make_arguments(free)
    y = torch.compile(kaf, backend=backend, fullgraph=True)(*arguments)
    (g,) = torch.autograd.grad(y.sin().sum(), arguments[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        g.pow(2).sum().backward()


@forms
def test_a_traced_graph_is_differentiable_further(free):
    """The operators traced one by one keep their derivatives."""
    arguments = make_arguments(free)

    def penalty(f):
        def of(*arguments):
            (g,) = torch.autograd.grad(f(*arguments).sin().sum(), arguments[0], create_graph=True)
            return g.pow(2).sum()

        return of

    graph = make_fx(penalty(kaf))(*arguments)
    for f, want in ((graph, penalty(reference)),):
        second = [torch.autograd.grad(p(*arguments), arguments[0], create_graph=True)[0] for p in (f, want)]
        assert_equal_to_rounding(*second)
        assert_equal_to_rounding(*(torch.autograd.grad(g.sum(), arguments[1])[0] for g in second))
