"""LTX-2 on diffusers with a first frame and a control video: equal to loops with the pipeline's own parts."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import LTX2InContextPipeline
from diffusers.models.transformers.transformer_ltx2 import apply_interleaved_rotary_emb, apply_split_rotary_emb
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, draw, edit, invert
from fatezero.attention.control import Control
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.files.lora import LoraFile
from fatezero.hosts.diffusers.load import open_model
from fatezero.hosts.diffusers.lora_files import LoraError, reference_downscale
from fatezero.hosts.diffusers.model import ClipFacts
from fatezero.hosts.diffusers.model_files import CheckpointError
from fatezero.methods.flow_smoothing import FlowSmoothing
from fatezero.methods.kv_edit import KVEditSettings
from fatezero.video.motion import Motion
from tests.flow_models import LTX23, write_ltx2
from tests.small import relative

SOURCE, TARGET, NEGATIVE = "a red square on water", "a bright green circle on water", "blue"
FRAMES, HEIGHT, WIDTH, STEPS, FPS, GUIDANCE = 3, 4, 6, 3, 8.0, 5.0
PIXELS = (FRAMES - 1) * 8 + 1
FIRST, CONTROL, BOTH, SMALL = {"first"}, {"control"}, {"first", "control"}, {"first", "control", "small"}
GUIDES, EVERY = {"guides"}, {"first", "guides", "control"}
AT = 9
"""The frame of the guide frame, the first of the last latent."""


def pictures(seed, frames=PIXELS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, HEIGHT * 32, WIDTH * 32, 3), dtype=torch.uint8, generator=generator)


NO_FLOW, SEEN = torch.zeros(FRAMES - 1, 2, HEIGHT, WIDTH), torch.ones(FRAMES - 1, HEIGHT, WIDTH)
STILL = Motion(NO_FLOW, NO_FLOW, SEEN, SEEN)
CLIP, OTHER, VIDEO = pictures(1), pictures(1), pictures(3)
OTHER[[0, AT]] = pictures(2, 2)


@pytest.fixture(scope="module", params=[{}, LTX23], ids=["2", "2.3"])
def plain(request, tmp_path_factory):
    found = open_model(str(write_ltx2(tmp_path_factory.mktemp("ltx2"), **request.param)))
    found.transformer.double()
    return found


@pytest.fixture(scope="module")
def latents(plain):
    return plain.encode_clip(CLIP.permute(0, 3, 1, 2) / 255).double()


class Case:
    """A model with some conditioning frames, its prompts, and the pipeline's own inputs for them."""

    def __init__(self, plain, what, own=None):
        self.what, shape = what, (FRAMES, 8, HEIGHT, WIDTH)
        if "control" in what:
            plain = plain.with_control("", VIDEO)
        if "small" in what:
            object.__setattr__(plain, "downscale", 2)
        given = (*((0,) if "first" in what else ()), *((AT,) if "guides" in what else ()))
        self.model = plain.for_clip(ClipFacts(shape, FPS, lambda: iter(CLIP), given))
        self.own = plain.for_clip(ClipFacts(shape, FPS, lambda: iter(CLIP if own is None else own), given))
        self.text = {SOURCE: self.model.encode_prompt(SOURCE, 192, 128)}
        self.text |= {name: self.own.encode_prompt(name, 192, 128) for name in (TARGET, NEGATIVE)}

    @property
    def denoiser(self):
        return self.model.denoiser

    def draw(self, latents, **more):
        return draw(self.denoiser, latents, self.text[SOURCE], STEPS, FlowEditSettings(**more))

    def invert(self, latents, memory="recompute", steps=STEPS, **more):
        return invert(self.denoiser, latents, self.text[SOURCE], steps, memory=memory, **more)

    def edit(self, inversion, injection=None, mask=None, guidance=GUIDANCE, target=TARGET, **more):
        pair = PromptEdit(SOURCE, target, self.model.tokenizer) if isinstance(injection, FusionSettings) else None
        given = None if mask is None else GivenMask(mask)
        return edit(
            self.denoiser, inversion, self.text[target], self.text[NEGATIVE], guidance, pair, injection, mask=given,
            **more,
        )  # fmt: skip

    # --- the pipeline's --------------------------------------------------------------------

    def parts(self, frames):
        """(strengths, clean tokens, positions) of the pipeline, for the frames of a clip."""
        found, small = self.model.pipeline, "small" in self.what
        names = ("scheduler", "vae", "audio_vae", "text_encoder", "tokenizer", "connectors", "transformer", "vocoder")
        own = LTX2InContextPipeline(**{name: getattr(found, name, None) for name in names})
        references = [LTX2ReferenceCondition([Image.fromarray(one.numpy()) for one in VIDEO])]
        places = {"first": (0, 0), "guides": (AT, 2)}
        conditions = [
            LTX2VideoCondition(Image.fromarray(frames[at].numpy()), index, crf=0)
            for name, (at, index) in places.items()
            if name in self.what
        ]
        _, strengths, clean, places, *_ = own.prepare_latents(
            conditions, references if "control" in self.what else None,
            2 if small else 1, num_channels_latents=8, height=HEIGHT * 32, width=WIDTH * 32, num_frames=PIXELS,
            frame_rate=FPS, dtype=torch.float32, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        if small:  # it scales pictures in another way
            clean[:, FRAMES * HEIGHT * WIDTH :] = self.model._packed(self.model.inputs["control"])
        every = self.model.transformer.rope.prepare_video_coords(1, FRAMES, HEIGHT, WIDTH, "cpu", fps=FPS)
        return strengths.double(), clean.double(), every if places is None else torch.cat([every, places], 2)

    def velocities(self, rows, sigma):
        """Of rows of (latents, prompt, frames), in one call, as the pipeline makes of its prediction."""
        model, count = self.model, FRAMES * HEIGHT * WIDTH
        packed, seen, levels, found = [], [], [], [self.parts(frames) for *_, frames in rows]
        for (z, *_), (strength, clean, _) in zip(rows, found, strict=True):
            z = torch.cat([model._packed(rearrange(z, "f c y x -> 1 c f y x")), clean[:, count:]], 1)
            packed.append(z)
            seen.append(z * (1 - strength) + clean * strength)
            levels.append(1000 * sigma * (1 - strength[..., 0]))
        texts = [self.text[name] for _, name, _ in rows]
        sound, mask = (torch.cat([text.extras[name] for text in texts]).double() for name in ("sound", "mask"))
        whole = torch.full((len(rows),), 1000 * sigma)
        output, _ = model.transformer(
            torch.cat(seen), torch.zeros(len(rows), 1, 8, dtype=torch.float64),
            torch.cat([text.embeddings for text in texts]).double(), sound, timestep=torch.cat(levels),
            audio_timestep=whole, sigma=whole, encoder_attention_mask=mask, audio_encoder_attention_mask=mask,
            num_frames=FRAMES, height=HEIGHT, width=WIDTH, fps=FPS, audio_num_frames=1, isolate_modalities=True,
            video_coords=torch.cat([places for *_, places in found]), use_cross_timestep=True, return_dict=False,
        )  # fmt: skip
        for z, own, (strength, clean, _) in zip(packed, output, found, strict=True):
            denoised = (z - sigma * own[None]) * (1 - strength) + clean * strength
            moved = ((z - denoised) / sigma)[:, :count]
            yield rearrange(moved, "1 (f y x) c -> f c y x", f=FRAMES, y=HEIGHT)


@pytest.fixture(params=[FIRST, CONTROL, SMALL, GUIDES, EVERY], ids=["first", "control", "small", "guides", "every"])
def case(plain, request):
    """An edit with another first frame than the clip's."""
    yield Case(plain, request.param, OTHER)
    object.__setattr__(plain, "downscale", 1)


def guided(negative, positive, scale):
    return negative + scale * (positive - negative)


def test_flow_edit_is_that_of_a_loop(case, latents):
    inversion, x = case.draw(latents, source_guidance=2.0), latents
    found = case.edit(inversion)
    sigmas = [1 - alpha for alpha in inversion.store.alphas]
    for level in range(STEPS, 0, -1):
        here, there, noisy = sigmas[level], sigmas[level - 1], inversion.store.level(level)
        z = x + noisy - latents
        rows = [(z, TARGET, OTHER), (z, NEGATIVE, OTHER), (noisy, SOURCE, CLIP), (noisy, NEGATIVE, CLIP)]
        to, away, source, source_away = case.velocities(rows, here)
        x = x + (there - here) * (guided(away, to, GUIDANCE) - guided(source_away, source, 2.0))
    assert relative(found, x) < 1e-5
    assert relative(found, latents) > 1e-3


class Fused:
    """Attention whose last row has the queries and keys of the first for the clip's tokens."""

    def __init__(self, count):
        self.count = count

    def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, query_rotary_emb=None, *rest, **more):
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        rotated = apply_split_rotary_emb if attn.rope_type == "split" else apply_interleaved_rotary_emb
        q, k = rotated(q, query_rotary_emb), rotated(k, query_rotary_emb)
        q, k, v = (rearrange(part, "b n (h d) -> b h n d", h=attn.heads) for part in (q, k, v))
        attend, own = torch.nn.functional.scaled_dot_product_attention, self.count
        output = attend(q, k, v)
        keys = torch.cat([k[:1, :, :own], k[-1:, :, own:]], 2)
        output[-1:, :, :own] = attend(q[:1, :, :own], keys, v[-1:])
        output = rearrange(output, "b h n d -> b n h d")
        if attn.to_gate_logits is not None:
            output = output * (2 * torch.sigmoid(attn.to_gate_logits(x)))[..., None]
        return attn.to_out[0](output.flatten(2, 3))


def test_a_fused_edit_is_that_of_a_loop(case, latents):
    inversion = case.invert(latents)
    found = case.edit(inversion, FusionSettings(cross_replace_steps=0.0, self_replace_steps=1.0))
    sigmas, levels = [1 - alpha for alpha in inversion.store.alphas], [latents]
    for here, there in pairwise(sigmas):
        (velocity,) = case.velocities([(levels[-1], SOURCE, CLIP)], there)
        levels.append(levels[-1] + (there - here) * velocity)
    assert relative(inversion.latents[-1], levels[-1]) < 1e-5
    x, layers = levels[-1], [block.attn1 for block in case.model.transformer.transformer_blocks]
    before = [layer.processor for layer in layers]
    for level in range(STEPS, 0, -1):
        here, there = sigmas[level], sigmas[level - 1]
        (away,) = case.velocities([(x, NEGATIVE, OTHER)], here)
        for layer in layers:
            layer.processor = Fused(FRAMES * HEIGHT * WIDTH)
        _, to = case.velocities([(levels[level - 1], SOURCE, CLIP), (x, TARGET, OTHER)], here)
        for layer, processor in zip(layers, before, strict=True):
            layer.processor = processor
        x = x + (there - here) * guided(away, to, GUIDANCE)
    assert relative(found, x) < 1e-5


def test_the_edits_first_frame_is_the_given_picture(plain, latents):
    case = Case(plain, FIRST, OTHER)
    picture = case.own.inputs["first"][0].double()
    settings = (None, FusionSettings(0.7, 0.6))
    for inversion in (
        case.draw(latents),
        case.draw(latents, gain=1.3, draws=2),
        case.invert(latents),
        case.invert(latents, order=2),
    ):
        one, fused = (case.edit(inversion, one) for one in settings)
        for found in (one, fused):
            assert relative(found[0], picture) < 1e-5
            assert relative(found[1:], latents[1:]) > 1e-3
        same = Case(plain, FIRST).edit(inversion, settings[1])
        assert relative(same[0], latents[0]) < 1e-4
        assert relative(same[1:], fused[1:]) > 1e-3, "the picture acts on the other frames"


def test_smoothing_keeps_the_given_picture(plain, latents):
    case = Case(plain, FIRST, OTHER)
    inversion = case.invert(latents)
    one, smooth = case.edit(inversion), case.edit(inversion, smoothing=FlowSmoothing(0.8, STILL))
    assert relative(smooth[0], case.own.inputs["first"][0].double()) < 1e-5
    assert relative(smooth[1:], one[1:]) > 1e-3


def test_the_same_prompt_and_frame_replay_the_clip(plain, latents):
    case = Case(plain, EVERY)
    case.text[NEGATIVE] = case.text[SOURCE]
    fusion = FusionSettings(1.0, 1.0)
    drawn = case.draw(latents, source_guidance=1.0)
    assert relative(case.edit(drawn, fusion, guidance=1.0, target=SOURCE), latents) < 1e-6
    away = [
        relative(case.edit(case.invert(latents, steps=steps, order=2), fusion, guidance=1.0, target=SOURCE), latents)
        for steps in (4, 16)
    ]
    assert away[1] < 0.2 * away[0]


@pytest.mark.parametrize("what", [FIRST, EVERY], ids=["first", "every"])
def test_the_memories_agree(plain, latents, what):
    case = Case(plain, what, OTHER)
    fusion = FusionSettings(0.7, 0.6, blend_self_attention=True, blend_latents=True, mask_from="prompts")
    computed = case.edit(case.invert(latents), fusion)
    assert relative(case.edit(case.invert(latents, "queries_keys"), fusion), computed) < 1e-6
    if what == FIRST:
        assert relative(case.edit(case.invert(latents, "maps"), fusion), computed) < 1e-6
        return
    with pytest.raises(ValueError, match="maps cannot include"):
        case.invert(latents, "maps")


def test_masks_and_kv_edit(plain, latents):
    case, half = Case(plain, EVERY, OTHER), torch.zeros(1, HEIGHT, WIDTH)
    half[..., : WIDTH // 2] = 1
    inversion = case.invert(latents)
    for injection in (KVEditSettings(), FusionSettings(0.0, 1.0, blend_self_attention=True, blend_latents=True,
                                                       blend_latents_until=1.0)):  # fmt: skip
        found = case.edit(inversion, injection, half)
        assert torch.equal(found[..., WIDTH // 2 :], latents[..., WIDTH // 2 :])
        assert relative(found[..., : WIDTH // 2], latents[..., : WIDTH // 2]) > 1e-2


def test_a_control_computes_the_models_attention(case, latents):
    """For several branches in any order, and for the frames of a window, which have their own part of the video."""
    texts = case.text
    for frames in (range(FRAMES), (1, 2)):
        z, chunk = latents[list(frames)], Chunk.of(tuple(frames), FRAMES)
        control = type("Everyone", (Control,), {})(KeyFrames(("all",)), chunk)
        plain = {name: case.model.velocity(z, 700.0, texts[name].to(z), frames) for name in texts}
        with case.denoiser.hooked():
            for order in (list(texts), list(texts)[::-1]):
                found = case.denoiser.predicted([(z, texts[name], control) for name in order], 700.0)
                for name, velocity in zip(order, found, strict=True):
                    assert relative(velocity, plain[name]) < 1e-6
    extras = {
        name: part[:, :, 1:] if name == "control" else part
        for name, part in texts[SOURCE].extras.items()
        if name not in ("first", "guide_numbers")
    }
    if "guides" in extras:  # the latents of the window begin at frame 8, and its first has one frame
        extras["guide_numbers"] = torch.tensor([[AT - 8]])
    shifted = case.model.velocity(z, 700.0, type(texts[SOURCE])(texts[SOURCE].embeddings, extras).to(z), (0, 1))
    assert relative(shifted, plain[SOURCE]) < 1e-6


def test_half_precision(tmp_path, latents):
    model = open_model(str(write_ltx2(tmp_path)), dtype=torch.bfloat16)
    case, z = Case(model, EVERY, OTHER), latents.float()
    found = case.edit(case.invert(z), FusionSettings(0.7, 0.6))
    assert relative(found[0], case.own.inputs["first"][0]) < 1e-5
    assert torch.isfinite(found).all()
    assert relative(found[1:], z[1:]) > 1e-3


def test_windows(plain, latents):
    case = Case(plain, BOTH, OTHER)
    found = case.edit(case.draw(latents), chunk_frames=2)
    assert relative(found[0], case.own.inputs["first"][0]) < 1e-5
    assert torch.isfinite(found).all()


def test_a_weak_control_video_is_noisy_and_one_without_strength_is_off(plain, latents):
    def of(strength):
        found = plain.with_control("", VIDEO, strength).for_clip(ClipFacts((FRAMES, 8, HEIGHT, WIDTH), FPS))
        text = found.encode_prompt(SOURCE, 192, 128).to(latents)
        return found.velocity(latents, 700.0, text, range(FRAMES))

    own = plain.for_clip(ClipFacts((FRAMES, 8, HEIGHT, WIDTH), FPS))
    without = own.velocity(latents, 700.0, own.encode_prompt(SOURCE, 192, 128).to(latents), range(FRAMES))
    assert torch.equal(of(0.0), without)
    assert relative(of(0.5), without) > 1e-4
    assert relative(of(0.5), of(1.0)) > 1e-4


def test_the_size_of_a_control_video_is_that_of_its_lora(tmp_path):
    def lora(name, metadata):
        save_file({"a": torch.zeros(1)}, tmp_path / name, metadata)
        return LoraFile(str(tmp_path / name))

    plain, small = lora("plain.safetensors", {}), lora("a.safetensors", {"reference_downscale_factor": "2"})
    other, wrong = (lora(f"{n}.safetensors", {"x.reference_downscale_factor": n}) for n in ("4.0", "much"))
    assert [reference_downscale(loras) for loras in ([], [plain], [plain, small], [other])] == [1, 1, 2, 4]
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    broken = LoraFile(str(tmp_path / "broken.safetensors"))
    for loras, error in (
        ([small, other], "one IC-LoRA"),
        ([wrong], "invalid reference_downscale_factor"),
        ([broken], "damaged"),
    ):
        with pytest.raises(LoraError, match=error):
            reference_downscale(loras)


@pytest.mark.parametrize("name", ["LTX2ConditionPipeline", "LTX2InContextPipeline"])
def test_folders_of_the_conditioning_pipelines(tmp_path, name):
    index = write_ltx2(tmp_path) / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
    model = open_model(str(tmp_path))
    assert type(model.pipeline).__name__ == name
    assert model.encode_prompt(SOURCE, 64, 64).extras["mask"].all()


def test_refusals(plain, latents):
    for more, error in (
        ({"strength": 1.5}, "at most 1"),
        ({"start": 0.2}, "control_start"),
    ):
        with pytest.raises(CheckpointError, match=error):
            plain.with_control("", VIDEO, **more)
    facts = ClipFacts((FRAMES, 8, HEIGHT, WIDTH), FPS, guide_frames=(0,))
    with pytest.raises(ValueError, match="needs the frames"):
        plain.for_clip(facts).encode_prompt(SOURCE, 192, 128)
    with pytest.raises(ValueError, match="as the clip"):
        plain.for_clip(ClipFacts((FRAMES, 8, 2, 2), FPS, lambda: iter(CLIP), (0,))).encode_prompt(SOURCE, 64, 64)
    with pytest.raises(ValueError, match="frame 17 is outside"):
        plain.for_clip(replace(facts, frames=lambda: iter(CLIP), guide_frames=(17,))).encode_prompt(SOURCE, 192, 128)
    case = Case(plain, FIRST)
    inversion = case.invert(latents)
    without = plain.for_clip(ClipFacts((FRAMES, 8, HEIGHT, WIDTH), FPS))
    case.text[TARGET] = without.encode_prompt(TARGET, 192, 128)
    with pytest.raises(ValueError, match="different inputs"):
        case.edit(inversion, FusionSettings(0.0, 1.0))
    controlled = Case(plain, CONTROL)
    with pytest.raises(ValueError, match="another model|control of"):
        edit(controlled.denoiser, inversion, controlled.text[TARGET], controlled.text[NEGATIVE], GUIDANCE)
