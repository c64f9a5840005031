"""Keep an inversion in the host's cache while the target prompt changes.

The host's cache key of a node holds every input of every node before it. Prompt Edit has both
prompts, so a new target would give the inversion behind its `source` output a new key, though
that output stays the same. As a prompt is queued, links from `source` are therefore led to a
twin of the node whose target is the source.
"""

from __future__ import annotations

from typing import Any

Prompt = dict[str, dict[str, Any]]
"""A workflow in API format: {node id: {"class_type": ..., "inputs": ...}}."""

NODE = "FateZeroPromptEdit"
_OF_TWINS = ".source"
"""Ends a twin's name; a colon would read as a node inside a subgraph."""
SOURCE = 0
"""Which of its outputs is the source conditioning."""


def watch_prompts() -> None:
    """Have the host call `with_source_apart` on each prompt it queues."""
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.add_on_prompt_handler(_on_prompt)


def _on_prompt(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "prompt": with_source_apart(request["prompt"])} if "prompt" in request else request


def with_source_apart(prompt: Prompt) -> Prompt:
    """The same workflow, its source conditionings made by nodes that do not know the target."""
    twins: Prompt = {}

    def led(value: Any) -> Any:
        if not (isinstance(value, list) and len(value) == 2 and value[1] == SOURCE):
            return value
        node = prompt.get(str(value[0]), {})
        if node.get("class_type") != NODE or "source" not in node.get("inputs", {}):
            return value
        source = node["inputs"]["source"]
        alone = {"target": source, "mode": "refine", "blend_source": "", "blend_target": "", "reweight": ""}
        inputs = {**node["inputs"], **alone}
        if str(value[0]).endswith(_OF_TWINS) and inputs == node["inputs"]:  # of a prompt that a result holds
            return value
        twin = f"{value[0]}{_OF_TWINS}"
        twins[twin] = {**node, "inputs": inputs}
        return [twin, SOURCE]

    apart = {
        name: {**node, "inputs": {socket: led(value) for socket, value in node.get("inputs", {}).items()}}
        for name, node in prompt.items()
    }
    return apart | twins
