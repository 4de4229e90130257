"""The settings of a training, checked before anything is loaded or computed."""

from dataclasses import dataclass

from models.training.methods import METHODS, Method
from models.training.schedules import SCHEDULES, Schedule

PRECISIONS = ("float32", "bfloat16", "float16")
DECAYS = ("weights", "linear", "all")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what training does, besides network, data and seed.

    Args:
        epochs, batch_size: passes over the images, and images in a batch, over all processes; the last may be smaller.
        lr: peak learning rate of the schedule.
        method: how a batch becomes a loss, such as nfgsm:k=2; see `models.training.methods`.
        eps: radius of the adversarial training, and of the watch's attack; images are in [0, 1].
        schedule: see `models.training.schedules`.
        momentum, nesterov, weight_decay: of SGD.
        decay: what decays: "weights" of convolutions and linear layers; those of "linear" layers alone; "all": norms,
            biases and activation parameters too, as in the reference code of Wong et al. 2020.
        activation_lr: learning rate of activation parameters, as a multiple of lr; 0 leaves them as they start.
        clip: largest norm of the gradient of all parameters, or None.
        label_smoothing: of the cross-entropy that is minimised, in [0, 1).
        slope_penalty: weight in the loss of max(0, max |f′| / std f − 1.71)², on average over the curves f of all KAF
            layers; 0 for no such term. See `models.training.lipschitz`.
        slope_limit: largest |f′| of a KAF layer's curve: after each update steeper ones are scaled down to it; or None.
        precision: "float32", or automatic mixed precision in "bfloat16" or "float16" (whose losses are scaled).
        ema: decay per step of an exponential moving average of the weights, which is then what is watched and
            evaluated; 0 for none.
        watch_steps, watch_images, watch_drop: after each epoch PGD of so many steps attacks at most so many held-out
            images; if robust accuracy is more than `watch_drop` below the best so far, training has collapsed
            (catastrophic overfitting): the best state is restored and training stops. No steps or no drop: no watch or
            no stop.
    """

    epochs: int
    batch_size: int
    lr: float
    method: str = "nfgsm"
    eps: float = 8 / 255
    schedule: str = "triangular"
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay: str = "weights"
    activation_lr: float = 1.0
    clip: float | None = None
    label_smoothing: float = 0.0
    slope_penalty: float = 0.0
    slope_limit: float | None = None
    precision: str = "float32"
    ema: float = 0.0
    watch_steps: int = 10
    watch_images: int = 256
    watch_drop: float = 0.2

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _check("lr", self.lr, self.lr > 0, "above 0")
        for name in ("activation_lr", "weight_decay", "slope_penalty", "watch_steps", "watch_images"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        for name in ("momentum", "label_smoothing", "ema"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "in [0, 1)")
        for name in ("eps", "watch_drop"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "in [0, 1]")
        for name in ("clip", "slope_limit"):
            value = getattr(self, name)
            _check(name, value, value is None or value > 0, "above 0, or none")
        _check("precision", self.precision, self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        _check("decay", self.decay, self.decay in DECAYS, f"one of {', '.join(DECAYS)}")
        _check("momentum", self.momentum, self.momentum > 0 or not self.nesterov, "above 0 for Nesterov's")
        self.make_schedule()
        if self.make_method().attacks and self.eps == 0:
            raise ValueError(f"method {self.method} attacks, so eps must be above 0, got 0; or use method=standard")

    def make_schedule(self) -> Schedule:
        """Return the factor of `lr` as a function of the epoch."""
        return SCHEDULES.create(self.schedule, self.epochs)

    def make_method(self) -> Method:
        """Return a fresh method; it may hold state."""
        return METHODS.create(self.method, self.eps)


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {wanted}, got {value}")
