"""Settings of an edit: presets, YAML files, and the authors' configuration files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from ...attention.key_frames import KeyFrames
from ...attention.masks import GivenMask, MaskMode
from ...attention.prompt import Mode, PromptEdit
from ...diffusion.invert import InversionSettings
from ...diffusion.parts import Edit
from ...files.lora import Timesteps
from ...imports import torch
from ...methods.fatezero import GROUP as FATEZERO
from ...methods.fatezero import FusionSettings
from ...methods.flow_smoothing import GROUP as FLOW
from ...methods.flow_smoothing import FlowSmoothing
from ...methods.layout_guidance import GROUP as LAYOUT
from ...methods.layout_guidance import LayoutSettings
from ...methods.move_objects import MoveSettings
from ...methods.tune_a_video import GROUP as TUNING
from ...methods.tune_a_video import TRAINED_KEYS, VALIDATION, LayerSettings, TuneSettings, ValidationSettings
from ...recipes.presets import PRESETS, methods_of, preset_values
from ...recipes.recipe import Recipe
from ...settings import check, setting, setting_like, setting_of, settings_of
from ...store.budget import StoreSettings
from ...video.flow import FlowName
from ...video.which import ClipSettings

T = TypeVar("T")
INJECTIONS, PROPAGATIONS, STARTS = (methods_of(part) for part in ("injection", "propagation", "start"))
if TYPE_CHECKING:
    InjectionName: TypeAlias = str
    PropagationName: TypeAlias = str
else:
    InjectionName = Literal[(*(method.name for method in INJECTIONS), "none")]
    PropagationName = Literal[("none", *(method.name for method in PROPAGATIONS))]
NoiseName = Literal["inverted", "drawn"]
KeepName = Literal["auto", "pixels", "latents"]
RegionName = Literal["none", "auto"]
SECTIONS: dict[str, Any] = {
    method.name: method.settings for method in (*INJECTIONS, *PROPAGATIONS, *STARTS) if method.name != "fatezero"
} | {"layout": MoveSettings}
"""The sections of an edit's configuration, and the settings in them. FateZero's settings stand outside of sections."""


class ConfigError(ValueError):
    """A setting is unknown, of the wrong kind, or missing."""


@contextmanager
def of_setting(name: str) -> Iterator[None]:
    """Raise errors of a file as a ConfigError that names its setting."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


AUTO, CAPTIONER = "auto", "Salesforce/blip-image-captioning-base"
"""The source prompt that a captioning model writes, and the model where none is named."""
_TEXT, _MODEL, _EDIT, _MASK = "What to edit", "Model", "The edit", FATEZERO
_CLIP, _DRAWN = "The clip", "The edit"


@dataclass(frozen=True)
class ObjectSettings:
    """The target positions of objects, a text for each."""

    box: tuple[str, ...] = setting(
        (), 'Target boxes of words: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3", at frames the centre and size (or width '
        "and height) as shares of the picture. Repeatable.", group=LAYOUT,
    )  # fmt: skip
    ellipse: tuple[str, ...] = setting((), "The same for ellipses.", group=LAYOUT)
    mask: tuple[str, ...] = setting((), 'The same from a video or pictures: "burger: mask.mp4".', group=LAYOUT)

    @property
    def places_objects(self) -> bool:
        """Whether objects are given."""
        return any(getattr(self, name, ()) for name in OBJECTS)


OBJECTS = ("box", "ellipse", "mask", "shift", "swap")
"""The settings of an object and its target position."""
REPEATED = (*OBJECTS, "object_mask", "guide_frame", "lora", "validate")
"""Repeatable settings."""


@dataclass(frozen=True)
class ModelSettings:
    """The model, and the changes of its weights."""

    model: str = setting(
        "demo", "Diffusers folder, .safetensors checkpoint or hub name.", shown="the bundled demo", group=_MODEL
    )
    lora: tuple[str, ...] = setting(
        (), "LoRA file or folder, or FILE=0.8 for its strength. Repeatable.", shown="none", group=_MODEL
    )
    variant: str = setting("", "Variant of the weights in a diffusers folder, as fp16.", shown="none", group=_MODEL)
    attention: str = setting(
        "auto",
        "Attention kernel: auto and sdpa are PyTorch's, xformers needs that package; a transformer takes the "
        "names of diffusers' backends, such as flash and sage. Last digits differ.",
        group=_MODEL,
    )
    timesteps: Timesteps = setting(
        "auto",
        "Timesteps of a UNet's schedule. auto: those of a LoRA for few steps, by its name (LCM and TCD lcm, Lightning "
        "and Hyper trailing), else the model's.",
        group=_MODEL,
    )
    temporal: str = setting(
        "",
        "Temporal layers for the model, Tune-A-Video's or FateZero's: a .safetensors file, the folder of "
        "`fatezero tune`, or demo, which make the demo model one of videos.",
        shown="none",
        group=_MODEL,
    )

    @property
    def chosen_model(self) -> ModelSettings:
        """These settings without the others of a configuration."""
        return _part(self, ModelSettings)


@dataclass(frozen=True)
class ControlSettings:
    """A ControlNet and its pictures."""

    controlnet: str = setting("", "ControlNet: diffusers folder, .safetensors or hub name.", shown="none", group=_MODEL)
    control: str = setting(
        "", "Video or pictures for ControlNet, VACE or IC-LoRA. They are cut like the clip.",
        shown="none", group=_MODEL,
    )  # fmt: skip
    controlnet_strength: float = setting(
        1.0,
        "Strength of the ControlNet, a factor on its output; of LTX-2's control video, at most 1: how clean it is.",
        least=0,
        most=10,
        group=_MODEL,
    )
    control_start: float = setting(
        0.0, "Start of the ControlNet's range, as a share of the way from noise to clip.", least=0, most=1, group=_MODEL
    )
    control_end: float = setting(1.0, "End of the ControlNet's range.", least=0, most=1, group=_MODEL)

    @property
    def chosen_control(self) -> ControlSettings:
        """These settings without the others of a configuration. Raises ConfigError for an empty range."""
        found = _part(self, ControlSettings)
        check(found)
        if found.control_start >= found.control_end:
            raise ConfigError(
                f"control_start is {found.control_start}; it must be below control_end, {found.control_end}"
            )
        return found


@dataclass(frozen=True)
class EditSettings(
    ClipSettings, InversionSettings, StoreSettings, FusionSettings, ObjectSettings, ControlSettings, ModelSettings
):
    """The settings of `fatezero edit` outside of sections; the names are those of the flags and of the YAML keys."""

    video: str = ""
    source: str = setting(
        "", "Prompt that describes the video. auto: a caption of its middle frame, by caption_model.", group=_TEXT
    )
    caption_model: str = setting(
        "",
        "Captioning model of transformers for source auto, such as BLIP: a folder, or a hub name, which may be "
        "downloaded.",
        shown=f"{CAPTIONER}, if it is on this machine",
        group=_TEXT,
    )
    target: str = setting(
        "", "Prompt that describes the edit. Several edits run in one pass over the inversion.", group=_TEXT
    )
    negative: str = setting("", "Negative prompt.", shown="none", group=_TEXT)
    chunk_frames: int | None = setting_like(
        InversionSettings, "chunk_frames", None, shown="16 where results do not depend on it, else window_frames"
    )
    guidance_scale: float = setting_like(Edit, "guidance_scale", 7.5)
    guidance_until: float = setting_like(Edit, "guidance_until", 1.0)
    strength: float = setting_like(Edit, "strength", 1.0)
    sdedit_seed: int | None = setting_like(Edit, "sdedit_seed", None)
    noise: NoiseName = setting(
        "inverted",
        "The noise that the edit starts from. inverted: the clip's inverted noise. drawn: sampled noise, and the edit "
        "follows the difference of both prompts' predictions (FlowEdit), without an inversion.",
        group=_EDIT,
    )
    injection: InjectionName = setting(
        "fatezero",
        "What the edit takes from the source. "
        + " ".join(f"{method.name}: {method.sentence}" for method in INJECTIONS)
        + " none: only the noise.",
        group=_EDIT,
    )
    propagation: PropagationName = setting(
        "none",
        "Propagation from key frames to all frames. "
        + " ".join(f"{method.name}: {method.sentence}" for method in PROPAGATIONS),
        group=_EDIT,
    )
    edit_mask: str = setting(
        "",
        "Video or pictures, white where the edit may change the clip; one picture covers all frames. Cropped and "
        "scaled like the clip.",
        shown="none",
        group=_EDIT,
    )
    mask_mode: MaskMode = setting(
        "replace",
        "Whether edit_mask replaces FateZero's blend mask, or joins it by union or intersection.",
        group=_EDIT,
    )
    keep: KeepName = setting(
        "auto",
        "What stays outside the mask of an edit. pixels: the video's own, at its full size, depth and shape; the edit "
        "is scaled onto it. latents: its latents, decoded at the model's size. auto: pixels, where a mask limits the "
        "edit and the video is given.",
        group=_EDIT,
    )
    region: RegionName = setting(
        "none",
        "auto: edit a window that follows edit_mask smoothly, enlarged to the model's size, and lay it over the whole "
        "frames. Small objects get the model's whole resolution. Without edit_mask, it is around the places where the "
        "predictions for both prompts disagree, which takes up to 16 more model calls.",
        group=_EDIT,
    )
    lossless: bool = setting(
        False, "Write videos without loss: FFV1 in .mkv, else the lossless mode of its encoder.", group=_TEXT
    )
    first_frame: str = setting(
        "", "Picture of the edit's first frame, for image-to-video models and LTX-2. Cropped and scaled like the clip.",
        shown="the clip's", group=_EDIT,
    )  # fmt: skip
    guide_frame: tuple[str, ...] = setting(
        (), 'Picture of another frame of the edit, for LTX-2: "24: edited.png", counted from 0 at --start, or '
        '"last: end.png". Repeatable.', shown="none", group=_EDIT,
    )  # fmt: skip
    smoothing: float = setting_like(FlowSmoothing, "amount", 0.0)
    flow: FlowName = setting(
        "auto", "Estimator of motion: raft (torchvision) or dis (OpenCV); auto uses raft if its weights are installed.",
        group=FLOW,
    )  # fmt: skip
    mode: Mode = setting_like(PromptEdit, "mode", "refine")
    blend_source: tuple[str, ...] = setting(
        (), "Words of the source for the blend mask, separated by commas.", shown="the changed words", group=_MASK
    )
    blend_target: tuple[str, ...] = setting(
        (), "Words of the target for the mask of blend_latents, separated by commas; none: the source's mask alone.",
        shown="the changed words", group=_MASK,
    )  # fmt: skip
    reweight: Mapping[str, float] = setting(dict, setting_of(PromptEdit, "reweight").meta.help, group=_MASK)
    cross_replace_steps: float = setting_like(FusionSettings, "cross_replace_steps", 0.7)
    shift: tuple[str, ...] = setting(
        (), 'Shifts of words: "jeep: 0:0.2,0; 7:0.3,-0.1,1.5", at frames the way right and down as shares of the '
        "picture, and the growth. Repeatable.", group=LAYOUT,
    )  # fmt: skip
    object_mask: tuple[str, ...] = setting(
        (), 'Source positions of words, a video or pictures: "jeep: mask.mp4". Default: from their attention.',
        group=LAYOUT,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Builds its parts, which check themselves."""

    def part(self, settings: type[T]) -> T:
        """The settings of one of its parts."""
        return _part(self, settings)

    @property
    def masked(self) -> bool:
        """Whether a mask from a file replaces the edit's blend mask."""
        return bool(self.edit_mask) and self.mask_mode == "replace"

    @property
    def fusion(self) -> FusionSettings:
        return self.part(FusionSettings)

    def recipe(self, **more: Any) -> Recipe:
        """The recipe of the edit. more: fields of the recipe."""
        of_clip: dict[str, Any] = {"layout": None, "mask": None, **more}  # settings of these names are texts
        return Recipe.of({one.name: getattr(self, one.name) for one in fields(self)}, **of_clip)

    @property
    def store(self) -> StoreSettings:
        return self.part(StoreSettings)

    @property
    def keys(self) -> KeyFrames:
        return self.part(InversionSettings).keys

    def planned_recipe(self, **more: Any) -> Recipe:
        """The recipe before the files of its edit mask are read: a mask of ones stands for them."""
        mask = GivenMask(torch.ones(1, 1, 1), self.mask_mode) if self.edit_mask else None
        return self.recipe(mask=mask, **more)

    def prompt_edit(self, tokenizer: Any) -> PromptEdit | None:
        """The prompt pair; see `Recipe.pair`."""
        return self.recipe().pair(tokenizer, in_area=self.places_objects or self.masked)


if TYPE_CHECKING:

    class EditConfig(EditSettings):
        """Every setting of `fatezero edit`, each method's besides FateZero's in a section of its own."""

        layout: MoveSettings

        def __getattr__(self, name: str) -> Any: ...

else:
    EditConfig = make_dataclass(
        "EditConfig",
        [(name, settings, field(default=settings())) for name, settings in SECTIONS.items()],
        bases=(EditSettings,),
        frozen=True,
        namespace={"__module__": __name__, "__doc__": "Every setting of `fatezero edit`, with its sections."},
    )


def _part(config: Any, settings: type[T]) -> T:
    return settings(**{one.name: getattr(config, one.name) for one in settings_of(settings)})


@dataclass(frozen=True)
class TuneConfig(ClipSettings, LayerSettings, TuneSettings, ValidationSettings, ModelSettings):
    """Every setting of `fatezero tune`; the names are those of the flags."""

    video: str = ""
    prompt: str = setting("", "Prompt that describes the video.", group=_TEXT)
    temporal: str = setting(
        "", "Temporal layers to start from, as in `fatezero edit`.", shown="new layers", group=_MODEL
    )
    count: int | None = setting_like(ClipSettings, "count", None, shown="at most 24; with --end all")
    key_frames: tuple[str | int, ...] = setting_like(InversionSettings, "key_frames", TRAINED_KEYS)
    key_frames_least_channels: int = setting_like(InversionSettings, "key_frames_least_channels", 0)
    clip_norm: bool = setting_like(InversionSettings, "clip_norm", True)
    class_pictures: str = setting(
        "",
        "Folder, glob or video with pictures of the clip's class, against overfitting: each step on the clip comes "
        "after one on some of them, without temporal layers. Scaled and cropped to the clip's size.",
        shown="none", group=TUNING,
    )  # fmt: skip
    class_prompt: str = setting("", "Prompt of the class pictures.", shown="the clip's prompt", group=TUNING)
    validate: tuple[str, ...] = setting((), "Prompt of a validation clip. Repeatable.", shown="none", group=VALIDATION)
    validate_source: str = setting(
        "",
        "Prompt of the inversion of validation clips. Tune-A-Video's authors leave it empty; FateZero's use the "
        "clip's prompt.",
        shown="empty", group=VALIDATION,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Builds its parts, which check themselves."""

    @property
    def keys(self) -> KeyFrames:
        return KeyFrames(self.key_frames, self.key_frames_least_channels)

    @property
    def validation(self) -> ValidationSettings:
        return _part(self, ValidationSettings)

    @property
    def fresh(self) -> LayerSettings:
        return _part(self, LayerSettings)

    @property
    def tuning(self) -> TuneSettings:
        return _part(self, TuneSettings)


@dataclass(frozen=True)
class GenerateConfig(ObjectSettings, ModelSettings):
    """Every setting of `fatezero generate`; the names are those of the flags. `layout` is a section."""

    prompt: str = setting("", "Prompt that describes the clip.", group=_TEXT)
    negative: str = setting_like(EditConfig, "negative", "")
    frames: int = setting(16, "Number of frames.", least=1, most=1000, group=_CLIP)
    size: tuple[int, int] | None = setting(
        None, "WIDTHxHEIGHT of the clip.", unit="pixels", shown="the model's", group=_CLIP
    )
    fps: float = setting(8.0, "Frame rate.", least=0.1, most=1000, unit="frames a second", group=_CLIP)
    seed: int = setting(0, "Random seed for the noise.", least=0, most=2**63 - 1, group=_CLIP)
    steps: int = setting_like(InversionSettings, "steps", 50)
    guidance_scale: float = setting_like(Edit, "guidance_scale", 7.5)
    key_frames: tuple[str | int, ...] | None = setting(
        None, "Frames whose keys and values each frame attends to, as in `fatezero edit`.",
        shown="as in the model's training", group=_DRAWN,
    )  # fmt: skip
    clip_norm: bool | None = setting(
        None, "Compute the normalisation statistics of the ResNet blocks over the whole clip.",
        shown="as in the model's training", group=_DRAWN,
    )  # fmt: skip
    shift: tuple[str, ...] = setting(
        (), 'Shifts of words from where the model puts them, which generates the clip once without guidance first: '
        '"jeep: 0:0.2,0; 7:0.3,-0.1,1.5", as in `fatezero edit`. Repeatable.', group=LAYOUT,
    )  # fmt: skip
    swap: tuple[str, ...] = setting(
        (), 'Words that take the place which the model gives to others: "jeep: tree". Repeatable.', group=LAYOUT
    )
    layout: LayoutSettings = LayoutSettings()

    def __post_init__(self) -> None:
        check(self)


FILES = ("video", "model", "temporal", "controlnet", "control", "edit_mask", "first_frame", "class_pictures")
"""The settings of files, besides LoRAs, which have a strength too."""
FILES_OF_OBJECTS = ("mask", "object_mask", "guide_frame")
"""The settings of files for words, "burger: mask.mp4", or for frames, "24: edited.png"."""


_OF_INVERSION = {"key_frames", "clip_norm", "steps"}
"""Settings of the inversion, which a preset keeps unless it sets them."""
_OF_PRESETS = {name for preset in PRESETS.values() for name in preset if name not in _OF_INVERSION | set(SECTIONS)}
"""The settings that presets control; those that a preset omits have their defaults."""
_OF_SECTIONS = {
    section: {name for preset in PRESETS.values() for name in preset.get(section, {})} for section in SECTIONS
}
"""The same in sections."""


def with_preset(config: EditConfig, preset: str) -> EditConfig:
    """A configuration with a preset's settings over its own, see `preset_values`. Raises ConfigError for an unknown
    preset.
    """
    try:
        values = preset_values(preset, config.source, config.target)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    default = EditConfig()
    sections = {
        section: replace(
            getattr(config, section),
            **{name: getattr(getattr(default, section), name) for name in names} | values.get(section, {}),
        )
        for section, names in _OF_SECTIONS.items()
        if names
    }
    return replace(config, **{name: getattr(default, name) for name in _OF_PRESETS} | values | sections)
