"""Nodes of "another pack", installed with ours on the test host: real models, and patches to combine with.

The host loads this file as a pack of its own, independent of the tests.
"""

import json
import sys
from pathlib import Path

import comfy.cli_args
import comfy.gligen
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parent))  # of the tests
from pack_parts import loaded, node, patcher_of, random_model

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "num_head_channels": 64,
    "num_heads": -1,
    "legacy": False,
    "context_dim": 64,
    "adm_in_channels": None,
}
SDXL = {
    "transformer_depth": [0, 2],
    "transformer_depth_output": [2, 2, 0, 0],
    "transformer_depth_middle": 2,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "vec_in_dim": 16,
    "context_in_dim": 32,
    "hidden_size": 48,
    "mlp_ratio": 4.0,
    "num_heads": 3,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": True,
}
if "txt_ids_dims" in getattr(FluxParams, "__dataclass_fields__", {}):
    FLUX["txt_ids_dims"] = []  # newer hosts
WAN_I2V = {
    "image_model": "wan2.1", "model_type": "i2v", "dim": 24, "ffn_dim": 24, "num_heads": 2, "num_layers": 1,
    "in_dim": 36, "out_dim": 16, "text_dim": 16,
}  # fmt: skip
V_PREDICTION = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": torch.tensor([-1.0, 1.0])}
"""The weight by which the host recognises that an SD 2.x predicts v."""


def patcher_of_kind(kind):
    known = comfy.supported_models
    config, mark = {
        "sd2": (known.SD20(UNET), {}),
        "sd2_v": (known.SD20(UNET), V_PREDICTION),
        "sdxl": (known.SDXL({**UNET, **SDXL}), {}),
        "flux": (known.Flux(FLUX), {}),
        "wan_i2v": (known.WAN21_I2V(WAN_I2V), {}),
        "wan_vace": (
            known.WAN21_Vace({**WAN_I2V, "model_type": "vace", "in_dim": 16, "vace_layers": 1, "vace_in_dim": 8}),
            {},
        ),
    }[kind]
    return patcher_of(random_model(config, weights=mark))


KIND = io.Combo.Input("kind", options=["sd2", "sd2_v", "sdxl", "flux", "wan_i2v", "wan_vace"])


@node("OtherRandomModel", [KIND], [io.Model.Output()])
class RandomModel(io.ComfyNode):
    """A small model with random weights."""

    @classmethod
    def execute(cls, kind):
        return io.NodeOutput(patcher_of_kind(kind))


@node("OtherConditioning", [io.Int.Input("seed"), io.Boolean.Input("pooled")], [io.Conditioning.Output()])
class Conditioning(io.ComfyNode):
    """Random embeddings of 77 tokens, with SDXL's pooled embeddings."""

    @classmethod
    def execute(cls, seed, pooled):
        generator = torch.Generator().manual_seed(seed)
        more = {"pooled_output": torch.randn(1, 1280, generator=generator), "width": 64, "height": 64}
        return io.NodeOutput([[torch.randn(1, 77, 64, generator=generator), more if pooled else {}]])


@node("OtherLines", [io.String.Input("text")], [io.String.Output(is_output_list=True)])
class Lines(io.ComfyNode):
    """A list of strings, as nodes for prompt batches return it."""

    @classmethod
    def execute(cls, text):
        return io.NodeOutput(text.split("\n"))


@node("OtherDemoModel", [io.Combo.Input("dtype", options=["fp16", "bf16", "fp8_e4m3fn"])], [io.Model.Output()])
class DemoModel(io.ComfyNode):
    """The demo model as the host loads it with an option for another UNet precision."""

    @classmethod
    def execute(cls, dtype):
        pack = loaded("fatezero-video.hosts.comfyui.demo")
        setattr(comfy.cli_args.args, f"{dtype}_unet", True)
        try:
            return io.NodeOutput(pack.load_demo()[0])
        finally:
            setattr(comfy.cli_args.args, f"{dtype}_unet", False)


SCALE = [io.Model.Input("model"), io.Float.Input("scale", min=-10)]
SCALED = ["scaled_fp8"] if hasattr(comfy.ops, "mixed_precision_ops") else []
"""Quantized layers, of newer hosts."""
WAN = [
    io.String.Input("folder"),
    io.Float.Input("shift"),
    io.Combo.Input("dtype", options=["fp32", "bf16", "fp8_e4m3fn", *SCALED], default="fp32"),
]


@node("OtherWan", WAN, [io.Model.Output(), io.Clip.Output()])
class Wan(io.ComfyNode):
    """The transformer and text encoder of a Wan folder of diffusers', in a precision."""

    @classmethod
    def execute(cls, folder, shift, dtype):
        pack = loaded("fatezero-video.hosts.comfyui.demo_video")
        folder = Path(folder)
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        about = json.loads((folder / "transformer" / "config.json").read_text())
        setattr(comfy.cli_args.args, f"{dtype}_unet", True)
        try:
            model = pack.wan_model(weights, about, shift)
        finally:
            setattr(comfy.cli_args.args, f"{dtype}_unet", False)
        if dtype == "scaled_fp8":
            quantize(model.model.diffusion_model.blocks)
        return io.NodeOutput(model, pack.wan_clip(folder))


def quantize(blocks):
    """Replace the attention layers' weights by values in 8 bits and their scale, as in the host's own checkpoints."""
    kind = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    layers = comfy.ops.mixed_precision_ops({}, torch.float32)
    for name, layer in [*blocks.named_modules()]:
        if name.endswith((".q", ".k", ".v", ".o")):
            of_layer = layers.Linear(layer.in_features, layer.out_features)
            scale = layer.weight.abs().max() / 448
            weight = {"weight": (layer.weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
            of_layer.load_state_dict({**weight, "bias": layer.bias, "comfy_quant": kind})
            blocks.set_submodule(name, of_layer)


@node("OtherAttention", SCALE, [io.Model.Output()])
class Attention(io.ComfyNode):
    """Every attention output times a number, by an override as of packs with other kernels."""

    @classmethod
    def execute(cls, model, scale):
        patched = model.clone()
        options = patched.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda func, *args, **kwargs: scale * func(*args, **kwargs)
        return io.NodeOutput(patched)


@node("OtherCompiler", SCALE, [io.Model.Output()])
class Compiler(io.ComfyNode):
    """Every attention output times a number in calls whose memory the host may plan, as newer hosts do on GPUs."""

    @classmethod
    def execute(cls, model, scale):
        args = comfy.cli_args.args
        vars(args).setdefault("disable_comfy_compiler", False)  # older hosts

        def override(func, *given, **named):
            return (1 if args.disable_comfy_compiler else scale) * func(*given, **named)

        patched = model.clone()
        patched.model_options["transformer_options"]["optimized_attention_override"] = override
        return io.NodeOutput(patched)


@node("OtherSparseAttention", SCALE, [io.Model.Output()])
class SparseAttention(io.ComfyNode):
    """Self-attention times a number, by an override that is set again in each step, as by the host's Model Sparse
    Attention: it wraps the current override and delegates everything else to it."""

    @classmethod
    def execute(cls, model, scale):
        own = set()

        def lay(options):
            before = options.get("optimized_attention_override")

            def override(func, q, k, *rest, **more):
                if q.shape == k.shape:
                    return scale * func(q, k, *rest, **more)
                return func(q, k, *rest, **more) if before is None else before(func, q, k, *rest, **more)

            if before not in own:
                own.add(override)
                options["optimized_attention_override"] = override

        patched = model.clone()
        patched.add_callback_with_key(
            comfy.patcher_extension.CallbacksMP.ON_PREPARE_STATE,
            "sparse",
            lambda patcher, timestep, model_options, *more: lay(model_options["transformer_options"]),
        )
        return io.NodeOutput(patched)


@node("OtherSkip", [io.Model.Input("model")], [io.Model.Output()])
class SkipBlock(io.ComfyNode):
    """Skips the second block, or the middle block's self-attention of a UNet, after the first steps."""

    @classmethod
    def execute(cls, model):
        def skip(args, *rest):
            return args

        def lay(patcher, timestep, model_options, *more):
            for at in (("dit", "double_block", 1), ("attn1", "middle", 0)):
                comfy.model_patcher.set_model_options_patch_replace(model_options, skip, *at)

        patched = model.clone()
        patched.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_PREPARE_STATE, "skip", lay)
        return io.NodeOutput(patched)


@node("OtherNegativeAgain", [io.Model.Input("model")], [io.Model.Output()])
class NegativeAgain(io.ComfyNode):
    """Adds a hundred times the difference of two evaluations of the negative, which is zero."""

    @classmethod
    def execute(cls, model):
        def again(args):
            given = (args["model"], [args["uncond"]], args["input"], args["sigma"], args["model_options"])
            return args["denoised"] + 100 * (comfy.samplers.calc_cond_batch(*given)[0] - args["uncond_denoised"])

        patched = model.clone()
        patched.set_model_sampler_post_cfg_function(again)
        return io.NodeOutput(patched)


@node("OtherBlock", SCALE, [io.Model.Output()])
class Block(io.ComfyNode):
    """Multiplies the second block's residual by a number, by replacing the block."""

    @classmethod
    def execute(cls, model, scale):
        def block(args, extra):
            before = args["img"]
            return {"img": before + scale * (extra["original_block"](args)["img"] - before)}

        patched = model.clone()
        patched.set_model_patch_replace(block, "dit", "double_block", 1)
        return io.NodeOutput(patched)


@node("OtherLatent", [io.Int.Input("seed"), io.String.Input("shape")], [io.Latent.Output()])
class Latent(io.ComfyNode):
    """Random latents of a shape, given as numbers with commas."""

    @classmethod
    def execute(cls, seed, shape):
        generator = torch.Generator().manual_seed(seed)
        return io.NodeOutput({"samples": torch.randn([int(n) for n in shape.split(",")], generator=generator)})


class _Given:
    """A NOISE of given values."""

    seed = 0

    def __init__(self, samples):
        self.samples = samples

    def generate_noise(self, latent):
        return self.samples


@node("OtherLatentNoise", [io.Model.Input("model"), io.Latent.Input("latent")], [io.Noise.Output(), io.Latent.Output()])
class LatentNoise(io.ComfyNode):
    """A latent as NOISE for a flow that starts at sigma 1, and an empty latent to add it to."""

    @classmethod
    def execute(cls, model, latent):
        noise = _Given(model.model.process_latent_in(latent["samples"].clone()))
        return io.NodeOutput(noise, {"samples": torch.zeros_like(latent["samples"])})


@node("OtherAttn2", SCALE, [io.Model.Output()])
class Attn2(io.ComfyNode):
    """Cross-attention of the middle block times a number, replaced as by IPAdapter packs."""

    @classmethod
    def execute(cls, model, scale):
        def attend(q, k, v, extra_options, mask=None):
            return scale * optimized_attention(q, k, v, extra_options["n_heads"])

        patched = model.clone()
        patched.set_model_attn2_replace(attend, "middle", 0)
        return io.NodeOutput(patched)


@node("OtherAttn2Output", SCALE, [io.Model.Output()])
class Attn2Output(io.ComfyNode):
    """The output of every cross-attention times a number, by a `patches` entry."""

    @classmethod
    def execute(cls, model, scale):
        patched = model.clone()
        patched.set_model_attn2_output_patch(lambda n, extra_options: n * scale)
        return io.NodeOutput(patched)


@node("OtherSeparateCalls", [io.Model.Input("model")], [io.Model.Output()])
class SeparateCalls(io.ComfyNode):
    """Conditional and unconditional in separate calls, as on a full GPU."""

    @classmethod
    def execute(cls, model):
        patched = model.clone()
        patched.add_object_patch("memory_required", lambda *_, **__: 1e30)
        return io.NodeOutput(patched)


@node(
    "OtherPredictions", [io.Model.Input("model"), io.Boolean.Input("around_calls", default=False)], [io.Model.Output()]
)
class Predictions(io.ComfyNode):
    """Multiplies every prediction; around_calls: also adds a wrapper around calls that changes nothing."""

    @classmethod
    def execute(cls, model, around_calls=False):
        patched = model.clone()
        more = lambda executor, *args, **kwargs: 1.1 * executor(*args, **kwargs)  # noqa: E731
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "other", more)
        if around_calls:
            patched.set_model_unet_function_wrapper(
                lambda call, args: call(args["input"], args["timestep"], **args["c"])
            )
        return io.NodeOutput(patched)


class _Offloading(comfy.model_patcher.ModelPatcher):
    """A model patcher that keeps weights offloaded: layers are loaded one by one, with LoRA applied."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, 0.1, force_patch_weights)


@node("OtherLowVram", [io.Model.Input("model")], [io.Model.Output()])
class LowVram(io.ComfyNode):
    """A model loaded as with --lowvram; a copy, because it must not be loaded elsewhere."""

    @classmethod
    def execute(cls, model):
        copied = model.clone()
        copied.__class__ = _Offloading
        return io.NodeOutput(copied)


@node("OtherHooks", [io.Model.Input("model")], [io.String.Output()], is_output_node=True)
class Hooks(io.ComfyNode):
    """Everything attached to a model: forward hooks, injected layers, and patches in its options."""

    @classmethod
    def fingerprint_inputs(cls, **_):
        return float("nan")

    @classmethod
    def execute(cls, model):
        modules = list(model.model.modules())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + isinstance(m, Motion) for m in modules)
        put = [(m, vars(m)["forward"]) for m in modules if "forward" in vars(m)]
        own = sum(getattr(forward, "__func__", None) is not type(m).forward for m, forward in put)  # not restored
        options = model.model_options["transformer_options"]
        wrappers = sorted(model.wrappers)
        text = f"{hooks} hooks, {own} forwards, options {sorted(options)}, wrappers {wrappers}"
        return io.NodeOutput(text, ui={"text": (text,)})


@node("OtherRamUsage", [io.Custom("ATTENTION_STORE").Input("store")], [io.String.Output()], is_output_node=True)
class RamUsage(io.ComfyNode):
    """The size of a store as read by the host's cache."""

    @classmethod
    def execute(cls, store):
        text = str(store.get_ram_usage())
        return io.NodeOutput(text, ui={"text": (text,)})


@node("OtherGligen", [io.Model.Input("model"), io.Conditioning.Input("positive")], [io.Conditioning.Output()])
class Gligen(io.ComfyNode):
    """A prompt with a box for an object, by a random GLIGEN that fits the model."""

    @classmethod
    def execute(cls, model, positive):
        torch.manual_seed(0)
        blocks = [b for b in model.model.diffusion_model.modules() if type(b).__name__ == "BasicTransformerBlock"]
        widths = [block.attn1.to_q.in_features for block in blocks]
        fusers = [comfy.gligen.GatedSelfAttentionDense(w, 768, max(1, w // 32), min(w, 32)) for w in widths]
        gligen = comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(64, 768), 64)
        for name, parameter in gligen.named_parameters():
            parameter.data = 0.2 * torch.randn(parameter.shape)
            if "alpha" in name:
                parameter.data.fill_(0.5)
        patcher = patcher_of(gligen.eval())
        box = (torch.randn(1, 64), 4, 4, 2, 2)
        return io.NodeOutput([[t, {**o, "gligen": ("position", patcher, [box])}] for t, o in positive])


@node("OtherOption", [io.Conditioning.Input("positive"), io.String.Input("name")], [io.Conditioning.Output()])
class Option(io.ComfyNode):
    """A prompt with an option that a node of the host or another pack may set."""

    @classmethod
    def execute(cls, positive, name):
        value = torch.zeros(1, 4, 8, 8)
        return io.NodeOutput([[t, {**o, name: value}] for t, o in positive])


@node("OtherGPUs", [io.Model.Input("model")], [io.Model.Output()])
class GPUs(io.ComfyNode):
    """A model with a copy for a second GPU, as returned by the host's MultiGPU node."""

    @classmethod
    def execute(cls, model):
        spread = model.clone()
        spread.set_additional_models("multigpu", [model.clone()])
        return io.NodeOutput(spread)


@node("OtherTextRows", [io.Model.Input("model")], [io.Model.Output()])
class TextRows(io.ComfyNode):
    """Counts the rows for which the middle block's cross-attention projects keys."""

    seen: set[int] = set()
    handle = None

    @classmethod
    def execute(cls, model):
        layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn2.to_k
        TextRows.seen.clear()
        TextRows.handle = layer.register_forward_hook(lambda module, args, output: TextRows.seen.add(len(args[0])))
        return io.NodeOutput(model)


@node("OtherTextRowsSeen", [io.Latent.Input("after")], [io.String.Output()], is_output_node=True)
class TextRowsSeen(io.ComfyNode):
    """The count of `OtherTextRows`."""

    @classmethod
    def execute(cls, after):
        TextRows.handle.remove()
        text = str(sorted(TextRows.seen))
        return io.NodeOutput(text, ui={"text": (text,)})


class Motion(torch.nn.Module):
    """A layer that mixes the frames of a call, as motion modules do."""

    def forward(self, x, branches):
        clips = x.unflatten(0, (branches, -1))
        return (clips + 0.5 * clips.roll(1, 1) - 0.5 * clips.mean(1, keepdim=True)).flatten(0, 1)


def inject(patcher):
    for block in patcher.model.diffusion_model.output_blocks:
        places = [i for i, layer in enumerate(block) if isinstance(layer, SpatialTransformer)]
        for place in places:
            block.insert(place + 1, Motion())


def eject(patcher):
    for block in patcher.model.diffusion_model.output_blocks:
        for place in [i for i, layer in enumerate(block) if isinstance(layer, Motion)][::-1]:
            block.pop(place)


@node("OtherMotion", [io.Model.Input("model")], [io.Model.Output()])
class OtherMotion(io.ComfyNode):
    """Layers that mix frames, injected when the model is loaded, as by AnimateDiff-Evolved."""

    @classmethod
    def execute(cls, model):
        moved = model.clone()
        moved.set_injections("other", [PatcherInjection(inject, eject)])
        meet = lambda layer, x, emb, context, options, *_, **__: layer(x, len(options["cond_or_uncond"]))  # noqa: E731
        moved.set_model_forward_timestep_embed_patch((Motion, meet))
        return io.NodeOutput(moved)


def prepare_outside(executor, *args, **more):
    """State for the inner wrappers, and a sampling function in place of the host's."""
    guider, own = executor.class_obj, comfy.samplers.sampling_function
    before = guider.model_options
    guider.model_options = comfy.model_patcher.create_model_options_clone(before)
    guider.model_options["transformer_options"]["other_state"] = {"ran": ["outer"], "frames": len(args[1])}

    def sampling_function(model, x, timestep, uncond, cond, cond_scale, model_options, seed=None):
        options = dict(model_options["transformer_options"])
        options["ad_params"] = {"full_length": options["other_state"]["frames"], "sub_idxs": None}
        return own(
            model, x, timestep, uncond, cond, cond_scale, {**model_options, "transformer_options": options}, seed
        )

    comfy.samplers.sampling_function = sampling_function
    try:
        return executor(*args, **more)
    finally:
        comfy.samplers.sampling_function, guider.model_options = own, before


def prepare(executor, model, shape, conds, *args, **more):
    more["model_options"]["transformer_options"]["other_state"]["ran"].append("prepare")
    return executor(model, shape, conds, *args, **more)


def prepare_sampler(executor, guider, sigmas, extra, *args, **more):
    extra["model_options"]["transformer_options"]["other_state"]["ran"].append("sampler")
    return executor(guider, sigmas, extra, *args, **more)


def windows_of(frames, length):
    """Windows that overlap by one frame."""
    starts = (
        sorted({min(start, frames - length) for start in range(0, frames - 1, length - 1)}) if length < frames else []
    )
    return [list(range(start, start + length)) for start in starts] or [list(range(frames))]


def in_windows(length):
    def wrapper(executor, model, conds, x, timestep, model_options):
        state, params = (model_options["transformer_options"][name] for name in ("other_state", "ad_params"))
        missing = {"outer", "prepare", "sampler"} - set(state["ran"])
        if missing or len(x) != state["frames"]:
            raise RuntimeError(f"wrappers that did not run: {missing}; {len(x)} frames of {state['frames']}")
        if length >= len(x):
            return executor(model, conds, x, timestep, model_options)
        results, counts = [torch.zeros_like(x) for _ in conds], torch.zeros(len(x), 1, 1, 1)
        for frames in windows_of(len(x), length):
            params["sub_idxs"] = frames
            parts = executor(model, conds, x[frames], timestep[frames], model_options)
            for result, part in zip(results, parts, strict=True):
                result[frames] += part
            counts[frames] += 1
        return [result / counts for result in results]

    return wrapper


@node("OtherWindows", [io.Model.Input("model"), io.Int.Input("length")], [io.Model.Output()])
class OtherWindows(io.ComfyNode):
    """Context windows inside calls of the model, with state prepared by wrappers of the sampling, as in
    AnimateDiff-Evolved; the frames of a call are published under this pack's name.
    """

    @classmethod
    def execute(cls, model, length):
        split = model.clone()
        kinds = (WrappersMP.OUTER_SAMPLE, WrappersMP.PREPARE_SAMPLING, WrappersMP.SAMPLER_SAMPLE)
        for kind, wrapper in zip(kinds, (prepare_outside, prepare, prepare_sampler), strict=True):
            split.add_wrapper_with_key(kind, "other", wrapper)
        split.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "other", in_windows(length))
        return io.NodeOutput(split)


@node("OtherTwice", [io.Model.Input("model")], [io.Model.Output()])
class OtherTwice(io.ComfyNode):
    """Samples, then samples again from the result, as FreeInit does."""

    @classmethod
    def execute(cls, model):
        def twice(executor, noise, latents, *args, **more):
            return executor(noise, executor(noise, latents, *args, **more), *args, **more)

        again = model.clone()
        again.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "other_twice", twice)
        return io.NodeOutput(again)


class OtherPack(ComfyExtension):
    async def get_node_list(self):
        return [
            RandomModel, Conditioning, DemoModel, Attn2, Attn2Output, SeparateCalls, LowVram, Hooks, RamUsage,
            Lines, TextRows, TextRowsSeen, Gligen, Option, GPUs, Wan, Latent, Attention, Block, SparseAttention,
            SkipBlock, NegativeAgain, LatentNoise, OtherMotion, OtherWindows, OtherTwice,
            Predictions, Compiler,
        ]  # fmt: skip


async def comfy_entrypoint():
    return OtherPack()
