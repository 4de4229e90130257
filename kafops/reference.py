"""The definition of the kernel activation function, in plain PyTorch.

Every compiled kernel is tested against these two functions in float64, and they serve where nothing is compiled. They
build the tensor of all N x D kernel values, so they cost D times the memory of their input.
"""

import torch
from torch import Tensor

from kafops import bases, kernels

# Beyond this |x| every kernel value is 0, unless gamma is below 1e-33; its square is still finite in float32. Without
# the clamp the derivatives at ±inf would be inf · 0 = nan.
_FAR = 1e18


def kaf(
    x: Tensor,  # [N, C, *], or with C at channel_dim
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float = 3.0,
    kernel: str = "gaussian",
    base: str | None = None,
    channel_dim: int = 1,
) -> Tensor:  # as x
    """f_c(x) = base(x) + Σ_d alpha[c, d] exp(-gamma[c] (x - δ_d)²), D points δ even on [-boundary, boundary].

    With a kernel κ of `kafops.kernels`, κ(√gamma[c] (x - δ_d)) in place of the Gaussian; base is None or one of
    `kafops.bases`.
    """
    points = uniform_dictionary(alpha.shape[1], boundary, like=_arithmetic(alpha, x))
    return kaf_free(x, alpha, gamma, points, kernel, base, channel_dim)


def kaf_free(
    x: Tensor,  # [N, C, *], or with C at channel_dim
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor,  # [C, D] or [1, D]
    kernel: str = "gaussian",
    base: str | None = None,
    channel_dim: int = 1,
) -> Tensor:  # as x
    """f_c(x) = base(x) + Σ_d alpha[c, d] exp(-gamma[c] (x - dictionary[c, d])²), any points in any order.

    With a kernel κ of `kafops.kernels`, κ(√gamma[c] (x - dictionary[c, d])) in place of the Gaussian; base is None or
    one of `kafops.bases`.
    """
    shared = len(alpha) == len(gamma) == len(dictionary) == 1
    after = 0 if shared or x.dim() == 0 else x.dim() - 1 - channel_dim % x.dim()  # dimensions behind the channels'
    alpha, dictionary = (_arithmetic(p, x).reshape(len(p), *(1,) * after, p.shape[1]) for p in (alpha, dictionary))
    gamma = _arithmetic(gamma, x).reshape(len(gamma), *(1,) * after, 1)  # all [C or 1, 1..., D or 1]
    if shared:
        alpha, gamma, dictionary = alpha[0], gamma[0], dictionary[0]
    z = _arithmetic(x, x).clamp(-_FAR, _FAR).unsqueeze(-1)  # [N, C, *, 1]
    z = torch.where(x.isnan().unsqueeze(-1), _arithmetic(x, x).unsqueeze(-1), z)  # whose derivative is NaN too
    if kernel == "gaussian":
        values = torch.exp(-gamma * (z - dictionary) ** 2)  # [N, C, *, D]
    else:
        values = kernels.value(kernel, gamma.sqrt() * (z - dictionary))
        values = torch.where(x.isinf().unsqueeze(-1), 0, values)  # slow tails have not ended where z is clamped
    curve = (alpha * values).sum(-1)
    return _memory_format_of(x, (curve if base is None else bases.value(base, _arithmetic(x, x)) + curve).to(x.dtype))


def uniform_dictionary(dictionary_size: int, boundary: float, like: Tensor) -> Tensor:  # [1, D]
    """Return D points evenly spaced on [-boundary, boundary], or the single point 0 for D = 1."""
    if dictionary_size == 1:
        return like.new_zeros(1, 1)
    points = torch.linspace(-boundary, boundary, dictionary_size, dtype=torch.float64, device=like.device)
    return points.to(like.dtype).unsqueeze(0)


def _arithmetic(t: Tensor, x: Tensor) -> Tensor:
    """Cast to the dtype that arithmetic is done in: that of x, but at least float32."""
    return t.to(torch.promote_types(x.dtype, torch.float32))


def _memory_format_of(x: Tensor, y: Tensor) -> Tensor:
    """Give y the order of dimensions that x has in memory."""
    strides, dims = x.stride(), range(x.dim())
    # By counting, because torch.compile cannot sort symbolic strides.
    place = [sum(strides[j] > strides[i] or (strides[j] == strides[i] and j < i) for j in dims) for i in dims]
    return y.permute([place.index(i) for i in dims]).contiguous().permute(place)
