"""A network of points, as those that solve differential equations, and what is asked of its derivatives."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kafops
from bench.problems import Call

POINTS = 4096
WIDTH = 64


def network(activation: Callable[[], nn.Module], seed: int = 0) -> nn.Sequential:
    """Make the network, two coordinates in, one number out, three hidden layers."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs in (2, WIDTH, WIDTH):
        layers += [nn.Linear(inputs, WIDTH), activation()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 1))


def kaf() -> nn.Module:
    return kafops.KAF(WIDTH, channel_dim=-1)


def points() -> Tensor:
    return torch.randn(POINTS, 2, generator=torch.Generator().manual_seed(0))


def laplacian_step(activation: Callable[[], nn.Module]) -> Call:
    """Return the call that makes the gradients of the mean of (Δu)² in the parameters."""
    net, at = network(activation), points().requires_grad_()
    parameters = tuple(net.parameters())

    def call() -> tuple[Tensor, ...]:
        (first,) = torch.autograd.grad(net(at).sum(), at, create_graph=True)
        second = [torch.autograd.grad(first[:, i].sum(), at, create_graph=True)[0][:, i] for i in (0, 1)]
        loss = (second[0] + second[1]).square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

    return call


def gradients_by_vmap() -> Call:
    """Return the call that makes the gradient of u at each point, written for one point."""
    net, at = network(kaf), points()
    state = {name: p.detach() for name, p in net.named_parameters()} | dict(net.named_buffers())

    def u(point: Tensor) -> Tensor:
        return functional_call(net, state, (point,)).squeeze(0)

    return lambda: (vmap(grad(u))(at),)


def gradients_of_a_batch() -> Call:
    """Return the call that makes the same of all points at once."""
    net, at = network(kaf).requires_grad_(False), points().requires_grad_()
    return lambda: torch.autograd.grad(net(at).sum(), at)


def peak_bytes(call: Call) -> int:
    """Return the most memory that a call holds at once, in bytes, of what PyTorch allocates on the CPU."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest
