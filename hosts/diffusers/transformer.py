"""Models whose network is the transformer of a diffusers pipeline: loading, offloading and attention kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from ...store.budget import available_bytes
from ...store.identity import ModelIdentity
from .lora import add_loras, lora_files
from .model import LoadOptions, Model
from .model_files import CheckpointError, check_weights, check_whole, opened

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class TransformerModel(Model):
    """A model of a diffusers pipeline with a transformer."""

    kinds: ClassVar[tuple[type, ...]]
    """The transformer's classes."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that are not loaded."""

    transformer: Any
    pipeline: Any = field(default=None, kw_only=True)

    @classmethod
    def opened(cls, name: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> Self:
        """A model by path or name, with LoRAs fused into its transformers.

        If not all parts fit on a GPU at once, each is kept in RAM until it is called (model offloading).
        """
        loras, variant = lora_files(options.lora), options.variant
        if options.temporal:
            raise CheckpointError(f"{name} is a {cls.family.network}: --temporal is for image models with a UNet")
        skipped = dict.fromkeys(cls.unused)

        def read(where: Any, **local: Any) -> Any:
            if isinstance(where, Path):
                index = DiffusionPipeline.load_config(where, **local)
                check_weights(where, {part: about for part, about in index.items() if part not in skipped}, variant)
            return DiffusionPipeline.from_pretrained(
                where, torch_dtype=dtype, variant=variant or None, **skipped, **local
            )

        pipeline: Any = opened(name, read)
        if not isinstance(getattr(pipeline, "transformer", None), cls.kinds):
            raise CheckpointError(f"{name} is a {type(pipeline).__name__} without a {cls.family.title} transformer")
        check_whole(name, pipeline)
        notes = add_loras(pipeline, loras)
        if dtype == torch.float16:
            pipeline.vae.to(torch.float32)  # it overflows in half precision
        model = cls.of_pipeline(name, pipeline, device, notes)
        for part in model.parts:
            part.eval().requires_grad_(False)
        weights, free = sum(p.nbytes for part in model.parts for p in part.parameters()), available_bytes(device)
        if device.type == "cuda" and free is not None and weights > 0.7 * free:
            pipeline.enable_model_cpu_offload(device=device)
        else:
            pipeline.to(device)
        return model

    @classmethod
    def of_pipeline(cls, name: str, pipeline: Any, device: torch.device, notes: tuple[str, ...], **more: Any) -> Self:
        """The model of a loaded pipeline. more: fields of the family. Raises CheckpointError for one that is not
        supported.
        """
        tokenizers, encoders = (
            tuple(part for n in ("", "_2") if (part := getattr(pipeline, f"{kind}{n}", None)) is not None)
            for kind in ("tokenizer", "text_encoder")
        )
        return cls(
            name, pipeline.vae, pipeline.scheduler, device, tokenizers, encoders, pipeline.transformer, notes=notes,
            pipeline=pipeline, **more,
        )  # fmt: skip

    @property
    def networks(self) -> list[Any]:
        return [self.transformer]

    @property
    def parts(self) -> list[Any]:
        """With further networks of the pipeline, such as an image encoder."""
        known = super().parts
        others = () if self.pipeline is None else self.pipeline.components.values()
        return [*known, *(part for part in others if isinstance(part, nn.Module) and part not in known)]

    def _set_attention(self, network: Any, kernel: str) -> None:
        names = sorted(one.value for one in AttentionBackendName if not one.value.endswith("_hub"))  # those download
        if kernel not in names:
            raise ValueError(f"a {self.family.network} takes auto, sdpa or one of {', '.join(names)}")
        network.set_attention_backend(kernel)

    @cached_property
    def vae_identity(self) -> ModelIdentity:
        layout = f"{type(self.vae).__name__} factor={self.factor} frames={self.frames_per_latent}"
        return ModelIdentity.of(layout, self.vae.dtype, self.vae.state_dict().items())
