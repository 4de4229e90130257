"""Norms layer by layer, against autograd and closed forms; what makes gradients explode, and what cures it."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kafops
from models import data, networks
from models.activations import KWinners
from models.analysis.gradients import measure, moments_at, moments_normal
from models.cli import main
from models.images import MNIST
from models.study import depth, plan, workers
from models.study.depth import page
from models.support import files

SMALL = "resnet:depth=8,width=2,form=post,patch=4"


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(16, 1, 28, 28, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def test_norms_are_those_of_the_loss_in_training_mode(batch):
    images, labels = batch
    model = networks.build(SMALL, "silu", MNIST, 0).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure(model, images, labels)
    assert not model.training
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    model.train()
    F.cross_entropy(model(images), labels).backward()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert found.weights == pytest.approx([c.weight.grad.norm().item() for c in convolutions], rel=1e-5)
    assert found.ratio == pytest.approx(found.weights[0] / found.weights[-1])
    assert len(found.trunk) == len(found.growth) == 3
    assert [a.name for a in found.activations][:2] == ["activation", "blocks.0.activation1"]


def test_the_trunk_is_measured_at_the_outputs_of_blocks(batch):
    images, labels = batch
    model = networks.build(SMALL, "relu", MNIST, 0).train()
    found = measure(model, images, labels)
    head = [images]
    for part in (model.entry, model.stem, model.norm, model.activation, model.blocks[:2]):
        head.append(part(head[-1]))
    trunk = head[-1].detach().requires_grad_()
    F.cross_entropy(model.classifier(model.blocks[2](trunk).mean((2, 3))), labels).backward()
    assert found.trunk[1] == pytest.approx(trunk.grad.square().mean().sqrt().item(), rel=1e-4)
    assert found.signals[1] == pytest.approx(trunk.double().var((0, 2, 3), correction=0).mean().sqrt().item(), rel=1e-6)


def test_signals_of_a_network_without_blocks_are_those_of_its_activations(batch):
    model = networks.build("vgg:width=2,dense=4,patch=2", "silu", MNIST, 0)
    found = measure(model, *batch)
    assert len(found.signals) == 7
    assert found.signals == [a.output_std for a in found.activations]


# By hand: E[f'^2] / Var f of x is 1, of ReLU (1/2) / (1/2 - 1/(2π)).
@pytest.mark.parametrize(
    ("activation", "wanted"),
    [(nn.Identity(), 1.0), (nn.ReLU(), math.sqrt(0.5 / (0.5 - 0.5 / math.pi)))],
    ids=["identity", "relu"],
)
def test_factors_of_standard_normal_inputs_by_hand(activation, wanted):
    # At the jump of ReLU's slope the rule is off by half a step times the density: 0.4 · 0.004 of 1/2.
    assert moments_normal(activation, 1).factor == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("init", ["normal", "isometric", "elu", "relu"])
def test_factors_of_kafs_are_those_of_the_closed_form(init):
    torch.manual_seed(0)
    layer = kafops.KAF(6, init=init)
    each = kafops.init.gradient_factor(layer.alpha, layer.bandwidths(), layer.points())
    for channel in range(6):
        one = kafops.KAF(1)
        one.load_state_dict({**layer.state_dict(), "alpha": layer.alpha[[channel]], "gamma": layer.gamma[[channel]]})
        # `points` are rounded to float32, by 6e-8 of them, and coefficients of up to 72 cancel.
        assert moments_normal(one, 1).factor == pytest.approx(each[channel].item(), rel=1e-5)


def test_the_factor_of_a_layer_weighs_channels_by_their_variance():
    x = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0))
    layer = nn.PReLU(2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0.0]))
    moments = moments_at(layer, x)
    relu = x[:, 1].clamp(min=0)
    assert moments.variance == pytest.approx(
        ((x[:, 0].var(correction=0) + relu.var(correction=0)) / 2).item(), rel=1e-5
    )
    assert moments.slope == pytest.approx((1 + (x[:, 1] > 0).float().mean().item()) / 2, rel=1e-5)


@pytest.mark.parametrize("activation", ["kwta", "kwta:per=channel"])
def test_an_activation_across_elements_has_sizes_and_no_factors(activation, batch):
    images, labels = batch
    model = networks.build(SMALL, activation, MNIST, 0).train()
    found = measure(model, images, labels)
    assert len(found.activations) == 7
    assert {(a.factor, a.normal_factor) for a in found.activations} == {(None, None)}
    assert found.growth == []
    x = model.norm(model.stem(model.entry(images)))
    y = model.activation(x)
    wanted = y.double().var((0, 2, 3), correction=0).mean().sqrt().item()
    assert found.activations[0].output_std == pytest.approx(wanted, rel=1e-5)
    F.cross_entropy(model(images), labels).backward()
    assert found.weights[0] == pytest.approx(model.stem.weight.grad.norm().item(), rel=1e-5)


def test_factors_are_averaged_over_the_activations_that_have_them(batch, monkeypatch):
    """A network of ReLUs of which one has become k-WTA; and one of k-WTA alone, which its page shows as –."""
    build = networks.build

    def mixed(*arguments):
        model = build(*arguments)
        model.activation = KWinners()
        return model

    with monkeypatch.context() as patch:
        patch.setattr(networks, "build", mixed)
        start = depth.start(SMALL, "relu", 0, MNIST, *batch)
    # Of each of the six that are left, by hand as above.
    assert start["normal_factor"] == pytest.approx(math.sqrt(0.5 / (0.5 - 0.5 / math.pi)), rel=2e-3)
    assert start["factor"] > 0.5

    start = depth.start(SMALL, "kwta", 0, MNIST, *batch)
    assert start["factor"] is start["normal_factor"] is start["predicted"] is None
    row = page.starts([start], "command", "mnist5k").splitlines()[-1]
    assert row.startswith(f"| `{SMALL}` | kwta | ")
    assert row.endswith(" | – | – | – |")


def test_dropout_is_left_out_and_draws_nothing(batch):
    network = "light:width=2,dense=4"
    state = torch.get_rng_state()
    starts = [depth.start(f"{network}{more}", "relu", 0, MNIST, *batch) for more in ("", "", ",dropout=no")]
    assert torch.equal(torch.get_rng_state(), state)
    assert starts[0] == starts[1]
    assert starts[0]["weights"] == starts[2]["weights"]


@pytest.mark.parametrize("network", [SMALL, "light:width=2,dense=4"])
def test_what_is_not_finite_is_none(network, batch, monkeypatch):
    assert json.dumps(depth.start(network, "kaf:std=0", 0, MNIST, *batch), allow_nan=False)
    build = networks.build

    def broken(*arguments):
        model = build(*arguments)
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        return model

    monkeypatch.setattr(networks, "build", broken)
    start = depth.start(network, "kaf", 0, MNIST, *batch)
    assert json.dumps(start, allow_nan=False)
    assert start["ratio"] is start["predicted"] is None
    assert set(start["signals"]) == {None}


def test_random_curves_explode_on_the_trunk_and_theory_says_so(batch):
    """The notes' first table, in small: 38 layers are enough for ten thousandfold growth."""
    found = {
        (activation, branch): measure(
            networks.build(f"resnet:depth=38,width=4,form=post,patch=2,branch={branch}", activation, MNIST, 0), *batch
        )
        for activation in ("relu", "kaf:std=0.05", "kaf_elu")
        for branch in ("1", "0.2357")
    }
    growth = {key: value.trunk[0] / value.trunk[-1] for key, value in found.items()}
    assert growth["kaf:std=0.05", "1"] > 1e5 > 1e3 > growth["kaf_elu", "1"] > growth["relu", "1"]
    assert growth["kaf_elu", "0.2357"] < 10
    assert growth["relu", "0.2357"] < 10
    for key in (("relu", "1"), ("kaf:std=0.05", "1"), ("kaf_elu", "1")):
        # A mean-field estimate: the order of magnitude is what it is for, over up to eight of them.
        assert abs(math.log10(math.prod(found[key].growth[1:]) / growth[key])) < 1.5, key


@pytest.mark.parametrize("activation", ["kaf_elu", "kaf_isometric", "kaf_relu"])
def test_the_default_start_of_branches_keeps_gradients_in_scale(activation, batch):
    found = measure(networks.build("resnet56:form=post,width=4,patch=4", activation, MNIST, 0), *batch)
    assert 0.1 < found.ratio < 10


def test_a_study_records_norms_by_epoch_and_goes_on(tmp_path: Path, batch):
    file = tmp_path / "tiny.json"
    content = json.loads(depth.DEPTH.read_text())
    content |= {
        "data": "mnist5k:train=60,validation=20,test=20",
        "images": 20,
        "seeds": [0],
        "activations": ["relu", "kaf_elu"],
    }
    content["networks"] = {"small": SMALL}
    content["training"] |= {"epochs": 2, "batch_size": 20}
    file.write_text(json.dumps(content))
    study = plan.load(str(file))
    run = study.runs()[1]
    result = depth.train(study, run, tmp_path / "results", tmp_path / "runs")
    assert [g["epoch"] for g in result["gradients"]] == [0, 1, 2]
    start, end = result["layers"]["start"], result["layers"]["end"]
    assert (start["epoch"], end["epoch"], len(end["signals"])) == (0, 2, 3)
    model = networks.build(SMALL, "kaf_elu", MNIST, 0)  # as it starts
    found = measure(model, *depth.batch(data.load(study.data, 0)))
    assert (start["weights"], start["signals"]) == (found.weights, found.signals)
    assert len(result["wrong"]) == 20
    assert (result["rate"], result["frozen"]) == ("common", False)
    assert workers.read(tmp_path / "results", study) == {run.name: files.rounded(result)}
    again = depth.train(study, run, tmp_path / "results", tmp_path / "runs")
    assert again["gradients"] == result["gradients"]
    assert again["wrong"] == result["wrong"]

    folders = ["--out", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert main(["gradients", "--train", str(file), *folders, "--jobs", "1"]) == 0
    text = (tmp_path / "results" / "README.md").read_text()
    assert "from 2 of 2 runs" in text
    assert "| small | kaf_elu |" in text
    assert "](layers.png)" in text
    for name in ("training", "layers"):
        assert (tmp_path / "results" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "made-up" not in text
    made_up = dataclasses.replace(study, data="fake:like=digits")
    page.report(made_up, workers.read(tmp_path / "results", study), tmp_path, "command")
    assert "| network (made-up images) |" in (tmp_path / "README.md").read_text()


def test_a_run_that_fails_is_reported_with_the_norms_until_then(tmp_path: Path):
    content = json.loads(depth.DEPTH.read_text())
    content |= {"data": "mnist5k:train=60,validation=20,test=20", "images": 20, "seeds": [0], "activations": ["kaf"]}
    content["networks"] = {"small": SMALL}
    content["training"] |= {"epochs": 3, "batch_size": 20, "lr": 1e30}
    file = tmp_path / "failing.json"
    file.write_text(json.dumps(content))
    study = plan.load(str(file))
    result = depth.train(study, study.runs()[0], tmp_path / "results", tmp_path / "runs")
    assert "weights are no longer finite after epoch 1" in result["error"]
    assert result["gradients"][0]["epoch"] == 0


def test_a_run_that_fails_is_wrong_on_every_image_and_images_are_drawn_too():
    """Three seeds each at 75 and 50 %, of 8 images; one of kaf fails."""
    right = {"gradients": [{"epoch": 0, "ratio": 1.0}], "wrong": "11000000"}
    base = {seed: right | {"wrong": "11110000"} for seed in range(4)}
    same = {seed: right for seed in range(3)} | {3: {"error": "nan", "gradients": right["gradients"]}}
    accuracy, apart, within, *_, failed = page._row(same, base, 8)
    assert accuracy.startswith("56.2 ±")  # (3 * 75 + 0) / 4
    assert apart.startswith("+6.2 [")
    assert "not shown" in within
    assert failed == "1 of 4"
    alike = page._row({s: right for s in range(4)}, base, 8)[2]
    low, high = (float(end) for end in re.findall(r"[−+-]?[\d.]+", alike.replace("−", "-"))[:2])
    assert high - low > 20  # seeds agree, but there are eight images only


def test_the_command_measures_networks_as_they_start(tmp_path: Path, capsys):
    small = SMALL.replace("patch=4", "patch=2")
    command = ["gradients", "--networks", small, "--activations", "relu", "kaf_isometric", "--seeds", "2"]
    assert main([*command, "--data", "digits", "--out", str(tmp_path)]) == 0
    starts = json.loads((tmp_path / "initial.json").read_text())["starts"]
    assert [(s["activation"], s["seed"]) for s in starts] == [(a, n) for a in ("relu", "kaf_isometric") for n in (0, 1)]
    drawn = [s for s in starts if s["seed"] == 0]
    assert all(s["ratio"] == pytest.approx(s["weights"][0] / s["weights"][-1]) for s in drawn)
    # For the isometric start the ratio is at most 1.1 in every channel.
    assert all(1 <= s["normal_factor"] <= math.sqrt(1.1) for s in starts if s["activation"] == "kaf_isometric")
    printed = capsys.readouterr().out
    assert f"| `{small}` | relu |" in printed
    assert (tmp_path / "initial.md").read_text().strip() in printed
    assert all(("signals" in s) == (s["seed"] == 0) for s in starts)
    assert "made-up" not in printed
    assert "| network (made-up images) |" in page.starts(starts, "command", "fake:like=digits")
    for name in ("initial", "signals"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "resnet20:form=up"], "form must be pre, post or post_norm, got 'up'"),
        (["--networks", "resnet20:branch=1"], "branch is of form=post"),
        (["--activations", "rellu"], "relu"),
        (["--train", "nothing.json"], "unknown study 'nothing.json'"),
    ],
)
def test_a_wrong_option_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["gradients", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan"], "--plan: such options go with --train"),
        (["--jobs", "2", "--runs", "x"], "--jobs, --runs: such options go with --train"),
        (["--train", "--seeds", "2", "--data", "digits"], "--data, --seeds: such options are in the file"),
    ],
)
def test_options_of_the_other_kind_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["gradients", *arguments])
    assert message in capsys.readouterr().err


def test_norms_missing_after_a_kill_are_measured_on_resuming(tmp_path: Path):
    content = json.loads(depth.DEPTH.read_text())
    content |= {"data": "mnist5k:train=60,validation=20,test=20", "images": 20, "seeds": [0], "activations": ["relu"]}
    content["networks"] = {"small": SMALL}
    content["training"] |= {"epochs": 2, "batch_size": 20}
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(content))
    study = plan.load(str(file))
    run = study.runs()[0]
    whole = depth.train(study, run, tmp_path / "results", tmp_path / "runs")
    kept = tmp_path / "runs" / f"{run.name}.gradients.json"
    kept.write_text(json.dumps([g for g in json.loads(kept.read_text()) if g["epoch"] in (0, 1)]))
    again = depth.train(study, run, tmp_path / "results", tmp_path / "runs")
    assert again["gradients"] == whole["gradients"]
    kept.unlink()  # then nothing is known of the start, and nothing else is given out for it
    result = depth.train(study, run, tmp_path / "results", tmp_path / "runs")
    assert [g["epoch"] for g in result["gradients"]] == [2]
    assert "layers" in whole
    assert "layers" not in result


def test_growth_takes_the_mean_square_of_uneven_weights(batch):
    """Weights 0 and w√2 of a branch's norm grow gradients as much as w and w do: both have the same mean square."""
    images, labels = batch
    found = []
    for weights in ([0.3, 0.3], [0.0, 0.3 * math.sqrt(2)]):
        model = networks.build(SMALL, "silu", MNIST, 0)
        with torch.no_grad():
            model.blocks[0].norm2.weight.copy_(torch.tensor(weights))
        found.append(measure(model, images, labels).growth[0])
    assert found[1] == pytest.approx(found[0], rel=0.05)  # E[f₂′²] is of other signals
    assert found[0] > 1e-3
