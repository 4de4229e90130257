"""Random crops and flips of batches in memory."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Moves:
    """What happens to each image: where its crop starts in the padded image, and whether it is mirrored."""

    rows: Tensor  # [N], int64 in 0..2 pad
    columns: Tensor  # [N], int64 in 0..2 pad
    flips: Tensor  # [N], bool

    def __getitem__(self, chosen: Tensor) -> "Moves":
        return Moves(self.rows[chosen], self.columns[chosen], self.flips[chosen])


@dataclass(frozen=True)
class CropAndFlip:
    """The usual augmentation of small images: pad with zeros, crop to the old size at random, mirror half of them.

    Args:
        pad: pixels on each side; 0 for no crop.
        flip: whether images are mirrored, left to right.
    """

    pad: int
    flip: bool

    def draw(self, count: int, generator: torch.Generator) -> Moves:
        """Draw what happens to `count` images, uniformly."""
        rows, columns = torch.randint(2 * self.pad + 1, (2, count), generator=generator)
        coins = torch.randint(2, (count,), generator=generator)
        return Moves(rows, columns, (coins == 1) & self.flip)

    def __call__(self, images: np.ndarray, moves: Moves) -> np.ndarray:  # [N, C, H, W] → [N, C, H, W]
        """Return moved copies of the images."""
        height, width = images.shape[2:]
        padded = np.pad(images, ((0, 0), (0, 0), (self.pad, self.pad), (self.pad, self.pad)))
        moved = np.empty_like(images)
        drawn = zip(moves.rows.tolist(), moves.columns.tolist(), moves.flips.tolist(), strict=True)
        for i, (row, column, flip) in enumerate(drawn):
            window = padded[i, :, row : row + height, column : column + width]
            moved[i] = window[:, :, ::-1] if flip else window
        return moved
