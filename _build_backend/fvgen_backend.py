"""PEP 517 backend: setuptools, with the PyTorch of the environment that is being installed into.

An isolated build does not see that PyTorch, and would compile the CUDA extension against a freshly downloaded one. Only where an
extension could be built and no PyTorch is there, one becomes a build requirement.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

_TORCH = "torch==2.13.0"


def _outer_torch() -> str | None:
    for name in ("platlib", "purelib"):
        folder = sysconfig.get_path(name)
        if (Path(folder) / "torch" / "include" / "torch").is_dir():
            return folder
    return None


def _use_outer_torch() -> None:
    folder = _outer_torch()
    if folder is not None and folder not in sys.path:
        sys.path.append(folder)


def _with_torch(requirements: list[str]) -> list[str]:
    wanted = os.environ.get("FVGEN_BUILD_CUDA", "auto") != "0"
    nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME")
    return [*requirements, _TORCH] if wanted and nvcc and _outer_torch() is None else requirements


def get_requires_for_build_wheel(config_settings=None):
    _use_outer_torch()
    return _with_torch(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    _use_outer_torch()
    return _with_torch(_setuptools.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _use_outer_torch()
    return _setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _use_outer_torch()
    return _setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _use_outer_torch()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _use_outer_torch()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)
