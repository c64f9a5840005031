"""Inversion and edit in the host's own way of sampling: GUIDERs, a SAMPLER and SIGMAS for *SamplerCustomAdvanced*."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.editing import EditGuider
from ..hosts.comfyui.families import MODELS, check_known
from ..hosts.comfyui.inversion import InvertGuider, store_of
from ..hosts.comfyui.noise import noise_of
from ..hosts.comfyui.sampling import DDIMSampler
from .edit import INPUTS, Asked, report_of
from .inversion import MODEL_AND_SOURCE, SETTINGS, STEPS, asked_of
from .sockets import AttentionStoreSocket, schema, show_on_node


class FateZeroSigmas(io.ComfyNode):
    """FateZero's noise levels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroSigmas",
            display_name="DDIM Sigmas (FateZero)",
            description="The noise levels of Invert Video and Edit Video, for SamplerCustomAdvanced: from noise to the "
            "clip for an edit, through Flip Sigmas for an inversion. Other schedulers work too, the same for both.",
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
    """DDIM steps, both ways."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroDDIM",
            display_name="DDIM Sampler (FateZero)",
            description="Deterministic DDIM for SamplerCustomAdvanced: to the clip along falling sigmas, to noise "
            "along rising ones. Runs Inversion Guider and Edit Guider as Invert Video and Edit Video do; with other "
            "guiders it is a plain inversion or sampling.",
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
            description="Invert Video for SamplerCustomAdvanced: with DDIM Sampler, Disable Noise, flipped sigmas and "
            "the clip's latent it gives the noise, of which Inversion's Store makes the attention store.",
            search_aliases=["ddim inversion", "unsampler", "guider", "custom sampler"],
            inputs=[*MODEL_AND_SOURCE, *SETTINGS],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, source: Any, **settings: Any) -> io.NodeOutput:
        node = cls.hidden.unique_id
        condition = HostCondition.of_socket(source, "source", "source")
        guider = InvertGuider(model, condition, asked_of(source, **settings), lambda text: show_on_node(node, text))
        return io.NodeOutput(guider)


class FateZeroStoreOfInversion(io.ComfyNode):
    """The store that an Inversion Guider left with its noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroStoreOfInversion",
            display_name="Inversion's Store (FateZero)",
            description="The attention store of a noise that SamplerCustomAdvanced made with an Inversion Guider.",
            search_aliases=["attention store", "custom sampler"],
            inputs=[io.Latent.Input("noise", tooltip="The sampler's output itself, with no node between.")],
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
            "DDIM Sampler gives what Edit Video gives; samplers of the host that keep to the steps (euler, dpmpp_2m) "
            "work where the edit blends no latents.",
            search_aliases=["video edit", "prompt edit", "guider", "custom sampler"],
            inputs=INPUTS,
            outputs=[
                io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced."),
                io.String.Output("report", display_name="report", tooltip="What will be fused and spent."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, store: Any, **asked: Any) -> io.NodeOutput:
        node, store = cls.hidden.unique_id, store.with_model(model)
        one = Asked(model=model, store=store, **asked)
        edit = one.edit()

        def tell(reached: int) -> None:
            show_on_node(node, report_of(model, reached, store, edit))

        guider = EditGuider(model, store, [edit], one.chunk_frames or None, tell)
        text = report_of(model, None, store, edit)
        return io.NodeOutput(guider, text, ui=ui.PreviewText(text))
