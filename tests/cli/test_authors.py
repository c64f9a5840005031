"""The authors' configuration files: every key takes effect or is refused by name."""

import json

import pytest
import torch
import yaml

from fatezero import PnPSettings, TokenFlowSettings
from fatezero.cli.commands.tune import TuneOutput
from fatezero.cli.config.authors.read import REPOSITORIES
from fatezero.cli.config.files import load_configs, load_tuning
from fatezero.cli.config.settings import ConfigError, EditConfig, TuneConfig
from fatezero.cli.config.values import tune_config
from fatezero.files.bundled import CLIP
from fatezero.settings import settings_of
from fatezero.video.read import read_video

SOURCE = "a red square on water,"
FUSED = "video_diffusion.pipelines.p2p_ddim_spatial_temporal.P2pDDIMSpatioTemporalPipeline"
PLAIN = "video_diffusion.pipelines.ddim_spatial_temporal.DDIMSpatioTemporalStableDiffusionPipeline"
EDITS = {
    "pretrained_model_path": "weights",
    "dataset_config": {"path": "frames", "prompt": SOURCE, "n_sample_frame": 6, "sampling_rate": 3},
    "editing_config": {
        "use_invertion_latents": True,
        "use_inversion_attention": True,
        "editing_prompts": [SOURCE, "a blue circle on water", "a painting of a red square on water"],
        "p2p_config": {
            1: {"cross_replace_steps": {"default_": 0.6}, "self_replace_steps": 0.4},
            2: {"cross_replace_steps": 0.7, "self_replace_steps": 0.8},
        },
        "num_inference_steps": 20,
    },
    "model_config": {"lora": 16},
}
TUNING = {
    "pretrained_model_path": "weights",
    "logdir": "layers",
    "dataset_config": {
        "path": "frames", "prompt": SOURCE, "n_sample_frame": -1, "class_data_root": "squares",
        "class_data_prompt": "a picture of a square",
    },
    "editing_config": {"editing_prompts": ["a blue circle on water"], "num_inference_steps": 25, "strength": 0.9},
    "trainer_pipeline_config": {"target": "video_diffusion.trainer.ddpm_trainer.DDPMTrainer"},
    "test_pipeline_config": {"target": PLAIN},
    "model_config": {"lora": 32, "least_sc_channel": 640},
    "train_steps": 200, "validation_steps": 40, "checkpointing_steps": 20, "learning_rate": 2e-5, "seed": 3,
    "train_temporal_conv": True, "use_8bit_adam": False, "enable_xformers": True, "mixed_precision": "fp16",
    "gradient_checkpointing": True, "max_grad_norm": 0.5,
}  # fmt: skip
VIDEO = {
    "pretrained_model_path": "weights",
    "output_dir": "square",
    "train_data": {
        "video_path": "square.mp4", "prompt": "a square turns", "n_sample_frames": 12, "width": 384, "height": 256,
        "sample_start_idx": 4, "sample_frame_rate": 2,
    },
    "validation_data": {
        "prompts": ["a circle turns", "a blue square turns"], "video_length": 12, "width": 384, "height": 256,
        "num_inference_steps": 30, "num_inv_steps": 30, "guidance_scale": 9.0, "use_inv_latent": True,
    },
    "max_train_steps": 90, "validation_steps": 30, "checkpointing_steps": 45, "learning_rate": 1e-4,
    "trainable_modules": ["attn1.to_q", "attn2.to_q", "attn_temp"], "seed": 7, "use_8bit_adam": False,
    "enable_xformers_memory_efficient_attention": True,
}  # fmt: skip
FLOW = {
    "seed": 4, "device": "cuda", "output_path": "results", "data_path": "frames", "latents_path": "latents",
    "n_inversion_steps": 20, "n_frames": 11, "sd_version": "1.5", "guidance_scale": 6.0, "n_timesteps": 20,
    "prompt": "a paper boat", "negative_prompt": "blurry", "batch_size": 4, "pnp_attn_t": 0.4, "pnp_f_t": 0.7,
}  # fmt: skip


def changed(file, **changes):
    """A copy of a file with some values changed, by paths such as `editing_config__p2p_config__1__blend_th`."""
    data = yaml.safe_load(yaml.safe_dump(file))
    for path, value in changes.items():
        *sections, key = [int(part) if part.isdecimal() else part for part in path.split("__")]
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return data


@pytest.fixture
def edits(tmp_path):
    """The edits of a file, and its notes as one string."""

    def read(file, texts=None, **changes):
        path = tmp_path / "their.yaml"
        path.write_text(yaml.safe_dump(changed(file, **changes)))
        configs, notes = load_configs(path, texts)
        return configs, "\n".join(notes)

    return read


@pytest.fixture
def tuning(tmp_path):
    def read(file, **changes):
        path = tmp_path / "their.yaml"
        path.write_text(yaml.safe_dump(changed(file, **changes)))
        values, outputs, notes = load_tuning(path, TuneOutput)
        return tune_config(values), outputs, "\n".join(notes)

    return read


CONTROL = "editing_config__p2p_config__1__"


def test_missing_keys_have_the_authors_defaults(edits):
    (same, shape, style), notes = edits(EDITS)
    assert (shape.guidance_scale, shape.key_frames, shape.clip_norm) == (7.0, (-1, "first"), True)
    assert (shape.mode, style.mode) == ("replace", "refine"), "True, but for other word counts"
    assert (same.cross_replace_steps, same.self_replace_steps) == (0, 0)
    assert "p2p_config[0] is missing: plain DDIM" in notes
    assert "without effect on an edit" not in notes and "model_config.lora" in notes
    _, notes = edits(EDITS, editing_config__p2p_config__2__is_replace_controller=True)
    assert "is_replace_controller: refine" in notes


def test_shares_of_words_and_pairs(edits):
    shares = {"default_": [0.1, 0.6], "circle": 0.3, "blue": [0.2, 0.5], "boat": 0.5}
    changes = {CONTROL + "cross_replace_steps": shares, CONTROL + "self_replace_steps": [0.2, 0.7]}
    (_, one, _), notes = edits(EDITS, **changes)
    assert (one.cross_replace_from, one.cross_replace_steps) == (0.1, 0.6)
    assert dict(one.cross_replace_words) == {"circle": (0, 0.3), "blue": (0.2, 0.5)}
    assert (one.self_replace_from, one.self_replace_steps) == (0.2, 0.7)
    assert "'boat' is not in" in notes
    (_, one, _), _ = edits(EDITS, **{CONTROL + "cross_replace_steps": {"circle": 0.3}})
    assert (one.cross_replace_steps, dict(one.cross_replace_words)) == (1, {"circle": (0, 0.3)})
    with pytest.raises(ConfigError, match=r"p2p_config\[1\]\.self_replace_steps is \[0\.1\]"):
        edits(EDITS, **{CONTROL + "self_replace_steps": [0.1]})


def test_weights_and_words_are_matched_as_in_the_authors_code(edits):
    weights = {"words": ["circle", "blue", "Blue"], "values": [2, 3, 4, 5]}
    (_, one, _), notes = edits(EDITS, **{CONTROL + "eq_params": weights})
    assert dict(one.reweight) == {"circle": 2, "blue": 3}
    assert "'Blue' is not in" in notes
    (same, *_), notes = edits(EDITS, editing_config__p2p_config={0: {"eq_params": {"words": "water", "values": [2]}}})
    assert not same.reweight and "'water' is not in" in notes, "followed by a comma"


def test_blend_words(edits):
    def blending(**control):
        (_, one, _), notes = edits(EDITS, **{CONTROL + name: value for name, value in control.items()})
        return one, notes

    one, notes = blending(blend_words="None", blend_self_attention=True)
    assert not one.fusion.blends and "without blend_words" in notes
    one, _ = blending(blend_words=[["square"], ["circle"]], blend_self_attention=True, blend_th=[0.4, 0.1])
    assert (one.blend_source, one.blend_self_attention, one.blend_threshold) == (("square",), True, 0.4)
    assert not one.blend_latents
    one, notes = blending(blend_words=["square", "boat"], blend_latents=True)
    assert one.blend_latents == "authors" and one.blend_target == ("none",) and "'boat' is not in" in notes
    one, _ = blending(blend_words=[["boat"]], blend_self_attention=True)
    assert not one.fusion.blends, "an empty mask keeps the source, as in the authors' code"
    with pytest.raises(ConfigError, match=r"blend_words: none of \('boat',\) is in"):
        blending(blend_words=[["boat"], ["circle"]], blend_latents=True)


def test_attention_of_the_reconstruction(edits):
    (first, second, _), _ = edits(EDITS, editing_config__use_inversion_attention=False)
    assert second.attention_from == "reconstruction" and second.cross_replace_steps == 0.6
    assert (first.cross_replace_steps, first.self_replace_steps) == (0, 0), "sampled, and its attention stored"
    with pytest.raises(ConfigError, match="use_inversion_attention is False.*must be the source prompt"):
        edits(EDITS, editing_config__use_inversion_attention=False, editing_config__editing_prompts=["a blue circle"])


@pytest.mark.parametrize(
    "changes", [{"editing_config__prompt2prompt_edit": False}, {"test_pipeline_config__target": PLAIN}]
)
def test_plain_edits(edits, changes):
    configs, notes = edits(EDITS, **changes)
    assert all((one.cross_replace_steps, one.self_replace_steps) == (0, 0) for one in configs)
    assert "p2p_config is left out" in notes
    assert edits(EDITS, test_pipeline_config__target=FUSED)[0] == edits(EDITS)[0]


def test_places_references_and_offsets(edits):
    assert edits(EDITS, disk_store=True)[0][0].place == "disk"
    to_frames, to_prompt = "${..dataset_config.n_sample_frame}", "${dataset_config.prompt}"
    changes = {"editing_config__num_inference_steps": to_frames, "editing_config__source_prompt": to_prompt}
    (one, *_), _ = edits(EDITS, **changes)
    assert one.steps == 6
    (one, *_), notes = edits(EDITS, dataset_config__offset={"left": 3, "bottom": 2})
    assert one.crop == (3, 200, 0, 2) and "offset.top is missing" in notes
    with pytest.raises(ConfigError, match="reference to nothing"):
        edits(EDITS, editing_config__guidance_scale="${no.such}")


def test_prompts_given_as_options_override_the_files(edits):
    weights = {"words": ["boat"], "values": [3]}
    (_, one, _), _ = edits(EDITS, {"target": "a boat"}, **{CONTROL + "eq_params": weights})
    assert (one.target, one.mode, dict(one.reweight)) == ("a boat", "refine", {"boat": 3})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("annotate", True, "editing_config.annotate is True; .*write False"),
        ("use_invertion_latents", False, "editing_config.use_invertion_latents is False; .*write True"),
        ("source_prompt", "a boat", "editing_config.source_prompt is 'a boat'"),
        ("guidance", 3, r"unknown key editing_config.guidance \(did you mean guidance_scale"),
        ("p2p_config", {1: {"eta": 0.5}}, r"p2p_config\[1\].eta is 0.5; sampling is deterministic"),
    ],
)
def test_unsupported_values_are_refused_by_name(edits, key, value, named):
    with pytest.raises(ConfigError, match=f"their.yaml: .*{named}"):
        edits(EDITS, **{f"editing_config__{key}": value})


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("dataset_config__crop", "random", "dataset_config.crop is 'random'; .*write center"),
        ("dataset_config__image_mode", "L", "image_mode is 'L'"),
        ("pretrained_epoch_list", [100], "pretrained_epoch_list is .*--model"),
        ("mixed_precision", "bf16", "mixed_precision is 'bf16'; .*--dtype bfloat16"),
        ("batch_size", 2, "batch_size is 2"),
        ("model_config__temporal_downsample_time", 4, "temporal_downsample_time is 4"),
        ("test_pipeline_config__target", "some.Pipeline", "test_pipeline_config.target is 'some.Pipeline'"),
    ],
)
def test_unsupported_values_of_other_sections(edits, path, value, named):
    with pytest.raises(ConfigError, match=named):
        edits(EDITS, **{path: value})


def test_a_tuning_file_of_fatezero(tuning, edits):
    config, outputs, notes = tuning(TUNING)
    assert (config.video, config.prompt, config.count) == ("frames", SOURCE, 0)
    assert (config.layers, config.rank) == ("fatezero", 32)
    assert (config.steps, config.learning_rate, config.seed, config.clip_gradients) == (200, 2e-5, 3, 0.5)
    assert (config.train_convolutions, config.optimizer, config.clip_norm) == (True, "adamw", True)
    assert (config.class_pictures, config.class_prompt) == ("squares", "a picture of a square")
    assert (config.validate, config.validate_source) == (("a blue circle on water",), SOURCE)
    assert (config.validate_every, config.validate_steps, config.validate_guidance) == (40, 25, 7.0)
    assert (config.keys.entries, config.keys.least_channels) == ((-1, "first"), 640)
    assert outputs == {"output": "layers", "keep_every": 20}
    assert "without effect on a tuning, left out: enable_xformers" in notes
    (edit,), notes = edits(TUNING)
    assert edit.target == "a blue circle on water" and edit.cross_replace_steps == 0
    assert "for `fatezero tune --config`, left out" in notes and "learning_rate" in notes
    assert tuning(EDITS)[0].steps == 300, "a file of edits names a clip too"


def test_a_tuning_file_of_tune_a_video(tuning, edits, tmp_path, monkeypatch):
    config, outputs, _ = tuning(VIDEO)
    assert (config.video, config.prompt, config.layers) == ("square.mp4", "a square turns", "official")
    assert (config.start, config.stride, config.count, config.size) == (4, 2, 12, (384, 256))
    assert (config.steps, config.learning_rate, config.seed, config.optimizer) == (90, 1e-4, 7, "adamw")
    assert (config.validate, config.validate_source) == (("a circle turns", "a blue square turns"), "")
    assert (config.validate_every, config.validate_steps, config.validate_guidance) == (30, 30, 9)
    assert outputs == {"output": "square", "keep_every": 45}
    monkeypatch.chdir(tmp_path)
    (one, other), notes = edits(VIDEO)
    assert (one.source, one.target, other.target) == ("", "a circle turns", "a blue square turns")
    assert (one.injection, one.guidance_scale, one.steps, one.temporal) == ("none", 9, 30, "")
    assert "run `fatezero tune --config` first" in notes
    (tmp_path / "square").mkdir()
    (tmp_path / "square" / "temporal.safetensors").touch()
    assert edits(VIDEO)[0][0].temporal == "square"


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("validation_data__num_inv_steps", 40, "it must be validation_data.num_inference_steps, 30"),
        ("validation_data__video_length", 8, "video_length is 8.*n_sample_frames, 12"),
        ("validation_data__use_inv_latent", False, "use_inv_latent is False"),
        ("trainable_modules", ["attn1"], "trainable_modules is"),
        ("resume_from_checkpoint", "latest", "resume_from_checkpoint is 'latest'; .*--resume"),
        ("scale_lr", True, "scale_lr is True"),
        ("train_batch_size", 2, "train_batch_size is 2"),
    ],
)
def test_unsupported_values_of_tune_a_video(tuning, edits, path, value, named):
    for read in (tuning, edits):
        with pytest.raises(ConfigError, match=named):
            read(VIDEO, **{path: value})


def test_tokenflow_with_plug_and_play(edits, tuning):
    (one,), notes = edits(FLOW)
    assert (one.video, one.target, one.negative) == ("frames", "a paper boat", "blurry")
    assert (one.count, one.steps, one.guidance_scale) == (8, 20, 6), "whole batches"
    recipe = one.recipe()
    assert (recipe.injection, recipe.propagation) == (PnPSettings(0.4, 0.7), TokenFlowSettings(4, seed=4))
    assert (one.model, one.key_frames) == ("runwayml/stable-diffusion-v1-5", ("self",))
    assert "latents_path, output_path" in notes
    assert edits(FLOW, n_inversion_steps=500)[0][0].inversion_steps == 500
    with pytest.raises(ConfigError, match="TokenFlow needs no tuning"):
        tuning(FLOW)


@pytest.mark.parametrize(("start", "steps", "left"), [(0.9, 50, 44), (0.6, 20, 11), (0.05, 20, 20)])
def test_tokenflow_with_a_later_start(edits, start, steps, left):
    """The authors' code keeps one step less than the share, and all steps where that would leave none."""
    file = {name: value for name, value in FLOW.items() if not name.startswith("pnp")}
    (one,), _ = edits(file, start=start, n_timesteps=steps, use_ddim_noise=True)
    assert round(one.strength * steps, 9) == left and one.recipe().injection is None
    assert one.sdedit_seed is None and edits(file, use_ddim_noise=False, seed=4)[0][0].sdedit_seed == 4


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("sd_version", "depth", "sd_version is 'depth'; .*--model"),
        ("device", "cpu", "device is 'cpu'; .*--device"),
        ("batch_size", 16, "batch_size is 16; it must be between 1 and n_frames, 11"),
        ("start_step", 3, "unknown key start_step"),
    ],
)
def test_unsupported_values_of_tokenflow(edits, key, value, named):
    with pytest.raises(ConfigError, match=named):
        edits(FLOW, **{key: value})


@pytest.mark.parametrize("repository", REPOSITORIES, ids=lambda one: one.title)
def test_keys_map_to_existing_settings(repository):
    """Of the commands; a key that accepts only some values, or has no effect, has a reason."""
    known = {
        "edit": {one.name for one in settings_of(EditConfig)} | {"video", "pnp", "tokenflow"},
        "tune": {one.name for one in (*settings_of(TuneConfig), *settings_of(TuneOutput))} | {"video"},
    }
    for keys in repository.module.SECTIONS.values():
        for key in keys:
            for command, names in known.items():
                becomes = key.settings(command).replace("see below", "")
                assert {name.partition(".")[0] for name in becomes.split(", ") if name} <= names, key.name
            assert key.about or key.edit or key.tune, f"{key.name} has neither effect nor reason"


def test_a_tuning_file_in_our_own_format(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("video: a.mp4\nprompt: a jeep\nsteps: 12\noutput: layers\nvalidate: [a car]\nvalidate_every: 4\n")
    values, outputs, notes = load_tuning(path, TuneOutput)
    assert (tune_config(values).steps, outputs, notes) == (12, {"output": "layers"}, [])
    path.write_text("stepz: 3\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: unknown setting 'stepz'.*'steps'"):
        load_tuning(path, TuneOutput)
    path.write_text("keep_every: 0\n")
    with pytest.raises(ConfigError, match=r"own\.yaml: keep_every is 0"):
        load_tuning(path, TuneOutput)


def test_a_tuning_runs_and_its_file_edits_with_its_layers(command, tmp_path):
    small = {"n_sample_frames": 2, "width": 64, "height": 64, "sample_start_idx": 0}
    shown = {"prompts": ["a green circle on water"], "video_length": 2, "width": 64, "height": 64}
    file = changed(
        VIDEO, pretrained_model_path="demo", train_data={"video_path": str(CLIP), "prompt": "a red square", **small},
        validation_data={**shown, "num_inference_steps": 2, "guidance_scale": 9}, max_train_steps=1,
    )  # fmt: skip
    (tmp_path / "their.yaml").write_text(yaml.safe_dump(file))
    command("tune", "--config", "their.yaml")
    assert {"temporal.safetensors", "validation"} <= {path.name for path in (tmp_path / "square").iterdir()}
    command("edit", "--config", "their.yaml", "-o", "edit.mp4")
    assert json.loads((tmp_path / "edit.mp4.json").read_text())["temporal"].endswith("square")


def test_edits_run_with_the_files_settings(command, tmp_path):
    """With the reconstruction's attention, shares by word, and latents blended by the source's mask only."""
    control = {
        "cross_replace_steps": {"default_": 0.8, "circle": [0.2, 0.6]}, "self_replace_steps": [0.2, 0.9],
        "blend_words": [["square"], ["boat"]], "blend_latents": True, "blend_self_attention": True,
    }  # fmt: skip
    file = changed(
        EDITS, pretrained_model_path="demo", dataset_config__path=str(CLIP), dataset_config__n_sample_frame=2,
        dataset_config__image_size=64, editing_config__num_inference_steps=5,
        editing_config__use_inversion_attention=False, editing_config__p2p_config__1=control,
    )  # fmt: skip
    (tmp_path / "their.yaml").write_text(yaml.safe_dump(file))
    output = command("edit", "--config", "their.yaml", "-o", "edit.mp4")
    assert output.count("written to") == 3 and "without effect" not in output
    second = json.loads((tmp_path / "edit_1.mp4.json").read_text())
    assert (second["attention_from"], second["blend_latents"]) == ("reconstruction", "authors")
    frames = [read_video(tmp_path / f"edit_{i}.mp4").frames for i in range(3)]
    assert not torch.equal(frames[0], frames[1]) and not torch.equal(frames[1], frames[2])
