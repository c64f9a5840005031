"""Custom socket types, and helpers of all nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

AttentionStoreSocket = io.Custom("ATTENTION_STORE")
PromptEditSocket = io.Custom("PROMPT_EDIT")
InjectionSocket = io.Custom("VIDEO_EDIT_SETTINGS")
PropagationSocket = io.Custom("VIDEO_PROPAGATION")
SmoothingSocket = io.Custom("VIDEO_SMOOTHING")
LayoutSocket = io.Custom("LAYOUT")
RegionSocket = io.Custom("VIDEO_REGION")

CATEGORY = "FateZero"
PROMPT_KEY = "fatezero_prompt"
"""The key of a prompt's words in a CONDITIONING's options, set by FateZeroPromptEdit."""

TEXT_KEY = "fatezero_text"
"""The key of that prompt's embeddings, to detect changes by other nodes."""


def schema(search_aliases: list[str], **given: Any) -> io.Schema:
    """A node's schema, with search aliases if the host supports them."""
    if "search_aliases" in io.Schema.__dataclass_fields__:
        given["search_aliases"] = search_aliases
    return io.Schema(category=CATEGORY, **given)


def show_on_node(node_id: str | None, text: str) -> None:
    """Show lines of text on a node in the page that queued it; they remain after the job.

    The message is that of a node's output, so that the page keeps the text with its workflow.
    """
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if node_id is None or server is None:
        return
    prompt = getattr(server, "last_prompt_id", None)
    output = {"node": node_id, "display_node": node_id, "output": {"text": [text]}, "prompt_id": prompt}
    server.send_sync("executed", output, server.client_id)
