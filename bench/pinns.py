"""Physics-informed networks with curves, with tanh and with the reference: time, memory, errors of trained ones.

`python -m bench.pinns costs` times training steps; `python -m bench.pinns train` tunes the learning rate of each
activation and trains over seeds. Each prints a table.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import pi

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

import kafops
from bench.paired import spread
from bench.points import WIDTH, kaf, network, peak_bytes
from bench.problems import Call

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "KAF": kaf,
    'KAF, base="silu"': partial(kafops.KAF, WIDTH, base="silu", channel_dim=-1),
}


@dataclass(frozen=True)
class Equation:
    """A differential equation on the unit square, of points p = (x, y) or (x, t), and its solution.

    Attributes:
        solution: u at points [N, 2], to compare with.
        residual: of points, u's gradient [N, 2], u_xx and u_yy or u_tt [N].
        sides: of the square, on which u is given: x = 0, x = 1, y = 0, y = 1.
        starts_at_rest: whether u_t = 0 is given at t = 0.
    """

    solution: Callable[[Tensor], Tensor]
    residual: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    sides: int = 3
    starts_at_rest: bool = False


EQUATIONS = {
    "Poisson": Equation(
        lambda p: torch.sin(pi * p[:, 0]) * torch.sin(pi * p[:, 1]),
        lambda p, du, u_xx, u_yy: u_xx + u_yy + 2 * pi**2 * torch.sin(pi * p[:, 0]) * torch.sin(pi * p[:, 1]),
        sides=4,
    ),
    "heat": Equation(
        lambda p: torch.exp(-0.1 * pi**2 * p[:, 1]) * torch.sin(pi * p[:, 0]),
        lambda p, du, u_xx, u_tt: du[:, 1] - 0.1 * u_xx,
    ),
    "wave": Equation(
        lambda p: torch.sin(pi * p[:, 0]) * torch.cos(pi * p[:, 1]),
        lambda p, du, u_xx, u_tt: u_tt - u_xx,
        starts_at_rest=True,
    ),
}


Derivatives = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor, Tensor]]


def by_autograd(u: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return u's gradient [N, 2], and its second derivatives along both coordinates [N]."""
    points = points.detach().requires_grad_()
    (du,) = torch.autograd.grad(u(points).sum(), points, create_graph=True)
    second = [torch.autograd.grad(du[:, i].sum(), points, create_graph=True)[0][:, i] for i in (0, 1)]
    return du, second[0], second[1]


def by_func(u: Callable[[Tensor], Tensor], points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same by torch.func, forward over reverse."""
    gradient = grad(lambda p: u(p).sum())
    along_x, along_y = (e.expand_as(points) for e in torch.eye(2, dtype=points.dtype))
    by_x, by_y = jvp(gradient, (points,), (along_x,)), jvp(gradient, (points,), (along_y,))
    return by_x[0], by_x[1][:, 0], by_y[1][:, 1]


def loss_of(
    equation: Equation, derivatives: Derivatives, u: Callable[[Tensor], Tensor], inner: Tensor, edge: Tensor
) -> Tensor:
    residual = equation.residual(inner, *derivatives(u, inner))
    loss = residual.square().mean() + 100 * (u(edge) - equation.solution(edge)).square().mean()
    if equation.starts_at_rest:
        start = edge * torch.tensor([1.0, 0.0])
        u_t = jvp(u, (start,), (torch.tensor([0.0, 1.0]).expand_as(start),))[1]
        loss = loss + 10 * u_t.square().mean()
    return loss


def points_of(equation: Equation, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return points in the square, and a quarter as many on those of its sides where u is given."""
    inner = torch.rand(count, 2, generator=generator)
    edge = torch.rand(count // 4, 2, generator=generator)
    side = torch.randint(equation.sides, (count // 4,), generator=generator)
    return inner, edge.scatter(1, (side // 2)[:, None], (side % 2)[:, None].float())


# --------------------------------------------------------------------------------------------------------------- costs


def step(equation: Equation, activation: Callable[[], nn.Module], way: str, compiled: bool, count: int) -> Call:
    """Return the call that makes the gradients of the loss in all parameters."""
    net = network(activation)
    parameters: dict[str, Tensor] = dict(net.named_parameters())
    inner_and_edge = points_of(equation, count, torch.Generator())
    buffers = dict(net.named_buffers())

    def loss(parameters: dict[str, Tensor], inner: Tensor, edge: Tensor) -> Tensor:
        def u(p: Tensor) -> Tensor:
            return functional_call(net, (parameters, buffers), (p,)).squeeze(-1)

        return loss_of(equation, by_func if way == "torch.func" else by_autograd, u, inner, edge)

    def gradients(inner: Tensor, edge: Tensor) -> tuple[Tensor, ...]:
        if way == "torch.func":
            return tuple(grad(loss)(parameters, inner, edge).values())
        return torch.autograd.grad(loss(parameters, inner, edge), tuple(parameters.values()), allow_unused=True)

    if compiled:
        gradients = torch.compile(gradients, fullgraph=True)
    return lambda: gradients(*inner_and_edge)


def costs(count: int, rounds: int) -> Iterator[str]:
    """Yield rows: time and bytes of KAF's step and of the reference's, as multiples of those of tanh's."""
    yield f"| {count} points | derivatives by | time: KAF | compiled | plain PyTorch | memory: KAF | plain PyTorch |"
    yield "|---|---|---|---|---|---|---|"
    for name, equation in EQUATIONS.items():
        for way in ("autograd", "torch.func"):
            make = partial(step, equation, way=way, count=count)
            times, memory = [], []
            for compiled in (False, True):
                torch._dynamo.reset()
                curves, tanh = (make(activation=ACTIVATIONS[a], compiled=compiled) for a in ("KAF", "tanh"))
                times.append(spread(in_turn(curves, tanh, rounds)).median)
                if not compiled:
                    memory.append(peak_bytes(curves) / peak_bytes(tanh))
            tanh = make(activation=nn.Tanh, compiled=False)
            with kafops.backend("reference"):
                plain = make(activation=ACTIVATIONS["KAF"], compiled=False)
                times.append(spread(in_turn(plain, tanh, 3)).median)
                memory.append(peak_bytes(plain) / peak_bytes(tanh))
            columns = [name, way, *(f"{t:.1f}" for t in times), *(f"{m:.1f}" for m in memory)]
            yield f"| {' | '.join(columns)} |"


def in_turn(candidate: Call, baseline: Call, rounds: int) -> list[float]:
    """Return ratios of the times of two calls, made in turn."""
    calls = [candidate, baseline]
    for call in calls:
        call()
    ratios = []
    for _ in range(rounds):
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        ratios.append(times[0] / times[1])
    return ratios


# --------------------------------------------------------------------------------------------------------------- train


def train(equation: Equation, activation: Callable[[], nn.Module], rate: float, steps: int, seed: int) -> float:
    """Train a network by Adam, rates falling along a cosine, and return its error: |u − solution| / |solution|."""
    net = network(activation, seed)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        inner, edge = points_of(equation, 512, generator)
        optimizer.zero_grad()
        loss_of(equation, by_autograd, lambda p: net(p).squeeze(-1), inner, edge).backward()
        optimizer.step()
        falling.step()
    grid = torch.linspace(0, 1, 51)
    points = torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        exact = equation.solution(points)
        return ((net(points).squeeze(-1) - exact).norm() / exact.norm()).item()


def errors(steps: int, seeds: int) -> Iterator[str]:
    """Yield rows: errors over seeds at the best of RATES for each activation, chosen by two further seeds."""
    yield "| equation | activation | learning rate | median error | lowest | highest |"
    yield "|---|---|---|---|---|---|"
    for name, equation in EQUATIONS.items():
        for title, activation in ACTIVATIONS.items():
            tried = {r: max(train(equation, activation, r, steps, 100 + seed) for seed in (0, 1)) for r in RATES}
            rate = min(tried, key=lambda r: tried[r])
            found = [train(equation, activation, rate, steps, seed) for seed in range(seeds)]
            median = statistics.median(found)
            yield f"| {name} | {title} | {rate:g} | {median:.1e} | {min(found):.1e} | {max(found):.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("costs", "train"))
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    torch._dynamo.config.trace_autograd_ops = True  # torch.autograd.grad within what is compiled
    rows = costs(given.points, given.rounds) if given.what == "costs" else errors(given.steps, given.seeds)
    for row in rows:
        print(row, flush=True)


if __name__ == "__main__":
    main()
