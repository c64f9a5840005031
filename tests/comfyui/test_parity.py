"""Both hosts, the nodes and diffusers, give the same edit of the demo clip."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui.graph import SIDE, SOURCE, DemoGraph
from comfyui.host import NodeError
from PIL import Image

from fatezero import EditMaps, PromptEdit, edit_many
from fatezero.attention.masks import GivenMask
from fatezero.cli.commands.invert import invert_video
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.cli.edits import one_edit
from fatezero.cli.frames import find_frames, fit_frames
from fatezero.cli.objects import layout_of
from fatezero.files.bundled import CLIP
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.video.sheet import heat_map
from fatezero.video.slice import moving_row, slices
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


@pytest.mark.every_host
def test_edit_maps_shows_what_the_library_records(host, checkpoint):
    """And edits as Edit Video does."""
    config = with_preset(EditConfig(source=SOURCE, target=EDITS["shape"], steps=6, count=4), "shape")
    maps = EditMaps.of(PromptEdit(config.source, config.target, checkpoint.tokenizer))
    graph = DemoGraph(steps=6, frames=4)
    graph.set(graph.edit, preset="shape")
    theirs, _ = parity(host, checkpoint, graph, config, maps)
    node = graph.add("FateZeroEditMaps", **graph.prompt[graph.edit.id]["inputs"])
    scale = checkpoint.vae.config["scaling_factor"]
    assert relative(host.latents(graph.prompt, node[0]) * scale, theirs) < 1e-5
    images = [node[1], node[2], *(graph.add("MaskToImage", mask=node[i])[0] for i in (4, 5))]
    saved = [graph.add("SaveImage", images=image, filename_prefix="edit_maps") for image in images]
    run = host.run(graph.prompt)
    *heats, attention, latents = (pictures(host, run, one) for one in saved)
    for name, shown in zip(("source", "target"), heats, strict=True):
        ours = [heat_map(heat.mean(0), (64, 64), word) for word, heat in maps.heats()[name].items()]
        difference = (torch.cat(ours, 2).int() - shown.int()).abs().float()
        assert shown.shape == (4, 64, 5 * 64, 3) and difference.mean() < 1
    ours = GivenMask(maps.masks()["attention"].mean(0)).at((64, 64), 4)
    assert 0.1 < ours.mean() < 0.9 and (attention[..., 0] / 255 - ours).abs().max() < 0.01
    assert bool((latents == 255).all()) and "latents" not in maps.masks()
    graph.set(node, preset="style")
    assert "no masks: this edit uses none" in host.text(host.run(graph.prompt), node.id)


def pictures(host, run, node):
    """The pictures that a node saved, uint8 (frames, height, width, 3)."""
    files = [host.base / one["type"] / one["subfolder"] / one["filename"] for one in run.outputs[node.id]["images"]]
    return torch.stack([torch.from_numpy(np.asarray(Image.open(file).convert("RGB")).copy()) for file in files])


@pytest.mark.every_host
def test_an_x_t_slice_is_one_row_of_every_frame(host):
    graph = DemoGraph(frames=4)
    node = graph.add("FateZeroSlice", images=graph.video[0], row=20, stretch=3)
    saved = [graph.add("SaveImage", images=link, filename_prefix="slice") for link in (graph.video[0], node[0])]
    run = host.run(graph.prompt)
    frames, (shown,) = (pictures(host, run, one) for one in saved)
    assert torch.equal(shown, frames[:, 20].repeat_interleave(3, 0))
    graph.set(node, edited=graph.video[0], row=-1, stretch=0)
    (both,) = pictures(host, host.run(graph.prompt), saved[1])
    assert torch.equal(both, slices((frames, frames), moving_row(frames)))
    graph.set(node, row=99)
    with pytest.raises(NodeError, match="row is 99"):
        host.run(graph.prompt)


def parity(host, checkpoint, graph, config, maps=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of a graph's edit by the nodes, and by the diffusers host with a configuration."""
    config = replace(config, video=str(CLIP))
    inversion = invert_video(
        checkpoint, config, fit_frames(config, find_frames(config), 4, SIDE), lambda _: lambda done, of: None
    )
    layout = layout_of(config, checkpoint.tokenizer, config.target, config.count)
    pair = config.prompt_edit(checkpoint.tokenizer)
    one = one_edit(checkpoint, config, pair, inversion.store, layout=layout)
    one = replace(one, maps=maps)
    (ours,) = edit_many(checkpoint.denoiser, inversion, [one])

    graph.set(graph.words, target=config.target, mode=config.mode)
    graph.set(graph.edit, guidance=config.guidance_scale)
    scale = checkpoint.vae.config["scaling_factor"]  # a LATENT is not scaled
    return host.latents(graph.prompt, graph.edit[0]) * scale, ours
