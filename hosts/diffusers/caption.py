"""A caption of a picture by a captioning model of transformers, such as BLIP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...imports import Image, no_grad, torch

if TYPE_CHECKING:
    from torch import Tensor

WORDS = 40
"""The maximal number of tokens of a caption."""


@no_grad
def caption(name: str, frame: Tensor, device: torch.device | str = "cpu", local_files_only: bool = False) -> str:
    """A caption of a frame, uint8 (height, width, 3), without a prompt and the same each time.

    name: a folder, or a hub name, which may use the network. Raises OSError if it is missing, ValueError for a model
    that does not write text for a picture.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where: dict[str, Any] = {"local_files_only": local_files_only}
    model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, **where).to(device).eval()
    processor = AutoProcessor.from_pretrained(name, **where)
    inputs = processor(images=Image.fromarray(frame.numpy()), return_tensors="pt").to(device)
    written = model.generate(**inputs, max_new_tokens=WORDS, do_sample=False, num_beams=1)
    return " ".join(processor.batch_decode(written, skip_special_tokens=True)[0].split())
