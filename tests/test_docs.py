"""The documentation site: it builds without a warning, its examples run, and every page is reached."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kafops

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def run(*arguments, folder=ROOT):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("builder", ["html", "doctest"])
def test_the_site_is_built_without_a_warning_and_examples_of_docstrings_run(builder, tmp_path):
    run("-m", "sphinx", "-W", "--keep-going", "-q", "-b", builder, "-c", "docs", ".", str(tmp_path))
    if builder == "html":
        support = (tmp_path / "docs/support.html").read_text()
        assert all(title in support for title in ("compiled CUDA kernels", "rational_quadratic", "gelu"))
        assert "replace_activations" in (tmp_path / "docs/api.html").read_text()


def test_the_quickstart_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "quickstart.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    (tmp_path / "page.py").write_text("\n".join(blocks))
    run("page.py", folder=tmp_path)


def test_the_figures_are_drawn(tmp_path):
    (tmp_path / "figures.py").write_text((DOCS / "figures.py").read_text())
    run("figures.py", folder=tmp_path)
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {path.name for path in (DOCS / "figures").iterdir()}
    assert all(f"figures/{name}" in (DOCS / "mathematics.md").read_text() for name in drawn)


def test_every_public_name_is_on_the_page_of_the_api():
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert not [name for name in kafops.__all__ if f"kafops.{name}" not in page]


MACHINES = {"AVX2": "amd-epyc-avx2", "AVX-512": "amd-epyc-avx512"}
MEASURED = re.compile(r"([\d.]+)×?(?: times faster)? \(([\d.]+) to ([\d.]+)\)")


def quoted():
    """Yield what tables with a column for each machine say: file, machine, line, (median, 20th, 80th percentile)."""
    for page in (ROOT / "README.md", *DOCS.glob("**/*.md")):
        machines: list[str] = []
        for line in page.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if MACHINES.keys() <= set(cells):
                machines = cells
            elif not line.startswith("|"):
                machines = []
            for machine, cell in zip(machines, cells, strict=False):
                if machine in MACHINES:
                    for numbers in MEASURED.findall(cell):
                        yield page.name, machine, line, numbers


def decimals(number):
    return len(number.partition(".")[2])


def agree(said, measured):
    """Whether two numbers are roundings of one."""
    return abs(float(said) - float(measured)) <= 0.5 * (10.0 ** -decimals(said) + 10.0 ** -decimals(measured))


def test_tables_by_machine_say_what_was_measured_there():
    found = list(quoted())
    assert {"README.md", "robustness.md"} <= {page for page, *_ in found}
    for page, machine, line, said in found:
        table = MEASURED.findall((ROOT / f"bench/results/{MACHINES[machine]}.md").read_text(encoding="utf-8"))
        right = any(all(map(agree, said, measured)) for measured in table)
        assert right, f"{page} says {said} of {machine}, which was not measured: {line}"
