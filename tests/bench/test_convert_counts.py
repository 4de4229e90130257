"""The counts of docs/convert.md: what is tried of each network, and what is said of all."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("torchvision")
from bench import convert


def small(name, larger=0):
    """Channels that images of another size leave alone."""
    assert name == "small"
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.Mish()), 8 + larger


def rows_as_channels(name, larger=0):
    """A Linear over the rows of the image, as wide as it is high."""
    size = 8 + larger
    return nn.Sequential(nn.Linear(size, size), nn.Flatten(), nn.Linear(3 * size * size, size), nn.ReLU()), size


def test_values_are_run_up_to_a_size_and_outputs_stay():
    result = convert.tried("small", small, values=1.0)
    assert (result.curves, result.unfused, result.refusal) == (2, 1, "")
    assert 0 <= result.moved < 1e-6  # roundings of float32
    assert result.same_at_other_size
    assert convert.tried("small", small, values=0.0).moved is None  # on meta


def test_widths_that_follow_the_image_are_noticed():
    assert convert.tried("rows", rows_as_channels, values=1.0).same_at_other_size is False


def test_a_refusal_is_kept_with_its_reason():
    result = convert.tried("linear", lambda _, larger=0: (nn.Conv2d(3, 5, 3), 8), values=1.0)
    assert result.refusal.startswith("ValueError: ")
    assert result.curves == 0


def test_a_network_of_torchvision():
    result = convert.tried("squeezenet1_1", convert.torchvision_model, values=12.0)
    assert (result.curves, result.unfused, result.refusal) == (26, 0, "")
    assert result.moved < 1e-5
    assert result.same_at_other_size


def test_timm_s_families_take_turns():
    names = convert.timm_names(40)
    assert len(set(names)) == 40
    assert convert.timm_names(10) == names[:10]
    families = [convert.timm.list_models(module=module) for module in convert.timm.list_modules()]
    assert all(sum(name in family for name in names) <= 1 for family in families)  # there are more than 40


def test_what_is_said_counts():
    results = [
        convert.Result("a", 3, 1, 2e-7, True),
        convert.Result("b", 4, 0, None, False),
        convert.Result("c", refusal="ValueError: why\nand more"),
        convert.Result("d", refusal="ValueError: why"),
    ]
    assert " ".join(convert.lines("All", results)) == (
        "**All**: 2 of 4 convert (50 %), with 7 curves, 1 of them on an activation that is kept. "
        "Of 1 run on values, the outputs moved by 2.0e-07 of the largest at most. "
        "Of 2 converted for larger images too, 1 have the same widths.  - 2, `c`, `d`: ValueError: why "
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
