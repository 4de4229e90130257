"""Initial mixing coefficients: random, random and isometric, none, or a ridge fit to any target function.

With a base a curve lies on top of it: a fit is one of target − base, and an isometric f has the base in it.

Everything is computed in float64 on the CPU, with the CPU's random generator, so a seed gives the same curves in every
dtype and on every device. A layer's `init` argument takes a name, an `Initializer` of this file, or a target callable.
"""

import copy
import difflib
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kafops import bases, expectations, kernels

__all__ = [
    "FUNCTIONS", "Init", "InitName", "Initializer", "Isometric", "Normal", "Ridge", "Target", "Zeros", "default",
    "gradient_factor", "resolve", "ridge",
]  # fmt: skip

Target = Callable[[Tensor], Tensor]
InitName = Literal[
    "normal", "isometric", "zeros", "identity", "relu", "silu", "gelu", "celu", "elu", "hardshrink", "hardsigmoid",
    "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu6", "selu", "sigmoid", "softplus", "softshrink",
    "softsign", "tanh", "tanhshrink", "same",
]  # fmt: skip

_F64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
_RIDGE_EPS = 1e-6
_PENALTY = 1e-4  # of |alpha|² in the cost of a curve
_PARTS = 5  # eigenfunctions that a random curve is made of


def _check_number(name: str, value: float, at_least: float = -math.inf, above: float = -math.inf) -> None:
    wanted = f"{name} must be a finite number " + (f"> {above:g}" if above > at_least else f"≥ {at_least:g}")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{wanted}, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= at_least and value > above):
        raise ValueError(f"{wanted}, got {name}={value}")


class Initializer(ABC):
    """A rule for the first mixing coefficients; subclass it to bring your own."""

    @abstractmethod
    def __call__(
        self,
        dictionary: Tensor,  # [D], float64
        gamma: Tensor,  # [C], float64
    ) -> Tensor:  # [C, D]
        """Return the coefficients of C curves on one dictionary."""

    def for_kernel(self, kernel: str) -> "Initializer":
        """Return the rule for a layer with that kernel: itself, unless it depends on the kernel."""
        return self

    def for_layer(self, kernel: str, base: str | None) -> "Initializer":
        """Return the rule for a layer with that kernel and base: `for_kernel`'s, unless it depends on the base."""
        return self.for_kernel(kernel)

    def for_dictionary(self, dictionary: Tensor, before: Tensor) -> "Initializer":  # [D], [D], float64
        """Return the rule for another dictionary than it had before: itself, unless it holds values on the points."""
        return self

    def function(self, dictionary: Tensor) -> Target | None:  # [D], float64
        """Return the function that the curves on its dictionary are the fit to; None where there is none."""
        return None


Init: TypeAlias = InitName | Initializer | Target | nn.Module | type[nn.Module]
"""What the argument `init` of a layer may be."""


@dataclass(frozen=True)
class Normal(Initializer):
    """Independent coefficients, alpha ~ N(0, std²).

    Args:
        std: standard deviation, default 0.3 (0.8 and 0.05 are also in use elsewhere).

    Raises:
        TypeError, ValueError: std is not a finite number ≥ 0.

    For x ~ N(0, 1) such curves have a `gradient_factor` near sqrt(2γ), 1.8 with the defaults: deep networks that have
    one on their trunk explode at the start, whatever std is.

    Example:
        >>> layer = kafops.KAF2d(16, init=kafops.init.Normal(std=0.8))
    """

    std: float = 0.3

    def __post_init__(self) -> None:
        _check_number("std", self.std, at_least=0.0)

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        """Return the coefficients [C, D]."""
        return self.std * torch.randn(len(gamma), len(dictionary), **_F64)


@dataclass(frozen=True)
class Zeros(Initializer):
    """No curve at all: a layer with a base is its base, one without is 0.

    Example:
        >>> layer = kafops.KAF2d(16, base="silu")  # init="zeros" is the default with a base
    """

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        """Return the coefficients [C, D]."""
        return torch.zeros(len(gamma), len(dictionary), **_F64)


@dataclass(frozen=True)
class Isometric(Initializer):
    """Random curves that keep E[f′²] / Var f at most `ratio` for x ~ N(0, 1).

    A normalisation after an activation divides out its scale, so what the activation does to a gradient is a factor of
    about sqrt(E[f′²] / Var f) (`gradient_factor`). The Gaussian Poincaré inequality puts it at 1 or above, with
    equality only for straight lines, so curves near the bound are near a line: they bend, but gently.

    Curves are drawn from the span of the dictionary's own kernels. Among those with E[f] = 0 we take the (up to) five
    eigenfunctions φ_1, φ_2, … of lowest E[φ′²] + 1e-4 |α|² relative to Var φ, which resemble the Hermite polynomials of
    degree 1 to 5; the term in |α|² keeps coefficients small. A curve is f = std · (a_1 φ_1 + Σ a_i φ_i) with Σ a² = 1:
    the a_i of the bent parts are random in sign and size, in equal shares on average, scaled so that their cost fills
    the allowance `ratio` exactly, and a_1 > 0 takes the rest. So E[f] = 0, Var f = std², E[f′²] ≤ ratio · std², every
    curve rises on average, and no two channels bend alike (with D = 2 there is one such curve, and all are equal).

    All this is exact for x ~ N(0, 1) and says nothing of other inputs: outside the dictionary a curve returns to 0.

    With a base b the curve goes on top of it, and E[f] = 0, Var f = std² and E[f′²] ≤ ratio · std² hold for the sum of
    both. With r what is left of b when the φ_i are taken out of it, f = r + Σ z_i φ_i, where |z|² = std² - Var r. The z
    of least cost, with z_1 ≥ 0, is found exactly; from there z turns towards a random direction of bent parts, up to a
    right angle, until the cost fills the allowance, or what φ_2 costs. So "relu" (1.47 by itself) and "silu" (1.21)
    come down to 1.1, and "identity" (1) bends up to it; whoever wants the straight line itself has it with "zeros".
    Beyond the dictionary f goes on as its base, whose slope is 1: with a smaller std, the few large inputs would grow
    from layer to layer. So the name "isometric" stands for std = 1 on a base.

    Args:
        ratio: upper bound of E[f′²] / Var f, default 1.1 (ELU has 1.08, tanh 1.18, SiLU 1.21, ReLU 1.47).
        std: standard deviation of f. The default sqrt(1/2) gives f the second moment of ReLU, so that He's weights, of
            variance 2/fan_in, keep both signal and gradient in scale; 1 does so for weights of variance 1/fan_in, and
            is the better one on a base.
        kernel, base: of the curves; a layer puts its own in place of them.

    Raises:
        TypeError, ValueError: ratio is not a number > 1, or std not a number > 0; when called, the dictionary cannot
            reach the ratio (D = 1, a short boundary, gamma too large, or a std that the base is far from).

    Source: own construction. The inequality: Chernoff, "A note on an inequality involving the
    normal distribution", 1981.

    Example:
        >>> layer = kafops.KAF2d(16, init="isometric")
        >>> kafops.init.gradient_factor(layer.alpha, layer.bandwidths(), layer.points()).max() < 1.1
        tensor(True)
    """

    ratio: float = 1.1
    std: float = math.sqrt(0.5)
    kernel: str = field(default="gaussian", repr=False)
    base: str | None = field(default=None, repr=False)

    def for_kernel(self, kernel: str) -> "Isometric":
        """Return the rule for a layer with that kernel."""
        return self if kernel == self.kernel else replace(self, kernel=kernel)

    def for_layer(self, kernel: str, base: str | None) -> "Isometric":
        """Return the rule for a layer with that kernel and base."""
        return replace(self, kernel=kernel, base=base)

    def __post_init__(self) -> None:
        _check_number("ratio", self.ratio, above=1.0)
        _check_number("std", self.std, above=0.0)
        kernels.named(self.kernel)
        bases.named(self.base)

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        """Return the coefficients [C, D]."""
        distinct, channel = gamma.unique(return_inverse=True)
        if self.base is not None:
            return self._on_base(self.base, dictionary, distinct, channel)
        cost, basis = (t[channel] for t in _eigenfunctions(dictionary, distinct, self.kernel))  # [C, m], [C, D, m]
        least = cost[:, :1].amax().item() if cost.shape[1] else math.inf
        self._check_least(least, dictionary, gamma)
        excess = cost[:, 1:] - cost[:, :1]  # [C, m - 1], what each bent part costs above the line
        bent = torch.randn(excess.shape, **_F64) / excess.sqrt()
        allowance = self.ratio - cost[:, 0]
        if excess.shape[1]:
            # Beyond cost φ_2 nothing would be left for φ_1.
            allowance = torch.minimum(allowance, excess[:, 0])
            bent = bent * (allowance / (excess * bent**2).sum(1)).sqrt()[:, None]
        line = (1 - (bent**2).sum(1, keepdim=True)).clamp(min=0).sqrt()
        return self.std * (basis @ torch.cat([line, bent], 1)[:, :, None]).squeeze(2)

    def _on_base(self, base: str, dictionary: Tensor, gamma: Tensor, channel: Tensor) -> Tensor:
        """Return coefficients [C, D], from the different bandwidths and which of them each channel has."""
        cost, basis = _known(*_eigenfunctions(dictionary, gamma, self.kernel, most=len(dictionary)))
        rest = _rest(base, dictionary, gamma, self.kernel, cost, basis)
        radius = (self.std**2 - rest.variance).clamp(min=0).sqrt()
        z = _cheapest(cost, rest.mixed, radius)
        reachable = (radius > 0) & (cost.shape[1] > 0)
        least = torch.where(reachable, rest.cost_with(cost, z) / self.std**2, math.inf)
        self._check_least(least.amax().item(), dictionary, gamma)

        cost, basis, z, radius = cost[channel], basis[channel], z[channel], radius[channel, None]
        rest = _Rest(*(t[channel] for t in rest))
        excess = cost[:, 1:_PARTS] - cost[:, :1]
        bent = torch.zeros_like(z)
        bent[:, 1:_PARTS] = torch.randn(excess.shape, **_F64) / excess.sqrt()
        bent = bent - (bent * z).sum(1, keepdim=True) * z / radius**2
        length = bent.norm(dim=1, keepdim=True)
        bent = radius * bent / length.clamp(min=1e-300)

        def turned(angle: Tensor) -> Tensor:
            return angle.cos() * z + angle.sin() * bent

        # Beyond cost φ_2 nothing would be left for φ_1, as without a base.
        allowance = self.std**2 * cost[:, 1:2].clamp(max=self.ratio) if cost.shape[1] > 1 else radius

        def allowed(angle: Tensor) -> Tensor:
            return rest.cost_with(cost, turned(angle))[:, None] <= allowance

        high = torch.where(length > 0, math.pi / 2, torch.zeros_like(length))
        low = torch.where(allowed(high), high, 0.0)
        for _ in range(60):
            middle = (low + high) / 2
            good = allowed(middle)
            low, high = torch.where(good, middle, low), torch.where(good, high, middle)
        return rest.alpha + (basis @ turned(low)[:, :, None]).squeeze(2)

    def _check_least(self, least: float, dictionary: Tensor, gamma: Tensor) -> None:
        if least < self.ratio:
            return
        on_base = f" on the base {self.base!r} with std={self.std:.4g}" if self.base else ""
        or_std = ", choose another std" if self.base else ""
        raise ValueError(
            f"init 'isometric' wants E[f'^2] / Var f ≤ {self.ratio}, but a dictionary of {len(dictionary)} points "
            f"on [-{dictionary[-1]:.4g}, {dictionary[-1]:.4g}] with gamma={gamma.max():.4g} reaches no less than "
            f"{least:.4g}{on_base}; widen boundary, lower gamma{or_std}, or allow more with "
            "kafops.init.Isometric(ratio=...)"
        )


@dataclass(frozen=True)
class Ridge(Initializer):
    """Ridge fit to a function, as that function itself is as an `init`, with another regularisation than that.

    Args:
        target: a name of `FUNCTIONS`, a module or module class, or a callable Tensor → Tensor.
        eps: strength of the regularisation, default 1e-6 (1e-4 and 1e-5 are in use elsewhere: `kafops.CONVENTIONS`).

    Raises:
        TypeError, ValueError: eps is not a finite number ≥ 0; from `resolve`, target is none of these.

    Source: Scardapane et al., "Kafnets", 2017, section on initialisation.

    Example:
        >>> layer = kafops.KAF(64, boundary=4.0, init=kafops.init.Ridge("elu", eps=1e-4))
    """

    target: Any
    eps: float = _RIDGE_EPS

    def __post_init__(self) -> None:
        _check_number("eps", self.eps, at_least=0.0)

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        """Return the coefficients [C, D]."""
        return resolve(self, dictionary)(dictionary, gamma)


@dataclass(frozen=True)
class _Fit(Initializer):
    """Ridge fit to a target's values, less the base, on the dictionary.

    A pickle holds the target itself only where it is PyTorch's or ours: it may be a lambda.
    """

    values: tuple[float, ...]
    kernel: str = "gaussian"
    eps: float = _RIDGE_EPS
    base: str | None = None
    target: Target | None = field(default=None, repr=False, compare=False)

    def for_kernel(self, kernel: str) -> "_Fit":
        return self if kernel == self.kernel else replace(self, kernel=kernel)

    def for_dictionary(self, dictionary: Tensor, before: Tensor) -> "_Fit":
        values = _sample(self.function(before), dictionary, self.base)
        return replace(self, values=tuple(values.tolist()))

    def function(self, dictionary: Tensor) -> Target:
        """Return the target, or where it is lost the straight lines through its values, which go on as they end."""
        if self.target is not None:
            return self.target
        values = torch.tensor(self.values, **_F64) + bases.value(self.base, dictionary)
        return partial(straight, dictionary, values)

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        return _solve_ridge(torch.tensor(self.values, **_F64), dictionary, gamma, self.eps, self.kernel)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | ({} if lasts(self.target) else {"target": None})

    def __deepcopy__(self, memo: Any) -> "_Fit":
        return self


def straight(points: Tensor, values: Tensor, x: Tensor) -> Tensor:  # [D], [D], any shape -> as x
    """Return the straight lines through values on points, which go on as they end."""
    if len(points) == 1:
        return values.expand_as(x)
    i = torch.bucketize(x, points[1:-1])
    share = (x - points[i]) / (points[i + 1] - points[i])
    return torch.lerp(values[i], values[i + 1], share)


def lasts(target: Any) -> bool:
    """Return whether a pickle of the target can be read wherever this package is."""
    while isinstance(target, partial):
        target = target.func
    module = getattr(target, "__module__", None) or type(target).__module__
    return module.partition(".")[0] in ("torch", "kafops")


FUNCTIONS: dict[str, Target] = {
    **{base: partial(bases.value, base) for base in bases.BASES},
    "celu": F.celu,
    "elu": F.elu,
    "hardshrink": F.hardshrink,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "logsigmoid": F.logsigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "selu": F.selu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "softshrink": F.softshrink,
    "softsign": F.softsign,
    "tanh": torch.tanh,
    "tanhshrink": F.tanhshrink,
}
"""The functions that curves are fitted to by name: the bases, and torch.nn.functional's with its defaults."""

_OTHER_NAMES = {"swish": "silu", "linear": "identity", "leakyrelu": "leaky_relu", "hswish": "hardswish"}


def default(base: str | None) -> InitName:
    """Return the `init` of a layer that was given none: "elu", or "zeros" on a base."""
    return "elu" if base is None else "zeros"


def resolve(init: Init, dictionary: Tensor, kernel: str = "gaussian", base: str | None = None) -> Initializer:
    """Turn a layer's `init` argument into an `Initializer` for a dictionary [D], a kernel and a base.

    With a base a target is fitted by target − base.

    Raises:
        TypeError: init is neither name nor callable, or a target returns no floating tensor.
        ValueError: unknown name, or a target's values have the wrong shape or are not finite.
    """
    eps = init.eps if isinstance(init, Ridge) else _RIDGE_EPS
    given: Any = init.target if isinstance(init, Ridge) else init
    if isinstance(given, str):
        given = _named(given, base)
    if isinstance(given, Initializer):
        return given.for_layer(kernel, base)
    target = _function(given)
    return _Fit(tuple(_sample(target, dictionary, base).tolist()), kernel, eps, base, target)


def _named(name: str, base: str | None) -> Initializer | Target:
    starts: dict[str, Initializer] = {
        "normal": Normal(),
        "isometric": Isometric() if base is None else Isometric(std=1.0),
        "zeros": Zeros(),
    }
    known = starts | FUNCTIONS
    if name not in known:
        other = _OTHER_NAMES.get(name.lower())
        near = [other] if other else difflib.get_close_matches(name.lower(), known, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"init must be one of {', '.join(map(repr, known))} or a callable, got {name!r}{hint}")
    return known[name]


def _checked(name: str, t: Any, shape: str, positive: bool = False) -> Tensor:
    """Return a tensor in float64 on the CPU, without gradient."""
    wanted = f"{name} must be a finite floating tensor {shape}" + (" of positive numbers" if positive else "")
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"{wanted}, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}")
    if t.dim() != (2 if "," in shape else 1):
        raise ValueError(f"{wanted}, got shape {list(t.shape)}")
    t = t.detach().to(**_F64)
    wrong = ~t.isfinite() | (t <= 0 if positive else False)
    if wrong.any():
        raise ValueError(f"{wanted}, got {t[wrong][0].item()}")
    return t


def _function(init: Any, argument: str = "init") -> Target:
    """Return a callable as a function of float64 on the CPU: a module class is made, a module copied."""
    if isinstance(init, type) and issubclass(init, nn.Module):
        init = init()
    if not callable(init) or isinstance(init, type):
        raise TypeError(
            f"{argument} must be "
            + ("a name, a kafops.init.Initializer or " if argument == "init" else "")
            + f"a callable, such as a function, a module or a module class, got {init!r}"
        )
    if isinstance(init, nn.Module):
        init = copy.deepcopy(init).eval().requires_grad_(False).to(**_F64)
    return init


def ridge(
    target: Target,
    dictionary: Tensor,  # [D]
    gamma: Tensor,  # [C]
    eps: float = _RIDGE_EPS,
    kernel: str = "gaussian",
    *,
    base: str | None = None,
) -> Tensor:  # [C, D]
    """Fit curves to a target function by kernel ridge regression on the dictionary: (K + eps I) α = (target − base)(δ).

    K is the kernel matrix of the dictionary, K[i, j] = κ(√γ (δ_i - δ_j)); of the Gaussian, exp(-γ (δ_i - δ_j)²). The
    fit looks at the target on the points only, and beyond them the curve returns to 0. Coefficients are large (72 for
    ReLU with the layers' defaults) and cancel, so keep them in float32 at least.

    Args:
        target: callable from the points [D], float64, to values [D], finite and floating.
        dictionary: points [D].
        gamma: bandwidths [C].
        eps: strength of the regularisation.
        kernel: κ, a name in `kafops.kernels.KERNELS`.
        base: what is beneath the curve, None or a name in `kafops.bases.BASES`.

    Returns:
        Coefficients [C, D] in float64 on the CPU.

    Raises:
        TypeError, ValueError: target is no function, or returns something else than finite floating values [D]; no such
            kernel or base; dictionary is no finite tensor [D]; gamma no positive finite tensor [C]; eps no finite
            number ≥ 0.

    Source: Scardapane et al., "Kafnets", 2017, section on initialisation; eps as there.

    Example:
        >>> alpha = kafops.init.ridge(torch.nn.functional.gelu, torch.linspace(-3, 3, 20), torch.tensor([1.67]))
    """
    dictionary, gamma = _checked("dictionary", dictionary, "[D]"), _checked("gamma", gamma, "[C]", positive=True)
    _check_number("eps", eps, at_least=0.0)
    kernels.named(kernel)
    bases.named(base)
    return _solve_ridge(_sample(_function(target, "target"), dictionary, base), dictionary, gamma, eps, kernel)


def gradient_factor(
    alpha: Tensor,  # [C, D]
    gamma: Tensor,  # [C]
    dictionary: Tensor,  # [C, D] or [1, D]
    kernel: str = "gaussian",
    *,
    base: str | None = None,
) -> Tensor:  # [C]
    """Return sqrt(E[f′²] / Var f) of each curve for x ~ N(0, 1): in closed form, or by quadrature for other kernels.

    It is about the factor by which an activation, followed by a normalisation, grows a gradient. At least 1; exactly 1
    for straight lines; without a base unchanged when alpha is scaled; NaN for a curve that is 0.

    Args:
        alpha, gamma, dictionary, kernel, base: as for `kafops.kaf_free`; a base is in f, and integrated by quadrature.

    Returns:
        Tensor [C], float64 on the CPU, without gradient.

    Raises:
        TypeError, ValueError: there is no such kernel or base; a tensor is not finite or of another shape, or gamma is
            not positive.

    Example:
        >>> layer = kafops.KAF(16)
        >>> kafops.init.gradient_factor(layer.alpha, layer.bandwidths(), layer.points()).shape
        torch.Size([16])
    """
    alpha, dictionary = _checked("alpha", alpha, "[C, D]"), _checked("dictionary", dictionary, "[C, D] or [1, D]")
    gamma = _checked("gamma", gamma, "[C]", positive=True)
    if len(gamma) not in (1, len(alpha)) or dictionary.shape not in (alpha.shape, (1, alpha.shape[1])):
        raise ValueError(
            f"alpha [C, D], gamma [C] and dictionary [C, D] or [1, D] must fit together, got {list(alpha.shape)}, "
            f"{list(gamma.shape)} and {list(dictionary.shape)}"
        )
    kernels.named(kernel)
    bases.named(base)
    mean, second, slope = _moments(dictionary, gamma, kernel)
    average = (alpha * mean).sum(1)
    square = torch.einsum("cd,cde,ce->c", alpha, second, alpha)
    steep = torch.einsum("cd,cde,ce->c", alpha, slope, alpha)
    if base is not None:
        of_base = expectations.of_base(base, dictionary, gamma, kernel)
        average = average + of_base.mean
        square = square + of_base.second + 2 * (alpha * of_base.with_values).sum(1)
        steep = steep + of_base.slope + 2 * (alpha * of_base.with_slopes).sum(1)
    return (steep / (square - average**2)).sqrt()


def _moments(
    dictionary: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C]
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # [C, D], [C, D, D], [C, D, D]
    """Return E[k_i], E[k_i k_j] and E[k_i′ k_j′] of the kernels k_i(x) = κ(√γ (x - δ_i)) for x ~ N(0, 1).

    Of Gaussians in closed form: k_i k_j is itself a Gaussian, of centre m = (δ_i + δ_j)/2. Its product with the density
    is one more, of variance s² = 1/(1 + 4γ) and mean μ = 4γ s² m.
    """
    if kernel != "gaussian":
        return expectations.moments(dictionary, gamma, kernel)
    gamma = gamma[:, None]
    mean = torch.exp(-gamma * dictionary**2 / (1 + 2 * gamma)) / (1 + 2 * gamma).sqrt()
    gamma = gamma[:, None]
    a, b = dictionary[:, :, None], dictionary[:, None, :]
    s2, m = 1 / (1 + 4 * gamma), (a + b) / 2
    second = s2.sqrt() * torch.exp(-gamma * (a - b) ** 2 / 2 - 2 * gamma * s2 * m**2)
    mu = 4 * gamma * s2 * m
    return mean, second, 4 * gamma**2 * second * (s2 + (mu - a) * (mu - b))


def _eigenfunctions(
    dictionary: Tensor,  # [D]
    gamma: Tensor,  # [C]
    kernel: str,
    most: int = _PARTS,
) -> tuple[Tensor, Tensor]:  # [C, m], [C, D, m]
    """Return the costs E[φ′²] + 1e-4 |α|², ascending, and coefficients α of curves with E φ = 0, Var φ = 1.

    The curves are uncorrelated and so are their slopes (up to the penalty): costs add up like squared weights.
    """
    mean, second, slope = _moments(dictionary[None], gamma, kernel)
    centred = torch.linalg.svd(mean[:, None, :]).Vh[:, 1:].mT  # [C, D, D - 1], spans all α with E f = 0
    eye = torch.eye(len(dictionary), **_F64)
    # A = cost, B = variance: B v = λ⁻¹ A v, solved as a standard symmetric problem in L⊤v where A = L L⊤.
    lower = torch.linalg.cholesky(centred.mT @ (slope + _PENALTY * eye) @ centred)
    half = torch.linalg.solve_triangular(lower, centred.mT @ second @ centred, upper=False)
    inverse_cost, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(lower, half.mT, upper=False))
    inverse_cost, vectors = inverse_cost.flip(1)[:, :most], vectors.flip(2)[:, :, :most]
    basis = centred @ torch.linalg.solve_triangular(lower.mT, vectors, upper=True) / inverse_cost.sqrt()[:, None]
    # An eigenvector's sign is the library's whim; positive at the last point makes φ_1 rise, and a seed reproducible.
    at_end = _kernel(dictionary, gamma, kernel)[:, -1:] @ basis  # [C, 1, m]
    return 1 / inverse_cost, torch.where(at_end < 0, -basis, basis)


def _known(cost: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:  # [G, m], [G, D, m]
    """Return them with 0 for those eigenfunctions that rounding decides, of 1000 times the least cost."""
    known = (cost > 0) & (cost <= 1e3 * cost[:, :1])
    return torch.where(known, cost, 1e3 * cost[:, :1]), torch.where(known[:, None], basis, 0.0)


class _Rest(NamedTuple):
    """r = b + Σ alpha_i k_i of a base b, with E r = 0 and Cov(r, φ_i) = 0, for each of G bandwidths.

    Attributes:
        alpha: [G, D].
        variance: Var r, [G].
        cost: E[r′²] + 1e-4 |alpha|², [G].
        mixed: E[r′ φ_i′] + 1e-4 alpha·α_i, [G, m].
    """

    alpha: Tensor
    variance: Tensor
    cost: Tensor
    mixed: Tensor

    def cost_with(self, cost: Tensor, z: Tensor) -> Tensor:  # [G, m], [G, m] -> [G]
        """Return the cost of r + Σ z_i φ_i."""
        return self.cost + (cost * z**2 + 2 * self.mixed * z).sum(1)


def _rest(base: str, dictionary: Tensor, gamma: Tensor, kernel: str, cost: Tensor, basis: Tensor) -> _Rest:
    mean, second, slope = _moments(dictionary[None], gamma, kernel)
    of_base = expectations.of_base(base, dictionary[None], gamma, kernel)
    slope = slope + _PENALTY * torch.eye(len(dictionary), **_F64)
    alpha = -of_base.mean[:, None] * mean / mean.square().sum(1, keepdim=True)  # E = 0
    covariance = _times(of_base.with_values + _times(alpha, second), basis)
    alpha = alpha - _times(covariance, basis.mT)
    variance = of_base.second + (alpha * (2 * of_base.with_values + _times(alpha, second))).sum(1)
    cost_of_rest = of_base.slope + (alpha * (2 * of_base.with_slopes + _times(alpha, slope))).sum(1)
    return _Rest(alpha, variance, cost_of_rest, _times(of_base.with_slopes + _times(alpha, slope), basis))


def _times(rows: Tensor, matrix: Tensor) -> Tensor:  # [G, D], [G, D, m] -> [G, m]
    return (rows[:, None] @ matrix)[:, 0]


def _cheapest(cost: Tensor, mixed: Tensor, radius: Tensor) -> Tensor:  # [G, m], [G, m], [G] -> [G, m]
    """Return the z of least Σ cost z² + 2 mixed z with |z| = radius and z_1 ≥ 0.

    z_i = -mixed_i / (cost_i - cost_1 + ν) with the ν ≥ 0 that makes it so long, between |mixed_1| / radius and
    |mixed| / radius; of z_1 only the size counts.
    """
    if cost.shape[1] == 0:
        return cost
    radius = radius[:, None]
    low, high = mixed[:, :1].abs() / radius, mixed.norm(dim=1, keepdim=True) / radius

    def others(nu: Tensor) -> Tensor:
        return -mixed[:, 1:] / (cost[:, 1:] - cost[:, :1] + nu)

    for _ in range(100):
        nu = (low + high) / 2
        short = (mixed[:, :1] / nu) ** 2 + others(nu).square().sum(1, keepdim=True) <= radius**2
        low, high = torch.where(short, low, nu), torch.where(short, nu, high)
    first = (radius**2 - others(high).square().sum(1, keepdim=True)).clamp(min=0).sqrt()
    return torch.cat([first, others(high)], 1)


def _kernel(dictionary: Tensor, gamma: Tensor, kernel: str) -> Tensor:  # [D], [C] -> [C, D, D]
    apart, gamma = dictionary[:, None] - dictionary, gamma[:, None, None]
    return torch.exp(-gamma * apart**2) if kernel == "gaussian" else kernels.value(kernel, gamma.sqrt() * apart)


def _solve_ridge(values: Tensor, dictionary: Tensor, gamma: Tensor, eps: float, kernel: str) -> Tensor:
    distinct, channel = gamma.unique(return_inverse=True)
    system = _kernel(dictionary, distinct, kernel) + eps * torch.eye(len(dictionary), **_F64)
    return torch.linalg.solve(system, values.expand(len(distinct), -1))[channel]


def _sample(target: Target, dictionary: Tensor, base: str | None) -> Tensor:
    """Return the values of target − base on the points, the target's checked."""
    with torch.no_grad():
        values = target(dictionary.clone())  # a copy, for targets that work in place
    wanted = f"init must map a tensor {list(dictionary.shape)} to a floating tensor of that shape"
    if not isinstance(values, Tensor):
        raise TypeError(f"{wanted}, but it returned {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{wanted}, but it returned dtype {values.dtype}")
    if values.shape != dictionary.shape:
        raise ValueError(f"{wanted}, but it returned shape {list(values.shape)}")
    values = values.to(**_F64)
    if not values.isfinite().all():
        bad = ~values.isfinite()
        point, value = dictionary[bad][0].item(), values[bad][0].item()
        raise ValueError(f"{wanted}, finite everywhere, but it returned {value} at {point:.4g}")
    return values - bases.value(base, dictionary)
