"""base="same": which base an old activation is, or what stands in for one that is none."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from kafops import bases, kernels, reference
from kafops.init import Initializer

__all__ = ["base_of", "checked", "function_of", "name_of", "nearest"]

Function = Callable[[Tensor], Tensor]

_RIDGE = 1e-6  # of |alpha|², beside the mean square of the error
_F64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def name_of(old: Any) -> str:
    """Return how to call an activation: a module by its class."""
    if isinstance(old, nn.Module):
        return type(old).__name__
    return getattr(old, "__name__", None) or str(old)


def checked(old: Any, argument: str) -> Any:
    """Return an old activation, which an argument needs, if it is one.

    Raises:
        TypeError: it is no module, module class or function.
    """
    if not callable(old) or (isinstance(old, type) and not issubclass(old, nn.Module)):
        raise TypeError(
            f'{argument}="same" needs old=, the activation that the layer takes the place of: a module, a module class '
            f"or a function; got {'none' if old is None else repr(old)}"
        )
    return old


def function_of(old: Any) -> Function:
    """Return an old activation as a function that leaves its input as it is.

    Args:
        old: a module, which is copied; a module class, called without arguments; or a function.

    Raises:
        TypeError: old is none of these.
        ValueError: it has parameters or buffers, which would neither train, move nor be saved; or what it makes of a
            number depends on others, or it fails on a small tensor on the CPU.
    """
    if isinstance(checked(old, "base"), type):
        old = old()
    if isinstance(old, nn.Module):
        if old.state_dict() or list(old.parameters()):
            raise ValueError(f'base="same" has no room for the parameters of {name_of(old)}; choose a base and an init')
        old = copy.deepcopy(old)
        if getattr(old, "inplace", False) is True:
            old.inplace = False
    _check_elementwise(old)
    return old


def _check_elementwise(old: Any) -> None:
    x = torch.linspace(-2, 3, 12, device="cpu", dtype=torch.float32).view(3, 4)
    training = getattr(old, "training", False)
    if isinstance(old, nn.Module):
        old.eval()  # some draw random numbers in training
    try:
        with torch.no_grad(), torch.device("cpu"):
            whole, part = old(x.clone()), old(x[:2, 1:3].clone())
    except Exception as e:  # whatever a function of the user's raises
        raise ValueError(
            f"old must take a float32 tensor of any shape on the CPU, and {name_of(old)} fails on shape [3, 4] "
            f"or [2, 2] with {type(e).__name__}: {e}"
        ) from e
    finally:
        if isinstance(old, nn.Module):
            old.train(training)
    same_shape = isinstance(whole, Tensor) and whole.shape == x.shape
    if not same_shape or not torch.allclose(whole[:2, 1:3], part, rtol=1e-4, atol=1e-5, equal_nan=True):
        does = "depends on other elements" if same_shape else "has another shape"
        raise ValueError(f"old must be applied to each element by itself, and what {name_of(old)} returns {does}")


@cache
def _sample() -> Tensor:
    """Points near 0, where activations bend, and far off, where they are cut."""
    small = torch.logspace(-12, 6, 1001, **_F64)
    return torch.cat([torch.linspace(-40, 40, 4001, **_F64), small, -small])


def base_of(function: Function) -> str | None:
    """Return the name of the base that is this function, to the rounding of float64, or None."""
    x = _sample()
    try:
        with torch.no_grad(), torch.device("cpu"):
            y = function(x.clone())
    except Exception:  # whatever a function of the user's raises
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    slack = 64 * torch.finfo(x.dtype).eps * x.abs()
    return next((name for name in bases.BASES if ((y - bases.value(name, x)).abs() <= slack).all()), None)


@dataclass(frozen=True, repr=False)
class _LeastSquares(Initializer):
    """Curves that are nearest to values on [-end, end]: beyond the dictionary too, where a ridge fit leaves ends."""

    values: tuple[float, ...]
    end: float
    kernel: str

    def __repr__(self) -> str:
        return "nearest"

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        """Return the coefficients [C, D]."""
        distinct, channel = gamma.unique(return_inverse=True)
        x = torch.linspace(-self.end, self.end, len(self.values), **_F64)
        columns = kernels.value(self.kernel, distinct.sqrt()[:, None, None] * (x[:, None] - dictionary))
        system = columns.mT @ columns / len(x) + _RIDGE * torch.eye(len(dictionary), **_F64)
        right = columns.mT @ torch.tensor(self.values, **_F64)[:, None] / len(x)
        return torch.linalg.solve(system, right)[channel, :, 0]


def nearest(
    function: Function,
    dictionary: Tensor,  # [D], float64
    gamma: Tensor,  # [1], float64
    kernel: str,
) -> tuple[str, Initializer, float]:
    """Return the base with which a curve comes nearest to a function, that curve, and its largest error.

    Nearest, and the error, are on [-8, 8], or on twice the dictionary where that is wider: beyond, the base alone
    remains.
    """
    end = max(8.0, 2 * dictionary[-1].item())
    x = torch.linspace(-end, end, 801, **_F64)
    with torch.no_grad(), torch.device("cpu"):
        wanted = function(x.clone())
    found = []
    for base in bases.BASES:
        fit = _LeastSquares(tuple((wanted - bases.value(base, x)).tolist()), end, kernel)
        y = reference.kaf_free(x, fit(dictionary, gamma), gamma, dictionary[None], kernel, base)
        found.append(((y - wanted).abs().max().item(), base, fit))
    error, base, fit = min(found, key=lambda f: f[0])
    return base, fit, error
