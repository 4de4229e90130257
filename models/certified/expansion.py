"""How much a network really stretches a change of its image: lower bounds of its Lipschitz constant, found by search.

A Lipschitz constant is at least the largest singular value σ of the logits' Jacobian at any image, and at least
‖F(x) − F(x′)‖ / ‖x − x′‖ for any two images. Both are computed where data is, and bound from below what
`models.certified.lipschitz` bounds from above.
"""

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attacks.linf import frozen


@dataclass(frozen=True, eq=False)
class Stretch:
    """What was found for each image.

    Args:
        ratio: [N], the largest singular value, or ratio of distances, that was found.
        direction: [N, C, H, W], of norm 1: what is stretched so.
    """

    ratio: Tensor
    direction: Tensor


def jacobian_norm(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W]
    generator: torch.Generator,
    steps: int = 50,
    tolerance: float = 1e-4,
) -> Stretch:
    """Return the largest singular value of the Jacobian of the logits at each image, by power iteration on JᵀJ.

    Each step multiplies by J (forward mode) and by Jᵀ (reverse mode). What comes out is ‖J v‖ of a v of norm 1, so
    never more than σ but for rounding, and closer to it with every step.

    Args:
        model: the network, in evaluation mode, so that images do not influence each other.
        images: as above, in the model's dtype.
        generator: of the first v, on the images' device.
        steps: at most so many.
        tolerance: stop when no image's value rises by more than this part of it.
    """
    direction = _normed(torch.randn(images.shape, dtype=images.dtype, device=images.device, generator=generator))
    ratio = images.new_zeros(len(images))
    with frozen(model), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch's own forward mode, about torch.jit
        for _ in range(steps):
            image: Tensor = torch.func.jvp(model, (images,), (direction,))[1]
            found = image.flatten(1).norm(dim=1)
            settled = bool((found <= (1 + tolerance) * ratio).all())
            ratio = torch.maximum(ratio, found)
            if settled:
                break
            back = torch.func.vjp(model, images)[1](image)[0]
            # Where the Jacobian is 0, v stays.
            direction = torch.where(_each(back.flatten(1).norm(dim=1) > 0, back), _normed(back), direction)
    return Stretch(ratio.detach(), direction.detach())


def largest_ratio(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W] in [0, 1]
    radius: float,
    start: Tensor,  # [N, C, H, W]
    norm: str = "L2",
    steps: int = 20,
) -> Stretch:
    """Return the largest ‖F(x) − F(x′)‖₂ / ‖x − x′‖₂ found for an x′ near each image x, by projected gradient ascent.

    From x + radius · start on, steps of falling size up the ratio's logarithm, projected to the ball around x and
    to [0, 1]; the best ratio of all counts.

    Args:
        model: the network, in evaluation mode.
        images: as above.
        radius: of the ball in which x′ is.
        start: directions, such as those of `jacobian_norm`; of any length.
        norm: of the ball, "L2" or "Linf". Distances in the ratio are in L2 in both cases.
        steps: of the ascent.

    Raises:
        ValueError: the norm is another one, or the radius is not above 0.
    """
    if norm not in ("L2", "Linf"):
        raise ValueError(f"norm must be L2 or Linf, got {norm!r}")
    if not 0 < radius < math.inf:
        raise ValueError(f"radius must be above 0 and finite, got {radius}")
    best, direction = images.new_zeros(len(images)), torch.zeros_like(images)
    with torch.no_grad():
        answers = model(images)
    delta = _projected(_unit(start, norm) * radius, images, radius, norm)
    with frozen(model):
        for number in range(steps + 1):
            delta = delta.detach().requires_grad_()
            with torch.enable_grad():
                apart = (model(images + delta) - answers).flatten(1).norm(dim=1)
                away = delta.flatten(1).norm(dim=1)
                ratio = apart / away.clamp(min=_tiny(away))
                # An x′ on x gives 0 / 0; its logarithm would be no number.
                good = (ratio.detach() > 0) & (away.detach() > 0)
                (gradient,) = torch.autograd.grad(ratio[good].log().sum(), delta)
            better = ratio.detach() > best
            best = torch.where(better, ratio.detach(), best)
            direction = torch.where(_each(better, delta), delta.detach(), direction)
            with torch.no_grad():
                size = radius * (1 - number / (steps + 1)) / 2
                moved = delta + size * _unit(gradient.nan_to_num(nan=0.0), norm)
                delta = _projected(moved, images, radius, norm)
    return Stretch(best, _normed(direction))


def _projected(delta: Tensor, images: Tensor, radius: float, norm: str) -> Tensor:
    if norm == "Linf":
        delta = delta.clamp(-radius, radius)
    else:
        delta = delta * (radius / delta.flatten(1).norm(dim=1).clamp(min=radius)).view(-1, 1, 1, 1)
    return (images + delta).clamp(0, 1) - images


def _unit(tensor: Tensor, norm: str) -> Tensor:
    return tensor.sign() if norm == "Linf" else _normed(tensor)


def _normed(tensor: Tensor) -> Tensor:
    return tensor / tensor.flatten(1).norm(dim=1).clamp(min=_tiny(tensor)).view(-1, *(1,) * (tensor.dim() - 1))


def _tiny(tensor: Tensor) -> float:
    """Return what to divide by instead of 0."""
    return float(torch.finfo(tensor.dtype).tiny)


def _each(of_image: Tensor, like: Tensor) -> Tensor:
    return of_image.view(-1, *(1,) * (like.dim() - 1))
