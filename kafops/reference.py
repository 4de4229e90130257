"""The definition of the kernel activation function, in plain PyTorch.

Every compiled kernel is tested against these two functions in float64, and they serve where nothing is compiled. They
build the tensor of all N x D kernel values, so they cost D times the memory of their input.
"""

import torch
from torch import Tensor

from kafops import kernels

# Beyond this |x| every kernel value is 0, unless gamma is below 1e-33; its square is still finite in float32. Without
# the clamp the derivatives at ±inf would be inf · 0 = nan.
_FAR = 1e18


def kaf(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    boundary: float,
    kernel: str = "gaussian",
) -> Tensor:  # [N, C, *]
    """f_c(x) = Σ_d alpha[c, d] exp(-gamma[c] (x - δ_d)²) with D points δ evenly spaced on [-boundary, boundary].

    With a kernel κ of `kafops.kernels`, κ(√gamma[c] (x - δ_d)) in place of the Gaussian.
    """
    return kaf_free(x, alpha, gamma, uniform_dictionary(alpha.shape[1], boundary, like=_arithmetic(alpha, x)), kernel)


def kaf_free(
    x: Tensor,  # [N, C, *]
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor,  # [C, D] or [1, D]
    kernel: str = "gaussian",
) -> Tensor:  # [N, C, *]
    """f_c(x) = Σ_d alpha[c, d] exp(-gamma[c] (x - dictionary[c, d])²), any points in any order.

    With a kernel κ of `kafops.kernels`, κ(√gamma[c] (x - dictionary[c, d])) in place of the Gaussian.
    """
    ones = (1,) * (x.dim() - 2)
    alpha, dictionary = (_arithmetic(p, x).reshape(len(p), *ones, p.shape[1]) for p in (alpha, dictionary))
    gamma = _arithmetic(gamma, x).reshape(len(gamma), *ones, 1)  # all [C or 1, 1..., D or 1]
    if x.dim() < 2:
        alpha, gamma, dictionary = alpha[0], gamma[0], dictionary[0]
    z = _arithmetic(x, x).clamp(-_FAR, _FAR).unsqueeze(-1)  # [N, C, *, 1]
    if kernel == "gaussian":
        values = torch.exp(-gamma * (z - dictionary) ** 2)  # [N, C, *, D]
    else:
        z = torch.where(x.isnan().unsqueeze(-1), x.unsqueeze(-1), z)  # whose derivative is NaN too
        values = kernels.value(kernel, gamma.sqrt() * (z - dictionary))
        values = torch.where(x.isinf().unsqueeze(-1), 0, values)  # slow tails have not ended where z is clamped
    return _memory_format_of(x, (alpha * values).sum(-1).to(x.dtype))


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
