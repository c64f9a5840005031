"""Attention control of LTX-2: both hosts agree, clips with sound, and other nodes in the host's chain."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from comfyui.graph import Graph, Node
from comfyui.host import NodeError
from flow_models import LTX23, write_ltx2
from safetensors.torch import save_file

from fatezero import PromptEdit, edit, invert
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.recipes.recipe import Recipe
from small import relative

SOURCE, TARGET, NEGATIVE = "a red fox by night", "the quick brown fox, by night", "dog"
STEPS, SHIFT, GUIDANCE = 4, 2.0, 5.0


@dataclass
class LTXGraph(Graph):
    """Random latents, inverted and edited."""

    sound: int = 5
    shape: str = "1,128,3,2,3"
    model: Node = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.make_model()
        self.latent = self.add("LTXLatent", seed=1, shape=self.shape, sound=self.sound)
        self.words = self.add(
            "FateZeroPromptEdit", clip=self.model[1], source=SOURCE, target=TARGET, mode="refine",
            blend_source="", blend_target="", reweight="",
        )  # fmt: skip
        self.negative = self.add("CLIPTextEncode", clip=self.model[1], text=NEGATIVE)
        self.invert = self.add(
            "FateZeroInvert", model=self.model[0], source=self.words[0], latent=self.latent[0], steps=STEPS,
            key_frames="self, middle", clip_norm=False, memory="auto", budget_gb=2.0,
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.words[1], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=GUIDANCE, preset="style",
        )  # fmt: skip

    def make_model(self) -> Node:
        return self.add("LTXModel")

    def both(self, model) -> None:
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)


def video_and_sound(host, graph, link) -> list[torch.Tensor]:
    return [host.latents(graph.prompt, graph.add("FlowStream", latent=link, number=i)[0]) for i in range(2)]


@pytest.fixture
def graph() -> LTXGraph:
    return LTXGraph()


# --- both hosts -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{}, LTX23], ids=["2", "2.3"])
def model(request, tmp_path_factory):
    """A pipeline of diffusers for a clip, with the embeddings of the prompts for the host."""
    folder = write_ltx2(tmp_path_factory.mktemp("ltx2"), **request.param)
    found = open_model(str(folder)).for_clip(ClipFacts((3, 8, 4, 6), 8.0))
    texts = {text: found.encode_prompt(text, 192, 128) for text in (SOURCE, TARGET, NEGATIVE)}
    both = {name: torch.cat([one.embeddings, one.extras["sound"]], -1).contiguous() for name, one in texts.items()}
    save_file(both, folder / "texts.safetensors")
    return found, texts, folder


class FolderGraph(LTXGraph):
    folder = ""

    def make_model(self) -> Node:
        return self.add("LTXFolder", folder=self.folder, shift=SHIFT)


@pytest.fixture
def of_folder(model) -> LTXGraph:
    FolderGraph.folder = str(model[2])
    return FolderGraph(sound=0, shape="1,8,3,4,6")


def host_schedule() -> FlowSchedule:
    """The host's "simple" sigmas."""
    u = torch.arange(1, 10001) / 10000
    table = math.exp(SHIFT) / (math.exp(SHIFT) + (1 / u - 1))
    sigmas = torch.stack([*(table[-(1 + int(i * 10000 / STEPS))] for i in range(STEPS)), torch.zeros(())])
    return FlowSchedule.of(tuple((1000 * sigmas[:-1].double()).tolist()), sigmas.flip(0))


def by_library(found, texts, injection, memory="recompute", order=1, frames=3, windows=None, **more):
    denoiser = type("Hosts", (type(found.denoiser),), {"schedule": lambda self, steps: host_schedule()})(found)
    latents = torch.randn(1, 8, frames, 4, 6, generator=torch.Generator().manual_seed(1))[0].transpose(0, 1)
    inversion = invert(denoiser, latents, texts[SOURCE], STEPS, memory=memory, order=order, windows=windows)
    pair = None if injection is None else PromptEdit(SOURCE, TARGET, found.tokenizer)
    done = edit(denoiser, inversion, texts[TARGET], texts[NEGATIVE], GUIDANCE, pair, injection, **more)
    return inversion.latents[-1], done


@pytest.mark.parametrize(
    ("preset", "memory", "order"),
    [("none", "recompute", 1), ("style", "recompute", 1), ("style+", "queries_keys", 1), ("attribute+", "auto", 2),
     ("shape+", "recompute", 1)],
)  # fmt: skip
def test_both_hosts_agree(host, model, of_folder, preset, memory, order):
    graph, (found, texts, _) = of_folder, model
    graph.set(graph.invert, memory=memory, order=order)
    graph.set(graph.edit, preset=preset)
    injection = None if preset == "none" else Recipe.of_preset(preset, SOURCE, TARGET).injection
    noise, ours = by_library(found, texts, injection, order=order)
    clip, inverted, theirs = (
        host.latents(graph.prompt, link)[0].transpose(0, 1)
        for link in (graph.latent[0], graph.invert[0], graph.edit[0])
    )
    assert relative(inverted, noise) < 1e-4
    assert relative(theirs, ours) < 1e-4
    assert relative(theirs, clip) > 1e-2


# --- clips with sound -------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["style", "attribute+", "shape+"])
def test_sound_is_kept_or_follows_the_edit(host, graph, preset):
    graph.set(graph.edit, preset=preset)
    before = video_and_sound(host, graph, graph.latent[0])
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) < 1e-6
    assert relative(video, before[0]) > 1e-2
    graph.set(graph.invert, sound="edit")
    other, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) > 1e-2
    assert relative(other, video) > 1e-4, "the sound acts on the video"
    graph.add("PreviewAny", source=graph.edit[1])
    host.forget()  # texts of cached nodes are not sent again
    assert "hooked 6 of 6 attention layers" in host.text(host.run(graph.prompt), graph.edit.id)


def left_kept(graph) -> list:
    """A mask that preserves the left third."""
    whole = graph.add("SolidMask", value=1.0, width=96, height=64)
    none = graph.add("SolidMask", value=0.0, width=32, height=64)
    return graph.add("MaskComposite", destination=whole[0], source=none[0], x=0, y=0, operation="multiply")[0]


@pytest.mark.parametrize("preset", ["shape", "shape+", "kv_edit"])
@pytest.mark.parametrize("mode", ["replace", "intersection"])
def test_an_edit_mask_limits_the_video(host, graph, preset, mode):
    if (preset, mode) in (("shape", "intersection"), ("kv_edit", "intersection")):
        pytest.skip("no mask to intersect with")
    graph.set(graph.edit, preset=preset, mask=left_kept(graph), mask_mode=mode)
    before = video_and_sound(host, graph, graph.latent[0])
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) < 1e-6
    assert (relative(video[..., :1], before[0][..., :1]) < 1e-5) == (preset != "shape"), "shape masks attention only"
    assert relative(video[..., 1:], before[0][..., 1:]) > 1e-3


def test_a_mask_of_the_latent_preserves_the_rest(host, graph):
    masked = graph.add("SetLatentNoiseMask", samples=graph.latent[0], mask=left_kept(graph))
    graph.set(graph.invert, latent=masked[0])
    before = video_and_sound(host, graph, graph.latent[0])
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) < 1e-6
    assert relative(video[..., :1], before[0][..., :1]) < 1e-5
    assert relative(video[..., 1:], before[0][..., 1:]) > 1e-3


@pytest.mark.parametrize("preset", ["none", "style"])
def test_flow_edit_from_the_clip(host, graph, preset):
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=1, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset=preset)
    before = video_and_sound(host, graph, graph.latent[0])
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert torch.equal(sound, before[1])
    assert relative(video, before[0]) > 1e-3
    graph.set(graph.words, target=SOURCE)
    graph.set(graph.edit, preset="none", guidance=2.0)
    assert relative(video_and_sound(host, graph, graph.edit[0])[0], before[0]) < 1e-5, "the same prompt"


def test_a_store_from_a_file(host, graph):
    direct = video_and_sound(host, graph, graph.edit[0])
    saved = graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="fatezero/ltx")
    host.forget()
    file = host.text(host.run(graph.prompt), saved.id).split(":")[0]
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    loaded = video_and_sound(host, graph, graph.edit[0])
    assert torch.equal(loaded[0], direct[0])
    assert relative(loaded[1], direct[1]) < 1e-6


def test_a_long_prompt(host, graph):
    """More tokens than the connectors have registers for: another number of text columns in each branch."""
    graph.set(graph.words, target=" ".join(["the quick brown fox"] * 60))
    video, _ = video_and_sound(host, graph, graph.edit[0])
    assert torch.isfinite(video).all()


def test_a_clip_without_sound_and_with_odd_frames(host):
    graph = LTXGraph(sound=0, shape="1,128,5,2,3")
    computed = host.latents(graph.prompt, graph.edit[0])
    for memory in ("queries_keys", "maps"):
        graph.set(graph.invert, memory=memory)
        assert relative(host.latents(graph.prompt, graph.edit[0]), computed) < 1e-5


# --- with other nodes in the chain ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["OtherAttention", "OtherSeparateCalls", "OtherLowVram"])
def test_other_packs_take_effect(host, graph, kind):
    plain = video_and_sound(host, graph, graph.edit[0])[0]
    scale = {"scale": 1.0} if kind == "OtherAttention" else {}
    other = graph.add(kind, model=graph.model[0], **scale)
    graph.both(other[0])
    assert relative(video_and_sound(host, graph, graph.edit[0])[0], plain) < 1e-5
    if kind == "OtherAttention":
        graph.set(other, scale=0.5)
        assert relative(video_and_sound(host, graph, graph.edit[0])[0], plain) > 1e-3


@pytest.mark.parametrize("preset", ["style", "shape+"])
def test_a_reference_sound_is_left_to_the_model(host, graph, preset):
    graph.set(graph.invert, sound="edit")
    graph.set(graph.edit, preset=preset)
    plain = video_and_sound(host, graph, graph.edit[0])
    of_source, of_target, other = (
        graph.add("LTXReference", conditioning=prompt, seed=seed)
        for prompt, seed in ((graph.words[0], 5), (graph.words[1], 5), (graph.negative[0], 5))
    )
    graph.set(graph.invert, source=of_source[0])
    graph.set(graph.edit, positive=of_target[0], negative=other[0])
    found = video_and_sound(host, graph, graph.edit[0])
    assert relative(found[1], plain[1]) > 1e-3
    separate = graph.add("OtherSeparateCalls", model=graph.model[0])
    graph.both(separate[0])
    for ours, theirs in zip(video_and_sound(host, graph, graph.edit[0]), found, strict=True):
        assert relative(ours, theirs) < 1e-5
    inverted = video_and_sound(host, graph, graph.invert[0])
    assert all(torch.isfinite(part).all() for part in inverted)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda graph: graph.set(graph.invert, memory="queries_keys"), "a clip with sound needs recompute"),
        (lambda graph: graph.set(graph.edit, preset="shape"), "preset: shape needs words.*mixes words"),
        (lambda graph: graph.set(graph.words, blend_source="fox"), "blend_source: 'fox'.*mixes words"),
        (lambda graph: graph.set(graph.words, reweight="quick=2"), "mixes words"),
        (lambda graph: graph.set(graph.edit, preset="pnp"), "Plug-and-Play needs a UNet"),
    ],
)
def test_what_is_refused(host, graph, change, error):
    change(graph)
    with pytest.raises(NodeError, match=error):
        host.latents(graph.prompt, graph.edit[0])


def test_the_hosts_samplers_need_a_sound_that_follows(host, graph):
    guider = graph.add(
        "FateZeroEditGuider", model=graph.model[0], positive=graph.words[1], negative=graph.negative[0],
        store=graph.invert[1], prompt_edit=graph.words[2], guidance=GUIDANCE, preset="style",
    )  # fmt: skip
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    done = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("DisableNoise")[0], guider=guider[0], sigmas=sigmas[0],
        sampler=graph.add("KSamplerSelect", sampler_name="euler")[0], latent_image=graph.invert[0],
    )  # fmt: skip
    with pytest.raises(NodeError, match="keeps the clip's sound"):
        video_and_sound(host, graph, done[0])
    graph.set(graph.invert, sound="edit")
    for ours, theirs in zip(
        video_and_sound(host, graph, graph.edit[0]), video_and_sound(host, graph, done[0]), strict=True
    ):
        assert relative(theirs, ours) < 1e-5


def test_edit_maps_have_masks_and_no_words(host, graph):
    graph.set(graph.edit, preset="shape+")
    maps = graph.add("FateZeroEditMaps", **graph.prompt[graph.edit.id]["inputs"])
    graph.add("PreviewAny", source=maps[6])
    host.forget()
    text = host.text(host.run(graph.prompt), maps.id)
    assert "no heat maps" in text
    masks = graph.add("SaveImage", images=graph.add("MaskToImage", mask=maps[4])[0], filename_prefix="mask")
    assert len(host.run(graph.prompt).outputs[masks.id]["images"]) == 3


SLG = {
    "double_layers": "1", "single_layers": "", "scale": 2.0, "start_percent": 0.0, "end_percent": 1.0,
    "rescaling_scale": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), [("SkipLayerGuidanceDiT", SLG), ("CFGZeroStar", {})])
def test_guidance_in_calls_of_its_own(host, graph, kind, settings):
    plain = video_and_sound(host, graph, graph.edit[0])[0]
    graph.set(graph.edit, model=graph.add(kind, model=graph.model[0], **settings)[0])
    found = video_and_sound(host, graph, graph.edit[0])[0]
    assert torch.isfinite(found).all()
    assert relative(found, plain) > 1e-5


def test_other_weights_on_the_edit_only_leave_the_source_as_it_is(host, graph):
    """The source then runs in calls of its own."""
    plain = video_and_sound(host, graph, graph.edit[0])[0]
    graph.set(graph.edit, model=graph.add("LTXModel", seed=1)[0])
    found, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(found, plain) > 1e-2
    assert relative(sound, video_and_sound(host, graph, graph.latent[0])[1]) < 1e-6


def test_the_sound_is_kept_at_any_strength(host, graph):
    before = video_and_sound(host, graph, graph.latent[0])
    graph.set(graph.edit, strength=0.5)
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert relative(sound, before[1]) < 1e-6
    assert relative(video, before[0]) > 1e-3


def test_flow_edit_keeps_the_sound_beside_a_mask_of_its_own(host, graph):
    """The sound that is kept is no mask of the video."""
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=1, seed=3, sound="keep",
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset="attribute+")
    before = video_and_sound(host, graph, graph.latent[0])
    video, sound = video_and_sound(host, graph, graph.edit[0])
    assert torch.equal(sound, before[1])
    graph.set(store, sound="edit")
    other, followed = video_and_sound(host, graph, graph.edit[0])
    assert not torch.equal(followed, before[1])
    assert torch.equal(video == before[0], other == before[0]), "the same mask"
    graph.set(graph.edit, preset="kv_edit")
    graph.set(store, sound="keep")
    with pytest.raises(NodeError, match="KV-Edit needs an edit mask"):
        host.latents(graph.prompt, graph.edit[0])


@pytest.mark.parametrize("adaln", [False, True])
def test_other_kinds_of_blocks_and_precisions(host, graph, adaln):
    graph.set(graph.model, adaln=adaln)
    single = video_and_sound(host, graph, graph.edit[0])
    graph.set(graph.model, dtype="bfloat16")
    half = video_and_sound(host, graph, graph.edit[0])
    assert 1e-5 < relative(half[0], single[0]) < 0.2
    assert relative(half[1], single[1]) < 1e-6, "the kept sound"
