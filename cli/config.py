"""Settings of an edit: presets, YAML files, and the authors' configuration files."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from ..attention.key_frames import KeyFrames
from ..attention.prompt import Mode, PromptEdit, changed_words
from ..diffusion.edit import Edit, Injection, Propagation
from ..diffusion.invert import InversionSettings
from ..methods.fatezero import GROUP as FATEZERO
from ..methods.fatezero import PRESETS as FATEZERO_PRESETS
from ..methods.fatezero import FusionSettings
from ..methods.flow_edit import PRESET as FLOW_EDIT_PRESET
from ..methods.flow_edit import FlowEditSettings
from ..methods.flow_smoothing import GROUP as FLOW
from ..methods.flow_smoothing import FlowSmoothing
from ..methods.layout_guidance import GROUP as LAYOUT
from ..methods.layout_guidance import LayoutSettings
from ..methods.move_objects import MoveSettings
from ..methods.plug_and_play import PnPSettings
from ..methods.temporal_layers import LayerSettings
from ..methods.tokenflow import TokenFlowSettings
from ..methods.tune_a_video import TuneSettings
from ..settings import check, described, described_one, is_union, kept, setting
from ..store.budget import StoreSettings
from ..video.flow import FlowName
from ..video.read import read_metadata
from ..video.which import ClipSettings, colour_of, seconds_of
from ..video.write import METADATA_SUFFIXES

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
REPEATED = (*OBJECTS, "object_mask")
"""Settings that are given once for each object."""


@dataclass(frozen=True)
class EditConfig(ClipSettings, InversionSettings, StoreSettings, FusionSettings, ObjectSettings):
    """Every setting of `fatezero edit`; the names are those of the flags and of the YAML keys.

    Those of a method besides FateZero stand in a section of their own: `pnp`, `tokenflow`, `layout`.
    """

    video: str = ""
    source: str = setting("", "What the video shows.", group=_TEXT)
    target: str = setting("", "What it shall show; several are edited in one pass.", group=_TEXT)
    negative: str = setting("", "What to keep away from.", shown="none", group=_TEXT)
    model: str = setting(
        "demo", "Diffusers folder, .safetensors checkpoint or hub name.", shown="the bundled demo", group=_MODEL
    )
    lora: str = setting("", "A LoRA file or folder.", group=_MODEL)
    temporal: str = setting(
        "",
        "Temporal layers for the model, Tune-A-Video's or FateZero's: a .safetensors file, the folder of "
        "`fatezero tune`, or demo, which make the demo model one of videos.",
        shown="none",
        group=_MODEL,
    )
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
                    f"--blend-target ({self.source!r} / {self.target!r})"
                )
        return PromptEdit(self.source, self.target, tokenizer, self.mode, blend, dict(self.reweight))


def _part(config: Any, settings: type[T]) -> T:
    return settings(**{one.name: getattr(config, one.name) for one in described(settings)})


@dataclass(frozen=True)
class TuneConfig(ClipSettings, LayerSettings, TuneSettings):
    """Every setting of `fatezero tune`; the names are those of the flags."""

    video: str = ""
    prompt: str = setting("", "What the video shows.", group=_TEXT)
    model: str = kept(EditConfig, "model", "demo")
    temporal: str = setting(
        "", "Temporal layers to begin from, as in `fatezero edit`.", shown="fresh ones", group=_MODEL
    )
    key_frames: tuple[str | int, ...] = kept(InversionSettings, "key_frames", ("first", "previous"))
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
class GenerateConfig(ObjectSettings):
    """Every setting of `fatezero generate`; the names are those of the flags. `layout` is a section."""

    prompt: str = setting("", "What the clip shall show.", group=_TEXT)
    negative: str = kept(EditConfig, "negative", "")
    model: str = kept(EditConfig, "model", "demo")
    lora: str = kept(EditConfig, "lora", "")
    temporal: str = kept(EditConfig, "temporal", "")
    frames: int = setting(16, "How many.", least=1, most=1000, group=_CLIP)
    size: tuple[int, int] | None = setting(None, "WIDTHxHEIGHT.", unit="pixels", shown="the model's own", group=_CLIP)
    fps: float = setting(8.0, "Of the video.", least=0.1, most=1000, unit="frames a second", group=_CLIP)
    seed: int = setting(0, "Of the noise.", least=0, most=2**63 - 1, group=_CLIP)
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
_KINDS: dict[str, Any] = {"video": str} | {one.name: one.kind for one in described(EditConfig)}
_GENERATE_KINDS: dict[str, Any] = {one.name: one.kind for one in described(GenerateConfig)}
_TUNE_KINDS: dict[str, Any] = {"video": str} | {one.name: one.kind for one in described(TuneConfig)}
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

_OF_CLIPS = {"key_frames", "clip_norm"}
"""Settings of the inversion that a preset may name, and leaves as they are where it does not."""
_OF_PRESETS = {name for preset in PRESETS.values() for name in preset if name not in _OF_CLIPS} | {"mode"}
"""The settings that presets speak of; what one does not name has its default."""


def with_preset(config: EditConfig, preset: str) -> EditConfig:
    """A configuration with a preset's settings over its own.

    The shape preset maps word to word where both prompts have equally many words, and
    refines where they have not. Raises ConfigError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
    mapped = preset.startswith("shape") and len(config.source.split()) == len(config.target.split())
    default = EditConfig(mode="replace" if mapped else "refine")
    return replace(config, **{name: getattr(default, name) for name in _OF_PRESETS} | PRESETS[preset])


# --- values that are right --------------------------------------------------------------


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by setting name, with lists made tuples; ConfigError naming what is wrong."""
    of_sections = {name: _section_of(name, values[name], kind) for name, kind in SECTIONS.items() if name in values}
    values = {name: value for name, value in values.items() if name not in SECTIONS}
    return _checked(values, _KINDS) | of_sections


def tune_config(values: Mapping[str, Any]) -> TuneConfig:
    """A tuning by its settings that were given; ConfigError naming what is wrong or missing."""
    config = TuneConfig(**_checked(values, _TUNE_KINDS))
    for name, flag in (("video", "VIDEO"), ("prompt", "--prompt")):
        if not getattr(config, name):
            raise ConfigError(f"missing {flag}")
    if config.temporal and config.fresh != LayerSettings():
        raise ConfigError("layers and rank have no effect on temporal layers of a file")
    if config.rank is not None and config.layers != "fatezero":
        raise ConfigError("rank has no effect without --layers fatezero")
    check(config)
    return config


def generate_config(values: Mapping[str, Any]) -> GenerateConfig:
    """A clip to draw by its settings that were given; ConfigError naming what is wrong or missing."""
    layout = LayoutSettings(**_section_of("layout", values.get("layout", {}), LayoutSettings))
    found = _checked({name: value for name, value in values.items() if name != "layout"}, _GENERATE_KINDS)
    config = GenerateConfig(**found, layout=layout)
    if not config.prompt:
        raise ConfigError("missing --prompt")
    if values.get("layout") and not config.wanted:
        raise ConfigError(f"layout has no effect here: {_NOTHING_PLACED}")
    return config


def _checked(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    found = _fitting(values, kinds)
    for name in ("start", "end"):
        if isinstance(found.get(name), str):
            try:
                seconds_of(found[name])
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
    if isinstance(found.get("background"), str):
        try:
            colour_of(found["background"])
        except ValueError as error:
            raise ConfigError(f"background: {error}") from error
    for name in ("video", "source", "target", "prompt", "model"):
        if isinstance(found.get(name), str) and name in values and not found[name].strip():
            raise ConfigError(f"{name} is {values[name]!r}; it must not be blank")
    return found


def _fitting(values: Mapping[str, Any], kinds: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    unknown = sorted(str(name) for name in values if name not in kinds)
    if unknown:
        near = difflib.get_close_matches(unknown[0], kinds, n=1)
        hint = f" (did you mean {where + near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown setting {', '.join(repr(where + name) for name in unknown)}{hint}")
    found = {name: _fitted(_plain_value(value, kinds[name]), kinds[name]) for name, value in values.items()}
    for name, value in found.items():
        if value is _WRONG:
            raise ConfigError(f"{where}{name} is {values[name]!r}; it must be {_said(kinds[name])}")
    return found


def _section_of(name: str, given: Any, settings: type) -> dict[str, Any]:
    """The values given of a section."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {given!r}; it must be a section")
    found = _fitting(given, {one.name: one.kind for one in described(settings)}, f"{name}.")
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
        return value if number and isfinite(value) else _WRONG
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
    return [*_FUSION, *REPEATED, "injection", "propagation", "smoothing", "flow", "noise"]


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
            configs = [with_values(config, texts) for config in configs]
        else:
            config = config_of({name: value for name, value in data.items() if name != MADE}, texts)
            configs, notes = [config], []
        if preset is not None:
            configs = [with_preset(config, preset) for config in configs]
    return configs, notes


def config_of(values: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> EditConfig:
    """An edit by the values of a file, its preset beneath its other settings. texts: see `load_configs`.

    Raises ConfigError naming what is wrong.
    """
    values, texts = dict(values), dict(texts or {})
    preset = values.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"preset is {preset!r}; it must be text")
    given = checked(values) | texts
    config = with_values(EditConfig(), given)
    return config if preset is None else with_values(with_preset(config, preset), given)


def completed(config: EditConfig, inverting: bool = False, stored: bool = False) -> EditConfig:
    """A configuration that has all its run needs; ConfigError naming what is missing.

    inverting: for an inversion alone. stored: beside a store, which knows clip and source.
    """
    config = replace(config, target=config.target or config.source) if config.wanted else config
    needed = ("video", "source") if inverting or config.injection == "fatezero" else ("video",)
    missing = [] if stored else [name for name in needed if not getattr(config, name)]
    missing += [] if inverting or config.target else ["target"]
    if missing:
        raise ConfigError(f"missing {', '.join(_FLAGS[name] for name in missing)}")
    return config


_FLAGS = {"video": "VIDEO", "source": "--source", "target": "--target"}


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
    if path.suffix.lower() not in (".json", *METADATA_SUFFIXES):
        return _yaml(path)
    try:
        if path.suffix.lower() == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        return json.loads(read_metadata(path)[METADATA])
    except KeyError:
        raise ConfigError("has no settings in its metadata: it is no result of `fatezero edit`") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"is not JSON: {error}") from error


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"is not YAML: {' '.join(str(error).split())}") from error


def load_pairs(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Pairs of captions of a YAML list; ConfigError for anything else."""
    with _naming(Path(path)):
        held = _yaml(Path(path))
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
        raise ConfigError(f"model_config.SparseCausalAttention_index is {entries!r}; it must be a list")
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
        raise ConfigError(f"editing_config.p2p_config is {controls!r}; it must have a section for each prompt")
    edits = []
    for i, target in enumerate(targets):
        where = f"editing_config.p2p_config[{i}]"
        control = controls.get(i, controls.get(str(i))) or {}
        if not isinstance(control, Mapping):
            raise ConfigError(f"{where} is {control!r}; it must be a section")
        edits.append(_authors_edit(replace(base, target=target), control, where, notes))
    return edits, notes


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of a file, empty where it is missing."""
    section = data.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{name} is {section!r}; it must be a section")
    return dict(section)


def _value(section: Mapping[str, Any], key: str, default: Any, kind: Any, where: str) -> Any:
    """A value of a kind, the default where it is missing or null; ConfigError naming it for another kind."""
    value = section.get(key)
    value = default if value is None else value
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if _fitted(value, kind) is _WRONG:
        raise ConfigError(f"{where + '.' if where else ''}{key} is {value!r}; it must be {_said(kind)}")
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
            raise ConfigError(f"{where}.cross_replace_steps: shares of single words are not supported: {dict(shares)}")
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
        raise ConfigError(f"{where}.blend_words is {control['blend_words']!r}; it must be [source words, target words]")
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
    found = word.lower() in [w.lower().strip(".,;:!?\"'()[]") for w in prompt.split()]
    if not found:
        notes.append(f"{where}: {word!r} is not in {prompt!r}, left out")
    return found


def _known(section: Mapping[str, Any], names: set[str], where: str, notes: list[str]) -> None:
    """ConfigError for a key nobody knows; a note for keys of the authors' tuning."""
    for key in section:
        if key in _TUNING:
            notes.append(f"{where + '.' if where else ''}{key}: belongs to tuning, left out")
        elif key not in names | _SILENT:
            raise ConfigError(f"unknown key {where + '.' if where else ''}{key}")
