import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from fatezero import Condition, edit, invert
from fatezero.attention.control import Control, attention
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.hosts.diffusers.unet import DiffusersDenoiser, kernel_of, xformers_attention
from small import THREE_LEVELS, in_thread, random_latents, random_text, relative, small_unet


def own_frames(frames=2):
    return Control(KeyFrames(("self",)), Chunk.whole(frames))


def hooks(unet):
    return {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in unet.named_modules()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        THREE_LEVELS | {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")},
        {"transformer_layers_per_block": 2, "use_linear_projection": True},
        {"mid_block_type": None},
        {"upcast_attention": True},
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (12, 20), (10, 14)])
def test_key_frames_self_equal_the_plain_unet(scheduler, options, size):
    unet = small_unet(**options)
    denoiser = DiffusersDenoiser(unet, scheduler)
    latents, text = random_latents(2, *size), random_text(0)
    plain = unet(latents, 300, text.expand(2, -1, -1)).sample
    with denoiser.hooked():
        assert relative(denoiser.predict_noise(latents, 300, Condition(text), own_frames()), plain) < 1e-12


def test_sites_name_every_layer_once_with_its_grid(scheduler):
    denoiser = DiffusersDenoiser(small_unet(**THREE_LEVELS), scheduler)
    sites = denoiser.sites(10, 14)
    assert len({site.name for site in sites}) == len(sites) == len(denoiser.unet.attn_processors)
    by_name = {site.name: site for site in sites}
    assert (by_name["down.0.self"].height, by_name["down.0.self"].width) == (10, 14)
    assert (by_name["down.1.cross"].height, by_name["down.1.cross"].width) == (5, 7)
    assert (by_name["mid.0.self"].height, by_name["mid.0.self"].width) == (3, 4)
    assert by_name["mid.0.self"].channels == 16


def test_the_unet_is_restored(unet, denoiser):
    before, processors = hooks(unet), dict(unet.attn_processors)
    with denoiser.hooked(clip_norm=True):
        assert hooks(unet) != before
        assert all(unet.attn_processors[n] is not p for n, p in processors.items())
    assert hooks(unet) == before
    assert all(unet.attn_processors[n] is p for n, p in processors.items())


def test_the_unet_is_restored_after_an_error(unet, denoiser):
    class Failing(Control):
        def cross_attention(self, q, k, v, site):
            raise KeyboardInterrupt

    before, processors = hooks(unet), dict(unet.attn_processors)
    with (
        pytest.raises(KeyboardInterrupt),
        denoiser.hooked(clip_norm=True),
    ):
        failing = Failing(KeyFrames(("self",)), Chunk.whole(2))
        denoiser.predict_noise(random_latents(2), 1, Condition(random_text(0)), failing)
    assert hooks(unet) == before
    assert all(unet.attn_processors[n] is p for n, p in processors.items())


def test_only_one_thread_edits_a_unet_and_other_threads_call_it_unhooked(unet, denoiser):
    latents, text, before = random_latents(2), random_text(0), hooks(unet)

    def plain():
        return unet(latents, 300, text.expand(2, -1, -1)).sample

    def step():
        return denoiser.predict_noise(latents, 300, Condition(text), Control(KeyFrames.of("middle"), Chunk.whole(2)))

    def inverted():
        return invert(DiffusersDenoiser(unet, denoiser.scheduler), latents, text, steps=2)

    expected = plain()
    with denoiser.hooked(clip_norm=True):
        ours = step()
        assert relative(ours, expected) > 1e-3
        assert torch.equal(in_thread(plain), expected)
        assert torch.equal(step(), ours)
        assert "another edit is using this UNet" in str(in_thread(inverted))
        with pytest.raises(ValueError, match="another edit is using this UNet"), denoiser.hooked():
            pass
        assert torch.equal(step(), ours), "the refused edit did not unhook it"
    assert hooks(unet) == before
    assert torch.equal(in_thread(inverted).latents, inverted().latents)


def test_clip_norm_takes_statistics_over_the_clip(denoiser):
    """It changes nothing on a clip of equal frames, but other clips."""
    still = random_latents(1).expand(3, -1, -1, -1)

    def predicted(latents, clip_norm):
        with denoiser.hooked(clip_norm):
            return denoiser.predict_noise(latents, 300, Condition(random_text(0)), own_frames(3))

    assert relative(predicted(still, True), predicted(still, False)) < 1e-12
    assert relative(predicted(random_latents(3), True), predicted(random_latents(3), False)) > 1e-4


def test_plain_processors_are_replaced_and_others_refused_by_name(unet, scheduler):
    unet.set_attn_processor(AttnProcessor())
    DiffusersDenoiser(unet, scheduler)
    unet.set_attn_processor(SlicedAttnProcessor(1))
    denoiser = DiffusersDenoiser(unet, scheduler)
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.set_processor(IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=16))
    with pytest.raises(ValueError, match=r"mid_block.*IPAdapterAttnProcessor2_0"):
        DiffusersDenoiser(unet, scheduler)
    with pytest.raises(ValueError, match="IPAdapterAttnProcessor2_0"), denoiser.hooked():
        pass


def test_the_unets_own_kernel_is_used():
    assert kernel_of(AttnProcessor()) is attention
    assert kernel_of(XFormersAttnProcessor()) is xformers_attention


def test_lora_layers_keep_working(unet, scheduler):
    peft = pytest.importorskip("peft")
    plain = DiffusersDenoiser(unet, scheduler)
    inversion = invert(plain, random_latents(2), random_text(0), steps=2)
    without = edit(plain, inversion, random_text(1), guidance_scale=1)
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v", "to_out.0"], init_lora_weights=False))
    unet.double()
    denoiser = DiffusersDenoiser(unet, scheduler)
    latents, text = random_latents(2), random_text(0)
    expected = unet(latents, 300, text.expand(2, -1, -1)).sample
    with denoiser.hooked():
        assert relative(denoiser.predict_noise(latents, 300, Condition(text), own_frames()), expected) < 1e-12
    with_lora = edit(denoiser, inversion, random_text(1), guidance_scale=1)
    assert relative(with_lora, without) > 1e-3, "a LoRA on the edit only is applied, and the store stays valid"
    unet.disable_adapters()
    assert relative(edit(denoiser, inversion, random_text(1), guidance_scale=1), without) < 1e-12


def test_a_model_that_is_not_an_attention_unet_is_refused(scheduler):
    from diffusers import DiTTransformer2DModel, UNet2DModel

    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)
    with pytest.raises(TypeError, match="DiTTransformer2DModel"):
        DiffusersDenoiser(dit, scheduler)
    with pytest.raises(TypeError, match="UNet2DModel"):
        DiffusersDenoiser(
            UNet2DModel(
                block_out_channels=(8, 8),
                norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2,
                up_block_types=("UpBlock2D",) * 2,
            ),
            scheduler,
        )


def test_noise_levels_of_other_schedulers_are_used(unet, scheduler):
    from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

    euler = EulerDiscreteScheduler.from_config(scheduler.config)
    assert (
        DiffusersDenoiser(unet, euler).schedule(10).timesteps
        == DiffusersDenoiser(unet, scheduler).schedule(10).timesteps
    )
    with pytest.raises(TypeError, match="FlowMatchEulerDiscreteScheduler"):
        DiffusersDenoiser(unet, FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("steps", [0, 1000, 1001])
def test_steps_the_schedule_does_not_have_are_refused(denoiser, steps):
    with pytest.raises(ValueError, match=f"steps is {steps}"):
        denoiser.schedule(steps)


def test_half_precision_is_close_to_single(scheduler):
    unet = small_unet().float()
    denoiser = DiffusersDenoiser(unet, scheduler)
    latents, text = random_latents(2).float(), random_text(0).float()
    single = invert(denoiser, latents, text, steps=2).latents
    half = invert(DiffusersDenoiser(unet.bfloat16(), scheduler), latents, text, steps=2).latents
    assert half.dtype == torch.float32, "latents keep their own precision"
    assert relative(half, single) < 0.1
