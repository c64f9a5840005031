"""Nodes of "another pack", installed with ours on the test host: small LTX-2 models, their text and latents.

The host loads this file as a pack of its own, independent of the tests.
"""

import io as streams
import json
import re
import sys
from pathlib import Path

import comfy.latent_formats
import comfy.supported_models
import sentencepiece
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent))  # of the tests
from pack_parts import loaded, node, patcher_of, random_model, random_values

try:
    from comfy.nested_tensor import NestedTensor
    from comfy.text_encoders.lt import LTXAVGemmaTokenizer
except ImportError:
    NestedTensor = LTXAVGemmaTokenizer = None

SMALL = {
    "image_model": "ltxav", "num_layers": 3, "in_channels": 128, "num_attention_heads": 4, "attention_head_dim": 32,
    "cross_attention_dim": 128, "audio_num_attention_heads": 2, "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64, "caption_channels": 3840, "caption_proj_before_connector": True,
    "caption_projection_first_linear": False, "connector_num_attention_heads": 4, "connector_attention_head_dim": 32,
    "audio_connector_num_attention_heads": 2, "audio_connector_attention_head_dim": 32,
}  # fmt: skip
"""LTX-2.3's way of text: a projection for each stream in the text encoder, and connectors with registers."""
ADALN = {"cross_attention_adaln": True, "apply_gated_attention": True, "rope_type": "split"}
NAMES = (
    ("proj_in", "patchify_proj"), ("audio_proj_in", "audio_patchify_proj"), ("time_embed", "adaln_single"),
    ("audio_time_embed", "audio_adaln_single"), ("prompt_adaln", "prompt_adaln_single"),
    ("audio_prompt_adaln", "audio_prompt_adaln_single"),
    ("av_cross_attn_video_scale_shift", "av_ca_video_scale_shift_adaln_single"),
    ("av_cross_attn_audio_scale_shift", "av_ca_audio_scale_shift_adaln_single"),
    ("av_cross_attn_video_a2v_gate", "av_ca_a2v_gate_adaln_single"),
    ("av_cross_attn_audio_v2a_gate", "av_ca_v2a_gate_adaln_single"),
    ("video_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_video"),
    ("audio_a2v_cross_attn_scale_shift_table", "scale_shift_table_a2v_ca_audio"),
    ("norm_q", "q_norm"), ("norm_k", "k_norm"),
)  # fmt: skip
"""The names of weights in diffusers and in the host."""


def gemma():
    """Gemma's tokenizer for LTX-2, with one token for each letter."""
    model = streams.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog, by night. "] * 9), model_writer=model,
        model_type="char", vocab_size=64, hard_vocab_limit=False, add_dummy_prefix=False, pad_id=0, eos_id=1, bos_id=2,
        unk_id=3, minloglevel=9,
    )  # fmt: skip
    return LTXAVGemmaTokenizer(tokenizer_data={"spiece_model": model.getvalue()})


class Text:
    """A stand-in for CLIP with Gemma's tokens. encode: the embeddings of a text and their options, from its tokens."""

    def __init__(self, encode):
        self.tokenizer, self.encode = gemma(), encode

    def tokenize(self, text):
        self.text = text
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, tokens):
        (row,) = tokens["gemma3_12b"]
        return [list(self.encode(self.text, [item[0] for item in row if item[0]]))]


def of_tokens(text, tokens):
    """Random embeddings of each token, that the connectors have yet to process."""
    return torch.cat([random_values(token, 1, 1, 192) for token in tokens], 1), {"unprocessed_ltxav_embeds": True}


def patcher(config, weights=None, seed=0, dtype=torch.float32):
    model = random_model(config, seed, dtype)
    if weights:
        missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert all("connector" in name or "audio" in name for name in missing), missing
    return patcher_of(model)


DTYPE = io.Combo.Input("dtype", options=["float32", "bfloat16"], default="float32")


@node("LTXModel", [io.Int.Input("seed", default=0), io.Boolean.Input("adaln", default=False), DTYPE],
      [io.Model.Output(), io.Clip.Output()])  # fmt: skip
class LTXModel(io.ComfyNode):
    """A small model with random weights, and its text."""

    @classmethod
    def execute(cls, seed=0, adaln=False, dtype="float32"):
        config = comfy.supported_models.LTXAV({**SMALL, **(ADALN if adaln else {})})
        return io.NodeOutput(patcher(config, seed=seed, dtype=getattr(torch, dtype)), Text(of_tokens))


@node("LTXLoader", [io.String.Input("kind")],
      [io.Model.Output(), io.Clip.Output(), io.Vae.Output(), io.Vae.Output("sound")])  # fmt: skip
class LTXLoader(io.ComfyNode):
    """In place of file loaders: the small model, its text, and the stand-ins for VAEs of the pack of flows."""

    @classmethod
    def execute(cls, kind):
        flows = loaded("flow_pack")
        return io.NodeOutput(*LTXModel.execute().result, flows.Pixels(kind), flows.Sound(kind))


class Latents(comfy.latent_formats.LTXAV):
    latent_channels = 8

    def __init__(self):
        super().__init__()
        self.latent_rgb_factors = [[0.1] * 3] * self.latent_channels


@node("LTXFolder", [io.String.Input("folder"), io.Float.Input("shift")], [io.Model.Output(), io.Clip.Output()])
class LTXFolder(io.ComfyNode):
    """The transformer of a folder of diffusers', with the embeddings of texts in its file `texts.safetensors`."""

    @classmethod
    def execute(cls, folder, shift):
        folder = Path(folder) / "transformer"
        about = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        same = (
            "num_layers", "in_channels", "num_attention_heads", "attention_head_dim", "cross_attention_dim",
            "audio_num_attention_heads", "audio_attention_head_dim", "audio_cross_attention_dim",
            "caption_channels", "rope_type",
        )  # fmt: skip
        config = comfy.supported_models.LTXAV({
            "image_model": "ltxav", **{name: about[name] for name in same}, "use_middle_indices_grid": True,
            "causal_temporal_positioning": True, "frequencies_precision": "float64",
            "cross_attention_adaln": about["cross_attn_mod"], "apply_gated_attention": about["gated_attn"],
            "connector_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_layers": 1,
            "caption_proj_before_connector": not about["use_prompt_embeddings"],
            "caption_projection_first_linear": about["use_prompt_embeddings"],
        })  # fmt: skip
        config.latent_format = Latents()
        config.sampling_settings = {"shift": shift}
        own = {renamed(name): weight for name, weight in weights.items() if not re.match("audio_proj_(in|out)", name)}
        model = patcher(config, own)  # the host's sound has another width, and there is none
        for block in model.model.diffusion_model.transformer_blocks:
            for layer in (block.attn1, block.attn2):
                layer.q_norm.eps = layer.k_norm.eps = about["norm_eps"]
        texts = load_file(folder.parent / "texts.safetensors")
        return io.NodeOutput(model, Text(lambda text, tokens: (texts[text], {"frame_rate": 8.0})))


def renamed(name):
    for theirs, ours in NAMES:
        name = re.sub(rf"(^|\.){theirs}(\.|$)", rf"\1{ours}\2", name)
    return name


@node("LTXLatent", [io.Int.Input("seed"), io.String.Input("shape"), io.Int.Input("sound", default=0)],
      [io.Latent.Output()])  # fmt: skip
class LTXLatent(io.ComfyNode):
    """Random latents of a clip, with some latents of sound."""

    @classmethod
    def execute(cls, seed, shape, sound=0):
        video = random_values(seed, *map(int, shape.split(",")))
        parts = [video, random_values(seed + 1, 1, 8, sound, 16)]
        return io.NodeOutput({"samples": NestedTensor(parts) if sound else video})


@node("LTXKeyframes", [io.Conditioning.Input("conditioning")], [io.Conditioning.Output()])
class LTXKeyframes(io.ComfyNode):
    """A prompt with the places of one guide's tokens, as of LTXV Add Guide."""

    @classmethod
    def execute(cls, conditioning):
        return io.NodeOutput(
            [[text, {**more, "keyframe_idxs": torch.zeros(1, 3, 6, 2)}] for text, more in conditioning]
        )


@node("LTXReference", [io.Conditioning.Input("conditioning"), io.Int.Input("seed")], [io.Conditioning.Output()])
class LTXReference(io.ComfyNode):
    """A prompt with a reference sound, as of LTXV Reference Audio."""

    @classmethod
    def execute(cls, conditioning, seed):
        sound = {"ref_audio": {"tokens": random_values(seed, 1, 3, 128)}}
        return io.NodeOutput([[text, {**more, **sound}] for text, more in conditioning])


class LTX(ComfyExtension):
    async def get_node_list(self):
        return [] if NestedTensor is None else [LTXModel, LTXLoader, LTXFolder, LTXLatent, LTXKeyframes, LTXReference]


async def comfy_entrypoint():
    return LTX()
