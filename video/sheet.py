"""Contact sheets: rows of frames, each with a title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def contact_sheet(rows: Sequence[tuple[str, Tensor]], title: str = "", tile: int = 128) -> Image.Image:
    """Draw rows of (label, frames), frames being uint8 (frames, height, width, 3).

    tile: the width of a frame in pixels; small frames are enlarged without smoothing.
    """
    font = ImageFont.load_default(size=15)
    height, width = rows[0][1].shape[1:3]
    tall, gap, head = round(tile * height / width), 4, 26
    columns = max(len(frames) for _, frames in rows)
    page = Image.new(
        "RGB", (columns * (tile + gap) + gap, (len(rows)) * (tall + head) + (head + 4 if title else 0) + gap), "white"
    )
    draw = ImageDraw.Draw(page)
    y = gap
    if title:
        draw.text((gap + 2, y), title, fill="black", font=ImageFont.load_default(size=17))
        y += head + 4
    for label, frames in rows:
        draw.text((gap + 2, y + 3), label, fill="#333333", font=font)
        y += head
        for i, frame in enumerate(frames):
            picture = Image.fromarray(frame.cpu().numpy())
            smooth = Image.Resampling.LANCZOS if width > tile else Image.Resampling.NEAREST
            page.paste(picture.resize((tile, tall), smooth), (gap + i * (tile + gap), y))
        y += tall
    return page


def side_by_side(pictures: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """Pictures in one row, on white."""
    page = Image.new("RGB", (sum(p.width + gap for p in pictures) - gap, max(p.height for p in pictures)), "white")
    for i, picture in enumerate(pictures):
        page.paste(picture, (sum(p.width + gap for p in pictures[:i]), 0))
    return page


def enlarge(frames: Tensor, times: int) -> Tensor:
    """Repeat every pixel of (frames, height, width, 3), so that codecs preserve its edges."""
    return frames.repeat_interleave(times, 1).repeat_interleave(times, 2)


def mask_frames(masks: Tensor) -> Tensor:
    """Masks (frames, height, width) in 0..1 as grey uint8 frames."""
    return (masks.clamp(0, 1) * 255).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3)


def heat_map(heat: Tensor, size: tuple[int, int], label: str) -> Tensor:
    """Attention (frames, y, x), each frame divided by its maximum, in colours: uint8 (frames, *size, 3)."""
    peak = heat.amax((1, 2), keepdim=True).clamp(min=1e-12)
    smooth = F.interpolate((heat / peak)[:, None], size=size, mode="bicubic")[:, 0].clamp(0, 1)
    stops = torch.tensor([(0, 0, 40), (90, 0, 120), (220, 50, 60), (255, 170, 40), (255, 255, 200)]).float()
    place = smooth * (len(stops) - 1)
    below = place.floor().long().clamp(max=len(stops) - 2)
    colours = torch.lerp(stops[below], stops[below + 1], (place - below)[..., None]).round().to(torch.uint8)
    return torch.stack([_labelled(frame, label) for frame in colours])


def heat_steps(heats: Mapping[str, Tensor], size: tuple[int, int], most: int = 8) -> Image.Image:
    """A sheet of the middle frame's attention over at most `most` steps, a row of each word.

    heats: (steps, frames, y, x) of each word. size: height and width of a picture.
    """
    steps, frames = next(iter(heats.values())).shape[:2]
    shown = torch.linspace(0, steps - 1, min(most, steps)).round().long()
    rows = [(word, heat_map(heat[shown, frames // 2], size, "")) for word, heat in heats.items()]
    return contact_sheet(rows, f"frame {frames // 2}, {len(shown)} steps from noisy to clean")


OUTLINES = ((230, 60, 60), (60, 150, 240), (250, 190, 40), (90, 200, 110), (190, 100, 230))
"""Colours of the first, second, ... object."""


def outlined(frames: Tensor, masks: Sequence[tuple[str, Tensor]]) -> Tensor:
    """Frames (frames, height, width, 3) in 0..1 with tinted and labelled masks (frames, height, width) in 0..1."""
    shown = frames.clone()
    for i, (_, mask) in enumerate(masks):
        colour = torch.tensor(OUTLINES[i % len(OUTLINES)]).to(shown) / 255
        inner = -F.max_pool2d(-mask[:, None], 5, stride=1, padding=2)[:, 0]
        share = (0.25 * mask + 0.75 * (mask - inner).clamp(min=0)).to(shown)[..., None]
        shown = torch.lerp(shown, colour.expand_as(shown), share)
    return torch.stack([_named(frame, [(label, mask[f]) for label, mask in masks]) for f, frame in enumerate(shown)])


def _named(frame: Tensor, objects: Sequence[tuple[str, Tensor]]) -> Tensor:
    """A picture with each label at the upper left of its mask, if that is not empty."""
    picture = Image.fromarray((frame.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=max(10, picture.height // 18))
    for i, (label, mask) in enumerate(objects):
        rows, columns = torch.where(mask > 0.5)
        if len(rows):
            at = (int(columns.min()) + 4, int(rows.min()) + 2)
            draw.text(at, label, fill=OUTLINES[i % len(OUTLINES)], font=font, stroke_width=1, stroke_fill="black")
    return torch.from_numpy(np.asarray(picture).copy()).to(frame) / 255


def _labelled(frame: Tensor, label: str) -> Tensor:
    picture = Image.fromarray(frame.numpy())
    font = ImageFont.load_default(size=max(10, picture.height // 16))
    ImageDraw.Draw(picture).text((4, 2), label, fill="white", font=font)
    return torch.from_numpy(np.asarray(picture).copy())
