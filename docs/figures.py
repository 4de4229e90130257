"""Draws the figures of docs/mathematics.md: `python docs/figures.py`."""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

import kafops

FOLDER = Path(__file__).parent / "figures"
GREY, PALE, BLUE, VERMILLION, GREEN = "#4d4d4d", "#d9d9d9", "#0072b2", "#d55e00", "#009e73"
RC = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
F64 = torch.float64


def grid(boundary: float, count: int = 1201) -> torch.Tensor:
    """Return even numbers on [-boundary, boundary]."""
    return torch.linspace(-boundary, boundary, count, dtype=F64)


def kernels() -> Figure:
    """Draw a curve as the sum of its kernels."""
    points, x = torch.linspace(-3, 3, 8, dtype=F64), grid(5)
    alpha = torch.tensor([-0.2, -0.5, -0.1, 0.3, 0.2, 0.9, 0.6, 1.1], dtype=F64)
    gamma = 1 / (6 * (6 / 7) ** 2)
    terms = alpha * torch.exp(-gamma * (x[:, None] - points) ** 2)
    figure = Figure(figsize=(5.6, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=PALE, lw=0.8)
    axes.plot(x, terms, color=BLUE, lw=1, alpha=0.6, label=["α κ(√γ (x − δ)), for each point", *7 * ["_"]])
    axes.plot(x, terms.sum(1), color=VERMILLION, lw=2, label="f(x), their sum")
    axes.plot(points, np.zeros(8), "|", color=GREY, ms=9, label="points δ of the dictionary")
    axes.legend(loc="upper left")
    axes.set_xlabel("x")
    return figure


def starts() -> Figure:
    """Draw curves of four starts."""
    x = grid(4.5)
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    for axes, init in zip(panels.flat, ("elu", "silu", "isometric", "normal"), strict=True):
        torch.manual_seed(3)
        layer = kafops.KAF(4, init=init, dtype=F64)
        axes.axvspan(-3, 3, color=PALE, alpha=0.35, lw=0)
        curves = layer(x[:, None].expand(-1, 4)).detach()
        for curve in curves.T[: 1 if init in ("elu", "silu") else 4]:
            axes.plot(x, curve, color=VERMILLION, lw=1.5, alpha=0.8)
        if init in ("elu", "silu"):
            axes.plot(x, getattr(torch.nn.functional, init)(x), "--", color=BLUE, lw=1)
        axes.set_title(f'init="{init}"', fontsize=9, loc="left")
    for axes in panels[1]:
        axes.set_xlabel("x")
    return figure


def cells() -> Figure:
    """Draw a curve, its cells, and how far polynomials of degree 5 on them are from it."""
    torch.manual_seed(1)
    layer = kafops.KAF(1, init="isometric", dtype=F64)
    step = 6 / 19
    edges = np.arange(-3, 3 + step / 2, step)
    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    size = layer.alpha.abs().sum().item()

    def curve(x: np.ndarray) -> np.ndarray:
        return layer(torch.from_numpy(x)[:, None]).detach().numpy()[:, 0]

    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        nodes = (low + high) / 2 + (high - low) / 2 * np.cos(np.pi * (np.arange(6) + 0.5) / 6)
        x = np.linspace(low, high, 61)
        found = np.polynomial.Chebyshev.fit(nodes, curve(nodes), 5, domain=(low, high))(x)
        top.plot(x, curve(x), color=(VERMILLION, BLUE)[index % 2], lw=2)
        bottom.semilogy(x, np.abs(found - curve(x)) / size + 1e-18, color=(VERMILLION, BLUE)[index % 2], lw=1)
        top.axvline(low, color=PALE, lw=0.6, zorder=0)
    bottom.axhline(2.0**-24, color=GREY, lw=0.8, ls=":")
    bottom.annotate("float32's rounding", (3, 2.0**-24), (3, 9e-8), ha="right", color=GREY, fontsize=8)
    bottom.set_ylim(1e-13, 1e-6)
    bottom.set_ylabel("error / Σ|α|")
    top.set_ylabel("f(x)")
    bottom.set_xlabel("x")
    return figure


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    with mpl.rc_context(RC):
        for draw in (kernels, starts, cells):
            draw().savefig(FOLDER / f"{draw.__name__}.png", dpi=170, metadata={"Software": None})
