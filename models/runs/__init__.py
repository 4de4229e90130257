"""A run folder: one set of settings and what came of it, so that a command can go on where it stopped."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.support import files
from models.support.errors import UserError

_FORMAT = 1


class RunError(UserError):
    """A run folder that cannot be used, with the way out."""


class RunFolder:
    """The folder of one run; `run.json` in it says which settings it belongs to."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self._record = path, record

    @classmethod
    def open(
        cls,
        path: Path,
        settings: dict[str, Any],
        restart: bool,
        outputs: tuple[str, ...],
        completed: Callable[[dict[str, Any]], dict[str, Any]] = lambda older: older,
    ) -> "RunFolder":
        """Open a folder to start or continue the run with these settings.

        Args:
            path: the folder; made if there is none.
            settings: everything that decides the results, as JSON values.
            restart: throw away the `outputs` of an earlier run in the folder, and nothing else there.
            outputs: patterns, relative to the folder, of the files that such a run writes.
            completed: gives the settings of an older run in the folder the defaults of newer ones.

        Raises:
            RunError: the folder holds a run with other settings, or files of something else.
        """
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file, not a folder; choose another")
        record = _read(path)
        if record is not None and not restart:
            _check_settings(path, completed(record["settings"]), settings)
            return cls(path, record)
        if record is None and path.exists() and any(not p.name.startswith(".") for p in path.iterdir()):
            raise RunError(f"{path} holds files of something else; choose another folder, or empty it yourself")
        if record is not None:
            for pattern in outputs:
                for old in path.glob(pattern):
                    old.unlink()
        folder = cls(path, {"format": _FORMAT, "settings": settings, "environments": []})
        folder._save()
        return folder

    @property
    def environments(self) -> list[dict[str, Any]]:
        """The environments in which work was done for this run, oldest first; usually one."""
        return self._record["environments"]

    def note_environment(self, environment: dict[str, Any]) -> None:
        """Record the environment of the work about to be done."""
        if not self.environments or self.environments[-1] != environment:
            self.environments.append(environment)
            self._save()

    def _save(self) -> None:
        files.write_json(self.path / "run.json", self._record)


def read_settings(path: Path) -> dict[str, Any]:
    """Return the settings of the run in a folder.

    Raises:
        RunError: there is no run.
    """
    record = _read(path)
    if record is None:
        raise RunError(f"{path} holds no run: there is no run.json in it")
    return record["settings"]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = files.read_json(path / "run.json")
    except ValueError as error:
        raise RunError(f"{path / 'run.json'} is not valid JSON ({error}); choose another folder") from error
    if record is None:
        return None
    if not isinstance(record, dict) or record.get("format") != _FORMAT or not isinstance(record.get("settings"), dict):
        raise RunError(f"{path} holds a run of another version or program; choose another folder")
    return record


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those of an inner group among the others."""
    lifted: dict[str, Any] = {}
    for name, value in settings.items():
        lifted.update(value if isinstance(value, dict) else {name: value})
    return lifted


def _check_settings(path: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    theirs, ours = flat(theirs), flat(ours)
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if names:
        differences = ", ".join(f"{name} is {theirs.get(name)} there and {ours.get(name)} here" for name in names)
        raise RunError(
            f"{path} holds a run with other settings: {differences}. Give the same settings to continue it, "
            f"another folder to keep it, or --restart, which train, recipe and demo have, to discard it"
        )
