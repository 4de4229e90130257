"""Compiles modules that tests need, kernels under the CUDA emulator among them, and keeps them in build/emulator/."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
FLAGS = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-unknown-pragmas",
]
# nvcc lets memory be read as vectors of its elements; a product and a sum are one operation only where code says so.
FLAGS += ["-fno-strict-aliasing", "-ffp-contract=off"]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]


@cache
def compiler() -> str | None:
    return next(filter(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++"))), None)


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def digest(*parts: str | Path) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        total.update(b"\0")
    return total.hexdigest()[:16]


def make(target: Path, command: list[str], depends: Path | None = None) -> str:
    """Run the command with `-o target` unless that was done with the same files in the same state; return their digest.

    The files are those that the compiler lists in `depends`, or else those in the command.
    """

    def state() -> str:
        if depends is None:
            files = [Path(word) for word in command if word.endswith(".o")]
        else:
            listed = depends.read_text().replace("\\\n", " ").split(":", 1)[1]
            files = [Path(f.replace("\\ ", " ")) for f in re.split(r"(?<!\\)\s+", listed.strip())]
        return digest(*command, *files)

    made = target.with_suffix(target.suffix + ".digest")
    try:
        if target.exists() and made.read_text() == state():
            return made.read_text()
    except FileNotFoundError:  # first time, or a header is gone
        pass
    beside = target.with_name(f"{target.name}.{os.getpid()}")  # others may be using or making the same
    run([*command, "-o", str(beside)])
    made.unlink(missing_ok=True)
    beside.replace(target)
    made.write_text(state())
    return made.read_text()


def compile_module(
    name: str, sources: list[Path], flags: list[str] = (), sanitize: bool = False, stable_torch: bool = False
) -> Path:
    """Compile the sources, as C++ whatever they are called, to a shared library `name`.so.

    flags: further ones of the compiler; sanitize: with AddressSanitizer and UBSan, to be used with
    `sanitizer_environment()`; stable_torch: against torch's stable ABI and its libraries, as kafops._C is.
    What the compiler says of an error is in the RuntimeError raised.
    """
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("no C++ compiler: looked for $CXX, c++, g++, clang++")
    package = Path(importlib.util.find_spec("torch").origin).parent  # found, but not imported: that takes seconds
    # A CPU's files in place of a GPU's are found before those in csrc/.
    here = Path(__file__).parent
    compile_flags = [*FLAGS, *flags, f"-I{here / 'include'}", f"-I{here}", f"-I{ROOT / 'csrc'}"]
    for folder in (package / "include", package / "include/torch/csrc/api/include", sysconfig.get_paths()["include"]):
        compile_flags += ["-isystem", str(folder)]
    link_flags = ["-shared"]
    if stable_torch:
        compile_flags.append("-DTORCH_TARGET_VERSION=0x020a000000000000")
        link_flags += [f"-L{package / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if sanitize:
        compile_flags += [*SANITIZERS, "-fno-omit-frame-pointer", "-O1"]
        link_flags += SANITIZERS

    versions = (run([cxx, "--version"]), importlib.metadata.version("torch"))
    setting = digest(*versions, *compile_flags, *link_flags, *map(str, sources))
    folder = ROOT / "build" / "emulator" / f"{name}-{setting}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [folder / f"{i}-{source.stem}.o" for i, source in enumerate(sources)]

    def compile_one(source: Path, target: Path) -> None:
        depends = target.with_suffix(".d")
        make(target, [cxx, *compile_flags, "-MMD", "-MF", str(depends), "-x", "c++", "-c", str(source)], depends)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    library = folder / f"{name}.so"
    make(library, [cxx, *map(str, objects), *link_flags])
    return library


def kafops_cuda(sanitize: bool = False) -> Path:
    """Compile the CUDA kernels, with their operators as those of a library kafops_emulated, for CPU tensors."""
    cuda = ROOT / "csrc" / "cuda"
    sources = [cuda / "ops.cpp", *sorted(cuda.glob("*.cu")), Path(__file__).with_name("library.cpp")]
    flags = ['-DKAFOPS_CUDA_ARCHITECTURES="emulated"']
    return compile_module("kafops_cuda", sources, flags, sanitize, stable_torch=True)


def load(library: Path) -> ModuleType:
    """Import a module of Python that `compile_module` made."""
    spec = importlib.util.spec_from_file_location(library.stem, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python, which is not built with sanitizers, can load a module that is.

    Their libraries come first, and libstdc++ with them, for the exceptions that pass through.
    """
    found = [run([compiler(), f"-print-file-name=lib{name}.so"]).strip() for name in ("asan", "ubsan", "stdc++")]
    missing = [path for path in found if not os.path.isabs(path)]
    if missing:
        raise RuntimeError(f"{compiler()} has no {', '.join(missing)}")
    return os.environ | {
        "LD_PRELOAD": " ".join(map(os.path.realpath, found)),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
    }
