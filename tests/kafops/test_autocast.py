"""Mixed precision: bfloat16 activations, float32 parameters and gradients."""

import pytest
import torch
from forms import forms, kaf, make_arguments
from torch import nn

import kafops
from kafops import reference

BF16_EPS = torch.finfo(torch.bfloat16).eps


def exact_layer(layer, x):
    """The layer in float64, on the same numbers."""
    if layer.dictionary is None:
        return reference.kaf(x, layer.alpha, layer.bandwidths(), layer.boundary)
    return reference.kaf_free(x, layer.alpha, layer.bandwidths(), layer.dictionary)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@forms
def test_convolution_kaf_linear(free, compiled):
    torch.manual_seed(0)
    layer = kafops.KAF2d(8, learn_gamma=free, learn_dictionary=free)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Flatten(), nn.Linear(8 * 36, 4))
    seen = {}

    def keep(_, inputs, y):
        seen["x"], seen["y"] = inputs[0], y
        inputs[0].retain_grad()
        y.retain_grad()

    x = torch.randn(16, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        if compiled:
            net[1] = torch.compile(layer, backend="aot_eager", fullgraph=True)
        net[1].register_forward_hook(keep)
        out = net(x)
        loss = out.float().pow(2).mean()
    loss.backward()

    assert out.dtype == seen["x"].dtype == seen["y"].dtype == torch.bfloat16
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}

    # The same layer in float64 on the very inputs and cotangents that bfloat16 left it.
    exact = kafops.KAF2d(8, learn_gamma=free, learn_dictionary=free).double()
    exact.load_state_dict(layer.state_dict())
    z = seen["x"].detach().double().requires_grad_()
    want = exact_layer(exact, z)
    want.backward(seen["y"].grad.double())
    # One rounding to bfloat16 (half its eps), and float32 arithmetic on terms of size Σ|α| before it.
    size = exact.alpha.detach().abs().sum(1).max()
    torch.testing.assert_close(seen["y"].double(), want, rtol=BF16_EPS / 2, atol=float(1e-6 * size))
    of_x = z.grad
    torch.testing.assert_close(seen["x"].grad.double(), of_x, rtol=BF16_EPS / 2, atol=float(1e-6 * of_x.abs().max()))
    for p, q in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-5, atol=float(1e-5 * q.grad.abs().max()))


@forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_functions_are_no_autocast_operators(free, dtype):
    """A float32 x stays float32, as for any operator that autocast has no rule for."""
    arguments = make_arguments(free, dtype=torch.float32)
    y = kaf(*arguments)
    with torch.autocast("cpu", dtype):
        inside = kaf(*arguments)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, y)
