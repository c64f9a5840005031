"""Contact sheets: rows of frames with a title each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


def enlarge(frames: Tensor, times: int) -> Tensor:
    """Repeat every pixel of (frames, height, width, 3), so that codecs keep its edges."""
    return frames.repeat_interleave(times, 1).repeat_interleave(times, 2)


def mask_frames(masks: Tensor) -> Tensor:
    """Masks (frames, height, width) in 0..1 as grey uint8 frames."""
    return (masks.clamp(0, 1) * 255).round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
