import pytest
import torch

from fatezero.attention.control import AttentionSite, attention, attention_map
from fatezero.attention.key_frames import Chunk, KeyFrames
from fatezero.attention.prompt import Alignment, PromptEdit
from fatezero.methods.fatezero import Fuser, FusionSettings, StepPlan
from fatezero.recipes.recipe import Recipe
from fatezero.store.records import Recorder, SourceStep

FRAMES, HEADS, SIDE, DIM, COLUMNS = 3, 2, 4, 8, 7
SELF = AttentionSite("down", 0, "self", HEADS, DIM, SIDE, SIDE)
CROSS = AttentionSite("down", 0, "cross", HEADS, DIM, SIDE, SIDE)
KEYS = KeyFrames(("self", "middle"))
CLIP = Chunk.whole(FRAMES)
BOTH = StepPlan(fuse_cross=True, fuse_self=True, blend_latents=False, mask=False)


def tensors(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(FRAMES, HEADS, n, DIM, generator=generator).double() for n in (SIDE**2, tokens, tokens)]


def identity_alignment():
    ones = torch.ones(COLUMNS).double()
    return Alignment(torch.eye(COLUMNS).double(), ones, ones)


def recorded(maps=False, keys=KEYS, columns=COLUMNS):
    recorder = Recorder(keys, CLIP, {SELF.name, CROSS.name}, "maps" if maps else "recompute")
    recorder.self_attention(*tensors(SIDE**2, 0), SELF)
    recorder.cross_attention(*tensors(columns, 1), CROSS)
    return SourceStep(recorder.captured, keys, CLIP)


def fuser(plan=BOTH, masks=None, maps=False, settings=None):
    return Fuser(recorded(maps), identity_alignment(), settings or FusionSettings(), plan, masks)


def explicit_self(mask):
    """(M A_edit + (1 - M) A_src) V with explicit maps, as in the paper."""
    q, k, v = tensors(SIDE**2, 2)
    source_q, source_k, _ = tensors(SIDE**2, 0)
    everyone = range(FRAMES)
    gathered = [KEYS.gather(x, everyone, everyone, FRAMES) for x in (k, source_k, v)]
    m = mask.view(FRAMES, 1, -1, 1)
    return (m * attention_map(q, gathered[0]) + (1 - m) * attention_map(source_q, gathered[1])) @ gathered[2]


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("kind", ["none", "all", "half"])
def test_masked_self_fusion_equals_equation_7(kind, maps):
    mask = {"none": torch.zeros, "all": torch.ones}.get(kind, torch.zeros)(FRAMES, SIDE, SIDE).double()
    if kind == "half":
        mask[:, :2] = 1
    got = fuser(masks={(SIDE, SIDE): mask}, maps=maps).self_attention(*tensors(SIDE**2, 2), SELF)
    assert torch.allclose(got, explicit_self(mask), atol=1e-12)


@pytest.mark.parametrize("maps", [False, True])
def test_full_self_fusion_applies_the_sources_map_to_the_edits_values(maps):
    got = fuser(maps=maps).self_attention(*tensors(SIDE**2, 2), SELF)
    assert torch.allclose(got, explicit_self(torch.zeros(FRAMES, SIDE, SIDE).double()), atol=1e-12)


@pytest.mark.parametrize("maps", [False, True])
def test_cross_fusion_uses_the_aligned_tokens(maps):
    q, k, v = tensors(COLUMNS, 3)
    control = fuser(maps=maps)
    copied = torch.tensor([1.0, 1, 0, 1, 1, 1, 1]).double()
    weights = torch.arange(COLUMNS).double()
    control.alignment = Alignment(torch.diag(copied), copied, weights)
    source_q, source_k, _ = tensors(COLUMNS, 1)
    source, own = attention_map(source_q, source_k[:1]), attention_map(q, k)
    expected = (torch.where(copied.bool(), source, own) * weights) @ v
    assert torch.allclose(control.cross_attention(q, k, v, CROSS), expected, atol=1e-12)
    assert torch.allclose(control.alignment.fused(source, own) @ v, expected, atol=1e-12)


@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("fuse", [False, True])
def test_suppressed_attention_goes_to_the_other_tokens(maps, fuse):
    q, k, v = tensors(COLUMNS, 3)
    control = fuser(plan=StepPlan(fuse, False, False, False), maps=maps)
    source_q, source_k, _ = tensors(COLUMNS, 1)
    whole = attention_map(source_q, source_k[:1]) if fuse else attention_map(q, k)
    shares = torch.ones(FRAMES, COLUMNS, SIDE, SIDE).double()
    control.shares = {(SIDE, SIDE): shares}
    assert torch.allclose(control.cross_attention(q, k, v, CROSS), whole @ v, atol=1e-12)
    shares[:, 2, :2] = 0.25  # the upper half of the picture
    kept = whole.clone()
    kept[:, :, : SIDE**2 // 2, 2] /= 4
    expected = kept / kept.sum(-1, keepdim=True) @ v
    assert torch.allclose(control.cross_attention(q, k, v, CROSS), expected, atol=1e-12)


def test_without_a_plan_nothing_is_fused():
    control = fuser(plan=StepPlan(False, False, False, False))
    q, k, v = tensors(COLUMNS, 3)
    assert torch.equal(control.cross_attention(q, k, v, CROSS), attention(q, k, v))


def test_layers_above_max_tokens_are_not_fused():
    control = fuser(settings=FusionSettings(max_tokens=SIDE**2 - 1))
    q, k, v = tensors(COLUMNS, 3)
    assert torch.equal(control.cross_attention(q, k, v, CROSS), attention(q, k, v))


@pytest.mark.parametrize(
    ("share", "steps", "cross", "self_"), [(0.8, 50, 40, 40), (0.7, 50, 35, 35), (0.6, 5, 3, 3), (0.5, 5, 3, 2)]
)
def test_shares_of_steps_are_rounded_as_in_the_authors_code(share, steps, cross, self_):
    settings = FusionSettings(cross_replace_steps=share, self_replace_steps=share)
    assert (settings.cross_steps(steps), settings.self_steps(steps)) == (cross, self_)


def test_shares_at_the_ends():
    assert FusionSettings(0, 0).cross_steps(50) == 0
    assert FusionSettings(1, 1).cross_steps(50) == FusionSettings(1, 1).self_steps(50) == 50


def times_of(bounds, steps):
    """For each of `steps` + 1 times, whether Prompt-to-Prompt replaces attention, for a share or pair of shares."""
    begin, end = bounds if isinstance(bounds, tuple) else (0.0, bounds)
    times = torch.zeros(steps + 1)
    times[int(begin * (steps + 1)) : int(end * (steps + 1))] = 1
    return times


@pytest.mark.parametrize("maps", [False, True])
def test_shares_of_words_follow_prompt_to_prompt(tokenizer, maps):
    """A_t = alpha_t A* + (1 - alpha_t) A, with alpha by token: a word's own share of steps, or the default."""
    steps, words = 7, {"square": (0.3, 0.75), "water": 0.2}
    settings = FusionSettings(0.6, 0.0, cross_replace_from=0.15, cross_replace_words=words)
    pair = PromptEdit("a red circle on water", "a red square on water", tokenizer, reweight={"square": 3.0, "red": 2.0})
    alphas = times_of((0.15, 0.6), steps)[:, None].repeat(1, 77).double()
    for word, bounds in words.items():
        alphas[:, pair.token_indices(pair.target, word, 77)] = times_of(bounds, steps)[:, None].double()
    alignment = pair.align(77, 77).to(alphas)
    columns = {word: pair.token_indices(pair.target, word, 77) for word in words}
    source = recorded(maps, columns=77)
    (q, k, v), (source_q, source_k, _) = tensors(77, 3), tensors(77, 1)
    own = attention_map(q, k)
    replaced = alignment.fused(attention_map(source_q, source_k[:1]), own)
    for step in range(steps):
        expected = (alphas[step] * replaced + (1 - alphas[step]) * own) @ v
        control = Fuser(
            source, settings.aligned(alignment, columns, step, steps), settings, StepPlan.of(settings, step, steps)
        )
        assert torch.allclose(control.cross_attention(q, k, v, CROSS), expected, atol=1e-12), step
    assert {tuple(row) for row in alphas.unique(dim=0).tolist()} > {(0.0,) * 77}, "words differ in some steps"


def test_shares_may_start_later():
    settings = FusionSettings(0.5, 0.6, self_replace_from=0.25, cross_replace_from=0.2)
    assert settings.self_range(10) == range(2, 6)
    assert [StepPlan.of(settings, step, 10).fuse_self for step in range(10)] == [s in range(2, 6) for s in range(10)]
    assert settings.cross_range(10) == range(2, 5) and settings.cross_steps(10) == 3
    assert FusionSettings(0, 0, cross_replace_words={"car": 1.0}).cross_steps(10) == 10


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"self_replace_steps": 0.2, "self_replace_from": 0.3}, "self_replace_steps begins at 0.3"),
        ({"cross_replace_words": {"car": 1.5}}, "cross_replace_words: car"),
        ({"cross_replace_words": {"car": (0.5, 0.2)}}, "cross_replace_words: car"),
    ],
)
def test_shares_that_end_before_they_begin_are_named(wrong, named):
    with pytest.raises(ValueError, match=named):
        FusionSettings(**wrong)


def test_words_with_shares_are_in_the_target(tokenizer):
    recipe = Recipe("a red circle", "a red square", injection=FusionSettings(cross_replace_words={"circle": 0.5}))
    with pytest.raises(ValueError, match="cross_replace_words: 'circle' is not in the prompt"):
        recipe.pair(tokenizer)


def test_latents_blend_between_a_fifth_and_four_fifths():
    assert FusionSettings(blend_latents=True).latent_steps(50) == range(10, 39)
    assert len(FusionSettings().latent_steps(50)) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"cross_replace_steps": 1.1},
        {"self_replace_steps": -1},
        {"separate_words": 2},
        {"blend_threshold": -0.1},
        {"max_tokens": 0},
    ],
)
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        FusionSettings(**wrong)
