"""The error of an edit of the bundled clip from queries and keys in lower precision."""

from __future__ import annotations

import argparse

import torch
from common import machine, table, write_section

from fatezero import StoreSettings, edit, invert
from fatezero.cli.config.settings import EditConfig, with_preset
from fatezero.demo.scenes import render
from fatezero.demo.show import EDITS, FRAMES, MOTION, SCENE
from fatezero.hosts.diffusers.checkpoint import Checkpoint
from fatezero.metrics.preservation import psnr
from fatezero.store.budget import PRECISIONS, format_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    checkpoint = Checkpoint.load("demo")
    latents = checkpoint.encode_frames(render(SCENE, MOTION, FRAMES).frames)
    source, negative = (checkpoint.encode_prompt(text, 64, 64) for text in (SCENE.caption, ""))
    rows, exact = [], {}
    for precision in ("model", *PRECISIONS):
        settings = StoreSettings("queries_keys", precision=precision)
        inversion = invert(checkpoint.denoiser, latents, source, steps, memory=settings)
        row = [precision, format_bytes(inversion.store.nbytes)]
        for preset, (_, edited) in EDITS.items():
            config = with_preset(EditConfig(source=SCENE.caption, target=edited.caption), preset)
            target = checkpoint.encode_prompt(edited.caption, 64, 64)
            prompt = config.prompt_edit(checkpoint.tokenizer)
            arguments = (target, negative, 7.5, prompt, config.fusion)
            frames = checkpoint.decode_latents(edit(checkpoint.denoiser, inversion, *arguments))
            error = psnr(frames, exact.setdefault(preset, frames))
            row.append("reference" if precision == "model" else f"{error:.1f} dB")
        rows.append(row)
        print(*row, flush=True)
    head = ["precision", "store", *(f"{preset} edit" for preset in EDITS)]
    text = (
        f"{machine(torch.device('cpu'), torch.float32)}. The bundled model in float32, its clip of 8 frames, {steps} "
        "steps: PSNR of the edited frames against those of a store in the model's own precision.\n\n"
        f"{table(head, rows)}"
    )
    write_section("Precision of kept queries and keys", text)


if __name__ == "__main__":
    main()
