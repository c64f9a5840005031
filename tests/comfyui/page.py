"""The host's page in headless Chromium."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comfyui.host import Host

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOW = "no browser found: install Chromium (Debian's package chromium)"
READY = "() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100"


@dataclass
class Page:
    """The page, open; `errors` are what it complained of."""

    tab: Any
    errors: list[str] = field(default_factory=list)

    def open(self, workflow: dict[str, Any], name: str) -> None:
        """Load a workflow as the page's own menu does."""
        self.tab.evaluate("([w, name]) => app.loadGraphData(w, true, true, name)", [workflow, name])
        self.tab.wait_for_timeout(500)

    def serialized(self) -> dict[str, Any]:
        return json.loads(self.tab.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """What the page would queue, in API format."""
        return self.tab.evaluate("async () => (await app.graphToPrompt()).output")

    def missing(self) -> list[str]:
        """Node types that the page does not know."""
        return self.tab.evaluate(
            "() => app.graph._nodes.filter(n => !(n.type in LiteGraph.registered_node_types)).map(n => n.type)"
        )

    def run(self, timeout: float = 240) -> str:
        """Queue what is open, as its button does, and wait for the end: the last message about it."""
        self.tab.evaluate("""() => {
            window.ended = null
            for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
                app.api.addEventListener(kind, () => { window.ended ??= kind })
            app.queuePrompt(0, 1)
        }""")
        self.tab.wait_for_function("() => window.ended", timeout=timeout * 1000)
        return self.tab.evaluate("() => window.ended")

    def picture(self, path: Path) -> None:
        """The page with the whole graph in view."""
        self.tab.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        self.tab.wait_for_timeout(1500)
        self.tab.screenshot(path=str(path))


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
            page = Page(tab)
            tab.on("pageerror", lambda error: page.errors.append(str(error)))
            tab.goto(host.url)
            tab.wait_for_function(READY, timeout=60_000)
            yield page
        finally:
            browser.close()
