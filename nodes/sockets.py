"""Socket types of our own, and the words that several nodes share."""

from __future__ import annotations

from inspect import signature
from typing import Any

from comfy_api.latest import io

AttentionStoreSocket = io.Custom("ATTENTION_STORE")
PromptEditSocket = io.Custom("PROMPT_EDIT")

CATEGORY = "FateZero"
PROMPT_KEY = "fatezero_prompt"
"""Where FateZeroPromptEdit leaves the words of a prompt inside its CONDITIONING."""

TEXT_KEY = "fatezero_text"
"""Where it leaves the embeddings of that prompt, to tell whether other nodes have changed them."""

ADVANCED: dict[str, Any] = {"advanced": True} if "advanced" in signature(io.Float.Input.__init__).parameters else {}
"""Has the page, where it can, put a widget away until it is asked for: what presets ignore, and what few change."""

KEY_FRAMES = io.String.Input(
    "key_frames",
    default="self, middle",
    tooltip="Whose keys and values each frame sees, which makes frames agree: self, first, middle, last, previous, "
    "or whole offsets such as -1, separated by commas. The paper: self, middle. The authors' style settings: middle.",
)
CLIP_NORM = io.Boolean.Input(
    "clip_norm",
    default=False,
    tooltip="Take the normalisation statistics of the ResNet blocks over the whole clip instead of over each frame, "
    "as the authors' code does. Steadier light, at times less detail.",
)
CHUNK_FRAMES = io.Int.Input(
    "chunk_frames",
    default=0,
    min=0,
    max=100_000,
    optional=True,
    tooltip="Frames of one UNet call, for long clips; 0 takes all at once. With key frames among self, first, middle "
    "and last the result is the same; with neighbours or clip_norm, chunks overlap and come near it.",
)


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
