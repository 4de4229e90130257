"""What commands show: text as it is, whatever brackets are in it, and progress."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def console(quiet: bool = False) -> Console:
    """Return the terminal."""
    return Console(quiet=quiet, highlight=False, markup=False)


def progress(console: Console, stays: bool = False, remaining: bool = False) -> Progress:
    """Return progress bars; a task has a field `status`.

    Args:
        console: where to show them.
        stays: at the end.
        remaining: show how long it will take.
    """
    description, status = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[status]}"))
    times: tuple[ProgressColumn, ...] = (TimeElapsedColumn(), *([TimeRemainingColumn()] if remaining else []))
    return Progress(description, BarColumn(), *times, status, console=console, transient=not stays)
