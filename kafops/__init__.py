"""Fused kernel activation functions (KAF) for PyTorch."""

from kafops import ops as ops  # defines the schemas before any backend registers kernels for them
from kafops import backends, reference
from kafops.functional import kaf, kaf_free

__version__ = "0.1.0"

__all__ = ["backends", "kaf", "kaf_free", "reference"]
