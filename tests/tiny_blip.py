"""A small random BLIP that captions pictures with the demo's words."""

from pathlib import Path

import torch
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
)

WORDS = ["a", "red", "green", "blue", "square", "circle", "triangle", "on", "water", "sand"]


def write_blip(folder: Path, seed: int = 1) -> Path:
    """Write it in transformers' layout and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = BlipTextConfig(
        vocab_size=len(vocabulary), **size, encoder_hidden_size=16, max_position_embeddings=64, bos_token_id=5,
        eos_token_id=3, sep_token_id=3, pad_token_id=0, projection_dim=16,
    )  # fmt: skip
    vision = BlipVisionConfig(**size, image_size=32, patch_size=8, projection_dim=16)
    torch.manual_seed(seed)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_text_hidden_size=16)
    BlipForConditionalGeneration(config).save_pretrained(folder)
    processor = BlipImageProcessor(size={"height": 32, "width": 32})
    words = BertTokenizerFast(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]", "[ENC]"])
    BlipProcessor(processor, words).save_pretrained(folder)
    return folder
