"""The cost of checksums of a store on disk: reading it with and without them, and an edit from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import denoiser_of, machine, prompt_pair, random_inputs, random_unet, table, timed, write_section

from fatezero import AttentionStore, FusionSettings, StoreSettings, edit, invert
from fatezero.cli.config.settings import PRESETS
from fatezero.diffusion.invert import Inversion
from fatezero.files.safetensors import SafetensorsReader, format_bytes
from fatezero.store.identity import ModelIdentity

REPEATS = 5
CPU = torch.device("cpu")


def main() -> None:
    unet = random_unet("mid", CPU, torch.float32)
    denoiser = denoiser_of(unet)
    latents, (source, target, negative) = random_inputs(unet, 4, 256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.safetensors"
        written = timed(
            lambda: invert(denoiser, latents, source, 5, memory=StoreSettings("queries_keys", path=path)), CPU
        )
        reader = SafetensorsReader(path)
        names = [name for name in reader.tensors if name != "checksums"]
        size = path.stat().st_size

        def read(check: bool) -> Callable[[], None]:
            return lambda: [reader.read(name, check=check) for name in names] and None

        def edited(check: bool) -> Callable[[], None]:
            plain = SafetensorsReader._check
            fusion = FusionSettings(**PRESETS["style"])

            def work() -> None:
                if not check:
                    SafetensorsReader._check = lambda *given: None  # type: ignore[method-assign]
                try:
                    inversion = Inversion(AttentionStore.load(path))
                    edit(denoiser, inversion, target, negative, 7.5, prompt_pair(False), fusion)
                finally:
                    SafetensorsReader._check = plain  # type: ignore[method-assign]

            return work

        rows = []
        for what, work in (("reading all of it", read), ("an edit of 5 steps", edited)):
            times = [[timed(work(check), CPU) for check in (False, True)] for _ in range(REPEATS)]
            bare, checked = (min(of) for of in zip(*times, strict=True))
            rows.append([what, f"{bare:.2f} s", f"{checked:.2f} s", f"{checked / bare:.2f}"])
            print(*rows[-1], flush=True)
        weights = sum(p.nbytes for p in unet.parameters())
        identity = timed(lambda: ModelIdentity.of("", torch.float32, unet.state_dict().items()), CPU)
    text = (
        f"{machine(CPU, torch.float32)}. The mid UNet, 4 frames of 256x256, memory queries_keys on disk, "
        f"{format_bytes(size)} written in an inversion of {written:.1f} s; a CRC-32 for each row. Best of {REPEATS}. "
        f"The model's identity, computed once for its {format_bytes(weights)}: {identity:.1f} s.\n\n"
        f"{table(['', 'without checksums', 'with', 'ratio'], rows)}"
    )
    write_section("Checksums of stores", text)


if __name__ == "__main__":
    main()
