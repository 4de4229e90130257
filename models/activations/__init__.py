"""Activations by name, options in the name: `kwta:ratio=0.1,per=channel`. Each makes modules for one network."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import kafops
from models.activations.kwta import KWinners
from models.activations.smooth import SharedPSSiLU, SmoothReLU
from models.registry import Registry

__all__ = ["ACTIVATIONS", "ActivationFactory", "KWinners", "SharedPSSiLU", "SmoothReLU", "activation"]

ActivationFactory = Callable[[int], nn.Module]
"""Number of channels C -> module for inputs [N, C, *] of any rank ≥ 2."""

ACTIVATIONS: Registry[ActivationFactory] = Registry("activation")


def activation(text: str) -> ActivationFactory:
    """Return a fresh factory for the activations of one network, which may hold what its layers share.

    A module whose behaviour depends on how far training is has a method `set_progress(progress)`, 0 … 1.

    Raises:
        ValueError: the name or an option is unknown, or a value is not what the option takes.

    Example:
        >>> factory = activation("kaf:dictionary_size=12,boundary=4")
        >>> layer = factory(64)
    """
    return ACTIVATIONS.create(text)


@ACTIVATIONS.register("relu")
def _relu() -> ActivationFactory:
    return lambda channels: nn.ReLU()


@ACTIVATIONS.register("leaky_relu")
def _leaky_relu(*, slope: float = 0.01) -> ActivationFactory:
    return lambda channels: nn.LeakyReLU(slope)


@ACTIVATIONS.register("prelu")
def _prelu() -> ActivationFactory:
    """One learned slope per channel, from 0.25 on (He et al. 2015)."""
    return nn.PReLU


@ACTIVATIONS.register("elu")
def _elu() -> ActivationFactory:
    return lambda channels: nn.ELU()


@ACTIVATIONS.register("silu", "swish")
def _silu() -> ActivationFactory:
    return lambda channels: nn.SiLU()


@ACTIVATIONS.register("gelu")
def _gelu() -> ActivationFactory:
    """x Φ(x) with the exact Φ, not the tanh approximation."""
    return lambda channels: nn.GELU()


@ACTIVATIONS.register("softplus")
def _softplus(*, beta: float = 1.0) -> ActivationFactory:
    """log(1 + exp(beta x)) / beta."""
    if beta <= 0:
        raise ValueError(f"option 'beta' of activation 'softplus' must be above 0, got {beta:g}")
    return lambda channels: nn.Softplus(beta)


@ACTIVATIONS.register("smoothrelu")
def _smoothrelu() -> ActivationFactory:
    return lambda channels: SmoothReLU()


@ACTIVATIONS.register("pssilu")
def _pssilu() -> ActivationFactory:
    return SharedPSSiLU()


@ACTIVATIONS.register("tanh")
def _tanh() -> ActivationFactory:
    return lambda channels: nn.Tanh()


@ACTIVATIONS.register("sigmoid")
def _sigmoid() -> ActivationFactory:
    return lambda channels: nn.Sigmoid()


@ACTIVATIONS.register("kwta")
def _kwta(*, ratio: float = 0.2, per: str = "volume", end: float | None = None) -> ActivationFactory:
    KWinners(ratio, per, end)  # an option out of range is an error now, not at the first layer
    return lambda channels: KWinners(ratio, per, end)


# Every KAF takes a base, of `kafops.bases`; a fit to a function is one to what the base lacks of it then.


@ACTIVATIONS.register("kaf")
def _kaf(
    *, dictionary_size: int = 20, boundary: float = 3.0, std: float = 0.3, base: str | None = None
) -> ActivationFactory:
    """Random normal coefficients; std 0.3 is Kafnets', the thesis's Keras code had 0.05."""
    return _kaf_factory(dictionary_size, boundary, base, kafops.init.Normal(std))


@ACTIVATIONS.register("kaf_relu")
def _kaf_relu(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    return _kaf_factory(dictionary_size, boundary, base, "relu")


@ACTIVATIONS.register("kaf_elu")
def _kaf_elu(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    return _kaf_factory(dictionary_size, boundary, base, "elu")


@ACTIVATIONS.register("kaf_silu", "kaf_swish")
def _kaf_silu(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    return _kaf_factory(dictionary_size, boundary, base, "silu")


@ACTIVATIONS.register("kaf_tanh")
def _kaf_tanh(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    return _kaf_factory(dictionary_size, boundary, base, "tanh")


@ACTIVATIONS.register("kaf_isometric")
def _kaf_isometric(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    return _kaf_factory(dictionary_size, boundary, base, "isometric")


@ACTIVATIONS.register("kaf_rq")
def _kaf_rq(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    """Curves of the rational quadratic kernel, fitted to ELU at the start."""
    return _kaf_factory(dictionary_size, boundary, base, "elu", kernel="rational_quadratic")


@ACTIVATIONS.register("kaf_matern")
def _kaf_matern(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    """Curves of the Matérn kernel with ν = 3/2, fitted to ELU at the start."""
    return _kaf_factory(dictionary_size, boundary, base, "elu", kernel="matern32")


@ACTIVATIONS.register("kaf_bspline")
def _kaf_bspline(*, dictionary_size: int = 20, boundary: float = 3.0, base: str | None = None) -> ActivationFactory:
    """Cubic splines with knots at the points of the dictionary, fitted to ELU at the start."""
    return _kaf_factory(dictionary_size, boundary, base, "elu", kernel="bspline")


@ACTIVATIONS.register("kaf_free")
def _kaf_free(
    *, dictionary_size: int = 20, boundary: float = 3.0, std: float = 0.3, base: str | None = None
) -> ActivationFactory:
    """Random normal coefficients; dictionary and bandwidth of each channel are trained too."""
    return _kaf_factory(dictionary_size, boundary, base, kafops.init.Normal(std), free=True)


def _kaf_factory(
    dictionary_size: int,
    boundary: float,
    base: str | None,
    init: str | kafops.init.Initializer,
    free: bool = False,
    kernel: str = "gaussian",
) -> ActivationFactory:
    if dictionary_size < 2:
        raise ValueError(f"option 'dictionary_size' of a KAF must be at least 2, got {dictionary_size}")

    names: dict[str, Any] = {"init": init, "kernel": kernel, "base": base}  # which the layer checks

    def make(channels: int) -> nn.Module:
        return kafops.KAF(channels, dictionary_size, boundary, learn_gamma=free, learn_dictionary=free, **names)

    with torch.random.fork_rng(devices=[]):
        make(1)  # an option out of range is an error now, not at the first layer
    return make
