"""Facts of model families."""

import re

import pytest
import torch
from diffusers import WanTransformer3DModel

from fatezero.models.family import latent_frames
from fatezero.models.unet import clip_norms, feature_level
from fatezero.models.wan import begins_with_reference, original_name


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 2), (5, 2), (6, 3), (81, 21)])
def test_latents_of_a_clip(frames, latents):
    assert latent_frames(frames, 4) == latents
    assert latent_frames(frames, 1) == frames


def test_the_feature_is_from_the_first_level_with_attention_and_two_blocks():
    assert feature_level([(2, False), (1, True), (3, True), (3, True)]) == 2
    assert feature_level([(2, False), (1, True)]) is None


def test_clip_norm_is_for_group_norms():
    group, layer = torch.nn.GroupNorm(1, 2), torch.nn.LayerNorm(2)
    assert clip_norms([(group, layer)], group) == [group, group]


def test_every_diffusers_name_of_a_wan_transformer_is_converted():
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1,
        image_dim=8, added_kv_proj_dim=24,
    )  # fmt: skip
    names = [original_name(name) for name in model.state_dict()]
    assert len(set(names)) == len(names)
    assert {"blocks.0.self_attn.o.weight", "blocks.0.cross_attn.k_img.bias", "blocks.0.norm3.weight",
            "blocks.0.modulation", "head.modulation", "time_projection.1.weight"} <= set(names)  # fmt: skip
    assert not [name for name in names if re.search(r"attn\d|to_|condition_embedder\.t|scale_shift", name)]


def test_a_control_of_vace_that_begins_with_a_reference():
    clip = torch.randn(1, 2, 96, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    clip[:, :, 32:] = 1  # the mask
    assert not begins_with_reference(clip)
    kept = clip.clone()
    kept[:, :, 32:, 0] = 0
    assert not begins_with_reference(kept)
    kept[:, 1, 16:32, 0] = 0
    assert begins_with_reference(kept)
