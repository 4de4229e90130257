"""The map of CONTRIBUTING.md is true: what it names is there, what is there is named, arrows point one way."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MAP = TEXT.partition("## The map of the house")[2].partition("\n## ")[0]
LINES = re.sub(r"\n +", " ", MAP.split("```")[1]).split("\n")  # descriptions that go on are joined
FILE = re.compile(r"[\w*/]+\.(?:py|h|inl|inc|cpp|cuh|cu)\b|[\w/]+/(?=[\s,;:.]|$)")
CHAIN = re.search(r"[Aa]rrows point one way: ([\w →]+)", MAP)[1].split(" → ")


def found(line):
    """Yield each name on a line with the paths it stands for: beside the line's first path, or from the root."""
    first = line.split()[0]
    beside = ROOT / first if first.endswith("/") else (ROOT / first).parent
    for name in dict.fromkeys([first, *FILE.findall(line)]):
        paths = sorted(beside.glob(name)) if name != first else []
        yield name, paths or sorted(ROOT.glob(name))


NAMED = [(name, path) for line in LINES if line for name, paths in found(line) for path in paths or [None]]
PLACES = {path: place for place, (_, path) in reversed(list(enumerate(NAMED)))}  # in the order of the map


def place(path):
    """Where the map has a file of csrc/, or what is or holds it in kafops/ or models/; None where it has not."""
    parts = path.relative_to(ROOT).parts
    return PLACES.get(ROOT.joinpath(*parts[:2]) if parts[0] in ("kafops", "models") else path)


def sources(folder, *suffixes):
    return sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in suffixes)


def module(name):
    """The file of a module of ours, or None."""
    path = ROOT.joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if name.split(".")[0] in CHAIN and file.is_file():
            return file
    return None


def imported(file):
    """The files of our modules that a file imports, anywhere in it; of `from package import module` the module's."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports from a dot; say from where"
            names = [n if module(n := f"{node.module}.{alias.name}") else node.module for alias in node.names]
        else:
            continue
        yield from filter(None, map(module, names))


def included(file):
    """The files that a file includes by quotes; those of the emulator's, which are found by a search path, left out."""
    for name in re.findall(r'^ *#include "(.+)"', file.read_text(), re.MULTILINE):
        path = (file.parent / name).resolve()
        if path.is_file():
            yield path
        else:
            assert list((ROOT / "tests/emulator").rglob(name)), f"{file} includes {name}, which is nowhere"


def test_every_name_is_a_file():
    assert len(NAMED) > 80
    assert [name for name, path in NAMED if path is None] == []


@pytest.mark.parametrize(
    ("folder", "suffixes"),
    [("csrc", (".h", ".inl", ".cpp", ".cuh", ".cu")), ("kafops", (".py", ".inc"))],
    ids=["csrc", "kafops"],
)
def test_every_source_is_named(folder, suffixes):
    assert [str(p.relative_to(ROOT)) for p in sources(folder, *suffixes) if place(p) is None] == []


@pytest.mark.parametrize("folder", ["models", "bench"])
def test_the_first_level_is_named(folder):
    inside = [p for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.glob("*.py")))]
    assert [p.name for p in sorted(inside) if p.name != "__init__.py" and p not in PLACES] == []


@pytest.mark.parametrize("folder", ["kafops", "models"])
def test_what_is_imported_stands_above(folder):
    for file in sources(folder, ".py"):
        inside = [p for p in imported(file) if ROOT / folder in p.parents]
        assert [str(p) for p in inside if place(p) > place(file)] == [], file


@pytest.mark.parametrize(
    "file", sources("csrc", ".h", ".inl", ".cpp", ".cuh", ".cu"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_csrc_includes_what_stands_above(file):
    inside = [p for p in included(file) if ROOT / "csrc" in p.parents]
    assert [str(p) for p in inside if not place(p) < place(file)] == []


def test_arrows_point_one_way():
    assert CHAIN == ["bench", "models", "kafops", "csrc"]
    for i, folder in enumerate(CHAIN[:-1]):
        for file in sources(folder, ".py"):
            for path in imported(file):
                assert path.relative_to(ROOT).parts[0] in CHAIN[i:], f"{file} imports {path}"


def test_no_two_test_files_have_one_name():
    """pytest, which imports them as modules of the first level, would refuse to collect them together."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
