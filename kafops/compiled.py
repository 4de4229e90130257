"""Placeholder until the library of CPU kernels defines the operators itself: the schemas are defined in Python."""

load_error: str | None = "the CPU kernels are of an earlier version"
