"""FlowEdit: a clip with random noise instead of its inversion."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.inversion import draw_clip
from ..hosts.comfyui.latents import windows_of_video
from ..hosts.comfyui.noise import Timesteps, is_flow
from ..methods.flow_edit import FlowEditSettings, draw
from ..store.store import AttentionStore
from .inversion import MODEL_AND_SOURCE, SOUND, STEPS, TIMESTEPS, WINDOWS
from .settings import made, widget, widgets
from .sockets import PROMPT_KEY, AttentionStoreSocket, schema


class FateZeroFlowEdit(io.ComfyNode):
    """A store for Edit Video without an inversion."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroFlowEdit",
            display_name="FlowEdit (FateZero)",
            description="Replaces Invert Video: takes the clip with random noise, so that Edit Video moves it along "
            "the difference of both prompts' predictions (FlowEdit). Use Edit Video with preset flow_edit, wan_edit or "
            "few_steps (with 4 to 8 steps here), or with injections and masks as for an inversion.",
            search_aliases=["flow edit", "inversion-free", "rectified flow", "rf edit"],
            inputs=[
                *MODEL_AND_SOURCE,
                io.Latent.Input("latent", tooltip="The clip, as for Invert Video (Encode Video)."),
                STEPS,
                *widgets(FlowEditSettings, "source_guidance", "draws", "seed"),
                SOUND,
                *(widget(FlowEditSettings, name, advanced=True, optional=True) for name in ("n_min", "variant")),
                TIMESTEPS,
                widget(FlowEditSettings, "gain", advanced=True, optional=True),
                *WINDOWS,
            ],
            outputs=[AttentionStoreSocket.Output("store", display_name="attention store", tooltip="For Edit Video.")],
        )

    @classmethod
    def execute(
        cls, model: Any, source: Any, latent: dict[str, Any], steps: int, sound: str = "keep",
        timesteps: Timesteps = "leading", window_frames: int = 0, window_overlap: int = 0, **values: Any,
    ) -> io.NodeOutput:  # fmt: skip
        condition = HostCondition.of_socket(source, "source", "source", not is_flow(model))
        windows = windows_of_video(model, window_frames, window_overlap)
        settings, prompt = made(FlowEditSettings, values), source[0][1].get(PROMPT_KEY)

        def drawn(of: Any, latents: Tensor) -> AttentionStore:
            return draw(of, latents, condition, steps, settings, windows=windows, prompt=prompt).store

        return io.NodeOutput(draw_clip(model, latent, condition, drawn, sound == "keep", timesteps))
