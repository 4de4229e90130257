"""What is timed: inputs, calls, the bytes that a call must move, and its error against float64."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kafops

Curve = Callable[..., Tensor]  # (x, alpha, gamma, boundary or dictionary) -> y
Call = Callable[[], tuple[Tensor, ...]]

SHAPE = (128, 32, 32, 32)
SMALL_SHAPE = (8, 16, 8, 8)
DICTIONARY_SIZE = 20
BOUNDARY = 3.0
ALPHA_STD = 0.8


@dataclass(frozen=True, eq=False)
class Problem:
    """One input of a curve or another activation, and dL/dy. Derivatives are by x and the trained parameters."""

    x: Tensor  # [N, C, H, W]
    grad: Tensor  # [N, C, H, W], dL/dy
    parameters: tuple[Tensor, ...]  # alpha [C, D], gamma [C], for a free dictionary its points [C, D]; a PReLU's weight
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments of the function

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Return what is differentiated by."""
        return (self.x, *(t for t in self.parameters if t.requires_grad))

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the function that this is an input of."""
        return (self.x, *self.parameters, *([BOUNDARY] if len(self.parameters) == 2 else []))

    def call(self, curve: Curve) -> Tensor:
        """Return the function of this input."""
        return curve(*self.arguments(), **self.options)

    def of(self, *parameters: Tensor) -> "Problem":
        """Return the same input for a function with other parameters."""
        return Problem(self.x, self.grad, parameters)  # and no options

    def passes(self, n: int) -> int:
        """Return the bytes of n passes over a tensor as large as x."""
        return n * self.x.numel() * self.x.element_size()


# Passes over tensors as large as x that a fused implementation cannot avoid.
FORWARD = 2  # read x, write y
FORWARD_BACKWARD = FORWARD + 3  # read x and dL/dy, write dL/dx
GRADIENT_PENALTY = (
    FORWARD_BACKWARD + 2 + 4
)  # p = Σ (dL/dx)²: read dL/dx, write dp/d(dL/dx); read it, dL/dy, x; write dp/dx


@functools.cache
def problem(
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    dictionary_size: int = DICTIONARY_SIZE,
    free: bool = False,
    shape: tuple[int, ...] = SHAPE,
    gamma_by_channel: bool = False,
    base: str | None = None,
    channel_dim: int = 1,
) -> Problem:
    """Make x ~ N(0, 1), dL/dy ~ N(0, 1) and alpha ~ N(0, 0.8²), the same for the same arguments."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        torch.randn(shape, generator=generator).to(dtype).to(memory_format=memory_format).requires_grad_(leaf)
        for leaf in (True, False)
    )
    channels = shape[channel_dim]
    alpha = ALPHA_STD * torch.randn(channels, dictionary_size, generator=generator)
    step = 2 * BOUNDARY / (dictionary_size - 1)
    gamma = torch.full((channels,), 1 / (6 * step**2))
    if gamma_by_channel:
        gamma = gamma * torch.linspace(0.8, 1.25, channels)
    options: dict[str, Any] = {} if base is None else {"base": base}
    if channel_dim != 1:
        options["channel_dim"] = channel_dim
    if not free:
        alpha.requires_grad_()
        return Problem(x, grad, (alpha, gamma), options)
    points = torch.linspace(-BOUNDARY, BOUNDARY, dictionary_size)
    dictionary = points + 0.3 * step * torch.randn(channels, dictionary_size, generator=generator)
    return Problem(x, grad, tuple(t.requires_grad_() for t in (alpha, gamma, dictionary)))


def forward(curve: Curve, p: Problem) -> Call:
    """Return the call y = f(x), nothing kept."""

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (p.call(curve),)

    return call


def forward_backward(curve: Curve, p: Problem) -> Call:
    """Return the call that makes y, dL/dx and the parameters' gradients."""

    def call() -> tuple[Tensor, ...]:
        y = p.call(curve)
        return (y.detach(), *torch.autograd.grad(y, p.leaves, p.grad))

    return call


def gradient_penalty(curve: Curve, p: Problem) -> Call:
    """Return the call that differentiates Σ (dL/dx)² by x and the parameters."""

    def call() -> tuple[Tensor, ...]:
        (grad_x,) = torch.autograd.grad(p.call(curve), p.x, p.grad, create_graph=True)
        return torch.autograd.grad(grad_x.square().sum(), p.leaves)

    return call


def two_exponentials(x: Tensor, alpha: Tensor, gamma: Tensor, boundary: float) -> Tensor:
    """f(x) = e^(-tu²) Σ_k (alpha_k e^(-tk²)) r^k in plain PyTorch, u = x / Δ from the middle node, r = e^(2tu).

    Positive and negative powers are two Horner sums, in r and in 1/r, and x is clamped to where exp(-gamma (x - δ)²)
    is 1e-8 at the last node: so nothing overflows.
    """
    d = alpha.shape[1]
    step = 2 * boundary / (d - 1)
    middle = d // 2
    k = torch.arange(d, device=x.device) - middle
    t = (gamma * step**2).view(-1, 1)  # [C, 1]
    coefficients = (alpha * torch.exp(-t * k**2)).unbind(1)  # D of [C]
    ones = (1,) * (x.dim() - 2)
    reach = (boundary + (18.4 / gamma).sqrt()).view(-1, *ones)  # 18.4 = ln 1e8
    t = t.view(-1, *ones)
    u = (x.clamp(-reach, reach) - (middle * step - boundary)) / step
    r = torch.exp(2 * t * u)
    right = _horner(coefficients[middle:], r, ones)
    left = _horner((torch.zeros_like(coefficients[0]), *reversed(coefficients[:middle])), r.reciprocal(), ones)
    return torch.exp(-t * u * u) * (right + left)


def _horner(coefficients: tuple[Tensor, ...], r: Tensor, ones: tuple[int, ...]) -> Tensor:
    """Return Σ_k coefficients[k] r^k."""
    total = coefficients[-1].view(-1, *ones)
    for c in reversed(coefficients[:-1]):
        total = total * r + c.view(-1, *ones)
    return total


@functools.cache
def compiled(curve: Curve) -> Curve:
    """Return the curve under torch.compile, specialised to the shapes it meets."""
    return torch.compile(curve, dynamic=False)


def kept_bytes(call: Callable[[], object]) -> int:
    """Count the bytes of the distinct storages that autograd keeps during a call."""
    kept: dict[int, Tensor] = {}  # the tensors are held, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def error(outputs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> float:
    """Return the largest max |output - exact| / max |exact| of all outputs."""
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(outputs, exact, strict=True))


@functools.cache
def exact(make: Callable[[Curve, Problem], Call], p: Problem, chunk: int = 8) -> tuple[Tensor, ...]:
    """Compute the outputs of a call in float64 by the reference, a part of the batch at a time."""
    curve = kafops.reference.kaf if len(p.parameters) == 2 else kafops.reference.kaf_free
    parameters = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in p.parameters)
    parts = []
    for x, grad in zip(p.x.detach().split(chunk), p.grad.split(chunk), strict=True):
        part = Problem(x.double().requires_grad_(), grad.double(), parameters, p.options)
        parts.append(make(curve, part)())
    whole = []
    for outputs in zip(*parts, strict=True):
        like_x = outputs[0].shape[1:] == p.x.shape[1:]  # a gradient of a parameter is a sum over the batch
        whole.append(torch.cat(outputs) if like_x else torch.stack(outputs).sum(0))
    return tuple(whole)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Compute with n threads within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
