import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models import recipes
from models.commands import compare as command
from models.commands import recipe as recipe_command
from models.evaluation import Accuracy
from models.recipes import Recipe
from models.recipes.comparison import Measured, attack_name, closest, compare, training_differences
from models.runs.settings import Settings
from models.support import files
from models.support.errors import UserError

VGG = recipes.load("thesis-vgg")
FAST = recipes.load("wong-fast")
PGD = "pgd-50-10:step=2/255"
DATA = "fake:like=digits,count=128,validation=16,test=32"


def changed(settings: Settings, **training: Any) -> Settings:
    return replace(settings, training=replace(settings.training, **training))


def measured(
    recipe: Recipe = VGG,
    activation: str = "relu",
    clean: int = 781,
    robust: dict[str, int] | None = None,
    eps: float = 8 / 255,
    which: str = "latest",
    **training: Any,
) -> Measured:
    found = {name: Accuracy(count, 1000) for name, count in (robust or {PGD: 440}).items()}
    settings = changed(recipe.settings_for(activation), **training)
    return Measured("mine", settings, eps, Accuracy(clean, 1000), found, which)


def write(run: Path, recipe: Recipe = VGG, activation: str = "relu", **training: Any) -> dict[str, Any]:
    """Write run.json and evaluation.json by hand, as the commands train and evaluate do."""
    settings = changed(recipe.settings_for(activation), **training).as_dict()
    record = {
        "settings": settings,
        "which": "latest",
        "checkpoint": "0" * 64,
        "eps": 8 / 255,
        "clean": {"correct": 775, "total": 1000},
        "robust": {PGD: {"norm": "Linf", "radius": 8 / 255, "correct": 440, "total": 1000}},
    }
    files.write_json(run / "run.json", {"format": 1, "settings": settings, "environments": []})
    files.write_json(run / "evaluation" / "evaluation.json", record)
    return record


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="python -m models")
    commands = parser.add_subparsers(required=True)
    for module in (command, recipe_command):
        module.add(commands)
    options = parser.parse_args(arguments)
    return options.run(options, "python -m models " + " ".join(arguments))


def test_lines_are_ours_less_the_published() -> None:
    found = compare(measured(), VGG, recipes.published_for("thesis-vgg"))
    clean, robust = found.lines
    assert (clean.measure, clean.published, clean.ours.value) == ("clean", 0.781, 0.781)
    assert clean.difference == 0
    assert (robust.measure, robust.published) == ("pgd-50-10", 0.4541)
    assert robust.difference == pytest.approx(0.44 - 0.4541)
    assert found.differences == ()
    assert found.missing == ()
    assert "2 of 2 published numbers are within" in found.verdict
    assert "Its settings are the recipe's" in found.verdict


@pytest.mark.parametrize(("correct", "within"), [(423, False), (424, True), (484, True), (485, False)])
def test_within_is_by_the_wilson_interval(correct: int, within: bool) -> None:
    """The score test: |p − 0.4541| ≤ 1.95996 · sqrt(0.4541 · 0.5459 / 1000) = 0.030859, so 423.2 … 484.96 of 1000."""
    found = compare(measured(robust={PGD: correct}), VGG, recipes.published_for("thesis-vgg"))
    assert found.lines[1].within is within


def test_rows_are_of_the_same_network_and_activation() -> None:
    rows = recipes.published_for("thesis-vgg")
    kaf = compare(measured(activation="kaf:boundary=4"), VGG, rows)
    assert [line.row.activation for line in kaf.lines if line.row] == ["kaf:std=0.05"] * 2
    assert [str(d) for d in kaf.differences] == []
    gelu = compare(measured(activation="gelu"), VGG, rows)
    assert [line.row for line in gelu.lines] == [None, None]
    assert gelu.lines[0].difference is gelu.lines[0].within is None
    assert "Nothing is published" in gelu.verdict
    free = recipes.load("wong-free")
    shown = compare(measured(free), free, recipes.published_for("wong-free")).lines
    assert {line.row.network for line in shown if line.row} == {"preactresnet18"}


def test_a_clean_accuracy_that_is_repeated_for_another_attack_is_shown_once() -> None:
    smooth = recipes.load("smooth-imagenet")
    attacks = {f"pgd-{steps}:step=1/255": 400 for steps in (10, 20, 50, 200)}
    found = compare(measured(smooth, "silu", robust=attacks, eps=4 / 255), smooth, recipes.published_for(smooth.name))
    clean = [line for line in found.lines if line.measure == "clean"]
    assert [(line.row.label, line.published) for line in clean if line.row] == [("README", 0.697), ("abstract", 0.697)]
    assert [line.published for line in found.lines[2:]] == [0.43, 0.422, 0.419, 0.423]


def test_of_rows_that_repeat_a_clean_accuracy_the_first_is_kept() -> None:
    first = next(row for row in recipes.published_for("thesis-vgg") if row.activation == "relu")
    other = replace(first, label="another", attack="autoattack")
    again = replace(first, attack="autoattack", source="a source that is shown if this row is kept")
    found = compare(measured(), VGG, [first, other, again])
    assert [line.row for line in found.lines if line.measure == "clean"] == [first, other]


def test_another_eps_is_not_lined_up() -> None:
    found = compare(measured(eps=0.1), VGG, recipes.published_for("thesis-vgg"))
    assert found.lines[1].row is None
    assert [str(d) for d in found.differences] == ["eps of the evaluation is 0.1 here and 8/255 there"]


def test_attacks_that_were_not_made_are_named() -> None:
    found = compare(measured(FAST), FAST, recipes.published_for("wong-fast"))
    assert found.missing == ("autoattack",)


def test_settings_that_differ_are_listed() -> None:
    run = measured(robust={"pgd-50-10": 440, "fgsm": 500}, which="best", lr=0.1, watch_steps=5, epochs=30)
    other = replace(run, settings=replace(run.settings, data="fake:like=cifar10", seed=3))
    found = compare(other, VGG, recipes.published_for("thesis-vgg"))
    assert [str(d) for d in found.differences] == [
        "data is fake:like=cifar10 here and cifar10:pad=0,flip=no there",
        "epochs is 30 here and 60 there",
        "lr is 0.1 here and 0.08 there",
        "state evaluated is best here and latest there",
        "attack pgd-50-10 is pgd-50-10 here and pgd-50-10:step=2/255 there",
    ]
    assert "its settings are not the recipe's: 5 differ." in found.verdict


def test_other_words_for_the_same_are_no_difference() -> None:
    theirs = VGG.settings_for("silu")
    ours = replace(
        changed(theirs, method="rs-fgsm:step=1.25", schedule="cyclic:floor=1/3000,peak=0.5"),
        activation="swish",
        network="vgg:width=32",
    )
    assert training_differences(ours, theirs) == []
    assert training_differences(changed(ours, method="fast:step=1"), theirs) != []


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (PGD, "pgd-50-10"),
        ("pgd:steps=20", "pgd-20"),
        ("pgd", "pgd-50"),
        ("autoattack:steps=5", "autoattack"),
        ("transfer from relu", "transfer from relu"),
    ],
)
def test_names_of_attacks(text: str, name: str) -> None:
    assert attack_name(text) == name


def test_the_closest_recipe() -> None:
    every = [recipes.load(name) for name in recipes.names()]
    for recipe in every:
        for settings in (recipe.settings, *recipe.variants):
            assert closest(settings, every) is recipe
    assert closest(changed(FAST.settings, epochs=20), every).name == "wong-fast"
    with pytest.raises(UserError, match=r"no recipe trains network 'light'; name one to compare with by --recipe"):
        closest(replace(FAST.settings, network="light"), every)
    twin = replace(FAST, name="twin")
    with pytest.raises(UserError, match="recipes wong-fast and twin are equally close"):
        closest(FAST.settings, [FAST, twin])


def test_the_command_writes_page_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "relu")
    write(tmp_path / "kaf", activation="kaf", lr=0.5)
    assert run("compare", str(tmp_path / "relu"), str(tmp_path / "kaf"), "--out", str(tmp_path / "out")) == 0
    page = (tmp_path / "out" / "comparison.md").read_text()
    assert "| relu | relu | clean | 77.50 | 1000 | 74.8 to 80.0 | 78.10 | -0.60 | yes | thesis |" in page
    assert "| kaf | kaf:std=0.05 | pgd-50-10 | 44.00 | 1000 | 41.0 to 47.1 | 46.80 | -2.80 | yes | thesis |" in page
    assert "- lr is 0.5 here and 1 there." in page
    assert "table vggrob (read in source)" in page
    assert all(note in page for note in VGG.notes)
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "kaf, kaf:std=0.05, and recipe thesis-vgg" in shown
    assert "lr is 0.5 here and 1 there." in shown


def test_one_run_is_compared_in_its_own_folder_with_a_recipe_given(tmp_path: Path) -> None:
    write(tmp_path / "relu")
    assert run("compare", str(tmp_path / "relu"), "--recipe", "thesis-resnet20") == 0
    page = (tmp_path / "relu" / "comparison" / "comparison.md").read_text()
    assert "network is vgg here and resnet20:form=post_norm,shortcut=conv3x3 there." in page


def test_unknown_recipe_lists_near_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ("compare", str(tmp_path), "--recipe", "wong-fats"),
        ("recipe", "wong-fats"),
        ("recipes", "mdry"),
    ):
        with pytest.raises(SystemExit) as exit:
            run(*arguments)
        assert exit.value.code == 2
        assert "; did you mean " in capsys.readouterr().err


def test_a_run_without_evaluation_says_what_to_do(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "evaluation" / "evaluation.json").unlink()
    with pytest.raises(UserError, match=rf"has not been evaluated: .*run `python -m models evaluate {tmp_path}`"):
        command.read(tmp_path)
    with pytest.raises(UserError, match=r"holds no run: there is no run\.json in it"):
        command.read(tmp_path / "evaluation")


@pytest.mark.parametrize("change", [{"clean": None}, {"robust": []}, {"eps": "x"}, {"which": "worst"}])
def test_a_damaged_evaluation_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    files.write_json(tmp_path / "evaluation" / "evaluation.json", {**write(tmp_path), **change})
    with pytest.raises(UserError, match=r"cannot be compared with a recipe"):
        command.read(tmp_path)


def test_an_evaluation_of_another_training_is_refused(tmp_path: Path) -> None:
    record = write(tmp_path)
    (tmp_path / "latest.safetensors").write_bytes(b"trained on")
    with pytest.raises(UserError, match="is of another training than"):
        command.read(tmp_path)
    (tmp_path / "latest.safetensors").unlink()
    files.write_json(
        tmp_path / "evaluation" / "evaluation.json", {**record, "settings": {**record["settings"], "seed": 1}}
    )
    with pytest.raises(UserError, match="is of another training than"):
        command.read(tmp_path)


def test_the_figure_has_what_is_published_below_the_runs() -> None:
    recipe, rows = recipes.load("gradalign"), recipes.published_for("gradalign")
    (panel,) = command._panels([compare(measured(recipe, robust={PGD: 100}), recipe, rows)], rows)
    assert panel.title == "gradalign"
    assert panel.rows[0].label == "mine (here)"
    clean, robust = panel.rows[0].marks
    assert (clean, robust) == (Accuracy(781, 1000).record, Accuracy(100, 1000).record)
    alike = [row for row in rows if row.attack == attack_name(PGD) and row.clean is not None]
    assert [[m["accuracy"] for m in row.marks] for row in panel.rows[1:]] == [[row.clean, row.robust] for row in alike]
    assert all(
        "memory" in row.label for row, published in zip(panel.rows[1:], alike, strict=True) if published.remembered
    )


def test_only_attacks_with_published_numbers_are_drawn_if_there_are_any() -> None:
    rows = recipes.published_for(VGG.name)
    found = [compare(measured(robust={PGD: 440, "fgsm": 500}), VGG, rows)]
    assert [panel.xlabel[-9:-1] for panel in command._panels(found, rows)] == ["gd-50-10"]
    assert len(command._panels(found, [])) == 2


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    shown = capsys.readouterr().out
    for name in recipes.names():
        assert f" {name} " in shown
    assert run("recipes", "thesis-vgg") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "variant: activation kaf:std=0.05, lr 1, schedule triangular:floor=0.01/1" in shown
    assert "78.10 45.41 thesis" in shown
    assert VGG.notes[0] in shown


TINY = (
    "--network", "resnet20:width=2,patch=2", "--epochs", "1", "--batch-size", "64", "--watch-images", "8",
    "--images", "10", "--check-images", "0", "--no-tensorboard",
)  # fmt: skip


def test_a_recipe_is_trained_evaluated_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("recipe", "mnist5k", "--out", str(tmp_path / "run"), "--data", DATA, *TINY)
    assert run(*arguments, "--attacks", "pgd-2") == 0
    shown = capsys.readouterr().out
    assert f"data is {DATA} here and mnist5k there." in " ".join(shown.split())
    record = files.read_json(tmp_path / "run" / "evaluation" / "evaluation.json")
    assert list(record["robust"]) == ["pgd-2"]
    assert record["eps"] == 0.2
    assert record["settings"]["activation"] == "kaf_elu"
    assert record["settings"]["training"]["lr"] == 0.1
    assert (tmp_path / "run" / "comparison" / "comparison.md").exists()
    before = (tmp_path / "run" / "latest.safetensors").stat().st_mtime_ns
    assert run(*arguments, "--attacks", "pgd-2,fgsm") == 0
    assert (tmp_path / "run" / "latest.safetensors").stat().st_mtime_ns == before


def test_a_recipe_takes_the_settings_of_the_activation_and_the_options(tmp_path: Path) -> None:
    run(
        "recipe", "thesis-resnet20", "--out", str(tmp_path), "--activation", "kaf_relu", "--batch-size", "32",
        "--precision", "float32", "--data", DATA, "--network", "resnet20:width=2,patch=2",
        "--epochs", "1", "--eps", "0.1", "--watch-images", "8", "--images", "10", "--check-images", "0",
        "--no-tensorboard", "--attacks", "fgsm",
    )  # fmt: skip
    record = files.read_json(tmp_path / "evaluation" / "evaluation.json")
    training = record["settings"]["training"]
    assert (training["lr"], training["schedule"]) == (0.8, "triangular:floor=0.01/0.8")
    assert (training["batch_size"], training["precision"]) == (32, "float32")
    assert training["eps"] == record["eps"] == 0.1
    assert record["which"] == "latest"
