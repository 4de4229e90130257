"""The Triton kernels' launch code: tensors to geometry, geometry to launches. The first call imports triton."""

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kafops import plain
from kafops.backends import gpus
from kafops.backends.record import OPERATORS, Backend
from kafops.backends.triton.geometry import SUMS, Geometry, Tiling, geometry
from kafops.ops import Needs
from kafops.torch_private import assumed_constant, unregister

interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
load_error: str | None = None
if importlib.util.find_spec("triton") is None:
    load_error = "the package triton is not installed"


@functools.cache
def _kernels() -> Any:
    from kafops.backends.triton import kernels

    return kernels


@assumed_constant
def unfit(device_type: str) -> str | None:
    """Say why the Triton kernels cannot serve this machine's devices, or return None. Its interpreter serves all."""
    if interpreted:
        return None
    if device_type != "cuda":
        return f"the Triton kernels serve {device_type.upper()} tensors only where TRITON_INTERPRET=1 interprets them"
    return gpus.too_old()


def activate(device_type: str) -> torch.library.Library:
    """Put the functions below before whatever serves the operators on a device type, as long as the library lives."""
    library = torch.library.Library("kafops", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators|.*[Oo]verriding a previously")
            for name in OPERATORS:
                library.impl(name, globals()[name], device_type.upper(), allow_override=True)
    except BaseException:
        unregister(library)
        raise
    return library


BACKEND = Backend(
    name="triton",
    title="Triton kernels",
    devices=frozenset({"cpu", "cuda"}),
    default_devices=frozenset({"cuda"}),
    kernels=frozenset({"gaussian"}),
    operators=OPERATORS,
    describe=lambda device_type: "Triton kernels" + (", run by Triton's interpreter" if interpreted else ""),
    load_error=lambda: load_error,
    unfit=unfit,
    activate=activate,
)

# ------------------------------------------------------------------------------------------------------- operators


def kaf(
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    kernel: int = 0,
    base: int = 0,
    n: int = 0,
    m: int = 0,
) -> Tensor:
    """Compute the operator `kaf` of kafops/schemas.inc."""
    if kernel or base or n or m:
        return plain.complete_kaf(kaf, x, alpha, gamma, dictionary, boundary, kernel, base, n, m)
    call = _Call("kaf", x, alpha, gamma, dictionary, boundary)
    y = torch.empty_like(x)
    if x.numel() > 0:
        call.launch(_kernels().kaf_kernel, {"y_ptr": y}, call.fast(True))
    return y


def kaf_backward(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    needs: int,
    kernel: int = 0,
    base: int = 0,
    n: int = 0,
    m: int = 0,
) -> tuple[Tensor, ...]:
    """Compute the operator `kaf_backward` of kafops/schemas.inc."""
    if kernel or base or n or m:
        arguments = (grad, x, alpha, gamma, dictionary, boundary, needs, kernel, base, n, m)
        return plain.complete_kaf_backward(kaf_backward, *arguments)
    call = _Call("kaf_backward", x, alpha, gamma, dictionary, boundary, grad=grad)
    dx = torch.empty_like(x) if needs & Needs.X else None
    sums = _Sums(call, needs)
    if call.has_work(needs):
        options = call.fast(not needs & Needs.GAMMA) | call.folds()
        windows = -(-call.D // 20) if options["FAST"] and needs & Needs.ALPHA else 1
        call.launch(_kernels().kaf_backward_kernel, {"dx_ptr": dx, **sums.partial}, options, windows)
    dalpha, dgamma, ddictionary = sums.add()
    return _or_empty(dx, x), dalpha, dgamma, ddictionary


def kaf_double_backward(
    v_x: Tensor | None,
    v_alpha: Tensor | None,
    v_gamma: Tensor | None,
    v_dictionary: Tensor | None,
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    dictionary: Tensor | None,
    boundary: float,
    needs: int,
    base: int = 0,
) -> tuple[Tensor, ...]:
    """Compute the operator `kaf_double_backward` of kafops/schemas.inc."""
    if base:
        v = (v_x, v_alpha, v_gamma, v_dictionary)
        arguments = (*v, grad, x, alpha, gamma, dictionary, boundary, needs, base)
        return plain.complete_kaf_double_backward(kaf_double_backward, *arguments)
    call = _Call("kaf_double_backward", x, alpha, gamma, dictionary, boundary, grad=grad, v_x=v_x)
    dgrad = torch.empty_like(x) if needs & Needs.GRAD else None
    dx = torch.empty_like(x) if needs & Needs.X else None
    sums = _Sums(call, needs)
    if call.has_work(needs):
        v_parameters = {"v_alpha_ptr": v_alpha, "v_gamma_ptr": v_gamma, "v_dictionary_ptr": v_dictionary}
        pointers = {name: None if t is None else t.contiguous() for name, t in v_parameters.items()}
        pointers |= {"dgrad_ptr": dgrad, "dx_ptr": dx, **sums.partial}
        call.launch(_kernels().kaf_double_backward_kernel, pointers, {})
    dalpha, dgamma, ddictionary = sums.add()
    return _or_empty(dgrad, x), _or_empty(dx, x), dalpha, dgamma, ddictionary


class _Call:
    """What the operators share: arguments made ready, and the launch."""

    def __init__(
        self,
        operator: str,
        x: Tensor,
        alpha: Tensor,
        gamma: Tensor,
        dictionary: Tensor | None,
        boundary: float,
        **data: Tensor | None,
    ) -> None:
        self.operator, self.boundary, self.D = operator, boundary, alpha.shape[1]
        self.strides = torch.empty_like(x, device="meta").stride()  # dense, and those of the output
        self.x = self._in_layout(x)
        self.data = {n: None if t is None else self._in_layout(t) for n, t in data.items()}
        # Small; contiguous, so that the kernels have one stride to know.
        self.alpha, self.gamma = alpha.contiguous(), gamma.contiguous()
        self.dictionary = None if dictionary is None else dictionary.contiguous()
        rows = [len(p) for p in (alpha, gamma, dictionary) if p is not None]
        self.C = 1 if all(n == 1 for n in rows) else x.shape[1]

    def _in_layout(self, t: Tensor) -> Tensor:
        """Return t with the strides of the output, a copy where it has others."""
        if all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), self.strides, strict=True)):
            return t
        return torch.empty_strided(t.shape, self.strides, dtype=t.dtype, device=t.device).copy_(t)

    @functools.cached_property
    def geometry(self) -> Geometry:
        n = self.x.numel()
        L = n if self.C == 1 else self.strides[1]
        aligned = all(t is None or t.data_ptr() % 16 == 0 for t in (self.x, *self.data.values()))
        size = self.x.element_size()
        return geometry(self.operator, _architecture(self.x.device), n // (self.C * L), self.C, L, size, aligned)

    def has_work(self, needs: int) -> bool:
        if self.dictionary is None:
            needs &= ~Needs.DICTIONARY
        return needs != 0 and self.x.numel() > 0

    def fast(self, allowed: bool) -> dict[str, Any]:
        """Constants that say whether a kernel may take its FAST path, and how."""
        fast = allowed and self.dictionary is None and self.x.dtype != torch.float64 and self.D > 1
        return {"FAST": fast, "GROUPS": min(4, -(-self.D // 5)) if fast else 1, "MANY": fast and self.D > 20}

    def folds(self) -> dict[str, int]:
        """Constants that say which elements of a tile a thread holds."""
        g = self.geometry
        vector = min(g.ALIGN, g.W)
        return {"VECTOR": vector, "WRAPS": min(g.R, max(1, g.R * g.W // (vector * g.tiling.threads)))}

    def launch(self, kernel: Any, pointers: dict[str, Any], constants: dict[str, Any], windows: int = 1) -> None:
        """Launch a kernel with the arguments that all have, and some of its own, once for each window of points."""

        def row(p: Tensor | None) -> int:
            return 0 if p is None or len(p) == 1 else p.stride(0)

        g = self.geometry
        step = 2 * self.boundary / max(self.D - 1, 1)
        arguments = {
            "x_ptr": self.x, "alpha_ptr": self.alpha, "gamma_ptr": self.gamma, "dictionary_ptr": self.dictionary,
            "boundary": self.boundary, "step": step, "inverse_step": 1 / step if step else 0.0, "D": self.D,
            "alpha_row": row(self.alpha), "gamma_row": row(self.gamma), "dictionary_row": row(self.dictionary),
        }  # fmt: skip
        arguments |= {f"{name}_ptr": t for name, t in self.data.items()}
        arguments |= pointers | g.integers | g.constants | constants
        _launch(self.x.device, kernel, (g.programs, windows), g.tiling, arguments, g.R * g.W)


class _Sums:
    """Sums over elements: room for what each program has of them, and their addition."""

    def __init__(self, call: _Call, needs: int) -> None:
        self.call = call
        named = {"alpha": call.alpha, "gamma": call.gamma, "dictionary": call.dictionary}
        flags = (Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY)
        self.wanted = {n: p if needs & flag else None for (n, p), flag in zip(named.items(), flags, strict=True)}
        self.partial: dict[str, Tensor | None] = {f"{name}_sums_ptr": self._room(p) for name, p in self.wanted.items()}

    def _room(self, p: Tensor | None) -> Tensor | None:
        x = self.call.x
        if p is None or x.numel() == 0:
            return None
        shape = (*self.call.geometry.partial_sums, *p.shape[1:])
        return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))

    def add(self) -> list[Tensor]:
        """Return the gradients of alpha, gamma and dictionary; those not wanted are empty."""
        x, results = self.call.x, []
        for p, partial in zip(self.wanted.values(), self.partial.values(), strict=True):
            if p is None or partial is None:
                results.append(x.new_empty(0) if p is None else p.new_zeros(p.shape))
                continue
            result = p.new_empty(p.shape)
            rows, K = len(p), p.numel() // len(p)
            chunks, columns = partial.shape[:2]
            if rows == 1:  # all columns are its, and might as well be chunks
                chunks, columns = chunks * columns, 1
            each = columns // rows
            (outer, outer_stride), (inner, inner_stride) = sorted([(chunks, columns), (each, 1)])
            block_k = 1 if K == 1 else 8
            arguments = {
                "sums_ptr": partial, "result_ptr": result, "outer": outer, "outer_stride": outer_stride,
                "inner": inner, "inner_stride": inner_stride, "each": each, "K": K,
                "BLOCK_N": 1024 // block_k, "BLOCK_K": block_k,
            }  # fmt: skip
            _launch(x.device, _kernels().add_partial_sums_kernel, (rows, -(-K // block_k)), SUMS, arguments, 1024)
            results.append(result)
        return results


def _or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if t is None else t


# -------------------------------------------------------------------------------------------------------- launches


def _launch(
    device: torch.device, kernel: Any, grid: tuple[int, int], tiling: Tiling, arguments: dict[str, Any], tile: int
) -> None:
    """Launch a kernel; note the call, where it is recorded, with the elements of a tile."""
    if device.type == "meta":
        _recorder.get().launches.append((kernel, tiling, arguments, tile))
        return
    warp = 64 if torch.version.hip else 32
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](**arguments, **tiling.options(warp))


def _architecture(device: torch.device) -> str:
    if device.type == "meta":
        return _recorder.get().architecture
    return "interpreted" if interpreted else _architecture_of_gpu(device)


@functools.cache
def _architecture_of_gpu(device: torch.device) -> str:
    return "hip" if torch.version.hip else "{}{}".format(*torch.cuda.get_device_capability(device))


@dataclass
class _Recorder:
    architecture: str
    launches: list[tuple[Any, Tiling, dict[str, Any], int]] = field(default_factory=list)


_recorder: ContextVar[_Recorder] = ContextVar("recorder")  # what launches on meta tensors do instead


@dataclass(frozen=True)
class Compilation:
    """What triton.compile needs to compile a kernel as a launch would: see `ahead_of_time`.

    Attributes:
        name: the operator, the layout of x and what else tells it from others, as "kaf_backward channels_last".
        kernel, signature, constexprs, attrs: arguments of triton.compiler.ASTSource, in this order.
        options: of triton.compile.
        threads: of a program.
        elements: of x that a thread deals with in one turn of the kernel's outermost loop that loads x.
        vector: how many neighbours a thread loads at once.
        fast: whether the kernel has the FAST path, whose loop is the one that counts.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    threads: int
    elements: float
    vector: int
    fast: bool


def ahead_of_time(dtype: torch.dtype, architecture: str = "90") -> list[Compilation]:
    """List what is to be compiled for x of a dtype, as it would be for the calls below. No GPU is needed.

    Forward, backward (of x and alpha) and double backward (v_x given; of grad, x and alpha), for x [128, 64, 32, 32]
    contiguous and channels_last, D = 20; contiguous only, also D = 64, a free dictionary, and a gamma that is trained.

    Args:
        dtype: of x: torch.float32, bfloat16, float16 or float64.
        architecture: "hip", or a CUDA compute capability such as "90".

    Example, without TRITON_INTERPRET in the environment:
        >>> for c in ahead_of_time(torch.float32):
        ...     source = ASTSource(c.kernel, c.signature, c.constexprs, c.attrs)
        ...     compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=c.options)

    The target of "hip" is GPUTarget("hip", "gfx942", 64).
    """
    return list(_compilations(dtype, architecture))


def _compilations(dtype: torch.dtype, architecture: str) -> Iterator[Compilation]:
    x = torch.empty(128, 64, 32, 32, dtype=dtype, device="meta")
    layouts = {"contiguous": x, "channels_last": x.to(memory_format=torch.channels_last)}
    alpha, gamma = torch.empty(64, 20, device="meta"), torch.empty(64, device="meta")
    wide = torch.empty(64, 64, device="meta")
    X, ALPHA, GAMMA, GRAD = Needs.X, Needs.ALPHA, Needs.GAMMA, Needs.GRAD
    calls: list[tuple[str, Any, tuple[Any, ...]]] = []
    for layout, t in layouts.items():
        p = (t, alpha, gamma, None, 3.0)
        calls.append((f"kaf {layout}", kaf, p))
        calls.append((f"kaf_backward {layout}", kaf_backward, (t, *p, X | ALPHA)))
        calls.append((f"kaf_double_backward {layout}", kaf_double_backward, (t, *[None] * 3, t, *p, GRAD | X | ALPHA)))
    calls.append(("kaf contiguous D=64", kaf, (x, wide, gamma, None, 3.0)))
    calls.append(("kaf_backward contiguous D=64", kaf_backward, (x, x, wide, gamma, None, 3.0, X | ALPHA)))
    calls.append(("kaf contiguous free", kaf, (x, alpha, gamma, alpha, 0.0)))
    calls.append(("kaf_backward contiguous free", kaf_backward, (x, x, alpha, gamma, alpha, 0.0, 15)))
    calls.append(("kaf_backward contiguous gamma", kaf_backward, (x, x, alpha, gamma, None, 3.0, X | ALPHA | GAMMA)))
    sums = False
    for name, function, arguments in calls:
        recorder = _Recorder(architecture)
        token = _recorder.set(recorder)
        try:
            function(*arguments)
        finally:
            _recorder.reset(token)
        yield _compilation(name, architecture, *recorder.launches[0])
        if len(recorder.launches) > 1 and not sums:
            sums = True
            yield _compilation("add_partial_sums", architecture, *recorder.launches[1])


def _compilation(
    name: str, architecture: str, kernel: Any, tiling: Tiling, arguments: dict[str, Any], tile: int
) -> Compilation:
    types = {
        torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"
    }  # fmt: skip
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constexprs[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = types[value.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp64" if isinstance(value, float) else "i32"
    return Compilation(
        name, kernel, signature, constexprs, attrs,
        options=tiling.options(64 if architecture == "hip" else 32),
        threads=tiling.threads,
        elements=tile / tiling.threads,
        vector=arguments.get("ALIGN", 1),
        fast=bool(arguments.get("FAST")),
    )  # fmt: skip
