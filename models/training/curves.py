"""The curves of a network along its training: a small file for each epoch, in the folder curves/ of a run."""

import re
from pathlib import Path

from torch import nn

import kafops
from models.support import checkpoints
from models.training import processes as several

FOLDER = "curves"
PATTERN = f"{FOLDER}/epoch-*.safetensors"
"""The files, relative to the run's folder."""


def kaf_layers(model: nn.Module) -> dict[str, kafops.KAF]:
    """Return the KAF layers of a network by the names of their modules, in the order in which it defines them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kafops.KAF)}


def rank(layer: kafops.KAF) -> int:
    """Return the least number of dimensions of an x [N, C, *] that a KAF layer takes."""
    return 4 if isinstance(layer, kafops.KAF2d) else 5 if isinstance(layer, kafops.KAF3d) else 2


def path(run: Path, epoch: int) -> Path:
    """Return the file of an epoch, 0 for the curves before training."""
    return run / FOLDER / f"epoch-{epoch:04d}.safetensors"


def save(model: nn.Module, run: Path, epoch: int, write: bool = True) -> None:
    """Write the state of all KAF layers after an epoch: coefficients, bandwidths, dictionaries where learned, boundary.

    A network without KAF layers leaves no file.

    Args:
        model: the network; where its parameters are sharded, all processes must call this.
        run: folder of the run.
        epoch: epochs done.
        write: whether this process is the one that writes.

    Raises:
        CheckpointError: the file could not be written.
    """
    layers = kaf_layers(model)
    state = {
        f"{name}.{key}": several.whole(tensor)
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }
    if layers and write:
        checkpoints.save(path(run, epoch), state, {"epoch": epoch, "layers": list(layers)})


def epochs(run: Path) -> list[int]:
    """Return the epochs whose curves a run has kept, in order."""
    names = (re.fullmatch(r"epoch-(\d+)\.safetensors", file.name) for file in (run / FOLDER).glob("epoch-*"))
    return sorted(int(name[1]) for name in names if name)


def load(model: nn.Module, run: Path, epoch: int) -> None:
    """Give the KAF layers of a network the curves of an epoch; all else stays.

    Raises:
        CheckpointError: there is no such file, it is damaged, or its curves are of another network.
    """
    file = path(run, epoch)
    tensors, record = checkpoints.load(file)
    layers = kaf_layers(model)
    if record.get("layers") != list(layers):
        raise checkpoints.CheckpointError(
            f"{file} has curves of the layers {record.get('layers')}, but the network has {list(layers)}"
        )
    for name, layer in layers.items():
        checkpoints.load_weights(layer, checkpoints.under(name, tensors), file)
