"""Encoders of latent spaces, built small with random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny


def write(root: Path, channels: dict[str, int]) -> Path:
    """Save an AutoencoderTiny of so many latent channels for each name, in a folder of that name."""
    for seed, (name, count) in enumerate(channels.items()):
        torch.manual_seed(seed)
        options = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1), "latent_channels": count}
        widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        AutoencoderTiny(**options, **widths).save_pretrained(root / name)
    return root
