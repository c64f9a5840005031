"""Evaluate Edit and Compare Videos on the real server."""

import numpy as np
import pytest
import torch
from comfyui.graph import SIDE, SOURCE, TARGET, DemoGraph
from comfyui.host import NodeError
from PIL import Image

from fatezero.metrics.evaluate import evaluate
from fatezero.video.flow import flow_estimator
from fatezero.video.read import read_video
from fatezero.video.size import to_unit


class Measured(DemoGraph):
    """A graph of the demo's edit, evaluated and compared with its source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.edited = self.add("VAEDecode", samples=self.edit[0], vae=self.demo[2])
        self.evaluate = self.add(
            "FateZeroEvaluate", source=self.video[0], edited=self.edited[0], source_prompt=SOURCE,
            target_prompt=TARGET, flow="dis", clip_model="", lpips_weights="",
        )  # fmt: skip
        self.plot = self.add("SaveImage", images=self.evaluate[1], filename_prefix="plot")
        self.compare = self.add(
            "FateZeroCompareVideos", a=self.video[0], b=self.edited[0], comparison="side by side",
            label_a="source", label_b="edit", fps=self.video[2],
        )  # fmt: skip
        self.saved = self.add(
            "SaveVideo", video=self.compare[1], filename_prefix="compare", format="auto", codec="auto"
        )  # fmt: skip


def test_an_edit_is_measured_and_plotted(host):
    graph = Measured()
    run = host.run(graph.prompt)
    report = host.text(run, graph.evaluate.id)
    figures = {line.rsplit("  ", 1)[0].strip(): line.rsplit("  ", 1)[1] for line in report.splitlines()}
    assert set(figures) == {
        "PSNR to source", "SSIM to source", "warp error", "warp error of the source", "pixels not occluded",
    }  # fmt: skip
    assert figures["PSNR to source"].endswith(" dB")
    with Image.open(host.file(run, graph.plot.id)) as plot:
        assert plot.size == (768, 600)


def test_the_figures_equal_the_librarys(host):
    """Computed from the pictures that the host saved."""
    graph = Measured()
    frames = [graph.add("SaveImage", images=node[0], filename_prefix=name) for name, node in
              (("a", graph.video), ("b", graph.edited))]  # fmt: skip
    run = host.run(graph.prompt)
    source, edited = (clip_of(host, run, node) for node in frames)
    figures = evaluate(source, edited, flow=flow_estimator("dis")[1]).figures
    report = host.text(run, graph.evaluate.id)
    for name in ("PSNR to source", "SSIM to source", "warp error"):
        line = next(line for line in report.splitlines() if line.startswith(name + "  "))
        assert float(line[len(name) :].split()[0]) == pytest.approx(figures[name].value, rel=0.03)


def clip_of(host, run, node):
    """The pictures saved by a node, as frames in 0..1."""
    pictures = [
        Image.open(host.base / x["type"] / x["subfolder"] / x["filename"]) for x in run.outputs[node.id]["images"]
    ]
    return to_unit(torch.stack([torch.from_numpy(np.asarray(picture).copy()) for picture in pictures]))


@pytest.mark.parametrize("comparison", ["side by side", "wipe", "split", "difference"])
def test_two_clips_become_one_video(host, comparison):
    graph = Measured()
    graph.set(graph.compare, comparison=comparison)
    run = host.run(graph.prompt)
    video = read_video(host.file(run, graph.saved.id))
    assert video.frames.shape == (3, SIDE, 2 * SIDE if comparison == "side by side" else SIDE, 3)
    assert video.fps == 8


def test_clips_of_different_sizes_are_refused(host):
    graph = Measured()
    fewer = graph.add("ImageFromBatch", image=graph.video[0], batch_index=0, length=2)
    graph.set(graph.evaluate, edited=fewer[0])
    assert "edited has shape" in failure(host, graph)
    graph.set(graph.evaluate, edited=graph.edited[0])
    graph.set(graph.compare, b=fewer[0])
    assert f"3 frames of {SIDE}x{SIDE} and 2 frames" in failure(host, graph)


def failure(host, graph):
    with pytest.raises(NodeError) as failed:
        host.run(graph.prompt)
    return failed.value.report["exception_message"]
