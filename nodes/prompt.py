"""The prompt pair."""

from __future__ import annotations

from sys import maxsize
from typing import Any

from comfy.sd1_clip import escape_important, token_weights, unescape_important
from comfy_api.latest import io, ui

from ..attention.columns import BLOCK
from ..attention.prompt import PromptEdit
from ..hosts.comfyui.families import TEXT_ENCODERS, tokenizer_of
from ..recipes.recipe import blend_words
from ..settings import numbers_of_words
from .settings import widget, words_in
from .sockets import PROMPT_KEY, TEXT_KEY, PromptEditSocket, schema, show_on_node


class FateZeroPromptEdit(io.ComfyNode):
    """Encode the source and target prompt, and align their words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FateZeroPromptEdit",
            display_name="Prompt Edit (FateZero)",
            description="A prompt that describes the source video, and one that describes the edit.",
            search_aliases=["prompt to prompt", "p2p", "clip text encode", "refine", "replace", "reweight"],
            inputs=[
                io.Clip.Input("clip", tooltip=f"The text encoder of the model: {TEXT_ENCODERS}."),
                io.String.Input(
                    "source",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Source prompt: a description of the input video. The more accurate, the better.",
                ),
                io.String.Input(
                    "target",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Target prompt: what the edited video should show. Words shared with the source keep their "
                    "place.",
                ),
                widget(PromptEdit, "mode"),
                io.String.Input(
                    "blend_source",
                    default="",
                    tooltip="Words of the source for the blend mask, comma-separated. Empty: the words that change.",
                ),
                io.String.Input(
                    "blend_target",
                    default="",
                    tooltip="Words of the target for the blend mask of latents. Empty: the words that change; none: "
                    "the source's mask alone.",
                ),
                widget(PromptEdit, "reweight"),
            ],
            outputs=[
                io.Conditioning.Output("source_conditioning", display_name="source", tooltip="For Invert Video."),
                io.Conditioning.Output("target_conditioning", display_name="target", tooltip="For Edit Video."),
                PromptEditSocket.Output("prompt_edit", display_name="prompt edit", tooltip="For Edit Video."),
                io.String.Output(
                    "alignment", display_name="alignment", tooltip="The source word aligned with each target word."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, clip: Any, source: str, target: str, mode: str, blend_source: str, blend_target: str, reweight: str
    ) -> io.NodeOutput:
        check_clip(clip)
        words = {"source": unweighted(source), "target": unweighted(target)}
        for name, text in words.items():
            if not text:
                raise ValueError(f"{name}: is empty: describe the {'video' if name == 'source' else 'edit'}")
        tokenizer = tokenizer_of(clip)
        pair, given = (
            PromptEdit(words["source"], words["target"], tokenizer),
            map(words_in, (blend_source, blend_target)),
        )
        blend = blend_words(pair, *map(tuple, given))
        for own, name in zip(blend, words, strict=True):
            for word in own:
                pair.token_indices(words[name], word, maxsize, f"blend_{name}")  # raises ValueError for unknown words
        prompt = PromptEdit(
            words["source"], words["target"], tokenizer, mode,  # type: ignore[arg-type]
            blend if any(blend) else None, numbers_of_words("reweight", words_in(reweight)),  # type: ignore[arg-type]
        )  # fmt: skip
        conditionings = [encoded(clip, text, prompt, name) for name, text in (("source", source), ("target", target))]
        alignment = prompt.describe()
        show_on_node(cls.hidden.unique_id, alignment)
        return io.NodeOutput(*conditionings, prompt, alignment, ui=ui.PreviewText(alignment))


def check_clip(clip: Any) -> None:
    """Raise ValueError for a checkpoint without a text encoder."""
    if clip is None:
        raise ValueError("clip: nothing is connected, or the checkpoint has no text encoder")


def check_words(positive: Any, words: str, whose: str) -> None:
    """Raise ValueError for a CONDITIONING made from other words. whose: names the words in the error."""
    found = positive[0][1].get(PROMPT_KEY, words)
    if found != words:
        raise ValueError(f"positive: was made from {found!r}, but {whose} is {words!r}")


def encoded(clip: Any, text: str, pair: PromptEdit, name: str) -> list[list[Any]]:
    """The CONDITIONING of a text, with its words in the options; ValueError, naming the socket, for unusual tokens.

    pair: any pair with the text's tokenizer.
    """
    words, tokens = unweighted(text), clip.tokenize(text)
    _check_layout(tokens, pair, words, name)
    found = clip.encode_from_tokens_scheduled(tokens)
    return [[embeddings, {**options, PROMPT_KEY: words, TEXT_KEY: embeddings}] for embeddings, options in found]


def unweighted(prompt: str) -> str:
    """A prompt without the host's weights: "a (red:1.2) car" is "a red car"."""
    parts = token_weights(escape_important(prompt), 1.0)
    return " ".join(unescape_important("".join(text for text, _ in parts)).split())


def _check_layout(tokens: dict[str, Any], pair: PromptEdit, words: str, name: str) -> None:
    """Raise ValueError if the host's tokens are not where the alignment expects them."""
    expected = [token for word in pair.word_tokens(words) for token in word]
    for rows in tokens.values():
        content = [pair.columns.content(row, len(expected)) for row in rows]
        found = [item[0] for row in content for item in row][: len(expected)]
        if any(not isinstance(token, int) for token in found) or found != expected:
            raise ValueError(
                f"{name}: its tokens are not consecutive: remove embedding:..., and weights at the boundary of {BLOCK} "
                "tokens"
            )
