"""The CUDA kernels, run on the CPU by tests/emulator, compute in the place of the CPU kernels: a plugin for pytest,
and a command that runs another command's module.

    pytest -p emulated_cuda tests/kafops/test_kernels.py
    python -m emulated_cuda bench.accuracy

KAFOPS_EMULATOR_ORDER chooses the order of threads, KAFOPS_TEST_SANITIZE=1 a build with AddressSanitizer and UBSan. New
tensors are full of NaN, so that what a kernel leaves unwritten shows.
"""

import os
import runpy
import sys
import warnings
from pathlib import Path

import torch

import kafops

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "emulator"))
import emulator_build  # noqa: E402

_overrides: list[torch.library.Library] = []  # as long as the process lives


def pytest_configure() -> None:
    torch.ops.load_library(str(emulator_build.kafops_cuda(os.environ.get("KAFOPS_TEST_SANITIZE") == "1")))
    _overrides.append(torch.library.Library("kafops", "IMPL"))
    with warnings.catch_warnings(action="ignore"):
        for name in ("kaf", "kaf_backward", "kaf_double_backward"):
            emulated = getattr(torch.ops.kafops_emulated, name).default
            _overrides[-1].impl(name, emulated, "CPU", allow_override=True)
    kafops.backends.explain = lambda x: "cuda: compiled CUDA kernels, emulated on the CPU"
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    assert torch.empty(3).isnan().all()


if __name__ == "__main__":
    pytest_configure()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
