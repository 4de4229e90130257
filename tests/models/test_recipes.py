import dataclasses
import json
from pathlib import Path

import pytest

from models import recipes
from models.activations import ACTIVATIONS
from models.attacks import ATTACKS
from models.data import DATA
from models.networks import NETWORKS
from models.recipes import Recipe
from models.recipes.comparison import attack_name
from models.runs.settings import Settings

EVERY = [recipes.load(name) for name in recipes.names()]


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_every_name_and_value_of_a_recipe_is_known(recipe: Recipe) -> None:
    for settings in (recipe.settings, *recipe.variants):
        assert Settings.from_dict(settings.as_dict()) == settings
        factor = settings.training.make_schedule()
        assert 0 <= factor(settings.training.epochs / 3) <= 1
        assert settings.training.make_method().updates >= 1
    for attack in recipe.attacks:
        ATTACKS.parse(attack)
    assert recipe.about.endswith(".")
    assert recipe.source
    assert recipe.name == "mnist5k" or len(recipe.notes) >= 3


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_a_recipe_attacks_with_the_eps_it_trains_with(recipe: Recipe) -> None:
    """So do all the papers; a typing error in one of the two would be seen here."""
    assert recipe.evaluation_eps == recipe.settings.training.eps


@pytest.mark.parametrize("recipe", EVERY, ids=lambda recipe: recipe.name)
def test_variants_are_of_different_activations_and_of_the_same_network_and_data(recipe: Recipe) -> None:
    every = (recipe.settings, *recipe.variants)
    assert len({ACTIVATIONS.parse(s.activation)[0] for s in every}) == len(every)
    assert len({(s.data, s.network) for s in every}) == 1


def test_files_are_what_is_listed() -> None:
    assert set(recipes.names()) == {
        "gradalign", "madry", "mnist5k", "nfgsm", "pgd-resnet20", "smooth-imagenet", "thesis-resnet20", "thesis-vgg",
        "trades", "wong-fast", "wong-free", "wong-pgd",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "activation", "low", "high"),
    [
        ("thesis-vgg", None, 0.0001, 0.08),
        ("thesis-vgg", "elu", 0.0001, 0.1),
        ("thesis-vgg", "kaf", 0.01, 1),
        ("thesis-vgg", "kaf_elu", 0.0001, 0.1),
        ("thesis-vgg", "swish", 0.0001, 0.3),
        ("thesis-vgg", "kaf_swish", 0.0001, 0.8),
        ("thesis-vgg", "kaf_free", 0.01, 2),
        ("thesis-resnet20", "kaf_relu", 0.01, 0.8),
    ],
)
def test_learning_rate_ranges_of_the_thesis(name: str, activation: str | None, low: float, high: float) -> None:
    training = recipes.load(name).settings_for(activation).training
    factor = training.make_schedule()
    rates = [training.lr * factor(training.epochs * part) for part in (0, 0.5, 1)]
    assert rates == pytest.approx([low, high, low])


def test_settings_for_an_activation() -> None:
    recipe = recipes.load("thesis-vgg")
    assert recipe.settings_for("kaf").activation == "kaf:std=0.05"
    own = recipe.settings_for("kaf:boundary=4")
    assert own.activation == "kaf:boundary=4"
    assert own.training == recipe.settings_for("kaf").training
    other = recipe.settings_for("gelu")
    assert other == dataclasses.replace(recipe.settings, activation="gelu")
    with pytest.raises(ValueError, match=r"unknown activation 'reluu'.*did you mean"):
        recipe.settings_for("reluu")


def test_an_unknown_recipe_lists_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'thesis-vg', there are .*did you mean thesis-vgg"):
        recipes.load("thesis-vg")


def content() -> dict:
    return json.loads((recipes.FOLDER / "thesis-vgg.json").read_text())


def test_a_recipe_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**content(), "evaluation": {"attacks": "pgd:steps=5,restarts=2,fgsm", "eps": "0.1"}}))
    recipe = recipes.load(str(path))
    assert recipe.name == "mine"
    assert recipe.attacks == ("pgd:steps=5,restarts=2", "fgsm")
    assert recipe.evaluation_eps == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "mine.json is no recipe"),
        ({"settings": {**content()["settings"], "netwrok": "vgg"}}, "unknown setting 'netwrok'.*did you mean network"),
        ({"settings": {**content()["settings"], "network": "vvg"}}, "unknown network 'vvg'"),
        ({"variants": [{"activation": "elu", "training": {"lrr": 1}}]}, "unknown setting 'lrr'"),
        ({"settings": {**content()["settings"], "training": {"eps": "8/0"}}}, "wanted a number"),
        ({"evaluation": {"attacks": "fgsm"}}, "eps"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**content(), **change}))
    with pytest.raises(ValueError, match=message):
        recipes.load(str(path))


def test_published_numbers_are_of_recipes_and_are_fractions() -> None:
    rows = recipes.published()
    assert len(rows) == len(set(rows)) == 56
    by_name = {recipe.name: recipe for recipe in EVERY}
    for row in rows:
        recipe = by_name[row.recipe]
        NETWORKS.parse(row.network)
        DATA.parse(row.data)
        assert row.data == recipe.settings.data
        assert row.label
        assert row.source
        assert row.eps == recipe.evaluation_eps
        assert attack_name(row.attack) == row.attack
        assert row.clean is not None or row.robust is not None
        for value in (row.clean, row.robust):
            assert value is None or 0 < value < 1
        assert row.verified in ("read in source", "from memory") or row.verified.startswith("quoted by ")


def test_published_numbers_of_the_thesis_are_for_the_variants() -> None:
    for name, count in (("thesis-vgg", 7), ("thesis-resnet20", 8)):
        recipe = recipes.load(name)
        rows = recipes.published_for(name)
        assert {row.activation for row in rows} == set(recipe.activations)
        assert len(rows) == len(recipe.activations) == count
        assert {row.network for row in rows} == {recipe.settings.network}


def test_what_is_remembered_is_said_to_be() -> None:
    remembered = {row.recipe for row in recipes.published() if row.remembered}
    assert remembered == {"gradalign", "nfgsm"}
