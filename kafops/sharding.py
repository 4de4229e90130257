"""How the operators act on DTensors: which placements go with which, derived from the schemas.

x may be sharded in any dimension. Parameters are sharded with the channels or replicated; their gradients are partial
sums where each process has some of their channels' elements only.

PyTorch is told when torch.distributed.tensor is there, which kafops does not import: before that there are no DTensors.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kafops.ops import OF_X, OPERATORS, Operator
from kafops.torch_private import assumed_constant

__all__ = ["placed_as", "register"]

_done = False


@assumed_constant
def register() -> bool:
    """Tell PyTorch how the operators act on DTensors, once, if there can be any. Return whether that was now."""
    global _done
    if _done or sys.modules.get("torch.distributed.tensor") is None:
        return False
    from torch.distributed.tensor.experimental import register_sharding

    for name, operator in OPERATORS.items():
        register_sharding(getattr(torch.ops.kafops, name).default)(_rule(operator))
    _done = True
    return True


def placed_as(like: Tensor, values: Tensor) -> Tensor:
    """Return values as a DTensor if `like` is one, the first process's for all; else as they are."""
    if not hasattr(like, "device_mesh"):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(values.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=True)


def _rule(operator: Operator) -> Callable[..., Any]:
    """Return the function that PyTorch asks for what is possible along one dimension of a mesh."""

    def rule(*arguments: Any, **named: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        a = operator.bind(arguments, named)
        outputs = operator.outputs or ("x",)
        wanted = [name for name, flag in zip(operator.outputs, operator.flags, strict=True) if a["needs"] & flag]
        others = [None] * (len(a) - len(operator.tensors))  # arguments that are no tensors

        def with_placements(of_x: Any, parameter: Callable[[Tensor], Any], total: Callable[[Tensor], Any]) -> Any:
            """Placements of outputs and of inputs: of what is as x, of a parameter, of a gradient of one."""

            def of(name: str, place: Callable[[Tensor], Any]) -> Any:
                return None if a[name] is None else of_x if name in OF_X else place(a[name])

            def out(name: str) -> Any:
                there = not operator.outputs or (name in wanted and a[name] is not None)
                return of(name, total) if there else Replicate()  # of nothing

            return [out(name) for name in outputs], [*(of(name, parameter) for name in operator.tensors), *others]

        def whole(_: Tensor) -> Any:
            return Replicate()

        def with_channels(p: Tensor) -> Any:
            return Shard(0) if p.shape[0] != 1 else Replicate()

        def total_of_channels(p: Tensor) -> Any:
            return Shard(0) if p.shape[0] != 1 else Partial()

        parameters = [a[name] for name in operator.tensors if name not in OF_X and a[name] is not None]
        shared = all(p.shape[0] == 1 for p in parameters)
        found = [with_placements(Replicate(), whole, whole)]
        for dim in range(a["x"].ndim):
            if dim == 1 and not shared:
                found.append(with_placements(Shard(1), with_channels, total_of_channels))
            else:
                found.append(with_placements(Shard(dim), whole, lambda _: Partial()))
        return found

    return rule


register()
