"""PyTorch's private names do what kafops takes them for, and are used in one module only."""

import ast
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import kafops
from kafops import torch_private

PUBLIC = {"torch._check"}  # documented in spite of its name


def names(tree: ast.AST) -> set[str]:
    """Return the dotted names that a module uses, the imported ones with where they are from."""
    found = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def private(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "torch" and any(p.startswith("_") and not p.endswith("__") for p in parts) and name not in PUBLIC


def test_no_other_module_uses_private_names():
    root = Path(kafops.__file__).parent
    files = [f for f in root.rglob("*.py") if f.name != "torch_private.py"]
    assert len(files) > 20
    for file in files:
        used = names(ast.parse(file.read_text()))
        assert not list(filter(private, used)), file
        # Of objects of torch, whose class the syntax does not tell.
        assert not {n for n in used if n.rpartition(".")[2] in ("_destroy", "_dynamo_marked_constant")}, file
    assert list(filter(private, names(ast.parse((root / "torch_private.py").read_text()))))


TRANSFORMS = {
    "nothing": (lambda f, x: f(x), False),
    "backward": (lambda f, x: f(x.clone().requires_grad_()).sum().backward(), False),
    "grad": (lambda f, x: torch.func.grad(lambda t: f(t).sum())(x), True),
    "vmap": (lambda f, x: torch.vmap(f)(x), True),
    "functionalize": (lambda f, x: torch.func.functionalize(f)(x), True),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x,)), True),
    "grad of jvp": (lambda f, x: torch.func.grad(lambda t: torch.func.jvp(f, (t,), (t,))[1].sum())(x), True),
}


@pytest.mark.parametrize(("transform", "active"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_what_is_active(transform, active):
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.transforms_active())
        return x * x

    transform(f, torch.ones(3))
    assert seen == [active]
    assert not torch_private.transforms_active()


def test_dual_levels_are_active():
    with forward_ad.dual_level():
        assert torch_private.transforms_active()
    assert not torch_private.transforms_active()


def test_a_constant_is_asked_for_while_tracing_and_kept():
    calls = []

    @torch_private.assumed_constant
    def constant(name: str) -> str:
        calls.append(name)
        torch._dynamo.graph_break()  # cannot be traced
        return name * 2

    compiled = torch.compile(lambda x: x * len(constant("abc")), backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 6.0))
    assert calls == ["abc"]
    assert constant("d") == "dd"


def test_what_is_unregistered_is_gone_at_once():
    library = torch.library.Library("kafops_test_torch_private", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    twice = torch.ops.kafops_test_torch_private.twice.default
    held = torch.library.Library("kafops_test_torch_private", "IMPL")
    held.impl("twice", lambda x: 2 * x, "CPU")
    assert torch.equal(twice(torch.ones(2)), torch.full((2,), 2.0))
    torch_private.unregister(held)
    with pytest.raises(NotImplementedError):
        twice(torch.ones(2))
    torch_private.unregister(library)


def test_below_autograd_nothing_is_recorded():
    x = torch.ones(3, requires_grad=True)
    assert torch_private.any_requires_grad(torch.ones(3), None, x)
    assert not torch_private.any_requires_grad(torch.ones(3), None, x.detach(), 3.0)
    with torch_private.AutoDispatchBelowAutograd():
        assert not (x * x).requires_grad
    assert (x * x).requires_grad


def test_a_trace_is_seen():
    seen = []

    def f(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_private.get_tracing_state() is not None)
        return x * x

    f(torch.ones(3))
    torch.jit.trace(f, (torch.ones(3),), check_trace=False)
    assert seen == [False, True]


def test_functions_of_one_level_on_the_autograd_key_are_differentiated_to_any_order():
    """With forward mode on below: f, f′ and f″ of x³, by grad, jvp and their compositions."""
    library = torch.library.Library("kafops_test_torch_private", "FRAGMENT")
    library.define("cube(Tensor x) -> Tensor")
    library.impl("cube", lambda x: x * x * x, "CompositeExplicitAutograd")
    cube = torch.ops.kafops_test_torch_private.cube.default

    class Cube(torch_private.SingleLevelFunction):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            with (
                torch.enable_grad(),
                torch_private.enable_forward_mode(True),
                torch_private.AutoDispatchBelowAutograd(),
            ):
                return cube(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * 3 * x * x

        @staticmethod
        def jvp(ctx, v):
            (x,) = ctx.saved_tensors
            return v * 3 * x * x

    def kernel(x: torch.Tensor) -> torch.Tensor:
        with torch_private.enable_single_level_functions():
            return Cube.apply(x)

    library.impl("cube", kernel, "Autograd")
    x, one = torch.tensor(4.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64)
    grad, tangent = torch.func.grad, lambda f: lambda t: torch.func.jvp(f, (t,), (one,))[1]
    assert cube(x) == 64
    assert grad(cube)(x) == tangent(cube)(x) == 48
    assert grad(grad(cube))(x) == grad(tangent(cube))(x) == tangent(grad(cube))(x) == 24
    torch_private.unregister(library)
