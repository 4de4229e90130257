import os
import subprocess
import sys

import pytest
import torch

import kafops
from kafops import autograd, backends, check, ops
from kafops.backends import cpu

STAGES = ("forward", "backward", "double backward")
OPERATORS = dict(zip(STAGES, ("kaf", "kaf_backward", "kaf_double_backward"), strict=True))
compiled = pytest.mark.skipif(cpu.load_error is not None, reason=f"no compiled kernels: {cpu.load_error}")


@pytest.fixture
def spoil(monkeypatch):
    """Replace an operator by one whose first large result passes through `change`."""

    def replace(name, change):
        operator = getattr(ops, name)

        def wrong(*arguments):
            result = operator(*arguments)
            if isinstance(result, torch.Tensor):
                return change(result)
            return (change(result[0]) if result[0].numel() else result[0], *result[1:])

        put_in_place(monkeypatch, name, wrong)

    return replace


def put_in_place(monkeypatch, name, function):
    """Let a function stand for an operator wherever it is called from."""
    monkeypatch.setattr(ops, name, function)
    monkeypatch.setattr(autograd, f"_{name}", function, raising=name != "kaf_double_backward")


def rows(output: str) -> dict[str, str]:
    return {line[:34].strip(): line for line in output.splitlines() if line.endswith(("ok", "WRONG"))}


def test_says_what_computes_and_that_it_is_right(capsys):
    assert check.main([]) == 0
    output = capsys.readouterr().out
    for part in (
        f"kafops {kafops.__version__}",
        f"torch {torch.__version__}",
        "Python 3",
        "instruction set",
        "threads",
    ):
        assert part in output or (part == "instruction set" and cpu.load_error)
    assert "RIGHT" in output.splitlines()[-1]
    assert len(rows(output)) == len(check._CASES) + 1
    assert "WRONG" not in output


@compiled
@pytest.mark.parametrize("change", [lambda t: t * 1.0001, lambda t: t + 1e-4, lambda t: t * float("nan")])
@pytest.mark.parametrize("stage", STAGES)
def test_wrong_values(stage, change, spoil, capsys):
    spoil(OPERATORS[stage], change)
    assert check.main([]) == 1
    output = capsys.readouterr().out
    assert "WRONG" in output.splitlines()[-1]
    shares = dict(zip(STAGES, map(float, rows(output)["float32"].split()[1:4]), strict=True))
    assert not shares[stage] <= 1
    assert all(shares[before] <= 1 for before in STAGES[: STAGES.index(stage)])


@compiled
def test_one_wrong_element(spoil, capsys):
    def change(y):
        y = y.clone()
        if y.shape == (4, 20, 12, 12):
            y[3, 19, 11, 11] += 0.01
        return y

    spoil("kaf", change)
    assert check.main([]) == 1
    table = rows(capsys.readouterr().out)
    assert table["float32"].endswith("WRONG")
    assert table["float32, a few elements"].endswith("ok")


@compiled
def test_infinity_that_is_not_zero(spoil, capsys):
    spoil("kaf", lambda y: torch.where(torch.arange(y.numel()).reshape(y.shape) == 2, 1e-6, y) if y.dim() == 2 else y)
    assert check.main([]) == 1
    assert rows(capsys.readouterr().out)["float32, NaN and infinity"].endswith("WRONG")


@compiled
def test_an_operator_that_raises(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("undefined symbol")

    put_in_place(monkeypatch, "kaf_backward", broken)
    assert check.main([]) == 1
    assert "RuntimeError: undefined symbol  WRONG" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:kafops computes through the plain PyTorch reference")
def test_without_kernels(monkeypatch, capsys):
    monkeypatch.setattr(cpu, "load_error", "no such file")
    assert check.main([]) == 0
    output = capsys.readouterr().out
    assert "reference: plain PyTorch, because" in output
    assert "no such file" in output
    assert "the reference in each dtype and the float64 reference agree" in output


@compiled
def test_from_the_command_line():
    environment = os.environ | {"KAFOPS_CPU_CAPABILITY": "portable"}
    done = subprocess.run(
        [sys.executable, "-m", "kafops.check"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "instruction set portable" in done.stdout
    assert not done.stderr


def test_the_package_says_what_computes_here():
    done = subprocess.run([sys.executable, "-m", "kafops"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"kafops {kafops.__version__}, torch {torch.__version__}" in done.stdout
    assert f"cpu: {backends.explain('cpu')}" in done.stdout
    assert "python -m kafops.check" in done.stdout
