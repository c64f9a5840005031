"""Layout guidance: reference results on a video UNet, gradients, and properties of energies and steps."""

from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from fatezero import generate
from fatezero.attention.condition import Condition
from fatezero.attention.control import AttentionSite, Control
from fatezero.attention.key_frames import Chunk, ClipCalls, KeyFrames, Windows
from fatezero.attention.masks import token_heat
from fatezero.demo.model import build_scheduler
from fatezero.diffusion.word_attention import WordAttention
from fatezero.hosts.diffusers import DiffusersDenoiser, DiffusersVideoDenoiser, with_temporal_layers
from fatezero.hosts.diffusers.memory import LiveBytes, guidance_bytes
from fatezero.methods import layout_guidance, own_attention
from fatezero.methods.layout import Shift
from fatezero.methods.layout_guidance import (
    ENERGIES,
    EnergyControl,
    ForwardControl,
    LayoutGuidance,
    ObjectTarget,
    energy_gradient,
    in_schedule,
    parsed_steps,
    shape_of,
)
from fatezero.methods.own_attention import OwnLayout, OwnTarget
from fatezero.store.records import Recorder
from small import FIXTURES, THREE_LEVELS, random_latents, random_text, reference_video_unet, relative, small_unet

SELF = KeyFrames(("self",))


def video_denoiser():
    """The UNet of the reference results, in float64."""
    return DiffusersVideoDenoiser(reference_video_unet().double(), build_scheduler())


def test_backward_guidance_equals_the_reference(monkeypatch):
    tensors, found = load_file(FIXTURES / "guidance_backward.safetensors"), []
    layout = LayoutGuidance(tensors["target"], columns=[3], steps=(0, 1, 2))

    def recorded(*given):
        found.append(energy_gradient(*given))
        return found[-1]

    monkeypatch.setattr(layout_guidance, "energy_gradient", recorded)
    made = generate(video_denoiser(), tensors["z0"], tensors["text"], tensors["negative"], 4, 15.0, layout=layout)
    energies, gradients = zip(*found, strict=True)
    assert relative(torch.tensor(energies), tensors["energies"]) < 1e-6
    assert relative(torch.stack(gradients), tensors["gradients"].double()) < 1e-6
    assert relative(made, tensors["levels"][-1].double()) < 1e-6


def test_forward_guidance_equals_the_reference():
    tensors = load_file(FIXTURES / "guidance_forward.safetensors")
    layout = LayoutGuidance(target=tensors["target"], columns=[3], mode="forward", steps=(0, 1))
    made = generate(video_denoiser(), tensors["z0"], tensors["text"], tensors["negative"], 4, 7.5, layout=layout)
    assert relative(made, tensors["levels"][-1].double()) < 1e-6


def test_sixteen_layers_are_captured_and_ten_used():
    denoiser = video_denoiser()
    assert sum(site.kind == "cross" for site in denoiser.sites(32, 32)) == 16
    control = EnergyControl(SELF, Chunk.whole(2), LayoutGuidance(target=torch.ones(2, 8, 8), columns=[1]))
    with torch.no_grad(), denoiser.hooked():
        denoiser.predict_noise(random_latents(2, 32, 32), 401, Condition.of(torch.zeros(1, 77, 32), "text"), control)
    assert len(control._found) == 10


# --- energies -----------------------------------------------------------------------------


def disc(frames=2, side=16):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    discs = [((x - 4 - 2 * f) ** 2 + (y - 7) ** 2 < 10).double() for f in range(frames)]
    return torch.stack(discs)


def test_a_binary_maps_shape_is_itself_at_any_scale():
    binary = disc().flatten(1)[:, None]
    assert torch.allclose(shape_of(binary), binary, atol=1e-4)
    maps = torch.rand(2, 3, 256, dtype=torch.float64)
    assert torch.allclose(shape_of(7 * maps + 3), shape_of(maps), atol=1e-9)
    assert shape_of(maps).min() >= 0 and shape_of(maps).max() <= 1
    assert shape_of(torch.ones(1, 2, 9)).isfinite().all()


@pytest.mark.parametrize("kind", ENERGIES)
def test_energies_are_zero_at_the_target_and_increase_away_from_it(kind):
    target = disc().flatten(1)
    at, away = (
        ENERGIES[kind](maps[:, None], target, (16, 16)) for maps in (target, (target + target.roll(5, 1)).clamp(max=1))
    )
    assert at.shape == (2,) and (at < 1e-4).all()
    assert (away > 3 * at).all()


def energy_of(denoiser, z, layout, keys=SELF):
    return energy_gradient(denoiser, z, 401, Condition.of(random_text(2), "text"), layout, ClipCalls(keys))


def small_denoiser(layers=False):
    unet = small_unet()
    if layers:
        with_temporal_layers(unet)
    return DiffusersDenoiser(unet, build_scheduler())


@pytest.mark.parametrize("kind", ENERGIES)
def test_the_gradient_matches_finite_differences(kind):
    denoiser, z = small_denoiser(), random_latents(2)
    layout = LayoutGuidance(target=disc(), columns=[2, 5], energy=kind)
    with denoiser.hooked():
        _, gradient = energy_of(denoiser, z, layout)
        direction = random_latents(2, seed=8)
        step = 1e-5
        up, down = (energy_of(denoiser, z + sign * step * direction, layout)[0] for sign in (1, -1))
    slope = (gradient * direction).sum().item()
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-4)


def test_a_small_step_along_the_gradient_lowers_the_energy():
    denoiser, z, layout = small_denoiser(), random_latents(2), LayoutGuidance(target=disc(), columns=[2])
    with denoiser.hooked():
        energy, gradient = energy_of(denoiser, z, layout)
        assert energy_of(denoiser, z - 1e-2 * gradient / gradient.norm(), layout)[0] < energy


def test_energies_average_over_words_and_add_over_objects():
    denoiser, z = small_denoiser(), random_latents(2)

    def energy(columns, more=()):
        with denoiser.hooked():
            return energy_of(denoiser, z, LayoutGuidance(target=disc(), columns=columns, more=more))[0]

    one, other = energy([2]), energy([5])
    assert energy([2, 5]) == pytest.approx((one + other) / 2)
    assert energy([2], [ObjectTarget(disc(), [5])]) == pytest.approx(one + other)


def test_independent_frames_have_independent_gradients_in_chunks():
    denoiser, z = small_denoiser(), random_latents(3)
    layout = LayoutGuidance(target=disc(3), columns=[2])
    with denoiser.hooked():
        energy, gradient = energy_of(denoiser, z, layout)
        changed = z.clone()
        changed[1] += 1
        _, other = energy_of(denoiser, changed, layout)
        in_chunks = energy_gradient(
            denoiser, z, 401, Condition.of(random_text(2), "text"), layout, ClipCalls(SELF, windows=Windows(1))
        )
    assert torch.allclose(other[[0, 2]], gradient[[0, 2]], atol=1e-12)
    assert not torch.allclose(other[1], gradient[1])
    assert in_chunks[0] == pytest.approx(energy) and torch.allclose(in_chunks[1], gradient, atol=1e-12)


def test_the_papers_schedule():
    assert [step for step in range(50) if in_schedule(step, 50)] == [*range(21), *range(22, 45, 2)]
    assert sum(in_schedule(step, 50) for step in range(50)) == 33


def test_guided_steps_take_numbers_and_ranges():
    assert parsed_steps("0-20, 22-44/2") == tuple(step for step in range(50) if in_schedule(step, 50))
    layout = LayoutGuidance(target=disc(), columns=[2], guided_steps="1,3")
    assert [step for step in range(5) if layout.guides(step, 5)] == [1, 3]
    assert torch.equal(drawn(layout), drawn(LayoutGuidance(target=disc(), columns=[2], steps=(1, 3))))
    for text in ("soon", "3-1", "1-5/0", "-1", "1.5", "²"):
        with pytest.raises(ValueError, match="guided_steps is .*0-20,22-44/2"):
            LayoutGuidance(target=disc(), columns=[2], guided_steps=text)


# --- steps --------------------------------------------------------------------------------


def drawn(layout=None, layers=False, **options):
    return generate(
        small_denoiser(layers), random_latents(2), random_text(2), random_text(3), 4, 5.0, layout=layout, **options
    )


@pytest.mark.parametrize("still", [{"scale": 0.0}, {"mode": "forward", "amount": 0.0}, {"steps": ()}])
def test_guidance_of_no_strength_is_bit_exact(still):
    assert torch.equal(drawn(LayoutGuidance(target=disc(), columns=[2], **still)), drawn())


@pytest.mark.parametrize("guided", [False, True])
def test_attention_to_words_is_recorded_and_changes_nothing(guided):
    """The mean over heads and layers of each step's maps, summed over a word's columns."""
    layout = LayoutGuidance(target=disc(), columns=[2]) if guided else None
    attention = WordAttention({"red circle": [2, 3], "grass": [5]})
    assert torch.equal(drawn(layout, attention=attention), drawn(layout))
    steps = attention.steps()
    assert list(steps) == ["red circle", "grass"] and steps["grass"].shape == (4, 2, 16, 16)
    if not guided:
        denoiser, layers = small_denoiser(), {"down.0.cross", "up.0.cross", "up.1.cross"}
        recorder = Recorder(SELF, Chunk.whole(2), layers)
        with torch.no_grad(), denoiser.hooked():
            timestep = denoiser.schedule(4).timesteps[0]
            denoiser.predict_noise(random_latents(2), timestep, Condition.of(random_text(2), "text"), recorder)
        sites = [site for site in denoiser.sites(16, 16) if site.name in recorder.records]
        heat = token_heat(recorder.step.maps(sites, torch.float64))[:, [2, 3]].sum(1)
        assert relative(steps["red circle"][0], heat) < 1e-5


def test_attention_that_cannot_be_recorded_is_refused():
    with pytest.raises(ValueError, match="forward guidance replaces attention"):
        drawn(LayoutGuidance(target=disc(), columns=[2], mode="forward"), attention=WordAttention({"a": [1]}))
    with pytest.raises(ValueError, match="token 99; the text has 77"):
        drawn(attention=WordAttention({"a": [99]}))
    with pytest.raises(ValueError, match="at least one word"):
        WordAttention({})


def test_it_runs_on_key_frames_and_temporal_layers():
    guided = drawn(LayoutGuidance(target=disc(), columns=[2]), layers=True)
    assert guided.isfinite().all() and relative(guided, drawn(layers=True)) > 1e-4


def test_repeats_end_at_a_low_energy_and_steps_are_bounded():
    once, often = (drawn(LayoutGuidance(target=disc(), columns=[2], repeats=n)) for n in (1, 3))
    assert not torch.equal(once, often)
    enough = drawn(LayoutGuidance(target=disc(), columns=[2], repeats=3, enough=1e9))
    assert torch.equal(enough, drawn())
    denoiser, z = small_denoiser(), random_latents(2)
    layout = LayoutGuidance(target=disc(), columns=[2], scale=1e4, most_change=0.01)
    with denoiser.hooked():
        moved = layout.moved(denoiser, z, 401, torch.tensor(0.5), Condition.of(random_text(2), "text"), ClipCalls(SELF))
    assert (moved - z).pow(2).mean((1, 2, 3)).sqrt().tolist() == pytest.approx([0.01, 0.01])


# --- relative to the clip without guidance -------------------------------------------------


def own(change, columns=(2,), **settings):
    return OwnLayout(own=[OwnTarget(columns, change)], **settings)


def test_a_shape_is_shifted_and_scaled_about_its_centre():
    shape = disc().float()

    def shifted(shape, shift):
        return own_attention.shifted(shape[:, None], shift)[:, 0]

    moved = shifted(shape, Shift.parse("0:0.25,0; 1:-0.125,0.125"))
    assert torch.allclose(moved[0], shape[0].roll(4, 1), atol=1e-4), "a quarter of 16 places to the right"
    assert torch.allclose(moved[1], shape[1].roll((2, -2), (0, 1)), atol=1e-4)
    grown = shifted(shape, Shift.parse("0:0,0,2"))
    assert (grown.sum((1, 2)) / shape.sum((1, 2))).tolist() == pytest.approx([4, 4], rel=0.15)
    assert torch.allclose(shifted(shape, Shift.parse("0:0,0")), shape, atol=1e-5)
    assert shifted(shape, Shift.parse("0:1.5,0")).sum() == 0, "nothing comes in from the other side"


def test_an_object_that_stays_has_no_energy_and_one_that_moves_is_pulled_there():
    """In the first step, where both clips have the same latents."""
    denoiser, z = small_denoiser(), random_latents(2)
    recorded = {}
    for name, change in (("still", Shift.parse("0:0,0")), ("right", Shift.parse("0:0.25,0")), ("swap", (5,))):
        layout = own(change)
        record = layout.recorder()
        generate(denoiser, z, random_text(2), random_text(3), 4, 5.0, attention=record)
        assert len(record.steps) == 4
        recorded[name] = layout.following(record).at(denoiser.schedule(4).timesteps[0])
    condition, timestep = Condition.of(random_text(2), "text"), denoiser.schedule(4).timesteps[0]
    with denoiser.hooked():
        energies = {
            name: energy_gradient(denoiser, z, timestep, condition, layout, ClipCalls(SELF))[0]
            for name, layout in recorded.items()
        }
    assert energies["still"] < 0.1 * min(energies["right"], energies["swap"])
    (target,) = recorded["swap"].objects
    site = next(site for site in denoiser.sites(16, 16) if site.kind == "cross" and site.tokens == 256)
    assert torch.allclose(target.on(site, [0, 1]), shape_of(target.heats[site.name][0]))


def test_a_shift_guides_a_clip_and_an_unguided_one_stays():
    layout = own(Shift.parse("0:0.25,0"), scale=30.0)
    done = []
    moved = drawn(layout, progress=lambda *told: done.append(told))
    assert relative(moved, drawn()) > 1e-4 and moved.isfinite().all()
    assert done == [(step, 8) for step in range(1, 9)]
    assert torch.equal(drawn(own(Shift.parse("0:0.25,0"), scale=0.0)), drawn())
    both = OwnLayout(own=[OwnTarget([2], (5,))], fixed=[ObjectTarget(disc(), [6])])
    assert drawn(both, layers=True).isfinite().all()


def three_levels():
    return DiffusersDenoiser(small_unet(**THREE_LEVELS, layers_per_block=1), build_scheduler())


def test_the_features_of_an_object_are_kept():
    """The gradient is that of finite differences, and the term is zero where nothing changed."""
    denoiser, z = three_levels(), random_latents(2, 32, 32)
    layout = own(Shift.parse("0:0,0"), appearance=3.0, weight=0.0, columns=(2, 5))
    record = layout.recorder()
    generate(denoiser, z, random_text(2), random_text(3), 4, 5.0, attention=record)
    timestep, condition = denoiser.schedule(4).timesteps[0], Condition.of(random_text(2), "text")
    step = layout.following(record).at(timestep)

    def energy(z):
        return energy_gradient(denoiser, z, timestep, condition, step, ClipCalls(SELF))

    with denoiser.hooked():
        assert energy(z)[0] < 1e-6
        direction, at = random_latents(2, 32, 32, seed=8), z + 0.3 * random_latents(2, 32, 32, seed=9)
        found, gradient = energy(at)
        up, down = (energy(at + sign * 1e-6 * direction)[0] for sign in (1, -1))
    assert found > 0
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert up != down


def test_what_relative_layouts_refuse():
    with pytest.raises(ValueError, match="mode is forward"):
        own(Shift.parse("0:0,0"), mode="forward")
    with pytest.raises(ValueError, match="own is empty"):
        OwnLayout(own=[])
    with pytest.raises(ValueError, match="token 99; the text has 77"):
        drawn(own((99,)))


def test_forward_guidance_keeps_a_words_total_attention():
    site, random = AttentionSite("down", 0, "cross", 2, 4, 4, 4), torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, tokens, 4, generator=random) for tokens in (16, 7))
    v = torch.eye(7).expand(2, 2, 7, 7)
    target = torch.zeros(2, 16, 16)
    target[0, :8, :8] = 1  # no object in the second frame
    layout = LayoutGuidance(target=target, columns=[3], mode="forward")
    maps = ForwardControl(SELF, Chunk.whole(2), layout).cross_attention(q, k, v, site)
    plain = Control(SELF, Chunk.whole(2)).cross_attention(q, k, v, site)
    assert torch.allclose(maps[..., 3].sum(-1), plain[..., 3].sum(-1), atol=1e-5)
    assert torch.allclose(maps[1], plain[1], atol=1e-6)
    inside = maps[0, :, :, 3].view(2, 4, 4)[:, :2, :2].sum((1, 2)) / maps[0, :, :, 3].sum(-1)
    assert (inside > 0.7).all()
    others = [c for c in range(7) if c != 3]
    assert torch.allclose(maps[..., others], plain[..., others], atol=1e-6)


def test_the_models_weights_get_no_gradients():
    unet = small_unet().requires_grad_(True)
    denoiser = DiffusersDenoiser(unet, build_scheduler())
    with denoiser.hooked():
        energy_of(denoiser, random_latents(2), LayoutGuidance(target=disc(), columns=[2]))
    assert all(w.requires_grad and w.grad is None for w in unet.parameters())
    assert not any("forward" in vars(module) for module in unet.modules())


def test_refusals():
    with pytest.raises(ValueError, match=r"target must be \(frames, height, width\)"):
        LayoutGuidance(target=torch.full((1, 4, 4), 2.0), columns=[1])
    with pytest.raises(ValueError, match="columns is .*must list tokens"):
        LayoutGuidance(target=torch.ones(1, 4, 4), columns=[])
    with pytest.raises(ValueError, match="target has 3 frames; the clip has 2"):
        drawn(LayoutGuidance(target=disc(3), columns=[2]))
    with pytest.raises(ValueError, match="token 99; the text has 77"):
        drawn(LayoutGuidance(target=disc(), columns=[99]))
    with pytest.raises(ValueError, match="scale is -1"):
        LayoutGuidance(target=disc(), columns=[2], scale=-1)
    with pytest.raises(TypeError, match="unet is a UNet2DConditionModel; .* UNet3DConditionModel"):
        DiffusersVideoDenoiser(small_unet(), build_scheduler())
    coarse = DiffusersDenoiser(small_unet(), build_scheduler())
    with pytest.raises(ValueError, match="cross-attention layer of 64 to 256 tokens"), coarse.hooked():
        energy_of(coarse, random_latents(2, 4, 4), LayoutGuidance(target=disc(), columns=[2]))
    odd = DiffusersDenoiser(small_unet(), build_scheduler())
    assert isinstance(odd.unet, UNet2DConditionModel)
    odd.unet.conv_in.weight.data = odd.unet.conv_in.weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"weights in float8_e4m3fn \(conv_in.weight\), .*gradients"):
        energy_of(odd, random_latents(2), LayoutGuidance(target=disc(), columns=[2]))


@pytest.mark.parametrize("kind", ["image", "layers", pytest.param("video", marks=pytest.mark.slow)])
def test_memory_of_a_gradient_is_estimated(kind):
    """Compared with the tensors that a gradient really allocates."""
    torch.manual_seed(0)
    if kind == "video":
        own, text = video_denoiser(), random_text(1).repeat(1, 1, 2)
    else:
        unet = small_unet()
        own = DiffusersDenoiser(with_temporal_layers(unet) if kind == "layers" else unet, build_scheduler())
        text = random_text(1)
    layout, shape = LayoutGuidance(target=disc(2), columns=[2]), (2, 4, 16, 16)
    condition = Condition.of(text, "text")
    estimate, plain = guidance_bytes(own, shape, condition, SELF, False, partial(EnergyControl, layout=layout))
    with own.hooked(), torch.no_grad(), LiveBytes() as live:
        control = EnergyControl(SELF, Chunk.whole(2), layout)
        own.gradient(random_latents(2), 500, condition.to(random_latents(1)), control, control.loss)
    assert abs(estimate / live.most - 1) < 0.25
    assert plain < estimate
