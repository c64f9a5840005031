"""One method, two hosts: the nodes and the diffusers host edit the demo clip alike."""

import pytest
from comfyui.graph import SOURCE, DemoGraph

from fatezero import edit
from fatezero.cli.config import EditConfig, with_preset
from fatezero.cli.run import find_frames, fit_frames, invert_video
from fatezero.demo.show import CLIP
from fatezero.hosts.checkpoint import Checkpoint
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
def test_the_two_hosts_agree(host, checkpoint, preset, memory, clip_norm):
    config = EditConfig(
        video=str(CLIP), source=SOURCE, target=EDITS[preset.rstrip("+")], steps=6, count=4, memory=memory,
        clip_norm=clip_norm,
    )  # fmt: skip
    config = with_preset(config, preset)
    inversion = invert_video(
        checkpoint, config, fit_frames(config, find_frames(config), 4, 64), lambda _: lambda done, of: None
    )
    ours = edit(
        checkpoint.denoiser, inversion, checkpoint.encode_prompt(config.target, 64, 64),
        checkpoint.encode_prompt("", 64, 64), config.guidance_scale, config.prompt_edit(checkpoint.tokenizer),
        config.fusion,
    )  # fmt: skip

    graph = DemoGraph(steps=6, frames=4)
    graph.set(graph.words, target=config.target, mode=config.mode)
    graph.set(graph.invert, memory=memory, clip_norm=clip_norm)
    graph.set(graph.edit, preset=preset, guidance=config.guidance_scale)
    scale = checkpoint.vae.config["scaling_factor"]  # a LATENT is the autoencoder's own
    assert relative(host.latents(graph.prompt, graph.edit[0]) * scale, ours) < 1e-4
