import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kafops
from models.attacks.linf import fgsm, nfgsm, perturb, pgd
from models.training.methods import GRADALIGN_WEIGHTS, METHODS, Step
from models.training.noise import Noise

EPS = 0.1


class Unfused(nn.Module):
    """The curves of a KAF layer from plain PyTorch operations."""

    def __init__(self, layer: kafops.KAF) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.layer
        return kafops.reference.kaf(x, layer.alpha, layer.bandwidths(), layer.boundary)


def network(fused: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = kafops.KAF(4, init="silu", dtype=torch.float64)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, dtype=torch.float64),
        nn.BatchNorm2d(4, dtype=torch.float64),
        layer if fused else Unfused(layer),
        nn.Flatten(),
        nn.Linear(4 * 16, 3, dtype=torch.float64),
    )


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 6, 6, generator=g, dtype=torch.float64), torch.arange(6) % 3


def step(model: nn.Module, seed: int = 5, scale: float = 1.0) -> Step:
    return Step(model, model, F.cross_entropy, Noise(torch.Generator().manual_seed(seed)), scale)


def loss_of(text: str, model: nn.Module, eps: float = EPS, scale: float = 1.0) -> torch.Tensor:
    updates = list(METHODS.create(text, eps)(step(model, scale=scale), *batch()))
    assert len(updates) == 1
    return updates[0].loss


def test_standard_is_the_loss_of_the_images() -> None:
    model, (x, y) = network(), batch()
    assert torch.equal(loss_of("standard", model), F.cross_entropy(model(x), y))


@pytest.mark.parametrize(
    ("text", "attack"),
    [("fgsm", fgsm(EPS)), ("nfgsm:k=3", nfgsm(EPS, 3)), ("pgd:steps=4,step=0.04", pgd(EPS, 4, 0.04))],
)
def test_adversarial_methods_are_the_loss_after_the_attack(text: str, attack: object) -> None:
    model, (x, y) = network(), batch()
    moved = perturb(model, x, y, attack, torch.Generator().manual_seed(5))
    torch.testing.assert_close(loss_of(text, model), F.cross_entropy(model(moved), y), rtol=1e-12, atol=0)


def test_craft_in_evaluation_mode_leaves_batch_norm_alone() -> None:
    model = network()
    before = model[1].num_batches_tracked.clone()
    loss_of("pgd:steps=3,mode=eval", model)
    assert model[1].num_batches_tracked == before + 1  # the update's own pass
    assert model.training
    loss_of("pgd:steps=3", model)
    assert model[1].num_batches_tracked == before + 1 + 4


def test_attack_does_not_depend_on_the_scale_of_its_loss() -> None:
    for text in ("fgsm", "nfgsm", "trades:steps=2", "gradalign:weight=0.3"):
        assert torch.equal(loss_of(text, network()), loss_of(text, network(), scale=1024.0))


def test_free_replays_the_batch_and_keeps_the_perturbation() -> None:
    model, (x, y) = network(), batch()
    method = METHODS.create("free:m=3", EPS)
    assert method.updates == 3
    delta = torch.zeros_like(x)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other = network()
    other_optimizer = torch.optim.SGD(other.parameters(), 0.1)
    for update in method(step(model), x, y):
        # The same by hand: one gradient for weights and perturbation, the perturbation moved after it.
        moved = delta.clone().requires_grad_()
        loss = F.cross_entropy(other((x + moved).clamp(0, 1)), y)
        assert torch.equal(update.loss, loss)
        for o, value in ((optimizer, update.loss), (other_optimizer, loss)):
            o.zero_grad()
            value.backward()
            o.step()
        delta = (delta + EPS * moved.grad.sign()).clamp(-EPS, EPS)
    assert torch.equal(method.state()["delta"], delta)
    assert delta.abs().max() == EPS
    # A smaller batch uses the first part, and a state goes on elsewhere.
    again = METHODS.create("free:m=1", EPS)
    again.load_state(method.state())
    update = next(iter(again(step(model), x[:2], y[:2])))
    assert torch.equal(update.loss, F.cross_entropy(model((x[:2] + delta[:2]).clamp(0, 1)), y[:2]))


def test_free_says_when_it_was_not_differentiated() -> None:
    updates = METHODS.create("free:m=2", EPS)(step(network()), *batch())
    next(updates)
    with pytest.raises(RuntimeError, match="not differentiated"):
        next(updates)


def test_trades_is_the_published_loss() -> None:
    """Zhang et al. 2019, equation 5: cross-entropy + beta · KL(f(x) ‖ f(x')), x' by PGD on the same KL."""
    model, (x, y) = network(), batch()
    model.eval()
    points = (x + torch.empty_like(x).normal_(0, 0.001, generator=torch.Generator().manual_seed(5))).clamp(0, 1)
    target = model(x).softmax(1).detach()
    for _ in range(3):
        points = points.detach().requires_grad_()
        kl = (target * (target.log() - model(points).log_softmax(1))).sum()
        (gradient,) = torch.autograd.grad(kl, points)
        points = (x + (points + 0.05 * gradient.sign() - x).clamp(-EPS, EPS)).clamp(0, 1)
    p, q = model(x).softmax(1), model(points).softmax(1)
    wanted = F.cross_entropy(model(x), y) + 6 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(loss_of("trades:steps=3,step=0.05", model), wanted, rtol=1e-6, atol=0)


def gradalign_by_definition(model: nn.Module, weight: float) -> torch.Tensor:
    """FGSM + weight · (1 − mean cos), written with nothing but plain operations and create_graph."""
    x, y = batch()
    noise = torch.empty_like(x).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(5))

    def gradient(at: torch.Tensor, graph: bool) -> torch.Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(at), y), at, create_graph=graph)[0].flatten(1)

    one, two = gradient(x, False), gradient((x + noise).clamp(0, 1), True)
    cosine = (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1))
    moved = (x + EPS * one.view_as(x).sign()).clamp(0, 1)
    return F.cross_entropy(model(moved), y) + weight * (1 - cosine.mean())


def test_gradients_of_gradalign_equal_the_reference() -> None:
    """A kernel whose backward cannot be differentiated would drop the regulariser's part, silently."""
    fused, plain = network(), network(fused=False)
    loss = loss_of("gradalign:weight=0.7", fused)
    loss.backward()
    wanted = gradalign_by_definition(plain, 0.7)
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=0)
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)
    # The regulariser's part is not small: without it the gradient would be another.
    without = network()
    loss_of("fgsm", without).backward()
    for mine, less in ((fused[0].weight, without[0].weight), (fused[2].alpha, without[2].alpha)):
        assert (mine.grad - less.grad).norm() > 1e-3 * less.grad.norm()


def test_gradient_of_gradalign_is_the_slope_of_its_loss() -> None:
    """Finite differences along a random direction, with the gradient at the image held constant as the method does."""
    model = network().eval()
    method = METHODS.create("gradalign", EPS * 0.5)
    x, y = batch()

    def misalignment() -> torch.Tensor:
        return method.misalignment(step(model), x, y)

    weight = model[2].alpha
    (gradient,) = torch.autograd.grad(misalignment(), weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    fixed = _constant_gradient(model, x, y)
    h = 1e-6
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
        values.append(_misalignment_with(model, fixed, x, y, method.eps))
        with torch.no_grad():
            weight -= sign * h * direction
    slope = (values[0] - values[1]) / (2 * h)
    assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def _constant_gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y), x)[0].flatten(1)


def _misalignment_with(model: nn.Module, fixed: torch.Tensor, x: torch.Tensor, y: torch.Tensor, eps: float) -> float:
    noise = torch.empty_like(x).uniform_(-eps, eps, generator=torch.Generator().manual_seed(5))
    moved = _constant_gradient(model, (x + noise).clamp(0, 1), y)
    return (1 - F.cosine_similarity(fixed, moved, eps=0.0).mean()).item()


def test_gradalign_leaves_out_images_without_gradient() -> None:
    class Flat(nn.Module):
        """Image 0 has no gradient."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = torch.ones(len(x), 1)
            keep[0] = 0
            return x.flatten(1).sum(1, keepdim=True) * keep * self.weight

    method = METHODS.create("gradalign:weight=1", 0.1)
    x = torch.rand(3, 1, 2, 2)
    value = method.misalignment(step(Flat()), x, torch.tensor([0, 1, 0]))
    assert value.item() == pytest.approx(0, abs=1e-6)  # the others' gradients have one direction, everywhere
    alone = method.misalignment(step(Flat()), x[:1], torch.tensor([0]))
    assert alone.item() == 0
    alone.backward()


def test_gradalign_of_a_confident_image_is_a_number() -> None:
    """Its gradient is about 1e-26: the squares of that are 0 in float32."""

    class Confident(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(12 * torch.tensor([[1.0, 2.0, 1.0, 1.0], [-1.0, 0.0, -1.0, 0.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) @ self.weight.T

    model, x = Confident(), torch.full((8, 1, 2, 2), 0.1)
    x[0] = 0.75
    value = METHODS.create("gradalign:weight=1", EPS).misalignment(step(model), x, torch.zeros(8, dtype=torch.int64))
    assert value.item() == pytest.approx(0, abs=1e-6)  # all gradients of two classes are along one line
    value.backward()
    assert model.weight.grad.isfinite().all()


def test_gradalign_has_the_authors_weights() -> None:
    assert METHODS.create("gradalign", 8 / 255).weight == pytest.approx(0.2)
    assert METHODS.create("gradalign", 16 / 255).weight == pytest.approx(2.0)
    assert len(GRADALIGN_WEIGHTS) == 16
    with pytest.raises(ValueError, match=r"weights for eps from 1/255 to 16/255, got 0\.3; give one"):
        METHODS.create("gradalign", 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pdg", r"unknown method 'pdg', there are standard.*did you mean pgd"),
        ("nfgsm:noise=2", r"method 'nfgsm' has no option 'noise': it has k, mode"),
        ("pgd:steps=many", "must be a whole number, got 'many'"),
        ("pgd:mode=test", "must be train or eval, got test"),
        ("fast:step=9", "step is in units of eps, above 0 and up to 2, .* got 9"),
        ("fast:step=0", "step is in units of eps, above 0 and up to 2, .* got 0"),
        ("nfgsm:k=900", "noise must be at most 1, the range of the images"),
        ("free:m=0", "must be at least 1, got 0"),
        ("trades:beta=-1", "beta must not be negative"),
        ("gradalign:weight=-1", "weight must not be negative"),
    ],
)
def test_refuses_what_makes_no_sense(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        METHODS.create(text, EPS)


def shares(world: int) -> Iterator[Noise]:
    for rank in range(world):
        yield Noise(torch.Generator().manual_seed(7), 5, rank, world)


def test_noise_of_the_shares_makes_the_noise_of_the_whole() -> None:
    x = torch.rand(5, 1, 2, 2)
    alone = Noise(torch.Generator().manual_seed(7))
    for draw in (lambda n, t: n.around(t, 0.2), lambda n, t: n.normal(t, 0.1)):
        whole = draw(Noise(torch.Generator().manual_seed(7)), x)
        for rank, noise in enumerate(shares(2)):
            assert torch.equal(draw(noise, x[rank::2]), whole[rank::2])
    assert (alone.around(x, 0.2) - x).abs().max() <= 0.2 + 1e-6
    assert torch.equal(alone.around(x, 0), x)
    assert math.isclose(Noise(torch.Generator().manual_seed(0)).normal(torch.zeros(4000), 0.1).std(), 0.1, rel_tol=0.05)


def test_trades_crafts_in_evaluation_mode() -> None:
    """Two passes count for the statistics of a batch norm, that of the images and that of the perturbed ones."""
    assert METHODS.create("trades", EPS).mode == "eval"
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 3)).train()
    x, y = torch.rand(5, 1, 4, 4), torch.arange(5) % 3
    step = Step(model, model, F.cross_entropy, Noise(torch.Generator().manual_seed(0)))
    next(METHODS.create("trades:steps=3", EPS)(step, x, y))
    assert model[0].num_batches_tracked == 2
