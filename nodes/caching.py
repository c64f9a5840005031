"""Keep an inversion in the host's cache while the target prompt changes.

The host's cache key of a node includes all inputs of all nodes before it. Prompt Edit has both prompts, so a new target
would change the key of the inversion behind its `source` output, although that output is the same. Therefore, when a
prompt is queued, links from `source` are redirected to a twin of the node whose target is the source.
"""

from __future__ import annotations

from typing import Any

Prompt = dict[str, dict[str, Any]]
"""A workflow in API format: {node id: {"class_type": ..., "inputs": ...}}."""

NODE = "FateZeroPromptEdit"
_OF_TWINS = ".source"
"""The suffix of a twin's name; a colon would mean a node inside a subgraph."""
SOURCE = 0
"""The index of the output with the source conditioning."""


def watch_prompts() -> None:
    """Make the host call `with_source_twins` on each queued prompt."""
    from server import PromptServer

    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.add_on_prompt_handler(_on_prompt)


def _on_prompt(request: dict[str, Any]) -> dict[str, Any]:
    return {**request, "prompt": with_source_twins(request["prompt"])} if "prompt" in request else request


def with_source_twins(prompt: Prompt) -> Prompt:
    """The same workflow, with source conditionings from nodes that do not depend on the target."""
    twins: Prompt = {}

    def redirected(value: Any) -> Any:
        if not (isinstance(value, list) and len(value) == 2 and value[1] == SOURCE):
            return value
        node = prompt.get(str(value[0]), {})
        if node.get("class_type") != NODE or "source" not in node.get("inputs", {}):
            return value
        source = node["inputs"]["source"]
        neutral = {"target": source, "mode": "refine", "blend_source": "", "blend_target": "", "reweight": ""}
        inputs = {**node["inputs"], **neutral}
        if str(value[0]).endswith(_OF_TWINS) and inputs == node["inputs"]:  # a prompt from a result's metadata
            return value
        twin = f"{value[0]}{_OF_TWINS}"
        twins[twin] = {**node, "inputs": inputs}
        return [twin, SOURCE]

    changed = {
        name: {**node, "inputs": {socket: redirected(value) for socket, value in node.get("inputs", {}).items()}}
        for name, node in prompt.items()
    }
    return changed | twins
