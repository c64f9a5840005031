"""Nodes of "another pack", installed with ours on the test host: small Wan models with inputs besides text.

The host loads this file as a pack of its own, independent of the tests.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy.latent_formats
import comfy.samplers
import comfy.supported_models
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent))  # of the tests
from pack_parts import loaded, node, patcher_of, random_model, random_values

SMALL = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 24, "ffn_dim": 24, "num_heads": 2, "num_layers": 2,
    "in_dim": 16, "out_dim": 16, "text_dim": 16,
}  # fmt: skip
MODELS = {
    "bernini": ("WAN21_T2V", {}),
    "phantom": ("WAN21_T2V", {}),
    "i2v": ("WAN21_I2V", {"model_type": "i2v", "in_dim": 36}),
    "i2v_without_embedding": ("WAN21_I2V", {"in_dim": 36}),
    "fun": ("WAN21_FunControl2V", {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}),
    "fun_inpaint": ("WAN21_FunControl2V", {"in_dim": 52, "in_dim_ref_conv": 16}),
    "vace": ("WAN21_Vace", {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
    "vace_reference": ("WAN21_Vace", {"model_type": "vace", "vace_layers": 1, "vace_in_dim": 96}),
    "animate": ("WAN22_Animate", {"model_type": "animate", "in_dim": 36, "num_layers": 5}),
    "animate_faces": ("WAN22_Animate", {"model_type": "animate", "in_dim": 36, "num_layers": 5}),
    "camera": ("WAN21_Camera", {"model_type": "camera", "in_dim": 32}),
    "humo": ("WAN21_HuMo", {"model_type": "humo"}),
}
KIND = io.Combo.Input("kind", options=list(MODELS))


@node("WanKind", [KIND, io.Int.Input("seed", default=0)], [io.Model.Output()])
class WanKind(io.ComfyNode):
    """A small model with random weights."""

    @classmethod
    def execute(cls, kind, seed=0):
        return io.NodeOutput(small_model(kind, seed))


def small_model(kind, seed=0, **more):
    name, own = MODELS[kind]
    model = random_model(getattr(comfy.supported_models, name)({**SMALL, **own, **more}), seed)
    if kind == "animate_faces":  # of 64 x 64 pixels, for time
        del model.diffusion_model.motion_encoder.enc.net_app.convs[5:8]
    return patcher_of(model)


@node("WanLoader", [KIND], [io.Model.Output(), io.Clip.Output(), io.Vae.Output()])
class WanLoader(io.ComfyNode):
    """In place of file loaders: a small model with random weights, the demo's CLIP, and a stand-in for the VAE."""

    @classmethod
    def execute(cls, kind):
        demo = loaded("fatezero-video.hosts.comfyui.demo_video")
        clip = demo.wan_clip(demo.WAN.demo_folder)
        return io.NodeOutput(small_model(kind, text_dim=64), clip, loaded("flow_pack").Pixels("wan"))


@node("WanFolder", [io.String.Input("folder"), io.Float.Input("shift")], [io.Model.Output(), io.Clip.Output()])
class WanFolder(io.ComfyNode):
    """The transformer and text encoder of a Wan folder of diffusers' with other inputs."""

    @classmethod
    def execute(cls, folder, shift):
        folder = Path(folder)
        about = json.loads((folder / "transformer" / "config.json").read_text())
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        kind = "WAN21_Vace" if "vace_layers" in about else "WAN21_I2V"
        more = {} if kind == "WAN21_I2V" else {
            "model_type": "vace", "vace_layers": len(about["vace_layers"]), "vace_in_dim": about["vace_in_channels"]
        }  # fmt: skip
        config = getattr(comfy.supported_models, kind)({
            **SMALL, "dim": about["num_attention_heads"] * about["attention_head_dim"], "ffn_dim": about["ffn_dim"],
            "num_heads": about["num_attention_heads"], "num_layers": about["num_layers"],
            "in_dim": about["in_channels"], "freq_dim": about["freq_dim"], "eps": about["eps"], **more,
        })  # fmt: skip
        config.sampling_settings = {"shift": shift}
        config.set_inference_dtype(torch.float32, None)
        model, original = config.get_model({}), loaded("fatezero-video.models.wan").original_name
        model.diffusion_model.load_state_dict({renamed(original, name): weight for name, weight in weights.items()})
        clip = loaded("fatezero-video.hosts.comfyui.demo_video").wan_clip(folder)
        return io.NodeOutput(patcher_of(model), clip)


def renamed(original, name):
    """The name in the host of a weight of diffusers'."""
    if not name.startswith("vace_blocks."):
        return original(name)
    name = name.removeprefix("vace_").replace("proj_out", "after_proj").replace("proj_in", "before_proj")
    return "vace_" + original(name)


@node("WanFolderInputs", [io.Conditioning.Input("conditioning"), io.String.Input("folder")], [io.Conditioning.Output()])
class WanFolderInputs(io.ComfyNode):
    """A prompt with a larger effect, and the inputs of a folder's `inputs.safetensors`, in the model's scale."""

    @classmethod
    def execute(cls, conditioning, folder):
        inputs, latents = load_file(Path(folder) / "inputs.safetensors"), comfy.latent_formats.Wan21()
        if "picture" in inputs:
            mask, picture = inputs["picture"][:, :4], inputs["picture"][:, 4:]
            more = {"concat_latent_image": latents.process_out(picture), "concat_mask": 1 - mask}
        else:
            clips, mask = inputs["control"][:, :32].split(16, 1), inputs["control"][:, 32:]
            more = {"vace_frames": [torch.cat([latents.process_out(one) for one in clips], 1)], "vace_mask": [mask],
                    "vace_strength": [1.0]}  # fmt: skip
        return io.NodeOutput([[10 * text, {**own, **more}] for text, own in conditioning])


def inputs_of(kind, frames=3):
    """What the host's nodes for a kind of model set, for a clip of latent frames."""
    clip = (1, 16, frames, 4, 6)
    picture = {"concat_latent_image": random_values(6, *clip), "concat_mask": random_values(7, 1, 1, *clip[2:])}
    seen = {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=random_values(8, 1, 7, 1280))}
    reference = {"reference_latents": [random_values(9, 1, 16, 1, *clip[3:])]}
    control, mask = random_values(6, 1, 32, *clip[2:]), torch.ones(1, 64, *clip[2:])
    control[:, 16:, :1], mask[:, :, :1] = comfy.latent_formats.Wan21().process_out(torch.zeros(1, 16, 1, 4, 6)), 0
    posed = {**picture, **seen, "pose_video_latent": random_values(9, 1, 16, frames - 1, *clip[3:])}
    return {
        "bernini": {"context_latents": [random_values(6, *clip), random_values(7, 1, 16, 1, 6, 4)]},
        "phantom": {"time_dim_concat": random_values(6, 1, 16, 2, *clip[3:])},
        "i2v": picture | seen,
        "i2v_without_embedding": picture,
        "fun": {**seen, **reference, "concat_latent_image": random_values(6, 1, 32, *clip[2:])},
        "fun_inpaint": {
            **reference, "concat_latent_image": random_values(6, 1, 32, *clip[2:]),
            "concat_mask": random_values(7, 1, 4, *clip[2:]), "concat_mask_index": 16,
        },
        "vace": {
            "vace_frames": [random_values(6, 1, 32, *clip[2:]), random_values(7, 1, 32, *clip[2:])],
            "vace_mask": [torch.ones(1, 64, *clip[2:])] * 2, "vace_strength": [0.7, 0.4],
        },
        "vace_reference": {"vace_frames": [control], "vace_mask": [mask], "vace_strength": [1.0]},
        "animate": posed,
        "animate_faces": {**posed, "face_video_pixels": random_values(10, 1, 3, 4 * frames - 7, 64, 64)},
        "camera": {**picture, **seen, "camera_conditions": random_values(9, 1, 24, frames, 32, 48)},
        "humo": {},
    }[kind]  # fmt: skip


def part_of(name, value, start, stop):
    """Some latent frames of an input, the first of them without a pose."""
    if isinstance(value, list):
        return [part_of(name, one, start, stop) for one in value]
    if not isinstance(value, torch.Tensor) or value.shape[2] == 1 or name == "time_dim_concat":
        return value
    if name == "face_video_pixels":
        start, stop = 4 * start, 4 * (stop - 1)
    return value[:, :, start : stop - (name == "pose_video_latent")]


INPUTS = [
    io.Conditioning.Input("conditioning"), KIND, io.Int.Input("frames", default=3), io.Int.Input("start", default=0),
    io.Int.Input("stop", default=3), io.Float.Input("scale", default=1.0),
]  # fmt: skip


@node("WanInputs", INPUTS, [io.Conditioning.Output()])
class WanInputs(io.ComfyNode):
    """A prompt with a larger effect, and the inputs of a kind of model, for some frames of a clip.

    scale: of pictures and control videos.
    """

    @classmethod
    def execute(cls, conditioning, kind, frames=3, start=0, stop=3, scale=1.0):
        given = inputs_of(kind, frames)
        for name in {"concat_latent_image", "context_latents", "vace_frames"} & given.keys():
            own = given[name]
            given[name] = [scale * one for one in own] if isinstance(own, list) else scale * own
        if stop - start < frames:
            given = {name: part_of(name, value, start, stop) for name, value in given.items()}
        return io.NodeOutput([[10 * text, {**more, **given}] for text, more in conditioning])


class Guider(comfy.samplers.CFGGuider):
    """A guider with the conditions of two branches."""


class Fused(comfy.samplers.Sampler):
    """FlowEdit's equations without guidance, where the clip's tokens take the source's queries and keys."""

    def __init__(self, first_token, seed):
        self.first_token, self.seed = first_token, seed

    def sample(self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False):
        clip = z = latent_image
        tokens = clip.shape[2] * clip.shape[3] * clip.shape[4] // 4
        own, recorded = slice(self.first_token, self.first_token + tokens), []

        def record(func, q, k, v, *args, **named):
            if q.shape[1] == k.shape[1]:
                recorded.append((q[:, own], k[:, own]))
            return func(q, k, v, *args, **named)

        def replace(func, q, k, v, *args, **named):
            done = func(q, k, v, *args, **named)
            if q.shape[1] != k.shape[1]:
                return done
            queries, keys = recorded.pop(0)
            joined = torch.cat([k[:, : own.start], keys, k[:, own.stop :]], 1)
            done[:, own] = func(queries, joined, v, *args, **named)
            return done

        def velocity(x, sigma, name, override):
            options = extra_args["model_options"]
            own_options = {**options["transformer_options"], "optimized_attention_override": override}
            options = {**options, "transformer_options": own_options}
            conds = None, guider.conds[name]
            clean = comfy.samplers.sampling_function(
                guider.inner_model, x, sigma.expand(len(x)), *conds, 1.0, options, extra_args["seed"]
            )
            return (x - clean) / sigma

        steps = len(sigmas) - 1
        for step in range(steps):
            here, there = sigmas[step], sigmas[step + 1]
            eps = random_values(self.seed + 1_000_003 * (steps - step), *clip.movedim(2, 0)[:, 0].shape)
            noisy = here * eps.movedim(0, 1)[None] + (1 - here) * clip
            of_source = velocity(noisy, here, "source", record)
            z = z + (there - here) * (velocity(z + noisy - clip, here, "positive", replace) - of_source)
            assert not recorded
        return z


LOOP = [
    io.Model.Input("model"), io.Conditioning.Input("source"), io.Conditioning.Input("positive"),
    io.Latent.Input("latent"), io.Sigmas.Input("sigmas"), io.Int.Input("first_token"), io.Int.Input("seed"),
]  # fmt: skip


@node("WanFusedLoop", LOOP, [io.Latent.Output()])
class WanFusedLoop(io.ComfyNode):
    """FlowEdit with the source's attention, by the host's own guider; for models whose own blocks alone attend to as
    many keys as they have queries.
    """

    @classmethod
    def execute(cls, model, source, positive, latent, sigmas, first_token, seed):
        guider = Guider(model)
        guider.inner_set_conds({"positive": positive, "source": source})
        samples = latent["samples"]
        done = guider.sample(samples * 0, samples, Fused(first_token, seed), sigmas, seed=0)
        return io.NodeOutput({"samples": done})


class Wan(ComfyExtension):
    async def get_node_list(self):
        return [WanKind, WanLoader, WanFolder, WanFolderInputs, WanInputs, WanFusedLoop]


async def comfy_entrypoint():
    return Wan()
