"""Operators kafops::plain_kaf, ...: by these the C++ of a backend has `kafops.plain` compute what its kernels lack.

There is one for each operator of kafops/schemas.inc, with the same schema.
"""

from collections.abc import Callable
from typing import Any

import torch

from kafops import plain
from kafops.ops import OPERATORS

_library = torch.library.Library("kafops", "FRAGMENT")


def _with_own(name: str) -> Callable[..., Any]:
    complete = getattr(plain, f"complete_{name}")
    return lambda *arguments: complete(getattr(torch.ops.kafops, name).default, *arguments)


for _operator in OPERATORS.values():
    _library.define(f"plain_{_operator.schema}")
    _library.impl(f"plain_{_operator.name}", _with_own(_operator.name), "CompositeExplicitAutograd")
