"""The rows of `gpu.py`, most important first."""

from __future__ import annotations

import json
from functools import partial
from math import isfinite
from typing import Any

import diffusers
import torch
from gpu_checks import (
    COUNTED,
    DIGITS,
    FIXTURES,
    GRAPH,
    GUIDANCE,
    MEMORIES,
    OFFLOADED,
    PINNED,
    STREAM,
    TUNED,
    cuda_graph,
    fatezero_case,
    guidance_case,
    memories,
    offloaded,
    peak_memory,
    pinned,
    side_stream,
    tokenflow_case,
    tuning_case,
    wan_case,
)
from gpu_costs import (
    BACKENDS,
    COMPILED,
    COST,
    KERNEL,
    LAYERS,
    RATE,
    STEP,
    STORE,
    compiled_unet,
    compiled_wan,
    kernel,
    plain,
    store,
    unet_pnp,
    unet_preset,
    unet_tokenflow,
    unet_xformers,
    wan_flow_edit,
    wan_preset,
    wan_step,
)
from gpu_machine import Machine, Row

from fatezero.benchmarks.common import device_name

CASES = tuple(json.loads((FIXTURES / "cases.json").read_text(encoding="utf-8"))["cases"])
on_wan = partial(wan_preset, blocks=2)
on_short = partial(on_wan, latents=(5, 30, 52))
"""17 frames of 416x240, whose maps fit in memory."""

ROWS = (
    # The first rows of each kind, so that a short run has some of each.
    Row("a", "plain DDIM", RATE, plain),
    Row("a", "style, recompute", STORE, partial(store, memory="recompute")),
    Row("a", "style, queries_keys on the device", STORE, partial(store, memory="queries_keys")),
    Row("b", "style on the whole model", COST, partial(wan_preset, preset="style", steps=2), 70),
    *(Row("d", f"reference case {name}", DIGITS, partial(fatezero_case, name=name)) for name in CASES[:1]),
    Row("b", "attribute+", COST, partial(on_wan, preset="attribute+")),
    Row("b", "FlowEdit", COST, partial(wan_flow_edit, blocks=2)),
    Row("a", "style, queries_keys in RAM", STORE, partial(store, memory="queries_keys", place="ram")),
    Row("a", "attribute+", COST, partial(unet_preset, preset="attribute+")),
    Row("a", "shape+", COST, partial(unet_preset, preset="shape+")),
    Row("a", "Plug-and-Play", COST, unet_pnp),
    Row("a", "TokenFlow with Plug-and-Play", COST, unet_tokenflow),
    Row("a", "style with flow smoothing", COST, partial(unet_preset, preset="style", smoothed=True)),
    Row("d", "memories agree, float32", MEMORIES, partial(memories, precision="float32")),
    Row("d", "memories agree, float16", MEMORIES, partial(memories, precision="float16")),
    Row("d", "the hooks in a CUDA graph", GRAPH, cuda_graph),
    Row("d", "the hooks on a side stream", STREAM, side_stream),
    Row("d", "a store in RAM is pinned", PINNED, pinned),
    Row("b", "one step of the whole model", STEP, wan_step, 60),
    Row("b", "naive: maps kept, a short clip", COST, partial(on_short, preset="style", memory="maps")),
    Row("b", "recompute, the same short clip", COST, partial(on_short, preset="style")),
    *(Row("b", name, COST, partial(on_wan, preset=name)) for name in ("style", "shape", "style+", "shape+")),
    Row("a", "style, maps", STORE, partial(store, memory="maps")),
    Row("c", "SDXL: style", COST, partial(unet_preset, preset="style", shape="sdxl", frames=4, size=1024, steps=5)),
    Row("c", "Wan 14B: style", COST, partial(wan_preset, preset="style", shape="14B", blocks=2), 40),
    *(
        Row("c", f"{layer}: {name}", KERNEL, partial(kernel, layer=layer, name=name), 15)
        for layer in LAYERS
        for name in (*BACKENDS, "xformers")
    ),
    Row("a", "style, queries_keys on disk", STORE, partial(store, memory="queries_keys", place="disk")),
    Row("a", "style, recompute, key frames middle", STORE, partial(store, memory="recompute", keys=("middle",))),
    Row("a", "style, queries_keys, key frames middle", STORE, partial(store, memory="queries_keys", keys=("middle",))),
    *(Row("a", name, COST, partial(unet_preset, preset=name)) for name in ("shape", "style+")),
    *(Row("d", f"reference case {name}", DIGITS, partial(fatezero_case, name=name)) for name in CASES[1:]),
    Row("d", "reference case tokenflow_pnp", DIGITS, tokenflow_case),
    Row("d", "reference case guidance_backward", GUIDANCE, guidance_case),
    Row("d", "a small Wan, shape edit", DIGITS, partial(wan_case, flow_edit=False)),
    Row("d", "a small Wan, FlowEdit", DIGITS, partial(wan_case, flow_edit=True)),
    Row("e", "tuning", TUNED, tuning_case),
    Row("e", "peak memory is counted", COUNTED, peak_memory),
    Row("e", "weights that wait in RAM", OFFLOADED, offloaded),
    Row("c", "Wan's blocks compiled: plain sampling", COMPILED, partial(compiled_wan, edits=False), 60),
    Row("c", "Wan's blocks compiled: an edit", COMPILED, partial(compiled_wan, edits=True), 60),
    Row("c", "SD 1.5's blocks compiled: plain sampling", COMPILED, partial(compiled_unet, edits=False), 60),
    Row("c", "SD 1.5's blocks compiled: an edit", COMPILED, partial(compiled_unet, edits=True), 60),
    Row("a", "style with xformers", COST, unet_xformers),
    Row("c", "Wan 14B: one step of the whole model", STEP, partial(wan_step, shape="14B", latents=(9, 60, 104)), 60),
    Row("b", "naive: maps kept, 81 frames", COST, partial(on_wan, preset="style", memory="maps")),
)  # fmt: skip


def about(device: str) -> dict[str, Any]:
    """A device's name and the versions of libraries."""
    own = torch.device(device)
    torch.empty(1, device=own)
    libraries = {"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__}
    if own.type == "cuda":
        libraries["CUDA"] = str(torch.version.cuda)
    return {"device": device_name(own), "versions": ", ".join(f"{name} {v}" for name, v in libraries.items())}


def measure(number: int, device: str, tiny: bool) -> dict[str, Any]:
    """A row's result, or the reason for none."""
    row = ROWS[number]
    if tiny:
        torch.set_num_threads(1)  # more threads would be slower
    found = row.work(Machine(torch.device(device), tiny, row.seconds / 2))
    assert set(found.numbers) == set(row.units)
    wrong = [name for name, value in found.numbers.items() if not isfinite(value)]
    if wrong:
        return {"why": f"{', '.join(wrong)}: not a finite number"}
    dtype = "" if found.dtype is None else str(found.dtype).removeprefix("torch.")
    return {"numbers": found.numbers, "shape": found.shape, "dtype": dtype, "scaled": found.scaled}
