"""Download what `make gpu` needs besides PyTorch, transformers, accelerate and einops: `make gpu-wheels`.

The packages are pure Python. They are packed into one file in `.wheels/`, a third of the wheels' size, which `gpu.py`
unpacks.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from checkout import PACKED

PACKAGES = ("diffusers", "importlib-metadata")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheels, site = Path(folder) / "wheels", Path(folder) / "site"
        options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--python-version", "312")
        platform = ("--platform", "manylinux_2_28_x86_64")
        command = [sys.executable, "-m", "pip", "download", *options, *platform, "--dest", str(wheels), *PACKAGES]
        subprocess.run(command, check=True)
        for wheel in sorted(wheels.glob("*.whl")):
            print(wheel.name)
            with zipfile.ZipFile(wheel) as packed:
                packed.extractall(site)
        PACKED.parent.mkdir(exist_ok=True)
        part = PACKED.with_suffix(".part")
        with tarfile.open(part, "w:xz") as packed:
            packed.add(site, arcname=".")
        part.replace(PACKED)
    print(f"{PACKED}: {PACKED.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
