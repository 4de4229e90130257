import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import hubconf
from models.images import CIFAR10, CIFAR100, MNIST, ImageFormat
from models.networks import NETWORKS, build
from models.support import checkpoints
from models.support.checkpoints import CheckpointError

ROOT = Path(__file__).parents[2]


def load(network: str, **arguments: object) -> nn.Module:
    return torch.hub.load(str(ROOT), network, source="local", **arguments)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_every_network_is_an_entry_point_and_nothing_else_is() -> None:
    """As torch.hub.list finds them: callables without an underscore."""
    found = {name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")}
    assert found == set(NETWORKS.names)
    assert hubconf.dependencies == ["torch"]


@pytest.mark.parametrize("network", NETWORKS.names)
def test_help_tells_every_argument_and_option(network: str) -> None:
    entry = getattr(hubconf, network)
    words = [*inspect.signature(entry).parameters, *(f"{o}=" for o in NETWORKS.options(network))]
    assert all(word in entry.__doc__ for word in words)
    assert entry.__name__ == network


def test_loads_what_build_builds() -> None:
    made = load("resnet20", activation="kaf_silu", images="mnist", seed=5, width=4, form="post")
    assert_same(made, build("resnet20:width=4,form=post", "kaf_silu", MNIST, seed=5))
    made = load("vgg", activation="kwta:ratio=0.1", width=2, pool="stride", dropout=False)
    assert_same(made, build("vgg:width=2,pool=stride,dropout=no", "kwta:ratio=0.1", CIFAR10, seed=0))
    assert made.training


def test_takes_an_image_format_of_ones_own() -> None:
    images = ImageFormat(2, 12, 5, (0.5, 0.5), (0.25, 0.25))
    assert load("light", images=images, width=2)(torch.rand(3, 2, 12, 12)).shape == (3, 5)


def save(path: Path, model: nn.Module, average: nn.Module | None = None) -> Path:
    tensors = checkpoints.prefixed("model", model.state_dict())
    if average is not None:
        tensors |= checkpoints.prefixed("average.module", average.state_dict())
    checkpoints.save(path, tensors, {})
    return path


@pytest.mark.parametrize("name", ["kaf_free", "pssilu", "kwta:ratio=0.5,end=0.1"])
def test_loads_a_checkpoint_in_evaluation_mode(name: str, tmp_path: Path) -> None:
    trained = build("light:width=2", name, MNIST, seed=1)
    trained(torch.rand(8, 1, 28, 28)).sum().backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    path = save(tmp_path / "best.safetensors", trained)
    made = load("light", activation=name, images="mnist", width=2, checkpoint=str(path))
    assert_same(made, trained)
    assert not made.training
    x = torch.rand(2, 1, 28, 28)
    assert torch.equal(made(x), trained.eval()(x))


def test_loads_the_average_of_the_weights_where_there_is_one(tmp_path: Path) -> None:
    last, average = (build("light:width=2", "relu", MNIST, seed=seed) for seed in (1, 2))
    path = save(tmp_path / "best.safetensors", last, average)
    assert_same(load("light", images="mnist", width=2, checkpoint=path), average)


@pytest.mark.parametrize("arguments", [{"activation": "kaf"}, {"width": 4}, {"images": "cifar10"}])
def test_refuses_a_checkpoint_of_another_network(arguments: dict[str, object], tmp_path: Path) -> None:
    path = save(tmp_path / "best.safetensors", build("light:width=2", "relu", MNIST, seed=1))
    with pytest.raises(CheckpointError, match=r"best.safetensors is of another network"):
        load("light", **{"images": "mnist", "width": 2, "checkpoint": path, **arguments})


def test_refuses_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({}, path)
    with pytest.raises(CheckpointError, match=r"weights.pt cannot be read as a checkpoint"):
        load("light", checkpoint=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": "cifar"}, r"images must be 'mnist', .* or an ImageFormat, got 'cifar'"),
        ({"activation": "kaf_slu"}, "unknown activation 'kaf_slu'.*did you mean kaf_silu"),
        ({"wdth": 4}, "network 'light' has no option 'wdth'.*did you mean width"),
        ({"width": "four"}, "option 'width' of network 'light' must be a whole number, got 'four'"),
        ({"width": True}, "option 'width' of network 'light' must be a whole number, got 'yes'"),
    ],
)
def test_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load("light", **arguments)


def test_number_of_classes_is_that_of_the_images() -> None:
    assert load("light", images=CIFAR100, width=1).classifier.out_features == 100


def test_needs_torch_only() -> None:
    """In a process where nothing else that models/ uses can be imported."""
    others = ["torchvision", "rich", "matplotlib", "mlxtend", "safetensors", "sklearn", "foolbox", "art", "webdataset"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}))\n"
        "import torch\n"
        f"model = torch.hub.load({str(ROOT)!r}, 'preactresnet18', source='local', activation='kaf_silu', width=2)\n"
        "print(list(model(torch.rand(2, 3, 32, 32)).shape))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout.strip() == "[2, 10]", done.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import models; {load}; assert hasattr(models, 'Net'); import models.part",
        "{load}; import models; assert hasattr(models, 'Net'); {load}",
        "{load}; import sys; assert not [name for name in sys.modules if name.startswith('models')]",
    ],
)
def test_beside_a_package_models_of_the_users_own(code: str, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("class Net: pass\n")
    (tmp_path / "models" / "part.py").touch()
    load = f"torch.hub.load({str(ROOT)!r}, 'resnet20', source='local', activation='kaf_silu', images='mnist')"
    (tmp_path / "main.py").write_text("import torch; " + code.format(load=load))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
