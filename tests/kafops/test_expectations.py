"""Moments by quadrature: against closed forms, and against a rule with very many nodes."""

import math

import pytest
import torch
from other_kernels import F64, definition, of_kernels

from kafops import bases, expectations, init

DICTIONARY = torch.tensor([[-3.0, -0.4, 0.0, 0.1, 2.5], [0.3, -1.0, 4.0, 0.3, 1.0]], dtype=F64)


def test_gaussian_moments_are_those_in_closed_form():
    """Gauss-Legendre rules know nothing of the Gaussian: 1e-10 is asked of them, and they give 1e-14."""
    gamma = torch.tensor([0.05, 400.0], dtype=F64)
    for got, want in zip(
        expectations.moments(DICTIONARY, gamma, "gaussian"), init._moments(DICTIONARY, gamma, "gaussian"), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


def test_mean_of_a_matern_kernel_by_hand():
    """E (1 + c|x|) exp(−c|x|) with c = √(2γ): E exp(−c|x|) = 2 exp(c²/2) Φ(−c) =: m, and E |x| exp(−c|x|) = −m′(c)."""
    gamma = 0.8
    c = math.sqrt(2 * gamma)
    below, density = 0.5 * math.erfc(c / math.sqrt(2)), math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    m = 2 * math.exp(c * c / 2) * below
    slope = c * m - 2 * math.exp(c * c / 2) * density
    mean, _, _ = expectations.moments(torch.zeros(1, 1, dtype=F64), torch.tensor([gamma], dtype=F64), "matern32")
    assert mean.item() == pytest.approx(m - c * slope, rel=1e-13)


@of_kernels
@pytest.mark.parametrize("gamma", [0.01, 1.7, 300.0])
def test_against_very_many_nodes(kernel, gamma):
    """The midpoint rule with 4·10⁵ nodes: its error is h² times jumps of the slope at the ends, and h³ at kinks."""
    h = 5e-5
    x = torch.arange(-10 + h / 2, 10, h, dtype=F64)
    weight = h * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    u = (math.sqrt(gamma) * (x[:, None] - DICTIONARY[0])).requires_grad_()
    k = definition(kernel, u)
    (slope,) = torch.autograd.grad(k.sum(), u)
    k, slope = k.detach(), math.sqrt(gamma) * slope
    want = weight @ k, k.T @ (weight[:, None] * k), slope.T @ (weight[:, None] * slope)
    for got, w in zip(
        expectations.moments(DICTIONARY[:1], torch.tensor([gamma], dtype=F64), kernel), want, strict=True
    ):
        assert (got[0] - w).abs().max() < 1e-10 * w.abs().max()


def test_equal_channels_are_computed_once(monkeypatch):
    calls = []
    rule = expectations._rule
    monkeypatch.setattr(expectations, "_rule", lambda *a: calls.append(a) or rule(*a))
    gamma = torch.tensor([1.0, 2.0, 1.0, 2.0], dtype=F64)
    mean, second, slope = expectations.moments(DICTIONARY[:1], gamma, "bspline")
    assert len(calls) == 2
    assert (mean.shape, second.shape, slope.shape) == ((4, 5), (4, 5, 5), (4, 5, 5))
    assert torch.equal(second[0], second[2])
    assert not torch.equal(second[0], second[1])


@pytest.mark.parametrize("base", bases.BASES)
@pytest.mark.parametrize("kernel", ["gaussian", "rational_quadratic", "matern32", "bspline"])
@pytest.mark.parametrize("gamma", [0.01, 1.7, 300.0])
def test_of_a_base_against_very_many_nodes(base, kernel, gamma):
    """The midpoint rule with 4·10⁵ nodes, whose cells end at relu's kink: it is off by h²/24 times jumps of slopes.

    The largest are those of x k φ, at most φ(0), and of k′ φ, at most 2γ φ(0).
    """
    h = 5e-5
    x = torch.arange(-10 + h / 2, 10, h, dtype=F64)
    weight = h * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    z = x.clone().requires_grad_()
    b = {"identity": z * 1, "relu": z.relu(), "silu": z * torch.sigmoid(z), "gelu": z * torch.special.ndtr(z)}[base]
    (steep,) = torch.autograd.grad(b.sum(), z)
    u = (math.sqrt(gamma) * (x[:, None] - DICTIONARY[0])).requires_grad_()
    k = torch.exp(-u * u) if kernel == "gaussian" else definition(kernel, u)
    (slope,) = torch.autograd.grad(k.sum(), u)
    b, k, slope = b.detach(), k.detach(), math.sqrt(gamma) * slope
    want = weight @ b, weight @ b**2, weight @ steep**2, k.T @ (weight * b), slope.T @ (weight * steep)
    got = expectations.of_base(base, DICTIONARY[:1], torch.tensor([gamma], dtype=F64), kernel)
    at_kink = h * h / 24 * 0.4 * max(1, 2 * gamma) if base == "relu" else 0
    for found, w in zip(got, want, strict=True):
        # Of odd functions, whose mean is 0, nothing but rounding is left.
        assert (found[0] - w).abs().max() < 1e-10 * w.abs().max() + 1e-13 + at_kink


def test_moments_of_bases_by_hand():
    """Of relu E b² = E b′² = 1/2, of gelu E b = E Φ′ = E φ = 1/(2√π), as E x g(x) = E g′(x)."""
    gamma = torch.ones(1, dtype=F64)
    found = {b: expectations.of_base(b, DICTIONARY[:1], gamma, "gaussian") for b in bases.BASES}
    assert [t.item() for t in found["identity"][:3]] == pytest.approx([0, 1, 1], abs=1e-13)
    assert [t.item() for t in found["relu"][:3]] == pytest.approx([1 / math.sqrt(2 * math.pi), 0.5, 0.5], abs=1e-13)
    assert found["gelu"].mean.item() == pytest.approx(1 / (2 * math.sqrt(math.pi)), abs=1e-13)
    # E x k = E k′ and E k′ = -2 E (x - δ) k: so E x k = 2 δ E k / 3.
    mean = init._moments(DICTIONARY[:1], gamma, "gaussian")[0]
    torch.testing.assert_close(found["identity"].with_values, 2 * DICTIONARY[:1] * mean / 3, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found["identity"].with_slopes, 2 * DICTIONARY[:1] * mean / 3, rtol=1e-12, atol=1e-14)


def test_moments_with_a_base_by_channel():
    gamma, of_kernel = torch.tensor([1.0, 2.0, 1.0], dtype=F64), "matern32"
    together = expectations.of_base("silu", DICTIONARY[:1], gamma, of_kernel)
    assert [t.shape for t in together] == [(3,), (3,), (3,), (3, 5), (3, 5)]
    for c in range(3):
        alone = expectations.of_base("silu", DICTIONARY[:1], gamma[c : c + 1], of_kernel)
        assert all(torch.equal(a[c : c + 1], b) for a, b in zip(together, alone, strict=True))
