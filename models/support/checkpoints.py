"""Checkpoints: one safetensors file, tensors by name, with everything else as JSON in its header.

One file, so tensors and record can never be of different moments; no pickle, so a foreign file runs no code.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models.support import files
from models.support.errors import UserError

_RECORD, _CHECKSUM = "kafops.record", "kafops.crc32"


class CheckpointError(UserError):
    """A checkpoint that cannot be used, with the reason and what to do."""


def save(path: Path, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    """Write a checkpoint, replacing the previous one only once the new one is safely on disk.

    Raises:
        CheckpointError: it could not be written; the previous one is intact.
    """
    # Cloned, since safetensors refuses tensors that share memory, as parameters shared by layers do.
    copies = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    said = json.dumps(record)
    content = safetensors.torch.save(copies, metadata={_RECORD: said, _CHECKSUM: _checksum(copies, said)})
    try:
        files.write_bytes(path, content)
    except OSError as error:
        kept = "the previous checkpoint there is intact" if path.exists() else "there was none before"
        raise CheckpointError(f"could not write the checkpoint {path}: {error}; {kept}") from error


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint back: tensors on the CPU, and the record.

    Raises:
        CheckpointError: the file is truncated, or is no checkpoint of this package.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            record = json.loads(metadata[_RECORD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        # Checkpoints of earlier versions have no checksum, and no other name either.
        if set(metadata) != {_RECORD} and metadata.get(_CHECKSUM) != _checksum(tensors, metadata[_RECORD]):
            raise CheckpointError(f"{path} is damaged: its checksum is that of another content")
        return tensors, record
    except KeyError as error:
        raise CheckpointError(f"{path} is a safetensors file but no checkpoint of this package") from error
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from error


def _checksum(tensors: dict[str, Tensor], record: str) -> str:
    """Return what one changed bit changes, as a file's own errors do."""
    checksum = zlib.crc32(record.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put `prefix.` before every name."""
    return {f"{prefix}.{name}": t for name, t in tensors.items()}


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix.`, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the network's weights in a checkpoint of a training: their average, where one was kept."""
    return under("average.module", tensors) or under("model", tensors)


def load_weights(model: nn.Module, weights: dict[str, Tensor], origin: Path) -> None:
    """Load weights that come from a checkpoint.

    Raises:
        CheckpointError: they are of another network; the message says what does not fit.
    """
    try:
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{origin} is of another network: {error}") from error


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and plain values."""
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                values.setdefault(str(index), {})[key] = value
    return tensors, {"state": values, "param_groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Undo `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in values["state"].items()}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": values["param_groups"]})
