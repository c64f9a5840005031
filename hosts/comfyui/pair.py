"""Pairs of MODELs, one for high and one for low noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import uuid5

from .hook import Hook, node_of
from .noise import is_flow
from .sameness import OWN_OPTION, ROOM, WINDOWS, equal

PAIR = f"{OWN_OPTION}_low_noise"
"""The option of a MODEL with its low-noise model, a `Pair`."""


def paired(model: Any, low_noise: Any, boundary: float) -> Any:
    """A MODEL that another one replaces below a sigma, in FateZero's own sampling.

    Raises ValueError for MODELs that are not flows of one architecture, and for windows of the second one only.
    """
    kinds = [(type(one.model), shapes_of_weights(one)) for one in (model, low_noise)]
    if kinds[0] != kinds[1] or not is_flow(model):
        names = " and ".join(type(one.model).__name__ for one in (model, low_noise))
        raise ValueError(f"low_noise: {names} are not two flow models of one architecture (Wan 2.2 14B)")
    if low_noise.model_options.get(WINDOWS) is not None and model.model_options.get(WINDOWS) is None:
        raise ValueError("low_noise: has Context Windows of its own: connect them after Wan 2.2 Pair, to both models")
    both = model.clone()
    both.model_options[PAIR] = Pair(model, low_noise, boundary)
    return both


@dataclass(frozen=True)
class Pair:
    """Two MODELs as joined, and the sigma below which the low-noise one is used."""

    model: Any
    low_noise: Any
    boundary: float

    def __deepcopy__(self, memo: Any) -> Pair:
        return self  # the host copies a model's options, older versions with all weights

    def low(self, model: Any) -> Any:
        """The low-noise MODEL, with the changes of nodes after the pair: LoRA, guidance, patches.

        Raises ValueError, naming the node, for changes bound to the first MODEL's modules.
        """
        before, low = self.model, self.low_noise.clone()
        known = (ROOM, "model_sampling")  # the run has the first MODEL's flow
        parts = {name: part for name, part in model.object_patches.items() if name not in known}
        bound = [part for name, part in parts.items() if not equal(part, before.object_patches.get(name))]
        if bound or not equal(model.injections, before.injections):
            what = node_of(bound[0]) if bound else "LoRA Loader (Bypass)"
            raise ValueError(f"model: {what} after Wan 2.2 Pair would change only the high-noise model: put it before")
        added = {key: patches[len(before.patches.get(key, [])) :] for key, patches in model.patches.items()}
        if any(added.values()):
            low.patches |= {key: [*low.patches.get(key, []), *new] for key, new in added.items() if new}
            low.patches_uuid = uuid5(low.patches_uuid, str(model.patches_uuid))
        of_options = {name: value for name, value in model.model_options.items() if name != PAIR}
        low.model_options = _with_added(low.model_options, of_options, before.model_options)
        low.wrappers = _with_added(low.wrappers, model.wrappers, before.wrappers)
        low.callbacks = _with_added(low.callbacks, model.callbacks, before.callbacks)
        return low


def _with_added(to: Any, now: Any, before: Any) -> Any:
    """Apply the changes of settings from `before` to `now` to others: merge dicts, extend lists."""
    if equal(now, before):
        return to
    if isinstance(now, dict):
        to, before = to or {}, before or {}
        return {**to, **{name: _with_added(to.get(name), value, before.get(name)) for name, value in now.items()}}
    return [*(to or []), *now[len(before or []) :]] if isinstance(now, list) else now


def taken_pair(patcher: Any) -> Pair | None:
    """The pair of a MODEL, taken out of its options."""
    found: Pair | None = patcher.model_options.pop(PAIR, None)
    return found


def join_pair(hook: Hook, model: Any) -> None:
    """Give a hook of a MODEL's clone that of the low-noise model, if it is a pair."""
    pair = taken_pair(hook.patcher)
    if pair is not None:
        hook.low, hook.boundary = type(hook)(pair.low(model)), pair.boundary
        hook.low.handler = hook.handler


def shapes_of_weights(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes of a MODEL's weights."""
    return sorted((name, tuple(weight.shape)) for name, weight in model.model.diffusion_model.named_parameters())
