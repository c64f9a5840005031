"""Edits of LTX-2 with guide pictures and clean frames of their own (Edit Guides)."""

import pytest
import torch
from comfyui.graph import Node
from comfyui.host import NodeError
from comfyui.test_ltx import STEPS, video_and_sound
from comfyui.test_ltx_guides import MASKED, ONE, SEVERAL, SMALL, WEAK, GuidedGraph

from small import relative

FRAMES = 4


def guided(graph: GuidedGraph, seed: int = 10, **more) -> tuple[Node, list]:
    """(Edit Guides between store and edit, the LATENT with the edit's guides)."""
    latent, (_, positive, negative) = graph.with_guides(
        [graph.words[0], graph.words[1], graph.negative[0]], seed, **more
    )
    store = graph.prompt[graph.edit.id]["inputs"]["store"]
    node = graph.add("FateZeroEditGuides", store=store, latent=latent)
    graph.set(graph.edit, store=node[0], positive=positive, negative=negative)
    graph.prompts[1:] = positive, negative
    return node, latent


def equals_a_loop(host, graph, fuse: bool, **more) -> None:
    if fuse:
        graph.fuse()
    else:
        graph.set(graph.edit, preset="none")
    before = host.latents(graph.prompt, graph.edit[0])
    _, latent = guided(graph, **more)
    own, found = host.latents(graph.prompt, latent), host.latents(graph.prompt, graph.edit[0])
    expected = host.latents(graph.prompt, graph.loop(fuse, own.shape[2] - FRAMES, edited=latent)[0])
    assert found.shape == own.shape
    assert torch.equal(found[:, :, FRAMES:], own[:, :, FRAMES:])
    assert relative(found[:, :, :FRAMES], expected[:, :, :FRAMES]) < 1e-4
    assert relative(found[:, :, 1:FRAMES], before[:, :, 1:FRAMES]) > 2e-4
    if more.get("first", graph.first) == 1.0:
        assert torch.equal(found[:, :, :1], own[:, :, :1])


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("guides", "first", "first_of_edit"),
    [(ONE, None, None), (SEVERAL, None, None), (SMALL, None, None), (WEAK, None, None), (MASKED, None, None),
     ((), 1.0, None), ((), 0.7, None), ((), 1.0, 0.6), ((), None, 1.0), (ONE, 0.7, 1.0)],
    ids=["one", "several", "small", "weak", "masked", "first", "weak_first", "weaker_first", "edit_only", "both"],
)  # fmt: skip
def test_the_edit_is_that_of_a_loop_with_both_noise_masks(host, guides, first, first_of_edit, fuse):
    graph = GuidedGraph(guides=guides, first=first)
    equals_a_loop(host, graph, fuse, first=first if first_of_edit is None else first_of_edit)


def test_guides_of_another_strength(host):
    equals_a_loop(host, GuidedGraph(guides=ONE), fuse=False, strength=0.5)


@pytest.mark.parametrize(
    ("guides", "first", "first_of_edit"), [(SEVERAL, None, None), (WEAK, 0.7, 0.7), ((), 1.0, 0.6), ((), None, 1.0)]
)
def test_flow_edit_is_that_of_a_loop_with_both_noise_masks(host, guides, first, first_of_edit):
    """Its source has guidance too, with the negative prompt on the source's guides."""
    graph = GuidedGraph(guides=guides, first=first)
    drawn(graph)
    graph.set(graph.edit, preset="none")
    _, latent = guided(graph, first=first_of_edit)
    own, found = host.latents(graph.prompt, latent), host.latents(graph.prompt, graph.edit[0])
    loop = graph.loop(False, own.shape[2] - FRAMES, edited=latent, source_guidance=2.0)
    expected = host.latents(graph.prompt, loop[0])
    assert torch.equal(found[:, :, FRAMES:], own[:, :, FRAMES:])
    assert relative(found[:, :, 1:FRAMES], expected[:, :, 1:FRAMES]) < 1e-4
    first_expected = own if first_of_edit == 1.0 else expected
    assert relative(found[:, :, :1], first_expected[:, :, :1]) < 1e-4


def test_the_sources_guidance_has_the_places_of_its_guides(host):
    graph = GuidedGraph(guides=ONE)
    drawn(graph)
    graph.set(graph.edit, preset="none")
    negative, graph.guides = graph.prompts[2], ((16, 1, {}),)
    _, latent = guided(graph)
    loop = graph.loop(False, 1, edited=latent, source_guidance=2.0, source_negative=negative)
    found, expected = (host.latents(graph.prompt, one)[:, :, :FRAMES] for one in (graph.edit[0], loop[0]))
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("flow_edit", [False, True])
@pytest.mark.parametrize(("guides", "first"), [(SEVERAL, None), (SMALL, 0.7), ((), 1.0)])
def test_the_same_guides_change_nothing(host, guides, first, flow_edit):
    graph = GuidedGraph(guides=guides, first=first, sound=5)
    if flow_edit:
        drawn(graph)
    before = video_and_sound(host, graph, graph.edit[0])
    guided(graph, seed=0)
    for ours, theirs in zip(video_and_sound(host, graph, graph.edit[0]), before, strict=True):
        assert torch.equal(ours, theirs)


def drawn(graph: GuidedGraph, **more) -> None:
    """FlowEdit in place of the inversion."""
    latent = graph.prompt[graph.invert.id]["inputs"]["latent"]
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.prompts[0], latent=latent, steps=STEPS,
        source_guidance=2.0, draws=1, seed=3, **more,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0])


@pytest.mark.parametrize("preset", ["none", "style"])
@pytest.mark.parametrize(("guides", "first"), [(SEVERAL, None), ((), 1.0)])
def test_flow_edit_with_sound(host, guides, first, preset):
    graph = GuidedGraph(guides=guides, first=first, sound=5)
    drawn(graph)
    graph.set(graph.edit, preset=preset)
    before, sound = video_and_sound(host, graph, graph.edit[0])
    _, latent = guided(graph)
    own = host.latents(graph.prompt, latent)
    found = video_and_sound(host, graph, graph.edit[0])
    assert torch.equal(found[0][:, :, FRAMES:], own[:, :, FRAMES:])
    assert relative(found[0][:, :, 1:FRAMES], before[:, :, 1:FRAMES]) > 2e-4
    assert torch.equal(found[1], sound)
    if first == 1.0:
        assert torch.equal(found[0][:, :, :1], own[:, :, :1])


@pytest.mark.parametrize("flow_edit", [False, True])
@pytest.mark.parametrize(
    ("guides", "first", "first_of_edit"), [(SEVERAL, None, None), (WEAK, 1.0, 1.0), ((), None, 1.0)]
)
def test_the_hosts_samplers(host, guides, first, first_of_edit, flow_edit):
    graph = GuidedGraph(guides=guides, first=first)
    latent = graph.invert[0]
    if flow_edit:
        latent = graph.prompt[graph.invert.id]["inputs"]["latent"]
        drawn(graph)
    guided(graph, first=first_of_edit)
    guider = graph.add("FateZeroEditGuider", **graph.prompt[graph.edit.id]["inputs"])
    own = host.latents(graph.prompt, graph.edit[0])
    sigmas, noise = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS), graph.add("DisableNoise")
    for sampler in (graph.add("KSamplerSelect", sampler_name="euler"), graph.add("FateZeroDDIM")):
        done = graph.add(
            "SamplerCustomAdvanced", noise=noise[0], guider=guider[0], sigmas=sigmas[0], sampler=sampler[0],
            latent_image=latent,
        )  # fmt: skip
        assert relative(host.latents(graph.prompt, done[0]), own) < 1e-5


@pytest.mark.parametrize("kind", ["OtherSeparateCalls", "OtherLowVram"])
def test_branches_in_other_calls(host, kind):
    graph = GuidedGraph(sound=5, guides=SMALL, first=0.8)
    guided(graph)
    plain = video_and_sound(host, graph, graph.edit[0])
    graph.both(graph.add(kind, model=graph.model[0])[0])
    for ours, theirs in zip(video_and_sound(host, graph, graph.edit[0]), plain, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_the_mask_of_an_edit_has_its_clean_frames(host):
    """Outside an edit mask the clip stays, except for the edited first frame."""
    graph = GuidedGraph(guides=(), first=1.0)
    whole = graph.add("SolidMask", value=1.0, width=128, height=64)
    none = graph.add("SolidMask", value=0.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=whole[0], source=none[0], x=0, y=0, operation="multiply")
    graph.set(graph.edit, preset="shape+", mask=mask[0])
    _, latent = guided(graph)
    own, source = (host.latents(graph.prompt, one) for one in (latent, graph.guided))
    found = host.latents(graph.prompt, graph.edit[0])
    assert torch.equal(found[:, :, :1], own[:, :, :1])
    assert relative(found[:, :, 1:, :, :2], source[:, :, 1:, :, :2]) < 1e-5
    assert relative(found[:, :, 1:, :, 2:], source[:, :, 1:, :, 2:]) > 1e-3


def test_the_report_names_the_guides_and_the_check_keeps_the_clips(host):
    graph = GuidedGraph(guides=(), first=1.0)
    graph.add("SaveLatent", samples=graph.edit[0], filename_prefix="latents/report")
    assert "guides of the inverted latent" in host.text(host.run(graph.prompt), graph.edit.id)
    node, _ = guided(graph)
    check = {"model": graph.model[0], "vae": graph.vae, "images": graph.picture(25)[0]}
    checks = [graph.add("FateZeroReconstructionCheck", store=one, **check) for one in (node[0], graph.invert[1])]
    for one in checks:
        graph.add("PreviewImage", images=one[0])
    run = host.run(graph.prompt)
    assert host.text(run, checks[0].id) == host.text(run, checks[1].id)
    assert "guides of its own" in host.text(run, graph.edit.id)


def longer(graph: GuidedGraph) -> None:
    graph.guides = ((8, 17, {}),)


def smaller(graph: GuidedGraph) -> None:
    graph.guides = ((0, 17, {"iclora_parameters": 2}),)


def without(graph: GuidedGraph) -> None:
    graph.guides = ()


@pytest.mark.parametrize("guides", [(), ONE])
def test_a_noise_mask_inside_frames_is_refused(host, guides):
    graph = GuidedGraph(guides=guides, first=1.0)
    node, latent = guided(graph)
    mask = graph.add("SolidMask", value=0.5, width=64, height=64)
    masked = graph.add("SetLatentNoiseMask", samples=latent, mask=mask[0])
    graph.set(node, latent=masked[0])
    with pytest.raises(NodeError, match="latent: its noise mask has several values in a frame.*mask to Edit Video"):
        host.latents(graph.prompt, graph.edit[0])


@pytest.mark.parametrize(
    ("guides", "change", "error"),
    [
        (ONE, longer, "latent: has 6 latent frames of 4x2, but the inverted one has 5 of 4x2"),
        (((0, 17, {}),), smaller, "latent: its guides have another grid"),
        (ONE, without, "latent: .*guide tokens with their noise mask"),
        ((), without, "latent: has neither guides nor clean frames"),
    ],
)
def test_what_is_refused(host, guides, change, error):
    graph = GuidedGraph(guides=guides)
    change(graph)
    guided(graph)
    with pytest.raises(NodeError, match=error):
        host.latents(graph.prompt, graph.edit[0])
