"""diffusers' video UNets as a host: ModelScope's and Zeroscope's `UNet3DConditionModel`."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import UNet3DConditionModel
from einops import rearrange
from torch import Tensor

from .unet import DiffusersDenoiser


class DiffusersVideoDenoiser(DiffusersDenoiser):
    """A text-to-video UNet and its schedule, as the loops of `fatezero.diffusion` call them.

    Its batch is one clip. Controls compute the attention of single frames, the 16 spatial layers; attention over frames
    (`temp_attentions`, `transformer_in`) is the model's. Raises TypeError for another model.
    """

    kind: ClassVar[type] = UNet3DConditionModel
    known: ClassVar[str] = "ModelScope, Zeroscope"

    @property
    def frames_meet(self) -> bool:
        return True

    @property
    def trained_with(self) -> tuple[tuple[str | int, ...], bool]:
        return ("self",), False

    def _output(
        self, latents: Tensor, timestep: float, text: Tensor, extras: dict[str, Tensor], added: dict[str, Any]
    ) -> Tensor:
        output: Tensor = self.unet(rearrange(latents, "f c y x -> 1 c f y x"), timestep, text).sample
        return rearrange(output, "1 c f y x -> f c y x")
