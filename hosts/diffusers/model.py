"""A diffusion model with its text encoders and autoencoder: the interface of all families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ...attention.condition import Condition
from ...diffusion.denoiser import Denoiser
from ...files.lora import Timesteps
from ...models.family import Family, latent_frames
from ...store.identity import ModelIdentity
from .model_files import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class LoadOptions:
    """Options of a model's loading.

    config: for a single file, a diffusers folder with the tokenizer and configuration of its kind. lora: LoRA files or
    folders, optionally with a strength, FILE=0.8. temporal: temporal layers, see `load_temporal_layers`. videos: accept
    text-to-video UNets (ModelScope). variant: of the weights in a folder, such as "fp16". attention: the kernel, see
    `Model.use_attention`. timesteps: of a UNet's schedule, see `with_timesteps`; "auto" for those of weights for few
    steps, by their name, else the model's.
    """

    config: str | None = None
    lora: str | Sequence[str] | None = None
    temporal: str | None = None
    videos: bool = False
    variant: str | None = None
    attention: str = "auto"
    timesteps: Timesteps = "auto"


@dataclass(frozen=True)
class ClipFacts:
    """What a model may need of a clip besides its latents.

    shape: of the latents, (frames, channels, h, w). fps: frames a second. frames: a function that gives the frames,
    uint8 (height, width, 3), one at a time; None where there are none, as for new clips. guide_frames: the frames, by
    their numbers, that are inputs of models that can do without (LTX-2).
    """

    shape: tuple[int, ...]
    fps: float
    frames: Callable[[], Iterator[Tensor]] | None = None
    guide_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model(ABC):
    """The parts of a model on one device.

    name: as given to `load`. device: where it computes, also with offloading. notes: lines for the user, such as one on
    each fused LoRA.
    """

    family: ClassVar[Family]
    pipelines: ClassVar[tuple[str, ...]]
    """The family's pipeline classes in diffusers; empty for all others."""
    needs_frames: ClassVar[bool] = False
    """Whether the model's calls need frames of the clip, as for image-to-video."""
    takes_control: ClassVar[bool] = False
    """Whether it follows a control video without a ControlNet."""
    takes_first_frame: ClassVar[bool] = False
    """Whether an edit can be given its own first frame."""
    takes_guide_frames: ClassVar[bool] = False
    """Whether it can be given other frames of its own."""

    name: str
    vae: Any
    scheduler: Any
    device: torch.device
    tokenizers: tuple[Any, ...]
    text_encoders: tuple[Any, ...]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @classmethod
    def load(
        cls, name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any
    ) -> Self:
        """A bundled model, a diffusers folder, a single `.safetensors` file or a hub name, with `LoadOptions`. Only a
        hub name uses the network.

        Raises CheckpointError.
        """
        chosen = LoadOptions(**options)
        if chosen.timesteps != "auto" and cls.family.formulation == "flow":
            raise CheckpointError(
                f"timesteps has no effect: {name} is a {cls.family.title} model, whose sigmas have a shift"
            )
        model = cls.opened(name, torch.device(device), dtype, chosen)
        model.use_attention(chosen.attention)
        return model

    @classmethod
    @abstractmethod
    def opened(cls, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Self:
        """`load` for one family."""

    # --- networks -----------------------------------------------------------------------

    @property
    @abstractmethod
    def networks(self) -> list[Any]:
        """The denoising networks."""

    @property
    @abstractmethod
    def denoiser(self) -> Denoiser: ...

    def use_attention(self, kernel: str) -> None:
        """Set the attention kernel of the networks: "auto" and "sdpa" are PyTorch's, "xformers" needs that package.

        Raises CheckpointError for one that the networks do not take, or that is not installed.
        """
        if kernel in ("auto", "sdpa"):
            return
        for network in self.networks:
            try:
                self._set_attention(network, kernel)
            except (ImportError, RuntimeError, ValueError) as error:
                raise CheckpointError(f"attention: {kernel} cannot be used: {str(error).splitlines()[0]}") from error

    def _set_attention(self, network: Any, kernel: str) -> None:
        """Raises ImportError, RuntimeError or ValueError for a kernel that cannot be used."""
        if kernel != "xformers":
            raise ValueError(f"a {self.family.network} takes auto, sdpa or xformers")
        network.enable_xformers_memory_efficient_attention()

    @property
    def parts(self) -> list[Any]:
        """All networks, text encoders and autoencoder included."""
        return [*self.networks, self.vae, *self.text_encoders]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.networks[0].dtype
        return dtype

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return int(self.networks[0].config["in_channels"])

    def for_clip(self, clip: ClipFacts) -> Self:
        """The model for one clip. Raises ValueError for a clip that it does not support."""
        return self

    def with_control(
        self, name: str, frames: Tensor, strength: float = 1.0, start: float = 0.0, end: float = 1.0,
        variant: str | None = None,
    ) -> Model:  # fmt: skip
        """The model with a ControlNet, given as a folder, a file or a hub name, and the ControlNet's frames: uint8
        (f, h, w, 3).

        strength, start, end: see `ControlNet`. Raises CheckpointError for one that does not fit.
        """
        raise CheckpointError(f"controlnet: needs a UNet, but {self.name} is a {self.family.network}")

    @classmethod
    def check_control(cls, strength: float = 1.0, start: float = 0.0, end: float = 1.0, memory: str = "auto") -> None:
        """Raise CheckpointError for settings of a control video, or a store's memory beside it, that the family does
        not support.
        """
        if cls.family.formulation == "flow" and (start, end) != (0.0, 1.0):
            raise CheckpointError(f"control_start and control_end have no effect on a {cls.family.title} model")

    def control_steps(self, steps: int) -> int:
        """Number of steps in which the ControlNet acts."""
        return 0

    # --- text ---------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose tokens are columns of the embeddings."""
        return self.tokenizers[0]

    @abstractmethod
    def encode_prompt(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """Embeddings of a prompt of any length.

        width, height: pixels of a frame, which SDXL uses too. blocks: pad to this many blocks (see `blocks`).
        """

    def encode_negative(self, prompt: str, width: int, height: int, blocks: int | None = None) -> Condition:
        """`encode_prompt` of a negative prompt, which may be empty."""
        return self.encode_prompt(prompt, width, height, blocks)

    def blocks(self, *prompts: str) -> int:
        """Number of token blocks of the longest prompt."""
        return 1

    # --- frames -------------------------------------------------------------------------

    @property
    @abstractmethod
    def factor(self) -> int:
        """Pixels of a latent's side."""

    @property
    def multiple(self) -> int:
        """Both sides of a frame must be multiples of this."""
        return self.factor

    @property
    @abstractmethod
    def native_size(self) -> int:
        """The short side in pixels that the model was trained on."""

    @property
    def frames_per_latent(self) -> int:
        """Frames of each latent but the first, which has one."""
        return 1

    def latent_frames(self, frames: int) -> int:
        """The number of latents of a clip."""
        return latent_frames(frames, self.frames_per_latent)

    @property
    @abstractmethod
    def vae_identity(self) -> ModelIdentity: ...

    @abstractmethod
    def frames_at_once(self, height: int, width: int) -> int | None:
        """Number of frames per call of the autoencoder; None for the whole clip."""

    @abstractmethod
    def encode_clip(self, frames: Tensor) -> Tensor:
        """Frames (f, 3, h, w) in 0..1 to scaled latents (`latent_frames`, channels, h / factor, w / factor)."""

    @abstractmethod
    def decode_clip(self, latents: Tensor, frames: int) -> Tensor:
        """The first `frames` frames of scaled latents, in 0..1 on the CPU: (frames, 3, h, w)."""

    @abstractmethod
    def encode_parts(self, parts: Iterable[Tensor]) -> Tensor:
        """`encode_clip` of a clip that comes in parts of `frames_at_once` frames."""

    @abstractmethod
    def decode_parts(self, latents: Tensor, frames: int) -> Iterator[Tensor]:
        """The frames of `decode_clip`, in parts."""

    def coding(self, height: int, width: int) -> str:
        """A short text on how a clip of this size is encoded; "" if there is nothing to report."""
        return ""

    def coding_bytes(self, height: int, width: int) -> int:
        """The autoencoder's least memory for a frame of this size in bytes; 0 if it can work in tiles."""
        return 0
