import logging
import sys

import foolbox
import numpy as np
import pyautoattack
import pytest
import torch
from art.attacks.evasion import ProjectedGradientDescentPyTorch
from art.estimators.classification import PyTorchClassifier
from torch import nn
from torch.nn import functional as F

from models.attacks import ATTACKS, AttackError, AutoAttackMember, Foolbox, LinfAttack, autoattack, perturb, pgd
from models.attacks.libraries import FOOLBOX, MEMBERS, project
from models.evaluation import evaluate_attack

QUICK = {
    "autoattack": "autoattack:steps=5,targets=2,queries=20",
    **{name: f"{name}:steps=5,targets=2,queries=20" for name in MEMBERS},
    "deepfool": "deepfool:steps=5",
    "fmn": "fmn:steps=10",
    "hopskipjump": "hopskipjump:steps=2",
    "cw": "cw:l2=0.5,steps=10",
    "boundary": "boundary:l2=0.5,steps=20",
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits (0, w·x + b): the border is |w·x + b| / ‖w‖₁ away in L-infinity, and |w·x + b| / ‖w‖₂ in L2."""

    def __init__(self, weight: torch.Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = (x * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture(scope="module")
def cifar() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The 20 CIFAR-10 images inside foolbox, and a small network that has just learned them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.SiLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(1024, 10)
        )  # fmt: skip
    target = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu")
    x, y = foolbox.samples(target, "cifar10", batchsize=20)
    y = y.long()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(14):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    assert (model(x).argmax(1) == y).all()
    return model, x, y


@pytest.mark.parametrize("eps", [8 / 255, 16 / 255])
@pytest.mark.parametrize("steps", [1, 10, 40])
def test_pgd_is_that_of_foolbox_and_art(cifar: tuple, eps: float, steps: int) -> None:
    """From the image itself, without noise: the same points within 1e-6, and the same images broken.

    The three sum in another order, so that a pixel may round differently; the signs of a gradient hide the rest.
    """
    model, x, y = cifar
    step = eps / 4
    ours = perturb(model, x, y, LinfAttack(eps, step, steps), generator())
    target = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    by_foolbox = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=steps, random_start=False).run(
        target, x, foolbox.criteria.Misclassification(y), epsilon=eps
    )
    classifier = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1))
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=eps, eps_step=step, max_iter=steps, batch_size=20, verbose=False
    )
    by_art = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
    right = (model(ours).argmax(1) == y).sum()
    for theirs in (by_foolbox, by_art):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        assert (model(theirs).argmax(1) == y).sum() == right
    if (eps, steps) == (16 / 255, 40):
        assert 0 < right < 20


def test_autoattack_is_autoattack(cifar: tuple) -> None:
    """The members one after the other break what pyautoattack's own class breaks, up to the luck of one image."""
    model, x, y = cifar
    eps = 12 / 255
    with torch.random.fork_rng():
        theirs = pyautoattack.AutoAttack(model, eps=eps, seed=0, device="cpu", attacks=None, version="standard")
        theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = theirs.fab.n_iter = 20
        theirs.square.n_queries = 200
        adversarial, _ = theirs.run_standard_evaluation(x.contiguous(), y, batch_size=20)
    broken = model(adversarial).argmax(1) != y
    ours = autoattack(eps, steps=20, queries=200).search(model, x, y, generator())[1]
    assert 0 < broken.sum() < 20
    assert abs(int(ours.sum()) - int(broken.sum())) <= 1


def test_a_member_gives_the_bits_of_the_library(cifar: tuple) -> None:
    model, x, y = cifar
    seed = int(torch.randint(2**31 - 1, (), generator=generator(3)))
    with torch.random.fork_rng():
        square = pyautoattack.square.SquareAttack(
            model, norm="Linf", n_queries=100, eps=8 / 255, p_init=0.8, resc_schedule=False, seed=seed, device="cpu"
        )
        theirs = square.perturb(x.contiguous(), y)
    ours, found = AutoAttackMember(8 / 255, "square", queries=100).search(model, x, y, generator(3))
    assert torch.equal(model(theirs).argmax(1) != y, found)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_keeps_the_contract(cifar: tuple, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, x, y = cifar
    y = y.clone()
    y[0] = (y[0] + 1) % 10  # misclassified from the start
    attack = ATTACKS.create(QUICK[name], 16 / 255)
    model.zero_grad()
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), list(logging.root.handlers)
    adversarial, found = attack.search(model, x, y, generator())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert capfd.readouterr() == ("", "")
    assert logging.root.handlers == states[2]
    assert found[0]
    assert torch.equal(adversarial[0], x[0])
    assert torch.equal(model(adversarial).argmax(1) != y, found)
    change = (adversarial - x).flatten(1)
    if attack.norm == "Linf":
        assert change.abs().max() <= 16 / 255 + 1e-6
    else:
        assert change.norm(dim=1).max() <= 0.5 + 1e-5
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert adversarial.grad_fn is None
    assert torch.equal(attack.search(model, x, y, generator())[0], adversarial)


@pytest.mark.parametrize("name", sorted(QUICK))
def test_works_on_one_image_and_on_none_that_is_left(cifar: tuple, name: str) -> None:
    model, x, y = cifar
    attack = ATTACKS.create(QUICK[name], 1 / 255)
    assert attack.search(model, x[:1], y[:1], generator())[0].shape == (1, 3, 32, 32)
    wrong = (y + 1) % 10
    adversarial, found = attack.search(model, x, wrong, generator())
    assert found.all()
    assert torch.equal(adversarial, x)


def test_takes_models_and_images_in_any_memory_format(cifar: tuple) -> None:
    """pyautoattack takes views of gradients, which channels-last gradients have not."""
    model, x, y = cifar
    attack = ATTACKS.create("apgd-t:steps=5,targets=2", 16 / 255)
    _, found = attack.search(model, x.contiguous(), y, generator())
    try:
        model.to(memory_format=torch.channels_last)
        other = attack.search(model, x.to(memory_format=torch.channels_last), y, generator())[1]
    finally:
        model.to(memory_format=torch.contiguous_format)
    assert (found != other).sum() <= 1


@pytest.mark.parametrize(("name", "norm"), [("deepfool", 1), ("fmn", 1), ("cw", 2)])
def test_the_nearest_image_of_a_linear_model(name: str, norm: int) -> None:
    """Found with a radius a little above the distance of the border, and not with one a little below."""
    weight = torch.randn(1, 4, 4, generator=generator(1))
    x = 0.3 + 0.4 * torch.rand(12, 1, 4, 4, generator=generator(2))
    model = Linear(weight, 0.0).eval()
    model.bias = -float((x * weight).flatten(1).sum(1).mean())
    score = model(x)[:, 1].detach()
    y = (score > 0).long()
    distance = score.abs() / weight.abs().pow(norm).sum().pow(1 / norm)
    for i in distance.argsort()[2:5].tolist():
        for factor, expected in ((0.95, False), (1.08, True)):
            attack = Foolbox(name, factor * distance[i].item())
            assert attack.search(model, x[i : i + 1], y[i : i + 1], generator())[1].item() is expected


def test_points_are_projected_to_the_ball() -> None:
    x = torch.full((2, 1, 1, 2), 0.5)
    points = torch.tensor([[0.8, 0.9], [0.5, -3.0]]).view(2, 1, 1, 2)
    torch.testing.assert_close(project(points, x, 0.1, "Linf").view(2, 2), torch.tensor([[0.6, 0.6], [0.5, 0.4]]))
    torch.testing.assert_close(project(points, x, 0.25, "L2").view(2, 2), torch.tensor([[0.65, 0.70], [0.5, 0.25]]))
    for norm in ("Linf", "L2"):  # a point that is no number would be misclassified by any network
        assert torch.equal(project(torch.full_like(x, torch.nan), x, 0.1, norm), x)
        assert torch.equal(project(torch.full_like(x, torch.inf), x, 0.1, norm), x)


def test_a_radius_that_reaches_every_image_is_refused() -> None:
    x = torch.rand(1, 1, 4, 4)
    for name, radius, farthest in (("cw", 4.1, 4), ("fmn", 1.1, 1)):
        with pytest.raises(ValueError, match=f"radius of '{name}' must be at most {farthest}, as far as images can be"):
            Foolbox(name, radius).search(nn.Flatten(), x, torch.zeros(1, dtype=torch.int64), generator())


def test_an_attack_by_decisions_without_a_start_leaves_the_image_alone() -> None:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2) + 0 * x.flatten(1).sum(1, keepdim=True)

    x, y = torch.rand(3, 1, 4, 4), torch.ones(3, dtype=torch.int64)
    adversarial, found = ATTACKS.create("hopskipjump:steps=1", 0.1).search(Constant().eval(), x, y, generator())
    assert not found.any()
    torch.testing.assert_close(adversarial, x)


def test_an_attack_on_few_classes() -> None:
    model = Linear(torch.randn(1, 4, 4, generator=generator(1)), 0.0)
    x = torch.rand(8, 1, 4, 4, generator=generator(2))
    y = model(x).argmax(1)
    for name in ("apgd-ce", "fab-t", "square"):
        exact = perturb(model, x, y, pgd(0.05, 20), generator())
        found = ATTACKS.create(f"{name}:queries=200", 0.05).search(model, x, y, generator())[1]
        assert (found <= (model(exact).argmax(1) != y)).all()
    for name, least in (("apgd-dlr", 3), ("apgd-t", 4), ("autoattack", 4)):
        with pytest.raises(AttackError, match=f"needs a network with at least {least} classes, this one has 2"):
            ATTACKS.create(name, 1e-6).search(model, x, y, generator())


def test_evaluates_in_batches(cifar: tuple) -> None:
    model, x, y = cifar
    attack = ATTACKS.create("apgd-ce:steps=20", 16 / 255)
    found = evaluate_attack(model, x, y, attack, seed=0, batch_size=7).found
    assert 0 < found.sum() <= 20


@pytest.mark.parametrize(
    ("text", "package"), [("square", "pyautoattack"), ("autoattack", "pyautoattack"), ("deepfool", "foolbox")]
)
def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, text: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(AttackError, match=rf"needs the package {package}, .*; run `pip install 'kafops\[attacks\]'`"):
        ATTACKS.create(text, 0.1)


def test_an_l2_attack_has_a_radius_of_its_own() -> None:
    for name, norm in FOOLBOX.items():
        if norm == "L2":
            with pytest.raises(AttackError, match=f"works in L2 and needs a radius of its own, such as {name}:l2=0.5"):
                ATTACKS.create(name, 0.1)
            attack = ATTACKS.create(f"{name}:l2=0.5", 0.1)
            assert (attack.norm, attack.radius) == ("L2", 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoAttackMember(0.1, "fab"), "AutoAttack's members here are apgd-ce, .*, got 'fab'"),
        (lambda: AutoAttackMember(2, "square"), r"eps must be in \[0, 1\], the range of the images, got 2"),
        (lambda: AutoAttackMember(0.1, "square", queries=0), "must be at least 1, got 100, 9 and 0"),
        (lambda: Foolbox("pointwise", 0.1), "foolbox's attacks here are deepfool, .*, got 'pointwise'"),
        (lambda: Foolbox("fmn", -1), "the radius of 'fmn' must not be negative, got -1"),
        (lambda: Foolbox("fmn", 0.1, steps=0), "steps must be at least 1, or None, got 0"),
    ],
)
def test_refuses_impossible_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "deepfool"])
def test_a_network_in_float64_is_broken_where_it_is_in_float32(name: str) -> None:
    """The points are near the boundary, which float64 puts elsewhere by some 1e-7: the radius is well beyond it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    x = torch.rand(6, 1, 4, 4)
    y = model(x).argmax(1)
    attack = ATTACKS.create(name + (":queries=50" if name == "square" else ":steps=10"), 0.4)
    in_float32 = attack.search(model, x, y, generator())[1]
    points, found = attack.search(model.double(), x.double(), y, generator())
    assert points.dtype == torch.float64
    assert found.equal(in_float32)
    assert found.any() or name == "square"
    assert (points - x.double()).abs().max() <= 0.4 + 1e-12


def test_autoattack_on_few_classes_is_refused_before_the_first_member() -> None:
    called = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(len(x))
            return x.flatten(1)[:, :3]

    x = torch.rand(4, 1, 2, 2)
    with pytest.raises(AttackError, match="'apgd-t' needs a network with at least 4 classes, this one has 3"):
        ATTACKS.create("autoattack", 0.1).search(Counting(), x, Counting()(x).argmax(1), generator())
    assert called == [4, 1]


@pytest.mark.parametrize("name", ["deepfool", "fmn:steps=5", "apgd-ce:steps=5", "cw:l2=1,steps=5"])
def test_an_attack_by_gradient_under_no_grad(cifar: tuple, name: str) -> None:
    model, x, y = cifar
    wanted = ATTACKS.create(name, 0.03).search(model, x[:4], y[:4], generator())[1]
    with torch.no_grad():
        assert ATTACKS.create(name, 0.03).search(model, x[:4], y[:4], generator())[1].equal(wanted)


def test_a_point_far_outside_is_cut_to_the_range_before_its_length_is_measured() -> None:
    """By hand: (9, 0.6) is first (1, 0.6), which is 0.50990 from (0.5, 0.5) and within the ball as it is."""
    x = torch.full((1, 1, 1, 2), 0.5)
    points = torch.tensor([9.0, 0.6]).view(1, 1, 1, 2)
    found = project(points, x, 0.51, "L2")
    torch.testing.assert_close(found, torch.tensor([1.0, 0.6]).view(1, 1, 1, 2))
