"""FlowEdit and masks on any flow model, without control of its attention."""

from dataclasses import dataclass

import pytest
import torch
from comfyui.graph import Graph
from comfyui.host import Host, NodeError

from small import relative

KINDS = (
    "cosmos", "cosmos_1", "h3", "ltxav", "qwen", "z_image", "flux", "sd3", "hunyuan", "wan", "wan_i2v", "wan_vace",
    "wan_animate",
)  # fmt: skip
WITH_SOUND = ("h3", "ltxav")
STEPS, GUIDANCE, SEED = 4, 3.0, 5


@dataclass
class FlowGraph(Graph):
    """FlowEdit of random latents with a small random model."""

    kind: str = "flux"

    def __post_init__(self) -> None:
        self.model = self.add("FlowModel", kind=self.kind)
        self.latent = self.add("FlowLatent", kind=self.kind, seed=1)
        self.source, self.target, self.negative = (self.add("FlowText", kind=self.kind, seed=s) for s in (10, 20, 30))
        self.store = self.add(
            "FateZeroFlowEdit", model=self.model[0], source=self.source[0], latent=self.latent[0], steps=STEPS,
            source_guidance=2.0, draws=1, seed=SEED, sound="edit",
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.target[0], negative=self.negative[0],
            store=self.store[0], guidance=GUIDANCE, preset="flow_edit", strength=1.0,
        )  # fmt: skip


def streams(host: Host, graph: Graph, link) -> list[torch.Tensor]:
    """The streams of a latent: video, and sound if any."""
    count = 2 if graph.kind in WITH_SOUND else 1
    return [host.latents(graph.prompt, graph.add("FlowStream", latent=link, number=i)[0]) for i in range(count)]


def left_kept(graph):
    """A mask that preserves the left half."""
    half = graph.add("SolidMask", value=1.0, width=32, height=32)
    none = graph.add("SolidMask", value=0.0, width=16, height=32)
    return graph.add("MaskComposite", destination=half[0], source=none[0], x=0, y=0, operation="multiply")[0]


@pytest.fixture(params=KINDS)
def graph(host, request) -> FlowGraph:
    return FlowGraph(kind=request.param)


def by_loop(graph, strength=1.0):
    """FlowEdit's equations with the host's own guider."""
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    model = graph.prompt[graph.edit.id]["inputs"]["model"]
    return graph.add(
        "FlowLoop", model=model, source=graph.source[0], positive=graph.target[0], negative=graph.negative[0],
        latent=graph.latent[0], sigmas=sigmas[0], guidance=GUIDANCE, source_guidance=2.0,
        first=round(STEPS * (1 - strength)), seed=SEED,
    )  # fmt: skip


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_edit_equals_the_papers_loop_with_the_hosts_guider(host, graph, strength):
    loop = by_loop(graph, strength)
    graph.set(graph.edit, strength=strength)
    given = streams(host, graph, graph.latent[0])
    for ours, theirs, before in zip(
        streams(host, graph, graph.edit[0]), streams(host, graph, loop[0]), given, strict=True
    ):
        assert relative(ours, theirs) < 1e-4, "up to rounding, which random weights amplify"
        assert relative(ours, before) > 1e-2


def test_equal_prompts_return_the_clip(host, graph):
    graph.set(graph.edit, positive=graph.source[0], guidance=1.0)
    graph.set(graph.store, source_guidance=1.0)
    for ours, before in zip(streams(host, graph, graph.edit[0]), streams(host, graph, graph.latent[0]), strict=True):
        assert relative(ours, before) < 1e-5, relative(ours, before)


@pytest.mark.parametrize("kind", ["qwen", "wan"])
def test_the_sources_guidance_is_of_its_own_model(host, kind):
    """With one text for all prompts it changes nothing, also where the edit's MODEL has other weights."""
    graph = FlowGraph(kind=kind)
    other = graph.add("FlowModel", kind=kind, seed=1)
    merged = graph.add("ModelMergeSimple", model1=graph.model[0], model2=other[0], ratio=0.5)
    graph.set(graph.edit, model=merged[0], positive=graph.source[0], negative=graph.source[0])
    before, found = host.latents(graph.prompt, graph.latent[0]), []
    for scale in (1.0, 4.0):
        graph.set(graph.store, source_guidance=scale)
        found.append(host.latents(graph.prompt, graph.edit[0]))
    assert relative(found[0], before) > 1e-2
    assert relative(found[1], found[0]) < 1e-5


def test_an_empty_mask_returns_the_clip_bit_for_bit(host, graph):
    mask = graph.add("SolidMask", value=0.0, width=32, height=32)
    graph.set(graph.edit, mask=mask[0])
    graph.set(graph.store, sound="keep")
    for ours, before in zip(streams(host, graph, graph.edit[0]), streams(host, graph, graph.latent[0]), strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("preset", ["attribute+", "pnp", "kv_edit"])
def test_methods_that_need_attention_are_refused_by_name(host, preset):
    graph = FlowGraph(kind="qwen")
    graph.set(graph.edit, preset=preset)
    with pytest.raises(NodeError, match=f"{preset}.* needs control of the attention.*QwenImage.*FlowEdit"):
        host.latents(graph.prompt, graph.edit[0])


@pytest.mark.parametrize("kind", ["flux", "z_image"])
def test_areas_are_honoured_on_each_prompt(host, kind):
    graph = FlowGraph(kind=kind)
    full = host.latents(graph.prompt, graph.edit[0])
    for name, seed in (("source", 40), ("target", 50), ("negative", 60)):
        text = graph.add("FlowText", kind=kind, seed=seed)
        half = graph.add(
            "ConditioningSetAreaPercentage", conditioning=text[0], width=0.5, height=1.0, x=0.5, y=0.0, strength=1.0
        )
        whole = getattr(graph, name)
        setattr(graph, name, graph.add("ConditioningCombine", conditioning_1=whole[0], conditioning_2=half[0]))
    graph.set(graph.store, source=graph.source[0])
    graph.set(graph.edit, positive=graph.target[0], negative=graph.negative[0])
    found = host.latents(graph.prompt, graph.edit[0])
    assert relative(found, host.latents(graph.prompt, by_loop(graph)[0])) < 1e-4
    assert relative(found, full) > 1e-2


@pytest.mark.parametrize("kind", ["wan", "wan_i2v", "hunyuan"])
def test_the_hosts_context_windows_are_used(host, kind):
    graph = FlowGraph(kind=kind)
    single = host.latents(graph.prompt, graph.edit[0])
    windows = graph.add(
        "ContextWindowsManual", model=graph.model[0], context_length=2, context_overlap=1,
        context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2,
        freenoise=False,
    )  # fmt: skip
    for node in (graph.store, graph.edit):
        graph.set(node, model=windows[0])
    found = host.latents(graph.prompt, graph.edit[0])
    assert relative(found, host.latents(graph.prompt, by_loop(graph)[0])) < 1e-4
    assert relative(found, single) > 1e-3
    graph.set(graph.edit, chunk_frames=2)
    if kind == "hunyuan":
        with pytest.raises(NodeError, match="chunk_frames: has no effect.*Context Windows"):
            host.latents(graph.prompt, graph.edit[0])
    else:
        assert relative(host.latents(graph.prompt, graph.edit[0]), single) > 1e-3, "windows of ours"


def test_a_pair_shares_the_steps(host):
    """Wan 2.2's image-to-video pair: below the boundary the low-noise model is called."""
    graph = FlowGraph(kind="wan_i2v")
    single = host.latents(graph.prompt, graph.edit[0])
    other = graph.add("FlowModel", kind="wan_i2v", seed=1)
    edits = {}
    for boundary in (0.0, 0.9):
        pair = graph.add("FateZeroWanPair", model=graph.model[0], low_noise=other[0], boundary=boundary)
        graph.set(graph.store, model=pair[0])
        graph.set(graph.edit, model=pair[0])
        edits[boundary] = host.latents(graph.prompt, graph.edit[0])
    graph.set(graph.store, model=other[0])
    graph.set(graph.edit, model=other[0])
    low = host.latents(graph.prompt, graph.edit[0])
    assert relative(edits[0.0], single) < 1e-6
    assert relative(edits[0.9], single) > 1e-2 < relative(edits[0.9], low)
    first = graph.add("FateZeroWanPair", model=other[0], low_noise=graph.model[0], boundary=0.0)
    graph.set(graph.edit, model=first[0])
    assert relative(host.latents(graph.prompt, graph.edit[0]), low) < 1e-6
    with pytest.raises(NodeError, match="low_noise: WAN21 and Flux"):
        graph.set(first, low_noise=graph.add("FlowModel", kind="flux")[0])
        host.latents(graph.prompt, graph.edit[0])


@pytest.mark.parametrize("kind", ["h3", "qwen"])
def test_a_flow_mask_needs_no_attention_control(host, kind):
    graph = FlowGraph(kind=kind)
    settings = graph.add("FateZeroFlowMask", threshold=0.85, grow=0, still=0)
    graph.set(graph.store, sound="keep")
    graph.set(graph.edit, preset="custom", settings=settings[0])
    before, found = (streams(host, graph, link) for link in (graph.latent[0], graph.edit[0]))
    kept = found[0] == before[0]
    assert 0 < kept.float().mean() < 1
    assert torch.equal(kept[:, :1].expand_as(kept), kept), "the same mask in every channel"
    if kind in WITH_SOUND:
        assert torch.equal(found[1], before[1])
    graph.set(graph.edit, mask=left_kept(graph), mask_mode="intersection")
    both = streams(host, graph, graph.edit[0])[0] == before[0]
    assert both[..., : both.shape[-1] // 2].all() and (both | ~kept).all()
    maps = graph.add("FateZeroEditMaps", **graph.prompt[graph.edit.id]["inputs"])
    again = streams(host, graph, maps[0])[0] == before[0]
    assert torch.equal(again, both), "the same edit"
    mask = graph.add("SaveImage", images=graph.add("MaskToImage", mask=maps[5])[0], filename_prefix="mask")
    host.forget()  # texts of cached nodes are not sent again
    run = host.run(graph.prompt)
    assert "no heat maps" in host.text(run, maps.id)
    assert len(run.outputs[mask.id]["images"]) == both.shape[2]


@pytest.mark.parametrize("kind", ["h3", "qwen"])
def test_the_flow_mask_preview_equals_the_edits_mask(host, kind):
    """Given to the edit as a MASK, it preserves what preset flow_mask preserves."""
    graph = FlowGraph(kind=kind)
    graph.set(graph.store, sound="keep")
    height, width = host.latents(graph.prompt, graph.add("FlowStream", latent=graph.latent[0], number=0)[0]).shape[-2:]
    preview = graph.add(
        "FateZeroFlowMaskPreview", model=graph.model[0], positive=graph.target[0], store=graph.store[0], threshold=0.85,
        grow=0, still=0, width=8 * width, height=8 * height,
    )  # fmt: skip
    graph.set(graph.edit, preset="flow_edit", mask=preview[1])
    by_mask = streams(host, graph, graph.edit[0])
    settings = graph.add("FateZeroFlowMask", threshold=0.85, grow=0, still=0)
    inputs = graph.prompt[graph.edit.id]["inputs"]
    del inputs["mask"]
    graph.set(graph.edit, preset="custom", settings=settings[0])
    by_preset = streams(host, graph, graph.edit[0])
    before = streams(host, graph, graph.latent[0])
    assert 0 < (by_mask[0] == before[0]).float().mean() < 1
    for ours, theirs in zip(by_mask, by_preset, strict=True):
        assert relative(ours, theirs) < 1e-5
    pictures = graph.add("SaveImage", images=preview[0], filename_prefix="flow_mask")
    saved = host.run(graph.prompt).outputs[pictures.id]["images"]
    assert len(saved) == by_mask[0].shape[-3]


@pytest.mark.parametrize("kind", WITH_SOUND)
def test_sound_is_preserved_or_edited(host, kind):
    graph = FlowGraph(kind=kind)
    graph.set(graph.store, sound="keep")
    video, sound = streams(host, graph, graph.edit[0])
    before = streams(host, graph, graph.latent[0])
    assert relative(video, before[0]) > 1e-2
    assert torch.equal(sound, before[1])
    graph.set(graph.edit, mask=left_kept(graph))
    for choice in ("keep", "edit"):
        graph.set(graph.store, sound=choice)
        video, sound = streams(host, graph, graph.edit[0])
        middle = video.shape[-1] // 2
        assert torch.equal(video[..., :middle], before[0][..., :middle])
        assert relative(video[..., middle + 1 :], before[0][..., middle + 1 :]) > 1e-3
        assert torch.equal(sound, before[1]) == (choice == "keep")


# --- the host's samplers ----------------------------------------------------------------------


def by_guider(graph, sampler, sigmas=None):
    """FlowEdit by SamplerCustomAdvanced, from the clip."""
    values = {**graph.prompt[graph.edit.id]["inputs"]}
    guider = graph.add("FateZeroEditGuider", **values)
    sigmas = sigmas or graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)[0]
    quiet = graph.add("DisableNoise")
    return graph.add(
        "SamplerCustomAdvanced", noise=quiet[0], guider=guider[0], sampler=sampler[0], sigmas=sigmas,
        latent_image=graph.latent[0],
    )[0]  # fmt: skip


@pytest.mark.parametrize("kind", ["h3", "flux", "cosmos", "cosmos_1"])
@pytest.mark.parametrize(("masked", "n_min"), [(False, 0), (True, 0), (True, 1)])
def test_the_hosts_samplers_integrate_the_edit(host, kind, masked, n_min):
    graph = FlowGraph(kind=kind)
    graph.set(graph.store, n_min=n_min)
    graph.set(graph.edit, strength=0.75)
    if masked:
        graph.set(graph.edit, mask=left_kept(graph))
    expected = streams(host, graph, graph.edit[0])
    before = streams(host, graph, graph.latent[0])
    ours = graph.add("FateZeroDDIM")
    euler, multistep = (graph.add("KSamplerSelect", sampler_name=name) for name in ("euler", "dpmpp_2m"))
    for sampler, near in ((ours, 1e-6), (euler, 1e-5), (multistep, 0.5)):
        found = streams(host, graph, by_guider(graph, sampler))
        for mine, theirs, clip in zip(found, expected, before, strict=True):
            assert relative(mine - clip, theirs - clip) < near


@pytest.mark.parametrize(("scheduler", "steps", "shift"), [("beta", 6, None), ("sgm_uniform", 20, 1.0)])
def test_any_sigmas_can_be_used(host, scheduler, steps, shift):
    """Sigmas of another scheduler and number of steps, compared with the same loop."""
    graph = FlowGraph(kind="qwen")
    if shift is not None:
        graph.model = graph.add("ModelSamplingSD3", model=graph.model[0], shift=shift)
        graph.set(graph.store, model=graph.model[0], steps=steps)
        graph.set(graph.edit, model=graph.model[0])
    sigmas = graph.add("BasicScheduler", model=graph.model[0], scheduler=scheduler, steps=steps, denoise=1.0)[0]
    loop = graph.add(
        "FlowLoop", model=graph.model[0], source=graph.source[0], positive=graph.target[0], negative=graph.negative[0],
        latent=graph.latent[0], sigmas=sigmas, guidance=GUIDANCE, source_guidance=2.0, first=0, seed=SEED,
    )  # fmt: skip
    graph.set(graph.edit, strength=1.0)
    expected = host.latents(graph.prompt, loop[0])
    for sampler in (graph.add("FateZeroDDIM"), graph.add("KSamplerSelect", sampler_name="euler")):
        assert relative(host.latents(graph.prompt, by_guider(graph, sampler, sigmas)), expected) < 1e-5


@pytest.mark.parametrize("kind", ["qwen", "wan"])
def test_wan_edit_runs_on_any_flow_model(host, kind):
    """The first model's timesteps equal the sigmas; the second's are a thousand times as large."""
    graph = FlowGraph(kind=kind)
    graph.set(graph.store, variant="wan_edit")
    graph.set(graph.edit, preset="wan_edit")
    before, whole = host.latents(graph.prompt, graph.latent[0]), host.latents(graph.prompt, graph.edit[0])
    assert relative(whole, before) > 1e-2
    graph.set(graph.store, variant="paper")
    run = host.run({**graph.prompt, "end": {"class_type": "PreviewAny", "inputs": {"source": graph.edit[1]}}})
    assert "variant wan_edit of FlowEdit; this store has paper" in host.text(run, "end")
    assert relative(host.latents(graph.prompt, graph.edit[0]), whole) > 1e-4


def test_a_sampler_that_adds_noise_is_refused(host):
    graph = FlowGraph(kind="flux")
    sampler = graph.add("KSamplerSelect", sampler_name="euler_ancestral")
    with pytest.raises(NodeError, match="euler_ancestral.* adds noise"):
        host.latents(graph.prompt, by_guider(graph, sampler))


# --- clips of other lengths -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "frames", "latents"), [("h3", 1, 1), ("h3", 16, 7), ("h3", 24, 12), ("h3", 39, 12), ("ltxav", 10, 3)]
)
def test_no_frame_is_dropped_when_a_clip_is_encoded(host, kind, frames, latents):
    graph = FlowGraph(kind=kind)
    images = graph.add("EmptyImage", width=64, height=64, batch_size=frames, color=0)
    vae = graph.add("JointLoader", kind=kind)
    encoded = graph.add("FateZeroEncodeVideo", images=images[0], vae=vae[2], chunk_size=8)
    assert host.latents(graph.prompt, encoded[0]).shape[2] == latents


def test_a_mask_of_the_frames_before_they_were_completed(host):
    """24 frames of H3 are completed to 39, two blocks of 17 and 5; the second one begins with frame 17."""
    graph = FlowGraph(kind="h3")
    graph.set(graph.latent, frames=12)
    ones = graph.add("EmptyImage", width=32, height=32, batch_size=17, color=0xFFFFFF)
    zeros = graph.add("EmptyImage", width=32, height=32, batch_size=7, color=0)
    both = graph.add("ImageBatch", image1=ones[0], image2=zeros[0])
    graph.set(graph.edit, mask=graph.add("ImageToMask", image=both[0], channel="red")[0])
    (edited, _), (before, _) = (streams(host, graph, link) for link in (graph.edit[0], graph.latent[0]))
    changed = (edited != before).flatten(3).any(3).any(1)[0]
    assert changed.tolist() == [True] * 5 + [False] * 7
