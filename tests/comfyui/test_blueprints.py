"""Blueprints: one node for a whole edit; found in the page's search, connected and run."""

import json

import pytest
import torch
from comfyui import page as browser
from comfyui.graph import SIDE, SOURCE, TARGET, DemoGraph
from comfyui.host import REPO
from comfyui.layout_of_nodes import overlaps
from comfyui.test_mixing import edited

FOLDER = REPO / "subgraphs"
KINDS = ("Attribute", "Shape", "Style")

CONNECT = """([title, values]) => {
    const edit = app.graph._nodes.find(n => n.title === title)
    const demo = LiteGraph.createNode('FateZeroDemoModel'), save = LiteGraph.createNode('SaveVideo')
    demo.pos = [edit.pos[0] - 450, edit.pos[1]]; save.pos = [edit.pos[0] + 500, edit.pos[1]]
    app.graph.add(demo); app.graph.add(save)
    for (const [from, to] of [['model', 'model'], ['clip', 'clip'], ['vae', 'vae'], ['video', 'video']])
        demo.connect(demo.outputs.findIndex(o => o.name.toLowerCase().includes(from)), edit,
            edit.inputs.findIndex(i => i.name === to))
    edit.connect(edit.outputs.findIndex(o => o.name === 'video'), save, 0)
    for (const [name, value] of Object.entries(values)) {
        const widget = edit.widgets.find(w => w.name === name || w.label === name)
        if (!widget) throw new Error('no widget ' + name + ' among ' + edit.widgets.map(w => w.name))
        widget.value = value
    }
}"""


VALUES = {
    "source": SOURCE, "target": TARGET, "frames": 3, "width": SIDE, "height": SIDE, "steps": 4, "guidance": 7.5
}  # fmt: skip
"""A user's changes: the prompts, and no other words."""


def find(page, title):
    """Double-click the canvas, type, and place the first result, as a user does."""

    def until(state):
        page.tab.wait_for_function(f"([title, x, y]) => {state}", arg=[title, 900, 500])

    page.tab.mouse.dblclick(900, 500)
    until("document.activeElement.role === 'combobox'")
    page.tab.keyboard.type(title)
    until("document.querySelector('[role=option]')?.textContent.includes(title)")
    page.tab.keyboard.press("Enter")
    until("app.graph._nodes.some(n => n.title === title)")
    until("document.elementFromPoint(x, y).tagName === 'CANVAS'")
    page.tab.mouse.click(900, 500)
    until("app.graph._nodes.every(n => !n.flags.ghost)")


@pytest.mark.skipif(browser.CHROMIUM is None, reason=browser.HOW)
@pytest.mark.parametrize("kinds", [KINDS[1:2], pytest.param(KINDS, marks=pytest.mark.slow)])
def test_a_blueprint_is_found_and_edits(host, kinds):
    with browser.opened(host) as page:
        for kind in kinds:
            title = f"{kind} Edit (FateZero)"
            page.open({"nodes": [], "links": [], "version": 0.4}, kind)
            find(page, title)
            page.tab.evaluate(CONNECT, [title, VALUES])
            assert page.missing() == []
            prompt = page.prompt()
            (sampler,) = (n for n, node in prompt.items() if node["class_type"] == "FateZeroSampler")
            assert prompt[sampler]["inputs"]["preset"] == f"{kind.lower()}+"
            found = host.latents(prompt, [sampler, 0])
            plain = DemoGraph()
            plain.set(plain.edit, preset=f"{kind.lower()}+")
            assert torch.equal(found, edited(host, plain)), "the same edit as by separate nodes"
            assert page.run() == "execution_success"
            assert overlaps(page.inner_boxes(title), {}, {}) == []
        page.tab.evaluate("([title, v]) => { app.graph._nodes.find(n => n.title === title).widgets.find("
                          "w => w.name === 'target').value = v }", [title, "a blue square on water"])  # fmt: skip
        again = page.prompt()
        run = host.run(again)
        ran = {
            again[n.removesuffix(".source")]["class_type"] for n in run.executed() if n.removesuffix(".source") in again
        }
        assert "FateZeroSampler" in ran and "FateZeroInvert" not in ran
        assert page.errors == []


def test_no_words_of_the_bundled_prompts_remain_in_other_widgets():
    """Blend words and weights of nodes are empty: the words that change, and no weights."""
    paths = [*FOLDER.glob("*.json"), *(REPO / "workflows").glob("*.json")]
    graphs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    graphs += [inner for graph in graphs for inner in graph.get("definitions", {}).get("subgraphs", [])]
    pairs = [node for graph in graphs for node in graph["nodes"] if node["type"] == "FateZeroPromptEdit"]
    without = [path for path in paths if path.stem.startswith("flow_") or path.stem == "layout_new_clip"]
    assert len(pairs) >= len(paths) - len(without), "FlowEdit matches no words, and a generated clip has no source"
    assert [node["widgets_values"][3:] for node in pairs] == [["", "", ""]] * len(pairs)


def test_blueprints_contain_the_current_nodes(host):
    """Every inner node has the widgets of the host's node, in the same order."""
    for path in FOLDER.glob("*.json"):
        blueprint = json.loads(path.read_text(encoding="utf-8"))
        (inner,) = blueprint["definitions"]["subgraphs"]
        assert inner["name"] == path.stem == blueprint["nodes"][0]["title"]
        for node in inner["nodes"]:
            about = host.known[node["type"]]["input"]
            known = {**about.get("required", {}), **about.get("optional", {})}
            assert {i["name"] for i in node["inputs"]} - {"upload"} <= set(known), node["type"]
