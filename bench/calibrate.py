"""What conversion and calibration do to a trained ReLU network without norms, on scikit-learn's digits.

Prints the table of docs/calibrate.md, and draws docs/calibrated.png.
"""

import argparse
import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kafops

STARTS: dict[str, dict[str, Any]] = {
    '`init="relu"`': {"init": "relu"},
    '`init="same"`': {"init": "same"},
    '`init="same"`, points and γ learned': {"init": "same", "learn_dictionary": True, "learn_gamma": True},
    '`base="same"`': {"base": "same"},
}


def digits() -> tuple[Tensor, Tensor]:
    """Return the 1797 images [N, 1, 8, 8] in [0, 1] in a fixed random order, and their labels."""
    x, y = load_digits(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8)[order] / 16, torch.tensor(y)[order]


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Sequential:
    """Return a convolutional network with four ReLUs and no norm, trained with Adam."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that are classified right."""
    with torch.no_grad():
        return (model(x).argmax(1) == y).double().mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train, convert, calibrate, and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="of training (default 12)")
    parser.add_argument("--figure", type=Path, default=Path("docs/calibrated.png"), help="where to draw")
    options = parser.parse_args(arguments)
    x, y = digits()
    train, test = slice(0, 1300), slice(1300, None)
    model = trained(x[train], y[train], options.epochs)
    print(f"ReLU: {accuracy(model, x[test], y[test]):.1%} of {len(x[test])} test images\n")
    print("| | converted | calibrated | inputs outside, at most |\n|---|---|---|---|")
    for name, start in STARTS.items():
        curved = copy.deepcopy(model)
        kafops.replace_activations(curved, partial(kafops.KAF, **start), example_input=x[:8])
        before = accuracy(curved, x[test], y[test])
        report = kafops.calibrate(curved, x[train].split(100))
        worst = [max(c.outside[i] for c in report.values()) for i in (0, 1)]
        after = accuracy(curved, x[test], y[test])
        print(f"| {name} | {before:.1%} | {after:.1%} | {worst[0]:.0%} → {worst[1]:.2%} |", flush=True)
        if start == {"init": "same"}:
            figure, table = kafops.plot(curved, x[train]), report
    figure.savefig(options.figure)
    print(f"\n{table}\n\n{options.figure}")


if __name__ == "__main__":
    main()
