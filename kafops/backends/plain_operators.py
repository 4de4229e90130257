"""Operators kafops::plain_kaf, ...: by these the C++ of a backend has `kafops.plain` compute what its kernels lack.

There is one for each operator of kafops/schemas.inc, with the same schema.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kafops import plain

_SCHEMAS = Path(__file__).parents[1] / "schemas.inc"
_library = torch.library.Library("kafops", "FRAGMENT")


def _schemas() -> dict[str, str]:
    """Return what follows each operator's name in its schema."""
    macros = re.findall(r"^KAF_OPERATOR\((.*?\")\)$", _SCHEMAS.read_text(), re.MULTILINE | re.DOTALL)
    schemas = ("".join(re.findall(r'"(.*?)"', macro)) for macro in macros)
    return {name: rest for name, rest in (schema.split("(", 1) for schema in schemas)}


def _with_own(name: str) -> Callable[..., Any]:
    complete = getattr(plain, f"complete_{name}")
    return lambda *arguments: complete(getattr(torch.ops.kafops, name).default, *arguments)


for _name, _rest in _schemas().items():
    _library.define(f"plain_{_name}({_rest}")
    _library.impl(f"plain_{_name}", _with_own(_name), "CompositeExplicitAutograd")
