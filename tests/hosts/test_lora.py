"""LoRAs and related formats: what they add to weights, and what is refused."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from fatezero.files.bundled import DEMO
from fatezero.files.lora import LoraFile
from fatezero.hosts.diffusers.checkpoint import Checkpoint, CheckpointError
from fatezero.hosts.diffusers.lora import LoraError, fuse_loras
from fatezero.hosts.diffusers.lora_changes import decomposed
from small import small_unet

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
SIDE = 8


def drawn(*shape):
    return 0.3 * torch.randn(*shape, dtype=torch.float64)


def small_wan(seed=0):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    return model.double().requires_grad_(False)


def difference(network, like, name):
    return network.get_parameter(name) - like.get_parameter(name)


def changed(network, like):
    theirs = dict(like.named_parameters())
    return {name for name, weight in network.named_parameters() if not torch.equal(weight, theirs[name])}


@pytest.fixture
def fused(tmp_path):
    """A small UNet with a LoRA file applied, and the report."""

    def of(tensors, strength=1.0, name="style.safetensors", network=None, **metadata):
        network = small_unet() if network is None else network
        save_file(tensors, tmp_path / name, metadata or None)
        kind = "unet" if hasattr(network, "down_blocks") else "transformer"
        (line,) = fuse_loras({kind: network}, [LoraFile(str(tmp_path / name), strength)])
        return network, line

    return of


# --- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [
        KOHYA,
        f"unet.{LAYER}",
        LAYER,
        f"base_model.model.{LAYER}",
        f"diffusion_model.{LAYER}",
        f"unet.base_model.model.{LAYER}",
        f"_orig_mod.{LAYER}",
        f"lycoris_{LAYER.replace('.', '_')}",
        "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    ],
)
def test_names_of_all_formats(fused, layer):
    up, down = drawn(SIDE, 2), drawn(2, SIDE)
    unet, line = fused({f"{layer}.lora_up.weight": up, f"{layer}.lora_down.weight": down}, 0.5)
    assert changed(unet, small_unet()) == {f"{LAYER}.weight"}
    assert torch.allclose(difference(unet, small_unet(), f"{LAYER}.weight"), 0.5 * (up @ down))
    assert line == "LoRA style.safetensors: 1 of 1 layers at strength 0.5 (1 in the UNet)"


def test_names_of_older_attention_processors(fused):
    place = LAYER.removesuffix(".to_q")
    tensors = {f"unet.{place}.processor.to_{n}_lora.{way}.weight": drawn(*((SIDE, 2) if way == "up" else (2, SIDE)))
               for n in ("q", "out") for way in ("up", "down")}  # fmt: skip
    unet, _ = fused(tensors)
    assert changed(unet, small_unet()) == {f"{place}.to_q.weight", f"{place}.to_out.0.weight"}


@pytest.mark.parametrize(
    ("original", "ours"),
    [
        ("blocks.1.self_attn.q", "blocks.1.attn1.to_q"),
        ("blocks.0.cross_attn.o", "blocks.0.attn2.to_out.0"),
        ("blocks.0.cross_attn.norm_k", "blocks.0.attn2.norm_k"),
        ("blocks.0.ffn.0", "blocks.0.ffn.net.0.proj"),
        ("blocks.0.ffn.2", "blocks.0.ffn.net.2"),
        ("blocks.0.norm3", "blocks.0.norm2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("head.head", "proj_out"),
    ],
)
def test_differences_of_wan_by_its_own_names(fused, original, ours):
    before = small_wan()
    change = drawn(*before.get_parameter(f"{ours}.weight").shape)
    for key in (
        f"diffusion_model.{original}.diff",
        f"transformer.{ours}.diff",
        f"lora_unet_{original.replace('.', '_')}.diff",
    ):
        wan, _ = fused({key: change}, 0.5, network=small_wan())
        assert changed(wan, before) == {f"{ours}.weight"}
        assert torch.allclose(difference(wan, before, f"{ours}.weight"), 0.5 * change)


def test_biases_and_modulation_of_wan(fused):
    before, bias, table = small_wan(), drawn(24), drawn(1, 6, 24)
    wan, line = fused({"diffusion_model.blocks.0.self_attn.q.diff_b": bias, "diffusion_model.blocks.1.diff_m": table},
                      network=small_wan())  # fmt: skip
    assert torch.allclose(difference(wan, before, "blocks.0.attn1.to_q.bias"), bias)
    assert torch.allclose(difference(wan, before, "blocks.1.scale_shift_table"), table)
    assert "2 of 2 layers" in line


# --- kinds, compared with other libraries ---------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr", "lokr_whole", "patterns"])
def test_files_of_peft_equal_its_own_results(kind, tmp_path):
    peft = pytest.importorskip("peft")
    modules = ["attn1.to_q", "attn2.to_v", "resnets.0.conv1"]
    settings = {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules),
        "rslora": peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=modules),
        "dora": peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=modules),
        "loha": peft.LoHaConfig(r=2, alpha=3, target_modules=modules),
        "lokr": peft.LoKrConfig(r=1, alpha=3, target_modules=modules, decompose_both=True),
        "lokr_whole": peft.LoKrConfig(r=8, alpha=3, target_modules=modules),
        "patterns": peft.LoraConfig(
            r=2, lora_alpha=5, target_modules=modules, rank_pattern={"attn1.to_q": 3}, alpha_pattern={"attn2.to_v": 7}
        ),
    }[kind]
    adapted = peft.get_peft_model(small_unet(), settings)
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad and "magnitude" not in name:
            weight.data = drawn(*weight.shape)
        elif weight.requires_grad:
            weight.data *= 1.2
    adapted.save_pretrained(tmp_path)
    unet = small_unet()
    fuse_loras({"unet": unet}, [LoraFile(str(tmp_path))])
    merged = adapted.merge_and_unload()
    moved = len(changed(unet, small_unet()))
    assert moved == 13
    for name, weight in merged.named_parameters():
        assert torch.allclose(unet.get_parameter(name), weight, atol=1e-5), name


_OF_TEXT = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out"))


def test_a_kohya_file_equals_diffusers(tmp_path):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(DEMO, local_files_only=True, torch_dtype=torch.float32)
    torch.manual_seed(0)
    tensors = {}
    for prefix, network, which in (
        ("unet", pipeline.unet, ("to_q", "to_out.0")),
        ("te", pipeline.text_encoder, _OF_TEXT),
    ):
        for name, weight in network.named_parameters():
            if name.removesuffix(".weight").endswith(which):
                layer = name.removesuffix(".weight").removeprefix("text_model.")
                key = f"lora_{prefix}_{'text_model_' if prefix == 'te' else ''}{layer.replace('.', '_')}"
                tensors |= {k: v.float() for k, v in pair(key, *weight.shape, rank=4).items()}
                tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    pipeline.load_lora_weights(tmp_path / "kohya.safetensors")
    pipeline.fuse_lora(lora_scale=0.7)
    pipeline.unload_lora_weights()
    ours = Checkpoint.load("demo", lora=f"{tmp_path / 'kohya.safetensors'}=0.7")
    for mine, theirs in ((ours.unet, pipeline.unet), (ours.text_encoders[0], pipeline.text_encoder)):
        for name, weight in theirs.named_parameters():
            assert torch.allclose(mine.get_parameter(name), weight, atol=1e-6), name
    assert ours.notes == (
        "LoRA kohya.safetensors: 36 of 36 layers at strength 0.7 (28 in the UNet, 8 in the text encoder)",
    )


def test_alpha_is_read_from_metadata_of_diffusers(fused):
    up, down = drawn(SIDE, 2), drawn(2, SIDE)
    tensors = {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}
    unet, _ = fused(tensors, lora_adapter_metadata=json.dumps({"unet.r": 2, "unet.lora_alpha": 3}))
    assert torch.allclose(difference(unet, small_unet(), f"{LAYER}.weight"), 1.5 * (up @ down))


def test_names_of_adapters_and_alphas_of_processors(fused):
    up, down = drawn(SIDE, 2), drawn(2, SIDE)
    unet, _ = fused({f"{LAYER}.lora_A.style.weight": down, f"{LAYER}.lora_B.style.weight": up})
    assert torch.allclose(difference(unet, small_unet(), f"{LAYER}.weight"), up @ down)
    old = LAYER.replace(".to_q", ".processor.to_q_lora")
    alpha = {f"{old}.alpha": torch.tensor(1)}
    unet, _ = fused({f"{old}.down.weight": down, f"{old}.up.weight": up} | alpha)
    assert torch.allclose(difference(unet, small_unet(), f"{LAYER}.weight"), 0.5 * (up @ down))


def test_magnitudes_of_inputs_and_of_outputs(fused):
    before, up, down = small_unet().get_parameter(f"{LAYER}.weight"), drawn(SIDE, 2), drawn(2, SIDE)
    for axis, shape in ((0, (SIDE, 1)), (1, (1, SIDE))):
        magnitude = drawn(*shape).abs() + 1
        tensors = {f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down, f"{KOHYA}.dora_scale": magnitude}
        unet, _ = fused(tensors, 0.25)
        whole = before + up @ down
        whole = magnitude * whole / whole.norm(dim=1 - axis, keepdim=True)
        assert torch.allclose(unet.get_parameter(f"{LAYER}.weight"), before + 0.25 * (whole - before))
        assert torch.allclose(decomposed(whole, magnitude.flatten(), axis), whole)


def test_tucker_convolutions_and_lycoris_alphas(fused):
    name = "down_blocks.0.resnets.0.conv1"
    key, before = f"lora_unet_{name.replace('.', '_')}", small_unet()
    down, mid, up = drawn(2, SIDE, 1, 1), drawn(2, 2, 3, 3), drawn(SIDE, 2, 1, 1)
    parts = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    unet, _ = fused({f"{key}.{part}": tensor for part, tensor in parts.items()})
    expected = 0.5 * torch.einsum("or,rskl,si->oikl", up[..., 0, 0], mid, down[..., 0, 0])
    assert torch.allclose(difference(unet, before, f"{name}.weight"), expected)

    w1, w2 = drawn(2, 2), drawn(4, 4, 3, 3)  # two full factors: alpha does not apply
    unet, _ = fused({f"{key}.lokr_w1": w1, f"{key}.lokr_w2": w2, f"{key}.alpha": torch.tensor(9.0)})
    assert torch.allclose(difference(unet, before, f"{name}.weight"), torch.kron(w1[..., None, None], w2))

    norm = "down_blocks.0.resnets.0.norm1"
    change = {f"lora_unet_{norm.replace('.', '_')}.{part}_norm": drawn(SIDE) for part in "wb"}
    unet, _ = fused(change)
    assert torch.allclose(
        difference(unet, before, f"{norm}.bias"), change[f"lora_unet_{norm.replace('.', '_')}.b_norm"]
    )
    assert changed(unet, before) == {f"{norm}.weight", f"{norm}.bias"}


def test_several_loras_add_up_and_strength_zero_is_off(tmp_path):
    files, changes = [], []
    for n in range(2):
        changes.append(drawn(SIDE, SIDE))
        save_file({f"{KOHYA}.diff": changes[-1]}, tmp_path / f"{n}.safetensors")
        files.append(str(tmp_path / f"{n}.safetensors"))
    unet = small_unet()
    lines = fuse_loras({"unet": unet}, [LoraFile(files[0], 0.5), LoraFile(files[1], -1.0)])
    assert len(lines) == 2
    assert torch.allclose(difference(unet, small_unet(), f"{LAYER}.weight"), 0.5 * changes[0] - changes[1])
    off = small_unet()
    fuse_loras({"unet": off}, [LoraFile(files[0], 0.0)])
    assert not changed(off, small_unet())


def test_half_precision_is_rounded_once(fused):
    unet, up, down = small_unet().half(), drawn(SIDE, 2), drawn(2, SIDE)
    exact = (unet.get_parameter(f"{LAYER}.weight").float() + (up.float() @ down.float())).half()
    fused({f"{KOHYA}.lora_up.weight": up, f"{KOHYA}.lora_down.weight": down}, network=unet)
    assert torch.equal(unet.get_parameter(f"{LAYER}.weight"), exact)


# --- Wan 2.2's pair -------------------------------------------------------------------------


def test_a_lora_is_for_both_transformers_of_a_pair_or_the_named_one(tmp_path):
    changes = {"blocks.0.self_attn.q.diff": drawn(24, 24)}

    def fuse(*names):
        pair = {"transformer": small_wan(0), "transformer_2": small_wan(1)}
        for name in names:
            save_file(changes, tmp_path / name)
        lines = fuse_loras(pair, [LoraFile(str(tmp_path / name)) for name in names])
        moved = [len(changed(pair[n], small_wan(i))) for i, n in enumerate(pair)]
        return moved, lines

    assert fuse("style.safetensors")[0] == [1, 1]
    assert fuse("slow_motion_glow.safetensors")[0] == [1, 1], "words that contain high and low do not count"
    assert fuse("style_high_noise.safetensors")[0] == [1, 0]
    moved, lines = fuse("styleLowNoise.safetensors")
    assert moved == [0, 1] and "low-noise transformer" in lines[0]
    assert fuse("style-HIGH.safetensors", "style-LOW.safetensors")[0] == [1, 1]
    for unclear in ("low_poly.safetensors", "style_high_low.safetensors"):
        with pytest.raises(LoraError, match=f"{unclear}: unclear"):
            fuse(unclear)


# --- refused --------------------------------------------------------------------------------


def pair(layer, up=SIDE, down=SIDE, rank=2):
    return {f"{layer}.lora_up.weight": drawn(up, rank), f"{layer}.lora_down.weight": drawn(rank, down)}


REFUSED = {
    "flux": (pair("transformer.single_transformer_blocks.0.attn.to_q"), "for Flux .* none of its 1 layers"),
    "sd3": (pair("transformer.transformer_blocks.0.attn.add_q_proj"), "for Stable Diffusion 3"),
    "wan": (pair("diffusion_model.blocks.0.self_attn.q"), "for Wan, .* the model is Stable Diffusion"),
    "motion": (pair("down_blocks.0.motion_modules.0.temporal_transformer.proj_in"), "for AnimateDiff motion"),
    "sdxl": (pair(KOHYA) | pair("lora_te2_text_model_encoder_layers_0_mlp_fc1"), "SDXL.* 1 of its 2 layers match no"),
    "in part": (pair(KOHYA) | pair("lora_unet_down_blocks_7_attentions_0_proj_in"), "1 of its 2 layers .*blocks_7"),
    "size": (pair(KOHYA, 320, 320), r"attn1_to_q\S* is for a layer of 320x320, .* 8x8"),
    "no up": ({f"{KOHYA}.lora_down.weight": drawn(2, SIDE)}, "has no up"),
    "ranks": (pair(KOHYA) | {f"{KOHYA}.lora_down.weight": drawn(3, SIDE)}, "conflicting shapes"),
    "dora alone": ({f"{KOHYA}.dora_scale": drawn(SIDE, 1)}, "has no up"),
    "magnitudes": (pair(KOHYA) | {f"{KOHYA}.dora_scale": drawn(5, 1)}, "5 magnitudes; 8"),
    "bias": ({f"{KOHYA}.diff_b": drawn(SIDE)}, "changes a bias"),
    "oft": ({f"{KOHYA}.oft_blocks": drawn(2, 4, 4)}, "OFT"),
    "glora": ({f"{KOHYA}.a1.weight": drawn(2, 4)}, "GLoRA"),
    "ia3": ({f"{KOHYA}.weight": drawn(8), f"{KOHYA}.on_input": torch.zeros(1)}, r"\(IA\)\^3"),
    "dropped": (pair(KOHYA) | {f"{KOHYA}.other": drawn(2)}, "1 of its 3 tensors .*other"),
    "embedding": ({"emb_params": drawn(2, 768)}, "not a LoRA: .* textual inversion"),
    "model": ({"model.diffusion_model.input_blocks.0.0.weight": drawn(4, 4)}, "not a LoRA"),
    "empty": ({}, "not a LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_mismatches_are_refused_and_change_nothing(fused, case):
    tensors, message = REFUSED[case]
    unet = small_unet()
    with pytest.raises(LoraError, match=f"^style.safetensors.*{message}") as refusal:
        fused(tensors, network=unet)
    assert len(str(refusal.value)) < 320
    assert not changed(unet, small_unet())


def test_infinite_and_nan_weights(fused):
    for change, strength in ((torch.full((SIDE, SIDE), torch.nan), 1.0), (torch.ones(SIDE, SIDE), 1e9)):
        with pytest.raises(LoraError, match="infinite or NaN"):
            fused({f"{KOHYA}.diff": change}, strength, network=small_unet().half())


def test_a_lora_of_pictures_on_wan(fused):
    with pytest.raises(LoraError, match="for Stable Diffusion, .* the model is Wan"):
        fused(pair("lora_unet_down_blocks_0_attentions_0_proj_in"), network=small_wan())
    with pytest.raises(LoraError, match="for Wan image-to-video"):
        fused(pair("blocks.0.self_attn.q", 24, 24) | pair("blocks.0.cross_attn.k_img", 24, 24), network=small_wan())


def test_unreadable_files(tmp_path):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (tmp_path / "page.safetensors").write_text("<html>not found</html>")
    (tmp_path / "two").mkdir()
    for name, message in (
        ("pointer.safetensors", "git lfs pull"), ("page.safetensors", "damaged"), ("none.safetensors", "no LoRA at"),
        ("two", "contains no LoRA"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.load("demo", lora=str(tmp_path / name))


# --- options --------------------------------------------------------------------------------


def test_strengths_and_names_with_equals_signs(tmp_path):
    assert LoraFile.parse("a.safetensors=0.8") == LoraFile("a.safetensors", 0.8)
    assert LoraFile.parse("a.safetensors=-1e-1") == LoraFile("a.safetensors", -0.1)
    assert LoraFile.parse("a=b.safetensors") == LoraFile("a=b.safetensors")
    (tmp_path / "x=2").touch()
    assert LoraFile.parse(str(tmp_path / "x=2")) == LoraFile(str(tmp_path / "x=2"))
    assert LoraFile.parse(f"{tmp_path / 'x=2'}=3") == LoraFile(str(tmp_path / "x=2"), 3.0)
    for one in (LoraFile("a.safetensors", 0.8), LoraFile("a=2"), LoraFile("a=2", 0.5), LoraFile("a.safetensors")):
        assert LoraFile.parse(str(one)) == one
    with pytest.raises(ValueError, match=r"lora 'a=nan' has strength nan"):
        LoraFile.parse("a=nan")


def test_a_folder_with_one_lora_or_several(tmp_path):
    one = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(pair(KOHYA), one)
    (tmp_path / "pytorch_lora_weights.bin").touch()
    assert LoraFile(str(tmp_path)).file() == one, "the same in another format"
    save_file(pair(KOHYA), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"contains 2 possible LoRAs .*other\.safetensors.*: give the file"):
        LoraFile(str(tmp_path)).file()


def test_a_bin_file(tmp_path):
    tensors = pair(KOHYA)
    torch.save(tensors, tmp_path / "a.bin")
    unet = small_unet()
    fuse_loras({"unet": unet}, [LoraFile(str(tmp_path / "a.bin"))])
    assert changed(unet, small_unet()) == {f"{LAYER}.weight"}
