"""Take pictures of the page with a workflow: demo/page.jpg and three thumbnails in workflows/.

    python tests/comfyui/write_pictures.py [NAME ...]

Run it after changing these workflows or their nodes; `test_workflows.py` compares the hash in each picture.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from comfyui.host import REPO, Host, find_hosts, started
from comfyui.page import Page, opened
from comfyui.random_weights import write_controlnet, write_lora
from comfyui.shipped import DEMO, FOLDER, of_demo, read
from PIL import Image, ImageDraw, ImageFont

PICTURES = {
    REPO / "demo" / "page.jpg": "demo",
    FOLDER / "controlnet_lora.jpg": "controlnet_lora",
    FOLDER / "custom_sampler.jpg": "custom_sampler",
    FOLDER / "flow_any_demo.jpg": "flow_any_demo",
}
"""The workflow that each picture shows."""
FOLDERS = {"CheckpointLoaderSimple": "checkpoints", "LoraLoaderModelOnly": "loras", "ControlNetLoader": "controlnet"}
"""Nodes with names of model files, and the folders of these."""
WIDTH = 760
"""The size of a thumbnail, in pixels."""
NOTE = "Run with the bundled toy model in place of the files"
"""The note on a thumbnail of a workflow that needs files."""


def mark_of(name: str) -> str:
    """A hash of a workflow's appearance: nodes, positions, sizes, values, links and groups."""
    workflow = read(name)
    keys = ("id", "type", "pos", "size", "title", "widgets_values")
    nodes = [{key: node.get(key) for key in keys} for node in workflow["nodes"]]
    shown = [nodes, [link[:5] for link in workflow["links"]], workflow["groups"]]
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def run(page: Page, host: Host, name: str) -> None:
    """Open a workflow and run it, with the demo's model in place of files it needs."""
    page.open(read(name), name)
    if name in DEMO:
        ended = page.run()
    else:
        lora, controlnet = write_lora(host), write_controlnet(host)
        ended = page.queue(host, host.complete(of_demo(page.prompt(), host, lora, controlnet)))
    if ended != "execution_success":
        raise RuntimeError(f"{name}: {ended}")


def with_files(folder: Path) -> Path:
    """A folder with empty files for the workflows' models, because the page marks missing ones."""
    for name in PICTURES.values():
        for node in read(name)["nodes"]:
            if node["type"] in FOLDERS:
                path = folder / "models" / FOLDERS[node["type"]] / node["widgets_values"][0]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
    return folder


def with_note(picture: Image.Image) -> Image.Image:
    """A thumbnail with the note below it."""
    page = Image.new("RGB", (picture.width, picture.height + 30), "white")
    page.paste(picture)
    ImageDraw.Draw(page).text((8, picture.height + 4), NOTE, fill="black", font=ImageFont.load_default(size=17))
    return page


def main(names: list[str]) -> None:
    """Take all pictures, or those of the named workflows."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(find_hosts()[0], with_files(Path(folder))) as host,
        opened(host) as page,
    ):
        for path, name in PICTURES.items():
            if names and name not in names:
                continue
            run(page, host, name)
            thumbnail = path.parent == FOLDER
            taken = Image.open(io.BytesIO(page.taken(graph_alone=thumbnail))).convert("RGB")
            if thumbnail:
                taken = taken.resize((WIDTH, round(WIDTH * taken.height / taken.width)), Image.Resampling.LANCZOS)
                taken = taken if name in DEMO else with_note(taken)
            taken.save(path, quality=90, comment=mark_of(name))


if __name__ == "__main__":
    main(sys.argv[1:])
