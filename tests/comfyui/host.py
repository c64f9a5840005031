"""A real ComfyUI server for the tests: find it, start it, send prompts, stop it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import websocket
from safetensors.torch import load_file
from torch import Tensor

REPO = Path(__file__).resolve().parents[2]
HOW = (
    "no ComfyUI found: set COMFYUI_PATH (several with the path separator between), or install one at ~/comfy/ComfyUI "
    "(comfy-cli's place), with its requirements in its own .venv or in the environment that runs the tests"
)


@dataclass(frozen=True)
class Installed:
    """A ComfyUI on this machine, and its Python interpreter."""

    folder: Path
    python: Path
    version: str

    @property
    def age(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.version))


def find_hosts() -> list[Installed]:
    """Hosts in $COMFYUI_PATH, else ~/comfy/ComfyUI, else the folder above custom_nodes; newest first."""
    named = os.environ.get("COMFYUI_PATH", "").split(os.pathsep)
    pythons = os.environ.get("COMFYUI_PYTHON", "").split(os.pathsep)
    above = [REPO.parents[1]] if REPO.parent.name == "custom_nodes" else []
    usual = [place for place in (Path.home() / "comfy" / "ComfyUI", *above) if _is_host(place)][:1]
    places = [Path(place) for place in named if place] or usual
    found = []
    for i, place in enumerate(places):
        python = _find_python(place, pythons[i] if i < len(pythons) else "") if _is_host(place) else None
        if python is not None:
            version = re.search(r'__version__ = "(.+?)"', (place / "comfyui_version.py").read_text(encoding="utf-8"))
            found.append(Installed(place, python, version[1] if version else "0"))
    return sorted(found, key=lambda host: host.age, reverse=True)


def _is_host(place: Path) -> bool:
    return (place / "main.py").is_file() and (place / "comfy").is_dir()


def _find_python(host: Path, named: str) -> Path | None:
    """The first interpreter with the host's requirements."""
    folder = "Scripts" if os.name == "nt" else "bin"
    own = [host / name / folder / "python" for name in (".venv", "venv")]
    for python in [Path(named)] if named else [*own, Path(sys.executable)]:
        if python.with_suffix(".exe" if os.name == "nt" else "").exists():
            done = subprocess.run([python, "-c", "import aiohttp, torch, torchsde"], capture_output=True)
            if done.returncode == 0:
                return python
    return None


def wait_until(state: Callable[[], Any]) -> None:
    """Wait for a state without a limit; the watchdog in `conftest` ends a run that hangs."""
    while not state():
        time.sleep(0.1)


class NodeError(Exception):
    """A prompt that the host refused or that failed; `report` is the host's error."""

    def __init__(self, report: Any) -> None:
        where = f"node {report.get('node_id')}: {report.get('exception_message')}"
        super().__init__(where + "".join(report.get("traceback", [json.dumps(report)[:3000]])[-1:]))
        self.report = report


@dataclass
class Run:
    """The result of a prompt: outputs by node, the host's messages, and binary previews."""

    outputs: dict[str, Any]
    messages: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)

    def cached(self) -> set[str]:
        return {node for kind, data in self.messages if kind == "execution_cached" for node in data["nodes"]}

    def executed(self) -> list[str]:
        return [data["node"] for kind, data in self.messages if kind == "executing" and data.get("node")]


@dataclass
class Host:
    """A running server and its folders."""

    url: str
    base: Path
    log: Path

    @cached_property
    def known(self) -> dict[str, Any]:
        """The host's description of its nodes."""
        return self.get("/object_info")

    def complete(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """A prompt with defaults for inputs that newer hosts have added to their nodes."""

        def defaults(kind: str) -> dict[str, Any]:
            required = self.known.get(kind, {"input": {}})["input"].get("required", {})
            return {name: o[1]["default"] for name, o in required.items() if len(o) > 1 and "default" in o[1]}

        ours = {name: node for name, node in prompt.items() if node["class_type"].startswith("FateZero")}
        others = {
            name: {**node, "inputs": defaults(node["class_type"]) | node["inputs"]}
            for name, node in prompt.items()
            if name not in ours
        }
        return {name: ours.get(name) or others[name] for name in prompt}

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}{path}") as answer:
            return json.load(answer)

    def answers(self) -> bool:
        try:
            self.get("/system_stats")
        except OSError:
            return False
        return True

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", json.dumps(data).encode(), method="POST")
        try:
            with urllib.request.urlopen(request) as answer:
                text = answer.read()
                return json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            raise NodeError(json.load(error)) from error

    def run(self, prompt: dict[str, Any], watch: Callable[[str, dict[str, Any]], None] | None = None) -> Run:
        """Queue a prompt and wait for its end. Raises NodeError if it fails."""
        client = uuid.uuid4().hex
        run = Run({})
        line = websocket.create_connection(f"{self.url.replace('http', 'ws')}/ws?clientId={client}")
        try:
            queued = self.post("/prompt", {"prompt": self.complete(prompt), "client_id": client})["prompt_id"]
            while True:
                message = line.recv()
                if isinstance(message, bytes):
                    run.previews.append(message)
                    continue
                parsed = json.loads(message)
                kind, data = parsed["type"], parsed["data"]
                if data.get("prompt_id", queued) != queued:
                    continue
                run.messages.append((kind, data))
                if watch:
                    watch(kind, data)
                if kind in ("execution_error", "execution_interrupted"):
                    raise NodeError(data)
                if kind == "executing" and data.get("node") is None:  # as soon as the history has it
                    break
        finally:
            line.close()
        run.outputs = self.get(f"/history/{queued}")[queued]["outputs"]
        return run

    def forget(self) -> None:
        """Clear the host's cache. The host does so after a prompt and before the next."""
        self.post("/free", {"free_memory": True, "unload_models": False})
        self.run({"1": {"class_type": "PreviewAny", "inputs": {"source": "x"}}})

    def text(self, run: Run, node: str) -> str:
        """The text shown by a node."""
        return "".join(run.outputs[node]["text"])

    def file(self, run: Run, node: str, kind: str = "images") -> Path:
        """The first file a node saved."""
        saved = run.outputs[node][kind][0]
        return self.base / saved["type"] / saved["subfolder"] / saved["filename"]

    def latents(self, prompt: dict[str, Any], link: list[Any]) -> Tensor:
        """Run a prompt for the LATENT at a link."""
        saving = {"class_type": "SaveLatent", "inputs": {"samples": link, "filename_prefix": "latents/test"}}
        run = self.run({**prompt, "save": saving})
        return load_file(self.file(run, "save", "latents"))["latent_tensor"]


@contextmanager
def started(host: Installed, base: Path, pack: str = "fatezero-video", options: str = ""):
    """A server with this pack, in a folder with a dash in its name, and the other pack.

    $COMFYUI_FRONTEND: the `static` folder of another comfyui-frontend-package than the host's own.
    """
    for name in ("custom_nodes", "input", "output", "models/loras", "models/controlnet", "models/checkpoints", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "custom_nodes" / pack).symlink_to(REPO, target_is_directory=True)
    for name in ("other_pack.py", "flow_pack.py", "ltx_pack.py", "wan_pack.py"):
        (base / "custom_nodes" / name).symlink_to(Path(__file__).parent / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "host.log"
    if front_end := os.environ.get("COMFYUI_FRONTEND"):
        options += f" --front-end-root {front_end}"
    options += (
        f" --cpu --listen 127.0.0.1 --port {port} --database-url sqlite:///:memory: --disable-api-nodes "
        "--disable-auto-launch --preview-method latent2rgb"
    )
    with log.open("wb") as out:
        server = subprocess.Popen(
            [host.python, "main.py", "--base-directory", base, *options.split()],
            cwd=host.folder,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""},
        )
    try:
        running = Host(f"http://127.0.0.1:{port}", base, log)
        wait_until(lambda: server.poll() is not None or running.answers())
        if server.poll() is not None:
            raise RuntimeError(f"the host did not start:\n{log.read_text(errors='replace')[-3000:]}")
        yield running
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
