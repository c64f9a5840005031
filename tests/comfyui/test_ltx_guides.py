"""Attention control of LTX-2 with guides, keyframes and clean frames, by the host's own nodes."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from comfyui.graph import Node
from comfyui.host import NodeError
from comfyui.test_ltx import (
    GUIDANCE,
    NEGATIVE,
    SHIFT,
    SOURCE,
    STEPS,
    TARGET,
    LTXGraph,
    by_library,
    video_and_sound,
)  # fmt: skip
from flow_models import LTX23, write_ltx2
from safetensors.torch import load_file, save_file

from fatezero.attention.condition import FIRST
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.recipes.recipe import Recipe
from small import relative

GRID = 2, 4


@dataclass
class GuidedGraph(LTXGraph):
    """A clip with a guide for each entry of `guides`: the frame at which it begins, its frames and inputs."""

    sound: int = 0
    shape: str = "1,128,4,2,4"
    guides: tuple = ((8, 1, {}),)
    first: float | None = None
    guided: list = field(init=False)
    unguided: list = field(init=False)
    vae: list = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.vae = self.add("LTXLoader", kind="ltxav")[2]
        latent, prompts = self.latent[0], [self.words[0], self.words[1], self.negative[0]]
        if self.sound:
            audio = self.add("FlowStream", latent=latent, number=1)
            latent = self.add("FlowStream", latent=latent, number=0)[0]
        self.unguided = latent
        latent, prompts = self.with_guides(prompts)
        self.guided, self.prompts = latent, prompts
        if self.sound:
            latent = self.add("LTXVConcatAVLatent", video_latent=latent, audio_latent=audio[0])[0]
        self.set(self.invert, source=prompts[0], latent=latent)
        self.set(self.edit, positive=prompts[1], negative=prompts[2])

    def with_guides(self, prompts, seed: int = 0, first: float | None = None, strength: float = 1.0):
        """The clip's LATENT and its prompts, with the guides and the clean frame. seed: of the pictures."""
        latent, first = self.unguided, self.first if first is None else first
        if first is not None:
            picture = self.picture(1, seed)
            latent = self.add(
                "LTXVImgToVideoInplace", vae=self.vae, image=picture[0], latent=latent, strength=first, bypass=False
            )[0]
        for start, frames, more in self.guides:
            more = {name: self.of(name, value) for name, value in more.items()}
            image = self.picture(frames, seed)
            pairs = [(prompts[0], prompts[2]), (prompts[1], prompts[2])]
            added = [
                self.add(
                    "LTXVAddGuide", positive=one, negative=other, vae=self.vae, latent=latent, image=image[0],
                    frame_idx=start, **{"strength": strength, **more},
                )
                for one, other in pairs
            ]  # fmt: skip
            latent, prompts = added[0][2], [added[0][0], added[1][0], added[1][1]]
        return latent, prompts

    def picture(self, frames: int, seed: int = 0) -> Node:
        plain = self.add("EmptyImage", width=128, height=64, batch_size=frames, color=0x3070B0)
        return self.add("ImageAddNoise", image=plain[0], seed=frames + seed, strength=1.0)

    def of(self, name, value):
        if name == "iclora_parameters":
            return self.add("LTXSmallGuides", factor=value)[0]
        return self.add("SolidMask", value=value, width=128, height=64)[0] if name == "attention_mask" else value

    def fuse(self) -> None:
        """Fuse self-attention in all steps, and nothing else."""
        fusion = self.add(
            "FateZeroFusion", cross_replace_steps=0.0, self_replace_steps=1.0, blend_self_attention=False,
            blend_latents=False, blend_threshold=0.3, max_tokens=0, mask_tokens=256, mask_from="attention",
            blend_latents_until=0.8, separate_words=0.0,
        )  # fmt: skip
        self.set(self.edit, preset="custom", settings=fusion[0])

    def loop(self, fuse: bool, guides: int, **more) -> Node:
        return self.add(
            "LTXLoop", model=self.model[0], source=self.prompts[0], positive=self.prompts[1], negative=self.prompts[2],
            latent=self.guided, sigmas=self.add("FateZeroSigmas", model=self.model[0], steps=STEPS)[0],
            guidance=GUIDANCE, guides=guides, fuse=fuse, **more,
        )  # fmt: skip


ONE = ((8, 1, {}),)
SEVERAL = ((0, 1, {}), (-1, 1, {}), (8, 9, {}))
SMALL = ((0, 17, {"iclora_parameters": 2}),)
WEAK = ((8, 1, {"strength": 0.6}),)
MASKED = ((8, 1, {"strength": 0.8, "attention_mask": 0.5}), (16, 1, {}))
STRONG = ((0, 9, {"strength": 1.5}),)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(
    ("guides", "count", "first"),
    [(ONE, 1, None), (SEVERAL, 3, None), (SMALL, 3, None), (WEAK, 1, None), (MASKED, 2, None), (STRONG, 2, None),
     ((), 0, 1.0), ((), 0, 0.7), (ONE, 1, 0.7)],
    ids=["one", "several", "small", "weak", "masked", "strong", "first", "weak_first", "both"],
)  # fmt: skip
def test_the_edit_is_that_of_a_loop_with_the_hosts_noise_mask(host, guides, count, first, fuse):
    graph = GuidedGraph(guides=guides, first=first)
    if fuse:
        graph.fuse()
    else:
        graph.set(graph.edit, preset="none")
    given, found = host.latents(graph.prompt, graph.guided), host.latents(graph.prompt, graph.edit[0])
    expected = host.latents(graph.prompt, graph.loop(fuse, count)[0])
    assert found.shape == given.shape
    frames = given.shape[2] - count
    assert torch.equal(found[:, :, frames:], given[:, :, frames:])
    assert relative(found[:, :, :frames], expected[:, :, :frames]) < 1e-4
    assert relative(found[:, :, :frames], given[:, :, :frames]) > 1e-2
    if first == 1.0:
        assert torch.equal(found[:, :, :1], given[:, :, :1])


def cropped(graph: GuidedGraph, link: list) -> list:
    """LTXV Crop Guides on the result."""
    return graph.add("LTXVCropGuides", positive=graph.prompts[1], negative=graph.prompts[2], latent=link)[2]


@pytest.mark.parametrize("preset", ["style", "attribute+", "shape+"])
@pytest.mark.parametrize("guides", [SEVERAL, SMALL, MASKED], ids=["several", "small", "masked"])
def test_the_whole_chain_with_sound(host, guides, preset):
    graph = GuidedGraph(sound=5, guides=guides)
    graph.set(graph.edit, preset=preset)
    before = video_and_sound(host, graph, graph.latent[0])
    edited = graph.add("LTXVSeparateAVLatent", av_latent=graph.edit[0])
    video = host.latents(graph.prompt, cropped(graph, edited[0]))
    assert video.shape == before[0].shape
    assert relative(video, before[0]) > 1e-2
    sound = host.latents(graph.prompt, edited[1])
    assert relative(sound, before[1]) < 1e-6
    graph.set(graph.invert, sound="edit")
    assert relative(host.latents(graph.prompt, edited[1]), before[1]) > 1e-2
    plain = LTXGraph(sound=5, shape=graph.shape)
    plain.set(plain.edit, preset=preset)
    assert relative(video_and_sound(host, plain, plain.edit[0])[0], video) > 1e-3, "guides have an effect"


@pytest.mark.parametrize("kind", ["OtherSeparateCalls", "OtherLowVram", "OtherAttention"])
@pytest.mark.parametrize("guides", [SEVERAL, SMALL, MASKED], ids=["several", "small", "masked"])
def test_branches_in_other_calls(host, kind, guides):
    graph = GuidedGraph(sound=5, guides=guides, first=0.8)
    plain = video_and_sound(host, graph, graph.edit[0])
    graph.both(graph.add(kind, model=graph.model[0], **({"scale": 1.0} if kind == "OtherAttention" else {}))[0])
    for ours, theirs in zip(video_and_sound(host, graph, graph.edit[0]), plain, strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("preset", ["none", "style"])
@pytest.mark.parametrize(("guides", "first"), [(SEVERAL, None), (SMALL, None), (WEAK, None), ((), 0.7), (ONE, 1.0)])
def test_flow_edit(host, guides, first, preset):
    graph = GuidedGraph(sound=5, guides=guides, first=first)
    given = host.latents(graph.prompt, graph.guided)
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.prompts[0],
        latent=graph.prompt[graph.invert.id]["inputs"]["latent"], steps=STEPS, source_guidance=2.0, draws=1, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset=preset)
    frames = 4
    video = video_and_sound(host, graph, graph.edit[0])[0]
    assert torch.equal(video[:, :, frames:], given[:, :, frames:])
    assert relative(video[:, :, :frames], given[:, :, :frames]) > 1e-3
    if first == 1.0:
        assert torch.equal(video[:, :, :1], given[:, :, :1])
    graph.set(graph.words, target=graph.prompt[graph.words.id]["inputs"]["source"])
    graph.set(graph.edit, preset="none", guidance=2.0)
    assert relative(video_and_sound(host, graph, graph.edit[0])[0], given) < 1e-5, "the same prompt"


@pytest.mark.parametrize(("guides", "first"), [(SEVERAL, None), (SMALL, None), (ONE, 1.0)])
def test_more_steps_replay_the_source_better(host, guides, first):
    graph = GuidedGraph(guides=guides, first=first)
    given = host.latents(graph.prompt, graph.guided)
    graph.set(graph.words, target=graph.prompt[graph.words.id]["inputs"]["source"])
    graph.set(graph.edit, guidance=1.0)
    errors = []
    for steps in (4, 32):
        graph.set(graph.invert, steps=steps)
        errors.append(relative(host.latents(graph.prompt, graph.edit[0]), given))
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.parametrize(("guides", "first"), [(SEVERAL, None), (SMALL, None), (WEAK, 0.7)])
@pytest.mark.parametrize("flow_edit", [False, True])
def test_the_hosts_samplers(host, guides, first, flow_edit):
    graph = GuidedGraph(sound=5, guides=guides, first=first)
    latent = graph.prompt[graph.invert.id]["inputs"]["latent"]
    if flow_edit:
        store = graph.add(
            "FateZeroFlowEdit", model=graph.model[0], source=graph.prompts[0], latent=latent, steps=STEPS,
            source_guidance=2.0, draws=1, seed=3, sound="edit",
        )[0]  # fmt: skip
        graph.set(graph.edit, store=store)
    else:
        graph.set(graph.invert, sound="edit")
        latent, store = graph.invert[0], graph.invert[1]
    guider = graph.add(
        "FateZeroEditGuider", model=graph.model[0], positive=graph.prompts[1], negative=graph.prompts[2],
        store=store, prompt_edit=graph.words[2], guidance=GUIDANCE, preset="style",
    )  # fmt: skip
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    done = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("DisableNoise")[0], guider=guider[0], sigmas=sigmas[0],
        sampler=graph.add("KSamplerSelect", sampler_name="euler")[0], latent_image=latent,
    )  # fmt: skip
    own = video_and_sound(host, graph, graph.edit[0])
    for ours, theirs in zip(own, video_and_sound(host, graph, done[0]), strict=True):
        assert relative(theirs, ours) < 1e-5


def test_the_inversion_guider(host):
    graph = GuidedGraph(guides=SEVERAL, first=0.9)
    invert = graph.prompt[graph.invert.id]["inputs"]
    settings = {name: invert[name] for name in ("model", "source", "key_frames", "clip_norm", "memory", "budget_gb")}
    guider, sampler = graph.add("FateZeroInvertGuider", **settings), graph.add("FateZeroDDIM")
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    noise = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("DisableNoise")[0], guider=guider[0], sampler=sampler[0],
        sigmas=graph.add("FlipSigmas", sigmas=sigmas[0])[0], latent_image=graph.guided,
    )  # fmt: skip
    expected, inverted = host.latents(graph.prompt, graph.edit[0]), host.latents(graph.prompt, graph.invert[0])
    assert torch.equal(host.latents(graph.prompt, noise[0]), inverted)
    store = graph.add("FateZeroStoreOfInversion", noise=noise[0])
    guider = graph.add(
        "FateZeroEditGuider", **{**graph.prompt[graph.edit.id]["inputs"], "store": store[0]},
    )  # fmt: skip
    done = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("DisableNoise")[0], guider=guider[0], sampler=sampler[0],
        sigmas=sigmas[0], latent_image=noise[0],
    )  # fmt: skip
    assert relative(host.latents(graph.prompt, done[0]), expected) < 1e-6


@pytest.mark.parametrize("preset", ["shape", "shape+", "kv_edit"])
def test_an_edit_mask_is_one_of_the_clip(host, preset):
    graph = GuidedGraph(sound=5, guides=SEVERAL)
    before = host.latents(graph.prompt, graph.guided)
    whole = graph.add("SolidMask", value=1.0, width=128, height=64)
    none = graph.add("SolidMask", value=0.0, width=64, height=64)
    mask = graph.add("MaskComposite", destination=whole[0], source=none[0], x=0, y=0, operation="multiply")
    graph.set(graph.edit, preset=preset, mask=mask[0])
    video = video_and_sound(host, graph, graph.edit[0])[0]
    assert video.shape == before.shape
    assert (relative(video[:, :, :4, :, :2], before[:, :, :4, :, :2]) < 1e-5) == (preset != "shape")
    assert relative(video[:, :, :4, :, 2:], before[:, :, :4, :, 2:]) > 1e-3
    assert torch.equal(video[:, :, 4:], before[:, :, 4:])
    changed = graph.add("SaveImage", images=graph.add("MaskToImage", mask=graph.edit[2])[0], filename_prefix="mask")
    assert len(host.run(graph.prompt).outputs[changed.id]["images"]) == 25, "the frames of the clip"


def test_the_store_in_half_precision_and_queries_kept(host):
    graph = GuidedGraph(guides=SEVERAL, shape="1,128,5,2,4")
    plain = host.latents(graph.prompt, graph.edit[0])
    graph.set(graph.invert, memory="queries_keys")
    assert relative(host.latents(graph.prompt, graph.edit[0]), plain) < 1e-5
    graph.set(graph.model, dtype="bfloat16")
    assert 1e-5 < relative(host.latents(graph.prompt, graph.edit[0]), plain) < 0.2


def test_other_weights_on_the_edit_only(host):
    """The source then runs in calls of its own."""
    graph = GuidedGraph(sound=5, guides=SEVERAL)
    plain = video_and_sound(host, graph, graph.edit[0])[0]
    graph.set(graph.edit, model=graph.add("LTXModel", seed=1)[0])
    found = video_and_sound(host, graph, graph.edit[0])[0]
    assert relative(found[:, :, :4], plain[:, :, :4]) > 1e-2
    assert torch.equal(found[:, :, 4:], plain[:, :, 4:])


def without_guides(graph) -> None:
    graph.set(graph.edit, positive=graph.words[1])


def negative_without_guides(graph) -> None:
    graph.set(graph.edit, negative=graph.negative[0])


def latent_without_guides(graph) -> None:
    graph.set(graph.invert, latent=graph.latent[0])


def source_without_guides(graph) -> None:
    graph.set(graph.invert, source=graph.words[0])


def differential(graph) -> None:
    graph.both(graph.add("DifferentialDiffusion", model=graph.model[0])[0])


def saved(graph) -> None:
    graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="fatezero/guides")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (without_guides, "positive: places 0 guide tokens"),
        (negative_without_guides, "negative: places 0 guide tokens"),
        (latent_without_guides, "latent: .*guide tokens with their noise mask"),
        (source_without_guides, "positive: places 8 guide tokens, but the inversion has 0"),
        (differential, "Differential Diffusion"),
        (saved, "cannot contain the latent's guides"),
        (lambda graph: graph.set(graph.invert, memory="maps"), "maps cannot include"),
    ],
)
def test_what_is_refused(host, change, error):
    graph = GuidedGraph(guides=ONE)
    change(graph)
    with pytest.raises(NodeError, match=error):
        host.latents(graph.prompt, graph.edit[0])


def test_several_edits_of_one_pass(host):
    graph = GuidedGraph(guides=SEVERAL, first=0.8)
    targets, alone = ["the lazy dog, by night", "the brown fox"], []
    for target in targets:
        graph.set(graph.words, target=target)
        alone.append(host.latents(graph.prompt, graph.edit[0]))
    graph.set(graph.words, target=graph.add("OtherLines", text="\n".join(targets))[0])
    saved = graph.add("SaveLatent", samples=graph.edit[0], filename_prefix="latents/several")
    files = host.run(graph.prompt).outputs[saved.id]["latents"]
    assert len(files) == 2
    for file, expected in zip(files, alone, strict=True):
        found = load_file(host.base / file["type"] / file["subfolder"] / file["filename"])["latent_tensor"]
        assert relative(found, expected) < 1e-5


# --- both hosts -------------------------------------------------------------------------------


@dataclass
class FolderGuides(LTXGraph):
    """The model of a folder of diffusers', with the latents of its conditioning frames by the host's own means."""

    sound: int = 0
    shape: str = "1,8,3,4,6"
    folder: str = ""

    def make_model(self) -> Node:
        return self.add("LTXFolder", folder=self.folder, shift=SHIFT)

    def condition(self, what: str, strength: float) -> None:
        """Clean first frames (Img To Video Inplace), or guide frames (Add Guide) of the folder's file."""
        prompts = [self.words[0], self.words[1], self.negative[0]]
        given = self.add(
            "LTXFolderFrames", latent=self.latent[0], folder=self.folder, what=what, strength=strength,
            source=prompts[0], positive=prompts[1], negative=prompts[2],
        )  # fmt: skip
        self.set(self.invert, source=given[1], latent=given[0])
        self.set(self.edit, positive=given[2], negative=given[3])


@pytest.fixture(scope="module", params=[{}, LTX23], ids=["2", "2.3"])
def of_folder(request, tmp_path_factory):
    """A model of diffusers' for a clip, its latents, and its texts and conditioning frames for the host."""
    folder = write_ltx2(tmp_path_factory.mktemp("ltx2"), **request.param)
    found, latents = open_model(str(folder)), torch.randn(1, 8, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    pictures = torch.randint(0, 256, (17, 128, 192, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    frames = {"picture": latents[:, :, 0].contiguous()}
    facts = ClipFacts((3, 8, 4, 6), 8.0, lambda: iter(pictures), guide_frames=(9,))
    found = found.with_control("", pictures).for_clip(facts)
    frames |= {name: found.inputs[name].contiguous() for name in ("control", "guides")}
    save_file(frames, folder / "frames.safetensors")
    texts = {text: found.encode_prompt(text, 192, 128) for text in (SOURCE, TARGET, NEGATIVE)}
    both = {name: torch.cat([one.embeddings, one.extras["sound"]], -1).contiguous() for name, one in texts.items()}
    save_file(both, folder / "texts.safetensors")
    return found, folder, texts, frames


@pytest.mark.parametrize("preset", ["none", "style", "shape+"])
@pytest.mark.parametrize(("what", "strength"), [("picture", 1.0), ("control", 1.0), ("control", 0.6), ("guides", 1.0)])
def test_both_hosts_agree(host, of_folder, what, strength, preset):
    found, folder, texts, frames = of_folder
    graph = FolderGuides(folder=str(folder))
    graph.condition(what, strength)
    graph.set(graph.edit, preset=preset)
    more = {"control_strength": torch.tensor([strength]), "guide_numbers": torch.tensor([[9]])}
    inputs = {FIRST if what == "picture" else what: frames[what]} | {
        name: value for name, value in more.items() if name.startswith(what.rstrip("s"))
    }
    of_text = {name: {"sound": text.extras["sound"], "mask": text.extras["mask"]} for name, text in texts.items()}
    texts = {name: replace(text, extras={**of_text[name], **inputs}) for name, text in texts.items()}
    injection = None if preset == "none" else Recipe.of_preset(preset, SOURCE, TARGET).injection
    _, ours = by_library(found, texts, injection)
    theirs = host.latents(graph.prompt, graph.edit[0])[0].transpose(0, 1)[:3]
    assert relative(theirs, ours) < 1e-4
