"""TokenFlow's configuration files (`config_pnp.yaml`, `config_sdedit.yaml`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....recipes.presets import PRESETS
from ..settings import ConfigError
from .keys import AuthorsFile, Key, Keys, merged

_MODELS = {
    "2.1": "stabilityai/stable-diffusion-2-1-base",
    "2.0": "stabilityai/stable-diffusion-2-base",
    "1.5": "runwayml/stable-diffusion-v1-5",
}
FILE: Keys = (
    Key("data_path", str, edit="video"),
    Key("n_frames", int, 40, "count", about="cut to whole batches", read=None),
    Key("sd_version", str, edit="model", about="one of 2.1, 2.0 and 1.5, by its hub name; for others give --model",
        read=_MODELS.get, only=tuple(_MODELS)),
    Key("prompt", str, edit="target"),
    Key("negative_prompt", str, edit="negative"),
    Key("guidance_scale", float, edit="guidance_scale"),
    Key("n_timesteps", int, edit="steps"),
    Key("n_inversion_steps", int, edit="inversion_steps"),
    Key("batch_size", int, 8, "tokenflow.batch_frames"),
    Key("seed", int, 1, "tokenflow.seed"),
    Key("pnp_attn_t", float, edit="pnp.attention_steps"),
    Key("pnp_f_t", float, edit="pnp.feature_steps"),
    Key("start", float, edit="strength", read=None, about="one step less than this share of them, as there"),
    Key("use_ddim_noise", bool, True, "sdedit_seed", read=None, about="False: noise of `seed`"),
    Key("device", only=("cuda",), about="remove it, and give --device"),
    Key("latents_path", about="clips are inverted with each edit; `fatezero invert` keeps a store"),
    Key("output_path", about="give --output"),
)  # fmt: skip
SECTIONS: dict[str, Keys] = {"": FILE}


def edits(file: AuthorsFile, source: str | None, target: str | None) -> list[dict[str, Any]]:
    """The one edit of a file: TokenFlow with Plug-and-Play, or on its own with a later start (SDEdit)."""
    top = file.section((), FILE)
    own: dict[str, Any] = {"key_frames": ("self",), "injection": "none", "propagation": "tokenflow"}
    frames, batch = top.value("n_frames"), top.value("batch_size")
    if not 0 < batch <= frames:
        raise ConfigError(f"batch_size is {batch}; it must be between 1 and n_frames, {frames}")
    own["count"] = frames // batch * batch
    if top.has("pnp_attn_t") or top.has("pnp_f_t"):
        own = merged(own, PRESETS["tokenflow"])
    if not top.value("use_ddim_noise"):
        own["sdedit_seed"] = max(1, top.value("seed"))
    steps = top.value("n_timesteps") or 50
    if top.has("start") and (left := -int(1 - top.value("start") * steps)) > 0:
        own["strength"] = left / steps
    return [merged(own, top.settings(), {"source": source} if source else {}, {"target": target} if target else {})]


def tuning(file: AuthorsFile) -> Mapping[str, Any]:
    raise ConfigError("TokenFlow needs no tuning: use this file with `fatezero edit --config`")
