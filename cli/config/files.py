"""Settings in files: ours, the authors', and the records of results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...files.lora import LoraFile, few_steps_of
from ...settings import settings_of, shown
from ...video.read import read_metadata
from ...video.write import METADATA_SUFFIXES
from .authors.read import edits_of, repository_of, tuning_of
from .documents import DocumentError, read_json, read_yaml
from .effects import OF_AN_INVERSION, check_effect, of_methods
from .fitting import fitting
from .settings import ConfigError, EditConfig, with_preset
from .values import checked, completed, tuning_values, with_values

FEW = 8
"""The most steps of models for few steps."""
MADE = "made"
"""The section of a result's record without settings: see `record.py`."""
METADATA = "fatezero"
"""The key of the record in a video's metadata."""


def load_configs(
    path: str | Path, texts: Mapping[str, Any] | None = None, preset: str | None = None
) -> tuple[list[EditConfig], list[str]]:
    """The edits of a file, and notes on ignored parts.

    Reads our own files (the fields of `EditConfig`, and `preset`), a result's record (JSON, or the result itself), and
    the authors' files as they are, one edit for each of their prompts. texts: a `source` or `target` given elsewhere,
    instead of the file's. preset: one given elsewhere, which overrides all settings of presets in the file; the
    file's other settings override the file's preset. Raises ConfigError naming the file and an unknown key.
    """
    path, texts = Path(path), dict(texts or {})
    data = data_of(path)
    with _naming(path):
        if not isinstance(data, Mapping):
            raise ConfigError("contains no settings")
        if (repository := repository_of(data)) is not None:
            found, notes = edits_of(repository, data, texts.get("source"), texts.get("target"))
            configs = [with_values(EditConfig(), checked(values)) for values in found]
        else:
            kept = {"keep": "latents"} if MADE in data else {}  # results whose record has no `keep`
            config = config_of(kept | {name: value for name, value in data.items() if name != MADE}, texts)
            configs, notes = [config], []
        if preset is not None:
            configs = [with_preset(config, preset) for config in configs]
    return configs, notes


def load_tuning(path: str | Path, outputs: type) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The settings of a tuning in a file, ours or the authors'; those of its outputs; and notes on ignored parts.

    outputs: the dataclass of the outputs' settings. Raises ConfigError naming the file and what is wrong.
    """
    path = Path(path)
    data = data_of(path)
    with _naming(path):
        if not isinstance(data, Mapping):
            raise ConfigError("contains no settings")
        repository, known = repository_of(data), {one.name: one for one in settings_of(outputs)}
        values, notes = (dict(data), []) if repository is None else tuning_of(repository, data)
        own = fitting({name: values.pop(name) for name in list(values) if name in known}, known)
        return tuning_values(values), own, notes


def config_of(values: Mapping[str, Any], texts: Mapping[str, Any] | None = None) -> EditConfig:
    """An edit from the values of a file, which override its preset. texts: see `load_configs`.

    Raises ConfigError naming what is wrong.
    """
    values, texts = dict(values), dict(texts or {})
    preset = values.pop("preset", None)
    if preset is not None and not isinstance(preset, str):
        raise ConfigError(f"preset is {shown(preset)}; it must be text")
    given = checked(values) | texts
    config = with_values(EditConfig(), given)
    return config if preset is None else with_values(with_preset(config, preset), given)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Add the name of a file to errors."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def data_of(path: Path) -> Any:
    """The content of a configuration: YAML, JSON, or a video's record. Raises ConfigError, naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    with _naming(path):
        return _contents_of(path)


def _contents_of(path: Path) -> Any:
    if path.suffix.lower() not in METADATA_SUFFIXES:
        return _read(path)
    try:
        return read_json(read_metadata(path)[METADATA])
    except KeyError:
        raise ConfigError("has no settings in its metadata: it is not a result of `fatezero edit`") from None
    except DocumentError as error:
        raise ConfigError(str(error)) from error


def _read(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        return read_json(text) if path.suffix.lower() == ".json" else read_yaml(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not text: {error}") from error
    except DocumentError as error:
        raise ConfigError(str(error)) from error


def load_pairs(path: str | Path) -> tuple[tuple[str, str], ...]:
    """Pairs of captions from a YAML list. Raises ConfigError for anything else."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"pairs: no file at {path}")
    with _naming(path):
        pairs = _read(path)
        right = isinstance(pairs, list) and all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in pairs
        )
        if not right or not pairs:
            raise ConfigError("must be a list of [source caption, target caption]")
    return tuple((before, after) for before, after in pairs)


# --- files and options ----------------------------------------------------------------------


def configs_of(
    path: Path | None,
    preset: str | None,
    flags: Mapping[str, Any],
    targets: Sequence[str] = (),
    *,
    inverting: bool = False,
    stored: bool = False,
) -> tuple[list[EditConfig], list[str]]:
    """A configuration for each target, from flags, preset, file and defaults in this order; and notes on ignored parts.

    inverting: for an inversion without an edit. stored: with a store, which has a clip and a source prompt.
    """
    given = checked(flags)
    texts = {"source": given["source"]} if "source" in given else {}
    notes: list[str] = []
    if path is None and not inverting and not stored and (why := _few_steps(given, preset)):
        preset, notes = "few_steps", [f"{why}: preset few_steps"]
    configs: list[EditConfig] = []
    for target in (*targets,) or (None,):
        own = texts | (checked({"target": target}) if target is not None else {})
        if path:
            found, left_out = load_configs(path, own, preset)
            notes += left_out
        else:
            found = [with_values(EditConfig(), own)]
            found = [with_preset(c, preset) for c in found] if preset else found
        configs += [c for c in (with_values(c, given) for c in found) if c not in configs]
    configs = [completed(config, inverting, stored) for config in configs]
    for config in configs:
        check_effect(config, () if stored else list(given))
    return configs, list(dict.fromkeys(notes))


def _few_steps(given: Mapping[str, Any], preset: str | None) -> str:
    """The reason for preset few_steps, if none or flow_edit is given: guidance 1 in few steps, or weights for that."""
    if preset not in (None, "flow_edit") or (preset is None and set(given) & {*of_methods(), *OF_AN_INVERSION}):
        return ""
    guidance, steps = given.get("guidance_scale", 1.0), given.get("steps", EditConfig().steps)
    names = [given.get("model", ""), *(LoraFile.parse(text).path for text in given.get("lora", ()))]
    named = next((name for name in names if few_steps_of(name)), None)
    if guidance != 1 or (named is None and not ("guidance_scale" in given and steps <= FEW)):
        return ""
    return f"guidance 1 and {steps} steps" if named is None else f"{Path(named).name} is for few steps without guidance"
