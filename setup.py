"""Builds kafops/_C*.so, the CPU kernels, and kafops._C_cuda, the CUDA kernels; the rest is in pyproject.toml.

The first is a library for torch.ops.load_library, which knows nothing of Python, the second a module. Either is left
out where this machine lacks what it needs (a C++ compiler; nvcc and a CUDA build of torch, but no GPU): the package
then computes through other kernels or the plain PyTorch reference, and says so when it is first used.
KAFOPS_BUILD_CPU=0 and KAFOPS_BUILD_CUDA=0 leave one out, =1 fails where it cannot be built. A compiler that is there
but fails is an error. TORCH_CUDA_ARCH_LIST says which GPUs are built for. A wheel that lacks something says so in its
build tag, which pip shows, as it shows nothing else of a build that succeeds.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent
INSTRUCTION_SETS = re.findall(r"\bX\((\w+),", Path(ROOT, "csrc/cpu/isa.h").read_text(encoding="utf-8"))
CPU_SOURCES = [f"csrc/cpu/{name}.cpp" for name in ("ops", *INSTRUCTION_SETS)]
CUDA_SOURCES = ["csrc/cuda/ops.cpp"]
CUDA_SOURCES += [f"csrc/cuda/{name}.cu" for name in ("launch", "float32", "float64", "bfloat16", "float16")]
COMPILERS = ("c++", "g++", "clang++")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")  # and PTX of the last
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
WARNINGS = ["-Wall", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]
OPTIONS = ["-std=c++20", "-O3"]


def why_no_cpu_kernels() -> str | None:
    """Say why the CPU kernels cannot be built here, or choose the compiler and return None."""
    if os.environ.get("KAFOPS_BUILD_CPU") == "0":
        return "KAFOPS_BUILD_CPU=0"
    return why_no_compiler()


def why_no_cuda_kernels() -> str | None:
    """Say why the CUDA kernels cannot be built here, or choose the compilers and return None."""
    if os.environ.get("KAFOPS_BUILD_CUDA") == "0":
        return "KAFOPS_BUILD_CUDA=0"
    reason = why_no_compiler()
    if reason is not None:
        return reason
    import torch

    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, was built without CUDA"
    nvcc = shutil.which("nvcc")
    # torch takes nvcc's folder for the toolkit's, also where nvcc is a link.
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    found = [home for home in homes if home and all(Path(home, f).exists() for f in ("bin/nvcc", "include/cuda.h"))]
    if not found:
        return "no CUDA toolkit was found (bin/nvcc and include/cuda.h at CUDA_HOME, beside nvcc or in /usr/local/cuda)"
    os.environ["CUDA_HOME"] = str(found[0])
    return None


def why_no_compiler() -> str | None:
    """Say why no C++ can be compiled against torch, or choose the compiler and return None."""
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


def extension(kind: type, name: str, sources: list[str], flags: object) -> setuptools.Extension:
    suffixes = (".h", ".inl", ".cuh")
    return kind(
        name,
        sources,
        depends=[
            "kafops/schemas.inc",
            *(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.suffix in suffixes),
        ],
        extra_compile_args=flags,
        extra_link_args=os.environ.get("KAFOPS_LD_FLAGS", "").split(),
        py_limited_api=True,
    )


def cpu_extension() -> setuptools.Extension:
    from torch.utils.cpp_extension import CppExtension

    # Compilers do not vectorise a choice between two values while they think that computing either could trap.
    flags = [*OPTIONS, *WARNINGS, "-fno-trapping-math", "-fvisibility=hidden", "-g0", STABLE_ABI]
    return extension(CppExtension, "kafops._C", CPU_SOURCES, flags + os.environ.get("KAFOPS_CXX_FLAGS", "").split())


def cuda_extension() -> setuptools.Extension:
    from torch.utils.cpp_extension import CUDAExtension

    built = choose_architectures()
    common = [*OPTIONS, STABLE_ABI, "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    flags = {
        "cxx": [*common, *WARNINGS, "-fvisibility=hidden", "-g0", f'-DKAFOPS_CUDA_ARCHITECTURES="{built}"'],
        "nvcc": [*common, "-Xcompiler=-fvisibility=hidden", "--threads=2"],
    }
    # A third of the bytes of the default mode. nvcc 12.8 was the first to have it.
    if "--compress-mode" in nvcc("--help"):
        flags["nvcc"].append("--compress-mode=size")
    return extension(CUDAExtension, "kafops._C_cuda", CUDA_SOURCES, flags)


def nvcc(option: str) -> str:
    """Return what torch's nvcc prints for an option."""
    from torch.utils.cpp_extension import CUDA_HOME

    command = [Path(CUDA_HOME, "bin", "nvcc"), option]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def choose_architectures() -> str:
    """Return the compute capabilities that torch's nvcc flags stand for, as "8.0 9.0 12.0+PTX".

    Without TORCH_CUDA_ARCH_LIST torch would build for the GPUs that are there, and fail where there are none.
    """
    from torch.utils import cpp_extension

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        known = nvcc("--list-gpu-arch").split()
        wanted = [a for a in ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
        os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(wanted) + "+PTX"
    found: dict[str, str] = {}
    for flag in cpp_extension._get_cuda_arch_flags():
        for kind, major, minor in re.findall(r"code=\[?(sm|compute)_(\d+)(\d[af]?)", flag):
            name = f"{major}.{minor}"
            found[name] = "+PTX" if kind == "compute" else found.get(name, "")
    return " ".join(name + ptx for name, ptx in sorted(found.items(), key=lambda item: float(item[0].rstrip("af"))))


def description() -> str:
    """Return the README as a page outside the repository, where links into it lead nowhere: their text stays."""
    text = Path(ROOT, "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n+\*[^*]*\*\n+", "", text)  # a figure and its caption
    return re.sub(r"\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)


if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"kafops: building needs setuptools >= 77, got {setuptools.__version__}; pip install -U setuptools")
# Both are asked before either is made: torch reads the environment when its build tools are first imported.
reasons = {"CPU": why_no_cpu_kernels(), "CUDA": why_no_cuda_kernels()}
for which, reason in reasons.items():
    if reason is not None and os.environ.get(f"KAFOPS_BUILD_{which}") == "1":
        sys.exit(f"kafops: KAFOPS_BUILD_{which}=1, but {reason}")
    if reason is not None:
        print(f"\nkafops: building WITHOUT compiled {which} kernels: {reason}\n", file=sys.stderr, flush=True)
makers = {"CPU": cpu_extension, "CUDA": cuda_extension}
modules = [make() for which, make in makers.items() if reasons[which] is None]
lacking = "kernels" if len(modules) == 0 else "cuda" if reasons["CUDA"] else "cpu" if reasons["CPU"] else None
wheel = {"build_number": f"0_without_{lacking}"} if lacking else {}
keywords = {"long_description": description(), "long_description_content_type": "text/markdown"}
if modules:
    from torch.utils.cpp_extension import BuildExtension

    options = {"bdist_wheel": {"py_limited_api": "cp310", **wheel}}
    setuptools.setup(ext_modules=modules, cmdclass={"build_ext": BuildExtension}, options=options, **keywords)
else:
    setuptools.setup(options={"bdist_wheel": wheel}, **keywords)
