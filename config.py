"""Settings of an edit: presets, YAML files, and the authors' configuration files."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from math import isfinite
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from .attention.budget import StoreSettings
from .attention.fusion import FusionSettings
from .attention.key_frames import KeyFrames
from .attention.prompt import PromptEdit
from .video.read import seconds_of


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong kind, or missing."""


_FUSION = {f.name for f in fields(FusionSettings)}


@dataclass(frozen=True)
class EditConfig:
    """Every setting of `fatezero edit`; the names are those of the flags and of the YAML keys.

    count: how many frames; 0 for all, None for as many as there are up to eight. start, end: frame numbers, or
    times such as "2.5s". fps: the rate to see a video at, or that of pictures; None for its own.
    """

    video: str = ""
    source: str = ""
    target: str = ""
    negative: str = ""
    model: str = "demo"
    lora: str = ""
    steps: int = 50
    guidance_scale: float = 7.5
    key_frames: tuple[str | int, ...] = ("self", "middle")
    key_frames_least_channels: int = 0
    clip_norm: bool = False
    memory: str = "recompute"
    place: str = "auto"
    budget_gb: float | None = None
    precision: str = "model"
    keep_steps: float = 1.0
    chunk_frames: int | None = None
    mode: str = "refine"
    blend_source: tuple[str, ...] = ()
    blend_target: tuple[str, ...] = ()
    reweight: Mapping[str, float] = field(default_factory=dict)
    cross_replace_steps: float = 0.7
    self_replace_steps: float = 0.8
    blend_self_attention: bool = False
    blend_latents: bool = False
    blend_threshold: float = 0.3
    max_tokens: int | None = None
    mask_tokens: int = 256
    mask_from: str = "attention"
    blend_latents_until: float = 0.8
    separate_words: float = 0.0
    start: int | str = 0
    end: int | str | None = None
    stride: int = 1
    count: int | None = None
    fps: float | None = None
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    size: tuple[int, int] | None = None

    @property
    def frame_rate(self) -> Fraction | None:
        """`fps` as a fraction; 29.97 is 30000/1001, as 23.976 and 59.94 are."""
        if self.fps is None:
            return None
        whole = round(self.fps)
        return Fraction(1000 * whole, 1001) if abs(self.fps - whole / 1.001) < 5e-4 else Fraction(str(self.fps))

    @property
    def fusion(self) -> FusionSettings:
        return FusionSettings(**{name: getattr(self, name) for name in _FUSION})

    @property
    def store(self) -> StoreSettings:
        return StoreSettings(self.memory, self.place, self.budget_gb, self.precision, self.keep_steps, self.max_tokens)

    @property
    def keys(self) -> KeyFrames:
        return KeyFrames(self.key_frames, self.key_frames_least_channels)

    def prompt_edit(self, tokenizer: Any) -> PromptEdit:
        """The prompt pair; blend words not given are the words that change."""
        blend = None
        if self.fusion.blends:
            changed = changed_words(self.source, self.target)
            blend = (list(self.blend_source or changed[0]), list(self.blend_target or changed[1]))
            if self.fusion.masks_by_prompts:
                blend = blend if any(blend) else None
            elif not blend[0] or (self.blend_latents and not blend[1]):
                raise ConfigError(
                    "blending needs words to blend: no word of the source changes, so give --blend-source and "
                    f"--blend-target ({self.source!r} / {self.target!r})"
                )
        return PromptEdit(self.source, self.target, tokenizer, self.mode, blend, dict(self.reweight))  # type: ignore[arg-type]


_MASKED = {"blend_latents": True, "blend_latents_until": 1.0, "mask_from": "prompts", "separate_words": 0.7}
PRESETS: dict[str, dict[str, Any]] = {
    "style": {"cross_replace_steps": 0.7, "self_replace_steps": 0.8},
    "attribute": {"cross_replace_steps": 0.7, "self_replace_steps": 0.8},
    "shape": {
        "cross_replace_steps": 0.5,
        "self_replace_steps": 0.5,
        "blend_self_attention": True,
        "blend_threshold": 0.3,
    },
    "style+": {"guidance_scale": 5.0, "cross_replace_steps": 0.9, "self_replace_steps": 0.9},
    "attribute+": {
        "guidance_scale": 5.0,
        "cross_replace_steps": 0.9,
        "self_replace_steps": 0.8,
        "blend_threshold": 0.2,
        **_MASKED,
    },
    "shape+": {
        "guidance_scale": 5.0,
        "cross_replace_steps": 0.4,
        "self_replace_steps": 0.3,
        "blend_self_attention": True,
        "blend_threshold": 0.15,
        **_MASKED,
    },
}
"""style, attribute and shape are the paper's settings: t_c = 0.3T, t_s = 0.2T, tau = 1 (so no blending) for
style and attribute; t_c = t_s = 0.5T, tau = 0.3 for shape. Those with a plus are what the benchmark found better
(`benchmarks/QUALITY.md`): less guidance, latents kept to the last outside a mask of both prompts, fewer looks
inside of it at words of elsewhere, and other shares of steps."""


def preset_fusion(preset: str) -> FusionSettings:
    """A preset's fusion alone, without its guidance."""
    return FusionSettings(**{name: value for name, value in PRESETS[preset].items() if name in _FUSION})


_KINDS: dict[str, Any] = get_type_hints(EditConfig)
_AUTHORS_MARKS = ("editing_config", "validation_sample_logger_config", "dataset_config")
_OLDER_MARKS = ("train_dataset", "validation_data", "validation_sample_logger")


def changed_words(source: str, target: str) -> tuple[list[str], list[str]]:
    """The words only the source has, and those only the target has, in order."""
    a, b = source.split(), target.split()
    moves = difflib.SequenceMatcher(None, [w.lower() for w in a], [w.lower() for w in b], autojunk=False).get_opcodes()
    changed = [move for move in moves if move[0] == "replace"] or [move for move in moves if move[0] != "equal"]
    return [w for _, i, j, _, _ in changed for w in a[i:j]], [w for _, _, _, i, j in changed for w in b[i:j]]


_OF_PRESETS = {name for preset in PRESETS.values() for name in preset} | {"mode"}
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
    unknown = sorted(str(name) for name in values if name not in _KINDS)
    if unknown:
        near = difflib.get_close_matches(unknown[0], _KINDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown setting {', '.join(map(repr, unknown))}{hint}")
    found = {name: _fitted(_plain_value(value, _KINDS[name]), _KINDS[name]) for name, value in values.items()}
    for name, value in found.items():
        if value is _WRONG:
            raise ConfigError(f"{name} is {values[name]!r}; it must be {_said(_KINDS[name])}")
    for name in ("start", "end"):
        if isinstance(found.get(name), str):
            try:
                seconds_of(found[name])
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
    for name in ("video", "source", "target", "model"):
        if isinstance(found.get(name), str) and name in values and not found[name].strip():
            raise ConfigError(f"{name} is {values[name]!r}; it must not be blank")
    return found


_WRONG = object()


def _plain_value(value: Any, kind: Any) -> Any:
    """A single word or number where a list of them may stand."""
    several = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    return (value,) if several and isinstance(value, (str, int)) else value


def _fitted(value: Any, kind: Any) -> Any:
    """A value of a kind, or `_WRONG`."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
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
    if origin in (Union, UnionType):
        return " or ".join(_said(one) for one in inner)
    if origin is tuple and inner[-1] is Ellipsis:
        return f"a list, each {_said(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}, each {_said(inner[0])}"
    if origin is Mapping:
        return f"pairs of {_said(inner[0])} and {_said(inner[1])}"
    return {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}.get(kind, "empty")


_NOTHING_BLENDED = "nothing is blended (blend_self_attention, blend_latents)"
_NO_EFFECT: tuple[tuple[tuple[str, ...], Callable[[EditConfig], bool], str], ...] = (
    (("precision", "keep_steps"), lambda c: c.memory == "recompute", "memory recompute keeps no attention"),
    (
        ("blend_source", "blend_target", "blend_threshold", "mask_from", "mask_tokens"),
        lambda c: not c.fusion.blends,
        _NOTHING_BLENDED,
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
    """The edits of a YAML file, and notes on what was left out of it.

    Reads our own files (the fields of `EditConfig`, and `preset`) and the authors' files as
    they are, one edit for each of their prompts. texts: a `source` or `target` given elsewhere, in the place of
    the file's. preset: one given elsewhere, over all the file says of what presets speak of; the file's own
    preset stands beneath its other settings. Raises ConfigError naming the file and an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    texts = dict(texts or {})
    with _naming(path):
        data = _yaml(path)
        if not isinstance(data, Mapping):
            raise ConfigError("holds no settings")
        if any(mark in data for mark in _OLDER_MARKS):
            raise ConfigError(
                "is in the authors' older layout (train_dataset); dataset_config and editing_config are read"
            )
        if any(mark in data for mark in _AUTHORS_MARKS):
            configs, notes = authors_configs(data)
            configs = [replace(config, **texts) for config in configs]
        else:
            values = dict(data)
            own = values.pop("preset", None)
            if own is not None and not isinstance(own, str):
                raise ConfigError(f"preset is {own!r}; it must be text")
            given = checked(values)
            config = replace(EditConfig(**given), **texts)
            if own is not None:
                config = replace(with_preset(config, own), **given | texts)
            configs, notes = [config], []
        if preset is not None:
            configs = [with_preset(config, preset) for config in configs]
    return configs, notes


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of a file, with its name."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


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
