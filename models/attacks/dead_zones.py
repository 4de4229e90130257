"""What stands in the backward pass for a kernel activation function where its own slope tells an attack nothing.

Beyond its dictionary, and in the gaps of one that was trained, a curve without a base is flat: a unit there passes no
gradient on, although a step back into the dictionary would change its value. Both functions here are for `BPDA`.
"""

from torch import Tensor, nn

import kafops

WIDER = 4.0  # γ is divided by it: kernels are twice as wide


def has_dead_zones(model: nn.Module) -> bool:
    """Say whether some KAF layer has no base beneath its curves, so that they are flat where no point is near."""
    return any(isinstance(module, kafops.KAF) and module.base is None for module in model.modules())


def continued(module: kafops.KAF, x: Tensor) -> Tensor:  # as x
    """Let a curve without a base go on as a straight line beyond its dictionary: f′(x), and at its ends' f′ outside."""
    if module.base is not None:
        return _curves(module, x, 1.0)
    points = module.points().detach().to(x.dtype)
    shape = [1] * x.dim()
    shape[module.channel_dim] = -1
    inside = x.detach().clamp(points.amin(1).view(shape), points.amax(1).view(shape))
    return _curves(module, inside + (x - x.detach()), 1.0)


def widened(module: kafops.KAF, x: Tensor) -> Tensor:  # as x
    """Widen the kernels of a curve, which lets a unit feel points that are far away, and smooths what it feels.

    The integral of each kernel is kept, α / √γ. Of Gaussian kernels it is the curve smoothed by a Gaussian of variance
    (WIDER - 1) / (2 γ).
    """
    return _curves(module, x, WIDER)


def _curves(module: kafops.KAF, x: Tensor, wider: float) -> Tensor:
    """Compute the layer with its kernels' γ divided by `wider`; no gradient of its parameters.

    The layer itself cannot be called, for its forward is what this stands for.
    """
    alpha, gamma = module.alpha.detach() / wider**0.5, module.bandwidths().detach() / wider
    base = None if module.base == "same" else module.base
    if module.dictionary is None:
        y = kafops.kaf(x, alpha, gamma, module.boundary, module.kernel, base, module.channel_dim)
    else:
        y = kafops.kaf_free(x, alpha, gamma, module.dictionary.detach(), module.kernel, base, module.channel_dim)
    return y if module.old is None else module.old(x) + y
