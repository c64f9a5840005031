"""Check given settings: their types, ranges and requirements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ...diffusion.invert import recomputed
from ...diffusion.parts import first_step
from ...files.lora import LoraFile
from ...methods.layout_guidance import LayoutSettings
from ...methods.tune_a_video import LayerSettings
from ...settings import NamedSetting, Setting, settings_of, shown
from ...video.which import colour_of, seconds_of
from .effects import NOTHING_PLACED, check_masking
from .fitting import FILE_NAMES, fitting, section_of
from .settings import (
    FILES_OF_OBJECTS,
    SECTIONS,
    ConfigError,
    EditConfig,
    GenerateConfig,
    TuneConfig,
)

T = TypeVar("T")
_VIDEO = {"video": NamedSetting("video", str, "", Setting("Video, picture, or pictures."))}
_OF_EDITS = _VIDEO | {one.name: one for one in settings_of(EditConfig)}
_OF_CLIPS = {one.name: one for one in settings_of(GenerateConfig)}
_OF_TUNINGS = _VIDEO | {one.name: one for one in settings_of(TuneConfig)}


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by setting name, with lists as tuples. Raises ConfigError, naming the setting."""
    of_sections = {name: section_of(name, values[name], kind) for name, kind in SECTIONS.items() if name in values}
    values = {name: value for name, value in values.items() if name not in SECTIONS}
    return _checked(values, _OF_EDITS) | of_sections


def config_as(settings: type[T], values: Mapping[str, Any]) -> T:
    """Settings of a dataclass, with defaults. Raises ConfigError, naming the setting."""
    return settings(**_checked(values, {one.name: one for one in settings_of(settings)}))


def tuning_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a tuning by setting name. Raises ConfigError, naming the setting."""
    return _checked(values, _OF_TUNINGS)


def tune_config(values: Mapping[str, Any]) -> TuneConfig:
    """A tuning from its given settings. Raises ConfigError for wrong or missing settings."""
    config = TuneConfig(**tuning_values(values))
    for name, flag in (("video", "VIDEO"), ("prompt", "--prompt")):
        if not getattr(config, name):
            raise ConfigError(f"missing {flag}")
    if config.temporal and config.fresh != LayerSettings():
        raise ConfigError("layers and rank have no effect on temporal layers from a file")
    if config.rank is not None and config.layers != "fatezero":
        raise ConfigError("rank has no effect without --layers fatezero")
    if config.train_convolutions and not config.temporal and config.layers != "fatezero":
        raise ConfigError("train_convolutions has no effect without --layers fatezero")
    if not config.class_pictures and (config.class_prompt or config.class_batch):
        raise ConfigError("class_prompt and class_batch have no effect without --class-pictures")
    if config.validate and not config.validate_every:
        raise ConfigError("missing --validate-every: after how many steps to sample clips of --validate")
    if config.validate_every and not config.validate:
        raise ConfigError("missing --validate: the prompt of a validation clip")
    return config


def generate_config(values: Mapping[str, Any]) -> GenerateConfig:
    """A clip to generate from its given settings. Raises ConfigError for wrong or missing settings."""
    layout = LayoutSettings(**section_of("layout", values.get("layout", {}), LayoutSettings))
    found = _checked({name: value for name, value in values.items() if name != "layout"}, _OF_CLIPS)
    config = GenerateConfig(**found, layout=layout)
    if not config.prompt:
        raise ConfigError("missing --prompt")
    if values.get("layout") and not config.places_objects:
        raise ConfigError(f"layout has no effect here: {NOTHING_PLACED}")
    return config


def _checked(values: Mapping[str, Any], known: Mapping[str, NamedSetting]) -> dict[str, Any]:
    found = {name: _at_home(name, value) for name, value in fitting(values, known).items()}
    for name in ("start", "end"):
        if isinstance(found.get(name), str):
            try:
                seconds_of(found[name])
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
    if found.get("size") is not None and min(found["size"]) < 1:
        raise ConfigError(f"size is {'x'.join(map(str, found['size']))}; both sides must be at least 1")
    if isinstance(found.get("background"), str):
        try:
            colour_of(found["background"])
        except ValueError as error:
            raise ConfigError(f"background: {error}") from error
    for name, value in found.items():
        needed = name in ("video", "source", "target", "prompt", "model")
        if isinstance(value, str) and (needed or (value and name in FILE_NAMES)) and not value.strip():
            raise ConfigError(f"{name} is {shown(values[name])}; it must not be blank")
    if "lora" in found:
        found["lora"] = tuple(text for text in found["lora"] if text.strip())
        for text in found["lora"]:
            try:
                LoraFile.parse(text)
            except ValueError as error:
                raise ConfigError(str(error)) from error
    return found


def _at_home(name: str, value: Any) -> Any:
    """A value with ~ expanded in the names of its files."""
    if name in FILES_OF_OBJECTS and isinstance(value, tuple):
        parts = (text.partition(":") for text in value)
        return tuple(f"{words}{mark}{_indented(file)}" for words, mark, file in parts)
    if name == "lora" and isinstance(value, tuple):
        return tuple(from_home(text) for text in value)
    return from_home(value) if name in FILE_NAMES and isinstance(value, str) else value


def _indented(file: str) -> str:
    """A file's name with ~ expanded after leading blanks."""
    name = file.lstrip()
    return file[: len(file) - len(name)] + from_home(name)


def from_home(file: str) -> str:
    """A file's name with ~ expanded."""
    try:
        return str(Path(file).expanduser()) if file.startswith("~") and not Path(file).exists() else file
    except RuntimeError:  # there is no such user
        return file


def with_values(config: EditConfig, values: Mapping[str, Any]) -> EditConfig:
    """A configuration with checked values set; sections are merged."""
    sections = {name: replace(getattr(config, name), **values[name]) for name in SECTIONS if name in values}
    return replace(config, **{**values, **sections})


def completed(config: EditConfig, inverting: bool = False, stored: bool = False) -> EditConfig:
    """A configuration checked for missing settings and ranges. Raises ValueError, naming the setting.

    inverting: for an inversion without an edit. stored: with a store, which has a clip and a source prompt.
    """
    config = replace(config, target=config.target or config.source) if config.places_objects else config
    config.chosen_control  # noqa: B018  raises for settings out of range
    needed = ("video", "source") if inverting or config.injection == "fatezero" else ("video",)
    missing = [] if stored else [name for name in needed if not getattr(config, name)]
    missing += [] if inverting or config.target else ["target"]
    missing += ["control"] if config.controlnet and not config.control else []
    if missing:
        raise ConfigError(f"missing {', '.join(_FLAGS[name] for name in missing)}")
    config.fusion, config.keys, config.store  # noqa: B018  raise for settings that do not go together
    for name in ("inversion_steps", "reuse_midpoint"):
        if getattr(config, name) and not stored:
            recomputed(config.store, name)
    check_masking(config)
    if not inverting and not stored:  # whose number of steps is its own
        try:
            first = first_step(config.strength, config.steps)
            config.recipe().start.check_steps(config.steps - first)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return config


_FLAGS = {"video": "VIDEO", "source": "--source", "target": "--target", "control": "--control"}
