"""Adversarial training of one network, resumable after any step with the same bits as if it had never stopped."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import checkpoints
from models.attacks import LinfAttack, perturb
from models.checkpoints import CheckpointError
from models.errors import UserError
from models.interrupts import Interrupted, StopRequest
from models.schedules import step_progress, triangular


class TrainingError(UserError):
    """Training cannot go on, with where it stopped and what to try."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training does, besides network and data.

    Args:
        epochs, batch_size: the last batch of an epoch may be smaller.
        lr: peak of the triangular one-cycle schedule.
        seed: of data order and attack noise.
        attack: with which each batch is perturbed.
        momentum, nesterov, weight_decay: of SGD; weights of convolutions and linear layers decay, nothing else does.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    attack: LinfAttack
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4


@dataclass
class Tally:
    """Sums over the images of an epoch so far."""

    images: int = 0
    correct: int = 0
    loss: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class EpochRecord:
    """What one epoch gave: means over its perturbed training images."""

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float


class Trainer:
    """Trains `model` by `recipe` on images [N, C, H, W] in [0, 1], and keeps its state in the file `checkpoint`.

    The data order is a function of (seed, epoch); the noise comes from one generator whose state is saved.

    Example:
        >>> trainer = Trainer(model, recipe, images, labels, Path("runs/demo/relu/latest.safetensors"))
        >>> trainer.resume()
        >>> trainer.run()
    """

    def __init__(self, model: nn.Module, recipe: Recipe, images: Tensor, labels: Tensor, checkpoint: Path) -> None:
        self.model, self.recipe, self.checkpoint = model, recipe, checkpoint
        self.images, self.labels = images, labels
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, recipe.weight_decay),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
        )
        self.noise = torch.Generator(images.device).manual_seed(recipe.seed)
        self.global_random = torch.Generator().manual_seed(recipe.seed).get_state()
        self.epoch, self.batch = 0, 0
        self.tally = Tally()
        self.history: list[EpochRecord] = []

    @property
    def batches(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.images) / self.recipe.batch_size)

    @property
    def steps_done(self) -> int:
        """Optimizer steps taken since the start of training."""
        return self.epoch * self.batches + self.batch

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.recipe.epochs * self.batches

    def run(self, on_step: Callable[["Trainer"], None] = lambda trainer: None) -> None:
        """Train to the end, saving after every epoch.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM; the state is saved.
            TrainingError: the loss is not finite; the last good state is saved.
            CheckpointError: a checkpoint could not be written.
        """
        with torch.random.fork_rng(devices=[]), StopRequest() as stop:
            torch.set_rng_state(self.global_random)
            while self.epoch < self.recipe.epochs:
                order = epoch_order(len(self.images), self.recipe.seed, self.epoch).split(self.recipe.batch_size)
                while self.batch < len(order):
                    self._step(order[self.batch])
                    on_step(self)
                    if stop.requested:
                        self.save()
                        raise Interrupted
                self._end_epoch()
                self.save()

    def save(self) -> None:
        """Write the checkpoint."""
        self.global_random = torch.get_rng_state()
        optimizer_tensors, optimizer_values = checkpoints.flatten_optimizer(self.optimizer)
        tensors = {
            **checkpoints.prefixed("model", self.model.state_dict()),
            **checkpoints.prefixed("optimizer", optimizer_tensors),
            "random.noise": self.noise.get_state(),
            "random.global": self.global_random,
        }
        record = {
            "recipe": asdict(self.recipe),
            "optimizer": optimizer_values,
            "epoch": self.epoch,
            "batch": self.batch,
            "tally": asdict(self.tally),
            "history": [asdict(r) for r in self.history],
        }
        checkpoints.save(self.checkpoint, tensors, record)

    def resume(self) -> bool:
        """Take up the state of the checkpoint; return False, changing nothing, where there is none.

        Raises:
            CheckpointError: the checkpoint is damaged, or of another network or recipe.
        """
        if not self.checkpoint.exists():
            return False
        tensors, record = checkpoints.load(self.checkpoint)
        self._check_recipe(record)
        load_model(self.model, tensors, self.checkpoint)
        try:
            self._restore(tensors, record)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{self.checkpoint} lacks a part that resuming needs: {error}") from error
        return True

    def _restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        checkpoints.restore_optimizer(self.optimizer, checkpoints.under("optimizer", tensors), record["optimizer"])
        self.noise.set_state(tensors["random.noise"])
        self.global_random = tensors["random.global"]
        self.epoch, self.batch = record["epoch"], record["batch"]
        self.tally = Tally(**record["tally"])
        self.history = [EpochRecord(**r) for r in record["history"]]

    def _check_recipe(self, record: dict[str, Any]) -> None:
        theirs, ours = record.get("recipe"), asdict(self.recipe)
        if theirs != ours:
            raise CheckpointError(f"{self.checkpoint} was trained by another recipe: {theirs}, not {ours}")

    def _step(self, chosen: Tensor) -> None:
        start = time.perf_counter()
        self.model.train()
        lr = triangular(step_progress(self.steps_done, self.steps), self.recipe.lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        y = self.labels[chosen]
        x = perturb(self.model, self.images[chosen], y, self.recipe.attack, self.noise)
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self._check_loss(loss.item(), lr)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.batch += 1
        self.tally.images += len(y)
        self.tally.correct += int((logits.argmax(1) == y).sum())
        self.tally.loss += loss.item() * len(y)
        self.tally.seconds += time.perf_counter() - start

    def _check_loss(self, loss: float, lr: float) -> None:
        if math.isfinite(loss):
            return
        kept = f"the state before epoch {self.epoch + 1} is in {self.checkpoint}" if self.epoch else "nothing was saved"
        raise TrainingError(
            f"the loss became {loss} in epoch {self.epoch + 1}, batch {self.batch + 1} of {self.batches}, at learning "
            f"rate {lr:.3g}; {kept}. Try a lower learning rate (peak now {self.recipe.lr:g})"
        )

    def _end_epoch(self) -> None:
        sums = self.tally
        lr = self.optimizer.param_groups[0]["lr"]
        record = EpochRecord(
            self.epoch + 1, sums.loss / sums.images, sums.correct / sums.images, lr, round(sums.seconds, 3)
        )
        self.history.append(record)
        self.epoch, self.batch, self.tally = self.epoch + 1, 0, Tally()


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """Return a random order of `count` images, a function of (seed, epoch)."""
    # One seed per pair, far apart in the generator's 64-bit seed space.
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 24) + epoch))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into weights of convolutions and linear layers, which decay, and the rest, which do not.

    The rest are biases, norms and activation parameters: decay would pull learned curves towards 0.
    """
    decaying = {
        module.weight: None
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) and module.weight.requires_grad
    }
    others = [p for p in model.parameters() if p.requires_grad and p not in decaying]
    return [
        {"params": list(decaying), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def load_model(model: nn.Module, tensors: dict[str, Tensor], origin: Path) -> None:
    """Load the model part of a checkpoint, or raise a CheckpointError that says what does not fit."""
    try:
        model.load_state_dict(checkpoints.under("model", tensors))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{origin} is of another network: {error}") from error
