"""base="same": which base an old activation is, or what stands in for one that is none."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from kafops import bases, kernels, reference
from kafops.init import Initializer, lasts, straight

__all__ = ["Nearest", "base_of", "checked", "function_of", "name_of", "nearest", "needed", "reach"]

Function = Callable[[Tensor], Tensor]

_RIDGE = 1e-6  # of |alpha|², beside the mean square of the error
_F64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def name_of(old: Any) -> str:
    """Return how to call an activation: a module by its class."""
    if isinstance(old, nn.Module):
        return type(old).__name__
    return getattr(old, "__name__", None) or str(old)


def checked(old: Any) -> Any:
    """Return an old activation, if it is one.

    Raises:
        TypeError: it is no module, module class or function.
    """
    if not callable(old) or (isinstance(old, type) and not issubclass(old, nn.Module)):
        raise TypeError(f"old must be a module, a module class or a function, got {old!r}")
    return old


def needed(old: Any, argument: str) -> Any:
    """Return an old activation, which an argument needs.

    Raises:
        TypeError: there is none, or it is none.
    """
    if old is None:
        raise TypeError(
            f'{argument}="same" needs old=, the activation that the layer takes the place of: a module, a module class '
            "or a function; got none"
        )
    return checked(old)


def function_of(old: Any) -> Function:
    """Return an old activation as a function that leaves its input as it is.

    Args:
        old: a module, which is copied, with `inplace` off; a module class, called without arguments; or a function.

    Raises:
        TypeError: old is none of these.
        ValueError: it has parameters or buffers, which would neither train, move nor be saved; or it works in place, or
            what it makes of a number depends on others, or it fails on a small tensor on the CPU.
    """
    if isinstance(needed(old, "base"), type):
        old = old()
    if isinstance(old, nn.Module):
        if [*old.parameters(), *old.buffers()]:
            raise ValueError(
                f'base="same" has no room for the parameters or buffers of {name_of(old)}; choose a base and an init'
            )
        old = copy.deepcopy(old)
        for module in old.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False
    _check_elementwise(old)
    return old


def _check_elementwise(old: Any) -> None:
    x = torch.linspace(-2, 3, 12, device="cpu", dtype=torch.float32).view(3, 4)
    given = x.clone()
    training = getattr(old, "training", False)
    if isinstance(old, nn.Module):
        old.eval()  # some draw random numbers in training
    try:
        with torch.no_grad(), torch.device("cpu"):
            whole, part = old(given), old(x[:2, 1:3].clone())
    except Exception as e:  # whatever a function of the user's raises
        raise ValueError(
            f"old must take a float32 tensor of any shape on the CPU, and {name_of(old)} fails on shape [3, 4] "
            f"or [2, 2] with {type(e).__name__}: {e}"
        ) from e
    finally:
        if isinstance(old, nn.Module):
            old.train(training)
    if not torch.equal(given, x):
        raise ValueError(f"old must leave its input as it is, and {name_of(old)} works in place")
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
class Nearest(Initializer):
    """Curves on a base that are nearest to a function on [-r, r], where r = `reach` lies beyond the dictionary.

    A pickle holds the function itself only where it is PyTorch's or ours.
    """

    values: tuple[float, ...]
    end: float
    base: str
    kernel: str
    of: Function | None = field(default=None, compare=False)

    def __repr__(self) -> str:
        return "nearest"

    def function(self, dictionary: Tensor) -> Function:
        """Return the function, or where it is lost the straight lines through its values."""
        return self.of or partial(straight, self._places(), torch.tensor(self.values, **_F64))

    def for_dictionary(self, dictionary: Tensor, before: Tensor) -> "Nearest":
        """Return the rule for another range."""
        end = reach(dictionary[-1].item())
        return replace(self, values=_values(self.function(before), end), end=end)

    def __call__(self, dictionary: Tensor, gamma: Tensor) -> Tensor:
        """Return the coefficients [C, D]."""
        distinct, channel = gamma.unique(return_inverse=True)
        x = self._places()
        columns = kernels.value(self.kernel, distinct.sqrt()[:, None, None] * (x[:, None] - dictionary))
        system = columns.mT @ columns / len(x) + _RIDGE * torch.eye(len(dictionary), **_F64)
        wanted = torch.tensor(self.values, **_F64) - bases.value(self.base, x)
        return torch.linalg.solve(system, columns.mT @ wanted[:, None] / len(x))[channel, :, 0]

    def error(self, dictionary: Tensor, gamma: Tensor) -> float:  # [D], [1]
        """Return the largest error on [-r, r]."""
        y = reference.kaf_free(self._places(), self(dictionary, gamma), gamma, dictionary[None], self.kernel, self.base)
        return (y - torch.tensor(self.values, **_F64)).abs().max().item()

    def _places(self) -> Tensor:
        return torch.linspace(-self.end, self.end, len(self.values), **_F64)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | ({} if lasts(self.of) else {"of": None})

    def __deepcopy__(self, memo: Any) -> "Nearest":
        return self


def _values(function: Function, end: float) -> tuple[float, ...]:
    x = torch.linspace(-end, end, 801, **_F64)
    with torch.no_grad(), torch.device("cpu"):
        values = function(x.clone())
    if not values.isfinite().all():
        bad = ~values.isfinite()
        raise ValueError(
            f"old must be finite on [{-end:g}, {end:g}] where fit=True, and {name_of(function)} gives "
            f"{values[bad][0].item()} at {x[bad][0].item():.4g}"
        )
    return tuple(values.tolist())


def reach(boundary: float) -> float:
    """Return the end of the range on which curves are fitted."""
    return max(8.0, 2 * boundary)


def nearest(
    function: Function,
    dictionary: Tensor,  # [D], float64
    gamma: Tensor,  # [1], float64
    kernel: str,
) -> tuple[str, Initializer, float]:
    """Return the base with which a curve comes nearest to a function, that curve, and its largest error."""
    end = reach(dictionary[-1].item())
    values = _values(function, end)
    fits = [Nearest(values, end, base, kernel, function) for base in bases.BASES]
    error, _, fit = min((fit.error(dictionary, gamma), i, fit) for i, fit in enumerate(fits))
    return fit.base, fit, error
