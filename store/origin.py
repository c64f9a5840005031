"""The origin of a store's clip, which a store contains besides latents and attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from .identity import ModelIdentity
from .store import AttentionStore, as_store_error

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Origin:
    """Where the clip of a store is from.

    fps, times: of the frames, in frames a second and seconds; times only where they vary. frames: of the clip, whose
    latents may be fewer. settings: those that cut the clip and kept the store; empty for a store of another program.
    vae: its autoencoder. model: its name as the user gave it. video: the file's name. size: (width, height) in pixels.
    sound: int16 (channels, samples) of these frames, at `sound_rate` samples a second. digest: of the file, empty if it
    is not known.
    """

    fps: Fraction
    frames: int
    times: tuple[Fraction, ...] | None
    settings: dict[str, Any]
    vae: ModelIdentity | None
    model: str | None
    video: str
    size: tuple[int, int] | None = None
    sound: Tensor | None = None
    sound_rate: int | None = None
    digest: str = ""

    def kept(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`AttentionStore.extra` and `AttentionStore.attachments` that keep it."""
        extra = {
            "model": self.model,
            "vae": None if self.vae is None else asdict(self.vae),
            "video": self.video,
            "digest": self.digest,
            "settings": self.settings,
            "size": self.size,
            "frames": self.frames,
            "fps": _pair(self.fps),
            "times": self.times and [_pair(time) for time in self.times],
            "sound_rate": self.sound_rate,
        }
        return extra, {} if self.sound is None else {"sound": self.sound}

    @classmethod
    def of(cls, store: AttentionStore) -> Origin:
        """What a store keeps; StoreError for what no inversion writes."""
        extra = store.extra
        with as_store_error("the store's account of its clip is damaged: "):
            frames, times = _frames_and_times(extra, store.frames)
            fps = _fraction(extra.get("fps", (8, 1)))
            if not 0 < fps <= 1000:
                raise ValueError("invalid frame rate")
            vae, model = extra.get("vae"), extra.get("model")
            video, digest = extra.get("video", ""), extra.get("digest", "")
            if not isinstance(model, (str, type(None))) or not isinstance(video, str) or not isinstance(digest, str):
                raise ValueError("invalid name of its model or its video")
            sound, rate = _sound(extra.get("sound_rate"), store.attachments.get("sound"))
            return cls(
                fps, frames, times, dict(extra.get("settings", {})), None if vae is None else ModelIdentity.read(vae),
                model, video, sound=sound, sound_rate=rate, digest=digest,
            )  # fmt: skip


def _frames_and_times(extra: dict[str, Any], latents: int) -> tuple[int, tuple[Fraction, ...] | None]:
    frames, times = extra.get("frames", latents), extra.get("times")
    if type(frames) is not int or not latents <= frames <= 100 * latents:
        raise ValueError("invalid number of frames")
    times = None if times is None else tuple(_fraction(pair) for pair in times)
    if times is not None and (len(times) != frames or list(times) != sorted(set(times))):
        raise ValueError("invalid timestamps")
    return frames, times


def _sound(rate: Any, samples: Tensor | None) -> tuple[Tensor | None, int | None]:
    if rate is None or samples is None:
        return None, None
    if type(rate) is not int or not 0 < rate < 10**6 or samples.ndim != 2 or not 1 <= len(samples) <= 2:
        raise ValueError("invalid audio")
    return samples, rate


def _pair(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]


def _fraction(pair: Sequence[int]) -> Fraction:
    numerator, denominator = pair
    if type(numerator) is not int or type(denominator) is not int or denominator < 1 or numerator < 0:
        raise ValueError(f"invalid timestamp {pair}")
    return Fraction(numerator, denominator)
