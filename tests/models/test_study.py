import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import scipy.stats

from models.cli import main
from models.study import plan, workers
from models.study.plan import Study
from models.study.statistics import estimate, noise, paired, t_quantile
from models.study.summary import accuracies, summarise
from models.support import checkpoints

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "about": "A study of nothing.",
    "data": "mnist5k:train=80,test=40,validation=20",
    "networks": {"light": "light:width=2,dense=4,patch=7"},
    "activations": ["relu", "kaf"],
    "seeds": [0, 1],
    "training": {"epochs": 1, "batch_size": 20, "lr": 0.05, "method": "nfgsm", "watch_images": 10},
    "attacks": {"PGD": "pgd-3-2", "FGSM": "fgsm"},
    "eps": "51/255",
    "images": 10,
}


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "tiny.json"
    file.write_text(json.dumps({**TINY, **changes}))
    return file


def study(**changes: Any) -> Study:
    values = {**TINY, "eps": 0.2, **changes}
    return Study("tiny", **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def result(wrong: str, **found: str) -> dict[str, Any]:
    return {"wrong": wrong, "found": found}


def test_mean_and_interval_by_hand() -> None:
    """1, 2, 6: mean 3, deviation sqrt(7), t with 2 degrees of freedom 4.303."""
    found = estimate([1, 2, 6])
    assert found.mean == 3
    assert found.std == pytest.approx(7**0.5)
    assert found.high - 3 == pytest.approx(4.303 * (7 / 3) ** 0.5)
    assert found.low == pytest.approx(6 - found.high)
    alone = estimate([0.4])
    assert (alone.mean, alone.std, alone.low, alone.high) == (0.4, None, None, None)


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 11, 20, 100])
def test_quantiles_of_t(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), rel=2e-4)


def test_pairing_removes_what_seeds_have_in_common() -> None:
    found = paired([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert found.mean == pytest.approx(0.1)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_noise_between_seeds_is_pooled_by_degrees_of_freedom() -> None:
    """Variances 2 (1 degree) and 1 (2 degrees): (2 · 1 + 1 · 2) / 3."""
    found = noise([[0, 2], [1, 2, 3], [5]])
    assert (found.std, found.freedom) == (pytest.approx((4 / 3) ** 0.5), 3)
    assert found.difference == pytest.approx(3.182 * (8 / 3) ** 0.5)
    assert noise([[1], [2]]) is None


def test_an_image_is_robust_in_the_worst_case_where_nothing_breaks_it() -> None:
    found = accuracies(result("1000", PGD="1100", FGSM="1010"))
    assert found == {"clean": 0.75, "PGD": 0.5, "FGSM": 0.5, "worst": 0.25}


def test_summary_pairs_the_seeds_that_are_there() -> None:
    results = {
        "light-relu-0": result("0000", PGD="1100", FGSM="0000"),
        "light-kaf-0": result("0000", PGD="1000", FGSM="0000"),
        "light-relu-1": result("0000", PGD="1110", FGSM="0000"),
    }
    found = summarise(study(), results)
    assert (found["runs"], found["of"]) == (3, 4)
    relu, kaf = (found["networks"]["light"]["activations"][a] for a in ("relu", "kaf"))
    assert relu["PGD"]["values"] == [0.5, 0.25]
    assert relu["worst"]["mean"] == 0.375
    assert "difference" not in relu["PGD"]
    assert kaf["seeds"] == [0]
    assert kaf["PGD"]["difference"]["mean"] == 0.25
    assert kaf["PGD"]["difference"]["low"] is None
    assert found["networks"]["light"]["noise"]["PGD"]["std"] == pytest.approx(0.25 / 2**0.5)


def test_networks_without_results_are_left_out() -> None:
    both = study(networks={"light": "light", "vgg": "vgg"})
    assert list(summarise(both, {"vgg-relu-0": result("0", PGD="0", FGSM="0")})["networks"]) == ["vgg"]


def test_runs_compare_everything_once_before_the_next_seed() -> None:
    names = [run.name for run in study().runs()]
    assert names == ["light-relu-0", "light-kaf-0", "light-relu-1", "light-kaf-1"]
    assert all(run.settings.seed == int(run.name[-1]) for run in study().runs())


def test_a_study_is_done_shown_and_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "results"
    command = ["study", str(write(tmp_path)), "--out", str(out), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    assert main([*command, "--plan"]) == 0
    assert "0 of 4 runs are done" in capsys.readouterr().out
    assert not out.exists()
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"4/4 light-\w+-\d +clean [\d.]+%, PGD [\d.]+%, FGSM [\d.]+%, worst [\d.]+%; nothing is left", printed
    )
    assert sorted(p.stem for p in (out / "runs").iterdir()) == sorted(run.name for run in study().runs())
    summary = json.loads((out / "summary.json").read_text())
    assert summary["runs"] == 4
    page = (out / "README.md").read_text()
    assert f"{command[0]} {command[1]}" in page
    assert "4 of 4 runs" in page
    for name in ("accuracies", "differences"):
        assert matplotlib.image.imread(out / f"{name}.png")[..., :3].std() > 0.05
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    (out / "runs/light-kaf-1.json").unlink()
    assert main(command) == 0
    assert "3 of 4 runs are done, about" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert {p for p in before if before[p] != after[p]} == {out / "runs/light-kaf-1.json"}
    # The same run gives the same result.
    assert json.loads((out / "summary.json").read_text()) == summary


def test_a_run_that_fails_is_reported_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    file = write(tmp_path, seeds=[0], training={**TINY["training"], "lr": 1e30, "watch_steps": 0})
    out = tmp_path / "results"
    command = ["study", str(file), "--out", str(out), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    assert main(command) == 0
    assert "light-relu-0" in (printed := capsys.readouterr().out)
    assert "failed: the loss became nan in epoch 1" in printed
    assert "error" in json.loads((out / "runs/light-relu-0.json").read_text())
    assert main(command) == 0
    assert "2 of 2 runs are done, nothing is left" in capsys.readouterr().out


def test_failed_runs_are_left_out_and_named() -> None:
    results = {"light-relu-0": result("00", PGD="10", FGSM="00"), "light-kaf-0": {"error": "the loss became nan"}}
    found = summarise(study(), results)
    assert (found["runs"], found["activations"], found["failed"]) == (
        1,
        ["relu"],
        {"light-kaf-0": "the loss became nan"},
    )


def test_attacks_of_another_network_or_other_images_are_not_reused(tmp_path: Path) -> None:
    found = dataclasses.replace(study(), seeds=(0,), activations=("relu",))
    run = found.runs()[0]
    folders = tmp_path / "results", tmp_path / "runs"
    first = workers.train_and_attack(found, run, *folders)
    more = workers.train_and_attack(dataclasses.replace(found, images=20), run, *folders)
    assert [len(mask) for mask in (first["found"]["PGD"], more["found"]["PGD"], more["wrong"])] == [10, 20, 20]
    again = workers.train_and_attack(dataclasses.replace(found, images=20), run, *folders)
    assert (again["found"], again["seconds"]) == (more["found"], more["seconds"])  # read, not made again


@pytest.mark.parametrize(("content", "message"), [("{", "is not valid JSON"), ("[]", "is no result of a study")])
def test_damaged_results_are_named(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results/runs").mkdir(parents=True)
    (tmp_path / "results/runs/light-relu-0.json").write_text(content)
    assert main(["study", str(write(tmp_path)), "--out", str(tmp_path / "results"), "--plan"]) == 1
    assert message in capsys.readouterr().err


def test_results_of_other_settings_are_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results"
    (out / "runs").mkdir(parents=True)
    run = plan.load(str(write(tmp_path))).runs()[0]
    settings = {**run.settings.as_dict(), "attacks": {}, "eps": 0.1, "images": 10}
    (out / "runs" / f"{run.name}.json").write_text(json.dumps({"settings": settings}))
    assert main(["study", str(tmp_path / "tiny.json"), "--out", str(out)]) == 1
    assert "was made with other settings: attacks, eps differ; give another --out" in capsys.readouterr().err


@pytest.mark.slow  # half a minute, and more on a busy machine
def test_workers_end_with_the_process_that_began_them(tmp_path: Path) -> None:
    file = write(tmp_path, training={**TINY["training"], "epochs": 10_000})
    command = [sys.executable, "-m", "models", "study", str(file), "--out", str(tmp_path / "results"), "--jobs", "1"]
    study = subprocess.Popen([*command, "--runs", str(tmp_path / "runs")], cwd=ROOT, stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "runs/light-relu-0/latest.safetensors"
    try:
        assert wait_for(checkpoint.exists)
        below = children(study.pid)
        assert below
    finally:
        study.kill()
        study.wait()
    assert wait_for(lambda: not any(alive(process) for process in below))
    assert checkpoints.load(checkpoint)[1]["epoch"] > 0


def wait_for(condition: Callable[[], bool], seconds: float = 300.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def children(process: int) -> list[int]:
    own = [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return own + [grandchild for child in own for grandchild in children(child)]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_result_from_before_a_setting_was_new_still_counts(tmp_path: Path) -> None:
    found = plan.load(str(write(tmp_path)))
    run = found.runs()[0]
    settings = run.settings.as_dict()
    del settings["training"]["label_smoothing"]
    record = {"settings": {**settings, "attacks": found.attacks, "eps": found.eps, "images": found.images}}
    (tmp_path / "runs").mkdir()
    (tmp_path / f"runs/{run.name}.json").write_text(json.dumps(record))
    assert workers.read(tmp_path, found) == {run.name: record}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activations": ["relu", "kfa"]}, "unknown activation 'kfa'"),
        ({"attacks": {"PGD": "pdg-50"}}, "unknown attack 'pdg-50'"),
        ({"activations": ["relu", "relu"]}, "must not repeat"),
        ({"attacks": {"PGD": "pgd-5:steps=3"}}, "option 'steps' of attack 'pgd' is given twice"),
        ({"eps": "2"}, r"wanted a value in \[0, 1\]"),
        ({"eps": "__import__('os')"}, "wanted a number such as 0.2 or a fraction"),
        ({"training": {"epochs": 1}}, "settings lack batch_size, lr"),
        ({"colour": "red"}, "unexpected keyword argument 'colour'"),
    ],
)
def test_a_wrong_study_says_what_is_wrong(
    tmp_path: Path, changes: dict, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(write(tmp_path, **changes))])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_unknown_study_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["study", "mnist5"])
    assert "unknown study 'mnist5', there are lipschitz, mnist5k; did you mean mnist5k?" in capsys.readouterr().err


@pytest.mark.parametrize("name", plan.names())
def test_every_study_is_sound(name: str) -> None:
    found = plan.load(name)
    assert len({run.name for run in found.runs()}) == len(found.runs())
    assert found.images >= 200
    assert dataclasses.asdict(found)["eps"] == found.eps
