"""Layout guidance in the host: a GUIDER that moves a sampler's latents before a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ...attention.key_frames import Chunk, ClipCalls
from ...diffusion.steering import ClipSteering, FollowingSteering
from .attention_maps import OWN_FRAME, AttentionGuider, ClipGuider
from .chunks import WrappersMP
from .conditions import HostCondition
from .denoiser import ComfyDenoiser
from .sameness import WINDOWS
from .sampling import room_for


class LayoutGuider(ClipGuider):
    """The host's classifier-free guidance with layout guidance.

    A step without layout guidance equals the host's, bit for bit. Backward guidance moves the sampler's latents in
    place, which works with samplers that step from the tensor they evaluate.
    """

    def __init__(
        self,
        model: Any,
        positive: HostCondition,
        negative: HostCondition,
        guidance_scale: float,
        layout: Callable[[tuple[int, int, int]], ClipSteering],
        notify: Callable[[str], None] | None = None,
    ) -> None:
        """layout: makes the guidance for (frames, height, width) of the latents. notify: called with a summary.

        Raises ValueError for a MODEL that is not an attention UNet.
        """
        super().__init__(model, positive, negative, guidance_scale)
        self._plain = partial(AttentionGuider, model, positive, negative, guidance_scale)
        """Makes a guider of the clip without layout guidance, which records its attention."""
        self._guidance_of, self.notify = layout, notify or (lambda text: None)
        twice = room_for(lambda frames: 2 * frames)  # a gradient needs about twice the memory of a call
        self.edited.patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "fatezero layout", twice)
        self._layout: ClipSteering | None = None
        self._moved: Tensor | None = None
        self._guided = 0

    def sample(self, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, **more: Any) -> Tensor:
        """Raises ValueError for a sampler that steps from a copy of its latents, and for a noise mask."""
        if more.get("denoise_mask") is not None:
            raise ValueError(
                "latent_image: has a noise mask, which layout guidance does not support: remove it, or use Edit Video"
            )
        frames, _, height, width = latent_image.shape
        self._layout = self._guidance_of((frames, height, width))
        if not self._layout.moves_latents and self.model_options.get(WINDOWS) is not None:
            raise ValueError("model: forward guidance does not support context windows: set mode to backward")
        if isinstance(self._layout, FollowingSteering):
            recorded = self._layout.recorder()
            self._plain(recorded).sample(noise.clone(), latent_image.clone(), sampler, sigmas, **more)
            self._layout = self._layout.following(recorded)
        outer = more.get("callback")

        def callback(step: int, clean: Tensor, x: Tensor, steps: int) -> None:
            if self._moved is not None and x.data_ptr() != self._moved.data_ptr():
                raise ValueError(
                    "sampler: steps from a copy of its latents, which layout guidance cannot move: use another (euler, "
                    "dpmpp_2m, ddim, DDIM Sampler)"
                )
            if outer is not None:
                outer(step, clean, x, steps)

        self._guided = 0
        try:
            result = super().sample(noise, latent_image, sampler, sigmas, **{**more, "callback": callback})
            self.notify(f"guided in {self._guided} predictions of {len(sigmas) - 1} steps")
            return result
        finally:
            self._layout = self._moved = None

    def outer_predict_noise(
        self, x: Tensor, timestep: Tensor, model_options: dict[str, Any] | None = None, seed: int | None = None
    ) -> Tensor:
        """The host's prediction, after moving the latents of a guided step; x: in the host's space."""
        layout = self._layout
        assert layout is not None and model_options is not None
        sigma, levels = timestep[0].cpu(), model_options["transformer_options"]["sample_sigmas"].cpu()
        steps = len(levels) - 1
        step = max(0, int((levels[:-1] >= sigma * (1 - 1e-4)).sum()) - 1)
        self._moved = None
        if not layout.guides(step, steps):
            return super().outer_predict_noise(x, timestep, model_options, seed)
        self._guided += 1
        if layout.moves_latents:
            self._move(x, sigma, layout, model_options)
            return super().outer_predict_noise(x, timestep, model_options, seed)
        control = layout.control(OWN_FRAME, Chunk.whole(len(x)))
        return self.predicted_by(control, x, timestep, model_options, seed)

    def _move(self, x: Tensor, sigma: Tensor, layout: ClipSteering, options: dict[str, Any]) -> None:
        """Move the sampler's own latents, in place."""
        options = {**options, "transformer_options": dict(options["transformer_options"])}
        denoiser = ComfyDenoiser(self, options, x.device, None)
        scale = (1 + sigma.to(x) ** 2).sqrt()
        alpha = 1 / (1 + sigma**2)
        z = layout.moved(denoiser, x / scale, self.timestep_at(sigma), alpha, self.positive, ClipCalls(OWN_FRAME))
        x.copy_(z * scale)
        self._moved = x
