"""The bundled workflows, and running them with the demo's models."""

import json
import shutil
from fractions import Fraction

from comfyui.host import REPO

from clips import flashes

FOLDER = REPO / "workflows"
DEMO = {
    "custom_sampler": 6,
    "demo": 3,
    "flow_any_demo": 10,
    "layout_move_object": 4,
    "layout_new_clip": 3,
    "mask_correction": 9,
    "one_inversion_three_edits": 8,
    "measure": 7,
    "tokenflow": 5,
    "tune_a_video": 11,
    "wan_demo": 12,
}
"""Workflows without model files, and their steps in tests; all different, so that none is cached."""
WITH_STEPS = {"FateZeroInvert": 0, "FateZeroSigmas": 0, "FateZeroFlowEdit": 0, "BasicScheduler": 1, "LTXVScheduler": 0}
"""Nodes with a number of steps, and the index of its widget."""
WAN_FILES = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
"""Nodes that load Wan's parts, and the output of the demo's video model used instead."""

FLOWS = {
    "flow_edit_h3": "h3",
    "flow_edit_ltx2": "ltxav",
    "flow_edit_qwen_image": "qwen",
    "h3": "h3",
    "ltx2": "ltxav",
    "wan_i2v": "i2v_without_embedding",
    "wan_vace": "vace",
}
"""Workflows with a small random model instead of files, and its kind."""
WITH_WORDS = {"h3": "JointLoader", "ltx2": "LTXLoader", "wan_i2v": "WanLoader", "wan_vace": "WanLoader"}
"""Those with Prompt Edit, and the loader whose text has words."""
FLOW_FILES = {
    "UNETLoader": {0: 0}, "CheckpointLoaderSimple": {0: 0, 2: 2}, "CLIPLoader": {0: 1},
    "LTXAVTextEncoderLoader": {0: 1}, "VAELoader": {0: 2}, "LTXVAudioVAELoader": {0: 3},
}  # fmt: skip
"""Nodes that load their parts, and the outputs of *FlowLoader* used instead."""
LENGTHS = {"flow_edit_h3": 22, "flow_edit_ltx2": 9, "h3": 22, "ltx2": 9, "wan_i2v": 9, "wan_vace": 9}
"""Frames of the clip in tests, for models that do not accept three."""


def read(name: str, folder=FOLDER):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def stood_in(name, prompt, host, lora, controlnet):
    """A workflow with small models in place of its files, a short clip and few steps."""
    return of_flow(name, prompt, host) if name in FLOWS else of_demo(prompt, host, lora, controlnet)


def of_flow(name, prompt, host):
    """A workflow with a small random model and a clip with sound."""
    flashes(host.base / "input" / "sounding.mp4", times=[Fraction(i, 24) for i in range(24)])
    shutil.copy(REPO / "demo" / "overview.png", host.base / "input" / "example.png")
    parts = {}
    for node, given in prompt.items():
        if given["class_type"] in FLOW_FILES:
            sound = "audio" in given["inputs"].get("vae_name", "")
            parts[node] = {0: 3} if sound else FLOW_FILES[given["class_type"]]
    for given in prompt.values():
        inputs, kind = given["inputs"], given["class_type"]
        inputs |= {k: ["parts", parts[v[0]][v[1]]] for k, v in inputs.items() if isinstance(v, list) and v[0] in parts}
        if kind == "FateZeroLoadVideo":
            inputs |= {"file": "sounding.mp4", "width": 64, "height": 64, "count": LENGTHS[name]}
        elif kind == "EmptyMiniMaxH3LatentAV":
            inputs |= {"width": 64, "height": 64}
        elif kind == "FluxKontextImageScale":
            given |= {"class_type": "ImageScale"}
            inputs |= {"upscale_method": "area", "width": 64, "height": 64, "crop": "disabled"}
        elif kind in WITH_STEPS:
            inputs["steps"] = 2
    kept = {node: given for node, given in prompt.items() if node not in parts}
    loader = {"class_type": WITH_WORDS.get(name, "FlowLoader"), "inputs": {"kind": FLOWS[name]}}
    return kept | {"parts": loader}


def of_demo(prompt, host, lora, controlnet):
    """A workflow for real models, with the demo's model and clip instead, and few steps."""
    shutil.copy(REPO / "demo" / "clip.mp4", host.base / "input")
    words = {"source": "a red square on water", "target": "a blue circle on water"}
    placed = any(node["class_type"] == "FateZeroLayout" for node in prompt.values())  # its words are in its prompt
    parts = {name: WAN_FILES[node["class_type"]] for name, node in prompt.items() if node["class_type"] in WAN_FILES}
    for node in prompt.values():
        inputs, kind = node["inputs"], node["class_type"]
        inputs |= {k: [v[0], parts[v[0]]] for k, v in inputs.items() if isinstance(v, list) and v[0] in parts}
        if kind in WAN_FILES:
            node |= {"class_type": "FateZeroDemoVideoModel", "inputs": {}}
        elif kind == "CheckpointLoaderSimple":
            node |= {"class_type": "FateZeroDemoModel", "inputs": {}}
        elif kind == "FateZeroLoadVideo":
            inputs |= {"width": 64, "height": 64, "count": 3} | ({} if "video" in inputs else {"file": "clip.mp4"})
        elif kind == "FateZeroPromptEdit" and isinstance(inputs["source"], str) and not placed:
            inputs |= words | {"blend_source": "", "blend_target": ""}
        elif kind == "EmptyLatentImage":
            inputs["batch_size"] = 3
        elif kind in WITH_STEPS or kind == "FateZeroTuneOnVideo":
            inputs["steps"] = 2
        elif kind == "LoraLoaderModelOnly":
            inputs["lora_name"] = lora
        elif kind == "ControlNetLoader":
            inputs["control_net_name"] = controlnet
    return prompt
