"""Compiles all GPU kernels for all architectures, without a GPU, and disassembles them.

Results are kept in build/gpu-static under a hash of what they were made from.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "gpu-static"
_FORMAT = 3  # of what is kept; to be raised where Binary, or how it is read, changes
_LOG = "compilers.log"
_READERS = ("nvdisasm", "cuobjdump", "c++filt")
DTYPES = ("float32", "bfloat16", "float16", "float64")
CUDA_SOURCES = ROOT / "csrc" / "cuda"
NVIDIA = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx942",)
PROTOTYPES = ROOT / "bench" / "prototypes"
NVCC_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr")  # as setup.py
_WITH_RESERVED = ("sm_90", "sm_100", "sm_120")  # where cuobjdump adds the system's own kilobyte to a kernel's
_FOLDERS = {"cuda": CUDA_SOURCES, "prototype": PROTOTYPES}  # the others are Triton's
BACKENDS = (*_FOLDERS, "triton")


class CannotProve(Exception):
    """A compiler or another tool is missing or fails."""


@dataclass(frozen=True)
class Job:
    """One run of a compiler: a .cu file, or the Triton kernels of a dtype, for one architecture."""

    backend: str  # "cuda" | "prototype" | "triton"
    source: str  # path from the root | dtype
    architecture: str

    def __str__(self) -> str:
        return f"{self.backend} {self.source} {self.architecture}"


@dataclass
class Binary:
    """A compiled kernel: what it needs, and its assembly."""

    backend: str
    architecture: str
    name: str  # demangled
    symbol: str
    registers: int
    spills: dict[str, int]  # what should be 0 and is not
    shared: int  # bytes, static
    threads: int  # of a block
    assembly: str
    narrow: str = ""  # what is wrong with its accesses, of Triton's kernels


def jobs(backends: Iterable[str], architectures: Iterable[str]) -> list[Job]:
    """List the runs that compile everything."""
    architectures, found = tuple(architectures), []
    for backend in backends:
        if folder := _FOLDERS.get(backend):
            sources = [str(s.relative_to(ROOT)) for s in sorted(folder.glob("*.cu"))]
            if not sources:
                raise CannotProve(f"there is no .cu file in {folder}")
            found += [Job(backend, s, a) for a in architectures if a in NVIDIA for s in sources]
        else:
            found += [Job(backend, dtype, a) for a in architectures for dtype in DTYPES]
    return found


def tool(name: str) -> str:
    """Find a program of the CUDA toolkit, on PATH or in Triton's wheel."""
    found = shutil.which(name)
    if not found:
        try:
            import triton.backends.nvidia as nvidia
        except ImportError:
            raise CannotProve(f"{name} is neither on PATH nor, as triton cannot be imported, in its wheel") from None
        found = shutil.which(name, path=str(Path(next(iter(nvidia.__path__))) / "bin"))
    if not found:
        raise CannotProve(f"{name} is neither on PATH nor in Triton's wheel")
    return found


def has_tools() -> bool:
    """Whether CUDA C++ can be compiled and disassembled."""
    try:
        return all(map(tool, ("nvcc", *_READERS)))
    except CannotProve:
        return False


def run(*command: str | Path, **options: Any) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise CannotProve(f"{Path(command[0]).name} failed: {' '.join(map(str, command))}\n{done.stderr[-2000:]}")
    return done.stdout


def compile_all(work: list[Job], report: Callable[[str], None], workers: int = 2) -> list[Binary]:
    """Compile what is not in the cache; the order of the result is that of the jobs.

    Raises:
        CannotProve: with all that failed.
    """
    results: dict[Job, list[Binary]] = {}
    failed: list[str] = []
    if any(job.backend in _FOLDERS for job in work):
        tool("nvcc")
    for name in _READERS:
        tool(name)
    CACHE.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_prepare_worker) as pool:
        waiting = {pool.submit(compile_one, job): job for job in work}
        try:
            for number, done in enumerate(as_completed(waiting), start=1):
                job = waiting[done]
                try:
                    results[job], kept = done.result()
                    line = f"{len(results[job])} kernels{' (kept)' if kept else ''}"
                except CannotProve as error:
                    failed.append(str(error))
                    line = "failed"
                report(f"[{number}/{len(work)}] {job}: {line}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        raise CannotProve("\n".join(failed))
    return [binary for job in work for binary in results[job]]


def _prepare_worker() -> None:
    """Have Triton compile; and what LLVM prints, which is long, go to a file."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    with (CACHE / _LOG).open("a") as log:
        os.dup2(log.fileno(), 2)


def compile_one(job: Job) -> tuple[list[Binary], bool]:
    """Do one job, or read what it gave before; and say whether it was read."""
    kept = CACHE / f"{_digest(job)}.json"
    if kept.exists():
        return [Binary(**fields) for fields in json.loads(kept.read_text())], True
    CACHE.mkdir(parents=True, exist_ok=True)
    binaries = list((_cuda if job.backend in _FOLDERS else _triton)(job))
    part = kept.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps([asdict(b) for b in binaries]))
    part.replace(kept)
    return binaries, False


def _digest(job: Job) -> str:
    h = hashlib.sha256(repr((job, NVCC_FLAGS, _FORMAT)).encode())
    if job.backend in _FOLDERS:
        h.update(run(tool("nvcc"), "--version").encode())
        folder = PROTOTYPES if job.backend == "prototype" else ROOT / "csrc"
        sources = sorted(p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".h"))
    else:
        import triton

        h.update(triton.__version__.encode())
        sources = sorted((ROOT / "kafops" / "backends" / "triton").glob("*.py"))
    for source in sources:
        h.update(source.read_bytes())
    return h.hexdigest()[:24]


def _cuda(job: Job) -> Iterator[Binary]:
    cubin = CACHE / f"{_digest(job)}.cubin"
    command = ("-cubin", f"-arch={job.architecture}", *NVCC_FLAGS, f"-I{ROOT / 'csrc'}")
    run(tool("nvcc"), *command, ROOT / job.source, "-o", cubin)
    yield from inspect(cubin, job.backend, job.architecture)


def inspect(cubin: Path, backend: str, architecture: str, threads: int | None = None) -> Iterator[Binary]:
    """Read the kernels of a cubin file."""
    sections = re.split(r"^//-+ \.text\.(\S+)\s+-+$", run(tool("nvdisasm"), "-c", cubin), flags=re.MULTILINE)
    assembly = dict(zip(sections[1::2], sections[2::2], strict=True))
    usage = run(tool("cuobjdump"), "--dump-resource-usage", cubin)
    blocks = _threads(run(tool("cuobjdump"), "-elf", cubin))
    found = re.findall(r"Function (\S+):\s+((?:\w+(?:\[\d\])?:\d+ ?)+)", usage)
    names = run(tool("c++filt"), *(symbol for symbol, _ in found)).splitlines() if found else []
    for (symbol, line), name in zip(found, names, strict=True):
        use = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", line)}
        spills = {
            "bytes of stack": use["STACK"],
            "bytes of local memory": use["LOCAL"],
            "accesses of local memory": len(re.findall(r"\b(?:LDL|STL)\b", assembly[symbol])),
        }
        yield Binary(
            backend,
            architecture,
            name,
            symbol,
            registers=use["REG"],
            spills={kind: n for kind, n in spills.items() if n},
            shared=max(use["SHARED"] - (1024 if architecture in _WITH_RESERVED else 0), 0),
            threads=threads or blocks.get(symbol, 0),
            assembly=assembly[symbol],
        )


def _threads(elf: str) -> dict[str, int]:
    """Return the block sizes that kernels are bound to, from what `cuobjdump -elf` prints."""
    blocks = {}
    for section in re.split(r"^\.nv\.info\.", elf, flags=re.MULTILINE)[1:]:
        if bound := re.search(r"EIATTR_(?:MAX_THREADS|REQNTID)\s+Format:\s+\w+\s+Value:\s+(\w+)", section):
            blocks[section.split(maxsplit=1)[0]] = int(bound[1], 16)
    return blocks


def inspect_amd(assembly: str, architecture: str, name: str, wide: bool) -> Binary:
    """Read a kernel from AMD assembly; `wide`: accesses of 128 bits are due."""

    def number(field: str) -> int:
        return int(re.findall(rf"^\s*\.{field}:\s+(\d+)", assembly, flags=re.MULTILINE)[-1])

    # Scalar registers spill to lanes of vector registers: that costs no memory unless it shows in one of these.
    spills = {
        "vector registers spilled": number("vgpr_spill_count"),
        "bytes of private memory": number("private_segment_fixed_size"),
    }
    return Binary(
        "triton",
        architecture,
        name,
        name,
        registers=number("vgpr_count"),
        spills={kind: n for kind, n in spills.items() if n},
        shared=number("group_segment_fixed_size"),
        threads=number("max_flat_workgroup_size"),
        assembly=assembly,
        narrow=_narrow(assembly, r"\b(global|buffer)_{}_dwordx4\b", ("load", "store")) if wide else "",
    )


def _narrow(assembly: str, access: str, kinds: tuple[str, str]) -> str:
    """Say which accesses of 128 bits are missing."""
    names = zip(("load", "store"), kinds, strict=True)
    missing = [name for name, kind in names if not re.search(access.format(kind), assembly)]
    return f"no {' or '.join(missing)} of 128 bits" if missing else ""


def _triton(job: Job) -> Iterator[Binary]:
    try:
        import torch
        import triton
        from triton.backends.compiler import GPUTarget

        from kafops.backends.triton import ahead_of_time
    except ImportError as error:
        raise CannotProve(f"Triton's kernels cannot be compiled: {error}") from None
    amd = job.architecture in AMD
    number = job.architecture.removeprefix("sm_")
    target = GPUTarget("hip", job.architecture, 64) if amd else GPUTarget("cuda", int(number), 32)
    dtype = getattr(torch, job.source)
    for c in ahead_of_time(dtype, "hip" if amd else number):
        name = f"{c.name}, {job.source}"
        source = triton.compiler.ASTSource(c.kernel, c.signature, c.constexprs, c.attrs)
        try:
            compiled = triton.compile(source, target=target, options=c.options)
        except Exception as error:
            message = f"Triton does not compile {name}, {job.architecture}: {error} (see {CACHE / _LOG})"
            raise CannotProve(message) from error
        wide = "contiguous" in c.name and c.vector * dtype.itemsize == 16
        if amd:
            yield inspect_amd(compiled.asm["amdgcn"], job.architecture, name, wide)
        else:
            cubin = CACHE / f"{_digest(job)}.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            for binary in inspect(cubin, "triton", job.architecture, c.threads):
                narrow = _narrow(binary.assembly, r"\b{}\.\S*128\b", ("LDG", "STG")) if wide else ""
                yield replace(binary, name=name, narrow=narrow)
