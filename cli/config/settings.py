"""Settings of an edit: presets, YAML files, and the authors' configuration files."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from ...attention.key_frames import KeyFrames
from ...attention.prompt import Mode, PromptEdit, bare, changed_words, words_of
from ...diffusion.edit import Edit, Injection, Propagation, first_step
from ...diffusion.invert import InversionSettings
from ...files.lora import LoraFile
from ...methods.fatezero import GROUP as FATEZERO
from ...methods.fatezero import PRESETS as FATEZERO_PRESETS
from ...methods.fatezero import FusionSettings
from ...methods.flow_edit import PRESET as FLOW_EDIT_PRESET
from ...methods.flow_edit import FlowEditSettings
from ...methods.flow_smoothing import GROUP as FLOW
from ...methods.flow_smoothing import FlowSmoothing
from ...methods.layout_guidance import GROUP as LAYOUT
from ...methods.layout_guidance import LayoutSettings
from ...methods.move_objects import MoveSettings
from ...methods.plug_and_play import PnPSettings
from ...methods.tokenflow import TokenFlowSettings
from ...methods.tune_a_video import TRAINED_KEYS, LayerSettings, TuneSettings
from ...settings import Described, Setting, check, check_one, described, described_one, is_union, kept, setting, shown
from ...store.budget import StoreSettings
from ...video.flow import FlowName
from ...video.read import read_metadata
from ...video.which import ClipSettings, colour_of, seconds_of
from ...video.write import METADATA_SUFFIXES
from .documents import DocumentError, read_json, read_yaml

T = TypeVar("T")
InjectionName = Literal["fatezero", "pnp", "none"]
PropagationName = Literal["none", "tokenflow"]
NoiseName = Literal["inverted", "drawn"]


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong kind, or missing."""


_TEXT, _MODEL, _EDIT, _MASK = "What to edit", "Model", "The edit", FATEZERO
_CLIP, _DRAWN = "The clip", "The edit"


@dataclass(frozen=True)
class ObjectSettings:
    """Where objects shall be, each a text of its own."""

    box: tuple[str, ...] = setting(
        (), 'Where words shall be: "burger: 0:0.1,0.5,0.3; 15:0.7,0.5,0.3", at frames the centre and size (or width '
        "and height) as shares of the picture; may repeat.", group=LAYOUT,
    )  # fmt: skip
    ellipse: tuple[str, ...] = setting((), "The same as an ellipse.", group=LAYOUT)
    mask: tuple[str, ...] = setting((), 'The same by a video or pictures: "burger: mask.mp4".', group=LAYOUT)

    @property
    def wanted(self) -> bool:
        """Whether there is any."""
        return any(getattr(self, name, ()) for name in OBJECTS)


OBJECTS = ("box", "ellipse", "mask", "shift")
"""The settings that name an object and where it shall be."""
REPEATED = (*OBJECTS, "object_mask", "lora")
"""Settings that may be given several times."""


@dataclass(frozen=True)
class ModelSettings:
    """The model, and what is added to its weights."""

    model: str = setting(
        "demo", "Diffusers folder, .safetensors checkpoint or hub name.", shown="the bundled demo", group=_MODEL
    )
    lora: tuple[str, ...] = setting(
        (), "LoRA file or folder, or FILE=0.8 for its strength. May repeat.", shown="none", group=_MODEL
    )
    variant: str = setting("", "Variant of the weights in a diffusers folder, as fp16.", shown="none", group=_MODEL)
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
    """A ControlNet and what it follows."""

    controlnet: str = setting("", "ControlNet: diffusers folder, .safetensors or hub name.", shown="none", group=_MODEL)
    control: str = setting(
        "", "Video or pictures that the ControlNet follows. They are cut like the clip.",
        shown="none", group=_MODEL,
    )  # fmt: skip
    controlnet_strength: float = setting(
        1.0, "What the ControlNet's output is multiplied by.", least=0, most=10, group=_MODEL
    )
    control_start: float = setting(
        0.0, "Where on the way from noise to clip the ControlNet begins to act.", least=0, most=1, group=_MODEL
    )
    control_end: float = setting(1.0, "Where it ends.", least=0, most=1, group=_MODEL)

    @property
    def chosen_control(self) -> ControlSettings:
        """These settings without the others of a configuration. Raises ConfigError for what is no range."""
        found = _part(self, ControlSettings)
        check(found)
        if found.control_start >= found.control_end:
            raise ConfigError(
                f"control_start is {found.control_start}; it must be below control_end, {found.control_end}"
            )
        return found


@dataclass(frozen=True)
class EditConfig(
    ClipSettings, InversionSettings, StoreSettings, FusionSettings, ObjectSettings, ControlSettings, ModelSettings
):
    """Every setting of `fatezero edit`; the names are those of the flags and of the YAML keys.

    Those of a method besides FateZero stand in a section of their own: `pnp`, `tokenflow`, `layout`.
    """

    video: str = ""
    source: str = setting("", "Prompt that describes the video.", group=_TEXT)
    target: str = setting(
        "", "Prompt that describes the edit. Several edits run in one pass over the inversion.", group=_TEXT
    )
    negative: str = setting("", "Negative prompt.", shown="none", group=_TEXT)
    chunk_frames: int | None = kept(InversionSettings, "chunk_frames", None, shown="all, or 16 where exact")
    guidance_scale: float = kept(Edit, "guidance_scale", 7.5)
    strength: float = kept(Edit, "strength", 1.0)
    noise: NoiseName = setting(
        "inverted",
        "What the edit begins from: inverted the clip's own noise; drawn any, and the edit goes along the difference "
        "of both prompts' predictions (FlowEdit), without an inversion.",
        group=_EDIT,
    )
    injection: InjectionName = setting(
        "fatezero",
        "What the edit takes of the source: fatezero its attention, word by word and under a mask; pnp the decoder's "
        "queries, keys and one feature (Plug-and-Play); none nothing but the inverted noise.",
        group=_EDIT,
    )
    propagation: PropagationName = setting(
        "none",
        "How frames agree beyond their key frames: tokenflow has each take its self-attention from key frames that "
        "were edited together.",
        group=_EDIT,
    )
    smoothing: float = kept(FlowSmoothing, "amount", 0.0)
    flow: FlowName = setting(
        "auto", "What finds the motion: raft (torchvision) or dis (OpenCV); auto takes raft where its weights are.",
        group=FLOW,
    )  # fmt: skip
    mode: Mode = kept(PromptEdit, "mode", "refine")
    blend_source: tuple[str, ...] = setting(
        (), "Words of the source that draw the mask, by commas.", shown="those that change", group=_MASK
    )
    blend_target: tuple[str, ...] = setting(
        (), "Words of the target that draw it too where latents are blended, by commas.", shown="those that change",
        group=_MASK,
    )  # fmt: skip
    reweight: Mapping[str, float] = setting(dict, described_one(PromptEdit, "reweight").about.help, group=_MASK)
    cross_replace_steps: float = kept(FusionSettings, "cross_replace_steps", 0.7)
    shift: tuple[str, ...] = setting(
        (), 'How words are moved from where they are: "jeep: 0:0.2,0; 7:0.3,-0.1,1.5", at frames how far right and '
        "down as shares of the picture, and the growth; may repeat.", group=LAYOUT,
    )  # fmt: skip
    object_mask: tuple[str, ...] = setting(
        (), 'Where words are in the clip, by a video or pictures: "jeep: mask.mp4". Else their attention tells.',
        group=LAYOUT,
    )  # fmt: skip
    flow_edit: FlowEditSettings = FlowEditSettings()
    pnp: PnPSettings = PnPSettings()
    tokenflow: TokenFlowSettings = TokenFlowSettings()
    layout: MoveSettings = MoveSettings()

    def __post_init__(self) -> None:
        """Its parts check themselves where they are made."""

    def part(self, settings: type[T]) -> T:
        """The settings of one of the parts it is made of."""
        return _part(self, settings)

    @property
    def fusion(self) -> FusionSettings:
        return self.part(FusionSettings)

    @property
    def chosen_injection(self) -> Injection | None:
        """What the edit takes of the source."""
        chosen: dict[str, Injection | None] = {"fatezero": self.fusion, "pnp": self.pnp, "none": None}
        return chosen[self.injection]

    @property
    def chosen_propagation(self) -> Propagation | None:
        """How frames agree."""
        return self.tokenflow if self.propagation == "tokenflow" else None

    @property
    def store(self) -> StoreSettings:
        return self.part(StoreSettings)

    @property
    def keys(self) -> KeyFrames:
        return self.part(InversionSettings).keys

    def prompt_edit(self, tokenizer: Any) -> PromptEdit | None:
        """The prompt pair, which FateZero's fusion alone needs; blend words not given are the words that change."""
        if self.injection != "fatezero":
            return None
        blend = None
        if self.fusion.blends and not self.wanted:  # a layout has an area of its own
            changed = changed_words(self.source, self.target)
            blend = (list(self.blend_source or changed[0]), list(self.blend_target or changed[1]))
            if self.fusion.masks_by_prompts:
                blend = blend if any(blend) else None
            elif not blend[0] or (self.blend_latents and not blend[1]):
                raise ConfigError(
                    "blending needs words to blend: no word of the source changes, so give --blend-source and "
                    f"--blend-target ({shown(self.source)} / {shown(self.target)})"
                )
        return PromptEdit(self.source, self.target, tokenizer, self.mode, blend, dict(self.reweight))


def _part(config: Any, settings: type[T]) -> T:
    return settings(**{one.name: getattr(config, one.name) for one in described(settings)})


@dataclass(frozen=True)
class TuneConfig(ClipSettings, LayerSettings, TuneSettings, ModelSettings):
    """Every setting of `fatezero tune`; the names are those of the flags."""

    video: str = ""
    prompt: str = setting("", "Prompt that describes the video.", group=_TEXT)
    temporal: str = setting(
        "", "Temporal layers to begin from, as in `fatezero edit`.", shown="fresh ones", group=_MODEL
    )
    count: int | None = kept(ClipSettings, "count", None, shown="at most 24; with --end all")
    key_frames: tuple[str | int, ...] = kept(InversionSettings, "key_frames", TRAINED_KEYS)
    clip_norm: bool = kept(InversionSettings, "clip_norm", True)

    def __post_init__(self) -> None:
        """Its parts check themselves where they are made."""

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
    negative: str = kept(EditConfig, "negative", "")
    frames: int = setting(16, "Number of frames.", least=1, most=1000, group=_CLIP)
    size: tuple[int, int] | None = setting(
        None, "WIDTHxHEIGHT of the clip.", unit="pixels", shown="the model's", group=_CLIP
    )
    fps: float = setting(8.0, "Frame rate.", least=0.1, most=1000, unit="frames a second", group=_CLIP)
    seed: int = setting(0, "Random seed for the noise.", least=0, most=2**63 - 1, group=_CLIP)
    steps: int = kept(InversionSettings, "steps", 50)
    guidance_scale: float = kept(Edit, "guidance_scale", 7.5)
    key_frames: tuple[str | int, ...] | None = setting(
        None, "Whose keys and values each frame attends to, as in `fatezero edit`.",
        shown="as the model was trained", group=_DRAWN,
    )  # fmt: skip
    clip_norm: bool | None = setting(
        None, "Take the normalisation statistics of the ResNet blocks over the whole clip.",
        shown="as the model was trained", group=_DRAWN,
    )  # fmt: skip
    layout: LayoutSettings = LayoutSettings()

    def __post_init__(self) -> None:
        check(self)


SECTIONS: dict[str, Any] = {
    "flow_edit": FlowEditSettings, "pnp": PnPSettings, "tokenflow": TokenFlowSettings, "layout": MoveSettings,
}  # fmt: skip
"""The sections of an edit's configuration, and the settings in them."""
_VIDEO = {"video": Described("video", str, "", Setting("Video, picture, or pictures."))}
_OF_EDITS = _VIDEO | {one.name: one for one in described(EditConfig)}
_OF_CLIPS = {one.name: one for one in described(GenerateConfig)}
_OF_TUNINGS = _VIDEO | {one.name: one for one in described(TuneConfig)}
FILES = ("video", "model", "temporal", "controlnet", "control")
"""The settings that name a file, besides those of LoRAs, each a file with its strength."""
FILES_OF_OBJECTS = ("mask", "object_mask")
"""Those that name files for words: "burger: mask.mp4"."""
MADE = "made"
"""The section of a result's record that is no setting: see `record.py`."""
METADATA = "fatezero"
"""What a video's metadata call its record."""
_AUTHORS_MARKS = ("editing_config", "validation_sample_logger_config", "dataset_config")
_OLDER_MARKS = ("train_dataset", "validation_data", "validation_sample_logger")


PRESETS: dict[str, dict[str, Any]] = {
    **FATEZERO_PRESETS,
    "pnp": {"injection": "pnp", "key_frames": ("self",)},
    "tokenflow": {"injection": "pnp", "propagation": "tokenflow", "key_frames": ("self",)},
    "tune_a_video": {
        "injection": "none", "guidance_scale": 12.5, "key_frames": ("first", "previous"), "clip_norm": True,
    },
    "flow_edit": {"noise": "drawn", "injection": "none", **FLOW_EDIT_PRESET},
}  # fmt: skip
"""FateZero's, and the other papers' settings. Plug-and-Play and TokenFlow attend to one frame while they invert."""

_LEFT_ALONE = {"key_frames", "clip_norm"}
"""Settings of the inversion that a preset may name, and leaves as they are where it does not."""
_OF_PRESETS = {name for preset in PRESETS.values() for name in preset if name not in _LEFT_ALONE} | {"mode"}
"""The settings that presets speak of; what one does not name has its default."""


def with_preset(config: EditConfig, preset: str) -> EditConfig:
    """A configuration with a preset's settings over its own.

    The shape preset maps word to word where both prompts have equally many words, and
    refines where they have not. Raises ConfigError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {shown(preset)} is unknown: use one of {', '.join(PRESETS)}")
    mapped = preset.startswith("shape") and len(words_of(config.source)) == len(words_of(config.target))
    default = EditConfig(mode="replace" if mapped else "refine")
    return replace(config, **{name: getattr(default, name) for name in _OF_PRESETS} | PRESETS[preset])


# --- values that are right --------------------------------------------------------------


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by setting name, with lists made tuples; ConfigError naming what is wrong."""
    of_sections = {name: _section_of(name, values[name], kind) for name, kind in SECTIONS.items() if name in values}
    values = {name: value for name, value in values.items() if name not in SECTIONS}
    return _checked(values, _OF_EDITS) | of_sections


def tune_config(values: Mapping[str, Any]) -> TuneConfig:
    """A tuning by its settings that were given; ConfigError naming what is wrong or missing."""
    config = TuneConfig(**_checked(values, _OF_TUNINGS))
    for name, flag in (("video", "VIDEO"), ("prompt", "--prompt")):
        if not getattr(config, name):
            raise ConfigError(f"missing {flag}")
    if config.temporal and config.fresh != LayerSettings():
        raise ConfigError("layers and rank have no effect on temporal layers of a file")
    if config.rank is not None and config.layers != "fatezero":
        raise ConfigError("rank has no effect without --layers fatezero")
    return config


def generate_config(values: Mapping[str, Any]) -> GenerateConfig:
    """A clip to draw by its settings that were given; ConfigError naming what is wrong or missing."""
    layout = LayoutSettings(**_section_of("layout", values.get("layout", {}), LayoutSettings))
    found = _checked({name: value for name, value in values.items() if name != "layout"}, _OF_CLIPS)
    config = GenerateConfig(**found, layout=layout)
    if not config.prompt:
        raise ConfigError("missing --prompt")
    if values.get("layout") and not config.wanted:
        raise ConfigError(f"layout has no effect here: {_NOTHING_PLACED}")
    return config


def _checked(values: Mapping[str, Any], known: Mapping[str, Described]) -> dict[str, Any]:
    found = {name: _at_home(name, value) for name, value in _fitting(values, known).items()}
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
    for name in ("video", "source", "target", "prompt", "model"):
        if isinstance(found.get(name), str) and name in values and not found[name].strip():
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
    """A value whose files are no longer named by ~."""
    if name in FILES_OF_OBJECTS:
        parts = (text.partition(":") for text in value)
        return tuple(f"{words}{mark}{_indented(file)}" for words, mark, file in parts)
    if name == "lora" and isinstance(value, tuple):
        return tuple(from_home(text) for text in value)
    return from_home(value) if name in FILES and isinstance(value, str) else value


def _indented(file: str) -> str:
    """A file's name behind the blanks that it has, as `from_home` has it."""
    name = file.lstrip()
    return file[: len(file) - len(name)] + from_home(name)


def from_home(file: str) -> str:
    """A file's name with the folder that ~ stands for."""
    try:
        return str(Path(file).expanduser()) if file.startswith("~") and not Path(file).exists() else file
    except RuntimeError:  # there is no such user
        return file


def _fitting(values: Mapping[str, Any], known: Mapping[str, Described], where: str = "") -> dict[str, Any]:
    """Values of the right kind and in their range."""
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f" (did you mean {where + near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown setting {', '.join(shown(where + name) for name in unknown[:3])}{hint}")
    found = {}
    for name, value in values.items():
        kind = known[name].kind
        found[name] = _fitted(_plain_value(value, kind), kind)
        if found[name] is _WRONG:
            raise ConfigError(f"{where}{name} is {shown(value)}; it must be {_said(kind)}{_if_great(value)}")
        _check_text(where + name, found[name], "\0" if name in (*FILES, "lora", *FILES_OF_OBJECTS) else _HALVES)
        try:
            check_one(known[name], found[name])
        except ValueError as error:
            raise ConfigError(f"{where}{error}") from error
    return found


def _if_great(value: Any) -> str:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return ", below 2**63" if any(isinstance(part, int) and abs(part) > _MOST for part in parts) else ""


_HALVES = "\ud800-\udfff"
"""Halves of pairs of UTF-16, which are no text; in names of files they stand for bytes that are no UTF-8."""


def _check_text(name: str, value: Any, wrong: str) -> None:
    """Raise ConfigError for a text with characters that it cannot have."""
    for text in (value,) if isinstance(value, str) else value if isinstance(value, (tuple, dict)) else ():
        if isinstance(text, str) and (found := re.search(f"[{wrong}]", text)):
            raise ConfigError(f"{name} is {shown(value)}; take {found[0]!r} out of it")


def _section_of(name: str, given: Any, settings: type) -> dict[str, Any]:
    """The values given of a section."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {shown(given)}; it must be a section")
    found = _fitting(given, {one.name: one for one in described(settings)}, f"{name}.")
    try:
        settings(**found)
    except ValueError as error:
        raise ConfigError(f"{name}.{error}") from error
    return found


def with_values(config: EditConfig, values: Mapping[str, Any]) -> EditConfig:
    """A configuration with checked values over its own; of a section, those given alone."""
    sections = {name: replace(getattr(config, name), **values[name]) for name in SECTIONS if name in values}
    return replace(config, **{**values, **sections})


_WRONG = object()
_MOST = 2**63 - 1
"""The greatest whole number that tensors count with."""


def _plain_value(value: Any, kind: Any) -> Any:
    """A single word or number where a list of them may stand."""
    several = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    return (value,) if several and isinstance(value, (str, int)) else value


def _fitted(value: Any, kind: Any) -> Any:
    """A value of a kind, or `_WRONG`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value if value in inner else _WRONG
    if is_union(kind):
        return next((found for one in inner if (found := _fitted(value, one)) is not _WRONG), _WRONG)
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        parts = [_fitted(v, k) for v, k in zip(value, kinds, strict=False)]
        return _WRONG if len(value) != len(kinds) or any(part is _WRONG for part in parts) else tuple(parts)
    if origin is Mapping and isinstance(value, Mapping):
        parts = [(_fitted(k, inner[0]), _fitted(v, inner[1])) for k, v in value.items()]
        return _WRONG if any(part is _WRONG for pair in parts for part in pair) else dict(parts)
    if kind is type(None):
        return None if value is None else _WRONG
    if kind in (int, float):
        number = isinstance(value, kind if kind is int else (int, float)) and not isinstance(value, bool)
        return value if number and abs(value) <= (_MOST if kind is int else sys.float_info.max) else _WRONG
    return value if kind in (str, bool) and isinstance(value, kind) else _WRONG


def _said(kind: Any) -> str:
    """A kind in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if is_union(kind):
        return " or ".join(_said(one) for one in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, each {_said(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {_said(inner[0])}"
    if origin is Mapping:
        return f"pairs of {_said(inner[0])} and {_said(inner[1])}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(kind, "empty")


_FUSION = tuple(one.name for one in described(FusionSettings) if one.name != "max_tokens")


def of_methods() -> list[str]:
    """The settings that only edits have."""
    return [*_FUSION, *OBJECTS, "object_mask", "injection", "propagation", "smoothing", "flow", "noise"]


_NOTHING_PLACED = "no object is named (box, ellipse, mask)"
_NOTHING_BLENDED = "nothing is blended (blend_self_attention, blend_latents)"
_NO_EFFECT: tuple[tuple[tuple[str, ...], Callable[[EditConfig], bool], str], ...] = (
    (
        (*_FUSION, "mode", "blend_source", "blend_target", "reweight"),
        lambda c: c.injection != "fatezero",
        "injection is not fatezero",
    ),
    (("flow_edit",), lambda c: c.noise != "drawn", "noise is not drawn"),
    (
        ("order", "memory", "place", "budget_gb", "precision", "keep_steps"),
        lambda c: c.noise == "drawn",
        "noise is drawn, not inverted",
    ),
    (("pnp",), lambda c: c.injection != "pnp", "injection is not pnp"),
    (("tokenflow",), lambda c: c.propagation != "tokenflow", "propagation is not tokenflow"),
    (("layout", "object_mask"), lambda c: not c.wanted, "no object is named (box, ellipse, mask, shift)"),
    (("flow",), lambda c: c.smoothing == 0, "smoothing is 0"),
    (("precision", "keep_steps"), lambda c: c.memory == "recompute", "memory recompute keeps no attention"),
    (
        ("blend_source", "blend_target", "blend_threshold", "mask_from", "mask_tokens"),
        lambda c: not c.fusion.blends,
        _NOTHING_BLENDED,
    ),
    (
        ("blend_source", "blend_target", "blend_threshold", "mask_from", "mask_tokens", "separate_words"),
        lambda c: c.wanted,
        "the mask is that of the objects' layout",
    ),
    (("blend_latents_until",), lambda c: not c.blend_latents, "blend_latents is off"),
    (("mask_tokens",), lambda c: c.fusion.masks_by_prompts, "the mask is that of both prompts"),
    (("reweight",), lambda c: c.cross_replace_steps == 0, "cross_replace_steps is 0"),
    (("negative",), lambda c: c.guidance_scale == 1, "guidance_scale is 1"),
    (
        ("control", "controlnet_strength", "control_start", "control_end"),
        lambda c: not c.controlnet,
        "no controlnet is given",
    ),
)


def check_effect(config: EditConfig, asked: Sequence[str]) -> None:
    """Raise ConfigError for a setting asked for that the others leave without effect."""
    for names, idle, why in _NO_EFFECT:
        for name in names:
            if name in asked and idle(config):
                raise ConfigError(f"{name} has no effect here: {why}")


# --- files --------------------------------------------------------------------------------


def load_configs(
    path: str | Path, texts: Mapping[str, Any] | None = None, preset: str | None = None
) -> tuple[list[EditConfig], list[str]]:
    """The edits of a file, and notes on what was left out of it.

    Reads our own files (the fields of `EditConfig`, and `preset`), a result's record (JSON, or the result itself), and
    the authors' files as they are, one edit for each of their prompts. texts: a `source` or `target` given elsewhere,
    in the place of the file's. preset: one given elsewhere, over all the file says of what presets speak of; the
    file's own preset stands beneath its other settings. Raises ConfigError naming the file and an unknown key.
    """
    path, texts = Path(path), dict(texts or {})
    data = held_by(path)
    with _naming(path):
        if not isinstance(data, Mapping):
            raise ConfigError("holds no settings")
        if any(mark in data for mark in _OLDER_MARKS):
            raise ConfigError(
                "is in the authors' older layout (train_dataset); dataset_config and editing_config are read"
            )
        if any(mark in data for mark in _AUTHORS_MARKS):
            configs, notes = authors_configs(data)
            for config in configs:
                _check_ranges(config)
            configs = [with_values(config, texts) for config in configs]
        else:
            config = config_of({name: value for name, value in data.items() if name != MADE}, texts)
            configs, notes = [config], []
        if preset is not None:
            configs = [with_preset(config, preset) for config in configs]
    return configs, notes


def _check_ranges(config: EditConfig) -> None:
    try:
        check(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def config_of(values: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> EditConfig:
    """An edit by the values of a file, its preset beneath its other settings. texts: see `load_configs`.

    Raises ConfigError naming what is wrong.
    """
    values, texts = dict(values), dict(texts or {})
    preset = values.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"preset is {shown(preset)}; it must be text")
    given = checked(values) | texts
    config = with_values(EditConfig(), given)
    return config if preset is None else with_values(with_preset(config, preset), given)


def completed(config: EditConfig, inverting: bool = False, stored: bool = False) -> EditConfig:
    """A configuration that has all its run needs, and every setting in its range; ValueError naming what is wrong.

    inverting: for an inversion alone. stored: beside a store, which knows clip and source.
    """
    config = replace(config, target=config.target or config.source) if config.wanted else config
    config.chosen_control  # noqa: B018  raises for settings out of range
    needed = ("video", "source") if inverting or config.injection == "fatezero" else ("video",)
    missing = [] if stored else [name for name in needed if not getattr(config, name)]
    missing += [] if inverting or config.target else ["target"]
    missing += ["control"] if config.controlnet and not config.control else []
    if missing:
        raise ConfigError(f"missing {', '.join(_FLAGS[name] for name in missing)}")
    config.fusion, config.keys, config.store  # noqa: B018  raise for settings that do not go together
    if not inverting and not stored:  # whose number of steps is its own
        try:
            first_step(config.strength, config.steps)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return config


_FLAGS = {"video": "VIDEO", "source": "--source", "target": "--target", "control": "--control"}


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of a file, with its name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def held_by(path: Path) -> Any:
    """What a configuration holds: YAML, JSON, or a video's own record; ConfigError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    with _naming(path):
        return _held(path)


def _held(path: Path) -> Any:
    if path.suffix.lower() not in METADATA_SUFFIXES:
        return _read(path)
    try:
        return read_json(read_metadata(path)[METADATA])
    except KeyError:
        raise ConfigError("has no settings in its metadata: it is no result of `fatezero edit`") from None
    except DocumentError as error:
        raise ConfigError(str(error)) from error


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return read_json(text) if path.suffix.lower() == ".json" else read_yaml(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not text: {error}") from error
    except DocumentError as error:
        raise ConfigError(str(error)) from error


def load_pairs(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Pairs of captions of a YAML list; ConfigError for anything else."""
    with _naming(Path(path)):
        held = _read(Path(path))
        right = isinstance(held, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in held
        )
        if not right or not held:
            raise ConfigError("must be a list of [source caption, target caption]")
    return tuple((before, after) for before, after in held)


# --- the authors' files ---------------------------------------------------------------

_SILENT = {
    "seed",
    "clip_length",
    "sample_seeds",
    "prompt2prompt_edit",
    "annotate",
    "use_invertion_latents",
    "test_pipeline_config",
    "stride",  # of the tuning set's windows
    "lora",  # rank of the authors' temporal layers, the identity in an untuned model
    "disk_store",
}
_TUNING = {
    "train_steps",
    "validation_steps",
    "checkpointing_steps",
    "trainer_pipeline_config",
    "learning_rate",
    "train_temporal_conv",
    "mixed_precision",
    "gradient_checkpointing",
    "enable_xformers",
    "class_data_root",
    "class_data_prompt",
    "strength",
}
_KEY_FRAME_NAMES = {"mid": "middle", "first": "first", "last": "last"}


def authors_configs(data: Mapping[str, Any]) -> tuple[list[EditConfig], list[str]]:
    """The authors' configuration as edits, one for each entry of `editing_prompts`.

    Their defaults are kept: GroupNorm over the clip, layers of up to 32x32 tokens fused,
    keys of the previous and the first frame unless told. Words that are not in the prompt,
    which their code passes over in silence, are left out with a note.
    """
    notes: list[str] = []
    _known(data, {"pretrained_model_path", "dataset_config", "editing_config", "model_config"}, "", notes)
    dataset, editing, model = (_section(data, k) for k in ("dataset_config", "editing_config", "model_config"))
    targets = editing.get("editing_prompts")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ConfigError("editing_config.editing_prompts must be a list of prompts")
    _known(
        dataset,
        {"path", "prompt", "n_sample_frame", "sampling_rate", "start_sample_frame", "offset"},
        "dataset_config",
        notes,
    )
    _known(
        editing,
        {
            "editing_prompts",
            "p2p_config",
            "guidance_scale",
            "num_inference_steps",
            "source_prompt",
            "use_inversion_attention",
        },
        "editing_config",
        notes,
    )
    _known(model, {"SparseCausalAttention_index", "least_sc_channel"}, "model_config", notes)
    offset = _section(dataset, "offset")
    left, top, right, bottom = (
        _value(offset, side, 0, int, "dataset_config.offset") for side in ("left", "top", "right", "bottom")
    )
    entries = model.get("SparseCausalAttention_index", [-1, "first"])
    if _fitted(entries, tuple[int | str, ...]) is _WRONG:
        raise ConfigError(f"model_config.SparseCausalAttention_index is {shown(entries)}; it must be a list")
    base = EditConfig(
        video=_value(dataset, "path", "", str, "dataset_config"),
        source=_value(dataset, "prompt", "", str, "dataset_config"),
        model=_value(data, "pretrained_model_path", "demo", str, ""),
        steps=_value(editing, "num_inference_steps", 50, int, "editing_config"),
        guidance_scale=_value(editing, "guidance_scale", 7.5, float, "editing_config"),
        key_frames=tuple(_KEY_FRAME_NAMES.get(str(entry), entry) for entry in entries) or ("self",),
        key_frames_least_channels=_value(model, "least_sc_channel", 0, int, "model_config"),
        clip_norm=True,
        max_tokens=1024,
        start=_value(dataset, "start_sample_frame", 0, int, "dataset_config"),
        stride=_value(dataset, "sampling_rate", 1, int, "dataset_config"),
        count=max(_value(dataset, "n_sample_frame", 8, int, "dataset_config"), 0),
        crop=(left, top, right, bottom),
        size=(512, 512),
    )
    controls = editing.get("p2p_config") or {}
    controls = dict(enumerate(controls)) if isinstance(controls, list) else controls
    if not isinstance(controls, Mapping):
        raise ConfigError(f"editing_config.p2p_config is {shown(controls)}; it must have a section for each prompt")
    edits = []
    for i, target in enumerate(targets):
        where = f"editing_config.p2p_config[{i}]"
        control = controls.get(i, controls.get(str(i))) or {}
        if not isinstance(control, Mapping):
            raise ConfigError(f"{where} is {shown(control)}; it must be a section")
        edits.append(_authors_edit(replace(base, target=target), control, where, notes))
    return edits, notes


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a file, empty where it is missing."""
    section = data.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {shown(section)}; it must be a section")
    return dict(section)


def _value(section: Mapping[str, Any], key: str, default: Any, kind: Any, where: str) -> Any:
    """A value of a kind, the default where it is missing or null; ConfigError naming it for another kind."""
    value = section.get(key)
    value = default if value is None else value
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if _fitted(value, kind) is _WRONG:
        raise ConfigError(f"{where + '.' if where else ''}{key} is {shown(value)}; it must be {_said(kind)}")
    return kind(value)


def _authors_edit(base: EditConfig, control: Mapping[str, Any], where: str, notes: list[str]) -> EditConfig:
    if not control:  # their plain DDIM pipeline, without fusion
        return replace(base, cross_replace_steps=0.0, self_replace_steps=0.0)
    names = {
        "is_replace_controller",
        "cross_replace_steps",
        "self_replace_steps",
        "eq_params",
        "blend_words",
        "blend_self_attention",
        "blend_latents",
        "blend_th",
        "use_inversion_attention",
    }
    _known(control, names, where, notes)
    shares = control.get("cross_replace_steps", 0.8)
    if isinstance(shares, Mapping):
        if set(shares) != {"default_"}:
            raise ConfigError(
                f"{where}.cross_replace_steps: shares of single words are not supported: {shown(dict(shares))}"
            )
        shares = shares["default_"]
    weights = _section(control, "eq_params")
    of_words, factors = (
        _fitted(weights.get("words", ()), tuple[str, ...]),
        _fitted(weights.get("values", ()), tuple[float, ...]),
    )
    if _WRONG in (of_words, factors) or len(of_words) != len(factors):
        raise ConfigError(f"{where}.eq_params must have `words` and as many `values`")
    reweight = {
        word: float(factor)
        for word, factor in zip(of_words, factors, strict=True)
        if _present(word, base.target, where, notes)
    }
    words = _fitted(control.get("blend_words") or (), tuple[tuple[str, ...] | str, ...])
    if words is _WRONG:
        raise ConfigError(
            f"{where}.blend_words is {shown(control['blend_words'])}; it must be [source words, target words]"
        )
    pairs = [(side,) if isinstance(side, str) else side for side in [*words, (), ()][:2]]  # the target's may be missing
    blend = [
        tuple(w for w in side if _present(w, prompt, where, notes))
        for side, prompt in zip(pairs, (base.source, base.target), strict=True)
    ]
    blends = bool(blend[0])
    if control.get("blend_self_attention") and not blends:
        notes.append(f"{where}: without blend_words all self-attention comes from the source")
    thresholds = control.get("blend_th") or [0.3]
    thresholds = thresholds if isinstance(thresholds, list) else [thresholds]
    return replace(
        base,
        mode="replace" if control.get("is_replace_controller") else "refine",
        cross_replace_steps=_value({"cross_replace_steps": shares}, "cross_replace_steps", 0.8, float, where),
        self_replace_steps=_value(control, "self_replace_steps", 0.8, float, where),
        reweight=reweight,
        blend_source=blend[0] if blends else (),
        blend_target=blend[1] if blends else (),
        blend_self_attention=bool(control.get("blend_self_attention")) and blends,
        blend_latents=bool(control.get("blend_latents")) and blends,
        blend_threshold=_value({"blend_th": thresholds[0]}, "blend_th", 0.3, float, where),
    )


def _present(word: str, prompt: str, where: str, notes: list[str]) -> bool:
    found = bare(word) in map(bare, prompt.split())
    if not found:
        notes.append(f"{where}: {shown(word)} is not in {shown(prompt)}, left out")
    return found


def _known(section: Mapping[str, Any], names: set[str], where: str, notes: list[str]) -> None:
    """ConfigError for a key nobody knows; a note for keys of the authors' tuning."""
    for key in section:
        if key in _TUNING:
            notes.append(f"{where + '.' if where else ''}{key}: belongs to tuning, left out")
        elif key not in names | _SILENT:
            raise ConfigError(f"unknown key {where + '.' if where else ''}{key}")
