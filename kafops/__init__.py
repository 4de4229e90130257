"""Fused kernel activation functions (KAF) for PyTorch."""

import importlib
from typing import Any

from kafops import ops as ops  # defines the schemas before any backend registers kernels for them

# isort: split
from kafops import backends, bases, bounds, init, kernels, reference
from kafops.backends import backend
from kafops.calibration import Calibration, CalibrationReport, calibrate
from kafops.compiled import library
from kafops.conventions import CONVENTIONS, convention
from kafops.convert import replace_activations
from kafops.decomposition import decompositions
from kafops.functional import kaf, kaf_free
from kafops.modules import KAF, KAF1d, KAF2d, KAF3d, LazyKAF, LazyKAF1d, LazyKAF2d, LazyKAF3d
from kafops.optimizers import curve_parameters, param_groups
from kafops.plotting import plot
from kafops.replacements import Replacement, ReplacementReport
from kafops.states import Loaded, load_state_dict
from kafops.watching import watch

__version__ = "0.2.0"

__all__ = [
    "CONVENTIONS",
    "KAF",
    "Calibration",
    "CalibrationReport",
    "KAF1d",
    "KAF2d",
    "KAF3d",
    "LazyKAF",
    "LazyKAF1d",
    "LazyKAF2d",
    "LazyKAF3d",
    "Loaded",
    "Replacement",
    "ReplacementReport",
    "backend",
    "backends",
    "bases",
    "bounds",
    "calibrate",
    "check",
    "convention",
    "curve_parameters",
    "decompositions",
    "init",
    "kaf",
    "kaf_free",
    "kernels",
    "library",
    "load_state_dict",
    "param_groups",
    "plot",
    "reference",
    "replace_activations",
    "watch",
]


def __getattr__(name: str) -> Any:
    """Import `kafops.check`, which is a command too, when it is asked for."""
    if name == "check":
        return importlib.import_module("kafops.check")
    raise AttributeError(f"module 'kafops' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return what is public, without the modules that it is made of."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
