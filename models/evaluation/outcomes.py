"""Outcomes of attacks on one network, kept in files, so that nothing is attacked twice.

An outcome's file is named after the attack and a digest of all that decides the outcome: the attack's settings, the
network's weights, the images, the seed. Change any of them, and only what it concerns is done again.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.attacks import Attack, Halfway
from models.evaluation import Outcome, as_text, evaluate_attack
from models.support import environment, files
from models.support.errors import UserError

_FORMAT = 1
_LIBRARIES = ("pyautoattack", "foolbox")


class OutcomeError(UserError):
    """A file of an evaluation that is damaged."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One attack to be made.

    Args:
        name: what to call it, and its file.
        attack: the attack.
        images: how many of the images it is made on, from the first.
        seed: of its randomness.
    """

    name: str
    attack: Attack
    images: int
    seed: int


class Outcomes:
    """The outcomes for one network on one row of images, in a folder.

    Args:
        folder: of the files; made when there is something to keep.
        identity: all that decides an outcome besides the job and the images: the network's weights, and what to call
            the images. JSON values.
        model: the network, in evaluation mode, on the device of the images.
        images, labels: [N, C, H, W] in [0, 1] and [N].
        batch_size: images attacked at once.
    """

    def __init__(
        self,
        folder: Path,
        identity: Mapping[str, Any],
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
    ) -> None:
        self.folder, self.identity, self.model = folder, identity, model
        self.images, self.labels, self.batch_size = images, labels, batch_size

    def get(self, job: Job, on_batch: Callable[[Outcome], None] = lambda so_far: None) -> Outcome:
        """Make the attack, or what is left of it, or read what came of it. It is saved after every batch.

        Raises:
            OutcomeError: its file is damaged.
        """
        settings = self.settings(job)
        path = self.path(job)
        done = _read(path, settings)
        if len(done.found) == job.images:
            on_batch(done)
            return done
        where = {**environment.describe(), "attacks": {name: _version(name) for name in _LIBRARIES}}

        def keep(so_far: Outcome) -> None:
            files.write_json(path, _record(job, settings, so_far, where))
            on_batch(so_far)

        return evaluate_attack(
            self.model,
            self.images[: job.images],
            self.labels[: job.images],
            job.attack,
            job.seed,
            self.batch_size,
            keep,
            done,
        )

    def settings(self, job: Job) -> dict[str, Any]:
        """Return all that decides the outcome of a job, as JSON values."""
        return {
            "attack": described(job.attack),
            "images": job.images,
            "content": images_digest([(self.images[: job.images], self.labels[: job.images])]),
            "seed": job.seed,
            "batch_size": self.batch_size,
            "device": self.images.device.type,
            **self.identity,
        }

    def path(self, job: Job) -> Path:
        """Return the file of a job."""
        name = files.file_name(job.name)[:80]
        content = json.dumps(self.settings(job), sort_keys=True).encode()
        end = f"-{hashlib.sha256(content).hexdigest()[:10]}.json"
        older = next(self.folder.glob(f"*{end}"), None)  # whatever it is called: the digest says what it is
        return older or self.folder / f"{name}{end}"


def described(value: Any) -> Any:
    """Return an attack as JSON values: the names of its types and functions, and the values of its fields.

    A field that a dataclass leaves out of its repr, such as the network of `Transfer`, is left out.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.__qualname__


def images_digest(batches: Iterable[tuple[Tensor, Tensor]]) -> str:
    """Return the SHA-256 of images and labels, which a name does not tell where it is read from another folder."""
    sha = hashlib.sha256()
    for images, labels in batches:
        for tensor in (images, labels):
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def _record(job: Job, settings: dict[str, Any], so_far: Outcome, where: dict[str, Any]) -> dict[str, Any]:
    half = so_far.halfway
    halfway = {} if half is None else {
        "halfway": {"members": half.members, "found": as_text(half.found), "random": bytes(half.random).hex()}
    }  # fmt: skip
    return {
        "format": _FORMAT,
        "name": job.name,
        "settings": settings,
        "found": so_far.mask,
        "seconds": round(so_far.seconds, 3),
        **halfway,
        "environment": where,
    }


def _read(path: Path, settings: dict[str, Any]) -> Outcome:
    """Return the outcome in the file, of the images done so far, which are none where there is no file."""
    try:
        record = files.read_json(path)
        if record is None:
            return Outcome(torch.zeros(0, dtype=torch.bool), 0.0)
        found = record["found"]
        ours = record["format"] == _FORMAT and record["settings"] == json.loads(json.dumps(settings))
        if not ours or len(found) > settings["images"]:
            raise ValueError("it is not what this program writes")
        return Outcome(_mask(found), float(record["seconds"]), _halfway(record.get("halfway")))
    except (ValueError, KeyError, TypeError) as error:
        raise OutcomeError(f"{path} is damaged ({error}); remove it, and the same command makes it anew") from error


def _halfway(record: dict[str, Any] | None) -> Halfway | None:
    if record is None:
        return None
    random = torch.frombuffer(bytearray.fromhex(record["random"]), dtype=torch.uint8)
    return Halfway(int(record["members"]), _mask(record["found"]), random)


def _mask(text: str) -> Tensor:
    if set(text) - {*"01"}:
        raise ValueError("it is not what this program writes")
    return torch.tensor([letter == "1" for letter in text], dtype=torch.bool)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
