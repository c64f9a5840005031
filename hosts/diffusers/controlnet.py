"""ControlNets on a diffusers UNet (arXiv 2302.05543), with a picture per frame."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor

from ...files.safetensors import is_pointer
from ...store.identity import IdentityCache, ModelIdentity
from .model_files import CheckpointError, as_checkpoint_error, check_weights, from_hub

_IDENTITIES = IdentityCache()


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet and its pictures, one per frame of the clip.

    frames: uint8 (f, h, w, 3), of the clip's size. strength: factor of its output; at 0 it is not called. start, end:
    the range of steps in which it acts, as shares of the training timesteps from noise to clip.
    """

    model: Any
    frames: Tensor
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def acts(self, timestep: float, total: int) -> bool:
        """Whether it acts at a timestep."""
        return self.strength != 0 and self.start <= 1 - timestep / total <= self.end

    @property
    def controlled(self) -> str:
        """Identifies the pictures and settings, besides the ControlNet's weights."""
        pictures = hashlib.sha256(self.frames.contiguous().numpy().data).hexdigest()[:16]
        return f"ControlNet of {pictures} x{self.strength:g} from {self.start:g} to {self.end:g}"

    def with_identity(self, unet: ModelIdentity) -> ModelIdentity:
        """The identity of a UNet with this ControlNet."""
        if self.strength == 0:
            return unet
        own = _IDENTITIES.of(self.model, "ControlNet", self.model.dtype, self.model.state_dict())
        digest = hashlib.sha256(f"{unet.digest} {own.digest}".encode()).hexdigest()
        return replace(
            unet, layout=f"{unet.layout} {self.controlled}", digest=digest, traces=(*unet.traces, *own.traces)
        )

    def residuals(
        self, latents: Tensor, timestep: float, text: Tensor, extras: dict[str, Tensor], indices: tuple[int, ...]
    ) -> dict[str, Any]:
        """Additional inputs of a UNet call, for the clip's frames at some indices; text (1, tokens, dim)."""
        pictures = self.frames[list(indices)].movedim(-1, 1).to(latents.device, latents.dtype) / 255
        down, mid = self.model(
            latents,
            timestep,
            encoder_hidden_states=text.expand(len(latents), -1, -1),
            controlnet_cond=pictures,
            conditioning_scale=self.strength,
            added_cond_kwargs=extras or None,
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def load_controlnet(name: str, unet: Any, factor: int, variant: str | None = None) -> Any:
    """A ControlNet of a diffusers folder, a hub name or a single `.safetensors` file, for a UNet.

    factor: pixels of a latent's side. Raises CheckpointError for one that does not fit the UNet.
    """
    path = Path(name)
    with as_checkpoint_error(name):
        if path.is_file():
            if is_pointer(path):
                raise CheckpointError(f"{path} is a Git LFS pointer: run `git lfs pull` to fetch the weights")
            model = _single_file(path, unet)
        else:
            if path.is_dir() and not (path / "config.json").is_file():
                raise CheckpointError(f"{path} is not a ControlNet of diffusers: it has no config.json")
            load = partial(ControlNetModel.from_pretrained, torch_dtype=unet.dtype, variant=variant or None)
            if path.is_dir():
                check_weights(path.parent, {path.name: ("diffusers", "ControlNetModel")}, variant)
                model = load(name, local_files_only=True)
            else:
                model = from_hub(name, load)
    _check_fits(name, model, unet, factor)
    return model.to(unet.device).eval().requires_grad_(False)


def _single_file(path: Path, unet: Any) -> Any:
    """A ControlNet in a single file, with the UNet's configuration."""
    with tempfile.TemporaryDirectory() as folder:
        with torch.device("meta"):
            like = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        like.save_config(folder)
        return ControlNetModel.from_single_file(str(path), config=folder, torch_dtype=unet.dtype, local_files_only=True)


_SAME = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim", "addition_embed_type")


def _check_fits(name: str, model: Any, unet: Any, factor: int) -> None:
    """Raise CheckpointError for a ControlNet of another kind of UNet, or with unsupported inputs."""
    missing = sorted(key for key, weight in model.named_parameters() if weight.is_meta)
    if missing:
        raise CheckpointError(f"the ControlNet {name} has missing weights: {missing[0]} and {len(missing) - 1} more")
    for key in _SAME:
        own, theirs = (_listed(config.get(key)) for config in (model.config, unet.config))
        if own != theirs:
            raise CheckpointError(
                f"the ControlNet {name} is for another kind of model: its {key} is {own}, the UNet's {theirs}"
            )
    if model.config.get("global_pool_conditions"):
        raise CheckpointError(f"the ControlNet {name} pools its pictures (shuffle) and cannot follow frames")
    shrunk = 2 ** (len(model.config["conditioning_embedding_out_channels"]) - 1)
    if shrunk != factor:
        raise CheckpointError(f"the ControlNet {name} downscales pictures by {shrunk}, the model by {factor}")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
