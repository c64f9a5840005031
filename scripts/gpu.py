"""All GPU measurements, most important first, within minutes: `make gpu`.

Needs Python 3.10, PyTorch, transformers, accelerate, safetensors, einops, and diffusers, installed or from
`make gpu-wheels`; no network, no weights, no video. Each row is measured in its own process, so that a crash or a lack
of memory costs one row, and is written to `rows.jsonl` at once. `make gpu-report` writes the rows to
`benchmarks/RESULTS.md`.
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
"""Least remaining seconds to start a row."""


def main() -> None:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="run every row on tiny models")
    parser.add_argument("--seconds", type=float, default=480, help="time limit; remaining rows stay open")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of rows.jsonl")
    parser.add_argument("--only", metavar="TEXT", help="measure rows whose name contains this, and append them")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running row too
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # CUDA must not be initialized before a fork
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
        print(f"{about['device']}; {about['versions']}; writing rows to {file.name}", flush=True)
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
            result = found.get("why") or ", ".join(f"{n} {v:.3g} {row.units[n]}" for n, v in found["numbers"].items())
            print(f"[{time.monotonic() - begun:4.0f} s] {row.group} {row.name}: {result}", flush=True)


def about_device(device: str) -> tuple[str, dict[str, Any]]:
    """The start method of processes, and facts about a device; exits if the device cannot be used.

    A fork saves imports, but fails if another import has initialized CUDA.
    """
    found = in_process(method := "fork", 120.0, "about", device)
    if "forked subprocess" in found.get("why", ""):
        found = in_process(method := "spawn", 120.0, "about", device)
    if "why" in found:
        why = found["why"].rstrip(".")
        raise SystemExit(f"--device {device} cannot be used: {why}. Use --device cpu --tiny to try it without one")
    return method, found


# --- a process for each row -----------------------------------------------------------------


def in_process(method: str, limit: float, work: str, *given: Any) -> dict[str, Any]:
    """The result of a function of `gpu_rows` in a new process, or `{"why": ...}` if it fails."""
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, work, given))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return {"why": f"took longer than {limit:.0f} s"}
        found: dict[str, Any] = ours.recv()
        process.join(10)  # it removes its stores on disk
        return found
    except EOFError:
        process.join()
        code = process.exitcode
        return {"why": f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"}
    finally:
        if process.is_alive():
            with suppress(ProcessLookupError):  # it may not be a group leader yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        ours.close()


def answer(connection: Connection, work: str, given: tuple[Any, ...]) -> None:
    """Work in this process, and send the result or the reason for none."""
    os.setsid()  # its child processes end with it
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
