"""The bundled workflows: run without a page, opened in the page, and run there."""

import json
import os

import pytest
from comfyui import page as browser
from comfyui.layout_of_nodes import groups_of, lay_out, members_of, overlaps
from comfyui.shipped import DEMO, FLOWS, FOLDER, LENGTHS, WITH_STEPS, of_demo, read, stood_in
from comfyui.write_pictures import PICTURES, mark_of
from PIL import Image

from fatezero.video.read import read_video

NAMES = (
    "attribute", "controlnet_lora", "custom_sampler", "demo", "enhance",
    "flow_any_demo", "flow_edit_h3", "flow_edit_ltx2", "flow_edit_qwen_image", "flow_edit_wan_4_steps", "h3",
    "layout_move_object", "layout_new_clip", "ltx2",
    "mask_correction", "measure",
    "one_inversion_three_edits", "remove", "shape", "style", "tokenflow",
    "tune_a_video", "wan", "wan_demo", "wan_i2v", "wan_vace",
)  # fmt: skip
OFTEN = ("demo",)
"""Workflows that run in the page by default; the others run as prompts, equal to the page's."""
REPORTS = {
    "layout_new_clip": "predictions of",
    "flow_any_demo": "mask from the predictions for both prompts",
    **{name: "sampled noise (FlowEdit)" for name in FLOWS if name.startswith("flow")},
}
"""A part of the report of workflows without inversion."""
ROOMS = ("demo", "wan")
"""Workflows whose layout is checked by default."""


def test_every_workflow_has_a_thumbnail_and_a_twin():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == list(NAMES)
    assert sorted(path.stem for path in (FOLDER / "api").glob("*.json")) == list(NAMES)
    for name in NAMES:
        assert min(Image.open(FOLDER / f"{name}.jpg").size) >= 200
        workflow = read(name)
        assert workflow["groups"]
        assert any("Note" in node["type"] for node in workflow["nodes"])


def test_pictures_of_the_page_show_the_current_workflows():
    for path, name in PICTURES.items():
        assert Image.open(path).info.get("comment") == mark_of(name).encode(), "run tests/comfyui/write_pictures.py"


@pytest.mark.every_host
@pytest.mark.parametrize("name", NAMES)
def test_the_api_twins_run_to_a_video(host, lora, controlnet, name):
    twin = read(name, FOLDER / "api")
    if not {node["class_type"] for node in twin.values()} <= set(host.known):
        pytest.skip("the host does not have the model's nodes")
    prompt = stood_in(name, twin, host, lora, controlnet)
    run = host.run(prompt)
    saved = [node for node in prompt if prompt[node]["class_type"] in ("SaveVideo", "SaveImage")]
    assert len(saved) == {"one_inversion_three_edits": 3, "measure": 2, "wan_demo": 2, "flow_any_demo": 2}.get(name, 1)
    for node in saved:
        if prompt[node]["class_type"] == "SaveImage":
            assert Image.open(host.file(run, node)).size == (64, 64)
            continue
        made = prompt[prompt[node]["inputs"]["video"][0]]
        compared = made["class_type"] == "FateZeroCompareVideos"
        video = read_video(host.file(run, node))
        assert video.frames.shape == (LENGTHS.get(name, 3), 64, 128 if compared else 64, 3)
        assert (video.sound is not None) == (name in FLOWS and "audio" in made["inputs"])


@pytest.mark.slow
def test_changing_one_of_three_edits_changes_only_that_one(host, lora, controlnet):
    prompt = of_demo(read("one_inversion_three_edits", FOLDER / "api"), host, lora, controlnet)
    host.run(prompt)
    edits = [node for node in prompt.values() if node["class_type"] == "FateZeroPromptEdit"]
    edits[1]["inputs"]["target"] = "a purple square on water"
    run = host.run(prompt)
    assert [prompt[node]["class_type"] for node in run.executed()].count("FateZeroSampler") == 1
    assert not {node for node in run.executed() if prompt[node]["class_type"] == "FateZeroInvert"}


@pytest.fixture(scope="module")
def page(host):
    if browser.CHROMIUM is None:
        pytest.skip(browser.HOW)
    with browser.opened(host) as opened:
        yield opened


@pytest.mark.parametrize("name", NAMES)
def test_the_page_opens_a_workflow_completely(page, name):
    workflow = read(name)
    page.errors.clear()
    page.open(workflow, name)
    shown = page.serialized()
    assert page.missing() == []
    assert {node["id"] for node in shown["nodes"]} == {node["id"] for node in workflow["nodes"]}
    assert sorted(link[:5] for link in shown["links"]) == sorted(link[:5] for link in workflow["links"])
    assert [group["title"] for group in shown["groups"]] == [group["title"] for group in workflow["groups"]]
    queued = page.prompt()
    for node in queued.values():
        node["inputs"].pop("video-preview", None)  # a widget that the page adds
    assert queued == read(name, FOLDER / "api")
    assert page.errors == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ROOMS else pytest.mark.slow) for n in NAMES])
def test_nodes_do_not_overlap_with_files_previews_and_texts(host, page, lora, controlnet, name):
    """In both node designs. With FATEZERO_LAY_OUT=1 it moves overlapping nodes and groups apart instead."""
    host.forget()
    workflow = read(name)
    page.design(newer=False)
    page.open(workflow, name)
    prompt = host.complete(stood_in(name, page.prompt(), host, lora, controlnet))
    page.choose("FateZeroLoadVideo", "file", "sounding.mp4" if name in FLOWS else "clip.mp4")
    boxes = {"chosen": page.boxes()}
    assert page.queue(host, prompt) == "execution_success"
    for newer in (False, True):
        page.design(newer)
        boxes["newer design" if newer else "older design"] = page.boxes()
        assert REPORTS.get(name, "hooked") in "\n".join(page.texts())
    page.design(newer=False)
    if os.environ.get("FATEZERO_LAY_OUT"):
        lay_out(workflow, boxes.values())
        path = FOLDER / f"{name}.json"
        indent = path.read_text(encoding="utf-8").index('"') - 2
        path.write_text(json.dumps(workflow, indent=indent) + "\n", encoding="utf-8")
    found = {when: overlaps(boxes[when], groups_of(workflow), members_of(workflow)) for when in boxes}
    assert found == {when: [] for when in boxes}
    assert page.errors == []


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in OFTEN else pytest.mark.slow) for n in DEMO])
def test_the_page_runs_a_demo(host, page, name):
    """With fewer frames and steps, for time. Its texts stay when another workflow is opened and after a reload."""
    page.errors.clear()
    host.forget()  # texts of cached nodes are not sent again
    workflow, frames = read(name), 3
    for node in workflow["nodes"]:
        if node["type"] == "FateZeroLoadVideo":
            node["widgets_values"][3] = frames
        elif node["type"] in WITH_STEPS:
            node["widgets_values"][WITH_STEPS[node["type"]]] = DEMO[name]
        elif node["type"] == "FateZeroTuneOnVideo":
            node["widgets_values"][0] = 2
        elif node["type"] == "EmptyLatentImage":
            node["widgets_values"][2] = 4
    page.open(workflow, name)
    assert page.run() == "execution_success"
    page.boxes()
    texts = page.texts()
    shown = "\n".join(texts)
    layers = "12 of 12" if name == "wan_demo" else "14 of 14"
    expected = (f"{frames} frames, {DEMO[name]} steps", " <- square", f"hooked {layers} attention layers")
    for text in (REPORTS[name],) if name in REPORTS else expected:
        assert text in shown  # the store's bytes, the alignment and the report are shown on their nodes
    page.open(read("style"), "another")
    page.boxes()
    assert page.texts() == []
    for again in (page.back, page.reload):
        again()
        page.boxes()
        assert page.texts() == texts
    assert page.errors == []
