"""Evaluation of edits by figures, and visual comparison."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import InputImpl, Types, io, ui
from torch import Tensor

from ..metrics.clip import ClipScorer
from ..metrics.evaluate import evaluate
from ..metrics.lpips import Lpips
from ..metrics.plot import plot_report
from ..video.compare import COMPARISONS, compare
from ..video.flow import Estimator, flow_estimator
from ..video.sheet import heat_map
from ..video.size import to_bytes
from .sockets import schema, show_on_node


class FateZeroEvaluate(io.ComfyNode):
    """Figures of an edit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroEvaluate",
            display_name="Evaluate Edit (FateZero)",
            description="Measures an edit: preservation (PSNR, SSIM, LPIPS), how far it stays inside a mask, temporal "
            "consistency (warp error), CLIP scores (Tem-Con, Frame-Acc), and the distance to the ground truth, if "
            "connected.",
            search_aliases=["metrics", "psnr", "ssim", "lpips", "warp error", "clip score", "temporal consistency"],
            inputs=[
                io.Image.Input("source", tooltip="The frames before the edit."),
                io.Image.Input("edited", tooltip="The edited frames: same number and size."),
                io.String.Input("source_prompt", default="", tooltip="A description of the source, for CLIP."),
                io.String.Input("target_prompt", default="", tooltip="What the edit should show, for CLIP."),
                io.Combo.Input(
                    "flow",
                    options=["auto", "dis", "raft", "none"],
                    default="auto",
                    tooltip="Optical flow for the warp error: OpenCV's DIS, or torchvision's RAFT, which downloads its "
                    "weights. auto uses RAFT if its weights are present; none skips the warp error.",
                ),
                io.String.Input(
                    "clip_model",
                    default="",
                    tooltip="A CLIP model of transformers, by folder or hub name; the paper uses "
                    "openai/clip-vit-base-patch32. Empty skips the CLIP scores.",
                ),
                io.String.Input(
                    "lpips_weights", default="", tooltip="A file of LPIPS weights (see help). Empty skips LPIPS."
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where the edit should be: one mask, or one per frame."),
                io.Image.Input("truth", optional=True, tooltip="The ground truth of the edit, if known."),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The figures, one per line."),
                io.Image.Output("plot", display_name="plot", tooltip="A plot of the figures by frame."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        source: Tensor,
        edited: Tensor,
        source_prompt: str,
        target_prompt: str,
        flow: str,
        clip_model: str,
        lpips_weights: str,
        mask: Tensor | None = None,
        truth: Tensor | None = None,
    ) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(max(1, len(source) - 1))

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        device = comfy.model_management.get_torch_device()
        estimator, without = _estimator(flow, device)
        with torch.inference_mode(False), torch.no_grad():
            report = evaluate(
                _frames(source),
                _frames(edited),
                mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]).clone(),
                truth=None if truth is None else _frames(truth),
                prompts=(source_prompt, target_prompt),
                flow=estimator,
                clip=ClipScorer.load(clip_model, device) if clip_model else None,
                lpips=Lpips.load(lpips_weights) if lpips_weights else None,
                progress=progress,
            )
        text = "\n".join([str(report), *without])
        try:
            plot = plot_report(report)
        except ImportError as error:  # the figures do not need it
            text, plot = f"{text}\n{error}", heat_map(torch.zeros(1, 1, 1), (96, 768), str(error))[0]
        show_on_node(cls.hidden.unique_id, text)
        return io.NodeOutput(text, plot[None].float() / 255, ui=ui.PreviewText(text))


def _estimator(name: Any, device: torch.device) -> tuple[Estimator | None, list[str]]:
    """The estimator, and a note if its library is missing, which must not cost the other figures."""
    if name == "none":
        return None, []
    try:
        return flow_estimator(name, device)[1], []
    except ImportError as error:
        return None, [f"warp error skipped: {error}"]


def _frames(images: Tensor) -> Tensor:
    """The host's IMAGE (f, h, w, c) as (f, 3, h, w)."""
    return images[..., :3].movedim(-1, 1).clone()


class FateZeroCompareVideos(io.ComfyNode):
    """Combine two clips for comparison."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroCompareVideos",
            display_name="Compare Videos (FateZero)",
            description="Combines two clips into one, with labels: side by side, as a moving wipe, a split in the "
            "middle, or their difference.",
            search_aliases=["side by side", "wipe", "before after", "difference", "video grid"],
            inputs=[
                io.Image.Input("a", tooltip="The frames of one clip, e.g. the source."),
                io.Image.Input("b", tooltip="The frames of the other: same number and size."),
                io.Combo.Input(
                    "comparison",
                    options=list(COMPARISONS),
                    default="side by side",
                    tooltip="wipe: a line moves from left to right, with b left of it. difference: |a - b|, "
                    "brightened.",
                ),
                io.String.Input("label_a", default="source", tooltip="Text in the frames; may be empty."),
                io.String.Input("label_b", default="edit", tooltip="Text in the frames; may be empty."),
                io.Float.Input("fps", default=8.0, min=0.01, max=240.0, step=0.01, tooltip="Frames per second."),
                io.Audio.Input("audio", optional=True, tooltip="Sound for the video."),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The frames of the comparison."),
                io.Video.Output("video", display_name="video", tooltip="The comparison, for Save Video."),
            ],
        )

    @classmethod
    def execute(
        cls, a: Tensor, b: Tensor, comparison: str, label_a: str, label_b: str, fps: float, audio: Any = None
    ) -> io.NodeOutput:
        first, second = (to_bytes(_frames(x)).cpu() for x in (a, b))
        images = compare(first, second, comparison, (label_a, label_b)).float() / 255  # type: ignore[arg-type]
        rate = Fraction(fps).limit_denominator(1001)
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=audio, frame_rate=rate))
        return io.NodeOutput(images, video)
