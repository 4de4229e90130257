"""k-winners-take-all."""

import math

import torch
from torch import Tensor, nn


class KWinners(nn.Module):
    """k-WTA: keep the k largest of n values of an image, set the others to 0; k = ceil(ratio · n).

    Values equal to the k-th largest are all kept, so ties keep more than k. The gradient is that of the mask: 1 where a
    value is kept, 0 elsewhere. The function jumps wherever a winner changes, which is what hides its true slope from
    attacks by gradient: accuracy under such attacks says little (Tramèr et al. 2020, On adaptive attacks, section 5).

    Args:
        ratio: share of values kept, above 0, at most 1.
        per: "volume": n = C · H · W, all values of an image; "channel": n = H · W, the values of each of its channels.
            An input [N, C] is one volume in both cases.
        end: ratio at the end of training, reached linearly from `ratio` on through `set_progress`; None: it stays.

    State:
        Buffer `ratio`, the current one.

    Raises:
        ValueError: an argument is out of its range.

    Source: Xiao, Zhong, Zheng, "Enhancing adversarial defense by k-winners-take-all", 2020. Its code rounds k down; we
    round up, as the thesis does, so that k is never 0.
    """

    def __init__(self, ratio: float = 0.2, per: str = "volume", end: float | None = None) -> None:
        super().__init__()
        if per not in ("volume", "channel"):
            raise ValueError(f"per must be 'volume' or 'channel', got {per!r}")
        self.start = _checked("ratio", ratio)
        self.end = self.start if end is None else _checked("end", end)
        self.per = per
        self.ratio: Tensor
        self.register_buffer("ratio", torch.tensor(self.start, dtype=torch.float32))

    def set_progress(self, progress: float) -> None:
        """Put the ratio where it belongs after the share `progress` of training, 0 … 1."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must be in [0, 1], got {progress}")
        self.ratio.fill_(self.start + (self.end - self.start) * progress)

    def winners(self, n: int) -> int:
        """Return k for n values."""
        # Less a millionth, or ratio · n that should be whole, but is rounded up in float32, would give one more.
        return max(1, math.ceil(self.ratio.item() * n * (1 - 1e-6)))

    def forward(self, x: Tensor) -> Tensor:  # [N, C, *] -> [N, C, *]
        """Keep the winners."""
        values = x.detach().flatten(2 if self.per == "channel" and x.dim() > 2 else 1)
        # The unsorted top k and its least are quicker than kthvalue, by a quarter on a CPU.
        least = values.topk(self.winners(values.shape[-1]), sorted=False).values.amin(-1)  # [N] or [N, C]
        least = least.reshape(*least.shape, *(1,) * (x.dim() - least.dim()))
        return x.masked_fill(x < least, 0)  # which keeps a NaN, so that it is seen

    def extra_repr(self) -> str:
        """Return the arguments."""
        return f"ratio={self.start:g}, per={self.per}, end={self.end:g}"


def _checked(name: str, ratio: float) -> float:
    if not 0 < ratio <= 1:
        raise ValueError(f"{name}, the share of values that k-WTA keeps, must be above 0, at most 1, got {ratio:g}")
    return ratio
