import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from fatezero.demo.scenes import Scene, render
from fatezero.demo.show import FRAMES, MOTION, SCENE
from fatezero.files.bundled import DEMO
from fatezero.metrics.clip import ClipScorer
from fatezero.metrics.evaluate import Report, evaluate
from fatezero.metrics.plot import _limits, plot_report


@pytest.fixture(scope="module")
def source():
    return render(SCENE, MOTION, FRAMES)


@pytest.fixture(scope="module")
def green():
    return render(Scene.parse("a green square on water"), MOTION, FRAMES)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small random CLIP, saved in transformers' layout."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=16)
    )
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def test_an_exact_edit_scores_perfectly(source, green):
    grown = F.max_pool2d((source.mask > 0).float(), 11, stride=1, padding=5)  # as far as SSIM's windows extend
    figures = evaluate(source.frames, green.frames, mask=grown, truth=green.frames).figures
    assert figures["PSNR outside the mask"].value == math.inf
    assert figures["SSIM outside the mask"].value == pytest.approx(1)
    assert figures["PSNR inside the mask"].value < figures["PSNR to source"].value < 20
    assert figures["PSNR to truth"].value == math.inf
    assert figures["IoU of what changed, with truth"].value == 1
    assert len(figures["PSNR to source"].by_frame) == FRAMES


def test_the_share_of_the_change_inside_the_mask_and_the_largest_outside(source):
    """Known changes: 0.4 on 100 pixels inside, 0.1 on 200 outside, one of them by 0.2; a feather is neither."""
    mask = torch.zeros(FRAMES, 64, 64)
    mask[:, :10, :10], mask[:, 10, :10] = 1, 0.5
    edited = torch.full_like(source.frames, 0.2)
    original = edited.clone()
    edited[1, :, :10, :10] += 0.4
    edited[1, :, 20:30, 20:40] += 0.1
    edited[1, :, 20, 20] += 0.1
    edited[1, 0, 10, 0] += 0.6
    figures = evaluate(original, edited, mask=mask).figures
    change = 100 * 0.4 + 200 * 0.1 + 0.1 + 0.2
    share, largest = figures["share of the change inside the mask"], figures["largest change outside the mask"]
    assert share.value == pytest.approx((100 * 0.4 + 0.5 * 0.2) / change, rel=1e-4)
    assert share.by_frame[1] == pytest.approx(share.value) and math.isnan(share.by_frame[0])
    assert largest.value == pytest.approx(0.2 * 255, rel=1e-4) and largest.by_frame[0] == 0
    everywhere = evaluate(original, edited, mask=torch.ones(1, 64, 64)).figures
    assert everywhere["share of the change inside the mask"].value == pytest.approx(1)
    assert "largest change outside the mask" not in everywhere
    assert math.isnan(evaluate(original, original, mask=mask).figures["share of the change inside the mask"].value)


def test_changing_the_wrong_thing_lowers_the_figures(source, green):
    other = render(Scene.parse("a red square on grass"), MOTION, FRAMES)
    figures = evaluate(source.frames, other.frames, mask=(source.mask > 0).float(), truth=green.frames).figures
    assert figures["PSNR outside the mask"].value < 20
    assert figures["IoU of what changed, with truth"].value < 0.1


def test_a_mask_that_misses_some_frames(source, green):
    mask = torch.zeros(FRAMES, 64, 64)
    mask[2, 20:40, 20:40] = 1
    figures = evaluate(source.frames, green.frames, mask=mask).figures
    inside = figures["PSNR inside the mask"]
    assert math.isfinite(inside.value) and math.isfinite(inside.by_frame[2]) and math.isnan(inside.by_frame[0])
    whole = evaluate(source.frames, green.frames, mask=torch.ones(1, 64, 64)).figures
    assert "PSNR outside the mask" not in whole


def test_clip_scores_of_a_whole_clip_of_transformers(source, green, clip_folder):
    clip = ClipScorer.load(str(clip_folder))
    assert clip.images(source.frames).shape == (FRAMES, 16)
    assert clip.images(source.frames, batch=3) == pytest.approx(clip.images(source.frames), abs=1e-5)
    still = source.frames[:1].expand(3, -1, -1, -1)
    assert evaluate(still, still, clip=clip).figures["Tem-Con"].value == pytest.approx(1)
    prompts = ("a red square on water", "a green square on water")
    figures = evaluate(source.frames, green.frames, clip=clip, prompts=prompts).figures
    images, before, after = clip.images(green.frames), clip.text(prompts[0]), clip.text(prompts[1])
    assert figures["Frame-Acc"].value == pytest.approx((images @ after >= images @ before).float().mean().item())
    assert figures["CLIP to target prompt"].value == pytest.approx((images @ after).mean().item())
    consecutive = [(images[t] @ images[t + 1]).item() for t in range(FRAMES - 1)]
    assert figures["Tem-Con"].value == pytest.approx(sum(consecutive) / len(consecutive))


def test_clip_embeddings_equal_transformers(source, clip_folder):
    """Equal to the model's own forward pass on its processor's output."""
    clip = ClipScorer.load(str(clip_folder))
    picture = Image.fromarray((source.frames[0].permute(1, 2, 0) * 255).round().byte().numpy())
    inputs = clip.processor(text=["a red square"], images=[picture], return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**inputs)
    assert torch.allclose(clip.images(source.frames[:1]), output.image_embeds, atol=1e-5)
    assert torch.allclose(clip.text("a red square"), output.text_embeds[0], atol=1e-5)


def test_another_kind_of_model_is_refused():
    with pytest.raises(ValueError, match="CLIP model"):
        ClipScorer.load(str(DEMO / "text_encoder"))


def test_bad_input_is_named(source, green):
    frames = source.frames
    with pytest.raises(ValueError, match="edited has shape"):
        evaluate(frames, green.frames[:4])
    with pytest.raises(ValueError, match="truth has shape"):
        evaluate(frames, frames, truth=frames[..., :32])
    with pytest.raises(ValueError, match=r"mask has shape .* must be \(8 or 1, 64, 64\)"):
        evaluate(frames, frames, mask=torch.ones(3, 64, 64))
    with pytest.raises(ValueError, match=r"flow \(backward\) has shape"):
        evaluate(frames, frames, flow=(source.flow, source.flow[:2]))
    with pytest.raises(ValueError, match="NaN"):
        evaluate(frames, frames * math.nan)


def test_everything_occluded_is_reported_as_undefined(source):
    far = torch.full_like(source.flow, 500.0)
    report = evaluate(source.frames, source.frames, flow=(far, far))
    assert math.isnan(report.figures["warp error"].value)
    assert "warp error                undefined" in str(report)


def test_the_plot_has_a_panel_for_each_kind_of_figure(source, green):
    flow = (source.flow, -source.flow)
    report = evaluate(source.frames, green.frames, mask=(source.mask > 0).float(), flow=flow)
    plot = plot_report(report, width=600, panel=150)
    assert plot.dtype == torch.uint8
    assert plot.shape == (750, 600, 3), "PSNR, SSIM, change in and outside the mask, warp error"
    assert plot.float().std() > 10
    with pytest.raises(ValueError, match="no figure"):
        plot_report(Report())


def test_small_differences_look_small():
    low, high = _limits([13.16, 13.24], 5.0)
    assert low < 13.16 and high > 13.24 and high - low > 5
    assert _limits([0.07, 0.41], 1.0)[0] == 0
    assert _limits([10.0, math.inf, 30.0], 5.0) == pytest.approx((9.0, 31.0))
