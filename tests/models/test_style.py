import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb

from models.figures import gradients, style


def test_no_two_lines_are_alike() -> None:
    assert len({tuple(style.line(i).items()) for i in range(21)}) == 21
    names = [f"activation {i}" for i in range(14)]
    assert len({tuple(gradients._look(names, name).items()) for name in names}) == 14


@pytest.mark.parametrize("colour", style.PALETTE)
def test_a_line_can_be_seen_on_white(colour: str) -> None:
    """Contrast by WCAG 2.2: text needs 3 to 4.5 and a line less, but yellow's 1.3 is not enough."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    assert 1.05 / (luminance + 0.05) > 2


def test_figures_take_numbers_only() -> None:
    """They import nothing of networks, runs or files."""
    names = [f"models.figures.{path.stem}" for path in Path(style.__file__).parent.glob("[a-z]*.py")]
    program = (
        f"import sys, {', '.join(names)}; print(*(m for m in sys.modules if m.split('.')[0] in ('torch', 'models')))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    assert set(loaded) == {"models", "models.figures", *names}
