import dataclasses
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from scipy.stats import bootstrap, spearmanr
from scipy.stats import t as scipy_t
from statsmodels.stats.weightstats import ttost_paired

from models.cli import main
from models.commands import tune
from models.figures import study as study_figures
from models.study import page, plan, tuning, workers
from models.study.plan import Study, Tuning
from models.study.statistics import Difference, difference, equivalence, estimate, holm, holm_p, paired, rank
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
    assert found.high - 3 == pytest.approx(4.303 * (7 / 3) ** 0.5, rel=1e-4)
    assert found.low == pytest.approx(6 - found.high)
    alone = estimate([0.4])
    assert (alone.mean, alone.std, alone.low, alone.high) == (0.4, None, None, None)


def test_pairing_removes_what_seeds_have_in_common() -> None:
    found = paired([0.5, 0.7, 0.9], [0.4, 0.6, 0.8])
    assert found.mean == pytest.approx(0.1)
    assert found.std == pytest.approx(0, abs=1e-12)


def outcomes(*seeds: str) -> np.ndarray:
    return np.array([[image == "1" for image in seed] for seed in seeds])


def test_a_difference_is_uncertain_by_its_seeds_and_its_images() -> None:
    """Seeds' differences are 0.25 and 0.75, an image's mean 1, 0.5, 0.5 or 0."""
    gains = outcomes("1000" * 50, "1110" * 50)
    found = difference(gains, outcomes("0000" * 50, "0000" * 50))
    assert (found.mean, found.seeds, found.images) == (0.5, 2, 200)
    assert found.between_seeds == pytest.approx(0.125**0.5)
    assert found.of_images == pytest.approx((0.125 / 199) ** 0.5)
    assert 1 <= found.freedom < 1.2  # nearly all of it is between two seeds
    low, high = found.interval()
    assert (low + high) / 2 == pytest.approx(0.5)
    assert low < 0 < found.p
    # The bootstrap itself: n seeds that are drawn anew have (n - 1)/n of their variance; 4,000 draws are right to 2 %.
    generator = np.random.default_rng(0)
    draws = [gains[generator.integers(2, size=2)][:, generator.integers(200, size=200)].mean() for _ in range(4000)]
    lacking = 0.125 / 2 * (1 - 1 / 2)
    assert found.error**2 == pytest.approx(np.var(draws) + lacking, rel=0.04)


def test_seeds_that_agree_leave_the_images() -> None:
    found = difference(outcomes(*4 * ["10" * 100]), outcomes(*4 * ["00" * 100]))
    assert found.between_seeds == 0
    assert found.of_images == pytest.approx((0.25 / 199) ** 0.5)
    assert found.freedom == pytest.approx(199)
    # How far three differ is not known from three that happen to agree.
    assert difference(outcomes(*3 * ["10" * 100]), outcomes(*3 * ["00" * 100])).freedom == pytest.approx(2)


def test_one_seed_allows_no_interval() -> None:
    found = difference(outcomes("1100"), outcomes("0000"))
    assert (found.mean, found.error, found.p, found.interval()) == (0.5, None, None, None)
    assert holm([found]) == [None]
    with pytest.raises(ValueError, match="wanted"):
        difference(outcomes("11"), outcomes("111"))


def test_no_difference_is_found_in_nothing() -> None:
    """Of pairs drawn alike 5 % are found to differ at most: 400 draws, three standard errors."""
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(400):
        rates = generator.uniform(0.4, 0.6, (2, 5, 1))
        found += (difference(*(generator.random((2, 5, 100)) < rates)).p or 0) < 0.05
    assert found <= 400 * 0.05 + 3 * (400 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("seeds", [2, 3, 4])
def test_few_seeds_of_networks_that_differ_find_no_more_than_they_should(seeds: int) -> None:
    """Networks scatter by 6 points, images by difficulty; at the first level of six comparisons, 0.0083, as well.

    By Welch and Satterthwaite's degrees alone two seeds found 4 % there, and three 2 %. 600 draws, three standard
    errors.
    """
    generator = np.random.default_rng(seeds)
    found = []
    for _ in range(600):
        hard = generator.normal(size=300)
        apart = generator.normal(scale=0.2, size=(seeds, 1))  # 6 points where 80 % are right
        one, other = hard + 0.5 * generator.normal(size=(2, seeds, 300)) < 0.94 + np.stack([apart, 0 * apart])
        found.append(difference(one, other).p or 0)
    for level in (0.05, 0.05 / 6):
        assert np.mean(np.array(found) < level) <= level + 3 * (level * (1 - level) / 600) ** 0.5


def test_holm_corrects_by_hand() -> None:
    """p = 0.01, 0.04, 0.03 of three: 0.03, then 0.06 for both; only the first is below 0.05."""

    def of(p: float) -> Difference:
        freedom = 4.0
        error = 0.1 / scipy_t.isf(p / 2, freedom)
        return Difference(0.1, 5, 100, 0.1, 0.01, error, freedom)

    first, second, third = holm([of(0.01), of(0.04), of(0.03)])
    assert [round(c.p, 6) for c in (first, second, third)] == [0.03, 0.06, 0.06]
    assert [c.found for c in (first, second, third)] == [True, False, False]
    assert first.low > 0  # at the level 0.05 / 3
    assert third.low < 0  # at 0.05 / 2
    # Holm's procedure ends at 0.029 of two: 0.036 would pass at 0.05, and its interval must not say so.
    ended = holm([of(0.029), of(0.036)])
    assert [(c.found, c.low > 0) for c in ended] == [(False, False)] * 2
    assert holm([]) == []
    # Of three that are planned one is there so far: it is tested at 0.05 / 3, whatever the others will be.
    (early,) = holm([of(0.01)], planned=3)
    assert early == first
    assert [round(p, 6) for p in holm_p([0.01, 0.04, 0.03])] == [0.03, 0.06, 0.06]
    assert holm_p([]) == []


def test_equality_is_claimed_within_a_margin_only() -> None:
    """Both one-sided tests at 5 %, as statsmodels makes them; t with 2 degrees of freedom is 2.920 at 5 %."""
    one, other = np.array([0.953, 0.961, 0.958]), np.array([0.960, 0.962, 0.966])
    apart = paired(one, other)
    found = equivalence(apart.mean, apart.std / 3**0.5, 2)
    assert found.high - apart.mean == pytest.approx(2.920 * apart.std / 3**0.5, rel=1e-4)
    assert (found.low + found.high) / 2 == pytest.approx(apart.mean)
    for margin in (0.008, 0.0115, 0.0118, 0.02):
        shown = equivalence(apart.mean, apart.std / 3**0.5, 2, margin).shown
        assert shown == (ttost_paired(one, other, -margin, margin)[0] < 0.05)
        assert shown == (margin > 0.0116)
        assert not equivalence(apart.mean, apart.std / 3**0.5, 2, margin).excluded
    large = equivalence(0.03, 0.001, 2)
    assert (large.shown, large.excluded) == (False, True)


def test_ranks_are_correlated_over_runs() -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=12)
    y = np.round(x + generator.normal(size=12))  # with ties
    found = rank(x, y)
    assert found.rho == pytest.approx(spearmanr(x, y).statistic)
    # SciPy's own bootstrap of pairs: percentiles of 9,999 draws are right to about 0.02.
    theirs = bootstrap((x, y), lambda a, b: spearmanr(a, b).statistic, paired=True, vectorized=False,
                       n_resamples=2000, method="percentile", rng=1).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.05)
    assert rank(x, y) == found
    falling = rank(range(8), [9, 8, 7, 5, 4, 2, 1, 0])
    assert (falling.rho, falling.low, falling.high) == pytest.approx((-1, -1, -1))
    few = rank([1, 2, 3, 4], [1, 2, 3, 5])  # in order by chance once in 12, up or down
    assert (few.rho, few.low, few.high) == (pytest.approx(1), None, None)


@pytest.mark.parametrize(
    ("x", "y"), [([1, 2], [2, 1]), ([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2, float("nan")], [1, 2, 3])]
)
def test_what_cannot_be_ranked_has_no_correlation(x: list[float], y: list[float]) -> None:
    found = rank(x, y)
    assert (found.rho, found.low, found.high, found.count) == (None, None, None, len(x))


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
    relu, kaf = (found["rates"]["common"]["light"]["activations"][a] for a in ("relu", "kaf"))
    assert relu["PGD"]["values"] == [0.5, 0.25]
    assert relu["worst"]["mean"] == 0.375
    assert "difference" not in relu["PGD"]
    assert kaf["seeds"] == [0]
    assert kaf["PGD"]["difference"]["mean"] == 0.25
    assert kaf["PGD"]["difference"]["low"] is None


def test_made_up_images_are_marked_in_every_table() -> None:
    environment = dict.fromkeys(("processor", "torch", "kafops", "commit"), "")
    for images, mark in ((TINY["data"], False), ("fake:like=digits", True)):
        made = study(data=images, comparisons=(("kaf", "relu"),))
        done = {run.name: {**result("00", PGD="10", FGSM="00"), "environment": environment} for run in made.runs()}
        written = page.markdown(made, summarise(made, done), done, "command")
        tries = dataclasses.replace(tuned_study(), data=images, eps=0.2).tuning_runs()
        held_out = {run.name: {"wrong": "00", "found": {"held out": "01"}} for run in tries.runs()}
        written += tune._page(tries, tuning.tried(tries, held_out), held_out, "command")
        tables = re.findall(r"(?m)(?:^\|.*\n)+", written)
        assert ["(made-up images)" in table for table in tables] == 4 * [mark]


def test_networks_without_results_are_left_out() -> None:
    both = study(networks={"light": "light", "vgg": "vgg"})
    assert list(summarise(both, {"vgg-relu-0": result("0", PGD="0", FGSM="0")})["rates"]["common"]) == ["vgg"]


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
    for name in ("accuracies", "differences", "robust-clean"):
        assert matplotlib.image.imread(out / f"{name}.png")[..., :3].std() > 0.05
    before = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    (out / "runs/light-kaf-1.json").unlink()
    assert main(command) == 0
    assert "3 of 4 runs are done, about" in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in (out / "runs").iterdir()}
    assert {p for p in before if before[p] != after[p]} == {out / "runs/light-kaf-1.json"}
    # The same run gives the same result.
    assert json.loads((out / "summary.json").read_text()) == summary
    # Where nothing is left to do, no images are needed to write the page anew.
    (out / "README.md").unlink()
    monkeypatch.setattr(workers, "part", lambda *_: pytest.fail("images were loaded"))
    assert main(command) == 0
    assert (out / "README.md").read_text() == page


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


def test_failed_runs_are_wrong_on_every_image_and_named() -> None:
    """Left out, an activation whose training fails would be judged by the seeds at which it does not."""
    good = result("0" * 10, PGD="1" + "0" * 9, FGSM="0" * 10)
    results = {f"light-{a}-{seed}": good for a in ("relu", "kaf") for seed in (0, 1)}
    found = summarise(study(), {**results, "light-kaf-1": {"error": "the loss became nan"}})
    assert (found["runs"], found["failed"]) == (4, {"light-kaf-1": "the loss became nan"})
    kaf = found["rates"]["common"]["light"]["activations"]["kaf"]
    assert kaf["seeds"] == [0, 1]
    assert {m: kaf[m]["values"] for m in found["measures"]} == {
        "clean": [1, 0], "PGD": [0.9, 0], "FGSM": [1, 0], "worst": [0.9, 0],
    }  # fmt: skip
    assert kaf["PGD"]["difference"]["mean"] == pytest.approx(-0.45)


def test_a_figure_pairs_the_seeds_that_both_have() -> None:
    entries = [
        {"seeds": [0, 1, 3], "worst": {"values": [0.5, 0.6, 0.9]}},
        {"seeds": [1, 2, 0], "worst": {"values": [0.7, 0.1, 0.3]}},
    ]
    assert study_figures._seeds(*entries, "worst") == pytest.approx([0.2, -0.1])


def test_an_axis_shows_the_narrower_half_of_the_intervals() -> None:
    """Of few seeds all may be far wider than what the seeds span; one that is wider still is cut off."""

    def entry(*values: float, half: float) -> dict[str, Any]:
        mean = sum(values) / len(values)
        return {"seeds": [0, 1], "worst": {
            "values": list(values), "mean": mean, "difference": {"mean": mean, "low": mean - half, "high": mean + half}
        }}  # fmt: skip

    found = {
        "relu": {"seeds": [0, 1], "worst": {"values": [0.0, 0.0], "mean": 0.0}},
        "silu": entry(0.0, 0.02, half=0.1), "elu": entry(-0.02, 0.0, half=0.2), "kaf": entry(0.0, 0.01, half=5.0),
    }  # fmt: skip
    summary = {"baseline": "relu", "activations": list(found), "rates": {"tuned": {"light": {"activations": found}}}}
    figure = study_figures.differences.__wrapped__(summary, "worst")  # type: ignore[attr-defined]
    low, high = figure.axes[0].get_xlim()
    assert -60 < low < -21
    assert 19 < high < 60


def crowded() -> dict[str, Any]:
    """Nine activations, closer to each other than their names are high."""

    def entry(x: float, y: float) -> dict[str, Any]:
        return {m: {"mean": v, "values": [v - 0.02, v + 0.02]} for m, v in (("clean", x), ("worst", y))}

    places = itertools.product(range(3), range(3))
    found = {f"{'kaf' if x else 'silu'}_{x}{y}": entry(0.9 + 0.004 * x, 0.5 + 0.004 * y) for x, y in places}
    return {"rates": {"tuned": {"light": {"activations": found}}}}


@pytest.mark.parametrize("study_name", [None, "tuned5k", "methods5k"])
def test_names_cover_neither_each_other_nor_means(study_name: str | None) -> None:
    committed = Path(__file__).parents[2] / f"results/{study_name}/summary.json"
    summary = crowded() if study_name is None else json.loads(committed.read_text())
    figure = study_figures.robust_against_clean.__wrapped__(summary, "worst")  # type: ignore[attr-defined]
    figure.draw_without_rendering()
    for axes in figure.axes:
        names = [text.get_window_extent() for text in axes.texts if text.get_text()]
        means = axes.transData.transform(axes.collections[0].get_offsets())
        assert len(names) == len(means) >= 6
        assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))
        assert not any(box.contains(*mean) for box in names for mean in means)
        inside = axes.get_window_extent()
        assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in names)


def test_names_are_where_they_were() -> None:
    first = study_figures.robust_against_clean(crowded(), "worst")
    assert first == study_figures.robust_against_clean(crowded(), "worst")


def test_a_rate_at_which_a_network_has_no_runs_yet_leaves_its_place_empty() -> None:
    summary = crowded()
    summary["rates"]["common"] = {"vgg": summary["rates"]["tuned"]["light"]}
    figure = study_figures.robust_against_clean.__wrapped__(summary, "worst")  # type: ignore[attr-defined]
    assert [len(axes.texts) > 0 for axes in figure.axes] == [True, False, False, True]


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
        ({"seeds": []}, "seeds must not be empty"),
        ({"networks": {}}, "networks must not be empty"),
        ({"attacks": {}, "images": {}}, "images must not be empty"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"images": {"PGD": -5}}, "images must be at least 1, got -5"),
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
    there = f"there are {', '.join(plan.names())}; did you mean mnist5k"
    assert f"unknown study 'mnist5', {there}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", plan.names())
def test_every_study_is_sound(name: str) -> None:
    found = plan.load(name)
    assert len({run.name for run in found.at("common")}) == len(found.at("common"))
    assert all(found.count(attack) >= 200 for attack in found.attacks)
    assert dataclasses.asdict(found)["eps"] == found.eps


TUNED = {
    **TINY,
    "activations": ["relu", "kaf", "kaf_frozen", "prelu"],
    "variants": {"kaf_frozen": {"activation": "kaf", "training": {"activation_lr": 0}}},
    "comparisons": [["kaf", "kaf_frozen"], ["kaf", "relu"]],
    "rates": ["tuned", "common"],
    "tuning": {"lr": [0.05, 0.1], "activation_lr": [0.1, 1], "seeds": [7, 8], "attack": "pgd-3", "images": 20},
    "images": {"PGD": 40, "FGSM": 10},
}


def tuned_study(**changes: Any) -> Study:
    values = {**TUNED, "eps": 0.2, **changes}
    return study(
        **{
            **values,
            "tuning": Tuning(**{n: tuple(v) if isinstance(v, list) else v for n, v in values["tuning"].items()}),
        }
    )


def test_rates_are_tried_on_held_out_images_with_seeds_of_their_own() -> None:
    tries = tuned_study().tuning_runs()
    assert tries.part == "validation"
    assert {run.seed for run in tries.runs()} == {7, 8}
    of = {a: [r for r in tries.runs() if (r.activation, r.seed) == (a, 7)] for a in TUNED["activations"]}
    # What learns nothing, or is said to be frozen, has no rate of its own to try.
    assert {a: len(runs) for a, runs in of.items()} == {"relu": 2, "kaf": 4, "kaf_frozen": 2, "prelu": 4}
    assert [run.name for run in of["kaf"]][-1] == "light-kaf-lr0.1x1-7"
    assert (of["kaf"][-1].settings.training.lr, of["kaf"][0].settings.training.activation_lr) == (0.1, 0.1)
    assert {run.settings.training.activation_lr for run in of["kaf_frozen"]} == {0}
    part, test = (workers.part(s, 0).tensors(10)[0] for s in (tries, tuned_study()))
    assert not any(torch.equal(a, b) for a in part for b in test)


def test_the_best_rates_of_all_seeds_are_chosen() -> None:
    tries = tuned_study().tuning_runs()
    robust = {"relu-lr0.05": ("0001", "0111"), "relu-lr0.1": ("0000", "1111"), "kaf_frozen-lr0.1": ("0000", "0000")}
    results = {}
    for run in tries.runs():
        mask = robust.get(f"{run.activation}-{run.rate}", ("1111", "1111"))[run.seed - 7]
        results[run.name] = {"wrong": "0000", "found": {"held out": mask}}
    del results["light-prelu-lr0.1x1-8"]
    results["light-kaf_frozen-lr0.1-8"] = {"error": "the loss became nan in epoch 1"}  # counts as 0 of its half
    results["light-kaf-lr0.1x0.1-7"]["found"]["held out"] = "0000"
    chosen = tuning.chosen(tries, results)
    assert chosen == {
        "light": {
            "relu": {"lr": 0.05, "activation_lr": 1.0},  # 1/2 at both: the lower
            "kaf": {"lr": 0.1, "activation_lr": 0.1},
            "kaf_frozen": {"lr": 0.1, "activation_lr": 0},
        }
    }
    assert tuning.at_the_end(tries, "kaf", chosen["light"]["kaf"]) == [
        "lr 0.1 (largest)",
        "activation_lr 0.1 (smallest)",
    ]
    assert tuning.at_the_end(tries, "relu", chosen["light"]["relu"]) == ["lr 0.05 (smallest)"]


def test_runs_at_own_rates_stand_for_those_at_common_ones_where_they_are_the_same() -> None:
    common = {"lr": 0.05, "activation_lr": 1.0}
    own = {"relu": common, "kaf": {"lr": 0.1, "activation_lr": 0.1}, "kaf_frozen": {"lr": 0.1, "activation_lr": 0}}
    found = tuned_study(seeds=[0]).with_tuned({"light": {**own, "prelu": common}})
    names = [run.name for run in found.runs()]
    assert names == [
        "light-relu-0", "light-kaf-tuned-0", "light-kaf_frozen-tuned-0", "light-prelu-0",
        "light-kaf-0", "light-kaf_frozen-0",
    ]  # fmt: skip
    assert [run.name for run in found.at("common")] == [f"light-{a}-0" for a in TUNED["activations"]]
    assert found.frozen("kaf_frozen")
    assert not found.frozen("kaf")
    assert not found.frozen("relu")
    with pytest.raises(ValueError, match="no rates were chosen for light with prelu"):
        tuned_study().with_tuned({"light": own})


def test_rates_are_tuned_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    file = write(tmp_path, **{**TUNED, "activations": ["relu", "kaf_frozen"], "comparisons": [["kaf_frozen", "relu"]]})
    out = tmp_path / "results"
    options = ["--out", str(out), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(file), *options])
    assert f"choose the rates first: python -m models tune {file} --out" in " ".join(capsys.readouterr().err.split())
    assert main(["tune", str(file), *options]) == 0
    rates = json.loads((out / "tuned.json").read_text())["rates"]["light"]
    assert rates["kaf_frozen"]["activation_lr"] == 0
    assert "8 of 8 runs" in (out / "tuning/README.md").read_text()
    assert matplotlib.image.imread(out / "tuning/rates.png")[..., :3].std() > 0.05
    assert main(["study", str(file), *options]) == 0
    record = json.loads(next((out / "runs").glob("light-kaf_frozen*-0.json")).read_text())
    assert (record["frozen"], record["rate"]) == (True, "common" if rates["kaf_frozen"]["lr"] == 0.05 else "tuned")
    assert {name: len(mask) for name, mask in record["found"].items()} == {"PGD": 40, "FGSM": 10}
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["rates"]) == ["tuned", "common"]
    assert [(c["pair"], c["attack"], c["seeds"], c["images"]) for c in summary["comparisons"]] == [
        (["kaf_frozen", "relu"], "PGD", 2, 40),
        (["kaf_frozen", "relu"], "FGSM", 2, 10),
    ]
    page = (out / "README.md").read_text()
    assert "light, tuned rate" in page
    assert "light, common rate" in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ["fast"]}, "rates must be common, tuned or both, got fast"),
        ({"tuning": {**TUNED["tuning"], "seeds": [1]}}, "seeds of their own, and 1 are the study's too"),
        ({"images": {"PGD": 40}}, "images must be a number, or one for each of PGD, FGSM"),
        ({"comparisons": [["kaf", "silu"]]}, "comparisons must be pairs of activations, got kaf, silu"),
    ],
)
def test_a_wrong_tuning_says_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.load(str(write(tmp_path, **{**TUNED, **changes})))


def test_a_study_at_tuned_rates_says_how_they_are_chosen(tmp_path: Path) -> None:
    for neither_or_both in ({}, {**TUNED, "tuned_by": "tuned5k"}):
        with pytest.raises(ValueError, match="must say how they are chosen, by tuning or tuned_by"):
            plan.load(str(write(tmp_path, **{**neither_or_both, "rates": ["tuned"]})))


METHODS = {
    **TINY,
    "methods": {"PGD-2": {"method": "pgd:steps=2"}, "free": {"method": "free:m=2", "epochs": 1}},
    "eps": [0.1, "51/255"],
    "attacks": {"PGD": "pgd-3"},
    "seeds": [0],
    "training": {"epochs": 2, "batch_size": 40, "lr": 0.05, "watch_steps": 0},
}


def test_methods_and_radii_make_runs(tmp_path: Path) -> None:
    found = plan.load(str(write(tmp_path, **METHODS)))
    assert [panel.label for panel in found.panels()] == [
        "light, PGD-2, ε = 0.1", "light, PGD-2, ε = 0.2", "light, free, ε = 0.1", "light, free, ε = 0.2",
    ]  # fmt: skip
    runs = {run.name: run for run in found.runs()}
    assert len(runs) == 8
    free = runs["light-free-eps0.2-kaf-0"]
    training = free.settings.training
    assert (training.method, training.epochs, training.eps) == ("free:m=2", 1, 0.2)
    assert workers.settings(found, free)["eps"] == 0.2
    pgd = runs["light-PGD-2-eps0.1-relu-0"].settings.training
    assert (pgd.method, pgd.epochs, pgd.eps) == ("pgd:steps=2", 2, 0.1)


def test_a_study_over_eps_is_done_and_shown(tmp_path: Path) -> None:
    """Each run is trained and attacked at its own eps, and has its cell in the table of its method."""
    out = tmp_path / "results"
    file = write(tmp_path, **METHODS)
    assert main(["study", str(file), "--out", str(out), "--runs", str(tmp_path / "runs"), "--jobs", "1"]) == 0
    for run in plan.load(str(file)).runs():
        settings = json.loads((tmp_path / "runs" / run.name / "run.json").read_text())["settings"]
        assert settings["training"]["eps"] == run.panel.eps
        assert json.loads((out / f"runs/{run.name}.json").read_text())["settings"]["eps"] == run.panel.eps
    written = (out / "README.md").read_text()
    for method in METHODS["methods"]:
        assert f"| light, {method} | ε = 0.1 | ε = 0.2 |" in written
    assert matplotlib.image.imread(out / "radii.png")[..., :3].std() > 0.05
    assert sorted(p.name for p in out.glob("*.png")) == ["radii.png"]


def test_runs_that_overfitted_are_counted() -> None:
    """Of two seeds of one activation the one that withstands PGD on 41 points fewer images than its own attack."""
    overfitting = study(attacks={"PGD": "pgd-3"}, eps=(0.1, 0.2), comparisons=(("kaf", "relu"),))
    done = {}
    for run in overfitting.runs():
        fell = run.name == "light-eps0.2-kaf-1"
        history = [{"robust": None, "accuracy": 0.9}, {"robust": 0.49 if fell else 0.5, "accuracy": 0.9}]
        done[run.name] = {**result("0000", PGD="0011"), "history": history}
    summary = summarise(overfitting, done)
    panels = summary["rates"]["common"]
    assert [panels["light, ε = 0.2"]["activations"][a]["overfitted"] for a in ("relu", "kaf")] == [0, 1]
    assert [panels["light, ε = 0.1"]["activations"][a]["overfitted"] for a in ("relu", "kaf")] == [0, 0]
    environment = dict.fromkeys(("processor", "torch", "kafops", "commit"), "")
    written = page.markdown(overfitting, summary, {n: {**r, "environment": environment} for n, r in done.items()}, "")
    assert "| kaf | 100.0 / 50.0 ± 0.0 | 100.0 / 50.0 ± 0.0 (1 of 2) |" in written
    assert "| kaf against relu | 4 | 0 | 1 | 0 | 1 |" in written


def test_which_runs_overfitted_is_compared_in_pairs() -> None:
    """Of 8 pairs 1 overfits in both and 6 in the second alone: p = 2/64, times two comparisons."""
    pairs = (("kaf", "relu"), ("silu", "kaf"))
    radii = tuple(0.1 * n for n in range(1, 5))
    overfitting = study(attacks={"PGD": "pgd-3"}, eps=radii, activations=["relu", "kaf", "silu"], comparisons=pairs)
    done = {}
    for place, run in enumerate(run for run in overfitting.runs() if run.activation == "relu"):
        for name in ("relu", "kaf", "silu"):
            fell = place < 7 if name == "relu" else place == 0 and name == "kaf"
            history = [{"robust": 0.1, "accuracy": 0.9}, {"robust": 0.1 if fell else 0.7, "accuracy": 0.9}]
            done[run.name.replace("relu", name)] = {**result("0000", PGD="0011"), "history": history}
    first, second = summarise(overfitting, done)["overfitting"]
    names = ("pair", "pairs", "both", "first", "second", "unknown", "p", "holm")
    assert first == dict(zip(names, (["kaf", "relu"], 8, 1, 0, 6, 0, 2 / 64, 4 / 64), strict=True))
    assert second == dict(zip(names, (["silu", "kaf"], 8, 0, 0, 1, 0, 1, 1), strict=True))


def overfitted(*, withstands: float | None) -> dict[str, Any]:
    return {**result("0000", PGD="0011"), "history": [{"robust": withstands, "accuracy": 0.9}]}


def test_what_is_not_known_of_both_is_no_pair() -> None:
    """A run that failed has not withstood anything; one without a watch was not seen."""
    made = study(attacks={"PGD": "pgd-3"}, eps=(0.1, 0.2), comparisons=(("kaf", "relu"),), images=4)
    done = {run.name: overfitted(withstands=0.8 if run.activation == "kaf" else 0.1) for run in made.runs()}
    done["light-eps0.1-kaf-0"] = {"error": "the loss became nan"}
    done["light-eps0.2-kaf-1"] = overfitted(withstands=None)
    summary = summarise(made, done)
    (row,) = summary["overfitting"]
    assert {n: row[n] for n in ("pairs", "both", "first", "second", "unknown")} == {
        "pairs": 2, "both": 0, "first": 0, "second": 2, "unknown": 2,
    }  # fmt: skip
    kaf = summary["rates"]["common"]["light, ε = 0.1"]["activations"]["kaf"]
    assert (kaf["overfitted"], kaf["watched"], len(kaf["seeds"])) == (0, 1, 2)
    environment = dict.fromkeys(("processor", "torch", "kafops", "commit"), "")
    written = page.markdown(made, summary, {n: {**r, "environment": environment} for n, r in done.items()}, "")
    assert "| kaf against relu | 2 (2 more failed or had no watch) | 0 | 0 | 2 |" in written


def test_a_pair_of_runs_counts_once() -> None:
    """Where both activations' own rates are the common ones, the runs at the one are those at the other."""
    made = study(
        attacks={"PGD": "pgd-3"}, eps=(0.1, 0.2), comparisons=(("kaf", "relu"),), seeds=[0], tuned_by="other",
        rates=("tuned", "common"), tuned={"light": {a: {"lr": 0.05, "activation_lr": 1.0} for a in ("relu", "kaf")}},
    )  # fmt: skip
    done = {run.name: overfitted(withstands=0.1 if run.activation == "kaf" else 0.8) for run in made.runs()}
    assert len(done) == 4
    (row,) = summarise(made, done)["overfitting"]
    assert (row["pairs"], row["first"], row["p"]) == (2, 2, 0.5)


def test_a_gap_between_attacks_is_that_on_the_same_images() -> None:
    """PGD is right on all of the first four images, which are easy, and on half of the rest, which FGSM never saw."""
    one = result("0" * 12, PGD="0" * 4 + "01" * 4, FGSM="0001")
    done = {run.name: {**one, "environment": {}} for run in study(activations=["relu"]).runs()}
    relu = summarise(study(activations=["relu"]), done)["rates"]["common"]["light"]["activations"]["relu"]
    assert relu["gaps"] == {"PGD": 0.25, "FGSM": 0}


def test_differences_at_another_rate_than_is_compared_are_all_listed() -> None:
    """At the common rate nothing is corrected, so what was named beforehand is among what excludes 0."""
    made = dataclasses.replace(
        study(activations=["relu", "kaf", "silu"], comparisons=(("kaf", "relu"),), seeds=list(range(5))),
        rates=("tuned", "common"), tuned_by="other",
        tuned={"light": {a: {"lr": 0.1, "activation_lr": 1.0} for a in ("relu", "kaf", "silu")}},
    )  # fmt: skip
    environment = dict.fromkeys(("processor", "torch", "kafops", "commit"), "")
    done = {}
    for run in made.runs():
        wrong = ("10" if run.activation == "relu" else "00") * 100
        done[run.name] = {**result(wrong, PGD=wrong, FGSM=wrong), "environment": environment}
    written = page.markdown(made, summarise(made, done), done, "")
    said = written.splitlines()
    of_rate = {rate: next(s for s in said if s.startswith(f"- light, {rate} rate")) for rate in made.rates}
    assert "silu (" in of_rate["tuned"]
    assert "kaf (" not in of_rate["tuned"]
    assert "kaf (" in of_rate["common"]


@pytest.mark.parametrize("eps", ["8/255", 1 / 3])
def test_results_with_a_radius_of_many_digits_are_read_again(tmp_path: Path, eps: str | float) -> None:
    """Results are rounded, settings among them."""
    made = plan.load(str(write(tmp_path, eps=eps, seeds=[0], activations=["relu"])))
    written = workers.train_and_attack(made, made.runs()[0], tmp_path / "results", tmp_path / "runs")
    assert workers.read(tmp_path / "results", made)["light-relu-0"]["wrong"] == written["wrong"]
    other = plan.load(str(write(tmp_path, eps="8.001/255", seeds=[0], activations=["relu"])))
    with pytest.raises(workers.StudyError, match="training, eps differ"):
        workers.read(tmp_path / "results", other)


def test_results_on_held_out_images_are_none_on_test_images(tmp_path: Path) -> None:
    held_out = study(seeds=[0], activations=["relu"], part="validation")
    workers.train_and_attack(held_out, held_out.runs()[0], tmp_path / "results", tmp_path / "runs")
    with pytest.raises(workers.StudyError, match="part differ"):
        workers.read(tmp_path / "results", dataclasses.replace(held_out, part="test"))


def test_rates_of_another_study_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, rates=["tuned"], tuned_by="other", seeds=[0])
    options = ["--out", "elsewhere", "--runs", "runs", "--plan"]
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(file), *options])
    assert "python -m models tune other" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(SystemExit, match="2"):
        main(["tune", str(file)])
    assert "study tiny says nothing of tuning; its rates are those of other" in capsys.readouterr().err
    rates = {"relu": {"lr": 0.4, "activation_lr": 1.0}, "kaf": {"lr": 0.2, "activation_lr": 0.1}}
    (tmp_path / "results/other").mkdir(parents=True)
    chosen = tmp_path / "results/other/tuned.json"
    chosen.write_text(json.dumps({"light": rates}))  # as 0.1 wrote it
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(file), *options])
    assert "write it anew: python -m models tune other" in " ".join(capsys.readouterr().err.split())
    settings = {"data": TINY["data"], "networks": TINY["networks"], "variants": {}, "seeds": [100]}
    chosen.write_text(json.dumps({"settings": settings, "rates": {"light": rates}}))
    assert main(["gradients", "--train", str(file), *options]) == 0
    capsys.readouterr()
    assert main(["study", str(file), *options]) == 0
    assert "light-kaf-tuned-0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "mnist5k:train=60,test=60,validation=20"}, "on whose held-out images a study of mnist5k:train=80"),
        (
            {"networks": {"light": "light:width=4"}},
            "rates of light were chosen for light:width=4, and not light:width=2",
        ),
        ({"variants": {"kaf": {"activation": "kaf:base=silu"}}}, "rates of kaf were chosen for .*base=silu"),
        ({"seeds": [0, 100]}, "rates were chosen on seeds of the study: 0"),
        ({"data": None}, "rates were chosen on None"),
    ],
)
def test_rates_of_another_study_must_fit(changes: dict[str, Any], message: str) -> None:
    settings = {"data": TINY["data"], "networks": TINY["networks"], "variants": {}, "seeds": [100]}
    made = study(tuned_by="other")
    made.check_tuning(settings)
    with pytest.raises(ValueError, match=message):
        made.check_tuning({**settings, **changes})


def test_rates_of_a_study_that_has_changed_since_are_refused() -> None:
    made = tuned_study()
    settings = json.loads(json.dumps(made.tuning_settings()))
    made.check_tuning(settings)
    for changes in ({"eps": 0.1}, {"training": {**TINY["training"], "epochs": 2}}, {"data": "digits"}):
        with pytest.raises(ValueError, match=f"rates were chosen when {next(iter(changes))} was not what"):
            dataclasses.replace(made, **changes).check_tuning(settings)
    with pytest.raises(ValueError, match="when lr was not what"):
        tuned_study(tuning={**TUNED["tuning"], "lr": [0.05, 0.2]}).check_tuning(settings)


@pytest.mark.parametrize("name", plan.names())
def test_rates_that_are_committed_are_those_of_their_studies(name: str) -> None:
    found = plan.load(name)
    chosen = ROOT / f"results/{found.tuned_by or name}/tuned.json"
    if "tuned" in found.rates and chosen.exists():
        found.check_tuning(json.loads(chosen.read_text())["settings"])


def test_a_tuning_takes_its_eps_as_a_list_too(tmp_path: Path) -> None:
    tries = plan.load(str(write(tmp_path, **{**TUNED, "eps": [0.2]}))).tuning_runs()
    held_out = {run.name: {"wrong": "00", "found": {"held out": "01"}} for run in tries.runs()}
    assert "eps = 0.2)" in tune._page(tries, tuning.tried(tries, held_out), held_out, "command")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"fast": {"method": "fast", "lr": 0.4}}}, "method fast may not set lr, which a study sets"),
        ({"methods": {"fast": {"method": "fats"}}}, "unknown method 'fats'"),
        ({"eps": [0.1, 2]}, r"wanted a value in \[0, 1\]"),
        ({"eps": [0.1, 0.1]}, "must not repeat"),
        (
            {**TUNED, "eps": [0.1, 0.2]},
            "rates are tuned for one method and one eps; name another study's with tuned_by",
        ),
    ],
)
def test_wrong_methods_and_radii_say_what_is_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.load(str(write(tmp_path, **{**TINY, **changes})))


def test_the_comparisons_are_drawn_with_their_corrected_intervals() -> None:
    row = {"panel": "light", "attack": "PGD", "mean": 0.1}
    found = {"low": 0.05, "high": 0.15, "found": True}
    rows = [{**row, "pair": ["kaf", "relu"], "corrected": found}, {**row, "pair": ["kaf", "silu"], "corrected": None}]
    (axes,) = study_figures.comparisons.__wrapped__({"comparisons": rows}).axes  # type: ignore[attr-defined]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["kaf − relu, PGD", "kaf − silu, PGD"]
    drawn = [list(line.get_xdata()) for line in axes.lines[1:]]
    assert drawn == [pytest.approx(x) for x in ([5, 15], [10], [10, 10], [10])]
    assert [axes.lines[i].get_markerfacecolor() == "white" for i in (2, 4)] == [False, True]
