"""The host's page in headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from comfyui.host import Host

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOW = "no browser found: install Chromium (Debian's package chromium)"
ACTIVE = "app.extensionManager.workflow.activeWorkflow?.path"
"""The open workflow."""
READY = f"() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100 && {ACTIVE}"
"""Whether the page has opened its first workflow, which would replace one opened earlier."""
SETTLED = """async pictures => {
    const boxes = () => app.graph._nodes.map(node => {
        const drawn = LiteGraph.vueNodesMode && document.querySelector(`[data-node-id="${node.id}"]`)
        if (!drawn) return [String(node.id), ...node.boundingRect]
        const { x, y, width, height } = drawn.getBoundingClientRect(), { scale, offset } = app.canvas.ds
        const canvas = app.canvas.canvas.getBoundingClientRect()
        return [String(node.id), (x - canvas.x) / scale - offset[0], (y - canvas.y) / scale - offset[1],
            width / scale, height / scale]
    })
    const loaded = () => !pictures || [...document.images].every(image => image.complete)
        && [...document.querySelectorAll('video')].every(video => video.readyState > 0)
    for (let before = '', alike = 0; alike < 3 || !loaded();) {
        const drawn = app.canvas.frame
        app.canvas.setDirty(true, true)
        while (app.canvas.frame === drawn) await new Promise(requestAnimationFrame)
        const now = JSON.stringify(boxes())
        alike = now === before ? alike + 1 : 0
        before = now
    }
    return boxes()
}"""
"""Position and size of each node with its title, once they are equal in three frames and, on request, pictures
are loaded."""


INNER = """async title => {
    const outer = app.graph._nodes.find(node => node.title === title), inner = outer.subgraph
    app.canvas.openSubgraph(inner, outer)
    for (const drawn = app.canvas.frame; app.canvas.frame < drawn + 3;) {
        app.canvas.setDirty(true, true)
        await new Promise(requestAnimationFrame)
    }
    const ends = [['inputs', ...inner.inputNode.boundingRect], ['outputs', ...inner.outputNode.boundingRect]]
    const boxes = [...inner._nodes.map(node => [`${node.id} ${node.type}`, ...node.boundingRect]), ...ends]
    app.canvas.setGraph(outer.graph)
    return boxes
}"""
PLACE = """() => {
    const { scale, offset } = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect()
    const boxes = app.graph._nodes.map(node => node.boundingRect).concat(app.graph._groups.map(one => one._bounding))
    const onPage = (value, i, margin) => (value + offset[i]) * scale + [canvas.x, canvas.y][i] + margin
    const low = i => onPage(Math.min(...boxes.map(box => box[i])), i, -12)
    const high = i => onPage(Math.max(...boxes.map(box => box[i] + box[i + 2])), i, 12)
    return [low(0), low(1), high(0), high(1)]
}"""
"""Left, top, right and bottom of the graph on the page, with a margin."""


@dataclass
class Page:
    """The open page; `errors` are its console errors."""

    tab: Any
    errors: list[str] = field(default_factory=list)

    def open(self, workflow: dict[str, Any], name: str) -> None:
        """Load a workflow as the page's own menu does."""
        self.tab.evaluate("([w, name]) => app.loadGraphData(w, true, true, name)", [workflow, name])
        self.tab.evaluate(SETTLED, False)

    def serialized(self) -> dict[str, Any]:
        return json.loads(self.tab.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """The prompt that the page would queue, in API format."""
        return self.tab.evaluate("async () => (await app.graphToPrompt()).output")

    def missing(self) -> list[str]:
        """Node types unknown to the page."""
        return self.tab.evaluate(
            "() => app.graph._nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"
        )

    def design(self, newer: bool) -> None:
        """Select the page's older or newer node design."""
        self.tab.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", newer)
        self.tab.wait_for_function("on => LiteGraph.vueNodesMode === on", arg=newer)

    def choose(self, kind: str, widget: str, value: str) -> None:
        """Choose a value on all nodes of a kind."""
        self.tab.evaluate(
            """([kind, name, value]) => app.graph._nodes.filter(n => n.type === kind).forEach(node => {
                const widget = node.widgets.find(w => w.name === name)
                widget.value = value
                widget.callback?.(value)
            })""",
            [kind, widget, value],
        )

    def boxes(self) -> dict[str, tuple[float, float, float, float]]:
        """Left, top, right and bottom of each node as drawn, once the layout is stable."""
        self.tab.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        found = self.tab.evaluate(SETTLED, True)
        return {name: (x, y, x + width, y + height) for name, x, y, width, height in found}

    def inner_boxes(self, title: str) -> dict[str, tuple[float, float, float, float]]:
        """Left, top, right and bottom of each node inside a subgraph, which is opened, and of its two end nodes."""
        found = self.tab.evaluate(INNER, title)
        return {name: (x, y, x + width, y + height) for name, x, y, width, height in found}

    def texts(self) -> list[str]:
        """The read-only texts shown by nodes, sorted: the page orders them as it made their boxes."""
        found = self.tab.evaluate(
            """() => [...document.querySelectorAll('textarea[readonly]')]
                .filter(text => text.checkVisibility() && text.clientHeight > 10).map(text => text.value)"""
        )
        return sorted(found)

    def queue(self, host: Host, prompt: dict[str, Any]) -> str:
        """Run a prompt of the open nodes on the host, wait for its end, and return the last message."""
        client = self.tab.evaluate("() => app.api.clientId")
        return self._until_end(lambda: host.post("/prompt", {"prompt": prompt, "client_id": client}))

    def run(self) -> str:
        """Queue the open workflow as by its button, wait for its end, and return the last message."""
        return self._until_end(lambda: self.tab.evaluate("() => { app.queuePrompt(0, 1) }"))

    def _until_end(self, queue: Callable[[], Any]) -> str:
        self.tab.evaluate("""() => {
            window.ended = null
            for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
                app.api.addEventListener(kind, () => { window.ended ??= kind })
        }""")
        queue()
        self.tab.wait_for_function("() => window.ended")
        return self.tab.evaluate("() => window.ended")

    def taken(self, graph_alone: bool = False) -> bytes:
        """A PNG of the page with the whole graph in view, or of only the graph."""
        self.boxes()
        if not graph_alone:
            return self.tab.screenshot()
        left, top, right, bottom = self.tab.evaluate(PLACE)
        return self.tab.screenshot(clip={"x": left, "y": top, "width": right - left, "height": bottom - top})

    def reload(self) -> None:
        """Reload the page, which reopens the open workflow."""
        self.tab.reload()
        self.tab.wait_for_function(READY)

    def back(self) -> None:
        """Switch to the tab of the workflow opened before."""
        before = self._active()
        self.tab.evaluate("() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')")
        self.tab.wait_for_function(f"before => {ACTIVE} !== before", arg=before)

    def _active(self) -> str:
        return self.tab.evaluate(f"() => {ACTIVE}")


@contextmanager
def opened(host: Host, width: int = 1900, height: int = 1000) -> Iterator[Page]:
    """The page of a running host."""
    from playwright.sync_api import sync_playwright

    host.post(
        "/settings",
        {
            "Comfy.TutorialCompleted": True,
            "Comfy.Minimap.Visible": False,
            "LiteGraph.Canvas.MaximumFps": 5,
            "LiteGraph.Canvas.LowQualityRenderingZoomThreshold": 0.1,
        },
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        try:
            tab = browser.new_page(viewport={"width": width, "height": height})
            tab.set_default_timeout(0)
            page = Page(tab)
            tab.on("pageerror", lambda error: page.errors.append(str(error)))
            tab.goto(host.url)
            tab.wait_for_function(READY)
            yield page
        finally:
            browser.close()
