"""`fatezero edit`: from a video file to a video file, with one inversion for all edits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ...attention.masks import GivenMask
from ...diffusion.edit import edit_many
from ...diffusion.invert import Inversion
from ...diffusion.parts import Edit
from ...diffusion.spread import ONE_PROCESS
from ...files.whole import disk_folder, remove_stale_folders
from ...imports import torch
from ...methods.layout import Layout
from ...settings import shown
from ...store.origin import Origin
from ...store.store import AttentionStore
from ...video.fitted import FittedVideo
from ...video.motion import Motion
from ...video.read import Sound, SoundTrack, VideoSource
from ...video.write import CRF, FrameDigest, check_lossless, shortcomings, write_video
from ..captions import captioned, check_captioner, with_captions
from ..config.files import configs_of
from ..config.record import (
    Provenance,
    check_is_here,
    check_same,
    differences,
    files_read,
    made_by,
    metadata_of,
    record_of,
    without_given,
    write_record,
)
from ..config.settings import AUTO, PRESETS, EditConfig
from ..edits import check_parts, motion_of, one_edit
from ..families import check_edits, check_guidance
from ..frames import decode, fit_frames, for_clip, found_frames, pictures_of, shape_of, with_pictures
from ..keep import Original, Restored, laid, original_of, recorded_with, refuse_kept
from ..maps import HELP as MAPS
from ..maps import Kept, check_maps, map_folders, recording, reserve_maps, write_recorded
from ..masks import check_masks, edit_mask, fitted_like
from ..objects import check_objects, layout_of
from ..options import AS_USUAL, GROUPS, Config, Resume, RunOptions, Video, edit_options, flags_of
from ..outputs import Outputs, numbered
from ..plan import in_chunks, in_windows, plan, store_for
from ..region import in_region, in_region_of_prompts
from ..session import Session, check_control, controlled
from ..states import provenance, states_of
from ..stored import check_of_store, cut_of, note_of_other_video, read_origin, sound_of, video_of, with_store
from ..team import in_team, team_of
from .invert import invert_video

if TYPE_CHECKING:
    from torch import Tensor

    from ...hosts.diffusers.model import Model
    from ...hosts.diffusers.processes import Processes

EditOptions = edit_options()


def command(
    video: Video = None,
    /,
    *,
    target: Annotated[
        list[str] | None,
        Parameter(
            help="Prompt that describes the edit. Repeat it for several edits in one pass.",
            negative="",
            group=GROUPS["What to edit"],
        ),
    ] = None,
    output: Annotated[
        str,
        Parameter(
            name=("--output", "-o"),
            group=GROUPS["What to edit"],
            help='Output: .mp4, .mov, .mkv, .webm, .gif, or pictures, "folder/" or "f_%04d.png".',
        ),
    ] = "edit.mp4",
    config: Config = None,
    maps: Annotated[Path | None, Parameter(help=MAPS, group=GROUPS["What to edit"])] = None,
    preset: Annotated[
        str | None, Parameter(help=f"Settings that go together: {', '.join(PRESETS)}.", group=GROUPS["The edit"])
    ] = None,
    store: Annotated[
        Path | None,
        Parameter(help="A store of `fatezero invert`, instead of an inversion.", group=GROUPS["The store"]),
    ] = None,
    resume: Resume = False,
    options: Annotated[EditOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    run: RunOptions = AS_USUAL,
) -> None:
    """Edit a video: invert it, then denoise with the target prompt and the source's attention."""
    flags = flags_of(video, options)
    made = made_by(config) if config else None
    if made is not None:  # a result's record, to repeat it
        others = {"store": store, "model_config": run.model_config, "target": target, "preset": preset}
        given = {*flags, *(name for name, value in others.items() if value)}
        made = without_given(made, given)
        store = store or (Path(made.store) if made.store else None)
        device, dtype = (b if a == "auto" else a for a, b in ((run.device, made.device), (run.dtype, made.dtype)))
        run = replace(run, model_config=run.model_config or made.model_config, device=device, dtype=dtype)
    session = replace(run.session(config, store), resume=resume)
    configs, notes = configs_of(config, preset, flags, target or [], stored=store is not None)
    for note in notes:
        session.note(note)
    if config is not None and made is not None:
        check_is_here(config, configs[0], run.model_config, given)
    check_maps(maps)
    run_edits(session, configs, output, store, run.dry_run, made, maps=maps)


def run_edits(
    session: Session,
    configs: list[EditConfig],
    output: str,
    store_path: Path | None,
    dry_run: bool,
    made: Provenance | None = None,
    from_batch: bool = False,
    maps: Path | None = None,
) -> None:
    """Run one inversion, or load it from a file, and edit with each configuration; writes results and records.

    made: the provenance of an earlier result to reproduce. from_batch: the store is the caller's, made with the same
    settings, and is left out of records. maps: the folder for heat maps, masks and slices.

    Invalid input is rejected before the inversion. If an output cannot be written, the others still are, and OSError
    names it.
    """
    remove_stale_folders(disk_folder())
    if made is not None and made.threads is not None:
        torch.set_num_threads(made.threads)
    with session.outputs(configs[0], store_path) as files:
        session, team = team_of(session)
        run = _Run(session, team, output, store_path, made, from_batch, maps)
        _edit(run, files, configs, dry_run)


@dataclass(frozen=True)
class _Run:
    """Options of a run besides its settings; see `run_edits`. team: the processes it runs on; None for this one."""

    session: Session
    team: Processes | None
    output: str
    store: Path | None
    made: Provenance | None
    from_batch: bool
    maps: Path | None

    @property
    def writes(self) -> bool:
        return self.team is None or self.team.is_main

    @property
    def recorded_store(self) -> Path | None:
        return None if self.from_batch else self.store


@dataclass(frozen=True)
class _Source:
    """The source of an edit: the frames of a video, or a store and its origin."""

    frames: int
    video: VideoSource | None = None
    store: AttentionStore | None = None
    origin: Origin | None = None

    @classmethod
    def of(cls, session: Session, config: EditConfig, store: AttentionStore | None, origin: Origin | None) -> _Source:
        if store is not None and origin is not None:
            return cls(origin.frames, None, store, origin)
        video = in_region(config, found_frames(session, config))
        return cls(len(video), video)


@dataclass(frozen=True)
class _Clip:
    """The clip of an edit. shape: of its latents. video: None for a store without it. The others: of its frames."""

    shape: tuple[int, ...]
    crop: tuple[int, int, int, int]
    size: tuple[int, int]
    frames: int
    fps: Fraction
    times: tuple[Fraction, ...] | None
    sound: Sound | SoundTrack | None
    video: FittedVideo | None = None

    @property
    def whole(self) -> VideoSource | None:
        """The frames before the crop."""
        return None if self.video is None else self.video.source


@dataclass(frozen=True)
class _OneEdit:
    """One edit: its configuration, prompt pair, layout and mask; its output and the digests of the files it reads.

    recorded: the settings for its record. maps: the folder for its heat maps, masks and slices. original: the frames
    on which it is laid, if the video's pixels stay.
    """

    config: EditConfig
    recorded: EditConfig
    prompt: Any
    layout: Layout | None
    mask: GivenMask | None
    output: str
    maps: Path | None
    files: dict[str, str]
    original: Original | None


def _edit(run: _Run, writes: Outputs, configs: list[EditConfig], dry_run: bool) -> None:
    session, team = run.session, run.team
    if run.store and configs[0].noise == "drawn":
        raise ValueError("store cannot be used with noise drawn, because FlowEdit has no inversion")
    store = AttentionStore.load(run.store) if run.store else None
    origin, given = read_origin(store) if store else None, configs
    if store is not None and origin is not None:
        configs = [with_store(config, store, origin) for config in configs]
    check_captioner(configs)
    _check_words([config for config in configs if config.source != AUTO])
    refuse_kept(configs, store is not None)
    source = _Source.of(session, configs[0], store, origin)
    for config in configs:
        check_masks(config, source.frames)
        pictures_of(config, source.frames)
    if team is not None:
        configs = [in_team(config) for config in configs]
    outputs = numbered(run.output, len(configs))
    for path in outputs if configs[0].lossless else ():
        check_lossless(path)
    if run.writes:
        writes.results(outputs, source.frames)
    files = files_read(configs, run.recorded_store)
    if run.made is not None:
        check_same(Provenance(files=files[0]), replace(run.made, model="", vae=""))
    note_of_other_video(session, origin, files[0])
    folders = map_folders(run.maps, outputs)
    mapped = folders if run.writes else [None] * len(folders)
    auto = any(config.source == AUTO for config in configs)
    if not auto:  # files are named by words
        reserve_maps(writes, mapped, configs)
    check_edits(configs, stored=store is not None)
    check_control(configs[0])
    if auto:
        configs = captioned(session, configs, source.video)
        _check_words(configs)
        reserve_maps(writes, mapped, configs)
    checkpoint = session.open_model(configs[0].chosen_model)
    for config in configs:
        check_guidance(checkpoint, config)
    prompts = [config.prompt_edit(checkpoint.tokenizer) for config in configs]
    for config, prompt in zip(configs, prompts, strict=True):
        check_parts(checkpoint, config, prompt, source.frames)
    checkpoint, clip = _clip_of(session, checkpoint, configs, source)
    fit = fitted_like(clip.crop, clip.size, clip.whole)
    layouts = [layout_of(config, checkpoint.tokenizer, config.target, source.frames, fit) for config in configs]
    if store is not None and origin is not None:
        check_of_store(checkpoint, store, origin, prompts)
    masks = [edit_mask(checkpoint, config, clip.crop, clip.size, clip.whole) for config in configs]
    configs = [in_chunks(config, checkpoint, clip.shape[0], store, team.count if team else 1) for config in configs]
    session.say(plan(checkpoint, configs, clip.shape, None, edits=True, store=store, masks=masks))
    now = _checked_again(run, checkpoint, configs[0], clip)
    for lost in shortcomings(run.output, clip.fps, clip.frames, clip.sound is not None, clip.times):
        session.note(lost)
    originals = [original_of(clip.video, *each) for each in zip(configs, masks, outputs, strict=True)]
    for note in {one.note for one in originals if one is not None and one.note}:
        session.note(note)
    if not dry_run:
        recorded = with_captions(given, configs) if run.from_batch else configs
        edits = list(map(_OneEdit, configs, recorded, prompts, layouts, masks, outputs, folders, files, originals))
        _run(run, checkpoint, clip, store, edits, now)


def _check_words(configs: Sequence[EditConfig]) -> None:
    """Raise ValueError for words that are not in the prompts."""
    for config in configs:
        config.prompt_edit(None)
        check_objects(config, config.target)


def _clip_of(session: Session, checkpoint: Model, configs: list[EditConfig], source: _Source) -> tuple[Model, _Clip]:
    """The clip fitted to the model, and the model with the configuration's ControlNet."""
    store, origin, config = source.store, source.origin, configs[0]
    if store is None or origin is None:
        assert source.video is not None
        found = in_region_of_prompts(session, checkpoint, configs, source.video)
        video = fit_frames(config, found, checkpoint.multiple, checkpoint.native_size)
        checkpoint = controlled(session, checkpoint, config, config, len(video), video.size, video.source)
        guide_frames = pictures_of(config, len(video))
        checkpoint = for_clip(checkpoint, shape_of(video, checkpoint), video.fps, video.frames, guide_frames)
        made = shape_of(video, checkpoint), video.cut, video.size, len(video), video.fps, video.times, video.sound()
        return checkpoint, _Clip(*made, video)
    height, width = (side * checkpoint.factor for side in store.levels.shape[-2:])
    cut, size, sound = cut_of(origin), (width, height), sound_of(origin, config.video)
    whole = video_of(origin, config.video) if config.video else None
    of_store = None if whole is None else FittedVideo.of(whole, cut.crop, size)
    checkpoint = controlled(session, checkpoint, config, cut, origin.frames, size, whole)
    shape = tuple(store.levels.shape[1:])
    return for_clip(checkpoint, shape, origin.fps), _Clip(
        shape, cut.crop, size, origin.frames, origin.fps, origin.times, sound, of_store
    )


def _checked_again(run: _Run, checkpoint: Model, config: EditConfig, clip: _Clip) -> Provenance:
    """The provenance of this run. Raises ConfigError if a result is repeated with another model."""
    _note_of_layers(run.session, config)
    now = provenance(run.session, checkpoint, clip.shape, run.recorded_store)
    if run.made is not None:
        check_same(now, run.made)
        if other := differences(now, run.made):
            run.session.note(f"the result was made with {', '.join(other)}: its last digits may differ")
    return now


def _run(
    run: _Run,
    checkpoint: Model,
    clip: _Clip,
    store: AttentionStore | None,
    tasks: Sequence[_OneEdit],
    now: Provenance,
) -> None:
    """Invert, edit and write; finally raises OSError for outputs that could not be written."""
    session, configs, spread = run.session, [one.config for one in tasks], run.team or ONE_PROCESS
    failed, unwritten = list[str](), False
    states = states_of(
        session, run.output, configs, now, [one.files for one in tasks], run.writes, maps=run.maps is not None
    )
    with states.of_run(), session.bars() as bar:
        if store is not None:
            inversion = Inversion(in_windows(store, configs[0], checkpoint))
        else:
            assert clip.video is not None
            kept = store_for(checkpoint, configs, clip.shape)
            inversion = invert_video(checkpoint, configs[0], clip.video, bar, kept, spread, states)
        motion = motion_of(checkpoint, configs, inversion, clip.frames, bar)
        models = [with_pictures(checkpoint, one.config, clip.video) for one in tasks]
        edits = [_described(model, one, inversion.store, motion) for model, one in zip(models, tasks, strict=True)]
        title = "edit" if len(edits) == 1 else f"{len(edits)} edits in one pass"
        results = edit_many(
            checkpoint.denoiser, inversion, edits, configs[0].chunk_frames, spread=spread, states=states,
            progress=bar(title),
        )  # fmt: skip
        if not run.writes:
            return
        for one, edit, latents in zip(tasks, edits, results, strict=True):
            writing = _Writing(one.output, _recorded(one, inversion.store), replace(now, files=one.files))
            shown_as = bar(f"write {Path(one.output).name}")
            edited = Kept(decode(checkpoint, latents, clip.frames, shown_as), keep=one.maps is not None)
            results_of = latents, inversion.store.level(0)
            try:
                _write(run, writing, laid(one.original, checkpoint, results_of, edited), clip)
                if one.maps is not None and edit.maps is not None:
                    source = _source_frames(checkpoint, clip, inversion.store)
                    write_recorded(one.maps, edit.maps, source, edited, clip.fps, session)
            except (OSError, ArithmeticError) as error:
                failed.append(str(error))
                unwritten = unwritten or not isinstance(error, _RecordError)
    if not unwritten:
        states.remove()
    if failed:
        again = "; --resume --overwrite writes them again" if unwritten else ""
        raise OSError(f"{len(failed)} of {len(tasks)} edits could not be written: {'; '.join(failed)}{again}")


def _described(checkpoint: Model, one: _OneEdit, store: AttentionStore, motion: Motion | None) -> Edit:
    edit = one_edit(checkpoint, one.config, one.prompt, store, motion, one.layout, one.mask)
    return edit if one.maps is None else recording(edit, one.config, checkpoint, store.source.text_tokens)


def _source_frames(checkpoint: Model, clip: _Clip, store: AttentionStore) -> Iterable[Tensor]:
    """The frames of the clip, or with a store those that its latents decode to."""
    if clip.video is not None:
        return clip.video.frames()
    return decode(checkpoint, store.level(0).to(checkpoint.device), clip.frames, lambda done, total: None)


def _write(run: _Run, writing: _Writing, pictures: Restored, clip: _Clip) -> None:
    digest = writing.write(pictures, clip)
    run.session.say(f"{shown(writing.config.target)} written to {writing.path}")
    if run.made is not None and run.made.frames:
        _compare_frames(run.session, digest, run.made)


class _RecordError(OSError):
    """A result is written, but not its record."""


@dataclass(frozen=True)
class _Writing:
    """The output of a result, with its record."""

    path: str
    config: EditConfig
    made: Provenance

    def write(self, pictures: Restored, clip: _Clip) -> str:
        """Returns the digest of the frames. Writes the record last, so that it marks a complete result."""
        metadata, digest = metadata_of(self.config, self.made), FrameDigest()
        write_video(
            self.path, digest.passing(pictures.frames), clip.fps, clip.sound, None if self.config.lossless else CRF,
            clip.times, metadata, pictures.display,
        )  # fmt: skip
        made = replace(self.made, frames=str(digest))
        try:
            write_record(self.path, record_of(self.config, made))
        except OSError as error:
            raise _RecordError(f"{self.path} is written, but not its record: {error}") from error
        return made.frames


def _compare_frames(session: Session, frames: str, made: Provenance) -> None:
    """Say whether a repeated result has the same frames."""
    if frames == made.frames:
        session.say("its frames equal those of the record, bit for bit")
    else:
        session.note("its frames differ from those of the record")


def _recorded(one: _OneEdit, store: AttentionStore) -> EditConfig:
    """A configuration that gives the same result whatever memory is free, and whether the video is given."""
    config = recorded_with(one.recorded, one.original)
    return config if config.noise == "drawn" else replace(config, memory=store.memory)


def _note_of_layers(session: Session, config: EditConfig) -> None:
    """Note differences between the settings and those of the temporal layers' tuning."""
    from ...files.temporal_layers import about_temporal_layers, training_metadata

    about = about_temporal_layers(config.temporal) if config.temporal else {}
    ours = training_metadata(config.key_frames, config.clip_norm)
    other = [f"{name} {about[name]}, not {mine}" for name, mine in ours.items() if about.get(name, mine) != mine]
    if other:
        session.note(f"the temporal layers were tuned with {'; '.join(other)}")
