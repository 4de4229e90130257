"""What a network has to know about the images it is for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageFormat:
    """Images [N, channels, size, size] in [0, 1] of `classes` classes, with mean and deviation of the training set."""

    channels: int
    size: int
    classes: int
    mean: tuple[float, ...]  # per channel
    std: tuple[float, ...]  # per channel

    def __post_init__(self) -> None:
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError(f"{self.channels} channels need as many means and deviations, got {self.mean}, {self.std}")


MNIST = ImageFormat(1, 28, 10, (0.1307,), (0.3081,))
FASHION = ImageFormat(1, 28, 10, (0.2860,), (0.3530,))
DIGITS = ImageFormat(1, 8, 10, (0.3053,), (0.3760,))
CIFAR10 = ImageFormat(3, 32, 10, (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ImageFormat(3, 32, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
SVHN = ImageFormat(3, 32, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970))
IMAGENET = ImageFormat(3, 224, 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
