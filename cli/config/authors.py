"""The authors' configuration files, read as edits of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...attention.prompt import bare
from ...settings import shown
from .fitting import WRONG, fitted, in_words
from .settings import ConfigError, EditConfig

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
    if fitted(entries, tuple[int | str, ...]) is WRONG:
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
    if fitted(value, kind) is WRONG:
        raise ConfigError(f"{where + '.' if where else ''}{key} is {shown(value)}; it must be {in_words(kind)}")
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
        fitted(weights.get("words", ()), tuple[str, ...]),
        fitted(weights.get("values", ()), tuple[float, ...]),
    )
    if WRONG in (of_words, factors) or len(of_words) != len(factors):
        raise ConfigError(f"{where}.eq_params must have `words` and as many `values`")
    reweight = {
        word: float(factor)
        for word, factor in zip(of_words, factors, strict=True)
        if _present(word, base.target, where, notes)
    }
    words = fitted(control.get("blend_words") or (), tuple[tuple[str, ...] | str, ...])
    if words is WRONG:
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
