"""Stores in files, and masks: previewed, given, corrected."""

import numpy as np
import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError
from PIL import Image
from safetensors.torch import safe_open

from fatezero.store.budget import format_bytes
from small import relative


def edited(host, graph):
    return host.latents(graph.prompt, graph.edit[0])


@pytest.mark.every_host
@pytest.mark.parametrize("memory", ["recompute", "queries_keys", "maps"])
def test_a_saved_store_gives_the_same_edit_as_the_inversion(host, memory):
    graph = DemoGraph(steps=6)  # used by no other test, so that nothing is cached
    graph.set(graph.invert, memory=memory)
    save = graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix=f"stores/{memory}")
    usage = graph.add("OtherRamUsage", store=graph.invert[1])
    run = host.run(graph.prompt)
    expected = edited(host, graph)
    file = host.text(run, save.id)
    assert file == f"stores/{memory}_00001_.safetensors [output]"
    path = host.base / "output" / file.removesuffix(" [output]")
    with safe_open(path, "pt") as stored:
        nbytes = sum(stored.get_tensor(name).nbytes for name in stored.keys() if name != "checksums")  # noqa: SIM118
    assert int(host.text(run, usage.id)) == nbytes
    shown = host.text(run, graph.invert.id)
    assert shown.startswith(f"{memory} in RAM, {format_bytes(nbytes)}: ")

    load = graph.add("FateZeroLoadStore", file=file)
    graph.set(graph.edit, store=load[0])
    del graph.prompt[save.id], graph.prompt[usage.id]
    assert relative(edited(host, graph), expected) < 1e-5
    assert (
        file
        in host.get("/object_info/FateZeroLoadStore")["FateZeroLoadStore"]["input"]["required"]["file"][1]["options"]
    )


@pytest.mark.parametrize("file", ["nowhere.safetensors", "../host.log", "../../etc/passwd [output]", "/etc/passwd"])
def test_files_outside_the_hosts_folders_are_refused(host, file):
    graph = DemoGraph()
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    with pytest.raises(NodeError, match="file: no store"):
        edited(host, graph)


def test_a_store_that_a_file_cannot_hold_is_refused(host, controlnet):
    """Memory recompute would need the source's ControlNet again."""
    graph = DemoGraph()
    graph.set(graph.invert, source=graph.with_control(controlnet, graph.words[0], graph.negative[0], 1.0)[0])
    graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="stores/control")
    with pytest.raises(NodeError, match="store: .*control"):
        host.run(graph.prompt)
    graph.set(graph.invert, memory="queries_keys")
    host.run(graph.prompt)


def add_mask(graph, host, name, values):
    """A MASK of one frame from a picture in the input folder: values (y, x) from 0 to 1."""
    picture = np.repeat((values * 255).astype(np.uint8)[..., None], 3, axis=2)
    Image.fromarray(picture).save(host.base / "input" / f"{name}.png")
    image = graph.add("LoadImageMask", image=f"{name}.png", channel="red")
    return image[0]


def blended(**settings):
    graph = DemoGraph()
    graph.set(graph.words, target="a red circle on water", mode="replace")
    graph.fuse(**{"blend_self_attention": True, **settings})
    return graph


def test_full_empty_and_half_masks(host):
    """Full: as if self-attention were not fused. Empty: as if fused without a blend. Half: between."""
    results = {}
    half = np.zeros((64, 64))
    half[:, :32] = 1
    for name, values in {"none": np.zeros((64, 64)), "all": np.ones((64, 64)), "half": half}.items():
        graph = blended()
        graph.set(graph.edit, mask=add_mask(graph, host, name, values), mask_mode="replace")
        results[name] = edited(host, graph)
    fused, own = blended(blend_self_attention=False), blended(self_replace_steps=0.0)
    assert relative(results["none"], edited(host, fused)) < 1e-5
    assert relative(results["all"], edited(host, own)) < 1e-5
    assert relative(results["half"], results["none"]) > 1e-2
    assert relative(results["half"], results["all"]) > 1e-2


def test_a_mask_extends_the_mask_of_attention(host):
    everything, nothing = np.ones((64, 64)), np.zeros((64, 64))
    plain = edited(host, blended())
    results = {}
    for mode, name, values in (("union", "nothing", nothing), ("intersection", "everything", everything)):
        graph = blended()
        graph.set(graph.edit, mask=add_mask(graph, host, name, values), mask_mode=mode)
        results[mode] = edited(host, graph)
        assert relative(results[mode], plain) < 1e-5


@pytest.mark.slow
def test_latents_outside_a_mask_equal_the_clips(host):
    """A mask of the left half, by the host's mask nodes: only the right half equals the replay."""
    half = np.zeros((64, 64))
    half[:, :32] = 1
    graph = blended(blend_latents=True)
    graph.set(graph.video, width=64, height=64)
    graph.set(graph.invert, steps=20)
    drawn = add_mask(graph, host, "left", 1 - half)
    graph.set(graph.edit, mask=graph.add("InvertMask", mask=drawn)[0], guidance=7.5)
    result, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
    change = (result - clip).abs().mean((0, 1, 2))
    assert change[9:].mean() < 0.5 * change[:7].mean()


def test_a_mask_that_does_not_fit_or_has_no_effect_is_refused(host):
    graph = DemoGraph()
    graph.set(graph.edit, mask=add_mask(graph, host, "one", np.ones((64, 64))))
    with pytest.raises(NodeError, match="mask: preset 'attribute' does not blend"):
        edited(host, graph)
    graph = blended()
    two = graph.add(
        "ImageToMask", image=graph.add("EmptyImage", width=64, height=64, batch_size=2, color=0)[0], channel="red"
    )
    graph.set(graph.edit, mask=two[0])
    with pytest.raises(NodeError, match="mask.*2"):
        edited(host, graph)


def test_the_mask_preview_shows_words_and_mask(host):
    graph = DemoGraph(steps=10)
    graph.set(graph.words, target="a red circle on water", mode="replace")
    preview = graph.add(
        "FateZeroMaskPreview", store=graph.invert[1], prompt_edit=graph.words[2], words="square, water",
        from_share=0.2, to_share=0.8, threshold=0.55, width=64, height=64,
    )  # fmt: skip
    heat = graph.add("SaveImage", images=preview[0], filename_prefix="heat")
    mask = graph.add("SaveImage", images=graph.add("MaskToImage", mask=preview[1])[0], filename_prefix="mask")
    run = host.run(graph.prompt)
    assert len(run.outputs[heat.id]["images"]) == len(run.outputs[mask.id]["images"]) == 3
    width, height = Image.open(host.file(run, heat.id)).size
    assert (width, height) == (128, 64)
    values = torch.from_numpy(np.array(Image.open(host.file(run, mask.id)).convert("L")))
    assert set(values.unique().tolist()) == {0, 255}

    graph.set(preview, words="jeep")
    with pytest.raises(NodeError, match="'jeep' is not in the prompt"):
        host.run(graph.prompt)
    graph.set(preview, words="")
    host.run(graph.prompt)
