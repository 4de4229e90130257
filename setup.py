"""Builds kafops._C, the CPU kernels. Everything else is in pyproject.toml.

Without a C++ compiler the kernels are left out: the package then computes through the plain PyTorch reference, and says
so when it is first used. KAFOPS_BUILD_CPU=0 leaves them out, KAFOPS_BUILD_CPU=1 fails where they cannot be built. A
compiler that is there but fails is an error.
"""

import os
import shutil
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent
SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("ops", "portable", "avx2", "avx512")]
COMPILERS = ("c++", "g++", "clang++")


def why_no_kernels() -> str | None:
    """Say why the kernels cannot be built here, or choose the compiler and return None."""
    if os.environ.get("KAFOPS_BUILD_CPU") == "0":
        return "KAFOPS_BUILD_CPU=0"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not installed in the build environment"
    if os.environ.get("CXX"):
        return None
    found = [name for name in COMPILERS if shutil.which(name)]
    if not found:
        return f"no C++ compiler was found (looked for {', '.join(COMPILERS)}; CXX is not set)"
    os.environ["CXX"] = found[0]
    return None


def extension_arguments() -> dict:
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    flags = ["-std=c++20", "-O3", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-g0"]
    flags += [
        "-Wno-maybe-uninitialized",
        "-Wno-uninitialized",
        "-Wno-psabi",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
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


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"kafops: building needs setuptools >= 77, got {setuptools.__version__}; pip install -U setuptools")
reason = why_no_kernels()
if reason is not None:
    if os.environ.get("KAFOPS_BUILD_CPU") == "1":
        sys.exit(f"kafops: KAFOPS_BUILD_CPU=1, but {reason}")
    print(f"\nkafops: building WITHOUT compiled kernels: {reason}\n", file=sys.stderr, flush=True)
setuptools.setup(**({} if reason else extension_arguments()))
