"""Make an edit of a store from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..attention.masks import GivenMask
from ..attention.prompt import PromptEdit
from ..diffusion.invert import Inversion, Progress
from ..diffusion.parts import Edit
from ..methods.layout import Layout
from ..methods.move_objects import moves_of
from ..store.store import AttentionStore
from ..video.flow import flow_estimator
from ..video.motion import Motion
from .config.settings import EditConfig
from .objects import layout_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..hosts.diffusers.model import Model


def check_parts(checkpoint: Model, config: EditConfig, prompt: PromptEdit | None, frames: int) -> None:
    """Raise ValueError for parts of an edit that do not fit each other or the model."""
    layout = layout_of(config, checkpoint.tokenizer, config.target, frames)
    config.planned_recipe(layout=layout).check(checkpoint.denoiser.spans_clip, prompt)


def motion_of(
    checkpoint: Model, configs: Sequence[EditConfig], inversion: Inversion, count: int, bar: Callable[[str], Progress]
) -> Motion | None:
    """The motion of the reconstructed clip of `count` frames, on the latents' grid, if an edit smooths along it."""
    if not any(config.smoothing for config in configs) or count < 2:
        return None
    _, estimate = flow_estimator(configs[0].flow, checkpoint.device)
    clip, progress = inversion.store.level(0), bar("motion")

    def frames() -> Iterator[Tensor]:
        for done, frame in enumerate(chain.from_iterable(checkpoint.decode_parts(clip, count)), 1):
            yield frame.cpu()
            progress(done, count)

    return Motion.of(frames(), estimate, checkpoint.factor)


def one_edit(
    checkpoint: Model,
    config: EditConfig,
    prompt: Any,
    store: AttentionStore,
    motion: Motion | None = None,
    layout: Layout | None = None,
    mask: GivenMask | None = None,
) -> Edit:
    """A configuration's edit of a store, with encoded prompts. motion: of the clip, for smoothing."""
    height, width = (side * checkpoint.factor for side in store.levels.shape[-2:])
    blocks = checkpoint.blocks(config.target, config.negative)
    target = checkpoint.encode_prompt(config.target, width, height, blocks)
    negative = checkpoint.encode_negative(config.negative, width, height, blocks)
    moves = None
    if layout is not None:
        moves = moves_of(layout, config.source, store.source.text_tokens, target.text_tokens)
    recipe = config.recipe(layout=moves, mask=mask)
    if recipe.smoothing is not None:
        recipe = replace(recipe, smoothing=replace(recipe.smoothing, motion=motion))
    return recipe.edit(target, negative, prompt)
