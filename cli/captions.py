"""Source prompts from a captioning model, for `--source auto`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ..video.read import VideoSource
from .config.record import record_path
from .config.settings import AUTO, CAPTIONER, ConfigError, EditConfig, of_setting
from .session import Session, pick_device

if TYPE_CHECKING:
    from torch import Tensor


def check_captioner(configs: Sequence[EditConfig]) -> None:
    """Raise ConfigError, before a model is loaded, where source auto has no captioning model: none is downloaded that
    is not named.
    """
    for config in configs:
        if config.source == AUTO:
            with of_setting("caption_model"):
                _check_model(config.caption_model)


def _check_model(name: str) -> None:
    from ..hosts.diffusers.model_files import check_hub_name, in_cache

    if not name and not in_cache(CAPTIONER):
        raise ConfigError(
            f"source auto needs a captioning model: give --caption-model {CAPTIONER} to download it, or a folder"
        )
    if name and not Path(name).is_dir():
        check_hub_name(name)


def captioned(session: Session, configs: Sequence[EditConfig], video: VideoSource | None) -> list[EditConfig]:
    """Configurations with a caption of the clip's middle frame in place of a source prompt auto.

    Raises ConfigError for a model that cannot be loaded or writes nothing, and without a video.
    """
    given = next((config.caption_model for config in configs if config.source == AUTO), None)
    if given is None:
        return list(configs)
    if video is None:
        raise ConfigError("source auto needs the video: this store has no source prompt; give --source")
    session.say(f"captioning the clip's middle frame with {given or CAPTIONER}")
    frame = next(islice(video.frames(), (len(video) - 1) // 2, None))
    text = _caption(session, given, frame)
    session.say(f"source prompt: {text}")
    return with_captions(configs, [replace(config, source=text) for config in configs])


def with_captions(given: Sequence[EditConfig], configs: Sequence[EditConfig]) -> list[EditConfig]:
    """Configurations with the source prompts of others in place of auto, and the name of the model that wrote them."""
    return [
        replace(one, source=other.source, caption_model=_name(one.caption_model)) if one.source == AUTO else one
        for one, other in zip(given, configs, strict=True)
    ]


def _name(model: str) -> str:
    """The name of a model in a record; of a folder without those above it."""
    return Path(model).name if Path(model).is_dir() and model else model or CAPTIONER


def _caption(session: Session, model: str, frame: Tensor) -> str:
    from ..hosts.diffusers.caption import caption
    from ..hosts.diffusers.checkpoint import quiet
    from ..hosts.diffusers.model_files import as_checkpoint_error, from_hub

    name = model or CAPTIONER
    write = partial(caption, frame=frame, device=pick_device(session.device))
    with quiet(), of_setting("caption_model"), as_checkpoint_error(name):
        here = not model or Path(name).is_dir()
        text = write(name, local_files_only=True) if here else from_hub(name, write)
    if not text:
        raise ConfigError(f"caption_model: {name} writes nothing for this picture: give --source")
    return text


def recorded_source(config: EditConfig, output: Path) -> EditConfig:
    """The configuration of a result, with the source prompt of its record in place of auto."""
    if config.source != AUTO:
        return config
    return replace(config, source=json.loads(record_path(output).read_text(encoding="utf-8"))["source"])
