"""Options of the command, made from the dataclasses of settings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_origin

from cyclopts import Group, Parameter, Token

from ..attention.key_frames import KeyFrames
from ..methods import METHODS
from ..methods.layout_guidance import LayoutSettings
from ..settings import NamedSetting, is_union, numbers_of_words, settings_of, shown
from .config.settings import REPEATED, SECTIONS, ConfigError, EditConfig, GenerateConfig, TuneConfig
from .progress import console, progress_bar
from .session import Session

GROUPS = {
    name: Group(name, sort_key=order)
    for order, name in enumerate(
        (
            "What to edit", "Which frames", "Model", "The inversion", "The store", "The edit",
            *dict.fromkeys(one.meta.group for method in METHODS for one in settings_of(method.settings)),
            "Validation", "Flow smoothing", "The clip", "Layout", "Public benchmarks", "This run", "On a Ray cluster",
        )
    )
}  # fmt: skip
"""The headings of help, in order."""
RUN = GROUPS["This run"]
Video = Annotated[
    str | None, Parameter(help='Video, picture, or pictures: a folder, "f_%04d.png" or "*.png".', negative="")
]
Config = Annotated[
    Path | None,
    Parameter(
        help="YAML file of settings, ours or the authors'. Or a result or its .json, to make it again.", group=RUN
    ),
]
ModelConfig = Annotated[
    str | None,
    Parameter(
        help="For a .safetensors checkpoint: a diffusers folder with its tokenizer and configuration.",
        group=GROUPS["Model"],
    ),
]
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:1, mps, or auto.", group=RUN)]
Dtype = Annotated[
    str,
    Parameter(help="float32, float16, bfloat16 or auto. auto: float16 on a GPU, else float32.", group=RUN),
]
DryRun = Annotated[bool, Parameter(negative="", help="Print the plan with its memory and time, and stop.", group=RUN)]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace an existing output.", group=RUN)]
Resume = Annotated[
    bool,
    Parameter(
        negative="",
        help="Continue an interrupted run of the same settings from its last step, which is in OUTPUT.state.",
        group=RUN,
    ),
]
Quiet = Annotated[bool, Parameter(name=("--quiet", "-q"), negative="", help="Print errors only.", group=RUN)]


@Parameter(name="*")
@dataclass(frozen=True)
class RunOptions:
    """Options of a command's run."""

    model_config: ModelConfig = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    overwrite: Overwrite = False
    dry_run: DryRun = False
    quiet: Quiet = False

    def session(self, *inputs: Path | None) -> Session:
        """The session of a command. inputs: files that it reads besides those in its settings."""
        console.quiet = self.quiet
        read = tuple(path for path in inputs if path)
        return Session(console, progress_bar, self.device, self.dtype, self.model_config, self.overwrite, read)


AS_USUAL = RunOptions()
_REPEATED = (*REPEATED, "kind", "method", "comfyui")
NOT_INVERTED = {
    "mode",
    "reweight",
    "blend_source",
    "blend_target",
    "target",
    "negative",
    "guidance_scale",
    "strength",
    "sdedit_seed",
    "place",
}
"""Settings without effect on an inversion in a file, besides those of the methods."""


def edit_options() -> type:
    """Every setting of an edit, and the sections of its methods, as options that are None unless given."""
    own = [one for one in settings_of(EditConfig) if one.name != "target"]
    sections = {name: _options_of(settings.__name__, settings_of(settings)) for name, settings in SECTIONS.items()}
    return _options_of("EditOptions", own, sections)


def invert_options(of_methods: Iterable[str]) -> type:
    """The settings of an inversion. of_methods: the settings that only edits have."""
    left_out = NOT_INVERTED | set(of_methods)
    return _options_of("InvertOptions", [one for one in settings_of(EditConfig) if one.name not in left_out])


def tune_options() -> type:
    """Every setting of a tuning."""
    return _options_of("TuneOptions", settings_of(TuneConfig))


def generate_options() -> type:
    """Every setting of a generated clip, and the section of its layout."""
    own = [one for one in settings_of(GenerateConfig) if one.name != "layout"]
    sections = {"layout": _options_of(LayoutSettings.__name__, settings_of(LayoutSettings))}
    return _options_of("GenerateOptions", own, sections)


def options_of(settings: type, **negative: str) -> type:
    """Every setting of a dataclass. negative: the names of the switches' negative options, "" for none."""
    return _options_of(f"{settings.__name__}Options", settings_of(settings), negative=negative)


def flags_of(video: str | None, options: Any) -> dict[str, Any]:
    """The settings given as options, including the video."""
    return ({} if video is None else {"video": video}) | given_of(options)


def given_of(options: Any) -> dict[str, Any]:
    """The given values by setting name, with lists and pairs parsed."""
    found: dict[str, Any] = {}
    for one in fields(options) if options is not None else ():
        value = getattr(options, one.name)
        if one.name in SECTIONS:
            section = given_of(value)
            found |= {one.name: section} if section else {}
        elif value is not None:
            found[one.name] = _READ.get(one.name, lambda given: given)(value)
    return found


def _options_of(
    name: str,
    settings: Iterable[NamedSetting],
    sections: Mapping[str, type] | None = None,
    negative: Mapping[str, str] | None = None,
) -> type:
    other = negative or {}
    parts: list[Any] = [
        (one.name, Annotated[_typed(one), _parameter(one, other.get(one.name))], None) for one in settings
    ]
    parts += [(key, Annotated[kind | None, Parameter()], None) for key, kind in (sections or {}).items()]
    made = make_dataclass(name, parts)
    made.__module__ = __name__  # cyclopts ignores classes of the module `types`
    setattr(sys.modules[__name__], name, made)
    return made


def _typed(one: NamedSetting) -> Any:
    """The type that the command line parses: a number, a switch, or text."""
    kind = one.plain
    if one.switch:
        return kind | None
    if get_origin(kind) is not None or is_union(kind):
        kind = list[str] if get_origin(kind) is Mapping or one.name in _REPEATED else str
    return kind | None


def _parameter(one: NamedSetting, negative: str | None) -> Parameter:
    help = f"{one.meta.text} ({', '.join(one.choices)})" if one.choices and not one.switch else one.meta.text
    shown = one.meta.shown or _default_text(one.default)
    group: dict[str, Any] = {"group": GROUPS[one.meta.group]} if one.meta.group else {}  # else that of the app
    return Parameter(
        name=("--output", "-o") if one.name == "output" else None,
        help=help,
        **group,
        show_default=(lambda _: shown) if shown else False,
        negative=negative if one.switch else "",
        converter=whole if one.plain is int else None,
    )


def whole(_: Any, tokens: Sequence[Token]) -> int:
    """A whole number of an option. Raises ValueError for other numbers, which cyclopts would round."""
    text = tokens[0].value
    if not text.strip().lstrip("+-").isdecimal() or len(text) > 40:
        raise ValueError("a whole number")
    return int(text)


def _default_text(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "" if default is None or isinstance(default, Mapping) else str(default)


# --- values written as text ---------------------------------------------------------------


def whole_numbers(name: str, text: str, by: str, count: int) -> tuple[int, ...]:
    """The whole numbers in a text. Raises ConfigError for any other text. count: how many there must be."""
    parts = text.split(by)
    if len(parts) != count or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(f"{name} is {shown(text)}; it must be {count} whole numbers with {by!r} between")
    return tuple(int(part) for part in parts)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _moment(given: int | str) -> int | str:
    whole = isinstance(given, str) and given.strip().lstrip("+-").isdigit()
    return int(given) if whole else given


_READ: dict[str, Callable[[Any], Any]] = {
    "key_frames": lambda text: KeyFrames.parse(text).entries,
    "blend_source": _words,
    "blend_target": _words,
    "reweight": partial(numbers_of_words, "reweight"),
    "cross_replace_words": partial(numbers_of_words, "cross_replace_words"),
    "crop": lambda text: whole_numbers("crop", text, ",", 4),
    "size": lambda text: whole_numbers("size", text.lower(), "x", 2),
    **dict.fromkeys(_REPEATED, lambda given: tuple(given) if isinstance(given, list) else given),
    "start": _moment,
    "end": _moment,
}
"""Parsers of options that are not a number, a switch or a word."""
