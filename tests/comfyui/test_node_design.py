"""The host's newer node design (Comfy.VueNodes.Enabled); a separate module, as only one page is open at a time."""

import pytest
from comfyui import page as browser
from comfyui.shipped import read


@pytest.mark.slow
def test_the_newer_node_design_keeps_line_breaks_and_hides_ignored_widgets(host):
    if browser.CHROMIUM is None:
        pytest.skip(browser.HOW)
    workflow = read("demo")
    for node in workflow["nodes"]:
        if node["type"] == "FateZeroInvert":
            node["widgets_values"][0] = 2
    host.forget()  # texts of cached nodes are not sent again
    host.post("/settings", {"Comfy.VueNodes.Enabled": True})
    try:
        with browser.opened(host) as page:
            page.open(workflow, "demo")
            assert page.run() == "execution_success"
            page.boxes()
            texts, shown = page.texts(), page.tab.evaluate("() => document.body.innerText")
            assert page.errors == []
    finally:
        host.post("/settings", {"Comfy.VueNodes.Enabled": False})
    lines = [line.strip() for line in shown.splitlines()]
    shown_lines = [line for text in texts for line in text.splitlines()]
    assert "hooked 14 of 14 attention layers" in shown_lines and "green <- (new)" in shown_lines
    assert "budget_gb" in lines and "preset" in lines
    assert not {"keep_steps", "cross_replace_steps", "separate_words"} & set(lines)
