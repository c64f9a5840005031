"""`fatezero evaluate`: measure an edited video against its source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from cyclopts import Parameter
from rich import box
from rich.markup import escape
from rich.table import Table

from ...files.whole import whole_file
from ...imports import F, torch
from ...settings import setting, setting_like, shown
from ...video.compare import Comparison, compare
from ...video.fitted import FittedVideo
from ...video.flow import Estimator, FlowName, flow_estimator
from ...video.maps import write_slice
from ...video.read import Video, VideoSource, open_video
from ...video.size import check_crop, to_unit
from ...video.slice import check_row
from ...video.which import ClipSettings, colour_of
from ...video.write import PICTURE_SUFFIXES, shortcomings, write_picture, write_video
from ..config.paths import check_names
from ..config.settings import ConfigError, of_setting
from ..config.values import config_as
from ..masks import found_mask
from ..options import Device, Overwrite, Quiet, given_of, options_of
from ..outputs import Outputs
from ..progress import console, printable, progress_bar
from ..session import Session, open_clip, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from ...metrics.evaluate import Figure, Report


@dataclass(frozen=True)
class EvaluateConfig:
    """Settings of `fatezero evaluate`."""

    source: str = setting("", "Prompt that describes the original; for CLIP.")
    target: str = setting("", "Prompt that describes the edit; for CLIP.")
    mask: str = setting("", "Video or picture, white where the edit should be.")
    truth: str = setting("", "The true edited video, if known.")
    flow: str = setting("auto", "auto, dis, raft, none, or a .safetensors file with tensors forward and backward.")
    clip: str = setting("", "A CLIP of transformers, folder or hub name, e.g. openai/clip-vit-base-patch32.")
    lpips: str = setting("", 'Weights of lpips.LPIPS(net="alex") as .safetensors.')
    judge: bool = setting(False, "Classify the demo scenes' words in the frames.")
    start: int = setting(0, "The original's first frame, as in `fatezero edit`.", least=0, most=2**63 - 1)
    stride: int = setting(1, "Take every n-th frame of the original.", least=1, most=1000)
    crop: tuple[int, int, int, int] = setting(
        (0, 0, 0, 0), "Pixels cut off the original: left,top,right,bottom.", shown="0,0,0,0"
    )
    background: str = setting_like(ClipSettings, "background", "black", group="")
    output: str = setting("", "Output file for the metrics, as JSON.")
    plot: str = setting("", "Output picture of the metrics over the frames.")
    comparison: str = setting("", "Output video with both clips.")
    slice: str = setting(
        "",
        "Output picture of x-t slices of both clips: one row of pixels, time downwards. Motion is a smooth line, "
        "flicker a ragged one.",
    )
    slice_row: int | None = setting(
        None, "Row of the slices, from 0 at the top.", least=0, most=2**31, shown="the one that changes most"
    )
    how: Comparison = setting("side by side", "How the comparison shows the two clips.")

    @property
    def prompts(self) -> tuple[str, str]:
        return self.source, self.target

    @property
    def outputs(self) -> list[Path]:
        return [Path(name) for name in (self.output, self.plot, self.slice, self.comparison) if name]

    def check_effect(self) -> None:
        """Raise ConfigError for settings that have no effect, or that need others."""
        if any(self.prompts) and not (self.clip or self.judge):
            raise ConfigError("source and target have no effect without --clip or --judge")
        if self.how != "side by side" and not self.comparison:
            raise ConfigError("how has no effect without --comparison")
        if self.judge and not all(self.prompts):
            raise ConfigError("judge needs --source and --target, captions such as 'a red square on water'")
        if self.slice_row is not None and not self.slice:
            raise ConfigError("slice_row has no effect without --slice")
        for name, path in (("plot", self.plot), ("slice", self.slice)):
            if path and Path(path).suffix.lower() not in PICTURE_SUFFIXES:
                raise ConfigError(f"{name} is {shown(path)}; it must end in {', '.join(PICTURE_SUFFIXES)}")
        if self.flow not in (*get_args(FlowName), "none") and not self.flow.endswith(".safetensors"):
            names = ", ".join((*get_args(FlowName), "none"))
            raise ConfigError(f"flow is {shown(self.flow)}; it must be {names} or a .safetensors file")


EvaluateOptions = options_of(EvaluateConfig, judge="")


def command(
    original: Annotated[Path, Parameter(help="The video before the edit.")],
    edited: Annotated[Path, Parameter(help="The video after it.")],
    /,
    *,
    options: Annotated[EvaluateOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure an edit: fidelity to the source, consistency over time, CLIP scores, and distance to the truth."""
    console.quiet = quiet
    config = config_as(EvaluateConfig, given_of(options))
    config.check_effect()
    run_evaluate(Session(console, progress_bar, device, overwrite=overwrite), original, edited, config)


def run_evaluate(session: Session, original: Path, edited: Path, config: EvaluateConfig) -> Report:
    """Measure, print a table, and write the outputs."""
    read = {"ORIGINAL": original, "EDITED": edited}
    read |= {name: Path(getattr(config, name)) for name in ("mask", "truth", "flow", "clip", "lpips")}
    check_names(read)
    clips = [path for path in (original, edited, config.mask, config.truth) if path]
    others = [path for path in (config.lpips, config.flow, config.clip) if path]
    with Outputs(session.overwrite, clips, others) as outputs:
        for path in (config.output, config.plot, config.slice):
            if path:
                outputs.file(path)
        clips_found = _Clips.of(original, edited, config)
        if clips_found.rates_differ:
            session.note("the two have other frame rates, and frames are compared in order: check --start and --stride")
        if config.slice_row is not None:
            with of_setting("slice"):
                check_row(config.slice_row, clips_found.edited.size[1])
        if config.comparison:
            found = clips_found.edited
            outputs.clip(config.comparison, len(found))
            times = None if found.even else found.times
            for lost in shortcomings(config.comparison, found.fps, len(found), found.sound() is not None, times):
                session.note(lost)
        return _evaluate(session, config, clips_found)


@dataclass(frozen=True)
class _Clips:
    """The clips to measure, not decoded yet."""

    original: VideoSource
    edited: VideoSource
    truth: VideoSource | None
    mask: VideoSource | None

    @property
    def rates_differ(self) -> bool:
        """Whether the chosen frames of the two videos have different rates, as after an edit with --fps."""
        videos = self.original.index is not None and self.edited.index is not None and len(self.edited) > 1
        return videos and abs(self.original.fps / self.edited.fps - 1) > 0.05

    @classmethod
    def of(cls, original: Path, edited: Path, config: EvaluateConfig) -> _Clips:
        """Raises OSError or ValueError, with the name of the setting, for unreadable files."""
        colour = colour_of(config.background)
        found = open_video(edited, background=colour)
        source = open_video(original, config.start, config.stride, len(found), background=colour)
        check_crop(*source.size, *config.crop)
        truth = mask = None
        if config.truth:
            with of_setting("truth"):
                truth = open_video(config.truth, count=len(found), background=colour)
        if config.mask:
            mask = found_mask("mask", config.mask, len(found))
        return cls(source, found, truth, mask)


def _evaluate(session: Session, config: EvaluateConfig, clips: _Clips) -> Report:
    from ...metrics.evaluate import Report, evaluate
    from ...metrics.lpips import Lpips

    device = pick_device(session.device)
    scenes = _scenes(config.prompts) if config.judge else None
    name, flow = _flow(config.flow, device)
    with of_setting("lpips"):
        lpips = Lpips.load(config.lpips) if config.lpips else None
    scorer = open_clip(config.clip, device) if config.clip else None
    edited = clips.edited.read()
    source = _like(clips.original, edited, config.crop)
    truth = None if clips.truth is None else to_unit(_like(clips.truth, edited))
    mask = None if clips.mask is None else (to_unit(_like(clips.mask, edited)).mean(1) > 0.5).float()
    with session.bars() as bar:
        report = evaluate(
            to_unit(source), to_unit(edited.frames), mask=mask, truth=truth, prompts=config.prompts, flow=flow,
            clip=scorer, lpips=lpips, progress=bar("motion"),
        )  # fmt: skip
    judged = _judged(scenes, edited) if scenes else {}
    report = Report({**judged, **report.figures})
    table = Table("figure", "value", box=box.SIMPLE, pad_edge=False, title=escape(printable(f"flow: {name}")))
    for figure, value in report.figures.items():
        table.add_row(figure, str(value))
    session.console.print(table)
    _write(config, report, source, edited)
    for path in config.outputs:
        session.say(f"written to {path}")
    return report


def _write(config: EvaluateConfig, report: Report, source: Tensor, edited: Video) -> None:
    if config.output:
        figures = {
            name: {"value": _finite(f.value), "unit": f.unit, "by_frame": [_finite(v) for v in f.by_frame]}
            for name, f in report.figures.items()
        }
        with whole_file(Path(config.output)) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if config.plot:
        from PIL import Image

        from ...metrics.plot import plot_report

        write_picture(Path(config.plot), Image.fromarray(plot_report(report).numpy()))
    if config.slice:
        write_slice(Path(config.slice), source, edited.frames, config.slice_row)
    if config.comparison:
        frames = compare(source, edited.frames, config.how, ("source", "edit"))
        write_video(config.comparison, frames, edited.fps, edited.sound, times=edited.times)


def _finite(value: float) -> float | str | None:
    """A number for JSON, which has no infinity or NaN: "inf" and null."""
    return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _like(video: VideoSource, edited: Video, cut: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
    """Frames cut and scaled as `fatezero edit` does, to the edited video's size."""
    return torch.stack(list(FittedVideo.of(video, cut, edited.size).frames()))


def _flow(name: str, device: torch.device) -> tuple[str, tuple[Tensor, Tensor] | Estimator | None]:
    """The estimator of motion by name, or the flow in a file with tensors `forward` and `backward`."""
    if name == "none":
        return "none", None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(name)
    if path.suffix != ".safetensors":
        return flow_estimator(name, device)  # type: ignore[arg-type]
    if not path.is_file():
        raise FileNotFoundError(f"no flow at {path}")
    try:
        tensors = load_file(path)
        return path.name, (tensors["forward"].float(), tensors["backward"].float())
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} must contain tensors `forward` and `backward`: {error}") from error


def _scenes(prompts: tuple[str, str]) -> tuple[Any, Any]:
    """The demo scenes of two captions. Raises ConfigError for other captions."""
    from ...demo.scenes import Scene

    with of_setting("judge"):
        source, target = (Scene.parse(prompt) for prompt in prompts)
        if len(source.things) != 1 or len(target.things) != 1:
            raise ValueError("the captions must have one object; only `fatezero benchmark` knows the positions of two")
    return source, target


def _judged(scenes: tuple[Any, Any], edited: Video) -> dict[str, Figure]:
    """The metrics of the demo scenes' classifier on the frames."""
    from ...demo.judge import read_words
    from ...demo.scenes import SIZE
    from ...metrics.evaluate import Figure

    frames = F.interpolate(to_unit(edited.frames), size=(SIZE, SIZE), mode="area")
    success, changed, kept = read_words(*scenes, frames)
    return {"edit success": Figure(success), "words changed": Figure(changed), "other words kept": Figure(kept)}
