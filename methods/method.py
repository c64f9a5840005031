"""The declaration of a method, for command, nodes, Python, docs and benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["injection", "propagation", "start", "training"]


@dataclass(frozen=True)
class Method:
    """A method of editing.

    name: its section in a configuration. title: its name in the paper. paper: authors, venue and arXiv number.
    sentence: what it does. part: its part of an edit: injection, propagation, start, or training before the edit.
    settings: the dataclass that is this part, or makes it. presets: values of settings of the whole edit, by the
    preset's name. node_id, node_title, node_text: of the ComfyUI node of the settings; empty for defaults made from the
    others. aliases, advanced: its search words, and its rarely used widgets. later: widgets that older workflows lack.
    needs_mask: whether it needs an edit mask.
    """

    name: str
    title: str
    paper: str
    sentence: str
    part: Part
    settings: type
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    node_id: str = ""
    node_title: str = ""
    node_text: str = ""
    aliases: tuple[str, ...] = ()
    advanced: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    needs_mask: bool = False

    def __post_init__(self) -> None:
        made = {
            "node_id": "FateZero" + "".join(filter(str.isalnum, self.title)),
            "node_title": f"{self.title} Settings (FateZero)",
            "node_text": f"{self.sentence} ({self.paper}.) For preset custom of Edit Video.",
        }
        for name, text in made.items():
            object.__setattr__(self, name, getattr(self, name) or text)
