"""Nodes of "another pack", installed with ours on the test host: small LTX-2 models, their text and latents.

The host loads this file as a pack of its own, independent of the tests.
"""

import io as streams
import json
import re
import sys
from itertools import chain, pairwise
from pathlib import Path

import comfy.latent_formats
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import sentencepiece
import torch
from comfy_api.latest import ComfyExtension, io
from comfy_extras.nodes_lt import LTXVAddGuide
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
SEED = 3
"""For FlowEdit's noise."""
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


LATENT = [
    io.Int.Input("seed"), io.String.Input("shape"), io.Int.Input("sound", default=0),
    io.String.Input("part", default=""), io.String.Input("sound_part", default=""),
]  # fmt: skip


@node("LTXLatent", LATENT, [io.Latent.Output()])
class LTXLatent(io.ComfyNode):
    """Random latents of a clip, with some latents of sound; or a part of both, such as 3:5."""

    @classmethod
    def execute(cls, seed, shape, sound=0, part="", sound_part=""):
        video = random_values(seed, *map(int, shape.split(",")))
        streams = zip([video, random_values(seed + 1, 1, 8, sound, 16)], (part, sound_part), strict=True)
        parts = [one[:, :, slice(*map(int, own.split(":")))] if own else one for one, own in streams]
        return io.NodeOutput({"samples": NestedTensor(parts) if sound else parts[0]})


FRAMES = [
    io.Latent.Input("latent"), io.String.Input("folder"), io.String.Input("what"), io.Float.Input("strength"),
    io.Conditioning.Input("source"), io.Conditioning.Input("positive"), io.Conditioning.Input("negative"),
]  # fmt: skip
PROMPTS = [io.Conditioning.Output(name) for name in ("source", "positive", "negative")]


@node("LTXFolderFrames", FRAMES, [io.Latent.Output(), *PROMPTS])
class LTXFolderFrames(io.ComfyNode):
    """A latent with the folder's first frame, as of Img To Video Inplace, or its other frames, as of Add Guide."""

    @classmethod
    def execute(cls, latent, folder, what, strength, source, positive, negative):
        samples = latent["samples"]
        mask = torch.ones(1, 1, samples.shape[2], 1, 1)
        given = load_file(Path(folder) / "frames.safetensors")[what]
        if what == "picture":
            samples, mask = samples.clone(), mask.clone()
            samples[:, :, 0], mask[:, :, 0] = given, 1 - strength
            return io.NodeOutput({"samples": samples, "noise_mask": mask}, source, positive, negative)
        add = LTXVAddGuide.append_keyframe
        scale, channels = (8, 32, 32), samples.shape[1]
        at, more = 9 if what == "guides" else 0, {"in_channels": channels}
        of_source, _, *_ = add(source, negative, at, samples, mask, given, strength, scale, **more)
        to, away, samples, mask = add(positive, negative, at, samples, mask, given, strength, scale, **more)
        return io.NodeOutput({"samples": samples, "noise_mask": mask}, of_source, to, away)


@node("LTXSmallGuides", [io.Int.Input("factor")], [io.Custom("IC_LORA_PARAMETERS").Output()])
class LTXSmallGuides(io.ComfyNode):
    """The parameters of an IC-LoRA with smaller guides, as of Get IC-LoRA Parameters."""

    @classmethod
    def execute(cls, factor):
        return io.NodeOutput({"reference_downscale_factor": factor})


@node("LTXReference", [io.Conditioning.Input("conditioning"), io.Int.Input("seed")], [io.Conditioning.Output()])
class LTXReference(io.ComfyNode):
    """A prompt with a reference sound, as of LTXV Reference Audio."""

    @classmethod
    def execute(cls, conditioning, seed):
        sound = {"ref_audio": {"tokens": random_values(seed, 1, 3, 128)}}
        return io.NodeOutput([[text, {**more, **sound}] for text, more in conditioning])


class Guider(comfy.samplers.CFGGuider):
    """A guider with the conditions of three branches."""


class Loop(comfy.samplers.Sampler):
    """An inversion and its edit, or FlowEdit (with `source_guidance`), each call with the host's own noise mask; with
    `fuse` the clip's self-attention takes the source's queries and keys. The guides, the last frames, are noised anew
    for each call. edited: the samples and noise mask of the edit's guides and clean frames.
    """

    def __init__(self, guidance, guides, fuse, edited, source_guidance):
        self.guidance, self.guides, self.fuse, self.edited = guidance, guides, fuse, edited
        self.source_guidance = source_guidance

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False):
        clip, of_edit = latent_image, [part.to(latent_image) for part in self.edited]
        of_source = clip, denoise_mask.clamp(min=0)
        frames, model, options = clip.shape[2] - self.guides, guider.inner_model, extra_args["model_options"]
        eps = random_values(0, *clip[:, :, frames:].shape)

        def seen(x, sigma, clip, mask):
            x = x.clone()
            x[:, :, frames:] = clip[:, :, frames:] + sigma * (eps - clip[:, :, frames:])
            return x * mask + clip * (1 - mask)

        def velocity(x, clean, sigma, clip, mask):
            return (x - (clean * mask + clip * (1 - mask))) / sigma

        def clean(name, x, sigma):
            x = seen(x, sigma, *(of_source if "source" in name else of_edit))
            return comfy.samplers.calc_cond_batch(model, [guider.conds[name]], x, sigma[None], options)[0]

        def fused(source, x, sigma):
            rows = torch.cat([seen(source, sigma, *of_source), seen(x, sigma, *of_edit)])
            one, two = (guider.conds[name][0]["model_conds"] for name in ("source", "positive"))
            inputs = {key: value.process_cond(1).concat([two[key].process_cond(1)]) for key, value in one.items()}
            inputs["transformer_options"] = {
                **options["transformer_options"],
                "optimized_attention_override": attention,
            }
            return model.apply_model(rows, sigma.expand(2), **inputs)[1:]

        def attention(func, q, k, v, heads, *rest, **more):
            of_video = q.shape[-1] == 128 and q.shape[1] >= tokens and k.shape[1] < 1024  # else it is to the text
            if not of_video:
                return func(q, k, v, heads, *rest, **more)
            found = func(q, k, v, heads, *rest, **more)
            keys = torch.cat([k[:1, :tokens], k[1:, tokens:]], 1)
            found[1:, :tokens] = func(q[:1, :tokens], keys, v[1:], heads, *rest, **more)
            return found

        def drawn(z, step, here, there):
            noise = random_values(SEED + 1_000_003 * (len(sigmas) - 1 - step), *clip[0, :, :frames].movedim(1, 0).shape)
            noisy = clip.clone()
            noisy[0, :, :frames] = here * noise.movedim(0, 1) + (1 - here) * clip[0, :, :frames]
            to, away = (clean(name, z + noisy - clip, here) for name in ("positive", "negative"))
            of, off = (clean(name, noisy, here) for name in ("source", "source's negative"))
            forward = velocity(z + noisy - clip, away + self.guidance * (to - away), here, *of_edit)
            back = velocity(noisy, off + self.source_guidance * (of - off), here, *of_source)
            return z + (there - here) * (forward - back)

        if self.source_guidance:
            z = clip
            for step, (here, there) in enumerate(pairwise(sigmas)):
                z = drawn(z, step, here, there)
            return z
        tokens, levels, x = frames * clip.shape[3] * clip.shape[4], [clip], clip
        rising = sigmas.flip(0)
        for here, there in pairwise(rising):
            x = x + (there - here) * velocity(x, clean("source", x, there), there, *of_source)
            levels.append(x)
        for level in range(len(sigmas) - 1, 0, -1):
            here, there, source = rising[level], rising[level - 1], levels[level - 1]
            to = fused(source, x, here) if self.fuse else clean("positive", x, here)
            away = clean("negative", x, here)
            x = x + (there - here) * velocity(x, away + self.guidance * (to - away), here, *of_edit)
        return x


LOOP = [
    io.Model.Input("model"), io.Conditioning.Input("source"), io.Conditioning.Input("positive"),
    io.Conditioning.Input("negative"), io.Latent.Input("latent"), io.Sigmas.Input("sigmas"),
    io.Float.Input("guidance"), io.Int.Input("guides"), io.Boolean.Input("fuse"),
    io.Latent.Input("edited", optional=True), io.Float.Input("source_guidance", default=0.0),
    io.Conditioning.Input("source_negative", optional=True),
]  # fmt: skip


def full_mask(latent):
    """The noise mask of a LATENT, of the size of its samples."""
    samples = latent["samples"]
    mask = latent.get("noise_mask", torch.ones_like(samples[:, :1]))
    return comfy.sampler_helpers.prepare_mask(mask, samples.shape, samples.device)


@node("LTXLoop", LOOP, [io.Latent.Output()])
class LTXLoop(io.ComfyNode):
    """Inversion and edit with the host's own guider and noise mask."""

    @classmethod
    def execute(
        cls, model, source, positive, negative, latent, sigmas, guidance, guides, fuse, edited=None,
        source_guidance=0.0, source_negative=None,
    ):  # fmt: skip
        guider, samples = Guider(model), latent["samples"]
        conds = {"positive": positive, "negative": negative, "source": source}
        conds["source's negative"] = source_negative or negative
        guider.inner_set_conds(conds)
        of_source, of_edit = (full_mask(one) for one in (latent, edited or latent))
        for entry in chain(guider.original_conds["positive"], guider.original_conds["negative"]):
            entry["denoise_mask"] = of_edit
        loop = Loop(guidance, guides, fuse, ((edited or latent)["samples"], of_edit.clamp(min=0)), source_guidance)
        done = guider.sample(samples * 0, samples, loop, sigmas, denoise_mask=of_source, seed=0)
        return io.NodeOutput({"samples": done})


class LTX(ComfyExtension):
    async def get_node_list(self):
        nodes = [LTXModel, LTXLoader, LTXFolder, LTXFolderFrames, LTXLatent, LTXSmallGuides, LTXReference, LTXLoop]
        return [] if NestedTensor is None else nodes


async def comfy_entrypoint():
    return LTX()
