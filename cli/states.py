"""The state of a run in a folder next to its output, to continue it after an interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..store.states import SavedStates, exists
from .config.paths import full_name, renamed
from .config.record import Provenance, settings_of, threads_on, versions
from .config.settings import EditConfig
from .session import Session

if TYPE_CHECKING:
    from ..hosts.diffusers.model import Model

_NO_EFFECT = {"place", "budget_gb"}
"""Settings that do not change results."""


def provenance(session: Session, checkpoint: Model, shape: Sequence[int], store: Path | None) -> Provenance:
    """The provenance of a run without its files. shape: of the clip's latents."""
    height, width = (side * checkpoint.factor for side in shape[-2:])
    return Provenance(
        versions(), str(checkpoint.device), str(checkpoint.dtype).removeprefix("torch."), threads_on(checkpoint.device),
        checkpoint.coding(height, width),
        checkpoint.denoiser.identity().digest, checkpoint.vae_identity.digest,
        store=None if store is None else str(store), model_config=session.model_config,
    )  # fmt: skip


def states_of(
    session: Session,
    output: str | Path,
    configs: Sequence[EditConfig],
    made: Provenance,
    files: Sequence[Mapping[str, str]],
    writes: bool = True,
    **about: Any,
) -> SavedStates:
    """The states of a run, in OUTPUT.state. files: the digests of the files that each edit reads. writes: see
    `SavedStates`. about: what else identifies the run.

    Raises ValueError for the state of another run, if the session resumes.
    """
    folder = Path(f"{str(output).rstrip('/')}.state")
    states = SavedStates(folder, _identity(configs, made, files) | about, session.resume, writes)
    if session.resume and not states.resumes:
        session.note(f"nothing to resume: there is no {folder}")
    elif session.resume is False and exists(folder):
        session.note(f"{folder} has the state of an interrupted run: this run starts over; --resume continues it")
    return states


def _identity(configs: Sequence[EditConfig], made: Provenance, files: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """What makes two runs equal to the last bit, as JSON: settings by name, with a list for several edits."""
    settings = [settings_of(renamed(config, full_name)) for config in configs]
    found = {name: [one.get(name) for one in settings] for one in settings for name in one if name not in _NO_EFFECT}
    found |= {f"file of {what}": [one.get(what) for one in files] for one in files for what in one}
    here = {name: value for name, value in asdict(made).items() if name not in ("coding", "files", "frames")}
    return {name: several[0] if len(several) == 1 else several for name, several in found.items()} | here
