"""Every node of the host from MODEL to MODEL and from CONDITIONING to CONDITIONING: right on one side and on both, or
refused by name."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from comfyui.graph import DemoGraph
from comfyui.host import NodeError
from comfyui.test_one_side import OF_WAN, SIDES, folder, given, on  # noqa: F401
from comfyui.test_options import HONOURED, by_the_host, left_half
from comfyui.test_wan import SLG, WanGraph, hosts_guider
from comfyui.test_wan import lora as wan_lora  # noqa: F401

from small import relative

RIGHT = "right"
"""Memories and chunks agree, also with the host's own guider without fusion; chunks may be refused by name."""
HOST_FAILS = "the host fails"
"""The node does not fit the model: it fails, or the host's own guider does."""


@dataclass(frozen=True)
class Run:
    """A node to run: its outcome on a UNet and on Wan (RIGHT, HOST_FAILS, or text of the refusal), and
    settings with an effect.
    """

    unet: str = RIGHT
    wan: str = RIGHT
    settings: dict[str, Any] = field(default_factory=dict)
    alike: bool = False
    """Whether it is refused on Wan on one side only, and right on both."""
    memory: str = "queries_keys"
    """What must give what recompute gives."""
    within: float = 1e-4
    """Tolerance, for nodes that round or produce large values."""


NOT_A_SCHEDULE = r"DDIM cannot invert the schedule {kind}"
WITH_TOKENS = r"merges or rescales tokens \(ToMe, HyperTile, Deep Shrink\)"
OFF_DIM = "context windows along dim 2, but frames are along dim 0"
NO_FLOW = "is not sampled as a flow"
SHIFT = r"its shift .* has no effect"
WINDOWS = {"context_length": 2, "context_overlap": 1}
HALF = {"*": 0.5}
"""The value of every numeric input."""
PATCH = "needs a model patch, of weights made for one model"
MERGE = "merges as ModelMergeBlocks does, by the names of another model's layers"

MODELS: dict[str, Run | str] = {
    "APG": Run(),
    "ARVideoI2V": Run(),
    "AnimaLLLiteApply": PATCH,
    "CFGNorm": Run(),
    "CFGOverride": Run(),
    "CFGZeroStar": Run(),
    "ChromaRadianceOptions": Run(),
    "ContextWindowsManual": Run(settings=WINDOWS),
    "DifferentialDiffusion": Run(),
    "EasyCache": Run(),
    "Epsilon Scaling": Run(),
    "FluxKVCache": Run(HOST_FAILS, HOST_FAILS),
    "FreSca": Run(),
    "FreeU": Run(wan=HOST_FAILS),
    "FreeU_V2": Run(wan=HOST_FAILS),
    "HiDreamO1PatchSeamSmoothing": Run(unet=HOST_FAILS),
    "HyperTile": Run(WITH_TOKENS, HOST_FAILS, {"tile_size": 32}),
    "HypernetworkLoader": Run(wan=HOST_FAILS),
    "LTXVContextWindows": Run(OFF_DIM, "different context windows", {
        "context_length": 9, "context_overlap": 1, "freenoise": False}, alike=True, memory="auto"),
    "LTXVModalityGuidance": Run(),
    "LTXVReferenceAudio": "needs an audio autoencoder",
    "LTXVSpatioTemporalGuidance": Run(settings={"blocks": "1"}),
    "LatentApplyOperationCFG": Run(),
    "LazyCache": Run(),
    "LoraLoader": Run(),
    "LoraLoaderBypass": Run(),
    "LoraLoaderBypassModelOnly": Run(),
    "LoraLoaderModelOnly": Run(),
    "LoraModelLoader": "needs a LoRA that Train LoRA has just made, and loads it as LoraLoaderModelOnly does",
    "Mahiro": Run(),
    "MiniMaxH3SigmaShift": Run(NOT_A_SCHEDULE, SHIFT, alike=True),
    "ModelAttentionBackend": Run(),
    "ModelComputeDtype": Run(settings={"dtype": "fp16"}, within=1e-2),
    "ModelMergeAdd": Run(within=1e-3),
    "ModelMergeAuraflow": MERGE,
    "ModelMergeBlocks": Run(settings=HALF),
    "ModelMergeCosmos14B": MERGE,
    "ModelMergeCosmos7B": MERGE,
    "ModelMergeCosmosPredict2_14B": MERGE,
    "ModelMergeCosmosPredict2_2B": MERGE,
    "ModelMergeFlux1": MERGE,
    "ModelMergeKrea2": MERGE,
    "ModelMergeLTXV": MERGE,
    "ModelMergeMochiPreview": MERGE,
    "ModelMergeQwenImage": MERGE,
    "ModelMergeSD1": Run(settings=HALF),
    "ModelMergeSD2": MERGE,
    "ModelMergeSD35_Large": MERGE,
    "ModelMergeSD3_2B": MERGE,
    "ModelMergeSDXL": MERGE,
    "ModelMergeSimple": Run(settings=HALF),
    "ModelMergeSubtract": Run(),
    "ModelMergeWAN2_1": Run(settings=HALF),
    "ModelNoiseScale": Run(HOST_FAILS, "Model Noise Scale", {"noise_scale": 2.0}),
    "ModelSamplingAuraFlow": Run("ModelSamplingSD3 is not a schedule", SHIFT, alike=True),  # its base class
    "ModelSamplingContinuousEDM": Run(NOT_A_SCHEDULE, NOT_A_SCHEDULE),
    "ModelSamplingContinuousV": Run(NOT_A_SCHEDULE, NOT_A_SCHEDULE),
    "ModelSamplingDiscrete": Run(wan=NO_FLOW),
    "ModelSamplingFlux": Run(NOT_A_SCHEDULE, NOT_A_SCHEDULE),
    "ModelSamplingLTXV": Run(NOT_A_SCHEDULE, NOT_A_SCHEDULE),
    "ModelSamplingSD3": Run(unet=NOT_A_SCHEDULE),
    "ModelSamplingStableCascade": Run(NOT_A_SCHEDULE, NOT_A_SCHEDULE),
    "MultiGPU_WorkUnits": Run(),
    "NAGuidance": Run(),
    "PatchModelAddDownscale": Run(WITH_TOKENS, settings={"end_percent": 1.0}),
    "PerpNeg": Run(),
    "PerturbedAttentionGuidance": Run(),
    "QwenImageDiffsynthControlnet": PATCH,
    "RenormCFG": Run(HOST_FAILS, HOST_FAILS),
    "RescaleCFG": Run(),
    "SUPIRApply": PATCH,
    "ScaleROPE": Run(),
    "SelectModelDevice": Run(),
    "SelfAttentionGuidance": Run(),
    "SkipLayerGuidanceDiT": Run(settings=SLG),
    "SkipLayerGuidanceDiTSimple": Run(settings={"double_layers": "1", "single_layers": ""}),
    "SkipLayerGuidanceSD3": Run(settings={"layers": "1", "start_percent": 0.0}),
    "TCFG": Run(),
    "TemporalScoreRescaling": Run(unet=HOST_FAILS, settings={"tsr_k": 0.5}),
    "TomePatchModel": Run(WITH_TOKENS, HOST_FAILS),
    "TorchCompileModel": "compiles the same calls for minutes; test_one_side has it on an edit, which is not compiled",
    "TripoSplatSamplingPreview": "needs the autoencoder of TripoSplat",
    "UNetCrossAttentionMultiply": Run(),
    "UNetSelfAttentionMultiply": Run(),
    "UNetTemporalAttentionMultiply": Run(settings={"self_structural": 1.3}),
    "USOStyleReference": PATCH,
    "VideoLinearCFGGuidance": Run(),
    "VideoTriangleCFGGuidance": Run(),
    "WanAnimate2Cache": Run(),
    "WanContextWindowsManual": Run(OFF_DIM, "different context windows", {
        "context_length": 5, "context_overlap": 1, "freenoise": False}, alike=True, memory="auto"),
    "WanInfiniteTalkToVideo": PATCH,
    "WanUni3CControlnetApply": PATCH,
    "ZImageFunControlnet": PATCH,
    "wanBlockSwap": Run(),
}  # fmt: skip
"""The host's nodes from MODEL to MODEL: their outcome, or why they do not run here."""

COMBINED = "combines 2 prompts"
AREA, MASK = r"an area of the picture is set \(area\)", r"a mask of the picture is set \(mask\)"
INTO = r"a picture to paint into is set \(concat_latent_image\)"
STEPS = r"is restricted to 0% to 50% of the steps \(Conditioning Set Timestep Range\)"
VISION = "needs CLIP vision weights; test_options has the option that it sets"
OTHER_FAMILY = "is for models of another family, with their own autoencoder or latents"
WEIGHTS = "needs weights made for one model"

CONDITIONINGS: dict[str, Run | str] = {
    "BerniniConditioning": OTHER_FAMILY,
    "CLIPTextEncodeControlnet": Run(),
    "ConditioningAverage": Run(settings={"conditioning_to_strength": 0.5}),
    "ConditioningCombine": Run(COMBINED, COMBINED),
    "ConditioningConcat": Run(),
    "ConditioningMultiply": Run(settings={"multiplier": 1.5}),
    "ConditioningSetArea": Run(AREA, AREA),
    "ConditioningSetAreaPercentage": Run(AREA, AREA),
    "ConditioningSetAreaPercentageVideo": Run(AREA, AREA),
    "ConditioningSetAreaStrength": Run(settings={"strength": 0.5}),
    "ConditioningSetDefaultCombine": Run(COMBINED, COMBINED),
    "ConditioningSetMask": Run(MASK, MASK),
    "ConditioningSetProperties": Run(),
    "ConditioningSetPropertiesAndCombine": Run(COMBINED, COMBINED),
    "ConditioningSetTimestepRange": Run(STEPS, STEPS, {"end": 0.5}),
    "ConditioningStableAudio": Run(),
    "ConditioningZeroOut": Run(),
    "ControlNetApply": Run(wan=WEIGHTS),
    "ControlNetApplyAdvanced": Run(wan=WEIGHTS),
    "ControlNetApplySD3": Run(wan=WEIGHTS),
    "ControlNetInpaintingAliMamaApply": Run(wan=WEIGHTS),
    "FluxDisableGuidance": Run(),
    "FluxGuidance": Run(),
    "FluxKontextMultiReferenceLatentMethod": Run(),
    "GLIGENTextBoxApply": "needs GLIGEN weights; test_one_side has what it sets",
    "HiDreamO1ReferenceImages": OTHER_FAMILY,
    "HunyuanImageToVideo": OTHER_FAMILY,
    "HunyuanRefinerLatent": OTHER_FAMILY,
    "HunyuanVideo15ImageToVideo": OTHER_FAMILY,
    "HunyuanVideo15SuperResolution": OTHER_FAMILY,
    "InpaintModelConditioning": Run(INTO, OTHER_FAMILY),
    "InstructPixToPixConditioning": Run(INTO, OTHER_FAMILY),
    "Kandinsky5ImageToVideo": OTHER_FAMILY,
    "LTXVAddGuide": OTHER_FAMILY,
    "LTXVConditioning": Run(),
    "LTXVCropGuides": OTHER_FAMILY,
    "LTXVImgToVideo": OTHER_FAMILY,
    "LTXVReferenceAudio": OTHER_FAMILY,
    "MiniMaxH3AddGuide": OTHER_FAMILY,
    "PairConditioningCombine": Run(COMBINED, COMBINED),
    "PairConditioningSetDefaultCombine": Run(COMBINED, COMBINED),
    "PairConditioningSetProperties": Run(),
    "PairConditioningSetPropertiesAndCombine": Run(COMBINED, COMBINED),
    "PiDConditioning": OTHER_FAMILY,
    "ReferenceLatent": OTHER_FAMILY,
    "ReferenceTimbreAudio": OTHER_FAMILY,
    "ResolutionBucket": OTHER_FAMILY,
    "SD_4XUpscale_Conditioning": OTHER_FAMILY,
    "StableCascade_StageB_Conditioning": OTHER_FAMILY,
    "StyleModelApply": "needs style model weights",
    "Trellis2ShapeStage": OTHER_FAMILY,
    "Trellis2TextureStage": OTHER_FAMILY,
    "Trellis2UpsampleStage": OTHER_FAMILY,
    "VOIDInpaintConditioning": OTHER_FAMILY,
    "Wan22FunControlToVideo": OTHER_FAMILY,
    "WanAnimate2ToVideo": OTHER_FAMILY,
    "WanAnimateToVideo": OTHER_FAMILY,
    "WanCameraImageToVideo": OTHER_FAMILY,
    "WanDancerVideo": OTHER_FAMILY,
    "WanFirstLastFrameToVideo": OTHER_FAMILY,
    "WanFunControlToVideo": OTHER_FAMILY,
    "WanFunInpaintToVideo": OTHER_FAMILY,
    "WanHuMoImageToVideo": OTHER_FAMILY,
    "WanImageToVideo": OTHER_FAMILY,
    "WanInfiniteTalkToVideo": OTHER_FAMILY,
    "WanMoveTrackToVideo": OTHER_FAMILY,
    "WanPhantomSubjectToVideo": OTHER_FAMILY,
    "WanSCAILToVideo": OTHER_FAMILY,
    "WanSoundImageToVideo": OTHER_FAMILY,
    "WanSoundImageToVideoExtend": OTHER_FAMILY,
    "WanTrackToVideo": OTHER_FAMILY,
    "WanVaceToVideo": OTHER_FAMILY,
    "unCLIPConditioning": VISION,
}  # fmt: skip
"""The host's nodes from CONDITIONING to CONDITIONING."""
NOT_RUN = (OTHER_FAMILY, WEIGHTS)
"""Why a node does not run on one of the models."""

PROMPTS = (
    "conditioning", "conditioning_to", "conditioning_1", "cond", "cond_NEW", "positive", "positive_NEW", "positive_A",
)  # fmt: skip
"""Inputs of the prompt itself, where a node takes several."""
TABLES = {"MODEL": MODELS, "CONDITIONING": CONDITIONINGS}


def takes(node, kind):
    inputs = [*node["input"].get("required", {}).values(), *node["input"].get("optional", {}).values()]
    return any(isinstance(option[0], str) and kind in option[0].split(",") for option in inputs)


@pytest.mark.parametrize("kind", TABLES)
def test_the_table_has_every_node(host, kind):
    own = {
        name
        for name, node in host.known.items()
        if node["python_module"].partition(".")[0] in ("nodes", "comfy_extras")
        and kind in node["output"]
        and takes(node, kind)
    }
    assert own - TABLES[kind].keys() == set(), "nodes missing in the table"


def unet_graph(folder):  # noqa: F811
    graph = DemoGraph(steps=2)
    negative = graph.add("CLIPTextEncode", clip=graph.demo[1], text="a red square")
    graph.set(graph.edit, negative=negative[0], preset="attribute")
    graph.set(graph.invert, key_frames="self")
    return graph, graph.demo, graph.video[0]


def wan_graph(folder):  # noqa: F811
    graph = WanGraph(folder=str(folder))
    graph.set(graph.invert, steps=2)
    graph.set(graph.edit, preset="attribute")
    return graph, graph.model, graph.add("EmptyImage", width=32, height=32, batch_size=3)[0]


GRAPHS = {"unet": unet_graph, "wan": wan_graph}
LORAS = {"unet": "random.safetensors", "wan": "wan.safetensors"}
THERE = {"unet": HONOURED.keys() - {"ModelMergeSubtract"}, "wan": OF_WAN.keys()}
"""Which nodes `test_one_side` runs."""
SETTINGS = {"unet": HONOURED, "wan": OF_WAN}


def cases(kind):
    return [
        pytest.param(name, family, side, marks=pytest.mark.slow)
        for name, run in TABLES[kind].items()
        if isinstance(run, Run)
        for family in GRAPHS
        if getattr(run, family) not in NOT_RUN
        if kind != "MODEL" or name not in THERE[family]
        for side in (SIDES if getattr(run, family) != HOST_FAILS else ["edit"])
    ]


def added(host, graph, family, name, links):
    """Add a node with its settings, and links for its other inputs, by name or type."""
    run, inputs = MODELS.get(name) or CONDITIONINGS[name], host.known[name]["input"]
    settings = {**run.settings, **SETTINGS[family].get(name, {})}
    values = {"lora_name": LORAS[family], **links}
    found = {}
    for given_as, (kind, *more) in inputs.get("required", {}).items():
        about = more[0] if more else {}
        choices = kind if isinstance(kind, list) else about.get("options")
        if given_as in settings:
            found[given_as] = settings[given_as]
        elif kind == "FLOAT" and "*" in settings:
            found[given_as] = settings["*"]
        elif given_as in values:
            found[given_as] = values[given_as]
        elif "default" in about or choices:
            found[given_as] = about.get("default", choices[0] if choices else None)
        else:
            found[given_as] = values[kind]
    for given_as, (kind, *_) in inputs.get("optional", {}).items():
        if given_as in settings or kind == "IMAGE":
            found[given_as] = settings.get(given_as, values.get("IMAGE"))
    return graph.add(name, **found)


def links_of(graph, family, sources, pixels, controlnet):
    """Links for the inputs of nodes, by name or type."""
    other = graph.add("CLIPTextEncode", clip=sources[1], text="a blue circle")[0]
    vae = sources[2] if family == "unet" else graph.add("FateZeroDemoModel")[2]
    changed = graph.add("LoraLoaderModelOnly", model=sources[0], lora_name=LORAS[family], strength_model=1.0)
    return {
        "MODEL": sources[0], "model2": changed[0], "CLIP": sources[1], "VAE": vae, "IMAGE": pixels,
        "LATENT": graph.latent[0], "MASK": left_half(graph), "STRING": "a blue circle", "CONDITIONING": other,
        "CONTROL_NET": graph.add("ControlNetLoader", control_net_name=controlnet)[0],
        "LATENT_OPERATION": graph.add("LatentOperationTonemapReinhard", multiplier=0.5)[0],
        "negative": graph.prompt[graph.edit.id]["inputs"]["negative"],
        "negative_NEW": graph.prompt[graph.edit.id]["inputs"]["negative"],
    }  # fmt: skip


def by_its_guider(host, graph, family):
    if family == "unet":
        return by_the_host(host, graph)
    return host.latents(graph.prompt, hosts_guider(graph)[0])


@contextmanager
def suppress_refusals_of(name):
    """Accept a refusal of chunks that names the node."""
    try:
        yield
    except NodeError as refused:
        if refused.report.get("exception_type") != "ValueError" or name not in str(refused):
            raise


def check(host, graph, family, side, name):
    """Check a run's outcome for a graph with the node on one side or both."""
    run = MODELS.get(name) or CONDITIONINGS[name]
    outcome = getattr(run, family)
    if outcome == HOST_FAILS:
        with pytest.raises(NodeError) as failed:
            by_its_guider(host, graph, family)
        assert "FateZero" not in failed.value.report["node_type"]
        return
    if outcome != RIGHT and not (family == "wan" and run.alike and side == "both"):
        with pytest.raises(NodeError, match=outcome.replace("{kind}", name)):
            given(host, graph)
        return
    computed = given(host, graph)
    graph.set(graph.invert, memory=run.memory if family == "wan" else "queries_keys")
    assert relative(given(host, graph), computed) < run.within
    graph.set(graph.invert, memory="recompute")
    if family == "unet":
        graph.set(graph.edit, chunk_frames=2)
        with suppress_refusals_of(name):
            assert relative(given(host, graph), computed) < run.within
        graph.set(graph.edit, chunk_frames=0)
    graph.set(graph.edit, preset="none")
    assert relative(given(host, graph), by_its_guider(host, graph, family)) < run.within


@pytest.fixture(scope="module")
def hypernetwork(host):
    """Write a hypernetwork with the widths of both models, in the common layout."""
    random, widths = torch.Generator().manual_seed(0), (16, 24, 32, 64, 96, 128, 256)
    layers = {w: {"linear.weight": 0.1 * torch.randn(w, w, generator=random) / w**0.5} for w in widths}
    place = host.base / "models/hypernetworks"
    place.mkdir(exist_ok=True)
    torch.save({w: [{**layer, "linear.bias": torch.zeros(w)}] * 2 for w, layer in layers.items()}, place / "random.pt")
    return "random.pt"


@pytest.mark.parametrize(("name", "family", "side"), cases("MODEL"))
def test_a_node_on_a_model(host, folder, lora, wan_lora, controlnet, hypernetwork, name, family, side):  # noqa: F811
    if name not in host.known:
        pytest.skip(f"this host has no {name}")
    graph, sources, pixels = GRAPHS[family](folder)
    links = links_of(graph, family, sources, pixels, controlnet) | {"hypernetwork_name": hypernetwork}
    node = added(host, graph, family, name, links)
    on(graph, side, "model", "model", node[host.known[name]["output"].index("MODEL")])
    check(host, graph, family, side, name)


@pytest.mark.parametrize(("name", "family", "side"), cases("CONDITIONING"))
def test_a_node_on_prompts(host, folder, lora, wan_lora, controlnet, name, family, side):  # noqa: F811
    if name not in host.known:
        pytest.skip(f"this host has no {name}")
    graph, sources, pixels = GRAPHS[family](folder)
    links = links_of(graph, family, sources, pixels, controlnet)
    made = [i for i, kind in enumerate(host.known[name]["output"]) if kind == "CONDITIONING"]
    for end, prompt in (("inversion", graph.words[0]), ("edit", graph.words[1])):
        if side in (end, "both"):
            prompts = dict.fromkeys(PROMPTS, prompt)
            node = added(host, graph, family, name, links | prompts)
            if end == "inversion":
                graph.set(graph.invert, source=node[made[0]])
            else:
                graph.set(graph.edit, positive=node[made[0]])
                if len(made) > 1:
                    graph.set(graph.edit, negative=node[made[1]])
    check(host, graph, family, side, name)
