"""`fatezero demo`: three edits of the bundled clip with the bundled model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ...diffusion.invert import InversionSettings
from ...settings import setting, setting_like
from ..config.values import config_as
from ..options import Device, given_of, options_of
from ..outputs import check_folder
from ..progress import console, progress_bar
from ..session import pick_device


@dataclass(frozen=True)
class DemoConfig:
    """Settings of `fatezero demo`."""

    output: str = setting("out", "Folder for the results.")
    steps: int = setting_like(InversionSettings, "steps", 50, help="DDIM steps.", group="")


DemoOptions = options_of(DemoConfig)


def command(
    *,
    options: Annotated[DemoOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
) -> None:
    """Run an attribute, a shape and a style edit on the bundled clip with the bundled model."""
    config = config_as(DemoConfig, given_of(options))
    check_folder(config.output)
    from ...demo.show import show

    show(Path(config.output), config.steps, pick_device(device), console, progress_bar)
