"""Edits of a store, with the clip, settings and model of its inversion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..diffusion.source import check_store
from ..imports import np, torch
from ..settings import settings_of, shown
from ..store.origin import Origin
from ..store.store import AttentionStore, StoreError, as_store_error
from ..video.fitted import FittedVideo
from ..video.read import Sound, SoundTrack, VideoSource
from ..video.which import ClipSettings
from .config.paths import digest_of, is_here
from .config.settings import AUTO, EditConfig
from .config.values import checked
from .frames import find_frames

if TYPE_CHECKING:
    from ..hosts.diffusers.model import Model
    from .session import Session

_OF_THE_CLIP = tuple(one.name for one in settings_of(ClipSettings))
_KEPT = (*_OF_THE_CLIP, "precision", "keep_steps")
"""The settings that a store contains."""


def origin_of(checkpoint: Model, config: EditConfig, video: FittedVideo) -> Origin:
    """The origin of an inverted clip."""
    sound, samples, rate = video.sound(), None, None
    if sound is not None:
        blocks = [np.round(block.clip(-1, 1) * 32767).astype(np.int16) for block in sound.blocks()]
        samples, rate = torch.from_numpy(np.concatenate(blocks, axis=1)), sound.rate
    return Origin(
        video.fps, len(video), video.times, {name: getattr(config, name) for name in _KEPT}, checkpoint.vae_identity,
        config.model, Path(config.video).name, video.size, samples, rate, digest_of(config.video),
    )  # fmt: skip


def read_origin(store: AttentionStore) -> Origin:
    """The origin of a store's clip, with checked settings. Raises StoreError for invalid content."""
    origin = Origin.of(store)
    with as_store_error("the store's description of its clip is damaged: "):
        return replace(origin, settings=checked({name: v for name, v in origin.settings.items() if name in _KEPT}))


def cut_of(origin: Origin) -> EditConfig:
    """The settings of a store's clip: its frames and crop."""
    return EditConfig(**{name: origin.settings[name] for name in _OF_THE_CLIP if name in origin.settings})


def video_of(origin: Origin, video: str) -> VideoSource:
    """The frames of a store's clip in its video."""
    named = {name: v for name, v in origin.settings.items() if name in ("start", "end", "stride", "fps", "background")}
    return find_frames(replace(EditConfig(video=video, count=origin.frames), **named))


def sound_of(origin: Origin, video: str) -> Sound | SoundTrack | None:
    """The sound of a video's frames, if a video is given with the store; else the store's sound."""
    if video:
        return video_of(origin, video).sound()
    if origin.sound is None or origin.sound_rate is None:
        return None
    return Sound(origin.sound.numpy().astype(np.float32) / 32767, origin.sound_rate)


def note_of_other_video(session: Session, origin: Origin | None, files: Mapping[str, str]) -> None:
    """Note that the video of an edit is another file than its store's. files: the digests of the edit's."""
    if origin is not None and origin.digest and files.get("video", origin.digest) != origin.digest:
        session.note(
            f"the video is not the file {origin.video} that was inverted: the result has its sound, and its pixels "
            "where they stay"
        )


def with_store(config: EditConfig, store: AttentionStore, origin: Origin) -> EditConfig:
    """A configuration with the store's settings. Raises StoreError if it has others."""
    default = EditConfig()
    made: dict[str, tuple[Any, ...]] = {
        "steps": (store.steps,),
        "order": (store.order,),
        "reuse_midpoint": (store.reuse_midpoint,),
        "inversion_steps": (store.inversion_steps, store.inversion_steps or store.steps),
        "memory": (store.memory, "auto"),
        "clip_norm": (store.clip_norm,),
        "key_frames": (store.key_frames.entries,),
        "source": (store.prompt or config.source, AUTO),
        **{name: (origin.settings.get(name),) for name in _KEPT},
    }
    made["count"] += (origin.frames,)
    for name, allowed in made.items():
        given = getattr(config, name)
        if given not in (getattr(default, name), *allowed):
            raise StoreError(f"the store was made with {name} {shown(allowed[0])}, not {shown(given)}")
    for name in ("place", "budget_gb"):
        if getattr(config, name) != getattr(default, name):
            raise StoreError(f"{name} has no effect on an existing store")
    model = config.model if config.model != default.model else _model_of(origin)
    return replace(
        config, steps=store.steps, order=store.order, reuse_midpoint=store.reuse_midpoint,
        inversion_steps=store.inversion_steps,
        memory=store.memory, clip_norm=store.clip_norm, model=model,
        key_frames=store.key_frames.entries, key_frames_least_channels=store.key_frames.least_channels,
        source=store.prompt or config.source,
    )  # fmt: skip


def _model_of(origin: Origin) -> str:
    """The store's model if it is bundled or on this machine; only users name models to download."""
    name = origin.model or EditConfig().model
    if is_here(name):
        return name
    raise StoreError(
        f"the store was made with the model {shown(name)}, which is not on this machine: give it with --model"
    )


def check_of_store(checkpoint: Model, store: AttentionStore, origin: Origin, prompts: Iterable[Any]) -> None:
    """Raise StoreError for a store of another model, autoencoder, text encoder or prompt."""
    schedule = checkpoint.denoiser.schedule(store.steps)
    for prompt in prompts:
        check_store(store, checkpoint.denoiser, schedule, prompt)
    if origin.vae is not None and not origin.vae.matches(checkpoint.vae_identity):
        raise StoreError("the store's latents are from another autoencoder than this model's: invert again")
    if store.prompt is None:
        return
    height, width = (side * checkpoint.factor for side in store.levels.shape[-2:])
    blocks = store.source.text_tokens // checkpoint.encode_prompt("", width, height).text_tokens
    encoded = checkpoint.encode_prompt(store.prompt, width, height, blocks).embeddings.float().cpu()
    kept = store.source.embeddings.float().cpu()
    if encoded.shape != kept.shape or not torch.linalg.norm(encoded - kept) <= 0.02 * torch.linalg.norm(kept):
        raise StoreError(
            f"the store's prompt {shown(store.prompt)} has other embeddings by this model's text encoder: invert again"
        )
