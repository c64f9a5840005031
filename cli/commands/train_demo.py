"""`fatezero train-demo`: train the bundled models again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from ...settings import setting
from ..config.values import config_as
from ..options import Device, given_of, options_of
from ..outputs import check_folder
from ..progress import console
from ..session import pick_device


@dataclass(frozen=True)
class TrainDemoConfig:
    """Settings of `fatezero train-demo`."""

    part: Literal["image", "video", "transformer", "few_steps"] = setting(
        "image",
        "The image model, the temporal layers that make the bundled one a model of videos, the video transformer, or "
        "the bundled one's LoRA for few steps.",
    )
    output: str = setting("checkpoint", "Folder for the trained weights.")
    state: str = setting("training", "Folder for the state for --resume.")
    steps: int | None = setting(
        None, "Steps of the UNet, the layers or the LoRA, if fewer.", least=1, most=10_000_000, shown="all"
    )
    images: int | None = setting(None, "Number of pictures or clips, if fewer.", least=1, most=10_000_000, shown="all")


TrainDemoOptions = options_of(TrainDemoConfig)


def command(
    *,
    options: Annotated[TrainDemoOptions | None, Parameter(name="*")] = None,  # type: ignore[valid-type]
    device: Device = "auto",
) -> None:
    """Train the bundled models again; hours on a CPU, minutes on a GPU."""
    config = config_as(TrainDemoConfig, given_of(options))
    output, state, steps, images = Path(config.output), Path(config.state), config.steps, config.images
    for folder in (output, state):
        check_folder(folder)
    from ...demo.evaluate import evaluate, moving_figures
    from ...demo.judge import load_judge
    from ...demo.temporal import TemporalSettings, train_temporal
    from ...demo.train import TrainSettings, train
    from ...demo.train_few_steps import FewStepsSettings, train_few_steps
    from ...demo.train_video import VideoSettings, train_video
    from ...files.bundled import FEW_STEPS
    from ...files.temporal_layers import FILE
    from ...hosts.diffusers.checkpoint import Checkpoint
    from ...hosts.diffusers.load import demo_video_model, open_model

    where = pick_device(device)
    if config.part == "image":
        settings = TrainSettings()
        settings = replace(settings, unet_steps=steps or settings.unet_steps, images=images or settings.images)
        train(output, state, settings, where, console.print)
        evaluate(Checkpoint.load(str(output), where), load_judge(output).to(where), console.print)
        return
    if config.part == "transformer":
        of_clips = VideoSettings()
        of_clips = replace(of_clips, steps=steps or of_clips.steps, clips=images or of_clips.clips)
        train_video(output, state, of_clips, where, console.print)
        _print_figures(moving_figures(demo_video_model(output, where), load_judge()))
        return
    if config.part == "few_steps":
        of_steps = FewStepsSettings()
        of_steps = replace(of_steps, steps=steps or of_steps.steps, clips=images or of_steps.clips)
        train_few_steps(output / FEW_STEPS.name, state, of_steps, where, console.print)
        lora = str(output / FEW_STEPS.name)
        _print_figures(moving_figures(open_model("demo-wan", where, lora=lora), load_judge(), steps=7, guidance=1.0))
        return
    of_layers = TemporalSettings()
    of_layers = replace(of_layers, steps=steps or of_layers.steps, clips=images or of_layers.clips)
    train_temporal(output / FILE, state, of_layers, where, console.print)
    _print_figures(moving_figures(Checkpoint.load("demo", where, temporal=str(output)), load_judge()))


def _print_figures(figures: dict[str, float]) -> None:
    for name, value in figures.items():
        console.print(f"{name}: {value:.3f}")
