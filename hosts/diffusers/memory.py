"""Memory for activations of training and guidance, computed in advance on torch's meta device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...attention.condition import Condition
from ...attention.control import Control
from ...attention.key_frames import Chunk, KeyFrames
from ...diffusion.training import clip_loss
from .temporal import temporal_layers, with_temporal_layers
from .unet import DiffusersDenoiser


def activation_bytes(
    denoiser: DiffusersDenoiser,
    latents_shape: tuple[int, ...],
    condition: Condition,
    keys: KeyFrames,
    clip_norm: bool,
    recompute: bool = True,
    convolutions: bool = False,
) -> int:
    """Peak bytes of a training step on latents (frames, 4, h, w), besides weights, gradients and optimizer.

    A model of the same shapes runs forward and backward on torch's meta device, which allocates no memory. Workspaces
    of kernels are not included. recompute: recompute activations, as in `DiffusersDenoiser.training`. convolutions:
    train those over frames too.
    """
    own, latents, text = _without_data(denoiser, latents_shape, condition)
    noise = torch.empty_like(latents)
    with torch.enable_grad(), own.training(convolutions), own.hooked(clip_norm):
        if not recompute:
            own.unet.disable_gradient_checkpointing()
        _without_maps(own)
        gradients = sum(weight.nbytes for weight in own.trained(convolutions).values())
        with LiveBytes() as live:
            clip_loss(own, latents, noise, 500, text, keys).backward()
    return live.most - gradients


def guidance_bytes(
    denoiser: DiffusersDenoiser,
    latents_shape: tuple[int, ...],
    condition: Condition,
    keys: KeyFrames,
    clip_norm: bool,
    guide: Callable[[KeyFrames, Chunk], Any],
) -> tuple[int, int]:
    """Peak bytes of a guided step besides the weights: (of a gradient, of a plain call).

    guide: makes the control whose `loss` is differentiated.
    """
    own, latents, text = _without_data(denoiser, latents_shape, condition)
    chunk, most = Chunk.whole(len(latents)), []
    with own.hooked(clip_norm):
        _without_maps(own)
        for guided in (True, False):
            with LiveBytes() as live, torch.no_grad():
                if guided:
                    control = guide(keys, chunk)
                    own.gradient(latents, 500, text, control, control.loss)
                else:
                    own.predict_noise(latents, 500, text, Control(keys, chunk))
            most.append(live.most)
    return most[0], most[1]


def _without_data(
    denoiser: DiffusersDenoiser, latents_shape: tuple[int, ...], condition: Condition
) -> tuple[DiffusersDenoiser, Tensor, Condition]:
    """A model of the same shapes, with latents and a text, on torch's meta device."""
    layers = temporal_layers(denoiser.unet)
    with torch.device("meta"):
        kind: Any = denoiser.kind
        unet = kind.from_config(denoiser.unet.config).to(denoiser.dtype)
        if layers is not None:
            rank = next((conv.rank for conv in layers.convolutions.values()), None)
            with_temporal_layers(unet, None, layers.kind, rank)  # type: ignore[arg-type]
        text = Condition(
            torch.empty(condition.embeddings.shape), {n: torch.empty(v.shape) for n, v in condition.extras.items()}
        )
        return type(denoiser)(unet, denoiser.scheduler), torch.empty(latents_shape), text


def _without_maps(denoiser: DiffusersDenoiser) -> None:
    """Make a hooked model attend without maps, like fused kernels."""
    for layer, *_ in denoiser._layers.values():
        layer.processor.kernel = _Kernel.apply


class _Kernel(torch.autograd.Function):
    """Attention without a map, like fused kernels, which torch's meta device does not have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.shapes = [x.shape for x in (q, k, v)]
        ctx.save_for_backward(q, *(x.expand(len(q), -1, -1, -1).contiguous() for x in (k, v)))
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(gradient[0].new_empty(shape) for shape in ctx.shapes)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors created inside the block; known: models whose weights do not count."""

    def __init__(self, *known: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._counted = {w.untyped_storage()._cdata for model in known for w in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._counted:
            self._counted.add(key)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, nbytes: int) -> None:
        self._counted.discard(key)
        self.now -= nbytes
