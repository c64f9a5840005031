"""MiniMax H3's joint attention on diffusers: the plain model, fusion, masks, words, and what is refused."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

from fatezero import FlowEditSettings, FusionSettings, PromptEdit, draw, edit, invert
from fatezero.attention.condition import Condition
from fatezero.attention.control import Control, attention_map
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.masks import GivenMask
from fatezero.attention.prompt import Alignment
from fatezero.diffusion.source import source_heats
from fatezero.hosts.diffusers.h3 import JointDenoiser
from fatezero.hosts.diffusers.memory import LiveBytes
from fatezero.methods.fatezero_branch import Fuser, StepPlan
from fatezero.methods.flow_mask import FlowMaskSettings
from fatezero.methods.kv_edit import KVEditSettings
from fatezero.models.h3 import places
from fatezero.store.records import PairedBranch, Recorder, SourceStep
from small import relative
from tests.joint import SHAPES, joint_denoiser, random_streams, random_text, small_h3

PROMPT = PromptEdit("a red circle", "a blue star", tokenizer=None)
STEPS = 4
VIDEO = 24 * 7 * 8 * 6


@pytest.fixture(scope="module")
def denoiser() -> JointDenoiser:
    return joint_denoiser()


@pytest.fixture(scope="module")
def latents(denoiser) -> torch.Tensor:
    return denoiser.packed(*random_streams())


@pytest.fixture(scope="module")
def inversion(denoiser, latents):
    return invert(denoiser, latents, random_text(2), STEPS)


def whole() -> Control:
    return Control(KeyFrames(("all",)), Chunk.whole(1))


def edited(denoiser, inversion, mask=None, text=3, guidance=2.0, **fusion):
    given = None if mask is None else GivenMask(torch.as_tensor(mask))
    settings = FusionSettings(cross_replace_steps=0.0, **{"self_replace_steps": 1.0, **fusion})
    texts = random_text(text, 7), random_text(4, 5)
    return edit(denoiser, inversion, *texts, guidance, PROMPT, settings, mask=given)


def layout(text, grid=(7, 8, 6), sound=11):
    """diffusers' own layout of a call."""
    tags = torch.ones(text, dtype=torch.long)
    return MiniMaxH3PrepareLayoutStep.build_packed_sequence(tags, *grid, sound, (1, 2, 2), 2, 2, 0)


def rows_of(denoiser, latents, sigma):
    """Patches of the video, and the sound on its own schedule."""
    video, carried = latents.flatten().split([VIDEO, 32 * 2 * 11])
    even = sigma / (12 + sigma * (1 - 12))
    of_sound = 3 * even / (1 + 2 * even)
    sound = carried.view(SHAPES[1]) * of_sound / sigma
    patches = video.view(24, 7, 4, 2, 3, 2).permute(1, 2, 4, 0, 3, 5).reshape(1, 84, 96)
    return patches, sound.permute(0, 2, 3, 1).reshape(1, 22, 32), of_sound


def prediction(outputs, sound, of_sound):
    """The velocity of both streams from the transformer's outputs."""
    video = -outputs[0].view(7, 4, 3, 24, 2, 2).permute(3, 0, 1, 4, 2, 5).reshape(-1)
    own = -outputs[1]
    own = (1 - 4) * sound + (1 + 3 * of_sound) * own
    return torch.cat([video, own.view(2, 11, 32).permute(2, 0, 1).reshape(-1)])[None, None, None]


def plain(denoiser, latents, sigma, text):
    """A call of diffusers' own model."""
    patches, sound, of_sound = rows_of(denoiser, latents, sigma)
    positions, tags, video, audio, words, *_ = layout(text.shape[1])
    at = torch.tensor([1 - sigma, 1 - of_sound], dtype=torch.float32)
    outputs = denoiser.transformer(
        patches, sound, text, at, (tags == 2).long(), tags, positions, video, audio, words, return_dict=False
    )
    return prediction(outputs, sound, of_sound)


@pytest.mark.parametrize(("text", "frames", "sound"), [(9, 7, 11), (1, 12, 20), (30, 2, 3)])
def test_the_places_of_rows_are_diffusers_own(text, frames, sound):
    positions, *_ = layout(text, (frames, 8, 6), sound)
    assert torch.allclose(places(text, (frames, 4, 3), (2, sound)), positions, rtol=0, atol=1e-12)


def test_the_hooked_model_equals_the_plain_one(denoiser, latents):
    expected = plain(denoiser, latents, 0.7, random_text(2))
    with denoiser.hooked():
        found = denoiser.predict_noise(latents, 700.0, Condition(random_text(2)), whole())
    assert relative(found, expected) < 1e-6, "diffusers embeds timesteps in float32"
    assert torch.equal(plain(denoiser, latents, 0.7, random_text(2)), expected), "the model is restored"


def test_a_branch_beside_has_the_prediction_of_its_own_call(denoiser, latents):
    recorder = Recorder(KeyFrames(("all",)), Chunk.whole(1), {site.name for site in denoiser.sites(8, 6)})
    other = latents.flip(-1)
    beside = PairedBranch(other, Condition(random_text(2)), recorder)
    with denoiser.hooked():
        own = denoiser.predict_noise(latents, 700.0, Condition(random_text(3, 5)), whole(), paired=beside)
        expected = [
            denoiser.predict_noise(z, 700.0, Condition(text), whole())
            for z, text in ((other, random_text(2)), (latents, random_text(3, 5)))
        ]
    assert torch.equal(recorder.captured.prediction, expected[0])
    assert torch.equal(own, expected[1])
    assert not recorder.records, "forgotten after each block"


class _Explicit:
    """Attention by maps, in turn of the source, and of the edit under a mask (rows of the video, 1)."""

    def __init__(self, mask):
        self.mask, self.kept = mask, None

    def __call__(self, attn, hidden, rotary, _):
        q, k, v = (to(hidden).unflatten(-1, (2, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        cos, sin = (part.double()[None, :, None] for part in rotary)
        turned = []
        for x in (attn.norm_q(q), attn.norm_k(k)):
            (a, b), head, tail = x[..., :18].chunk(2, -1), x[..., :18], x[..., 18:]
            turned.append(torch.cat([head * cos + torch.cat([-b, a], -1) * sin, tail], -1))
        q, k, v = (x.transpose(1, 2) for x in (*turned, v))
        maps = attention_map(q, k)
        if self.kept is None:
            self.kept = q[:, :, -84:], k[:, :, -84:]
        else:
            (q, of_source), self.kept = self.kept, None
            of_source = attention_map(q, torch.cat([k[:, :, :-84], of_source], 2))
            maps[:, :, -84:] = self.mask * maps[:, :, -84:] + (1 - self.mask) * of_source
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(2))


def fused(denoiser, source, target, sigma, texts, mask):
    """A step of fusion, with diffusers' blocks and explicit maps of both branches; all attention in memory."""
    model, calls = denoiser.transformer, []
    for z, text in zip((source, target), texts, strict=True):
        patches, sound, of_sound = rows_of(denoiser, z, sigma)
        positions, tags, *_ = layout(text.shape[1])
        at = torch.tensor([1 - sigma, 1 - of_sound], dtype=torch.float32)
        rows = torch.cat(
            [model.token_refiner(model.context_embedder(text)), model.audio_proj_in(sound), model.proj_in(patches)], 1
        )
        time = model.time_embedder(model.time_proj(at).double())
        noisy = (tags == 2).long()
        calls.append((rows, time, noisy * 3 + tags, model.rope(positions), noisy, sound, of_sound))
    (of_source, *of_source_call), (own, time, modulation, rope, noisy, sound, of_sound) = calls
    attend = _Explicit(mask.double().reshape(-1, 1))
    for block in model.transformer_blocks:
        before, block.attn.processor = block.attn.processor, attend
        of_source = block(of_source, *of_source_call[:3])
        own = block(own, time, modulation, rope)
        block.attn.processor = before
    own = model.norm_out(own, time, noisy)
    text = texts[1].shape[1]
    outputs = model.proj_out(own)[:, -84:], model.audio_proj_out(own)[:, text : text + 22]
    return prediction(outputs, sound, of_sound)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_fusion_equals_a_loop_over_the_models_blocks(denoiser, inversion, weight):
    """Both branches block by block, with explicit maps."""
    mask = torch.zeros(7, 4, 3)
    mask[:, 2:] = weight
    settings, store = FusionSettings(0.0, 1.0, blend_self_attention=True), inversion.store
    texts, z = (random_text(2), random_text(3, 7)), store.level(STEPS)
    schedule = denoiser.schedule(STEPS)
    for step in range(STEPS):
        sigma, source = schedule.sigma(STEPS - step), store.level(store.source_level(step))
        velocity = fused(denoiser, source, z, float(sigma), texts, mask)
        z = schedule.move(z, velocity, STEPS - step, STEPS - step - 1)
    found = edit(denoiser, inversion, texts[1], None, 1.0, PROMPT, settings, mask=GivenMask(mask))
    assert relative(found, z) < 1e-6, relative(found, z)


def test_a_mask_of_ones_is_no_fusion_and_of_zeros_the_sources_attention(denoiser, inversion):
    none = edit(denoiser, inversion, random_text(3, 7), random_text(4, 5), 2.0)
    ones = edited(denoiser, inversion, torch.ones(1, 8, 6), blend_self_attention=True)
    zeros = edited(denoiser, inversion, torch.zeros(1, 8, 6), blend_self_attention=True)
    assert relative(ones, none) < 1e-12
    assert relative(zeros, edited(denoiser, inversion)) < 1e-12
    assert relative(zeros, ones) > 1e-2
    assert relative(edited(denoiser, inversion, self_replace_steps=0.0), none) < 1e-12


def test_equal_prompts_return_the_clip(denoiser, latents):
    drawn = draw(denoiser, latents, random_text(2), STEPS, FlowEditSettings(source_guidance=1.0))
    found = edit(denoiser, drawn, random_text(2), None, 1.0, PROMPT, FusionSettings(0.0, 1.0))
    assert relative(found, latents) < 1e-9


def test_latents_outside_the_mask_are_the_clips(denoiser, inversion, latents):
    mask = torch.zeros(1, 8, 6)
    mask[:, :4, :3] = 1
    found = edited(denoiser, inversion, mask, blend_self_attention=True, blend_latents=True, blend_latents_until=1.0)
    (video, sound), (before, sound_before) = denoiser.unpacked(found), denoiser.unpacked(latents)
    outside = (mask[0] == 0).expand_as(video)
    assert torch.equal(video[outside], before[outside])
    assert relative(video[~outside], before[~outside]) > 1e-2
    assert relative(sound, sound_before) > 1e-2, "the sound follows the edit"


class Words:
    """A tokenizer of one token a word."""

    bos_token_id = None

    def __call__(self, text, **_):
        return type("Encoded", (), {"input_ids": [sum(map(ord, word)) for word in text.split()]})


def test_a_mask_of_both_prompts(denoiser, inversion):
    """Inside, the edit has its own attention; the masks are those of the words."""
    words = PromptEdit("a red circle", "a blue star now", Words(), blend_words=(["circle"], ["star"]))
    settings = FusionSettings(0.0, 1.0, blend_self_attention=True, blend_latents=True, mask_from="prompts")
    texts = random_text(3, 7), random_text(4, 5)
    found = edit(denoiser, inversion, *texts, 2.0, words, settings)
    again = edit(denoiser, inversion, *texts, 2.0, PROMPT, FusionSettings(0.0, 1.0))
    assert relative(found, again) > 1e-3
    by_attention = FusionSettings(0.0, 1.0, blend_self_attention=True, blend_threshold=0.9)
    assert relative(edit(denoiser, inversion, *texts, 2.0, words, by_attention), again) > 1e-3


def test_kv_edit_takes_the_keys_and_values_outside_the_mask(denoiser, inversion, latents):
    """A mask of ones keeps the edit's own; under one of zeros the clip returns."""
    texts, mask = (random_text(3, 7), random_text(4, 5)), torch.zeros(1, 8, 6)
    none = edit(denoiser, inversion, *texts, 2.0)
    by_mask = []
    for filled in (1.0, 0.0, torch.tensor([0.0, 0, 0, 1, 1, 1])):
        mask[:] = filled
        by_mask.append(edit(denoiser, inversion, *texts, 2.0, None, KVEditSettings(), mask=GivenMask(mask.clone())))
    assert relative(by_mask[0], none) < 1e-12
    (video, _), (before, _) = denoiser.unpacked(by_mask[2]), denoiser.unpacked(latents)
    assert torch.equal(video[..., :3], before[..., :3])
    plain = edit(denoiser, inversion, *texts, 2.0, mask=GivenMask(mask))
    assert relative(by_mask[2], plain) > 1e-3, "keys and values differ from those of a mask of latents"
    assert torch.equal(denoiser.unpacked(by_mask[1])[0], before)


def test_words_have_the_weights_of_the_videos_rows(denoiser, inversion, monkeypatch):
    """As in explicit maps of the middle blocks."""
    maps, joint = [], Control.joint_attention

    def kept(self, q, k, v, site):
        if site.index in (1, 2):
            maps.append(attention_map(q, k)[0, :, -84:, 4].mean(0).view(7, 4, 3))
        return joint(self, q, k, v, site)

    monkeypatch.setattr(Control, "joint_attention", kept)
    (heat,) = source_heats(denoiser, inversion, [[4]], step=1)
    assert relative(heat.double(), torch.stack(maps).mean(0)) < 1e-5


def test_text_with_rows_of_pictures(denoiser, latents):
    """Their tags change the call, as in diffusers' model."""
    tags = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    with denoiser.hooked():
        found = denoiser.predict_noise(latents, 700.0, Condition(random_text(2), {"tags": tags}), whole())
        without = denoiser.predict_noise(latents, 700.0, Condition(random_text(2)), whole())
    assert relative(found, without) > 1e-3


@pytest.mark.parametrize(
    ("settings", "prompt", "error"),
    [
        ({"cross_replace_words": {"star": 0.2}}, PROMPT, "cross_replace_words needs cross-attention"),
        ({}, PromptEdit("a red circle", "a blue star", None, reweight={"star": 2.0}), "reweight needs cross"),
    ],
)
def test_settings_of_cross_attention_are_refused(denoiser, inversion, settings, prompt, error):
    with pytest.raises(ValueError, match=error):
        edit(denoiser, inversion, random_text(3), None, 1.0, prompt, FusionSettings(**settings))


@pytest.mark.parametrize("memory", ["queries_keys", "maps"])
def test_stored_attention_is_refused_and_auto_computes_it_again(denoiser, latents, memory):
    with pytest.raises(ValueError, match=f"memory is {memory}.*joint.*recompute"):
        invert(denoiser, latents, random_text(2), STEPS, memory=memory)
    assert invert(denoiser, latents, random_text(2), 1, memory="auto").store.memory == "recompute"


def test_unsupported_models_and_inputs(denoiser, latents):
    with pytest.raises(TypeError, match="MiniMaxH3Scheduler"):
        JointDenoiser(small_h3(), FlowMatchEulerDiscreteScheduler(), SHAPES)
    with pytest.raises(TypeError, match="MiniMaxH3Transformer3DModel"):
        JointDenoiser(torch.nn.Linear(1, 1), MiniMaxH3Scheduler(), SHAPES)
    with pytest.raises(ValueError, match="multiples of the patch"):
        JointDenoiser(small_h3(), MiniMaxH3Scheduler(), ((1, 24, 7, 7, 6), SHAPES[1]))
    with pytest.raises(ValueError, match="numbers"):
        invert(denoiser, latents[..., 1:], random_text(2), STEPS)
    with pytest.raises(ValueError, match="wide"):
        invert(denoiser, latents, random_text(2)[..., 1:], STEPS)
    with pytest.raises(ValueError, match="at least 1"):
        denoiser.schedule(0)


def test_the_schedule_is_the_schedulers(denoiser):
    scheduler = MiniMaxH3Scheduler(12.0)
    scheduler.set_timesteps(11)
    own = denoiser.schedule(10)
    assert [own.sigma(level) for level in range(10, -1, -1)] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-7)
    assert F.mse_loss(torch.tensor(own.timesteps) / 1000, 1 - scheduler.timesteps) < 1e-12


class _Flash(torch.overrides.TorchFunctionMode):
    """Attention without a map, like fused kernels, and all rows of a mask, on torch's meta device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        if func is torch.Tensor.nonzero:  # of unknown values: all
            return torch.empty(len(args[0]), 1, dtype=torch.long, device="meta")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_memory_at_full_size(masked):
    """Of a guided step at 124 frames of 1344x768 in bfloat16, from shapes; the mask as if both sides had all rows."""
    blocks = 3
    with torch.device("meta"):
        model = MiniMaxH3Transformer3DModel(num_layers=blocks).to(torch.bfloat16)
        own = JointDenoiser(model, MiniMaxH3Scheduler(), ((1, 24, 37, 48, 84), (1, 32, 2, 207)))
        z, text = own.packed(*map(torch.empty, own.shapes)), Condition(torch.empty(1, 200, 5120))
        masks = {(24, 42): torch.empty(37, 24, 42)} if masked else None
    of_block = sum(weight.nbytes for weight in model.transformer_blocks[0].parameters())
    weights = sum(weight.nbytes for weight in model.parameters()) + (50 - blocks) * of_block

    def peak(fused):
        recorder = Recorder(KeyFrames(("all",)), Chunk.whole(1), {site.name for site in own.sites(1, 1)})
        pair = PairedBranch(z, text, recorder)
        source = SourceStep(recorder.captured, recorder.key_frames, recorder.chunk, paired=pair)
        plan = StepPlan(False, True, False, False)
        control = Fuser(source, Alignment.nothing(), FusionSettings(), plan, masks) if fused else whole()
        with own.hooked(), torch.no_grad(), _Flash(), LiveBytes(model) as live:
            own.predict_noise(z, 500.0, text, control, paired=pair if fused else None)
        return live.most

    plain = peak(False)
    assert 1 < (peak(True) + weights) / (plain + weights) < 1.05


@pytest.mark.parametrize("frames", [1, 7])
def test_a_mask_of_the_video_joins_a_flow_mask(denoiser, latents, frames):
    """The left half limits the computed mask, which covers everything, and not the sound."""
    drawn = draw(denoiser, latents, random_text(2), 2, FlowEditSettings(source_guidance=1.0))
    left = torch.zeros(frames, 8, 6)
    left[..., :3] = 1
    mask = GivenMask(left, "intersection")
    fusion = FlowMaskSettings(threshold=0.001, grow=0, still=0)
    found = edit(denoiser, drawn, random_text(3), guidance_scale=1.0, fusion=fusion, mask=mask)
    changed = (found != latents).flatten()
    video = changed[:VIDEO].view(24, 7, 8, 6)
    assert video[..., :3].float().mean() > 0.9 and not video[..., 3:].any()
    assert changed[VIDEO:].any()
