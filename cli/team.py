"""Several processes of `accelerate launch` that edit one clip together."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from .config.settings import EditConfig
from .progress import no_bars
from .session import Session, pick_device

if TYPE_CHECKING:
    from ..hosts.diffusers.processes import Processes


def team_of(session: Session) -> tuple[Session, Processes | None]:
    """The session of this process, and the processes of `accelerate launch` that edit one clip together; None for a
    single process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return session, None
    from accelerate import Accelerator  # seconds to import

    from ..hosts.diffusers.processes import Processes

    team = Processes(Accelerator(cpu=pick_device(session.device).type == "cpu"))
    session.console.quiet = session.console.quiet or not team.is_main
    return replace(session, device=str(team.device), bars=session.bars if team.is_main else no_bars), team


def in_team(config: EditConfig) -> EditConfig:
    """A configuration for several processes, with no attention kept in one of them.

    ValueError where the whole clip must run in one.
    """
    if config.memory not in ("auto", "recompute"):
        raise ValueError(f"memory {config.memory} needs one process: with several, set memory to recompute")
    if config.propagation != "none" or config.places_objects:
        raise ValueError("TokenFlow and layouts run in one process: accelerate spreads chunks of other edits")
    given = config.chunk_frames is not None or config.window_frames is not None
    if not given and (config.clip_norm or not config.keys.anchored):
        raise ValueError(
            "several processes need windows, which only approximate the whole clip with neighbours as key frames or "
            "clip norm: give --window-frames, or key frames among self, first, middle and last"
        )
    return replace(config, memory="recompute")
