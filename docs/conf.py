"""The documentation site: the pages of this folder and of results, and what docstrings say. `make docs` builds it."""

import doctest
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import latex2mathml.converter  # noqa: E402
import torch  # noqa: E402
from docutils import nodes  # noqa: E402

import kafops  # noqa: E402
from kafops import checks  # noqa: E402
from kafops.backends.record import Backend  # noqa: E402

project = "kafops"
author = "the kafops maintainers"
project_copyright = f"2026, {author}"
version = release = kafops.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/**", "results/**", "bench/results/**", "CONTRIBUTING.md", "CHANGELOG.md"]

# Anchors of headings as GitHub makes them, so that links work there and here.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath", "substitution"]

default_role = "code"
autodoc_typehints = "none"  # what an argument may be is in the words beside it
autodoc_member_order = "bysource"
napoleon_use_ivar = True

html_theme = "furo"
html_math_renderer = "mathml"  # which browsers draw themselves, without a network
html_title = f"kafops {release}"
html_copy_source = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0072b2", "color-brand-content": "#0072b2"},
    "dark_css_variables": {"color-brand-primary": "#56b4e9", "color-brand-content": "#56b4e9"},
}

doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# What examples in docstrings take for granted.
doctest_global_setup = """
import os, tempfile, types
import matplotlib.pyplot as plt
import torch, torchvision, kafops

os.chdir(tempfile.mkdtemp())
torch.manual_seed(0)
layer = kafops.KAF(16)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3), kafops.KAF(16))
images, epoch = torch.randn(2, 3, 32, 32), 0
loader = [images]
writer = types.SimpleNamespace(add_scalar=lambda *scalar: None)
wandb = types.SimpleNamespace(log=lambda values: None)
"""


def supported() -> str:
    """Return the table of backends, a row for each record."""
    rows = ["| backend | devices | kernels κ of its own | operators of its own | here |", "|---|---|---|---|---|"]
    return "\n".join([*rows, *(_row(backend) for backend in kafops.backends.ORDER)])


def _row(backend: Backend) -> str:
    devices = ", ".join(sorted(backend.devices)) if backend.devices else "every device"
    kernels = ", ".join(f"`{name}`" for name in kafops.kernels.KERNELS if name in backend.kernels)
    operators = ", ".join(f"`{name}`" for name in backend.operators)
    error = backend.load_error()
    here = "loaded" if error is None else "not loaded"
    return f"| {backend.title} (`{backend.name}`) | {devices} | {kernels} | {operators} | {here} |"


def kernels() -> str:
    """Return the table of kernels: how often each may be differentiated, and which backends have it themselves."""
    backends = kafops.backends.ORDER
    rows = [
        f"| kernel κ | derivatives | {' | '.join(f'`{b.name}`' for b in backends)} |",
        "|---" * (len(backends) + 2) + "|",
    ]
    for name, kernel in kafops.kernels.KERNELS.items():
        smooth = kernel.smoothness >= kafops.kernels.HIGHEST
        orders = f"n + 2m ≤ {kafops.kernels.HIGHEST}" if smooth else f"n + m ≤ {kernel.smoothness}"
        of = ["fused" if b.operators and name in b.kernels else "in plain PyTorch" for b in backends]
        rows.append(f"| `{name}` | {orders} | {' | '.join(of)} |")
    return "\n".join(rows)


def dtypes(of_x: bool) -> str:
    """Return the dtypes that x may have, or the parameters beside an x of float32: those that are not refused."""
    floating = (d for d in vars(torch).values() if isinstance(d, torch.dtype) and d.is_floating_point)
    return ", ".join(f"`{d}`".replace("torch.", "") for d in dict.fromkeys(floating) if _taken(d, of_x))


def _taken(dtype: torch.dtype, of_x: bool) -> bool:
    x, p = (dtype, torch.float32) if of_x else (torch.float32, dtype)
    try:
        checks.arguments(*(torch.empty(1, 1, dtype=d) for d in (x, p)), torch.empty(1, dtype=p), None)
    except TypeError:
        return False
    return True


myst_substitutions: dict[str, Any] = {
    "backends": supported(),
    "kernels": kernels(),
    "of_x": dtypes(of_x=True),
    "of_parameters": dtypes(of_x=False),
    "bases": ", ".join(f"`{name}`" for name in kafops.bases.BASES),
}


def _as_it_reads(app: object, what: str, name: str, object_: object, options: object, lines: list[str]) -> None:
    """Keep |x| and [N, C, *] of docstrings what they are: reStructuredText has other uses for these marks."""
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(?<![*\\])([*|])(?!\*)", r"\\\1", line)


def _formula(display: str) -> Any:
    def visit(translator: Any, node: nodes.Element) -> None:
        translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def setup(app: Any) -> None:
    """Connect what reads docstrings, before napoleon does, and what writes formulas."""
    app.connect("autodoc-process-docstring", _as_it_reads, priority=100)
    app.add_html_math_renderer("mathml", inline_renderers=_formula("inline"), block_renderers=_formula("block"))
