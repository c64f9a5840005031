"""Both hosts, the nodes and diffusers, give the same edit of the demo clip."""

from dataclasses import replace

import pytest
import torch
from comfyui.graph import SIDE, SOURCE, DemoGraph

from fatezero import edit_many
from fatezero.cli.commands.invert import invert_video
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.cli.edits import one_edit
from fatezero.cli.frames import find_frames, fit_frames
from fatezero.cli.objects import layout_of
from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from small import relative

EDITS = {
    "style": "watercolor painting of a red square on water",
    "attribute": "a green square on water",
    "shape": "a red circle on water",
}


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.load("demo")


@pytest.mark.every_host
@pytest.mark.parametrize(
    ("preset", "memory", "clip_norm"),
    [
        ("style", "recompute", False),
        ("attribute", "queries_keys", True),
        ("shape", "recompute", True),
        ("shape", "maps", False),
        ("shape+", "queries_keys", False),
        ("attribute+", "recompute", True),
    ],
)
def test_both_hosts_agree(host, checkpoint, preset, memory, clip_norm):
    config = EditConfig(
        source=SOURCE, target=EDITS[preset.rstrip("+")], steps=6, count=4, memory=memory,
        clip_norm=clip_norm,
    )  # fmt: skip
    config = with_preset(config, preset)
    graph = DemoGraph(steps=6, frames=4)
    graph.set(graph.invert, memory=memory, clip_norm=clip_norm)
    graph.set(graph.edit, preset=preset)
    assert relative(*parity(host, checkpoint, graph, config)) < 1e-4


def parity(host, checkpoint, graph, config) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of a graph's edit by the nodes, and by the diffusers host with a configuration."""
    config = replace(config, video=str(CLIP))
    inversion = invert_video(
        checkpoint, config, fit_frames(config, find_frames(config), 4, SIDE), lambda _: lambda done, of: None
    )
    layout = layout_of(config, checkpoint.tokenizer, config.target, config.count)
    pair = config.prompt_edit(checkpoint.tokenizer)
    one = one_edit(checkpoint, config, pair, inversion.store, layout=layout)
    (ours,) = edit_many(checkpoint.denoiser, inversion, [one])

    graph.set(graph.words, target=config.target, mode=config.mode)
    graph.set(graph.edit, guidance=config.guidance_scale)
    scale = checkpoint.vae.config["scaling_factor"]  # a LATENT is not scaled
    return host.latents(graph.prompt, graph.edit[0]) * scale, ours
