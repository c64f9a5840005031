"""What a method declares about itself, once, for every door: command, nodes, Python, docs, benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Part = Literal["injection", "propagation", "start", "training"]


@dataclass(frozen=True)
class Method:
    """A method of editing.

    name: its section in a configuration. title: as its paper calls it. paper: authors, venue and arXiv number.
    sentence: what it does. part: what it is in an edit: what is taken from the source, how frames agree, where the edit
    starts, or training before it. settings: the dataclass that is this part, or makes it. presets: settings that go
    together, by the preset's name; a preset names settings of the whole edit, this method's own among them. node_id,
    node_title, node_text: of the ComfyUI node with the settings, where not made from the others. aliases, advanced: its
    search words, and the widgets that few people change.
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

    def __post_init__(self) -> None:
        made = {
            "node_id": "FateZero" + "".join(filter(str.isalnum, self.title)),
            "node_title": f"{self.title} Settings (FateZero)",
            "node_text": f"{self.sentence} ({self.paper}.) For preset custom of Edit Video.",
        }
        for name, text in made.items():
            object.__setattr__(self, name, getattr(self, name) or text)
