"""What kafops.bounds takes for granted of each kernel, against mpmath at 40 digits."""

import itertools
import math

import mpmath
import pytest
import torch

from kafops.bounds.series import SERIES

F64 = torch.float64
ROUNDOFF = 2.0**-53


def definition(name, u):
    """κ(u) on the side of the knots that u is on."""
    if name == "gaussian":
        return mpmath.exp(-u * u)
    if name == "rational_quadratic":
        return 1 / (1 + u * u)
    if name == "matern32":
        s = mpmath.sqrt(2) * abs(u)
        return (1 + s) * mpmath.exp(-s)
    w = abs(u) / mpmath.sqrt(mpmath.mpf(3) / 2)
    if w < 1:
        return 1 - 3 * w**2 / 2 + 3 * w**3 / 4
    return (2 - w) ** 3 / 4 if w < 2 else mpmath.mpf(0)


def derivative(name, u):
    """κ′(u)."""
    with mpmath.workdps(60):
        return mpmath.diff(lambda v: definition(name, v), u)


def computed(name, u):
    return [float(term) for term in SERIES[name].terms(torch.tensor(1.0, dtype=F64), torch.tensor(u, dtype=F64))]


def cells(name, most=14):
    """Centre and half of some of the ladder's cells."""
    ladder = SERIES[name].ladder
    step = max(1, (len(ladder) - 1) // most)
    return [((a + b) / 2, (b - a) / 2) for a, b in list(itertools.pairwise(ladder))[::step]]


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(40):
        yield


@pytest.mark.parametrize("name", SERIES)
def test_terms_are_derivatives_and_round_as_promised(name):
    series = SERIES[name]
    for centre, half in cells(name):
        for u in (centre, -centre, 1.03 * centre):
            got = computed(name, u)
            with mpmath.workdps(80):
                wanted = mpmath.taylor(lambda v: definition(name, v), mpmath.mpf(u), series.size - 1)
            assert len(got) == series.size
            errors = [abs(g - w) for g, w in zip(got, wanted, strict=True)]
            # 1e-32: of the derivatives by differences
            assert sum(e * half**k for k, e in enumerate(errors)) <= 400 * ROUNDOFF + 1e-32
            assert sum(k * e * half ** (k - 1) for k, e in enumerate(errors) if k) <= 400 * ROUNDOFF + 1e-32
            assert sum(abs(t) * half**k for k, t in enumerate(got)) <= 4
            assert sum(k * abs(t) * half ** (k - 1) for k, t in enumerate(got) if k) <= 4


@pytest.mark.parametrize("name", SERIES)
def test_remainders(name):
    series = SERIES[name]
    for centre, half in cells(name):
        with mpmath.workdps(80):
            terms = mpmath.taylor(lambda v: definition(name, v), mpmath.mpf(centre), series.size - 1)
        for y in (-0.999, -0.6, 0.3, 0.999):
            w = mpmath.mpf(y * half)
            value = sum(t * w**k for k, t in enumerate(terms))
            slope = sum(k * t * w ** (k - 1) for k, t in enumerate(terms) if k)
            assert abs(value - definition(name, centre + w)) <= series.remainders[0] + 1e-30
            assert abs(slope - derivative(name, centre + w)) <= series.remainders[1] + 1e-20


@pytest.mark.parametrize("name", SERIES)
def test_peaks_and_tails(name):
    series = SERIES[name]
    u = torch.linspace(0, 8, 8001, dtype=F64)
    terms = list(series.terms(torch.ones_like(u), u))
    for order, peak in enumerate(series.peaks):
        most = math.factorial(order) * terms[order].abs().max().item()
        assert most <= peak * (1 + 1e-15)
        assert most >= peak * (1 - 1e-5)  # of a grid of 0.001
    for u in (series.ladder[-1], 1.5 * series.ladder[-1], 1e100):
        assert abs(computed(name, u)[0]) <= series.remainders[0] + 1e-30
        assert abs(computed(name, -u)[1]) <= series.remainders[1] + 1e-30


@pytest.mark.parametrize("name", SERIES)
def test_ladder_ascends_from_0_and_has_the_knots(name):
    ladder = SERIES[name].ladder
    assert ladder[0] == 0
    assert all(a < b for a, b in itertools.pairwise(ladder))
    assert set(SERIES[name].knots) <= set(ladder)
