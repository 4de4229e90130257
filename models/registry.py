"""Things by name, with options in the name: `kwta:ratio=0.1,per=channel`."""

import argparse
import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from models.support import arguments

T = TypeVar("T")


def near(word: str, words: Iterable[str]) -> str:
    """Return "; did you mean ...?" for the words that look like `word`, or nothing."""
    close = difflib.get_close_matches(word, list(words))
    return f"; did you mean {' or '.join(close)}?" if close else ""


def split(text: str) -> tuple[str, ...]:
    """Split names with options at the commas between them: `a:x=1,y=2,b` is `a:x=1,y=2` and `b`."""
    return tuple(re.split(r",(?![^,:]*=)", text))


class Registry(Generic[T]):
    """Factories by name. A text such as `name:option=value,option=value` calls one.

    A factory takes what the caller gives as positional arguments, and its options as keyword-only ones: their
    annotations (int, float, bool, str, or any of these with None) say how the text of a value is read, their defaults
    what is left out. Numbers may be fractions such as 8/255.

    Example:
        >>> NETWORKS = Registry("network")
        >>> @NETWORKS.register("light")
        ... def light(activation, images, *, width: int = 32): ...
        >>> NETWORKS.create("light:width=8", activation, images)
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._factories: dict[str, Callable[..., T]] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *aliases: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
        """Return the decorator that makes a factory known under `name` and other names."""

        def add(factory: Callable[..., T]) -> Callable[..., T]:
            self._factories[name] = factory
            self._aliases.update(dict.fromkeys(aliases, name))
            return factory

        return add

    @property
    def names(self) -> tuple[str, ...]:
        """The names, without aliases."""
        return tuple(self._factories)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the options of a factory by name."""
        parameters = inspect.signature(self._factories[name]).parameters
        return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def parse(self, text: str) -> tuple[str, dict[str, Any]]:
        """Return the name and the options given.

        Raises:
            ValueError: the name or an option is unknown, or a value is not what the option takes.
        """
        name, _, rest = text.partition(":")
        name = self._aliases.get(name, name)
        if name not in self._factories:
            known = (*self._factories, *self._aliases)
            raise ValueError(f"unknown {self.kind} {name!r}, there are {', '.join(self.names)}{near(name, known)}")
        options = self.options(name)
        given: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if key not in options:
                there = f"it has {', '.join(options)}{near(key, options)}" if options else "it has none"
                raise ValueError(f"{self.kind} {name!r} has no option {key!r}: {there}")
            if key in given:
                raise ValueError(f"option {key!r} of {self.kind} {name!r} is given twice")
            if not equals:
                raise ValueError(f"option {key!r} of {self.kind} {name!r} needs a value, as in {name}:{key}=...")
            given[key] = self._read(name, options[key], value)
        return name, given

    def create(self, text: str, *context: Any) -> T:
        """Call the factory that `text` names, with `context` and the options in the text."""
        name, options = self.parse(text)
        return self._factories[name](*context, **options)

    def _read(self, name: str, option: inspect.Parameter, value: str) -> Any:
        kinds = _alternatives(option.annotation)
        if type(None) in kinds and value == "none":
            return None
        for kind in kinds:
            try:
                return _READERS[kind](value)
            except (ValueError, KeyError, argparse.ArgumentTypeError):
                continue
        wanted = " or ".join("none" if kind is type(None) else _NOUNS[kind] for kind in kinds)
        raise ValueError(f"option {option.name!r} of {self.kind} {name!r} must be {wanted}, got {value!r}")


_READERS: dict[Any, Callable[[str], Any]] = {
    bool: {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}.__getitem__,
    int: int,
    float: arguments.fraction,
    str: str,
}
_NOUNS = {bool: "yes or no", int: "a whole number", float: "a number or a fraction such as 8/255", str: "a word"}


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return typing.get_args(annotation)
    return (annotation,)
