"""A batch on ComfyUI servers: a workflow's API form, filled in for each job and queued over HTTP."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from ...files.stopping import at_end
from ...files.whole import whole_file
from ..config.files import MADE
from ..config.paths import digest_of
from ..config.record import write_record
from ..config.settings import EditConfig
from ..config.values import checked, from_home
from ..progress import in_a_line
from .jobs import Batch, Job
from .processes import Patience
from .work import Ended, Measure
from .workflow import Graph, filled, load_workflow

_SHOWN = ("video", "start", "stride", "count")
"""The settings that say which part of its clip a job edits."""
_ASK_EVERY = 0.5
"""Seconds between two questions whether a job has ended."""


# --- a server ---------------------------------------------------------------------------------


class ServerGoneError(OSError):
    """A server does not answer."""


class JobError(OSError):
    """What a server says of a job that it could not do."""


@dataclass(frozen=True)
class Server:
    """A ComfyUI server by its address. client: how it shall know us."""

    url: str
    client: str

    def ask(self, path: str, data: Any = None, kind: str = "application/json") -> bytes:
        """Raises JobError with what the server says, and ServerGoneError where it does not answer."""
        body = data if isinstance(data, (bytes, type(None))) else json.dumps(data).encode()
        try:
            with urlopen(Request(f"{self.url}{path}", body, {"Content-Type": kind}), timeout=60) as answer:
                return bytes(answer.read())
        except HTTPError as error:
            raise JobError(_refusal(error.read())) from error
        except (URLError, OSError) as error:
            raise ServerGoneError(f"{self.url} does not answer: {getattr(error, 'reason', error)}") from error

    def version(self) -> str:
        return str(json.loads(self.ask("/system_stats"))["system"].get("comfyui_version", ""))

    def upload(self, path: Path) -> str:
        """Into the server's input folder, under a name of its content; the name there."""
        edge, name = uuid.uuid4().hex, f"{path.stem}_{digest_of(path)[:12]}{path.suffix}".replace('"', "")
        fields = {"type": "input", "subfolder": "fatezero", "overwrite": "true"}
        head = "".join(
            f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head += f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{edge}--\r\n".encode()
        told = json.loads(self.ask("/upload/image", body, f"multipart/form-data; boundary={edge}"))
        return "/".join(filter(None, (told.get("subfolder", ""), told["name"])))

    def queue(self, graph: Graph) -> str:
        """The number of a prompt in the queue; JobError where a part of it is refused, which would be left out."""
        answer = self.ask("/prompt", {"prompt": graph, "client_id": self.client})
        told = json.loads(answer)
        if told.get("node_errors"):
            self.stop(told["prompt_id"])
            raise JobError(_refusal(answer))
        return str(told["prompt_id"])

    def outputs(self, prompt: str) -> dict[str, Any] | None:
        """What a prompt made, by node; None while it is not done. JobError where it failed or was taken away."""
        queue = json.loads(self.ask("/queue"))
        waiting = any(prompt in entry for part in queue.values() for entry in part)
        held = json.loads(self.ask(f"/history/{prompt}")).get(prompt)
        if held is None:
            if not waiting:
                raise JobError("it was removed from the server's queue")
            return None
        for kind, about in held.get("status", {}).get("messages", []):
            if kind == "execution_interrupted":
                raise JobError("it was interrupted on the server")
            if kind == "execution_error":
                message = " ".join(str(about.get("exception_message", "")).split())
                raise JobError(f"{about.get('node_type')} (node {about.get('node_id')}): {message}")
        return dict(held["outputs"])

    def stop(self, prompt: str) -> None:
        """Take a prompt out of the queue, and interrupt it if it runs."""
        self.ask("/queue", {"delete": [prompt]})
        running = json.loads(self.ask("/queue"))["queue_running"]
        if any(prompt in entry for entry in running):
            self.ask("/interrupt", {"prompt_id": prompt})

    def fetch(self, file: Mapping[str, str]) -> bytes:
        asked = {key: file[key] for key in ("filename", "subfolder", "type") if key in file}
        return self.ask(f"/view?{urlencode(asked)}")


def _refusal(answer: bytes) -> str:
    """Why a server refused a prompt: its own message, and each node's."""
    try:
        held = json.loads(answer)
        error = held.get("error", "")
        told = [error["message"] if isinstance(error, dict) else str(error)]
        for node, about in (held.get("node_errors") or {}).items():
            for one in about["errors"]:
                told.append(f"{about['class_type']} (node {node}): {one['message']} {one.get('details', '')}".strip())
        return "; ".join(filter(None, told))
    except (ValueError, LookupError, TypeError, AttributeError):
        return answer.decode(errors="replace")[:500]


# --- jobs on servers --------------------------------------------------------------------------


def run_on_servers(
    jobs: Sequence[Job], batch: Batch, folder: Path, urls: Sequence[str], patience: Patience, measure: Measure | None
) -> Iterator[Ended]:
    """Queue each job on a server that is free, one after another on each, and tell how it ended, as it ends.

    A server that does not answer gives its job back, and gets no other.
    """
    graph, client = load_workflow(batch), uuid.uuid4().hex
    servers = [Server(url.rstrip("/"), client) for url in urls]
    todo, ended = deque((job, 1) for job in jobs), Queue[Ended | None]()
    running, gone = dict[Server, str](), list[str]()

    def stop_all() -> None:
        for server, prompt in list(running.items()):
            with suppress(OSError):
                server.stop(prompt)

    def serve(server: Server) -> None:
        while todo:
            try:
                job, attempt = todo.popleft()
            except IndexError:  # another was quicker
                break
            begun = time.monotonic()
            try:
                figures = _done(server, job, batch, graph, folder, patience, running, measure)
                ended.put(Ended(job.name, None, _since(begun), attempt, server.url, figures))
            except ServerGoneError as error:
                gone.append(str(error))
                if attempt > patience.retries:
                    ended.put(Ended(job.name, str(error), _since(begun), attempt, server.url))
                else:
                    todo.append((job, attempt + 1))
                break
            except Exception as error:
                ended.put(Ended(job.name, in_a_line(str(error)), _since(begun), attempt, server.url))
            finally:
                running.pop(server, None)
        ended.put(None)

    at_end(stop_all)
    for server in servers:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    working = len(servers)
    while working:
        one = ended.get()
        if one is None:
            working -= 1
        else:
            yield one
    for job, attempt in todo:
        yield Ended(job.name, f"no server is left: {'; '.join(gone)}", attempts=attempt)


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 2)


def _done(
    server: Server, job: Job, batch: Batch, graph: Graph, folder: Path, patience: Patience, running: dict[Server, str],
    measure: Measure | None,
) -> dict[str, float]:  # fmt: skip
    """Have a server do a job, fetch its video and write it with its record; the figures."""
    values = dict(job.values)
    video = Path(from_home(str(values.get("video", ""))))
    if video.is_file():
        values["video"] = server.upload(video)
    asked = filled(graph, values, batch.inputs)
    prompt = running[server] = server.queue(asked)
    limit = None if patience.timeout is None else time.monotonic() + patience.timeout
    while (made := server.outputs(prompt)) is None:
        if limit is not None and time.monotonic() > limit:
            server.stop(prompt)
            raise JobError(f"it took longer than {patience.timeout:g} seconds")
        time.sleep(_ASK_EVERY)
    result = folder / f"{job.name}{batch.suffix}"
    with whole_file(result) as partial:
        partial.write_bytes(server.fetch(_video_of(made, batch)))
    files = {"video": digest_of(video)} if video.is_file() else {}
    record = {"prompt": asked, MADE: {"versions": {"comfyui": server.version()}, "files": files}}
    write_record(result, record)
    return measure(shown_of(job), result) if measure is not None and video.is_file() else {}


def _video_of(made: Mapping[str, Any], batch: Batch) -> Mapping[str, str]:
    """The one video that a workflow saved; JobError for none or several."""
    nodes = {node: held for node, held in made.items() if batch.inputs.get("result", node).partition(".")[0] == node}
    files = [
        file
        for held in nodes.values()
        for part in held.values()
        for file in (part if isinstance(part, list) else ())
        if isinstance(file, dict) and file.get("type") == "output" and str(file.get("filename")).endswith(batch.suffix)
    ]
    if len(files) != 1:
        raise JobError(
            f"the workflow saved {len(files) or 'no'} {batch.suffix} files: "
            + (
                'name the node by inputs, e.g. "result: 13"'
                if files
                else "it needs a node that saves a video, or suffix"
            )
        )
    return dict(files[0])


def for_server(batch: Batch) -> Callable[[Job], EditConfig]:
    """What reads jobs that servers do: `shown_of`, and ConfigError for a setting that the workflow has no place for."""
    graph = load_workflow(batch)

    def read(job: Job) -> EditConfig:
        filled(graph, job.values, batch.inputs)
        return shown_of(job)

    return read


def shown_of(job: Job) -> EditConfig:
    """The part of its clip that a job edits, as far as its settings say."""
    return EditConfig(**checked({name: job.values[name] for name in _SHOWN if name in job.values}))
