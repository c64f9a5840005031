"""The workflows that ship, and how tests run them with the demo's models."""

import json
import shutil

from comfyui.host import REPO

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
"""Those that need no model file, and in how many steps the tests run them; no two alike, so that none is cached."""
WITH_STEPS = {"FateZeroInvert": 0, "FateZeroSigmas": 0, "FateZeroFlowEdit": 0, "BasicScheduler": 1}
"""The nodes that have a number of steps, and the place of its widget."""
WAN_FILES = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
"""The nodes that load Wan's parts, and which output of the demo's video model takes the place of each."""


def read(name: str, folder=FOLDER):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def of_demo(prompt, host, lora, controlnet):
    """A workflow for real models, with the demo's model and clip in their place and few steps."""
    shutil.copy(REPO / "demo" / "clip.mp4", host.base / "input")
    words = {"source": "a red square on water", "target": "a blue circle on water"}
    placed = any(node["class_type"] == "FateZeroLayout" for node in prompt.values())  # whose words are its prompt's
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
