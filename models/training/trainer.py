"""Training of one network, resumable after any step with the same bits as if it had never stopped.

Every random number is a function of (seed, step), so a state is the weights, the optimizer's buffers and a place.
"""

import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models.data import Source
from models.support import checkpoints, files, seeds
from models.support.checkpoints import CheckpointError
from models.support.errors import UserError
from models.support.interrupts import Interrupted, StopRequest
from models.training import curves, outside
from models.training import processes as several
from models.training.lipschitz import Slopes
from models.training.methods import Step, exact
from models.training.noise import Noise
from models.training.optimizer import make_optimizer, set_learning_rate
from models.training.processes import Processes
from models.training.recipe import Recipe
from models.training.schedules import step_progress
from models.training.watch import Watch, Watched

LATEST, BEST, METRICS = "latest.safetensors", "best.safetensors", "metrics.jsonl"
_SAVE_SECONDS = 600.0  # within long epochs


class TrainingError(UserError):
    """Training cannot go on, with where it stopped and what to try."""


@dataclass
class Tally:
    """Sums over the images of an epoch so far."""

    images: int = 0
    correct: int = 0
    loss: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave: means over its training images as trained on, accuracies on held-out ones after it.

    `outside` is the largest share of inputs, over the KAF layers, that lie outside a dictionary; None without any.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float
    clean: float | None = None
    robust: float | None = None
    collapsed: bool = False
    outside: float | None = None


class Trainer:
    """Trains `model` by `recipe` on the images of `source`, and keeps its state in `folder`.

    The folder gets latest.safetensors after every epoch and at every stop, best.safetensors whenever the watch's
    accuracy is the best so far, metrics.jsonl with a line per epoch, and the curves of KAF layers before training and
    after every epoch (`models.training.curves`).

    Args:
        model: moved to the device of `processes`.
        recipe: see `Recipe`.
        seed: of the attack's noise and of random layers; the order of images is the source's.
        source: training images, see `models.data.Source`.
        held_out: images and labels for the watch, which no training image is among; None for no watch.
        folder: where to write.
        processes: who shares the batches; this process alone unless given.
        shard: shard parameters among processes (FSDP2) instead of copying them (DDP).

    Example:
        >>> trainer = Trainer(model, recipe, 0, data.train, data.validation.tensors(256), Path("runs/kaf"))
        >>> trainer.resume()
        >>> trainer.run()
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        seed: int,
        source: Source,
        held_out: tuple[Tensor, Tensor] | None,
        folder: Path,
        processes: Processes | None = None,
        shard: bool = False,
    ) -> None:
        self.processes = processes or Processes()
        self.recipe, self.seed, self.source, self.folder = recipe, seed, source, folder
        self.device = self.processes.device
        _check_shares(len(source), recipe.batch_size, self.processes.world)
        self.model = model.to(self.device)
        _check_one_image(self.model, source, recipe.batch_size, self.processes)
        if shard:
            _check_shardable(recipe, self.processes)
            several.shard(self.model, _large_units(self.model))
        self.trained = self.model if shard else self.processes.ddp(self.model)
        self.method = recipe.make_method()
        self.schedule = recipe.make_schedule()
        self.optimizer = make_optimizer(self.model, recipe)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "float16")
        self.average = _average(self.model, recipe.ema)
        self.slopes = Slopes(self.model, recipe)
        self.watch = Watch(recipe, *held_out) if held_out is not None and recipe.watch_steps > 0 else None
        self.epoch, self.batch = 0, 0
        self.tally = Tally()
        self.history: list[EpochRecord] = []
        self.best: float | None = None
        self.collapsed = False
        self.outside: outside.Outside | None = None  # of the last epoch done here
        self._saved = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        """The file with the whole state."""
        return self.folder / LATEST

    @property
    def result(self) -> nn.Module:
        """The network to evaluate: the average of the weights where there is one."""
        return self.model if self.average is None else self.average.module

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        return self.source.batches(self.recipe.batch_size)

    @property
    def steps_done(self) -> int:
        """Batches since the start of training."""
        return self.epoch * self.batches + self.batch

    @property
    def steps(self) -> int:
        """Batches of the whole training."""
        return self.recipe.epochs * self.batches

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.collapsed or self.epoch >= self.recipe.epochs

    def run(
        self,
        on_step: Callable[["Trainer"], None] = lambda trainer: None,
        on_epoch: Callable[[EpochRecord], None] = lambda record: None,
    ) -> None:
        """Train to the end, or until the watch sees training collapse.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM; the state is saved.
            TrainingError: the loss is not finite; the last good state is saved.
            CheckpointError: a checkpoint could not be written.
        """
        with _own_random_numbers(self.device), StopRequest() as stop:
            if self.steps_done == 0:
                curves.save(self.result, self.folder, 0, self.processes.first)
            while not self.finished:
                place, start = self.processes, time.perf_counter()
                batches = self.source.shuffled(
                    self.recipe.batch_size, self.epoch, self.batch, rank=place.rank, world=place.world
                )
                for x, y in batches:
                    self._progress()
                    stopping, saving = self._step(self._here(x), self._here(y), stop.requested)
                    self.tally.seconds += time.perf_counter() - start
                    on_step(self)
                    # A stop asked for in on_step is seen by this process at once, by others in the next step.
                    if stopping or (stop.requested and self.processes.world == 1):
                        self.save()
                        raise Interrupted
                    if saving:
                        self.save()
                    start = time.perf_counter()
                self._end_epoch()
                on_epoch(self.history[-1])
            if stop.requested:
                raise Interrupted

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _progress(self) -> None:
        progress = self.steps_done / self.steps
        for module in self.model.modules():
            set_progress = getattr(module, "set_progress", None)
            if callable(set_progress):
                set_progress(progress)

    def _step(self, x: Tensor, y: Tensor, stopping: bool) -> tuple[bool, bool]:
        """Do a batch; return whether some process is asked to stop, and whether one finds it time to save."""
        saving = time.monotonic() - self._saved > _SAVE_SECONDS
        torch.manual_seed(seeds.derived("layers", self.seed, self.steps_done, self.processes.rank))
        noise = seeds.generator(self.device, "noise", self.seed, self.steps_done)
        self.model.train()
        whole = min(self.recipe.batch_size, len(self.source) - self.batch * self.recipe.batch_size)
        share = len(x) * self.processes.world / whole
        step = Step(
            self.trained,
            self.model,
            lambda logits, y: F.cross_entropy(exact(logits), y, label_smoothing=self.recipe.label_smoothing),
            Noise(noise, whole, self.processes.rank, self.processes.world),
            self.scaler.get_scale() if self.scaler.is_enabled() else 1.0,
        )
        updates = self.method(step, x, y)
        for number in range(self.method.updates):
            lr = self._set_learning_rate(number)
            with self._precision():
                update = next(updates)
            sums = torch.stack([update.loss.detach().double() * len(y), (update.logits.argmax(1) == y).sum().double()])
            sums = torch.cat([sums, sums.new_tensor([len(y), stopping, saving])])
            loss, correct, images, stops, saves = self.processes.sum(sums).tolist()
            self._check_loss(loss / images, lr)
            self._descend(update.loss * share)
            self.tally.loss += loss / self.method.updates
            self.tally.correct += int(correct) if number == self.method.updates - 1 else 0
        with self._precision():
            next(updates, None)
        self.tally.images += int(images)
        self.batch += 1
        return stops > 0, saves > 0

    def _set_learning_rate(self, update: int) -> float:
        done = self.steps_done * self.method.updates + update
        epoch = self.recipe.epochs * step_progress(done, self.steps * self.method.updates)
        lr = self.recipe.lr * self.schedule(epoch)
        set_learning_rate(self.optimizer, lr)
        return lr

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.slopes.penalised(loss)).backward()
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.slopes.limit()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        dtype = getattr(torch, self.recipe.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _check_loss(self, loss: float, lr: float) -> None:
        if math.isfinite(loss):
            return
        kept = f"the state before epoch {self.epoch + 1} is in {self.checkpoint}" if self.epoch else "nothing was saved"
        if self.batch and self.checkpoint.exists():
            kept = f"the last state saved is in {self.checkpoint}"
        raise TrainingError(
            f"the loss became {loss} in epoch {self.epoch + 1}, batch {self.batch + 1} of {self.batches}, at learning "
            f"rate {lr:.3g}; {kept}. Try a lower learning rate (peak now {self.recipe.lr:g})"
        )

    def _check_weights(self, tensors: dict[str, Tensor]) -> None:
        """Raise rather than overwrite a good checkpoint by broken weights, as the last updates may leave them."""
        broken = [n for n, t in tensors.items() if n.startswith(("model", "average")) and t.is_floating_point()]
        broken = [name for name in broken if not tensors[name].isfinite().all()]
        if broken:
            kept = f"the state before is in {self.checkpoint}" if self.checkpoint.exists() else "nothing was saved"
            raise TrainingError(
                f"the network's weights are no longer finite after epoch {self.epoch + (self.batch > 0)} "
                f"({broken[0].partition('.')[2]} first of {len(broken)}); {kept}. Try a lower learning rate (peak now "
                f"{self.recipe.lr:g})"
            )

    def _end_epoch(self) -> None:
        sums, self.tally = self.tally, Tally()
        group = self.optimizer.param_groups[0]
        lr = group["lr"] / group["scale"]
        self.epoch, self.batch = self.epoch + 1, 0
        self.processes.mean_of_buffers(self.model)
        if self.average is not None:
            self.processes.mean_of_buffers(self.average)
        curves.save(self.result, self.folder, self.epoch, self.processes.first)
        means = sums.loss / sums.images, sums.correct / sums.images, lr, round(sums.seconds, 3)
        if self.watch is None:
            self.history.append(EpochRecord(self.epoch, *means))
            self.save()
            return
        # The first process decides: where others saw something else, some would stop and some go on.
        seen = Watched(*self.processes.first_says(astuple(self.watch.look(self.result, self.device))))
        self.collapsed = self.best is not None and self.watch.collapsed(self.best, seen)
        self.outside = self.processes.first_says(outside.measure(self.result, self.watch.images.to(self.device)))
        share = None if self.outside is None else self.outside.share
        self.history.append(EpochRecord(self.epoch, *means, seen.clean, seen.robust, self.collapsed, share))
        if self.collapsed:
            best = self.folder / BEST
            self._restore_weights(checkpoints.load(best)[0], best)
        elif self.best is None or seen.score > self.best:
            self.best = seen.score
            self._save(self.folder / BEST)
        self.save()

    def save(self) -> None:
        """Write latest.safetensors and metrics.jsonl."""
        self._save(self.checkpoint)
        if self.processes.first:
            lines = (json.dumps(asdict(record), allow_nan=False) for record in self.history)
            files.write_text(self.folder / METRICS, "".join(f"{line}\n" for line in lines))
        self._saved = time.monotonic()

    def _save(self, path: Path) -> None:
        optimizer_tensors, optimizer_values = checkpoints.flatten_optimizer(self.optimizer)
        tensors = {
            **checkpoints.prefixed("model", self.model.state_dict()),
            **checkpoints.prefixed("optimizer", optimizer_tensors),
            **checkpoints.prefixed("method", {n: self.processes.join(t) for n, t in self.method.state().items()}),
        }
        if self.average is not None:
            tensors |= checkpoints.prefixed("average", self.average.state_dict())
        tensors = {name: several.whole(tensor) for name, tensor in tensors.items()}
        self._check_weights(tensors)
        record = {
            "recipe": asdict(self.recipe),
            "seed": self.seed,
            "optimizer": optimizer_values,
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "tally": asdict(self.tally),
            "history": [asdict(r) for r in self.history],
            "best": self.best,
            "collapsed": self.collapsed,
        }
        if self.processes.first:
            checkpoints.save(path, tensors, record)
        self.processes.wait()

    def resume(self) -> bool:
        """Take up the state of latest.safetensors; return False, changing nothing, where there is none.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another network or recipe.
        """
        exists = self.checkpoint.exists()
        if self.processes.first_says(exists) != exists:
            raise CheckpointError(f"{self.checkpoint} is not seen by all processes; give them a folder that they share")
        if not exists:
            return False
        tensors, record = checkpoints.load(self.checkpoint)
        self._check_recipe(record)
        self._restore_weights(tensors, self.checkpoint)
        try:
            self._restore(tensors, record)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.checkpoint} lacks part of a training's state: {error!r}") from error
        return True

    def _restore_weights(self, tensors: dict[str, Tensor], origin: Path) -> None:
        wanted = self.model.state_dict()
        weights = {n: several.like(t, wanted.get(n)) for n, t in checkpoints.under("model", tensors).items()}
        checkpoints.load_weights(self.model, weights, origin)
        if self.average is not None:
            self.average.load_state_dict(checkpoints.under("average", tensors))

    def _restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        buffers = {
            name: several.like(t, parameters[int(name.partition(".")[0])])
            for name, t in checkpoints.under("optimizer", tensors).items()
        }
        checkpoints.restore_optimizer(self.optimizer, buffers, record["optimizer"])
        state = checkpoints.under("method", tensors).items()
        self.method.load_state({name: self.processes.cut(t).to(self.device) for name, t in state})
        self.scaler.load_state_dict(record["scaler"])
        self.epoch, self.batch = record["epoch"], record["batch"]
        self.tally = Tally(**record["tally"])
        self.history = [EpochRecord(**r) for r in record["history"]]
        self.best, self.collapsed = record["best"], record["collapsed"]

    def _check_recipe(self, record: dict[str, Any]) -> None:
        theirs, ours = ({**settings, "seed": s} for settings, s in (
            (_completed(record.get("recipe")), record.get("seed")), (asdict(self.recipe), self.seed)
        ))  # fmt: skip
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        if names:
            differences = ", ".join(f"{name} is {theirs.get(name)} there and {ours.get(name)} here" for name in names)
            raise CheckpointError(f"{self.checkpoint} was trained by another recipe: {differences}")


def _average(model: nn.Module, decay: float) -> AveragedModel | None:
    if decay == 0:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _completed(recipe: dict[str, Any] | None) -> dict[str, Any]:
    """Return the settings of a checkpoint with the defaults of those that are newer than it."""
    defaults = {field.name: field.default for field in fields(Recipe) if field.default is not MISSING}
    return {**defaults, **recipe} if recipe else {}


def _check_shares(images: int, batch_size: int, world: int) -> None:
    last = images % batch_size or batch_size
    if last < world:
        raise TrainingError(
            f"the last batch of an epoch has {last} of {images} images, fewer than the {world} processes to share it; "
            f"choose another batch size than {batch_size}"
        )


def _check_one_image(model: nn.Module, source: Source, batch_size: int, processes: Processes) -> None:
    """Refuse a batch that leaves a process one image, where a norm over the batch has one value of a channel then."""
    last = len(source) % batch_size or batch_size
    if last // processes.world > 1:
        return
    image = next(source.ordered(1, 1))[0].to(processes.device)
    try:
        with torch.no_grad(), _own_random_numbers(processes.device):
            copy.deepcopy(model).train()(image)
    except ValueError as error:
        raise TrainingError(
            f"the last of an epoch's batches of {batch_size} leaves a process one of {len(source)} images, on which "
            f"this network cannot be trained ({error}); choose another batch size"
        ) from error


def _check_shardable(recipe: Recipe, processes: Processes) -> None:
    if processes.world == 1:
        raise TrainingError(
            "parameters are sharded among several processes, and there is one; start with "
            "torchrun --nproc-per-node=N -m models ..."
        )
    if recipe.slope_penalty > 0 or recipe.slope_limit is not None:
        raise TrainingError("slopes of sharded curves cannot be penalised or limited; use neither, or DDP")
    if recipe.ema > 0:
        raise TrainingError("an average of the weights (ema) cannot be kept of sharded ones; use ema=0, or DDP")


def _large_units(model: nn.Module) -> Iterator[nn.Module]:
    """Return the residual blocks, which are what FSDP2 gathers one at a time."""
    return (module for module in model.modules() if type(module).__name__.endswith(("Block", "Bottleneck")))


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
