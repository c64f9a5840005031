"""This checkout as the package `fatezero`, whatever its folder is called, with nothing installed."""

from __future__ import annotations

import importlib.util
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKED = ROOT / ".wheels" / "packages.tar.xz"
"""What `make gpu-wheels` brings."""


def use_checkout() -> None:
    """Have `import fatezero` find this checkout, before one that is installed."""
    spec = importlib.util.spec_from_file_location(
        "fatezero", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fatezero"] = module
    spec.loader.exec_module(module)


def use_packages(folder: str) -> None:
    """Unpack the packages of `make gpu-wheels` into a folder, and import from there what is not installed."""
    if PACKED.is_file():
        with tarfile.open(PACKED) as packed:
            packed.extractall(folder, filter="data")
        sys.path.append(folder)
