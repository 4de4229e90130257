"""The build backend of `pip install .`: setuptools, with the torch that is installed where the package goes.

pip builds in an environment of its own, from which what is installed elsewhere cannot be seen. A torch fetched there
would be a second one, of gigabytes, maybe without CUDA or with another. So where torch is installed beside this
interpreter, or in the virtual environment that is active, its folder is put behind the build environment's; only where
there is none is one asked for.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import build_sdist as build_sdist
from setuptools.build_meta import get_requires_for_build_sdist as get_requires_for_build_sdist

Settings = Mapping[str, Any] | None
_TORCH = "torch>=2.10"


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what the build environment needs besides setuptools: ninja, and torch where there is none to be used."""
    return ["ninja"] if installed() else ["ninja", _TORCH]


get_requires_for_build_editable = get_requires_for_build_wheel


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings = None) -> str:
    """As setuptools', with that torch."""
    use()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


prepare_metadata_for_build_editable = prepare_metadata_for_build_wheel


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """As setuptools', with that torch."""
    use()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    """As setuptools', with that torch."""
    use()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


def installed() -> str | None:
    """Return the folder in which the torch lies that is to be used, or None."""
    for base in (None, os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX")):
        variables = {} if base is None else {"base": base, "platbase": base}
        for kind in ("purelib", "platlib"):
            folder = sysconfig.get_path(kind, vars=variables)
            if any(_is_torch(path) for path in Path(folder).glob("torch-*.dist-info")):
                return folder
    return None


def _is_torch(path: Path) -> bool:
    """Say whether a folder of metadata is that of a torch that will do."""
    version = PathDistribution(path).version.split(".")
    return tuple(int(part) for part in version[:2]) >= (2, 10)


def use() -> None:
    """Make the torch that is installed importable, behind all that the build environment has."""
    folder = installed()
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)
