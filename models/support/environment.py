"""What a result depends on besides its settings: versions, machine, source."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import kafops
from kafops.check import processor

_PACKAGES = ("numpy", "torchvision", "mlxtend", "safetensors", "foolbox", "pyautoattack", "matplotlib")
_ROOT = Path(__file__).parents[2]


def describe() -> dict[str, Any]:
    """Return versions, processor, threads, the kafops backend and the git commit where there is one."""
    return {
        "kafops": kafops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": platform.platform(terse=True),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "backend": kafops.backends.explain(torch.empty(1)),
        "commit": commit(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the short commit, with a plus sign where files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    command = ("git", "--no-optional-locks", *arguments)
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
