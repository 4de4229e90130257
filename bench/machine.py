"""What a time depends on: processor, instruction set, threads, versions, source."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import kafops

_ROOT = Path(__file__).parent.parent


def describe() -> dict[str, Any]:
    """Return processor, kafops backend, threads, load average of the last minute, versions, git commit and date."""
    return {
        "processor": _processor(),
        "backend": kafops.backends.explain(torch.empty(1)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "kafops": kafops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Return the short commit, with a plus sign where tracked files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    return head + "+" if head and _git("status", "--porcelain", "--untracked-files=no") else head or "unknown"


def _git(*arguments: str) -> str:
    command = ("git", "--no-optional-locks", *arguments)
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
