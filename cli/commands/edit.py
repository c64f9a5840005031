"""From a video file to a video file: what `fatezero edit` and `fatezero invert` do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ...attention.condition import Condition
from ...attention.control import Control
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.denoiser import frames_meet, keys_on, refuse_clip_norm
from ...diffusion.edit import Edit, check_of_drawn, check_of_transformers, edit_many, unet_calls
from ...diffusion.invert import Inversion, Progress, invert
from ...diffusion.source import check_store
from ...diffusion.spread import ALONE, Spread
from ...files.memory import check_room, free_bytes
from ...files.safetensors import format_bytes
from ...files.temporal_layers import about_temporal_layers, seen_with
from ...files.whole import disk_folder, remove_stale_folders
from ...hosts.diffusers.checkpoint import Checkpoint, CheckpointError, kind_of, quiet
from ...hosts.diffusers.checkpoint_wan import NAME as DEMO_WAN
from ...hosts.diffusers.checkpoint_wan import WanCheckpoint
from ...hosts.diffusers.memory import LiveBytes
from ...methods.flow_edit import draw
from ...methods.flow_smoothing import FlowSmoothing
from ...methods.layout import Layout
from ...methods.move_objects import moves_of
from ...methods.plug_and_play import OF_UNETS
from ...settings import described, shown
from ...store.budget import Demand, StoreSettings, available_bytes, plan_store
from ...store.identity import ModelIdentity
from ...store.records import MEMORIES
from ...store.store import AttentionStore, StoreError, as_store_error
from ...video.fitted import FittedVideo
from ...video.flow import flow_estimator
from ...video.motion import Motion
from ...video.read import Sound, SoundTrack, VideoSource, open_video
from ...video.size import check_size, fit_size, to_bytes, to_unit
from ...video.which import ClipSettings, colour_of
from ...video.write import FrameDigest, shortcomings, write_video
from ..config.settings import EditConfig, GenerateConfig, ModelSettings, TuneConfig, checked
from ..config.paths import check_names, files_of, is_clip, is_here
from ..objects import check_objects, layout_of
from ..outputs import Outputs
from ..progress import Bar, in_a_line, in_words, no_bars, printable
from ..config.record import (
    Made,
    check_same,
    differences,
    files_read,
    metadata_of,
    record_of,
    record_path,
    threads_on,
    versions,
    write_record,
)

if TYPE_CHECKING:
    from ...hosts.diffusers.processes import Processes

CHUNK_FRAMES = 16
"""Frames of one call where nothing says how many, and chunks give the whole clip's result."""
AnyCheckpoint = Checkpoint | WanCheckpoint
Bars = Callable[[], AbstractContextManager[Callable[[str], Bar]]]


def pick_device(name: str) -> torch.device:
    """A device by name; "auto" takes CUDA, then MPS, then the CPU. ValueError for one that is absent."""
    if name == "auto":
        found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(found)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which fails for those without memory, too
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {shown(name)} cannot be used here ({reason}): give another by --device") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """A dtype by name; "auto" is float16 on a GPU and float32 elsewhere."""
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name not in known:
        raise ValueError(f"dtype is {name!r}; it must be auto or one of {', '.join(known)}")
    return known[name]


def find_frames(config: EditConfig | TuneConfig, default: int | None = None) -> VideoSource:
    """The frames of a run, found in their file and not decoded. default: how many at most, where nothing says; None
    for all."""
    at_most = default if config.count is None and config.end is None else None
    return open_video(
        config.video, config.start, config.stride, config.count or None, at_most, end=config.end, fps=config.frame_rate,
        background=colour_of(config.background),
    )  # fmt: skip


def fit_frames(config: EditConfig | TuneConfig, source: VideoSource, multiple: int, native: int) -> FittedVideo:
    """The frames to edit as a model takes them; ValueError for a cut or a size it cannot take."""
    left, top, right, bottom = config.crop
    width, height = source.size[0] - left - right, source.size[1] - top - bottom
    size = config.size or fit_size(max(1, width), max(1, height), native, multiple)
    check_size(*size, multiple)
    return FittedVideo.of(source, config.crop, size)


@dataclass(frozen=True)
class Session:
    """Where a command runs and how it speaks.

    model_config: for single-file checkpoints, a folder with tokenizer and configuration.
    overwrite: replace outputs that are there. inputs: files of the run that are never replaced.
    """

    console: Console
    bars: Bars
    device: str = "auto"
    dtype: str = "auto"
    model_config: str | None = None
    overwrite: bool = False
    inputs: tuple[Path, ...] = ()

    def open_model(self, settings: ModelSettings, videos: bool = False) -> AnyCheckpoint:
        """A model that edits: Wan's by what a folder or hub name says it is. videos: see `open_unet`."""
        where, model = pick_device(self.device), settings.model
        if model != DEMO_WAN and not kind_of(model).startswith("Wan"):
            return self.open_unet(settings, videos)
        if settings.temporal:
            raise CheckpointError(f"{model} is a model of videos already, which {settings.temporal} is not for")
        if self.model_config is not None:
            raise ValueError(f"model_config has no effect: {model!r} is no single file")
        dtype = torch.bfloat16 if self.dtype == "auto" and where.type != "cpu" else pick_dtype(self.dtype, where)
        with quiet():
            checkpoint = WanCheckpoint.load(model, where, dtype, settings.lora, variant=settings.variant)
        self._note_of(checkpoint)
        return checkpoint

    def open_unet(self, settings: ModelSettings, videos: bool = False) -> Checkpoint:
        """A model with a UNet. videos: take text-to-video UNets too."""
        where, model = pick_device(self.device), settings.model
        if self.model_config is not None and not Path(model).is_file():
            raise ValueError(f"model_config has no effect: {model!r} is no single file")
        with quiet():
            checkpoint = Checkpoint.load(
                model, where, pick_dtype(self.dtype, where), self.model_config, settings.lora,
                temporal=settings.temporal or None, videos=videos, variant=settings.variant,
            )  # fmt: skip
        self._note_of(checkpoint)
        return checkpoint

    def _note_of(self, checkpoint: AnyCheckpoint) -> None:
        """Say what was added to a model, and where it is a small one."""
        for note in checkpoint.notes:
            self.say(note)
        if checkpoint.name in ("demo", DEMO_WAN):
            self.note("the bundled demo model knows only its own small world; for real videos give --model")

    def outputs(self, config: EditConfig | GenerateConfig | TuneConfig, *inputs: Path | None) -> Outputs:
        """For the files that a run writes. inputs: those it reads beside what its configuration names."""
        files = files_of(config)
        check_names({**files, "model_config": self.model_config})
        clips = [file for what, file in files.items() if is_clip(what)]
        others = [file for what, file in files.items() if not is_clip(what)]
        more = (self.model_config, *self.inputs, *inputs)
        return Outputs(self.overwrite, clips, [*others, *(name for name in more if name)])

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(printable(text), style=style, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        self.say(f"note: {in_a_line(text)}", style="yellow")


# --- the commands ---------------------------------------------------------------------------


def run_invert(session: Session, config: EditConfig, output: Path, dry_run: bool) -> None:
    """`fatezero invert`: keep an inversion in a file, written while it runs."""
    if config.noise == "drawn":
        raise ValueError("noise is drawn, so there is nothing to invert")
    remove_stale_folders(disk_folder())
    with session.outputs(config) as outputs:
        outputs.file(output)
        _invert(session, config, output, dry_run)


def _invert(session: Session, config: EditConfig, output: Path, dry_run: bool) -> None:
    settings = replace(config.store, path=output)
    source = _found(session, config)
    checkpoint = session.open_model(config.chosen_model)
    video = fit_frames(config, source, checkpoint.multiple, checkpoint.native_size)
    shape = shape_of(video, checkpoint)
    config = _in_chunks(config, checkpoint, shape[0])
    checkpoint = _controlled(session, checkpoint, config, config, len(video), video.size)
    session.say(plan(checkpoint, [config], shape, settings, edits=False))
    if dry_run:
        return
    with session.bars() as bar:
        inversion = invert_video(checkpoint, config, video, bar, settings)
    session.say(f"store of {format_bytes(inversion.store.nbytes)} written to {output}")


def run_edits(
    session: Session,
    configs: list[EditConfig],
    output: str,
    store_path: Path | None,
    dry_run: bool,
    made: Made | None = None,
    lent: bool = False,
) -> None:
    """`fatezero edit`: one inversion, or one from a file, and an edit for each configuration, with its record beside.

    made: what an earlier result was made with, which this shall be again. lent: the store is one of the caller's, made
    with these very settings, which records leave out. Everything that can be refused is refused before the inversion
    starts. One output that cannot be written in the end loses none of the others; OSError then tells which.
    """
    remove_stale_folders(disk_folder())
    with session.outputs(configs[0], store_path) as held:
        _edit(session, held, configs, output, store_path, dry_run, made, lent)


def _edit(
    session: Session,
    held: Outputs,
    configs: list[EditConfig],
    output: str,
    store_path: Path | None,
    dry_run: bool,
    made: Made | None,
    lent: bool,
) -> None:
    if made is not None and made.threads is not None:
        torch.set_num_threads(made.threads)
    session, team = _team_of(session)
    if store_path and configs[0].noise == "drawn":
        raise ValueError("noise is drawn, which a store has no use for")
    store = AttentionStore.load(store_path) if store_path else None
    origin, asked = Origin.of(store) if store else None, configs
    if store is not None and origin is not None:
        configs = [_with_store(config, store, origin) for config in configs]
    first = configs[0]
    for config in configs:
        config.prompt_edit(None)  # raises for words that are in no prompt
        check_objects(config, config.target)
    source = _found(session, first) if store is None else None
    frames = len(source) if source else origin.frames  # type: ignore[union-attr]
    if team is not None:
        configs = [_in_team(config, team.count, frames) for config in configs]
        first = configs[0]
    outputs = _outputs(output, len(configs))
    if team is None or team.is_main:
        for path in outputs:
            held.clip(path, frames)
            held.file(record_path(path))
    named = None if lent else store_path
    files = files_read(configs, named)
    if made is not None:
        check_same(Made(files=files[0]), replace(made, model="", vae=""))
    checkpoint = session.open_model(first.chosen_model)
    prompts = [config.prompt_edit(checkpoint.tokenizer) for config in configs]
    layouts = [layout_of(config, checkpoint.tokenizer, config.target, frames) for config in configs]
    for config, layout in zip(configs, layouts, strict=True):
        if isinstance(checkpoint, WanCheckpoint):
            _check_of_wan(config, layout)
        if config.noise == "drawn":
            check_of_drawn(config.chosen_propagation, config.smoothing, layout)

    if store is None or origin is None:
        assert source is not None
        video = fit_frames(first, source, checkpoint.multiple, checkpoint.native_size)
        checkpoint = _controlled(session, checkpoint, first, first, len(video), video.size)
        fps, times = video.fps, video.times
        shape: tuple[int, ...] = shape_of(video, checkpoint)
        sound: Sound | SoundTrack | None = video.sound()
    else:
        height, width = (side * checkpoint.factor for side in store.levels.shape[-2:])
        checkpoint = _controlled(session, checkpoint, first, origin.cut, frames, (width, height))
        _check_store(checkpoint, store, origin, prompts)
        shape, fps, times = tuple(store.levels.shape[1:]), origin.fps, origin.times
        sound = origin.sound_of(first.video)
    configs = [_in_chunks(config, checkpoint, shape[0]) for config in configs]
    first = configs[0]
    session.say(plan(checkpoint, configs, shape, first.store, edits=True, store=store))
    _note_of_layers(session, first)
    now = _made(session, checkpoint, shape, named)
    if made is not None:
        check_same(now, made)
        if other := differences(now, made):
            session.note(f"the result was made with {', '.join(other)}: its last digits may differ")
    for lost in shortcomings(output, fps, frames, sound is not None, times):
        session.note(lost)
    if dry_run:
        return

    spread: Spread = ALONE if team is None else team
    with session.bars() as bar:
        inversion = Inversion(store) if store else invert_video(checkpoint, first, video, bar, spread=spread)
        motion = _motion(checkpoint, configs, inversion, bar)
        edits = [
            one_edit(checkpoint, config, prompt, inversion.store, motion, layout)
            for config, prompt, layout in zip(configs, prompts, layouts, strict=True)
        ]
        title = "edit" if len(edits) == 1 else f"{len(edits)} edits in one pass"
        results = edit_many(
            checkpoint.denoiser, inversion, edits, first.chunk_frames, spread=spread, progress=bar(title)
        )
        if team is not None and not team.is_main:
            return
        writing = [
            _Writing(path, _recorded(config, inversion.store), replace(now, files=read))
            for path, config, read in zip(outputs, asked if lent else configs, files, strict=True)
        ]
        failed = []
        for one, latents in zip(writing, results, strict=True):
            try:
                pictures = decode(checkpoint, latents, frames, bar(f"write {Path(one.path).name}"))
                digest = one.write(pictures, fps, sound, times)
                session.say(f"{shown(one.config.target)} written to {one.path}")
                if made is not None and made.frames:
                    _say_whether_same(session, digest, made)
            except (OSError, ArithmeticError) as error:
                failed.append(str(error))
    if failed:
        raise OSError(f"{len(failed)} of {len(configs)} edits could not be written: {'; '.join(failed)}")


@dataclass(frozen=True)
class _Writing:
    """A result on its way to a file, with what its record says."""

    path: str
    config: EditConfig
    made: Made

    def write(
        self,
        pictures: Iterable[Tensor],
        fps: Fraction,
        sound: Sound | SoundTrack | None,
        times: Sequence[Fraction] | None,
    ) -> str:
        """Returns the digest of the frames. The record comes last: where it is, the result is whole."""
        metadata, digest = metadata_of(self.config, self.made), FrameDigest()
        write_video(self.path, digest.passing(pictures), fps, sound, times=times, metadata=metadata)
        made = replace(self.made, frames=str(digest))
        try:
            write_record(self.path, record_of(self.config, made))
        except OSError as error:
            raise OSError(f"{self.path} is written, but without its record: {error}") from error
        return made.frames


def _say_whether_same(session: Session, frames: str, made: Made) -> None:
    """Whether a result that was made again has the frames it had."""
    if frames == made.frames:
        session.say("its frames are those of the record, bit for bit")
    else:
        session.note("its frames are not those of the record, bit for bit")


def _controlled(
    session: Session,
    checkpoint: AnyCheckpoint,
    config: EditConfig,
    cut: EditConfig,
    frames: int,
    size: tuple[int, int],
) -> AnyCheckpoint:
    """A model with the ControlNet of a configuration, if it has one, whose pictures are cut as the clip is.

    cut: the settings of the clip. Raises ValueError for a model that takes none, for too few pictures, and for a range
    without a step in it.
    """
    asked = config.chosen_control
    if not asked.controlnet:
        return checkpoint
    if not isinstance(checkpoint, Checkpoint):
        raise ValueError("controlnet is for UNets: a video transformer takes none")
    try:
        source = open_video(asked.control, cut.start, cut.stride, frames, fps=cut.frame_rate)
        pictures = torch.stack(list(FittedVideo.of(source, cut.crop, size).frames()))
    except (OSError, ValueError) as error:
        raise ValueError(f"control: {error}") from error
    with quiet():
        controlled = checkpoint.with_control(
            asked.controlnet, pictures, asked.controlnet_strength, asked.control_start, asked.control_end,
            config.variant,
        )  # fmt: skip
    acting = controlled.control_steps(config.steps)
    if asked.controlnet_strength and not acting:
        raise ValueError(
            f"no step of {config.steps} is between control_start {asked.control_start:g} and control_end "
            f"{asked.control_end:g}: give a wider range, or more steps"
        )
    how = "" if asked.controlnet_strength == 1 else f" at strength {asked.controlnet_strength:g}"
    session.say(f"ControlNet {Path(asked.controlnet).name}: in {acting} of {config.steps} steps{how}")
    return controlled


def _team_of(session: Session) -> tuple[Session, Processes | None]:
    """The processes that `accelerate launch` started to edit one clip together, and what this one of them runs in; None
    for this process alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return session, None
    from accelerate import Accelerator  # seconds to import

    from ...hosts.diffusers.processes import Processes

    team = Processes(Accelerator(cpu=pick_device(session.device).type == "cpu"))
    session.console.quiet = session.console.quiet or not team.is_main
    return replace(session, device=str(team.device), bars=session.bars if team.is_main else no_bars), team


def _in_team(config: EditConfig, count: int, frames: int) -> EditConfig:
    """A configuration for several processes: with chunks for each, and no attention kept in one of them.

    ValueError where the whole clip must run in one.
    """
    if config.memory not in ("auto", "recompute"):
        raise ValueError(f"memory {config.memory} keeps attention in one process; several take recompute")
    if config.propagation != "none" or config.wanted:
        raise ValueError("TokenFlow and layouts run in one process: accelerate spreads chunks of other edits")
    chunk = config.chunk_frames
    if chunk is None and not (config.keys.anchored and not config.clip_norm):
        raise ValueError(
            "several processes need chunks, which only come near the whole clip where frames meet through neighbours "
            "or clip norm: give --chunk-frames, or key frames among self, first, middle and last"
        )
    return replace(config, memory="recompute", chunk_frames=chunk or -(-frames // count))


def _in_chunks(config: EditConfig, checkpoint: AnyCheckpoint, frames: int) -> EditConfig:
    """A configuration with the chunks of a long clip, where it sets none and they give the whole clip's result."""
    approximate = frames_meet(checkpoint.denoiser, config.keys, config.clip_norm)
    if config.chunk_frames is not None or frames <= CHUNK_FRAMES or approximate:
        return config
    return replace(config, chunk_frames=CHUNK_FRAMES)


def _made(session: Session, checkpoint: AnyCheckpoint, shape: Sequence[int], store: Path | None) -> Made:
    """What a run edits with, beside its settings and files. shape: of the clip's latents."""
    height, width = (side * checkpoint.factor for side in shape[-2:])
    return Made(
        versions(), str(checkpoint.device), str(checkpoint.dtype).removeprefix("torch."), threads_on(checkpoint.device),
        checkpoint.coding(height, width) if isinstance(checkpoint, WanCheckpoint) else "",
        checkpoint.denoiser.identity().digest, checkpoint.vae_identity.digest,
        store=None if store is None else str(store), model_config=session.model_config,
    )  # fmt: skip


def _recorded(config: EditConfig, store: AttentionStore) -> EditConfig:
    """A configuration that gives the same again, whatever memory is free by then."""
    return config if config.noise == "drawn" else replace(config, memory=store.memory)


def _found(session: Session, config: EditConfig) -> VideoSource:
    """The frames to edit, with what should be known of their file said."""
    source = find_frames(config)
    for note in source.notes:
        session.note(note)
    if not source.even:
        session.note(f"frames come at varying times, {float(source.fps):.3g} a second on average; each keeps its own")
    return source


def _check_of_wan(config: EditConfig, layout: Layout | None) -> None:
    """Raise ValueError for settings that a video transformer has no use for."""
    check_of_transformers(config.chosen_propagation, config.smoothing, layout)
    refuse_clip_norm(config.clip_norm)
    if config.injection == "pnp":
        raise ValueError(OF_UNETS)


def _note_of_layers(session: Session, config: EditConfig) -> None:
    """Say where a clip is seen otherwise than its temporal layers were tuned."""
    about = about_temporal_layers(config.temporal) if config.temporal else {}
    ours = seen_with(config.key_frames, config.clip_norm)
    other = [f"{name} {about[name]}, not {mine}" for name, mine in ours.items() if about.get(name, mine) != mine]
    if other:
        session.note(f"the temporal layers were tuned with {'; '.join(other)}")


def _outputs(output: str, count: int) -> list[str]:
    """Where each edit goes: numbered, where there are several."""
    if count == 1:
        return [output]
    path, end = Path(output), "/" if output.endswith(("/", "\\")) else ""
    return [f"{path.with_stem(f'{path.stem}_{i}')}{end}" for i in range(count)]


def check_size_fits(checkpoint: AnyCheckpoint, latents_shape: Sequence[int]) -> None:
    """Raise ValueError where frames of a size would not fit into memory, by what the autoencoder holds of one alone."""
    frames, _, *grid = latents_shape
    height, width = (side * checkpoint.factor for side in grid)
    at_once = checkpoint.frames_at_once(height, width) if isinstance(checkpoint, Checkpoint) else frames
    what = f"{width}x{height}: {'a frame' if at_once == 1 else f'{at_once} frames'}"
    check_room(what, 15 * at_once * height * width, free_bytes(), _SMALLER)
    if isinstance(checkpoint, Checkpoint):
        vae, device = checkpoint.vae, checkpoint.device
        needed = 6 * vae.config["block_out_channels"][0] * vae.dtype.itemsize * height * width
        check_room(f"{width}x{height}: the autoencoder", needed, available_bytes(device), _SMALLER)


_SMALLER = "choose a smaller --size, or crop the video"


def plan(
    checkpoint: AnyCheckpoint,
    configs: list[EditConfig],
    latents_shape: tuple[int, ...],
    settings: StoreSettings,
    edits: bool,
    store: AttentionStore | None = None,
) -> str:
    """What will run and what it takes, in a few lines. store: one from a file, in the place of an inversion."""
    config, device, denoiser = configs[0], checkpoint.device, checkpoint.denoiser
    check_size_fits(checkpoint, latents_shape)
    denoiser.schedule(config.steps)  # raises for a number of steps that the model cannot take
    frames, _, height, width = latents_shape
    source = checkpoint.encode_prompt(config.source, width * checkpoint.factor, height * checkpoint.factor)
    keys, chunk = keys_on(denoiser, config.keys), config.chunk_frames
    parts = chunk is not None and chunk < frames and frames_meet(denoiser, keys, config.clip_norm)
    demand = Demand(
        denoiser.sites(height, width), latents_shape, 4, config.steps, keys, checkpoint.dtype, source.text_tokens,
        source.nbytes, parts,
    )  # fmt: skip
    inverts = not store and config.noise == "inverted"
    chosen = plan_store(settings, demand, device) if inverts else None
    size = f"{width * checkpoint.factor}x{height * checkpoint.factor}"
    lines = [f"{frames} frames of {size}, {config.steps} steps, {device}"]
    if isinstance(checkpoint, WanCheckpoint):
        coding = checkpoint.coding(height * checkpoint.factor, width * checkpoint.factor)
        lines = [f"{frames} latents of {size}, {config.steps} steps, {device}", f"   autoencoder: {coding}"]
    for memory in MEMORIES if store or inverts else ():
        mark = "->" if memory == (store or chosen or config).memory else "  "
        lines.append(f"{mark} store with memory {memory}: {format_bytes(demand.nbytes(memory, settings))}")
    if chosen:
        lines.append(f"   store: {chosen}")
    if store or inverts:
        lines.append(f"   latents of all levels, in every store: {format_bytes(demand.latents_bytes)}")
    weights, free = sum(p.nbytes for part in checkpoint.parts for p in part.parameters()), available_bytes(device)
    lines.append(
        f"   model: {format_bytes(weights)}; free on {device}: {'unknown' if free is None else format_bytes(free)}"
    )
    if store:
        kept = store.kept_steps
    else:
        kept = settings.kept_steps(config.steps) if chosen and chosen.memory != "recompute" else 0
    counted, calls = _calls(configs, kept, inverts, edits, frames, denoiser.spans_clip)
    lines.append(f"   {'model' if denoiser.spans_clip else 'UNet'} calls: {counted}")
    at_once = min(chunk or frames, frames)
    seconds, nbytes = _cost_of_call(checkpoint, (at_once, *latents_shape[1:]), source, keys, config.clip_norm)
    lines.append(f"   a guided call of {at_once}: about {format_bytes(2 * nbytes)} of activations")
    lines.append(f"   time: about {in_words(calls * seconds * frames / at_once)}, and encoding and decoding")
    if parts:
        lines.append(
            "   chunks approximate the whole clip: its frames meet through neighbours, clip norm or temporal layers"
        )
    return "\n".join(lines)


def _calls(
    configs: list[EditConfig], kept_steps: int, inverts: bool, edits: bool, frames: int, spans_clip: bool
) -> tuple[str, float]:
    """How often the model sees the clip: in words, and in all, a call with gradients as four."""
    counted = [
        unet_calls(
            c.steps,
            c.guidance_scale,
            kept_steps,
            c.chosen_injection,
            None,
            c.chosen_propagation,
            frames,
            c.strength,
            spans_clip,
            c.flow_edit.draws if c.noise == "drawn" else 0,
        )
        for c in configs
    ]
    source = max(calls.source for calls in counted)
    parts, whole = ([f"{counted[0].invert} to invert"], counted[0].invert) if inverts else ([], 0.0)
    if edits:
        edit = sum(calls.edit for calls in counted)
        parts.append(f"{edit:g} for {len(configs)} edit(s)")
        parts += [f"{source:g} for the source beside"] if source else []
        gradients = sum(c.layout.guided_calls(c.steps) for c in configs if c.wanted)
        parts += [f"{gradients} with gradients, each some four calls long, for the layout"] if gradients else []
        whole += edit + source + 4 * gradients
    return ", ".join(parts), whole


@torch.no_grad()
def _cost_of_call(
    checkpoint: AnyCheckpoint, shape: tuple[int, ...], source: Condition, keys: KeyFrames, clip_norm: bool
) -> tuple[float, int]:
    """The seconds that a call of the model takes and the most bytes that it holds, by one that is made.

    A quick one is timed by a second, for the first makes things ready.
    """
    denoiser, control = checkpoint.denoiser, Control(keys, Chunk.whole(shape[0]))
    latents = torch.zeros(shape, device=denoiser.device)

    def called() -> float:
        begun = time.perf_counter()
        denoiser.predict_noise(latents, 500, source, control).sum().item()  # waits for the device
        return time.perf_counter() - begun

    with denoiser.hooked(clip_norm):
        with LiveBytes(*checkpoint.parts) as live:
            seconds = called()
        return (seconds if seconds > 1 else called()), live.most


def invert_video(
    checkpoint: AnyCheckpoint,
    config: EditConfig,
    video: FittedVideo,
    bar: Callable[[str], Callable[[int, int], None]],
    settings: StoreSettings | None = None,
    spread: Spread = ALONE,
) -> Inversion:
    """Encode and invert a clip with a configuration's settings, or draw its noise; its store's unless others are given.

    A store that is kept remembers where the clip is from, and its sound. spread: the processes that share the chunks.
    """
    source = checkpoint.encode_prompt(config.source, *video.size, checkpoint.blocks(config.source))
    latents = encode(checkpoint, video, bar("encode"))
    if config.noise == "drawn":
        return draw(
            checkpoint.denoiser, latents.to(checkpoint.device), source, config.steps, config.flow_edit, config.keys,
            config.clip_norm, prompt=config.source,
        )  # fmt: skip
    kept = settings is not None and settings.path is not None
    extra, attachments = _origin_of(checkpoint, config, video) if kept else ({}, {})
    return invert(
        checkpoint.denoiser, latents, source, config.steps, config.keys, config.clip_norm, settings or config.store,
        config.chunk_frames, order=config.order, prompt=config.source,
        extra=extra, attachments=attachments, spread=spread, progress=bar("invert"),
    )  # fmt: skip


def _motion(
    checkpoint: AnyCheckpoint, configs: Sequence[EditConfig], inversion: Inversion, bar: Callable[[str], Progress]
) -> Motion | None:
    """The clip's motion on its latents' grid, where an edit smooths along it: of the clip as the autoencoder has it."""
    if not any(config.smoothing for config in configs) or inversion.store.frames < 2:
        return None
    _, estimate = flow_estimator(configs[0].flow, checkpoint.device)
    assert isinstance(checkpoint, Checkpoint)  # `check_of_transformers` refuses others
    clip, progress, decoded = inversion.store.level(0), bar("motion"), checkpoint.decode_latents

    def frames() -> Iterator[Tensor]:
        for i, latents in enumerate(clip.split(1)):
            yield decoded(latents)[0].cpu()
            progress(i + 1, len(clip))

    return Motion.of(frames(), estimate, checkpoint.factor)


def one_edit(
    checkpoint: AnyCheckpoint,
    config: EditConfig,
    prompt: Any,
    store: AttentionStore,
    motion: Motion | None = None,
    layout: Layout | None = None,
) -> Edit:
    """A configuration's edit of a store, its prompts encoded. motion: the clip's, where it smooths along it."""
    height, width = (side * checkpoint.factor for side in store.levels.shape[-2:])
    blocks = checkpoint.blocks(config.target, config.negative)
    target = checkpoint.encode_prompt(config.target, width, height, blocks)
    negative = checkpoint.encode_negative(config.negative, width, height, blocks)
    moves = None
    if layout is not None:
        moves = moves_of(layout, config.source, store.source.text_tokens, target.text_tokens)
    return Edit(
        target,
        negative,
        config.guidance_scale,
        prompt,
        config.chosen_injection,
        propagation=config.chosen_propagation,
        smoothing=FlowSmoothing(config.smoothing, motion) if config.smoothing else None,
        layout=moves,
        strength=config.strength,
    )


def encode(checkpoint: AnyCheckpoint, video: FittedVideo, progress: Callable[[int, int], None]) -> Tensor:
    """Latents of a clip's frames, as they are decoded."""
    if isinstance(checkpoint, Checkpoint):
        return posterior(checkpoint, video, progress)[0]
    latents = checkpoint.encode_clip(to_unit(torch.stack(list(video.frames()))))
    progress(len(video), len(video))
    return latents


def posterior(
    checkpoint: Checkpoint, video: FittedVideo, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a clip's latents, its frames encoded as they are decoded."""
    parts, done = list[tuple[Tensor, Tensor]](), 0
    coming, at_once = video.frames(), checkpoint.frames_at_once(*video.size)
    while frames := list(islice(coming, at_once)):
        parts.append(checkpoint.encode_posterior(to_unit(torch.stack(frames))))
        done += len(frames)
        progress(done, len(video))
    mean, deviation = (torch.cat(list(some)).float() for some in zip(*parts, strict=True))
    return mean, deviation


def decode(
    checkpoint: AnyCheckpoint, latents: Tensor, frames: int, progress: Callable[[int, int], None]
) -> Iterator[Tensor]:
    """The frames of latents, uint8 (height, width, 3), one after another."""
    if not isinstance(checkpoint, Checkpoint):
        yield from to_bytes(checkpoint.decode_clip(latents, frames))
        progress(frames, frames)
        return
    height, width = (side * checkpoint.factor for side in latents.shape[-2:])
    done = 0
    for some in latents.split(checkpoint.frames_at_once(height, width)):
        yield from to_bytes(checkpoint.decode_latents(some))
        done += len(some)
        progress(done, len(latents))


def shape_of(video: FittedVideo, checkpoint: AnyCheckpoint) -> tuple[int, int, int, int]:
    width, height = video.size
    frames = checkpoint.latent_frames(len(video))
    return frames, checkpoint.channels, height // checkpoint.factor, width // checkpoint.factor


# --- what a store remembers of where it is from ------------------------------------------------

_OF_THE_CLIP = tuple(one.name for one in described(ClipSettings))
_OF_THE_STORE = ("precision", "keep_steps")


def _origin_of(
    checkpoint: AnyCheckpoint, config: EditConfig, video: FittedVideo
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    sound = video.sound()
    extra = {
        "model": config.model,
        "vae": asdict(checkpoint.vae_identity),
        "video": Path(config.video).name,
        "settings": {name: getattr(config, name) for name in (*_OF_THE_CLIP, *_OF_THE_STORE)},
        "size": video.size,
        "frames": len(video),
        "fps": _pair(video.fps),
        "times": video.times and [_pair(t) for t in video.times],
        "sound_rate": sound and sound.rate,
    }
    if sound is None:
        return extra, {}
    samples = [np.round(block.clip(-1, 1) * 32767).astype(np.int16) for block in sound.blocks()]
    return extra, {"sound": torch.from_numpy(np.concatenate(samples, axis=1))}


def _pair(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]


@dataclass(frozen=True)
class Origin:
    """Where the clip of a store is from.

    settings: the configuration's, of the clip and the store; empty for a store that another program made.
    frames: of the clip, whose latents may be fewer. vae: its autoencoder. model: its name as the command was given it.
    video: the file's name. sound: of its frames.
    """

    fps: Fraction
    frames: int
    times: tuple[Fraction, ...] | None
    settings: dict[str, Any]
    vae: ModelIdentity | None
    model: str | None
    video: str
    sound: Sound | None

    @classmethod
    def of(cls, store: AttentionStore) -> Origin:
        """Raises StoreError for what no inversion writes."""
        extra = store.extra
        with as_store_error("the store's account of its clip is damaged: "):
            fps = _fraction(extra.get("fps", (8, 1)))
            frames, times = extra.get("frames", store.frames), extra.get("times")
            if type(frames) is not int or not store.frames <= frames <= 100 * store.frames:
                raise ValueError("it has no such number of frames")
            times = None if times is None else tuple(_fraction(pair) for pair in times)
            right = times is None or (len(times) == frames and list(times) == sorted(set(times)))
            if not 0 < fps <= 1000 or not right:
                raise ValueError("its times are none that frames can have")
            vae = extra.get("vae")
            identity = None if vae is None else ModelIdentity.read(vae)
            known = (*_OF_THE_CLIP, *_OF_THE_STORE)
            settings = checked({name: v for name, v in dict(extra.get("settings", {})).items() if name in known})
            rate, samples = extra.get("sound_rate"), store.attachments.get("sound")
            sound = None
            if rate is not None and samples is not None:
                if type(rate) is not int or not 0 < rate < 10**6 or samples.ndim != 2 or not 1 <= len(samples) <= 2:
                    raise ValueError("its sound is none")
                sound = Sound(samples.numpy().astype(np.float32) / 32767, rate)
            model = extra.get("model")
            video = extra.get("video", "")
            if not isinstance(model, (str, type(None))) or not isinstance(video, str):
                raise ValueError("its model's name, or its video's, is none")
            return cls(fps, frames, times, settings, identity, model, video, sound)

    @property
    def cut(self) -> EditConfig:
        """The settings of the clip: which frames, and how they were cut."""
        return EditConfig(**{name: self.settings[name] for name in _OF_THE_CLIP if name in self.settings})

    def sound_of(self, video: str) -> Sound | SoundTrack | None:
        """The store's own sound; that of the same frames of a video, where one is given beside the store."""
        if not video:
            return self.sound
        named = {name: self.settings[name] for name in ("start", "end", "stride", "fps") if name in self.settings}
        return find_frames(replace(EditConfig(video=video, count=self.frames), **named)).sound()


def _fraction(pair: Sequence[int]) -> Fraction:
    numerator, denominator = pair
    if type(numerator) is not int or type(denominator) is not int or denominator < 1 or numerator < 0:
        raise ValueError(f"{pair} is no time")
    return Fraction(numerator, denominator)


def _with_store(config: EditConfig, store: AttentionStore, origin: Origin) -> EditConfig:
    """A configuration that says what the store was made with; StoreError where it says otherwise."""
    default = EditConfig()
    made: dict[str, tuple[Any, ...]] = {
        "steps": (store.steps,),
        "order": (store.order,),
        "memory": (store.memory, "auto"),
        "clip_norm": (store.clip_norm,),
        "key_frames": (store.key_frames.entries,),
        "source": (store.prompt or config.source,),
        **{name: (origin.settings.get(name),) for name in (*_OF_THE_CLIP, *_OF_THE_STORE)},
    }
    made["count"] += (origin.frames,)
    for name, told in made.items():
        asked = getattr(config, name)
        if asked not in (getattr(default, name), *told):
            raise StoreError(f"the store was made with {name} {shown(told[0])}, not {shown(asked)}")
    for name in ("place", "budget_gb"):
        if getattr(config, name) != getattr(default, name):
            raise StoreError(f"{name} has no effect on a store that is made: it is in its file")
    model = config.model if config.model != default.model else _model_of(origin)
    return replace(
        config, steps=store.steps, order=store.order, memory=store.memory, clip_norm=store.clip_norm, model=model,
        key_frames=store.key_frames.entries, key_frames_least_channels=store.key_frames.least_channels,
        source=store.prompt or config.source,
    )  # fmt: skip


def _model_of(origin: Origin) -> str:
    """A store may name the bundled model or files that are here; what is fetched from a hub, its user names."""
    name = origin.model or EditConfig().model
    if is_here(name):
        return name
    raise StoreError(f"the store was made with the model {shown(name)}, which is not here: give it with --model")


def _check_store(checkpoint: AnyCheckpoint, store: AttentionStore, origin: Origin, prompts: Iterable[Any]) -> None:
    """StoreError for a store of another model, autoencoder or text encoder, or whose prompt is not its own."""
    schedule = checkpoint.denoiser.schedule(store.steps)
    for prompt in prompts:
        check_store(store, checkpoint.denoiser, schedule, prompt)
    if origin.vae is not None and not origin.vae.matches(checkpoint.vae_identity):
        raise StoreError("the store's latents are of another autoencoder than this model's: invert again")
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
