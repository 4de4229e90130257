"""`python -m bench.gpu_static`: what the GPU kernels cost, proved by compiling them; nothing is run.

Compiles all kernels for all architectures and fails, with a list, where one spills registers, uses local memory, lacks
an access of 128 bits where one is due, or costs more than its limits. Writes docs/gpu-static.md and .png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import gpu_compile, gpu_static_figure, gpu_static_page
from bench.gpu_compile import CannotProve
from bench.gpu_costs import BACKENDS, faults, rows

DOCS = Path(__file__).parent.parent / "docs" / "gpu-static"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, count, predict; return 1 where anything is not as it must be, or could not be proved."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; nothing is written then")
    parser.add_argument("--architecture", action="append", help="only this one, or these; nothing is written then")
    options = parser.parse_args(arguments)
    whole = not (options.backend or options.architecture)
    try:
        architectures = options.architecture or (*gpu_compile.NVIDIA, *gpu_compile.AMD)
        backends = [options.backend] if options.backend else list(BACKENDS)
        work = gpu_compile.jobs(backends, architectures)
        binaries = gpu_compile.compile_all(work, lambda line: print(line, flush=True))
        measured = rows(binaries)
    except CannotProve as error:
        print(f"error: cannot prove anything: {error}", file=sys.stderr)
        return 1
    wrong = faults(binaries, measured)
    page = gpu_static_page.markdown(binaries, measured, wrong)
    if whole:
        DOCS.with_suffix(".md").write_text(page)
        DOCS.with_suffix(".png").write_bytes(gpu_static_figure.draw(measured))
        print(f"wrote {DOCS.relative_to(Path.cwd()) if DOCS.is_relative_to(Path.cwd()) else DOCS}.md and .png")
    else:
        print(page)
    for fault in wrong:
        print(f"FAULT: {fault}", file=sys.stderr)
    print(f"{len(binaries)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
