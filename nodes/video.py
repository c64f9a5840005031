"""Videos to frames and latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import InputImpl, Types, io

from ..settings import setting_of
from ..video.pictures import VideoError
from ..video.read import open_video
from ..video.size import check_crop, crop, fit_size, resize_to_fill
from ..video.which import ClipSettings, colour_of
from .files import inside
from .settings import widget
from .sockets import schema, show_on_node


def _choices() -> list[str]:
    names = [path.name for path in Path(folder_paths.get_input_directory()).iterdir() if path.is_file()]
    return sorted(folder_paths.filter_files_content_types(names, ["video", "image"]))


class FateZeroLoadVideo(io.ComfyNode):
    """Chosen frames of a video, cropped and scaled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroLoadVideo",
            display_name="Load Video Frames (FateZero)",
            description="Loads frames of a video, cropped and scaled to multiples of 8.",
            search_aliases=["video to frames", "load clip", "vhs load video"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=["", *_choices()],
                    default="",
                    upload=io.UploadType.video,
                    tooltip="A video in the input folder. Leave empty if the video socket is connected.",
                ),
                io.Int.Input("start", default=0, min=0, max=1_000_000, tooltip="The first frame, counted from 0."),
                widget(ClipSettings, "stride"),
                widget(ClipSettings, "count", default=8, tooltip=setting_of(ClipSettings, "count").meta.text),
                io.Int.Input(
                    "width",
                    default=512,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Pixels, a multiple of 8. 0: from the height; both 0: the video's size.",
                ),
                io.Int.Input(
                    "height",
                    default=512,
                    min=0,
                    max=16384,
                    step=8,
                    tooltip="Pixels, a multiple of 8. 0: from the width; both 0: the video's size.",
                ),
                *(
                    io.Int.Input(f"crop_{side}", default=0, min=0, max=16384, tooltip=f"Pixels to crop at the {side}.")
                    for side in ("left", "top", "right", "bottom")
                ),
                io.Video.Input("video", optional=True, tooltip="A video from another node, instead of the file."),
                widget(ClipSettings, "background", advanced=True, optional=True),
            ],
            outputs=[
                io.Image.Output("images", display_name="images", tooltip="The chosen frames."),
                io.Video.Output("clip", display_name="video", tooltip="The chosen frames as a video, with sound."),
                io.Float.Output("fps", display_name="frame rate", tooltip="Frames per second of the chosen frames."),
                io.Int.Output("frames", display_name="frame count", tooltip="Number of chosen frames."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: str = "") -> bool | str:
        return True if not file or inside(file) else f"file: no video {file!r} in the input or output folder"

    @classmethod
    def fingerprint_inputs(cls, file: str = "", **_: Any) -> Any:
        path = inside(file) if file else None
        return path and path.stat().st_mtime

    @classmethod
    def execute(
        cls,
        file: str,
        start: int,
        stride: int,
        count: int,
        width: int,
        height: int,
        crop_left: int,
        crop_top: int,
        crop_right: int,
        crop_bottom: int,
        video: Any = None,
        background: str = "black",
    ) -> io.NodeOutput:
        path = _chosen(file) if video is None else _file_of(video)
        cut = (crop_left, crop_top, crop_right, crop_bottom)
        if path is None:
            part = _part_of(video.get_components(), start, stride, count)
        else:
            part = _part_of_file(path, start, stride, count, _colour(background))
        if part.notes:
            show_on_node(cls.hidden.unique_id, "\n".join(part.notes))
        check_crop(*part.size, *cut)
        size = _size(part.size[0] - crop_left - crop_right, part.size[1] - crop_top - crop_bottom, width, height)
        images = torch.empty(part.count, size[1], size[0], 3)
        bar = comfy.utils.ProgressBar(part.count)
        for image, frame in zip(images, part.frames, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            torch.div(resize_to_fill(crop(frame[None], *cut), *size)[0], 255, out=image)
            bar.update(1)
        clip = InputImpl.VideoFromComponents(
            Types.VideoComponents(images=images, audio=part.sound, frame_rate=part.fps)
        )
        return io.NodeOutput(images, clip, float(part.fps), len(images))


@dataclass(frozen=True)
class _Part:
    """A stream of uint8 frames (height, width, 3) with their count, size and rate, and the host's AUDIO.

    notes: warnings about the file.
    """

    frames: Iterator[torch.Tensor]
    count: int
    size: tuple[int, int]
    fps: Fraction
    sound: Any
    notes: tuple[str, ...] = ()


def _chosen(file: str) -> Path:
    """The file chosen on the node; ValueError for none, or one outside the host's folders."""
    if not file:
        raise ValueError("file: choose a video, or connect one to the video socket")
    path = inside(file)
    if path is None:
        raise ValueError(f"file: no video {file!r} in the input or output folder")
    return path


def _file_of(video: Any) -> str | None:
    """The file behind a VIDEO, for decoding only the chosen frames; None for a video in memory."""
    source = video.get_stream_source() if isinstance(video, InputImpl.VideoFromFile) else None
    return source if isinstance(source, str) else None


UPLOAD = "image"
"""The value of the page's upload button, which workflows saved before `background` have in its place."""


def _colour(background: str) -> tuple[int, int, int]:
    if background == UPLOAD:
        background = ClipSettings().background
    try:
        return colour_of(background)
    except ValueError as error:
        raise ValueError(f"background: {error}") from error


def _part_of_file(path: str | Path, start: int, stride: int, count: int, colour: tuple[int, int, int]) -> _Part:
    """Frames of a file, resampled to its mean rate if its times vary, since a VIDEO has one rate."""
    source = open_video(path, start, stride, count or None, background=colour)
    notes = source.notes
    if not source.even and source.index is not None:
        source = open_video(path, start, stride, count or None, fps=source.index.fps, background=colour)
        notes = (*source.notes, f"variable frame rate: resampled to {float(source.fps):.3g} frames/s")
    track, sound = source.sound(), None
    if track is not None:
        sound = {"waveform": torch.from_numpy(track.read().samples)[None], "sample_rate": track.rate}
    return _Part(source.frames(), len(source), source.size, source.fps, sound, notes)


def _part_of(components: Any, start: int, stride: int, count: int) -> _Part:
    """Frames of a video from another node."""
    last = start + stride * count if count else None
    images = components.images[start:last:stride]
    if not len(images) or (count and len(images) < count):
        raise VideoError(
            f"video: has {len(images)} of {len(components.images)} frames from {start} with stride {stride}, but "
            f"{count or 'some'} are needed"
        )
    rate, fps = Fraction(components.frame_rate), Fraction(components.frame_rate) / stride
    sound = components.audio
    if sound is not None:
        begin = round(start / rate * sound["sample_rate"])
        length = round(len(images) / fps * sound["sample_rate"])
        sound = {**sound, "waveform": sound["waveform"][..., begin : begin + length]}
    frames = ((image[..., :3] * 255).round().to(torch.uint8) for image in images)
    return _Part(frames, len(images), (images.shape[2], images.shape[1]), fps, sound)


def _size(width: int, height: int, set_width: int, set_height: int) -> tuple[int, int]:
    """The size to scale to, in multiples of 8."""
    if set_width and set_height:
        return 8 * max(1, round(set_width / 8)), 8 * max(1, round(set_height / 8))
    scale = set_width / width if set_width else set_height / height if set_height else 1
    return fit_size(width, height, max(8, round(min(width, height) * scale)), 8)


class FateZeroEncodeVideo(io.ComfyNode):
    """Encode frames to latents in chunks."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroEncodeVideo",
            display_name="Encode Video (FateZero)",
            description="VAE-encodes frames in chunks, so that long clips fit in memory. A video VAE encodes all "
            "frames at once; the last frame is repeated to a number that it supports.",
            search_aliases=["vae encode video", "vae encode batch"],
            inputs=[
                io.Image.Input("images", tooltip="The frames of a clip."),
                io.Vae.Input("vae", tooltip="The model's VAE."),
                io.Int.Input("chunk_size", default=8, min=1, max=4096, tooltip="Frames per chunk."),
            ],
            outputs=[
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="One latent per frame, or a video VAE's latents.",
                )
            ],
        )

    @classmethod
    def execute(cls, images: torch.Tensor, vae: Any, chunk_size: int) -> io.NodeOutput:
        ratio = vae.spacial_compression_encode()
        height, width = images.shape[1:3]
        if height % ratio or width % ratio:
            raise ValueError(f"images: {width}x{height} must be multiples of {ratio}: use Load Video Frames (FateZero)")
        if getattr(vae, "latent_dim", 2) == 3:  # a video VAE, which encodes all frames of certain numbers
            missing = _whole(vae, len(images)) - len(images)
            clip = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
            return io.NodeOutput({"samples": vae.encode(clip[..., :3])})
        bar = comfy.utils.ProgressBar(len(images))
        parts = []
        for chunk in images.split(chunk_size):
            comfy.model_management.throw_exception_if_processing_interrupted()
            parts.append(vae.encode(chunk[..., :3]))
            bar.update(len(chunk))
        return io.NodeOutput({"samples": torch.cat(parts)})


def _whole(vae: Any, frames: int) -> int:
    """The least number of frames, of at least so many, that a video VAE encodes without dropping some."""
    try:
        encoded, decoded = vae.downscale_ratio[0], vae.upscale_ratio[0]
        return next(count for count in range(frames, frames + 64) if decoded(encoded(count)) == count)
    except TypeError:  # it encodes each frame
        return frames
