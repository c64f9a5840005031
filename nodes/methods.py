"""The nodes for the methods' settings, made from the table of methods."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..methods import METHODS
from ..methods.method import Method
from .settings import made, widgets
from .sockets import InjectionSocket, PropagationSocket, schema

_OUTPUTS = {
    "injection": InjectionSocket.Output("settings", display_name="settings", tooltip="For Edit Video."),
    "propagation": PropagationSocket.Output("propagation", display_name="propagation", tooltip="For Edit Video."),
}


def settings_node(method: Method) -> type[io.ComfyNode]:
    """The node of a method: a widget for each setting, and the settings as its output."""

    class SettingsNode(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return schema(
                node_id=method.node_id,
                display_name=method.node_title,
                description=method.node_text,
                search_aliases=[*method.aliases],
                inputs=widgets(method.settings, advanced=method.advanced, later=method.later),
                outputs=[_OUTPUTS[method.part]],
            )

        @classmethod
        def execute(cls, **values: Any) -> io.NodeOutput:
            return io.NodeOutput(made(method.settings, values))

    SettingsNode.__name__ = SettingsNode.__qualname__ = method.node_id
    return SettingsNode


SETTINGS_NODES = [settings_node(method) for method in METHODS if method.part in _OUTPUTS]
