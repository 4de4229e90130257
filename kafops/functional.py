"""The two functions: argument checks, channels brought to dimension 1, then the backend that serves the device.

A call that is right pays for no check in Python: the operators refuse what does not fit, and the checks then find the
words for it.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from kafops import autograd, backends, bases, checks, decomposition, kernels, reference, sharding
from kafops.torch_private import get_tracing_state

__all__ = ["kaf", "kaf_free"]

_KERNELS: dict[str, int] = {k.name: k.code for k in kernels.KERNELS.values()}
_BASES: dict[str | None, int] = {None: 0} | {b.name: b.code for b in bases.BASES.values()}
_HALF = (torch.bfloat16, torch.float16)


def kaf(
    x: Tensor,  # [N, C, *], or with C at channel_dim
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float = 3.0,
    kernel: kernels.KernelName = "gaussian",
    base: bases.BaseName | None = None,
    channel_dim: int = 1,
) -> Tensor:  # as x
    """Kernel activation function on a uniform dictionary.

    .. math:: f_c(x) = \\text{base}(x) + \\sum_{d=1}^{D} \\alpha_{c,d} \\exp(-\\gamma_c (x - \\delta_d)^2)

    with D points δ evenly spaced on [-boundary, boundary] (the single point 0 for D = 1). Differentiable in x, alpha
    and gamma, n times in x and m times in gamma up to n + 2m = 12, in reverse and forward mode.

    Args:
        x: input, float32, float64, bfloat16 or float16, any strides. Where alpha and gamma have one row, the curve is
            shared and x may have any rank.
        alpha: mixing coefficients [C, D] or [1, D], float32 or float64 whatever the dtype of x. Half precision is
            accepted and computed with in float32, but with an α of 72, as fits to ReLU have, the output is off by 0.02
            in float16 and 0.3 in bfloat16.
        gamma: bandwidths [C] or [1], of the same dtypes. Must be positive; values are not checked here.
        boundary: half-width of the dictionary, a positive float in the units of x.
        kernel: "gaussian" (default), or another κ(√γ (x - δ)) in its place: "rational_quadratic", "matern32" or
            "bspline", defined in `kafops.kernels`. The compiled kernels compute D values of these for each
            element; Triton's have none, and leave them to plain PyTorch.
        base: function beneath the curve: None (default), "identity", "relu", "silu" or "gelu", defined in
            `kafops.bases`.
        channel_dim: dimension of the channels, default 1; -1 for transformers and MLPs. 0 or -1 of an x [C] is a single
            sample. Of no account where the curve is shared.

    Returns:
        Tensor with the shape, dtype and memory format of x. Half-precision x is computed in float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes do not fit, D = 0, devices differ, boundary is not a positive number, or kernel or base is
            unknown.
        RuntimeError: on differentiation, beyond n + 2m = 12 (of the Gaussian by the plain reference alone there is no
            end), or the smoothness of "matern32" and "bspline", 2.

    NaN in x gives NaN in that element only; ±inf gives the limit of the base, 0 without one.

    Source: Scardapane et al., "Kafnets: kernel-based non-parametric activation functions for neural networks", 2017.

    Example:
        >>> alpha, gamma = torch.randn(16, 20), torch.full((1,), 1.67)
        >>> y = kafops.kaf(torch.randn(8, 16, 32, 32), alpha, gamma, boundary=3.0)
    """
    if type(boundary) is not float or not 0 < boundary < math.inf:
        boundary = checks.boundary_of(boundary)
    return call(x, alpha, gamma, None, boundary, kernel, base, channel_dim)


def kaf_free(
    x: Tensor,  # [N, C, *], or with C at channel_dim
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor,  # [C, D] or [1, D]
    kernel: kernels.KernelName = "gaussian",
    base: bases.BaseName | None = None,
    channel_dim: int = 1,
) -> Tensor:  # as x
    """Kernel activation function on a free dictionary: `kaf` with the points given, and trainable.

    .. math:: f_c(x) = \\text{base}(x) + \\sum_{d=1}^{D} \\alpha_{c,d} \\exp(-\\gamma_c (x - \\delta_{c,d})^2)

    Args:
        x, alpha, gamma, kernel, base, channel_dim: as for `kaf`.
        dictionary: points [C, D] or [1, D] in the units of x, any values in any order, of the dtypes of alpha.

    Returns:
        Tensor with the shape, dtype and memory format of x.

    Raises:
        TypeError, ValueError, RuntimeError: as for `kaf`.

    Source: Scardapane et al., 2017; points and bandwidths trained as in "KAF-Free", Peconi, 2020.

    Example:
        >>> dictionary = torch.linspace(-3, 3, 20).repeat(16, 1).requires_grad_()
        >>> y = kafops.kaf_free(torch.randn(8, 16), torch.randn(16, 20), torch.ones(16), dictionary)
    """
    if dictionary is None:
        raise TypeError("dictionary must be a torch.Tensor, got NoneType; kafops.kaf has an even one")
    return call(x, alpha, gamma, dictionary, 0.0, kernel, base, channel_dim)


def call(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    kernel: str,
    base: str | None,
    channel_dim: int,
) -> Tensor:
    """Compute `kaf_free`, or `kaf` without a dictionary; where that fails, find out why. Checks no boundary."""
    if torch.compiler.is_compiling():  # where checks cost nothing, and errors do not come back as they were raised
        return _checked(x, alpha, gamma, dictionary, boundary, kernel, base, channel_dim)
    if _exporting_to_onnx():
        with warnings.catch_warnings():  # of checks in Python: what they ask for does not depend on the batch
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return _checked(x, alpha, gamma, dictionary, boundary, kernel, base, channel_dim)
    if type(x) is not Tensor:  # a DTensor, it may be
        sharding.register()
    try:
        second = channel_dim == 1 or (channel_dim == -1 and isinstance(x, Tensor) and x.dim() == 2)
        if second and type(channel_dim) is int and kernel == "gaussian" and backends.choose(x) != "reference":
            return autograd.apply_eagerly(x, alpha, gamma, dictionary, boundary, 0, _BASES[base])
    except Exception:
        if not _stand_ins(x, alpha, gamma, dictionary):
            _check(x, alpha, gamma, dictionary, kernel, base, channel_dim)
            half = any(p is not None and p.dtype in _HALF for p in (alpha, gamma, dictionary))
            if not half:
                raise
    return _checked(x, alpha, gamma, dictionary, boundary, kernel, base, channel_dim)


def _checked(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    kernel: str,
    base: str | None,
    channel_dim: int,
) -> Tensor:
    """Compute a curve, all arguments checked first."""
    if stand_ins := _stand_ins(x, alpha, gamma, dictionary):
        rest: tuple[Any, ...] = (boundary, kernel, base, channel_dim)
        if dictionary is None:
            return handle_torch_function(kaf, stand_ins, x, alpha, gamma, *rest)
        return handle_torch_function(kaf_free, stand_ins, x, alpha, gamma, dictionary, *rest[1:])
    sharding.register()
    _check(x, alpha, gamma, dictionary, kernel, base, channel_dim)
    alpha, gamma = _precise(alpha), _precise(gamma)
    dictionary = None if dictionary is None else _precise(dictionary)
    if _exporting_to_onnx():
        return decomposition.kaf(x, alpha, gamma, dictionary, boundary, kernel, base, channel_dim)
    if channel_dim == 1 or all(p is None or p.shape[0] == 1 for p in (alpha, gamma, dictionary)):
        return _compute(x, alpha, gamma, dictionary, boundary, kernel, base)
    if x.dim() == 1:
        return _compute(x.unsqueeze(0), alpha, gamma, dictionary, boundary, kernel, base).squeeze(0)
    y = _compute(x.movedim(channel_dim, 1), alpha, gamma, dictionary, boundary, kernel, base)
    return y.movedim(1, channel_dim)


def _compute(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    kernel: str,
    base: str | None,
) -> Tensor:
    if backends.choose_for(kernel, x) == "reference":
        if dictionary is None:
            return reference.kaf(x, alpha, gamma, boundary, kernel, base)
        return reference.kaf_free(x, alpha, gamma, dictionary, kernel, base)
    return autograd.apply(x, alpha, gamma, dictionary, boundary, _KERNELS[kernel], _BASES[base])


def _exporting_to_onnx() -> bool:
    traced = torch.compiler.is_compiling() or get_tracing_state() is not None  # asked first: the other takes 1 µs
    return traced and torch.onnx.is_in_onnx_export()


def _stand_ins(*tensors: Any) -> list[Any]:
    """What is no tensor, but takes calls as torch's own functions do: of these the proxies of torch.fx."""
    return [t for t in tensors if not isinstance(t, Tensor) and has_torch_function((t,))]


def _precise(p: Tensor) -> Tensor:
    return p.float() if p.dtype in _HALF else p


def _check(x: Any, alpha: Any, gamma: Any, dictionary: Any, kernel: Any, base: Any, channel_dim: Any) -> None:
    """Raise unless the arguments fit together."""
    kernels.named(kernel)
    bases.named(base)
    if isinstance(channel_dim, bool) or not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim must be an integer, got {type(channel_dim).__name__}")
    channel = channel_dim
    if channel_dim < 0 and isinstance(x, Tensor):
        channel += x.dim()
    shared = all(isinstance(p, Tensor) and p.shape[:1] == (1,) for p in (alpha, gamma, dictionary) if p is not None)
    if isinstance(x, Tensor) and channel_dim != 1 and not shared and not 0 <= channel < x.dim():
        raise ValueError(f"channel_dim must be a dimension of x, got channel_dim={channel_dim} for x {list(x.shape)}")
    checks.arguments(x, alpha, gamma, dictionary, max(channel, 0), half=True)
