"""What the errors allowed of curves on a base let pass, and what they do not."""

import types
from dataclasses import replace

import pytest
import torch

from kafops import bases, reference
from kafops.accuracy import bounds, conditioning, excess, random_problem, values

UNIT = 2.0**-24
of_bases = pytest.mark.parametrize("base", bases.BASES)


def problem(base, free=False, shape=(400, 3, 5), scale=1.0):
    drawn = random_problem(shape, 20, 1 / 6, shape[1], free)
    return replace(drawn, base=base, x=2 * drawn.x, alpha=scale * drawn.alpha)


def changed(change):
    """`kafops.reference` with something done to y."""

    def kaf(x, alpha, gamma, boundary, **options):
        return change(reference.kaf(x, alpha, gamma, boundary, **options), x)

    def kaf_free(x, alpha, gamma, dictionary, **options):
        return change(reference.kaf_free(x, alpha, gamma, dictionary, **options), x)

    return types.SimpleNamespace(kaf=kaf, kaf_free=kaf_free)


@of_bases
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_the_reference_in_float32_is_right(base, free, scale):
    """Also where there is nothing but the base, whose own roundings are all that is allowed then."""
    p = problem(base, free, scale=scale)
    found = excess(p, values(p, reference))
    assert max(found.values()) < 1, found
    if base in ("silu", "gelu"):
        assert found["y"] > 0.3 * (scale == 0)  # it is not by far too much


@pytest.mark.parametrize("base", ["silu", "gelu", "identity"])
def test_an_error_of_three_roundings_of_x_is_too_much(base):
    p = problem(base, scale=0.0)
    got = {"y": (values(p, reference, torch.float64)["y"] + 3.2 * UNIT * p.x.double().abs()).float()}
    assert excess(p, got)["y"] > 1
    got = {"y": (values(p, reference, torch.float64)["y"] + 1.9 * UNIT * p.x.double().abs()).float()}
    assert excess(p, got)["y"] <= 1


@of_bases
def test_what_is_computed_without_the_base_or_with_another_is_wrong(base):
    p = problem(base)
    whole = excess(p, values(replace(p, base=None), reference))
    wrong = {"y", "backward x", "double backward grad"} | ({"double backward x"} if base in ("silu", "gelu") else set())
    assert all(whole[name] > 1e3 for name in wrong)
    assert all(v < 1 for name, v in whole.items() if name not in wrong)
    other = "silu" if base == "gelu" else "gelu"
    assert excess(p, values(replace(p, base=other), reference))["y"] > 1e3


def test_a_base_in_the_wrong_places_is_wrong():
    """Twice, or in the gradients of alpha and gamma too."""
    p = problem("silu")
    twice = values(p, changed(lambda y, x: y + torch.nn.functional.silu(x)))
    found = excess(p, twice)
    assert all(found[n] > 1e3 for n in ("y", "backward x", "double backward grad", "double backward x"))
    assert all(found[n] < 1 for n in ("backward alpha", "backward gamma", "double backward alpha"))


@of_bases
def test_what_is_allowed_by_hand(base):
    """2 u (|x| + Σ|α|) more of y; nothing of alpha and gamma, into whose derivatives no base goes."""
    p = problem(base)
    plain, with_base = bounds(replace(p, base=None)), bounds(p)
    mass = p.alpha.double().abs().sum(1).view(1, -1, 1)
    more = with_base["y"] - plain["y"]
    torch.testing.assert_close(more, 2 * UNIT * (p.x.double().abs() + mass), rtol=1e-6, atol=0)
    same = {"backward alpha", "backward gamma", "double backward alpha", "double backward gamma"}
    assert all(torch.equal(plain[name], with_base[name]) for name in same)
    slope = bases.value(base, p.x.double(), 1).abs()
    smooth = 2 * (p.x.double().abs() + 1) if base in ("silu", "gelu") else 0
    wanted = UNIT * p.grad.double().abs() * (32 * slope + smooth)
    torch.testing.assert_close(with_base["backward x"] - plain["backward x"], wanted, rtol=1e-6, atol=1e-12)
    if base in ("identity", "relu"):
        assert torch.equal(with_base["double backward x"], plain["double backward x"])
    else:
        assert (with_base["double backward x"] > plain["double backward x"]).all()


@of_bases
def test_conditioning_counts_the_base_as_one_term(base):
    p = problem(base)
    plain, with_base = conditioning(replace(p, base=None)), conditioning(p)
    x, grad = p.x.double(), p.grad.double().abs()
    for name, weight, n in (
        ("y", 1.0, 0),
        ("backward x", grad, 1),
        ("double backward x", grad * p.v[0].double().abs(), 2),
    ):
        wanted = weight * bases.value(base, x, n).abs()
        torch.testing.assert_close(with_base[name] - plain[name], wanted, rtol=1e-6, atol=1e-12)


def test_functions_that_know_no_base_are_asked_for_none():
    p = problem(None)
    assert p.base is None

    def kaf(x, alpha, gamma, boundary):
        return reference.kaf(x, alpha, gamma, boundary)

    assert max(excess(p, values(p, types.SimpleNamespace(kaf=kaf))).values()) < 1
    assert p.to("cpu").base is None
    assert problem("relu").to("cpu").base == "relu"


def test_one_shared_row_and_x_of_one_dimension():
    drawn = random_problem((50,), 8, 1 / 6, 1)
    p = replace(drawn, base="gelu")
    assert max(excess(p, values(p, reference)).values()) < 1
    assert bounds(p)["y"].shape == (50,)
