import json
import math
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import kafops
from models import taps
from models.activations import KWinners, SharedPSSiLU, SmoothReLU
from models.analysis.distributions import SIDES, Density, Images, Panel, Recorder, across, curve
from models.attacks import pgd
from models.cli import main
from models.commands import looking
from models.figures import distributions as figures
from models.runs import session
from models.runs.settings import Settings
from models.support.errors import UserError
from models.training import Recipe


def network() -> nn.Module:
    """One activation of each kind of rank, a norm that would change in training mode, and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), kafops.KAF(3), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 5), nn.SiLU(),
    ).double()  # fmt: skip  # in float32 the network itself depends on the size of the batch


LABELS = torch.arange(40) % 5


def images(count: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(count, 1, 6, 6, generator=g, dtype=torch.float64)
    return x, (x + 0.2 * torch.rand(x.shape, generator=g)).clamp(0, 1)


def recorded(model: nn.Module, *cuts: int) -> Recorder:
    recorder = Recorder(model)
    for batch in zip(*(part.tensor_split(cuts) for part in (*images(), LABELS)), strict=True):
        recorder.add(*batch)
    return recorder


def activations_of(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return inputs and outputs of modules 2, 3 and 7 in float64, computed without hooks."""
    model = model.eval()
    found = {}
    with torch.no_grad():
        for name, module in model.named_children():
            y = module(x)
            if name in "237":
                found[name] = x.double().numpy(), y.double().numpy()
            x = y
    return found


def test_distances_are_those_of_a_direct_computation() -> None:
    model = network()
    layers = recorded(model).layers()
    clean, adversarial = (activations_of(model, x) for x in images())
    assert [layer.name for layer in layers] == ["2", "3", "7"]
    for layer in layers:
        for number, side in enumerate(SIDES):
            a, b, moved = clean[layer.name][number], adversarial[layer.name][number], getattr(layer, side)
            distance, size = (np.linalg.norm(v.reshape(len(v), -1), axis=1) for v in (b - a, a))
            # All is float64; a variance is a difference of sums ten to a hundred times as large.
            assert moved.l2 == pytest.approx((distance / size).mean(), rel=1e-12)
            assert moved.l2_std == pytest.approx((distance / size).std(), rel=1e-10)
            assert moved.distance == pytest.approx(distance.mean(), rel=1e-12)
            rows = [np.moveaxis(v, 1, 0).reshape(v.shape[1], -1) for v in (a, b)]
            for row, mean, std in zip(rows, moved.mean, moved.std, strict=True):
                np.testing.assert_allclose(mean, row.mean(1), rtol=1e-10, atol=1e-14)
                np.testing.assert_allclose(std, row.std(1), rtol=1e-10)
            exact = [scipy.stats.wasserstein_distance(x, y) for x, y in zip(*rows, strict=True)]
            for found, wanted, error in zip(moved.w1_channels, exact, moved.error_channels, strict=True):
                assert abs(found - wanted) <= error
            scale = rows[0].std(1).mean()
            assert moved.scale == pytest.approx(scale, rel=1e-9)
            assert moved.w1 == pytest.approx(np.mean(moved.w1_channels) / scale, rel=1e-9)
            assert min(moved.w1_channels) <= moved.w1_low * scale * (1 + 1e-9)
            assert moved.w1_low <= moved.w1 <= moved.w1_high


def test_batches_give_what_the_whole_gives() -> None:
    model = network()
    whole, parts = recorded(model), recorded(model, 1, 2, 30)
    for (name, tensor), (other, same) in zip(*(r.state()[0].items() for r in (whole, parts)), strict=True):
        assert name == other
        if name.endswith(("counts", "exponent")):
            assert torch.equal(tensor, same), name
        else:  # float64 sums of up to 40 · 16 terms
            torch.testing.assert_close(tensor, same, rtol=1e-12, atol=1e-12)
    assert whole.images == parts.images == 40


def test_a_recorder_goes_on_from_a_state() -> None:
    model = network()
    (x, x2), (y, y2) = (part.tensor_split((25,)) for part in images())
    first, second = Recorder(model), Recorder(model)
    first.add(x, y)
    tensors, record = first.state()
    second.load_state(tensors, json.loads(json.dumps(record)))
    second.add(x2, y2)
    assert second.layers() == recorded(model, 25).layers()
    assert second.panels() == recorded(model, 25).panels()


def test_what_becomes_of_each_image_is_kept() -> None:
    model, pair = network().eval(), images()
    first, recorder = Recorder(model), Recorder(model)
    first.add(*(x[:25] for x in pair), LABELS[:25])
    tensors, record = first.state()
    recorder.load_state(tensors, json.loads(json.dumps(record)))
    recorder.add(*(x[25:] for x in pair), LABELS[25:])
    found = recorder.by_image()
    clean, adversarial = (activations_of(model, x) for x in pair)
    for number, side in enumerate(SIDES):
        ratios = []
        for name in "237":
            a, b = (of[name][number].reshape(40, -1) for of in (clean, adversarial))
            ratios.append(np.linalg.norm(b - a, axis=1) / np.linalg.norm(a, axis=1))
        np.testing.assert_allclose(found.moved[side], np.mean(ratios, axis=0), rtol=1e-12)
    with torch.no_grad():
        right = [(model(x).argmax(1) == LABELS).tolist() for x in pair]
    assert found.right == tuple(right)
    assert 0 < sum(right[0]) < 40  # else all of this would say little
    recorder.add(*pair)
    with pytest.raises(ValueError, match="labels were not given"):
        recorder.by_image()


def test_networks_are_compared_on_images_that_were_not_broken() -> None:
    def of(moved: list[float], clean: str, attacked: str) -> Images:
        marks = [[mark == "1" for mark in row] for row in (clean, attacked)]
        return Images(dict.fromkeys(SIDES, moved), (marks[0], marks[1]))

    one = of([0.1, 0.2, math.nan, 0.9], clean="1110", attacked="1011")  # the last was wrong before
    other = of([0.5, 0.6, 0.7, 0.8], clean="1111", attacked="1000")
    assert one.accuracies == (0.75, 0.5)
    assert other.accuracies == (1.0, 0.25)
    found = {which: of_sides["outputs"] for which, of_sides in across([one, other]).items()}
    assert found == {
        "all": pytest.approx([0.4, 0.65]),
        "unbroken": pytest.approx([0.1, 0.5]),
        "unbroken in every network": pytest.approx([0.1, 0.5]),
    }
    silent = across([of([math.nan], "1", "1"), of([0.5], "1", "0")])
    assert all(math.isnan(v) for v in silent["unbroken"]["inputs"])


def test_the_network_is_left_as_it_was() -> None:
    model = network().train()
    state, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    recorded(model).panels()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_images_that_do_not_move_have_no_distance_and_silent_ones_are_counted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    recorder = Recorder(model)
    clean = torch.tensor([[3.0, -4.0], [-1.0, -2.0]])[:, :, None, None]
    moved = torch.tensor([[3.0, 4.0], [1.0, 0.0]])[:, :, None, None]
    recorder.add(clean, moved)
    (layer,) = recorder.layers()
    assert layer.inputs.l2 == pytest.approx((8 / 5 + math.sqrt(8) / math.sqrt(5)) / 2)
    assert (layer.outputs.l2, layer.outputs.l2_std, layer.outputs.silent) == (pytest.approx(4 / 3), 0.0, 1)
    assert layer.outputs.distance == pytest.approx((4 + 1) / 2)
    still = Recorder(model)
    still.add(clean[1:], clean[1:])
    (layer,) = still.layers()
    assert (layer.inputs.l2, layer.inputs.w1_channels) == (0.0, [0.0, 0.0])
    assert (layer.outputs.l2, layer.outputs.w1, layer.outputs.silent) == (None, None, 1)


def test_each_call_of_a_module_is_a_layer_of_its_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.act(x.flatten(1)))

    recorder = Recorder(Twice())
    for _ in range(2):
        recorder.add(*images())
    assert recorder.names == ["act", "act (2)"]
    first, second = recorder.layers()
    assert first.outputs == second.inputs
    assert len(recorder.panels()) == 8


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"no activation modules: functions such as F\.relu"):
        Recorder(nn.Sequential(nn.Flatten(), nn.Linear(36, 2)))
    x, y = images()
    with pytest.raises(ValueError, match=r"shape of clean, \[40, 1, 6, 6\], got \[1, 1, 6, 6\]"):
        Recorder(network()).add(x, y[:1])
    model = network()
    nn.init.constant_(model[6].bias, math.nan)
    with pytest.raises(UserError, match="the inputs of 7: 400 of 400 values are not finite"):
        Recorder(model).add(x, y)


def test_activations_are_found_and_nothing_else() -> None:
    model = nn.Sequential(
        nn.ReLU(), nn.GELU(), nn.Softmax(1), nn.PReLU(), kafops.KAF2d(3), KWinners(), SharedPSSiLU()(1), SmoothReLU(),
        nn.Linear(2, 2), nn.MultiheadAttention(4, 2), nn.Sequential(nn.Sigmoid()),
    )  # fmt: skip
    assert list(taps.activations(model)) == ["0", "1", "3", "4", "5", "6", "7", "10.0"]


@pytest.mark.parametrize("module", [kafops.KAF(3), kafops.KAF2d(3), nn.PReLU(3), nn.SiLU(), kafops.KAF(1)])
def test_curves_are_the_activations_values(module: nn.Module) -> None:
    x = torch.linspace(-4, 4, 9)
    y = curve(module, x, 3, rank=4)
    assert torch.equal(y, module(x.view(9, 1, 1, 1).expand(9, 3, 1, 1))[:, :, 0, 0].T)
    assert curve(KWinners(), x, 3, rank=4) is None


def test_panels_show_densities_of_the_values() -> None:
    model = network()
    panels = recorded(model).panels(layers=2, channels=2)
    assert [(p.layer, p.name, p.channel) for p in panels] == [(0, "2", 0), (0, "2", 2), (2, "7", 0), (2, "7", 4)]
    values = [activations_of(model, x)["2"] for x in images()]
    for panel in panels[:2]:
        assert panel.dictionary == (-3.0, 3.0)
        for side, density in enumerate((panel.inputs, panel.outputs)):
            assert len(density.clean) <= 60
            for drawn, value in zip((density.clean, density.adversarial), values, strict=True):
                channel = value[side][:, panel.channel]
                counts = np.histogram(channel, np.nextafter(density.edges, -np.inf))[0]
                shares = np.array(drawn) * np.diff(density.edges)
                assert shares * channel.size == pytest.approx(counts, abs=1e-6)
                assert shares.sum() >= 1 - 0.004  # 0.1 % may be left out at either end, to whole bins
    assert panels[0].x[0] <= -3
    assert panels[0].x[-1] >= 3
    # A dictionary beyond the values is shown all the same.
    assert panels[0].x[0] <= panels[0].inputs.edges[0]


def panel(place: int, channel: int, plain: bool = False) -> dict[str, Any]:
    panel = Panel(
        place, "a", channel, Density([0.0, 1.0, 2.0, 3.0], [0.9, 0.07, 0.03], [0.8, 0.1, 0.1]),
        Density([-1.0, 1.0], [0.5], [0.5]), [] if plain else [-3.0, 3.0], [] if plain else [0.0, 1.0],
        None if plain else (-3.0, 3.0),
    )  # fmt: skip
    return asdict(panel)


@pytest.mark.parametrize("plain", [False, True])
def test_figures_show_something(tmp_path: Path, plain: bool) -> None:
    panels = [panel(place, channel, plain) for place in (0, 7) for channel in range(3)]
    layers = [asdict(layer) for layer in recorded(network()).layers()]
    layers[0]["inputs"]["l2_std"] = None  # of one image
    results = {"a": {"settings": {"activation": "relu"}, "layers": layers}}
    if plain:
        results["b"] = {**results["a"], "layers": layers[:2]}
    moved = {"all": dict.fromkeys(SIDES, 0.3), "unbroken": dict.fromkeys(SIDES, None)}
    of_runs = [
        {"activation": "relu", "frozen": frozen, "lr": 0.1, "accuracy": {"attacked": 0.5}, "moved": moved}
        for frozen in (False, True)
    ]
    drawn = figures.inputs(panels, 9), figures.outputs(panels, 9), figures.depth(results)
    for draw in (*drawn, figures.against(of_runs)):
        (tmp_path / "a.png").write_bytes(draw)
        picture = matplotlib.image.imread(tmp_path / "a.png")
        assert picture.shape[1] > 1000
        assert picture[..., :3].std() > 0.05


def test_networks_have_different_colours() -> None:
    names = ("kaf", "relu", "kaf_silu", "silu", "elu", "gelu", "tanh")
    colours = figures._colours(names)
    assert len(set(colours)) == len(names)
    assert colours[0] == figures.style.VERMILLION
    assert colours[1] == figures.style.GREY
    many = figures._looks(20 * ["relu"])
    assert len({tuple(look.items()) for look in many}) == 20


def test_attacks_with_one_start_move_every_image_all_the_way() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).double().eval()
    x, _ = images()
    y = 1 - model(x).argmax(1)  # all misclassified as they are
    generator = torch.Generator().manual_seed(0)
    moved = looking.adversarial(model, pgd(0.1, 5), x, y, generator)
    # Up the loss of a linear network every pixel goes to the edge of the ball, or of [0, 1].
    free = (x > 0.1) & (x < 0.9)
    torch.testing.assert_close((moved - x).abs()[free], torch.full_like(x[free], 0.1), rtol=0, atol=1e-12)
    left = looking.adversarial(model, pgd(0.1, 5, restarts=2), x, y, generator)
    assert torch.equal(left, x)


SETTINGS = Settings(
    "mnist5k:train=80,test=40,validation=20", "light:width=2,dense=4,patch=7", "kaf", Recipe(1, 40, 0.05, "fast", 0.1),
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A network with a KAF and one with a ReLU, trained a little."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("kaf", "relu"):
        settings = Settings(SETTINGS.data, SETTINGS.network, name, SETTINGS.training)
        session.prepare(settings, folder / name).run()
    return [folder / "kaf", folder / "relu"]


def test_the_command_compares_runs(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["distributions", *map(str, runs), "--images", "30", "--batch-size", "20", "--attack", "pgd-3"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "relative L2" in printed
    for run in runs:
        names = {path.name for path in (run / "distributions").iterdir()}
        assert names == {"distributions.json", "distributions.png", "outputs.png", "layers.png"}
        found = json.loads((run / "distributions/distributions.json").read_text())
        assert found["identity"]["attack"] == {
            "kind": "LinfAttack", "eps": 0.1, "step": pytest.approx(0.25 / 3), "steps": 3, "noise": 0.1, "clip": True,
            "restarts": 1, "loss": "ce", "name": "pgd-3",
        }  # fmt: skip
        layers = found["layers"]
        assert all(layer["inputs"]["distance"] > 0 for layer in layers)
        assert bool(found["panels"][0]["dictionary"]) == (run.name == "kaf")
        masks = found["by_image"]["wrong"]
        assert {name: len(mask) for name, mask in masks.items()} == {"clean": 30, "attacked": 30}
    summary = json.loads((tmp_path / "distributions.json").read_text())
    both = summary["runs"]
    assert [entry["run"] for entry in both] == ["kaf", "relu"]
    assert both[1]["accuracy"]["clean"] == pytest.approx(masks["clean"].count("0") / 30, rel=1e-6)
    mean = np.mean(found["by_image"]["moved"]["outputs"])
    assert both[1]["moved"]["all"]["outputs"] == pytest.approx(mean, rel=1e-3)  # to four digits
    assert [row["count"] for row in summary["ranks"]] == [2] * 8
    assert {row["rho"] for row in summary["ranks"]} == {None}  # of two runs there is nothing to rank
    assert (tmp_path / "against.png").exists()
    assert both[1]["layers"][0]["inputs"]["l2"] == pytest.approx(layers[0]["inputs"]["l2"], rel=1e-6)
    assert (tmp_path / "layers.png").exists()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds, and one test of it will do."""
    for name in ("inputs", "outputs", "depth", "against"):
        monkeypatch.setattr(figures, name, lambda *arguments: b"")


@pytest.mark.usefixtures("undrawn")
def test_what_is_done_is_not_done_again_and_other_options_are(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distributions", str(runs[0]), "--images", "20", "--attack", "fgsm"]
    assert main(arguments) == 0
    before = (runs[0] / "distributions/distributions.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "add", lambda *a: pytest.fail("done again"))
        assert main(arguments) == 0
    assert (runs[0] / "distributions/distributions.json").read_bytes() == before
    assert main([*arguments, "--eps", "0.3"]) == 0
    after = json.loads((runs[0] / "distributions/distributions.json").read_text())
    assert after["layers"][0]["inputs"]["l2"] > json.loads(before)["layers"][0]["inputs"]["l2"]
    path = runs[0] / "distributions/distributions.json"
    path.write_text(path.read_text().replace('"w1_low"', '"w1_lower"'))
    capsys.readouterr()
    assert main([*arguments, "--eps", "0.3"]) == 1
    assert "distributions.json is damaged" in capsys.readouterr().err
    path.unlink()


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_look_goes_on_where_it_stopped(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["distributions", str(runs[0]), "--images", "40", "--batch-size", "10", "--attack", "pgd-2"]
    assert main(arguments) == 0
    path = runs[0] / "distributions/distributions.json"
    whole = json.loads(path.read_text())
    path.unlink()
    add, calls = Recorder.add, []

    def interrupted(recorder: Recorder, *pair: torch.Tensor) -> None:
        add(recorder, *pair)
        calls.append(len(pair[0]))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Recorder, "add", interrupted)
    assert main(arguments) == 130
    assert f"to go on: python -m models distributions {runs[0]}" in capsys.readouterr().err
    assert not path.exists()
    assert main(arguments) == 0
    assert len(calls) == 4  # two before, two after
    again = json.loads(path.read_text())
    assert (again["layers"], again["panels"]) == (whole["layers"], whole["panels"])
    assert not (runs[0] / "distributions/partial.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attack", "pdg-3"], "argument --attack: unknown attack 'pdg-3'"),
        (["--eps", "0"], "argument --eps: wanted a radius above 0, got 0"),
        (["--images", "0"], "argument --images: wanted a whole number from 1"),
    ],
)
def test_wrong_options_are_explained(
    runs: list[Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["distributions", str(runs[0]), *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_does_not_fit_the_run_is_explained(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(runs[0]), "--images", "41"], "--images 41 is more than the 40 images there are: test images of"),
        ([str(runs[0]), str(runs[0])], "is given twice"),
        ([str(runs[0]), "--device", "gpu"], "--device gpu cannot be used"),
        ([str(runs[0].parent)], "holds no run"),
    ):
        assert main(["distributions", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "b/other"]
    assert looking.labels(folders) == [str(folders[0]), str(folders[1]), "other"]
