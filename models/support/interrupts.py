"""Ctrl-C that waits for a good moment."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):
    """Work stopped on request, at a point from which it can go on."""


AFTER_THIS = "Stopping when the attack under way is through with its images; Ctrl-C again stops at once."


class StopRequest:
    """Within the block, the first Ctrl-C or SIGTERM only sets `requested`; a second Ctrl-C acts at once.

    Args:
        note: shown at the first one, where it takes long until it is heeded.

    Example:
        >>> with StopRequest() as stop:
        ...     while not stop.requested:
        ...         step()
    """

    requested = False

    def __init__(self, note: str = "") -> None:
        self._note = note

    def __enter__(self) -> "StopRequest":
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # nobody else may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._note:
            os.write(2, f"\n{self._note}\n".encode())  # print is not for handlers: it could be at work already
