"""Bytes of an attention store of SD 1.5 by memory, without running the model."""

from __future__ import annotations

import argparse

import torch
from common import denoiser_of, random_unet

from fatezero import StoreSettings
from fatezero.attention.key_frames import KeyFrames
from fatezero.store.budget import PRECISIONS, Demand
from fatezero.store.records import MEMORIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--keep-steps", type=float, default=1.0, help="share of steps whose attention is stored")
    given = parser.parse_args()

    denoiser = denoiser_of(random_unet("sd15", torch.device("meta"), torch.float16))
    shape = (given.frames, 4, given.height // 8, given.width // 8)
    sites = denoiser.sites(*shape[-2:])
    print(f"{given.frames} frames of {given.width}x{given.height}, {given.steps} steps, fp16")
    for entries in (("middle",), ("self", "middle")):
        demand = Demand(sites, shape, 4, given.steps, KeyFrames(entries), torch.float16, 77, 77 * 768 * 2)
        for memory in MEMORIES:
            for precision in ("model", *PRECISIONS) if memory == "queries_keys" else ("model",):
                settings = StoreSettings(
                    memory, precision=precision, keep_steps=given.keep_steps, max_tokens=given.max_tokens
                )
                needed = demand.nbytes(memory, settings) / 1e6
                print(f"key frames {'+'.join(entries):<12} {memory:<13} {precision:<9} {needed:>12,.1f} MB")


if __name__ == "__main__":
    main()
