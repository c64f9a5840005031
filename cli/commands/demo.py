"""`fatezero demo`: three edits of the bundled clip with the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ..options import Device, whole
from ..progress import console, progress_bar


def command(
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Folder for the results.")] = Path("out"),
    steps: Annotated[int, Parameter(converter=whole, help="DDIM steps.")] = 50,
    device: Device = "auto",
) -> None:
    """Run an attribute, a shape and a style edit on the bundled clip with the bundled model."""
    from ...demo.show import show
    from ..session import pick_device

    show(output, steps, pick_device(device), console, progress_bar)
