"""Train the models of world 2: `python -m fatezero.demo.world2.train --out FOLDER`.

The autoencoder starts from the demo's and learns crops of pictures; then the UNet and the video transformer learn
latents. A folder keeps what is rendered, and states from which a stopped training resumes with the same result.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...files.bundled import DEMO
from ...hosts.diffusers import VideoTransformer
from .. import model as demo
from .. import video_model
from ..train import Painter, batch_of, noise_weight, save_checkpoint, standardise, vae_loss
from ..train_video import draw_sigmas
from ..training import Plan, Report, saved_step, train_weights
from ..video_model import VideoPainter, save_video_model
from .data import Latents, owners_of_words, rendered
from .model import TEXT_TOKENS, ShapeReader, WordReader, area_weight, build_transformer, build_unet
from .scenes import SIZE, VOCABULARY

READING = 0.1
"""Weight of the readers' errors."""
LENGTHS, SHARES = (1, 9, 17), ((0.9, 0.07, 0.03), (0.5, 0.35, 0.15))
"""Lengths of the transformer's clips, and their shares of the steps in the first and the second half."""


@dataclass(frozen=True)
class Settings:
    """Training settings for a GPU; `on_cpu` are those for a CPU, with smaller models.

    Pictures and clips grow with the steps: `first`, and one file of them every `grow` steps. frames: of a step's clips.
    width: of the UNet. heads, ffn: of the transformer.
    """

    seed: int = 0
    vae_steps: int = 2_000
    vae_batch: int = 16
    crops: int = 8_000
    pictures: int = 30_000
    clips: int = 2_000
    first: int = 30_000
    grow: int = 1
    unet_steps: int = 12_000
    unet_batch: int = 96
    unet_rate: float = 6e-4
    width: int = 128
    heads: int = 8
    ffn: int = 768
    steps: int = 12_000
    frames: int = 204
    rate: float = 1e-3
    text_dropout: float = 0.1
    average: float = 0.999
    save_every: int = 200
    part: int = 25
    minutes: float | None = None

    def plan(self, name: str, state: Path) -> Plan:
        """The training of the UNet or of the transformer."""
        steps, rate = (self.unet_steps, self.unet_rate) if name == "unet" else (self.steps, self.rate)
        return Plan(name, state, steps, rate, self.average, self.save_every, minutes=self.minutes)

    def on_cpu(self) -> Settings:
        return replace(
            self, vae_steps=700, vae_batch=4, crops=3_000, pictures=16_000, clips=800, first=1_000, grow=250,
            unet_steps=7_500, unet_batch=16, width=64, heads=5, ffn=448, steps=9_000, frames=18,
        )  # fmt: skip

    def tiny(self) -> Settings:
        return replace(
            self, vae_steps=2, vae_batch=2, crops=4, pictures=2, clips=2, first=2, part=2, unet_steps=2, unet_batch=2,
            steps=2, frames=17, save_every=1, minutes=None,
        )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a training writes and uses.

    out: folder for `unet`, a whole checkpoint, and `wan`, whose autoencoder is that of `unet` if it is there. state:
    folder of what is rendered, and from which a stopped training resumes. parts: of "unet", "wan". workers: processes
    that render. start: folder of finished models, laid out like `out`, from whose weights to start; the autoencoder is
    kept.
    """

    out: Path
    state: Path
    parts: Sequence[str] = ("unet", "wan")
    workers: int = 1
    start: Path | None = None


# --- the autoencoder --------------------------------------------------------------------


def load_vae(folder: Path = DEMO / "vae") -> AutoencoderKL:
    """The demo's autoencoder, or another; its configuration does not keep the folder's name."""
    found: AutoencoderKL = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
    found.load_state_dict(AutoencoderKL.from_pretrained(folder).state_dict())
    found.register_to_config(sample_size=SIZE)
    return found.float()


def crops_of(settings: Settings, work: Callable[..., Iterable[tuple[Tensor, Tensor]]]) -> Tensor:
    """Crops (n, 3, 64, 64) of pictures, two of each, uint8."""
    share = min(100, settings.crops // 2)
    jobs = [(777_000_000 + settings.seed * 10_000 + n, share, False) for n in range(settings.crops // 2 // share)]
    random, found = torch.Generator().manual_seed(settings.seed), list[Tensor]()
    for pictures, _ in work(rendered, jobs):
        for picture in pictures:
            places = torch.randint(SIZE - 63, (2, 2), generator=random).tolist()
            found += [picture[:, y : y + 64, x : x + 64] for y, x in places]
    return torch.stack(found)


def train_vae(crops: Tensor, state: Path, settings: Settings, device: torch.device, report: Report) -> AutoencoderKL:
    """Fine-tune the demo's autoencoder by its own loss, then standardise its latents."""
    vae = load_vae().to(device, memory_format=torch.channels_last)

    def error_of(step: int) -> Tensor:
        chosen, random = batch_of(settings.seed + 5, step, settings.vae_batch, len(crops))
        x = crops[chosen].to(device).float() / 127.5 - 1
        noise = torch.randn(len(x), 4, 16, 16, generator=random).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            loss, error = vae_loss(vae, x, noise)
        loss.backward()
        return error.detach()

    plan = Plan(
        "autoencoder's squared error", state / "vae_training.safetensors", settings.vae_steps, 4e-4, 0.99,
        settings.save_every, report_every=20,
    )  # fmt: skip
    train_weights(dict(vae.named_parameters()), plan, error_of, report)
    standardise(vae, crops[:1024], device)
    return vae.eval()


# --- the painters -----------------------------------------------------------------------


def grown(latents: Latents, settings: Settings, step: int) -> int:
    """The number of scenes that a step may choose from, whole files, which are rendered if they are not yet."""
    share, most = latents.part * latents.parts, settings.clips if latents.clips else settings.pictures
    count = math.ceil(min(most, settings.first + share * (step // settings.grow)) / share) * share
    latents.grow(count)
    return count


class Captions:
    """Token ids of a growing set's captions, two each, and of the empty one, with `owners_of_words`.

    before: tokens in front of the first word.
    """

    def __init__(self, latents: Latents, tokens_of: Callable[[list[str]], tuple[Tensor, ...]], before: int = 0) -> None:
        def ids_of(captions: list[str]) -> tuple[Tensor, ...]:
            found = tokens_of(captions)
            return *found, torch.stack([owners_of_words(text, found[0].shape[1], before) for text in captions])

        self.latents, self.ids_of = latents, ids_of
        self.empty = ids_of([""])
        self.ids = [ids[:0].unflatten(0, (-1, 2)) for ids in ids_of(["", ""])]

    def at(self, chosen: Tensor, none: Tensor, random: torch.Generator) -> list[Tensor]:
        """The ids and owners of a caption of each chosen scene, with all words in every second."""
        known = len(self.ids[0])
        if known < len(self.latents.captions):
            new = self.ids_of([caption for pair in self.latents.captions[known:] for caption in pair])
            self.ids = [torch.cat([old, ids.unflatten(0, (-1, 2))]) for old, ids in zip(self.ids, new, strict=True)]
        which = torch.randint(2, (len(chosen),), generator=random)
        return [
            torch.where(none[:, None], empty, ids[chosen, which])
            for ids, empty in zip(self.ids, self.empty, strict=True)
        ]


def sized(settings: Settings, run: Run) -> Settings:
    """The settings with the sizes of the finished models that a run starts from, if any."""
    if run.start and "unet" in run.parts:
        unet = UNet2DConditionModel.load_config(run.start / "unet" / "unet")
        settings = replace(settings, width=unet["block_out_channels"][0])
    if run.start and "wan" in run.parts:
        wan = VideoTransformer.load_config(run.start / "wan" / "transformer")
        settings = replace(settings, heads=wan["num_attention_heads"], ffn=wan["ffn_dim"])
    return settings


def start_from(folder: Path | None, **networks: nn.Module) -> None:
    """Load the weights of a finished model, if one is given, into networks, which are named like its folders."""
    if folder is None:
        return
    for name, network in networks.items():
        network.load_state_dict(type(network).from_pretrained(folder / name).state_dict())  # type: ignore[attr-defined]


def train_unet(run: Run, pictures: Latents, settings: Settings, device: torch.device, report: Report) -> Painter:
    """Predict epsilon as in the demo world, with more weight on things, and shapes read from places of 16x16."""
    torch.manual_seed(settings.seed)
    tokenizer = demo.build_tokenizer(run.state / "tokenizer", VOCABULARY)
    live = Painter(tokenizer, build_unet(settings.width))
    start_from(run.start and run.start / "unet", unet=live.unet, text_encoder=live.text)
    live.to(device).train()
    if device.type == "cpu":
        live.unet.set_attn_processor(AttnProcessor())  # fused kernels take half as long again with heads this narrow
    reader = ShapeReader(live.unet.up_blocks[0], live.unet.config["block_out_channels"][-1]).to(device)
    words = WordReader(layer for name, layer in live.unet.up_blocks.named_modules() if name.endswith("attn2"))
    captions = Captions(pictures, lambda texts: (demo.token_ids(tokenizer, texts),), before=1)
    alphas = demo.build_scheduler().alphas_cumprod.to(device)
    grown(pictures, settings, 0)

    def error_of(step: int) -> Tensor:
        chosen, random = batch_of(settings.seed + 3, step, settings.unet_batch, grown(pictures, settings, step))
        latents, owners = (x[:, 0].to(device) for x in pictures.at(chosen))
        noise = torch.randn(latents.shape, generator=random).to(device)
        t = torch.randint(1000, (len(latents),), generator=random)
        none = torch.rand(len(latents), generator=random) < settings.text_dropout
        text, told = (ids.to(device) for ids in captions.at(chosen, none, random))
        signal, t = alphas[t.to(device)].view(-1, 1, 1, 1), t.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            states = live.text(text).last_hidden_state
            predicted = live.unet(signal.sqrt() * latents + (1 - signal).sqrt() * noise, t, states).sample
            reading = reader(owners) + words(owners[:, None], told)
        error = (predicted.float() - noise) ** 2
        weighted = noise_weight(signal) * area_weight(owners)[:, None] * error
        (weighted.mean() + READING * reading).backward()
        return error.mean().detach()

    train_read(live, (reader, words), settings.plan("unet", run.state / "painter.safetensors"), error_of, report)
    return live


def train_transformer(
    run: Run, pictures: Latents, clips: Latents, settings: Settings, device: torch.device, report: Report
) -> tuple[VideoPainter, video_model.T5Tokenizer]:
    """Predict velocity as in the demo world, of pictures and of clips."""
    torch.manual_seed(settings.seed)
    tokenizer = video_model.build_tokenizer(VOCABULARY, TEXT_TOKENS)
    live = VideoPainter(tokenizer, build_transformer(settings.heads, settings.ffn))
    start_from(run.start and run.start / "wan", transformer=live.transformer, text_encoder=live.text)
    live.to(device).train()
    blocks = live.transformer.blocks
    reader = ShapeReader(blocks[len(blocks) // 2], live.transformer.proj_out.in_features).to(device)
    words = WordReader(block.attn2 for block in blocks[1 : len(blocks) // 2 + 1])
    for data in (pictures, clips):
        grown(data, settings, 0)
    sets = {data: Captions(data, partial(video_model.token_ids, tokenizer)) for data in (pictures, clips)}

    def error_of(step: int) -> Tensor:
        random = torch.Generator().manual_seed(settings.seed * 10_000_019 + step)
        shares = SHARES[step >= settings.steps / 2]
        length = LENGTHS[int(torch.multinomial(torch.tensor(shares), 1, generator=random))]
        data = pictures if length == 1 else clips
        chosen = torch.randint(grown(data, settings, step), (max(settings.frames // length, 1),), generator=random)
        latents, owners = data.at(chosen)
        first = int(torch.randint(latents.shape[1] - length + 1, (), generator=random))
        x = latents[:, first : first + length].transpose(1, 2).to(device)
        owners = owners[:, first : first + length].to(device)
        sigmas, none = draw_sigmas(len(x), settings.text_dropout, random)
        noise = torch.randn(x.shape, generator=random).to(device)
        *text, told = (ids.to(device) for ids in sets[data].at(chosen, none, random))
        s = sigmas.to(device).view(-1, 1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            velocity = live((1 - s) * x + s * noise, s.flatten(), *text)
            reading = reader(owners.flatten(0, 1)) + words(owners, told)
        error = (velocity.float() - (noise - x)) ** 2
        ((area_weight(owners)[:, None] * error).mean() + READING * reading).backward()
        return error.mean().detach()

    train_read(
        live, (reader, words), settings.plan("transformer", run.state / "transformer.safetensors"), error_of, report
    )
    return live, tokenizer


def train_read(
    live: nn.Module,
    readers: tuple[ShapeReader, WordReader],
    plan: Plan,
    error_of: Callable[[int], Tensor],
    report: Report,
) -> None:
    """Train networks together with the readers in them, which are then removed."""
    shapes, words = readers
    weights = dict(live.named_parameters()) | {f"reader.{name}": p for name, p in shapes.named_parameters()}
    train_weights(weights, plan, error_of, report)
    shapes.remove()
    words.remove()
    live.eval()


# --- the whole --------------------------------------------------------------------------


def train(run: Run, settings: Settings, device: torch.device, report: Report = print) -> None:
    """Train the autoencoder, unless the state has it, and the given parts."""
    out, state, parts, workers, settings = run.out, run.state, run.parts, run.workers, sized(settings, run)
    state.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work: Callable[..., Iterable[tuple[Tensor, Tensor]]] = map
        if workers > 1:
            pool = multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,))
            work = stack.enter_context(pool).imap
        vae, trained = load_vae(), state / "vae.safetensors"
        if not trained.exists():
            if run.start:
                vae = load_vae(run.start / "unet" / "vae")
            else:
                vae = train_vae(crops_of(settings, work), state, settings, device, report)
            save_file({name: weight.cpu().contiguous() for name, weight in vae.state_dict().items()}, trained)
        vae.load_state_dict(load_file(trained))
        vae = vae.to(device, memory_format=torch.channels_last).eval()
        folder, part = state / "latents", settings.part
        pictures = Latents(folder, vae, False, settings.seed, part, 1 if part < 25 else 40, work)
        clips = Latents(folder, vae, True, settings.seed, min(part, 5), 1 if part < 25 else 20, work)
        if "unet" in parts:
            painter = train_unet(run, pictures, settings, device, report)
            save_checkpoint(out / "unet", vae, painter, VOCABULARY)
        if "wan" in parts:
            live, tokenizer = train_transformer(run, pictures, clips, settings, device, report)
            save_video_model(out / "wan", live, tokenizer)
            if not (out / "unet" / "vae").is_dir():
                deepcopy(vae).cpu().half().save_pretrained(out / "wan" / "vae", safe_serialization=True)


def as_far_as(run: Run, settings: Settings) -> Settings:
    """The settings whose trainings end where the run's are."""
    unet, transformer = (
        saved_step(run.state / f"{name}.safetensors") if part in run.parts else 0
        for name, part in (("painter", "unet"), ("transformer", "wan"))
    )
    return replace(settings, unet_steps=unet, steps=transformer, minutes=None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/world2"), help="folder for the models")
    parser.add_argument("--state", type=Path, help="folder from which a stopped training resumes (OUT/state)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=("unet", "wan"), help="train only this model")
    parser.add_argument("--minutes", type=float, help="minutes for each model, instead of a number of steps")
    parser.add_argument("--now", action="store_true", help="write the models of unfinished trainings")
    parser.add_argument("--steps", type=int, help="steps of each model, instead of those that are set")
    parser.add_argument("--start", type=Path, help="folder of finished models, whose training to go on with")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes; to go on, one that is not yet used (0)")
    parser.add_argument("--tiny", action="store_true", help="two steps of each, to try it")
    parser.add_argument("--workers", type=int, default=1, help="processes that render")
    given = parser.parse_args(arguments)
    device, settings = torch.device(given.device), Settings(given.seed, minutes=given.minutes)
    settings = settings.on_cpu() if device.type == "cpu" else settings
    if given.steps:
        settings = replace(settings, unet_steps=given.steps, steps=given.steps)
    settings = settings.tiny() if given.tiny else settings
    parts = (given.part,) if given.part else ("unet", "wan")
    run = Run(given.out, given.state or given.out / "state", parts, given.workers, given.start)
    if given.now:
        settings = as_far_as(run, settings)
    train(run, settings, device, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
