"""docs/deploy.md runs as it stands, in a folder of its own: Python, a Python that never imports kafops, C++."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kafops import compiled

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
CHECKS = """
assert isinstance(single, torch.export.ExportedProgram)
targets = {n.target for n in portable.graph.nodes if n.op == "call_function"}
assert targets and all(t.namespace == "aten" and torch.Tag.core in t.tags for t in targets), targets
print(kafops.library(), model(torch.ones(2, 3, 8, 8)).sum().item())
"""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def run(*command, folder, **environment):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.skipif(compiled.load_error is not None, reason=f"no compiled kernels: {compiled.load_error}")
def test_page(tmp_path):
    on_checkout = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    parts = blocks("python")
    (load,) = (part for part in parts if part.startswith("# load.py"))
    (executorch,) = (part for part in parts if part.startswith("# executorch"))
    parts.remove(load)
    if importlib.util.find_spec("executorch") is None:
        parts.remove(executorch)
    (tmp_path / "page.py").write_text("\n".join([*parts, CHECKS]), encoding="utf-8")
    *_, library, want = run(sys.executable, "page.py", folder=tmp_path, **on_checkout)

    load += "assert not any(name.split('.')[0] == 'kafops' for name in sys.modules)\n"
    (tmp_path / "load.py").write_text(load, encoding="utf-8")
    (found,) = run(sys.executable, "load.py", library, folder=tmp_path)
    assert float(found) == pytest.approx(float(want), abs=1e-5)

    (main,) = blocks("cpp")
    (tmp_path / "main.cpp").write_text(main, encoding="utf-8")
    (build,) = blocks("sh")
    (found,) = run("sh", "-e", "-c", build, folder=tmp_path, **on_checkout)
    assert float(found) == pytest.approx(float(want), abs=1e-5)
