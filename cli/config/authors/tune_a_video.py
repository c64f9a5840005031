"""Tune-A-Video's configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ....files.temporal_layers import FILE as LAYERS
from ....recipes.presets import PRESETS
from ....settings import shown
from ..settings import ConfigError
from .keys import REFUSED, TRAINER, AuthorsFile, Key, Keys, Section, merged

_TRAINED = ["attn1.to_q", "attn2.to_q", "attn_temp"]
FILE: Keys = (
    Key("pretrained_model_path", str, edit="model", tune="model"),
    Key("output_dir", str, edit="temporal", tune="output", read=None,
        about="edit: the layers that `fatezero tune` wrote there, if any"),
    Key("train_data", edit="see below", tune="see below", read=None),
    Key("validation_data", edit="see below", tune="see below", read=None),
    Key("validation_steps", int, 100, tune="validate_every"),
    Key("trainable_modules", only=(_TRAINED,), about=f"write {', '.join(_TRAINED)}"),
    Key("max_train_steps", int, 500, tune="steps"),
    Key("checkpointing_steps", int, 500, tune="keep_every", about="a state for --resume; layers come at the end"),
    Key("resume_from_checkpoint", only=REFUSED, about="remove it, and give --resume"),
    Key("use_8bit_adam", bool, False, tune="optimizer", read=lambda on: "adamw8bit" if on else "adamw",
        about="True: adamw8bit"),
    Key("enable_xformers_memory_efficient_attention", about="saves memory only"),
    Key("seed", int, tune="seed"),
    *TRAINER,
)  # fmt: skip
TRAIN: Keys = (
    Key("video_path", str, edit="video", tune="video"),
    Key("prompt", str, tune="prompt", about="edit: the clip is inverted under the empty prompt"),
    Key("n_sample_frames", int, 8, "count", "count"),
    Key("width", int, 512, "size", "size", "scaled to cover it and cropped, where there the aspect changes", read=None),
    Key("height", int, 512, "size", "size", "the same", read=None),
    Key("sample_start_idx", int, 0, "start", "start"),
    Key("sample_frame_rate", int, 1, "stride", "stride"),
)
VALIDATION: Keys = (
    Key("prompts", tuple[str, ...], edit="target", tune="validate", read=None, about="edit: an edit for each"),
    Key("video_length", int, edit="count", tune="count", read=None, about="must be train_data.n_sample_frames"),
    Key("width", int, edit="size", tune="size", read=None, about="must be train_data.width"),
    Key("height", int, edit="size", tune="size", read=None, about="must be train_data.height"),
    Key("num_inference_steps", int, 50, "steps", "validate_steps"),
    Key("num_inv_steps", int, edit="steps", tune="validate_steps", read=None, about="must be num_inference_steps"),
    Key("guidance_scale", float, 7.5, "guidance_scale", "validate_guidance"),
    Key("use_inv_latent", only=(True,), about="clips are sampled from the inverted noise: write True"),
    Key("negative_prompt", str, edit="negative"),
    Key("eta", only=(0,), about="sampling is deterministic: write 0"),
)
SECTIONS: dict[str, Keys] = {"": FILE, "train_data": TRAIN, "validation_data": VALIDATION}


def edits(file: AuthorsFile, source: str | None, target: str | None) -> list[dict[str, Any]]:
    """An edit for each validation prompt, as in preset tune_a_video, with the layers of an earlier tuning."""
    base, top, _, validation = _read(file)
    given = validation.value("prompts") or ()
    if not (target or given):
        raise ConfigError("validation_data.prompts is missing: give the edits' prompts, or --target")
    folder = Path(top.value("output_dir") or ".")
    if top.has("output_dir") and (folder / LAYERS).is_file():
        base["temporal"] = str(folder)
    else:
        file.notes.append(
            "these edits are of a tuned model: run `fatezero tune --config` first, or give --temporal or --model"
        )
    usual = {**PRESETS["tune_a_video"], **({"source": source} if source else {})}
    return [merged(usual, base, {"target": prompt}) for prompt in ([target] if target else given)]


def tuning(file: AuthorsFile) -> Mapping[str, Any]:
    """The tuning of a file, with its validation clips."""
    base, top, _, validation = _read(file)
    prompts = validation.value("prompts") or ()
    if not prompts:
        base = {name: value for name, value in base.items() if not name.startswith("validate")}
    own = {"output": top.value("output_dir")} if top.has("output_dir") else {}
    return base | own | ({"validate": prompts} if prompts else {})


def _read(file: AuthorsFile) -> tuple[dict[str, Any], Section, Section, Section]:
    top, train, validation = (file.section((name,) if name else (), keys) for name, keys in SECTIONS.items())
    pairs = (
        (validation, "video_length", train, "n_sample_frames"),
        (validation, "width", train, "width"),
        (validation, "height", train, "height"),
        (validation, "num_inv_steps", validation, "num_inference_steps"),
    )
    for section, name, other, same in pairs:
        value, expected = section.value(name), other.value(same)
        if value not in (None, expected):
            raise ConfigError(f"{section.name(name)} is {shown(value)}; it must be {other.name(same)}, {expected}")
    size = {"size": (train.value("width"), train.value("height"))}
    return merged(top.settings(), train.settings(), validation.settings(), size), top, train, validation
