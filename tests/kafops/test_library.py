"""The compiled library of CPU kernels: what it exports, what it needs, and that it serves whoever loads it."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kafops
from kafops import compiled

pytestmark = pytest.mark.skipif(compiled.load_error is not None, reason=f"no compiled kernels: {compiled.load_error}")

ROOT = Path(__file__).parents[2]
INSTRUCTION_SETS = re.findall(r"\bX\((\w+),", (ROOT / "csrc/cpu/isa.h").read_text(encoding="utf-8"))


def output_of(program: str, *arguments: object) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    return subprocess.run([path, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def test_it_needs_nothing_of_python():
    undefined = {line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", kafops.library()).splitlines()}
    assert not {s for s in undefined if re.match(r"_?Py", s)}
    assert "python" not in output_of("readelf", "-d", kafops.library())


def test_it_exports_two_functions():
    defined = {line.split()[-1] for line in output_of("nm", "-D", "--defined-only", kafops.library()).splitlines()}
    own = {s for s in defined if "kaf" in s}
    assert own == {"kafops_capability", "kafops_capability_error"}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_code_of_an_instruction_set_stays_with_it(name):
    """Nothing global but the table of loops, and no weak function that the linker might keep for the whole program."""
    built = sorted(ROOT.glob(f"build/temp.*/**/csrc/cpu/{name}.o"))
    if not built:
        pytest.skip("the objects of the build are not here")
    lines = output_of("nm", "--demangle", "--defined-only", built[-1]).splitlines()
    visible = [line.split(maxsplit=2)[1:] for line in lines if line.split(maxsplit=2)[1] not in "trbdn"]
    assert [symbol for kind, symbol in visible if "kaf" in symbol] == [f"kaf::{name}_loops"]
    section, vectors = "", set()
    for line in output_of("objdump", "--disassemble", "--no-show-raw-insn", built[-1]).splitlines():
        section = line.split()[-1].rstrip(":") if line.startswith("Disassembly of section") else section
        if re.search(r"\t(\{\w+\} )?v[a-z]", line):
            vectors.add(section)
    # A function that others may define too has a section of its own, ".text._ZN...".
    assert not {s for s in vectors if "_Z" in s}


PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
assert not any(name.split(".")[0] == "kafops" for name in sys.modules)
x, alpha, gamma = torch.linspace(-1, 1, 6).reshape(2, 3), torch.ones(3, 1), torch.full((1,), 2.0)
y = torch.ops.kafops.kaf(x, alpha, gamma, None, 1.0)
torch.testing.assert_close(y, torch.exp(-2 * x * x))
dx, dalpha, _, _ = torch.ops.kafops.kaf_backward(torch.ones_like(x), x, alpha, gamma, None, 1.0, 3)
torch.testing.assert_close(dx, -4 * x * y)
torch.testing.assert_close(dalpha, y.sum(0).unsqueeze(1))
try:
    torch.ops.kafops.kaf(x[:, :2], alpha, gamma, None, 1.0)
except RuntimeError as error:
    assert "alpha [3, 1] for x [2, 2]" in str(error)
print("served")
"""


def test_it_serves_a_python_that_never_imported_kafops(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kafops.library()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "served", done.stderr


def test_the_choice_is_made_once(monkeypatch):
    before = compiled.capability()
    monkeypatch.setenv("KAFOPS_CPU_CAPABILITY", "sse9")
    assert compiled.capability() == before
    assert kafops.kaf(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1)).item() == 1


def test_where_there_is_none_the_path_says_why(monkeypatch):
    monkeypatch.setattr(compiled, "load_error", "undefined symbol")
    with pytest.raises(RuntimeError, match=r"_C\.abi3\.so cannot be loaded: undefined symbol"):
        compiled.library()
    monkeypatch.setattr(compiled, "_path", None)
    monkeypatch.setattr(compiled, "load_error", "kafops was installed without compiled kernels")
    with pytest.raises(FileNotFoundError, match="without compiled kernels"):
        compiled.library()
