"""Builds kafops._C, the CPU kernels. Everything else is in pyproject.toml.

KAFOPS_BUILD_CPU=0 leaves the kernels out; so does a machine without a C++ compiler. The package then computes through
the plain PyTorch reference, and says so when it is first used.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("ops", "portable", "avx2", "avx512")]


def why_no_kernels() -> str | None:
    if os.environ.get("KAFOPS_BUILD_CPU") == "0":
        return "KAFOPS_BUILD_CPU=0"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment (use pip install --no-build-isolation)"
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None and shutil.which("g++") is None:
        return f"no C++ compiler was found (looked for {compiler} and g++)"
    return None


def extension_arguments() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-O3", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-g0"]
    flags += ["-Wno-maybe-uninitialized", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += os.environ.get("KAFOPS_CXX_FLAGS", "").split()
    extension = CppExtension(
        "kafops._C",
        SOURCES,
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in (".h", ".inl")],
        extra_compile_args=flags,
        extra_link_args=os.environ.get("KAFOPS_LD_FLAGS", "").split(),
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


reason = why_no_kernels()
if reason is not None:
    print(f"\nkafops: building WITHOUT compiled kernels: {reason}\n", file=sys.stderr, flush=True)
setup(**({} if reason else extension_arguments()))
