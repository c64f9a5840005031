"""Models in common layouts: what is read from their configuration and keys, and what is refused."""

import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from tiny_sdxl import write_sdxl

from fatezero.diffusion.generate import generate
from fatezero.files.bundled import DEMO
from fatezero.hosts.comfyui.single_file import single_file
from fatezero.hosts.diffusers.checkpoint import Checkpoint, CheckpointError
from fatezero.hosts.diffusers.families import family_of
from fatezero.hosts.diffusers.model_files import opened
from fatezero.hosts.diffusers.schedulers import as_ddim, with_signal

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
PROMPT = "a red square on water"


@pytest.fixture
def folder(tmp_path):
    """A copy of the demo model."""
    return shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("judge"))


@pytest.fixture(scope="module")
def tensors():
    return {name: tensor.float() for name, tensor in single_file(DEMO).items()}


def set_config(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_weights(folder, name, change):
    save_file(change(load_file(folder / name)), folder / name)


def drop(name):
    return lambda weights: {key: w for key, w in weights.items() if key != name}


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3438167540\n")


# --- folders that are refused ----------------------------------------------------------------


def inpainting(folder):
    set_config(folder, "unet/config.json", in_channels=9)
    set_weights(folder, UNET, lambda w: w | {"conv_in.weight": w["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9].clone()})


def tiny_autoencoder(folder):
    shutil.rmtree(folder / "vae")
    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(folder / "vae")  # fmt: skip
    set_config(folder, "model_index.json", vae=["diffusers", "AutoencoderTiny"])


def scheduler(kind, **config):
    def write(folder):
        kind(**config).save_pretrained(folder / "scheduler")
        set_config(folder, "model_index.json", scheduler=["diffusers", kind.__name__])

    return write


def consistency(folder):
    set_config(folder, "unet/config.json", time_cond_proj_dim=8)
    extra = {"time_embedding.cond_proj.weight": torch.zeros(64, 8, dtype=torch.float16)}
    set_weights(folder, UNET, lambda w: w | extra)


def narrower(weights):
    return {k: w[:, :32].clone() if "attn2.to_k" in k or "attn2.to_v" in k else w for k, w in weights.items()}


FOLDERS = {
    "inpainting": (inpainting, "takes 9 channels, as an inpainting model"),
    "TAESD": (tiny_autoencoder, "has a AutoencoderTiny for its autoencoder"),
    "own class": (lambda f: set_config(f, "model_index.json", _class_name="MyPipeline"), "is a MyPipeline"),
    "own code": (lambda f: set_config(f, "model_index.json", _class_name=["p", "Mine"]), r"custom code \(p, Mine"),
    "unet's weight": (lambda f: set_weights(f, UNET, drop("conv_in.weight")), "missing weights in its unet: conv_in"),
    "vae's weight": (lambda f: set_weights(f, VAE, drop("encoder.conv_in.bias")), "missing weights in its vae"),
    "text's weight": (
        lambda f: set_weights(f, TEXT, lambda w: {k: v for k, v in w.items() if "layers.1" not in k}),
        r"has missing weights in its text_encoder: \S*encoder\.layers\.1\S* and \d+ more",
    ),
    "pointer": (lambda f: pointer(f / UNET), "is a Git LFS pointer"),
    "cut off": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:5000]), "could not load the model"),
    "broken configuration": (
        lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), r"scheduler_config\.json is not JSON",
    ),
    "no configuration": (lambda f: (f / "unet" / "config.json").unlink(), "could not load the model"),
    "EDM": (scheduler(EDMEulerScheduler), "EDMEulerScheduler, whose noise levels are not DDIM's"),
    "flow": (scheduler(FlowMatchEulerDiscreteScheduler), "FlowMatchEulerDiscreteScheduler, whose noise levels"),
    "other text": (
        lambda f: set_config(f, "unet/config.json", cross_attention_dim=32) or set_weights(f, UNET, narrower),
        "text embeddings of width 64, .* 32",
    ),
    "LCM": (consistency, "takes its guidance"),
    "other pipeline": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": "FluxPipeline", "vae": ["diffusers", "x"]}'),
        "is a FluxPipeline",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_that_are_refused(folder, case):
    change, message = FOLDERS[case]
    change(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        Checkpoint.load(str(folder))
    assert len(str(refusal.value)) < 600 and "\n" not in str(refusal.value)


def test_variants(folder):
    for name in (UNET, VAE, TEXT):
        path = folder / name
        path.rename(path.with_suffix(".fp16.safetensors"))
    with pytest.raises(CheckpointError, match="in a variant: give --variant fp16"):
        Checkpoint.load(str(folder))
    with pytest.raises(CheckpointError, match=r"no variant 'bf16'; its variants: fp16"):
        Checkpoint.load(str(folder), variant="bf16")
    ours, plain = Checkpoint.load(str(folder), variant="fp16"), Checkpoint.load("demo")
    assert ours.denoiser.identity().digest == plain.denoiser.identity().digest
    assert torch.equal(*(c.encode_prompt(PROMPT, 64, 64).embeddings for c in (ours, plain)))
    with pytest.raises(CheckpointError, match=r"has no variant 'fp16'; .*none"):
        Checkpoint.load("demo", variant="fp16")


def test_unused_files_may_be_lfs_pointers(folder):
    pointer(folder / "unet" / "diffusion_pytorch_model.bin")
    pointer(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert Checkpoint.load(str(folder)).denoiser
    with pytest.raises(CheckpointError, match=r"fp16\.safetensors is a Git LFS pointer"):
        Checkpoint.load(str(folder), variant="fp16")


@pytest.mark.parametrize(
    "name", ["models/nowhere", "nowhere", "a/b/c", "./x", "~/x", "x/y.safetensors", "here/nothing"]
)
def test_paths_are_not_looked_up_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=f"no model at {name}: give"):
        Checkpoint.load(name)


@pytest.mark.parametrize("name", ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "stabilityai/stable-diffusion-xl-base-1.0"])
def test_names_of_a_hub(name):
    assert opened(name, lambda where, **local: where) == name


def test_an_unreachable_hub_is_reported_at_once(monkeypatch):
    def unknown(*_):
        raise OSError

    def load(where, local_files_only=False):
        if local_files_only:
            raise OSError("not in the cache")
        raise AssertionError("the hub was used")

    monkeypatch.setattr("fatezero.hosts.diffusers.model_files.getaddrinfo", unknown)
    monkeypatch.setattr("fatezero.hosts.diffusers.model_files.getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError, match="'owner/name' is neither a folder nor .* is offline"):
        opened("owner/name", load)


def test_a_refiner(tmp_path):
    write_sdxl(tmp_path / "xl")
    set_config(tmp_path / "xl", "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline",
               requires_aesthetics_score=True, text_encoder=[None, None], tokenizer=[None, None])  # fmt: skip
    with pytest.raises(CheckpointError, match="is an SDXL refiner"):
        Checkpoint.load(str(tmp_path / "xl"))


# --- single files ----------------------------------------------------------------------------

FIRST = "model.diffusion_model.input_blocks.0.0.weight"
BARE = {FIRST: (8, 4, 3, 3)}
FILES = {
    "flux": ({"model.diffusion_model.double_blocks.0.img_attn.qkv.weight": (4, 4)}, "is a file of Flux"),
    "bare flux": ({"single_blocks.0.linear1.weight": (4, 4)}, "is a file of Flux"),
    "sd3": (
        {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4, 4)},
        "is a file of Stable Diffusion 3",
    ),
    "wan": ({"blocks.0.self_attn.q.weight": (4, 4)}, "is a file of Wan, .* as a diffusers folder"),
    "motion": ({"down_blocks.0.motion_modules.0.norm.weight": (4,)}, "is a file of AnimateDiff motion"),
    "controlnet": ({"control_model.zero_convs.0.0.weight": (4, 4)}, "is a file of Control"),
    "lora": ({"lora_unet_mid_block.lora_up.weight": (4, 4)}, "is a LoRA, not a model: give it with --lora"),
    "embedding": ({"emb_params": (1, 768)}, "is a file of textual inversion"),
    "refiner": (BARE | {"conditioner.embedders.0.model.ln_final.weight": (4,)}, "is an SDXL refiner"),
    "inpainting": ({FIRST: (8, 9, 3, 3)}, "takes 9 channels, as an inpainting model"),
    "no autoencoder": (BARE | {"cond_stage_model.transformer.x": (4,)}, "contains no autoencoder"),
    "no text encoder": (BARE | {"first_stage_model.x": (4,)}, "contains no text encoder"),
    "edm": (BARE | {"edm_mean": (4,)}, "has EDM's noise levels"),
    "vae": ({"encoder.conv_in.weight": (4,)}, "is only a part of a model"),
    "other": ({"weight": (4,)}, "is a safetensors file, but not a Stable Diffusion checkpoint"),
}


@pytest.mark.parametrize("case", FILES)
def test_single_files_that_are_refused(tmp_path, case):
    shapes, message = FILES[case]
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=f"m.safetensors {message}"):
        Checkpoint.load(str(tmp_path / "m.safetensors"), config=str(DEMO))


def test_a_single_file_of_sd_2_needs_its_prediction_type(tmp_path, monkeypatch):
    monkeypatch.setattr("fatezero.hosts.diffusers.model_files._cached_config", lambda family, path: str(DEMO))
    names = BARE | {"cond_stage_model.model.x": (4,), "first_stage_model.x": (4,)}
    save_file({name: torch.zeros(shape) for name, shape in names.items()}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"predicts noise or v: give --model-config"):
        Checkpoint.load(str(tmp_path / "m.safetensors"))


def test_a_pointer_and_a_damaged_file(tmp_path):
    pointer(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        Checkpoint.load(str(tmp_path / "m.safetensors"))
    (tmp_path / "m.safetensors").write_text("<html>")
    with pytest.raises(CheckpointError, match="could not load the model"):
        Checkpoint.load(str(tmp_path / "m.safetensors"))


def test_families_are_recognised_by_key_names(tensors):
    assert family_of(tensors) == "Stable Diffusion"
    assert family_of(load_file(DEMO / UNET)) == "Stable Diffusion"
    assert family_of(["weight"]) is None


# --- what models predict, and their schedules -------------------------------------------------


def drawn(checkpoint, pipeline, steps=4):
    """A picture's latents generated by our loop and by diffusers' pipeline."""
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text, negative = checkpoint.encode_prompt(PROMPT, 64, 64), checkpoint.encode_negative("", 64, 64)
    ours = generate(checkpoint.denoiser, noise, text, negative, steps, 5.0, "self", clip_norm=False)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(PROMPT, latents=noise, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
                      height=64, width=64).images  # fmt: skip
    return ours, theirs


def test_the_prediction_type_is_read_from_a_single_files_keys(folder, tensors, tmp_path):
    path = tmp_path / "v.safetensors"
    save_file(tensors | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, path)
    ours = Checkpoint.load(str(path), config=str(DEMO))
    assert ours.scheduler.config["prediction_type"] == "v_prediction"
    set_config(folder, "scheduler/scheduler_config.json", prediction_type="v_prediction", rescale_betas_zero_snr=True)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    assert torch.allclose(*drawn(ours, pipeline), atol=1e-4)
    epsilon = Checkpoint.load("demo")
    assert not torch.allclose(drawn(epsilon, pipeline)[0], drawn(ours, pipeline)[0], atol=0.1)

    save_file(tensors, path, {"modelspec.prediction_type": "v"})
    assert Checkpoint.load(str(path), config=str(DEMO)).scheduler.config["prediction_type"] == "v_prediction"
    save_file(tensors, path, {"modelspec.predict_key": "epsilon"})
    assert Checkpoint.load(str(path), config=str(folder)).scheduler.config["prediction_type"] == "epsilon"


def test_schedules_that_end_at_zero_signal(folder):
    euler = {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler(EulerDiscreteScheduler, prediction_type="v_prediction", **euler)(folder)
    denoiser = Checkpoint.load(str(folder)).denoiser
    schedule = denoiser.schedule(20)
    with pytest.raises(ValueError, match=r"steps is 500.*zero signal"):
        denoiser.schedule(500)
    assert schedule.timesteps[0] == 951
    levels = EulerDiscreteScheduler.from_pretrained(folder / "scheduler").alphas_cumprod
    assert torch.allclose(schedule.alphas[1:].flip(0).float(), levels[list(schedule.timesteps)], atol=1e-6)


def test_schedulers_with_ddims_noise_levels_and_others():
    plain = EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing")
    assert torch.equal(as_ddim(plain).alphas_cumprod, plain.alphas_cumprod)
    assert with_signal(as_ddim(plain)).config["timestep_spacing"] == "trailing"
    own = DDIMScheduler()
    assert as_ddim(own) is own
    for other in (EDMEulerScheduler(), FlowMatchEulerDiscreteScheduler(), object()):
        with pytest.raises(TypeError, match="whose noise levels are not DDIM's"):
            as_ddim(other)
    plain.alphas_cumprod = plain.alphas_cumprod * 0.9
    with pytest.raises(TypeError, match="whose noise levels"):
        as_ddim(plain)


# --- SDXL and autoencoders --------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [True, False])
def test_an_empty_negative_prompt_of_sdxl(tmp_path, zeros):
    write_sdxl(tmp_path / "xl", force_zeros_for_empty_prompt=zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "xl", torch_dtype=torch.float32, local_files_only=True
    )
    ours = Checkpoint.load(str(tmp_path / "xl"))
    _, negative, _, pooled = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=True)
    empty = ours.encode_negative("", 64, 64)
    assert bool(negative.any()) != zeros
    assert torch.allclose(empty.embeddings, negative, atol=1e-6)
    assert torch.allclose(empty.extras["text_embeds"], pooled, atol=1e-6)
    assert empty.extras["time_ids"].any() and ours.encode_negative("blur", 64, 64).embeddings.any()
    assert torch.allclose(*drawn(ours, pipeline), atol=1e-4)


def test_statistics_of_latents(tmp_path):
    write_sdxl(tmp_path / "xl", latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[1.1, 0.9, 1.3, 0.7])
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "xl", torch_dtype=torch.float32, local_files_only=True
    )
    ours = Checkpoint.load(str(tmp_path / "xl"))
    latents, _ = drawn(ours, pipeline, steps=1)
    scaled = latents * torch.tensor([1.1, 0.9, 1.3, 0.7]).view(-1, 1, 1) / pipeline.vae.config.scaling_factor
    expected = pipeline.vae.decode(scaled + torch.tensor([0.1, -0.2, 0.3, 0.4]).view(-1, 1, 1)).sample
    assert torch.allclose(ours.decode_latents(latents), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"latents": noise, "num_inference_steps": 1, "height": 64, "width": 64}
    latent, pixels = (pipeline(PROMPT, output_type=kind, **settings).images for kind in ("latent", "pt"))
    assert torch.allclose(ours.decode_latents(latent), pixels, atol=1e-4)
    frames = torch.rand(1, 3, 64, 64)
    mean, deviation = ours.encode_posterior(frames)
    posterior = pipeline.vae.encode(2 * frames - 1).latent_dist
    back = mean * torch.tensor([1.1, 0.9, 1.3, 0.7]).view(-1, 1, 1) / pipeline.vae.config.scaling_factor
    assert torch.allclose(back + torch.tensor([0.1, -0.2, 0.3, 0.4]).view(-1, 1, 1), posterior.mean, atol=1e-5)
    assert (deviation > 0).all() and ours.vae_identity.layout != Checkpoint.load("demo").vae_identity.layout


def overflowing(folder, part):
    keys = [f"{part}.conv_in.{kind}" for kind in ("weight", "bias")]
    set_weights(folder, VAE, lambda w: w | {key: w[key].float().mul(3e4).half() for key in keys})


@pytest.mark.parametrize("upcast", [True, False])
def test_an_autoencoder_that_overflows_half_precision(folder, upcast):
    for part in ("decoder", "encoder"):
        overflowing(folder, part)
    set_config(folder, "vae/config.json", force_upcast=upcast)
    half, exact = (Checkpoint.load(str(folder), dtype=dtype) for dtype in (torch.float16, torch.float32))
    assert half.vae.dtype == (torch.float32 if upcast else torch.float16)
    latents, frames = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 16, 16)
    assert torch.allclose(half.decode_latents(latents), exact.decode_latents(latents), atol=1e-5)
    assert torch.allclose(half.encode_frames(frames), exact.encode_frames(frames), atol=1e-5)
    assert half.unet.dtype == torch.float16
