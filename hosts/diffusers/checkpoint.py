"""A Stable Diffusion checkpoint by path or name, with its text and picture coding."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet3DConditionModel
from torch import Tensor

from ...attention.condition import Condition
from ...attention.prompt import BLOCK
from ...diffusion.denoiser import check_finite
from ...files.lora import LoraFile
from ...files.temporal_layers import load_temporal_layers
from ...files.whole import whole_file
from ...store.identity import ModelIdentity
from .controlnet import ControlNet, load_controlnet
from .lora import LoraError, fuse_loras
from .model_files import CheckpointError, check_parts, check_whole, kind_of, loaded
from .schedulers import as_ddim, with_signal
from .temporal import save_inflated_unet, with_temporal_layers
from .unet import DiffusersDenoiser
from .unet3d import DiffusersVideoDenoiser

__all__ = ["Checkpoint", "CheckpointError", "kind_of", "quiet", "save_tuned"]


@dataclass(frozen=True)
class Checkpoint:
    """The parts of an SD 1.x, SD 2.x or SDXL model on one device.

    notes: what was added to it, a line each. zero_negative: an empty negative prompt is zeros, as of SDXL, and not the
    embeddings of no words. controlnet: see `with_control`.
    """

    name: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    notes: tuple[str, ...] = ()
    zero_negative: bool = False
    controlnet: ControlNet | None = None

    @classmethod
    def load(
        cls,
        name: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: str | None = None,
        lora: str | Sequence[str] | None = None,
        lora_scale: float = 1.0,
        temporal: str | None = None,
        videos: bool = False,
        variant: str | None = None,
    ) -> Checkpoint:
        """Load "demo", a diffusers folder, a single `.safetensors` file or a hub name.

        config: for a single file, a diffusers folder with the tokenizer and configuration of
        its kind. Only a hub name uses the network. lora: LoRA files or folders, each with a strength as FILE=0.8, all
        of them times `lora_scale`. temporal: temporal layers, as `load_temporal_layers` takes them. videos: take
        text-to-video UNets (ModelScope) too. variant: of the weights in its folders, as "fp16".

        Raises CheckpointError, saying what was looked for.
        """
        loras = lora_files(lora, lora_scale)
        pipeline = loaded(name, dtype, config, variant)
        kinds = (UNet2DConditionModel, UNet3DConditionModel) if videos else UNet2DConditionModel
        if not isinstance(getattr(pipeline, "unet", None), kinds):
            raise CheckpointError(
                f"{name} is a {type(pipeline).__name__}; FateZero needs an attention UNet: SD 1.x, SD 2.x or SDXL"
            )
        check_parts(name, pipeline)
        check_whole(name, pipeline)
        if temporal is not None:
            if isinstance(pipeline.unet, UNet3DConditionModel):
                raise CheckpointError(f"{name} is a model of videos already, which {temporal} is not for")
            try:
                with_temporal_layers(pipeline.unet, load_temporal_layers(temporal))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{temporal}: {error}") from error
        if loras:  # where it is quick
            pipeline.unet.to(device)
        notes = fused(pipeline, loras)  # after the tuned queries, which take the place of the model's
        pairs = [
            (getattr(pipeline, f"tokenizer{n}", None), getattr(pipeline, f"text_encoder{n}", None)) for n in ("", "_2")
        ]
        missing = [f"{part}{n}" for n, pair in zip(("", "_2"), pairs, strict=True) if any(pair)
                   for part, held in zip(("tokenizer", "text_encoder"), pair, strict=True) if held is None]  # fmt: skip
        known = [(t, e) for t, e in pairs if t is not None and e is not None]
        if missing or not known:
            raise CheckpointError(f"{name} lacks its {', '.join(missing) or 'tokenizer and text encoder'}")
        for tokenizer, encoder in known:  # transformers makes an empty one of a folder that is missing
            if 2 * len(tokenizer) < encoder.config.vocab_size:
                raise CheckpointError(
                    f"{name} lacks its tokenizer: it has {len(tokenizer)} of {encoder.config.vocab_size} entries"
                )
        try:
            scheduler = with_signal(as_ddim(pipeline.scheduler))
        except TypeError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if dtype == torch.float16 and _upcasts(pipeline.vae):
            pipeline.vae.to(torch.float32)
        for part in (pipeline.unet, pipeline.vae, *(e for _, e in known)):
            part.to(device).eval().requires_grad_(False)
        return cls(
            name, pipeline.unet, pipeline.vae, scheduler, tuple(t for t, _ in known), tuple(e for _, e in known), notes,
            bool(pipeline.config.get("force_zeros_for_empty_prompt")),
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.dtype

    @property
    def parts(self) -> list[Any]:
        """Its networks."""
        return [self.unet, self.vae, *self.text_encoders, *([self.controlnet.model] if self.controlnet else [])]

    def with_control(
        self, name: str, frames: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
        variant: str | None = None,
    ) -> Checkpoint:  # fmt: skip
        """The same with a ControlNet, of a folder, a file or a hub's name, and uint8 frames (f, h, w, 3) it follows.

        strength, start, end: see `ControlNet`. Raises CheckpointError for one that does not fit.
        """
        if isinstance(self.unet, UNet3DConditionModel):
            raise CheckpointError(f"{self.name} is a model of videos, which has no ControlNet")
        model = load_controlnet(name, self.unet, self.factor, variant)
        return replace(self, controlnet=ControlNet(model, frames, strength, start, end))

    @property
    def channels(self) -> int:
        """Of its latents."""
        return int(self.unet.config["in_channels"])

    @property
    def multiple(self) -> int:
        """What both sides of a frame must be multiples of."""
        return self.factor

    def latent_frames(self, frames: int) -> int:
        """How many latents a clip of so many frames has."""
        return frames

    def control_steps(self, steps: int) -> int:
        """In how many of so many steps the ControlNet acts."""
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
        """What tells this autoencoder from another."""
        scale = f"AutoencoderKL factor={self.factor} scaling={self.vae.config['scaling_factor']}"
        if self.vae.config.get("latents_mean"):
            scale += f" mean={self.vae.config['latents_mean']} deviation={self.vae.config['latents_std']}"
        return ModelIdentity.of(scale, self.vae.dtype, self.vae.state_dict().items())

    @property
    def tokenizer(self) -> Any:
        return self.tokenizers[0]

    @property
    def sdxl(self) -> bool:
        return self.unet.config.get("addition_embed_type") == "text_time"

    @property
    def factor(self) -> int:
        """Pixels of a latent's side."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def native_size(self) -> int:
        """The side in pixels the model was trained on."""
        side = self.unet.config["sample_size"] or 64
        return int(side if isinstance(side, int) else min(side)) * self.factor

    # --- text -------------------------------------------------------------------------

    @torch.no_grad()
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Embeddings of a prompt of any length, in blocks of 77 tokens.

        width, height: of the pictures, which SDXL is told. blocks: at least so many blocks.
        """
        if self.sdxl:
            parts = [self._encode(i, prompt, blocks, layer=-2) for i in range(2)]
            embeddings = torch.cat([states for states, _ in parts], -1)
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=embeddings.dtype)
            return Condition(embeddings, {"text_embeds": parts[1][1], "time_ids": sizes.to(embeddings.device)})
        return Condition(self._encode(0, prompt, blocks, layer=None)[0])

    def encode_negative(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """`encode_prompt` of a negative prompt, which may be empty."""
        condition = self.encode_prompt(prompt, width, height, blocks)
        if prompt or not self.zero_negative:
            return condition
        extras = {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in condition.extras.items()}
        return Condition(torch.zeros_like(condition.embeddings), extras)

    def blocks(self, *prompts: str) -> int:
        """How many blocks of 77 tokens the longest of the prompts takes."""
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

    # --- pictures ---------------------------------------------------------------------

    def frames_at_once(self, height: int, width: int) -> int:
        """How many pictures of a size the autoencoder takes in one call: on a CPU one, on a GPU as many as 8 of 512x512
        have pixels in half precision.
        """
        pixels = 16 * 512 * 512 // self.vae.dtype.itemsize
        return 1 if self.vae.device.type == "cpu" else max(1, pixels // (height * width))

    @torch.no_grad()
    def encode_frames(self, frames: Tensor) -> Tensor:
        """Frames (f, 3, h, w) in 0..1 to scaled latents (f, 4, h/factor, w/factor), `frames_at_once`."""
        return self.encode_posterior(frames)[0]

    @torch.no_grad()
    def encode_posterior(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of frames' scaled latents, as `encode_frames` has them."""
        means, deviations = [], []

        def encoded(frame: Tensor) -> Tensor:
            posterior = self.vae.encode((2 * frame - 1).to(self.vae.device, self.vae.dtype)).latent_dist
            return torch.stack([posterior.mean, posterior.std])

        for frame in frames.split(self.frames_at_once(*frames.shape[-2:])):
            mean, deviation = self._finite(encoded, frame, "the encoded frames")
            shift, scale = self._statistics(mean)
            means.append((mean - shift) * scale)
            deviations.append(deviation * scale)
        return torch.cat(means), torch.cat(deviations)

    def encode_clip(self, frames: Tensor) -> Tensor:
        """`encode_frames`, as models of videos name it."""
        return self.encode_frames(frames)

    def decode_clip(self, latents: Tensor, frames: int) -> Tensor:
        """The first so many frames of `decode_latents`, as models of videos name it."""
        return self.decode_latents(latents[:frames])

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Scaled latents to frames in 0..1 on the CPU, `frames_at_once`."""
        parts = []

        def decoded(latent: Tensor) -> Tensor:
            latent = latent.to(self.vae.dtype)
            shift, scale = self._statistics(latent)
            pixels: Tensor = self.vae.decode(latent / scale + shift).sample
            return pixels

        for latent in latents.split(self.frames_at_once(*(side * self.factor for side in latents.shape[-2:]))):
            pixels = self._finite(decoded, latent, "the decoded pictures")
            parts.append((pixels.float() / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(parts)

    def _finite(self, code: Callable[[Tensor], Tensor], x: Tensor, what: str) -> Tensor:
        """What the autoencoder makes of x; in single precision from there on where it leaves the range of half."""
        y = code(x)
        if self.vae.dtype == torch.float16 and not torch.isfinite(y).all():
            self.vae.to(torch.float32)
            y = code(x)
        check_finite(y, what)
        return y

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """What is taken off the autoencoder's latents, and what the rest is multiplied by."""
        config = self.vae.config
        scale, shift = config["scaling_factor"], config.get("shift_factor") or 0.0
        if not config.get("latents_mean") or not config.get("latents_std"):
            return shift, scale
        mean, deviation = (torch.tensor(config[f"latents_{name}"]).to(like).view(-1, 1, 1) for name in ("mean", "std"))
        return mean + shift, scale / deviation


def _upcasts(vae: AutoencoderKL) -> bool:
    """Whether an autoencoder's own configuration says that half precision is too small for it."""
    return bool(vae.config.get("force_upcast")) and "force_upcast" not in vae.config.get("_use_default_values", ())


def save_tuned(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a model with its temporal layers as a diffusers folder: `Checkpoint.load` and the layers' own code read it.

    ValueError for SDXL, which that code does not know.
    """
    if checkpoint.sdxl:
        raise ValueError(f"{checkpoint.name} is an SDXL model, which the authors' code does not read")
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
    """Keep the libraries' loading bars and remarks off the terminal."""
    logs = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            log.enable_progress_bar()


def lora_files(lora: str | Sequence[str] | None, scale: float = 1.0) -> list[LoraFile]:
    """LoRAs by their texts, each strength times `scale`; CheckpointError for one that is not there."""
    texts = [lora] if isinstance(lora, str) else lora or ()
    try:
        found = [LoraFile.parse(text) for text in texts]
        for one in found:
            one.file()
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    return [replace(one, strength=one.strength * scale) for one in found]


def fused(pipeline: Any, loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """Add LoRAs to the weights of a pipeline's networks; a line on each. CheckpointError for one that does not fit."""
    names = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2")
    networks = {name: network for name in names if (network := getattr(pipeline, name, None)) is not None}
    if "transformer" in networks:
        networks = {name: network for name, network in networks.items() if name.startswith("transformer")}
    try:
        return tuple(fuse_loras(networks, loras))
    except LoraError as error:
        raise CheckpointError(str(error)) from error
