"""A profile of an edit: the UNet's own layers, the attention kernels, and the rest."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import (
    SHAPES,
    denoiser_of,
    machine,
    prompt_pair,
    random_inputs,
    random_unet,
    settle,
    table,
    timed,
    write_section,
)

from fatezero import FusionSettings, StoreSettings, edit, invert
from fatezero.attention.control import Control
from fatezero.cli.config.settings import PRESETS
from fatezero.methods.fatezero import Fuser
from fatezero.store.records import Recorder


@contextmanager
def watched(unet: torch.nn.Module, device: torch.device, spent: dict[str, float]) -> Iterator[None]:
    """Measure the seconds in the UNet, in its attention controls, and in the kernels they call."""

    running: set[str] = set()

    def timing(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if name in running:  # a fuser calls its base class
                return work(*args, **kwargs)
            running.add(name)
            settle(device)
            start = time.perf_counter()
            made = work(*args, **kwargs)
            settle(device)
            spent[name] += time.perf_counter() - start
            running.discard(name)
            return made

        return run

    def with_kernel(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(control: Control, *args: Any) -> Any:
            if not hasattr(control.attend, "watched"):
                control.attend = timing("kernels", control.attend)
                control.attend.watched = True  # type: ignore[attr-defined]
            return work(control, *args)

        return run

    kinds = [(kind, name) for kind in (Control, Recorder, Fuser) for name in ("self_attention", "cross_attention")]
    before = [(kind, name, vars(kind)[name]) for kind, name in kinds]
    forward = unet.forward
    try:
        unet.forward = timing("unet", forward)
        for kind, name, method in before:
            setattr(kind, name, with_kernel(timing("controls", method)))
        yield
    finally:
        unet.forward = forward
        for kind, name, method in before:
            setattr(kind, name, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    device, dtype = torch.device(given.device), getattr(torch, given.dtype)

    unet = random_unet(given.model, device, dtype)
    denoiser = denoiser_of(unet)
    latents, (source, target, negative) = random_inputs(unet, given.frames, given.size)
    rows = []
    for memory, place in (("recompute", "auto"), ("queries_keys", "auto"), ("queries_keys", "disk")):
        inversion = invert(denoiser, latents, source, given.steps, memory=StoreSettings(memory, place, max_tokens=1024))
        for preset in ("style", "shape"):
            spent: dict[str, float] = defaultdict(float)
            fusion = FusionSettings(**PRESETS[preset], max_tokens=1024)
            prompt = prompt_pair(preset == "shape")

            def run(inversion: Any = inversion, prompt: Any = prompt, fusion: Any = fusion) -> None:
                edit(denoiser, inversion, target, negative, 7.5, prompt, fusion)

            run()
            with watched(unet, device, spent):
                total = timed(run, device)
            fusing = spent["controls"] - spent["kernels"]
            outside = total - spent["unet"]
            shares = ((spent["unet"] - fusing) / total, fusing / total, outside / total)
            place_of = inversion.store.plan.place if inversion.store.plan else place
            rows.append([memory, place_of, preset, f"{total:.2f} s", *(f"{100 * share:.1f} %" for share in shares)])
    head = ["memory", "place", "edit", "time", "UNet's own layers", "fusion and key frames", "between calls"]
    text = (
        f"{machine(device, dtype)}. {given.frames} frames of {given.size}x{given.size}, {given.steps} steps, "
        "key frames self+middle, layers up to 32x32 fused. Attention kernels count as the UNet's.\n\n"
        f"{table(head, rows)}"
    )
    write_section(f"Profile: {given.model}, {device.type}, {given.dtype}", text)


if __name__ == "__main__":
    main()
