"""The Attention Maps node."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import numpy as np
import torch
from comfy_api.latest import io
from einops import rearrange
from torch import Tensor

from ..attention.prompt import PromptEdit
from ..diffusion.parts import Edit
from ..diffusion.word_attention import WordAttention
from ..hosts.comfyui.attention_maps import AttentionGuider
from ..hosts.comfyui.conditions import HostCondition
from ..hosts.comfyui.families import tokenizer_of
from ..hosts.comfyui.unet import check_unet
from ..video.sheet import heat_map, heat_steps
from .prompt import check_clip, encoded, unweighted
from .settings import widget
from .sockets import schema

PIXELS = 8
"""Pixels of a heat map per latent and side."""


class FateZeroAttentionMaps(io.ComfyNode):
    """Generate a clip, and show its attention to words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroAttentionMaps",
            display_name="Attention Maps (FateZero)",
            description="Generates a clip with any sampler, like SamplerCustomAdvanced, and shows where the frames "
            "attend to each word of the prompt. With temporal layers a batch is a clip, otherwise single pictures.",
            search_aliases=["heat map", "daam", "cross attention", "text to video"],
            inputs=[
                io.Model.Input("model", tooltip="An SD 1.x, SD 2.x or SDXL model, with any LoRA and temporal layers."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.Conditioning.Input("negative", tooltip="Negative prompt."),
                io.Noise.Input("noise", tooltip="The noise to start from (RandomNoise)."),
                io.Sampler.Input("sampler", tooltip="Any sampler."),
                io.Sigmas.Input("sigmas", tooltip="The noise levels of the steps."),
                io.Latent.Input("latent_image", tooltip="Empty latents, one for each frame."),
                io.String.Input("prompt", multiline=True, tooltip="What the clip should show."),
                io.String.Input(
                    "words", default="", tooltip="Words of the prompt, separated by commas. Empty: every word."
                ),
                widget(Edit, "guidance_scale", "guidance"),
            ],
            outputs=[
                io.Latent.Output("output", display_name="latent", tooltip="The generated clip."),
                io.Image.Output(
                    "heat", display_name="heat maps", tooltip="Frames with the words side by side, averaged over steps."
                ),
                io.Image.Output("steps", display_name="steps", tooltip="The middle frame over the steps."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, negative: Any, noise: Any, sampler: Any, sigmas: Any,
        latent_image: dict[str, Any], prompt: str, words: str, guidance: float,
    ) -> io.NodeOutput:  # fmt: skip
        check_clip(clip)
        check_unet(model)
        text = unweighted(prompt)
        if not text:
            raise ValueError("prompt: is empty: describe the clip")
        pair = PromptEdit(text, text, tokenizer_of(clip))
        conditioning: Any = encoded(clip, prompt, pair, "prompt")
        positive = HostCondition.of_socket(conditioning, "positive", "prompt")
        unwanted = HostCondition.of_socket(negative, "negative", "negative")
        attention = WordAttention(_columns(pair, text, words, positive.text_tokens))
        guider = AttentionGuider(model, positive, unwanted, guidance, attention)
        samples = comfy.sample.fix_empty_latent_channels(guider.model_patcher, latent_image["samples"])
        given = {**latent_image, "samples": samples}
        made = guider.sample(
            noise.generate_noise(given), samples, sampler, sigmas, denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1), disable_pbar=True,
            seed=noise.seed,
        )  # fmt: skip
        heats, size = attention.steps(), (PIXELS * samples.shape[-2], PIXELS * samples.shape[-1])
        output = {**given, "samples": made.to(comfy.model_management.intermediate_device())}
        return io.NodeOutput(output, heat_images(heats, size), steps_image(heats, size))


def heat_images(heats: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """Frames with the words side by side, averaged over steps, as an IMAGE. heats: (steps, frames, y, x) of words."""
    pictures = torch.stack([heat_map(heat.mean(0), size, word) for word, heat in heats.items()])
    return rearrange(pictures, "w f y x c -> f y (w x) c").float() / 255


def steps_image(heats: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
    """The middle frame over the steps, as an IMAGE."""
    return torch.from_numpy(np.asarray(heat_steps(heats, size)).copy())[None].float() / 255


def _columns(pair: PromptEdit, prompt: str, words: str, text_tokens: int) -> dict[str, list[int]]:
    """The columns of some words of a prompt, separated by commas, or of all."""
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    if not chosen:
        return pair.columns_of_words(prompt, text_tokens)
    return {word: pair.token_indices(prompt, word, text_tokens, "words") for word in chosen}
