"""FateZero's configuration files, for its edits (`test_fatezero.py`) and its tuning (`train_tune_a_video.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ....attention.prompt import words_of
from ....recipes.recipe import NO_WORDS
from ....settings import shown
from ..fitting import WRONG, fitted
from ..settings import ConfigError
from .keys import REFUSED, TRAINER, AuthorsFile, Key, Keys, Section, merged

_FUSED = "video_diffusion.pipelines.p2p_ddim_spatial_temporal.P2pDDIMSpatioTemporalPipeline"
_PLAIN = "video_diffusion.pipelines.ddim_spatial_temporal.DDIMSpatioTemporalStableDiffusionPipeline"
_TRAINER = "video_diffusion.trainer.ddpm_trainer.DDPMTrainer"
_KEY_FRAMES = {"mid": "middle", "first": "first", "last": "last"}
_TOP = 200
"""What a missing `top` of an `offset` means in the authors' code."""


def _key_frames(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_KEY_FRAMES.get(str(entry), entry) for entry in entries) or ("self",)


FILE: Keys = (
    Key("pretrained_model_path", str, edit="model", tune="model"),
    Key("dataset_config", edit="see below", tune="see below", read=None),
    Key("editing_config", edit="see below", tune="see below", read=None),
    Key("model_config", edit="see below", tune="see below", read=None),
    Key("test_pipeline_config", edit="see below", tune="see below", read=None),
    Key("trainer_pipeline_config", tune="see below", read=None),
    Key("disk_store", bool, edit="place", read=lambda on: "disk" if on else "auto", about="True: disk"),
    Key("seed", int, tune="seed", about="edits are deterministic"),
    Key("logdir", str, tune="output", about="edit: give --output"),
    Key("batch_size", only=(1,), about="a run edits one clip: write 1"),
    Key("pretrained_epoch_list", only=REFUSED, about="one model per edit: remove it, and give the folder of a "
        "checkpoint with --model"),
    Key("verbose", about="only pictures of attention"),
    Key("use_invertion_latents", about="counts in editing_config only"),
    Key("train_steps", int, 300, tune="steps"),
    Key("validation_steps", int, 1000, tune="validate_every"),
    Key("checkpointing_steps", int, 1000, tune="keep_every", about="a state for --resume; layers come at the end"),
    Key("train_temporal_conv", bool, False, tune="train_convolutions"),
    Key("use_8bit_adam", bool, tune="optimizer", read=lambda on: "adamw8bit" if on else "adamw",
        about="True: adamw8bit; a missing key, adamw (there adamw8bit)"),
    Key("enable_xformers", about="saves memory only"),
    *TRAINER,
)  # fmt: skip
DATASET: Keys = (
    Key("path", str, edit="video", tune="video"),
    Key("prompt", str, edit="source", tune="prompt"),
    Key("start_sample_frame", int, 0, "start", "start"),
    Key("n_sample_frame", int, 8, "count", "count", "-1: all", read=lambda count: max(count, 0)),
    Key("sampling_rate", int, 1, "stride", "stride"),
    Key("stride", int, about="between windows of a longer clip; the first window is taken"),
    Key("image_size", int, 512, "size", "size", "cropped to a square at the centre", read=lambda side: (side, side)),
    Key("crop", only=("center",), about="frames are cropped at their centre: write center"),
    Key("image_mode", only=("RGB",), about="frames are read as RGB: write RGB"),
    Key("offset", edit="crop", tune="crop", read=None, about="see below"),
    Key("class_data_root", str, tune="class_pictures"),
    Key("class_data_prompt", str, tune="class_prompt"),
)
OFFSET: Keys = (
    Key("left", int, 0, "crop", "crop", read=None),
    Key("top", int, _TOP, "crop", "crop", "a missing one means 200 pixels, as there", read=None),
    Key("right", int, 0, "crop", "crop", read=None),
    Key("bottom", int, 0, "crop", "crop", read=None),
)
EDITING: Keys = (
    Key("editing_prompts", edit="target", tune="validate", read=None, about="edit: an edit for each"),
    Key("guidance_scale", float, 7.0, "guidance_scale", "validate_guidance"),
    Key("num_inference_steps", int, edit="steps", tune="validate_steps"),
    Key("p2p_config", edit="see below", read=None, about="a section for each prompt; without it, plain DDIM"),
    Key("prompt2prompt_edit", bool, edit="cross_replace_steps, self_replace_steps", read=None,
        about="False: plain DDIM, without p2p_config"),
    Key("use_inversion_attention", bool, True, "attention_from", read=None,
        about="False: reconstruction, of the first prompt, which must be the source prompt"),
    Key("use_invertion_latents", only=(True,), about="edits start from the noise inverted under the source prompt: "
        "write True; to invert under a target prompt, write that as dataset_config.prompt"),
    Key("source_prompt", str, edit="source", read=None, about="must be dataset_config.prompt"),
    Key("annotate", only=(False,), about="prompts are not drawn on frames: write False"),
    Key("clip_length", about="the number of frames is dataset_config.n_sample_frame"),
    Key("sample_seeds", about="edits of the inverted noise do not depend on a seed"),
    Key("num_samples_per_prompt", about="the same"),
    Key("strength", about="the authors' pipelines only check its range"),
    Key("traverse_p2p_config", about="no effect there"),
    Key("subdir", about="a folder of outputs"),
    Key("annotate_size", about="of captions, which are not drawn"),
    Key("use_make_grid", about="a grid of all results; `fatezero evaluate --comparison` makes one"),
    Key("make_grid", about="the same"),
    Key("grid_column_size", about="the same"),
)  # fmt: skip
P2P: Keys = (
    Key("is_replace_controller", bool, True, "mode", read=None,
        about="True: replace, or refine where the prompts' word counts differ; False: refine"),
    Key("cross_replace_steps", edit="cross_replace_steps, cross_replace_from, cross_replace_words", read=None,
        about="a share, a pair [begin, end], or shares of words, with default_ for the others (missing: 1)"),
    Key("self_replace_steps", edit="self_replace_steps, self_replace_from", read=None,
        about="a share, or a pair [begin, end]"),
    Key("eq_params", edit="reweight", read=None, about="as many as the shorter of words and values"),
    Key("blend_words", edit="blend_source, blend_target", read=None, about="[source words, target words], or 'None'"),
    Key("blend_self_attention", bool, False, "blend_self_attention", read=None, about="needs blend_words"),
    Key("blend_latents", bool, False, "blend_latents", read=None, about="True: authors; needs blend_words"),
    Key("blend_th", default=[0.3, 0.3], edit="blend_threshold", read=None, about="the first of the two"),
    Key("negative_prompt", str, edit="negative"),
    Key("eta", only=(0,), about="sampling is deterministic: write 0"),
    Key("use_inversion_attention", about="that of editing_config counts"),
    Key("save_self_attention", about="set by the authors' loop"),
    Key("disk_store", about="that of the file counts"),
    Key("save_path", about="a folder of outputs"),
)  # fmt: skip
EQUALIZER: Keys = (Key("words", edit="reweight", read=None), Key("values", edit="reweight", read=None))
MODEL: Keys = (
    Key("lora", int, tune="rank", about="edit: the rank is that of the weights"),
    Key("SparseCausalAttention_index", tuple[int | str, ...], (-1, "first"), "key_frames", "key_frames",
        "mid is middle; an empty list, self", read=_key_frames),
    Key("least_sc_channel", int, 0, "key_frames_least_channels", "key_frames_least_channels"),
    Key("temporal_downsample", only=(False,), about="temporal layers have no downsampling: write False"),
    Key("temporal_downsample_time", only=REFUSED, about="temporal layers have no downsampling: remove it"),
)  # fmt: skip
PIPELINE: Keys = (
    Key("target", edit="cross_replace_steps, self_replace_steps", read=None, only=(_FUSED, _PLAIN),
        about=f"give {_FUSED} for edits with p2p_config, or {_PLAIN} for plain DDIM"),
    Key("num_inference_steps", about="that of editing_config counts"),
)  # fmt: skip
TRAINER_PIPELINE: Keys = (Key("target", only=(_TRAINER,), about=f"the loss is that of {_TRAINER}: write it"),)
SECTIONS: dict[str, Keys] = {
    "": FILE, "dataset_config": DATASET, "dataset_config.offset": OFFSET, "editing_config": EDITING,
    "editing_config.p2p_config[i]": P2P, "model_config": MODEL, "test_pipeline_config": PIPELINE,
    "trainer_pipeline_config": TRAINER_PIPELINE,
}  # fmt: skip
_USUAL: dict[str, Any] = {"clip_norm": True}


def edits(file: AuthorsFile, source: str | None, target: str | None) -> list[dict[str, Any]]:
    """The settings of an edit for each of the file's prompts. source, target: given elsewhere, in place of the file's.

    With the authors' defaults: GroupNorm over the clip, and fusion in layers of up to 32x32 tokens.
    """
    base, editing, pipeline = _read(file)
    source = source or base.get("source", "")
    prompts = _prompts(editing)
    _check_source(editing, source, prompts)
    base |= {"max_tokens": 1024} | ({"source": source} if source else {})
    fuses = _fuses(editing, pipeline)
    if fuses and not editing.value("use_inversion_attention"):
        if prompts[0] != source:
            raise ConfigError(
                f"{editing.name('use_inversion_attention')} is False, which takes the attention of the first prompt; "
                f"it is {shown(prompts[0])} and must be the source prompt, {shown(source)}"
            )
        base["attention_from"] = "reconstruction"
    found = []
    for i, prompt in enumerate(prompts):
        sampled = base.get("attention_from") == "reconstruction" and i == 0
        control = file.section(("editing_config", "p2p_config", str(i)), P2P)
        pair, fused = _Pair(control, source, target or prompt), fuses and not sampled and bool(control.data)
        if fuses and not control.data and editing.has("p2p_config"):
            file.notes.append(f"{_name_of(control)} is missing: plain DDIM, without fusion")
        found.append(merged(base, pair.settings() if fused else _SAMPLED, {"target": pair.prompt}))
    return found


def tuning(file: AuthorsFile) -> Mapping[str, Any]:
    """The tuning of a file, with its validation clips."""
    base, editing, _ = _read(file)
    prompts = _prompts(editing) if editing.data else []
    if not prompts:
        base = {name: value for name, value in base.items() if not name.startswith("validate")}
    if "class_pictures" not in base:
        base.pop("class_prompt", None)
    validated = {"validate": tuple(prompts), "validate_source": base.get("prompt", "")} if prompts else {}
    return base | {"layers": "fatezero"} | validated


def _read(file: AuthorsFile) -> tuple[dict[str, Any], Section, Section]:
    """The settings of all sections but those of single prompts, and the sections `editing_config` and
    `test_pipeline_config`.
    """
    top, dataset, offset, editing, model, pipeline, _ = (
        file.section(tuple(filter(None, where.split("."))), keys)
        for where, keys in SECTIONS.items()
        if not where.endswith("[i]")
    )
    crop = {"crop": tuple(offset.value(key.name) for key in OFFSET)} if dataset.has("offset") else {}
    if dataset.has("offset") and not offset.has("top"):
        file.notes.append(f"{offset.name('top')} is missing, which means {_TOP} pixels in the authors' code: cropped")
    return merged(_USUAL, *(part.settings() for part in (top, dataset, editing, model)), crop), editing, pipeline


def _prompts(editing: Section) -> list[str]:
    found = editing.value("editing_prompts")
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
        raise ConfigError(f"{editing.name('editing_prompts')} must be a list of prompts")
    return found


def _check_source(editing: Section, source: str, prompts: list[str]) -> None:
    own, controls = editing.value("source_prompt"), editing.value("p2p_config")
    if own not in (None, source):
        raise ConfigError(
            f"{editing.name('source_prompt')} is {shown(own)}; the source prompt is dataset_config.prompt: write it "
            "there"
        )
    if controls is not None and not isinstance(controls, (Mapping, list)):
        name = editing.name("p2p_config")
        raise ConfigError(f"{name} is {shown(controls)}; it must have a section for each prompt")
    left = [str(i) for i in (controls or {}) if isinstance(controls, Mapping) and not _is_number(i, len(prompts))]
    if left:
        editing.file.notes.append(f"{editing.name('p2p_config')} has no prompt for {', '.join(left)}: left out")


def _is_number(name: Any, below: int) -> bool:
    return str(name).isdecimal() and int(name) < below


def _fuses(editing: Section, pipeline: Section) -> bool:
    """Whether edits fuse attention; else plain DDIM, with a note on a p2p_config that has no effect."""
    fuses = editing.value("prompt2prompt_edit") is not False and pipeline.value("target") != _PLAIN
    if not fuses and editing.has("p2p_config"):
        editing.file.notes.append(f"plain DDIM: {editing.name('p2p_config')} is left out")
    return fuses


_SAMPLED: dict[str, Any] = {"cross_replace_steps": 0.0, "self_replace_steps": 0.0}
"""The settings of plain DDIM from the inverted noise."""


@dataclass(frozen=True)
class _Pair:
    """A pair of prompts, and its section of `p2p_config`."""

    control: Section
    source: str
    prompt: str

    def settings(self) -> dict[str, Any]:
        return {
            **self.control.settings(),
            "mode": self._mode(),
            "reweight": self._weights(),
            **self._cross_steps(),
            **self._self_steps(),
            **self._blending(),
        }

    def _note(self, text: str) -> None:
        self.control.file.notes.append(text)

    def _mode(self) -> str:
        """replace needs equal word counts; the authors' code falls back to refine."""
        if not self.control.value("is_replace_controller"):
            return "refine"
        counts = len(words_of(self.source)), len(words_of(self.prompt))
        if counts[0] == counts[1]:
            return "replace"
        if self.control.has("is_replace_controller"):
            name = self.control.name("is_replace_controller")
            self._note(f"{name}: refine, as the prompts have {counts[0]} and {counts[1]} words")
        return "refine"

    def _weights(self) -> dict[str, float]:
        data = self.control.file.section((*self.control.path, "eq_params"), EQUALIZER).data
        words = fitted(data.get("words", ()), tuple[str, ...] | str)
        factors = fitted(data.get("values", ()), tuple[float, ...])
        if WRONG in (words, factors) or len(data) == 1:
            raise ConfigError(f"{self.control.name('eq_params')} must have `words`, and `values`, their weights")
        weights = dict(zip((words,) if isinstance(words, str) else words, factors, strict=False))
        return {word: float(weights[word]) for word in self._present(weights, self.prompt)}

    def _cross_steps(self) -> dict[str, Any]:
        given = self.control.value("cross_replace_steps")
        shares = given if isinstance(given, Mapping) else {"default_": 0.8 if given is None else given}
        if not all(isinstance(word, str) for word in shares):
            raise ConfigError(
                f"{self.control.name('cross_replace_steps')} is {shown(given)}; it must be words and shares"
            )
        found = {word: self._shares("cross_replace_steps", value) for word, value in shares.items()}
        begin, end = found.pop("default_", (0.0, 1.0))
        words = {word: found[word] for word in self._present(found, self.prompt)}
        return {"cross_replace_from": begin, "cross_replace_steps": end, "cross_replace_words": words}

    def _self_steps(self) -> dict[str, float]:
        given = self.control.value("self_replace_steps")
        begin, end = self._shares("self_replace_steps", 0.8 if given is None else given)
        return {"self_replace_from": begin, "self_replace_steps": end}

    def _shares(self, name: str, value: Any) -> tuple[float, float]:
        found = self.control.typed(name, value, float | tuple[float, float])
        begin, end = found if isinstance(found, tuple) else (0.0, found)
        return float(begin), float(end)

    def _blending(self) -> dict[str, Any]:
        control = self.control
        given = control.value("blend_words")
        words = fitted(() if given in (None, "None") else given, tuple[tuple[str, ...] | str, ...])
        if words is WRONG:
            raise ConfigError(
                f"{control.name('blend_words')} is {shown(given)}; it must be [source words, target words]"
            )
        of_self, of_latents = control.value("blend_self_attention"), control.value("blend_latents")
        if not words:
            if of_self or of_latents:
                self._note(f"{_name_of(control)}: without blend_words nothing is blended")
            return {}
        sides = [(side,) if isinstance(side, str) else side for side in [*words, (), ()][:2]]
        source = self._present(sides[0], self.source)
        target = self._present(sides[1], self.prompt) if of_latents else ()
        if of_latents and not source:
            raise ConfigError(f"{control.name('blend_words')}: none of {shown(sides[0])} is in {shown(self.source)}")
        return {
            "blend_source": source,
            "blend_target": target or (NO_WORDS if of_latents else ()),
            "blend_self_attention": of_self and bool(source),
            "blend_latents": "authors" if of_latents else False,
            "blend_threshold": self._threshold(),
        }

    def _threshold(self) -> float:
        given = self.control.value("blend_th")
        first = given[0] if isinstance(given, list) and given else given
        return float(self.control.typed("blend_th", first, float))

    def _present(self, words: Iterable[str], prompt: str) -> tuple[str, ...]:
        """The words that the authors' code finds in a prompt: between blanks, as written; with a note on others."""
        found = {word: not prompt or word in prompt.split(" ") for word in words}
        missing = [shown(word) for word, here in found.items() if not here]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            self._note(f"{_name_of(self.control)}: {', '.join(missing)} {verb} not in {shown(prompt)}, left out")
        return tuple(word for word, here in found.items() if here)


def _name_of(section: Section) -> str:
    return section.name("")[:-1]
