"""The embedded model's parts: Stable Diffusion's classes and layout at a fortieth of its size.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al., 2022, arXiv 2112.10752
"""

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

SIZE = 128  # pixels, the side of every training picture
TOKENS = 32  # length of the text window; the longest caption has 33 words and is cut
TEXT_WIDTH = 160


def build_vae(channels: tuple[int, ...] = (32, 64, 96, 128)) -> AutoencoderKL:
    """Build the autoencoder: f = 8, four latent channels, one attention layer in the middle."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def build_unet(channels: tuple[int, ...] = (64, 128, 192)) -> UNet2DConditionModel:
    """Build the UNet: cross-attention at 16 x 16 and 8 x 8 latent positions, heads of 32 channels."""
    cross = ("CrossAttnDownBlock2D",) * (len(channels) - 1)
    return UNet2DConditionModel(
        sample_size=SIZE // 8,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=(*cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in cross)),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=[width // 32 for width in channels],
        norm_num_groups=16,
    )


def build_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Build the text encoder for a vocabulary whose first two entries are begin and end of text."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=5,
            max_position_embeddings=TOKENS,
            projection_dim=TEXT_WIDTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule: scaled-linear, 1000 steps, epsilon prediction."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
