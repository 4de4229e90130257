"""Whether the arguments of a curve fit together, and what to say where they do not: for functions and operators."""

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from kafops import bases, kernels

__all__ = ["arguments", "boundary_of", "codes", "like_parameter", "like_x"]

_HALF = (torch.bfloat16, torch.float16)
_FULL = (torch.float32, torch.float64)


def arguments(
    x: Tensor,  # [N, C, *], with C at `channel`
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor | None,  # [C, D] or [1, D]
    channel: int = 1,
    half: bool = False,
) -> None:
    """Raise unless the tensors' types, dtypes, shapes and devices fit together.

    Args:
        x, alpha, gamma, dictionary: as for `kafops.kaf_free`; dictionary None for even points.
        channel: dimension of the channels, not negative.
        half: whether parameters may be of half precision.

    Raises:
        TypeError, ValueError: they do not; the message names the argument, what came and what is wanted.
    """
    _tensor("x", x, (*_FULL, *_HALF))
    parameters = {"alpha": (alpha, 2), "gamma": (gamma, 1)} | (
        {} if dictionary is None else {"dictionary": (dictionary, 2)}
    )
    for name, (p, dim) in parameters.items():
        _tensor(name, p, (*_FULL, *_HALF) if half else _FULL)
        if p.dim() != dim:
            raise ValueError(
                f"{name} must have shape {'[C, D] or [1, D]' if dim == 2 else '[C] or [1]'}, got {_shape(p)}"
            )
        if p.device != x.device:
            raise ValueError(f"{name} is on {p.device} but x is on {x.device}; move one with .to(device)")
        _rows(name, p, x, channel)
    if alpha.shape[1] == 0:
        raise ValueError(f"alpha must have at least one coefficient per channel, got shape {_shape(alpha)} with D = 0")
    if dictionary is not None and dictionary.shape[1] != alpha.shape[1]:
        raise ValueError(
            f"dictionary and alpha must have the same number of points D, got dictionary {_shape(dictionary)} "
            f"and alpha {_shape(alpha)}"
        )


def like_x(name: str, t: Tensor, x: Tensor) -> None:
    """Raise a ValueError or TypeError unless t has the shape, dtype and device of x."""
    _tensor(name, t, (x.dtype,))
    if t.shape != x.shape or t.device != x.device:
        raise ValueError(
            f"{name} must have the shape and device of x, {_shape(x)} on {x.device}, got {_shape(t)} on {t.device}"
        )


def like_parameter(name: str, v: Tensor, p: Tensor | None) -> None:
    """Raise a ValueError or TypeError unless v, the weight of a gradient, has the shape and device of parameter p."""
    _tensor(name, v, _FULL)
    if p is None:
        raise ValueError(f"{name} must be None where there is no dictionary, got {_shape(v)}: it needs a dictionary")
    if v.shape != p.shape or v.device != p.device:
        raise ValueError(
            f"{name} must have the shape and device of its parameter, {_shape(p)} on {p.device}, got {_shape(v)} on "
            f"{v.device}"
        )


def boundary_of(boundary: float) -> float:
    """Return boundary as a float.

    Raises:
        TypeError, ValueError: it is no positive finite number.
    """
    if isinstance(boundary, bool) or not isinstance(boundary, numbers.Real):
        raise TypeError(
            f"boundary must be a Python float, got {type(boundary).__name__}; no gradient flows to it "
            "(kaf_free takes a dictionary tensor, which can be trained)"
        )
    if not 0 < boundary < math.inf:
        raise ValueError(f"boundary must be a positive finite number, got boundary={boundary}")
    return float(boundary)


def codes(kernel: int, base: int, n: int, m: int) -> None:
    """Raise a ValueError unless the codes of kernel and base exist and the orders are not negative."""
    for name, code, known in (
        ("kernel", kernel, [k.code for k in kernels.KERNELS.values()]),
        ("base", base, [0, *(b.code for b in bases.BASES.values())]),
    ):
        if code not in known:
            raise ValueError(f"{name} must be one of the codes {known}, got {code}")
    if n < 0 or m < 0:
        raise ValueError(f"n and m, the orders of differentiation, must not be negative, got n={n} and m={m}")


def _rows(name: str, p: Tensor, x: Tensor, channel: int) -> None:
    rows = p.shape[0]
    if rows == 1:
        return
    if x.dim() <= channel:
        raise ValueError(
            f"x must have shape [N, C, *], with channels at dimension {channel}, where {name} has a row per channel, "
            f"got x {_shape(x)} and {name} {_shape(p)}; a single shared row takes any x, channel_dim=0 a sample [C]"
        )
    if rows != x.shape[channel]:
        raise ValueError(
            f"{name} must have one row per channel of x (dimension {channel}) or a single row: x {_shape(x)} has "
            f"{x.shape[channel]} channels, {name} {_shape(p)} has {rows} rows"
        )


def _tensor(name: str, t: Tensor, dtypes: Sequence[torch.dtype]) -> None:
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
