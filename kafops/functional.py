"""The two functions: argument checks, then the backend that serves the tensor's device."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from kafops import autograd, backends, kernel_sums, kernels, reference

__all__ = ["kaf", "kaf_free"]

_X_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PARAMETER_DTYPES = (torch.float32, torch.float64)


def kaf(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float = 3.0,
    kernel: str = "gaussian",
) -> Tensor:  # [N, C, *]
    """Kernel activation function on a uniform dictionary.

    .. math:: f_c(x) = \\sum_{d=1}^{D} \\alpha_{c,d} \\exp(-\\gamma_c (x - \\delta_d)^2)

    with D points δ evenly spaced on [-boundary, boundary] (the single point 0 for D = 1). Differentiable twice in x,
    alpha and gamma, in reverse and forward mode.

    Args:
        x: input [N, C, *], float32, float64, bfloat16 or float16, any strides. Channels are dimension 1. Where alpha
            and gamma have one row, the curve is shared and x may have any rank.
        alpha: mixing coefficients [C, D] or [1, D], float32 or float64 whatever the dtype of x.
        gamma: bandwidths [C] or [1], float32 or float64. Must be positive; values are not checked here.
        boundary: half-width of the dictionary, a positive float in the units of x.
        kernel: "gaussian" (default), or another κ(√γ (x - δ)) in its place: "rational_quadratic", "matern32" or
            "bspline", defined in `kafops.kernels`. These are fused on the CPU, where they cost D kernel values for each
            element; elsewhere, and under torch.func and forward mode, the plain reference computes them.

    Returns:
        Tensor with the shape, dtype and memory format of x. Half-precision x is computed in float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, D = 0, devices differ, boundary is not a positive number, or kernel unknown.

    NaN in x gives NaN in that element only; ±inf gives 0.

    Source: Scardapane et al., "Kafnets: kernel-based non-parametric activation functions for neural networks", 2017.

    Example:
        >>> alpha, gamma = torch.randn(16, 20), torch.full((1,), 1.67)
        >>> y = kafops.kaf(torch.randn(8, 16, 32, 32), alpha, gamma, boundary=3.0)
    """
    _check(x, alpha, gamma)
    if isinstance(boundary, bool) or not isinstance(boundary, numbers.Real):
        raise TypeError(
            f"boundary must be a Python float, got {type(boundary).__name__}; no gradient flows to it "
            "(kaf_free takes a dictionary tensor, which can be trained)"
        )
    if not 0 < boundary < math.inf:
        raise ValueError(f"boundary must be a positive finite number, got boundary={boundary}")
    if kernel != "gaussian":
        points = alpha.new_empty(0, dtype=torch.float64)
        return _other(x, alpha, gamma, reference.uniform_dictionary(alpha.shape[1], float(boundary), points), kernel)
    if backends.choose(x) == "reference":
        return reference.kaf(x, alpha, gamma, float(boundary))
    return autograd.apply(x, alpha, gamma, None, float(boundary))


def kaf_free(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor,  # [C, D] or [1, D]
    kernel: str = "gaussian",
) -> Tensor:  # [N, C, *]
    """Kernel activation function on a free dictionary: `kaf` with the points given, and trainable.

    .. math:: f_c(x) = \\sum_{d=1}^{D} \\alpha_{c,d} \\exp(-\\gamma_c (x - \\delta_{c,d})^2)

    Args:
        x, alpha, gamma, kernel: as for `kaf`.
        dictionary: points [C, D] or [1, D] in the units of x, any values in any order, float32 or float64.

    Returns:
        Tensor with the shape, dtype and memory format of x.

    Raises:
        TypeError, ValueError: as for `kaf`.

    Source: Scardapane et al., 2017; points and bandwidths trained as in "KAF-Free", Peconi, 2020.

    Example:
        >>> dictionary = torch.linspace(-3, 3, 20).repeat(16, 1).requires_grad_()
        >>> y = kafops.kaf_free(torch.randn(8, 16), torch.randn(16, 20), torch.ones(16), dictionary)
    """
    _check(x, alpha, gamma)
    _check_parameter("dictionary", dictionary, 2, x)
    if dictionary.shape[1] != alpha.shape[1]:
        raise ValueError(
            f"dictionary and alpha must have the same number of points D, got dictionary {_shape(dictionary)} "
            f"and alpha {_shape(alpha)}"
        )
    if kernel != "gaussian":
        return _other(x, alpha, gamma, dictionary, kernel)
    if backends.choose(x) == "reference":
        return reference.kaf_free(x, alpha, gamma, dictionary)
    return autograd.apply(x, alpha, gamma, dictionary, 0.0)


def _other(x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor, kernel: str) -> Tensor:
    """Compute kaf_free of a kernel other than the Gaussian, its name not yet checked."""
    kernels.named(kernel)
    if backends.choose_for(kernel, x) == "reference":
        return reference.kaf_free(x, alpha, gamma, dictionary, kernel)
    return kernel_sums.apply(x, alpha, gamma, dictionary, kernel)


def _check(x: Tensor, alpha: Tensor, gamma: Tensor) -> None:
    """Raise unless the arguments' types, dtypes, shapes and devices fit together."""
    _check_tensor("x", x, _X_DTYPES)
    _check_parameter("alpha", alpha, 2, x)
    _check_parameter("gamma", gamma, 1, x)
    if alpha.shape[1] == 0:
        raise ValueError(f"alpha must have at least one coefficient per channel, got shape {_shape(alpha)} with D = 0")


def _check_parameter(name: str, p: Tensor, dim: int, x: Tensor) -> None:
    _check_tensor(name, p, _PARAMETER_DTYPES)
    if p.dim() != dim:
        raise ValueError(f"{name} must have shape {'[C, D] or [1, D]' if dim == 2 else '[C] or [1]'}, got {_shape(p)}")
    if p.device != x.device:
        raise ValueError(f"{name} is on {p.device} but x is on {x.device}; move one with .to(device)")
    rows = p.shape[0]
    if rows == 1:
        return
    if x.dim() < 2:
        raise ValueError(
            f"x must have shape [N, C, *] where {name} has a row per channel, got x {_shape(x)} and {name} "
            f"{_shape(p)}; a single shared row takes any x"
        )
    if rows != x.shape[1]:
        raise ValueError(
            f"{name} must have one row per channel of x (dimension 1) or a single row: x {_shape(x)} has "
            f"{x.shape[1]} channels, {name} {_shape(p)} has {rows} rows"
        )


def _check_tensor(name: str, t: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {wanted}, got {name}.dtype={t.dtype}")
    if t.layout != torch.strided or t.is_nested:
        layout = "a nested tensor" if t.is_nested else f"layout {t.layout}; call .to_dense()"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {layout}")


def _shape(t: Tensor) -> str:
    return str(list(t.shape))
