"""Transformers without attention control: sampling equals their pipelines', FlowEdit an independent loop."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTX2Pipeline, WanPipeline
from einops import rearrange
from PIL import Image

from fatezero import FlowEditSettings, draw, edit, generate, invert
from fatezero.diffusion.denoiser import check_finite
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.methods.flow_mask import FlowMaskSettings
from fatezero.video.size import to_unit
from tests.flow_models import write_flux, write_ltx2, write_qwen_image
from tests.small import relative
from tests.wan import write_wan_i2v, write_wan_vace

SOURCE, TARGET, NEGATIVE = "a red square on water", "a green circle on water", "blue"
WIDTH, HEIGHT, FRAMES = 64, 64, 6
STEPS = 4


def clip_of(frames: int = FRAMES, seed: int = 0) -> torch.Tensor:
    """A random clip, uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, HEIGHT, WIDTH, 3), dtype=torch.uint8, generator=generator)


@dataclass(frozen=True)
class Family:
    """A family of models.

    write: a random pipeline in a folder. sampled: its pipeline's own sampling from noise (f, c, h, w) at a guidance, as
    latents of that shape. velocity: for a pipeline and latents, the function (x, timestep, prompt) that its loop calls.
    """

    write: Callable
    sampled: Callable
    velocity: Callable


def first_and_last(clip):
    return [Image.fromarray(clip[i].numpy()) for i in (0, -1)]


def wan_text(pipeline, prompt):
    return WanPipeline._get_t5_prompt_embeds(pipeline, prompt, max_sequence_length=512)


def wan_sampled(pipeline, noise, clip, guidance, **more):
    made = pipeline(
        prompt_embeds=wan_text(pipeline, TARGET), negative_prompt_embeds=wan_text(pipeline, NEGATIVE),
        latents=noise.transpose(0, 1)[None], guidance_scale=guidance, num_frames=9, height=HEIGHT, width=WIDTH,
        num_inference_steps=STEPS, output_type="latent", **more,
    )  # fmt: skip
    return made.frames[0].transpose(0, 1)


def i2v_sampled(pipeline, noise, clip, guidance):
    first, last = first_and_last(clip)
    both = pipeline.transformer.config.pos_embed_seq_len is not None
    return wan_sampled(pipeline, noise, clip, guidance, image=first, last_image=last if both else None)


def i2v_velocity(pipeline, clip, shape):
    """Wan 2.1's: with a mask of four channels and the encoded first frame appended to the latents."""
    frames, _, height, width = shape
    video = torch.zeros(1, 3, 4 * frames - 3, HEIGHT, WIDTH)
    video[:, :, 0] = to_unit(clip[:1]) * 2 - 1
    mean, deviation = (
        torch.tensor(pipeline.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    encoded = (pipeline.vae.encode(video).latent_dist.mode() - mean) / deviation
    mask = torch.zeros(1, 4, frames, height, width)
    mask[:, :, 0] = 1
    image = pipeline.encode_image(first_and_last(clip)[0])

    def velocity(x, timestep, prompt):
        inputs = torch.cat([x.transpose(0, 1)[None], mask, encoded], 1)
        return pipeline.transformer(
            inputs, torch.tensor([timestep]), wan_text(pipeline, prompt), image, return_dict=False
        )[0][0].transpose(0, 1)

    return velocity


def vace_velocity(pipeline, clip, shape):
    """VACE's without a control video: a grey one, encoded twice, and a mask of ones."""
    frames, _, height, width = shape
    grey = torch.zeros(1, 3, 4 * frames - 3, HEIGHT, WIDTH)
    mean, deviation = (
        torch.tensor(pipeline.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    encoded = (pipeline.vae.encode(grey).latent_dist.mode() - mean) / deviation
    control = torch.cat([encoded, encoded, torch.ones(1, 64, frames, height, width)], 1)

    def velocity(x, timestep, prompt):
        return pipeline.transformer(
            x.transpose(0, 1)[None], torch.tensor([timestep]), wan_text(pipeline, prompt),
            control_hidden_states=control, return_dict=False,
        )[0][0].transpose(0, 1)  # fmt: skip

    return velocity


def frame_by_frame(sampled):
    """A picture pipeline's samples for each frame of the noise, unpacked."""

    def of_clip(pipeline, noise, clip, guidance):
        _, channels, height, width = noise.shape
        frames = []
        for frame in noise.split(1):
            packed = pipeline._pack_latents(frame, 1, channels, height, width)
            found = sampled(pipeline, packed, guidance, height=HEIGHT, width=WIDTH, num_inference_steps=STEPS)
            frames.append(pipeline._unpack_latents(found, HEIGHT, WIDTH, pipeline.vae_scale_factor).view_as(frame))
        return torch.cat(frames)

    return of_clip


@frame_by_frame
def flux_sampled(pipeline, packed, guidance, **more):
    distilled = pipeline.transformer.config.guidance_embeds
    own = {"guidance_scale": guidance} if distilled else {"true_cfg_scale": guidance, "negative_prompt": NEGATIVE}
    return pipeline(prompt=TARGET, latents=packed, output_type="latent", **own, **more).images


def flux_velocity(pipeline, clip, shape):
    """Flux's, with all frames as one batch. guidance: for dev, which takes it as an input."""
    frames, channels, height, width = shape
    rows, columns = height // 2, width // 2
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())

    def velocity(x, timestep, prompt, guidance=None):
        text, pooled, ids = pipeline.encode_prompt(prompt)
        tokens = rearrange(x, "f c (y p) (x q) -> f (y x) (c p q)", p=2, q=2)
        many = [one.expand(frames, *one.shape[1:]) for one in (text, pooled)]
        found = pipeline.transformer(
            tokens,
            *many,
            torch.full((frames,), timestep / 1000),
            places,
            ids,
            guidance if guidance is None else torch.full((frames,), guidance),
            return_dict=False,
        )[0]
        return rearrange(found, "f (y x) (c p q) -> f c (y p) (x q)", y=rows, p=2, q=2)

    return velocity


@frame_by_frame
def qwen_sampled(pipeline, packed, guidance, **more):
    return pipeline(prompt=TARGET, true_cfg_scale=1.0, latents=packed, output_type="latent", **more).images


def qwen_velocity(pipeline, clip, shape):
    frames, channels, height, width = shape

    def velocity(x, timestep, prompt):
        text, mask = pipeline.encode_prompt(prompt)
        tokens = rearrange(x, "f c (y p) (x q) -> f (y x) (c p q)", p=2, q=2)
        found = pipeline.transformer(
            tokens,
            text.expand(frames, -1, -1),
            mask,
            torch.full((frames,), timestep / 1000),
            [[(1, height // 2, width // 2)]] * frames,
            return_dict=False,
        )[0]
        return rearrange(found, "f (y x) (c p q) -> f c (y p) (x q)", y=height // 2, p=2, q=2)

    return velocity


def ltx2_sampled(pipeline, noise, clip, guidance):
    """Samples of the whole pipeline, with isolated modalities and without other kinds of guidance."""
    whole = LTX2Pipeline.from_pretrained(pipeline.config._name_or_path)
    forward = whole.transformer.forward
    whole.transformer.forward = lambda **given: forward(**{**given, "isolate_modalities": True})
    frames, _, height, width = noise.shape
    off = {f"{what}{name}": scale for what in ("", "audio_") for name, scale in
           (("stg_scale", 0.0), ("modality_scale", 1.0), ("guidance_rescale", 0.0))}  # fmt: skip
    made = whole(
        prompt=TARGET, negative_prompt=NEGATIVE, latents=whole._pack_latents(noise.transpose(0, 1)[None]),
        guidance_scale=guidance, num_frames=8 * frames - 7, frame_rate=8.0, height=32 * height, width=32 * width,
        num_inference_steps=STEPS, output_type="latent", **off,
    )  # fmt: skip
    clean = whole._normalize_latents(made.frames, whole.vae.latents_mean, whole.vae.latents_std)
    return clean[0].transpose(0, 1)


def ltx2_velocity(pipeline, clip, shape):
    """LTX-2's at 8 fps, with any sound, because it is isolated."""
    frames, _, height, width = shape

    def velocity(x, timestep, prompt):
        states, mask, _, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        text, of_sound, mask = pipeline.connectors(states, mask, padding_side="left")
        t, tokens = torch.tensor([timestep]), rearrange(x, "f c y x -> 1 (f y x) c")
        found = pipeline.transformer(
            tokens, torch.randn(1, 5, 8), text, of_sound, t, sigma=t, encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask, num_frames=frames, height=height, width=width, fps=8.0,
            audio_num_frames=5, isolate_modalities=True, use_cross_timestep=True, return_dict=False,
        )[0]  # fmt: skip
        return rearrange(found, "1 (f y x) c -> f c y x", f=frames, y=height)

    return velocity


def wan_i2v(kind):
    return Family(lambda folder: write_wan_i2v(folder, kind), i2v_sampled, i2v_velocity)


FAMILIES = {
    "wan i2v": wan_i2v("2.1"),
    "wan 2.2 i2v": wan_i2v("2.2"),
    "wan flf2v": wan_i2v("flf2v"),
    "wan 5b i2v": wan_i2v("5B"),
    "wan vace": Family(write_wan_vace, wan_sampled, vace_velocity),
    "ltx2": Family(write_ltx2, ltx2_sampled, ltx2_velocity),
    "qwen image": Family(write_qwen_image, qwen_sampled, qwen_velocity),
    "flux dev": Family(write_flux, flux_sampled, flux_velocity),
    "flux schnell": Family(lambda folder: write_flux(folder, distilled=False), flux_sampled, flux_velocity),
}
LOOPS = ("wan i2v", "wan vace", "flux schnell", "flux dev", "qwen image", "ltx2")
"""Families with a loop of their own; the others differ from them only in what `sampled` covers."""


@pytest.fixture(scope="module", params=FAMILIES)
def named(request, tmp_path_factory):
    """A family with its model for a clip, the clip and its latents."""
    family = FAMILIES[request.param]
    model = open_model(str(family.write(tmp_path_factory.mktemp("model"))))
    clip = clip_of()
    latents = model.encode_clip(to_unit(clip))
    return request.param, model.for_clip(ClipFacts(tuple(latents.shape), 8.0, lambda: iter(clip))), clip, latents


def texts(model, *prompts):
    return [model.encode_prompt(prompt, WIDTH, HEIGHT) for prompt in prompts]


def test_sampling_equals_the_pipelines(named):
    name, model, clip, latents = named
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    if name.startswith("wan"):  # its own scheduler has other steps than Euler's
        model = replace(model, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
        model.pipeline.scheduler = model.scheduler
    guidance = 1.0 if name == "qwen image" else 3.0  # its pipeline rescales guided predictions
    expected = FAMILIES[name].sampled(model.pipeline, noise, clip, guidance)
    found = generate(model.denoiser, noise, *texts(model, TARGET, NEGATIVE), STEPS, guidance)
    if name == "wan 5b i2v":  # the pipeline keeps noise there to the end, and replaces it
        expected, found = expected[1:], found[1:]
    assert relative(found, expected) < 1e-4


@pytest.mark.parametrize("variant", ["paper", "wan_edit"])
def test_equal_prompts_return_the_clip(named, variant):
    _, model, _, latents = named
    source, negative = texts(model, SOURCE, NEGATIVE)
    drawn = draw(model.denoiser, latents, source, STEPS, FlowEditSettings(source_guidance=4.0, variant=variant))
    found = edit(model.denoiser, drawn, source, negative, 4.0)
    assert relative(found, latents) < 1e-5


def test_an_edit_equals_an_independent_loop(named):
    name, model, clip, latents = named
    if name not in LOOPS:
        pytest.skip("covered by the pipeline's sampling")
    noises = torch.randn(STEPS, *latents.shape, generator=torch.Generator().manual_seed(2))
    source, target, negative = texts(model, SOURCE, TARGET, NEGATIVE)
    drawn = draw(model.denoiser, latents, source, STEPS, FlowEditSettings(source_guidance=1.5), noises=noises)
    found = edit(model.denoiser, drawn, target, negative, 3.0)
    schedule, velocity = model.denoiser.schedule(STEPS), FAMILIES[name].velocity(model.pipeline, clip, latents.shape)
    sigmas = [schedule.sigma(level) for level in range(STEPS, -1, -1)]

    def guided(x, t, prompt, guidance):
        if model.embeds_guidance:
            return velocity(x, t, prompt, guidance)
        away = velocity(x, t, NEGATIVE)
        return away + guidance * (velocity(x, t, prompt) - away)

    z = latents.clone()
    for noise, t, sigma, after in zip(noises, schedule.timesteps, sigmas, sigmas[1:], strict=False):
        noised = (1 - sigma) * latents + sigma * noise
        with torch.no_grad():
            change = guided(z + noised - latents, t, TARGET, 3.0) - guided(noised, t, SOURCE, 1.5)
        z = z + (after - sigma) * change
    check_finite(z, "the loop")
    assert relative(found, z) < 1e-4
    assert (found - latents).abs().max() > 1e-3


def test_chunks_use_their_own_frames(named):
    _, model, _, latents = named
    source, target = texts(model, SOURCE, TARGET)
    drawn = draw(model.denoiser, latents, source, STEPS)
    found = edit(model.denoiser, drawn, target, guidance_scale=1.0, chunk_frames=2)
    assert found.shape == latents.shape


def test_a_mask_of_predictions(named):
    _, model, _, latents = named
    source, target = texts(model, SOURCE, TARGET)
    drawn = draw(model.denoiser, latents, source, STEPS)
    found = edit(model.denoiser, drawn, target, guidance_scale=1.0, fusion=FlowMaskSettings(threshold=0.9, still=0))
    same = (found == latents).all(1)
    assert same.any()
    assert not same.all()


def test_an_inversion_is_replayed(named):
    _, model, _, latents = named
    (source,) = texts(model, SOURCE)
    away = []
    for steps in (2, 8):
        inversion = invert(model.denoiser, latents, source, steps)
        away.append(relative(edit(model.denoiser, inversion, source, guidance_scale=1.0), latents))
    assert away[1] < 0.6 * away[0]
