"""The peers' formulas, where they can be said otherwise, and the page that they are shown on."""

import torch

from bench import peers

DRAW = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=DRAW)


def test_rational():
    coefficients = torch.tensor([[1.0, 2, 3, 4, 5, 6, -1, 2, -3, 4]])
    y = peers.rational(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1), coefficients)
    # 1 + 4 + 12 + 32 + 80 + 192 over 1 + |−2 + 8 − 24 + 64|; 1 − 2 + 3 − 4 + 5 − 6 over 1 + |1 + 2 + 3 + 4|
    torch.testing.assert_close(y.flatten(), torch.tensor([321 / 47, -3 / 11]))


def test_spline():
    values = torch.tensor([[1.0, 2, 0], [0, 0, 3]])  # at −3, 0 and 3
    x = torch.tensor([[-6.0, -3, -1.5, 0, 3, 6], [-6, -3, -1.5, 0, 3, 6]]).view(1, 2, 6, 1)
    want = torch.tensor([[0.0, 1, 1.5, 2, 0, -2], [0, 0, 0, 0, 3, 6]])
    torch.testing.assert_close(peers.spline(x, values).view(2, 6), want)


def test_gaussians():
    x, alpha = randn(2, 3, 4, 4), randn(3, 7)
    torch.testing.assert_close(peers.radial(x, alpha), peers.kaf_as_radial(x, alpha))


def test_a_layer_of_curves_is_fastkan():
    x, alpha = randn(5, 4), randn(3, 4, 8)
    torch.testing.assert_close(peers.kan(x, alpha), peers.fastkan(x, alpha))


def test_page():
    page = (peers.ROOT / "docs/peers.md").read_text(encoding="utf-8")
    new = peers.put(page, "the table")
    assert "\nthe table\n" in new
    assert peers.put(new, "again") == peers.put(page, "again")
    assert {p.name for p in peers.PEERS} <= {line.split(" | ")[0].lstrip("| ") for line in page.splitlines()}
