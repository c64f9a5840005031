"""`fatezero generate`: new clips, with objects at given positions."""

from __future__ import annotations

from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ...attention.key_frames import KeyFrames
from ...attention.prompt import PromptEdit
from ...diffusion.word_attention import WordAttention
from ...files.safetensors import format_bytes
from ...files.temporal_layers import about_temporal_layers
from ...imports import torch
from ...methods.layout_guidance import EnergyControl
from ...methods.own_attention import OwnLayout
from ...video.maps import SHEET, map_files, write_heats
from ...video.size import check_size
from ...video.write import shortcomings, write_video
from ..config.settings import GenerateConfig
from ..config.values import generate_config
from ..families import check_generation, check_guidance
from ..frames import decode, for_clip
from ..maps import words_in
from ..objects import check_objects, layout_of
from ..options import (
    AS_USUAL,
    GROUPS,
    RunOptions,
    generate_options,
    given_of,
)
from ..outputs import check_folder
from ..plan import check_size_fits
from ..session import Session

if TYPE_CHECKING:
    from ...hosts.diffusers.model import Model

GenerateOptions = generate_options()


def command(
    *,
    output: Annotated[
        str, Parameter(name=("--output", "-o"), group=GROUPS["The clip"], help="Output, as in `fatezero edit`.")
    ] = "clip.mp4",
    maps: Annotated[
        Path | None,
        Parameter(
            group=GROUPS["The clip"],
            help="Folder for heat maps of the attention to each word of the prompt: a video of each, and steps.png "
            "with the middle frame over the steps.",
        ),
    ] = None,
    options: Annotated[GenerateOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    run: RunOptions = AS_USUAL,
) -> None:
    """Generate a clip from a prompt, with objects at given positions (cross-attention guidance)."""
    config = generate_config(given_of(options))
    if maps is not None:
        check_folder(maps, "maps", "--maps")
    run_generate(run.session(), config, output, run.dry_run, maps)


def run_generate(
    session: Session, config: GenerateConfig, output: str, dry_run: bool, maps: Path | None = None
) -> None:
    """Generate a clip and write it; rejects invalid input before the first step. maps: the folder for heat maps."""
    if maps is not None and config.layout.mode == "forward" and config.places_objects:
        raise ValueError("maps: forward guidance replaces attention, which cannot be recorded: use backward")
    with session.outputs(config) as outputs:
        check_objects(config, config.prompt)
        outputs.clip(output, config.frames)
        for path in () if maps is None else (maps / SHEET, *map_files(maps, words_in(config.prompt)).values()):
            outputs.file(path)
        _generate(session, config, output, dry_run, maps)


def _generate(session: Session, config: GenerateConfig, output: str, dry_run: bool, maps: Path | None) -> None:
    from ...diffusion.generate import generate
    from ...hosts.diffusers import DiffusersDenoiser
    from ...hosts.diffusers.memory import guidance_bytes

    check_generation(config, maps is not None)
    checkpoint = session.open_model(config.chosen_model, videos=True)
    check_guidance(checkpoint, config)
    side = checkpoint.native_size
    width, height = config.size or (side, side)
    check_size(width, height, checkpoint.multiple)
    sides = height // checkpoint.factor, width // checkpoint.factor
    shape = (checkpoint.latent_frames(config.frames), checkpoint.channels, *sides)
    checkpoint = for_clip(checkpoint, shape, config.fps)
    check_size_fits(checkpoint, shape)
    blocks = checkpoint.blocks(config.prompt, config.negative)
    text = checkpoint.encode_prompt(config.prompt, width, height, blocks)
    empty = checkpoint.encode_negative(config.negative, width, height, blocks)
    denoiser = checkpoint.denoiser
    denoiser.schedule(config.steps)
    placed = layout_of(config, checkpoint.tokenizer, config.prompt, config.frames)
    layout = placed.guidance(config.frames, height, width, text.text_tokens) if placed else None
    guided = sum(layout.guides(step, config.steps) for step in range(config.steps)) if layout else 0
    session.say(
        f"{config.frames} frames of {width}x{height}, {config.steps} steps, {guided} of them with guidance, "
        f"{checkpoint.device}"
    )
    keys, norm = _as_trained(checkpoint, config)
    if layout is not None:
        if not isinstance(denoiser, DiffusersDenoiser):
            raise ValueError("a layout needs a UNet: there is no gradient guidance for video transformers")
        if layout.guided_calls(config.steps):
            alike = layout.like(shape[0]) if isinstance(layout, OwnLayout) else layout
            most, plain = guidance_bytes(denoiser, shape, text, keys, norm, partial(EnergyControl, layout=alike))
            session.say(f"   activations: {format_bytes(most)} of a gradient, {format_bytes(plain)} of a plain call")
    if not denoiser.frames_meet:
        session.note("this is an image model, so the frames will hardly match: give --temporal")
    rate = Fraction(str(config.fps))
    for lost in shortcomings(output, rate, config.frames, sound=False):
        session.note(lost)
    if dry_run:
        return
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))
    attention = None if maps is None else _attention_to_words(checkpoint, config.prompt, text.text_tokens)
    with session.bars() as bar:
        latents = generate(
            denoiser, noise, text, empty, config.steps, config.guidance_scale, keys, norm, layout=layout,
            attention=attention, progress=bar("generate"),
        )  # fmt: skip
        write_video(output, decode(checkpoint, latents, config.frames, bar(f"write {Path(output).name}")), rate)
    if maps is not None and attention is not None:
        write_heats(maps, attention.steps(), (height, width), rate * len(latents) / config.frames)
        session.say(f"heat maps written to {maps}")
    session.say(f"{config.prompt!r} written to {output}")


def _attention_to_words(checkpoint: Model, prompt: str, text_tokens: int) -> WordAttention:
    pair = PromptEdit(prompt, prompt, checkpoint.tokenizer)
    return WordAttention(pair.columns_of_words(prompt, text_tokens))


def _as_trained(checkpoint: Model, config: GenerateConfig) -> tuple[KeyFrames, bool]:
    """The given key frames and clip norm, or those of the model's training."""
    own_keys, own_norm = checkpoint.denoiser.trained_with
    about = about_temporal_layers(config.temporal) if config.temporal else {}
    keys = KeyFrames.parse(about["key_frames"]) if "key_frames" in about else KeyFrames(own_keys)
    norm = about["clip_norm"] == "true" if "clip_norm" in about else own_norm
    return (
        keys if config.key_frames is None else KeyFrames.of(config.key_frames),
        norm if config.clip_norm is None else config.clip_norm,
    )
