"""Curves kept from being steep in training: the penalty, the limit, and that nothing else changes."""

import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from test_training import RECIPE, assert_same_state, images, network, press_ctrl_c_after, trainer
from torch import nn

import kafops
from models import runs
from models.data import TensorSource
from models.runs.settings import Settings, completed
from models.support import checkpoints
from models.support.interrupts import Interrupted
from models.training import Recipe, Trainer, TrainingError, lipschitz
from models.training.curves import rank
from models.training.lipschitz import (
    FREE,
    SlopeError,
    Slopes,
    base_slope,
    curve_slopes,
    limit_slopes,
    penalty,
    steepness,
)
from models.training.processes import Processes
from models.training.trainer import _check_shardable

CONTROLLED = dataclasses.replace(RECIPE, slope_penalty=0.3, slope_limit=0.9, ema=0.9)


def one_node(*heights: float) -> kafops.KAF:
    """Curves α exp(-x² / 2): their slopes go up to |α| exp(-1/2)."""
    layer = kafops.KAF(len(heights), 1, gamma=0.5)
    layer.alpha.data = torch.tensor(heights)[:, None]
    return layer


LAYERS = {
    "common bandwidth": lambda: kafops.KAF(5, init=kafops.init.Normal(1.0)),
    "one curve": lambda: kafops.KAF(1, init="relu"),
    "bandwidths by channel": lambda: kafops.KAF(3, gamma=torch.tensor([0.5, 2.0, 30.0])),
    "learned": lambda: kafops.KAF(4, learn_gamma=True, learn_dictionary=True),
    "double": lambda: kafops.KAF(2, init="silu", dtype=torch.float64),
    "rational quadratic": lambda: kafops.KAF(4, kernel="rational_quadratic"),
    "matern32": lambda: kafops.KAF(4, kernel="matern32", learn_gamma=True),
    "bspline": lambda: kafops.KAF(4, kernel="bspline"),
    "1d": lambda: kafops.KAF1d(3),
    "2d, learned": lambda: kafops.KAF2d(3, learn_gamma=True),
    "3d, learned": lambda: kafops.KAF3d(3, learn_gamma=True),
    "identity": lambda: kafops.KAF(4, init="normal", base="identity"),
    "relu": lambda: kafops.KAF(4, init="normal", base="relu"),
    "relu, learned": lambda: kafops.KAF(4, init="normal", base="relu", learn_gamma=True, learn_dictionary=True),
    "silu, channels last": lambda: kafops.KAF(4, init="normal", base="silu", channel_dim=-1, learn_gamma=True),
    "gelu, wide": lambda: kafops.KAF2d(4, init="normal", base="gelu", gamma=0.05),
}


def test_the_penalty_by_hand() -> None:
    """E exp(-x²) = 1/√3 and E exp(-x²/2) = 1/√2, so a curve of one node has the steepness 2.18, at any height."""
    steep = math.exp(-0.5) / math.sqrt(1 / math.sqrt(3) - 1 / 2)
    layers = [one_node(3.0, -0.02), one_node(0.5), one_node(0.0)]
    # The grid comes within 1 % of the steepest point.
    assert torch.cat([steepness(layer) for layer in layers]).tolist() == pytest.approx([steep] * 3 + [0], rel=0.01)
    found = penalty(layers)
    assert found.item() == pytest.approx(3 / 4 * (steep - FREE) ** 2, rel=0.1)  # of steep - 1.71 the 1 % is 5 %
    found.backward()
    for layer in layers:
        assert layer.alpha.grad.abs().max() < 1e-3  # no height helps


@pytest.mark.parametrize("name", LAYERS)
def test_steepness_is_the_steepest_slope_over_the_deviation(name: str) -> None:
    """The deviation by a sum over 20,000 points, in float64; half of 1 % is the grid's, for the steepest slope."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    x = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2) / torch.exp(-x.square() / 2).sum()
    double = copy.deepcopy(layer).double()
    double.channel_dim = 1
    y = double(x.view(-1, 1, *(1,) * (rank(layer) - 2)).expand(-1, layer.num_parameters, *(1,) * (rank(layer) - 2)))
    y = y.detach().flatten(1)
    deviation = (weights @ y.square() - (weights @ y).square()).sqrt()
    assert steepness(layer).tolist() == pytest.approx((layer.bounds().lipschitz / deviation).tolist(), rel=0.01)


def test_as_steep_as_relu_is_free() -> None:
    """A million normal numbers have their deviation within 0.3 %."""
    deviation = torch.randn(10**6, generator=torch.Generator().manual_seed(0)).relu().std().item()
    assert 1 / deviation == pytest.approx(FREE, rel=3e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_the_grid_misses_no_more_than_a_hundredth(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    true = layer.bounds().lipschitz
    found = curve_slopes(layer).abs().amax(0).double()
    assert (found <= true * (1 + 1e-5)).all()  # float32
    assert (found >= true * 0.99).all()


@pytest.mark.parametrize("name", LAYERS)
def test_after_the_limit_no_curve_is_steeper(name: str) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    before, steep = layer.alpha.detach().clone(), layer.bounds().lipschitz
    most = max(steep.median().item(), base_slope(layer.base) + 0.1)
    limit_slopes(layer, most)
    assert (layer.bounds().lipschitz <= most).all()
    kept = (steep < 0.98 * most).to(torch.bool)
    assert torch.equal(layer.alpha[kept], before[kept])
    # Shapes stay: each channel is scaled as a whole, and no further than the limit asks.
    factors = layer.alpha.detach() / before
    assert (factors.amax(1) - factors.amin(1) < 1e-5).all()
    assert (layer.bounds().lipschitz[~kept] >= 0.97 * most).all()


@pytest.mark.parametrize("base", [None, "relu", "gelu"])
def test_the_penalty_is_differentiable_by_all_that_is_learned(
    base: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a difference quotient in a direction that changes everything, on a grid that stays."""
    layer = kafops.KAF(
        3, init=kafops.init.Normal(2.0), learn_gamma=True, learn_dictionary=True, dtype=torch.float64, base=base
    )
    grid = lipschitz._grid(layer.points(), layer.bandwidths())
    monkeypatch.setattr(lipschitz, "_grid", lambda points, bandwidths: grid.clone())
    penalty([layer]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    parameters = list(layer.parameters())
    torch.manual_seed(0)
    directions = [torch.randn_like(p) for p in parameters]
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True)).item()
    values, step = [], 1e-6
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += sign * step * d
            values.append(penalty([layer]).item())
            for p, d in zip(parameters, directions, strict=True):
                p -= sign * step * d
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("flipped", [False, True])
def test_steep_ends_of_a_dictionary_are_seen(flipped: bool) -> None:
    """Of a dictionary beyond ±5 whose last two kernels are a plateau: it falls where the dictionary has ended."""
    layer = kafops.KAF(2, 9, 8.0, gamma=torch.tensor([0.7, 0.4]))
    alpha = torch.tensor([2.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1]).expand(2, -1)
    layer.alpha.data = alpha.flip(1) if flipped else alpha.clone()
    inside = layer.bounds(-8.0, 8.0).lipschitz
    assert (inside < 0.7 * layer.bounds().lipschitz).all()
    limit_slopes(layer, 0.5)
    assert (layer.bounds().lipschitz <= 0.5).all()
    assert (layer.bounds().lipschitz >= 0.485).all()


@pytest.mark.parametrize(("base", "largest"), [("identity", 1.0), ("relu", 1.0), ("silu", 1.09984), ("gelu", 1.12890)])
def test_a_limit_holds_for_base_and_curve_together(base: str, largest: float) -> None:
    """Down to the base's own slope, at which no curve that adds to it there is left."""
    assert base_slope(base) == pytest.approx(largest, abs=1e-5)
    assert base_slope(None) == 0
    for most in (largest + 1e-5, 1.2, 1.5, 3.0):
        torch.manual_seed(0)
        layer = kafops.KAF(6, init=kafops.init.Normal(0.5), base=base)
        before = layer.alpha.detach().clone()
        steep = layer.bounds().lipschitz
        limit_slopes(layer, most)
        found = layer.bounds().lipschitz
        assert (found <= most).all()
        assert torch.equal(layer.alpha[steep < 0.98 * most - 0.01], before[steep < 0.98 * most - 0.01])
        scaled = steep > most
        assert (found[scaled] >= 0.97 * most - 0.01).all()  # no further than the limit asks
    flatter = kafops.KAF(1, 1, gamma=0.5, base=base, init="zeros")
    flatter.alpha.data.fill_(0.1)
    limit_slopes(flatter, 1.2)
    assert flatter.alpha.item() == pytest.approx(0.1)


@pytest.mark.parametrize("learned", [False, True])
def test_a_limit_looks_at_both_sides_of_a_kink(learned: bool) -> None:
    """Of relu with a curve whose slope falls by 0.2 from the kink to the next point of the grid: κ″ = −1.3 there."""
    layer = kafops.KAF(1, 2, 0.125, gamma=8.0, base="relu", learn_dictionary=learned)
    layer.alpha.data = torch.tensor([[0.0, 0.5]])  # a kernel at 0.125, half a width to the right of 0
    u = 8**0.5 * 0.125
    steepest = 1 + 0.5 * 8**0.5 * 2 * u * math.exp(-u * u)
    assert layer.bounds().slope.maximum.item() == pytest.approx(steepest, rel=1e-6)
    assert curve_slopes(layer).max().item() == pytest.approx(steepest, rel=1e-6)
    limit_slopes(layer, 1.5)
    assert 1.49 < layer.bounds().lipschitz.item() <= 1.5


def test_a_limit_below_the_slope_of_a_base_is_refused() -> None:
    layer = kafops.KAF(3, base="silu")
    with pytest.raises(
        SlopeError, match=r"slope_limit must be at least 1\.1, the largest slope of the base 'silu' beneath"
    ):
        Slopes(layer, dataclasses.replace(RECIPE, slope_limit=1.0))
    Slopes(layer, dataclasses.replace(RECIPE, slope_limit=1.2)).limit()
    assert Slopes(kafops.KAF(3, base="relu"), dataclasses.replace(RECIPE, slope_limit=1.0)).most == 1.0


def test_bases_cost_what_they_are_as_steep_as() -> None:
    """Without a curve: 1 of a line, as steep as ReLU is free, and SiLU's 1.1 over its deviation of 0.6."""
    found = {base: steepness(kafops.KAF(1, base=base)).item() for base in ("identity", "relu", "silu")}
    assert found["identity"] == pytest.approx(1, rel=1e-4)
    assert found["relu"] == pytest.approx(FREE, rel=2e-3)
    x = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert found["silu"] == pytest.approx(1.09984 / nn.functional.silu(x).std().item(), rel=5e-3)


def test_no_randomness_is_used() -> None:
    state = torch.get_rng_state()
    layer = one_node(3.0)
    state = torch.get_rng_state()
    penalty([layer])
    limit_slopes(layer, 0.123)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_keeps_to_the_limit(tmp_path: Path) -> None:
    """After every update, and in the average of the weights: averages of curves are no steeper than the curves."""
    run = trainer(tmp_path, CONTROLLED)
    steepest = []

    def look(t: Trainer) -> None:
        for model in (t.model, t.result):
            steepest.append(
                max(m.bounds().lipschitz.max().item() for m in model.modules() if isinstance(m, kafops.KAF))
            )

    run.run(look)
    assert max(steepest) <= 0.9
    assert max(steepest) > 0.8
    free = trainer(tmp_path / "free", RECIPE)
    free.run()
    assert free.model[2].bounds().lipschitz.max() > 0.9


def test_a_penalty_makes_curves_less_steep(tmp_path: Path) -> None:
    def steepest(name: str, weight: float) -> float:
        model = network()
        run = trainer(tmp_path / name, dataclasses.replace(RECIPE, slope_penalty=weight), model)
        run.run()
        return steepness(model[2]).max().item()

    assert steepest("with", 1.0) < 0.8 * steepest("without", 0.0)


def test_resumed_training_has_the_same_bits(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", CONTROLLED)
    whole.run()
    for stop in (2, 4):
        part = trainer(tmp_path / "parts", CONTROLLED)
        part.resume()
        with pytest.raises(Interrupted):
            part.run(press_ctrl_c_after(stop))
        assert part.steps_done == stop
    last = trainer(tmp_path / "parts", CONTROLLED)
    assert last.resume()
    last.run()
    assert_same_state(whole, last)


def test_without_either_nothing_changes() -> None:
    """Not the loss itself, and not a bit of the curves."""
    layer = one_node(100.0)
    control = Slopes(layer, RECIPE)
    loss = torch.ones((), requires_grad=True)
    assert control.penalised(loss) is loss
    control.limit()
    assert layer.alpha.item() == 100


def test_a_network_without_kaf_is_refused(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(36, 2), nn.ReLU())
    for changes, names in (
        ({"slope_penalty": 0.1}, "slope_penalty control"),
        ({"slope_limit": 1.0}, "slope_limit control"),
        ({"slope_penalty": 0.1, "slope_limit": 1.0}, "slope_penalty and slope_limit control"),
    ):
        with pytest.raises(SlopeError, match=f"{names} the slopes of KAF layers, and the network has none"):
            trainer(tmp_path, dataclasses.replace(RECIPE, **changes), plain)
    assert not list(tmp_path.iterdir())


def test_sharded_curves_are_refused() -> None:
    with pytest.raises(TrainingError, match="slopes of sharded curves cannot be penalised or limited; use neither"):
        _check_shardable(CONTROLLED, Processes(0, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slope_penalty": -0.1}, "slope_penalty must be at least 0, got -0.1"),
        ({"slope_limit": 0.0}, "slope_limit must be above 0, or none, got 0"),
    ],
)
def test_recipes_refuse_what_makes_no_sense(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **changes)


def test_a_run_from_before_these_settings_goes_on(tmp_path: Path) -> None:
    """Its checkpoint and its run.json lack them, which is what their defaults say."""
    x, y = images()

    def make() -> Trainer:
        return Trainer(network(), RECIPE, 1, TensorSource(x, y, 1), (x[:6], y[:6]), tmp_path)

    run = make()
    run.run()
    tensors, record = checkpoints.load(run.checkpoint)
    for name in ("slope_penalty", "slope_limit"):
        del record["recipe"][name]
    checkpoints.save(run.checkpoint, tensors, record)
    again = make()
    assert again.resume()
    settings = Settings("mnist5k", "light", "kaf", Recipe(2, 10, 0.1)).as_dict()
    older = {**settings, "training": {n: v for n, v in settings["training"].items() if not n.startswith("slope")}}
    assert completed(older) == settings
    runs.RunFolder.open(tmp_path / "run", older, False, ())
    runs.RunFolder.open(tmp_path / "run", settings, False, (), completed)
    other = {**settings, "training": {**settings["training"], "slope_limit": 1.0}}
    with pytest.raises(runs.RunError, match=r"slope_limit is None there and 1\.0 here"):
        runs.RunFolder.open(tmp_path / "run", other, False, (), completed)
    assert completed({"seed": 1}) == {"seed": 1}
