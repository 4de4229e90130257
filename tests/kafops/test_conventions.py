"""The conventions that KAFs are in use with."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kafops

DOCS = Path(__file__).parents[2] / "docs" / "calibrate.md"


def test_the_authors_numbers():
    step = 8 / 19
    layer = kafops.KAF2d(500, **kafops.convention("ispamm"))
    assert layer.boundary == 4
    torch.testing.assert_close(layer.gamma, torch.full((500,), 1 / (8 * step**2)))
    assert abs(layer.alpha.std() - 0.8) < 5 * 0.8 / (2 * 10000) ** 0.5
    fitted = kafops.KAF2d(3, **kafops.convention("ispamm", "elu"))
    points = torch.linspace(-4, 4, 20, dtype=torch.float64)
    system = torch.exp(-((points[:, None] - points) ** 2) / (8 * step**2)) + 1e-4 * torch.eye(20)
    want = torch.linalg.solve(system, F.elu(points))
    torch.testing.assert_close(fitted.alpha[0].double(), want, rtol=1e-6, atol=1e-5)


def test_ours_are_the_defaults():
    ours, default = kafops.KAF(3, **kafops.convention("kafops", "elu")), kafops.KAF(3)
    torch.testing.assert_close(ours.alpha, default.alpha)
    torch.testing.assert_close(ours.gamma, default.gamma)
    assert kafops.convention("kafops")["init"] == kafops.init.Normal()


def test_another_size_has_its_bandwidth():
    assert kafops.convention("thesis", dictionary_size=7)["gamma"] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match=r"name must be one of 'kafops', .*got 'ispam'; did you mean 'ispamm'"):
        kafops.convention("ispam")


def test_a_fit_with_another_regularisation():
    layer = kafops.KAF(2, init=kafops.init.Ridge(torch.nn.Mish, eps=1e-3), base="silu")
    points = layer.points()[0].double()
    want = kafops.init.ridge(F.mish, torch.linspace(-3, 3, 20, dtype=torch.float64), layer.gamma, 1e-3, base="silu")
    torch.testing.assert_close(layer.alpha.double(), want, rtol=1e-5, atol=1e-6)
    alone = kafops.init.Ridge("relu")(points, layer.gamma.double())
    torch.testing.assert_close(alone, kafops.init.ridge(F.relu, points, layer.gamma))
    with pytest.raises(ValueError, match="eps must be a finite number ≥ 0"):
        kafops.init.Ridge("relu", eps=-1)


def test_the_docs_have_the_table():
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+)/(\d+) \| (\S+) \| (\S+) \|", DOCS.read_text(), re.M)
    table = {
        name: (int(d), float(b), (int(over), int(under)), float(eps), float(std))
        for name, d, b, over, under, eps, std in rows
    }
    assert table == {name: (c.dictionary_size, c.boundary, c.t, c.eps, c.std) for name, c in kafops.CONVENTIONS.items()}


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (1, ValueError), ("a", TypeError), (True, TypeError)])
def test_a_size_that_sets_no_bandwidth(size, error):
    with pytest.raises(error, match="dictionary_size must be an integer ≥ 2, got"):
        kafops.convention("thesis", dictionary_size=size)


def test_names_are_strings():
    with pytest.raises(ValueError, match=r"name must be one of .*, got \['thesis'\]"):
        kafops.convention(["thesis"])
