"""Socket types of our own, and what all nodes share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

AttentionStoreSocket = io.Custom("ATTENTION_STORE")
PromptEditSocket = io.Custom("PROMPT_EDIT")
InjectionSocket = io.Custom("VIDEO_EDIT_SETTINGS")
PropagationSocket = io.Custom("VIDEO_PROPAGATION")
SmoothingSocket = io.Custom("VIDEO_SMOOTHING")
LayoutSocket = io.Custom("LAYOUT")

CATEGORY = "FateZero"
PROMPT_KEY = "fatezero_prompt"
"""Where FateZeroPromptEdit leaves the words of a prompt inside its CONDITIONING."""

TEXT_KEY = "fatezero_text"
"""Where it leaves the embeddings of that prompt, to tell whether other nodes have changed them."""


def schema(search_aliases: list[str], **given: Any) -> io.Schema:
    """A node's schema, with its search aliases where the host knows them."""
    if "search_aliases" in io.Schema.__dataclass_fields__:
        given["search_aliases"] = search_aliases
    return io.Schema(category=CATEGORY, **given)


def show_on_node(node_id: str | None, text: str) -> None:
    """Write lines onto a node in the page, which newer hosts read as Markdown: there two blanks keep a line's end."""
    from server import PromptServer

    if node_id is not None and getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.send_progress_text(text.replace("\n", "  \n"), node_id)
