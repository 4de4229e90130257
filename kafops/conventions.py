"""The conventions that KAFs are in use with: dictionary, bandwidth, regularisation and random start."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from kafops.init import Init, Normal, Ridge

__all__ = ["CONVENTIONS", "Convention", "convention"]


@dataclass(frozen=True)
class Convention:
    """One row of the table.

    Attributes:
        dictionary_size: D.
        boundary: b, the points being even on [-b, b].
        t: γΔ², as a fraction.
        eps: regularisation of the fit to a function.
        std: of random coefficients.
        source: where it is used.
    """

    dictionary_size: int
    boundary: float
    t: tuple[int, int]
    eps: float
    std: float
    source: str


ConventionName = Literal["kafops", "paper", "ispamm", "ispamm-2017", "ispamm-keras", "thesis"]

CONVENTIONS: dict[str, Convention] = {
    "kafops": Convention(20, 3.0, (1, 6), 1e-6, 0.3, "the defaults here, where init is a fit to ELU"),
    "paper": Convention(
        20, 3.0, (1, 6), 1e-6, 0.3, "Scardapane et al., 2017; std as in the authors' code of that year"
    ),
    "ispamm": Convention(20, 4.0, (1, 8), 1e-4, 0.8, "ispamm/kernel-activation-functions, PyTorch, since 2019"),
    "ispamm-2017": Convention(20, 3.0, (1, 8), 1e-5, 0.3, "the same in 2017"),
    "ispamm-keras": Convention(20, 3.0, (1, 8), 1e-5, 0.05, "the same for Keras and TensorFlow"),
    "thesis": Convention(20, 3.0, (1, 6), 1e-6, 0.05, "Peconi, 2020"),
}


def convention(name: ConventionName, init: Init | None = None, dictionary_size: int | None = None) -> dict[str, Any]:
    """Return the arguments with which a layer follows a convention.

    Args:
        name: of a row of `CONVENTIONS`.
        init: a function to fit, by name or itself, with the convention's regularisation; None for its random start.
        dictionary_size: D, where it is not the convention's own; its bandwidth follows.

    Returns:
        Keyword arguments for `KAF` and the like: dictionary_size, boundary, gamma and init.

    Raises:
        TypeError: dictionary_size is no integer.
        ValueError: there is no such convention, or dictionary_size is below 2, where no spacing sets a bandwidth.

    Example:
        >>> layer = kafops.KAF2d(64, **kafops.convention("ispamm", init="elu"))
    """
    if not isinstance(name, str) or name not in CONVENTIONS:
        near = difflib.get_close_matches(str(name).lower(), CONVENTIONS, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"name must be one of {', '.join(map(repr, CONVENTIONS))}, got {name!r}{hint}")
    row = CONVENTIONS[name]
    size = row.dictionary_size if dictionary_size is None else dictionary_size
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"dictionary_size must be an integer ≥ 2, got {type(size).__name__} {size!r}")
    if size < 2:
        raise ValueError(f"dictionary_size must be an integer ≥ 2, got {size}")
    over, under = row.t
    return {
        "dictionary_size": size,
        "boundary": row.boundary,
        "gamma": over / under * ((size - 1) / (2 * row.boundary)) ** 2,
        "init": Normal(row.std) if init is None else Ridge(init, row.eps),
    }
