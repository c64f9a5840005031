"""Bytes of an attention store for an SD 1.5-shaped UNet, in each memory, without running it."""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel

from fatezero.attention.key_frames import KeyFrames
from fatezero.attention.store import MEMORIES, Condition, store_bytes
from fatezero.demo.model import build_scheduler
from fatezero.hosts.diffusers import DiffusersDenoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--height", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=1024)
    given = parser.parse_args()

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).half()
    shape = (given.frames, 4, given.height // 8, given.width // 8)
    sites = [s for s in DiffusersDenoiser(unet, build_scheduler()).sites(*shape[-2:]) if s.tokens <= given.max_tokens]
    text = Condition(torch.empty(1, 77, 768, device="meta", dtype=torch.float16))
    print(f"{given.frames} frames of {given.width}x{given.height}, {given.steps} steps, fp16, {len(sites)} layers")
    for entries in (("middle",), ("self", "middle")):
        for memory in MEMORIES:
            needed = store_bytes(memory, sites, shape, given.steps, text, KeyFrames(entries), 4, 2)
            print(f"key frames {'+'.join(entries):<12} {memory:<13} {needed / 1e6:>12,.1f} MB")


if __name__ == "__main__":
    main()
