"""The table of cases that every backend is tested on, and the problem that each case stands for."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kafops.accuracy import Problem

F32, F64, BF16, F16 = DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16
DEVICE = os.environ.get("KAFOPS_TEST_DEVICE", "cpu")  # where the table is computed: "cuda" tests the GPU kernels
GPU_KERNELS = DEVICE != "cpu" or os.environ.get("KAFOPS_TEST_GPU_KERNELS") == "1"  # which may be run on the CPU
SIZES = (1, 2, 5, 20, 33, 64, 128)
SPACINGS = (1 / 8, 1 / 6, 1 / 2, 2.0, 8.0)  # γΔ², Δ the distance between neighbouring points


def _reversed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 1 else t


def _inside(t: Tensor, *where: slice) -> Tensor:
    """Put t into a larger tensor of NaN, at `where` along its last dimensions; what is around it must not be read."""
    around = [(w.start or 0) + n * (w.step or 1) + 2 for n, w in zip(t.shape[-len(where) :], where, strict=True)]
    wider = t.new_full((*t.shape[: -len(where)], *around), torch.nan)
    view = wider[
        (
            ...,
            *(
                slice(w.start, (w.start or 0) + n * (w.step or 1), w.step)
                for n, w in zip(t.shape[-len(where) :], where, strict=True)
            ),
        )
    ]
    return view.copy_(t)


def _every_other_channel(t: Tensor) -> Tensor:
    return _inside(t.movedim(1, -1), slice(1, None, 2)).movedim(-1, 1)


def _every_other_channel_nchw(t: Tensor) -> Tensor:
    return _inside(t, slice(1, None, 2), *(slice(0, None),) * (t.dim() - 2))


def _cropped(t: Tensor) -> Tensor:
    return _inside(t, *(slice(1, None),) * (t.dim() - 2))


def _offset(t: Tensor) -> Tensor:
    return _inside(t.flatten(), slice(3, None)).view(t.shape)


def _overlapping(t: Tensor) -> Tensor:
    """Windows over a line: neighbours along every dimension are neighbours in memory, most elements are shared."""
    return t.flatten()[: sum(n - 1 for n in t.shape) + 1].clone().as_strided(t.shape, (1,) * t.dim())


# From a contiguous tensor to one of the same shape in another layout. Values stay as they are, except where elements
# share memory: then some of the values are all there is.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "channels_last": _channels_last,
    "transposed": _reversed,
    "swapped": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_other_channel": _every_other_channel_nchw,
    "every_other_channel_last": _every_other_channel,
    "cropped": _cropped,
    "cropped_channels_last": lambda t: _inside(t.movedim(1, -1), slice(1, None), slice(2, None)).movedim(-1, 1),
    "every_third": lambda t: _inside(t, slice(0, None, 3)),
    "offset": _offset,
    "expanded_batch": lambda t: t[:1].expand_as(t),
    "expanded_channel": lambda t: t[:, :1].expand_as(t),
    "expanded_last": lambda t: t[..., :1].expand_as(t),
    "expanded": lambda t: t.flatten()[0].expand_as(t),
    "overlapping": _overlapping,
}


@dataclass(frozen=True)
class Case:
    """Shape and layout of x, and the parameters of its curves.

    Attributes:
        shape: of x; channels are dimension 1.
        layout, grad_layout: of x, and of grad and v[0]; names in LAYOUTS.
        dtype, parameter_dtype: of x, and of alpha, gamma and the dictionary.
        size: D, the number of points.
        spacing: γΔ².
        boundary: half-width of the dictionary, or of the interval around which a free one's points are drawn.
        free: whether the dictionary is free.
        shared: which of "alpha", "gamma", "dictionary" have one row for all channels.
        varied: whether gamma differs between channels.
        pruned: whether alpha is 0 in the first row.
        tiny: whether it is about 1e-30 in the last row.
    """

    shape: tuple[int, ...] = (300, 3)
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    dtype: torch.dtype = F32
    parameter_dtype: torch.dtype = F32
    size: int = 20
    spacing: float = 1 / 6
    boundary: float = 3.0
    free: bool = False
    shared: frozenset[str] = field(default_factory=frozenset)
    varied: bool = False
    pruned: bool = False
    tiny: bool = False

    def __str__(self) -> str:
        """Name what differs from the defaults."""
        parts = ["x".join(map(str, self.shape)) or "0d"]
        default = Case()
        for name in ("layout", "grad_layout", "dtype", "parameter_dtype", "size", "spacing", "boundary"):
            value = getattr(self, name)
            if value != getattr(default, name):
                text = f"{value:.3g}" if isinstance(value, float) else str(value).removeprefix("torch.")
                parts.append(text if name in ("layout", "dtype") else f"{name}={text}")
        parts += ["free"] * self.free + ["varied"] * self.varied + ["pruned"] * self.pruned
        parts += ["tiny"] * self.tiny
        if self.shared:
            parts.append("shared=" + "+".join(sorted(self.shared)))
        return "-".join(parts)

    @property
    def gamma(self) -> float:
        return self.spacing / self.step**2

    @property
    def step(self) -> float:
        """Δ; for a single point, as for three."""
        return 2 * self.boundary / (self.size - 1) if self.size > 1 else self.boundary

    def problem(self, seed: int = 0, device: str = DEVICE) -> Problem:
        """Draw the inputs: the same on every device."""
        draw = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw, dtype=F64)

        def rows(name: str) -> int:
            channels = self.shape[1] if len(self.shape) > 1 else 1
            return 1 if name in self.shared else channels

        def data(t: Tensor, layout: str) -> Tensor:
            return LAYOUTS[layout](t.to(device, self.dtype))

        def parameter(t: Tensor) -> Tensor:
            return t.to(device, self.parameter_dtype)

        alpha = parameter(0.8 * randn(rows("alpha"), self.size))
        if self.pruned:
            alpha[0] = 0
        if self.tiny:
            alpha[-1] *= 1e-30
        gamma = torch.full((rows("gamma"),), self.gamma, dtype=F64)
        if self.varied:
            gamma *= torch.linspace(1, 1.5, len(gamma), dtype=F64)
        gamma = parameter(gamma)
        dictionary = parameter(self._points(rows("dictionary"), randn, draw)) if self.free else None
        # The weights bring every gradient to the same order of magnitude, so that none hides the others.
        v = [
            data(randn(*self.shape) / self.gamma**0.5, self.grad_layout),
            parameter(randn(*alpha.shape)),
            parameter(randn(*gamma.shape) * self.gamma),
        ]
        if dictionary is not None:
            v.append(parameter(randn(*dictionary.shape) / self.gamma**0.5))
        grad = data(randn(*self.shape), self.grad_layout)
        x = data(self._inputs(randn), self.layout)
        return Problem(x, alpha, gamma, dictionary, self.boundary, grad, tuple(v))

    def _inputs(self, randn: Callable[..., Tensor]) -> Tensor:
        """Mostly within the dictionary, some beside it, some at its points, a few far away."""
        x = self.boundary * 0.7 * randn(*self.shape).reshape(-1)
        if x.numel() > 8:
            special = torch.tensor([0, 1, -1, 1 - 2 / max(self.size - 1, 1), 1.5, -30, 3000, -3000], dtype=F64)
            x[:: max(x.numel() // 8, 1)][:8] = self.boundary * special
        return x.reshape(self.shape).clamp(-6e4, 6e4)

    def _points(self, rows: int, randn: Callable[..., Tensor], draw: torch.Generator) -> Tensor:  # [rows, D]
        even = torch.linspace(-self.boundary, self.boundary, self.size, dtype=F64) if self.size > 1 else torch.zeros(1)
        points = even + 0.3 * self.step * randn(rows, self.size)
        return points[:, torch.randperm(self.size, generator=draw)]


def _cases() -> list[Case]:
    base = Case()
    images = Case(shape=(4, 18, 11, 10), size=5)
    alone = frozenset({"alpha", "gamma", "dictionary"})
    cases = [
        # Shapes: with few elements in a channel and with many, of every rank.
        *(Case(shape=s, shared=alone, free=f) for s in ((), (7,), (600,), (0,), (1,)) for f in (False, True)),
        *(
            Case(shape=s)
            for s in ((1, 1), (5, 3), (1, 400), (2, 3, 5), (2, 3, 300), (2, 3, 9, 7), (3, 17, 4, 4), (2, 3, 4, 5, 6),
                      (2, 3, 1, 1), (1, 1, 1, 1), (4, 1, 13, 11), (1, 64, 3, 3), (3, 2, 2, 3, 2, 2, 2), (1, 130, 5, 7),
                      (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (9000, 2), (2, 3, 70, 70))
        ),
        *(Case(shape=s, free=True) for s in ((5, 3), (2, 3, 300), (0, 3), (2, 0, 4))),
        Case(shape=(2, 0), shared=alone),
        Case(shape=(4, 5, 3), shared=alone, free=True),
        # Layouts of x and of the gradient, alone and together.
        *(replace(images, layout=name, dtype=dtype) for name in LAYOUTS for dtype in DTYPES),
        *(replace(images, grad_layout=name) for name in LAYOUTS if name != "contiguous"),
        *(replace(images, layout=name, grad_layout=name, dtype=BF16) for name in ("channels_last", "cropped")),
        *(replace(images, layout=a, grad_layout=b, free=True) for a, b in
          (("channels_last", "transposed"), ("cropped", "expanded"), ("transposed", "channels_last"))),
        *(Case(shape=s, layout=name) for s in ((40, 70), (3, 33, 50), (2, 5, 3, 7, 11))
          for name in ("channels_last", "swapped", "every_third", "expanded_batch", "overlapping")),
        *(Case(shape=(600,), layout=name, shared=alone) for name in ("every_third", "offset", "expanded")),
        Case(shape=(2, 40, 30, 30), layout="channels_last"),
        *(Case(shape=(2, 48, 17, 9), layout="channels_last", grad_layout=name, dtype=dtype)
          for name in ("contiguous", "channels_last") for dtype in (F32, F16)),
        Case(shape=(2, 16, 30, 30), layout="channels_last", dtype=F16),
        Case(shape=(2, 70, 4, 5), layout="channels_last", dtype=BF16, free=True),
        # Channels side by side in memory: any number of them, each with cells of its own, in tiles of positions.
        *(Case(shape=(3, c, 5, 11), size=5, layout="channels_last", grad_layout="channels_last")
          for c in (1, 2, 3, 7, 8, 15, 17, 20, 24, 40, 48, 100)),
        *(Case(shape=(3, c, 5, 11), size=5, layout=name, grad_layout=name, varied=v, free=f, dtype=dtype)
          for c, dtype in ((24, F32), (20, F32), (20, BF16), (20, F16))
          for name in ("channels_last", "contiguous") for v, f in ((True, False), (False, True), (True, True))),
        *(Case(shape=(3, 20, 5, 11), size=5, layout=a, grad_layout=b, varied=True) for a, b in
          (("channels_last", "contiguous"), ("channels_last", "expanded"), ("cropped_channels_last",) * 2)),
        *(Case(shape=(165, c), size=5, varied=v) for c in (4, 20, 33) for v in (False, True)),
        # Dictionaries.
        *(Case(size=d, spacing=t, free=f) for d in SIZES for t in SPACINGS for f in (False, True)),
        *(Case(size=d, spacing=t, free=f, dtype=F64, parameter_dtype=F64)
          for d in (1, 2, 20, 128) for t in (1 / 8, 8.0) for f in (False, True)),
        *(Case(shape=(4, 3), size=d, spacing=t, dtype=dtype)
          for d in (1, 20) for t in (1 / 8, 8.0) for dtype in DTYPES),
        *(Case(boundary=b, dtype=dtype, free=f) for b in (1e-3, 1e3) for dtype in DTYPES for f in (False, True)),
        # A channel of zeros beside others; with so many points that powers in the fast path of GPUs overflow.
        *(Case(size=d, spacing=t, dtype=dtype, pruned=True)
          for d, t, dtype in ((34, 1 / 2, BF16), (67, 1 / 2, F32), (91, 1 / 2, F32), (141, 1 / 4, F32),
                              (111, 1 / 6, BF16), (111, 1 / 6, F16))),
        Case(pruned=True, free=True),
        # Zeros and tiny numbers, with so many elements that GPUs make tables of the curves, and with few.
        *(Case(shape=s, dtype=dtype, free=f, layout=name, pruned=True, tiny=True)
          for s, name in (((300, 3), "contiguous"), ((4, 3, 40, 40), "contiguous"), ((4, 3, 40, 40), "channels_last"))
          for dtype in (F32, BF16) for f in (False, True)),
        Case(size=64, spacing=1 / 2, shape=(4, 2, 70, 70), pruned=True, tiny=True),
        Case(size=20, spacing=1e-4),
        Case(size=20, spacing=1e4),
        Case(size=20, spacing=1e7, dtype=F64, parameter_dtype=F64),
        # Shared and separate rows.
        *(Case(shared=frozenset(s), varied=v)
          for s in ((), ("alpha",), ("gamma",), ("alpha", "gamma")) for v in (False, True)),
        *(Case(shared=frozenset(s), free=True, varied=True)
          for s in ((), ("alpha",), ("gamma",), ("dictionary",), ("alpha", "dictionary"), ("gamma", "dictionary"),
                    ("alpha", "gamma"), ("alpha", "gamma", "dictionary"))),
        Case(shape=(2, 18, 9, 9), layout="channels_last", varied=True),
        Case(shape=(2, 18, 9, 9), layout="channels_last", shared=alone),
        # Dtypes: of x with that of the parameters.
        *(replace(base, dtype=a, parameter_dtype=b, free=f) for a in DTYPES for b in (F32, F64) for f in (False, True)),
    ]  # fmt: skip
    return list(dict.fromkeys(cases))


CASES = _cases()
