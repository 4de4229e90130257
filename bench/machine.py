"""What a time depends on: processor, instruction set, threads, versions, source."""

import datetime
import os
import platform
from typing import Any

import torch

import kafops
from kafops.check import processor
from models.support.environment import commit


def describe() -> dict[str, Any]:
    """Return processor, kafops backend, threads, load average of the last minute, versions, git commit and date."""
    return {
        "processor": processor(),
        "backend": kafops.backends.explain(torch.empty(1)),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "kafops": kafops.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "commit": commit() or "unknown",
        "date": datetime.date.today().isoformat(),
    }
