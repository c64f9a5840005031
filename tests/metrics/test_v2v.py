"""V2VBench's figures, compared with its authors' code and with their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from frame_models import viclip_weights, write_aesthetic, write_clip, write_dinov2
from safetensors.torch import save_file

from fatezero.benchmark.v2v_metrics import V2VMetrics, alignment, consistency, motion_alignment
from fatezero.metrics.clip import ClipScorer
from fatezero.metrics.frame_models import Aesthetic, DinoV2
from fatezero.metrics.viclip import load_viclip


@pytest.fixture(scope="module")
def frames():
    return torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    torch.manual_seed(0)
    return ClipScorer.load(str(write_clip(tmp_path_factory.mktemp("clip"))), local_files_only=True)


def test_viclip_is_that_of_the_authors_code(tmp_path):
    """Embeddings and similarity by VisionTransformer and CLIP_TEXT of awesome-diffusion-v2v with these weights."""
    save_file(viclip_weights(words=50), tmp_path / "viclip.safetensors")
    model = load_viclip(tmp_path / "viclip.safetensors")
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = [(torch.sin(x / 5 + f), torch.cos(y / 3 - f), torch.sin(x * y / 50 + f)) for f in range(4)]
    video, text = (
        model._video(torch.stack([torch.stack(w) for w in waves])),
        model._text(torch.tensor([48, 3, 7, 11, 2, 49])),
    )
    assert video[:3].tolist() == pytest.approx([0.1583303511, 0.0704888701, -0.0268925130], rel=1e-4)
    assert text[:3].tolist() == pytest.approx([0.1135013178, 0.1307534480, 0.1303086877], rel=1e-4)
    assert F.cosine_similarity(video, text, dim=0).item() == pytest.approx(0.0412034, rel=1e-3)


def test_viclip_chooses_frames_evenly(tmp_path, clip, frames):
    save_file(viclip_weights(words=len(clip.processor.tokenizer)), tmp_path / "viclip.safetensors")
    model = load_viclip(tmp_path / "viclip.safetensors")
    many = torch.cat([frames, frames.flip(0), frames.roll(1, -1), frames.roll(5, -2)])
    assert model.similarity(many, "a star", clip) == pytest.approx(
        model.similarity(many[::3], "a star", clip), abs=1e-6
    )
    assert model.similarity(many, "a star", clip) != model.similarity(many.flip(0), "a star", clip)
    assert math.isfinite(model.similarity(frames[:1], "a star " * 60, clip)), "a long prompt is cut to 32 tokens"


def test_viclip_refuses_other_weights_and_pictures(tmp_path, clip, frames):
    weights = viclip_weights(words=len(clip.processor.tokenizer), side=24)
    save_file(weights, tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="pictures of 24x24"):
        load_viclip(tmp_path / "small.safetensors").similarity(frames, "a star", clip)
    del weights["vision_encoder.transformer.resblocks.1.mlp.c_fc.bias"]
    save_file(weights, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="resblocks.1.mlp.c_fc.bias is missing"):
        load_viclip(tmp_path / "broken.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="does not contain ViCLIP"):
        load_viclip(tmp_path / "other.safetensors")


def test_consistency_is_that_of_consecutive_frames():
    right, up = torch.eye(2)
    assert consistency(torch.stack([right, right, up])) == pytest.approx(0.5)
    assert consistency(torch.stack([right, 3 * right, -right])) == pytest.approx(0.5), "each similarity is at least 0"
    assert math.isnan(consistency(right[None]))


def test_alignment_is_scaled_by_the_model_s_factor(clip, frames):
    cosines = F.cosine_similarity(clip.images(frames), clip.text("a star")[None])
    assert alignment(clip, frames, "a star") == pytest.approx(
        clip.model.logit_scale.exp().item() * cosines.mean().item(), rel=1e-5
    )


def test_motion_alignment_is_the_distance_of_the_flows():
    def estimate(a, b):
        return torch.stack([a[0] - b[0], a[1] - b[1]])

    source, edited = torch.zeros(3, 3, 4, 4), torch.zeros(3, 3, 4, 4)
    edited[1:, 0], edited[1:, 1] = 3, 4
    assert motion_alignment(estimate, source, edited) == pytest.approx(-(5 + 0) / 2)
    assert motion_alignment(estimate, edited, edited) == 0
    assert math.isnan(motion_alignment(estimate, source[:1], edited[:1]))


def test_the_aesthetic_predictor_is_linear_layers_on_a_normalized_embedding(tmp_path, frames):
    torch.manual_seed(0)
    model = Aesthetic.load(str(write_aesthetic(tmp_path / "aesthetic")), local_files_only=True)
    x = F.normalize(model.of_frames(frames, lambda pixels: model.model(pixel_values=pixels).image_embeds), dim=-1)
    state = model.model.layers.state_dict()
    for n in (0, 2, 4, 6, 7):
        x = x @ state[f"{n}.weight"].T + state[f"{n}.bias"]
    assert model.scores(frames).tolist() == pytest.approx(x[:, 0].tolist(), abs=1e-5)
    with pytest.raises(ValueError, match="not an aesthetic predictor"):
        Aesthetic.load(str(write_aesthetic(tmp_path / "other", layers=False)), local_files_only=True)


def test_figures_without_a_model_are_left_out_and_undefined_ones_none(tmp_path, clip, frames):
    assert V2VMetrics().measure(frames, frames, "a star") == {}
    dino = DinoV2.load(str(write_dinov2(tmp_path / "dino")), local_files_only=True)
    found = V2VMetrics(clip=clip, dino=dino).measure(frames, frames, "a star")
    assert set(found) == {"semantic", "text", "object"} and 0 < found["object"] <= 1
    one = V2VMetrics(clip=clip, dino=dino).measure(frames[:1], frames[:1], "a star")
    assert one["semantic"] is None and one["object"] is None and one["text"] is not None
    with pytest.raises(ValueError, match="give a DINOv2"):
        DinoV2.load(str(write_clip(tmp_path / "clip")), local_files_only=True)
