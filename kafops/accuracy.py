"""How exact a KAF and its derivatives have to be: every value of a problem, and how far each may be from the truth.

The truth is `kafops.reference` in float64. A kernel computes each Gaussian K and each product |x - δ|^q K to a few unit
roundoffs of its own size or of its peak, whichever counts, and adds them up; so the error that a value may have is a
number of roundoffs times the same sum with every term taken absolutely: Σ|α|K for y, Σ|g|K for the gradient of alpha,
and so on. `bounds` forms these sums. They are not tuned to a kernel, nor do they depend on how one works.

A base b is in y, and its derivatives b′ and b″ in those by x and by grad; u is the unit roundoff. b = x s with s from 0
to 1 (1, x > 0, σ or Φ), which is known to u where it is near 1, whether it is computed as s or as 1 − s(−x). So b is
off by u|x|, and adding it to the curve rounds once more, by u|y| ≤ u(|x| + Σ|α|): 2u(|x| + Σ|α|) in all, where b may be
0 all the same. b⁽ⁿ⁾ = x s⁽ⁿ⁾ + n s⁽ⁿ⁻¹⁾ is off by u(|x| + n) for s likewise, or twice that, as s′ and s″ are products
of s and 1 − s, and by as many roundings of b⁽ⁿ⁾ itself as any other term. "identity" and "relu" and their derivatives
are exact; what is left for them is that last part.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from kafops import bases, reference

__all__ = ["Problem", "bounds", "conditioning", "excess", "random_problem", "values"]

# Two roundings for each of the up to 16 terms of a polynomial or a series. The roundings of many elements are taken to
# average out, so that this serves for sums over them as well.
_ROUNDINGS = 32.0
_MAX_DEGREE = 5  # of d in the derivative, by δ, of what the second derivatives need

Polynomial = Sequence[Tensor]  # coefficients [C, D] of |x - δ|^0, |x - δ|^1, ...


@dataclass(frozen=True)
class Problem:
    """One call of `kaf`, or of `kaf_free` where there is a dictionary, and the weights that its derivatives need.

    Attributes:
        x: input [N, C, *].
        alpha: mixing coefficients [C, D] or [1, D].
        gamma: bandwidths [C] or [1].
        dictionary: points [C, D] or [1, D], or None for D points on [-boundary, boundary].
        boundary: half-width of the uniform dictionary.
        grad: gradient of the output, as x.
        v: weights of the gradients of x, alpha, gamma and dictionary (where there is one), each as its argument. The
            second derivatives are those of L = <v, gradients>. None leaves one out of L.
        base: what is beneath the curve, None or a name in `kafops.bases.BASES`.
    """

    x: Tensor
    alpha: Tensor
    gamma: Tensor
    dictionary: Tensor | None
    boundary: float
    grad: Tensor
    v: tuple[Tensor | None, ...]
    base: str | None = None

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The differentiable arguments by name."""
        named = {"x": self.x, "alpha": self.alpha, "gamma": self.gamma, "dictionary": self.dictionary}
        return {name: t for name, t in named.items() if t is not None}

    def to(self, device: torch.device | str) -> "Problem":
        """Return the same problem on a device."""
        moved = {name: t.to(device) for name, t in self.arguments.items()}
        v = tuple(t if t is None else t.to(device) for t in self.v)
        return replace(self, **moved, grad=self.grad.to(device), v=v)  # type: ignore[arg-type]


def random_problem(
    shape: tuple[int, ...], size: int, spacing: float, rows: int, free: bool = False, boundary: float = 3.0
) -> Problem:
    """Draw a problem in float32, the same for the same arguments: x ~ N(0, 2²), alpha ~ N(0, 0.8²).

    Args:
        shape: of x.
        size: D, the number of points; a free dictionary has them around the even ones.
        spacing: γΔ², with Δ the distance of the even points.
        rows: of every parameter: the number of channels, or 1.
        free: whether there is a dictionary.
        boundary: half-width of the dictionary.
    """
    draw = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    step = 2 * boundary / (size - 1) if size > 1 else boundary
    width = step / math.sqrt(spacing)  # 1 / sqrt(γ)
    x = 2 * randn(*shape)
    alpha, gamma = 0.8 * randn(rows, size), torch.full((rows,), 1 / width**2)
    # The weights bring every second derivative to the same order of magnitude, so that none hides the others.
    v = [randn(*shape) * width, randn(*alpha.shape), randn(rows) / width**2]
    grad = randn(*shape)
    if not free:
        return Problem(x, alpha, gamma, None, boundary, grad, tuple(v))
    dictionary = reference.uniform_dictionary(size, boundary, like=alpha) + 0.3 * step * randn(*alpha.shape)
    return Problem(x, alpha, gamma, dictionary, boundary, grad, (*v, width * randn(*alpha.shape)))


def values(problem: Problem, functions: ModuleType, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Compute the output, its gradients, and the gradients of these.

    Args:
        problem: the call.
        functions: what has `kaf` and `kaf_free`: `kafops` or `kafops.reference`.
        dtype: cast every tensor to it first; None leaves them as they are.

    Returns:
        "y"; "backward NAME" for each differentiable argument; "double backward NAME" for grad and for each argument.
    """

    def cast(t: Tensor) -> Tensor:
        return (t if dtype is None else t.to(dtype)).detach()

    arguments = {name: cast(t).requires_grad_() for name, t in problem.arguments.items()}
    grad = cast(problem.grad).requires_grad_()
    options = {} if problem.base is None else {"base": problem.base}
    if problem.dictionary is None:
        y = functions.kaf(*arguments.values(), problem.boundary, **options)
    else:
        y = functions.kaf_free(*arguments.values(), **options)
    first = torch.autograd.grad(y, list(arguments.values()), grad, create_graph=True)
    chosen = [(g, cast(v)) for g, v in zip(first, problem.v, strict=True) if v is not None]
    outputs, weights = zip(*chosen, strict=True)
    second = torch.autograd.grad(outputs, [grad, *arguments.values()], weights, materialize_grads=True)
    result = {"y": y}
    result |= {f"backward {name}": g for name, g in zip(arguments, first, strict=True)}
    result |= {f"double backward {name}": g for name, g in zip(("grad", *arguments), second, strict=True)}
    return {name: t.detach() for name, t in result.items()}


def excess(problem: Problem, got: dict[str, Tensor]) -> dict[str, float]:
    """Return, for each value of `got`, its largest error as a multiple of what `bounds` allows: 1 or less is right.

    A value that is not finite counts as infinitely wrong, as does one of another shape.
    """
    truth, allowed = values(problem, reference, torch.float64), bounds(problem)
    result = {}
    for name, value in got.items():
        if value.shape != truth[name].shape:
            result[name] = torch.inf
            continue
        # One rounding of the result, at least half of the smallest number that the dtype has.
        exact, dtype = truth[name], torch.finfo(value.dtype)
        rounding = dtype.eps / 2 * (exact.abs() + dtype.smallest_normal)
        error = (value.double() - exact).abs() / (allowed[name] + rounding)
        error[value == exact.to(value.dtype)] = 0  # also where both overflow
        result[name] = error.nan_to_num(torch.inf, torch.inf).max().item() if error.numel() else 0.0
    return result


def bounds(problem: Problem) -> dict[str, Tensor]:
    """Return the error that each value of `values(problem, ...)` may have before it is rounded to its own dtype."""
    unit = _unit(torch.promote_types(problem.x.dtype, torch.float32))

    def nearby(q: int, d: Tensor, gamma: Tensor) -> Tensor:
        # A kernel's error at x is relative to the largest d^q K nearby, which sqrt(K) in place of K stands for, or,
        # where K is as good as 0 and may be taken for 0, to the peak of d^q sqrt(K).
        peak = (q / (torch.e * gamma)) ** (q / 2) if q else torch.ones_like(gamma)
        return d**q * torch.exp(-gamma * d * d / 2) + peak / 4

    sums = _Sums(problem, nearby)

    def size(p: Polynomial) -> Polynomial:
        # The points themselves are rounded, which shifts the curve by up to unit · |δ|.
        shifted = _d_dx(p, sums.gamma)
        return [_ROUNDINGS * (p[i] if i < len(p) else 0) + sums.points.abs() * c for i, c in enumerate(shifted)]

    x, mass = sums.data(problem.x).abs(), sums.alpha.abs().sum(1, keepdim=True)

    def of_base(n: int) -> Tensor:
        if n == 0:
            return 2 * (x + mass)
        smooth = problem.base in ("silu", "gelu")
        return _ROUNDINGS * _base(problem, sums, n) + (2 * (x + n) if smooth else 0)

    return {name: unit * t for name, t in _absolute_values(problem, sums, size, of_base).items()}


def conditioning(problem: Problem) -> dict[str, Tensor]:
    """Return the sum of the absolute values of all terms that each value consists of: Σ|α|K for y, and so on."""
    sums = _Sums(problem, lambda q, d, gamma: d**q * torch.exp(-gamma * d * d))
    return _absolute_values(problem, sums, lambda p: p, lambda n: _base(problem, sums, n))


def _base(problem: Problem, sums: "_Sums", n: int) -> Tensor:  # [C, positions]
    """|b⁽ⁿ⁾(x)|."""
    return bases.value(problem.base, sums.data(problem.x), n).abs()


def _unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


class _Sums:
    """Sums of polynomials in d = |x - δ| times a Gaussian of d, over a channel's points or over its elements."""

    def __init__(self, problem: Problem, gaussian: Callable[[int, Tensor, Tensor], Tensor]) -> None:
        """Take gaussian(q, d, gamma), which stands for d^q exp(-gamma d²)."""
        x = problem.x
        self.channels = x.shape[1] if x.dim() > 1 else 1
        self._moved = (x.transpose(0, 1) if x.dim() > 1 else x).shape
        alpha, dictionary = problem.alpha.double(), problem.dictionary
        if dictionary is None:
            dictionary = reference.uniform_dictionary(alpha.shape[1], problem.boundary, like=alpha)
        self.alpha, self.points = (self.rows(p) for p in (alpha, dictionary))  # [C, D]
        self.gamma = self.rows(problem.gamma).unsqueeze(-1)  # [C, 1]
        d = (self.data(x).unsqueeze(-1) - self.points.unsqueeze(1)).abs()  # [C, positions, D]
        self._gaussians = torch.cat([gaussian(q, d, self.gamma.unsqueeze(-1)) for q in range(_MAX_DEGREE + 1)], -1)

    def data(self, t: Tensor) -> Tensor:  # [C, positions]
        t = t.double()
        t = t.transpose(0, 1) if t.dim() > 1 else t
        return t.reshape(self.channels, t.numel() // max(self.channels, 1))

    def rows(self, p: Tensor) -> Tensor:  # [C, ...]
        return p.double().expand(self.channels, *p.shape[1:])

    def at_elements(self, *terms: tuple[Tensor, Polynomial]) -> Tensor:  # [N, C, *]
        """Σ of weight [C, positions] · Σ_k p_k(d) K."""
        total = sum(weight * (self._gaussians @ _padded(p).flatten(1).unsqueeze(-1)).squeeze(-1) for weight, p in terms)
        assert isinstance(total, Tensor)
        return self.like_x(total)

    def like_x(self, data: Tensor) -> Tensor:  # [C, positions] -> [N, C, *]
        data = data.reshape(self._moved)
        return data.transpose(0, 1) if data.dim() > 1 else data

    def over_elements(self, like: Tensor, *terms: tuple[Tensor, Polynomial]) -> Tensor:  # as `like`
        """Σ over elements of weight [C, positions] · p_k(d) K; also over points for `like` [C], over shared rows."""
        moments = ((weight.unsqueeze(1) @ self._gaussians).unflatten(-1, (_MAX_DEGREE + 1, -1)) for weight, _ in terms)
        total = sum((_padded(p) * m.squeeze(1)).sum(1) for (_, p), m in zip(terms, moments, strict=True))
        assert isinstance(total, Tensor)
        total = total if like.dim() == 2 else total.sum(-1)
        return total if like.shape[0] == self.channels else total.sum(0, keepdim=True)


def _padded(p: Polynomial) -> Tensor:  # [C, degrees, D]
    return torch.stack([*p, *(torch.zeros_like(p[0]),) * (_MAX_DEGREE + 1 - len(p))], 1)


def _d_dx(p: Polynomial, gamma: Tensor) -> Polynomial:
    """∂/∂x of p(d) K, and -∂/∂δ of it: p' - 2γ d p with plus signs."""
    result = [torch.zeros_like(p[0]) for _ in range(len(p) + 1)]
    for q, c in enumerate(p):
        if q > 0:
            result[q - 1] = result[q - 1] + q * c
        result[q + 1] = result[q + 1] + 2 * gamma * c
    return result


def _d_dgamma(p: Polynomial) -> Polynomial:
    """∂/∂γ of p(d) K: -d² p with a plus sign."""
    return [torch.zeros_like(p[0]), torch.zeros_like(p[0]), *p]


def _add(*polynomials: Polynomial) -> Polynomial:
    result: list[Tensor] = []
    for p in polynomials:
        for q, c in enumerate(p):
            if q < len(result):
                result[q] = result[q] + c
            else:
                result.append(c)
    return result


def _absolute_values(
    problem: Problem, s: _Sums, size: Callable[[Polynomial], Polynomial], of_base: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """Form every value of `values` with each of its terms p(d) K replaced by size(|p|)(d) times s's Gaussian.

    In place of the base's n-th derivative at the elements [C, positions] stands of_base(n).
    """
    like = problem.arguments
    v = dict(zip(like, problem.v, strict=True))
    g = s.data(problem.grad).abs()
    zero = torch.zeros_like(s.alpha)
    v_x, v_alpha, v_gamma, v_dictionary = (v.get(name) for name in ("x", "alpha", "gamma", "dictionary"))
    v_data = torch.zeros_like(g) if v_x is None else s.data(v_x).abs()
    vg, every = g * v_data, torch.ones_like(g)
    a = [zero if v_alpha is None else s.rows(v_alpha).abs()]
    b = zero if v_gamma is None else s.rows(v_gamma).abs().unsqueeze(-1)
    c = zero if v_dictionary is None else s.rows(v_dictionary).abs()

    def d_dx(p: Polynomial) -> Polynomial:
        return _d_dx(p, s.gamma)

    def along(p: Polynomial) -> Polynomial:  # derivative in the direction of v_gamma and v_dictionary
        return _add([b * t for t in _d_dgamma(p)], [c * t for t in d_dx(p)])

    one, f = [torch.ones_like(s.alpha)], [s.alpha.abs()]
    f_gamma, q = _d_dgamma(f), _add(along(f), a)

    def at_elements(*terms: tuple[Tensor, Polynomial]) -> Tensor:
        return s.at_elements(*((w, size(p)) for w, p in terms))

    def over_elements(name: str, *terms: tuple[Tensor, Polynomial]) -> Tensor:
        return s.over_elements(like[name], *((w, size(p)) for w, p in terms))

    result = {
        "y": at_elements((every, f)),
        "backward x": at_elements((g, d_dx(f))),
        "backward alpha": over_elements("alpha", (g, one)),
        "backward gamma": over_elements("gamma", (g, f_gamma)),
        "double backward grad": at_elements((v_data, d_dx(f)), (every, q)),
        "double backward x": at_elements((vg, d_dx(d_dx(f))), (g, d_dx(q))),
        "double backward alpha": over_elements("alpha", (vg, d_dx(one)), (g, along(one))),
        "double backward gamma": over_elements("gamma", (vg, d_dx(f_gamma)), (g, _add(along(f_gamma), _d_dgamma(a)))),
    }
    if problem.base is not None:
        for name, weight, n in (
            ("y", every, 0),
            ("backward x", g, 1),
            ("double backward grad", v_data, 1),
            ("double backward x", vg, 2),
        ):
            result[name] = result[name] + s.like_x(weight * of_base(n))
    if problem.dictionary is not None:
        result["backward dictionary"] = over_elements("dictionary", (g, d_dx(f)))
        result["double backward dictionary"] = over_elements("dictionary", (vg, d_dx(d_dx(f))), (g, d_dx(q)))
    return result
