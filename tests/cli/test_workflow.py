"""A job's settings in the workflow sent to a ComfyUI server."""

import json
from pathlib import Path

import pytest

from fatezero.cli.batch.servers import filled
from fatezero.cli.config.settings import PRESETS, ConfigError, EditConfig, with_preset

API = Path(__file__).parents[2] / "workflows" / "api"


def graph(name):
    return json.loads((API / f"{name}.json").read_text(encoding="utf-8"))


def nodes(made, kind):
    return [node["inputs"] for node in made.values() if node["class_type"] == kind]


def test_settings_are_written_to_inputs_of_other_names():
    job = {
        "video": "a.mp4", "source": "a jeep", "target": "a red jeep", "negative": "blurry", "guidance_scale": 9,
        "steps": 12, "key_frames": ["self", -1], "size": [320, 256], "crop": [1, 2, 3, 4], "reweight": {"red": 3},
        "strength": 0.8, "count": 4,
    }  # fmt: skip
    before = graph("style")
    made = filled(before, job, {})
    [sampler], [inverted] = nodes(made, "FateZeroSampler"), nodes(made, "FateZeroInvert")
    [loader], [prompt], [negative] = (
        nodes(made, k) for k in ("FateZeroLoadVideo", "FateZeroPromptEdit", "CLIPTextEncode")
    )
    assert (sampler["guidance"], sampler["strength"], sampler["preset"]) == (9, 0.8, "style")
    assert (inverted["steps"], inverted["key_frames"]) == (12, "self, -1")
    assert (loader["file"], loader["width"], loader["height"], loader["count"]) == ("a.mp4", 320, 256, 4)
    assert [loader[f"crop_{side}"] for side in ("left", "top", "right", "bottom")] == [1, 2, 3, 4]
    assert (prompt["source"], prompt["target"], prompt["reweight"]) == ("a jeep", "a red jeep", "red=3")
    assert negative["text"] == "blurry"
    assert before == graph("style"), "the workflow itself is unchanged"


@pytest.mark.parametrize(
    "preset",
    [name for name in PRESETS if name not in ("tokenflow", "tune_a_video") and PRESETS[name].get("noise") != "drawn"],
)
def test_a_preset_sets_the_same_as_in_the_command(preset):
    words = {"source": "a silver jeep", "target": "a red jeep"}
    made = filled(graph("attribute"), {**words, "preset": preset}, {})
    config = with_preset(EditConfig(**words), preset)
    [sampler], [inverted] = nodes(made, "FateZeroSampler"), nodes(made, "FateZeroInvert")
    assert (sampler["preset"], sampler["guidance"]) == (preset, config.guidance_scale)
    assert nodes(made, "FateZeroPromptEdit")[0]["mode"] == config.mode
    keys = (
        ", ".join(PRESETS[preset].get("key_frames", ())) or nodes(graph("attribute"), "FateZeroInvert")[0]["key_frames"]
    )
    assert inverted["key_frames"] == keys


def test_a_jobs_own_settings_override_its_preset():
    made = filled(graph("attribute"), {"preset": "style+", "guidance_scale": 9}, {})
    assert nodes(made, "FateZeroSampler")[0]["guidance"] == 9


def test_presets_of_other_papers_need_their_nodes():
    flows = graph("attribute") | {"flow": {"class_type": "FateZeroTokenFlow", "inputs": {"batch_frames": 4}}}
    made = filled(flows, {"preset": "tokenflow", "tokenflow": {"batch_frames": 2}}, {})
    [sampler], [inverted] = nodes(made, "FateZeroSampler"), nodes(made, "FateZeroInvert")
    assert (sampler["preset"], inverted["key_frames"]) == ("pnp", "self")
    assert nodes(made, "FateZeroTokenFlow")[0]["batch_frames"] == 2
    drawn = graph("attribute") | {
        "noise": {"class_type": "FateZeroFlowEdit", "inputs": {"source_guidance": 4.0, "variant": "paper"}}
    }
    made = filled(drawn, {"preset": "wan_edit", "flow_edit": {"source_guidance": 3.0}}, {})
    assert nodes(made, "FateZeroFlowEdit") == [{"source_guidance": 3.0, "variant": "wan_edit"}]
    assert (nodes(made, "FateZeroSampler")[0]["guidance"], nodes(made, "FateZeroSampler")[0]["strength"]) == (
        12.0,
        0.76,
    )
    for preset, node in (("tokenflow", "FateZeroTokenFlow"), ("flow_edit", "FateZeroFlowEdit")):
        with pytest.raises(ConfigError, match=f"preset {preset} needs one node {node}"):
            filled(graph("attribute"), {"preset": preset}, {})


@pytest.mark.parametrize(
    ("name", "job", "message"),
    [
        ("style", {"lora": "a.safetensors"}, "no node has an input lora"),
        ("style", {"edit_mask": "m.png"}, "no node has an input edit_mask"),
        ("style", {"propagation": "tokenflow"}, "no node has an input propagation"),
        ("style", {"smoothing": 0.8}, "no node has an input smoothing"),
        ("style", {"tokenflow": {"batch_frames": 2}}, "tokenflow needs one node FateZeroTokenFlow"),
        ("style", {"guidance_scale": "much"}, "guidance_scale is 'much'"),
        ("style", {"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ("style", {"start": "2.5s"}, "start is '2.5s'; input start of node 2"),
        ("style", {"preset": "nonsense"}, "preset 'nonsense' is unknown"),
        ("style", {"preset": 3}, "preset 3 is unknown"),
        ("one_inversion_three_edits", {"guidance_scale": 9}, "nodes .* have an input guidance_scale"),
    ],
)
def test_a_setting_without_a_node_is_refused_by_name(name, job, message):
    with pytest.raises(ConfigError, match=message):
        filled(graph(name), job, {})


def test_inputs_select_the_node_of_a_setting():
    made = filled(graph("style"), {"guidance_scale": 9, "seed": 3}, {"guidance_scale": "10.strength", "seed": "9.seed"})
    assert made["10"]["inputs"]["strength"] == 9 and made["9"]["inputs"]["seed"] == 3
    with pytest.raises(ConfigError, match="inputs: seed"):
        filled(graph("style"), {"seed": 3}, {"seed": "nowhere"})
