import argparse
import dataclasses
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import nn

from models.activations import KWinners
from models.attacks import BPDA, Adaptive, LinfAttack, Strongest, Transfer, fgsm, pgd, search, soft_winners
from models.cli import main
from models.commands import evaluate
from models.commands.evaluate import attack_names
from models.data import DataSet, TensorSource
from models.evaluation import Accuracy, Outcome, evaluator, input_gradients, outcomes, sanity
from models.evaluation.evaluator import Plan
from models.evaluation.outcomes import Job, OutcomeError, Outcomes, described
from models.images import ImageFormat
from models.runs import session, trained
from models.runs.settings import Settings
from models.runs.trained import Trained
from models.support.interrupts import AFTER_THIS, StopRequest
from models.training import Recipe

EPS = 0.1
PIXELS = ImageFormat(1, 4, 2, (0.5,), (0.5,))


class Bright(nn.Module):
    """Logits of "dark" and "bright", by the mean of the pixels after `first`; counts the images it is shown."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Identity()
        self.seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        score = 20 * (self.first(x).flatten(1).mean(1) - 0.5)
        return torch.stack([-score, score], 1)


class Stairs(nn.Module):
    """x in 7 stairs, without a gradient: a masked gradient as there could be none worse."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 7).round() / 7


def pictures(count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of even brightness, each half a hundredth lighter than the one before, in mixed order."""
    values = torch.linspace(0.2, 0.8, count)[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    noise = 0.02 * torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return values.view(-1, 1, 1, 1) + noise, (values > 0.5).long()


def kept(folder: Path, model: nn.Module, **identity: Any) -> Outcomes:
    images, labels = pictures()
    return Outcomes(folder, identity, model.eval(), images, labels, batch_size=25)


def test_images_of_the_same_name_in_another_folder_are_others(tmp_path: Path) -> None:
    images, labels = pictures()
    job = Job("fgsm", fgsm(EPS), 20, seed=0)

    def path(images: torch.Tensor, labels: torch.Tensor) -> Path:
        return Outcomes(tmp_path, {"data": "pictures"}, Bright().eval(), images, labels, batch_size=25).path(job)

    before = path(images, labels)
    changed, relabelled = images.clone(), labels.clone()
    changed[40] += 0.1
    assert path(changed, labels) == before  # of which only the first 20 are attacked
    changed[10] += 0.1
    relabelled[10] = 1 - relabelled[10]
    assert len({before, path(changed, labels), path(images, relabelled)}) == 3


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose network is `Bright`; evaluated, it can be had as `main(["evaluate", str(run), ...])`."""
    folder = tmp_path / "run"
    use(monkeypatch, folder, Bright())
    return folder


def use(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: nn.Module, settings: dict[str, Any] | None = None
) -> None:
    """Let `trained.load` return this network for every folder; the checkpoint is a file beside it."""
    folder.mkdir(exist_ok=True)
    checkpoint = folder / "best.safetensors"
    checkpoint.write_bytes(type(getattr(model, "first", model)).__name__.encode())
    source = TensorSource(*pictures(), seed=0)
    data = DataSet("pictures", PIXELS, source, source, source)
    default = {"data": "pictures", "network": "bright", "training": {"eps": EPS}}

    def load(run: Path, which: str = "best", root: Path | None = None) -> Trained:
        return Trained(model.eval(), default if settings is None else settings, data, checkpoint)

    monkeypatch.setattr(trained, "load", load)


def command(folder: Path, *options: str) -> int:
    return main(["evaluate", str(folder), "--device", "cpu", "--batch-size", "25", *options])


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("pgd-50-10", ("pgd-50-10",)),
        ("pgd-50-10,autoattack,adaptive", ("pgd-50-10", "autoattack", "adaptive")),
        ("nes:samples=20,steps=5,fgsm", ("nes:samples=20,steps=5", "fgsm")),
        (
            "cw:l2=0.5,nes:steps=5,growth=1,pgd-5:loss=margin",
            ("cw:l2=0.5", "nes:steps=5,growth=1", "pgd-5:loss=margin"),
        ),
    ],
)
def test_commas_part_attacks_and_their_options(text: str, names: tuple[str, ...]) -> None:
    assert attack_names(text) == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pgd-50,autoatack", "unknown attack 'autoatack', .*; did you mean autoattack"),
        ("steps=5,nes", "unknown attack 'steps=5'"),
        ("nes:stepps=5", "attack 'nes' has no option 'stepps': it has samples, .*; did you mean steps"),
        ("fgsm,fgsm", "wanted each attack once, got fgsm,fgsm"),
        ("", "unknown attack ''"),
    ],
)
def test_names_that_are_none_are_explained(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        attack_names(text)


def test_an_outcome_is_made_once(tmp_path: Path) -> None:
    model = Bright()
    job = Job("pgd", pgd(EPS, 5), 60, seed=0)
    first = kept(tmp_path, model, network="a").get(job)
    seen = model.seen
    told: list[Outcome] = []
    again = kept(tmp_path, model, network="a").get(job, told.append)
    assert model.seen == seen
    assert torch.equal(again.found, first.found)
    assert again.seconds == pytest.approx(first.seconds, abs=1e-3)
    assert [len(outcome.found) for outcome in told] == [60]
    images, labels = pictures()
    expected = [
        search(Bright().eval(), images[i : i + 25], labels[i : i + 25], fgsm(EPS), None)[1] for i in (0, 25, 50)
    ]
    assert torch.equal(first.found, torch.cat(expected))  # FGSM is exact on this model, as PGD is


def test_the_file_says_what_was_found_and_with_what(tmp_path: Path) -> None:
    kept(tmp_path, Bright(), network="a").get(Job("pgd-5", pgd(EPS, 5), 30, seed=7))
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("pgd-5-")
    record = json.loads(path.read_text())
    assert set(record["found"]) == {"0", "1"}
    assert len(record["found"]) == 30
    assert record["settings"]["attack"]["eps"] == EPS
    assert (record["settings"]["seed"], record["settings"]["network"]) == (7, "a")
    assert "pyautoattack" in record["environment"]["attacks"]


@pytest.mark.parametrize(
    ("change", "identity"),
    [
        ({"attack": pgd(EPS, 6)}, {"network": "a"}),
        ({"images": 50}, {"network": "a"}),
        ({"seed": 1}, {"network": "a"}),
        ({}, {"network": "b"}),
    ],
)
def test_what_decides_the_outcome_decides_the_file(tmp_path: Path, change: dict, identity: dict) -> None:
    job = Job("pgd", pgd(EPS, 5), 60, seed=0)
    here = kept(tmp_path, Bright(), network="a")
    assert kept(tmp_path, Bright(), **identity).path(dataclasses.replace(job, **change)) != here.path(job)
    assert kept(tmp_path, Bright(), network="a").path(job) == here.path(job)


def test_an_outcome_goes_on_after_the_batch_at_which_it_stopped(tmp_path: Path) -> None:
    job = Job("noise", LinfAttack(EPS, step=0, noise=EPS, restarts=2), 60, seed=0)
    whole = kept(tmp_path / "whole", Bright()).get(job)

    class Stop(Exception):
        pass

    def stop(so_far: Outcome) -> None:
        if len(so_far.found) == 50:
            raise Stop

    model = Bright()
    with pytest.raises(Stop):
        kept(tmp_path, model).get(job, stop)
    model.seen = 0
    assert torch.equal(kept(tmp_path, model).get(job).found, whole.found)
    assert model.seen <= 10 * 5  # of the last ten images alone


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1, "found": "01x"}', '{"format": 9}', "\udcff"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    job = Job("pgd", pgd(EPS, 5), 60, seed=0)
    here = kept(tmp_path, Bright())
    here.path(job).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(
        OutcomeError, match=r"pgd-\w+\.json is damaged .*; remove it, and the same command makes it anew"
    ):
        here.get(job)


def test_a_file_with_more_images_than_asked_for_is_damaged(tmp_path: Path) -> None:
    job, here = Job("pgd", pgd(EPS, 5), 30, seed=0), kept(tmp_path, Bright())
    here.get(job)
    record = json.loads(here.path(job).read_text())
    here.path(job).write_text(json.dumps({**record, "found": record["found"] + "1"}))
    with pytest.raises(OutcomeError, match="is damaged"):
        here.get(job)


def test_attacks_are_described_by_kind_and_fields() -> None:
    nested = described(BPDA(pgd(0.1, 5), KWinners, soft_winners))
    assert nested["kind"] == "BPDA"
    assert (nested["kinds"], nested["smooth"]) == ("KWinners", "soft_winners")
    assert nested["attack"]["steps"] == 5
    assert described(Transfer(Bright(), fgsm(0.1), "digest")) == {
        "kind": "Transfer", "attack": described(fgsm(0.1)), "origin": "digest",
    }  # fmt: skip
    assert described(Adaptive(0.1)) != described(Adaptive(0.1, samples=50))
    json.dumps(described(Adaptive(0.1)))


def plan(**changes: Any) -> Plan:
    attacks = {"pgd-10": pgd(EPS, 10)}
    return dataclasses.replace(Plan(EPS, attacks, images=60, checked=60, curves=False, seed=0), **changes)


def checked(model: nn.Module, plan: Plan, folder: Path) -> dict[str, sanity.Verdict]:
    images, labels = pictures()
    files = kept(folder, model)

    def do(name: str, attack: Any, count: int, seed: int) -> Outcome:
        return files.get(Job(name, attack, count, seed))

    given = evaluator.attack_all(plan, do)
    first = slice(plan.checked)
    gradients = input_gradients(model, images[first], labels[first])
    verdicts = evaluator.check(plan, given, model, 2, gradients, do)
    return {verdict.check: verdict for verdict in verdicts}


def test_an_honest_network_passes_all_checks(tmp_path: Path) -> None:
    verdicts = checked(Bright().eval(), plan(curves=True), tmp_path)
    assert {verdict.result for verdict in verdicts.values()} == {sanity.PASS}
    assert len(verdicts) == 6
    assert sanity.masking(list(verdicts.values())).startswith("gradient masking: no sign of it")


def test_a_masked_gradient_is_named_as_one(tmp_path: Path) -> None:
    """Stairs have no gradient at all: PGD does not move, NES climbs them."""
    verdicts = checked(Bright(Stairs()).eval(), plan(), tmp_path)
    assert verdicts["attacks without gradient never beat those by gradient"].result == sanity.FAIL
    assert verdicts["gradients are not 0"].result == sanity.FAIL
    assert verdicts["accuracy falls to chance as ε grows"].result == sanity.FAIL
    assert sanity.masking(list(verdicts.values())).startswith("gradient masking: likely, because ")


def test_kwta_has_a_check_of_its_own(tmp_path: Path) -> None:
    verdicts = checked(Bright(KWinners(0.5)).eval(), plan(checked=10, images=20), tmp_path)
    assert "relaxed gradients of k-WTA never beat its own" in verdicts


def test_attacks_asked_for_count_where_they_belong(tmp_path: Path) -> None:
    """Of those asked for, PGD and the transferred images are taken to the checks, the adaptive attack is neither."""
    attacks = {
        "pgd-10": pgd(EPS, 10),
        "adaptive:samples=2,steps=1,growth=1": Adaptive(EPS, samples=2, steps=1, growth=1),
        "transfer from other": Transfer(Bright().eval(), fgsm(EPS)),
    }
    verdicts = checked(Bright().eval(), plan(attacks=attacks, checked=20), tmp_path)
    evidence = verdicts["attacks without gradient never beat those by gradient"].evidence
    assert evidence.startswith("attacks without gradient (NES, transfer from other) alone breaks")
    assert "attacks by gradient (PGD-50-3, PGD-50 on the margin, pgd-10) alone" in evidence
    assert "adaptive" not in evidence


def test_curves_fall(tmp_path: Path) -> None:
    images, labels = pictures()
    model = Bright().eval()
    files = kept(tmp_path, model)
    clean = Outcome(model(images).argmax(1) != labels, 0.0)

    def do(name: str, attack: Any, count: int, seed: int) -> Outcome:
        return files.get(Job(name, attack, count, seed))

    curves = evaluator.curves(plan(curves=True, checked=40), clean, do)
    for points in curves.values():
        assert all(accuracy.total == 40 for _, accuracy in points)
        places, values = zip(*((at, accuracy.correct) for at, accuracy in points), strict=True)
        assert list(places) == sorted(places)
        assert list(values) == sorted(values, reverse=True)
    assert [at for at, _ in curves["steps"]] == [1, 2, 5, 10, 20, 50, 100]
    assert [at for at, _ in curves["restarts"]] == list(range(1, 11))
    assert curves["eps"][0] == (0.0, Accuracy(int((~clean.found[:40]).sum()), 40))
    exact = [((images.flatten(1).mean(1) - 0.5).abs() > at)[:40].sum().item() for at, _ in curves["eps"][1:]]
    found = [accuracy.correct for _, accuracy in curves["eps"][1:]]
    assert all(abs(a - b) <= 1 for a, b in zip(exact, found, strict=True))


def test_evaluates_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "--attacks", "pgd-20-2,fgsm", "--images", "60", "--check-images", "40", "--curves") == 0
    record = results(run)
    exact = int(((pictures()[0].flatten(1).mean(1) - 0.5).abs() > EPS).sum())
    assert abs(record["robust"]["pgd-20-2"]["correct"] - exact) <= 1
    assert record["worst_case"]["correct"] <= min(entry["correct"] for entry in record["robust"].values())
    assert record["clean"]["total"] == record["images"] == 60
    low, high = record["clean"]["interval"]
    assert low < record["clean"]["accuracy"] <= high
    assert sum(entry["clean"]["total"] for entry in record["classes"]) == 60
    assert [entry["class"] for entry in record["classes"]] == [0, 1]
    assert sum(entry["worst_case"]["correct"] for entry in record["classes"]) == record["worst_case"]["correct"]
    assert (record["eps"], record["checked"], record["which"]) == (EPS, 40, "best")
    assert record["checkpoint"] == outcomes.digest(run / "best.safetensors")
    assert {verdict["result"] for verdict in record["checks"]} == {sanity.PASS}
    assert set(record["curves"]) == {"eps", "steps", "restarts"}
    for figure in ("attacks.png", "curves.png"):
        picture = matplotlib.image.imread(run / "evaluation" / figure)
        assert picture.shape[1] > 1000
        assert picture[..., :3].std() > 0.05
    shown = capsys.readouterr().out
    for word in ("clean", "pgd-20-2", "fgsm", "worst case", "verdict", "gradient masking: no sign of it"):
        assert word in shown


def test_the_same_command_is_done_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--attacks", "pgd-5", "--check-images", "20")
    assert command(run, *options) == 0
    first = results(run)
    monkeypatch.setattr(outcomes, "evaluate_attack", lambda *arguments: pytest.fail("attacked again"))
    assert command(run, *options) == 0
    assert results(run) == {**first, "environment": results(run)["environment"]}


def test_changed_settings_do_again_what_they_affect(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command(run, "--attacks", "pgd-5,fgsm", "--check-images", "0")
    done: list[str] = []
    evaluate_attack = outcomes.evaluate_attack

    def spy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, attack: Any, *rest: Any) -> Outcome:
        done.append(attack.name)
        return evaluate_attack(model, images, labels, attack, *rest)

    monkeypatch.setattr(outcomes, "evaluate_attack", spy)
    command(run, "--attacks", "pgd-5,pgd-6", "--check-images", "0")
    assert done == ["pgd-6"]
    command(run, "--attacks", "pgd-5,pgd-6", "--check-images", "0", "--eps", "0.2")
    assert done == ["pgd-6", "pgd-5", "pgd-6"]
    command(run, "--attacks", "pgd-5,pgd-6,fgsm", "--check-images", "0")
    assert len(done) == 3  # what the first two commands found is still there
    use(monkeypatch, run, Bright(Stairs()))
    command(run, "--attacks", "fgsm", "--check-images", "0")
    assert done[3:] == ["fgsm"]


def test_ctrl_c_loses_one_batch(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The first signal waits for the end of the batch; the same command then attacks the other two batches alone."""
    options = ("--attacks", "pgd-5", "--check-images", "0")
    assert command(run, *options, "--out", str(run / "whole")) == 0
    model = Bright()
    use(monkeypatch, run, model)
    write = outcomes.files.write_json

    def write_and_interrupt(path: Path, value: Any) -> None:
        write(path, value)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(outcomes.files, "write_json", write_and_interrupt)
        assert command(run, *options) == 130
    assert "What is done is kept; to go on: python -m models evaluate" in capsys.readouterr().err
    (path,) = (run / "evaluation").glob("pgd-5-*.json")
    assert len(json.loads(path.read_text())["found"]) == 25
    assert command(run, *options) == 0
    whole = json.loads((run / "whole" / "evaluation.json").read_text())
    assert results(run)["robust"]["pgd-5"]["correct"] == whole["robust"]["pgd-5"]["correct"]


def test_an_l2_attack_stays_out_of_the_worst_case(run: Path) -> None:
    """With a radius that reaches every image it breaks all of them, which says nothing of L-infinity."""
    command(run, "--attacks", "fgsm,cw:l2=3,steps=20", "--images", "20", "--check-images", "0")
    record = results(run)
    assert record["robust"]["cw:l2=3,steps=20"]["norm"] == "L2"
    assert record["robust"]["cw:l2=3,steps=20"]["radius"] == 3
    assert record["robust"]["cw:l2=3,steps=20"]["correct"] < record["robust"]["fgsm"]["correct"]
    assert record["worst_case"]["correct"] == record["robust"]["fgsm"]["correct"]


def test_transfer_from_another_run(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    command(run, "--attacks", "fgsm", "--transfer-from", str(other), "--check-images", "0")
    robust = results(run)["robust"]
    assert abs(robust["transfer from other"]["correct"] - robust["fgsm"]["correct"]) <= 1  # it is the same network


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--attacks", "pgg-5"), "argument --attacks: unknown attack 'pgg-5'"),
        (("--eps", "300/255"), "argument --eps: wanted a value in [0, 1], the range of the images, got 300/255"),
        (("--eps", "0"), "argument --eps: wanted a radius above 0"),
        (("--images", "0"), "argument --images: wanted a whole number from 1"),
        (("--which", "worst"), "argument --which: invalid choice: 'worst'"),
    ],
)
def test_wrong_options_are_explained(
    run: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        command(run, *options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--images", "61"), "--images 61 is more than the 60 images there are: test images of"),
        (("--attacks", "pgd-0"), "steps must be at least 1, got 0"),
        (("--attacks", "cw"), "attack 'cw' works in L2 and needs a radius of its own"),
        (("--device", "nonsense"), "--device nonsense cannot be used"),
    ],
)
def test_what_does_not_fit_the_run_is_explained(
    run: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, *options) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not (run / "evaluation").exists()


def test_a_run_without_a_radius_needs_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, run, Bright(), {"data": "pictures", "training": {"method": "standard", "eps": 0}})
    assert command(run, "--attacks", "fgsm") == 1
    assert "was not trained for a radius; give --eps" in capsys.readouterr().err
    assert command(run, "--attacks", "fgsm", "--eps", "8/255", "--check-images", "0") == 0
    assert results(run)["eps"] == 8 / 255


def test_a_trained_run_from_end_to_end(tmp_path: Path) -> None:
    """A network that `session` trained, read back from its folder; its checkpoint is that of evaluation.json."""
    recipe = Recipe(1, 20, 0.05, method="fast", eps=0.1, watch_steps=1, watch_images=20)
    folder = tmp_path / "run"
    settings = Settings("mnist5k:train=60,test=40,validation=20", "light:width=4,dense=8,patch=4", "kwta", recipe)
    session.prepare(settings, folder).run()
    assert command(folder, "--attacks", "pgd-3,adaptive:pgd_steps=2,samples=4,steps=2", "--check-images", "10") == 0
    record = results(folder)
    assert record["settings"] == settings.as_dict()
    assert record["images"] == 40
    assert record["worst_case"]["correct"] <= record["clean"]["correct"]
    assert record["format"] == evaluate.FORMAT


def test_file_names_are_plain_and_older_ones_are_found(tmp_path: Path) -> None:
    job = Job("PGD at ε = 0.1, nes:steps=5", pgd(EPS, 5), 60, seed=0)
    here = kept(tmp_path, Bright())
    here.get(job)
    path = here.path(job)
    assert re.fullmatch(r"PGD_at_eps_0.1_nes_steps_5-[0-9a-f]{10}\.json", path.name)
    older = path.rename(path.with_name(f"PGD_at_ε_=_0.1_nes_steps=5{path.name[-16:]}"))
    assert here.path(job) == older


@pytest.mark.parametrize("stop_at", [(0, 1), (1, 2), (2, 1)])
def test_an_attack_made_of_attacks_goes_on_after_the_member_at_which_it_stopped(
    tmp_path: Path, stop_at: tuple[int, int]
) -> None:
    """Members draw from one generator, so what comes after the stop depends on its state."""
    noise = LinfAttack(EPS / 2, step=0, noise=EPS / 2)
    job = Job("all", Strongest("all", (noise, noise, fgsm(EPS / 3), noise)), 60, seed=0)
    whole = kept(tmp_path / "whole", Bright()).get(job)
    batch, member = stop_at

    def stop(so_far: Outcome) -> None:
        if len(so_far.found) == 25 * batch and so_far.halfway is not None and so_far.halfway.members == member:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path, Bright()).get(job, stop)
    told: list[Outcome] = []
    model = Bright()
    assert kept(tmp_path, model).get(job, told.append).found.equal(whole.found)
    assert len(told[0].found) == (25 * batch if member < 3 else 25 * (batch + 1))
    assert told[0].halfway is not None
    assert told[0].halfway.members == member + 1
    assert whole.found.any()
    assert not whole.found.all()


def test_attacks_that_two_classes_do_not_allow_are_refused_before_the_first(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "--attacks", "pgd-5,autoattack") == 1
    assert "'apgd-t' needs a network with at least 4 classes, this one has 2" in capsys.readouterr().err
    assert not (run / "evaluation").exists()


def test_ctrl_c_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequest(AFTER_THIS) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert AFTER_THIS in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_restarts_of_the_curve_have_seeds_of_their_own() -> None:
    seen: dict[str, int] = {}

    def do(name: str, attack: Any, images: int, seed: int) -> Outcome:
        seen[name] = seed
        return Outcome(torch.zeros(images, dtype=torch.bool), 0.0)

    evaluator.curves(Plan(EPS, {}, 4, 4, True, seed=7), Outcome(torch.zeros(4, dtype=torch.bool), 0.0), do)
    assert [seen[f"start {n}"] for n in range(1, 11)] == list(range(7, 17))
    assert {seed for name, seed in seen.items() if not name.startswith("start")} == {7}
