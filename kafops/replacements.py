"""What replace_activations() did, as a list and as a table."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kafops import same

__all__ = ["Moved", "Replacement", "ReplacementReport"]

_LITTLE = 0.01  # share of inputs outside a dictionary that is not worth a line


@dataclass(frozen=True)
class Replacement:
    """One activation that was replaced.

    Attributes:
        names: qualified names that the new module is registered under; several where the model holds the same object
            more than once.
        old: what was there: a module, or the function that was called.
        new: the module that is there now.
        channels: size of the channel dimension of its input; 0 where that is not known, and the curve shared by all.
        rank: number of dimensions of its input: 2 for [N, C], 4 for [N, C, H, W].
        uses: calls per forward pass; all of them use the same new module.
        channel_dim: dimension of the channels, 1 or counted from the end.
    """

    names: tuple[str, ...]
    old: nn.Module | Callable[[Tensor], Tensor]
    new: nn.Module
    channels: int
    rank: int
    uses: int
    channel_dim: int = 1


class Moved(NamedTuple):
    """How far a model's outputs on the example moved.

    Attributes:
        by: the largest absolute difference; 0 of equal infinities, NaN where a NaN came or went.
        of: the largest finite absolute value before.
    """

    by: float
    of: float

    @classmethod
    def between(cls, before: Iterable[Tensor], after: Iterable[Tensor]) -> "Moved | None":
        """Compare outputs; None where there are no floating values to compare."""
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.is_floating_point() and not a.is_meta]
        pairs = [(a, b) for a, b in pairs if a.numel()]
        if not pairs:
            return None
        equal = [(a == b) | (a.isnan() & b.isnan()) for a, b in pairs]
        apart = [
            (b.double() - a.double()).abs().where(~e, 0.0).max().cpu() for (a, b), e in zip(pairs, equal, strict=True)
        ]
        sizes = [a.double().abs().where(a.isfinite(), 0.0).max().cpu() for a, _ in pairs]
        return cls(torch.stack(apart).max().item(), torch.stack(sizes).max().item())


class ReplacementReport(list[Replacement]):
    """The replacements made, in the order in which the model registers them; `str()` gives a table.

    Attributes:
        left: qualified name and class name of each other activation module, which stayed as it was.
        moved: how far the outputs on the example moved, in eval mode; None without an example.
        remarks: what else there is to know, a sentence each.
        outside: share of the inputs on the example that each new KAF layer gets from outside its dictionary, by name;
            empty without an example. `kafops.calibrate` puts dictionaries where the inputs are.
        model: the model that was changed: that given, for it is changed in place always.
    """

    def __init__(
        self,
        replacements: Iterable[Replacement],
        left: Iterable[tuple[str, str]] = (),
        moved: Moved | None = None,
        remarks: Iterable[str] = (),
        outside: Mapping[str, float] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(replacements)
        self.left = list(left)
        self.moved = moved
        self.remarks = list(remarks)
        self.outside = dict(outside or {})
        self.model = model

    def __str__(self) -> str:
        header: tuple[str, ...] = ("site", "old → new", "channels", "rank", "uses")
        rows = [(", ".join(r.names), _change(r), str(r.channels or "?"), str(r.rank), str(r.uses)) for r in self]
        if any(r.channel_dim != 1 for r in self):
            header = (*header, "channel_dim")
            rows = [(*row, str(r.channel_dim)) for row, r in zip(rows, self, strict=True)]  # type: ignore[misc]
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = [_aligned(row, widths) for row in (header, *rows)]
        lines.append(f"activation modules replaced: {len(self)}")
        if any(r.uses > 1 for r in self):
            lines.append("uses > 1: one module, so the same curves, at each of its uses in a forward pass")
        if self.left:
            lines.append("left as they were: " + _counted(kind for _, kind in self.left))
        lines += self._about_bases()
        lines += self.remarks
        if self.moved:
            by, of = self.moved
            lines.append(f"outputs on the example moved by {by:.2g}, where the largest is {of:.3g}")
        if self.outside and max(self.outside.values()) > _LITTLE:
            site = max(self.outside, key=self.outside.__getitem__)
            many = sum(share > _LITTLE for share in self.outside.values())
            lines.append(
                f"inputs on the example outside the dictionary: over {_LITTLE:.0%} at {many} of {len(self)} sites, "
                f"{self.outside[site]:.0%} at {site}; kafops.calibrate puts dictionaries where the inputs are"
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _about_bases(self) -> list[str]:
        kept = [same.name_of(r.old) for r in self if getattr(r.new, "old", None) is not None]
        fitted = [r for r in self if getattr(r.new, "fit_error", None) is not None]
        lines = [f"kept beneath the curves, exact but not fused, so slower: {_counted(kept)}"] if kept else []
        for r in fitted:
            new: Any = r.new
            end = same.reach(new.boundary)
            fit = f"fitted: {same.name_of(r.old)} on {new.base}, off by {new.fit_error:.2g} at most"
            lines.append(f"{fit} on [{-end:g}, {end:g}], and {new.base} beyond")
        return list(dict.fromkeys(lines))


def _counted(kinds: Iterable[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).items())


def _change(r: Replacement) -> str:
    return f"{same.name_of(r.old)} → {type(r.new).__name__}"


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
    return "  ".join(cells).rstrip()
