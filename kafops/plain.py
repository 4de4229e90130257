"""The operators kaf[n, m] and kaf_backward[n, m] in plain PyTorch, a point of the dictionary at a time.

For what a backend has no kernel for: any κ, base and order of derivative, on any device. No N × D tensor is made, but
every point is a few passes over x. With u = √γ (x − δ_k) and d = x − δ_k, as γ ∂/∂γ is (u/2) ∂/∂u,

    ψ[n, m](d) = ∂ⁿ/∂xⁿ ∂ᵐ/∂γᵐ κ(√γ d) = γ^(n/2 − m) Σ_{p ≤ m} a_p uᵖ κ^(n + p)(u)
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kafops import bases, checks, kernels, reference

KERNELS = {k.code: k for k in kernels.KERNELS.values()}
BASES = {0: None} | {b.code: b.name for b in bases.BASES.values()}


def kaf(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor | None,  # [C, D] or [1, D]
    boundary: float,
    kappa: int = 0,
    base: int = 0,
    n: int = 0,
    m: int = 0,
) -> Tensor:  # [N, C, *]
    """Compute the operator `kaf` of kafops/schemas.inc."""
    terms = _Terms(x, alpha, gamma, dictionary, boundary, kappa)
    return terms.like_x(_curve(terms, alpha, base, n, m))


def kaf_backward(
    grad: Tensor,  # [N, C, *]
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor | None,  # [C, D] or [1, D]
    boundary: float,
    needs: int,
    kappa: int = 0,
    base: int = 0,
    n: int = 0,
    m: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the operator `kaf_backward` of kafops/schemas.inc."""
    terms = _Terms(x, alpha, gamma, dictionary, boundary, kappa)
    weight = grad.to(terms.x.dtype)
    dx = terms.like_x(weight * _curve(terms, alpha, base, n + 1, m)) if needs & 1 else x.new_empty(0)
    dalpha = _like(terms.moments(weight, n, m), alpha) if needs & 2 else alpha.new_empty(0)
    dgamma, ddictionary = gamma.new_empty(0), (x if dictionary is None else dictionary).new_empty(0)
    if needs & 4:
        dgamma = _like((alpha.double() * terms.moments(weight, n, m + 1)).sum(1), gamma)
    if needs & 8 and dictionary is not None:
        ddictionary = _like(-alpha.double() * terms.moments(weight, n + 1, m), dictionary)
    return dx, dalpha, dgamma, ddictionary


def _base(base: int, x: Tensor, n: int) -> Tensor:
    return bases.value(BASES[base], x, n)


def _curve(terms: "_Terms", alpha: Tensor, base: int, n: int, m: int) -> Tensor:
    total = _base(base, terms.x, n) if base and m == 0 else torch.zeros_like(terms.x)
    for k, psi in enumerate(terms.each(n, m)):
        total = total + terms.rows(alpha[:, k]) * psi
    return torch.where(terms.x.isnan(), terms.x, total)


class _Terms:
    """x, gamma and dictionary of one call, in the dtype of arithmetic, and ψ for each point."""

    def __init__(
        self, x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float, kernel: int
    ) -> None:
        checks.arguments(x, alpha, gamma, dictionary)
        self.of, self.kernel = x, KERNELS[kernel]
        self.x = x.to(torch.promote_types(x.dtype, torch.float32))
        if dictionary is None:
            dictionary = reference.uniform_dictionary(alpha.shape[1], boundary, like=alpha.double())
        self.gamma, self.points = gamma.to(self.x.dtype), dictionary.to(self.x.dtype)
        self.channels = max(p.shape[0] for p in (alpha, gamma, dictionary))
        if 0 in (p.shape[0] for p in (alpha, gamma, dictionary)):
            self.channels = 0

    def rows(self, p: Tensor) -> Tensor:  # [C or 1] -> [C or 1, 1...]
        return p.to(self.x.dtype).reshape(-1, *(1,) * (self.x.dim() - 2)) if self.x.dim() > 1 else p.to(self.x.dtype)[0]

    def each(self, n: int, m: int) -> Iterator[Tensor]:
        """ψ[n, m](x − δ_k) for each k, 0 where x is infinite."""
        kernels.check_order(self.kernel.code, n, m)
        a = [1.0]
        for j in range(m):
            a = [
                (p / 2 - j) * here + before / 2
                for p, (here, before) in enumerate(zip([*a, 0.0], [0.0, *a], strict=True))
            ]
        for _ in range(n):
            a = [here + (p + 1) * after for p, (here, after) in enumerate(zip(a, [*a[1:], 0.0], strict=True))]
        root, scale = self.rows(self.gamma.sqrt()), self.rows(self.gamma ** (n / 2 - m))
        far = ~self.x.isfinite()
        for k in range(self.points.shape[1]):
            u = torch.where(far, 0, root * (self.x - self.rows(self.points[:, k])))
            psi = sum(c * u**p * kernels.value(self.kernel.name, u, n + p) for p, c in enumerate(a) if c)
            yield torch.where(far, 0, scale * psi)

    def moments(self, weight: Tensor, n: int, m: int) -> Tensor:  # [C or 1, D], float64
        """Σ over elements of weight · ψ[n, m](x − δ_k)."""
        dims = [i for i in range(self.x.dim()) if i != 1 or self.channels == 1]
        weight = torch.where(self.x.isnan(), self.x, weight)
        sums = [(weight * psi).double().sum(dims) if dims else (weight * psi).double() for psi in self.each(n, m)]
        return torch.stack([s.reshape(self.channels) for s in sums], 1)

    def like_x(self, y: Tensor) -> Tensor:
        """Cast to the dtype of x and lay out as x."""
        return laid_out_as(self.of, y)


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """Return y with the dtype of x and the strides of an output for it, by operators that exported programs have."""
    return torch.ops.aten.copy(torch.empty_like(x), y)


def _like(gradient: Tensor, p: Tensor) -> Tensor:
    """Cast to the dtype of p, and add over channels where they share one row of it."""
    return (gradient.sum(0, keepdim=True) if p.shape[0] == 1 and gradient.shape[0] != 1 else gradient).to(p.dtype)
