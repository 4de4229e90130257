"""Commands, and values of their options, checked and never evaluated as code."""

import argparse
import math
from collections.abc import Callable
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def command(
    commands: Commands, name: str, purpose: str, about: str, run: Callable[[argparse.Namespace, str], int]
) -> argparse.ArgumentParser:
    """Add a command that calls `run` with its options and its own text; `options.refuse` is for wrong ones."""
    parser = commands.add_parser(
        name,
        help=purpose,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, refuse=parser.error)
    return parser


def fraction(text: str) -> float:
    """Parse "0.2", "1e-3" or "51/255".

    Raises:
        argparse.ArgumentTypeError: the text is no finite number or quotient of two.
    """
    parts = text.split("/")
    try:
        numbers = [float(part) for part in parts]
        value = numbers[0] if len(numbers) == 1 else numbers[0] / numbers[1]
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if len(parts) > 2 or not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"wanted a number such as 0.2 or a fraction such as 51/255, got {text!r}")
    return value


def radius(text: str) -> float:
    """Parse an attack's ε: a number or fraction in [0, 1], the range of the images."""
    value = fraction(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"wanted a value in [0, 1], the range of the images, got {text}")
    return value


def positive(text: str) -> float:
    """Parse a number or fraction above 0."""
    value = fraction(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"wanted a number above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """Parse a number or fraction that is at least 0."""
    value = fraction(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"wanted a number that is at least 0, got {text}")
    return value


def share(text: str) -> float:
    """Parse a number or fraction in [0, 1)."""
    value = fraction(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"wanted a number in [0, 1), got {text}")
    return value


def yes_or_no(text: str) -> bool:
    """Parse "yes" or "no"."""
    if text not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"wanted yes or no, got {text!r}")
    return text == "yes"


def or_none(parse: Callable[[str], float]) -> Callable[[str], float | None]:
    """Return a parser that also takes "none"."""
    return lambda text: None if text == "none" else parse(text)


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Return a parser of whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"wanted a whole number, got {text!r}") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"wanted a whole number from {least} to {most}, got {value}")
        return value

    return parse
