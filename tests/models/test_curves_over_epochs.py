import dataclasses
import io
import json
import math
import os
import signal
from pathlib import Path

import matplotlib.image
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from torch import nn

import kafops
from models.analysis.curves import DictionaryUse, Use, cell_edges, dense_size, evolution, suggested_boundary
from models.cli import main
from models.commands import curves as command
from models.data import TensorSource
from models.figures import curve_strip, dictionary_use, style
from models.runs import session, trained
from models.runs.settings import Settings
from models.support import checkpoints
from models.support.checkpoints import CheckpointError
from models.support.errors import UserError
from models.support.interrupts import Interrupted
from models.training import Recipe, Trainer, curves, outside, trainer

RECIPE = Recipe(epochs=3, batch_size=8, lr=0.05, method="fast", eps=0.1, watch_images=6, watch_steps=2)


def free(channels: int) -> nn.Module:
    return kafops.KAF1d(channels, init="normal", learn_gamma=True, learn_dictionary=True)


def network(activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), activation or kafops.KAF2d(4, init="normal"),
        nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3), free(3), nn.Linear(3, 2),
    )  # fmt: skip


def fixed() -> nn.Module:
    """A network without learned curves."""
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.ReLU(), nn.Linear(4, 2))


def training(folder: Path, recipe: Recipe = RECIPE, model: nn.Module | None = None) -> Trainer:
    labels = torch.arange(20) % 2
    x = 0.3 + 0.4 * labels.view(-1, 1, 1, 1) + 0.1 * torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    return Trainer(model or network(), recipe, 1, TensorSource(x, labels, 1), (x[:6], labels[:6]), folder)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the KAF layers."""
    names = tuple(f"{name}." for name in curves.kaf_layers(model))
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(names)}


def assert_kept(folder: Path, wanted: list[dict[str, torch.Tensor]]) -> None:
    assert curves.epochs(folder) == list(range(len(wanted)))
    for epoch, state in enumerate(wanted):
        found, record = checkpoints.load(curves.path(folder, epoch))
        assert record["epoch"] == epoch
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_curves_of_every_epoch_are_kept(tmp_path: Path, ema: float) -> None:
    run = training(tmp_path, dataclasses.replace(RECIPE, ema=ema))
    wanted = [state_of(run.result)]
    run.run(on_epoch=lambda record: wanted.append(state_of(run.result)))
    assert_kept(tmp_path, wanted)
    assert not torch.equal(wanted[0]["2.alpha"], wanted[3]["2.alpha"])
    assert set(wanted[0]) == {
        "2.alpha", "2.gamma", "2.curve", "6.alpha", "6.log_gamma", "6.dictionary", "6.curve",
    }  # fmt: skip
    other = network()
    curves.load(other, tmp_path, 2)
    assert all(torch.equal(tensor, wanted[2][name]) for name, tensor in state_of(other).items())


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_they_survive_an_interruption(tmp_path: Path, stop: int) -> None:
    whole = training(tmp_path / "whole")
    wanted = [state_of(whole.result)]
    whole.run(on_epoch=lambda record: wanted.append(state_of(whole.result)))

    def press_ctrl_c(part: Trainer) -> None:
        if part.steps_done == stop:
            os.kill(os.getpid(), signal.SIGINT)

    part = training(tmp_path / "part")
    with pytest.raises(Interrupted):
        part.run(press_ctrl_c)
    assert curves.epochs(tmp_path / "part") == list(range((stop - 1) // 3 + 1))
    again = training(tmp_path / "part")
    assert again.resume()
    again.run()
    assert_kept(tmp_path / "part", wanted)
    assert [record.outside for record in again.history] == [record.outside for record in whole.history]


def test_neither_curves_nor_shares_change_the_bits_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = training(tmp_path / "looked")
    looked.run()
    monkeypatch.setattr(trainer.curves, "save", lambda *a: None)
    monkeypatch.setattr(trainer.outside, "measure", lambda *a: None)
    plain = training(tmp_path / "plain")
    plain.run()
    assert not (tmp_path / "plain/curves").exists()
    (a, b), (c, d) = (checkpoints.load(run.checkpoint) for run in (looked, plain))
    assert a.keys() == c.keys()
    assert all(torch.equal(a[name], c[name]) for name in a)
    for record in (*b["history"], *d["history"]):
        del record["outside"], record["seconds"]
    assert b == d


def test_a_network_without_kaf_leaves_no_curves_and_no_share(tmp_path: Path) -> None:
    run = training(tmp_path, model=fixed())
    run.run()
    assert not (tmp_path / "curves").exists()
    assert run.outside is None
    assert all(json.loads(line)["outside"] is None for line in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_without_a_watch_there_are_curves_and_no_share(tmp_path: Path) -> None:
    run = training(tmp_path, dataclasses.replace(RECIPE, watch_steps=0))
    run.run()
    assert curves.epochs(tmp_path) == [0, 1, 2, 3]
    assert [record.outside for record in run.history] == [None] * 3


def test_runs_from_before_curves_were_kept_go_on(tmp_path: Path) -> None:
    run = training(tmp_path)
    with pytest.raises(Interrupted):
        run.run(lambda t: os.kill(os.getpid(), signal.SIGINT) if t.steps_done == 4 else None)
    tensors, record = checkpoints.load(run.checkpoint)
    for epoch in record["history"]:
        del epoch["outside"]
    checkpoints.save(run.checkpoint, tensors, record)
    for path in (tmp_path / "curves").iterdir():
        path.unlink()
    again = training(tmp_path)
    again.resume()
    again.run()
    assert curves.epochs(tmp_path) == [2, 3]
    assert [record.outside is None for record in again.history] == [True, False, False]


def test_curves_of_another_network_are_refused(tmp_path: Path) -> None:
    curves.save(network(), tmp_path, 7)
    assert curves.epochs(tmp_path) == [7]
    with pytest.raises(CheckpointError, match=r"has curves of the layers \['2', '6'\], but the network has \[\]"):
        curves.load(fixed(), tmp_path, 7)
    with pytest.raises(CheckpointError, match="of another network"):
        curves.load(network(kafops.KAF2d(4, dictionary_size=5)), tmp_path, 7)
    with pytest.raises(CheckpointError, match="cannot be read"):
        curves.load(network(), tmp_path, 8)


# What lies outside, and the warning.


def small(boundary: float = 1.0, points: int = 3, learned: bool = False) -> nn.Module:
    """A KAF on two channels that are the image itself."""
    return nn.Sequential(nn.Flatten(), kafops.KAF(2, points, boundary, learn_dictionary=learned))


def shown(*rows: tuple[float, float]) -> torch.Tensor:  # [N, 2, 1, 1]
    return torch.tensor(rows)[:, :, None, None]


def test_shares_outside_by_hand() -> None:
    x = shown((-2.0, 0.0), (-1.0, 0.5), (1.0, 1.5), (1.5, -0.5), (0.5, 0.0))
    found = outside.measure(small(), x)
    assert found == outside.Outside("1", 3 / 10, -1.0, 1.0, 2.1)  # the ends themselves are inside
    # Half a bin above 2, rounded up to two digits.
    assert outside.measure(small(), x, batch_size=2) == found
    assert outside.measure(small(2.0), x).share == 0
    assert outside.measure(fixed(), torch.rand(3, 1, 6, 6)) is None


def test_the_layer_with_the_largest_share_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), kafops.KAF(2, 3, 4.0), nn.Linear(2, 2), kafops.KAF(2, 3, 0.5))
    with torch.no_grad():
        model[1].alpha.zero_()
        model[2].bias.copy_(torch.tensor([0.25, 7.0]))
    found = outside.measure(model, shown((1.0, 2.0), (0.0, -3.0)))
    assert found is not None
    assert (found.layer, found.share, found.low, found.high) == ("3", 0.5, -0.5, 0.5)
    assert 7 < found.suggested < 7.2


def test_a_learned_dictionary_ends_where_its_points_do() -> None:
    model = small(learned=True)
    with torch.no_grad():
        model[1].dictionary.copy_(torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, 0.25]]))
    found = outside.measure(model, shown((1.5, 0.4), (-1.5, -0.1), (2.0, 0.5)))
    assert found == outside.Outside("1", 2 / 6, -1.0, 2.0, 2.1)


def test_what_is_not_finite_is_outside() -> None:
    found = outside.measure(small(), shown((math.nan, 0.0), (math.inf, 0.0)))
    assert (found.share, found.suggested) == (0.5, None)
    assert "some are not finite" in found.warning


@pytest.mark.parametrize(
    ("share", "suggested", "text"),
    [
        (0.05, 4.0, None),
        (0.3, 4.0, "boundary=4 as an option of --activation encloses 99.9 % of the inputs of every layer"),
        (0.3, 1e4, r"out of scale (up to ±10000): the activation needs a norm before it"),
    ],
)
def test_the_warning_says_what_to_do(share: float, suggested: float, text: str | None) -> None:
    warning = outside.Outside("blocks.0.activation1", share, -3.0, 3.0, suggested).warning
    if text is None:
        assert warning is None
    else:
        assert text in warning
        assert warning.startswith("30.0% of the inputs of blocks.0.activation1 lie outside its dictionary [-3, 3]")


@pytest.mark.parametrize(
    ("boundary", "rounded"), [(3.0, 3.0), (3.01, 3.1), (0.0421, 0.043), (123.0, 130.0), (9.96, 10.0), (0.0, 0.0)]
)
def test_boundaries_are_rounded_up_to_two_digits(boundary: float, rounded: float) -> None:
    assert outside.rounded_up(boundary) == rounded


def test_looking_leaves_the_network_as_it_was() -> None:
    model, x = network().train(), torch.rand(6, 1, 6, 6)
    state, random = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    outside.measure(model, x)
    DictionaryUse(model).add(x)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


TINY = [
    *("--data", "mnist5k:train=80,test=40,validation=20", "--network", "light:width=2,dense=4,patch=7"),
    *("--epochs", "2", "--batch-size", "20", "--watch-images", "10", "--watch-steps", "2", "--no-tensorboard"),
]


def test_training_warns_once_where_the_boundary_is_too_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for boundary, warned in (("0.5", 1), ("6", 0)):
        run = tmp_path / boundary
        assert main(["train", str(run), *TINY, "--activation", f"kaf:boundary={boundary}"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert printed.count("Warning: ") == warned
        shares = [json.loads(line)["outside"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert all((share > 0.05) == bool(warned) for share in shares)
    assert "Warning" not in printed


# The use of dictionaries.


def test_cells_end_half_way_to_their_neighbours() -> None:
    layer = kafops.KAF(1, 3, 1.0)
    after = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0)).item()
    assert cell_edges(layer).tolist() == [[-1.0, -0.5, 0.5, after]]
    assert cell_edges(kafops.KAF(2, 1, gamma=1.0)).tolist() == [[0.0, pytest.approx(0, abs=1e-44)]]


def test_use_by_hand() -> None:
    first = (-1.5, -1.0, -0.75, -0.5, 0.0, 0.25, 0.5, 1.0, 1.25, 2.0)
    use = DictionaryUse(small())
    use.add(shown(*((value, 0.1) for value in first)))
    (layer,) = use.layers()
    assert layer.points == [-1.0, 0.0, 1.0]
    assert layer.below == [0.1, 0.0]
    assert layer.above == [0.2, 0.0]
    assert layer.cells == [[0.2, 0.3, 0.2], [0.0, 1.0, 0.0]]
    assert layer.outside == pytest.approx([0.3, 0.0])
    assert layer.share == pytest.approx(0.15)
    assert layer.users == [0.5, 1.0, 0.5]
    assert layer.never == [0, 2]
    assert 2.0 < layer.reach <= 2.0 * (1 + 4 / 2048)
    assert suggested_boundary([layer]) == 2.1


def test_learned_points_have_cells_of_their_own() -> None:
    model = small(learned=True)
    with torch.no_grad():
        model[1].dictionary.copy_(torch.tensor([[2.0, -1.0, 0.0], [0.0, 0.5, 0.25]]))
    use = DictionaryUse(model)
    use.add(shown((1.5, 0.4), (-1.5, -0.1), (0.9, 0.5), (-0.5, 0.1)))
    (layer,) = use.layers()
    assert layer.points == []
    assert layer.cells == [[0.0, 0.5, 0.25], [0.25, 0.0, 0.5]]  # a mark belongs to the cell above it
    assert (layer.below, layer.above) == ([0.25, 0.25], [0.0, 0.0])


def test_batches_of_use_give_what_the_whole_gives() -> None:
    torch.manual_seed(1)
    # A curve for each, and one for all, in float64: the rounding of the first, which depends on the shape of x, must
    # not move a value over the edge of a cell of the second.
    model = nn.Sequential(kafops.KAF2d(3, init="normal"), nn.Flatten(2), kafops.KAF(1, 6, 2.0)).double()
    x = 2 * torch.randn(30, 3, 4, 4, dtype=torch.float64)
    whole, parts = DictionaryUse(model), DictionaryUse(model)
    whole.add(x)
    for part in x.tensor_split((1, 2, 20)):
        parts.add(part)
    assert whole.layers() == parts.layers()
    first = whole.layers()[0]
    values = x.transpose(0, 1).flatten(1)
    assert first.outside == pytest.approx((values.abs() > 3).double().mean(1).tolist())
    assert len(whole.layers()[1].cells) == 3
    sums = [sum(cells) + a + b for cells, a, b in zip(first.cells, first.below, first.above, strict=True)]
    assert sums == pytest.approx([1.0] * 3)


def test_use_needs_a_kaf_and_finite_inputs() -> None:
    with pytest.raises(UserError, match="no KAF layers"):
        DictionaryUse(fixed())
    with pytest.raises(UserError, match="the inputs of 1: 1 of 2 values are not finite"):
        DictionaryUse(small()).add(shown((math.nan, 0.0)))


def test_a_wider_dictionary_is_as_dense_with_more_points() -> None:
    assert dense_size(20, 3.0, 3.0) == 20
    assert dense_size(20, 3.0, 6.0) == 39  # 38 steps instead of 19
    assert dense_size(3, 1.0, 0.5) == 2


def test_evolution_samples_the_curves_of_each_state() -> None:
    models = [network(), network()]
    with torch.no_grad():
        models[1][2].alpha.mul_(2)
    first, last = evolution(models, layers=2, channels=3)
    assert (first.layer, first.name, first.channels, first.low, first.high) == (0, "2", [0, 2, 3], -3.0, 3.0)
    assert (last.layer, last.name, last.channels) == (1, "6", [0, 1, 2])
    x = torch.tensor(first.x)
    assert x[0] < -3 < 3 < x[-1]
    for model, curves_then in zip(models, first.curves, strict=True):
        y = model[2](x.view(-1, 1, 1, 1).expand(-1, 4, 1, 1))[:, first.channels, 0, 0].T
        assert torch.equal(torch.tensor(curves_then), y)
    with pytest.raises(UserError, match="no KAF layers"):
        evolution([fixed()])


def use_of(name: str = "2", channels: int = 4) -> Use:
    points = torch.linspace(-3, 3, 20).tolist()
    return Use(
        name, points, -3.0, 3.0, [0.01] * channels, [0.02] * channels, [[0.0, *[0.97 / 19] * 19]] * channels, 3, 2
    )


def test_figures_show_something(tmp_path: Path) -> None:
    evolutions = evolution([network()] * 3, channels=4)
    for name, content in (
        ("strip", curve_strip.strip(evolutions, [0, 5, 9], 2, [use_of()])),
        ("short", curve_strip.strip(evolution([network()] * 2), [0, 3], 2)),
        ("use", dictionary_use.draw([use_of(), use_of("b")], [use_of(), use_of("b")])),
    ):
        (tmp_path / name).write_bytes(content)
        picture = matplotlib.image.imread(tmp_path / name, format="png")
        assert picture.shape[1] > 1000
        assert picture[..., :3].std() > 0.03
    movie = Image.open(io.BytesIO(curve_strip.animation(evolutions, [0, 5, 9], 2)))
    assert movie.format == "GIF"
    assert movie.n_frames == 3


def test_titles_of_the_strip_keep_apart() -> None:
    with style.context():
        figure = curve_strip.strip.__wrapped__(evolution([network()] * 3, channels=4), [0, 5, 9], 2, [use_of()])
        figure.draw_without_rendering()
        titles = [text for text in figure.findobj(Text) if text.get_text().startswith("channel")]
        boxes = [title.get_window_extent() for title in titles]
    assert len(boxes) > 4
    for box in boxes:
        assert box.x1 <= figure.bbox.x1
        assert box.count_overlaps(boxes) == 1  # itself


# The command.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = Recipe(2, 40, 0.05, "fast", 0.1, watch_steps=2)
    data, net = "mnist5k:train=80,test=40,validation=20", "light:width=2,dense=4,patch=7"
    session.prepare(Settings(data, net, "kaf", recipe), folder).run()
    return folder


def test_the_command_writes_figures_and_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["curves", str(run), "--attack", "pgd-2", "--batch-size", "7", "--which", "latest"]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    names = {path.name for path in (run / "curves").iterdir()}
    assert names == {
        *(f"epoch-000{epoch}.safetensors" for epoch in range(3)),
        *("curves.json", "curves.png", "curves.gif", "dictionary.png"),
    }
    found = json.loads((run / "curves/curves.json").read_text())
    assert f"boundary={found['suggested_boundary']:g} encloses 99.9 %" in printed
    network = trained.load(run, "latest")
    use = DictionaryUse(network.model)
    use.add(network.data.validation.tensors()[0])
    # The same but for the rounding of batches of another size, which may move a value over an edge.
    for layer, wanted in zip(command.uses_of(found), use.layers(), strict=True):
        assert layer.name == wanted.name
        assert layer.outside == pytest.approx(wanted.outside, abs=0.02)
        assert layer.reach == pytest.approx(wanted.reach, rel=0.01)
    assert command.uses_of(found, "adversarial") != command.uses_of(found)
    with Image.open(run / "curves/curves.gif") as movie:
        assert movie.n_frames == 3


def test_older_runs_show_the_start_and_the_end(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = []
    monkeypatch.setattr(curve_strip, "strip", lambda evolutions, epochs, *rest: drawn.append((evolutions, epochs)))
    monkeypatch.setattr(curve_strip, "animation", lambda *arguments: b"")
    monkeypatch.setattr(dictionary_use, "draw", lambda *arguments: b"")
    monkeypatch.setattr(command.files, "write_bytes", lambda *arguments: None)
    assert main(["curves", str(run), "--which", "latest"]) == 0
    kept = {epoch: curves.path(run, epoch).read_bytes() for epoch in curves.epochs(run)}
    for epoch in kept:
        curves.path(run, epoch).unlink()
    try:
        assert main(["curves", str(run), "--which", "latest"]) == 0
    finally:
        for epoch, content in kept.items():
            curves.path(run, epoch).write_bytes(content)
    (with_files, epochs), (without, ends) = drawn
    assert (epochs, ends) == ([0, 1, 2], [0, 2])
    for a, b in zip(with_files, without, strict=True):
        assert (a.curves[0], a.curves[2]) == (b.curves[0], b.curves[1])


def test_what_cannot_be_shown_is_explained(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relu = tmp_path / "relu"
    assert main(["train", str(relu), *TINY, "--activation", "relu", "--epochs", "1"]) == 0
    assert main(["curves", str(relu)]) == 1
    assert "relu is a network with relu, which has no learned curves" in capsys.readouterr().err
    assert main(["curves", str(run), "--images", "21"]) == 1
    assert "more than the 20 images there are: validation images of" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["curves", str(run), "--eps", "0.1"])
    assert "--eps is the radius of --attack, which is not given" in capsys.readouterr().err


def test_the_last_curves_are_the_network_s(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the file of its epoch, which may be those of a collapse, or some batches old."""
    drawn = []
    monkeypatch.setattr(curve_strip, "strip", lambda evolutions, *rest: drawn.append(evolutions))
    monkeypatch.setattr(curve_strip, "animation", lambda *arguments: b"")
    monkeypatch.setattr(dictionary_use, "draw", lambda *arguments: b"")
    monkeypatch.setattr(command.files, "write_bytes", lambda *arguments: None)
    assert main(["curves", str(run), "--which", "latest"]) == 0
    last = curves.path(run, 2)
    content = last.read_bytes()
    last.write_bytes(curves.path(run, 1).read_bytes())
    try:
        assert main(["curves", str(run), "--which", "latest"]) == 0
    finally:
        last.write_bytes(content)
    assert [e.curves for e in drawn[0]] == [e.curves for e in drawn[1]]


def test_the_strip_ends_at_the_state_that_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["train", str(tmp_path), "--network", "light:width=2,dense=4,patch=4", "--activation", "kaf_isometric"]
    arguments += ["--data", "mnist5k:train=60,validation=20,test=20", "--epochs", "3", "--batch-size", "20"]
    assert main([*arguments, "--watch-steps", "1", "--watch-drop", "0", "--no-tensorboard", "--threads", "1"]) == 0
    drawn: list[list[int]] = []
    strip = curve_strip.strip
    monkeypatch.setattr(
        curve_strip, "strip", lambda e, epochs, *rest: (drawn.append(epochs), strip(e, epochs, *rest))[1]
    )
    for which, file in trained.WHICH.items():
        assert main(["curves", str(tmp_path), "--which", which, "--threads", "1"]) == 0
        epoch = checkpoints.load(tmp_path / file)[1]["epoch"]
        assert drawn.pop() == list(range(epoch + 1))
