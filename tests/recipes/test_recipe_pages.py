"""Every recipe in docs/recipes runs as it stands, in a folder of its own, and comes to what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {page.stem: page for page in sorted((ROOT / "docs/recipes").glob("*.md"))}
# What is checked at the end, in the names of the page, beside what the page itself asserts.
WANTED = {
    "fine-tune": """
        assert len(kafops.curve_parameters(model)) == 49
        assert (after - before).abs().max() <= 1e-5 * before.abs().max()
        assert all(c.outside[1] <= 0.01 for c in calibration.values())
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in kafops.curve_parameters(vit))
        assert Path("curves.png").stat().st_size > 10_000
    """,
    "timm": """
        assert all(p.grad is not None for p in kafops.curve_parameters(vit))
        assert [g["weight_decay"] for g in optimizer.param_groups if g["params"][0].shape[-1:] == (20,)] == [0.0]
    """,
    "transformers": """
        assert all(p.abs().max() > 0 for p in kafops.curve_parameters(model))  # have been trained
    """,
    "lightning": """
        assert {"loss", "kaf/1/alpha", "kaf/3/alpha", "kaf/outside"} <= set(trainer.logged_metrics)
        assert trainer.logged_metrics["kaf/1/alpha"] > 1e-3
    """,
    "pinns": """
        assert error < 0.12 and field_error < 0.05 and force_error < 0.03  # twice and more what was seen
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())
    """,
}


def python(*arguments, folder):
    """Run Python on the checkout, in a folder, on one thread."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def program(name):
    """Join the page's blocks, and what is checked at the end."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGES[name].read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    checks = [line.strip() for line in WANTED.get(name, "").splitlines()]
    return "\n".join([*blocks, "from pathlib import Path", *checks])


def test_pages_are_tested():
    assert set(WANTED) < set(PAGES)
    assert set(PAGES) - set(WANTED) == {"fsdp2"}


@pytest.mark.parametrize("name", sorted(WANTED))
def test_page(name, tmp_path):
    (tmp_path / "page.py").write_text(program(name), encoding="utf-8")
    python("page.py", folder=tmp_path)


def test_fsdp2(tmp_path):
    (tmp_path / "train.py").write_text(program("fsdp2"), encoding="utf-8")
    said = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", folder=tmp_path)
    first, last = map(float, re.search(r"loss ([\d.]+) → ([\d.]+)", said).groups())
    assert last < 0.7 * first
    check = """
        import kafops, torch
        from torch import nn
        blocks = [nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(3)]
        model = nn.Sequential(*blocks, nn.Linear(32, 4))
        x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
        kafops.replace_activations(model, kafops.KAF, example_input=x, base="same")
        kafops.load_state_dict(model, torch.load("sharded.pt"))
        loss = nn.functional.cross_entropy(model(x), x[:, :4].argmax(1))
        print(loss.item())
    """
    # float32 where the training computed in bfloat16, at parameters one step further
    assert abs(float(python("-c", re.sub("^ +", "", check, flags=re.MULTILINE), folder=tmp_path)) - last) < 0.1
