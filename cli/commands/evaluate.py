"""What `fatezero evaluate` does: measure an edited video beside its source."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich import box
from rich.markup import escape
from rich.table import Table

from ...files.whole import whole_file
from ...imports import F, torch
from ...video.fitted import FittedVideo
from ...video.flow import Estimator, flow_estimator
from ...video.pictures import PICTURES
from ...video.read import Video, VideoSource, open_video
from ...video.size import to_unit
from ...video.write import PICTURE_SUFFIXES, shortcomings, write_picture, write_video
from ..config.paths import check_names
from ..options import Device, Overwrite, Quiet, whole, whole_numbers
from ..outputs import Outputs
from ..progress import console, printable, progress_bar
from ..session import Session, pick_device

if TYPE_CHECKING:
    from torch import Tensor

    from ...metrics.evaluate import Figure, Report
    from ...video.compare import Comparison


def command(
    original: Annotated[Path, Parameter(help="The video before the edit.")],
    edited: Annotated[Path, Parameter(help="The video after it.")],
    /,
    *,
    source: Annotated[str, Parameter(help="What the original shows; for CLIP.")] = "",
    target: Annotated[str, Parameter(help="What the edit should show; for CLIP.")] = "",
    mask: Annotated[Path | None, Parameter(help="White where the edit was meant to be: a video or picture.")] = None,
    truth: Annotated[Path | None, Parameter(help="The edit as it should be, where it is known.")] = None,
    flow: Annotated[
        str, Parameter(help="auto, dis, raft, none, or a .safetensors file with tensors forward and backward.")
    ] = "auto",
    clip: Annotated[
        str, Parameter(help="A CLIP of transformers, folder or hub name, e.g. openai/clip-vit-base-patch32.")
    ] = "",
    lpips: Annotated[Path | None, Parameter(help='Weights of lpips.LPIPS(net="alex") as .safetensors.')] = None,
    judge: Annotated[bool, Parameter(negative="", help="Read the demo world's words from the frames.")] = False,
    start: Annotated[int, Parameter(converter=whole, help="The original's first frame, as in `fatezero edit`.")] = 0,
    stride: Annotated[int, Parameter(converter=whole, help="Take every n-th frame of the original.")] = 1,
    crop: Annotated[str, Parameter(help="Pixels cut off the original: left,top,right,bottom.")] = "0,0,0,0",
    output: Annotated[Path | None, Parameter(name=("--output", "-o"), help="The figures as JSON.")] = None,
    plot: Annotated[Path | None, Parameter(help="Curves over the frames, a picture.")] = None,
    comparison: Annotated[Path | None, Parameter(help="Both clips in one video.")] = None,
    how: Annotated[str, Parameter(help="side by side, wipe, split or difference.")] = "side by side",
    device: Device = "auto",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Measure an edit: what it kept, how steadily it moves, what CLIP says, how near the truth it is."""
    console.quiet = quiet
    left, top, right, bottom = whole_numbers("crop", crop, ",", 4)

    asked = Evaluation(
        original, edited, (source, target), mask, truth, flow, clip, lpips, judge, start, stride,
        (left, top, right, bottom), output, plot, comparison, how,  # type: ignore[arg-type]
    )  # fmt: skip
    run_evaluate(Session(console, progress_bar, device, overwrite=overwrite), asked)


@dataclass(frozen=True)
class Evaluation:
    """What to measure, and where the results go; see `fatezero evaluate --help`."""

    source: Path
    edited: Path
    prompts: tuple[str, str] = ("", "")
    mask: Path | None = None
    truth: Path | None = None
    flow: str = "auto"
    clip: str = ""
    lpips: Path | None = None
    judge: bool = False
    start: int = 0
    stride: int = 1
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    output: Path | None = None
    plot: Path | None = None
    comparison: Path | None = None
    how: Comparison = "side by side"


def run_evaluate(session: Session, asked: Evaluation) -> Report:
    """Measure, print a table, and write what was asked for."""
    from ...video.compare import COMPARISONS

    if asked.how not in COMPARISONS:
        raise ValueError(f"--how is {asked.how!r}; it must be one of {', '.join(COMPARISONS)}")
    if any(asked.prompts) and not (asked.clip or asked.judge):
        raise ValueError("--source and --target have no effect here: they are for --clip and --judge")
    if asked.how != Evaluation.how and not asked.comparison:
        raise ValueError("--how has no effect here: it is for --comparison")
    read = {"ORIGINAL": asked.source, "EDITED": asked.edited}
    read |= {f"--{name}": getattr(asked, name) for name in ("mask", "truth", "flow", "clip", "lpips")}
    check_names(read)
    clips = [path for path in (asked.source, asked.edited, asked.mask, asked.truth) if path]
    others = [path for path in (asked.lpips, asked.flow, asked.clip) if path]
    with Outputs(session.overwrite, clips, others) as outputs:
        for path in (asked.output, asked.plot):
            if path:
                outputs.file(path)
        if asked.plot and asked.plot.suffix.lower() not in PICTURE_SUFFIXES:
            raise ValueError(f"--plot is {asked.plot.name!r}: use one of {', '.join(PICTURE_SUFFIXES)}")
        found = open_video(asked.edited)
        if asked.comparison:
            outputs.clip(asked.comparison, len(found))
            times = None if found.even else found.times
            for lost in shortcomings(asked.comparison, found.fps, len(found), found.sound() is not None, times):
                session.note(lost)
        return _evaluate(session, asked, found)


def _evaluate(session: Session, asked: Evaluation, found: VideoSource) -> Report:
    from ...metrics.clip import ClipScorer
    from ...metrics.evaluate import Report, evaluate
    from ...metrics.lpips import Lpips

    device = pick_device(session.device)
    edited = found.read()
    source = _like(open_video(asked.source, asked.start, asked.stride, len(edited.frames)), edited, asked.crop)
    truth = _like(open_video(asked.truth, 0, 1, len(edited.frames)), edited) if asked.truth else None
    judged = _judged(asked.prompts, edited) if asked.judge else {}
    name, flow = _flow(asked.flow, device)
    with session.bars() as bar:
        report = evaluate(
            to_unit(source),
            to_unit(edited.frames),
            mask=_mask(asked.mask, edited) if asked.mask else None,
            truth=None if truth is None else to_unit(truth),
            prompts=asked.prompts,
            flow=flow,
            clip=ClipScorer.load(asked.clip, device) if asked.clip else None,
            lpips=Lpips.load(asked.lpips) if asked.lpips else None,
            progress=bar("motion"),
        )
    report = Report({**judged, **report.figures})
    table = Table("figure", "value", box=box.SIMPLE, pad_edge=False, title=escape(printable(f"flow: {name}")))
    for figure, value in report.figures.items():
        table.add_row(figure, str(value))
    session.console.print(table)
    _write(asked, report, source, edited)
    for path in (asked.output, asked.plot, asked.comparison):
        if path:
            session.say(f"written to {path}")
    return report


def _write(asked: Evaluation, report: Report, source: Tensor, edited: Video) -> None:
    if asked.output:
        figures = {
            name: {"value": _finite(f.value), "unit": f.unit, "by_frame": [_finite(v) for v in f.by_frame]}
            for name, f in report.figures.items()
        }
        with whole_file(asked.output) as partial:
            partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if asked.plot:
        from PIL import Image

        from ...metrics.plot import plot_report

        write_picture(asked.plot, Image.fromarray(plot_report(report).numpy()))
    if asked.comparison:
        from ...video.compare import compare

        shown = compare(source, edited.frames, asked.how, ("source", "edit"))
        write_video(asked.comparison, shown, edited.fps, edited.sound, times=edited.times)


def _finite(value: float) -> float | str | None:
    """JSON has no infinity and no NaN: "inf" and null."""
    return None if math.isnan(value) else "inf" if math.isinf(value) else value


def _like(video: VideoSource, edited: Video, cut: tuple[int, int, int, int] = (0, 0, 0, 0)) -> Tensor:
    """Frames cut and scaled as `fatezero edit` does, to the edited video's size."""
    return torch.stack(list(FittedVideo.of(video, cut, edited.size).frames()))


def _mask(path: Path, edited: Video) -> Tensor:
    """A video or picture, white where the edit was meant to be: (frames or 1, height, width)."""
    still = path.is_file() and path.suffix.lower() in PICTURES
    masks = _like(open_video(path, 0, 1, 1 if still else len(edited.frames)), edited)
    return (to_unit(masks).mean(1) > 0.5).float()


def _flow(name: str, device: torch.device) -> tuple[str, tuple[Tensor, Tensor] | Estimator | None]:
    """What finds the motion, by name; or a file with tensors `forward` and `backward`."""
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
        held = load_file(path)
        return path.name, (held["forward"].float(), held["backward"].float())
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} must hold tensors `forward` and `backward`: {error}") from error


def _judged(prompts: tuple[str, str], edited: Video) -> dict[str, Figure]:
    """What the demo world's classifier reads; the prompts must be captions of that world, of one thing."""
    from ...demo.judge import read_words
    from ...demo.scenes import SIZE, Scene
    from ...metrics.evaluate import Figure

    source, target = (Scene.parse(prompt) for prompt in prompts)
    if len(source.things) != 1 or len(target.things) != 1:
        raise ValueError("--judge reads one thing; of two, only `fatezero benchmark` knows where they are")
    frames = F.interpolate(to_unit(edited.frames), size=(SIZE, SIZE), mode="area")
    success, changed, kept = read_words(source, target, frames)
    return {"edit success": Figure(success), "words changed": Figure(changed), "other words kept": Figure(kept)}
