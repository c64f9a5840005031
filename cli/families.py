"""What a model's family supports, checked before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..attention.prompt import MIXED
from ..diffusion.parts import check_needs_unet
from ..video.read import open_video
from ..video.size import check_crop
from .config.paths import files_of
from .config.settings import AUTO, ConfigError, EditConfig, GenerateConfig, of_setting

if TYPE_CHECKING:
    from ..hosts.diffusers.model import Model
    from ..models.family import Family

WORKS = "use --preset flow_edit, flow_mask or wan_edit, with --edit-mask for what may change"


def family_loader(name: str) -> type[Model]:
    """The loader of a model's family. Raises CheckpointError for a name that is not a model."""
    from ..hosts.diffusers.checkpoint import quiet
    from ..hosts.diffusers.load import loader_of

    with quiet():
        return loader_of(name)


def check_edits(configs: Sequence[EditConfig], stored: bool = False) -> None:
    """Raise ConfigError for edits that the family of their model does not support. stored: they edit a store."""
    loader = family_loader(configs[0].model)
    _check_control(configs[0], loader)
    for config in configs:
        _check_pictures(config, loader, stored)
    for config in configs:
        _check_parts(config, loader.family)
    if stored:
        _check_has_frames(loader, "store")
    elif configs[0].noise == "inverted":
        _check_memory(configs[0], loader)


def _check_parts(config: EditConfig, family: Family) -> None:
    """Raise ConfigError or ValueError for parts of an edit that a family does not support."""
    recipe = config.planned_recipe()
    if not family.words:
        recipe.refuse_words()
    if not family.attention and recipe.injection is not None and recipe.injection.needs_attention:
        raise ConfigError(
            f"injection {config.injection} needs control of the attention, which works with {_controlled()}, not with "
            f"{family.title}: {WORKS}"
        )
    if family.spans_clip:
        _check_no_layout(config)
    if config.source != AUTO and not config.places_objects:
        recipe.check(family.spans_clip, config.prompt_edit(None))


def _controlled() -> str:
    """The families whose attention can be controlled."""
    from ..hosts.diffusers.load import FAMILIES

    return ", ".join(one.family.title for one in FAMILIES if one.family.attention)


def check_inversion(config: EditConfig) -> None:
    """Raise ConfigError for an inversion into a file that the family of its model does not support."""
    loader = family_loader(config.model)
    _check_control(config, loader)
    _check_has_frames(loader, "invert")
    _check_memory(config, loader)


def check_generation(config: GenerateConfig, maps: bool) -> None:
    """Raise ConfigError for a new clip that the family of its model does not support."""
    loader = family_loader(config.model)
    _check_has_frames(loader, "generate")
    if not loader.family.attention:
        _check_no_layout(config)
        if maps:
            raise ConfigError(f"maps need control of the attention, which {loader.family.title} does not have here")
    if maps and not loader.family.words:
        raise ConfigError(f"maps: {MIXED}")


def check_guidance(model: Model, config: EditConfig | GenerateConfig) -> None:
    """Raise ConfigError for a negative prompt that a loaded model does not take."""
    if model.denoiser.embeds_guidance and config.negative:
        raise ConfigError(
            f"negative has no effect on {config.model}: guidance is an input of its transformer (distilled), with one "
            "call a step"
        )


def _check_control(config: EditConfig, loader: type[Model]) -> None:
    family = loader.family
    if config.controlnet and family.formulation == "flow":
        hint = "; give control alone" if loader.takes_control else ""
        raise ConfigError(f"controlnet: needs a UNet, but {config.model} is a {family.title} {family.network}{hint}")
    if config.control and not config.controlnet and not loader.takes_control:
        raise ConfigError(
            f"control has no effect here: no controlnet is given, which {family.title} needs to follow it"
        )
    if config.control:
        chosen = config.chosen_control
        loader.check_control(chosen.controlnet_strength, chosen.control_start, chosen.control_end, config.memory)


def _check_pictures(config: EditConfig, loader: type[Model], stored: bool) -> None:
    """Raise ConfigError for a first frame and guide frames that the family does not take."""
    given = {"first_frame": loader.takes_first_frame, "guide_frame": loader.takes_guide_frames}
    for name in (name for name in given if getattr(config, name)):
        if not given[name]:
            those = "LTX-2" if name == "guide_frame" else "image-to-video models and LTX-2"
            raise ConfigError(f"{name} has no effect on {loader.family.title}: it is for {those}")
        if stored:
            raise ConfigError(f"{name} cannot be used with store: the inversion needs the clip's frame too")
    if config.guide_frame and config.memory == "maps":
        raise ConfigError("memory: maps cannot include the tokens of guide frames: use recompute")
    for what, file in files_of(config).items():
        name = what.partition(" ")[0]
        if name in given:
            with of_setting(name):
                picture = open_video(file, at_most=2)
                check_crop(*picture.size, *config.crop)
                if any(config.crop) and picture.size != (size := open_video(config.video, at_most=1).size):
                    raise ValueError(
                        f"{file} is {picture.size[0]}x{picture.size[1]} and the clip {size[0]}x{size[1]}, so that crop "
                        "would show other parts of them: give a picture of the clip's size"
                    )
                if name == "guide_frame" and len(picture) > 1:
                    raise ValueError(f"{file} has several frames: give a picture")


def _check_no_layout(config: EditConfig | GenerateConfig) -> None:
    if config.places_objects:
        check_needs_unet("A layout", spans_clip=True)


def _check_memory(config: EditConfig, loader: type[Model]) -> None:
    if not loader.family.attention and config.memory not in ("auto", "recompute"):
        raise ConfigError(
            f"memory {config.memory} keeps attention, which {loader.family.title} does not have here: use recompute"
        )


def _check_has_frames(loader: type[Model], what: str) -> None:
    if loader.needs_frames:
        raise ConfigError(
            f"{what}: {loader.family.title} needs a clip for its first frame: use `fatezero edit` on a video"
        )
