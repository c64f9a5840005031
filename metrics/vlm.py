"""FiVE-Acc: questions to a vision-language model on an edited clip (Li et al., ICCV 2025, arXiv 2503.13684)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..video.size import to_bytes

Answer = Callable[[Tensor, str], str]
"""The text that a model answers to frames (f, 3, h, w) in 0..1 and a question."""
_YES_NO = "Answer this question with YES or NO only:\n"
_CHOICE = "Choose the right answer, and write only its letter:\n"
_SAMPLES = 4


@dataclass(frozen=True)
class Questions:
    """Two yes-no questions, of the source's object and the target's, and a multiple-choice one whose answer is "b"."""

    source: str
    target: str
    choice: str


def five_accuracy(answer: Answer, frames: Tensor, questions: Questions) -> dict[str, float]:
    """YN (the source's object is gone, the target's is there), MC, their union and intersection, and the mean of these
    four, FiVE-Acc; each 0 or 1, the mean between.

    frames: (f, 3, h, w) in 0..1; of those the authors' selection is shown. Without a question of the source, YN is
    that of the target.
    """
    stride = len(frames) // max(1, len(frames) // _SAMPLES)
    shown = frames[stride // 2 :: stride]

    def starts(instruction: str, question: str, with_: str) -> bool:
        return answer(shown, instruction + question).strip().lower().startswith(with_)

    choice = starts(_CHOICE, questions.choice, "b")
    gone = not questions.source or starts(_YES_NO, questions.source, "no")
    yes_no = starts(_YES_NO, questions.target, "yes") and gone
    found = {"YN": yes_no, "MC": choice, "union": yes_no or choice, "intersection": yes_no and choice}
    return {name: float(right) for name, right in found.items()} | {"FiVE-Acc": sum(found.values()) / len(found)}


def load_vlm(name: str, device: torch.device | str = "cpu", local_files_only: bool = False) -> Answer:
    """A vision-language model of transformers that chats; FiVE-Bench uses "Qwen/Qwen2.5-VL-7B-Instruct".

    The frames are given as pictures. Raises OSError if it is missing, ValueError for a model that does not chat.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where: dict[str, Any] = {"local_files_only": local_files_only}
    processor = AutoProcessor.from_pretrained(name, **where)
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{name} has no chat template: give a model such as Qwen/Qwen2.5-VL-7B-Instruct")
    model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, dtype="auto", **where)
    model = model.to(device).eval()

    @torch.no_grad()
    def answer(frames: Tensor, question: str) -> str:
        pictures = [{"type": "image", "image": Image.fromarray(frame.numpy())} for frame in to_bytes(frames).cpu()]
        chat = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(device)
        written = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        text: str = processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return text

    return answer
