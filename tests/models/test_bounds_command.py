import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch

from models.certified.lipschitz import upper_bound
from models.certified.traced import steps
from models.cli import main
from models.commands import bounds as command
from models.figures import bounds as figures
from models.reports import bounds as page_of
from models.runs import session, trained
from models.runs.settings import Settings
from models.study import page, plan
from models.study.summary import summarise
from models.training import Recipe

DATA = "mnist5k:train=200,test=40,validation=10,size=12"
RECIPE = Recipe(2, 20, 0.1, method="standard", eps=0.1, schedule="constant", watch_steps=0)
NETWORK = "light:width=2,dense=4,patch=2,dropout=no"
QUICK = ["--images", "30", "--batch-size", "15", "--attack", "pgd-3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A KAF with two seeds, ReLU, and k-WTA, trained a little."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, activation, seed in (
        ("kaf", "kaf_silu", 0),
        ("again", "kaf_silu", 1),
        ("relu", "relu", 0),
        ("kwta", "kwta", 0),
    ):
        session.prepare(Settings(DATA, NETWORK, activation, RECIPE, seed), folder / name).run()
        found[name] = folder / name
    return found


def bounds(run: Path, *options: str) -> int:
    return main(["bounds", str(run), "--which", "latest", *QUICK, *options])


def results(run: Path, name: str = "bounds.json") -> dict[str, Any]:
    return json.loads((run / "bounds" / name).read_text())


def test_a_run_is_bounded(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["kaf"]
    assert bounds(run) == 0
    printed = capsys.readouterr().out
    assert "largest slope" in printed
    assert "classifier" in printed
    found, images = results(run), results(run, "images.json")["images"]
    model = trained.load(run, "latest").model
    assert found["upper"] == pytest.approx(upper_bound(steps(model, (1, 12, 12))).upper.item())
    assert found["lower"] == max(found["lower_by"].values())
    assert 0 < found["lower"] <= found["local"]["p95"] <= found["upper"] * (1 + 1e-9)
    assert found["layers"][-1]["bound"] == pytest.approx(found["upper"])
    assert len(images) == 30
    for image in images:
        assert image["singular"] <= image["local_bound"]
        assert image["linf"] == pytest.approx(max(image["intervals"], image["local"] / 12), rel=1e-9)
        assert image["lipschitz"] <= image["local"] <= image["l2"]
    # What is proved is what is right, and holds under attack.
    right = sum(image["linf"] > 0 for image in images) / 30
    accuracies = [point["accuracy"] for point in found["attacked"]]
    assert right <= accuracies[0]
    assert max(accuracies) == accuracies[0]
    for point in found["certified"]:
        assert point["linf"] == sum(image["linf"] >= point["eps"] for image in images) / 30
        assert point["linf"] >= max(point["intervals"], point["local"])
        below = [a["accuracy"] for a in found["attacked"] if a["eps"] <= point["eps"]]
        assert point["linf"] <= min(below)
    assert matplotlib.image.imread(run / "bounds/bounds.png")[..., :3].std() > 0.02


def test_what_is_done_is_not_done_again(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["relu"]
    monkeypatch.setattr(figures, "network", lambda *arguments: b"")
    assert bounds(run) == 0
    before = results(run)
    with monkeypatch.context() as patch:
        patch.setattr(command, "certify", lambda *a: pytest.fail("done again"))
        assert bounds(run) == 0
    assert results(run) == before
    assert bounds(run, "--eps", "0.3") == 0
    assert results(run)["attacked"][-1]["eps"] == pytest.approx(0.45)
    path = run / "bounds/images.json"
    path.write_text(path.read_text().replace('"linf"', '"line"'))
    capsys.readouterr()
    assert bounds(run, "--eps", "0.3") == 1
    assert "images.json is damaged" in capsys.readouterr().err
    path.unlink()


def test_an_interrupted_look_goes_on_where_it_stopped(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs["again"]
    monkeypatch.setattr(figures, "network", lambda *arguments: b"")
    assert bounds(run, "--seed", "1") == 0
    whole = results(run, "images.json")
    (run / "bounds/images.json").unlink()
    certify, calls = command.certify, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return certify(*arguments)

    monkeypatch.setattr(command, "certify", interrupted)
    assert bounds(run, "--seed", "1") == 130
    assert f"to go on: python -m models bounds {run}" in capsys.readouterr().err
    assert len(results(run, "images.json")["images"]) == 15
    assert bounds(run, "--seed", "1") == 0
    assert len(calls) == 2
    assert results(run, "images.json") == whole


def test_several_runs_are_compared(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seeds share a row; k-WTA has no bound, and says so."""
    monkeypatch.setattr(figures, "network", lambda *arguments: b"")
    arguments = [*map(str, runs.values()), "--which", "latest", *QUICK, "--out", str(tmp_path)]
    assert main(["bounds", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "∞" in printed
    assert "pgd-3 at 0.1" in " ".join(printed.split())
    entries = json.loads((tmp_path / "bounds.json").read_text())["runs"]
    assert [entry["run"] for entry in entries] == list(runs)
    assert entries[3]["upper"] is None
    assert entries[3]["local"]["p50"] is None
    for name in ("bounds", "over-eps"):
        assert matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.02
    found = [results(run) for run in runs.values()]
    kaf, again, relu, kwta = found
    assert page_of.groups(list(runs), found) == {"kaf_silu": [kaf, again], "relu": [relu], "kwta": [kwta]}
    at = page_of.telling(found)
    assert at in page_of.AT
    assert figures.certified(kaf, at) == next(p["linf"] for p in kaf["certified"] if p["eps"] == at)
    assert figures.at_eps(kaf) == next(p["accuracy"] for p in kaf["attacked"] if p["eps"] == 0.1)


def test_rows_are_named_after_what_differs(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "network", lambda *arguments: b"")
    assert bounds(runs["kaf"]) == 0
    found = results(runs["kaf"])

    def changed(**training: float) -> dict[str, Any]:
        settings = found["settings"]
        return {**found, "settings": {**settings, "training": {**settings["training"], **training}}}

    groups = page_of.groups(["a", "b", "c"], [found, changed(slope_limit=0.5), changed(slope_penalty=1.0)])
    assert list(groups) == ["kaf_silu", "kaf_silu, slope limit 0.5", "kaf_silu, slope penalty 1"]
    assert list(page_of.groups(["a"], [found])) == ["a"]


def content(
    lower: float, upper: float | None, local: float | None, *layers: tuple[str, float | None], share: float = 1.0
) -> dict[str, Any]:
    """A bounds.json of a network that is right, and proved right, on that share of the images at any radius."""
    kinds = [{"name": name, "bound": bound, "kind": "winners" if bound is None else "map"} for name, bound in layers]
    points = [{"eps": eps, "accuracy": share, "interval": [share - 0.1, share]} for eps in (0.0, 0.01, 0.03)]
    return {
        "lower": lower, "upper": upper, "local": {"p50": local}, "layers": kinds, "attacked": points, "pixels": 4,
        "attack": {"name": "pgd"}, "identity": {"eps": 0.03}, "certified": [{"eps": 0.01, "linf": share}],
    }  # fmt: skip


def proved(*radii: float) -> list[dict[str, float]]:
    return [{"intervals": radius, "lipschitz": 0.0, "local": 0.0} for radius in radii]


def test_a_network_that_jumps_has_a_figure_too() -> None:
    layers = [("one", 2.0), ("jump", None), ("last", None)]
    for several in (layers, layers[1:]):
        assert figures.network(content(3.0, None, None, *several), proved(0.0))[:4] == b"\x89PNG"


def test_networks_that_do_not_move_have_figures_too() -> None:
    still, moves = content(0.0, 0.0, 0.0, ("last", 0.0), share=0.1), content(1.0, 30.0, 9.0, share=0.9)
    assert figures.network(still, proved(1.0))[:4] == b"\x89PNG"
    assert figures.network(content(0.0, 2.0, 0.0, ("last", 2.0)), proved(1.0))[:4] == b"\x89PNG"
    groups = {"still": [still], "moves": [moves]}
    for shown in (groups, {"still": [still]}):
        assert figures.networks(shown, 0.01)[:4] == b"\x89PNG"
        assert figures.over_radius(shown)[:4] == b"\x89PNG"


def test_what_the_figure_of_several_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(figures.style, "png", drawn.append)
    figures.networks({"two seeds": [content(1.0, 30.0, 9.0, share=0.5), content(1.0, 30.0, 9.0, share=0.75)]}, 0.01)
    left, right = drawn[0].axes
    assert sorted(line.get_xdata()[0] for line in right.lines) == [50] * 3 + [75] * 3  # clean, attacked, proved
    assert {text.get_text() for text in left.texts} == {"1", "30"}


def test_brackets_in_a_run_s_name_are_shown(runs: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "kaf[seed 0]"
    shutil.copytree(runs["relu"], run)
    assert bounds(run) == 0
    assert "kaf[seed 0]" in capsys.readouterr().out


def test_the_axis_of_a_network_of_one_answer_shows_the_attack(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its radii are 1, and those of the attack far smaller."""
    limits = []
    monkeypatch.setattr(figures.style, "png", lambda figure: limits.append(figure.axes[1].get_xlim()))
    figures.network(content(1.0, 2.0, 1.5, ("last", 2.0), share=0.5), proved(1.0, 0.0))
    assert limits == [(0.005, 0.03)]


def test_runs_of_different_radii_need_one(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attack_on = command.looking.attack_on

    def by_run(network: trained.Trained, name: str, eps: float | None) -> Any:
        own = 0.1 if network.settings["activation"] == "relu" else 0.2
        return attack_on(network, name, own if eps is None else eps)

    monkeypatch.setattr(command.looking, "attack_on", by_run)
    both = [str(runs["relu"]), str(runs["kaf"]), "--which", "latest", *QUICK, "--out", str(tmp_path)]
    assert main(["bounds", *both]) == 1
    message = " ".join(capsys.readouterr().err.split())
    assert "trained for different radii" in message
    assert "give --eps, one radius for all" in message
    assert not (tmp_path / "bounds.json").exists()


def test_images_that_are_done_stay_done(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 images in batches of 15 the second batch is done again for 30; for 15 nothing is.

    What is proved around an image depends on the others of its batch, so 10 are done as if there were no more.
    """
    run, certify, sizes = runs["relu"], command.certify, []

    def counted(*arguments: Any) -> Any:
        sizes.append(len(arguments[2]))
        return certify(*arguments)

    monkeypatch.setattr(figures, "network", lambda *arguments: b"")
    monkeypatch.setattr(command, "certify", counted)
    for count, wanted in (("20", [15, 5]), ("30", [15]), ("15", []), ("10", [10])):
        assert bounds(run, "--seed", "7", "--images", count) == 0
        assert sizes == wanted
        sizes.clear()
    kept = results(run, "images.json")["images"]
    assert len(kept) == 30
    found = results(run)
    assert found["images"] == 10
    assert found["lower_by"]["singular"] == pytest.approx(max(image["singular"] for image in kept[:10]), rel=1e-6)
    (run / "bounds/images.json").unlink()
    assert bounds(run, "--seed", "7", "--images", "10") == 0
    alone = results(run)
    assert (found["local"], found["radii"]) == (alone["local"], alone["radii"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "41"], "--images 41 is more than the 40 images there are: test images of"),
        (["--attack", "cw:l2=0.5"], "--attack cw:l2=0.5 is an attack in L2; give one in L-infinity"),
    ],
)
def test_what_does_not_fit_the_run_is_explained(
    runs: dict[str, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bounds(runs["kaf"], *arguments) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_cannot_be_bounded_is_named(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = trained.load

    def with_layer_norm(*arguments: Any) -> trained.Trained:
        network = load(*arguments)
        network.model.dropout = torch.nn.LayerNorm(4)
        return network

    monkeypatch.setattr(trained, "load", with_layer_norm)
    assert bounds(runs["kaf"]) == 1
    assert "dropout of the network cannot be bounded" in capsys.readouterr().err


def test_a_study_can_vary_the_training() -> None:
    study = plan.load("lipschitz")
    first = {run.activation: run.settings for run in study.runs() if run.seed == 0 and run.panel.network == "vgg"}
    assert first["kaf_elu"].training.slope_limit is None
    limited = first["kaf_limit1"]
    assert (limited.activation, limited.training.slope_limit, limited.training.slope_penalty) == ("kaf_elu", 1, 0)
    assert math.isclose(limited.training.eps, 0.22)
    assert limited.training.epochs == first["relu"].training.epochs
    text = page.markdown(study, summarise(study, {}), {}, "command")
    assert "- kaf_penalty0.1: `kaf_elu` with slope_penalty = 0.1" in text


def test_a_variant_must_be_part_of_the_study(tmp_path: Path) -> None:
    content = json.loads((plan.FOLDER / "lipschitz.json").read_text())
    content["activations"].remove("kaf_limit1")
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="variants must be among the activations, and these are not: kaf_limit1"):
        plan.load(str(tmp_path / "mine.json"))
