"""Prompts in the host's API format, built node by node."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SIDE = 32
"""Pixels of the clip's sides: half of the demo model's training size, because only its numbers are compared."""
SOURCE, TARGET = "a red square on water", "a green square on water"


@dataclass(frozen=True)
class Node:
    """A node of a graph; `node[1]` is a link from its second output."""

    id: str

    def __getitem__(self, output: int) -> list[Any]:
        return [self.id, output]


@dataclass
class Graph:
    """A prompt in API format: `add` a node with values or links for its inputs."""

    prompt: dict[str, Any] = field(default_factory=dict)

    def add(self, kind: str, /, **inputs: Any) -> Node:
        node = Node(str(len(self.prompt) + 1))
        self.prompt[node.id] = {"class_type": kind, "inputs": inputs}
        return node

    def set(self, node: Node, **inputs: Any) -> None:
        self.prompt[node.id]["inputs"] |= inputs

    def ids(self, kind: str) -> set[str]:
        return {name for name, node in self.prompt.items() if node["class_type"] == kind}


@dataclass
class DemoGraph(Graph):
    """The demo clip, inverted and edited; every part can be changed before the run."""

    steps: int = 4
    frames: int = 3
    side: int = SIDE

    def __post_init__(self) -> None:
        self.demo = self.add("FateZeroDemoModel")
        self.video = self.add(
            "FateZeroLoadVideo", file="", start=0, stride=1, count=self.frames, width=self.side, height=self.side,
            crop_left=0, crop_top=0, crop_right=0, crop_bottom=0, video=self.demo[3],
        )  # fmt: skip
        self.latent = self.add("FateZeroEncodeVideo", images=self.video[0], vae=self.demo[2], chunk_size=8)
        self.words = self.add(
            "FateZeroPromptEdit", clip=self.demo[1], source=SOURCE, target=TARGET, mode="refine",
            blend_source="", blend_target="", reweight="",
        )  # fmt: skip
        self.negative = self.add("CLIPTextEncode", clip=self.demo[1], text="")
        self.invert = self.add(
            "FateZeroInvert", model=self.demo[0], source=self.words[0], latent=self.latent[0], steps=self.steps,
            key_frames="self, middle", clip_norm=False, memory="recompute", budget_gb=2.0,
        )  # fmt: skip
        self.edit = self.add(
            "FateZeroSampler", model=self.demo[0], positive=self.words[1], negative=self.negative[0],
            store=self.invert[1], prompt_edit=self.words[2], guidance=7.5, preset="attribute",
        )  # fmt: skip

    def fuse(self, **settings: Any) -> Node:
        """Use these fusion settings in place of a preset; others have the widgets' defaults."""
        values = {
            "cross_replace_steps": 0.7, "self_replace_steps": 0.8, "blend_self_attention": False,
            "blend_latents": False, "blend_threshold": 0.3, "max_tokens": 0, "mask_tokens": 256,
            "mask_from": "attention", "blend_latents_until": 0.8, "separate_words": 0.0,
        }  # fmt: skip
        return self.take("FateZeroFusion", **values | settings)

    def take(self, kind: str, **settings: Any) -> Node:
        """Use a settings node in place of a preset."""
        node = self.add(kind, **settings)
        self.set(self.edit, preset="custom", settings=node[0])
        return node

    def both(self, model: list[Any]) -> None:
        """Use this MODEL for inversion and edit."""
        self.set(self.invert, model=model)
        self.set(self.edit, model=model)

    def with_control(self, controlnet: str, positive: list[Any], negative: list[Any], strength: float) -> Node:
        """(positive, negative) with a ControlNet and the clip as its hint."""
        net = self.add("ControlNetLoader", control_net_name=controlnet)
        return self.add(
            "ControlNetApplyAdvanced", positive=positive, negative=negative, control_net=net[0], image=self.video[0],
            strength=strength, start_percent=0.0, end_percent=1.0,
        )  # fmt: skip

    def save_video(self) -> Node:
        decoded = self.add("VAEDecode", samples=self.edit[0], vae=self.demo[2])
        video = self.add("CreateVideo", images=decoded[0], fps=self.video[2])
        return self.add("SaveVideo", video=video[0], filename_prefix="edit", format="auto", codec="auto")


def windows(graph: Any, **changed: Any) -> list[Any]:
    """The host's windows of three latents, which share one with the next, on a graph's MODEL."""
    given = {
        "context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": False, "causal_window_fix": False,
    }  # fmt: skip
    return graph.add("ContextWindowsManual", model=graph.model[0], **{**given, **changed})[0]
