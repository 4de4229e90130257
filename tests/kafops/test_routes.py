"""Plain eager calls skip PyTorch's registered autograd; whatever watches operators must still see them."""

import functools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from forms import BOUNDARY, assert_equal_to_rounding, forms, kaf, make_arguments, reference
from functorch.compile import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kafops import autograd, ops

KAF, KAF_BACKWARD = torch.ops.kafops.kaf.default, torch.ops.kafops.kaf_backward.default


def loss(f, arguments):
    return f(*arguments).sin().sum()


def gradients(f, arguments):
    return torch.autograd.grad(loss(f, arguments), arguments)


class Seen(TorchDispatchMode):
    """Lists the operators that run."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators.append(operator)
        return operator(*args, **(kwargs or {}))


class Plain(torch.Tensor):
    """A subclass with the default __torch_function__."""


class Holder(torch.Tensor):
    """Stands for another tensor, which __torch_function__ puts in its place."""

    @classmethod
    def of(cls, held):
        holder = torch.Tensor._make_subclass(cls, held.detach(), held.requires_grad)
        holder.held = held
        return holder

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function(*(a.held if isinstance(a, cls) else a for a in args), **(kwargs or {}))


@forms
def test_plain_calls_take_the_quick_route(free):
    arguments = make_arguments(free)
    y = kaf(*arguments)
    assert isinstance(y.grad_fn, autograd.KAFEagerFunction._backward_cls)
    assert_equal_to_rounding(y, reference(*arguments))
    parameters = tuple(torch.nn.Parameter(t.detach()) for t in arguments)
    assert isinstance(kaf(*parameters).grad_fn, autograd.KAFEagerFunction._backward_cls)


@forms
def test_without_gradients_nothing_is_recorded(free):
    arguments = make_arguments(free)
    want = reference(*arguments).detach()
    with torch.no_grad():
        y = kaf(*arguments)
    assert y.grad_fn is None
    assert not y.requires_grad
    assert_equal_to_rounding(y, want)
    y = kaf(*(t.detach() for t in arguments))
    assert not y.requires_grad
    assert_equal_to_rounding(y, want)
    with torch.inference_mode():
        y = kaf(*arguments)
    assert y.is_inference()
    assert_equal_to_rounding(y, want)


@forms
def test_all_routes_give_the_same_bits(free):
    arguments = make_arguments(free, (4, 3, 5), dtype=torch.float32)
    rest = (None,) * (not free) + (BOUNDARY,)

    def run(route):
        y = route(*arguments, *rest)
        return y, *torch.autograd.grad(y.sin().sum(), arguments)

    eager, registered = run(lambda *a: autograd.KAFEagerFunction.apply(*a, 0, 0)), run(ops.kaf)
    for a, b in zip(eager, registered, strict=True):
        assert torch.equal(a, b)


@forms
@pytest.mark.parametrize("create_graph", [False, True])
def test_dispatch_modes_see_the_operators(free, create_graph):
    arguments = make_arguments(free)
    with Seen() as seen:
        got = torch.autograd.grad(loss(kaf, arguments), arguments, create_graph=create_graph)
    assert [o for o in seen.operators if o.namespace == "kafops"] == [KAF, KAF_BACKWARD]
    assert_equal_to_rounding(got, gradients(reference, arguments))
    with Seen() as seen, torch.no_grad():
        kaf(*arguments)
    assert seen.operators == [KAF]


@forms
def test_function_modes_see_the_operators(free):
    class Functions(torch.overrides.TorchFunctionMode):
        seen = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen = (*self.seen, function)
            return function(*args, **(kwargs or {}))

    arguments = make_arguments(free)
    with Functions() as mode:
        got = gradients(kaf, arguments)
    assert KAF in mode.seen
    assert_equal_to_rounding(got, gradients(reference, arguments))
    with torch.device("cpu"):  # also a mode
        assert_equal_to_rounding(gradients(kaf, arguments), gradients(reference, arguments))


@forms
def test_subclasses(free):
    arguments = make_arguments(free)
    want = gradients(reference, arguments)
    twice = [TwoTensor(t.detach(), 2 * t.detach()).requires_grad_() for t in arguments]
    got = gradients(kaf, twice)
    assert_equal_to_rounding([t.a for t in got], want)
    doubled = [(2 * t).detach().requires_grad_() for t in arguments]
    assert_equal_to_rounding([t.b for t in got], gradients(reference, doubled))

    plain = [t.detach().as_subclass(Plain).requires_grad_() for t in arguments]
    y = kaf(*plain)
    assert type(y) is Plain
    assert_equal_to_rounding(torch.autograd.grad(y.sin().sum(), plain), want)

    y = kaf(*map(Holder.of, arguments))
    assert_equal_to_rounding(torch.autograd.grad(y.sin().sum(), arguments), want)


@forms
def test_fake_tensors(free):
    arguments = make_arguments(free, (2, 3, 4, 5))
    x = arguments[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    arguments = (x, *arguments[1:])
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in arguments]
        y = kaf(*fake)
        got = torch.autograd.grad(y.sum(), fake)
    real = kaf(*arguments)
    want = torch.autograd.grad(real.sum(), arguments)
    assert [(t.shape, t.stride(), t.dtype) for t in (y, *got)] == [
        (t.shape, t.stride(), t.dtype) for t in (real, *want)
    ]


@forms
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(free, pre_dispatch, tracing_mode):
    arguments = make_arguments(free)
    graph = make_fx(lambda *t: kaf(*t).sin(), tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*arguments)
    assert KAF in [node.target for node in graph.graph.nodes]
    others = [t.detach() + 0.1 for t in arguments]
    assert_equal_to_rounding(graph(*others), reference(*others).sin())
    if not pre_dispatch:
        graph = make_fx(lambda *t: gradients(kaf, t), tracing_mode=tracing_mode)(*arguments)
        assert KAF_BACKWARD in [node.target for node in graph.graph.nodes]
        others = [t.detach().requires_grad_() for t in others]
        assert_equal_to_rounding(graph(*others), gradients(reference, others))


@forms
def test_aot_function(free):
    targets = []

    def compiler(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    arguments = make_arguments(free)
    got = gradients(aot_function(kaf, fw_compiler=compiler), arguments)
    assert {KAF, KAF_BACKWARD} <= set(targets)
    assert_equal_to_rounding(got, gradients(reference, arguments))


@forms
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_jit_trace(free):
    arguments = make_arguments(free)
    traced = torch.jit.trace(kaf, arguments)
    assert "kafops::kaf" in str(traced.graph)
    others = [(t.detach() + 0.1).requires_grad_() for t in arguments]
    assert_equal_to_rounding(gradients(traced, others), gradients(reference, others))


@forms
def test_compiled_autograd(free):
    arguments = make_arguments(free)
    y = loss(kaf, arguments)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        y.backward()
    assert_equal_to_rounding([t.grad for t in arguments], gradients(reference, arguments))


@forms
@pytest.mark.parametrize("saved", [False, True])
def test_selective_checkpointing(free, saved):
    policy = CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.MUST_RECOMPUTE
    context = functools.partial(create_selective_checkpoint_contexts, lambda *args, **kwargs: policy)
    arguments = make_arguments(free)
    with Seen() as seen:
        y = checkpoint(loss, kaf, arguments, use_reentrant=False, context_fn=context)
        got = torch.autograd.grad(y, arguments)
    assert seen.operators.count(KAF) == (1 if saved else 2)
    assert_equal_to_rounding(got, gradients(reference, arguments))


@forms
def test_batched_backward_of_a_plain_call(free):
    """is_grads_batched starts vmap after the forward pass has gone the quick route."""
    arguments = make_arguments(free)
    basis = torch.randn(7, *arguments[0].shape, dtype=torch.float64)
    got, want = (
        torch.autograd.grad(f(*arguments).sin(), arguments, basis, is_grads_batched=True) for f in (kaf, reference)
    )
    assert_equal_to_rounding(got, want)


@forms
def test_forward_mode_over_the_backward_of_a_plain_call(free):
    """A forward-mode level entered after the forward pass: the tangent of the gradients along the cotangent."""
    arguments = make_arguments(free)
    y = kaf(*arguments)
    grad, tangent = torch.randn_like(y), torch.randn_like(y)
    with forward_ad.dual_level():
        got = torch.autograd.grad(y, arguments, forward_ad.make_dual(grad, tangent))
        got = [forward_ad.unpack_dual(t).tangent for t in got]
    assert_equal_to_rounding(got, torch.autograd.grad(reference(*arguments), arguments, tangent))


@forms
def test_saved_tensors_go_through_hooks(free):
    arguments = make_arguments(free)
    with torch.autograd.graph.save_on_cpu():
        got = gradients(kaf, arguments)
    assert_equal_to_rounding(got, gradients(reference, arguments))


@forms
def test_changing_a_saved_input_is_noticed(free):
    arguments = make_arguments(free)
    y = loss(kaf, arguments)
    with torch.no_grad():
        arguments[1].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
