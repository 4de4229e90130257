"""Groups of parameters for optimizers."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import kafops


def network() -> nn.Sequential:
    torch.manual_seed(0)
    shared = kafops.KAF(8, learn_gamma=True, learn_dictionary=True)
    return nn.Sequential(nn.Linear(3, 8), shared, nn.Linear(8, 8), shared, kafops.KAF(8), nn.PReLU())


def test_every_parameter_is_in_one_group_once():
    model = network()
    rest, curves = kafops.param_groups(model, weight_decay=0.1, lr=0.5, curve_lr=0.25)
    assert (rest["weight_decay"], rest["lr"]) == (0.1, 0.5)
    assert (curves["weight_decay"], curves["lr"]) == (0.0, 0.25)
    names = {p: name for name, p in model.named_parameters()}
    assert [names[p] for p in curves["params"]] == ["1.alpha", "1.log_gamma", "1.dictionary", "4.alpha"]
    assert [names[p] for p in rest["params"]] == ["0.weight", "0.bias", "2.weight", "2.bias", "5.weight"]
    assert curves["params"] == kafops.curve_parameters(model)


def test_decay_leaves_curves_alone():
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.AdamW(kafops.param_groups(model, weight_decay=0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    curves = set(kafops.curve_parameters(model))
    for p, was in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, was if p in curves else was * (1 - 0.1 * 0.5))


def test_learning_rates_that_are_not_given():
    assert all("lr" not in group for group in kafops.param_groups(network()))
    assert [group["lr"] for group in kafops.param_groups(network(), lr=0.1)] == [0.1, 0.1]
    assert [group.get("lr") for group in kafops.param_groups(network(), curve_lr=0.1)] == [None, 0.1]


def test_parts_that_are_missing():
    assert [len(g["params"]) for g in kafops.param_groups(nn.Linear(2, 2))] == [2]
    assert [len(g["params"]) for g in kafops.param_groups(kafops.KAF(2))] == [1]


def test_pruned_curves_are_curves():
    model = network()
    prune.random_unstructured(model[4], "alpha", 0.5)
    assert any(p is model[4].alpha_orig for p in kafops.curve_parameters(model))


def test_says_what_is_wrong():
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        kafops.curve_parameters([])
    with pytest.raises(ValueError, match="weight_decay must be a number ≥ 0, got -1"):
        kafops.param_groups(network(), weight_decay=-1)
    with pytest.raises(ValueError, match=r"0\.alpha has no size yet; run the model once"):
        kafops.param_groups(nn.Sequential(kafops.LazyKAF()))


@pytest.mark.parametrize("value", ["s", None, True, -1.0, math.nan, math.inf])
def test_numbers_are_numbers(value):
    with pytest.raises((TypeError, ValueError), match="weight_decay must be a number ≥ 0, got"):
        kafops.param_groups(nn.Linear(2, 2), weight_decay=value)
    if value is not None:
        with pytest.raises((TypeError, ValueError), match="curve_lr must be a number ≥ 0, got"):
            kafops.param_groups(nn.Linear(2, 2), curve_lr=value)
