"""Curves in operators that every runtime has: for ONNX, ExecuTorch, and whatever else takes no operators of kafops.

Coefficients that were fitted cancel: an ELU's are as large as 72 and its curve is below 4, so that float32 sums are off
by 2e-5. Sums are done in float64 unless a runtime lacks it, a few points of the dictionary at a time, so that no tensor
of all N × D kernel values is made.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.nn import functional as F

from kafops import autograd, kernels, ops, plain, reference

__all__ = ["decompositions", "kaf"]

# As of kafops.bases, in operators that runtimes have: they lack erfc. F.silu is NaN at -inf, and F.gelu off by as much
# as 2⁻²⁰ at -3 in float32, three times what the sum with erf is.
BASES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "silu": lambda x: torch.where(x < -1e4, 0, F.silu(x)),
    "gelu": lambda x: torch.where(x < -1e4, 0, x * (0.5 * (1 + torch.erf(x * math.sqrt(0.5))))),
}
POINTS = 4  # of the dictionary at a time: what is kept for each element, against operators in the graph


def kaf(
    x: Tensor,  # [N, C, *], or with C at channel_dim
    alpha: Tensor,  # [C, D] or [1, D]
    gamma: Tensor,  # [C] or [1]
    dictionary: Tensor | None,  # [C, D] or [1, D]
    boundary: float,
    kernel: str = "gaussian",
    base: str | None = None,
    channel_dim: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # as x
    """Return base(x) + Σ_k α_k κ(√γ (x − δ_k)), the sum in a dtype of choice. dictionary None is an even one."""
    if dictionary is None:
        dictionary = reference.uniform_dictionary(alpha.shape[1], boundary, like=alpha.to(dtype))
    shared = len(alpha) == len(gamma) == len(dictionary) == 1
    after = 0 if shared or x.dim() == 0 else x.dim() - 1 - channel_dim % x.dim()  # dimensions behind the channels'
    before = x.dim() - after - (0 if shared else 1)

    def points(p: Tensor) -> Tensor:  # [C or 1, D or 1] -> [D or 1, 1..., C, 1...]
        return p.to(dtype).t().reshape(p.shape[1], *(1,) * before, *(() if shared else (len(p),)), *(1,) * after)

    z, root, derivative = x.to(dtype), points(gamma.unsqueeze(1).to(dtype).sqrt()), kernels.KERNELS[kernel].derivative
    alpha, dictionary = points(alpha), points(dictionary)
    total = torch.zeros_like(z)
    for k in range(0, len(alpha), POINTS):
        values = derivative(root * (z - dictionary[k : k + POINTS]), 0)
        total = total + (alpha[k : k + POINTS] * values).sum(0)
    if base is not None:
        total = total + BASES[base](x.to(torch.promote_types(x.dtype, torch.float32)))
    return total.to(x.dtype)


def decompositions(dtype: torch.dtype = torch.float64) -> dict[Any, Callable[..., Any]]:
    """Return functions for kafops' operators in operators of PyTorch, for `ExportedProgram.run_decompositions`.

    `torch.onnx.export` needs none of them: it finds those in float64 by itself.

    Args:
        dtype: that sums over the dictionary are done in, whatever the dtype of x. float64 (default) is exact to the
            last digits of float32. float32 is quicker (docs/deploy.md has a measurement) and there on every runtime,
            with errors of some 2⁻²⁴ Σ|α|: 2e-5 for `init="elu"`, 1e-6 for a layer with a base and |α| of 1.

    Raises:
        ValueError: dtype is neither.

    Example:
        >>> program = torch.export.export(model, (images,)).run_decompositions(kafops.decompositions())
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")

    def of_kaf(*arguments: Any, **named: Any) -> Tensor:
        a = ops.OPERATORS["kaf"].bind(arguments, named)
        if not a["n"] and not a["m"]:
            curve = (a["x"], a["alpha"], a["gamma"], a["dictionary"], a["boundary"])
            y = kaf(*curve, plain.KERNELS[a["kappa"]].name, plain.BASES[a["base"]], dtype=dtype)
            return y if a["x"].is_contiguous() else plain.laid_out_as(a["x"], y)
        return plain.kaf(**_cast(a, dtype)).to(a["x"].dtype)

    def of_backward(*arguments: Any, **named: Any) -> tuple[Tensor, ...]:
        operator = ops.OPERATORS["kaf_backward"]
        a = operator.bind(arguments, named)
        gradients = zip(plain.kaf_backward(**_cast(a, dtype)), operator.outputs, strict=True)
        return tuple(g.to((a["x"] if a[name] is None else a[name]).dtype) for g, name in gradients)

    # The last is made of calls of the second, which are decomposed in their turn.
    return {ops.kaf: of_kaf, ops.kaf_backward: of_backward, ops.kaf_double_backward: autograd.composed_double_backward}


def _cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: a.to(dtype) if isinstance(a, Tensor) else a for name, a in arguments.items()}


def _rule(decomposition: Callable[..., Any]) -> Callable[..., Any]:
    def rule(mode: Any, operator: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        if not torch.onnx.is_in_onnx_export():
            return mode.__torch_dispatch__(operator, types, arguments, named)
        with mode:
            return decomposition(*arguments, **named or {})

    return rule


# For torch.onnx.export of programs that were exported before. A rule for the mode that records them, rather than an
# entry of torch._decomp's table: Inductor refuses an operator of that table that it does not decompose where the
# environment has CI, and FakeTensor would take it for the fake kernel.
_register = library.register_torch_dispatch
for _operator, _function in decompositions().items():
    _register(_operator, ProxyTorchDispatchMode, _rule(_function))
