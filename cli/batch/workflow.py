"""A ComfyUI workflow's API form, with the settings of a job filled in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from ...methods import METHODS
from ...settings import settings_of, shown
from ..config.settings import AUTO, PRESETS, SECTIONS, ConfigError, EditConfig, with_preset
from ..config.values import checked
from .jobs import Batch

Graph = dict[str, Any]
"""A workflow's API form: nodes by number, each with its class and inputs."""
_LOADER = "FateZeroLoadVideo"
_NODES = {m.name: m.node_id for m in METHODS if m.name in SECTIONS} | {"layout": "FateZeroLayout"}
"""The nodes of sections of settings."""
_INPUTS = {
    "guidance_scale": ("", "guidance"),
    "smoothing": ("FateZeroFlowSmoothing", "amount"),
    "flow": ("FateZeroFlowSmoothing", "flow"),
}
"""The inputs of settings with another name on the nodes, or on a certain node."""
_PARTS = {"size": ("width", "height"), "crop": ("crop_left", "crop_top", "crop_right", "crop_bottom")}
"""The inputs of the video loader for settings of several numbers."""
_SETTINGS = {"video", *(one.name for one in settings_of(EditConfig)), *_NODES}
Place = tuple[str, str]
"""A node and its input."""


def load_workflow(batch: Batch) -> Graph:
    """The workflow of a file of jobs. Raises ConfigError if it names none that a server can run."""
    if batch.workflow is None:
        raise ConfigError("the jobs name no workflow: give one in the API form (Export (API) in ComfyUI's menu)")
    try:
        graph = json.loads(batch.workflow.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{batch.workflow} is not JSON: {error}") from error
    nodes = graph.values() if isinstance(graph, dict) else ()
    if not nodes or not all(isinstance(node, dict) and "class_type" in node and "inputs" in node for node in nodes):
        raise ConfigError(f"{batch.workflow} is not the API form of a workflow: export it with Export (API)")
    return graph


def filled(graph: Graph, values: Mapping[str, Any], inputs: Mapping[str, str]) -> Graph:
    """A copy of a workflow with a job's settings in it, each in the one node that has it.

    A preset sets what it sets in `fatezero edit`, guidance and key frames included; the job's own settings come first.
    inputs: the places of others ("5.text"). Raises ConfigError for a setting of the wrong type, and for one that no
    node has, or several.
    """
    if values.get("source") == AUTO:
        raise ConfigError("source auto: connect a captioning node to source in the workflow, and leave source out")
    filling = _Filling(deepcopy(graph), inputs)
    for name, value in values.items():
        if name != "preset":
            filling.set(name, value)
    if "preset" in values:
        filling.set_preset(values["preset"], values)
    return filling.graph


class _Filling:
    """A workflow being filled in."""

    def __init__(self, graph: Graph, inputs: Mapping[str, str]) -> None:
        self.graph, self.inputs = graph, inputs

    def set(self, name: str, value: Any) -> None:
        """Fill in a setting, or a section of settings."""
        if name in _SETTINGS and name not in self.inputs:
            checked({name: value})
            if name in _NODES:
                for key, inner in value.items():
                    self._put((self._node(_NODES[name], name), key), f"{name}.{key}", inner)
                return
            if name in _PARTS:
                for key, part in zip(_PARTS[name], value, strict=True):
                    self._put((self._node(_LOADER, name), key), name, part)
                return
        self._put(self.place(name), name, value)

    def set_preset(self, preset: Any, values: Mapping[str, Any]) -> None:
        """Choose a preset, with all its settings that the job does not override."""
        texts = {name: text for name in ("source", "target") if (text := values.get(name) or self._text(name))}
        config, usual = with_preset(EditConfig(**checked(texts)), preset), EditConfig()
        needed = [config.propagation] if config.propagation != "none" else []
        for section in (*needed, *(["flow_edit"] if config.noise == "drawn" else [])):
            node = self._node(_NODES[section], f"preset {preset}")
            for key, value in PRESETS[preset].get(section, {}).items():
                if key not in values.get(section, {}):
                    self._put((node, key), f"{section}.{key}", value)
        self._put(self.place("preset"), "preset", preset if config.injection == "fatezero" else config.injection)
        for name in ("guidance_scale", "strength", "mode", "key_frames", "clip_norm"):
            value = getattr(config, name)
            kept = name in ("key_frames", "clip_norm") and name not in PRESETS[preset]
            if name not in values and not kept and (value != getattr(usual, name) or self._places(name)):
                self._put(self.place(name), name, value)

    def place(self, name: str) -> Place:
        """The node and input of a setting. Raises ConfigError for none or several."""
        if name in self.inputs:
            node, _, key = self.inputs[name].partition(".")
            if node not in self.graph or not key:
                raise ConfigError(
                    f"inputs: {name} is {shown(self.inputs[name])}; it must be a node of the workflow and its input"
                )
            return node, key
        found = self._places(name)
        if len(found) != 1:
            many = f"{len(found)} nodes ({', '.join(node for node, _ in found)}) have" if found else "no node has"
            raise ConfigError(f'{many} an input {name}: name it by inputs, e.g. "inputs: {{{name}: 5.text}}"')
        return found[0]

    def _places(self, name: str) -> list[Place]:
        """The unlinked inputs of a setting; if several nodes have it, those of our nodes."""
        if name == "negative":
            return self._negatives()
        kind, key = _INPUTS.get(name, ("", name))
        keys = ("file", "video") if name == "video" else (key,)
        found = [
            (node, key)
            for node, found in self._nodes(kind)
            for key in keys
            if key in found["inputs"] and not isinstance(found["inputs"][key], list)
        ]
        ours = [place for place in found if self.graph[place[0]]["class_type"].startswith("FateZero")]
        return ours if len(ours) == 1 else found

    def _negatives(self) -> list[Place]:
        """The texts that are linked only as negative."""
        inputs = (pair for _, found in self._nodes() for pair in found["inputs"].items())
        links = [(key, link[0]) for key, link in inputs if isinstance(link, list)]
        found = {node for key, node in links if key == "negative"} - {node for key, node in links if key != "negative"}
        return [(node, "text") for node in sorted(found) if isinstance(self.graph[node]["inputs"].get("text"), str)]

    def _nodes(self, kind: str = "") -> Iterator[tuple[str, Any]]:
        return ((node, found) for node, found in self.graph.items() if kind in ("", found["class_type"]))

    def _node(self, kind: str, name: str) -> str:
        """The node of a class. Raises ConfigError for none or several."""
        found = [node for node, _ in self._nodes(kind)]
        if len(found) != 1:
            raise ConfigError(f"{name} needs one node {kind} in the workflow, which has {len(found) or 'none'}")
        return found[0]

    def _text(self, name: str) -> str:
        """The current text of an input; "" if no node has it."""
        places = [self.place(name)] if name in self.inputs else self._places(name)
        text = self.graph[places[0][0]]["inputs"][places[0][1]] if len(places) == 1 else ""
        return text if isinstance(text, str) else ""

    def _put(self, place: Place, name: str, value: Any) -> None:
        node, key = place
        own = self.graph[node]["inputs"]
        if name not in self.inputs and key not in own:
            raise ConfigError(f"{name}: node {node} ({self.graph[node]['class_type']}) has no input {key}")
        value = _as_widget(value)
        if isinstance(own.get(key), (int, float)) and isinstance(value, str):
            raise ConfigError(f"{name} is {shown(value)}; input {key} of node {node} must be a number")
        own[key] = value
        if name == "video" and key == "file" and isinstance(own.get("video"), list):
            del own["video"]  # a link would override the file


def _as_widget(value: Any) -> Any:
    """A value in the widgets' form: lists and weights of words separated by commas."""
    if isinstance(value, Mapping):
        return ", ".join(f"{word}={_joined(':', number)}" for word, number in value.items())
    return _joined(", ", value)


def _joined(mark: str, value: Any) -> Any:
    return mark.join(map(str, value)) if isinstance(value, (list, tuple)) else value
