"""Settings of an edit: presets, YAML files, and the authors' configuration files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .attention.budget import StoreSettings
from .attention.fusion import FusionSettings
from .attention.key_frames import KeyFrames
from .attention.prompt import PromptEdit


class ConfigError(ValueError):
    """A setting that is unknown, of the wrong kind, or missing."""


_FUSION = {f.name for f in fields(FusionSettings)}


@dataclass(frozen=True)
class EditConfig:
    """Every setting of `fatezero edit`; the names are those of the flags and of the YAML keys.

    count: how many frames; 0 for all, None for as many as there are up to eight.
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
    start: int = 0
    stride: int = 1
    count: int | None = None
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    size: tuple[int, int] | None = None

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


_KINDS = {f.name: f for f in fields(EditConfig)}
_AUTHORS_MARKS = ("editing_config", "validation_sample_logger_config", "dataset_config")


def changed_words(source: str, target: str) -> tuple[list[str], list[str]]:
    """The words only the source has, and those only the target has, in order."""
    a, b = source.split(), target.split()
    moves = difflib.SequenceMatcher(None, [w.lower() for w in a], [w.lower() for w in b], autojunk=False).get_opcodes()
    changed = [move for move in moves if move[0] == "replace"] or [move for move in moves if move[0] != "equal"]
    return [w for _, i, j, _, _ in changed for w in a[i:j]], [w for _, _, _, i, j in changed for w in b[i:j]]


def with_preset(config: EditConfig, preset: str) -> EditConfig:
    """A configuration with a preset's settings over its own.

    The shape preset maps word to word where both prompts have equally many words, and
    refines where they have not. Raises ConfigError for an unknown preset.
    """
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} is unknown: use one of {', '.join(PRESETS)}")
    config = replace(config, **PRESETS[preset])
    if preset.startswith("shape") and len(config.source.split()) == len(config.target.split()):
        config = replace(config, mode="replace")
    return config


def checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by setting name, with lists made tuples; ConfigError naming what is wrong."""
    unknown = sorted(set(values) - set(_KINDS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], _KINDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"unknown setting {', '.join(map(repr, unknown))}{hint}")
    return {name: _checked(name, value) for name, value in values.items()}


def _checked(name: str, value: Any) -> Any:
    kind = str(_KINDS[name].type)
    base = kind.split(" ")[0].split("[")[0]
    if isinstance(value, list):
        value = tuple(value)
    if kind.startswith("tuple[str") and isinstance(value, (str, int)):
        value = (value,)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    right = {
        "str": isinstance(value, str),
        "int": isinstance(value, int) and number,
        "float": number,
        "bool": isinstance(value, bool),
        "tuple": isinstance(value, tuple),
        "Mapping": isinstance(value, Mapping),
    }
    if not (right[base] or (value is None and "None" in kind)):
        raise ConfigError(f"{name} is {value!r}; it must be of kind {kind}")
    return value


def load_configs(path: str | Path) -> tuple[list[EditConfig], list[str]]:
    """The edits of a YAML file, and notes on what was left out of it.

    Reads our own files (the fields of `EditConfig`, and `preset`) and the authors' files as
    they are, one edit for each of their prompts. Raises ConfigError naming an unknown key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} holds no settings")
    if any(mark in data for mark in _AUTHORS_MARKS):
        return authors_configs(data)
    values = dict(data)
    preset = values.pop("preset", None)
    config = EditConfig(**checked(values))
    return [replace(with_preset(config, preset), **checked(values)) if preset else config], []


def load_pairs(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Pairs of captions of a YAML list; ConfigError for anything else."""
    try:
        held = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    right = isinstance(held, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in held
    )
    if not right or not held:
        raise ConfigError(f"{path} must be a list of [source caption, target caption]")
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
    dataset, editing, model = (dict(data.get(k) or {}) for k in ("dataset_config", "editing_config", "model_config"))
    if not editing.get("editing_prompts"):
        raise ConfigError("editing_config.editing_prompts is missing")
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
    offset = {"left": 0, "top": 0, "right": 0, "bottom": 0} | dict(dataset.get("offset") or {})
    count = int(dataset.get("n_sample_frame", 8))
    base = EditConfig(
        video=str(dataset.get("path", "")),
        source=str(dataset.get("prompt", "")),
        model=str(data.get("pretrained_model_path", "demo")),
        steps=int(editing.get("num_inference_steps", 50)),
        guidance_scale=float(editing.get("guidance_scale", 7.5)),
        key_frames=tuple(
            _KEY_FRAME_NAMES.get(entry, entry) for entry in model.get("SparseCausalAttention_index", [-1, "first"])
        )
        or ("self",),
        key_frames_least_channels=int(model.get("least_sc_channel", 0)),
        clip_norm=True,
        max_tokens=1024,
        start=int(dataset.get("start_sample_frame") or 0),
        stride=int(dataset.get("sampling_rate", 1)),
        count=max(count, 0),
        crop=(int(offset["left"]), int(offset["top"]), int(offset["right"]), int(offset["bottom"])),
        size=(512, 512),
    )
    controls = editing.get("p2p_config") or {}
    edits = []
    for i, target in enumerate(editing["editing_prompts"]):
        where = f"editing_config.p2p_config[{i}]"
        control = dict(controls.get(i, controls.get(str(i))) or {})
        edits.append(_authors_edit(replace(base, target=str(target)), control, where, notes))
    return edits, notes


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
    weights = control.get("eq_params") or {"words": [], "values": []}
    reweight = {
        word: float(value)
        for word, value in zip(weights["words"], weights["values"], strict=False)
        if _present(word, base.target, where, notes)
    }
    words = [*(control.get("blend_words") or ()), (), ()][:2]  # the target's may be missing
    blend = [
        tuple(w for w in side if _present(w, prompt, where, notes))
        for side, prompt in zip(words, (base.source, base.target), strict=True)
    ]
    blends = bool(blend[0])
    if control.get("blend_self_attention") and not blends:
        notes.append(f"{where}: without blend_words all self-attention comes from the source")
    return replace(
        base,
        mode="replace" if control.get("is_replace_controller") else "refine",
        cross_replace_steps=float(shares),
        self_replace_steps=float(control.get("self_replace_steps", 0.8)),
        reweight=reweight,
        blend_source=blend[0] if blends else (),
        blend_target=blend[1] if blends else (),
        blend_self_attention=bool(control.get("blend_self_attention")) and blends,
        blend_latents=bool(control.get("blend_latents")) and blends,
        blend_threshold=float((control.get("blend_th") or [0.3])[0]),
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
