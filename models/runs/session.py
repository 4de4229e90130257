"""One training run in one folder, with progress shown: what `python -m models train` and the study do."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from models import data, networks
from models.images import ImageFormat
from models.runs import RunFolder
from models.runs.settings import Settings, completed
from models.support import environment
from models.support.errors import UserError
from models.training import EpochRecord, Trainer
from models.training import curves as curve_files
from models.training.processes import Processes
from models.training.trainer import BEST, LATEST, METRICS

OUTPUTS = (
    LATEST,
    BEST,
    METRICS,
    *(f"evaluation/*.{end}" for end in ("json", "png")),
    *(f"comparison/comparison.{end}" for end in ("json", "md", "png")),
    curve_files.PATTERN,
    *(f"curves/*.{end}" for end in ("json", "png", "gif")),
    *(f"bounds/*.{end}" for end in ("json", "png")),
    *(f"distributions/*.{end}" for end in ("json", "png", "safetensors")),
    "report.html",
    "tensorboard/events.out.tfevents.*",
)


def prepare(
    settings: Settings,
    out: Path,
    restart: bool = False,
    root: Path | None = None,
    processes: Processes | None = None,
    shard: bool = False,
) -> Trainer:
    """Open or continue the run in `out`, and return its trainer in the state in which the run was left.

    Raises:
        RunError: the folder holds something else, or a run with other settings.
        DataError: the images are not there.
        CheckpointError: the run's checkpoint is damaged.
    """
    processes = processes or Processes()
    sets = data.load(settings.data, settings.seed, root)
    model = build(settings, sets.images)
    recipe = settings.training
    held_out = None
    if recipe.watch_steps > 0 and recipe.watch_images > 0:
        held_out = sets.validation.tensors(min(recipe.watch_images, len(sets.validation)))
    # The trainer before the folder: what it refuses must not cost the run that the folder holds.
    trainer = Trainer(model, recipe, settings.seed, sets.train, held_out, out, processes, shard)
    if processes.first:
        folder = RunFolder.open(out, settings.as_dict(), restart, OUTPUTS, completed)
        folder.note_environment(environment.describe())
    processes.wait()
    trainer.resume()
    return trainer


def build(settings: Settings, images: ImageFormat) -> nn.Module:
    """Build the network of a run.

    Raises:
        UserError: the settings make none for these images.
    """
    try:
        return networks.build(settings.network, settings.activation, images, settings.seed)
    except ValueError as error:
        raise UserError(f"no {settings.network} with {settings.activation} for {settings.data}: {error}") from error


def check_tensorboard() -> None:
    """Raise a UserError where the package tensorboard is not there."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError("TensorBoard events need the package tensorboard: `pip install 'kafops[models]'`")


def tensorboard(folder: Path, done: int) -> tuple[Callable[[EpochRecord], None], Callable[[], None]]:
    """Return what writes an epoch's numbers to TensorBoard, events after epoch `done` replaced, and what closes it."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def write(record: EpochRecord) -> None:
        values = {
            "train/loss": record.loss,
            "train/accuracy": record.accuracy,
            "train/learning rate": record.lr,
            "held out/clean accuracy": record.clean,
            "held out/robust accuracy": record.robust,
            "held out/largest share of inputs outside a dictionary": record.outside,
        }
        for name, value in values.items():
            if value is not None:
                writer.add_scalar(name, value, record.epoch)
        writer.flush()

    return write, writer.close
