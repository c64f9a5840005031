"""A MiniMax H3 MODEL: both hosts agree, pictures and references are left alone, other nodes take effect."""

from dataclasses import dataclass, field

import pytest
import torch
from comfyui.graph import Graph, Node
from comfyui.host import NodeError, find_hosts
from diffusers import MiniMaxH3Scheduler
from joint import host_weights, small_h3
from safetensors.torch import save_file
from transformers import Qwen2Tokenizer

from fatezero import FlowEditSettings, PromptEdit, draw, edit, invert
from fatezero.attention.columns import ClosingColumns
from fatezero.attention.masks import GivenMask
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.hosts.diffusers.h3 import JointDenoiser
from fatezero.recipes.recipe import Recipe
from small import relative

SOURCE, TARGET = "a red square on water", "a green striped square on water"
SHAPES = ((1, 24, 2, 4, 6), (1, 32, 2, 8))
STEPS, GUIDANCE = 4, 2.0


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "text_dim": 64}
    times = {"freq_dim": 256, "time_embed_hidden_dim": 64, "time_embed_dim": 64, "rope_freq_dim": 8}
    return small_h3(num_layers=3, **sizes, **times).float()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("h3") / "h3.safetensors"
    save_file(host_weights(model), path)
    return str(path)


class Hosts(JointDenoiser):
    """The library's edit, with ComfyUI's "simple" sigmas."""

    def schedule(self, steps: int) -> FlowSchedule:
        u = torch.arange(1, 1001) / 1000
        table = 12 * u / (1 + 11 * u)
        sigmas = torch.stack([*(table[-(1 + int(i * 1000 / steps))] for i in range(steps)), torch.zeros(())])
        return FlowSchedule.of(tuple((1000 * sigmas[:-1].double()).tolist()), sigmas.flip(0))


@dataclass
class JointGraph(Graph):
    """Random latents of a video and its sound, inverted and edited."""

    weights: str = ""
    model: Node = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.add("JointModel", weights=self.weights)
        shape = ",".join(map(str, SHAPES[0]))
        self.latent = self.add("JointLatent", seed=1, video=shape, sound=SHAPES[1][-1])
        self.words = self.add(
            "FateZeroPromptEdit", clip=self.model[1], source=SOURCE, target=TARGET, mode="refine", blend_source="",
            blend_target="", reweight="",
        )  # fmt: skip
        self.negative = self.add("CLIPTextEncode", clip=self.model[1], text="none")
        self.invert = self.add(
            "FateZeroInvert", model=self.model[0], source=self.words[0], latent=self.latent[0], steps=STEPS,
            key_frames="self, middle", clip_norm=False, memory="recompute", budget_gb=2.0, sound="edit",
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.words[1], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=GUIDANCE, preset="style",
        )  # fmt: skip

    def both(self, model) -> None:
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)


@pytest.fixture
def graph(weights) -> JointGraph:
    return JointGraph(weights=weights)


def streams(host, graph, link) -> list[torch.Tensor]:
    return [host.latents(graph.prompt, graph.add("FlowStream", latent=link, number=i)[0]) for i in range(2)]


def together(parts) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def by_host(host, graph) -> torch.Tensor:
    return together(streams(host, graph, graph.edit[0]))


class Qwen:
    """The host's tokenizer of H3."""

    columns = ClosingColumns()

    def __init__(self):
        folder = find_hosts()[0].folder / "comfy/text_encoders/qwen25_tokenizer"
        self.plain = Qwen2Tokenizer.from_pretrained(folder)

    def __call__(self, text, **_):
        return self.plain(text)


def by_library(model, preset, blend=None, mask=None, drawn=None, shapes=SHAPES, windows=None, **more) -> torch.Tensor:
    denoiser, tokenizer = Hosts(model, MiniMaxH3Scheduler(12.0), shapes), Qwen()
    random = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731

    def encoded(text):
        return torch.cat([random(token, 1, 64) for token in tokenizer(text).input_ids])[None]

    latents = denoiser.packed(*(random(1 + i, *shape) for i, shape in enumerate(shapes)))
    if drawn is None:
        inversion = invert(denoiser, latents, encoded(SOURCE), STEPS, windows=windows)
    else:
        inversion = draw(denoiser, latents, encoded(SOURCE), STEPS, drawn, windows=windows)
    fusion = None if preset == "none" else Recipe.of_preset(preset).injection
    prompt = None if fusion is None else PromptEdit(SOURCE, TARGET, tokenizer, "refine", blend)
    texts = encoded(TARGET), encoded("none")
    given = None if mask is None else GivenMask(mask)
    return together(denoiser.unpacked(edit(denoiser, inversion, *texts, GUIDANCE, prompt, fusion, mask=given, **more)))


@pytest.mark.parametrize("preset", ["none", "style", "attribute", "shape", "style+", "attribute+", "shape+"])
def test_both_hosts_agree(host, graph, model, preset):
    """Each preset, with masks of words where it has some."""
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.edit, preset=preset)
    ours = by_library(model, preset, (["square"], ["striped"]))
    assert relative(by_host(host, graph), ours) < 1e-4


@pytest.mark.parametrize(
    ("preset", "more"), [("none", {}), ("style", {"draws": 2}), ("style", {"n_min": 1, "variant": "wan_edit"})]
)
def test_flow_edit_agrees(host, graph, model, preset, more):
    settings = {"source_guidance": 2.0, "seed": 3, **more}
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        **{"draws": 1, "sound": "edit", **settings},
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset=preset, strength=0.75)
    ours = by_library(model, preset, drawn=FlowEditSettings(**settings), strength=0.75)
    assert relative(by_host(host, graph), ours) < 1e-4


def test_an_edit_mask_limits_latents_and_fusion(host, graph, model):
    """The sound is the edit's."""
    half = graph.add("SolidMask", value=1.0, width=32, height=32)
    none = graph.add("SolidMask", value=0.0, width=16, height=32)
    mask = graph.add("MaskComposite", destination=half[0], source=none[0], x=0, y=0, operation="multiply")
    graph.set(graph.edit, preset="shape+", mask=mask[0])
    found, before = (streams(host, graph, link) for link in (graph.edit[0], graph.latent[0]))
    given = torch.ones(1, 4, 6)
    given[..., :3] = 0
    assert relative(together(found), by_library(model, "shape+", mask=given)) < 1e-4
    assert torch.equal(found[0][..., :3], before[0][..., :3])
    assert relative(found[0][..., 3:], before[0][..., 3:]) > 1e-2
    assert relative(found[1], before[1]) > 1e-2


def test_the_hosts_samplers_integrate_the_edit(host, graph):
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=1, seed=3, sound="edit",
    )  # fmt: skip
    graph.set(graph.edit, store=store[0])
    expected = by_host(host, graph)
    guider = graph.add("FateZeroEditGuider", **graph.prompt[graph.edit.id]["inputs"])
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    found = graph.add(
        "SamplerCustomAdvanced", noise=graph.add("DisableNoise")[0], guider=guider[0], sampler=sampler[0],
        sigmas=sigmas[0], latent_image=graph.latent[0],
    )  # fmt: skip
    assert relative(together(streams(host, graph, found[0])), expected) < 1e-5


def test_bfloat16_is_close(host, graph, model):
    graph.set(graph.model, dtype="bfloat16")
    assert 1e-4 < relative(by_host(host, graph), by_library(model, "style")) < 0.2


# --- rows of pictures and references ----------------------------------------------------------


def with_picture(graph, text, reference=False):
    """A prompt with a first frame, or a picture and a video as references, by the host's own nodes."""
    frame = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0x336699)
    if reference:
        sound = graph.add("FlowLoader", kind="h3")
        return graph.add(
            "MiniMaxH3ReferenceToVideo", clip=graph.model[1], vae=graph.model[2], audio_vae=sound[3], prompt=text,
            width=96, height=64, length=5, ref_image_size="match",
            **{"ref_images.ref_image_0": frame[0], "ref_videos.ref_video_0": _film(graph)},
        )[0]  # fmt: skip
    return graph.add(
        "MiniMaxH3ImageToVideo", clip=graph.model[1], vae=graph.model[2], prompt=text, width=96, height=64, length=5,
        first_frame=frame[0],
    )[0]  # fmt: skip


def _film(graph):
    return graph.add("EmptyImage", width=96, height=64, batch_size=22, color=0x996633)[0]


@pytest.fixture(params=[False, True], ids=["first_frame", "references"])
def pictured(graph, request):
    graph.set(graph.invert, source=with_picture(graph, SOURCE, request.param))
    graph.set(graph.edit, positive=with_picture(graph, TARGET, request.param))
    graph.set(graph.edit, negative=with_picture(graph, "none", request.param))
    return graph


def test_rows_of_pictures_and_references_are_left_alone(host, pictured, weights):
    """Under a mask of ones the edit is one without fusion; they change it, and fusion changes it."""
    graph = pictured
    plain = by_host(host, JointGraph(weights=weights))
    fused = by_host(host, graph)
    assert relative(fused, plain) > 1e-3
    settings = graph.add(
        "FateZeroFusion", cross_replace_steps=0.0, self_replace_steps=1.0, blend_self_attention=True,
        blend_latents=False, blend_threshold=0.3, max_tokens=0, mask_tokens=256, mask_from="prompts",
        blend_latents_until=0.8, separate_words=0.0,
    )  # fmt: skip
    ones = graph.add("SolidMask", value=1.0, width=32, height=32)
    graph.set(graph.edit, preset="custom", settings=settings[0], mask=ones[0])
    own = by_host(host, graph)
    inputs = graph.prompt[graph.edit.id]["inputs"]
    for name in ("settings", "mask"):
        del inputs[name]
    graph.set(graph.edit, preset="none", guidance=GUIDANCE)
    assert relative(own, by_host(host, graph)) < 1e-6
    assert relative(own, fused) > 1e-3


def test_words_are_found_behind_pictures(host, pictured):
    """Heat maps of words whose rows follow those of a picture."""
    graph = pictured
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.edit, preset="attribute+")
    assert torch.isfinite(by_host(host, graph)).all()
    heat = graph.add(
        "FateZeroMaskPreview", model=graph.model[0], store=graph.invert[1], prompt_edit=graph.words[2],
        words="square, water", from_share=0.2, to_share=0.8, threshold=0.55, width=96, height=64,
    )  # fmt: skip
    pictures = graph.add("SaveImage", images=heat[0], filename_prefix="heat")
    assert len(host.run(graph.prompt).outputs[pictures.id]["images"]) >= 2


# --- with other nodes in the chain ------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(host, weights) -> torch.Tensor:
    return by_host(host, JointGraph(weights=weights))


@pytest.mark.parametrize("kind", ["OtherAttention", "JointBlock"])
def test_other_packs_attention_and_blocks_are_kept(host, graph, plain, kind):
    other = graph.add(kind, model=graph.model[0], scale=1.0)
    graph.both(other[0])
    assert relative(by_host(host, graph), plain) < 1e-5
    graph.set(other, scale=0.5)
    assert relative(by_host(host, graph), plain) > 1e-3


def test_a_skipped_layer_is_an_error_that_names_the_node(host, graph):
    graph.both(graph.add("OtherSkip", model=graph.model[0])[0])
    with pytest.raises(NodeError, match=r"1 of 3 attention layers .block.1.joint.* SkipBlock"):
        by_host(host, graph)


def test_other_weights_of_the_edit_do_not_change_the_source(host, graph, plain, weights):
    """The source then runs with its own weights, before the edit's call."""
    other = graph.add("JointModel", weights=weights, scale=0.98)
    graph.set(graph.edit, model=other[0])
    found = by_host(host, graph)
    graph.set(graph.invert, model=other[0])
    both = by_host(host, graph)
    assert min(relative(found, plain), relative(both, plain), relative(found, both)) > 1e-3
    graph.set(other, scale=1.0)
    graph.set(graph.invert, model=graph.model[0])
    assert relative(by_host(host, graph), plain) < 1e-5, "equal weights of another file"


def test_the_source_is_kept_for_one_block(host, graph, plain):
    """Its queries and keys exist from its own run of a block to the edit's."""
    graph.both(graph.add("JointRecords", model=graph.model[0])[0])
    assert relative(by_host(host, graph), plain) < 1e-5


@pytest.mark.parametrize("kind", ["OtherLowVram", "OtherSeparateCalls"])
def test_offloaded_weights_and_separate_calls(host, graph, plain, kind):
    graph.both(graph.add(kind, model=graph.model[0])[0])
    assert relative(by_host(host, graph), plain) < 1e-5


def test_kv_edit(host, graph, plain):
    half = graph.add("SolidMask", value=1.0, width=32, height=32)
    none = graph.add("SolidMask", value=0.0, width=16, height=32)
    mask = graph.add("MaskComposite", destination=half[0], source=none[0], x=0, y=0, operation="multiply")
    graph.set(graph.edit, preset="kv_edit", mask=mask[0])
    found, before = streams(host, graph, graph.edit[0])[0], streams(host, graph, graph.latent[0])[0]
    assert torch.equal(found[..., :3], before[..., :3])
    assert relative(found[..., 3:], before[..., 3:]) > 1e-2


@pytest.mark.parametrize("layers", ["1", "0, 2"])
def test_skip_layer_guidance_reads_the_source_too(host, graph, plain, layers):
    """The source has the skipped layers; its records of them are not read."""
    model = graph.add(
        "SkipLayerGuidanceDiT", model=graph.model[0], double_layers=layers, single_layers="", scale=3.0,
        start_percent=0.0, end_percent=1.0, rescaling_scale=0.0,
    )  # fmt: skip
    graph.both(model[0])
    found = by_host(host, graph)
    assert relative(found, plain) > 1e-3
    graph.set(graph.invert, model=graph.model[0])
    assert relative(by_host(host, graph), found) < 1e-5, "guidance does not change the source"
    graph.set(graph.edit, preset="none", guidance=GUIDANCE)
    assert relative(by_host(host, graph), found) > 1e-3


@pytest.mark.parametrize("shape", ["1,24,7,5,7", "1,24,1,4,6"])
def test_odd_sizes_and_one_latent(host, graph, shape):
    graph.set(graph.latent, video=shape)
    graph.set(graph.words, blend_source="square", blend_target="striped")
    found = {}
    for preset in ("style", "shape+"):
        graph.set(graph.edit, preset=preset)
        found[preset] = by_host(host, graph)
        assert torch.isfinite(found[preset]).all()
    assert relative(found["style"], found["shape+"]) > 1e-3


def test_guidance_functions_of_other_nodes_run(host, graph, plain):
    graph.set(graph.edit, model=graph.add("RescaleCFG", model=graph.model[0], multiplier=0.7)[0])
    assert relative(by_host(host, graph), plain) > 1e-4


def test_shifts_are_the_models(host, graph, plain):
    graph.both(graph.add("MiniMaxH3SigmaShift", model=graph.model[0], shift_video=12.0, shift_audio=3.0)[0])
    assert relative(by_host(host, graph), plain) < 1e-5
    graph.both(graph.add("MiniMaxH3SigmaShift", model=graph.model[0], shift_video=6.0, shift_audio=3.0)[0])
    assert relative(by_host(host, graph), plain) > 1e-3


def cached(graph):
    cache = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    return graph.add("EasyCache", model=graph.model[0], **cache)[0]


@pytest.mark.parametrize(
    ("part", "error"),
    [
        (lambda graph: graph.both(cached(graph)), "skips calls"),
        (lambda graph: graph.set(graph.invert, memory="queries_keys"), "memory is queries_keys.*joint"),
        (lambda graph: graph.set(graph.edit, preset="pnp"), "Plug-and-Play needs a UNet"),
        (lambda graph: graph.set(graph.words, reweight="striped=2"), "reweight needs cross-attention"),
    ],
)
def test_what_is_refused(host, graph, part, error):
    part(graph)
    with pytest.raises(NodeError, match=error):
        by_host(host, graph)


def test_an_override_that_is_set_in_each_step_is_used_as_kernel(host, graph, plain):
    """For calls with as many queries as keys, which fusion splits."""
    other = graph.add("OtherSparseAttention", model=graph.model[0], scale=1.0)
    graph.both(other[0])
    assert relative(by_host(host, graph), plain) < 1e-5
    graph.set(other, scale=0.5)
    assert relative(by_host(host, graph), plain) > 1e-3


def test_the_report_counts_joint_layers_and_latents(host, graph):
    run = host.run({**graph.prompt, "end": {"class_type": "PreviewAny", "inputs": {"source": graph.edit[1]}}})
    shown = host.text(run, "end")
    assert "hooked 3 of 3" in shown and "cross-attention in 0 and self-attention in 3 of 4" in shown, shown
    assert "evaluations of 2 frames, 3 more for the source" in shown, shown


# --- sound, maps and stores -------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["style", "shape+"])
def test_flow_edit_keeps_the_sound_under_fusion(host, graph, preset):
    graph.set(graph.words, blend_source="square", blend_target="striped")
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.words[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=2.0, draws=1, seed=3,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], preset=preset)
    before = streams(host, graph, graph.latent[0])
    videos = []
    for sound in ("keep", "edit"):
        graph.set(store, sound=sound)
        video, found = streams(host, graph, graph.edit[0])
        assert torch.equal(found, before[1]) == (sound == "keep")
        videos.append(video)
    assert relative(videos[0], before[0]) > 1e-2
    assert relative(videos[0], videos[1]) > 1e-4, "the sound is heard by the video"


def test_edit_maps_have_words_and_masks(host, graph):
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.edit, preset="shape+")
    edited = by_host(host, graph)
    maps = graph.add("FateZeroEditMaps", **graph.prompt[graph.edit.id]["inputs"])
    assert torch.equal(together(streams(host, graph, maps[0])), edited), "the same edit"
    for output in (4, 5):
        saved = graph.add("SaveImage", images=graph.add("MaskToImage", mask=maps[output])[0], filename_prefix="mask")
        assert len(host.run(graph.prompt).outputs[saved.id]["images"]) == SHAPES[0][2]
    pictures = graph.add("SaveImage", images=maps[1], filename_prefix="heat")
    assert len(host.run(graph.prompt).outputs[pictures.id]["images"]) == SHAPES[0][2]


def test_a_saved_store_gives_the_same_edit(host, graph, plain):
    saved = graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="stores/h3")
    file = host.text(host.run(graph.prompt), saved.id)
    del graph.prompt[saved.id]
    graph.set(graph.edit, store=graph.add("FateZeroLoadStore", file=file)[0])
    assert relative(by_host(host, graph), plain) < 1e-5


def test_a_store_with_a_first_frame_is_not_saved(host, graph):
    graph.set(graph.invert, source=with_picture(graph, SOURCE))
    graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="stores/pictures")
    with pytest.raises(NodeError, match="a file cannot contain minimax_keyframes"):
        host.run(graph.prompt)
