"""Nodes of "another pack", installed with ours on the test host: small flow models, and FlowEdit as a plain loop.

The host loads this file as a pack of its own, independent of the tests.
"""

import gc
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import comfy.model_sampling
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent))  # of the tests
from pack_parts import node, patcher_of, random_model, random_values

try:
    from comfy.nested_tensor import NestedTensor
except ImportError:
    NestedTensor = None

WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 24, "ffn_dim": 24, "num_heads": 2, "num_layers": 1,
    "in_dim": 16, "out_dim": 16, "text_dim": 16,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": 16,
    "context_in_dim": 32, "hidden_size": 48, "mlp_ratio": 4.0, "num_heads": 3, "depth": 1, "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
if "txt_ids_dims" in getattr(FluxParams, "__dataclass_fields__", {}):
    FLUX["txt_ids_dims"] = []  # newer hosts
H3 = {
    "image_model": "minimax_h3", "hidden_size": 128, "num_layers": 2, "token_refiner_num_layers": 1,
    "num_attention_heads": 2, "attention_head_dim": 64, "ffn_hidden_size": 256, "text_dim": 64,
    "time_embed_hidden_size": 64, "time_embed_dim": 64, "rope_inv_freq_len": 8,
}  # fmt: skip
LTXAV = {
    "image_model": "ltxav", "num_layers": 2, "in_channels": 128, "num_attention_heads": 4, "attention_head_dim": 32,
    "cross_attention_dim": 128, "audio_num_attention_heads": 2, "audio_attention_head_dim": 32,
    "audio_cross_attention_dim": 64, "caption_channels": 3840, "caption_proj_before_connector": True,
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 1, "attention_head_dim": 24,
    "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (8, 8, 8),
}  # fmt: skip
Z_IMAGE = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 256, "n_layers": 1, "n_refiner_layers": 1,
    "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32, "axes_dims": [32, 48, 48], "axes_lens": [1, 64, 64],
    "qk_norm": True, "z_image_modulation": True, "rope_theta": 256.0, "time_scale": 1000.0,
    "ffn_dim_multiplier": 2.0,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "depth": 1,
    "pos_embed_max_size": 16, "num_patches": 256, "adm_in_channels": 2048, "input_size": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": 64}},
}  # fmt: skip
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 65, "out_channels": 32, "vec_in_dim": None, "context_in_dim": 32,
    "hidden_size": 48, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 0, "axes_dim": [8, 8, 8],
    "theta": 256, "patch_size": [1, 1, 1], "qkv_bias": True, "guidance_embed": False, "byt5": False, "meanflow": False,
    "use_cond_type_embedding": True, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
COSMOS = {
    "image_model": "cosmos_predict2", "in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
    "model_channels": 96, "num_blocks": 1, "num_heads": 2, "crossattn_emb_channels": 32, "max_img_h": 240,
    "max_img_w": 240, "max_frames": 128, "pos_emb_cls": "rope3d", "min_fps": 1, "max_fps": 30,
}  # fmt: skip
COSMOS_1 = {
    **{key: value for key, value in COSMOS.items() if key not in ("min_fps", "max_fps")}, "image_model": "cosmos",
    "block_config": "FA-CA-MLP", "block_x_format": "THWBD", "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
CLASSES = {
    "cosmos": ("CosmosT2IPredict2", COSMOS),
    "cosmos_1": ("CosmosT2V", COSMOS_1),
    "h3": ("MiniMaxH3", H3),
    "ltxav": ("LTXAV", LTXAV),
    "qwen": ("QwenImage", QWEN),
    "z_image": ("ZImage", Z_IMAGE),
    "flux": ("Flux", FLUX),
    "sd3": ("SD3", SD3),
    "hunyuan": ("HunyuanVideo15", HUNYUAN),
    "wan": ("WAN21_T2V", WAN),
    "wan_i2v": ("WAN21_I2V", {**WAN, "model_type": "i2v", "in_dim": 36}),
    "wan_vace": ("WAN21_Vace", {**WAN, "model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
    "wan_animate": ("WAN22_Animate", {**WAN, "model_type": "animate", "in_dim": 36, "num_layers": 5}),
}
TEXT = {
    "cosmos": 32,
    "cosmos_1": 32,
    "h3": 64,
    "ltxav": 192,
    "qwen": 32,
    "z_image": 32,
    "flux": 32,
    "sd3": 32,
    "hunyuan": 32,
}
SHAPES = {
    "h3": ((1, 24, 2, 4, 6), (1, 32, 2, 8)),
    "ltxav": ((1, 128, 3, 2, 3), (1, 8, 5, 16)),
    "qwen": ((1, 16, 1, 6, 8),),
    "z_image": ((2, 16, 6, 8),),
    "flux": ((2, 16, 6, 8),),
    "sd3": ((2, 16, 6, 8),),
    "hunyuan": ((1, 32, 3, 4, 6),),
}
CLIP = (1, 16, 3, 4, 6)
KIND = io.Combo.Input("kind", options=list(CLASSES))


@node("FlowModel", [KIND, io.Int.Input("seed", default=0)], [io.Model.Output()])
class FlowModel(io.ComfyNode):
    """A small model with random weights."""

    @classmethod
    def execute(cls, kind, seed=0):
        name, config = CLASSES[kind]
        config = getattr(comfy.supported_models, name)(dict(config))
        model = random_model(config, seed)
        if kind == "sd3":
            model.diffusion_model.pos_embed.copy_(random_values(seed, *model.diffusion_model.pos_embed.shape))
        if kind == "h3":
            model.diffusion_model.rope.inv_freq.copy_(1 / 10 ** torch.linspace(0, 3, 8))
        return io.NodeOutput(patcher_of(model))


@node("FlowText", [KIND, io.Int.Input("seed")], [io.Conditioning.Output()])
class FlowText(io.ComfyNode):
    """Random embeddings, with the extras of each kind of model."""

    @classmethod
    def execute(cls, kind, seed):
        more = {
            "flux": {"pooled_output": random_values(seed + 1, 1, 16), "guidance": 4.0},
            "qwen": {"reference_latents": [random_values(5, 1, 16, 1, 4, 4)]},
            "sd3": {"pooled_output": random_values(seed + 1, 1, 2048)},
            "hunyuan": {"pooled_output": random_values(seed + 1, 1, 768)},
            "wan_i2v": {
                "concat_latent_image": random_values(6, *CLIP),
                "concat_mask": torch.ones(1, 1, *CLIP[2:]),
            },
            "wan_animate": {
                "concat_latent_image": random_values(6, *CLIP),
                "concat_mask": torch.ones(1, 1, *CLIP[2:]),
                "pose_video_latent": random_values(seed + 1, 1, 16, 2, *CLIP[3:]),
            },
            "wan": {"context_latents": [random_values(6, *CLIP)]},
            "wan_vace": {
                "vace_frames": [random_values(6, 1, 32, *CLIP[2:])],
                "vace_mask": [torch.ones(1, 64, *CLIP[2:])],
                "vace_strength": [0.7],
            },
        }.get(kind, {})
        return io.NodeOutput([[random_values(seed, 1, 9, TEXT.get(kind, 16)), more]])


class Words:
    """A stand-in for CLIP: random embeddings of each text."""

    def __init__(self, kind):
        self.kind = kind

    def tokenize(self, text):
        return zlib.crc32(text.encode())

    def encode_from_tokens_scheduled(self, tokens):
        return FlowText.execute(self.kind, tokens % 1000)[0]


class Pixels:
    """A stand-in for a video or picture VAE: each latent is the mean colour of its pixels."""

    latent_dim = 3
    FACTS = {"h3": (24, 16, 17, 5), "ltxav": (128, 32, 8, 1), "qwen": (16, 8, 4, 1), "wan": (16, 8, 4, 1)}

    def __init__(self, kind):
        self.channels, self.size, self.frames, self.latents = self.FACTS[kind]
        self.downscale_index_formula = self.frames, self.size, self.size
        self.downscale_ratio = self.encoded, self.size, self.size
        self.upscale_ratio = self.decoded, self.size, self.size

    def encoded(self, frames):
        """The latents of frames; like the host's VAEs, it drops those that complete none."""
        if self.latents == 1:
            return (frames - 1) // self.frames + 1
        return 1 if frames == 1 else (frames - 5) // 17 * 5 + 2

    def decoded(self, latents):
        return (latents - 1) * self.frames + 1 if self.latents == 1 else max(1, (latents - 2) // 5 * 17 + 5)

    def spacial_compression_encode(self):
        return self.size

    def encode(self, pixels):
        size = (self.encoded(len(pixels)), pixels.shape[1] // self.size, pixels.shape[2] // self.size)
        small = torch.nn.functional.adaptive_avg_pool3d(pixels[None].movedim(-1, 1), size)
        return small.repeat(1, -(-self.channels // 3), 1, 1, 1)[:, : self.channels] - 0.5

    def decode(self, latents):
        size = (self.decoded(latents.shape[2]), *(self.size * side for side in latents.shape[3:]))
        return torch.nn.functional.interpolate(latents[:, :3], size).movedim(1, -1).sigmoid()


class Sound:
    """A stand-in for an audio VAE: each latent is the mean of its samples."""

    audio_sample_rate = 32000

    def __init__(self, kind):
        self.shape, self.samples = {"h3": ((32, 2, -1), 800), "ltxav": ((8, -1, 16), 1280)}[kind]
        self.first_stage_model = SimpleNamespace(output_sample_rate=self.audio_sample_rate)

    def encode(self, waveform):
        count = -(-waveform.shape[1] // self.samples)
        means = torch.nn.functional.adaptive_avg_pool1d(waveform.mean(-1)[:1], count)
        shape = [count if side < 0 else side for side in self.shape]
        return (means[:, None] if self.shape[-1] < 0 else means[..., None]).expand(1, *shape).contiguous()

    def decode(self, latent):
        count = latent.shape[1 + self.shape.index(-1)]
        return latent.mean().expand(1, count * self.samples, 2).tanh()


PARTS = [io.Model.Output(), io.Clip.Output(), io.Vae.Output(), io.Vae.Output("sound")]


@node("FlowLoader", [KIND], PARTS)
class FlowLoader(io.ComfyNode):
    """In place of file loaders: a small model with random weights, and stand-ins for CLIP and VAEs."""

    @classmethod
    def execute(cls, kind):
        sound = Sound(kind) if len(SHAPES[kind]) > 1 else None
        return io.NodeOutput(FlowModel.execute(kind)[0], Words(kind), Pixels(kind), sound)


@node("FlowLatent", [KIND, io.Int.Input("seed"), io.Int.Input("frames", default=0)], [io.Latent.Output()])
class FlowLatent(io.ComfyNode):
    """Random latents for a kind of model: a clip, pictures, or a clip with sound. frames: of the clip, 0 for a few."""

    @classmethod
    def execute(cls, kind, seed, frames=0):
        (*start, few, height, width), *sound = SHAPES.get(kind, (CLIP,))
        shapes = [(*start, frames or few, height, width), *sound]
        parts = [random_values(seed + i, *shape) for i, shape in enumerate(shapes)]
        return io.NodeOutput({"samples": parts[0] if len(parts) == 1 else NestedTensor(parts)})


@node("FlowStream", [io.Latent.Input("latent"), io.Int.Input("number")], [io.Latent.Output()])
class FlowStream(io.ComfyNode):
    """One stream of a latent, in a form that can be saved."""

    @classmethod
    def execute(cls, latent, number):
        samples = latent["samples"]
        return io.NodeOutput({"samples": samples.unbind()[number] if samples.is_nested else samples})


class Guider(comfy.samplers.CFGGuider):
    """A guider with the conditions of all branches."""


class Loop(comfy.samplers.Sampler):
    """FlowEdit's equations, in the host's space: a flow's, or with noise added to the clip."""

    def __init__(self, guidance, source_guidance, first, seed):
        self.settings = guidance, source_guidance, first, seed

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False):
        guidance, source_guidance, first, seed = self.settings
        clip = z = latent_image
        steps, options = len(sigmas) - 1, extra_args["model_options"]
        spread = isinstance(guider.inner_model.model_sampling, comfy.model_sampling.ModelSamplingContinuousEDM)
        shares = sigmas / (1 + sigmas) if spread else sigmas  # of noise

        def velocity(x, step, name, scale):
            sigma, share = sigmas[step], shares[step]
            conds = guider.conds["source_negative" if name == "source" else "negative"], guider.conds[name]
            scaled = x / (1 - share) if spread else x
            clean = comfy.samplers.sampling_function(
                guider.inner_model, scaled, sigma.expand(len(x)), *conds, scale, options, extra_args["seed"]
            )
            return (x - clean) / share

        for step in range(first, steps):
            here, there = shares[step], shares[step + 1]
            frames_first = clip.movedim(2, 0)[:, 0] if clip.ndim == 5 else clip
            eps = random_values(seed + 1_000_003 * (steps - step), *frames_first.shape)
            eps = eps.movedim(0, 1)[None] if clip.ndim == 5 else eps
            noisy = guider.inner_model.model_sampling.noise_scaling(sigmas[step], eps, clip)
            noisy = noisy * (1 - here) if spread else noisy
            to = velocity(z + noisy - clip, step, "positive", guidance)
            z = z + (there - here) * (to - velocity(noisy, step, "source", source_guidance))
        return z


LOOP = [
    io.Model.Input("model"), io.Conditioning.Input("source"), io.Conditioning.Input("positive"),
    io.Conditioning.Input("negative"), io.Latent.Input("latent"), io.Sigmas.Input("sigmas"),
    io.Float.Input("guidance"), io.Float.Input("source_guidance"), io.Int.Input("first"), io.Int.Input("seed"),
    io.Conditioning.Input("source_negative", optional=True),
]  # fmt: skip


@node("FlowLoop", LOOP, [io.Latent.Output()])
class FlowLoop(io.ComfyNode):
    """FlowEdit with the host's own guider. source_negative: for the source, unless it is that of the edit."""

    @classmethod
    def execute(
        cls, model, source, positive, negative, latent, sigmas, guidance, source_guidance, first, seed,
        source_negative=None,
    ):  # fmt: skip
        guider = Guider(model)
        prompts = {"positive": positive, "negative": negative, "source": source}
        guider.inner_set_conds(prompts | {"source_negative": source_negative or negative})
        samples = latent["samples"]
        sampler = Loop(guidance, source_guidance, first, seed)
        return io.NodeOutput({"samples": guider.sample(samples * 0, samples, sampler, sigmas, seed=0)})


# --- MiniMax H3 with given weights, and text by its own tokenizer --------------------------------


GIVEN = [
    io.String.Input("weights"), io.Float.Input("scale", default=1.0), io.String.Input("dtype", default="float32"),
]  # fmt: skip


@node("JointModel", GIVEN, PARTS[:3])
class JointModel(io.ComfyNode):
    """H3 with the weights of a file, its tokenizer with random embeddings, and a stand-in for its VAE."""

    @classmethod
    def execute(cls, weights, scale=1.0, dtype="float32"):
        tensors = load_file(weights)
        blocks = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        config = comfy.supported_models.MiniMaxH3({**H3, "num_layers": blocks})
        config.set_inference_dtype(getattr(torch, dtype), None)
        model = config.get_model({})
        model.diffusion_model.load_state_dict(tensors)
        for parameter in model.diffusion_model.parameters():
            parameter.data *= scale
        return io.NodeOutput(patcher_of(model), JointWords(), Pixels("h3"))


class JointWords:
    """A stand-in for H3's CLIP: its tokenizer, and a random embedding of each token; pictures have four rows."""

    def __init__(self):
        from comfy.text_encoders.minimax import MiniMaxH3Tokenizer

        self.tokenizer = MiniMaxH3Tokenizer()

    def tokenize(self, text, **more):
        return self.tokenizer.tokenize_with_weights(text, **more)

    def encode_from_tokens_scheduled(self, tokens):
        rows, tags = [], []
        for token, _ in tokens["qwen3vl_32b"][0]:
            words = isinstance(token, int)
            rows.append(random_values(token if words else 7, 1 if words else 4, H3["text_dim"]))
            tags += [1] if words else [0] * 4
        return [[torch.cat(rows)[None], {"minimax_token_tags": torch.tensor(tags)}]]


@node("JointLoader", [KIND], PARTS)
class JointLoader(io.ComfyNode):
    """In place of file loaders: H3 with random weights, its tokenizer, and stand-ins for its VAEs."""

    @classmethod
    def execute(cls, kind):
        return io.NodeOutput(FlowModel.execute(kind)[0], JointWords(), Pixels(kind), Sound(kind))


@node("JointBlock", [io.Model.Input("model"), io.Float.Input("scale")], [io.Model.Output()])
class JointBlock(io.ComfyNode):
    """Multiplies the second block's residual by a number; the host's block changes its input in place."""

    @classmethod
    def execute(cls, model, scale):
        def block(args, extra):
            before = args["img"].clone()
            return {"img": before + scale * (extra["original_block"](args)["img"] - before)}

        patched = model.clone()
        patched.set_model_patch_replace(block, "dit", "double_block", 1)
        return io.NodeOutput(patched)


@node("JointRecords", [io.Model.Input("model")], [io.Model.Output()])
class JointRecords(io.ComfyNode):
    """Fails where the queries and keys of more than one layer exist when a block begins."""

    @classmethod
    def execute(cls, model):
        def block(args, extra):
            records = [type(one).__name__ for one in gc.get_objects() if type(one).__name__ == "QueriesKeys"]
            assert len(records) <= 1, records
            return extra["original_block"](args)

        patched = model.clone()
        patched.set_model_patch_replace(block, "dit", "double_block", 1)
        patched.set_model_patch_replace(block, "dit", "double_block", 2)
        return io.NodeOutput(patched)


LATENT = [
    io.Int.Input("seed"), io.String.Input("video"), io.Int.Input("sound"), io.String.Input("part", default=""),
    io.String.Input("sound_part", default=""),
]  # fmt: skip


@node("JointLatent", LATENT, [io.Latent.Output()])
class JointLatent(io.ComfyNode):
    """Random latents of a video, by its shape, and of a sound; or a part of both, such as 3:5."""

    @classmethod
    def execute(cls, seed, video, sound, part="", sound_part=""):
        shapes = tuple(map(int, video.split(","))), (1, 32, 2, sound)
        video, sound = (random_values(seed + i, *shape) for i, shape in enumerate(shapes))
        of_video, of_sound = (slice(*map(int, own.split(":"))) if own else slice(None) for own in (part, sound_part))
        return io.NodeOutput({"samples": NestedTensor([video[:, :, of_video], sound[..., of_sound]])})


class Flows(ComfyExtension):
    async def get_node_list(self):
        joint = [JointModel, JointLoader, JointBlock, JointRecords, JointLatent]
        return [FlowModel, FlowLoader, FlowText, FlowLatent, FlowStream, FlowLoop, *joint]


async def comfy_entrypoint():
    return Flows()
