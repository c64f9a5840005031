"""The authors' configuration files, converted to edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...attention.prompt import bare
from ...settings import shown
from .fitting import WRONG, fitted, in_words
from .settings import ConfigError, EditConfig

_FILE = {"pretrained_model_path", "dataset_config", "editing_config", "model_config"}
_DATASET = {"path", "prompt", "n_sample_frame", "sampling_rate", "start_sample_frame", "offset"}
_EDITING = {
    "editing_prompts", "p2p_config", "guidance_scale", "num_inference_steps", "source_prompt",
    "use_inversion_attention",
}  # fmt: skip
_MODEL = {"SparseCausalAttention_index", "least_sc_channel"}
_PROMPT2PROMPT = {
    "is_replace_controller", "cross_replace_steps", "self_replace_steps", "eq_params", "blend_words",
    "blend_self_attention", "blend_latents", "blend_th", "use_inversion_attention",
}  # fmt: skip
_SILENT = {
    "seed", "clip_length", "sample_seeds", "prompt2prompt_edit", "annotate", "use_invertion_latents",
    "test_pipeline_config", "disk_store",
    "stride",  # of the windows of the tuning set
    "lora",  # rank of the authors' temporal layers, which are the identity in an untuned model
}  # fmt: skip
_TUNING = {
    "train_steps", "validation_steps", "checkpointing_steps", "trainer_pipeline_config", "learning_rate",
    "train_temporal_conv", "mixed_precision", "gradient_checkpointing", "enable_xformers", "class_data_root",
    "class_data_prompt", "strength",
}  # fmt: skip
_KEY_FRAME_NAMES = {"mid": "middle", "first": "first", "last": "last"}


def authors_configs(data: Mapping[str, Any]) -> tuple[list[EditConfig], list[str]]:
    """The authors' configuration as edits, one for each entry of `editing_prompts`, and notes on ignored parts.

    Uses their defaults: GroupNorm over the clip, fusion in layers of up to 32x32 tokens, keys of the previous and the
    first frame. Like their code, ignores words that are not in the prompt, with a note.
    """
    file = _Section(data, "", [])
    file.check_keys(_FILE)
    editing = file.section("editing_config")
    targets = editing.data.get("editing_prompts")
    targets = [targets] if isinstance(targets, str) else targets
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ConfigError("editing_config.editing_prompts must be a list of prompts")
    base = _base(file, file.section("dataset_config"), editing, file.section("model_config"))
    controls = editing.data.get("p2p_config") or {}
    controls = dict(enumerate(controls)) if isinstance(controls, list) else controls
    if not isinstance(controls, Mapping):
        raise ConfigError(f"editing_config.p2p_config is {shown(controls)}; it must have a section for each prompt")
    edits = []
    for i, target in enumerate(targets):
        own, where = controls.get(i, controls.get(str(i))) or {}, f"editing_config.p2p_config[{i}]"
        edits.append(_edit(replace(base, target=target), _Section(own, where, file.notes)))
    return edits, file.notes


@dataclass(frozen=True)
class _Section:
    """A section of the file. where: its name there. notes: on ignored parts."""

    data: Mapping[str, Any]
    where: str
    notes: list[str]

    def __post_init__(self) -> None:
        if not isinstance(self.data, Mapping):
            raise ConfigError(f"{self.where} is {shown(self.data)}; it must be a section")

    def name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def section(self, key: str) -> _Section:
        """The section of a key; empty if it is missing."""
        return _Section(self.data.get(key) or {}, self.name(key), self.notes)

    def value(self, key: str, default: Any, kind: Any) -> Any:
        """A value of a type; the default if it is missing or null. Raises ConfigError, naming the key."""
        return self.typed(key, default if self.data.get(key) is None else self.data[key], kind)

    def typed(self, key: str, value: Any, kind: Any) -> Any:
        """The value of a key as a type. Raises ConfigError, naming the key."""
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        if fitted(value, kind) is WRONG:
            raise ConfigError(f"{self.name(key)} is {shown(value)}; it must be {in_words(kind)}")
        return kind(value)

    def check_keys(self, names: set[str]) -> None:
        """Raise ConfigError for an unknown key; add a note for keys of the authors' tuning."""
        for key in self.data:
            if key in _TUNING:
                self.notes.append(f"{self.name(key)}: belongs to tuning, left out")
            elif key not in names | _SILENT:
                raise ConfigError(f"unknown key {self.name(key)}")

    def present(self, word: str, prompt: str) -> bool:
        """Whether a prompt has a word; adds a note if not."""
        found = bare(word) in map(bare, prompt.split())
        if not found:
            self.notes.append(f"{self.where}: {shown(word)} is not in {shown(prompt)}, left out")
        return found


def _base(file: _Section, dataset: _Section, editing: _Section, model: _Section) -> EditConfig:
    """The common settings of all edits of a file."""
    dataset.check_keys(_DATASET)
    editing.check_keys(_EDITING)
    model.check_keys(_MODEL)
    offset = dataset.section("offset")
    left, top, right, bottom = (offset.value(side, 0, int) for side in ("left", "top", "right", "bottom"))
    entries = model.data.get("SparseCausalAttention_index", [-1, "first"])
    if fitted(entries, tuple[int | str, ...]) is WRONG:
        raise ConfigError(f"model_config.SparseCausalAttention_index is {shown(entries)}; it must be a list")
    return EditConfig(
        video=dataset.value("path", "", str),
        source=dataset.value("prompt", "", str),
        model=file.value("pretrained_model_path", "demo", str),
        steps=editing.value("num_inference_steps", 50, int),
        guidance_scale=editing.value("guidance_scale", 7.5, float),
        key_frames=tuple(_KEY_FRAME_NAMES.get(str(entry), entry) for entry in entries) or ("self",),
        key_frames_least_channels=model.value("least_sc_channel", 0, int),
        clip_norm=True,
        max_tokens=1024,
        start=dataset.value("start_sample_frame", 0, int),
        stride=dataset.value("sampling_rate", 1, int),
        count=max(dataset.value("n_sample_frame", 8, int), 0),
        crop=(left, top, right, bottom),
        size=(512, 512),
    )


def _edit(base: EditConfig, control: _Section) -> EditConfig:
    """One edit of a file; without its own section the authors' plain DDIM pipeline, without fusion."""
    if not control.data:
        return replace(base, cross_replace_steps=0.0, self_replace_steps=0.0)
    control.check_keys(_PROMPT2PROMPT)
    of_source, of_target = _blend_words(base, control)
    blends = bool(of_source)
    if control.data.get("blend_self_attention") and not blends:
        control.notes.append(f"{control.where}: without blend_words all self-attention comes from the source")
    thresholds = control.data.get("blend_th") or [0.3]
    threshold = thresholds[0] if isinstance(thresholds, list) else thresholds
    return replace(
        base,
        mode="replace" if control.data.get("is_replace_controller") else "refine",
        cross_replace_steps=_share_of_cross(control),
        self_replace_steps=control.value("self_replace_steps", 0.8, float),
        reweight=_weights(base, control),
        blend_source=of_source,
        blend_target=of_target if blends else (),
        blend_self_attention=bool(control.data.get("blend_self_attention")) and blends,
        blend_latents=bool(control.data.get("blend_latents")) and blends,
        blend_threshold=control.typed("blend_th", 0.3 if threshold is None else threshold, float),
    )


def _share_of_cross(control: _Section) -> float:
    share = control.data.get("cross_replace_steps")
    if isinstance(share, Mapping):
        if set(share) != {"default_"}:
            name = control.name("cross_replace_steps")
            raise ConfigError(f"{name}: shares of single words are not supported: {shown(dict(share))}")
        share = share["default_"]
    return float(control.typed("cross_replace_steps", 0.8 if share is None else share, float))


def _weights(base: EditConfig, control: _Section) -> dict[str, float]:
    data = control.section("eq_params").data
    words = fitted(data.get("words", ()), tuple[str, ...])
    factors = fitted(data.get("values", ()), tuple[float, ...])
    if WRONG in (words, factors) or len(words) != len(factors):
        raise ConfigError(f"{control.name('eq_params')} must have `words` and as many `values`")
    pairs = zip(words, factors, strict=True)
    return {word: float(factor) for word, factor in pairs if control.present(word, base.target)}


def _blend_words(base: EditConfig, control: _Section) -> list[tuple[str, ...]]:
    """The blend words of the source and of the target; the latter may be missing."""
    given = control.data.get("blend_words")
    words = fitted(given or (), tuple[tuple[str, ...] | str, ...])
    if words is WRONG:
        name = control.name("blend_words")
        raise ConfigError(f"{name} is {shown(given)}; it must be [source words, target words]")
    sides = [(side,) if isinstance(side, str) else side for side in [*words, (), ()][:2]]
    prompts = (base.source, base.target)
    return [tuple(w for w in side if control.present(w, prompt)) for side, prompt in zip(sides, prompts, strict=True)]
