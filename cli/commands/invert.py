"""`fatezero invert`: write an inversion to a file, for many edits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from ...diffusion.invert import Inversion, invert
from ...diffusion.spread import ONE_PROCESS, Spread
from ...files.safetensors import format_bytes
from ...files.whole import disk_folder, remove_stale_folders
from ...methods.flow_edit import draw
from ...store.backends import level_name
from ...store.budget import StoreSettings
from ...store.states import UNSAVED, States
from ...video.fitted import FittedVideo
from ..captions import captioned, check_captioner
from ..config.effects import of_methods
from ..config.files import configs_of
from ..config.record import files_read
from ..config.settings import EditConfig
from ..families import check_inversion
from ..frames import encode, fit_frames, for_clip, found_frames, shape_of
from ..options import AS_USUAL, Config, Resume, RunOptions, Video, flags_of, invert_options
from ..plan import in_chunks, plan
from ..session import Session, check_control, controlled
from ..states import provenance, states_of
from ..stored import origin_of

if TYPE_CHECKING:
    from ...hosts.diffusers.model import Model

InvertOptions = invert_options(of_methods())


def command(
    video: Video = None,
    /,
    *,
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Output file of the store.")] = Path(
        "store.safetensors"
    ),
    config: Config = None,
    resume: Resume = False,
    options: Annotated[InvertOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    run: RunOptions = AS_USUAL,
) -> None:
    """Invert a video once and keep the store, for many edits with `fatezero edit --store`."""
    session = replace(run.session(config), resume=resume)
    configs, notes = configs_of(config, None, flags_of(video, options), inverting=True)
    for note in notes:
        session.note(note)
    run_invert(session, configs[0], output, run.dry_run)


def run_invert(session: Session, config: EditConfig, output: Path, dry_run: bool) -> None:
    """Write an inversion to a file while it runs."""
    if config.noise == "drawn":
        raise ValueError("noise is drawn, so there is no inversion")
    remove_stale_folders(disk_folder())
    check_captioner([config])
    with session.outputs(config) as outputs:
        outputs.file(output)
        _invert(session, config, output, dry_run)


def _invert(session: Session, config: EditConfig, output: Path, dry_run: bool) -> None:
    settings = replace(config.store, path=output)
    source = found_frames(session, config)
    check_inversion(config)
    check_control(config)
    config = captioned(session, [config], source)[0]
    checkpoint = session.open_model(config.chosen_model)
    video = fit_frames(config, source, checkpoint.multiple, checkpoint.native_size)
    shape = shape_of(video, checkpoint)
    checkpoint = for_clip(checkpoint, shape, video.fps, video.frames)
    config = in_chunks(config, checkpoint, shape[0])
    checkpoint = controlled(session, checkpoint, config, config, len(video), video.size, video.source)
    session.say(plan(checkpoint, [config], shape, settings, edits=False))
    if dry_run:
        return
    made = provenance(session, checkpoint, shape, None)
    states = states_of(session, output, [config], made, files_read([config], None))
    with states.of_run(), session.bars() as bar:
        inversion = invert_video(checkpoint, config, video, bar, settings, states=states)
    if session.resume is not None:  # a batch that is interrupted later makes the store again from them
        states.remove()
    session.say(f"store of {format_bytes(inversion.store.nbytes)} written to {output}")


def invert_video(
    checkpoint: Model,
    config: EditConfig,
    video: FittedVideo,
    bar: Callable[[str], Callable[[int, int], None]],
    settings: StoreSettings | None = None,
    spread: Spread = ONE_PROCESS,
    states: States = UNSAVED,
) -> Inversion:
    """Encode and invert a clip with a configuration's settings, or sample its noise.

    settings: of the store; None for the configuration's. A store in a file contains the clip's origin and sound.
    spread: the processes that share the chunks. states: of the run, to continue an interrupted one.
    """
    source = checkpoint.encode_prompt(config.source, *video.size, checkpoint.blocks(config.source))
    latents = states.load(level_name(0), checkpoint.device)
    if latents is None:
        latents = encode(checkpoint, video, bar("encode"))
    windows = config.windows(checkpoint.frames_per_latent)
    if config.noise == "drawn":
        return draw(
            checkpoint.denoiser, latents.to(checkpoint.device), source, config.steps, config.flow_edit, config.keys,
            config.clip_norm, windows=windows, prompt=config.source,
        )  # fmt: skip
    kept = settings is not None and settings.path is not None
    extra, attachments = origin_of(checkpoint, config, video).kept() if kept else ({}, {})
    return invert(
        checkpoint.denoiser, latents, source, config.steps, config.keys, config.clip_norm, settings or config.store,
        config.chunk_frames, windows=windows, order=config.order, reuse_midpoint=config.reuse_midpoint,
        inversion_steps=config.inversion_steps, prompt=config.source, extra=extra, attachments=attachments,
        spread=spread, states=states,
        progress=bar("invert"),
    )  # fmt: skip
