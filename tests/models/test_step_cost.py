import pytest
import torch
from torch import nn

import kafops
from models.evaluation import step_cost
from models.evaluation.step_cost import CurveBy, kept_bytes, measure


def network(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 1), activation, nn.Flatten(), nn.Linear(3 * 16, 10))


def test_kept_bytes_are_those_that_an_activation_adds() -> None:
    """The identity adds none; SiLU keeps its input, which nobody else keeps: 5 x 3 x 4 x 4 floats."""
    x, y = torch.rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    added = kept_bytes(network(nn.SiLU()), x, y) - kept_bytes(network(nn.Identity()), x, y)
    assert added == 5 * 3 * 4 * 4 * 4


@pytest.mark.skipif(kafops.backends.choose(torch.empty(1)) == "reference", reason="no compiled kernels")
def test_fused_kaf_keeps_its_input_and_the_reference_much_more() -> None:
    x, y = torch.rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)
    base = kept_bytes(network(nn.Identity()), x, y)
    layer = kafops.KAF2d(3)
    assert kept_bytes(network(CurveBy(layer, kafops.kaf)), x, y) - base == 5 * 3 * 4 * 4 * 4
    assert kept_bytes(network(CurveBy(layer, kafops.reference.kaf)), x, y) - base >= 20 * 5 * 3 * 4 * 4 * 4


def test_implementations_compute_the_same_network() -> None:
    x = torch.rand(4, 1, 28, 28)
    fused, reference = (step_cost._network(name, 2, seed=0)(x) for name in ("fused", "reference"))
    torch.testing.assert_close(fused, reference, rtol=1e-4, atol=1e-4)


def test_measure_takes_turns_and_compares_with_relu() -> None:
    steps: list[str] = []
    result = measure(("fused", "relu"), batch_size=4, width=1, seed=0, on_step=steps.append)
    assert steps == ["fused", "relu", *(["fused"] * 3 + ["relu"] * 3) * step_cost.ROUNDS]
    assert len(steps) == step_cost.expected_steps(("fused", "relu"))
    relu, fused = result["implementations"]["relu"], result["implementations"]["fused"]
    assert relu["time_ratio"] == relu["memory_ratio"] == 1
    assert fused["time_ratio"] == fused["median_seconds"] / relu["median_seconds"]
    assert fused["memory_ratio"] == fused["kept_bytes"] / relu["kept_bytes"] > 1
    for entry in (relu, fused):
        assert entry["spread_seconds"][0] <= entry["median_seconds"] <= entry["spread_seconds"][1]


def test_a_failing_compiler_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nlong story")

    monkeypatch.setattr(torch, "compile", broken)
    result = measure(("compiled", "relu"), batch_size=4, width=1, seed=0)
    assert result["implementations"]["compiled"] == {"error": "RuntimeError: no C++ compiler"}
    assert len(result["implementations"]["relu"]["seconds"]) == 3 * step_cost.ROUNDS
