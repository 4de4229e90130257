"""Seeds: one for each use, step and process, all from the one the user gave."""

import hashlib

import torch


def derived(*parts: int | str) -> int:
    """Return a seed that is a function of `parts`, unrelated to that of any other parts.

    It has 32 bits, of which torch's CPU generator uses all; neighbouring seeds, or ones that differ only above them,
    would give related or equal streams.
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def generator(device: torch.device | str, *parts: int | str) -> torch.Generator:
    """Return a generator seeded by `derived(*parts)`."""
    return torch.Generator(device).manual_seed(derived(*parts))
