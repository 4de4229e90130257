import pytest
import torch
from torch import nn

import kafops
from models.activations import ACTIVATIONS, activation
from models.networks import Normalise, PreActivationBlock, ResNet, resnet20


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def of_type(network: nn.Module, kind: type) -> list:
    return [module for module in network.modules() if isinstance(module, kind)]


def test_resnet20_has_the_published_size() -> None:
    """He et al. 2016 give 0.27 M; with zero-padded shortcuts on CIFAR it is 269,722."""
    assert count(ResNet(20, 16, activation("relu"), (0.5,) * 3, (0.25,) * 3)) == 269_722


def test_kaf_adds_its_coefficients_and_nothing_else() -> None:
    relu, kaf = (resnet20(activation(name), 8, seed=0) for name in ("relu", "kaf"))
    channels = 8 * 7 + 16 * 6 + 32 * 6  # the first activation of a stage still has the width before it
    assert count(kaf) - count(relu) == 20 * channels


@pytest.mark.parametrize(("depth", "activations"), [(8, 7), (20, 19), (56, 55)])
def test_has_an_activation_per_layer_but_the_last(depth: int, activations: int) -> None:
    network = ResNet(depth, 2, activation("kaf"), (0.5,), (0.25,))
    assert len(of_type(network, kafops.KAF2d)) == activations
    assert len(of_type(network, nn.Conv2d)) + len(of_type(network, nn.Linear)) == depth


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_trains_every_parameter(name: str) -> None:
    network = resnet20(activation(name), 2, seed=0)
    logits = network(torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in network.parameters())


def test_weights_do_not_depend_on_the_activation() -> None:
    relu, kaf = (resnet20(activation(name), 4, seed=3).state_dict() for name in ("relu", "kaf"))
    assert set(relu) < set(kaf)
    assert all(torch.equal(relu[name], kaf[name]) for name in relu)


def test_seed_decides_weights_and_curves_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (resnet20(activation("kaf"), 4, seed=s).state_dict() for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["blocks.0.conv1.weight"], other["blocks.0.conv1.weight"])
    assert not torch.equal(first["activation.alpha"], other["activation.alpha"])


def test_normalisation_is_inside_and_not_trained() -> None:
    layer = Normalise((0.5, 0.2), (0.25, 0.1))
    x = torch.tensor([1.0, 0.3]).view(1, 2, 1, 1)
    torch.testing.assert_close(layer(x).flatten(), torch.tensor([2.0, 1.0]))
    assert not list(layer.parameters())
    assert set(layer.state_dict()) == {"mean", "std"}


def test_shortcut_of_a_block_that_changes_shape() -> None:
    """With a silent branch the block is its shortcut: every second pixel, new channels 0 on both sides."""
    block = PreActivationBlock(2, 4, 2, activation("relu"))
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(3, 2, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_identity_shortcut_has_no_activation_on_the_trunk() -> None:
    block = PreActivationBlock(2, 2, 1, activation("relu"))
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(block(x), x)


def test_refuses_impossible_shapes() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2.*got 21"):
        ResNet(21, 16, activation("relu"), (0.5,), (0.25,))
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ResNet(20, 0, activation("relu"), (0.5,), (0.25,))


def test_unknown_activation_names_the_near_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown activation 'rleu'.*did you mean relu"):
        activation("rleu")
