"""Everything that this project measures on a GPU, most important first, within some minutes: `make gpu`.

It needs Python 3.10, PyTorch, transformers, accelerate, safetensors and einops, and diffusers, installed or brought by
`make gpu-wheels`; no network, no weights, no video. Each row is a line of `rows.jsonl`, written as soon as it is
measured, by a process of its own, so that a crash or a lack of memory costs one row. `make gpu-report` puts the rows
into `benchmarks/RESULTS.md`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from checkout import use_checkout, use_packages

use_checkout()
LEAST = 3.0
"""Seconds below which no row is begun."""


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="rehearse every row on tiny models")
    parser.add_argument("--seconds", type=float, default=480, help="when to stop; rows that are left stay open")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder of rows.jsonl")
    parser.add_argument("--only", metavar="TEXT", help="rows whose name holds this text, added to those in the folder")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the row that is under way
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # or a look for a GPU would spoil it for forks
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as packages,
        (given.out / "rows.jsonl").open("a" if given.only else "w", encoding="utf-8") as file,
    ):
        use_packages(packages)
        import gpu_rows

        method, about = about_device(given.device)
        print(f"{about['device']}; {about['versions']}; rows go to {file.name}", flush=True)
        for number, row in enumerate(gpu_rows.ROWS):
            if given.only and given.only not in row.name:
                continue
            left = given.seconds - (time.monotonic() - begun)
            if left < LEAST:
                found = {"why": "not measured yet"}
            else:
                limit = left if given.tiny else min(left, row.seconds)
                found = in_process(method, limit, "measure", number, given.device, given.tiny)
            line = {"name": row.name, "group": row.group, "units": row.units, "numbers": {}, **about, **found}
            file.write(json.dumps(line) + "\n")
            file.flush()
            told = found.get("why") or ", ".join(f"{n} {v:.3g} {row.units[n]}" for n, v in found["numbers"].items())
            print(f"[{time.monotonic() - begun:4.0f} s] {row.group} {row.name}: {told}", flush=True)


def about_device(device: str) -> tuple[str, dict[str, Any]]:
    """How processes are begun, and what is known of a device; ends the command where it cannot be used.

    A fork imports nothing again, but must not come after a look at the GPU, which another import may have taken.
    """
    found = in_process(method := "fork", 120.0, "about", device)
    if "forked subprocess" in found.get("why", ""):
        found = in_process(method := "spawn", 120.0, "about", device)
    if "why" in found:
        why = found["why"].rstrip(".")
        raise SystemExit(f"--device {device} cannot be used: {why}. --device cpu --tiny rehearses without a GPU")
    return method, found


# --- a process for each row -----------------------------------------------------------------


def in_process(method: str, limit: float, work: str, *given: Any) -> dict[str, Any]:
    """What a function of `gpu_rows` returns in a process of its own, or `{"why": ...}` where it does not."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, work, given))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return {"why": f"took longer than {limit:.0f} s"}
        found: dict[str, Any] = ours.recv()
        process.join(10)  # it has stores on disk to remove
        return found
    except EOFError:
        process.join()
        code = process.exitcode
        return {"why": f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"}
    finally:
        if process.is_alive():
            with suppress(ProcessLookupError):  # it may not lead its group yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        ours.close()


def answer(connection: Connection, work: str, given: tuple[Any, ...]) -> None:
    """Work in this process, and send its result or why there is none."""
    os.setsid()  # so that what it starts ends with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        import gpu_rows

        found = getattr(gpu_rows, work)(*given)
    except BaseException as error:
        known = type(error).__name__ == "UnavailableError" or work == "about"
        if not known:
            traceback.print_exc()
        found = {"why": " ".join((str(error) if known else f"{type(error).__name__}: {error}").split())[:300]}
    connection.send(found)
    connection.close()


if __name__ == "__main__":
    main()
