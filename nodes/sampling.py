"""Inversion and edit with the host's custom sampling: GUIDERs, a SAMPLER and SIGMAS for *SamplerCustomAdvanced*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.editing import guider_of
from ..hosts.comfyui.families import MODELS, check_known, facts_of, takes_of
from ..hosts.comfyui.inversion import InvertGuider, store_of
from ..hosts.comfyui.noise import noise_of
from ..hosts.comfyui.sampling import DDIMSampler
from .edit import INPUTS, EditInputs, report_of
from .inversion import MODEL_AND_SOURCE, REUSE, SETTINGS, SOUND, STEPS, WINDOWS, invert_settings
from .sockets import AttentionStoreSocket, schema, show_on_node


class FateZeroSigmas(io.ComfyNode):
    """The noise levels of Invert Video and Edit Video."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSigmas",
            display_name="DDIM Sigmas (FateZero)",
            description="The noise levels of Invert Video and Edit Video, for SamplerCustomAdvanced. For an inversion, "
            "connect Flip Sigmas. Other schedulers work too if inversion and edit use the same.",
            search_aliases=["scheduler", "sigmas", "ddim", "custom sampler"],
            inputs=[
                io.Model.Input("model", tooltip=f"{MODELS}."),
                STEPS,
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="From noise to the clip.")],
        )

    @classmethod
    def execute(cls, model: Any, steps: int) -> io.NodeOutput:
        check_known(model)
        noisy = noise_of(model)
        return io.NodeOutput(noisy.sigmas(noisy.schedule(steps)))


class FateZeroDDIM(io.ComfyNode):
    """DDIM steps in both directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroDDIM",
            display_name="DDIM Sampler (FateZero)",
            description="Deterministic DDIM for SamplerCustomAdvanced: sampling along decreasing sigmas, inversion "
            "along increasing ones. With Inversion Guider and Edit Guider the results equal Invert Video and Edit "
            "Video.",
            search_aliases=["sampler", "ddim inversion", "unsampler", "custom sampler"],
            inputs=[],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(DDIMSampler())


class FateZeroInvertGuider(io.ComfyNode):
    """Invert Video as a GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroInvertGuider",
            display_name="Inversion Guider (FateZero)",
            description="Invert Video for SamplerCustomAdvanced. Use it with DDIM Sampler, Disable Noise, flipped "
            "sigmas and the clip's latent; Inversion's Store turns the resulting noise into the attention store.",
            search_aliases=["ddim inversion", "unsampler", "guider", "custom sampler"],
            inputs=[*MODEL_AND_SOURCE, *SETTINGS, SOUND, REUSE, *WINDOWS],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, source: Any, **settings: Any) -> io.NodeOutput:
        node = cls.hidden.unique_id
        condition = HostCondition.of_socket(source, "source", "source", facts_of(model).attention, takes_of(model))
        guider = InvertGuider(
            model, condition, invert_settings(model, source, **settings), lambda text: show_on_node(node, text)
        )
        return io.NodeOutput(guider)


class FateZeroStoreOfInversion(io.ComfyNode):
    """The store of a noise from an Inversion Guider."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroStoreOfInversion",
            display_name="Inversion's Store (FateZero)",
            description="The attention store of the noise from SamplerCustomAdvanced with an Inversion Guider.",
            search_aliases=["attention store", "custom sampler"],
            inputs=[io.Latent.Input("noise", tooltip="The sampler's output; connect it directly.")],
            outputs=[AttentionStoreSocket.Output("store", display_name="attention store", tooltip="For the edit.")],
        )

    @classmethod
    def execute(cls, noise: dict[str, Any]) -> io.NodeOutput:
        return io.NodeOutput(store_of(noise["samples"]))


class FateZeroEditGuider(io.ComfyNode):
    """Edit Video as a GUIDER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroEditGuider",
            display_name="Edit Guider (FateZero)",
            description="Edit Video for SamplerCustomAdvanced, with Disable Noise, the inversion's noise and sigmas. "
            "With DDIM Sampler the result equals Edit Video's; samplers with one call per step (euler, dpmpp_2m) work "
            "if the edit does not blend latents. For FlowEdit, connect the clip's latent instead, and any sigmas.",
            search_aliases=["video edit", "prompt edit", "guider", "custom sampler"],
            inputs=INPUTS,
            outputs=[
                io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced."),
                io.String.Output("report", display_name="report", tooltip="The fused steps and the cost."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, store: Any, **inputs: Any) -> io.NodeOutput:
        node, store = cls.hidden.unique_id, store.with_model(model)
        one = EditInputs(model=model, store=store, **inputs)
        edit = one.edit()

        def notify(hooked: int) -> None:
            show_on_node(node, report_of(model, hooked, store, edit, one.notes))

        guider = guider_of(model, store, [edit], one.chunk_frames or None, notify)
        text = report_of(model, None, store, edit, one.notes)
        return io.NodeOutput(guider, text, ui=ui.PreviewText(text))
