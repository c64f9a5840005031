"""GroupNorm over the whole clip, as in the authors' 5-D UNet."""

from __future__ import annotations

from collections.abc import Callable

from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def share_statistics(
    norm: nn.GroupNorm, frames: int | None = None, other_thread: Callable[[], bool] = lambda: False
) -> list[RemovableHandle]:
    """Take a GroupNorm's mean and variance over all frames of a clip, until the handles are removed.

    frames: of one clip, if a batch contains several. other_thread: whether another thread calls the model, which must
    get the plain GroupNorm.
    """
    length = 1

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal length
        if other_thread():
            return None
        length = frames or len(args[0])
        return (rearrange(args[0], "(n f) c y x -> n c (f y) x", f=length), *args[1:])

    def after(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if other_thread():
            return output
        return rearrange(output, "n c (f y) x -> (n f) c y x", f=length)

    return [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]
