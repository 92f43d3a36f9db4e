"""The embedded model's parts: Stable Diffusion's classes and layout at a fortieth of its size, in its latent space.

References:
    High-Resolution Image Synthesis with Latent Diffusion Models, Rombach et al., 2022, arXiv 2112.10752
    Image-to-Image Translation with Conditional Adversarial Networks, Isola et al., 2017, arXiv 1611.07004
"""

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from train_mini.settings import SCALING, SIZE, TOKENS, UnetSettings


def build_vae(channels: tuple[int, ...]) -> AutoencoderKL:
    """Build the autoencoder: f = 8, four latent channels, one attention layer in the middle."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=SCALING,
        force_upcast=False,  # stock pipelines would turn a float16 model's autoencoder to float32, and its inputs not
    )


def encoder_of(vae: AutoencoderKL) -> nn.ModuleDict:
    """Return what turns pictures into latents."""
    return nn.ModuleDict({"encoder": vae.encoder, "quant_conv": vae.quant_conv})


def decoder_of(vae: AutoencoderKL) -> nn.ModuleDict:
    """Return what turns latents into pictures."""
    return nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})


def build_critic(width: int) -> nn.Sequential:
    """Build a patch discriminator with three strided layers (pix2pix)."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for factor in (1, 2):
        layers += [nn.Conv2d(width * factor, width * factor * 2, 4, 2, 1), nn.GroupNorm(8, width * factor * 2)]
        layers += [nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(width * 4, 1, 4, 1, 1))


def build_prior(settings: UnetSettings, vocabulary: int) -> nn.ModuleDict:
    """Build UNet and text encoder: cross-attention at 16 x 16 and 8 x 8 latent positions, heads of 32 channels."""
    cross = ("CrossAttnDownBlock2D",) * (len(settings.channels) - 1)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        layers_per_block=settings.layers,
        block_out_channels=settings.channels,
        down_block_types=(*cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *(name.replace("Down", "Up") for name in cross)),
        cross_attention_dim=settings.text_width,
        attention_head_dim=[width // 32 for width in settings.channels],  # diffusers' name for the number of heads
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=settings.text_width,
            intermediate_size=4 * settings.text_width,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=settings.text_width // 32,
            max_position_embeddings=TOKENS,
            projection_dim=settings.text_width,
            bos_token_id=0,  # the vocabulary's first two entries are begin and end of text
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def build_scheduler(prediction: str) -> DDIMScheduler:
    """Build Stable Diffusion's noise schedule: scaled-linear, 1000 steps."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
