"""Files that are either the old one or the new one, whatever happens while writing."""

import json
import os
import re
from pathlib import Path
from typing import Any

_LINE, _WIDE, _RECORD = 120, 800, 2000  # characters of a list or the whole, a dict within, an element: at most


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: a failure leaves what was there before, and no litter.

    Raises:
        OSError: the content could not be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all. NaN and infinity are refused: JSON has neither."""
    write_text(path, as_json(value) + "\n")


def write_result(path: Path, value: Any) -> None:
    """Write what is committed: floats are rounded, to more digits than any document shows."""
    write_json(path, rounded(value))


def rounded(value: Any, digits: int = 7) -> Any:
    """Round all floats in a JSON value to so many significant digits."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def as_json(value: Any, indent: str = "") -> str:
    """Return a value as JSON in which each record is a line: each element of a list, and whatever is short."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    listed = isinstance(value, list)
    if not isinstance(value, dict) and not (listed and any(isinstance(item, dict | list) for item in value)):
        return line
    if len(indent) + len(line) <= (_WIDE if indent and not listed else _LINE):
        return line
    inner = indent + " "
    if listed:
        lines = (json.dumps(item, ensure_ascii=False) for item in value)
        parts = [
            text if len(text) <= _RECORD else as_json(item, inner) for text, item in zip(lines, value, strict=True)
        ]
    else:
        if wrong := [name for name in value if not isinstance(name, str)]:
            raise TypeError(f"names in JSON must be strings, got {wrong[0]!r}")
        parts = [f"{json.dumps(name, ensure_ascii=False)}: {as_json(item, inner)}" for name, item in value.items()]
    first, last = "[]" if listed else "{}"
    return f"{first}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{last}"


def file_name(text: str) -> str:
    """Return a name for a file that every system and shell takes: letters, digits, and . - _ ."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", text.replace("ε", "eps"))


def read_json(path: Path) -> Any:
    """Read a JSON file, or return None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
