"""Loading of models from folders, single files and hub names into diffusers' pipelines, with checks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from socket import getaddrinfo
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open

from ...files.bundled import DEMO
from ...files.safetensors import is_pointer
from .families import family_of
from .temporal import inflated_unet

EDITED = "SD 1.x, SD 2.x, SDXL, Wan (text to video, image to video, VACE), LTX-2, Qwen-Image or Flux"
"""The models that FateZero edits."""
_AS_FOLDERS = ("Wan", "Qwen-Image", "Flux")
"""The beginnings of families, see `family_of`, that load from folders only."""
T = TypeVar("T")


class CheckpointError(ValueError):
    """A model that cannot be loaded or is not supported."""


# --- folders and hub names ------------------------------------------------------------------


def opened(name: str, load: Callable[..., T]) -> T:
    """Call `load` on a diffusers folder, or on a hub name, which may download; CheckpointError for anything else."""
    path = DEMO if name == "demo" else Path(name)
    if path.is_dir() and not (path / "model_index.json").is_file():
        if (path / "modular_model_index.json").is_file():
            raise CheckpointError(
                f"{path} is a modular pipeline (MiniMax H3), which the command does not load: use ComfyUI, "
                "or the transformer in Python"
            )
        raise CheckpointError(f"{path} is not a diffusers checkpoint: it has no model_index.json")
    if not path.is_dir():
        return from_hub(name, load)
    with as_checkpoint_error(name):
        return load(path, local_files_only=True)


def from_hub(name: str, load: Callable[..., T]) -> T:
    """Call `load` on a hub name, downloaded or from the cache; CheckpointError for neither."""
    check_hub_name(name)
    if hub_is_online():
        with as_checkpoint_error(name):
            return load(name)
    try:
        return load(name, local_files_only=True)
    except _DAMAGED as error:
        raise CheckpointError(
            f"{name!r} is neither a folder nor in the cache, and {constants.ENDPOINT} is offline: check the name or "
            "the network"
        ) from error


def in_cache(name: str) -> bool:
    """Whether a hub model is on this machine, as far as its configuration tells."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def hub_is_online() -> bool:
    """Whether the hub's address resolves, or a proxy is set; otherwise libraries would retry every file."""
    if constants.HF_HUB_OFFLINE or getproxies():
        return True
    try:
        return bool(getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None))
    except OSError:
        return False


def check_hub_name(name: str) -> None:
    """Raise CheckpointError for an invalid hub name, such as a path or a single word."""
    owner = name.partition("/")[0]
    hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not name.endswith((".safetensors", ".ckpt", ".pt", ".bin"))
    if not hub or owner in ("models", "datasets", "spaces") or Path(owner).is_dir() or Path(owner).is_symlink():
        raise CheckpointError(
            f"no model at {name}: give a diffusers folder, a .safetensors file or a hub name owner/name"
        )


@contextmanager
def as_checkpoint_error(name: str) -> Iterator[None]:
    """Turn errors of loading a model into CheckpointError with its name."""
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGED as error:
        text = " ".join(
            f"{'' if isinstance(error, (OSError, ValueError)) else type(error).__name__ + ': '}{error}".split()
        )
        raise CheckpointError(f"could not load the model {name!r}: {text[:400]}") from error


_DAMAGED = (
    OSError, ValueError, SafetensorError, UnpicklingError, KeyError, IndexError, TypeError, AttributeError,
    RuntimeError, ImportError, EOFError,
)  # fmt: skip
"""The libraries' errors for damaged folders."""


def kind_of(name: str) -> str:
    """The pipeline class of a diffusers folder or hub name; "" for a single file."""
    if Path(name).is_file():
        return ""
    return class_of(name, opened(name, DiffusionPipeline.load_config))


def class_of(name: str, index: dict[str, Any]) -> str:
    """The class of a pipeline from its index; CheckpointError for one with custom code."""
    found = index.get("_class_name", "")
    if isinstance(found, str):
        return found
    raise CheckpointError(
        f"{name} is a pipeline with custom code ({', '.join(map(str, found))}), which is not supported"
    )


def loaded(name: str, dtype: torch.dtype, config: str | None = None, variant: str | None = None) -> Any:
    """The pipeline of a model with a UNet, of any kind. variant: of the files in its folders, such as fp16."""
    if name != "demo" and Path(name).is_file():
        if variant:
            raise CheckpointError(f"variant has no effect: {name!r} is a single file")
        with as_checkpoint_error(name):
            return _single_file(Path(name), dtype, config)

    def load(where: Any, **local: Any) -> Any:
        index: dict[str, Any] = DiffusionPipeline.load_config(where, **local)
        unet = None
        if isinstance(where, Path):
            check_weights(where, index, variant)
            unet = inflated_unet(where / "unet", dtype) if "unet" in index else None
        if unet is not None:
            return StableDiffusionPipeline.from_pretrained(
                where, unet=unet, torch_dtype=dtype, safety_checker=None, **local
            )
        kind = class_of(name, index)
        if "unet" not in index:
            raise CheckpointError(f"{name} is a {kind}, which is not supported: use {EDITED}")
        if not hasattr(diffusers, kind):
            raise CheckpointError(
                f"{name} is a {kind}, which diffusers does not have: if its parts are Stable Diffusion's, set "
                "_class_name to StableDiffusionPipeline in its model_index.json"
            )
        return DiffusionPipeline.from_pretrained(
            where, torch_dtype=dtype, safety_checker=None, variant=variant or None, **local
        )

    return opened(name, load)


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<after>[\w-]+))?\.(?:safetensors|bin)"
)
"""Names of weight files, single or sharded."""


def check_weights(folder: Path, index: dict[str, Any], variant: str | None) -> None:
    """Raise CheckpointError for Git LFS pointers, for weights of another variant, and for invalid configurations."""
    variants = set[str]()
    for part, about in index.items():
        if not isinstance(about, (list, tuple)) or about[0] is None or part in ("safety_checker", "image_encoder"):
            continue
        for file in sorted((folder / part).glob("*.json")):
            try:
                json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise CheckpointError(f"{file} is not JSON: {error}") from error
        found: dict[str, list[Path]] = {}
        for file in sorted((folder / part).glob("*")):
            if match := _WEIGHTS.fullmatch(file.name):
                found.setdefault(match["variant"] or match["after"] or "", []).append(file)
        variants |= found.keys()
        if found and not variant and "" not in found:
            raise CheckpointError(
                f"{folder} has weights of its {part} only in a variant: give --variant {sorted(found)[0]}"
            )
        own = found.get(variant or "", found.get("", []))
        for file in [file for file in own if file.suffix == ".safetensors"] or own:
            if is_pointer(file):
                raise CheckpointError(f"{file} is a Git LFS pointer: run `git lfs pull` to fetch the weights")
    if variant and variants and variant not in variants:
        known = ", ".join(sorted(variants - {""})) or "none"
        raise CheckpointError(f"{folder} has no variant {variant!r}; its variants: {known}")


# --- supported models -----------------------------------------------------------------------

_CHANNELS = {9: "an inpainting model", 8: "an InstructPix2Pix model", 7: "an upscaler", 5: "a depth-to-image model"}
_NOT_GIVEN = {
    "time_cond_proj_dim": "its guidance (a latent consistency model)", "class_embed_type": "a class or a noise level",
    "num_class_embeds": "a class or a noise level", "encoder_hid_dim_type": "more than text",
}  # fmt: skip
"""Unsupported inputs of a UNet besides latents and text, by configuration key."""


def check_parts(name: str, pipeline: Any) -> None:
    """Raise CheckpointError for a model with inputs besides latents and text, or with unsupported parts."""
    unet, vae = pipeline.unet.config, getattr(pipeline, "vae", None)
    if not isinstance(vae, AutoencoderKL):
        kind = "no autoencoder" if vae is None else f"a {type(vae).__name__} for its autoencoder"
        raise CheckpointError(f"{name} has {kind}: it needs an AutoencoderKL in the folder's vae")
    if pipeline.config.get("requires_aesthetics_score"):
        raise CheckpointError(f"{name} is an SDXL refiner, which only finishes pictures: give the base model")
    _check_text(name, pipeline)
    channels, latents = unet["in_channels"], vae.config["latent_channels"]
    if channels != latents:
        kind = f", as {_CHANNELS[channels]}" if channels in _CHANNELS else ""
        raise CheckpointError(
            f"{name} takes {channels} channels{kind}, but its latents have {latents}: give a plain text-to-image model"
        )
    if unet["out_channels"] != channels:
        raise CheckpointError(
            f"{name} predicts its variance too ({unet['out_channels']} channels for {channels}), which is not supported"
        )
    taken = next((what for key, what in _NOT_GIVEN.items() if unet.get(key)), None)
    if taken is None and unet.get("addition_embed_type") not in (None, "text_time"):
        taken = "more than text"
    if taken:
        raise CheckpointError(f"the UNet of {name} takes {taken} as an input, which is not supported")


def _check_text(name: str, pipeline: Any) -> None:
    """Raise CheckpointError for text encoders other than CLIP, or embeddings that do not fit the UNet."""
    encoders = [e for n in ("", "_2") if (e := getattr(pipeline, f"text_encoder{n}", None)) is not None]
    for encoder in encoders:
        if not type(encoder).__name__.startswith("CLIPText"):
            raise CheckpointError(f"{name} has a {type(encoder).__name__} as its text encoder: it needs CLIP's")
    width, taken = sum(e.config.hidden_size for e in encoders), pipeline.unet.config["cross_attention_dim"]
    if encoders and isinstance(taken, int) and width != taken:
        raise CheckpointError(
            f"{name} has text embeddings of width {width}, but its UNet takes {taken}: a part is from another model"
        )


def check_whole(name: str, pipeline: Any) -> None:
    """Raise CheckpointError for missing weights in a model's files."""
    folder = DEMO if name == "demo" else Path(name)
    for part, network in pipeline.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        missing = sorted(key for key, weight in network.named_parameters() if weight.is_meta)
        if part.startswith("text_encoder"):  # transformers initializes missing weights randomly
            stored = _stored(folder / part)
            missing += sorted(key for key, _ in network.named_parameters() if stored and _bare(key) not in stored)
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise CheckpointError(f"{name} has missing weights in its {part}: {missing[0]}{more}")


def _stored(folder: Path) -> set[str]:
    """The names of the tensors in a folder's safetensors files, if any."""
    found = set[str]()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {_bare(key) for key in file.keys()}  # noqa: SIM118  not a mapping
    return found


def _bare(key: str) -> str:
    """A text encoder's weight name, common to all versions of transformers."""
    key = ".".join(part for part in key.split(".") if part not in ("text_model", "language_model", "model"))
    return "encoder.embed_tokens.weight" if key == "shared.weight" else key


# --- single files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """The header of a safetensors file: tensor names, the UNet's input channels, and metadata."""

    names: frozenset[str]
    channels: int | None
    metadata: dict[str, str]

    @classmethod
    def of(cls, path: Path) -> _Contents:
        with safe_open(path, framework="pt") as file:
            names = frozenset(file.keys())
            channels = int(file.get_slice(_FIRST).get_shape()[1]) if _FIRST in names else None
            return cls(names, channels, file.metadata() or {})

    def has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.names)


_FIRST = "model.diffusion_model.input_blocks.0.0.weight"
_SD2 = "stabilityai/stable-diffusion-2-1"
_FAMILIES = {
    "stabilityai/stable-diffusion-xl-base-1.0": "conditioner.embedders.1.",
    _SD2: "cond_stage_model.model.",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "",
}
"""The hub name of each family's tokenizer and configuration, and the prefix of keys that identifies it, in order."""


def _single_file(path: Path, dtype: torch.dtype, config: str | None) -> Any:
    """A checkpoint in a single file; its kind is detected from its keys."""
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path.name} is not a .safetensors file: GGUF and pickled checkpoints are not supported")
    if is_pointer(path):
        raise CheckpointError(f"{path} is a Git LFS pointer: run `git lfs pull` to fetch the weights")
    contents = _Contents.of(path)
    _check_contents(path, contents)
    family = next(name for name, mark in _FAMILIES.items() if contents.has(mark))
    predicts = _prediction(contents)
    if config is None:
        config = _cached_config(family, path)
        if family == _SD2 and predicts is None:
            raise CheckpointError(f"{path.name} has no metadata on whether it predicts noise or v: give --model-config")
    elif not Path(config).is_dir():
        check_hub_name(config)
    sdxl = "xl" in family
    kind = StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline
    extra = {} if sdxl else {"safety_checker": None}
    pipeline = kind.from_single_file(str(path), config=config, torch_dtype=dtype, local_files_only=True, **extra)
    changed: dict[str, Any] = {} if predicts is None else {"prediction_type": predicts}
    changed |= {"rescale_betas_zero_snr": True} if "ztsnr" in contents.names else {}
    if changed:
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=False, **changed)
    return pipeline


def _prediction(contents: _Contents) -> str | None:
    """The prediction type in a file's metadata, if any."""
    found = contents.metadata.get("modelspec.prediction_type", contents.metadata.get("modelspec.predict_key", ""))
    if "v_pred" in contents.names or found in ("v", "v_prediction"):
        return "v_prediction"
    return "epsilon" if found == "epsilon" else None


def _check_contents(path: Path, contents: _Contents) -> None:
    """Raise CheckpointError for a file that is not a complete Stable Diffusion checkpoint."""
    name, family = path.name, family_of(contents.names)
    if any(".lora_" in key or "lora_unet" in key for key in contents.names):
        raise CheckpointError(f"{name} is a LoRA, not a model: give it with --lora")
    if family not in (None, "Stable Diffusion", "SDXL"):
        folder = ": give it as a diffusers folder" if family.startswith(_AS_FOLDERS) else ""
        raise CheckpointError(f"{name} is a file of {family}, not a Stable Diffusion checkpoint{folder} ({EDITED})")
    if contents.channels is None:
        incomplete = contents.has("down_blocks.") or contents.has("encoder.")
        what = "only a part of a model" if incomplete else "a safetensors file"
        raise CheckpointError(f"{name} is {what}, but not a Stable Diffusion checkpoint")
    if contents.has("conditioner.embedders.0.model.") and not contents.has("conditioner.embedders.1."):
        raise CheckpointError(f"{name} is an SDXL refiner, which only finishes pictures: give the base model")
    if contents.channels != 4:
        kind = _CHANNELS.get(contents.channels, "another kind of model")
        raise CheckpointError(f"{name} takes {contents.channels} channels, as {kind}: give a plain text-to-image model")
    if any(key.startswith(("edm_mean", "edm_std", "edm_vpred")) for key in contents.names):
        raise CheckpointError(f"{name} has EDM's noise levels, which are not supported")
    for part, marks in (
        ("autoencoder", ("first_stage_model.",)),
        ("text encoder", ("cond_stage_model.", "conditioner.")),
    ):
        if not any(contents.has(mark) for mark in marks):
            raise CheckpointError(f"{name} contains no {part}: give a checkpoint with all parts, or a diffusers folder")


def _cached_config(family: str, path: Path) -> str:
    """A family's configuration in the hub's cache; never downloads."""
    try:
        return str(snapshot_download(family, local_files_only=True))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} contains only weights: give --model-config for its tokenizer and configuration (a diffusers "
            f"folder of the same kind, or a hub name such as {family})"
        ) from error
