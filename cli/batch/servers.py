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
from .processes import RetryPolicy
from .work import Ended, Measure
from .workflow import Graph, filled, load_workflow

_SHOWN = ("video", "start", "stride", "count")
"""The settings that select the frames of a job's clip."""
_ASK_EVERY = 0.5
"""Seconds between two polls of a job's state."""


# --- a server ---------------------------------------------------------------------------------


class ServerGoneError(OSError):
    """A server does not respond."""


class JobError(OSError):
    """A job failed on a server, or was refused."""


@dataclass(frozen=True)
class Server:
    """A ComfyUI server by its address. client: our ID for it."""

    url: str
    client: str

    def request(self, path: str, data: Any = None, kind: str = "application/json") -> bytes:
        """Raises JobError with the server's message, and ServerGoneError if it does not respond."""
        body = data if isinstance(data, (bytes, type(None))) else json.dumps(data).encode()
        try:
            with urlopen(Request(f"{self.url}{path}", body, {"Content-Type": kind}), timeout=60) as answer:
                return bytes(answer.read())
        except HTTPError as error:
            raise JobError(_refusal(error.read())) from error
        except (URLError, OSError) as error:
            raise ServerGoneError(f"{self.url} does not respond: {getattr(error, 'reason', error)}") from error

    def version(self) -> str:
        return str(json.loads(self.request("/system_stats"))["system"].get("comfyui_version", ""))

    def upload(self, path: Path) -> str:
        """Upload into the server's input folder, under a name with its digest; returns that name."""
        edge, name = uuid.uuid4().hex, f"{path.stem}_{digest_of(path)[:12]}{path.suffix}".replace('"', "")
        fields = {"type": "input", "subfolder": "fatezero", "overwrite": "true"}
        head = "".join(
            f'--{edge}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        )
        head += f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'
        body = head.encode() + path.read_bytes() + f"\r\n--{edge}--\r\n".encode()
        answer = json.loads(self.request("/upload/image", body, f"multipart/form-data; boundary={edge}"))
        return "/".join(filter(None, (answer.get("subfolder", ""), answer["name"])))

    def queue(self, graph: Graph) -> str:
        """Queue a prompt; returns its ID. Raises JobError if the server refuses a part, which it would leave out."""
        answer = self.request("/prompt", {"prompt": graph, "client_id": self.client})
        queued = json.loads(answer)
        if queued.get("node_errors"):
            self.stop(queued["prompt_id"])
            raise JobError(_refusal(answer))
        return str(queued["prompt_id"])

    def outputs(self, prompt: str) -> dict[str, Any] | None:
        """A prompt's outputs by node; None while it runs. Raises JobError if it failed or was removed."""
        queue = json.loads(self.request("/queue"))
        waiting = any(prompt in entry for part in queue.values() for entry in part)
        done = json.loads(self.request(f"/history/{prompt}")).get(prompt)
        if done is None:
            if not waiting:
                raise JobError("it was removed from the server's queue")
            return None
        for kind, about in done.get("status", {}).get("messages", []):
            if kind == "execution_interrupted":
                raise JobError("it was interrupted on the server")
            if kind == "execution_error":
                message = " ".join(str(about.get("exception_message", "")).split())
                raise JobError(f"{about.get('node_type')} (node {about.get('node_id')}): {message}")
        return dict(done["outputs"])

    def stop(self, prompt: str) -> None:
        """Remove a prompt from the queue, and interrupt it if it runs."""
        self.request("/queue", {"delete": [prompt]})
        running = json.loads(self.request("/queue"))["queue_running"]
        if any(prompt in entry for entry in running):
            self.request("/interrupt", {"prompt_id": prompt})

    def fetch(self, file: Mapping[str, str]) -> bytes:
        query = {key: file[key] for key in ("filename", "subfolder", "type") if key in file}
        return self.request(f"/view?{urlencode(query)}")


def _refusal(answer: bytes) -> str:
    """The reason why a server refused a prompt: its message, and each node's."""
    try:
        refused = json.loads(answer)
        error = refused.get("error", "")
        messages = [error["message"] if isinstance(error, dict) else str(error)]
        for node, about in (refused.get("node_errors") or {}).items():
            for one in about["errors"]:
                text = f"{about['class_type']} (node {node}): {one['message']} {one.get('details', '')}"
                messages.append(text.strip())
        return "; ".join(filter(None, messages))
    except (ValueError, LookupError, TypeError, AttributeError):
        return answer.decode(errors="replace")[:500]


# --- jobs on servers --------------------------------------------------------------------------


def run_on_servers(
    jobs: Sequence[Job], batch: Batch, folder: Path, urls: Sequence[str], policy: RetryPolicy, measure: Measure | None
) -> Iterator[Ended]:
    """Queue each job on a free server, one at a time on each, and yield its result when it ends.

    The job of a server that does not respond goes to another, and the server gets no more jobs.
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
            except IndexError:  # another thread took it
                break
            begun = time.monotonic()
            try:
                figures = _done(server, job, batch, graph, folder, policy, running, measure)
                ended.put(Ended(job.name, None, _since(begun), attempt, server.url, figures))
            except ServerGoneError as error:
                gone.append(str(error))
                if attempt > policy.retries:
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
        yield Ended(job.name, f"no server responds: {'; '.join(gone)}", attempts=attempt)


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 2)


def _done(
    server: Server, job: Job, batch: Batch, graph: Graph, folder: Path, policy: RetryPolicy, running: dict[Server, str],
    measure: Measure | None,
) -> dict[str, float]:  # fmt: skip
    """Run a job on a server and write its video with its record; returns its metrics."""
    values = dict(job.values)
    video = Path(from_home(str(values.get("video", ""))))
    if video.is_file():
        values["video"] = server.upload(video)
    prompt = filled(graph, values, batch.inputs)
    number = running[server] = server.queue(prompt)
    limit = None if policy.timeout is None else time.monotonic() + policy.timeout
    while (made := server.outputs(number)) is None:
        if limit is not None and time.monotonic() > limit:
            server.stop(number)
            raise JobError(f"it took more than {policy.timeout:g} seconds")
        time.sleep(_ASK_EVERY)
    result = folder / f"{job.name}{batch.suffix}"
    with whole_file(result) as partial:
        partial.write_bytes(server.fetch(_video_of(made, batch)))
    files = {"video": digest_of(video)} if video.is_file() else {}
    record = {"prompt": prompt, MADE: {"versions": {"comfyui": server.version()}, "files": files}}
    write_record(result, record)
    return measure(shown_of(job), result) if measure is not None and video.is_file() else {}


def _video_of(made: Mapping[str, Any], batch: Batch) -> Mapping[str, str]:
    """The one video that a workflow saved; JobError for none or several."""
    nodes = {
        node: outputs for node, outputs in made.items() if batch.inputs.get("result", node).partition(".")[0] == node
    }
    files = [
        file
        for outputs in nodes.values()
        for part in outputs.values()
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
    """A reader of jobs for servers: `shown_of`, which raises ConfigError for a setting that the workflow lacks."""
    graph = load_workflow(batch)

    def read(job: Job) -> EditConfig:
        filled(graph, job.values, batch.inputs)
        return shown_of(job)

    return read


def shown_of(job: Job) -> EditConfig:
    """The settings that select the frames of a job's clip."""
    return EditConfig(**checked({name: job.values[name] for name in _SHOWN if name in job.values}))
