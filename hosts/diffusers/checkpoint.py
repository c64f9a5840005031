"""Checkpoints of Stable Diffusion's UNets, by path or name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor

from ...attention.columns import BLOCK
from ...attention.condition import Condition
from ...files.lora import Timesteps, few_steps_of
from ...files.temporal_layers import load_temporal_layers
from ...files.whole import whole_file
from ...models.unet import UNET
from ...store.identity import ModelIdentity
from .controlnet import ControlNet, load_controlnet
from .lora import add_loras, lora_files
from .model import LoadOptions
from .model_files import CheckpointError, check_parts, check_whole, kind_of, loaded
from .pictures import FrameByFrame
from .schedulers import as_ddim, with_signal, with_timesteps
from .temporal import save_inflated_unet, with_temporal_layers
from .unet import DiffusersDenoiser
from .unet3d import DiffusersVideoDenoiser

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Checkpoint", "CheckpointError", "kind_of", "quiet", "save_tuned"]


@dataclass(frozen=True)
class Checkpoint(FrameByFrame):
    """An SD 1.x, SD 2.x or SDXL model, or a text-to-video UNet with their text.

    zero_negative: an empty negative prompt is zeros, as for SDXL, instead of the embeddings of an empty text.
    controlnet: see `with_control`.
    """

    family = UNET
    pipelines = ()

    unet: Any
    zero_negative: bool = field(default=False, kw_only=True)
    controlnet: ControlNet | None = field(default=None, kw_only=True)

    @classmethod
    def opened(cls, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Self:
        """A model with a UNet."""
        loras = lora_files(options.lora)
        pipeline = loaded(name, dtype, options.config, options.variant)
        kinds = (UNet2DConditionModel, UNet3DConditionModel) if options.videos else UNet2DConditionModel
        if not isinstance(getattr(pipeline, "unet", None), kinds):
            raise CheckpointError(
                f"{name} is a {type(pipeline).__name__} without an attention UNet: use SD 1.x, SD 2.x or SDXL"
            )
        check_parts(name, pipeline)
        check_whole(name, pipeline)
        if options.temporal:
            _attach(name, pipeline.unet, options.temporal)
        if loras:  # fusing is faster on the device
            pipeline.unet.to(device)
        notes = add_loras(pipeline, loras)  # after the tuned queries, which replace the model's
        tokenizers, encoders = _text_parts(name, pipeline)
        try:
            scheduler = with_signal(as_ddim(pipeline.scheduler))
            scheduler, note = _timed(scheduler, options.timesteps, [*(lora.path for lora in loras), name])
        except TypeError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if dtype == torch.float16 and _upcasts(pipeline.vae):
            pipeline.vae.to(torch.float32)
        for part in (pipeline.unet, pipeline.vae, *encoders):
            part.to(device).eval().requires_grad_(False)
        zero = bool(pipeline.config.get("force_zeros_for_empty_prompt"))
        return cls(
            name, pipeline.vae, scheduler, pipeline.unet.device, tokenizers, encoders, pipeline.unet,
            notes=notes + note, zero_negative=zero,
        )  # fmt: skip

    @property
    def networks(self) -> list[Any]:
        return [self.unet]

    @property
    def parts(self) -> list[Any]:
        return [*super().parts, *([self.controlnet.model] if self.controlnet else [])]

    def with_control(
        self, name: str, frames: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
        variant: str | None = None,
    ) -> Checkpoint:  # fmt: skip
        if isinstance(self.unet, UNet3DConditionModel):
            raise CheckpointError(f"{self.name} is a video model, which has no ControlNets")
        model = load_controlnet(name, self.unet, self.factor, variant)
        return replace(self, controlnet=ControlNet(model, frames, strength, start, end))

    def control_steps(self, steps: int) -> int:
        total = self.scheduler.config["num_train_timesteps"]
        timesteps = self.denoiser.schedule(steps).timesteps
        return sum(self.controlnet.acts(t, total) for t in timesteps) if self.controlnet else 0

    @property
    def denoiser(self) -> DiffusersDenoiser:
        if isinstance(self.unet, UNet3DConditionModel):
            return DiffusersVideoDenoiser(self.unet, self.scheduler)
        return DiffusersDenoiser(self.unet, self.scheduler, self.controlnet)

    @cached_property
    def vae_identity(self) -> ModelIdentity:
        scale = f"AutoencoderKL factor={self.factor} scaling={self.vae.config['scaling_factor']}"
        if self.vae.config.get("latents_mean"):
            scale += f" mean={self.vae.config['latents_mean']} deviation={self.vae.config['latents_std']}"
        return ModelIdentity.of(scale, self.vae.dtype, self.vae.state_dict().items())

    @property
    def sdxl(self) -> bool:
        return self.unet.config.get("addition_embed_type") == "text_time"

    @property
    def native_size(self) -> int:
        side = self.unet.config["sample_size"] or 64
        return int(side if isinstance(side, int) else min(side)) * self.factor

    # --- text -------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Embeddings of a prompt of any length, in blocks of 77 tokens."""
        if self.sdxl:
            parts = [self._encode(i, prompt, blocks, layer=-2) for i in range(2)]
            embeddings = torch.cat([states for states, _ in parts], -1)
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeddings.dtype)
            return Condition(embeddings, {"text_embeds": parts[1][1], "time_ids": sizes.to(embeddings.device)})
        return Condition(self._encode(0, prompt, blocks, layer=None)[0])

    def encode_negative(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        condition = self.encode_prompt(prompt, width, height, blocks)
        if prompt or not self.zero_negative:
            return condition
        extras = {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in condition.extras.items()}
        return Condition(torch.zeros_like(condition.embeddings), extras)

    def blocks(self, *prompts: str) -> int:
        return max(1, *(-(-len(self._content(t, p)) // BLOCK) for t in self.tokenizers for p in prompts))

    def _content(self, tokenizer: Any, prompt: str) -> list[int]:
        return list(tokenizer(prompt, add_special_tokens=False, truncation=False).input_ids)

    def _encode(self, i: int, prompt: str, blocks: int | None, layer: int | None) -> tuple[Tensor, Tensor]:
        tokenizer, encoder = self.tokenizers[i], self.text_encoders[i]
        content = self._content(tokenizer, prompt)
        count = max(blocks or 1, -(-len(content) // BLOCK), 1)
        rows = []
        for n in range(count):
            row = [tokenizer.bos_token_id, *content[n * BLOCK : (n + 1) * BLOCK], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (BLOCK + 2 - len(row)))
        output = encoder(torch.tensor(rows, device=encoder.device), output_hidden_states=layer is not None)
        states = output.last_hidden_state if layer is None else output.hidden_states[layer]
        pooled = getattr(output, "text_embeds", None)
        pooled = output[0][:, -1] if pooled is None else pooled
        return states.reshape(1, -1, states.shape[-1]), pooled[:1]


def _timed(scheduler: Any, timesteps: Timesteps, names: Sequence[str]) -> tuple[Any, tuple[str, ...]]:
    """The scheduler with the given timesteps, else with those of the first name of weights for few steps; a note."""
    if timesteps != "auto":
        return with_timesteps(scheduler, timesteps), ()
    found = next(((name, own) for name in names if (own := few_steps_of(name) or "auto") != "auto"), None)
    if found is None:
        return scheduler, ()
    name, own = found
    return with_timesteps(scheduler, own), (f"{Path(name).name} is for few steps: timesteps {own}",)


def _attach(name: str, unet: Any, temporal: str) -> None:
    """Attach temporal layers to a model's UNet; CheckpointError for layers that do not fit."""
    if isinstance(unet, UNet3DConditionModel):
        raise CheckpointError(f"{name} is already a video model: --temporal is for image models")
    try:
        with_temporal_layers(unet, load_temporal_layers(temporal))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{temporal}: {error}") from error


def _text_parts(name: str, pipeline: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tokenizers and text encoders of a pipeline; CheckpointError for a missing part."""
    pairs = [
        {part: getattr(pipeline, part, None) for part in (f"tokenizer{n}", f"text_encoder{n}")} for n in ("", "_2")
    ]
    pairs = [pair for pair in pairs if any(part is not None for part in pair.values())] or pairs[:1]
    missing = [part for pair in pairs for part, found in pair.items() if found is None]
    if missing:
        raise CheckpointError(f"{name} has no {', '.join(missing)}")
    tokenizers, encoders = zip(*(pair.values() for pair in pairs), strict=True)
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        entries, needed = len(tokenizer), encoder.config.vocab_size
        if 2 * entries < needed:  # transformers creates an empty one for a missing folder
            raise CheckpointError(f"{name} has no complete tokenizer: {entries} of {needed} entries")
    return tokenizers, encoders


def _upcasts(vae: AutoencoderKL) -> bool:
    """Whether an autoencoder's configuration requires single precision."""
    return bool(vae.config.get("force_upcast")) and "force_upcast" not in vae.config.get("_use_default_values", ())


def save_tuned(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a model with its temporal layers as a diffusers folder, for `Checkpoint.load` and the authors' code.

    Raises ValueError for SDXL, which that code does not support.
    """
    if checkpoint.sdxl:
        raise ValueError(f"{checkpoint.name} is an SDXL model, which the authors' code does not support")
    parts = {
        "vae": checkpoint.vae,
        "text_encoder": checkpoint.text_encoders[0],
        "tokenizer": checkpoint.tokenizer,
        "scheduler": checkpoint.scheduler,
    }
    save_inflated_unet(checkpoint.unet, folder / "unet")
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    libraries = {name: [type(part).__module__.partition(".")[0], type(part).__name__] for name, part in parts.items()}
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        **{name: [None, None] for name in ("feature_extractor", "safety_checker")},
        "unet": ["diffusers", "UNet2DConditionModel"],
        **libraries,
    }
    with whole_file(folder / "model_index.json") as partial:
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars, messages and warnings."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()
