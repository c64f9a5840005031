"""What an edit does not change: the source's own pixels around it, and windows around a mask."""

import numpy as np
import torch
from comfyui.graph import DemoGraph
from PIL import Image

SIDE = 80


def masked(host):
    """An edit at 32x32 of a corner of the clip, and the clip at 80x80."""
    graph = DemoGraph()
    mask = np.zeros((32, 32), np.uint8)
    mask[:8, :8] = 255
    Image.fromarray(mask).save(host.base / "input" / "corner.png")
    corner = graph.add("LoadImageMask", image="corner.png", channel="red")
    graph.set(graph.edit, preset="none", mask=corner[0], mask_mode="replace", prompt_edit=None)
    del graph.prompt[graph.edit.id]["inputs"]["prompt_edit"]
    full = graph.add(
        "FateZeroLoadVideo", file="", start=0, stride=1, count=graph.frames, width=SIDE, height=SIDE,
        crop_left=0, crop_top=0, crop_right=0, crop_bottom=0, video=graph.demo[3],
    )  # fmt: skip
    decoded = graph.add("VAEDecode", samples=graph.edit[0], vae=graph.demo[2])
    return graph, full, decoded


def pictures(host, graph, *links):
    """The frames at some links: (frames, height, width, 3) each."""
    saved = [graph.add("SaveImage", images=link, filename_prefix="keep") for link in links]
    run, found = host.run(graph.prompt), []
    for node in saved:
        files = [host.base / x["type"] / x["subfolder"] / x["filename"] for x in run.outputs[node.id]["images"]]
        found.append(torch.stack([torch.from_numpy(np.array(Image.open(file)).astype(int)) for file in files]))
    return found


def test_pixels_outside_the_mask_are_the_sources(host):
    graph, full, decoded = masked(host)
    changed = graph.add("MaskToImage", mask=graph.edit[2])
    node = graph.add(
        "FateZeroRestoreUnchanged", source=full[0], edited=decoded[0], mask=graph.edit[2], feather=8,
        match_colours=True, vae=graph.demo[2],
    )  # fmt: skip
    source, result, mask = pictures(host, graph, full[0], node[0], changed[0])
    grid = mask[0, ..., 0] > 0
    assert grid.any() and not grid[len(grid) // 2 :].any() and not grid[:, len(grid) // 2 :].any()
    assert result.shape == source.shape
    assert torch.equal(result[:, -16:], source[:, -16:]) and torch.equal(result[:, :, -16:], source[:, :, -16:])
    assert (result - source)[:, :16, :16].abs().float().mean() > 2


def test_the_alpha_of_a_source_stays(host):
    graph, full, decoded = masked(host)
    ramp = np.linspace(0, 255, SIDE).round().astype(np.uint8)[None].repeat(SIDE, 0)
    Image.fromarray(ramp).save(host.base / "input" / "ramp.png")
    alpha = graph.add("LoadImageMask", image="ramp.png", channel="red")
    clear = graph.add("JoinImageWithAlpha", image=full[0], alpha=alpha[0])
    node = graph.add(
        "FateZeroRestoreUnchanged", source=clear[0], edited=decoded[0], mask=graph.edit[2], feather=8,
        match_colours=True,
    )  # fmt: skip
    source, result = pictures(host, graph, clear[0], node[0])
    assert result.shape[-1] == 4 and torch.equal(result[..., 3], source[..., 3])
    assert torch.equal(result[:, -16:], source[:, -16:]) and not torch.equal(result[:, :16, :16], source[:, :16, :16])


def test_a_window_is_edited_and_stitched_back(host):
    graph = DemoGraph(frames=3)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[20:36, 24:40] = 255
    Image.fromarray(mask).save(host.base / "input" / "object.png")
    drawn = graph.add("LoadImageMask", image="object.png", channel="red")
    full = graph.add(
        "FateZeroLoadVideo", file="", start=0, stride=1, count=graph.frames, width=SIDE, height=SIDE,
        crop_left=0, crop_top=0, crop_right=0, crop_bottom=0, video=graph.demo[3],
    )  # fmt: skip
    crop = graph.add("FateZeroCropToMask", images=full[0], mask=drawn[0], width=32, height=32, surroundings=0.5)
    graph.set(graph.latent, images=crop[0])
    del graph.prompt[graph.edit.id]["inputs"]["prompt_edit"]
    graph.set(graph.edit, preset="none", mask=crop[1], mask_mode="replace")
    decoded = graph.add("VAEDecode", samples=graph.edit[0], vae=graph.demo[2])
    node = graph.add(
        "FateZeroStitchBack", source=full[0], edited=decoded[0], region=crop[2], feather=4, match_colours=True,
        mask=graph.edit[2],
    )  # fmt: skip
    source, window, result = pictures(host, graph, full[0], crop[0], node[0])
    assert window.shape == (3, 32, 32, 3)
    changed = (result != source).any(-1)
    assert changed[:, 22:34, 26:38].float().mean() > 0.7
    changed[:, 16:40, 20:44] = False
    assert not changed.any()
