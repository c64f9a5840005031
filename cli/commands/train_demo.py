"""`fatezero train-demo`: the bundled models, trained again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ..options import Device, whole
from ..progress import console
from ..session import pick_device


def command(
    *,
    part: Annotated[
        Literal["image", "video", "transformer"],
        Parameter(
            help="The image model, the temporal layers that make the bundled one a model of videos, or the video "
            "transformer."
        ),
    ] = "image",
    output: Annotated[Path, Parameter(name=("--output", "-o"), help="Folder for what is trained.")] = Path(
        "checkpoint"
    ),
    state: Annotated[Path, Parameter(help="Folder for what a resume needs.")] = Path("training"),
    device: Device = "auto",
    steps: Annotated[int | None, Parameter(converter=whole, help="Steps of the UNet or the layers, if fewer.")] = None,
    images: Annotated[int | None, Parameter(converter=whole, help="Pictures or clips to draw, if fewer.")] = None,
) -> None:
    """Train the bundled models again; hours on a CPU, minutes on a GPU."""
    from ...demo.evaluate import evaluate, moving_figures
    from ...demo.judge import load_judge
    from ...demo.temporal import TemporalSettings, train_temporal
    from ...demo.train import TrainSettings, train
    from ...demo.train_video import VideoSettings, train_video
    from ...files.temporal_layers import FILE
    from ...hosts.diffusers.checkpoint import Checkpoint
    from ...hosts.diffusers.load import demo_video_model

    where = pick_device(device)
    if part == "image":
        settings = TrainSettings()
        settings = replace(settings, unet_steps=steps or settings.unet_steps, images=images or settings.images)
        train(output, state, settings, where, console.print)
        evaluate(Checkpoint.load(str(output), where), load_judge(output).to(where), console.print)
        return
    if part == "transformer":
        of_clips = VideoSettings()
        of_clips = replace(of_clips, steps=steps or of_clips.steps, clips=images or of_clips.clips)
        train_video(output, state, of_clips, where, console.print)
        _tell(moving_figures(demo_video_model(output, where), load_judge()))
        return
    of_layers = TemporalSettings()
    of_layers = replace(of_layers, steps=steps or of_layers.steps, clips=images or of_layers.clips)
    train_temporal(output / FILE, state, of_layers, where, console.print)
    _tell(moving_figures(Checkpoint.load("demo", where, temporal=str(output)), load_judge()))


def _tell(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        console.print(f"{name}: {value:.3f}")
