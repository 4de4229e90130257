from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from models.support import checkpoints, files
from models.support.checkpoints import CheckpointError


def test_round_trip(tmp_path: Path) -> None:
    tensors = {"a.b": torch.arange(6).view(2, 3).T, "c": torch.tensor(0.1, dtype=torch.float64)}
    record = {"loss": 0.1 + 0.2, "names": ["ε"], "nested": {"epoch": 3}}
    checkpoints.save(tmp_path / "x" / "latest.safetensors", tensors, record)
    back, read = checkpoints.load(tmp_path / "x" / "latest.safetensors")
    assert read == record
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) and back[name].dtype == tensors[name].dtype for name in tensors)


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latest.safetensors"
    checkpoints.save(path, {"a": torch.rand(100)}, {})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoints.load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        checkpoints.load(tmp_path / "pickle")
    safetensors.torch.save_file({"a": torch.rand(2)}, tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="no checkpoint of this package"):
        checkpoints.load(tmp_path / "foreign")


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizer_round_trip(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    def stepped(steps: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        return layer, advance(layer, make(layer), steps)

    def make(layer: nn.Linear) -> torch.optim.Optimizer:
        arguments = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        return kind(layer.parameters(), lr=0.1, **arguments)

    def advance(layer: nn.Linear, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.Optimizer:
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.ones(4, 3)).square().sum().backward()
            optimizer.step()
        return optimizer

    layer, optimizer = stepped(2)
    tensors, values = checkpoints.flatten_optimizer(optimizer)
    checkpoints.save(tmp_path / "o", tensors, values)
    restored = make(layer)
    checkpoints.restore_optimizer(restored, *checkpoints.load(tmp_path / "o"))
    advance(layer, restored, 2)
    assert torch.equal(layer.weight, stepped(4)[0].weight)


def test_failed_replace_keeps_the_old_file_and_leaves_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_json(tmp_path / "a.json", {"old": 1})

    def fail(source: Path, target: Path) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk gone"):
        files.write_json(tmp_path / "a.json", {"new": 2})
    assert files.read_json(tmp_path / "a.json") == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert files.read_json(tmp_path / "a.json") is None


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "latest.safetensors"
    tensors = {"a": torch.rand(5), "b": torch.arange(3), "c": torch.rand(2).bfloat16()}
    checkpoints.save(path, tensors, {"epoch": 3})
    content = path.read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            checkpoints.load(path)


def test_a_checkpoint_of_before_there_were_checksums_can_be_read(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "old", metadata={"kafops.record": '{"epoch": 3}'})
    tensors, record = checkpoints.load(tmp_path / "old")
    assert tensors["a"].tolist() == [1, 1]
    assert record == {"epoch": 3}
