"""The Triton kernels' launch code: tensors to geometry, geometry to launches. The first call imports triton."""

import enum
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
from kafops.backends.triton import cells
from kafops.backends.triton.geometry import SUMS, TABLES, Geometry, Tiling, geometry
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
    if kernel or n or m:
        return plain.kaf(x, alpha, gamma, dictionary, boundary, kernel, base, n, m)
    call = _Call(x, alpha, gamma, dictionary, boundary)
    y = torch.empty_like(x)
    if x.numel() > 0:
        call.lay_out("kaf", y)
        call.make_tables((_Curve.VALUE,), (None, None, None))
        call.launch(_kernels().kaf_kernel, (call.x, y), (), {"BASE": base})
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
    if kernel or n or m:
        return plain.kaf_backward(grad, x, alpha, gamma, dictionary, boundary, needs, kernel, base, n, m)
    call = _Call(x, alpha, gamma, dictionary, boundary, needs)
    dx = torch.empty_like(x) if needs & Needs.X else None
    if call.has_work():
        call.lay_out("kaf_backward", dx, grad)
        by_gamma = (_Curve.BY_GAMMA,) if needs & Needs.GAMMA else ()
        call.make_tables((_Curve.SLOPE, *by_gamma), (None, None, None))
        window = 5 * min(4, -(-call.D // 5))
        call.launch_sums(_kernels().kaf_backward_kernel, (*call.data, call.x, dx), base, window)
    return _or_empty(dx, x), *call.gradients()


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
    call = _Call(x, alpha, gamma, dictionary, boundary, needs)
    dgrad = torch.empty_like(x) if needs & Needs.GRAD else None
    dx = torch.empty_like(x) if needs & Needs.X else None
    if call.has_work():
        call.lay_out("kaf_double_backward", dgrad if dx is None else dx, grad, v_x)
        directions = tuple(None if t is None else t.contiguous() for t in (v_alpha, v_gamma, v_dictionary))
        along = any(t is not None for t in directions)
        curves = [_Curve.SLOPE, _Curve.CURVATURE] + [_Curve.ALONG, _Curve.ALONG_SLOPE] * along
        if needs & Needs.GAMMA:
            curves += [_Curve.SLOPE_BY_GAMMA] + [_Curve.ALONG_BY_GAMMA] * along
        call.make_tables(tuple(curves), directions)
        g, v_of_x = call.data
        call.launch_sums(_kernels().kaf_double_backward_kernel, (v_of_x, *directions, g, call.x, dgrad, dx), base)
    return _or_empty(dgrad, x), _or_empty(dx, x), *call.gradients()


class _Curve(enum.IntEnum):
    """What a table has; as in kernels.py."""

    VALUE, SLOPE, CURVATURE, ALONG, ALONG_SLOPE, BY_GAMMA, SLOPE_BY_GAMMA, ALONG_BY_GAMMA = range(8)


class _Call:
    """What the operators share: arguments made ready, the tables, the launch, the sums over elements."""

    geometry: Geometry
    data: list[Tensor | None]  # in the layout of the output, as x is

    def __init__(
        self, x: Tensor, alpha: Tensor, gamma: Tensor, dictionary: Tensor | None, boundary: float, needs: int = 0
    ) -> None:
        self.x, self.boundary, self.D = x, boundary, alpha.shape[1]
        # Small; contiguous, so that the kernels have one stride to know.
        self.alpha, self.gamma = alpha.contiguous(), gamma.contiguous()
        self.dictionary = None if dictionary is None else dictionary.contiguous()
        self.needs = needs if dictionary is not None else needs & ~Needs.DICTIONARY
        self.flags = 0
        for bit, p in enumerate((alpha, gamma, dictionary)):
            if p is not None and p.shape[0] > 1:
                self.flags |= 1 << bit
        self.C = x.shape[1] if self.flags else 1
        self.workspace: Tensor | None = None
        self.partial: Tensor | None = None
        self.capacity = 0

    def has_work(self) -> bool:
        return self.needs != 0 and self.x.numel() > 0

    def lay_out(self, operator: str, output: Tensor | None, *data: Tensor | None) -> None:
        """Bring all that has x's shape into the layout of the output, and share that among programs."""
        x = self.x
        strides = (torch.empty_like(x, device="meta") if output is None else output).stride()
        self.x = _in_layout(x, strides)
        self.data = [None if t is None else _in_layout(t, strides) for t in data]
        aligned = self.x.data_ptr() % 16 == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in self.data)
        n = x.numel()
        L = n if self.C == 1 else strides[1]
        architecture = _architecture(x.device)
        self.geometry = geometry(operator, architecture, n // (self.C * L), self.C, L, x.element_size(), aligned)

    def make_tables(self, curves: tuple[_Curve, ...], v: tuple[Tensor | None, ...]) -> None:
        """Have tables of these curves made, where they save operations. They take at most a quarter of x's memory."""
        g, x, D = self.geometry, self.x, self.D
        self.capacity = _capacity(D)
        if x.dtype == torch.float64 or not self.capacity:
            self.capacity = 0
            return
        numbers = workspace_of(self.C, len(curves), self.capacity, g.constants["RUNS"])
        if not worth(numbers * 4, self, curves):
            # The pointer is not used; another type of pointer would be another kernel to compile.
            self.workspace = next((t for t in (self.alpha, self.gamma, x) if t.dtype == torch.float32), None)
            self.capacity = 0 if self.workspace is None else self.capacity
            return
        self.flags |= 8
        self.workspace = x.new_empty(numbers, dtype=torch.float32)
        arguments = (self.alpha, self.gamma, self.dictionary, *v, self.workspace, self.boundary, self.flags, D, self.C)
        constants = {"CURVES": tuple(map(int, curves)), "CAPACITY": self.capacity, "RUNS": g.constants["RUNS"]}
        _launch(x.device, _kernels().tables_kernel, self.C, TABLES, arguments, constants)

    def launch(
        self, kernel: Any, data: tuple[Any, ...], integers: tuple[int, ...], constants: dict[str, Any], windows: int = 1
    ) -> None:
        """Launch a kernel with its own data, integers and constants, and those that all have."""
        g = self.geometry
        arguments = (
            *data, self.alpha, self.gamma, self.dictionary, self.workspace, self.boundary, self.flags, self.D,
            *g.integers, *integers,
        )  # fmt: skip
        constants = {**g.constants, "CAPACITY": self.capacity, **constants}
        _launch(self.x.device, kernel, g.programs * windows, g.tiling, arguments, constants)

    def launch_sums(self, kernel: Any, data: tuple[Any, ...], base: int, window: int = 0) -> None:
        """Launch a kernel with sums over elements; once for each window of points, where there are windows."""
        g, D, x = self.geometry, self.D, self.x
        alpha, gamma, points = (bool(self.needs & n) for n in (Needs.ALPHA, Needs.GAMMA, Needs.DICTIONARY))
        slots = (alpha + points) * D + gamma
        if slots:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            self.partial = x.new_empty((g.chunks, g.columns, slots), dtype=dtype)
        constants = {"WRAPS": g.WRAPS, "ALPHA": alpha, "GAMMA": gamma, "DICTIONARY": points, "BASE": base}
        if not window:
            return self.launch(kernel, (*data, self.partial), (slots,), constants)
        by_powers = self.flags & 8 and alpha and not points and self.dictionary is None
        windows = -(-D // window) if by_powers else 1
        constants["WINDOW"] = window
        self.launch(kernel, (*data, self.partial), (windows, slots), constants, windows)

    def gradients(self) -> Iterator[Tensor]:
        """Yield the gradients of alpha, gamma and dictionary; those not wanted are empty."""
        wanted = ((Needs.ALPHA, self.alpha), (Needs.GAMMA, self.gamma), (Needs.DICTIONARY, self.dictionary))
        if self.partial is None:
            for need, p in wanted:
                yield self.none_of(p) if p is None or not self.needs & need else p.new_zeros(p.shape)
            return
        alone = [p for need, p in wanted if self.needs & need and p is not None]
        dtype = alone[0].dtype if len(alone) == 1 and alone[0].shape[0] == self.C else torch.float64
        total, D = _sum_of(self.partial, self.C, dtype), self.D
        points = slice(-D, None) if not self.needs & Needs.GAMMA else slice(-D - 1, -1)
        slots: dict[int, slice | int] = {Needs.ALPHA: slice(0, D), Needs.GAMMA: -1, Needs.DICTIONARY: points}
        for need, p in wanted:
            if p is None or not self.needs & need:
                yield self.none_of(p)
            elif dtype != torch.float64:
                yield total.view(p.shape)
            else:
                of_p = total[:, slots[need]]
                yield torch.empty_like(p).copy_(of_p if p.shape[0] == self.C else of_p.sum(0, keepdim=True))

    def none_of(self, p: Tensor | None) -> Tensor:
        """Return the gradient that is not wanted: of the parameter's dtype, as that would be."""
        return (self.x if p is None else p).new_empty(0)


def _in_layout(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return t with these strides, a copy where it has others."""
    if t.stride() == strides or all(n == 1 or a == b for n, a, b in zip(t.shape, t.stride(), strides, strict=True)):
        return t
    return torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device).copy_(t)


def _sum_of(partial: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[chunks, columns, slots] -> [C, slots], added in float64."""
    chunks, columns, K = partial.shape
    total = partial.new_empty((C, K), dtype=dtype)
    each = columns // C
    if C == 1:  # all columns are its, and might as well be chunks
        chunks, columns, each = chunks * columns, 1, 1
    (outer, outer_stride), (inner, inner_stride) = sorted([(chunks, columns), (each, 1)])
    block_k = 1 if K == 1 else 8
    arguments = (partial, total, outer, outer_stride, inner, inner_stride, each, K)
    constants = {"BLOCK_N": 1024 // block_k, "BLOCK_K": block_k}
    kernel = _kernels().add_partial_sums_kernel
    _launch(partial.device, kernel, C * -(-K // block_k), SUMS, arguments, constants)
    return total


@functools.cache
def _capacity(size: int) -> int:
    """Return the cells that there is room for, 0 for dictionaries without tables."""
    return cells.capacity(size) if size <= cells.POINTS else 0


def workspace_of(channels: int, curves: int, capacity: int, runs: bool) -> int:
    """Return the numbers that tables take, and what is known of cells: see `_table_of` in kernels.py."""
    padded = -(-channels // cells.ROWS) * cells.ROWS
    return padded * 8 + (channels if runs else padded) * curves * capacity * cells.COEFFICIENTS


def worth(workspace: int, call: _Call, curves: tuple[_Curve, ...]) -> bool:
    """Whether tables save operations, and take at most a quarter of x's memory.

    Instructions, counted by hand: an exponential is 8, an entry of a table 25 for each point, an element with tables
    10, and 16 for each curve; sums over even points are formed by powers, others as without tables: these save half.
    """
    x, D, n = call.x, call.D, len(curves)
    second = len(curves) > 1 and curves[1] == _Curve.CURVATURE
    sums = call.needs & (Needs.ALPHA | Needs.DICTIONARY) != 0
    powers = not second and call.dictionary is None
    of_point = (40 if second else 8) * (0.5 if sums and not powers else 1) - (3 if sums and powers else 0)
    saved = x.numel() / call.C * (of_point * D - 10 - 16 * n)
    return 4 * workspace <= x.nbytes and saved > n * call.capacity * cells.COEFFICIENTS * 25 * D


def _or_empty(t: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(0) if t is None else t


# -------------------------------------------------------------------------------------------------------- launches


def _launch(
    device: torch.device,
    kernel: Any,
    programs: int,
    tiling: Tiling,
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
) -> None:
    """Launch a kernel; note the call, where it is recorded."""
    if device.type == "meta":
        _recorder.get().launches.append((kernel, tiling, arguments, constants))
        return
    options = _options(tiling)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](*arguments, **constants, **options)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **constants, **options)


@functools.cache
def _options(tiling: Tiling) -> dict[str, int]:
    return tiling.options(64 if torch.version.hip else 32)


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
    launches: list[tuple[Any, Tiling, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


_recorder: ContextVar[_Recorder] = ContextVar("recorder")  # what launches on meta tensors do instead


@dataclass(frozen=True)
class Compilation:
    """What triton.compile needs to compile a kernel as a launch would: see `ahead_of_time`.

    Attributes:
        name: the operator, the layout of x and what else tells it from others, as "kaf_backward channels_last".
        kernel, signature, constexprs, attrs: arguments of triton.compiler.ASTSource, in this order.
        options: of triton.compile.
        threads: of a program.
        elements: of x that a thread deals with in one turn of a kernel's loop over tiles; 0 for the others.
        vector: how many neighbours a thread loads at once.
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
    seen = set()
    for name, function, arguments in calls:
        recorder = _Recorder(architecture)
        token = _recorder.set(recorder)
        try:
            function(*arguments)
        finally:
            _recorder.reset(token)
        for kernel, tiling, values, constants in recorder.launches:
            called = kernel.__name__.removesuffix("_kernel")
            title = name if called in OPERATORS else f"{called} of {name}" if called == "tables" else called
            key = kernel, tuple(constants.items()), tuple(str(getattr(v, "dtype", None)) for v in values)
            if key not in seen:
                seen.add(key)
                yield _compilation(title, architecture, kernel, tiling, values, constants)


def _compilation(
    name: str, architecture: str, kernel: Any, tiling: Tiling, values: tuple[Any, ...], constants: dict[str, Any]
) -> Compilation:
    types = {
        torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"
    }  # fmt: skip
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], Any] = {}
    arguments = dict(zip((p.name for p in kernel.params), values, strict=False)) | constants
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
        elements=constants.get("R", 0) * constants.get("W", 0) / tiling.threads,
        vector=constants.get("ALIGN", 1),
    )  # fmt: skip
