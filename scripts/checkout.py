"""Import this checkout as the package `fatezero`, whatever its folder's name, without installing it."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKED = ROOT / ".wheels" / "packages.tar.xz"
"""The result of `make gpu-wheels`."""


def use_checkout() -> None:
    """Make `import fatezero` find this checkout, not an installed version."""
    spec = importlib.util.spec_from_file_location(
        "fatezero", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fatezero"] = module
    spec.loader.exec_module(module)


def use_packages(folder: str) -> None:
    """Unpack the packages of `make gpu-wheels` into a folder, and import missing packages from there."""
    if PACKED.is_file():
        with tarfile.open(PACKED) as packed:
            packed.extractall(folder, filter="data")
        sys.path.append(folder)
