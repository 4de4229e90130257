"""The operators: fake kernels and vmap rules, derived from kafops/schemas.inc. Kernels are registered by the backends.

C++ defines the schemas where it was compiled; where it was not, they are defined here, from the same file. Derivative
formulas are in kafops/autograd.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kafops import checks, compiled, kernels

__all__ = ["OPERATORS", "Needs", "Operator", "kaf", "kaf_backward", "kaf_double_backward"]


class Needs:
    """Which gradients an operator shall compute: a sum of these bits, plain ints because an IntFlag is slow."""

    X = 1
    ALPHA = 2
    GAMMA = 4
    DICTIONARY = 8
    GRAD = 16


_BITS = {"x": Needs.X, "alpha": Needs.ALPHA, "gamma": Needs.GAMMA, "dictionary": Needs.DICTIONARY, "grad": Needs.GRAD}
OF_X = ("x", "grad", "v_x")  # tensors of the shape of x; the others are parameters, or as one


@dataclass(frozen=True)
class Operator:
    """What a schema says.

    Attributes:
        name, schema: of the operator.
        arguments: names and defaults, None where there is none.
        tensors: the names of the arguments that are tensors; they come first.
        outputs: the argument that each output is the gradient of; of kaf none.
    """

    name: str
    schema: str
    arguments: dict[str, int | None]
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]

    @staticmethod
    def parse(schema: str) -> "Operator":
        """Read "name(Type argument, Type argument=0, ...) -> (Tensor, ...)"."""
        found = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", schema)
        assert found is not None
        declared = [a.split() for a in found[2].split(", ")]  # [type, name or name=default]
        named = [(kind, *name.partition("=")[::2]) for kind, name in declared]
        return Operator(
            name=found[1],
            schema=schema,
            arguments={name: int(default) if default else None for _, name, default in named},
            tensors=tuple(name for kind, name, _ in named if kind.startswith("Tensor")),
            outputs=("grad", "x", "alpha", "gamma", "dictionary")[-found[3].count("Tensor") :]
            if "," in found[3]
            else (),
        )

    @property
    def flags(self) -> tuple[int, ...]:
        """The bit of `needs` that asks for each output."""
        return tuple(_BITS[name] for name in self.outputs)

    @property
    def no_gradients(self) -> tuple[None, ...]:
        """What a backward pass returns to which no gradient comes."""
        return (None,) * len(self.arguments)

    def bind(self, arguments: Sequence[Any], named: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return all arguments by name, with defaults for those that were left out."""
        return self.arguments | dict(zip(self.arguments, arguments, strict=False)) | (named or {})


def _read_schemas() -> dict[str, Operator]:
    text = Path(__file__).with_name("schemas.inc").read_text(encoding="utf-8")
    found = re.findall(r"^KAF_OPERATOR\(([^;]*?)\)$", text, flags=re.MULTILINE)
    operators = [Operator.parse("".join(re.findall(r'"([^"]*)"', quoted))) for quoted in found]
    return {operator.name: operator for operator in operators}


OPERATORS = _read_schemas()
_library = torch.library.Library("kafops", "FRAGMENT")
if compiled.load_error is not None:
    for _operator in OPERATORS.values():
        _library.define(_operator.schema)

kaf = torch.ops.kafops.kaf.default
kaf_backward = torch.ops.kafops.kaf_backward.default
kaf_double_backward = torch.ops.kafops.kaf_double_backward.default


def implement(name: str, function: Callable[..., Any], key: str) -> None:
    """Let a function serve an operator for a dispatch key."""
    _library.impl(name, function, key)


# -------------------------------------------------------------------------------------------------- fake kernels


def _check(a: dict[str, Any]) -> None:
    """Raise where a kernel would."""
    x, dictionary = a["x"], a["dictionary"]
    checks.arguments(x, a["alpha"], a["gamma"], dictionary)
    if dictionary is None:
        checks.boundary_of(a["boundary"])
    for name in a.keys() & {"grad", "v_x"}:
        if a[name] is not None:
            checks.like_x(name, a[name], x)
    for name in ("alpha", "gamma", "dictionary"):
        v = a.get(f"v_{name}")
        if v is not None:
            checks.like_parameter(f"v_{name}", v, a[name])
    checks.codes(a.get("kappa", 0), a["base"], a.get("n", 0), a.get("m", 0))


def _orders(operator: Operator, a: dict[str, Any]) -> list[tuple[int, int]]:
    """The pairs (n, m) of derivatives that a call computes."""
    n, m = a.get("n", 0), a.get("m", 0)
    if operator is OPERATORS["kaf"]:
        return [(n, m)]
    each = {Needs.X: (n + 1, m), Needs.ALPHA: (n, m), Needs.GAMMA: (n, m + 1), Needs.DICTIONARY: (n + 1, m)}
    if operator is OPERATORS["kaf_double_backward"]:
        return []
    needs = a["needs"] & ~(Needs.DICTIONARY if a["dictionary"] is None else 0)
    return [(n, m), *(order for bit, order in each.items() if needs & bit)]


def _fake(operator: Operator) -> Callable[..., Any]:
    def fake(*arguments: Any, **named: Any) -> Any:
        a = operator.bind(arguments, named)
        _check(a)
        for n, m in _orders(operator, a):
            kernels.check_order(a["kappa"], n, m)
        x: Tensor = a["x"]
        if not operator.outputs:
            return torch.empty_like(x)
        gradients = []
        for name, flag in zip(operator.outputs, operator.flags, strict=True):
            t = a[name]
            if t is None or not a["needs"] & flag:
                gradients.append((x if t is None else t).new_empty(0))
            elif name in OF_X:
                gradients.append(torch.empty_like(x))  # also of grad: in the layout of x, which the loops run over
            else:
                gradients.append(t.new_empty(t.shape))  # contiguous whatever the strides of the parameter
        return tuple(gradients)

    return fake


# ----------------------------------------------------------------------------------------------------- vmap rules


class _Fold:
    """Folds a vmapped call into one plain call.

    Where only data differ between the samples and only gradients of data are wanted, the samples join the batch
    dimension. Otherwise they become further channels, each with its own row of each parameter, so that each sample has
    its own gradients.
    """

    def __init__(self, batch: int, x: Tensor, dim: int | None) -> None:
        """Take the batch size, x and the dimension of x that is mapped over."""
        self.batch = batch
        self.shape = x.shape if dim is None else x.movedim(dim, 0).shape[1:]  # of x in one sample
        self.channels = self.shape[1] if len(self.shape) > 1 else 1

    def samples(self, t: Tensor, dim: int | None) -> Tensor:  # [B, ...]
        return t.movedim(dim, 0) if dim is not None else t.unsqueeze(0).expand(self.batch, *t.shape)

    def join(self, t: Tensor | None, dim: int | None) -> Tensor | None:  # [B * N, C, *], or [B, *] of one curve for all
        if t is None:
            return None
        t = self.samples(t, dim)
        return t.flatten(0, 1) if len(self.shape) > 1 else t

    def split(self, t: Tensor) -> Tensor:  # [B, N, C, *]
        return t.unflatten(0, (self.batch, self.shape[0])) if len(self.shape) > 1 else t

    def data(self, t: Tensor | None, dim: int | None) -> Tensor | None:  # [N, B * C, *]
        if t is None:
            return None
        t = self.samples(t, dim)
        if len(self.shape) < 2:
            return t.reshape(1, self.batch, self.shape.numel())
        return t.movedim(0, 1).flatten(1, 2)

    def rows(self, p: Tensor | None, dim: int | None) -> Tensor | None:  # [B * C, ...]
        if p is None:
            return None
        p = self.samples(p, dim)
        return p.expand(self.batch, self.channels, *p.shape[2:]).flatten(0, 1)

    def unfold_data(self, t: Tensor) -> Tensor:  # [B, N, C, *]
        if len(self.shape) < 2:
            return t.reshape(self.batch, *self.shape)
        return t.unflatten(1, (self.batch, self.channels)).movedim(1, 0)

    def unfold_rows(self, t: Tensor, p: Tensor, dim: int | None) -> Tensor:  # [B, C or 1, ...]
        t = t.unflatten(0, (self.batch, self.channels))
        return t.sum(1, keepdim=True) if self.samples(p, dim).shape[1] == 1 else t


def _vmap(operator: Operator, op: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *arguments: Any) -> Any:
        given = operator.bind(arguments)
        a, dims = dict(given), dict(zip(operator.arguments, in_dims, strict=False))
        fold = _Fold(info.batch_size, a["x"], dims["x"])
        flags = zip(operator.outputs, operator.flags, strict=True)
        wanted = [name for name, flag in flags if a["needs"] & flag and a[name] is not None]
        parameters = [name for name in operator.tensors if name not in OF_X]
        joined = all(dims[name] is None for name in parameters) and all(name in OF_X for name in wanted)
        for name in operator.tensors:
            if name in OF_X:
                a[name] = (fold.join if joined else fold.data)(a[name], dims[name])
            elif not joined:
                a[name] = fold.rows(a[name], dims[name])
        results = op(*a.values())
        if not operator.outputs:
            return (fold.split if joined else fold.unfold_data)(results), 0
        unfolded: list[Tensor] = []
        for name, t in zip(operator.outputs, results, strict=True):
            if name not in wanted:
                unfolded.append(t)
            elif name in OF_X:
                unfolded.append((fold.split if joined else fold.unfold_data)(t))
            else:
                unfolded.append(fold.unfold_rows(t, given[name], dims[name]))
        return tuple(unfolded), tuple(0 if name in wanted else None for name in operator.outputs)

    return rule


fakes: dict[Any, Callable[..., Any]] = {}
for _name, _op in (("kaf", kaf), ("kaf_backward", kaf_backward), ("kaf_double_backward", kaf_double_backward)):
    fakes[_op] = _fake(OPERATORS[_name])
    torch.library.register_fake(f"kafops::{_name}", fakes[_op])
    torch.library.register_vmap(f"kafops::{_name}", _vmap(OPERATORS[_name], _op))
