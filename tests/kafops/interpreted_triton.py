"""A plugin for pytest: the Triton kernels, run on the CPU by Triton's interpreter, compute in the place of the others.

pytest -p interpreted_triton tests/kafops/test_kernels.py

KAFOPS_INTERPRETER_TABLES=1 has tables of curves made where the cases are too small to be worth them, for up to 200
terms: a program for each channel takes the interpreter long.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
os.environ["KAFOPS_BACKEND"] = "triton"

import triton_interpreter

triton_interpreter.exact_fma()
triton_interpreter.patch_once()

if os.environ.get("KAFOPS_INTERPRETER_TABLES") == "1":
    from kafops.backends import triton

    triton.worth = lambda workspace, call, curves: call.C * call.D <= 200
