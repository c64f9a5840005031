"""Attention control of Wan models with inputs besides text: pictures, control videos and references."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from comfyui.graph import Graph, Node
from comfyui.host import NodeError
from safetensors.torch import save_file
from wan import write_wan, write_wan_i2v, write_wan_vace

from fatezero import PromptEdit, edit, invert
from fatezero.diffusion.schedule import FlowSchedule
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.recipes.recipe import Recipe
from small import relative

KINDS = (
    "bernini",
    "phantom",
    "i2v",
    "i2v_without_embedding",
    "fun",
    "fun_inpaint",
    "vace",
    "animate",
    "animate_faces",
    "camera",
)
SOURCE, TARGET = "a red square on water", "a green striped square on water"
STEPS, SEED, GUIDANCE, SHIFT = 3, 5, 4.0, 3.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan(tmp_path_factory.mktemp("wan"))


@dataclass
class WanKindGraph(Graph):
    """Random latents, inverted and edited by a small random model, with the inputs of its kind."""

    folder: str = ""
    kind: str = ""
    target: str = TARGET
    model: Node = field(init=False)

    def __post_init__(self) -> None:
        self.model = self.make_model()
        clip = self.model[1] if self.kind == "" else self.add("OtherWan", folder=self.folder, shift=SHIFT)[1]
        self.latent = self.add("OtherLatent", seed=1, shape="1,16,3,4,6")
        self.words = self.add(
            "FateZeroPromptEdit", clip=clip, source=SOURCE, target=self.target, mode="refine", blend_source="",
            blend_target="", reweight="",
        )  # fmt: skip
        empty = self.add("CLIPTextEncode", clip=clip, text="")
        self.source, self.positive, self.negative = (
            self.with_inputs(one) for one in (self.words[0], self.words[1], empty[0])
        )
        self.invert = self.add(
            "FateZeroInvert", model=self.model[0], source=self.source[0], latent=self.latent[0], steps=STEPS,
            key_frames="self", clip_norm=False, memory="recompute", budget_gb=2.0,
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.model[0], positive=self.positive[0], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=GUIDANCE, preset="style",
        )  # fmt: skip

    def make_model(self) -> Node:
        return self.add("WanKind", kind=self.kind)

    def with_inputs(self, prompt) -> Node:
        return self.add("WanInputs", conditioning=prompt, kind=self.kind)

    def both(self, model) -> None:
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)

    def fuse(self, **settings) -> None:
        """Fuse self-attention in all steps, and nothing else."""
        values = {
            "cross_replace_steps": 0.0, "self_replace_steps": 1.0, "blend_self_attention": False,
            "blend_latents": False, "blend_threshold": 0.3, "max_tokens": 0, "mask_tokens": 256,
            "mask_from": "attention", "blend_latents_until": 0.8, "separate_words": 0.0,
        }  # fmt: skip
        self.set(self.edit, preset="custom", settings=self.add("FateZeroFusion", **values | settings)[0])

    def unfused(self) -> None:
        for name in ("mask", "settings"):
            self.prompt[self.edit.id]["inputs"].pop(name, None)
        self.set(self.edit, preset="none")

    def given(self, value: float) -> list:
        return self.add("SolidMask", value=value, width=48, height=32)[0]


@pytest.fixture(params=KINDS)
def graph(request, folder) -> WanKindGraph:
    return WanKindGraph(folder=str(folder), kind=request.param)


def edited(host, graph) -> torch.Tensor:
    return host.latents(graph.prompt, graph.edit[0])


def test_all_layers_are_fused_and_the_memories_agree(host, graph):
    host.forget()
    graph.add("SaveLatent", samples=graph.edit[0], filename_prefix="fatezero/kinds")
    layers = 10 if graph.kind.startswith("animate") else 4
    assert f"hooked {layers} of {layers} attention layers" in host.text(host.run(graph.prompt), graph.edit.id)
    found, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
    assert relative(found, clip) > 1e-2
    graph.set(graph.invert, memory="queries_keys")
    assert relative(edited(host, graph), found) < 1e-5
    graph.unfused()
    assert relative(edited(host, graph), found) > 1e-3


def test_a_mask_of_ones_is_no_self_fusion_and_of_zeros_the_sources(host, graph):
    graph.fuse()
    source = edited(host, graph)
    graph.fuse(blend_self_attention=True)
    graph.set(graph.edit, mask=graph.given(0.0))
    zeros = edited(host, graph)
    graph.set(graph.edit, mask=graph.given(1.0))
    ones = edited(host, graph)
    graph.unfused()
    assert relative(zeros, source) < 1e-5
    assert relative(ones, edited(host, graph)) < 1e-5
    assert relative(zeros, ones) > 1e-3


@dataclass
class FolderGraph(WanKindGraph):
    """With the weights and inputs of a folder."""

    def make_model(self) -> Node:
        return self.add("WanFolder", folder=self.folder, shift=SHIFT)

    def with_inputs(self, prompt) -> Node:
        return self.add("WanFolderInputs", conditioning=prompt, folder=self.folder)


def host_schedule(steps: int) -> FlowSchedule:
    """The host's "simple" sigmas."""
    u = torch.arange(1, 1001) / 1000
    table = SHIFT * u / (1 + (SHIFT - 1) * u)
    sigmas = torch.stack([*(table[-(1 + int(i * 1000 / steps))] for i in range(steps)), torch.zeros(())])
    return FlowSchedule.of(tuple((1000 * sigmas[:-1].double()).tolist()), sigmas.flip(0))


@pytest.fixture(
    scope="module", params=[lambda folder: write_wan_i2v(folder, "2.2"), write_wan_vace], ids=["i2v", "vace"]
)
def of_folder(request, tmp_path_factory):
    """A model of diffusers' for a clip, with its inputs for the host."""
    folder = request.param(tmp_path_factory.mktemp("both"))
    found = replace(open_model(str(folder)), low_noise=None, boundary=None)
    pictures = torch.randint(0, 256, (9, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    found = found.for_clip(ClipFacts((3, 16, 4, 6), 8.0, lambda: iter(pictures)))
    save_file({name: value.contiguous() for name, value in found.inputs.items()}, folder / "inputs.safetensors")
    return found, folder


@pytest.mark.parametrize(
    ("preset", "memory"),
    [
        ("style", "recompute"),
        ("style+", "queries_keys"),
        ("attribute+", "recompute"),
        ("shape+", "recompute"),
        ("shape", "queries_keys"),
    ],
)
def test_both_hosts_agree(host, of_folder, preset, memory):
    model, folder = of_folder
    graph = FolderGraph(folder=str(folder))
    graph.set(graph.words, blend_source="square", blend_target="striped")
    graph.set(graph.edit, preset=preset)
    graph.set(graph.invert, memory=memory)
    schedule = {"schedule": lambda self, steps: host_schedule(steps)}
    denoiser = type("Hosts", (type(model.denoiser),), schedule)(model)
    config = model.vae.config
    mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    given = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    latents = (given[0].transpose(0, 1) - mean) / deviation
    texts = (model.encode_prompt(text, 48, 32) for text in (SOURCE, TARGET, ""))
    source, target, empty = (replace(text, embeddings=10 * text.embeddings) for text in texts)
    inversion = invert(denoiser, latents, source, STEPS, memory=memory)
    recipe = Recipe.of_preset(preset, SOURCE, TARGET)
    pair = PromptEdit(SOURCE, TARGET, model.tokenizer, blend_words=(["square"], ["striped"]))
    ours = edit(denoiser, inversion, target, empty, GUIDANCE, pair, recipe.injection)
    theirs = (edited(host, graph)[0].transpose(0, 1) - mean) / deviation
    assert relative(theirs, ours) < 1e-4
    assert relative(ours, latents) > 1e-2


def from_the_clip(graph, source_guidance=1.0) -> None:
    """FlowEdit, by default without guidance of the source."""
    store = graph.add(
        "FateZeroFlowEdit", model=graph.model[0], source=graph.source[0], latent=graph.latent[0], steps=STEPS,
        source_guidance=source_guidance, draws=1, seed=SEED,
    )  # fmt: skip
    graph.set(graph.edit, store=store[0], guidance=source_guidance)


def test_the_same_prompt_replays_the_clip(host, folder, graph):
    graph = WanKindGraph(folder=str(folder), kind=graph.kind, target=SOURCE)
    from_the_clip(graph)
    graph.fuse(cross_replace_steps=1.0)
    assert relative(edited(host, graph), host.latents(graph.prompt, graph.latent[0])) < 1e-5


@pytest.mark.parametrize(
    ("kind", "first_token"), [("bernini", 0), ("phantom", 0), ("fun", 6), ("i2v", 0), ("animate_faces", 0)]
)
def test_references_attend_as_in_the_model(host, folder, kind, first_token):
    """Compared with FlowEdit as a plain loop with the host's own guider."""
    graph = WanKindGraph(folder=str(folder), kind=kind)
    from_the_clip(graph)
    graph.fuse()
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    loop = graph.add(
        "WanFusedLoop", model=graph.model[0], source=graph.source[0], positive=graph.positive[0],
        latent=graph.latent[0], sigmas=sigmas[0], first_token=first_token, seed=SEED,
    )  # fmt: skip
    clip, found = (host.latents(graph.prompt, link) for link in (graph.latent[0], graph.edit[0]))
    assert relative(found - clip, host.latents(graph.prompt, loop[0]) - clip) < 1e-3
    graph.unfused()
    assert relative(found - clip, edited(host, graph) - clip) > 1e-2


@pytest.mark.parametrize("kind", ["i2v", "vace", "bernini"])
def test_the_sources_guidance_has_the_sources_pictures(host, folder, kind):
    """FlowEdit with another picture in positive and negative prompt, compared with the host's own guider."""
    graph = WanKindGraph(folder=str(folder), kind=kind)
    from_the_clip(graph, GUIDANCE)
    graph.unfused()
    empty = graph.prompt[graph.negative.id]["inputs"]["conditioning"]
    positive, negative = (
        graph.add("WanInputs", conditioning=prompt, kind=kind, scale=3.0) for prompt in (graph.words[1], empty)
    )
    graph.set(graph.edit, positive=positive[0], negative=negative[0])
    sigmas = graph.add("FateZeroSigmas", model=graph.model[0], steps=STEPS)
    prompts = {"positive": positive[0], "negative": negative[0], "source": graph.source[0]}
    clip, found = (host.latents(graph.prompt, link) for link in (graph.latent[0], graph.edit[0]))

    def change(**more):
        loop = graph.add(
            "FlowLoop", model=graph.model[0], latent=graph.latent[0], sigmas=sigmas[0], guidance=GUIDANCE,
            source_guidance=GUIDANCE, first=0, seed=SEED, **prompts, **more,
        )  # fmt: skip
        return host.latents(graph.prompt, loop[0]) - clip

    assert relative(found - clip, change(source_negative=graph.negative[0])) < 1e-3
    assert relative(found - clip, change()) > 1e-2


@pytest.mark.parametrize("memory", ["recompute", "keys_values"])
def test_tokens_inside_a_mask(host, graph, memory):
    """KV-Edit computes the reference tokens besides those inside the mask."""
    solid = graph.add("SolidMask", value=0.0, width=48, height=32)
    left = graph.add("SolidMask", value=1.0, width=16, height=32)
    mask = graph.add("MaskComposite", destination=solid[0], source=left[0], x=0, y=0, operation="add")
    settings = graph.add("FateZeroKVEdit", background_steps=1.0, tokens="inside", grow=0)
    graph.set(graph.edit, mask=mask[0], preset="custom", settings=settings[0])
    graph.set(graph.invert, memory=memory)
    found, clip = edited(host, graph), host.latents(graph.prompt, graph.latent[0])
    assert relative(found[..., 2:], clip[..., 2:]) < 1e-5
    assert relative(found[..., :2], clip[..., :2]) > 1e-2
    graph.set(graph.invert, memory="recompute")
    assert relative(edited(host, graph), found) < 1e-5


def test_a_pair_of_models_fuses_each_step_with_its_own(host, folder):
    """Wan 2.2 for image-to-video: the model for low noise runs below the boundary."""
    graph = WanKindGraph(folder=str(folder), kind="i2v_without_embedding")
    single = edited(host, graph)
    other = graph.add("WanKind", kind=graph.kind, seed=1)
    pairs = {}
    for boundary in (0.0, 0.97):
        both = graph.add("FateZeroWanPair", model=graph.model[0], low_noise=other[0], boundary=boundary)
        graph.both(both[0])
        pairs[boundary] = edited(host, graph)
        graph.set(graph.invert, memory="queries_keys")
        assert relative(edited(host, graph), pairs[boundary]) < 1e-5
        graph.set(graph.invert, memory="recompute")
    graph.both(other[0])
    assert relative(pairs[0.0], single) < 1e-6
    assert relative(pairs[0.97], single) > 1e-3 < relative(pairs[0.97], edited(host, graph))


def with_maps(graph):
    graph.set(graph.invert, memory="maps")


def with_inputs_of(kind):
    def change(graph):
        graph.set(graph.invert, source=graph.add("WanInputs", conditioning=graph.words[0], kind=kind)[0])

    return change


@pytest.mark.parametrize(
    ("kind", "change", "error"),
    [
        ("vace", with_inputs_of("bernini"), "source: reference clips are set"),
        ("i2v", with_inputs_of("fun"), "source: reference pictures are set"),
        ("bernini", with_inputs_of("i2v"), "source: a picture to paint into is set"),
        ("bernini", with_maps, "memory: maps cannot include the model's reference tokens"),
        ("humo", lambda graph: None, "needs control of the attention.* not with WAN21_HuMo"),
        ("fun", lambda graph: graph.add("FateZeroSaveStore", store=graph.invert[1], filename_prefix="x"),
         "cannot contain .*reference_latents"),
    ],
)  # fmt: skip
def test_what_is_refused(host, folder, kind, change, error):
    graph = WanKindGraph(folder=str(folder), kind=kind)
    change(graph)
    with pytest.raises(NodeError, match=error):
        edited(host, graph)
