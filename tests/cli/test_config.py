import json

import pytest
import yaml

from fatezero import FlowEditSettings, PnPSettings, TokenFlowSettings
from fatezero.attention.prompt import changed_words
from fatezero.cli.config.files import configs_of, load_configs
from fatezero.cli.config.settings import PRESETS, ConfigError, EditConfig, with_preset
from fatezero.cli.config.values import checked, with_values

AUTHORS = """
pretrained_model_path: "./ckpt/stable-diffusion-v1-4"
dataset_config:
    path: "data/car"
    prompt: "a silver jeep driving down a road,"
    n_sample_frame: 8
    sampling_rate: 2
    stride: 80
    offset: {left: 1, right: 2, top: 3, bottom: 4}
editing_config:
    use_invertion_latents: true
    use_inversion_attention: true
    guidance_scale: 9
    editing_prompts: [
        a silver jeep driving down a road,
        a Porsche car driving down a road,
        watercolor painting of a silver jeep driving down a road,
    ]
    p2p_config:
        0:
            cross_replace_steps:
                default_: 0.8
            self_replace_steps: 0.9
            is_replace_controller: False
            blend_self_attention: True
            blend_th: [2, 2]
        1:
            cross_replace_steps:
                default_: 0.5
            self_replace_steps: 0.6
            is_replace_controller: True
            blend_words: [['silver', 'jeep'], ["Porsche", 'car']]
            blend_self_attention: True
            blend_latents: True
            blend_th: [0.4, 0.3]
        2:
            cross_replace_steps: 0.7
            self_replace_steps: 0.8
            is_replace_controller: False
            eq_params:
                words: ["watercolor", "cat"]
                values: [10, 2]
    clip_length: "${..dataset_config.n_sample_frame}"
    sample_seeds: [0]
    num_inference_steps: 10
    prompt2prompt_edit: True
model_config:
    lora: 160
    SparseCausalAttention_index: ['mid', -1]
    least_sc_channel: 640
test_pipeline_config:
    target: video_diffusion.pipelines.p2p_ddim_spatial_temporal.P2pDDIMSpatioTemporalPipeline
seed: 0
"""


def written(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_authors_file_is_read_unchanged(tmp_path):
    (same, shape, style), notes = load_configs(written(tmp_path, AUTHORS))
    assert (same.video, same.model, same.steps, same.guidance_scale) == (
        "data/car",
        "./ckpt/stable-diffusion-v1-4",
        10,
        9,
    )
    assert (same.count, same.stride, same.crop, same.size) == (8, 2, (1, 3, 2, 4), (512, 512))
    assert (same.key_frames, same.key_frames_least_channels) == (("middle", -1), 640)
    assert (same.clip_norm, same.max_tokens) == (True, 1024)
    assert (same.cross_replace_steps, same.self_replace_steps, same.blend_self_attention) == (0.8, 0.9, False)
    assert (shape.mode, shape.blend_source, shape.blend_target) == ("replace", ("silver", "jeep"), ("Porsche", "car"))
    assert (shape.blend_self_attention, shape.blend_latents, shape.blend_threshold) == (True, "authors", 0.4)
    assert (style.mode, dict(style.reweight), style.cross_replace_steps) == ("refine", {"watercolor": 10.0}, 0.7)
    assert any("'cat' is not in" in note for note in notes)
    assert any("without blend_words" in note for note in notes)


@pytest.mark.parametrize(
    ("where", "key"),
    [(None, "colour"), ("editing_config", "blend_it"), ("model_config", "heads"), ("dataset_config", "fps")],
)
def test_an_unknown_key_of_the_authors_file_is_named(tmp_path, where, key):
    data = yaml.safe_load(AUTHORS)
    (data[where] if where else data)[key] = 1
    with pytest.raises(ConfigError, match=f"unknown key {where + '.' if where else ''}{key}"):
        load_configs(written(tmp_path, yaml.safe_dump(data)))


def test_an_unknown_key_of_a_control_is_named(tmp_path):
    data = yaml.safe_load(AUTHORS)
    data["editing_config"]["p2p_config"][1]["blend_thr"] = 1
    with pytest.raises(ConfigError, match=r"editing_config\.p2p_config\[1\]\.blend_thr"):
        load_configs(written(tmp_path, yaml.safe_dump(data)))


def test_our_own_file_with_a_preset(tmp_path):
    text = (
        "preset: shape\nsource: a red circle\ntarget: a red square\nself_replace_steps: 0.6\nkey_frames: [self, -1]\n"
    )
    (config,), notes = load_configs(written(tmp_path, text))
    assert notes == []
    assert config.self_replace_steps == 0.6, "the file overrides its preset"
    assert config.cross_replace_steps == 0.5
    assert config.mode == "replace"
    assert config.key_frames == ("self", -1)


def test_numbers_follow_yaml_1_2_and_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "video: ~/clip.mp4\nstrength: 1e-1\nlayout: {scale: 1E2}\nstart: 1:02\nfps: 012.5\nmask: 'burger: ~/m.mp4'\n"
    (config,), _ = load_configs(written(tmp_path, text))
    assert (config.strength, config.layout.scale, config.start, config.fps) == (0.1, 100, "1:02", 12.5)
    assert (config.video, config.mask) == (f"{tmp_path}/clip.mp4", (f"burger: {tmp_path}/m.mp4",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 5", "unknown setting 'stepz'.*'steps'"),
        ("steps: many", "steps is 'many'"),
        ("clip_norm: 3", "clip_norm is 3"),
        ("preset: cubism", "preset 'cubism' is unknown"),
        ("- a\n- b", "config.yaml: contains no settings"),
        ("guidance_scale: .nan", "guidance_scale is nan; it must be a finite number"),
        ("blend_threshold: .inf", "blend_threshold is inf"),
        ("reweight: {1: 2}", "reweight is .*finite number"),
        ("reweight: {green: .nan}", "reweight is"),
        ("blend_source: [1, 2]", r"blend_source is \[1, 2\]; it must be a list, each text"),
        ("size: [64]", r"size is \[64\]; .*list of 2"),
        ("crop: [1, 2, 3, x]", "crop is"),
        ("start: soon", "start: invalid time 'soon'"),
        ("source: ' '", "source is ' '; it must not be blank"),
        ("tokenflow: 3", "tokenflow is 3; it must be a section"),
        ("tokenflow: {batches: 3}", "unknown setting 'tokenflow.batches' .did you mean 'tokenflow.batch_frames'"),
        ("pnp: {feature_steps: 2}", "pnp.feature_steps is 2; it must be between 0 and 1"),
        ("memory: disk", "memory is 'disk'; it must be one of auto"),
        ("preset: [shape]", "preset is .*; it must be text"),
        ("1: 2", "unknown setting '1'"),
        ("train_dataset: {}", "older layout"),
        ("a: [", "is not YAML: line 1: "),
        ("steps: 2\ntarget: x\nsteps: 3", "line 3: 'steps' is given twice"),
        ("pnp: &a {b: *a}", "a part of it contains itself"),
        ("steps: " + "9" * 5000, "is not YAML: Exceeds the limit"),
        ("steps: 0x" + "f" * 5000, "steps is a number of 20000 bits; .*whole number"),
        ("guidance_scale: 0x" + "f" * 500, "guidance_scale is a number of 2000 bits; it must be"),
        ("smoothing: 2", "config.yaml: smoothing is 2; it must be between 0 and 1"),
        ('target: "\\ud800"', "target is .*; remove '.ud800'"),
    ],
)
def test_invalid_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_configs(written(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no configuration"):
        load_configs(tmp_path / "none.yaml")


def test_options_override_a_preset_and_a_file_setting_by_setting(tmp_path):
    """Also within a section: settings that are not given keep the file's values."""
    path = written(tmp_path, "preset: tokenflow\ntokenflow: {weights: linear}\npnp: {feature_steps: 0.5}\n")
    (config,), _ = load_configs(path)
    config = with_values(config, checked({"tokenflow": {"batch_frames": 2}}))
    assert config.recipe().propagation == TokenFlowSettings(2, "linear")
    assert config.recipe().injection == PnPSettings(0.5, 0.5)


def test_presets_are_the_papers_settings():
    style = with_preset(EditConfig(), "style")
    assert (style.cross_replace_steps, style.self_replace_steps, style.blend_self_attention) == (0.7, 0.8, False)
    shape = with_preset(EditConfig(source="a b", target="a c d"), "shape")
    assert (shape.cross_replace_steps, shape.self_replace_steps, shape.blend_threshold) == (0.5, 0.5, 0.3)
    assert shape.blend_self_attention
    assert shape.mode == "refine", "word counts differ"
    flow = with_preset(EditConfig(), "tokenflow")
    recipe = flow.recipe()
    assert (recipe.injection, recipe.propagation) == (PnPSettings(0.5, 0.8), TokenFlowSettings(8, "authors"))
    assert flow.key_frames == ("self",)
    assert with_preset(flow, "style").recipe().propagation is None
    fatezeros = {name + plus for name in ("style", "attribute", "shape") for plus in ("", "+")}
    assert set(PRESETS) >= fatezeros | {"flow_edit", "wan_edit", "pnp", "tokenflow", "tune_a_video"}


def test_a_preset_sets_a_part_of_a_section(tmp_path):
    path = written(tmp_path, "preset: wan_edit\nflow_edit: {seed: 5, source_guidance: 6}\n")
    (config,), _ = load_configs(path)
    assert config.recipe().noise == FlowEditSettings(6.0, seed=5, variant="wan_edit")
    (other,), _ = load_configs(path, preset="flow_edit")
    assert other.recipe().noise == FlowEditSettings(seed=5), "the given preset's settings"
    assert config.recipe().guidance_scale == 12


def test_presets_of_the_supplement():
    assert PRESETS["remove"] == PRESETS["shape+"]
    assert PRESETS["enhance"] == PRESETS["style+"]
    gone = with_preset(EditConfig(source="a jeep on a road", target="a road"), "remove")
    assert gone.mode == "refine"
    assert changed_words(gone.source, gone.target)[1] == [], "only words of the source remain for the mask"


def test_presets_with_a_plus_keep_the_latents_of_the_background():
    for name in ("attribute+", "shape+"):
        fusion = with_preset(EditConfig(), name).fusion
        assert fusion.masks_by_prompts and fusion.blend_latents and fusion.blend_latents_until == 1
    assert with_preset(EditConfig(source="a b", target="a c"), "shape+").mode == "replace"
    style = with_preset(EditConfig(), "style+").fusion
    assert not style.blends, "the mask covers the whole picture"


def test_words_that_change():
    assert changed_words("a silver jeep on a road", "a Porsche car on a road") == (
        ["silver", "jeep"],
        ["Porsche", "car"],
    )
    assert changed_words("a cat", "watercolor painting of a cat") == ([], ["watercolor", "painting", "of"])


def test_blend_words_default_to_the_words_that_change(tokenizer):
    config = with_preset(EditConfig(source="a red circle", target="a red square"), "shape")
    assert config.prompt_edit(tokenizer).blend_words == (["circle"], ["square"])
    with pytest.raises(ValueError, match="blend_source"):
        with_preset(EditConfig(source="a circle", target="a red circle"), "shape").prompt_edit(tokenizer)


def of_authors(**changes):
    data = yaml.safe_load(AUTHORS)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = data
        for section in sections:
            place = place[int(section) if section.isdigit() else section]
        place[int(key) if key.isdigit() else key] = value
    return yaml.safe_dump(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_config__prompt": 3}, r"config\.yaml: dataset_config\.prompt is 3; it must be text"),
        ({"dataset_config__n_sample_frame": "many"}, r"dataset_config\.n_sample_frame is 'many'"),
        ({"dataset_config__offset": 3}, "offset is 3; it must be a section"),
        ({"editing_config__editing_prompts": 3}, "editing_prompts must be a list of prompts"),
        ({"editing_config__editing_prompts": ["a", None]}, "editing_prompts must be a list of prompts"),
        ({"editing_config__guidance_scale": float("nan")}, r"editing_config\.guidance_scale is nan"),
        ({"editing_config__p2p_config": 3}, "p2p_config is 3"),
        ({"editing_config__p2p_config__2__eq_params": {"words": ["watercolor"]}}, "eq_params must have `words`"),
        ({"editing_config__p2p_config__1__blend_words": [1, 2]}, "blend_words is"),
        ({"editing_config__p2p_config__1__self_replace_steps": "all"}, r"p2p_config\[1\]\.self_replace_steps is 'all'"),
        ({"model_config__SparseCausalAttention_index": "mid"}, "SparseCausalAttention_index is 'mid'"),
    ],
)
def test_wrong_values_of_the_authors_file_are_named(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        load_configs(written(tmp_path, of_authors(**changes)))


def test_the_authors_file_in_other_shapes(tmp_path):
    controls = yaml.safe_load(AUTHORS)["editing_config"]["p2p_config"]
    plain, _ = load_configs(written(tmp_path, AUTHORS))
    as_list, _ = load_configs(written(tmp_path, of_authors(editing_config__p2p_config=list(controls.values()))))
    assert as_list == plain
    (one,), _ = load_configs(written(tmp_path, of_authors(editing_config__editing_prompts="a red car")))
    assert one.target == "a red car"
    (nulls, *_), _ = load_configs(written(tmp_path, of_authors(dataset_config__prompt=None)))
    assert nulls.source == "", "not None as a string"


def test_a_preset_option_overrides_the_files_settings(tmp_path):
    texts = {"source": "a b", "target": "a c"}
    single = with_preset(EditConfig(**texts), "style")
    for text in ("preset: shape", "blend_self_attention: true", "mode: replace"):
        assert load_configs(written(tmp_path, text), texts, "style")[0] == [single]
    for preset in PRESETS:
        written(tmp_path, f"preset: {preset}")
        assert load_configs(tmp_path / "config.yaml", texts)[0] == [with_preset(EditConfig(**texts), preset)]


@pytest.mark.parametrize(("given", "rate"), [(25, "25"), (29.97, "30000/1001"), (23.976, "24000/1001"), (12.5, "25/2")])
def test_common_spellings_of_frame_rates(given, rate):
    assert str(EditConfig(fps=given).frame_rate) == rate


def test_names_and_errors_are_printed_unformatted_and_truncated(capsys):
    from rich.console import Console

    from fatezero.cli import progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "console", Console(force_terminal=True, width=100))
        with progress.progress_bar() as bar:
            bar("write [bold]\x1b[2J.mp4")(1, 1)
    output = capsys.readouterr().out
    assert "write [bold]\\x1b[2J.mp4" in output
    message = progress.one_line(ValueError(f"jobs.yaml: steps is {'9' * 10**6}; use a whole number"))
    assert message.startswith("error: jobs.yaml: steps is 999") and message.endswith("999; use a whole number")
    assert len(message) <= 330 and "\n" not in message


def test_shares_of_words_from_options_files_and_records(tmp_path):
    from fatezero.cli.config.record import settings_of as changed
    from fatezero.cli.options import edit_options, given_of

    options = edit_options()(cross_replace_words=["green=0.2:0.5", "water=0"], self_replace_from=0.25)
    given = checked(given_of(options))
    assert given == {"cross_replace_words": {"green": (0.2, 0.5), "water": 0}, "self_replace_from": 0.25}
    config = with_values(EditConfig(), given)
    record = tmp_path / "record.json"
    record.write_text(json.dumps(changed(config)))
    assert load_configs(record)[0] == [config]
    for wrong in ("green", "=2", "green=much", "green=0.1:0.2:0.3"):
        with pytest.raises(ValueError, match="cross_replace_words is .*word=number"):
            given_of(edit_options()(cross_replace_words=[wrong]))


@pytest.mark.parametrize(
    ("given", "preset", "chosen"),
    [
        ({"steps": 4, "guidance_scale": 1.0}, None, True),
        ({"steps": 4, "guidance_scale": 1.0}, "flow_edit", True),
        ({"lora": ("demo-few-steps=0.9",)}, None, True),
        ({"lora": ("a/lcm-lora-sdv1-5/weights.safetensors",), "steps": 30}, None, True),
        ({"model": "models/Wan2.2-Lightning"}, "flow_edit", True),
        ({"steps": 20, "guidance_scale": 1.0}, None, False),
        ({"steps": 4}, None, False),
        ({"lora": ("lcm.safetensors",), "guidance_scale": 5.0}, "flow_edit", False),
        ({"lora": ("lcm.safetensors",)}, "style", False),
        ({"lora": ("lcm.safetensors",), "cross_replace_steps": 0.5}, None, False),
        ({"steps": 4, "guidance_scale": 1.0, "memory": "maps"}, None, False),
    ],
)
def test_a_preset_for_few_steps_is_chosen_by_steps_and_guidance_or_by_the_weights(given, preset, chosen):
    flags = {"video": "a.mp4", "source": "a", "target": "b", **given}
    (config,), notes = configs_of(None, preset, flags)
    assert (config.noise == "drawn" and config.guidance_scale == 1) == chosen
    assert bool(notes) == chosen
    if chosen:
        assert "few_steps" in notes[0] and config.recipe().noise.source_guidance == 1
        assert config.steps == given.get("steps", PRESETS["few_steps"]["steps"])


def test_a_preset_of_steps_keeps_those_of_a_file(tmp_path):
    path = written(tmp_path, "steps: 20\npreset: style\nsource: a\ntarget: b\n")
    (config,), _ = load_configs(path, preset="shape")
    assert config.steps == 20, "as before presets had steps"
